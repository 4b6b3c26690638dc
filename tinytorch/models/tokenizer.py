"""The tokenizer of a downloaded model, from its files: lesson 10's byte-level BPE.

Written by hand, not built from a lesson.
"""

import json
from pathlib import Path

from tinytorch.core.training import CheckpointError
from tinytorch.models.safetensors import read_json
from tinytorch.text.tokenization import BPETokenizer, byte_letters, plain_ids, read_gpt2_files

__all__ = ["FileTokenizer", "load_tokenizer"]


class FileTokenizer(BPETokenizer):
    """What `load_tokenizer` returns: `encode`, `decode`, `vocab_size`, `special_tokens`, `bos_id`, `eos_ids`."""

    bos_id, eos_ids = None, ()

    def encode(self, text, add_special_tokens=True, allow_special=True):
        """The ids of a text, special tokens in it recognised."""
        return super().encode(text, allow_special)

    def decode(self, ids, skip_special_tokens=False):
        """The text of a list of ids."""
        special = set(self.special_tokens.values()) if skip_special_tokens else ()
        return super().decode([i for i in plain_ids(ids) if i not in special])


def load_tokenizer(path):
    """The tokenizer in a directory (tokenizer.json, or vocab.json and merges.txt) or in a tokenizer.json."""
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    file = path / "tokenizer.json" if path.is_dir() else path
    if file.is_file():
        state = read_json(file)
        ids, letters = state["model"]["vocab"], byte_letters()
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in state["model"]["merges"]]
        triples = [(ids[left], ids[right], ids[left + right]) for left, right in pairs]
        special = {token["content"]: token["id"] for token in state["added_tokens"]}
        tokenizer = FileTokenizer().set_state([ids[letter] for letter in letters], triples, special)
    elif (folder / "vocab.json").is_file():
        tokenizer = FileTokenizer().set_state(*read_gpt2_files(folder / "vocab.json", folder / "merges.txt"))
    else:
        raise CheckpointError(f"{path} holds no tokenizer.json, and no vocab.json with merges.txt")
    if (folder / "tokenizer_config.json").is_file():
        config = read_json(folder / "tokenizer_config.json")
        named = [config.get(name) for name in ("bos_token", "eos_token")]
        bos, eos = (tokenizer.special_tokens.get(n["content"] if isinstance(n, dict) else n) for n in named)
        tokenizer.bos_id, tokenizer.eos_ids = bos, () if eos is None else (eos,)
    return tokenizer

"""The demo's language model: its text, its checkpoint, and a model with its tokenizer in one file.

The text is the documentation topics that every Python carries (pydoc_data): about 465,000 characters of English.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np

from tinytorch.core.training import load_checkpoint, save_checkpoint
from tinytorch.models.transformer import GPT
from tinytorch.text.tokenization import BPETokenizer

CHECKPOINT = Path(__file__).with_name("demo.safetensors")  # a GPT of 957,184 parameters, trained on the text below


def text() -> str:
    """All topics, in the order of their names, with the lines of a paragraph joined."""
    from pydoc_data.topics import topics

    return "\n\n".join(joined(topics[name].strip()) for name in sorted(topics))


def joined(text: str, wrapped: int = 50) -> str:
    """A line of more than `wrapped` characters goes on in the next one, if that is indented alike."""
    lines: list[str] = []
    goes_on, margin = False, 0
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        if goes_on and line.strip() and indent == margin:
            lines[-1] += " " + line.strip()
        else:
            lines.append(line.rstrip())
        goes_on, margin = len(line.strip()) > wrapped, indent
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))


def splits(ids: list[int], share: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    """The ids for training and, from the end of the text, the `share` that is kept for validation."""
    cut = int(len(ids) * (1 - share))
    return np.asarray(ids[:cut]), np.asarray(ids[cut:])


def windows(ids: np.ndarray, starts: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets (B, T): the tokens from each start, and the same one place later."""
    places = starts[:, None] + np.arange(seq_len + 1)
    return ids[places[:, :-1]], ids[places[:, 1:]]


def validation_batches(ids: np.ndarray, seq_len: int, batch_size: int = 8) -> list:
    """The validation text once, in windows that do not overlap."""
    starts = np.arange(0, len(ids) - seq_len - 1, seq_len)
    groups = np.array_split(starts, max(1, len(starts) // batch_size))
    return [windows(ids, group, seq_len) for group in groups]


def save(path: Path, model: GPT, config: dict, tokenizer: BPETokenizer, notes: dict[str, str]) -> None:
    """Weights as float16 (half the bytes; the loss stays as it is to three digits), the rest as JSON beside them."""
    tensors = {name: array.astype(np.float16) for name, array in model.state_dict().items()}
    metadata = {"config": json.dumps(config), "tokenizer": json.dumps(tokenizer.to_dict()), **notes}
    save_checkpoint(path, tensors, metadata)


def load(path: Path = CHECKPOINT) -> tuple[GPT, BPETokenizer, dict[str, str]]:
    """The model in eval mode with float32 weights, its tokenizer, and the notes of who made it.

    ValueError, with one sentence, for a file that is no such checkpoint.
    """
    try:
        return _load(path)
    except (ValueError, KeyError, TypeError, RuntimeError, OSError) as error:
        raise ValueError(f"{path} cannot be used: {error}") from error


def _load(path: Path) -> tuple[GPT, BPETokenizer, dict[str, str]]:
    tensors, metadata = load_checkpoint(path)
    if "config" not in metadata or "tokenizer" not in metadata:
        raise ValueError("it lacks the model's config and tokenizer; `tito demo --train` makes a whole one")
    model = GPT(**json.loads(metadata.pop("config")), rng=np.random.default_rng(0))
    tokenizer = BPETokenizer.from_dict(json.loads(metadata.pop("tokenizer")))
    model.load_state_dict({name: array.astype(np.float32) for name, array in tensors.items()})
    model.eval()
    return model, tokenizer, metadata

"""load_tokenizer: what lies in a model's directory as a tokenizer.

Written by hand, not built from a lesson.
"""

from pathlib import Path

from tinytorch.core.training import CheckpointError
from tinytorch.models.safetensors import read_json
from tinytorch.models.tokenizer.added import NAMES, collect_added, give_ids, read_named
from tinytorch.models.tokenizer.bpe import BPE, FileTokenizer
from tinytorch.models.tokenizer.parts import Part, is_text, short
from tinytorch.models.tokenizer.steps import (
    read_decoder,
    read_normalizer,
    read_post_processor,
    read_pre_tokenizer,
)
from tinytorch.text.tokenization import read_merges

__all__ = ["load_tokenizer"]

WHOLE, VOCAB, MERGES = "tokenizer.json", "vocab.json", "merges.txt"
ADDING = ("add_bos_token", "add_eos_token")
CONFIG, OLDER, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"


def load_tokenizer(path):
    """The FileTokenizer of a model's directory, or of a tokenizer.json.

    It comes from tokenizer.json, or where there is none from vocab.json and merges.txt, for GPT-2 and Qwen2; what
    tokenizer_config.json adds is added as transformers does. Truncation and padding are left out.
    What is damaged, or of a kind that we do not have, is a CheckpointError that names the file and the place in it.
    """
    path = Path(path)
    folder, file = (path, path / WHOLE) if path.is_dir() else (path.parent, path)
    config = read_config(folder)
    if file.is_file() or not path.is_dir():
        state = open_json(file)
        for role in ADDING:  # here the post-processor has the say
            config.pop(role, None)
    elif all((folder / name).is_file() for name in (VOCAB, MERGES)):
        state = gpt2_state(folder, config)
    else:
        raise CheckpointError(f"{path} holds no {WHOLE}, and not both of {VOCAB} and {MERGES}")
    return build(state, config)


def build(state, config):
    """The tokenizer that the parts describe."""
    state.get("version", "1.0").one_of("1.0")
    chunks, of_bytes = read_pre_tokenizer(state.get("pre_tokenizer"))
    bpe = read_bpe(state.get("model"), of_bytes)
    added = give_ids(collect_added(state, config), bpe.vocab, state)
    ids = bpe.vocab | {token.content: token.id for token in added}
    normalize, decoder = read_normalizer(state.get("normalizer")), read_decoder(state.get("decoder"), of_bytes)
    before, after = read_around(state, config, ids)
    bos_id, eos_id = (role_id(role, config, ids) for role in NAMES[:2])
    return FileTokenizer(bpe, added, normalize, chunks, decoder, before, after, bos_id, eos_id)


def open_json(file):
    """The whole of a JSON file."""
    return Part(file, "", read_json(file))


def read_config(folder):
    """The parts of tokenizer_config.json by name; of its older relatives, too, if it lists no added tokens."""
    config = {}
    for name in (CONFIG, OLDER, ADDED):
        if (folder / name).is_file() and "added_tokens_decoder" not in config:
            whole = open_json(folder / name)
            config |= {"added_tokens": whole} if name == ADDED else {key: whole.get(key) for key in whole.value}
    return {key: part for key, part in config.items() if part.value is not None}


# vocab.json and merges.txt: what tokenizer.json would say beside them

QWEN2_CHUNKS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
                r"|\s+(?!\S)|\s+")  # fmt: skip
QWEN2_SPLIT = {"type": "Split", "pattern": {"Regex": QWEN2_CHUNKS}, "behavior": "Isolated"}
CLASSES = {"GPT2Tokenizer": (None, []), "Qwen2Tokenizer": ({"type": "NFC"}, [QWEN2_SPLIT])}  # normalizer, first steps
MODELS = {"gpt2": "GPT2Tokenizer", "qwen2": "Qwen2Tokenizer", None: "GPT2Tokenizer"}
END = "<|endoftext|>"  # begins and ends texts, where no other token is named


def gpt2_state(folder, config):
    """What tokenizer.json would hold, by the name of the tokenizer's class or else of the model."""
    kind, model = config.get("tokenizer_class"), folder / "config.json"
    if kind is None:
        model_type = open_json(model).get("model_type") if model.is_file() else Part(model, "model_type", None)
        kind = Part(model, "model_type", MODELS[model_type.one_of(*MODELS)])
    name = kind.of(str).removesuffix("Fast")
    if name not in CLASSES:
        raise kind.error(f"is {short(name)}; without a {WHOLE} we know only {', '.join(CLASSES)}")
    vocab = read_json(folder / VOCAB)
    for role in NAMES[:3] if name == "GPT2Tokenizer" else NAMES[1:3]:
        if END in vocab:
            config.setdefault(role, Part(folder / VOCAB, role, END))
    normalizer, steps = CLASSES[name]
    prefix = config["add_prefix_space"].of(bool) if "add_prefix_space" in config else False
    last = {"type": "ByteLevel", "add_prefix_space": prefix, "use_regex": not steps}
    return Part(folder / VOCAB, "", {
        "normalizer": normalizer, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*steps, last]},
        "decoder": {"type": "ByteLevel"}, "model": {"vocab": vocab, "merges": folder / MERGES}})  # fmt: skip


# The parts that are no steps


def read_bpe(part, of_bytes):
    """The BPE of the part "model". One that does not know every byte could lose characters, so it is refused."""
    part.get("type", "BPE").one_of("BPE")  # GPT-2's own file has no type
    part.get("dropout", 0).one_of(0, 0.0)
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        part.get(name, "").one_of("")
    if not of_bytes:
        part.get("byte_fallback", False).one_of(True)
    vocab = read_vocab(part.get("vocab"))
    bpe = BPE(vocab, read_triples(part.get("merges"), vocab), of_bytes, part.get("ignore_merges", False).of(bool))
    missing = [byte for byte, i in enumerate(bpe.byte_ids) if i is None]
    if missing:
        raise part.get("vocab").error(f"has no token for the bytes {str(missing[:8])[1:-1]}")
    return bpe


def read_vocab(part):
    """{token: id}, each id there once."""
    tokens = {}
    for token, i in part.of(dict).items():
        if type(i) is not int or not 0 <= i < 2**32:
            raise part.error(f"gives {short(token)} the id {short(i)}; an id is a whole number, 0 or more")
        if not is_text(token):
            raise part.error(f"has the token {short(token)}, with half of a surrogate pair, which is no text")
        if i in tokens:
            raise part.error(f"gives the id {i} to {short(tokens[i])} and to {short(token)}")
        tokens[i] = token
    return part.value


def read_triples(part, ids):
    """The merges as triples (left, right, new id) in order of rank, from "a b", ["a", "b"] or merges.txt."""
    if isinstance(part.value, Path):
        try:
            return read_merges(part.value, ids)
        except ValueError as error:
            raise CheckpointError(f"{part.value} does not read: {error}") from None
    triples = []
    for i, pair in enumerate(part.of(list)):
        try:
            left, right = pair.split(" ") if isinstance(pair, str) else pair
            triples.append((ids[left], ids[right], ids[left + right]))
        except (KeyError, TypeError, ValueError):
            raise part.error(f"should hold two tokens at place {i}, which with their sum are in the vocabulary, and "
                             f"holds {short(pair)}") from None  # fmt: skip
    return triples


def read_around(state, config, ids):
    """(ids before, ids after) a text: what tokenizer_config.json adds, or else the post-processor's."""
    adding = [config.get(name) for name in ADDING]
    if adding != [None, None]:
        wanted = [role_id(role, config, ids) if add and add.of(bool) else None for role, add in zip(NAMES, adding)]
        return [[] if i is None else [i] for i in wanted]
    around = read_post_processor(state.get("post_processor"))
    unknown = {i for part in around for i in part} - set(ids.values())
    if unknown:
        raise state.get("post_processor").error(f"adds the id {min(unknown)}, which no token has")
    return around


def role_id(role, config, ids):
    """The id of bos_token or eos_token, or None where none is named."""
    return ids[read_named(config[role]).content] if role in config else None

"""Where a model comes from that continues a text, and what its authors say of how it should."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

from tito.jobs import words

# Settings of transformers that change a greedy text and are not done here. 0, 1 and nothing ask for nothing.
NOT_DONE = ("num_beams", "no_repeat_ngram_size", "min_length", "min_new_tokens", "bad_words_ids", "suppress_tokens",
            "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "sequence_bias", "stop_strings",
            "exponential_decay_length_penalty", "guidance_scale", "penalty_alpha")  # fmt: skip


class Source(NamedTuple):
    """A model with its tokenizer, and what its authors say of generation."""

    model: Any
    tokenizer: Any
    ends: tuple[int, ...] = ()  # ids that end a text
    penalty: float = 1.0  # what transformers calls repetition_penalty


def checkpoint(path: Path) -> Source:
    """The model and tokenizer in a file of `tito demo --train`."""
    return Source(*words.model_from(path)[:2])


def directory(path: Path) -> Source:
    """The model and tokenizer that lie there; what is missing or damaged ends the program with one sentence."""
    from tinytorch.models.checkpoint import load_checkpoint
    from tinytorch.models.tokenizer import load_tokenizer

    folder = path.parent if path.is_file() else path
    try:
        model = load_checkpoint(path)
        return Source(model, load_tokenizer(folder), *settings_of(folder))
    except ValueError as error:
        sys.exit(f"tito: {error}")


def settings_of(folder: Path) -> tuple[tuple[int, ...], float]:
    """(ends, penalty) as in transformers: from generation_config.json, or where that is absent from config.json."""
    from tinytorch.models.safetensors import read_json

    path = folder / "generation_config.json"
    path = path if path.is_file() else folder / "config.json"
    given = read_json(path)
    ends, penalty = given.get("eos_token_id"), given.get("repetition_penalty")
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if not all(type(end) is int for end in ends):
        raise ValueError(f"{path}: eos_token_id should be an id or a list of ids, and is {given['eos_token_id']!r}")
    penalty = 1 if penalty is None else penalty
    if type(penalty) not in (int, float) or not 0 < penalty < math.inf:
        raise ValueError(f"{path}: repetition_penalty should be a number above 0, and is {penalty!r}")
    for name in NOT_DONE:
        if given.get(name) not in (None, 0, 1, [], {}):
            print(f"tito: {path} sets {name}, which is left out here: transformers' text may differ.", file=sys.stderr)
    return tuple(ends), penalty

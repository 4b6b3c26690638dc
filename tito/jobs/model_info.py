"""What a checkpoint is and what it needs here, as one JSON document, without reading the numbers of its weights.

An error is a document, too: {"error": sentence}. Runs against whichever `tinytorch` comes first on the path.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import psutil

from tinytorch.generation.kv_cache import kv_cache_bytes
from tinytorch.models.checkpoint import find_checkpoint
from tinytorch.models.tokenizer import load_tokenizer
from tito.jobs import words

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
SIZES = ("vocab_size", "max_seq_len", "num_layers", "embed_dim", "num_heads", "num_kv_heads", "head_dim", "tie_weights")
TOKENIZERS = ("tokenizer.json", "vocab.json")  # files that say that there is one


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path)
    try:
        facts = facts_of(parser.parse_args().path)
    except ValueError as error:
        facts = {"error": str(error)}
    print(json.dumps(facts))
    return 1 if "error" in facts else 0


def facts_of(path: Path) -> dict[str, object]:
    """Everything that `tito model info` tells, by the names of our models and caches; bytes are bytes."""
    found = find_checkpoint(path)
    sizes, named = found.sizes, found.config.get("architectures")
    parameters = sum(math.prod(shape) for _, shape in found.family.shapes(**sizes))
    files = {tensor.file for tensor in found.tensors.values()}
    per_token = {
        dtype: kv_cache_bytes(sizes["num_layers"], sizes["num_kv_heads"], sizes["head_dim"], 1, itemsize)
        for dtype, itemsize in (("float32", 4), ("float16", 2))
    }
    free, in_memory = psutil.virtual_memory().available, 4 * parameters  # a model runs in float32
    fits = max(0, free - in_memory) // per_token["float32"]
    return {
        "architecture": named[0] if isinstance(named, list) and named else found.config.get("model_type"),
        "parameters": parameters,
        "dtypes": sorted({DTYPES.get(tensor.code, tensor.code) for tensor in found.tensors.values()}),
        "files": len(files),
        "bytes_on_disk": sum(file.stat().st_size for file in files),
        "bytes_in_memory": in_memory,
        **{name: sizes[name] for name in SIZES},
        "window": sizes.get("window"),
        "cache_bytes_per_token": per_token,
        "free_memory_bytes": free,
        "tokens_that_fit": min(fits, sizes["max_seq_len"]),
        "tokenizer_size": tokenizer_size(found.config.path.parent),
    }


def tokenizer_size(folder: Path) -> int | None:
    """How many ids have a text; None without a tokenizer."""
    there = any((folder / name).is_file() for name in TOKENIZERS)
    return len(load_tokenizer(folder).tokens) if there else None


if __name__ == "__main__":
    words.exit_with(main)

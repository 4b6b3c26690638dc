"""`tito model info`: what a downloaded model is, and what it needs on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tito import show
from tito.course.errors import CourseError
from tito.course.manifest import Course
from tito.student.demo import environment
from tito.student.generate import require_models


def info(course: Course, directory: Path, as_json: bool = False) -> int:
    """Print what tito.jobs.model_info finds out; returns the exit code."""
    require_models(course)
    command = [sys.executable, "-m", "tito.jobs.model_info", str(directory.absolute())]
    done = subprocess.run(command, cwd=course.root, env=environment(course.root), stdout=subprocess.PIPE)
    try:
        facts = json.loads(done.stdout)
    except ValueError:  # it has said on stderr why there are none
        return done.returncode or 1
    if "error" in facts:
        raise CourseError(facts["error"], "A directory as save_pretrained of transformers writes it is needed.")
    if as_json:
        show.as_json(facts)
    else:
        show.rows(list(rows(facts)))
    return 0


def rows(facts: dict):
    """The facts as lines to read: (what, value)."""
    per_token, most, fits = facts["cache_bytes_per_token"], facts["max_seq_len"], facts["tokens_that_fit"]
    yield "architecture", facts["architecture"]
    yield "parameters", f"{facts['parameters']:,}"
    files = show.count(facts["files"], "file")
    yield "on disk", f"{size(facts['bytes_on_disk'])} in {files}, {' and '.join(facts['dtypes'])}"
    yield "in memory", f"{size(facts['bytes_in_memory'])}, float32"
    yield "layers", f"{facts['num_layers']}, {facts['embed_dim']:,} wide"
    heads = f"{facts['num_heads']} for queries, {facts['num_kv_heads']} for keys and values"
    yield "heads", f"{heads}, {facts['head_dim']} wide"
    yield "vocabulary", f"{facts['vocab_size']:,}" + (", its table is also the head" if facts["tie_weights"] else "")
    yield "context", f"{most:,} tokens" + (f", of which each sees {facts['window']:,}" if facts["window"] else "")
    yield "KV cache", f"{per_token['float32']:,} bytes per token in float32, {per_token['float16']:,} in float16"
    free = size(facts["free_memory_bytes"])
    if fits == 0:
        yield "fits here", f"no: {free} are free, fewer than the weights need"
    else:
        whole = "the whole context" if fits == most else f"{fits:,} tokens of context"
        yield "fits here", f"{whole} beside the weights: {size(fits * per_token['float32'])} of cache; {free} are free"
    tokens = facts["tokenizer_size"]
    yield "tokenizer", "none: `tito generate` needs one" if tokens is None else f"{tokens:,} tokens"


def size(number: int) -> str:
    """Bytes as a person reads them: KiB, MiB and GiB are powers of 1024."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if number >= 1 << power:
            return f"{number / (1 << power):,.1f} {unit}"
    return f"{number} bytes"

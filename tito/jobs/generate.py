"""Continue a text, on the KV cache where it is not switched off.

Runs against whichever `tinytorch` comes first on the path, so the model and the cache may be the learner's own. The
text alone goes to stdout, token by token; what there is to say about it goes to stderr.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path

from tito.jobs import sources, words
from tito.jobs.sources import Source
from tito.jobs.text import text_of
from tito.show import count

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # what a terminal would obey instead of showing it
SINKS = 4  # first tokens that a window keeps besides (Xiao et al. 2023)


def main() -> int:
    arguments = parse()
    source = sources.directory(arguments.model) if arguments.model else sources.checkpoint(arguments.checkpoint)
    prompt = ids_of(read_stdin() if arguments.prompt == "-" else arguments.prompt, source)
    most = min(arguments.new, source.model.max_seq_len - len(prompt))
    cache = None if arguments.no_cache else new_cache(source.model, len(prompt) + most, arguments)
    stream = Stream(source, prompt)
    if source.penalty != 1:
        source.model.head = PenalisedHead(source.model.head, stream.ids, source.penalty)
    sampling = {"temperature": arguments.temperature, "top_k": arguments.top_k, "rng": generator(arguments.seed)}
    try:
        source.model.generate(prompt, most, stop_token=source.ends or None, on_token=stream.add, **sampling)
    finally:
        stream.end()
    tell(stream, cache, len(prompt), full=most < arguments.new)
    return 0


def read_stdin() -> str:
    """All of standard input; the line break at its end is not part of the prompt."""
    try:
        text = sys.stdin.buffer.read().decode("utf-8") if sys.stdin else ""
    except UnicodeDecodeError as error:
        sys.exit(f"tito: the prompt on standard input is not UTF-8: {error}.")
    return text.removesuffix("\n").removesuffix("\r")


def ids_of(prompt: str, source: Source) -> list[int]:
    """The prompt as ids that fit the model, or the end of the program with one sentence."""
    try:
        ids = list(source.tokenizer.encode(prompt))
    except ValueError as error:
        sys.exit(f"tito: the prompt cannot be read: {error}")
    most = source.model.max_seq_len - 1
    if not 1 <= len(ids) <= most:
        sys.exit(f"tito: the prompt has {len(ids):,} tokens; it needs at least 1 and at most {most:,}.")
    if max(ids) >= source.model.vocab_size:
        sys.exit(f"tito: the tokenizer knows an id {max(ids)}, and the model ends at {source.model.vocab_size - 1}: "
                 "they do not belong together.")  # fmt: skip
    return ids


def new_cache(model, length: int, arguments: argparse.Namespace):
    """A cache with room for `length` tokens, enabled."""
    from tinytorch.generation.kv_cache import enable_kv_cache

    options = {"max_seq_len": length, "dtype": arguments.cache_dtype}
    if arguments.window is not None:
        from tinytorch.generation.cache_compression import SlidingWindowKVCache

        options |= {"factory": SlidingWindowKVCache, "window": min(arguments.window, length), "sinks": SINKS}
    try:
        return enable_kv_cache(model, **options)
    except ValueError as error:  # a model that this cache would serve wrongly
        sys.exit(f"tito: {error}")


def generator(seed: int | None):
    import numpy as np

    return None if seed is None else np.random.default_rng(seed)


class Stream:
    """The text on its way to stdout, and the seconds that the model took for each of its tokens."""

    def __init__(self, source: Source, prompt: list[int]):
        self.text = text_of(source.tokenizer)
        self.ends, self.max_seq_len = source.ends, source.model.max_seq_len
        self.ids, self.seconds = list(prompt), []
        self.show("".join(map(self.text.add, prompt)))
        self.started = time.perf_counter()

    def add(self, tokens) -> None:
        """`on_token` of `generate`: the ids of one round, here one."""
        self.seconds.append(time.perf_counter() - self.started)
        self.ids.append(int(tokens[0]))
        self.show(self.text.add(self.ids[-1]))
        self.started = time.perf_counter()

    def end(self) -> None:
        self.show(self.text.end() + "\n")

    @property
    def ended(self) -> bool:
        """Has the model ended the text itself?"""
        return self.ids[-1] in self.ends and len(self.seconds) > 0

    @staticmethod
    def show(text: str) -> None:
        print(CONTROL.sub("\ufffd", text) if sys.stdout and sys.stdout.isatty() else text, end="", flush=True)


class PenalisedHead:
    """A model's head that makes the ids so far less likely, as transformers' RepetitionPenaltyLogitsProcessor does.

    Source: Keskar et al. 2019, "CTRL", section 4.1.
    """

    def __init__(self, head, ids: list[int], penalty: float):
        self.head, self.ids, self.penalty = head, ids, penalty

    def __call__(self, x):
        import numpy as np

        from tinytorch.core.tensor import Tensor

        logits, seen = self.head(x).numpy().copy(), np.unique(self.ids)  # (1, V)
        old = logits[:, seen]
        logits[:, seen] = np.where(old < 0, old * self.penalty, old / self.penalty)
        return Tensor(logits)


def tell(stream: Stream, cache, prompt_len: int, full: bool) -> None:
    """The figures: tokens and tokens per second of the prompt and of what follows, and the cache's bytes."""
    first, *later = stream.seconds  # the prompt is run for the first new token
    figures = [f"prompt: {count(prompt_len, 'token')}, {prompt_len / first:.1f} tokens/s",
               f"new: {count(len(stream.seconds), 'token')}"]  # fmt: skip
    figures[1] += f", {len(later) / sum(later):.1f} tokens/s" if later else ""
    figures.append("no KV cache" if cache is None else f"KV cache: {cache.nbytes:,} bytes ({cache.dtype.name})")
    if stream.ended:
        figures.append("the model ended the text")
    elif full:
        figures.append(f"its context of {stream.max_seq_len:,} tokens is full")
    print("\n" + "; ".join(figures), file=sys.stderr)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=Path)
    source.add_argument("--checkpoint", type=Path)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--new", type=int, default=120)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-k", type=int, default=None)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--no-cache", action="store_true")
    parser.add_argument("--cache-dtype", default="float32")
    parser.add_argument("--window", type=int, default=None)
    return parser.parse_args()


if __name__ == "__main__":
    words.exit_with(main)

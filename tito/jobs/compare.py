"""What `tito demo` shows: the same text with and without the KV cache, and the time that both take.

Runs against whichever `tinytorch` comes first on the path, so the cache that is measured may be the learner's own.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np

from tinytorch.demo import language
from tinytorch.generation.kv_cache import KVCacheConfig, disable_kv_cache, enable_kv_cache, stored_heads
from tito.jobs import words
from tito.jobs.text import text_of

LENGTHS = (32, 64, 128, 256)


def generate(model, tokenizer, prompt: list[int], count: int, sampling: dict, show: bool) -> tuple[list, list]:
    """Continue `prompt` by `count` tokens; the ids, and the seconds that each new token took.

    Shows the text token by token where `show` is set.
    """
    times, screen = [time.perf_counter()], Screen(tokenizer, prompt) if show else None

    def on_token(token) -> None:
        times.append(time.perf_counter())
        if screen:
            screen.add(int(token[0]))

    seed = sampling.get("seed")
    rng = None if seed is None else np.random.default_rng(seed)
    ids = model.generate(
        prompt, count, temperature=sampling["temperature"], top_k=sampling["top_k"], rng=rng, on_token=on_token
    )
    if screen:
        screen.end()
    return ids, list(np.diff(times))


class Screen:
    """Text that grows on the terminal, in quotes; bytes of an unfinished character wait for the rest of it."""

    def __init__(self, tokenizer, ids: list[int]):
        self.text = text_of(tokenizer)
        self.show("  | " + "".join(map(self.text.add, ids)))

    def add(self, token: int) -> None:
        self.show(self.text.add(token))

    def end(self) -> None:
        self.show(self.text.end())
        print()

    @staticmethod
    def show(text: str) -> None:
        print(text.replace("\n", "\n  | "), end="", flush=True)


def compare(model, tokenizer, prompt: list[int], count: int, sampling: dict) -> bool:
    """The same continuation without and with the cache, on screen, with tokens per second; are they the same?"""
    model.generate(prompt, 2)  # the first call of anything is slower than the ones after it
    print("\nWithout a cache: every token runs the whole sequence again.")
    plain, plain_times = generate(model, tokenizer, prompt, count, sampling, show=True)
    cache = enable_kv_cache(model)
    print("\nWith the KV cache: every token runs alone and reads the keys and values of the others.")
    cached, cached_times = generate(model, tokenizer, prompt, count, sampling, show=True)
    same = plain == cached
    disable_kv_cache(model)
    slow, fast = count / sum(plain_times), count / sum(cached_times)
    print(f"\nThe two texts are {'the same' if same else 'DIFFERENT'}: {count} new tokens after {len(prompt)}.")
    print(f"  without cache {slow:8.1f} tokens/s")
    print(f"  with cache    {fast:8.1f} tokens/s   {fast / slow:.1f} times as fast")
    show_bytes(model, cache)
    return same


def show_bytes(model, cache) -> None:
    """The cache's bytes, as the formula predicts them and as its arrays measure them."""
    sizes = (model.num_layers, model.max_seq_len, *stored_heads(model))
    config = KVCacheConfig(*sizes, dtype=np.float32)
    formula = "{} x {} layers x {} tokens x {} heads x {} x {} bytes".format(2, *sizes, 4)
    print(f"  cache: {formula} = {config.calculate_size():,} bytes predicted, {cache.nbytes:,} measured")


def measure(model, prompt: list[int], lengths=LENGTHS, repeats: int = 3) -> None:
    """Seconds to reach each length from a short prompt, without and with the cache, in turn; medians."""
    print("\n  length   without cache   with cache   speed-up   (medians of "
          f"{repeats} pairs, {len(prompt)} tokens of prompt)")
    for length in (n for n in lengths if len(prompt) < n <= model.max_seq_len):
        slow, fast = [], []
        for _ in range(repeats):
            slow.append(seconds_to(model, prompt, length))
            enable_kv_cache(model)
            fast.append(seconds_to(model, prompt, length))
            disable_kv_cache(model)
        ratio = statistics.median(a / b for a, b in zip(slow, fast))
        seconds = f"{statistics.median(slow):13.3f} s {statistics.median(fast):10.3f} s"
        print(f"  {length:6} {seconds} {ratio:10.1f}", flush=True)


def seconds_to(model, prompt: list[int], length: int) -> float:
    started = time.perf_counter()
    model.generate(prompt, length - len(prompt))
    return time.perf_counter() - started


def plot(model, tokenizer, prompt: list[int], path: Path) -> None:
    """Time per token over length, without and with the cache, as a picture."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print("No plot: matplotlib is not installed (pip install matplotlib).")
        return
    count, greedy = model.max_seq_len - len(prompt), {"temperature": 0, "top_k": None}

    def times() -> np.ndarray:
        """Seconds of each token: the median of three runs, so that a hiccup of the machine is no point."""
        return np.median([generate(model, tokenizer, prompt, count, greedy, show=False)[1] for _ in range(3)], axis=0)

    plain = times()
    enable_kv_cache(model)
    cached = times()
    disable_kv_cache(model)
    figure, axes = pyplot.subplots(figsize=(7, 4))
    lengths = len(prompt) + np.arange(1, count + 1)
    axes.plot(lengths[1:], 1e3 * plain[1:], "o", markersize=3, label="without cache", color="#d55e00")
    axes.plot(lengths[1:], 1e3 * cached[1:], "s", markersize=3, label="with KV cache", color="#0072b2")
    axes.set(xlabel="length of the sequence (tokens)", ylabel="time per token (ms)", ylim=(0, None),
             title=f"GPT, {model.num_layers} layers of width {model.embed_dim}: time per generated token")
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, bbox_inches="tight")
    except OSError as error:  # the figures above stand without it
        print(f"\nNo plot: {path} cannot be written ({error.strerror or error}).")
        return
    print(f"\nPlot: {path}")


def main() -> int:
    arguments = parse()
    model, tokenizer, notes = words.model_from(arguments.checkpoint)
    if arguments.describe:
        describe(model, tokenizer, notes)
    prompt = tokenizer.encode(arguments.prompt)
    room = model.max_seq_len - len(prompt)
    if not prompt or room < 1:
        print(f"The prompt has {len(prompt)} tokens; it needs at least 1 and at most {model.max_seq_len - 1}.",
              file=sys.stderr)
        return 1
    count = min(arguments.new, room)
    sampling = {"temperature": arguments.temperature, "top_k": arguments.top_k, "seed": arguments.seed}
    same = compare(model, tokenizer, prompt, count, sampling)
    if arguments.measure:
        measure(model, prompt[:16])
    if arguments.plot:
        plot(model, tokenizer, prompt[:16], arguments.plot)
    return 0 if same else 1


def describe(model, tokenizer, notes: dict[str, str]) -> None:
    """Where the checkpoint comes from, and its validation loss measured now, on this Python's text."""
    from tinytorch.core.losses import CrossEntropyLoss
    from tinytorch.core.training import mean_loss

    _, validation = language.splits(tokenizer.encode(language.text()))
    loss = mean_loss(model, CrossEntropyLoss(), language.validation_batches(validation, model.max_seq_len))
    note = {"steps": "?", "text": "an unknown text", "seed": "?", "validation_loss": "?"} | notes
    print(f"Checkpoint: {note['steps']} steps on {note['text']}, seed {note['seed']};")
    print(f"validation loss {note['validation_loss']} when trained, {loss:.4f} measured now (nats per token)")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--new", type=int, default=120)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-k", type=int, default=None)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--describe", action="store_true")
    parser.add_argument("--plot", type=Path, default=None)
    return parser.parse_args()


if __name__ == "__main__":
    words.exit_with(main)

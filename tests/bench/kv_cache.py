"""`make bench`: what the KV cache of lesson 17 gains, on this machine.

Both ways are measured in one process, in turn, several times; each figure is a median, each ratio the median of the
ratios of neighbouring runs. Absolute times change from hour to hour on a shared machine; the ratios are what counts.
"""

import argparse
import os
import platform
import statistics
import time

import numpy as np

from tinytorch.core.autograd import no_grad
from tinytorch.generation.kv_cache import create_kv_cache, prefill
from tinytorch.models.transformer import GPT

SIZES = {
    "4 layers, 256 wide, 8 heads": {"embed_dim": 256, "num_layers": 4, "num_heads": 8},
    "6 layers, 384 wide, 6 heads": {"embed_dim": 384, "num_layers": 6, "num_heads": 6},
}
LENGTHS = (64, 128, 256, 512, 1024)
VOCAB_SIZE = 1000


def seconds(function) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def pairs(slow, fast, repeats: int) -> tuple[float, float, float]:
    """Median seconds of each, and the median of the ratios slow/fast of neighbouring runs; one warm-up each."""
    slow(), fast()
    runs = [(seconds(slow), seconds(fast)) for _ in range(repeats)]
    ratio = statistics.median(a / b for a, b in runs)
    return statistics.median(a for a, _ in runs), statistics.median(b for _, b in runs), ratio


def new_cache(model):
    head_dim = model.embed_dim // model.num_heads
    return create_kv_cache(1, model.max_seq_len, model.num_layers, model.num_kv_heads, head_dim)


def per_token(model, ids: np.ndarray, length: int, repeats: int) -> tuple[float, float, float]:
    """Seconds for the token at place `length`: the whole sequence again, against one step on the cache."""
    cache = new_cache(model)
    prefill(model, ids[:, : length - 1], cache)
    last = ids[:, length - 1 : length]

    def without() -> None:
        model.head(model.hidden(ids[:, :length])[:, -1])

    def step() -> None:
        model(last, cache=cache)
        cache.rollback(1)

    return pairs(without, step, repeats)


def whole_generation(model, prompt: list[int], cache, repeats: int) -> tuple[float, float, float]:
    """Seconds for 128 tokens after the prompt, without and with the cache."""
    return pairs(lambda: model.generate(prompt, 128), lambda: model.generate(prompt, 128, cache=cache), repeats)


def page(repeats: int) -> None:
    for name, sizes in SIZES.items():
        model = GPT(VOCAB_SIZE, max_seq_len=1024, rng=np.random.default_rng(0), **sizes)
        model.eval()
        ids = np.random.default_rng(1).integers(0, VOCAB_SIZE, (1, 1024))
        cache = new_cache(model)
        print(f"\n{name}: {sum(p.data.size for p in model.parameters()):,} parameters, "
              f"cache {cache.nbytes / 2**20:.1f} MiB ({cache.nbytes // 1024:,} bytes per token)")
        print(f"{'length':>8} {'without cache':>18} {'with cache':>18} {'speed-up':>9}")
        steps = {}
        with no_grad():
            for length in LENGTHS:
                slow, fast, ratio = per_token(model, ids, length, repeats)
                steps[length] = fast
                print(f"{length:8} {1 / slow:10.1f} tokens/s {1 / fast:9.1f} tokens/s {ratio:9.1f}", flush=True)
        print(f"one decoded token at length 64: {1e3 * steps[64]:.2f} ms, at length 1024: {1e3 * steps[1024]:.2f} ms, "
              f"{steps[1024] / steps[64]:.2f} times as long")
        prompt = ids[0, :128].tolist()
        slow, fast, ratio = whole_generation(model, prompt, cache, min(repeats, 3))
        print(f"128 + 128 tokens: {128 / slow:.1f} tokens/s without, {128 / fast:.1f} with the cache, "
              f"speed-up {ratio:.1f}", flush=True)


def machine() -> str:
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            model = next(line.split(":")[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    threads = os.environ.get("OPENBLAS_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS") or "default"
    return (f"{model}, {os.cpu_count()} cores, BLAS threads: {threads}; Python {platform.python_version()}, "
            f"NumPy {np.__version__}, {platform.system()}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="pairs of runs per figure")
    arguments = parser.parse_args()
    print(machine())
    print(f"float32, batch 1, medians of {arguments.repeats} pairs")
    page(arguments.repeats)

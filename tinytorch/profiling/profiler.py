"""Hand-extracted from src/14_profiling while the build is being written."""
import math
import threading
import time
import tracemalloc
from contextlib import contextmanager

import numpy as np

from tinytorch.core.attention import attention_weights_array, mix_values_array
from tinytorch.core.layers import Module, linear_array
from tinytorch.core.training import evaluation_mode
from tinytorch.core.tensor import Tensor, matmul_array, plug_in


def count_parameters(model):
    """Numbers in all parameters, each parameter once, also where two parts of the model share it."""
    return sum(p.size for p in {id(p): p for p in model.parameters()}.values())


FLOP_RULES = {}


def flops(op):
    """Put a formula beside an operation: rule(output, *inputs, **params) -> FLOPs, from shapes alone."""
    def enter(rule):
        FLOP_RULES[op] = rule
        return rule
    return enter


@flops(matmul_array)
def matmul_flops(output, a, b):
    return 2 * output.size * a.shape[-1]


@flops(linear_array)
def linear_flops(output, x, weight, bias=None):
    return 2 * output.size * weight.shape[1]


@flops(attention_weights_array)
def scores_flops(output, query, key, **params):
    return 2 * output.size * query.shape[-1]


@flops(mix_values_array)
def mix_flops(output, weights, value):
    return 2 * output.size * weights.shape[-1]


class FlopCounter:
    """An engine that counts instead of recording gradients: plug it in, run, read `total`."""

    def __init__(self):
        self.total, self.by_op = 0, {}

    def record(self, op, inputs, params, output):
        rule = FLOP_RULES.get(op)
        count = rule(output, *inputs, **params) if rule else 0
        self.total += count
        name = op.__name__
        self.by_op[name] = self.by_op.get(name, 0) + count

    def backward(self, tensor, gradient=None):
        raise RuntimeError("no gradients while FLOPs are counted")


@contextmanager
def plugged_in(engine):
    previous = plug_in(engine)
    try:
        yield engine
    finally:
        plug_in(previous)


class Measurement(float):
    """A median of seconds that also knows its repeats: `all`, `low` and `high` (the quartiles)."""

    def __new__(cls, seconds):
        seconds = sorted(seconds)
        self = super().__new__(cls, np.median(seconds))
        self.all = seconds
        self.low, self.high = np.percentile(seconds, [25, 75]).tolist()
        return self


def measure_latency(function, *args, warmup=2, repeats=7):
    for _ in range(warmup):
        function(*args)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function(*args)
        seconds.append(time.perf_counter() - start)
    return Measurement(seconds)


def measure_memory(function, *args):
    """Bytes that a call asks for, by tracemalloc: the peak during it and what is left when its result is kept."""
    ours = not tracemalloc.is_tracing()
    if ours:
        tracemalloc.start()
    try:
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        result = function(*args)
        after, peak = tracemalloc.get_traced_memory()
    finally:
        if ours:
            tracemalloc.stop()
    return {"peak_bytes": peak - before, "kept_bytes": after - before, "result_bytes": array_bytes(result)}


def array_bytes(thing):
    """Bytes of the arrays in a Tensor, an array, a list, a dict or a model; each memory block once."""
    blocks = {}
    collect_blocks(thing, blocks)
    return sum(blocks.values())


def collect_blocks(thing, blocks):
    if isinstance(thing, Module):
        thing = thing.parameters()
    if isinstance(thing, Tensor):
        thing = thing.data
    if isinstance(thing, np.ndarray):
        while isinstance(thing.base, np.ndarray):
            thing = thing.base
        blocks[id(thing)] = thing.nbytes
    elif isinstance(thing, dict):
        for item in thing.values():
            collect_blocks(item, blocks)
    elif isinstance(thing, (list, tuple)):
        for item in thing:
            collect_blocks(item, blocks)


class MemoryTracker:
    """Counts bytes by purpose against a limit; says no before anything is allocated."""

    def __init__(self, limit_bytes=None):
        if limit_bytes is not None:
            check_bytes(limit_bytes, "limit_bytes")
        self.limit_bytes = limit_bytes
        self.current = self.peak = 0
        self._by_purpose, self._lock = {}, threading.Lock()

    def allocate(self, num_bytes, purpose="other"):
        check_bytes(num_bytes, "num_bytes")
        with self._lock:
            if self.limit_bytes is not None and self.current + num_bytes > self.limit_bytes:
                raise MemoryError(f"{purpose} needs {num_bytes} bytes: {self.current} bytes are used of "
                                  f"{self.limit_bytes} allowed, {self.limit_bytes - self.current} are free")
            self._add(num_bytes, purpose)
        return Allocation(self, num_bytes, purpose)

    def _add(self, num_bytes, purpose):
        self.current += num_bytes
        self.peak = max(self.peak, self.current)
        self._by_purpose[purpose] = self._by_purpose.get(purpose, 0) + num_bytes

    def _release(self, allocation):
        with self._lock:
            if not allocation.closed:
                allocation.closed = True
                self._add(-allocation.num_bytes, allocation.purpose)

    @property
    def by_purpose(self):
        with self._lock:
            return {purpose: used for purpose, used in self._by_purpose.items() if used}

    def usage(self, purpose=None):
        return self.current if purpose is None else self.by_purpose.get(purpose, 0)


class Allocation:
    """Bytes that a tracker has counted, until close() or the end of a with block; given back once only."""

    def __init__(self, tracker, num_bytes, purpose):
        self.tracker, self.num_bytes, self.purpose, self.closed = tracker, num_bytes, purpose, False

    def close(self):
        self.tracker._release(self)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


def check_bytes(value, name):
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 0:
        raise ValueError(f"{name} must be a whole number of bytes, 0 or more, got {value!r}")


# ---- per layer
class Timed:
    """Stands in the place of a module for the length of one measurement and reports when it is entered and left."""

    def __init__(self, module, row, recorder):
        self.module, self.row, self.recorder = module, row, recorder

    def __getattr__(self, name):
        return getattr(self.module, name)

    def __call__(self, *inputs, **options):
        self.recorder.enter(self.row)
        try:
            output = self.module(*inputs, **options)
        finally:
            self.recorder.leave()
        self.row["shape"] = getattr(output, "shape", None)
        return output


class Recorder(FlopCounter):
    """Times rows and counts the FLOPs of whatever runs inside them, nested as the calls are."""

    def __init__(self):
        super().__init__()
        self.stack = []

    def enter(self, row):
        self.stack.append((row, time.perf_counter(), self.total))

    def leave(self):
        row, started, flops = self.stack.pop()
        row["seconds"] += time.perf_counter() - started
        row["flops"] += self.total - flops
        row["calls"] += 1


def replace_child(parent, name, child):
    """Put `child` where named_children() found `name`: an attribute, or an entry of a list (blocks.0)."""
    attribute, _, index = name.partition(".")
    value = getattr(parent, attribute) if index else None
    if not index:
        setattr(parent, attribute, child)
    elif isinstance(value, tuple):
        setattr(parent, attribute, value[: int(index)] + (child,) + value[int(index) + 1 :])
    else:
        value[int(index)] = child


def walk(model, prefix="", depth=0):
    """(parent, name, full name, depth, module) of every part below a model, parents first."""
    children = model.named_children() if isinstance(model, Module) else []
    for name, child in list(children):
        yield model, name, prefix + name, depth, child
        yield from walk(child, f"{prefix}{name}.", depth + 1)


def new_row(name, module, depth):
    return {"name": name, "kind": type(module).__name__, "depth": depth, "parameters": count_parameters(module),
            "shape": None, "seconds": 0.0, "flops": 0, "calls": 0}


@contextmanager
def instrumented(model, recorder):
    """Every part of the model in a Timed wrapper inside the block; the very same parts are back after it."""
    parts = list(walk(model))
    rows = [new_row(full, child, depth + 1) for _, _, full, depth, child in parts]
    try:
        for (parent, name, _, _, child), row in zip(parts, rows):
            replace_child(parent, name, Timed(child, row, recorder))
        yield rows
    finally:
        for parent, name, _, _, child in parts:
            replace_child(parent, name, child)


def example_input(model, x):
    """An input for the model: x itself, or zeros of the shape x; token ids where the model has a vocabulary."""
    if isinstance(x, (tuple, list)) and all(isinstance(n, (int, np.integer)) for n in x):
        x = np.zeros(tuple(x), np.int64 if hasattr(model, "vocab_size") else np.float32)
    return x if isinstance(x, Tensor) else Tensor(x)


def median_rows(runs):
    """One list of rows from several runs of the same model: medians of the seconds, and each row's own share."""
    rows = [dict(row) for row in runs[0]]
    for index, row in enumerate(rows):
        row["seconds"] = Measurement([run[index]["seconds"] for run in runs])
    for index, row in enumerate(rows):
        row["own_seconds"] = max(0.0, row["seconds"] - sum(child["seconds"] for child in children_of(rows, index)))
    return rows


def children_of(rows, index):
    """The rows one level below rows[index]: they follow it until a row of its own level."""
    found = []
    for row in rows[index + 1 :]:
        if row["depth"] <= rows[index]["depth"]:
            break
        if row["depth"] == rows[index]["depth"] + 1:
            found.append(row)
    return found


class Profiler:
    """Counts and measures models and functions; `warmup` calls are thrown away, `repeats` calls give the median."""

    def __init__(self, warmup=2, repeats=7):
        self.warmup, self.repeats = warmup, repeats

    def count_parameters(self, model):
        return count_parameters(model)

    def count_flops(self, model, x):
        """FLOPs of one forward pass, 2 per multiply-add; x is an input or the shape of one."""
        x = example_input(model, x)
        with evaluation_mode(model), plugged_in(FlopCounter()) as counter:
            model(x)
        return counter.total

    def measure_memory(self, function, *args):
        return measure_memory(function, *args)

    def measure_latency(self, function, *args, warmup=None, repeats=None):
        warmup = self.warmup if warmup is None else warmup
        return measure_latency(function, *args, warmup=warmup, repeats=repeats or self.repeats)

    def profile_layers(self, model, x):
        """One dict per part of the model, the whole first, in the order of the walk."""
        x, runs = example_input(model, x), []
        with evaluation_mode(model):
            for _ in range(self.warmup + self.repeats):
                runs.append(profile_once(model, x))
        return median_rows(runs[self.warmup :])

    def report(self, model, x):
        return layer_table(self.profile_layers(model, x))

    def plot(self, rows, path=None):
        return plot_rows(rows, path)


def profile_once(model, x):
    """Rows of one run: the model as the first row, its parts below."""
    whole = new_row(type(model).__name__, model, 0)
    with plugged_in(Recorder()) as recorder, instrumented(model, recorder) as rows:
        Timed(model, whole, recorder)(x)
    return [whole, *rows]


def layer_table(rows):
    """The rows as plain text, one line each, with the share of the time and the FLOPs per second."""
    head = f"{'layer':<34}{'parameters':>12}{'MFLOP':>10}{'ms':>9}{'own %':>7}{'GFLOP/s':>9}"
    total = max(rows[0]["seconds"], 1e-12)
    lines = [head, "-" * len(head)]
    for row in rows:
        name = "  " * row["depth"] + f"{row['name'].rpartition('.')[2]} {row['kind']}"
        speed = row["flops"] / row["seconds"] / 1e9 if row["seconds"] else 0.0
        lines.append(f"{name[:34]:<34}{row['parameters']:>12,}{row['flops'] / 1e6:>10.2f}{row['seconds'] * 1e3:>9.3f}"
                     f"{100 * row['own_seconds'] / total:>7.1f}{speed:>9.1f}")
    return "\n".join(lines)


def plot_rows(rows, path=None):
    """A bar of own milliseconds for each layer; needs matplotlib, and says so where it is missing."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("The plot needs matplotlib: pip install matplotlib")
        return None
    figure, axes = plt.subplots(figsize=(7, 0.3 * len(rows) + 1))
    axes.barh([row["name"] for row in rows], [1e3 * row["own_seconds"] for row in rows], color="#3b6ea5")
    axes.invert_yaxis()
    axes.set_xlabel("own time, ms (without the parts below)")
    figure.tight_layout()
    if path is not None:
        figure.savefig(path)
    return figure

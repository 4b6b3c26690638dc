"""Profiling: parameters, FLOPs, bytes and time, measured so that they can be trusted.

Lesson 14_profiling. Built from src/14_profiling/14_profiling.py by `tito dev build`: change it there, not here.
"""

__all__ = [
    "count_parameters",
    "FLOP_RULES",
    "flops",
    "matmul_flops",
    "mix_flops",
    "linear_flops",
    "scores_flops",
    "FlopCounter",
    "plugged_in",
    "example_input",
    "count_flops",
    "time_calls",
    "Measurement",
    "measure_latency",
    "traced_call",
    "measure_memory",
    "array_bytes",
    "check_bytes",
    "MemoryTracker",
    "Allocation",
    "own_seconds",
    "Timed",
    "put_child",
    "walk",
    "new_row",
    "stopwatches",
    "profile_once",
    "profile_layers",
    "layer_table",
    "plot_layers",
    "Profiler",
]


# %% cell 2
import threading
import time
import tracemalloc
from contextlib import contextmanager

import numpy as np

from tinytorch.core.attention import attention_weights_array, mix_values_array
from tinytorch.core.layers import Module, linear_array
from tinytorch.core.tensor import Tensor, matmul_array, plug_in
from tinytorch.core.training import evaluation_mode


# %% cell 6 (14-parameters)
def count_parameters(model):
    """How many numbers a model learns; a parameter that two parts share counts once, as in model.parameters()."""
    return sum(parameter.size for parameter in model.parameters())


# %% cell 12
FLOP_RULES = {}


def flops(op):
    """Put a formula beside an operation: rule(output, *inputs, **params) -> FLOPs of one call."""

    def enter(rule):
        FLOP_RULES[op] = rule
        return rule

    return enter


@flops(matmul_array)
def matmul_flops(output, a, b):
    return 2 * output.size * a.shape[-1]


@flops(mix_values_array)
def mix_flops(output, weights, value):
    return 2 * output.size * weights.shape[-1]


# %% cell 13 (14-linear-flops)
@flops(linear_array)
def linear_flops(output, x, weight, bias=None):
    """FLOPs of x (..., in) with weight (out, in), the bias not counted.

    >>> linear_flops(np.zeros((2, 4)), np.zeros((2, 3)), np.zeros((4, 3)))
    48
    """
    return 2 * output.size * weight.shape[1]


# %% cell 16 (14-scores-flops)
@flops(attention_weights_array)
def scores_flops(output, query, key, **params):
    """FLOPs of query @ key.T: output (B, H, T, S), query (B, H, T, D), key (B, H_kv, S, D); softmax not counted."""
    return 2 * output.size * query.shape[-1]


# %% cell 19 (14-counter)
class FlopCounter:
    """An engine that counts FLOPs instead of recording gradients."""

    def __init__(self):
        self.total, self.by_op = 0, {}

    def record(self, op, inputs, params, output):
        """Called by apply after every operation."""
        rule, name = FLOP_RULES.get(op), op.__name__
        count = rule(output, *inputs, **params) if rule else 0
        self.total += count
        self.by_op[name] = self.by_op.get(name, 0) + count

    def backward(self, tensor, gradient=None):
        raise RuntimeError("FLOPs are being counted: nothing was recorded for a gradient")


# %% cell 20
@contextmanager
def plugged_in(engine):
    """The engine hears of every operation in the block; afterwards the one before it is back."""
    previous = plug_in(engine)
    try:
        yield engine
    finally:
        plug_in(previous)


def example_input(model, x):
    """x as a Tensor; for a tuple of whole numbers, zeros of that shape (ids for a model with a vocabulary)."""
    if isinstance(x, tuple) and all(isinstance(size, (int, np.integer)) for size in x):
        x = np.zeros(x, np.int64 if hasattr(model, "vocab_size") else np.float32)
    return x if isinstance(x, Tensor) else Tensor(x)


def count_flops(model, x):
    """FLOPs of one forward pass in evaluation mode; x is an input, or the shape of one as a tuple."""
    x = example_input(model, x)
    with evaluation_mode(model), plugged_in(FlopCounter()) as counter:
        model(x)
    return counter.total


# %% cell 27 (14-latency)
def time_calls(function, warmup, repeats, clock=time.perf_counter):
    """Seconds of each of `repeats` calls of function(), after `warmup` calls that are not timed."""
    for _ in range(warmup):
        function()
    seconds = []
    for _ in range(repeats):
        start = clock()
        function()
        seconds.append(clock() - start)
    return seconds


# %% cell 28
class Measurement(float):
    """A median of seconds that knows its repeats: `all` of them, and the quartiles `low` and `high`."""

    def __new__(cls, seconds):
        self = super().__new__(cls, np.median(seconds))
        self.all = list(seconds)
        self.low, self.high = np.percentile(seconds, [25, 75]).tolist()
        return self

    def __str__(self):
        return f"{self * 1e3:.3f} ms ({self.low * 1e3:.3f} to {self.high * 1e3:.3f})"


def measure_latency(function, *args, warmup=2, repeats=7):
    """Median seconds of function(*args) over `repeats` calls, after `warmup` calls; a Measurement."""
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats must be 1 or more and warmup 0 or more, got {repeats} and {warmup}")
    return Measurement(time_calls(lambda: function(*args), warmup, repeats))


# %% cell 33 (14-memory)
def traced_call(function, *args):
    """(result, bytes still held after the call, peak bytes during it), while tracemalloc is tracing."""
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    result = function(*args)
    after, peak = tracemalloc.get_traced_memory()
    return result, after - before, peak - before


# %% cell 34
def measure_memory(function, *args):
    """Bytes that function(*args) asks for: {"peak_bytes", "kept_bytes" (while its result lives), "result_bytes"}."""
    was_tracing = tracemalloc.is_tracing()
    if not was_tracing:
        tracemalloc.start()
    try:
        result, kept, peak = traced_call(function, *args)
    finally:
        if not was_tracing:
            tracemalloc.stop()
    return {"peak_bytes": peak, "kept_bytes": kept, "result_bytes": array_bytes(result)}


def array_bytes(thing):
    """Bytes of the arrays in an array, a Tensor, a model, or a list, tuple or dict of them; shared memory once."""
    owners, todo = {}, [thing]
    while todo:
        thing = todo.pop()
        if isinstance(thing, Module):
            todo.extend(thing.parameters())
        elif isinstance(thing, Tensor):
            todo.append(thing.data)
        elif isinstance(thing, np.ndarray):
            while isinstance(thing.base, np.ndarray):  # a view: count the array that owns the memory
                thing = thing.base
            owners[id(thing)] = thing.nbytes
        elif isinstance(thing, (list, tuple, dict)):
            todo.extend(thing.values() if isinstance(thing, dict) else thing)
    return sum(owners.values())


# %% cell 42 (14-tracker)
def check_bytes(value, name):
    """Bytes are a whole number, 0 or more; anything else is a ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 0:
        raise ValueError(f"{name} must be a whole number of bytes, 0 or more, got {value!r}")
    return int(value)


class MemoryTracker:
    """A ledger of bytes by purpose, with a limit: `current` and `peak` count them, `by_purpose` splits current."""

    def __init__(self, limit_bytes=None):
        self.limit_bytes = None if limit_bytes is None else check_bytes(limit_bytes, "limit_bytes")
        self.current = self.peak = 0
        self._purposes, self._lock = {}, threading.Lock()

    def allocate(self, num_bytes, purpose="other"):
        """An Allocation of that many bytes; a MemoryError where they do not fit under the limit."""
        num_bytes = check_bytes(num_bytes, "num_bytes")
        with self._lock:
            if self.limit_bytes is not None and self.current + num_bytes > self.limit_bytes:
                raise MemoryError(f"{purpose} needs {num_bytes} bytes, {self.current} are used, "
                                  f"{self.limit_bytes} are allowed")
            self._add(num_bytes, purpose)
            return Allocation(self, num_bytes, purpose)

    def _add(self, num_bytes, purpose):
        self.current += num_bytes
        self.peak = max(self.peak, self.current)
        self._purposes[purpose] = self._purposes.get(purpose, 0) + num_bytes

    def usage(self, purpose=None):
        """Bytes in use now, for one purpose or for all."""
        return self.current if purpose is None else self._purposes.get(purpose, 0)

    @property
    def by_purpose(self):
        """{purpose: bytes in use}, without the purposes that use none."""
        with self._lock:
            return {purpose: used for purpose, used in self._purposes.items() if used}


# %% cell 44 (14-release)
class Allocation:
    """Bytes on a tracker's ledger, until close() or the end of a `with` block, an exception included."""

    def __init__(self, tracker, num_bytes, purpose):
        self.tracker, self.num_bytes, self.purpose, self.closed = tracker, num_bytes, purpose, False

    def close(self):
        """Give the bytes back; a second call does nothing."""
        with self.tracker._lock:
            if not self.closed:
                self.tracker._add(-self.num_bytes, self.purpose)
            self.closed = True

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


# %% cell 49 (14-own)
def own_seconds(rows, index):
    """Seconds of rows[index] without those of its direct parts; rows are dicts with "depth" and "seconds"."""
    own, depth = rows[index]["seconds"], rows[index]["depth"]
    for row in rows[index + 1 :]:
        if row["depth"] <= depth:
            break
        if row["depth"] == depth + 1:
            own -= row["seconds"]
    return own


# %% cell 51
class Timed:
    """Stands in the place of a module for one measurement: runs it, and notes when it begins and ends."""

    def __init__(self, module, row, recorder):
        self.module, self.row, self.recorder = module, row, recorder

    def __getattr__(self, name):
        return getattr(self.module, name)

    def __call__(self, *inputs, **options):
        started, counted = time.perf_counter(), self.recorder.total
        output = self.module(*inputs, **options)
        self.row["seconds"] += time.perf_counter() - started
        self.row["flops"] += self.recorder.total - counted
        self.row["calls"] += 1
        self.row["shape"] = getattr(output, "shape", None)
        return output


def put_child(parent, name, child):
    """Put `child` where parent.named_children() found `name`: an attribute, or an entry of a list ("blocks.0")."""
    attribute, _, index = name.partition(".")
    if not index:
        setattr(parent, attribute, child)
        return
    children = getattr(parent, attribute)
    if isinstance(children, tuple):
        at = int(index)
        setattr(parent, attribute, (*children[:at], child, *children[at + 1 :]))
    else:
        children[int(index)] = child


def walk(module, prefix="", depth=1):
    """(parent, name in the parent, full name, depth, part) for every part of a model, parents before their parts."""
    for name, child in list(module.named_children()) if isinstance(module, Module) else []:
        yield module, name, prefix + name, depth, child
        yield from walk(child, f"{prefix}{name}.", depth + 1)


def new_row(module, label, name, depth):
    return {"name": name, "label": label, "kind": type(module).__name__, "depth": depth, "shape": None, "calls": 0,
            "parameters": count_parameters(module), "flops": 0, "seconds": 0.0}


@contextmanager
def stopwatches(model, recorder):
    """In the block every part of the model is Timed; hands out a row per part. Afterwards the parts are back."""
    parts = list(walk(model))
    rows = [new_row(child, label, name, depth) for _, label, name, depth, child in parts]
    try:
        for (parent, label, _, _, child), row in zip(parts, rows):
            put_child(parent, label, Timed(child, row, recorder))
        yield rows
    finally:
        for parent, label, _, _, child in parts:
            put_child(parent, label, child)


# %% cell 53
def profile_once(model, x):
    """The rows of one forward pass: the whole model first, then its parts."""
    name = type(model).__name__
    whole = new_row(model, name, name, 0)
    with plugged_in(FlopCounter()) as counter, stopwatches(model, counter) as rows:
        Timed(model, whole, counter)(x)
    return [whole, *rows]


def profile_layers(model, x, warmup=2, repeats=7):
    """Rows (dicts) for a model and its parts in evaluation mode; "seconds" and "own_seconds" are medians."""
    x = example_input(model, x)
    with evaluation_mode(model):
        runs = [profile_once(model, x) for _ in range(warmup + repeats)][warmup:]
    rows = [dict(row) for row in runs[0]]
    for index, row in enumerate(rows):
        row["own_seconds"] = Measurement([own_seconds(run, index) for run in runs])
        row["seconds"] = Measurement([run[index]["seconds"] for run in runs])
    return rows


def layer_table(rows):
    """The rows as plain text: the share is of the model's time, own time only; GFLOP/s is FLOPs over seconds."""
    head = f"{'layer':<38}{'parameters':>11}{'MFLOP':>9}{'ms':>9}{'own %':>7}{'GFLOP/s':>9}"
    lines, whole = [head, "-" * len(head)], max(rows[0]["seconds"], 1e-12)
    for row in rows:
        label = row["label"] if row["depth"] == 0 else f"{row['label']} ({row['kind']})"
        rate = row["flops"] / row["seconds"] / 1e9 if row["seconds"] else 0.0
        lines.append(f"{'  ' * row['depth'] + label:<38.38}{row['parameters']:>11,}{row['flops'] / 1e6:>9.2f}"
                     f"{row['seconds'] * 1e3:>9.3f}{row['own_seconds'] / whole:>7.1%}{rate:>9.1f}")
    return "\n".join(lines)


def plot_layers(rows, path=None):
    """Bars of own milliseconds per part, written to `path` if given; says so where matplotlib is missing."""
    try:
        from matplotlib import pyplot
    except ImportError:
        print("The plot needs matplotlib: pip install matplotlib")
        return None
    figure, axes = pyplot.subplots(figsize=(7, 1 + 0.25 * len(rows)))
    axes.barh([row["name"] for row in rows], [row["own_seconds"] * 1e3 for row in rows], color="#3b6ea5")
    axes.invert_yaxis()
    axes.set_xlabel("own time in ms (without the parts inside)")
    figure.tight_layout()
    if path is not None:
        figure.savefig(path)
        pyplot.close(figure)
    return figure


# %% cell 54
class Profiler:
    """All measurements of this file with one setting of warm-up and repeats."""

    def __init__(self, warmup=2, repeats=7):
        self.warmup, self.repeats = warmup, repeats

    def count_parameters(self, model):
        return count_parameters(model)

    def count_flops(self, model, x):
        """FLOPs of one forward pass, 2 per multiply-add; x is an input, or the shape of one as a tuple."""
        return count_flops(model, x)

    def measure_memory(self, function, *args):
        return measure_memory(function, *args)

    def measure_latency(self, function, *args, warmup=None, repeats=None):
        """Median seconds; the result also has `.low`, `.high` (quartiles) and `.all`."""
        warmup = self.warmup if warmup is None else warmup
        repeats = self.repeats if repeats is None else repeats
        return measure_latency(function, *args, warmup=warmup, repeats=repeats)

    def profile_layers(self, model, x):
        return profile_layers(model, x, self.warmup, self.repeats)

    def report(self, model, x):
        """The table of profile_layers as text."""
        return layer_table(self.profile_layers(model, x))

    def plot(self, rows, path=None):
        return plot_layers(rows, path)

# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   tinytorch:
#     lesson: "14"
# ---

# %% [markdown]
"""
# Lesson 14: Profiling

**You build** a profiler: parameters, FLOPs, bytes and time, for a whole model and for each of its parts; and a
tracker that refuses memory before it is gone.

**You need** models: the layers of lesson 03 and the GPT of lesson 13.

**It becomes** `tinytorch/profiling/profiler.py`. About 75 minutes. Lesson 17 begins with it.

Stuck? `tito module hint 14`.
"""

# %%
#| default_exp profiling.profiler
#| export
import threading
import time
import tracemalloc
from contextlib import contextmanager

import numpy as np

from tinytorch.core.attention import attention_weights_array, mix_values_array
from tinytorch.core.layers import Module, linear_array
from tinytorch.core.tensor import Tensor, matmul_array, plug_in
from tinytorch.core.training import evaluation_mode

# %%
from tinytorch.core.activations import ReLU
from tinytorch.core.layers import Linear, Sequential
from tinytorch.models.transformer import GPT

# %% [markdown]
"""
## 1. How large is it?

A guess about speed is usually wrong; a measurement is usually careless. We begin with what can be counted
exactly.

**Predict.** `Linear(64, 256)` with its bias: how many numbers does it learn?
"""

# %% nbgrader={"grade": false, "grade_id": "14-predict-parameters", "locked": false, "schema_version": 3, "solution": true, "task": false}
# predicted_parameters = ...  (a whole number)
### BEGIN SOLUTION
predicted_parameters = 64 * 256 + 256
### END SOLUTION

# %% nbgrader={"grade": false, "grade_id": "14-parameters", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def count_parameters(model):
    """How many numbers a model learns; a parameter that two parts share counts once, as in model.parameters()."""
    ### BEGIN SOLUTION
    return sum(parameter.size for parameter in model.parameters())
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "14-parameters-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_parameters():
    """The oracle is GPT's sum by hand: vocabulary 50, width 16, one block, 12 positions; the head shares its weight."""
    got = count_parameters(Sequential(Linear(3, 4), ReLU(), Linear(4, 2, bias=False)))
    assert got != 3, "that is the number of arrays: count the numbers in them"
    assert got == 24, f"Linear(3, 4) and Linear(4, 2) without bias: got {got}, expected 16 + 8 = 24"
    block = 2 * 2 * 16 + (16 * 48 + 48) + (16 * 16 + 16) + (16 * 64 + 64) + (64 * 16 + 16)
    expected = 50 * 16 + 12 * 16 + block + 2 * 16
    got = count_parameters(GPT(50, 16, 1, 2, 12))
    assert got != expected + 50 * 16, "the head's weight is the embedding's: it was counted twice"
    assert got == expected, f"GPT: got {got}, expected {expected}"


if __name__ == "__main__":
    test_unit_parameters()

# %% nbgrader={"grade": true, "grade_id": "14-predict-parameters-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_predict_parameters():
    """The oracle is the layer."""
    measured = count_parameters(Linear(64, 256))
    assert predicted_parameters == measured, (
        f"predicted {predicted_parameters}, counted {measured}: a weight for each pair, and a bias for each output")


if __name__ == "__main__":
    test_unit_predict_parameters()

# %% [markdown]
"""
## 2. How much work is it?

A matrix product (M, K) @ (K, N) makes M * N numbers, each from K multiplications and K additions. The field counts
both, **2 per multiply-add**:

    FLOPs = 2 * M * N * K        (2, 3) @ (3, 4): 8 numbers, 3 multiply-adds each, 48 FLOPs

That is twice the size of the output times the inner length, whatever stands before the last two dimensions. As PyTorch's
counter does, we count matrix products only. Biases, softmax and norms are a few FLOPs per number, and section 7 shows
that they cost time all the same.

**Predict.** `Linear(64, 256)` on x of shape (2, 32, 64)?
"""

# %% nbgrader={"grade": false, "grade_id": "14-predict-flops", "locked": false, "schema_version": 3, "solution": true, "task": false}
# predicted_flops = ...  (a whole number)
### BEGIN SOLUTION
predicted_flops = 2 * (2 * 32 * 256) * 64
### END SOLUTION

# %% [markdown]
"""
Formulas stand beside operations in a table, as gradient rules do: a decorator enters them, and a later lesson adds a
row for its own operation. They get what the operation got, as Tensors or arrays, and look at shapes alone. Two worked
examples:

    attention weights   query (B, H, T, D), key (B, H_kv, S, D)      -> (B, H, T, S): each number sums over D
    mixed values        weights (B, H, T, S), value (B, H_kv, S, D)  -> (B, H, T, D): each number sums over S
"""

# %%
#| export
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

# %% nbgrader={"grade": false, "grade_id": "14-linear-flops", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
@flops(linear_array)
def linear_flops(output, x, weight, bias=None):
    """FLOPs of x (..., in) with weight (out, in), the bias not counted.

    >>> linear_flops(np.zeros((2, 4)), np.zeros((2, 3)), np.zeros((4, 3)))
    48
    """
    ### BEGIN SOLUTION
    return 2 * output.size * weight.shape[1]
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "14-linear-flops-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_linear_flops():
    """The oracle is a triple loop that counts."""
    rows, out, inner = 3, 4, 5
    counted = 0
    for _ in range(rows):
        for _ in range(out):
            for _ in range(inner):
                counted += 2  # one multiplication, one addition
    got = linear_flops(np.zeros((rows, out)), np.zeros((rows, inner)), np.zeros((out, inner)), np.zeros(out))
    assert got is not None, "nothing was returned"
    assert got != counted // 2, f"got {got}: those are multiply-adds; the field counts 2 FLOPs for each"
    assert got != counted * out // inner, f"got {got}: weight is (out, in); the sum runs over in"
    assert got == counted, f"got {got}, the loop counts {counted}"
    batch = linear_flops(np.zeros((2, rows, out)), np.zeros((2, rows, inner)), np.zeros((out, inner)))
    assert batch == 2 * counted, f"a batch of 2: got {batch}, expected {2 * counted}: every row of every batch is work"


if __name__ == "__main__":
    test_unit_linear_flops()

# %% nbgrader={"grade": true, "grade_id": "14-predict-flops-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_predict_flops():
    """The oracle is your formula."""
    measured = linear_flops(np.zeros((2, 32, 256)), np.zeros((2, 32, 64)), np.zeros((256, 64)))
    assert predicted_flops == measured, (
        f"predicted {predicted_flops}, computed {measured}: 2 * 32 rows, 256 outputs each, 64 multiply-adds, times 2")


if __name__ == "__main__":
    test_unit_predict_flops()

# %% nbgrader={"grade": false, "grade_id": "14-scores-flops", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
@flops(attention_weights_array)
def scores_flops(output, query, key, **params):
    """FLOPs of query @ key.T: output (B, H, T, S), query (B, H, T, D), key (B, H_kv, S, D); softmax not counted."""
    ### BEGIN SOLUTION
    return 2 * output.size * query.shape[-1]
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "14-scores-flops-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_scores_flops():
    """The oracle is 2 * B * H * T * S * D, with T and S different and fewer key heads than query heads."""
    output, query, key = np.zeros((2, 6, 3, 7)), np.zeros((2, 6, 3, 5)), np.zeros((2, 2, 7, 5))
    got, expected = scores_flops(output, query, key, visible=None), 2 * 2 * 6 * 3 * 7 * 5
    assert got != expected // 3, f"got {got}: every query head is multiplied, also where heads share keys"
    assert got != expected * 7 // 5, f"got {got}: each score is a sum over head_dim, the last dimension of query"
    assert got == expected, f"got {got}, expected 2 * B * H * T * S * D = {expected}"


if __name__ == "__main__":
    test_unit_scores_flops()

# %% [markdown]
"""
## 3. An engine that counts

How does the profiler learn which operations a model runs? Every one goes through `apply`, and `apply` tells
whatever is plugged into the socket of lesson 01. Autograd is one such engine. A counter is another: no model has
to be changed.

**Build** `record`: look the operation up; one without a formula counts 0. Add to the total, and to the entry of its name
in `by_op`.
"""

# %% nbgrader={"grade": false, "grade_id": "14-counter", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
class FlopCounter:
    """An engine that counts FLOPs instead of recording gradients."""

    def __init__(self):
        self.total, self.by_op = 0, {}

    def record(self, op, inputs, params, output):
        """Called by apply after every operation."""
        rule, name = FLOP_RULES.get(op), op.__name__
        ### BEGIN SOLUTION
        count = rule(output, *inputs, **params) if rule else 0
        self.total += count
        self.by_op[name] = self.by_op.get(name, 0) + count
        ### END SOLUTION

    def backward(self, tensor, gradient=None):
        raise RuntimeError("FLOPs are being counted: nothing was recorded for a gradient")

# %%
#| export
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

# %% nbgrader={"grade": true, "grade_id": "14-counter-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_counter():
    """The oracle is the sum by hand over the layers of two models."""
    model = Sequential(Linear(3, 5), ReLU(), Linear(5, 2))
    got = count_flops(model, (4, 3))
    assert got, f"got {got}: nothing was counted"
    assert got != 2 * 4 * 5 * 2, f"got {got}: only the last operation; add to the total"
    assert got == 2 * 4 * (3 * 5 + 5 * 2), f"got {got}, expected {2 * 4 * (3 * 5 + 5 * 2)}"
    counter = FlopCounter()
    with plugged_in(counter):
        x = Tensor(np.ones((2, 3)))
        (x @ Tensor(np.ones((3, 4)))) @ Tensor(np.ones((4, 3))) + x
    assert counter.by_op.get("matmul_array") == 2 * 48, f"two products of 48 FLOPs, by_op says {counter.by_op}"
    assert counter.by_op.get("add_array") == 0, f"an operation without a formula is listed with 0: {counter.by_op}"
    ### BEGIN HIDDEN TESTS
    B, T, E, V = 2, 6, 16, 50
    per_block = 2 * B * T * E * (3 * E + E + 4 * E + 4 * E) + 2 * (2 * B * T * T * E)
    got = count_flops(GPT(V, E, 3, 2, 12), (B, T))
    assert got == 3 * per_block + 2 * B * T * E * V, f"GPT: got {got}, expected {3 * per_block + 2 * B * T * E * V}"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_counter()

# %% [markdown]
"""
A rule of thumb says that a forward pass of a transformer costs 2 FLOPs per parameter and token. Where does it hold?
"""

# %% nbgrader={"grade": false, "grade_id": "14-measure-flops", "locked": true, "schema_version": 3, "solution": false, "task": false}
if __name__ == "__main__":
    model = GPT(vocab_size=512, embed_dim=128, num_layers=4, num_heads=4, max_seq_len=512)
    print(f"{count_parameters(model):,} parameters")
    print("tokens      MFLOP   per token and parameter")
    for tokens in (1, 64, 256, 512):
        total = count_flops(model, (1, tokens))
        print(f"{tokens:6}  {total / 1e6:9.1f}   {total / tokens / count_parameters(model):.2f}")

# %% [markdown]
"""
Attention is the part that the rule leaves out: its work per token grows with the number of tokens. Predict where the
rule would fail for a model ten times as wide, then try.

## 4. How long does it take?

Time the same call twice, and two different numbers come out. The first call is slower: memory is fetched from the
system, code and data are not in the caches. Later ones vary, because the machine does other things as well, and what it
does only ever adds time. So: **warm-up** calls that do not count, then several that do, and the **median**, which one
slow call cannot move.

**Predict.** Five calls take 10, 10, 11, 10 and 59 ms. Median and mean?
"""

# %% nbgrader={"grade": false, "grade_id": "14-predict-median", "locked": false, "schema_version": 3, "solution": true, "task": false}
# predicted_median, predicted_mean = ..., ...  (numbers)
### BEGIN SOLUTION
predicted_median, predicted_mean = 10, 20
### END SOLUTION

# %% [markdown]
"""
**Build** the loop. The clock is an argument, so that the check can bring one of its own.
"""

# %% nbgrader={"grade": false, "grade_id": "14-latency", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def time_calls(function, warmup, repeats, clock=time.perf_counter):
    """Seconds of each of `repeats` calls of function(), after `warmup` calls that are not timed."""
    ### BEGIN SOLUTION
    for _ in range(warmup):
        function()
    seconds = []
    for _ in range(repeats):
        start = clock()
        function()
        seconds.append(clock() - start)
    return seconds
    ### END SOLUTION

# %%
#| export
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

# %% nbgrader={"grade": true, "grade_id": "14-latency-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_latency():
    """The oracle is a clock that moves only when the function runs: 100, 90, then 5, 3, 40, 4, 6 seconds."""
    now, durations, calls = [0.0], [100, 90, 5, 3, 40, 4, 6], []

    def work():
        now[0] += durations[len(calls) % len(durations)]
        calls.append(now[0])

    got = time_calls(work, warmup=2, repeats=5, clock=lambda: now[0])
    assert got is not None and len(got) == 5, f"5 repeats give 5 numbers, got {got}"
    assert got[:2] != [100, 90], f"got {got}: the warm-up calls were timed"
    assert len(calls) == 7, f"the function ran {len(calls)} times, expected 2 + 5: one call per measurement"
    assert got != [5, 8, 48, 52, 58], f"got {got}: start the clock anew for each call"
    assert got == [5, 3, 40, 4, 6], f"got {got}, expected [5, 3, 40, 4, 6]"
    measured = Measurement(got)
    assert measured == 5 and (measured.low, measured.high) == (4, 6), f"median and quartiles: {measured!s}"


if __name__ == "__main__":
    test_unit_latency()

# %% nbgrader={"grade": true, "grade_id": "14-predict-median-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_predict_median():
    """The oracle is NumPy, and the median that your measurement reports."""
    now, durations = [0.0], iter([10, 10, 11, 10, 59])

    def work():
        now[0] += next(durations)

    seconds = time_calls(work, 0, 5, clock=lambda: now[0])
    assert predicted_median == Measurement(seconds), f"predicted median {predicted_median}, measured {np.median(seconds)}"
    assert predicted_mean == np.mean(seconds), f"predicted mean {predicted_mean}, measured {np.mean(seconds)}"


if __name__ == "__main__":
    test_unit_predict_median()

# %% nbgrader={"grade": false, "grade_id": "14-measure-latency", "locked": true, "schema_version": 3, "solution": false, "task": false}
if __name__ == "__main__":
    a, b = np.ones((2, 512, 512), np.float32)
    cold = time_calls(lambda: a @ b, 0, 1)[0]
    seconds = measure_latency(lambda: a @ b)
    print(f"first call {cold * 1e3:.3f} ms, then {seconds}")
    print(f"(512, 512) @ (512, 512): {2 * 512**3 / seconds / 1e9:.0f} GFLOP/s on this machine")

# %% [markdown]
"""
## 5. How much memory?

Two questions look alike. What do the arrays hold that are **there**? And how much is asked for **on the way**, at the
worst moment? The first is a sum of `nbytes`. The second needs someone to watch every allocation: Python's
`tracemalloc` does, and NumPy reports to it.

    before = what is traced when the call starts
    peak   = the most that was traced during it          peak_bytes = peak - before

`reset_peak()` forgets peaks from before the call. `get_traced_memory()` returns (now, peak).
"""

# %% nbgrader={"grade": false, "grade_id": "14-memory", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def traced_call(function, *args):
    """(result, bytes still held after the call, peak bytes during it), while tracemalloc is tracing."""
    ### BEGIN SOLUTION
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    result = function(*args)
    after, peak = tracemalloc.get_traced_memory()
    return result, after - before, peak - before
    ### END SOLUTION

# %%
#| export
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

# %% nbgrader={"grade": true, "grade_id": "14-memory-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_memory():
    """The oracle is a function whose arrays we know: 4 MiB for a moment, 1 MiB returned."""
    def work():
        moment = np.ones(2**20, np.float32)
        return moment[: 2**18].copy()

    tracemalloc.start()
    try:
        there = np.ones(2**21, np.uint8)
        np.ones(2**24, np.uint8)  # an old peak, over before the call
        result, kept, peak = traced_call(work)
    finally:
        tracemalloc.stop()
    assert np.shape(result) == (2**18,) and there.size == 2**21, "the function's result must be handed on"
    MiB = 2**20
    assert peak < 15 * MiB, f"peak {peak / MiB:.1f} MiB: an old peak; reset_peak() before the call"
    assert not 6 * MiB < peak < 8 * MiB, f"peak {peak / MiB:.1f} MiB: subtract what was there before the call"
    assert abs(peak - 5 * MiB) < 0.2 * MiB, f"peak {peak / MiB:.1f} MiB, expected 5: 4 for the moment and 1 for the copy"
    assert abs(kept - MiB) < 0.2 * MiB, f"kept {kept / MiB:.1f} MiB, expected 1: the result"


if __name__ == "__main__":
    test_unit_memory()

# %% [markdown]
"""
A forward pass in training keeps what its backward pass will read. In evaluation, only the result survives.

    Linear(256, 1024), ReLU, Linear(1024, 256)        x (64, 256)        float32

**Predict.** How many bytes do the three outputs take together? That is what training keeps, as long as the loss is
alive. And how many bytes does evaluation keep?
"""

# %% nbgrader={"grade": false, "grade_id": "14-predict-memory", "locked": false, "schema_version": 3, "solution": true, "task": false}
# predicted_training = ...  (bytes)
# predicted_evaluation = ...  (bytes)
### BEGIN SOLUTION
predicted_training = 4 * 64 * (1024 + 1024 + 256)
predicted_evaluation = 4 * 64 * 256
### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "14-predict-memory-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_predict_memory():
    """The oracle is tracemalloc, with 5 % for Python's own objects."""
    model, x = Sequential(Linear(256, 1024), ReLU(), Linear(1024, 256)), Tensor(np.ones((64, 256)))
    training = measure_memory(model, x)["kept_bytes"]
    with evaluation_mode(model):
        evaluation = measure_memory(model, x)["kept_bytes"]
    assert abs(predicted_training - training) < 0.05 * training, (
        f"training: predicted {predicted_training:,}, measured {training:,}: each layer's output, 4 bytes per number")
    assert abs(predicted_evaluation - evaluation) < 0.05 * evaluation, (
        f"evaluation: predicted {predicted_evaluation:,}, measured {evaluation:,}: the last output is all that is left")


if __name__ == "__main__":
    test_unit_predict_memory()

# %% [markdown]
"""
## 6. A budget

`tracemalloc` tells afterwards. A server that is about to give a user a cache must know **before**, and say no while
everything still works. `MemoryTracker` is a ledger: who wants memory asks first, under a purpose, and gets a
handle; closing the handle gives the bytes back.

    tracker = MemoryTracker(limit_bytes=1000)
    with tracker.allocate(600, "kv_cache"):        current 600
        tracker.allocate(500, "kv_cache")          MemoryError: 600 used, 500 needed, 1000 allowed
                                                   after the block: current 0, peak 600

**Predict.** allocate 100, allocate 50, close the first, allocate 80: what are `current` and `peak`?
"""

# %% nbgrader={"grade": false, "grade_id": "14-predict-peak", "locked": false, "schema_version": 3, "solution": true, "task": false}
# predicted_current, predicted_peak = ..., ...  (bytes)
### BEGIN SOLUTION
predicted_current, predicted_peak = 130, 150
### END SOLUTION

# %% [markdown]
"""
**Build** `allocate`: refuse before anything is counted, else count and hand out. The message names what is needed,
used and allowed. The lock keeps two threads from reading the same free bytes. `_add` is given; it keeps
the peak.
"""

# %% nbgrader={"grade": false, "grade_id": "14-tracker", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
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
            ### BEGIN SOLUTION
            if self.limit_bytes is not None and self.current + num_bytes > self.limit_bytes:
                raise MemoryError(f"{purpose} needs {num_bytes} bytes, {self.current} are used, "
                                  f"{self.limit_bytes} are allowed")
            self._add(num_bytes, purpose)
            return Allocation(self, num_bytes, purpose)
            ### END SOLUTION

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

# %% [markdown]
"""
The handle. Cleaning up is often done twice, by a `with` block and by hand; the bytes may come back **once**.
`_add` with a negative number takes them off the ledger.
"""

# %% nbgrader={"grade": false, "grade_id": "14-release", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
class Allocation:
    """Bytes on a tracker's ledger, until close() or the end of a `with` block, an exception included."""

    def __init__(self, tracker, num_bytes, purpose):
        self.tracker, self.num_bytes, self.purpose, self.closed = tracker, num_bytes, purpose, False

    def close(self):
        """Give the bytes back; a second call does nothing."""
        with self.tracker._lock:
            ### BEGIN SOLUTION
            if not self.closed:
                self.tracker._add(-self.num_bytes, self.purpose)
            self.closed = True
            ### END SOLUTION

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

# %% nbgrader={"grade": true, "grade_id": "14-tracker-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_tracker():
    """The oracle is the ledger by hand."""
    tracker = MemoryTracker(limit_bytes=1000)
    first = tracker.allocate(600, "kv_cache")
    assert isinstance(first, Allocation), f"allocate must return an Allocation, got {first!r}"
    assert (tracker.current, tracker.by_purpose) == (600, {"kv_cache": 600}), (
        f"after 600 bytes: current {tracker.current}, by purpose {tracker.by_purpose}")
    try:
        tracker.allocate(500, "weights")
    except MemoryError as error:
        missing = [word for word in ("500", "600", "1000") if word not in str(error)]
        assert not missing, f"the message must name bytes needed, used and allowed; {missing} is not in {str(error)!r}"
    else:
        raise AssertionError("600 are used, 500 more were granted, and 1000 is the limit")
    assert tracker.current == 600 and tracker.peak == 600, (
        f"a refused request was counted: current {tracker.current}, peak {tracker.peak}; refuse before counting")
    tracker.allocate(400, "weights")
    assert tracker.current == 1000, "exactly the limit must be granted"
    assert MemoryTracker().allocate(10**15).num_bytes == 10**15, "without a limit, nothing is refused"


if __name__ == "__main__":
    test_unit_tracker()

# %% nbgrader={"grade": true, "grade_id": "14-release-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_release():
    """The oracle is the ledger by hand."""
    tracker = MemoryTracker()
    handle = tracker.allocate(100, "a")
    tracker.allocate(30, "a")
    handle.close()
    assert tracker.current == 30, f"100 and 30 bytes, the first closed: current {tracker.current}, expected 30"
    handle.close()
    assert tracker.current == 30, f"closed twice: current {tracker.current}, expected 30; the bytes come back once"
    assert tracker.peak == 130, f"peak {tracker.peak}, expected 130"
    try:
        with tracker.allocate(50, "b") as inner:
            assert tracker.usage("b") == 50, f"inside the block b uses {tracker.usage('b')}, expected 50"
            inner.close()
            raise LookupError
    except LookupError:
        pass
    assert tracker.by_purpose == {"a": 30}, f"after the block: {tracker.by_purpose}, expected a: 30 alone"


if __name__ == "__main__":
    test_unit_release()

# %% nbgrader={"grade": true, "grade_id": "14-predict-peak-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_predict_peak():
    """The oracle is the tracker."""
    tracker = MemoryTracker()
    first = tracker.allocate(100)
    tracker.allocate(50)
    first.close()
    tracker.allocate(80)
    assert predicted_current == tracker.current, f"current: predicted {predicted_current}, measured {tracker.current}"
    assert predicted_peak == tracker.peak, (
        f"peak: predicted {predicted_peak}, measured {tracker.peak}: the most at any one time, not the sum of all")


if __name__ == "__main__":
    test_unit_predict_peak()

# %% [markdown]
"""
## 7. Where does it go?

A total names no culprit. For a report per layer we put a stopwatch in the place of each part, for the length of one
measurement. Attributes may be replaced at any time, and everything follows: `block.mlp = Timed(block.mlp, …)`.
Afterwards the very same objects go back.

A parent's time contains that of its parts. Its **own** time is what is left:

    block      10 ms         own 10 - 4 - 5 = 1
      attention 4 ms         own 4
      mlp       5 ms         own 5 - 3 = 2
        up_proj 3 ms         own 3          (inside mlp: already taken off there)

Rows come in the order of the walk, each with its depth: a row's parts are the deeper rows behind it, up to the next row
that is not deeper.
"""

# %% nbgrader={"grade": false, "grade_id": "14-own", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def own_seconds(rows, index):
    """Seconds of rows[index] without those of its direct parts; rows are dicts with "depth" and "seconds"."""
    ### BEGIN SOLUTION
    own, depth = rows[index]["seconds"], rows[index]["depth"]
    for row in rows[index + 1 :]:
        if row["depth"] <= depth:
            break
        if row["depth"] == depth + 1:
            own -= row["seconds"]
    return own
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "14-own-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_own():
    """The oracle is the picture above, with a second block behind the first."""
    numbers = [(0, 10), (1, 4), (1, 5), (2, 3), (0, 7), (1, 7)]
    rows = [{"depth": depth, "seconds": seconds} for depth, seconds in numbers]
    got = [own_seconds(rows, index) for index in range(len(rows))]
    assert None not in got, f"a row has no own time: {got}"
    assert got[0] != -2, f"own times {got}: up_proj was taken off the block too; mlp has it already"
    assert got[0] not in (-6, -9, -13), f"own times {got}: the second block's parts are not the first block's"
    assert got == [1, 4, 2, 3, 0, 7], f"own times {got}, expected [1, 4, 2, 3, 0, 7]"
    assert sum(got) == 10 + 7, f"own times add up to {sum(got)}, expected the blocks' 17"


if __name__ == "__main__":
    test_unit_own()

# %%
#| export
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

# %% [markdown]
"""
One run gives one row per part; several runs give medians. The counter is plugged in at the same time, so each
row knows its FLOPs too.
"""

# %%
#| export
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

# %%
#| export
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

# %% nbgrader={"grade": false, "grade_id": "14-measure-layers", "locked": true, "schema_version": 3, "solution": false, "task": false}
if __name__ == "__main__":
    model = GPT(vocab_size=512, embed_dim=128, num_layers=2, num_heads=4, max_seq_len=128)
    rows = Profiler().profile_layers(model, (1, 128))
    print(layer_table(rows))
    plot_layers(rows)

# %% [markdown]
"""
**Look back.** Which parts have no FLOPs and still take time? Which part has the most FLOPs, and is it the slowest? The
last column is the speed: compare the linear layers with the product that you timed in section 4.

## 8. What the next lessons will want to know

A GPT that writes text runs once per new token, each time over all tokens so far. Here is the time of one run, and
the sum over the runs that it takes to write that many tokens, estimated from above:
"""

# %% nbgrader={"grade": false, "grade_id": "14-measure-generation", "locked": true, "schema_version": 3, "solution": false, "task": false}
if __name__ == "__main__":
    profiler = Profiler(warmup=1, repeats=3)
    with evaluation_mode(model):
        print("tokens   ms per run   MFLOP per run   at most, ms for all runs up to here")
        total, lengths = 0.0, (16, 32, 64, 128)
        for previous, tokens in zip((0, *lengths), lengths):
            seconds = profiler.measure_latency(model, np.zeros((1, tokens), np.int64))
            total += (tokens - previous) * seconds  # at most: as if each of these runs were as long as the last
            work = profiler.count_flops(model, (1, tokens)) / 1e6
            print(f"{tokens:6}   {seconds * 1e3:10.2f}   {work:13.1f}   {total * 1e3:10.0f}")

# %% nbgrader={"grade": true, "grade_id": "14-module-test", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
def test_module():
    """Every check of the lesson, then a report on a GPT that must come out of it unchanged."""
    for check in (test_unit_parameters, test_unit_predict_parameters, test_unit_linear_flops,
                  test_unit_predict_flops, test_unit_scores_flops, test_unit_counter, test_unit_latency,
                  test_unit_predict_median, test_unit_memory, test_unit_predict_memory, test_unit_tracker,
                  test_unit_release, test_unit_predict_peak, test_unit_own):
        check()
    model = GPT(vocab_size=40, embed_dim=16, num_layers=2, num_heads=2, max_seq_len=16)
    before = [id(module) for module in model.modules()]
    profiler = Profiler(warmup=1, repeats=3)
    rows = profiler.profile_layers(model, (2, 8))
    assert [id(module) for module in model.modules()] == before, "the model's own parts must be back in their places"
    assert model.training, "the model's mode must be as before"
    by_name = {row["name"]: row for row in rows}
    assert rows[0]["flops"] == profiler.count_flops(model, (2, 8)), "the first row is the whole model"
    assert by_name["blocks.1.mlp"]["flops"] == 2 * 16 * 2 * 16 * 64, f"blocks.1.mlp: {by_name['blocks.1.mlp']}"
    assert by_name["blocks.0.attention.qkv_proj"]["shape"] == (2, 8, 48), "rows know the shape of their output"
    inside = sum(row["own_seconds"] for row in rows)
    assert 0 < inside < 3 * rows[0]["seconds"], f"own times add up to {inside}, the whole takes {rows[0]['seconds']}"
    table = profiler.report(model, (2, 8))
    assert len(table.splitlines()) == len(rows) + 2, f"a line per row below two of head:\n{table}"
    tracker = MemoryTracker(limit_bytes=2 * array_bytes(model))
    with tracker.allocate(array_bytes(model), "weights"):
        assert tracker.by_purpose == {"weights": 4 * count_parameters(model)}, f"{tracker.by_purpose}"
    assert tracker.current == 0 and tracker.peak == array_bytes(model), "the ledger does not balance"


if __name__ == "__main__":
    test_module()
    print("Lesson 14 holds.")

# %% [markdown]
"""
## Summary

* Count what can be counted: parameters once each, 2 FLOPs per multiply-add.
* The socket of lesson 01 takes a counter as readily as autograd.
* Time is a median after a warm-up, with its spread; memory is a peak, and what stays.
* A budget says no before memory is gone, and takes its bytes back once.
* Own time names the culprit; FLOPs alone do not.

**Exercises.** (1) Enter a formula for `layer_norm_array`, about 8 FLOPs per number: how much does the total
change? (2) Profile the same GPT at 8 and at 128 tokens: which rows grow faster than the others? (3) Profile a model
with 64 tokens and batch 1, then 8 tokens and batch 8: same FLOPs in which rows, same time in which? (4) Measure one
call with 1, 7 and 50 repeats, five times each: how far apart do the medians lie?

**Design note.** PyTorch's profiler (Kineto) records every operation with its time, at a price per event, and shows a
trace; a sampling profiler such as py-spy looks at the stack a hundred times a second, at next to no price, and shows
only what is large. Ours replaces parts, so its price is one Python call per part: nothing for a large layer, and a
visible share of a small one. Whoever measures must know what the measuring costs.

**Next.** The last table is the need that lesson 17 begins with: the same tokens are computed again and again.
"""

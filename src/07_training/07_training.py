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
#     lesson: "07"
# ---

# %% [markdown]
"""
# Lesson 07: Training

**You build** a `Trainer`: the loop with a learning-rate schedule, gradient clipping, honest evaluation, a
progress bar, and checkpoints that survive a kill at any moment. A run that is taken up again gives the same
losses, to the last bit.

**You need** layers, losses, autograd and the optimizers of lesson 06.

**It becomes** `tinytorch/core/training.py`. About 75 minutes.

Stuck? `tito module hint 07`.
"""

# %%
#| default_exp core.training
#| export
import ctypes
import io
import json
import math
import os
import shutil
import signal
import struct
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from tinytorch.core.autograd import no_grad
from tinytorch.core.tensor import Tensor, default_rng

# %%
import tempfile

from tinytorch.core.activations import ReLU
from tinytorch.core.layers import Dropout, Linear, Parameter, Sequential
from tinytorch.core.losses import cross_entropy, mse_loss
from tinytorch.core.optimizers import SGD, AdamW
from tinytorch.core.tensor import manual_seed

# %% [markdown]
"""
## 1. One step

Everyone's training step has the same parts, and each wrong order of them runs without an error. Here is one:
"""

# %%
if __name__ == "__main__":
    model = Linear(1, 1, rng=np.random.default_rng(0))
    optimizer, x, y = SGD(model.parameters(), lr=0.1), Tensor([[1.0], [2.0]]), Tensor([[3.0], [5.0]])
    for _ in range(3):
        loss = mse_loss(model(x), y)
        loss.backward()
        optimizer.zero_grad()
        optimizer.step()
        print(f"loss {loss.item():.4f}, the gradient that step() sees: {model.weight.grad}")

# %% [markdown]
"""
The gradients were thrown away before anyone used them. The order that works, and why:

    loss = loss_function(model(inputs), targets)    forward
    zero_grad()                                     backward adds to old gradients: forget them first
    backward()
    clip, if asked for                              section 3 writes clip_grad_norm
    step()

A loss that is not a finite number is refused before anything moves; otherwise one NaN reaches every weight.
"""

# %% nbgrader={"grade": false, "grade_id": "07-train-step", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def check_finite(value, what):
    """Refuse NaN and infinity while the weights are still good."""
    if not math.isfinite(value):
        raise FloatingPointError(f"the {what} is {value}; nothing was updated. A smaller lr or max_grad_norm may help")


def train_step(model, optimizer, loss_function, inputs, targets, max_grad_norm=None):
    """One forward, one backward and one step on a batch; returns the loss (a float) from before the step."""
    loss = loss_function(model(Tensor(inputs)), Tensor(targets))
    check_finite(loss.item(), "loss")
    ### BEGIN SOLUTION
    optimizer.zero_grad()
    loss.backward()
    if max_grad_norm is not None:
        check_finite(clip_grad_norm(optimizer.params, max_grad_norm), "gradient norm")
    optimizer.step()
    return loss.item()
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "07-train-step-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_train_step():
    """The oracle is y = w * x by hand: the gradient of (w*x - y)^2 is 2 * x * (w*x - y)."""
    model = Linear(1, 1, bias=False)
    model.weight.data[...] = 1.0
    optimizer, x, y = SGD(model.parameters(), lr=0.1), np.array([[2.0]]), np.array([[6.0]])
    loss = train_step(model, optimizer, mse_loss, x, y)
    w = model.weight.data.item()
    assert w != 1.0, "the weight did not move: is the gradient still there when step() is called?"
    assert np.isclose(w, 2.6), f"the weight went from 1 to {w:.4f}, expected 2.6 = 1 - 0.1 * 2 * 2 * (2 - 6)"
    assert isinstance(loss, float), f"the loss must be a float (loss.item()), got {type(loss).__name__}"
    assert np.isclose(loss, 16), f"loss {loss}, expected 16: the loss before the step"
    train_step(model, optimizer, mse_loss, x, y)
    w = model.weight.data.item()
    assert not np.isclose(w, 4.52), "the second step used the first step's gradient again: forget it before backward"
    assert np.isclose(w, 2.92), f"after two steps the weight is {w:.4f}, expected 2.92"


if __name__ == "__main__":
    test_unit_train_step()

# %% [markdown]
"""
## 2. A learning rate with a shape

Early steps are wild: Adam's averages know one batch. So the rate climbs for a few *warm-up* steps. Late steps
should settle: it falls along half a cosine, from `max_lr` to `min_lr`. For max_lr 0.4, 3 warm-up steps, 7 steps:

    step      0    1    2    3    4      5    6      7
    rate    0.1  0.2  0.3  0.4  0.341  0.2  0.059  0.0 (min_lr, and so for ever)

Warm-up takes equal stairs, `max_lr * (step + 1) / (warmup_steps + 1)`, so that no step is wasted on rate 0.
After it, with `done` going from 0 to 1 between `warmup_steps` and `total_steps`:

    rate = min_lr + (max_lr - min_lr) * (1 + cos(pi * done)) / 2

**Predict.** max_lr 1.0, min_lr 0.2, no warm-up, 100 steps: the rate at steps 0, 50 and 100?
"""

# %% nbgrader={"grade": false, "grade_id": "07-predict-rate", "locked": false, "schema_version": 3, "solution": true, "task": false}
# predicted_rates = ...  (a list of 3 numbers)
### BEGIN SOLUTION
predicted_rates = [1.0, 0.6, 0.2]
### END SOLUTION

# %% nbgrader={"grade": false, "grade_id": "07-cosine", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def cosine_lr(step, max_lr, total_steps, warmup_steps=0, min_lr=0.0):
    """The learning rate of a step that counts from 0. Source: Loshchilov and Hutter 2017, SGDR, equation 5.

    >>> [round(cosine_lr(step, 0.4, 7, warmup_steps=3), 3) for step in (0, 3, 5, 7)]
    [0.1, 0.4, 0.2, 0.0]
    """
    ### BEGIN SOLUTION
    if step < warmup_steps:
        return max_lr * (step + 1) / (warmup_steps + 1)
    if step >= total_steps:
        return min_lr
    done = (step - warmup_steps) / (total_steps - warmup_steps)
    return min_lr + (max_lr - min_lr) * (1 + math.cos(math.pi * done)) / 2
    ### END SOLUTION

# %%
#| export
class CosineSchedule:
    """schedule(step) -> learning rate: a warm-up in equal stairs, then half a cosine down to min_lr."""

    def __init__(self, max_lr, total_steps, warmup_steps=0, min_lr=0.0):
        if not 0 <= warmup_steps < total_steps:
            raise ValueError(f"warmup_steps ({warmup_steps}) must be at least 0 and below total_steps ({total_steps})")
        self.max_lr, self.total_steps, self.warmup_steps, self.min_lr = max_lr, total_steps, warmup_steps, min_lr

    def __call__(self, step):
        return cosine_lr(step, self.max_lr, self.total_steps, self.warmup_steps, self.min_lr)

# %% nbgrader={"grade": true, "grade_id": "07-cosine-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_cosine():
    """The oracle is the table above."""
    got = [cosine_lr(step, 0.4, 7, warmup_steps=3) for step in range(9)]
    assert None not in got, f"a step got no rate: {got}"
    assert got[0] != 0, "step 0 has rate 0: a step that moves nothing; count the stairs from 1"
    assert np.allclose(got[:4], [0.1, 0.2, 0.3, 0.4]), f"warm-up {got[:4]}, expected 0.1 0.2 0.3 0.4"
    assert np.allclose(got[4:7], [0.341421, 0.2, 0.058579], atol=1e-5), (
        f"steps 4 to 6: {got[4:7]}, expected 0.3414 0.2 0.0586: `done` starts at 0 where the warm-up ends")
    assert np.allclose(got[7:], 0), f"steps 7 and 8: {got[7:]}; at total_steps and later the rate is min_lr"
    ### BEGIN HIDDEN TESTS
    schedule = CosineSchedule(1.0, 10, min_lr=0.5)
    assert np.allclose([schedule(0), schedule(5), schedule(10), schedule(99)], [1, 0.75, 0.5, 0.5])
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_cosine()

# %% nbgrader={"grade": true, "grade_id": "07-predict-rate-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_predict_rate():
    """The oracle is your function."""
    measured = [round(cosine_lr(step, 1.0, 100, min_lr=0.2), 6) for step in (0, 50, 100)]
    assert np.shape(predicted_rates) == (3,), f"three rates are asked for, got {predicted_rates}"
    assert np.allclose(predicted_rates, measured), (
        f"predicted {predicted_rates}, measured {measured}: half way is the middle of max_lr and min_lr")


if __name__ == "__main__":
    test_unit_predict_rate()

# %% nbgrader={"grade": false, "grade_id": "07-measure-schedule", "locked": true, "schema_version": 3, "solution": false, "task": false}
if __name__ == "__main__":
    schedule = CosineSchedule(1e-2, 40, warmup_steps=4)
    for step in range(0, 41, 4):
        print(f"step {step:2}  {schedule(step):.5f}  " + "#" * round(schedule(step) * 5000))

# %% [markdown]
"""
## 3. Clipping

One strange batch can have a gradient a hundred times the usual size. Clipping keeps its direction and limits its
length: **all** gradients together are one long vector, and all are scaled by one number.

    gradients [3, 0] and [4]     norm sqrt(9 + 0 + 16) = 5

**Predict.** `max_norm` is 1. What are the two gradients after clipping?
"""

# %% nbgrader={"grade": false, "grade_id": "07-predict-clip", "locked": false, "schema_version": 3, "solution": true, "task": false}
# predicted_first = ...  (a list of 2 numbers)
# predicted_second = ...  (a list of 1 number)
### BEGIN SOLUTION
predicted_first = [0.6, 0.0]
predicted_second = [0.8]
### END SOLUTION

# %% [markdown]
"""
**Build.** Gradients that are `None` take no part. Shorter vectors than `max_norm` stay as they are. PyTorch divides by
`norm + 1e-6`, so that a norm of 0 is no trap. In place, as a step is. `np.vdot(g, g)` is the sum of squares
without a temporary.
"""

# %% nbgrader={"grade": false, "grade_id": "07-clip", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def clip_grad_norm(parameters, max_norm):
    """Scale all gradients in place so that their common norm is at most max_norm; returns the norm before."""
    parameters = [parameters] if isinstance(parameters, Tensor) else parameters
    grads = [p.grad.data for p in parameters if p.grad is not None]
    ### BEGIN SOLUTION
    norm = math.sqrt(sum(float(np.vdot(grad, grad)) for grad in grads))
    scale = max_norm / (norm + 1e-6)
    if scale < 1:
        for grad in grads:
            grad *= scale
    return norm
    ### END SOLUTION

# %%
def with_gradients(*grads):
    """Parameters that have these gradients; None means none."""
    parameters = [Parameter(np.zeros(np.shape(grad) if grad is not None else 2)) for grad in grads]
    for parameter, grad in zip(parameters, grads):
        parameter.grad = None if grad is None else Tensor(grad)
    return parameters

# %% nbgrader={"grade": true, "grade_id": "07-clip-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_clip():
    """The oracle is the triangle 3, 4, 5."""
    parameters = with_gradients([3.0, 0.0], None, [4.0])
    norm = clip_grad_norm(parameters, 1.0)
    got = [p.grad.data.tolist() for p in parameters if p.grad is not None]
    assert norm is not None, "the norm must be returned, for the log"
    assert not np.isclose(norm, 1), f"returned {norm}: the norm before clipping is asked for"
    assert np.isclose(norm, 5), f"returned {norm}, expected 5: one norm over all gradients"
    assert not np.allclose(got[0], [1, 0]), f"got {got}: each was clipped alone, which bends the direction"
    assert np.allclose(got[0], [0.6, 0], atol=1e-5) and np.allclose(got[1], [0.8], atol=1e-5), (
        f"got {got}, expected [0.6, 0.0] and [0.8], written into the gradients")
    parameters = with_gradients([0.3, 0.4])
    assert np.isclose(clip_grad_norm(parameters, 1.0), 0.5), "the norm is returned also where nothing is clipped"
    assert np.allclose(parameters[0].grad.data, [0.3, 0.4]), (
        f"got {parameters[0].grad.data}: a gradient shorter than max_norm must not be stretched")


if __name__ == "__main__":
    test_unit_clip()

# %% nbgrader={"grade": true, "grade_id": "07-predict-clip-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_predict_clip():
    """The oracle is your function."""
    parameters = with_gradients([3.0, 0.0], [4.0])
    clip_grad_norm(parameters, 1.0)
    first, second = (p.grad.data for p in parameters)
    assert np.shape(predicted_first) == (2,) and np.shape(predicted_second) == (1,), "shapes: two numbers, then one"
    assert np.allclose(predicted_first, first, atol=1e-3) and np.allclose(predicted_second, second, atol=1e-3), (
        f"predicted {predicted_first} and {predicted_second}, measured {first} and {second}: divide by the common norm")


if __name__ == "__main__":
    test_unit_predict_clip()

# %% [markdown]
"""
## 4. An honest evaluation

Evaluation must switch dropout off, record no gradients, and leave the model as it was: training goes on
afterwards. "As it was" includes a model that was in evaluation mode already, and an error on the way.

`evaluation_mode` is a context manager: what stands after `yield` in a `finally` runs however the block ends.
"""

# %% nbgrader={"grade": false, "grade_id": "07-mode", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
@contextmanager
def evaluation_mode(model):
    """In the block the model is in evaluation mode and records nothing; after it, in the mode it had."""
    ### BEGIN SOLUTION
    was_training = model.training
    model.eval()
    try:
        with no_grad():
            yield model
    finally:
        model.train(was_training)
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "07-mode-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_mode():
    """The oracle is the model's own flag, on every way out of the block."""
    model = Sequential(Linear(2, 2), Dropout(0.5))
    for mode in (True, False):
        model.train(mode)
        with evaluation_mode(model):
            inside = (model.training, model[1].training)
            recorded = model(Tensor([[1.0, 2.0]])).requires_grad
        assert inside == (False, False), "inside the block, the model and its dropout must be in evaluation mode"
        assert not recorded, "inside the block, operations were recorded for a gradient: no_grad is missing"
        assert model.training == mode, f"the mode was {mode} before the block and {model.training} after it"
    model.train()
    try:
        with evaluation_mode(model):
            raise LookupError("on the way")
    except LookupError:
        pass
    assert model.training and model[1].training, "after an error in the block the model stayed in evaluation mode"
    assert model(Tensor([[1.0, 2.0]])).requires_grad, "after the block, recording must be on again"


if __name__ == "__main__":
    test_unit_mode()

# %% [markdown]
"""
The last batch of a data set is often smaller. Losses are means over their batch, so the mean of the means gives
the few rows of a small batch more weight than the others. Weigh each loss by `len(targets)`, and refuse to
divide by zero where no batch comes.

**Predict.** Batches of 3 rows and 1 row have the losses 1.0 and 5.0. What is the mean loss over the four rows?
"""

# %% nbgrader={"grade": false, "grade_id": "07-predict-mean", "locked": false, "schema_version": 3, "solution": true, "task": false}
# predicted_mean = ...  (a number)
### BEGIN SOLUTION
predicted_mean = 2.0
### END SOLUTION

# %% nbgrader={"grade": false, "grade_id": "07-mean-loss", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def mean_loss(model, loss_function, batches):
    """The mean loss over all rows of the batches (inputs, targets), in evaluation mode, without gradients."""
    ### BEGIN SOLUTION
    total, rows = 0.0, 0
    with evaluation_mode(model):
        for inputs, targets in batches:
            loss = loss_function(model(Tensor(inputs)), Tensor(targets))
            total += loss.item() * len(targets)
            rows += len(targets)
    if rows == 0:
        raise ValueError("there is nothing to evaluate: no batch came")
    return total / rows
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "07-mean-loss-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_mean_loss():
    """The oracle is one batch that holds all rows."""
    rng = np.random.default_rng(1)
    model = Sequential(Linear(3, 2, rng=rng), Dropout(0.5, rng=rng))
    x, y = rng.standard_normal((7, 3)), rng.standard_normal((7, 2)) * np.arange(7)[:, None]
    got = mean_loss(model, mse_loss, [(x[:5], y[:5]), (x[5:], y[5:])])
    again = mean_loss(model, mse_loss, [(x[:5], y[:5]), (x[5:], y[5:])])
    assert got == again, f"two evaluations of one model gave {got} and {again}: dropout was on"
    assert model.training, "the model was left in evaluation mode"
    model.eval()
    parts = [mse_loss(model(Tensor(a)), Tensor(b)).item() for a, b in ((x[:5], y[:5]), (x[5:], y[5:]), (x, y))]
    assert got is not None and np.shape(got) == (), f"one number is asked for, got {got}"
    assert not np.isclose(got, sum(parts[:2]) / 2), f"got {got:.4f}: the mean of the means; weigh each by its rows"
    assert np.isclose(got, parts[2], rtol=1e-5), f"got {got:.4f}, all rows at once give {parts[2]:.4f}"


if __name__ == "__main__":
    test_unit_mean_loss()

# %% nbgrader={"grade": true, "grade_id": "07-predict-mean-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_predict_mean():
    """The oracle is mean_loss on batches whose losses are 1 and 5."""
    model = Linear(1, 1, bias=False)
    model.weight.data[...] = 0.0
    ones = (np.zeros((3, 1)), np.ones((3, 1)))
    fives = (np.zeros((1, 1)), np.full((1, 1), 5**0.5))
    measured = mean_loss(model, mse_loss, [ones, fives])
    assert np.isclose(predicted_mean, measured, atol=1e-3), f"predicted {predicted_mean}, measured {measured:.3f}"


if __name__ == "__main__":
    test_unit_predict_mean()

# %% [markdown]
"""
## 5. A file for arrays

A checkpoint is a few named arrays and a little text. `pickle` would store them, and run whatever code a
stranger's file contains when it is opened. The *safetensors* format cannot: it is a length, a JSON header, and raw
bytes, so that every library can read it.

    8 bytes     length of the header, little-endian
    header      {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, "b": {…}}
    bytes       the numbers of a, then of b, little-endian, in C order

`data_offsets` count from the end of the header: where an array begins, and where the next one may begin.

**Predict.** `b` follows `a`; it has dtype F16 and shape [2, 2]. What are its data_offsets?
"""

# %% nbgrader={"grade": false, "grade_id": "07-predict-offsets", "locked": false, "schema_version": 3, "solution": true, "task": false}
# predicted_offsets = ...  (a list of 2 numbers)
### BEGIN SOLUTION
predicted_offsets = [24, 32]
### END SOLUTION

# %%
#| export
class CheckpointError(ValueError):
    """A checkpoint that cannot be written, cannot be read, or does not fit."""


DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1",
          "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1", "BOOL": "|b1"}  # fmt: skip
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}


def as_stored(tensors):
    """Tensors or arrays by name -> little-endian C arrays by name, widest numbers first so that all stay aligned."""
    arrays = {}
    for name, value in tensors.items():
        array = np.asarray(value.data if isinstance(value, Tensor) else value)
        dtype = array.dtype.newbyteorder("<")
        if not isinstance(name, str) or name == "__metadata__" or dtype not in CODES:
            raise CheckpointError(f"{name!r} ({dtype}) does not go into a checkpoint: a name is a string, "
                                  f"and numbers are {', '.join(DTYPES)}")
        arrays[name] = np.asarray(array, dtype=dtype, order="C")
    return dict(sorted(arrays.items(), key=lambda item: -item[1].itemsize))

# %% nbgrader={"grade": false, "grade_id": "07-header", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def header_entries(arrays):
    """The header of arrays that lie one behind the other: {name: {"dtype", "shape", "data_offsets"}}.

    >>> header_entries({"a": np.zeros((2, 3), "<f4")})
    {'a': {'dtype': 'F32', 'shape': [2, 3], 'data_offsets': [0, 24]}}
    """
    entries, begin = {}, 0
    for name, array in arrays.items():
        ### BEGIN SOLUTION
        end = begin + array.nbytes
        entries[name] = {"dtype": CODES[array.dtype], "shape": list(array.shape), "data_offsets": [begin, end]}
        begin = end
        ### END SOLUTION
    return entries

# %% nbgrader={"grade": true, "grade_id": "07-header-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_header():
    """The oracle is the example in the picture."""
    arrays = {"a": np.zeros((2, 3), "<f4"), "b": np.zeros((2, 2), "<f2"), "c": np.array(7)}
    got = header_entries(arrays)
    assert list(got) == ["a", "b", "c"], f"names {list(got)}, expected a, b, c in this order"
    assert got["a"] == {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, f"a: {got['a']}"
    assert got["b"]["data_offsets"] != [0, 8], "b begins at 0 again: it must begin where a ends"
    assert got["b"]["data_offsets"] != [6, 10], "offsets count bytes, not numbers"
    assert got["b"] == {"dtype": "F16", "shape": [2, 2], "data_offsets": [24, 32]}, f"b: {got['b']}"
    assert got["c"]["shape"] == [] and got["c"]["data_offsets"] == [32, 40], f"c is a single number: {got['c']}"


if __name__ == "__main__":
    test_unit_header()

# %% nbgrader={"grade": true, "grade_id": "07-predict-offsets-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_predict_offsets():
    """The oracle is the header of those two arrays."""
    measured = header_entries({"a": np.zeros((2, 3), "<f4"), "b": np.zeros((2, 2), "<f2")})["b"]["data_offsets"]
    assert list(predicted_offsets) == measured, (
        f"predicted {predicted_offsets}, measured {measured}: a takes 6 numbers of 4 bytes, b takes 4 of 2 bytes")


if __name__ == "__main__":
    test_unit_predict_offsets()

# %% [markdown]
"""
The header in bytes: JSON, padded with spaces to a multiple of 8, its length in front. Given, since nothing here
is a decision.
"""

# %%
#| export
def encode_header(arrays, metadata):
    """The length and the header as they stand in the file; `metadata` is a dict of strings, or None."""
    header = header_entries(arrays)
    if metadata:
        header = {"__metadata__": {str(key): str(value) for key, value in metadata.items()}, **header}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text

# %% [markdown]
"""
## 6. All or nothing

`open(path, "wb")` empties the old file before the first new byte is written. A process that is killed in
between leaves neither the old checkpoint nor the new one. See it happen: the "power" fails after the first chunk.
"""

# %%
def failing_chunks():
    """The first bytes of a new checkpoint, then a power failure."""
    yield b"new, first half"
    raise OSError("the power failed")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(b"the old checkpoint")
        try:
            with open(path, "wb") as file:
                file.writelines(failing_chunks())
        except OSError as error:
            print(f"{error}; what is left on disk: {path.read_bytes()!r}")

# %% [markdown]
"""
The remedy is old. Write everything to a second file beside the first; `os.fsync` it, so that the bytes are on
the disk and not in a buffer; then `os.replace`, which gives the new file the old one's name in one step that no kill can
cut in half. If writing fails, remove the second file and let the error go on.
"""

# %% nbgrader={"grade": false, "grade_id": "07-atomic", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def write_atomically(path, chunks):
    """Write the chunks (bytes) to `path` so that there is always a whole file: the old one or the new one."""
    temporary = f"{path}.tmp"
    try:
        ### BEGIN SOLUTION
        with open(temporary, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        ### END SOLUTION
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise

# %% nbgrader={"grade": true, "grade_id": "07-atomic-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_atomic():
    """The oracle is the old file, after a failure half-way; then the order of fsync and replace."""
    calls, real = [], (os.fsync, os.replace)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(b"the old checkpoint")
        try:
            write_atomically(str(path), failing_chunks())
        except OSError:
            pass
        else:
            raise AssertionError("the failure was swallowed: the caller must hear of it")
        left = path.read_bytes() if path.exists() else None
        assert left == b"the old checkpoint", f"after a failure half-way the file holds {left!r}: the old one is gone"
        assert os.listdir(folder) == [path.name], f"a half file was left behind: {os.listdir(folder)}"
        os.fsync = lambda *a: (calls.append("fsync"), real[0](*a))[1]
        os.replace = lambda *a: (calls.append("replace"), real[1](*a))[1]
        try:
            write_atomically(str(path), [b"new ", b"one"])
        finally:
            os.fsync, os.replace = real
        assert path.read_bytes() == b"new one", f"the file holds {path.read_bytes()!r}, expected b'new one'"
    assert "replace" in calls, f"calls {calls}: the new file takes the old one's place by os.replace"
    assert calls == ["fsync", "replace"], f"calls {calls}: the bytes must be on the disk (fsync) before the name moves"


if __name__ == "__main__":
    test_unit_atomic()

# %%
#| export
def save_checkpoint(path, tensors, metadata=None):
    """Write named arrays and a dict of strings to a safetensors file, whole or not at all; one writer per path."""
    arrays = as_stored(tensors)
    numbers = (array.reshape(-1).view(np.uint8) for array in arrays.values())
    write_atomically(os.fspath(path), [encode_header(arrays, metadata), *numbers])

# %% [markdown]
"""
## 7. Reading what may be damaged

A file may be cut off by a full disk, or be something else altogether. Its header says how long everything is,
so we can know *before* reading numbers: in the order of their offsets, the arrays must lie one behind the other
without a gap, each as long as its shape and dtype say, and end where the file ends.

    file with 30 bytes of numbers, header: a at 0 to 24, b at 24 to 32   ->   b is cut off

Entries come as `{name: (code, shape, begin, end)}`. A code that is not in `DTYPES` is a problem too.
"""

# %% nbgrader={"grade": false, "grade_id": "07-layout", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def layout_problem(entries, data_size):
    """Why these entries do not describe `data_size` bytes of numbers, as a sentence; None if they do."""
    in_order = sorted(entries.items(), key=lambda item: item[1][2:])
    position = 0
    ### BEGIN SOLUTION
    for name, (code, shape, begin, end) in in_order:
        if code not in DTYPES:
            return f"{name} holds {code} numbers, which NumPy does not have"
        if begin != position:
            return f"{name} begins at byte {begin}, the array before it ends at {position}"
        if end - begin != math.prod(shape) * np.dtype(DTYPES[code]).itemsize:
            return f"{name} has {end - begin} bytes, which is not shape {list(shape)} of {code}"
        position = end
    if position != data_size:
        return f"the arrays take {position} bytes, the file has {data_size}: it is cut off, or has a tail"
    return None
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "07-layout-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_layout():
    """The oracle is a good layout, and one fault at a time."""
    good = {"b": ("F16", (2, 2), 24, 32), "a": ("F32", (2, 3), 0, 24), "empty": ("F32", (0, 5), 24, 24)}
    assert layout_problem(good, 32) is None, f"a good layout was refused: {layout_problem(good, 32)}"
    faults = {
        "a file that is cut off": (good, 30),
        "a tail behind the last array": (good, 40),
        "a gap between two arrays": (good | {"b": ("F16", (2, 2), 26, 34)}, 34),
        "two arrays that overlap": (good | {"b": ("F16", (2, 2), 16, 24)}, 24),
        "an array longer than its shape": (good | {"b": ("F16", (2, 3), 24, 32)}, 32),
        "a dtype that NumPy lacks": (good | {"b": ("BF16", (2, 2), 24, 32)}, 32),
    }
    for fault, (entries, size) in faults.items():
        problem = layout_problem(entries, size)
        assert isinstance(problem, str) and problem, f"{fault} was not noticed"
    assert "b" in layout_problem(*faults["an array longer than its shape"]), "the message must name the array"


if __name__ == "__main__":
    test_unit_layout()

# %%
#| export
def entry_of(entry):
    """(code, shape, begin, end) of a header entry; a ValueError, KeyError or TypeError if it is none."""
    shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise ValueError("shapes and offsets are whole numbers, 0 or more")
    return str(entry["dtype"]), shape, begin, end


def read_header(file, path):
    """(entries, metadata, first byte of the numbers) of an open safetensors file, all of it checked."""
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 2 <= length <= size - 8:
        raise CheckpointError(f"{path} is no checkpoint, or it is cut off: {size} bytes in all")
    try:
        header = json.loads(file.read(length))
        metadata = {str(key): str(value) for key, value in header.pop("__metadata__", {}).items()}
        entries = {name: entry_of(entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is no checkpoint, or damaged: its header does not read ({error!r})") from None
    problem = layout_problem(entries, size - 8 - length)
    if problem:
        raise CheckpointError(f"{path} is damaged: {problem}")
    return entries, metadata, 8 + length


def load_checkpoint(path):
    """(tensors, metadata) of a safetensors file: arrays by name, and a dict of strings."""
    with open(path, "rb") as file:
        entries, metadata, start = read_header(file, path)
        tensors = {}
        for name, (code, shape, begin, _) in entries.items():
            file.seek(start + begin)
            tensors[name] = np.fromfile(file, DTYPES[code], math.prod(shape)).reshape(shape)
    return tensors, metadata

# %%
if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "two.safetensors"
        save_checkpoint(path, {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.array(7)}, {"made by": "us"})
        print(path.read_bytes()[:160])
        print(load_checkpoint(path))

# %% [markdown]
"""
## 8. Everything a run is

Save the weights, start again tomorrow: is it the same run? A run is more than its weights. Four more parts could
go into the file:

* `optimizer`: Adam's averages and step counts
* `step`: how far the schedule and the batches are
* `random`: the state of the generators that dropout draws from
* `losses`: the list of losses so far

**Predict.** Which of them, when forgotten, change the losses that come *after* the restart? True or False for
each.
"""

# %% nbgrader={"grade": false, "grade_id": "07-predict-parts", "locked": false, "schema_version": 3, "solution": true, "task": false}
# changes_losses = {"optimizer": ..., "step": ..., "random": ..., "losses": ...}  (True or False each)
### BEGIN SOLUTION
changes_losses = {"optimizer": True, "step": True, "random": True, "losses": False}
### END SOLUTION

# %%
#| export
def generators(model):
    """Every generator that a training step may draw from, by a name that is the same in the next process."""
    found = {"course": default_rng()}
    for index, module in enumerate(model.modules()):
        named = {f"{index}.{name}": value for name, value in vars(module).items()}
        found |= {name: value for name, value in named.items() if isinstance(value, np.random.Generator)}
    return found


def pack_run(trainer):
    """All that a run is, as (tensors, metadata) for save_checkpoint."""
    tensors = {f"model.{name}": array for name, array in trainer.model.state_dict().items()}
    optimizer = trainer.optimizer.state_dict()
    counts = {index: entry["step"] for index, entry in optimizer["state"].items()}
    for index, entry in optimizer.pop("state").items():
        tensors |= {f"optimizer.{index}.{name}": array for name, array in entry.items() if name != "step"}
    tensors["losses"] = np.array(trainer.losses, np.float64)
    tensors["evaluations"] = np.array(trainer.evaluations, np.float64).reshape(-1, 2)
    random = {name: rng.bit_generator.state for name, rng in generators(trainer.model).items()}
    facts = {"step": trainer.step, "optimizer": optimizer, "counts": counts, "random": random}
    return tensors, {"format": "tinytorch-run", **{name: json.dumps(value) for name, value in facts.items()}}


def unpack_run(tensors, metadata):
    """The inverse of pack_run: (model state, optimizer state, everything else)."""
    facts = {name: json.loads(metadata[name]) for name in ("step", "optimizer", "counts", "random")}
    model = {name[6:]: array for name, array in tensors.items() if name.startswith("model.")}
    state = {int(index): {"step": count} for index, count in facts["counts"].items()}
    for name, array in tensors.items():
        if name.startswith("optimizer."):
            _, index, buffer = name.split(".")
            state[int(index)][buffer] = array
    facts["losses"] = tensors["losses"].tolist()
    facts["evaluations"] = [(int(step), loss) for step, loss in tensors["evaluations"].tolist()]
    return model, {**facts["optimizer"], "state": state}, facts

# %% [markdown]
"""
## 9. One line that tells how long

A progress bar belongs on a terminal and nowhere else: in a log file it would be a thousand lines. `isatty()`
tells them apart; `\r` moves to the start of the line, so that the next line overwrites it.

How long is left? The steps **of this run** took `seconds`; a resumed run has not spent time on the steps before
`first`:

    first 90, step 92 of 100 after 4 seconds   ->   2 s per step, 8 steps left, 16 seconds
"""

# %% nbgrader={"grade": false, "grade_id": "07-time-left", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def seconds_left(first, step, total, seconds):
    """Seconds until `total`, when the steps from `first` to `step` took `seconds`; step > first.

    >>> seconds_left(90, 92, 100, 4.0)
    16.0
    """
    ### BEGIN SOLUTION
    return seconds / (step - first) * (total - step)
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "07-time-left-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_time_left():
    """The oracle is the example above."""
    got = seconds_left(90, 92, 100, 4.0)
    assert got is not None, "nothing was returned"
    assert not np.isclose(got, 4 / 92 * 8), f"got {got:.2f}: the steps before `first` took no time in this run"
    assert got == 16, f"got {got}, expected 16.0: 2 seconds for each of 8 steps"
    assert seconds_left(0, 5, 5, 3.0) == 0, "at the last step nothing is left"


if __name__ == "__main__":
    test_unit_time_left()

# %%
#| export
def progress_line(step, total, loss, rate, left, width=79):
    """A bar, steps, loss, rate ("120 steps/s") and time left, in exactly `width` characters."""
    left = f"{int(left) // 3600}:{int(left) // 60 % 60:02d}:{int(left) % 60:02d}"
    text = f" step {step}/{total}  loss {loss:.4f}  {rate}  {left} left"
    size = min(30, width - len(text) - 2)
    filled = size * step // max(total, 1)
    bar = "[" + "#" * filled + "." * (size - filled) + "]" if size >= 5 else ""
    return (bar + text)[:width].ljust(width)


class Progress:
    """A progress line on a terminal, ten times a second at most; silent where the stream is no terminal."""

    def __init__(self, first, total, stream=None):
        self.first, self.total, self.units = first, total, 0
        self.stream = sys.stderr if stream is None else stream
        self.visible = hasattr(self.stream, "isatty") and self.stream.isatty()
        self.started, self.shown = time.perf_counter(), 0.0

    def show(self, step, loss, inputs):
        """After a step: token ids are counted as tokens, all else as steps."""
        tokens = np.asarray(inputs).dtype.kind in "iu"
        self.units += np.size(inputs) if tokens else 1
        now = time.perf_counter()
        if self.visible and (now - self.shown >= 0.1 or step == self.total):
            seconds, self.shown = now - self.started, now
            rate = f"{self.units / max(seconds, 1e-9):,.0f} {'tokens' if tokens else 'steps'}/s"
            left = seconds_left(self.first, step, self.total, seconds)
            width = shutil.get_terminal_size().columns - 1
            self.write("\r" + progress_line(step, self.total, loss, rate, left, width))

    def write(self, text):
        self.stream.write(text)
        self.stream.flush()

    def close(self):
        """Leave the line, so that what is printed next has one of its own."""
        if self.visible and self.shown:
            self.write("\n")

# %%
if __name__ == "__main__":
    print(progress_line(92, 100, 1.2345, "120 steps/s", 16.0))
    print(progress_line(3, 1000, 7.5, "3,410 tokens/s", 4000.0, width=60))

# %% [markdown]
"""
## 10. Ctrl-C between two steps

Ctrl-C raises KeyboardInterrupt wherever the program happens to be, also in the middle of `optimizer.step()`,
with half of the weights moved. So during training we only take note, and stop when the step is complete. A
second Ctrl-C does not wait: then the trainer may be in the middle of something.
"""

# %%
#| export
@contextmanager
def interrupts_noted():
    """In the block, Ctrl-C sets the event that is handed out; a second one interrupts at once."""
    came = threading.Event()

    def note(number, frame):
        if came.is_set():
            raise KeyboardInterrupt
        came.set()

    if threading.current_thread() is not threading.main_thread():
        yield came  # signals reach the main thread only
        return
    previous = signal.signal(signal.SIGINT, note)
    try:
        yield came
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if previous is None else previous)

# %% [markdown]
"""
## 11. The Trainer

It only keeps state; you have written the work. **Build** the loop of `fit`. While `self.step` is below `num_steps` and
nobody pressed Ctrl-C: get the batch of this step, train on it, show it, do what is due after a step.

`get_batch(step)` must depend on the step alone; then a resumed run sees the batches that the first run would
have seen.
"""

# %% nbgrader={"grade": false, "grade_id": "07-fit", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
class Trainer:
    """Trains a model; its state can be saved after any step and taken up again, also in another process."""

    def __init__(self, model, optimizer, loss_function, schedule=None, max_grad_norm=None,
                 checkpoint=None, checkpoint_every=None):
        self.model, self.optimizer, self.loss_function = model, optimizer, loss_function
        self.schedule, self.max_grad_norm = schedule, max_grad_norm
        self.checkpoint, self.checkpoint_every = checkpoint, checkpoint_every
        self.step, self.losses, self.evaluations = 0, [], []

    def fit(self, get_batch, num_steps, evaluate_every=None, evaluation=None, progress=True):
        """Train until self.step is num_steps, so a resumed trainer does the rest; returns the list of losses.

        get_batch(step) -> (inputs, targets) arrays. `evaluation` is a list of such batches, evaluated every
        `evaluate_every` steps. After Ctrl-C: the checkpoint is written, then KeyboardInterrupt is raised.
        """
        bar = Progress(self.step, num_steps, None if progress else io.StringIO())
        self.model.train()
        with interrupts_noted() as interrupted:
            try:
                ### BEGIN SOLUTION
                while self.step < num_steps and not interrupted.is_set():
                    inputs, targets = get_batch(self.step)
                    loss = self.train_step(inputs, targets)
                    bar.show(self.step, loss, inputs)
                    self.after_step(evaluate_every, evaluation)
                ### END SOLUTION
            finally:
                bar.close()
            if self.checkpoint:
                self.save(self.checkpoint)
        if interrupted.is_set():
            raise KeyboardInterrupt(f"stopped after step {self.step}; fit() goes on from there")
        return self.losses

    def train_step(self, inputs, targets):
        """One step at the scheduled learning rate; the loss is kept."""
        if self.schedule is not None:
            self.optimizer.lr = self.schedule(self.step)
        loss = train_step(self.model, self.optimizer, self.loss_function, inputs, targets, self.max_grad_norm)
        self.losses.append(loss)
        self.step += 1
        return loss

    def after_step(self, evaluate_every, evaluation):
        """Evaluate and save where it is due."""
        if evaluate_every and evaluation is not None and self.step % evaluate_every == 0:
            self.evaluations.append((self.step, self.evaluate(evaluation)))
        if self.checkpoint and self.checkpoint_every and self.step % self.checkpoint_every == 0:
            self.save(self.checkpoint)

    def evaluate(self, batches):
        """The mean loss over batches (inputs, targets); the model's mode is as before."""
        return mean_loss(self.model, self.loss_function, batches)

    def save(self, path):
        """Write the whole run to a safetensors file, atomically."""
        save_checkpoint(path, *pack_run(self))

    def resume(self, path):
        """Take up the run in the file; one that does not fit is a CheckpointError and changes nothing."""
        tensors, metadata = load_checkpoint(path)
        if metadata.get("format") != "tinytorch-run":
            raise CheckpointError(f"{path} holds arrays, but not a training run: Trainer.save writes one")
        try:
            model, optimizer, facts = unpack_run(tensors, metadata)
            self.optimizer.check_state_dict(optimizer)
            random = matching_states(facts["random"], generators(self.model))
            self.model.load_state_dict(model)  # checks all names and shapes before it writes
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise CheckpointError(f"{path} does not fit this trainer: {error}") from error
        self.optimizer.load_state_dict(optimizer)
        for rng, state in random:
            rng.bit_generator.state = state
        self.step, self.losses, self.evaluations = facts["step"], facts["losses"], facts["evaluations"]


def matching_states(saved, live):
    """(generator, saved state) pairs; a generator of another kind than the saved one is a ValueError."""
    for name, rng in live.items():
        kind = type(rng.bit_generator).__name__
        if name in saved and saved[name]["bit_generator"] != kind:
            raise ValueError(f"the generator {name} was {saved[name]['bit_generator']}, and is {kind} now")
    return [(rng, saved[name]) for name, rng in live.items() if name in saved]

# %%
def spiral_batch(step, size=32):
    """The batch of a step: points on two spirals, and which spiral each is on."""
    rng = np.random.default_rng([7, step])
    label, angle = rng.integers(0, 2, size), rng.uniform(0.5, 7, size)
    arm = np.stack([angle * np.cos(angle), angle * np.sin(angle)], axis=1) / 7
    noise = 0.02 * rng.standard_normal((size, 2))
    return (np.where(label[:, None] == 1, -arm, arm) + noise).astype(np.float32), label


def spiral_trainer(seed=0, total=40, **options):
    """A small network with dropout, on AdamW and a schedule; two generators are at work in it."""
    rng = np.random.default_rng(seed)
    model = Sequential(Linear(2, 32, rng=rng), ReLU(), Dropout(0.1), Linear(32, 32, rng=rng), ReLU(),
                       Dropout(0.1, rng=np.random.default_rng(seed + 1)), Linear(32, 2, rng=rng))
    schedule = CosineSchedule(0.02, total, warmup_steps=5)
    return Trainer(model, AdamW(model.parameters(), lr=0.02), cross_entropy, schedule, max_grad_norm=1.0, **options)

# %% nbgrader={"grade": true, "grade_id": "07-fit-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_fit():
    """The oracle is the list of steps whose batches were asked for."""
    asked = []

    def get_batch(step):
        asked.append(step)
        return spiral_batch(step)

    trainer = spiral_trainer()
    losses = trainer.fit(get_batch, 4, evaluate_every=2, evaluation=[spiral_batch(99)], progress=False)
    assert asked, "no batch was asked for"
    assert asked[0] == 0, f"the first batch asked for is {asked[0]}: ask before the step is counted"
    assert asked == [0, 1, 2, 3] and trainer.step == 4, f"asked for {asked}, step {trainer.step}, expected 0 to 3 and 4"
    assert losses is trainer.losses and len(losses) == 4, f"4 losses belong into trainer.losses, got {trainer.losses}"
    trainer.fit(get_batch, 6, progress=False)
    assert asked[4:] == [4, 5], f"fit up to 6 asked for {asked[4:]}: it must go on from step 4, not begin again"
    assert [step for step, _ in trainer.evaluations] == [2, 4], (
        f"evaluated after {[step for step, _ in trainer.evaluations]}, expected after 2 and 4: after_step does it")
    trainer.fit(get_batch, 6, progress=False)
    assert len(asked) == 6, "a run that is complete must not train on"


if __name__ == "__main__":
    test_unit_fit()

# %% [markdown]
"""
Now the prediction of section 8, by experiment: resume with one part forgotten, and compare the losses.
"""

# %% nbgrader={"grade": true, "grade_id": "07-predict-parts-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def losses_after_restart(forgotten=None, stop=8, total=16):
    """Losses after step `stop` of a run that was stopped there and taken up with one part forgotten."""
    manual_seed(5)
    first, second = spiral_trainer(), spiral_trainer(seed=3)
    first.fit(spiral_batch, stop, progress=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.safetensors"
        first.save(path)
        manual_seed(6)
        fresh = {name: rng.bit_generator.state for name, rng in generators(second.model).items()}
        second.resume(path)
    if forgotten == "optimizer":
        second.optimizer = AdamW(second.model.parameters(), lr=0.02)
    elif forgotten == "random":
        for name, rng in generators(second.model).items():
            rng.bit_generator.state = fresh[name]
    elif forgotten == "losses":
        second.losses = []
    shift = stop if forgotten == "step" else 0
    second.step -= shift
    return second.fit(spiral_batch, total - shift, progress=False)[-(total - stop) :]


def test_unit_predict_parts():
    """The oracle is the run that was never stopped."""
    manual_seed(5)
    whole = spiral_trainer().fit(spiral_batch, 16, progress=False)[8:]
    assert losses_after_restart() == whole, "with nothing forgotten, the losses after a restart must be the same"
    measured = {part: losses_after_restart(part) != whole for part in ("optimizer", "step", "random", "losses")}
    assert changes_losses.keys() == measured.keys(), f"the parts are {list(measured)}, got {list(changes_losses)}"
    wrong = [part for part in measured if changes_losses[part] != measured[part]]
    assert not wrong, f"forgetting {wrong[0]} changes the later losses: {measured[wrong[0]]}; predicted the opposite"


if __name__ == "__main__":
    test_unit_predict_parts()

# %% nbgrader={"grade": false, "grade_id": "07-measure-run", "locked": true, "schema_version": 3, "solution": false, "task": false}
if __name__ == "__main__":
    manual_seed(0)
    trainer = spiral_trainer(total=400)
    start = time.perf_counter()
    trainer.fit(spiral_batch, 400, evaluate_every=100, evaluation=[spiral_batch(10_000, 500)])
    seconds = time.perf_counter() - start
    for step, loss in trainer.evaluations:
        print(f"step {step:3}  training loss {np.mean(trainer.losses[step - 20 : step]):.3f}  held-out loss {loss:.3f}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.safetensors"
        trainer.save(path)
        weights = sum(p.data.nbytes for p in trainer.model.parameters())
        print(f"{400 / seconds:.0f} steps/s; the file has {path.stat().st_size:,} bytes, the weights {weights:,}")

# %% [markdown]
"""
**Look back.** Where do the bytes beyond the weights go? (`load_checkpoint` tells.) Which share would they have in
a model a thousand times as large? If the power fails during `fit`, what does `checkpoint_every` decide?

## 12. Memory that goes and comes back

Each step makes large arrays and drops them again. The C library of most Linux systems, glibc, often hands such
memory back to the kernel at once. The next step asks for it anew, and the kernel gives it page by page, each 4 KiB
filled with zeros first, which can take as long as the arithmetic.

glibc has a switch, `mallopt`: keep what was freed, for the next request. It holds for the whole process, so no
import of ours throws it. Whoever trains may, with one call before the first step; the process then stays as
large as it has once been. The call is given.
"""

# %%
#| export
def keep_memory():
    """Let the C library keep freed memory until the process ends; False where it has no such switch (glibc has).

    Source: mallopt(3), M_MMAP_THRESHOLD and M_TRIM_THRESHOLD.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS, musl; Windows
        return False
    own_mapping, trim = -3, -1  # from this size on an array gets a mapping of its own; so much may lie idle
    # 1 GiB, or where glibc refuses it the most that mallopt(3) allows
    return bool((mallopt(own_mapping, 1 << 30) or mallopt(own_mapping, 1 << 25)) and mallopt(trim, 2**31 - 1))

# %% nbgrader={"grade": false, "grade_id": "07-measure-memory", "locked": true, "schema_version": 3, "solution": false, "task": false}
def median_step(trainer, steps=25):
    """Median milliseconds of a training step on 4000 points."""
    times = []
    for step in range(steps):
        batch, start = spiral_batch(step, 4000), time.perf_counter()
        trainer.train_step(*batch)
        times.append(time.perf_counter() - start)
    return 1e3 * sorted(times)[steps // 2]


if __name__ == "__main__":
    trainer = spiral_trainer(total=100)
    print(f"memory goes and comes back: {median_step(trainer):.2f} ms per step")
    print(f"the switch is thrown: {keep_memory()}")
    print(f"memory is kept:             {median_step(trainer):.2f} ms per step")

# %% nbgrader={"grade": true, "grade_id": "07-module-test", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
def test_module():
    """Every check of the lesson, then a run that is damaged, refused, and taken up again."""
    for check in (test_unit_train_step, test_unit_cosine, test_unit_predict_rate, test_unit_clip,
                  test_unit_predict_clip, test_unit_mode, test_unit_mean_loss, test_unit_predict_mean,
                  test_unit_header, test_unit_predict_offsets, test_unit_atomic, test_unit_layout,
                  test_unit_time_left, test_unit_fit, test_unit_predict_parts):
        check()
    with tempfile.TemporaryDirectory() as folder:
        path, damaged = Path(folder) / "run.safetensors", Path(folder) / "damaged.safetensors"
        trainer = spiral_trainer(total=60, checkpoint=path, checkpoint_every=20)
        trainer.fit(spiral_batch, 60, progress=False)
        assert np.mean(trainer.losses[-10:]) < np.mean(trainer.losses[:10]), f"the loss did not fall: {trainer.losses}"
        tensors, metadata = load_checkpoint(path)
        assert metadata["step"] == "60", f"the checkpoint is of step {metadata['step']}, expected 60"
        assert tensors["losses"].tolist() == trainer.losses, "the losses in the file differ from the trainer's"
        damaged.write_bytes(path.read_bytes()[:-1])
        other = spiral_trainer(seed=4)
        before = other.model.state_dict()
        try:
            other.resume(damaged)
        except CheckpointError as error:
            assert "cut off" in str(error), f"the message does not say what is wrong: {error}"
        else:
            raise AssertionError("a file that lacks its last byte was taken for a whole one")
        after = other.model.state_dict()
        assert all(np.array_equal(before[name], after[name]) for name in before), "a refused file changed the weights"
        other.resume(path)
        assert other.step == 60 and other.losses == trainer.losses, "the resumed trainer stands elsewhere"
        held_out = [spiral_batch(500)]
        assert other.evaluate(held_out) == trainer.evaluate(held_out), "the resumed model computes something else"


if __name__ == "__main__":
    test_module()
    print("Lesson 07 holds.")

# %% [markdown]
"""
## Summary

* A step is forward, forget, backward, clip, move; in that order.
* Clipping scales all gradients by one number; evaluation leaves the model in the mode it had.
* safetensors: a length, a JSON header, raw bytes. Check the layout before reading a number.
* Write beside, fsync, replace: there is always a whole file.
* A run is weights, optimizer, step, random generators and losses. With all of them, a restart is invisible.
* `keep_memory()` before training saves the way to the kernel and back, where the C library has the switch.

**Exercises.** (1) Keep the checkpoint with the lowest held-out loss in a file of its own. (2) Add gradient
accumulation: one step for every four batches. (3) Kill a training process with `kill -9` while it saves, and
look at the folder. (4) Make `fit` stop when the held-out loss has not fallen for a while.

**Design note.** Our file has no checksum: a flipped bit among the numbers goes unnoticed, as in safetensors
itself (its README lists what the format checks: header size, offsets, no overlaps, no holes). A checksum would
cost a pass over all bytes and make reading one tensor out of many impossible without reading all. File systems
such as ZFS and Btrfs keep checksums below us; the format leaves it to them.

**Next.** `spiral_batch` makes its data up. Real data lies in files, in an order that should change with every pass.
"""

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
#     lesson: "06"
# ---

# %% [markdown]
"""
# Lesson 06: Optimizers

**You build** the three ways to move a parameter that nearly every model is trained with: SGD with momentum,
Adam and AdamW. Each equals PyTorch's, step for step.

**You need** parameters (lesson 03) and their gradients (lesson 05).

**It becomes** `tinytorch/core/optimizers.py`. About 60 minutes.

Stuck? `tito module hint 06`.
"""

# %%
#| default_exp core.optimizers
#| export
import math

import numpy as np

from tinytorch.core.tensor import Tensor

# %%
import time

import tinytorch.core.autograd  # plugs the engine in
from tinytorch.core.activations import ReLU
from tinytorch.core.layers import Linear, Parameter, Sequential
from tinytorch.core.losses import cross_entropy

# %% [markdown]
"""
## 1. A gradient is not yet a step

`backward()` leaves a gradient in each parameter and changes nothing else. Here is a parameter, its loss, and a
first try at moving downhill. Run it.
"""

# %%
def descend_copy(weight, direction, lr):
    """Computes the right numbers, and the caller never sees them."""
    weight = weight - lr * direction


if __name__ == "__main__":
    w = Parameter([1.0, -2.0])
    loss = (w * w).sum() * 0.25
    loss.backward()
    print("gradient", w.grad.data)
    descend_copy(w.data, w.grad.data, lr=0.1)
    print("weight  ", w.data, "- it did not move")

# %% [markdown]
"""
`weight = …` gives the name `weight` a new array; the parameter still holds the old one. A model's layers, and
later its optimizer and its checkpoints, all hold that same array. So we write **into** it:

    weight    [ 1.0, -2.0]
    direction [ 0.5, -1.0]      lr 0.1
    weight    [ 0.95, -1.9]     the same array

In place, float32 also stays float32, and no second copy of the model is made.

**Build** `descend`.
"""

# %% nbgrader={"grade": false, "grade_id": "06-descend", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def descend(weight, direction, lr):
    """Move `weight` by -lr * direction, in place; both have any one shape.

    >>> weight = np.array([1.0, -2.0]); descend(weight, np.array([0.5, -1.0]), 0.1); weight
    array([ 0.95, -1.9 ])
    """
    ### BEGIN SOLUTION
    weight -= lr * direction
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "06-descend-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_descend():
    """The oracle is the example above, worked by hand."""
    weight, direction = np.array([1.0, -2.0], np.float32), np.array([0.5, -1.0], np.float32)
    descend(weight, direction, 0.1)
    assert not np.array_equal(weight, [1, -2]), (
        "the caller's array did not change: write into it, do not rebind the name")
    assert not np.allclose(weight, [1.05, -2.1]), f"got {weight}: that is uphill, the gradient points upwards"
    assert np.allclose(weight, [0.95, -1.9]), f"got {weight}, expected [0.95, -1.9]: weight - lr * direction"
    assert np.array_equal(direction, np.float32([0.5, -1.0])), f"the direction was changed to {direction}"
    ### BEGIN HIDDEN TESTS
    weight = np.ones((2, 3), np.float32)
    descend(weight[:, 1], np.array([1, 2], np.float32), 2.0)
    assert np.array_equal(weight, [[1, -1, 1], [1, -3, 1]]), f"a view must write through: got\n{weight}"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_descend()

# %% [markdown]
"""
## 2. How large a step?

Take a valley that is flat along x and steep across it, along y:

    loss = (x*x + 50 * y*y) / 2        gradient = [x, 50 * y]

One step turns y into `y - lr * 50 * y = (1 - 50 * lr) * y`. Where that factor has size below 1, y shrinks.
Where it is below -1, y jumps from wall to wall, further each time.

**Predict.** From which learning rate on does y no longer shrink? Solve `1 - 50 * lr = -1`.
"""

# %% nbgrader={"grade": false, "grade_id": "06-predict-lr", "locked": false, "schema_version": 3, "solution": true, "task": false}
# predicted_lr = ...  (a number)
### BEGIN SOLUTION
predicted_lr = 2 / 50
### END SOLUTION

# %%
CURVATURE = np.array([1.0, 50.0], np.float32)


def roll(move, steps, start=(10.0, 1.0)):
    """Apply `move(weight, grad)` `steps` times in the valley; returns the losses, the first before any step."""
    weight, losses = np.array(start, np.float32), []
    for _ in range(steps):
        losses.append(float(0.5 * (CURVATURE * weight * weight).sum()))
        move(weight, CURVATURE * weight)
    return losses + [float(0.5 * (CURVATURE * weight * weight).sum())]

# %% nbgrader={"grade": true, "grade_id": "06-predict-lr-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_predict_lr():
    """The oracle is the valley itself, 2 % below the predicted rate and 2 % above it."""
    below = roll(lambda w, g: descend(w, g, 0.98 * predicted_lr), 100, start=(0, 1))
    above = roll(lambda w, g: descend(w, g, 1.02 * predicted_lr), 100, start=(0, 1))
    assert below[-1] < below[0], f"at 0.98 * {predicted_lr} the loss grows already: the limit is lower"
    assert above[-1] > above[0], f"at 1.02 * {predicted_lr} the loss still falls: the limit is higher"


if __name__ == "__main__":
    test_unit_predict_lr()

# %% nbgrader={"grade": false, "grade_id": "06-measure-valley", "locked": true, "schema_version": 3, "solution": false, "task": false}
if __name__ == "__main__":
    print("    lr   loss after 100 steps   of it along the flat x")
    for lr in (0.01, 0.03, 0.039, 0.041):
        weight = np.array([10.0, 1.0], np.float32)
        for _ in range(100):
            descend(weight, CURVATURE * weight, lr)
        along = 0.5 * CURVATURE * weight**2
        print(f"{lr:6.3f}   {along.sum():20.6f}   {along[0] / along.sum():10.1%}")

# %% [markdown]
"""
The steep direction sets the limit, and the flat one pays: x crawls at a speed that y allows. Can the step
remember where it has been going?

## 3. Momentum

Keep a buffer, the sum of past gradients, in which older ones count less and less:

    buffer = momentum * buffer + grad          direction = buffer

Along x the gradients agree and add up. Across the valley they alternate and cancel.

**Predict.** The gradient is 1 in every step, momentum is 0.9, and the buffer starts at 0. What is the buffer
after steps 1, 2 and 3, and which value does it approach? (The value that no longer changes:
`b = 0.9 * b + 1`.) Then **build** `momentum_direction`; two checks follow, of the function and of the prediction.
"""

# %% nbgrader={"grade": false, "grade_id": "06-predict-momentum", "locked": false, "schema_version": 3, "solution": true, "task": false}
# predicted_buffer = ...  (a list of 3 numbers)
# predicted_limit = ...  (a number)
### BEGIN SOLUTION
predicted_buffer = [1.0, 1.9, 2.71]
predicted_limit = 10.0
### END SOLUTION

# %% nbgrader={"grade": false, "grade_id": "06-momentum", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def momentum_direction(grad, buffer, momentum):
    """Update `buffer` in place to momentum * buffer + grad and return it, the direction of the step.

    Source: Polyak 1964; PyTorch's form, where the gradient enters whole.
    """
    ### BEGIN SOLUTION
    buffer *= momentum
    buffer += grad
    return buffer
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "06-momentum-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_momentum():
    """The oracle is the sum of discounted gradients, written out."""
    buffer, grads = np.zeros(2, np.float32), np.array([[1, 4], [2, -3], [3, 2]], np.float32)
    for grad in grads:
        direction = momentum_direction(grad, buffer, 0.5)
        assert direction is not None and direction.shape == (2,), f"the direction must have shape (2,), got {direction}"
    expected = grads[2] + 0.5 * grads[1] + 0.25 * grads[0]
    assert np.any(buffer), "the buffer is still zero: it must be updated in place, or the next step forgets"
    assert not np.allclose(direction, 0.5 * grads[2] + 0.25 * grads[1] + 0.125 * grads[0]), (
        f"got {direction}: the new gradient was scaled down; PyTorch lets it enter whole")
    assert np.allclose(direction, expected), f"got {direction}, expected g3 + g2/2 + g1/4 = {expected}"
    assert np.allclose(buffer, expected), f"the buffer holds {buffer}, expected {expected}"
    assert np.array_equal(grads[2], np.float32([3, 2])), "the gradient itself was changed"


if __name__ == "__main__":
    test_unit_momentum()

# %% nbgrader={"grade": true, "grade_id": "06-predict-momentum-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_predict_momentum():
    """The oracle is the function you have just written, run for 3 and for 300 steps."""
    buffer, seen = np.zeros(1), []
    for _ in range(300):
        seen.append(float(momentum_direction(np.ones(1), buffer, 0.9)[0]))
    assert len(predicted_buffer) == 3, f"three values are asked for, got {predicted_buffer}"
    assert np.allclose(predicted_buffer, seen[:3], atol=0.005), f"predicted {predicted_buffer}, measured {seen[:3]}"
    assert np.isclose(predicted_limit, seen[-1], atol=0.01), (
        f"predicted limit {predicted_limit}, measured {seen[-1]:.3f}: momentum 0.9 makes steps 1 / (1 - 0.9) as long")


if __name__ == "__main__":
    test_unit_predict_momentum()

# %% [markdown]
"""
Nesterov's variant looks one step ahead: the buffer will be multiplied by `momentum` and applied once more
anyway, so it takes that into the direction now:

    direction = grad + momentum * buffer       (the buffer already updated)

**Build** `nesterov_direction` on `momentum_direction`.
"""

# %% nbgrader={"grade": false, "grade_id": "06-nesterov", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def nesterov_direction(grad, buffer, momentum):
    """Update `buffer` as momentum does, and return grad + momentum * buffer. Source: Sutskever et al. 2013.

    >>> nesterov_direction(np.array([1.0]), np.array([0.0]), 0.9)
    array([1.9])
    """
    ### BEGIN SOLUTION
    return grad + momentum * momentum_direction(grad, buffer, momentum)
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "06-nesterov-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_nesterov():
    """The oracle is the constant gradient 1: buffers 1, 1.9, 2.71, so directions 1.9, 2.71, 3.439."""
    buffer, seen = np.zeros(1), []
    for _ in range(3):
        direction = nesterov_direction(np.ones(1), buffer, 0.9)
        assert direction is not None and direction.shape == (1,), f"the direction must have shape (1,), got {direction}"
        seen.append(float(direction[0]))
    assert not np.allclose(seen, [1, 1.9, 2.71]), (
        f"got {seen}: that is plain momentum; look ahead along the buffer after it was updated")
    assert np.allclose(seen, [1.9, 2.71, 3.439]), f"got {seen}, expected [1.9, 2.71, 3.439]"
    assert np.allclose(buffer, 2.71), f"the buffer holds {buffer}, expected 2.71: look ahead must not change it"


if __name__ == "__main__":
    test_unit_nesterov()

# %% nbgrader={"grade": false, "grade_id": "06-measure-momentum", "locked": true, "schema_version": 3, "solution": false, "task": false}
def steps_until(move, loss=1e-3, most=2000):
    """How many steps until the loss in the valley is below `loss`."""
    losses = np.array(roll(move, most))
    return int(np.argmax(losses < loss)) if (losses < loss).any() else None


if __name__ == "__main__":
    plain = steps_until(lambda w, g: descend(w, g, 0.038))
    buffer = np.zeros(2, np.float32)
    heavy = steps_until(lambda w, g: descend(w, momentum_direction(g, buffer, 0.8), 0.038))
    buffer = np.zeros(2, np.float32)
    ahead = steps_until(lambda w, g: descend(w, nesterov_direction(g, buffer, 0.8), 0.018))
    print(f"steps to a loss of 0.001: plain {plain}, momentum {heavy}, Nesterov {ahead}")

# %% [markdown]
"""
**Look back.** What happens with momentum 0.99? With 1.0? Nesterov ran at 0.018: what happens at 0.038? Try all
three in the cell above.

## 4. Weight decay

Large weights fit noise. Adding `weight_decay / 2 * (weight * weight).sum()` to the loss pulls each weight
towards zero; its gradient is simply `weight_decay * weight`, so nobody has to compute that sum:

    grad [0.5, 0.5]   weight [2, -4]   weight_decay 0.1   ->   [0.7, 0.1]

One trap: `grad` is the parameter's own `.grad`. It must not change, or a second look at it sees something else.

**Build** `with_weight_decay`.
"""

# %% nbgrader={"grade": false, "grade_id": "06-weight-decay", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def with_weight_decay(grad, weight, weight_decay):
    """The gradient of the loss plus weight_decay / 2 * |weight|^2; `grad` itself is left alone.

    >>> with_weight_decay(np.array([0.5, 0.5]), np.array([2.0, -4.0]), 0.1)
    array([0.7, 0.1])
    """
    ### BEGIN SOLUTION
    return grad + weight_decay * weight if weight_decay else grad
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "06-weight-decay-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_weight_decay():
    """The oracle is the example above."""
    grad, weight = np.array([0.5, 0.5], np.float32), np.array([2, -4], np.float32)
    got = with_weight_decay(grad, weight, 0.1)
    assert np.shape(got) == (2,), f"expected shape (2,), got {np.shape(got)}"
    assert np.array_equal(grad, np.float32([0.5, 0.5])), f"the parameter's own gradient was changed to {grad}"
    assert not np.allclose(got, [0.3, 0.9]), f"got {got}: minus pushes weights away from zero once the step is taken"
    assert np.allclose(got, [0.7, 0.1]), f"got {got}, expected grad + 0.1 * weight = [0.7, 0.1]"
    assert got.dtype == np.float32, f"float32 became {got.dtype}"
    assert np.array_equal(with_weight_decay(grad, weight, 0), grad), "weight_decay 0 must leave the gradient as it is"


if __name__ == "__main__":
    test_unit_weight_decay()

# %% [markdown]
"""
## 5. Piece by piece

`lr * direction` makes a temporary array as large as the weight. For a weight of 4 million numbers that is
16 MiB, written to memory and read back, several times per step. Cut into pieces that fit the processor's
cache, the temporaries never leave it. Measure before building:
"""

# %% nbgrader={"grade": false, "grade_id": "06-measure-pieces", "locked": true, "schema_version": 3, "solution": false, "task": false}
def one_step(weight, grad, buffer):
    """Decay, momentum and descent, with all their temporaries."""
    descend(weight, nesterov_direction(with_weight_decay(grad, weight, 0.01), buffer, 0.9), 0.1)


def median_ms(work, repeats=9):
    """Median milliseconds of a call."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return 1e3 * sorted(seconds)[repeats // 2]


if __name__ == "__main__":
    arrays = np.ones((3, 1 << 22), np.float32)
    for size in (1 << 22, 1 << 18, 1 << 16, 1 << 12):
        cuts = [arrays[:, start : start + size] for start in range(0, 1 << 22, size)]
        milliseconds = median_ms(lambda cuts=cuts: [one_step(*piece) for piece in cuts])
        print(f"pieces of {size:>9,} numbers: {milliseconds:7.1f} ms")

# %% [markdown]
"""
Now the pieces for any set of arrays of one shape. A C-contiguous array seen through `reshape(-1)` is a **view**:
one long row over the same memory, so writing to a slice of it writes to the array.

    weight (2, 3), grad (2, 3), size 4   ->   (weight[0:4], grad[0:4]), (weight[4:6], grad[4:6])   of the flat rows

Small arrays are one piece. So are arrays that are not contiguous, whose `reshape(-1)` would be a copy; both are
given. **Build** the rest of `blocks`.
"""

# %% nbgrader={"grade": false, "grade_id": "06-blocks", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
BLOCK = 1 << 17  # numbers per piece: 512 KiB of float32


def blocks(*arrays, size=BLOCK):
    """Yield tuples of matching pieces of arrays of one shape, at most `size` numbers each: views to write to."""
    if arrays[0].size <= size or not all(array.flags.c_contiguous for array in arrays):
        yield arrays
        return
    ### BEGIN SOLUTION
    flat = [array.reshape(-1) for array in arrays]
    for start in range(0, arrays[0].size, size):
        yield tuple(array[start : start + size] for array in flat)
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "06-blocks-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_blocks():
    """The oracle is the whole array: every number met once, in order, and writable."""
    a, b = np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(6, 12, dtype=np.float32).reshape(2, 3)
    pieces = list(blocks(a, b, size=4))
    assert pieces, "no piece came: each slice must be yielded"
    assert [len(piece) for piece in pieces] == [2] * len(pieces), "each piece must hold one part of every array"
    assert [piece[0].shape for piece in pieces] == [(4,), (2,)], (
        f"pieces have shapes {[piece[0].shape for piece in pieces]}, expected [(4,), (2,)]: the last one is shorter")
    assert np.array_equal(pieces[1][1], [10, 11]), f"the last piece of b is {pieces[1][1]}, expected [10, 11]"
    pieces[1][0][...] = -1
    assert np.array_equal(a, [[0, 1, 2], [3, -1, -1]]), "writing to a piece must reach the array: a view, not a copy"
    turned = np.zeros((3, 2), np.float32).T
    assert next(iter(blocks(turned, size=4)))[0] is turned, "an array that is not contiguous must come whole"


if __name__ == "__main__":
    test_unit_blocks()

# %% [markdown]
"""
## 6. One class for the bookkeeping

Momentum needs a buffer per parameter; Adam will need two. All else is the same for every kind of optimizer:
which parameters, who has a gradient, how many steps each has made. That is `Optimizer`. A kind only says which
buffers it keeps and how one piece moves:

    class SGD(Optimizer):
        buffers = ("momentum_buffer",)
        def update(self, step, weight, grad, momentum_buffer): ...

First a guard, given. An optimizer that holds the wrong objects moves them dutifully, and the model never learns.
"""

# %%
#| export
def parameter_list(params):
    """The parameters as a list; an error in words for what cannot be moved or would be moved in vain."""
    if isinstance(params, Tensor) or hasattr(params, "parameters"):
        raise TypeError("the optimizer needs a list of parameters: model.parameters(), or [weight] for a single one")
    params = list(params)
    if not params:
        raise ValueError("the optimizer got no parameters: pass model.parameters()")
    for p in params:
        if not isinstance(p, Tensor):
            raise TypeError(f"an optimizer moves Tensors, got a {type(p).__name__}: pass model.parameters()")
        if p._node is not None:
            raise ValueError("a parameter was computed from other Tensors: pass the weights that it was made from")
    if len({id(p) for p in params}) < len(params):
        raise ValueError("a parameter was passed twice: it would be moved twice in each step")
    return params

# %% [markdown]
"""
**Build** `step`. For each parameter: no gradient (a frozen layer, a branch not taken) means no move and no
count. Otherwise count one up in its state, and call `update` for every piece. A gradient may come transposed
from the engine; `np.asarray(grad, order="C")` makes it contiguous where it is not.
"""

# %% nbgrader={"grade": false, "grade_id": "06-step", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
class Optimizer:
    """Moves parameters by their gradients; keeps, for each parameter, a step count and the buffers of its kind."""

    settings = ("lr",)
    buffers = ()

    def __init__(self, params, lr):
        self.params, self.lr, self.state = parameter_list(params), lr, {}
        if not lr >= 0:
            raise ValueError(f"lr must be 0 or more, got {lr}")

    def zero_grad(self):
        """Forget all gradients; `backward` adds to what is there."""
        for parameter in self.params:
            parameter.grad = None

    def state_of(self, index, weight):
        """The state of parameter `index`: "step" from 0, and buffers from zeros, each made when it is first needed."""
        state = self.state.setdefault(index, {"step": 0})
        for name in self.buffers:
            if name not in state:
                state[name] = np.zeros(weight.shape, weight.dtype)
        return state

    def update(self, step, weight, grad, *buffers):
        """Move one piece of a weight, in place; `step` counts from 1."""
        raise NotImplementedError(f"{type(self).__name__} does not say how a weight moves")

    def step(self):
        """Move every parameter that has a gradient."""
        ### BEGIN SOLUTION
        for index, parameter in enumerate(self.params):
            if parameter.grad is None:
                continue
            weight, grad = parameter.data, np.asarray(parameter.grad.data, order="C")
            state = self.state_of(index, weight)
            state["step"] += 1
            for piece in blocks(weight, grad, *(state[name] for name in self.buffers)):
                self.update(state["step"], *piece)
        ### END SOLUTION

    def state_dict(self):
        """A copy of the settings and of the state, enough to go on in another process."""
        settings = {name: getattr(self, name) for name in self.settings}
        return {"optimizer": type(self).__name__, "settings": settings, "state": copy_state(self.state)}

    def check_state_dict(self, saved):
        """Raise a ValueError that says why `saved` does not fit this optimizer's parameters, if it does not."""
        kind, missing = type(self).__name__, {"optimizer", "settings", "state"} - set(saved)
        if missing:
            raise ValueError(f"this is no state of an optimizer: it lacks {', '.join(sorted(missing))}")
        if saved["optimizer"] != kind:
            raise ValueError(f"the state was saved by {saved['optimizer']}, this optimizer is {kind}")
        problems = state_problems(saved["state"], [p.shape for p in self.params])
        if problems:
            raise ValueError("the state belongs to other parameters: " + "; ".join(problems))

    def load_state_dict(self, saved):
        """Go on from what state_dict() gave; one that does not fit is an error and changes nothing."""
        self.check_state_dict(saved)
        for name, value in saved["settings"].items():
            setattr(self, name, value)
        self.state = copy_state(saved["state"])

# %% [markdown]
"""
The class is long because it is all the bookkeeping there is; the kinds below are short. `SGD` is the worked
example: three functions of yours in a row.
"""

# %%
#| export
class SGD(Optimizer):
    """Gradient descent with momentum, Nesterov's variant and weight decay, as torch.optim.SGD."""

    settings = ("lr", "momentum", "weight_decay", "nesterov")

    def __init__(self, params, lr=1e-3, momentum=0, weight_decay=0, nesterov=False):
        super().__init__(params, lr)
        if momentum < 0 or weight_decay < 0:
            raise ValueError(f"momentum ({momentum}) and weight_decay ({weight_decay}) must be 0 or more")
        if nesterov and not momentum:
            raise ValueError("nesterov looks ahead along the momentum: it needs momentum > 0")
        self.momentum, self.weight_decay, self.nesterov = momentum, weight_decay, nesterov

    @property
    def buffers(self):
        return ("momentum_buffer",) if self.momentum else ()

    def update(self, step, weight, grad, *buffers):
        direction = with_weight_decay(grad, weight, self.weight_decay)
        if self.momentum:
            find = nesterov_direction if self.nesterov else momentum_direction
            direction = find(direction, *buffers, self.momentum)
        descend(weight, direction, float(self.lr))

# %% nbgrader={"grade": true, "grade_id": "06-step-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_step():
    """The oracle is a kind of optimizer that only writes down what it is called with."""
    calls = []

    class Recorder(Optimizer):
        buffers = ("sum",)

        def update(self, step, weight, grad, total):
            calls.append((step, weight.size))
            total += grad
            weight -= total

    moved, frozen = Parameter(np.zeros((3, 2))), Parameter(np.zeros(4))
    optimizer, array = Recorder([frozen, moved], lr=0.1), moved.data
    moved.grad = Tensor(np.arange(6.0).reshape(2, 3).T)
    optimizer.step()
    assert calls, "update was never called, although one parameter has a gradient"
    assert [step for step, _ in calls] == [1], (
        f"steps {[s for s, _ in calls]}: the first step is number 1, one call per piece")
    optimizer.step()
    assert [step for step, _ in calls] == [1, 2], f"steps were counted {[s for s, _ in calls]}, expected [1, 2]"
    assert 0 not in optimizer.state, "a parameter without a gradient must not be counted or given a state"
    assert moved.data is array, "the parameter's array was replaced: it must be moved in place"
    expected = -3 * np.arange(6.0).reshape(2, 3).T  # 1 and then 2 gradients: the buffer must last between steps
    assert np.array_equal(moved.data, expected), f"got\n{moved.data}\nexpected\n{expected}: the buffer was not kept"
    ### BEGIN HIDDEN TESTS
    large = Parameter(np.zeros(BLOCK + 5))
    large.grad, calls[:] = Tensor(np.ones(BLOCK + 5)), []
    Recorder([large], lr=1).step()
    assert calls == [(1, BLOCK), (1, 5)], f"a large weight moves piece by piece: got {calls}"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_step()

# %% [markdown]
"""
## 7. One learning rate does not fit all

An embedding of a rare word gets small and rare gradients; an output bias gets large ones. With one learning
rate, either the first stands still or the second jumps. Adam divides each number's step by the usual size of
its own gradient. It keeps two running averages:

    exp_avg    = beta1 * exp_avg    + (1 - beta1) * grad             the direction
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * grad * grad      the size, squared

By hand, betas (0.9, 0.99), first gradient [2, -1]: `exp_avg` is [0.2, -0.1], `exp_avg_sq` is [0.04, 0.01].

**Build** `update_moments`.
"""

# %% nbgrader={"grade": false, "grade_id": "06-moments", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def update_moments(exp_avg, exp_avg_sq, grad, betas):
    """Update both running averages in place. Source: Kingma and Ba 2015, algorithm 1.

    >>> mean, square = np.zeros(2), np.zeros(2)
    >>> update_moments(mean, square, np.array([2.0, -1.0]), (0.9, 0.99)); mean, square
    (array([ 0.2, -0.1]), array([0.04, 0.01]))
    """
    beta1, beta2 = betas
    ### BEGIN SOLUTION
    exp_avg *= beta1
    exp_avg += (1 - beta1) * grad
    exp_avg_sq *= beta2
    exp_avg_sq += (1 - beta2) * grad * grad
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "06-moments-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_moments():
    """The oracle is the first step by hand, then a weighted sum over all gradients."""
    mean, square = np.zeros(2, np.float32), np.zeros(2, np.float32)
    grads = np.array([[2, -1], [1, 3], [-2, 1]], np.float32)
    update_moments(mean, square, grads[0], (0.9, 0.99))
    assert np.any(mean) and np.any(square), "the averages are still zero: update both in place"
    assert not np.allclose(mean, grads[0]), f"exp_avg is {mean}: here the new gradient enters with weight 1 - beta1"
    assert np.allclose(mean, [0.2, -0.1]), f"exp_avg after one step is {mean}, expected [0.2, -0.1]"
    assert np.allclose(square, [0.04, 0.01]), f"exp_avg_sq after one step is {square}, expected [0.04, 0.01]"
    for grad in grads[1:]:
        update_moments(mean, square, grad, (0.9, 0.99))
    weights = 0.1 * 0.9 ** np.array([2, 1, 0])
    assert np.allclose(mean, weights @ grads), f"exp_avg after three steps is {mean}, expected {weights @ grads}"
    weights = 0.01 * 0.99 ** np.array([2, 1, 0])
    assert np.allclose(square, weights @ grads**2), f"exp_avg_sq is {square}, expected {weights @ grads**2}"


if __name__ == "__main__":
    test_unit_moments()

# %% [markdown]
"""
The averages start at zero, so at first they are too small: after one step `exp_avg` is `(1 - beta1) * grad`,
a tenth of the gradient, and `exp_avg_sq` a thousandth of its square. Adam divides each by the weight that has
gone into it so far, which is `1 - beta**step`.

**Predict.** First step, lr 0.1, gradients [100, 0.01], default betas (0.9, 0.999), corrected averages, the tiny
`eps` ignored. How far does each weight move? And by what factor would the step be too long if nobody corrected
(`0.1 * grad / sqrt(0.001 * grad * grad)`, relative to 1)?
"""

# %% nbgrader={"grade": false, "grade_id": "06-predict-first", "locked": false, "schema_version": 3, "solution": true, "task": false}
# predicted_moves = ...  (a list of 2 numbers)
# predicted_factor = ...  (a number)
### BEGIN SOLUTION
predicted_moves = [0.1, 0.1]
predicted_factor = 3.16
### END SOLUTION

# %% [markdown]
"""
**Build** the step, with the corrections:

    size       = sqrt(exp_avg_sq) / sqrt(1 - beta2**step) + eps
    direction  = exp_avg / (1 - beta1**step) / size
    weight    -= lr * direction

`math.sqrt` for plain numbers: `np.sqrt(0.5)` is a float64 *array* scalar and would turn float32 arrays into
float64, at twice the memory traffic. In-place division saves a temporary each.
"""

# %% nbgrader={"grade": false, "grade_id": "06-adam", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def adam_update(weight, exp_avg, exp_avg_sq, step, lr, betas, eps):
    """Move `weight` in place by lr times the corrected average over its usual size; `step` counts from 1."""
    beta1, beta2 = betas
    ### BEGIN SOLUTION
    size = np.sqrt(exp_avg_sq)
    size /= math.sqrt(1 - beta2**step)
    size += eps
    weight -= lr / (1 - beta1**step) * exp_avg / size
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "06-adam-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_adam():
    """The oracle is algorithm 1 of the paper in float64, for five steps."""
    grads = np.random.default_rng(0).standard_normal((5, 3))
    weight, mean, square = np.zeros((3, 3), np.float32)
    w, m, v = np.zeros((3, 3))
    for t, grad in enumerate(grads, start=1):
        m, v = 0.9 * m + 0.1 * grad, 0.99 * v + 0.01 * grad**2
        w = w - 0.1 * (m / (1 - 0.9**t)) / ((v / (1 - 0.99**t)) ** 0.5 + 1e-3)
        mean[...], square[...] = m, v
        adam_update(weight, mean, square, t, 0.1, (0.9, 0.99), 1e-3)
        assert np.any(weight), "the weight did not move: write into it"
        uncorrected = -0.1 * m / (v**0.5 + 1e-3)
        assert t > 1 or not np.allclose(weight, uncorrected, rtol=1e-3), (
            f"first step {weight}: the averages start at zero and need the correction 1 - beta**step")
        assert t > 1 or np.all(np.sign(weight) == -np.sign(grad)), f"first step {weight} is uphill for {grad}"
        inside = -0.1 * (m / (1 - 0.9**t)) / (v / (1 - 0.99**t) + 1e-3) ** 0.5
        assert t > 1 or not np.allclose(weight, inside, rtol=1e-4), "eps is added to the root, not under it"
        assert np.allclose(weight, w, rtol=1e-4), f"after step {t}: got {weight}, expected {w}"
    assert np.allclose(square, v), "adam_update must only read the averages"


if __name__ == "__main__":
    test_unit_adam()

# %% nbgrader={"grade": true, "grade_id": "06-predict-first-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_predict_first():
    """The oracle is your Adam, on its first step."""
    grad = np.array([100, 0.01])
    weight, mean, square = np.zeros((3, 2))
    update_moments(mean, square, grad, (0.9, 0.999))
    adam_update(weight, mean, square, 1, 0.1, (0.9, 0.999), 1e-8)
    assert np.shape(predicted_moves) == (2,), f"two distances are asked for, got {predicted_moves}"
    assert np.allclose(np.abs(predicted_moves), -weight, rtol=0.01), (
        f"predicted moves {predicted_moves}, measured {-weight}: the gradient's size divides out, whatever it is")
    factor = float((mean / np.sqrt(square))[0])
    assert np.isclose(predicted_factor, factor, rtol=0.01), (
        f"predicted factor {predicted_factor}, measured {factor:.3f}")


if __name__ == "__main__":
    test_unit_predict_first()

# %%
#| export
class Adam(Optimizer):
    """Steps scaled by each number's usual gradient; weight decay enters through the gradient, as torch.optim.Adam."""

    settings = ("lr", "betas", "eps", "weight_decay")
    buffers = ("exp_avg", "exp_avg_sq")

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0):
        super().__init__(params, lr)
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be at least 0 and less than 1, got {betas}")
        if eps < 0 or weight_decay < 0:
            raise ValueError(f"eps ({eps}) and weight_decay ({weight_decay}) must be 0 or more")
        self.betas, self.eps, self.weight_decay = tuple(betas), eps, weight_decay

    def update(self, step, weight, grad, exp_avg, exp_avg_sq):
        grad = with_weight_decay(grad, weight, self.weight_decay)
        update_moments(exp_avg, exp_avg_sq, grad, self.betas)
        adam_update(weight, exp_avg, exp_avg_sq, step, float(self.lr), self.betas, self.eps)

# %% [markdown]
"""
## 8. Decay, decoupled

In `Adam`, weight decay is part of the gradient, and so it too is divided by the gradient's usual size. Where the
loss has gradient zero, only the decay is left, and dividing it by itself gives 1: the weight moves by a whole
`lr`, however small `weight_decay` is. AdamW takes the decay out and shrinks the weight directly:

    weight *= 1 - lr * weight_decay        then Adam's step, without decay

**Predict.** A weight of 10 whose loss gradient is 0; lr 0.1, weight_decay 0.01. Where is the weight after one
step of Adam, and where after one of AdamW? Then **build** `shrink`, the line above.
"""

# %% nbgrader={"grade": false, "grade_id": "06-predict-decay", "locked": false, "schema_version": 3, "solution": true, "task": false}
# predicted_adam = ...  (a number)
# predicted_adamw = ...  (a number)
### BEGIN SOLUTION
predicted_adam = 9.9
predicted_adamw = 9.99
### END SOLUTION

# %% nbgrader={"grade": false, "grade_id": "06-adamw", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def shrink(weight, lr, weight_decay):
    """Decoupled weight decay, in place. Source: Loshchilov and Hutter 2019, algorithm 2, as PyTorch scales it.

    >>> weight = np.array([10.0]); shrink(weight, 0.1, 0.01); weight
    array([9.99])
    """
    ### BEGIN SOLUTION
    weight *= 1 - lr * weight_decay
    ### END SOLUTION

# %%
#| export
class AdamW(Adam):
    """Adam with weight decay apart from the gradient, as torch.optim.AdamW."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2):
        super().__init__(params, lr, betas, eps, weight_decay)

    def update(self, step, weight, grad, exp_avg, exp_avg_sq):
        shrink(weight, float(self.lr), self.weight_decay)
        update_moments(exp_avg, exp_avg_sq, grad, self.betas)
        adam_update(weight, exp_avg, exp_avg_sq, step, float(self.lr), self.betas, self.eps)

# %% nbgrader={"grade": true, "grade_id": "06-adamw-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_adamw():
    """The oracle is the example above, and a weight that nothing else moves."""
    weight = np.array([10.0, -4.0], np.float32)
    shrink(weight, 0.1, 0.01)
    assert not np.array_equal(weight, [10, -4]), "the weight did not shrink: write into it"
    assert not np.allclose(weight, [9.9, -3.96]), f"got {weight}: the decay must be scaled by lr as well"
    assert np.allclose(weight, [9.99, -3.996]), f"got {weight}, expected [9.99, -3.996]: times 1 - lr * weight_decay"
    parameter = Parameter([10.0])
    optimizer = AdamW([parameter], lr=0.1, weight_decay=0.5)
    for _ in range(3):
        parameter.grad = Tensor([0.0])
        optimizer.step()
    assert np.allclose(parameter.data, 10 * 0.95**3), f"three steps: got {parameter.data}, expected {10 * 0.95**3}"


if __name__ == "__main__":
    test_unit_adamw()

# %% nbgrader={"grade": true, "grade_id": "06-predict-decay-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_predict_decay():
    """The oracle is one step of each class."""
    seen = []
    for kind in (Adam, AdamW):
        parameter = Parameter([10.0])
        parameter.grad = Tensor([0.0])
        kind([parameter], lr=0.1, weight_decay=0.01).step()
        seen.append(float(parameter.data[0]))
    assert np.isclose(predicted_adam, seen[0], atol=1e-3), (
        f"Adam: predicted {predicted_adam}, measured {seen[0]:.4f}: the decay is divided by its own size")
    assert np.isclose(predicted_adamw, seen[1], atol=1e-3), (
        f"AdamW: predicted {predicted_adamw}, measured {seen[1]:.4f}")


if __name__ == "__main__":
    test_unit_predict_decay()

# %% [markdown]
"""
## 9. What Adam costs

Each buffer is as large as its weight.

**Predict.** `Linear(784, 256)`, with bias, in float32. How many bytes do AdamW's buffers take after the first
step?
"""

# %% nbgrader={"grade": false, "grade_id": "06-predict-bytes", "locked": false, "schema_version": 3, "solution": true, "task": false}
# predicted_bytes = ...  (a whole number)
### BEGIN SOLUTION
predicted_bytes = 2 * 4 * (784 * 256 + 256)
### END SOLUTION

# %%
def state_bytes(optimizer):
    """Bytes of all arrays in the optimizer's state."""
    return sum(value.nbytes for entry in optimizer.state.values() for value in entry.values()
               if isinstance(value, np.ndarray))


def one_random_step(optimizer, rng):
    """Give each parameter a random gradient and step."""
    for parameter in optimizer.params:
        parameter.grad = Tensor(rng.standard_normal(parameter.shape))
    optimizer.step()

# %% nbgrader={"grade": true, "grade_id": "06-predict-bytes-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_predict_bytes():
    """The oracle is the sum over the arrays in the state."""
    optimizer = AdamW(Linear(784, 256).parameters())
    one_random_step(optimizer, np.random.default_rng(0))
    measured = state_bytes(optimizer)
    assert predicted_bytes == measured, (
        f"predicted {predicted_bytes}, measured {measured}: two buffers, each as large as weight and bias")


if __name__ == "__main__":
    test_unit_predict_bytes()

# %% [markdown]
"""
## 10. Stop today, go on tomorrow

A run that is taken up again with new weights but an empty state starts Adam afresh: averages zero, step count
zero, and the loss jumps. `state_dict()` hands out the state, `load_state_dict()` takes it in. Both must
**copy**: the live arrays change with the very next step, and the snapshot would change with them.

`state_problems` is given; it lists what does not fit before anything is loaded. **Build** `copy_state` after it.
"""

# %%
#| export
def state_problems(state, shapes):
    """Why a saved state does not fit parameters of these shapes: a list of sentences, empty if it does."""
    problems = [f"there is no parameter {index}, only {len(shapes)}" for index in state if index >= len(shapes)]
    for index, entry in state.items():
        for name, value in entry.items():
            if isinstance(value, np.ndarray) and index < len(shapes) and value.shape != shapes[index]:
                problems.append(f"{name} of parameter {index} has shape {value.shape}, needed {shapes[index]}")
    return problems

# %% nbgrader={"grade": false, "grade_id": "06-state", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def copy_state(state):
    """A copy of {index: {name: array or number}} that shares no array with it."""
    ### BEGIN SOLUTION
    return {
        index: {name: value.copy() if isinstance(value, np.ndarray) else value for name, value in entry.items()}
        for index, entry in state.items()
    }
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "06-state-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_state():
    """The oracle is the run that was never stopped."""
    parameter = Parameter([1.0, -2.0])
    optimizer = Adam([parameter], lr=0.1)
    one_random_step(optimizer, np.random.default_rng(0))
    saved, weight = optimizer.state_dict(), parameter.data.copy()
    assert saved["state"], "the saved state is empty"
    before = saved["state"][0]["exp_avg"].copy()
    one_random_step(optimizer, np.random.default_rng(1))
    assert np.array_equal(saved["state"][0]["exp_avg"], before), (
        "the snapshot changed with the next step: its arrays are the live ones, copy them")
    assert saved["state"][0]["step"] == 1, f"the snapshot's step is {saved['state'][0]['step']}, expected 1"
    other = Parameter(weight)
    resumed = Adam([other], lr=0.5)
    resumed.load_state_dict(saved)
    assert resumed.lr == 0.1, f"lr after loading is {resumed.lr}, expected 0.1"
    one_random_step(resumed, np.random.default_rng(1))
    assert np.array_equal(other.data, parameter.data), f"resumed {other.data}, never stopped {parameter.data}"
    one_random_step(resumed, np.random.default_rng(2))
    assert np.array_equal(saved["state"][0]["exp_avg"], before), "loading must copy as well"
    ### BEGIN HIDDEN TESTS
    wrong = Adam([Parameter([1.0, 2.0, 3.0])])
    try:
        wrong.load_state_dict(saved)
    except ValueError as error:
        assert "(2,)" in str(error) and "(3,)" in str(error), f"the message names no shapes: {error}"
    else:
        raise AssertionError("a state for two numbers was loaded into three")
    assert wrong.state == {} and wrong.lr == 1e-3, "a state that does not fit must change nothing"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_state()

# %% [markdown]
"""
## 11. A network at last

Two spirals of points, wound around each other; a small network has to tell them apart. Same network, same data,
three optimizers.
"""

# %%
def spirals(count=100, seed=0):
    """Points (2 * count, 2) on two spirals, and which spiral each is on."""
    rng = np.random.default_rng(seed)
    angle = np.linspace(0.5, 7, count)
    arm = np.stack([angle * np.cos(angle), angle * np.sin(angle)], axis=1) / 7
    points = np.concatenate([arm, -arm]) + 0.02 * rng.standard_normal((2 * count, 2))
    return Tensor(points), Tensor(np.repeat([0, 1], count))


def train_spirals(make_optimizer, steps=200, seed=0):
    """Losses of a 2-32-32-2 network on all points; make_optimizer(parameters) -> optimizer."""
    rng = np.random.default_rng(seed)
    model = Sequential(Linear(2, 32, rng=rng), ReLU(), Linear(32, 32, rng=rng), ReLU(), Linear(32, 2, rng=rng))
    optimizer, (points, labels), losses = make_optimizer(model.parameters()), spirals(), []
    for _ in range(steps):
        loss = cross_entropy(model(points), labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses

# %% nbgrader={"grade": false, "grade_id": "06-measure-spirals", "locked": true, "schema_version": 3, "solution": false, "task": false}
if __name__ == "__main__":
    runs = {"SGD": lambda p: SGD(p, lr=0.1), "SGD, momentum 0.9": lambda p: SGD(p, lr=0.1, momentum=0.9),
            "AdamW": lambda p: AdamW(p, lr=0.01)}
    print(f"{'loss after step':<20}" + "".join(f"{step:>8}" for step in (1, 50, 100, 200)))
    for name, make in runs.items():
        losses = train_spirals(make)
        print(f"{name:<20}" + "".join(f"{losses[step - 1]:8.3f}" for step in (1, 50, 100, 200)))

# %% nbgrader={"grade": true, "grade_id": "06-module-test", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
def test_module():
    """Every check of the lesson, then each optimizer on the spirals."""
    for check in (test_unit_descend, test_unit_predict_lr, test_unit_momentum, test_unit_predict_momentum,
                  test_unit_nesterov, test_unit_weight_decay, test_unit_blocks, test_unit_step, test_unit_moments,
                  test_unit_adam, test_unit_predict_first, test_unit_adamw, test_unit_predict_decay,
                  test_unit_predict_bytes, test_unit_state):
        check()
    kinds = {"SGD": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True), "Adam": lambda p: Adam(p, lr=0.01),
             "AdamW": lambda p: AdamW(p, lr=0.01)}
    for name, make in kinds.items():
        losses = train_spirals(make, steps=120)
        assert len(losses) == 120 and np.isfinite(losses).all(), f"{name}: a loss is not a number"
        assert losses[-1] < 0.5 * losses[0], f"{name}: the loss went from {losses[0]:.3f} to {losses[-1]:.3f} only"


if __name__ == "__main__":
    test_module()
    print("Lesson 06 holds.")

# %% [markdown]
"""
## Summary

* A step writes into the parameter's array; the object, its dtype and everyone who holds it stay the same.
* The steepest direction limits the learning rate; momentum lets the flat ones catch up.
* Adam divides by the usual size of each number's own gradient, and corrects averages that began at zero.
* AdamW decays the weights apart from the gradient.
* State is two more copies of the model, and part of every checkpoint.

**Exercises.** (1) Train the spirals with `SGD` at a rate just below and just above where it diverges. (2) Leave
the correction out of `adam_update` and train: which steps suffer? (3) Give biases no decay: two `AdamW` objects
over disjoint lists of parameters. (4) Write Lion (Chen et al. 2023) as a subclass: one buffer, one sign.
"""

# %% [markdown]
"""
**Design note.** In mixed precision a model of P parameters keeps 2P bytes of weights and 2P of gradients, and
then 12P bytes for the optimizer: float32 weights and Adam's two averages (Rajbhandari et al. 2020, *ZeRO*,
section 3.1). The state, not the model, fills the memory first; so ZeRO cuts it in as many parts as there are
machines. The trade-off is traffic: each machine must fetch what another one holds.

**Next.** The loop in `train_spirals` is five lines that everyone writes again, with a fixed learning rate, no
validation, and nothing left when the power fails. Lesson 07 builds the Trainer.
"""

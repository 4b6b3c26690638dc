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
#     lesson: "05"
# ---

# %% [markdown]
"""
# Lesson 05: Autograd

**You build** the engine for the socket of lesson 01: a table of gradient rules and one walk over the graph.

**You need** lessons 01 to 04: Tensors, activations, layers and a loss.

**It becomes** `tinytorch/core/autograd.py`. About 90 minutes.

A loss says how wrong a model is. Training asks, for every one of its parameters: if this number grew a little,
would the loss grow or shrink, and how fast? That slope is the gradient.
"""

# %%
#| default_exp core.autograd
#| export
from contextlib import contextmanager

import numpy as np

from tinytorch.core.tensor import Tensor, plug_in, unwrap

# %%
import gc
import math
import time
import weakref

from tinytorch.core.activations import tanh
from tinytorch.core.layers import Linear
from tinytorch.core.losses import cross_entropy, mse_loss
from tinytorch.core.tensor import manual_seed, randn


def message_of(work, kind):
    """The words of the error that `work` raises, or None when it raises nothing of this kind."""
    try:
        work()
    except kind as error:
        return str(error)
    return None

# %% [markdown]
"""
## 1. Wiggle and look

The honest way to a slope needs no theory: move one number up a little, move it down a little, look at the
difference.

    f(x) = x * x at x = 3:     (3.001 * 3.001 - 2.999 * 2.999) / 0.002  =  6

Looking to both sides is worth it: the error shrinks with the square of the step, from one side only with the
step.

**Build** `numeric_gradient`, one entry of `x` at a time. It will be the oracle for everything that follows.
"""

# %% nbgrader={"grade": false, "grade_id": "05-numeric", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def numeric_gradient(f, x, eps=1e-6):
    """Slopes of a number f(x) by central differences, for each entry of a float64 array; x itself stays unchanged.

    >>> numeric_gradient(lambda x: (x * x).sum(), np.array([3.0, -1.0])).round(6).tolist()
    [6.0, -2.0]
    """
    grad = np.zeros(x.shape)
    ### BEGIN SOLUTION
    for index in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[index] += eps
        down[index] -= eps
        grad[index] = (f(up) - f(down)) / (2 * eps)
    return grad
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "05-numeric-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_numeric():
    """The oracle is the derivative from school: x * x * y has the slopes 2 * x * y and x * x."""
    x = np.array([[3.0, 2.0], [-1.0, 4.0]])
    before = x.copy()
    got = numeric_gradient(lambda m: float(m[0, 0] ** 2 * m[0, 1] + m[1, 0] * m[1, 1]), x)
    expected = np.array([[12.0, 9.0], [4.0, -1.0]])
    assert isinstance(got, np.ndarray) and got.shape == (2, 2), f"got {got!r}, need an array of shape (2, 2)"
    assert (x == before).all(), f"x was changed to {x.tolist()}: move one entry of a copy, or move it back"
    assert np.allclose(got, expected, atol=1e-3), (
        f"got {got.tolist()}, expected {expected.tolist()}: one entry at a time, "
        "and divide by the WHOLE step, 2 * eps"
    )
    cube = numeric_gradient(lambda m: float(m[0] ** 3), np.array([2.0]), eps=1e-3)[0]
    assert abs(cube - 12) < 1e-4, f"x ** 3 at 2, eps 0.001: got {cube:.6f}, expected 12.000001: look to both sides"
    ### BEGIN HIDDEN TESTS
    got = numeric_gradient(lambda m: float(np.sin(m) * 5), np.array(1.0))
    assert got.shape == () and abs(got - 5 * math.cos(1.0)) < 1e-6, f"a single number: got {got}"
    got = numeric_gradient(lambda m: float((m[0] * m[1] * m[2]).sum()), np.array([[2.0], [5.0], [-3.0]]))
    assert got.shape == (3, 1) and np.allclose(got[:, 0], [-15, -6, 10], atol=1e-6), f"got {got.tolist()}"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_numeric()

# %% [markdown]
"""
**Predict.** A network for digits, 784 inputs, 128 in the middle, 10 outputs, has 784 * 128 + 128 + 128 * 10 +
10 = 101,770 parameters. How often must `numeric_gradient` compute the loss for ONE step of training?
"""

# %% nbgrader={"grade": false, "grade_id": "05-predict-runs", "locked": false, "schema_version": 3, "solution": true, "task": false}
# predicted_runs = ...  (a whole number)
### BEGIN SOLUTION
predicted_runs = 2 * 101_770
### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "05-predict-runs-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_predict_runs():
    """The oracle is a loss that counts its runs, on five parameters, scaled up."""
    runs = []
    numeric_gradient(lambda x: runs.append(1) or 0.0, np.zeros(5))
    expected = len(runs) / 5 * 101_770
    assert predicted_runs == expected, (
        f"predicted {predicted_runs}; with 5 parameters the loss ran {len(runs)} times, "
        f"so with 101,770 it runs {expected:.0f} times"
    )


if __name__ == "__main__":
    test_unit_predict_runs()

# %% nbgrader={"grade": false, "grade_id": "05-measure-numeric", "locked": true, "schema_version": 3, "solution": false, "task": false}
def measure_numeric():
    """The time of one numeric gradient of the digits network, from the time of one loss."""
    manual_seed(0)
    first, second, x = Linear(784, 128), Linear(128, 10), randn(32, 784)
    target = np.arange(32) % 10
    times = []
    for _ in range(10):
        start = time.perf_counter()
        hidden = first(x)
        cross_entropy(second(hidden * (hidden > 0)), target)
        times.append(time.perf_counter() - start)
    once = min(times)
    print(f"one loss {once * 1e3:.2f} ms; a numeric gradient would take {once * 2 * 101_770:.0f} s per step")


if __name__ == "__main__":
    measure_numeric()

# %% [markdown]
"""
## 2. One rule per operation

We can do better, because we know what every operation does. Take `loss = (a * b) + c` with a = 2, b = 5, c = 1:

    a = 2 --\\
             *  --> 10 --\\
    b = 5 --/             + --> 11
    c = 1 ---------------/

Walk from the right. The loss against itself: slope 1. The `+` hands that slope to both sides: 1 for the
product, 1 for c. The `*` received 1; growing `a` by a little grows the product 5 times as much. So the slope
for a is 1 * 5, for b 1 * 2.

Each operation needs only the slope that **arrives** (`grad`), and its own inputs and output. Slopes along a
path multiply: the chain rule.
"""

# %%
#| export
RULES = {}


def gradient(op):
    """Decorator that puts a rule into the table: rule(grad, output, *inputs, **params) -> one gradient per input.

    Everything is a plain array. A gradient may be None (there is none), or a function without arguments that
    computes it, which the engine calls only if somebody wants it. The engine also undoes broadcasting.
    """

    def enter(rule):
        RULES[op] = rule
        return rule

    return enter

# %% [markdown]
"""
The rules for `+`, `-` and `/` are worked. Note the `lambda` in them: in `x / 2.0` nobody asks for the gradient
of 2.0, so that half of the work is never done.
"""

# %%
#| export
from tinytorch.core.tensor import add_array, divide_array, multiply_array, negative_array, power_array, subtract_array


@gradient(add_array)
def add_rule(grad, output, a, b):
    return grad, grad


@gradient(subtract_array)
def subtract_rule(grad, output, a, b):
    return grad, lambda: -grad


@gradient(divide_array)
def divide_rule(grad, output, a, b):
    return lambda: grad / b, lambda: -grad * output / b  # output is a / b


@gradient(negative_array)
def negative_rule(grad, output, x):
    return (-grad,)

# %% [markdown]
"""
A rule can be tested before there is an engine: make up slopes that arrive, and compare with wiggling.
"""

# %%
def rule_gradients(op, grad, *arrays, **params):
    """What the rule of op gives for these arrays: a list with one gradient per input."""
    results = RULES[op](grad, op(*arrays, **params), *arrays, **params)
    assert isinstance(results, tuple), f"a rule returns a tuple, one gradient per input; got {results!r:.60}"
    return [result() if callable(result) else result for result in results]


def check_rule(op, *arrays, **params):
    """Compare the rule of op with wiggling, for every floating input."""
    output = op(*arrays, **params)
    slopes = np.random.default_rng(5).standard_normal(output.shape)
    for i, got in enumerate(rule_gradients(op, slopes, *arrays, **params)):
        if np.asarray(arrays[i]).dtype.kind != "f":
            continue
        expected = numeric_gradient(
            lambda x, i=i: float((op(*arrays[:i], x, *arrays[i + 1 :], **params) * slopes).sum()), arrays[i]
        )
        words = f"{op.__name__}: gradient of input {i}"
        assert got is not None, f"{words} is missing"
        assert np.shape(got) == expected.shape, f"{words}: got shape {np.shape(got)}, expected {expected.shape}"
        wrong = np.argwhere(~np.isclose(got, expected, rtol=1e-5, atol=1e-6))
        index = tuple(int(n) for n in wrong[0]) if len(wrong) else ()
        assert not len(wrong), f"{words} at {index}: got {got[index]:.5g}, wiggling says {expected[index]:.5g}"


if __name__ == "__main__":
    for op in (add_array, subtract_array, divide_array):
        check_rule(op, np.array([1.0, 2.0]), np.array([4.0, 8.0]))
    check_rule(negative_array, np.array([1.0, 2.0]))

# %% [markdown]
"""
**Build** the rule of multiplication. The picture has the numbers.
"""

# %% nbgrader={"grade": false, "grade_id": "05-multiply", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
@gradient(multiply_array)
def multiply_rule(grad, output, a, b):
    """Gradients of a * b: what arrives, times the other side."""
    ### BEGIN SOLUTION
    return lambda: grad * b, lambda: grad * a
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "05-multiply-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_multiply():
    """The oracle is the picture (2 * 5), then wiggling."""
    a, b = rule_gradients(multiply_array, np.array(1.0), np.array(2.0), np.array(5.0))
    assert (a, b) == (5.0, 2.0), f"2 * 5, slope 1: got {a} and {b}, expected 5 and 2: each side gets the OTHER one"
    a, b = rule_gradients(multiply_array, np.array(10.0), np.array(2.0), np.array(5.0))
    assert (a, b) == (50.0, 20.0), f"2 * 5, slope 10: got {a} and {b}, expected 50 and 20: multiply with what arrives"
    ### BEGIN HIDDEN TESTS
    check_rule(multiply_array, np.array([[1.0, -2.0, 0.5]]), np.array([[4.0, 8.0, -3.0]]))
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_multiply()

# %% [markdown]
"""
## 3. Undo the stretching

A bias of shape (3,) was added to 2 rows. Each of its numbers was used twice, so its slope is the **sum** over
both uses:

    grad that arrives (2, 3)     [1 2 3]          bias (3,) gets     [5 7 9]
                                 [4 5 6]          a column (2, 1)    [ 6]
                                                  would get          [15]

Broadcasting stretches dimensions of size 1 and adds new ones on the left. Its reverse sums exactly those. The
engine will do it, in one place, for all rules.

**Build** `unbroadcast`. The shape that comes out must be `shape`, also where that has sizes 1.
"""

# %% nbgrader={"grade": false, "grade_id": "05-unbroadcast", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def unbroadcast(grad, shape):
    """Sum a gradient back to the shape from which its input was stretched.

    >>> unbroadcast(np.array([[1, 2, 3], [4, 5, 6]]), (2, 1)).tolist()
    [[6], [15]]
    """
    ### BEGIN SOLUTION
    added = grad.ndim - len(shape)
    stretched = tuple(i + added for i, size in enumerate(shape) if size == 1)
    return np.add.reduce(grad, axis=tuple(range(added)) + stretched, keepdims=True).reshape(shape)
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "05-unbroadcast-test", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
def test_unit_unbroadcast():
    """The oracle is the picture, then counting: a gradient of ones gives the number of uses."""
    grad = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    picture = [((3,), [5.0, 7.0, 9.0]), ((2, 1), [[6.0], [15.0]]), ((1, 3), [[5.0, 7.0, 9.0]]), ((), 21.0)]
    for shape, expected in picture:
        got = unbroadcast(grad, shape)
        assert np.shape(got) == shape, f"(2, 3) back to {shape}: got shape {np.shape(got)}"
        assert got.tolist() == expected, f"(2, 3) back to {shape}: got {got.tolist()}, expected {expected}: uses add up"
    assert unbroadcast(grad, (2, 3)).tolist() == grad.tolist(), "nothing was stretched: nothing changes"
    got = unbroadcast(np.ones((4, 2, 3), dtype=np.float32), (2, 1))
    assert np.shape(got) == (2, 1), f"(4, 2, 3) back to (2, 1): got shape {np.shape(got)}"
    assert got.tolist() == [[12.0], [12.0]], f"each number was used 4 * 3 = 12 times, got {got.tolist()}"
    assert got.dtype == np.float32, f"float32 became {got.dtype}"
    ### BEGIN HIDDEN TESTS
    got = unbroadcast(np.ones((5, 4, 3, 2)), (1, 3, 1))
    assert got.shape == (1, 3, 1) and got.tolist() == [[[40.0], [40.0], [40.0]]]
    assert unbroadcast(np.ones((0, 3)), (3,)).tolist() == [0.0, 0.0, 0.0], "used by no row at all"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_unbroadcast()

# %% [markdown]
"""
Look back:

* What would training do with a bias whose gradient has shape (2, 3) instead of (3,)? Would anything complain?
* A number was broadcast into a million places. What is the rounding error of its gradient made of?

## 4. More rules

Functions of one number are a line each: what arrives, times the slope of the function. Several use `output`,
which is there already. Powers have a trap in the corner: the slope of `x ** 0` at 0 is 0, not 0 * infinity.
"""

# %%
#| export
from tinytorch.core.tensor import abs_array, clone_array, exp_array, log_array, sqrt_array


@gradient(exp_array)
def exp_rule(grad, output, x):
    return (grad * output,)


@gradient(log_array)
def log_rule(grad, output, x):
    return (grad / x,)


@gradient(sqrt_array)
def sqrt_rule(grad, output, x):
    return (0.5 * grad / output,)


@gradient(abs_array)
def abs_rule(grad, output, x):
    return (grad * np.sign(x),)


@gradient(clone_array)
def clone_rule(grad, output, x):
    return (grad,)


@gradient(power_array)
def power_rule(grad, output, a, b):
    lower = np.where(b == 0, 1, b - 1) if isinstance(b, np.ndarray) else (b - 1 if b else 1)
    return (
        lambda: grad * b * power_array(a, lower),
        lambda: grad * output * np.log(np.where(a > 0, a, 1).astype(output.dtype)),
    )

# %% [markdown]
"""
**Matrix product.** `(n, k) @ (k, m) -> (n, m)`. Two facts almost force the rule: the gradient of `a` has the
shape of `a`, and it is made of `grad` and `b`. Which product of a (n, m) with a (k, m), one of them transposed,
gives (n, k)?

    a = [1 2]    b = [5]    grad = [1]      a gets [5 7]      (grad times b, per entry)
                     [7]                    b gets [1]
                                                   [2]

**Build** both. Before the last two dimensions there may be a batch: transpose with `np.swapaxes(b, -1, -2)`.
"""

# %% nbgrader={"grade": false, "grade_id": "05-matmul", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def matmul_gradients(grad, a, b):
    """Functions for the gradients of a @ b: a (..., n, k), b (..., k, m), grad (..., n, m)."""
    ### BEGIN SOLUTION
    return lambda: grad @ np.swapaxes(b, -1, -2), lambda: np.swapaxes(a, -1, -2) @ grad
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "05-matmul-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_matmul():
    """The oracle is the picture, then wiggling on a batch."""
    grads = matmul_gradients(np.array([[1.0]]), np.array([[1.0, 2.0]]), np.array([[5.0], [7.0]]))
    assert isinstance(grads, tuple) and len(grads) == 2, f"need two functions, got {grads!r:.60}"
    first, second = (g() if callable(g) else g for g in grads)
    for name, x, shape in [("a", first, (1, 2)), ("b", second, (2, 1))]:
        assert np.shape(x) == shape, f"{name} is {shape}, its gradient has shape {np.shape(x)}: which product gives that?"
    assert first.tolist() == [[5.0, 7.0]], f"gradient of a: got {first.tolist()}, expected [[5, 7]]"
    assert second.tolist() == [[1.0], [2.0]], f"gradient of b: got {second.tolist()}, expected [[1], [2]]"
    rng = np.random.default_rng(1)
    a, b, grad = rng.standard_normal((6, 2, 3)), rng.standard_normal((6, 3, 4)), rng.standard_normal((6, 2, 4))
    got = [g() if callable(g) else g for g in matmul_gradients(grad, a, b)]
    expected = [numeric_gradient(lambda x: float((x @ b * grad).sum()), a),
                numeric_gradient(lambda x: float((a @ x * grad).sum()), b)]
    for name, g, e in zip("ab", got, expected):
        words = f"batch of 6: the gradient of {name}"
        assert g.shape == e.shape, f"{words} has shape {g.shape}, expected {e.shape}: keep the batch first"
        assert np.allclose(g, e, atol=1e-6), f"{words} differs from wiggling: which side is transposed?"
    ### BEGIN HIDDEN TESTS
    square = [g() if callable(g) else g for g in matmul_gradients(grad[:, :, :2], a[:, :, :2], b[:, :2, :2])]
    expected = numeric_gradient(lambda x: float((x @ b[:, :2, :2] * grad[:, :, :2]).sum()), a[:, :, :2])
    assert np.allclose(square[0], expected, atol=1e-6), "square matrices hide nothing: shapes agree, numbers must too"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_matmul()

# %% [markdown]
"""
The rule around it is given. Vectors get a second dimension for the moment; and where one matrix meets a batch
of rows, the batch becomes one long matrix, because one large product is faster than many small ones.
"""

# %%
#| export
from tinytorch.core.tensor import matmul_array


@gradient(matmul_array)
def matmul_rule(grad, output, a, b):
    if a.ndim > 1 and b.ndim == 2:
        rows = a.reshape(-1, a.shape[-1])
        grad_a, grad_b = matmul_gradients(grad.reshape(-1, grad.shape[-1]), rows, b)
        return lambda: grad_a().reshape(a.shape), grad_b
    grad = grad[..., None] if b.ndim == 1 else grad
    grad = grad[..., None, :] if a.ndim == 1 else grad
    grad_a, grad_b = matmul_gradients(grad, np.atleast_2d(a), b[:, None] if b.ndim == 1 else b)
    return (
        lambda: grad_a()[..., 0, :] if a.ndim == 1 else grad_a(),
        lambda: grad_b()[..., 0] if b.ndim == 1 else grad_b(),
    )

# %% [markdown]
"""
**Reductions.** A sum hands its slope to everyone who took part; a mean hands out equal shares. Both are given.
`kept` puts the folded dimensions back as size 1, so that the slope stretches over `x` again.
"""

# %%
#| export
from tinytorch.core.tensor import max_array, mean_array, min_array, sum_array


def kept(array, shape, dim):
    """A reduced array with its folded dimensions back as size 1: (2,) from (2, 3) along dim 1 -> (2, 1)."""
    if dim is None:
        return np.reshape(array, (1,) * len(shape))
    folded = {d % len(shape) for d in (dim if isinstance(dim, (tuple, list)) else (dim,))}
    return np.reshape(array, tuple(1 if i in folded else n for i, n in enumerate(shape)))


@gradient(sum_array)
def sum_rule(grad, output, x, dim=None, keepdim=False):
    return (np.broadcast_to(kept(grad, x.shape, dim), x.shape),)


@gradient(mean_array)
def mean_rule(grad, output, x, dim=None, keepdim=False):
    share = grad / (x.size // max(np.size(output), 1))
    return (np.broadcast_to(kept(share, x.shape, dim), x.shape),)

# %% [markdown]
"""
Only the largest number decides a maximum: it gets the whole slope, the others nothing. When several are equally
large, they **share** it:

    x = [3 1 3]    max = 3    grad = 10    x gets [5 0 5]

**Build** it for max and min at once (`output` is the winning value either way): mark the winners, count them
per reduction, share.
"""

# %% nbgrader={"grade": false, "grade_id": "05-max", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
@gradient(max_array)
@gradient(min_array)
def extreme_rule(grad, output, x, dim=None, keepdim=False):
    """The slope goes to the winners, in equal shares; kept(...) lines grad and output up with x."""
    ### BEGIN SOLUTION
    winners = (x == kept(output, x.shape, dim)).astype(x.dtype)
    count = kept(sum_array(winners, dim), x.shape, dim)
    return (winners * (kept(grad, x.shape, dim) / count),)
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "05-max-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_max():
    """The oracle is the picture, then wiggling where there are no ties."""
    (got,) = rule_gradients(max_array, np.array(10.0), np.array([3.0, 1.0, 3.0]))
    assert np.shape(got) == (3,), f"got shape {np.shape(got)}, expected (3,)"
    assert got.tolist() == [5.0, 0.0, 5.0], f"[3, 1, 3], slope 10: got {got.tolist()}, expected [5, 0, 5]: equals share"
    x = np.array([[1.0, 7.0, 3.0], [9.0, 2.0, 9.0]])
    (got,) = rule_gradients(max_array, np.array([1.0, 4.0]), x, dim=1)
    assert np.shape(got) == (2, 3), f"got shape {np.shape(got)}, expected (2, 3)"
    assert got.tolist() == [[0, 1, 0], [2, 0, 2]], (
        f"dim=1: got {got.tolist()}, expected [[0, 1, 0], [2, 0, 2]]: each row counts its own winners"
    )
    for op in (max_array, min_array):
        for params in ({}, {"dim": 0}, {"dim": -1, "keepdim": True}):
            check_rule(op, np.array([[1.0, 7.0, 3.5], [9.0, 2.0, 8.0]]), **params)
    (got,) = rule_gradients(max_array, np.float32(1), np.array([2, 2, 2], dtype=np.float32))
    assert got.dtype == np.float32, f"float32 became {got.dtype}: a count of integers divides in float64"
    ### BEGIN HIDDEN TESTS
    check_rule(max_array, np.random.default_rng(2).permutation(np.arange(24.0)).reshape(2, 3, 4), dim=1)
    (got,) = rule_gradients(min_array, np.array([[6.0]]), np.array([[2.0, 2.0], [2.0, 5.0]]), keepdim=True)
    assert got.tolist() == [[2.0, 2.0], [2.0, 0.0]]
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_max()

# %% [markdown]
"""
**Shapes.** Nothing was computed, so nothing is multiplied: put every slope back where its number came from.
`expand` needs nothing at all, because the engine undoes broadcasting.
"""

# %%
#| export
from tinytorch.core.tensor import (
    cat_array,
    expand_array,
    permute_array,
    reshape_array,
    squeeze_array,
    stack_array,
    transpose_array,
    unsqueeze_array,
)


@gradient(reshape_array)
@gradient(squeeze_array)
@gradient(unsqueeze_array)
def reshape_rule(grad, output, x, **params):
    return (grad.reshape(x.shape),)


@gradient(permute_array)
def permute_rule(grad, output, x, dims):
    return (np.transpose(grad, np.argsort([d % x.ndim for d in dims])),)


@gradient(transpose_array)
def transpose_rule(grad, output, x, dim0, dim1):
    return (np.swapaxes(grad, dim0, dim1),)


@gradient(expand_array)
def expand_rule(grad, output, x, shape):
    return (grad,)


@gradient(cat_array)
def cat_rule(grad, output, *arrays, dim=0):
    ends = np.cumsum([a.shape[dim] for a in arrays])
    return tuple(np.split(grad, ends[:-1], axis=dim))


@gradient(stack_array)
def stack_rule(grad, output, *arrays, dim=0):
    return tuple(np.moveaxis(grad, dim, 0))

# %% [markdown]
"""
**Indexing** picks; its reverse puts down. What was not picked gets 0. What was picked twice gets **both**
slopes:

    x = [10 20 30]    x[[0, 0, 2]] = [10 10 30]    grad = [1 2 5]    x gets [3 0 5]

`result[key] += grad` looks right and is wrong: NumPy reads `result[key]` once, adds, and writes twice, so the
second write wins. `np.add.at(result, key, grad)` adds one after another. It is slower, so use it only where a
key can repeat: `picks_once` tells.

**Build** `index_rule`, in the cell after the next.
"""

# %%
#| export
from tinytorch.core.tensor import index_array


def picks_once(key):
    """Whether a key cannot pick an entry twice: ints, slices, None and ... only."""
    keys = key if isinstance(key, tuple) else (key,)
    return all(k is None or k is Ellipsis or isinstance(k, (int, slice)) for k in keys)

# %% nbgrader={"grade": false, "grade_id": "05-index", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
@gradient(index_array)
def index_rule(grad, output, x, key):
    """The gradient of x[key]: zeros like x, with the slopes added where they were picked."""
    ### BEGIN SOLUTION
    result = np.zeros_like(x)
    if picks_once(key):
        result[key] = grad
    else:
        np.add.at(result, key, grad)
    return (result,)
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "05-index-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_index():
    """The oracle is the picture, then a loop that adds one slope at a time."""
    x = np.array([10.0, 20.0, 30.0])
    (got,) = rule_gradients(index_array, np.array([1.0, 2.0, 5.0]), x, key=[0, 0, 2])
    assert np.shape(got) == (3,), f"got shape {np.shape(got)}, expected the shape of x, (3,)"
    assert got.tolist() == [3.0, 0.0, 5.0], (
        f"got {got.tolist()}, expected [3, 0, 5]: entry 0 was picked twice, slopes add up"
    )
    assert x.tolist() == [10.0, 20.0, 30.0], f"x itself was changed to {x.tolist()}: begin with zeros"
    table, ids = np.zeros((4, 2), dtype=np.float32), np.array([[1, 1, 3], [0, 1, 3]])
    slopes = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    expected = np.zeros((4, 2))
    for row, column in np.ndindex(2, 3):
        expected[ids[row, column]] += slopes[row, column]
    (got,) = rule_gradients(index_array, slopes, table, key=ids)
    assert got.shape == (4, 2), f"rows of a table: got shape {got.shape}, expected (4, 2)"
    assert np.allclose(got, expected), f"rows of a table: got {got.tolist()}, expected {expected.tolist()}"
    assert got.dtype == np.float32, f"float32 became {got.dtype}"
    check_rule(index_array, np.arange(12.0).reshape(3, 4), key=(slice(None, None, 2), -1))
    ### BEGIN HIDDEN TESTS
    check_rule(index_array, np.arange(12.0).reshape(3, 4), key=(Ellipsis, None, [1, 1, 0]))
    check_rule(index_array, np.arange(6.0).reshape(2, 3), key=np.array([[True, False, True], [False, False, True]]))
    check_rule(index_array, np.arange(6.0).reshape(2, 3), key=([1, 1], [2, 2]))
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_index()

# %% [markdown]
"""
## 5. Rules for whole formulas

Lessons 02 to 04 brought operations that are whole formulas. They get one rule each, not one per multiplication
inside: fewer steps, fewer arrays. Most slopes can be written with `output`:

| | slope |
|---|---|
| relu | 1 where the output is positive, else 0 |
| sigmoid s | s (1 - s) |
| tanh t | 1 - t t |
"""

# %%
#| export
from tinytorch.core.activations import (
    gelu_array,
    log_softmax_array,
    relu_array,
    sigmoid_array,
    silu_array,
    softmax_array,
    tanh_array,
)


@gradient(relu_array)
def relu_rule(grad, output, x):
    return (grad * (output > 0),)


@gradient(sigmoid_array)
def sigmoid_rule(grad, output, x):
    return (grad * output * (1 - output),)


@gradient(tanh_array)
def tanh_rule(grad, output, x):
    return (grad * (1 - output * output),)


@gradient(silu_array)
def silu_rule(grad, output, x):
    s = sigmoid_array(x)
    return (grad * (s + output * (1 - s)),)

# %% [markdown]
"""
GELU is `0.5 x (1 + tanh(u))` with `u = c x + 0.044715 c x x x`. Product rule, then chain rule: `0.5 (1 + t) +
0.5 x (1 - t t) u'`. The rule works in two arrays that it owns, because on large activations time goes into
making new arrays.
"""

# %%
#| export
@gradient(gelu_array)
def gelu_rule(grad, output, x):
    c = 0.7978845608028654  # sqrt(2 / pi)
    square = x * x
    t = square * (0.044715 * c)
    t += c
    t *= x
    np.tanh(t, out=t)
    square *= 1.5 * 0.044715 * c
    square += 0.5 * c
    square *= x  # x u' / 2
    square *= 1 - t
    square += 0.5
    t += 1
    square *= t
    square *= grad
    return (square,)

# %% [markdown]
"""
**Softmax** couples its outputs: they sum to 1, so when one grows the others must shrink. With probabilities p,
slopes g, per row:

    gradient = p * (g - s)      s = sum of p * g

In words: what matters is by how much a slope differs from the average slope, weighted by p. Equal slopes give
0: all scores up by the same amount changes nothing.

    p = [0.5 0.25 0.25]    g = [4 0 0]    s = 2    gradient = [1  -0.5  -0.5]

**Build** it. `dim` is where the probabilities sum to 1.
"""

# %% nbgrader={"grade": false, "grade_id": "05-softmax", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
@gradient(softmax_array)
def softmax_rule(grad, output, x, dim=-1):
    """output holds the probabilities; the average slope is taken along dim."""
    ### BEGIN SOLUTION
    product = grad * output
    product -= output * np.add.reduce(product, axis=dim, keepdims=True)
    return (product,)
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "05-softmax-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_softmax():
    """The oracle is the picture, then wiggling along each dimension."""
    scores = np.log(np.array([[0.5, 0.25, 0.25]]))
    (got,) = rule_gradients(softmax_array, np.array([[4.0, 0.0, 0.0]]), scores)
    assert np.shape(got) == (1, 3), f"got shape {np.shape(got)}, expected (1, 3)"
    assert np.allclose(got, [[1.0, -0.5, -0.5]]), (
        f"got {np.round(got, 4).tolist()}, expected [[1, -0.5, -0.5]]: subtract the weighted average slope, then times p"
    )
    for dim in (0, 1, -1):
        check_rule(softmax_array, np.random.default_rng(3).standard_normal((2, 3, 4)), dim=dim)
    ### BEGIN HIDDEN TESTS
    (got,) = rule_gradients(softmax_array, np.full((2, 3), 7.0), np.arange(6.0).reshape(2, 3))
    assert np.allclose(got, 0), "equal slopes: raising all scores alike changes no probability"
    check_rule(softmax_array, np.random.default_rng(4).standard_normal((5, 2)), dim=-2)
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_softmax()

# %% [markdown]
"""
Log-softmax and the linear layer are given. `linear_array` is `x @ weight.T + bias`, so its rule is the one of
the matrix product, and the bias collects over all rows.
"""

# %%
#| export
from tinytorch.core.layers import linear_array


@gradient(log_softmax_array)
def log_softmax_rule(grad, output, x, dim=-1):
    return (grad - np.exp(output) * np.add.reduce(grad, axis=dim, keepdims=True),)


@gradient(linear_array)
def linear_rule(grad, output, x, weight, bias=None):
    rows, slopes = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])  # (N, in), (N, out)
    grads = (
        lambda: (slopes @ weight).reshape(x.shape),
        lambda: slopes.T @ rows,  # (out, N) @ (N, in) -> (out, in)
        lambda: np.ones(len(slopes), slopes.dtype) @ slopes,  # their sum; BLAS adds faster than np.add.reduce
    )
    return grads[:2] if bias is None else grads

# %% [markdown]
"""
**Cross entropy** is softmax, log, pick, mean: four steps with four rules. Multiplied out, nearly all of it
cancels:

    gradient of the logits = (probabilities - one-hot target) / number of rows that count

    probabilities [0.5 0.25 0.25], target 1, one row   ->   [0.5 -0.75 0.25]

Push the right class up, the others down, each in proportion to the error. Rows with `ignore_index` do not count
and get 0.

**Build** it on rows: `rows` is (N, C), `ids` is (N,), `counted` marks the rows that count. `grad` is a single
number.
"""

# %% nbgrader={"grade": false, "grade_id": "05-cross-entropy", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def cross_entropy_gradient(grad, rows, ids, counted):
    """Gradient of the mean cross entropy: rows (N, C), ids (N,) ints, counted (N,) booleans -> (N, C)."""
    ### BEGIN SOLUTION
    slopes = softmax_array(rows)
    places = np.flatnonzero(counted)
    slopes[places, ids[places]] -= 1
    slopes[~counted] = 0
    slopes *= grad / max(len(places), 1)
    return slopes
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "05-cross-entropy-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_cross_entropy():
    """The oracle is the picture, then wiggling the loss of lesson 04."""
    row = np.log(np.array([[0.5, 0.25, 0.25]]))
    got = cross_entropy_gradient(np.array(1.0), row, np.array([1]), np.array([True]))
    assert np.shape(got) == (1, 3), f"got shape {np.shape(got)}, expected (1, 3)"
    assert np.allclose(got, [[0.5, -0.75, 0.25]]), (
        f"got {np.round(got, 4).tolist()}, expected [[0.5, -0.75, 0.25]]: probabilities minus 1 at the target"
    )
    rows, ids = np.random.default_rng(6).standard_normal((4, 3)), np.array([2, -100, 0, 2])
    got = cross_entropy_gradient(np.array(2.0), rows, ids, ids != -100)
    expected = 2 * numeric_gradient(lambda x: cross_entropy(Tensor(x, dtype=np.float64), ids).item(), rows)
    assert got.shape == (4, 3), f"got shape {got.shape}, expected (4, 3)"
    assert np.allclose(got[1], 0), f"row 1 is ignored, but got {np.round(got[1], 4).tolist()}"
    ratio = got[0, 0] / expected[0, 0]
    assert np.allclose(got, expected, atol=1e-6), (
        f"4 rows, 3 of them counted, slope 2: got {ratio:.3f} times what wiggling says: "
        "divide by the rows that count, and multiply with what arrives"
    )
    ### BEGIN HIDDEN TESTS
    ids = np.array([0, 1, 1, 0])
    got = cross_entropy_gradient(np.float32(1), rows.astype(np.float32), ids, np.ones(4, dtype=bool))
    assert got.dtype == np.float32 and np.allclose(got.sum(axis=1), 0, atol=1e-6), "each row sums to 0"
    assert (ids == [0, 1, 1, 0]).all(), "the targets were changed"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_cross_entropy()

# %%
#| export
from tinytorch.core.losses import bce_array, bce_with_logits_array, cross_entropy_array, mse_array, safe_log


@gradient(cross_entropy_array)
def cross_entropy_rule(grad, output, logits, target, ignore_index=-100):
    rows, ids = logits.reshape(-1, logits.shape[-1]), np.reshape(target, -1)
    return cross_entropy_gradient(grad, rows, ids, ids != ignore_index).reshape(logits.shape), None


@gradient(mse_array)
def mse_rule(grad, output, prediction, target):
    target = np.asarray(target, prediction.dtype)  # counts as a target would widen the difference
    slopes = (prediction - target) * (2 * grad / prediction.size)
    return slopes, lambda: -slopes


@gradient(bce_array)
def bce_rule(grad, output, probabilities, target):
    p, share = probabilities, grad / probabilities.size
    target = np.asarray(target, p.dtype)
    return (
        lambda: share * (p - target) / np.maximum(p * (1 - p), 1e-12),
        lambda: share * (safe_log(1 - p) - safe_log(p)),
    )


@gradient(bce_with_logits_array)
def bce_with_logits_rule(grad, output, logits, target):
    share, target = grad / logits.size, np.asarray(target, logits.dtype)
    return lambda: share * (sigmoid_array(logits) - target), lambda: -share * logits

# %% [markdown]
"""
## 6. Who came from whom

Rules are local. To walk from a loss to its parameters we need to know which operation made which Tensor. Lesson
01 left a socket for exactly that: `apply` tells an engine `record(op, inputs, params, output)`.

Our engine leaves a `Node` on the output: all that the rule will need. The inputs have nodes of their own, so
the nodes form a graph, and nobody has to keep a list. When a loss is thrown away, its graph goes with it.
"""

# %%
#| export
class Node:
    """Where a Tensor came from."""

    __slots__ = ("op", "inputs", "params", "output")

    def __init__(self, op, inputs, params, output):
        self.op = op
        self.inputs = inputs
        self.params = params
        self.output = output  # the array, not the Tensor: a Tensor that knew itself would never be freed


FREED = Node(None, (), {}, None)

# %% [markdown]
"""
Most operations need no node: nobody will ask for the gradient of data, of generated text, of a comparison.

**Build** `record`. Leave a node, and set `output.requires_grad`, only if some input is a Tensor that requires a
gradient **and** the output is floating (`output.dtype.kind == "f"`). Inputs may also be arrays, numbers or
None. This runs once per operation: be brief.
"""

# %% nbgrader={"grade": false, "grade_id": "05-record", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def record(op, inputs, params, output):
    """Leave a Node(op, inputs, params, output.data) as output._node where a gradient will be wanted."""
    ### BEGIN SOLUTION
    for x in inputs:
        if isinstance(x, Tensor) and x.requires_grad:
            if output.data.dtype.kind == "f":
                output.requires_grad = True
                output._node = Node(op, inputs, params, output.data)
            return
    ### END SOLUTION

# %%
class Recorder:
    """An engine that only records."""

    def __init__(self, record):
        self.record = record


def recorded(work):
    """The result of `work` with your record plugged in."""
    previous = plug_in(Recorder(record))
    try:
        return work()
    finally:
        plug_in(previous)


def one(tensor):
    """The slope of a single number against itself."""
    return np.ones_like(tensor.data)

# %% nbgrader={"grade": true, "grade_id": "05-record-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_record():
    """The oracle is the list in the text above."""
    w, x = Tensor([2.0, 3.0], requires_grad=True), Tensor([1.0, 4.0])
    for text, work, wanted in [("w * x", lambda: w * x, True), ("x * w", lambda: x * w, True),
                               ("1.0 - w", lambda: 1.0 - w, True), ("x * x", lambda: x * x, False),
                               ("w > 1", lambda: w > 1, False), ("w.argmax()", lambda: w.argmax(), False)]:
        output = recorded(work)
        assert output.requires_grad == wanted, f"{text}: requires_grad is {output.requires_grad}, expected {wanted}"
        assert (output._node is not None) == wanted, f"{text}: {'no node' if wanted else 'a node that nobody needs'}"
    output = recorded(lambda: (w * x).sum(dim=0))
    node = output._node
    assert node.op is sum_array and node.params["dim"] == 0, f"the node holds op {node.op}, params {node.params}"
    assert node.output is output.data, "the node must hold the output's array, not a Tensor and not a copy"
    product = node.inputs[0]
    held = product._node.inputs
    assert held[0] is w and held[1] is x, "the node of w * x must hold the Tensors w and x themselves"
    ### BEGIN HIDDEN TESTS
    assert recorded(lambda: np.array([1.0, 2.0]) * w)._node is not None, "an array on the left"
    assert recorded(lambda: w * 2)._node.inputs[1] == 2
    assert x._node is None and not x.requires_grad, "inputs stay as they are"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_record()

# %% [markdown]
"""
## 7. In which order?

A Tensor may hand its slope on only when **all** of its users have delivered theirs. In `y = x + x; z = y + y`,
`y` has two users. Following every path separately gives the right sums, but how many paths are there?

**Predict** the number of paths from the end to `x` after twenty such doublings, `x = x + x`.
"""

# %% nbgrader={"grade": false, "grade_id": "05-predict-paths", "locked": false, "schema_version": 3, "solution": true, "task": false}
# predicted_paths = ...  (a whole number)
### BEGIN SOLUTION
predicted_paths = 2**20
### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "05-predict-paths-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_predict_paths():
    """The oracle is the gradient itself: each path adds slope 1, and doubling twenty times is linear."""
    value = 1
    for _ in range(20):
        value = value + value
    assert predicted_paths == value, (
        f"predicted {predicted_paths}, but there are {value}: each doubling offers two ways, for every way so far"
    )


if __name__ == "__main__":
    test_unit_predict_paths()

# %% [markdown]
"""
So we need an order in which every Tensor comes once: a **topological order**, parents (inputs) before the ones made
from them, the root last. Walking it backwards, every user is done before its inputs.

    parents: loss <- p, c     p <- a, b     a <- x     b <- x
    a valid order: x a b p c loss

Go down to the parents first, and write a node down on the way **back**. Recursion says that in three lines, and breaks
on a graph deeper than Python's stack. So keep a stack of your own, of pairs: (node, False) means "look at its parents",
(node, True) "its parents are written down, now write this one".

**Build** it. Nodes are anything hashable; `parents(node)` gives a list. Look at every node's parents once only.
"""

# %% nbgrader={"grade": false, "grade_id": "05-topological", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def topological_order(root, parents):
    """All nodes that root comes from, each once, parents before children, root last.

    >>> graph = {"loss": ["p", "c"], "p": ["x"], "c": ["x"], "x": []}
    >>> topological_order("loss", graph.get)
    ['x', 'c', 'p', 'loss']
    """
    order, seen, stack = [], set(), [(root, False)]
    ### BEGIN SOLUTION
    while stack:
        node, finished = stack.pop()
        if finished:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((parent, False) for parent in parents(node) if parent not in seen)
    return order
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "05-topological-test", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
def test_unit_topological():
    """The oracle is the definition, checked edge by edge; a counter watches how often we look."""
    picture = {"loss": ["p", "c"], "p": ["a", "b"], "a": ["x"], "b": ["x"], "c": [], "x": [], "elsewhere": ["x"]}
    late = {"d": ["a", "c"], "c": ["b"], "b": ["a"], "a": []}
    doublings = {i: [i - 1, i - 1] for i in range(1, 19)} | {0: []}
    for root, graph in [("loss", picture), ("d", late), (18, doublings)]:
        looks = []
        order = topological_order(root, lambda node, graph=graph, looks=looks: looks.append(node) or graph[node])
        assert isinstance(order, list) and order, f"got {order!r}, need a list that ends with the root"
        twice = [node for node in set(looks) if looks.count(node) > 1][:1]
        assert not twice, f"looked at the parents of {twice[0]} more than once: remember what you have seen"
        assert len(order) == len(set(order)), f"a node stands in the order twice: {order}"
        assert order[-1] == root, f"the root must be last, got {order}"
        assert set(order) == set(looks) and "elsewhere" not in order, f"exactly what {root} comes from, got {order}"
        for node in order:
            for parent in graph[node]:
                assert order.index(parent) < order.index(node), (
                    f"{parent} is a parent of {node} but comes after it: write a node down after its parents. {order}"
                )
    chain = {i: [i - 1] for i in range(1, 20_000)} | {0: []}
    words = message_of(lambda: topological_order(19_999, chain.get), RecursionError)
    assert words is None, "a chain of 20,000 broke the recursion limit: keep a stack of your own"
    ### BEGIN HIDDEN TESTS
    assert topological_order(19_999, chain.get) == list(range(20_000)), "a chain has one order"
    assert topological_order("x", picture.get) == ["x"], "a leaf alone"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_topological()

# %% [markdown]
"""
## 8. The walk

Four helpers first. `parents_of` lists the inputs that want a gradient, and complains before anything has been
changed. `local_gradients` asks the rule and makes the answers fit: shape of the input, dtype of the input. An
array that others may hold as well is only **lent**: it comes as a view that cannot be written to. What a rule
computes on demand, by a `lambda`, is new, and given away.
"""

# %%
#| export
def parents_of(tensor):
    """The inputs that want a gradient; none for a leaf."""
    node = tensor._node
    if node is None:
        return ()
    if node is FREED:
        raise RuntimeError(
            "backward() came to a part of the graph that an earlier backward() has used up. "
            "Run the forward pass again, or add the losses up and call backward() once."
        )
    if node.op not in RULES:
        name = getattr(node.op, "__name__", repr(node.op))
        raise NotImplementedError(f"there is no gradient rule for {name}: write one with @gradient({name}).")
    return [x for x in node.inputs if isinstance(x, Tensor) and x.requires_grad]


def lend(array):
    """A view of an array that cannot be written to: who wants to keep it makes a copy."""
    view = np.asarray(array).view()
    view.flags.writeable = False
    return view


def fit(grad, array, op):
    """A rule's gradient with the shape and the dtype of the input it belongs to."""
    grad = np.asarray(grad()) if callable(grad) else lend(grad)
    if grad.shape != array.shape:
        if grad.ndim < array.ndim or any(n not in (1, m) for n, m in zip(array.shape[::-1], grad.shape[::-1])):
            raise ValueError(f"the rule of {op.__name__} gave shape {grad.shape} for an input of shape {array.shape}.")
        grad = unbroadcast(grad, array.shape)
    return grad if grad.dtype == array.dtype else grad.astype(array.dtype)


def local_gradients(node, grad):
    """Pairs (input, its gradient) for the inputs of one operation that want one."""
    results = RULES[node.op](lend(grad), node.output, *unwrap(node.inputs), **node.params)
    return [
        (x, fit(result, x.data, node.op))
        for x, result in zip(node.inputs, results)
        if result is not None and isinstance(x, Tensor) and x.requires_grad
    ]

# %% [markdown]
"""
The walk ends at **leaves**: Tensors that no operation made, such as weights. There the gradient stays, in
`leaf.grad`, a Tensor. If there is one already, the new one is **added**: a batch too large for memory can then
be run in two halves. (That is also why training sets gradients to None before each step.)

**Build** `accumulate`. The first gradient must be a copy where the array is only lent, for then it may belong
to another leaf as well. One that is writeable, `grad.flags.writeable`, is a gift: no copy needed.
"""

# %% nbgrader={"grade": false, "grade_id": "05-accumulate", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def accumulate(leaf, grad):
    """Add an array to leaf.grad, a Tensor of the leaf's dtype that owns its memory."""
    if leaf.dtype.kind != "f":
        raise TypeError(f"a Tensor of {leaf.dtype} cannot hold a gradient: make it with dtype=np.float32.")
    ### BEGIN SOLUTION
    if leaf.grad is None:
        leaf.grad = Tensor(grad if grad.flags.writeable else grad.copy(), dtype=leaf.dtype)
    else:
        leaf.grad.data += grad
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "05-accumulate-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_accumulate():
    """The oracle is addition; np.shares_memory looks for a shared array."""
    first, second = Tensor([0.0, 0.0], requires_grad=True), Tensor([0.0, 0.0], requires_grad=True)
    arriving = lend(np.array([1.0, 2.0], dtype=np.float32))
    accumulate(first, arriving)
    accumulate(second, arriving)
    assert isinstance(first.grad, Tensor), f"grad is {type(first.grad).__name__}, need a Tensor"
    assert first.grad.shape == (2,) and first.grad.dtype == np.float32, f"got {first.grad!r}"
    assert not np.shares_memory(first.grad.data, second.grad.data), "two leaves share one gradient: copy what is lent"
    accumulate(first, np.array([10.0, 20.0], dtype=np.float32))
    assert first.grad.data.tolist() == [11.0, 22.0], (
        f"[1, 2] and then [10, 20]: got {first.grad.data.tolist()}, expected [11, 22]: "
        "the second is added, it does not replace the first"
    )
    assert second.grad.data.tolist() == [1.0, 2.0], f"the other leaf changed to {second.grad.data.tolist()}"
    ### BEGIN HIDDEN TESTS
    wide = Tensor([[1.0]], requires_grad=True, dtype=np.float64)
    accumulate(wide, np.array([[0.1]]))
    accumulate(wide, np.array([[0.2]]))
    assert wide.grad.dtype == np.float64 and wide.grad.item() == 0.1 + 0.2, "float64 leaves keep float64 gradients"
    assert arriving.tolist() == [1.0, 2.0], "the array that arrived was changed"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_accumulate()

# %% [markdown]
"""
Now the walk itself. `grads` holds what has been delivered so far, by Tensor. Take Tensors from the **end** of
the order (`order.pop()`). For each:

1. take its gradient out of `grads`, and its node;
2. a leaf (node None): accumulate;
3. otherwise mark it `FREED`, so that the node and the arrays it holds can go at once, and deliver the
   `local_gradients`: **add** where something was delivered already, and never in place (the array may be
   lent, and NumPy then says "read-only").

A gradient can also be missing (None), when a rule gave none: then there is nothing to do but free the node.

**Build** the loop.
"""

# %% nbgrader={"grade": false, "grade_id": "05-backpropagate", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def backpropagate(tensor, grad):
    """Carry the array `grad` from a Tensor to all leaves that it came from, freeing the graph on the way."""
    order = topological_order(tensor, parents_of)
    grads = {tensor: grad}
    ### BEGIN SOLUTION
    while order:
        tensor = order.pop()
        grad, node = grads.pop(tensor, None), tensor._node
        if node is not None:
            tensor._node = FREED
        if grad is None:
            continue
        if node is None:
            accumulate(tensor, grad)
            continue
        for x, share in local_gradients(node, grad):
            grads[x] = grads[x] + share if x in grads else share
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "05-backpropagate-test", "locked": true, "points": 4, "schema_version": 3, "solution": false, "task": false}
def test_unit_backpropagate():
    """The oracle is school arithmetic on small graphs, and a counter on the rules."""
    a, b, c = (Tensor(value, requires_grad=True) for value in (2.0, 5.0, 1.0))
    loss = recorded(lambda: a * b + c)
    backpropagate(loss, one(loss))
    got = [t.grad.item() if t.grad is not None else None for t in (a, b, c)]
    assert got == [5.0, 2.0, 1.0], f"a * b + c at 2, 5, 1: got slopes {got}, expected [5, 2, 1]"

    x = Tensor(3.0, requires_grad=True)
    loss = recorded(lambda: (y := x * x) * y + y)  # x^4 + x^2, slope 4 x^3 + 2 x = 114; y has three users
    backpropagate(loss, one(loss))
    assert x.grad.item() == 114.0, (
        f"y = x * x; y * y + y at 3: got slope {x.grad.item()}, expected 114: y is used three times, "
        "its slopes add up, and it hands them on only when all have come"
    )
    assert loss._node is FREED, "the loss still holds its node: mark each Tensor FREED when it is done"
    words = message_of(lambda: backpropagate(loss, one(loss)), RuntimeError)
    assert words is not None and "used up" in words, "a second walk over a freed graph must be refused"

    w, bias = Tensor([1.0, 2.0], requires_grad=True), Tensor([0.5, 0.5], requires_grad=True)
    total = recorded(lambda: (w + bias) + w)
    backpropagate(total, one(total))
    assert w.grad.data.tolist() == [2.0, 2.0], f"w is used twice: got {w.grad.data.tolist()}, expected [2, 2]"
    assert bias.grad.data.tolist() == [1.0, 1.0], f"bias is used once: got {bias.grad.data.tolist()}, expected [1, 1]"
    ### BEGIN HIDDEN TESTS
    x = Tensor(1.0, requires_grad=True)
    y = x
    for _ in range(20):
        y = recorded(lambda y=y: y + y)
    backpropagate(y, one(y))
    assert x.grad.item() == 2.0**20, f"twenty doublings: got {x.grad.item()}"
    stretched = Tensor([[1.0], [2.0]], requires_grad=True)
    total = recorded(lambda: (stretched * Tensor([[1.0, 2.0, 3.0]])).sum())
    backpropagate(total, one(total))
    assert stretched.grad.shape == (2, 1) and stretched.grad.data.tolist() == [[6.0], [6.0]]
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_backpropagate()

# %% [markdown]
"""
## 9. Plug it in

What is left is the front door: `backward` checks what it is asked for, in words, and begins the walk.
`enable_autograd` plugs the engine into the socket; calling it twice does no harm. From here on every operation
with a Tensor that requires a gradient is recorded.
"""

# %%
#| export
def backward(tensor, gradient=None):
    """Fill .grad of every leaf that tensor came from; gradient is the slope that arrives, 1 for a single number."""
    if not tensor.requires_grad:
        raise RuntimeError(
            "backward() needs a Tensor that was computed from one with requires_grad=True, and not inside no_grad()."
        )
    if gradient is None and tensor.size != 1:
        raise RuntimeError(
            f"backward() without a gradient needs a single number, this Tensor has shape {tensor.shape}. "
            "Reduce it with sum() or mean(), or pass backward(gradient) with a gradient of that shape."
        )
    grad = lend(np.ones(tensor.shape, tensor.dtype) if gradient is None else np.asarray(gradient, dtype=tensor.dtype))
    if grad.shape != tensor.shape:
        raise ValueError(f"backward(gradient) needs the shape of the Tensor, {tensor.shape}, got {grad.shape}.")
    backpropagate(tensor, grad)


class Engine:
    """What lesson 01's socket takes."""

    record = staticmethod(record)
    backward = staticmethod(backward)


ENGINE = Engine()


def enable_autograd():
    """Plug the engine in: from now on gradients are recorded."""
    plug_in(ENGINE, everywhere=True)


enable_autograd()

# %%
if __name__ == "__main__":
    x = Tensor([1.0, 2.0, 3.0], requires_grad=True)
    loss = ((1.0 - x) ** 2).mean()
    loss.backward()
    print(loss, x.grad)
    print(message_of(lambda: (x * 2).backward(), RuntimeError))
    print(message_of(loss.backward, RuntimeError))

# %% [markdown]
"""
Generating text or measuring a loss needs no graph. `with no_grad():` unplugs the engine for a block, and the
nodes are never made. It is also where a weight may be moved: `w -= lr * w.grad` is not part of any loss.

**Build** it as a generator: what stands before `yield` runs on entering, what stands after it on leaving. It
must put back **what was there** (blocks may be nested), and also when the block ends with an error. `plug_in`
returns the previous engine.
"""

# %% nbgrader={"grade": false, "grade_id": "05-no-grad", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
@contextmanager
def no_grad():
    """Record nothing within the block; serves as a decorator, too.

    >>> with no_grad():
    ...     (Tensor([1.0], requires_grad=True) * 2).requires_grad
    False
    """
    ### BEGIN SOLUTION
    previous = plug_in(None)
    try:
        yield
    finally:
        plug_in(previous)
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "05-no-grad-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_no_grad():
    """The oracle is whether a product of a weight wants a gradient."""
    w = Tensor([1.0], requires_grad=True)
    enable_autograd()
    with no_grad():
        assert not (w * 2).requires_grad, "inside no_grad() an operation was recorded"
        with no_grad():
            pass
        assert not (w * 2).requires_grad, "leaving an inner block switched recording on: put back what was there before"
    assert (w * 2).requires_grad, "after no_grad() nothing is recorded any more: plug the engine back in"

    def fail():
        with no_grad():
            raise KeyError("on purpose")

    assert message_of(fail, KeyError) is not None, "an error inside the block must come out of it"
    plugged = (w * 2).requires_grad
    enable_autograd()
    assert plugged, "after an error inside no_grad() nothing is recorded: use try and finally"
    ### BEGIN HIDDEN TESTS
    engine = plug_in(None)
    with no_grad():
        pass
    assert plug_in(engine) is None, "no engine before, so none after"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_no_grad()

# %% [markdown]
"""
## 10. Never trust a gradient

A wrong gradient does not crash. The loss even goes down, only more slowly, and nobody notices. So every rule in
this course, also those of later lessons, is held against wiggling. `check_gradients` does it for any function
of Tensors, in float64, where wiggling is precise enough to judge.
"""

# %%
#| export
def check_gradients(function, *arrays, eps=1e-6, tolerance=1e-5):
    """Compare backward() with central differences; AssertionError names input, index, got and expected.

    Arrays are taken in float64; floating ones get a gradient, integers (ids, targets) are handed on as they are.

    >>> check_gradients(lambda x: x.exp().sum(), np.array([0.5, -1.0]))
    """
    arrays = [np.asarray(a, dtype=np.float64) if np.asarray(a).dtype.kind == "f" else np.asarray(a) for a in arrays]
    inputs = [Tensor(a, requires_grad=a.dtype.kind == "f", dtype=a.dtype) for a in arrays]
    output = function(*inputs)
    slopes = np.random.default_rng(0).standard_normal(output.shape)
    backward(output, slopes)
    for i, (x, array) in enumerate(zip(inputs, arrays)):
        if not x.requires_grad:
            continue

        def value(moved, i=i):
            with no_grad():
                moved_inputs = [*inputs[:i], Tensor(moved, dtype=np.float64), *inputs[i + 1 :]]
                return float((function(*moved_inputs).data * slopes).sum())

        expected = numeric_gradient(value, array, eps)
        got = np.zeros_like(array) if x.grad is None else x.grad.data
        wrong = np.argwhere(~(np.abs(got - expected) <= tolerance * (1 + np.abs(expected))))
        if len(wrong):
            index = tuple(int(n) for n in wrong[0])
            raise AssertionError(
                f"gradient of input {i} at index {index}: got {got[index]:.8g}, "
                f"central differences say {expected[index]:.8g}"
            )

# %%
if __name__ == "__main__":
    rng = np.random.default_rng(0)
    check_gradients(lambda x, w: (x @ w).exp().mean(), rng.standard_normal((4, 3)), rng.standard_normal((3, 2)))
    print(message_of(lambda: check_gradients(lambda x: x * x.detach(), np.array([1.0, 3.0])), AssertionError))

# %% [markdown]
"""
The second one went wrong on purpose: `detach()` hides half of the square. This is what a mistake looks like.

Now the price. The same network as in section 1, and the same question: what does one gradient cost, measured in
losses?
"""

# %% nbgrader={"grade": false, "grade_id": "05-measure-backward", "locked": true, "schema_version": 3, "solution": false, "task": false}
def measure_backward(repeats=10):
    """The time of a loss, of the loss with recording, and of the walk back, on the digits network."""
    manual_seed(0)
    first, second, x = Linear(784, 128), Linear(128, 10), randn(32, 784)
    target = np.arange(32) % 10

    def loss():
        hidden = first(x)
        return cross_entropy(second(hidden * (hidden > 0)), target)

    best = {"loss, no_grad": math.inf, "loss, recorded": math.inf, "backward": math.inf}
    for _ in range(repeats):
        start = time.perf_counter()
        with no_grad():
            loss()
        middle = time.perf_counter()
        result = loss()
        recorded_at = time.perf_counter()
        result.backward()
        times = (middle - start, recorded_at - middle, time.perf_counter() - recorded_at)
        best = {name: min(best[name], taken) for name, taken in zip(best, times)}
    for name, taken in best.items():
        print(f"{name:15s} {taken * 1e3:7.3f} ms")
    print(f"all 101,770 slopes for the price of {best['backward'] / best['loss, no_grad']:.1f} losses, not 203,540")


if __name__ == "__main__":
    measure_backward()

# %% [markdown]
"""
Look back:

* `record` keeps the output of every operation until the walk. What does that mean for the memory of a deep
  network, and how would you trade time for it?
* `relu` at exactly 0: which slope did we choose? Would wiggling agree?
* Why would `leaf.grad = grad` pass almost every test with a single use of each weight?

## 11. Everything at once

Depth, garbage, and a small training loop: 2-16-1 on XOR, which no single layer can do.
"""

# %%
def train_xor(steps=300, lr=0.1):
    """Losses of a small network on XOR, by plain gradient descent."""
    manual_seed(7)
    x, target = Tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]), Tensor([[0.0], [1.0], [1.0], [0.0]])
    weights = [randn(*shape, requires_grad=True) for shape in [(2, 16), (16,), (16, 1), (1,)]]
    w1, b1, w2, b2 = weights
    losses = []
    for _ in range(steps):
        loss = mse_loss(tanh(x @ w1 + b1) @ w2 + b2, target)
        loss.backward()
        with no_grad():
            for w in weights:
                w -= lr * w.grad  # downhill; lesson 06 does this properly
                w.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    losses = train_xor()
    print("loss at steps 0, 10, 100, 299:", *(f"{losses[i]:.4f}" for i in (0, 10, 100, 299)))

# %% nbgrader={"grade": true, "grade_id": "05-module-test", "locked": true, "points": 5, "schema_version": 3, "solution": false, "task": false}
def test_module():
    """Every check of the lesson, then depth, garbage, dtype, and a network against wiggling."""
    for check in (test_unit_numeric, test_unit_predict_runs, test_unit_multiply, test_unit_unbroadcast,
                  test_unit_matmul, test_unit_max, test_unit_index, test_unit_softmax, test_unit_cross_entropy,
                  test_unit_record, test_unit_predict_paths, test_unit_topological, test_unit_accumulate,
                  test_unit_backpropagate, test_unit_no_grad):
        check()
    enable_autograd()
    x = Tensor(1.0, requires_grad=True)
    deep = x
    for _ in range(20_000):
        deep = deep + 0.0
    deep.backward()
    assert x.grad.item() == 1.0, f"a chain of 20,000 additions: got slope {x.grad.item()}, expected 1"

    middle = Tensor([1.0, 2.0], requires_grad=True) * 2.0
    watch, loss = weakref.ref(middle), (middle * middle).sum()
    del middle
    gc.disable()
    try:
        loss.backward()
        assert watch() is None, "a Tensor in the middle outlived backward(): the graph is not freed on the way"
    finally:
        gc.enable()

    rng, ids = np.random.default_rng(9), np.array([1, 0, 2, 2])
    check_gradients(
        lambda x, w1, b1, w2: cross_entropy((1.0 / ((-(x @ w1 + b1)).exp() + 1.0)) @ w2, ids),
        rng.standard_normal((4, 3)), rng.standard_normal((3, 5)), rng.standard_normal(5), rng.standard_normal((5, 3)),
    )
    w = Tensor([[0.5, -1.0]], requires_grad=True)
    (((w * 3 - 1) / 2) ** 2).mean().backward()
    assert w.grad.shape == (1, 2) and w.grad.dtype == np.float32, f"float32 weights got a gradient {w.grad!r}"
    losses = train_xor()
    assert len(losses) == 300, f"XOR: {len(losses)} losses, expected 300"
    assert losses[-1] < 0.1 * losses[0], f"XOR: the loss went from {losses[0]:.3f} only to {losses[-1]:.3f}"


if __name__ == "__main__":
    test_module()
    print("Lesson 05 holds.")

# %% [markdown]
"""
## Summary

* A gradient is a slope per number; wiggling finds it honestly, at two losses per number.
* One rule per operation: what arrives, times the local slope. Several uses add up.
* Stretched on the way there, summed on the way back, in one place.
* A topological order visits every Tensor once; a stack of our own makes depth harmless.
* The walk frees what it has passed; a second walk is an error, in words.
"""

# %% [markdown]
"""
**Exercises.** (1) Write an operation `cube_array` with its rule and hold it against `check_gradients`. (2)
Remove the `lambda`s from `linear_rule` and time `measure_backward` again: which gradient does nobody want? (3)
Make `topological_order` recursive and find the depth at which it breaks.

**Design note.** PyTorch records a graph while the program runs, as we do, and frees it during backward unless
asked to keep it. JAX traces a function first and differentiates the trace. The first lets a model be any Python
program, with loops and prints; the second sees the whole computation before it runs and can compile it. Source:
A. Paszke et al., *PyTorch: An Imperative Style, High-Performance Deep Learning Library*, NeurIPS 2019, sections
4 and 5.

**Next.** The training loop above moved its weights by hand, and its step size was a guess. Lesson 06
builds optimizers.
"""

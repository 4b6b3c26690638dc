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
#     lesson: "02"
# ---

# %% [markdown]
"""
# Lesson 02: Activations

**You build** the functions that bend a line: ReLU, sigmoid, GELU, softmax and log-softmax, each safe for
very large numbers, and the small modules that wrap them.

**You need** lesson 01 (`Tensor` and `apply`).

**Exported to** `tinytorch/core/activations.py`.

**Time** about 60 minutes.

Each function is first a plain array function: NumPy array in, NumPy array out. One line then sends it
through the door of lesson 01, `apply`. That is the pattern of the whole course.
"""

# %%
#| default_exp core.activations
#| export
import math

import numpy as np

from tinytorch.core.tensor import apply

# %%
import time
import warnings

from tinytorch.core.tensor import Tensor, plug_in

# %% [markdown]
"""
## 0. A ruler for the checks

The checks of this lesson share two helpers. `check_array` compares shape first, then the dtype, then the
values, because an empty or a broadcast array would pass a comparison of values alone. `silently` runs a
function and refuses any warning: a function that overflows and still returns the right number is not
finished.
"""

# %%
def check_array(got, expected, mistake, tolerance=1e-6, dtype=np.float32):
    """Compare shape, dtype and values; say got, expected, and what the difference looks like."""
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape, f"shape: got {got.shape}, expected {expected.shape}. {mistake}"
    wrong = f"dtype: got {got.dtype}, expected {np.dtype(dtype)}: a constant or a cast changed it"
    assert got.dtype == dtype, wrong
    same = np.allclose(got, expected, rtol=tolerance, atol=tolerance * 1e-3, equal_nan=True)
    assert same, f"got {got.tolist()}, expected {expected.tolist()}. {mistake}"


def silently(function, *inputs, **params):
    """Call the function; any NumPy warning becomes a failed check."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function(*inputs, **params)
    complaint = caught[0].message if caught else ""
    assert not caught, f"NumPy warned: {complaint}. Look for an exp of a large number, inf - inf, or 0 / 0"
    return result


# %% [markdown]
"""
## 1. Why bend a line?

A linear layer multiplies by a matrix. Two linear layers multiply by two matrices, and two matrices in a row
are one matrix. So depth alone buys nothing. The smallest task that a line cannot do is XOR: 1 where exactly
one of two inputs is 1. We ask least squares for the best possible line.
"""

# %%
XOR_INPUTS = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], np.float32)
XOR_TARGETS = np.array([0, 1, 1, 0], np.float32)

if __name__ == "__main__":
    first, second = np.random.default_rng(2).standard_normal((2, 4, 4))
    one_matrix = first @ second
    print("two layers minus one layer:", np.abs(np.eye(4) @ first @ second - one_matrix).max())

    with_bias = np.column_stack([XOR_INPUTS, np.ones(4)])
    line = np.linalg.lstsq(with_bias, XOR_TARGETS, rcond=None)[0]
    print("best line on XOR:", (with_bias @ line).round(3), "wanted:", XOR_TARGETS)

# %% [markdown]
"""
The best line answers one half to every question. We need something between the layers that is not linear.

**Picture.** The rectified linear unit keeps what is positive and cuts the rest:

    x        -2   -0.5    0    1.5    3
    relu(x)   0    0      0    1.5    3

**Predict.** We draw 10,000 numbers from a normal distribution around 0. Which share of them does ReLU leave
different from 0?
"""

# %% nbgrader={"grade": false, "grade_id": "02-predict-survivors", "locked": false, "schema_version": 3, "solution": true, "task": false}
# predicted_survivors = ...  (a number between 0 and 1)
### BEGIN SOLUTION
predicted_survivors = 0.5
### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "02-predict-survivors-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_predict_survivors():
    """Oracle: count the positive numbers of a normal sample."""
    sample = np.random.default_rng(0).standard_normal(10_000)
    share = np.mean(sample > 0)
    wrong = f"got {predicted_survivors}, measured {share}: ReLU keeps exactly the positive numbers. How many?"
    assert abs(predicted_survivors - share) < 0.05, wrong


if __name__ == "__main__":
    test_unit_predict_survivors()

# %% [markdown]
"""
**Build.** First the worked sibling. `tanh` has a NumPy function, so our part is the dtype: integers go in
as float32, and what is floating stays what it is. `as_float` does that, here and in later lessons.
"""

# %%
#| export
def as_float(x):
    """Return x itself where it is floating, else as float32 (NumPy alone would choose float64).

    >>> as_float(np.array([1, 2])).dtype
    dtype('float32')
    """
    x = np.asarray(x)
    return x if x.dtype.kind == "f" else x.astype(np.float32)


def tanh_array(x):
    """Squash into (-1, 1), any shape.

    >>> tanh_array(np.array([0.0, 100.0]))
    array([0., 1.])
    """
    return np.tanh(as_float(x))


# %% [markdown]
"""
ReLU is one call. Integers may stay integers here: nothing is rounded by cutting.
"""

# %% nbgrader={"grade": false, "grade_id": "02-relu", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def relu_array(x):
    """Keep what is positive, replace the rest by 0; any shape, a new array.

    >>> relu_array(np.array([-2.0, 1.5]))
    array([0. , 1.5])
    """
    ### BEGIN SOLUTION
    return np.maximum(x, 0)
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "02-relu-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_relu():
    """Oracle: the numbers of the picture."""
    x = np.array([[-2, -0.5, 0, 1.5, 3]], np.float32)
    before = x.copy()
    check_array(relu_array(x), [[0, 0, 0, 1.5, 3]], "Negative numbers become 0, positive ones stay")
    assert np.array_equal(x, before), f"the input was changed from {before} to {x}: return a new array"
    ### BEGIN HIDDEN TESTS
    z = np.random.default_rng(1).standard_normal((3, 4, 5)).astype(np.float32) * 10
    loop = np.array([v if v > 0 else 0 for v in z.ravel()], np.float32).reshape(z.shape)
    check_array(relu_array(z), loop, "Negative numbers become 0, positive ones stay")
    check_array(relu_array(np.array([-3, 4])), [0, 4], "Integers stay integers", dtype=np.int64)
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_relu()

# %% [markdown]
"""
**Look back.** Two ReLUs are enough for XOR: `relu(a + b) - 2 relu(a + b - 1)`. Work it out for the four
inputs; the module test at the end does the same with matrices.

What if ReLU returned its input array, changed in place? Then `x` would be gone for everyone who still needs
it, and lesson 05 needs it for the gradient.

## 2. How large a number survives `exp`?

The sigmoid turns any number into a probability: `sigmoid(x) = 1 / (1 + exp(-x))`. Written like that it
works for small numbers. We run it on large ones.
"""

# %%
def sigmoid_textbook(x):
    return 1 / (1 + np.exp(-x))


if __name__ == "__main__":
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        print(sigmoid_textbook(np.array([-1000, -2, 0, 2], np.float32)))
    print("NumPy says:", [str(w.message) for w in caught])

# %% [markdown]
"""
The result is right by luck: `1 / inf` is 0. With a gradient, or as a part of something larger, that `inf`
becomes `inf / inf`, which is NaN.

**Predict.** float32 ends near 3.4e38. What is the largest whole number `n` for which `exp(n)` is still
finite in float32? (A logarithm helps: `math.log(3.4e38)`.)
"""

# %% nbgrader={"grade": false, "grade_id": "02-predict-limit", "locked": false, "schema_version": 3, "solution": true, "task": false}
# predicted_limit = ...  (a whole number)
### BEGIN SOLUTION
predicted_limit = 88
### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "02-predict-limit-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_predict_limit():
    """Oracle: try them all in float32."""
    with np.errstate(over="ignore"):
        finite = [n for n in range(1000) if np.isfinite(np.exp(np.float32(n)))]
    wrong = f"got {predicted_limit}, measured {max(finite)}: exp(n) = 3.4e38 at n = ln(3.4e38), rounded down"
    assert predicted_limit == max(finite), wrong


if __name__ == "__main__":
    test_unit_predict_limit()

# %% [markdown]
"""
**Picture.** We may write the sigmoid in two ways, and each is safe on one side:

    x >= 0:   1 / (1 + exp(-x))           exp of something that is not positive: at most 1
    x <  0:   exp(x) / (1 + exp(x))       the same, and equal to the line above

With `e = exp(-|x|)`, which never exceeds 1, both have the denominator `1 + e`. The numerator is 1 on the
right side and `e` on the left side.

**Build.** Beware: `np.where(condition, a, b)` computes `a` *and* `b` everywhere, then chooses. An unsafe
branch warns also where it is not chosen.
"""

# %% nbgrader={"grade": false, "grade_id": "02-sigmoid", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def sigmoid_array(x):
    """Squash into (0, 1) without overflow, any shape: 1 / (1 + exp(-x)).

    >>> sigmoid_array(np.array([-1e4, 0.0, 1e4]))
    array([0. , 0.5, 1. ])
    """
    x = as_float(x)
    ### BEGIN SOLUTION
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, e) / (1 + e)
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "02-sigmoid-test", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
def test_unit_sigmoid():
    """Oracle: the textbook formula in Python's float64, where it does not overflow."""
    x = np.array([-20, -2, 0, 0.5, 3], np.float32)
    textbook = [1 / (1 + math.exp(-v)) for v in x.tolist()]
    check_array(silently(sigmoid_array, x), textbook, "On the left the numerator is e, not 1, and never 0")
    far = silently(sigmoid_array, np.array([-1e4, 1e4], np.float32))
    check_array(far, [0, 1], "Far out the sigmoid is 0 or 1, not NaN")
    ### BEGIN HIDDEN TESTS
    z = np.linspace(-40, 40, 81, dtype=np.float32).reshape(9, 9)
    textbook = np.array([1 / (1 + math.exp(-v)) for v in z.ravel().tolist()]).reshape(9, 9)
    check_array(silently(sigmoid_array, z), textbook, "On the left the numerator is e, not 1, and never 0")
    check_array(sigmoid_array(np.array([0, 1])), [0.5, 0.7310586], "Integers become float32")
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_sigmoid()

# %% [markdown]
"""
**Look back.** Replace -20 by -200 in your head: what does float32 make of `exp(-200)`? It underflows to 0,
silently, and 0 is the right answer. Overflow is the enemy, underflow to 0 is a friend.

## 3. What do transformers use?

ReLU has a corner at 0 and throws away everything on the left. The activations of today's language models
are smooth and let a little through. Two of them multiply the input by a soft switch:

    silu(x) = x * sigmoid(x)                                    Llama, Qwen
    gelu(x) = x * P(a standard normal number is below x)        GPT-2, BERT

`silu_array` is the worked sibling.
"""

# %%
#| export
def silu_array(x):
    """Multiply x by its own sigmoid, any shape (also called swish).

    >>> silu_array(np.array([-1e4, 0.0, 1e4]))
    array([   -0.,     0., 10000.])
    """
    x = as_float(x)
    return x * sigmoid_array(x)


# %% [markdown]
"""
The probability in GELU has no simple formula. GPT-2 uses the approximation of Hendrycks and Gimpel
(arXiv:1606.08415):

    gelu(x) = 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))

**Picture.** At x = 1: the bracket is 1.044715; times 0.797885 that is 0.833562; tanh 0.682384; so gelu(1) =
0.5 * 1.682384 = 0.841192.

**Build.** Two traps of NumPy wait here. `np.sqrt(...)` of a Python number gives a float64 scalar, and one
float64 scalar turns the whole float32 array into float64; `math.sqrt` does not, so the constant below uses
it. And `x ** 3` calls a general power function that is far slower than `x * x * x`: the next cell measures
it.
"""

# %% nbgrader={"grade": false, "grade_id": "02-gelu", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
SQRT_2_OVER_PI = math.sqrt(2 / math.pi)


def gelu_array(x):
    """Multiply x by the (approximate) chance that a normal number is below it; the tanh form, any shape.

    >>> gelu_array(np.array([-10.0, 0.0, 10.0]))
    array([-0.,  0., 10.])
    """
    x = as_float(x)
    ### BEGIN SOLUTION
    inner = np.empty_like(x)  # one buffer for every step: large temporaries cost more than the arithmetic
    np.multiply(x, x, out=inner)
    inner *= 0.044715 * SQRT_2_OVER_PI
    inner += SQRT_2_OVER_PI
    inner *= x  # sqrt(2/pi) (x + 0.044715 x^3)
    np.tanh(inner, out=inner)
    inner += 1
    inner *= x
    inner *= 0.5
    return inner
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "02-gelu-test", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
def gelu_of_number(v):
    """The formula, one Python number at a time: slow, and exact to 16 digits."""
    return 0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))


def test_unit_gelu():
    """Oracle: the number of the picture, and the formula in Python's float64."""
    check_array(gelu_array(np.array([1], np.float32)), [0.841192], "Compare with the picture", 2e-6)
    x = np.array([[-3, -0.5], [0, 2]], np.float32)
    formula = [[gelu_of_number(v) for v in row] for row in x.tolist()]
    check_array(silently(gelu_array, x), formula, "Check 0.5, sqrt(2/pi) and 0.044715", 1e-4)
    far = silently(gelu_array, np.array([-1e4, 1e4], np.float32))
    check_array(far, [0, 1e4], "Far left GELU is 0, far right it is x")
    ### BEGIN HIDDEN TESTS
    z = np.linspace(-2, 5, 30, dtype=np.float32).reshape(2, 3, 5)
    formula = [gelu_of_number(v) for v in z.ravel().tolist()]
    check_array(gelu_array(z), np.reshape(formula, z.shape), "Check 0.5, sqrt(2/pi) and 0.044715", 1e-4)
    check_array(gelu_array(np.array([0, 1])), [0, 0.841192], "Integers become float32", 2e-6)
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_gelu()

# %% [markdown]
"""
**Measure.** The same formula three times: with `x ** 3`, with `x * x * x`, and yours. A transformer runs
GELU on every number of its widest layer, so this is not a detail.
"""

# %% nbgrader={"grade": false, "grade_id": "02-measure-gelu", "locked": true, "schema_version": 3, "solution": false, "task": false}
def gelu_power(x):
    return 0.5 * x * (1 + np.tanh(SQRT_2_OVER_PI * (x + 0.044715 * x**3)))


def gelu_product(x):
    return 0.5 * x * (1 + np.tanh(SQRT_2_OVER_PI * (x + 0.044715 * x * x * x)))


def median_ms(function, x, repeats=7):
    """Median time of one call in milliseconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function(x)
        times.append(time.perf_counter() - start)
    return 1000 * sorted(times)[repeats // 2]


if __name__ == "__main__":
    wide = np.random.default_rng(3).standard_normal((128, 3072)).astype(np.float32)
    for function in (gelu_power, gelu_product, gelu_array):
        print(f"{function.__name__:13s} {median_ms(function, wide):7.2f} ms")

# %% [markdown]
"""
**Look back.** What if your version is slower than `gelu_product`? Count the arrays that it makes. Each is
as large as the input, and fresh memory must be fetched from the operating system. Writing every step into
one buffer (`inner *= x`, `np.tanh(inner, out=inner)`) avoids that.
"""

# %% [markdown]
"""
## 4. How do scores become shares?

Softmax turns a row of scores into shares that are positive and sum to 1: take `exp` of each, divide by the
sum.

**Picture.** Scores `[0, ln 2, ln 5]`: exp gives `[1, 2, 5]`, the sum is 8, the shares are `[1/8, 2/8,
5/8]`.

Only differences matter: adding 1000 to all scores multiplies all exps by the same factor, and the division
removes it. On paper. We run it.
"""

# %%
def softmax_textbook(x):
    return np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True)


if __name__ == "__main__":
    scores = np.array([0, math.log(2), math.log(5)], np.float32)
    print("scores:       ", softmax_textbook(scores))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        print("scores + 1000:", softmax_textbook(scores + 1000))
    print("NumPy says:", sorted({str(w.message) for w in caught}))

# %% [markdown]
"""
`inf / inf` is NaN. Since only differences matter, we may subtract what we like: the largest score of the
row. Then the largest exponent is 0 and nothing can overflow.

**Predict.** What must `softmax([1000, 1000 + ln 2, 1000 + ln 5])` give as its *first* share?
"""

# %% nbgrader={"grade": false, "grade_id": "02-predict-share", "locked": false, "schema_version": 3, "solution": true, "task": false}
# predicted_share = ...  (a number between 0 and 1)
### BEGIN SOLUTION
predicted_share = 1 / 8
### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "02-predict-share-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_predict_share():
    """Oracle: the exps of the differences to the largest score, in plain Python."""
    scores = [1000, 1000 + math.log(2), 1000 + math.log(5)]
    exps = [math.exp(s - max(scores)) for s in scores]
    wrong = f"got {predicted_share}, computed {exps[0] / sum(exps)}: adding 1000 to all changes no share"
    assert abs(predicted_share - exps[0] / sum(exps)) < 1e-6, wrong


if __name__ == "__main__":
    test_unit_predict_share()

# %% [markdown]
"""
Softmax and log-softmax share this first step, so it gets its own function. `dim` says along which dimension
the scores compete: -1 means within each row.
"""

# %%
if __name__ == "__main__":
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hidden_row = np.full(3, -np.inf, np.float32)
        print("a row of -inf, minus its largest value:", hidden_row - hidden_row.max())

# %% [markdown]
"""
**Build** the shift. One decision hides in it. Attention (lesson 12) hides scores by setting them to `-inf`.
In a row where *everything* is hidden the largest score is `-inf`, and `-inf - (-inf)` is NaN. We hold the
largest value at or above the smallest finite number, `np.finfo(x.dtype).min`. Such a row then stays `-inf`.
"""

# %% nbgrader={"grade": false, "grade_id": "02-shift", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def shift_array(x, dim):
    """Subtract from floating x its largest value along dim, so that this becomes 0; a row of -inf stays -inf.

    >>> shift_array(np.array([[1001.0, 1003.0]]), -1)
    array([[-2.,  0.]])
    """
    ### BEGIN SOLUTION
    peak = np.maximum.reduce(x, axis=dim, keepdims=True, initial=np.finfo(x.dtype).min)
    return x - peak
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "02-shift-test", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
def test_unit_shift():
    """Oracle: differences worked by hand."""
    x = np.array([[1, 4], [1001, 1003]], np.float32)
    rows = silently(shift_array, x, -1)
    check_array(rows, [[-3, 0], [-2, 0]], "Each row has its own largest value: keep it beside its row")
    check_array(shift_array(x, 0), [[-1000, -999], [0, 0]], "With dim=0 the columns compete, not the rows")
    hidden = silently(shift_array, np.array([[-np.inf, -np.inf], [-np.inf, 2]], np.float32), -1)
    check_array(hidden, [[-np.inf, -np.inf], [-np.inf, 0]], "A row of -inf must stay -inf")
    ### BEGIN HIDDEN TESTS
    z = np.random.default_rng(4).standard_normal((2, 3, 3)).astype(np.float32) * 1e4
    for dim in range(3):
        loop = np.apply_along_axis(lambda row: row - max(row), dim, z)
        check_array(silently(shift_array, z, dim), loop, f"The largest value along dim={dim} must become 0")
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_shift()

# %% [markdown]
"""
The sum after it is given, as `sum_along`. The sum of a row is its product with a row of ones, and for large
arrays NumPy's matrix library computes that faster than `np.add.reduce` adds.
"""

# %%
#| export
def sum_along(x, dim):
    """The sum along dim, which stays as size 1.

    >>> sum_along(np.array([[1.0, 2.0], [3.0, 4.0]]), -1)
    array([[3.],
           [7.]])
    """
    if x.size > 4096 and dim in (-1, x.ndim - 1):
        return np.vecdot(x, np.ones(x.shape[-1], x.dtype))[..., None]
    return np.add.reduce(x, axis=dim, keepdims=True)

# %% [markdown]
"""
**Build** softmax itself: shift, `exp`, divide by the sum along `dim`.

A row in which everything is hidden has only zeros after `exp`, and `0 / 0` is NaN again. We give such a row
the share 0 everywhere. There is a neat way: in any other row the largest exponent is 0, so the sum is at
least 1. Dividing by `np.maximum(total, 1)` changes nothing there and makes `0 / 1` of the rest.
"""

# %% nbgrader={"grade": false, "grade_id": "02-softmax", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def softmax_array(x, dim=-1):
    """Turn scores into shares that are positive and sum to 1 along dim; same shape as x.

    A row of -inf gets 0 everywhere (torch.softmax: NaN; its attention: 0, as here).

    >>> softmax_array(np.array([[1e4, 1e4], [-np.inf, -np.inf]]))
    array([[0.5, 0.5],
           [0. , 0. ]])
    """
    x = as_float(x)
    ### BEGIN SOLUTION
    shares = shift_array(x, dim)
    np.exp(shares, out=shares)
    shares /= np.maximum(sum_along(shares, dim), 1)
    return shares
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "02-softmax-test", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
def test_unit_softmax():
    """Oracle: the shares of the picture."""
    scores = np.log(np.array([[1, 2, 5], [4, 2, 2], [1, 1, 1]], np.float32))
    shares = [[1 / 8, 2 / 8, 5 / 8], [1 / 2, 1 / 4, 1 / 4], [1 / 3, 1 / 3, 1 / 3]]
    check_array(softmax_array(scores), shares, "Each row is divided by its own sum: keepdims, and dim")
    columns = [[1 / 6, 2 / 5, 5 / 8], [4 / 6, 2 / 5, 2 / 8], [1 / 6, 1 / 5, 1 / 8]]
    check_array(softmax_array(scores, dim=0), columns, "With dim=0 the columns sum to 1: where is dim?")
    large = silently(softmax_array, scores[:1] + 1000)
    check_array(large, shares[:1], "Large scores: shift before exp", 1e-3)
    hidden = silently(softmax_array, np.full((1, 3), -np.inf, np.float32))
    check_array(hidden, [[0, 0, 0]], "A row in which everything is hidden gets 0, not NaN")
    ### BEGIN HIDDEN TESTS
    z = np.random.default_rng(5).standard_normal((2, 4, 3)).astype(np.float32) * 5
    total = [[sum(math.exp(w) for w in row) for row in part] for part in z.tolist()]
    slow = [[[math.exp(z[i, j, k]) / total[i][j] for k in range(3)] for j in range(4)] for i in range(2)]
    check_array(softmax_array(z), slow, "Each row is divided by its own sum", 1e-5)
    check_array(softmax_array(np.array([0, 0])), [0.5, 0.5], "Integers become float32")
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_softmax()

# %% [markdown]
"""
**Look back.** What if one score is `-inf` and the others are not? Its share is exactly 0 and the others are
as if it were not there: that is a mask. What if a score is NaN? The whole row becomes NaN. That is right:
nothing should hide it.

## 5. Where does the logarithm of a share go?

A loss (lesson 04) wants the logarithm of the share that the right answer got. The obvious way is `np.log`
of softmax. We try it on scores that lie far apart.
"""

# %%
if __name__ == "__main__":
    with np.errstate(divide="ignore"):
        print("log of softmax:", np.log(softmax_array(np.array([0, -200], np.float32))))

# %% [markdown]
"""
The share of the second score is too small for float32, so its logarithm is lost: a loss of infinity, and no
gradient to learn from. But the logarithm itself is an ordinary number.

**Picture.** `log(exp(a) / total) = a - log(total)`. For `[0, ln 2, ln 5]` the total is 8 and the result is
`[-ln 8, ln 2 - ln 8, ln 5 - ln 8]`.

**Predict.** What should log-softmax give for the *second* of the scores `[0, -200]`? The total is `1 +
exp(-200)`.
"""

# %% nbgrader={"grade": false, "grade_id": "02-predict-log", "locked": false, "schema_version": 3, "solution": true, "task": false}
# predicted_log = ...  (a number)
### BEGIN SOLUTION
predicted_log = -200
### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "02-predict-log-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_predict_log():
    """Oracle: a - log(total) in Python's float64."""
    expected = -200 - math.log(1 + math.exp(-200))
    wrong = f"got {predicted_log}, computed {expected}: a - log(total), and the total is as good as 1"
    assert abs(predicted_log - expected) < 1e-6, wrong


if __name__ == "__main__":
    test_unit_predict_log()

# %% [markdown]
"""
**Build.** Shift, then subtract the logarithm of the total. `np.maximum(total, 1)` again keeps a hidden row
quiet: its logarithms are `-inf`, as the logarithm of 0 should be.
"""

# %% nbgrader={"grade": false, "grade_id": "02-log-softmax", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def log_softmax_array(x, dim=-1):
    """Return the logarithm of softmax, without ever taking the logarithm of a share; same shape as x.

    >>> log_softmax_array(np.array([0.0, -200.0]))
    array([   0., -200.])
    """
    x = as_float(x)
    ### BEGIN SOLUTION
    shifted = shift_array(x, dim)
    shifted -= np.log(np.maximum(sum_along(np.exp(shifted), dim), 1))
    return shifted
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "02-log-softmax-test", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
def test_unit_log_softmax():
    """Oracle: the logarithms of the picture, and the predicted -200."""
    scores = np.log(np.array([[1, 2, 5], [4, 2, 2], [1, 1, 1]], np.float32))
    logs = np.log([[1 / 8, 2 / 8, 5 / 8], [1 / 2, 1 / 4, 1 / 4], [1 / 3, 1 / 3, 1 / 3]])
    check_array(log_softmax_array(scores), logs, "Subtract the log of the sum of the exps, along dim", 1e-5)
    columns = np.log([[1 / 6, 2 / 5, 5 / 8], [4 / 6, 2 / 5, 2 / 8], [1 / 6, 1 / 5, 1 / 8]])
    down = log_softmax_array(scores, dim=0)
    check_array(down, columns, "With dim=0 the columns compete: where is dim?", 1e-5)
    far = silently(log_softmax_array, np.array([0, -200, -1e4], np.float32))
    check_array(far, [0, -200, -1e4], "Far apart: the log of a share that underflowed is lost")
    ### BEGIN HIDDEN TESTS
    z = np.random.default_rng(6).standard_normal((2, 4, 3)).astype(np.float32) * 5
    total = [[sum(math.exp(w) for w in row) for row in part] for part in z.tolist()]
    slow = [[[z[i, j, k] - math.log(total[i][j]) for k in range(3)] for j in range(4)] for i in range(2)]
    check_array(log_softmax_array(z), slow, "Subtract the log of the sum of the exps", 1e-4)
    hidden = silently(log_softmax_array, np.full((1, 3), -np.inf, np.float32))
    check_array(hidden, np.full((1, 3), -np.inf), "Everything hidden: -inf, not NaN")
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_log_softmax()

# %% [markdown]
"""
**Measure.** How far are we from the exact result? We compare float32 with a float64 run of the same
function, on scores of growing size, and print the largest difference relative to the size of the scores.
"""

# %% nbgrader={"grade": false, "grade_id": "02-measure-error", "locked": true, "schema_version": 3, "solution": false, "task": false}
def relative_error(function, x):
    """Largest difference between a float32 and a float64 run, divided by the largest exact value."""
    exact = function(x.astype(np.float64))
    return np.abs(function(x) - exact).max() / np.abs(exact).max()


if __name__ == "__main__":
    for size in (1, 100, 10_000):
        x = np.random.default_rng(7).standard_normal((64, 50)).astype(np.float32) * size
        print(f"scores about {size:6d}:", end="")
        for function in (gelu_array, softmax_array, log_softmax_array):
            print(f"   {function.__name__} {relative_error(function, x):.1e}", end="")
        print()

# %% [markdown]
"""
## 6. How does a Tensor get in?

Everything so far takes and returns arrays. A Tensor goes through the door of lesson 01: `apply(op, *inputs,
**params)` unwraps, computes, wraps, and tells the gradient engine, once lesson 05 has plugged one in. So
the Tensor-level functions are one line each. These are the worked siblings.
"""

# %%
#| export
def relu(x):
    """ReLU of a Tensor: max(x, 0)."""
    return apply(relu_array, x)


def sigmoid(x):
    """Sigmoid of a Tensor: 1 / (1 + exp(-x))."""
    return apply(sigmoid_array, x)


def tanh(x):
    """Hyperbolic tangent of a Tensor."""
    return apply(tanh_array, x)


def gelu(x):
    """GELU of a Tensor in its tanh form: torch.nn.functional.gelu(x, approximate="tanh")."""
    return apply(gelu_array, x)


def silu(x):
    """SiLU of a Tensor: x * sigmoid(x)."""
    return apply(silu_array, x)


# %% [markdown]
"""
**Build.** Softmax has a parameter. Parameters travel by name, `apply(op, x, name=value)`: inputs may have
gradients, parameters may not.
"""

# %% nbgrader={"grade": false, "grade_id": "02-door", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def softmax(x, dim=-1):
    """Softmax of a Tensor along dim."""
    ### BEGIN SOLUTION
    return apply(softmax_array, x, dim=dim)
    ### END SOLUTION


def log_softmax(x, dim=-1):
    """Logarithm of the softmax of a Tensor along dim."""
    ### BEGIN SOLUTION
    return apply(log_softmax_array, x, dim=dim)
    ### END SOLUTION


# %%
class Recorder:
    """An engine that only writes down what passes the door."""

    def __init__(self):
        self.seen = []

    def record(self, op, inputs, params, output):
        self.seen.append((op.__name__, params))


# %% nbgrader={"grade": true, "grade_id": "02-door-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_door():
    """Oracle: what an engine behind the door sees, and columns that sum to 1."""
    recorder, x = Recorder(), Tensor([[1.0, 2.0], [3.0, 5.0]])
    previous = plug_in(recorder)
    try:
        shares, logs = softmax(x, dim=0), log_softmax(x, dim=0)
    finally:
        plug_in(previous)
    expected = [("softmax_array", {"dim": 0}), ("log_softmax_array", {"dim": 0})]
    wrong = f"through the door went {recorder.seen}, expected {expected}: use apply, and pass dim by name"
    assert recorder.seen == expected, wrong
    assert isinstance(shares, Tensor), f"softmax returned {type(shares).__name__}, expected a Tensor"
    check_array(shares.data.sum(axis=0), [1, 1], "With dim=0 the columns sum to 1")
    check_array(np.exp(logs.data).sum(axis=0), [1, 1], "The exps of log_softmax sum to 1")
    ### BEGIN HIDDEN TESTS
    assert softmax(x).shape == (2, 2), f"got shape {softmax(x).shape}, expected (2, 2): it does not change"
    check_array(softmax(x).data.sum(axis=1), [1, 1], "Without dim the rows sum to 1")
    check_array(log_softmax(Tensor([0.0, -200.0])).data, [0, -200], "log_softmax is not log of softmax")
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_door()

# %% [markdown]
"""
**Look back.** What if we wrote `Tensor(softmax_array(x.data, dim))`? Every number would be right and every
gradient through softmax would be missing, without any error: the engine never saw the operation.

## 7. Why modules as well?

A model is a list of things to call: layer, activation, layer. An activation as an *object* can stand in
that list, be printed, and say that it has no parameters. Lesson 03 writes the real `Module`; for now a
small base class is enough.
"""

# %%
#| export
class Activation:
    """A layer without parameters: calling it runs forward."""

    def __call__(self, x):
        return self.forward(x)

    def parameters(self):
        return []

    def __repr__(self):
        return f"{type(self).__name__}()"


class ReLU(Activation):
    """max(x, 0) as a module."""

    def forward(self, x):
        return relu(x)


class Sigmoid(Activation):
    """1 / (1 + exp(-x)) as a module."""

    def forward(self, x):
        return sigmoid(x)


# %%
#| export
class Tanh(Activation):
    """The hyperbolic tangent as a module."""

    def forward(self, x):
        return tanh(x)


class GELU(Activation):
    """GELU in its tanh form as a module."""

    def forward(self, x):
        return gelu(x)


class SiLU(Activation):
    """x * sigmoid(x) as a module."""

    def forward(self, x):
        return silu(x)


# %% [markdown]
"""
**Build.** `Softmax` has something to remember: `dim`. It is set when the object is made and used when it is
called.
"""

# %% nbgrader={"grade": false, "grade_id": "02-softmax-module", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
class Softmax(Activation):
    """Softmax along dim as a module."""

    def __init__(self, dim=-1):
        ### BEGIN SOLUTION
        self.dim = dim
        ### END SOLUTION

    def forward(self, x):
        ### BEGIN SOLUTION
        return softmax(x, dim=self.dim)
        ### END SOLUTION

    def __repr__(self):
        return f"Softmax(dim={self.dim})"


# %% nbgrader={"grade": true, "grade_id": "02-softmax-module-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_softmax_module():
    """Oracle: which sums are 1."""
    x = Tensor([[1.0, 2.0], [3.0, 5.0]])
    down, across = Softmax(dim=0), Softmax()
    shown = [repr(down), repr(across)]
    wrong = f"got {shown}, expected dim=0 and dim=-1: dim belongs to the object, so keep it as self.dim"
    assert shown == ["Softmax(dim=0)", "Softmax(dim=-1)"], wrong
    check_array(down(x).data.sum(axis=0), [1, 1], "Softmax(dim=0) must use its own dim, not the default")
    check_array(across(x).data.sum(axis=-1), [1, 1], "Softmax() works along the last dimension")
    ### BEGIN HIDDEN TESTS
    first, second = Softmax(dim=1), Softmax(dim=0)
    cube = Tensor(np.arange(24).reshape(2, 3, 4))
    check_array(first(cube).data.sum(axis=1), np.ones((2, 4)), "dim belongs to the object, not to the class")
    check_array(second(cube).data.sum(axis=0), np.ones((3, 4)), "dim belongs to the object, not to the class")
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_softmax_module()

# %% [markdown]
"""
## 8. How do they look side by side?

The table below prints all of them on the same inputs. Look at -3: who is exactly 0, who nearly? Look at 3:
who has flattened, who goes on? `plot_activations()` draws the same as curves; call it in a cell of your
own.
"""

# %% nbgrader={"grade": false, "grade_id": "02-measure-table", "locked": true, "schema_version": 3, "solution": false, "task": false}
CURVES = (relu_array, sigmoid_array, tanh_array, gelu_array, silu_array)


def print_table():
    x = np.arange(-3, 4, dtype=np.float32)
    print(f"{'x':14s}", *(f"{v:7.0f}" for v in x))
    for function in CURVES:
        print(f"{function.__name__:14s}", *(f"{v:7.3f}" for v in function(x)))


if __name__ == "__main__":
    print_table()

# %% nbgrader={"grade": false, "grade_id": "02-measure-plot", "locked": true, "schema_version": 3, "solution": false, "task": false}
def plot_activations():
    """Draw the five curves (needs matplotlib)."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("matplotlib is not installed: pip install matplotlib")
        return
    x = np.linspace(-4, 4, 201, dtype=np.float32)
    for function in CURVES:
        plt.plot(x, function(x), label=function.__name__)
    plt.legend()
    plt.show()


# %% [markdown]
"""
## 9. The module test

All checks once more, and one scenario: the network of two layers with a ReLU between them that solves XOR,
with weights set by hand. Its hidden numbers are `a + b` and `a + b - 1`; its output is the first minus
twice the second.
"""

# %% nbgrader={"grade": true, "grade_id": "02-module-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_module():
    """Oracle: the truth table of XOR."""
    checks = [test_unit_relu, test_unit_sigmoid, test_unit_gelu, test_unit_shift, test_unit_softmax]
    checks += [test_unit_log_softmax, test_unit_door, test_unit_softmax_module]
    for check in checks:
        check()

    hidden = Tensor(XOR_INPUTS) @ Tensor([[1.0, 1.0], [1.0, 1.0]]) + Tensor([0.0, -1.0])
    answer = ReLU()(hidden) @ Tensor([[1.0], [-2.0]])
    check_array(answer.data[:, 0], XOR_TARGETS, "The network with a ReLU must solve XOR")
    scores = Tensor(np.concatenate([-answer.data, answer.data], axis=1) * 1e4)
    sure = silently(Softmax(), scores).data
    check_array(sure[:, 1], [0.5, 1, 1, 0.5], "Very large scores: sure of the larger, undecided where equal")


if __name__ == "__main__":
    test_module()
    print("Lesson 02: all checks passed")

# %% [markdown]
"""
## Summary

* Linear layers in a row are one linear layer; an activation between them makes depth count.
* Safe means: rewrite the formula until no `exp` sees a positive number of any size.
* Softmax depends on differences only, so we subtract the largest score; log-softmax never takes the log of
  a share.
* One float64 scalar makes a float64 array: `math.sqrt`, not `np.sqrt`, for constants.
* An operation is an array function; `apply` brings Tensors in, and the engine sees every call.
"""

# %% [markdown]
"""
## Exercises

1. Write `leaky_relu_array(x, slope=0.01)` in one line, for any slope between 0 and 1, without `np.where`.
2. `softplus(x) = log(1 + exp(x))` overflows. Find a safe form with `np.log1p` and `exp(-|x|)`.
3. Softmax with a temperature divides the scores first. What happens to the shares as it goes to 0, and to
   infinity? Run it.
"""

# %% [markdown]
"""
## Design note: what is the softmax of nothing?

`torch.softmax` gives NaN for a row of `-inf`. In attention such rows occur: a padded position may see no
key at all, its NaN enters the next layer, and from there every number that touches it. So PyTorch's
attention uses another softmax, `torch._safe_softmax`, which returns 0 for such a row (source:
`_safe_softmax` in `aten/src/ATen/native/transformers/attention.cpp`; you can call it). The trade-off: NaN
shouts about a mistake, 0 lets a correct program with padding run. We take 0 everywhere, because our softmax
serves attention first. A loss that needs the logarithm of such a share is still infinite, so the mistake
does not stay unseen.
"""

# %% [markdown]
"""
## What comes next

Our modules own nothing, and nobody can ask a list of them for its parameters. Lesson 03 builds layers that
own numbers, and the `Module` that finds them.
"""

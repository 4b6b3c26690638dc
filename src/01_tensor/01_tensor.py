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
#     lesson: "01"
# ---

# %% [markdown]
"""
# Lesson 01: Tensor

**You build** the object that every later lesson passes around: an array that knows its shape and its dtype, and
whose every operation goes through one door.

**You need** Python, and NumPy as far as `np.zeros((2, 3))`.

**It becomes** `tinytorch/core/tensor.py`. About 90 minutes.

Each hole says what goes in. The cell below it checks your work at once. Stuck? `tito module hint 01`.
"""

# %%
#| default_exp core.tensor
#| export
import math
import threading

import numpy as np

# %% [markdown]
"""
## 1. How much is a batch?

A network reads many examples at once. Take 32 images of 28 x 28 pixels, each image laid out as one row of 784
numbers. Python could hold them in nested lists. Let us double every number in both forms and look at the clock.
"""

# %% nbgrader={"grade": false, "grade_id": "01-measure-lists", "locked": true, "schema_version": 3, "solution": false, "task": false}
import time


def seconds(work, repeats=20):
    """The best of several runs: what the work costs when nothing disturbs it."""
    best = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


if __name__ == "__main__":
    rows = [[float(i + j) for j in range(784)] for i in range(32)]
    batch = np.array(rows, dtype=np.float32)
    slow = seconds(lambda: [[2.0 * value for value in row] for row in rows])
    fast = seconds(lambda: 2.0 * batch)
    print(f"nested lists {slow * 1e6:8.0f} us\nNumPy array  {fast * 1e6:8.0f} us\nratio        {slow / fast:8.0f}")

# %% [markdown]
"""
A list holds a pointer per number, and each number is a Python object of its own. An array is one block of
memory with the numbers side by side, and a note that says how to read them: shape and dtype.

**Predict.** A float32 takes 4 bytes. How many bytes is the block of the batch, shape (32, 784)? Fill in the
number.
"""

# %% nbgrader={"grade": false, "grade_id": "01-predict-bytes", "locked": false, "schema_version": 3, "solution": true, "task": false}
# predicted_bytes = ...  (a whole number)
### BEGIN SOLUTION
predicted_bytes = 32 * 784 * 4
### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "01-predict-bytes-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_predict_bytes():
    """The oracle is NumPy's own count."""
    measured = np.zeros((32, 784), dtype=np.float32).nbytes
    assert predicted_bytes == measured, (
        f"predicted {predicted_bytes} bytes, NumPy counts {measured}: rows x columns x bytes per number"
    )


if __name__ == "__main__":
    test_unit_predict_bytes()

# %% [markdown]
"""
## 2. Which numbers?

NumPy reads `[1.5, 2.5]` as float64: 8 bytes per number. Networks do not need that precision, and every byte
must travel from memory to the processor. The course has one rule:

| data | becomes |
|---|---|
| floating (16, 32 or 64 bits) | float32 |
| integers and booleans | stay as they are: they count, point and choose |

Token ids are integers. As float32 they would be wrong above 16,777,216, where the next float32 is 2 further on.
"""

# %%
if __name__ == "__main__":
    print(np.array([1.5, 2.5]).dtype, "->", np.array([1.5, 2.5]).nbytes, "bytes")
    print(np.float32(16_777_216) + np.float32(1), "where 16,777,217 was meant")

# %% [markdown]
"""
**Build** the rule. `array.dtype.kind` is one letter: `"f"` floating, `"i"` and `"u"` integers, `"b"` booleans.
"""

# %% nbgrader={"grade": false, "grade_id": "01-dtype", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def settle_dtype(array):
    """Floating arrays as float32, all others unchanged; a float32 array comes back without a copy.

    >>> settle_dtype(np.array([1.5, 2.5])).dtype, settle_dtype(np.array([True])).dtype
    (dtype('float32'), dtype('bool'))
    """
    ### BEGIN SOLUTION
    if array.dtype.kind == "f":
        return array.astype(np.float32, copy=False)
    return array
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "01-dtype-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_dtype():
    """The oracle is the table above, row by row."""
    for given, wanted in [(np.float64, np.float32), (np.float16, np.float32), (np.int64, np.int64), (bool, bool)]:
        got = settle_dtype(np.array([1, 0, 1], dtype=given))
        assert isinstance(got, np.ndarray), f"got {type(got).__name__}, need an array"
        assert got.dtype == wanted, (
            f"{np.dtype(given)} data became {got.dtype}, need {np.dtype(wanted)}: "
            + ("integers and booleans stay" if wanted != np.float32 else "floating data becomes float32")
        )
        assert got.tolist() == [1, 0, 1], f"the values changed: got {got.tolist()}, expected [1, 0, 1]"
    row = np.ones(3, dtype=np.float32)
    assert settle_dtype(row) is row, "a float32 array was copied: its memory was right already (astype has copy=False)"
    ### BEGIN HIDDEN TESTS
    assert settle_dtype(np.array(2.5)).dtype == np.float32, "an array without dimensions is floating data too"
    assert settle_dtype(np.array([2**40 + 1])).tolist() == [2**40 + 1], "a large integer lost its last digits"
    assert settle_dtype(np.array([200], dtype=np.uint8)).dtype == np.uint8, "uint8 is an integer type and stays"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_dtype()

# %% [markdown]
"""
Data comes as numbers, lists or arrays; some of it is not data at all. This function is given. It calls yours,
unless a dtype was asked for, and turns two common accidents into sentences.
"""

# %%
#| export
def tensor_data(data, dtype=None):
    """Anything number-like as an array with a dtype of the course; shares memory with an array that already fits.

    >>> tensor_data([[1.0, 2.0], [3.0, 4.0]]).dtype
    dtype('float32')
    """
    try:
        array = np.asarray(data, dtype=dtype)
    except ValueError:
        raise ValueError(
            "Tensor: the data is not a full grid of numbers: rows of different length, or text. "
            "Give every row the same length, or pad the short ones."
        ) from None
    if array.dtype.kind not in "biuf":
        raise TypeError(f"Tensor: needs numbers, got {array.dtype} data. Turn it into ints or floats first.")
    return array if dtype is not None else settle_dtype(array)

# %% [markdown]
"""
## 3. Two shapes meet

`batch + bias` adds 784 numbers to each of 32 rows: shapes (32, 784) and (784,). NumPy stretches the smaller one
without copying it. The rule is called broadcasting. Write the shapes under each other, **right-aligned**:

    a        4  1  3
    b           2  1         missing on the left counts as 1
    result   4  2  3         per column: equal, or one of them is 1

Where two sizes differ and neither is 1, there is no result.

**Predict** the shape of `np.zeros((5, 1, 4)) + np.zeros((3, 1))`, as a tuple.
"""

# %% nbgrader={"grade": false, "grade_id": "01-predict-broadcast", "locked": false, "schema_version": 3, "solution": true, "task": false}
# predicted_shape = ...  (a tuple)
### BEGIN SOLUTION
predicted_shape = (5, 3, 4)
### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "01-predict-broadcast-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_predict_broadcast():
    """The oracle is the addition itself."""
    measured = (np.zeros((5, 1, 4)) + np.zeros((3, 1))).shape
    assert predicted_shape == measured, (
        f"predicted {predicted_shape}, NumPy made {measured}: right-align (5, 1, 4) and (3, 1), "
        "then go column by column"
    )


if __name__ == "__main__":
    test_unit_predict_broadcast()

# %% [markdown]
"""
**Build** the rule. NumPy knows it too, but its message only says that the shapes could not be broadcast. Ours
says where they disagree and what would fit, and lesson 05 needs the rule again, backwards. The sentence is
given; you find the column. Counting from the right is `shape[-1]`, `shape[-2]`, and so on.
"""

# %%
#| export
def broadcast_error(shape_a, shape_b, column):
    """The sentence for two shapes that disagree in `column`, counted from the right, beginning with 1."""
    return ValueError(
        f"shapes {tuple(shape_a)} and {tuple(shape_b)} do not broadcast: from the right, dimension {column} is "
        f"{shape_a[-column]} in one and {shape_b[-column]} in the other. They must be equal, or one of them 1: "
        "use reshape, unsqueeze or transpose to line the shapes up."
    )

# %%
def message_of(work, kind):
    """The words of the error that `work` raises, or None when it raises nothing of this kind."""
    try:
        work()
    except kind as error:
        return str(error)
    return None

# %% nbgrader={"grade": false, "grade_id": "01-broadcast", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def broadcast_shape(shape_a, shape_b):
    """The shape that two shapes broadcast to; raises broadcast_error(shape_a, shape_b, column) where they disagree.

    >>> broadcast_shape((4, 1, 3), (2, 1))
    (4, 2, 3)
    """
    ### BEGIN SOLUTION
    shape = []
    for column in range(1, max(len(shape_a), len(shape_b)) + 1):
        size_a = shape_a[-column] if column <= len(shape_a) else 1
        size_b = shape_b[-column] if column <= len(shape_b) else 1
        if size_a != size_b and 1 not in (size_a, size_b):
            raise broadcast_error(shape_a, shape_b, column)
        shape.append(size_b if size_a == 1 else size_a)
    return tuple(reversed(shape))
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "01-broadcast-test", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
def test_unit_broadcast():
    """The oracle is np.broadcast_shapes."""
    pairs = [((4, 1, 3), (2, 1)), ((32, 784), (784,)), ((), (3,)), ((2, 2), (2, 2)), ((0,), (1,))]
    for a, b in pairs:
        for first, second in [(a, b), (b, a)]:
            got, expected = broadcast_shape(first, second), np.broadcast_shapes(first, second)
            assert isinstance(got, tuple) and len(got) == len(expected), (
                f"{first} and {second}: got {got}, expected the tuple {expected}: the longer shape sets the length"
            )
            assert got == expected, (
                f"{first} and {second}: got {got}, expected {expected}: align on the right; "
                "a 1 gives way to the other size"
            )
    words = message_of(lambda: broadcast_shape((2, 3), (2,)), ValueError)
    assert words is not None, "(2, 3) and (2,) were accepted: 3 and 2 differ and neither is 1"
    assert "dimension 1 is 3 in one and 2" in words, f"the error names the wrong column: {words}"
    ### BEGIN HIDDEN TESTS
    assert broadcast_shape((7, 1, 5, 1), (6, 1, 2)) == (7, 6, 5, 2)
    words = message_of(lambda: broadcast_shape((4, 2, 3), (3, 3)), ValueError)
    assert words is not None and "dimension 2 is 2 in one and 3" in words, f"(4, 2, 3) and (3, 3): {words}"
    assert message_of(lambda: broadcast_shape((0,), (3,)), ValueError), "0 and 3 differ and neither is 1"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_broadcast()

# %% [markdown]
"""
Operations on single numbers now take a line each. Their names end in `_array`: plain arrays in, a plain array
out. NumPy does the work; when it refuses, our rule says why. That costs nothing as long as nothing goes wrong.
"""

# %%
#| export
def elementwise(ufunc, a, b):
    """ufunc(a, b), with our own words when the shapes disagree."""
    try:
        return ufunc(a, b)
    except ValueError:
        broadcast_shape(np.shape(a), np.shape(b))
        raise


def add_array(a, b):
    return elementwise(np.add, a, b)


def subtract_array(a, b):
    return elementwise(np.subtract, a, b)


def multiply_array(a, b):
    return elementwise(np.multiply, a, b)


def divide_array(a, b):
    return elementwise(np.divide, a, b)


def power_array(a, b):
    if isinstance(b, (int, float)) and b == 2:
        return a * a  # np.power is many times slower
    return elementwise(np.power, a, b)

# %%
#| export
def negative_array(x):
    return np.negative(x)


def floats(x):
    """x itself where it is floating, integers as float32: NumPy would compute those of 8 bits in float16."""
    return x if np.asarray(x).dtype.kind == "f" else np.asarray(x, dtype=np.float32)


def exp_array(x):
    return np.exp(floats(x))


def log_array(x):
    return np.log(floats(x))


def sqrt_array(x):
    return np.sqrt(floats(x))


def abs_array(x):
    return np.abs(x)


def clone_array(x):
    return x.copy()

# %%
if __name__ == "__main__":
    print(add_array(np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([10.0, 20.0])))
    print(message_of(lambda: add_array(np.zeros((2, 3)), np.zeros(4)), ValueError))

# %% [markdown]
"""
## 4. Rows times columns

Nearly all the time of a network goes into one operation. Each number of `a @ b` is a row of `a` against a
column of `b`:

    [1 2]   [5 6]     1*5 + 2*7 = 19   1*6 + 2*8 = 22
    [3 4] @ [7 8]  =  3*5 + 4*7 = 43   3*6 + 4*8 = 50

In general `(n, k) @ (k, m) -> (n, m)`: the inner sizes must agree, and they disappear.

**Build** it slowly first: a loop over rows, a loop over columns, a loop along the inner size.
"""

# %% nbgrader={"grade": false, "grade_id": "01-matmul-loops", "locked": false, "schema_version": 3, "solution": true, "task": false}
def matmul_loops(a, b):
    """The matrix product by three loops: (n, k) and (k, m) -> (n, m), in the dtype of a.

    >>> matmul_loops(np.array([[1, 2], [3, 4]]), np.array([[5, 6], [7, 8]])).tolist()
    [[19, 22], [43, 50]]
    """
    result = np.zeros((a.shape[0], b.shape[1]), dtype=a.dtype)
    ### BEGIN SOLUTION
    for row in range(a.shape[0]):
        for column in range(b.shape[1]):
            for inner in range(a.shape[1]):
                result[row, column] += a[row, inner] * b[inner, column]
    return result
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "01-matmul-loops-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_matmul_loops():
    """The oracle is the product worked by hand above, then a sum over an outer product."""
    got = matmul_loops(np.array([[1, 2], [3, 4]]), np.array([[5, 6], [7, 8]]))
    assert isinstance(got, np.ndarray) and got.shape == (2, 2), f"got {got!r}, need an array of shape (2, 2)"
    assert got.tolist() != [[14, 16], [28, 32]], (
        "got [[14, 16], [28, 32]]: only the last product stayed in each place; add up along the inner size (+=)"
    )
    assert got.tolist() == [[19, 22], [43, 50]], (
        f"got {got.tolist()}, expected [[19, 22], [43, 50]]: row of a against COLUMN of b, added up with +="
    )
    a, b = np.arange(6.0).reshape(2, 3), np.arange(12.0).reshape(3, 4) - 5
    got, expected = matmul_loops(a, b), (a[:, :, None] * b[None, :, :]).sum(axis=1)
    assert got.shape == (2, 4), f"(2, 3) @ (3, 4): got shape {got.shape}, expected (2, 4)"
    assert np.allclose(got, expected), f"(2, 3) @ (3, 4): got\n{got}\nexpected\n{expected}"
    ### BEGIN HIDDEN TESTS
    a, b = np.array([[2.0, -1.0, 0.5, 3.0]]), np.array([[1.0], [4.0], [-2.0], [0.25]])
    got = matmul_loops(a, b)
    assert got.shape == (1, 1), f"(1, 4) @ (4, 1): got shape {got.shape}"
    assert got[0, 0] == -2.25, f"(1, 4) @ (4, 1): got {got[0, 0]}, expected -2.25"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_matmul_loops()

# %% [markdown]
"""
`(n, k) @ (k, m)` takes n * m * k multiplications and as many additions: 2 * n * m * k operations. How many does
your loop manage per second, and how many does NumPy, which hands the work to a tuned library (BLAS)?
"""

# %% nbgrader={"grade": false, "grade_id": "01-measure-matmul", "locked": true, "schema_version": 3, "solution": false, "task": false}
def measure_matmul(small=24, large=384):
    """Print operations per second of the loop and of NumPy; return their ratio."""
    speeds = []
    for name, product, n, repeats in [("loops", matmul_loops, small, 1), ("NumPy", np.matmul, large, 5)]:
        a = np.ones((n, n), dtype=np.float32)
        taken = seconds(lambda: product(a, a), repeats)
        speeds.append(2 * n**3 / taken)
        print(f"{name}: {n:4d} x {n:<4d} {taken * 1e3:9.2f} ms {speeds[-1] / 1e9:10.4f} GFLOP/s")
    return speeds[1] / speeds[0]


if __name__ == "__main__":
    print(f"NumPy does {measure_matmul():.0f} times as many operations per second")

# %% [markdown]
"""
So we use NumPy's. What we add is the sentence. Mismatched inner sizes are the most frequent mistake in all of
deep learning, and `matmul: Input operand 1 has a mismatch in its core dimension 0` helps nobody.

**Build** `matmul_array`. With more than two dimensions the last two are the matrices, and all before them is a
batch: (8, 2, 3) @ (8, 3, 4) is eight products. A right side with one dimension has its inner size in
`shape[-1]`. The check for the batch dimensions is given.
"""

# %%
#| export
def matmul_error(shape_a, shape_b):
    """The sentence for two shapes whose inner sizes disagree."""
    inner = shape_b[-2] if len(shape_b) > 1 else shape_b[-1]
    return ValueError(
        f"matmul: shapes {shape_a} @ {shape_b}: the last dimension of the left is {shape_a[-1]}, the second to last "
        f"of the right is {inner}; they must be equal. Transpose one of them, or swap the two."
    )


def multiply_matrices(a, b):
    """np.matmul, with our own words when numbers are given or the batch dimensions disagree."""
    if np.ndim(a) == 0 or np.ndim(b) == 0:
        raise ValueError(f"matmul: shapes {np.shape(a)} @ {np.shape(b)}: a single number has no rows. Use * instead.")
    try:
        return np.matmul(a, b)
    except ValueError:
        broadcast_shape(a.shape[:-2], b.shape[:-2])
        raise

# %% nbgrader={"grade": false, "grade_id": "01-matmul", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def matmul_array(a, b):
    """The matrix product: (..., n, k) @ (..., k, m) -> (..., n, m).

    Raises matmul_error(a.shape, b.shape) when the inner sizes disagree; otherwise returns multiply_matrices(a, b).

    >>> matmul_array(np.ones((8, 2, 3)), np.ones((3, 4))).shape
    (8, 2, 4)
    """
    ### BEGIN SOLUTION
    if np.ndim(a) and np.ndim(b):
        inner = b.shape[-2] if b.ndim > 1 else b.shape[-1]
        if a.shape[-1] != inner:
            raise matmul_error(a.shape, b.shape)
    return multiply_matrices(a, b)
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "01-matmul-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_matmul():
    """The oracle is np.einsum."""
    rng = np.random.default_rng(0)
    for shape_a, shape_b, sums in [((2, 3), (3, 4), "ik,kj->ij"), ((8, 2, 3), (8, 3, 4), "bik,bkj->bij"),
                                   ((2, 3), (3,), "ik,k->i"), ((5, 2, 3), (3, 4), "bik,kj->bij")]:
        a, b = rng.standard_normal(shape_a), rng.standard_normal(shape_b)
        expected = np.einsum(sums, a, b)
        words = message_of(lambda: matmul_array(a, b), ValueError)
        assert words is None, f"{shape_a} @ {shape_b} fits, but was refused: {words}"
        got = matmul_array(a, b)
        sizes = f"{shape_a} @ {shape_b}: got shape {np.shape(got)}, expected {expected.shape}"
        assert np.shape(got) == expected.shape, sizes
        assert np.allclose(got, expected), f"{shape_a} @ {shape_b}: the numbers are not the sums of products"
    for shape_a, shape_b, sizes in [((2, 3), (4, 5), "left is 3, the second to last of the right is 4"),
                                    ((2, 2, 3), (2, 3), "left is 3, the second to last of the right is 2")]:
        words = message_of(lambda: matmul_array(np.ones(shape_a), np.ones(shape_b)), ValueError)
        assert words is not None, f"{shape_a} @ {shape_b} was accepted"
        assert sizes in words, f"{shape_a} @ {shape_b}: the message should hold {sizes!r}, but says: {words}"
    ### BEGIN HIDDEN TESTS
    assert matmul_array(np.ones(3), np.ones(3)) == 3, "(3,) @ (3,) is one number"
    assert matmul_array(np.ones((4, 1, 2, 3)), np.ones((5, 3, 2))).shape == (4, 5, 2, 2)
    words = message_of(lambda: matmul_array(np.ones((2, 3)), np.ones(2)), ValueError)
    assert words is not None and "(2, 3) @ (2,)" in words, f"(2, 3) @ (2,): {words}"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_matmul()

# %% [markdown]
"""
Look back:

* What if both matrices are (3, 3) and you swap them? Nothing complains. Which check of a program would notice?
* Twice the size in each direction: how many times the work?

## 5. Many numbers to few

A loss is one number made of thousands. A reduction folds one dimension away, or all of them. `dim` names the
one that **disappears**:

    x = [1 2 3]     sum(dim=0) -> [5 7 9]     down the rows
        [4 5 6]     sum(dim=1) -> [6 15]      along each row        sum() -> 21

With `keepdim=True` it stays as size 1: (2, 3) becomes (2, 1), so that the result still broadcasts against `x`.
"""

# %%
#| export
def place(x, dim):
    """`dim` counted from the left, so that -1 is x.ndim - 1; an IndexError in words where x has no such dimension."""
    if not -x.ndim <= dim < x.ndim:
        use = f" Use {-x.ndim} to {x.ndim - 1}." if x.ndim else ""
        raise IndexError(f"dim {dim} does not exist: shape {x.shape} has {x.ndim} dimensions.{use}")
    return dim % x.ndim


def reduce_array(ufunc, x, dim, keepdim):
    """Fold dimensions away with a ufunc; a shorter way to the same loop than np.sum and np.max."""
    dims = tuple(dim) if isinstance(dim, list) else dim
    try:
        return ufunc.reduce(x, axis=dims, keepdims=keepdim)
    except IndexError:
        for d in dims if isinstance(dims, tuple) else (dims,):
            place(x, d)
        raise


def sum_array(x, dim=None, keepdim=False):
    return reduce_array(np.add, x, dim, keepdim)


def max_array(x, dim=None, keepdim=False):
    return reduce_array(np.maximum, x, dim, keepdim)  # the values alone: PyTorch calls this amax


def min_array(x, dim=None, keepdim=False):
    return reduce_array(np.minimum, x, dim, keepdim)


def argmax_array(x, dim=None, keepdim=False):
    return np.argmax(x, axis=dim if dim is None else place(x, dim), keepdims=keepdim)

# %% [markdown]
"""
The mean is the sum divided by a count: the count of the numbers that were **folded together**, not of all
numbers.

**Build** `mean_array` on `sum_array`. `dim` is None (all), one int, or a tuple of ints; `math.prod` multiplies.
"""

# %% nbgrader={"grade": false, "grade_id": "01-mean", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def mean_array(x, dim=None, keepdim=False):
    """The mean along `dim` (None: of all; an int; a tuple of ints).

    >>> mean_array(np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), dim=1).tolist()
    [2.0, 5.0]
    """
    ### BEGIN SOLUTION
    total = sum_array(x, dim, keepdim)
    if dim is None:
        return total / x.size
    dims = dim if isinstance(dim, (tuple, list)) else (dim,)
    return total / math.prod(x.shape[d] for d in dims)
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "01-mean-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_mean():
    """The oracle is the picture, then np.mean."""
    x = np.array([[1, 2, 3], [4, 5, 6]], dtype=np.float32)
    got = mean_array(x, dim=0)
    assert np.shape(got) == (3,), f"dim=0 of (2, 3): got shape {np.shape(got)}, expected (3,): dim 0 disappears"
    assert got.tolist() == [2.5, 3.5, 4.5], (
        f"dim=0: got {got.tolist()}, expected [2.5, 3.5, 4.5]: two rows were folded, so divide by 2, "
        "not by the count of all"
    )
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    for dim in (None, 1, -1, (0, 2)):
        for keepdim in (False, True):
            got, expected = mean_array(x, dim, keepdim), np.mean(x, axis=dim, keepdims=keepdim)
            words = f"shape (2, 3, 4), dim={dim}, keepdim={keepdim}"
            assert np.shape(got) == expected.shape, f"{words}: got shape {np.shape(got)}, expected {expected.shape}"
            assert np.allclose(got, expected), f"{words}: got {got}, expected {expected}"
            assert got.dtype == np.float32, (
                f"{words}: float32 became {got.dtype}: divide by a Python int, not by a NumPy number"
            )
    ### BEGIN HIDDEN TESTS
    x = np.array([[2.0, -4.0], [6.0, 1.0], [1.0, 0.0]], dtype=np.float32)
    assert mean_array(x).shape == () and mean_array(x) == 1.0
    assert mean_array(x, 0).tolist() == [3.0, -1.0] and mean_array(x, (0, 1)) == 1.0
    assert mean_array(np.array([True, False])) == 0.5, "the mean of booleans is a share"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_mean()

# %% [markdown]
"""
## 6. The same numbers, another shape

An array is a block of memory, a shape, and **strides**: how many bytes to walk for one step in each dimension.
Float32, shape (3, 4), rows side by side: one step right is 4 bytes, one step down is 4 * 4 = 16 bytes. Strides
(16, 4).

Many operations touch only shape and strides and leave the block alone. They cost the same for ten numbers and
for a billion.

**Predict** the strides of the *transpose* of that array, shape (4, 3).
"""

# %% nbgrader={"grade": false, "grade_id": "01-predict-strides", "locked": false, "schema_version": 3, "solution": true, "task": false}
# predicted_strides = ...  (a tuple)
### BEGIN SOLUTION
predicted_strides = (4, 16)
### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "01-predict-strides-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_predict_strides():
    """The oracle is NumPy's note on the array."""
    block = np.zeros((3, 4), dtype=np.float32)
    assert predicted_strides == block.T.strides, (
        f"predicted {predicted_strides}, NumPy notes {block.T.strides}: the block {block.strides} is not moved, "
        "the two steps change places"
    )


if __name__ == "__main__":
    test_unit_predict_strides()

# %% [markdown]
"""
`reshape` keeps the order of the numbers and changes where the lines break. One size may be left open as -1:
whatever is needed to use all numbers.

    12 numbers as (3, -1)   -> (3, 4)       12 as (-1, 2, 2) -> (3, 2, 2)       12 as (5, -1) -> impossible

**Build** `infer_shape`, which fills in the open size. The sentence for an impossible shape is given.
"""

# %%
#| export
def reshape_error(size, shape):
    """The sentence for a shape that the numbers do not fill."""
    open_sizes = sum(n == -1 for n in shape)
    need = "write -1 at most once" if open_sizes > 1 else "choose sizes whose product is the number of values"
    return ValueError(f"reshape: {size} values do not fill shape {tuple(shape)}: {need}.")

# %% nbgrader={"grade": false, "grade_id": "01-reshape", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def infer_shape(size, shape):
    """The shape as a tuple with -1 replaced by what `size` values need; else raises reshape_error(size, shape).

    >>> infer_shape(12, (3, -1))
    (3, 4)
    """
    ### BEGIN SOLUTION
    known = math.prod(n for n in shape if n != -1)
    filled = tuple(size // max(known, 1) if n == -1 else n for n in shape)
    if sum(n == -1 for n in shape) > 1 or math.prod(filled) != size or min(filled, default=0) < 0:
        raise reshape_error(size, shape)
    return filled
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "01-reshape-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_reshape():
    """The oracle is NumPy's reshape of an array with that many values."""
    for size, shape in [(12, (3, -1)), (12, (-1, 2, 2)), (12, (12,)), (1, ()), (0, (0, 3)), (6, (-1,))]:
        got, expected = infer_shape(size, shape), np.zeros(size).reshape(shape).shape
        assert got == expected, f"{size} values as {shape}: got {got}, expected the tuple {expected}"
    for size, shape, mistake in [(12, (5, -1), "5 does not divide 12: round down and two values are lost"),
                                 (12, (3, 5), "15 is not 12, with or without a -1"),
                                 (12, (-1, -1), "two open sizes have many answers")]:
        words = message_of(lambda: infer_shape(size, shape), ValueError)
        assert words is not None, f"{size} values as {shape} were accepted: {mistake}"
        assert str(shape) in words, f"{size} values as {shape}: raise reshape_error(size, shape); got {words}"
    ### BEGIN HIDDEN TESTS
    assert infer_shape(30, (2, -1, 5)) == (2, 3, 5)
    assert message_of(lambda: infer_shape(7, (2, 3)), ValueError), "7 values as (2, 3) were accepted"
    assert message_of(lambda: infer_shape(6, (-2, -3)), ValueError), "6 values as (-2, -3) were accepted"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_reshape()

# %% [markdown]
"""
`permute` puts the dimensions in another order: `dims[i]` says which old dimension stands at place i. Here it
is, with the others of its kind. `expand` stretches a dimension of size 1 by giving it the stride 0: the same
bytes are read again and again.
"""

# %%
#| export
def reshape_array(x, shape):
    return x.reshape(infer_shape(x.size, shape))


def permute_array(x, dims):
    if sorted(d + x.ndim if d < 0 else d for d in dims) != list(range(x.ndim)):
        raise ValueError(
            f"permute: dims {tuple(dims)} do not fit shape {x.shape}: name each of its {x.ndim} dimensions once."
        )
    return np.transpose(x, dims)


def unsqueeze_array(x, dim):
    return np.expand_dims(x, dim)


def squeeze_array(x, dim=None):
    if dim is not None and x.shape[place(x, dim)] != 1:
        return x  # as PyTorch: nothing to squeeze
    return np.squeeze(x, axis=dim)


def expand_array(x, shape):
    added = len(shape) - x.ndim
    sizes = tuple(x.shape[i - added] if n == -1 and i >= added else n for i, n in enumerate(shape))
    try:
        return np.broadcast_to(x, sizes)
    except ValueError:
        raise ValueError(
            f"expand: shape {x.shape} does not stretch to {sizes}: only sizes of 1 grow, and new dimensions come on "
            "the left. Use unsqueeze to make a dimension of size 1."
        ) from None

# %% [markdown]
"""
**Build** `transpose_array`, which swaps two dimensions and leaves the rest: (2, 3, 4) with dims 1 and 2 becomes
(2, 4, 3). Make the order of all dimensions, swap two entries, and let `permute_array` do the rest. `place` of
section 5 turns -1 into the last dimension, and refuses one that is not there. Attention (lesson 12) lives on
this function, usually with negative dims.
"""

# %% nbgrader={"grade": false, "grade_id": "01-transpose", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def transpose_array(x, dim0, dim1):
    """x with two dimensions swapped, as a view: (2, 3, 4) with 1, 2 -> (2, 4, 3).

    >>> transpose_array(np.zeros((2, 3, 4)), -1, 0).shape
    (4, 3, 2)
    """
    ### BEGIN SOLUTION
    dims, dim0, dim1 = list(range(x.ndim)), place(x, dim0), place(x, dim1)
    dims[dim0], dims[dim1] = dim1, dim0
    return permute_array(x, dims)
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "01-transpose-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_transpose():
    """The oracle is the index: result[a, c, b] is x[a, b, c]."""
    x = np.arange(24).reshape(2, 3, 4)
    got = transpose_array(x, 1, 2)
    assert np.shape(got) == (2, 4, 3), f"(2, 3, 4) with dims 1 and 2: got shape {np.shape(got)}, expected (2, 4, 3)"
    for a, b, c in np.ndindex(2, 3, 4):
        assert got[a, c, b] == x[a, b, c], (
            f"result[{a}, {c}, {b}] is {got[a, c, b]}, expected x[{a}, {b}, {c}] = {x[a, b, c]}: "
            "numbers were re-read in another order (reshape), not turned"
        )
    got = transpose_array(x, -1, -3)
    assert got.shape == (4, 3, 2), f"(2, 3, 4) with dims -1 and -3: got shape {got.shape}, expected (4, 3, 2)"
    assert np.shares_memory(got, x), "the result is a copy: a transpose only swaps shape and strides"
    words = message_of(lambda: transpose_array(x, 0, 3), IndexError)
    assert words is not None and "dim 3 does not exist" in words, f"dims 0 and 3: ask place(x, dim) first; got {words}"
    ### BEGIN HIDDEN TESTS
    y = np.arange(120).reshape(2, 3, 4, 5)
    got = transpose_array(y, 0, -2)
    assert got.shape == (4, 3, 2, 5) and got[3, 1, 0, 2] == y[0, 1, 3, 2]
    assert (transpose_array(y, 1, 1) == y).all(), "a dimension swapped with itself"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_transpose()

# %% nbgrader={"grade": false, "grade_id": "01-measure-views", "locked": true, "schema_version": 3, "solution": false, "task": false}
def measure_views(n=1000):
    """Time of operations that move no number, and of one that moves all of them."""
    x = np.ones((n, n), dtype=np.float32)
    works = {"reshape": lambda: reshape_array(x, (-1,)), "transpose": lambda: transpose_array(x, 0, 1),
             "expand": lambda: expand_array(x, (50, n, n)), "copy": lambda: x.copy()}
    for name, work in works.items():
        result = work()
        print(f"{name:10s} {seconds(work) * 1e6:9.1f} us   shape {result.shape}, strides {result.strides}")


if __name__ == "__main__":
    measure_views()

# %% [markdown]
"""
Look back:

* `expand` to 50 copies cost nothing. What would happen if you wrote to one of them?
* A transposed matrix is read with large steps. Which of the two, `x.sum(dim=0)` or `x.T.sum(dim=0)`, walks
  through memory in order?

## 7. Pick and join

Indexing is NumPy's own, so slices, integers, `None`, `...`, lists and masks all work. We add the sentence, and
the reverse: `cat` joins arrays along a dimension that exists, `stack` along a new one.

    cat   of two (2, 3), dim 0  ->  (4, 3)
    stack of two (2, 3), dim 0  ->  (2, 2, 3)      dim 1 -> (2, 2, 3)      dim 2 -> (2, 3, 2)
"""

# %%
#| export
def index_array(x, key):
    try:
        return x[key]
    except IndexError as error:
        raise IndexError(f"index: a Tensor of shape {x.shape} has no such entry: {error}.") from None


def cat_array(*arrays, dim=0):
    try:
        return np.concatenate(arrays, axis=dim)
    except ValueError:
        if arrays:
            place(np.asarray(arrays[0]), dim)
        shapes = ", ".join(str(np.shape(a)) for a in arrays) or "nothing"
        raise ValueError(
            f"cat along dim {dim}: got {shapes}; every size but the one in dim {dim} must be the same."
        ) from None

# %% [markdown]
"""
**Build** `stack_array` from two functions that you have: give each array a new dimension of size 1, then join
there.
"""

# %% nbgrader={"grade": false, "grade_id": "01-stack", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def stack_array(*arrays, dim=0):
    """Join arrays of one shape along a new dimension `dim`.

    >>> stack_array(np.zeros((2, 3)), np.ones((2, 3)), dim=2).shape
    (2, 3, 2)
    """
    ### BEGIN SOLUTION
    return cat_array(*(unsqueeze_array(x, dim) for x in arrays), dim=dim)
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "01-stack-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_stack():
    """The oracle is indexing: taking entry i along the new dimension gives array i back."""
    a, b = np.arange(6).reshape(2, 3), np.arange(6).reshape(2, 3) * 10
    for dim, shape in [(0, (2, 2, 3)), (1, (2, 2, 3)), (2, (2, 3, 2)), (-1, (2, 3, 2))]:
        got = stack_array(a, b, dim=dim)
        assert np.shape(got) == shape, f"two (2, 3) along dim {dim}: got shape {np.shape(got)}, expected {shape}"
        for i, part in enumerate((a, b)):
            back = np.take(got, i, axis=dim)
            assert (back == part).all(), (
                f"dim {dim}: entry {i} is {back.tolist()}, expected {part.tolist()}: new dimension in the wrong place"
            )
    ### BEGIN HIDDEN TESTS
    got = stack_array(a, b, a + 1, dim=-2)
    assert got.shape == (2, 3, 3) and (got[:, 2] == a + 1).all()
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_stack()

# %% [markdown]
"""
## 8. Arithmetic that reads like arithmetic

We have functions; we want to write `1.0 - x`. Python turns `a - b` into `a.__sub__(b)`. A plain number does not
know our class and declines. Then Python asks the right side with `b.__rsub__(a)`: here `self` is the number
**on the right**.

Every method hands its function and its operands to one door, `apply(op, *inputs)`, which we build below.
`__sub__` and `__truediv__` are worked; **build** their reflections.
"""

# %% nbgrader={"grade": false, "grade_id": "01-reflected", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
class OrderedArithmetic:
    """The two operators of a Tensor where it matters which operand comes first."""

    def __sub__(self, other):
        return apply(subtract_array, self, other)

    def __rsub__(self, other):
        """other - self, where other is no Tensor."""
        ### BEGIN SOLUTION
        return apply(subtract_array, other, self)
        ### END SOLUTION

    def __truediv__(self, other):
        return apply(divide_array, self, other)

    def __rtruediv__(self, other):
        """other / self, where other is no Tensor."""
        ### BEGIN SOLUTION
        return apply(divide_array, other, self)
        ### END SOLUTION

# %% [markdown]
"""
The check has to wait until there is a Tensor. More groups of methods follow, all of them one line through the door.
Read them once; there is nothing to decide in them.
"""

# %%
#| export
class Arithmetic(OrderedArithmetic):
    """The operators of a Tensor that compute."""

    def __add__(self, other):
        return apply(add_array, self, other)

    def __radd__(self, other):
        return apply(add_array, other, self)

    def __mul__(self, other):
        return apply(multiply_array, self, other)

    def __rmul__(self, other):
        return apply(multiply_array, other, self)

    def __pow__(self, other):
        return apply(power_array, self, other)

    def __rpow__(self, other):
        return apply(power_array, other, self)

    def __matmul__(self, other):
        return apply(matmul_array, self, other)

    def __rmatmul__(self, other):
        return apply(matmul_array, other, self)

    def __neg__(self):
        return apply(negative_array, self)

    def __abs__(self):
        return apply(abs_array, self)

# %% [markdown]
"""
To Python `w -= step` means `w = w - step`, unless we say otherwise: the name gets a new Tensor. For a weight that
is a trap, because the model goes on holding the old one. So a Tensor that learns stays itself and gets new numbers.
"""

# %%
#| export
def in_place(x, result):
    """What `x += ...` leaves in x: the same Tensor with new numbers if x learns, else the result."""
    if not x.requires_grad or x._node is not None:
        return result
    if _socket.engine is not None:
        raise RuntimeError(
            "a Tensor that requires a gradient is changed in place only inside `with no_grad():` (lesson 05); "
            "for a new Tensor write x = x + y instead of x += y."
        )
    x.data[...] = result.data
    return x


class InPlace:
    """The operators that assign."""

    def __iadd__(self, other):
        return in_place(self, self + other)

    def __isub__(self, other):
        return in_place(self, self - other)

    def __imul__(self, other):
        return in_place(self, self * other)

    def __itruediv__(self, other):
        return in_place(self, self / other)

# %%
#| export
class Comparison:
    """The operators of a Tensor that answer with booleans."""

    def __eq__(self, other):
        return apply(np.equal, self, other)

    def __ne__(self, other):
        return apply(np.not_equal, self, other)

    def __lt__(self, other):
        return apply(np.less, self, other)

    def __le__(self, other):
        return apply(np.less_equal, self, other)

    def __gt__(self, other):
        return apply(np.greater, self, other)

    def __ge__(self, other):
        return apply(np.greater_equal, self, other)

    __hash__ = object.__hash__  # Python drops it where __eq__ is defined; a set of Tensors needs it

# %%
#| export
class Functions:
    """Functions of each number, and reductions."""

    def exp(self):
        return apply(exp_array, self)

    def log(self):
        return apply(log_array, self)

    def sqrt(self):
        return apply(sqrt_array, self)

    def abs(self):
        return apply(abs_array, self)

    def matmul(self, other):
        return apply(matmul_array, self, other)

    def sum(self, dim=None, keepdim=False):
        return apply(sum_array, self, dim=dim, keepdim=keepdim)

    def mean(self, dim=None, keepdim=False):
        return apply(mean_array, self, dim=dim, keepdim=keepdim)

    def max(self, dim=None, keepdim=False):
        return apply(max_array, self, dim=dim, keepdim=keepdim)

    def min(self, dim=None, keepdim=False):
        return apply(min_array, self, dim=dim, keepdim=keepdim)

    def argmax(self, dim=None, keepdim=False):
        return apply(argmax_array, self, dim=dim, keepdim=keepdim)

# %%
#| export
def sizes_of(sizes):
    """Sizes given as several ints or as one tuple: reshape(2, 3) and reshape((2, 3)) mean the same."""
    return tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes


class Shaping:
    """Methods that change how the numbers are laid out."""

    def reshape(self, *shape):
        return apply(reshape_array, self, shape=sizes_of(shape))

    def view(self, *shape):
        return apply(reshape_array, self, shape=sizes_of(shape))

    def permute(self, *dims):
        return apply(permute_array, self, dims=sizes_of(dims))

    def transpose(self, dim0, dim1):
        return apply(transpose_array, self, dim0=dim0, dim1=dim1)

    @property
    def T(self):
        return apply(permute_array, self, dims=tuple(reversed(range(self.ndim))))

    def squeeze(self, dim=None):
        return apply(squeeze_array, self, dim=dim)

    def unsqueeze(self, dim):
        return apply(unsqueeze_array, self, dim=dim)

    def expand(self, *shape):
        return apply(expand_array, self, shape=sizes_of(shape))

    def __getitem__(self, key):
        keys = tuple(k.data if isinstance(k, Tensor) else k for k in (key if isinstance(key, tuple) else (key,)))
        return apply(index_array, self, key=keys if isinstance(key, tuple) else keys[0])

# %%
#| export
class Values:
    """The ways out of a Tensor: to NumPy, to Python, to the screen."""

    def numpy(self):
        """The array itself, not a copy."""
        return self.data

    def item(self):
        """The one value as a Python number."""
        if self.size != 1:
            raise ValueError(f"item() needs one value, this Tensor has shape {self.shape}. Reduce or index it first.")
        return self.data.item()

    def tolist(self):
        """The numbers as nested lists."""
        return self.data.tolist()

    def __format__(self, spec):
        """f"{loss:.4f}" formats the one value."""
        return format(self.item(), spec) if spec else str(self)

    def __repr__(self):
        numbers = np.array2string(self.data, separator=", ", precision=4, prefix="Tensor(")
        dtype = "" if self.dtype == np.float32 else f", dtype={self.dtype}"
        return f"Tensor({numbers}{dtype}{', requires_grad=True' if self.requires_grad else ''})"

    def __array__(self, dtype=None, copy=None):
        return np.array(self.data, dtype=dtype) if copy else np.asarray(self.data, dtype=dtype)

    def __len__(self):
        if self.ndim == 0:
            raise TypeError("len() of a Tensor without dimensions. item() gives its number.")
        return self.shape[0]

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __bool__(self):
        return bool(self.item())

    def __float__(self):
        return float(self.item())

    def __int__(self):
        return int(self.item())

# %% [markdown]
"""
## 9. The socket and the Tensor

In lesson 05 something must watch which operation made which Tensor. We do not know it yet, and this file will
not change when it comes. So we leave a socket: a place where an engine can be plugged in. An engine is any
object with `record(op, inputs, params, output)` and `backward(tensor, gradient)`.

Each thread has its own socket: one thread may generate text without an engine while another is training.
"""

# %%
#| export
class Socket(threading.local):
    """Where an engine is plugged in, per thread; the class attribute is for threads that plugged nothing in."""

    engine = None


_socket = Socket()


def plug_in(engine, everywhere=False):
    """Plug an engine in, in this thread or everywhere, and return the one that was there; None unplugs."""
    previous = _socket.engine
    _socket.engine = engine
    if everywhere:
        Socket.engine = engine
    return previous

# %% [markdown]
"""
Now the Tensor: the array, a wish (`requires_grad`), a place for the answer (`grad`), and a private note that an
engine may leave (`_node`). The three defaults stand on the class, so that making a Tensor costs one assignment.
"""

# %%
#| export
class Tensor(Arithmetic, InPlace, Comparison, Functions, Shaping, Values):
    """An array whose operations go through one door; PyTorch's torch.Tensor in small.

    Shares memory with an array that already has the dtype (as torch.from_numpy), unless it requires a gradient:
    what learns is changed in place and owns its memory.

    >>> Tensor([[1.0, 2.0], [3.0, 4.0]]) @ Tensor([1.0, 1.0])
    Tensor([3., 7.])
    """

    __array_ufunc__ = None  # array - Tensor: NumPy steps back and Python asks Tensor.__rsub__
    requires_grad = False
    grad = None
    _node = None

    def __init__(self, data, requires_grad=False, dtype=None):
        self.data = tensor_data(data.data if isinstance(data, Tensor) else data, dtype)
        if requires_grad:
            if self.data.dtype.kind != "f":
                raise TypeError(
                    f"requires_grad needs floating data, got {self.data.dtype}: integers have no small steps. "
                    "Use Tensor(data, requires_grad=True, dtype=np.float32)."
                )
            self.data = np.array(self.data)
            self.requires_grad = True

    @property
    def shape(self):
        return self.data.shape

    @property
    def ndim(self):
        return self.data.ndim

    @property
    def size(self):
        return self.data.size

    @property
    def dtype(self):
        return self.data.dtype

    def copy(self):
        """An independent Tensor with the same numbers and no history."""
        return Tensor(self.data.copy(), self.requires_grad, self.dtype)

    def detach(self):
        """The same memory, without gradients."""
        return Tensor(self.data, dtype=self.dtype)

    def clone(self):
        """The same numbers in new memory; gradients flow through."""
        return apply(clone_array, self)

    def zero_grad(self):
        self.grad = None

    def backward(self, gradient=None):
        """Let the engine find the gradients of this Tensor with respect to everything it came from."""
        if _socket.engine is None:
            raise RuntimeError(
                "backward() needs an engine, which lesson 05 builds: import tinytorch.core.autograd first. "
                "(Inside no_grad() it is unplugged: call backward() outside of the block.)"
            )
        _socket.engine.backward(self, gradient)

# %%
if __name__ == "__main__":
    print(Tensor([[1.5, 2.5], [3.5, 4.5]]))
    print(Tensor([3, 1, 2]), Tensor(7.0).item())
    print(message_of(lambda: Tensor([1, 2], requires_grad=True), TypeError))
    print(message_of(lambda: Tensor(1.0).backward(), RuntimeError))

# %% [markdown]
"""
## 10. One door

`x - 1.0` must unwrap the array from the Tensor, leave the number a number, compute, and wrap the result. Two
helpers are given. `unwrap` turns inputs into plain operands. `wrap` makes the Tensor and guards the dtype:
NumPy computes `int / int` and `int32 + float32` in float64; unless somebody brought float64 in, float32 comes
out.
"""

# %%
#| export
def as_operand(x, inputs):
    """A plain operand: a Python number stays one, an array gets a dtype of the course (or float64 beside float64)."""
    if isinstance(x, np.generic):
        x = x.item()  # np.sqrt(64) is a float64 and would turn whole arrays into float64; 8.0 does not
    if x is None or isinstance(x, (bool, int, float)):
        return x
    wide = any(isinstance(i, Tensor) and i.data.dtype == np.float64 for i in inputs)
    return tensor_data(x, np.float64 if wide and np.asarray(x).dtype == np.float64 else None)


def unwrap(inputs):
    """The plain operands behind the inputs of an operation."""
    return [x.data if isinstance(x, Tensor) else as_operand(x, inputs) for x in inputs]


def wrap(result, arrays):
    """A Tensor around a result; float64 that no operand brought in becomes float32."""
    if type(result) is not np.ndarray:
        result = np.asarray(result)
    if result.dtype.char == "d" and not any(getattr(a, "dtype", None) == np.float64 for a in arrays):
        result = result.astype(np.float32)
    output = Tensor.__new__(Tensor)
    output.data = result
    return output

# %% [markdown]
"""
**Build** `apply`. Four steps: unwrap the inputs; compute `op` on them, in order and with the parameters; wrap
the result; and if an engine sits in `_socket.engine`, tell it `record(op, inputs, params, output)`. The engine
gets the inputs as they came, the Tensors and not their arrays, because it must know *who* took part.
"""

# %% nbgrader={"grade": false, "grade_id": "01-apply", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def apply(op, *inputs, **params):
    """Compute op on Tensors, arrays and numbers; returns a Tensor, and tells the engine where one is plugged in.

    >>> apply(sum_array, Tensor([[1.0, 2.0], [3.0, 4.0]]), dim=0)
    Tensor([4., 6.])
    """
    ### BEGIN SOLUTION
    arrays = unwrap(inputs)
    output = wrap(op(*arrays, **params), arrays)
    if _socket.engine is not None:
        _socket.engine.record(op, inputs, params, output)
    return output
    ### END SOLUTION

# %%
class Notebook:
    """An engine that writes down what it is told."""

    def __init__(self):
        self.entries = []

    def record(self, op, inputs, params, output):
        self.entries.append((op, inputs, params, output))


def with_notebook(work):
    """Run `work` with a Notebook plugged in; its entries and the result."""
    notebook = Notebook()
    previous = plug_in(notebook)
    try:
        return notebook.entries, work()
    finally:
        plug_in(previous)

# %% nbgrader={"grade": true, "grade_id": "01-apply-test", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
def test_unit_apply():
    """The oracle is subtraction by hand, and an engine that writes down what it hears."""
    x = Tensor([[1.0, 2.0], [3.0, 4.0]])
    got = apply(subtract_array, x, 1.0)
    assert isinstance(got, Tensor), f"got {type(got).__name__}, need a Tensor: wrap the result"
    assert got.data.tolist() == [[0.0, 1.0], [2.0, 3.0]], f"x - 1.0: got {got.data.tolist()}"
    assert got.dtype == np.float32, f"x - 1.0 became {got.dtype}"
    got = apply(sum_array, x, dim=0)
    assert got.shape == (2,), f"sum with dim=0: got shape {got.shape}, expected (2,): hand the params on to op"
    wide = apply(add_array, Tensor([1.0], dtype=np.float64), 1.0)
    assert wide.dtype == np.float64, f"a float64 Tensor plus 1.0 became {wide.dtype}: wrap() keeps it, Tensor() casts"
    halves = apply(divide_array, Tensor([1, 2]), 2)
    assert halves.dtype == np.float32, f"int / int became {halves.dtype}: give wrap() the arrays, it guards the dtype"

    entries, total = with_notebook(lambda: apply(sum_array, x, dim=1))
    assert len(entries) == 1, f"the engine heard of {len(entries)} operations, expected 1: call record once"
    op, inputs, params, output = entries[0]
    assert op is sum_array and params == {"dim": 1}, f"the engine heard op {op}, params {params}"
    assert len(inputs) == 1 and inputs[0] is x, "the engine must get the Tensors themselves, not their arrays"
    assert output is total, "the engine must get the very Tensor that apply returns"
    ### BEGIN HIDDEN TESTS
    entries, _ = with_notebook(lambda: apply(power_array, 2.0, x))
    assert entries[0][1][0] == 2.0 and entries[0][1][1] is x, "inputs in the order given"
    assert apply(cat_array, x, x, x, dim=1).shape == (2, 6), "an operation may have many inputs"
    assert apply(mean_array, x).shape == () and isinstance(apply(mean_array, x).data, np.ndarray)
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_apply()

# %% [markdown]
"""
With the door open, the operators work, and the reflections of section 8 can show what they do.
"""

# %% nbgrader={"grade": true, "grade_id": "01-reflected-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_reflected():
    """The oracle is arithmetic by hand on 2 and 4."""
    x = Tensor([2.0, 4.0])
    tens = np.array([10.0, 10.0])
    for text, work, expected in [("1.0 - x", lambda: 1.0 - x, [-1.0, -3.0]), ("8.0 / x", lambda: 8.0 / x, [4.0, 2.0]),
                                 ("tens - x", lambda: tens - x, [8.0, 6.0]), ("1 - (-x)", lambda: 1 - (-x), [3.0, 5.0])]:
        got = work()
        assert isinstance(got, Tensor) and got.shape == (2,), f"{text}: got {got!r}, need a Tensor of shape (2,)"
        assert got.data.tolist() == expected, (
            f"{text}: got {got.data.tolist()}, expected {expected}: in a reflected method, self stands on the RIGHT"
        )
    ### BEGIN HIDDEN TESTS
    assert (3 / Tensor([6.0])).data.tolist() == [0.5] and (2 - Tensor([[5]])).data.tolist() == [[-3]]
    assert (np.float64(1.0) - x).dtype == np.float32, "a NumPy number on the left must not widen the result"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_reflected()

# %% nbgrader={"grade": false, "grade_id": "01-measure-door", "locked": true, "schema_version": 3, "solution": false, "task": false}
def measure_door():
    """What the door costs per operation, on a small array and on a large one."""
    for n in (10, 1_000_000):
        x = Tensor(np.ones(n, dtype=np.float32))
        calls = 2000 if n == 10 else 5
        plain = seconds(lambda: [np.add(x.data, x.data) for _ in range(calls)], 5) / calls
        door = seconds(lambda: [x + x for _ in range(calls)], 5) / calls
        print(f"{n:9,d} numbers: NumPy {plain * 1e6:8.2f} us, through the door {door * 1e6:8.2f} us")


if __name__ == "__main__":
    measure_door()

# %% [markdown]
"""
The price is a fixed one per operation, a few additions' worth of Python. On large arrays it disappears, which
is why later lessons make one operation of a whole formula.

## 11. Tensors from nothing

Weights begin as random numbers. One generator serves the whole course, so that one seed repeats a whole
experiment. `manual_seed` changes its state in place: whoever already holds it is reseeded too.
"""

# %%
#| export
_rng = np.random.default_rng()


def default_rng():
    """The generator of the course: what rng=None means everywhere."""
    return _rng


def manual_seed(seed):
    """Begin the random numbers of the course again, from `seed`."""
    _rng.bit_generator.state = np.random.default_rng(seed).bit_generator.state


def randn(*shape, rng=None, requires_grad=False):
    """Normal random numbers: mean 0, standard deviation 1."""
    rng = default_rng() if rng is None else rng
    return Tensor(rng.standard_normal(sizes_of(shape), dtype=np.float32), requires_grad)


def zeros(*shape, requires_grad=False, dtype=np.float32):
    return Tensor(np.zeros(sizes_of(shape), dtype), requires_grad, dtype)


def ones(*shape, requires_grad=False, dtype=np.float32):
    return Tensor(np.ones(sizes_of(shape), dtype), requires_grad, dtype)


def arange(start, stop=None, step=1, dtype=None):
    """Integers (or steps) from start up to stop, without stop; with one argument, from 0 up to it."""
    start, stop = (0, start) if stop is None else (start, stop)
    return Tensor(np.arange(start, stop, step), dtype=dtype)


def cat(tensors, dim=0):
    """Join Tensors along a dimension that exists."""
    return apply(cat_array, *tensors, dim=dim)


def stack(tensors, dim=0):
    """Join Tensors of one shape along a new dimension."""
    return apply(stack_array, *tensors, dim=dim)

# %% [markdown]
"""
## 12. Everything at once

A network with two layers, on your Tensor: `relu(x @ w1 + b1) @ w2 + b2`, where relu keeps what is positive.
Lesson 02 builds it properly; here a comparison and a product will do. An engine that writes everything down
shows what lesson 05 will have to work with.
"""

# %%
def two_layers(x, w1, b1, w2, b2):
    """(N, in) -> (N, out)"""
    hidden = x @ w1 + b1  # (N, in) @ (in, H) -> (N, H)
    hidden = hidden * (hidden > 0)  # relu
    return hidden @ w2 + b2  # (N, H) @ (H, out) -> (N, out)


if __name__ == "__main__":
    manual_seed(1)
    parts = randn(4, 3), randn(3, 5), zeros(5), randn(5, 2), ones(2)
    entries, output = with_notebook(lambda: two_layers(*parts))
    for op, inputs, _, result in entries:
        print(f"{op.__name__:15s}", *(np.shape(i) for i in inputs), "->", result.shape)

# %% nbgrader={"grade": true, "grade_id": "01-module-test", "locked": true, "points": 4, "schema_version": 3, "solution": false, "task": false}
def test_module():
    """Every check of the lesson, then a small network against NumPy in float64."""
    for check in (test_unit_predict_bytes, test_unit_dtype, test_unit_predict_broadcast, test_unit_broadcast,
                  test_unit_matmul_loops, test_unit_matmul, test_unit_mean, test_unit_predict_strides,
                  test_unit_reshape, test_unit_transpose, test_unit_stack, test_unit_apply, test_unit_reflected):
        check()
    manual_seed(3)
    parts = [randn(4, 3), randn(3, 5), randn(5), randn(5, 2), randn(2)]
    entries, got = with_notebook(lambda: two_layers(*parts))
    x, w1, b1, w2, b2 = (p.data.astype(np.float64) for p in parts)
    expected = np.maximum(x @ w1 + b1, 0) @ w2 + b2
    assert got.shape == (4, 2), f"two layers: got shape {got.shape}, expected (4, 2)"
    assert got.dtype == np.float32, f"two layers: float32 in, {got.dtype} out"
    assert np.allclose(got.data, expected, atol=1e-5), f"two layers: got\n{got.data}\nexpected\n{expected}"
    assert len(entries) == 6, f"two layers are 6 operations, the engine heard of {len(entries)}"
    manual_seed(3)
    assert (randn(4, 3).data == parts[0].data).all(), "the same seed must give the same numbers"
    rows = stack([got.mean(dim=0), got.max(dim=0), got[[0, 0, 3]].sum(dim=0)])
    assert rows.T.reshape(-1).shape == (6,), f"stack, T and reshape: got {rows.shape}"
    assert np.allclose(rows.data[2], 2 * expected[0] + expected[3], atol=1e-5), "row 0 was asked for twice"


if __name__ == "__main__":
    test_module()
    print("Lesson 01 holds.")

# %% [markdown]
"""
## Summary

* A tensor is a block of memory, a shape, a dtype and strides; many operations change only the note, not the
  block.
* Floats are float32, integers stay integers, and no operation widens them unasked.
* Shapes meet right-aligned; equal, or one of them 1.
* Each operation is a plain array function; each method is one line through `apply`.
* The socket is empty. Whoever plugs an engine in hears of every operation.
"""

# %% [markdown]
"""
**Exercises.** (1) Write `Tensor.var(dim)` with methods that you have. (2) Time `a @ b` for a = (64, 512, 512),
b = (512, 512), and for a reshaped to (-1, 512): why do they differ? (3) How many operations does `((x -
x.mean()) ** 2).mean()` record?

**Design note.** PyTorch sends every operation through a dispatcher, a table from operation and kind of tensor
(CPU, GPU, "watched by autograd") to a function; new kinds plug in without a change to the old ones (Edward
Yang, *Let's talk about the PyTorch dispatcher*, 2020). The trade-off is the one you measured: a fixed price per
operation, for the freedom to add behaviour later. Our door is the smallest version of it.

**Next.** Stack ten `x @ w` on each other: how many matrices could replace them? Lesson 02 brings what makes
depth worth having.
"""

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
#     lesson: "11"
# ---

# %% [markdown]
"""
# Lesson 11: Embeddings

Lesson 10 turned text into ids. An id is a name, not a quantity. In this lesson each id gets a row of numbers
that can be learned, and each *place* in the sequence gets one too, so that a model can tell `dog bites man`
from `man bites dog`.

| | |
|---|---|
| You build | the look-up and its gradient, `Embedding`, `PositionalEncoding` (learned and sinusoidal) |
| You need | lessons 01 to 05: `Tensor`, `Module`, `cross_entropy`, `@gradient` |
| Exported to | `tinytorch/core/embeddings.py` |
| Time | about 60 minutes |
"""

# %%
#| default_exp core.embeddings
#| export
import math

import numpy as np

from tinytorch.core.autograd import gradient
from tinytorch.core.layers import Module, Parameter
from tinytorch.core.tensor import Tensor, apply, default_rng

# %%
import time

from tinytorch.core.activations import relu
from tinytorch.core.autograd import check_gradients, no_grad
from tinytorch.core.layers import Linear
from tinytorch.core.losses import cross_entropy

# %% [markdown]
"""
## 1. An id is not a quantity

What happens if a network computes with the ids themselves? Give `Linear` three ids, each as one number, and
look at the outputs.
"""

# %%
if __name__ == "__main__":
    ids = np.array([256, 257, 4000])
    layer = Linear(1, 4, rng=np.random.default_rng(0))
    print(layer(Tensor(ids[:, None].astype(np.float32))).numpy().round(1))

# %% [markdown]
"""
Ids 256 and 257 come out nearly alike, and id 4000 huge, although the numbers say nothing about the tokens:
they were given in the order of merging.

What treats all ids as equally different is a **one-hot** row: zeros, and a one at the place of the id.
Multiplied by a matrix, it picks one row of it.

    id 2 of 4      one-hot [0 0 1 0]  @  weight (4, 3)  =  row 2 of weight

So a product with a vocabulary of 50,000 ids would multiply 49,999 rows by zero, to get one. We simply take
the row.
"""

# %%
def one_hot_lookup(weight, ids):
    """The slow definition: ids (N,) -> (N, E) by a matrix product."""
    one_hot = np.zeros((len(ids), len(weight)), weight.dtype)
    one_hot[np.arange(len(ids)), ids] = 1
    return one_hot @ weight


if __name__ == "__main__":
    table = np.arange(12, dtype=np.float32).reshape(4, 3)
    print(one_hot_lookup(table, np.array([2, 0, 2])))

# %% [markdown]
"""
**Predict.** A batch of 2 texts with 5 ids each is looked up in a table of 1000 ids with 16 columns. Which
shape does the result have? And how many bytes does it take in float32?
"""

# %% nbgrader={"grade": false, "grade_id": "11-predict-shape", "locked": false, "schema_version": 3, "solution": true, "task": false}
predicted_shape = None  # replace: a tuple
predicted_bytes = None  # replace: a number
### BEGIN SOLUTION
predicted_shape = (2, 5, 16)
predicted_bytes = 2 * 5 * 16 * 4
### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "11-predict-shape-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_predict_shape():
    """The oracle is NumPy's own indexing."""
    rows = np.zeros((1000, 16), np.float32)[np.zeros((2, 5), int)]
    assert predicted_shape == rows.shape, (
        f"each id is replaced by its row, so the columns come last: {rows.shape}; you predicted {predicted_shape}")
    assert predicted_bytes == rows.nbytes, (
        f"{rows.size} numbers of 4 bytes are {rows.nbytes} bytes, whatever the size of the vocabulary; "
        f"you predicted {predicted_bytes}")


if __name__ == "__main__":
    test_unit_predict_shape()

# %% [markdown]
"""
### Build: the look-up

NumPy picks rows with `weight[ids]`, for ids of any shape. It has one trap: -1 is the last row. A wrong id
would go unnoticed and train the wrong row, so we refuse ids outside of 0 … V - 1, and say which id it was and
how many there are.

`as_ids` is given. It makes an integer array of a list, an array or a Tensor, and refuses `2.5` and `True`.
"""

# %%
#| export
def as_ids(ids):
    """Ids as an integer array; a list, an array or a Tensor goes in, floats and booleans are a TypeError."""
    ids = np.asarray(ids.data if isinstance(ids, Tensor) else ids)
    if ids.dtype.kind not in "iu":
        if ids.size:
            raise TypeError(f"ids are integers, got {ids.dtype} (the first is {ids.flat[0]}). "
                            "Floats and booleans name no row of the vocabulary")
        ids = ids.astype(np.int64)  # an empty list has no type yet
    return ids


def id_error(ids, num_embeddings):
    """The error for ids (any shape) outside of the vocabulary; it names the first of them."""
    place = np.argwhere((ids < 0) | (ids >= num_embeddings))[0]
    return IndexError(f"id {ids[tuple(place)]} at index {place.tolist()} is outside of the vocabulary: "
                      f"num_embeddings is {num_embeddings}, so ids run from 0 to {num_embeddings - 1}")

# %% nbgrader={"grade": false, "grade_id": "11-embedding-array", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def embedding_array(weight, ids):
    """The row of each id: weight (V, E), ids (...) of integers -> (..., E). An id outside 0..V-1 raises id_error.

    >>> embedding_array(np.array([[0, 1], [2, 3]]), np.array([1, 1, 0])).tolist()
    [[2, 3], [2, 3], [0, 1]]
    """
    ### BEGIN SOLUTION
    if ids.size and (np.minimum.reduce(ids, axis=None) < 0 or np.maximum.reduce(ids, axis=None) >= len(weight)):
        raise id_error(ids, len(weight))
    return weight[ids]
    ### END SOLUTION

# %%
def error_of(function, *args):
    """The words of the error that a call raises; '' if it raises none. The checks use it."""
    try:
        function(*args)
    except (IndexError, ValueError, TypeError) as error:
        return str(error)
    return ""

# %% nbgrader={"grade": true, "grade_id": "11-embedding-array-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_embedding_array():
    """The oracle is the product with one-hot rows."""
    weight = np.random.default_rng(1).standard_normal((7, 3)).astype(np.float32)
    ids = np.array([[2, 0], [6, 2]])
    got = embedding_array(weight, ids)
    assert got.shape == (2, 2, 3), f"ids (2, 2) and 3 columns give (2, 2, 3), got {got.shape}"
    expected = one_hot_lookup(weight, ids.reshape(-1)).reshape(2, 2, 3)
    assert np.array_equal(got, expected), f"row 2 of the table is {weight[2]}, got {got[0, 0]} for the id 2"
    assert got.dtype == np.float32, f"a float32 table gives float32 rows, got {got.dtype}"
    for wrong in (-1, 7):
        said = error_of(embedding_array, weight, np.array([3, wrong]))
        assert said, f"id {wrong} is outside of 0..6, but no error was raised (-1 is not the last row here)"
        assert f"id {wrong}" in said and "7" in said, f"the error should name id {wrong} and 7, it says: {said}"
    ### BEGIN HIDDEN TESTS
    empty = embedding_array(weight, np.zeros((2, 0), int))
    assert empty.shape == (2, 0, 3), f"no ids give no rows: shape (2, 0, 3), got {empty.shape}"
    single = embedding_array(weight, np.array(5))
    assert single.shape == (3,) and np.array_equal(single, weight[5]), f"one id gives one row, got shape {single.shape}"
    said = error_of(embedding_array, weight, np.array([[0, 1], [2, 70]]))
    assert "id 70" in said, f"the error should name id 70, it says: {said}"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_embedding_array()

# %% nbgrader={"grade": false, "grade_id": "11-measure-lookup", "locked": true, "schema_version": 3, "solution": false, "task": false}
def measure_lookup():
    """Product with one-hot rows against the look-up, for growing vocabularies."""
    rng = np.random.default_rng(0)
    for vocab_size in (100, 1_000, 10_000):
        weight = rng.standard_normal((vocab_size, 64), dtype=np.float32)
        ids = rng.integers(vocab_size, size=512)
        seconds = []
        for function in (one_hot_lookup, embedding_array):
            times = []
            for _ in range(5):
                start = time.perf_counter()
                function(weight, ids)
                times.append(time.perf_counter() - start)
            seconds.append(sorted(times)[2])
        print(f"{vocab_size:6,} ids: one-hot {seconds[0] * 1e3:8.3f} ms, look-up {seconds[1] * 1e3:.3f} ms")


if __name__ == "__main__":
    measure_lookup()

# %% [markdown]
"""
## 2. The gradient: what is used twice learns twice

The look-up copies rows. So its gradient goes back to the rows they came from, and a row that was copied twice
receives *both* gradients, added. A row that was not used receives zero.

    ids         1       3       1
    gradient  [1 2]   [5 5]   [10 20]
    row 0 [0 0]    row 1 [11 22]    row 2 [0 0]    row 3 [5 5]

In text this is the rule, not the exception: ` the` stands in nearly every batch many times.

**Predict.** With the ids `[2, 0, 2, 2]` and the gradients `[[1, 0], [4, 4], [1, 1], [0, 5]]`, which gradient
does each of the three rows of the table receive?
"""

# %% nbgrader={"grade": false, "grade_id": "11-predict-gradient", "locked": false, "schema_version": 3, "solution": true, "task": false}
predicted_rows = None  # replace: a list of three rows, [[.., ..], [.., ..], [.., ..]]
### BEGIN SOLUTION
predicted_rows = [[4, 4], [0, 0], [2, 6]]
### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "11-predict-gradient-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_predict_gradient():
    """The oracle is a sum over the places where the id stands."""
    ids, grads = [2, 0, 2, 2], [[1, 0], [4, 4], [1, 1], [0, 5]]
    expected = [[sum(g[c] for i, g in zip(ids, grads) if i == row) for c in (0, 1)] for row in range(3)]
    assert np.shape(predicted_rows) == (3, 2), f"three rows of two numbers, got {predicted_rows}"
    assert list(predicted_rows[2]) != [0, 5], "row 2 was used three times; the last gradient does not replace the others"
    assert np.array_equal(predicted_rows, expected), f"the rows receive {expected}, you predicted {predicted_rows}"


if __name__ == "__main__":
    test_unit_predict_gradient()

# %% [markdown]
"""
### The obvious line is wrong

`total[ids] += rows` looks right. But NumPy reads `total[ids]`, adds, and writes back: for an id that stands
there twice it reads the old value twice, and the last write wins. `np.add.at` does what we mean, and so does
a plain loop.
"""

# %%
def sum_rows_loop(ids, rows, num_rows):
    """The definition: go through the ids and add each row where it belongs."""
    total = np.zeros((num_rows, rows.shape[1]), rows.dtype)
    for i, row in zip(ids.tolist(), rows):
        total[i] += row
    return total


if __name__ == "__main__":
    ids, rows = np.array([1, 3, 1]), np.array([[1.0, 2], [5, 5], [10, 20]])
    wrong = np.zeros((4, 2))
    wrong[ids] += rows
    print("total[ids] += rows:\n", wrong, "\nloop:\n", sum_rows_loop(ids, rows, 4), sep="")

# %% [markdown]
"""
### Build: sort, then sum each run

A faster way: sort the rows by id, so that equal ids stand side by side, and let `np.add.reduceat` sum each
run in one call.

    ids      1  3  1       order = argsort(ids, kind="stable")   ->   0  2  1
    sorted   1  1  3       a run starts where the id differs from the one before: at 0 and at 2
    rows   [1 2] [10 20] | [5 5]        reduceat at 0, 2   ->   [11 22]  [5 5]     for the ids 1 and 3

`np.flatnonzero(ids[1:] != ids[:-1])` finds where neighbours differ; mind that the first run starts at 0.
"""

# %% nbgrader={"grade": false, "grade_id": "11-sum-rows", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def sum_rows(ids, rows, num_rows):
    """Sum the rows that belong to the same id: ids (N,), rows (N, E) -> (num_rows, E), zero where an id is missing.

    >>> sum_rows(np.array([1, 3, 1]), np.array([[1, 2], [5, 5], [10, 20]]), 4).tolist()
    [[0, 0], [11, 22], [0, 0], [5, 5]]
    """
    total = np.zeros((num_rows, rows.shape[1]), rows.dtype)
    if len(ids) == 0:
        return total
    ### BEGIN SOLUTION
    order = np.argsort(ids, kind="stable")
    ids = ids[order]
    starts = np.concatenate(([0], np.flatnonzero(ids[1:] != ids[:-1]) + 1))
    total[ids[starts]] = np.add.reduceat(rows[order], starts, axis=0)
    return total
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "11-sum-rows-test", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
def test_unit_sum_rows():
    """The oracle is the plain loop."""
    ids, rows = np.array([1, 3, 1]), np.array([[1.0, 2], [5, 5], [10, 20]], np.float32)
    got = sum_rows(ids, rows, 4)
    assert got.shape == (4, 2), f"4 rows of 2 columns, got {got.shape}"
    assert not np.array_equal(got[1], rows[2]), "row 1 holds only its last gradient: repeated ids must add up"
    assert got.dtype == np.float32, f"float32 rows sum to float32, got {got.dtype}"
    rng = np.random.default_rng(3)
    ids, rows = rng.integers(6, size=40), rng.integers(-9, 9, size=(40, 5)).astype(np.float32)
    got, expected = sum_rows(ids, rows, 9), sum_rows_loop(ids, rows, 9)
    assert got.shape == (9, 5), f"9 rows of 5 columns, got {got.shape}"
    assert not got[6:].any(), "ids 6 to 8 were never used, so their rows stay zero"
    wrong = np.flatnonzero((got != expected).any(axis=1))
    assert wrong.size == 0, (
        f"row {wrong[0]} should be {expected[wrong[0]]}, got {got[wrong[0]]}. Are the rows in the same order as the "
        "sorted ids, and does each run start where the id changes?")
    ### BEGIN HIDDEN TESTS
    got = sum_rows(np.array([4]), np.array([[7.0, 8.0]]), 5)
    assert got.tolist() == [[0, 0]] * 4 + [[7, 8]], f"a single id is one run, got {got.tolist()}"
    same = sum_rows(np.zeros(50, int), np.ones((50, 2), np.float32), 1)
    assert same.tolist() == [[50, 50]], f"fifty times the same id sums to 50, got {same.tolist()}"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_sum_rows()

# %% nbgrader={"grade": false, "grade_id": "11-measure-sum-rows", "locked": true, "schema_version": 3, "solution": false, "task": false}
def measure_sum_rows():
    """The three ways to sum, on a batch of ids distributed like words."""
    rng = np.random.default_rng(0)
    for count, columns, vocab_size in ((1024, 64, 1000), (2048, 384, 1000)):
        ids = rng.zipf(1.3, count) % vocab_size
        rows = rng.standard_normal((count, columns), dtype=np.float32)
        for name, function in (
            ("loop", sum_rows_loop),
            ("np.add.at", lambda ids, rows, n: np.add.at(np.zeros((n, rows.shape[1]), rows.dtype), ids, rows)),
            ("sorted runs", sum_rows),
        ):
            times = []
            for _ in range(7):
                start = time.perf_counter()
                function(ids, rows, vocab_size)
                times.append(time.perf_counter() - start)
            print(f"{count} ids, {columns} columns, {name:11}: {sorted(times)[3] * 1e3:.3f} ms")


if __name__ == "__main__":
    measure_sum_rows()

# %% [markdown]
"""
### Build: the rule

Now tell the engine of lesson 05. A rule receives the gradient of the output and the inputs, and returns one
gradient per input; `ids` has none, so `None` stands there. `grad` has the shape (..., E) and the ids (...):
flatten both so that `sum_rows` sees N ids and N rows.
"""

# %% nbgrader={"grade": false, "grade_id": "11-embedding-rule", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
@gradient(embedding_array)
def embedding_rule(grad, output, weight, ids):
    """The gradients of weight (V, E) and ids (none), given grad (..., E)."""
    ### BEGIN SOLUTION
    return sum_rows(ids.reshape(-1), grad.reshape(-1, weight.shape[1]), len(weight)), None
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "11-embedding-rule-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_embedding_rule():
    """The oracles: the loop, and central differences in float64 (lesson 05)."""
    rng = np.random.default_rng(4)
    weight, ids = rng.standard_normal((5, 3)), np.array([[1, 4, 1], [1, 0, 4]])
    grad = rng.standard_normal((2, 3, 3))
    got = embedding_rule(grad, weight[ids], weight, ids)
    assert isinstance(got, tuple) and len(got) == 2, f"one gradient per input: weight and ids; got {type(got).__name__}"
    assert got[1] is None, f"ids are integers and have no gradient, so the second is None, got {got[1]!r}"
    assert got[0].shape == (5, 3), f"the gradient of weight has its shape, (5, 3), got {got[0].shape}"
    expected = sum_rows_loop(ids.reshape(-1), grad.reshape(-1, 3), 5)
    assert np.allclose(got[0], expected), f"id 1 stands there three times: row 1 is {expected[1]}, got {got[0][1]}"
    check_gradients(lambda w: apply(embedding_array, w, ids), weight)
    ### BEGIN HIDDEN TESTS
    ids = np.array([2, 2])
    got = embedding_rule(np.ones((2, 3), np.float32), None, weight.astype(np.float32), ids)[0]
    assert got[2].tolist() == [2, 2, 2] and got.dtype == np.float32, f"two uses sum to 2 in float32, got {got[2]}"
    check_gradients(lambda w: apply(embedding_array, w, np.array(3)) * 2.0, weight)
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_embedding_rule()

# %% [markdown]
"""
### The module

The class keeps the table. PyTorch's `Embedding` starts with standard normal rows, and so do we; a GPT uses
smaller ones, which lesson 13 sets. The table is a `Parameter`, so `parameters()` and `state_dict()` find it.
"""

# %%
#| export
class Embedding(Module):
    """A row of numbers per id: ids (...) -> (..., embedding_dim). PyTorch: torch.nn.Embedding."""

    def __init__(self, num_embeddings, embedding_dim, rng=None):
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        rng = default_rng() if rng is None else rng
        self.weight = Parameter(rng.standard_normal((num_embeddings, embedding_dim), dtype=np.float32))

    def forward(self, ids):
        return apply(embedding_array, self.weight, as_ids(ids))

    def extra_repr(self):
        return f"{self.num_embeddings}, {self.embedding_dim}"

# %% nbgrader={"grade": true, "grade_id": "11-embedding-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_embedding():
    """The oracle: rows of the table, and a gradient counted by hand."""
    layer = Embedding(6, 4, rng=np.random.default_rng(5))
    rows = layer([[3, 3, 0]])
    assert rows.shape == (1, 3, 4), f"ids (1, 3) give (1, 3, 4), got {rows.shape}"
    assert np.array_equal(rows.numpy()[0, 2], layer.weight.numpy()[0]), "the id 0 should give row 0 of the table"
    rows.sum().backward()
    got = layer.weight.grad.numpy().sum(axis=1)
    assert got.tolist() == [4, 0, 0, 8, 0, 0], f"id 0 was used once, id 3 twice, with 4 columns: got {got.tolist()}"
    assert "2.5" in error_of(layer, [2.5]), "an id of 2.5 should be an error that names it"
    ### BEGIN HIDDEN TESTS
    assert [name for name, _ in layer.named_parameters()] == ["weight"], "the table should be a parameter named weight"
    layer(np.array([3], np.int32)).sum().backward()
    got = layer.weight.grad.numpy()[3].tolist()
    assert got == [3, 3, 3, 3], f"a second backward adds to the first, 2 + 1 = 3, got {got}"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_embedding()

# %% [markdown]
"""
**Look back.**

1. After one backward pass with a batch of 64 ids, how many of 50,000 rows have a gradient that is not zero?
   What does that mean for an optimizer that walks through all of them?
2. What would `weight_decay` do to the rows of ids that never occur?
3. Why can we not give the *ids* a gradient?

## 3. Words without an order

Embed two sentences and sum their rows.
"""

# %%
if __name__ == "__main__":
    words = {"dog": 0, "bites": 1, "man": 2}
    embed = Embedding(3, 4, rng=np.random.default_rng(0))
    for sentence in ("dog bites man", "man bites dog"):
        print(sentence, embed([words[w] for w in sentence.split()]).sum(dim=0).numpy().round(4))

# %% [markdown]
"""
The sums are the same. Attention (lesson 12) is such a sum, with weights: it does not know the order either,
unless the rows themselves say where they stand. So we add to each row a second one, which belongs to the
*position*:

    x[t] = token row of ids[t]  +  position row of t            (T, E) + (T, E) -> (T, E)

Where do position rows come from? They can be learned, like the others: a table (max_seq_len, E). GPT-2 does
that. Or they can be computed.
"""

# %% [markdown]
"""
## 4. A clock with many hands

The sinusoidal table (Vaswani and others 2017, "Attention Is All You Need", section 3.5) writes a position as
the hands of many clocks, each slower than the one before. Each clock takes two columns, its sine and its
cosine:

    angle(t, i) = t / 10000^(2i / E)                i = 0, 1, 2, …  the number of the clock
    table[t, 2i] = sin(angle(t, i))        table[t, 2i + 1] = cos(angle(t, i))

The first clock turns once in 2π ≈ 6.28 positions, the last nearly once in 2π · 10000. For E = 4 there are two
clocks:

    t   sin(t)   cos(t)   sin(t/100)   cos(t/100)
    0    0.000    1.000      0.000        1.000
    1    0.841    0.540      0.010        1.000
    2    0.909   -0.416      0.020        1.000
"""

# %% [markdown]
"""
**Predict.** What is row 0 for E = 6? And the sum of the *squares* of any row for E = 6? (A sine squared and a
cosine squared of the same angle sum to 1.)
"""

# %% nbgrader={"grade": false, "grade_id": "11-predict-row", "locked": false, "schema_version": 3, "solution": true, "task": false}
predicted_row = None      # replace: a list of six numbers
predicted_squares = None  # replace: one number
### BEGIN SOLUTION
predicted_row = [0, 1, 0, 1, 0, 1]
predicted_squares = 3
### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "11-predict-row-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_predict_row():
    """The oracle is math.sin and math.cos, one number at a time."""
    row = [f(0 / 10000 ** (2 * i / 6)) for i in range(3) for f in (math.sin, math.cos)]
    assert np.shape(predicted_row) == (6,), f"row 0 has six numbers, got {predicted_row}"
    assert np.array_equal(predicted_row, row), (
        f"at t = 0 every angle is 0, and sine and cosine take turns: {row}; you predicted {predicted_row}")
    assert predicted_squares == 3, f"six columns are three clocks, and each adds 1: 3, not {predicted_squares}"


if __name__ == "__main__":
    test_unit_predict_row()

# %% [markdown]
"""
### Build: the table

Compute all angles at once: positions as a column (T, 1), the clocks' divisors as a row. Sines go into the
columns 0, 2, 4, … (`table[:, 0::2]`), cosines into 1, 3, 5 … (`table[:, 1::2]`). An odd E has one sine more
than cosines.

NumPy computes the angles in float64, and that is good here: a large angle in float32 has few digits left
behind the point. But the table itself must be float32, or every later computation becomes float64 and twice
as slow.
"""

# %% nbgrader={"grade": false, "grade_id": "11-sinusoidal-table", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def sinusoidal_table(max_seq_len, embed_dim):
    """Sines and cosines of many wavelengths: (max_seq_len, embed_dim), float32, columns sin, cos, sin, cos, …

    >>> sinusoidal_table(2, 4).round(3).tolist()[0]
    [0.0, 1.0, 0.0, 1.0]
    """
    table = np.empty((max_seq_len, embed_dim), np.float32)
    ### BEGIN SOLUTION
    position = np.arange(max_seq_len)[:, None]                            # (T, 1)
    angle = position / 10000.0 ** (np.arange(0, embed_dim, 2) / embed_dim)  # (T, clocks)
    table[:, 0::2] = np.sin(angle)
    table[:, 1::2] = np.cos(angle[:, : embed_dim // 2])
    return table
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "11-sinusoidal-table-test", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
def test_unit_sinusoidal_table():
    """The oracle is the formula, one number at a time, in plain Python."""
    for length, width in ((3, 4), (40, 10), (7, 5)):
        got = sinusoidal_table(length, width)
        assert got.shape == (length, width), f"the table should have the shape {(length, width)}, got {got.shape}"
        assert got.dtype == np.float32, f"the table should be float32, got {got.dtype}"
        for t in range(length):
            for column in range(width):
                angle = t / 10000 ** (2 * (column // 2) / width)
                expected = math.cos(angle) if column % 2 else math.sin(angle)
                assert abs(got[t, column] - expected) < 1e-6, (
                    f"row {t}, column {column} of {width} should be {'cos' if column % 2 else 'sin'}({angle:.5f}) = "
                    f"{expected:.5f}, got {got[t, column]:.5f}. Sine and cosine take turns, and clock i has the "
                    "exponent 2i / E")
    ### BEGIN HIDDEN TESTS
    table = sinusoidal_table(300, 64)
    assert abs(table[299, 0] - math.sin(299)) < 1e-6, f"row 299 starts with sin(299) = {math.sin(299):.5f}"
    near = [float(table[t] @ table[t + 5]) for t in (0, 100, 290)]
    assert max(near) - min(near) < 1e-3, f"two rows five apart have the same product everywhere, got {near}"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_sinusoidal_table()

# %% [markdown]
"""
**Measure.** What such a table offers a model: the product of two rows depends on their distance only, not on
where they stand. Look at the rows of the printed matrix: each is the one above, shifted.
"""

# %% nbgrader={"grade": false, "grade_id": "11-measure-distance", "locked": true, "schema_version": 3, "solution": false, "task": false}
def measure_distance():
    """Products of sinusoidal rows, and the largest deviation among equal distances."""
    table = sinusoidal_table(64, 32)
    products = table @ table.T
    print(products[:5, :5].round(2))
    for distance in (1, 5, 20):
        along = np.diagonal(products, distance)
        print(f"distance {distance:2}: product {along.mean():6.3f}, same everywhere within {np.ptp(along):.1e}")
    angle = 5000 / 10000 ** (np.arange(0, 32, 2) / 32)
    rounded = np.float32(5000) / np.float32(10000) ** (np.arange(0, 32, 2, dtype=np.float32) / np.float32(32))
    print(f"angles in float32 at position 5000: sines off by up to {np.abs(np.sin(angle) - np.sin(rounded)).max():.1e}")


def plot_table():
    """The table as a picture: fast clocks on the left, slow ones on the right."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("matplotlib is not installed; the picture is skipped.")
        return
    plt.imshow(sinusoidal_table(64, 64), cmap="RdBu", aspect="auto")
    plt.xlabel("column")
    plt.ylabel("position")
    plt.show()


if __name__ == "__main__":
    measure_distance()
    plot_table()

# %% [markdown]
"""
## 5. Positions must count on

In training a model sees whole texts, with positions 0 to T - 1. When it generates with a cache (lesson 17),
it is given *one* new token at a time, and that token stands at position 7 or 700. What if the layer counts
from 0 each time?
"""

# %%
if __name__ == "__main__":
    table = sinusoidal_table(8, 4)
    print("three tokens at once:\n", table[np.arange(3)].round(3), sep="")
    print("one at a time:\n", np.concatenate([table[np.arange(1)] for _ in range(3)]).round(3), sep="")

# %% [markdown]
"""
Every token believes that it is the first. This is one of the commonest faults of cached generation: nothing
crashes, the text just gets worse.

So positions can be given. If they are not, they count from 0. And a position that the table does not have
must be an error, not the last row again:

    seq_len 3, none given        ->  [0, 1, 2]
    given [7]                    ->  [7]
    max_seq_len 8, given [8]     ->  ValueError: position 8 ... max_seq_len 8
"""

# %% nbgrader={"grade": false, "grade_id": "11-choose-positions", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def choose_positions(positions, seq_len, max_seq_len):
    """The positions of T tokens as an integer array: those given, (T,) or (B, T), else 0 .. T-1.

    A negative position, or one that is max_seq_len or more, is a ValueError that names it and max_seq_len.

    >>> choose_positions(None, 3, 8).tolist(), choose_positions([7], 1, 8).tolist()
    ([0, 1, 2], [7])
    """
    ### BEGIN SOLUTION
    positions = np.arange(seq_len) if positions is None else as_ids(positions)
    if positions.size:
        low, high = np.minimum.reduce(positions, axis=None), np.maximum.reduce(positions, axis=None)
        if low < 0 or high >= max_seq_len:
            raise ValueError(f"position {low if low < 0 else high} does not fit: positions run from 0 to "
                             f"max_seq_len - 1, and max_seq_len is {max_seq_len}")
    return positions
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "11-choose-positions-test", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
def test_unit_choose_positions():
    """The oracle is worked by hand."""
    got = np.asarray(choose_positions(None, 3, 8))
    assert got.tolist() == [0, 1, 2], f"without positions, three tokens stand at 0, 1, 2; got {got.tolist()}"
    got = np.asarray(choose_positions([7], 1, 8))
    assert got.tolist() == [7], f"the position 7 was given, got {got.tolist()}: a cached token must not restart at 0"
    got = np.asarray(choose_positions(np.array([[4, 5], [0, 1]]), 2, 8))
    assert got.tolist() == [[4, 5], [0, 1]], f"each text of a batch may have positions of its own, got {got.tolist()}"
    for positions, seq_len, named in (([8], 1, "8"), (None, 9, "8"), ([3, -1], 2, "-1")):
        said = error_of(choose_positions, positions, seq_len, 8)
        assert said, f"positions {positions} of {seq_len} tokens do not fit max_seq_len 8, but no error was raised"
        assert f"position {named}" in said and "max_seq_len" in said, (
            f"the error should name position {named} and max_seq_len, it says: {said}")
    ### BEGIN HIDDEN TESTS
    assert np.asarray(choose_positions(None, 8, 8)).tolist() == list(range(8)), "exactly max_seq_len tokens do fit"
    said = error_of(choose_positions, np.array([[0, 1], [11, 12]]), 2, 12)
    assert "position 12" in said and "max_seq_len" in said, f"position 12 of 12 should be named, it says: {said}"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_choose_positions()

# %% [markdown]
"""
### The module

Both kinds in one class. The learned rows are a parameter and start small. The computed ones are a plain
array: not a parameter, not in `state_dict()`, never trained.

Learned rows go through the same operation as token rows, so the gradient comes for free, also for positions
that stand in every text of the batch.
"""

# %%
#| export
class PositionalEncoding(Module):
    """Add to each row of x the row of its position: x (B, T, E), positions (T,) or (B, T) -> (B, T, E)."""

    def __init__(self, max_seq_len, embed_dim, kind="learned", rng=None):
        if kind not in ("learned", "sinusoidal"):
            raise ValueError(f"kind is 'learned' or 'sinusoidal', got {kind!r}")
        self.max_seq_len, self.embed_dim, self.kind = max_seq_len, embed_dim, kind
        if kind == "sinusoidal":
            self.table = sinusoidal_table(max_seq_len, embed_dim)
        else:
            rng = default_rng() if rng is None else rng
            rows = rng.standard_normal((max_seq_len, embed_dim), dtype=np.float32)
            self.weight = Parameter(rows * np.float32(0.02))

    def forward(self, x, positions=None):
        if x.ndim < 2 or x.shape[-1] != self.embed_dim:
            raise ValueError(f"x should have the shape (B, T, {self.embed_dim}), got {x.shape}")
        positions = choose_positions(positions, x.shape[-2], self.max_seq_len)
        if positions.shape not in (x.shape[-2:-1], x.shape[:-1]):
            raise ValueError(f"positions should have the shape {x.shape[-2:-1]} or {x.shape[:-1]}, one per token of x; "
                             f"got {positions.shape}")
        if self.kind == "sinusoidal":
            return x + self.table[positions]
        return x + apply(embedding_array, self.weight, positions)

    def extra_repr(self):
        return f"{self.max_seq_len}, {self.embed_dim}, kind={self.kind!r}"

# %% nbgrader={"grade": true, "grade_id": "11-positional-encoding-test", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
def test_unit_positional_encoding():
    """The oracle: a whole text at once equals its tokens one by one, as a cache would feed them."""
    for kind in ("learned", "sinusoidal"):
        layer = PositionalEncoding(9, 4, kind=kind, rng=np.random.default_rng(6))
        x = Tensor(np.random.default_rng(7).standard_normal((2, 9, 4)))
        whole = layer(x)
        assert whole.shape == (2, 9, 4) and whole.dtype == np.float32, f"{kind}: got {whole.shape}, {whole.dtype}"
        table = layer.weight.numpy() if kind == "learned" else sinusoidal_table(9, 4)
        assert np.allclose(whole.numpy(), x.numpy() + table), f"{kind}: x[:, t] + table[t] is expected"
        single = layer(x[:, 5:6], positions=[5])
        assert np.array_equal(single.numpy()[:, 0], whole.numpy()[:, 5]), (
            f"{kind}: token 5 alone, at position 5, should be what it is within the whole text")
        ragged = layer(x[:, :2], positions=[[3, 4], [0, 1]]).numpy() - x.numpy()[:, :2]
        assert np.allclose(ragged, [table[3:5], table[0:2]], atol=1e-6), f"{kind}: each text has positions of its own"
        assert "max_seq_len" in error_of(layer, x, np.arange(1, 10)), f"{kind}: position 9 of 9 should be refused"
    ### BEGIN HIDDEN TESTS
    assert PositionalEncoding(4, 6, kind="sinusoidal").parameters() == [], "a computed table has no parameters"
    layer = PositionalEncoding(4, 3)
    layer(Tensor(np.zeros((5, 2, 3)))).sum().backward()
    got = layer.weight.grad.numpy()[:, 0].tolist()
    assert got == [5, 5, 0, 0], f"five texts use positions 0 and 1: gradients 5, 5, 0, 0, got {got}"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_positional_encoding()

# %% [markdown]
"""
**Predict.** GPT-2 small has 50,257 token rows and 1,024 position rows of 768 float32 numbers. How many bytes
do the position rows take? And how many token rows does *one* forward pass of a single text of 10 tokens read,
at most?
"""

# %% nbgrader={"grade": false, "grade_id": "11-predict-bytes", "locked": false, "schema_version": 3, "solution": true, "task": false}
predicted_position_bytes = None  # replace: a number (a product is fine)
predicted_rows_read = None       # replace: a number
### BEGIN SOLUTION
predicted_position_bytes = 1024 * 768 * 4
predicted_rows_read = 10
### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "11-predict-bytes-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_predict_bytes():
    """The oracle is the table itself, and distinct ids counted by NumPy."""
    expected = np.empty((1024, 768), np.float32).nbytes
    assert predicted_position_bytes != expected // 4, "that is the number of numbers; each takes 4 bytes"
    assert predicted_position_bytes == expected, f"{expected} bytes; you predicted {predicted_position_bytes}"
    most = max(len(np.unique(np.random.default_rng(s).integers(50_257, size=10))) for s in range(9))
    assert predicted_rows_read == most, f"ten tokens name at most {most} rows; you predicted {predicted_rows_read}"


if __name__ == "__main__":
    test_unit_predict_bytes()

# %% [markdown]
"""
## The module test

Everything once more, and one scenario: a small classifier must tell the pair *a b* from *b a*. It embeds two
tokens, applies ReLU, takes the mean over the two, and decides. Without positions it cannot do better than
chance, whatever it learns; with them it can.
"""

# %%
def train_order(kind, steps=600):
    """Accuracy of telling 'a b' from 'b a' for all pairs of four tokens; kind None: without positions."""
    rng = np.random.default_rng(8)
    pairs = np.array([(a, b) for a in range(4) for b in range(4) if a != b])
    labels = (pairs[:, 0] > pairs[:, 1]).astype(np.int64)
    embed, head = Embedding(4, 64, rng=rng), Linear(64, 2, rng=rng)
    place = PositionalEncoding(2, 64, kind=kind, rng=rng) if kind else None
    parameters = [p for part in (embed, head, place) if part is not None for p in part.parameters()]
    for step in range(steps + 1):
        x = embed(pairs)
        logits = head(relu(place(x) if place else x).mean(dim=1))
        if step == steps:
            return float((logits.numpy().argmax(axis=1) == labels).mean())
        for parameter in parameters:
            parameter.zero_grad()
        cross_entropy(logits, labels).backward()
        for parameter in parameters:
            parameter.data -= np.float32(0.2) * parameter.grad.data


if __name__ == "__main__":
    for kind in (None, "learned", "sinusoidal"):
        print(f"positions {str(kind):10}: {train_order(kind):.0%} of the pairs told apart")

# %% nbgrader={"grade": true, "grade_id": "11-module-test", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
def test_module():
    """Every check of this lesson, then one scenario from end to end."""
    for check in (
        test_unit_predict_shape, test_unit_embedding_array, test_unit_predict_gradient, test_unit_sum_rows,
        test_unit_embedding_rule, test_unit_embedding, test_unit_predict_row, test_unit_sinusoidal_table,
        test_unit_choose_positions, test_unit_positional_encoding, test_unit_predict_bytes,
    ):
        check()
    blind = train_order(None)
    assert blind == 0.5, f"without positions 'a b' and 'b a' are the same sum: half right, got {blind:.0%}"
    for kind in ("learned", "sinusoidal"):
        got = train_order(kind)
        assert got > 0.9, f"with {kind} positions the pairs can be told apart, got {got:.0%} right"
    embed = Embedding(10, 4)
    with no_grad():
        assert not embed([1, 2]).requires_grad, "inside no_grad the look-up records nothing"
    print("Lesson 11: every check passed.")


if __name__ == "__main__":
    test_module()

# %% [markdown]
"""
## Summary

* An id is a name. An embedding gives it a row; looking up is a product with a one-hot row, without the
  product.
* The gradient goes back to the rows that were used, and repeated ids add up.
* Sums do not know an order. A row per position, added to the row of the token, tells it.
* Position rows are learned (a table, as long as the longest text) or computed (sines and cosines, float32).
* Positions count on from what came before; they restart at 0 only with a new text.

## Exercises

1. In the classifier above, leave out the ReLU. Why does it fail now, although positions are still added?
2. Train embeddings for the characters of a text, so that the row of a character predicts the next one. Which
   characters end up with similar rows?
3. Stretch a sinusoidal table: train with positions 0 to 7 and try 8 to 15. What happens with learned rows?
4. Multiply the token rows by the square root of E before adding sinusoidal positions, as the 2017 paper does.
   What would go wrong without it for rows of standard deviation 0.02?
"""

# %% [markdown]
"""
## Design note: where positions went

The 2017 transformer found learned and sinusoidal positions equally good, and took the sinusoidal ones because
they might reach beyond the trained length (Vaswani and others, section 3.5). GPT-2 took the learned ones, and
paid with a hard limit: position 1024 does not exist.

Most models since Llama add nothing to the rows. They *turn* queries and keys by an angle that grows with the
position (rotary embedding; Su and others 2021, "RoFormer"), so that attention sees distances directly. Lesson
21 builds it, on the clocks of this lesson.

## What breaks next

Each row now says which token stands where, but no row knows anything about the others. Lesson 12 lets each
position look at those before it.
"""

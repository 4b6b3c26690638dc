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
#     lesson: "04"
# ---

# %% [markdown]
"""
# Lesson 04: Losses

**You build** the numbers that say how wrong a model is: mean squared error, cross entropy for classes and
tokens, and binary cross entropy, each finite where the model is most wrong.

**You need** lessons 01 (`apply`), 02 (`log_softmax_array`) and 03 (`Module`).

**Exported to** `tinytorch/core/losses.py`.

**Time** about 60 minutes.

A loss takes predictions and targets and returns one number, the mean over all of them. Training (lessons 05
to 07) does nothing but make that number smaller.
"""

# %%
#| default_exp core.losses
#| export
import numpy as np

from tinytorch.core.activations import as_float, log_softmax_array, shift_array, sum_along
from tinytorch.core.layers import Module
from tinytorch.core.tensor import apply, mean_array

# %%
import math
import warnings

from tinytorch.core.activations import sigmoid_array, softmax_array
from tinytorch.core.tensor import Tensor, plug_in

# %% [markdown]
"""
The rulers of the checks. `check_loss` wants one float32 number, computed without any warning. `refuses`
wants an error, and wants it to name what is wrong.
"""

# %%
def check_loss(function, inputs, expected, mistake, tolerance=1e-5, **params):
    """Run the loss; it must give one float32 number close to `expected`, and no warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = np.asarray(function(*inputs, **params))
    assert got.shape == (), f"got shape {got.shape}, expected (): a loss is one number, a mean"
    complaint = caught[0].message if caught else ""
    assert not caught, f"NumPy warned: {complaint}. A log of 0 or an exp of a large number? {mistake}"
    assert got.dtype == np.float32, f"got {got.dtype}, expected float32. {mistake}"
    assert np.isclose(got, expected, rtol=tolerance, atol=1e-6), f"got {got}, expected {expected}. {mistake}"


def refuses(function, inputs, kind, words, **params):
    """The call must raise an error of that kind whose text holds all the words."""
    try:
        result = function(*inputs, **params)
    except kind as error:
        absent = [word for word in words if word not in str(error)]
        assert not absent, f"the error does not say {absent}: {error}"
    else:
        raise AssertionError(f"got {result} and no error, expected {kind.__name__}: {', '.join(words)}")


# %% [markdown]
"""
## 1. How far is a prediction from its target?

For numbers the answer is the mean squared error: subtract, square, average.

**Picture.**

    prediction   1    2    5
    target       1    4    2
    error        0   -2    3       squares 0, 4, 9, mean 13/3

It looks too simple to go wrong. We give it a prediction with one column, as a linear layer with one output
returns it, and a flat list of targets.
"""

# %%
def mse_trusting(prediction, target):
    return np.mean((prediction - target) ** 2)


if __name__ == "__main__":
    perfect = np.array([[1.0], [2.0], [3.0]])
    print("loss of a perfect prediction:", mse_trusting(perfect, np.array([1.0, 2.0, 3.0])))
    print("shape of the difference:", (perfect - np.array([1.0, 2.0, 3.0])).shape)

# %% [markdown]
"""
A perfect prediction gets a loss above zero. (3, 1) minus (3,) broadcasts to (3, 3): every prediction is
compared with every target. Nothing crashes, the model trains, and it learns to answer the mean.

**Build** the guard that all losses with equal shapes share. It returns both as floats of one dtype: targets
are often integers, and float32 minus int64 is float64 in NumPy.
"""

# %% nbgrader={"grade": false, "grade_id": "04-same-shape", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def same_shape(prediction, target, name):
    """Return both as floats of the prediction's dtype; ValueError if shapes differ or are empty.

    >>> same_shape(np.ones((3, 1)), np.ones(3), "mse_loss")
    Traceback (most recent call last):
    ValueError: mse_loss: prediction (3, 1) and target (3,) must have the same shape
    """
    prediction = as_float(prediction)
    target = np.asarray(target, dtype=prediction.dtype)
    ### BEGIN SOLUTION
    if prediction.shape != target.shape:
        shapes = f"prediction {prediction.shape} and target {target.shape}"
        raise ValueError(f"{name}: {shapes} must have the same shape")
    ### END SOLUTION
    if prediction.size == 0:
        raise ValueError(f"{name}: there is nothing to average, the shape is {prediction.shape}")
    return prediction, target


# %% nbgrader={"grade": true, "grade_id": "04-same-shape-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_same_shape():
    """Oracle: shapes that are equal, and shapes that only broadcast."""
    column, flat = np.ones((3, 1), np.float32), np.ones(3, np.float32)
    refuses(same_shape, (column, flat, "mse_loss"), ValueError, ["mse_loss", "(3, 1)", "(3,)"])
    refuses(same_shape, (flat, np.ones(1), "mse_loss"), ValueError, ["(3,)", "(1,)"])
    prediction, target = same_shape(flat, np.array([1, 2, 3]), "mse_loss")
    assert target.dtype == np.float32, f"target is {target.dtype}, expected the prediction's float32"
    assert np.array_equal(prediction, flat), f"got {prediction}, expected the prediction as it was"
    ### BEGIN HIDDEN TESTS
    refuses(same_shape, (np.ones((2, 3)), np.ones((3, 2)), "bce"), ValueError, ["bce", "(2, 3)", "(3, 2)"])
    refuses(same_shape, (np.ones((2, 3)), np.ones(6), "bce"), ValueError, ["(2, 3)", "(6,)"])
    refuses(same_shape, (np.ones(0), np.ones(0), "bce"), ValueError, ["nothing to average"])
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_same_shape()

# %% [markdown]
"""
**Build** the loss: square every error, then take the mean over all of them.
"""

# %% nbgrader={"grade": false, "grade_id": "04-mse", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def mse_array(prediction, target):
    """Compute the mean of (prediction - target)^2 over all elements; equal shapes -> one number.

    >>> float(mse_array(np.array([1.0, 2.0, 5.0]), np.array([1.0, 4.0, 2.0])))
    4.333333333333333
    """
    prediction, target = same_shape(prediction, target, "mse_loss")
    ### BEGIN SOLUTION
    error = prediction - target
    return np.mean(error * error)
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "04-mse-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_mse():
    """Oracle: the numbers of the picture."""
    prediction, target = np.array([1, 2, 5], np.float32), np.array([1, 4, 2])
    check_loss(mse_array, (prediction, target), 13 / 3, "Square each error, then average over the elements")
    square = np.array([[1, 2], [3, 4]], np.float32)
    check_loss(mse_array, (square, square - 2), 4, "The mean goes over all elements of all rows")
    ### BEGIN HIDDEN TESTS
    p, t = np.random.default_rng(0).standard_normal((2, 3, 4, 5)).astype(np.float32)
    loop = sum((a - b) ** 2 for a, b in zip(p.ravel().tolist(), t.ravel().tolist())) / 60
    check_loss(mse_array, (p, t), loop, "Square each error, then average over the elements")
    check_loss(mse_array, (p * 1e4, p * 1e4), 0, "A perfect prediction has loss 0")
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_mse()

# %% [markdown]
"""
**Look back.** What if one of a hundred targets is wrong by 100 and the others are exact? The mean squared
error is 100, all of it from that one. Squares listen to outliers.
"""

# %% [markdown]
"""
## 2. What is the loss of a choice?

A language model does not predict a number. It gives scores (*logits*) to all tokens of a vocabulary, and
the target is the index of the right one. Softmax makes shares of the scores. A good model gives a large
share to the right token, so we take

    loss = -log(share of the right class)

as a measure of surprise: 0 for share 1, large for a small share. The mean over all rows is the *cross
entropy*.

**Picture.** Logits with shares [1/8, 2/8, 5/8], as in lesson 02:

    target 2:  -log(5/8) = 0.470        target 0:  -log(1/8) = 2.079
"""

# %% [markdown]
"""
**Predict.** An untrained model gives every one of 65 characters the same share. What is its loss? (You may
write `math.log`.)
"""

# %% nbgrader={"grade": false, "grade_id": "04-predict-uniform", "locked": false, "schema_version": 3, "solution": true, "task": false}
# predicted_uniform = ...  (a number)
### BEGIN SOLUTION
predicted_uniform = math.log(65)
### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "04-predict-uniform-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_predict_uniform():
    """Oracle: the definition, with a share of one in 65."""
    expected = -math.log(1 / 65)
    wrong = f"got {predicted_uniform}, computed {expected}: minus the logarithm of the share 1/65"
    assert abs(predicted_uniform - expected) < 0.01, wrong


if __name__ == "__main__":
    test_unit_predict_uniform()

# %% [markdown]
"""
Remember this number. A model that starts well above it is initialised badly; a model that stays there has
learned nothing.

The obvious code takes softmax, picks, takes the logarithm. We try it where a model is very wrong.
"""

# %%
if __name__ == "__main__":
    very_wrong = np.array([0, 200], np.float32)
    with np.errstate(divide="ignore"):
        print("log of softmax, target 0:", -np.log(softmax_array(very_wrong))[0])
    print("log_softmax, target 0:   ", -log_softmax_array(very_wrong)[0])

# %% [markdown]
"""
The first is infinite exactly where the gradient is needed most. `log_softmax_array` of lesson 02 gives the
surprise directly.

**Build** the pick: from row i take the column `ids[i]`. NumPy does this with two integer arrays as an
index, one for the rows and one for the columns. `logs[:, ids]` is something else: all rows, and from each
all those columns.
"""

# %% nbgrader={"grade": false, "grade_id": "04-pick", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def pick_array(logs, ids):
    """Take from each row the entry of its class: logs (N, C), ids (N,) -> (N,).

    >>> pick_array(np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([1, 0]))
    array([2., 3.])
    """
    ### BEGIN SOLUTION
    return logs[np.arange(len(ids)), ids]
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "04-pick-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_pick():
    """Oracle: a list comprehension."""
    logs = np.arange(12, dtype=np.float32).reshape(4, 3)
    ids = np.array([2, 0, 1, 1])
    got, expected = np.asarray(pick_array(logs, ids)), [row[i] for row, i in zip(logs.tolist(), ids)]
    wrong = f"got shape {got.shape}, expected (4,): one entry for each row, not all rows with all columns"
    assert got.shape == (4,), wrong
    assert got.tolist() == expected, f"got {got.tolist()}, expected {expected}: row i gives its column ids[i]"
    ### BEGIN HIDDEN TESTS
    logs, ids = np.random.default_rng(1).standard_normal((6, 9)), np.array([0, 8, 3, 3, 7, 1])
    expected = [row[i] for row, i in zip(logs.tolist(), ids)]
    got = np.asarray(pick_array(logs, ids)).tolist()
    assert got == expected, f"got {got}, expected {expected}: row i gives its column ids[i]"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_pick()

# %% [markdown]
"""
## 3. Which targets count?

Sentences in a batch have different lengths, and the short ones are padded. A padded place has no right
answer: its target is `ignore_index` (-100, as in PyTorch), and it must count neither in the sum nor in the
number of terms.

All other targets must be classes, 0 to C - 1. NumPy would take -1 for the last column without a word. So
they are checked first. This check is given; read what its messages tell.
"""

# %%
#| export
def kept_targets(logits, target, ignore_index):
    """Check logits (..., C) and targets (...); return the row numbers that count, and their classes."""
    say = "cross_entropy:"
    if target.dtype.kind not in "iu":
        raise ValueError(f"{say} targets are class numbers (integers), got {target.dtype}")
    if logits.ndim == 0 or target.shape != logits.shape[:-1]:
        raise ValueError(f"{say} logits {logits.shape} need targets {logits.shape[:-1]}, got {target.shape}. "
                         "The classes are the last dimension, and targets have no such dimension")
    ids = target.reshape(-1)
    rows = np.flatnonzero(ids != ignore_index)
    if rows.size == 0:
        raise ValueError(f"{say} nothing to average, all {ids.size} targets are ignore_index={ignore_index}")
    ids, classes = ids[rows], logits.shape[-1]
    wrong = ids[(ids < 0) | (ids >= classes)]
    if wrong.size:
        raise IndexError(f"{say} target {wrong[0]} is out of range, the classes go from 0 to {classes - 1}")
    return rows, ids


# %% [markdown]
"""
**Picture.** Three rows with shares [1/8, 2/8, 5/8], targets `[2, -100, 0]`. Two rows count:

    loss = (-log(5/8) - log(1/8)) / 2 = (0.470 + 2.079) / 2 = 1.275

**Predict.** What would come out if the ignored row were counted in the number of terms (as a 0 in the sum)?
"""

# %% nbgrader={"grade": false, "grade_id": "04-predict-ignored", "locked": false, "schema_version": 3, "solution": true, "task": false}
# predicted_ignored = ...  (a number)
### BEGIN SOLUTION
predicted_ignored = (0.470 + 2.079) / 3
### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "04-predict-ignored-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_predict_ignored():
    """Oracle: a mean of three numbers."""
    expected = np.mean([-math.log(5 / 8), 0, -math.log(1 / 8)])
    wrong = f"got {predicted_ignored}, computed {expected}: the same sum, divided by three rows"
    assert abs(predicted_ignored - expected) < 0.005, wrong


if __name__ == "__main__":
    test_unit_predict_ignored()

# %% [markdown]
"""
The more padding, the smaller the loss: a model would look better for being fed short sentences.

**Build** cross entropy. `rows` and `ids` from `kept_targets` say which rows count and what their classes
are. The logits may have any leading dimensions, (N, C) or (B, T, C); flatten them first. Log-softmax, pick, mean
is right. Of all its logarithms only one per row is used; with many classes it is faster to take only that one:
`log(total) - shifted[target]`, as the lesson's own solution does.
"""

# %% nbgrader={"grade": false, "grade_id": "04-cross-entropy", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def cross_entropy_array(logits, target, ignore_index=-100):
    """Mean surprise -log softmax(logits)[target] over the targets that count.

    logits (..., C), target (...) integers, classes last: (N, C) with (N,), or (B, T, C) with (B, T).
    ValueError for shapes that do not fit or nothing that counts, IndexError for a class that does not exist.

    >>> float(cross_entropy_array(np.zeros((2, 4)), np.array([3, -100])))  # log 4
    1.3862943611198906
    """
    logits, target = as_float(logits), np.asarray(target)
    rows, ids = kept_targets(logits, target, ignore_index)
    ### BEGIN SOLUTION
    flat = logits.reshape(-1, logits.shape[-1])
    if rows.size < len(flat):
        flat = flat[rows]
    shifted = shift_array(flat, -1)
    picked = pick_array(shifted, ids)
    total = sum_along(np.exp(shifted, out=shifted), -1)[:, 0]
    return mean_array(np.log(np.maximum(total, 1)) - picked)
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "04-cross-entropy-test", "locked": true, "points": 4, "schema_version": 3, "solution": false, "task": false}
def test_unit_cross_entropy():
    """Oracle: the numbers of the pictures, from Python's math.log."""
    logits = np.log(np.array([[1, 2, 5], [4, 2, 2], [1, 2, 5]], np.float32)) + 3
    first, last = -math.log(1 / 8), -math.log(5 / 8)
    mean = (last - math.log(2 / 8) + first) / 3
    check_loss(cross_entropy_array, (logits, np.array([2, 2, 0])), mean, "Minus the mean log share")
    check_loss(cross_entropy_array, (logits, np.array([2, -100, 0])), (last + first) / 2,
               "An ignored row counts neither in the sum nor in the number of terms")
    deep, targets = logits.reshape(1, 3, 3), np.array([[2, 2, 0]])
    check_loss(cross_entropy_array, (deep, targets), mean, "(B, T, C): flatten to rows of C")
    far = np.array([[1e4, -1e4]], np.float32)
    check_loss(cross_entropy_array, (far, np.array([1])), 2e4, "Very wrong must stay finite, so log_softmax")
    ### BEGIN HIDDEN TESTS
    z = np.random.default_rng(2).standard_normal((2, 5, 7)).astype(np.float32)
    t = np.arange(10).reshape(2, 5) % 7
    t[1, 2] = 99
    loop = [math.log(sum(math.exp(v) for v in z[i, j].tolist())) - float(z[i, j, t[i, j]])
            for i in range(2) for j in range(5) if t[i, j] != 99]
    check_loss(cross_entropy_array, (z, t), sum(loop) / 9, "ignore_index can be any number", ignore_index=99)
    refuses(cross_entropy_array, (logits, np.array([0, 1, 3])), IndexError, ["target 3", "0 to 2"])
    refuses(cross_entropy_array, (logits, np.array([0, 1, -1])), IndexError, ["target -1"])
    refuses(cross_entropy_array, (logits, np.eye(3)), ValueError, ["integers"])
    refuses(cross_entropy_array, (logits, np.array([0])), ValueError, ["(3, 3)", "(1,)"])
    refuses(cross_entropy_array, (logits, np.full(3, -100)), ValueError, ["all 3 targets"])
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_cross_entropy()

# %% [markdown]
"""
**Measure.** The loss of the uniform model, next to the prediction; and `exp(loss)`, the *perplexity*: among
how many equally likely tokens the model is undecided.
"""

# %% nbgrader={"grade": false, "grade_id": "04-measure-uniform", "locked": true, "schema_version": 3, "solution": false, "task": false}
if __name__ == "__main__":
    ids = np.random.default_rng(3).integers(0, 65, (8, 32))
    loss = cross_entropy_array(np.zeros((8, 32, 65), np.float32), ids)
    print(f"uniform over 65: loss {loss:.4f}, predicted {predicted_uniform:.4f}")
    print(f"perplexity: {math.exp(loss):.2f}")
    for gain in (1, 4, 16):
        logits = gain * np.eye(65, dtype=np.float32)[ids]
        print(f"right class ahead by {gain:2d}: loss {cross_entropy_array(logits, ids):.2e}")

# %% [markdown]
"""
**Look back.** What if *all* targets of a batch are ignored? The mean of nothing does not exist. PyTorch
returns NaN; we raise an error, because one NaN in a training run destroys every weight.
"""

# %% [markdown]
"""
## 4. And if there are only two answers?

Spam or not: one probability p is enough. The surprise is -log(p) if the answer is yes, and -log(1 - p) if
it is no. With t = 1 for yes and 0 for no, both in one line:

    loss = -(t log(p) + (1 - t) log(1 - p))            binary cross entropy

**Picture.** p = [0.8, 0.8], t = [1, 0]:  -log(0.8) = 0.223,  -log(0.2) = 1.609,  mean 0.916.

What if p is exactly 0? In `t log(p)` with t = 0 the term is 0 times minus infinity, NaN. PyTorch's rule is
that a logarithm is never below -100. `safe_log` is given.
"""

# %%
#| export
def safe_log(p):
    """Logarithm of probabilities that is never below -100, also for 0 (the rule of torch.nn.BCELoss).

    >>> safe_log(np.array([0.0, 1.0]))
    array([-100.,    0.])
    """
    return np.maximum(np.log(p, out=np.full_like(p, -100), where=p > 0), -100)


def check_unit_interval(values, words):
    """ValueError with these words unless all values lie between 0 and 1."""
    inside = (values >= 0) & (values <= 1)
    if not inside.all():
        raise ValueError(f"{words}, got {values[~inside][0]}")


# %% [markdown]
"""
**Build.** The guards are given. A probability outside of 0 to 1 mostly means that logits were passed in,
and the message says so.
"""

# %% nbgrader={"grade": false, "grade_id": "04-bce", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def bce_array(probabilities, target):
    """Mean of -(t log(p) + (1 - t) log(1 - p)), logarithms not below -100; equal shapes -> one number.

    >>> float(bce_array(np.array([0.5, 1.0]), np.array([1, 1])).round(4))
    0.3466
    """
    p, t = same_shape(probabilities, target, "binary_cross_entropy")
    check_unit_interval(t, "binary_cross_entropy: targets lie between 0 and 1")
    check_unit_interval(p, "binary_cross_entropy: probabilities lie between 0 and 1 (for logits there is "
                           "binary_cross_entropy_with_logits)")
    ### BEGIN SOLUTION
    return -np.mean(t * safe_log(p) + (1 - t) * safe_log(1 - p))
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "04-bce-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_bce():
    """Oracle: the picture, from Python's math.log, and the bound of 100."""
    p = np.array([0.8, 0.8], np.float32)
    expected = -(math.log(0.8) + math.log(0.2)) / 2
    check_loss(bce_array, (p, np.array([1, 0])), expected, "Both answers have a term")
    check_loss(bce_array, (p, np.array([0.5, 1])), -(math.log(0.8) * 1.5 + math.log(0.2) * 0.5) / 2,
               "Targets weigh the two terms: t and 1 - t")
    sure = np.array([0, 1, 0, 1], np.float32)
    check_loss(bce_array, (sure, np.array([0, 1, 1, 0])), 50, "Sure and wrong costs 100, sure and right 0")
    ### BEGIN HIDDEN TESTS
    p, t = np.random.default_rng(4).random((2, 3, 4), dtype=np.float32)
    pairs = zip(p.ravel().tolist(), t.ravel().tolist())
    loop = -sum(b * math.log(a) + (1 - b) * math.log(1 - a) for a, b in pairs) / 12
    check_loss(bce_array, (p, t), loop, "Both answers have a term")
    refuses(bce_array, (np.array([2.0]), np.array([1])), ValueError, ["probabilities", "logits", "2.0"])
    refuses(bce_array, (np.array([0.5]), np.array([-1])), ValueError, ["targets", "-1"])
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_bce()

# %% [markdown]
"""
## 5. Where does the sigmoid lose the loss?

A model gives a logit x, and p = sigmoid(x). We let it be more and more wrong: the answer is no, and x
grows. The loss should be about x.
"""

# %%
if __name__ == "__main__":
    for x in (5, 15, 20, 90, 1000):
        p = sigmoid_array(np.array([x], np.float32))
        print(f"x = {x:4d}: p = {p[0]:.8f}, loss {bce_array(p, np.array([0])):.4f}")

# %% [markdown]
"""
Between 15 and 20 the probability rounds to 1, and from there on the loss is 100, whatever x is. A flat loss
has no gradient: the model is as wrong as can be and learns nothing. The remedy is the same as for softmax:
join the two formulas and simplify before computing.

    -log(1 - sigmoid(x)) = log(1 + exp(x))                            answer no
    -log(sigmoid(x))     = log(1 + exp(x)) - x                        answer yes
    both                 = log(1 + exp(x)) - x t

and, so that exp never sees a positive number, `log(1 + exp(x)) = max(x, 0) + log(1 + exp(-|x|))`.

**Predict.** The loss for x = 1000 when the answer is no?
"""

# %% nbgrader={"grade": false, "grade_id": "04-predict-logit", "locked": false, "schema_version": 3, "solution": true, "task": false}
# predicted_logit_loss = ...  (a number)
### BEGIN SOLUTION
predicted_logit_loss = 1000
### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "04-predict-logit-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_predict_logit():
    """Oracle: the safe formula in plain Python."""
    expected = max(1000, 0) + math.log1p(math.exp(-1000)) - 1000 * 0
    wrong = f"got {predicted_logit_loss}, computed {expected}: max(x, 0) + log(1 + exp(-|x|)) - x t"
    assert abs(predicted_logit_loss - expected) < 1e-6, wrong


if __name__ == "__main__":
    test_unit_predict_logit()

# %% [markdown]
"""
**Build.** `np.log1p(e)` is log(1 + e), exact also when e is tiny: there `1 + e` would round to 1, and a
small loss to 0.
"""

# %% nbgrader={"grade": false, "grade_id": "04-bce-logits", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def bce_with_logits_array(logits, target):
    """Mean of log(1 + exp(x)) - x t: binary cross entropy of sigmoid(logits), never infinite, never flat.

    >>> float(bce_with_logits_array(np.array([1000.0, 1000.0]), np.array([0, 1])))
    500.0
    """
    x, t = same_shape(logits, target, "binary_cross_entropy_with_logits")
    check_unit_interval(t, "binary_cross_entropy_with_logits: targets lie between 0 and 1")
    ### BEGIN SOLUTION
    return np.mean(np.maximum(x, 0) - x * t + np.log1p(np.exp(-np.abs(x))))
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "04-bce-logits-test", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
def test_unit_bce_logits():
    """Oracle: the definition in Python's float64, and the predicted value."""
    x, t = np.array([-2, 0, 1, 3], np.float32), np.array([1, 0, 0.25, 1])
    shares = [1 / (1 + math.exp(-v)) for v in x.tolist()]
    expected = -sum(b * math.log(p) + (1 - b) * math.log(1 - p) for p, b in zip(shares, t.tolist())) / 4
    check_loss(bce_with_logits_array, (x, t), expected, "log(1 + exp(x)) - x t, averaged")
    wrong_and_sure = np.array([1000, -1e4], np.float32)
    answers = np.array([0, 1])
    check_loss(bce_with_logits_array, (wrong_and_sure, answers), 5500, "It must grow with x, not stop at 100")
    small = bce_with_logits_array(np.array([20], np.float32), np.array([1]))
    assert small > 1e-9, f"got {small}, expected 2e-09: log1p keeps what 1 + e rounds away"
    ### BEGIN HIDDEN TESTS
    z = np.random.default_rng(5).standard_normal((3, 4)).astype(np.float32) * 4
    u = (z > 1).astype(np.int64)
    loop = sum(math.log(1 + math.exp(v)) - v * b for v, b in zip(z.ravel().tolist(), u.ravel().tolist())) / 12
    check_loss(bce_with_logits_array, (z, u), loop, "log(1 + exp(x)) - x t, averaged")
    refuses(bce_with_logits_array, (z, u + 1), ValueError, ["targets lie between 0 and 1"])
    refuses(bce_with_logits_array, (z, u[0]), ValueError, ["(3, 4)", "(4,)"])
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_bce_logits()

# %% [markdown]
"""
**Measure.** Both ways side by side, for the answer no.
"""

# %% nbgrader={"grade": false, "grade_id": "04-measure-logits", "locked": true, "schema_version": 3, "solution": false, "task": false}
def print_both_ways():
    """Binary cross entropy by probability and by logit, as the model gets more wrong."""
    for x in (5, 15, 20, 90, 1000):
        logit = np.array([x], np.float32)
        by_share, by_logit = (f(v, np.array([0])) for f, v in
                              ((bce_array, sigmoid_array(logit)), (bce_with_logits_array, logit)))
        print(f"x = {x:4d}: through the probability {by_share:8.4f}, from the logit {by_logit:9.4f}")


if __name__ == "__main__":
    print_both_ways()

# %% nbgrader={"grade": false, "grade_id": "04-measure-plot", "locked": true, "schema_version": 3, "solution": false, "task": false}
def plot_losses():
    """Draw the loss of both answers over the logit (needs matplotlib)."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("matplotlib is not installed: pip install matplotlib")
        return
    x = np.linspace(-6, 6, 121, dtype=np.float32)
    for answer in (0, 1):
        plt.plot(x, [bce_with_logits_array(v, np.array(answer)) for v in x], label=f"answer {answer}")
    plt.legend()
    plt.show()


# %% [markdown]
"""
**Look back.** Cross entropy over two classes and binary cross entropy are the same thing. Which logits
would the two classes need? (Exercise 1 lets you check your answer.)

## 6. How does a loss reach the engine?

As everything does: through `apply`. Prediction and target are inputs, `ignore_index` is a parameter with a
name. These three are the worked siblings.
"""

# %%
#| export
def mse_loss(prediction, target):
    """Mean squared error of a Tensor; target is a Tensor or array of the same shape."""
    return apply(mse_array, prediction, target)


def binary_cross_entropy(probabilities, target):
    """Binary cross entropy of probabilities; after a sigmoid, prefer the form with logits."""
    return apply(bce_array, probabilities, target)


def binary_cross_entropy_with_logits(logits, target):
    """Binary cross entropy of sigmoid(logits), computed from the logits."""
    return apply(bce_with_logits_array, logits, target)


# %% [markdown]
"""
**Build** the function and the module for cross entropy. A loss module is a `Module` that takes two inputs;
it owns no parameters, but `CrossEntropyLoss` remembers its `ignore_index`.
"""

# %% nbgrader={"grade": false, "grade_id": "04-door", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def cross_entropy(logits, target, ignore_index=-100):
    """Mean surprise of a Tensor of logits (..., C) at integer targets (...), classes last."""
    ### BEGIN SOLUTION
    return apply(cross_entropy_array, logits, target, ignore_index=ignore_index)
    ### END SOLUTION


class CrossEntropyLoss(Module):
    """cross_entropy as a module; targets equal to ignore_index do not count."""

    def __init__(self, ignore_index=-100):
        self.ignore_index = ignore_index

    def forward(self, logits, target):
        ### BEGIN SOLUTION
        return cross_entropy(logits, target, ignore_index=self.ignore_index)
        ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "04-door-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_door():
    """Oracle: what an engine behind the door sees, and the number of the picture."""
    seen = []
    record = {"record": lambda self, op, inputs, params, output: seen.append(params)}
    recorder = type("Recorder", (), record)()
    logits, target = Tensor(np.log([[1.0, 2.0, 5.0], [1.0, 2.0, 5.0]])), np.array([2, 1])
    previous = plug_in(recorder)
    try:
        losses = [cross_entropy(logits, target), CrossEntropyLoss(ignore_index=1)(logits, target)]
    finally:
        plug_in(previous)
    wrong = f"the engine saw {seen}, expected ignore_index -100 and 1: use apply, with the module's own"
    assert seen == [{"ignore_index": -100}, {"ignore_index": 1}], wrong
    values = [float(loss.data) for loss in losses]
    expected = [-(math.log(5 / 8) + math.log(2 / 8)) / 2, -math.log(5 / 8)]
    assert np.allclose(values, expected, atol=1e-5), f"got {values}, expected {expected}"
    ### BEGIN HIDDEN TESTS
    loss = cross_entropy(logits, Tensor(target))
    assert isinstance(loss, Tensor) and loss.shape == (), f"got {loss!r}, expected a Tensor of shape ()"
    assert CrossEntropyLoss().parameters() == [], "a loss owns nothing that is trained"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_door()

# %%
#| export
class MSELoss(Module):
    """mse_loss as a module."""

    def forward(self, prediction, target):
        return mse_loss(prediction, target)


class BCELoss(Module):
    """binary_cross_entropy as a module."""

    def forward(self, probabilities, target):
        return binary_cross_entropy(probabilities, target)


class BCEWithLogitsLoss(Module):
    """binary_cross_entropy_with_logits as a module."""

    def forward(self, logits, target):
        return binary_cross_entropy_with_logits(logits, target)


# %% [markdown]
"""
## 7. The module test

All checks once more, and one scenario: three models predict the next character of a padded text. The loss
must rank them as a person would: the one that knows, the one that has no idea, the one that is sure of the
wrong thing. And padding must not change any of it.
"""

# %% nbgrader={"grade": true, "grade_id": "04-module-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_module():
    """Oracle: the ranking of three models, and log(C) for the one without an idea."""
    checks = [test_unit_same_shape, test_unit_mse, test_unit_pick, test_unit_cross_entropy, test_unit_bce]
    for check in [*checks, test_unit_bce_logits, test_unit_door]:
        check()

    target = np.array([[0, 1, 2, 3], [3, 2, -100, -100]])
    right = np.eye(4, dtype=np.float32)[np.maximum(target, 0)] * 1e4
    models = {"knows": right, "no idea": right * 0, "sure and wrong": np.roll(right, 1, axis=-1)}
    loss = CrossEntropyLoss()
    values = {name: float(loss(Tensor(logits), target).data) for name, logits in models.items()}
    assert np.isclose(values["knows"], 0), f"got {values['knows']}, expected 0 for the model that knows"
    assert np.isclose(values["no idea"], math.log(4)), f"got {values['no idea']}, expected log 4"
    assert np.isclose(values["sure and wrong"], 1e4), f"got {values['sure and wrong']}, expected 10000"
    longer = np.concatenate([target, np.full((2, 3), -100)], axis=1)
    padded = np.concatenate([models["no idea"], np.ones((2, 3, 4), np.float32)], axis=1)
    value = float(loss(Tensor(padded), longer).data)
    assert np.isclose(value, math.log(4)), f"got {value} with more padding, expected the same {math.log(4)}"


if __name__ == "__main__":
    test_module()
    print("Lesson 04: all checks passed")

# %% [markdown]
"""
## Summary

* A loss is one number, the mean over everything that counts.
* Shapes that broadcast are the quiet mistake of a loss: compare them before subtracting.
* Cross entropy is the mean surprise -log(share); a model without an idea has log(C).
* Ignored targets count neither in the sum nor in the number of terms.
* Join log with softmax or sigmoid on paper; then nothing is infinite and nothing is flat.
"""

# %% [markdown]
"""
## Exercises

1. For two classes, `cross_entropy` of the logits `[0, x]` and `binary_cross_entropy_with_logits` of `x` are
   the same. Check it.
2. Write `huber_array(prediction, target, delta=1.0)`: half the square for small errors, linear for large
   ones. Where do outliers go?
3. Label smoothing gives the right class the target 0.9 and shares 0.1 among the rest. Which loss has a
   perfect model now?
"""

# %% [markdown]
"""
## Design note: the largest array of the whole training step

The logits of a language model have one number per token *and per word of the vocabulary*. The cell below
computes their bytes. It prints them beside the attention scores of one layer, the next candidate. The loss
wants two or three arrays of that size. So real systems do not make them: they compute the loss in blocks of
the vocabulary and keep only the maximum and the sum of exps per row, which is all that log-softmax needs.
"""

# %% [markdown]
"""
One such system is Cut Cross-Entropy (Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models",
arXiv:2411.09009). The trade-off is code that fuses the last layer with the loss, so that logits are never
there to look at.
"""

# %% nbgrader={"grade": false, "grade_id": "04-measure-logits-bytes", "locked": true, "schema_version": 3, "solution": false, "task": false}
if __name__ == "__main__":
    batch_size, seq_len, num_heads, vocab_size = 8, 1024, 12, 50257  # GPT-2, 124 million parameters
    logits = batch_size * seq_len * vocab_size * 4 / 2**30
    scores = batch_size * num_heads * seq_len * seq_len * 4 / 2**30
    print(f"8 sequences of 1024 tokens, logits {logits:.2f} GiB, scores of one layer {scores:.2f} GiB")

# %% [markdown]
"""
## What comes next

We can say how wrong a model is. We cannot say yet in which direction each of its weights should move.
Lesson 05 plugs an engine into the door, and every loss of this lesson gets its `backward()`.
"""

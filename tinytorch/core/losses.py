"""Losses: one number that says how wrong a model is: MSE, cross entropy, BCE.

Lesson 04_losses. Built from src/04_losses/04_losses.py by `tito dev build`: change it there, not here.
"""

__all__ = [
    "same_shape",
    "mse_array",
    "pick_array",
    "kept_targets",
    "cross_entropy_array",
    "safe_log",
    "check_unit_interval",
    "bce_array",
    "bce_with_logits_array",
    "mse_loss",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "CrossEntropyLoss",
    "MSELoss",
    "BCELoss",
    "BCEWithLogitsLoss",
]


# %% cell 2
import numpy as np

from tinytorch.core.activations import as_float, log_softmax_array, shift_array, sum_along
from tinytorch.core.layers import Module
from tinytorch.core.tensor import apply, mean_array


# %% cell 9 (04-same-shape)
def same_shape(prediction, target, name):
    """Return both as floats of the prediction's dtype; ValueError if shapes differ or are empty.

    >>> same_shape(np.ones((3, 1)), np.ones(3), "mse_loss")
    Traceback (most recent call last):
    ValueError: mse_loss: prediction (3, 1) and target (3,) must have the same shape
    """
    prediction = as_float(prediction)
    target = np.asarray(target, dtype=prediction.dtype)
    if prediction.shape != target.shape:
        shapes = f"prediction {prediction.shape} and target {target.shape}"
        raise ValueError(f"{name}: {shapes} must have the same shape")
    if prediction.size == 0:
        raise ValueError(f"{name}: there is nothing to average, the shape is {prediction.shape}")
    return prediction, target


# %% cell 12 (04-mse)
def mse_array(prediction, target):
    """Compute the mean of (prediction - target)^2 over all elements; equal shapes -> one number.

    >>> float(mse_array(np.array([1.0, 2.0, 5.0]), np.array([1.0, 4.0, 2.0])))
    4.333333333333333
    """
    prediction, target = same_shape(prediction, target, "mse_loss")
    error = prediction - target
    return np.mean(error * error)


# %% cell 22 (04-pick)
def pick_array(logs, ids):
    """Take from each row the entry of its class: logs (N, C), ids (N,) -> (N,).

    >>> pick_array(np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([1, 0]))
    array([2., 3.])
    """
    return logs[np.arange(len(ids)), ids]


# %% cell 25
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


# %% cell 30 (04-cross-entropy)
def cross_entropy_array(logits, target, ignore_index=-100):
    """Mean surprise -log softmax(logits)[target] over the targets that count.

    logits (..., C), target (...) integers, classes last: (N, C) with (N,), or (B, T, C) with (B, T).
    ValueError for shapes that do not fit or nothing that counts, IndexError for a class that does not exist.

    >>> float(cross_entropy_array(np.zeros((2, 4)), np.array([3, -100])))  # log 4
    1.3862943611198906
    """
    logits, target = as_float(logits), np.asarray(target)
    rows, ids = kept_targets(logits, target, ignore_index)
    flat = logits.reshape(-1, logits.shape[-1])
    if rows.size < len(flat):
        flat = flat[rows]
    shifted = shift_array(flat, -1)
    picked = pick_array(shifted, ids)
    total = sum_along(np.exp(shifted, out=shifted), -1)[:, 0]
    return mean_array(np.log(np.maximum(total, 1)) - picked)


# %% cell 36
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


# %% cell 38 (04-bce)
def bce_array(probabilities, target):
    """Mean of -(t log(p) + (1 - t) log(1 - p)), logarithms not below -100; equal shapes -> one number.

    >>> float(bce_array(np.array([0.5, 1.0]), np.array([1, 1])).round(4))
    0.3466
    """
    p, t = same_shape(probabilities, target, "binary_cross_entropy")
    check_unit_interval(t, "binary_cross_entropy: targets lie between 0 and 1")
    check_unit_interval(p, "binary_cross_entropy: probabilities lie between 0 and 1 (for logits there is "
                           "binary_cross_entropy_with_logits)")
    return -np.mean(t * safe_log(p) + (1 - t) * safe_log(1 - p))


# %% cell 46 (04-bce-logits)
def bce_with_logits_array(logits, target):
    """Mean of log(1 + exp(x)) - x t: binary cross entropy of sigmoid(logits), never infinite, never flat.

    >>> float(bce_with_logits_array(np.array([1000.0, 1000.0]), np.array([0, 1])))
    500.0
    """
    x, t = same_shape(logits, target, "binary_cross_entropy_with_logits")
    check_unit_interval(t, "binary_cross_entropy_with_logits: targets lie between 0 and 1")
    return np.mean(np.maximum(x, 0) - x * t + np.log1p(np.exp(-np.abs(x))))


# %% cell 52
def mse_loss(prediction, target):
    """Mean squared error of a Tensor; target is a Tensor or array of the same shape."""
    return apply(mse_array, prediction, target)


def binary_cross_entropy(probabilities, target):
    """Binary cross entropy of probabilities; after a sigmoid, prefer the form with logits."""
    return apply(bce_array, probabilities, target)


def binary_cross_entropy_with_logits(logits, target):
    """Binary cross entropy of sigmoid(logits), computed from the logits."""
    return apply(bce_with_logits_array, logits, target)


# %% cell 54 (04-door)
def cross_entropy(logits, target, ignore_index=-100):
    """Mean surprise of a Tensor of logits (..., C) at integer targets (...), classes last."""
    return apply(cross_entropy_array, logits, target, ignore_index=ignore_index)


class CrossEntropyLoss(Module):
    """cross_entropy as a module; targets equal to ignore_index do not count."""

    def __init__(self, ignore_index=-100):
        self.ignore_index = ignore_index

    def forward(self, logits, target):
        return cross_entropy(logits, target, ignore_index=self.ignore_index)


# %% cell 56
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

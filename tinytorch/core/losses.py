"""Losses: written ahead of the build, which overwrites this file with the cells of lesson 04."""

import numpy as np

from tinytorch.core.activations import as_float, log_softmax_array
from tinytorch.core.layers import Module
from tinytorch.core.tensor import apply


def same_shape(prediction, target, name):
    prediction = as_float(prediction)
    target = np.asarray(target, dtype=prediction.dtype)
    if prediction.shape != target.shape:
        raise ValueError(f"{name} needs equal shapes, got prediction {prediction.shape} and target {target.shape}")
    if prediction.size == 0:
        raise ValueError(f"{name} of nothing: prediction and target are empty, shape {prediction.shape}")
    return prediction, target


def mse_array(prediction, target):
    prediction, target = same_shape(prediction, target, "mse_loss")
    error = prediction - target
    return np.mean(error * error)


def cross_entropy_array(logits, target, ignore_index=-100):
    logits, target = as_float(logits), np.asarray(target)
    if target.dtype.kind not in "iu":
        raise ValueError(f"cross_entropy needs class indices (integers) as target, got {target.dtype}")
    if target.shape != logits.shape[:-1]:
        raise ValueError(
            f"cross_entropy needs logits (..., C) and target (...) with the class dimension last, "
            f"got logits {logits.shape} and target {target.shape}"
        )
    rows, ids = logits.reshape(-1, logits.shape[-1]), target.reshape(-1)
    kept = np.flatnonzero(ids != ignore_index)
    if kept.size == 0:
        raise ValueError(f"cross_entropy has nothing to average: every target is ignore_index={ignore_index}")
    ids = ids[kept]
    if ids.min() < 0 or ids.max() >= rows.shape[-1]:
        bad = ids[(ids < 0) | (ids >= rows.shape[-1])][0]
        raise IndexError(f"target {bad} is out of range: there are {rows.shape[-1]} classes")
    return -np.mean(log_softmax_array(rows)[kept, ids])


def check_unit_interval(x, message):
    if not np.all((x >= 0) & (x <= 1)):
        raise ValueError(message)


def bce_array(probabilities, target):
    p, t = same_shape(probabilities, target, "binary_cross_entropy")
    check_unit_interval(t, "binary targets are between 0 and 1")
    check_unit_interval(p, "probabilities are between 0 and 1: logits go to binary_cross_entropy_with_logits")
    return -np.mean(t * safe_log(p) + (1 - t) * safe_log(1 - p))


def safe_log(p):
    return np.maximum(np.log(p, out=np.full_like(p, -100), where=p > 0), -100)


def bce_with_logits_array(logits, target):
    x, t = same_shape(logits, target, "binary_cross_entropy_with_logits")
    check_unit_interval(t, "binary targets are between 0 and 1")
    return np.mean(np.maximum(x, 0) - x * t + np.log1p(np.exp(-np.abs(x))))


def mse_loss(prediction, target):
    return apply(mse_array, prediction, target)


def cross_entropy(logits, target, ignore_index=-100):
    return apply(cross_entropy_array, logits, target, ignore_index=ignore_index)


def binary_cross_entropy(probabilities, target):
    return apply(bce_array, probabilities, target)


def binary_cross_entropy_with_logits(logits, target):
    return apply(bce_with_logits_array, logits, target)


class MSELoss(Module):
    def forward(self, prediction, target):
        return mse_loss(prediction, target)


class CrossEntropyLoss(Module):
    def __init__(self, ignore_index=-100):
        self.ignore_index = ignore_index

    def forward(self, logits, target):
        return cross_entropy(logits, target, self.ignore_index)


class BCELoss(Module):
    def forward(self, probabilities, target):
        return binary_cross_entropy(probabilities, target)


class BCEWithLogitsLoss(Module):
    def forward(self, logits, target):
        return binary_cross_entropy_with_logits(logits, target)

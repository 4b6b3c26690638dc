"""What must hold for every input of a loss."""

import math
import warnings

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from tinytorch.core.losses import (
    binary_cross_entropy,
    binary_cross_entropy_with_logits,
    cross_entropy,
    mse_loss,
)
from tinytorch.core.tensor import Tensor

finite = st.floats(-1e4, 1e4, width=32)
few = settings(deadline=None, max_examples=60)


def quiet(function, *inputs, **params):
    """One float32 number, at least 0, finite, without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss = function(*inputs, **params)
    assert (loss.shape, loss.dtype) == ((), np.float32)
    assert -1e-6 <= loss.item() < math.inf
    return loss.item()


@few
@given(data=st.data(), rows=st.integers(1, 6), classes=st.integers(1, 5))
def test_cross_entropy_is_the_mean_of_its_rows(data, rows, classes):
    logits = data.draw(arrays(np.float32, (rows, classes), elements=finite))
    target = data.draw(arrays(np.int64, rows, elements=st.integers(0, classes - 1)))
    kept = data.draw(arrays(bool, rows))
    kept[data.draw(st.integers(0, rows - 1))] = True
    single = [quiet(cross_entropy, Tensor(logits[i]), target[i]) for i in range(rows) if kept[i]]
    whole = quiet(cross_entropy, Tensor(logits), np.where(kept, target, -100))
    np.testing.assert_allclose(whole, np.mean(single), rtol=1e-4, atol=1e-5)


@few
@given(logits=arrays(np.float32, (3, 4), elements=st.integers(-100, 100)), shift=st.integers(-10_000, 10_000))
def test_cross_entropy_ignores_a_common_shift(logits, shift):
    target = np.array([0, 3, 1])
    shifted = logits + np.float32(shift)
    assert quiet(cross_entropy, Tensor(logits), target) == quiet(cross_entropy, Tensor(shifted), target)


@few
@given(x=arrays(np.float32, array_shapes(max_dims=3, max_side=4), elements=finite), data=st.data())
def test_binary_losses(x, data):
    t = data.draw(arrays(np.float32, x.shape, elements=st.sampled_from([0.0, 0.25, 1.0])))
    value = quiet(binary_cross_entropy_with_logits, Tensor(x), t)
    mirrored = quiet(binary_cross_entropy_with_logits, Tensor(-x), 1 - t)
    np.testing.assert_allclose(value, mirrored, rtol=1e-5, atol=1e-6)
    x64 = x.astype(np.float64)
    exact = np.mean(np.logaddexp(0, x64) - x64 * t)
    np.testing.assert_allclose(value, exact, rtol=1e-4, atol=1e-5)


@few
@given(p=arrays(np.float32, array_shapes(max_dims=3, max_side=4), elements=st.floats(0, 1, width=32)), data=st.data())
def test_binary_cross_entropy_is_bounded_by_one_hundred(p, data):
    t = data.draw(arrays(np.float32, p.shape, elements=st.floats(0, 1, width=32)))
    assert quiet(binary_cross_entropy, Tensor(p), t) <= 100
    assert quiet(binary_cross_entropy, Tensor(t.round()), t.round()) == 0


@few
@given(x=arrays(np.float32, array_shapes(max_dims=3, max_side=4), elements=finite))
def test_mse(x):
    assert quiet(mse_loss, Tensor(x), x) == 0
    np.testing.assert_allclose(quiet(mse_loss, Tensor(x), x + 2), 4, rtol=1e-2)
    value = quiet(mse_loss, Tensor(x), np.zeros_like(x))
    np.testing.assert_allclose(value, np.mean(x.astype(np.float64) ** 2), rtol=1e-5, atol=1e-30)

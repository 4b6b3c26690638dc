"""What must hold for every input of an activation."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from tinytorch.core.activations import gelu, log_softmax, relu, sigmoid, silu, softmax, tanh
from tinytorch.core.tensor import Tensor

finite = st.floats(-1e6, 1e6, width=32)
anything = arrays(np.float32, array_shapes(min_dims=1, max_dims=4, max_side=5), elements=finite)
few = settings(deadline=None, max_examples=60)
EVERY = [relu, sigmoid, tanh, gelu, silu, softmax, log_softmax]


@pytest.mark.parametrize("function", EVERY, ids=lambda function: function.__name__)
@few
@given(x=anything)
def test_shape_dtype_and_silence(function, x):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = function(Tensor(x))
    assert (y.shape, y.dtype) == (x.shape, np.float32)
    assert np.isfinite(y.data).all()


@few
@given(x=anything)
def test_bounds_and_symmetries(x):
    x64, t = x.astype(np.float64), Tensor(x)
    assert np.array_equal(relu(t).data, np.where(x > 0, x, 0))
    total = sigmoid(t).data + sigmoid(-t).data
    assert total.shape == x.shape
    np.testing.assert_allclose(total, 1, rtol=1e-6)
    np.testing.assert_array_equal(tanh(-t).data, -tanh(t).data)
    for function in (gelu, silu):
        y, mirrored = function(t).data.astype(np.float64), function(-t).data.astype(np.float64)
        np.testing.assert_allclose(y - mirrored, x64, rtol=1e-5, atol=1e-6)  # f(x) - f(-x) = x for both
        assert (y >= -0.28).all(), "neither falls below -0.2785"


@few
@given(x=anything, data=st.data())
def test_softmax_is_a_distribution_along_any_dimension(x, data):
    dim = data.draw(st.integers(-x.ndim, x.ndim - 1))
    shares, logs = softmax(Tensor(x), dim=dim).data, log_softmax(Tensor(x), dim=dim).data
    assert shares.shape == logs.shape == x.shape
    assert (shares >= 0).all() and (logs <= 1e-6).all()
    np.testing.assert_allclose(shares.sum(axis=dim), 1, rtol=1e-5)
    np.testing.assert_allclose(np.exp(logs.astype(np.float64)), shares, rtol=1e-4, atol=1e-6)
    winner = np.expand_dims(shares.argmax(axis=dim), dim)  # numbers that differ in the last bit may change places
    np.testing.assert_allclose(np.take_along_axis(logs, winner, dim), logs.max(axis=dim, keepdims=True), atol=1e-6)


@few
@given(x=arrays(np.float32, (3, 4), elements=st.integers(-100, 100)), shift=st.integers(-10_000, 10_000))
def test_softmax_ignores_a_common_shift(x, shift):
    """Whole numbers, so that adding the shift rounds nothing: the results are bitwise equal."""
    shifted = x + np.float32(shift)
    assert np.array_equal(softmax(Tensor(x)).data, softmax(Tensor(shifted)).data)
    assert np.array_equal(log_softmax(Tensor(x)).data, log_softmax(Tensor(shifted)).data)


@few
@given(x=arrays(np.float32, (4, 5), elements=st.floats(-50, 50, width=32)), hidden=arrays(bool, (4, 5)))
def test_hidden_scores_are_as_if_they_were_not_there(x, hidden):
    shares = softmax(Tensor(np.where(hidden, np.float32(-np.inf), x))).data
    assert shares.shape == (4, 5)
    for row, mask, got in zip(x, hidden, shares, strict=True):
        assert (got[mask] == 0).all()
        if not mask.all():
            np.testing.assert_allclose(got[~mask], softmax(Tensor(row[~mask])).data, rtol=1e-5, atol=1e-7)

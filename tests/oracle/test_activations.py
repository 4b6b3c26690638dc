"""Activations against PyTorch, in float32 and float64, near 0 and far out."""

import numpy as np
import pytest

from tinytorch.core.activations import gelu, log_softmax, relu, sigmoid, silu, softmax, tanh
from tinytorch.core.tensor import Tensor

torch = pytest.importorskip("torch")
F = torch.nn.functional

PAIRS = {
    relu: torch.relu,
    sigmoid: torch.sigmoid,
    tanh: torch.tanh,
    gelu: lambda x: F.gelu(x, approximate="tanh"),
    silu: F.silu,
    softmax: lambda x: torch.softmax(x, -1),
    log_softmax: lambda x: torch.log_softmax(x, -1),
}
each = pytest.mark.parametrize("function", PAIRS, ids=lambda function: function.__name__)
TOLERANCE = {np.float32: 2e-6, np.float64: 1e-12}


def both(function, x):
    ours = function(Tensor(x, dtype=x.dtype))
    theirs = PAIRS[function](torch.from_numpy(x.copy()))
    assert ours.shape == tuple(theirs.shape)
    assert ours.dtype == theirs.numpy().dtype
    return ours.data, theirs.numpy()


@each
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("scale", [1, 30, 1e4])
def test_values(function, dtype, scale):
    x = (np.random.default_rng(0).standard_normal((8, 33)) * scale).astype(dtype)
    ours, theirs = both(function, x)
    tolerance = TOLERANCE[dtype]
    np.testing.assert_allclose(ours, theirs, rtol=10 * tolerance, atol=tolerance)


@each
def test_special_values(function):
    """NaN stays NaN; plus infinity beside numbers does what it does in PyTorch, without our own exceptions."""
    x = np.array([[np.nan, 1, 2], [-np.inf, 0, 1]], np.float32)
    if function in (gelu, silu):
        x[1, 0] = -1e30 if function is silu else -1e4  # minus infinity times 0 is NaN there and here
    ours, theirs = both(function, x)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
def test_softmax_dimensions(dim):
    x = np.random.default_rng(1).standard_normal((3, 4, 5)).astype(np.float32) * 4
    for ours, theirs in ((softmax, torch.softmax), (log_softmax, torch.log_softmax)):
        got, expected = ours(Tensor(x), dim=dim).data, theirs(torch.from_numpy(x), dim).numpy()
        assert got.shape == expected.shape == (3, 4, 5)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_a_row_that_sees_nothing_is_as_in_their_attention():
    """torch.softmax gives NaN for a row of -inf, torch's attention gives 0; ours gives 0."""
    x = np.array([[-np.inf, -np.inf], [-np.inf, 3]], np.float32)
    scores, eye = torch.from_numpy(x), torch.eye(2)
    query, key = torch.zeros(2, 2), torch.zeros(2, 2)
    theirs = F.scaled_dot_product_attention(query, key, eye, attn_mask=torch.isfinite(scores)).numpy()
    ours = softmax(Tensor(x)).data
    assert ours.shape == theirs.shape == (2, 2)
    np.testing.assert_allclose(ours, theirs)

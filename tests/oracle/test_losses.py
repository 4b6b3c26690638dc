"""Losses against PyTorch, also where a model is very wrong, and where targets are ignored."""

import numpy as np
import pytest

from tinytorch.core.losses import (
    binary_cross_entropy,
    binary_cross_entropy_with_logits,
    cross_entropy,
    mse_loss,
)
from tinytorch.core.tensor import Tensor

torch = pytest.importorskip("torch")
F = torch.nn.functional


def same(ours, theirs, rtol=2e-6):
    assert ours.shape == tuple(theirs.shape) == ()
    assert ours.dtype == theirs.numpy().dtype
    np.testing.assert_allclose(ours.data, theirs.numpy(), rtol=rtol, atol=1e-7)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", [1, 30, 1e4])
@pytest.mark.parametrize("shape", [(7, 5), (2, 7, 5)])
@pytest.mark.parametrize("ignore_index", [-100, 2])
def test_cross_entropy(dtype, scale, shape, ignore_index):
    """PyTorch wants the classes second, ours are last: same rows, same mean."""
    rng = np.random.default_rng(0)
    logits, target = (rng.standard_normal(shape) * scale).astype(dtype), rng.integers(0, 5, shape[:-1])
    target.flat[1] = ignore_index
    ours = cross_entropy(Tensor(logits, dtype=dtype), target, ignore_index=ignore_index)
    theirs = F.cross_entropy(torch.from_numpy(np.moveaxis(logits, -1, 1).copy()) if len(shape) > 2
                             else torch.from_numpy(logits), torch.from_numpy(target), ignore_index=ignore_index)
    same(ours, theirs)


def test_cross_entropy_of_one_row_and_of_a_hidden_class():
    logits = np.array([1, -np.inf, 3], np.float32)
    same(cross_entropy(Tensor(logits), np.array(2)), F.cross_entropy(torch.from_numpy(logits), torch.tensor(2)))
    same(cross_entropy(Tensor(logits), np.array(1)), F.cross_entropy(torch.from_numpy(logits), torch.tensor(1)))


def test_nothing_that_counts_is_nan_there_and_an_error_here():
    logits, target = np.zeros((2, 3), np.float32), np.full(2, -100)
    assert F.cross_entropy(torch.from_numpy(logits), torch.from_numpy(target)).isnan()
    with pytest.raises(ValueError, match="nothing to average"):
        cross_entropy(Tensor(logits), target)


@pytest.mark.parametrize("target", [5, -1])
def test_both_refuse_a_class_that_does_not_exist(target):
    logits = np.zeros((2, 5), np.float32)
    with pytest.raises(IndexError):
        F.cross_entropy(torch.from_numpy(logits), torch.tensor([0, target]))
    with pytest.raises(IndexError, match=str(target)):
        cross_entropy(Tensor(logits), np.array([0, target]))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", [1, 1e4])
def test_mse(dtype, scale):
    p, t = (np.random.default_rng(1).standard_normal((2, 3, 4, 5)) * scale).astype(dtype)
    same(mse_loss(Tensor(p, dtype=dtype), Tensor(t, dtype=dtype)), F.mse_loss(torch.from_numpy(p), torch.from_numpy(t)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_binary_cross_entropy_with_its_ends(dtype):
    p, t = np.random.default_rng(2).random((2, 6, 5)).astype(dtype)
    p[0], t[0] = [0, 1, 0, 1, 0.5], [0, 1, 1, 0, 1]
    p[1, 0], t[1, 0] = 1e-40 if dtype == np.float32 else 1e-300, 1
    ours = binary_cross_entropy(Tensor(p, dtype=dtype), Tensor(t, dtype=dtype))
    same(ours, F.binary_cross_entropy(torch.from_numpy(p), torch.from_numpy(t)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", [1, 30, 1e4])
def test_binary_cross_entropy_with_logits(dtype, scale):
    rng = np.random.default_rng(3)
    x, t = (rng.standard_normal((6, 5)) * scale).astype(dtype), rng.random((6, 5)).astype(dtype)
    ours = binary_cross_entropy_with_logits(Tensor(x, dtype=dtype), Tensor(t, dtype=dtype))
    same(ours, F.binary_cross_entropy_with_logits(torch.from_numpy(x), torch.from_numpy(t)))

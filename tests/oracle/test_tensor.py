"""Lesson 01 against PyTorch: the same call by the same name gives the same shape, kind of number and values."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tinytorch.core import tensor  # noqa: E402
from tinytorch.core.tensor import Tensor, cat, stack  # noqa: E402

X = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)

SAME_CALLS = {
    "arithmetic": lambda x: (1.0 - x) * 2 + x / 3 - (-x) ** 2,
    "reflected": lambda x: 2 / (x + 10) + 3 * x - 2**x,
    "broadcast": lambda x: x * x[:, :1] + x[0],
    "matmul": lambda x: x @ x.transpose(1, 2),
    "matmul with a vector": lambda x: x @ x[0, 0],
    "sum": lambda x: x.sum(),
    "sum along": lambda x: x.sum(dim=1),
    "sum along two": lambda x: x.sum(dim=(0, 2), keepdim=True),
    "mean along": lambda x: x.mean(dim=-1, keepdim=True),
    "functions": lambda x: x.abs().sqrt().exp().log(),
    "max of all": lambda x: x.max(),
    "argmax": lambda x: x.argmax(dim=1),
    "argmax of all": lambda x: x.argmax(),
    "reshape": lambda x: x.reshape(4, -1),
    "view": lambda x: x.view(-1, 3),
    "permute": lambda x: x.permute(2, 0, 1),
    "transpose": lambda x: x.transpose(-1, 0),
    "squeeze": lambda x: x[:, :1].squeeze(1),
    "squeeze nothing": lambda x: x.squeeze(1),
    "unsqueeze": lambda x: x.unsqueeze(-2),
    "expand": lambda x: x[:, :, :1].expand(5, -1, -1, 6),
    "slices": lambda x: x[:, 1:, ::2],
    "index and None": lambda x: x[0, None, ..., 1],
    "list": lambda x: x[[1, 1, 0]],
    "mask": lambda x: x[x > 0],
    "comparison": lambda x: x >= 0.5,
    "not equal": lambda x: x != x,
}


def same(got, expected):
    assert got.shape == tuple(expected.shape), f"got shape {got.shape}, PyTorch has {tuple(expected.shape)}"
    assert str(got.dtype) == str(expected.dtype).removeprefix("torch."), (
        f"got {got.dtype}, PyTorch has {expected.dtype}"
    )
    assert np.allclose(got.data, expected.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SAME_CALLS)
def test_same_call(name):
    same(SAME_CALLS[name](Tensor(X)), SAME_CALLS[name](torch.from_numpy(X)))


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_max_and_min_along_are_amax_and_amin(dim):
    same(Tensor(X).max(dim=dim), torch.from_numpy(X).amax(dim=dim))
    same(Tensor(X).min(dim=dim, keepdim=True), torch.from_numpy(X).amin(dim=dim, keepdim=True))


def test_joining():
    parts = [X, X * 2]
    ours, theirs = [Tensor(p) for p in parts], [torch.from_numpy(p) for p in parts]
    for dim in (0, 1, -1):
        same(cat(ours, dim=dim), torch.cat(theirs, dim=dim))
        same(stack(ours, dim=dim), torch.stack(theirs, dim=dim))


def test_kinds_of_number():
    ours, theirs = Tensor([1, 2, 3]), torch.tensor([1, 2, 3])
    for work in (
        lambda x: x / 2,
        lambda x: x * 2,
        lambda x: x + 0.5,
        lambda x: x.sum(),
        lambda x: x * (x > 1),
        lambda x: x.exp(),
        lambda x: -x,
    ):
        same(work(ours), work(theirs))


def test_makers():
    for name, args in [
        ("zeros", (2, 3)),
        ("ones", (2,)),
        ("arange", (5,)),
        ("arange", (1, 9, 3)),
        ("arange", (0, 2, 0.5)),
    ]:
        same(getattr(tensor, name)(*args), getattr(torch, name)(*args))

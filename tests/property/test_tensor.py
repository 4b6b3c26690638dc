"""Lesson 01 for any shape: NumPy in float64 is the oracle."""

import math

import numpy as np
import pytest

pytest.importorskip("hypothesis")

from hypothesis import assume, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from tinytorch.core.tensor import Tensor, broadcast_shape, cat, infer_shape, stack  # noqa: E402

quick = settings(max_examples=80, deadline=None)
shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
full_shapes = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)
seeds = st.integers(0, 2**32 - 1)


def numbers(seed, shape):
    return np.random.default_rng(seed).standard_normal(shape)


def outcome(work):
    """What `work` returns, or the class of its error."""
    try:
        return work()
    except ValueError:
        return ValueError


def same(got, expected):
    assert got.shape == np.shape(expected), f"got shape {got.shape}, expected {np.shape(expected)}"
    assert got.dtype == np.float32
    assert np.allclose(got.data, expected, rtol=1e-5, atol=1e-5)


@quick
@given(shapes, shapes)
def test_broadcast_shape_is_numpys(a, b):
    assert outcome(lambda: broadcast_shape(a, b)) == outcome(lambda: np.broadcast_shapes(a, b))


@quick
@given(st.integers(0, 60), st.lists(st.integers(-1, 6), max_size=4).map(tuple))
def test_infer_shape_is_numpys(size, shape):
    got, expected = outcome(lambda: infer_shape(size, shape)), outcome(lambda: np.zeros(size).reshape(shape).shape)
    if -1 in shape and 0 in shape:
        assume(
            got is not ValueError and expected is not ValueError
        )  # 0 * anything is 0: the open size is anybody's guess
        assert math.prod(got) == size
    else:
        assert got == expected, f"{size} values as {shape}"


@quick
@given(seeds, full_shapes, st.data())
def test_elementwise_with_any_broadcast(seed, shape, data):
    cut = data.draw(st.integers(0, len(shape)))
    other = tuple(n if data.draw(st.booleans()) else 1 for n in shape[cut:])
    a, b = numbers(seed, shape), numbers(seed + 1, other)
    for work in (lambda x, y: x + y, lambda x, y: x - y, lambda x, y: x * y, lambda x, y: x / (y * y + 1)):
        same(work(Tensor(a), Tensor(b)), work(a, b))
        same(work(Tensor(b), Tensor(a)), work(b, a))


@quick
@given(seeds, full_shapes, st.data())
def test_reductions_over_any_dims(seed, shape, data):
    x = numbers(seed, shape)
    every = range(-len(shape), len(shape))
    dims = st.one_of(
        st.none(), st.sampled_from(every), st.sets(st.sampled_from(range(len(shape))), min_size=1).map(tuple)
    )
    dim, keepdim = data.draw(dims), data.draw(st.booleans())
    for name in ("sum", "mean", "max", "min"):
        same(getattr(Tensor(x), name)(dim=dim, keepdim=keepdim), getattr(x, name)(axis=dim, keepdims=keepdim))


@quick
@given(seeds, full_shapes, st.data())
def test_layouts_go_back(seed, shape, data):
    x = Tensor(numbers(seed, shape))
    dims = data.draw(st.permutations(range(len(shape))))
    back = np.argsort(dims)
    same(x.permute(*dims).permute(*(int(d) for d in back)), x.data)
    i, j = (data.draw(st.integers(-len(shape), len(shape) - 1)) for _ in range(2))
    same(x.transpose(i, j), np.swapaxes(x.data, i, j))
    same(x.transpose(i, j).transpose(i, j), x.data)
    same(x.reshape(-1).reshape(*shape), x.data)
    same(x.unsqueeze(i).squeeze(i), x.data)
    same(x.expand(3, *shape), np.broadcast_to(x.data, (3, *shape)))


@quick
@given(seeds, full_shapes, st.integers(1, 4), st.data())
def test_join_and_pick_apart(seed, shape, count, data):
    parts = [Tensor(numbers(seed + i, shape)) for i in range(count)]
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    same(cat(parts, dim=dim), np.concatenate([p.data for p in parts], axis=dim))
    dim = data.draw(st.integers(-len(shape) - 1, len(shape)))
    same(stack(parts, dim=dim), np.stack([p.data for p in parts], axis=dim))


@quick
@given(seeds, st.lists(st.integers(1, 3), max_size=2), *[st.integers(1, 4)] * 3, st.booleans())
def test_matmul_of_any_batch(seed, batch, n, k, m, shared):
    a, b = numbers(seed, (*batch, n, k)), numbers(seed + 1, (k, m) if shared else (*batch, k, m))
    same(Tensor(a) @ Tensor(b), a @ b)


@quick
@given(st.sampled_from([np.float32, np.float64, np.int64, np.int32, np.uint8, bool]), st.sampled_from([2, 0.5, True]))
def test_no_operation_widens(dtype, number):
    x = Tensor(np.array([1, 1]), dtype=dtype)
    wide = dtype == np.float64
    for result in (x / 2, x * number, x + number, number + x, x.mean(), x.exp(), x.sum() / 3, x / x, x**2):
        assert (result.dtype == np.float64) == wide, f"{np.dtype(dtype)} became {result.dtype}"

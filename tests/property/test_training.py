"""Checkpoint files for any arrays and any damage; schedules and clipping for any numbers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tinytorch.core.layers import Parameter
from tinytorch.core.tensor import Tensor
from tinytorch.core.training import CheckpointError, clip_grad_norm, cosine_lr, load_checkpoint, save_checkpoint

DTYPES = st.sampled_from(["<f2", "<f4", "<f8", "i1", "<i2", "<i4", "<i8", "u1", "<u2", "<u4", "<u8", "?"])
SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
ARRAYS = DTYPES.flatmap(lambda dtype: hnp.arrays(dtype, SHAPES))
NAMES = st.text(st.characters(codec="utf-8"), max_size=8).filter(lambda name: name != "__metadata__")


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(NAMES, ARRAYS, max_size=5), st.dictionaries(NAMES, NAMES, max_size=3))
def test_a_file_gives_back_what_went_in(tmp_path_factory, tensors, metadata):
    path = tmp_path_factory.mktemp("round") / "x.safetensors"
    save_checkpoint(path, tensors, metadata)
    got, found = load_checkpoint(path)
    assert found == metadata and got.keys() == tensors.keys()
    for name, array in tensors.items():
        assert got[name].shape == array.shape and got[name].dtype == array.dtype
        assert got[name].tobytes() == array.tobytes()


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4), st.integers(0, 5))
def test_a_damaged_file_is_read_or_refused_in_words(tmp_path_factory, changes, lost):
    """Bytes changed anywhere: either arrays of the announced sizes come back, or a CheckpointError; never a crash."""
    path = tmp_path_factory.mktemp("damage") / "x.safetensors"
    save_checkpoint(path, {"a": np.arange(6.0).reshape(2, 3), "b": np.ones(5, np.float16)}, {"n": "1"})
    content = bytearray(path.read_bytes())
    for place, value in changes:
        content[place % len(content)] = value
    path.write_bytes(content[: len(content) - lost])
    try:
        tensors, metadata = load_checkpoint(path)
    except CheckpointError as error:
        assert "x.safetensors" in str(error)
    else:
        assert lost == 0
        assert sum(array.nbytes for array in tensors.values()) == 6 * 8 + 5 * 2
        assert all(isinstance(text, str) for text in metadata.values())


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=200))
def test_any_bytes_are_refused_in_words(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("bytes") / "x"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"/x "):
        load_checkpoint(path)


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 500), st.data(), st.floats(0, 1, allow_subnormal=False), st.floats(1e-6, 10))
def test_schedule_climbs_then_falls(total, data, low, high):
    warmup = data.draw(st.integers(0, total - 1))
    rates = [cosine_lr(step, high, total, warmup, low * high) for step in range(total + 3)]
    assert rates[warmup] == pytest.approx(high) == max(rates)
    assert all(a < b for a, b in zip(rates[:warmup], rates[1 : warmup + 1])), "the warm-up climbs"
    assert all(a >= b - 1e-12 for a, b in zip(rates[warmup:], rates[warmup + 1 :])), "the cosine falls"
    assert rates[total:] == [low * high] * 3 and min(rates) > 0 or low == 0


@settings(deadline=None, max_examples=60)
@given(st.lists(hnp.arrays("<f4", st.integers(1, 5), elements=st.floats(-100, 100, width=32)), min_size=1, max_size=4),
       st.floats(0.01, 100))
def test_clipping_keeps_the_direction(grads, max_norm):
    parameters = [Parameter(np.zeros(g.shape)) for g in grads]
    for p, grad in zip(parameters, grads):
        p.grad = Tensor(grad.copy())
    norm = clip_grad_norm(parameters, max_norm)
    flat = np.concatenate(grads).astype(np.float64)
    got = np.concatenate([p.grad.data for p in parameters])
    assert got.shape == flat.shape
    assert norm == pytest.approx(np.linalg.norm(flat), rel=1e-4, abs=1e-12)
    assert np.linalg.norm(got) <= max_norm * 1.001
    scale = min(1.0, max_norm / (np.linalg.norm(flat) + 1e-6))
    np.testing.assert_allclose(got, flat * scale, rtol=1e-4, atol=1e-6)

"""Lesson 12 for any shape: what holds whatever the numbers are."""

import numpy as np
import pytest

pytest.importorskip("hypothesis")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from tinytorch.core.attention import (  # noqa: E402
    attention_weights,
    causal_mask,
    merge_heads_array,
    scaled_dot_product_attention,
    split_heads_array,
    visible_mask,
)
from tinytorch.core.tensor import Tensor  # noqa: E402

quick = settings(max_examples=40, deadline=None)
sizes = st.integers(1, 5)


def tensors(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [Tensor(rng.standard_normal(shape), dtype=np.float64) for shape in shapes]


@quick
@given(st.integers(0, 99), sizes, sizes, st.integers(1, 3), sizes, sizes, sizes)
def test_shared_heads_equal_repeated_heads(seed, B, H_kv, G, T, S, D):
    query, key, value = tensors(seed, (B, H_kv * G, T, D), (B, H_kv, S, D), (B, H_kv, S, D))
    mask = np.random.default_rng(seed).random((B, T, S)) < 0.7
    got = scaled_dot_product_attention(query, key, value, mask).numpy()
    repeated = [Tensor(np.repeat(x.numpy(), G, axis=1), dtype=np.float64) for x in (key, value)]
    expected = scaled_dot_product_attention(query, *repeated, mask).numpy()
    assert got.shape == expected.shape == (B, H_kv * G, T, D)
    np.testing.assert_allclose(got, expected, atol=1e-12)


@quick
@given(st.integers(0, 99), sizes, sizes, sizes, sizes)
def test_rows_sum_to_one_or_zero_and_hidden_keys_get_nothing(seed, H, T, S, D):
    query, key = tensors(seed, (1, H, T, D), (1, H, S, D))
    mask = np.random.default_rng(seed).random((T, S)) < 0.4
    weights = attention_weights(query, key, mask).numpy()
    assert weights.shape == (1, H, T, S)
    assert (weights[:, :, ~mask] == 0).all()
    assert (weights >= 0).all()
    expected = np.broadcast_to(mask.any(-1).astype(float), (1, H, T))
    np.testing.assert_allclose(weights.sum(-1), expected, atol=1e-12)


@quick
@given(st.integers(0, 99), sizes, sizes, st.integers(1, 6), sizes)
def test_the_order_of_keys_does_not_matter(seed, H, T, S, D):
    query, key, value = tensors(seed, (1, H, T, D), (1, H, S, D), (1, H, S, D))
    rng = np.random.default_rng(seed)
    mask, order = rng.random((T, S)) < 0.7, rng.permutation(S)
    a = scaled_dot_product_attention(query, key, value, mask).numpy()
    b = scaled_dot_product_attention(query, key[:, :, order], value[:, :, order], mask[:, order]).numpy()
    assert a.shape == b.shape == (1, H, T, D)
    np.testing.assert_allclose(a, b, atol=1e-12)


@quick
@given(st.integers(1, 6), st.integers(0, 6), st.integers(1, 8), st.integers(0, 3))
def test_masks_against_one_pair_at_a_time(T, extra, window, sinks):
    S = T + extra
    mask = causal_mask(T, S)
    near = visible_mask(np.arange(extra, S), np.arange(S), window, sinks)
    assert mask.shape == near.shape == (T, S)
    for t, s in np.ndindex(T, S):
        position = extra + t
        assert mask[t, s] == (s <= position), (t, s)
        assert near[t, s] == (s <= position and (position - s < window or s < sinks)), (t, s)


@quick
@given(st.integers(0, 99), sizes, sizes, st.integers(1, 4), sizes)
def test_split_and_merge_are_inverse(seed, B, T, H, D):
    packed = np.random.default_rng(seed).standard_normal((B, T, H * D))
    merged = merge_heads_array(split_heads_array(packed, 0, H, D))
    assert merged.shape == packed.shape
    np.testing.assert_array_equal(merged, packed)

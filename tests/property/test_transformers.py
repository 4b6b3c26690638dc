"""Lesson 13 for any shape: what holds whatever the weights are."""

import numpy as np
import pytest

pytest.importorskip("hypothesis")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from tinytorch.models.transformer import GPT, next_probabilities, normalize_array, sample_next  # noqa: E402

quick = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 999)
VOCAB, LONGEST = 13, 10


@st.composite
def models(draw):
    """A small GPT of random shape, in evaluation mode, with weights large enough that every token matters."""
    num_kv_heads, groups, head_dim = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(2, 4))
    heads, seed = num_kv_heads * groups, draw(seeds)
    model = GPT(VOCAB, heads * head_dim, draw(st.integers(1, 3)), heads, LONGEST, num_kv_heads=num_kv_heads,
                tie_weights=draw(st.booleans()), rng=np.random.default_rng(seed))
    rng = np.random.default_rng(seed)
    for parameter in model.parameters():
        parameter.data += 0.3 * rng.standard_normal(parameter.shape, dtype=np.float32)
    return model.eval()


@quick
@given(models(), seeds, st.integers(2, LONGEST), st.data())
def test_a_changed_future_token_leaves_earlier_logits_bitwise(no_look_ahead, model, seed, T, data):
    no_look_ahead(model, seed, T, data)


@quick
@given(models(), seeds, st.integers(1, 4), st.integers(0, 3), st.integers(0, 3))
def test_a_longer_generation_begins_like_a_shorter_one(model, seed, P, n, more):
    prompt = np.random.default_rng(seed).integers(0, VOCAB, (2, P))
    short, long = model.generate(prompt, n), model.generate(prompt, n + more)
    assert short.shape == (2, P + n) and long.shape == (2, P + n + more)
    np.testing.assert_array_equal(long[:, : P + n], short)
    np.testing.assert_array_equal(short[:, :P], prompt)


@quick
@given(models(), seeds, st.integers(1, 3), st.integers(1, 6))
def test_rows_of_a_batch_do_not_touch_each_other(model, seed, B, T):
    ids = np.random.default_rng(seed).integers(0, VOCAB, (B, T))
    together, apart = model(ids).numpy(), np.concatenate([model(row).numpy() for row in ids])
    assert together.shape == apart.shape == (B, T, VOCAB)
    np.testing.assert_allclose(together, apart, atol=1e-4, rtol=1e-4)


@quick
@given(seeds, st.integers(1, 4), st.integers(2, 9), st.floats(0.1, 50), st.floats(-50, 50))
def test_a_normalised_row_forgets_size_and_shift(seed, rows, E, size, shift):
    x = np.random.default_rng(seed).standard_normal((rows, E))
    plain, _ = normalize_array(x, eps=0)
    moved, _ = normalize_array(x * size + shift, eps=0)
    assert plain.shape == moved.shape == (rows, E)
    np.testing.assert_allclose(moved, plain, atol=1e-6)
    np.testing.assert_allclose(plain.mean(-1), 0, atol=1e-10)
    np.testing.assert_allclose(plain.var(-1), 1, atol=1e-6)


@quick
@given(seeds, st.integers(1, 4), st.integers(1, 9), st.integers(1, 12), st.floats(0.05, 20))
def test_draws_come_from_the_k_best(seed, B, V, top_k, temperature):
    logits = np.random.default_rng(seed).standard_normal((B, V)).astype(np.float32) * 5
    p = next_probabilities(logits, temperature, top_k)
    assert p.shape == (B, V)
    np.testing.assert_allclose(p.sum(-1), 1, atol=1e-12)
    token = sample_next(logits, temperature, top_k, np.random.default_rng(seed))
    assert token.shape == (B,)
    rank = (logits > logits[np.arange(B), token][:, None]).sum(-1)
    assert (rank < top_k).all(), f"token of rank {rank} drawn with top_k={top_k}"

"""Lesson 21 for any shape, any chunking and every cache of the family: what holds whatever the weights are."""

import cmath

import numpy as np
import pytest

pytest.importorskip("hypothesis")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from tinytorch.core.attention import visible_mask  # noqa: E402
from tinytorch.core.autograd import no_grad  # noqa: E402
from tinytorch.core.tensor import Tensor  # noqa: E402
from tinytorch.generation.cache_compression import (  # noqa: E402
    HeavyHitterKVCache,
    QuantizedModelKVCache,
    SlidingWindowKVCache,
)
from tinytorch.generation.kv_cache import KVCache, enable_kv_cache, prefill  # noqa: E402
from tinytorch.generation.paged import PagedModelKVCache, Request, Scheduler, paged_kv_cache  # noqa: E402
from tinytorch.models.llama import (  # noqa: E402
    Llama,
    RotaryEmbedding,
    rms_norm_array,
    rotary_frequencies,
    scaled_frequencies,
    swiglu_array,
)

quick = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 999)
VOCAB, LONGEST = 13, 20


@st.composite
def models(draw):
    """A small Llama of random shape, in evaluation mode, with weights large enough that every token matters."""
    num_kv_heads, groups, head_dim = draw(st.integers(1, 2)), draw(st.integers(1, 3)), 2 * draw(st.integers(1, 3))
    heads, seed = num_kv_heads * groups, draw(seeds)
    named = draw(st.booleans())  # head_dim given, or computed from the width
    model = Llama(
        VOCAB, 5 if named else heads * head_dim, draw(st.integers(1, 3)), heads, LONGEST, num_kv_heads,
        head_dim if named else None, hidden_dim=7, rope_theta=draw(st.sampled_from([50.0, 10000.0])),
        attention_bias=draw(st.booleans()), tie_weights=draw(st.booleans()), rng=np.random.default_rng(seed),
    )
    rng = np.random.default_rng(seed)
    for parameter in model.parameters():
        parameter.data += 0.3 * rng.standard_normal(parameter.shape, dtype=np.float32)
    return model.eval()


def cache_for(model, batch_size=1):
    return KVCache(batch_size, LONGEST, model.num_layers, model.num_kv_heads, model.head_dim)


@quick
@given(seeds, st.integers(1, 4), st.integers(1, 9), st.floats(0.01, 100))
def test_a_normalised_row_forgets_its_size_and_nothing_else(seed, rows, E, size):
    x = np.random.default_rng(seed).standard_normal((rows, E)) + 0.1
    a, b = rms_norm_array(x, np.ones(E), eps=0), rms_norm_array(size * x, np.ones(E), eps=0)
    np.testing.assert_allclose(a, b, rtol=1e-9)
    np.testing.assert_allclose((a * a).mean(-1), 1, rtol=1e-9)
    np.testing.assert_allclose(a * np.sqrt((x * x).sum(-1, keepdims=True) / E), x, rtol=1e-9)


@quick
@given(seeds, st.integers(1, 5), st.lists(st.integers(0, 5000), min_size=1, max_size=4))
def test_a_turn_is_a_product_of_complex_numbers(seed, half, positions):
    rotary, D = RotaryEmbedding(2 * half, 6000), 2 * half
    x = np.random.default_rng(seed).standard_normal((1, 2, len(positions), D), dtype=np.float32)
    got = rotary.rotate(Tensor(x), np.array(positions)).numpy()
    assert got.shape == x.shape and got.dtype == np.float32
    for h, t, i in np.ndindex(2, len(positions), half):
        angle = positions[t] / 10000 ** (i / half)
        expected = complex(x[0, h, t, i], x[0, h, t, i + half]) * cmath.exp(1j * angle)
        assert abs(complex(got[0, h, t, i], got[0, h, t, i + half]) - expected) < 1e-5


@quick
@given(seeds, st.integers(0, 900), st.integers(0, 900), st.integers(0, 90))
def test_scores_know_the_distance_only(seed, here, there, distance):
    rotary = RotaryEmbedding(8, 1000)
    query, key = np.random.default_rng(seed).standard_normal((2, 1, 1, 1, 8), dtype=np.float32)
    scores = [(rotary.rotate(Tensor(query), [p + distance]).numpy() * rotary.rotate(Tensor(key), [p]).numpy()).sum()
              for p in (here, there)]
    assert abs(scores[0] - scores[1]) < 1e-4


@quick
@given(st.integers(1, 32), st.floats(2, 1e6), st.floats(1, 64), st.floats(0.1, 4), st.floats(0.1, 8), st.data())
def test_scaled_frequencies_lie_between_slowed_and_unchanged_and_keep_their_order(half, theta, factor, low, gap, data):
    plain, context = rotary_frequencies(2 * half, theta), data.draw(st.integers(1, 9999))
    scaled = scaled_frequencies(plain, factor, low, low + gap, context)
    assert scaled.shape == plain.shape and scaled.dtype == np.float64
    assert (scaled <= plain * (1 + 1e-12)).all() and (scaled >= plain / factor * (1 - 1e-12)).all()
    assert (np.diff(scaled) <= 0).all(), "a faster pair stays the faster one"
    turns = context * plain / (2 * np.pi)
    np.testing.assert_array_equal(scaled[turns >= low + gap], plain[turns >= low + gap])
    np.testing.assert_allclose(scaled[turns <= low], plain[turns <= low] / factor, rtol=1e-12)


@quick
@given(seeds, st.floats(-1e4, 1e4), st.floats(-100, 100))
def test_swiglu_is_the_formula(seed, gate, up):
    sigmoid = 1 / (1 + np.exp(-np.longdouble(gate))) if gate > -700 else 0
    got = swiglu_array(np.array([gate]), np.array([up]))
    assert abs(got[0] - float(gate * sigmoid * up)) < 1e-9 * (1 + abs(gate * up))


@quick
@given(models(), seeds, st.integers(2, LONGEST), st.data())
def test_a_changed_future_token_leaves_earlier_logits_bitwise(no_look_ahead, model, seed, T, data):
    no_look_ahead(model, seed, T, data)


@quick
@given(models(), seeds, st.data())
def test_any_chunking_of_ragged_rows_gives_the_logits_of_whole_rows(model, seed, data):
    lengths = [data.draw(st.integers(1, LONGEST)) for _ in range(3)]
    ids, cache = np.random.default_rng(seed).integers(0, VOCAB, (3, LONGEST)), cache_for(model, 3)
    whole = [model(row[:length]).numpy()[0] for row, length in zip(ids, lengths)]
    while cache.seq_lens != lengths:
        size, starts = data.draw(st.integers(1, 7)), list(cache.seq_lens)
        n_new = [min(size, length - start) for start, length in zip(starts, lengths)]
        chunk = np.zeros((3, max(n_new)), int)
        for row, (start, count) in enumerate(zip(starts, n_new)):
            chunk[row, :count] = ids[row, start : start + count]
        with no_grad(), cache.attached_to(model, n_new=n_new):
            got = model(chunk).numpy()
        for row, (start, count) in enumerate(zip(starts, n_new)):
            np.testing.assert_allclose(got[row, :count], whole[row][start : start + count], atol=1e-3, rtol=1e-3)


@quick
@given(models(), seeds, st.integers(1, 6), st.integers(0, 3), st.integers(1, 5))
def test_a_window_is_dense_attention_under_its_band(model, seed, window, sinks, chunk):
    """Keys keep the turn of their own place when others are evicted."""
    ids = np.random.default_rng(seed).integers(0, VOCAB, (1, LONGEST))
    sizes = 1, LONGEST, model.num_layers, model.num_kv_heads, model.head_dim
    got = prefill(model, ids, SlidingWindowKVCache(*sizes, window=window, sinks=sinks), chunk=chunk).numpy()
    band = visible_mask(np.arange(LONGEST), np.arange(LONGEST), window, sinks)
    x = model.token_embedding(ids)
    for block in model.blocks:
        x = x + block.attention(block.norm1(x), mask=band)
        x = x + block.mlp(block.norm2(x))
    expected = model.head(model.norm(x)).numpy()
    assert got.shape == expected.shape == (1, LONGEST, VOCAB)
    np.testing.assert_allclose(got, expected, atol=1e-3, rtol=1e-3)


FAMILY = [
    pytest.param(KVCache, {}, id="contiguous"),
    pytest.param(paged_kv_cache, {"block_size": 3}, id="paged"),
    pytest.param(SlidingWindowKVCache, {"window": LONGEST}, id="window as wide as the text"),
    pytest.param(HeavyHitterKVCache, {"budget": LONGEST}, id="budget as large as the text"),
]


@pytest.mark.parametrize(("factory", "options"), FAMILY)
def test_every_lossless_cache_writes_the_same_text(factory, options):
    @settings(max_examples=8, deadline=None)
    @given(models(), seeds, st.integers(1, 6), st.integers(1, 6))
    def holds(model, seed, first, second):
        rng = np.random.default_rng(seed)
        prompts = [rng.integers(0, VOCAB, n).tolist() for n in (first, second)]
        alone = [model(prompt).numpy()[0, -1] for prompt in prompts]
        cache = enable_kv_cache(model, batch_size=2, factory=factory, **options)
        n_new = [first, second]
        ids = np.zeros((2, max(n_new)), int)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = prompt
        with no_grad(), cache.attached_to(model, n_new=n_new):
            got = model(ids).numpy()
        for row, count in enumerate(n_new):
            np.testing.assert_allclose(got[row, count - 1], alone[row], atol=1e-3, rtol=1e-3)
        assert list(cache.seq_lens) == n_new

    holds()


@settings(max_examples=8, deadline=None)
@given(models(), seeds)
def test_eight_bits_are_near(model, seed):
    """The cached keys and values, read back: each within the step of its group."""
    ids = np.random.default_rng(seed).integers(0, VOCAB, (1, 9))
    exact = cache_for(model)
    rough = QuantizedModelKVCache(1, LONGEST, model.num_layers, model.num_kv_heads, model.head_dim, bits=8)
    for cache in (exact, rough):
        prefill(model, ids, cache)
    for a, b in zip(exact.get(0), rough.get(0)):
        spread = np.ptp(a.numpy(), axis=-1, keepdims=True)
        assert a.shape == b.shape and (np.abs(a.numpy() - b.numpy()) <= 0.51 * spread / 255 + 1e-6).all()


@settings(max_examples=8, deadline=None)
@given(models(), seeds, st.integers(3, 20))
def test_the_scheduler_writes_what_generate_writes(model, seed, token_budget):
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, VOCAB, rng.integers(1, 9)).tolist() for _ in range(4)]
    expected = [model.generate(prompt, 6)[len(prompt) :] for prompt in prompts]
    pool = PagedModelKVCache(9, 4, model.num_layers, model.num_kv_heads, model.head_dim, max_seqs=3)
    scheduler = Scheduler(model, pool, token_budget=token_budget)
    requests = [Request(prompt, 6) for prompt in prompts]
    for request in requests:
        scheduler.add(request)
    scheduler.run()
    assert [request.tokens for request in requests] == expected

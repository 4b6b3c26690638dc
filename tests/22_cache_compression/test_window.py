"""The sliding window against a model that has no cache and an explicit band mask, and against plain lists."""

import itertools

import numpy as np
import pytest

from tinytorch.core.attention import visible_mask
from tinytorch.generation.cache_compression import SlidingWindowKVCache, inside_positions
from tinytorch.generation.kv_cache import disable_kv_cache, enable_kv_cache, prefill
from tinytorch.models.transformer import GPT

V, T = 11, 12


def band(seq_len, window, sinks):
    """(T, T), True = may look: a token sees itself, window - 1 before it, and the sinks that are not after it."""
    visible = np.zeros((seq_len, seq_len), bool)
    for query, key in itertools.product(range(seq_len), repeat=2):
        visible[query, key] = key <= query and (query - key < window or key < sinks)
    return visible


def dense_attention(query, key, value, visible):
    """(B, H, T, D) and (B, H_kv, T, D) twice, in float64 -> (B, T, H * D)."""
    key, value = (np.repeat(part, query.shape[1] // key.shape[1], axis=1) for part in (key, value))
    scores = np.where(visible, query @ key.swapaxes(-1, -2) / query.shape[-1] ** 0.5, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    mixed = weights / weights.sum(axis=-1, keepdims=True) @ value
    return mixed.swapaxes(1, 2).reshape(query.shape[0], query.shape[2], -1)


def dense_gpt(model, ids, window, sinks=0):
    """Logits (B, T, V) in float64 plain NumPy, from the weights alone; each layer under the band."""
    w = {name: array.astype(np.float64) for name, array in model.state_dict().items()}
    heads, shared, dim = model.num_heads, model.num_kv_heads, model.embed_dim // model.num_heads
    ids = np.atleast_2d(ids)

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]

    x = w["token_embedding.weight"][ids] + w["position_embedding.weight"][: ids.shape[1]]
    for i in range(model.num_layers):
        packed = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attention.qkv_proj")
        packed = packed.reshape(*ids.shape, heads + 2 * shared, dim).swapaxes(1, 2)
        parts = packed[:, :heads], packed[:, heads:-shared], packed[:, -shared:]
        x = x + linear(dense_attention(*parts, band(ids.shape[1], window, sinks)), f"blocks.{i}.attention.out_proj")
        h = linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.up_proj")
        h = 0.5 * h * (1 + np.tanh((2 / np.pi) ** 0.5 * (h + 0.044715 * h**3)))
        x = x + linear(h, f"blocks.{i}.mlp.down_proj")
    return norm(x, "norm") @ w["head.weight"].T


def lively_gpt(dtype=np.float64, max_seq_len=40, seed=0):
    """Every parameter different and large, so that one wrong key shows."""
    rng = np.random.default_rng(seed)
    model = GPT(V, 16, 2, 4, max_seq_len, num_kv_heads=2, tie_weights=False, rng=rng)
    for parameter in model.parameters():
        noise = 0.3 * rng.standard_normal(parameter.shape)
        parameter.data = (noise if parameter.ndim > 1 else parameter.data + noise).astype(dtype)
    return model.eval()


def cache_for(model, window, sinks=0, batch_size=1, max_seq_len=None, **options):
    return SlidingWindowKVCache(batch_size, max_seq_len, model.num_layers, 2, 4, window, sinks,
                                **{"dtype": np.float64, **options})


def ids_for(*shape, seed=1):
    return np.random.default_rng(seed).integers(0, V, shape)


def counting(seq_len, start=0, batch_size=1):
    """Keys (B, 1, T, 1) that are their own position."""
    return np.tile(np.arange(start, start + seq_len, dtype=np.float32)[:, None], (batch_size, 1, 1, 1))


def put(cache, seq_len, start=None):
    """One pass of a cache with one layer, one head and one number: keys are positions, values their negatives."""
    key = counting(seq_len, cache.seq_pos if start is None else start, cache.batch_size)
    cache.update(0, key, -key)
    cache.advance()


class TestAgainstTheBand:
    @pytest.mark.parametrize("sinks", range(4))
    @pytest.mark.parametrize("window", range(1, 8))
    def test_every_window_and_sink_count_in_several_chunkings(self, window, sinks):
        model, ids = lively_gpt(), ids_for(2, T)
        expected = dense_gpt(model, ids, window, sinks)
        for chunks, spare in itertools.product(([1] * T, [5, 1, 1, 5], [T], [9, 3], [2, 4, 6]), (0, 3)):
            cache, got, start = cache_for(model, window, sinks, batch_size=2, spare=spare), [], 0
            for count in chunks:
                got.append(model(ids[:, start : start + count], cache=cache).data)
                start += count
            got = np.concatenate(got, axis=1)
            assert got.shape == expected.shape and got.dtype == np.float64
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12, err_msg=f"chunks {chunks}, spare {spare}")
            assert cache.seq_lens == [T, T]
        if window + sinks < T - 1:
            wide, narrow = dense_gpt(model, ids, window + 1, sinks), dense_gpt(model, ids, max(window - 1, 1), sinks)
            for other in (wide, narrow) if window > 1 else (wide,):
                assert np.abs(other - expected).max() > 1e-3, "one token more or less would show"

    @pytest.mark.parametrize("dtype, atol", [(np.float32, 3e-5), (np.float16, 0.05)])
    def test_narrower_types(self, dtype, atol):
        model, ids = lively_gpt(np.float32), ids_for(2, T)
        cache = enable_kv_cache(model, factory=SlidingWindowKVCache, batch_size=2, window=4, sinks=1, dtype=dtype)
        got = prefill(model, ids, cache, chunk=5).data
        assert got.dtype == np.float32 and cache.nbytes == 2 * 2 * 2 * 2 * 5 * 4 * np.dtype(dtype).itemsize
        np.testing.assert_allclose(got, dense_gpt(model, ids, 4, 1), atol=atol)

    @pytest.mark.parametrize("chunk", [1, 2, 5, 7, 20])
    def test_ragged_prompts_in_chunks_then_single_tokens(self, chunk):
        model, ids, lengths = lively_gpt(), ids_for(4, 9), [9, 3, 1, 6]
        cache = cache_for(model, 3, 2, batch_size=4)
        logits = prefill(model, ids, cache, chunk=chunk, n_new=lengths).data
        steps = [model(np.full((4, 1), token), cache=cache).data for token in (5, 6)]
        assert logits.shape == (4, 9, V) and cache.seq_lens == [11, 5, 3, 8]
        for row, length in enumerate(lengths):
            alone = dense_gpt(model, [*ids[row, :length], 5, 6], 3, 2)[0]
            np.testing.assert_allclose(logits[row, :length], alone[:length], rtol=0, atol=1e-12)
            np.testing.assert_allclose(np.stack([step[row, 0] for step in steps]), alone[length:], rtol=0, atol=1e-12)

    @pytest.mark.parametrize("window, sinks", [(1, 0), (3, 0), (4, 2), (40, 0)])
    def test_generate_says_what_the_dense_model_would_say(self, window, sinks):
        model, prompt = lively_gpt(), ids_for(2, 7)
        expected = prompt
        for _ in range(15):
            token = dense_gpt(model, expected, window, sinks)[:, -1].argmax(-1)
            expected = np.concatenate([expected, token[:, None]], axis=1)
        cache = enable_kv_cache(model, factory=SlidingWindowKVCache, batch_size=2, window=window, sinks=sinks,
                                dtype=np.float64)
        for _ in range(2):  # the second time it holds the first text, and is reset
            np.testing.assert_array_equal(model.generate(prompt, 15), expected)
        assert cache.seq_lens == [21, 21]
        disable_kv_cache(model)
        if window < 7:
            assert not np.array_equal(model.generate(prompt, 15), expected), "without a window the text is another"

    def test_a_wide_window_is_the_full_cache(self):
        model, ids = lively_gpt(), ids_for(1, T)
        for window, sinks in ((T, 0), (1, T), (100, 3)):
            got = prefill(model, ids, cache_for(model, window, sinks), chunk=4).data
            np.testing.assert_allclose(got, model(ids).data, rtol=0, atol=1e-12)

    def test_learned_positions_end_at_the_models_table_and_the_error_says_so(self):
        model = lively_gpt(max_seq_len=8)
        cache = cache_for(model, 3)
        model(ids_for(1, 8), cache=cache)
        with pytest.raises(ValueError, match="max_seq_len"):
            model(ids_for(1, 1), cache=cache)
        assert cache.seq_lens == [8] and cache.pending_layers == []


class TestTheRing:
    @pytest.mark.parametrize("window, sinks, spare", [(1, 0, 0), (3, 0, 0), (4, 2, 0), (4, 2, 3), (2, 5, 1)])
    @pytest.mark.parametrize("chunk", [1, 3, 50])
    def test_who_is_held_and_what(self, window, sinks, spare, chunk):
        cache = SlidingWindowKVCache(1, None, 1, 1, 1, window, sinks, spare=spare)
        for length in range(chunk, 60, chunk):
            put(cache, chunk)
            first = max(sinks, length - window - spare)
            expected = [*range(min(sinks, length)), *range(first, length)]
            assert cache.residents().tolist() == [expected]
            key, value = (part.data.ravel().tolist() for part in cache.get(0))
            assert key == expected and value == [-position for position in expected]
        assert cache._store.shape == (1, 2, 1, 1, sinks + window + spare, 1)

    def test_60_or_60000_tokens_the_same_bytes_and_the_right_ones(self):
        cache = SlidingWindowKVCache(1, None, 1, 1, 1, window=6, sinks=4)
        sizes = []
        for total in (60, 60_000):
            while cache.seq_pos < total:
                put(cache, min(997, total - cache.seq_pos))
            sizes.append((cache.nbytes, cache._pos.nbytes))
            assert cache.residents().tolist() == [[0, 1, 2, 3, *range(total - 6, total)]]
            assert cache.get(0)[0].data.ravel().tolist() == [0, 1, 2, 3, *range(total - 6, total)]
            assert cache.seq_lens == [total] and cache.positions(2).tolist() == [[total, total + 1]]
        assert sizes[0] == sizes[1] == (2 * 10 * 4, 10 * 8)

    def test_a_chunk_sees_what_its_own_commit_will_evict(self):
        cache = SlidingWindowKVCache(1, None, 1, 1, 1, window=3)
        put(cache, 5)
        view = cache.update(0, counting(8, 5), counting(8, 5))
        seen = sorted(zip(view.pos[0].tolist(), view.key.data.ravel().tolist()))
        assert seen == [(p, float(p)) for p in range(2, 13)]
        visible = visible_mask(np.arange(5, 13), view.pos[0], cache.window, cache.sinks)
        assert visible.sum(axis=1).tolist() == [3] * 8, "each sees itself and two before it"


class TestTheWayBack:
    @pytest.mark.parametrize("sinks", [0, 1, 3])
    @pytest.mark.parametrize("spare", [0, 1, 4])
    @pytest.mark.parametrize("stored", [3, 6, 9, 30])
    def test_exact_or_refused_for_every_length(self, stored, spare, sinks):
        """Oracle: the lengths for which visible_mask shows nothing that a list has dropped; then dense attention."""
        model, window = lively_gpt(), 4
        ids = ids_for(1, 30)
        for kept in range(stored + 1):
            cache = cache_for(model, window, sinks, spare=spare)
            prefill(model, ids[:, :stored], cache, chunk=5)
            held = [p for p in range(stored) if p < sinks or p >= stored - window - spare]
            needed = np.flatnonzero(visible_mask([kept], np.arange(kept), window, sinks)[0])
            allowed = set(needed) <= set(held)
            began = stored > sinks + window + spare
            assert allowed == (not began or kept <= sinks or stored - kept <= spare + 1), "the rule in one line"
            if not allowed:
                before = [part.data.copy() for part in cache.get(1)]
                with pytest.raises(ValueError, match=f"spare={spare}"):
                    cache.truncate(kept)
                with pytest.raises(ValueError, match="positions"):
                    cache.rollback(stored - kept)
                assert cache.seq_lens == [stored] and cache.residents().tolist() == [held]
                for part, old in zip(cache.get(1), before):
                    np.testing.assert_array_equal(part.data, old)
                continue
            cache.truncate(kept)
            assert cache.seq_lens == [kept] and cache.residents().tolist() == [[p for p in held if p < kept]]
            other = np.concatenate([ids[:, :kept], ids_for(1, 9, seed=7)], axis=1)
            got = np.concatenate([model(other[:, kept : kept + 2], cache=cache).data,
                                  prefill(model, other[:, kept + 2 :], cache, chunk=3).data], axis=1)
            expected = dense_gpt(model, other, window, sinks)[:, kept:]
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12, err_msg=f"{stored} back to {kept}")

    def test_steps_back_add_up(self):
        cache = SlidingWindowKVCache(1, None, 1, 1, 1, window=4, spare=2)
        put(cache, 20)
        for _ in range(3):
            cache.rollback(1)
        with pytest.raises(ValueError, match=r"\[13\]"):
            cache.rollback(1)
        put(cache, 1)
        cache.rollback(1)
        with pytest.raises(ValueError, match=r"\[13\]"):
            cache.rollback(1)
        assert cache.residents().tolist() == [[14, 15, 16]]

    def test_a_refusal_keeps_the_open_pass(self):
        cache = SlidingWindowKVCache(1, None, 1, 1, 1, window=3)
        put(cache, 20)
        cache.update(0, counting(1, 20), counting(1, 20))
        with pytest.raises(ValueError, match="spare"):
            cache.rollback(2)
        assert cache.pending_layers == [0]
        cache.advance()
        assert cache.residents().tolist() == [[18, 19, 20]]
        cache.update(0, counting(1, 21), counting(1, 21))
        cache.rollback(1)
        assert cache.pending_layers == [] and cache.seq_lens == [20]

    def test_one_row_goes_back_and_the_other_stays(self):
        cache = SlidingWindowKVCache(2, None, 1, 1, 1, window=3, spare=1)
        put(cache, 10)
        with pytest.raises(ValueError, match="row 1"):
            cache.rollback([1, 5])
        cache.rollback([2, 0])
        assert cache.seq_lens == [8, 10] and cache.residents().tolist() == [[6, 7, -1, -1], [6, 7, 8, 9]]
        assert cache.get(0)[0].data[..., 0].tolist() == [[[6, 7, 0, 0]], [[6, 7, 8, 9]]]

    def test_sinks_that_were_rolled_back_are_sinks_again(self):
        cache = SlidingWindowKVCache(1, None, 1, 1, 1, window=2, sinks=3)
        put(cache, 4)
        cache.truncate(1)
        put(cache, 20, start=100)  # positions 1 to 20
        assert cache.residents().tolist() == [[0, 1, 2, 19, 20]]
        assert cache.get(0)[0].data.ravel().tolist() == [0, 100, 101, 118, 119]
        cache.truncate(2)
        put(cache, 9, start=500)
        assert cache.get(0)[0].data.ravel().tolist() == [0, 100, 500, 507, 508]


class TestPositionsInside:
    def test_inside_positions_by_hand(self):
        pos = np.array([[0, 1, 2, 3, 5, 6, 7, 8, 9, -1]])
        got = inside_positions(pos, [9], window=4, sinks=4)
        assert got.tolist() == [[0, 1, 2, 3, -1, 4, 5, 6, 7, -1]], "the paper's example"
        ragged = inside_positions(np.array([[0, 4, 5, 6], [0, 1, 2, -1]]), [6, 2], window=3, sinks=1)
        assert ragged.tolist() == [[0, 1, 2, 3], [0, 1, 2, -1]]
        assert inside_positions(np.array([[7, 8]]), [8], window=1, sinks=0).tolist() == [[-1, 0]]

    @pytest.mark.parametrize("window, sinks, spare", [(1, 0, 0), (3, 0, 2), (4, 2, 0), (2, 3, 1)])
    @pytest.mark.parametrize("chunks", [[1] * 40, [5] * 8, [3, 20, 1, 1, 15]])
    def test_the_same_tokens_are_seen_and_positions_never_leave_the_cache(self, window, sinks, spare, chunks):
        """Oracle: the list of positions that a query may see, numbered 0, 1, 2 ... from the first query's view on."""
        cache = SlidingWindowKVCache(1, None, 1, 1, 1, window, sinks, spare=spare, renumber=True)
        for count in chunks:
            start, positions = cache.seq_pos, cache.positions(count)
            view = cache.update(0, counting(count, start), counting(count, start))
            visible = visible_mask(positions, view.pos, cache.window, cache.sinks)[0]
            first = [*range(min(sinks, start)), *range(max(sinks, start - window + 1), start)]  # seen beside itself
            for t in range(count):
                keys = view.key.data[0, 0, visible[t], 0].astype(int).tolist()
                query = start + t
                assert sorted(keys) == np.flatnonzero(band(query + 1, window, sinks)[query]).tolist()
                inside = {key: (first + list(range(start, start + count))).index(key) for key in keys}
                assert dict(zip(keys, view.pos[0, visible[t]].tolist())) == inside
                assert positions[0, t] == inside[query]
            assert max(positions.max(), view.pos.max()) < window + sinks + count
            cache.advance()
        assert cache.seq_lens == [40]

    def test_a_rollback_brings_the_same_positions_again(self):
        caches = [SlidingWindowKVCache(1, None, 1, 1, 1, 4, 2, spare=3, renumber=True) for _ in range(2)]
        for cache in caches:
            put(cache, 20)
        put(caches[0], 3)
        caches[0].rollback(3)
        views = [cache.update(0, counting(2, 20), counting(2, 20)) for cache in caches]
        seen = [sorted((p, k) for p, k in zip(view.pos[0], view.key.data.ravel()) if p >= 0) for view in views]
        assert seen[0] == seen[1] and [p for p, _ in seen[0]] == list(range(7))

    def test_a_model_whose_keys_carry_positions_is_refused_and_left_alone(self):
        model = lively_gpt()
        cache = cache_for(model, 4, renumber=True)
        parts = [model.norm, *(block.attention for block in model.blocks)]
        for join in (
            lambda: enable_kv_cache(model, factory=SlidingWindowKVCache, window=4, renumber=True),
            lambda: enable_kv_cache(model, cache=cache), lambda: cache.attached_to(model).__enter__(),
            lambda: model(ids_for(1, 2), cache=cache), lambda: model.generate([1, 2], 3, cache=cache),
            lambda: prefill(model, [1, 2], cache),
        ):
            with pytest.raises(ValueError, match="renumber=True needs keys without a position"):
                join()
        assert cache.seq_lens == [0] and model._kv_cache is None
        assert all(a is b for a, b in zip(parts, [model.norm, *(block.attention for block in model.blocks)]))


@pytest.mark.parametrize("option, value", [
    ("window", 0), ("window", -1), ("window", 1.5), ("window", None), ("sinks", -1), ("sinks", True), ("spare", "1")])
def test_an_option_is_a_whole_number(option, value):
    with pytest.raises(ValueError, match=option):
        SlidingWindowKVCache(1, None, 1, 1, 1, **{"window": 2, option: value})

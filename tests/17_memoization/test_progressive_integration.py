"""Lesson 17 against everything before it. Oracles: a GPT in plain loops (slow_gpt), plain lists, and arithmetic."""

import copy
import itertools
import threading
import tracemalloc

import numpy as np
import pytest

from tinytorch.core.autograd import no_grad
from tinytorch.core.losses import cross_entropy
from tinytorch.core.tensor import Tensor
from tinytorch.generation.kv_cache import (
    CachedAttention,
    CacheStateError,
    IncrementalDecoder,
    KVCache,
    KVCacheConfig,
    KVView,
    LayerKVCache,
    MemoryTracker,
    analyze_kvcache_memory,
    analyze_kvcache_speedup,
    create_kv_cache,
    disable_kv_cache,
    enable_kv_cache,
    generation_flops,
    memory_analysis,
    memory_growth_table,
    multi_head_attention_with_cache,
    prefill,
    profile_naive_generation,
    token_rows,
)
from tinytorch.models.transformer import GPT
from tinytorch.profiling.profiler import Profiler


# ---- the oracles and what they are asked about
def lively_gpt(num_heads=4, num_kv_heads=2, num_layers=3, max_seq_len=32, dtype=np.float32, seed=0):
    """A GPT whose every parameter is different and large enough to matter, in eval mode; 23 tokens, head untied."""
    rng = np.random.default_rng(seed)
    model = GPT(23, 16, num_layers, num_heads, max_seq_len, num_kv_heads=num_kv_heads, tie_weights=False, rng=rng)
    for parameter in model.parameters():
        noise = 0.3 * rng.standard_normal(parameter.shape)
        parameter.data = (noise if parameter.ndim > 1 else parameter.data + noise).astype(dtype)
    return model.eval()


def slow_attention(query, key, value):
    """Causal attention, token by token in plain loops: (B, H, T, D), (B, H_kv, T, D) twice -> (B, T, H*D)."""
    B, H, T, D = query.shape
    group = H // key.shape[1]
    output = np.zeros((B, T, H, D))
    for b, h, t in np.ndindex(B, H, T):
        weights = []
        for s in range(t + 1):
            score = 0.0
            for d in range(D):
                score += float(query[b, h, t, d]) * float(key[b, h // group, s, d])
            weights.append(np.exp(score / D**0.5))
        for s, weight in enumerate(weights):
            output[b, t, h] += weight / sum(weights) * value[b, h // group, s]
    return output.reshape(B, T, H * D)


def slow_gpt(model, ids):
    """Logits (B, T, V) in float64, from the weights alone; ids (B, T) or a list for one row."""
    w = {name: array.astype(np.float64) for name, array in model.state_dict().items()}
    ids = np.atleast_2d(ids)
    H, G, D = model.num_heads, model.num_kv_heads, model.embed_dim // model.num_heads

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]

    x = w["token_embedding.weight"][ids] + w["position_embedding.weight"][: ids.shape[1]]
    for i in range(model.num_layers):
        packed = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attention.qkv_proj")
        packed = packed.reshape(*ids.shape, H + 2 * G, D).transpose(0, 2, 1, 3)
        mixed = slow_attention(packed[:, :H], packed[:, H : H + G], packed[:, H + G :])
        x = x + linear(mixed, f"blocks.{i}.attention.out_proj")
        h = linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.up_proj")
        h = 0.5 * h * (1 + np.tanh((2 / np.pi) ** 0.5 * (h + 0.044715 * h**3)))
        x = x + linear(h, f"blocks.{i}.mlp.down_proj")
    return norm(x, "norm") @ w["head.weight"].T


def slow_generate(model, prompt, count):
    """Greedy generation by slow_gpt, list in, list out."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(slow_gpt(model, tokens)[0, -1].argmax()))
    return tokens


def ids_for(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 23, shape)


def cache_for(model, batch_size=1, **options):
    heads, dim = model.num_kv_heads, model.embed_dim // model.num_heads
    return create_kv_cache(batch_size, model.max_seq_len, model.num_layers, heads, dim, **options)


def chunk(seq_len, batch_size=2, num_heads=2, head_dim=4, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((2, batch_size, num_heads, seq_len, head_dim), dtype=np.float32)


def rows_run(model, run):
    """Token rows per row of the batch that pass through the model during run()."""
    counted, embedding = [], model.token_embedding

    def counting(ids):
        counted.append(np.asarray(ids).shape[-1])
        return embedding(ids)

    model.token_embedding = counting
    try:
        run()
    finally:
        model.token_embedding = embedding
    return sum(counted)


class TestKVCacheAttentionIntegration:
    """The cache under attention: shapes, layers, protocol, bounds, ownership."""

    def test_shapes_fit_query_at_key_transposed(self):
        cache, (k, v) = KVCache(2, 8, 1, 2, 4), chunk(5)
        view = cache.update(0, k, v)
        cache.advance()
        key, value = cache.get(0)
        assert isinstance(key, Tensor) and key.shape == value.shape == (2, 2, 5, 4)
        scores = Tensor(chunk(3)[0]) @ key.transpose(-2, -1)
        assert scores.shape == (2, 2, 3, 5)
        assert isinstance(view, KVView) and view.pos.shape == (2, 5)
        unpacked_key, unpacked_value, pos = view
        assert unpacked_key is view.key and unpacked_value is view.value and pos is view.pos

    def test_the_view_holds_old_and_new_tokens_and_get_the_committed_ones(self):
        cache, (k, v), (k2, v2) = KVCache(2, 8, 1, 2, 4), chunk(3), chunk(2, seed=1)
        first = cache.update(0, k, v)
        assert first.key.shape == (2, 2, 3, 4), "the newest token must see itself"
        assert cache.get(0)[0].shape == (2, 2, 0, 4)
        cache.advance()
        second = cache.update(0, k2, v2)
        assert second.key.shape == (2, 2, 5, 4)
        np.testing.assert_array_equal(second.key.data, np.concatenate([k, k2], axis=2))
        np.testing.assert_array_equal(second.value.data, np.concatenate([v, v2], axis=2))
        assert second.pos.tolist() == [[0, 1, 2, 3, 4]] * 2 and second.pos.dtype == np.int64
        assert cache.get(0)[0].shape == (2, 2, 3, 4)
        assert cache.positions(2).tolist() == [[3, 4]] * 2

    def test_layers_are_isolated(self):
        cache, put = KVCache(2, 8, 3, 2, 4), [chunk(4, seed=i) for i in range(3)]
        for layer in (2, 0, 1):
            cache.update(layer, *put[layer])
        cache.advance()
        for layer, (k, v) in enumerate(put):
            key, value = cache.get(layer)
            assert key.shape == (2, 2, 4, 4)
            np.testing.assert_array_equal(key.data, k)
            np.testing.assert_array_equal(value.data, v)

    def test_the_store_is_laid_out_layer_by_layer_keys_then_values(self):
        cache, (k, v) = KVCache(1, 4, 2, 2, 3), chunk(4, 1, 2, 3)
        cache.update(0, k, v)
        cache.update(1, k + 1, v + 1)
        cache.advance()
        address = [part.data.__array_interface__["data"][0] for layer in range(2) for part in cache.get(layer)]
        assert np.diff(address).tolist() == [1 * 2 * 4 * 3 * 4] * 3

    @pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (4, 1)])
    def test_cached_attention_equals_plain_loops_at_every_position(self, heads, kv_heads):
        attention = lively_gpt(heads, kv_heads).blocks[1].attention
        x = np.random.default_rng(1).standard_normal((2, 6, 16), dtype=np.float32)
        mixed = slow_attention(*(part.data for part in attention.project(Tensor(x))))
        expected = mixed @ attention.out_proj.weight.data.T + attention.out_proj.bias.data
        cache = KVCache(2, 8, 1, kv_heads, 4)
        part = CachedAttention(attention, cache, 0)
        for t in range(6):
            got = part(Tensor(x[:, t : t + 1])).data
            cache.advance()
            assert got.shape == (2, 1, 16) and got.dtype == np.float32
            np.testing.assert_allclose(got[:, 0], expected[:, t], atol=3e-5, err_msg=f"token {t}")

    def test_a_given_mask_is_refused_not_ignored(self):
        part = CachedAttention(lively_gpt().blocks[0].attention, KVCache(1, 8, 1, 2, 4), 0)
        with pytest.raises(NotImplementedError, match="mask"):
            part(Tensor(np.zeros((1, 2, 16), np.float32)), mask=np.ones((2, 2), bool))

    def test_protocol_errors(self):
        cache, (k, v), (k2, v2) = KVCache(2, 8, 2, 2, 4), chunk(2), chunk(3)
        assert issubclass(CacheStateError, ValueError)
        with pytest.raises(CacheStateError, match="nothing pending"):
            cache.advance()
        cache.update(0, k, v)
        with pytest.raises(CacheStateError, match="twice"):
            cache.update(0, k, v)
        with pytest.raises(CacheStateError, match="disagree"):
            cache.update(1, k2, v2)
        with pytest.raises(CacheStateError, match="twice"):  # a call out of order changes nothing, not even this
            cache.update(0, k2, v2)
        cache.update(1, k, v)
        cache.advance()
        assert cache.seq_pos == 2
        with pytest.raises(CacheStateError):
            cache.advance()

    def test_a_skipped_layer_reads_zeros_and_strict_refuses_the_skip(self):
        (k, v), (k2, v2) = chunk(3), chunk(2, seed=1)
        cache = KVCache(2, 8, 2, 2, 4)
        for layer in range(2):
            cache.update(layer, k, v)
        cache.advance()
        cache.rollback(2)
        cache.update(0, k2, v2)
        cache.advance()
        key, value = cache.get(1)
        assert key.shape == (2, 2, 3, 4)
        np.testing.assert_array_equal(key.data[:, :, 0], k[:, :, 0])
        assert not key.data[:, :, 1:].any() and not value.data[:, :, 1:].any()
        strict = KVCache(2, 8, 2, 2, 4, strict=True)
        strict.update(0, k, v)
        with pytest.raises(CacheStateError, match=r"\[1\]"):
            strict.advance()
        assert strict.seq_pos == 0
        strict.update(1, k, v)
        strict.advance()
        assert strict.seq_pos == 3

    def test_a_pass_that_fails_half_way_changes_nothing_and_can_be_run_again(self):
        cache, (k, v), (k2, v2) = KVCache(2, 8, 2, 2, 4), chunk(2), chunk(3, seed=1)
        for layer in range(2):
            cache.update(layer, k, v)
        cache.advance()
        cache.update(0, k2, v2)
        with pytest.raises(ValueError):
            cache.update(1, k2[:, :1], v2)
        assert cache.seq_pos == 2 and cache.get(0)[0].shape == (2, 2, 2, 4)
        np.testing.assert_array_equal(cache.get(0)[0].data, k)
        for layer in range(2):  # the next pass overwrites what was pending
            cache.update(layer, k2[:, :, :1], v2[:, :, :1])
        cache.advance()
        assert cache.seq_pos == 3
        np.testing.assert_array_equal(cache.get(1)[0].data, np.concatenate([k, k2[:, :, :1]], axis=2))

    def test_a_layer_that_was_refused_may_be_repeated_alone(self):
        cache, (k, v) = KVCache(2, 8, 2, 2, 4, strict=True), chunk(2)
        cache.update(0, k, v)
        with pytest.raises(ValueError):
            cache.update(1, k, v * np.nan)
        cache.update(1, k, v)
        cache.advance()
        np.testing.assert_array_equal(cache.get(0)[0].data, k)

    def test_abandon_drops_what_is_pending(self):
        cache, (k, v) = KVCache(2, 8, 2, 2, 4), chunk(2)
        cache.abandon()  # nothing pending: nothing happens
        cache.update(0, k, v)
        assert cache.pending_layers == [0]
        cache.abandon()
        assert cache.pending_layers == [] and cache.seq_pos == 0
        cache.update(1, k, v)
        cache.advance()
        assert not cache.get(0)[0].data.any(), "layer 0 was dropped and then skipped: zeros"

    @pytest.mark.parametrize("lengths, asked", [([6, 6], 3), ([2, 7], 2), ([8, 0], 1)])
    def test_a_full_row_is_refused_before_any_byte_is_written(self, lengths, asked):
        cache, (k, v) = KVCache(2, 8, 1, 2, 4), chunk(8)
        cache.update(0, k, v, n_new=lengths)
        cache.advance()
        before = cache.clone()
        with pytest.raises(ValueError, match="max_seq_len") as error:
            cache.update(0, *chunk(asked, seed=1))
        row = 0 if lengths[0] + asked > 8 else 1
        for number in (8, lengths[row], asked, 8 - lengths[row]):
            assert str(number) in str(error.value)
        np.testing.assert_array_equal(cache.get(0)[0].data, before.get(0)[0].data)
        assert cache.seq_lens == lengths and cache.pending_layers == []

    @pytest.mark.parametrize("layer_idx", [-1, 2, True, "0", 1.0, None, np.float64(0)])
    def test_a_layer_index_is_an_int_in_range(self, layer_idx):
        cache, (k, v) = KVCache(2, 8, 2, 2, 4), chunk(1)
        with pytest.raises(ValueError):
            cache.update(layer_idx, k, v)
        with pytest.raises(ValueError):
            cache.get(layer_idx)
        cache.update(np.int64(1), k, v)

    @pytest.mark.parametrize("bad", [
        np.zeros((2, 2, 4)), np.zeros((1, 2, 1, 4)), np.zeros((2, 1, 1, 4)), np.zeros((2, 2, 1, 5)),
        np.zeros((2, 2, 0, 4)), np.full((2, 2, 1, 4), np.nan), np.full((2, 2, 1, 4), np.inf),
        np.full((2, 2, 1, 4), "1"), np.full((2, 2, 1, 4), None), np.zeros((2, 2, 1, 4), complex), None, "key",
        np.zeros((2, 2, 2, 4)),
    ])
    def test_what_does_not_fit_is_refused_with_bytes_unchanged(self, bad):
        cache, good = KVCache(2, 8, 1, 2, 4), np.ones((2, 2, 1, 4), np.float32)
        cache.update(0, good, good)
        cache.advance()
        for key, value in ((bad, good), (good, bad)):
            with pytest.raises(ValueError):
                cache.update(0, key, value)
        assert cache.seq_pos == 1 and cache.get(0)[0].data.sum() == 16 and cache.pending_layers == []

    @pytest.mark.parametrize("n_new", [[1], [1, 2, 3], [3, 1], [-1, 1], [True, 1], [1.0, 1], "12", None, 3])
    def test_n_new_counts_whole_tokens_of_the_chunk(self, n_new):
        cache, (k, v) = KVCache(2, 8, 1, 2, 4), chunk(2)
        if n_new is None:
            cache.update(0, k, v, n_new=n_new)
            return
        with pytest.raises(ValueError, match="n_new"):
            cache.update(0, k, v, n_new=n_new)
        assert cache.pending_layers == []

    def test_ownership(self):
        cache, (k, v) = KVCache(2, 8, 1, 2, 4), chunk(3)
        expected = k.copy()
        view = cache.update(0, k, v)
        k[...], v[...] = 7, 7
        cache.advance()
        for array in (view.key.data, view.value.data, *(part.data for part in cache.get(0))):
            with pytest.raises(ValueError, match="read-only"):
                array[...] = 9
        view.pos[...] = 99
        cache.seq_lens.append(4)
        np.testing.assert_array_equal(cache.get(0)[0].data, expected)
        assert cache.seq_lens == [3, 3] and cache.update(0, *chunk(1)).pos.tolist() == [[0, 1, 2, 3]] * 2

    def test_a_read_is_a_view_and_not_a_copy(self):
        cache, (k, v) = KVCache(2, 8, 1, 2, 4), chunk(3)
        view = cache.update(0, k, v)
        cache.advance()
        assert np.shares_memory(view.key.data, cache.get(0)[0].data)

    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
    def test_the_storage_dtype_is_the_one_asked_for(self, dtype):
        cache = KVCache(1, 4, 1, 1, 2, dtype=dtype)
        view = cache.update(0, np.ones((1, 1, 1, 2), np.float64), np.arange(2).reshape(1, 1, 1, 2))
        assert view.key.dtype == view.value.dtype == cache.dtype == dtype
        assert view.value.data.ravel().tolist() == [0, 1]
        assert KVCache(1, 4, 1, 1, 2).dtype == np.float32

    def test_what_is_too_large_for_float16_is_refused(self):
        cache = KVCache(1, 4, 1, 1, 2, dtype=np.float16)
        with pytest.raises(ValueError, match="finite"):
            cache.update(0, np.full((1, 1, 1, 2), 1e6), np.ones((1, 1, 1, 2)))
        assert cache.pending_layers == []

    def test_layers_from_different_threads(self):
        cache, put = KVCache(2, 64, 6, 2, 4), [chunk(1, seed=i) for i in range(6)]
        for _ in range(40):
            barrier = threading.Barrier(6)

            def work(layer, barrier=barrier):
                barrier.wait()
                cache.update(layer, *put[layer])

            threads = [threading.Thread(target=work, args=(layer,)) for layer in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            cache.advance()
        assert cache.seq_pos == 40
        for layer, (k, _) in enumerate(put):
            np.testing.assert_array_equal(cache.get(layer)[0].data, np.repeat(k, 40, axis=2))

    def test_truncate_and_rollback_per_row_and_for_all(self):
        cache, (k, v) = KVCache(3, 8, 2, 2, 4), chunk(6, batch_size=3)
        for layer in range(2):
            cache.update(layer, k, v, n_new=[6, 4, 2])
        cache.advance()
        cache.rollback([1, 0, 2])
        assert cache.seq_lens == [5, 4, 0]
        cache.truncate([2, 3, 0])
        assert cache.seq_lens == [2, 3, 0] and cache.seq_pos == 3
        key, _ = cache.get(1)
        assert key.shape == (3, 2, 3, 4)
        np.testing.assert_array_equal(key.data[1], k[1, :, :3])
        np.testing.assert_array_equal(key.data[0, :, :2], k[0, :, :2])
        assert not key.data[0, :, 2].any() and not key.data[2].any()
        for call, wrong in itertools.product((cache.truncate, cache.rollback), (9, [1, 1], [-1, 0, 0], True, 1.5, "2")):
            with pytest.raises(ValueError):
                call(wrong)
        assert cache.seq_lens == [2, 3, 0]
        cache.truncate(0)
        assert cache.seq_lens == [0, 0, 0]

    def test_reorder_and_clone(self):
        cache, (k, v) = KVCache(3, 8, 2, 2, 4), chunk(4, batch_size=3)
        for layer in range(2):
            cache.update(layer, k + layer, v, n_new=[4, 1, 2])
        cache.advance()
        twin = cache.clone()
        cache.reorder([2, 0, 2])
        assert cache.seq_lens == [2, 4, 2] and twin.seq_lens == [4, 1, 2]
        key, _ = cache.get(1)
        np.testing.assert_array_equal(key.data[1], k[0] + 1)
        for row in (0, 2):
            np.testing.assert_array_equal(key.data[row, :, :2], k[2, :, :2] + 1)
            assert not key.data[row, :, 2:].any()
        for wrong in ([0, 1], [0, 1, 3], [-1, 0, 1], [True, 0, 1], [0.0, 1, 2]):
            with pytest.raises(ValueError):
                cache.reorder(wrong)
        twin.reset()
        assert cache.seq_lens == [2, 4, 2] and cache.get(1)[0].data.any()

    def test_a_layer_cache_appends_at_each_rows_own_length(self):
        cache, (k, v) = LayerKVCache(2, 6, 2, 4), chunk(3)
        assert cache.k_cache.shape == cache.v_cache.shape == (2, 2, 6, 4) and cache.seq_lens == [0, 0]
        cache.update(k, v)
        cache.seq_lens = [3, 1]  # row 1 keeps its first token only
        cache.update(*chunk(1, seed=1))
        assert cache.seq_lens == [4, 2]
        key, value = cache.get_kv(1)
        assert key.shape == value.shape == (2, 2, 4)
        np.testing.assert_array_equal(key, np.concatenate([k[1, :, :1], chunk(1, seed=1)[0][1]], axis=1))
        before = cache.k_cache.copy()
        with pytest.raises(ValueError, match="max_seq_len"):  # row 0 alone is full
            cache.update(*chunk(3, seed=2))
        np.testing.assert_array_equal(cache.k_cache, before)
        cache.k_cache[0, 0, 0, 0] = 5
        assert cache.get_kv(0)[0][0, 0, 0] == 5
        with pytest.raises(ValueError):
            cache.get_kv(2)

    @pytest.mark.parametrize("seq_len", [1, 2, 3])
    @pytest.mark.parametrize("kv_heads", [1, 2, 4])
    def test_stateless_attention_reads_the_cache_and_writes_nothing(self, seq_len, kv_heads):
        rng, lengths = np.random.default_rng(seq_len), [5, 3]
        x, (w_q, w_o) = rng.standard_normal((2, seq_len, 16)), rng.standard_normal((2, 16, 16)) / 4
        x, w_q, w_o = (a.astype(np.float32) for a in (x, w_q, w_o))
        cache = LayerKVCache(2, 8, kv_heads, 4)
        cache.update(*chunk(5, num_heads=kv_heads), n_new=lengths)
        before = cache.k_cache.copy()
        got = multi_head_attention_with_cache(x, cache, w_q, None, None, w_o)
        assert got.shape == (2, seq_len, 16) and got.dtype == np.float32
        np.testing.assert_array_equal(cache.k_cache, before)
        assert cache.seq_lens == lengths
        for row, length in enumerate(lengths):
            query = np.zeros((1, 4, length, 4))
            query[0, :, length - seq_len :] = (x[row] @ w_q).reshape(seq_len, 4, 4).transpose(1, 0, 2)
            key, value = cache.get_kv(row)
            expected = slow_attention(query, key[None], value[None])[0, length - seq_len :] @ w_o
            np.testing.assert_allclose(got[row], expected, atol=3e-5)

    def test_stateless_attention_needs_its_tokens_in_the_cache(self):
        cache = LayerKVCache(2, 8, 2, 4)
        cache.update(*chunk(2))
        w = np.eye(8, dtype=np.float32)
        with pytest.raises(ValueError):
            multi_head_attention_with_cache(np.zeros((2, 3, 8), np.float32), cache, w, w, w, w)


class TestCacheGenerationLoop:
    """The cache under a GPT with distinct, non-trivial weights in every layer."""

    @pytest.mark.parametrize("kv_heads", [1, 2, 4])
    def test_cached_generation_equals_uncached_and_plain_loops(self, kv_heads):
        model = lively_gpt(4, kv_heads, seed=kv_heads)
        prompt = [3, 1, 4, 1, 5]
        expected = slow_generate(model, prompt, 8)
        assert len(set(expected[5:])) > 1, "a model that repeats one token proves little"
        assert model.generate(prompt, 8) == expected
        cache = enable_kv_cache(model)
        assert model.generate(prompt, 8) == expected
        assert cache.seq_pos == 5 + 8 - 1
        disable_kv_cache(model)
        assert model.generate(prompt, 8, cache=cache) == expected, "an explicit cache that still holds tokens is reset"

    def test_the_weights_of_the_oracles_model_differ_from_layer_to_layer(self):
        state = lively_gpt().state_dict()
        for i, j in itertools.combinations(range(3), 2):
            for name in ("attention.qkv_proj.weight", "attention.out_proj.bias", "norm1.weight"):
                assert np.abs(state[f"blocks.{i}.{name}"] - state[f"blocks.{j}.{name}"]).max() > 0.1

    def test_swapping_two_layers_or_positions_would_be_noticed(self):
        model, ids = lively_gpt(), ids_for((1, 6))
        expected = slow_gpt(model, ids)
        model.blocks[0].attention, model.blocks[2].attention = model.blocks[2].attention, model.blocks[0].attention
        assert np.abs(slow_gpt(model, ids) - expected)[0, 1:].max(axis=-1).min() > 1e-3
        model = lively_gpt()
        model.position_embedding.weight.data[4] *= -1
        changed = np.abs(slow_gpt(model, ids) - expected).max(axis=-1)[0]
        assert (changed[:4] == 0).all() and (changed[4:] > 1e-3).all()

    def test_exactly_p_plus_n_minus_1_token_rows_are_run(self):
        model = lively_gpt()
        cache = cache_for(model, 2)
        for prompt_len, count in ((1, 1), (5, 1), (5, 7), (3, 0)):
            prompt = ids_for((2, prompt_len))
            rows = rows_run(model, lambda p=prompt, n=count: model.generate(p, n, cache=cache))
            assert rows == (prompt_len + count - 1 if count else 0)

    def test_the_edges_of_generate(self):
        model = lively_gpt(max_seq_len=8)
        enable_kv_cache(model)
        assert model.generate([1, 2, 3], 0) == [1, 2, 3]
        assert len(model.generate([1, 2, 3], 5)) == 8
        worked = rows_run(model, lambda: pytest.raises(ValueError, model.generate, [1, 2, 3], 6))
        assert worked == 0, "refused before any work"
        disable_kv_cache(model)
        cache, prompts = cache_for(model, 2), np.array([[1, 2], [11, 5]])
        got = model.generate(prompts, 5, cache=cache)
        assert isinstance(got, np.ndarray) and got.shape == (2, 7)
        stop = int(got[0, 2])
        assert stop not in got[1, 2:], "the example needs a stop token that only row 0 meets"
        stopped = model.generate(prompts, 5, cache=cache, stop_token=stop)
        assert stopped.shape == (2, 7)
        np.testing.assert_array_equal(stopped[1], got[1], err_msg="row 0's stop token stopped row 1")
        assert stopped[0].tolist() == [1, 2] + [stop] * 5

    @pytest.mark.parametrize("batch_size", [1, 3])
    @pytest.mark.parametrize("kv_heads", [1, 4])
    @pytest.mark.parametrize("dtype, atol", [(np.float32, 3e-5), (np.float64, 1e-11)])
    def test_some_chunkings_give_the_logits_of_one_full_forward(self, batch_size, kv_heads, dtype, atol):
        model, ids = lively_gpt(4, kv_heads, dtype=dtype), ids_for((batch_size, 7))
        expected = slow_gpt(model, ids)
        full = model(ids).data
        assert full.shape == (batch_size, 7, 23) and full.dtype == dtype
        np.testing.assert_allclose(full, expected, atol=atol)
        for size in (None, 1, 2, 3, 5, 7, 100):
            cache = cache_for(model, batch_size, dtype=dtype)
            logits = prefill(model, ids, cache, chunk=size)
            assert logits.shape == (batch_size, 7, 23) and logits.dtype == dtype
            np.testing.assert_allclose(logits.data, expected, atol=atol, err_msg=f"chunk={size}")
            assert cache.seq_lens == [7] * batch_size and not logits.requires_grad

    def test_a_later_token_changes_no_earlier_logit_and_the_first_changes_all(self):
        model, ids = lively_gpt(), ids_for((1, 8))
        for size in (1, 3, 8):
            base = prefill(model, ids, cache_for(model), chunk=size).data
            later, first = ids.copy(), ids.copy()
            later[0, 6], first[0, 0] = (ids[0, 6] + 1) % 23, (ids[0, 0] + 1) % 23
            got = prefill(model, later, cache_for(model), chunk=size).data
            assert got.shape == base.shape == (1, 8, 23)
            np.testing.assert_array_equal(got[:, :6], base[:, :6])
            assert (np.abs(got - base)[0, 6:].max(axis=-1) > 1e-3).all()
            got = prefill(model, first, cache_for(model), chunk=size).data
            assert (np.abs(got - base)[0].max(axis=-1) > 1e-3).all()

    def test_rows_of_a_batch_equal_single_runs_and_do_not_touch_each_other(self):
        model, ids = lively_gpt(), ids_for((3, 6))
        together = model.generate(ids, 6, cache=cache_for(model, 3))
        for row in range(3):
            assert model.generate(ids[row].tolist(), 6, cache=cache_for(model)) == together[row].tolist()
        cache = cache_for(model, 3)
        base = prefill(model, ids, cache).data
        other = ids.copy()
        other[1] = (ids[1] + 5) % 23
        changed_cache = cache_for(model, 3)
        changed = prefill(model, other, changed_cache).data
        for row in (0, 2):
            np.testing.assert_array_equal(changed[row], base[row])
            np.testing.assert_array_equal(changed_cache.get(2)[0].data[row], cache.get(2)[0].data[row])
        assert (changed[1] != base[1]).any()

    @pytest.mark.parametrize("order", list(itertools.permutations((5, 12, 3))))
    def test_ragged_rows_equal_their_own_runs_in_every_order(self, order):
        model = lively_gpt(seed=7)
        prompts = {length: ids_for(length, seed=length) for length in order}
        ids = np.full((3, 12), 22)
        for row, length in enumerate(order):
            ids[row, :length] = prompts[length]
        for size in (None, 4):
            cache = cache_for(model, 3)
            logits = prefill(model, ids, cache, chunk=size, n_new=list(order)).data
            assert cache.seq_lens == list(order) and logits.shape == (3, 12, 23)
            token = logits[np.arange(3), np.array(order) - 1].argmax(-1)
            texts = [[*prompts[length], int(t)] for length, t in zip(order, token)]
            for _ in range(3):
                step = model(token[:, None], cache=cache).data
                token = step[:, -1].argmax(-1)
                for row, text in enumerate(texts):
                    np.testing.assert_allclose(step[row, 0], slow_gpt(model, text)[0, -1], atol=1e-4)
                    text.append(int(token[row]))
            for row, length in enumerate(order):
                expected = slow_gpt(model, prompts[length])[0]
                np.testing.assert_allclose(logits[row, :length], expected, atol=1e-4)
                assert texts[row] == slow_generate(model, prompts[length], 4)

    def test_prefill_restores_the_mode_and_refuses_before_any_work(self):
        model, cache = lively_gpt(max_seq_len=8), None
        cache = cache_for(model, 2)
        model.train()
        prefill(model, ids_for((2, 3)), cache)
        assert model.training and model.blocks[1].mlp.training and cache.seq_lens == [3, 3]
        short, long = ids_for((2, 3)), ids_for((2, 6))
        for ids, options in ((long, {}), (short, {"n_new": [3, 4]}), (short, {"chunk": 0})):
            def refused(ids=ids, options=options):
                with pytest.raises(ValueError):
                    prefill(model, ids, cache, **options)

            rows = rows_run(model, refused)
            assert rows == 0 and cache.seq_lens == [3, 3] and model.training

    def test_a_forward_pass_that_fails_half_way_leaves_the_cache_as_before(self):
        model = lively_gpt()
        cache = enable_kv_cache(model)
        model(np.array([[1, 2, 3]]))
        stored = cache.get(0)[0].data.copy()
        healthy, model.blocks[1].mlp = model.blocks[1].mlp, None
        for _ in range(2):
            with pytest.raises(TypeError):
                model(np.array([[4, 5]]))
        assert cache.seq_pos == 3
        np.testing.assert_array_equal(cache.get(0)[0].data, stored)
        model.blocks[1].mlp = healthy
        logits = model(np.array([[4]])).data
        np.testing.assert_allclose(logits[0, -1], slow_gpt(model, [1, 2, 3, 4])[0, -1], atol=1e-4)
        disable_kv_cache(model)
        model.blocks[1].mlp = None
        with pytest.raises(TypeError):
            model(np.array([[5]]), cache=cache)
        assert cache.seq_pos == 4 and cache.pending_layers == []
        assert not isinstance(model.blocks[0].attention, CachedAttention)
        model.blocks[1].mlp = healthy
        logits = model(np.array([[5]]), cache=cache).data
        np.testing.assert_allclose(logits[0, -1], slow_gpt(model, [1, 2, 3, 4, 5])[0, -1], atol=1e-4)

    def test_rollback_and_reorder_under_the_model(self):
        model, ids = lively_gpt(), ids_for((2, 6))
        cache = cache_for(model, 2)
        prefill(model, ids, cache)
        cache.rollback([2, 0])
        cache.reorder([1, 0])
        got = model(np.array([[7], [7]]), cache=cache).data[:, -1]
        for row, text in enumerate(([*ids[1], 7], [*ids[0, :4], 7])):
            np.testing.assert_allclose(got[row], slow_gpt(model, text)[0, -1], atol=1e-4)

    def test_float16_storage_stays_near(self):
        model, ids = lively_gpt(), ids_for((1, 8))
        logits = prefill(model, ids, cache_for(model, dtype=np.float16), chunk=1)
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits.data, slow_gpt(model, ids), atol=0.02)

    @pytest.mark.parametrize("batch_size", [1, 3])
    def test_the_decoders_prefill_equals_token_by_token_and_plain_loops(self, batch_size):
        decoder = IncrementalDecoder(16, 4, 3, 12, 23, rng=np.random.default_rng(0))
        assert len(decoder.caches) == 3
        ids = ids_for((batch_size, 7))
        at_once = decoder.forward_step(ids, decoder._init_caches(batch_size), is_prefill=True)
        assert at_once.shape == (batch_size, 23) and at_once.dtype == np.float32
        caches = decoder._init_caches(batch_size)
        for t in range(7):
            step = decoder.forward_step(ids[:, t], caches)
        np.testing.assert_allclose(step, at_once, atol=3e-5)
        caches = decoder._init_caches(batch_size)
        decoder.forward_step(ids[:, :4], caches, is_prefill=True)
        np.testing.assert_allclose(decoder.forward_step(ids[:, 4:], caches), at_once, atol=3e-5)
        x = decoder.token_table[ids] + decoder.position_table[:7].astype(np.float64)
        for w_q, w_k, w_v, w_o in decoder.layers:
            heads = [(x @ w).reshape(batch_size, 7, 4, 4).transpose(0, 2, 1, 3) for w in (w_q, w_k, w_v)]
            x = x + slow_attention(*heads) @ w_o
        np.testing.assert_allclose(at_once, x[:, -1] @ decoder.head, atol=1e-4)

    def test_a_decoder_without_room_stores_nothing(self):
        decoder = IncrementalDecoder(8, 2, 2, 4, 10, rng=np.random.default_rng(0))
        decoder.forward_step([[1, 2, 3]], decoder.caches, is_prefill=True)
        with pytest.raises(ValueError, match="max_seq_len"):
            decoder.forward_step([[4, 5]], decoder.caches)
        assert [cache.seq_lens for cache in decoder.caches] == [[3], [3]]


    @pytest.mark.parametrize("prompt_len, count", [(5, 1), (5, 4), (1, 6)])
    def test_the_counted_flops_are_those_that_lesson_14_counts(self, prompt_len, count):
        model = lively_gpt()
        per_head = 2 * 23 * 16

        def counted(seq_len):  # a forward pass sends every row through the head, generation only the last
            return Profiler().count_flops(model, ids_for((1, seq_len))) - (seq_len - 1) * per_head

        whole = sum(counted(prompt_len + i) for i in range(count))
        assert generation_flops(model, prompt_len, count, cached=False) == whole > 0
        first = counted(prompt_len)
        assert generation_flops(model, prompt_len, 1, cached=True) == first
        # one more token in a full pass: its row over P + 1 keys, and one key more for each of the P rows before it
        # (they do not see it, but a masked product computes their scores as well); with a cache: its row alone
        more = counted(prompt_len + 1) - first - 4 * 3 * 16 * prompt_len
        assert generation_flops(model, prompt_len, 2, cached=True) == first + more + per_head

    def test_the_analyses_print_what_they_measured(self, capsys):
        model = lively_gpt()
        rows = analyze_kvcache_speedup(model, lengths=(2, 5), max_new_tokens=3, repeats=1)
        printed = capsys.readouterr().out.splitlines()
        assert [row["prompt_len"] for row in rows] == [2, 5] and len(printed) == 3
        for row, line in zip(rows, printed[1:]):
            assert row["same_tokens"] is True and row["seconds_with"] > 0
            assert row["speedup"] == row["seconds_without"] / row["seconds_with"]
            assert f"{row['speedup']:.1f}x" in line and line.endswith("True")
        measured = profile_naive_generation(model, lengths=(2, 4, 8), repeats=1)
        assert [length for length, _ in measured] == [2, 4, 8] and all(seconds > 0 for _, seconds in measured)
        assert len(capsys.readouterr().out.splitlines()) == 4
        assert token_rows(5, 3, cached=False) == 18 and token_rows(5, 3, cached=True) == 7


class TestCacheMemoryScaling:
    """Bytes: predicted, measured, and equal."""

    def test_the_memory_analysis_prints_the_figures_of_known_models(self, capsys):
        rows = {row["model"]: row for row in analyze_kvcache_memory()}
        figures = {name: (row["bytes_per_token"], row["MiB_float16"], row["MiB_float32"]) for name, row in rows.items()}
        assert figures == {
            "GPT-2": (36_864, 36, 72), "Qwen2.5-0.5B": (12_288, 24, 48), "Llama-3-8B": (131_072, 512, 1024),
            "Llama-3-70B": (327_680, 2560, 5120), "GPT-3": (4_718_592, 9216, 18432),
        }
        printed = capsys.readouterr().out
        for number in ("36,864", "12,288", "131,072", "327,680", "4,718,592", "18,432"):
            assert number in printed

    @pytest.mark.parametrize("sizes, per_token, context, half_mib", [
        ((12, 12, 64), 36_864, 1024, 36),
        ((24, 2, 64), 12_288, 2048, 24),
        ((32, 8, 128), 131_072, 4096, 512),
        ((80, 8, 128), 327_680, 8192, 2560),
        ((96, 96, 128), 4_718_592, 2048, 9216),
    ], ids=["GPT-2", "Qwen2.5-0.5B", "Llama-3-8B", "Llama-3-70B", "GPT-3"])
    def test_known_models(self, sizes, per_token, context, half_mib):
        layers, heads, dim = sizes
        assert KVCacheConfig(layers, 1, heads, dim).calculate_size() == per_token
        assert KVCacheConfig(layers, context, heads, dim).calculate_size() == half_mib * 2**20
        assert KVCacheConfig(layers, context, heads, dim, dtype=np.float32).calculate_size() == 2 * half_mib * 2**20

    @pytest.mark.parametrize("sizes, size", [
        ((24, 8192, 4, 64), 192 * 2**20), ((1, 128, 4, 64), 131_072), ((2, 128, 1, 64), 65_536), ((2, 1, 4, 64), 2_048),
    ])
    def test_exact_sizes_in_float16(self, sizes, size):
        assert KVCacheConfig(*sizes).calculate_size() == size

    @pytest.mark.parametrize("layers, heads, dim, tokens, mib", [
        (2, 4, 16, 64, 0.0625), (4, 8, 16, 128, 0.5), (6, 8, 32, 256, 3.0), (4, 8, 64, 128, 2.0),
    ])
    def test_exact_sizes_in_float32(self, layers, heads, dim, tokens, mib):
        cache = create_kv_cache(1, tokens, layers, heads, dim)
        usage = cache.get_memory_usage()
        assert usage["total_mb"] == mib and usage["total_bytes"] == cache.nbytes == mib * 2**20
        assert usage["cache_tensors"] == 2 * layers

    @pytest.mark.parametrize("name", ["num_layers", "max_context_length", "num_kv_heads", "head_dim", "batch_size"])
    @pytest.mark.parametrize("value", [0, -1, 1.5, 2.0, True, None, "4"])
    def test_a_config_refuses_what_is_no_size_and_names_the_field(self, name, value):
        sizes = dict(num_layers=2, max_context_length=8, num_kv_heads=2, head_dim=4, batch_size=1)
        with pytest.raises(ValueError, match=name):
            KVCacheConfig(**{**sizes, name: value})

    @pytest.mark.parametrize("dtype", [np.int32, "text", None, complex, 3])
    def test_a_config_refuses_what_is_no_float_dtype(self, dtype):
        with pytest.raises(ValueError, match="dtype"):
            KVCacheConfig(1, 1, 1, 1, dtype=dtype)

    @pytest.mark.parametrize("name", ["batch_size", "max_seq_len", "num_layers", "num_heads", "head_dim"])
    @pytest.mark.parametrize("value", [0, -1, 1.5, True, None, "4"])
    def test_a_cache_refuses_what_is_no_size_and_names_it(self, name, value):
        sizes = dict(batch_size=1, max_seq_len=8, num_layers=2, num_heads=2, head_dim=4)
        with pytest.raises(ValueError, match=name):
            KVCache(**{**sizes, name: value})

    def test_a_cache_from_a_config(self):
        config = KVCacheConfig(num_layers=3, max_context_length=10, num_kv_heads=2, head_dim=4, batch_size=5)
        cache = KVCache.from_config(config)
        assert cache.nbytes == config.calculate_size() == 2 * 3 * 5 * 10 * 2 * 4 * 2
        assert (cache.dtype, cache.capacity, cache.config) == (np.float16, 10, config)

    def test_bytes_do_not_grow_while_decoding_and_used_bytes_follow_the_tokens(self):
        model = lively_gpt()
        cache = enable_kv_cache(model)
        nbytes, per_token = cache.nbytes, 2 * 3 * 2 * 4 * 4
        for count in range(1, 6):
            model(np.array([[count]]))
            usage = cache.get_memory_usage()
            assert cache.nbytes == nbytes == usage["total_bytes"] and usage["used_bytes"] == count * per_token
        cache.reset()
        assert cache.seq_pos == 0 and cache.seq_lens == [0] and cache.get_memory_usage()["used_bytes"] == 0

    def test_reset_leaves_no_byte(self):
        cache, (k, v) = KVCache(2, 8, 2, 2, 4), chunk(4)
        for layer in range(2):
            cache.update(layer, k, v)
        cache.advance()
        cache.update(0, *chunk(2))
        cache.reset()
        assert cache.seq_pos == 0 and cache.pending_layers == []
        view = cache.update(0, k[:, :, :1], v[:, :, :1], n_new=[1, 0])
        assert view.key.shape == (2, 2, 1, 4) and not view.key.data[1].any()
        cache.advance()
        assert not cache.get(1)[0].data.any()

    def test_a_decode_step_allocates_what_one_attention_step_needs(self):
        """The growth of a step's peak with the history stays below a few rows of scores, far below the history."""
        model = lively_gpt(num_layers=2, max_seq_len=2100)
        cache = cache_for(model)

        def peak(length):
            cache.reset()
            with no_grad():
                prefill(model, ids_for((1, length)), cache, chunk=256)
                model(np.array([[1]]), cache=cache)
                cache.rollback(1)
                tracemalloc.start()
                model(np.array([[1]]), cache=cache)
                used = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()
            return used

        growth = (peak(2048) - peak(512)) / 1536  # bytes per token of history
        history = 2 * 2 * 4 * 4  # keys and values of one layer
        scores = 4 * 4  # one float32 per head
        assert growth <= 4 * scores, f"{growth:.0f} B per token of history; scores {scores}, cache {history}"

    def test_tracked_caches_add_up_and_are_released_once(self):
        config = KVCacheConfig(2, 8, 2, 4)
        size = config.calculate_size()
        tracker = MemoryTracker(limit_bytes=3 * size)
        first, second = KVCache.from_config(config, tracker), KVCache.from_config(config, tracker)
        assert tracker.by_purpose == {"kv_cache": 2 * size} and tracker.current == 2 * size
        third = first.clone()
        assert tracker.current == 3 * size, "a clone is an allocation of its own"
        with pytest.raises(MemoryError) as error:
            KVCache.from_config(config, tracker)
        for number in (size, 3 * size):
            assert str(number) in str(error.value)
        first.close()
        first.close()
        assert tracker.current == 2 * size and tracker.peak == 3 * size
        assert first.nbytes == 0
        with pytest.raises(ValueError, match="max_seq_len"):
            first.update(0, *chunk(1, batch_size=1))
        with pytest.raises(RuntimeError, match="within"), second:
            raise RuntimeError("within")
        third.close()
        assert tracker.current == 0 and tracker.by_purpose == {}

    def test_memory_analysis_counts_the_heads_that_are_stored(self):
        full = memory_analysis(32, 32, 128, 1, 4096)
        assert full["total_bytes"] == 2 * 2**30 and full["total_GB"] == 2 * 2**30 / 1e9
        assert memory_analysis(32, 32, 128, 1, 4096, num_kv_heads=8)["total_bytes"] == 512 * 2**20
        assert memory_analysis(32, 32, 128, 4, 4096, dtype=np.float32)["total_bytes"] == 16 * 2**30
        assert memory_analysis(num_layers=2, num_heads=4, head_dim=8, batch_size=3, seq_len=5)["total_bytes"] == 3840

    def test_memory_growth_table_prints_the_analysis(self):
        text = memory_growth_table(seq_lens=(4096, 8192), batch_sizes=(1, 2))
        rows = [line.split() for line in text.splitlines()[2:]]
        assert rows == [["4096", "2,048.0", "4,096.0"], ["8192", "4,096.0", "8,192.0"]]
        text = memory_growth_table(num_kv_heads=8, seq_lens=(4096,), batch_sizes=(1,))
        assert text.splitlines()[-1].split() == ["4096", "512.0"]


class TestEnableKVCacheIntegration:
    """Joining and leaving the real GPT."""

    def test_it_sets_the_attributes_and_takes_its_sizes_from_the_model(self):
        model = lively_gpt(4, 2)
        assert model._kv_cache is None
        cache = enable_kv_cache(model)
        assert isinstance(cache, KVCache) and model._kv_cache is cache and model._cache_enabled is True
        sizes = (cache.batch_size, cache.max_seq_len, cache.num_layers, cache.num_heads, cache.head_dim, cache.dtype)
        assert sizes == (1, 32, 3, 2, 4, np.float32)
        again = enable_kv_cache(model, batch_size=3, dtype=np.float16, strict=True)
        assert model._kv_cache is again and again is not cache
        assert (again.batch_size, again.dtype, again.strict) == (3, np.float16, True)
        model(ids_for((3, 4)))
        assert again.seq_lens == [4, 4, 4] and cache.seq_lens == [0]

    def test_a_model_that_looks_both_ways_or_has_other_sizes_is_refused_and_left_alone(self):
        model = lively_gpt()
        parts = [model.norm, *(block.attention for block in model.blocks)]
        model.blocks[1].attention.causal = False
        with pytest.raises(ValueError, match="causal"):
            enable_kv_cache(model)
        model.blocks[1].attention.causal = True
        with pytest.raises(ValueError, match="blocks"):
            model(ids_for((1, 2)), cache=KVCache(1, 8, 2, 2, 4))
        with pytest.raises(ValueError, match="key-value heads"):
            model(ids_for((1, 2)), cache=KVCache(1, 8, 3, 4, 4))
        assert all(a is b for a, b in zip([model.norm, *(block.attention for block in model.blocks)], parts))
        assert model._kv_cache is None

    def test_called_with_sizes_it_forwards_to_the_factory(self):
        for cache in (
            enable_kv_cache(2, 16, 3, 4, 8),
            enable_kv_cache(batch_size=2, max_seq_len=16, num_layers=3, num_heads=4, head_dim=8),
            enable_kv_cache(2, 16, num_layers=3, num_heads=4, head_dim=8),
            create_kv_cache(2, 16, 3, 4, 8),
        ):
            assert cache.nbytes == 2 * 3 * 2 * 4 * 16 * 8 * 4

    def test_a_model_without_the_needed_attributes_is_told_all_of_them(self):
        class NoModel:
            embed_dim = 4

        with pytest.raises(AttributeError) as error:
            enable_kv_cache(NoModel())
        for name in ("num_layers", "num_heads", "max_seq_len", "blocks"):
            assert name in str(error.value)
        assert "embed_dim" not in str(error.value)

    def test_disable_brings_the_very_same_objects_back(self):
        model = lively_gpt()
        parts = [model.position_embedding, model.norm, *(block.attention for block in model.blocks)]
        text = repr(model)
        for _ in range(2):  # enabled twice, disabled twice: nothing nests
            enable_kv_cache(model)
        with cache_for(model).attached_to(model):
            model(ids_for((1, 2)))
        for _ in range(2):  # the second time there is nothing to do
            disable_kv_cache(model)
            back = [model.position_embedding, model.norm, *(block.attention for block in model.blocks)]
            assert len(back) == len(parts) == 5 and all(a is b for a, b in zip(back, parts))
        assert model._cache_enabled is False and model._kv_cache is None and repr(model) == text
        ids = ids_for((1, 6))
        np.testing.assert_allclose(model(ids).data, slow_gpt(model, ids), atol=1e-4, err_msg="the causal mask stays")

    def test_an_explicit_cache_beside_an_enabled_one(self):
        model, ids = lively_gpt(), ids_for((1, 5))
        enabled, explicit = enable_kv_cache(model), cache_for(model)
        parts = [block.attention for block in model.blocks]
        got = model(ids, cache=explicit).data
        assert explicit.seq_pos == 5 and enabled.seq_pos == 0
        assert all(block.attention is part for block, part in zip(model.blocks, parts))
        np.testing.assert_allclose(got, slow_gpt(model, ids), atol=1e-4)
        assert model.generate([1, 2], 4, cache=explicit) == slow_generate(model, [1, 2], 4)
        assert enabled.seq_pos == 0

    def test_parameters_are_the_same_with_and_without(self):
        model = lively_gpt()
        names, parameters = list(model.state_dict()), model.parameters()
        enable_kv_cache(model)
        assert list(model.state_dict()) == names and len(names) > 10
        assert all(a is b for a, b in zip(model.parameters(), parameters))
        assert [name for name, _ in model.named_parameters()] == names
        other = lively_gpt(seed=5)
        model.load_state_dict(other.state_dict())
        ids = ids_for((1, 4))
        np.testing.assert_allclose(model(ids).data, slow_gpt(other, ids), atol=1e-4)

    def test_eval_appends_and_commits_what_it_was_given(self):
        model, ids = lively_gpt(), ids_for((1, 7))
        cache = enable_kv_cache(model)
        pieces = [model(ids[:, a:b]).data for a, b in ((0, 3), (3, 4), (4, 7))]
        assert cache.seq_pos == 7 and [p.shape[1] for p in pieces] == [3, 1, 3]
        np.testing.assert_allclose(np.concatenate(pieces, axis=1), slow_gpt(model, ids), atol=1e-4)
        with pytest.raises(ValueError, match="batch"):
            model(ids_for((2, 1)))
        assert cache.seq_pos == 7

    def test_a_full_cache_names_max_seq_len(self):
        model = lively_gpt()
        cache = enable_kv_cache(model, max_seq_len=4)
        model(ids_for((1, 3)))
        with pytest.raises(ValueError, match="max_seq_len"):
            model(ids_for((1, 2)))
        assert cache.seq_pos == 3
        whole = enable_kv_cache(model)
        model(ids_for((1, 32)))
        with pytest.raises(ValueError, match="max_seq_len"):
            model(ids_for((1, 1)))
        assert whole.seq_pos == 32

    def test_training_mode_stores_nothing_and_has_the_gradients_without_a_cache(self):
        ids, target = ids_for((2, 6)), ids_for((2, 6), seed=1)

        def gradients(model):
            model.zero_grad()
            cross_entropy(model(ids), target).backward()
            return {name: parameter.grad.data.copy() for name, parameter in model.named_parameters()}

        model = lively_gpt().train()
        expected = gradients(model)
        cache = enable_kv_cache(model, batch_size=2)
        got = gradients(model)
        assert list(got) == list(expected) and len(got) > 20
        for name, gradient in expected.items():
            assert gradient.any(), f"{name} has no gradient to compare"
            np.testing.assert_array_equal(got[name], gradient, err_msg=name)
        assert cache.seq_pos == 0 and cache.pending_layers == []
        model.eval()
        model(ids)
        assert cache.seq_pos == 6, "eval mode uses the cache again"
        got = gradients(model.train())
        for name, gradient in expected.items():
            np.testing.assert_array_equal(got[name], gradient, err_msg=f"{name}, with tokens in the cache")
        assert cache.seq_pos == 6

    def test_an_explicit_cache_in_training_mode_is_an_error(self):
        model = lively_gpt().train()
        cache = cache_for(model)
        with pytest.raises(RuntimeError, match="eval"):
            model(ids_for((1, 2)), cache=cache)
        assert cache.seq_pos == 0

    def test_generate_in_training_mode_records_nothing_and_restores_the_mode(self):
        model = lively_gpt().train()
        enable_kv_cache(model)
        got = model.generate([1, 2, 3], 5)
        assert got == slow_generate(model, [1, 2, 3], 5)
        assert model.training and all(block.attention.training for block in model.blocks)
        with pytest.raises(ValueError):
            model.generate([1, 2, 3], 5, top_k=0, temperature=1)
        assert model.training

    def test_no_gradient_flows_into_the_cache(self):
        model = lively_gpt()
        cache = enable_kv_cache(model)
        model(ids_for((1, 3)))
        key, value = cache.get(0)
        assert not key.requires_grad and not value.requires_grad

    def test_a_second_model_is_never_affected(self):
        first, second, ids = lively_gpt(seed=1), lively_gpt(seed=2), ids_for((1, 5))
        before = second(ids).data.copy()
        enable_kv_cache(first)
        first(ids)
        np.testing.assert_array_equal(second(ids).data, before)
        assert second._kv_cache is None and not isinstance(second.blocks[0].attention, CachedAttention)
        own = enable_kv_cache(second)
        second(ids)
        assert own.seq_pos == first._kv_cache.seq_pos == 5

    def test_a_copy_of_a_model_has_a_cache_of_its_own(self):
        model = lively_gpt()
        cache = enable_kv_cache(model)
        model(np.array([[1, 2]]))
        twin = copy.deepcopy(model)
        got = twin(np.array([[3]])).data
        assert cache.seq_pos == 2 and twin._kv_cache.seq_pos == 3
        np.testing.assert_allclose(got[0, -1], slow_gpt(model, [1, 2, 3])[0, -1], atol=1e-4)

    def test_group_query_equals_full_attention_with_repeated_heads(self):
        grouped, full = lively_gpt(4, 2), lively_gpt(4, 4)
        state = grouped.state_dict()
        for i, name in itertools.product(range(3), ("weight", "bias")):
            packed = state[f"blocks.{i}.attention.qkv_proj.{name}"].reshape(8, 4, -1)  # 4 query, 2 key, 2 value heads
            repeated = np.concatenate([packed[:4], np.repeat(packed[4:], 2, axis=0)])
            shape = full.state_dict()[f"blocks.{i}.attention.qkv_proj.{name}"].shape
            state[f"blocks.{i}.attention.qkv_proj.{name}"] = repeated.reshape(shape)
        full.load_state_dict(state)
        ids = ids_for((2, 6))
        small, large = cache_for(grouped, 2), cache_for(full, 2)
        got, expected = prefill(grouped, ids, small, chunk=1).data, prefill(full, ids, large, chunk=1).data
        np.testing.assert_allclose(got, expected, atol=3e-5)
        assert small.nbytes * 2 == large.nbytes
        np.testing.assert_allclose(np.repeat(small.get(1)[0].data, 2, axis=1), large.get(1)[0].data, atol=3e-5)

"""Caches in 8, 4 or 2 bits: what they give back, what they refuse, their bytes, and a GPT that runs on them.

Oracles: a plain loop over each group, arrays that are really made, and the same model without a cache. All shapes and
chunkings are in tests/property/test_quantized.py.
"""

import numpy as np
import pytest

from tinytorch.core.attention import MultiHeadAttention
from tinytorch.core.tensor import Tensor
from tinytorch.generation.cache_compression import (
    QuantizedKVCache,
    QuantizedModelKVCache,
    compare_caches,
    key_error,
    outlier_keys,
    quantized_bytes,
    run_text,
)
from tinytorch.generation.kv_cache import (
    KVCache,
    KVCacheConfig,
    MemoryTracker,
    disable_kv_cache,
    enable_kv_cache,
    prefill,
    random_gpt,
)
from tinytorch.models.llama import Llama

B, H, D = 2, 3, 8
FORMATS = [(bits, axis) for bits in (8, 4, 2) for axis in ("token", "channel")]
every_format = pytest.mark.parametrize(("bits", "axis"), FORMATS)


def tokens(seq_len, seed=0, shape=(B, H, D)):
    """Keys and values (B, H, T, D)."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((2, *shape[:2], seq_len, shape[2]), dtype=np.float32)


def layer_cache(bits=4, axis="token", group_size=4, max_seq_len=16):
    return QuantizedKVCache(B, max_seq_len, H, D, bits, axis, group_size)


def model_cache(bits=4, axis="token", group_size=4, max_seq_len=16, **options):
    return QuantizedModelKVCache(B, max_seq_len, 2, H, D, bits=bits, key_axis=axis, group_size=group_size, **options)


def store(cache, k, v, n_new=None):
    for layer in range(cache.num_layers):
        cache.update(layer, k + layer, v + layer, n_new)
    cache.advance()


def loop(x, bits, axis, group_size=4):
    """x (H, T, D) with every whole group on its grid, in plain loops over float64."""
    back, whole = x.astype(np.float64), x.shape[1] - x.shape[1] % group_size
    for h in range(x.shape[0]):
        if axis == "token":
            places = [(h, t, slice(c, c + group_size)) for t in range(x.shape[1]) for c in range(0, D, group_size)]
        else:
            places = [(h, slice(t, t + group_size), c) for t in range(0, whole, group_size) for c in range(D)]
        for place in places:
            low, high = float(x[place].min()), float(x[place].max())
            points = [low + (high - low) * i / (2**bits - 1) for i in range(2**bits)]
            back[place] = [min(points, key=lambda point: abs(point - number)) for number in x[place].astype(float)]
    return back


class TestOneLayer:
    @every_format
    def test_rows_of_different_length_read_what_the_loop_reads(self, bits, axis):
        cache, (k, v) = layer_cache(bits, axis), tokens(11)
        cache.update(k[:, :, :6], v[:, :, :6], n_new=[6, 3])
        cache.update(k[:, :, 6:], v[:, :, 6:], n_new=[5, 2])
        assert cache.seq_lens == [11, 5]
        rows = [np.arange(11), np.array([0, 1, 2, 6, 7])]
        for row, places in enumerate(rows):
            for got, x, along in zip(cache.get_kv(row), (k, v), (axis, "token")):
                assert got.shape == (H, len(places), D) and got.dtype == np.float32
                np.testing.assert_allclose(got, loop(x[row][:, places], bits, along), atol=1e-5)

    @pytest.mark.parametrize("group_size", [4, 32])
    def test_the_newest_keys_wait_as_they_are_until_their_group_is_whole(self, group_size):
        cache, (k, v), before = layer_cache(2, "channel", group_size, 40), tokens(35), None
        for t in range(35):
            cache.update(k[:, :, t : t + 1], v[:, :, t : t + 1])
            whole = (t + 1) // group_size * group_size
            got = cache.get_kv(1)[0]
            np.testing.assert_array_equal(got[:, whole:], k[1, :, whole : t + 1])
            assert whole == 0 or not np.array_equal(got[:, :whole], k[1, :, :whole])
            if t + 1 > whole > 0:
                np.testing.assert_array_equal(got[:, :whole], before[:, :whole])  # frozen once, never again
            before = got

    @every_format
    @pytest.mark.parametrize("chunks", [[11], [1] * 11, [3, 1, 7], [4, 4, 3]], ids=str)
    def test_the_stored_bytes_are_the_same_in_every_chunking(self, bits, axis, chunks):
        cache, at_once, (k, v), start = layer_cache(bits, axis), layer_cache(bits, axis), tokens(11), 0
        at_once.update(k, v)
        for count in chunks:
            cache.update(k[:, :, start : start + count], v[:, :, start : start + count])
            start += count
        assert [array.tobytes() for array in cache.arrays()] == [array.tobytes() for array in at_once.arrays()]

    @every_format
    def test_constant_and_zero_groups_come_back_exactly_and_huge_ones_finite(self, bits, axis):
        cache = layer_cache(bits, axis, max_seq_len=12)
        constant = np.full((B, H, 4, D), -0.3, np.float32)
        huge = np.zeros((B, H, 4, D), np.float32)
        huge[:, :, 1, 2], huge[:, :, 2, 2] = 3e38, -3e38
        with np.errstate(all="raise", under="ignore"):
            for k in (constant, np.zeros_like(constant), huge):
                cache.update(k, k)
            got = cache.get_kv(1)
        for part in got:
            assert part.shape == (H, 12, D) and np.isfinite(part).all()
            np.testing.assert_array_equal(part[:, :4], constant[1])
            assert not part[:, 4:8].any()
            assert np.abs(part[:, 8:] - huge[1]).max() <= 6e38 / (2**bits - 1) / 2 * 1.0001

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e39])
    @pytest.mark.parametrize("axis", ["token", "channel"])
    def test_what_is_not_finite_is_refused_before_a_byte_changes(self, bad, axis):
        cache, (k, v) = layer_cache(axis=axis), tokens(5).astype(np.float64)
        cache.update(k, v)
        before = [array.tobytes() for array in cache.arrays()]
        for part in (k, v):
            old, part[-1, -1, -1, -1] = part[-1, -1, -1, -1], bad
            with pytest.raises(ValueError, match="finite"):
                cache.update(k, v)
            part[-1, -1, -1, -1] = old
        assert [array.tobytes() for array in cache.arrays()] == before and cache.seq_lens == [5, 5]

    @pytest.mark.parametrize("wrong", [
        lambda k, v: (k[0], v[0]), lambda k, v: (k[:1], v[:1]), lambda k, v: (k[:, :1], v),
        lambda k, v: (k, v[..., :4]), lambda k, v: (k, v[:, :, :2]), lambda k, v: (k[:, :, :0], v[:, :, :0]),
        lambda k, v: (k, v, [4, 1]),
        lambda k, v: (k, v, [1]), lambda k, v: (k, v, [-1, 0]), lambda k, v: ("k", v), lambda k, v: (k, None),
    ])
    def test_wrong_shapes_and_counts_are_refused(self, wrong):
        cache, (k, v) = layer_cache(), tokens(3)
        cache.update(k, v)
        before = [array.tobytes() for array in cache.arrays()]
        with pytest.raises(ValueError):
            cache.update(*wrong(k, v))
        assert [array.tobytes() for array in cache.arrays()] == before and cache.seq_lens == [3, 3]

    @pytest.mark.parametrize("axis", ["token", "channel"])
    def test_a_full_row_is_refused_with_numbers_and_exactly_full_is_fine(self, axis):
        cache, (k, v) = layer_cache(axis=axis, max_seq_len=6), tokens(6)
        cache.update(k, v, n_new=[2, 5])
        with pytest.raises(ValueError) as refused:
            cache.update(k[:, :, :2], v[:, :, :2])
        for fragment in ("max_seq_len=6", "row 1", "5 tokens", "2 more", "1 are free"):
            assert fragment in str(refused.value)
        assert cache.seq_lens == [2, 5]
        cache.update(k[:, :, :4], v[:, :, :4], n_new=[4, 1])
        assert cache.seq_lens == [6, 6]

    @pytest.mark.parametrize("row", [-1, 2, True, "0", 1.0, None])
    def test_a_row_that_is_not_there(self, row):
        with pytest.raises(ValueError, match="row"):
            layer_cache().get_kv(row)

    @pytest.mark.parametrize(("change", "name"), [
        ({"bits": 3}, "bits"), ({"bits": True}, "bits"), ({"bits": 4.0}, "bits"), ({"bits": "4"}, "bits"),
        ({"bits": 16}, "bits"), ({"key_axis": "row"}, "key_axis"), ({"key_axis": None}, "key_axis"),
        ({"group_size": 5}, "head_dim"), ({"group_size": 5, "key_axis": "channel"}, "head_dim"),
        ({"group_size": 16}, "head_dim"), ({"group_size": 0}, "group_size"), ({"group_size": 4.0}, "group_size"),
        ({"batch_size": 0}, "batch_size"), ({"max_seq_len": True}, "max_seq_len"), ({"num_heads": "2"}, "num_heads"),
        ({"head_dim": 0}, "head_dim"),
    ], ids=str)
    @pytest.mark.parametrize("kind", [QuantizedKVCache, QuantizedModelKVCache])
    def test_sizes_that_cannot_be_name_their_field(self, kind, change, name):
        layers = {} if kind is QuantizedKVCache else {"num_layers": 2}
        with pytest.raises(ValueError, match=name):
            kind(**{**dict(batch_size=2, max_seq_len=8, num_heads=2, head_dim=8), **layers, **change})

    @every_format
    def test_a_shorter_row_reads_as_before_and_goes_on(self, bits, axis):
        (k, v), (k2, v2) = tokens(11), tokens(5, seed=1)
        for keep in range(12):
            cache = layer_cache(bits, axis)
            cache.update(k, v)
            before = cache.get_kv(0), cache.get_kv(1)
            cache.seq_lens = [keep, 11]
            assert cache.seq_lens == [keep, 11]
            for got, old in zip(cache.get_kv(0), before[0]):
                np.testing.assert_array_equal(got, old[:, :keep])
            for got, old in zip(cache.get_kv(1), before[1]):
                np.testing.assert_array_equal(got, old)
            cache.update(k2, v2, n_new=[5, 0])
            key, value = cache.get_kv(0)
            expected = np.concatenate([before[0][0][:, :keep], k2[0]], axis=1)
            whole = keep - keep % 4 if axis == "channel" else keep
            np.testing.assert_array_equal(key[:, :whole], expected[:, :whole])
            off = np.abs(key - expected)[:, whole:]  # a number may lie in the middle: both are right
            best = np.abs(loop(expected[:, whole:], bits, axis) - expected[:, whole:])
            assert off.shape == best.shape and (off <= best + 1e-5).all()
            np.testing.assert_array_equal(value[:, :keep], before[0][1][:, :keep])

    def test_rows_cannot_be_made_longer_by_their_length(self):
        cache = layer_cache()
        cache.update(*tokens(3))
        with pytest.raises(ValueError, match="holds 3"):
            cache.seq_lens = [3, 4]
        assert cache.seq_lens == [3, 3]

    @pytest.mark.parametrize("axis", ["token", "channel"])
    def test_reset_leaves_no_byte(self, axis):
        cache, fresh, (k, v) = layer_cache(axis=axis), layer_cache(axis=axis), tokens(7)
        cache.update(k + 5, v + 5)
        cache.reset()
        assert cache.seq_lens == [0, 0] and not any(array.any() for array in cache.arrays())
        for each in (cache, fresh):
            each.update(k, v)
        np.testing.assert_array_equal(cache.get_kv(1)[0], fresh.get_kv(1)[0])

    def test_nothing_handed_out_or_passed_in_is_a_handle_on_the_cache(self):
        cache, (k, v) = layer_cache(axis="channel"), tokens(6)
        cache.update(k, v)
        before = [array.tobytes() for array in cache.arrays()]
        k[...] = v[...] = 9
        for part in cache.get_kv(0):
            part[...] = 9
        cache.seq_lens[0] = 1
        assert [array.tobytes() for array in cache.arrays()] == before and cache.seq_lens == [6, 6]


class TestBytes:
    @pytest.mark.parametrize(("bits", "codes"), [(8, 256), (4, 128), (2, 64)])
    def test_by_hand(self, bits, codes):
        """One head of 8 in groups of 4, 16 tokens: keys and values have 32 groups each, of 8 bytes beside the codes.

        Channel keys have 4 * 8 groups, too, and room for 3 tokens of 8 numbers of 4 bytes that wait.
        """
        cache = QuantizedKVCache(1, 16, 1, 8, bits, "token", 4)
        assert cache.memory_bytes() == codes + 64 * 8 == quantized_bytes(16, 1, 8, bits, 4)
        cache = QuantizedKVCache(1, 16, 1, 8, bits, "channel", 4)
        assert cache.memory_bytes() == codes + 64 * 8 + 3 * 8 * 4

    def test_codes_are_really_packed(self):
        codes = {bits: [a for a in layer_cache(bits).arrays() if a.dtype == np.uint8] for bits in (8, 4, 2)}
        numbers = 2 * B * H * 16 * D
        assert [sum(a.nbytes for a in codes[bits]) for bits in (8, 4, 2)] == [numbers, numbers // 2, numbers // 4]
        assert {a.dtype for a in layer_cache().arrays()} == {np.dtype(np.uint8), np.dtype(np.float32)}

    @every_format
    def test_savings_are_fp32_bytes_over_its_bytes(self, bits, axis):
        cache = QuantizedKVCache(2, 128, 2, 64, bits, axis)
        assert cache.savings_vs_fp32() == 2 * 2 * 128 * 2 * 64 * 4 / cache.memory_bytes() > 1
        model = QuantizedModelKVCache(2, 128, 3, 2, 64, bits=bits, key_axis=axis)
        assert model.nbytes == 3 * cache.memory_bytes() and model.savings_vs_fp32() == cache.savings_vs_fp32()

    def test_the_tracker_counts_packed_bytes_and_refuses_before_anything_is_allocated(self):
        tracker = MemoryTracker(limit_bytes=20_000)
        sizes = dict(batch_size=B, max_seq_len=16, num_layers=2, num_heads=H, head_dim=D)
        with QuantizedModelKVCache(**sizes, bits=4, group_size=4, tracker=tracker) as cache:
            assert tracker.by_purpose["kv_cache"] == cache.nbytes == 2 * 16 * B * quantized_bytes(1, H, D, 4, 4)
            with pytest.raises(MemoryError, match=str(cache.nbytes * 2)):
                QuantizedModelKVCache(**{**sizes, "batch_size": 2 * B}, bits=4, group_size=4, tracker=tracker)
            with cache.clone() as twin:
                assert tracker.by_purpose["kv_cache"] == cache.nbytes + twin.nbytes
        assert tracker.by_purpose.get("kv_cache", 0) == 0 and cache.nbytes == 0

    @pytest.mark.parametrize("axis", ["token", "channel"])
    def test_used_bytes_grow_with_the_tokens_up_to_all(self, axis):
        cache, used = model_cache(axis=axis, group_size=4, max_seq_len=16), []
        for _ in range(16):
            store(cache, *tokens(1))
            used.append(cache.get_memory_usage()["used_bytes"])
        spare = 0 if axis == "token" else 2 * B * H * 3 * D * 4  # no key waits in a full cache
        assert used[-1] == cache.nbytes - spare and used[0] > 0
        cache.reset()
        assert cache.get_memory_usage()["used_bytes"] == 0


class TestTheFinding:
    @pytest.mark.parametrize("bits", [8, 4, 2])
    def test_with_two_outlier_channels_channel_groups_are_at_least_twice_as_accurate(self, bits):
        for seed in range(3):
            key, value = outlier_keys(128, seed=seed)
            expected = {"channel": loop32(key[0], bits, axis=1), "token": loop32(key[0], bits, axis=2)}
            for axis, back in expected.items():
                np.testing.assert_allclose(key_error(key, value, bits, axis), np.abs(back - key[0]).mean(), rtol=1e-3)
            assert key_error(key, value, bits, "token") >= 2 * key_error(key, value, bits, "channel")

    def test_the_outliers_are_two_channels_of_the_keys_alone(self):
        key, value = outlier_keys(64)
        large = np.abs(key[0, 0]).mean(axis=0) > 6
        assert np.flatnonzero(large).tolist() == [5, 20] and np.abs(value).max() < 6


def loop32(x, bits, axis):
    """x (1, T, 32) in groups of 32 numbers along axis 1 (channels) or 2 (tokens), in float64."""
    groups = x.reshape(-1, 32, 32).astype(np.float64)
    low, high = (f(groups, axis=axis, keepdims=True) for f in (np.min, np.max))
    step = (high - low) / (2**bits - 1)
    return (low + np.round((groups - low) / step) * step).reshape(x.shape)


class TestInAModel:
    @every_format
    def test_each_layer_and_row_reads_what_a_cache_of_one_layer_reads(self, bits, axis):
        cache, alone = model_cache(bits, axis), [layer_cache(bits, axis) for _ in range(2)]
        for seed, n_new in enumerate(([5, 2], [1, 1], [0, 4], [3, 0])):
            k, v = tokens(max(n_new), seed)
            store(cache, k, v, n_new)
            for layer, one in enumerate(alone):
                one.update(k + layer, v + layer, n_new)
        assert cache.seq_lens == [9, 7]
        for layer, one in enumerate(alone):
            for row, length in enumerate(cache.seq_lens):
                for got, expected in zip(cache.get(layer), one.get_kv(row)):
                    assert got.shape == (B, H, 9, D) and got.dtype == np.float32
                    np.testing.assert_array_equal(got.data[row, :, :length], expected)
                    assert not got.data[row, :, length:].any()

    @every_format
    def test_the_new_chunk_is_seen_as_it_came_and_the_past_as_it_is_stored(self, bits, axis):
        cache, (k, v), (k2, v2) = model_cache(bits, axis), tokens(6), tokens(3, seed=1)
        store(cache, k, v, [6, 2])
        past = [part.data.copy() for part in cache.get(0)]
        view = cache.update(0, k2, v2, [1, 3])
        for part, old, new in zip(view[:2], past, (k2, v2)):
            np.testing.assert_array_equal(part.data, np.concatenate([old, new], axis=2))
        assert view.pos.tolist() == [[0, 1, 2, 3, 4, 5, 6, -1, -1], [0, 1, -1, -1, -1, -1, 2, 3, 4]]
        np.testing.assert_array_equal(cache.get(0)[0].data, past[0])
        cache.abandon()
        np.testing.assert_array_equal(cache.get(0)[0].data, past[0])

    @every_format
    @pytest.mark.parametrize("query_heads", [H, 2 * H])
    def test_attention_on_codes_is_attention_over_what_they_stand_for(self, bits, axis, query_heads):
        """Against loops in float64 over `get` and the new chunk, each query over the keys that its mask shows."""
        cache, (k, v), (k2, v2) = model_cache(bits, axis), tokens(6), tokens(3, seed=1)
        store(cache, k, v, [6, 3])
        past = [part.data.copy() for part in cache.get(1)]
        key, value = (np.concatenate([old, new], axis=2).astype(np.float64) for old, new in zip(past, (k2, v2)))
        query = np.random.default_rng(2).standard_normal((B, query_heads, 3, D), dtype=np.float32)
        visible = np.random.default_rng(3).random((B, 3, 9)) < 0.7
        visible[:, :, 6], visible[1, :, 3:6] = True, False  # one key at least; not what row 1 does not hold
        view = cache.update(1, k2, v2)
        got = cache.attend(Tensor(query), view.key, view.value, visible)
        assert got.shape == (B, query_heads, 3, D) and got.dtype == np.float32
        for b, h, t in np.ndindex(B, query_heads, 3):
            shown = visible[b, t]
            scores = key[b, h * H // query_heads, shown] @ query[b, h, t] / np.sqrt(D)
            weights = np.exp(scores - scores.max())
            expected = weights @ value[b, h * H // query_heads, shown] / weights.sum()
            np.testing.assert_allclose(got.data[b, h, t], expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("axis", ["token", "channel"])
    def test_a_decoding_model_decodes_no_keys(self, axis, monkeypatch):
        model = random_gpt()
        cache = enable_kv_cache(model, factory=QuantizedModelKVCache, key_axis=axis, group_size=4)
        model(np.arange(9)[None])
        expected = [part.data for part in cache.get(0)]
        with monkeypatch.context() as patch:
            patch.setattr(f"{QuantizedModelKVCache.__module__}.dequantize", None)
            model(np.array([[9]]))
        cache.rollback(1)
        for part, old in zip(cache.get(0), expected):
            np.testing.assert_array_equal(part.data, old)

    @pytest.mark.parametrize("axis", ["token", "channel"])
    def test_a_view_that_is_read_late_shows_what_it_showed(self, axis):
        cache = model_cache(axis=axis)
        store(cache, *tokens(6), [6, 2])
        early, late = cache.update(0, *tokens(1, seed=1)), cache.update(1, *tokens(1, seed=1))
        shown = [part.data.copy() for part in early[:2]]
        cache.abandon()
        again = cache.update(0, *tokens(1, seed=1))
        cache.advance()
        store(cache, *tokens(5, seed=4))  # groups are frozen, and row 1 reaches the slots that were empty
        for part, expected in zip(again[:2], shown):
            assert part.shape == expected.shape
            np.testing.assert_array_equal(part.data, expected)
        assert late.key.shape == (B, H, 7, D)

    def test_an_attention_of_another_kind_reads_numbers(self, monkeypatch):
        """`attend` of the cache is for lesson 12's formula: a model's own is not passed over."""
        model, seen = random_gpt(), []

        class Other(MultiHeadAttention):
            def attend(self, query, key, value, visible=None):
                seen.append(key.data.shape)
                return super().attend(query, key, value, visible)

        for block in model.blocks:
            block.attention.__class__ = Other
        enable_kv_cache(model, factory=QuantizedModelKVCache)
        model(np.arange(5)[None])
        assert seen == [(1, 2, 5, 8)] * 3

    @every_format
    def test_rollback_into_a_frozen_group_keeps_what_stays_bitwise(self, bits, axis):
        for n in range(12):
            cache = model_cache(bits, axis)
            store(cache, *tokens(11))
            before = [[part.data for part in cache.get(layer)] for layer in range(2)]
            cache.rollback([n, 0])
            for layer in range(2):
                for part, old in zip(cache.get(layer), before[layer]):
                    np.testing.assert_array_equal(part.data[0, :, : 11 - n], old[0, :, : 11 - n])
                    assert not part.data[0, :, 11 - n :].any()
                    np.testing.assert_array_equal(part.data[1], old[1])
            once = cache._store.copy()
            cache.truncate([11 - n, 11])
            assert cache._store.tobytes() == once.tobytes()

    @pytest.mark.parametrize("axis", ["token", "channel"])
    def test_reorder_and_clone(self, axis):
        cache = model_cache(axis=axis)
        store(cache, *tokens(7), [7, 5])
        before, twin = [part.data.copy() for part in cache.get(1)], cache.clone()
        cache.reorder([1, 1])
        assert cache.seq_lens == [5, 5] and twin.seq_lens == [7, 5]
        for part, copied, old in zip(cache.get(1), twin.get(1), before):
            np.testing.assert_array_equal(part.data, old[[1, 1], :, :5])
            np.testing.assert_array_equal(copied.data, old)
        store(twin, *tokens(2, seed=3))
        np.testing.assert_array_equal(cache.get(1)[0].data, before[0][[1, 1], :, :5])
        assert (twin.bits, twin.key_axis, twin.group_size) == (4, axis, 4)

    def test_from_config_takes_the_sizes_and_the_options(self):
        cache = QuantizedModelKVCache.from_config(KVCacheConfig(3, 64, 2, 32), bits=2, key_axis="channel", strict=True)
        assert (cache.num_layers, cache.max_seq_len) == (3, 64)
        assert (cache.bits, cache.key_axis, cache.strict) == (2, "channel", True)
        assert cache.dtype == np.float32 and cache.config == KVCacheConfig(3, 64, 2, 32, dtype=np.float32)

    @pytest.mark.parametrize(("bits", "axis", "most"), [(8, "token", 0.1), (8, "channel", 0.1), (4, "channel", 2.0)])
    def test_a_gpt_in_few_bits_is_close_to_itself_without_a_cache(self, bits, axis, most):
        model, ids = random_gpt(), np.random.default_rng(0).integers(0, 64, (2, 24))
        expected = model(ids).data
        cache = enable_kv_cache(model, factory=QuantizedModelKVCache, batch_size=2, bits=bits, key_axis=axis,
                                group_size=8)
        got = np.concatenate([model(ids[:, t : t + 1]).data for t in range(24)], axis=1)
        error = np.abs(got - expected).max(axis=(0, 2))
        assert error[0] < 1e-4, "the first token sees only itself, as it came"
        assert 0 < error.max() < most and cache.seq_lens == [24, 24]
        cache.reset()
        ragged = prefill(model, ids, cache, chunk=5, n_new=[24, 9]).data
        assert np.abs(ragged[0] - expected[0]).max() < most and np.abs(ragged[1, :9] - expected[1, :9]).max() < most
        disable_kv_cache(model)
        np.testing.assert_array_equal(model(ids).data, expected)

    def test_generate_in_8_bits_writes_the_same_tokens(self):
        model, prompt = random_gpt(), np.random.default_rng(3).integers(0, 64, (2, 10))
        expected = model.generate(prompt, 12)
        enable_kv_cache(model, factory=QuantizedModelKVCache, batch_size=2, bits=8, key_axis="channel", group_size=4)
        np.testing.assert_array_equal(model.generate(prompt, 12), expected)


def test_compare_caches_measures_what_it_says(capsys):
    model, ids = random_gpt(), np.random.default_rng(0).integers(0, 64, (2, 33))
    small = lambda **sizes: QuantizedModelKVCache(**sizes, bits=2)  # noqa: E731
    full, same, quantized = compare_caches(model, ids, {"full": KVCache, "same": KVCache, "small": small}, timed=3)
    logits = model(ids[:, :-1]).data.astype(np.float64)
    chosen = np.take_along_axis(logits, ids[:, 1:, None], axis=2)[..., 0]
    expected = np.exp((np.log(np.exp(logits).sum(-1)) - chosen).mean())
    assert abs(full.perplexity / expected - 1) < 1e-4 and full.logit_error == same.logit_error == 0
    assert full.nbytes == 2 * 3 * 2 * 2 * 32 * 8 * 4 and quantized.nbytes < full.nbytes / 2
    assert quantized.logit_error > 0.01 and all(report.seconds > 0 for report in (full, same, quantized))
    assert capsys.readouterr().out.count("\n") == 4


def test_compare_caches_takes_heads_wider_than_their_share():
    model = Llama(11, 16, 2, 4, 24, num_kv_heads=2, head_dim=6, rng=np.random.default_rng(0)).eval()
    (report,) = compare_caches(model, np.arange(18).reshape(2, 9) % 11, {"full": KVCache}, timed=3)
    assert report.nbytes == 2 * 2 * 2 * 2 * 8 * 6 * 4


def test_caches_take_turns_and_none_always_follows_the_same_one(monkeypatch):
    class Listening:
        """A model that writes down which cache it is given, and for how many tokens."""

        def __init__(self):
            self.calls = []

        def __call__(self, ids, cache):
            self.calls.append((cache, ids.shape[1]))
            return Tensor(np.zeros((*ids.shape, 3), np.float32))

    model, timed = Listening(), 8
    caches = {name: KVCache(2, 32, 1, 1, 1) for name in "abc"}
    whole = lambda model, ids, cache, chunk: model(ids, cache)  # noqa: E731
    monkeypatch.setattr("tinytorch.generation.cache_compression.prefill", whole)
    logits = run_text(model, np.zeros((2, 20), int), caches, 4, timed)
    names = {id(cache): name for name, cache in caches.items()}
    steps = [names[id(cache)] for cache, count in model.calls if count == 1]
    orders = [tuple(steps[start : start + 3]) for start in range(0, len(steps), 3)]
    assert len(orders) == timed and all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert len(set(orders)) > 2, f"always the same turns: {orders}"
    assert list(logits) == ["a", "b", "c"] and logits["b"][0].shape == (2, 20, 3)

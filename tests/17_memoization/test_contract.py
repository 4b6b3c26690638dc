"""The contract of the KV cache, sentence by sentence: one class per heading, each test named after what it holds.

What test_progressive_integration.py and the property tests hold already is not repeated here. Oracles: plain lists, the
same model without a cache, and arithmetic.
"""

import copy
import inspect
import threading
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest

from tinytorch.core.attention import causal_mask, scaled_dot_product_attention
from tinytorch.core.autograd import no_grad
from tinytorch.core.losses import cross_entropy
from tinytorch.core.tensor import Tensor
from tinytorch.generation.kv_cache import (
    KNOWN_MODELS,
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
    kv_cache_bytes,
    memory_analysis,
    memory_growth_table,
    multi_head_attention_with_cache,
    prefill,
    profile_naive_generation,
    random_gpt,
)


def tokens(seq_len, batch_size=2, num_heads=2, head_dim=4, seed=0):
    """Keys and values (B, H, T, D), all different."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((2, batch_size, num_heads, seq_len, head_dim), dtype=np.float32)


def store(cache, k, v, n_new=None):
    """One whole pass: every layer gets the same tokens, plus its number."""
    for layer in range(cache.num_layers):
        cache.update(layer, k + layer, v + layer, n_new)
    cache.advance()


def ids_for(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 64, shape)


def cache_of(model, batch_size=1, max_seq_len=None, **options):
    head_dim = model.embed_dim // model.num_heads
    sizes = (batch_size, max_seq_len or model.max_seq_len, model.num_layers, model.num_kv_heads, head_dim)
    return KVCache(*sizes, **options)


def parts_of(model):
    return [model.position_embedding, model.norm, *(block.attention for block in model.blocks)]


def same_objects(parts, others):
    return len(parts) == len(others) and all(a is b for a, b in zip(parts, others))


class TestWhatEveryCacheDoes:
    def test_the_members_have_these_names_and_arguments(self):
        expected = {
            "positions": ["n_new"], "update": ["layer_idx", "key", "value", "n_new"], "advance": [], "reset": [],
            "get": ["layer_idx"], "truncate": ["lengths"], "rollback": ["n"], "reorder": ["row_indices"], "clone": [],
        }
        for name, arguments in expected.items():
            parameters = list(inspect.signature(getattr(KVCache, name)).parameters)[1:]
            assert parameters[: len(arguments)] == arguments, name
        cache = KVCache(2, 8, 3, 2, 4)
        assert (cache.seq_pos, cache.seq_lens, cache.capacity) == (0, [0, 0], 8)
        assert cache.nbytes == 3 * 2 * 2 * 2 * 8 * 4 * 4
        assert set(cache.get_memory_usage()) >= {"total_bytes", "total_mb", "cache_tensors"}

    def test_positions_are_int64_and_those_that_the_next_tokens_will_have(self):
        cache = KVCache(2, 8, 1, 2, 4)
        store(cache, *tokens(3), n_new=[3, 1])
        for asked, expected in ((2, [[3, 4], [1, 2]]), ([2, 1], [[3, 4], [1, -1]]), (1, [[3], [1]])):
            pos = cache.positions(asked)
            assert pos.dtype == np.int64 and pos.tolist() == expected
        pos[...] = 9
        assert cache.positions(1).tolist() == [[3], [1]] and cache.pending_layers == []
        for wrong in (-1, True, 1.0, "1", [1], [1, 2, 3]):
            with pytest.raises(ValueError):
                cache.positions(wrong)

    def test_a_view_unpacks_as_key_value_pos(self):
        assert KVView._fields == ("key", "value", "pos")
        view = KVCache(2, 8, 1, 2, 4).update(0, *tokens(2))
        assert view.key.shape == view.value.shape == (2, 2, 2, 4) and view.pos.shape == (2, 2)

    def test_positional_and_keyword_calls_mean_the_same(self):
        k, v = tokens(2)
        first, second = KVCache(2, 8, 1, 2, 4), KVCache(2, 8, 1, 2, 4)
        first.update(0, k, v, [2, 1])
        second.update(layer_idx=0, key=k, value=v, n_new=[2, 1])
        for cache in (first, second):
            cache.advance()
            cache.truncate(lengths=[2, 1])
            cache.rollback(n=0)
            cache.reorder(row_indices=(1, 0))
        np.testing.assert_array_equal(first.get(0)[0].data, second.get(layer_idx=0)[0].data)
        assert first.seq_lens == second.seq_lens == [1, 2]

    # two steps, like a transaction
    @pytest.mark.parametrize("lengths", [[3, 3], [3, 1]])
    def test_what_is_pending_changes_neither_seq_pos_nor_get(self, lengths):
        cache = KVCache(2, 8, 2, 2, 4)
        store(cache, *tokens(3), n_new=lengths)
        before = [[part.data.copy() for part in cache.get(layer)] for layer in range(2)]
        cache.update(0, *tokens(4, seed=1))
        cache.update(1, *tokens(4, seed=2))
        assert cache.seq_lens == lengths and cache.seq_pos == 3
        for layer in range(2):
            for part, old in zip(cache.get(layer), before[layer]):
                assert part.shape == old.shape == (2, 2, 3, 4)
                np.testing.assert_array_equal(part.data, old)
        twin = cache.clone()
        assert twin.pending_layers == [] and twin.seq_lens == lengths
        for part, old in zip(twin.get(1), before[1]):
            np.testing.assert_array_equal(part.data, old)

    def test_advance_twice_is_an_error_and_counts_nothing(self):
        cache = KVCache(2, 8, 1, 2, 4)
        store(cache, *tokens(3))
        with pytest.raises(CacheStateError):
            cache.advance()
        assert cache.seq_lens == [3, 3]

    def test_a_forgotten_advance_is_an_error_also_after_a_refused_update_was_repeated(self):
        cache, (k, v) = KVCache(2, 8, 2, 2, 4), tokens(2)
        cache.update(0, k, v)
        with pytest.raises(ValueError):
            cache.update(1, k * np.nan, v)
        cache.update(1, k, v)  # the pass goes on and is whole
        with pytest.raises(CacheStateError, match="twice"):
            cache.update(0, k, v)
        assert cache.pending_layers == [0, 1], "what was pending is not thrown away silently"
        cache.advance()
        assert cache.seq_lens == [2, 2]

    def test_a_pass_that_stopped_at_a_refused_layer_may_be_started_anew_with_other_tokens(self):
        cache, (k, v), (k2, v2) = KVCache(2, 8, 3, 2, 4), tokens(3), tokens(1, seed=1)
        cache.update(0, k, v)
        for wrong in (1, -1):
            with pytest.raises(ValueError):
                cache.update(wrong, k[:, :1], v)
        store(cache, k2, v2)
        assert cache.seq_lens == [1, 1]
        np.testing.assert_array_equal(cache.get(2)[0].data, k2 + 2)

    @pytest.mark.parametrize("call", [
        lambda c: c.truncate(1), lambda c: c.rollback(2), lambda c: c.reorder([1, 0]), lambda c: c.reset(),
    ], ids=["truncate", "rollback", "reorder", "reset"])
    def test_no_ghost_of_a_forgotten_or_pending_token_is_ever_read(self, call):
        cache = KVCache(2, 8, 2, 2, 4)
        store(cache, *tokens(3))
        for layer in range(2):
            cache.update(layer, *tokens(4, seed=1))
        call(cache)
        assert cache.pending_layers == []
        kept = cache.seq_pos
        ones = np.ones((2, 2, 5, 4))
        cache.update(0, ones, ones)
        cache.advance()  # layer 1 was skipped
        key, value = cache.get(1)
        assert key.shape == value.shape == (2, 2, kept + 5, 4)
        assert not key.data[:, :, kept:].any() and not value.data[:, :, kept:].any()

    def test_an_interrupt_in_the_middle_of_an_update_changes_nothing(self, monkeypatch):
        cache = KVCache(2, 8, 2, 2, 4)
        store(cache, *tokens(3), n_new=[3, 1])
        before = cache.clone()

        def interrupted(self, layer_idx, num_slots):
            raise KeyboardInterrupt

        monkeypatch.setattr(KVCache, "_read", interrupted)  # the bytes are written, the view is not made
        with pytest.raises(KeyboardInterrupt):
            cache.update(0, *tokens(2, seed=1))
        monkeypatch.undo()
        assert cache.seq_lens == [3, 1]
        np.testing.assert_array_equal(cache.get(0)[0].data, before.get(0)[0].data)
        cache.abandon()
        store(cache, *tokens(1, seed=2), n_new=[0, 1])
        store(before, *tokens(1, seed=2), n_new=[0, 1])
        np.testing.assert_array_equal(cache.get(0)[0].data, before.get(0)[0].data)

    # bounds
    @pytest.mark.parametrize("bad", [
        np.ones((2, 2, 1, 4), bool), np.full((2, 2, 1, 4), 1e300), np.full((2, 2, 1, 4), 10**400, object),
        np.zeros((2, 2, 1, 4), "datetime64[s]"), [[[1.0]]], [[1], [1, 2]], 1.0, {}, np.zeros((1, 2, 1, 4)),
    ], ids=repr)
    def test_what_is_no_finite_number_of_the_right_shape_is_refused_with_bytes_unchanged(self, bad):
        cache, good = KVCache(2, 8, 1, 2, 4), np.ones((2, 2, 1, 4))
        store(cache, good, good)
        for pair in ((bad, good), (good, bad)):
            with pytest.raises(ValueError):
                cache.update(0, *pair)
        assert cache.seq_lens == [1, 1] and cache.pending_layers == []
        cache.update(0, good, good)
        cache.advance()
        np.testing.assert_array_equal(cache.get(0)[0].data, np.ones((2, 2, 2, 4)))

    # ownership
    def test_read_only_arrays_lists_and_tensors_are_taken(self):
        k, v = tokens(2)
        k.flags.writeable = False
        cache = KVCache(2, 8, 3, 2, 4)
        cache.update(0, k, v)
        cache.update(1, Tensor(k, requires_grad=True), Tensor(v))
        cache.update(2, k.tolist(), v.tolist())
        cache.advance()
        for layer in range(3):
            np.testing.assert_array_equal(cache.get(layer)[0].data, k)
            assert not cache.get(layer)[0].requires_grad

    def test_nothing_handed_out_or_passed_in_is_a_handle_on_the_cache(self):
        cache, n_new, (k, v) = KVCache(2, 8, 2, 2, 4), [2, 1], tokens(2)
        store(cache, k, v, n_new)
        n_new[0] = k[...] = v[...] = 7
        cache.seq_lens[0] = cache.pending_layers.append(1) or 5
        cache.get_memory_usage()["total_bytes"] = 0
        key, _ = cache.get(0)
        key -= 1  # makes a new Tensor, or raises; the store is not touched
        rows = [1, 0]
        cache.reorder(rows)
        rows[0] = 9
        expected = tokens(2)[0][[1, 0]]
        expected[0, :, 1] = 0
        assert cache.seq_lens == [1, 2] and cache.pending_layers == []
        np.testing.assert_array_equal(cache.get(0)[0].data, expected)

    @pytest.mark.parametrize("copied", [KVCache.clone, copy.copy, copy.deepcopy])
    def test_copies_are_independent(self, copied):
        cache = KVCache(2, 8, 2, 2, 4, strict=True, dtype=np.float16)
        store(cache, *tokens(2))
        twin = copied(cache)
        assert (twin.strict, twin.dtype, twin.seq_lens, repr(twin)) == (True, np.float16, [2, 2], repr(cache))
        store(twin, *tokens(1, seed=1))
        cache.reset()
        assert twin.seq_lens == [3, 3] and twin.get(1)[0].data.all() and cache.seq_lens == [0, 0]

    # rows
    def test_rows_of_every_length_against_plain_lists(self):
        cache, rng, lists = KVCache(3, 12, 1, 1, 1), np.random.default_rng(0), [[], [], []]
        for step in range(8):
            n_new, chunk = rng.integers(0, 2, 3) + [0, 0, step % 2], rng.standard_normal((3, 1, 2, 1), dtype=np.float32)
            if max(len(row) + n for row, n in zip(lists, n_new)) > 12:
                break
            store(cache, chunk, chunk, n_new)
            for row, numbers in enumerate(lists):
                numbers.extend(chunk[row, 0, : n_new[row], 0].tolist())
            if step == 4:
                cache.reorder([2, 2, 0])
                lists = [list(lists[2]), list(lists[2]), list(lists[0])]
                cache.rollback([1, 0, 0])
                del lists[0][-1:]
            assert cache.seq_lens == [len(numbers) for numbers in lists]
            key = cache.get(0)[0].data[:, 0, :, 0].tolist()
            assert key == [numbers + [0.0] * (cache.seq_pos - len(numbers)) for numbers in lists]
        assert step == 7 and len(set(map(len, lists))) > 1

    def test_a_chunk_may_hold_nothing_for_a_row_or_for_all(self):
        cache = KVCache(2, 4, 1, 2, 4)
        view = cache.update(0, *tokens(3), n_new=[0, 0])
        assert view.key.shape == (2, 2, 0, 4) and view.pos.shape == (2, 0)
        cache.advance()
        assert cache.seq_lens == [0, 0]
        store(cache, *tokens(3), n_new=[0, 3])
        assert cache.seq_lens == [0, 3] and cache.update(0, *tokens(1)).pos.tolist() == [[0, -1, -1, -1], [0, 1, 2, 3]]

    # dtype, gradients, growth, threads
    @pytest.mark.parametrize("given", [np.int8, np.uint64, np.int64, np.float16, np.float64])
    def test_input_of_any_number_type_is_cast_to_the_storage_dtype(self, given):
        for dtype in (np.float32, np.float16, "float16"):
            cache = KVCache(1, 4, 1, 1, 2, dtype=dtype)
            view = cache.update(0, np.array([[[[1, 2]]]], given), np.array([[[[3, 4]]]], given))
            cache.advance()
            assert view.key.dtype == cache.get(0)[1].dtype == cache.dtype == np.dtype(dtype)
            assert cache.get(0)[1].data.ravel().tolist() == [3, 4]

    def test_float16_converts_what_attention_reads_and_keeps_nothing_of_it(self):
        model = random_gpt(embed_dim=32, num_layers=2, num_heads=2, num_kv_heads=2, max_seq_len=1100)
        per_key_array = 2 * 16 * 4  # one token's keys of one layer in float32
        cache = cache_of(model, dtype=np.float16)

        def step_peak(length):
            cache.reset()
            prefill(model, ids_for((1, length)), cache, chunk=256)
            with no_grad():
                model([[1]], cache=cache)
                cache.rollback(1)
                tracemalloc.start()
                model([[1]], cache=cache)
                kept, peak = tracemalloc.get_traced_memory()
                tracemalloc.stop()
            return np.array([kept, peak])

        kept, peak = (step_peak(1024) - step_peak(256)) / 768  # growth in bytes per token of history
        assert abs(kept) < 1, "nothing that grows with the history survives a step"
        assert peak <= 1.5 * per_key_array, f"{peak:.0f} B per token: keys and values of one layer, one after the other"

    def test_different_layers_may_be_updated_from_different_threads_through_whole_lives_of_a_cache(self):
        cache, errors = KVCache(2, 16, 4, 2, 4), []
        put = [tokens(2, seed=i) for i in range(4)]
        for _ in range(25):
            barrier = threading.Barrier(4)

            def work(layer, barrier=barrier):
                try:
                    barrier.wait()
                    view = cache.update(layer, *put[layer], n_new=[2, 1])
                    np.testing.assert_array_equal(view.key.data[0, :, -2:], put[layer][0][0])
                    with pytest.raises(CacheStateError):
                        cache.update(layer, *put[layer], n_new=[2, 1])
                except BaseException as error:
                    errors.append(error)

            threads = [threading.Thread(target=work, args=(layer,)) for layer in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert not errors, errors[0]
            cache.advance()  # between the passes, all of the rest
            cache.reorder([1, 0])
            cache.reorder([1, 0])
            if cache.seq_pos > 10:
                cache.truncate([4, 2])
        for layer, (k, v) in enumerate(put):
            key, value = cache.get(layer)
            for row, (length, count) in enumerate(zip(cache.seq_lens, (2, 1))):
                for part, source in ((key, k), (value, v)):
                    repeated = np.tile(source[row, :, :count], (1, length // count, 1))
                    np.testing.assert_array_equal(part.data[row, :, :length], repeated)


class TestMembers:
    def test_kv_cache_takes_its_sizes_by_position_or_by_name_and_options_by_name(self):
        names = ["batch_size", "max_seq_len", "num_layers", "num_heads", "head_dim"]
        sizes = [2, 6, 3, 4, 5]
        by_name = KVCache(**dict(zip(names, sizes)), dtype=np.float16, strict=True)
        for cache in (KVCache(*sizes), by_name, KVCache(*sizes[:2], **dict(zip(names[2:], sizes[2:])))):
            assert [getattr(cache, name) for name in names] == sizes
        assert by_name.nbytes * 2 == KVCache(*sizes).nbytes
        with pytest.raises(TypeError):
            KVCache(*sizes, np.float16)

    @pytest.mark.parametrize("dtype", [np.float16, np.float32])
    def test_the_store_has_exactly_that_spacing(self, dtype):
        cache = KVCache(2, 5, 3, 2, 4, dtype=dtype)
        store(cache, *tokens(5))
        itemsize = cache.dtype.itemsize
        addresses, strides = [], set()
        for layer in range(3):
            for part in cache.get(layer):
                addresses.append(part.data.__array_interface__["data"][0])
                strides.add(part.data.strides)
        assert np.diff(addresses).tolist() == [2 * 2 * 5 * 4 * itemsize] * 5, "L, then keys and values"
        assert strides == {tuple(itemsize * n for n in (2 * 5 * 4, 5 * 4, 4, 1))}, "B, H_kv, S, D"

    def test_a_new_cache_is_zero(self):
        cache = KVCache(2, 5, 2, 2, 4)
        ones = np.ones((2, 2, 1, 4))
        cache.update(0, ones, ones)
        cache.advance()
        assert not cache.get(1)[0].data.any() and cache.get(0)[0].data.all()

    @pytest.mark.parametrize("name", ["num_layers", "max_context_length", "num_kv_heads", "head_dim", "batch_size"])
    @pytest.mark.parametrize("value", [float("nan"), np.True_, np.float32(2), [1], np.array(3), b"3", 10.0, -(2**70)])
    def test_a_config_field_that_is_no_size_is_refused_by_name(self, name, value):
        sizes = dict(num_layers=1, max_context_length=1, num_kv_heads=1, head_dim=1)
        with pytest.raises(ValueError, match=name):
            KVCacheConfig(**{**sizes, name: value})

    def test_a_config_is_positional_too_and_float16_unless_told(self):
        config = KVCacheConfig(2, 3, 5, 7)
        assert (config.batch_size, config.dtype, config.calculate_size()) == (1, np.float16, 2 * 2 * 1 * 3 * 5 * 7 * 2)
        assert KVCacheConfig(2, 3, 5, 7, 11, np.float32).calculate_size() == 2 * 2 * 11 * 3 * 5 * 7 * 4
        assert KVCacheConfig(*map(np.int64, (2, 3, 5, 7))) == config
        cache = KVCache.from_config(config=config, tracker=None)
        assert (cache.num_heads, cache.capacity, cache.nbytes) == (5, 3, config.calculate_size())

    def test_memory_is_tracked_for_the_purpose_kv_cache_and_released_once_by_close_or_by_the_end_of_a_block(self):
        tracker, config = MemoryTracker(), KVCacheConfig(1, 4, 2, 8)
        size = config.calculate_size()
        with tracker.allocate(100, purpose="weights"), KVCache.from_config(config, tracker) as cache:
            assert tracker.usage("kv_cache") == cache.nbytes == size and tracker.usage() == size + 100
            cache.close()
            assert tracker.by_purpose == {"weights": 100}
        assert tracker.current == 0 and tracker.peak == size + 100

    def test_beyond_the_limit_nothing_is_allocated(self):
        config = KVCacheConfig(1024, 2**20, 128, 128)  # 32 TiB: would fail for other reasons if it were tried
        tracker = MemoryTracker(limit_bytes=config.calculate_size() - 1)
        with pytest.raises(MemoryError) as error:
            KVCache.from_config(config, tracker)
        for number in (config.calculate_size(), 0, config.calculate_size() - 1):
            assert str(number) in str(error.value)
        assert tracker.current == tracker.peak == 0

    def test_bytes_go_back_when_the_machine_or_the_model_refuses(self):
        tracker = MemoryTracker()
        for max_seq_len, error in ((2**20, MemoryError), (2**40, ValueError)):  # 8 PiB; more than NumPy can count
            with pytest.raises(error):
                KVCache(1, max_seq_len, 2**10, 2**10, 2**10, tracker=tracker)
            assert tracker.current == 0 and tracker.peak > 0
        model = random_gpt()
        model.blocks[1].attention.causal = False
        with pytest.raises(ValueError, match="causal"):
            enable_kv_cache(model, tracker=tracker)
        assert tracker.current == 0 and tracker.by_purpose == {}

    def test_layer_kv_cache_has_public_writable_arrays_and_lengths_that_can_be_assigned(self):
        cache = LayerKVCache(batch_size=2, max_seq_len=5, num_heads=3, head_dim=4)
        assert type(cache.seq_lens) is list and cache.k_cache.shape == cache.v_cache.shape == (2, 3, 5, 4)
        k, v = tokens(3, num_heads=3)
        cache.k_cache[:, :, :3], cache.v_cache[:, :, :3] = k, v
        for lengths in ([3, 2], (3, 2), np.array([3, 2])):
            cache.seq_lens = lengths
            for row, length in enumerate(lengths):
                key, value = cache.get_kv(row)
                assert key.shape == value.shape == (3, length, 4)
                np.testing.assert_array_equal(key, k[row, :, :length])
                np.testing.assert_array_equal(value, v[row, :, :length])
                assert not key.flags.writeable
        cache.seq_lens = [3, 3]
        cache.seq_lens[1] = 0
        cache.update(*tokens(2, num_heads=3, seed=1))
        assert cache.seq_lens == [5, 2]
        np.testing.assert_array_equal(cache.get_kv(1)[0], tokens(2, num_heads=3, seed=1)[0][1])

    @pytest.mark.parametrize("lengths", [[6, 0], [-1, 0], [1], [1.0, 0], None])
    def test_layer_kv_cache_says_when_an_assigned_length_makes_no_sense(self, lengths):
        cache = LayerKVCache(2, 5, 2, 4)
        cache.seq_lens = lengths
        with pytest.raises(ValueError, match="seq_lens"):
            cache.update(*tokens(1))
        with pytest.raises(ValueError, match="seq_lens"):
            cache.get_kv(0)
        eye = np.eye(8, dtype=np.float32)
        with pytest.raises(ValueError, match="seq_lens"):
            multi_head_attention_with_cache(np.zeros((2, 1, 8), np.float32), cache, eye, eye, eye, eye)
        assert not cache.k_cache.any()

    def test_memory_usage_counts_mb_of_two_to_the_twenty_and_two_tensors_per_layer(self):
        usage = KVCache(2, 8, 3, 2, 4).get_memory_usage()
        assert usage["total_bytes"] == 3072 and usage["total_mb"] == 3072 / 2**20 and usage["cache_tensors"] == 6


class TestGrowth:
    """`KVCache(grow=True)`; oracle: the same tokens in plain arrays, and the sizes 16, 32, 64, ... by hand."""

    def test_it_starts_small_doubles_and_ends_at_max_seq_len(self):
        cache, sizes, (k, v) = KVCache(2, 50, 1, 2, 4, grow=True), [], tokens(50)
        assert cache.capacity == 50
        for t in range(50):
            store(cache, k[:, :, t : t + 1], v[:, :, t : t + 1])
            sizes.append(cache.nbytes // (2 * 2 * 2 * 4 * 4))
            np.testing.assert_array_equal(cache.get(0)[0].data, k[:, :, : t + 1])
            np.testing.assert_array_equal(cache.get(0)[1].data, v[:, :, : t + 1])
        assert sizes == [16] * 16 + [32] * 16 + [50] * 18
        with pytest.raises(ValueError, match="max_seq_len=50"):
            cache.update(0, k[:, :, :1], v[:, :, :1])
        assert cache.nbytes == KVCache(2, 50, 1, 2, 4).nbytes

    def test_a_prompt_grows_it_once_and_a_refused_one_not_at_all(self):
        cache, (k, v) = KVCache(2, 200, 2, 2, 4, grow=True), tokens(70)
        with pytest.raises(ValueError):
            cache.update(0, np.full_like(k, np.nan), v)
        assert cache._store.shape[4] == 16
        store(cache, k, v, n_new=[70, 3])
        assert cache._store.shape[4] == 128
        assert cache.get(1)[0].shape == (2, 2, 70, 4)
        np.testing.assert_array_equal(cache.get(1)[0].data[0], k[0] + 1)
        np.testing.assert_array_equal(cache.get(1)[0].data[1, :, :3], k[1, :, :3] + 1)
        assert not cache.get(1)[0].data[1, :, 3:].any()

    def test_views_of_the_smaller_store_stay_what_they_were(self):
        cache, (k, v) = KVCache(1, 64, 1, 2, 4, grow=True), tokens(16, batch_size=1)
        view = cache.update(0, k, v)
        cache.advance()
        store(cache, *tokens(1, batch_size=1, seed=1))
        np.testing.assert_array_equal(view.key.data, k)

    def test_the_tracker_follows_and_a_limit_refuses_the_growth_and_nothing_is_lost(self):
        (k, v), slot = tokens(16, batch_size=1), 2 * 2 * 4 * 4
        tracker = MemoryTracker(limit_bytes=(16 + 32) * slot)
        cache = KVCache(1, 64, 1, 2, 4, grow=True, tracker=tracker)
        assert tracker.current == 16 * slot
        store(cache, k, v)
        store(cache, k[:, :, :1], v[:, :, :1])
        assert tracker.current == cache.nbytes == 32 * slot and tracker.peak == 48 * slot
        store(cache, k[:, :, :15], v[:, :, :15])
        with pytest.raises(MemoryError):
            cache.update(0, k[:, :, :1], v[:, :, :1])
        assert cache.seq_lens == [32] and cache.pending_layers == [] and tracker.current == 32 * slot
        np.testing.assert_array_equal(cache.get(0)[0].data[:, :, :16], k)
        cache.close()
        assert tracker.current == 0

    def test_layers_in_threads_find_one_store(self):
        (k, v), layers = tokens(1, batch_size=1), 8
        for start in (15, 16, 31, 32):
            cache = KVCache(1, 64, layers, 2, 4, grow=True)
            store(cache, *tokens(start, batch_size=1, seed=start))
            gate = threading.Barrier(layers)

            def run(layer, cache=cache, gate=gate):
                gate.wait()
                cache.update(layer, k + layer, v + layer)

            threads = [threading.Thread(target=run, args=(layer,)) for layer in range(layers)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            cache.advance()
            for layer in range(layers):
                np.testing.assert_array_equal(cache.get(layer)[0].data[:, :, start:], k + layer)

    def test_a_gpt_generates_on_it_and_a_clone_goes_its_own_way(self):
        model, prompt = random_gpt(), list(range(1, 12))
        expected = model.generate(prompt, 30)
        cache = enable_kv_cache(model, grow=True)
        assert model.generate(prompt, 30) == expected and cache._store.shape[4] == 64
        twin = cache.clone()
        assert twin.grow and twin.seq_lens == cache.seq_lens
        twin.reset()
        assert cache.seq_pos == 40
        disable_kv_cache(model)


class TestAnyMember:
    """`enable_kv_cache` takes a cache that exists, or whoever makes one."""

    def test_a_cache_that_exists_is_used_and_an_option_beside_it_is_refused(self):
        model = random_gpt()
        cache = cache_of(model, batch_size=2)
        assert enable_kv_cache(model, cache=cache) is cache is model._kv_cache
        model(ids_for((2, 3)))
        assert cache.seq_lens == [3, 3]
        with pytest.raises(TypeError, match="batch_size"):
            enable_kv_cache(model, cache=cache, batch_size=2)
        assert model._kv_cache is cache

    def test_a_factory_gets_the_sizes_of_the_model_and_its_own_options(self):
        model, seen = random_gpt(), {}

        def factory(flavour, **sizes):
            seen.update(sizes, flavour=flavour)
            return KVCache(**sizes)

        enable_kv_cache(model, factory=factory, flavour="x", batch_size=3)
        assert seen == {"batch_size": 3, "max_seq_len": 64, "num_layers": 3, "num_heads": 2, "head_dim": 8,
                        "flavour": "x"}

    def test_a_given_cache_that_does_not_fit_is_refused_and_stays_open(self):
        model, cache = random_gpt(), KVCache(1, 8, 3, 4, 8)
        parts = parts_of(model)
        with pytest.raises(ValueError, match="key-value heads"):
            enable_kv_cache(model, cache=cache)
        assert cache.capacity == 8 and same_objects(parts_of(model), parts) and model._kv_cache is None

    def test_prompts_of_different_length_on_a_cache_equal_each_alone(self):
        model, prompts = random_gpt(), [[1, 2, 3, 4, 5], [7], [9, 9, 9]]
        alone = [model.generate(prompt, 12) for prompt in prompts]
        cache = cache_of(model, batch_size=3)
        for _ in range(2):  # the second time it still holds the first text
            assert model.generate(prompts, 12, cache=cache) == alone
            assert cache.seq_lens == [16, 12, 14], "the last new token of each row is never run"
        enable_kv_cache(model, batch_size=3)
        assert model.generate(prompts, 12) == alone
        with pytest.raises(ValueError, match="rows"):
            model.generate(prompts[:2], 2)


class TestFunctionsBesideTheClasses:
    @pytest.mark.parametrize("wrap", [np.asarray, Tensor])
    def test_the_t_queries_are_the_last_t_tokens_causal_among_themselves(self, wrap):
        rng, w = np.random.default_rng(0), np.random.default_rng(1).standard_normal((4, 8, 8), dtype=np.float32) / 3
        x, cache = rng.standard_normal((2, 5, 8), dtype=np.float32), LayerKVCache(2, 6, 2, 4)
        heads = [(x @ matrix).reshape(2, 5, 2, 4).swapaxes(1, 2) for matrix in w[:3]]
        cache.update(heads[1], heads[2])
        expected = np.zeros((2, 5, 8))
        for b, h, t in np.ndindex(2, 2, 5):
            scores = [float(heads[0][b, h, t] @ heads[1][b, h, s]) / 2 for s in range(t + 1)]
            weights = np.exp(scores) / np.exp(scores).sum()
            expected[b, t, 4 * h : 4 * h + 4] = weights @ heads[2][b, h, : t + 1]
        expected = expected @ w[3]
        for seq_len in (1, 2, 5):
            got = multi_head_attention_with_cache(wrap(x[:, -seq_len:]), cache, *map(wrap, w))
            assert isinstance(got, Tensor if wrap is Tensor else np.ndarray)
            got = np.asarray(got)
            assert got.shape == (2, seq_len, 8) and got.dtype == np.float32
            np.testing.assert_allclose(got, expected[:, -seq_len:], atol=3e-5)
        with pytest.raises(ValueError):
            multi_head_attention_with_cache(x[0], cache, *w)

    def test_the_decoder_takes_b_t_or_b_ids_and_nothing_else(self):
        decoder = IncrementalDecoder(d_model=8, num_heads=2, num_layers=3, max_seq_len=6, vocab_size=10,
                                     rng=np.random.default_rng(0))
        assert [type(cache) for cache in decoder.caches] == [LayerKVCache] * 3
        caches = decoder._init_caches(2)
        assert decoder.forward_step([1, 2], caches).shape == (2, 10)
        assert decoder.forward_step(Tensor([[1], [2]]), caches, is_prefill=True).shape == (2, 10)
        for wrong in ([1, 2, 3, 4], [1], [[1, 2, 3]], [[1.5], [2]], [[-1], [0]], [[10], [0]], np.zeros((2, 0), int), 3):
            with pytest.raises(ValueError):
                decoder.forward_step(wrong, caches)
        assert [cache.seq_lens for cache in caches] == [[2, 2]] * 3

    def test_a_decoder_step_that_fails_half_way_leaves_every_length(self):
        decoder = IncrementalDecoder(8, 2, 3, 6, 10, rng=np.random.default_rng(0))
        decoder.forward_step([[1, 2]], decoder.caches)
        healthy, twin = decoder.layers[1], copy.deepcopy(decoder)
        decoder.layers[1] = (healthy[0], healthy[1] * np.nan, *healthy[2:])
        with pytest.raises(ValueError, match="finite"):
            decoder.forward_step([[3]], decoder.caches)
        assert [cache.seq_lens for cache in decoder.caches] == [[2]] * 3
        decoder.layers[1] = healthy
        np.testing.assert_array_equal(decoder.forward_step([[4]]), twin.forward_step([[4]]))

    @pytest.mark.parametrize("name", ["d_model", "num_heads", "num_layers", "max_seq_len", "vocab_size"])
    def test_a_decoder_size_is_a_size(self, name):
        sizes = dict(d_model=8, num_heads=2, num_layers=1, max_seq_len=4, vocab_size=5)
        for value in (0, -1, 1.5, None):
            with pytest.raises(ValueError, match=name):
                IncrementalDecoder(**{**sizes, name: value})

    def test_memory_analysis_and_its_table_agree_and_gb_are_ten_to_the_nine(self):
        analysis = memory_analysis(2, 4, 8, 3, 5)
        assert analysis["total_bytes"] == 2 * 2 * 4 * 8 * 3 * 5 * 2 and analysis["total_GB"] == 1920 * 2 / 1e9
        table = memory_growth_table()
        assert isinstance(table, str) and "32 layers, 32 key-value heads of 128" in table.splitlines()[0]
        header, *rows = (line.split() for line in table.splitlines()[1:])
        batches = [int(word) for word in header if word.isdigit()]
        assert len(rows) == 4 and batches == [1, 8, 32]
        for length, *cells in rows:
            for batch, cell in zip(batches, cells, strict=True):
                mib = memory_analysis(32, 32, 128, batch, int(length))["total_bytes"] / 2**20
                assert cell == f"{mib:,.1f}"

    def test_the_analyses_refuse_to_call_a_cached_model_uncached(self, capsys):
        model = random_gpt()
        cache = enable_kv_cache(model)
        for analyze in (profile_naive_generation, analyze_kvcache_speedup):
            with pytest.raises(ValueError, match="disable_kv_cache"):
                analyze(model, lengths=(2, 4))
            with pytest.raises(ValueError, match="max_seq_len=64"):
                analyze(model, lengths=(2, 400))
        assert cache.seq_pos == 0 and capsys.readouterr().out == ""
        disable_kv_cache(model)
        assert [length for length, _ in profile_naive_generation(model, lengths=(2, 4), repeats=1)] == [2, 4]

    def test_both_ways_are_measured_in_turn(self, monkeypatch, capsys):
        order, generate = [], type(random_gpt()).generate

        def watched(model, prompt, max_new_tokens, cache=None):
            order.append(cache is not None)
            return generate(model, prompt, max_new_tokens, cache=cache)

        model = random_gpt()
        monkeypatch.setattr(type(model), "generate", watched)
        rows = analyze_kvcache_speedup(model, lengths=(3,), max_new_tokens=2, repeats=3)
        assert order == [False, True] * 4, "one pair to warm up, then pairs"
        assert len(rows) == 1 and rows[0]["same_tokens"] is True

    def test_the_memory_analysis_computes_for_any_configuration(self, capsys):
        rows = analyze_kvcache_memory({"tiny": KVCacheConfig(2, 1024, 1, 64)}, batch_size=2)
        assert rows == [{"model": "tiny", "bytes_per_token": 512, "MiB_float16": 1.0, "MiB_float32": 2.0}]
        assert "tiny" in capsys.readouterr().out


class PlainAttention:
    """A duck: nothing of Module, float32 arrays, attention with the mask of lesson 12."""

    causal = True

    def __init__(self, rng):
        self.w = rng.standard_normal((4, 8, 8), dtype=np.float32) / 3

    def project(self, x):
        return [Tensor((x @ w).reshape(*x.shape[:2], 2, 4).swapaxes(1, 2)) for w in self.w[:3]]

    def attend(self, query, key, value, visible=None):
        return scaled_dot_product_attention(query, key, value, visible).data

    def merge(self, mixed):
        return mixed.swapaxes(1, 2).reshape(mixed.shape[0], -1, 8) @ self.w[3]

    def __call__(self, x):
        return self.merge(self.attend(*self.project(x), causal_mask(x.shape[1])))


class PlainModel:
    embed_dim, num_heads, num_layers, max_seq_len = 8, 2, 2, 12

    def __init__(self):
        rng = np.random.default_rng(0)
        self.table = rng.standard_normal((10, 8), dtype=np.float32)
        places = rng.standard_normal((12, 8), dtype=np.float32)
        self.position_embedding = lambda x, pos=None: x + places[np.arange(x.shape[1]) if pos is None else pos]
        self.blocks = [SimpleNamespace(attention=PlainAttention(rng)) for _ in range(2)]
        self.norm = lambda x: x / np.abs(x).max(axis=-1, keepdims=True)

    def __call__(self, ids):
        x = self.position_embedding(self.table[np.asarray(ids)])
        for each in self.blocks:
            x = x + each.attention(x)
        return self.norm(x) @ self.table.T


class TestModelSide:
    # enable and disable
    def test_a_model_in_plain_python_with_the_needed_attributes_can_be_cached(self):
        model, ids = PlainModel(), [[1, 2, 3, 4, 5, 6]]
        expected, parts = model(ids), parts_of(model)
        cache = enable_kv_cache(model)
        got = np.concatenate([model(piece) for piece in ([[1, 2, 3]], [[4]], [[5, 6]])], axis=1)
        assert got.shape == (1, 6, 10) and cache.seq_lens == [6] and model._cache_enabled is True
        np.testing.assert_allclose(got, expected, atol=3e-5)
        disable_kv_cache(model)
        assert same_objects(parts_of(model), parts)
        np.testing.assert_array_equal(model(ids), expected)

    def test_a_model_that_lacks_parts_is_told_all_of_them_and_left_alone(self):
        model = PlainModel()
        del model.norm, model.blocks[0].attention
        model.blocks[1].attention = SimpleNamespace(project=None, merge=None)
        with pytest.raises(AttributeError) as error:
            enable_kv_cache(model)
        for name in ("PlainModel", "norm", "blocks[0].attention", "blocks[1].attention.attend"):
            assert name in str(error.value)
        assert not hasattr(model, "_kv_cache")
        for nothing in (None, "model", object()):
            with pytest.raises(AttributeError, match="embed_dim, num_layers, num_heads, max_seq_len"):
                enable_kv_cache(nothing)

    def test_sizes_that_are_none_are_refused_by_the_factory_and_sizes_beside_a_model_as_well(self):
        for first in (2.0, True, "2", 0):
            with pytest.raises(ValueError, match="batch_size"):
                enable_kv_cache(first, 16, 3, 4, 8)
        with pytest.raises(ValueError, match="batch_size"):
            create_kv_cache(0, 16, 3, 4, 8)
        model = random_gpt()
        parts = parts_of(model)
        for options in ({"batch_size": 0}, {"num_layers": 2}, {"rows": 2}):
            with pytest.raises(TypeError if "rows" in options else ValueError):
                enable_kv_cache(model, **options)
        with pytest.raises(TypeError, match="name"):
            enable_kv_cache(model, 2)
        assert same_objects(parts_of(model), parts) and model._kv_cache is None

    def test_a_second_call_works_on_the_models_own_parts_and_forgets_the_first_cache(self):
        model = random_gpt()
        parts = parts_of(model)
        first, second = enable_kv_cache(model), enable_kv_cache(model=model, batch_size=2)
        model(ids_for((2, 3)))
        assert first.seq_lens == [0] and second.seq_lens == [3, 3] and model._kv_cache is second
        assert all(part.part is old for part, old in zip(parts_of(model), parts, strict=True))
        disable_kv_cache(model)
        assert same_objects(parts_of(model), parts)

    # training and evaluation
    def test_a_frozen_block_in_eval_mode_does_not_bring_the_cache_into_training(self):
        ids, target = ids_for((2, 6)), ids_for((2, 6), seed=1)

        def gradients(model):
            model.train()
            model.blocks[1].eval()
            model.zero_grad()
            cross_entropy(model(ids), target).backward()
            return {name: parameter.grad.data.copy() for name, parameter in model.named_parameters()}

        model = random_gpt()
        expected = gradients(model)
        cache = enable_kv_cache(model, batch_size=2)
        for _ in range(2):
            got = gradients(model)
            assert list(got) == list(expected)
            for name, gradient in expected.items():
                assert gradient.any(), f"{name} has no gradient to compare"
                np.testing.assert_array_equal(got[name], gradient, err_msg=name)
        assert cache.seq_pos == 0 and cache.pending_layers == []

    def test_a_block_in_training_mode_does_not_leave_the_cache_of_a_model_in_eval_mode(self):
        model, ids = random_gpt(), ids_for((1, 5))
        expected = model(ids).data.copy()
        cache = enable_kv_cache(model)
        model.blocks[1].train()  # a dropout that is to stay on, for example
        got = np.concatenate([model(ids[:, :2]).data, model(ids[:, 2:]).data], axis=1)
        assert cache.seq_pos == 5 and got.shape == expected.shape
        np.testing.assert_allclose(got, expected, atol=1e-4)

    def test_prefill_and_generate_bring_every_parts_own_mode_back(self):
        model = random_gpt().train()
        model.blocks[1].eval()
        modes = [module.training for module in model.modules()]
        assert set(modes) == {True, False}
        cache = cache_of(model)
        prefill(model, [1, 2, 3], cache)
        model.generate([1, 2], 3, cache=cache)
        with pytest.raises(ValueError):
            prefill(model, ids_for((1, 2)), cache, n_new=3)
        assert [module.training for module in model.modules()] == modes

    def test_a_copy_of_a_model_follows_its_own_mode(self):
        model = random_gpt()
        enable_kv_cache(model)
        twin = copy.deepcopy(model)
        model.train()
        twin([[1, 2]])
        model([[1, 2]])
        assert twin._kv_cache.seq_lens == [2] and model._kv_cache.seq_lens == [0]

    def test_layer_l_of_the_cache_holds_what_block_l_projects(self):
        model, ids = random_gpt(), ids_for((2, 4))
        cache = cache_of(model, 2)
        x = model.position_embedding(model.token_embedding(ids))
        model(ids, cache=cache)
        for layer, block in enumerate(model.blocks):
            _, *projected = block.attention.project(block.norm1(x))
            for part, expected in zip(cache.get(layer), projected, strict=True):
                assert part.shape == expected.shape == (2, 2, 4, 8)
                np.testing.assert_allclose(part.data, expected.data, atol=1e-5, err_msg=f"layer {layer}")
            x = block(x)

    def test_state_dict_is_equal_in_names_and_numbers(self):
        model = random_gpt()
        before = model.state_dict()
        enable_kv_cache(model)
        model(ids_for((1, 3)))
        after = model.state_dict()
        assert list(after) == list(before) and len(after) > 10
        for name, array in before.items():
            np.testing.assert_array_equal(after[name], array, err_msg=name)

    # interrupts
    @pytest.mark.parametrize("explicit", [True, False])
    def test_ctrl_c_in_a_forward_leaves_the_cache_as_before_and_the_parts_in_place(self, explicit):
        model, ids = random_gpt(), ids_for((2, 5))
        expected = model(ids).data.copy()
        cache = cache_of(model, 2) if explicit else enable_kv_cache(model, batch_size=2)
        options, parts = {"cache": cache} if explicit else {}, parts_of(model)
        first = model(ids[:, :3], **options).data
        before, healthy = cache.clone(), model.blocks[2].mlp

        def interrupted(x):
            raise KeyboardInterrupt

        model.blocks[2].mlp = interrupted
        for count in (1, 2):
            with pytest.raises(KeyboardInterrupt):
                model(ids[:, 3 : 3 + count], **options)
        assert cache.seq_lens == [3, 3] and same_objects(parts_of(model), parts)
        assert not (explicit and cache.pending_layers)
        for layer in range(3):
            np.testing.assert_array_equal(cache.get(layer)[1].data, before.get(layer)[1].data)
        model.blocks[2].mlp = healthy
        got = np.concatenate([first, model(ids[:, 3:], **options).data], axis=1)
        np.testing.assert_allclose(got, expected, atol=1e-4)

    def test_what_fails_after_the_last_norm_leaves_a_whole_pass_that_rollback_forgets(self):
        model = random_gpt()
        cache, head, model.head = cache_of(model), model.head, None
        with pytest.raises(TypeError):
            model([[1, 2]], cache=cache)
        assert cache.seq_lens == [2] and cache.pending_layers == []
        cache.rollback(2)
        model.head = head
        expected = model([[1, 2]]).data
        np.testing.assert_allclose(model([[1, 2]], cache=cache).data, expected, atol=1e-4)

    # generate and prefill
    def test_a_cache_that_is_too_small_is_refused_before_any_work(self):
        model, ran = random_gpt(), []
        embedding = model.token_embedding
        model.token_embedding = lambda ids: ran.append(ids) or embedding(ids)
        small = cache_of(model, max_seq_len=6)
        small.update(0, *tokens(1, 1, 2, 8))
        for cache in (small, None):
            with pytest.raises(ValueError, match="7") as error:
                model.generate([1, 2, 3], 5, cache=cache)
            assert "6" in str(error.value) and not ran
            enable_kv_cache(model, max_seq_len=6)
        disable_kv_cache(model)
        small.abandon()
        assert len(model.generate([1, 2, 3], 4, cache=small)) == 7 and small.seq_lens == [6], "six rows fit exactly"
        assert model.generate(list(range(9)), 0, cache=small) == list(range(9)), "n = 0 runs nothing"
        assert small.seq_lens == [6]

    def test_generate_fills_a_model_to_its_last_position(self):
        model = random_gpt(max_seq_len=8)
        cache = cache_of(model)
        for count in (1, 3, 7):
            prompt = list(range(8 - count))
            assert model.generate(prompt, count, cache=cache) == model.generate(prompt, count)
            assert cache.seq_lens == [7]

    def test_list_in_list_out_and_array_in_array_out(self):
        model = random_gpt()
        flat, rows = model.generate([1, 2], 3), model.generate([[1, 2], [3, 4]], 3)
        assert isinstance(flat, list) and isinstance(rows, list) and rows[0] == flat
        for prompt, batch_size, expected in (([1, 2], 1, flat), ([[1, 2], [3, 4]], 2, rows)):
            cache = cache_of(model, batch_size)
            assert model.generate(prompt, 3, cache=cache) == expected
            got = model.generate(np.array(prompt), 3, cache=cache)
            assert isinstance(got, np.ndarray) and got.tolist() == expected

    def test_a_prompt_in_chunks_of_any_size_gives_the_logits_of_one_full_forward(self):
        model, ids = random_gpt(), ids_for((2, 9))
        expected = model(ids).data.copy()
        for chunk in range(1, 11):
            cache = cache_of(model, 2)
            got = prefill(model, ids, cache, chunk)
            assert got.shape == expected.shape and cache.seq_lens == [9, 9]
            np.testing.assert_allclose(got.data, expected, atol=1e-4, err_msg=f"chunk={chunk}")

    def test_a_prefill_that_cannot_fit_the_model_or_holds_nothing_is_refused_before_any_work(self):
        model = random_gpt(max_seq_len=4)
        cache = cache_of(model, max_seq_len=32)
        with pytest.raises(ValueError, match="max_seq_len=4"):
            prefill(model, [1, 2, 3, 4, 5], cache, chunk=2)
        for nothing in ([], np.zeros((1, 0), int), np.zeros((1, 1, 1), int)):
            with pytest.raises(ValueError, match="at least one token"):
                prefill(model, nothing, cache)
        assert cache.seq_lens == [0]

    def test_a_chunk_that_fails_leaves_the_chunks_before_it(self):
        model = random_gpt()
        cache = cache_of(model)
        with pytest.raises((ValueError, IndexError)):
            prefill(model, [1, 2, 3, 999], cache, chunk=2)
        assert cache.seq_lens == [2] and cache.pending_layers == []
        expected = model([[1, 2, 3]]).data[:, -1]
        np.testing.assert_allclose(model([[3]], cache=cache).data[:, -1], expected, atol=1e-4)

    def test_a_mask_may_be_left_out_only_where_it_hides_nothing(self):
        """Decoding with equal rows needs none, and then the numbers are those with the mask, bit by bit."""
        attention, seen = random_gpt().blocks[0].attention, []

        class Watching:
            causal = True

            def __getattr__(self, name):
                return getattr(attention, name)

            def attend(self, query, key, value, visible=None):
                seen.append(visible)
                got = attention.attend(query, key, value, visible)
                all_visible = np.ones((*query.shape[:1], query.shape[2], key.shape[2]), bool)
                if visible is None:
                    np.testing.assert_array_equal(got.data, attention.attend(query, key, value, all_visible).data)
                return got

        x = Tensor(np.random.default_rng(0).standard_normal((2, 3, 32), dtype=np.float32))
        cache = KVCache(2, 8, 1, 2, 8)
        for n_new, seq_len in ((None, 3), (None, 1), ([1, 0], 1), (None, 1)):
            CachedAttention(Watching(), cache, 0, n_new)(x[:, :seq_len])
            cache.advance()
        assert len(seen) == 4
        for step in (0, 2, 3):  # a prompt, a row without a new token, a row that is shorter
            assert seen[step] is not None and not seen[step].all()

    def test_beam_search_on_reordered_rows_equals_beam_search_without_a_cache(self):
        model, width = random_gpt(vocab_size=16, seed=3), 3

        def scores(logits):
            logits = logits.astype(np.float64)
            return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

        def beams(step):
            """[(log probability, tokens)] of a search over 6 tokens; step(texts, came_from) -> logits (rows, V)."""
            texts, totals, came_from = [[1, 2]] * width, [0.0, -np.inf, -np.inf], list(range(width))
            for _ in range(6):
                table = np.array(totals)[:, None] + scores(step(texts, came_from))
                best = np.argsort(-table, axis=None, kind="stable")[:width]
                came_from, new = (part.tolist() for part in np.unravel_index(best, table.shape))
                texts = [texts[row] + [token] for row, token in zip(came_from, new)]
                totals = table.ravel()[best].tolist()
            return totals, texts

        cache, moved = cache_of(model, width), []

        def cached_step(texts, came_from):
            moved.append(came_from)
            cache.reorder(came_from)
            return model(np.array(texts)[:, cache.seq_pos :], cache=cache).data[:, -1]

        with no_grad():
            totals, texts = beams(lambda texts, _: model(np.array(texts)).data[:, -1])
            cached_totals, cached_texts = beams(cached_step)
        assert any(len(set(rows)) < width and rows != [0] * width for rows in moved), "rows must move for this to tell"
        assert cached_texts == texts
        np.testing.assert_allclose(cached_totals, totals, atol=1e-4)


class TestSizesToCheckAgainst:
    @pytest.mark.parametrize("name, sizes, context, fp16_mib", [
        ("GPT-2", (12, 12, 64), 1024, 36), ("Qwen2.5-0.5B", (24, 2, 64), 2048, 24),
        ("Llama-3-8B", (32, 8, 128), 4096, 512), ("Llama-3-70B", (80, 8, 128), 8192, 2560),
        ("GPT-3", (96, 96, 128), 2048, 9216),
    ])
    def test_the_known_models_are_named_truthfully_in_every_function(self, name, sizes, context, fp16_mib):
        num_layers, kv_heads, head_dim = sizes
        config = KNOWN_MODELS[name]
        assert (config.num_layers, config.num_kv_heads, config.head_dim, config.max_context_length) == (*sizes, context)
        assert config.dtype == np.float16 and config.calculate_size() == fp16_mib * 2**20
        assert kv_cache_bytes(*sizes, context, 4) == 2 * fp16_mib * 2**20
        assert memory_analysis(num_layers, kv_heads, head_dim, 1, context)["total_MiB"] == fp16_mib

    def test_the_models_own_cache_has_the_predicted_bytes_in_eight_tensors(self):
        model = random_gpt(embed_dim=512, num_layers=4, num_heads=8, num_kv_heads=8, max_seq_len=128)
        usage = enable_kv_cache(model).get_memory_usage()
        assert (usage["total_mb"], usage["cache_tensors"]) == (2.0, 8)

"""What both caches of a fixed number of slots owe to the contract of lesson 17: one list of tests, run on each.

The oracle is a dict per layer and row, of the tokens that must be there; here the slots suffice for all of them.
"""

import copy
import threading

import numpy as np
import pytest

from tinytorch.core.tensor import Tensor
from tinytorch.generation.cache_compression import HeavyHitterKVCache, SlidingWindowKVCache
from tinytorch.generation.kv_cache import CacheStateError, KVCacheConfig, enable_kv_cache, random_gpt
from tinytorch.profiling.profiler import MemoryTracker

B, L, H, D, SLOTS = 2, 2, 2, 4, 8


def window(batch_size=B, max_seq_len=None, num_layers=L, **options):
    return SlidingWindowKVCache(batch_size, max_seq_len, num_layers, H, D, window=5, sinks=2, spare=1, **options)


def heavy(batch_size=B, max_seq_len=None, num_layers=L, **options):
    return HeavyHitterKVCache(batch_size, max_seq_len, num_layers, H, D, budget=SLOTS, recent=3, **options)


both = pytest.mark.parametrize("make", [window, heavy])


def tokens(seq_len, seed=0, batch_size=B):
    return np.random.default_rng(seed).standard_normal((2, batch_size, H, seq_len, D), dtype=np.float32)


def update(cache, layer, key, value, n_new=None):
    """One layer's update, and for a cache that listens, attention that is spread evenly."""
    view = cache.update(layer, key, value, n_new)
    if cache.observe is not None:
        cache.observe(layer, np.full((cache.batch_size, H, key.shape[2], view.key.shape[2]), 0.5, np.float32))
    return view


def run(cache, key, value, n_new=None):
    for layer in range(cache.num_layers):
        update(cache, layer, key + layer, value - layer, n_new)
    cache.advance()


def contents(cache):
    """All that can be asked of a cache between two passes."""
    arrays = [part.data for layer in range(cache.num_layers) for part in cache.get(layer)]
    places = [cache.residents(layer) for layer in range(cache.num_layers)]
    scores = [cache.scores(layer) for layer in range(cache.num_layers)] if cache.observe is not None else []
    return [np.array(cache.seq_lens), *places, *arrays, *scores]


def assert_same(got, expected):
    assert len(got) == len(expected)
    for a, b in zip(got, expected):
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@both
class TestTransaction:
    def test_update_shows_old_and_new_and_commits_nothing(self, make):
        cache, (k, v), (k2, v2) = make(), tokens(3), tokens(2, seed=1)
        run(cache, k, v)
        before = contents(cache)
        view = update(cache, 1, k2, v2)
        assert view.key.shape == view.value.shape == (B, H, 5, D) and view.pos.tolist() == [[0, 1, 2, 3, 4]] * B
        np.testing.assert_array_equal(view.key.data, np.concatenate([k + 1, k2], axis=2))
        np.testing.assert_array_equal(view.value.data, np.concatenate([v - 1, v2], axis=2))
        assert cache.pending_layers == [1]
        assert_same(contents(cache), before)
        cache.abandon()
        assert cache.pending_layers == []
        assert_same(contents(cache), before)
        run(cache, k2, v2)
        np.testing.assert_array_equal(cache.get(0)[1].data, np.concatenate([v, v2], axis=2))

    def test_calls_out_of_order(self, make):
        cache, (k, v) = make(), tokens(2)
        with pytest.raises(CacheStateError, match="nothing pending"):
            cache.advance()
        update(cache, 0, k, v)
        with pytest.raises(CacheStateError, match="twice"):
            cache.update(0, k, v)
        with pytest.raises(CacheStateError, match="disagree"):
            cache.update(1, *tokens(3))
        with pytest.raises(CacheStateError, match="disagree"):
            cache.update(1, k, v, n_new=[2, 1])
        update(cache, 1, k, v)
        cache.advance()
        assert cache.seq_lens == [2, 2]

    def test_a_skipped_layer_reads_as_zeros_and_strict_refuses_the_skip(self, make):
        cache, strict, (k, v) = make(), make(strict=True), tokens(2)
        run(cache, k, v)
        for each in (cache, strict):
            update(each, 1, k, v)
        with pytest.raises(CacheStateError, match=r"\[0\]"):
            strict.advance()
        cache.advance()
        key, value = cache.get(0)
        assert key.shape == (B, H, 4, D) and not key.data[:, :, 2:].any() and not value.data[:, :, 2:].any()
        np.testing.assert_array_equal(cache.get(1)[0].data, np.concatenate([k + 1, k], axis=2))
        assert cache.residents(0).tolist() == cache.residents(1).tolist() == [[0, 1, 2, 3]] * B

    def test_a_forward_pass_that_fails_half_way_changes_nothing(self, make):
        model = random_gpt(embed_dim=2 * H * D, num_layers=2)
        cache, twin = (make(batch_size=1, num_layers=2, max_seq_len=64) for _ in range(2))
        for each in (cache, twin):
            model(np.array([[1, 2, 3]]), cache=each)
        healthy, model.blocks[1].mlp = model.blocks[1].mlp, None
        before = contents(cache)
        with pytest.raises(TypeError):
            model(np.array([[4, 5]]), cache=cache)
        model.blocks[1].mlp = healthy
        assert_same(contents(cache), before)
        for each in (cache, twin):
            model(np.array([[6]]), cache=each)
        assert_same(contents(cache), contents(twin))

    def test_layers_may_be_updated_from_different_threads(self, make):
        cache, plain, errors = make(num_layers=4), make(num_layers=4), []
        for turn in range(20):
            put, barrier = [tokens(2, seed=10 * turn + layer) for layer in range(4)], threading.Barrier(4)

            def work(layer, put=put, barrier=barrier):
                try:
                    barrier.wait()
                    view = update(cache, layer, *put[layer], n_new=[2, 1])
                    np.testing.assert_array_equal(view.key.data[:, :, -2:], put[layer][0])
                except BaseException as error:
                    errors.append(error)

            threads = [threading.Thread(target=work, args=(layer,)) for layer in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert not errors, errors[0]
            cache.advance()
            for layer in range(4):
                update(plain, layer, *put[layer], n_new=[2, 1])
            plain.advance()
        assert cache.seq_lens == [40, 20]
        assert_same(contents(cache), contents(plain))


@both
class TestBounds:
    def test_a_full_cache_names_max_seq_len_also_when_only_one_row_is_full(self, make):
        cache = make(max_seq_len=10)
        assert cache.capacity == 10
        run(cache, *tokens(9), n_new=[9, 5])
        before = contents(cache)
        with pytest.raises(ValueError) as error:
            cache.update(0, *tokens(2))
        for number in ("max_seq_len=10", "9", "2", "1"):
            assert number in str(error.value)
        assert_same(contents(cache), before)
        run(cache, *tokens(2), n_new=[1, 2])
        assert cache.seq_lens == [10, 7]

    def test_without_a_bound_there_is_none(self, make):
        cache = make()
        assert cache.capacity is None and cache.max_seq_len is None
        for _ in range(4):
            run(cache, *tokens(50))
        assert cache.seq_lens == [200, 200] and cache.residents().shape == (B, SLOTS)

    @pytest.mark.parametrize("bad", [
        np.ones((2, 2, 1, 4), bool), np.full((2, 2, 1, 4), np.nan), np.full((2, 2, 1, 4), 1e300), [[1], [1, 2]], 1.0,
        {}, np.zeros((1, 2, 1, 4)), np.zeros((2, 2, 1, 3)), np.zeros((2, 3, 1, 4)), np.zeros((2, 2, 0, 4)),
    ], ids=repr)
    def test_what_is_no_finite_number_of_the_right_shape_is_refused(self, make, bad):
        cache, good = make(), np.ones((B, H, 1, D), np.float32)
        run(cache, good, good)
        before = contents(cache)
        for pair in ((bad, good), (good, bad)):
            with pytest.raises(ValueError):
                cache.update(0, *pair)
        assert cache.pending_layers == []
        assert_same(contents(cache), before)

    @pytest.mark.parametrize("layer", [-1, L, True, "0", 1.0, None])
    def test_a_layer_is_a_whole_number_in_range(self, make, layer):
        cache = make()
        for call in (lambda: cache.update(layer, *tokens(1)), lambda: cache.get(layer), lambda: cache.residents(layer)):
            with pytest.raises(ValueError, match="layer_idx"):
                call()

    @pytest.mark.parametrize("call", [
        lambda c: c.update(0, tokens(2)[0], tokens(3)[0]), lambda c: c.update(0, *tokens(2), n_new=[3, 0]),
        lambda c: c.update(0, *tokens(2), n_new=[1]), lambda c: c.update(0, *tokens(2), n_new=[-1, 0]),
        lambda c: c.rollback(4), lambda c: c.truncate([4, 0]), lambda c: c.rollback(1.0), lambda c: c.reorder([0, 2]),
        lambda c: c.reorder([0]), lambda c: c.positions([1]),
    ])
    def test_numbers_that_make_no_sense_are_refused(self, make, call):
        cache = make()
        run(cache, *tokens(3))
        before = contents(cache)
        with pytest.raises(ValueError):
            call(cache)
        assert_same(contents(cache), before)

    @pytest.mark.parametrize("size", ["batch_size", "max_seq_len", "num_layers", "num_heads", "head_dim"])
    @pytest.mark.parametrize("value", [0, -1, 1.5, "2", True])
    def test_a_size_is_a_size(self, make, size, value):
        sizes = dict(batch_size=1, max_seq_len=4, num_layers=1, num_heads=1, head_dim=1)
        kind, own = (SlidingWindowKVCache, {"window": 2}) if make is window else (HeavyHitterKVCache, {"budget": 2})
        with pytest.raises(ValueError, match=size):
            kind(**{**sizes, size: value}, **own)
        with pytest.raises(ValueError, match="dtype"):
            kind(**sizes, **own, dtype=np.int32)
        with pytest.raises(ValueError, match=next(iter(own))):
            kind(**sizes, **dict.fromkeys(own, value))


@both
class TestRowsAndCopies:
    def test_rows_have_lengths_of_their_own(self, make):
        cache, (k, v), (k2, v2) = make(), tokens(3), tokens(2, seed=1)
        run(cache, k, v, n_new=[3, 0])
        run(cache, k2, v2, n_new=[0, 2])
        assert cache.seq_lens == [3, 2] and cache.seq_pos == 3
        assert cache.positions([2, 1], 2).tolist() == [[3, 4], [2, -1]]
        assert cache.residents().tolist() == [[0, 1, 2], [0, 1, -1]]
        key, value = cache.get(0)
        for part, old, new in ((key, k, k2), (value, v, v2)):
            assert part.shape == (B, H, 3, D)
            np.testing.assert_array_equal(part.data[0], old[0])
            np.testing.assert_array_equal(part.data[1, :, :2], new[1])
            assert not part.data[1, :, 2:].any()
        view = update(cache, 0, k2, v2, n_new=[2, 1])
        assert view.pos.tolist() == [[0, 1, 2, 3, 4], [0, 1, -1, 2, -1]]

    def test_a_chunk_may_hold_nothing_at_all(self, make):
        cache = make()
        run(cache, *tokens(3), n_new=[0, 0])
        assert cache.seq_lens == [0, 0] and cache.get(0)[0].shape == (B, H, 0, D)
        run(cache, *tokens(1))
        assert cache.residents().tolist() == [[0], [0]]

    def test_reorder(self, make):
        cache = make()
        run(cache, *tokens(12), n_new=[12, 3])
        before = contents(cache)
        cache.reorder([1, 0])
        lengths, *arrays = contents(cache)
        assert lengths.tolist() == [3, 12]
        for got, old in zip(arrays, before[1:]):
            np.testing.assert_array_equal(got, old[[1, 0]])
        cache.reorder([0, 0])
        assert cache.seq_lens == [3, 3] and cache.residents().tolist() == [[0, 1, 2]] * 2
        run(cache, *tokens(1, seed=2), n_new=[1, 0])
        assert cache.residents().tolist() == [[0, 1, 2, 3], [0, 1, 2, -1]], "rows that were one are two again"

    @pytest.mark.parametrize("copied", [lambda cache: cache.clone(), copy.copy, copy.deepcopy])
    def test_copies_are_equal_and_independent(self, make, copied):
        tracker = MemoryTracker()
        cache = make(dtype=np.float16, strict=True, tracker=tracker, max_seq_len=100)
        run(cache, *tokens(20))
        cache.update(0, *tokens(1))
        twin = copied(cache)
        assert type(twin) is type(cache) and repr(twin) == repr(cache) and twin.strict and twin.pending_layers == []
        assert twin._options() == cache._options() and tracker.current == 2 * cache.nbytes
        cache.abandon()
        assert_same(contents(twin), contents(cache))
        before = contents(cache)
        run(twin, *tokens(2, seed=1))
        twin.reset()
        assert_same(contents(cache), before)
        other = copied(cache)
        for each in (cache, other):
            run(each, *tokens(3, seed=2))
        assert_same(contents(cache), contents(other))

    def test_reset_leaves_nothing(self, make):
        cache = make()
        run(cache, *tokens(30))
        cache.update(0, *tokens(1))
        cache.reset()
        assert cache.seq_lens == [0, 0] and cache.pending_layers == [] and cache.get_memory_usage()["used_bytes"] == 0
        assert not cache._store.any() and cache.get(1)[0].shape == (B, H, 0, D)
        fresh = make()
        for each in (cache, fresh):
            run(each, *tokens(11, seed=4), n_new=[11, 2])
        assert_same(contents(cache), contents(fresh))

    def test_everything_can_be_forgotten(self, make):
        cache, fresh = make(), make()
        run(cache, *tokens(30))
        cache.truncate(0)
        assert cache.seq_lens == [0, 0] and not cache._store.any()
        for each in (cache, fresh):
            run(each, *tokens(11, seed=4))
        assert_same(contents(cache), contents(fresh))

    def test_nothing_handed_out_or_passed_in_is_a_handle_on_the_cache(self, make):
        cache, n_new, (k, v) = make(), [2, 1], tokens(2)
        run(cache, k, v, n_new)
        before = contents(cache)
        n_new[0] = k[...] = v[...] = 7
        cache.get(0)[0].data[...] = cache.residents()[...] = 9
        cache.seq_lens[0] = 5
        chunk, values = tokens(1, seed=3)
        view = update(cache, 0, chunk, values)
        view.key.data[...] = view.value.data[...] = view.pos[...] = 9
        chunk[...] = values[...] = 9
        assert_same(contents(cache), before)
        update(cache, 1, *tokens(1, seed=3))
        cache.advance()
        np.testing.assert_array_equal(cache.get(0)[0].data[0, :, -1], tokens(1, seed=3)[0][0, :, 0])


@both
class TestMemory:
    def test_the_bytes_are_the_predicted_ones_for_ever(self, make):
        cache = make()
        expected = 2 * L * B * H * SLOTS * D * 4
        assert cache.config == KVCacheConfig(L, SLOTS, H, D, B, np.float32)
        for count in (0, 60, 6000):
            if count:
                run(cache, *tokens(count))
            usage = cache.get_memory_usage()
            assert cache.nbytes == usage["total_bytes"] == cache.config.calculate_size() == expected
            assert usage["used_bytes"] == (expected if count else 0) and usage["cache_tensors"] == 2 * L
            assert usage["bookkeeping_bytes"] == L * B * SLOTS * (8 if make is window else 16)
        assert cache._pending == {} and cache.seq_lens == [6060, 6060]

    def test_used_bytes_follow_the_tokens_that_are_there(self, make):
        cache = make()
        run(cache, *tokens(3), n_new=[3, 1])
        assert cache.get_memory_usage()["used_bytes"] == 4 * 2 * L * H * D * 4

    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
    def test_everything_has_the_storage_dtype_and_any_number_is_cast(self, make, dtype):
        cache, numbers = make(dtype=dtype), np.arange(16).reshape(2, 2, 1, 4)
        view = update(cache, 0, numbers, Tensor(numbers.astype(np.float32)))
        update(cache, 1, numbers.astype(np.float64), numbers)
        cache.advance()
        for part in (view.key, view.value, *cache.get(0), *cache.get(1)):
            assert part.dtype == dtype and not part.requires_grad
        np.testing.assert_array_equal(cache.get(1)[0].data, numbers)

    def test_a_tracker_counts_and_close_gives_back_once(self, make):
        size = make().nbytes
        tracker = MemoryTracker(limit_bytes=size)
        with make(tracker=tracker) as cache:
            run(cache, *tokens(3))
            cache.update(0, *tokens(1))
            assert tracker.by_purpose == {"kv_cache": size}
            with pytest.raises(MemoryError):
                make(tracker=tracker)
            cache.close()
        assert tracker.current == 0 and cache.nbytes == 0 and cache._pending == {}
        with pytest.raises(ValueError, match="max_seq_len"):
            cache.update(0, *tokens(1))

    def test_from_config_takes_the_bound_and_the_own_options(self, make):
        own = {"window": 3} if make is window else {"budget": 3}
        cache = type(make()).from_config(KVCacheConfig(3, 50, 2, 4, 2, np.float16), **own)
        assert (cache.capacity, cache.num_layers, cache.dtype) == (50, 3, np.float16)
        assert cache.nbytes == 2 * 3 * 2 * 2 * 3 * 4 * 2


@both
def test_a_model_takes_it_by_the_factory_and_an_existing_one_too(make):
    model = random_gpt(embed_dim=2 * H * D, num_layers=L)
    kind, own = (SlidingWindowKVCache, {"window": 64}) if make is window else (HeavyHitterKVCache, {"budget": 64})
    plain = model.generate([1, 2, 3], 20)
    cache = enable_kv_cache(model, factory=kind, **own)
    assert model._kv_cache is cache and type(cache) is kind and cache.capacity == 64
    assert model.generate([1, 2, 3], 20) == plain and cache.seq_lens == [22]
    mine = make(batch_size=1)
    assert enable_kv_cache(model, cache=mine) is mine
    model.generate([1, 2, 3], 20)
    assert mine.seq_lens == [22] and mine.residents().shape == (1, SLOTS)

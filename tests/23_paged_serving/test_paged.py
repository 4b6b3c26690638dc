"""Lesson 23, the paged cache. Oracles: tables written out by hand, plain lists, the same model without a cache."""

import copy
import itertools

import numpy as np
import pytest

from tinytorch.core.attention import visible_mask
from tinytorch.core.autograd import no_grad
from tinytorch.core.tensor import Tensor
from tinytorch.generation import paged
from tinytorch.generation.kv_cache import (
    CacheStateError,
    KVCache,
    MemoryTracker,
    disable_kv_cache,
    enable_kv_cache,
    prefill,
    random_gpt,
)
from tinytorch.generation.paged import (
    BlockStore,
    BlockTables,
    OutOfBlocks,
    PagedKVCache,
    PagedModelKVCache,
    PagedRows,
    blocks_needed,
    gather,
    must_copy,
    paged_kv_cache,
    slots_of,
)


def append(tables, seq, tokens, named=True):
    """One pass of the bookkeeping; the copies that it asked for."""
    pairs = tables.reserve(seq, len(tokens))
    tables.commit(seq, len(tokens), tokens if named else None)
    return pairs


def state_of(tables):
    """Everything that a refused call must leave alone."""
    blocks = tables.blocks
    return copy.deepcopy((tables._sequences, blocks.counts, list(blocks.free), blocks.labels, blocks.named))


def tables_with(*texts, num_blocks=12, block_size=2, max_seqs=6):
    """Tables in which each text was run; and the ids."""
    tables, seqs = BlockTables(num_blocks, block_size, max_seqs), []
    for text in texts:
        seqs.append(tables.add_sequence(text))
        append(tables, seqs[-1], text[tables.length(seqs[-1]) :])
    return tables, *seqs


def numbers(seq_len, num_heads=2, head_dim=3, seed=0):
    """Keys and values (H, T, D)."""
    return np.random.default_rng(seed).standard_normal((2, num_heads, seq_len, head_dim), dtype=np.float32)


def test_arithmetic_at_the_edges():
    assert [blocks_needed(length, 16) for length in (0, 1, 15, 16, 17, 32)] == [0, 1, 1, 1, 2, 2]
    assert slots_of([3, 0], 0, 4, 2).tolist() == [6, 7, 0, 1] and slots_of([], 0, 0, 2).tolist() == []
    for holders in range(1, 5):
        assert must_copy([9] * holders, {9: holders}) == [True] * (holders - 1) + [False]
        assert must_copy([9] * holders, {9: holders + 1}) == [True] * holders
    assert gather(np.zeros((2, 3, 2, 1)), np.zeros((2, 0), int)).shape == (2, 2, 0, 1)


class TestSequences:
    def test_ids_are_never_used_twice_and_stale_or_unknown_ones_raise(self):
        tables, seen = BlockTables(4, 2, 2), set()
        for _ in range(20):
            first = tables.add_sequence()
            second = tables.fork(first)
            seen |= {first, second}
            with pytest.raises(ValueError, match="max_seqs=2"):
                tables.add_sequence()
            with pytest.raises(ValueError, match="max_seqs=2"):
                tables.fork(first)
            tables.finish_sequence(first), tables.finish_sequence(second)
        assert len(seen) == 40 and tables.sequences() == []
        for bad in (first, 1000, -1, True, 1.0, "0", None):
            for call in (tables.length, tables.table, tables.fork, tables.finish_sequence, tables.release,
                         lambda seq: tables.truncate(seq, 0), lambda seq: tables.reserve(seq, 1),
                         lambda seq: tables.commit(seq, 1)):
                with pytest.raises(ValueError, match="seq"):
                    call(bad)

    @pytest.mark.parametrize("block_size", [1, 2, 5])
    def test_five_hundred_rounds_of_add_fork_finish_end_with_every_block_free(self, block_size):
        tables, rng = BlockTables(60, block_size, 3), np.random.default_rng(block_size)
        for _ in range(500):
            prompt = rng.integers(0, 2, rng.integers(1, 10)).tolist()
            seq = tables.add_sequence(prompt)
            append(tables, seq, prompt[tables.length(seq) :])
            fork = tables.fork(seq)
            append(tables, rng.choice([seq, fork]).item(), rng.integers(0, 2, 3).tolist())
            for each in rng.permutation([seq, fork]).tolist():
                tables.finish_sequence(each)
        assert tables.num_free() == 60 and sorted(tables.blocks.free) == list(range(60))
        assert not any(tables.blocks.counts)

    def test_sizes_are_sizes(self):
        for bad in (0, -1, 1.0, True, "4", None):
            with pytest.raises(ValueError, match="block_size"):
                BlockTables(4, bad, 2)
            with pytest.raises(ValueError, match="max_seqs"):
                BlockTables(4, 2, bad)
            for name in ("num_blocks", "block_size", "num_heads", "head_dim", "max_seqs"):
                with pytest.raises(ValueError, match=name):
                    PagedKVCache(**{**dict(num_blocks=4, block_size=2, num_heads=1, head_dim=1, max_seqs=1), name: bad})

    def test_a_table_has_ceil_blocks_also_when_cut(self):
        tables, seq = tables_with([1, 2, 3, 4, 5], block_size=2)
        for length, blocks in ((5, 3), (4, 2), (3, 2), (2, 1), (1, 1), (0, 0)):
            tables.truncate(seq, length)
            assert tables.length(seq) == length and len(tables.table(seq)) == blocks
        with pytest.raises(ValueError, match="cannot be cut to 1"):
            tables.truncate(seq, 1)
        with pytest.raises(ValueError, match="length"):
            tables.truncate(seq, -1)

    def test_what_is_handed_out_is_no_handle(self):
        tables, seq = tables_with([1, 2, 3])
        tables.table(seq).clear(), tables.sequences().clear()
        assert tables.table(seq) == [0, 1] and tables.sequences() == [seq]


class TestCopyOnWrite:
    def test_two_who_share_a_block_in_part_make_exactly_one_copy_in_one_pass_or_in_two(self):
        for together in (True, False):
            tables, first = tables_with([1, 2, 3], block_size=2)
            second = tables.fork(first)
            if together:
                pairs = tables.reserve_all([first, second], [1, 1])
                tables.commit(first, 1, [4]), tables.commit(second, 1, [5])
            else:
                pairs = append(tables, first, [4]) + append(tables, second, [5])
            assert pairs == [(1, 2)]
            assert (tables.table(first), tables.table(second)) == ([0, 2], [0, 1])
            assert tables.blocks.counts[:4] == [2, 1, 1, 0]

    def test_a_full_block_is_never_copied_and_a_pass_without_tokens_neither(self):
        tables, first = tables_with([1, 2], block_size=2)
        second = tables.fork(first)
        assert append(tables, second, [3]) == [] and tables.table(second) == [0, 1]
        third = tables.fork(second)
        assert tables.reserve(third, 0) == []
        tables.commit(third, 0)
        assert tables.table(third) == [0, 1] and tables.blocks_for([third], [1]) == 1

    def test_whoever_drops_its_copy_is_back_where_it_was_also_when_the_other_wrote_or_left(self):
        for other_leaves in (True, False):
            tables, first = tables_with([1, 2, 3], block_size=2)
            second = tables.fork(first)
            assert tables.reserve(first, 1) == [(1, 2)]
            assert append(tables, second, [9]) == [(1, 3)]  # the first holds 1 until its commit: its pass may fail
            if other_leaves:
                tables.finish_sequence(second)
            tables.release(first)
            assert tables.table(first) == [0, 1] and tables.num_free() == (10 if other_leaves else 9)
            assert append(tables, first, [4]) == []  # it is alone now
            assert tables.length(tables.add_sequence([1, 2, 3, 4, 5])) == 4
            assert tables.length(tables.add_sequence([1, 2, 3, 9, 5])) == 4
            assert tables.table(first) == [0, 1] and tables.blocks.counts[2] == 0

    def test_a_fork_taken_while_a_pass_is_open_has_what_is_committed(self):
        tables, first = tables_with([1, 2, 3], block_size=2)
        tables.reserve(first, 3)
        second = tables.fork(first)
        assert tables.length(second) == 3 and tables.table(second) == [0, 1]
        tables.commit(first, 3, [4, 5, 6])
        assert append(tables, second, [7]) == [(1, 3)]


class TestPasses:
    def test_what_does_not_fit_changes_nothing_and_says_what_is_missing(self):
        tables, first = tables_with([1, 2, 3, 4, 5], num_blocks=6, block_size=2)
        second, before = tables.fork(first), state_of(tables)
        with pytest.raises(OutOfBlocks, match=r"need 4 blocks, 3 of num_blocks=6 are free: finish or truncate"):
            tables.reserve_all([first, second], [4, 2])  # 2 new; 1 copy and 1 new
        assert state_of(tables) == before and tables.blocks_for([first, second], [4, 2]) == 4
        assert issubclass(OutOfBlocks, ValueError) and not issubclass(OutOfBlocks, CacheStateError)
        for counts in ([1, -1], [1, 1.0], [1], [True, 1]):
            with pytest.raises(ValueError, match="n must be|named once"):
                tables.reserve_all([first, second], counts)
        with pytest.raises(ValueError, match="named once"):
            tables.reserve_all([first, first], [1, 1])
        assert state_of(tables) == before
        assert tables.reserve_all([first, second], [2, 2]) == [(2, 3)]  # 3 blocks, exactly what is free
        for seq in (first, second, first):
            tables.release(seq)
        assert (tables.table(first), tables.table(second), tables.num_free()) == ([0, 1, 2], [0, 1, 2], 3)

    def test_an_open_pass_is_committed_or_released_before_anything_else(self):
        tables, seq = tables_with([1, 2, 3])
        tables.reserve(seq, 2)
        before = state_of(tables)
        for call in (lambda: tables.reserve(seq, 1), lambda: tables.truncate(seq, 0),
                     lambda: tables.finish_sequence(seq), lambda: tables.commit(seq, 1)):
            with pytest.raises(CacheStateError, match=f"sequence {seq}"):
                call()
        for tokens in ([4], [4, 5, 6], [4.0, 5.0], ["a", "b"], [-1, 2], [[4, 5]], [True, False]):
            with pytest.raises(ValueError, match="tokens"):
                tables.commit(seq, 2, tokens)
        assert state_of(tables) == before and tables.table(seq, pending=True) == [0, 1, 2]
        tables.commit(seq, 2, np.array([4, 5]))
        with pytest.raises(CacheStateError, match="reserve"):
            tables.commit(seq, 1)
        assert tables.length(seq) == 5

    def test_blocks_are_taken_in_the_order_in_which_they_were_freed_the_last_of_a_text_first(self):
        tables, first, second = tables_with([1, 2, 3, 4], [5, 6], num_blocks=4, block_size=2)
        tables.finish_sequence(second), tables.finish_sequence(first)
        assert list(tables.blocks.free) == [3, 2, 1, 0]
        seq = tables.add_sequence()
        append(tables, seq, [7] * 6)
        assert tables.table(seq) == [3, 2, 1]


class TestNames:
    def test_a_text_is_found_in_full_blocks_with_one_token_left(self):
        tables, seq = tables_with([1, 2, 3, 4, 5], block_size=2)
        for prompt, length in (([1, 2, 3, 4, 5], 4), ([1, 2, 3, 4], 2), ([1, 2, 3], 2), ([1, 2], 0), ([1], 0), ([], 0),
                               ([1, 2, 9, 4, 5], 2), ([3, 4, 5], 0), ([1, 2, 3, 4, 5, 6, 7], 4)):
            found = tables.add_sequence(prompt)
            assert tables.length(found) == length, prompt
            assert tables.table(found) == tables.table(seq)[: length // 2]
            tables.finish_sequence(found)

    def test_the_same_tokens_in_another_place_are_another_block(self):
        tables, _ = tables_with([1, 2, 1, 2, 3, 4], block_size=2)
        assert tables.length(tables.add_sequence([3, 4, 5])) == 0
        assert tables.length(tables.add_sequence([1, 2, 3, 4, 5])) == 2

    def test_freed_blocks_are_found_until_they_are_taken(self):
        tables, seq = tables_with([1, 2, 3, 4, 5], num_blocks=4, block_size=2)
        tables.finish_sequence(seq)
        assert tables.num_free() == 4
        again = tables.add_sequence([1, 2, 3, 4, 6])
        assert tables.length(again) == 4 and tables.table(again) == [0, 1] and tables.num_free() == 2
        tables.finish_sequence(again)
        append(tables, tables.add_sequence(), [7] * 6)  # three of four: the first block of the text is left
        assert tables.length(tables.add_sequence([1, 2, 3, 4, 6])) == 2

    def test_what_is_pending_or_released_or_has_no_tokens_is_not_found(self):
        tables = BlockTables(8, 2, 8)
        seq = tables.add_sequence([1, 2, 3])
        tables.reserve(seq, 2)
        assert tables.length(tables.add_sequence([1, 2, 3])) == 0
        tables.release(seq)
        assert tables.length(tables.add_sequence([1, 2, 3])) == 0
        append(tables, seq, [1, 2, 3], named=False)
        append(tables, seq, [4, 5, 6])
        for prompt in ([1, 2, 3, 4, 5], [4, 5, 6]):  # what comes behind unknown tokens has no name either
            assert tables.length(tables.add_sequence(prompt)) == 0
        tables.truncate(seq, 0)
        append(tables, seq, [1, 2, 3, 4])
        append(tables, seq, [5, 6], named=False)
        assert tables.length(tables.add_sequence([1, 2, 3, 4, 5, 6, 7])) == 4

    def test_a_block_that_is_rewritten_is_never_found_under_its_old_name(self):
        tables, seq = tables_with([1, 2, 3, 4, 5], block_size=2)
        tables.truncate(seq, 3)
        assert tables.length(tables.add_sequence([1, 2, 3, 4, 5])) == 4  # it still holds 3 4, and now two hold it
        tables.finish_sequence(1)
        tables.reserve(seq, 1)
        assert tables.length(tables.add_sequence([1, 2, 3, 4, 5])) == 2, "it is being written"
        tables.commit(seq, 1, [9])
        assert tables.length(tables.add_sequence([1, 2, 3, 4, 5])) == 2
        assert tables.length(tables.add_sequence([1, 2, 3, 9, 5])) == 4
        append(tables, seq, [5, 6])
        assert tables.length(tables.add_sequence([1, 2, 3, 9, 5, 6, 7])) == 6, "names go on from the new block"

    def test_a_name_that_another_sequence_gave_goes_when_the_last_holder_writes(self):
        tables, first = tables_with([1, 2, 3, 4], block_size=2)
        second = tables.fork(first)
        tables.truncate(second, 3)
        tables.finish_sequence(first)
        assert append(tables, second, [9]) == [] and tables.table(second) == [0, 1]
        assert tables.length(tables.add_sequence([1, 2, 3, 4, 5])) == 2

    def test_two_who_ran_the_same_prompt_at_the_same_time_keep_their_own_blocks(self):
        tables = BlockTables(8, 2, 4)
        first, second = tables.add_sequence([1, 2, 3]), tables.add_sequence([1, 2, 3])
        append(tables, first, [1, 2, 3]), append(tables, second, [1, 2, 3])
        assert tables.table(first) == [0, 1] and tables.table(second) == [2, 3]
        tables.finish_sequence(first)
        assert tables.table(tables.add_sequence([1, 2, 3])) == [0]

    def test_a_hash_that_lies_finds_nothing_wrong(self, monkeypatch):
        monkeypatch.setattr(paged, "block_name", lambda parent, tokens: f"{parent}.{sum(tokens) % 2}")
        tables, _ = tables_with([1, 2, 3, 4, 5], block_size=2)
        for prompt, length in (([2, 1, 3, 4, 5], 0), ([1, 2, 4, 3, 5], 2), ([1, 2, 3, 4, 9], 4)):
            assert tables.length(tables.add_sequence(prompt)) == length
            append(tables, tables.sequences()[-1], prompt[length:])

    @pytest.mark.parametrize("wrap", [list, tuple, np.array, Tensor])
    def test_tokens_come_in_any_form(self, wrap):
        tables, _ = tables_with([1, 2, 3], block_size=2)
        assert tables.length(tables.add_sequence(wrap([1, 2, 3]))) == 2
        for bad in ([1.5, 2], ["a"], [-1], [[1, 2]], 5, [True]):
            before = state_of(tables)
            with pytest.raises(ValueError, match="tokens"):
                tables.add_sequence(bad)
            assert state_of(tables) == before


class TestOneLayer:
    def test_sequences_are_apart_and_forks_share_until_they_write(self, monkeypatch):
        cache, copies = PagedKVCache(6, 4, 2, 3, max_seqs=3), []
        made = cache.store.copy
        monkeypatch.setattr(cache.store, "copy", lambda pairs: (copies.extend(pairs), made(pairs)))
        (k, v), (k2, v2), (k3, v3) = numbers(6), numbers(1, seed=1), numbers(1, seed=2)
        first = cache.add_sequence()
        cache.update(first, k, v)
        second = cache.fork(first)
        assert cache.num_free() == 4
        cache.update(second, k2, v2), cache.update(first, k3, v3)
        assert copies == [(1, 2)] and cache.num_free() == 3
        for seq, (newest_k, newest_v) in ((first, (k3, v3)), (second, (k2, v2))):
            key, value = cache.get_kv(seq)
            assert key.shape == value.shape == (2, 7, 3) and cache.seq_len(seq) == 7
            np.testing.assert_array_equal(key, np.concatenate([k, newest_k], axis=1))
            np.testing.assert_array_equal(value, np.concatenate([v, newest_v], axis=1))
        assert cache.get_kv(cache.add_sequence())[0].shape == (2, 0, 3)

    def test_an_update_that_does_not_fit_leaves_everything_as_it_was(self):
        cache = PagedKVCache(3, 2, 2, 3, max_seqs=2)
        seq = cache.add_sequence()
        cache.update(seq, *numbers(3), tokens=[1, 2, 3])
        fork = cache.fork(seq)
        before, store = state_of(cache.tables), cache.store.array.copy()
        for count in (2, 4, 100):  # a copy and a block; more
            with pytest.raises(OutOfBlocks, match="num_blocks=3"):
                cache.update(fork, *numbers(count))
        assert state_of(cache.tables) == before
        np.testing.assert_array_equal(cache.store.array, store)
        cache.update(fork, *numbers(1))
        assert cache.seq_len(fork) == 4 and cache.num_free() == 0

    def test_an_interrupt_leaves_everything_as_it_was(self, monkeypatch):
        cache = PagedKVCache(4, 2, 2, 3, max_seqs=2)
        seq = cache.add_sequence()
        cache.update(seq, *numbers(3), tokens=[1, 2, 3])

        def interrupted(*args):
            raise KeyboardInterrupt

        monkeypatch.setattr(BlockStore, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cache.update(seq, *numbers(2))
        monkeypatch.undo()
        assert cache.seq_len(seq) == 3 and cache.num_free() == 2
        cache.update(seq, *numbers(1))
        np.testing.assert_array_equal(cache.get_kv(seq)[0][:, :3], numbers(3)[0])

    @pytest.mark.parametrize("bad", ["nan", "heads", "dim", "rank", "empty", "lengths", "text", "tokens", "ids"])
    def test_refused_input_changes_nothing(self, bad):
        cache = PagedKVCache(4, 2, 2, 3, max_seqs=2)
        seq, (k, v), tokens = cache.add_sequence(), numbers(2), [1, 2]
        cache.update(seq, k, v)
        before, store = state_of(cache.tables), cache.store.array.copy()
        if bad == "nan":
            v[0, 0, 0] = np.nan
        k = {"heads": k[:1], "dim": k[..., :2], "rank": k[None], "empty": k[:, :0], "lengths": k[:, :1],
             "text": k.astype(str)}.get(bad, k)
        tokens = {"tokens": [], "ids": [1, -2]}.get(bad, tokens)
        with pytest.raises(ValueError):
            cache.update(seq, k, v, tokens)
        assert state_of(cache.tables) == before
        np.testing.assert_array_equal(cache.store.array, store)

    def test_nothing_that_is_handed_out_or_passed_in_is_a_handle(self):
        cache = PagedKVCache(4, 2, 2, 3, max_seqs=1, dtype=np.float16)
        seq, (k, v) = cache.add_sequence(), np.ones((2, 2, 3, 3), int)
        cache.update(seq, k, Tensor(v.astype(np.float32)))
        k[...] = 7
        for array in cache.get_kv(seq):
            assert array.dtype == np.float16
            array[...] = 9
        assert all((array == 1).all() for array in cache.get_kv(seq))

    def test_bytes(self):
        cache = PagedKVCache(10, 4, 2, 3, max_seqs=2)
        cache.update(cache.add_sequence(), *numbers(5))
        assert cache.nbytes == 2 * 10 * 4 * 2 * 3 * 4
        usage = cache.get_memory_usage()
        assert (usage["total_bytes"], usage["total_mb"], usage["cache_tensors"]) == (1920, 1920 / 2**20, 2)
        assert usage["used_bytes"] == 2 * 192 and usage["free_blocks"] == 8
        cache.close(), cache.close()
        assert cache.nbytes == 0 and cache.num_free() == 0
        with pytest.raises(OutOfBlocks):
            cache.update(cache.add_sequence(), *numbers(1))


# ---- a whole model


def model_pool(num_blocks=20, block_size=4, max_seqs=6, **options):
    return PagedModelKVCache(num_blocks, block_size, 3, 2, 8, max_seqs, **options)


def run(model, rows, ids, n_new=None):
    """One pass of a scheduler: logits (B, T, V)."""
    with no_grad(), rows.attached_to(model, n_new=n_new):
        return model(np.array(ids)).numpy()


def alone(model, text):
    """The logits of a text's last token without a cache."""
    with no_grad():
        return model(np.array([text])).numpy()[0, -1]


def chunk(batch_size, seq_len, seed=0):
    return np.random.default_rng(seed).standard_normal((2, batch_size, 2, seq_len, 8), dtype=np.float32)


class TestRows:
    def test_rows_made_anew_for_every_pass_run_ragged_texts_right(self):
        model, pool, rng = random_gpt(), model_pool(), np.random.default_rng(0)
        texts = {pool.add_sequence(): [] for _ in range(3)}
        for counts in ((5, 0, 3), (1, 4, 1), (1, 1, 1), (0, 2, 6)):
            new = [rng.integers(1, 64, n).tolist() for n in counts]
            ids = np.zeros((3, max(counts)), int)
            for row, tokens in enumerate(new):
                ids[row, : len(tokens)] = tokens
            logits = run(model, pool.rows(list(texts), new), ids, counts)
            for row, (seq, tokens) in enumerate(zip(texts, new)):
                texts[seq] += tokens
                assert pool.seq_len(seq) == len(texts[seq])
                if tokens:
                    np.testing.assert_allclose(logits[row, len(tokens) - 1], alone(model, texts[seq]), atol=1e-4)

    def test_a_found_prefix_is_not_run_again_and_gives_the_same_logits(self):
        model, pool, text = random_gpt(), model_pool(), list(range(1, 12))
        first = pool.add_sequence(text)
        run(model, pool.rows([first], [text]), [text])
        second = pool.add_sequence(text)
        assert pool.seq_len(second) == 8 and pool.tables.table(second) == pool.tables.table(first)[:2]
        logits = run(model, pool.rows([second], [text[8:]]), [text[8:]])
        np.testing.assert_allclose(logits[0, -1], alone(model, text), atol=1e-4)

    def test_a_prompt_in_chunks_gets_the_same_names(self):
        model, pool, text = random_gpt(), model_pool(), list(range(1, 12))
        seq = pool.add_sequence(text)
        for start in range(0, 11, 3):
            piece = text[start : start + 3]
            run(model, pool.rows([seq], [piece]), [piece])
        assert pool.seq_len(pool.add_sequence(text)) == 8

    def test_a_pass_takes_the_blocks_of_all_rows_or_of_none_and_a_failed_one_gives_them_back(self):
        model, pool = random_gpt(), model_pool(num_blocks=5)
        seqs = [pool.add_sequence() for _ in range(2)]
        run(model, pool.rows(seqs), [[1, 2, 3], [4, 5, 6]])
        before = state_of(pool.tables)
        with pytest.raises(OutOfBlocks, match="need 4 blocks, 3 of num_blocks=5"):
            run(model, pool.rows(seqs), np.ones((2, 9), int), [9, 9])
        assert state_of(pool.tables) == before
        healthy, model.blocks[2].mlp = model.blocks[2].mlp, None
        with pytest.raises(TypeError):
            run(model, pool.rows(seqs), [[7] * 3, [8] * 3])
        model.blocks[2].mlp = healthy
        assert pool.num_free() == 3 and [pool.seq_len(seq) for seq in seqs] == [3, 3]
        logits = run(model, pool.rows(seqs), [[7], [8]])
        np.testing.assert_allclose(logits[1, 0], alone(model, [4, 5, 6, 8]), atol=1e-4)

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_attention_in_the_pool_s_buffer_is_attention_over_what_the_view_shows(self, dtype):
        """Loops in float64; rows of different length, two query heads per key head, a buffer that larger rows used."""
        cache = paged_kv_cache(2, 24, 2, 2, 8, block_size=2, dtype=dtype)
        k, v = chunk(2, 7)
        for layer in range(2):
            cache.update(layer, k, v, n_new=[7, 2])
        cache.advance()
        query = np.random.default_rng(2).standard_normal((2, 4, 3, 8)).astype(dtype)
        k2, v2 = chunk(2, 3, seed=1)
        key, value, pos = cache.update(0, k2, v2)
        visible = visible_mask(cache.positions(3), pos)
        got = cache.attend(Tensor(query, dtype=dtype), key, value, visible)
        keys, values = key.data, value.data
        assert got.shape == (2, 4, 3, 8) and got.dtype == dtype and keys.shape == (2, 2, 10, 8)
        for row, stored in enumerate((7, 2)):
            expected = np.concatenate([k[row, :, :stored], k2[row]], axis=1)
            np.testing.assert_array_equal(keys[row, :, : stored + 3], expected.astype(dtype))
            assert not keys[row, :, stored + 3 :].any()
            for head, t in np.ndindex(4, 3):
                shown = stored + t + 1
                scores = keys[row, head // 2, :shown].astype(float) @ query[row, head, t] / np.sqrt(8)
                weights = np.exp(scores - scores.max())
                expected = weights @ values[row, head // 2, :shown] / weights.sum()
                np.testing.assert_allclose(got.data[row, head, t], expected, rtol=1e-5, atol=1e-6)
        again = cache.attend(Tensor(query, dtype=dtype), key, value, visible)
        np.testing.assert_array_equal(again.data, got.data)
        assert np.shares_memory(cache.pool.buffer.shaped((5,)), cache.pool.buffer.shaped((9,)))

    def test_an_interrupt_after_the_bytes_were_written_changes_nothing(self, monkeypatch):
        cache = paged_kv_cache(2, 8, 2, 2, 8, block_size=2)
        k, v = chunk(2, 3)
        for layer in range(2):
            cache.update(layer, k, v, n_new=[3, 1])
        cache.advance()
        before = [part.data.copy() for part in cache.get(0)]

        def interrupted(*args):
            raise KeyboardInterrupt

        monkeypatch.setattr(PagedRows, "_through", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cache.update(0, *chunk(2, 2, seed=1))
        monkeypatch.undo()
        assert cache.seq_lens == [3, 1] and all(np.array_equal(a.data, b) for a, b in zip(cache.get(0), before))
        cache.abandon()
        assert cache.pool.num_free() == 8 - 3

    def test_protocol_errors_and_a_skipped_layer_that_reads_zeros_where_others_wrote_before(self):
        cache, (k, v) = paged_kv_cache(1, 4, 2, 2, 8, block_size=2), chunk(1, 3)
        with pytest.raises(CacheStateError, match="nothing pending"):
            cache.advance()
        for layer in range(2):
            cache.update(layer, k, v)
        with pytest.raises(CacheStateError, match="twice"):
            cache.update(1, k, v)
        cache.advance()
        cache.reset()
        cache.update(0, k, v)
        with pytest.raises(CacheStateError, match="disagree"):
            cache.update(1, k[:, :, :2], v[:, :, :2])
        cache.advance()
        assert not cache.get(1)[0].data.any() and not cache.get(1)[1].data.any() and cache.get(1)[0].shape[2] == 3
        np.testing.assert_array_equal(cache.get(0)[0].data, k)
        with pytest.raises(ValueError, match=r"max_seq_len=4.* 2 more .* 1 are free"):
            cache.update(0, k[:, :, :2], v[:, :, :2])
        strict = paged_kv_cache(1, 4, 2, 2, 8, strict=True)
        strict.update(0, k, v)
        with pytest.raises(CacheStateError, match="strict"):
            strict.advance()

    def test_views_are_read_only_padded_with_zeros_and_stay_what_they_were(self):
        cache, (k, v) = paged_kv_cache(2, 6, 1, 2, 8, block_size=2), chunk(2, 3)
        cache.update(0, k, v)
        cache.advance()
        cache.rollback([0, 2])
        view = cache.update(0, *chunk(2, 1, seed=1))
        assert view.pos.tolist() == [[0, 1, 2, 3], [0, 1, -1, -1]] and view.key.shape == (2, 2, 4, 8)
        kept = view.key.data.copy()
        assert not kept[1, :, 2:].any() and not view.value.data[1, :, 2:].any()
        for part in (*view[:2], *cache.get(0)):
            with pytest.raises(ValueError, match="read-only"):
                part.data[...] = 0
        with pytest.raises(ValueError, match="read-only"):
            view.pos[...] = 0  # all layers share it
        cache.advance()
        cache.reset()
        cache.update(0, *chunk(2, 4, seed=2))
        np.testing.assert_array_equal(view.key.data, kept)

    def test_a_batch_names_live_sequences_once_and_the_tokens_of_its_pass(self):
        pool, (k, v) = model_pool(), chunk(2, 2)
        seqs = [pool.add_sequence() for _ in range(2)]
        for bad in ([], [seqs[0], seqs[0]], [seqs[0], 99]):
            with pytest.raises(ValueError, match="sequence"):
                pool.rows(bad)
        for tokens in ([[1, 2], [3]], [[1, 2, 3], [4, 5]], [[1, -2], [3, 4]], [["a", "b"], [1, 2]]):
            with pytest.raises(ValueError, match="tokens"):
                pool.rows(seqs, tokens).update(0, k, v)
        assert pool.num_free() == 20
        rows = pool.rows(seqs, [[1, 2], [3]])
        for layer in range(3):
            rows.update(layer, k, v, n_new=[2, 1])
        rows.advance()
        assert rows.tokens is None and rows.seq_lens == [2, 1]

    def test_another_batch_cannot_open_a_pass_of_the_same_sequence(self):
        pool, (k, v) = model_pool(), chunk(1, 2)
        seq = pool.add_sequence()
        rows = pool.rows([seq])
        rows.update(0, k, v)
        for call in (lambda: pool.rows([seq]).update(0, k, v), lambda: pool.truncate(seq, 0),
                     lambda: pool.finish_sequence(seq)):
            with pytest.raises(CacheStateError, match="open pass"):
                call()
        pool.rows([seq]).abandon()  # not its own
        for layer in (1, 2):
            rows.update(layer, k, v)
        rows.advance()
        assert pool.seq_len(seq) == 2
        pool.truncate(seq, 1)
        assert rows.seq_lens == [1] and rows.positions(1).tolist() == [[1]]

    def test_beams_reorder_by_forks_and_in_a_full_set_of_sequences(self):
        model, pool = random_gpt(), model_pool(max_seqs=3)
        seqs = [pool.add_sequence() for _ in range(3)]
        beams, texts = pool.rows(seqs), [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10], [11, 12, 13, 14, 15]]
        run(model, beams, texts)
        for order in ([2, 0, 2], [1, 1, 1], [0, 1, 2]):
            beams.reorder(order)
            texts = [[*texts[row], 20 + place] for place, row in enumerate(order)]
            logits = run(model, beams, [[text[-1]] for text in texts])
            for row, text in enumerate(texts):
                np.testing.assert_allclose(logits[row, 0], alone(model, text), atol=1e-4)
        assert sorted(beams.seqs) == pool.tables.sequences() and seqs != beams.seqs
        beams.close(), beams.close()
        assert pool.num_free() == 20

    @pytest.mark.parametrize("own", [True, False])
    @pytest.mark.parametrize("copied", [PagedRows.clone, copy.copy, copy.deepcopy])
    def test_copies_are_independent(self, own, copied):
        model, pool = random_gpt(), model_pool()
        rows = paged_kv_cache(1, 12, 3, 2, 8, block_size=4) if own else pool.rows([pool.add_sequence()])
        run(model, rows, [[1, 2, 3, 4, 5]])
        twin = copied(rows)
        assert (twin.pool is rows.pool) is not own
        ends = itertools.product((rows, twin), (7, 8))
        assert [each.seq_lens for each in (rows, twin)] == [[5], [5]]
        for each, token in ends:
            logits = run(model, each, [[token]])
            np.testing.assert_allclose(logits[0, 0], alone(model, [1, 2, 3, 4, 5, token]), atol=1e-4)
            each.rollback(1)
        twin.close()
        assert rows.seq_lens == [5] and rows.get(0)[0].shape == (1, 2, 5, 8)

    def test_a_copy_for_which_too_few_sequences_are_allowed_changes_nothing(self):
        pool = model_pool(max_seqs=3)
        rows = pool.rows([pool.add_sequence(), pool.add_sequence()])
        with pytest.raises(ValueError, match="max_seqs=3"):
            rows.clone()
        assert pool.tables.sequences() == rows.seqs

    def test_a_copy_made_in_an_open_pass_has_what_is_committed(self):
        rows, (k, v) = paged_kv_cache(1, 8, 1, 2, 8, block_size=2), chunk(1, 3)
        rows.update(0, k, v)
        rows.advance()
        rows.update(0, k, v)
        twin = rows.clone()
        assert twin.seq_lens == [3] and twin.pending_layers == [] and twin.pool.num_free() == 2
        rows.advance()
        twin.update(0, -k, -v)
        twin.advance()
        np.testing.assert_array_equal(rows.get(0)[0].data[:, :, 3:], k)
        np.testing.assert_array_equal(twin.get(0)[0].data[:, :, 3:], -k)

    def test_memory_is_tracked_and_given_back_once(self):
        tracker = MemoryTracker()
        with paged_kv_cache(2, 10, 3, 2, 8, block_size=4, tracker=tracker) as cache:
            assert cache.nbytes == 2 * 3 * 2 * 8 * (6 * 4) * 4 == tracker.by_purpose["kv_cache"]
            assert cache.get_memory_usage()["cache_tensors"] == 6 and cache.capacity == 10
        cache.close()
        assert tracker.current == 0 and cache.nbytes == 0 and cache.capacity == 0
        with pytest.raises(ValueError, match="max_seq_len=0"):
            cache.update(0, *chunk(2, 1))
        with pytest.raises(MemoryError):
            paged_kv_cache(2, 10, 3, 2, 8, tracker=MemoryTracker(limit_bytes=1000))
        with pytest.raises(MemoryError):
            paged_kv_cache(1, 2**20, 2**10, 2**10, 2**10, tracker=tracker)
        model = random_gpt()
        model.blocks[1].attention.causal = False
        with pytest.raises(ValueError, match="causal"):
            enable_kv_cache(model, factory=paged_kv_cache, tracker=tracker)
        assert tracker.current == 0


class TestInAModel:
    @pytest.mark.parametrize("block_size", [1, 3, 16])
    def test_generate_equals_the_contiguous_cache_and_can_be_taken_out(self, block_size):
        model, ids = random_gpt(), np.random.default_rng(1).integers(0, 64, (2, 7))
        plain, ragged = model.generate(ids, 20), model.generate([[1, 2, 3, 4, 5, 6], [7, 8]], 9)
        cache = enable_kv_cache(model, factory=paged_kv_cache, batch_size=2, block_size=block_size)
        for _ in range(2):
            np.testing.assert_array_equal(model.generate(ids, 20), plain)
            assert cache.seq_lens == [26, 26]
        assert model.generate([[1, 2, 3, 4, 5, 6], [7, 8]], 9) == ragged
        disable_kv_cache(model)
        other = paged_kv_cache(2, 26, 3, 2, 8, block_size=block_size)
        np.testing.assert_array_equal(model.generate(ids, 20, cache=other), plain)
        with pytest.raises(ValueError, match="26"):
            model.generate(ids, 21, cache=other)

    def test_a_pool_that_runs_out_ends_the_pass_and_keeps_what_was_stored(self):
        model = random_gpt()
        cache = enable_kv_cache(model, factory=paged_kv_cache, block_size=4, num_blocks=2)
        with pytest.raises(OutOfBlocks):
            model.generate([1, 2, 3, 4, 5], 10)
        assert cache.seq_lens == [8] and cache.pending_layers == []

    def test_training_mode_leaves_the_pool_alone(self):
        model, pool = random_gpt().train(), model_pool()
        rows = pool.rows([pool.add_sequence()])
        with rows.attached_to(model):
            model(np.array([[1, 2, 3]]))
        assert rows.seq_lens == [0] and pool.num_free() == 20

    def test_prefill_in_chunks_equals_one_pass_and_the_contiguous_cache(self):
        model, ids = random_gpt(), np.random.default_rng(2).integers(0, 64, (3, 13))
        expected = prefill(model, ids, KVCache(3, 64, 3, 2, 8), n_new=[13, 1, 6]).numpy()
        for size, block_size in itertools.product((1, 4, 13), (1, 5, 16)):
            cache = paged_kv_cache(3, 13, 3, 2, 8, block_size=block_size)
            got = prefill(model, ids, cache, chunk=size, n_new=[13, 1, 6]).numpy()
            for row, length in enumerate((13, 1, 6)):
                np.testing.assert_allclose(got[row, :length], expected[row, :length], atol=1e-4)

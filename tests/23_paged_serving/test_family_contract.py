"""One contract for the whole family of caches: each sentence, for each member; and wrong members, which it must catch.

Oracles: for each layer and row a plain list of tokens, and a GPT in float64 under an explicit mask. No member is ever
compared with another one. What only one member does is tested beside its lesson.
"""

import copy
import inspect
import itertools
import re
import sys
import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from tinytorch.core.autograd import no_grad
from tinytorch.core.tensor import Tensor
from tinytorch.core.training import load_checkpoint, save_checkpoint
from tinytorch.generation import cache_compression as compression
from tinytorch.generation import kv_cache
from tinytorch.generation.cache_compression import (
    HeavyHitterKVCache,
    OffloadedKVCache,
    QuantizedModelKVCache,
    SlidingWindowKVCache,
    load_cache,
    save_cache,
)
from tinytorch.generation.kv_cache import (
    CacheStateError,
    KVCache,
    MemoryTracker,
    disable_kv_cache,
    enable_kv_cache,
    prefill,
    random_gpt,
)
from tinytorch.generation.paged import paged_kv_cache

B, S, L, H, D = 2, 24, 3, 2, 8  # what random_gpt() stores, for two rows


@dataclass(frozen=True)
class Member:
    """A cache of the family, and what it cannot do. `options` go to the factory beside the sizes."""

    name: str
    factory: Any
    options: dict = field(default_factory=dict)
    max_seq_len: Any = S
    window: Any = None  # (window, sinks) that is shorter than the text: then not every token is shown
    renumbered: bool = False  # positions are counted inside the window: a GPT, which adds them before, is refused
    values: Any = None  # stores few bits: what it is given holds two values, for which the step of a group is exact
    shares: bool = False  # views share memory with the cache
    cannot: tuple = ()  # operations that raise NotImplementedError
    error: float = 1e-4  # of a GPT's logits
    nbytes_grow: bool = False

    @property
    def sizes(self):
        return B, self.max_seq_len, L, H, D

    def make(self, *sizes, **options):
        return self.factory(*sizes or self.sizes, **{**self.options, **options})

    def number(self, position, length):
        """What a position is called while its row holds so many tokens."""
        if not self.renumbered or position < self.window[1]:
            return position
        return position - max(length - sum(self.window) + 1, 0)


MEMBERS = [
    Member("KVCache", KVCache, shares=True),
    Member("KVCache grow", KVCache, {"grow": True}, shares=True, nbytes_grow=True),
    Member("KVCache float16", KVCache, {"dtype": np.float16}, shares=True, error=0.005),
    Member("OffloadedKVCache", OffloadedKVCache, shares=True),
    Member("OffloadedKVCache grow", OffloadedKVCache, {"grow": True}, shares=True, nbytes_grow=True),
    Member("window as long as the text", SlidingWindowKVCache, {"window": S}),
    Member("window 1", SlidingWindowKVCache, {"window": 1}, window=(1, 0)),
    Member("window 4, 2 sinks", SlidingWindowKVCache, {"window": 4, "sinks": 2}, window=(4, 2)),
    Member("window 5, 6 spare", SlidingWindowKVCache, {"window": 5, "spare": 6}, window=(5, 0)),
    Member("window 3 of any text", SlidingWindowKVCache, {"window": 3, "sinks": 1}, max_seq_len=None, window=(3, 1)),
    Member("window 4, 1 sink, renumbered", SlidingWindowKVCache, {"window": 4, "sinks": 1, "renumber": True},
           window=(4, 1), renumbered=True),
    Member("budget as long as the text", HeavyHitterKVCache, {"budget": S}, cannot=("truncate", "rollback")),
    *(Member(f"{bits} bits, keys per {axis}", QuantizedModelKVCache,
             {"bits": bits, "key_axis": axis, "group_size": 4}, values=(0.0, 255.0), error=error)
      for axis in ("token", "channel") for bits, error in ((8, 0.02), (4, 0.3), (2, 1.5))),
    Member("paged, blocks of 16", paged_kv_cache),
    Member("paged, blocks of 1", paged_kv_cache, {"block_size": 1}),
    Member("paged, blocks of 5", paged_kv_cache, {"block_size": 5}),
]
OFF_ZERO = [  # skipped layers are zeros, which such groups cannot hold as well: these run only what skips none
    Member("4 bits, from 10 to 265", QuantizedModelKVCache, {"bits": 4, "group_size": 4}, values=(10.0, 265.0)),
    Member("8 bits, one number", QuantizedModelKVCache, {"key_axis": "channel", "group_size": 4}, values=(7.1,)),
]
every = pytest.mark.parametrize("member", MEMBERS, ids=lambda member: member.name)
runs_gpt = pytest.mark.parametrize("member", [m for m in MEMBERS if not m.renumbered], ids=lambda member: member.name)


def tokens(member, seq_len=3, seed=0, layers=L):
    """Keys and values (layers, 2, B, H, T, D) that this member can give back bit by bit."""
    rng, shape = np.random.default_rng(seed), (layers, 2, B, H, seq_len, D)
    numbers = rng.standard_normal(shape) if member.values is None else rng.choice(member.values, shape)
    return numbers.astype(np.float16).astype(np.float32)


def update(cache, layer, chunk, n_new=None):
    """One update, and what attention would report if this cache listens: that all keys were looked at alike."""
    view = cache.update(layer, *chunk, n_new)
    if cache.observe is not None:
        rows, keys = view.pos.shape
        cache.observe(layer, np.full((rows, 4, chunk.shape[3], keys), 1 / keys, np.float32))
    return view


class Lists:
    """A cache beside its oracle: stored[layer][row] is a list of tokens, each (2, H, D): a key and a value."""

    def __init__(self, member, cache=None, stored=None):
        self.member, self.cache = member, member.make() if cache is None else cache
        self.stored = stored or [[[] for _ in range(B)] for _ in range(L)]

    @property
    def lengths(self):
        return [len(row) for row in self.stored[0]]

    def run(self, chunk, n_new=None, layers=range(L)):
        """One whole pass, every view checked; layers that are left out hold zeros."""
        counts = [chunk.shape[4]] * B if n_new is None else n_new
        for layer in layers:
            self.check_view(layer, update(self.cache, layer, chunk[layer], n_new), chunk[layer], counts)
        self.advance(chunk, counts, layers)

    def advance(self, chunk, counts, layers=range(L)):
        """Commit, here too."""
        self.cache.advance()
        for layer, row in np.ndindex(L, B):
            new = [chunk[layer][:, row, :, t] * (layer in layers) for t in range(counts[row])]
            self.stored[layer][row].extend(new)
        self.check()

    def check_view(self, layer, view, chunk, counts):
        """Each token that the new ones may look at stands in exactly one slot, and no other number in any."""
        key, value, pos = view
        slots = pos.shape[1]
        assert pos.dtype == np.int64 and pos.shape == (B, slots), f"pos {pos.dtype} {pos.shape}"
        assert key.shape == value.shape == (B, H, slots, D), f"key {key.shape}, value {value.shape}"
        assert key.dtype == value.dtype == self.cache.dtype and not key.requires_grad
        for row, (old, count) in enumerate(zip(self.stored[layer], counts)):
            known, numbers = old + [chunk[:, row, :, t] for t in range(count)], {}
            for p in range(len(known)):  # renumbered: what nobody sees any more has no number of its own
                numbers.setdefault(self.member.number(p, len(old)), p)
            shown = {int(number): slot for slot, number in enumerate(pos[row]) if number >= 0}
            assert len(shown) == (pos[row] >= 0).sum(), f"row {row}: a position twice in {pos[row].tolist()}"
            assert set(shown) <= set(numbers), f"layer {layer}, row {row}: positions {sorted(shown)}"
            missing = self.visible(len(old), len(known)) - {numbers[number] for number in shown}
            assert not missing, f"layer {layer}, row {row}: positions {sorted(missing)} are not shown"
            for number, slot in shown.items():
                for part, expected in zip((key, value), known[numbers[number]]):
                    np.testing.assert_array_equal(part.numpy()[row, :, slot], expected, f"{layer=} {row=} {number=}")

    def visible(self, start, stop):
        """The positions that the tokens start .. stop - 1 look at."""
        if self.member.window is None:
            return set(range(stop))
        window, sinks = self.member.window
        return {p for q in range(start, stop) for p in range(q + 1) if q - p < window or p < sinks}

    def check(self):
        """Lengths; and what get() gives, in every layer."""
        assert self.cache.seq_lens == self.lengths and self.cache.seq_pos == max(self.lengths)
        for layer, rows in enumerate(self.stored):
            expected = np.zeros((2, B, H, max(self.lengths), D), np.float32)
            for row, known in enumerate(rows):
                for t, token in enumerate(known):
                    expected[:, row, :, t] = token
            parts = self.cache.get(layer)
            for name, part, numbers in zip(("key", "value"), parts, expected):
                assert isinstance(part, Tensor) and part.dtype == self.cache.dtype and not part.requires_grad
                if self.member.window is None:
                    assert part.shape == numbers.shape, f"get({layer}): {name} {part.shape}, expected {numbers.shape}"
                    np.testing.assert_array_equal(part.numpy(), numbers, f"get({layer}), {name}")

    def truncate(self, kept):
        if self.can("truncate", kept):
            self.stored = [[row[:keep] for row, keep in zip(rows, kept)] for rows in self.stored]

    def rollback(self, lost):
        if self.can("rollback", lost):
            self.stored = [[row[: len(row) - n] for row, n in zip(rows, lost)] for rows in self.stored]

    def reorder(self, indices):
        if self.can("reorder", indices):
            self.stored = [[list(rows[index]) for index in indices] for rows in self.stored]

    def reset(self):
        self.cache.reset()
        self.stored = [[[] for _ in range(B)] for _ in range(L)]

    def twin(self, cache):
        """Another cache with the same tokens, beside a copy of the lists."""
        return Lists(self.member, cache, [[list(row) for row in rows] for rows in self.stored])

    def can(self, operation, *arguments):
        """Whether this member did it; one that cannot must say why, and change nothing."""
        before = content(self.cache)
        try:
            getattr(self.cache, operation)(*arguments)
        except NotImplementedError as error:
            assert operation in self.member.cannot and len(str(error).split()) > 5, f"{operation}: {error}"
        except ValueError as error:  # a window that has let these tokens go
            assert self.member.window and re.search("positions .* spare", str(error)), f"{operation}: {error}"
        else:
            assert operation not in self.member.cannot, f"{operation} went through"
            return True
        assert content(self.cache) == before
        return False


def started(member, n_new=(5, 3), seed=0):
    """A cache with one ragged pass, beside its lists."""
    both = Lists(member)
    both.run(tokens(member, max(n_new), seed), list(n_new))
    return both


def content(cache):
    """All that a reader can see of a cache."""
    layers = [part.numpy().tobytes() for layer in range(cache.num_layers) for part in cache.get(layer)]
    return layers, cache.seq_lens, cache.nbytes


class TestQuestions:
    @every
    def test_names_arguments_and_answers(self, member):
        expected = {
            "positions": ["n_new"], "update": ["layer_idx", "key", "value", "n_new"], "advance": [], "reset": [],
            "get": ["layer_idx"], "truncate": ["lengths"], "rollback": ["n"], "reorder": ["row_indices"], "clone": [],
        }
        cache = member.make()
        for name, arguments in expected.items():
            assert list(inspect.signature(getattr(cache, name)).parameters)[: len(arguments)] == arguments, name
        assert (cache.seq_pos, cache.seq_lens, cache.pending_layers) == (0, [0] * B, [])
        assert cache.capacity == member.max_seq_len and type(cache.nbytes) is int and cache.nbytes > 0
        usage = cache.get_memory_usage()
        assert usage["total_bytes"] == cache.nbytes and usage["total_mb"] == cache.nbytes / 2**20
        assert usage["cache_tensors"] == 2 * L
        assert (cache.batch_size, cache.num_layers, cache.num_heads, cache.head_dim) == (B, L, H, D)
        assert repr(cache)

    @every
    def test_positions_are_those_that_the_next_tokens_will_have(self, member):
        cache = started(member, (14, 1)).cache
        a, b = (member.number(p, 14) for p in (14, 15))
        for asked, expected in ((2, [[a, b], [1, 2]]), ([2, 1], [[a, b], [1, -1]]), (1, [[a], [1]])):
            pos = cache.positions(asked)
            assert pos.dtype == np.int64 and pos.tolist() == expected
        pos[...] = 9
        assert cache.positions(1).tolist() == [[a], [1]] and cache.pending_layers == []
        for wrong in (-1, True, 1.0, "1", [1], [1, 2, 3]):
            with pytest.raises(ValueError):
                cache.positions(wrong)


class TestTwoSteps:
    @every
    def test_a_view_shows_all_that_the_new_tokens_may_look_at_and_get_what_is_committed(self, member):
        both = Lists(member)
        for step, n_new in enumerate(([5, 3], None, [1, 0], [0, 2], [1, 1], [7, 4])):
            both.run(tokens(member, 1 if n_new is None else max(n_new), step), n_new)
        assert both.lengths == [15, 11]

    @every
    @pytest.mark.parametrize("width", [1, 2, 5, 11])
    def test_what_is_stored_is_the_same_bytes_whatever_the_chunking(self, member, width):
        whole = np.random.default_rng(0).standard_normal((L, 2, B, H, 22, D), dtype=np.float32)  # of many values
        at_once, pieces = member.make(), member.make()
        for cache, size in ((at_once, 22), (pieces, width)):
            for start in range(0, 22, size):
                for layer in range(L):
                    update(cache, layer, whole[layer, :, :, :, start : start + size])
                cache.advance()
        assert content(pieces)[:2] == content(at_once)[:2]

    @every
    def test_what_is_pending_changes_neither_seq_pos_nor_get_nor_a_clone(self, member):
        both = started(member)
        for layer, chunk in enumerate(tokens(member, 4, seed=1)):
            update(both.cache, layer, chunk)
            both.check()
        assert both.cache.pending_layers == list(range(L))
        twin = both.twin(both.cache.clone())
        twin.check()
        assert twin.cache.pending_layers == []

    @every
    def test_a_pass_that_failed_changes_nothing_and_the_next_one_overwrites_it(self, member):
        both = started(member)
        for stop in range(L):
            for layer, chunk in enumerate(tokens(member, 4, seed=1)[: stop + 1]):
                update(both.cache, layer, chunk, [4, 2])
            both.cache.abandon()
            both.cache.abandon()
            both.check()
        both.run(tokens(member, 2, seed=2), [1, 2])

    @every
    def test_a_pass_that_stopped_at_a_refused_layer_may_be_started_anew(self, member):
        both, chunk = started(member), tokens(member, 3, seed=1)
        update(both.cache, 0, chunk[0])
        with pytest.raises(ValueError):
            both.cache.update(1, chunk[1][0], chunk[1][1] * np.nan)
        both.check()
        both.run(tokens(member, 1, seed=2))

    @every
    def test_calls_out_of_order_are_errors(self, member):
        both, chunk = started(member), tokens(member, 2, seed=1)
        with pytest.raises(CacheStateError):
            both.cache.advance()
        update(both.cache, 1, chunk[1], [2, 1])
        for layer, width, n_new in ((1, 2, [2, 1]), (0, 1, [1, 1]), (0, 2, None)):
            with pytest.raises(CacheStateError):
                both.cache.update(layer, *chunk[layer][..., :width, :], n_new)
        both.check()
        assert both.cache.pending_layers == [1]
        both.cache.abandon()
        both.run(chunk, [2, 1])

    @every
    def test_a_layer_that_was_skipped_reads_as_zeros(self, member):
        both = started(member)
        both.rollback([2, 1])
        both.check()
        both.run(tokens(member, 3, seed=1), [3, 2], layers=[1])
        both.run(tokens(member, 1, seed=2), layers=[0, 2])

    @every
    def test_strict_refuses_the_skip(self, member):
        both = Lists(member, member.make(strict=True))
        update(both.cache, 1, tokens(member)[1])
        with pytest.raises(CacheStateError, match=r"\[0, 2\]"):
            both.cache.advance()
        both.check()
        both.cache.abandon()
        both.run(tokens(member))


REFUSED = {
    "rank": lambda k, v: (k[0], v), "batch of 1": lambda k, v: (k[:1], v[:1]), "V of 1": lambda k, v: (k, v[:1]),
    "heads": lambda k, v: (k[:, :1], v[:, :1]), "head_dim": lambda k, v: (k, v[..., :4]),
    "K and V of different length": lambda k, v: (k, v[:, :, :1]), "no tokens": lambda k, v: (k[:, :, :0], v[:, :, :0]),
    "NaN": lambda k, v: (k * np.nan, v), "inf": lambda k, v: (k, v + np.inf), "text": lambda k, v: (k.astype(str), v),
    "bool": lambda k, v: (k > 0, v), "complex": lambda k, v: (k, v * 1j), "nothing": lambda k, v: (None, None),
    "too large": lambda k, v: (k, np.full(v.shape, 1e300)), "objects": lambda k, v: (k.astype(object), v),
}


def interrupted(call, line):
    """Call it with a Ctrl-C before the given line of the package; False if it has ended before."""
    seen = itertools.count()

    def trace(frame, event, arg):
        if event == "line" and next(seen) == line:
            raise KeyboardInterrupt
        return trace

    sys.settrace(lambda frame, event, arg: trace if "tinytorch" in frame.f_code.co_filename else None)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


class TestInterruption:
    @every
    def test_a_commit_that_is_interrupted_is_whole_or_undone_or_an_error_until_reset(self, member):
        line, step = 0, 1
        while True:
            both, chunk = started(member, (11, 6)), tokens(member, 3, seed=1)
            before = content(both.cache)
            for layer in range(L):
                update(both.cache, layer, chunk[layer], [3, 2])
            (twin := both.twin(both.cache.clone())).run(chunk, [3, 2])
            stopped = interrupted(both.cache.advance, line)
            both.cache.abandon()
            try:
                now = content(both.cache)
            except CacheStateError as error:
                assert "reset()" in str(error)
                for name, arguments in (("truncate", [0]), ("rollback", [0]), ("reorder", [[0, 1]]), ("clone", []),
                                        ("update", [0, *chunk[0]]), ("get", [0]), ("positions", [1]), ("advance", [])):
                    with pytest.raises(CacheStateError):
                        getattr(both.cache, name)(*arguments)
                both.reset()
            else:
                assert now in (before, content(twin.cache)), f"line {line}: neither as before nor committed"
                both.stored = both.stored if now == before else twin.stored
            both.run(tokens(member, 2, seed=2), [1, 2])
            if not stopped:
                return
            line, step = line + step, step + 2  # closely at first, then at fewer and fewer lines


class TestBounds:
    @every
    @pytest.mark.parametrize("stored, asked", [((22, 22), [3, 3]), ((24, 2), [1, 0]), ((2, 23), [1, 2])])
    def test_a_full_cache_names_max_seq_len_and_the_tokens_stored_asked_for_and_free(self, member, stored, asked):
        both = started(member, stored)
        if both.cache.capacity is None:
            return both.run(tokens(member, 3, seed=1), asked)
        row = next(row for row in range(B) if stored[row] + asked[row] > S)
        numbers = {S, stored[row], asked[row], S - stored[row]}
        with pytest.raises(ValueError, match="max_seq_len") as error:
            both.cache.update(0, *tokens(member, 3, seed=1)[0], asked)
        assert numbers <= {int(number) for number in re.findall(r"\d+", str(error.value))}, str(error.value)
        both.check()
        fits = [min(1, S - length) for length in stored]
        both.run(tokens(member, 1, seed=2), fits)

    @every
    @pytest.mark.parametrize("kind", REFUSED)
    def test_what_does_not_fit_is_refused_with_bytes_unchanged(self, member, kind):
        both, chunk = started(member), tokens(member, 2, seed=1)
        before = content(both.cache)
        with pytest.raises(ValueError):
            both.cache.update(1, *REFUSED[kind](*chunk[1]))
        assert content(both.cache) == before and both.cache.pending_layers == []
        both.run(chunk, [2, 1])

    @every
    @pytest.mark.parametrize("layer", [L, -1, True, "0", 1.0, None])
    def test_a_layer_index_is_a_whole_number_in_range(self, member, layer):
        both, chunk = started(member), tokens(member, 1, seed=1)[0]
        for call in (lambda: both.cache.update(layer, *chunk), lambda: both.cache.get(layer)):
            with pytest.raises(ValueError, match="layer_idx"):
                call()
        both.check()

    @every
    @pytest.mark.parametrize("n_new", [[3, 1], [1], [1, 1, 1], -1, [1, -1], 1.0, "1", [True, 1]])
    def test_n_new_counts_tokens_of_the_chunk(self, member, n_new):
        both = started(member)
        with pytest.raises(ValueError):
            both.cache.update(0, *tokens(member, 2, seed=1)[0], n_new)
        both.check()

    @every
    @pytest.mark.parametrize("size", range(5))
    @pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "2"])
    def test_sizes_are_whole_numbers(self, member, size, wrong):
        sizes = list(member.sizes)
        sizes[size] = wrong
        with pytest.raises(ValueError):
            member.make(*sizes)


class TestOwnership:
    @every
    def test_arrays_passed_in_may_be_changed_afterwards(self, member):
        both, chunk, n_new = Lists(member), tokens(member, 4), [4, 2]
        given = chunk.copy()
        for layer in range(L):
            view = update(both.cache, layer, given[layer], n_new)
            given[layer], n_new = 7, list(n_new)
            both.check_view(layer, view, chunk[layer], [4, 2])
        n_new[0] = 1
        both.advance(chunk, [4, 2])

    @every
    def test_nothing_handed_out_is_a_handle_on_the_cache(self, member):
        both, chunk = started(member), tokens(member, 2, seed=1)
        view = update(both.cache, 0, chunk[0])
        for array in (*(part.numpy() for part in (view.key, view.value, *both.cache.get(1))), view.pos):
            if array.flags.writeable:
                array[...] = 9
        both.cache.seq_lens[0] = both.cache.pending_layers.append(1) or 5
        both.cache.get_memory_usage()["total_bytes"] = 0
        both.check()
        both.cache.abandon()
        both.check()
        assert np.shares_memory(view.key.numpy(), both.cache.get(0)[0].numpy()) == member.shares
        both.run(chunk, [2, 1])

    @every
    def test_lists_tensors_and_read_only_arrays_are_taken_and_no_gradient_is_kept(self, member):
        both, chunk = Lists(member), tokens(member, 2)
        chunk.flags.writeable = False
        for layer, wrap in enumerate((np.ndarray.tolist, lambda part: Tensor(part, requires_grad=True), np.asarray)):
            key, value = (wrap(part) for part in chunk[layer])
            view = both.cache.update(layer, key, value)
            if both.cache.observe is not None:
                both.cache.observe(layer, np.full((B, 4, 2, view.pos.shape[1]), 0.1, np.float32))
            both.check_view(layer, view, chunk[layer], [2, 2])
        both.advance(chunk, [2, 2])

    @every
    def test_integers_and_wide_floats_are_cast_to_the_storage_dtype(self, member):
        for given in (np.int8, np.uint64, np.int64, np.float16, np.float64):
            cache = member.make()
            ones = np.ones((B, H, 2, D), given)
            view = update(cache, 0, np.stack([ones, ones + ones]))
            assert view.key.dtype == view.value.dtype == cache.dtype != np.float64
            np.testing.assert_array_equal(view.value.numpy()[view.pos[:, None].repeat(H, 1) >= 0], 2)

    @every
    @pytest.mark.parametrize("copied", [lambda cache: cache.clone(), copy.copy, copy.deepcopy])
    def test_copies_are_independent(self, member, copied):
        both = started(member)
        twin = both.twin(copied(both.cache))
        assert type(twin.cache) is type(both.cache) and twin.cache.dtype == both.cache.dtype
        twin.check()
        twin.run(tokens(member, 3, seed=1), [1, 3])
        both.check()
        both.run(tokens(member, 2, seed=2))
        twin.check()
        both.cache.reset()
        twin.check()
        twin.run(tokens(member, 1, seed=3))


class TestRows:
    @every
    @pytest.mark.parametrize("seed", range(4))
    def test_any_operations_in_any_order_equal_lists(self, member, seed, tmp_path):
        both, rng, self.path = Lists(member), np.random.default_rng(seed), tmp_path / "cache"
        names = ["pass"] * 8 + ["failed", "truncate", "rollback", "reorder", "clone", "save", "reset", "skip"]
        for step, name in enumerate(rng.choice(names, 40)):
            getattr(self, "do_" + name)(both, rng, step)
            both.check()
            assert both.cache.pending_layers == []

    def chunk(self, both, rng, step):
        width = int(rng.integers(1, 5))
        n_new = [min(int(rng.integers(0, width + 1)), S - length) for length in both.lengths]
        return tokens(both.member, width, seed=step), n_new

    def do_pass(self, both, rng, step):
        chunk, n_new = self.chunk(both, rng, step)
        both.run(chunk, n_new)

    def do_skip(self, both, rng, step):
        chunk, n_new = self.chunk(both, rng, step)
        both.run(chunk, n_new, layers=[int(rng.integers(L))])

    def do_failed(self, both, rng, step):
        chunk, n_new = self.chunk(both, rng, step)
        for layer in rng.permutation(L)[: int(rng.integers(1, L + 1))].tolist():
            update(both.cache, layer, chunk[layer], n_new)
        both.cache.abandon()

    def do_truncate(self, both, rng, step):
        kept = [length - int(rng.integers(0, length // 3 + 1)) for length in both.lengths]
        if kept != both.lengths:
            both.truncate(kept)

    def do_rollback(self, both, rng, step):
        n = int(rng.integers(0, min(both.lengths) // 2 + 1))
        if n:
            both.rollback([n] * B)

    def do_reorder(self, both, rng, step):
        both.reorder(rng.integers(0, B, B).tolist())

    def do_clone(self, both, rng, step):
        old, both.cache = both.cache, both.cache.clone()
        old.reset()
        old.close()

    def do_reset(self, both, rng, step):
        both.reset()

    def do_save(self, both, rng, step):
        save_cache(both.cache, self.path)
        both.cache = load_cache(self.path, started(both.member, (7, 2)).cache)

    @every
    @pytest.mark.parametrize("indices", [[0, 0], [0, 1], [1, 0], [1, 1]])
    def test_each_row_becomes_the_one_that_is_named(self, member, indices):
        both = started(member)
        both.reorder(indices)
        both.check()
        for width in (1, 4):  # rows that were one go on beside each other
            both.run(tokens(member, width, seed=width), [width, width - 1])

    @every
    @pytest.mark.parametrize("name, arguments", [
        ("truncate", [6]), ("truncate", [[5, 4]]), ("truncate", [[5]]), ("truncate", [-1]), ("truncate", [2.0]),
        ("rollback", [4]), ("rollback", [[6, 0]]), ("rollback", [-1]), ("rollback", [True]), ("rollback", ["1"]),
        ("reorder", [[0]]), ("reorder", [[0, 2]]), ("reorder", [[0, -1]]), ("reorder", [[0.0, 1]]), ("reorder", [None]),
    ])
    def test_rows_that_are_none_and_lengths_that_are_none_are_refused(self, member, name, arguments):
        both = started(member)
        for layer, chunk in enumerate(tokens(member, 2, seed=1)[:2]):
            update(both.cache, layer, chunk)
        with pytest.raises((ValueError, NotImplementedError)):
            getattr(both.cache, name)(*arguments)
        both.check()
        assert both.cache.pending_layers == [0, 1], "a call that raises changes nothing"

    @every
    @pytest.mark.parametrize("name, arguments", [("truncate", [[5, 3]]), ("rollback", [0]), ("reorder", [[0, 1]])])
    def test_what_is_pending_is_dropped_first(self, member, name, arguments):
        both = started(member)
        for layer, chunk in enumerate(tokens(member, 2, seed=1)):
            update(both.cache, layer, chunk)
        getattr(both.cache, name)(*arguments)
        assert both.cache.pending_layers == []
        both.check()
        both.run(tokens(member, 1, seed=2), layers=[1])

    @every
    def test_empty_again_means_as_new(self, member):
        both = started(member, (22, 9))
        update(both.cache, 0, tokens(member, 1, seed=1)[0])
        both.reset()
        both.check()
        assert both.cache.pending_layers == []
        both.run(tokens(member, 8, seed=2), [8, 1], layers=[2])


class TestMemory:
    @every
    def test_no_growth_during_decoding(self, member):
        cache = member.make()
        nbytes = cache.nbytes
        for step in range(20):
            for layer, chunk in enumerate(tokens(member, 1, seed=step)):
                update(cache, layer, chunk)
            cache.advance()
        assert (cache.nbytes > nbytes) if member.nbytes_grow else (cache.nbytes == nbytes)

    @every
    def test_bytes_are_tracked_and_go_back_once(self, member):
        tracker = MemoryTracker()
        with pytest.raises(RuntimeError), member.make(tracker=tracker) as cache:
            assert tracker.usage("kv_cache") == cache.nbytes > 0
            twin = cache.clone()
            assert tracker.usage("kv_cache") == cache.nbytes + twin.nbytes
            twin.close()
            raise RuntimeError
        assert tracker.current == 0
        cache.close()
        assert tracker.current == 0
        with pytest.raises(ValueError):
            cache.update(0, *tokens(member, 1)[0])
        with pytest.raises(MemoryError, match="1"):
            member.make(tracker=(small := MemoryTracker(limit_bytes=1)))
        assert small.current == small.peak == 0

    @every
    def test_different_layers_may_be_updated_from_different_threads(self, member):
        both, errors = Lists(member), []
        for step in range(8):
            chunk, barrier = tokens(member, 2, seed=step), threading.Barrier(L)

            def work(layer, chunk=chunk, barrier=barrier):
                try:
                    barrier.wait()
                    view = update(both.cache, layer, chunk[layer], [2, 1])
                    both.check_view(layer, view, chunk[layer], [2, 1])
                except BaseException as error:
                    errors.append(error)

            threads = [threading.Thread(target=work, args=(layer,)) for layer in range(L)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert not errors, errors[0]
            both.advance(chunk, [2, 1])


def dense_gpt(model, ids, window=None):
    """Logits (T, V) of one row of a GPT in float64, every layer under the explicit mask of (window, sinks)."""
    weights = {name: array.astype(np.float64) for name, array in model.state_dict().items()}
    heads, shared, t = model.num_heads, model.num_kv_heads, np.arange(len(ids))
    back, (width, sinks) = t[:, None] - t, window or (len(ids), 0)
    mask = np.where((back >= 0) & ((back < width) | (t < sinks)), 0, -np.inf)

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    x = weights["token_embedding.weight"][ids] + weights["position_embedding.weight"][t]
    for i in range(model.num_layers):
        packed = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attention.qkv_proj")
        query, key, value = np.split(packed.reshape(len(t), heads + 2 * shared, -1), [heads, heads + shared], axis=1)
        key, value = (part.repeat(heads // shared, axis=1) for part in (key, value))  # (T, H, D)
        scores = np.exp(np.einsum("qhd,khd->hqk", query, key) / query.shape[-1] ** 0.5 + mask)
        mixed = np.einsum("hqk,khd->qhd", scores / scores.sum(-1, keepdims=True), value)
        x = x + linear(mixed.reshape(len(t), -1), f"blocks.{i}.attention.out_proj")
        up = linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.up_proj")
        up = 0.5 * up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
        x = x + linear(up, f"blocks.{i}.mlp.down_proj")
    return norm(x, "norm") @ weights["token_embedding.weight"].T


def parts_of(model):
    return [model.position_embedding, model.norm, *(block.attention for block in model.blocks)]


class TestThroughAModel:
    @runs_gpt
    @pytest.mark.parametrize("chunk", [None, 1, 4])
    def test_ragged_prompts_in_chunks_then_tokens_equal_each_row_alone(self, member, chunk):
        model, ids = random_gpt(), np.random.default_rng(0).integers(0, 64, (B, 16))
        cache, lengths = member.make(), [9, 5]
        logits = prefill(model, ids[:, :9], cache, chunk, n_new=lengths).numpy()
        assert logits.shape == (B, 9, 64) and cache.seq_lens == lengths
        rows = [list(ids[row, :length]) for row, length in enumerate(lengths)]
        got = [list(logits[row, :length]) for row, length in enumerate(lengths)]
        for width in (1, 3, 1):
            piece = ids[:, 9 : 9 + width]
            for row, new in enumerate(model(piece, cache=cache).numpy()):
                rows[row] += list(piece[row])
                got[row] += list(new)
        for row, text in enumerate(rows):
            expected = dense_gpt(model, text, member.window)
            assert np.shape(got[row]) == expected.shape
            error = np.abs(np.array(got[row]) - expected).max(axis=1)
            assert error.max() < member.error, f"row {row}, per token: {error.round(4).tolist()}"

    @runs_gpt
    def test_generate_takes_the_best_token_at_every_step(self, member):
        model, prompt, cache = random_gpt(), [[1, 2, 3, 4], [9, 8, 7, 6]], member.make()
        texts = [model.generate(prompt, 12, cache=cache) for _ in range(2)]  # a cache of another text is reset
        assert texts[0] == texts[1] and cache.seq_lens == [15, 15]
        if member.window is None and member.values is None:
            assert texts[0] == model.generate(prompt, 12)
        for row, text in enumerate(texts[0]):
            assert text[:4] == prompt[row] and len(text) == 16
            logits = dense_gpt(model, text[:-1], member.window)[3:]
            behind = logits.max(axis=1) - logits[np.arange(12), text[4:]]
            assert behind.max() <= 2 * member.error, f"row {row}, per token: {behind.round(4).tolist()}"

    @runs_gpt
    def test_a_model_takes_any_member_by_factory_or_ready_made_and_gives_its_own_parts_back(self, member):
        model, ids = random_gpt(), np.arange(12).reshape(B, 6)
        plain, parts = model(ids).numpy().copy(), parts_of(model)
        options = {"batch_size": B, "max_seq_len": member.max_seq_len, **member.options}
        made = enable_kv_cache(model, factory=member.factory, **options)
        assert model._kv_cache is made and model._cache_enabled is True
        assert (made.batch_size, made.num_layers, made.num_heads, made.head_dim) == (B, L, H, D)
        for cache in (made, member.make()):
            assert enable_kv_cache(model, cache=cache) is cache
            got = np.concatenate([model(ids[:, :4]).numpy(), model(ids[:, 4:]).numpy()], axis=1)
            assert cache.seq_lens == [6, 6] and got.shape == plain.shape
            for row, text in enumerate(ids):
                np.testing.assert_allclose(got[row], dense_gpt(model, text, member.window), atol=member.error)
        disable_kv_cache(model)
        assert all(part is old for part, old in zip(parts_of(model), parts, strict=True))
        np.testing.assert_array_equal(model(ids).numpy(), plain)

    @runs_gpt
    def test_training_steps_around_the_cache(self, member):
        model, ids = random_gpt(), np.arange(8).reshape(B, 4)
        enable_kv_cache(model, cache=(cache := member.make()))
        model.train()
        model(ids)
        assert cache.seq_pos == 0 and cache.pending_layers == []
        with pytest.raises(RuntimeError):
            model(ids, cache=member.make())

    @runs_gpt
    def test_a_forward_that_fails_in_the_middle_leaves_the_cache_as_it_was(self, member):
        model, ids = random_gpt(), np.random.default_rng(1).integers(0, 64, (B, 7))
        cache = enable_kv_cache(model, cache=member.make())
        with no_grad():
            model(ids[:, :4])
            before, healthy, model.blocks[1].mlp = content(cache), model.blocks[1].mlp, None
            with pytest.raises(TypeError):
                model(ids[:, 4:])
            assert content(cache) == before
            model.blocks[1].mlp = healthy
            got = model(ids[:, 4:]).numpy()
        for row in range(B):
            expected = dense_gpt(model, ids[row], member.window)[4:]
            np.testing.assert_allclose(got[row], expected, atol=member.error)

    def test_a_renumbered_window_refuses_a_model_whose_keys_carry_their_positions(self):
        for member in (member for member in MEMBERS if member.renumbered):
            with pytest.raises(ValueError, match="renumber"):
                enable_kv_cache(random_gpt(), cache=member.make())

    @runs_gpt
    def test_a_model_whose_keys_are_still_to_be_turned_is_refused_and_left_alone(self, member):
        model, cache = random_gpt(), member.make()
        model.keys_before_rotation, parts = True, parts_of(model)
        with pytest.raises(ValueError, match="not turned yet.*renumber=True"):
            enable_kv_cache(model, cache=cache)
        assert all(part is old for part, old in zip(parts_of(model), parts, strict=True)) and model._kv_cache is None


def changed(path, change):
    """Write a saved cache anew, with other arrays: change(state) -> those that differ."""
    state, metadata = load_checkpoint(path)
    save_checkpoint(path, {**state, **change(state)}, metadata)


def nan_in(state):
    """The last array of floats, with a NaN in it."""
    name = [name for name, array in state.items() if array.dtype.kind == "f" and array.size][-1]
    return {name: np.where(np.arange(state[name].size).reshape(state[name].shape) == 0, np.nan, state[name])
            .astype(state[name].dtype)}


DAMAGE = {
    "not a number": nan_in,
    "a length below zero": lambda state: {"lengths": np.array([5, -1])},
    "one length for all": lambda state: {"lengths": np.array([5])},
    "lengths of other tokens": lambda state: {"lengths": np.array([2, 3])},
    "an array too many": lambda state: {"more": np.zeros(3)},
    "another dtype": lambda state: {name: array.astype(np.float64) for name, array in state.items() if array.ndim > 1},
    "half of each array": lambda state: {name: array[:1] for name, array in state.items() if array.ndim > 1},
}


class TestFiles:
    def refuse(self, member, path):
        both = started(member, (6, 4), seed=1)
        update(both.cache, 0, tokens(member, 2, seed=2)[0])
        before = content(both.cache)
        with pytest.raises(ValueError, match=f"{path.name}.*(does not fit|is damaged)"):
            load_cache(path, both.cache)
        assert content(both.cache) == before and both.cache.pending_layers == [0]

    @every
    def test_a_saved_cache_goes_on_bit_by_bit(self, member, tmp_path):
        both, path = started(member, (9, 4)), tmp_path / "cache"
        both.run(tokens(member, 3, seed=1), [2, 3])
        save_cache(both.cache, path)
        loaded = load_cache(path, started(member, (8, 7)).cache)
        assert content(loaded)[:2] == content(both.cache)[:2]
        for step, n_new in enumerate(([1, 1], [3, 0], [2, 4])):
            for layer, chunk in enumerate(tokens(member, max(n_new), seed=step)):
                got, expected = (update(cache, layer, chunk, n_new) for cache in (loaded, both.cache))
                for one, other in zip(got, expected):
                    one, other = (np.asarray(getattr(part, "data", part)) for part in (one, other))
                    assert one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
            loaded.advance()
            both.cache.advance()
        assert content(loaded)[:2] == content(both.cache)[:2]

    @every
    @pytest.mark.parametrize("kind", DAMAGE)
    def test_damage_is_refused_and_the_cache_as_before(self, member, kind, tmp_path):
        path = tmp_path / "cache"
        save_cache(started(member).cache, path)
        changed(path, DAMAGE[kind])
        self.refuse(member, path)

    @every
    def test_a_file_that_is_cut_off_is_refused(self, member, tmp_path):
        path = tmp_path / "cache"
        save_cache(started(member).cache, path)
        path.write_bytes(path.read_bytes()[:-1])
        self.refuse(member, path)

    @every
    @pytest.mark.parametrize("size", [0, 2, 3, 4])
    def test_a_file_of_other_sizes_is_refused(self, member, size, tmp_path):
        path, sizes = tmp_path / "cache", list(member.sizes)
        sizes[size] *= 2
        save_cache(member.make(*sizes), path)
        self.refuse(member, path)

    @every
    def test_a_file_is_taken_by_its_own_kind_and_all_that_keep_tokens_as_they_came_are_one(self, member, tmp_path):
        path, keeps = tmp_path / "cache", lambda m: m.factory in (KVCache, OffloadedKVCache, paged_kv_cache)
        for other in MEMBERS:
            save_cache(saved := started(other).cache, path)
            if other is member or (keeps(member) and keeps(other) and member.make().dtype == saved.dtype):
                assert content(load_cache(path, member.make()))[:2] == content(saved)[:2], other.name
            else:
                self.refuse(member, path)


# Wrong members: one thing is replaced by what somebody may well write, and a test of the contract must fail.


def late(right):
    return lambda store, new, lengths, n_new: right(store, new, [length + 1 for length in lengths], n_new)


def first_row_only(right):
    return lambda lengths, n_new, longest: right(lengths[:1], n_new[:1], longest)


def broadcasting(right):
    return lambda name, part, *sizes: right(name, np.broadcast_to(part, (sizes[0], *np.shape(part)[1:])), *sizes)


def row_by_row(right):
    def gather(store, rows):
        for row, source in enumerate(rows):
            store[:, :, row] = store[:, :, source]

    return gather


def same_file(right):
    stores = {}
    return lambda self, shape: stores.setdefault(shape, right(self, shape))


def longer_by(change):
    def wrong(right):
        return lambda self, *sizes, window, **options: right(self, *sizes, window=window + change, **options)

    return wrong


def trimmed(right):
    """Only what the chunk's newest token sees is left when its oldest one reads."""
    def resident(self, layer_idx):
        key, value, pos = right(self, layer_idx)
        oldest = np.array(self._ledger.lengths) + self._ledger.n_new - self.window
        return key, value, np.where(pos < oldest[:, None], -1, pos)

    return resident


def with_zero(right):
    """The range of a group is forced to include zero."""
    def quantize(x, axis, bits):
        codes, scale, low = right(np.concatenate([x, 0 * x.take([0], axis)], axis), axis, bits)
        return codes.take(range(x.shape[axis]), axis), scale, low

    return quantize


def constant_is_zero(right):
    """A constant group has no step, and what is left of it is zero."""
    def quantize(x, axis, bits):
        codes, scale, low = right(x, axis, bits)
        return codes, scale, np.where(scale == 0, 0, low)

    return quantize


def frozen_each_time(right):
    """What waits for its group to be whole is quantised, and again with every token that comes."""
    def wait(self, row, tokens):
        if tokens.shape[1]:
            tokens = compression.dequantize(*compression.quantize(tokens, 1, self.form.bits))
        right(self, row, tokens)

    return wait


def nothing(right):
    return lambda *arguments: None


views = TestTwoSteps().test_a_view_shows_all_that_the_new_tokens_may_look_at_and_get_what_is_committed
whatever_the_chunking = TestTwoSteps().test_what_is_stored_is_the_same_bytes_whatever_the_chunking
skipped = TestTwoSteps().test_a_layer_that_was_skipped_reads_as_zeros
copied = TestOwnership().test_copies_are_independent
through_a_model = TestThroughAModel().test_ragged_prompts_in_chunks_then_tokens_equal_each_row_alone
reordered = TestRows().test_each_row_becomes_the_one_that_is_named
WRONG = {  # what is wrong: member, whose function is replaced, by what, and the test that must fail, with its arguments
    "one slot too late": ("KVCache", kv_cache, "write_tokens", late, views),
    "only the first row is asked for room": (
        "KVCache", kv_cache, "check_room", first_row_only,
        TestBounds().test_a_full_cache_names_max_seq_len_and_the_tokens_stored_asked_for_and_free, (2, 23), [1, 2]),
    "batch 1 broadcast into all rows": (
        "KVCache", kv_cache, "check_tokens", broadcasting,
        TestBounds().test_what_does_not_fit_is_refused_with_bytes_unchanged, "batch of 1"),
    "forgotten tokens are left in their slots": ("KVCache", kv_cache, "clear_slots", nothing, skipped),
    "rows overwritten before they are read": ("KVCache", kv_cache, "gather_rows", row_by_row, reordered, [1, 0]),
    "a clone in the same file": (
        "OffloadedKVCache", OffloadedKVCache, "_new_store", same_file, copied, lambda cache: cache.clone()),
    "window one too long": ("window 4, 2 sinks", SlidingWindowKVCache, "__init__", longer_by(1), through_a_model, 4),
    "window one too short": ("window 4, 2 sinks", SlidingWindowKVCache, "__init__", longer_by(-1), through_a_model, 4),
    "ring trimmed before the chunk read it": (
        "window 5, 6 spare", SlidingWindowKVCache, "_resident", trimmed, views),
    "group re-quantised": (
        "8 bits, keys per channel", compression.GroupedTokens, "_wait", frozen_each_time, whatever_the_chunking, 5),
    "range forced to include zero": ("4 bits, from 10 to 265", compression, "quantize", with_zero, views),
    "scale of a constant group": ("8 bits, one number", compression, "quantize", constant_is_zero, views),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_member_is_caught(fault, monkeypatch):
    name, owner, function, wrong, contract, *arguments = WRONG[fault]
    member = next(member for member in MEMBERS + OFF_ZERO if member.name == name)
    contract(member, *arguments)  # the right one passes
    monkeypatch.setattr(owner, function, wrong(getattr(owner, function)))
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        contract(member, *arguments)

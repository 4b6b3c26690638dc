"""Quantised caches against plain loops: every shape, bits, group size and chunking; and lists for the model's form."""

import itertools
import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tinytorch.generation.cache_compression import (
    QuantizedKVCache,
    QuantizedModelKVCache,
    complete_groups,
    dequantize,
    pack,
    quantize,
    quantized_bytes,
    unpack,
)
from tinytorch.generation.kv_cache import CacheStateError, MemoryTracker

BITS = st.sampled_from([8, 4, 2])
AXES = st.sampled_from(["token", "channel"])
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
ULP = 2.0**-23
TINY = 2.0**-149


def loop_group(numbers, bits):
    """The numbers as the points of a grid from the smallest to the largest, in float64; and the step of the grid."""
    low, high = min(numbers), max(numbers)
    step = (high - low) / (2**bits - 1)
    if step == 0:
        return list(numbers), 0.0
    points = [low + i * step for i in range(2**bits)]
    return [min(points, key=lambda point: abs(point - number)) for number in numbers], step


def loop_cache(x, bits, axis, group_size):
    """Tokens x (H, T, D) read back, and the step of each number: each group on its own, whole channel groups only."""
    back, steps = x.astype(np.float64), np.zeros(x.shape)
    heads, seq_len, head_dim = x.shape
    if axis == "token":
        places = [(h, t, slice(c, c + group_size)) for h, t in np.ndindex(heads, seq_len)
                  for c in range(0, head_dim, group_size)]
    else:
        whole = seq_len - seq_len % group_size
        places = [(h, slice(t, t + group_size), c) for h in range(heads) for t in range(0, whole, group_size)
                  for c in range(head_dim)]
    for place in places:
        back[place], steps[place] = loop_group([float(number) for number in x[place]], bits)
    return back, steps


def rounding(x, step):
    """What float32 may add: the scale is rounded once (up), code * scale once, the sum once."""
    return ULP * (256 * step + np.abs(x)) + 2 * TINY


# ---- the parts


@settings(max_examples=300, deadline=None)
@given(numbers=st.lists(FINITE, min_size=1, max_size=12), bits=BITS)
def test_every_number_comes_back_within_half_a_step(numbers, bits):
    x = np.array(numbers, np.float32)
    codes, scale, low = quantize(x, 0, bits)
    back = dequantize(codes, scale, low)
    assert codes.shape == back.shape == x.shape and scale.shape == low.shape == (1,)
    assert codes.dtype == np.uint8 and codes.max() < 2**bits
    assert scale.dtype == low.dtype == back.dtype == np.float32 and np.isfinite(back).all()
    _, step = loop_group([float(number) for number in x], bits)
    # a step below the smallest float32 is that smallest: the numbers are then whole steps, and exact
    error = np.abs(back.astype(np.float64) - x)
    assert (error <= max(step, 2 * TINY) / 2 + rounding(x.astype(np.float64), step)).all()
    if step == 0:
        np.testing.assert_array_equal(back, x)


@settings(max_examples=100, deadline=None)
@given(shape=st.tuples(*[st.integers(1, 4)] * 3), axis=st.integers(-3, 2), bits=BITS, seed=st.integers(0, 99))
def test_groups_along_any_axis_equal_the_loop(shape, axis, bits, seed):
    x = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    codes, scale, low = quantize(x, axis, bits)
    expected = [1 if i == axis % 3 else n for i, n in enumerate(shape)]
    assert codes.shape == shape and list(scale.shape) == list(low.shape) == expected
    back = np.moveaxis(dequantize(codes, scale, low), axis, -1)
    moved = np.moveaxis(x, axis, -1)
    for place in np.ndindex(moved.shape[:-1]):
        nearest, step = loop_group([float(number) for number in moved[place]], bits)
        np.testing.assert_allclose(back[place], nearest, rtol=0, atol=1e-4 * step + 1e-6)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("numbers", [
    [3e38, -3e38, 0, 1], [3.4028235e38, -3.4028235e38], [3.4028235e38, 3.4e38], [-3.4028235e38, 1e-45], [3e38, 1e30],
    [1e-45, 0], [1e-45, 3e-45, 1e-44, -1e-45], [1e-39, 2e-39, 0], [0, 0, 0], [1e-45] * 3, [-3.4028235e38] * 2,
    [0.1] * 5, [3.4028235e38, -3.1e38], [3.4028235e38, -2.9e38], [3.4028235e38, -2.7e38, 1],
], ids=repr)
def test_huge_tiny_and_constant_groups_are_finite_and_bounded_without_a_warning(bits, numbers):
    x = np.array(numbers, np.float32)
    with np.errstate(divide="raise", over="raise", invalid="raise"):
        back = dequantize(*quantize(x, 0, bits)).astype(np.float64)
    assert back.shape == x.shape and np.isfinite(back).all()
    step = (float(x.max()) - float(x.min())) / (2**bits - 1)
    assert np.abs(back - x).max() <= max(step, 2 * TINY) / 2 + rounding(np.abs(x.astype(np.float64)).max(), step)
    if len(set(x.tolist())) == 1:
        np.testing.assert_array_equal(back, x)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), bits=BITS, outer=st.lists(st.integers(0, 3), max_size=2), count=st.integers(1, 11))
def test_packing_is_place_value_and_comes_back(data, bits, outer, count):
    codes = np.array(data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=math.prod(outer) * count,
                                        max_size=math.prod(outer) * count)), np.uint8).reshape(*outer, count)
    packed = pack(codes, bits)
    assert packed.dtype == np.uint8 and packed.shape == (*outer, math.ceil(count * bits / 8))
    for place in np.ndindex(*outer):
        whole = sum(int(code) << (bits * i) for i, code in enumerate(codes[place]))
        assert packed[place].tobytes() == whole.to_bytes(packed.shape[-1], "little")
    back = unpack(packed, bits, count)
    assert back.dtype == np.uint8
    np.testing.assert_array_equal(back, codes)


@settings(max_examples=60, deadline=None)
@given(chunks=st.lists(st.integers(1, 9), min_size=1, max_size=6), group_size=st.integers(1, 6))
def test_groups_are_those_of_a_list_whatever_the_chunks(chunks, group_size):
    tokens = np.arange(sum(chunks) * 2, dtype=np.float32).reshape(1, -1, 2)
    waiting, frozen, start = tokens[:, :0], [], 0
    for count in chunks:
        groups, waiting = complete_groups(waiting, tokens[:, start : start + count], group_size)
        frozen += [group.tolist() for group in groups[0]]
        start += count
        whole = start // group_size
        listed = tokens[0].tolist()
        assert frozen == [listed[n * group_size : (n + 1) * group_size] for n in range(whole)]
        assert waiting[0].tolist() == listed[whole * group_size : start]


# ---- one layer


def formats(draw):
    """Sizes that belong together: bits, axis, head_dim, group_size."""
    axis, groups, group_size = draw(AXES), draw(st.integers(1, 3)), draw(st.integers(1, 5))
    return draw(BITS), axis, groups * group_size, group_size


@settings(max_examples=60, deadline=None)
@given(data=st.data(), batch_size=st.integers(1, 3), num_heads=st.integers(1, 2), size=st.sampled_from([1e-3, 1, 1e30]))
def test_a_layer_reads_what_the_loop_reads_and_stores_the_same_bytes_in_every_chunking(
    data, batch_size, num_heads, size
):
    bits, axis, head_dim, group_size = formats(data.draw)
    chunks = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    n_new = [[data.draw(st.integers(0, count)) for _ in range(batch_size)] for count in chunks]
    sizes = batch_size, sum(chunks), num_heads, head_dim, bits, axis, group_size
    cache, at_once, rng = QuantizedKVCache(*sizes), QuantizedKVCache(*sizes), np.random.default_rng(sum(chunks))
    rows = [np.zeros((2, num_heads, 0, head_dim), np.float32) for _ in range(batch_size)]
    for count, valid in zip(chunks, n_new):
        shape = (2, batch_size, num_heads, count, head_dim)
        new = (size * rng.standard_normal(shape)).astype(np.float32)
        cache.update(*new, n_new=valid)
        rows = [np.concatenate([row, new[:, b, :, :n]], axis=2) for b, (row, n) in enumerate(zip(rows, valid))]
    lengths = [row.shape[2] for row in rows]
    assert cache.seq_lens == lengths
    padded = np.zeros((2, batch_size, num_heads, max(1, *lengths), head_dim), np.float32)
    for b, (row, length) in enumerate(zip(rows, lengths)):
        padded[:, b, :, :length] = row
    at_once.update(*padded, n_new=lengths)
    for mine, other in zip(cache.arrays(), at_once.arrays(), strict=True):
        assert mine.tobytes() == other.tobytes(), "a group was quantised again, or other tokens are in it"
    for b, row in enumerate(rows):
        for got, x, along in zip(cache.get_kv(b), row, (axis, "token")):
            assert got.shape == x.shape and got.dtype == np.float32
            back, steps = loop_cache(x, bits, along, group_size)
            np.testing.assert_array_less(np.abs(got - x), steps / 2 + rounding(x, steps))
            np.testing.assert_array_less(np.abs(got - chosen(got, x, back, steps)), 1e-4 * steps + rounding(x, steps))


@settings(max_examples=80, deadline=None)
@given(data=st.data(), batch_size=st.integers(1, 3), num_heads=st.integers(1, 3), max_seq_len=st.integers(1, 40))
def test_bytes_are_those_of_the_format(data, batch_size, num_heads, max_seq_len):
    bits, axis, head_dim, group_size = formats(data.draw)
    cache = QuantizedKVCache(batch_size, max_seq_len, num_heads, head_dim, bits, axis, group_size)
    heads = batch_size * num_heads
    per_token = math.ceil(head_dim * bits / 8) + 8 * (head_dim // group_size)
    values = keys = heads * max_seq_len * per_token
    if axis == "channel":
        per_group = math.ceil(group_size * head_dim * bits / 8) + 8 * head_dim
        waiting = min(group_size - 1, max_seq_len)
        keys = heads * (max_seq_len // group_size * per_group + waiting * head_dim * 4)
    assert cache.memory_bytes() == keys + values == sum(array.nbytes for array in cache.arrays())
    assert cache.savings_vs_fp32() == 8 * heads * max_seq_len * head_dim / (keys + values)
    if axis == "token" and head_dim * bits % 8 == 0:
        assert keys + values == quantized_bytes(batch_size * max_seq_len, num_heads, head_dim, bits, group_size)
    model = QuantizedModelKVCache(batch_size, max_seq_len, 3, num_heads, head_dim, bits=bits, key_axis=axis,
                                  group_size=group_size)
    assert model.nbytes == model.get_memory_usage()["total_bytes"] == 3 * (keys + values)


@pytest.mark.parametrize("head_dim", [7, 16, 32, 48, 64, 80, 128])
@pytest.mark.parametrize("key_axis", ["token", "channel"])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_the_default_groups_save_bytes_in_every_usual_size(head_dim, key_axis, bits):
    for max_seq_len in (1, 8, 31, 32, 33, 64, 1024):
        assert QuantizedKVCache(2, max_seq_len, 2, head_dim, bits, key_axis).savings_vs_fp32() > 1


# ---- the model's form against lists

S, L, H, D = 9, 2, 2, 4


def chosen(got, x, nearest, steps):
    """What the loop says; where x lies in the middle between two points, both are right, and we go on with `got`."""
    middle = np.abs(np.abs(nearest - x) - steps / 2) < 1e-5
    other = np.abs(np.abs(got - nearest) - steps) < 2e-5
    return np.where(middle & other, got, nearest)


class CacheAgainstLists(RuleBasedStateMachine):
    """The model: per layer and row, keys and values as float32 tokens as they were given, or as a group froze them.

    `stored` holds what get() must give; a group is quantised by the loop when it becomes whole, in one place only.
    """

    @initialize(batch_size=st.integers(1, 2), bits=BITS, axis=AXES, group_size=st.sampled_from([1, 2, 4]))
    def start(self, batch_size, bits, axis, group_size):
        self.B, self.bits, self.axis, self.group_size = batch_size, bits, axis, group_size
        self.tracker = MemoryTracker()
        self.cache = QuantizedModelKVCache(batch_size, S, L, H, D, bits=bits, key_axis=axis, group_size=group_size,
                                           tracker=self.tracker)
        self.nbytes, self.open = self.cache.nbytes, {}
        self.rng = np.random.default_rng(7)
        self.stored = [[self.no_tokens() for _ in range(batch_size)] for _ in range(L)]
        self.groups = [[0] * batch_size for _ in range(L)]  # frozen channel groups

    def no_tokens(self):
        return np.zeros((2, H, 0, D))

    def lengths(self):
        return [row.shape[2] for row in self.stored[0]]

    def chunk(self, seq_len):
        return self.rng.standard_normal((2, self.B, H, seq_len, D), dtype=np.float32)

    def settle(self, layer, row, new):
        """Append new tokens (2, H, n, D), freeze what is whole by the loops, and compare with what the cache reads."""
        old = self.stored[layer][row].shape[2]
        tokens = np.concatenate([self.stored[layer][row], new], axis=2)
        first = self.groups[layer][row] * self.group_size if self.axis == "channel" else old
        for part, axis, start, got in zip(tokens, (self.axis, "token"), (first, old), self.cache.get(layer)):
            x = part[:, start:].astype(np.float32)
            expected = loop_cache(x, self.bits, axis, self.group_size)
            part[:, start:] = chosen(got.data[row, :, start : tokens.shape[2]], x, *expected)
        self.stored[layer][row] = tokens
        self.groups[layer][row] = tokens.shape[2] // self.group_size

    def close_to(self, got, rows):
        """got (B, H, S, D) against a list of tokens (H, n, D) per row; what is no token is zero."""
        assert got.dtype == np.float32 and got.shape == (self.B, H, max(row.shape[1] for row in rows), D)
        for b, row in enumerate(rows):
            np.testing.assert_allclose(got[b, :, : row.shape[1]], row, atol=2e-5)
            assert not got[b, :, row.shape[1] :].any()

    @rule(data=st.data(), layer=st.integers(0, L - 1))
    def update(self, data, layer):
        if layer in self.open:
            with pytest.raises(CacheStateError):
                self.cache.update(layer, *self.chunk(1), n_new=[0] * self.B)
            return
        if self.open:
            n_new, new = next(iter(self.open.values()))
            seq_len = new.shape[3]
        else:
            seq_len = data.draw(st.integers(1, 5))
            n_new = [data.draw(st.integers(0, min(seq_len, S - length))) for length in self.lengths()]
        new = self.chunk(seq_len)
        key, value, pos = self.cache.update(layer, *new, n_new=n_new)
        self.open[layer] = n_new, new
        past = max(self.lengths())
        assert key.shape == value.shape == (self.B, H, past + seq_len, D) and key.dtype == np.float32
        np.testing.assert_array_equal(key.data[:, :, past:], new[0])
        np.testing.assert_array_equal(value.data[:, :, past:], new[1])
        self.close_to(key.data[:, :, :past], [row[0] for row in self.stored[layer]])
        for b, (length, count) in enumerate(zip(self.lengths(), n_new)):
            expected = [*range(length), *[-1] * (past - length), *range(length, length + count)]
            assert pos[b].tolist() == expected + [-1] * (seq_len - count)

    @rule(kind=st.sampled_from(["nan", "inf", "batch", "heads", "dim", "room"]))
    def update_that_does_not_fit(self, kind):
        if self.open:
            return
        before = self.cache._store.tobytes()
        new = self.chunk(S + 1 if kind == "room" else 2)
        if kind in ("nan", "inf"):
            new[1, -1, -1, -1, -1] = float(kind)
        elif kind != "room":
            new = np.concatenate([new, new], axis={"batch": 1, "heads": 2, "dim": 4}[kind])
        with pytest.raises(ValueError):
            self.cache.update(0, *new)
        assert self.cache._store.tobytes() == before and self.cache.pending_layers == []

    @precondition(lambda self: self.open)
    @rule()
    def advance(self):
        n_new, shaped = next(iter(self.open.values()))
        self.cache.advance()
        for layer, row in itertools.product(range(L), range(self.B)):
            _, new = self.open.get(layer, (None, np.zeros_like(shaped)))
            self.settle(layer, row, new[:, row, :, : n_new[row]])
        self.open = {}

    @rule(data=st.data())
    def truncate(self, data):
        kept = [data.draw(st.integers(0, length)) for length in self.lengths()]
        before = [[part.data.copy() for part in self.cache.get(layer)] for layer in range(L)]
        self.cache.truncate(kept)
        for layer, row in itertools.product(range(L), range(self.B)):
            keep = kept[row]
            for part, old in zip(self.cache.get(layer), before[layer]):
                np.testing.assert_array_equal(part.data[row, :, :keep], old[row, :, :keep])  # bitwise as it was
            self.stored[layer][row] = self.stored[layer][row][:, :, :keep]
            self.groups[layer][row] = min(self.groups[layer][row], keep // self.group_size)
        self.open = {}

    @rule(data=st.data())
    def reorder(self, data):
        rows = [data.draw(st.integers(0, self.B - 1)) for _ in range(self.B)]
        before = [[part.data.copy() for part in self.cache.get(layer)] for layer in range(L)]
        self.cache.reorder(rows)
        for layer in range(L):
            for part, old in zip(self.cache.get(layer), before[layer]):
                width = part.shape[2]
                np.testing.assert_array_equal(part.data, old[rows][:, :, :width])
            self.stored[layer] = [self.stored[layer][row].copy() for row in rows]
            self.groups[layer] = [self.groups[layer][row] for row in rows]
        self.open = {}

    @rule(keep_clone=st.booleans())
    def clone(self, keep_clone):
        twin = self.cache.clone()
        assert twin._store.tobytes() == self.cache._store.tobytes() and twin.seq_lens == self.cache.seq_lens
        if keep_clone:
            self.cache, twin, self.open = twin, self.cache, {}
        twin.reset()
        twin.close()

    @rule()
    def abandon(self):
        self.cache.abandon()
        self.open = {}

    @rule()
    def reset(self):
        self.cache.reset()
        self.stored = [[self.no_tokens() for _ in range(self.B)] for _ in range(L)]
        self.groups, self.open = [[0] * self.B for _ in range(L)], {}
        assert not self.cache._store.any()

    @invariant()
    def get_gives_what_the_lists_say(self):
        lengths = self.lengths()
        assert self.cache.seq_lens == lengths and self.cache.seq_pos == max(lengths)
        assert self.cache.pending_layers == sorted(self.open)
        assert self.cache.nbytes == self.nbytes == self.tracker.by_purpose["kv_cache"]
        for layer in range(L):
            key, value = self.cache.get(layer)
            self.close_to(key.data, [row[0] for row in self.stored[layer]])
            self.close_to(value.data, [row[1] for row in self.stored[layer]])


TestCacheAgainstLists = CacheAgainstLists.TestCase
TestCacheAgainstLists.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)

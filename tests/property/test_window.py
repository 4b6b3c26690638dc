"""The sliding window against dicts of tokens: any operation in any order, bitwise; any window and chunks."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tinytorch.core.attention import scaled_dot_product_attention, visible_mask
from tinytorch.core.tensor import Tensor
from tinytorch.generation.cache_compression import SlidingWindowKVCache
from tinytorch.generation.kv_cache import CacheStateError

L, H, D, LAST = 2, 1, 2, 60


class WindowAgainstDicts(RuleBasedStateMachine):
    """The model: for each layer and row a dict position -> (key, value), from which what is too old is deleted."""

    @initialize(batch_size=st.integers(1, 2), window=st.integers(1, 4), sinks=st.integers(0, 3),
                spare=st.integers(0, 3), bounded=st.booleans())
    def start(self, batch_size, window, sinks, spare, bounded):
        self.B, self.window, self.sinks, self.ring = batch_size, window, sinks, window + spare
        self.last = LAST if bounded else None
        self.cache = SlidingWindowKVCache(batch_size, self.last, L, H, D, window, sinks, spare=spare)
        self.nbytes = self.cache.nbytes
        self.held = [[{} for _ in range(batch_size)] for _ in range(L)]
        self.lengths, self.open, self.count = [0] * batch_size, {}, 0

    def chunk(self, seq_len):
        """Numbers that were never used before."""
        shape = (2, self.B, H, seq_len, D)
        numbers = self.count + 1 + np.arange(np.prod(shape), dtype=np.float32)
        self.count += int(np.prod(shape))
        return numbers.reshape(shape)

    def with_chunk(self, layer, row):
        n_new, _, keys, values = self.open[layer]
        new = {self.lengths[row] + t: (keys[row, :, t], values[row, :, t]) for t in range(n_new[row])}
        return {**self.held[layer][row], **new}

    @rule(data=st.data(), layer=st.integers(0, L - 1))
    def update(self, data, layer):
        if layer in self.open:
            with pytest.raises(CacheStateError):
                self.cache.update(layer, *self.chunk(1))
            return
        if self.open:
            n_new, seq_len, *_ = next(iter(self.open.values()))
        else:
            room = min(self.last - max(self.lengths), 12) if self.last else 12
            if room == 0:
                return
            seq_len = data.draw(st.integers(1, room))
            n_new = [data.draw(st.integers(0, seq_len)) for _ in range(self.B)]
        keys, values = self.chunk(seq_len)
        view = self.cache.update(layer, keys.copy(), values.copy(), n_new=n_new)
        self.open[layer] = n_new, seq_len, keys, values
        assert view.key.shape == view.value.shape == (self.B, H, view.pos.shape[1], D)
        for row in range(self.B):
            shown = {int(p): s for s, p in enumerate(view.pos[row]) if p >= 0}
            expected = self.with_chunk(layer, row)
            assert sorted(shown) == sorted(expected) and (view.pos[row] >= 0).sum() == len(expected)
            for position, (key, value) in expected.items():
                np.testing.assert_array_equal(view.key.data[row, :, shown[position]], key)
                np.testing.assert_array_equal(view.value.data[row, :, shown[position]], value)

    @precondition(lambda self: self.last is not None)
    @rule()
    def update_without_room(self):
        if not self.open:
            with pytest.raises(ValueError, match="max_seq_len"):
                self.cache.update(0, *self.chunk(self.last + 1 - max(self.lengths)))

    @rule()
    def advance(self):
        if not self.open:
            with pytest.raises(CacheStateError):
                self.cache.advance()
            return
        n_new, seq_len, *_ = next(iter(self.open.values()))
        zeros = np.zeros((self.B, H, seq_len, D), np.float32)
        for layer in range(L):
            self.open.setdefault(layer, (n_new, seq_len, zeros, zeros))
            rows = [self.with_chunk(layer, row) for row in range(self.B)]
            ends = [length + count for length, count in zip(self.lengths, n_new)]
            self.held[layer] = [{p: token for p, token in tokens.items() if p < self.sinks or p >= end - self.ring}
                                for tokens, end in zip(rows, ends)]
        self.cache.advance()
        self.lengths, self.open = ends, {}

    @rule(data=st.data(), by_length=st.booleans(), steps=st.integers(0, 4))
    def forget(self, data, by_length, steps):
        """Allowed where the next token still finds all that it would see; else refused, and nothing changes."""
        kept = [data.draw(st.integers(0, length)) if steps == 4 else max(length - steps, 0) for length in self.lengths]
        lost = any(
            position not in self.held[0][row]
            for row, keep in enumerate(kept) for position in range(keep)
            if position < self.sinks or keep - position < self.window
        )
        def call():
            return (self.cache.truncate(kept) if by_length
                    else self.cache.rollback([length - keep for length, keep in zip(self.lengths, kept)]))

        if lost:
            with pytest.raises(ValueError, match="spare"):
                call()
            return
        call()
        self.open, self.lengths = {}, kept
        self.held = [[{p: token for p, token in tokens.items() if p < keep} for tokens, keep in zip(layer, kept)]
                     for layer in self.held]

    @rule(data=st.data())
    def reorder(self, data):
        rows = [data.draw(st.integers(0, self.B - 1)) for _ in range(self.B)]
        self.cache.reorder(rows)
        self.held = [[dict(layer[row]) for row in rows] for layer in self.held]
        self.lengths, self.open = [self.lengths[row] for row in rows], {}

    @rule(keep_clone=st.booleans())
    def clone(self, keep_clone):
        twin = self.cache.clone()
        if keep_clone:
            self.cache, twin, self.open = twin, self.cache, {}
        twin.reset()
        twin.update(0, *self.chunk(9))
        twin.advance()

    @rule()
    def abandon(self):
        self.cache.abandon()
        self.open = {}

    @rule(really=st.integers(0, 3))
    def reset(self, really):
        if really == 0:
            self.cache.reset()
            self.held = [[{} for _ in range(self.B)] for _ in range(L)]
            self.lengths, self.open = [0] * self.B, {}

    @invariant()
    def it_holds_what_the_dicts_hold_and_nothing_else(self):
        cache = self.cache
        assert cache.seq_lens == self.lengths and cache.nbytes == self.nbytes
        assert cache.pending_layers == sorted(self.open)
        assert cache.positions(2).tolist() == [[length, length + 1] for length in self.lengths]
        for layer in range(L):
            key, value = (part.data for part in cache.get(layer))
            longest = max(len(tokens) for tokens in self.held[layer])
            assert key.shape == value.shape == (self.B, H, longest, D)
            for row, tokens in enumerate(self.held[layer]):
                assert cache.residents(layer)[row].tolist() == sorted(tokens) + [-1] * (longest - len(tokens))
                for s, position in enumerate(sorted(tokens)):
                    np.testing.assert_array_equal(key[row, :, s], tokens[position][0])
                    np.testing.assert_array_equal(value[row, :, s], tokens[position][1])
                assert not key[row, :, len(tokens):].any() and not value[row, :, len(tokens):].any()

    @invariant()
    def what_is_no_token_is_zero(self):
        empty = self.cache._pos < 0  # (L, B, slots)
        for part in range(2):
            assert not self.cache._store[:, part, :, 0][empty].any()


TestWindowAgainstDicts = WindowAgainstDicts.TestCase
TestWindowAgainstDicts.settings = settings(
    max_examples=100, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), window=st.integers(1, 9), sinks=st.integers(0, 5), spare=st.integers(0, 3),
       renumber=st.booleans())
def test_attention_over_the_window_is_dense_attention_under_the_band(data, window, sinks, spare, renumber):
    """Also renumbered: who is seen does not depend on how positions are counted."""
    lengths = [data.draw(st.integers(0, 25)) for _ in range(2)]
    query, key, value = np.random.default_rng(window).standard_normal((3, 2, H, 25, D))
    cache = SlidingWindowKVCache(2, None, 1, H, D, window, sinks, spare=spare, renumber=renumber, dtype=np.float64)
    while cache.seq_lens != lengths:
        seq_len, starts = data.draw(st.integers(1, 12)), cache.seq_lens
        n_new = [min(seq_len, length - start) for start, length in zip(starts, lengths)]
        q, k, v = (np.zeros((2, H, seq_len, D)) for _ in range(3))
        for row, (start, count) in enumerate(zip(starts, n_new)):
            for part, whole in ((q, query), (k, key), (v, value)):
                part[row, :, :count] = whole[row, :, start : start + count]
        positions, view = cache.positions(n_new, seq_len), cache.update(0, k, v, n_new)
        visible = visible_mask(positions, view.pos, cache.window, cache.sinks)
        got = scaled_dot_product_attention(Tensor(q, dtype=np.float64), view.key, view.value, visible).data
        for row, (start, count) in enumerate(zip(starts, n_new)):
            for t in range(start, start + count):
                seen = [s for s in range(t + 1) if t - s < window or s < sinks]
                weights = np.exp(query[row, 0, t] @ key[row, 0, seen].T / D**0.5)
                expected = weights / weights.sum() @ value[row, 0, seen]
                np.testing.assert_allclose(got[row, 0, t - start], expected, rtol=0, atol=1e-12)
        cache.advance()

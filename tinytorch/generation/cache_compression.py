"""Cache compression: caches that stay small: windows and sinks, eviction, fewer bits, a file.

Lesson 22_cache_compression. Built from src/22_cache_compression/22_cache_compression.py by `tito dev build`: change it there, not here.
"""

__all__ = [
    "PendingKVCache",
    "ring_slots",
    "survivors",
    "gone_positions",
    "InterruptedLedger",
    "SlotKVCache",
    "SlidingWindowKVCache",
    "inside_positions",
    "attention_received",
    "who_stays",
    "change_tenants",
    "HeavyHitterKVCache",
    "LARGEST",
    "float32_above",
    "quantize",
    "dequantize",
    "pack",
    "unpack",
    "quantized_bytes",
    "complete_groups",
    "GroupFormat",
    "quantized_formats",
    "GroupedTokens",
    "QuantizedKVCache",
    "outlier_keys",
    "key_error",
    "score_codes",
    "score_channels",
    "mix_codes",
    "CodedTensor",
    "QuantizedModelKVCache",
    "cache_state",
    "state_problem",
    "state_layout",
    "TOKENS",
    "state_kind",
    "save_cache",
    "cache_for",
    "fill",
    "load_cache",
    "take_bytes",
    "mapped_zeros",
    "OffloadedKVCache",
    "CacheReport",
    "run_text",
    "compare_caches",
]


# %% cell 2
# One family, one file: longer than its neighbours, so that its members can be read side by side.
import math
import os
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tinytorch.core.attention import as_visible, fold_groups, masked_softmax_array, visible_mask
from tinytorch.core.autograd import no_grad
from tinytorch.core.losses import cross_entropy
from tinytorch.core.tensor import Tensor
from tinytorch.core.training import load_checkpoint, save_checkpoint
from tinytorch.generation.kv_cache import (
    CacheDoor,
    CacheLedger,
    CacheRows,
    CacheStateError,
    KVCache,
    KVCacheConfig,
    KVStore,
    KVView,
    LayerKVCache,
    check_chunk,
    check_row,
    check_tokens,
    kv_cache_bytes,
    lengths_to_keep,
    prefill,
    random_gpt,
    slot_positions,
    stored_heads,
    whole_number,
    write_tokens,
)


# %% cell 8 (22-view)
class PendingKVCache(KVStore, CacheDoor, CacheRows):
    """A cache that keeps an open pass aside, exactly as it came, and takes it in when it is committed.

    Attention sees what the cache kept of the past and the whole new chunk. A member says what it keeps:

        _resident(layer_idx) -> (key, value, pos)  arrays (B, H, R, D) twice and (B, R); -1 where empty
        _take_in(layer_idx, key, value, n_new)     a committed chunk (B, H, T, D), n_new[row] of it valid
        _forget(kept, stored), _gather(rows)       as in lesson 17
        _arrays() -> dict of name -> array         all that it keeps beside the lengths: reset, clone and files ask for it
        _impossible(state) -> sentence or None     why no passes can have led to such arrays and "lengths"
    """

    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self._pending = {}  # layer -> (key, value) of the open pass

    def update(self, layer_idx, key, value, n_new=None):
        """As in KVCache; the view holds copies, so it stays what it was."""
        with self._lock:
            layer_idx, key, value, n_new = self._accept(layer_idx, key, value, n_new)
        self._pending[layer_idx] = key.copy(), value.copy()
        old_key, old_value, old_pos = self._resident(layer_idx)
        new_pos = self.positions(n_new, key.shape[2])
        key = np.concatenate([old_key, key], axis=2)
        value = np.concatenate([old_value, value], axis=2)
        pos = np.concatenate([old_pos, new_pos], axis=1)
        return KVView(Tensor(key, dtype=self.dtype), Tensor(value, dtype=self.dtype), pos)

    def advance(self):
        """As in KVCache. If it is interrupted (Ctrl-C), some tokens have moved and others not: then reset() it."""
        try:
            super().advance()
        except CacheStateError:  # refused, before anything moved
            raise
        except BaseException:
            self._ledger = InterruptedLedger()
            raise

    def abandon(self):
        """Drop what is pending: the pass that wrote it has failed."""
        self._pending.clear()
        self._ledger.close_pass()

    def reset(self):
        """Empty again: no bytes, no lengths, nothing pending."""
        self.abandon()
        for array in self._arrays().values():
            array[...] = 0
        self._ledger = CacheLedger(self.batch_size)

    def clone(self):
        """An independent copy of what is committed."""
        lengths, twin = self.seq_lens, self._twin()
        twin._replace(self._arrays(), lengths)
        return twin

    def close(self):
        self._pending.clear()
        super().close()

    def get(self, layer_idx):
        """What one layer still holds of its committed tokens, key and value (B, H_kv, R, D); empty slots are zero."""
        key, value, _ = self._resident(self._layer(layer_idx))
        return Tensor(key, dtype=self.dtype), Tensor(value, dtype=self.dtype)

    def _arrays(self):
        raise NotImplementedError(f"{type(self).__name__} does not name the arrays that it keeps (_arrays), so it "
                                  "cannot be copied or saved: keep the ids, and prefill again")

    def _impossible(self, state):
        """Nothing is impossible, as far as we know here."""

    def _replace(self, arrays, lengths):
        """Let these be what is kept."""
        self.abandon()
        for name, array in self._arrays().items():
            array[...] = arrays[name]
        self._ledger.lengths = lengths

    def _open_pass(self, lengths):
        """Nothing to find: room is made when the pass is committed."""

    def _keep_pass(self):
        n_new, seq_len = self._ledger.n_new, self._ledger.seq_len
        skipped = np.zeros((2, self.batch_size, self.num_heads, seq_len, self.head_dim), self.dtype)
        for layer_idx in range(self.num_layers):
            self._take_in(layer_idx, *self._pending.get(layer_idx, skipped), n_new)
        self._pending.clear()


# %% cell 13 (22-ring)
def ring_slots(positions, sinks, ring):
    """The slot of each position, as an array: the first `sinks` have slots of their own, the others share a ring.

    >>> ring_slots([0, 1, 2, 5, 6, 9, 10], sinks=2, ring=4).tolist()
    [0, 1, 2, 5, 2, 5, 2]
    """
    positions = np.asarray(positions)
    return np.where(positions < sinks, positions, sinks + (positions - sinks) % ring)


# %% cell 17 (22-chunk)
def survivors(start, count, sinks, ring):
    """Which of a row's `count` new tokens, the first at position `start`, are kept at the commit: their chunk indices.

    >>> survivors(3, 6, sinks=2, ring=4).tolist(), survivors(0, 9, sinks=2, ring=4).tolist()
    ([2, 3, 4, 5], [0, 1, 5, 6, 7, 8])
    """
    positions = start + np.arange(count)
    return np.flatnonzero((positions < sinks) | (positions >= start + count - ring))


# %% cell 21 (22-rollback)
def gone_positions(resident, kept, window, sinks):
    """The positions, in order, that the next token at position `kept` would see if they were not gone; [] if none.

    resident: a set of positions.

    >>> gone_positions({5, 6, 7, 8}, 7, window=3, sinks=0), gone_positions({5, 6, 7, 8}, 6, window=3, sinks=0)
    ([], [4])
    """
    seen = [*range(min(sinks, kept)), *range(max(sinks, kept - window + 1), kept)]
    return [position for position in seen if position not in resident]


# %% cell 27
class InterruptedLedger(CacheLedger):
    """In the place of the ledger after an advance() that was interrupted: who asks for lengths gets an error."""

    def __init__(self):
        """Nothing is counted."""

    def close_pass(self):
        """Nothing is open."""

    @property
    def lengths(self):
        """CacheStateError."""
        raise CacheStateError("advance() was interrupted, and some tokens stand in their new slots, others do not: "
                              "reset() the cache, and run the text again")

    written = lengths


class SlotKVCache(PendingKVCache):
    """A cache of a fixed number of slots, whatever the text: `_pos` (L, B, slots) says which token stands where.

    max_seq_len bounds the positions, as in KVCache; None: no bound. Its memory does not depend on it.
    """

    def __init__(self, batch_size, max_seq_len, num_layers, num_heads, head_dim, *,
                 dtype=np.float32, strict=False, tracker=None):
        length = 1 if max_seq_len is None else max_seq_len  # only checked: the slots are counted by _first_slots
        super().__init__(batch_size, length, num_layers, num_heads, head_dim,
                         dtype=dtype, strict=strict, tracker=tracker)
        self.max_seq_len = None if max_seq_len is None else self.max_seq_len

    def _allocate(self, num_slots):
        super()._allocate(num_slots)
        self._pos = np.full((self.num_layers, self.batch_size, num_slots), -1)

    def residents(self, layer_idx=0):
        """The positions that are kept, in order: (B, R), R those of the fullest row; -1 behind a shorter one."""
        layer = self._layer(layer_idx)
        return np.take_along_axis(self._pos[layer], self._order(layer), axis=1)

    def get(self, layer_idx):
        """Key and value (B, H_kv, R, D) of one layer's `residents`, in the order of their positions; else zero."""
        layer = self._layer(layer_idx)
        order = self._order(layer)
        key, value = (np.stack([part[row][:, slots] for row, slots in enumerate(order)]) for part in self._store[layer])
        return Tensor(key, dtype=self.dtype), Tensor(value, dtype=self.dtype)

    def reset(self):
        """Empty again: no bytes, no lengths, nothing pending."""
        super().reset()
        self._pos[...] = -1

    @property
    def config(self):
        """A KVCacheConfig of as many tokens as there are slots: its calculate_size() is our nbytes."""
        return KVCacheConfig(self.num_layers, self._store.shape[4], self.num_heads, self.head_dim, self.batch_size,
                             self.dtype)

    def get_memory_usage(self):
        """Bytes of keys and values, those in use, and (not among them) those of the notes that we keep beside them."""
        used = kv_cache_bytes(1, self.num_heads, self.head_dim, int((self._pos >= 0).sum()), self.dtype.itemsize)
        return {**super().get_memory_usage(), "used_bytes": used, "bookkeeping_bytes": self._notes_nbytes()}

    def _options(self):
        return {"dtype": self.dtype, "strict": self.strict, "tracker": self._tracker}

    def _arrays(self):
        return {"store": self._store, "positions": self._pos}

    def _impossible(self, state):
        pos, filled = state["positions"], (state["store"] != 0).any(axis=(1, 3, 5))  # (L, B, slots)
        for layer, row in np.ndindex(pos.shape[:2]):
            if not self._possible(pos[layer, row], int(state["lengths"][row])):
                return f"positions of layer {layer}, row {row} cannot be those of {state['lengths'][row]} tokens"
        return "store holds numbers in slots without a token" if filled[pos < 0].any() else None

    def _notes_nbytes(self):
        return sum(array.nbytes for name, array in self._arrays().items() if name != "store")

    def _used(self):
        """Slots that were ever taken: they are taken from the left."""
        return min(self._store.shape[4], self.seq_pos)

    def _resident(self, layer_idx):
        used = self._used()
        key, value = self._store[layer_idx, :, :, :, :used]
        return key, value, self._pos[layer_idx, :, :used]

    def _order(self, layer):
        """The slots of each row by their positions, the empty ones last: (B, R)."""
        pos = self._pos[layer, :, : self._used()]
        order = np.where(pos < 0, np.iinfo(pos.dtype).max, pos).argsort(axis=1, kind="stable")
        return order[:, : (pos >= 0).sum(axis=1).max()]

    def _put(self, layer_idx, row, slots, key, value, positions):
        """Put tokens of one row, key and value (H, K, D), into K slots."""
        self._store[layer_idx, 0, row][:, slots], self._store[layer_idx, 1, row][:, slots] = key, value
        self._pos[layer_idx, row, slots] = positions

    def _forget(self, kept, stored):
        for row, keep in enumerate(kept):
            layers, slots = np.nonzero(self._pos[:, row] >= keep)
            self._store[layers, :, row, :, slots], self._pos[layers, row, slots] = 0, -1

    def _gather(self, rows):
        self._store[...], self._pos[...] = self._store[:, :, rows], self._pos[:, rows]


# %% cell 28
class SlidingWindowKVCache(SlotKVCache):
    """The newest `window` tokens and the first `sinks`, in memory that never grows.

    A token sees itself, the window - 1 before it, and the sinks. update() shows all that is held and the whole chunk,
    of whatever length; the commit evicts. Positions and lengths go on counting. What was rolled back comes again, or
    the rollback is refused: after eviction has begun, spare + 1 tokens are always forgiven. renumber=True counts
    positions inside the cache, for a Llama(keys_before_rotation=True), whose keys update() turns by them (lesson 22,
    section 7). Sources: Jiang et al. 2023, section 2; Xiao et al. 2023, section 3.

    >>> cache = SlidingWindowKVCache(1, None, 1, 1, 1, window=3, sinks=1)
    >>> for _ in range(5):
    ...     view = cache.update(0, np.ones((1, 1, 2, 1)), np.ones((1, 1, 2, 1)))
    ...     cache.advance()
    >>> cache.seq_lens, cache.residents().tolist(), cache.nbytes
    ([10], [[0, 7, 8, 9]], 32)
    """

    def __init__(self, batch_size, max_seq_len, num_layers, num_heads, head_dim, window, sinks=0, *,
                 spare=0, renumber=False, dtype=np.float32, strict=False, tracker=None):
        self.window, self.sinks = whole_number("window", window), whole_number("sinks", sinks, least=0)
        self.spare, self.renumber = whole_number("spare", spare, least=0), bool(renumber)
        self._ring, self._rotate = self.window + self.spare, None
        super().__init__(batch_size, max_seq_len, num_layers, num_heads, head_dim,
                         dtype=dtype, strict=strict, tracker=tracker)

    def positions(self, n_new, seq_len=None):
        """The positions (B, T) of the next tokens; with renumber=True, those inside the cache."""
        return self._numbered(super().positions(n_new, seq_len))

    def check_model(self, model):
        """ValueError where keys carry their position and must not (renumber=True), or the other way round."""
        if not self.renumber:
            return super().check_model(model)
        if not getattr(model, "keys_before_rotation", False):
            raise ValueError(
                f"renumber=True needs keys without a position, rotated after they are read: {type(model).__name__} "
                "stores keys that carry theirs. Use renumber=False, or a Llama(..., keys_before_rotation=True)")
        self._rotate = model.position_embedding.rotate

    def update(self, layer_idx, key, value, n_new=None):
        """As in KVCache; on a model and with renumber=True, all keys turned by where they stand inside the cache."""
        view = super().update(layer_idx, key, value, n_new)
        return view if self._rotate is None else view._replace(key=self._rotate(view.key, view.pos))

    def _options(self):
        return {**super()._options(), "window": self.window, "sinks": self.sinks, "spare": self.spare,
                "renumber": self.renumber}

    def _first_slots(self):
        return self.sinks + self._ring

    def _resident(self, layer_idx):
        key, value, pos = super()._resident(layer_idx)
        return key, value, self._numbered(pos)

    def _possible(self, pos, length):
        """Can these (slots,) be the positions of a row of so many tokens?"""
        slots = np.flatnonzero(pos != -1)
        in_place = (ring_slots(pos[slots], self.sinks, self._ring) == slots).all()
        return (in_place and ((-1 <= pos) & (pos < length)).all()
                and not gone_positions(set(pos.tolist()), length, self.window, self.sinks))

    def _impossible(self, state):
        alike = (state["positions"] == state["positions"][0]).all()
        return super()._impossible(state) if alike else "positions differ between the layers"

    def _numbered(self, pos):
        return inside_positions(pos, self._ledger.lengths, self.window, self.sinks) if self.renumber else pos

    def _take_in(self, layer_idx, key, value, n_new):
        for row, (start, count) in enumerate(zip(self._ledger.lengths, n_new)):
            stay = survivors(start, count, self.sinks, self._ring)
            slots = ring_slots(start + stay, self.sinks, self._ring)
            self._put(layer_idx, row, slots, key[row][:, stay], value[row][:, stay], start + stay)

    def _forget(self, kept, stored):
        for row, (keep, have) in enumerate(zip(kept, stored)):
            gone = gone_positions(set(self._pos[0, row].tolist()), keep, self.window, self.sinks)
            if gone:
                raise ValueError(
                    f"row {row} cannot go back from {have} tokens to {keep}: the next one would see positions {gone}, "
                    f"and the window has let them go. A cache with more spare= slots forgives more: this one has "
                    f"spare={self.spare}, which forgives {self.spare + 1}; this asks for {have - keep}.")
        super()._forget(kept, stored)


def inside_positions(pos, lengths, window, sinks):
    """Positions (B, S), -1 where empty, counted inside the cache: sinks first, then what the next token still sees.

    lengths: tokens of each row so far. A token behind the sinks that nobody will see again counts as empty.

    >>> inside_positions(np.array([[0, 1, 5, 6, 7, 8, 9]]), [8], window=3, sinks=2).tolist()
    [[0, 1, -1, 2, 3, 4, 5]]
    """
    shift = np.maximum(np.array(lengths)[:, None] - (sinks + window - 1), 0)
    inside = np.where(pos < sinks, pos, pos - shift)
    return np.where((pos >= sinks) & (inside < sinks), -1, inside)


# %% cell 45 (22-received)
def attention_received(weights, n_new):
    """What each key received from all heads and all valid queries together: (B, H, T, S) -> (B, S), float64.

    n_new: valid queries of each row; the others are padding.

    >>> weights = np.array([[[[0.7, 0.1, 0.2, 0.0], [0.6, 0.0, 0.1, 0.3]]]])
    >>> attention_received(weights, [2]).round(6).tolist(), attention_received(weights, [1]).round(6).tolist()
    ([[1.3, 0.1, 0.3, 0.3]], [[0.7, 0.1, 0.2, 0.0]])
    """
    valid = np.arange(weights.shape[2]) < np.array(n_new)[:, None]  # (B, T)
    return np.where(valid[:, None, :, None], weights, 0).sum(axis=(1, 2), dtype=np.float64)


# %% cell 49 (22-evict)
def who_stays(pos, score, budget, recent):
    """Indices, sorted, of the `recent` newest tokens and the best of the rest by score: at most `budget` together.

    pos, score: (N,) arrays; pos -1 is no token. recent <= budget.

    >>> who_stays(np.array([0, 1, 2, 3]), np.array([1.3, 0.1, 0.3, 0.3]), budget=3, recent=1).tolist()
    [0, 2, 3]
    """
    by_age = np.argsort(pos, kind="stable")[(pos < 0).sum() :]  # indices of the tokens, oldest first
    older, newest = by_age[: max(len(by_age) - recent, 0)], by_age[max(len(by_age) - recent, 0) :]
    best = older[np.argsort(-score[older], kind="stable")]
    return np.sort(np.concatenate([best[: budget - len(newest)], newest]))


def change_tenants(pos, score, stays, new_pos, new_score):
    """Let the newcomers that stay into the slots of those that go, in place; return (slots, which newcomers).

    pos, score: the slots' (S,), changed here. stays: indices from who_stays; from S on they mean newcomers.
    """
    taken = stays[stays < len(pos)]
    newcomers = stays[stays >= len(pos)] - len(pos)
    slots = np.setdiff1d(np.arange(len(pos)), taken)[: len(newcomers)]
    pos[slots], score[slots] = new_pos[newcomers], new_score[newcomers]
    return slots, newcomers


# %% cell 52
class HeavyHitterKVCache(SlotKVCache):
    """`budget` tokens per layer and row: the `recent` newest (default: half), and those that received most attention.

    For attention that reports: observe(layer_idx, weights) between update and advance, as CachedAttention.attend does.
    Eviction at the commit only; with a budget as large as the text nothing is evicted. A row can be truncated to 0, or
    not at all: NotImplementedError. Source: Zhang et al. 2023, section 4; they choose per head, we per layer.
    """

    def __init__(self, batch_size, max_seq_len, num_layers, num_heads, head_dim, budget, recent=None, *,
                 dtype=np.float32, strict=False, tracker=None):
        self.budget = whole_number("budget", budget)
        self.recent = max(1, self.budget // 2) if recent is None else whole_number("recent", recent)
        if self.recent > self.budget:
            raise ValueError(f"recent={recent} tokens are to be safe, and budget={budget} are kept: recent <= budget")
        self._observed = {}  # layer -> (B, S): what the keys of the open pass's view received
        super().__init__(batch_size, max_seq_len, num_layers, num_heads, head_dim,
                         dtype=dtype, strict=strict, tracker=tracker)

    def observe(self, layer_idx, weights):
        """Who looked where: weights (B, H, T, S) over the S keys of the view that this layer's update returned."""
        layer = self._layer(layer_idx)
        if layer not in self._pending or layer in self._observed:
            raise CacheStateError(f"observe({layer}) comes once, between this layer's update() and advance()")
        weights = np.asarray(weights.data if isinstance(weights, Tensor) else weights)
        needed = (self.batch_size, "H", self._ledger.seq_len, self._used() + self._ledger.seq_len)
        if weights.ndim != 4 or (weights.shape[0], "H", *weights.shape[2:]) != needed:
            raise ValueError(f"weights have shape {weights.shape}, needed (batch, heads, queries, keys) = {needed}")
        if weights.dtype.kind != "f" or not np.isfinite(weights).all():
            raise ValueError("attention weights must be finite numbers: nothing was counted")
        self._observed[layer] = attention_received(weights, self._ledger.n_new)

    def scores(self, layer_idx=0):
        """The attention that each of `residents` has received, (B, R); 0 where there is none."""
        layer = self._layer(layer_idx)
        return np.take_along_axis(self._score[layer], self._order(layer), axis=1)

    def abandon(self):
        """Drop what is pending, and what was observed of it."""
        self._observed.clear()
        super().abandon()

    def _allocate(self, num_slots):
        super()._allocate(num_slots)
        self._score = np.zeros(self._pos.shape)

    def _first_slots(self):
        return self.budget

    def _options(self):
        return {**super()._options(), "budget": self.budget, "recent": self.recent}

    def _arrays(self):
        return {**super()._arrays(), "scores": self._score}

    def _possible(self, pos, length):
        """Can these (slots,) be the positions of a row of so many tokens?"""
        held = min(self.budget, length)  # they stand in the first slots; the newest are among them
        newest = range(max(length - self.recent, 0), length)
        kept = set(pos[:held].tolist())
        return len(kept) == held and set(newest) <= kept <= set(range(length)) and (pos[held:] == -1).all()

    def _keep_pass(self):
        unseen = [layer for layer in self.pending_layers if layer not in self._observed]
        if unseen:
            raise CacheStateError(
                f"layers {unseen} were updated and nobody observed their attention: whoever attends must call "
                "observe(layer_idx, weights) before advance(); a CachedAttention does it in self.attend")
        super()._keep_pass()
        self._observed.clear()

    def _take_in(self, layer_idx, key, value, n_new):
        used = self._used()
        received = self._observed.get(layer_idx, np.zeros((self.batch_size, used + key.shape[2])))
        for row, (start, count) in enumerate(zip(self._ledger.lengths, n_new)):
            pos, score = self._pos[layer_idx, row], self._score[layer_idx, row]
            score[:used] += received[row, :used]
            new_pos, new_score = start + np.arange(count), received[row, used : used + count]
            stays = who_stays(np.append(pos, new_pos), np.append(score, new_score), self.budget, self.recent)
            slots, newcomers = change_tenants(pos, score, stays, new_pos, new_score)
            self._put(layer_idx, row, slots, key[row][:, newcomers], value[row][:, newcomers], new_pos[newcomers])

    def _forget(self, kept, stored):
        for row, (keep, have) in enumerate(zip(kept, stored)):
            if 0 < keep < have:
                raise NotImplementedError(
                    f"row {row} cannot go back from {have} tokens to {keep}: what the later ones looked at is in the "
                    "scores, and what they drove out is gone. clone() before you try tokens, truncate to 0, or use "
                    "SlidingWindowKVCache(spare=...)")
        super()._forget(kept, stored)
        self._score[self._pos < 0] = 0

    def _gather(self, rows):
        super()._gather(rows)
        self._score[...] = self._score[:, rows]


# %% cell 64 (22-quantize)
LARGEST = float(np.finfo(np.float32).max)


def float32_above(step):
    """float64 -> float32, the nearest that is not smaller: a step so small that it would become 0 stays a step."""
    near = step.astype(np.float32)
    return np.where(near < step, np.nextafter(near, np.float32(np.inf)), near)


def quantize(x, axis, bits):
    """Codes from 0 to 2**bits - 1, and for each group along `axis` its step and its smallest number.

    x -> codes uint8 of its shape; scale and low float32, with 1 along axis. low + codes * scale is off by at most half
    a step in each number, and not at all where a group is constant. x must be finite in float32.

    >>> codes, scale, low = quantize(np.array([1, 1.4, 3.1, 4]), axis=0, bits=2)
    >>> codes.tolist(), scale.tolist(), low.tolist()
    ([0, 0, 2, 3], [1.0], [1.0])
    """
    x = np.asarray(x, np.float64)
    low, high = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
    scale = float32_above((high - low) / (2**bits - 1))
    codes = np.rint((x - low) / np.where(scale > 0, scale, 1))
    return codes.astype(np.uint8), scale.astype(np.float32), low.astype(np.float32)


def dequantize(codes, scale, low):
    """The numbers that the codes stand for, float32.

    >>> dequantize(np.array([0, 0, 2, 3], np.uint8), np.float32(1), np.float32(1)).tolist()
    [1.0, 1.0, 3.0, 4.0]
    """
    if np.max(scale, initial=0) > 1e30:  # so many steps may not fit in float32
        scale = scale.astype(np.float64)
    x = codes * scale
    x += low
    return x if x.dtype == np.float32 else np.clip(x, -LARGEST, LARGEST).astype(np.float32)


# %% cell 67 (22-pack)
def pack(codes, bits):
    """Codes below 2**bits, (..., n) uint8 -> (..., ceil(n * bits / 8)) bytes; the first of a byte in its lowest bits.

    >>> pack(np.array([5, 12, 7], np.uint8), bits=4).tolist()
    [197, 7]
    """
    per_byte = 8 // bits
    missing = -codes.shape[-1] % per_byte
    if missing:  # the last byte is filled up with zeros
        codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], missing), np.uint8)], axis=-1)
    packed = np.zeros((*codes.shape[:-1], codes.shape[-1] // per_byte), np.uint8)
    for i in range(per_byte):
        packed |= codes[..., i::per_byte] << (bits * i)
    return packed


def unpack(packed, bits, count):
    """The first `count` codes of each row of bytes: (..., bytes) -> (..., count) uint8.

    >>> unpack(np.array([197, 7], np.uint8), bits=4, count=3).tolist()
    [5, 12, 7]
    """
    if bits == 8:
        return packed[..., :count]
    per_byte = 8 // bits
    codes = np.empty((*packed.shape, per_byte), np.uint8)
    for i in range(per_byte):
        codes[..., i] = packed >> (bits * i) & (2**bits - 1)
    return codes.reshape(*packed.shape[:-1], packed.shape[-1] * per_byte)[..., :count]


# %% cell 70 (22-quantized-bytes)
def quantized_bytes(num_tokens, num_heads, head_dim, bits, group_size):
    """Bytes of one layer's keys and values in whole groups: packed codes, and a float32 scale and low per group.

    >>> quantized_bytes(num_tokens=1, num_heads=1, head_dim=64, bits=4, group_size=32)
    96
    """
    numbers = 2 * num_tokens * num_heads * head_dim
    return numbers * bits // 8 + numbers // group_size * 8


# %% cell 76 (22-groups)
def complete_groups(waiting, new, group_size):
    """Old waiting tokens and new ones: the groups that are whole now, (H, N, G, D), and what waits on (H, R < G, D).

    waiting (H, W < G, D), new (H, T, D), G = group_size.

    >>> groups, waiting = complete_groups(np.zeros((1, 2, 4)), np.ones((1, 3, 4)), group_size=3)
    >>> groups.shape, waiting.shape
    ((1, 1, 3, 4), (1, 2, 4))
    """
    tokens = np.concatenate([waiting, new], axis=1)
    whole = tokens.shape[1] // group_size
    frozen, waiting = np.split(tokens, [whole * group_size], axis=1)
    return frozen.reshape(len(tokens), whole, group_size, tokens.shape[2]), waiting


# %% cell 79
@dataclass(frozen=True)
class GroupFormat:
    """How keys, or values, of one head are stored: units of whole groups, each with a scale and a low.

    axis "token": a group is group_size numbers of one token; "channel": one channel of group_size tokens.
    """

    head_dim: int
    bits: int
    axis: str
    group_size: int

    @property
    def tokens(self):
        """Tokens in a unit."""
        return self.group_size if self.axis == "channel" else 1

    @property
    def unit(self):
        """The shape of a unit, and that of its scales."""
        if self.axis == "channel":
            return (self.group_size, self.head_dim), (1, self.head_dim)
        return (self.head_dim // self.group_size, self.group_size), (self.head_dim // self.group_size, 1)

    def layout(self, batch_size, num_heads, num_units, num_waiting):
        """Name, shape and dtype of each array; those of four-byte numbers first, so that they are aligned."""
        heads, (unit, groups) = (batch_size, num_heads), self.unit
        return {"scale": ((*heads, num_units, math.prod(groups)), np.float32),
                "low": ((*heads, num_units, math.prod(groups)), np.float32),
                "waiting": ((*heads, num_waiting, self.head_dim), np.float32),
                "codes": ((*heads, num_units, -(-math.prod(unit) * self.bits // 8)), np.uint8)}

    def room(self, num_slots):
        """Units, and waiting tokens at most, of a row of num_slots tokens."""
        return num_slots // self.tokens, min(self.tokens - 1, num_slots)

    def nbytes(self, *sizes):
        """Bytes of all arrays: sizes as in layout."""
        return sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in self.layout(*sizes).values())

    def encode(self, x):
        """x (..., *unit) -> codes (..., bytes), scale and low (..., groups)."""
        outer, (unit, groups) = x.shape[:-2], self.unit
        codes, scale, low = quantize(x, -2 if self.axis == "channel" else -1, self.bits)
        flat = (*outer, math.prod(groups))
        return pack(codes.reshape(*outer, math.prod(unit)), self.bits), scale.reshape(flat), low.reshape(flat)

    def decode(self, codes, scale, low):
        """The way back: codes (..., N, bytes) -> (..., N * tokens, D) float32."""
        outer, (unit, groups) = codes.shape[:-1], self.unit
        codes = unpack(codes, self.bits, math.prod(unit)).reshape(*outer, *unit)
        x = dequantize(codes, scale.reshape(*outer, *groups), low.reshape(*outer, *groups))
        return x.reshape(*outer[:-1], outer[-1] * self.tokens, self.head_dim)


# %% cell 80
def quantized_formats(head_dim, bits, key_axis, group_size):
    """The formats of keys and of values; ValueError for what cannot be stored so.

    group_size None: 32; where 32 does not divide head_dim, a token's groups are the whole head. Values are always in
    token groups: of group_size numbers, or of the whole head where channel groups have more tokens than the head has
    numbers.
    """
    if isinstance(bits, bool) or not isinstance(bits, (int, np.integer)) or bits not in (8, 4, 2):
        raise ValueError(f"bits must be 8, 4 or 2, got {bits!r}")
    if key_axis not in ("token", "channel"):
        raise ValueError(f"key_axis must be 'token' or 'channel', got {key_axis!r}")
    if group_size is None:
        numbers = 32 if head_dim % 32 == 0 else head_dim
        group_size = 32 if key_axis == "channel" else numbers
    else:
        group_size = whole_number("group_size", group_size)
        numbers = min(group_size, head_dim) if key_axis == "channel" else group_size
    if head_dim % numbers:
        raise ValueError(f"group_size={group_size} does not divide head_dim={head_dim} into whole groups: "
                         "choose a divisor of head_dim")
    keys = GroupFormat(head_dim, int(bits), key_axis, group_size)
    return keys, GroupFormat(head_dim, int(bits), "token", numbers)


# %% cell 81
class GroupedTokens:
    """The keys, or the values, of one layer: frozen units (B, H, N, ...) and waiting tokens (B, H, < G, D).

    All arrays are parts of one block of bytes, which is handed in. The lengths of the rows are told, not kept. What
    is not a token is zero.
    """

    def __init__(self, form, block, batch_size, num_heads, num_slots):
        self.form, start = form, 0
        for name, (shape, dtype) in form.layout(batch_size, num_heads, *form.room(num_slots)).items():
            stop = start + math.prod(shape) * np.dtype(dtype).itemsize
            setattr(self, name, block[start:stop].view(dtype).reshape(shape))
            start = stop

    def arrays(self):
        """All that is stored, by name: units of codes, scale and low, and what is waiting."""
        return {name: getattr(self, name) for name in ("codes", "scale", "low", "waiting")}

    def units(self):
        """What frozen units are made of: codes, scale and low."""
        return self.codes, self.scale, self.low

    def append(self, new, lengths, n_new):
        """Take in each row's first n_new tokens of new (B, H, T, D), behind the `lengths` that are there."""
        if self.form.tokens == 1:  # nothing waits, and all rows are quantised at once
            units = new.reshape(*new.shape[:3], *self.form.unit[0])
            return self._freeze(slice(None), units, lengths, n_new)
        for row, (length, count) in enumerate(zip(lengths, n_new)):
            first, old = divmod(length, self.form.tokens)
            units, rest = complete_groups(self.waiting[row, :, :old], new[row, :, :count], self.form.tokens)
            if units.shape[1]:
                self._freeze(slice(row, row + 1), units[None], [first], [units.shape[1]])
            self._wait(row, rest)

    def _freeze(self, rows, units, first, count):
        for array, new in zip(self.units(), self.form.encode(units)):
            write_tokens(array[rows], new, first, count)

    def _wait(self, row, tokens):
        self.waiting[row, :, : tokens.shape[1]] = tokens
        self.waiting[row, :, tokens.shape[1] :] = 0

    def read(self, lengths, rows=slice(None), waiting=None):
        """All tokens of the rows that `lengths` belong to: (B, H, longest, D) float32, zero where a row is shorter.

        waiting: a copy of those that waited when the rows had these lengths, if they have been given more since.
        """
        num_units, tokens = max(lengths) // self.form.tokens, self.form.tokens
        frozen = self.form.decode(*(array[rows, :, :num_units] for array in self.units()))
        if tokens == 1:
            return frozen
        waiting, shape = self.waiting[rows] if waiting is None else waiting, frozen.shape
        x = np.zeros((*shape[:2], max(lengths), shape[3]), np.float32)
        x[:, :, : shape[2]] = frozen
        for row, length in enumerate(lengths):
            x[row, :, length - length % tokens : length] = waiting[row, :, : length % tokens]
        return x

    def forget(self, kept, stored):
        """Cut each row from `stored` to `kept` tokens. What is left of a group that was whole waits, as it was read."""
        tokens = self.form.tokens
        for row, (keep, have) in enumerate(zip(kept, stored)):
            (first, left), last = divmod(keep, tokens), have // tokens
            if first < last and left:
                rest = self.form.decode(*(array[row, :, first : first + 1] for array in self.units()))[:, :left]
            else:
                rest = self.waiting[row, :, :left].copy()
            for array in self.units():
                array[row, :, first:last] = 0
            if keep < have:
                self._wait(row, rest)

    def gather(self, rows):
        """Row r becomes what row rows[r] was."""
        for array in self.arrays().values():
            array[...] = array[rows]


# %% cell 82
class QuantizedKVCache:
    """The keys and values of one layer in 8, 4 or 2 bits: update and get_kv as in lesson 17's LayerKVCache.

    Values in token groups; keys in token groups, or (key_axis="channel") in channel groups of group_size tokens, of
    which less than one group waits in float32. A group is frozen once: the stored bytes do not depend on the
    chunks in which tokens came. A number is off by at most half its group's step, (largest - smallest) / (2**bits - 1).
    group_size must divide head_dim; default 32. Source: Liu et al. 2024 (KIVI), section 3.

    >>> cache = QuantizedKVCache(1, 64, 2, 32, bits=4)
    >>> cache.update(np.ones((1, 2, 3, 32)), np.zeros((1, 2, 3, 32)))
    >>> key, value = cache.get_kv(0)
    >>> key.shape, cache.seq_lens, cache.memory_bytes(), round(cache.savings_vs_fp32(), 2)
    ((2, 3, 32), [3], 6144, 5.33)
    """

    def __init__(self, batch_size, max_seq_len, num_heads, head_dim, bits=8, key_axis="token", group_size=None):
        sizes = dict(batch_size=batch_size, max_seq_len=max_seq_len, num_heads=num_heads, head_dim=head_dim)
        for name, value in sizes.items():
            setattr(self, name, whole_number(name, value))
        formats = quantized_formats(self.head_dim, bits, key_axis, group_size)
        self.bits, self.key_axis, self.group_size = formats[0].bits, key_axis, formats[0].group_size
        heads = self.batch_size, self.num_heads
        self._keys, self._values = (
            GroupedTokens(form, np.zeros(form.nbytes(*heads, *form.room(self.max_seq_len)), np.uint8), *heads,
                          self.max_seq_len)
            for form in formats)
        self._lengths = [0] * self.batch_size

    @property
    def seq_lens(self):
        """Tokens of each row, as a list. Shorter ones may be assigned: truncate(lengths)."""
        return list(self._lengths)

    @seq_lens.setter
    def seq_lens(self, lengths):
        self.truncate(lengths)

    def update(self, k, v, n_new=None):
        """Append T tokens, k and v (B, H, T, D), at each row's own length. A call that raises changes nothing."""
        sizes = self.batch_size, self.num_heads, self.head_dim, np.dtype(np.float32)
        k, v = check_tokens("k", k, *sizes), check_tokens("v", v, *sizes)
        n_new = check_chunk(k, v, n_new, self._lengths, self.max_seq_len)
        self._keys.append(k, self._lengths, n_new)
        self._values.append(v, self._lengths, n_new)
        self._lengths = [length + count for length, count in zip(self._lengths, n_new)]

    def get_kv(self, row):
        """Keys and values of one row, (H, len, D) each, float32 and the caller's own."""
        row = check_row(row, self.batch_size)
        return tuple(part.read([self._lengths[row]], slice(row, row + 1))[0] for part in (self._keys, self._values))

    def truncate(self, lengths):
        """Keep only the first tokens of each row; they read as before. A group that is cut waits for new tokens, and
        is frozen anew, from the numbers that were read, when it is whole again."""
        kept = lengths_to_keep(lengths, self._lengths)
        self._keys.forget(kept, self._lengths)
        self._values.forget(kept, self._lengths)
        self._lengths = kept

    def reset(self):
        """Empty again: no bytes, no lengths."""
        self.truncate(0)

    def arrays(self):
        """All that is stored: of keys and of values, codes, scales, lows, and what waits."""
        return [*self._keys.arrays().values(), *self._values.arrays().values()]

    def memory_bytes(self):
        """Bytes of all arrays, full or empty: codes, scales, lows, and room for the keys that wait."""
        return sum(array.nbytes for array in self.arrays())

    def savings_vs_fp32(self):
        """How many times as many bytes float32 would take, for as many tokens."""
        return 8 * self.batch_size * self.num_heads * self.max_seq_len * self.head_dim / self.memory_bytes()


# %% cell 87
def outlier_keys(num_tokens, head_dim=32, outliers=(5, 20), size=12.0, seed=0):
    """Keys and values (1, 1, T, D) of random numbers; in the keys, the channels `outliers` are large in every token."""
    key, value = np.random.default_rng(seed).standard_normal((2, 1, 1, num_tokens, head_dim), dtype=np.float32)
    key[..., list(outliers)] += np.float32(size)
    return key, value


def key_error(key, value, bits, key_axis, group_size=32):
    """How far keys come back off, on average, from a QuantizedKVCache with groups along that axis."""
    cache = QuantizedKVCache(1, key.shape[2], *key.shape[1::2], bits, key_axis, group_size)
    cache.update(key, value)
    return float(np.abs(cache.get_kv(0)[0] - key[0]).mean())


# %% cell 95 (22-mix-codes)
def score_codes(query, codes, scale, low):
    """query @ key.T for keys low + codes * scale: query (..., T, D), codes (..., S, D), scale, low (..., S) -> (..., T, S).

    >>> score_codes(np.ones((1, 2)), np.array([[0.0, 3], [1, 1]]), np.array([10.0, 1]), np.array([0.0, 5]))
    array([[30., 12.]])
    """
    scores = query @ codes.swapaxes(-1, -2)
    scores *= scale[..., None, :]
    scores += np.add.reduce(query, axis=-1, keepdims=True) * low[..., None, :]
    return scores


def score_channels(query, codes, scale, low):
    """The same for channel groups: codes (..., N, G, D), scale and low (..., N, D) -> (..., T, N * G)."""
    scaled = query[..., None, :, :] * scale[..., None, :]  # (..., N, T, D)
    scores = codes @ scaled.swapaxes(-1, -2)  # (..., N, G, T)
    scores += (low @ query.swapaxes(-1, -2))[..., None, :]
    return scores.reshape(*query.shape[:-2], codes.shape[-3] * codes.shape[-2], query.shape[-2]).swapaxes(-1, -2)


def mix_codes(weights, codes, scale, low):
    """weights @ value for values low + codes * scale: weights (..., T, S), codes (..., S, D), scale, low (..., S) -> (..., T, D).

    >>> mix_codes(np.array([[0.5, 0.25]]), np.array([[0.0, 4], [1, 1]]), np.array([1.0, 8]), np.array([0.0, 4]))
    array([[3., 5.]])
    """
    mixed = (weights * scale[..., None, :]) @ codes
    mixed += weights @ low[..., :, None]
    return mixed


# %% cell 98
class CodedTensor(Tensor):
    """Keys or values of one layer, (B, H, S + T, D): S past tokens as they are stored, and T new ones, as they came.

    `data` decodes them, once, if somebody asks. buffer: room for the codes of one layer in float32.
    """

    _decoded = None

    def __init__(self, part, lengths, new, buffer):
        self.part, self.lengths, self.new, self.buffer = part, lengths, new, buffer
        self.waiting = part.waiting.copy()  # frozen units stay as they are; these change with the next commit

    @property
    def data(self):
        if self._decoded is None:
            past = self.part.read(self.lengths, waiting=self.waiting)
            for row, length in enumerate(self.lengths):
                past[row, :, length:] = 0  # a shorter row may have been given more since
            self._decoded = np.concatenate([past, self.new], axis=2)
        return self._decoded

    def _codes(self):
        """Codes as float32 in the buffer, scale and low: (B, H, units, ...)."""
        form, num_units = self.part.form, max(self.lengths) // self.part.form.tokens
        codes, *scale_and_low = (array[:, :, :num_units] for array in self.part.units())
        codes = unpack(codes, form.bits, math.prod(form.unit[0]))
        numbers = self.buffer[: codes.size].reshape(codes.shape)
        np.copyto(numbers, codes)
        return numbers, *scale_and_low

    def _by_group(self):
        """The same for token groups, each group like a head of its own: (B, H, groups, S, numbers), (B, H, groups, S)."""
        codes, *scale_and_low = self._codes()
        codes = codes.reshape(*codes.shape[:3], *self.part.form.unit[0]).swapaxes(2, 3)
        return codes, *(np.ascontiguousarray(array.swapaxes(2, 3)) for array in scale_and_low)  # few, and used often

    def scores(self, query):
        """query (B, H, T', D) @ the keys, transposed: (B, H, T', S + T)."""
        past, form = max(self.lengths), self.part.form
        scores = np.zeros((*query.shape[:-1], past + self.new.shape[2]), np.float32)
        scores[..., past:] = query @ self.new.swapaxes(-1, -2)
        if form.axis == "token":
            grouped = query.reshape(*query.shape[:3], *form.unit[0]).swapaxes(2, 3)  # (B, H, groups, T', numbers)
            np.add.reduce(score_codes(grouped, *self._by_group()), axis=2, out=scores[..., :past])
            return scores
        codes, scale, low = self._codes()
        frozen = score_channels(query, codes.reshape(*codes.shape[:3], *form.unit[0]), scale, low)
        scores[..., : frozen.shape[-1]] = frozen
        for row, length in enumerate(self.lengths):
            waiting = self.waiting[row, :, : length % form.tokens]
            scores[row, ..., length - waiting.shape[1] : length] = query[row] @ waiting.swapaxes(-1, -2)
        return scores

    def mixed(self, weights):
        """weights (B, H, T', S + T) @ the values: (B, H, T', D)."""
        past, new = np.split(weights, [max(self.lengths)], axis=-1)
        grouped = mix_codes(past[:, :, None], *self._by_group()).swapaxes(2, 3)  # (B, H, T', groups, numbers)
        return grouped.reshape(*past.shape[:-1], -1) + new @ self.new


# %% cell 99
class QuantizedModelKVCache(PendingKVCache):
    """A KV cache in 8, 4 or 2 bits for all layers of a model: see QuantizedKVCache for bits, key_axis, group_size.

    What it hands out is float32; attention works in a buffer of one layer's keys in float32, which nbytes does not count.
    truncate and rollback cut frozen groups: what is left of one reads as before, waits,
    and is frozen anew, from the numbers that were read, when the group is whole again.

    >>> from tinytorch.generation.kv_cache import enable_kv_cache
    >>> model = random_gpt()
    >>> cache = enable_kv_cache(model, factory=QuantizedModelKVCache, bits=4, key_axis="channel", group_size=8)
    >>> len(model.generate([1, 2, 3], 5)), cache.seq_pos, round(cache.savings_vs_fp32(), 2)
    (8, 7, 2.33)
    """

    def __init__(self, batch_size, max_seq_len, num_layers, num_heads, head_dim, *,
                 bits=8, key_axis="token", group_size=None, strict=False, tracker=None):
        self._formats = quantized_formats(whole_number("head_dim", head_dim), bits, key_axis, group_size)
        super().__init__(batch_size, max_seq_len, num_layers, num_heads, head_dim, strict=strict, tracker=tracker)
        self.bits, self.key_axis, self.group_size = self._formats[0].bits, key_axis, self._formats[0].group_size

    @classmethod
    def from_config(cls, config, tracker=None, **options):
        """A cache of the sizes of a KVCacheConfig; config.dtype has no meaning here, `bits` is an option."""
        return cls(config.batch_size, config.max_context_length, config.num_layers, config.num_kv_heads,
                   config.head_dim, tracker=tracker, **options)

    def _bytes(self, num_slots):
        heads = self.batch_size, self.num_heads
        return [form.nbytes(*heads, *form.room(num_slots)) for form in self._formats]  # of one layer's keys, values

    def _store_bytes(self, shape):
        return self.num_layers * sum(self._bytes(shape[4]))

    def _new_store(self, shape):
        return np.zeros((self.num_layers, sum(self._bytes(shape[4]))), np.uint8)

    def _allocate(self, num_slots):
        super()._allocate(num_slots)
        key_bytes = self._bytes(num_slots)[0]
        self._layers = [
            [GroupedTokens(form, part, self.batch_size, self.num_heads, num_slots)
             for form, part in zip(self._formats, np.split(block, [key_bytes]))]
            for block in self._store
        ]
        self._buffer = np.empty(self.batch_size * self.num_heads * num_slots * self.head_dim, np.float32)

    def savings_vs_fp32(self):
        """How many times as many bytes float32 would take, for as many tokens."""
        return self.config.calculate_size() / self.nbytes

    def get_memory_usage(self):
        """As in KVCache; used_bytes counts frozen groups with their scales, and waiting tokens in float32."""
        used = sum(form.nbytes(1, self.num_heads, *divmod(length, form.tokens))
                   for form in self._formats for length in self.seq_lens)
        return {**super().get_memory_usage(), "used_bytes": self.num_layers * used}

    def _options(self):
        return {"bits": self.bits, "key_axis": self.key_axis, "group_size": self.group_size, "strict": self.strict,
                "tracker": self._tracker}

    def _arrays(self):
        return {f"{layer}.{part}.{name}": array for layer, parts in enumerate(self._layers)
                for part, grouped in zip(("key", "value"), parts) for name, array in grouped.arrays().items()}

    def _impossible(self, state):
        tokens = {"key": self._formats[0].tokens, "value": self._formats[1].tokens}  # of a unit
        for path in self._arrays():
            _, part, name = path.split(".")
            for row, length in enumerate(state["lengths"].tolist()):
                units, waiting = divmod(length, tokens[part])
                if state[path][row, :, waiting if name == "waiting" else units :].any():
                    return f"{path} holds numbers beyond the {length} tokens of row {row}"
        return None

    def update(self, layer_idx, key, value, n_new=None):
        """As in KVCache; key and value of the view are CodedTensors, whose numbers stay what they are until tokens are
        forgotten or rows reordered."""
        with self._lock:
            layer_idx, key, value, n_new = self._accept(layer_idx, key, value, n_new)
        self._pending[layer_idx] = key, value = key.copy(), value.copy()
        lengths = self._ledger.lengths
        pos = np.concatenate([self._slots(lengths), self.positions(n_new, key.shape[2])], axis=1)
        key, value = (CodedTensor(part, lengths, new, self._buffer)
                      for part, new in zip(self._layers[layer_idx], (key, value)))
        return KVView(key, value, pos)

    def attend(self, query, key, value, visible):
        """scaled_dot_product_attention of query (B, H, T, D) over what update returned, without decoding it."""
        query = query.data
        rows = fold_groups(query * (1 / math.sqrt(self.head_dim)), key.new)  # (B, H_kv, G * T, D)
        with self._lock:  # for the buffer
            scores = key.scores(rows).reshape(*query.shape[:-1], -1)
            weights = masked_softmax_array(scores, as_visible(visible, scores.shape))
            mixed = value.mixed(fold_groups(weights, key.new))
        return Tensor(mixed.reshape(query.shape), dtype=self.dtype)

    def _resident(self, layer_idx):
        lengths = self._ledger.lengths
        return *(part.read(lengths) for part in self._layers[layer_idx]), slot_positions(lengths)

    def _take_in(self, layer_idx, key, value, n_new):
        for part, new in zip(self._layers[layer_idx], (key, value)):
            part.append(new, self._ledger.lengths, n_new)

    def _forget(self, kept, stored):
        for part in (part for layer in self._layers for part in layer):
            part.forget(kept, stored)

    def _gather(self, rows):
        for part in (part for layer in self._layers for part in layer):
            part.gather(rows)


# %% cell 105 (22-state)
def cache_state(cache):
    """All that a cache needs to go on, as copies: {"key", "value": (L, B, H_kv, S, D), "lengths": (B,) int64}.

    A cache that does not keep each token as it came names arrays of its own, in the place of key and value.

    >>> {name: array.shape for name, array in cache_state(KVCache(1, 64, 2, 2, 8)).items()}
    {'key': (2, 1, 2, 0, 8), 'value': (2, 1, 2, 0, 8), 'lengths': (1,)}
    """
    if isinstance(cache, PendingKVCache):
        own = {name: array.copy() for name, array in cache._arrays().items()}
        return {**own, "lengths": np.array(cache.seq_lens, np.int64)}
    layers = [cache.get(layer_idx) for layer_idx in range(cache.num_layers)]
    return {
        "key": np.stack([key.numpy() for key, _ in layers]),
        "value": np.stack([value.numpy() for _, value in layers]),
        "lengths": np.array(cache.seq_lens, np.int64),
    }


# %% cell 108 (22-state-problem)
def state_problem(state, cache):
    """Why this cache cannot take that state, as a sentence that names the array; None if it can. Changes nothing."""
    lengths, rows = state.get("lengths", np.zeros(0)), cache.batch_size
    if lengths.dtype != np.int64 or lengths.shape != (rows,) or lengths.min() < 0:
        return f"lengths must count the tokens of {rows} rows, got {lengths.dtype} {lengths.tolist()}"
    longest = int(lengths.max())
    needed = state_layout(cache, longest)  # name -> (shape, dtype)
    if set(state) != {*needed, "lengths"}:
        return f"it holds {sorted(state)[:5]}, this cache needs {sorted(needed)[:5]} and lengths"
    for name, (shape, dtype) in needed.items():
        array = state[name]
        if array.shape != shape:
            return f"{name} has shape {array.shape}, this cache needs {shape}"
        if array.dtype != dtype:
            return f"{name} is {array.dtype}, this cache stores {dtype}"
        if not np.isfinite(array).all():
            return f"{name} holds a number that is not finite"
    if cache.capacity is not None and longest > cache.capacity:
        return f"it holds {longest} tokens, this cache has max_seq_len={cache.max_seq_len}"
    return cache._impossible(state) if isinstance(cache, PendingKVCache) else None


def state_layout(cache, longest):
    """The shape and dtype of each array, but for the lengths, in a state of this cache whose longest row has so many."""
    if isinstance(cache, PendingKVCache):
        return {name: (array.shape, array.dtype) for name, array in cache._arrays().items()}
    shape = cache.num_layers, cache.batch_size, cache.num_heads, longest, cache.head_dim
    return {"key": (shape, cache.dtype), "value": (shape, cache.dtype)}


# %% cell 112
TOKENS = "tokens as they came"


def state_kind(cache):
    """What a file says of its arrays. All caches that keep each token as it came say the same, and can swap files."""
    if not isinstance(cache, PendingKVCache):
        return TOKENS
    own = {name: value for name, value in cache._options().items() if name not in ("dtype", "strict", "tracker")}
    return f"{type(cache).__name__}({', '.join(f'{name}={value!r}' for name, value in own.items())})"


def save_cache(cache, path):
    """Write what a cache holds to a safetensors file, whole or not at all: a kill leaves the old file.

    CacheStateError while a pass is open. NotImplementedError for a cache that does not name its arrays.
    """
    if cache.pending_layers:
        raise CacheStateError(f"layers {cache.pending_layers} are pending: advance() or abandon(), then save")
    notes = {"format": "tinytorch KV cache", "kind": state_kind(cache), "max_seq_len": cache.max_seq_len}
    save_checkpoint(path, cache_state(cache), notes)


# %% cell 113
def cache_for(state, metadata, path):
    """An empty KVCache of the sizes that a file of tokens names."""
    kind = metadata.get("kind", TOKENS)
    if kind != TOKENS:
        raise ValueError(f"{path} is of a {kind}: make one, and load_cache(path, cache)")
    shape, longest = np.shape(state.get("key")), metadata.get("max_seq_len", "")
    if len(shape) != 5 or not longest.isdecimal():
        raise ValueError(f"{path} holds {sorted(state)[:5]}: no cache that save_cache wrote")
    num_layers, batch_size, num_heads, _, head_dim = shape
    return KVCache(batch_size, int(longest), num_layers, num_heads, head_dim, dtype=state["key"].dtype)


def fill(cache, state):
    """Put a state that fits in place of all that the cache holds; tokens as they came are one pass."""
    lengths = state["lengths"].tolist()
    if isinstance(cache, PendingKVCache):
        return cache._replace(state, lengths)
    cache.reset()
    if max(lengths):
        for layer_idx in range(cache.num_layers):
            cache.update(layer_idx, state["key"][layer_idx], state["value"][layer_idx], lengths)
        cache.advance()


def load_cache(path, cache=None):
    """Give a cache what is in a file that save_cache wrote, in place of all that it holds (pending, too); return it.

    Without a cache: a new KVCache of the saved sizes. One that keeps each token as it came takes the file of any other
    such, also with another max_seq_len; else class, sizes and options must be the same. What follows is bitwise what
    would have followed the cache that was saved. ValueError for a file that is damaged or does not fit; the cache is
    then as it was.
    """
    state, metadata = load_checkpoint(path)
    cache = cache_for(state, metadata, path) if cache is None else cache
    kind, own = metadata.get("kind", TOKENS), state_kind(cache)
    before = cache_state(cache)
    problem = state_problem(state, cache) if kind == own else f"it is of {kind}, this cache is of {own}"
    if problem:
        raise ValueError(f"{path} does not fit: {problem}. Nothing was loaded")
    try:
        fill(cache, state)
    except BaseException:  # a cache that cannot grow, a pool without blocks, Ctrl-C
        fill(cache, before)
        raise
    return cache


# %% cell 117
def take_bytes(file, num_bytes):
    """Take this many bytes of disk, as zeros, now: OSError if they are not there."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, num_bytes)
        return
    zeros = memoryview(bytes(min(num_bytes, 2**20)))  # macOS and Windows: write them
    for start in range(0, num_bytes, len(zeros)):
        file.write(zeros[: num_bytes - start])
    file.flush()


def mapped_zeros(shape, dtype, folder=None):
    """An array of zeros that lives in a file without a name in `folder`; the file goes when the array does."""
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    folder = tempfile.gettempdir() if folder is None else folder
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            take_bytes(file, num_bytes)
            return np.asarray(np.memmap(file, dtype, "r+", shape=shape))
    except OSError as error:
        reason = f"a cache of {num_bytes} bytes does not go into {folder}: {error.strerror or error}"
        raise OSError(error.errno, f"{reason}. Free some room there, or give another folder=") from error


class OffloadedKVCache(KVCache):
    """A KVCache whose store is a file, in `folder` or where the system keeps temporary files. Equal bit by bit.

    The file has no name, so nothing is left behind: not by close(), an exception, the end of the program or a kill. Its
    disk comes back when the cache is closed or forgotten, and nobody reads a view of it any more. nbytes counts disk.
    Some systems keep temporary files in memory (tmpfs): then give a folder.
    """

    def __init__(self, batch_size, max_seq_len, num_layers, num_heads, head_dim, *, folder=None, **options):
        self._folder = folder
        super().__init__(batch_size, max_seq_len, num_layers, num_heads, head_dim, **options)

    def _new_store(self, shape):
        return mapped_zeros(shape, self.dtype, self._folder) if math.prod(shape) else super()._new_store(shape)

    def _options(self):
        return {**super()._options(), "folder": self._folder}


# %% cell 123
class CacheReport(NamedTuple):
    """What one cache cost: bytes, largest error of a logit, perplexity, seconds for a step of one token per row."""

    name: str
    nbytes: int
    logit_error: float
    perplexity: float
    seconds: float


def run_text(model, ids, caches, chunk, timed):
    """Run ids (B, T) through each cache; name -> (logits (B, T, V), seconds of the fastest step of one token per row).

    The text is read in chunks, its last `timed` tokens one by one. The caches take turns, in an order that is shuffled
    for each token: what the machine does meanwhile, and what the one before left in its caches, comes to all.
    """
    first, seconds, rng = ids.shape[1] - timed, {name: [] for name in caches}, np.random.default_rng(0)
    with no_grad():
        pieces = {name: [prefill(model, ids[:, :first], cache, chunk=chunk).numpy()] for name, cache in caches.items()}
        for t in range(first, ids.shape[1]):
            for name in rng.permutation(list(caches)).tolist():
                start = time.perf_counter()
                pieces[name].append(model(ids[:, t : t + 1], cache=caches[name]).numpy())
                seconds[name].append(time.perf_counter() - start)
    return {name: (np.concatenate(pieces[name], axis=1), min(seconds[name])) for name in caches}


def compare_caches(model, ids, factories, chunk=16, timed=8):
    """Run the same text through each cache; print a table and return a CacheReport for each.

    ids (B, T + 1): T tokens are run, the last is only predicted. factories: name -> a function that makes a cache, as
    for enable_kv_cache; the errors count from the first of them.
    """
    num_heads, head_dim = stored_heads(model)
    sizes = dict(batch_size=len(ids), max_seq_len=ids.shape[1] - 1, num_layers=model.num_layers,
                 num_heads=num_heads, head_dim=head_dim)
    with ExitStack() as stack:
        caches = {name: stack.enter_context(factory(**sizes)) for name, factory in factories.items()}
        runs, nbytes = run_text(model, ids[:, :-1], caches, chunk, timed), {n: c.nbytes for n, c in caches.items()}
    reports, exact = [], next(iter(runs.values()))[0]
    print(f"{'cache':<20} {'bytes':>10} {'logit error':>12} {'perplexity':>11} {'ms per step':>12}")
    for name, (logits, seconds) in runs.items():
        perplexity = math.exp(cross_entropy(Tensor(logits), ids[:, 1:]).item())
        error = float(np.abs(logits - exact).max())
        reports.append(CacheReport(name, nbytes[name], error, perplexity, seconds))
        print(f"{name:<20} {nbytes[name]:>10,} {error:>12.3f} {perplexity:>11.2f} {1e3 * seconds:>12.2f}")
    return reports

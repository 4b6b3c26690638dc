# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   tinytorch:
#     lesson: "22"
# ---

# %% [markdown]
"""
# Lesson 22: Cache compression

**You build** caches that stay small: a window that slides and keeps its sinks, a cache that drops what nobody looks
at, keys and values in 8, 4 or 2 bits, and a cache in a file. Each takes the place of lesson 17's, and no other line of
the model changes.

**Needs** lessons 01, 04, 05, 07, 12, 13, 14, 17 and 21. **Exported** to `tinytorch.generation.cache_compression`.
**Time** 120 minutes. Long cells without a hole are given: read their docstrings, come back for the rest.
"""

# %%
#| default_exp generation.cache_compression
#| export
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

# %%
# Given, and not part of the package: what the checks and measurements below use.
from tinytorch.core.attention import attention_weights, scaled_dot_product_attention
from tinytorch.generation.kv_cache import enable_kv_cache
from tinytorch.models.llama import Llama, RotaryEmbedding
from tinytorch.profiling.profiler import measure_latency


def error_of(run, kind=ValueError):
    """The message of the error that `run()` raises; "" when it raises none."""
    try:
        run()
    except kind as error:
        return str(error)
    return ""


def store_tokens(cache, key, value, n_new=None):
    """One pass of a cache with one layer."""
    cache.update(0, key, value, n_new)
    cache.advance()


def count_up(batch_size, start, seq_len):
    """Keys (B, 1, T, 1) that are their own position, so that we can read off who is there; used as values, too."""
    return np.tile(np.arange(start, start + seq_len, dtype=np.float32)[:, None], (batch_size, 1, 1, 1))

# %% [markdown]
"""
## 1. A conversation that outgrows its cache

A conversation goes on; the cache of lesson 17 does not. It is full and says so. And long before that, each token
costs more than the one before, for it reads all of them.

*Predict:* Llama-3-8B has 32 layers and 8 key-value heads of 128 numbers. How much memory does a context of a million
tokens take in float16?
"""

# %% nbgrader={"grade": false, "grade_id": "22-measure-full", "locked": true, "schema_version": 3, "solution": false, "task": false}
if __name__ == "__main__":
    full, one = KVCache(1, 64, 1, 1, 1), count_up(1, 0, 1)
    store_tokens(full, count_up(1, 0, 64), count_up(1, 0, 64))
    print("token 65:", error_of(lambda: full.update(0, one, one)))
    for tokens in (4096, 131_072, 1_000_000):
        gigabytes = KVCacheConfig(32, tokens, 8, 128).calculate_size() / 1e9
        print(f"Llama-3-8B, float16, {tokens:>9,} tokens: {gigabytes:>6.1f} GB for one conversation")

# %% [markdown]
"""
Three ways out, and at the end one table of what they cost:

    fewer tokens     keep the newest, the first few, or those that attention looks at     sections 3 to 8
    fewer bits       keep all of them, with less than 32 bits per number                  sections 9 to 13
    another place    keep all of them as they are, on disk                                sections 14 and 15
    the table        bytes, time, and what the model still knows                          section 16
"""

# %% [markdown]
"""
## 2. While a pass is open

The first two ways change what is *stored*, so they need a rule for the pass itself: **while a pass is open, its tokens
stand aside, exactly as they came.** Attention sees what was kept of the past, and the whole new chunk. Only the commit
decides what stays:

    kept        2 3 4            a chunk of 3 comes        5 6 7
    update      its queries see  2 3 4 5 6 7               (by position, as far as the mask lets them)
    advance     now the cache takes in what it wants to keep of 5 6 7

Write what `update` shows, `key`, `value` and `pos`: the past, and behind it the chunk. `self._resident(layer_idx)` has
given the old key, value and positions; `new_pos` are those of the chunk. Key and value are (B, H, T, D), positions
(B, T).
"""

# %% nbgrader={"grade": false, "grade_id": "22-view", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
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
        ### BEGIN SOLUTION
        key = np.concatenate([old_key, key], axis=2)
        value = np.concatenate([old_value, value], axis=2)
        pos = np.concatenate([old_pos, new_pos], axis=1)
        ### END SOLUTION
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

# %%
class KeepsLast(PendingKVCache):
    """The smallest member, as an example: of each row it keeps the newest token, in its only slot."""

    def _first_slots(self):
        return 1

    def _resident(self, layer_idx):
        key, value = self._store[layer_idx]
        return key, value, np.array(self.seq_lens)[:, None] - 1

    def _take_in(self, layer_idx, key, value, n_new):
        for row, count in enumerate(n_new):
            if count:
                self._store[layer_idx, :, row, :, 0] = key[row, :, count - 1], value[row, :, count - 1]

# %% nbgrader={"grade": true, "grade_id": "22-view-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_view():
    """Oracle: the numbers that went in; each key is its own position, each value ten times that."""
    cache = KeepsLast(2, 16, 1, 1, 1)
    store_tokens(cache, count_up(2, 0, 3), 10 * count_up(2, 0, 3), n_new=[3, 1])
    chunk = count_up(2, 100, 3)
    view = cache.update(0, chunk, chunk + 1)
    got, expected = view.key.numpy()[0, 0, :, 0].tolist(), [2, 100, 101, 102]
    assert got != [2], "the chunk is missing: its tokens are hidden from themselves"
    assert got[-3:] == expected[-3:] and got != expected[1:], (
        f"row 0 holds token 2, a chunk of 3 comes: keys {got}, expected {expected}; "
        "was the old trimmed or overwritten before the chunk has read it?")
    assert view.pos.tolist() == [[2, 3, 4, 5], [0, 1, 2, 3]], (
        f"positions {view.pos.tolist()}, expected [[2, 3, 4, 5], [0, 1, 2, 3]]: of what is held, then of the chunk")
    got, expected = view.value.numpy()[:, 0, :, 0].tolist(), [[20, 101, 102, 103], [0, 101, 102, 103]]
    assert got == expected, f"values {got}, expected {expected}: old values and new ones, no keys"
    assert cache.seq_lens == [3, 1] and cache.get(0)[0].numpy().ravel().tolist() == [2, 0], "an open pass was stored"
    ### BEGIN HIDDEN TESTS
    cache.advance()
    assert cache.get(0)[0].numpy().ravel().tolist() == [102, 102], "after the commit the newest token stands there"
    wide = KeepsLast(1, 16, 2, 3, 4, dtype=np.float64)
    view = wide.update(1, np.ones((1, 3, 5, 4)), np.ones((1, 3, 5, 4)), n_new=[2])
    assert view.key.shape == view.value.shape == (1, 3, 6, 4), f"key {view.key.shape}, expected (1, 3, 1 + 5, 4)"
    assert view.pos.tolist() == [[-1, 0, 1, -1, -1, -1]], f"an empty slot, 2 tokens, padding: {view.pos.tolist()}"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_view()

# %% [markdown]
"""
## 3. A ring, and who never leaves

Mistral 7B looks back a fixed number of tokens: with a window of w, a token sees w of them, itself and the w - 1 before
it (Jiang et al., *Mistral 7B*, 2023, arXiv 2310.06825, section 2). What nobody can see need not be kept. The store
becomes a ring: a new token takes the slot of the oldest.
"""

# %% [markdown]
"""
But a model that was not trained so can break down when its *first* tokens leave. For Llama-2-13B, Xiao et al.
(*Efficient Streaming Language Models with Attention Sinks*, 2023, arXiv 2309.17453, table 1) report a perplexity of
5158 with the newest 1024 tokens, and 5.40 with the first 4 and the newest 1020. Their explanation: weights add up to 1,
and what a head has no use for it gives to tokens that everybody sees. They call these **sinks**. We pin them in the
first slots:

    sinks = 2, a ring of 4    position   0 1   2 3 4 5   6 7 8 9   10 ...
                              slot       0 1   2 3 4 5   2 3 4 5    2 ...

For each position, which slot?
"""

# %% nbgrader={"grade": false, "grade_id": "22-ring", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def ring_slots(positions, sinks, ring):
    """The slot of each position, as an array: the first `sinks` have slots of their own, the others share a ring.

    >>> ring_slots([0, 1, 2, 5, 6, 9, 10], sinks=2, ring=4).tolist()
    [0, 1, 2, 5, 2, 5, 2]
    """
    positions = np.asarray(positions)
    ### BEGIN SOLUTION
    return np.where(positions < sinks, positions, sinks + (positions - sinks) % ring)
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "22-ring-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def check_ring(sinks, ring, last=40):
    """Oracle: the slots in a list, handed out one after the other, round and round behind the sinks."""
    order = list(range(sinks)) + [sinks + turn % ring for turn in range(last)]
    got = ring_slots(np.arange(last), sinks, ring)
    assert got.shape == (last,), f"got shape {got.shape}, expected {(last,)}: one slot per position"
    got, expected = got.tolist(), order[:last]
    assert got[:sinks] == expected[:sinks], f"the {sinks} sinks stand in slots {got[:sinks]}, expected 0, 1, ..."
    assert not set(got[sinks:]) & set(range(sinks)), (
        f"sinks={sinks}, ring={ring}: got {got}; a later token takes a sink's slot, the sinks are overwritten")
    assert len(set(got[sinks:])) == ring, f"the ring has {len(set(got[sinks:]))} slots, expected {ring}: got {got}"
    assert got == expected, f"sinks={sinks}, ring={ring}: got {got}, expected {expected}"


def test_unit_ring():
    """The picture, and a ring without sinks."""
    check_ring(sinks=2, ring=4)
    check_ring(sinks=0, ring=3)
    ### BEGIN HIDDEN TESTS
    check_ring(sinks=5, ring=1)
    check_ring(sinks=3, ring=7)
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_ring()

# %% [markdown]
"""
## 4. What a chunk leaves behind

A prompt of 6,000 tokens comes to a ring of 4 in one chunk. Its queries read all that they may (section 2); then it is
committed, and most of it is gone at once. Of a chunk that starts at position 3, with the same ring and sinks:

    chunk index    0 1 2 3 4 5
    position       3 4 5 6 7 8      the newest 4 stay: chunk indices 2 3 4 5
"""

# %% [markdown]
"""
A chunk may bring sinks, too: one of 9 tokens at position 0 leaves 0 1 (sinks) and 5 6 7 8. No two that stay may
want the same slot. Which stay?
"""

# %% nbgrader={"grade": false, "grade_id": "22-chunk", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def survivors(start, count, sinks, ring):
    """Which of a row's `count` new tokens, the first at position `start`, are kept at the commit: their chunk indices.

    >>> survivors(3, 6, sinks=2, ring=4).tolist(), survivors(0, 9, sinks=2, ring=4).tolist()
    ([2, 3, 4, 5], [0, 1, 5, 6, 7, 8])
    """
    positions = start + np.arange(count)
    ### BEGIN SOLUTION
    return np.flatnonzero((positions < sinks) | (positions >= start + count - ring))
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "22-chunk-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def check_survivors(start, count, sinks, ring):
    """Oracle: a list, from which the oldest token behind the sinks is dropped as soon as it holds too many."""
    kept = []
    for position in range(start, start + count):
        kept.append(position)
        newer = [p for p in kept if p >= sinks]
        if len(newer) > ring:
            kept.remove(newer[0])
    stay = np.asarray(survivors(start, count, sinks, ring))
    expected, got = [p - start for p in kept], stay.tolist()
    what = f"{count} tokens from position {start}, sinks={sinks}, ring={ring}: got {got}, expected {expected}"
    assert stay.ndim == 1 and stay.dtype != bool, f"{what}; np.flatnonzero makes indices of True and False"
    assert got == expected or got != kept, f"{what}; these are positions, not chunk indices"
    assert len(got) <= len(expected), f"{what}; the window is too long, two tokens would want one slot"
    assert not got or got[-1] == count - 1, f"{what}; the newest token stays"
    assert len(got) == len(expected), f"{what}; was a sink forgotten, or is the window too short?"
    assert got == expected, what


def test_unit_chunk():
    """The picture; a chunk that fits; a chunk of nothing."""
    for start, count, sinks, ring in [(3, 6, 2, 4), (0, 9, 2, 4), (20, 3, 2, 4), (0, 3, 2, 4), (7, 0, 1, 2)]:
        check_survivors(start, count, sinks, ring)
    ### BEGIN HIDDEN TESTS
    for start, count, sinks, ring in [(1, 9, 4, 3), (0, 3, 4, 2), (2, 5, 3, 1), (100, 50, 3, 8)]:
        check_survivors(start, count, sinks, ring)
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_chunk()

# %% [markdown]
"""
## 5. The way back

Speculative decoding (lesson 24) tries some tokens and takes the wrong ones back. A ring cannot always follow: the new
tokens have taken the slots of old ones. Window 3, no sinks, ring of 4 slots, 9 tokens stored:

    resident          5 6 7 8
    back to 8         the next token stands at 8 and sees 6 7 and itself      all there: allowed
    back to 7         it sees 5 6 and itself                                  all there: allowed
    back to 6         it sees 4 5 and itself                                  4 is gone: refused
"""

# %% [markdown]
"""
Sinks count as well; and back to 0 is always possible. Which positions would the next token, at position `kept`,
have to see, and find gone? (Visible to it, besides itself: the sinks, and the window - 1 before it.)
"""

# %% nbgrader={"grade": false, "grade_id": "22-rollback", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def gone_positions(resident, kept, window, sinks):
    """The positions, in order, that the next token at position `kept` would see if they were not gone; [] if none.

    resident: a set of positions.

    >>> gone_positions({5, 6, 7, 8}, 7, window=3, sinks=0), gone_positions({5, 6, 7, 8}, 6, window=3, sinks=0)
    ([], [4])
    """
    ### BEGIN SOLUTION
    seen = [*range(min(sinks, kept)), *range(max(sinks, kept - window + 1), kept)]
    return [position for position in seen if position not in resident]
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "22-rollback-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def check_gone(resident, window, sinks, kepts):
    """Oracle: `visible_mask` of lesson 12, for one query."""
    for kept in kepts:
        visible = visible_mask([kept], np.arange(kept), window, sinks)[0]
        expected = [int(position) for position in np.flatnonzero(visible) if position not in resident]
        got = list(gone_positions(set(resident), kept, window, sinks))
        what = f"resident {resident}, window {window}, sinks {sinks}, back to {kept}: got {got}, expected {expected}"
        assert not set(got) & set(resident), f"{what}; these are not gone"
        assert all(0 <= p < kept for p in got), f"{what}; the text begins at 0, and {kept} itself is just coming"
        assert set(got) <= set(expected), (
            f"{what}; the next token does not look so far back: it sees window - 1 before it")
        assert set(got) >= {p for p in expected if p >= sinks}, f"{what}; it would see window - 1 before it"
        assert got == expected, f"{what}; sinks are seen as well"


def test_unit_rollback():
    """The picture, and a cache with sinks."""
    check_gone([5, 6, 7, 8], window=3, sinks=0, kepts=range(9, -1, -1))
    check_gone([0, 1, 6, 7, 8, 9], window=4, sinks=2, kepts=range(10, -1, -1))
    check_gone([1, 6, 7, 8, 9], window=4, sinks=2, kepts=[10])
    ### BEGIN HIDDEN TESTS
    check_gone([0, 1, 2, 10, 11, 12, 13, 14], window=2, sinks=3, kepts=range(15, -1, -1))
    check_gone([7], window=1, sinks=0, kepts=range(8, -1, -1))
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_rollback()

# %% [markdown]
"""
So a ring of exactly `window` slots holds one token more than the next one can see, and forgives one step back. Each
`spare` slot forgives one more.

*Predict.* 4 layers, 4 key-value heads of 32, float32. A full cache for 2048 tokens, and a window of 252 with 4 sinks
and no spare: bytes of each, after 2048 tokens? (Lesson 17's `kv_cache_bytes` is at hand.)
"""

# %% nbgrader={"grade": false, "grade_id": "22-predict-window", "locked": false, "schema_version": 3, "solution": true, "task": false}
# predicted_full_bytes = ...
# predicted_window_bytes = ...
### BEGIN SOLUTION
predicted_full_bytes = 2 * 4 * 4 * 32 * 2048 * 4
predicted_window_bytes = 2 * 4 * 4 * 32 * 256 * 4
### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "22-predict-window-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_predict_window():
    """Oracle: arrays of those shapes (L, 2, B, H_kv, slots, D), and their nbytes."""
    for name, got, slots in [("full", predicted_full_bytes, 2048), ("window", predicted_window_bytes, 4 + 252)]:
        expected = np.zeros((4, 2, 1, 4, slots, 32), np.float32).nbytes
        assert got == expected, f"{name}: got {got}, an array with {slots} slots has {expected} bytes" + (
            "; the sinks have slots, too" if got * 256 == expected * 252 else
            "; keys and values, both, of 4 bytes a number" if got * 2 == expected else "")


if __name__ == "__main__":
    test_unit_predict_window()

# %% [markdown]
"""
## 6. The window

Given, from your parts. `SlotKVCache` is for every cache with a fixed number of slots in which any token may stand;
`_pos` says which. `SlidingWindowKVCache` puts each survivor into its slot. It names its `window` and `sinks`, so the
`visible_mask` in lesson 17's `CachedAttention` hides what is in a slot and yet out of sight.
"""

# %%
#| export
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

# %%
#| export
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

# %%
# Given, and not part of the package: the oracle, and a layer that attends over a cache.
def band_attention(query, key, value, window, sinks):
    """Oracle: dense attention under an explicit band, float64; (B, H, T, D) each."""
    t = np.arange(query.shape[2])
    back = t[:, None] - t
    visible = (back >= 0) & ((back < window) | (t < sinks))
    scores = np.where(visible, query @ key.swapaxes(-1, -2) / query.shape[-1] ** 0.5, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ value


def attend_in_chunks(cache, query, key, value, chunks):
    """Attention of one layer over a cache, some tokens at a time: (B, H, T, D)."""
    mixed, start = [], 0
    for count in chunks:
        q, k, v = (part[:, :, start : start + count] for part in (query, key, value))
        positions = cache.positions(count)
        view = cache.update(0, k, v)
        visible = visible_mask(positions, view.pos, cache.window, cache.sinks)
        q = Tensor(q, dtype=cache.dtype)
        if cache.observe is not None:
            cache.observe(0, attention_weights(q, view.key, visible))
        mixed.append(scaled_dot_product_attention(q, view.key, view.value, visible).numpy())
        cache.advance()
        start += count
    return np.concatenate(mixed, axis=2)

# %% nbgrader={"grade": true, "grade_id": "22-window-test", "locked": true, "points": 5, "schema_version": 3, "solution": false, "task": false}
def check_window(window, sinks, chunks, spare=0):
    """A cache with this window against the dense band, and its memory against what it was when it was empty."""
    query, key, value = np.random.default_rng(window).standard_normal((3, 2, 2, sum(chunks), 4))
    cache = SlidingWindowKVCache(2, None, 1, 2, 4, window, sinks, spare=spare, dtype=np.float64)
    nbytes = cache.nbytes
    error = np.abs(attend_in_chunks(cache, query, key, value, chunks) - band_attention(query, key, value, window, sinks))
    wrong = np.flatnonzero(error.max(axis=(0, 1, 3)) > 1e-12).tolist()
    assert not wrong, (
        f"window {window}, sinks {sinks}, chunks {chunks}: tokens {wrong} differ from dense attention under the band; "
        "what did the ring keep, and was it trimmed before the chunk read it?")
    assert cache.seq_lens == [sum(chunks)] * 2, f"lengths {cache.seq_lens}, expected {sum(chunks)}: they go on counting"
    assert cache.nbytes == nbytes == cache.config.calculate_size(), f"{cache.nbytes} bytes, at first {nbytes}: it grew"


def test_unit_window():
    """Every window of 1 to 5 and 0 to 3 sinks, in chunks shorter and longer than the window; then rollback."""
    for window in (1, 2, 3, 5):
        for sinks in (0, 1, 3):
            check_window(window, sinks, [1] * 12)
            check_window(window, sinks, [2, 7, 1, 4])
    cache = SlidingWindowKVCache(1, None, 1, 1, 1, window=3, sinks=1, spare=2)
    store_tokens(cache, count_up(1, 0, 20), count_up(1, 0, 20))
    message = error_of(lambda: cache.rollback(4))
    assert "spare" in message and cache.seq_lens == [20], f"4 tokens back with spare=2: said {message!r}"
    cache.rollback(3)
    view = cache.update(0, count_up(1, 17, 1), count_up(1, 17, 1))
    got = view.key.numpy()[visible_mask([[17]], view.pos, 3, 1)[:, None, 0]].ravel().tolist()
    assert sorted(got) == [0, 15, 16, 17], f"3 tokens back, token 17 again: it sees {got}, expected [0, 15, 16, 17]"
    ### BEGIN HIDDEN TESTS
    check_window(4, 2, [9, 1, 1, 1, 5], spare=3)
    check_window(7, 0, [3, 3, 3, 3, 3])
    cache.reset()
    store_tokens(cache, count_up(1, 5, 2), count_up(1, 5, 2))
    cache.rollback(2)
    store_tokens(cache, count_up(1, 0, 9), count_up(1, 0, 9))
    got = cache.get(0)[0].numpy().ravel().tolist()
    assert got[0] == 0, f"a sink was rolled back and written again: the first key is {got[0]}, expected 0"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_window()

# %% [markdown]
"""
*Measure.* Bytes in use, and milliseconds for a token, of a model whose text grows. *Predict first:* from which length
on do the bytes of the window stay what they are?
"""

# %% nbgrader={"grade": false, "grade_id": "22-measure-window", "locked": true, "schema_version": 3, "solution": false, "task": false}
def show_window_cost(lengths=(128, 512, 2048), window=252, sinks=4):
    """Time one decode step and count the bytes in use, with all tokens and with a window, at growing length."""
    model = random_gpt(256, 128, 4, 4, max(lengths) + 1, num_kv_heads=4)
    sizes = (1, model.max_seq_len, 4, 4, 32)
    caches = {"full": KVCache(*sizes), "window": SlidingWindowKVCache(*sizes, window, sinks)}
    ids = np.arange(max(lengths))[None] % 256
    print(f"{'tokens':>6}   {'full: bytes':>12} {'ms':>6}   {'window: bytes':>13} {'ms':>6}")
    for before, length in zip((0, *lengths), lengths):
        cells = []
        for cache in caches.values():
            prefill(model, ids[:, before:length], cache, chunk=512)
            used = cache.get_memory_usage()["used_bytes"]

            def step(cache=cache):
                model(ids[:, :1], cache=cache)
                cache.rollback(1)

            with no_grad():
                seconds = measure_latency(step, repeats=5)
            cells.append((used, 1e3 * seconds))
        (full, full_ms), (few, few_ms) = cells
        print(f"{length:>6}   {full:>12,} {full_ms:>6.2f}   {few:>13,} {few_ms:>6.2f}")


if __name__ == "__main__":
    show_window_cost()

# %% [markdown]
"""
*Look back.* With a window of w, how far back can a model of L layers look in effect? (Each layer passes on what the one
below has seen: L * (w - 1) tokens. What is older than the window can still be known second hand; nobody can attend to
it.) And what if the window is as long as the text? (Then it sees what lesson 17's cache sees.)
"""

# %% [markdown]
"""
## 7. Where do the sinks stand?

A sink at position 0 and a query at position 10,000: how far are they apart? By the text 10,000, and one more with every
token, until it is more than the model ever saw in training. Xiao et al. (section 3.2) count *inside the cache*: behind
the tokens 0 1 2 3 (sinks) and 6 7 8 the next one stands not at position 9 but at 7. With window 4 and 4 sinks, for us:

    held              0 1 2 3 . 6 7 8   next 9        5 is in a slot, and out of sight: -1
    inside the cache  0 1 2 3 . 4 5 6   next 7
"""

# %% [markdown]
"""
This works only where keys are stored *before* a position went into them. The rotary embedding of lesson 21 can wait: it
turns queries and keys by an angle per position, and a score depends on the difference. `renumber=True` gives such
positions, and keys are turned by `view.pos` after reading: by `update` on a model, by ourselves in the check.
"""

# %%
def turned(x, positions, longest=8):
    """x (B, H, T, D) turned by lesson 21's rotary embedding at its positions (B, T)."""
    rotary = RotaryEmbedding(x.shape[-1], longest)
    return rotary.rotate(Tensor(x, dtype=x.dtype), np.asarray(positions)).numpy()

# %% nbgrader={"grade": true, "grade_id": "22-renumber-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_renumber():
    """Oracles: the paper's example; rotary attention, and a model of one layer, over what is held and nothing else."""
    cache = SlidingWindowKVCache(1, None, 1, 1, 8, window=4, sinks=4, renumber=True, dtype=np.float64)
    key = np.random.default_rng(0).standard_normal((1, 1, 300, 8))
    for t in range(299):
        store_tokens(cache, key[:, :, t : t + 1], key[:, :, t : t + 1])
    assert cache.positions(1).tolist() == [[7]] and cache.seq_lens == [299], (
        f"the next token stands at {cache.positions(1).tolist()}, expected [[7]]: behind 4 sinks and 3 others")
    query, view = key[:, :, -1:], cache.update(0, key[:, :, -1:], key[:, :, -1:])
    seen = np.flatnonzero(visible_mask([7], view.pos[0], cache.window, cache.sinks)[0])
    got = turned(query, [[7]]) @ turned(view.key.numpy(), view.pos)[:, :, seen].swapaxes(-1, -2)
    text = key[:, :, [0, 1, 2, 3, 296, 297, 298, 299]]
    expected = turned(query, [[7]]) @ turned(text, np.arange(8)[None]).swapaxes(-1, -2)
    assert got.shape == expected.shape, f"the next token sees {len(seen)} keys, expected 4 sinks, 3 others and itself"
    assert np.allclose(np.sort(got), np.sort(expected)), "scores: not those of the 8 tokens one behind the other"
    message = error_of(lambda: enable_kv_cache(random_gpt(), factory=SlidingWindowKVCache, window=4, renumber=True))
    assert "renumber" in message, "a GPT with learned positions and renumber=True: got no error, and wrong text"
    plain, streams = (Llama(64, 32, 1, 4, 16, keys_before_rotation=late, rng=np.random.default_rng(1)).eval()
                      for late in (False, True))
    enable_kv_cache(streams, factory=SlidingWindowKVCache, max_seq_len=None, window=4, sinks=2, renumber=True)
    for token in range(40):
        got = streams([[token]]).numpy()[:, -1]
    expected = plain([[0, 1, 36, 37, 38, 39]]).numpy()[:, -1]
    assert got.shape == expected.shape and np.allclose(got, expected, atol=1e-4), (
        f"token 40 of a Llama of 16 positions: off by {np.abs(got - expected).max():.3f} from a text of what is held")


if __name__ == "__main__":
    test_unit_renumber()

# %% nbgrader={"grade": false, "grade_id": "22-measure-sinks", "locked": true, "schema_version": 3, "solution": false, "task": false}
def show_sink_drift(lengths=(8, 64, 512, 4096, 32768), window=8, sinks=1):
    """Distance and rotary score between a query and the sink, the same two vectors at every length, both ways."""
    token = np.ones((1, 1, 1, 64), np.float32)
    print("tokens before     absolute: distance  score     renumbered: distance  score")
    caches = [SlidingWindowKVCache(1, None, 1, 1, 64, window, sinks, renumber=way) for way in (False, True)]
    for before, length in zip((0, *lengths), lengths):
        cells = []
        for cache in caches:
            chunk = np.broadcast_to(token, (1, 1, length - before, 64))
            store_tokens(cache, chunk, chunk)
            positions, view = cache.positions(1), cache.update(0, token, token)
            sink = int(np.flatnonzero(view.pos[0] == 0)[0])
            query, key = turned(token, positions, length + 1), turned(view.key.numpy(), view.pos, length + 1)
            score = query[0, 0, 0] @ key[0, 0, sink] / 8
            cells.append(f"{positions[0, 0]:>10} {score:>6.2f}")
            cache.abandon()
        print(f"{length:>13} {cells[0]:>27} {cells[1]:>27}")


if __name__ == "__main__":
    show_sink_drift()

# %% [markdown]
"""
By absolute positions the same two vectors get another score at every length; renumbered, they keep the one that they
had when the window was first full. It is not free: keys are rotated at every read, not once; and inside one long
chunk the positions still grow, by at most the chunk.

Our GPT *learned* its positions, and adds them before keys are made: renumbered, it would read keys whose old positions
no longer count, and so would a Llama that turns its keys before they are stored. `enable_kv_cache` refuses both.
`Llama(..., keys_before_rotation=True)` is the same model with the same weights, whose keys are stored plain. Only a
renumbered window turns them when it is read, so every other cache refuses this one.
"""

# %% [markdown]
"""
*Predict.* Both models were made for 64 positions, and get 1000 tokens, one by one, through a window of 28 and 4 sinks.
At which token does the one with absolute positions stop? Where does the last token of the other one stand?
"""

# %% nbgrader={"grade": false, "grade_id": "22-measure-stream", "locked": true, "schema_version": 3, "solution": false, "task": false}
def show_stream(tokens=1000, window=28, sinks=4):
    """Run a Llama of 64 positions token by token on a window of any length, both ways, as far as it goes."""
    print("positions     tokens run   last position   cache bytes: first, last")
    for renumber in (False, True):
        model = Llama(64, 32, 2, 4, 64, keys_before_rotation=renumber, rng=np.random.default_rng(0)).eval()
        cache = SlidingWindowKVCache(1, None, 2, 4, 8, window, sinks, renumber=renumber)
        enable_kv_cache(model, cache=cache)
        first, stop = cache.nbytes, ""
        try:
            for t in range(tokens):
                position = cache.positions(1)[0, 0]
                model([[t % 64]])
        except ValueError as error:
            stop, position = f"stopped: {error}", position - 1
        name = "renumbered" if renumber else "absolute"
        print(f"{name:<13} {cache.seq_pos:>10} {position:>15} {first:>13,} {cache.nbytes:>8,}   {stop}")


if __name__ == "__main__":
    show_stream()

# %% [markdown]
"""
The renumbered model goes on for as long as we let it. It is no longer memory: what left the window is gone, and
`generate` still counts the whole text against max_seq_len; a stream calls the model itself, as above. A prompt comes
in chunks that fit behind sinks and window: `prefill(model, ids, cache, chunk=32)`.
"""

# %% [markdown]
"""
## 8. Keep what is looked at

A window drops what is old, important or not. Zhang et al. (*H2O: Heavy-Hitter Oracle*, 2023, arXiv 2306.14048,
section 4) keep a *score* for each token: all the attention that it has received so far. Over a budget, the token with
the lowest score goes; the newest are safe, for nobody has had time to look at them. Two queries, one head:

    keys                a    b    c    d
    query c looks      .7   .1   .2    .
    query d looks      .6   .0   .1   .3
    received          1.3   .1   .3   .3       budget 3, newest 1 safe: d stays, b goes
"""

# %% [markdown]
"""
`CachedAttention.attend` tells such a cache who looked where: `observe(layer_idx, weights)`, (B, H, T, S). First the
sum: over heads and queries, for each key. Queries that are padding say nothing.
"""

# %% nbgrader={"grade": false, "grade_id": "22-received", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def attention_received(weights, n_new):
    """What each key received from all heads and all valid queries together: (B, H, T, S) -> (B, S), float64.

    n_new: valid queries of each row; the others are padding.

    >>> weights = np.array([[[[0.7, 0.1, 0.2, 0.0], [0.6, 0.0, 0.1, 0.3]]]])
    >>> attention_received(weights, [2]).round(6).tolist(), attention_received(weights, [1]).round(6).tolist()
    ([[1.3, 0.1, 0.3, 0.3]], [[0.7, 0.1, 0.2, 0.0]])
    """
    valid = np.arange(weights.shape[2]) < np.array(n_new)[:, None]  # (B, T)
    ### BEGIN SOLUTION
    return np.where(valid[:, None, :, None], weights, 0).sum(axis=(1, 2), dtype=np.float64)
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "22-received-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_received(seed=0):
    """Oracle: a loop over rows, heads and queries."""
    weights = np.random.default_rng(seed).random((2, 3, 4, 5), dtype=np.float32)
    for n_new in ([4, 4], [4, 1], [0, 2]):
        expected = np.zeros((2, 5))
        for b, h, t in np.ndindex(2, 3, 4):
            if t < n_new[b]:
                expected[b] += weights[b, h, t]
        got = attention_received(weights, n_new)
        assert got.shape == (2, 5), f"got shape {got.shape}, expected (2, 5): one number per row and key"
        if n_new == [4, 4]:
            assert np.allclose(got, expected), (
                f"got {got[0].round(2)}, expected {expected[0].round(2)}: the sum over all heads and queries, no mean")
        assert np.allclose(got, expected), (
            f"n_new {n_new}: got {got.round(2)}, expected {expected.round(2)}; padding counts")
        assert got.dtype == np.float64, (
            f"got {got.dtype}, expected float64: small weights would vanish in long float32 sums")


if __name__ == "__main__":
    test_unit_received()

### BEGIN HIDDEN TESTS
if __name__ == "__main__":
    test_unit_received(seed=3)
### END HIDDEN TESTS

# %% [markdown]
"""
Now the choice. One row, in one layer: `pos` and `score` of what is held and of what has come, in one line; -1 is an
empty slot. `who_stays` returns *indices* into them, sorted: the `recent` newest by position, and of the others those
with the highest scores, `budget` in all. In a tie the older one stays.
"""

# %% [markdown]
"""
Then the change of tenants: a newcomer takes a free slot, **and the slot's score becomes its own**. If it inherited
the old one, a slot could never be lost again.

    slots   pos [0 1 2]   score [1.3 .1 .3]     comes 3 with .25     stays [0 2 3]     free: slot 1
            pos [0 3 2]   score [1.3 .25 .3]
"""

# %% nbgrader={"grade": false, "grade_id": "22-evict", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def who_stays(pos, score, budget, recent):
    """Indices, sorted, of the `recent` newest tokens and the best of the rest by score: at most `budget` together.

    pos, score: (N,) arrays; pos -1 is no token. recent <= budget.

    >>> who_stays(np.array([0, 1, 2, 3]), np.array([1.3, 0.1, 0.3, 0.3]), budget=3, recent=1).tolist()
    [0, 2, 3]
    """
    by_age = np.argsort(pos, kind="stable")[(pos < 0).sum() :]  # indices of the tokens, oldest first
    older, newest = by_age[: max(len(by_age) - recent, 0)], by_age[max(len(by_age) - recent, 0) :]
    ### BEGIN SOLUTION
    best = older[np.argsort(-score[older], kind="stable")]
    return np.sort(np.concatenate([best[: budget - len(newest)], newest]))
    ### END SOLUTION


def change_tenants(pos, score, stays, new_pos, new_score):
    """Let the newcomers that stay into the slots of those that go, in place; return (slots, which newcomers).

    pos, score: the slots' (S,), changed here. stays: indices from who_stays; from S on they mean newcomers.
    """
    taken = stays[stays < len(pos)]
    newcomers = stays[stays >= len(pos)] - len(pos)
    slots = np.setdiff1d(np.arange(len(pos)), taken)[: len(newcomers)]
    ### BEGIN SOLUTION
    pos[slots], score[slots] = new_pos[newcomers], new_score[newcomers]
    ### END SOLUTION
    return slots, newcomers

# %% nbgrader={"grade": true, "grade_id": "22-evict-test", "locked": true, "points": 4, "schema_version": 3, "solution": false, "task": false}
def check_stays(pos, score, budget, recent):
    """Oracle: tuples, sorted."""
    tokens = sorted((p, -s, i) for i, (p, s) in enumerate(zip(pos, score)) if p >= 0)
    newest, older = tokens[-recent:], tokens[:-recent]
    best = sorted(older, key=lambda token: (token[1], token[0]))[: budget - len(newest)]
    expected, got = sorted(i for _, _, i in newest + best), np.asarray(who_stays(pos, score, budget, recent)).tolist()
    what = (f"pos {pos.tolist()}, score {score.tolist()}, budget {budget}, recent {recent}: "
            f"got {got}, expected {expected}")
    assert -1 not in pos[got], f"{what}; an empty slot is no token"
    assert {i for _, _, i in newest} <= set(got), f"{what}; a newest token was evicted, recent={recent} are safe"
    assert len(got) == len(expected), f"{what}; {budget} stay, or all if they are fewer"
    assert got == expected, f"{what}; of the others the highest scores stay, older ones in a tie; sorted indices"


def test_unit_evict():
    """The picture; a budget that holds all; the newest with the lowest scores; slots whose tenant changed."""
    pos, score = np.array([0, 1, 2, 3]), np.array([1.3, 0.1, 0.3, 0.3])
    for budget, recent in [(3, 1), (3, 3), (8, 2), (1, 1)]:
        check_stays(pos, score, budget, recent)
    check_stays(np.array([7, -1, 3, 9, 8]), np.array([0.0, 5.0, 2.0, 0.0, 1.0]), 3, 2)
    check_stays(np.array([0, 1, 2, 3]), np.array([0.2, 0.5, 0.5, 0.1]), 2, 1)
    slot_pos, slot_score = np.array([0, 1, 2]), np.array([1.3, 0.1, 0.3])
    slots, newcomers = change_tenants(slot_pos, slot_score, np.array([0, 2, 4]), np.array([9, 3]), np.array([0, 0.25]))
    assert slots.tolist() == [1] and newcomers.tolist() == [1], (
        f"got slots {slots} for newcomers {newcomers}, expected [1] and [1]: slot 1 is free, and the second one stays")
    assert slot_pos.tolist() == [0, 3, 2], (
        f"positions of the slots: got {slot_pos.tolist()}, expected [0, 3, 2]: `pos` changes in place, by new_pos")
    assert slot_score.tolist() == [1.3, 0.25, 0.3], (
        f"scores of the slots: got {slot_score.tolist()}, expected [1.3, 0.25, 0.3]; slot 1 has a new tenant, the old "
        "one's score must not stay")
    ### BEGIN HIDDEN TESTS
    rng = np.random.default_rng(5)
    for budget, recent in [(6, 3), (4, 1), (20, 5), (2, 2)]:
        pos = rng.permutation(12)
        check_stays(np.where(pos < 2, -1, pos), rng.integers(0, 4, 12).astype(float), budget, recent)
    check_stays(np.array([-1, -1, 5]), np.array([9.0, 9.0, 0.0]), 2, 1)
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_evict()

# %% [markdown]
"""
The cache, given. Each layer and each row chooses for itself: layers look at different tokens. A score is a sum over all
that ever looked, and cannot be taken back; so this cache refuses to forget a part of a row, and says why.
"""

# %%
#| export
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

# %%
def planted(seq_len, hit=3, head_dim=4, seed=0):
    """Query, key and value of a text in which every query looks at token `hit`, and at nearly nothing else."""
    query, key, value = np.random.default_rng(seed).standard_normal((3, 1, 1, seq_len, head_dim))
    query[..., 0], key[..., 0], key[:, :, hit, 0] = 10, 0, 10
    return query, key, value

# %% nbgrader={"grade": true, "grade_id": "22-heavy-test", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
def test_unit_heavy(seed=0):
    """Oracles: full attention, where the budget is as large as the text; a planted key that must stay for ever."""
    query, key, value = np.random.default_rng(seed).standard_normal((3, 2, 2, 12, 4))
    cache = HeavyHitterKVCache(2, None, 1, 2, 4, budget=12, dtype=np.float64)
    got = attend_in_chunks(cache, query, key, value, [5, 1, 1, 4, 1])
    expected = band_attention(query, key, value, window=12, sinks=0)
    assert np.allclose(got, expected, atol=1e-12), "a budget as large as the text: not full attention; who was evicted?"
    cache = HeavyHitterKVCache(1, None, 1, 1, 4, budget=6, recent=2, dtype=np.float64)
    nbytes, seq_len = cache.nbytes, 100
    attend_in_chunks(cache, *planted(seq_len, seed=seed), [10] + [1] * (seq_len - 10))
    held = cache.residents()[0].tolist()
    assert 3 in held, f"token 3 gets all attention, and yet it was evicted; held: {held}"
    assert held[-2:] == [98, 99] and len(held) == 6, f"held: {held}, expected 6 of them, the last two [98, 99]"
    assert cache.nbytes == nbytes, f"{cache.nbytes} bytes, at first {nbytes}: it grew"
    cache.update(0, key[:1, :1, :1], key[:1, :1, :1])
    message = error_of(cache.advance, CacheStateError)
    assert "observe" in message, f"a pass that nobody observed was committed; said {message!r}"


if __name__ == "__main__":
    test_unit_heavy()

### BEGIN HIDDEN TESTS
if __name__ == "__main__":
    test_unit_heavy(seed=7)
### END HIDDEN TESTS

# %% nbgrader={"grade": false, "grade_id": "22-measure-eviction", "locked": true, "schema_version": 3, "solution": false, "task": false}
def show_planted(seq_len=400, slots=16):
    """A text in which all look at token 3, over three caches of the same size: who is held, and how wrong is it?"""
    query, key, value = planted(seq_len)
    expected = band_attention(query, key, value, window=seq_len, sinks=0)
    sizes = (1, None, 1, 1, 4)
    for name, cache in {"window": SlidingWindowKVCache(*sizes, window=slots),
                        "window + 4 sinks": SlidingWindowKVCache(*sizes, window=slots - 4, sinks=4),
                        "eviction by score": HeavyHitterKVCache(*sizes, budget=slots)}.items():
        error = np.abs(attend_in_chunks(cache, query, key, value, [1] * seq_len) - expected)[:, :, slots:].mean()
        notes = cache.get_memory_usage()["bookkeeping_bytes"]
        print(f"{name:<18} mean error {error:.3f}   {cache.nbytes} B and {notes} B of notes   held from "
              f"{cache.residents()[0, :6].tolist()} on")


if __name__ == "__main__":
    show_planted()

# %% [markdown]
"""
Token 3 was a sink by luck. *Try* `hit=50` in `planted`: sinks do not help, scores do.

*Look back.* A score is a sum, and an early token has had more queries to be seen by. Which tokens does that favour, and
what would you store in place of a sum? (The early ones; an average, or a sum that fades.) What does such a cache need
that a window does not? (The weights. A kernel like FlashAttention, Dao et al. 2022, never writes them to memory.)
"""

# %% [markdown]
"""
## 9. Fewer bits

A window forgets. What if we kept every token, and each number in fewer bits? Many keys and values are small numbers
around zero. *Predict:* what does the first idea, `key.astype(np.int8)`, keep of them?
"""

# %% nbgrader={"grade": false, "grade_id": "22-measure-cast", "locked": true, "schema_version": 3, "solution": false, "task": false}
if __name__ == "__main__":
    key = np.random.default_rng(0).normal(scale=0.5, size=(4, 8)).astype(np.float32)
    print("a key", key[0].round(2), "\nas int8", key[0].astype(np.int8))
    print(f"numbers that became zero: {np.mean(key.astype(np.int8) == 0):.0%}")

# %% [markdown]
"""
Spread the codes over the numbers that are there. A *group* keeps its smallest number and a step; each number
becomes the nearest step, counted from the smallest. With 2 bits there are four codes and three steps between them:

    group     1.0   1.4   3.1   4.0      low = 1    scale = (4 - 1) / 3 = 1
    codes       0     0     2     3      round((x - low) / scale)
    back      1.0   1.0   3.0   4.0      low + code * scale

Zero need not be in the range (the papers call this *asymmetric*). No number is off by more than half a step.
"""

# %% [markdown]
"""
*Predict.* A group runs from -1.5 to 6. How far off can a number be with 4 bits, and with 2? And how many bytes
are one token's key and value, one head of D = 64 in groups of 32, in 8, 4 and 2 bits, each group with a scale and a low
in float32? (In float32 they are 512.)
"""

# %% nbgrader={"grade": false, "grade_id": "22-predict-bits", "locked": false, "schema_version": 3, "solution": true, "task": false}
# predicted_worst_error = {4: ..., 2: ...}
# predicted_token_bytes = {8: ..., 4: ..., 2: ...}
### BEGIN SOLUTION
predicted_worst_error = {4: 0.25, 2: 1.25}
predicted_token_bytes = {8: 160, 4: 96, 2: 64}
### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "22-predict-bits-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_predict_bits():
    """Oracles: 10,001 numbers and the nearest of 2**bits points; arrays of those shapes."""
    numbers = np.linspace(-1.5, 6, 10_001)
    for bits in (4, 2):
        points, got = np.linspace(-1.5, 6, 2**bits), predicted_worst_error[bits]
        worst = np.abs(numbers[:, None] - points).min(axis=1).max()
        assert abs(got - worst) < 1e-3, f"{bits} bits: got {got}, the worst of 10,001 numbers is off by {worst:.3f}" + (
            "; a whole step is too much, we round to the nearest" if got > 1.5 * worst else
            "; between 2**bits points lies one step less" if got < worst else "")
    for bits in (8, 4, 2):
        codes, scale_and_low = np.zeros((2, 64 * bits // 8), np.uint8), np.zeros((2, 2, 2), np.float32)
        got, real = predicted_token_bytes[bits], codes.nbytes + scale_and_low.nbytes
        assert got == real, f"{bits} bits: got {got} bytes, key and value have {real}" + (
            "; scale and low of each group count, too" if got == codes.nbytes else "") + (
            "; that is the key alone" if got * 2 == real else "") + (
            "; that is one group each, 64 numbers are two of 32" if got == real - 16 else "")


if __name__ == "__main__":
    test_unit_predict_bits()

# %% [markdown]
"""
Build both directions. Each group along `axis` has a range of its own (`keepdims=True` keeps the shapes fit for each
other); rounding goes to the *nearest* step (`np.rint`); and where all numbers of a group are equal the scale is 0, and
0 / 0 is no code. `x` is float64 there: from -3e38 to 3e38 the range does not fit in float32.

Take the step through `float32_above` (given). Rounded down, even by a little, the last step would not reach the
group's largest number.
"""

# %% nbgrader={"grade": false, "grade_id": "22-quantize", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
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
    ### BEGIN SOLUTION
    low, high = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
    scale = float32_above((high - low) / (2**bits - 1))
    codes = np.rint((x - low) / np.where(scale > 0, scale, 1))
    ### END SOLUTION
    return codes.astype(np.uint8), scale.astype(np.float32), low.astype(np.float32)


def dequantize(codes, scale, low):
    """The numbers that the codes stand for, float32.

    >>> dequantize(np.array([0, 0, 2, 3], np.uint8), np.float32(1), np.float32(1)).tolist()
    [1.0, 1.0, 3.0, 4.0]
    """
    if np.max(scale, initial=0) > 1e30:  # so many steps may not fit in float32
        scale = scale.astype(np.float64)
    ### BEGIN SOLUTION
    x = codes * scale
    x += low
    ### END SOLUTION
    return x if x.dtype == np.float32 else np.clip(x, -LARGEST, LARGEST).astype(np.float32)

# %% nbgrader={"grade": true, "grade_id": "22-quantize-test", "locked": true, "points": 4, "schema_version": 3, "solution": false, "task": false}
def check_group(group, bits):
    """Oracle: the nearest of 2**bits points between the group's own smallest and largest number, in a plain loop."""
    x = np.array([group, [0.5] * len(group)], np.float32)
    with np.errstate(all="ignore"):
        codes, scale, low = quantize(x, 1, bits)
    assert codes.shape == x.shape and scale.shape == low.shape == (2, 1), (
        f"codes {codes.shape}, scale {scale.shape}, low {low.shape}: expected {x.shape} and (2, 1) twice; "
        "each group has its own range, keepdims keeps its axis")
    assert codes.max() < 2**bits, (
        f"{bits} bits: got code {codes.max()}, the largest is {2**bits - 1}; as many steps as codes?")
    points = np.linspace(np.float64(x[0].min()), np.float64(x[0].max()), 2**bits)
    step = points[1] - points[0]
    assert abs(scale[0, 0] - step) < 1e-6 * step, (
        f"{group}, {bits} bits: scale {scale[0, 0]:g}, expected (largest - smallest) / {2**bits - 1} = {step:g}; "
        "was zero forced into the range, or are there as many steps as codes?")
    back = dequantize(codes, scale, low)
    assert back.shape == x.shape and back.dtype == np.float32, f"back: {back.dtype} {back.shape}, expected float32"
    for number, got in zip(x[0].astype(np.float64), back[0].astype(np.float64)):
        nearest = min(points, key=lambda point: abs(point - number))
        assert abs(got - number) <= abs(nearest - number) + 1e-4 * step, (
            f"{number:g} came back as {got:g}, the nearest step is {nearest:g}: "
            "was something added to the scale, was it cut off, or low forgotten?")


def test_unit_quantize():
    """Oracles: the nearest point, and that a constant group comes back exactly."""
    for bits in (2, 4, 8):
        check_group([1.0, 1.4, 3.1, 4.0], bits)
        check_group([-7.0, -6.5, -6.6, -6.1, -6.9], bits)
        check_group([1e-9, 1.4e-9, 3.1e-9, 4e-9], bits)  # what is added to be safe is not small for everybody
    constant = np.full((3, 4), [[0.1], [0.0], [-3e38]], np.float32)
    with np.errstate(divide="ignore", invalid="raise", over="raise"):
        error = error_of(lambda: dequantize(*quantize(constant, 1, 4)), FloatingPointError)
        assert not error, f"a group of equal numbers: {error}; its scale is 0, what do you divide by?"
        back = dequantize(*quantize(constant, 1, 4))
    assert np.array_equal(back, constant), f"a group of equal numbers came back as {back[:, 0]}, expected it exactly"
    ### BEGIN HIDDEN TESTS
    check_group([-3e38, 0, 1, 3e38], 2)
    check_group([100.0, 100.5, 103.0], 8)
    x = np.random.default_rng(1).standard_normal((2, 3, 4), dtype=np.float32)
    codes, scale, low = quantize(x, -2, 4)
    assert scale.shape == (2, 1, 4), f"groups along axis -2 of (2, 3, 4): scale {scale.shape}, expected (2, 1, 4)"
    error = np.abs(dequantize(codes, scale, low) - x)
    assert (error <= scale / 2 + 1e-5).all(), f"groups along axis -2: off by {error.max():.3f}, more than half a step"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_quantize()

# %% [markdown]
"""
## 10. Half a byte

A code of 4 bits in a byte of its own wastes half of it, and NumPy has no smaller type. Two *nibbles* share a byte, or
four *crumbs*. The first code stands in the lowest bits:

    nibbles    5, 12         byte 12*16 + 5 = 197                0b1100_0101
    crumbs     1, 0, 3, 2    byte 2*64 + 3*16 + 0*4 + 1 = 177    0b10_11_00_01

`codes << k` moves codes k bits up, `|=` lays them beside what is there; `packed >> k` moves them down again, and `&`
with a mask of `bits` ones keeps only the lowest.
"""

# %% nbgrader={"grade": false, "grade_id": "22-pack", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
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
    ### BEGIN SOLUTION
    for i in range(per_byte):
        packed |= codes[..., i::per_byte] << (bits * i)
    ### END SOLUTION
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
    ### BEGIN SOLUTION
    for i in range(per_byte):
        codes[..., i] = packed >> (bits * i) & (2**bits - 1)
    ### END SOLUTION
    return codes.reshape(*packed.shape[:-1], packed.shape[-1] * per_byte)[..., :count]

# %% nbgrader={"grade": true, "grade_id": "22-pack-test", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
def check_packing(codes, bits):
    """Oracle: place value, byte = first + base * second + ..., in plain Python."""
    base, per_byte = 2**bits, 8 // bits
    filled = codes + [0] * (-len(codes) % per_byte)
    expected = [sum(code * base**i for i, code in enumerate(filled[start : start + per_byte]))
                for start in range(0, len(filled), per_byte)]
    packed = pack(np.array([codes, codes], np.uint8), bits)
    assert packed.dtype == np.uint8 and packed.shape == (2, len(expected)), (
        f"{len(codes)} codes of {bits} bits: got {packed.dtype} {packed.shape}, expected uint8 (2, {len(expected)})")
    assert packed[0].tolist() == expected, (
        f"{bits} bits, codes {codes}: got bytes {packed[0].tolist()}, expected {expected}; "
        "do two codes overlap, or are they swapped?")
    back = unpack(np.array([expected, expected], np.uint8), bits, len(codes))
    assert back.shape == (2, len(codes)), f"unpacked: shape {back.shape}, expected {(2, len(codes))}"
    assert back[1].tolist() == codes, (
        f"{bits} bits, bytes {expected}: unpacked {back[1].tolist()}, expected {codes}; "
        "swapped, or are the neighbour's bits still there?")


def test_unit_pack():
    """Oracle: place value; the numbers of the picture."""
    check_packing([5, 12], 4)
    check_packing([1, 0, 3, 2], 2)
    check_packing([200, 7, 255], 8)
    check_packing([1, 2, 15], 4)
    ### BEGIN HIDDEN TESTS
    check_packing([15, 15, 0, 1, 8, 9], 4)
    check_packing([3, 3, 3, 3, 1, 2], 2)
    check_packing([2], 2)
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_pack()

# %% [markdown]
"""
What does the whole cost? Your prediction in general, for tokens in whole groups: keys *and* values, packed codes, and
8 bytes for each group. Behind the check it is printed over the size of the groups, and for a real model.
"""

# %% nbgrader={"grade": false, "grade_id": "22-quantized-bytes", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def quantized_bytes(num_tokens, num_heads, head_dim, bits, group_size):
    """Bytes of one layer's keys and values in whole groups: packed codes, and a float32 scale and low per group.

    >>> quantized_bytes(num_tokens=1, num_heads=1, head_dim=64, bits=4, group_size=32)
    96
    """
    ### BEGIN SOLUTION
    numbers = 2 * num_tokens * num_heads * head_dim
    return numbers * bits // 8 + numbers // group_size * 8
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "22-quantized-bytes-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def check_bytes(num_tokens, num_heads, head_dim, bits, group_size):
    """Oracle: the nbytes of what quantize and pack really make."""
    x, stored = np.zeros((num_tokens, num_heads, head_dim // group_size, group_size), np.float32), []
    for _ in ("key", "value"):
        codes, scale, low = quantize(x, -1, bits)
        stored += [pack(codes.reshape(num_tokens, num_heads, head_dim), bits), scale, low]
    real = sum(array.nbytes for array in stored)
    got = quantized_bytes(num_tokens, num_heads, head_dim, bits, group_size)
    assert got == real, (
        f"{num_tokens} tokens, {num_heads} heads of {head_dim}, {bits} bits, groups of {group_size}: got {got}, "
        f"the arrays have {real}" + ("; were the values forgotten?" if got * 2 == real else "") + (
            "; were scale and low forgotten?" if got == stored[0].nbytes * 2 else ""))


def test_unit_quantized_bytes():
    """Oracle: real arrays."""
    check_bytes(1, 1, 64, 4, 32)
    check_bytes(5, 2, 16, 2, 8)
    check_bytes(3, 2, 16, 8, 16)
    ### BEGIN HIDDEN TESTS
    check_bytes(7, 3, 24, 4, 4)
    check_bytes(32, 8, 128, 2, 32)
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_quantized_bytes()

# %% nbgrader={"grade": false, "grade_id": "22-measure-groups", "locked": true, "schema_version": 3, "solution": false, "task": false}
def show_group_sizes(group_sizes=(8, 16, 32, 64, 128)):
    """Bits per number, scales included, and the error that was measured on random numbers, for each size of group."""
    x = np.random.default_rng(0).standard_normal((1024, 128), dtype=np.float32)
    print("numbers per group    4 bits: really   error    2 bits: really   error    (error: mean, of numbers around 1)")
    for size in group_sizes:
        cells = []
        for bits in (4, 2):
            grouped = x.reshape(1024, -1, size)
            error = np.abs(dequantize(*quantize(grouped, -1, bits)) - grouped).mean()
            cells.append(f"{8 * quantized_bytes(1, 1, 128, bits, size) / 256:>15.2f} {error:>7.3f}")
        print(f"{size:>17} {'   '.join(cells)}")


if __name__ == "__main__":
    show_group_sizes()
    full, quarter = 32 * 4096 * 2 * 8 * 128 * 4, 32 * quantized_bytes(4096, 8, 128, 4, 32)
    print(f"Llama-3-8B, 4096 tokens: {full / 2**20:,.0f} MiB in float32, {quarter / 2**20:,.0f} MiB in 4 bits")

# %% [markdown]
"""
Small groups follow the numbers closely, and pay for their scales. We take 32, as the authors of KIVI do (section 12);
a head whose size 32 does not divide is one group.
"""

# %% [markdown]
"""
## 11. Along which axis?

A group may be numbers of one *token*, or numbers of one *channel* (one of the D columns) over several tokens. In
random numbers that makes little difference. What if a few channels are large in every token?

    token groups                      channel groups: here of 3 tokens
    k0  [ 0.1  -0.3   9.0   0.2]      k0    0.1 | -0.3 |  9.0 |  0.2
    k1  [-0.2   0.4   8.5  -0.1]      k1   -0.2 |  0.4 |  8.5 | -0.1
    k2  [ 0.3   0.1   9.2   0.0]      k2    0.3 |  0.1 |  9.2 |  0.0

One large channel widens the range of *every* token group, and its neighbours share the few codes that are left. Of the
channel groups, only its own is wide. But a channel group is whole only after `group_size` tokens.
"""

# %% [markdown]
"""
So the newest keys *wait* as they are, in float32, until their group is whole. Then it is frozen: quantised once, and
never again. Groups of 3 tokens, of which 2 wait and 3 come:

    waiting  a b      new  c d e      groups  [a b c]      waiting  d e

A token's position says which group it is in, so all ways to cut a text into chunks freeze the same groups. A group
that is quantised again as it grows would depend on them, and lose a little each time.
"""

# %% nbgrader={"grade": false, "grade_id": "22-groups", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def complete_groups(waiting, new, group_size):
    """Old waiting tokens and new ones: the groups that are whole now, (H, N, G, D), and what waits on (H, R < G, D).

    waiting (H, W < G, D), new (H, T, D), G = group_size.

    >>> groups, waiting = complete_groups(np.zeros((1, 2, 4)), np.ones((1, 3, 4)), group_size=3)
    >>> groups.shape, waiting.shape
    ((1, 1, 3, 4), (1, 2, 4))
    """
    ### BEGIN SOLUTION
    tokens = np.concatenate([waiting, new], axis=1)
    whole = tokens.shape[1] // group_size
    frozen, waiting = np.split(tokens, [whole * group_size], axis=1)
    return frozen.reshape(len(tokens), whole, group_size, tokens.shape[2]), waiting
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "22-groups-test", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
def check_chunking(chunks, group_size):
    """Oracle: a Python list of tokens; group n is tokens n * G to n * G + G, whatever the chunks."""
    total = sum(chunks)
    tokens = np.arange(2 * total * 3, dtype=np.float32).reshape(2, total, 3)
    waiting, frozen, start = tokens[:, :0], [], 0
    for count in chunks:
        said = f"chunks {chunks} in groups of {group_size}, after {start + count} tokens: "
        groups, waiting = complete_groups(waiting, tokens[:, start : start + count], group_size)
        start += count
        assert groups.ndim == 4 and groups.shape[2:] == (group_size, 3), (
            f"{said}groups have shape {groups.shape}, expected (2, N, {group_size}, 3): N groups, each of G tokens")
        frozen += [groups[:, n] for n in range(groups.shape[1])]
        assert len(frozen) <= start // group_size, (
            f"{said}{len(frozen)} groups are frozen; one that is not whole would be quantised again when it grows")
        assert len(frozen) == start // group_size and waiting.shape == (2, start % group_size, 3), (
            f"{said}{len(frozen)} groups frozen, waiting {waiting.shape}, expected {start // group_size} groups and "
            f"(2, {start % group_size}, 3); was what waited before left out, or what is left over?")
        assert np.array_equal(waiting, tokens[:, start - start % group_size : start]), (
            f"{said}other tokens wait than the newest: old ones first, then new ones?")
    for n, group in enumerate(frozen):
        expected = tokens[:, n * group_size : (n + 1) * group_size]
        assert np.array_equal(group, expected), f"chunks {chunks}: group {n} holds other tokens than those in its place"


def test_unit_groups():
    """Oracle: a list."""
    for chunks in ([5], [2, 3], [1, 1, 1, 1, 1], [3, 3], [2, 7]):
        check_chunking(chunks, 3)
    ### BEGIN HIDDEN TESTS
    check_chunking([1, 9, 2, 4, 1, 1], 4)
    check_chunking([3, 1, 2], 1)
    check_chunking([2, 1], 5)
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_groups()

# %% [markdown]
"""
Now the cache (given). A *unit* is what is frozen at once: one token, cut into D / G groups of G numbers; or G tokens,
one group for each channel. `GroupFormat` knows shapes, `GroupedTokens` keeps the units of many tokens and whatever
waits, and `QuantizedKVCache` is lesson 17's cache of one layer on these.
"""

# %%
#| export
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

# %%
#| export
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

# %%
#| export
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

# %%
#| export
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

# %% [markdown]
"""
A check without a hole, for your functions together. A slow oracle: each group on its own, in plain loops.
"""

# %%
# The oracle: plain loops, one number after the other.
def slow_group(numbers, bits):
    """A list of numbers through 2**bits points between its smallest and largest, one by one, in float64."""
    low, high = min(numbers), max(numbers)
    step = (high - low) / (2**bits - 1)
    return [low + step * math.floor((number - low) / step + 0.5) if step else low for number in numbers], step


def slow_quantized(x, bits, axis, group_size):
    """What a cache should read for tokens x (T, D), and half a step for each number: in plain loops."""
    back, bound = np.array(x, np.float64), np.zeros(x.shape)
    seq_len, head_dim = x.shape
    if axis == "token":
        groups = [(t, slice(c, c + group_size)) for t in range(seq_len) for c in range(0, head_dim, group_size)]
    else:
        starts = range(0, seq_len - seq_len % group_size, group_size)
        groups = [(slice(t, t + group_size), c) for t in starts for c in range(head_dim)]
    for place in groups:
        back[place], step = slow_group([float(number) for number in x[place]], bits)
        bound[place] = step / 2
    return back, bound

# %% nbgrader={"grade": true, "grade_id": "22-quantized-cache-test", "locked": true, "points": 4, "schema_version": 3, "solution": false, "task": false}
def check_cache(bits, key_axis, chunks, group_size=4):
    """Half a step, by the slow loops; and the same bytes as when all tokens come at once."""
    rng, total = np.random.default_rng(bits), sum(chunks)
    k, v = rng.standard_normal((2, 2, 3, total, 8), dtype=np.float32)  # B = 2, H = 3, D = 8
    cache, at_once = (QuantizedKVCache(2, total, 3, 8, bits, key_axis, group_size) for _ in range(2))
    start = 0
    for count in chunks:
        cache.update(k[:, :, start : start + count], v[:, :, start : start + count])
        start += count
    at_once.update(k, v)
    said = f"{bits} bits, {key_axis} keys, chunks {chunks}: "
    for row, head in np.ndindex(2, 3):
        for name, got, x, axis in zip(("key", "value"), cache.get_kv(row), (k, v), (key_axis, "token")):
            assert got.shape == (3, total, 8) and got.dtype == np.float32, f"{said}{name} is {got.dtype} {got.shape}"
            expected, bound = slow_quantized(x[row, head], bits, axis, group_size)
            off = np.abs(got[head] - x[row, head]) - bound
            assert off.max() < 1e-4, f"{said}a {name} is off by {off.max():.4f} more than half a step"
            assert np.abs(got[head] - expected).max() < 1e-4, f"{said}a {name} is not the step that the loops chose"
    for array, other in zip(cache.arrays(), at_once.arrays()):
        assert np.array_equal(array, other), f"{said}other bytes than at once: was a group quantised again?"


def test_unit_quantized_cache():
    """Oracles: the slow loops, and all tokens at once."""
    for bits in (8, 4, 2):
        check_cache(bits, "token", [1, 5, 3])
        check_cache(bits, "channel", [3, 1, 5, 2])
    cache = QuantizedKVCache(2, 64, 3, 32, bits=4)
    got, expected = cache.memory_bytes(), quantized_bytes(2 * 64, 3, 32, 4, 32)
    assert got == expected, f"memory_bytes: {got}, quantized_bytes says {expected}"
    ### BEGIN HIDDEN TESTS
    check_cache(4, "channel", [1] * 9)
    check_cache(2, "token", [7], group_size=8)
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_quantized_cache()

# %% [markdown]
"""
## 12. The finding

Planted keys like those of the picture: 128 tokens with 32 channels, of which two are large. *Predict:* which axis is
better, and how much? The last column is what attention makes of it: how far the weights of random queries are off.
"""

# %%
#| export
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

# %% nbgrader={"grade": false, "grade_id": "22-measure-outliers", "locked": true, "schema_version": 3, "solution": false, "task": false}
def show_outliers():
    key, value = outlier_keys(128)
    print("largest number of each channel:", np.abs(key[0, 0]).max(axis=0).round().astype(int).tolist())
    query = np.random.default_rng(1).standard_normal((1, 1, 64, 32), dtype=np.float32)
    exact = attention_weights(query, key).numpy()
    print("bits   axis      mean error of a key   largest error of a weight")
    for bits, axis in [(bits, axis) for bits in (8, 4, 2) for axis in ("token", "channel")]:
        cache = QuantizedKVCache(1, 128, 1, 32, bits, axis)
        cache.update(key, value)
        weights = attention_weights(query, cache.get_kv(0)[0][None]).numpy()
        print(f"{bits:>4}   {axis:<8} {key_error(key, value, bits, axis):>20.4f} {np.abs(weights - exact).max():>27.4f}")
    plain = outlier_keys(128, size=0)
    print("4 bits without outliers:", {axis: round(key_error(*plain, 4, axis), 4) for axis in ("token", "channel")})


if __name__ == "__main__":
    show_outliers()

# %% nbgrader={"grade": true, "grade_id": "22-outliers-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_outliers(seed=0, num_tokens=64):
    """Oracle: the errors themselves; groups along the channel must be at least twice as accurate."""
    key, value = outlier_keys(num_tokens, seed=seed)
    for bits in (8, 4, 2):
        token, channel = (key_error(key, value, bits, axis) for axis in ("token", "channel"))
        assert token > 2 * channel > 0, (
            f"{bits} bits: mean error {token:.4f} in token groups, {channel:.4f} in channel groups, expected at least "
            "twice as much; does every group have a range of its own?")
        plain = [key_error(*outlier_keys(num_tokens, size=0, seed=seed), bits, axis) for axis in ("token", "channel")]
        assert max(plain) < 1.2 * min(plain), f"{bits} bits without outliers: errors {plain}, expected about the same"


if __name__ == "__main__":
    test_unit_outliers()

### BEGIN HIDDEN TESTS
if __name__ == "__main__":
    test_unit_outliers(seed=3, num_tokens=96)
### END HIDDEN TESTS

# %% [markdown]
"""
Are keys of real models so? Two papers of 2024 found it, in Llama and others: Hooper et al., *KVQuant* (arXiv
2401.18079, section 3.1), and Liu et al., *KIVI* (arXiv 2402.02750, section 3). Some channels are large in nearly every
key; in values such channels are weaker, or missing. Hence both take keys along the channel, values along the token.

*Look back.* KIVI also keeps some of the newest tokens, keys and values, as they are; we keep less than a group of keys.
What would more of them buy, and what would they cost? (The newest are read exactly; each takes 32 bits per number, in
place of the 6 that were printed for 4 bits in groups of 32.)
"""

# %% [markdown]
"""
## 13. Fewer bits in a model

Now for a model. To decode all that is stored, at every layer and for every new token, costs more than attention itself.
Must we? A key is `low + codes * scale`, so its dot product with a query is

    query . key  =  low * sum(query)  +  scale * (query . codes)

with one `low` and one `scale` per key. So `scale` can be multiplied into the finished scores and `low` added to them,
(T, S) numbers instead of (S, D). A key in several groups has one of each per group, and its score is the sum over them.
Codes still have to become float32, for BLAS knows no whole numbers; but that is a copy into memory that is used again
and again, and no arithmetic.

*Predict.* One query, 1024 keys of 64 numbers in groups of 32. How many multiplications by a scale does decoding take?
How many does folding into the scores take?
"""

# %% nbgrader={"grade": false, "grade_id": "22-predict-fold", "locked": false, "schema_version": 3, "solution": true, "task": false}
# predicted_decoding = ...
# predicted_folding = ...
### BEGIN SOLUTION
predicted_decoding = 1024 * 64
predicted_folding = 1024 * 2
### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "22-predict-fold-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_predict_fold():
    """Oracle: the sizes of the arrays that are multiplied."""
    keys, scores = np.zeros((1024, 64)), np.zeros((2, 1, 1024))  # one score per group, query and key
    assert predicted_decoding == keys.size, f"got {predicted_decoding}, expected {keys.size}: every number of every key"
    assert predicted_folding == scores.size, (
        f"got {predicted_folding}, expected {scores.size}: each key has two groups, each with its own scale")


if __name__ == "__main__":
    test_unit_predict_fold()

# %% [markdown]
"""
Given: the scores of keys in token groups, and of keys in channel groups, where `scale` and `low` belong to a channel of
the whole group and go into the query. Yours: the values. What comes out is a sum of values with the weights of the
softmax, and a value is `low + codes * scale`, with one `low` and one `scale` per value. Where does each go?

    output[d]  =  sum over s of  weights[s] * (low[s] + codes[s, d] * scale[s])
"""

# %% nbgrader={"grade": false, "grade_id": "22-mix-codes", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
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
    ### BEGIN SOLUTION
    mixed = (weights * scale[..., None, :]) @ codes
    mixed += weights @ low[..., :, None]
    return mixed
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "22-mix-codes-test", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
def test_unit_mix_codes(shape=(2, 3, 4, 5), seed=0):
    """Oracle: the values are decoded first, in float64, and mixed one by one."""
    rng = np.random.default_rng(seed)
    batch, num_weights, num_values, dim = shape
    weights = rng.random((batch, num_weights, num_values), np.float32)
    codes = rng.integers(0, 256, (batch, num_values, dim)).astype(np.float32)
    scale, low = rng.random((2, batch, num_values), np.float32)
    given = [array.copy() for array in (weights, codes, scale, low)]
    expected = np.zeros((batch, num_weights, dim))
    for b in range(batch):
        for s in range(num_values):
            value = low[b, s].astype(np.float64) + codes[b, s] * scale[b, s].astype(np.float64)
            expected[b] += weights[b, :, s, None] * value
    lowless = expected - np.einsum("bts,bs->bt", weights, low)[..., None]
    alone = mix_codes(weights[0], codes[0], scale[0], low[0])
    assert alone.shape == expected[0].shape, f"without a batch: got shape {alone.shape}, expected {expected[0].shape}"
    got = mix_codes(weights, codes, scale, low)
    assert got.shape == expected.shape, f"got shape {got.shape}, expected {expected.shape}: one row per row of weights"
    assert got.dtype == np.float32, f"got {got.dtype}, expected float32, as all that came in"
    hint = "; low is missing" if np.allclose(got, lowless, rtol=1e-4) else "; each value has its own scale and low"
    for name, old, new in zip(("weights", "codes", "scale", "low"), given, (weights, codes, scale, low)):
        assert np.array_equal(old, new), f"{name} was changed: the caller needs it again"
    assert np.allclose(got, expected, rtol=1e-4), f"got {got[0, 0]}, decoding gives {expected[0, 0]}{hint}"
    with np.errstate(over="ignore"):
        tiny = mix_codes(*np.array([[[1e-9]], [[255]]], np.float32), *np.array([[1e37], [0]], np.float32))
    assert np.isfinite(tiny), "255 * 1e37 overflows: the values were decoded; multiply scale into the weights instead"


if __name__ == "__main__":
    test_unit_mix_codes()

### BEGIN HIDDEN TESTS
if __name__ == "__main__":
    test_unit_mix_codes(shape=(1, 1, 9, 9), seed=1)
    test_unit_mix_codes(shape=(3, 2, 0, 4), seed=2)
### END HIDDEN TESTS

# %% [markdown]
"""
The cache of a model keeps one block of bytes for all layers. New tokens are kept aside during their pass, so attention
sees the chunk exactly as it came, and the past as it was stored. At the commit it is quantised.

`update` hands out `CodedTensor`s, which are decoded only if somebody asks for their `data`. Our attention does not: it
calls the cache's `attend`, which scores and mixes the codes.
"""

# %%
#| export
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


# %%
#| export
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

# %% nbgrader={"grade": true, "grade_id": "22-quantized-model-test", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
def test_unit_quantized_model():
    """Oracles: the model without a cache; what was put in; one layer's QuantizedKVCache."""
    model, ids = random_gpt(), np.random.default_rng(2).integers(0, 64, (2, 12))
    expected = model(ids).numpy()
    for axis in ("token", "channel"):
        cache = QuantizedModelKVCache(2, 16, 3, 2, 8, bits=8, key_axis=axis, group_size=4)
        pieces = [model(ids[:, t : t + 3], cache=cache).numpy() for t in range(0, 12, 3)]
        got = np.concatenate(pieces, axis=1)
        error = np.abs(got - expected).max(axis=(0, 2))
        assert error[:3].max() < 1e-4, f"{axis}: the first chunk is off by {error[:3].max():.4f}, it is seen as it came"
        assert 0 < error.max() < 0.2, f"{axis}: logits, 8 bits, per position: off by {error.round(3).tolist()}"
    cache, alone = QuantizedModelKVCache(2, 16, 1, 2, 8, bits=4, group_size=4), QuantizedKVCache(2, 16, 2, 8, 4, "token", 4)
    k, v = np.random.default_rng(0).standard_normal((2, 2, 2, 5, 8), dtype=np.float32)
    view = cache.update(0, k, v, n_new=[5, 2])
    assert np.array_equal(view.key.numpy(), k), "a new chunk is seen exactly as it came, it is quantised at the commit"
    cache.advance()
    alone.update(k, v, n_new=[5, 2])
    for row, length in enumerate((5, 2)):
        for got, other in zip(cache.get(0), alone.get_kv(row)):
            assert np.array_equal(got.numpy()[row, :, :length], other), f"row {row}: not what one layer's cache reads"
    assert cache.nbytes == alone.memory_bytes(), f"bytes: {cache.nbytes}, one layer's cache has {alone.memory_bytes()}"


if __name__ == "__main__":
    test_unit_quantized_model()

# %% [markdown]
"""
## 14. On disk

The third way: keep everything, but elsewhere. A conversation rests overnight, its process ends, and tomorrow the whole
prompt is run again. A cache is numbers, so lesson 07's file for arrays can keep it. What must go in?

    "key", "value"   (L, B, H_kv, S, D)   S: tokens of the longest row; what is not a token is zero
    "lengths"        (B,) int64           committed tokens of each row; nothing that is pending

Slots that hold nothing need no bytes.

*Predict.* Two layers, one row, two heads of D = 8, float32, max_seq_len 64, five tokens stored. How many bytes do keys
and values take in the file? How many times as many in memory?
"""

# %% nbgrader={"grade": false, "grade_id": "22-predict-file", "locked": false, "schema_version": 3, "solution": true, "task": false}
# predicted_file_bytes = ...
# predicted_times_in_memory = ...
### BEGIN SOLUTION
predicted_file_bytes = 1280
predicted_times_in_memory = 12.8
### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "22-predict-file-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_predict_file():
    """Oracle: two arrays of that shape, and the nbytes of a real cache."""
    arrays = np.zeros((2, 2, 1, 2, 5, 8), np.float32)  # key and value, L, B, H_kv, S, D
    memory = KVCache(1, 64, 2, 2, 8).nbytes
    got, times = predicted_file_bytes, memory / arrays.nbytes
    assert got == arrays.nbytes, f"got {got} bytes, arrays of that shape have {arrays.nbytes}" + (
        "; that is the keys alone" if got * 2 == arrays.nbytes else "") + (
        "; slots without a token are not written" if got == memory else "")
    assert predicted_times_in_memory == times, f"got {predicted_times_in_memory} times, expected 64 / 5 = {times}"


if __name__ == "__main__":
    test_unit_predict_file()

# %% [markdown]
"""
Write it: `get(layer_idx)` hands out one layer's committed key and value (B, H_kv, S, D) as Tensors, `seq_lens` the
lengths. The state holds copies in the cache's own dtype.
"""

# %% nbgrader={"grade": false, "grade_id": "22-state", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def cache_state(cache):
    """All that a cache needs to go on, as copies: {"key", "value": (L, B, H_kv, S, D), "lengths": (B,) int64}.

    A cache that does not keep each token as it came names arrays of its own, in the place of key and value.

    >>> {name: array.shape for name, array in cache_state(KVCache(1, 64, 2, 2, 8)).items()}
    {'key': (2, 1, 2, 0, 8), 'value': (2, 1, 2, 0, 8), 'lengths': (1,)}
    """
    if isinstance(cache, PendingKVCache):
        own = {name: array.copy() for name, array in cache._arrays().items()}
        return {**own, "lengths": np.array(cache.seq_lens, np.int64)}
    ### BEGIN SOLUTION
    layers = [cache.get(layer_idx) for layer_idx in range(cache.num_layers)]
    return {
        "key": np.stack([key.numpy() for key, _ in layers]),
        "value": np.stack([value.numpy() for _, value in layers]),
        "lengths": np.array(cache.seq_lens, np.int64),
    }
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "22-state-test", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
def test_unit_state(lengths=(3, 1), dtype=np.float32):
    """Oracle: the numbers that were put in; every layer and every row has its own."""
    cache, expected = KVCache(2, 8, 3, 2, 4, dtype=dtype), np.zeros((2, 3, 2, 2, 3, 4), dtype)
    for layer in range(3):
        chunk = (np.arange(96).reshape(2, 2, 2, 3, 4) + 100 * layer).astype(dtype)
        cache.update(layer, *chunk, n_new=list(lengths))
        for row, length in enumerate(lengths):
            expected[:, layer, row, :, :length] = chunk[:, row, :, :length]
    cache.advance()
    state = cache_state(cache)
    assert set(state) == {"key", "value", "lengths"}, f"got {sorted(state)}, expected key, value and lengths"
    got = state["lengths"]
    assert isinstance(got, np.ndarray) and got.dtype == np.int64, f"lengths: got {got!r}, expected an int64 array"
    assert got.tolist() == list(lengths), f"lengths: got {got.tolist()}, expected {list(lengths)}, one for each row"
    for name, array in zip(("key", "value"), expected):
        got = state[name]
        assert got.shape == array.shape, f"{name}: got shape {got.shape}, expected {array.shape}: all layers, 3 slots"
        assert got.dtype == dtype, f"{name}: got {got.dtype}, the cache stores {np.dtype(dtype)}"
        wrong = [layer for layer in range(3) if not np.array_equal(got[layer], array[layer])]
        assert not wrong, f"{name}: layers {wrong} are not what was stored there"
    assert not np.shares_memory(state["key"], cache._store), "the state shares memory with the cache, and will change"


if __name__ == "__main__":
    test_unit_state()

### BEGIN HIDDEN TESTS
if __name__ == "__main__":
    test_unit_state(lengths=(0, 3), dtype=np.float16)
### END HIDDEN TESTS

# %% [markdown]
"""
Loading is the harder half. A file may be cut off (lesson 07 refuses it), belong to another model, hold a NaN, or not be
a cache at all. And the cache that we load into may be somebody's conversation: **look at everything first, then
change**.

If all is well, a loaded file is one more pass: reset, an update for each layer with `n_new` = lengths, advance. So
whatever cache takes tokens can be filled, also a longer one, a growing one, or one on disk.

`state_problem` looks. Names and lengths are given, and `needed`, the shape and dtype of each array. Look at the arrays:
shape, dtype, and numbers that are finite.
"""

# %% nbgrader={"grade": false, "grade_id": "22-state-problem", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def state_problem(state, cache):
    """Why this cache cannot take that state, as a sentence that names the array; None if it can. Changes nothing."""
    lengths, rows = state.get("lengths", np.zeros(0)), cache.batch_size
    if lengths.dtype != np.int64 or lengths.shape != (rows,) or lengths.min() < 0:
        return f"lengths must count the tokens of {rows} rows, got {lengths.dtype} {lengths.tolist()}"
    longest = int(lengths.max())
    needed = state_layout(cache, longest)  # name -> (shape, dtype)
    if set(state) != {*needed, "lengths"}:
        return f"it holds {sorted(state)[:5]}, this cache needs {sorted(needed)[:5]} and lengths"
    ### BEGIN SOLUTION
    for name, (shape, dtype) in needed.items():
        array = state[name]
        if array.shape != shape:
            return f"{name} has shape {array.shape}, this cache needs {shape}"
        if array.dtype != dtype:
            return f"{name} is {array.dtype}, this cache stores {dtype}"
        if not np.isfinite(array).all():
            return f"{name} holds a number that is not finite"
    ### END SOLUTION
    if cache.capacity is not None and longest > cache.capacity:
        return f"it holds {longest} tokens, this cache has max_seq_len={cache.max_seq_len}"
    return cache._impossible(state) if isinstance(cache, PendingKVCache) else None


def state_layout(cache, longest):
    """The shape and dtype of each array, but for the lengths, in a state of this cache whose longest row has so many."""
    if isinstance(cache, PendingKVCache):
        return {name: (array.shape, array.dtype) for name, array in cache._arrays().items()}
    shape = cache.num_layers, cache.batch_size, cache.num_heads, longest, cache.head_dim
    return {"key": (shape, cache.dtype), "value": (shape, cache.dtype)}

# %%
def good_state(dtype=np.float32):
    """The state of 3 layers, 2 rows of 4 and 2 tokens, 2 heads of 5."""
    key, value = np.random.default_rng(0).standard_normal((2, 3, 2, 2, 4, 5)).astype(dtype)
    return {"key": key, "value": value, "lengths": np.array([4, 2])}


def with_number(array, number):
    """A copy of `array` whose last number is another."""
    array = array.copy()
    array[(-1,) * array.ndim] = number
    return array

# %% nbgrader={"grade": true, "grade_id": "22-state-problem-test", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
def test_unit_state_problem():
    """Oracle: a good state, and one fault at a time."""
    good, cache = good_state(), KVCache(2, 6, 3, 2, 5)
    problem = state_problem(good, cache)
    assert problem is None, f"a good state was refused: {problem}"
    for name in ("key", "value"):
        array = good[name]
        faults = {
            "of a model with another head_dim": array[..., :4], "of one layer less": array[:2],
            "of one row, which NumPy would broadcast into both": array[:, :1], "one token short": array[:, :, :, :3],
            "float64, and would be rounded": array.astype(np.float64), "float16": array.astype(np.float16),
            "with a NaN": with_number(array, np.nan), "with an inf": with_number(array, np.inf),
        }
        for fault, wrong in faults.items():
            problem = state_problem({**good, name: wrong}, cache)
            assert isinstance(problem, str), f"a {name} array {fault}: got {problem!r}, nobody noticed"
            assert name in problem, f"a {name} array {fault}: the sentence must name it, got {problem!r}"
    ### BEGIN HIDDEN TESTS
    half = KVCache(2, 6, 3, 2, 5, dtype=np.float16)
    assert state_problem(good_state(np.float16), half) is None, "a float16 state fits a float16 cache"
    assert "value" in str(state_problem({**good, "value": -np.inf * good["value"]}, cache)), "-inf is not finite"
    assert state_problem({**good, "lengths": np.array([3, 2])}, cache), "lengths of 3 tokens, arrays of 4: refused"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_state_problem()

# %% [markdown]
"""
The two functions themselves are given. They refuse a cache with pending tokens: a file with half a pass could not go on.

A cache that forgets or compresses cannot give back what it was given. It is saved as it stands, every array that it
keeps, empty slots too: the ring and its positions, the scores, the packed codes. Such a file fits only a cache of the
same class and options, so `state_kind` is written beside it. And positions can be wrong where shapes are right:
`_impossible` of each class looks at them.
"""

# %%
#| export
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

# %%
#| export
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

# %% nbgrader={"grade": true, "grade_id": "22-saved-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_saved():
    """Oracle: the cache that was never saved, bit by bit; a file with a NaN, and what the cache held before it."""
    model, ids = random_gpt(), np.random.default_rng(0).integers(0, 64, (2, 6))
    cache, fresh = KVCache(2, 16, 3, 2, 8), KVCache(2, 16, 3, 2, 8)
    model(ids, cache=cache)
    cache.rollback([0, 2])
    model(ids[:, :1], cache=fresh)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "chat.safetensors")
        save_cache(cache, path)
        twins = [load_cache(path), load_cache(path, KVCache(2, 9, 3, 2, 8, grow=True))]
        state, before = cache_state(cache), cache_state(fresh)
        save_checkpoint(path, {**state, "value": with_number(state["value"], np.nan)})
        message = error_of(lambda: load_cache(path, fresh))
        assert "value" in message, f"a file with a NaN among the values: said {message!r}"
        ring, other = (SlidingWindowKVCache(2, None, 3, 2, 8, window=3, sinks=1) for _ in range(2))
        model(ids, cache=ring)
        save_cache(ring, path)
        message = error_of(lambda: load_cache(path, fresh))
        assert "SlidingWindowKVCache" in message, f"a window's file for a cache of all tokens: said {message!r}"
        got, expected = (model(ids[:, :1], cache=each).numpy() for each in (load_cache(path, other), ring))
        assert np.array_equal(got, expected), "a window that was saved does not go on bit by bit"
    for name, array in cache_state(fresh).items():
        assert np.array_equal(array, before[name]), f"a refused file changed the {name} of the cache"
    for twin in twins:
        assert twin.seq_lens == [6, 4], f"loaded lengths {twin.seq_lens}, saved [6, 4]"
        got, expected = (model(ids[:, :1], cache=each).numpy() for each in (twin, cache.clone()))
        assert np.array_equal(got, expected), "the next token's logits are not bit by bit those of the saved cache"


if __name__ == "__main__":
    test_unit_saved()

# %% [markdown]
"""
*Look back.* Which wrong file can no check find? (One of another model with the same sizes: its numbers are as good as
ours. A server puts the model's name into the metadata.)
"""

# %% [markdown]
"""
## 15. A store that is a file

Can a cache be larger than memory? `numpy.memmap` maps a file: it reads and writes like an array, and the system brings
pages in and takes them out. Two traps:

* A file that is only *given* a size is sparse: it has no bytes yet. They are taken at the first write, and on a full
  disk that write kills the process. So take them first.
* A temporary file outlives a process that is killed. So let it have no name: the system frees it with its last user.
"""

# %%
#| export
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

# %% nbgrader={"grade": true, "grade_id": "22-offloaded-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_offloaded():
    """Oracles: the cache in memory, bit by bit, and a folder in which nothing is left."""
    model, ids = random_gpt(), np.random.default_rng(1).integers(0, 64, (2, 20))
    memory = KVCache(2, 32, 3, 2, 8)
    model(ids, cache=memory)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "chat.safetensors")
        save_cache(memory, path)
        with OffloadedKVCache(2, 32, 3, 2, 8, folder=folder, grow=True) as cache:
            load_cache(path, cache)
            got, expected = (model(ids[:, :1], cache=each).numpy() for each in (cache, memory))
            assert np.array_equal(got, expected), "the next token's logits differ on disk and in memory"
            cache.clone().reset()
            for name, disk, there in zip(("key", "value"), cache.get(1), memory.get(1)):
                assert np.array_equal(disk.numpy(), there.numpy()), f"{name}: not as in memory; is a clone's file ours?"
        assert os.listdir(folder) == ["chat.safetensors"], f"files were left: {os.listdir(folder)}"


if __name__ == "__main__":
    test_unit_offloaded()

# %% [markdown]
"""
*Predict, before you run it:* is reading a cache from a file faster than running the prompt again? And what does a
token cost that reads its keys from a mapped file?
"""

# %% nbgrader={"grade": false, "grade_id": "22-measure-disk", "locked": true, "schema_version": 3, "solution": false, "task": false}
def show_disk(prompt_len=480, max_seq_len=512):
    """Measure a prompt: run again, saved, loaded; then one token on a cache in memory and on one in a file."""
    model, ids = random_gpt(256, 128, 4, 4, max_seq_len, 4), np.arange(prompt_len)[None] % 256
    sizes = (1, max_seq_len, 4, 4, 32)
    memory, disk = KVCache(*sizes), OffloadedKVCache(*sizes)
    with tempfile.TemporaryDirectory() as folder, no_grad():
        path = os.path.join(folder, "chat.safetensors")
        again = measure_latency(lambda: (memory.reset(), prefill(model, ids, memory)), repeats=2)
        save = measure_latency(lambda: save_cache(memory, path), repeats=3)
        load = measure_latency(lambda: load_cache(path, disk), repeats=5)
        print(f"{memory.nbytes:,} bytes in memory, {os.path.getsize(path):,} in the file of {prompt_len} tokens")
    print(f"prefill again {1e3 * again:.1f} ms, save {1e3 * save:.1f} ms, load {1e3 * load:.1f} ms")
    for name, cache in (("memory", memory), ("file", disk)):
        def token(cache=cache):
            model(ids[:, :1], cache=cache)
            cache.rollback(1)

        with no_grad():
            print(f"one token, cache in {name:<6}: {1e3 * measure_latency(token, repeats=9):.2f} ms")


def show_sparse(num_bytes=2**20):
    """The bytes that a file says it has, and those that it has."""
    for name, make in (("given a size", lambda file: file.truncate(num_bytes)),
                       ("bytes taken", lambda file: take_bytes(file, num_bytes))):
        with tempfile.TemporaryFile() as file:
            make(file)
            found = os.fstat(file.fileno())
            taken = 512 * getattr(found, "st_blocks", 0)  # Windows does not tell
            print(f"{name:<13} says {found.st_size:,} bytes, takes {taken:,}")


if __name__ == "__main__":
    show_disk()
    show_sparse()

# %% [markdown]
"""
A mapped file costs little while its pages stay in memory. A cache that does not fit is read from the disk again at
*every* token, all of it. FlexGen (Sheng et al., ICML 2023) runs large models with weights and cache on GPU, CPU and
disk, and pays by taking many requests at once: throughput, not speed.
"""

# %% [markdown]
"""
## 16. What it all costs

What do small caches cost, on real text that the model was not trained on? The demo's GPT reads the same windows of text
through each, 16 tokens at a time and the last 8 one by one, so that attention reads what the cache kept:

* *logit error*: the largest difference of a logit from the float32 cache;
* *perplexity*: e to the mean loss. 20 means: as unsure as between 20 equally likely tokens;
* *ms per step*: one token more in every row, the fastest of the last 8. The caches take turns, each time in another
  order, so that none always runs after the same one.

*Predict.* Which will be worse for this model: to forget all but the last 64 tokens, or to keep all of them in 2 bits?
"""

# %%
#| export
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

# %% nbgrader={"grade": false, "grade_id": "22-measure-table", "locked": true, "schema_version": 3, "solution": false, "task": false}
def with_options(kind, **options):
    """A factory of caches of that kind."""
    return lambda **sizes: kind(**sizes, **options)


def held_out_text(rows=4, seq_len=192):
    """The demo's model, and windows (rows, seq_len + 1) from the end of its text, which it was not trained on."""
    from tinytorch.demo.language import load, splits, text

    model, tokenizer, _ = load()
    held_out = splits(tokenizer.encode(text()))[1]
    starts = np.linspace(0, len(held_out) - seq_len - 1, rows).astype(int)
    return model, held_out[starts[:, None] + np.arange(seq_len + 1)]


if __name__ == "__main__":
    quantized = {f"int{bits}, {axis} keys": with_options(QuantizedModelKVCache, bits=bits, key_axis=axis)
                 for bits in (8, 4, 2) for axis in ("token", "channel")}
    reports = compare_caches(*held_out_text(), {
        "float32": KVCache, "float16": with_options(KVCache, dtype=np.float16), **quantized,
        "window 64": with_options(SlidingWindowKVCache, window=64),
        "window 60 + 4 sinks": with_options(SlidingWindowKVCache, window=60, sinks=4),
        "eviction to 64": with_options(HeavyHitterKVCache, budget=64),
    })

# %% nbgrader={"grade": false, "grade_id": "22-measure-plot", "locked": true, "schema_version": 3, "solution": false, "task": false}
def plot_reports(reports):
    """Perplexity against bytes: good is low and left."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("matplotlib is not installed: read the two columns above instead")
        return
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    for report in reports:
        axis.scatter(report.nbytes / 2**20, report.perplexity, color="tab:blue")
        axis.annotate(report.name, (report.nbytes / 2**20, report.perplexity), xytext=(4, 4), textcoords="offset points")
    axis.set(xscale="log", xlabel="cache in MiB", ylabel="perplexity on held-out text")
    plt.show()


if __name__ == "__main__":
    plot_reports(reports)


# %% [markdown]
"""
Only the last column changes from run to run, but for rounding. On this text float16 and 8 bits leave the perplexity
as it is to two decimals; 4 bits add less than a tenth, 2 bits less than a half. Forgetting adds more, and window,
sinks and score differ little. But these are 768 predictions of one small model: on another text, neighbours in the
table can change places.

*Look back.* Why is no cache in fewer bits faster than float32? (NumPy makes float32 of all that is stored, at every
step.) What do fewer bits buy here, then? (Room: more rows, or longer ones.)
"""

# %% [markdown]
"""
## 17. The end

The module test runs every check, and then one story: the same text through the members of the family.
"""

# %% nbgrader={"grade": true, "grade_id": "22-module-test", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
def test_scenario():
    """Oracle: a model of one layer, without a cache. What is long enough changes nothing, what is shorter does."""
    model, ids = random_gpt(num_layers=1), np.random.default_rng(2).integers(1, 64, (2, 20))
    expected = model(ids).numpy()
    cache = enable_kv_cache(model, factory=SlidingWindowKVCache, batch_size=2, window=20)
    error = np.abs(prefill(model, ids, cache, chunk=6).numpy() - expected).max()
    assert error < 1e-3, f"a window of 20 over 20 tokens differs from no cache by {error:.4f}"
    short = enable_kv_cache(model, factory=SlidingWindowKVCache, batch_size=2, window=4, sinks=2)
    error = np.abs(prefill(model, ids, short, chunk=6).numpy() - expected).max(axis=(0, 2))
    assert error[:4].max() < 1e-3 < error[-1], "a window of 4 shows from the token on that it cannot see all"
    assert short.residents().tolist() == [[0, 1, 16, 17, 18, 19]] * 2, f"held: {short.residents().tolist()}"
    heavy = enable_kv_cache(model, factory=HeavyHitterKVCache, batch_size=2, budget=20)
    error = np.abs(prefill(model, ids, heavy, chunk=6).numpy() - expected).max()
    assert error < 1e-3, f"a budget of 20 over 20 tokens differs from no cache by {error:.4f}"
    small = enable_kv_cache(model, factory=QuantizedModelKVCache, batch_size=2, bits=8, group_size=4)
    error = np.abs(prefill(model, ids, small, chunk=6).numpy() - expected).max()
    assert 0 < error < 0.2, f"8 bits differ from no cache by {error:.4f}, expected a little, and less than 0.2"
    with tempfile.TemporaryDirectory() as folder:
        save_cache(small, path := os.path.join(folder, "chat.safetensors"))
        twin = load_cache(path, QuantizedModelKVCache(*(2, 64, 1, 2, 8), bits=8, group_size=4))
    got, kept = (model(ids[:, :1], cache=each).numpy() for each in (twin, small))
    assert np.array_equal(got, kept), "8 bits that were saved do not go on bit by bit"


def test_module():
    """Every check of this lesson, then a story."""
    for check in (
        test_unit_view, test_unit_ring, test_unit_chunk, test_unit_rollback, test_unit_predict_window,
        test_unit_window, test_unit_renumber, test_unit_received, test_unit_evict, test_unit_heavy,
        test_unit_predict_bits, test_unit_quantize, test_unit_pack, test_unit_quantized_bytes, test_unit_groups,
        test_unit_quantized_cache, test_unit_outliers, test_unit_predict_fold, test_unit_mix_codes,
        test_unit_quantized_model,
        test_unit_predict_file, test_unit_state, test_unit_state_problem, test_unit_saved, test_unit_offloaded,
        test_scenario,
    ):
        check()
        print(f"{check.__name__:<26} holds")


if __name__ == "__main__":
    test_module()

# %% [markdown]
"""
**In five lines.** A pass stands aside until its commit: attention sees what was kept and the whole chunk, and only then
is anything dropped or rounded. A window with sinks never grows; a cache by score keeps what was looked at; both forget
for good. Fewer bits keep every token: a low, a step and codes for each group, keys along the channel, where their
outliers are. A group is frozen once, so the stored bytes do not depend on the chunks. What keeps each token as it came
can rest in a file.
"""

# %% [markdown]
"""
**Exercises.** (1) Run the table with `window=16` and `window=128`: where does forgetting begin to cost? (2) Store scale
and low in float16: how many bytes less, how much more error? (3) H2O chooses per head. Which arrays of
`HeavyHitterKVCache` get one more axis, and why does the mask, too? (4) Keep the newest 32 tokens in float32, values as
well, and run the table with 2 bits.
"""

# %% [markdown]
"""
**A design note.** Where do codes become numbers again? We do it before attention, for a whole layer at every step:
simple, easy to test, and slower than no compression at all. The authors of KIVI do it inside the matrix product. They
report 2.6 times less peak memory, weights included; that allows batches up to 4 times as large, and 2.35 to 3.47 times
the throughput (Liu et al. 2024, abstract). The speed comes from the room: more rows share each weight that is read.

**What breaks next.** Each row still reserves room of its own, used or not, and a thousand conversations that begin
alike store their beginning a thousand times. Lesson 23 cuts the memory into blocks, and shares them.
"""

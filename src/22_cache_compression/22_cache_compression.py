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

**You build** caches that stay small: a window that slides and keeps its sinks, keys and values in 8, 4 or 2 bits, and
a cache that drops what nobody looks at. Each takes the place of lesson 17's, and no other line of the model changes.

**Needs** lessons 12, 13, 14 and 17. **Exported** to `tinytorch.generation.cache_compression`. **Time** 90 minutes.
"""

# %%
#| default_exp generation.cache_compression
#| export
from typing import NamedTuple

import numpy as np

from tinytorch.core.attention import visible_mask
from tinytorch.core.tensor import Tensor
from tinytorch.generation.kv_cache import (
    CacheDoor,
    CacheLedger,
    CacheRows,
    KVCache,
    KVCacheConfig,
    KVStore,
    KVView,
    LayerKVCache,
    check_tokens,
    next_positions,
    per_row,
    random_gpt,
    storage_dtype,
    whole_number,
)

# %%
#| export
class PendingKVCache(KVStore, CacheDoor, CacheRows):
    """A cache that keeps an open pass aside, exactly as it came, and takes it in when it is committed.

    Attention sees what the cache kept of the past and the whole new chunk. A member says what it keeps:

        _resident(layer_idx) -> (key, value, pos)             arrays (B, H, R, D) twice and (B, R); -1 where empty
        _take_in(layer_idx, key, value, n_new)                a committed chunk (B, H, T, D), n_new[row] of it valid
        _forget(kept, stored), _gather(rows), reset, clone    as in lesson 17
    """

    def update(self, layer_idx, key, value, n_new=None):
        """As in KVCache; the view holds copies, so it stays what it was."""
        with self._lock:
            layer_idx, key, value, n_new = self._accept(layer_idx, key, value, n_new)
        self._pending[layer_idx] = key.copy(), value.copy()
        old_key, old_value, old_pos = self._resident(layer_idx)
        new_pos = next_positions(self._ledger.lengths, n_new, key.shape[2])
        return KVView(
            Tensor(np.concatenate([old_key, key], axis=2)), Tensor(np.concatenate([old_value, value], axis=2)),
            np.concatenate([old_pos, new_pos], axis=1),
        )

    def abandon(self):
        """Drop what is pending: the pass that wrote it has failed."""
        self._pending.clear()
        self._ledger.close_pass()

    def get(self, layer_idx):
        """What one layer still holds of its committed tokens, key and value (B, H_kv, R, D); empty slots are zero."""
        key, value, _ = self._resident(self._layer(layer_idx))
        return Tensor(key), Tensor(value)

    def _keep_pass(self):
        n_new, seq_len = self._ledger.n_new, self._ledger.seq_len
        skipped = np.zeros((2, self.batch_size, self.num_heads, seq_len, self.head_dim), self.dtype)
        for layer_idx in range(self.num_layers):
            self._take_in(layer_idx, *self._pending.get(layer_idx, skipped), n_new)
        self._pending.clear()

# %% [markdown]
"""
## A. Windows, sinks, eviction
"""

# %% [markdown]
"""
## B. Fewer bits
"""

# %% [markdown]
"""
## C. Elsewhere: on disk
"""

# %% [markdown]
"""
## D. The table
"""

"""Cache compression: caches that stay small: windows, fewer bits, and a place on disk.

Lesson 22_cache_compression. Built from src/22_cache_compression/22_cache_compression.py by `tito dev build`: change it there, not here.
"""

__all__ = [
    "PendingKVCache",
    "cache_state",
    "state_problem",
    "require_tokens",
    "save_cache",
    "cache_for",
    "fill",
    "load_cache",
    "take_bytes",
    "mapped_zeros",
    "OffloadedKVCache",
]


# %% cell 2
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


# %% cell 3
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


# %% cell 9
import math
import os
import tempfile

from tinytorch.core.training import load_checkpoint, save_checkpoint
from tinytorch.generation.kv_cache import CacheStateError


# %% cell 11 (22-state)
def cache_state(cache):
    """All that a cache needs to go on, as copies: {"key", "value": (L, B, H_kv, S, D), "lengths": (B,) int64}.

    >>> {name: array.shape for name, array in cache_state(KVCache(1, 64, 2, 2, 8)).items()}
    {'key': (2, 1, 2, 0, 8), 'value': (2, 1, 2, 0, 8), 'lengths': (1,)}
    """
    layers = [cache.get(layer_idx) for layer_idx in range(cache.num_layers)]
    return {
        "key": np.stack([key.numpy() for key, _ in layers]),
        "value": np.stack([value.numpy() for _, value in layers]),
        "lengths": np.array(cache.seq_lens, np.int64),
    }


# %% cell 14 (22-state-problem)
def state_problem(state, cache):
    """Why this cache cannot take that state, as a sentence that names the array; None if it can. Changes nothing."""
    if set(state) != {"key", "value", "lengths"}:
        return f"it holds {sorted(state)[:5]}, a saved cache is key, value and lengths"
    lengths, rows = state["lengths"], cache.batch_size
    if lengths.dtype != np.int64 or lengths.shape != (rows,) or lengths.min() < 0:
        return f"lengths must count the tokens of {rows} rows, got {lengths.dtype} {lengths.tolist()}"
    longest = int(lengths.max())
    needed = (cache.num_layers, rows, cache.num_heads, longest, cache.head_dim)  # (L, B, H_kv, S, D)
    for name in ("key", "value"):
        array = state[name]
        if array.shape != needed:
            return f"{name} has shape {array.shape}, this cache needs {needed}"
        if array.dtype != cache.dtype:
            return f"{name} is {array.dtype}, this cache stores {cache.dtype}"
        if not np.isfinite(array).all():
            return f"{name} holds a number that is not finite"
    if cache.capacity is not None and longest > cache.capacity:
        return f"it holds {longest} tokens, this cache has max_seq_len={cache.max_seq_len}"
    return None


# %% cell 18
def require_tokens(cache):
    """NotImplementedError for a cache that compresses or forgets what it was given."""
    if isinstance(cache, PendingKVCache):
        raise NotImplementedError(f"{type(cache).__name__} does not keep each token as it came, so it cannot be "
                                  "saved and continued exactly: save the ids, and prefill again")


def save_cache(cache, path):
    """Write the committed tokens of a cache to a safetensors file, whole or not at all: a kill leaves the old file.

    CacheStateError while a pass is open. NotImplementedError for a cache that does not keep each token as it came.
    """
    require_tokens(cache)
    if cache.pending_layers:
        raise CacheStateError(f"layers {cache.pending_layers} are pending: advance() or abandon(), then save")
    save_checkpoint(path, cache_state(cache), {"format": "tinytorch KV cache", "max_seq_len": cache.max_seq_len})


# %% cell 19
def cache_for(state, metadata, path):
    """An empty KVCache of the sizes that a file names."""
    shape, longest = np.shape(state.get("key")), metadata.get("max_seq_len", "")
    if len(shape) != 5 or not longest.isdecimal():
        raise ValueError(f"{path} holds {sorted(state)[:5]}: no cache that save_cache wrote")
    num_layers, batch_size, num_heads, _, head_dim = shape
    return KVCache(batch_size, int(longest), num_layers, num_heads, head_dim, dtype=state["key"].dtype)


def fill(cache, state):
    """Put a state that fits in place of all that the cache holds, as one pass."""
    lengths = state["lengths"].tolist()
    cache.reset()
    if max(lengths):
        for layer_idx in range(cache.num_layers):
            cache.update(layer_idx, state["key"][layer_idx], state["value"][layer_idx], lengths)
        cache.advance()


def load_cache(path, cache=None):
    """Give a cache the tokens of a file that save_cache wrote, in place of its own (pending ones too); return it.

    Without a cache: a new KVCache of the saved sizes. A given one may be any that keeps each token as it came, also
    with another max_seq_len. What follows is bitwise what would have followed the cache that was saved.
    ValueError for a file that is damaged or does not fit; the cache is then as it was.
    """
    if cache is not None:
        require_tokens(cache)
    state, metadata = load_checkpoint(path)
    cache = cache_for(state, metadata, path) if cache is None else cache
    problem = state_problem(state, cache)
    if problem:
        raise ValueError(f"{path} does not fit: {problem}. Nothing was loaded")
    before = cache_state(cache)
    try:
        fill(cache, state)
    except BaseException:  # a cache that cannot grow, a pool without blocks, Ctrl-C
        fill(cache, before)
        raise
    return cache


# %% cell 23
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

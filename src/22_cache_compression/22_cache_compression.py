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

A conversation rests over night, its process ends, and tomorrow the whole prompt is run again. A cache is numbers, so
lesson 07's file for arrays can keep it. What must go in?

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
    got, times = predicted_file_bytes, KVCache(1, 64, 2, 2, 8).nbytes / arrays.nbytes
    assert got == arrays.nbytes, f"got {got} bytes, arrays of that shape have {arrays.nbytes}" + (
        "; that is the keys alone" if got * 2 == arrays.nbytes else "")
    assert predicted_times_in_memory == times, f"got {predicted_times_in_memory} times, expected 64 / 5 = {times}"


if __name__ == "__main__":
    test_unit_predict_file()

# %%
#| export
import math
import os
import tempfile

from tinytorch.core.training import load_checkpoint, save_checkpoint
from tinytorch.generation.kv_cache import CacheStateError

# %%
from tinytorch.core.autograd import no_grad
from tinytorch.generation.kv_cache import prefill
from tinytorch.profiling.profiler import measure_latency

# %% nbgrader={"grade": false, "grade_id": "22-state", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def cache_state(cache):
    """All that a cache needs to go on, as copies: {"key", "value": (L, B, H_kv, S, D), "lengths": (B,) int64}.

    >>> {name: array.shape for name, array in cache_state(KVCache(1, 64, 2, 2, 8)).items()}
    {'key': (2, 1, 2, 0, 8), 'value': (2, 1, 2, 0, 8), 'lengths': (1,)}
    """
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
Loading is the harder half. A file may be cut off (lesson 07 refuses it), belong to another model, hold a NaN, or not be a
cache at all. And the cache that we load into may be somebody's conversation: **look at everything first, then
change**.

If all is well, a loaded file is one more pass: reset, an update for each layer with `n_new` = lengths, advance. So
whatever cache takes tokens can be filled, also a longer one, a growing one, or one on disk.

`state_problem` looks. Names and lengths are given; look at the two arrays: shape, dtype, and numbers that are finite.
"""

# %% nbgrader={"grade": false, "grade_id": "22-state-problem", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def state_problem(state, cache):
    """Why this cache cannot take that state, as a sentence that names the array; None if it can. Changes nothing."""
    if set(state) != {"key", "value", "lengths"}:
        return f"it holds {sorted(state)[:5]}, a saved cache is key, value and lengths"
    lengths, rows = state["lengths"], cache.batch_size
    if lengths.dtype != np.int64 or lengths.shape != (rows,) or lengths.min() < 0:
        return f"lengths must count the tokens of {rows} rows, got {lengths.dtype} {lengths.tolist()}"
    longest = int(lengths.max())
    needed = (cache.num_layers, rows, cache.num_heads, longest, cache.head_dim)  # (L, B, H_kv, S, D)
    ### BEGIN SOLUTION
    for name in ("key", "value"):
        array = state[name]
        if array.shape != needed:
            return f"{name} has shape {array.shape}, this cache needs {needed}"
        if array.dtype != cache.dtype:
            return f"{name} is {array.dtype}, this cache stores {cache.dtype}"
        if not np.isfinite(array).all():
            return f"{name} holds a number that is not finite"
    ### END SOLUTION
    if cache.capacity is not None and longest > cache.capacity:
        return f"it holds {longest} tokens, this cache has max_seq_len={cache.max_seq_len}"
    return None

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
The two functions themselves are given. Pending tokens are not saved, for a file with half a pass could not go on: that is
refused. Nor is a cache that compresses or forgets: what it has left is not what it was given.
"""

# %%
#| export
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

# %%
#| export
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
        try:
            load_cache(path, fresh)
            raise AssertionError("a file with a NaN was loaded")
        except ValueError as error:
            assert "value" in str(error), f"the message must name the array: {error}"
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
**A cache in a file.** Can a cache be larger than memory? `numpy.memmap` maps a file: it reads and writes like an array,
and the system brings pages in and takes them out. Two traps:

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
        again = measure_latency(lambda: (memory.reset(), prefill(model, ids, memory)), repeats=3)
        save = measure_latency(lambda: save_cache(memory, path), repeats=5)
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
## D. The table
"""

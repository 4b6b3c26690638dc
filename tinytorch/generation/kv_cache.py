"""Memoization: the KV cache: keys and values computed once, and a GPT that reads them instead.

Lesson 17_memoization. Built from src/17_memoization/17_memoization.py by `tito dev build`: change it there, not here.
"""

__all__ = [
    "random_gpt",
    "model_to_measure",
    "profile_naive_generation",
    "token_rows",
    "kv_cache_bytes",
    "write_tokens",
    "next_positions",
    "slot_positions",
    "check_room",
    "CacheStateError",
    "CacheLedger",
    "whole_number",
    "storage_dtype",
    "per_row",
    "lengths_to_keep",
    "check_row",
    "check_tokens",
    "check_chunk",
    "KVCacheConfig",
    "KNOWN_MODELS",
    "FIRST_SLOTS",
    "KVStore",
    "for_all_layers",
    "CacheDoor",
    "CacheRows",
    "KVView",
    "KVCache",
    "StandIn",
    "CachedAttention",
    "CountingPositions",
    "CommittingNorm",
    "original",
    "end_parts",
    "attention_parts",
    "require_parts",
    "stored_heads",
    "attach",
    "put_parts",
    "attached",
    "create_kv_cache",
    "enable_kv_cache",
    "disable_kv_cache",
    "generation_flops",
    "analyze_kvcache_speedup",
    "memory_analysis",
    "memory_growth_table",
    "analyze_kvcache_memory",
    "run_in_chunks",
    "prefill",
    "clear_slots",
    "gather_rows",
    "LayerKVCache",
    "attend_last",
    "multi_head_attention_with_cache",
    "IncrementalDecoder",
]


# %% cell 2
# One contract, one file: longer than its neighbours, so that a reader of KVCache finds everything that it keeps.
import math
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from tinytorch.core.attention import MultiHeadAttention, attention_weights, scaled_dot_product_attention, visible_mask
from tinytorch.core.autograd import no_grad
from tinytorch.core.layers import Module
from tinytorch.core.tensor import Tensor, cat, default_rng
from tinytorch.models.transformer import GPT, evaluating
from tinytorch.profiling.profiler import Measurement, MemoryTracker, measure_latency, time_calls


# %% cell 5
def random_gpt(vocab_size=64, embed_dim=32, num_layers=3, num_heads=4, max_seq_len=64, num_kv_heads=2, seed=0):
    """A GPT in eval mode whose parameters all differ, and are large enough that a mistake shows in the logits."""
    rng = np.random.default_rng(seed)
    model = GPT(vocab_size, embed_dim, num_layers, num_heads, max_seq_len, num_kv_heads, rng=rng)
    for parameter in model.parameters():
        noise = rng.standard_normal(parameter.shape, dtype=np.float32)
        parameter.data[...] = 0.2 * noise if parameter.ndim > 1 else parameter.data + 0.2 * noise
    return model.eval()


def model_to_measure(model, longest):
    """`model`, or if it is None a GPT of 4 layers, 128 wide; ValueError where it would measure something else."""
    if model is None:
        return random_gpt(256, 128, 4, 4, longest, num_kv_heads=4)
    if longest > model.max_seq_len:
        raise ValueError(f"{longest} tokens do not fit max_seq_len={model.max_seq_len}: choose shorter lengths")
    if model._kv_cache is not None:
        raise ValueError("the model has a cache enabled, and would never run without one: disable_kv_cache(model)")
    return model


def profile_naive_generation(model=None, lengths=(32, 64, 128, 256), repeats=5):
    """Measure one round of generation without a cache at several lengths; print and return (length, seconds).

    A round runs all tokens so far to get the logits of the last one. model: a GPT (default: 4 layers, 128 wide).
    The printed ratio compares each round with the first.
    """
    model = model_to_measure(model, max(lengths))
    ids = np.arange(max(lengths))[None] % model.vocab_size
    print("tokens so far   ms for the next token   ratio")
    rows = []
    for length in lengths:
        def one_round(ids=ids[:, :length]):
            return model.head(model.hidden(ids)[:, -1])

        with no_grad():
            rows.append((length, measure_latency(one_round, repeats=repeats)))
        print(f"{length:>13} {1e3 * rows[-1][1]:>23.2f} {rows[-1][1] / rows[0][1]:>7.1f}")
    return rows


# %% cell 8 (17-count-rows)
def token_rows(prompt_len, max_new_tokens, cached):
    """Token rows that pass through the model while it generates.

    >>> token_rows(3, 4, cached=False), token_rows(3, 4, cached=True)
    (18, 6)
    """
    if max_new_tokens == 0:
        return 0
    if cached:
        return prompt_len + max_new_tokens - 1
    return sum(prompt_len + i for i in range(max_new_tokens))


# %% cell 15 (17-bytes)
def kv_cache_bytes(num_layers, num_kv_heads, head_dim, num_tokens, itemsize):
    """Bytes of the keys and values of `num_tokens` tokens (of all rows of a batch together).

    >>> kv_cache_bytes(num_layers=12, num_kv_heads=12, head_dim=64, num_tokens=1, itemsize=2)
    36864
    """
    return 2 * num_layers * num_kv_heads * head_dim * num_tokens * itemsize


# %% cell 18 (17-write)
def write_tokens(store, new, lengths, n_new):
    """Write each row's first n_new tokens behind those that the row holds, in place.

    store (B, H, S, D), new (B, H, T, D); lengths and n_new are lists with one number per row.
    """
    for row, (start, count) in enumerate(zip(lengths, n_new)):
        store[row, :, start : start + count] = new[row, :, :count]


# %% cell 21 (17-slots)
def next_positions(lengths, n_new, seq_len):
    """The positions of the next tokens: (B, T), T = seq_len; -1 for padding beyond a row's n_new.

    >>> next_positions([5, 2], [2, 1], seq_len=2).tolist()
    [[5, 6], [2, -1]]
    """
    steps = np.arange(seq_len)
    return np.where(steps < np.array(n_new)[:, None], np.array(lengths)[:, None] + steps, -1)


def slot_positions(lengths):
    """The position of the token in each slot, -1 where the row has none: (B, S), S the length of the longest row.

    >>> slot_positions([3, 1]).tolist()
    [[0, 1, 2], [0, -1, -1]]
    """
    slots = np.arange(max(lengths))
    return np.where(slots < np.array(lengths)[:, None], slots, -1)


# %% cell 24 (17-room)
def check_room(lengths, n_new, max_seq_len):
    """ValueError when a row has no room for its new tokens; it names max_seq_len, tokens stored, asked for and free."""
    for row, (stored, asked) in enumerate(zip(lengths, n_new)):
        if stored + asked > max_seq_len:
            raise ValueError(
                f"the cache is full: row {row} holds {stored} tokens of max_seq_len={max_seq_len}, {asked} more "
                f"were asked for, {max_seq_len - stored} are free. Make a longer cache, or reset or roll back this one."
            )


# %% cell 27 (17-ledger)
class CacheStateError(ValueError):
    """The calls came in an order that no forward pass makes."""


class CacheLedger:
    """Which tokens are committed and which are pending. It counts; it holds no arrays.

    lengths: committed tokens per row. The open pass: `written`, the layers that have written it (none: no pass is
    open), `n_new`, what it adds to each row, `seq_len`, the width T of its chunk, and `failed`, layers whose update
    was refused for its data: until they come again, the pass may be started anew.
    """

    def __init__(self, batch_size):
        self.lengths = [0] * batch_size
        self.close_pass()

    def close_pass(self):
        """Forget the open pass."""
        self.n_new, self.seq_len, self.written, self.failed = [0] * len(self.lengths), 0, set(), set()

    def claim(self, layer_idx, n_new, seq_len):
        """Let one layer write: it opens a pass or joins the open one, once, with the tokens of the others."""
        if layer_idx in self.written:
            raise CacheStateError(
                f"layer {layer_idx} was updated twice in one pass: advance() comes after the last layer, "
                "abandon() after a pass that failed"
            )
        if self.written and (n_new, seq_len) != (self.n_new, self.seq_len):
            raise CacheStateError(
                f"layers disagree: layer {layer_idx} brings {n_new} tokens per row in a chunk of {seq_len}, "
                f"layers {sorted(self.written)} brought {self.n_new} in a chunk of {self.seq_len}"
            )
        self.n_new, self.seq_len = n_new, seq_len
        self.written.add(layer_idx)

    def commit(self):
        """Count what is pending as stored, and close the pass. CacheStateError when nothing is pending."""
        if not self.written:
            raise CacheStateError("advance() with nothing pending: update() every layer first, then advance() once")
        self.lengths = [length + count for length, count in zip(self.lengths, self.n_new)]
        self.close_pass()


# %% cell 30
def whole_number(name, value, least=1):
    """`value` as an int, or a ValueError that names the field (True, 2.0 and "2" are no whole numbers here)."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return int(value)


def storage_dtype(dtype):
    """float16, float32 or float64 as a NumPy dtype, or a ValueError that names the field."""
    try:
        if dtype is not None and np.dtype(dtype) in (np.float16, np.float32, np.float64):
            return np.dtype(dtype)
    except TypeError:
        pass  # not a dtype at all: the same message
    raise ValueError(f"dtype must be float16, float32 or float64, got {dtype!r}")


def per_row(name, value, batch_size):
    """One whole number per row, as a list; a single number counts for every row."""
    values = value.tolist() if isinstance(value, np.ndarray) else value
    values = list(values) if isinstance(values, (list, tuple, range)) else [values] * batch_size
    if len(values) != batch_size:
        raise ValueError(f"{name} needs one number for each of the {batch_size} rows, got {len(values)}")
    return [whole_number(name, number, least=0) for number in values]


def lengths_to_keep(lengths, stored):
    """One length per row, none of them longer than what the row has stored, as a list."""
    kept = per_row("lengths", lengths, len(stored))
    for row, (have, keep) in enumerate(zip(stored, kept)):
        if keep > have:
            raise ValueError(f"row {row} holds {have} tokens: it cannot be cut to {keep}")
    return kept


def check_row(row, batch_size):
    """`row` as an int from 0 to batch_size - 1, or a ValueError."""
    if whole_number("row", row, least=0) >= batch_size:
        raise ValueError(f"row {row} is beyond the last, {batch_size - 1}")
    return int(row)


def check_tokens(name, tokens, batch_size, num_heads, head_dim, dtype):
    """`tokens` as an array (B, H, T, D) of the storage dtype, or a ValueError that says what does not fit."""
    array = np.asarray(tokens.data if isinstance(tokens, Tensor) else tokens)
    if array.dtype.kind not in "iuf":
        raise ValueError(f"{name} must hold numbers, got {array.dtype}")
    needed = (batch_size, num_heads, "T >= 1", head_dim)
    if array.ndim != 4 or array.size == 0 or (*array.shape[:2], array.shape[3]) != (batch_size, num_heads, head_dim):
        raise ValueError(f"{name} has shape {array.shape}, needed (batch, heads, tokens, head_dim) = {needed}")
    if array.dtype != dtype:
        with np.errstate(over="ignore"):  # too large for float16 becomes inf, which the next line refuses
            array = array.astype(dtype)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds a number that is not finite as {array.dtype}: nothing was stored")
    return array


def check_chunk(key, value, n_new, lengths, max_seq_len):
    """The valid tokens per row of a chunk of keys and values, or a ValueError: they differ, or do not fit."""
    seq_len = key.shape[2]
    if value.shape[2] != seq_len:
        raise ValueError(f"keys of {seq_len} tokens came with values of {value.shape[2]}: they must be as many")
    n_new = per_row("n_new", seq_len if n_new is None else n_new, len(lengths))
    if max(n_new) > seq_len:
        raise ValueError(f"n_new {n_new} counts more tokens than the chunk has ({seq_len})")
    check_room(lengths, n_new, max_seq_len)
    return n_new


# %% cell 31
@dataclass(frozen=True)
class KVCacheConfig:
    """The sizes of a cache, and from them its bytes, before anything is allocated.

    >>> KVCacheConfig(num_layers=32, max_context_length=4096, num_kv_heads=8, head_dim=128).calculate_size()
    536870912
    """

    num_layers: int
    max_context_length: int
    num_kv_heads: int
    head_dim: int
    batch_size: int = 1
    dtype: Any = np.float16

    def __post_init__(self):
        for name in ("num_layers", "max_context_length", "num_kv_heads", "head_dim", "batch_size"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name)))
        object.__setattr__(self, "dtype", storage_dtype(self.dtype))

    def calculate_size(self):
        """Bytes of the whole cache: 2 * L * B * S * H_kv * D * itemsize."""
        tokens = self.batch_size * self.max_context_length
        return kv_cache_bytes(self.num_layers, self.num_kv_heads, self.head_dim, tokens, self.dtype.itemsize)


KNOWN_MODELS = {  # name: sizes as published in each model's configuration file
    "GPT-2": KVCacheConfig(12, 1024, 12, 64),
    "Qwen2.5-0.5B": KVCacheConfig(24, 2048, 2, 64),
    "Llama-3-8B": KVCacheConfig(32, 4096, 8, 128),
    "Llama-3-70B": KVCacheConfig(80, 8192, 8, 128),
    "GPT-3": KVCacheConfig(96, 2048, 96, 128),
}


# %% cell 32
FIRST_SLOTS = 16  # a cache that grows starts with these, or with max_seq_len if that is less


class KVStore:
    """The memory of a cache: its sizes, its one array (L, 2, B, H_kv, S, D), its bytes, its end.

    A member that stores otherwise defines these hooks:

        _options()                              keywords of its constructor, beside the sizes: clone() asks for them
        _first_slots()                          slots per row to begin with
        _store_bytes(shape), _new_store(shape)  what so many slots take, and the array; the tracker is asked in between
    """

    def __init__(self, batch_size, max_seq_len, num_layers, num_heads, head_dim, *,
                 dtype=np.float32, strict=False, tracker=None, grow=False):
        sizes = dict(batch_size=batch_size, max_seq_len=max_seq_len, num_layers=num_layers,
                     num_heads=num_heads, head_dim=head_dim)
        for name, value in sizes.items():
            setattr(self, name, whole_number(name, value))
        self.dtype, self.strict, self.grow, self._tracker = storage_dtype(dtype), bool(strict), bool(grow), tracker
        self._allocation, self._lock = None, threading.Lock()
        self._allocate(self._first_slots())
        self._ledger = CacheLedger(self.batch_size)

    def _options(self):
        return {"dtype": self.dtype, "strict": self.strict, "tracker": self._tracker, "grow": self.grow}

    def _twin(self):
        """An empty cache like this one."""
        sizes = self.batch_size, self.max_seq_len, self.num_layers, self.num_heads, self.head_dim
        return type(self)(*sizes, **self._options())

    def _first_slots(self):
        return min(FIRST_SLOTS, self.max_seq_len) if self.grow else self.max_seq_len

    def _allocate(self, num_slots):
        """A store of zeros with this many slots per row, counted by the tracker; after an error, all is as before."""
        shape = (self.num_layers, 2, self.batch_size, self.num_heads, num_slots, self.head_dim)
        counted = None
        if self._tracker is not None:
            counted = self._tracker.allocate(self._store_bytes(shape), purpose="kv_cache")
        try:
            store = self._new_store(shape)
        except BaseException:  # within the tracker's limit, and yet more than NumPy or the machine can do
            if counted is not None:
                counted.close()
            raise
        self._release()
        self._allocation, self._store = counted, store
        self._readable = store.view()
        self._readable.flags.writeable = False

    def _store_bytes(self, shape):
        return math.prod(shape) * self.dtype.itemsize

    def _new_store(self, shape):
        return np.zeros(shape, self.dtype)

    def _open_pass(self, lengths):
        """Double the slots until the longest row fits. No layer writes yet, so no thread holds the old store."""
        old, num_slots = self._store, self._store.shape[4]
        if max(lengths) > num_slots:
            while num_slots < max(lengths):
                num_slots *= 2
            self._allocate(min(num_slots, self.max_seq_len))
            self._store[..., : old.shape[4], :] = old

    @classmethod
    def from_config(cls, config, tracker=None, **options):
        """A cache of the sizes of a KVCacheConfig. `tracker` (a MemoryTracker) counts its bytes until close()."""
        return cls(config.batch_size, config.max_context_length, config.num_layers, config.num_kv_heads,
                   config.head_dim, dtype=config.dtype, tracker=tracker, **options)

    @property
    def config(self):
        """The sizes as a KVCacheConfig."""
        return KVCacheConfig(self.num_layers, self.max_seq_len, self.num_heads, self.head_dim,
                             self.batch_size, self.dtype)

    @property
    def capacity(self):
        """Tokens that one row can be given (a cache that makes room by itself would say None)."""
        return self.max_seq_len

    @property
    def nbytes(self):
        """Bytes of the store, full or empty; a cache that grows has fewer at first."""
        return self._store.nbytes

    def get_memory_usage(self):
        """Bytes allocated, and bytes that hold tokens; MB are 2**20 bytes."""
        used = kv_cache_bytes(self.num_layers, self.num_heads, self.head_dim, sum(self.seq_lens), self.dtype.itemsize)
        return {"total_bytes": self.nbytes, "total_mb": self.nbytes / 2**20, "used_bytes": used,
                "cache_tensors": 2 * self.num_layers, "dtype": self.dtype.name}

    def close(self):
        """Give the memory back, to the tracker as well: a cache without room. A second call does nothing."""
        self._release()
        self.max_seq_len, self._tracker, self._ledger = 0, None, CacheLedger(self.batch_size)
        self._allocate(0)

    def _release(self):
        allocation, self._allocation = self._allocation, None
        if allocation is not None:
            allocation.close()


# %% cell 33
@lru_cache(maxsize=4)
def for_all_layers(function, *arguments):
    """The array function(*arguments), computed once for all layers of a pass. Copy it before it is handed out."""
    return np.asarray(function(*arguments))


class CacheDoor:
    """What may be asked of a cache, and what it refuses, before anything changes.

    A member may define `window`, `sinks`, `observe` and `attend`, and these hooks:

        _open_pass(lengths)  before a pass writes anything, with what each row will hold: to find room, or to refuse
        _keep_pass()         when a pass is committed: to put its tokens where they belong
        check_model(model)   before the cache joins a model: to refuse one on which it would be wrong, or to learn from
                             it how its keys are read
    """

    window, sinks = None, 0  # what visible_mask asks for; lesson 22 slides a window
    observe = None  # observe(layer_idx, weights): lesson 22 evicts what is not looked at
    attend = None  # attend(query, key, value, visible): lessons 22 and 23 attend to what they store, as it is stored

    @property
    def seq_lens(self):
        """Committed tokens of each row, as a list."""
        return list(self._ledger.lengths)

    @property
    def seq_pos(self):
        """Committed tokens of the longest row."""
        return max(self._ledger.lengths)

    @property
    def pending_layers(self):
        """Layers that have written the open pass; [] when none is open."""
        return sorted(self._ledger.written)

    def positions(self, n_new, seq_len=None):
        """The positions (B, T) of the next tokens. n_new: a number, or one per row of a chunk padded to seq_len."""
        n_new = per_row("n_new", n_new, self.batch_size)
        return for_all_layers(next_positions, tuple(self._ledger.lengths), tuple(n_new),
                              max(n_new) if seq_len is None else seq_len).copy()

    def _slots(self, lengths):
        """slot_positions(lengths)."""
        return for_all_layers(slot_positions, tuple(lengths)).copy()

    def advance(self):
        """Commit what is pending. A layer that was skipped reads as zeros; strict=True refuses the skip."""
        skipped = sorted(set(range(self.num_layers)) - self._ledger.written)
        if self.strict and 0 < len(skipped) < self.num_layers:
            raise CacheStateError(f"advance() before layers {skipped} were updated (strict=True)")
        if self.pending_layers:
            self._keep_pass()
        self._ledger.commit()

    def check_model(self, model):
        """ValueError for a model whose keys need a turn that this cache does not give; lesson 22's renumbered does."""
        if getattr(model, "keys_before_rotation", False):
            raise ValueError(
                f"{type(model).__name__}(keys_before_rotation=True) stores keys that are not turned yet, and this "
                f"{type(self).__name__} hands them out as they came. Take a SlidingWindowKVCache(renumber=True), or a "
                "model with keys_before_rotation=False")

    def attached_to(self, model, n_new=None):
        """A context manager: inside, the model runs on this cache (see `attached`, section 9)."""
        return attached(model, self, n_new)

    def __repr__(self):
        sizes = ", ".join(f"{name}={getattr(self, name)}" for name in
                          ("batch_size", "max_seq_len", "num_layers", "num_heads", "head_dim"))
        return f"{type(self).__name__}({sizes}, dtype={self.dtype.name}, seq_lens={self.seq_lens})"

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def _accept(self, layer_idx, key, value, n_new):
        """Refuse what does not fit, before anything changes; else claim the layer and give back clean values."""
        ledger, sizes = self._ledger, (self.batch_size, self.num_heads, self.head_dim, self.dtype)
        layer = None
        try:
            layer = self._layer(layer_idx)
            key, value = check_tokens("key", key, *sizes), check_tokens("value", value, *sizes)
            room = math.inf if self.capacity is None else self.capacity
            n_new = check_chunk(key, value, n_new, ledger.lengths, room)
        except ValueError:
            if ledger.written:
                ledger.failed.add(layer)
            raise
        if ledger.failed and layer in ledger.written:
            self.abandon()  # the pass stopped half-way: a new one begins
        if not ledger.written:
            self._open_pass([length + count for length, count in zip(ledger.lengths, n_new)])
        ledger.claim(layer, n_new, key.shape[2])
        ledger.failed.discard(layer)
        return layer, key, value, n_new

    def _open_pass(self, lengths):
        """The moment to find room."""

    def _keep_pass(self):
        """Here the tokens stand where they belong already; lesson 22 puts them there now."""

    def _layer(self, layer_idx):
        if whole_number("layer_idx", layer_idx, least=0) >= self.num_layers:
            raise ValueError(f"layer_idx {layer_idx} is beyond the last layer, {self.num_layers - 1}")
        return int(layer_idx)

    def _read(self, layer_idx, num_slots):
        key, value = self._readable[layer_idx, :, :, :, :num_slots]
        return Tensor(key, dtype=self.dtype), Tensor(value, dtype=self.dtype)


# %% cell 34
class CacheRows:
    """What may be done to committed tokens: forget the newest, reorder the rows, copy everything.

    Each of these drops what is pending, and changes nothing when it raises. The hooks of a member that stores otherwise:

        _forget(kept, stored)  cut each row from `stored` to `kept` tokens; or raise, before anything changes
        _gather(rows)          row r becomes what row rows[r] was
    """

    def truncate(self, lengths):
        """Keep only the first tokens of each row; one length for all rows, or one per row."""
        stored = self._ledger.lengths
        kept = lengths_to_keep(lengths, stored)
        self._forget(kept, stored)  # first: a cache that cannot forget these says so here, and nothing has changed
        self.abandon()
        self._ledger.lengths = kept

    def rollback(self, n):
        """Forget the n newest tokens; one number for all rows, or one per row."""
        stored, newest = self._ledger.lengths, per_row("n", n, self.batch_size)
        for row, (have, lose) in enumerate(zip(stored, newest)):
            if lose > have:
                raise ValueError(f"row {row} holds {have} tokens: it cannot forget {lose}")
        self.truncate([have - lose for have, lose in zip(stored, newest)])

    def reorder(self, row_indices):
        """Row r becomes what row row_indices[r] was. A row may be named twice: beam search keeps the best beams."""
        rows = per_row("row_indices", row_indices, self.batch_size)
        if max(rows) >= self.batch_size:
            raise ValueError(f"row_indices {rows}: the last row is {self.batch_size - 1}")
        self.abandon()
        self._gather(rows)
        self._ledger.lengths = [self._ledger.lengths[row] for row in rows]

    def clone(self):
        """An independent copy of what is committed."""
        twin = self._twin()
        twin._open_pass(self.seq_lens)
        for row, length in enumerate(self.seq_lens):
            twin._store[:, :, row, :, :length] = self._store[:, :, row, :, :length]
        twin._ledger.lengths = self.seq_lens
        return twin

    def _forget(self, kept, stored):
        clear_slots(self._store, kept, stored)

    def _gather(self, rows):
        gather_rows(self._store[..., : self.seq_pos, :], rows)

    def __copy__(self):
        return self.clone()  # two caches on one store would overwrite each other

    def __deepcopy__(self, memo):
        return self.clone()


# %% cell 36 (17-cache)
class KVView(NamedTuple):
    """What attention reads: key and value (B, H_kv, S, D), and the position of each key (B, S), -1 where empty."""

    key: Any
    value: Any
    pos: Any


class KVCache(KVStore, CacheDoor, CacheRows):
    """The keys and values of every token so far, for every layer. A forward pass is a transaction.

    `update` writes one layer's new tokens behind the committed ones; `advance` commits them for all layers. A call
    that raises changes nothing. What is not a token is zero, in every layer and slot. num_heads counts the heads
    that are stored (num_kv_heads). For inference only: no gradient flows into the cache or out of it.

    dtype=float16 halves the bytes and costs time: NumPy has no half arithmetic, so attention converts the slots
    that it reads to float32, one layer's keys and then its values, at every step.

    A pass that failed: abandon() drops what is pending. So does the next update of a layer that was already
    written, if the pass stopped at an update that was refused for its data; else it is a CacheStateError.

    Threads: different layers may be updated at the same time, for each writes a part of the store that is its own.
    Whatever concerns all layers (advance, abandon, reset, truncate, rollback, reorder, clone, close) is called
    between passes, when no update is running.

    >>> cache = KVCache(batch_size=1, max_seq_len=8, num_layers=1, num_heads=2, head_dim=4)
    >>> key, value, pos = cache.update(0, np.ones((1, 2, 3, 4)), np.ones((1, 2, 3, 4)))
    >>> key.shape, pos.tolist(), cache.seq_pos
    ((1, 2, 3, 4), [[0, 1, 2]], 0)
    >>> cache.advance()
    >>> cache.seq_pos, cache.nbytes
    (3, 512)
    """

    def update(self, layer_idx, key, value, n_new=None):
        """Store T >= 1 new tokens of one layer; return all that they may look at, themselves included.

        key, value (B, H_kv, T, D); n_new: the valid tokens of each row where the chunk is padded on the right.
        The KVView is read-only and shares memory with the cache. ValueError for what does not fit,
        CacheStateError for a call out of order, both before a byte is written.
        """
        with self._lock:  # other layers may be updated from other threads
            layer_idx, key, value, n_new = self._accept(layer_idx, key, value, n_new)
        stored = self._ledger.lengths
        write_tokens(self._store[layer_idx, 0], key, stored, n_new)
        write_tokens(self._store[layer_idx, 1], value, stored, n_new)
        visible = [length + count for length, count in zip(stored, n_new)]
        return KVView(*self._read(layer_idx, max(visible)), self._slots(visible))

    def reset(self):
        """Empty again: no bytes, no lengths, nothing pending."""
        self._store[...] = 0
        self._ledger = CacheLedger(self.batch_size)

    def abandon(self):
        """Drop what is pending: the pass that wrote it has failed. Nothing happens when nothing is pending."""
        ledger = self._ledger
        if ledger.written:
            clear_slots(self._store, ledger.lengths, [old + new for old, new in zip(ledger.lengths, ledger.n_new)])
        ledger.close_pass()

    def get(self, layer_idx):
        """Committed keys and values of one layer, (B, H_kv, seq_pos, D) each; empty slots are zero. Not for writing."""
        key, value = self._read(self._layer(layer_idx), self.seq_pos)
        if self.pending_layers and min(self.seq_lens) < self.seq_pos:  # pending tokens of short rows would show
            empty = (slot_positions(self.seq_lens) < 0)[:, None, :, None]
            key, value = (Tensor(np.where(empty, self.dtype.type(0), part.data), dtype=self.dtype)
                          for part in (key, value))
        return key, value


# %% cell 44
class StandIn(Module):
    """A part of a model that stands in for another: the same parameters under the same names, the same attributes."""

    def __init__(self, part, cache, n_new=None):
        self.part, self.cache, self.n_new, self.owner = part, cache, n_new, {}
        self.training = getattr(part, "training", False)

    @property
    def training(self):
        """The mode of the whole model, where we are in one: a single frozen block may be in another mode than it."""
        return getattr(self.owner["model"], "training", False) if self.owner else self._training

    @training.setter
    def training(self, mode):
        self._training = mode

    def named_parameters(self, prefix=""):
        return self.part.named_parameters(prefix)

    def __getattr__(self, name):  # asked only for what the stand-in itself lacks
        if name == "part":
            raise AttributeError(name)
        return getattr(self.part, name)

    def positions(self, x):
        """Where the T tokens of x (B, T, E) stand in their rows, (B, T); -1 for padding."""
        batch_size, seq_len = x.shape[:2]
        if batch_size != self.cache.batch_size:
            raise ValueError(f"the batch has {batch_size} rows, the cache has batch_size={self.cache.batch_size}")
        return self.cache.positions(seq_len if self.n_new is None else self.n_new, seq_len)


# %% cell 45 (17-attention)
class CachedAttention(StandIn):
    """Attention with one cache.update between project and attend; in training mode, the attention it stands for."""

    def __init__(self, attention, cache, layer_idx, n_new=None):
        if not getattr(attention, "causal", True):
            raise ValueError("only causal attention can be cached: without its mask, new tokens change old keys")
        super().__init__(attention, cache, n_new)
        windows = cache.window, getattr(attention, "window", None)  # the cache's, and the model's own (lesson 21)
        self.layer_idx, self.window = layer_idx, min((w for w in windows if w is not None), default=None)

    def forward(self, x, mask=None):
        """x (B, T, E), the new tokens only -> (B, T, E)."""
        if mask is not None and not self.training:
            raise NotImplementedError("a cached forward makes its mask from positions and takes no other")
        if self.training:
            return self.part(x, mask)
        positions = self.positions(x)
        query, key, value = self.project(x, positions)
        key, value, key_pos = self.cache.update(self.layer_idx, key, value, self.n_new)
        visible = visible_mask(positions, key_pos, self.window, self.cache.sinks)
        visible = None if visible.all() else visible  # a mask that hides nothing only costs time
        mixed = self.attend(query, key, value, visible)
        return self.merge(mixed)

    def project(self, x, positions):
        """The attention's own; one that turns queries and keys by their positions (lesson 21) is told them."""
        return self.part.project(x, positions) if getattr(self.part, "rotary", False) else self.part.project(x)

    def attend(self, query, key, value, visible):
        """The attention's own, or the cache's where it has one for lesson 12's formula; a cache that evicts what nobody
        looks at (lesson 22) is told who looked where."""
        if self.cache.observe is not None:
            self.cache.observe(self.layer_idx, attention_weights(query, key, visible).numpy())
        if self.cache.attend is not None and type(self.part).attend is MultiHeadAttention.attend:
            return self.cache.attend(query, key, value, visible)
        return self.part.attend(query, key, value, visible)


# %% cell 49 (17-ends)
class CountingPositions(StandIn):
    """A position embedding that counts on from the cached tokens. A cached forward pass begins here."""

    def forward(self, x, positions=None):
        """x (B, T, E), the new tokens -> (B, T, E) with the rows of their positions added."""
        if self.training:
            return self.part(x, positions)
        self.cache.abandon()
        if positions is None:
            positions = np.maximum(self.positions(x), 0)
        return self.part(x, positions)


class CommittingNorm(StandIn):
    """The norm after the last block. A cached forward pass ends here: all layers have written, commit.

    What the model does afterwards (the head) needs no cache. If it fails there, the tokens are stored: rollback(n).
    """

    def forward(self, x):
        if self.training:
            return self.part(x)
        y = self.part(x)
        self.cache.advance()
        return y


# %% cell 52 (17-join)
def original(part):
    """The part that a stand-in stands for; any other part is itself."""
    return part.part if isinstance(part, StandIn) else part


def end_parts(model, cache, n_new=None):
    """The stand-ins at both ends of the model, as (owner, attribute name, stand-in)."""
    return [
        (model, "position_embedding", CountingPositions(original(model.position_embedding), cache, n_new)),
        (model, "norm", CommittingNorm(original(model.norm), cache, n_new)),
    ]


def attention_parts(model, cache, n_new=None):
    """One CachedAttention per block, as (block, "attention", stand-in): its own attention, its own layer number."""
    return [
        (block, "attention", CachedAttention(original(block.attention), cache, layer_idx, n_new))
        for layer_idx, block in enumerate(model.blocks)
    ]


# %% cell 54
def require_parts(model):
    """AttributeError that names everything that the model lacks for a cache."""
    needed = ("embed_dim", "num_layers", "num_heads", "max_seq_len", "blocks", "position_embedding", "norm")
    missing = [name for name in needed if not hasattr(model, name)]
    for index, block in enumerate(getattr(model, "blocks", ())):
        attention = f"blocks[{index}].attention"
        parts = [f"{attention}.{name}" for name in ("project", "attend", "merge")
                 if not hasattr(getattr(block, "attention", None), name)]
        missing += parts if hasattr(block, "attention") else [attention]
    if missing:
        raise AttributeError(f"{type(model).__name__} cannot take a KV cache, it lacks: {', '.join(missing)}")


def stored_heads(model):
    """(H_kv, D): the key-value heads that each layer of the model stores, and their size."""
    head_dim = getattr(model, "head_dim", model.embed_dim // model.num_heads)
    return getattr(model, "num_kv_heads", model.num_heads), head_dim


def attach(model, cache, n_new=None):
    """Put stand-ins into the model; return what they replaced, as (owner, name, part)."""
    require_parts(model)
    if len(model.blocks) != cache.num_layers:
        raise ValueError(f"the model has {len(model.blocks)} blocks, the cache {cache.num_layers} layers")
    heads, stored = stored_heads(model), (cache.num_heads, cache.head_dim)
    if heads != stored:
        raise ValueError(f"the model stores {heads[0]} key-value heads of {heads[1]}, the cache has room for "
                         f"{stored[0]} of {stored[1]}")
    cache.check_model(model)
    parts = end_parts(model, cache, n_new) + attention_parts(model, cache, n_new)
    for *_, part in parts:
        part.owner["model"] = model  # in a dict: a module among the attributes would be walked, round and round
    replaced = [(owner, name, getattr(owner, name)) for owner, name, _ in parts]
    put_parts(parts)
    return replaced


def put_parts(parts):
    """Set each (owner, name, part)."""
    for owner, name, part in parts:
        setattr(owner, name, part)


@contextmanager
def attached(model, cache, n_new=None):
    """Within the block the model runs on `cache`; afterwards its very same parts are back.

    n_new: valid tokens per row of the one padded chunk that is run in the block. A block that is left by an
    exception (also by Ctrl-C) drops what is pending. The parts are the model's own, so one model runs one pass at a
    time, in one thread.
    """
    replaced = attach(model, cache, n_new)
    try:
        yield cache
    except BaseException:
        cache.abandon()
        raise
    finally:
        put_parts(replaced)


# %% cell 55
def create_kv_cache(batch_size, max_seq_len, num_layers, num_heads, head_dim, **options):
    """A KVCache of these sizes; options are those of KVCache: dtype, strict, tracker, grow."""
    return KVCache(batch_size, max_seq_len, num_layers, num_heads, head_dim, **options)


def enable_kv_cache(model=None, *sizes, cache=None, factory=create_kv_cache, **options):
    """Let a GPT run on a cache, in eval mode, until disable_kv_cache; return the cache.

    Without `cache`, a new one of the model's own sizes: `factory` makes it (any member of the family, by the
    arguments of create_kv_cache). Options: batch_size=1, max_seq_len (default: the model's), dtype, strict, tracker,
    grow, and what the factory adds. A second call replaces the first cache. Inference only: in training mode the
    cache is bypassed, and keys and values carry no gradients. Called with sizes in place of a model, it forwards
    to create_kv_cache.
    """
    if sizes and hasattr(model, "blocks"):
        raise TypeError("the sizes come from the model; options are given by name, for example batch_size=2")
    if sizes or isinstance(model, (int, np.integer)) or (model is None and "max_seq_len" in options):
        return create_kv_cache(*([] if model is None else [model]), *sizes, **options)
    if cache is not None and options:
        raise TypeError(f"a cache that exists has its sizes: {', '.join(options)} cannot be given with cache=")
    require_parts(model)
    made = None
    if cache is None:
        num_heads, head_dim = stored_heads(model)
        found = dict(batch_size=1, max_seq_len=model.max_seq_len, num_layers=model.num_layers,
                     num_heads=num_heads, head_dim=head_dim)
        cache = made = factory(**{**found, **options})
    try:
        attach(model, cache)  # in the place of an earlier cache, if there was one
    except Exception:
        if made is not None:
            made.close()  # the model was refused: nobody else holds this cache, so its bytes go back
        raise
    model._kv_cache, model._cache_enabled = cache, True
    return cache


def disable_kv_cache(model):
    """Put the very same parts back that enable_kv_cache replaced. Without an enabled cache, nothing changes."""
    owners = [(model, "position_embedding"), (model, "norm"), *((block, "attention") for block in model.blocks)]
    put_parts([(owner, name, original(getattr(owner, name))) for owner, name in owners])
    model._kv_cache, model._cache_enabled = None, False


# %% cell 59
def generation_flops(model, prompt_len, max_new_tokens, cached):
    """Floating-point operations (2 per multiply-add) of the matrix products while the model generates."""
    weights = sum(p.size for block in model.blocks for p in block.parameters() if p.ndim == 2)
    flops = 2 * model.vocab_size * model.embed_dim * max_new_tokens  # the head, on the last position only
    width = model.num_heads * stored_heads(model)[1]
    for i in range(max_new_tokens):
        seq_len = prompt_len + i
        rows = 1 if cached and i else seq_len
        flops += rows * (2 * weights + 4 * model.num_layers * width * seq_len)
    return flops


def analyze_kvcache_speedup(model=None, lengths=(16, 64, 128, 256), max_new_tokens=16, repeats=3):
    """Measure generation with and without a cache; print and return one dict per prompt length.

    For each prompt length: median seconds of generating max_new_tokens both ways (interleaved in one process),
    their ratio, the ratio of counted operations, and whether both gave the same tokens. model: a GPT in which
    max(lengths) + max_new_tokens tokens fit (default: 4 layers, 128 wide). Speed-ups are measured, never computed.
    """
    model = model_to_measure(model, max(lengths) + max_new_tokens)
    cache = KVCache(1, model.max_seq_len, model.num_layers, *stored_heads(model))
    print(f"{'prompt':>6} {'without':>10} {'with':>10} {'speed-up':>9} {'by count':>9}  same tokens")
    rows = []
    for length in lengths:
        prompt = [i % model.vocab_size for i in range(length)]
        ways = {False: lambda prompt=prompt: model.generate(prompt, max_new_tokens),
                True: lambda prompt=prompt: model.generate(prompt, max_new_tokens, cache=cache)}
        same, runs = ways[False]() == ways[True](), {False: [], True: []}  # that was the warm-up, too
        for _ in range(repeats):
            for cached, run in ways.items():
                runs[cached] += time_calls(run, warmup=0, repeats=1)
        seconds = {cached: Measurement(times) for cached, times in runs.items()}
        flops = {cached: generation_flops(model, length, max_new_tokens, cached) for cached in ways}
        rows.append({"prompt_len": length, "seconds_without": seconds[False], "seconds_with": seconds[True],
                     "speedup": seconds[False] / seconds[True], "flops_ratio": flops[False] / flops[True],
                     "gflops_without": flops[False] / seconds[False] / 1e9,
                     "gflops_with": flops[True] / seconds[True] / 1e9,
                     "same_tokens": same})
        row = rows[-1]
        print(f"{length:>6} {seconds[False]:>8.3f} s {seconds[True]:>8.3f} s {row['speedup']:>8.1f}x "
              f"{row['flops_ratio']:>8.1f}x  {row['same_tokens']}")
    return rows


# %% cell 62
def memory_analysis(num_layers, num_heads, head_dim, batch_size, seq_len, *, num_kv_heads=None, dtype=np.float16):
    """What a cache of these sizes takes, as a dict: total_bytes, total_GB (1e9 bytes), total_MiB, bytes_per_token.

    num_kv_heads: the heads that are stored, where query heads share them (default: num_heads).

    >>> memory_analysis(num_layers=12, num_heads=12, head_dim=64, batch_size=1, seq_len=1024)["total_MiB"]
    36.0
    """
    stored = num_heads if num_kv_heads is None else num_kv_heads
    config = KVCacheConfig(num_layers, seq_len, stored, head_dim, batch_size, dtype)
    total = config.calculate_size()
    return {"total_bytes": total, "total_GB": total / 1e9, "total_MiB": total / 2**20,
            "bytes_per_token": total // (config.batch_size * config.max_context_length), "dtype": config.dtype.name}


def memory_growth_table(num_layers=32, num_heads=32, head_dim=128, *, num_kv_heads=None, dtype=np.float16,
                        seq_lens=(512, 2048, 8192, 32768), batch_sizes=(1, 8, 32)):
    """MiB of the cache over length and batch size, as text."""
    def cell(batch_size, seq_len):
        sizes = (num_layers, num_heads, head_dim, batch_size, seq_len)
        return memory_analysis(*sizes, num_kv_heads=num_kv_heads, dtype=dtype)["total_MiB"]

    stored = num_heads if num_kv_heads is None else num_kv_heads
    lines = [f"{num_layers} layers, {stored} key-value heads of {head_dim}, {storage_dtype(dtype).name}; in MiB",
             f"{'tokens':>8}" + "".join(f"{f'batch {batch}':>12}" for batch in batch_sizes)]
    for seq_len in seq_lens:
        lines.append(f"{seq_len:>8}" + "".join(f"{cell(batch, seq_len):>12,.1f}" for batch in batch_sizes))
    return "\n".join(lines)


def analyze_kvcache_memory(models=None, batch_size=1):
    """Compute the cache of known models at their full context, and measure that prediction and arrays agree.

    models: dict of name -> KVCacheConfig (default: KNOWN_MODELS). Prints, per model, bytes per token and MiB in float16
    and float32, all computed; then allocates two small caches and prints predicted against measured bytes. Returns
    a list of dicts, one per model.
    """
    print(f"{'model':<14} {'L/H_kv/D':>11} {'bytes/token':>12} {'tokens':>7} {'MiB float16':>12} {'MiB float32':>12}")
    rows = []
    for name, c in (KNOWN_MODELS if models is None else models).items():
        sizes = (c.num_layers, c.num_kv_heads, c.head_dim, batch_size, c.max_context_length)
        half, full = memory_analysis(*sizes, dtype=np.float16), memory_analysis(*sizes, dtype=np.float32)
        rows.append({"model": name, "bytes_per_token": half["bytes_per_token"],
                     "MiB_float16": half["total_MiB"], "MiB_float32": full["total_MiB"]})
        shape = f"{c.num_layers}/{c.num_kv_heads}/{c.head_dim}"
        print(f"{name:<14} {shape:>11} {half['bytes_per_token']:>12,} {c.max_context_length:>7} "
              f"{half['total_MiB']:>12,.0f} {full['total_MiB']:>12,.0f}")
    for dtype in (np.float16, np.float32):
        config = KVCacheConfig(4, 64, 2, 16, batch_size, dtype)
        measured = KVCache.from_config(config).nbytes
        print(f"predicted {config.calculate_size():,} B, measured {measured:,} B ({config.dtype.name}, 64 tokens)")
    return rows


# %% cell 69 (17-prefill)
def run_in_chunks(model, ids, cache, chunk, n_new):
    """Run ids (B, T) into the cache, `chunk` tokens at a time; return the list of the logits of each chunk.

    n_new: array (B,), the valid tokens of each right-padded row.
    """
    logits = []
    for start in range(0, ids.shape[1], chunk):
        piece = ids[:, start : start + chunk]
        valid = np.clip(n_new - start, 0, piece.shape[1])
        with cache.attached_to(model, n_new=valid):
            logits.append(model(piece))
    return logits


def prefill(model, ids, cache, chunk=None, n_new=None):
    """Run a prompt into the cache, `chunk` tokens at a time; return the logits (B, T, V) of one full forward.

    ids (B, T) or (T,). n_new: the valid tokens of each row of a right-padded batch; the logits of padding mean
    nothing. A prompt that does not fit raises before any of it is run; if a chunk fails later, those before it stay
    stored. Eval mode and no gradients inside; each part's own mode comes back.
    """
    ids = np.atleast_2d(ids.data if isinstance(ids, Tensor) else np.asarray(ids))
    if ids.ndim != 2 or ids.size == 0:
        raise ValueError(f"a prompt has shape (T,) or (B, T) and at least one token, got {ids.shape}")
    seq_len = ids.shape[1]
    counts = per_row("n_new", seq_len if n_new is None else n_new, cache.batch_size)
    if max(counts) > seq_len:
        raise ValueError(f"n_new {counts} counts more tokens than ids has ({seq_len})")
    if cache.capacity is not None:  # a window makes its own room
        check_room(cache.seq_lens, counts, min(cache.capacity, model.max_seq_len))
    chunk = seq_len if chunk is None else whole_number("chunk", chunk)
    with evaluating(model):
        return cat(run_in_chunks(model, ids, cache, chunk, np.array(counts)), dim=1)


# %% cell 72 (17-rows)
def clear_slots(store, starts, stops):
    """Zero the slots start .. stop - 1 of each row, in all layers, keys and values: store (L, 2, B, H, S, D)."""
    for row, (start, stop) in enumerate(zip(starts, stops)):
        store[:, :, row, :, start:stop] = 0


def gather_rows(store, rows):
    """Row r becomes what row rows[r] was, in place: store (L, 2, B, H, S, D); a row may be named twice."""
    store[...] = store[:, :, rows]  # indexing by a list copies, so nothing is read after it was overwritten


# %% cell 86
class LayerKVCache:
    """The cache of one layer on its own: two arrays (B, H, S, D), public and writable, and a length per row.

    `seq_lens` is a plain list that may be assigned to.
    """

    def __init__(self, batch_size, max_seq_len, num_heads, head_dim, *, dtype=np.float32):
        sizes = dict(batch_size=batch_size, max_seq_len=max_seq_len, num_heads=num_heads, head_dim=head_dim)
        for name, value in sizes.items():
            setattr(self, name, whole_number(name, value))
        self.dtype = storage_dtype(dtype)
        shape = (self.batch_size, self.num_heads, self.max_seq_len, self.head_dim)
        self.k_cache, self.v_cache = np.zeros(shape, self.dtype), np.zeros(shape, self.dtype)
        self.seq_lens = [0] * self.batch_size

    def update(self, k, v, n_new=None):
        """Append T tokens, k and v (B, H, T, D), at each row's own length. A full row: ValueError, nothing written."""
        sizes, lengths = (self.batch_size, self.num_heads, self.head_dim, self.dtype), self.row_lengths()
        k, v = check_tokens("k", k, *sizes), check_tokens("v", v, *sizes)
        n_new = check_chunk(k, v, n_new, lengths, self.max_seq_len)
        write_tokens(self.k_cache, k, lengths, n_new)
        write_tokens(self.v_cache, v, lengths, n_new)
        self.seq_lens = [length + count for length, count in zip(lengths, n_new)]

    def get_kv(self, row):
        """Keys and values of one row: (H, len, D) each, read-only views."""
        row = check_row(row, self.batch_size)
        views = [array[row, :, : self.row_lengths()[row]] for array in (self.k_cache, self.v_cache)]
        for view in views:
            view.flags.writeable = False
        return tuple(views)

    def reset(self):
        """Empty again: no bytes, no lengths."""
        self.k_cache[...], self.v_cache[...], self.seq_lens = 0, 0, [0] * self.batch_size

    @property
    def nbytes(self):
        """Bytes of both arrays."""
        return self.k_cache.nbytes + self.v_cache.nbytes

    def row_lengths(self):
        """`seq_lens`, looked at: anybody may have assigned to it."""
        lengths = per_row("seq_lens", self.seq_lens, self.batch_size)
        if max(lengths) > self.max_seq_len:
            raise ValueError(f"seq_lens {lengths} are longer than max_seq_len={self.max_seq_len}")
        return lengths


# %% cell 87 (17-stateless)
def attend_last(query, cache, lengths):
    """Attention of each row's last T tokens over all that the row holds: (B, H, T, D) -> (B, H, T, D), float32.

    cache: a LayerKVCache, only read. lengths: tokens per row.
    """
    batch_size, seq_len = query.shape[0], query.shape[2]
    key, value = cache.k_cache[:, :, : max(lengths)], cache.v_cache[:, :, : max(lengths)]
    starts = [length - seq_len for length in lengths]
    positions = next_positions(starts, [seq_len] * batch_size, seq_len)
    visible = visible_mask(positions, slot_positions(lengths))
    return scaled_dot_product_attention(query, key, value, visible).numpy()


def multi_head_attention_with_cache(query_input, cache, w_q, w_k, w_v, w_o):
    """Attention of T tokens over a LayerKVCache that already holds them: (B, T, E) -> (B, T, embed_dim).

    Reads the cache and writes nothing; the T queries are the last T tokens of each row, causal among themselves.
    w_q (E, H*D) and w_o (H*D, embed_dim) multiply from the right. w_k and w_v made the keys and values in the cache:
    they belong to the layer's four weights and are not used again.
    """
    x = np.asarray(query_input.data if isinstance(query_input, Tensor) else query_input)
    if x.ndim != 3:
        raise ValueError(f"query_input has shape {x.shape}, needed (batch, tokens, embed_dim)")
    (batch_size, seq_len, _), lengths = x.shape, cache.row_lengths()
    if batch_size != cache.batch_size or min(lengths) < seq_len:
        raise ValueError(f"{batch_size} rows of {seq_len} queries: the cache must hold them, it has lengths {lengths}")
    query = (x @ np.asarray(w_q)).reshape(batch_size, seq_len, -1, cache.head_dim).swapaxes(1, 2)  # (B, H, T, D)
    mixed = attend_last(query, cache, lengths).swapaxes(1, 2).reshape(batch_size, seq_len, -1)  # (B, T, H*D)
    output = mixed @ np.asarray(w_o)
    return Tensor(output) if isinstance(query_input, Tensor) else output


# %% cell 89
class IncrementalDecoder:
    """A small decoder in plain NumPy, one LayerKVCache per layer: attention and residuals, nothing else."""

    def __init__(self, d_model, num_heads, num_layers, max_seq_len, vocab_size, rng=None):
        sizes = dict(d_model=d_model, num_heads=num_heads, num_layers=num_layers, max_seq_len=max_seq_len,
                     vocab_size=vocab_size)
        for name, value in sizes.items():
            setattr(self, name, whole_number(name, value))
        if d_model % num_heads:
            raise ValueError(f"d_model {d_model} does not divide into num_heads {num_heads} equal heads")
        rng = default_rng() if rng is None else rng

        def matrix(*shape):
            return rng.standard_normal(shape, dtype=np.float32) * d_model**-0.5

        self.token_table, self.position_table = matrix(vocab_size, d_model), matrix(max_seq_len, d_model)
        self.layers = [tuple(matrix(d_model, d_model) for _ in "qkvo") for _ in range(num_layers)]
        self.head = matrix(d_model, vocab_size)
        self._init_caches(1)

    def _init_caches(self, batch_size):
        """Fresh caches, one per layer, for `batch_size` rows; kept as self.caches."""
        sizes = (batch_size, self.max_seq_len, self.num_heads, self.d_model // self.num_heads)
        self.caches = [LayerKVCache(*sizes) for _ in range(self.num_layers)]
        return self.caches

    def forward_step(self, ids, caches=None, is_prefill=False):
        """Run the next tokens, ids (B, T) or (B,), through all layers: logits (B, vocab_size) of the last one.

        is_prefill marks the call that brings a prompt. Prompt and single token take the same path, so a prefill
        equals the same tokens one by one. A call that raises leaves the lengths of all caches as they were.
        """
        caches = self.caches if caches is None else caches
        ids, lengths = self._checked(ids, caches[0].batch_size), caches[0].row_lengths()
        n_new = [ids.shape[1]] * len(ids)
        check_room(lengths, n_new, self.max_seq_len)
        before = [list(cache.seq_lens) for cache in caches]
        x = self.token_table[ids] + self.position_table[next_positions(lengths, n_new, ids.shape[1])]
        try:
            for cache, weights in zip(caches, self.layers):
                x = x + self._attend(x, cache, *weights)
        except BaseException:
            for cache, seq_lens in zip(caches, before):
                cache.seq_lens = seq_lens
            raise
        return x[:, -1] @ self.head

    def _attend(self, x, cache, w_q, w_k, w_v, w_o):
        heads = (*x.shape[:2], self.num_heads, -1)
        cache.update((x @ w_k).reshape(heads).swapaxes(1, 2), (x @ w_v).reshape(heads).swapaxes(1, 2))
        return multi_head_attention_with_cache(x, cache, w_q, w_k, w_v, w_o)

    def _checked(self, ids, batch_size):
        ids = np.asarray(ids.data if isinstance(ids, Tensor) else ids)
        ids = ids[:, None] if ids.ndim == 1 else ids  # one token per row
        if ids.ndim != 2 or len(ids) != batch_size or ids.size == 0 or ids.dtype.kind not in "iu":
            raise ValueError(f"ids are whole numbers (B, T) or (B,) with B = {batch_size}, got {ids.dtype} {ids.shape}")
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            raise ValueError(f"ids run from 0 to {self.vocab_size - 1}, got {ids.min()} to {ids.max()}")
        return ids

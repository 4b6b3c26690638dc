"""Lesson 17: memoization. (Extracted by hand; the build overwrites this file.)"""


import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from tinytorch.core.attention import scaled_dot_product_attention, visible_mask
from tinytorch.core.autograd import no_grad
from tinytorch.core.layers import Module
from tinytorch.core.tensor import Tensor, cat, default_rng
try:
    from tinytorch.profiling.profiler import MemoryTracker
except ImportError:  # until lesson 14 is built
    MemoryTracker = None


def kv_cache_bytes(num_layers, num_kv_heads, head_dim, num_tokens, itemsize):
    """Bytes of the keys and values of `num_tokens` tokens (batch rows and positions together).

    >>> kv_cache_bytes(num_layers=12, num_kv_heads=12, head_dim=64, num_tokens=1, itemsize=2)  # GPT-2, float16
    36864
    """
    return 2 * num_layers * num_kv_heads * head_dim * num_tokens * itemsize


def whole_number(name, value, least=1):
    """`value` as an int, or a ValueError that names the field (True and 2.0 are not whole numbers here)."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return int(value)


def storage_dtype(dtype):
    """float16, float32 or float64 as a NumPy dtype; anything else is a ValueError that names the field."""
    try:
        found = np.dtype(dtype) if dtype is not None else None
    except TypeError:
        found = None
    if found not in (np.dtype("float16"), np.dtype("float32"), np.dtype("float64")):
        raise ValueError(f"dtype must be float16, float32 or float64, got {dtype!r}")
    return found


@dataclass(frozen=True)
class KVCacheConfig:
    """The sizes of a cache, and from them its bytes, before anything is allocated.

    >>> KVCacheConfig(num_layers=32, max_context_length=4096, num_kv_heads=8, head_dim=128).calculate_size() // 2**20
    512
    """

    num_layers: int
    max_context_length: int
    num_kv_heads: int
    head_dim: int
    batch_size: int = 1
    dtype: Any = np.float16

    def __post_init__(self):
        for name in ("num_layers", "max_context_length", "num_kv_heads", "head_dim", "batch_size"):
            whole_number(name, getattr(self, name))
        storage_dtype(self.dtype)

    def calculate_size(self):
        """Bytes of the whole cache: 2 * L * B * S * H_kv * D * itemsize."""
        tokens = int(self.batch_size) * int(self.max_context_length)
        itemsize = storage_dtype(self.dtype).itemsize
        return kv_cache_bytes(int(self.num_layers), int(self.num_kv_heads), int(self.head_dim), tokens, itemsize)


class CacheStateError(ValueError):
    """The calls came in an order that no forward pass makes."""


class KVView(NamedTuple):
    """What attention reads: key and value (B, H_kv, S, D), and the position of each key (B, S), -1 where empty."""

    key: Any
    value: Any
    pos: Any


def write_tokens(store, new, lengths, n_new):
    """Write each row's first n_new tokens behind the tokens that the row holds, in place.

    store (B, H, S, D), new (B, H, T, D), lengths and n_new: one number per row.
    """
    if len(set(lengths)) == 1 and len(set(n_new)) == 1:  # all rows stand at one length: one slice
        start, count = lengths[0], n_new[0]
        store[:, :, start : start + count] = new[:, :, :count]
        return
    for row, (start, count) in enumerate(zip(lengths, n_new)):
        store[row, :, start : start + count] = new[row, :, :count]


def slot_positions(lengths):
    """The position of the token in each slot, -1 where the row has none: (B, S), S the longest row.

    >>> slot_positions([3, 1]).tolist()
    [[0, 1, 2], [0, -1, -1]]
    """
    slots = np.arange(max(lengths))
    return np.where(slots < np.array(lengths)[:, None], slots, -1)


def next_positions(lengths, n_new, seq_len):
    """The positions of the next tokens: (B, T), T = seq_len; -1 for padding beyond a row's n_new.

    >>> next_positions([5, 2], [2, 1], seq_len=2).tolist()
    [[5, 6], [2, -1]]
    """
    steps = np.arange(seq_len)
    return np.where(steps < np.array(n_new)[:, None], np.array(lengths)[:, None] + steps, -1)


def check_room(lengths, n_new, max_seq_len):
    """ValueError, before a byte is written, when a row has no room for its new tokens."""
    for row, (stored, asked) in enumerate(zip(lengths, n_new)):
        if stored + asked > max_seq_len:
            raise ValueError(
                f"the cache is full: row {row} holds {stored} tokens of max_seq_len={max_seq_len}, "
                f"{asked} more were asked for and {max_seq_len - stored} are free. "
                "Make a longer cache, or reset, truncate or roll back this one."
            )


def per_row(name, value, batch_size):
    """One whole number per row, as a list; a single number counts for every row."""
    values = value.tolist() if isinstance(value, np.ndarray) else value
    values = list(values) if isinstance(values, (list, tuple, range)) else [values] * batch_size
    if len(values) != batch_size:
        raise ValueError(f"{name} needs one number for each of the {batch_size} rows, got {len(values)}")
    return [whole_number(name, number, least=0) for number in values]


def check_tokens(name, tokens, batch_size, num_heads, head_dim, dtype):
    """`tokens` as an array (B, H, T, D) of the storage dtype, or a ValueError that says what does not fit."""
    array = np.asarray(tokens.data if isinstance(tokens, Tensor) else tokens)
    if array.dtype.kind not in "iuf":
        raise ValueError(f"{name} must hold numbers, got {array.dtype}")
    needed = (batch_size, num_heads, "T >= 1", head_dim)
    fits = array.ndim == 4 and array.shape[:2] == needed[:2] and array.shape[2] >= 1 and array.shape[3] == head_dim
    if not fits:
        raise ValueError(f"{name} has shape {array.shape}, needed (batch, heads, tokens, head_dim) = {needed}")
    with np.errstate(over="ignore"):  # too large for float16 becomes inf, which the next line refuses
        array = array.astype(dtype, copy=False)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds a number that is not finite as {array.dtype}: nothing was stored")
    return array


class CacheLedger:
    """Which tokens are committed and which are pending. It counts; it holds no arrays.

    lengths: committed tokens per row. n_new, seq_len, written: what the open pass adds to each row, the width
    T of its chunk, and the layers that have written it. No layer written: no pass is open.
    """

    def __init__(self, batch_size):
        self.lengths = [0] * batch_size
        self.close_pass()

    def close_pass(self):
        """Forget the open pass."""
        self.n_new, self.seq_len, self.written, self.failed = [0] * len(self.lengths), 0, set(), False

    def claim(self, layer_idx, n_new, seq_len):
        """Let one layer write: it opens a pass or joins the open one, once, with the same tokens as the others."""
        if layer_idx in self.written:
            raise CacheStateError(
                f"layer {layer_idx} was updated twice in one pass: call advance() after the last layer, "
                "or abandon() when the forward pass failed"
            )
        if self.written and (n_new, seq_len) != (self.n_new, self.seq_len):
            raise CacheStateError(
                f"layers disagree: layer {layer_idx} brings {n_new} new tokens per row in a chunk of {seq_len}, "
                f"layers {sorted(self.written)} brought {self.n_new} in a chunk of {self.seq_len}"
            )
        self.n_new, self.seq_len = n_new, seq_len
        self.written.add(layer_idx)

    def commit(self):
        """Count the pending tokens as stored."""
        if not self.written:
            raise CacheStateError("advance() with nothing pending: update() every layer first, then advance() once")
        self.lengths = [length + count for length, count in zip(self.lengths, self.n_new)]
        self.close_pass()


class KVCache:
    """The keys and values of every token so far, for every layer; a forward pass is a transaction.

    `update` writes a layer's new tokens behind the committed ones, `advance` commits them for all layers. A call
    that raises changes nothing. A pass that was never committed is void: abandon() drops it, and so does the
    next update of a layer that it had written, if an update was refused for its data in between.
    What is not a token is zero, in every layer and slot. num_heads counts the heads that are stored (num_kv_heads).
    For inference only: no gradient flows into or out of the cache.

    >>> cache = KVCache(batch_size=1, max_seq_len=8, num_layers=1, num_heads=2, head_dim=4)
    >>> key, value, pos = cache.update(0, np.ones((1, 2, 3, 4)), np.ones((1, 2, 3, 4)))
    >>> key.shape, cache.seq_pos
    ((1, 2, 3, 4), 0)
    >>> cache.advance()
    >>> cache.seq_pos, cache.nbytes
    (3, 512)
    """

    window, sinks = None, 0  # what visible_mask needs to know; a later cache slides a window

    def __init__(self, batch_size, max_seq_len, num_layers, num_heads, head_dim, *,
                 dtype=np.float32, strict=False, tracker=None):
        sizes = dict(batch_size=batch_size, max_seq_len=max_seq_len, num_layers=num_layers,
                     num_heads=num_heads, head_dim=head_dim)
        for name, value in sizes.items():
            setattr(self, name, whole_number(name, value))
        self.dtype, self.strict = storage_dtype(dtype), bool(strict)
        self._tracker, self._allocation = tracker, None
        if tracker is not None:
            self._allocation = tracker.allocate("kv_cache", self.config.calculate_size())
        shape = (self.num_layers, 2, self.batch_size, self.num_heads, self.max_seq_len, self.head_dim)
        self._hold(np.zeros(shape, self.dtype))
        self._ledger, self._lock = CacheLedger(self.batch_size), threading.Lock()

    def _hold(self, store):
        self._store = store
        self._readable = store.view()  # the same bytes; whatever is sliced from it cannot be written to
        self._readable.flags.writeable = False

    @classmethod
    def from_config(cls, config, tracker=None, strict=False):
        """A cache of the sizes of a KVCacheConfig; its bytes are counted by `tracker` until close()."""
        return cls(config.batch_size, config.max_context_length, config.num_layers, config.num_kv_heads,
                   config.head_dim, dtype=config.dtype, strict=strict, tracker=tracker)

    @property
    def config(self):
        """The sizes as a KVCacheConfig."""
        return KVCacheConfig(self.num_layers, self.max_seq_len, self.num_heads, self.head_dim,
                             self.batch_size, self.dtype)

    # ---- what is in it
    @property
    def seq_lens(self):
        """Committed tokens of each row, as a list."""
        return list(self._ledger.lengths)

    @property
    def seq_pos(self):
        """Committed tokens of the longest row."""
        return max(self._ledger.lengths)

    @property
    def capacity(self):
        """Tokens that a row can hold."""
        return self.max_seq_len

    @property
    def nbytes(self):
        """Bytes of the arrays, full or empty."""
        return self._store.nbytes

    def get_memory_usage(self):
        """Bytes allocated and used; MB are 2**20 bytes."""
        used = sum(self._ledger.lengths) * self._store.nbytes // max(1, self.batch_size * self.max_seq_len)
        return {"total_bytes": self.nbytes, "total_mb": self.nbytes / 2**20, "used_bytes": used,
                "cache_tensors": 2 * self.num_layers, "dtype": self.dtype.name}

    # ---- one forward pass
    def positions(self, n_new, seq_len=None):
        """The positions (B, T) of the next tokens. n_new: a number, or one per row of a chunk padded to seq_len."""
        n_new = per_row("n_new", n_new, self.batch_size)
        seq_len = max(n_new) if seq_len is None else seq_len
        return next_positions(self._ledger.lengths, n_new, seq_len)

    def update(self, layer_idx, key, value, n_new=None):
        """Store T >= 1 new tokens of one layer; return all that they may look at, themselves included.

        key, value (B, H_kv, T, D); n_new: valid tokens of each row where the chunk is padded on the right.
        The KVView is read-only and shares memory with the cache. Errors: ValueError for what does not fit,
        CacheStateError for a call out of order; both before a byte is written.
        """
        with self._lock:
            layer_idx, key, value, n_new = self._accept(layer_idx, key, value, n_new)
            lengths = self._ledger.lengths
        write_tokens(self._store[layer_idx, 0], key, lengths, n_new)
        write_tokens(self._store[layer_idx, 1], value, lengths, n_new)
        visible = [length + count for length, count in zip(lengths, n_new)]
        return KVView(*self._read(layer_idx, max(visible)), slot_positions(visible))

    def advance(self):
        """Commit what every layer has written. A layer that was skipped holds zeros; strict=True refuses that."""
        skipped = sorted(set(range(self.num_layers)) - self._ledger.written)
        if self.strict and skipped and len(skipped) < self.num_layers:
            raise CacheStateError(f"advance() before layers {skipped} were updated (strict=True)")
        self._ledger.commit()

    def abandon(self):
        """Drop what is pending: the forward pass that wrote it has failed. Without a pending pass, nothing."""
        ledger = self._ledger
        if ledger.written:
            self._clear(ledger.lengths, [length + n for length, n in zip(ledger.lengths, ledger.n_new)])
        ledger.close_pass()

    def get(self, layer_idx):
        """Committed keys and values of one layer, (B, H_kv, seq_pos, D) each, as read-only Tensors."""
        return self._read(self._layer(layer_idx), self.seq_pos)

    # ---- the newest tokens, rows, copies
    def truncate(self, lengths):
        """Keep the first tokens of each row: one length for all rows, or one per row. Drops what is pending."""
        stored, kept = self._ledger.lengths, per_row("lengths", lengths, self.batch_size)
        for row, (have, keep) in enumerate(zip(stored, kept)):
            if keep > have:
                raise ValueError(f"row {row} holds {have} tokens: it cannot be cut to {keep}")
        self.abandon()
        self._clear(kept, stored)
        self._ledger.lengths = kept

    def rollback(self, n):
        """Forget the n newest tokens: of all rows, or one number per row. Drops what is pending."""
        stored, gone = self._ledger.lengths, per_row("n", n, self.batch_size)
        for row, (have, lose) in enumerate(zip(stored, gone)):
            if lose > have:
                raise ValueError(f"row {row} holds {have} tokens: it cannot roll back {lose}")
        self.truncate([have - lose for have, lose in zip(stored, gone)])

    def reorder(self, row_indices):
        """Row r becomes what row row_indices[r] was; rows may repeat. Drops what is pending."""
        rows = per_row("row_indices", row_indices, self.batch_size)
        if max(rows) >= self.batch_size:
            raise ValueError(f"row_indices {rows} name rows beyond the last, {self.batch_size - 1}")
        self.abandon()
        used = self._store[..., : self.seq_pos, :]
        used[...] = used[:, :, rows]
        self._ledger.lengths = [self._ledger.lengths[row] for row in rows]

    def clone(self):
        """An independent copy of what is committed."""
        twin = type(self).from_config(self.config, self._tracker, self.strict)
        for row, length in enumerate(self._ledger.lengths):
            twin._store[:, :, row, :, :length] = self._store[:, :, row, :, :length]
        twin._ledger.lengths = self.seq_lens
        return twin

    def __deepcopy__(self, memo):
        return self.clone()

    def reset(self):
        """Empty again: no tokens, every byte zero, nothing pending."""
        self._store[...] = 0
        self._ledger = CacheLedger(self.batch_size)

    # ---- life and model
    def close(self):
        """Give the memory back, to the tracker as well; the cache has no room any more. A second call does nothing."""
        allocation, self._allocation = self._allocation, None
        if allocation is not None:
            allocation.close()
        self.max_seq_len, self._ledger = 0, CacheLedger(self.batch_size)
        self._hold(np.zeros((self.num_layers, 2, self.batch_size, self.num_heads, 0, self.head_dim), self.dtype))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    @contextmanager
    def attached_to(self, model, n_new=None):
        """Within the block the model runs on this cache; afterwards its very same parts are back.

        n_new: valid tokens per row of the one padded chunk that is run in the block. A block that is left by
        an exception drops what is pending.
        """
        replaced = attach(model, self, n_new)
        try:
            yield self
        except BaseException:
            self.abandon()
            raise
        finally:
            put_parts(replaced)

    def __repr__(self):
        return (f"{type(self).__name__}(batch_size={self.batch_size}, max_seq_len={self.max_seq_len}, "
                f"num_layers={self.num_layers}, num_heads={self.num_heads}, head_dim={self.head_dim}, "
                f"dtype={self.dtype.name}, seq_lens={self.seq_lens})")

    # ---- inside
    def _accept(self, layer_idx, key, value, n_new):
        """All that an update can be refused for; the arrays in storage dtype and n_new per row when it is not."""
        try:
            layer_idx = self._layer(layer_idx)
            heads = (self.batch_size, self.num_heads, self.head_dim, self.dtype)
            key, value = check_tokens("key", key, *heads), check_tokens("value", value, *heads)
            seq_len = key.shape[2]
            if value.shape[2] != seq_len:
                raise ValueError(f"key brings {seq_len} tokens and value {value.shape[2]}: they must be as many")
            n_new = per_row("n_new", seq_len if n_new is None else n_new, self.batch_size)
            if max(n_new) > seq_len:
                raise ValueError(f"n_new {n_new} counts more tokens than the chunk has ({seq_len})")
            check_room(self._ledger.lengths, n_new, self.max_seq_len)
        except ValueError:
            self._ledger.failed = bool(self._ledger.written)
            raise
        if self._ledger.failed and layer_idx in self._ledger.written:
            self.abandon()
        self._ledger.claim(layer_idx, n_new, seq_len)
        return layer_idx, key, value, n_new

    def _layer(self, layer_idx):
        whole_number("layer_idx", layer_idx, least=0)
        if layer_idx >= self.num_layers:
            raise ValueError(f"layer_idx {layer_idx} is beyond the last layer, {self.num_layers - 1}")
        return int(layer_idx)

    def _read(self, layer_idx, num_slots):
        key, value = self._readable[layer_idx, :, :, :, :num_slots]
        return Tensor(key, dtype=self.dtype), Tensor(value, dtype=self.dtype)

    def _clear(self, starts, stops):
        """What is not a token is zero: this makes slots start .. stop of each row so."""
        for row, (start, stop) in enumerate(zip(starts, stops)):
            self._store[:, :, row, :, start:stop] = 0


def create_kv_cache(batch_size, max_seq_len, num_layers, num_heads, head_dim, **options):
    """A KVCache of these sizes; options are those of KVCache (dtype, strict, tracker)."""
    return KVCache(batch_size, max_seq_len, num_layers, num_heads, head_dim, **options)


class StandIn(Module):
    """A part of a model that stands in for another: same parameters under the same names, same attributes."""

    def __init__(self, part, cache, n_new=None):
        self.part, self.cache, self.n_new = part, cache, n_new
        self.training = part.training

    def named_parameters(self, prefix=""):
        return self.part.named_parameters(prefix)

    def __getattr__(self, name):  # asked only for what the stand-in itself lacks
        if name == "part":
            raise AttributeError(name)
        return getattr(self.part, name)

    def positions(self, seq_len):
        """Where the T tokens of this pass stand, (B, T); -1 for padding."""
        return self.cache.positions(seq_len if self.n_new is None else self.n_new, seq_len)


class CachedAttention(StandIn):
    """Attention with one cache.update between project and attend. In training mode: the attention it stands for."""

    def __init__(self, attention, cache, layer_idx, n_new=None):
        super().__init__(attention, cache, n_new)
        self.layer_idx = layer_idx

    def forward(self, x, mask=None):
        if self.training:
            return self.part(x, mask)
        if mask is not None:
            raise NotImplementedError("a cached forward makes its mask from positions; it takes no other")
        query, key, value = self.part.project(x)  # of the T new tokens only
        positions = self.positions(x.shape[1])
        key, value, pos = self.cache.update(self.layer_idx, key, value, self.n_new)
        visible = visible_mask(positions, pos, self.cache.window, self.cache.sinks)
        return self.part.merge(self.part.attend(query, key, value, visible))


class CountingPositions(StandIn):
    """A position embedding that counts on from the cached tokens. It is where a cached forward pass begins."""

    def forward(self, x, positions=None):
        if self.training:
            return self.part(x, positions)
        self.cache.abandon()  # what a failed pass has left
        if positions is None:
            positions = np.maximum(self.positions(x.shape[1]), 0)  # padding may take any row of the table
        return self.part(x, positions)


class CommittingNorm(StandIn):
    """The norm after the last block. It is where a cached forward pass ends: all layers have written, commit."""

    def forward(self, x):
        y = self.part(x)
        if not self.training:
            self.cache.advance()
        return y


def original(part):
    """The part that a stand-in stands for; any other part itself."""
    return part.part if isinstance(part, StandIn) else part


def put_parts(parts):
    """Set each (owner, name, part)."""
    for owner, name, part in parts:
        setattr(owner, name, part)


def require_parts(model):
    """AttributeError that names everything that the model lacks for a cache."""
    needed = ("embed_dim", "num_layers", "num_heads", "max_seq_len", "blocks", "position_embedding", "norm")
    missing = [name for name in needed if not hasattr(model, name)]
    if missing:
        raise AttributeError(f"{type(model).__name__} cannot take a KV cache, it lacks: {', '.join(missing)}")


def attach(model, cache, n_new=None):
    """Put stand-ins into the model; return what they replaced, as (owner, name, part)."""
    require_parts(model)
    if len(model.blocks) != cache.num_layers:
        raise ValueError(f"the model has {len(model.blocks)} blocks, the cache {cache.num_layers} layers")
    parts = [
        (model, "position_embedding", CountingPositions(original(model.position_embedding), cache, n_new)),
        (model, "norm", CommittingNorm(original(model.norm), cache)),
    ]
    for layer_idx, block in enumerate(model.blocks):  # each stand-in gets its own layer_idx
        parts.append((block, "attention", CachedAttention(original(block.attention), cache, layer_idx, n_new)))
    replaced = [(owner, name, getattr(owner, name)) for owner, name, _ in parts]
    put_parts(parts)
    return replaced


def enable_kv_cache(model=None, *sizes, **options):
    """Let a GPT run on a new cache of its own sizes, in eval mode, until disable_kv_cache; return the cache.

    Options: batch_size=1, max_seq_len (default: the model's), dtype, strict, tracker. A second call replaces the
    first cache. In training mode the cache is bypassed. Inference only: keys and values carry no gradients.
    Called with the sizes of create_kv_cache instead of a model, it forwards to it.
    """
    if model is None or isinstance(model, (int, np.integer)):
        return create_kv_cache(*([] if model is None else [model]), *sizes, **options)
    if sizes:
        raise TypeError("the sizes come from the model; options are given by name, as batch_size=2")
    require_parts(model)
    num_kv_heads = getattr(model, "num_kv_heads", None) or model.num_heads
    found = dict(batch_size=1, max_seq_len=model.max_seq_len, num_layers=model.num_layers,
                 num_heads=num_kv_heads, head_dim=model.embed_dim // model.num_heads)
    cache = create_kv_cache(**{**found, **options})
    disable_kv_cache(model)
    attach(model, cache)
    model._kv_cache, model._cache_enabled = cache, True
    return cache


def disable_kv_cache(model):
    """Put the very same parts back that enable_kv_cache replaced."""
    for owner, name in [(model, "position_embedding"), (model, "norm"), *((b, "attention") for b in model.blocks)]:
        setattr(owner, name, original(getattr(owner, name)))
    model._kv_cache, model._cache_enabled = None, False


def prefill(model, ids, cache, chunk=None, n_new=None):
    """Run a prompt into the cache, `chunk` tokens at a time; return the logits (B, T, V) of one full forward.

    ids (B, T) or (T,). n_new: the valid tokens of each row of a right-padded batch; the logits of padding mean
    nothing. A prompt that does not fit raises before any of it is run. Eval mode and no gradients inside.
    """
    ids = np.atleast_2d(ids.data if isinstance(ids, Tensor) else np.asarray(ids))
    seq_len = ids.shape[1]
    counts = np.array(per_row("n_new", seq_len if n_new is None else n_new, cache.batch_size))
    chunk = seq_len if chunk is None else whole_number("chunk", chunk)
    if cache.window is None:
        check_room(cache.seq_lens, counts.tolist(), cache.capacity)
    was_training, logits = model.training, []
    model.eval()
    try:
        for start in range(0, seq_len, chunk):
            ids_chunk = ids[:, start : start + chunk]
            valid = np.clip(counts - start, 0, ids_chunk.shape[1])
            with no_grad(), cache.attached_to(model, n_new=valid):
                logits.append(model(ids_chunk))
    finally:
        model.train(was_training)
    return cat(logits, dim=1)


class LayerKVCache:
    """The cache of one layer on its own, as a beginner would write it: arrays, and a length per row.

    k_cache and v_cache (B, H, S, D) are public and writable, and so is the list seq_lens.
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
        heads = (self.batch_size, self.num_heads, self.head_dim, self.dtype)
        k, v = check_tokens("k", k, *heads), check_tokens("v", v, *heads)
        if k.shape != v.shape:
            raise ValueError(f"k brings {k.shape[2]} tokens and v {v.shape[2]}: they must be as many")
        n_new = per_row("n_new", k.shape[2] if n_new is None else n_new, self.batch_size)
        if max(n_new) > k.shape[2]:
            raise ValueError(f"n_new {n_new} counts more tokens than the chunk has ({k.shape[2]})")
        lengths = per_row("seq_lens", self.seq_lens, self.batch_size)
        check_room(lengths, n_new, self.max_seq_len)
        write_tokens(self.k_cache, k, lengths, n_new)
        write_tokens(self.v_cache, v, lengths, n_new)
        self.seq_lens = [length + count for length, count in zip(lengths, n_new)]

    def get_kv(self, row):
        """Keys and values of one row: (H, len, D) each, read-only views."""
        if whole_number("row", row, least=0) >= self.batch_size:
            raise ValueError(f"row {row} is beyond the last, {self.batch_size - 1}")
        views = [cache[row, :, : self.seq_lens[row]] for cache in (self.k_cache, self.v_cache)]
        for view in views:
            view.flags.writeable = False
        return tuple(views)

    @property
    def nbytes(self):
        """Bytes of both arrays."""
        return self.k_cache.nbytes + self.v_cache.nbytes

    def reset(self):
        """Empty again."""
        self.k_cache[...] = 0
        self.v_cache[...] = 0
        self.seq_lens = [0] * self.batch_size


def multi_head_attention_with_cache(query_input, cache, w_q, w_k, w_v, w_o):
    """Attention of T tokens over a LayerKVCache that already holds them: (B, T, E) -> (B, T, embed_dim).

    It reads the cache and writes nothing; the T queries are the last T tokens of each row, causal among themselves.
    w_q (E, H*D) and w_o (H*D, embed_dim) multiply from the right. w_k and w_v made the keys and values that the
    cache holds; they are part of the signature so that a layer is one tuple of weights, and are not used here.
    """
    x = np.asarray(query_input.data if isinstance(query_input, Tensor) else query_input)
    batch_size, seq_len, _ = x.shape
    lengths = per_row("seq_lens", cache.seq_lens, cache.batch_size)
    if batch_size != cache.batch_size or min(lengths) < seq_len:
        raise ValueError(f"{batch_size} rows of {seq_len} queries need a cache that holds them: seq_lens {lengths}")
    starts = [length - seq_len for length in lengths]
    visible = visible_mask(next_positions(starts, [seq_len] * batch_size, seq_len), slot_positions(lengths))
    query = (x @ w_q).reshape(batch_size, seq_len, -1, cache.head_dim).swapaxes(1, 2)  # (B, H, T, D)
    key, value = cache.k_cache[:, :, : max(lengths)], cache.v_cache[:, :, : max(lengths)]
    mixed = scaled_dot_product_attention(query, key, value, visible).data
    output = mixed.swapaxes(1, 2).reshape(batch_size, seq_len, -1) @ w_o  # (B, T, H*D) @ (H*D, E)
    return Tensor(output) if isinstance(query_input, Tensor) else output


class IncrementalDecoder:
    """A small decoder in plain NumPy on one LayerKVCache per layer: attention layers with residuals, nothing else."""

    def __init__(self, d_model, num_heads, num_layers, max_seq_len, vocab_size, rng=None):
        if d_model % num_heads:
            raise ValueError(f"d_model {d_model} is not a multiple of num_heads {num_heads}")
        self.d_model, self.num_heads, self.num_layers = d_model, num_heads, num_layers
        self.max_seq_len, self.vocab_size = max_seq_len, vocab_size
        rng = default_rng() if rng is None else rng

        def matrix(*shape):
            return rng.standard_normal(shape, dtype=np.float32) / np.float32(d_model**0.5)

        self.token_table, self.position_table = matrix(vocab_size, d_model), matrix(max_seq_len, d_model)
        self.layers = [tuple(matrix(d_model, d_model) for _ in "qkvo") for _ in range(num_layers)]
        self.head = matrix(d_model, vocab_size)
        self._init_caches(1)

    def _init_caches(self, batch_size):
        """Fresh caches, one per layer, for `batch_size` rows; also kept as self.caches."""
        head_dim = self.d_model // self.num_heads
        self.caches = [
            LayerKVCache(batch_size, self.max_seq_len, self.num_heads, head_dim) for _ in range(self.num_layers)
        ]
        return self.caches

    def forward_step(self, ids, caches=None, is_prefill=False):
        """Run the next tokens, ids (B, T) or (B,), through all layers: logits (B, vocab_size) of the last one.

        is_prefill marks the call that brings a prompt; prompt and single token take the same path, so a
        prefill equals the same tokens one by one.
        """
        caches = self.caches if caches is None else caches
        ids = np.asarray(ids)
        ids = ids if ids.ndim == 2 else ids.reshape(caches[0].batch_size, -1)
        lengths, (batch_size, seq_len) = caches[0].seq_lens, ids.shape
        check_room(lengths, [seq_len] * batch_size, self.max_seq_len)
        positions = next_positions(lengths, [seq_len] * batch_size, seq_len)
        x = self.token_table[ids] + self.position_table[positions]  # (B, T, E)
        for cache, (w_q, w_k, w_v, w_o) in zip(caches, self.layers):
            key, value = (
                (x @ w).reshape(batch_size, seq_len, self.num_heads, -1).swapaxes(1, 2) for w in (w_k, w_v)
            )
            cache.update(key, value)
            x = x + multi_head_attention_with_cache(x, cache, w_q, w_k, w_v, w_o)
        return x[:, -1] @ self.head

"""Cache compression: caches that stay small: windows, fewer bits, and a place on disk.

Lesson 22_cache_compression. Built from src/22_cache_compression/22_cache_compression.py by `tito dev build`: change it there, not here.
"""

__all__ = [
    "PendingKVCache",
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
    "QuantizedModelKVCache",
    "CacheReport",
    "run_text",
    "compare_caches",
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


# %% cell 6
import math
from dataclasses import dataclass

from tinytorch.core.attention import attention_weights
from tinytorch.generation.kv_cache import check_chunk, slot_positions, write_tokens


# %% cell 13 (22-quantize)
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
    x = low + codes * scale
    return x if x.dtype == np.float32 else np.clip(x, -LARGEST, LARGEST).astype(np.float32)


# %% cell 16 (22-pack)
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
    per_byte = 8 // bits
    codes = np.empty((*packed.shape, per_byte), np.uint8)
    for i in range(per_byte):
        codes[..., i] = packed >> (bits * i) & (2**bits - 1)
    return codes.reshape(*packed.shape[:-1], packed.shape[-1] * per_byte)[..., :count]


# %% cell 19 (22-quantized-bytes)
def quantized_bytes(num_tokens, num_heads, head_dim, bits, group_size):
    """Bytes of one layer's keys and values in whole groups: packed codes, and a float32 scale and low per group.

    >>> quantized_bytes(num_tokens=1, num_heads=1, head_dim=64, bits=4, group_size=32)
    96
    """
    numbers = 2 * num_tokens * num_heads * head_dim
    return numbers * bits // 8 + numbers // group_size * 8


# %% cell 24 (22-groups)
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


# %% cell 27
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


def quantized_formats(head_dim, bits, key_axis, group_size):
    """The formats of keys and of values; ValueError for what cannot be stored so.

    group_size None: 32; where 32 does not divide head_dim, a token's groups are the whole head. Values are always in
    token groups: of group_size numbers, or of the whole head where channel groups have more tokens than the head numbers.
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


# %% cell 28
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
        """All that is stored."""
        return [*self._units(), self.waiting]

    def _units(self):
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
        for array, new in zip(self._units(), self.form.encode(units)):
            write_tokens(array[rows], new, first, count)

    def _wait(self, row, tokens):
        self.waiting[row, :, : tokens.shape[1]] = tokens
        self.waiting[row, :, tokens.shape[1] :] = 0

    def read(self, lengths, rows=slice(None)):
        """All tokens of the rows that `lengths` belong to: (B, H, longest, D) float32, zero where a row is shorter."""
        num_units, tokens = max(lengths) // self.form.tokens, self.form.tokens
        frozen = self.form.decode(*(array[rows, :, :num_units] for array in self._units()))
        if tokens == 1:
            return frozen
        waiting, shape = self.waiting[rows], frozen.shape
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
                rest = self.form.decode(*(array[row, :, first : first + 1] for array in self._units()))[:, :left]
            else:
                rest = self.waiting[row, :, :left].copy()
            for array in self._units():
                array[row, :, first:last] = 0
            if keep < have:
                self._wait(row, rest)

    def gather(self, rows):
        """Row r becomes what row rows[r] was."""
        for array in self.arrays():
            array[...] = array[rows]


# %% cell 29
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
        if whole_number("row", row, least=0) >= self.batch_size:
            raise ValueError(f"row {row} is beyond the last, {self.batch_size - 1}")
        return tuple(part.read([self._lengths[row]], slice(row, row + 1))[0] for part in (self._keys, self._values))

    def truncate(self, lengths):
        """Keep only the first tokens of each row; they read as before. A group that is cut waits for new tokens, and
        is frozen anew, from the numbers that were read, when it is whole again."""
        kept = per_row("lengths", lengths, self.batch_size)
        for row, (keep, have) in enumerate(zip(kept, self._lengths)):
            if keep > have:
                raise ValueError(f"row {row} holds {have} tokens: it cannot be cut to {keep}")
        self._keys.forget(kept, self._lengths)
        self._values.forget(kept, self._lengths)
        self._lengths = kept

    def reset(self):
        """Empty again: no bytes, no lengths."""
        self.truncate(0)

    def arrays(self):
        """All that is stored: of keys and of values, codes, scales, lows, and what waits."""
        return [*self._keys.arrays(), *self._values.arrays()]

    def memory_bytes(self):
        """Bytes of all arrays, full or empty: codes, scales, lows, and room for the keys that wait."""
        return sum(array.nbytes for array in self.arrays())

    def savings_vs_fp32(self):
        """How many times as many bytes float32 would take, for as many tokens."""
        return 8 * self.batch_size * self.num_heads * self.max_seq_len * self.head_dim / self.memory_bytes()


# %% cell 33
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


# %% cell 38
class QuantizedModelKVCache(PendingKVCache):
    """A KV cache in 8, 4 or 2 bits for all layers of a model: see QuantizedKVCache for bits, key_axis, group_size.

    What it hands out is float32. truncate and rollback cut frozen groups: what is left of one reads as before, waits, and
    is frozen anew, from the numbers that were read, when the group is whole again.

    >>> from tinytorch.generation.kv_cache import enable_kv_cache
    >>> model = random_gpt()
    >>> cache = enable_kv_cache(model, factory=QuantizedModelKVCache, bits=4, key_axis="channel", group_size=8)
    >>> len(model.generate([1, 2, 3], 5)), cache.seq_pos, round(cache.savings_vs_fp32(), 2)
    (8, 7, 2.37)
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
        self._pending, key_bytes = {}, self._bytes(num_slots)[0]
        self._layers = [
            [GroupedTokens(form, part, self.batch_size, self.num_heads, num_slots)
             for form, part in zip(self._formats, np.split(block, [key_bytes]))]
            for block in self._store
        ]

    def _open_pass(self, lengths):
        """Nothing to do: this store does not grow."""

    def savings_vs_fp32(self):
        """How many times as many bytes float32 would take, for as many tokens."""
        return self.config.calculate_size() / self.nbytes

    def get_memory_usage(self):
        """As in KVCache; used_bytes counts frozen groups with their scales, and waiting tokens in float32."""
        used = sum(form.nbytes(1, self.num_heads, *divmod(length, form.tokens))
                   for form in self._formats for length in self.seq_lens)
        return {**super().get_memory_usage(), "used_bytes": self.num_layers * used}

    def reset(self):
        """Empty again: no bytes, no lengths, nothing pending."""
        self._pending.clear()
        self._store[...] = 0
        self._ledger = CacheLedger(self.batch_size)

    def clone(self):
        """An independent copy of what is committed."""
        twin = type(self)(self.batch_size, self.max_seq_len, self.num_layers, self.num_heads, self.head_dim,
                          bits=self.bits, key_axis=self.key_axis, group_size=self.group_size,
                          strict=self.strict, tracker=self._tracker)
        twin._store[...] = self._store
        twin._ledger.lengths = self.seq_lens
        return twin

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


# %% cell 42
import time

from tinytorch.core.autograd import no_grad
from tinytorch.core.losses import cross_entropy
from tinytorch.generation.kv_cache import prefill


class CacheReport(NamedTuple):
    """What one cache cost: bytes, largest error of a logit, perplexity, seconds for a step of one token per row."""

    name: str
    nbytes: int
    logit_error: float
    perplexity: float
    seconds: float


def run_text(model, ids, cache, chunk, timed):
    """Run ids (B, T) through a cache in chunks, the last `timed` tokens one by one; logits (B, T, V), median seconds."""
    pieces, seconds, first = [], [], ids.shape[1] - timed
    with no_grad():
        pieces.append(prefill(model, ids[:, :first], cache, chunk=chunk).numpy())
        for t in range(first, ids.shape[1]):
            start = time.perf_counter()
            pieces.append(model(ids[:, t : t + 1], cache=cache).numpy())
            seconds.append(time.perf_counter() - start)
    return np.concatenate(pieces, axis=1), float(np.median(seconds))


def compare_caches(model, ids, factories, chunk=4, timed=8):
    """Run the same text through each cache; print a table and return a CacheReport for each.

    ids (B, T + 1): T tokens are run, the last is only predicted. factories: name -> a function that makes a cache, as
    for enable_kv_cache; the errors count from the first of them.
    """
    sizes = dict(batch_size=len(ids), max_seq_len=ids.shape[1] - 1, num_layers=model.num_layers,
                 num_heads=model.num_kv_heads, head_dim=model.embed_dim // model.num_heads)
    reports, exact = [], None
    print(f"{'cache':<24} {'bytes':>10} {'logit error':>12} {'perplexity':>11} {'ms per token':>13}")
    for name, factory in factories.items():
        with factory(**sizes) as cache:
            logits, seconds = run_text(model, ids[:, :-1], cache, chunk, timed)
            exact = logits if exact is None else exact
            loss = cross_entropy(Tensor(logits), ids[:, 1:]).item()
            report = CacheReport(name, cache.nbytes, float(np.abs(logits - exact).max()), float(np.exp(loss)), seconds)
        reports.append(report)
        print(f"{name:<24} {report.nbytes:>10,} {report.logit_error:>12.3f} {report.perplexity:>11.2f} {1e3 * seconds:>13.2f}")
    return reports

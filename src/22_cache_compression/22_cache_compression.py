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

A window forgets. What if we kept every token, and each number in fewer bits? Keys and values are small numbers around
zero, so the first idea, `key.astype(np.int8)`, keeps almost nothing of them: see below.
"""

# %%
#| export
import math
from dataclasses import dataclass

from tinytorch.core.attention import attention_weights
from tinytorch.generation.kv_cache import check_chunk, slot_positions, write_tokens

# %%
# Given, and not part of the package.
def error_of(run, kind=ValueError):
    """The message of the error that `run()` raises; "" when it raises none."""
    try:
        run()
    except kind as error:
        return str(error)
    return ""

# %% nbgrader={"grade": false, "grade_id": "22-measure-cast", "locked": true, "schema_version": 3, "solution": false, "task": false}
if __name__ == "__main__":
    key = np.random.default_rng(0).normal(scale=0.5, size=(4, 8)).astype(np.float32)
    print("a key", key[0].round(2), "\nas int8", key[0].astype(np.int8))
    print(f"numbers that became zero: {np.mean(key.astype(np.int8) == 0):.0%}")

# %% [markdown]
"""
So we spread the codes over the numbers that are there. A *group* keeps its smallest number and a step; each number
becomes the nearest step, counted from the smallest. With 2 bits there are four codes and three steps between them:

    group     1.0   1.4   3.1   4.0      low = 1    scale = (4 - 1) / 3 = 1
    codes       0     0     2     3      round((x - low) / scale)
    back      1.0   1.0   3.0   4.0      low + code * scale

Zero need not be in the range (the papers call this *asymmetric*). No number is off by more than half a step.

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
            "; a whole step is too much, we round to the nearest" if got > 1.5 * worst else "")
    for bits in (8, 4, 2):
        codes, scale_and_low = np.zeros((2, 64 * bits // 8), np.uint8), np.zeros((2, 2, 2), np.float32)
        got, real = predicted_token_bytes[bits], codes.nbytes + scale_and_low.nbytes
        assert got == real, f"{bits} bits: got {got} bytes, key and value have {real}" + (
            "; scale and low of each group count, too" if got == codes.nbytes else "") + (
            "; that is the key alone" if got * 2 == real else "")


if __name__ == "__main__":
    test_unit_predict_bits()

# %% [markdown]
"""
Build both directions. `x` comes in float64: from -3e38 to 3e38 the range does not fit in float32. Three things to
watch: each group along `axis` has a range of its own (`keepdims=True` keeps the shapes fit for each other); rounding
goes to the *nearest* step (`np.rint`); and where all numbers of a group are equal the scale is 0, and 0 / 0 is no
code.

`float32_above` (given) stores the step. Rounded down, even by a little, it would not reach the group's largest number.
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
    x = low + codes * scale
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
    assert codes.max() < 2**bits, f"{bits} bits: got code {codes.max()}, the largest is {2**bits - 1}"
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
            f"{number:g} came back as {got:g}, the nearest step is {nearest:g}: was it cut off, or low forgotten?")


def test_unit_quantize():
    """Oracles: the nearest point, and that a constant group comes back exactly."""
    for bits in (2, 4, 8):
        check_group([1.0, 1.4, 3.1, 4.0], bits)
        check_group([-7.0, -6.5, -6.6, -6.1, -6.9], bits)
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
A code of 4 bits in a byte of its own wastes half of it, and NumPy has no smaller type. Two *nibbles* share a byte, or
four *crumbs*. The first code stands in the lowest bits:

    nibbles    5, 12         byte 12 * 16 + 5 = 197          0b1100_0101
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
8 bytes for each group. The next cell prints it for a real model, over the size of the groups.
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
    print("numbers per group    4 bits: really   error    2 bits: really   error      (error: mean, of numbers around 1)")
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
Small groups follow the numbers closely, and pay for their scales. We take 32, as KIVI does (below); a head whose size 32
does not divide is one group.

## B2. Along which axis?

A group may be numbers of one *token*, or numbers of one *channel* (one of the D columns) over several tokens. In
random numbers that makes no difference. In keys of large models it does: a few channels are large in every token.

    token groups                      channel groups: here of 3 tokens
    k0  [ 0.1  -0.3   9.0   0.2]      k0    0.1 | -0.3 |  9.0 |  0.2
    k1  [-0.2   0.4   8.5  -0.1]      k1   -0.2 |  0.4 |  8.5 | -0.1
    k2  [ 0.3   0.1   9.2   0.0]      k2    0.3 |  0.1 |  9.2 |  0.0

One large channel widens the range of *every* token group, and its neighbours share the few codes that are left. Of the
channel groups, only its own is wide. But a token arrives with one number for each channel: a channel group is whole only
after `group_size` tokens.
"""

# %% [markdown]
"""
So the newest keys *wait* as they are, in float32, until their group is whole. Then it is frozen: quantised once, and
never again. Groups of 3 tokens, five of them waiting and new:

    waiting  a b      new  c d e      groups  [a b c]      waiting  d e

Which token is in which group depends on its position alone, so all ways to cut a text into chunks freeze the same
groups. A group that is quantised as it grows depends on them, and each time loses a little more.
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
            f"{said}groups have shape {groups.shape}, expected (2, N, {group_size}, 3)")
        frozen += [groups[:, n] for n in range(groups.shape[1])]
        assert len(frozen) <= start // group_size, (
            f"{said}{len(frozen)} groups are frozen; one that is not whole would be quantised again when it grows")
        assert len(frozen) == start // group_size and waiting.shape == (2, start % group_size, 3), (
            f"{said}{len(frozen)} groups frozen, waiting {waiting.shape}, expected {start // group_size} groups and "
            f"(2, {start % group_size}, 3)")
        assert np.array_equal(waiting, tokens[:, start - start % group_size : start]), f"{said}other tokens wait"
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

# %% [markdown]
"""
A check without a hole, for your functions together. A slow oracle: each group on its own, in plain loops.
"""

# %% nbgrader={"grade": true, "grade_id": "22-quantized-cache-test", "locked": true, "points": 4, "schema_version": 3, "solution": false, "task": false}
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
## B3. The finding

Keys with two outlier channels, planted: 16 tokens of the picture above, with 32 channels of which two are large. Which
axis is better, and how much? *Predict*, then run. The last column is what attention makes of it: how far the weights
of random queries are off.
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
Two papers found it within a month, in Llama and other models: Hooper et al. 2024, *KVQuant* (arXiv 2401.18079,
section 3.1), and Liu et al. 2024, *KIVI* (arXiv 2402.02750, section 3). In keys a few channels are large in every token; in
values they are not, and a token's value is multiplied by one weight, so its error should stay its own. Hence: keys
along the channel, values along the token, and the newest keys as they are.

*Look back.* KIVI keeps the last 128 tokens whole, we keep less than a group. What does that buy, and what does it cost?
(Attention looks at the newest most; a token in float32 takes as many bytes as 32 / 6 tokens in groups of 32 with 4 bits.)
"""

# %% [markdown]
"""
## B4. In a model

The whole family member: one block of bytes for all layers. New tokens are kept aside during their pass, so attention sees
the chunk exactly as it came, and the past as it was stored. At the commit it is quantised.
"""

# %%
#| export
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
## C. Elsewhere: on disk
"""

# %% [markdown]
"""
## D. The table

Small caches, and what they cost: on real text that the model has never seen, with the GPT that the demo trained. Each cache
gets the same windows of text, a few tokens at a time, so that attention really reads what the cache kept. Measured:

* *bytes* of the cache;
* *logit error*: the largest difference of a logit from the float32 cache;
* *perplexity*: e to the mean loss in nats. 20 means: as unsure as between 20 equally likely tokens;
* *ms per token*: the median of single steps with a full cache, all rows at once.

*Predict.* Which will be worse for this model: to forget all but the last 64 tokens, or to keep all of them in 2 bits?
"""

# %%
#| export
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

# %% nbgrader={"grade": false, "grade_id": "22-measure-table", "locked": true, "schema_version": 3, "solution": false, "task": false}
def with_options(kind, **options):
    """A factory of caches of that kind."""
    return lambda **sizes: kind(**sizes, **options)


def held_out_text(rows=8, seq_len=256):
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

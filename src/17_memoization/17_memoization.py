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
#     lesson: "17"
# ---

# %% [markdown]
"""
# Lesson 17: Memoization, the KV cache

**You build** the cache on which every language model in service runs: keys and values computed once, kept, and
read by every later token. At the end the GPT of lesson 13 generates the same tokens as before, several times
faster.

**Needs** lessons 01, 03, 05, 12, 13 and 14. **Exported** to `tinytorch.generation.kv_cache`. **Time** 90 minutes.
Long cells without a hole are given: read their docstrings, come back for the rest.

> **For inference only.** What is stored carries no gradients. Section 15 shows what goes wrong in training, and
> what your parts do about it.
"""

# %%
#| default_exp generation.kv_cache
#| export
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

# %%
# Given, and not part of the package: what the checks below use.
import time


def error_of(run, kind=ValueError):
    """The message of the error that `run()` raises; "" when it raises none."""
    try:
        run()
    except kind as error:
        return str(error)
    return ""


def chunk_of(seq_len, seed=0, shape=(2, 2, 4)):
    """Keys and values (B, H, T, D) that are all different; shape is (B, H, D)."""
    batch_size, num_heads, head_dim = shape
    rng = np.random.default_rng(seed)
    return rng.standard_normal((2, batch_size, num_heads, seq_len, head_dim), dtype=np.float32)


def count_rows(model, run):
    """The token rows that really pass through the model during `run()`."""
    rows, embedding = [], model.token_embedding

    def counting(ids):
        rows.append(np.asarray(ids).shape[-1])
        return embedding(ids)

    model.token_embedding = counting
    try:
        run()
    finally:
        model.token_embedding = embedding
    return sum(rows)

# %% [markdown]
"""
## 1. The cost of forgetting

A GPT generates one token, appends it, and runs the whole sequence again for the next one. So each token should cost
more than the one before. Lesson 14 taught us to measure before we believe.

*Predict, before you run the second cell:* with 256 tokens so far instead of 32, the next token takes how many times
as long?
"""

# %%
#| export
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

# %% nbgrader={"grade": false, "grade_id": "17-measure-naive", "locked": true, "schema_version": 3, "solution": false, "task": false}
if __name__ == "__main__":
    profile_naive_generation()

# %% [markdown]
"""
The last column is the answer: each token pays again for all before it. (While the text is short, the calls into
NumPy cost more than the arithmetic, and hide it.)

Count the work. A pass over T tokens runs T *token rows* through every layer. A prompt of 3 tokens and 4 new ones:

    round             1        2          3            4              rows
    without a cache   a b c    a b c d    a b c d e    a b c d e f    3 + 4 + 5 + 6 = 18
    with a cache      a b c    d          e            f              3 + 1 + 1 + 1 =  6

The last new token is sampled and never run: nothing comes after it.
"""

# %% nbgrader={"grade": false, "grade_id": "17-count-rows", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def token_rows(prompt_len, max_new_tokens, cached):
    """Token rows that pass through the model while it generates.

    >>> token_rows(3, 4, cached=False), token_rows(3, 4, cached=True)
    (18, 6)
    """
    ### BEGIN SOLUTION
    if max_new_tokens == 0:
        return 0
    if cached:
        return prompt_len + max_new_tokens - 1
    return sum(prompt_len + i for i in range(max_new_tokens))
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "17-count-rows-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_count_rows():
    """Oracle: the picture above, and a real `generate` with its rows counted."""
    got = token_rows(3, 4, cached=False)
    assert got == 18, f"without a cache: got {got}, expected 3+4+5+6 = 18; the sequence grows by one each round"
    got = token_rows(3, 4, cached=True)
    assert got == 6, f"with a cache: got {got}, expected 3+1+1+1 = 6; the last sampled token is never run"
    model = random_gpt()
    counted = count_rows(model, lambda: model.generate([1, 2, 3, 4, 5], 3))
    got = token_rows(5, 3, cached=False)
    assert got == counted, f"5 + 3 tokens without a cache: got {got}, a real run counts {counted}"
    assert token_rows(5, 0, cached=False) == 0, "no new tokens: nothing is run, expected 0"
    ### BEGIN HIDDEN TESTS
    assert token_rows(10, 1, cached=True) == 10, "one new token needs the prompt's rows and no more, expected 10"
    assert token_rows(128, 128, cached=False) == 24512, "128 + 128 tokens without a cache: expected 24512"
    assert token_rows(7, 0, cached=True) == 0, "no new tokens: nothing is run, expected 0"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_count_rows()

# %% [markdown]
"""
## 2. What never changes

May we keep anything at all? A layer makes token *t*'s key and value from the hidden state of token *t* alone. That
state came out of the layer below, where *t* looked at tokens 0 .. *t*; the causal mask hid all that came later. So
no new token can change them, in any layer.

*Predict:* we compute the keys of six tokens, and again with a seventh behind them. In which of the three layers do
the six old keys change with the causal mask, and in which without it?
"""

# %% nbgrader={"grade": false, "grade_id": "17-measure-keys", "locked": true, "schema_version": 3, "solution": false, "task": false}
def layer_keys(model, ids):
    """The keys of every layer, (B, H_kv, T, D) each, of one forward pass without a cache."""
    x = model.position_embedding(model.token_embedding(ids))
    keys = []
    for block in model.blocks:
        keys.append(block.attention.project(block.norm1(x))[1].numpy())
        x = block(x)
    return keys


def show_key_changes(causal):
    model, ids = random_gpt(), np.arange(7)[None]
    for block in model.blocks:
        block.attention.causal = causal
    pairs = zip(layer_keys(model, ids[:, :6]), layer_keys(model, ids))
    changes = [float(np.abs(short - long[:, :, :6]).max()) for short, long in pairs]
    print(f"causal={causal!s:5}  largest change of an old key, layer by layer:", [f"{c:.1e}" for c in changes])


if __name__ == "__main__":
    show_key_changes(causal=True)
    show_key_changes(causal=False)

# %% [markdown]
"""
With the mask, rounding at most. Without it the old keys move: a model that looks both ways cannot be cached so.

*Look back.* Why does layer 0 not change even without the mask? (Its keys come from the embeddings, before any token
has looked at another.) Why keep keys and values, but no queries? (A query asks once, in its own round. Only keys
and values are read again.)

## 3. Bytes

Memory is the price. In each layer a token leaves a key and a value for each key-value head, D numbers each:

    layer 0   key   [ H_kv x D ]    value [ H_kv x D ]
    layer 1   key   [ H_kv x D ]    value [ H_kv x D ]
    ...

*Predict.* GPT-2 has 12 layers and 12 heads of 64 numbers; we store float16 (2 bytes). How many bytes does one
token take? And how many MiB (2**20 bytes) does its full context of 1024 tokens take?
"""

# %% nbgrader={"grade": false, "grade_id": "17-predict-bytes", "locked": false, "schema_version": 3, "solution": true, "task": false}
# predicted_token_bytes = ...
# predicted_context_mib = ...
### BEGIN SOLUTION
predicted_token_bytes = 36_864
predicted_context_mib = 36
### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "17-predict-bytes-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_predict_bytes():
    """Oracle: an array of that shape, and its nbytes."""
    token = np.zeros((12, 2, 12, 64), np.float16)  # layers, key and value, heads, D
    got = predicted_token_bytes
    assert got == token.nbytes, f"one token: got {got} bytes, an array of that shape has {token.nbytes}" + (
        "; that is the keys alone, the values are as large" if got * 2 == token.nbytes else "")
    expected = token.nbytes * 1024 / 2**20
    assert predicted_context_mib == expected, f"1024 tokens: got {predicted_context_mib} MiB, expected {expected}"


if __name__ == "__main__":
    test_unit_predict_bytes()

# %% nbgrader={"grade": false, "grade_id": "17-bytes", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def kv_cache_bytes(num_layers, num_kv_heads, head_dim, num_tokens, itemsize):
    """Bytes of the keys and values of `num_tokens` tokens (of all rows of a batch together).

    >>> kv_cache_bytes(num_layers=12, num_kv_heads=12, head_dim=64, num_tokens=1, itemsize=2)
    36864
    """
    ### BEGIN SOLUTION
    return 2 * num_layers * num_kv_heads * head_dim * num_tokens * itemsize
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "17-bytes-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_bytes():
    """Oracle: the nbytes of arrays that are really made."""
    got, real = kv_cache_bytes(1, 2, 4, 3, 4), 2 * np.zeros((1, 2, 4, 3), np.float32).nbytes
    assert got == real, f"1 layer, 2 heads of 4, 3 tokens, float32: got {got}, a K and a V array have {real}" + (
        "; were the values forgotten?" if got * 2 == real else "")
    got, real = kv_cache_bytes(5, 2, 4, 3, 4), 2 * np.zeros((5, 2, 4, 3), np.float32).nbytes
    assert got == real, f"the same in 5 layers: got {got}, expected {real}; every layer has a cache of its own"
    ### BEGIN HIDDEN TESTS
    assert kv_cache_bytes(32, 8, 128, 4096, 2) == 512 * 2**20, "Llama-3-8B at 4096 tokens in float16 is 512 MiB"
    assert kv_cache_bytes(24, 2, 64, 2048, 4) == 48 * 2**20, "Qwen2.5-0.5B at 2048 tokens in float32 is 48 MiB"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_bytes()

# %% [markdown]
"""
## 4. The store

One block of zeros for everything, allocated once, (L, 2, B, H_kv, S, D):

    | layer 0 keys | layer 0 values | layer 1 keys | layer 1 values | ...     each of these: B rows of S slots

A token fills one slot in each; the slot's number is its position in its row. One layer's keys, 2 rows of S = 6
slots, rows of different length:

    lengths [3, 1]     row 0   a b c . . .        write 2 and 1 new tokens:   row 0   a b c d e .
                       row 1   p . . . . .                                    row 1   p q . . . .

New tokens come as one chunk (B, H, T, D), padded on the right: row 1 brings `q` and a column of padding, `n_new` is
[2, 1]. A write is a slice; nothing moves or grows. For row 0 alone: `store[0, :, 3:5] = new[0, :, :2]`.
"""

# %% nbgrader={"grade": false, "grade_id": "17-write", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def write_tokens(store, new, lengths, n_new):
    """Write each row's first n_new tokens behind those that the row holds, in place.

    store (B, H, S, D), new (B, H, T, D); lengths and n_new are lists with one number per row.
    """
    ### BEGIN SOLUTION
    for row, (start, count) in enumerate(zip(lengths, n_new)):
        store[row, :, start : start + count] = new[row, :, :count]
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "17-write-test", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
def test_unit_write():
    """Oracle: the picture, as plain lists."""
    store = np.array([[1, 2, 3, 0, 0, 0], [7, 0, 0, 0, 0, 0]], np.float32).reshape(2, 1, 6, 1)
    write_tokens(store, np.array([[4, 5], [8, 99]], np.float32).reshape(2, 1, 2, 1), [3, 1], [2, 1])
    rows = store.reshape(2, 6).tolist()
    assert 99 not in rows[0] + rows[1], f"got {rows}: padding (99) was stored, n_new says how many tokens are real"
    assert rows[0][:3] == [1, 2, 3], f"row 0: got {rows[0]}; the tokens that it held were overwritten"
    assert 4 in rows[0], f"row 0: got {rows[0]}; only the last token of the chunk was stored, a prompt needs all"
    assert rows[0] == [1, 2, 3, 4, 5, 0], f"row 0: got {rows[0]}, expected [1, 2, 3, 4, 5, 0]; one slot too late?"
    assert rows[1] == [7, 8, 0, 0, 0, 0], f"row 1: got {rows[1]}, expected [7, 8, 0, ...]; each row has its own length"
    ### BEGIN HIDDEN TESTS
    store = np.zeros((3, 2, 5, 2), np.float32)
    new = np.arange(1, 37, dtype=np.float32).reshape(3, 2, 3, 2)
    write_tokens(store, new, [0, 2, 4], [3, 0, 1])
    assert np.array_equal(store[0, :, :3], new[0]) and not store[0, :, 3:].any(), (
        "row 0: a prompt of 3 tokens, slots 0 to 2")
    assert not store[1].any(), "row 1 brings no token: nothing may be written"
    assert np.array_equal(store[2, :, 4], new[2, :, 0]) and not store[2, :, :4].any(), (
        "row 2: one token, in the last slot")
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_write()

# %% [markdown]
"""
A reader must know which slots hold a token, and at which position. Slots past the end of a short row are *empty*:
position -1. After the write, lengths [5, 2]:

    pos    row 0   0  1  2  3  4
           row 1   0  1 -1 -1 -1

Attention will never ask for a slot's number, only for its position; so a later cache may put tokens anywhere.
"""

# %% nbgrader={"grade": false, "grade_id": "17-slots", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
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
    ### BEGIN SOLUTION
    slots = np.arange(max(lengths))
    return np.where(slots < np.array(lengths)[:, None], slots, -1)
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "17-slots-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_slots():
    """Oracle: the picture."""
    pos = slot_positions([5, 2])
    assert isinstance(pos, np.ndarray), f"got a {type(pos).__name__}, expected an array, as next_positions gives"
    assert pos.shape == (2, 5), f"got shape {pos.shape}, expected (2, 5): as many slots as the longest row has tokens"
    assert pos[0].tolist() == [0, 1, 2, 3, 4], f"row 0: got {pos[0].tolist()}, expected [0, 1, 2, 3, 4]"
    assert pos[1].tolist() == [0, 1, -1, -1, -1], f"row 1: got {pos[1].tolist()}; its last three slots are empty, -1"
    ### BEGIN HIDDEN TESTS
    got = np.asarray(slot_positions([1, 3, 0])).tolist()
    assert got == [[0, -1, -1], [0, 1, 2], [-1, -1, -1]], f"lengths [1, 3, 0]: got {got}; a row may hold nothing"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_slots()

# %% [markdown]
"""
What if a row is full? NumPy will not tell us: `store[0, :, 5:8] = ...` on six slots is a slice of one slot and
an error about shapes that nobody understands, after other rows have been written. So we look first, at *every*
row, and the message says what is needed to act.
"""

# %% nbgrader={"grade": false, "grade_id": "17-room", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def check_room(lengths, n_new, max_seq_len):
    """ValueError when a row has no room for its new tokens; it names max_seq_len, tokens stored, asked for and free."""
    ### BEGIN SOLUTION
    for row, (stored, asked) in enumerate(zip(lengths, n_new)):
        if stored + asked > max_seq_len:
            raise ValueError(
                f"the cache is full: row {row} holds {stored} tokens of max_seq_len={max_seq_len}, {asked} more "
                f"were asked for, {max_seq_len - stored} are free. Make a longer cache, or reset or roll back this one."
            )
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "17-room-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_room():
    """Oracle: counting."""
    message = error_of(lambda: check_room([6, 5], [3, 3], 8))
    assert message, "row 0 holds 6 of 8 tokens and brings 3: got no error, the overflow goes unchecked"
    for number in ("max_seq_len", "8", "6", "3", "2"):
        assert number in message, f"the message must name max_seq_len=8, 6 stored, 3 asked, 2 free; got: {message}"
    assert error_of(lambda: check_room([1, 7], [2, 2], 8)), "row 1 alone is full: got no error; look at every row"
    message = error_of(lambda: check_room([6, 8], [2, 0], 8))
    assert not message, f"6 + 2 tokens fit exactly into 8, got: {message}"
    ### BEGIN HIDDEN TESTS
    assert error_of(lambda: check_room([0], [5], 4)), "a prompt of 5 into an empty cache of 4: got no error"
    assert not error_of(lambda: check_room([0, 0], [4, 4], 4)), "a prompt of 4 into an empty cache of 4 fits exactly"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_room()

# %% [markdown]
"""
## 5. Two steps

A pass brings the same T tokens to every layer, one after the other. When do they count as stored? If layer 0 raised
the length, layer 1 would write one slot too late. And if layer 7 fails, layers 0 to 6 must not keep tokens that
layer 7 never saw. So, like a transaction:

    update(0) update(1) ... update(L-1)     each layer writes behind the committed length: the tokens are pending
    advance()                               all layers have written: now they are stored

A ledger keeps count, and knows no arrays. `claim` lets a layer write, unless it has already written in this pass or
brings other tokens than the layers before it. `commit` adds n_new to the lengths.
"""

# %% nbgrader={"grade": false, "grade_id": "17-ledger", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
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
        ### BEGIN SOLUTION
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
        ### END SOLUTION

    def commit(self):
        """Count what is pending as stored, and close the pass. CacheStateError when nothing is pending."""
        ### BEGIN SOLUTION
        if not self.written:
            raise CacheStateError("advance() with nothing pending: update() every layer first, then advance() once")
        self.lengths = [length + count for length, count in zip(self.lengths, self.n_new)]
        self.close_pass()
        ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "17-ledger-test", "locked": true, "points": 4, "schema_version": 3, "solution": false, "task": false}
def test_unit_ledger():
    """Oracle: a pass written out by hand, two layers, rows that bring 2 and 1 tokens."""
    ledger = CacheLedger(2)
    ledger.claim(0, [2, 1], 2)
    assert ledger.written == {0} and ledger.n_new == [2, 1], (
        f"after claim(0): written {ledger.written}, n_new {ledger.n_new}")
    again = error_of(lambda: ledger.claim(0, [2, 1], 2), CacheStateError)
    assert again, "layer 0 twice in one pass: got no CacheStateError; the second write would overwrite the first"
    other = error_of(lambda: ledger.claim(1, [3, 3], 3), CacheStateError)
    assert other, "layer 0 brought 2 tokens, layer 1 brings 3: got no CacheStateError, the layers disagree"
    other = error_of(lambda: ledger.claim(1, [2, 2], 2), CacheStateError)
    assert other, "layer 0 brought [2, 1] tokens, layer 1 brings [2, 2]: got no CacheStateError; compare n_new too"
    ledger.claim(1, [2, 1], 2)
    assert ledger.lengths == [0, 0], f"before commit: got {ledger.lengths}, expected [0, 0]; pending is not stored"
    ledger.commit()
    assert ledger.lengths == [2, 1], (
        f"after commit: got {ledger.lengths}, expected [2, 1]; each row counts its own n_new")
    assert error_of(ledger.commit, CacheStateError), "a second commit: got no CacheStateError; is the pass still open?"
    ### BEGIN HIDDEN TESTS
    ledger.claim(1, [1, 1], 1)
    ledger.claim(0, [1, 1], 1)
    ledger.commit()
    assert ledger.lengths == [3, 2], f"a second pass of one token: got {ledger.lengths}, expected [3, 2]"
    assert error_of(CacheLedger(1).commit, CacheStateError), "commit on a new ledger: got no CacheStateError"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_ledger()

# %% [markdown]
"""
## 6. The cache

Now the parts come together. Five cells are given; read on at the next hole and come back when you need them.

* *Guards* refuse wrong shapes (NumPy would broadcast a batch of 1 into every row), text, NaN.
* `KVCacheConfig` names the sizes. It counts `num_kv_heads`: shared heads (lesson 12) are stored once.
* `KVStore` owns the memory. `_readable` is the same memory as a view that cannot be written to: what is handed out
  is sliced from it, so reading costs no copy, and nobody changes the cache by accident.
* `CacheDoor` answers questions, and lets a chunk in or refuses it.
* `CacheRows` edits what is stored, with two functions that you build in section 14.
"""

# %%
#| export
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

# %%
#| export
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

# %%
#| export
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

# %%
#| export
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

# %%
#| export
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

# %% [markdown]
"""
The cache itself is one forward pass, and its first two bodies are yours.

`update` is handed valid arrays: `_accept` has refused the rest, and has claimed the layer in the ledger. Write the
keys and the values of *this* layer, `self._store[layer_idx, 0]` and `[layer_idx, 1]`, behind what each row has stored.
Return a `KVView` of stored **and** new tokens, for the newest token must see itself: `self._read(layer_idx, S)` gives
the two Tensors, and `self._slots(lengths)` is `slot_positions`, computed once for all layers of a pass.

`reset` makes the cache as new: no bytes, no lengths, nothing pending. `self._ledger` is the cache's CacheLedger.
"""

# %% nbgrader={"grade": false, "grade_id": "17-cache", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
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
        ### BEGIN SOLUTION
        write_tokens(self._store[layer_idx, 0], key, stored, n_new)
        write_tokens(self._store[layer_idx, 1], value, stored, n_new)
        visible = [length + count for length, count in zip(stored, n_new)]
        return KVView(*self._read(layer_idx, max(visible)), self._slots(visible))
        ### END SOLUTION

    def reset(self):
        """Empty again: no bytes, no lengths, nothing pending."""
        ### BEGIN SOLUTION
        self._store[...] = 0
        self._ledger = CacheLedger(self.batch_size)
        ### END SOLUTION

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

# %% nbgrader={"grade": true, "grade_id": "17-cache-test", "locked": true, "points": 5, "schema_version": 3, "solution": false, "task": false}
def test_unit_cache():
    """Oracle: np.concatenate of what was put in, and the rule that a view shares memory."""
    cache, (k, v), (k2, v2) = KVCache(2, 8, 3, 2, 4), chunk_of(3), chunk_of(1, seed=1)
    for layer in range(3):
        view = cache.update(layer, k + layer, v - layer)
    assert cache.seq_pos == 0, f"before advance: seq_pos is {cache.seq_pos}, expected 0; update must not commit"
    assert view.key.shape == (2, 2, 3, 4), (
        f"view: key {view.key.shape}, expected (2, 2, 3, 4); new tokens see themselves")
    cache.advance()
    view = cache.update(1, k2, v2)
    assert view.key.shape == (2, 2, 4, 4), f"3 stored + 1 new: key {view.key.shape}; the newest token must see itself"
    expected = np.concatenate([k + 1, k2], axis=2)
    assert np.array_equal(view.key.numpy(), expected), "layer 1: these are not its keys; was the layer index ignored?"
    expected = np.concatenate([v - 1, v2], axis=2)
    assert np.array_equal(view.value.numpy(), expected), (
        "layer 1: these are not its values; were they forgotten, or are keys in their place?")
    assert np.array_equal(cache.get(2)[0].numpy(), k + 2), "layer 2 changed when layer 1 was written"
    assert view.pos.tolist() == [[0, 1, 2, 3]] * 2, f"positions: got {view.pos.tolist()}, expected 0 .. 3 in both rows"
    assert np.shares_memory(view.key.numpy(), cache.get(1)[0].numpy()), "the view copies the history at every step"
    cache.reset()
    assert not cache.pending_layers, f"after reset: layers {cache.pending_layers} are still pending; close the pass"
    assert cache.seq_pos == 0 and cache.seq_lens == [0, 0], f"after reset: lengths {cache.seq_lens}, expected [0, 0]"
    cache.update(0, k2, v2)
    cache.advance()
    assert not cache.get(1)[0].numpy().any(), "after reset: layer 1 still reads bytes of before, expected zeros"
    ### BEGIN HIDDEN TESTS
    cache = KVCache(2, 6, 2, 2, 4)
    view = cache.update(0, k, v, n_new=[3, 1])
    assert view.pos.tolist() == [[0, 1, 2], [0, -1, -1]], f"n_new [3, 1]: positions {view.pos.tolist()}"
    cache.update(1, k, v, n_new=[3, 1])
    cache.advance()
    view = cache.update(0, k2, v2)
    assert view.pos.tolist() == [[0, 1, 2, 3], [0, 1, -1, -1]], f"then one token each: positions {view.pos.tolist()}"
    assert np.array_equal(view.key.numpy()[1, :, 1], k2[1, :, 0]), "row 1: its second token is not in slot 1"
    assert cache.seq_lens == [3, 1], f"lengths before advance: {cache.seq_lens}, expected [3, 1]"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_cache()

# %% [markdown]
"""
*Look back: the forgotten advance.* It is the most common mistake with such a cache. What happens without it?
The next pass writes over the tokens of this one, at positions that were taken. The ledger sees it, where nobody
has called `abandon` in between; section 16 shows it in a model, where nothing says a word.
"""

# %% nbgrader={"grade": false, "grade_id": "17-measure-advance", "locked": true, "schema_version": 3, "solution": false, "task": false}
if __name__ == "__main__":
    cache, (k, v) = KVCache(2, 8, 3, 2, 4), chunk_of(3)
    print(cache)
    for layer in range(3):
        cache.update(layer, k, v)
    print("no advance, next token:", error_of(lambda: cache.update(0, k, v)))
    cache.advance()
    print("advance, then one too many:", error_of(cache.advance))
    print(f"stored {cache.seq_lens}, memory {cache.get_memory_usage()}")
    print("nine tokens into eight slots:", error_of(lambda: cache.update(0, *chunk_of(6))))

# %% [markdown]
"""
## 7. Cached attention

Lesson 12 cut attention in three: project, attend, merge. The cache goes between the first and the second:

    without   q, k, v = project(x)                          attend(q, k, v, causal mask)        merge
    with      q, k, v = project(x)   k, v, pos = update     attend(q, k, v, visible)            merge
              x: the T new tokens    S tokens, old and new  q (B,H,T,D) against k (B,H_kv,S,D)

*Predict the shapes.* Four query heads, two key-value heads of D = 8, one row. The cache holds 5 tokens, one new token
comes. What are the shapes of the query, of the key that `update` returns, and of the scores?
"""

# %% nbgrader={"grade": false, "grade_id": "17-predict-shapes", "locked": false, "schema_version": 3, "solution": true, "task": false}
# predicted_query = (..., ..., ..., ...)
# predicted_key = (..., ..., ..., ...)
# predicted_scores = (..., ..., ..., ...)
### BEGIN SOLUTION
predicted_query = (1, 4, 1, 8)
predicted_key = (1, 2, 6, 8)
predicted_scores = (1, 4, 1, 6)
### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "17-predict-shapes-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_predict_shapes():
    """Oracle: lesson 12's projection, your cache, and NumPy's matmul."""
    attention, cache = random_gpt().blocks[0].attention, KVCache(1, 8, 1, 2, 8)
    for count in (5, 1):
        query, new_key, new_value = attention.project(Tensor(np.ones((1, count, 32), np.float32)))
        key = cache.update(0, new_key, new_value).key
        cache.advance()
    scores = np.repeat(key.numpy(), 2, axis=1) @ query.numpy().swapaxes(-1, -2)  # (B, H, S, T)
    expected = (1, 4, 1, scores.shape[2])
    assert tuple(predicted_query) == query.shape, (
        f"query: got {predicted_query}, expected {query.shape}; only new tokens ask")
    assert tuple(predicted_key) == key.shape, (
        f"key: got {predicted_key}, expected {key.shape}: stored heads, old tokens and the new one")
    assert tuple(predicted_scores) == expected, (
        f"scores: got {predicted_scores}, expected {expected}: per query, all keys")


if __name__ == "__main__":
    test_unit_predict_shapes()

# %% [markdown]
"""
A mask of T x T no longer fits, and aligned top-left it would let the first query see one key; but the T queries are
the *last* T tokens. So nobody counts indices: `visible_mask(query positions, key positions)` decides by position
alone, `0 <= key position <= query position`.

    three stored, two new     keys       0 1 2 3 4
                              query 3    x x x x .
                              query 4    x x x x x

A `StandIn` (given) takes the place of a part of the model. Write its forward pass for attention. In training mode it
steps aside: `self.part(x, mask)`, and the cache stays untouched. In eval mode, the second line of the picture, with
`self.positions(x)`, `self.cache.update(self.layer_idx, key, value, self.n_new)`, and `visible_mask(query_pos,
key_pos, self.window, self.cache.sinks)`. `self.project(x, positions)`, `self.attend(query, key, value, visible)`
and `self.merge(mixed)` are the three parts of the attention that it stands for.
"""

# %%
#| export
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

# %% nbgrader={"grade": false, "grade_id": "17-attention", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
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
        ### BEGIN SOLUTION
        if self.training:
            return self.part(x, mask)
        positions = self.positions(x)
        query, key, value = self.project(x, positions)
        key, value, key_pos = self.cache.update(self.layer_idx, key, value, self.n_new)
        visible = visible_mask(positions, key_pos, self.window, self.cache.sinks)
        visible = None if visible.all() else visible  # a mask that hides nothing only costs time
        mixed = self.attend(query, key, value, visible)
        return self.merge(mixed)
        ### END SOLUTION

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

# %%
# The oracles: plain loops, no mask. What cached and uncached attention both got wrong would pass without them.
def slow_attention(query, key, value):
    """Causal attention in plain loops, float64: query (B, H, T, D), key and value (B, H_kv, T, D) -> (B, T, H*D)."""
    batch_size, num_heads, seq_len, head_dim = query.shape
    group = num_heads // key.shape[1]  # query heads per key-value head
    output = np.zeros((batch_size, seq_len, num_heads, head_dim))
    for row in range(batch_size):
        for head in range(num_heads):
            for t in range(seq_len):
                weights = []
                for s in range(t + 1):
                    score = sum(float(a) * float(b) for a, b in zip(query[row, head, t], key[row, head // group, s]))
                    weights.append(np.exp(score / head_dim**0.5))
                for s, weight in enumerate(weights):
                    output[row, t, head] += weight / sum(weights) * value[row, head // group, s]
    return output.reshape(batch_size, seq_len, -1)


def slow_gpt(model, ids):
    """Logits (B, T, V) of a GPT whose attention is `slow_attention`, in float64, from the weights alone."""
    weights = {name: array.astype(np.float64) for name, array in model.state_dict().items()}
    heads, shared, dim = model.num_heads, model.num_kv_heads, model.embed_dim // model.num_heads

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    ids = np.asarray(ids)
    x = weights["token_embedding.weight"][ids] + weights["position_embedding.weight"][: ids.shape[1]]
    for i in range(model.num_layers):
        packed = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attention.qkv_proj")
        packed = packed.reshape(*ids.shape, heads + 2 * shared, dim).swapaxes(1, 2)  # (B, H + 2*H_kv, T, D)
        mixed = slow_attention(packed[:, :heads], packed[:, heads : heads + shared], packed[:, heads + shared :])
        x = x + linear(mixed, f"blocks.{i}.attention.out_proj")
        hidden = gelu(linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.up_proj"))
        x = x + linear(hidden, f"blocks.{i}.mlp.down_proj")
    return norm(x, "norm") @ weights["token_embedding.weight"].T

# %% nbgrader={"grade": true, "grade_id": "17-attention-test", "locked": true, "points": 5, "schema_version": 3, "solution": false, "task": false}
def check_pieces(attention, split, x, expected):
    """The sequence comes in pieces; each token's output must be that of the whole."""
    cache, start, pieces = KVCache(2, 8, 2, 2, 8), 0, []
    for count in split:
        piece = CachedAttention(attention, cache, 1)(x[:, start : start + count]).numpy()
        assert piece.shape == (2, count, 32), (
            f"{count} tokens: got shape {piece.shape}, expected {(2, count, 32)}; was merge forgotten?")
        pieces.append(piece)
        assert cache.seq_pos == start, f"seq_pos is {cache.seq_pos}: the layer must not commit, the model does"
        assert cache.pending_layers == [1], f"layers written: {cache.pending_layers}, expected [1], its layer_idx"
        cache.advance()
        start += count
    got = np.concatenate(pieces, axis=1)
    blind = np.allclose(got[:, 0], attention.out_proj.bias.numpy(), atol=1e-6)  # a mixture of nothing
    assert not blind, "token 0 sees nothing at all: the newest token is hidden from itself"
    wrong = np.flatnonzero(np.abs(got - expected).max(axis=(0, 2)) > 1e-4).tolist()
    assert 0 not in wrong, (
        f"pieces {split}: token 0 may see only itself and saw something else: is the mask's sign right? "
        "Are heads repeated, not tiled?")
    assert not wrong, f"pieces {split}: tokens {wrong} differ from the plain loops; what do they see of the past?"


def test_unit_attention(splits=((3, 2), (1, 1, 1, 1, 1)), seed=0):
    """Oracle: slow_attention over the whole sequence; rows of different length, each on its own."""
    attention = random_gpt(seed=seed).blocks[0].attention
    weight, bias = attention.out_proj.weight.numpy(), attention.out_proj.bias.numpy()

    def expected(x):
        return slow_attention(*(part.numpy() for part in attention.project(x))) @ weight.T + bias

    x = Tensor(np.random.default_rng(seed).standard_normal((2, 5, 32), dtype=np.float32))
    for split in splits:
        check_pieces(attention, split, x, expected(x))
    cache = KVCache(2, 8, 2, 2, 8)
    CachedAttention(attention, cache, 1, n_new=[3, 1])(x[:, :3])
    cache.advance()
    got, alone = CachedAttention(attention, cache, 1)(x[:, 3:4]).numpy(), expected(x[1:, [0, 3]])
    error = np.abs(got[1, 0] - alone[0, 1]).max()
    assert error < 1e-4, f"row 1 holds 1 token, row 0 holds 3: row 1 is off by {error:.2f}. Count positions, not slots"
    cache, told = KVCache(2, 8, 2, 2, 8), []
    cache.observe = lambda layer_idx, weights: told.append((layer_idx, weights.shape))
    CachedAttention(attention, cache, 1)(x)
    assert told == [(1, (2, 4, 5, 5))], "a cache that listens was told nothing: attend with self.attend, not past it"
    attention.window = 2  # as a model of lesson 21 may have
    error = np.abs(CachedAttention(attention, KVCache(2, 8, 2, 2, 8), 1)(x).numpy()[:, 4] - expected(x[:, 3:])[:, 1])
    assert error.max() < 1e-4, "the attention looks back 2 tokens, whatever the cache holds: is the window self.window?"
    cached = CachedAttention(attention, KVCache(2, 8, 2, 2, 8), 1)
    cached.train()
    trained = cached(x).numpy()
    assert not cached.cache.pending_layers, "training mode: the cache was written, expected the plain attention"
    assert np.array_equal(trained, attention(x).numpy()), "training mode: not the output of the plain attention"


if __name__ == "__main__":
    test_unit_attention()

### BEGIN HIDDEN TESTS
if __name__ == "__main__":
    test_unit_attention(splits=((2, 3), (4, 1), (1, 2, 2)), seed=5)
### END HIDDEN TESTS

# %% [markdown]
"""
*Look back.* The scores of one decode step have T = 1 row and S columns. Which lines of
`CachedAttention.forward` still cost more with every token? (Only `attend`: two products of a vector with a matrix.
The projections run on one token, whatever the history.)

## 8. Where a pass begins and ends

At the start of a pass stands the position embedding: given the single token `e` it would add the row for position
0, as if the sentence had just begun. It has to count on from the cache:

    without a cache    a b c d e     positions 0 1 2 3 4
    with a cache               e     positions         4

And at the end, when all layers have written, somebody must call `advance`, once: the norm after the last block.

`CountingPositions`: a new pass begins, so drop what a failed one may have left (`self.cache.abandon()`). Then,
if no positions were given, take `self.positions(x)`, with padding (-1) moved to 0, and let `self.part(x, positions)`
add those rows. `CommittingNorm`: the output of `self.part`, and the commit.
"""

# %% nbgrader={"grade": false, "grade_id": "17-ends", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
class CountingPositions(StandIn):
    """A position embedding that counts on from the cached tokens. A cached forward pass begins here."""

    def forward(self, x, positions=None):
        """x (B, T, E), the new tokens -> (B, T, E) with the rows of their positions added."""
        if self.training:
            return self.part(x, positions)
        ### BEGIN SOLUTION
        self.cache.abandon()
        if positions is None:
            positions = np.maximum(self.positions(x), 0)
        return self.part(x, positions)
        ### END SOLUTION


class CommittingNorm(StandIn):
    """The norm after the last block. A cached forward pass ends here: all layers have written, commit.

    What the model does afterwards (the head) needs no cache. If it fails there, the tokens are stored: rollback(n).
    """

    def forward(self, x):
        if self.training:
            return self.part(x)
        ### BEGIN SOLUTION
        y = self.part(x)
        self.cache.advance()
        return y
        ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "17-ends-test", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
def test_unit_ends():
    """Oracle: the rows of the position table, read off its weight; a ledger counted by hand."""
    model, cache, (k, v) = random_gpt(), KVCache(2, 16, 1, 2, 4), chunk_of(3)
    table, zeros = model.position_embedding.weight.numpy(), Tensor(np.zeros((2, 2, 32), np.float32))
    norm, positions = CommittingNorm(model.norm, cache), CountingPositions(model.position_embedding, cache)
    cache.update(0, k, v, n_new=[3, 1])
    x = Tensor(np.random.default_rng(0).standard_normal((2, 3, 32), dtype=np.float32))
    assert np.array_equal(norm(x).numpy(), model.norm(x).numpy()), "CommittingNorm: not the output of the norm"
    assert cache.seq_lens == [3, 1], f"after the norm: lengths {cache.seq_lens}, expected [3, 1]; advance was forgotten"
    got = positions(zeros).numpy()
    assert got.shape == (2, 2, 32), f"got shape {got.shape}, expected (2, 2, 32)"
    assert not np.array_equal(got[0], table[:2]), "row 0 holds 3 tokens, the next got positions 0, 1: they restart"
    assert np.array_equal(got[0], table[3:5]), "row 0 holds 3 tokens: the next two stand at 3 and 4"
    assert np.array_equal(got[1], table[1:3]), (
        "row 1 holds 1 token: its next two stand at 1 and 2, not where row 0 stands")
    padded = CountingPositions(model.position_embedding, cache, n_new=[2, 1])
    message = error_of(lambda: padded(zeros))
    assert not message, f"row 1 brings 1 token and padding, which stands at -1: move it to 0. Got: {message}"
    ### BEGIN HIDDEN TESTS
    cache.reset()
    got = CountingPositions(model.position_embedding, cache, n_new=[2, 1])(zeros).numpy()
    assert got.shape == (2, 2, 32) and np.array_equal(got[0], table[:2]), "an empty cache begins at position 0"
    for part in (norm, positions):
        part.train()
    norm(x), positions(zeros)
    assert cache.seq_pos == 0, "training mode: the cache was committed"
    model.eval()
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_ends()

# %% [markdown]
"""
## 9. Joining the model

The GPT of lesson 13 knows nothing of caches, and will not be edited. We replace parts, as lesson 15 replaces a
Linear by a quantized one: each stand-in holds the old part, shares its weights, and can be taken out again.

    position_embedding          -> CountingPositions(position_embedding, cache)
    blocks[0].attention         -> CachedAttention(blocks[0].attention, cache, 0)
    blocks[1].attention         -> CachedAttention(blocks[1].attention, cache, 1)
    norm                        -> CommittingNorm(norm, cache)

Two things go wrong in practice: all stand-ins share one attention or one layer number, and a model joined twice
gets stand-ins for stand-ins (`original` helps). The two cells behind the check are given: `attached` puts the parts
in for a block of code, `enable_kv_cache` until further notice (**inference only**); the very same old parts come back.
"""

# %% nbgrader={"grade": false, "grade_id": "17-join", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
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
    ### BEGIN SOLUTION
    return [
        (block, "attention", CachedAttention(original(block.attention), cache, layer_idx, n_new))
        for layer_idx, block in enumerate(model.blocks)
    ]
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "17-join-test", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
def test_unit_join():
    """Oracle: the model's own objects, by identity."""
    model, cache = random_gpt(), KVCache(1, 64, 3, 2, 8)
    attentions = [block.attention for block in model.blocks]
    parts = attention_parts(model, cache, n_new=[2])
    assert len(parts) == 3, f"a model of 3 blocks: got {len(parts)} parts, expected 3"
    for layer, (block, name, part) in enumerate(parts):
        assert block is model.blocks[layer] and name == "attention", (
            f"part {layer} belongs to block {layer}, 'attention'")
        assert part.part is attentions[layer], (
            f"block {layer} got the attention of another block: all the same weights?")
        assert part.layer_idx == layer, f"block {layer} got layer_idx {part.layer_idx}, expected {layer}"
        assert part.cache is cache and part.n_new == [2], f"block {layer}: cache and n_new were not handed on"
    for block, name, part in parts:
        setattr(block, name, part)
    again = attention_parts(model, cache)
    assert again[0][2].part is attentions[0], "joined twice: a stand-in for a stand-in; take the original"
    ### BEGIN HIDDEN TESTS
    deep = random_gpt(num_layers=5)
    numbers = [part.layer_idx for _, _, part in attention_parts(deep, KVCache(1, 64, 5, 2, 8))]
    assert numbers == [0, 1, 2, 3, 4], f"five blocks: got layer numbers {numbers}"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_join()

# %%
#| export
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

# %%
#| export
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

# %% [markdown]
"""
## 10. Proof

Does it compute the same? Two oracles: the model without a cache, and, because both share most of their code,
`slow_gpt` in plain loops. Small differences are rounding: products are summed in another order.
"""

# %% nbgrader={"grade": true, "grade_id": "17-equal-test", "locked": true, "points": 5, "schema_version": 3, "solution": false, "task": false}
def test_unit_equal():
    """Oracles: slow_gpt, the model without a cache, and the counted token rows."""
    model, ids = random_gpt(), np.random.default_rng(1).integers(0, 64, (2, 7))
    names, expected, plain = list(model.state_dict()), slow_gpt(model, ids), model.generate(ids, 6)
    cache = enable_kv_cache(model, batch_size=2)
    got = np.concatenate([model(ids[:, :4]).numpy(), model(ids[:, 4:5]).numpy(), model(ids[:, 5:]).numpy()], axis=1)
    assert got.shape == (2, 7, 64), f"chunks of 4, 1 and 2 tokens: logits {got.shape}, expected (2, 7, 64)"
    error = np.abs(got - expected).max(axis=(0, 2))
    assert error.max() < 1e-3, f"against the plain loops, per position: {error.round(4).tolist()}, expected below 0.001"
    assert cache.seq_lens == [7, 7], f"7 tokens were run: lengths {cache.seq_lens}"
    assert list(model.state_dict()) == names, "the parameters' names changed: a checkpoint would no longer load"
    assert np.array_equal(model.generate(ids, 6), plain), "generate: not the tokens of the run without a cache"
    rows = count_rows(model, lambda: model.generate(ids, 6))
    assert rows == token_rows(7, 6, cached=True), f"generate ran {rows} rows, expected {token_rows(7, 6, cached=True)}"
    disable_kv_cache(model)
    assert model._cache_enabled is False and np.array_equal(model.generate(ids, 6), plain), "disable: not as before"
    ### BEGIN HIDDEN TESTS
    for kv_heads in (1, 4):
        other = random_gpt(num_kv_heads=kv_heads, seed=kv_heads)
        enable_kv_cache(other, batch_size=2)
        got = np.concatenate([other(ids[:, t : t + 1]).numpy() for t in range(7)], axis=1)
        assert np.abs(got - slow_gpt(other, ids)).max() < 1e-3, (
            f"{kv_heads} key-value heads: differs from the plain loops")
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_equal()

# %% [markdown]
"""
*Look back.* What if the *first* token of a sequence changes? (Every later key changes, and the cache is useless:
compare `layer_keys(random_gpt(), np.array([[1, 2, 3]]))` with those of `[[9, 2, 3]]`.) That is why chat programs
keep a fixed system prompt at the front, and never edit it.

## 11. Speed

The work we can count: per token row, two operations for each weight of the blocks, and 4 * E * S in each layer for
scores and mixture over S keys; the head once per new token. If only arithmetic mattered, the ratio of the counts
would be the speed-up.

*Predict:* will the measured speed-up be smaller than the counted one, or larger? For which prompts is the gap widest?
"""

# %%
#| export
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

# %% nbgrader={"grade": false, "grade_id": "17-measure-speed", "locked": true, "schema_version": 3, "solution": false, "task": false}
if __name__ == "__main__":
    for row in analyze_kvcache_speedup():
        rates = f"{row['gflops_without']:.1f} GFLOP/s without, {row['gflops_with']:.1f} with"
        print(f"prompt {row['prompt_len']:>3}: {rates}")

# %% [markdown]
"""
The lower lines explain the gap: with the cache the machine does fewer operations *per second*. A pass over many
tokens multiplies matrices: each weight, once read, serves all rows. A pass over one token multiplies a vector with
matrices: each weight is read for two operations, and the processor waits for memory, and for the calls into NumPy.

So the cost **per token** falls from "all tokens so far, through everything" to "one token, plus reading the cache".
The whole text still costs more than linearly: S grows in `attend`, either way.

*Look back.* When is the cache no gain? (Run `analyze_kvcache_speedup(lengths=(1, 2, 4), max_new_tokens=2)`.)

## 12. Memory

The price grows with layers, key-value heads, batch and length. Both functions below compute it from
`kv_cache_bytes`. *Predict* from section 3: with 8 key-value heads in place of 32, the table shrinks by which factor?
"""

# %%
#| export
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

# %% nbgrader={"grade": false, "grade_id": "17-measure-memory", "locked": true, "schema_version": 3, "solution": false, "task": false}
if __name__ == "__main__":
    analyze_kvcache_memory()
    print()
    print(memory_growth_table())
    print()
    print("The same layers and heads, but 8 key-value heads:")
    print(memory_growth_table(num_kv_heads=8))
    print()
    tracker, config = MemoryTracker(limit_bytes=100_000), KVCacheConfig(2, 64, 2, 16, batch_size=4)
    with KVCache.from_config(config, tracker) as cache:
        print(f"one cache of {cache.nbytes:,} bytes: used {tracker.by_purpose}")
        print("a second one:", error_of(lambda: KVCache.from_config(config, tracker), MemoryError))
    print(f"after the block: used {tracker.by_purpose}, the peak was {tracker.peak:,} bytes")

# %% [markdown]
"""
Sharing heads pays, and an old model can learn it: Ainslie et al. (*GQA*, EMNLP 2023) average the key heads and the
value heads of each group of a trained multi-head model, and train on with 5 % of the original compute. The last
three lines: a server must refuse a cache *before* memory runs out, and lesson 14's tracker counts for it.

*Look back.* Weights are shared by all who are served; a cache belongs to one conversation. How many conversations of
8192 tokens with Llama-3-70B fit into 80 GB? (`80e9 // KNOWN_MODELS["Llama-3-70B"].calculate_size()`.)
"""

# %% [markdown]
"""
Must all of it be allocated at once? `KVCache(..., grow=True)` starts with 16 slots and doubles when a row is full.
Doubling copies everything that is stored, but rarely: each token is copied less than once on average, while a store
that grows by one slot would copy all of it for every token.

*Predict:* 1000 tokens, one at a time. How often does the store grow from 16 slots to 1024? How much more memory is in
use, for the moment of a copy, than the new store alone?
"""

# %% nbgrader={"grade": false, "grade_id": "17-measure-growth", "locked": true, "schema_version": 3, "solution": false, "task": false}
def show_growth(num_tokens=1000, num_layers=4, repeats=3):
    """Bytes and seconds of a cache that grows, beside one that is allocated at once, for `num_tokens` tokens."""
    token = np.ones((1, 4, 1, 32), np.float32)
    for grow in (False, True):
        seconds, stores = [], set()
        for _ in range(repeats):
            tracker = MemoryTracker()
            start = time.perf_counter()
            cache = KVCache(1, 1024, num_layers, 4, 32, grow=grow, tracker=tracker)
            for _ in range(num_tokens):
                for layer_idx in range(num_layers):
                    cache.update(layer_idx, token, token)
                cache.advance()
                stores.add(cache.nbytes)
            seconds.append(time.perf_counter() - start)
        print(f"grow={grow!s:5} {1e6 * min(seconds) / num_tokens:6.1f} us per token, stores of "
              f"{[f'{size:,}' for size in sorted(stores)]} bytes, peak {tracker.peak:,}")


if __name__ == "__main__":
    show_growth()

# %% [markdown]
"""
A short conversation then takes little, and a long one pays a few copies, during which the old store and the new one
are there together. A server that must never wait for a copy allocates at once, or in blocks: lesson 23.
"""

# %% [markdown]
"""
## 13. Prompts and rows of different length

Reading a prompt is called *prefill*: many tokens in one pass. A long prompt is cut in chunks, to bound the memory
of its scores (T x S); the result is the same. In a batch, prompts of different length are padded on the right, and a
chunk holds, of each row, what falls into it:

    n_new = [5, 2], chunk = 3     row 0   a b c | d e .      valid in this chunk   3 | 2
                                  row 1   p q . | . . .                            2 | 0

Write the loop: for each chunk, the valid tokens per row, and one forward pass inside
`with cache.attached_to(model, n_new=valid):`. Collect the logits of every chunk, as Tensors.
"""

# %% nbgrader={"grade": false, "grade_id": "17-prefill", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def run_in_chunks(model, ids, cache, chunk, n_new):
    """Run ids (B, T) into the cache, `chunk` tokens at a time; return the list of the logits of each chunk.

    n_new: array (B,), the valid tokens of each right-padded row.
    """
    logits = []
    ### BEGIN SOLUTION
    for start in range(0, ids.shape[1], chunk):
        piece = ids[:, start : start + chunk]
        valid = np.clip(n_new - start, 0, piece.shape[1])
        with cache.attached_to(model, n_new=valid):
            logits.append(model(piece))
    ### END SOLUTION
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

# %% nbgrader={"grade": true, "grade_id": "17-prefill-test", "locked": true, "points": 4, "schema_version": 3, "solution": false, "task": false}
def test_unit_prefill(lengths=(5, 8, 3), chunks=(None, 1, 3), seed=2):
    """Oracle: slow_gpt on each row alone, without padding."""
    model, rng = random_gpt(seed=seed), np.random.default_rng(seed)
    rows = [rng.integers(1, 64, length) for length in lengths]
    ids = np.zeros((3, 8), int)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = tokens
    for chunk in chunks:
        cache = KVCache(3, 64, 3, 2, 8)
        logits = prefill(model, ids, cache, chunk=chunk, n_new=list(lengths))
        assert logits.shape == (3, 8, 64), (
            f"chunk {chunk}: logits {logits.shape}, expected (3, 8, 64), all chunks together")
        assert cache.seq_lens == list(lengths), (
            f"chunk {chunk}: lengths {cache.seq_lens}, expected {lengths}; n_new per chunk?")
        after = model(np.array([[9], [9], [9]]), cache=cache).numpy()
        for row, tokens in enumerate(rows):
            alone = slow_gpt(model, np.append(tokens, 9)[None])[0]
            error = np.abs(logits.numpy()[row, : len(tokens)] - alone[:-1]).max()
            assert error < 1e-3, f"chunk {chunk}, row {row}: its prompt differs from its own run by {error:.4f}"
            error = np.abs(after[row, 0] - alone[-1]).max()
            assert error < 1e-3, (
                f"chunk {chunk}, row {row}: the token after the prompt differs by {error:.4f}; is it stored?")


if __name__ == "__main__":
    test_unit_prefill()

### BEGIN HIDDEN TESTS
if __name__ == "__main__":
    test_unit_prefill(lengths=(8, 1, 6), chunks=(5, 8), seed=7)
### END HIDDEN TESTS

# %% [markdown]
"""
*Look back.* Padding went through the model too, for nothing. What does it cost to prefill prompts of 5 and 500
tokens as one batch? (`2 * token_rows(500, 1, cached=True)`; 505 of them are real. Lesson 23 packs better.)

## 14. Rollback and reorder

A small model guesses four tokens, the large one accepts two: the other two must go (lesson 24). `truncate` cuts the
lengths; what about the bytes? Our promise: **what is not a token is zero**. So a skipped layer reads zeros, never
the ghost of a forgotten token. To cut [5, 3] to [3, 3] is to clear from `starts` [3, 3] to `stops` [5, 3];
`write_tokens` is the worked sibling:

    row 0   a b c d e .    ->    a b c . . .
    row 1   p q r . . .    ->    p q r . . .

Beam search keeps the best continuations: rows 0 and 2 may both go on from what was row 1. Done row by row, in place,
it fails: with [1, 0, 1], row 0 is overwritten before row 1 has read it.
"""

# %% nbgrader={"grade": false, "grade_id": "17-rows", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def clear_slots(store, starts, stops):
    """Zero the slots start .. stop - 1 of each row, in all layers, keys and values: store (L, 2, B, H, S, D)."""
    ### BEGIN SOLUTION
    for row, (start, stop) in enumerate(zip(starts, stops)):
        store[:, :, row, :, start:stop] = 0
    ### END SOLUTION


def gather_rows(store, rows):
    """Row r becomes what row rows[r] was, in place: store (L, 2, B, H, S, D); a row may be named twice."""
    ### BEGIN SOLUTION
    store[...] = store[:, :, rows]  # indexing by a list copies, so nothing is read after it was overwritten
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "17-rows-test", "locked": true, "points": 5, "schema_version": 3, "solution": false, "task": false}
def check_clear():
    """Oracle: the picture; then a rollback against a cache that never held the forgotten tokens."""
    store = np.ones((2, 2, 2, 1, 6, 1), np.float32)
    clear_slots(store, [3, 3], [5, 3])
    for layer, kind in np.ndindex(2, 2):
        got = store[layer, kind].reshape(2, 6).tolist()
        assert got[0] == [1, 1, 1, 0, 0, 1], (
            f"layer {layer}, row 0: got {got[0]}, expected slots 3 and 4 zero, the rest kept")
        assert got[1] == [1, 1, 1, 1, 1, 1], f"layer {layer}, row 1: got {got[1]}; start = stop forgets nothing"
    cache, twin, (k, v), (k2, v2) = KVCache(2, 8, 2, 2, 4), KVCache(2, 8, 2, 2, 4), chunk_of(5), chunk_of(1, seed=1)
    for layer in range(2):
        cache.update(layer, k, v)
        twin.update(layer, k[:, :, :3], v[:, :, :3])
    cache.advance(), twin.advance()
    cache.rollback(2)
    for each in (cache, twin):
        each.update(0, k2, v2)  # layer 1 is skipped: it must read zeros there
        each.advance()
        assert each.seq_lens == [4, 4], f"lengths {each.seq_lens}, expected [4, 4]"
    assert np.array_equal(cache.get(1)[0].numpy(), twin.get(1)[0].numpy()), (
        "the ghost of a forgotten token is read again")
    ### BEGIN HIDDEN TESTS
    cache.truncate([1, 4])
    assert cache.seq_lens == [1, 4] and not cache.get(0)[0].numpy()[0, :, 1:].any(), (
        "row 0, cut to 1: its other slots are zero")
    assert np.array_equal(cache.get(0)[0].numpy()[1, :, :3], k[1, :, :3]), "row 1 was not cut and must be as before"
    ### END HIDDEN TESTS


def check_gather(rows=(1, 0, 1)):
    """Oracle: a Python list of rows."""
    store = np.arange(2 * 2 * 3 * 1 * 4 * 1, dtype=np.float32).reshape(2, 2, 3, 1, 4, 1)
    before = store.copy()
    gather_rows(store, list(rows))
    assert store.shape == before.shape, f"the store has shape {store.shape}, expected {before.shape}"
    assert not np.array_equal(store, before), "nothing moved: the store itself must change, in place"
    for row, source in enumerate(rows):
        for layer in range(2):
            same = np.array_equal(store[layer, :, row], before[layer, :, source])
            assert same, f"layer {layer}, row {row}: not what row {source} was; was it overwritten before it was read?"


def test_unit_rows():
    """Both functions."""
    check_clear()
    check_gather()
    ### BEGIN HIDDEN TESTS
    check_gather(rows=(2, 2, 0))
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_rows()

# %% [markdown]
"""
And a pass that fails half-way? `abandon` is the same move: clear what is pending. Your `CountingPositions` calls it
when the next pass begins. A check without a hole; one block is broken on purpose.
"""

# %% nbgrader={"grade": true, "grade_id": "17-failed-pass-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_failed_pass():
    """Oracle: slow_gpt on what was stored, after a forward pass whose third block failed."""
    model = random_gpt()
    cache = enable_kv_cache(model)
    model(np.array([[1, 2, 3]]))
    healthy, model.blocks[2].mlp = model.blocks[2].mlp, None
    assert error_of(lambda: model(np.array([[4, 5]])), TypeError), "a block without an MLP ran: got no TypeError"
    assert cache.seq_lens == [3], f"after a failed pass: lengths {cache.seq_lens}, expected [3] as before"
    model.blocks[2].mlp = healthy
    refused = error_of(lambda: model(np.array([[4]])), CacheStateError)
    assert not refused, f"the pass before it failed, and now a healthy one is refused: {refused}"
    assert cache.seq_lens == [4], (
        f"3 stored, 2 in a failed pass, 1 in a healthy one: lengths {cache.seq_lens}, expected [4]")
    error = np.abs(model(np.array([[5]])).numpy()[:, -1] - slow_gpt(model, [[1, 2, 3, 4, 5]])[:, -1]).max()
    assert error < 1e-3, f"after the failed pass the logits differ by {error:.4f}: was something of it kept?"


if __name__ == "__main__":
    test_unit_failed_pass()

# %% [markdown]
"""
## 15. Training mode and gradients

**A cache is for inference only.** Training predicts every position at once: there is nothing to save. Worse, keys out
of the store are plain numbers, through which no gradient flows, and no error says so
(`KVCache(1, 8, 1, 2, 4).get(0)[0].requires_grad`); and after an optimizer step they belong to a model that no longer
exists.

So in `model.train()` an enabled cache is bypassed, `cache=` is an error, and `generate` switches to eval mode and back.
A check without a hole: your parts must keep the promise.
"""

# %% nbgrader={"grade": true, "grade_id": "17-training-test", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
def test_unit_training():
    """Oracle: the same model without a cache, its gradients bit by bit."""
    ids = np.random.default_rng(3).integers(0, 64, (2, 6))

    def gradients(model):
        model.zero_grad()
        logits = model(ids)
        (logits * logits).mean().backward()
        return {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}

    model = random_gpt().train()
    expected = gradients(model)
    cache = enable_kv_cache(model, batch_size=2)
    got = gradients(model)
    assert cache.seq_pos == 0, f"training mode: {cache.seq_pos} tokens were stored, expected 0, the cache is bypassed"
    assert list(got) == list(expected) and len(got) > 10, (
        f"gradients of {len(got)} parameters, expected {len(expected)}")
    for name in expected:
        assert np.array_equal(got[name], expected[name]), f"gradient of {name}: not bit by bit that without a cache"
    message = error_of(lambda: model(ids, cache=KVCache(2, 64, 3, 2, 8)), RuntimeError)
    assert message, "model.train() and an explicit cache=: got no RuntimeError"
    model.generate(ids, 3)
    assert model.training and model.blocks[0].attention.training, "generate must bring the training mode back"


if __name__ == "__main__":
    test_unit_training()

# %% [markdown]
"""
## 16. Common mistakes

Each mistake here replaces one of your functions by a version that looks right, and runs a prompt of 4 tokens and 3
single ones. None raises an error: the model still talks, only not what it should say.

*Predict:* for which of them is the whole prompt still right, and only what is generated wrong?
"""

# %% nbgrader={"grade": false, "grade_id": "17-measure-mistakes", "locked": true, "schema_version": 3, "solution": false, "task": false}
def late(right, store, new, lengths, n_new):
    right(store, new, [length + 1 for length in lengths], n_new)


def hides_newest(right, query_pos, key_pos, *window):
    return right(query_pos, key_pos, *window) & (key_pos[:, None] != query_pos[..., None])


def mask_sign(right, query_pos, key_pos, *window):
    return ~right(query_pos, key_pos, *window)


def top_left(right, query_pos, key_pos, *window):
    return np.tril(np.ones((query_pos.shape[1], key_pos.shape[1]), bool))


def restarting(right, lengths, n_new, seq_len):
    return right([0] * len(lengths), n_new, seq_len)


def forgets_advance(right, *args):
    norm = right(*args)
    norm.forward = lambda x: norm.part(x)
    return norm


def show_mistake(name, wrong):
    """Put `wrong` in the place of one function, run, and say what comes of it."""
    right, model, ids = globals()[name], random_gpt(), np.arange(1, 8)[None]
    globals()[name] = lambda *args: wrong(right, *args)
    try:
        enable_kv_cache(model)
        pieces = [model(piece).numpy() for piece in (ids[:, :4], ids[:, 4:5], ids[:, 5:6], ids[:, 6:])]
        errors = np.abs(np.concatenate(pieces, axis=1) - slow_gpt(model, ids)).max(axis=(0, 2))
        print(f"{wrong.__name__:>15}: largest error of each token's logits {errors.round(1).tolist()}")
    finally:
        globals()[name] = right


if __name__ == "__main__":
    for name, wrong in [("write_tokens", late), ("visible_mask", hides_newest), ("visible_mask", mask_sign),
                        ("visible_mask", top_left), ("next_positions", restarting),
                        ("CommittingNorm", forgets_advance)]:
        show_mistake(name, wrong)

# %% [markdown]
"""
The last three: a test that looks at prompts only never finds them. So section 10 compares in pieces.

## 17. Pictures

First the cache over time: the slots after each pass (`#` prompt, `o` generated, `.` empty), and the bytes in use.
Then how much the newest token of each pass looks at each cached position, head by head, in the last layer. The
staircase is the cache, growing by one.
"""

# %% nbgrader={"grade": false, "grade_id": "17-measure-timeline", "locked": true, "schema_version": 3, "solution": false, "task": false}
def show_cache_over_time(prompts, steps):
    """Prefill ragged prompts, decode some steps, and draw the slots of each row after every pass."""
    model, width = random_gpt(), max(map(len, prompts))
    cache, lengths = KVCache(len(prompts), width + steps, 3, 2, 8), [len(prompt) for prompt in prompts]
    ids = np.array([prompt + [0] * (width - len(prompt)) for prompt in prompts])
    logits = prefill(model, ids, cache, n_new=lengths).numpy()
    token = logits[np.arange(len(prompts)), np.array(lengths) - 1].argmax(-1)
    for step in range(steps + 1):
        for row, (prompt_len, length) in enumerate(zip(lengths, cache.seq_lens)):
            slots = "#" * prompt_len + "o" * (length - prompt_len)
            used = f"{cache.get_memory_usage()['used_bytes']:,} of {cache.nbytes:,} bytes" if row == 0 else ""
            print(f"{'pass ' + str(step) if row == 0 else '':<8} row {row}  {slots:.<{cache.capacity}}  {used}")
        if step < steps:
            token = model(token[:, None], cache=cache).numpy()[:, -1].argmax(-1)


if __name__ == "__main__":
    show_cache_over_time([[1, 2, 3, 4, 5], [6, 7], [8, 9, 10, 11]], steps=4)

# %% nbgrader={"grade": false, "grade_id": "17-measure-weights", "locked": true, "schema_version": 3, "solution": false, "task": false}
def cached_attention_weights(model, ids, layer_idx):
    """Weights (T, H, T) of each newest token over the cached positions, ids (T,) run one by one; NaN: no key yet."""
    from tinytorch.core.attention import attention_weights

    cache, rows = KVCache(1, len(ids), model.num_layers, model.num_kv_heads, model.blocks[0].attention.head_dim), []
    attention, attend = model.blocks[layer_idx].attention, type(model.blocks[layer_idx].attention).attend

    def recording(query, key, value, visible):
        weights = attention_weights(query, key, visible).numpy()[0, :, 0]  # (H, S)
        rows.append(np.pad(weights, ((0, 0), (0, len(ids) - weights.shape[1])), constant_values=np.nan))
        return attend(attention, query, key, value, visible)

    attention.attend = recording
    try:
        for token in ids:
            model(np.array([[token]]), cache=cache)
    finally:
        del attention.attend
    return np.array(rows)


def plot_attention_over_cache(weights):
    """One panel per head: passes downwards, cached positions to the right."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("matplotlib is not installed: head 0 as numbers\n", weights[:, 0].round(2))
        return
    figure, axes = plt.subplots(1, weights.shape[1], figsize=(12, 3), sharey=True, layout="constrained")
    for head, axis in enumerate(axes):
        axis.imshow(weights[:, head], vmin=0, vmax=1, cmap="cividis")
        axis.set(title=f"head {head}", xlabel="position of the key", ylabel="pass" if head == 0 else "")
        axis.set(xticks=range(0, len(weights), 3), yticks=range(0, len(weights), 3))
    plt.show()


if __name__ == "__main__":
    weights = cached_attention_weights(random_gpt(), np.arange(1, 13), layer_idx=2)
    print("each row sums to one:", bool(np.allclose(np.nansum(weights, axis=-1), 1, atol=1e-5)))
    plot_attention_over_cache(weights)

# %% [markdown]
"""
The same as a page with a slider: what each step writes and reads, in which layer and head, on the cache that you
built. `tito explore kv-cache --prompt "..." --out cache.html` writes it for a trained model and your exported package.

*Look back.* With the cache, a step takes a few multiplications more than the one before. How many, and for what?
(`2 * 3 * 32`: each of 3 layers, 32 wide, has one more key to score and one more value to mix.)
"""

# %% nbgrader={"grade": false, "grade_id": "17-measure-explorer", "locked": true, "schema_version": 3, "solution": false, "task": false}
def open_explorer(model, prompt, max_new_tokens=8):
    """Record a generation on a cache of this notebook and show the page; one line where the viewer is missing."""
    try:
        from tinytorch.viewer.cache_explorer import CacheExplorer
    except ImportError as error:
        print(f"no viewer here ({error}); the pictures above show the same")
        return
    sizes = (1, model.max_seq_len, model.num_layers, *stored_heads(model))
    explorer = CacheExplorer.record(model, prompt, max_new_tokens, cache=KVCache(*sizes))
    for number, step in enumerate(explorer.recording["steps"]):
        print(f"step {number}: {step['rows']} rows run, {step['used_bytes']:,} bytes, multiplications "
              f"{step['multiplications']:,}, without a cache {step['multiplications_without']:,}")
    try:
        from IPython.display import display
    except ImportError:
        return
    display(explorer)


if __name__ == "__main__":
    open_explorer(random_gpt(), [1, 2, 3, 4, 5])

# %% [markdown]
"""
## 18. Serving

What a server runs most is small enough to read in one piece: attention for T tokens over a cache that *already
holds them*. First, given, the cache of one layer on its own, the form that most programs begin with. It has no two
steps: it appends.

`attend_last` is yours. Row b holds `lengths[b]` tokens, the T queries are its last T: make the mask from their
positions. `scaled_dot_product_attention(query, key, value, visible)` of lesson 12 shares heads by itself and gives a
Tensor; return its array. Writing the formula out instead? `np.sqrt(8)` is a float64 scalar and makes every score
float64; `8**0.5` does not.
"""

# %%
#| export
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

# %% nbgrader={"grade": false, "grade_id": "17-stateless", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def attend_last(query, cache, lengths):
    """Attention of each row's last T tokens over all that the row holds: (B, H, T, D) -> (B, H, T, D), float32.

    cache: a LayerKVCache, only read. lengths: tokens per row.
    """
    batch_size, seq_len = query.shape[0], query.shape[2]
    key, value = cache.k_cache[:, :, : max(lengths)], cache.v_cache[:, :, : max(lengths)]
    ### BEGIN SOLUTION
    starts = [length - seq_len for length in lengths]
    positions = next_positions(starts, [seq_len] * batch_size, seq_len)
    visible = visible_mask(positions, slot_positions(lengths))
    return scaled_dot_product_attention(query, key, value, visible).numpy()
    ### END SOLUTION


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

# %% nbgrader={"grade": true, "grade_id": "17-stateless-test", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
def test_unit_stateless(seq_len=2, seed=0):
    """Oracle: slow_attention over each row alone, of which the last tokens are compared."""
    rng, lengths = np.random.default_rng(seed), [5, 3]
    w_q, w_o = rng.standard_normal((2, 32, 32), dtype=np.float32) / 5
    x, cache = rng.standard_normal((2, seq_len, 32), dtype=np.float32), LayerKVCache(2, 8, 2, 8)
    cache.update(*rng.standard_normal((2, 2, 2, 5, 8), dtype=np.float32), n_new=lengths)
    before = cache.k_cache.copy()
    got = multi_head_attention_with_cache(x, cache, w_q, None, None, w_o)
    assert got.shape == (2, seq_len, 32), f"got shape {got.shape}, expected {(2, seq_len, 32)}"
    assert got.dtype == np.float32, f"got {got.dtype}, expected float32: a float64 scalar promotes every score"
    assert np.array_equal(cache.k_cache, before) and cache.seq_lens == lengths, "the cache was written; it is only read"
    for row, length in enumerate(lengths):
        query = np.zeros((1, 4, length, 8))
        query[0, :, length - seq_len :] = (x[row] @ w_q).reshape(seq_len, 4, 8).swapaxes(0, 1)
        key, value = cache.get_kv(row)
        expected = slow_attention(query, key[None], value[None])[0, length - seq_len :] @ w_o
        error = np.abs(got[row] - expected).max(axis=-1)
        assert error.max() < 1e-4, (
            f"row {row}, per query: off by {error.round(3).tolist()}. The T queries are the row's last tokens: "
            "is the mask aligned top-left, or are empty slots seen?")


if __name__ == "__main__":
    test_unit_stateless()

### BEGIN HIDDEN TESTS
if __name__ == "__main__":
    test_unit_stateless(seq_len=1, seed=4)
    test_unit_stateless(seq_len=3, seed=5)
### END HIDDEN TESTS

# %%
#| export
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

# %% nbgrader={"grade": false, "grade_id": "17-measure-decoder", "locked": true, "schema_version": 3, "solution": false, "task": false}
if __name__ == "__main__":
    decoder, ids = IncrementalDecoder(32, 4, 2, 32, 50), np.random.default_rng(0).integers(0, 50, (3, 8))
    at_once = decoder.forward_step(ids, decoder._init_caches(3), is_prefill=True)
    caches = decoder._init_caches(3)
    for column in ids.T:
        one_by_one = decoder.forward_step(column, caches)
    print(f"prefill and token by token differ by {np.abs(at_once - one_by_one).max():.1e}, logits {at_once.shape}")

# %% [markdown]
"""
Many conversations at once. *Predict:* sixteen rows in one pass, in place of one. Do prefill and decoding give sixteen
times as many tokens per second, or less? Which of the two gains more?
"""

# %% nbgrader={"grade": false, "grade_id": "17-measure-batch", "locked": true, "schema_version": 3, "solution": false, "task": false}
def show_batches(batch_sizes=(1, 4, 16), prompt_len=32):
    """Prefill and decode several conversations at once: measured tokens per second, and the bytes they hold."""
    model = random_gpt(256, 128, 4, 4, prompt_len + 1, 4)
    print("rows   prefill tokens/s   decode tokens/s   cache bytes")
    for rows in batch_sizes:
        ids, cache = np.ones((rows, prompt_len), int), KVCache(rows, prompt_len + 1, 4, 4, 32)

        def read(ids=ids, cache=cache):
            cache.reset()
            prefill(model, ids, cache)

        def write(ids=ids, cache=cache):
            model(ids[:, :1], cache=cache)
            cache.rollback(1)

        with no_grad():
            reading, writing = measure_latency(read, repeats=3), measure_latency(write, repeats=5)
        print(f"{rows:>4} {rows * prompt_len / reading:>18,.0f} {rows / writing:>17,.0f} {cache.nbytes:>13,}")


if __name__ == "__main__":
    show_batches()

# %% [markdown]
"""
Decoding alone, each weight is read for one row; in a batch it serves all rows, and the throughput grows. Memory
grows with it, and ends it. What serving still lacks, and where the course goes on:

* **Eviction.** A conversation outgrows the memory: keep the newest tokens and the first few, or those that attention
  looks at. Lesson 22 does, and stores keys in 8 or 4 bits. Positions in place of slots make it possible.
* **Paging.** Every row here reserves max_seq_len slots, used or not. Lesson 23 cuts memory into blocks and
  hands them out on demand.
* **Prefix sharing.** A thousand conversations begin with the same instructions. Lesson 23 stores them once.

## 19. The end

The module test runs every check, and then one story from beginning to end: ragged prompts, chunks, beam search's
reorder, a rollback, a full cache, a second model.
"""

# %% nbgrader={"grade": true, "grade_id": "17-module-test", "locked": true, "points": 5, "schema_version": 3, "solution": false, "task": false}
def test_scenario():
    """Oracles: slow_gpt on each row alone, and a second model that must not notice anything."""
    model, other, ids = random_gpt(), random_gpt(seed=1), np.random.default_rng(4).integers(1, 64, (2, 6))
    before = other(ids).numpy()
    cache = KVCache(2, 9, 3, 2, 8)
    prefill(model, ids, cache, chunk=4, n_new=[6, 4])
    model(np.array([[7], [8]]), cache=cache)
    cache.reorder([1, 0])
    cache.rollback([1, 0])
    assert cache.seq_lens == [4, 7], f"reorder and rollback: lengths {cache.seq_lens}, expected [4, 7]"
    got = model(np.array([[9], [9]]), cache=cache).numpy()[:, -1]
    for row, tokens in enumerate([[*ids[1, :4], 9], [*ids[0], 7, 9]]):
        error = np.abs(got[row] - slow_gpt(model, [tokens])[0, -1]).max()
        assert error < 1e-3, f"row {row} differs from its own run by {error:.4f}"
    keys = cache.get(0)[0].numpy()
    assert keys.shape[2] == 8 and not keys[0, :, 5:].any(), "row 0 holds 5 tokens: its other slots must be zero"
    model(np.array([[1], [1]]), cache=cache)
    message = error_of(lambda: model(np.array([[2], [2]]), cache=cache))
    assert "max_seq_len" in message and cache.seq_lens == [6, 9], (
        f"row 1 is full: lengths {cache.seq_lens}, said {message!r}")
    assert np.array_equal(other(ids).numpy(), before), "a second model changed when the first used a cache"
    assert KVCache.from_config(KNOWN_MODELS["GPT-2"]).nbytes == KNOWN_MODELS["GPT-2"].calculate_size(), (
        "predicted bytes")


def test_module():
    """Every check of this lesson, then the story."""
    for check in (
        test_unit_count_rows, test_unit_predict_bytes, test_unit_bytes, test_unit_write, test_unit_slots,
        test_unit_room, test_unit_ledger, test_unit_cache, test_unit_predict_shapes,
        test_unit_attention, test_unit_ends, test_unit_join,
        test_unit_equal, test_unit_prefill, test_unit_rows, test_unit_failed_pass, test_unit_training,
        test_unit_stateless, test_scenario,
    ):
        check()
        print(f"{check.__name__:<26} holds")


if __name__ == "__main__":
    test_module()

# %% [markdown]
"""
**In five lines.** Under a causal mask, keys and values of the past never change, so they are stored once. A
pass is a transaction: every layer updates, then one advance. Attention asks for positions, never for slots. Per
token the work falls from the whole text to one row; memory is the price, 2 * L * H_kv * D numbers per token.
And what is not a token is zero.

**Exercises.** (1) Make `enable_kv_cache(model, dtype=np.float16)` and measure both error and speed. (2) Prefill
in chunks of 1, 8 and 64, measure, and explain the optimum. (3) Store four prompts of one prefix: how many bytes
are double?
"""

# %% [markdown]
"""
**A design note.** Our store reserves max_seq_len slots per row. The authors of vLLM measured what that costs in
serving systems that did the same: between 20.4 % and 38.2 % of the cache memory held the state of tokens, the
rest was reserved or fragmented (Kwon et al., *Efficient Memory Management for Large Language Model Serving with
PagedAttention*, SOSP 2023, section 1 and figure 2). Their answer is paging: blocks, a table per row, and
attention that reads through the table. What we have is faster to read (one slice), simpler, and wasteful.
Lesson 23 builds the other.

**What breaks next.** A conversation longer than max_seq_len. The cache is full and says so, and truncate
forgets the wrong end: the newest. Lesson 22 forgets the oldest.
"""

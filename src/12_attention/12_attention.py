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
#     lesson: "12"
# ---

# %% [markdown]
"""
# Lesson 12: Attention

**We build** multi-head attention: tokens that ask, tokens that answer, and a mask that says who may look at
whom.

**It needs** Tensor (01), softmax (02), Linear and Module (03) and the gradient rules (05).

**It becomes** `tinytorch/core/attention.py`. Lesson 13 stacks it into a GPT; lesson 17 puts a cache in its
middle, which is why we cut it into three named parts: `project`, `attend`, `merge`.

**Time:** about 75 minutes.

| name | meaning |
|---|---|
| B, T, S | batch size, queries (new tokens), keys (all tokens) |
| E, H, D | embedding, heads, numbers per head; E = H * D |
| H_kv | heads of keys and values; H is a multiple of it |
"""

# %%
#| default_exp core.attention
#| export
import math

import numpy as np

from tinytorch.core.activations import sum_along
from tinytorch.core.autograd import gradient
from tinytorch.core.layers import Dropout, Linear, Module
from tinytorch.core.tensor import Tensor, apply

# %%
import time

from tinytorch.core.autograd import no_grad
from tinytorch.core.tensor import manual_seed

# %% [markdown]
"""
## 1. How does a token choose?

A layer so far looks at one token at a time. In *the cat sat because it was tired*, the vector of *it*
should take something from *cat*. The simplest mixture gives every token the average of all of them. Let us
see what that does.
"""

# %%
if __name__ == "__main__":
    tokens = np.array([[1, 0], [0, 1], [4, 4]], np.float32)
    average = np.full((3, 3), 1 / 3, np.float32) @ tokens
    print("every token after averaging:\n", average)

# %% [markdown]
"""
All three rows are the same: nobody chose. To choose, each token sends out three vectors.

* a **query**: what am I looking for?
* a **key**: what do I have to offer?
* a **value**: what do I hand over if I am chosen?

The score of query i for key j is their dot product. By hand, with D = 4 and one query:

    query  [2, 0, 0, 0]
    keys   [1, 0, 0, 0]   [2, 0, 0, 0]   [0, 3, 0, 0]
    query . key        2              4              0
    divided by sqrt(4) 1              2              0

Why divide by sqrt(D)? A dot product of D random numbers of size 1 is about sqrt(D) in size, so with larger
heads the softmax sees larger scores. The next cell measures what that does to the largest weight.
"""

# %% nbgrader={"grade": false, "grade_id": "12-measure-scale", "locked": true, "schema_version": 3, "solution": false, "task": false}
def largest_weight(head_dim, scale):
    """The mean of each row's largest softmax weight, for random queries and 16 random keys."""
    rng = np.random.default_rng(0)
    query, key = rng.standard_normal((2, 16, head_dim))
    scores = query @ key.T * scale
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True)).max(-1).mean()


if __name__ == "__main__":
    for dim in (4, 64, 1024):
        print(f"D = {dim:4}: unscaled {largest_weight(dim, 1):.2f}   scaled {largest_weight(dim, dim ** -0.5):.2f}")

# %% [markdown]
"""
Unscaled, one key takes everything as soon as D is large: the softmax is flat there and hardly any gradient
passes. Scaled, the weights hardly depend on D.

**Predict.** Queries come as (B, H, T, D) = (2, 3, 5, 4), keys as (B, H, S, D) = (2, 3, 7, 4). Which shape
do the scores have?
"""

# %% nbgrader={"grade": false, "grade_id": "12-predict-shape", "locked": false, "schema_version": 3, "solution": true, "task": false}
# predicted_shape = (..., ..., ..., ...)
### BEGIN SOLUTION
predicted_shape = (2, 3, 5, 7)
### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "12-predict-shape-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_predict_shape():
    """NumPy's own matmul says the shape."""
    expected = np.matmul(np.zeros((2, 3, 5, 4)), np.zeros((2, 3, 4, 7))).shape
    assert tuple(predicted_shape) == expected, (
        f"got {tuple(predicted_shape)}, expected {expected}: one number per query and key, and D is summed away"
    )


if __name__ == "__main__":
    test_unit_predict_shape()

# %% [markdown]
"""
**Build.** One product for all queries and keys at once. Scale the query, not the scores: it is the smaller
array. And use `math.sqrt`: it gives a Python float, which leaves float32 as it is; `np.sqrt` of a plain
number is a float64.
"""

# %% nbgrader={"grade": false, "grade_id": "12-scores", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def score_array(query, key):
    """Scaled dot products of every query with every key: (..., T, D), (..., S, D) -> (..., T, S).

    Source: Vaswani et al. 2017, "Attention Is All You Need", equation 1, the inner part.

    >>> score_array(np.array([[2.0, 0, 0, 0]]), np.array([[1.0, 0, 0, 0], [2, 0, 0, 0]]))
    array([[1., 2.]])
    """
    ### BEGIN SOLUTION
    scale = 1 / math.sqrt(query.shape[-1])
    return (query * scale) @ key.swapaxes(-1, -2)
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "12-scores-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_scores():
    """The numbers of the picture, then a loop over queries and keys."""
    query = np.array([[2, 0, 0, 0]], np.float32)
    key = np.array([[1, 0, 0, 0], [2, 0, 0, 0], [0, 3, 0, 0]], np.float32)
    scores = score_array(query, key)
    assert scores.shape == (1, 3), f"got shape {scores.shape}, expected (1, 3): one score per query and key"
    assert np.allclose(scores, [[1, 2, 0]]), (
        f"got {scores}, expected [[1, 2, 0]]; [[2, 4, 0]] is unscaled, [[0.5, 1, 0]] is divided by D, not by its root"
    )
    assert scores.dtype == np.float32, f"got {scores.dtype}, expected float32: is the scale a NumPy number?"
    ### BEGIN HIDDEN TESTS
    rng = np.random.default_rng(1)
    query, key = rng.standard_normal((2, 3, 4, 9)), rng.standard_normal((2, 3, 6, 9))
    expected = [[[[q @ k / 3 for k in key[b, h]] for q in query[b, h]] for h in range(3)] for b in range(2)]
    scores = score_array(query, key)
    assert scores.shape == (2, 3, 4, 6), f"got shape {scores.shape}, expected (2, 3, 4, 6)"
    assert np.allclose(scores, expected), "the scores of several heads are not those of a plain loop"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_scores()

# %% [markdown]
"""
**Look back.** What would the scores be if we swapped query and key? When would it be cheaper to scale the
scores?

## 2. How do we hide a key?

A weight must be exactly 0 for a key that may not be seen, and the other weights must still sum to 1.
Multiplying the *scores* by 0 does not do it: a score of 0 still gets exp(0) = 1. Run it.
"""

# %%
if __name__ == "__main__":
    scores = np.array([1.0, 2.0, 0.0])
    visible = np.array([True, False, True])
    multiplied = np.exp(scores * visible)
    print("scores times mask :", (multiplied / multiplied.sum()).round(4))
    hidden = np.exp(np.where(visible, scores, -np.inf))
    print("hidden is -inf    :", (hidden / hidden.sum()).round(4))

# %% [markdown]
"""
So we add 0 where a key is visible and -inf where it is not, before the softmax: exp(-inf) = 0. By hand:

    scores         [1, 2, 0]
    visible        [yes, no, yes]
    after adding   [1, -inf, 0]
    softmax        [e/(e+1), 0, 1/(e+1)] = [0.7311, 0, 0.2689]

One trap is left: a row that sees **nothing**, such as a row of padding. There the maximum is -inf, and
subtracting it from -inf gives NaN, which spreads to everything after it. We want zeros. Two small steps do
it:

* take the maximum with the lowest finite number as a floor, so that -inf minus it stays -inf;
* divide by at least 1. In a row that sees something, the largest score contributes exp(0) = 1, so its sum
  is never below 1 and only empty rows change.
"""

# %% nbgrader={"grade": false, "grade_id": "12-masked-softmax", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def masked_softmax_array(scores, visible=None):
    """Softmax over the last axis of what is visible: (..., S) -> (..., S); a row that sees nothing is all zeros.

    `visible` is bool and broadcasts to the scores. May overwrite `scores`, which the caller has just computed.

    >>> masked_softmax_array(np.array([1.0, 2.0, 0.0]), np.array([True, False, True])).round(4)
    array([0.7311, 0.    , 0.2689])
    """
    lowest = np.finfo(scores.dtype).min
    ### BEGIN SOLUTION
    if visible is not None:
        scores += np.where(visible, np.float32(0), np.float32(-np.inf))
    scores -= np.maximum.reduce(scores, axis=-1, keepdims=True, initial=lowest)
    np.exp(scores, out=scores)
    scores /= np.maximum(sum_along(scores, -1), 1)
    return scores
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "12-masked-softmax-test", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
def test_unit_masked_softmax():
    """The picture's numbers; an empty row; large scores; no mask at all."""
    scores = np.array([[1, 2, 0], [5, 6, 7]], np.float32)
    visible = np.array([[True, False, True], [False, False, False]])
    weights = masked_softmax_array(scores.copy(), visible)
    assert weights.shape == (2, 3), f"got shape {weights.shape}, expected (2, 3)"
    assert not np.isnan(weights).any(), f"got {weights}: NaN in the row that sees nothing, expected zeros there"
    assert weights[0, 1] == 0, f"the hidden key got weight {weights[0, 1]:.3f}, expected 0: is -inf added before exp?"
    assert np.allclose(weights[0], [0.7311, 0, 0.2689], atol=1e-4), f"got {weights[0]}, expected [0.7311, 0, 0.2689]"
    assert (weights[1] == 0).all(), f"a row that sees nothing got {weights[1]}, expected zeros"
    assert weights.dtype == np.float32, f"got {weights.dtype}, expected float32"
    large = masked_softmax_array(np.array([[1000, 1000]], np.float32))
    assert np.allclose(large, 0.5), f"scores of 1000 gave {large}, expected 0.5: subtract each row's maximum"
    ### BEGIN HIDDEN TESTS
    rng = np.random.default_rng(2)
    scores, visible = rng.standard_normal((2, 3, 4, 6)) - 30, rng.random((4, 6)) < 0.6
    visible[0, 0] = visible[1, 1] = visible[2, 2] = visible[3, 3] = True
    expected = np.exp(scores) * visible
    expected /= expected.sum(-1, keepdims=True)
    weights = masked_softmax_array(scores.copy(), visible)
    assert weights.shape == expected.shape, f"got shape {weights.shape}, expected {expected.shape}"
    assert np.allclose(weights, expected, atol=1e-12), "weights do not match exp(scores) * visible, normalised"
    assert weights.dtype == np.float64, f"float64 scores gave {weights.dtype}"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_masked_softmax()

# %% [markdown]
"""
**Look back.** What would the empty row be with -1e9 in place of -inf? Which of the two would you notice in
training?
"""

# %% [markdown]
"""
## 3. Who may look at whom?

A model that predicts the next token must not look at it. The rule is about **positions**, not about array
indices: a query at position 3 sees keys at positions 0 to 3, wherever those keys happen to lie. Lesson 17
keeps keys in slots, some of them empty; an empty slot has the position -1 and is never visible.

    key positions      0  1  2  3  4  -1
    query at 3         x  x  x  x  .   .
    query at 4         x  x  x  x  x   .
    query at 4, w = 2  .  .  .  x  x   .      window: itself and the one before
    ... and 1 sink     x  .  .  x  x   .      the first position stays visible

**Build.** With a `window`, a key is visible where `query_pos - key_pos < window`, or where `key_pos < sinks`.
"""

# %% nbgrader={"grade": false, "grade_id": "12-visible-mask", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def visible_mask(query_pos, key_pos, window=None, sinks=0):
    """Which keys each query may look at, by position: (T,), (S,) -> (T, S), or (B, T), (B, S) -> (B, T, S); bool.

    A key at -1 is an empty slot. A window of w shows a token itself and the w - 1 before it; the first `sinks` stay.

    >>> visible_mask([3, 4], [0, 1, 2, 3, 4, -1]).astype(int)
    array([[1, 1, 1, 1, 0, 0],
           [1, 1, 1, 1, 1, 0]])
    """
    query_pos = np.asarray(query_pos)[..., :, None]  # (T, 1)
    key_pos = np.asarray(key_pos)[..., None, :]  # (1, S)
    ### BEGIN SOLUTION
    visible = (key_pos >= 0) & (key_pos <= query_pos)
    if window is not None:
        visible &= (query_pos - key_pos < window) | (key_pos < sinks)
    return visible
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "12-visible-mask-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_visible_mask():
    """The rows of the picture, written out."""
    slots = [0, 1, 2, 3, 4, -1]
    mask = visible_mask([3, 4], slots)
    assert mask.shape == (2, 6) and mask.dtype == bool, f"got {mask.dtype} {mask.shape}, expected bool (2, 6)"
    assert mask[0, 3] and mask[1, 4], f"got {mask.astype(int).tolist()}: a token must see itself"
    assert not mask[:, 5].any(), f"got {mask.astype(int).tolist()}: the empty slot (position -1) is visible"
    assert mask.astype(int).tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]], f"got {mask.astype(int).tolist()}"
    near = visible_mask([4], slots, window=2).astype(int).tolist()
    assert near == [[0, 0, 0, 1, 1, 0]], f"window=2 gave {near}, expected itself and one before: [[0, 0, 0, 1, 1, 0]]"
    sink = visible_mask([4], slots, window=2, sinks=1).astype(int).tolist()
    assert sink == [[1, 0, 0, 1, 1, 0]], f"window=2, sinks=1 gave {sink}, expected [[1, 0, 0, 1, 1, 0]]"
    ### BEGIN HIDDEN TESTS
    rng = np.random.default_rng(3)
    query_pos, key_pos = rng.integers(0, 9, (2, 4)), rng.integers(-1, 9, (2, 5))
    mask = visible_mask(query_pos, key_pos, window=3, sinks=2)
    assert mask.shape == (2, 4, 5), f"positions (2, 4) and (2, 5) gave {mask.shape}, expected (2, 4, 5)"
    for b, t, s in np.ndindex(2, 4, 5):
        q, k = query_pos[b, t], key_pos[b, s]
        expected = 0 <= k <= q and (q - k < 3 or k < 2)
        assert mask[b, t, s] == expected, f"query at {q}, key at {k}, window 3, sinks 2: got {mask[b, t, s]}"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_visible_mask()

# %% [markdown]
"""
While a model trains, the T queries and the T keys are the same tokens. While it generates, two new queries
may meet five keys: the queries are then the **last** tokens, so the triangle stands at the bottom right.

**Predict.** How many of the 3 x 5 pairs are visible when 3 queries are the last of 5 keys?
"""

# %% nbgrader={"grade": false, "grade_id": "12-predict-visible", "locked": false, "schema_version": 3, "solution": true, "task": false}
# predicted_visible = ...
### BEGIN SOLUTION
predicted_visible = 3 + 4 + 5
### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "12-predict-visible-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_predict_visible():
    """Counted pair by pair: the queries stand at positions 2, 3 and 4."""
    expected = sum(1 for query in (2, 3, 4) for key in range(5) if key <= query)
    assert predicted_visible == expected, (
        f"got {predicted_visible}, expected {expected}; "
        "6 would be the triangle at the top left, where nobody sees keys 3 and 4"
    )


if __name__ == "__main__":
    test_unit_predict_visible()

# %% [markdown]
"""
**Build** the causal mask from `visible_mask`: which positions do the queries have, which the keys?
"""

# %% nbgrader={"grade": false, "grade_id": "12-causal-mask", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def causal_mask(seq_len, num_keys=None):
    """The mask of a decoder, bool (T, S): the queries are the last of `num_keys` keys (default: all).

    >>> causal_mask(2, 3).astype(int)
    array([[1, 1, 0],
           [1, 1, 1]])
    """
    num_keys = seq_len if num_keys is None else num_keys
    if num_keys < seq_len:
        raise ValueError(f"causal_mask: {seq_len} queries cannot be the last of only {num_keys} keys")
    ### BEGIN SOLUTION
    return visible_mask(np.arange(num_keys - seq_len, num_keys), np.arange(num_keys))
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "12-causal-mask-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_causal_mask():
    """np.tri, whose third argument moves the diagonal."""
    square = causal_mask(3)
    assert square.shape == (3, 3), f"causal_mask(3) has shape {square.shape}, expected (3, 3)"
    assert np.array_equal(square, np.tri(3, dtype=bool)), (
        f"got {square.astype(int).tolist()}, expected a lower triangle: each token sees itself and what is before it"
    )
    wide = causal_mask(2, 5)
    assert wide.shape == (2, 5), f"causal_mask(2, 5) has shape {wide.shape}, expected (2, 5)"
    assert np.array_equal(wide, np.tri(2, 5, 3, dtype=bool)), (
        f"got {wide.astype(int).tolist()}, expected [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]: the queries are the last "
        "keys, so the triangle is at the bottom right"
    )
    ### BEGIN HIDDEN TESTS
    for seq_len, num_keys in [(1, 1), (1, 6), (4, 4), (3, 7)]:
        mask = causal_mask(seq_len, num_keys)
        expected = np.tri(seq_len, num_keys, num_keys - seq_len, dtype=bool)
        assert mask.shape == expected.shape, f"causal_mask({seq_len}, {num_keys}): got shape {mask.shape}"
        assert np.array_equal(mask, expected), f"causal_mask({seq_len}, {num_keys}): not at the bottom right"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_causal_mask()

# %% [markdown]
"""
**Look back.** A single new token needs no mask at all. Why? And what would the top-left mask show it?
"""

# %% [markdown]
"""
## 4. Why several heads, and who shares a key?

One softmax gives one mixture: a token cannot take its verb from one place and its subject from another. So
the E numbers are cut into H heads of D = E / H, and each head attends on its own. A linear layer leaves the
heads of a token side by side; attention wants one matrix (T, D) per head:

    packed (B, T, F)          t0: [q0 q1 k0 v0]     F = (H + 2 * H_kv) * D numbers, here H = 2, H_kv = 1
                              t1: [q0 q1 k0 v0]
    cut    (B, T, F / D, D)   one row of D numbers per head
    turned (B, F / D, T, D)   one matrix (T, D) per head
"""

# %% [markdown]
"""
The cut is a reshape, the turn swaps two axes. A reshape alone to (B, F / D, T, D) has the right shape and
the wrong numbers: it mixes tokens with heads. Here is the way in, with its gradient rule; you write the way
back.
"""

# %%
#| export
def split_heads_array(packed, first, count, head_dim):
    """Heads first .. first + count of a packed projection, as a view: (B, T, F) -> (B, count, T, D)."""
    heads = packed.reshape(*packed.shape[:-1], -1, head_dim)  # (B, T, F / D, D)
    return heads[:, :, first : first + count].swapaxes(1, 2)  # (B, count, T, D)


@gradient(split_heads_array)
def split_heads_rule(grad, output, packed, first, count, head_dim):
    """The gradient goes back to where the heads were cut out; the rest is zero."""
    grad_packed = np.zeros(packed.shape, grad.dtype)
    split_heads_array(grad_packed, first, count, head_dim)[...] = grad
    return (grad_packed,)

# %% nbgrader={"grade": false, "grade_id": "12-merge-heads", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def merge_heads_array(x):
    """Each token's heads side by side again: (B, H, T, D) -> (B, T, H*D).

    >>> merge_heads_array(np.array([[[[1, 2], [3, 4]], [[5, 6], [7, 8]]]])).tolist()
    [[[1, 2, 5, 6], [3, 4, 7, 8]]]
    """
    batch_size, num_heads, seq_len, head_dim = x.shape
    ### BEGIN SOLUTION
    return x.swapaxes(1, 2).reshape(batch_size, seq_len, num_heads * head_dim)
    ### END SOLUTION


@gradient(merge_heads_array)
def merge_heads_rule(grad, output, x):
    """The merge only moves numbers, so the rule moves them back."""
    batch_size, num_heads, seq_len, head_dim = x.shape
    return (grad.reshape(batch_size, seq_len, num_heads, head_dim).swapaxes(1, 2),)

# %% nbgrader={"grade": true, "grade_id": "12-merge-heads-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_merge_heads():
    """Token by token: np.concatenate of its heads."""
    x = np.arange(1 * 2 * 3 * 2).reshape(1, 2, 3, 2)
    merged = merge_heads_array(x)
    assert merged.shape == (1, 3, 4), f"got shape {merged.shape}, expected (B, T, H*D) = (1, 3, 4)"
    expected = np.stack([np.concatenate([x[0, 0, t], x[0, 1, t]]) for t in range(3)])[None]
    assert np.array_equal(merged, expected), (
        f"token 0 got {merged[0, 0]}, expected {expected[0, 0]}: a reshape without swapping axes mixes tokens "
        "and heads"
    )
    ### BEGIN HIDDEN TESTS
    packed = np.random.default_rng(4).standard_normal((2, 5, 12))
    again = merge_heads_array(split_heads_array(packed, 0, 4, 3))
    assert again.shape == packed.shape, f"split and merged again: shape {again.shape}, expected {packed.shape}"
    assert np.array_equal(again, packed), "split and merged again, the numbers have moved: in which order are heads?"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_merge_heads()

# %% [markdown]
"""
**Group-query attention.** Keys and values are what a generating model must remember (lesson 17), so most
recent models let several query heads share one key head. With H = 4 and H_kv = 2, query head h uses key
head h // 2:

    query heads   0  1  2  3
    key heads     0  0  1  1      repeat: right
                  0  1  0  1      tile: right shape, wrong heads

We could repeat the keys. That copies them for every token that we generate. Instead we **fold the
queries**: the G = H / H_kv queries that share a key become G*T rows of one matrix, and the keys are read
where they lie.

    (B, H, T, D) -> (B, H_kv, G*T, D)      (B, 4, 3, D) -> (B, 2, 6, D)
"""

# %% nbgrader={"grade": false, "grade_id": "12-fold-groups", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def fold_groups(x, key):
    """The query heads that share a key head become rows of one matrix: (B, H, T, D) -> (B, H_kv, G*T, D).

    `key` (B, H_kv, S, D) says how many key heads there are; where each query head has its own, x is returned.
    Source: Ainslie et al. 2023, "GQA: Training Generalized Multi-Query Transformer Models".
    """
    if x.shape[:-2] == key.shape[:-2]:
        return x
    batch_size, num_heads, seq_len, width = x.shape
    num_kv_heads = key.shape[1]
    ### BEGIN SOLUTION
    return x.reshape(batch_size, num_kv_heads, num_heads // num_kv_heads * seq_len, width)
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "12-fold-groups-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_fold_groups():
    """The slow way: repeat every key head G times and multiply head by head."""
    rng = np.random.default_rng(5)
    query, key = rng.standard_normal((2, 4, 3, 8)), rng.standard_normal((2, 2, 5, 8))
    folded = fold_groups(query, key)
    assert folded.shape == (2, 2, 6, 8), f"got shape {folded.shape}, expected (B, H_kv, G*T, D) = (2, 2, 6, 8)"
    scores = (folded @ key.swapaxes(-1, -2)).reshape(2, 4, 3, 5)
    repeated = query @ np.repeat(key, 2, axis=1).swapaxes(-1, -2)
    assert not np.array_equal(folded[:, 0, 3:], query[:, 2]), (
        "key head 0 is read by query heads 0 and 2 (that is tile), expected 0 and 1 (repeat)"
    )
    assert np.allclose(scores, repeated), "scores differ from those with each key head repeated: rows are mixed up"
    ### BEGIN HIDDEN TESTS
    query, key = rng.standard_normal((1, 6, 2, 4)), rng.standard_normal((1, 1, 3, 4))
    folded = fold_groups(query, key)
    assert folded.shape == (1, 1, 12, 4), f"one key head for all: got shape {folded.shape}, expected (1, 1, 12, 4)"
    assert np.array_equal(folded[0, 0, 2:4], query[0, 1]), "with one key head, rows 2 and 3 must be query head 1"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_fold_groups()

# %% [markdown]
"""
## 5. Two operations with gradients

Now the parts meet. Attention becomes two operations: the **weights** (scores, mask, softmax), and the
**mixture** of the values by those weights. Each is one operation with one rule, not six: fewer arrays are
kept for backward.

The mixture is a matrix product, so its rule is the one of lesson 05 with the groups folded. Read it before
you write the other one.
"""

# %%
#| export
def mix_values_array(weights, value):
    """Weighted sums of the values: (B, H, T, S), (B, H_kv, S, D) -> (B, H, T, D)."""
    mixed = fold_groups(weights, value) @ value
    return mixed.reshape(*weights.shape[:-1], value.shape[-1])


@gradient(mix_values_array)
def mix_values_rule(grad, output, weights, value):
    """For C = A @ B: dA = dC @ B.T and dB = A.T @ dC. The fold sums over the heads that share a value by itself."""
    grad = fold_groups(grad, value)
    grad_weights = (grad @ value.swapaxes(-1, -2)).reshape(weights.shape)
    grad_value = fold_groups(weights, value).swapaxes(-1, -2) @ grad
    return grad_weights, grad_value

# %% [markdown]
"""
Here are the weights as one operation, out of the parts that you built.
"""

# %%
#| export
def attention_weights_array(query, key, visible=None):
    """softmax(query @ key.T / sqrt(D)) over what is visible: (B, H, T, D), (B, H_kv, S, D) -> (B, H, T, S)."""
    scores = score_array(fold_groups(query, key), key)
    return masked_softmax_array(scores.reshape(*query.shape[:-1], key.shape[-2]), visible)

# %% [markdown]
"""
Its rule goes backwards through two steps. With w the weights of a row and g the gradient that arrives at
them:

    through the softmax    grad_scores = w * (g - sum(g * w))          per row
    through the product    grad_query  = grad_scores @ key   / sqrt(D)
                           grad_key    = grad_scores.T @ query / sqrt(D)

By hand: w = [0.5, 0.5], g = [1, 0]. The sum is 0.5, so grad_scores = [0.25, -0.25]: more of the first key,
less of the second, and nothing in total, because a softmax does not change when all its scores grow by the
same amount.

Hidden keys need no extra care: their weight is 0, and so is their gradient.
"""

# %% nbgrader={"grade": false, "grade_id": "12-weights-rule", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
@gradient(attention_weights_array)
def attention_weights_rule(grad, weights, query, key, visible=None):
    """Gradients of query (B, H, T, D) and key (B, H_kv, S, D); `weights` is what the operation returned."""
    scale = 1 / math.sqrt(query.shape[-1])
    row_sums = np.vecdot(grad, weights)[..., None]  # sum(g * w) of each row, (B, H, T, 1)
    ### BEGIN SOLUTION
    grad_scores = grad - row_sums
    grad_scores *= weights
    grad_scores *= scale
    grad_scores = fold_groups(grad_scores, key)  # (B, H_kv, G*T, S)
    grad_query = (grad_scores @ key).reshape(query.shape)
    grad_key = grad_scores.swapaxes(-1, -2) @ fold_groups(query, key)
    return grad_query, grad_key
    ### END SOLUTION

# %%
def numeric_gradient(function, x, eps=1e-6):
    """d function(x) / dx by central differences, entry by entry."""
    result = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[index] += eps
        down[index] -= eps
        result[index] = (function(up) - function(down)) / (2 * eps)
    return result

# %% nbgrader={"grade": true, "grade_id": "12-weights-rule-test", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
def check_weights_rule(query, key, visible):
    """attention_weights_rule against central differences in float64."""
    grad = np.random.default_rng(6).standard_normal((*query.shape[:-1], key.shape[-2]))
    def loss(q, k):
        return (grad * attention_weights_array(q, k, visible)).sum()

    got = attention_weights_rule(grad, attention_weights_array(query, key, visible), query, key, visible=visible)
    expected = numeric_gradient(lambda q: loss(q, key), query), numeric_gradient(lambda k: loss(query, k), key)
    for name, g, e, x in zip(("query", "key"), got, expected, (query, key)):
        assert g.shape == x.shape, f"grad of {name} has shape {g.shape}, expected {x.shape}"
        ratio = np.sum(g * e) / np.sum(e * e)
        assert abs(ratio - 1) < 1e-4 or not np.allclose(g, ratio * e, atol=1e-6), (
            f"grad of {name} is {ratio:.3f} times too large in every entry: the scale 1 / sqrt(D) belongs in once"
        )
        assert np.allclose(g, e, atol=1e-6), (
            f"grad of {name}: got {g.ravel()[0]:.5f}, expected {e.ravel()[0]:.5f} (first entry). Is sum(g * w) "
            "subtracted, and the difference multiplied by the weights?"
        )


def test_unit_weights_rule():
    """Central differences in float64, with a mask and with shared keys."""
    rng = np.random.default_rng(7)
    check_weights_rule(rng.standard_normal((1, 2, 3, 4)), rng.standard_normal((1, 2, 3, 4)), causal_mask(3))
    check_weights_rule(rng.standard_normal((1, 4, 2, 3)), rng.standard_normal((1, 2, 5, 3)), None)
    ### BEGIN HIDDEN TESTS
    empty_row = np.array([[False, False, False], [True, True, False]])
    check_weights_rule(rng.standard_normal((2, 2, 2, 5)), rng.standard_normal((2, 1, 3, 5)), empty_row)
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_weights_rule()

# %% [markdown]
"""
Between a student's Tensor and an array operation stands a door that says what does not fit, in the words of
this lesson. A mask is bool, as in PyTorch: True means *may look*.
"""

# %%
#| export
def check_shapes(query, key, value):
    """Raise a ValueError that says which of query, key and value does not fit."""
    q, k, v = query.shape, key.shape, value.shape
    if not len(q) == len(k) == len(v) or len(q) < 2:
        raise ValueError(f"attention: query, key and value need the same number of axes, got {q}, {k} and {v}")
    if q[-1] != k[-1]:
        raise ValueError(f"attention: query has head_dim {q[-1]} and key {k[-1]}; they must be equal ({q}, {k})")
    if k[:-1] != v[:-1]:
        raise ValueError(f"attention: every key needs one value, got keys {k} and values {v}")
    if q[:-2] != k[:-2] and not (len(q) == 4 and q[0] == k[0] and q[1] % k[1] == 0):
        raise ValueError(
            f"attention: query {q} and key {k} need the same batch size, and the query heads must be a multiple "
            "of the key heads"
        )

# %%
#| export
def as_visible(mask, scores_shape):
    """A mask as a bool array that broadcasts to scores (B, H, T, S); (B, T, S) gets a head axis; None stays."""
    if mask is None:
        return None
    visible = np.asarray(mask)
    if visible.dtype != bool:
        raise ValueError(f"attention: a mask is bool, True = may look; got {visible.dtype}. Try mask == 1.")
    if visible.ndim == 3 and len(scores_shape) == 4:
        visible = visible[:, None]
    fits = all(m in (1, n) for m, n in zip(visible.shape[::-1], scores_shape[::-1]))
    if not fits or visible.ndim > len(scores_shape):
        raise ValueError(f"attention: a mask of shape {np.shape(mask)} does not fit scores of shape {scores_shape}")
    return visible

# %%
#| export
def attention_weights(query, key, mask=None):
    """How much each query looks at each key: (B, H, T, S), rows sum to 1, or to 0 where nothing is visible."""
    visible = as_visible(mask, (*query.shape[:-1], key.shape[-2]))
    return apply(attention_weights_array, query, key, visible=visible)


def scaled_dot_product_attention(query, key, value, mask=None):
    """softmax(query @ key.T / sqrt(D)) @ value: (B, H, T, D), (B, H_kv, S, D) twice -> (B, H, T, D).

    mask: bool, True = may look; (T, S), (B, T, S) or (B, H or 1, T, S). PyTorch's name; there it is `attn_mask`.
    """
    check_shapes(query, key, value)
    return apply(mix_values_array, attention_weights(query, key, mask), value)

# %% [markdown]
"""
The smallest example, with gradients: one query, the three keys of section 1, and a value for each.
"""

# %%
if __name__ == "__main__":
    query = Tensor([[2.0, 0, 0, 0]], requires_grad=True)
    key = Tensor([[1.0, 0, 0, 0], [2, 0, 0, 0], [0, 3, 0, 0]])
    value = Tensor([[10.0, 0], [0, 10], [5, 5]])
    print("weights", attention_weights(query, key).numpy().round(4))
    mixed = scaled_dot_product_attention(query, key, value)
    mixed[0, 1].backward()
    print("mixture", mixed.numpy().round(3))
    print("to get more of the second number, move the query by", query.grad.numpy().round(3))

# %% [markdown]
"""
## 6. The module: project, attend, merge

One linear layer makes queries, keys and values at once, in one product. The three parts have names of their
own, because lesson 17 will put something between the first and the second.

    x (B, T, E) --project--> query (B, H, T, D), key and value (B, H_kv, T, D)
                --attend---> (B, H, T, D)
                --merge----> (B, T, E)

The packed projection holds H query heads, then H_kv key heads, then H_kv value heads.

**Predict.** E = 16, H = 4, H_kv = 2, so D = 4. Which shape has `qkv_proj.weight`? PyTorch's order is (out,
in).
"""

# %% nbgrader={"grade": false, "grade_id": "12-predict-weight", "locked": false, "schema_version": 3, "solution": true, "task": false}
# predicted_weight_shape = (..., ...)
### BEGIN SOLUTION
predicted_weight_shape = ((4 + 2 * 2) * 4, 16)
### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "12-predict-weight-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_predict_weight():
    """Counted head by head: one row of the weight for every number of every head."""
    rows = len([number for head in ["query"] * 4 + ["key"] * 2 + ["value"] * 2 for number in range(4)])
    assert tuple(predicted_weight_shape) == (rows, 16), (
        f"got {tuple(predicted_weight_shape)}, expected {(rows, 16)}: H + 2 * H_kv heads of D rows, and E columns; "
        "3 * E rows is right only when every query head has its own key"
    )


if __name__ == "__main__":
    test_unit_predict_weight()

# %%
#| export
def head_sizes(embed_dim, num_heads, num_kv_heads=None):
    """(num_kv_heads, head_dim), or a ValueError that says which number does not divide which."""
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    if num_heads < 1 or embed_dim % num_heads:
        raise ValueError(f"embed_dim ({embed_dim}) must be a multiple of num_heads ({num_heads})")
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"num_heads ({num_heads}) must be a multiple of num_kv_heads ({num_kv_heads})")
    return num_kv_heads, embed_dim // num_heads

# %% [markdown]
"""
**Build** two places in the class: the key and value heads in `project` (the query stands above them as the
example), and `forward`. Everything else is given. `visible` decides the mask: with `causal=True` a token
sees itself and what is before it, and a mask that is given hides more.
"""

# %% nbgrader={"grade": false, "grade_id": "12-multi-head", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
class MultiHeadAttention(Module):
    """Attention over H heads: x (B, T, E) -> (B, T, E), in the three parts project, attend and merge."""

    def __init__(self, embed_dim, num_heads, num_kv_heads=None, causal=False, bias=True, dropout=0.0, rng=None):
        self.embed_dim, self.num_heads, self.causal = embed_dim, num_heads, causal
        self.num_kv_heads, self.head_dim = head_sizes(embed_dim, num_heads, num_kv_heads)
        packed_heads = num_heads + 2 * self.num_kv_heads
        self.qkv_proj = Linear(embed_dim, packed_heads * self.head_dim, bias=bias, rng=rng)
        self.out_proj = Linear(embed_dim, embed_dim, bias=bias, rng=rng)
        self.dropout = Dropout(dropout, rng=rng)

    def project(self, x):
        """x (B, T, E) -> query (B, H, T, D), key and value (B, H_kv, T, D)."""
        packed = self.qkv_proj(x)  # (B, T, (H + 2*H_kv) * D)
        H, H_kv, D = self.num_heads, self.num_kv_heads, self.head_dim
        query = apply(split_heads_array, packed, first=0, count=H, head_dim=D)
        ### BEGIN SOLUTION
        key = apply(split_heads_array, packed, first=H, count=H_kv, head_dim=D)
        value = apply(split_heads_array, packed, first=H + H_kv, count=H_kv, head_dim=D)
        ### END SOLUTION
        return query, key, value

    def attend(self, query, key, value, visible=None):
        """Each query's mixture of the values that it may look at: (B, H, T, D)."""
        check_shapes(query, key, value)
        weights = self.dropout(attention_weights(query, key, visible))
        return apply(mix_values_array, weights, value)

    def merge(self, mixed):
        """The heads side by side, through the output projection: (B, H, T, D) -> (B, T, E)."""
        return self.out_proj(apply(merge_heads_array, mixed))

    def visible(self, seq_len, mask=None):
        """The mask of a forward pass over seq_len tokens: `mask`, and causal if we are; None: all is visible."""
        if not self.causal or (seq_len == 1 and mask is None):
            return mask
        return causal_mask(seq_len) if mask is None else causal_mask(seq_len) & mask

    def forward(self, x, mask=None):
        """x (B, T, E), mask as in scaled_dot_product_attention -> (B, T, E)."""
        if x.ndim != 3 or x.shape[-1] != self.embed_dim:
            raise ValueError(f"MultiHeadAttention needs x of shape (B, T, {self.embed_dim}), got {x.shape}")
        batch_size, seq_len, _ = x.shape
        visible = self.visible(seq_len, as_visible(mask, (batch_size, self.num_heads, seq_len, seq_len)))
        ### BEGIN SOLUTION
        query, key, value = self.project(x)
        return self.merge(self.attend(query, key, value, visible))
        ### END SOLUTION

# %%
def attention_in_loops(module, x):
    """Causal multi-head attention, one query and one head at a time, from the module's weights alone."""
    H, H_kv, D = module.num_heads, module.num_kv_heads, module.head_dim
    packed = x @ module.qkv_proj.weight.numpy().T + module.qkv_proj.bias.numpy()
    heads = np.zeros_like(x)
    for b, t, h in np.ndindex(*x.shape[:2], H):
        row = packed[b].reshape(x.shape[1], H + 2 * H_kv, D)
        shared = h // (H // H_kv)
        scores = [row[t, h] @ row[s, H + shared] / math.sqrt(D) for s in range(t + 1)]
        weights = np.exp(scores) / np.sum(np.exp(scores))
        heads[b, t, h * D : (h + 1) * D] = sum(w * row[s, H + H_kv + shared] for s, w in enumerate(weights))
    return heads @ module.out_proj.weight.numpy().T + module.out_proj.bias.numpy()

# %% nbgrader={"grade": true, "grade_id": "12-multi-head-test", "locked": true, "points": 4, "schema_version": 3, "solution": false, "task": false}
def test_unit_multi_head():
    """Plain loops over tokens and heads, with as many key heads as queries, and with shared ones."""
    rng = np.random.default_rng(8)
    x = rng.standard_normal((2, 5, 16)).astype(np.float32)
    for num_kv_heads in (4, 2, 1):
        module = MultiHeadAttention(16, 4, num_kv_heads, causal=True, rng=rng)
        y = module(Tensor(x)).numpy()
        assert y.shape == (2, 5, 16), f"got shape {y.shape}, expected (2, 5, 16)"
        assert y.dtype == np.float32, f"got {y.dtype}, expected float32"
        expected = attention_in_loops(module, x)
        assert np.allclose(y[:, -1], expected[:, -1], atol=1e-5), (
            f"num_kv_heads={num_kv_heads}: the last token differs from plain loops: key heads start at H, value "
            "heads at H + H_kv, and the mixture goes through merge"
        )
        assert np.allclose(y, expected, atol=1e-5), (
            f"num_kv_heads={num_kv_heads}: the last token is right and earlier ones are not: they look at later "
            "tokens, so visible did not reach attend"
        )
    ### BEGIN HIDDEN TESTS
    module = MultiHeadAttention(12, 6, 3, causal=True, rng=rng)
    x = rng.standard_normal((1, 4, 12)).astype(np.float32)
    y = module(Tensor(x))
    assert y.shape == (1, 4, 12), f"got shape {y.shape}, expected (1, 4, 12)"
    expected = attention_in_loops(module, x)
    assert np.allclose(y.numpy(), expected, atol=1e-5), "6 heads over 3 key heads: not as plain loops"
    y.sum().backward()
    assert all(p.grad is not None for p in module.parameters()), "a parameter got no gradient"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_multi_head()

# %% [markdown]
"""
## 7. What does it cost?

The weights are one number for every query and key. **Predict** the bytes of the attention weights of one
layer of a model of GPT-2's shape: batch 1, 12 heads, 1024 tokens, float32.
"""

# %% nbgrader={"grade": false, "grade_id": "12-predict-bytes", "locked": false, "schema_version": 3, "solution": true, "task": false}
# predicted_bytes = ...
### BEGIN SOLUTION
predicted_bytes = 12 * 1024 * 1024 * 4
### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "12-predict-bytes-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_predict_bytes():
    """nbytes of an array of that shape (np.empty asks for the memory and does not touch it)."""
    expected = np.empty((1, 12, 1024, 1024), np.float32).nbytes
    assert predicted_bytes == expected, (
        f"got {predicted_bytes}, expected {expected}: heads x queries x keys x 4 bytes; D does not appear in it"
    )


if __name__ == "__main__":
    test_unit_predict_bytes()

# %% [markdown]
"""
Twice as many tokens are four times as many weights. Is the time four times as long, too? Measure.
"""

# %% nbgrader={"grade": false, "grade_id": "12-measure-length", "locked": true, "schema_version": 3, "solution": false, "task": false}
def measure_length(lengths=(64, 128, 256, 512), repeats=5):
    """Milliseconds of project + merge and of attend, and the bytes of the weights, over the number of tokens."""
    module = MultiHeadAttention(128, 4, causal=True).eval()
    print("tokens   project+merge ms   attend ms   weights MiB")
    for seq_len in lengths:
        x = Tensor(np.random.default_rng(0).standard_normal((1, seq_len, 128), dtype=np.float32))
        linear, attend = [], []
        with no_grad():
            for _ in range(repeats):
                start = time.perf_counter()
                query, key, value = module.project(x)
                middle = time.perf_counter()
                mixed = module.attend(query, key, value, module.visible(seq_len))
                end = time.perf_counter()
                module.merge(mixed)
                linear.append(middle - start + time.perf_counter() - end)
                attend.append(end - middle)
        mib = 4 * seq_len * seq_len * 4 / 2**20
        print(f"{seq_len:6} {min(linear) * 1e3:18.2f} {min(attend) * 1e3:11.2f} {mib:13.2f}")


if __name__ == "__main__":
    manual_seed(0)
    measure_length()

# %% [markdown]
"""
Compare the two columns from row to row: the projections grow with the tokens, `attend` with their square.

And a picture of what a head looks at, without a plotting library: one row per query, darker where it looks
more.
"""

# %% nbgrader={"grade": false, "grade_id": "12-measure-picture", "locked": true, "schema_version": 3, "solution": false, "task": false}
def show_weights(text, weights, shades=" .:-=+*#%@"):
    """Print a (T, S) matrix of weights, one row per query."""
    print("    " + text)
    for letter, row in zip(text, weights):
        print(f"  {letter} " + "".join(shades[round(float(w) * (len(shades) - 1))] for w in row))


if __name__ == "__main__":
    text = "the cat sat on the mat"
    letters = Tensor(6 * np.eye(128, dtype=np.float32)[[ord(letter) for letter in text]])  # equal letters match
    print("causal: each letter looks at itself and at its earlier copies")
    show_weights(text, attention_weights(letters, letters, causal_mask(len(text))).numpy())
    print("the same with a window of 6 and 1 sink")
    near = visible_mask(np.arange(len(text)), np.arange(len(text)), window=6, sinks=1)
    show_weights(text, attention_weights(letters, letters, near).numpy())

# %% [markdown]
"""
## 8. The module test

Every check again, and one scenario: attention must be able to **learn to look**. Each sequence holds one
marked token; the task is to report, at the last position, the number that the marked token carries. An
average cannot do it.
"""

# %%
def learn_to_look(steps=150):
    """Train one attention layer by plain gradient descent; the first and the last loss."""
    rng = np.random.default_rng(0)
    module, losses = MultiHeadAttention(8, 2, causal=True, rng=rng), []
    for _ in range(steps):
        x = np.zeros((32, 6, 8), np.float32)
        x[..., 0] = rng.standard_normal((32, 6))  # the number that each token carries
        marked = rng.integers(0, 6, 32)
        x[np.arange(32), marked, 1] = 3  # the mark
        x[:, -1, 2] = 3  # the last token knows that it is asked
        error = module(Tensor(x))[:, -1, 0] - x[np.arange(32), marked, 0]
        loss = (error * error).mean()
        module.zero_grad()
        loss.backward()
        for parameter in module.parameters():
            parameter.data -= 0.2 * parameter.grad.data
        losses.append(loss.item())
    return np.mean(losses[:10]), np.mean(losses[-10:])

# %% nbgrader={"grade": true, "grade_id": "12-module-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_module():
    """Every check of the lesson, and a layer that learns where to look."""
    for check in (
        test_unit_predict_shape, test_unit_scores, test_unit_masked_softmax, test_unit_visible_mask,
        test_unit_predict_visible, test_unit_causal_mask, test_unit_merge_heads, test_unit_fold_groups,
        test_unit_weights_rule, test_unit_predict_weight, test_unit_multi_head, test_unit_predict_bytes,
    ):
        check()
    first, last = learn_to_look()
    assert last < 0.25 * first, f"the loss went from {first:.3f} to {last:.3f}, expected less than a quarter"
    print(f"all checks pass; the layer learned to look: loss {first:.3f} -> {last:.3f}")


if __name__ == "__main__":
    test_module()

# %% [markdown]
"""
## Summary

* A score is a scaled dot product of a query and a key; a softmax makes weights of the scores; the weights
  mix the values.
* A mask adds -inf before the softmax. Visibility is a question of positions; a row that sees nothing gives
  zeros.
* Heads attend separately. With group-query attention several query heads read one key head: fold queries,
  do not copy keys.
* Two operations with one rule each carry all gradients. The module is `project`, `attend`, `merge`.
* Time and memory of `attend` grow with the square of the tokens.

## Exercises

1. Set `causal=False` in the module test. Does the layer still learn? Should it?
2. Remove the scale from `score_array` and from its rule and train with D = 256. How many more steps does it
   take?
3. Write a mask for two sentences packed into one row, so that neither sees the other. Which positions would
   you give them?
"""

# %% [markdown]
"""
## Design note: keep the weights, or compute them again?

For the backward pass we keep the weights, (B, H, T, S) numbers for each layer. FlashAttention (Dao et al.
2022, arXiv:2205.14135, section 3.1) keeps two numbers per row and computes the weights again, block by
block in fast memory. It does more arithmetic and is faster on a GPU, because there the traffic to memory is
the bottleneck. Group-query attention (Ainslie et al. 2023, arXiv:2305.13245) attacks the same traffic from
the other side: fewer keys and values to read.

**Next:** attention alone cannot think about what it found, and stacked many times it does not train. Lesson
13 adds a norm, an MLP and a residual path, and makes a GPT.
"""

"""Attention: project, attend, merge: multi-head attention in three parts.

Lesson 12_attention. Built from src/12_attention/12_attention.py by `tito dev build`: change it there, not here.
"""

__all__ = [
    "score_array",
    "masked_softmax_array",
    "visible_mask",
    "causal_mask",
    "split_heads_array",
    "split_heads_rule",
    "merge_heads_array",
    "merge_heads_rule",
    "fold_groups",
    "mix_values_array",
    "mix_values_rule",
    "attention_weights_array",
    "attention_weights_rule",
    "check_shapes",
    "as_visible",
    "attention_weights",
    "scaled_dot_product_attention",
    "head_sizes",
    "MultiHeadAttention",
]


# %% cell 2
import math

import numpy as np

from tinytorch.core.activations import sum_along
from tinytorch.core.autograd import gradient
from tinytorch.core.layers import Dropout, Linear, Module
from tinytorch.core.tensor import Tensor, apply


# %% cell 12 (12-scores)
def score_array(query, key):
    """Scaled dot products of every query with every key: (..., T, D), (..., S, D) -> (..., T, S).

    Source: Vaswani et al. 2017, "Attention Is All You Need", equation 1, the inner part.

    >>> score_array(np.array([[2.0, 0, 0, 0]]), np.array([[1.0, 0, 0, 0], [2, 0, 0, 0]]))
    array([[1., 2.]])
    """
    scale = 1 / math.sqrt(query.shape[-1])
    return (query * scale) @ key.swapaxes(-1, -2)


# %% cell 17 (12-masked-softmax)
def masked_softmax_array(scores, visible=None):
    """Softmax over the last axis of what is visible: (..., S) -> (..., S); a row that sees nothing is all zeros.

    `visible` is bool and broadcasts to the scores. May overwrite `scores`, which the caller has just computed.

    >>> masked_softmax_array(np.array([1.0, 2.0, 0.0]), np.array([True, False, True])).round(4)
    array([0.7311, 0.    , 0.2689])
    """
    lowest = np.finfo(scores.dtype).min
    if visible is not None:
        scores += np.where(visible, np.float32(0), np.float32(-np.inf))
    scores -= np.maximum.reduce(scores, axis=-1, keepdims=True, initial=lowest)
    np.exp(scores, out=scores)
    scores /= np.maximum(sum_along(scores, -1), 1)
    return scores


# %% cell 21 (12-visible-mask)
def visible_mask(query_pos, key_pos, window=None, sinks=0):
    """Which keys each query may look at, by position: (T,), (S,) -> (T, S), or (B, T), (B, S) -> (B, T, S); bool.

    A key at -1 is an empty slot. A window of w shows a token itself and the w - 1 before it; the first `sinks` stay.

    >>> visible_mask([3, 4], [0, 1, 2, 3, 4, -1]).astype(int)
    array([[1, 1, 1, 1, 0, 0],
           [1, 1, 1, 1, 1, 0]])
    """
    query_pos = np.asarray(query_pos)[..., :, None]  # (T, 1)
    key_pos = np.asarray(key_pos)[..., None, :]  # (1, S)
    visible = (key_pos >= 0) & (key_pos <= query_pos)
    if window is not None:
        visible &= (query_pos - key_pos < window) | (key_pos < sinks)
    return visible


# %% cell 27 (12-causal-mask)
def causal_mask(seq_len, num_keys=None):
    """The mask of a decoder, bool (T, S): the queries are the last of `num_keys` keys (default: all).

    >>> causal_mask(2, 3).astype(int)
    array([[1, 1, 0],
           [1, 1, 1]])
    """
    num_keys = seq_len if num_keys is None else num_keys
    if num_keys < seq_len:
        raise ValueError(f"causal_mask: {seq_len} queries cannot be the last of only {num_keys} keys")
    return visible_mask(np.arange(num_keys - seq_len, num_keys), np.arange(num_keys))


# %% cell 32
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


# %% cell 33 (12-merge-heads)
def merge_heads_array(x):
    """Each token's heads side by side again: (B, H, T, D) -> (B, T, H*D).

    >>> merge_heads_array(np.array([[[[1, 2], [3, 4]], [[5, 6], [7, 8]]]])).tolist()
    [[[1, 2, 5, 6], [3, 4, 7, 8]]]
    """
    batch_size, num_heads, seq_len, head_dim = x.shape
    return x.swapaxes(1, 2).reshape(batch_size, seq_len, num_heads * head_dim)


@gradient(merge_heads_array)
def merge_heads_rule(grad, output, x):
    """The merge only moves numbers, so the rule moves them back."""
    batch_size, num_heads, seq_len, head_dim = x.shape
    return (grad.reshape(batch_size, seq_len, num_heads, head_dim).swapaxes(1, 2),)


# %% cell 36 (12-fold-groups)
def fold_groups(x, key):
    """The query heads that share a key head become rows of one matrix: (B, H, T, D) -> (B, H_kv, G*T, D).

    `key` (B, H_kv, S, D) says how many key heads there are; where each query head has its own, x is returned.
    Source: Ainslie et al. 2023, "GQA: Training Generalized Multi-Query Transformer Models".
    """
    if x.shape[:-2] == key.shape[:-2]:
        return x
    batch_size, num_heads, seq_len, width = x.shape
    num_kv_heads = key.shape[1]
    return x.reshape(batch_size, num_kv_heads, num_heads // num_kv_heads * seq_len, width)


# %% cell 39
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


# %% cell 41
def attention_weights_array(query, key, visible=None):
    """softmax(query @ key.T / sqrt(D)) over what is visible: (B, H, T, D), (B, H_kv, S, D) -> (B, H, T, S)."""
    scores = score_array(fold_groups(query, key), key)
    return masked_softmax_array(scores.reshape(*query.shape[:-1], key.shape[-2]), visible)


# %% cell 43 (12-weights-rule)
@gradient(attention_weights_array)
def attention_weights_rule(grad, weights, query, key, visible=None):
    """Gradients of query (B, H, T, D) and key (B, H_kv, S, D); `weights` is what the operation returned."""
    scale = 1 / math.sqrt(query.shape[-1])
    row_sums = np.vecdot(grad, weights)[..., None]  # sum(g * w) of each row, (B, H, T, 1)
    grad_scores = grad - row_sums
    grad_scores *= weights
    grad_scores *= scale
    grad_scores = fold_groups(grad_scores, key)  # (B, H_kv, G*T, S)
    grad_query = (grad_scores @ key).reshape(query.shape)
    grad_key = grad_scores.swapaxes(-1, -2) @ fold_groups(query, key)
    return grad_query, grad_key


# %% cell 47
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


# %% cell 48
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


# %% cell 49
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


# %% cell 55
def head_sizes(embed_dim, num_heads, num_kv_heads=None):
    """(num_kv_heads, head_dim), or a ValueError that says which number does not divide which."""
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    if num_heads < 1 or embed_dim % num_heads:
        raise ValueError(f"embed_dim ({embed_dim}) must be a multiple of num_heads ({num_heads})")
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"num_heads ({num_heads}) must be a multiple of num_kv_heads ({num_kv_heads})")
    return num_kv_heads, embed_dim // num_heads


# %% cell 57 (12-multi-head)
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
        key = apply(split_heads_array, packed, first=H, count=H_kv, head_dim=D)
        value = apply(split_heads_array, packed, first=H + H_kv, count=H_kv, head_dim=D)
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
        query, key, value = self.project(x)
        return self.merge(self.attend(query, key, value, visible))

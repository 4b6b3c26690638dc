"""Embeddings: ids to vectors, and where in the sequence each one stands.

Lesson 11_embeddings. Built from src/11_embeddings/11_embeddings.py by `tito dev build`: change it there, not here.
"""

__all__ = [
    "as_ids",
    "id_error",
    "embedding_array",
    "sum_rows",
    "embedding_rule",
    "Embedding",
    "sinusoidal_table",
    "choose_positions",
    "PositionalEncoding",
]


# %% cell 2
import math

import numpy as np

from tinytorch.core.autograd import gradient
from tinytorch.core.layers import Module, Parameter
from tinytorch.core.tensor import Tensor, apply, default_rng


# %% cell 12
def as_ids(ids):
    """Ids as an integer array; a list, an array or a Tensor goes in, floats and booleans are a TypeError."""
    ids = np.asarray(ids.data if isinstance(ids, Tensor) else ids)
    if ids.dtype.kind not in "iu":
        if ids.size:
            raise TypeError(f"ids are integers, got {ids.dtype} (the first is {ids.flat[0]}). "
                            "Floats and booleans name no row of the vocabulary")
        ids = ids.astype(np.int64)  # an empty list has no type yet
    return ids


def id_error(ids, num_embeddings):
    """The error for ids (any shape) outside of the vocabulary; it names the first of them."""
    place = np.argwhere((ids < 0) | (ids >= num_embeddings))[0]
    return IndexError(f"id {ids[tuple(place)]} at index {place.tolist()} is outside of the vocabulary: "
                      f"num_embeddings is {num_embeddings}, so ids run from 0 to {num_embeddings - 1}")


# %% cell 13 (11-embedding-array)
def embedding_array(weight, ids):
    """The row of each id: weight (V, E), ids (...) of integers -> (..., E). An id outside 0..V-1 raises id_error.

    >>> embedding_array(np.array([[0, 1], [2, 3]]), np.array([1, 1, 0])).tolist()
    [[2, 3], [2, 3], [0, 1]]
    """
    if ids.size and (np.minimum.reduce(ids, axis=None) < 0 or np.maximum.reduce(ids, axis=None) >= len(weight)):
        raise id_error(ids, len(weight))
    return weight[ids]


# %% cell 23 (11-sum-rows)
def sum_rows(ids, rows, num_rows):
    """Sum the rows that belong to the same id: ids (N,), rows (N, E) -> (num_rows, E), zero where an id is missing.

    >>> sum_rows(np.array([1, 3, 1]), np.array([[1, 2], [5, 5], [10, 20]]), 4).tolist()
    [[0, 0], [11, 22], [0, 0], [5, 5]]
    """
    total = np.zeros((num_rows, rows.shape[1]), rows.dtype)
    if len(ids) == 0:
        return total
    order = np.argsort(ids, kind="stable")
    ids = ids[order]
    starts = np.concatenate(([0], np.flatnonzero(ids[1:] != ids[:-1]) + 1))
    total[ids[starts]] = np.add.reduceat(rows[order], starts, axis=0)
    return total


# %% cell 27 (11-embedding-rule)
@gradient(embedding_array)
def embedding_rule(grad, output, weight, ids):
    """The gradients of weight (V, E) and ids (none), given grad (..., E)."""
    return sum_rows(ids.reshape(-1), grad.reshape(-1, weight.shape[1]), len(weight)), None


# %% cell 30
class Embedding(Module):
    """A row of numbers per id: ids (...) -> (..., embedding_dim). PyTorch: torch.nn.Embedding."""

    def __init__(self, num_embeddings, embedding_dim, rng=None):
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        rng = default_rng() if rng is None else rng
        self.weight = Parameter(rng.standard_normal((num_embeddings, embedding_dim), dtype=np.float32))

    def forward(self, ids):
        return apply(embedding_array, self.weight, as_ids(ids))

    def extra_repr(self):
        return f"{self.num_embeddings}, {self.embedding_dim}"


# %% cell 40 (11-sinusoidal-table)
def sinusoidal_table(max_seq_len, embed_dim):
    """Sines and cosines of many wavelengths: (max_seq_len, embed_dim), float32, columns sin, cos, sin, cos, …

    >>> sinusoidal_table(2, 4).round(3).tolist()[0]
    [0.0, 1.0, 0.0, 1.0]
    """
    table = np.empty((max_seq_len, embed_dim), np.float32)
    position = np.arange(max_seq_len)[:, None]                            # (T, 1)
    angle = position / 10000.0 ** (np.arange(0, embed_dim, 2) / embed_dim)  # (T, clocks)
    table[:, 0::2] = np.sin(angle)
    table[:, 1::2] = np.cos(angle[:, : embed_dim // 2])
    return table


# %% cell 47 (11-choose-positions)
def choose_positions(positions, seq_len, max_seq_len):
    """The positions of T tokens as an integer array: those given, (T,) or (B, T), else 0 .. T-1.

    A negative position, or one that is max_seq_len or more, is a ValueError that names it and max_seq_len.

    >>> choose_positions(None, 3, 8).tolist(), choose_positions([7], 1, 8).tolist()
    ([0, 1, 2], [7])
    """
    positions = np.arange(seq_len) if positions is None else as_ids(positions)
    if positions.size:
        low, high = np.minimum.reduce(positions, axis=None), np.maximum.reduce(positions, axis=None)
        if low < 0 or high >= max_seq_len:
            raise ValueError(f"position {low if low < 0 else high} does not fit: positions run from 0 to "
                             f"max_seq_len - 1, and max_seq_len is {max_seq_len}")
    return positions


# %% cell 50
class PositionalEncoding(Module):
    """Add to each row of x the row of its position: x (B, T, E), positions (T,) or (B, T) -> (B, T, E)."""

    def __init__(self, max_seq_len, embed_dim, kind="learned", rng=None):
        if kind not in ("learned", "sinusoidal"):
            raise ValueError(f"kind is 'learned' or 'sinusoidal', got {kind!r}")
        self.max_seq_len, self.embed_dim, self.kind = max_seq_len, embed_dim, kind
        if kind == "sinusoidal":
            self.table = sinusoidal_table(max_seq_len, embed_dim)
        else:
            rng = default_rng() if rng is None else rng
            rows = rng.standard_normal((max_seq_len, embed_dim), dtype=np.float32)
            self.weight = Parameter(rows * np.float32(0.02))

    def forward(self, x, positions=None):
        if x.ndim < 2 or x.shape[-1] != self.embed_dim:
            raise ValueError(f"x should have the shape (B, T, {self.embed_dim}), got {x.shape}")
        positions = choose_positions(positions, x.shape[-2], self.max_seq_len)
        if positions.shape not in (x.shape[-2:-1], x.shape[:-1]):
            raise ValueError(f"positions should have the shape {x.shape[-2:-1]} or {x.shape[:-1]}, one per token of x; "
                             f"got {positions.shape}")
        if self.kind == "sinusoidal":
            return x + self.table[positions]
        return x + apply(embedding_array, self.weight, positions)

    def extra_repr(self):
        return f"{self.max_seq_len}, {self.embed_dim}, kind={self.kind!r}"

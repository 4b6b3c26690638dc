"""Lesson 11 under hypothesis: look-up and its gradient as plain loops, positions in any cutting of a text."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tinytorch.core.embeddings import Embedding, PositionalEncoding, embedding_rule, sinusoidal_table
from tinytorch.core.tensor import Tensor

modest = settings(deadline=None, max_examples=80)
shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5)


@modest
@given(shapes.flatmap(lambda s: hnp.arrays(np.int64, s, elements=st.integers(0, 6))), st.integers(1, 4))
def test_look_up_and_gradient_as_loops(ids, width):
    layer = Embedding(7, width, rng=np.random.default_rng(0))
    got = layer(ids).numpy()
    assert got.shape == (*ids.shape, width)
    grad = np.random.default_rng(1).integers(-5, 5, size=got.shape).astype(np.float32)
    expected = np.zeros((7, width), np.float32)
    for index in np.ndindex(ids.shape):
        assert np.array_equal(got[index], layer.weight.numpy()[ids[index]])
        expected[ids[index]] += grad[index]
    rows, none = embedding_rule(grad, got, layer.weight.numpy(), ids)
    assert none is None
    assert rows.shape == expected.shape and rows.dtype == np.float32
    assert np.array_equal(rows, expected)


@modest
@given(st.integers(-20, 30), st.integers(1, 12))
def test_exactly_the_ids_of_the_vocabulary_are_accepted(i, size):
    layer = Embedding(size, 2)
    if 0 <= i < size:
        assert layer([i]).shape == (1, 2)
    else:
        with pytest.raises(IndexError, match=rf"id {i} .*num_embeddings is {size}"):
            layer([i])


@modest
@given(st.lists(st.integers(1, 4), min_size=1, max_size=6), st.sampled_from(["learned", "sinusoidal"]))
def test_any_cutting_of_a_text_gives_the_same_rows(parts, kind):
    length = sum(parts)
    layer = PositionalEncoding(length, 5, kind=kind, rng=np.random.default_rng(2))
    x = Tensor(np.random.default_rng(3).standard_normal((2, length, 5)))
    whole, start, pieces = layer(x).numpy(), 0, []
    for part in parts:
        positions = np.arange(start, start + part)
        pieces.append(layer(x[:, start:start + part], positions=positions).numpy())
        start += part
    pieces = np.concatenate(pieces, axis=1)
    assert pieces.shape == (2, length, 5)
    assert np.array_equal(pieces, whole)


@modest
@given(st.integers(1, 200), st.integers(1, 33))
def test_every_clock_is_a_unit_circle(length, width):
    table = sinusoidal_table(length, width)
    assert table.shape == (length, width) and table.dtype == np.float32
    pairs = width // 2
    squares = table[:, 0:2 * pairs:2] ** 2 + table[:, 1:2 * pairs:2] ** 2
    assert squares.shape == (length, pairs)
    assert np.allclose(squares, 1, atol=1e-5)

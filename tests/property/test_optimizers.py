"""Optimizers for any shape, piece size and order of gradients."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tinytorch.core.layers import Parameter
from tinytorch.core.optimizers import SGD, Adam, AdamW, blocks
from tinytorch.core.tensor import Tensor

shapes = st.lists(st.integers(1, 6), min_size=0, max_size=3).map(tuple)
kinds = st.sampled_from(
    [lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01), lambda p: SGD(p, lr=0.1, momentum=0.5, nesterov=True),
     lambda p: Adam(p, lr=0.1, weight_decay=0.1), lambda p: AdamW(p, lr=0.1)]
)


@settings(deadline=None, max_examples=60)
@given(shapes, st.integers(1, 40), st.integers(1, 4))
def test_pieces_are_the_array_in_order_and_can_be_written(shape, size, count):
    numbers = np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)
    arrays = [np.array(numbers + i) for i in range(count)]
    pieces = list(blocks(*arrays, size=size))
    assert pieces and all(len(piece) == count for piece in pieces)
    for i, array in enumerate(arrays):
        joined = np.concatenate([piece[i].reshape(-1) for piece in pieces])
        assert np.array_equal(joined, array.reshape(-1))
    for piece in pieces:
        piece[0][...] = -1
    assert np.all(arrays[0] == -1) and arrays[0].size > 0


@settings(deadline=None, max_examples=40)
@given(kinds, st.lists(shapes, min_size=1, max_size=3), st.lists(st.booleans(), min_size=2, max_size=8),
       st.integers(0, 8), st.integers(0, 2**32 - 1))
def test_stopping_anywhere_changes_nothing(make, sizes, present, stop, seed):
    """The oracle is the same run without a stop; some steps come without gradients."""
    rng = np.random.default_rng(seed)
    start = [rng.standard_normal(shape).astype(np.float32) for shape in sizes]
    grads = [[rng.standard_normal(shape).astype(np.float32) for shape in sizes] for _ in present]

    def run(stop_at):
        parameters = [Parameter(a.copy()) for a in start]
        optimizer = make(parameters)
        for step, here in enumerate(present):
            if step == stop_at:
                parameters = [Parameter(p.data.copy()) for p in parameters]
                saved, optimizer = optimizer.state_dict(), make(parameters)
                optimizer.load_state_dict(saved)
            for p, grad in zip(parameters, grads[step]):
                p.grad = Tensor(grad) if here else None
            optimizer.step()
        return [p.data for p in parameters]

    for got, expected, shape in zip(run(stop), run(None), sizes):
        assert got.shape == expected.shape == shape and got.dtype == np.float32
        assert np.array_equal(got, expected)

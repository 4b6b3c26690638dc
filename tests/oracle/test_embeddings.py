"""Lesson 11 against PyTorch: rows, gradients, tied tables; and the sinusoidal table in torch's own arithmetic."""

import math

import numpy as np
import pytest

from tinytorch.core.embeddings import Embedding, PositionalEncoding, sinusoidal_table
from tinytorch.core.layers import Linear
from tinytorch.core.tensor import Tensor

torch = pytest.importorskip("torch")


def agree(got, expected, tolerance=1e-5):
    expected = expected.detach().numpy()
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(7,), (4, 16), (2, 3, 5), (8, 128)])
def test_embedding_forward_and_backward(shape):
    rng = np.random.default_rng(len(shape))
    ours = Embedding(50, 12, rng=rng)
    theirs = torch.nn.Embedding.from_pretrained(torch.tensor(ours.weight.numpy().copy()), freeze=False)
    ids = rng.zipf(1.5, shape) % 50
    grad = rng.standard_normal((*shape, 12)).astype(np.float32)
    a, b = ours(ids), theirs(torch.tensor(ids))
    agree(a.numpy(), b)
    (a * Tensor(grad)).sum().backward()
    (b * torch.tensor(grad)).sum().backward()
    agree(ours.weight.grad.numpy(), theirs.weight.grad)


def test_tied_table():
    rng = np.random.default_rng(1)
    embed, head = Embedding(20, 8, rng=rng), Linear(8, 20, bias=False)
    head.weight = embed.weight
    weight = torch.tensor(embed.weight.numpy().copy(), requires_grad=True)
    ids = rng.integers(20, size=(3, 9))
    head(embed(ids)).mean().backward()
    (torch.nn.functional.embedding(torch.tensor(ids), weight) @ weight.T).mean().backward()
    agree(embed.weight.grad.numpy(), weight.grad)


def test_token_and_position_rows_as_in_gpt2():
    """wte(ids) + wpe(positions), forward and backward, with positions that count on."""
    rng = np.random.default_rng(2)
    tokens, places = Embedding(30, 6, rng=rng), PositionalEncoding(16, 6, rng=rng)
    wte = torch.nn.Embedding.from_pretrained(torch.tensor(tokens.weight.numpy().copy()), freeze=False)
    wpe = torch.nn.Embedding.from_pretrained(torch.tensor(places.weight.numpy().copy()), freeze=False)
    ids = rng.integers(30, size=(4, 5))
    for positions in (np.arange(5), np.arange(7, 12), rng.integers(16, size=(4, 5))):
        a = places(tokens(ids), positions=positions)
        b = wte(torch.tensor(ids)) + wpe(torch.tensor(positions))
        agree(a.numpy(), b)
        (a * a).sum().backward()
        (b * b).sum().backward()
        agree(tokens.weight.grad.numpy(), wte.weight.grad, 1e-4)
        agree(places.weight.grad.numpy(), wpe.weight.grad, 1e-4)


@pytest.mark.parametrize("length, width", [(100, 32), (5000, 64)])
def test_sinusoidal_table_in_torch_float64(length, width):
    position = torch.arange(length, dtype=torch.float64)[:, None]
    rate = torch.exp(torch.arange(0, width, 2, dtype=torch.float64) * (-math.log(10000.0) / width))
    expected = torch.empty(length, width, dtype=torch.float64)
    expected[:, 0::2], expected[:, 1::2] = torch.sin(position * rate), torch.cos(position * rate)
    agree(sinusoidal_table(length, width), expected.float(), 1e-6)


def test_out_of_range_is_an_index_error_as_in_torch():
    for bad in (-1, 5):
        with pytest.raises(IndexError):
            torch.nn.Embedding(5, 2)(torch.tensor([bad]))
        with pytest.raises(IndexError, match=f"id {bad} "):
            Embedding(5, 2)([bad])

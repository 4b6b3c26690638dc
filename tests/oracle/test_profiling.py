"""FLOPs and parameters against PyTorch's own counters."""

import numpy as np
import pytest

from tinytorch.core.activations import ReLU
from tinytorch.core.attention import MultiHeadAttention, scaled_dot_product_attention
from tinytorch.core.layers import Linear, Sequential
from tinytorch.core.tensor import Tensor
from tinytorch.models.transformer import GPT
from tinytorch.profiling.profiler import FlopCounter, count_flops, count_parameters, plugged_in

torch = pytest.importorskip("torch")
flop_counter = pytest.importorskip("torch.utils.flop_counter")


def torch_flops(function, *inputs):
    with flop_counter.FlopCounterMode(display=False) as counter:
        function(*inputs)
    return counter.get_total_flops()


def our_flops(function, *inputs):
    with plugged_in(FlopCounter()) as counter:
        function(*inputs)
    return counter.total


@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 3, 8)])
def test_mlp(shape):
    ours = Sequential(Linear(8, 16), ReLU(), Linear(16, 4, bias=False))
    theirs = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4, bias=False))
    expected = torch_flops(theirs, torch.zeros(shape))
    assert count_flops(ours, shape) == expected > 0
    assert count_parameters(ours) == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize(("a", "b"), [((3, 4), (4, 5)), ((2, 3, 4), (2, 4, 5)), ((2, 6, 3, 4), (2, 6, 4, 5))])
def test_matmul(a, b):
    expected = torch_flops(torch.matmul, torch.zeros(a), torch.zeros(b))
    assert our_flops(lambda x, y: x @ y, Tensor(np.zeros(a)), Tensor(np.zeros(b))) == expected > 0


@pytest.mark.parametrize(("T", "S"), [(5, 5), (1, 9), (3, 7)])
def test_attention(T, S):
    shapes = (2, 4, T, 8), (2, 4, S, 8), (2, 4, S, 8)

    def theirs(query, key, value):
        return torch.softmax(query @ key.transpose(-1, -2) / 8**0.5, dim=-1) @ value

    expected = torch_flops(theirs, *map(torch.zeros, shapes))
    assert our_flops(scaled_dot_product_attention, *(Tensor(np.zeros(s)) for s in shapes)) == expected > 0


def test_a_module_with_attention():
    ours, theirs = MultiHeadAttention(16, 4), torch.nn.MultiheadAttention(16, 4, batch_first=True)
    x = torch.zeros(2, 6, 16)
    assert count_parameters(ours) == sum(p.numel() for p in theirs.parameters())
    expected = torch_flops(lambda x: theirs(x, x, x, need_weights=True), x)
    assert count_flops(ours, (2, 6, 16)) == expected > 0


def test_gpt_has_the_parameters_of_transformers_gpt2():
    transformers = pytest.importorskip("transformers")
    sizes = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 20, "vocab_size": 50}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    ours = GPT(50, 32, 3, 4, 20)
    assert count_parameters(ours) == sum(p.numel() for p in theirs.parameters())
    theirs.config._attn_implementation = "eager"
    with torch.no_grad():
        expected = torch_flops(theirs, torch.zeros((2, 7), dtype=torch.long))
    assert count_flops(ours, (2, 7)) == expected > 0

"""Lesson 05 against PyTorch, in float32: values and gradients of every operation, ties and corners included."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tinytorch.core import activations, layers, losses, tensor  # noqa: E402
from tinytorch.core.autograd import RULES  # noqa: E402
from tinytorch.core.tensor import Tensor, apply  # noqa: E402

F = torch.nn.functional
RNG = np.random.default_rng(8)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def positive(*shape):
    return RNG.uniform(0.5, 2.0, shape).astype(np.float32)


def share(*shape):
    return RNG.uniform(0.05, 0.95, shape).astype(np.float32)


TIES = np.array([[3.0, 1.0, 3.0], [2.0, 2.0, 2.0]], dtype=np.float32)
IDS = np.array([[0, 4, -100], [1, 1, 2]])

# operation, the same in PyTorch, arrays, parameters
CASES = [
    (tensor.add_array, torch.add, (normal(2, 3), normal(3)), {}),
    (tensor.subtract_array, torch.sub, (normal(2, 1), normal(1, 3)), {}),
    (tensor.multiply_array, torch.mul, (normal(2, 3), normal(2, 1)), {}),
    (tensor.divide_array, torch.div, (normal(2, 3), positive(3)), {}),
    (tensor.power_array, torch.pow, (positive(2, 3), normal(3)), {}),
    (tensor.power_array, torch.pow, (np.array([0.0, 2.0, 3.0], np.float32), np.array([0.0, 0.0, 1.0], np.float32)), {}),
    (tensor.negative_array, torch.neg, (normal(2, 3),), {}),
    (tensor.matmul_array, torch.matmul, (normal(2, 3), normal(3, 4)), {}),
    (tensor.matmul_array, torch.matmul, (normal(5, 2, 3), normal(3, 4)), {}),
    (tensor.matmul_array, torch.matmul, (normal(5, 1, 2, 3), normal(4, 3, 2)), {}),
    (tensor.matmul_array, torch.matmul, (normal(3), normal(5, 3, 4)), {}),
    (tensor.matmul_array, torch.matmul, (normal(5, 2, 3), normal(3)), {}),
    (tensor.matmul_array, torch.matmul, (normal(3), normal(3)), {}),
    (tensor.sum_array, lambda x, dim: x.sum(dim=dim), (normal(2, 3, 4),), {"dim": (0, -1)}),
    (tensor.mean_array, lambda x, dim, keepdim: x.mean(dim, keepdim), (normal(2, 3),), {"dim": 0, "keepdim": True}),
    (tensor.max_array, torch.max, (TIES,), {}),
    (tensor.max_array, torch.amax, (TIES,), {"dim": 1}),
    (tensor.min_array, torch.min, (TIES,), {}),
    (tensor.min_array, torch.amin, (TIES,), {"dim": 0}),
    (tensor.exp_array, torch.exp, (normal(2, 3),), {}),
    (tensor.log_array, torch.log, (positive(2, 3),), {}),
    (tensor.sqrt_array, torch.sqrt, (positive(2, 3),), {}),
    (tensor.abs_array, torch.abs, (np.array([-2.0, 0.0, 3.0], np.float32),), {}),
    (tensor.clone_array, torch.clone, (normal(2, 3),), {}),
    (tensor.reshape_array, torch.reshape, (normal(2, 6),), {"shape": (3, 4)}),
    (tensor.transpose_array, torch.transpose, (normal(2, 3, 4),), {"dim0": 0, "dim1": -1}),
    (tensor.permute_array, torch.permute, (normal(2, 3, 4),), {"dims": (-1, 0, 1)}),
    (tensor.squeeze_array, torch.squeeze, (normal(2, 1, 3),), {"dim": 1}),
    (tensor.unsqueeze_array, torch.unsqueeze, (normal(2, 3),), {"dim": -1}),
    (tensor.expand_array, lambda x, shape: x.expand(shape), (normal(2, 1),), {"shape": (4, 2, 3)}),
    (tensor.index_array, lambda x, key: x[key], (normal(4, 3),), {"key": [0, 0, 2]}),
    (tensor.index_array, lambda x, key: x[key], (normal(4, 3),), {"key": (slice(None, None, 2), 1)}),
    (tensor.index_array, lambda x, key: x[key], (normal(4, 3),), {"key": ([1, 1], [2, 2])}),
    (tensor.cat_array, lambda *x, dim: torch.cat(x, dim), (normal(2, 3), normal(2, 1)), {"dim": 1}),
    (tensor.stack_array, lambda *x, dim: torch.stack(x, dim), (normal(2, 3), normal(2, 3)), {"dim": -1}),
    (activations.relu_array, torch.relu, (np.array([-1.0, 0.0, 2.0], np.float32),), {}),
    (activations.sigmoid_array, torch.sigmoid, (normal(3, 4) * 10,), {}),
    (activations.tanh_array, torch.tanh, (normal(3, 4) * 4,), {}),
    (activations.gelu_array, lambda x: F.gelu(x, approximate="tanh"), (normal(3, 4) * 4,), {}),
    (activations.silu_array, F.silu, (normal(3, 4) * 10,), {}),
    (activations.softmax_array, torch.softmax, (normal(3, 4) * 10,), {"dim": 0}),
    (activations.log_softmax_array, torch.log_softmax, (normal(3, 4) * 10,), {"dim": -1}),
    (layers.linear_array, F.linear, (normal(5, 2, 3), normal(4, 3), normal(4)), {}),
    (layers.linear_array, F.linear, (normal(2, 3), normal(4, 3)), {}),
    (losses.mse_array, F.mse_loss, (normal(2, 3), normal(2, 3)), {}),
    (losses.cross_entropy_array, F.cross_entropy, (normal(4, 3) * 10, np.array([0, 2, 1, 1])), {}),
    (losses.cross_entropy_array, lambda x, t: F.cross_entropy(x.transpose(1, 2), t), (normal(2, 3, 5), IDS), {}),
    (losses.bce_array, F.binary_cross_entropy, (share(2, 3), share(2, 3)), {}),
    (losses.bce_with_logits_array, F.binary_cross_entropy_with_logits, (normal(2, 3) * 10, share(2, 3)), {}),
]
ALL = [pytest.param(*case, id=f"{case[0].__name__}-{i}") for i, case in enumerate(CASES)]


def leaves(arrays):
    ours = [Tensor(a, requires_grad=a.dtype.kind == "f") for a in arrays]
    theirs = [torch.tensor(a, requires_grad=a.dtype.kind == "f") for a in arrays]
    return ours, theirs


def close(got, expected, words):
    assert got.shape == tuple(expected.shape), f"{words}: got shape {got.shape}, PyTorch has {tuple(expected.shape)}"
    assert got.dtype == np.float32, f"{words}: became {got.dtype}"
    error = np.abs(got.data - expected.detach().numpy()) / (1 + np.abs(expected.detach().numpy()))
    assert error.size == 0 or error.max() <= 1e-5, f"{words}: off by {error.max():.1e}"


def test_every_rule_of_lesson_05_is_compared():
    compared = {case[0] for case in CASES}
    modules = {m.__name__ for m in (tensor, activations, layers, losses)}
    missing = sorted(op.__name__ for op in RULES if op.__module__ in modules and op not in compared)
    assert not missing, f"rules that nothing compares with PyTorch: {missing}"


@pytest.mark.parametrize("op, theirs, arrays, params", ALL)
def test_values_and_gradients(op, theirs, arrays, params):
    our_inputs, their_inputs = leaves(arrays)
    got, expected = apply(op, *our_inputs, **params), theirs(*their_inputs, **params)
    close(got, expected, op.__name__)
    slopes = np.random.default_rng(1).standard_normal(got.shape).astype(np.float32)
    got.backward(slopes)
    expected.backward(torch.from_numpy(slopes) if slopes.shape else torch.tensor(float(slopes)))
    for i, (ours, reference) in enumerate(zip(our_inputs, their_inputs)):
        if ours.requires_grad:
            close(ours.grad, reference.grad, f"gradient {i} of {op.__name__}")


def test_a_graph_with_sharing_and_broadcasting():
    def work(x, w, b):
        hidden = (x @ w + b).exp() / 10
        gate = 1.0 - hidden.mean(dim=1, keepdim=True)
        both = hidden * gate + hidden[:, [0, 0, 1]].sum(dim=-1, keepdim=True)
        return (both.transpose(0, 1) ** 2).sum() + both.max() - (-both).reshape(-1)[::2].sum()

    ours, theirs = leaves([normal(4, 3), normal(3, 5), normal(5)])
    got, expected = work(*ours), work(*theirs)
    got.backward()
    expected.backward()
    for name, g, e in zip("xwb", ours, theirs):
        scale = 1 + float(e.grad.abs().max())
        assert g.grad.shape == tuple(e.grad.shape)
        assert np.abs(g.grad.data - e.grad.numpy()).max() / scale < 1e-5, f"gradient of {name}"


def test_two_backwards_accumulate_as_in_pytorch():
    ours, theirs = leaves([normal(3)])
    for _ in range(2):
        (ours[0] ** 2).sum().backward()
        (theirs[0] ** 2).sum().backward()
    close(ours[0].grad, theirs[0].grad, "accumulated gradient")


def test_training_a_network_step_by_step():
    """Ten steps of plain gradient descent: the weights stay together."""
    x, target = normal(16, 6), RNG.integers(0, 3, 16)
    ours, theirs = leaves([normal(8, 6) / 3, normal(8), normal(3, 8) / 3, normal(3)])

    for _ in range(10):
        w1, b1, w2, b2 = ours
        hidden = activations.gelu(apply(layers.linear_array, Tensor(x), w1, b1))
        losses.cross_entropy(apply(layers.linear_array, hidden, w2, b2), target).backward()
        v1, c1, v2, c2 = theirs
        hidden = F.gelu(F.linear(torch.from_numpy(x), v1, c1), approximate="tanh")
        F.cross_entropy(F.linear(hidden, v2, c2), torch.from_numpy(target)).backward()
        for mine, reference in zip(ours, theirs):
            mine.data -= 0.3 * mine.grad.data
            mine.zero_grad()
            with torch.no_grad():
                reference -= 0.3 * reference.grad
            reference.grad = None
    for mine, reference in zip(ours, theirs):
        assert np.allclose(mine.data, reference.detach().numpy(), rtol=1e-4, atol=1e-5)

"""Whole expressions, written once and run by both: values and gradients in float32, corners included."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import tinytorch.core.autograd  # noqa: E402, F401
from tinytorch.core import activations, tensor  # noqa: E402
from tinytorch.core.layers import Linear, Sequential  # noqa: E402
from tinytorch.core.losses import BCELoss, CrossEntropyLoss  # noqa: E402
from tinytorch.core.tensor import Tensor  # noqa: E402

RNG = np.random.default_rng(12)
A = RNG.standard_normal((3, 4)).astype(np.float32)
B = RNG.uniform(0.5, 2.0, (4,)).astype(np.float32)
C = RNG.uniform(0.5, 2.0, (2, 3, 1)).astype(np.float32)


class Ours:
    softmax, log_softmax, relu, sigmoid = (
        staticmethod(getattr(activations, name)) for name in ("softmax", "log_softmax", "relu", "sigmoid")
    )
    cat, stack = staticmethod(tensor.cat), staticmethod(tensor.stack)
    ints = staticmethod(Tensor)


class Theirs:
    softmax, log_softmax, relu, sigmoid = torch.softmax, torch.log_softmax, torch.relu, torch.sigmoid
    cat, stack, ints = torch.cat, torch.stack, torch.tensor


# Each takes a (3, 4), b (4,), c (2, 3, 1) and the names that are functions and not methods.
EXPRESSIONS = {
    "number on the left": lambda a, b, c, f: 1.0 - a + 2 * b / 3 - 4 / b,
    "number to a power": lambda a, b, c, f: 2**a + 0.5**b,
    "powers": lambda a, b, c, f: a**2 - a**3 + b**-1 + b**0.5 + a**0 + a**1,
    "power of two tensors": lambda a, b, c, f: b ** (a * 2),
    "negation": lambda a, b, c, f: -(a * -b) - (-b),
    "stretched left": lambda a, b, c, f: c * a - b,
    "stretched right": lambda a, b, c, f: b / c + a / c,
    "both stretched": lambda a, b, c, f: c * b,
    "one number for all": lambda a, b, c, f: a * b.sum() - a / c.mean(),
    "with itself": lambda a, b, c, f: (a + a) * a - a / (a * a + 1) + (a - a),
    "diamond": lambda a, b, c, f: (lambda y: (y + 1) * (y - 1) + y)(a * b),
    "diamonds in a row": lambda a, b, c, f: (lambda y: y + y * y)((lambda y: y + y * y)(a + a * a) * 0.1),
    "sum of a list": lambda a, b, c, f: sum([a, a * 2, b]),
    "row by row": lambda a, b, c, f: sum(row * i for i, row in enumerate(a)),
    "same row twice": lambda a, b, c, f: a[[0, 0, 2, 0]] * c[0, [1, 1, 1, 2]],
    "rows by a tensor": lambda a, b, c, f: a[f.ints([2, 2, 1])] * b,
    "pairs twice": lambda a, b, c, f: a[f.ints([0, 0, 1]), f.ints([1, 1, 3])] * 3,
    "mask": lambda a, b, c, f: a[a > 0] * 2,
    "mask as a factor": lambda a, b, c, f: a * (a > 0) + a * (a <= 0) * 0.1,
    "overlapping slices": lambda a, b, c, f: a[:, 1:] * a[:, :-1] + a[1:, ::2].sum(),
    "new dimensions": lambda a, b, c, f: a[:, None] * a[None, :] + a.unsqueeze(0) * b,
    "expand": lambda a, b, c, f: b.expand(3, 4) * a + c.expand(-1, -1, 4),
    "turned": lambda a, b, c, f: a.T @ a + (a.transpose(0, 1) @ a).T,
    "read again": lambda a, b, c, f: a.reshape(4, 3) @ a.view(3, -1) + c.permute(2, 0, 1).reshape(6).sum(),
    "batch of products": lambda a, b, c, f: (c * a) @ (c * a).transpose(-1, -2),
    "vector products": lambda a, b, c, f: (a @ b) * (b @ a.T) + b @ b,
    "squeezed": lambda a, b, c, f: c.squeeze(-1) * c.squeeze() + c.squeeze(0).sum(),
    "cat with itself": lambda a, b, c, f: f.cat([a, a * 2, a], dim=1)[:, 2:7],
    "stack": lambda a, b, c, f: f.stack([a, a * b, a], dim=1).mean(dim=(0, 2)),
    "centred": lambda a, b, c, f: (a - a.mean(dim=1, keepdim=True)) / (a.abs().mean(dim=0) + 1),
    "normalised": lambda a, b, c, f: (lambda d: d / ((d * d).mean(dim=-1, keepdim=True) + 1e-5).sqrt())(a - a.mean()),
    "softmax by hand": lambda a, b, c, f: a.exp() / a.exp().sum(dim=1, keepdim=True),
    "hard softmax": lambda a, b, c, f: f.softmax(a * 1e4, dim=-1) * a,
    "softmax and its log": lambda a, b, c, f: f.softmax(a, dim=0) * f.log_softmax(a * 3, dim=1),
    "entropy": lambda a, b, c, f: -(f.softmax(a, dim=-1) * f.log_softmax(a, dim=-1)).sum(dim=-1),
    "gates": lambda a, b, c, f: f.sigmoid(a) * f.relu(a - 0.1) + f.relu(-a) * b,
    "largest": lambda a, b, c, f: a.max() * a + (a - a.max()).exp().sum(),
    "clone and detach": lambda a, b, c, f: a.clone() * a.detach() + (a - a.detach()),
}


def both(work, arrays):
    """Values and gradients of one expression: two lists of arrays."""
    results = []
    for f in (Ours, Theirs):
        leaves = [
            Tensor(x.copy(), requires_grad=True) if f is Ours else torch.tensor(x, requires_grad=True) for x in arrays
        ]
        output = work(*leaves, f)
        slopes = np.random.default_rng(3).standard_normal(tuple(output.shape)).astype(np.float32)
        output.backward(slopes if f is Ours else torch.tensor(slopes))
        grads = [np.zeros_like(x) if leaf.grad is None else leaf.grad.numpy() for leaf, x in zip(leaves, arrays)]
        results.append([output.detach().numpy(), *grads])
    return results


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_values_and_gradients(name):
    for part, got, expected in zip("value a b c".split(), *both(EXPRESSIONS[name], [A, B, C])):
        assert got.shape == expected.shape, f"{part}: got shape {got.shape}, PyTorch has {expected.shape}"
        assert got.dtype == np.float32, f"{part} became {got.dtype}"
        off = np.abs(got - expected).max() / (1 + np.abs(expected).max())
        assert off < 1e-5, f"{part}: off by {off:.1e}"


CORNERS = {
    "root of 0": (lambda x, f: x.sqrt(), [0.0, 4.0]),
    "log of 0": (lambda x, f: x.log(), [0.0, 1.0]),
    "one over 0": (lambda x, f: 1.0 / x, [0.0, 2.0]),
    "0 over 0": (lambda x, f: x / x, [0.0, 2.0]),
    "powers of 0": (lambda x, f: x**2 + x**1 + x**0, [0.0, -1.0]),
    "size at 0": (lambda x, f: x.abs(), [0.0, -2.0]),
    "relu at 0": (lambda x, f: f.relu(x), [0.0, -2.0, 2.0]),
    "exp overflows": (lambda x, f: x.exp(), [100.0, -200.0]),
    "sigmoid far out": (lambda x, f: f.sigmoid(x), [1e30, -1e30, 90.0, -90.0]),
    "softmax far out": (lambda x, f: f.softmax(x, dim=0), [1e30, -1e30, 1e30]),
    "log softmax far out": (lambda x, f: f.log_softmax(x, dim=0), [0.0, -200.0, -1e30]),
    "equals share the maximum": (lambda x, f: x.max(), [5.0, 5.0, 1.0, 5.0]),
    "equals share the minimum": (lambda x, f: x.min() * 3, [2.0, 2.0, 2.0]),
    "nan passes through": (lambda x, f: f.sigmoid(x) * 2 + x.mean(), [float("nan"), 1.0]),
}


@pytest.mark.parametrize("name", CORNERS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_corners(name):
    work, values = CORNERS[name]
    for part, got, expected in zip(("value", "gradient"), *both(work, [np.array(values, np.float32)])):
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6, err_msg=part)


def test_sure_and_wrong_probabilities_have_a_finite_gradient():
    p, t = np.array([0, 1, 0, 1, 0.3], np.float32), np.array([0, 1, 1, 0, 1], np.float32)
    ours, theirs = Tensor(p, requires_grad=True), torch.tensor(p, requires_grad=True)
    BCELoss()(ours, t).backward()
    torch.nn.BCELoss()(theirs, torch.tensor(t)).backward()
    np.testing.assert_allclose(ours.grad.data, theirs.grad.numpy(), rtol=1e-5)


def test_a_language_model_head():
    """Logits (B, T, V) with padding: PyTorch sees them as rows."""
    x, target = RNG.standard_normal((2, 5, 6)).astype(np.float32), RNG.integers(0, 7, (2, 5))
    target[0, 3:] = -100
    ours, theirs = (
        Sequential(Linear(6, 8), activations.Tanh(), Linear(8, 7)),
        torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 7)),
    )
    ours.load_state_dict({name: p.detach().numpy() for name, p in theirs.named_parameters()})
    loss = CrossEntropyLoss()(ours(Tensor(x)), target)
    expected = torch.nn.CrossEntropyLoss()(theirs(torch.tensor(x)).reshape(-1, 7), torch.tensor(target).reshape(-1))
    loss.backward()
    expected.backward()
    assert loss.shape == () and abs(loss.item() - expected.item()) < 1e-5
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters()):
        assert p.grad.shape == tuple(q.grad.shape) and p.grad.dtype == np.float32
        np.testing.assert_allclose(p.grad.data, q.grad.numpy(), rtol=1e-4, atol=1e-6, err_msg=name)

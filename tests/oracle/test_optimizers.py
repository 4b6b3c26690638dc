"""The optimizers against torch.optim, step for step, on the same gradients."""

import numpy as np
import pytest

from tinytorch.core.layers import Parameter
from tinytorch.core.optimizers import SGD, Adam, AdamW
from tinytorch.core.tensor import Tensor

torch = pytest.importorskip("torch")

SETTINGS = [
    (SGD, "SGD", {"lr": 0.1}),
    (SGD, "SGD", {"lr": 0.1, "momentum": 0.9}),
    (SGD, "SGD", {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    (SGD, "SGD", {"lr": 0.05, "momentum": 0.8, "weight_decay": 0.1}),
    (SGD, "SGD", {"lr": 0.05, "momentum": 0.8, "weight_decay": 0.1, "nesterov": True}),
    (Adam, "Adam", {}),
    (Adam, "Adam", {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3}),
    (Adam, "Adam", {"lr": 0.01, "weight_decay": 0.1}),
    (AdamW, "AdamW", {}),
    (AdamW, "AdamW", {"lr": 0.02, "betas": (0.8, 0.95), "weight_decay": 0.3}),
]
SHAPES = [(7,), (3, 5), (2, 3, 4), (70_001,)]  # the last is more than one piece


@pytest.mark.parametrize(("ours", "theirs", "settings"), SETTINGS, ids=lambda value: str(value))
def test_two_hundred_steps(ours, theirs, settings):
    rng = np.random.default_rng(0)
    start = [rng.standard_normal(shape).astype(np.float32) for shape in SHAPES]
    parameters = [Parameter(a.copy()) for a in start]
    expected = [torch.nn.Parameter(torch.tensor(a)) for a in start]
    optimizer, oracle = ours(parameters, **settings), getattr(torch.optim, theirs)(expected, **settings)
    for step in range(200):
        for index, (p, q) in enumerate(zip(parameters, expected)):
            p.grad = q.grad = None
            if index == 1 and step % 3 == 0:
                continue  # no gradient this time: no move, and no count
            grad = (rng.standard_normal(p.shape) * 10.0 ** rng.integers(-3, 2)).astype(np.float32)
            p.grad, q.grad = Tensor(grad), torch.tensor(grad)
        if step % 50 == 49:  # a schedule
            optimizer.lr *= 0.5
            oracle.param_groups[0]["lr"] *= 0.5
        optimizer.step()
        oracle.step()
        for p, q in zip(parameters, expected):
            got, wanted = p.data, q.detach().numpy()
            assert got.shape == wanted.shape and got.dtype == wanted.dtype
            worst = np.abs(got - wanted).max() / (1 + np.abs(wanted).max())
            assert worst < 3e-6, f"step {step}, shape {p.shape}: off by {worst:.2e}"


def test_float64_agrees_to_the_last_digits():
    rng = np.random.default_rng(1)
    start = rng.standard_normal(50)
    p, q = Parameter(start.copy(), dtype=np.float64), torch.nn.Parameter(torch.tensor(start))
    ours, theirs = AdamW([p], lr=0.01), torch.optim.AdamW([q], lr=0.01)
    for _ in range(300):
        grad = rng.standard_normal(50)
        p.grad, q.grad = Tensor(grad, dtype=np.float64), torch.tensor(grad)
        ours.step()
        theirs.step()
    assert p.dtype == np.float64
    np.testing.assert_allclose(p.data, q.detach().numpy(), rtol=1e-12, atol=1e-13)


def test_state_has_the_names_and_values_of_torch():
    p, q = Parameter([1.0, 2.0]), torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    ours, theirs = Adam([p]), torch.optim.Adam([q])
    for grad in ([0.5, -1.0], [0.1, 0.2]):
        p.grad, q.grad = Tensor(grad), torch.tensor(grad)
        ours.step()
        theirs.step()
    got, expected = ours.state_dict()["state"][0], theirs.state_dict()["state"][0]
    assert set(got) == set(expected)
    assert got["step"] == expected["step"].item() == 2
    for name in ("exp_avg", "exp_avg_sq"):
        np.testing.assert_allclose(got[name], expected[name].numpy(), rtol=1e-6, err_msg=name)

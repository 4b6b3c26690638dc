"""Layers against PyTorch: the same weights give the same numbers, names and first distribution."""

import numpy as np
import pytest

from tinytorch.core.activations import GELU, ReLU
from tinytorch.core.layers import Dropout, Linear, Sequential
from tinytorch.core.tensor import Tensor

torch = pytest.importorskip("torch")


def twins(bias=True):
    """Our model and PyTorch's, with our weights in both."""
    ours = Sequential(Linear(6, 5, bias=bias), ReLU(), Sequential(Linear(5, 4), GELU()), Dropout(0.5))
    theirs = torch.nn.Sequential(
        torch.nn.Linear(6, 5, bias=bias), torch.nn.ReLU(),
        torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.GELU(approximate="tanh")), torch.nn.Dropout(0.5),
    )
    theirs.load_state_dict({name: torch.from_numpy(array) for name, array in ours.state_dict().items()})
    return ours.eval(), theirs.eval()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6), (0, 6)])
def test_values(bias, shape):
    ours, theirs = twins(bias)
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    got, expected = ours(Tensor(x)).data, theirs(torch.from_numpy(x)).detach().numpy()
    assert got.shape == expected.shape and got.dtype == expected.dtype
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_names_and_order():
    ours, theirs = twins()
    names = [name for name, _ in ours.named_parameters()]
    assert names == [name for name, _ in theirs.named_parameters()]
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [name for name, _ in ours.named_children()] == [name for name, _ in theirs.named_children()]
    assert len(list(ours.modules())) == len(list(theirs.modules()))


def test_a_state_from_pytorch_loads():
    ours, theirs = twins()
    torch.nn.init.ones_(theirs[0].weight)
    ours.load_state_dict({name: tensor.numpy() for name, tensor in theirs.state_dict().items()})
    assert ours[0].weight.data.tolist() == np.ones((5, 6)).tolist()


@pytest.mark.parametrize("problem", ["missing", "unexpected", "shape"])
def test_both_refuse_the_same_states(problem):
    ours, theirs = twins()
    state = ours.state_dict()
    if problem == "missing":
        del state["0.bias"]
    elif problem == "unexpected":
        state["1.weight"] = np.ones(1, np.float32)
    else:
        state["0.bias"] = np.ones(6, np.float32)
    with pytest.raises(RuntimeError):
        theirs.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()})
    with pytest.raises(RuntimeError, match="1.weight" if problem == "unexpected" else "0.bias"):
        ours.load_state_dict(state)


def test_first_weights_have_the_same_distribution():
    """Quantiles of 50,000 draws agree within one percent of the bound."""
    torch.manual_seed(0)
    ours, theirs = Linear(100, 500, rng=np.random.default_rng(0)), torch.nn.Linear(100, 500)
    at = np.linspace(0, 1, 21)
    got = np.quantile(ours.weight.data, at)
    expected = np.quantile(theirs.weight.detach().numpy(), at)
    assert got.shape == (21,)
    np.testing.assert_allclose(got, expected, atol=2e-3)
    assert np.abs(ours.bias.data).max() <= 0.1 and theirs.bias.abs().max() <= 0.1


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_dropout_leaves_the_same_values(p):
    """Which are dropped is chance; how many and what is left is not."""
    torch.manual_seed(0)
    x = np.full((300, 300), 2, np.float32)
    ours = Dropout(p, rng=np.random.default_rng(0))(Tensor(x)).data
    theirs = torch.nn.Dropout(p)(torch.from_numpy(x)).numpy()
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    np.testing.assert_allclose(np.unique(ours), np.unique(theirs), rtol=1e-6)
    assert abs((ours == 0).mean() - (theirs == 0).mean()) < 0.01

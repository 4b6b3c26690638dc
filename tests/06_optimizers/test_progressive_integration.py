"""Lesson 06 against lessons 01 to 05: real models, moved by real gradients."""

import copy

import numpy as np
import pytest

from tinytorch.core.activations import ReLU
from tinytorch.core.autograd import enable_autograd, no_grad
from tinytorch.core.layers import Linear, Parameter, Sequential
from tinytorch.core.losses import cross_entropy, mse_loss
from tinytorch.core.optimizers import SGD, Adam, AdamW
from tinytorch.core.tensor import Tensor

enable_autograd()

KINDS = {
    "sgd": lambda p: SGD(p, lr=0.05),
    "momentum": lambda p: SGD(p, lr=0.02, momentum=0.9, weight_decay=1e-3),
    "nesterov": lambda p: SGD(p, lr=0.02, momentum=0.9, nesterov=True),
    "adam": lambda p: Adam(p, lr=0.01, weight_decay=1e-3),
    "adamw": lambda p: AdamW(p, lr=0.01),
}


@pytest.fixture(params=KINDS)
def make(request):
    return KINDS[request.param]


def network(seed=0):
    rng = np.random.default_rng(seed)
    return Sequential(Linear(4, 16, rng=rng), ReLU(), Linear(16, 3, rng=rng))


def batch(step=0):
    rng = np.random.default_rng([step, 5])
    x = rng.standard_normal((32, 4)).astype(np.float32)
    return Tensor(x), Tensor(x[:, :3].argmax(axis=1))


def train(model, optimizer, steps, first=0):
    losses = []
    for step in range(first, first + steps):
        x, target = batch(step)
        loss = cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


class TestTrainingANetwork:
    def test_loss_falls(self, make):
        model = network()
        losses = train(model, make(model.parameters()), 150)
        assert np.isfinite(losses).all()
        assert np.mean(losses[-10:]) < 0.75 * np.mean(losses[:10]), f"{losses[0]:.3f} -> {losses[-1]:.3f}"

    def test_parameters_keep_object_array_and_dtype(self, make):
        model = network()
        before = [(id(p), id(p.data), p.dtype) for p in model.parameters()]
        old = model.state_dict()
        train(model, make(model.parameters()), 3)
        assert [(id(p), id(p.data), p.dtype) for p in model.parameters()] == before
        changed = [not np.array_equal(old[name], p.data) for name, p in model.named_parameters()]
        assert len(changed) == 4 and all(changed), f"which parameters moved: {changed}"

    def test_state_is_float32_also_with_a_float64_learning_rate(self, make):
        model = network()
        optimizer = make(model.parameters())
        optimizer.lr = np.float64(0.01)  # what a schedule may hand over
        train(model, optimizer, 2)
        arrays = [v for entry in optimizer.state.values() for v in entry.values() if isinstance(v, np.ndarray)]
        assert all(a.dtype == np.float32 for a in arrays)
        assert all(p.dtype == np.float32 for p in model.parameters())

    def test_float64_parameters_stay_float64(self, make):
        weight = Parameter(np.array([1.0, 2.0]), dtype=np.float64)
        optimizer = make([weight])
        for _ in range(3):
            optimizer.zero_grad()
            mse_loss(weight * 2, Tensor([1.0, 1.0], dtype=np.float64)).backward()
            optimizer.step()
        assert weight.dtype == np.float64 and not np.array_equal(weight.data, [1, 2])


class TestWhatIsLeftAlone:
    def test_parameter_without_gradient_does_not_move(self, make):
        model = network()
        frozen = model[0]
        for parameter in frozen.parameters():
            parameter.requires_grad = False
        before = frozen.weight.data.copy()
        moved_before = model[2].weight.data.copy()
        optimizer = make(model.parameters())
        train(model, optimizer, 3)
        assert np.array_equal(frozen.weight.data, before)
        assert not np.array_equal(model[2].weight.data, moved_before)
        assert 0 not in optimizer.state and optimizer.state[2]["step"] == 3

    def test_step_leaves_gradients_alone(self, make):
        model = network()
        optimizer = make(model.parameters())
        x, target = batch()
        cross_entropy(model(x), target).backward()
        grads = [p.grad.data.copy() for p in model.parameters()]
        optimizer.step()
        assert all(np.array_equal(p.grad.data, g) for p, g in zip(model.parameters(), grads))
        optimizer.zero_grad()
        assert [p.grad for p in model.parameters()] == [None] * 4

    def test_parameters_that_are_not_contiguous_move(self, make):
        base = np.ones((3, 200_000), np.float32)
        weight, plain = Parameter(np.zeros(1)), Parameter(np.ones((3, 200_000)))
        weight.data = base.T
        for optimizer, parameter in ((make([weight]), weight), (make([plain]), plain)):
            parameter.grad = Tensor(np.ones(parameter.shape))
            optimizer.step()
        assert not np.array_equal(base, np.ones_like(base)), "the memory behind the view must change"
        assert np.array_equal(base, plain.data), "a transposed weight moves like any other"


class TestResuming:
    def test_resumed_run_is_bitwise_the_same(self, make):
        model = network()
        optimizer = make(model.parameters())
        train(model, optimizer, 5)
        weights, saved = model.state_dict(), optimizer.state_dict()
        expected = train(model, optimizer, 5, first=5)
        other = network(seed=9)
        other.load_state_dict(weights)
        resumed = make(other.parameters())
        resumed.load_state_dict(saved)
        assert train(other, resumed, 5, first=5) == expected

    def test_state_is_a_copy_both_ways(self, make):
        model = network()
        optimizer = make(model.parameters())
        train(model, optimizer, 2)
        saved = optimizer.state_dict()
        frozen = copy.deepcopy(saved)
        optimizer.load_state_dict(saved)
        train(model, optimizer, 2)
        assert saved["settings"] == frozen["settings"]
        for index, entry in frozen["state"].items():
            for name, value in entry.items():
                assert np.array_equal(saved["state"][index][name], value), f"{index}.{name} changed"

    def test_state_of_another_kind_or_shape_is_refused(self):
        model = network()
        adam = Adam(model.parameters())
        train(model, adam, 1)
        with pytest.raises(ValueError, match="Adam.*SGD"):
            SGD(model.parameters(), lr=0.1).load_state_dict(adam.state_dict())
        other = Adam(Linear(4, 5).parameters(), lr=0.5)
        with pytest.raises(ValueError, match=r"shape \(16, 4\), needed \(5, 4\)"):
            other.load_state_dict(adam.state_dict())
        assert other.state == {} and other.lr == 0.5
        for foreign in ({}, model.state_dict()):
            with pytest.raises(ValueError, match="no state of an optimizer"):
                other.load_state_dict(foreign)

    def test_momentum_may_be_switched_on_later(self):
        p = Parameter([1.0])
        optimizer = SGD([p], lr=0.5)
        for momentum in (0, 0.9, 0.9):
            optimizer.momentum, p.grad = momentum, Tensor([1.0])
            optimizer.step()
        assert np.allclose(p.data, 1 - 0.5 * (1 + 1 + 1.9)), f"got {p.data}"

    def test_weights_from_one_array_move_apart(self):
        """Oracle: the same weights from arrays of their own."""
        array, moved = np.ones(3, np.float32), []
        for shared in (True, False):
            pair = [Tensor(array if shared else array.copy(), requires_grad=True) for _ in range(2)]
            kinds = SGD(pair[:1], lr=0.1), AdamW(pair[1:], lr=0.1, weight_decay=0.1)
            for _ in range(3):
                for p, optimizer in zip(pair, kinds):
                    p.grad = Tensor([1.0, -2.0, 0.5])
                    optimizer.step()
            moved.append([p.tolist() for p in pair])
        assert moved[0] == moved[1] and array.tolist() == [1, 1, 1]

    def test_by_hand_inside_no_grad(self):
        """Oracle: SGD. `w -= lr * w.grad` is how a training loop is first written."""
        by_hand, by_sgd = (Parameter([1.0, -2.0]) for _ in range(2))
        optimizer = SGD([by_sgd], lr=0.1)
        for _ in range(3):
            for w in (by_hand, by_sgd):
                w.zero_grad()
                (w * w).sum().backward()
            with no_grad():
                by_hand -= 0.1 * by_hand.grad
            optimizer.step()
        assert isinstance(by_hand, Parameter) and np.array_equal(by_hand.data, by_sgd.data)


class TestRefusals:
    @pytest.mark.parametrize(
        ("build", "words"),
        [
            (lambda p: SGD([], lr=0.1), "no parameters"),
            (lambda p: SGD([p, p], lr=0.1), "twice"),
            (lambda p: SGD([p], lr=-0.1), "lr"),
            (lambda p: SGD([p], lr=0.1, nesterov=True), "nesterov"),
            (lambda p: SGD([p], lr=0.1, momentum=-1), "momentum"),
            (lambda p: Adam([p], betas=(0.9, 1.0)), "betas"),
            (lambda p: AdamW([p], eps=-1), "eps"),
            (lambda p: SGD([p * 2], lr=0.1), "computed from other Tensors"),
        ],
    )
    def test_wrong_settings_are_named(self, build, words):
        with pytest.raises(ValueError, match=words):
            build(Parameter([1.0]))

    @pytest.mark.parametrize(
        "wrong",
        [Parameter([1.0, 2.0]), Linear(2, 2), [np.ones(2)], Linear(2, 2).named_parameters(), [{"params": []}]],
        ids=["one weight", "a model", "arrays", "names and weights", "groups"],
    )
    def test_what_is_no_list_of_parameters(self, wrong):
        with pytest.raises(TypeError, match=r"model\.parameters\(\)"):
            SGD(wrong, lr=0.1)

    def test_a_frozen_weight_may_be_passed_and_does_not_move(self):
        frozen, p = Parameter([1.0], requires_grad=False), Parameter([1.0])
        optimizer = AdamW([frozen, p], lr=0.1)
        (frozen * p).sum().backward()
        optimizer.step()
        assert frozen.tolist() == [1.0] and p.tolist() != [1.0]

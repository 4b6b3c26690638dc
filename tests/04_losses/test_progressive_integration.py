"""Lesson 04 against lessons 01 to 03: losses of Tensors that come out of layers."""

import math
import warnings

import numpy as np
import pytest

from tinytorch.core.activations import ReLU, sigmoid
from tinytorch.core.layers import Linear, Module, Sequential
from tinytorch.core.losses import (
    BCELoss,
    BCEWithLogitsLoss,
    CrossEntropyLoss,
    MSELoss,
    binary_cross_entropy,
    binary_cross_entropy_with_logits,
    cross_entropy,
    mse_loss,
)
from tinytorch.core.tensor import Tensor, plug_in


def surprise(scores, wanted):
    """-log softmax of one row in plain Python, without the row's largest score in an exp."""
    largest = max(scores)
    return largest + math.log(sum(math.exp(s - largest) for s in scores)) - scores[wanted]


def mean_surprise(logits, target, ignore_index=-100):
    rows, ids = logits.reshape(-1, logits.shape[-1]).tolist(), np.reshape(target, -1).tolist()
    terms = [surprise(row, i) for row, i in zip(rows, ids, strict=True) if i != ignore_index]
    return sum(terms) / len(terms)


def number(loss):
    """The value of a loss that must be one float32 number."""
    assert isinstance(loss, Tensor)
    assert (loss.shape, loss.dtype) == ((), np.float32)
    return loss.item()


class TestAgainstSlowLoops:
    @pytest.mark.parametrize("shape", [(5,), (6, 5), (2, 3, 5), (2, 2, 3, 5)])
    def test_cross_entropy(self, shape):
        rng = np.random.default_rng(0)
        logits = rng.standard_normal(shape).astype(np.float32) * 3
        target = rng.integers(0, shape[-1], shape[:-1])
        value = number(cross_entropy(Tensor(logits), Tensor(target)))
        assert value == pytest.approx(mean_surprise(logits, target), rel=1e-5)

    def test_mse(self):
        p, t = np.random.default_rng(1).standard_normal((2, 3, 4)).astype(np.float32)
        expected = sum((a - b) ** 2 for a, b in zip(p.ravel().tolist(), t.ravel().tolist())) / 12
        assert number(mse_loss(Tensor(p), Tensor(t))) == pytest.approx(expected, rel=1e-5)

    def test_binary_by_probability_and_by_logit(self):
        rng = np.random.default_rng(2)
        x, t = rng.standard_normal((3, 4)).astype(np.float32) * 2, rng.random((3, 4)).astype(np.float32)
        pairs = list(zip(x.ravel().tolist(), t.ravel().tolist()))
        expected = sum(math.log(1 + math.exp(a)) - a * b for a, b in pairs) / 12
        assert number(binary_cross_entropy_with_logits(Tensor(x), Tensor(t))) == pytest.approx(expected, rel=1e-5)
        assert number(binary_cross_entropy(sigmoid(Tensor(x)), Tensor(t))) == pytest.approx(expected, rel=1e-5)

    def test_two_classes_are_the_binary_case(self):
        x = np.linspace(-3, 3, 7, dtype=np.float32)
        two, t = np.stack([np.zeros(7, np.float32), x], axis=1), np.array([0, 1, 0, 1, 1, 0, 1])
        value = number(cross_entropy(Tensor(two), t))
        assert value == pytest.approx(number(binary_cross_entropy_with_logits(Tensor(x), t)), rel=1e-5)


class TestIgnoredTargets:
    def test_padding_changes_nothing(self):
        rng = np.random.default_rng(3)
        logits, target = rng.standard_normal((2, 4, 5)).astype(np.float32), rng.integers(0, 5, (2, 4))
        longer = np.concatenate([logits, rng.standard_normal((2, 3, 5)).astype(np.float32) * 100], axis=1)
        padded = np.concatenate([target, np.full((2, 3), -100)], axis=1)
        expected = number(cross_entropy(Tensor(logits), target))
        assert number(cross_entropy(Tensor(longer), padded)) == pytest.approx(expected, rel=1e-6)
        assert expected == pytest.approx(mean_surprise(longer, padded), rel=1e-5)

    @pytest.mark.parametrize("ignore_index", [-100, -1, 0, 2])
    def test_any_index_can_be_ignored(self, ignore_index):
        logits = np.random.default_rng(4).standard_normal((5, 3)).astype(np.float32)
        target = np.array([1, ignore_index, 1, 2, 0])
        value = number(CrossEntropyLoss(ignore_index)(Tensor(logits), target))
        assert value == pytest.approx(mean_surprise(logits, target, ignore_index), rel=1e-5)

    def test_nothing_left_is_an_error(self):
        with pytest.raises(ValueError, match="nothing to average"):
            cross_entropy(Tensor(np.ones((2, 3))), np.full(2, -100))

    @pytest.mark.parametrize("dtype", [np.int8, np.int32, np.int64, np.uint8])
    def test_any_integer_dtype(self, dtype):
        logits = np.random.default_rng(5).standard_normal((3, 4)).astype(np.float32)
        target = np.array([3, 0, 2], dtype)
        assert number(cross_entropy(Tensor(logits), target)) == pytest.approx(mean_surprise(logits, target), rel=1e-5)


class TestFarOut:
    """Where the model is most wrong the loss is finite, exact and silent."""

    @pytest.mark.parametrize("size", [100, 1e4, 1e6])
    def test_losses_grow_with_the_logit(self, size):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            values = [
                number(cross_entropy(Tensor([[size, 0.0]]), np.array([1]))),
                number(cross_entropy(Tensor([[size, -size]]), np.array([1]))) / 2,
                number(binary_cross_entropy_with_logits(Tensor([size]), np.array([0]))),
                number(binary_cross_entropy_with_logits(Tensor([-size]), np.array([1]))),
            ]
        np.testing.assert_allclose(values, [size] * 4, rtol=1e-6)

    def test_sure_and_right_is_zero(self):
        values = [
            number(cross_entropy(Tensor([[1e4, 0.0]]), np.array([0]))),
            number(binary_cross_entropy_with_logits(Tensor([1e4, -1e4]), np.array([1, 0]))),
            number(binary_cross_entropy(Tensor([1.0, 0.0]), np.array([1, 0]))),
            number(mse_loss(Tensor([1e4]), np.array([10_000]))),
        ]
        assert values == [0, 0, 0, 0]

    def test_a_probability_of_zero_costs_one_hundred(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert number(binary_cross_entropy(Tensor([0.0, 1.0]), np.array([1, 0]))) == 100

    def test_a_hidden_class(self):
        logits = Tensor([[-np.inf, 0.0, 0.0]])
        assert number(cross_entropy(logits, np.array([1]))) == pytest.approx(math.log(2))
        assert number(cross_entropy(logits, np.array([0]))) == math.inf


class TestMistakesAreNamed:
    @pytest.mark.parametrize("loss", [mse_loss, binary_cross_entropy, binary_cross_entropy_with_logits])
    @pytest.mark.parametrize("shapes", [((3, 1), (3,)), ((2, 3), (3,)), ((2, 3), (3, 2)), ((2,), ())])
    def test_shapes_that_differ(self, loss, shapes):
        with pytest.raises(ValueError) as caught:
            loss(Tensor(np.full(shapes[0], 0.5)), np.full(shapes[1], 0.5))
        assert all(str(shape) in str(caught.value) for shape in shapes), caught.value

    @pytest.mark.parametrize("loss", [mse_loss, binary_cross_entropy, binary_cross_entropy_with_logits])
    def test_nothing_to_average(self, loss):
        with pytest.raises(ValueError, match="nothing to average"):
            loss(Tensor(np.zeros((0, 3))), np.zeros((0, 3)))

    @pytest.mark.parametrize("shapes", [((2, 3), (3,)), ((2, 4, 3), (2, 3)), ((2, 3), (2, 1)), ((), ())])
    def test_cross_entropy_shapes(self, shapes):
        with pytest.raises(ValueError) as caught:
            cross_entropy(Tensor(np.zeros(shapes[0])), np.zeros(shapes[1], int))
        assert all(str(shape) in str(caught.value) for shape in shapes), caught.value

    @pytest.mark.parametrize("target", [3, -1, -99])
    def test_a_class_that_does_not_exist(self, target):
        with pytest.raises(IndexError, match=f"target {target} is out of range.*0 to 2"):
            cross_entropy(Tensor(np.zeros((2, 3))), np.array([0, target]))

    def test_targets_that_are_no_class_numbers(self):
        with pytest.raises(ValueError, match="integers"):
            cross_entropy(Tensor(np.zeros((2, 2))), np.array([0.0, 1.0]))

    @pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
    def test_values_that_are_no_probability(self, value):
        good = np.array([0.5, 0.5])
        with pytest.raises(ValueError, match="probabilities.*logits"):
            binary_cross_entropy(Tensor([0.5, value]), good)
        for loss in (binary_cross_entropy, binary_cross_entropy_with_logits):
            with pytest.raises(ValueError, match="targets lie between 0 and 1"):
                loss(Tensor([0.5, 0.5]), np.array([0.5, value]))


class TestTogetherWithLayers:
    def test_losses_are_modules_without_parameters(self):
        for loss in (MSELoss(), CrossEntropyLoss(), BCELoss(), BCEWithLogitsLoss()):
            assert isinstance(loss, Module) and loss.parameters() == []

    def test_modules_equal_functions(self):
        x, t = Tensor([[0.25, 0.5], [0.75, 0.125]]), np.array([[0, 1], [1, 1]])
        for module, function in [(MSELoss, mse_loss), (BCELoss, binary_cross_entropy),
                                 (BCEWithLogitsLoss, binary_cross_entropy_with_logits)]:
            assert number(module()(x, t)) == number(function(x, t)) > 0
        assert number(CrossEntropyLoss()(x, np.array([0, 1]))) == number(cross_entropy(x, np.array([0, 1]))) > 0

    def test_one_operation_passes_the_door(self):
        seen = []
        record = {"record": lambda self, op, inputs, params, output: seen.append((op.__name__, params))}
        previous = plug_in(type("Recorder", (), record)())
        try:
            cross_entropy(Tensor(np.zeros((2, 3))), np.array([0, 7]), ignore_index=7)
            mse_loss(Tensor([1.0]), [2.0])
        finally:
            plug_in(previous)
        assert seen == [("cross_entropy_array", {"ignore_index": 7}), ("mse_array", {})]

    def test_integers_do_not_widen_and_float64_stays(self):
        assert number(mse_loss(Tensor([1, 2]), np.array([1, 4]))) == 2
        wide = mse_loss(Tensor([1.0], dtype=np.float64), np.array([0.5]))
        assert (wide.dtype, wide.item()) == (np.float64, 0.25)

    def test_a_step_downhill_lowers_the_loss(self):
        """Without an engine: nudge one weight at a time and keep what helps."""
        rng = np.random.default_rng(6)
        model = Sequential(Linear(2, 4, rng=rng), ReLU(), Linear(4, 2, rng=rng))
        x, t = Tensor([[0, 0], [0, 1], [1, 0], [1, 1]]), np.array([0, 1, 1, 0])
        first = best = number(cross_entropy(model(x), t))
        for _ in range(300):
            parameter = model.parameters()[rng.integers(4)]
            old = parameter.data.copy()
            parameter.data[...] += rng.standard_normal(parameter.shape).astype(np.float32) * 0.3
            value = number(cross_entropy(model(x), t))
            if value < best:
                best = value
            else:
                parameter.data[...] = old
        assert best < 0.5 * first, f"the loss went from {first} to {best}"

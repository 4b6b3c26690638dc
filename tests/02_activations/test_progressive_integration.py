"""Lesson 02 against lesson 01: activations as operations on Tensors, safe for large numbers, and as modules."""

import math
import warnings

import numpy as np
import pytest

from tinytorch.core.activations import (
    GELU,
    ReLU,
    Sigmoid,
    SiLU,
    Softmax,
    Tanh,
    gelu,
    log_softmax,
    relu,
    sigmoid,
    silu,
    softmax,
    tanh,
)
from tinytorch.core.tensor import Tensor, plug_in


def gelu_number(v):
    return 0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))


FORMULAS = {
    relu: lambda v: max(v, 0.0),
    sigmoid: lambda v: 1 / (1 + math.exp(-v)),
    tanh: math.tanh,
    gelu: gelu_number,
    silu: lambda v: v / (1 + math.exp(-v)),
}
MODULES = {ReLU: relu, Sigmoid: sigmoid, Tanh: tanh, GELU: gelu, SiLU: silu, Softmax: softmax}
EVERY = [*FORMULAS, softmax, log_softmax]


def named(function):
    return getattr(function, "__name__", str(function))


class Recorder:
    """An engine that writes down what passes the door."""

    def __init__(self):
        self.seen = []

    def record(self, op, inputs, params, output):
        self.seen.append((op.__name__, inputs, params, output))


class TestAgainstFormulas:
    """The oracle is the textbook formula on one Python number at a time."""

    @pytest.mark.parametrize("function", FORMULAS, ids=named)
    def test_equals_the_formula(self, function):
        x = np.linspace(-6, 6, 49, dtype=np.float32).reshape(7, 7)
        got = function(Tensor(x))
        expected = np.array([FORMULAS[function](v) for v in x.ravel().tolist()]).reshape(7, 7)
        assert got.shape == (7, 7)
        np.testing.assert_allclose(got.data, expected, rtol=1e-5, atol=2e-7)

    @pytest.mark.parametrize("dim", [0, 1, 2, -1, -3])
    def test_softmax_along_any_dimension(self, dim):
        x = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
        exps = np.exp(x.astype(np.float64))
        expected = exps / exps.sum(axis=dim, keepdims=True)
        shares, logs = softmax(Tensor(x), dim=dim), log_softmax(Tensor(x), dim=dim)
        assert shares.shape == logs.shape == (2, 3, 4)
        np.testing.assert_allclose(shares.data, expected, rtol=1e-5)
        np.testing.assert_allclose(logs.data, np.log(expected), rtol=1e-5, atol=1e-6)

    def test_composes_with_the_arithmetic_of_lesson_01(self):
        x = np.random.default_rng(1).standard_normal((4, 3)).astype(np.float32)
        through = (relu(Tensor(x)) - relu(-Tensor(x))).data
        assert through.shape == (4, 3)
        np.testing.assert_array_equal(through, x)
        np.testing.assert_allclose((silu(Tensor(x)) / Tensor(x)).data, sigmoid(Tensor(x)).data, rtol=1e-5)


class TestLargeNumbers:
    """No overflow, no warning, no NaN."""

    @pytest.mark.parametrize("function", EVERY, ids=named)
    @pytest.mark.parametrize("scale", [1e2, 1e4, 1e6])
    def test_large_inputs_are_finite_and_silent(self, function, scale):
        x = np.array([[-1, -0.5, 0, 1], [1, 1, 1, 1]], np.float32) * np.float32(scale)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            got = function(Tensor(x)).data
        assert got.shape == (2, 4)
        assert np.isfinite(got).all()

    def test_sigmoid_keeps_small_shares(self):
        got = sigmoid(Tensor([-20.0, -80.0])).data
        np.testing.assert_allclose(got, [math.exp(-20), math.exp(-80)], rtol=1e-5)

    def test_log_softmax_keeps_what_softmax_loses(self):
        x = Tensor([[0.0, -200.0, -1e4]])
        assert softmax(x).data[0].tolist() == [1, 0, 0]
        np.testing.assert_allclose(log_softmax(x).data, [[0, -200, -1e4]])

    def test_hidden_scores_and_hidden_rows(self):
        x = Tensor([[-np.inf, 1.0, 1.0], [-np.inf, -np.inf, -np.inf]])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            shares, logs = softmax(x).data, log_softmax(x).data
        assert shares.tolist() == [[0, 0.5, 0.5], [0, 0, 0]]
        assert np.isneginf(logs).tolist() == [[True, False, False], [True, True, True]]

    @pytest.mark.parametrize("function", EVERY, ids=named)
    def test_nan_is_not_hidden(self, function):
        assert np.isnan(function(Tensor([[np.nan, np.nan]])).data).all()


class TestDtypeAndShape:
    @pytest.mark.parametrize("function", EVERY, ids=named)
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_floating_dtype_is_kept(self, function, dtype):
        got = function(Tensor(np.linspace(-2, 2, 6).reshape(2, 3), dtype=dtype))
        assert (got.dtype, got.shape) == (dtype, (2, 3))

    @pytest.mark.parametrize("function", EVERY, ids=named)
    def test_integers_never_become_float64(self, function):
        got = function(Tensor([1, 2, 3]))
        assert got.dtype == (np.int64 if function is relu else np.float32)

    @pytest.mark.parametrize("function", FORMULAS, ids=named)
    def test_single_numbers_and_empty_tensors(self, function):
        one = function(Tensor(2.0))
        assert (one.shape, one.dtype) == ((), np.float32)
        assert one.item() == pytest.approx(FORMULAS[function](2.0), rel=1e-5)
        assert function(Tensor(np.zeros((0, 3)))).shape == (0, 3)

    @pytest.mark.parametrize("function", EVERY, ids=named)
    def test_the_input_is_not_changed(self, function):
        x = np.linspace(-3, 3, 12, dtype=np.float32).reshape(3, 4)
        before = x.copy()
        result = function(Tensor(x))
        assert np.array_equal(x, before)
        assert not np.shares_memory(result.data, x)

    def test_views_that_are_not_contiguous(self):
        x = np.random.default_rng(2).standard_normal((4, 6)).astype(np.float32)
        for function in EVERY:
            np.testing.assert_allclose(function(Tensor(x.T[::2])).data, function(Tensor(x.T[::2].copy())).data)


class TestDoorAndModules:
    @pytest.mark.parametrize("function", EVERY, ids=named)
    def test_one_operation_passes_the_door(self, function):
        recorder, x = Recorder(), Tensor([[1.0, 2.0]])
        previous = plug_in(recorder)
        try:
            result = function(x)
        finally:
            plug_in(previous)
        assert len(recorder.seen) == 1, f"{named(function)} sent {[entry[0] for entry in recorder.seen]}"
        name, inputs, params, output = recorder.seen[0]
        assert name == named(function) + "_array"
        assert inputs[0] is x and output is result
        assert params == ({"dim": -1} if function in (softmax, log_softmax) else {})

    @pytest.mark.parametrize("module", MODULES, ids=named)
    def test_module_equals_function(self, module):
        x, made = Tensor(np.linspace(-2, 2, 8).reshape(2, 4)), module()
        expected = MODULES[module](x).data
        assert expected.shape == (2, 4)
        assert np.array_equal(made(x).data, expected)
        assert np.array_equal(made.forward(x).data, expected)
        assert made.parameters() == []
        assert module.__name__ in repr(made)

    def test_softmax_modules_keep_their_own_dim(self):
        x, first, second = Tensor(np.arange(6.0).reshape(2, 3)), Softmax(dim=0), Softmax()
        np.testing.assert_allclose(first(x).data.sum(axis=0), np.ones(3), rtol=1e-6)
        np.testing.assert_allclose(second(x).data.sum(axis=1), np.ones(2), rtol=1e-6)

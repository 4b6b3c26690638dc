"""Lesson 03 against lessons 01 and 02: layers, the walk through a model, saving and loading, the two modes."""

import math
import pickle

import numpy as np
import pytest

from tinytorch.core import layers
from tinytorch.core.activations import GELU, ReLU, Softmax
from tinytorch.core.layers import Dropout, Linear, Module, Parameter, Sequential, linear_array
from tinytorch.core.tensor import Tensor, default_rng, manual_seed, plug_in


class Block(Module):
    """Two linear layers, an activation, and things that are no parameters."""

    def __init__(self, width, rng=None):
        self.inner, self.activation = Linear(width, 2 * width, rng=rng), GELU()
        self.outer = Linear(2 * width, width, bias=False, rng=rng)
        self.width, self.constant, self.nothing = width, Tensor([1.0]), None

    def forward(self, x):
        return x + self.outer(self.activation(self.inner(x)))


class Stack(Module):
    """A parameter of its own, a list of blocks, and a head that shares a weight with the first block."""

    def __init__(self, width=4, depth=2, seed=0):
        rng = np.random.default_rng(seed)
        self.blocks = [Block(width, rng) for _ in range(depth)]
        self.scale = Parameter(np.ones(width))
        self.head = Linear(width, 2 * width, rng=rng)
        self.head.weight = self.blocks[0].inner.weight

    def forward(self, x):
        for each in self.blocks:
            x = each(x)
        return self.head(x * self.scale)


NAMES = ["scale", "blocks.0.inner.weight", "blocks.0.inner.bias", "blocks.0.outer.weight",
         "blocks.1.inner.weight", "blocks.1.inner.bias", "blocks.1.outer.weight", "head.bias"]


class TestLinear:
    @pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 5, 3), (2, 1, 4, 3), (0, 3), (2, 0, 3)])
    @pytest.mark.parametrize("bias", [True, False])
    def test_equals_a_slow_loop(self, shape, bias):
        layer = Linear(3, 2, bias=bias, rng=np.random.default_rng(1))
        x = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
        y = layer(Tensor(x))
        assert (y.shape, y.dtype) == ((*shape[:-1], 2), np.float32)
        for index in np.ndindex(*shape[:-1]):
            for out in range(2):
                terms = [float(a) * float(b) for a, b in zip(x[index], layer.weight.data[out])]
                expected = sum(terms) + (float(layer.bias.data[out]) if bias else 0)
                assert y.data[(*index, out)] == pytest.approx(expected, rel=1e-5, abs=1e-6)

    def test_views_give_the_same_as_copies(self):
        layer, x = Linear(3, 2), np.random.default_rng(3).standard_normal((3, 5, 4)).astype(np.float32)
        view = np.swapaxes(x, 0, 2)
        np.testing.assert_allclose(layer(Tensor(view)).data, layer(Tensor(view.copy())).data, rtol=1e-6)

    def test_initial_values(self):
        layer = Linear(64, 500, rng=np.random.default_rng(4))
        assert layer.weight.shape == (500, 64) and layer.bias.shape == (500,)
        for parameter in (layer.weight, layer.bias):
            assert isinstance(parameter, Parameter) and parameter.requires_grad
            assert parameter.dtype == np.float32
            assert np.abs(parameter.data).max() <= 1 / 8 + 1e-7
            assert parameter.data.std() == pytest.approx(1 / 8 / math.sqrt(3), rel=0.1)

    def test_seeds(self):
        one, same, other = (Linear(5, 5, rng=np.random.default_rng(seed)).weight.data for seed in (1, 1, 2))
        assert np.array_equal(one, same) and not np.array_equal(one, other)
        state = default_rng().bit_generator.state
        try:
            manual_seed(3)
            one = Linear(5, 5).weight.data
            manual_seed(3)
            assert np.array_equal(one, Linear(5, 5).weight.data)
        finally:
            default_rng().bit_generator.state = state

    def test_integers_and_float64(self):
        layer = Linear(3, 2)
        assert layer(Tensor([[1, 2, 3]])).dtype == np.float32
        assert linear_array(np.ones((1, 3)), np.ones((2, 3)), np.ones(2)).dtype == np.float64

    @pytest.mark.parametrize("dtype, rtol", [(np.float32, 1e-5), (np.float64, 1e-13)])
    @pytest.mark.parametrize("count", [0, 1, 2, 4, 5, 16, 64, 65, 200])
    @pytest.mark.parametrize("small", [layers.SMALL_PRODUCT, 1000])
    def test_any_number_of_rows(self, small, count, dtype, rtol, monkeypatch):
        """The product goes other ways for few rows; here also with a weight that is a view, columns apart,
        and in blocks of a few outputs."""
        monkeypatch.setattr(layers, "SMALL_PRODUCT", small)
        rng = np.random.default_rng(count)
        rows, wide = rng.standard_normal((count, 24)).astype(dtype), rng.standard_normal((40, 48)).astype(dtype)
        for weight in (wide[:, :24].copy(), wide[:, ::2], wide[:24].T[:, :24]):
            expected = np.array([[math.fsum(row * column) for column in weight.astype(np.float64)]
                                 for row in rows.astype(np.float64)]).reshape(count, len(weight))
            y = linear_array(rows, weight)
            assert y.shape == (count, len(weight)) and y.dtype == dtype
            np.testing.assert_allclose(y, expected, rtol=rtol, atol=10 * rtol)

    @pytest.mark.parametrize("shape", [(), (4,), (3, 4), (3, 2)])
    def test_wrong_input_is_named(self, shape):
        with pytest.raises(ValueError, match="in_features=3"):
            Linear(3, 2)(Tensor(np.ones(shape)))

    def test_one_operation_passes_the_door(self):
        seen, layer, x = [], Linear(3, 2), Tensor(np.ones((1, 3)))
        engine = type("Recorder", (), {"record": lambda self, op, inputs, *rest: seen.append((op, inputs))})()
        previous = plug_in(engine)
        try:
            layer(x)
        finally:
            plug_in(previous)
        assert len(seen) == 1
        op, inputs = seen[0]
        assert op is linear_array
        assert len(inputs) == 3 and inputs[0] is x and inputs[1] is layer.weight and inputs[2] is layer.bias


class TestWalk:
    def test_names_and_order(self):
        assert [name for name, _ in Stack().named_parameters()] == NAMES
        assert [name for name, _ in Stack().named_parameters("model")] == [f"model.{name}" for name in NAMES]

    def test_shared_parameters_count_once(self):
        model = Stack()
        parameters = model.parameters()
        assert isinstance(parameters, list) and len(parameters) == len(NAMES)
        assert len({id(parameter) for parameter in parameters}) == len(NAMES)
        model.head.weight = Parameter(model.head.weight.data.copy())
        assert [name for name, _ in model.named_parameters()] == [*NAMES[:-1], "head.weight", "head.bias"]

    def test_a_prefix_is_a_path(self):
        """Oracle: torch.nn.Module.named_parameters(prefix="encoder")."""
        model = Sequential(Linear(2, 3), Sequential(Linear(3, 1, bias=False)))
        names = [name for name, _ in model.named_parameters("encoder")]
        assert names == ["encoder.0.weight", "encoder.0.bias", "encoder.1.0.weight"]
        assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias", "1.0.weight"]

    def test_children(self):
        assert [name for name, _ in Stack().named_children()] == ["blocks.0", "blocks.1", "head"]
        assert [name for name, _ in Block(2).named_children()] == ["inner", "activation", "outer"]

    def test_a_part_can_be_exchanged_at_any_time(self):
        model = Stack()
        old, model.blocks[1].outer = model.blocks[1].outer, Sequential(Linear(8, 3), ReLU(), Linear(3, 4))
        names = [name for name, _ in model.named_parameters()]
        assert "blocks.1.outer.weight" not in names
        assert "blocks.1.outer.2.bias" in names
        assert model(Tensor(np.ones((1, 4)))).shape == (1, 8)
        model.blocks[1].outer = old
        assert [name for name, _ in model.named_parameters()] == NAMES

    def test_a_wrapper_may_answer_for_what_it_wraps(self):
        class Wrapper(Module):
            def __init__(self, part):
                self.part = part

            def forward(self, x):
                return self.part(x)

            def named_parameters(self, prefix=""):
                return self.part.named_parameters(prefix)

        model = Stack()
        before = model.state_dict()
        model.blocks[0].inner = Wrapper(model.blocks[0].inner)
        after = model.state_dict()
        assert list(after) == list(before) == NAMES
        assert all(np.array_equal(before[name], after[name]) for name in NAMES)
        assert all(module.training is False for module in model.eval().modules())
        assert model.blocks[0].inner.part.training is False

    def test_modules_visits_each_object_once_and_survives_a_circle(self):
        model = Stack()
        model.again = model.blocks[0]
        kinds = [type(module).__name__ for module in model.modules()]
        assert kinds == ["Stack", *(["Block", "Linear", "GELU", "Linear"] * 2), "Linear"]

    def test_zero_grad(self):
        model = Stack()
        for parameter in model.parameters():
            parameter.grad = Tensor(np.ones(parameter.shape))
        model.zero_grad()
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_a_class_is_no_child_and_no_init_is_needed(self):
        class Plain(Module):
            def forward(self, x):
                return x

        plain = Plain()
        plain.kind = ReLU
        assert list(plain.named_children()) == [] and plain.parameters() == []
        assert plain.training is True and plain.eval().training is False
        assert Plain().training is True

    def test_forward_must_be_written(self):
        class Empty(Module):
            pass

        with pytest.raises(NotImplementedError, match="Empty"):
            Empty()(Tensor([1.0]))


class TestState:
    def test_round_trip_into_another_model(self):
        first, second, x = Stack(seed=1), Stack(seed=2), Tensor(np.linspace(-1, 1, 8).reshape(2, 4))
        expected = first(x).data
        assert expected.shape == (2, 8)
        assert not np.allclose(second(x).data, expected)
        second.load_state_dict(first.state_dict())
        assert np.array_equal(second(x).data, expected)
        assert second.head.weight is second.blocks[0].inner.weight

    def test_a_state_is_a_copy_on_both_sides(self):
        model = Stack()
        state = model.state_dict()
        model.scale.data[...] = 7
        assert state["scale"].tolist() == [1, 1, 1, 1]
        other = Stack()
        other.load_state_dict(state)
        state["scale"][...] = 9
        assert other.scale.data.tolist() == [1, 1, 1, 1]

    def test_loading_writes_into_the_arrays_and_keeps_the_dtype(self):
        layer = Linear(2, 2)
        array = layer.weight.data
        layer.load_state_dict({"weight": np.eye(2, dtype=np.float64), "bias": Tensor([1, 2])})
        assert layer.weight.data is array and array.dtype == np.float32
        assert array.tolist() == [[1, 0], [0, 1]] and layer.bias.data.tolist() == [1, 2]

    def test_all_problems_are_named_and_nothing_is_loaded(self):
        model = Stack()
        before, state = model.state_dict(), Stack(seed=5).state_dict()
        del state["blocks.0.inner.bias"], state["head.bias"]
        state |= {"scale": np.ones(5), "blocks.1.outer.weight": np.ones((8, 4)), "gain": np.ones(1)}
        with pytest.raises(RuntimeError) as caught:
            model.load_state_dict(state)
        words = ["blocks.0.inner.bias", "head.bias", "gain", "scale", "(5,)", "(4,)", "blocks.1.outer.weight",
                 "(8, 4)", "(4, 8)", "missing", "unexpected"]
        absent = [word for word in words if word not in str(caught.value)]
        assert not absent, f"{absent} not in: {caught.value}"
        after = model.state_dict()
        assert all(np.array_equal(before[name], after[name]) for name in NAMES)

    def test_not_strict_takes_what_fits(self):
        model = Stack()
        missing, unexpected = model.load_state_dict({"scale": np.full(4, 3.0), "gain": np.ones(1)}, strict=False)
        assert (missing, unexpected) == (NAMES[1:], ["gain"])
        assert model.scale.data.tolist() == [3, 3, 3, 3]
        with pytest.raises(RuntimeError, match="scale"):
            model.load_state_dict({"scale": np.ones(3)}, strict=False)

    def test_arrays_that_hold_no_numbers(self):
        layer = Linear(1, 1)
        before = layer.state_dict()
        with pytest.raises(RuntimeError, match="not numbers"):
            layer.load_state_dict({"weight": np.array([["a"]]), "bias": np.zeros(1)})
        assert np.array_equal(layer.bias.data, before["bias"])

    def test_a_model_can_be_pickled(self):
        model, x = Stack(), Tensor(np.ones((1, 4)))
        assert np.array_equal(pickle.loads(pickle.dumps(model))(x).data, model(x).data)


class TestModes:
    def test_train_and_eval_reach_everything(self):
        model = Sequential(Linear(2, 2), Sequential(Dropout(0.5), ReLU()))
        assert model.eval() is model
        assert [module.training for module in model.modules()] == [False] * 5
        assert model.train() is model
        assert [module.training for module in model.modules()] == [True] * 5
        assert model.train(False)[1][0].training is False

    def test_dropout_in_training(self):
        layer, x = Dropout(0.25, rng=np.random.default_rng(1)), Tensor(np.full((200, 100), 3.0))
        y = layer(x).data
        assert (y.shape, y.dtype) == ((200, 100), np.float32)
        np.testing.assert_allclose(np.unique(y), [0, 4], rtol=1e-6)
        assert np.mean(y == 0) == pytest.approx(0.25, abs=0.02)
        assert not np.array_equal(y, layer(x).data), "two calls must draw two masks"

    def test_dropout_is_reproducible(self):
        x = Tensor(np.ones((5, 5)))
        one, same = (Dropout(0.5, rng=np.random.default_rng(7))(x).data for _ in range(2))
        assert np.array_equal(one, same)

    def test_dropout_without_effect_draws_nothing(self):
        rng, x = np.random.default_rng(1), Tensor(np.ones((2, 2)))
        layer = Dropout(0.5, rng=rng).eval()
        state = rng.bit_generator.state
        assert layer(x) is x
        assert Dropout(0.0, rng=rng)(x) is x
        assert rng.bit_generator.state == state

    def test_ends_and_dtypes(self):
        x = Tensor(np.ones((3, 3)), dtype=np.float64)
        assert Dropout(1.0)(x).data.tolist() == [[0] * 3] * 3
        assert Dropout(0.5)(x).dtype == np.float64
        assert Dropout(0.5)(Tensor([1, 2, 3])).dtype == np.float32

    @pytest.mark.parametrize("p", [-0.1, 1.1, math.nan])
    def test_p_is_a_probability(self, p):
        with pytest.raises(ValueError, match="probability"):
            Dropout(p)


class TestSequential:
    def test_runs_in_order_with_the_activations_of_lesson_02(self):
        first, last = Linear(3, 4), Linear(4, 2)
        model, x = Sequential(first, ReLU(), last, Softmax()), Tensor(np.eye(3))
        hidden = np.maximum(first.weight.data.T + first.bias.data, 0)
        scores = np.exp(hidden @ last.weight.data.T + last.bias.data)
        y = model(x)
        assert y.shape == (3, 2)
        np.testing.assert_allclose(y.data, scores / scores.sum(axis=1, keepdims=True), rtol=1e-5)

    def test_names_length_and_items(self):
        model = Sequential(Linear(3, 4), ReLU(), Linear(4, 2))
        assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias", "2.weight", "2.bias"]
        assert len(model) == 3 and isinstance(model[1], ReLU) and model[-1] is model[2]

    def test_a_slice_is_a_chain_of_the_same_modules(self):
        model = Sequential(Linear(2, 3), ReLU(), Linear(3, 1))
        front = model[:2]
        assert isinstance(front, Sequential) and len(front) == 2 and front[0] is model[0]
        x = Tensor(np.ones((4, 2)))
        assert np.array_equal(model[2](front(x)).data, model(x).data)

    def test_a_module_can_be_exchanged(self):
        model = Sequential(Linear(3, 4), ReLU())
        setattr(model, "1", GELU())
        assert "GELU" in repr(model) and "ReLU" not in repr(model)
        assert model.eval()(Tensor(np.ones((1, 3)))).shape == (1, 4)

    @pytest.mark.parametrize("wrong", [ReLU, [ReLU()], None, np.tanh])
    def test_what_is_no_module_is_refused(self, wrong):
        with pytest.raises(TypeError, match="Sequential takes modules"):
            Sequential(Linear(1, 1), wrong)

    def test_repr_shows_the_tree(self):
        text = repr(Sequential(Linear(3, 4, bias=False), Sequential(Dropout(0.1))))
        lines = ["Sequential(", "  (0): Linear(3, 4, bias=False)", "  (1): Sequential(", "    (0): Dropout(p=0.1)",
                 "  )", ")"]
        assert text.split("\n") == lines

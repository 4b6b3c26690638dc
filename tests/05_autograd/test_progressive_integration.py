"""Lesson 05 against everything before it: each rule against central differences, then the walk over the graph."""

import gc
import threading
import weakref

import numpy as np
import pytest

from tinytorch.core import activations, layers, losses, tensor
from tinytorch.core.autograd import (
    RULES,
    check_gradients,
    enable_autograd,
    gradient,
    no_grad,
    numeric_gradient,
    topological_order,
    unbroadcast,
)
from tinytorch.core.tensor import Tensor, apply, cat, plug_in, stack

RNG = np.random.default_rng(20)


def normal(*shape):
    return RNG.standard_normal(shape)


def positive(*shape):
    return RNG.uniform(0.5, 2.0, shape)


def share(*shape):
    return RNG.uniform(0.1, 0.9, shape)


# One line per operation that has a rule: the arrays it is called with, and its parameters. A rule that is missing here
# is a failing test (TestEveryRule). tests/property/test_autograd.py adds the operations of later lessons.
CASES = {
    tensor.add_array: [
        ((normal(2, 3), normal(3)), {}),
        ((normal(2, 1), normal(1, 3)), {}),
        ((normal(), normal(2)), {}),
    ],
    tensor.subtract_array: [((normal(2, 3), normal(2, 1)), {}), ((normal(3), normal(2, 3)), {})],
    tensor.multiply_array: [((normal(2, 3), normal(3)), {}), ((normal(4, 1, 3), normal(2, 1)), {})],
    tensor.divide_array: [((normal(2, 3), positive(3)), {}), ((normal(1, 3), positive(2, 1)), {})],
    tensor.power_array: [((positive(2, 3), normal(3)), {}), ((positive(2, 1), normal(1, 3)), {})],
    tensor.negative_array: [((normal(2, 3),), {})],
    tensor.matmul_array: [
        ((normal(2, 3), normal(3, 4)), {}),
        ((normal(5, 2, 3), normal(3, 4)), {}),
        ((normal(5, 2, 3), normal(5, 3, 4)), {}),
        ((normal(2, 3), normal(5, 3, 4)), {}),
        ((normal(5, 1, 2, 3), normal(4, 3, 2)), {}),
        ((normal(3), normal(3)), {}),
        ((normal(3), normal(3, 4)), {}),
        ((normal(2, 3), normal(3)), {}),
        ((normal(5, 2, 3), normal(3)), {}),
        ((normal(3), normal(5, 3, 4)), {}),
    ],
    tensor.sum_array: [
        ((normal(2, 3, 4),), {"dim": d, "keepdim": k}) for d in (None, 1, -1, (0, 2)) for k in (False, True)
    ],
    tensor.mean_array: [
        ((normal(2, 3, 4),), {"dim": d, "keepdim": k}) for d in (None, 1, -1, (0, 2)) for k in (False, True)
    ],
    tensor.max_array: [
        ((normal(2, 3, 4),), {"dim": d, "keepdim": k}) for d in (None, 1, -1, (0, 2)) for k in (False, True)
    ],
    tensor.min_array: [
        ((normal(2, 3, 4),), {"dim": d, "keepdim": k}) for d in (None, 1, -1, (0, 2)) for k in (False, True)
    ],
    tensor.exp_array: [((normal(2, 3),), {})],
    tensor.log_array: [((positive(2, 3),), {})],
    tensor.sqrt_array: [((positive(2, 3),), {})],
    tensor.abs_array: [((positive(2, 3) * [[1], [-1]],), {})],
    tensor.clone_array: [((normal(2, 3),), {})],
    tensor.reshape_array: [((normal(2, 6),), {"shape": (3, -1)}), ((normal(1),), {"shape": ()})],
    tensor.transpose_array: [((normal(2, 3, 4),), {"dim0": 0, "dim1": -1})],
    tensor.permute_array: [((normal(2, 3, 4),), {"dims": (2, 0, 1)}), ((normal(2, 3, 4),), {"dims": (-1, 0, -2)})],
    tensor.squeeze_array: [
        ((normal(2, 1, 3, 1),), {}),
        ((normal(2, 1, 3),), {"dim": 1}),
        ((normal(2, 3),), {"dim": 0}),
    ],
    tensor.unsqueeze_array: [((normal(2, 3),), {"dim": 1}), ((normal(2, 3),), {"dim": -1})],
    tensor.expand_array: [((normal(2, 1, 3),), {"shape": (4, 2, 5, 3)}), ((normal(2, 1),), {"shape": (-1, 3)})],
    tensor.index_array: [
        ((normal(4, 3),), {"key": key})
        for key in (
            1,
            -1,
            slice(None, None, 2),
            (slice(1, 3), 0),
            (Ellipsis, None, 1),
            [0, 0, 2],
            ([1, 1, 3], [2, 2, 0]),
            np.array([[3, 3], [0, 3]]),
            np.array([True, False, True, True]),
            (slice(None), np.array([2, 2])),
        )
    ],
    tensor.cat_array: [
        ((normal(2, 3), normal(4, 3)), {"dim": 0}),
        ((normal(2, 1), normal(2, 3), normal(2, 2)), {"dim": -1}),
    ],
    tensor.stack_array: [((normal(2, 3), normal(2, 3)), {"dim": d}) for d in (0, 1, -1)],
    activations.relu_array: [((positive(3, 4) * [[1], [-1], [1]],), {})],
    activations.sigmoid_array: [((normal(3, 4) * 3,), {})],
    activations.tanh_array: [((normal(3, 4),), {})],
    activations.gelu_array: [((normal(3, 4) * 2,), {})],
    activations.silu_array: [((normal(3, 4) * 2,), {})],
    activations.softmax_array: [((normal(2, 3, 4),), {"dim": d}) for d in (0, 1, -1)],
    activations.log_softmax_array: [((normal(2, 3, 4),), {"dim": d}) for d in (0, 1, -1)],
    layers.linear_array: [
        ((normal(2, 3), normal(4, 3), normal(4)), {}),
        ((normal(5, 2, 3), normal(4, 3)), {}),
        ((normal(3), normal(4, 3)), {}),
    ],
    losses.mse_array: [((normal(2, 3), normal(2, 3)), {})],
    losses.cross_entropy_array: [
        ((normal(4, 3), np.array([0, 2, 1, 1])), {}),
        ((normal(2, 3, 5), np.array([[0, 4, -100], [1, 1, 2]])), {}),
        ((normal(4, 3), np.array([0, 2, 0, 1])), {"ignore_index": 0}),
    ],
    losses.bce_array: [((share(2, 3), share(2, 3)), {})],
    losses.bce_with_logits_array: [((normal(2, 3) * 3, share(2, 3)), {})],
}
MODULES = {module.__name__ for module in (tensor, activations, layers, losses)}
EVERY_CASE = [
    pytest.param(op, arrays, params, id=f"{op.__name__}-{i}")
    for op, cases in CASES.items()
    for i, (arrays, params) in enumerate(cases)
]


def rule_results(op, arrays, params):
    """The output of op and what its rule gives, evaluated, before the engine makes it fit."""
    output = np.asarray(op(*arrays, **params))
    results = RULES[op](np.ones_like(output), output, *arrays, **params)
    return output, [result() if callable(result) else result for result in results]


class TestEveryRule:
    def test_every_rule_has_a_case(self):
        missing = sorted(op.__name__ for op in RULES if op.__module__ in MODULES and op not in CASES)
        assert not missing, f"rules without a numeric check: add {missing} to CASES"

    def test_every_operation_of_lessons_01_to_04_has_a_rule(self):
        missing = sorted(op.__name__ for op in CASES if op not in RULES)
        assert not missing, f"operations without a rule: {missing}"

    @pytest.mark.parametrize("op, arrays, params", EVERY_CASE)
    def test_against_central_differences(self, op, arrays, params):
        check_gradients(lambda *inputs: apply(op, *inputs, **params), *arrays)

    @pytest.mark.parametrize("op, arrays, params", EVERY_CASE)
    def test_float32_stays_float32(self, op, arrays, params):
        narrow = [a.astype(np.float32) if a.dtype.kind == "f" else a for a in arrays]
        output, results = rule_results(op, narrow, params)
        assert output.dtype == np.float32, f"{op.__name__}: float32 became {output.dtype}"
        assert len(results) == len(narrow), f"{op.__name__}: {len(results)} gradients for {len(narrow)} inputs"
        for i, (array, result) in enumerate(zip(narrow, results)):
            if array.dtype == np.float32:
                assert np.asarray(result).dtype == np.float32, f"{op.__name__}: gradient {i} became {result.dtype}"

    @pytest.mark.parametrize("op, arrays, params", EVERY_CASE)
    def test_a_rule_changes_none_of_its_arrays(self, op, arrays, params):
        before = [a.copy() for a in arrays]
        output = np.asarray(op(*arrays, **params))
        grad, kept = np.ones_like(output), output.copy()
        for result in RULES[op](grad, output, *arrays, **params):
            if callable(result):
                result()
        assert all(np.array_equal(a, b) for a, b in zip(arrays, before)), f"the rule of {op.__name__} changed an input"
        assert np.array_equal(output, kept), f"the rule of {op.__name__} changed the output"
        assert (grad == 1).all(), f"the rule of {op.__name__} changed the gradient that arrived"


class TestNumbersByHand:
    def gradient_of(self, work, value):
        x = Tensor(value, requires_grad=True)
        work(x).sum().backward()
        assert x.grad.shape == x.shape and x.grad.dtype == np.float32
        return x.grad.data.tolist()

    def test_reflected_and_negated(self):
        assert self.gradient_of(lambda x: 1.0 - x, [2.0, 3.0]) == [-1.0, -1.0]
        assert self.gradient_of(lambda x: -x, [2.0, 3.0]) == [-1.0, -1.0]
        assert self.gradient_of(lambda x: 8.0 / x, [2.0, 4.0]) == [-2.0, -0.5]
        assert self.gradient_of(lambda x: np.array([3.0, 4.0]) * x, [2.0, 4.0]) == [3.0, 4.0]

    def test_ties_share(self):
        assert self.gradient_of(lambda x: x.max(), [3.0, 1.0, 3.0]) == [0.5, 0.0, 0.5]
        assert self.gradient_of(lambda x: x.max(dim=1), [[1.0, 1.0], [2.0, 5.0]]) == [[0.5, 0.5], [0.0, 1.0]]

    def test_repeated_index(self):
        assert self.gradient_of(lambda x: x[[0, 0, 2]], [1.0, 2.0, 3.0]) == [2.0, 0.0, 1.0]
        assert self.gradient_of(lambda x: x[Tensor([2, 2])], [1.0, 2.0, 3.0]) == [0.0, 0.0, 2.0]

    def test_corners_of_power(self):
        assert self.gradient_of(lambda x: x**2, [0.0, -3.0]) == [0.0, -6.0]
        assert self.gradient_of(lambda x: x**0, [0.0, 2.0]) == [0.0, 0.0]
        assert self.gradient_of(lambda x: x**1, [0.0, 2.0]) == [1.0, 1.0]
        assert self.gradient_of(lambda x: x**3, [0.0, -2.0]) == [0.0, 12.0]
        assert self.gradient_of(lambda x: x ** Tensor([3, 0]), [-2.0, 0.0]) == [12.0, 0.0]
        assert np.allclose(self.gradient_of(lambda x: 2**x, [0.0, 3.0]), np.log(2) * np.array([1, 8]))

    def test_an_input_used_twice_by_one_operation(self):
        assert self.gradient_of(lambda x: x * x, [3.0]) == [6.0]
        assert self.gradient_of(lambda x: x @ x, [1.0, 2.0]) == [2.0, 4.0]
        assert self.gradient_of(lambda x: cat([x, x, x]), [5.0]) == [3.0]
        assert self.gradient_of(lambda x: stack([x, x * 2]), [5.0]) == [3.0]

    def test_broadcast_from_a_scalar(self):
        bias = Tensor(1.0, requires_grad=True)
        (bias + np.zeros((4, 5), dtype=np.float32)).sum().backward()
        assert bias.grad.shape == () and bias.grad.item() == 20.0

    def test_unbroadcast_counts_uses(self):
        for stretched, shape in [((4, 5), (5,)), ((4, 5), (4, 1)), ((2, 4, 5), (1, 5)), ((3,), ())]:
            got = unbroadcast(np.ones(stretched), shape)
            assert got.shape == shape
            assert (got == np.prod(stretched) / np.prod(shape)).all()


class TestGraph:
    def test_diamond(self):
        x = Tensor(3.0, requires_grad=True)
        y = x * x
        (y * y + y).backward()
        assert x.grad.item() == 4 * 27 + 2 * 3

    def test_cost_is_linear_in_the_graph(self):
        calls = []

        def twice_array(a):
            return a + a

        @gradient(twice_array)
        def twice_rule(grad, output, a):
            calls.append(1)
            return (grad + grad,)

        try:
            x = Tensor(1.0, requires_grad=True)
            y = x
            for _ in range(60):
                y = apply(twice_array, y) + y  # 2 ** 60 paths
            y.backward()
        finally:
            del RULES[twice_array]
        assert len(calls) == 60, f"60 operations, but their rules ran {len(calls)} times"
        assert x.grad.item() == 3.0**60 or np.isclose(x.grad.item(), 3.0**60, rtol=1e-4)

    def test_chain_of_20_000(self):
        x = Tensor(1.0, requires_grad=True)
        y = x
        for _ in range(20_000):
            y = y + 0.5
        y.backward()
        assert x.grad.item() == 1.0

    def test_deep_garbage_does_not_crash(self):
        for _ in range(2):
            y = Tensor(1.0, requires_grad=True)
            for _ in range(50_000):
                y = y * 1.0
            del y
        kept = y = Tensor(1.0, requires_grad=True)
        for _ in range(20_000):
            y = y * 1.0
        with pytest.raises(NotImplementedError):
            apply(np.sin, y).backward()
        del y
        assert kept.grad is None, "a refused backward must not leave half a gradient behind"

    def test_topological_order_of_a_random_graph(self):
        rng = np.random.default_rng(3)
        graph = {n: [int(p) for p in rng.integers(0, n, size=min(n, 3))] for n in range(200)}
        order = topological_order(199, graph.get)
        assert order[-1] == 199 and len(order) == len(set(order))
        place = {n: i for i, n in enumerate(order)}
        assert all(place[p] < place[n] for n in order for p in graph[n])

    def test_nothing_waits_for_the_collector(self):
        x = Tensor(np.ones((3, 3)), requires_grad=True)
        middle = (x @ x).exp()
        watch, array = weakref.ref(middle), weakref.ref(middle.data)
        loss = (middle * middle).sum()
        del middle
        gc.collect()
        gc.disable()
        try:
            loss.backward()
            assert watch() is None and array() is None, "the middle of the graph outlived backward()"
            thrown = (x * 2).sum()
            watch = weakref.ref(thrown)
            del thrown
            assert watch() is None, "a loss that was never used holds itself in a cycle"
        finally:
            gc.enable()

    def test_leaves_accumulate_and_own_their_gradient(self):
        a, b = Tensor([1.0, 2.0], requires_grad=True), Tensor([3.0, 4.0], requires_grad=True)
        for _ in range(2):
            (a + b).sum().backward()
        assert a.grad.data.tolist() == [2.0, 2.0]
        assert not np.shares_memory(a.grad.data, b.grad.data)
        a.grad.data *= 10
        assert b.grad.data.tolist() == [2.0, 2.0]
        a.zero_grad()
        assert a.grad is None

    def test_only_leaves_keep_gradients(self):
        x = Tensor([1.0], requires_grad=True)
        y = x * 2
        y.sum().backward()
        assert y.grad is None and x.grad is not None

    def test_what_nobody_wants_is_not_computed(self):
        called = []

        def pair_array(a, b):
            return a + b

        @gradient(pair_array)
        def pair_rule(grad, output, a, b):
            return lambda: called.append("a") or grad, lambda: called.append("b") or grad

        try:
            w = Tensor([1.0], requires_grad=True)
            apply(pair_array, Tensor([1.0]), w).sum().backward()
        finally:
            del RULES[pair_array]
        assert called == ["b"] and w.grad.item() == 1.0


class TestErrors:
    def test_second_backward(self):
        x = Tensor([1.0], requires_grad=True)
        y = (x * x).sum()
        y.backward()
        with pytest.raises(RuntimeError, match="used up.*forward pass again"):
            y.backward()
        shared = x * 3
        (shared * 1).sum().backward()
        before = x.grad.data.copy()
        with pytest.raises(RuntimeError, match="used up"):
            (shared * shared).sum().backward()
        assert (x.grad.data == before).all()

    def test_not_a_scalar(self):
        y = Tensor([1.0, 2.0], requires_grad=True) * 2
        with pytest.raises(RuntimeError, match=r"single number.*\(2,\).*sum\(\) or mean\(\)"):
            y.backward()
        with pytest.raises(ValueError, match=r"\(2,\), got \(3,\)"):
            y.backward(np.ones(3))
        y.backward(Tensor([1.0, 10.0]))

    def test_nothing_requires_a_gradient(self):
        with pytest.raises(RuntimeError, match="requires_grad=True"):
            (Tensor([1.0]) * 2).sum().backward()

    def test_no_rule(self):
        x = Tensor([1.0], requires_grad=True)
        with pytest.raises(NotImplementedError, match=r"sin.*@gradient\(sin\)"):
            apply(np.sin, x).sum().backward()

    def test_a_rule_with_the_wrong_shape(self):
        def odd_array(a):
            return a + 1

        gradient(odd_array)(lambda grad, output, a: (np.ones(7),))
        try:
            with pytest.raises(ValueError, match=r"odd_array gave shape \(7,\) for an input of shape \(2,\)"):
                apply(odd_array, Tensor([1.0, 2.0], requires_grad=True)).sum().backward()
        finally:
            del RULES[odd_array]

    def test_integer_data(self):
        with pytest.raises(TypeError, match="floating data, got int64"):
            Tensor([1, 2], requires_grad=True)
        ids = Tensor([1, 2])
        ids.requires_grad = True  # nobody can stop this, so the walk says it
        with pytest.raises(TypeError, match="int64 cannot hold a gradient"):
            (ids * 0.5).sum().backward()

    def test_without_an_engine(self):
        previous = plug_in(None)
        try:
            with pytest.raises(RuntimeError, match="import tinytorch.core.autograd"):
                Tensor(1.0, requires_grad=True).backward()
        finally:
            plug_in(previous)

    def test_check_gradients_names_the_difference(self):
        with pytest.raises(AssertionError, match=r"input 1 at index \(0, 2\): got .*central differences say"):
            hidden = np.array([[1.0, 1.0, 0.0]])
            check_gradients(lambda a, b: a * (b * hidden + (b * (1 - hidden)).detach()), normal(2, 3), normal(1, 3))

    def test_numeric_gradient_leaves_its_input_alone(self):
        x = normal(3)
        before = x.copy()
        numeric_gradient(lambda a: float((a * a).sum()), x)
        assert np.array_equal(x, before)


class TestNoGrad:
    def test_nested_and_with_errors(self):
        w = Tensor([1.0], requires_grad=True)
        with no_grad():
            with no_grad():
                assert not (w * 2).requires_grad
            assert not (w * 2).requires_grad
        assert (w * 2).requires_grad
        with pytest.raises(KeyError):
            with no_grad():
                raise KeyError
        assert (w * 2).requires_grad

    def test_as_a_decorator(self):
        @no_grad()
        def double(x):
            return x * 2

        w = Tensor([1.0], requires_grad=True)
        assert not double(w).requires_grad and not double(w).requires_grad

    def test_enable_twice(self):
        enable_autograd()
        enable_autograd()
        x = Tensor([2.0], requires_grad=True)
        (x * x).sum().backward()
        assert x.grad.item() == 4.0

    def test_other_threads_go_on_recording(self):
        w, seen = Tensor([1.0], requires_grad=True), []

        def train():
            loss = (w * 3).sum()
            seen.append(loss.requires_grad)
            loss.backward()

        with no_grad():
            thread = threading.Thread(target=train)
            thread.start()
            thread.join()
            assert not (w * 2).requires_grad
        assert seen == [True] and w.grad.item() == 3.0

    def test_detach_cuts(self):
        x = Tensor([3.0], requires_grad=True)
        (x * x.detach()).sum().backward()
        assert x.grad.item() == 3.0
        assert x.copy()._node is None and (x * 2).clone().requires_grad


class TestWithEarlierLessons:
    def test_a_network_against_central_differences(self):
        ids = np.array([2, 0, 1, 2])

        def network(x, w1, b1, w2, b2):
            hidden = activations.gelu(apply(layers.linear_array, x, w1, b1))
            return losses.cross_entropy(apply(layers.linear_array, hidden, w2, b2), ids)

        check_gradients(network, normal(4, 3), normal(5, 3), normal(5), normal(3, 5), normal(3))

    def test_every_parameter_of_a_model_gets_a_gradient(self):
        model = layers.Sequential(layers.Linear(3, 4), activations.Tanh(), layers.Linear(4, 2))
        loss = losses.cross_entropy(model(Tensor(normal(5, 3))), np.array([0, 1, 1, 0, 1]))
        loss.backward()
        assert len(model.parameters()) == 4
        for parameter in model.parameters():
            assert parameter.grad.shape == parameter.shape and parameter.grad.dtype == np.float32
            assert np.abs(parameter.grad.data).max() > 0

    def test_gradient_descent_goes_down(self):
        w = Tensor([[0.0], [0.0]], requires_grad=True)
        x = Tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        for _ in range(400):
            losses.mse_loss(x @ w, Tensor([[2.0], [-1.0], [1.0]])).backward()
            w.data -= 0.2 * w.grad.data
            w.zero_grad()
        assert np.allclose(w.data, [[2.0], [-1.0]], atol=1e-3)

    def test_integer_targets_do_not_widen(self):
        prediction = Tensor([[0.5], [1.5]], requires_grad=True)
        loss = losses.mse_loss(prediction, Tensor([[1], [0]]))
        assert loss.dtype == np.float32
        loss.backward()
        assert prediction.grad.dtype == np.float32

"""Lesson 01 on its own: the Tensor that the package holds, and the door that every operation goes through."""

import copy
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest

from tinytorch.core import tensor
from tinytorch.core.tensor import (
    Socket,
    Tensor,
    apply,
    arange,
    broadcast_shape,
    cat,
    default_rng,
    manual_seed,
    ones,
    plug_in,
    randn,
    stack,
    zeros,
)


class Notebook:
    """An engine that writes down what it hears."""

    def __init__(self):
        self.entries, self.asked = [], []

    def record(self, op, inputs, params, output):
        self.entries.append((op, inputs, params, output))

    def backward(self, start, gradient):
        self.asked.append((start, gradient))


@pytest.fixture
def notebook():
    engine = Notebook()
    previous = plug_in(engine)
    yield engine
    plug_in(previous)


def same(got, expected):
    """Shape first, then dtype, then values."""
    expected = np.asarray(expected)
    assert isinstance(got, Tensor), f"got {type(got).__name__}"
    assert got.shape == expected.shape, f"got shape {got.shape}, expected {expected.shape}"
    assert np.allclose(got.data, expected, rtol=1e-6, atol=1e-6), f"got {got.data}, expected {expected}"


X = np.array([[1.0, -2.0, 3.0], [4.0, 5.0, -6.0]])


class TestData:
    @pytest.mark.parametrize(
        "data, dtype",
        [
            (1.5, np.float32),
            ([1.0, 2.0], np.float32),
            (np.ones(2), np.float32),
            (np.ones(2, np.float16), np.float32),
            (3, np.int64),
            ([1, 2], np.int64),
            (True, bool),
            (np.zeros(2, np.uint8), np.uint8),
            ([], np.float32),
        ],
    )
    def test_dtypes(self, data, dtype):
        assert Tensor(data).dtype == dtype

    def test_a_dtype_that_is_asked_for_stays(self):
        assert Tensor([1.0], dtype=np.float64).dtype == np.float64
        assert Tensor([1, 2], dtype=np.float32).dtype == np.float32
        assert Tensor(Tensor([1.0, 2.0])).data.tolist() == [1.0, 2.0]

    def test_memory_is_shared_where_it_fits(self):
        array = np.zeros(3, dtype=np.float32)
        x = Tensor(array)
        assert x.data is array and x.numpy() is array
        assert not np.shares_memory(x.copy().data, array)
        assert np.shares_memory(x.detach().data, array)
        assert not np.shares_memory(x.clone().data, array)

    def test_what_learns_owns_its_memory(self):
        array = np.zeros(3, dtype=np.float32)
        first, second = Tensor(array, requires_grad=True), Tensor(array, requires_grad=True)
        first.data += 1.0  # as an optimizer does
        assert array.tolist() == [0, 0, 0], "the caller's array moved with the weight"
        assert second.data.tolist() == [0, 0, 0], "two weights made from one array moved together"
        assert not np.shares_memory(first.copy().data, first.data)

    def test_not_data(self):
        with pytest.raises(ValueError, match="same length"):
            Tensor([[1, 2], [3]])
        for bad in ("text", None, {"a": 1}, 1j):
            with pytest.raises(TypeError, match="needs numbers"):
                Tensor(bad)

    def test_requires_grad_needs_floats(self):
        assert Tensor([1.0], requires_grad=True).requires_grad
        for bad in ([1, 2], [True], np.zeros(2, np.int32)):
            with pytest.raises(TypeError, match="requires_grad needs floating data, got"):
                Tensor(bad, requires_grad=True)

    def test_attributes(self):
        x = Tensor(X)
        assert (x.shape, x.ndim, x.size, len(x)) == ((2, 3), 2, 6, 2)
        assert x.grad is None and x.requires_grad is False
        assert [row.data.tolist() for row in x] == X.tolist()
        assert repr(Tensor([1, 2])) == "Tensor([1, 2], dtype=int64)"
        assert repr(Tensor([1.0], requires_grad=True)) == "Tensor([1.], requires_grad=True)"

    def test_one_value(self):
        x = Tensor([[2.5]])
        assert x.item() == 2.5 and float(x) == 2.5 and int(x) == 2 and bool(x)
        assert type(x.item()) is float
        with pytest.raises(ValueError, match=r"item\(\) needs one value, this Tensor has shape \(2, 3\)"):
            Tensor(X).item()
        with pytest.raises(ValueError):
            bool(Tensor(X) > 0)
        with pytest.raises(TypeError, match="without dimensions"):
            len(Tensor(1.0))

    def test_ways_out(self):
        x = Tensor(X)
        assert x.tolist() == X.tolist() and Tensor(3).tolist() == 3
        assert f"{Tensor(2.0 / 3):.3f}" == "0.667" and f"{Tensor([7]):4d}" == "   7"
        assert f"{x}" == str(x) == repr(x)
        with pytest.raises(ValueError, match="item"):
            f"{x:.2f}"
        assert np.array_equal(abs(Tensor([-1.5, 2.0])).data, [1.5, 2.0])

    def test_copies_and_pickles(self):
        x = Tensor(X, requires_grad=True)
        for other in (copy.deepcopy(x), pickle.loads(pickle.dumps(x))):
            assert other is not x and other.requires_grad and not np.shares_memory(other.data, x.data)
            assert (other.data == x.data).all()


class TestOperations:
    """The oracle is the same formula in NumPy, float64."""

    @pytest.mark.parametrize(
        "work",
        [
            lambda x: x + 2,
            lambda x: 2 + x,
            lambda x: x - 1.5,
            lambda x: 1.5 - x,
            lambda x: x * 3,
            lambda x: 3 * x,
            lambda x: x / 4,
            lambda x: 4 / x,
            lambda x: x**2,
            lambda x: x**3,
            lambda x: 2.0**x,
            lambda x: -x,
            lambda x: x + x[0],
            lambda x: x * x[:, :1],
            lambda x: x @ x.T,
            lambda x: x @ x[0],
            lambda x: x.sum(),
            lambda x: x.mean(),
            lambda x: x.max(),
            lambda x: x.min(),
            lambda x: x.T,
            lambda x: x.reshape(3, 2),
            lambda x: x.reshape(-1),
            lambda x: x.reshape((3, -1)),
            lambda x: x[1],
            lambda x: x[:, ::2],
            lambda x: x[..., None],
            lambda x: x[[0, 0, 1]],
            lambda x: x[x > 0],
        ],
    )
    def test_against_numpy(self, work):
        same(work(Tensor(X)), work(X))
        assert work(Tensor(X)).dtype == np.float32
        assert work(Tensor(X, dtype=np.float64)).dtype == np.float64

    @pytest.mark.parametrize("dim", [None, 0, 1, -1, (0, 1)])
    @pytest.mark.parametrize("keepdim", [False, True])
    @pytest.mark.parametrize("name", ["sum", "mean", "max", "min"])
    def test_reductions(self, name, dim, keepdim):
        same(getattr(Tensor(X), name)(dim=dim, keepdim=keepdim), getattr(X, name)(axis=dim, keepdims=keepdim))

    def test_functions(self):
        x = np.abs(X)
        for name in ("exp", "log", "sqrt", "abs"):
            same(getattr(Tensor(x), name)(), getattr(np, name)(x))
        assert Tensor(X).argmax(dim=1).data.tolist() == [2, 1]
        same(Tensor(X).matmul(Tensor(X.T)), X @ X.T)

    def test_shapes(self):
        x = Tensor(np.zeros((2, 3, 4)))
        assert x.transpose(1, 2).shape == (2, 4, 3) and x.transpose(-1, 0).shape == (4, 3, 2)
        assert x.permute(2, 0, 1).shape == (4, 2, 3) and x.permute((2, 0, 1)).shape == (4, 2, 3)
        assert x.unsqueeze(1).shape == (2, 1, 3, 4) and x.unsqueeze(-1).shape == (2, 3, 4, 1)
        assert x.unsqueeze(0).squeeze(0).shape == (2, 3, 4) and x.squeeze(1).shape == (2, 3, 4)
        assert x[:, :1].expand(2, 5, 4).shape == (2, 5, 4) and x[0].expand(7, -1, -1).shape == (7, 3, 4)
        assert x.view(6, -1).shape == (6, 4) and x.T.shape == (4, 3, 2)
        assert np.shares_memory(x.transpose(0, 1).data, x.data)

    def test_comparisons(self):
        x = Tensor([1.0, 2.0, 3.0])
        for got, expected in [
            (x > 2, [0, 0, 1]),
            (x >= 2, [0, 1, 1]),
            (x < 2, [1, 0, 0]),
            (x <= 2, [1, 1, 0]),
            (x == 2, [0, 1, 0]),
            (x != 2, [1, 0, 1]),
        ]:
            assert got.dtype == bool and got.data.tolist() == [bool(e) for e in expected]
        assert len({x, x, Tensor([1.0])}) == 2

    def test_join(self):
        a, b = Tensor(X), Tensor(X * 10)
        same(cat([a, b]), np.concatenate([X, X * 10]))
        same(cat([a, b], dim=-1), np.concatenate([X, X * 10], axis=-1))
        same(stack([a, b], dim=1), np.stack([X, X * 10], axis=1))

    def test_arrays_and_numpy_numbers_on_either_side(self):
        x, array = Tensor(X), np.array([1.0, 2.0, 3.0])
        for got, expected in [
            (array * x, array * X),
            (x - array, X - array),
            (array - x, array - X),
            (np.float64(2) * x, 2 * X),
            (x / np.int64(2), X / 2),
            (x + np.float32(1), X + 1),
        ]:
            same(got, expected)
            assert got.dtype == np.float32
        assert (Tensor(X, dtype=np.float64) * array).dtype == np.float64


class TestInPlace:
    """`w -= step` must move the very Tensor that a model and an optimizer hold."""

    CHANGES = {
        "+=": (lambda w: w.__iadd__(2.0), [3.0, -2.0]),
        "-=": (lambda w: w.__isub__(np.array([0.5, 1.0])), [0.5, -5.0]),
        "*=": (lambda w: w.__imul__(Tensor([2.0, 0.5])), [2.0, -2.0]),
        "/=": (lambda w: w.__itruediv__(2), [0.5, -2.0]),
    }

    @pytest.mark.parametrize("name", CHANGES)
    def test_a_weight_stays_itself(self, name):
        work, expected = self.CHANGES[name]
        w = Tensor([1.0, -4.0], requires_grad=True)
        array, previous = w.data, plug_in(None)
        try:
            got = work(w)
        finally:
            plug_in(previous)
        assert got is w and w.data is array and w.requires_grad, "a new Tensor took the place of the weight"
        assert w.dtype == np.float32 and w.data.tolist() == expected, f"got {w.data}, expected {expected}"

    def test_not_while_an_engine_records(self, notebook):
        w = Tensor([1.0, -4.0], requires_grad=True)
        with pytest.raises(RuntimeError, match="no_grad"):
            w -= 1.0
        assert w.data.tolist() == [1.0, -4.0]

    def test_what_does_not_learn_is_a_new_tensor(self):
        x = y = Tensor([1.0, 2.0])
        y += 1.0
        assert x.data.tolist() == [1.0, 2.0] and y.data.tolist() == [2.0, 3.0]

    def test_a_weight_does_not_grow(self):
        w = Tensor([1.0, -4.0], requires_grad=True)
        previous = plug_in(None)
        try:
            with pytest.raises(ValueError):
                w += Tensor(np.ones((3, 2)))
        finally:
            plug_in(previous)
        assert w.data.tolist() == [1.0, -4.0]


class TestFloat32Stays:
    @pytest.mark.parametrize(
        "work",
        [
            lambda i: i / 2,
            lambda i: i / i,
            lambda i: i * 0.5,
            lambda i: i.mean(),
            lambda i: i.mean(dim=0),
            lambda i: i.exp(),
            lambda i: i.log(),
            lambda i: i.sqrt(),
            lambda i: i + Tensor([1.0, 1.0]),
            lambda i: i * np.ones(2),
            lambda i: i.sum() * np.sqrt(64),
            lambda i: i**0.5,
            lambda i: (i > 1).mean(),
            lambda i: cat([i, Tensor([1.0])]),
        ],
    )
    def test_integers_meeting_floats(self, work):
        for dtype in (np.int64, np.int32, np.uint8):
            assert work(Tensor([1, 2], dtype=dtype)).dtype == np.float32

    def test_integers_stay(self):
        i = Tensor([3, 4])
        for got in (i + 1, i * i, -i, i.sum(), i.max(), i[0], i.reshape(2, 1), i - True, cat([i, i]), i**2):
            assert got.dtype == np.int64

    def test_numbers_without_dimensions(self):
        total = Tensor(X).sum()
        assert total.shape == () and isinstance(total.data, np.ndarray)
        for got in (total * 0.5, total / 3, total + 1, total**2, 1 - total, total.exp(), total.mean()):
            assert got.dtype == np.float32 and got.shape == () and isinstance(got.data, np.ndarray)


class TestMessages:
    """What came, what is needed, what to do."""

    @pytest.mark.parametrize(
        "work, kind, words",
        [
            (lambda x: x @ x, ValueError, r"\(2, 3\) @ \(2, 3\).*left is 3.*right is 2.*Transpose"),
            (lambda x: x @ Tensor([1.0, 2.0]), ValueError, r"\(2, 3\) @ \(2,\).*left is 3.*right is 2"),
            (lambda x: x @ Tensor(2.0), ValueError, r"\(2, 3\) @ \(\).*Use \*"),
            (lambda x: x.expand(5, 2, 3) @ Tensor(np.ones((4, 3, 2))), ValueError, "5 in one and 4 in the other"),
            (
                lambda x: x + Tensor([1.0, 2.0]),
                ValueError,
                r"\(2, 3\) and \(2,\).*dimension 1 is 3 in one and 2.*unsqueeze",
            ),
            (lambda x: x > Tensor([1.0, 2.0]), ValueError, "broadcast"),
            (lambda x: x.reshape(4, -1), ValueError, r"6 values do not fill shape \(4, -1\): choose"),
            (lambda x: x.reshape(-1, -1), ValueError, "-1 at most once"),
            (lambda x: x[2], IndexError, r"shape \(2, 3\).*index 2 is out of bounds"),
            (lambda x: x[0, 0, 0], IndexError, r"shape \(2, 3\).*too many"),
            (lambda x: x.sum(dim=2), IndexError, r"dim 2 does not exist: shape \(2, 3\).*-2 to 1"),
            (lambda x: x.mean(dim=(0, -3)), IndexError, r"dim -3 does not exist: shape \(2, 3\).*-2 to 1"),
            (lambda x: x.argmax(dim=4), IndexError, r"dim 4 does not exist"),
            (lambda x: x.transpose(0, 5), IndexError, r"dim 5 does not exist: shape \(2, 3\)"),
            (lambda x: x.squeeze(7), IndexError, r"dim 7 does not exist"),
            (lambda x: cat([x, x], dim=5), IndexError, r"dim 5 does not exist"),
            (lambda x: cat([x.sum(), x.sum()]), IndexError, r"shape \(\) has 0 dimensions\.$"),
            (lambda x: x.permute(0, 0), ValueError, r"name each of its 2 dimensions once"),
            (lambda x: x.expand(2, 4), ValueError, r"\(2, 3\) does not stretch to \(2, 4\).*unsqueeze"),
            (lambda x: cat([x, Tensor(np.ones((2, 4)))]), ValueError, r"cat along dim 0: got \(2, 3\), \(2, 4\)"),
            (lambda x: x.sum().backward(), RuntimeError, "lesson 05.*import tinytorch.core.autograd"),
        ],
    )
    def test_words(self, work, kind, words):
        previous = plug_in(None)
        try:
            with pytest.raises(kind, match=words):
                work(Tensor(X))
        finally:
            plug_in(previous)

    @pytest.mark.parametrize("a, b", [((2, 3), (3,)), ((4, 1, 3), (2, 1)), ((), (5, 1)), ((0,), (1,)), ((1,), (1, 1))])
    def test_broadcast_shape(self, a, b):
        assert broadcast_shape(a, b) == np.broadcast_shapes(a, b)


class TestDoor:
    def test_an_engine_hears_every_operation(self, notebook):
        x = Tensor(X)
        y = (1.0 - x).sum(dim=1)
        assert [entry[0] for entry in notebook.entries] == [tensor.subtract_array, tensor.sum_array]
        op, inputs, params, output = notebook.entries[0]
        assert inputs[0] == 1.0 and inputs[1] is x and params == {}
        assert notebook.entries[1][1][0] is output and notebook.entries[1][3] is y

    def test_backward_reaches_the_engine(self, notebook):
        x = Tensor(1.0)
        x.backward()
        x.backward(3.0)
        assert notebook.asked == [(x, None), (x, 3.0)]

    def test_any_function_of_arrays_will_do(self):
        assert apply(np.hypot, Tensor([3.0]), Tensor([4.0])).data.tolist() == [5.0]
        assert apply(lambda a, b=None: a if b is None else a + b, Tensor([3.0]), None).data.tolist() == [3.0]

    def test_unplugging_is_for_one_thread(self, notebook):
        heard = []

        def work():
            apply(np.add, 1.0, 2.0)
            heard.append(len(notebook.entries))

        before, everywhere = plug_in(None), Socket.engine
        plug_in(notebook, everywhere=True)
        plug_in(None)
        apply(np.add, 1.0, 2.0)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        plug_in(everywhere, everywhere=True)
        plug_in(before)
        assert heard == [1], "the other thread was unplugged as well, or this one was not"

    def test_what_is_plugged_in_for_a_while_stays_in_its_thread(self, notebook):
        """A profiler must not hear what another thread computes, also not after it was unplugged."""
        thread = threading.Thread(target=lambda: apply(np.add, 1.0, 2.0))
        thread.start()
        thread.join()
        assert notebook.entries == []

    def test_threads_that_unplug_leave_the_engine_in_place(self, notebook):
        first_in, first_out = threading.Event(), threading.Event()

        def slow():
            previous = plug_in(None)
            first_in.set()
            first_out.wait(5)
            plug_in(previous)

        thread = threading.Thread(target=slow)
        thread.start()
        first_in.wait(5)
        previous = plug_in(None)
        first_out.set()
        thread.join()
        plug_in(previous)
        assert plug_in(notebook) is notebook


class TestMakers:
    def test_seeds(self):
        rng = default_rng()
        manual_seed(5)
        first = randn(2, 3)
        manual_seed(5)
        assert default_rng() is rng, "a seed must reach those who already hold the generator"
        assert (randn((2, 3)).data == first.data).all()
        assert not (randn(2, 3).data == first.data).all()
        assert (randn(4, rng=np.random.default_rng(1)).data == randn(4, rng=np.random.default_rng(1)).data).all()
        assert first.dtype == np.float32 and randn(2, requires_grad=True).requires_grad

    def test_zeros_ones_arange(self):
        assert zeros(2, 3).shape == zeros((2, 3)).shape == (2, 3) and zeros(2).dtype == np.float32
        assert ones(2, requires_grad=True).requires_grad and ones(2, dtype=np.int64).data.tolist() == [1, 1]
        assert arange(3).data.tolist() == [0, 1, 2] and arange(3).dtype == np.int64
        assert arange(1, 4, 2).data.tolist() == [1, 3] and arange(0, 1, 0.5).dtype == np.float32


def test_importing_is_silent_and_needs_only_numpy():
    code = (
        "import sys, tinytorch.core.tensor; "
        "print(sorted(m for m in sys.modules if m.startswith('tinytorch.') or m in ('torch', 'matplotlib')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['tinytorch.core', 'tinytorch.core.tensor']" and not done.stderr

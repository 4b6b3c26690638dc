# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   tinytorch:
#     lesson: "03"
# ---

# %% [markdown]
"""
# Lesson 03: Layers

**You build** the linear layer, dropout, a chain of layers, and the base class `Module` that finds every
parameter of a model, however deep it lies.

**You need** lessons 01 (`Tensor`, `apply`) and 02 (the activation modules).

**Exported to** `tinytorch/core/layers.py`.

**Time** about 75 minutes.

The algorithms are free functions on plain values again: you write those. The classes only remember things.
"""

# %%
#| default_exp core.layers
#| export
import math

import numpy as np

from tinytorch.core.tensor import Tensor, apply, default_rng, multiply_array

# %%
import time

from tinytorch.core.activations import ReLU
from tinytorch.core.tensor import plug_in

# %% [markdown]
"""
The ruler of the checks: shape first, then dtype, then values. And a tiny engine that writes down which
operations pass the door of lesson 01.
"""

# %%
def check_array(got, expected, mistake, tolerance=1e-6, dtype=np.float32):
    """Compare shape, dtype and values; say got, expected, and what the difference looks like."""
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape, f"shape: got {got.shape}, expected {expected.shape}. {mistake}"
    wrong = f"dtype: got {got.dtype}, expected {np.dtype(dtype)}: a constant or a cast changed it"
    assert got.dtype == dtype, wrong
    same = np.allclose(got, expected, rtol=tolerance, atol=tolerance)
    assert same, f"got {got.tolist()}, expected {expected.tolist()}. {mistake}"


def operations_seen(function, *inputs):
    """Run the function; return its result and the names of the operations that passed the door."""
    seen = []
    recorder = type("Recorder", (), {"record": lambda self, op, *rest: seen.append(op.__name__)})()
    previous = plug_in(recorder)
    try:
        result = function(*inputs)
    finally:
        plug_in(previous)
    return result, seen


# %% [markdown]
"""
## 1. What does one layer compute?

The network for XOR in lesson 02 had its weights set by hand. A layer that learns must *own* its weights.
What it computes is old: a matrix product and a bias.

**Picture.** Three numbers in, two out. The weight has one row per *output*, as in PyTorch: shape (out, in).

    x = [1, 2, 3]     weight = [[1, 0, 0],      bias = [10, 20]
                                [0, 1, 1]]

    y[0] = 1*1 + 2*0 + 3*0 + 10 = 11            y = x @ weight.T + bias
    y[1] = 1*0 + 2*1 + 3*1 + 20 = 25
"""

# %% [markdown]
"""
Only the last dimension is used up. Everything in front of it (batch, positions) is carried along.

**Predict.** An input of shape (2, 5, 4) goes through a linear layer from 4 to 8. Which shape comes out? And
how many numbers does a layer from 784 to 128 own, with its bias?
"""

# %% nbgrader={"grade": false, "grade_id": "03-predict-shape", "locked": false, "schema_version": 3, "solution": true, "task": false}
# predicted_shape = ...  (a tuple)
# predicted_count = ...  (a whole number)
### BEGIN SOLUTION
predicted_shape = (2, 5, 8)
predicted_count = 784 * 128 + 128
### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "03-predict-shape-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_predict_shape():
    """Oracle: NumPy's own matrix product, and the sizes of two arrays."""
    shape = (np.zeros((2, 5, 4)) @ np.zeros((8, 4)).T).shape
    wrong = f"got {predicted_shape}, NumPy gives {shape}: only the last dimension changes, from in to out"
    assert tuple(predicted_shape) == shape, wrong
    count = np.zeros((128, 784)).size + np.zeros(128).size
    assert predicted_count == count, f"got {predicted_count}, counted {count}: out * in weights, out biases"


if __name__ == "__main__":
    test_unit_predict_shape()

# %% [markdown]
"""
The product itself is given, as `times_rows(rows, weight)`: `rows @ weight.T`, in three ways, because NumPy's own
way is the fastest only for many rows. With few rows (a language model that writes has one per text) each weight is
read from memory for very little arithmetic, and what counts is how fast it is read. We measure it below.
"""

# %%
#| export
FEW_ROWS, SOME_ROWS = 4, 64  # measured with OpenBLAS; FEW_ROWS = SOME_ROWS = 0 is NumPy's own way for all
SMALL_PRODUCT = 1_000_000  # multiplications: OpenBLAS first rearranges the factors of larger products


def times_rows(rows, weight):
    """rows @ weight.T, the way that is fastest for so many rows: (N, in), (out, in) -> (N, out).

    >>> times_rows(np.array([[1.0, 2.0]]), np.array([[3.0, 4.0], [5.0, 6.0]]))
    array([[11., 17.]])
    """
    if len(rows) > SOME_ROWS:
        return rows @ weight.T
    if len(rows) <= FEW_ROWS:  # dot products: weight is read once, in order
        return np.ascontiguousarray(np.vecdot(weight[:, None], rows).T)
    # weight in pieces, each of whose products is small
    columns, step = np.ascontiguousarray(rows.T), max(1, SMALL_PRODUCT // rows.size)
    y = np.empty((len(weight), len(rows)), np.result_type(rows, weight))
    for start in range(0, len(weight), step):
        np.matmul(weight[start : start + step], columns, out=y[start : start + step])
    return np.ascontiguousarray(y.T)


# %% [markdown]
"""
**Build.** The dimensions in front are flattened into rows first. One large matrix product is faster than
one small one for each entry of the batch: a measurement below shows it. The given lines turn a wrong shape
into a sentence, and whole numbers into floats.
"""

# %% nbgrader={"grade": false, "grade_id": "03-linear", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def linear_array(x, weight, bias=None):
    """Compute x @ weight.T + bias: x (..., in), weight (out, in), bias (out,) or None -> (..., out).

    >>> linear_array(np.array([[1.0, 2.0]]), np.array([[3.0, 4.0]]), np.array([10.0]))
    array([[21.]])
    """
    if x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"linear: last dimension must be in_features={weight.shape[1]}, got shape {x.shape}")
    if x.dtype.kind != "f":
        x = x.astype(weight.dtype)
    rows = x.reshape(-1, x.shape[-1])  # (..., in) -> (N, in)
    ### BEGIN SOLUTION
    y = times_rows(rows, weight)  # (N, out)
    if bias is not None:
        y += bias
    return y.reshape(*x.shape[:-1], weight.shape[0])
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "03-linear-test", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
def test_unit_linear():
    """Oracle: the numbers of the picture, and np.einsum."""
    square, x = np.array([[1, 2], [3, 4]], np.float32), np.array([[1, 10]], np.float32)
    check_array(linear_array(x, square), [[21, 43]], "weight is (out, in), one row per output: transpose it")
    weight, bias = np.array([[1, 0, 0], [0, 1, 1]], np.float32), np.array([10, 20], np.float32)
    x = np.array([[[1, 2, 3], [0, 0, 0]]], np.float32)
    y = linear_array(x, weight, bias)
    check_array(y, [[[11, 25], [10, 20]]], "Keep the leading dimensions, and add the bias")
    check_array(bias, [10, 20], "The bias itself was changed: add it to the product")
    ### BEGIN HIDDEN TESTS
    rng = np.random.default_rng(0)
    x, weight = rng.random((2, 3, 5, 4), np.float32), rng.random((7, 4), np.float32)
    expected = np.einsum("abci,oi->abco", x, weight)
    check_array(linear_array(x, weight), expected, "x @ weight.T with all leading dimensions", 1e-5)
    check_array(linear_array(x[0, 0, 0], weight), expected[0, 0, 0], "A single row stays a single row", 1e-5)
    whole = np.array([[1, 2, 3, 4]])
    check_array(linear_array(whole, weight), whole @ weight.T, "Integers go in as float32", 1e-5)
    for count in (0, FEW_ROWS + 1, SOME_ROWS + 1):
        x = rng.random((count, 4), np.float32)
        check_array(linear_array(x, weight), np.einsum("ni,oi->no", x, weight), f"{count} rows", 1e-5)
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_linear()

# %% [markdown]
"""
**Measure.** The same product for 256 sequences of one token each, once as NumPy does it for three
dimensions, once over flattened rows. Then one row with a weight of 64 MiB, too large for the processor's cache:
NumPy's way, and `times_rows`.
"""

# %% nbgrader={"grade": false, "grade_id": "03-measure-rows", "locked": true, "schema_version": 3, "solution": false, "task": false}
def median_ms(function, repeats=15):
    """Median time of one call in milliseconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1000 * sorted(times)[repeats // 2]


if __name__ == "__main__":
    batch, weight = np.ones((256, 1, 256), np.float32), np.ones((256, 256), np.float32)
    print(f"x @ weight.T in three dimensions: {median_ms(lambda: batch @ weight.T):6.2f} ms")
    print(f"linear_array over rows:           {median_ms(lambda: linear_array(batch, weight)):6.2f} ms")
    row, weight = np.ones((1, 2048), np.float32), np.ones((8192, 2048), np.float32)
    print(f"one row @ weight.T:               {median_ms(lambda: row @ weight.T):6.2f} ms")
    print(f"times_rows of one row:            {median_ms(lambda: times_rows(row, weight)):6.2f} ms")

# %% [markdown]
"""
**Look back.** What if `y += bias` were `y = y + bias`? The same numbers, and one more array as large as the
output. What if it were `bias += y`? Then the layer would change each time it is used.

## 2. How large should the weights be at the start?

All zeros will not do: every output would be the same, and so would every gradient. So we draw them at
random. How widely? We send numbers through 20 layers of width 100 with three choices and look at their
spread (standard deviation) at the end.
"""

# %%
def spread_after(layers, scale, width=100):
    """Standard deviation after that many random layers whose weights have the standard deviation `scale`."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((32, width))
    for _ in range(layers):
        x = x @ (rng.standard_normal((width, width)) * scale)
    return x.std()


if __name__ == "__main__":
    for scale in (1.0, 0.01, 1 / math.sqrt(100)):
        spread = spread_after(20, scale)
        print(f"weights spread by {scale:5.2f}: after 20 layers the numbers spread by {spread:.2e}")

# %% [markdown]
"""
Each output is a sum of `in` products. Such a sum spreads sqrt(in) times as widely as one product, so
weights of the order `1 / sqrt(in)` keep the size of the numbers as it is.

PyTorch draws the weights and the bias of a linear layer uniformly from -bound to bound with `bound = 1 /
sqrt(in)`. That is a little narrow (the standard deviation of such a draw is bound / sqrt(3)), and layer
norm makes up for it later.

**Predict.** The bound for 100 inputs?
"""

# %% nbgrader={"grade": false, "grade_id": "03-predict-bound", "locked": false, "schema_version": 3, "solution": true, "task": false}
# predicted_bound = ...  (a number)
### BEGIN SOLUTION
predicted_bound = 0.1
### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "03-predict-bound-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_predict_bound():
    """Oracle: the formula of the text."""
    bound = 1 / math.sqrt(100)
    wrong = f"got {predicted_bound}, computed {bound}: one over the root of 100"
    assert abs(predicted_bound - bound) < 1e-9, wrong


if __name__ == "__main__":
    test_unit_predict_bound()

# %% [markdown]
"""
**Build.** Everything random takes a generator `rng`. The same seed then gives the same model.
"""

# %% nbgrader={"grade": false, "grade_id": "03-initial", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def initial_array(shape, fan_in, rng):
    """Draw float32 values of that shape uniformly from -1/sqrt(fan_in) to 1/sqrt(fan_in) (torch.nn.Linear).

    >>> initial_array((2, 3), 4, np.random.default_rng(0)).shape
    (2, 3)
    """
    ### BEGIN SOLUTION
    bound = 1 / math.sqrt(fan_in)
    return rng.uniform(-bound, bound, shape).astype(np.float32)
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "03-initial-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_initial():
    """Oracle: the ends, the centre and the spread of a uniform distribution."""
    drawn = initial_array((200, 100), 100, np.random.default_rng(2))
    assert drawn.shape == (200, 100), f"got shape {drawn.shape}, expected (200, 100)"
    assert drawn.dtype == np.float32, f"got {drawn.dtype}, expected float32: cast what the generator returns"
    largest, centre = np.abs(drawn).max(), drawn.mean()
    wrong = f"the largest of 20000 values is {largest}, expected nearly 0.1: uniform within 1 / sqrt(fan_in)"
    assert 0.0999 < largest <= 0.1 + 1e-8, wrong
    assert abs(centre) < 0.002, f"the mean is {centre}, expected about 0: draw from -bound to bound"
    again = initial_array((200, 100), 100, np.random.default_rng(2))
    assert np.array_equal(drawn, again), "the same seed gave other numbers: draw from rng, not from np.random"
    ### BEGIN HIDDEN TESTS
    spread = initial_array((500, 16), 16, np.random.default_rng(3)).std()
    uniform = 0.25 / math.sqrt(3)
    assert abs(spread - uniform) < 0.005, f"got spread {spread}, expected {uniform}: a uniform draw"
    other = initial_array((200, 100), 100, np.random.default_rng(4))
    assert not np.array_equal(drawn, other), "two seeds gave the same numbers"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_initial()

# %% [markdown]
"""
## 3. Who finds all the parameters?

An optimizer needs a list of everything that is trained. In a model these tensors lie deep: a model has a
list of blocks, a block has an attention, that has a layer, which has a weight.

A `Parameter` is a Tensor that says: I belong to a model and I am trained.
"""

# %%
#| export
class Parameter(Tensor):
    """A Tensor that a module owns and that training changes."""

    def __init__(self, data, requires_grad=True, dtype=None):
        super().__init__(data, requires_grad=requires_grad, dtype=dtype)


# %% [markdown]
"""
Python already knows what an object holds: `vars(object)` is the dictionary of its attributes. We need
nothing else. A list or tuple is opened, and its entries are called `blocks.0`, `blocks.1`.

What counts as a module? Anything with `forward` and `parameters`. The activations of lesson 02 do.
"""

# %%
#| export
def attributes_of(owner):
    """Yield (name, value) of each attribute; lists and tuples are opened as name.0, name.1."""
    for name, value in vars(owner).items():
        if isinstance(value, (list, tuple)):
            for index, item in enumerate(value):
                yield f"{name}.{index}", item
        else:
            yield name, value


def is_module(value):
    """True for an object (not a class) with forward and parameters."""
    return hasattr(value, "forward") and hasattr(value, "parameters") and not isinstance(value, type)


# %% [markdown]
"""
Here is the base class. Read it from the top: each method is a line or two, and the work is done by free
functions that follow below. `named_parameters` walks *each time it is asked*. Nothing is registered, so a
part of a model can be exchanged at any time, and everything follows. Lesson 17 lives on that.

(The class is longer than a cell should be: a class cannot be cut in two.)
"""

# %%
#| export
class Module:
    """The base of every layer and model: finds parameters, saves and loads them, knows its mode."""

    training = True

    def __call__(self, *inputs, **options):
        return self.forward(*inputs, **options)

    def forward(self, *inputs, **options):
        raise NotImplementedError(f"{type(self).__name__} has no forward method")

    def named_children(self):
        return ((name, value) for name, value in attributes_of(self) if is_module(value))

    def modules(self):
        return walk_modules(self)

    def named_parameters(self, prefix=""):
        return first_of_each(walk_parameters(self, prefix + "." if prefix else ""))

    def parameters(self):
        return [parameter for _, parameter in self.named_parameters()]

    def zero_grad(self):
        for parameter in self.parameters():
            parameter.zero_grad()

    def train(self, mode=True):
        for module in self.modules():
            module.training = mode
        return self

    def eval(self):
        return self.train(False)

    def state_dict(self):
        return {name: parameter.data.copy() for name, parameter in self.named_parameters()}

    def load_state_dict(self, state, strict=True):
        return load_arrays(dict(self.named_parameters()), state, strict, type(self).__name__)

    def extra_repr(self):
        return ""

    def __repr__(self):
        return describe(self)


# %% [markdown]
"""
`describe` prints a module as a tree. Given; section 9 shows one.
"""

# %%
#| export
def describe(module):
    """The text of repr(module): its class, its own words, and its children one level further in."""
    name, words = type(module).__name__, module.extra_repr()
    children = ["  (" + n + "): " + repr(child).replace("\n", "\n  ") for n, child in module.named_children()]
    if not children:
        return f"{name}({words})"
    return "\n".join([f"{name}({words}", *children, ")"])


# %% [markdown]
"""
## 4. What if one parameter lies in two places?

We write `named_parameters` from the outside in: `first_of_each` first, then the walk whose pairs it
filters. In GPT-2 the output layer uses the very same matrix as the token embedding. The walk meets it
twice. An optimizer that gets it twice takes two steps with it; a count of parameters is too high.

**Build.** Keep the first of each. Which comparison? Not `==`: that compares the numbers, and two different
parameters may hold equal numbers (all biases that start at 0). The *object* counts, and its identity is
`id(parameter)`.
"""

# %% nbgrader={"grade": false, "grade_id": "03-shared", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def first_of_each(pairs):
    """Yield each (name, parameter) whose parameter (the object, not its numbers) has not come before."""
    ### BEGIN SOLUTION
    seen = set()
    for name, parameter in pairs:
        if id(parameter) not in seen:
            seen.add(id(parameter))
            yield name, parameter
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "03-shared-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_shared():
    """Oracle: pairs written by hand."""
    first, twin = Parameter([0.0]), Parameter([0.0])
    kept = list(first_of_each([("a", first), ("b", twin), ("c", first)]))
    names = [name for name, _ in kept]
    assert "c" not in names, f"got {names}: 'c' is the same object as 'a' and must not come again"
    wrong = f"got {names}, expected ['a', 'b']: equal numbers do not make two parameters one"
    assert names == ["a", "b"], wrong
    assert kept[0][1] is first and kept[1][1] is twin, "the names are right, the parameters are not theirs"
    ### BEGIN HIDDEN TESTS
    many = [Parameter([float(i % 2)]) for i in range(5)]
    order = [3, 1, 3, 0, 0, 4, 1, 2]
    names = [name for name, _ in first_of_each([(f"{n}-{i}", many[i]) for n, i in enumerate(order)])]
    expected = ["0-3", "1-1", "3-0", "5-4", "7-2"]
    assert names == expected, f"got {names}, expected {expected}: the first of each, in order"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_shared()

# %% [markdown]
"""
## 5. How does one walk through a model?

`walk_modules` is the worked sibling of your walk: it visits the module itself, then its children, each
object once. `named_parameters_of` asks a child. It asks and does not look inside: a module may wish to
answer for another one that it wraps, and an activation has nothing to say.
"""

# %%
#| export
def children_of(module):
    """The (name, child) pairs of any module; an activation of lesson 02 has none."""
    return list(module.named_children()) if hasattr(module, "named_children") else []


def walk_modules(module):
    """Yield the module and everything below it, each object once, parents before children."""
    seen, waiting = set(), [module]
    while waiting:
        current = waiting.pop()
        if id(current) not in seen:
            seen.add(id(current))
            yield current
            waiting.extend(child for _, child in reversed(children_of(current)))


def named_parameters_of(module, path=""):
    """The (name, parameter) pairs that a module reports about itself; each name is path, a dot, its own name."""
    return module.named_parameters(path) if hasattr(module, "named_parameters") else []


# %% [markdown]
"""
**Picture.** A model with a parameter of its own and two blocks:

    model.scale               ->  "scale"
    model.blocks[0].weight    ->  "blocks.0.weight"
    model.blocks[1].weight    ->  "blocks.1.weight"

Own parameters come first, then those of the children, in the order in which the attributes were set.

**Predict.** A GPT has a list `blocks`; a block has `mlp`; that has a linear layer `out`. What is the name
of the weight of `out` in the third block?
"""

# %% nbgrader={"grade": false, "grade_id": "03-predict-name", "locked": false, "schema_version": 3, "solution": true, "task": false}
# predicted_name = ...  (a string)
### BEGIN SOLUTION
predicted_name = "blocks.2.mlp.out.weight"
### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "03-predict-name-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_predict_name():
    """Oracle: the path in Python, with the brackets turned into dots."""
    path = "model.blocks[2].mlp.out.weight"
    name = path.removeprefix("model.").replace("[", ".").replace("]", "")
    wrong = f"got {predicted_name!r}, expected {name!r}: attribute names joined by dots, counted from 0"
    assert predicted_name == name, wrong


if __name__ == "__main__":
    test_unit_predict_name()

# %% [markdown]
"""
**Build.** The walk. The tools are `attributes_of`, `children_of` and `named_parameters_of`. The last one
does the rest of the recursion: it calls the child's `named_parameters`, which calls this function again, with
the path and a dot as its prefix.
"""

# %% nbgrader={"grade": false, "grade_id": "03-walk", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def walk_parameters(module, prefix=""):
    """Yield (name, parameter): first the module's own, then its children's; prefix comes before every name.

    >>> [name for name, _ in walk_parameters(Linear(2, 3), "head.")]
    ['head.weight', 'head.bias']
    """
    ### BEGIN SOLUTION
    for name, value in attributes_of(module):
        if isinstance(value, Parameter):
            yield prefix + name, value
    for name, child in children_of(module):
        yield from named_parameters_of(child, prefix + name)
    ### END SOLUTION


# %%
class Leaf(Module):
    """A module with one parameter, for the checks."""

    def __init__(self, value):
        self.weight = Parameter([float(value)])
        self.activation, self.constant = ReLU(), Tensor([7.0])


class Tree(Module):
    """A module with a list of two leaves and a parameter of its own, for the checks."""

    def __init__(self):
        self.blocks = [Leaf(1), Leaf(2)]
        self.scale = Parameter([3.0])


# %% nbgrader={"grade": true, "grade_id": "03-walk-test", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
def test_unit_walk():
    """Oracle: the names of the picture, written out."""
    found = dict(walk_parameters(Leaf(5)))
    assert list(found) == ["weight"], f"got {list(found)}, expected ['weight']: its Parameters, nothing else"
    names = [name for name, _ in walk_parameters(Tree())]
    expected = ["scale", "blocks.0.weight", "blocks.1.weight"]
    wrong = f"got {names}, expected {expected}: own first, then each child's, with path and dot in front"
    assert names == expected, wrong
    values = [parameter.data[0] for _, parameter in walk_parameters(Tree())]
    assert values == [3, 1, 2], f"got values {values}, expected [3, 1, 2]: the parameter that has the name"
    names = [name for name, _ in walk_parameters(Tree(), "model.")]
    assert names[0] == "model.scale", f"got {names[0]!r}, expected 'model.scale': prefix before own names"
    ### BEGIN HIDDEN TESTS
    outer = Tree()
    outer.blocks = (Tree(), outer.blocks[0])
    outer.inner = Tree()
    inside = ["scale", "blocks.0.weight", "blocks.1.weight"]
    expected = ["scale", *(f"blocks.0.{n}" for n in inside), "blocks.1.weight"]
    expected += [f"inner.{n}" for n in inside]
    names = [name for name, _ in walk_parameters(outer)]
    assert names == expected, f"got {names}, expected {expected}: the path grows with every level"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_walk()

# %% [markdown]
"""
## 6. Where do the two halves meet?

The formula and the walk are there, so the linear layer is short. The constructor draws the weights;
`forward` sends the input, the weight and the bias through the door. All three are inputs, not parameters of
the operation, because all three may want a gradient.

**Build** `forward`. Without a bias, `self.bias` is None: then only two inputs go in.
"""

# %% nbgrader={"grade": false, "grade_id": "03-linear-layer", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
class Linear(Module):
    """x @ weight.T + bias with weight (out_features, in_features), as torch.nn.Linear.

    >>> Linear(3, 2).weight.shape
    (2, 3)
    """

    def __init__(self, in_features, out_features, bias=True, rng=None):
        if in_features < 1 or out_features < 1:
            raise ValueError(f"Linear needs at least 1 feature in and out, got {in_features}, {out_features}")
        rng = default_rng() if rng is None else rng
        self.in_features, self.out_features = in_features, out_features
        self.weight = Parameter(initial_array((out_features, in_features), in_features, rng))
        self.bias = Parameter(initial_array((out_features,), in_features, rng)) if bias else None

    def forward(self, x):
        ### BEGIN SOLUTION
        if self.bias is None:
            return apply(linear_array, x, self.weight)
        return apply(linear_array, x, self.weight, self.bias)
        ### END SOLUTION

    def extra_repr(self):
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


# %% nbgrader={"grade": true, "grade_id": "03-linear-layer-test", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
def test_unit_linear_layer():
    """Oracle: the picture of section 1, and the operations that pass the door."""
    layer = Linear(3, 2)
    layer.weight.data[...], layer.bias.data[...] = [[1, 0, 0], [0, 1, 1]], [10, 20]
    y, seen = operations_seen(layer, Tensor([[1.0, 2.0, 3.0]]))
    assert seen == ["linear_array"], f"through the door went {seen}, expected one linear_array: use apply"
    check_array(y.data, [[11, 25]], "Weight and bias both take part")
    plain = Linear(3, 2, bias=False)
    check_array(plain(Tensor(np.eye(3))).data, plain.weight.data.T, "Without a bias: two inputs only")
    names = [name for name, _ in plain.named_parameters()]
    assert names == ["weight"], f"got {names} without a bias, expected ['weight']"
    ### BEGIN HIDDEN TESTS
    same = [Linear(4, 5, rng=np.random.default_rng(1)).state_dict() for _ in range(2)]
    assert list(same[0]) == ["weight", "bias"], f"got {list(same[0])}, expected weight and bias"
    assert np.array_equal(same[0]["weight"], same[1]["weight"]), "the same seed must give the same layer"
    x = np.random.default_rng(2).standard_normal((2, 3, 4)).astype(np.float32)
    layer = Linear(4, 5)
    expected = np.einsum("abi,oi->abo", x, layer.weight.data) + layer.bias.data
    check_array(layer(Tensor(x)).data, expected, "x @ weight.T + bias", 1e-5)
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_linear_layer()

# %% [markdown]
"""
## 7. Why does a layer have two modes?

Dropout sets a random share `p` of its input to 0 during training, so that no unit can rely on a single
other one. When the model is *used*, nothing may be random: `model.eval()` turns it off, `model.train()` on
again. Both walk the modules and set `training`.

**Picture.** Four inputs, p = 0.25: on average three are kept. Their sum would shrink to 3/4 of what it is
in eval mode. So the kept ones are multiplied by 1 / (1 - p), and the mean stays the same.

    x          1     1     1     1       sum 4
    dropped   4/3    0    4/3   4/3      sum 4
"""

# %% [markdown]
"""
**Predict.** With p = 0.2: by which factor is a kept value multiplied?
"""

# %% nbgrader={"grade": false, "grade_id": "03-predict-factor", "locked": false, "schema_version": 3, "solution": true, "task": false}
# predicted_factor = ...  (a number)
### BEGIN SOLUTION
predicted_factor = 1.25
### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "03-predict-factor-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_predict_factor():
    """Oracle: of ten values eight are kept, and their sum must be ten."""
    factor = 10 / 8
    wrong = f"got {predicted_factor}, computed {factor}: the kept values must make up for the dropped ones"
    assert abs(predicted_factor - factor) < 1e-6, wrong


if __name__ == "__main__":
    test_unit_predict_factor()

# %% [markdown]
"""
**Build** the mask: random numbers from 0 to 1, compared with p. With p = 1 everything is dropped, and the
factor would be 1 / 0; the given lines handle that.
"""

# %% nbgrader={"grade": false, "grade_id": "03-dropout-mask", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def dropout_mask(shape, p, rng, dtype=np.float32):
    """Draw factors: 0 with probability p, else 1 / (1 - p).

    >>> dropout_mask((4,), 0.0, np.random.default_rng(0))
    array([1., 1., 1., 1.], dtype=float32)
    """
    if p == 1:
        return np.zeros(shape, dtype)
    ### BEGIN SOLUTION
    mask = (rng.random(shape, dtype=np.float32) >= p).astype(dtype)
    mask *= 1 / (1 - p)
    return mask
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "03-dropout-mask-test", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
def test_unit_dropout_mask():
    """Oracle: which values occur, and how often."""
    mask = dropout_mask((100, 100), 0.2, np.random.default_rng(5))
    assert mask.shape == (100, 100), f"got shape {mask.shape}, expected (100, 100)"
    assert mask.dtype == np.float32, f"got {mask.dtype}, expected float32: cast the comparison to dtype"
    dropped = np.mean(mask == 0)
    wrong = f"a share of {dropped} is 0, expected about 0.2: p is the share that is dropped"
    assert abs(dropped - 0.2) < 0.02, wrong
    values = np.unique(mask).tolist()
    assert np.allclose(values, [0, 1.25]), f"got values {values}, expected 0 and 1.25: scale by 1 / (1 - p)"
    again = dropout_mask((100, 100), 0.2, np.random.default_rng(5))
    assert np.array_equal(mask, again), "the same seed gave another mask: draw from rng, not from np.random"
    ### BEGIN HIDDEN TESTS
    mask = dropout_mask((200, 50), 0.75, np.random.default_rng(6), np.float64)
    assert mask.dtype == np.float64, f"got {mask.dtype}, expected the dtype that was asked for"
    assert np.allclose(np.unique(mask), [0, 4]), f"got {np.unique(mask)}, expected 0 and 4"
    assert abs(mask.mean() - 1) < 0.05, f"the mean is {mask.mean()}, expected about 1"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_dropout_mask()

# %% [markdown]
"""
**Build** the layer's `forward`. In eval mode, or with p = 0, the input itself is returned: no copy, no
operation, no random number drawn. Otherwise multiply by a mask, through the door (`multiply_array` of
lesson 01). `self.generator()` is the layer's own generator or that of the course.
"""

# %% nbgrader={"grade": false, "grade_id": "03-dropout", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
class Dropout(Module):
    """In training mode, set a share p of the input to 0 and scale the rest by 1 / (1 - p)."""

    def __init__(self, p=0.5, rng=None):
        if not 0 <= p <= 1:
            raise ValueError(f"Dropout: p is a probability from 0 to 1, got {p}")
        self.p, self.rng = p, rng

    def generator(self):
        return default_rng() if self.rng is None else self.rng

    def forward(self, x):
        ### BEGIN SOLUTION
        if not self.training or self.p == 0:
            return x
        dtype = x.dtype if x.dtype.kind == "f" else np.float32
        return apply(multiply_array, x, dropout_mask(x.shape, self.p, self.generator(), dtype))
        ### END SOLUTION

    def extra_repr(self):
        return f"p={self.p}"


# %% nbgrader={"grade": true, "grade_id": "03-dropout-test", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
def test_unit_dropout():
    """Oracle: eval mode changes nothing; training mode is the mask of the same seed."""
    x = Tensor(np.ones((20, 30)))
    layer = Dropout(0.5, rng=np.random.default_rng(7))
    y, seen = operations_seen(layer, x)
    expected = dropout_mask((20, 30), 0.5, np.random.default_rng(7))
    assert not np.array_equal(y.data, x.data), "in training mode nothing was dropped: is the mode right?"
    assert seen == ["multiply_array"], f"through the door went {seen}, expected one multiply_array: use apply"
    check_array(y.data, expected, "Multiply by one mask of the input's shape, from the layer's generator")
    layer.eval()
    assert layer(x) is x, "in eval mode the input itself must come back: nothing dropped, nothing scaled"
    ### BEGIN HIDDEN TESTS
    assert Dropout(0.0)(x) is x, "p = 0 drops nothing: return the input itself"
    check_array(Dropout(1.0)(x).data, np.zeros((20, 30)), "p = 1 drops everything")
    layer.train()
    first, second = layer(x).data, layer(x).data
    assert not np.array_equal(first, second), "two calls in training mode must draw two masks"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_dropout()

# %% [markdown]
"""
**Look back.** What if someone forgets `model.eval()` before using the model? It still answers, a little
worse, and differently each time. A test that runs the model twice and compares finds that.

## 8. How is a model saved, and loaded again?

`state_dict()` is a dictionary from names to copies of the arrays. Loading goes the other way, and here much
can go wrong: a name is missing, a name is unknown, a shape differs. If we loaded name by name and stopped
at the first problem, half of the model would be new and half old. So we compare everything first, report
*all* problems, and only then write.

**Build** the two lists of names, in the order of the dictionaries. The comparison of shapes is given.
"""

# %% nbgrader={"grade": false, "grade_id": "03-compare", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def compare_state(own, state):
    """Compare two dicts of arrays: names that state lacks, names that own lacks, sentences on wrong shapes.

    >>> compare_state({"a": np.zeros(2)}, {"b": np.zeros(2)})
    (['a'], ['b'], [])
    """
    mismatched = []
    for name in own.keys() & state.keys():
        given, needed = state[name].shape, own[name].shape
        if given != needed:
            mismatched.append(f"{name} has shape {given}, needed is {needed}")
    ### BEGIN SOLUTION
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    ### END SOLUTION
    return missing, unexpected, sorted(mismatched)


# %% nbgrader={"grade": true, "grade_id": "03-compare-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_compare():
    """Oracle: three lists written by hand."""
    own = {"a": np.zeros(2), "b": np.zeros((2, 3)), "c": np.zeros(1)}
    state = {"b": np.zeros((3, 2)), "c": np.zeros(1), "d": np.zeros(4), "e": np.zeros(4)}
    missing, unexpected, mismatched = compare_state(own, state)
    assert missing == ["a"], f"missing: got {missing}, expected ['a']: what the model has and the state lacks"
    wrong = f"unexpected: got {unexpected}, expected ['d', 'e']: what the state has and the model lacks"
    assert unexpected == ["d", "e"], wrong
    assert len(mismatched) == 1 and "b has shape (3, 2)" in mismatched[0], f"got {mismatched}: only b differs"
    ### BEGIN HIDDEN TESTS
    same = compare_state(own, dict(own))
    assert same == ([], [], []), f"got {same}, expected three empty lists for equal states"
    empty = compare_state(own, {})
    assert empty == (["a", "b", "c"], [], []), f"got {empty}, expected all names as missing"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_compare()

# %% [markdown]
"""
The loading itself is given. It writes *into* the arrays that are there (`[...] =`), so whoever shares them
sees the new values, and their dtype stays.
"""

# %%
#| export
def load_arrays(parameters, state, strict, owner):
    """Write the arrays of state into the parameters, all or none; return (missing, unexpected) names."""
    state = {name: np.asarray(value) for name, value in state.items()}
    own = {name: parameter.data for name, parameter in parameters.items()}
    missing, unexpected, problems = compare_state(own, state)
    problems += [f"{n} holds {a.dtype}, not numbers" for n, a in state.items() if a.dtype.kind not in "biuf"]
    if strict and missing:
        problems.append("missing: " + ", ".join(missing))
    if strict and unexpected:
        problems.append("unexpected: " + ", ".join(unexpected))
    if problems:
        raise RuntimeError(f"{owner}: nothing was loaded, because of\n  " + "\n  ".join(problems))
    for name in own.keys() & state.keys():
        own[name][...] = state[name]
    return missing, unexpected


# %%
if __name__ == "__main__":
    model = Linear(3, 2)
    before = model.state_dict()
    try:
        model.load_state_dict({"weight": np.zeros((3, 2)), "gain": np.ones(2)})
    except RuntimeError as error:
        print(error)
    after = model.state_dict()
    print("unchanged:", all(np.array_equal(before[name], after[name]) for name in before))

# %% [markdown]
"""
## 9. How do layers become a chain?

Most models are mostly chains: the output of one layer is the input of the next. `Sequential` keeps its
modules as attributes named "0", "1", …, so the walk finds them without any help, under the names that
PyTorch gives them.

**Build** `forward`. The children come from `named_children()`, in order.
"""

# %% nbgrader={"grade": false, "grade_id": "03-sequential", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
class Sequential(Module):
    """Modules in a row: the output of each is the input of the next."""

    def __init__(self, *modules):
        for index, module in enumerate(modules):
            if not is_module(module):
                raise TypeError(f"Sequential takes modules, as ReLU() and not ReLU, not {module!r}")
            setattr(self, str(index), module)

    def forward(self, x):
        ### BEGIN SOLUTION
        for _, module in self.named_children():
            x = module(x)
        return x
        ### END SOLUTION

    def __len__(self):
        return len(list(self.named_children()))

    def __getitem__(self, index):
        chosen = [module for _, module in self.named_children()][index]
        return Sequential(*chosen) if isinstance(index, slice) else chosen


# %%
class Add(Module):
    """A module that adds a number, for the checks."""

    def __init__(self, amount):
        self.amount = amount

    def forward(self, x):
        return x + self.amount


# %% nbgrader={"grade": true, "grade_id": "03-sequential-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_sequential():
    """Oracle: the chain written out by hand."""
    chain = Sequential(Add(-3.0), ReLU(), Add(1.0))
    y = chain(Tensor([1.0, 5.0]))
    assert isinstance(y, Tensor), f"got {type(y).__name__}, expected what the last module returned, a Tensor"
    check_array(y.data, [1, 3], "relu(x - 3) + 1: every module in turn, each on the output of the one before")
    model = Sequential(Linear(4, 8), ReLU(), Linear(8, 2))
    names = [name for name, _ in model.named_parameters()]
    assert names == ["0.weight", "0.bias", "2.weight", "2.bias"], f"got {names}, expected PyTorch's names"
    assert model(Tensor(np.ones((3, 4)))).shape == (3, 2), "(3, 4) goes in, so (3, 2) must come out"
    ### BEGIN HIDDEN TESTS
    y = Sequential(Add(1.0), ReLU())(Tensor([-5.0, 2.0]))
    check_array(y.data, [0, 3], "The order matters: add, then cut")
    nested = Sequential(Add(1.0), Sequential(Add(2.0), Add(4.0)))
    check_array(nested(Tensor([0.0])).data, [7], "A chain inside a chain runs as well")
    x = Tensor([1.0])
    assert Sequential()(x) is x, "An empty chain returns its input"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_sequential()

# %% [markdown]
"""
**Measure.** A model, printed; its parameters, counted by the formula of section 1 and by the walk; its
bytes.
"""

# %% nbgrader={"grade": false, "grade_id": "03-measure-model", "locked": true, "schema_version": 3, "solution": false, "task": false}
if __name__ == "__main__":
    model = Sequential(Linear(784, 128), ReLU(), Dropout(0.1), Linear(128, 10))
    print(model)
    predicted = 784 * 128 + 128 + 128 * 10 + 10
    counted = sum(parameter.size for parameter in model.parameters())
    nbytes = sum(array.nbytes for array in model.state_dict().values())
    print(f"parameters: predicted {predicted}, counted {counted}; {nbytes} bytes = {nbytes / 2**20:.3f} MiB")
    print(f"one walk over all parameters: {1000 * median_ms(model.parameters):.1f} microseconds")

# %% [markdown]
"""
## 10. The module test

All checks once more, and one scenario: a model with a shared weight is trained by hand, saved, loaded into
a fresh model, and gives the same answer in eval mode. A state that does not fit changes nothing.
"""

# %%
def make_model(seed):
    """A chain whose last layer shares the weight of the first."""
    rng = np.random.default_rng(seed)
    model = Sequential(Linear(6, 6, rng=rng), ReLU(), Dropout(0.5, rng=rng), Linear(6, 6, rng=rng))
    model[3].weight = model[0].weight
    return model


# %% nbgrader={"grade": true, "grade_id": "03-module-test", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
def test_module():
    """Oracle: the same model on both sides of a save, and a count by hand."""
    checks = [test_unit_linear, test_unit_initial, test_unit_walk, test_unit_shared, test_unit_linear_layer]
    checks += [test_unit_dropout_mask, test_unit_dropout, test_unit_compare, test_unit_sequential]
    for check in checks:
        check()

    first, second, x = make_model(1), make_model(2), Tensor(np.linspace(-1, 1, 12).reshape(2, 6))
    count = sum(parameter.size for parameter in first.parameters())
    assert count == 6 * 6 + 6 + 6, f"got {count} parameters, expected 48: a shared weight counts once"
    first.parameters()[0].data[...] += 1
    saved = first.state_dict()
    assert not np.array_equal(first.eval()(x).data, second.eval()(x).data), "two seeds must give two models"
    second.load_state_dict(saved)
    check_array(second(x).data, first(x).data, "After loading, both models must answer alike")
    saved["0.bias"] = np.zeros(7)
    try:
        second.load_state_dict(saved)
    except RuntimeError as error:
        assert "0.bias" in str(error), f"the error does not name 0.bias: {error}"
    else:
        raise AssertionError("a state with a wrong shape was loaded without an error")
    check_array(second(x).data, first(x).data, "After a failed load nothing may have changed")
    modes = [module.training for module in first.train().modules()]
    assert modes == [True] * 5, f"got {modes}, expected the chain and its four modules in training mode"


if __name__ == "__main__":
    test_module()
    print("Lesson 03: all checks passed")

# %% [markdown]
"""
## Summary

* A linear layer is `x @ weight.T + bias` over flattened rows; the weight has one row per output.
* Weights start of the order 1 / sqrt(in), so that numbers neither explode nor vanish with depth.
* A module finds its parameters by walking its attributes when asked; a shared one counts once.
* `train()` and `eval()` set one flag everywhere; dropout is the first to look at it.
* Loading compares everything first, then writes everything or nothing.
"""

# %% [markdown]
"""
## Exercises

1. Exchange the second layer of a `Sequential` by `setattr(model, "1", other)`. Does `state_dict()` follow?
2. `spread_after` has no activation. Add a ReLU after each layer. Which scale keeps the spread now? (He et
   al. 2015, arXiv:1502.01852, derive it.)
3. Write `freeze(module)`, which sets `requires_grad` of every parameter to False. Should `parameters()`
   still list them?
"""

# %% [markdown]
"""
## Design note: to register or to walk?

`torch.nn.Module` registers: its `__setattr__` puts every Parameter and every Module that is assigned into
hidden dictionaries (source: `torch/nn/modules/module.py`). Looking them up is fast, and buffers and hooks
have a place. The price: a plain list of modules is *not* seen, its weights are silently never trained, and
so `ModuleList` exists. Walking the attributes, as here and in Equinox (a JAX library whose modules are
plain trees), needs no second bookkeeping that can disagree with the first. The price is the walk itself,
measured above. Ask for the parameters once per training run, not once per number.
"""

# %% [markdown]
"""
## What comes next

A model answers, but nobody has told it yet how wrong it is. Lesson 04 turns answer and truth into one
number, and finds that `log` and `exp` break exactly where the model is most wrong.
"""

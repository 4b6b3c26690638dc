"""Layers: modules that own parameters: Linear, Dropout, Sequential.

Lesson 03_layers. Built from src/03_layers/03_layers.py by `tito dev build`: change it there, not here.
"""

__all__ = [
    "FEW_ROWS",
    "SOME_ROWS",
    "SMALL_PRODUCT",
    "times_rows",
    "linear_array",
    "initial_array",
    "Parameter",
    "attributes_of",
    "is_module",
    "Module",
    "describe",
    "first_of_each",
    "children_of",
    "walk_modules",
    "named_parameters_of",
    "walk_parameters",
    "Linear",
    "dropout_mask",
    "Dropout",
    "compare_state",
    "load_arrays",
    "Sequential",
]


# %% cell 2
import math

import numpy as np

from tinytorch.core.tensor import Tensor, apply, default_rng, multiply_array


# %% cell 11
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


# %% cell 13 (03-linear)
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
    y = times_rows(rows, weight)  # (N, out)
    if bias is not None:
        y += bias
    return y.reshape(*x.shape[:-1], weight.shape[0])


# %% cell 23 (03-initial)
def initial_array(shape, fan_in, rng):
    """Draw float32 values of that shape uniformly from -1/sqrt(fan_in) to 1/sqrt(fan_in) (torch.nn.Linear).

    >>> initial_array((2, 3), 4, np.random.default_rng(0)).shape
    (2, 3)
    """
    bound = 1 / math.sqrt(fan_in)
    return rng.uniform(-bound, bound, shape).astype(np.float32)


# %% cell 26
class Parameter(Tensor):
    """A Tensor that a module owns and that training changes."""

    def __init__(self, data, requires_grad=True, dtype=None):
        super().__init__(data, requires_grad=requires_grad, dtype=dtype)


# %% cell 28
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


# %% cell 30
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


# %% cell 32
def describe(module):
    """The text of repr(module): its class, its own words, and its children one level further in."""
    name, words = type(module).__name__, module.extra_repr()
    children = ["  (" + n + "): " + repr(child).replace("\n", "\n  ") for n, child in module.named_children()]
    if not children:
        return f"{name}({words})"
    return "\n".join([f"{name}({words}", *children, ")"])


# %% cell 34 (03-shared)
def first_of_each(pairs):
    """Yield each (name, parameter) whose parameter (the object, not its numbers) has not come before."""
    seen = set()
    for name, parameter in pairs:
        if id(parameter) not in seen:
            seen.add(id(parameter))
            yield name, parameter


# %% cell 37
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


# %% cell 42 (03-walk)
def walk_parameters(module, prefix=""):
    """Yield (name, parameter): first the module's own, then its children's; prefix comes before every name.

    >>> [name for name, _ in walk_parameters(Linear(2, 3), "head.")]
    ['head.weight', 'head.bias']
    """
    for name, value in attributes_of(module):
        if isinstance(value, Parameter):
            yield prefix + name, value
    for name, child in children_of(module):
        yield from named_parameters_of(child, prefix + name)


# %% cell 46 (03-linear-layer)
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
        if self.bias is None:
            return apply(linear_array, x, self.weight)
        return apply(linear_array, x, self.weight, self.bias)

    def extra_repr(self):
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


# %% cell 53 (03-dropout-mask)
def dropout_mask(shape, p, rng, dtype=np.float32):
    """Draw factors: 0 with probability p, else 1 / (1 - p).

    >>> dropout_mask((4,), 0.0, np.random.default_rng(0))
    array([1., 1., 1., 1.], dtype=float32)
    """
    if p == 1:
        return np.zeros(shape, dtype)
    mask = (rng.random(shape, dtype=np.float32) >= p).astype(dtype)
    mask *= 1 / (1 - p)
    return mask


# %% cell 56 (03-dropout)
class Dropout(Module):
    """In training mode, set a share p of the input to 0 and scale the rest by 1 / (1 - p)."""

    def __init__(self, p=0.5, rng=None):
        if not 0 <= p <= 1:
            raise ValueError(f"Dropout: p is a probability from 0 to 1, got {p}")
        self.p, self.rng = p, rng

    def generator(self):
        return default_rng() if self.rng is None else self.rng

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        dtype = x.dtype if x.dtype.kind == "f" else np.float32
        return apply(multiply_array, x, dropout_mask(x.shape, self.p, self.generator(), dtype))

    def extra_repr(self):
        return f"p={self.p}"


# %% cell 59 (03-compare)
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
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    return missing, unexpected, sorted(mismatched)


# %% cell 62
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


# %% cell 65 (03-sequential)
class Sequential(Module):
    """Modules in a row: the output of each is the input of the next."""

    def __init__(self, *modules):
        for index, module in enumerate(modules):
            if not is_module(module):
                raise TypeError(f"Sequential takes modules, as ReLU() and not ReLU, not {module!r}")
            setattr(self, str(index), module)

    def forward(self, x):
        for _, module in self.named_children():
            x = module(x)
        return x

    def __len__(self):
        return len(list(self.named_children()))

    def __getitem__(self, index):
        chosen = [module for _, module in self.named_children()][index]
        return Sequential(*chosen) if isinstance(index, slice) else chosen

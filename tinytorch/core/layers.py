"""Layers: written ahead of the build, which overwrites this file with the cells of lesson 03."""

import math

import numpy as np

from tinytorch.core.tensor import Tensor, apply, default_rng, multiply_array


class Parameter(Tensor):
    """A Tensor that a model owns and that training changes."""

    def __init__(self, data, requires_grad=True, dtype=None):
        data = data.data if isinstance(data, Tensor) else data
        super().__init__(data, requires_grad=requires_grad, dtype=dtype)


def is_module(value):
    return isinstance(value, Module) or (
        not isinstance(value, type) and hasattr(value, "forward") and hasattr(value, "parameters")
    )


def attributes_of(owner):
    """(name, value) pairs of an object; lists and tuples are opened as name.0, name.1."""
    for name, value in vars(owner).items():
        if isinstance(value, (list, tuple)):
            for index, item in enumerate(value):
                yield f"{name}.{index}", item
        else:
            yield name, value


class Module:
    training = True

    def forward(self, *inputs, **options):
        raise NotImplementedError(f"{type(self).__name__} has no forward method yet")

    def __call__(self, *inputs, **options):
        return self.forward(*inputs, **options)

    def named_children(self):
        for name, value in attributes_of(self):
            if is_module(value):
                yield name, value

    def modules(self):
        seen, stack = set(), [self]
        while stack:
            module = stack.pop()
            if id(module) not in seen:
                seen.add(id(module))
                yield module
                if isinstance(module, Module):
                    stack.extend(child for _, child in reversed(list(module.named_children())))

    def named_parameters(self, prefix=""):
        seen = set()
        for name, parameter in walk_parameters(self, prefix):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield name, parameter

    def parameters(self):
        return [parameter for _, parameter in self.named_parameters()]

    def state_dict(self):
        return {name: parameter.data.copy() for name, parameter in self.named_parameters()}

    def load_state_dict(self, state, strict=True):
        own = dict(self.named_parameters())
        state = {n: np.asarray(v.data if isinstance(v, Tensor) else v) for n, v in state.items()}
        missing = [n for n in own if n not in state]
        unexpected = [n for n in state if n not in own]
        mismatched = [
            f"{n}: {state[n].shape} given, {p.shape} needed"
            for n, p in own.items() if n in state and state[n].shape != p.shape
        ]
        problems = []
        if strict and missing:
            problems.append("missing: " + ", ".join(missing))
        if strict and unexpected:
            problems.append("unexpected: " + ", ".join(unexpected))
        if mismatched:
            problems.append("wrong shape: " + "; ".join(mismatched))
        if problems:
            raise RuntimeError(f"{type(self).__name__}: nothing loaded. " + ". ".join(problems))
        for name, parameter in own.items():
            if name in state:
                np.copyto(parameter.data, state[name], casting="same_kind")
        return missing, unexpected

    def train(self, mode=True):
        for module in self.modules():
            module.training = mode
        return self

    def eval(self):
        return self.train(False)

    def zero_grad(self):
        for parameter in self.parameters():
            parameter.zero_grad()

    def extra_repr(self):
        return ""

    def __repr__(self):
        children = [f"  ({n}): " + repr(c).replace("\n", "\n  ") for n, c in self.named_children()]
        if not children:
            return f"{type(self).__name__}({self.extra_repr()})"
        return "\n".join([f"{type(self).__name__}({self.extra_repr()}", *children, ")"])


def walk_parameters(module, prefix=""):
    """Own parameters, then those of the children in order; shared ones as often as they are met."""
    for name, value in attributes_of(module):
        if isinstance(value, Parameter):
            yield prefix + name, value
    for name, child in module.named_children():
        if isinstance(child, Module):
            yield from child.named_parameters(f"{prefix}{name}.")


def linear_array(x, weight, bias=None):
    """x @ weight.T + bias: x (..., in), weight (out, in), bias (out,) -> (..., out)."""
    if x.dtype.kind != "f":
        x = x.astype(weight.dtype)
    if x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"Linear needs in_features={weight.shape[1]} as last dimension, got shape {x.shape}")
    y = x.reshape(-1, x.shape[-1]) @ weight.T
    if bias is not None:
        y += bias
    return y.reshape(*x.shape[:-1], weight.shape[0])


class Linear(Module):
    def __init__(self, in_features, out_features, bias=True, rng=None):
        self.in_features, self.out_features = in_features, out_features
        rng = rng or default_rng()
        bound = 1 / math.sqrt(in_features)
        shape = (out_features, in_features)
        self.weight = Parameter(rng.uniform(-bound, bound, shape).astype(np.float32))
        self.bias = Parameter(rng.uniform(-bound, bound, out_features).astype(np.float32)) if bias else None

    def forward(self, x):
        if self.bias is None:
            return apply(linear_array, x, self.weight)
        return apply(linear_array, x, self.weight, self.bias)

    def extra_repr(self):
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


def dropout_mask(shape, p, rng, dtype=np.dtype(np.float32)):
    """0 with probability p, else 1 / (1 - p)."""
    if p == 1:
        return np.zeros(shape, dtype)
    return (rng.random(shape, dtype=np.float32) >= p).astype(dtype) * dtype.type(1 / (1 - p))


class Dropout(Module):
    def __init__(self, p=0.5, rng=None):
        if not 0 <= p <= 1:
            raise ValueError(f"p is a probability, 0 to 1, got {p}")
        self.p, self.rng = p, rng

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        rng = self.rng or default_rng()
        return apply(multiply_array, x, dropout_mask(x.shape, self.p, rng, x.dtype))

    def extra_repr(self):
        return f"p={self.p}"


class Sequential(Module):
    def __init__(self, *modules):
        for index, module in enumerate(modules):
            if not is_module(module):
                raise TypeError(f"Sequential takes modules such as ReLU(), position {index} holds {module!r}")
            setattr(self, str(index), module)

    def forward(self, x):
        for _, module in self.named_children():
            x = module(x)
        return x

    def __len__(self):
        return sum(1 for _ in self.named_children())

    def __getitem__(self, index):
        return [child for _, child in self.named_children()][index]

"""Activations: ReLU, GELU, softmax and their relatives, safe for large numbers.

Lesson 02_activations. Built from src/02_activations/02_activations.py by `tito dev build`: change it there, not here.
"""

__all__ = [
    "as_float",
    "tanh_array",
    "relu_array",
    "sigmoid_array",
    "silu_array",
    "SQRT_2_OVER_PI",
    "gelu_array",
    "shift_array",
    "sum_along",
    "softmax_array",
    "log_softmax_array",
    "relu",
    "sigmoid",
    "tanh",
    "gelu",
    "silu",
    "softmax",
    "log_softmax",
    "Activation",
    "ReLU",
    "Sigmoid",
    "Tanh",
    "GELU",
    "SiLU",
    "Softmax",
]


# %% cell 2
import math

import numpy as np

from tinytorch.core.tensor import apply


# %% cell 12
def as_float(x):
    """Return x itself where it is floating, else as float32 (NumPy alone would choose float64).

    >>> as_float(np.array([1, 2])).dtype
    dtype('float32')
    """
    x = np.asarray(x)
    return x if x.dtype.kind == "f" else x.astype(np.float32)


def tanh_array(x):
    """Squash into (-1, 1), any shape.

    >>> tanh_array(np.array([0.0, 100.0]))
    array([0., 1.])
    """
    return np.tanh(as_float(x))


# %% cell 14 (02-relu)
def relu_array(x):
    """Keep what is positive, replace the rest by 0; any shape, a new array.

    >>> relu_array(np.array([-2.0, 1.5]))
    array([0. , 1.5])
    """
    return np.maximum(x, 0)


# %% cell 22 (02-sigmoid)
def sigmoid_array(x):
    """Squash into (0, 1) without overflow, any shape: 1 / (1 + exp(-x)).

    >>> sigmoid_array(np.array([-1e4, 0.0, 1e4]))
    array([0. , 0.5, 1. ])
    """
    x = as_float(x)
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, e) / (1 + e)


# %% cell 25
def silu_array(x):
    """Multiply x by its own sigmoid, any shape (also called swish).

    >>> silu_array(np.array([-1e4, 0.0, 1e4]))
    array([   -0.,     0., 10000.])
    """
    x = as_float(x)
    return x * sigmoid_array(x)


# %% cell 27 (02-gelu)
SQRT_2_OVER_PI = math.sqrt(2 / math.pi)


def gelu_array(x):
    """Multiply x by the (approximate) chance that a normal number is below it; the tanh form, any shape.

    >>> gelu_array(np.array([-10.0, 0.0, 10.0]))
    array([-0.,  0., 10.])
    """
    x = as_float(x)
    inner = np.empty_like(x)  # one buffer for every step: large temporaries cost more than the arithmetic
    np.multiply(x, x, out=inner)
    inner *= 0.044715 * SQRT_2_OVER_PI
    inner += SQRT_2_OVER_PI
    inner *= x  # sqrt(2/pi) (x + 0.044715 x^3)
    np.tanh(inner, out=inner)
    inner += 1
    inner *= x
    inner *= 0.5
    return inner


# %% cell 40 (02-shift)
def shift_array(x, dim):
    """Subtract from floating x its largest value along dim, so that this becomes 0; a row of -inf stays -inf.

    >>> shift_array(np.array([[1001.0, 1003.0]]), -1)
    array([[-2.,  0.]])
    """
    peak = np.maximum.reduce(x, axis=dim, keepdims=True, initial=np.finfo(x.dtype).min)
    return x - peak


# %% cell 43
def sum_along(x, dim):
    """The sum along dim, which stays as size 1.

    >>> sum_along(np.array([[1.0, 2.0], [3.0, 4.0]]), -1)
    array([[3.],
           [7.]])
    """
    if x.size > 4096 and dim in (-1, x.ndim - 1):
        return np.vecdot(x, np.ones(x.shape[-1], x.dtype))[..., None]
    return np.add.reduce(x, axis=dim, keepdims=True)


# %% cell 45 (02-softmax)
def softmax_array(x, dim=-1):
    """Turn scores into shares that are positive and sum to 1 along dim; same shape as x.

    A row of -inf gets 0 everywhere (torch.softmax: NaN; its attention: 0, as here).

    >>> softmax_array(np.array([[1e4, 1e4], [-np.inf, -np.inf]]))
    array([[0.5, 0.5],
           [0. , 0. ]])
    """
    x = as_float(x)
    shares = shift_array(x, dim)
    np.exp(shares, out=shares)
    shares /= np.maximum(sum_along(shares, dim), 1)
    return shares


# %% cell 53 (02-log-softmax)
def log_softmax_array(x, dim=-1):
    """Return the logarithm of softmax, without ever taking the logarithm of a share; same shape as x.

    >>> log_softmax_array(np.array([0.0, -200.0]))
    array([   0., -200.])
    """
    x = as_float(x)
    shifted = shift_array(x, dim)
    shifted -= np.log(np.maximum(sum_along(np.exp(shifted), dim), 1))
    return shifted


# %% cell 58
def relu(x):
    """ReLU of a Tensor: max(x, 0)."""
    return apply(relu_array, x)


def sigmoid(x):
    """Sigmoid of a Tensor: 1 / (1 + exp(-x))."""
    return apply(sigmoid_array, x)


def tanh(x):
    """Hyperbolic tangent of a Tensor."""
    return apply(tanh_array, x)


def gelu(x):
    """GELU of a Tensor in its tanh form: torch.nn.functional.gelu(x, approximate="tanh")."""
    return apply(gelu_array, x)


def silu(x):
    """SiLU of a Tensor: x * sigmoid(x)."""
    return apply(silu_array, x)


# %% cell 60 (02-door)
def softmax(x, dim=-1):
    """Softmax of a Tensor along dim."""
    return apply(softmax_array, x, dim=dim)


def log_softmax(x, dim=-1):
    """Logarithm of the softmax of a Tensor along dim."""
    return apply(log_softmax_array, x, dim=dim)


# %% cell 64
class Activation:
    """A layer without parameters: calling it runs forward."""

    def __call__(self, x):
        return self.forward(x)

    def parameters(self):
        return []

    def __repr__(self):
        return f"{type(self).__name__}()"


class ReLU(Activation):
    """max(x, 0) as a module."""

    def forward(self, x):
        return relu(x)


class Sigmoid(Activation):
    """1 / (1 + exp(-x)) as a module."""

    def forward(self, x):
        return sigmoid(x)


# %% cell 65
class Tanh(Activation):
    """The hyperbolic tangent as a module."""

    def forward(self, x):
        return tanh(x)


class GELU(Activation):
    """GELU in its tanh form as a module."""

    def forward(self, x):
        return gelu(x)


class SiLU(Activation):
    """x * sigmoid(x) as a module."""

    def forward(self, x):
        return silu(x)


# %% cell 67 (02-softmax-module)
class Softmax(Activation):
    """Softmax along dim as a module."""

    def __init__(self, dim=-1):
        self.dim = dim

    def forward(self, x):
        return softmax(x, dim=self.dim)

    def __repr__(self):
        return f"Softmax(dim={self.dim})"

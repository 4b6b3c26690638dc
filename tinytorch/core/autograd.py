"""Autograd: a table of gradient rules and one walk over the graph.

Lesson 05_autograd. Built from src/05_autograd/05_autograd.py by `tito dev build`: change it there, not here.
"""

__all__ = [
    "numeric_gradient",
    "RULES",
    "gradient",
    "add_rule",
    "subtract_rule",
    "divide_rule",
    "negative_rule",
    "multiply_rule",
    "unbroadcast",
    "exp_rule",
    "log_rule",
    "sqrt_rule",
    "abs_rule",
    "clone_rule",
    "power_rule",
    "matmul_gradients",
    "matmul_rule",
    "kept",
    "sum_rule",
    "mean_rule",
    "extreme_rule",
    "reshape_rule",
    "permute_rule",
    "transpose_rule",
    "expand_rule",
    "cat_rule",
    "stack_rule",
    "picks_once",
    "index_rule",
    "relu_rule",
    "sigmoid_rule",
    "tanh_rule",
    "silu_rule",
    "gelu_rule",
    "softmax_rule",
    "log_softmax_rule",
    "linear_rule",
    "cross_entropy_gradient",
    "cross_entropy_rule",
    "mse_rule",
    "bce_rule",
    "bce_with_logits_rule",
    "Node",
    "FREED",
    "record",
    "topological_order",
    "parents_of",
    "lend",
    "fit",
    "local_gradients",
    "accumulate",
    "backpropagate",
    "backward",
    "Engine",
    "ENGINE",
    "enable_autograd",
    "no_grad",
    "check_gradients",
]


# %% cell 2
from contextlib import contextmanager

import numpy as np

from tinytorch.core.tensor import Tensor, plug_in, unwrap


# %% cell 5 (05-numeric)
def numeric_gradient(f, x, eps=1e-6):
    """Slopes of a number f(x) by central differences, for each entry of a float64 array; x itself stays unchanged.

    >>> numeric_gradient(lambda x: (x * x).sum(), np.array([3.0, -1.0])).round(6).tolist()
    [6.0, -2.0]
    """
    grad = np.zeros(x.shape)
    for index in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[index] += eps
        down[index] -= eps
        grad[index] = (f(up) - f(down)) / (2 * eps)
    return grad


# %% cell 12
RULES = {}


def gradient(op):
    """Decorator that puts a rule into the table: rule(grad, output, *inputs, **params) -> one gradient per input.

    Everything is a plain array. A gradient may be None (there is none), or a function without arguments that
    computes it, which the engine calls only if somebody wants it. The engine also undoes broadcasting.
    """

    def enter(rule):
        RULES[op] = rule
        return rule

    return enter


# %% cell 14
from tinytorch.core.tensor import add_array, divide_array, multiply_array, negative_array, power_array, subtract_array


@gradient(add_array)
def add_rule(grad, output, a, b):
    return grad, grad


@gradient(subtract_array)
def subtract_rule(grad, output, a, b):
    return grad, lambda: -grad


@gradient(divide_array)
def divide_rule(grad, output, a, b):
    return lambda: grad / b, lambda: -grad * output / b  # output is a / b


@gradient(negative_array)
def negative_rule(grad, output, x):
    return (-grad,)


# %% cell 18 (05-multiply)
@gradient(multiply_array)
def multiply_rule(grad, output, a, b):
    """Gradients of a * b: what arrives, times the other side."""
    return lambda: grad * b, lambda: grad * a


# %% cell 21 (05-unbroadcast)
def unbroadcast(grad, shape):
    """Sum a gradient back to the shape from which its input was stretched.

    >>> unbroadcast(np.array([[1, 2, 3], [4, 5, 6]]), (2, 1)).tolist()
    [[6], [15]]
    """
    added = grad.ndim - len(shape)
    stretched = tuple(i + added for i, size in enumerate(shape) if size == 1)
    return np.add.reduce(grad, axis=tuple(range(added)) + stretched, keepdims=True).reshape(shape)


# %% cell 24
from tinytorch.core.tensor import abs_array, clone_array, exp_array, log_array, sqrt_array


@gradient(exp_array)
def exp_rule(grad, output, x):
    return (grad * output,)


@gradient(log_array)
def log_rule(grad, output, x):
    return (grad / x,)


@gradient(sqrt_array)
def sqrt_rule(grad, output, x):
    return (0.5 * grad / output,)


@gradient(abs_array)
def abs_rule(grad, output, x):
    return (grad * np.sign(x),)


@gradient(clone_array)
def clone_rule(grad, output, x):
    return (grad,)


@gradient(power_array)
def power_rule(grad, output, a, b):
    lower = np.where(b == 0, 1, b - 1) if isinstance(b, np.ndarray) else (b - 1 if b else 1)
    return (
        lambda: grad * b * power_array(a, lower),
        lambda: grad * output * np.log(np.where(a > 0, a, 1).astype(output.dtype)),
    )


# %% cell 26 (05-matmul)
def matmul_gradients(grad, a, b):
    """Functions for the gradients of a @ b: a (..., n, k), b (..., k, m), grad (..., n, m)."""
    return lambda: grad @ np.swapaxes(b, -1, -2), lambda: np.swapaxes(a, -1, -2) @ grad


# %% cell 29
from tinytorch.core.tensor import matmul_array


@gradient(matmul_array)
def matmul_rule(grad, output, a, b):
    if a.ndim > 1 and b.ndim == 2:
        rows = a.reshape(-1, a.shape[-1])
        grad_a, grad_b = matmul_gradients(grad.reshape(-1, grad.shape[-1]), rows, b)
        return lambda: grad_a().reshape(a.shape), grad_b
    grad = grad[..., None] if b.ndim == 1 else grad
    grad = grad[..., None, :] if a.ndim == 1 else grad
    grad_a, grad_b = matmul_gradients(grad, np.atleast_2d(a), b[:, None] if b.ndim == 1 else b)
    return (
        lambda: grad_a()[..., 0, :] if a.ndim == 1 else grad_a(),
        lambda: grad_b()[..., 0] if b.ndim == 1 else grad_b(),
    )


# %% cell 31
from tinytorch.core.tensor import max_array, mean_array, min_array, sum_array


def kept(array, shape, dim):
    """A reduced array with its folded dimensions back as size 1: (2,) from (2, 3) along dim 1 -> (2, 1)."""
    if dim is None:
        return np.reshape(array, (1,) * len(shape))
    folded = {d % len(shape) for d in (dim if isinstance(dim, (tuple, list)) else (dim,))}
    return np.reshape(array, tuple(1 if i in folded else n for i, n in enumerate(shape)))


@gradient(sum_array)
def sum_rule(grad, output, x, dim=None, keepdim=False):
    return (np.broadcast_to(kept(grad, x.shape, dim), x.shape),)


@gradient(mean_array)
def mean_rule(grad, output, x, dim=None, keepdim=False):
    share = grad / (x.size // max(np.size(output), 1))
    return (np.broadcast_to(kept(share, x.shape, dim), x.shape),)


# %% cell 33 (05-max)
@gradient(max_array)
@gradient(min_array)
def extreme_rule(grad, output, x, dim=None, keepdim=False):
    """The slope goes to the winners, in equal shares; kept(...) lines grad and output up with x."""
    winners = (x == kept(output, x.shape, dim)).astype(x.dtype)
    count = kept(sum_array(winners, dim), x.shape, dim)
    return (winners * (kept(grad, x.shape, dim) / count),)


# %% cell 36
from tinytorch.core.tensor import (
    cat_array,
    expand_array,
    permute_array,
    reshape_array,
    squeeze_array,
    stack_array,
    transpose_array,
    unsqueeze_array,
)


@gradient(reshape_array)
@gradient(squeeze_array)
@gradient(unsqueeze_array)
def reshape_rule(grad, output, x, **params):
    return (grad.reshape(x.shape),)


@gradient(permute_array)
def permute_rule(grad, output, x, dims):
    return (np.transpose(grad, np.argsort([d % x.ndim for d in dims])),)


@gradient(transpose_array)
def transpose_rule(grad, output, x, dim0, dim1):
    return (np.swapaxes(grad, dim0, dim1),)


@gradient(expand_array)
def expand_rule(grad, output, x, shape):
    return (grad,)


@gradient(cat_array)
def cat_rule(grad, output, *arrays, dim=0):
    ends = np.cumsum([a.shape[dim] for a in arrays])
    return tuple(np.split(grad, ends[:-1], axis=dim))


@gradient(stack_array)
def stack_rule(grad, output, *arrays, dim=0):
    return tuple(np.moveaxis(grad, dim, 0))


# %% cell 38
from tinytorch.core.tensor import index_array


def picks_once(key):
    """Whether a key cannot pick an entry twice: ints, slices, None and ... only."""
    keys = key if isinstance(key, tuple) else (key,)
    return all(k is None or k is Ellipsis or isinstance(k, (int, slice)) for k in keys)


# %% cell 39 (05-index)
@gradient(index_array)
def index_rule(grad, output, x, key):
    """The gradient of x[key]: zeros like x, with the slopes added where they were picked."""
    result = np.zeros_like(x)
    if picks_once(key):
        result[key] = grad
    else:
        np.add.at(result, key, grad)
    return (result,)


# %% cell 42
from tinytorch.core.activations import (
    gelu_array,
    log_softmax_array,
    relu_array,
    sigmoid_array,
    silu_array,
    softmax_array,
    tanh_array,
)


@gradient(relu_array)
def relu_rule(grad, output, x):
    return (grad * (output > 0),)


@gradient(sigmoid_array)
def sigmoid_rule(grad, output, x):
    return (grad * output * (1 - output),)


@gradient(tanh_array)
def tanh_rule(grad, output, x):
    return (grad * (1 - output * output),)


@gradient(silu_array)
def silu_rule(grad, output, x):
    s = sigmoid_array(x)
    return (grad * (s + output * (1 - s)),)


# %% cell 44
@gradient(gelu_array)
def gelu_rule(grad, output, x):
    c = 0.7978845608028654  # sqrt(2 / pi)
    square = x * x
    t = square * (0.044715 * c)
    t += c
    t *= x
    np.tanh(t, out=t)
    square *= 1.5 * 0.044715 * c
    square += 0.5 * c
    square *= x  # x u' / 2
    square *= 1 - t
    square += 0.5
    t += 1
    square *= t
    square *= grad
    return (square,)


# %% cell 46 (05-softmax)
@gradient(softmax_array)
def softmax_rule(grad, output, x, dim=-1):
    """output holds the probabilities; the average slope is taken along dim."""
    product = grad * output
    product -= output * np.add.reduce(product, axis=dim, keepdims=True)
    return (product,)


# %% cell 49
from tinytorch.core.layers import linear_array


@gradient(log_softmax_array)
def log_softmax_rule(grad, output, x, dim=-1):
    return (grad - np.exp(output) * np.add.reduce(grad, axis=dim, keepdims=True),)


@gradient(linear_array)
def linear_rule(grad, output, x, weight, bias=None):
    rows, slopes = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])  # (N, in), (N, out)
    grads = (
        lambda: (slopes @ weight).reshape(x.shape),
        lambda: slopes.T @ rows,  # (out, N) @ (N, in) -> (out, in)
        lambda: np.ones(len(slopes), slopes.dtype) @ slopes,  # their sum; BLAS adds faster than np.add.reduce
    )
    return grads[:2] if bias is None else grads


# %% cell 51 (05-cross-entropy)
def cross_entropy_gradient(grad, rows, ids, counted):
    """Gradient of the mean cross entropy: rows (N, C), ids (N,) ints, counted (N,) booleans -> (N, C)."""
    slopes = softmax_array(rows)
    places = np.flatnonzero(counted)
    slopes[places, ids[places]] -= 1
    slopes[~counted] = 0
    slopes *= grad / max(len(places), 1)
    return slopes


# %% cell 53
from tinytorch.core.losses import bce_array, bce_with_logits_array, cross_entropy_array, mse_array, safe_log


@gradient(cross_entropy_array)
def cross_entropy_rule(grad, output, logits, target, ignore_index=-100):
    rows, ids = logits.reshape(-1, logits.shape[-1]), np.reshape(target, -1)
    return cross_entropy_gradient(grad, rows, ids, ids != ignore_index).reshape(logits.shape), None


@gradient(mse_array)
def mse_rule(grad, output, prediction, target):
    target = np.asarray(target, prediction.dtype)  # counts as a target would widen the difference
    slopes = (prediction - target) * (2 * grad / prediction.size)
    return slopes, lambda: -slopes


@gradient(bce_array)
def bce_rule(grad, output, probabilities, target):
    p, share = probabilities, grad / probabilities.size
    target = np.asarray(target, p.dtype)
    return (
        lambda: share * (p - target) / np.maximum(p * (1 - p), 1e-12),
        lambda: share * (safe_log(1 - p) - safe_log(p)),
    )


@gradient(bce_with_logits_array)
def bce_with_logits_rule(grad, output, logits, target):
    share, target = grad / logits.size, np.asarray(target, logits.dtype)
    return lambda: share * (sigmoid_array(logits) - target), lambda: -share * logits


# %% cell 55
class Node:
    """Where a Tensor came from."""

    __slots__ = ("op", "inputs", "params", "output")

    def __init__(self, op, inputs, params, output):
        self.op = op
        self.inputs = inputs
        self.params = params
        self.output = output  # the array, not the Tensor: a Tensor that knew itself would never be freed


FREED = Node(None, (), {}, None)


# %% cell 57 (05-record)
def record(op, inputs, params, output):
    """Leave a Node(op, inputs, params, output.data) as output._node where a gradient will be wanted."""
    for x in inputs:
        if isinstance(x, Tensor) and x.requires_grad:
            if output.data.dtype.kind == "f":
                output.requires_grad = True
                output._node = Node(op, inputs, params, output.data)
            return


# %% cell 64 (05-topological)
def topological_order(root, parents):
    """All nodes that root comes from, each once, parents before children, root last.

    >>> graph = {"loss": ["p", "c"], "p": ["x"], "c": ["x"], "x": []}
    >>> topological_order("loss", graph.get)
    ['x', 'c', 'p', 'loss']
    """
    order, seen, stack = [], set(), [(root, False)]
    while stack:
        node, finished = stack.pop()
        if finished:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((parent, False) for parent in parents(node) if parent not in seen)
    return order


# %% cell 67
def parents_of(tensor):
    """The inputs that want a gradient; none for a leaf."""
    node = tensor._node
    if node is None:
        return ()
    if node is FREED:
        raise RuntimeError(
            "backward() came to a part of the graph that an earlier backward() has used up. "
            "Run the forward pass again, or add the losses up and call backward() once."
        )
    if node.op not in RULES:
        name = getattr(node.op, "__name__", repr(node.op))
        raise NotImplementedError(f"there is no gradient rule for {name}: write one with @gradient({name}).")
    return [x for x in node.inputs if isinstance(x, Tensor) and x.requires_grad]


def lend(array):
    """A view of an array that cannot be written to: who wants to keep it makes a copy."""
    view = np.asarray(array).view()
    view.flags.writeable = False
    return view


def fit(grad, array, op):
    """A rule's gradient with the shape and the dtype of the input it belongs to."""
    grad = np.asarray(grad()) if callable(grad) else lend(grad)
    if grad.shape != array.shape:
        if grad.ndim < array.ndim or any(n not in (1, m) for n, m in zip(array.shape[::-1], grad.shape[::-1])):
            raise ValueError(f"the rule of {op.__name__} gave shape {grad.shape} for an input of shape {array.shape}.")
        grad = unbroadcast(grad, array.shape)
    return grad if grad.dtype == array.dtype else grad.astype(array.dtype)


def local_gradients(node, grad):
    """Pairs (input, its gradient) for the inputs of one operation that want one."""
    results = RULES[node.op](lend(grad), node.output, *unwrap(node.inputs), **node.params)
    return [
        (x, fit(result, x.data, node.op))
        for x, result in zip(node.inputs, results)
        if result is not None and isinstance(x, Tensor) and x.requires_grad
    ]


# %% cell 69 (05-accumulate)
def accumulate(leaf, grad):
    """Add an array to leaf.grad, a Tensor of the leaf's dtype that owns its memory."""
    if leaf.dtype.kind != "f":
        raise TypeError(f"a Tensor of {leaf.dtype} cannot hold a gradient: make it with dtype=np.float32.")
    if leaf.grad is None:
        leaf.grad = Tensor(grad if grad.flags.writeable else grad.copy(), dtype=leaf.dtype)
    else:
        leaf.grad.data += grad


# %% cell 72 (05-backpropagate)
def backpropagate(tensor, grad):
    """Carry the array `grad` from a Tensor to all leaves that it came from, freeing the graph on the way."""
    order = topological_order(tensor, parents_of)
    grads = {tensor: grad}
    while order:
        tensor = order.pop()
        grad, node = grads.pop(tensor, None), tensor._node
        if node is not None:
            tensor._node = FREED
        if grad is None:
            continue
        if node is None:
            accumulate(tensor, grad)
            continue
        for x, share in local_gradients(node, grad):
            grads[x] = grads[x] + share if x in grads else share


# %% cell 75
def backward(tensor, gradient=None):
    """Fill .grad of every leaf that tensor came from; gradient is the slope that arrives, 1 for a single number."""
    if not tensor.requires_grad:
        raise RuntimeError(
            "backward() needs a Tensor that was computed from one with requires_grad=True, and not inside no_grad()."
        )
    if gradient is None and tensor.size != 1:
        raise RuntimeError(
            f"backward() without a gradient needs a single number, this Tensor has shape {tensor.shape}. "
            "Reduce it with sum() or mean(), or pass backward(gradient) with a gradient of that shape."
        )
    grad = lend(np.ones(tensor.shape, tensor.dtype) if gradient is None else np.asarray(gradient, dtype=tensor.dtype))
    if grad.shape != tensor.shape:
        raise ValueError(f"backward(gradient) needs the shape of the Tensor, {tensor.shape}, got {grad.shape}.")
    backpropagate(tensor, grad)


class Engine:
    """What lesson 01's socket takes."""

    record = staticmethod(record)
    backward = staticmethod(backward)


ENGINE = Engine()


def enable_autograd():
    """Plug the engine in: from now on gradients are recorded."""
    plug_in(ENGINE, everywhere=True)


enable_autograd()


# %% cell 78 (05-no-grad)
@contextmanager
def no_grad():
    """Record nothing within the block; serves as a decorator, too.

    >>> with no_grad():
    ...     (Tensor([1.0], requires_grad=True) * 2).requires_grad
    False
    """
    previous = plug_in(None)
    try:
        yield
    finally:
        plug_in(previous)


# %% cell 81
def check_gradients(function, *arrays, eps=1e-6, tolerance=1e-5):
    """Compare backward() with central differences; AssertionError names input, index, got and expected.

    Arrays are taken in float64; floating ones get a gradient, integers (ids, targets) are handed on as they are.

    >>> check_gradients(lambda x: x.exp().sum(), np.array([0.5, -1.0]))
    """
    arrays = [np.asarray(a, dtype=np.float64) if np.asarray(a).dtype.kind == "f" else np.asarray(a) for a in arrays]
    inputs = [Tensor(a, requires_grad=a.dtype.kind == "f", dtype=a.dtype) for a in arrays]
    output = function(*inputs)
    slopes = np.random.default_rng(0).standard_normal(output.shape)
    backward(output, slopes)
    for i, (x, array) in enumerate(zip(inputs, arrays)):
        if not x.requires_grad:
            continue

        def value(moved, i=i):
            with no_grad():
                moved_inputs = [*inputs[:i], Tensor(moved, dtype=np.float64), *inputs[i + 1 :]]
                return float((function(*moved_inputs).data * slopes).sum())

        expected = numeric_gradient(value, array, eps)
        got = np.zeros_like(array) if x.grad is None else x.grad.data
        wrong = np.argwhere(~(np.abs(got - expected) <= tolerance * (1 + np.abs(expected))))
        if len(wrong):
            index = tuple(int(n) for n in wrong[0])
            raise AssertionError(
                f"gradient of input {i} at index {index}: got {got[index]:.8g}, "
                f"central differences say {expected[index]:.8g}"
            )

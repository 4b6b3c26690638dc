"""Tensor: arrays with an operation behind one door, ready for gradients.

Lesson 01_tensor. Built from src/01_tensor/01_tensor.py by `tito dev build`: change it there, not here.
"""

__all__ = [
    "settle_dtype",
    "tensor_data",
    "broadcast_error",
    "broadcast_shape",
    "elementwise",
    "add_array",
    "subtract_array",
    "multiply_array",
    "divide_array",
    "power_array",
    "negative_array",
    "floats",
    "exp_array",
    "log_array",
    "sqrt_array",
    "abs_array",
    "clone_array",
    "matmul_error",
    "multiply_matrices",
    "matmul_array",
    "place",
    "reduce_array",
    "sum_array",
    "max_array",
    "min_array",
    "argmax_array",
    "mean_array",
    "reshape_error",
    "infer_shape",
    "reshape_array",
    "permute_array",
    "unsqueeze_array",
    "squeeze_array",
    "expand_array",
    "transpose_array",
    "index_array",
    "cat_array",
    "stack_array",
    "OrderedArithmetic",
    "Arithmetic",
    "in_place",
    "InPlace",
    "Comparison",
    "Functions",
    "sizes_of",
    "Shaping",
    "Values",
    "Socket",
    "plug_in",
    "Tensor",
    "as_operand",
    "unwrap",
    "wrap",
    "apply",
    "default_rng",
    "manual_seed",
    "randn",
    "zeros",
    "ones",
    "arange",
    "cat",
    "stack",
]


# %% cell 2
import math
import threading

import numpy as np


# %% cell 11 (01-dtype)
def settle_dtype(array):
    """Floating arrays as float32, all others unchanged; a float32 array comes back without a copy.

    >>> settle_dtype(np.array([1.5, 2.5])).dtype, settle_dtype(np.array([True])).dtype
    (dtype('float32'), dtype('bool'))
    """
    if array.dtype.kind == "f":
        return array.astype(np.float32, copy=False)
    return array


# %% cell 14
def tensor_data(data, dtype=None):
    """Anything number-like as an array with a dtype of the course; shares memory with an array that already fits.

    >>> tensor_data([[1.0, 2.0], [3.0, 4.0]]).dtype
    dtype('float32')
    """
    try:
        array = np.asarray(data, dtype=dtype)
    except ValueError:
        raise ValueError(
            "Tensor: the data is not a full grid of numbers: rows of different length, or text. "
            "Give every row the same length, or pad the short ones."
        ) from None
    if array.dtype.kind not in "biuf":
        raise TypeError(f"Tensor: needs numbers, got {array.dtype} data. Turn it into ints or floats first.")
    return array if dtype is not None else settle_dtype(array)


# %% cell 19
def broadcast_error(shape_a, shape_b, column):
    """The sentence for two shapes that disagree in `column`, counted from the right, beginning with 1."""
    return ValueError(
        f"shapes {tuple(shape_a)} and {tuple(shape_b)} do not broadcast: from the right, dimension {column} is "
        f"{shape_a[-column]} in one and {shape_b[-column]} in the other. They must be equal, or one of them 1: "
        "use reshape, unsqueeze or transpose to line the shapes up."
    )


# %% cell 21 (01-broadcast)
def broadcast_shape(shape_a, shape_b):
    """The shape that two shapes broadcast to; raises broadcast_error(shape_a, shape_b, column) where they disagree.

    >>> broadcast_shape((4, 1, 3), (2, 1))
    (4, 2, 3)
    """
    shape = []
    for column in range(1, max(len(shape_a), len(shape_b)) + 1):
        size_a = shape_a[-column] if column <= len(shape_a) else 1
        size_b = shape_b[-column] if column <= len(shape_b) else 1
        if size_a != size_b and 1 not in (size_a, size_b):
            raise broadcast_error(shape_a, shape_b, column)
        shape.append(size_b if size_a == 1 else size_a)
    return tuple(reversed(shape))


# %% cell 24
def elementwise(ufunc, a, b):
    """ufunc(a, b), with our own words when the shapes disagree."""
    try:
        return ufunc(a, b)
    except ValueError:
        broadcast_shape(np.shape(a), np.shape(b))
        raise


def add_array(a, b):
    return elementwise(np.add, a, b)


def subtract_array(a, b):
    return elementwise(np.subtract, a, b)


def multiply_array(a, b):
    return elementwise(np.multiply, a, b)


def divide_array(a, b):
    return elementwise(np.divide, a, b)


def power_array(a, b):
    if isinstance(b, (int, float)) and b == 2:
        return a * a  # np.power is many times slower
    return elementwise(np.power, a, b)


# %% cell 25
def negative_array(x):
    return np.negative(x)


def floats(x):
    """x itself where it is floating, integers as float32: NumPy would compute those of 8 bits in float16."""
    return x if np.asarray(x).dtype.kind == "f" else np.asarray(x, dtype=np.float32)


def exp_array(x):
    return np.exp(floats(x))


def log_array(x):
    return np.log(floats(x))


def sqrt_array(x):
    return np.sqrt(floats(x))


def abs_array(x):
    return np.abs(x)


def clone_array(x):
    return x.copy()


# %% cell 33
def matmul_error(shape_a, shape_b):
    """The sentence for two shapes whose inner sizes disagree."""
    inner = shape_b[-2] if len(shape_b) > 1 else shape_b[-1]
    return ValueError(
        f"matmul: shapes {shape_a} @ {shape_b}: the last dimension of the left is {shape_a[-1]}, the second to last "
        f"of the right is {inner}; they must be equal. Transpose one of them, or swap the two."
    )


def multiply_matrices(a, b):
    """np.matmul, with our own words when numbers are given or the batch dimensions disagree."""
    if np.ndim(a) == 0 or np.ndim(b) == 0:
        raise ValueError(f"matmul: shapes {np.shape(a)} @ {np.shape(b)}: a single number has no rows. Use * instead.")
    try:
        return np.matmul(a, b)
    except ValueError:
        broadcast_shape(a.shape[:-2], b.shape[:-2])
        raise


# %% cell 34 (01-matmul)
def matmul_array(a, b):
    """The matrix product: (..., n, k) @ (..., k, m) -> (..., n, m).

    Raises matmul_error(a.shape, b.shape) when the inner sizes disagree; otherwise returns multiply_matrices(a, b).

    >>> matmul_array(np.ones((8, 2, 3)), np.ones((3, 4))).shape
    (8, 2, 4)
    """
    if np.ndim(a) and np.ndim(b):
        inner = b.shape[-2] if b.ndim > 1 else b.shape[-1]
        if a.shape[-1] != inner:
            raise matmul_error(a.shape, b.shape)
    return multiply_matrices(a, b)


# %% cell 37
def place(x, dim):
    """`dim` counted from the left, so that -1 is x.ndim - 1; an IndexError in words where x has no such dimension."""
    if not -x.ndim <= dim < x.ndim:
        use = f" Use {-x.ndim} to {x.ndim - 1}." if x.ndim else ""
        raise IndexError(f"dim {dim} does not exist: shape {x.shape} has {x.ndim} dimensions.{use}")
    return dim % x.ndim


def reduce_array(ufunc, x, dim, keepdim):
    """Fold dimensions away with a ufunc; a shorter way to the same loop than np.sum and np.max."""
    dims = tuple(dim) if isinstance(dim, list) else dim
    try:
        return ufunc.reduce(x, axis=dims, keepdims=keepdim)
    except IndexError:
        for d in dims if isinstance(dims, tuple) else (dims,):
            place(x, d)
        raise


def sum_array(x, dim=None, keepdim=False):
    return reduce_array(np.add, x, dim, keepdim)


def max_array(x, dim=None, keepdim=False):
    return reduce_array(np.maximum, x, dim, keepdim)  # the values alone: PyTorch calls this amax


def min_array(x, dim=None, keepdim=False):
    return reduce_array(np.minimum, x, dim, keepdim)


def argmax_array(x, dim=None, keepdim=False):
    return np.argmax(x, axis=dim if dim is None else place(x, dim), keepdims=keepdim)


# %% cell 39 (01-mean)
def mean_array(x, dim=None, keepdim=False):
    """The mean along `dim` (None: of all; an int; a tuple of ints).

    >>> mean_array(np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), dim=1).tolist()
    [2.0, 5.0]
    """
    total = sum_array(x, dim, keepdim)
    if dim is None:
        return total / x.size
    dims = dim if isinstance(dim, (tuple, list)) else (dim,)
    return total / math.prod(x.shape[d] for d in dims)


# %% cell 45
def reshape_error(size, shape):
    """The sentence for a shape that the numbers do not fill."""
    open_sizes = sum(n == -1 for n in shape)
    need = "write -1 at most once" if open_sizes > 1 else "choose sizes whose product is the number of values"
    return ValueError(f"reshape: {size} values do not fill shape {tuple(shape)}: {need}.")


# %% cell 46 (01-reshape)
def infer_shape(size, shape):
    """The shape as a tuple with -1 replaced by what `size` values need; else raises reshape_error(size, shape).

    >>> infer_shape(12, (3, -1))
    (3, 4)
    """
    known = math.prod(n for n in shape if n != -1)
    filled = tuple(size // max(known, 1) if n == -1 else n for n in shape)
    if sum(n == -1 for n in shape) > 1 or math.prod(filled) != size or min(filled, default=0) < 0:
        raise reshape_error(size, shape)
    return filled


# %% cell 49
def reshape_array(x, shape):
    return x.reshape(infer_shape(x.size, shape))


def permute_array(x, dims):
    if sorted(d + x.ndim if d < 0 else d for d in dims) != list(range(x.ndim)):
        raise ValueError(
            f"permute: dims {tuple(dims)} do not fit shape {x.shape}: name each of its {x.ndim} dimensions once."
        )
    return np.transpose(x, dims)


def unsqueeze_array(x, dim):
    return np.expand_dims(x, dim)


def squeeze_array(x, dim=None):
    if dim is not None and x.shape[place(x, dim)] != 1:
        return x  # as PyTorch: nothing to squeeze
    return np.squeeze(x, axis=dim)


def expand_array(x, shape):
    added = len(shape) - x.ndim
    sizes = tuple(x.shape[i - added] if n == -1 and i >= added else n for i, n in enumerate(shape))
    try:
        return np.broadcast_to(x, sizes)
    except ValueError:
        raise ValueError(
            f"expand: shape {x.shape} does not stretch to {sizes}: only sizes of 1 grow, and new dimensions come on "
            "the left. Use unsqueeze to make a dimension of size 1."
        ) from None


# %% cell 51 (01-transpose)
def transpose_array(x, dim0, dim1):
    """x with two dimensions swapped, as a view: (2, 3, 4) with 1, 2 -> (2, 4, 3).

    >>> transpose_array(np.zeros((2, 3, 4)), -1, 0).shape
    (4, 3, 2)
    """
    dims, dim0, dim1 = list(range(x.ndim)), place(x, dim0), place(x, dim1)
    dims[dim0], dims[dim1] = dim1, dim0
    return permute_array(x, dims)


# %% cell 55
def index_array(x, key):
    try:
        return x[key]
    except IndexError as error:
        raise IndexError(f"index: a Tensor of shape {x.shape} has no such entry: {error}.") from None


def cat_array(*arrays, dim=0):
    try:
        return np.concatenate(arrays, axis=dim)
    except ValueError:
        if arrays:
            place(np.asarray(arrays[0]), dim)
        shapes = ", ".join(str(np.shape(a)) for a in arrays) or "nothing"
        raise ValueError(
            f"cat along dim {dim}: got {shapes}; every size but the one in dim {dim} must be the same."
        ) from None


# %% cell 57 (01-stack)
def stack_array(*arrays, dim=0):
    """Join arrays of one shape along a new dimension `dim`.

    >>> stack_array(np.zeros((2, 3)), np.ones((2, 3)), dim=2).shape
    (2, 3, 2)
    """
    return cat_array(*(unsqueeze_array(x, dim) for x in arrays), dim=dim)


# %% cell 60 (01-reflected)
class OrderedArithmetic:
    """The two operators of a Tensor where it matters which operand comes first."""

    def __sub__(self, other):
        return apply(subtract_array, self, other)

    def __rsub__(self, other):
        """other - self, where other is no Tensor."""
        return apply(subtract_array, other, self)

    def __truediv__(self, other):
        return apply(divide_array, self, other)

    def __rtruediv__(self, other):
        """other / self, where other is no Tensor."""
        return apply(divide_array, other, self)


# %% cell 62
class Arithmetic(OrderedArithmetic):
    """The operators of a Tensor that compute."""

    def __add__(self, other):
        return apply(add_array, self, other)

    def __radd__(self, other):
        return apply(add_array, other, self)

    def __mul__(self, other):
        return apply(multiply_array, self, other)

    def __rmul__(self, other):
        return apply(multiply_array, other, self)

    def __pow__(self, other):
        return apply(power_array, self, other)

    def __rpow__(self, other):
        return apply(power_array, other, self)

    def __matmul__(self, other):
        return apply(matmul_array, self, other)

    def __rmatmul__(self, other):
        return apply(matmul_array, other, self)

    def __neg__(self):
        return apply(negative_array, self)

    def __abs__(self):
        return apply(abs_array, self)


# %% cell 64
def in_place(x, result):
    """What `x += ...` leaves in x: the same Tensor with new numbers if x learns, else the result."""
    if not x.requires_grad or x._node is not None:
        return result
    if _socket.engine is not None:
        raise RuntimeError(
            "a Tensor that requires a gradient is changed in place only inside `with no_grad():` (lesson 05); "
            "for a new Tensor write x = x + y instead of x += y."
        )
    x.data[...] = result.data
    return x


class InPlace:
    """The operators that assign."""

    def __iadd__(self, other):
        return in_place(self, self + other)

    def __isub__(self, other):
        return in_place(self, self - other)

    def __imul__(self, other):
        return in_place(self, self * other)

    def __itruediv__(self, other):
        return in_place(self, self / other)


# %% cell 65
class Comparison:
    """The operators of a Tensor that answer with booleans."""

    def __eq__(self, other):
        return apply(np.equal, self, other)

    def __ne__(self, other):
        return apply(np.not_equal, self, other)

    def __lt__(self, other):
        return apply(np.less, self, other)

    def __le__(self, other):
        return apply(np.less_equal, self, other)

    def __gt__(self, other):
        return apply(np.greater, self, other)

    def __ge__(self, other):
        return apply(np.greater_equal, self, other)

    __hash__ = object.__hash__  # Python drops it where __eq__ is defined; a set of Tensors needs it


# %% cell 66
class Functions:
    """Functions of each number, and reductions."""

    def exp(self):
        return apply(exp_array, self)

    def log(self):
        return apply(log_array, self)

    def sqrt(self):
        return apply(sqrt_array, self)

    def abs(self):
        return apply(abs_array, self)

    def matmul(self, other):
        return apply(matmul_array, self, other)

    def sum(self, dim=None, keepdim=False):
        return apply(sum_array, self, dim=dim, keepdim=keepdim)

    def mean(self, dim=None, keepdim=False):
        return apply(mean_array, self, dim=dim, keepdim=keepdim)

    def max(self, dim=None, keepdim=False):
        return apply(max_array, self, dim=dim, keepdim=keepdim)

    def min(self, dim=None, keepdim=False):
        return apply(min_array, self, dim=dim, keepdim=keepdim)

    def argmax(self, dim=None, keepdim=False):
        return apply(argmax_array, self, dim=dim, keepdim=keepdim)


# %% cell 67
def sizes_of(sizes):
    """Sizes given as several ints or as one tuple: reshape(2, 3) and reshape((2, 3)) mean the same."""
    return tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes


class Shaping:
    """Methods that change how the numbers are laid out."""

    def reshape(self, *shape):
        return apply(reshape_array, self, shape=sizes_of(shape))

    def view(self, *shape):
        return apply(reshape_array, self, shape=sizes_of(shape))

    def permute(self, *dims):
        return apply(permute_array, self, dims=sizes_of(dims))

    def transpose(self, dim0, dim1):
        return apply(transpose_array, self, dim0=dim0, dim1=dim1)

    @property
    def T(self):
        return apply(permute_array, self, dims=tuple(reversed(range(self.ndim))))

    def squeeze(self, dim=None):
        return apply(squeeze_array, self, dim=dim)

    def unsqueeze(self, dim):
        return apply(unsqueeze_array, self, dim=dim)

    def expand(self, *shape):
        return apply(expand_array, self, shape=sizes_of(shape))

    def __getitem__(self, key):
        keys = tuple(k.data if isinstance(k, Tensor) else k for k in (key if isinstance(key, tuple) else (key,)))
        return apply(index_array, self, key=keys if isinstance(key, tuple) else keys[0])


# %% cell 68
class Values:
    """The ways out of a Tensor: to NumPy, to Python, to the screen."""

    def numpy(self):
        """The array itself, not a copy."""
        return self.data

    def item(self):
        """The one value as a Python number."""
        if self.size != 1:
            raise ValueError(f"item() needs one value, this Tensor has shape {self.shape}. Reduce or index it first.")
        return self.data.item()

    def tolist(self):
        """The numbers as nested lists."""
        return self.data.tolist()

    def __format__(self, spec):
        """f"{loss:.4f}" formats the one value."""
        return format(self.item(), spec) if spec else str(self)

    def __repr__(self):
        numbers = np.array2string(self.data, separator=", ", precision=4, prefix="Tensor(")
        dtype = "" if self.dtype == np.float32 else f", dtype={self.dtype}"
        return f"Tensor({numbers}{dtype}{', requires_grad=True' if self.requires_grad else ''})"

    def __array__(self, dtype=None, copy=None):
        return np.array(self.data, dtype=dtype) if copy else np.asarray(self.data, dtype=dtype)

    def __len__(self):
        if self.ndim == 0:
            raise TypeError("len() of a Tensor without dimensions. item() gives its number.")
        return self.shape[0]

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __bool__(self):
        return bool(self.item())

    def __float__(self):
        return float(self.item())

    def __int__(self):
        return int(self.item())


# %% cell 70
class Socket(threading.local):
    """Where an engine is plugged in, per thread; the class attribute is for threads that plugged nothing in."""

    engine = None


_socket = Socket()


def plug_in(engine, everywhere=False):
    """Plug an engine in, in this thread or everywhere, and return the one that was there; None unplugs."""
    previous = _socket.engine
    _socket.engine = engine
    if everywhere:
        Socket.engine = engine
    return previous


# %% cell 72
class Tensor(Arithmetic, InPlace, Comparison, Functions, Shaping, Values):
    """An array whose operations go through one door; PyTorch's torch.Tensor in small.

    Shares memory with an array that already has the dtype (as torch.from_numpy), unless it requires a gradient:
    what learns is changed in place and owns its memory.

    >>> Tensor([[1.0, 2.0], [3.0, 4.0]]) @ Tensor([1.0, 1.0])
    Tensor([3., 7.])
    """

    __array_ufunc__ = None  # array - Tensor: NumPy steps back and Python asks Tensor.__rsub__
    requires_grad = False
    grad = None
    _node = None

    def __init__(self, data, requires_grad=False, dtype=None):
        self.data = tensor_data(data.data if isinstance(data, Tensor) else data, dtype)
        if requires_grad:
            if self.data.dtype.kind != "f":
                raise TypeError(
                    f"requires_grad needs floating data, got {self.data.dtype}: integers have no small steps. "
                    "Use Tensor(data, requires_grad=True, dtype=np.float32)."
                )
            self.data = np.array(self.data)
            self.requires_grad = True

    @property
    def shape(self):
        return self.data.shape

    @property
    def ndim(self):
        return self.data.ndim

    @property
    def size(self):
        return self.data.size

    @property
    def dtype(self):
        return self.data.dtype

    def copy(self):
        """An independent Tensor with the same numbers and no history."""
        return Tensor(self.data.copy(), self.requires_grad, self.dtype)

    def detach(self):
        """The same memory, without gradients."""
        return Tensor(self.data, dtype=self.dtype)

    def clone(self):
        """The same numbers in new memory; gradients flow through."""
        return apply(clone_array, self)

    def zero_grad(self):
        self.grad = None

    def backward(self, gradient=None):
        """Let the engine find the gradients of this Tensor with respect to everything it came from."""
        if _socket.engine is None:
            raise RuntimeError(
                "backward() needs an engine, which lesson 05 builds: import tinytorch.core.autograd first. "
                "(Inside no_grad() it is unplugged: call backward() outside of the block.)"
            )
        _socket.engine.backward(self, gradient)


# %% cell 75
def as_operand(x, inputs):
    """A plain operand: a Python number stays one, an array gets a dtype of the course (or float64 beside float64)."""
    if isinstance(x, np.generic):
        x = x.item()  # np.sqrt(64) is a float64 and would turn whole arrays into float64; 8.0 does not
    if x is None or isinstance(x, (bool, int, float)):
        return x
    wide = any(isinstance(i, Tensor) and i.data.dtype == np.float64 for i in inputs)
    return tensor_data(x, np.float64 if wide and np.asarray(x).dtype == np.float64 else None)


def unwrap(inputs):
    """The plain operands behind the inputs of an operation."""
    return [x.data if isinstance(x, Tensor) else as_operand(x, inputs) for x in inputs]


def wrap(result, arrays):
    """A Tensor around a result; float64 that no operand brought in becomes float32."""
    if type(result) is not np.ndarray:
        result = np.asarray(result)
    if result.dtype.char == "d" and not any(getattr(a, "dtype", None) == np.float64 for a in arrays):
        result = result.astype(np.float32)
    output = Tensor.__new__(Tensor)
    output.data = result
    return output


# %% cell 77 (01-apply)
def apply(op, *inputs, **params):
    """Compute op on Tensors, arrays and numbers; returns a Tensor, and tells the engine where one is plugged in.

    >>> apply(sum_array, Tensor([[1.0, 2.0], [3.0, 4.0]]), dim=0)
    Tensor([4., 6.])
    """
    arrays = unwrap(inputs)
    output = wrap(op(*arrays, **params), arrays)
    if _socket.engine is not None:
        _socket.engine.record(op, inputs, params, output)
    return output


# %% cell 84
_rng = np.random.default_rng()


def default_rng():
    """The generator of the course: what rng=None means everywhere."""
    return _rng


def manual_seed(seed):
    """Begin the random numbers of the course again, from `seed`."""
    _rng.bit_generator.state = np.random.default_rng(seed).bit_generator.state


def randn(*shape, rng=None, requires_grad=False):
    """Normal random numbers: mean 0, standard deviation 1."""
    rng = default_rng() if rng is None else rng
    return Tensor(rng.standard_normal(sizes_of(shape), dtype=np.float32), requires_grad)


def zeros(*shape, requires_grad=False, dtype=np.float32):
    return Tensor(np.zeros(sizes_of(shape), dtype), requires_grad, dtype)


def ones(*shape, requires_grad=False, dtype=np.float32):
    return Tensor(np.ones(sizes_of(shape), dtype), requires_grad, dtype)


def arange(start, stop=None, step=1, dtype=None):
    """Integers (or steps) from start up to stop, without stop; with one argument, from 0 up to it."""
    start, stop = (0, start) if stop is None else (start, stop)
    return Tensor(np.arange(start, stop, step), dtype=dtype)


def cat(tensors, dim=0):
    """Join Tensors along a dimension that exists."""
    return apply(cat_array, *tensors, dim=dim)


def stack(tensors, dim=0):
    """Join Tensors of one shape along a new dimension."""
    return apply(stack_array, *tensors, dim=dim)

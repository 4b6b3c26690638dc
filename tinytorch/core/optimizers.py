"""Optimizers: SGD, Adam and AdamW, in place and resumable.

Lesson 06_optimizers. Built from src/06_optimizers/06_optimizers.py by `tito dev build`: change it there, not here.
"""

__all__ = [
    "descend",
    "momentum_direction",
    "nesterov_direction",
    "with_weight_decay",
    "BLOCK",
    "blocks",
    "parameter_list",
    "Optimizer",
    "SGD",
    "update_moments",
    "adam_update",
    "Adam",
    "shrink",
    "AdamW",
    "state_problems",
    "copy_state",
]


# %% cell 2
import math

import numpy as np

from tinytorch.core.tensor import Tensor


# %% cell 7 (06-descend)
def descend(weight, direction, lr):
    """Move `weight` by -lr * direction, in place; both have any one shape.

    >>> weight = np.array([1.0, -2.0]); descend(weight, np.array([0.5, -1.0]), 0.1); weight
    array([ 0.95, -1.9 ])
    """
    weight -= lr * direction


# %% cell 16 (06-momentum)
def momentum_direction(grad, buffer, momentum):
    """Update `buffer` in place to momentum * buffer + grad and return it, the direction of the step.

    Source: Polyak 1964; PyTorch's form, where the gradient enters whole.
    """
    buffer *= momentum
    buffer += grad
    return buffer


# %% cell 20 (06-nesterov)
def nesterov_direction(grad, buffer, momentum):
    """Update `buffer` as momentum does, and return grad + momentum * buffer. Source: Sutskever et al. 2013.

    >>> nesterov_direction(np.array([1.0]), np.array([0.0]), 0.9)
    array([1.9])
    """
    return grad + momentum * momentum_direction(grad, buffer, momentum)


# %% cell 24 (06-weight-decay)
def with_weight_decay(grad, weight, weight_decay):
    """The gradient of the loss plus weight_decay / 2 * |weight|^2; `grad` itself is left alone.

    >>> with_weight_decay(np.array([0.5, 0.5]), np.array([2.0, -4.0]), 0.1)
    array([0.7, 0.1])
    """
    return grad + weight_decay * weight if weight_decay else grad


# %% cell 29 (06-blocks)
BLOCK = 1 << 17  # numbers per piece: 512 KiB of float32


def blocks(*arrays, size=BLOCK):
    """Yield tuples of matching pieces of arrays of one shape, at most `size` numbers each: views to write to."""
    if arrays[0].size <= size or not all(array.flags.c_contiguous for array in arrays):
        yield arrays
        return
    flat = [array.reshape(-1) for array in arrays]
    for start in range(0, arrays[0].size, size):
        yield tuple(array[start : start + size] for array in flat)


# %% cell 32
def parameter_list(params):
    """The parameters as a list; an error in words for what cannot be moved or would be moved in vain."""
    if isinstance(params, Tensor) or hasattr(params, "parameters"):
        raise TypeError("the optimizer needs a list of parameters: model.parameters(), or [weight] for a single one")
    params = list(params)
    if not params:
        raise ValueError("the optimizer got no parameters: pass model.parameters()")
    for p in params:
        if not isinstance(p, Tensor):
            raise TypeError(f"an optimizer moves Tensors, got a {type(p).__name__}: pass model.parameters()")
        if p._node is not None:
            raise ValueError("a parameter was computed from other Tensors: pass the weights that it was made from")
    if len({id(p) for p in params}) < len(params):
        raise ValueError("a parameter was passed twice: it would be moved twice in each step")
    return params


# %% cell 34 (06-step)
class Optimizer:
    """Moves parameters by their gradients; keeps, for each parameter, a step count and the buffers of its kind."""

    settings = ("lr",)
    buffers = ()

    def __init__(self, params, lr):
        self.params, self.lr, self.state = parameter_list(params), lr, {}
        if not lr >= 0:
            raise ValueError(f"lr must be 0 or more, got {lr}")

    def zero_grad(self):
        """Forget all gradients; `backward` adds to what is there."""
        for parameter in self.params:
            parameter.grad = None

    def state_of(self, index, weight):
        """The state of parameter `index`: "step" from 0, and buffers from zeros, each made when it is first needed."""
        state = self.state.setdefault(index, {"step": 0})
        for name in self.buffers:
            if name not in state:
                state[name] = np.zeros(weight.shape, weight.dtype)
        return state

    def update(self, step, weight, grad, *buffers):
        """Move one piece of a weight, in place; `step` counts from 1."""
        raise NotImplementedError(f"{type(self).__name__} does not say how a weight moves")

    def step(self):
        """Move every parameter that has a gradient."""
        for index, parameter in enumerate(self.params):
            if parameter.grad is None:
                continue
            weight, grad = parameter.data, np.asarray(parameter.grad.data, order="C")
            state = self.state_of(index, weight)
            state["step"] += 1
            for piece in blocks(weight, grad, *(state[name] for name in self.buffers)):
                self.update(state["step"], *piece)

    def state_dict(self):
        """A copy of the settings and of the state, enough to go on in another process."""
        settings = {name: getattr(self, name) for name in self.settings}
        return {"optimizer": type(self).__name__, "settings": settings, "state": copy_state(self.state)}

    def check_state_dict(self, saved):
        """Raise a ValueError that says why `saved` does not fit this optimizer's parameters, if it does not."""
        kind, missing = type(self).__name__, {"optimizer", "settings", "state"} - set(saved)
        if missing:
            raise ValueError(f"this is no state of an optimizer: it lacks {', '.join(sorted(missing))}")
        if saved["optimizer"] != kind:
            raise ValueError(f"the state was saved by {saved['optimizer']}, this optimizer is {kind}")
        problems = state_problems(saved["state"], [p.shape for p in self.params])
        if problems:
            raise ValueError("the state belongs to other parameters: " + "; ".join(problems))

    def load_state_dict(self, saved):
        """Go on from what state_dict() gave; one that does not fit is an error and changes nothing."""
        self.check_state_dict(saved)
        for name, value in saved["settings"].items():
            setattr(self, name, value)
        self.state = copy_state(saved["state"])


# %% cell 36
class SGD(Optimizer):
    """Gradient descent with momentum, Nesterov's variant and weight decay, as torch.optim.SGD."""

    settings = ("lr", "momentum", "weight_decay", "nesterov")

    def __init__(self, params, lr=1e-3, momentum=0, weight_decay=0, nesterov=False):
        super().__init__(params, lr)
        if momentum < 0 or weight_decay < 0:
            raise ValueError(f"momentum ({momentum}) and weight_decay ({weight_decay}) must be 0 or more")
        if nesterov and not momentum:
            raise ValueError("nesterov looks ahead along the momentum: it needs momentum > 0")
        self.momentum, self.weight_decay, self.nesterov = momentum, weight_decay, nesterov

    @property
    def buffers(self):
        return ("momentum_buffer",) if self.momentum else ()

    def update(self, step, weight, grad, *buffers):
        direction = with_weight_decay(grad, weight, self.weight_decay)
        if self.momentum:
            find = nesterov_direction if self.nesterov else momentum_direction
            direction = find(direction, *buffers, self.momentum)
        descend(weight, direction, float(self.lr))


# %% cell 39 (06-moments)
def update_moments(exp_avg, exp_avg_sq, grad, betas):
    """Update both running averages in place. Source: Kingma and Ba 2015, algorithm 1.

    >>> mean, square = np.zeros(2), np.zeros(2)
    >>> update_moments(mean, square, np.array([2.0, -1.0]), (0.9, 0.99)); mean, square
    (array([ 0.2, -0.1]), array([0.04, 0.01]))
    """
    beta1, beta2 = betas
    exp_avg *= beta1
    exp_avg += (1 - beta1) * grad
    exp_avg_sq *= beta2
    exp_avg_sq += (1 - beta2) * grad * grad


# %% cell 44 (06-adam)
def adam_update(weight, exp_avg, exp_avg_sq, step, lr, betas, eps):
    """Move `weight` in place by lr times the corrected average over its usual size; `step` counts from 1."""
    beta1, beta2 = betas
    size = np.sqrt(exp_avg_sq)
    size /= math.sqrt(1 - beta2**step)
    size += eps
    weight -= lr / (1 - beta1**step) * exp_avg / size


# %% cell 47
class Adam(Optimizer):
    """Steps scaled by each number's usual gradient; weight decay enters through the gradient, as torch.optim.Adam."""

    settings = ("lr", "betas", "eps", "weight_decay")
    buffers = ("exp_avg", "exp_avg_sq")

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0):
        super().__init__(params, lr)
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be at least 0 and less than 1, got {betas}")
        if eps < 0 or weight_decay < 0:
            raise ValueError(f"eps ({eps}) and weight_decay ({weight_decay}) must be 0 or more")
        self.betas, self.eps, self.weight_decay = tuple(betas), eps, weight_decay

    def update(self, step, weight, grad, exp_avg, exp_avg_sq):
        grad = with_weight_decay(grad, weight, self.weight_decay)
        update_moments(exp_avg, exp_avg_sq, grad, self.betas)
        adam_update(weight, exp_avg, exp_avg_sq, step, float(self.lr), self.betas, self.eps)


# %% cell 50 (06-adamw)
def shrink(weight, lr, weight_decay):
    """Decoupled weight decay, in place. Source: Loshchilov and Hutter 2019, algorithm 2, as PyTorch scales it.

    >>> weight = np.array([10.0]); shrink(weight, 0.1, 0.01); weight
    array([9.99])
    """
    weight *= 1 - lr * weight_decay


# %% cell 51
class AdamW(Adam):
    """Adam with weight decay apart from the gradient, as torch.optim.AdamW."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2):
        super().__init__(params, lr, betas, eps, weight_decay)

    def update(self, step, weight, grad, exp_avg, exp_avg_sq):
        shrink(weight, float(self.lr), self.weight_decay)
        update_moments(exp_avg, exp_avg_sq, grad, self.betas)
        adam_update(weight, exp_avg, exp_avg_sq, step, float(self.lr), self.betas, self.eps)


# %% cell 59
def state_problems(state, shapes):
    """Why a saved state does not fit parameters of these shapes: a list of sentences, empty if it does."""
    problems = [f"there is no parameter {index}, only {len(shapes)}" for index in state if index >= len(shapes)]
    for index, entry in state.items():
        for name, value in entry.items():
            if isinstance(value, np.ndarray) and index < len(shapes) and value.shape != shapes[index]:
                problems.append(f"{name} of parameter {index} has shape {value.shape}, needed {shapes[index]}")
    return problems


# %% cell 60 (06-state)
def copy_state(state):
    """A copy of {index: {name: array or number}} that shares no array with it."""
    return {
        index: {name: value.copy() if isinstance(value, np.ndarray) else value for name, value in entry.items()}
        for index, entry in state.items()
    }

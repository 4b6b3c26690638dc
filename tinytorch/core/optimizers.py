"""Hand-extracted from src/06_optimizers while the build is being written."""
import math

import numpy as np


def descend(weight, direction, lr):
    weight -= lr * direction


def momentum_direction(grad, buffer, momentum, nesterov=False):
    buffer *= momentum
    buffer += grad
    return grad + momentum * buffer if nesterov else buffer


def with_weight_decay(grad, weight, weight_decay):
    return grad + weight_decay * weight if weight_decay else grad


BLOCK = 1 << 14


def blocks(*arrays, size=BLOCK):
    if arrays[0].size <= size or not all(a.flags.c_contiguous for a in arrays):
        yield arrays
        return
    flat = [a.reshape(-1) for a in arrays]
    for start in range(0, flat[0].size, size):
        yield tuple(a[start:start + size] for a in flat)


class Optimizer:
    settings = ("lr",)
    buffers = ()

    def __init__(self, params, lr):
        self.params = list(params)
        self.lr = lr
        self.state = {}
        if not self.params:
            raise ValueError("the optimizer got no parameters: pass model.parameters()")
        if len({id(p) for p in self.params}) != len(self.params):
            raise ValueError("the same parameter was passed twice: it would be moved twice in each step")
        if not lr >= 0:
            raise ValueError(f"lr must not be negative, got {lr}")

    def zero_grad(self):
        for parameter in self.params:
            parameter.grad = None

    def step(self):
        for index, parameter in enumerate(self.params):
            if parameter.grad is None:
                continue
            weight, grad = parameter.data, np.ascontiguousarray(parameter.grad.data)
            state = self.state.setdefault(index, {})
            if not state:
                state["step"] = 0
                state.update({name: np.zeros(weight.shape, weight.dtype) for name in self.buffers})
            state["step"] += 1
            for piece in blocks(weight, grad, *(state[name] for name in self.buffers)):
                self.update(state["step"], *piece)

    def update(self, step, weight, grad, *buffers):
        raise NotImplementedError("a kind of optimizer says here how one piece of a weight moves")

    def state_dict(self):
        settings = {name: getattr(self, name) for name in self.settings}
        return {"optimizer": type(self).__name__, "settings": settings, "state": copy_state(self.state)}

    def load_state_dict(self, saved):
        self.check_state_dict(saved)
        for name in self.settings:
            setattr(self, name, saved["settings"][name])
        self.state = copy_state(saved["state"])

    def check_state_dict(self, saved):
        kind = type(self).__name__
        if saved["optimizer"] != kind:
            raise ValueError(f"this state was saved by {saved['optimizer']}, not by {kind}")
        problems = state_problems(saved["state"], [p.shape for p in self.params], self.buffers)
        if problems:
            raise ValueError("this state belongs to other parameters: " + "; ".join(problems))


def copy_state(state):
    return {index: {name: value.copy() if isinstance(value, np.ndarray) else value
                    for name, value in entry.items()} for index, entry in state.items()}


def state_problems(state, shapes, buffers):
    problems = []
    for index, entry in state.items():
        if index not in range(len(shapes)):
            problems.append(f"parameter {index} of {len(shapes)}")
            continue
        for name in buffers:
            got = entry[name].shape if name in entry else None
            if got != shapes[index]:
                problems.append(f"parameter {index} {name}: shape {got}, needed {shapes[index]}")
    return problems


class SGD(Optimizer):
    settings = ("lr", "momentum", "weight_decay", "nesterov")

    def __init__(self, params, lr, momentum=0, weight_decay=0, nesterov=False):
        super().__init__(params, lr)
        self.momentum, self.weight_decay, self.nesterov = momentum, weight_decay, nesterov
        self.buffers = ("momentum_buffer",) if momentum else ()

    def update(self, step, weight, grad, *buffers):
        grad = with_weight_decay(grad, weight, self.weight_decay)
        if self.momentum:
            grad = momentum_direction(grad, *buffers, self.momentum, self.nesterov)
        descend(weight, grad, float(self.lr))


def update_moments(exp_avg, exp_avg_sq, grad, betas):
    beta1, beta2 = betas
    exp_avg *= beta1
    exp_avg += (1 - beta1) * grad
    exp_avg_sq *= beta2
    exp_avg_sq += (1 - beta2) * grad * grad


def adam_update(weight, exp_avg, exp_avg_sq, step, lr, betas, eps):
    beta1, beta2 = betas
    size = np.sqrt(exp_avg_sq)
    size /= math.sqrt(1 - beta2**step)
    size += eps
    weight -= lr / (1 - beta1**step) * exp_avg / size


class Adam(Optimizer):
    settings = ("lr", "betas", "eps", "weight_decay")
    buffers = ("exp_avg", "exp_avg_sq")

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0):
        super().__init__(params, lr)
        self.betas, self.eps, self.weight_decay = tuple(betas), eps, weight_decay

    def update(self, step, weight, grad, exp_avg, exp_avg_sq):
        grad = with_weight_decay(grad, weight, self.weight_decay)
        update_moments(exp_avg, exp_avg_sq, grad, self.betas)
        adam_update(weight, exp_avg, exp_avg_sq, step, float(self.lr), self.betas, self.eps)


class AdamW(Adam):
    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2):
        super().__init__(params, lr, betas, eps, weight_decay)

    def update(self, step, weight, grad, exp_avg, exp_avg_sq):
        weight *= 1 - float(self.lr) * self.weight_decay
        update_moments(exp_avg, exp_avg_sq, grad, self.betas)
        adam_update(weight, exp_avg, exp_avg_sq, step, float(self.lr), self.betas, self.eps)

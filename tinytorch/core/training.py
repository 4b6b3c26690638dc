"""Training: a Trainer with schedules, clipping and checkpoints that survive a kill.

Lesson 07_training. Built from src/07_training/07_training.py by `tito dev build`: change it there, not here.
"""

__all__ = [
    "check_finite",
    "train_step",
    "cosine_lr",
    "CosineSchedule",
    "clip_grad_norm",
    "evaluation_mode",
    "mean_loss",
    "CheckpointError",
    "DTYPES",
    "CODES",
    "as_stored",
    "header_entries",
    "encode_header",
    "write_atomically",
    "save_checkpoint",
    "layout_problem",
    "entry_of",
    "read_header",
    "load_checkpoint",
    "generators",
    "pack_run",
    "unpack_run",
    "seconds_left",
    "progress_line",
    "Progress",
    "interrupts_noted",
    "Trainer",
    "matching_states",
    "keep_memory",
]


# %% cell 2
import ctypes
import io
import json
import math
import os
import shutil
import signal
import struct
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from tinytorch.core.autograd import no_grad
from tinytorch.core.tensor import Tensor, default_rng


# %% cell 7 (07-train-step)
def check_finite(value, what):
    """Refuse NaN and infinity while the weights are still good."""
    if not math.isfinite(value):
        raise FloatingPointError(f"the {what} is {value}; nothing was updated. A smaller lr or max_grad_norm may help")


def train_step(model, optimizer, loss_function, inputs, targets, max_grad_norm=None):
    """One forward, one backward and one step on a batch; returns the loss (a float) from before the step."""
    loss = loss_function(model(Tensor(inputs)), Tensor(targets))
    check_finite(loss.item(), "loss")
    optimizer.zero_grad()
    loss.backward()
    if max_grad_norm is not None:
        check_finite(clip_grad_norm(optimizer.params, max_grad_norm), "gradient norm")
    optimizer.step()
    return loss.item()


# %% cell 11 (07-cosine)
def cosine_lr(step, max_lr, total_steps, warmup_steps=0, min_lr=0.0):
    """The learning rate of a step that counts from 0. Source: Loshchilov and Hutter 2017, SGDR, equation 5.

    >>> [round(cosine_lr(step, 0.4, 7, warmup_steps=3), 3) for step in (0, 3, 5, 7)]
    [0.1, 0.4, 0.2, 0.0]
    """
    if step < warmup_steps:
        return max_lr * (step + 1) / (warmup_steps + 1)
    if step >= total_steps:
        return min_lr
    done = (step - warmup_steps) / (total_steps - warmup_steps)
    return min_lr + (max_lr - min_lr) * (1 + math.cos(math.pi * done)) / 2


# %% cell 12
class CosineSchedule:
    """schedule(step) -> learning rate: a warm-up in equal stairs, then half a cosine down to min_lr."""

    def __init__(self, max_lr, total_steps, warmup_steps=0, min_lr=0.0):
        if not 0 <= warmup_steps < total_steps:
            raise ValueError(f"warmup_steps ({warmup_steps}) must be at least 0 and below total_steps ({total_steps})")
        self.max_lr, self.total_steps, self.warmup_steps, self.min_lr = max_lr, total_steps, warmup_steps, min_lr

    def __call__(self, step):
        return cosine_lr(step, self.max_lr, self.total_steps, self.warmup_steps, self.min_lr)


# %% cell 19 (07-clip)
def clip_grad_norm(parameters, max_norm):
    """Scale all gradients in place so that their common norm is at most max_norm; returns the norm before."""
    parameters = [parameters] if isinstance(parameters, Tensor) else parameters
    grads = [p.grad.data for p in parameters if p.grad is not None]
    norm = math.sqrt(sum(float(np.vdot(grad, grad)) for grad in grads))
    scale = max_norm / (norm + 1e-6)
    if scale < 1:
        for grad in grads:
            grad *= scale
    return norm


# %% cell 24 (07-mode)
@contextmanager
def evaluation_mode(model):
    """In the block the model is in evaluation mode and records nothing; after it, in the mode it had."""
    was_training = model.training
    model.eval()
    try:
        with no_grad():
            yield model
    finally:
        model.train(was_training)


# %% cell 28 (07-mean-loss)
def mean_loss(model, loss_function, batches):
    """The mean loss over all rows of the batches (inputs, targets), in evaluation mode, without gradients."""
    total, rows = 0.0, 0
    with evaluation_mode(model):
        for inputs, targets in batches:
            loss = loss_function(model(Tensor(inputs)), Tensor(targets))
            total += loss.item() * len(targets)
            rows += len(targets)
    if rows == 0:
        raise ValueError("there is nothing to evaluate: no batch came")
    return total / rows


# %% cell 33
class CheckpointError(ValueError):
    """A checkpoint that cannot be written, cannot be read, or does not fit."""


DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1",
          "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1", "BOOL": "|b1"}  # fmt: skip
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}


def as_stored(tensors):
    """Tensors or arrays by name -> little-endian C arrays by name, widest numbers first so that all stay aligned."""
    arrays = {}
    for name, value in tensors.items():
        array = np.asarray(value.data if isinstance(value, Tensor) else value)
        dtype = array.dtype.newbyteorder("<")
        if not isinstance(name, str) or name == "__metadata__" or dtype not in CODES:
            raise CheckpointError(f"{name!r} ({dtype}) does not go into a checkpoint: a name is a string, "
                                  f"and numbers are {', '.join(DTYPES)}")
        arrays[name] = np.asarray(array, dtype=dtype, order="C")
    return dict(sorted(arrays.items(), key=lambda item: -item[1].itemsize))


# %% cell 34 (07-header)
def header_entries(arrays):
    """The header of arrays that lie one behind the other: {name: {"dtype", "shape", "data_offsets"}}.

    >>> header_entries({"a": np.zeros((2, 3), "<f4")})
    {'a': {'dtype': 'F32', 'shape': [2, 3], 'data_offsets': [0, 24]}}
    """
    entries, begin = {}, 0
    for name, array in arrays.items():
        end = begin + array.nbytes
        entries[name] = {"dtype": CODES[array.dtype], "shape": list(array.shape), "data_offsets": [begin, end]}
        begin = end
    return entries


# %% cell 38
def encode_header(arrays, metadata):
    """The length and the header as they stand in the file; `metadata` is a dict of strings, or None."""
    header = header_entries(arrays)
    if metadata:
        header = {"__metadata__": {str(key): str(value) for key, value in metadata.items()}, **header}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


# %% cell 42 (07-atomic)
def write_atomically(path, chunks):
    """Write the chunks (bytes) to `path` so that there is always a whole file: the old one or the new one."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


# %% cell 44
def save_checkpoint(path, tensors, metadata=None):
    """Write named arrays and a dict of strings to a safetensors file, whole or not at all; one writer per path."""
    arrays = as_stored(tensors)
    numbers = (array.reshape(-1).view(np.uint8) for array in arrays.values())
    write_atomically(os.fspath(path), [encode_header(arrays, metadata), *numbers])


# %% cell 46 (07-layout)
def layout_problem(entries, data_size):
    """Why these entries do not describe `data_size` bytes of numbers, as a sentence; None if they do."""
    in_order = sorted(entries.items(), key=lambda item: item[1][2:])
    position = 0
    for name, (code, shape, begin, end) in in_order:
        if code not in DTYPES:
            return f"{name} holds {code} numbers, which NumPy does not have"
        if begin != position:
            return f"{name} begins at byte {begin}, the array before it ends at {position}"
        if end - begin != math.prod(shape) * np.dtype(DTYPES[code]).itemsize:
            return f"{name} has {end - begin} bytes, which is not shape {list(shape)} of {code}"
        position = end
    if position != data_size:
        return f"the arrays take {position} bytes, the file has {data_size}: it is cut off, or has a tail"
    return None


# %% cell 48
def entry_of(entry):
    """(code, shape, begin, end) of a header entry; a ValueError, KeyError or TypeError if it is none."""
    shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise ValueError("shapes and offsets are whole numbers, 0 or more")
    return str(entry["dtype"]), shape, begin, end


def read_header(file, path):
    """(entries, metadata, first byte of the numbers) of an open safetensors file, all of it checked."""
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 2 <= length <= size - 8:
        raise CheckpointError(f"{path} is no checkpoint, or it is cut off: {size} bytes in all")
    try:
        header = json.loads(file.read(length))
        metadata = {str(key): str(value) for key, value in header.pop("__metadata__", {}).items()}
        entries = {name: entry_of(entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is no checkpoint, or damaged: its header does not read ({error!r})") from None
    problem = layout_problem(entries, size - 8 - length)
    if problem:
        raise CheckpointError(f"{path} is damaged: {problem}")
    return entries, metadata, 8 + length


def load_checkpoint(path):
    """(tensors, metadata) of a safetensors file: arrays by name, and a dict of strings."""
    with open(path, "rb") as file:
        entries, metadata, start = read_header(file, path)
        tensors = {}
        for name, (code, shape, begin, _) in entries.items():
            file.seek(start + begin)
            tensors[name] = np.fromfile(file, DTYPES[code], math.prod(shape)).reshape(shape)
    return tensors, metadata


# %% cell 52
def generators(model):
    """Every generator that a training step may draw from, by a name that is the same in the next process."""
    found = {"course": default_rng()}
    for index, module in enumerate(model.modules()):
        named = {f"{index}.{name}": value for name, value in vars(module).items()}
        found |= {name: value for name, value in named.items() if isinstance(value, np.random.Generator)}
    return found


def pack_run(trainer):
    """All that a run is, as (tensors, metadata) for save_checkpoint."""
    tensors = {f"model.{name}": array for name, array in trainer.model.state_dict().items()}
    optimizer = trainer.optimizer.state_dict()
    counts = {index: entry["step"] for index, entry in optimizer["state"].items()}
    for index, entry in optimizer.pop("state").items():
        tensors |= {f"optimizer.{index}.{name}": array for name, array in entry.items() if name != "step"}
    tensors["losses"] = np.array(trainer.losses, np.float64)
    tensors["evaluations"] = np.array(trainer.evaluations, np.float64).reshape(-1, 2)
    random = {name: rng.bit_generator.state for name, rng in generators(trainer.model).items()}
    facts = {"step": trainer.step, "optimizer": optimizer, "counts": counts, "random": random}
    return tensors, {"format": "tinytorch-run", **{name: json.dumps(value) for name, value in facts.items()}}


def unpack_run(tensors, metadata):
    """The inverse of pack_run: (model state, optimizer state, everything else)."""
    facts = {name: json.loads(metadata[name]) for name in ("step", "optimizer", "counts", "random")}
    model = {name[6:]: array for name, array in tensors.items() if name.startswith("model.")}
    state = {int(index): {"step": count} for index, count in facts["counts"].items()}
    for name, array in tensors.items():
        if name.startswith("optimizer."):
            _, index, buffer = name.split(".")
            state[int(index)][buffer] = array
    facts["losses"] = tensors["losses"].tolist()
    facts["evaluations"] = [(int(step), loss) for step, loss in tensors["evaluations"].tolist()]
    return model, {**facts["optimizer"], "state": state}, facts


# %% cell 54 (07-time-left)
def seconds_left(first, step, total, seconds):
    """Seconds until `total`, when the steps from `first` to `step` took `seconds`; step > first.

    >>> seconds_left(90, 92, 100, 4.0)
    16.0
    """
    return seconds / (step - first) * (total - step)


# %% cell 56
def progress_line(step, total, loss, rate, left, width=79):
    """A bar, steps, loss, rate ("120 steps/s") and time left, in exactly `width` characters."""
    left = f"{int(left) // 3600}:{int(left) // 60 % 60:02d}:{int(left) % 60:02d}"
    text = f" step {step}/{total}  loss {loss:.4f}  {rate}  {left} left"
    size = min(30, width - len(text) - 2)
    filled = size * step // max(total, 1)
    bar = "[" + "#" * filled + "." * (size - filled) + "]" if size >= 5 else ""
    return (bar + text)[:width].ljust(width)


class Progress:
    """A progress line on a terminal, ten times a second at most; silent where the stream is no terminal."""

    def __init__(self, first, total, stream=None):
        self.first, self.total, self.units = first, total, 0
        self.stream = sys.stderr if stream is None else stream
        self.visible = hasattr(self.stream, "isatty") and self.stream.isatty()
        self.started, self.shown = time.perf_counter(), 0.0

    def show(self, step, loss, inputs):
        """After a step: token ids are counted as tokens, all else as steps."""
        tokens = np.asarray(inputs).dtype.kind in "iu"
        self.units += np.size(inputs) if tokens else 1
        now = time.perf_counter()
        if self.visible and (now - self.shown >= 0.1 or step == self.total):
            seconds, self.shown = now - self.started, now
            rate = f"{self.units / max(seconds, 1e-9):,.0f} {'tokens' if tokens else 'steps'}/s"
            left = seconds_left(self.first, step, self.total, seconds)
            width = shutil.get_terminal_size().columns - 1
            self.write("\r" + progress_line(step, self.total, loss, rate, left, width))

    def write(self, text):
        self.stream.write(text)
        self.stream.flush()

    def close(self):
        """Leave the line, so that what is printed next has one of its own."""
        if self.visible and self.shown:
            self.write("\n")


# %% cell 59
@contextmanager
def interrupts_noted():
    """In the block, Ctrl-C sets the event that is handed out; a second one interrupts at once."""
    came = threading.Event()

    def note(number, frame):
        if came.is_set():
            raise KeyboardInterrupt
        came.set()

    if threading.current_thread() is not threading.main_thread():
        yield came  # signals reach the main thread only
        return
    previous = signal.signal(signal.SIGINT, note)
    try:
        yield came
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if previous is None else previous)


# %% cell 61 (07-fit)
class Trainer:
    """Trains a model; its state can be saved after any step and taken up again, also in another process."""

    def __init__(self, model, optimizer, loss_function, schedule=None, max_grad_norm=None,
                 checkpoint=None, checkpoint_every=None):
        self.model, self.optimizer, self.loss_function = model, optimizer, loss_function
        self.schedule, self.max_grad_norm = schedule, max_grad_norm
        self.checkpoint, self.checkpoint_every = checkpoint, checkpoint_every
        self.step, self.losses, self.evaluations = 0, [], []

    def fit(self, get_batch, num_steps, evaluate_every=None, evaluation=None, progress=True):
        """Train until self.step is num_steps, so a resumed trainer does the rest; returns the list of losses.

        get_batch(step) -> (inputs, targets) arrays. `evaluation` is a list of such batches, evaluated every
        `evaluate_every` steps. After Ctrl-C: the checkpoint is written, then KeyboardInterrupt is raised.
        """
        bar = Progress(self.step, num_steps, None if progress else io.StringIO())
        self.model.train()
        with interrupts_noted() as interrupted:
            try:
                while self.step < num_steps and not interrupted.is_set():
                    inputs, targets = get_batch(self.step)
                    loss = self.train_step(inputs, targets)
                    bar.show(self.step, loss, inputs)
                    self.after_step(evaluate_every, evaluation)
            finally:
                bar.close()
            if self.checkpoint:
                self.save(self.checkpoint)
        if interrupted.is_set():
            raise KeyboardInterrupt(f"stopped after step {self.step}; fit() goes on from there")
        return self.losses

    def train_step(self, inputs, targets):
        """One step at the scheduled learning rate; the loss is kept."""
        if self.schedule is not None:
            self.optimizer.lr = self.schedule(self.step)
        loss = train_step(self.model, self.optimizer, self.loss_function, inputs, targets, self.max_grad_norm)
        self.losses.append(loss)
        self.step += 1
        return loss

    def after_step(self, evaluate_every, evaluation):
        """Evaluate and save where it is due."""
        if evaluate_every and evaluation is not None and self.step % evaluate_every == 0:
            self.evaluations.append((self.step, self.evaluate(evaluation)))
        if self.checkpoint and self.checkpoint_every and self.step % self.checkpoint_every == 0:
            self.save(self.checkpoint)

    def evaluate(self, batches):
        """The mean loss over batches (inputs, targets); the model's mode is as before."""
        return mean_loss(self.model, self.loss_function, batches)

    def save(self, path):
        """Write the whole run to a safetensors file, atomically."""
        save_checkpoint(path, *pack_run(self))

    def resume(self, path):
        """Take up the run in the file; one that does not fit is a CheckpointError and changes nothing."""
        tensors, metadata = load_checkpoint(path)
        if metadata.get("format") != "tinytorch-run":
            raise CheckpointError(f"{path} holds arrays, but not a training run: Trainer.save writes one")
        try:
            model, optimizer, facts = unpack_run(tensors, metadata)
            self.optimizer.check_state_dict(optimizer)
            random = matching_states(facts["random"], generators(self.model))
            self.model.load_state_dict(model)  # checks all names and shapes before it writes
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise CheckpointError(f"{path} does not fit this trainer: {error}") from error
        self.optimizer.load_state_dict(optimizer)
        for rng, state in random:
            rng.bit_generator.state = state
        self.step, self.losses, self.evaluations = facts["step"], facts["losses"], facts["evaluations"]


def matching_states(saved, live):
    """(generator, saved state) pairs; a generator of another kind than the saved one is a ValueError."""
    for name, rng in live.items():
        kind = type(rng.bit_generator).__name__
        if name in saved and saved[name]["bit_generator"] != kind:
            raise ValueError(f"the generator {name} was {saved[name]['bit_generator']}, and is {kind} now")
    return [(rng, saved[name]) for name, rng in live.items() if name in saved]


# %% cell 68
def keep_memory():
    """Let the C library keep freed memory until the process ends; False where it has no such switch (glibc has).

    Source: mallopt(3), M_MMAP_THRESHOLD and M_TRIM_THRESHOLD.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS, musl; Windows
        return False
    own_mapping, trim = -3, -1  # from this size on an array gets a mapping of its own; so much may lie idle
    # 1 GiB, or where glibc refuses it the most that mallopt(3) allows
    return bool((mallopt(own_mapping, 1 << 30) or mallopt(own_mapping, 1 << 25)) and mallopt(trim, 2**31 - 1))

"""Hand-extracted from src/07_training while the build is being written."""
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
from tinytorch.core.layers import Module
from tinytorch.core.tensor import Tensor, default_rng


def cosine_lr(step, max_lr, total_steps, warmup_steps=0, min_lr=0.0):
    if step < warmup_steps:
        return max_lr * (step + 1) / (warmup_steps + 1)
    if step >= total_steps:
        return min_lr
    done = (step - warmup_steps) / (total_steps - warmup_steps)
    return min_lr + 0.5 * (1 + math.cos(math.pi * done)) * (max_lr - min_lr)


class CosineSchedule:
    def __init__(self, max_lr, total_steps, warmup_steps=0, min_lr=0.0):
        if not 0 <= warmup_steps < total_steps:
            raise ValueError(f"warmup_steps ({warmup_steps}) must be at least 0 and less than total_steps "
                             f"({total_steps})")
        self.max_lr, self.total_steps, self.warmup_steps, self.min_lr = max_lr, total_steps, warmup_steps, min_lr

    def __call__(self, step):
        return cosine_lr(step, self.max_lr, self.total_steps, self.warmup_steps, self.min_lr)


def total_norm(grads):
    return math.sqrt(sum(float(np.vdot(g, g)) for g in grads))


def clip_grad_norm(parameters, max_norm):
    grads = [p.grad.data for p in parameters if p.grad is not None]
    norm = total_norm(grads)
    scale = max_norm / (norm + 1e-6)
    if scale < 1:
        for grad in grads:
            grad *= scale
    return norm


@contextmanager
def evaluation_mode(model):
    was_training = model.training
    model.eval()
    try:
        with no_grad():
            yield model
    finally:
        model.train(was_training)


def train_step(model, optimizer, loss_function, inputs, targets, max_grad_norm=None):
    loss = loss_function(model(Tensor(inputs)), Tensor(targets))
    value = loss.item()
    if not math.isfinite(value):
        raise FloatingPointError(f"the loss is {value}: nothing was updated. Try a smaller lr, or max_grad_norm=1.0")
    optimizer.zero_grad()
    loss.backward()
    if max_grad_norm is not None:
        clip_grad_norm(optimizer.params, max_grad_norm)
    optimizer.step()
    return value


def mean_loss(model, loss_function, batches):
    total, count = 0.0, 0
    with evaluation_mode(model):
        for inputs, targets in batches:
            loss = loss_function(model(Tensor(inputs)), Tensor(targets))
            total += loss.item() * len(targets)
            count += len(targets)
    if not count:
        raise ValueError("there is nothing to evaluate: no batches came")
    return total / count


# ---- checkpoints
class CheckpointError(ValueError):
    """A checkpoint file that cannot be read, or that does not fit."""


DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1",
          "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1", "BOOL": "|b1"}
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}


def encode_header(tensors, metadata):
    header, offset = {}, 0
    if metadata:
        header["__metadata__"] = {str(key): str(value) for key, value in metadata.items()}
    for name, array in tensors.items():
        header[name] = {"dtype": CODES[array.dtype], "shape": list(array.shape),
                        "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def as_stored(tensors):
    arrays = {}
    for name, value in tensors.items():
        array = np.asarray(value.data if isinstance(value, Tensor) else value)
        if array.dtype.newbyteorder("<") not in CODES:
            raise CheckpointError(f"{name}: a checkpoint cannot hold {array.dtype} numbers, only {', '.join(DTYPES)}")
        shape = array.shape
        arrays[name] = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).reshape(shape)
    return dict(sorted(arrays.items(), key=lambda item: -item[1].itemsize))


def write_atomically(path, chunks):
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


def save_checkpoint(path, tensors, metadata=None):
    arrays = as_stored(tensors)
    chunks = [encode_header(arrays, metadata), *(array.reshape(-1).view(np.uint8) for array in arrays.values())]
    write_atomically(os.fspath(path), chunks)


def read_header(file, path, file_size):
    start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 2 <= length <= file_size - 8:
        raise CheckpointError(f"{path} is not a checkpoint, or it is cut off: {file_size} bytes, header of {length}")
    try:
        header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        entries = {name: (entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
                   for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: its header does not read ({error})") from None
    return entries, metadata


def header_problem(entries, data_size):
    position = 0
    for name, (code, shape, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if code not in DTYPES:
            return f"{name} holds {code} numbers, which NumPy does not have"
        if begin != position or end - begin != math.prod(shape) * np.dtype(DTYPES[code]).itemsize:
            return f"{name} does not fill its place: shape {shape} of {code}, bytes {begin} to {end}"
        position = end
    if position != data_size:
        return f"{data_size} bytes of numbers, {position} announced: the file is cut off or damaged"
    return None


def load_checkpoint(path):
    with open(path, "rb") as file:
        file_size = os.fstat(file.fileno()).st_size
        entries, metadata = read_header(file, path, file_size)
        start = file.tell()
        problem = header_problem(entries, file_size - start)
        if problem:
            raise CheckpointError(f"{path}: {problem}")
        tensors = {}
        for name, (code, shape, begin, _) in entries.items():
            file.seek(start + begin)
            tensors[name] = np.fromfile(file, DTYPES[code], math.prod(shape)).reshape(shape)
    return tensors, metadata


# ---- progress
def progress_line(step, total, loss, rate, unit, width=79):
    """One line of exactly `width` characters: a bar, steps, loss, rate and the time that is left."""
    seconds = (total - step) / rate[0] if rate[0] else 0
    text = f" step {step}/{total}  loss {loss:.4f}  {rate[1]:,.0f} {unit}/s  {clock(seconds)} left"
    size = min(30, width - len(text) - 2)
    filled = size * step // max(total, 1)
    bar = "[" + "#" * filled + "." * (size - filled) + "]" if size >= 5 else ""
    return (bar + text)[:width].ljust(width)


def clock(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Progress:
    """A progress bar on one line of a terminal; silent where the stream is no terminal."""

    def __init__(self, first, total, stream=None):
        self.stream = sys.stderr if stream is None else stream
        self.first, self.total, self.units = first, total, 0
        self.started, self.shown_at = time.perf_counter(), 0.0
        self.visible = hasattr(self.stream, "isatty") and self.stream.isatty()

    def show(self, step, loss, inputs):
        """After each step; draws at most ten times a second, and the last step always."""
        tokens = np.asarray(inputs).dtype.kind in "iu"
        self.units += np.size(inputs) if tokens else 1
        now = time.perf_counter()
        if not self.visible or (now - self.shown_at < 0.1 and step < self.total):
            return
        self.shown_at, seconds = now, max(now - self.started, 1e-9)
        rate = (step - self.first) / seconds, self.units / seconds
        width = shutil.get_terminal_size().columns - 1
        line = progress_line(step, self.total, loss, rate, "tokens" if tokens else "steps", width)
        self.stream.write("\r" + line)
        self.stream.flush()

    def close(self):
        if self.visible and self.shown_at:
            self.stream.write("\n")
            self.stream.flush()


# ---- the state of a run
def generators(model):
    """Every random generator that a training step may draw from, by a name that stays the same between runs."""
    found = {"course": default_rng()}
    for index, module in enumerate(model.modules()):
        found |= {f"{index}.{name}": value for name, value in vars(module).items()
                  if isinstance(value, np.random.Generator)}
    return found


def pack_run(trainer):
    """All of a run as (tensors, metadata): weights, optimizer, losses, step and random generators."""
    tensors = {f"model.{name}": array for name, array in trainer.model.state_dict().items()}
    optimizer = trainer.optimizer.state_dict()
    counts = {}
    for index, entry in optimizer.pop("state").items():
        counts[index] = {name: value for name, value in entry.items() if not isinstance(value, np.ndarray)}
        tensors |= {f"optimizer.{index}.{name}": value for name, value in entry.items()
                    if isinstance(value, np.ndarray)}
    tensors["losses"] = np.array(trainer.losses, np.float64)
    tensors["evaluations"] = np.array(trainer.evaluations, np.float64).reshape(-1, 2)
    random = {name: rng.bit_generator.state for name, rng in generators(trainer.model).items()}
    metadata = {"format": "tinytorch-run", "step": trainer.step, "optimizer": json.dumps(optimizer),
                "counts": json.dumps(counts), "random": json.dumps(random)}
    return tensors, metadata


def unpack_run(tensors, metadata):
    """The parts of a run: model state, optimizer state, and the plain values."""
    model = {name[6:]: array for name, array in tensors.items() if name.startswith("model.")}
    optimizer = json.loads(metadata["optimizer"])
    state = {int(index): dict(entry) for index, entry in json.loads(metadata["counts"]).items()}
    for name, array in tensors.items():
        if name.startswith("optimizer."):
            _, index, buffer = name.split(".")
            state[int(index)][buffer] = array
    optimizer["state"] = state
    values = {"step": int(metadata["step"]), "losses": tensors["losses"].tolist(),
              "evaluations": [(int(step), loss) for step, loss in tensors["evaluations"].tolist()],
              "random": json.loads(metadata["random"])}
    return model, optimizer, values


@contextmanager
def interrupt_between_steps():
    """Ctrl-C inside the block waits: the flag that is handed out says that it came. A second one does not wait."""
    came = threading.Event()

    def remember(number, frame):
        if came.is_set():
            raise KeyboardInterrupt
        came.set()

    main = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGINT, remember) if main else None
    try:
        yield came
    finally:
        if main:
            signal.signal(signal.SIGINT, previous)


class Trainer:
    """Trains a model: batches in, a falling loss out; every state on the way can be saved and taken up again."""

    def __init__(self, model, optimizer, loss_function, schedule=None, max_grad_norm=None,
                 checkpoint=None, checkpoint_every=None):
        self.model, self.optimizer, self.loss_function = model, optimizer, loss_function
        self.schedule, self.max_grad_norm = schedule, max_grad_norm
        self.checkpoint, self.checkpoint_every = checkpoint, checkpoint_every
        self.step, self.losses, self.evaluations = 0, [], []

    def train_step(self, inputs, targets):
        if self.schedule is not None:
            self.optimizer.lr = self.schedule(self.step)
        loss = train_step(self.model, self.optimizer, self.loss_function, inputs, targets, self.max_grad_norm)
        self.losses.append(loss)
        self.step += 1
        return loss

    def fit(self, get_batch, num_steps, evaluate_every=None, evaluation=None, progress=True):
        """Train until `self.step` is num_steps (a resumed trainer does the rest); returns the list of losses.

        get_batch(step) -> (inputs, targets), from the step alone, so that a resumed run sees the same batches.
        """
        bar = Progress(self.step, num_steps, None if progress else io.StringIO())
        self.model.train()
        try:
            with interrupt_between_steps() as interrupted:
                while self.step < num_steps:
                    inputs, targets = get_batch(self.step)
                    bar.show(self.step, self.train_step(inputs, targets), inputs)
                    self.after_step(evaluate_every, evaluation)
                    if interrupted.is_set():
                        raise KeyboardInterrupt(f"stopped after step {self.step}")
        finally:
            bar.close()
            if self.checkpoint:
                self.save(self.checkpoint)
        return self.losses

    def after_step(self, evaluate_every, evaluation):
        if evaluate_every and self.step % evaluate_every == 0:
            self.evaluations.append((self.step, self.evaluate(evaluation)))
        if self.checkpoint and self.checkpoint_every and self.step % self.checkpoint_every == 0:
            self.save(self.checkpoint)

    def evaluate(self, batches):
        return mean_loss(self.model, self.loss_function, batches)

    def save(self, path):
        save_checkpoint(path, *pack_run(self))

    def resume(self, path):
        """Take up the run in the file `path`; a file that does not fit is an error and changes nothing."""
        tensors, metadata = load_checkpoint(path)
        if metadata.get("format") != "tinytorch-run":
            raise CheckpointError(f"{path} holds tensors, but no training run: Trainer.save writes one")
        try:
            model, optimizer, values = unpack_run(tensors, metadata)
            self.optimizer.check_state_dict(optimizer)
            self.model.load_state_dict(model)
        except (KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path} does not fit this trainer: {error}") from error
        self.optimizer.load_state_dict(optimizer)
        self.step, self.losses, self.evaluations = values["step"], values["losses"], values["evaluations"]
        for name, rng in generators(self.model).items():
            if name in values["random"]:
                rng.bit_generator.state = values["random"][name]

"""Models that the world runs, from their files and back: GPT-2, Llama 2 and 3, Mistral, Qwen2 and Qwen2.5.

Written by hand, not built from a lesson. A checkpoint is a directory with config.json and model.safetensors, or with
shards that model.safetensors.index.json lists. Pickle is never read.

Every weight is copied once, from the memory map into the model's own memory. A float32 weight could stay a view of the
file instead; but each number is read anyway, to see that it is finite, and a view dies with a file that is cut later.
"""

import json
import math
import os
import shutil
import uuid
from pathlib import Path

import numpy as np

from tinytorch.core import training
from tinytorch.core.training import CheckpointError, write_atomically
from tinytorch.models.architectures import Config, config_of, family_of, places_of
from tinytorch.models.safetensors import WEIGHTS, is_finite, read_index, read_safetensors
from tinytorch.models.transformer import GPT

__all__ = ["CheckpointError", "load_checkpoint", "save_checkpoint"]

CONFIG, WHOLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def load_checkpoint(path):
    """The GPT or Llama in a directory or a .safetensors file (config.json beside it), float32, in evaluation mode.

    Dropout is 0. Whatever is missing, damaged, unknown or not finite is a CheckpointError that names the file and the
    tensor, with the shape found and needed; a model that would compute something else than its authors' is one, too.
    """
    folder, weights = find_files(Path(path))
    config = Config(folder / CONFIG)
    family = family_of(config)
    stored = family.with_prefix(read_index(weights) if weights.name == INDEX else read_safetensors(weights))
    try:
        model = family.build(config, sum(math.prod(tensor.shape) for tensor in stored.values()))
    except CheckpointError:
        raise
    except ValueError as error:  # sizes that do not go together
        raise config.error(str(error)) from error
    fill(places_of(model), stored, weights, model.tie_weights and family.embedding)
    return model.eval()


def save_checkpoint(model, directory):
    """Write a GPT or Llama as config.json and model.safetensors, float32, which transformers' from_pretrained reads.

    A GPT becomes a GPT2LMHeadModel, a Llama a LlamaForCausalLM, or with biases on queries, keys and values alone a
    Qwen2ForCausalLM, or with a window a MistralForCausalLM. Both files are whole before the first is in its place; a new directory appears in one step, in an
    existing one its other files stay.
    """
    if not isinstance(model, GPT):
        raise CheckpointError(f"save_checkpoint writes a GPT or a Llama, got {type(model).__name__}")
    config, arrays = config_of(model), {name: np.asarray(place, np.float32) for name, place in places_of(model).items()}
    for name, array in arrays.items():
        if not is_finite(array):
            raise CheckpointError(f"{directory}: {name} of shape {array.shape} holds NaN or infinity; nothing was saved")
    put_files(Path(directory).resolve(), config, arrays)


def put_files(directory, config, arrays):
    """Write both files into a folder of their own, then move it, or them, to where they belong."""
    exists = directory.is_dir()
    staging = (directory if exists else directory.parent) / f".{directory.name}.{uuid.uuid4().hex}.tmp"
    staging.mkdir(parents=True)
    try:
        training.save_checkpoint(staging / WHOLE, arrays, {"format": "pt"})
        write_atomically(staging / CONFIG, [(json.dumps(config, indent=2) + "\n").encode()])
        if not exists:
            os.rename(staging, directory)
        else:
            for name in (WHOLE, CONFIG):
                os.replace(staging / name, directory / name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def find_files(path):
    """(folder, file): where config.json lies, and the weights or their index."""
    if path.suffix in PICKLES and not path.is_dir():
        raise CheckpointError(f"{path} is a pickle, which can run any code, so it is never read: safetensors is")
    if path.is_file() and path.suffix == ".safetensors":
        return path.parent, path
    if not path.is_dir():
        raise CheckpointError(f"{path} is neither a directory with {CONFIG} nor a .safetensors file")
    for name in (WHOLE, INDEX):
        if (path / name).is_file():
            return path, path / name
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in PICKLES)
    if pickles:
        raise CheckpointError(f"{path} holds {pickles[0]}, a pickle, which can run any code, so it is never read, and no "
                              f"{WHOLE}. transformers' save_pretrained writes one")  # fmt: skip
    raise CheckpointError(f"{path} holds neither {WHOLE} nor {INDEX}")


def fill(places, stored, weights, tied_to):
    """Copy each tensor into its place, {name: array}, after all names, shapes and dtypes have been compared.

    tied_to: the name of the embedding that is also the head; a head in the file must then hold the same numbers.
    """
    head = stored.pop("lm_head.weight", None) if tied_to else None
    for name, place in places.items():
        if name not in stored:
            raise CheckpointError(f"{weights} lacks the tensor {name}, which {CONFIG} asks for: shape {place.shape}")
    for name, tensor in stored.items():
        found = f"{tensor.file}: {name}, {tensor.code} of shape {tensor.shape}"
        if name not in places:
            raise CheckpointError(f"{found}, has no place in the model that {CONFIG} describes")
        if tensor.shape != places[name].shape:
            raise CheckpointError(f"{found}, does not fit: {CONFIG} asks for the shape {places[name].shape}")
        if tensor.code not in WEIGHTS:
            raise CheckpointError(f"{found}: weights are {', '.join(WEIGHTS)}, not {tensor.code}")
    embedding = stored.get(tied_to)
    if head and (head.code, head.shape) == (embedding.code, embedding.shape):
        head = None if np.array_equal(head.data, embedding.data) else head
    if head:
        raise CheckpointError(f"{head.file}: lm_head.weight, {head.code} of shape {head.shape}, is not {tied_to}, and "
                              f"{CONFIG} says that they are one (tie_word_embeddings)")  # fmt: skip
    for name, place in places.items():
        stored[name].copy_into(place)
        if not is_finite(place):
            index = tuple(np.argwhere(~np.isfinite(place))[0].tolist())
            raise CheckpointError(f"{stored[name].file}: {name} of shape {place.shape} is {place[index]} at {index}; "
                                  "a weight is a finite number")  # fmt: skip

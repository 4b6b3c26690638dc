"""Models that the world runs, from their files and back: GPT-2, Llama 2 and 3, Mistral, Qwen2 and Qwen2.5.

Written by hand, not built from a lesson. A checkpoint is a directory with config.json and model.safetensors, or with
shards that model.safetensors.index.json lists. Pickle is never read.

Every weight is copied once, from the memory map into the model's own memory. A float32 weight could stay a view of the
file instead; but each number is read anyway, to see that it is finite, and a view dies with a file that is cut later.
"""

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tinytorch.core import training
from tinytorch.core.training import CheckpointError, write_atomically
from tinytorch.models.architectures import Config, Family, config_of, family_of, places_of
from tinytorch.models.safetensors import WEIGHTS, is_finite, read_index, read_safetensors
from tinytorch.models.transformer import GPT

__all__ = ["CheckpointError", "find_checkpoint", "load_checkpoint", "save_checkpoint"]

CONFIG, WHOLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
HEAD = "lm_head.weight"
COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json",
              "special_tokens_map.json", "chat_template.jinja", "generation_config.json")  # what a model's text needs
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def load_checkpoint(path):
    """The GPT or Llama in a directory or a .safetensors file (config.json beside it), float32, in evaluation mode.

    Dropout is 0. Whatever is missing, damaged, unknown or not finite is a CheckpointError that names the file and the
    tensor, with the shape found and needed; a model that would compute something else than its authors' is one, too.
    """
    found = find_checkpoint(path)
    try:
        model = found.family.build(**found.sizes)
    except ValueError as error:  # sizes that do not go together
        raise found.config.error(str(error)) from error
    fill(places_of(model), found)
    return model.eval()


class Found(NamedTuple):
    """A checkpoint whose names, shapes and dtypes are right, and of which no number has been read."""

    config: Config
    family: Family
    sizes: dict  # of our model, by the names of Llama's constructor
    tensors: dict  # Stored by name; also a head that is tied, if the file has one


def find_checkpoint(path):
    """What load_checkpoint would load: quick, and without memory for the weights. The same errors, but for numbers."""
    folder, weights = find_files(Path(path))
    config = Config(folder / CONFIG)
    family = family_of(config)
    try:
        sizes = family.sizes(config)
    except CheckpointError:
        raise
    except ValueError as error:  # heads that do not divide
        raise config.error(str(error)) from error
    stored = family.with_prefix(read_index(weights) if weights.name == INDEX else read_safetensors(weights))
    check(family.shapes(**sizes), stored, weights, sizes["tie_weights"])
    return Found(config, family, sizes, stored)


def save_checkpoint(model, directory, source=None):
    """Write a GPT or Llama as config.json and model.safetensors, float32, which transformers' from_pretrained reads.

    A GPT becomes a GPT2LMHeadModel, a Llama a LlamaForCausalLM, or with biases on queries, keys and values alone a
    Qwen2ForCausalLM, or with a window a MistralForCausalLM. source: the directory that the model came from; its
    tokenizer, its generation_config.json and its ids of begin, end and padding go along. All files are whole before the
    first is in its place; a new directory appears in one step, in an existing one its other files stay.
    """
    if not isinstance(model, GPT):
        raise CheckpointError(f"save_checkpoint writes a GPT or a Llama, got {type(model).__name__}")
    config, arrays = config_of(model), {name: np.asarray(place, np.float32) for name, place in places_of(model).items()}
    companions = []
    if source is not None:
        theirs = Config(Path(source) / CONFIG)
        config |= {name: theirs.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        companions = [file for name in COMPANIONS if (file := Path(source) / name).is_file()]
    for name, array in arrays.items():
        if not is_finite(array):
            raise CheckpointError(f"{directory}: {name} of shape {array.shape} holds NaN or infinity; nothing was saved")
    put_files(Path(directory).resolve(), config, arrays, companions)


def put_files(directory, config, arrays, companions):
    """Write all files into a folder of their own, then move it, or them, to where they belong."""
    exists = directory.is_dir()
    staging = (directory if exists else directory.parent) / f".{directory.name}.{uuid.uuid4().hex}.tmp"
    staging.mkdir(parents=True)
    try:
        training.save_checkpoint(staging / WHOLE, arrays, {"format": "pt"})
        write_atomically(staging / CONFIG, [(json.dumps(config, indent=2) + "\n").encode()])
        for file in companions:
            shutil.copyfile(file, staging / file.name)
        if not exists:
            os.rename(staging, directory)
        else:
            for name in (WHOLE, CONFIG, *(file.name for file in companions)):
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


def check(shapes, stored, weights, tied):
    """Compare each tensor's name, shape and dtype with what config.json asks for: (name, shape), one after the other."""
    needed = {}
    for name, shape in shapes:  # a wrong config.json may ask for more than memory holds: stop at the first that lacks
        if name not in stored:
            raise CheckpointError(f"{weights} lacks the tensor {name}, which {CONFIG} asks for: shape {shape}")
        needed[name] = shape
    for name, tensor in stored.items():
        found = f"{tensor.file}: {name}, {tensor.code} of shape {tensor.shape}"
        if tied and name == HEAD:
            continue
        if name not in needed:
            raise CheckpointError(f"{found}, has no place in the model that {CONFIG} describes")
        if tensor.shape != needed[name]:
            raise CheckpointError(f"{found}, does not fit: {CONFIG} asks for the shape {needed[name]}")
        if tensor.code not in WEIGHTS:
            raise CheckpointError(f"{found}: weights are {', '.join(WEIGHTS)}, not {tensor.code}")


def fill(places, found):
    """Copy each tensor into its place, {name: array}. A head in the file that is tied must be the embedding."""
    head, tied_to = found.tensors.get(HEAD) if HEAD not in places else None, found.family.embedding
    embedding = found.tensors[tied_to]
    if head and (head.code, head.shape) == (embedding.code, embedding.shape):
        head = None if np.array_equal(head.data, embedding.data) else head
    if head:
        raise CheckpointError(f"{head.file}: {HEAD}, {head.code} of shape {head.shape}, is not {tied_to}, and "
                              f"{CONFIG} says that they are one (tie_word_embeddings)")  # fmt: skip
    for name, place in places.items():
        tensor = found.tensors[name]
        tensor.copy_into(place)
        if not is_finite(place):
            index = tuple(np.argwhere(~np.isfinite(place))[0].tolist())
            raise CheckpointError(f"{tensor.file}: {name} of shape {place.shape} is {place[index]} at {index}; "
                                  "a weight is a finite number")  # fmt: skip

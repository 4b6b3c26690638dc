"""The reader of safetensors files, whole or in shards, by a memory map and without any library.

Written by hand, not built from a lesson. The format is lesson 07's, and so are the checks of its layout; what is added
here is bfloat16, the map, and the index of shards.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinytorch.core.training import CheckpointError, entry_of, layout_problem

__all__ = ["WEIGHTS", "Stored", "is_finite", "read_index", "read_json", "read_safetensors"]

WEIGHTS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # NumPy has no bfloat16: its 16 bits are half of a float32
LARGEST_JSON, LARGEST_HEADER = 2**30, 100_000_000  # bytes; the second is the limit of the library safetensors


def read_json(path):
    """The object in a JSON file."""
    if path.exists() and not path.is_file():  # a pipe or a device could be read for ever
        raise CheckpointError(f"{path} should be a file, and is none")
    if path.is_file() and path.stat().st_size > LARGEST_JSON:
        raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes; more than {LARGEST_JSON:,} are not read")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON, or damaged: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} should hold an object, {{…}}, and holds a {type(values).__name__}")
    return values


@dataclass(frozen=True)
class Stored:
    """A tensor as it lies in a file: `data` are its bytes in the memory map."""

    file: Path
    code: str
    shape: tuple
    data: np.ndarray

    def numbers(self):
        """The map seen as numbers, without a copy; bfloat16 as its 16 bits."""
        return self.data.view(WEIGHTS[self.code]).reshape(self.shape)

    def copy_into(self, place):
        """Write the numbers into a float32 array of the same shape."""
        if self.code == "BF16":
            place = place.view(np.uint32)
            place[...] = self.numbers()
            place <<= 16
        else:
            place[...] = self.numbers()


def read_safetensors(path):
    """Every tensor of a safetensors file by name, as Stored: the header is checked, and no number is read."""
    size = path.stat().st_size
    if size < 10:
        raise CheckpointError(f"{path} is no safetensors file, or it is cut off: it has {size} bytes")
    data = np.memmap(path, np.uint8, "r").view(np.ndarray)
    length = int.from_bytes(data[:8].tobytes(), "little")
    if not 2 <= length <= size - 8:
        raise CheckpointError(f"{path} is no safetensors file, or it is cut off: its header should have {length} bytes, "
                              f"the file has {size}")  # fmt: skip
    if length > LARGEST_HEADER:
        raise CheckpointError(f"{path}: its header should have {length:,} bytes; more than {LARGEST_HEADER:,} are not read")
    try:
        header = json.loads(data[8 : 8 + length].tobytes())
        entries = {name: entry_of(entry) for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is no safetensors file, or damaged: its header does not read ({error!r})") from None
    data = data[8 + length :]
    for name, (code, shape, _, end) in entries.items():
        if end > len(data):
            raise CheckpointError(f"{path}: {name}, {code} of shape {shape}, should end at byte {end}, and the file has "
                                  f"{len(data)} after its header: it is cut off, or the header is wrong")  # fmt: skip
    as_numpy = {name: (code.replace("BF16", "U16"), *rest) for name, (code, *rest) in entries.items()}
    problem = layout_problem(as_numpy, len(data))
    if problem:
        raise CheckpointError(f"{path} is damaged: {problem}")
    return {name: Stored(path, code, shape, data[begin:end]) for name, (code, shape, begin, end) in entries.items()}


def read_index(path):
    """Every tensor of the shards that an index lists, by name."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{path} needs a weight_map from names of tensors to names of files")
    found = {}
    for shard in dict.fromkeys(weight_map.values()):
        tensor = next(name for name, file in weight_map.items() if file == shard)
        if re.search(r"[/\\:\0]", shard) or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{path}: the shard of {tensor} is {shard!r}; it should be the name of a .safetensors "
                                  "file in the same directory")  # fmt: skip
        if not (path.parent / shard).is_file():
            raise CheckpointError(f"{path}: the shard {shard}, which should hold {tensor}, is missing")
        tensors = read_safetensors(path.parent / shard)
        for name in tensors:
            if weight_map.get(name) != shard:
                raise CheckpointError(f"{path.parent / shard} holds {name} of shape {tensors[name].shape}, which "
                                      f"{path.name} does not look for there")  # fmt: skip
        found |= tensors
    for name, shard in weight_map.items():
        if name not in found:
            raise CheckpointError(f"{path.parent / shard} lacks {name}, which {path.name} looks for there")
    return found


def is_finite(array):
    """No NaN, no infinity; without an array of booleans."""
    with np.errstate(invalid="ignore"):
        return bool(np.isfinite(array.min(initial=0)) and np.isfinite(array.max(initial=0)))

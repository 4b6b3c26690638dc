"""The models that are measured: random weights, the same ones for transformers."""

import os
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from workload import missing

from tinytorch.generation.kv_cache import create_kv_cache, stored_heads
from tinytorch.models.checkpoint import save_checkpoint
from tinytorch.models.llama import Llama
from tinytorch.models.transformer import GPT


@dataclass(frozen=True)
class Shape:
    """A model of random weights; `kind` makes it from `sizes`."""

    name: str
    kind: type
    sizes: dict = field(hash=False)


GPT2 = Shape("gpt2", GPT, dict(vocab_size=50257, embed_dim=768, num_layers=12, num_heads=12, max_seq_len=1024))
SMALL = Shape("small", GPT, dict(vocab_size=1000, embed_dim=256, num_layers=4, num_heads=8, max_seq_len=1024))
LLAMA = Shape("llama", Llama, dict(vocab_size=32000, embed_dim=288, num_layers=6, num_heads=6, max_seq_len=256,
                                   hidden_dim=768, tie_weights=True))  # fmt: skip


@cache
def our_model(shape: Shape):
    """Made once: all workloads of a shape share it."""
    return shape.kind(**shape.sizes, rng=np.random.default_rng(0)).eval()


@cache
def save_for_peers(shape: Shape, folder: Path) -> None:
    """The same weights for everybody: a checkpoint, where transformers will read it."""
    if not missing("transformers"):
        save_checkpoint(our_model(shape), folder / shape.name)


@lru_cache(maxsize=2)
def their_model(shape: Shape, folder: Path, attention: str):
    """transformers' model; its process has as many threads as NumPy's BLAS has in ours."""
    import torch
    import transformers

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.set_grad_enabled(False)
    transformers.logging.set_verbosity_error()
    made = transformers.AutoModelForCausalLM.from_pretrained
    return made(folder / shape.name, attn_implementation=attention).eval()


def new_cache(model, batch_size=1, factory=create_kv_cache, **options):
    return factory(batch_size, model.max_seq_len, model.num_layers, *stored_heads(model), **options)


def prompt_ids(shape: Shape, batch_size: int, length: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, shape.sizes["vocab_size"], (batch_size, length))


def weight_bytes(model) -> int:
    """What one token reads of the weights: all of them, but single rows of tables that only look up."""
    tables = [model.position_embedding] + [model.token_embedding] * (not model.tie_weights)
    unread = sum(p.data.nbytes for table in tables for p in table.parameters())
    return sum(p.data.nbytes for p in model.parameters()) - unread

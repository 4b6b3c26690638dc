"""Inference: whole texts, single decode steps, prefill, beside transformers and beside what the memory allows."""

import os
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from workload import Claim, Contender, Task, Workload, missing

from tinytorch.core.autograd import no_grad
from tinytorch.generation.kv_cache import create_kv_cache, prefill, stored_heads
from tinytorch.models.checkpoint import save_checkpoint
from tinytorch.models.llama import Llama
from tinytorch.models.transformer import GPT, evaluating
from tinytorch.profiling.profiler import measure_memory, time_calls


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
def weights_for_peers(shape: Shape, folder: Path) -> Path:
    """The same weights for everybody: a checkpoint, as transformers reads it."""
    directory = folder / shape.name
    if not directory.exists() and not missing("transformers"):
        save_checkpoint(our_model(shape), directory)
    return directory


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


def some_logits(logits: np.ndarray) -> list[float]:
    """Of the last token of each row, (B, V): enough to see that two models are the same."""
    return logits[:, :32].ravel().tolist()


def weight_bytes(model) -> int:
    """What one token reads of the weights: all of them, but single rows of tables that only look up."""
    tables = [model.position_embedding] + [model.token_embedding] * (not model.tie_weights)
    unread = sum(p.data.nbytes for table in tables for p in table.parameters())
    return sum(p.data.nbytes for p in model.parameters()) - unread


class OurText(Task):
    """A whole text by `generate`, with a cache."""

    def __init__(self, folder, shape, batch_size, prompt, new):
        self.model, self.ids, self.new = our_model(shape), prompt_ids(shape, batch_size, prompt), new
        weights_for_peers(shape, folder)
        self.cache, self.work = new_cache(self.model, batch_size), {"tokens": batch_size * new}

    def run(self):
        self.model.generate(self.ids, self.new, cache=self.cache)

    def answer(self):
        with no_grad():
            return some_logits(self.model(self.ids).numpy()[:, -1])


class TheirText(Task):
    """The same by transformers' `generate`."""

    def __init__(self, folder, shape, attention, batch_size, prompt, new):
        import torch

        self.model, self.new = their_model(shape, folder, attention), new
        self.ids, self.work = torch.tensor(prompt_ids(shape, batch_size, prompt)), {"tokens": batch_size * new}
        self.mask = torch.ones_like(self.ids)

    def run(self):
        self.model.generate(self.ids, attention_mask=self.mask, max_new_tokens=self.new, min_new_tokens=self.new,
                            do_sample=False, use_cache=True, pad_token_id=0)  # fmt: skip

    def answer(self):
        return some_logits(self.model(self.ids).logits[:, -1].numpy())


STEPS = 8  # a run decodes so many tokens, the first behind `context` of them


class OurSteps(Task):
    """Decode steps behind a context, greedy."""

    def __init__(self, folder, shape, context, **options):
        self.model = our_model(shape)
        weights_for_peers(shape, folder)
        self.cache, ids = new_cache(self.model, **options), prompt_ids(shape, 1, context + 1)
        prefill(self.model, ids[:, :-1], self.cache)
        self.first = ids[:, -1:]
        per_token = 2 * self.model.num_layers * np.prod(stored_heads(self.model)) * 4
        bytes_read = sum(weight_bytes(self.model) + per_token * (context + 1 + step) for step in range(STEPS))
        self.work = {"tokens": STEPS, "bytes": int(bytes_read)}

    def steps(self, count):
        """The logits (1, V) of the last of so many tokens."""
        ids = self.first
        with evaluating(self.model), self.cache.attached_to(self.model):
            for _ in range(count):
                logits = self.model(ids).numpy()[:, -1]
                ids = logits.argmax(axis=-1)[:, None]
        return logits

    def run(self):
        self.steps(STEPS)

    def rewind(self):
        self.cache.rollback(STEPS)

    def answer(self):
        logits = self.steps(1)
        self.cache.rollback(1)
        return some_logits(logits)


class TheirSteps(Task):
    """The same by transformers, on its DynamicCache."""

    work = {"tokens": STEPS}

    def __init__(self, folder, shape, attention, context):
        import torch

        self.model = their_model(shape, folder, attention)
        ids = torch.tensor(prompt_ids(shape, 1, context + 1))
        self.cache = self.model(ids[:, :-1], use_cache=True).past_key_values
        self.first, self.context = ids[:, -1:], context

    def steps(self, count):
        ids = self.first
        for _ in range(count):
            logits = self.model(ids, past_key_values=self.cache, use_cache=True).logits[:, -1]
            ids = logits.argmax(dim=-1, keepdim=True)
        return logits

    def run(self):
        self.steps(STEPS)

    def rewind(self):
        self.cache.crop(self.context - self.cache.get_seq_length())  # a negative number: so many tokens go

    def answer(self):
        logits = self.steps(1).numpy()
        self.rewind()
        return some_logits(logits)


class OurPrefill(Task):
    """A prompt into an empty cache, and the logits of its last token."""

    def __init__(self, folder, shape, length):
        self.model, self.ids = our_model(shape), prompt_ids(shape, 1, length)
        weights_for_peers(shape, folder)
        self.cache, self.work = new_cache(self.model), {"tokens": length}

    def run(self):
        with evaluating(self.model), self.cache.attached_to(self.model):
            self.logits = self.model.head(self.model.hidden(self.ids)[:, -1]).numpy()

    def rewind(self):
        self.cache.reset()

    def answer(self):
        self.run(), self.rewind()
        return some_logits(self.logits)


class TheirPrefill(Task):
    """The same by transformers, in one call that makes a new cache."""

    def __init__(self, folder, shape, attention, length):
        import torch

        self.model, self.ids = their_model(shape, folder, attention), torch.tensor(prompt_ids(shape, 1, length))
        self.work = {"tokens": length}

    def run(self):
        self.logits = self.model(self.ids, use_cache=True, logits_to_keep=1).logits[:, -1]

    def answer(self):
        self.run()
        return some_logits(self.logits.numpy())


class ReadMemory(Task):
    """What the machine allows: a matrix that no cache holds times a vector, in the faster of both directions."""

    def __init__(self, folder):
        self.matrix = np.ones((32768, 4096), np.float32)  # 512 MiB
        self.work = {"bytes": self.matrix.nbytes}
        rows, columns = (np.ones(size, np.float32) for size in self.matrix.shape)
        ways = [lambda: self.matrix @ columns, lambda: rows @ self.matrix]
        self.way = min(ways, key=lambda way: min(time_calls(way, warmup=1, repeats=3)))

    def run(self):
        self.way()


class StepMemory(OurSteps):
    """Not a time: what a decode step allocates at its peak beyond its logits, as tracemalloc counts it."""

    def run(self):
        with evaluating(self.model), self.cache.attached_to(self.model):
            self.model(self.first)
            peak = measure_memory(lambda: self.model(self.first).numpy())["peak_bytes"]
        return peak - 4 * self.model.vocab_size

    def rewind(self):
        self.cache.rollback(2)


EAGER, SDPA = "transformers", "transformers sdpa"


def beside_transformers(ours, theirs, *arguments) -> dict[str, Contender]:
    """Three contenders: ours(folder, shape, ...), and theirs(folder, shape, attention, ...) in both ways."""
    shape, *sizes = arguments
    return {
        "tinytorch": Contender(lambda folder: ours(folder, shape, *sizes)),
        EAGER: Contender(lambda folder: theirs(folder, shape, "eager", *sizes), "transformers"),
        SDPA: Contender(lambda folder: theirs(folder, shape, "sdpa", *sizes), "transformers"),
    }


def text(name, title, shape, batch_size, prompt, new, least, seconds) -> Workload:
    contenders = beside_transformers(OurText, TheirText, shape, batch_size, prompt, new)
    claims = (Claim("tinytorch", EAGER, "tokens/s", least=least), Claim("tinytorch", SDPA, "tokens/s"))
    return Workload(name, title, contenders, claims, seconds)


def at_contexts(make, shape, *contexts) -> dict[str, Contender]:
    """One contender per context: make(folder, shape, context)."""
    return {f"context {n}": Contender(lambda folder, n=n: make(folder, shape, n)) for n in contexts}


def step_memory(name, title, shape) -> Workload:
    claim = Claim("context 1000", "context 64", "KiB", most=1.05)  # what does not grow; 5 % are small objects
    return Workload(name, title, at_contexts(StepMemory, shape, 64, 1000), (claim,), 1, tolerance=None)


WORKLOADS = [
    text("gpt2-text", "GPT-2 124M shape, batch 1: 128 + 64 tokens", GPT2, 1, 128, 64, 1.2, 60),
    Workload(
        "gpt2-step", "GPT-2 124M shape: decode step at context 1000",
        beside_transformers(OurSteps, TheirSteps, GPT2, 1000) | {"read limit": Contender(ReadMemory, "machine")},
        (Claim("tinytorch", EAGER, "tokens/s", least=1.4), Claim("tinytorch", SDPA, "tokens/s"),
         Claim("tinytorch", "read limit", "GB/s", least=0.8, title="the same, bytes read against what memory allows")),
        25,
    ),
    Workload(
        "gpt2-growth", "GPT-2 124M shape: bytes read per second at context 1000",
        at_contexts(OurSteps, GPT2, 64, 256, 1000),
        (Claim("context 1000", "context 64", "GB/s", least=1.0),
         Claim("context 256", "context 64", "GB/s", least=1.0,
               title="GPT-2 124M shape: bytes read per second at context 256")),
        20, tolerance=None,
    ),
    step_memory("gpt2-memory", "GPT-2 124M shape: a decode step allocates beyond its logits, context 1000", GPT2),
    Workload(
        "gpt2-prefill", "GPT-2 124M shape: prefill of 512 tokens",
        beside_transformers(OurPrefill, TheirPrefill, GPT2, 512),
        (Claim("tinytorch", EAGER, "ms", most=1.1), Claim("tinytorch", SDPA, "ms")), 25,
    ),
    text("small-text", "small GPT (4 x 256), batch 1: 128 + 64 tokens", SMALL, 1, 128, 64, 2.5, 12),
    text("small-text-8", "small GPT (4 x 256), batch 8: 128 + 64 tokens", SMALL, 8, 128, 64, 1.7, 12),
    text("llama-text", "Llama shape (6 x 288, vocabulary 32000): 8 + 192 tokens", LLAMA, 1, 8, 192, 2.0, 20),
    step_memory("small-memory", "small GPT: a decode step allocates beyond its logits, context 1000", SMALL),
]  # fmt: skip

"""Inference: whole texts, single decode steps, prefill, beside transformers and beside what the memory allows."""

import numpy as np
from models import GPT2, LLAMA, SMALL, new_cache, our_model, prompt_ids, save_for_peers, their_model, weight_bytes
from workload import Claim, Contender, Task, Workload

from tinytorch.core.autograd import no_grad
from tinytorch.generation.kv_cache import stored_heads
from tinytorch.models.transformer import evaluating
from tinytorch.profiling.profiler import measure_memory, time_calls


def some_logits(logits: np.ndarray) -> list[float]:
    """Of the last token of each row, (B, V): enough to see that two models are the same."""
    return logits[:, :32].ravel().tolist()


class OurText(Task):
    """A whole text by `generate`, with a cache."""

    def __init__(self, folder, shape, batch_size, prompt, new):
        self.model, self.ids, self.new = our_model(shape), prompt_ids(shape, batch_size, prompt), new
        save_for_peers(shape, folder)
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
        save_for_peers(shape, folder)
        self.cache, ids = new_cache(self.model, **options), prompt_ids(shape, 1, context + 1)
        with evaluating(self.model), self.cache.attached_to(self.model):
            self.model.hidden(ids[:, :-1])
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
        self.cache = self.model(ids[:, :-1], use_cache=True, logits_to_keep=1).past_key_values
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
        save_for_peers(shape, folder)
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
    """Not a time: what a decode step allocates at its peak beyond its logits, as tracemalloc counts it.

    The least of several steps: what Python itself puts aside now and then is not the step's.
    """

    def run(self):
        with evaluating(self.model), self.cache.attached_to(self.model):
            peaks = [measure_memory(lambda: self.model(self.first).numpy())["peak_bytes"] for _ in range(STEPS)]
        return min(peaks) - 4 * self.model.vocab_size


EAGER, SDPA = "transformers", "transformers sdpa"
BYTES_AT = "GPT-2 124M shape: bytes that a decode step reads per second, context "


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


def step_memory(name, title, shape, long=False) -> Workload:
    claim = Claim("context 1000", "context 64", "KiB", most=1.05)  # what does not grow; 5 % are small objects
    return Workload(name, title, at_contexts(StepMemory, shape, 64, 1000), (claim,), 1, tolerance=None, long=long)


WORKLOADS = [
    text("gpt2-text", "GPT-2 124M shape, batch 1: 128 + 64 tokens", GPT2, 1, 128, 64, 1.2, 60),
    Workload(
        "gpt2-step", "GPT-2 124M shape: decode step at context 1000",
        beside_transformers(OurSteps, TheirSteps, GPT2, 1000) | {"read limit": Contender(ReadMemory, "machine")},
        (Claim("tinytorch", EAGER, "tokens/s", least=1.4), Claim("tinytorch", SDPA, "tokens/s"),
         Claim("tinytorch", "read limit", "GB/s", least=0.8, title=BYTES_AT + "1000")),
        25,
    ),
    Workload(
        "gpt2-growth", BYTES_AT + "1000",
        at_contexts(OurSteps, GPT2, 64, 256, 1000),
        (Claim("context 1000", "context 64", "GB/s", least=1.0),
         Claim("context 256", "context 64", "GB/s", least=1.0, title=BYTES_AT + "256")),
        20, tolerance=None,
    ),
    step_memory("gpt2-memory", "GPT-2 124M shape: a decode step allocates beyond its logits, context 1000", GPT2,
                long=True),
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

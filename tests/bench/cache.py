"""What the KV cache of lesson 17 gains, and what the members of its family in lessons 22 and 23 cost."""

from functools import partial

import numpy as np
from inference import OurSteps, at_contexts
from models import GPT2, SMALL, Shape, new_cache, our_model, prompt_ids
from workload import Claim, Contender, Task, Workload

from tinytorch.core.attention import scaled_dot_product_attention
from tinytorch.core.autograd import no_grad
from tinytorch.core.tensor import Tensor
from tinytorch.generation.cache_compression import QuantizedModelKVCache
from tinytorch.generation.kv_cache import KVCacheConfig, create_kv_cache
from tinytorch.generation.paged import paged_kv_cache
from tinytorch.models.transformer import GPT, evaluating

SIX = Shape("six", GPT, dict(vocab_size=1000, embed_dim=384, num_layers=6, num_heads=6, max_seq_len=1024))
CONTEXTS = 64, 256, 1000


class WithoutCache(Task):
    """The next token behind a context, for which the whole sequence runs again."""

    work = {"tokens": 1}

    def __init__(self, folder, shape, context):
        self.model, self.ids = our_model(shape), prompt_ids(shape, 1, context + 1)

    def run(self):
        with evaluating(self.model):
            self.logits = self.model.head(self.model.hidden(self.ids)[:, -1]).numpy()

    def answer(self):
        self.run()
        return self.logits[0, :32].tolist()


class Text(Task):
    """A whole text of 128 + 128 tokens, with a cache or without."""

    work = {"tokens": 128}

    def __init__(self, folder, shape, cached):
        self.model, self.ids = our_model(shape), prompt_ids(shape, 1, 128)
        self.cache = new_cache(self.model) if cached else None

    def run(self):
        self.model.generate(self.ids, 128, cache=self.cache)


class Attention(Task):
    """One token's attention in each of GPT-2's layers, over what a cache of this kind shows it."""

    def __init__(self, factory, context=1024, layers=12, heads=12, head_dim=64):
        rng = np.random.default_rng(0)
        self.query = Tensor(rng.standard_normal((1, heads, 1, head_dim), dtype=np.float32))
        cache = factory(1, context, layers, heads, head_dim)

        def update(tokens):
            new = rng.standard_normal((layers, 2, 1, heads, tokens, head_dim), dtype=np.float32)
            return [cache.update(layer, *new[layer]) for layer in range(layers)]

        update(context - 1)
        cache.advance()
        self.views, self.attend = update(1), cache.attend or scaled_dot_product_attention

    def attended(self, view):
        return self.attend(self.query, view.key, view.value, None).numpy()

    def run(self):
        with no_grad():
            for view in self.views:
                self.attended(view)

    def answer(self):
        return self.attended(self.views[0]).ravel().tolist()


def cache_mib(shape) -> str:
    sizes = shape.sizes
    head_dim = sizes["embed_dim"] // sizes["num_heads"]
    config = KVCacheConfig(sizes["num_layers"], sizes["max_seq_len"], sizes["num_heads"], head_dim, dtype=np.float32)
    return f"{config.calculate_size() / 2**20:.0f} MiB"


def gains(name, title, shape, least) -> list[Workload]:
    """With the cache against without it: single tokens at several contexts, and a whole text."""
    steps = [
        Workload(f"{name}-{n}", f"{title}: a token at context {n}",
                 {"cache": Contender(lambda folder, n=n: OurSteps(folder, shape, n)),
                  "no cache": Contender(lambda folder, n=n: WithoutCache(folder, shape, n))},
                 (Claim("cache", "no cache", "tokens/s"),), 4)
        for n in CONTEXTS]  # fmt: skip
    growth = Workload(f"{name}-growth", f"{title}: a token at context 1000, cache of {cache_mib(shape)}",
                      at_contexts(OurSteps, shape, 64, 1000),
                      (Claim("context 1000", "context 64", "ms/token", most=3),), 4, tolerance=None)  # fmt: skip
    text = Workload(f"{name}-text", f"{title}: 128 + 128 tokens",
                    {"cache": Contender(lambda folder: Text(folder, shape, True)),
                     "no cache": Contender(lambda folder: Text(folder, shape, False))},
                    (Claim("cache", "no cache", "tokens/s", least=least),), 15, long=True)  # fmt: skip
    return [*steps, growth, text]


def paged(name, title, shape, most=None) -> Workload:
    contenders = {
        "paged": Contender(lambda folder: OurSteps(folder, shape, 1000, factory=paged_kv_cache)),
        "contiguous": Contender(lambda folder: OurSteps(folder, shape, 1000)),
    }
    claim = Claim("paged", "contiguous", "ms/token", most=most)
    return Workload(name, f"{title}: a token on the paged cache, context 1000", contenders, (claim,), 12)


WORKLOADS = [
    *gains("cache-4x256", "GPT 4 x 256", SMALL, None),
    *gains("cache-6x384", "GPT 6 x 384", SIX, 6),
    Workload(
        "int8-attention", "attention of 12 layers on an int8 cache, context 1024",
        {"int8": Contender(lambda folder: Attention(QuantizedModelKVCache)),
         "int8, a scale per token": Contender(lambda folder: Attention(partial(QuantizedModelKVCache, group_size=64))),
         "float32": Contender(lambda folder: Attention(create_kv_cache))},
        (Claim("int8", "float32", "ms", most=1.0,
               title="attention of 12 layers on an int8 cache, scales for 32 numbers"),
         Claim("int8, a scale per token", "float32", "ms", most=1.0,
               title="attention of 12 layers on an int8 cache, a scale per token and head")),
        10, tolerance=0.02,
    ),
    paged("paged-small", "small GPT", SMALL),
    paged("paged-gpt2", "GPT-2 124M shape", GPT2, 1.2),
]  # fmt: skip

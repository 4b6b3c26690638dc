"""Training steps, ours beside PyTorch's: loss, check, backward, update, on a fresh batch each time.

An optimizer that sees one batch for ever runs into denormal numbers, which are slow.
"""

import os

import numpy as np
from workload import Claim, Contender, Task, Workload

from tinytorch.core.activations import ReLU
from tinytorch.core.layers import Linear, Sequential
from tinytorch.core.losses import cross_entropy
from tinytorch.core.optimizers import SGD, AdamW
from tinytorch.core.training import keep_memory, train_step
from tinytorch.models.transformer import GPT

VOCAB_SIZE, EMBED_DIM, NUM_LAYERS, NUM_HEADS, SEQ_LEN, BATCH_SIZE = 1000, 64, 2, 4, 64, 16
PIXELS, HIDDEN, CLASSES, ROWS = 784, 128, 10, 64


def text_batches(seed=0):
    """A function that draws (ids, next ids), both (B, T); as in a text, few words make up most of it."""
    rng = np.random.default_rng(seed)
    shares = 1 / np.arange(1, VOCAB_SIZE + 1)
    ends = np.cumsum(shares / shares.sum())

    def draw():
        ids = np.searchsorted(ends[:-1], rng.random((BATCH_SIZE, SEQ_LEN + 1)))
        return ids[:, :-1], ids[:, 1:]

    return draw


def image_batches(seed=0):
    """A function that draws (images (N, 784) float32, classes (N,)): a class is where a random direction points."""
    rng = np.random.default_rng(seed)
    directions = rng.standard_normal((PIXELS, CLASSES), dtype=np.float32)

    def draw():
        images = rng.standard_normal((ROWS, PIXELS), dtype=np.float32)
        return images, np.argmax(images @ directions, axis=1)

    return draw


def our_gpt():
    return GPT(VOCAB_SIZE, EMBED_DIM, NUM_LAYERS, NUM_HEADS, SEQ_LEN, rng=np.random.default_rng(0))


def our_mlp():
    rng = np.random.default_rng(0)
    return Sequential(Linear(PIXELS, HIDDEN, rng=rng), ReLU(), Linear(HIDDEN, CLASSES, rng=rng))


def their_gpt():
    """The same GPT in PyTorch, eager, with its own attention kernel and layer norm; its parts are named as ours."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(EMBED_DIM), nn.LayerNorm(EMBED_DIM)
            self.qkv_proj, self.out_proj = nn.Linear(EMBED_DIM, 3 * EMBED_DIM), nn.Linear(EMBED_DIM, EMBED_DIM)
            self.up_proj, self.down_proj = nn.Linear(EMBED_DIM, 4 * EMBED_DIM), nn.Linear(4 * EMBED_DIM, EMBED_DIM)

        def forward(self, x):
            B, T, E = x.shape
            packed = self.qkv_proj(self.norm1(x)).view(B, T, 3, NUM_HEADS, E // NUM_HEADS).permute(2, 0, 3, 1, 4)
            mixed = nn.functional.scaled_dot_product_attention(*packed, is_causal=True)
            x = x + self.out_proj(mixed.transpose(1, 2).reshape(B, T, E))
            return x + self.down_proj(nn.functional.gelu(self.up_proj(self.norm2(x)), approximate="tanh"))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.token_embedding = nn.Embedding(VOCAB_SIZE, EMBED_DIM)
            self.position_embedding = nn.Embedding(SEQ_LEN, EMBED_DIM)
            self.blocks, self.norm = nn.Sequential(*(Block() for _ in range(NUM_LAYERS))), nn.LayerNorm(EMBED_DIM)
            self.head = nn.Linear(EMBED_DIM, VOCAB_SIZE, bias=False)
            self.head.weight = self.token_embedding.weight

        def forward(self, ids):
            x = self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]
            return self.head(self.norm(self.blocks(x)))

    return with_our_weights(Model(), our_gpt()), lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3)


def their_mlp():
    import torch
    from torch import nn

    model = nn.Sequential(nn.Linear(PIXELS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))
    return with_our_weights(model, our_mlp()), lambda model: torch.optim.SGD(model.parameters(), lr=0.05)


def with_our_weights(theirs, ours):
    """PyTorch's model, which starts where ours starts; its parts have the names of ours, less attention and mlp."""
    import torch

    start = {name.replace("attention.", "").replace("mlp.", ""): p.data for name, p in ours.named_parameters()}
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(torch.from_numpy(start[name]))
    return theirs


class Steps(Task):
    """step(batch) -> loss, on batches that `draw` makes while no clock runs."""

    def __init__(self, draw, step):
        self.draw, self.step = draw, step
        self.rewind()

    def run(self):
        self.step(self.batch)

    def rewind(self):
        self.batch = self.draw()

    def answer(self):
        """The losses of the first steps: the same start, batches and rules give the same."""
        return [float(self.step(self.draw())) for _ in range(3)]


def our_steps(model, optimizer, draw) -> Steps:
    keep_memory()  # lesson 07; it holds for a whole process, so training has one of its own
    return Steps(draw, lambda batch: train_step(model, optimizer, cross_entropy, *batch))


def their_steps(model, new_optimizer, draw) -> Steps:
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    optimizer = new_optimizer(model)

    def step(batch):
        inputs, targets = map(torch.from_numpy, batch)
        logits = model(inputs)
        loss = torch.nn.functional.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return Steps(draw, step)


def our_gpt_steps(folder):
    model = our_gpt()
    return our_steps(model, AdamW(model.parameters(), lr=1e-3), text_batches())


def our_mlp_steps(folder):
    model = our_mlp()
    return our_steps(model, SGD(model.parameters(), lr=0.05), image_batches())


def beside_torch(name, title, ours, theirs, most) -> Workload:
    contenders = {"tinytorch": Contender(ours, "tinytorch training"), "PyTorch": Contender(theirs, "torch")}
    return Workload(name, title, contenders, (Claim("tinytorch", "PyTorch", "ms", most=most),), 15)


WORKLOADS = [
    beside_torch("train-gpt", "training step, GPT 2 x 64, 16 x 64 tokens, AdamW",
                 our_gpt_steps, lambda folder: their_steps(*their_gpt(), text_batches()), 1.25),
    beside_torch("train-mlp", "training step, MLP 784-128-10, batch 64, SGD",
                 our_mlp_steps, lambda folder: their_steps(*their_mlp(), image_batches()), 0.8),
]  # fmt: skip

"""Training steps to be measured: ours and PyTorch's, each made by one function.

A function builds a model and its optimizer and gives back (draw, step). `step(draw())` is one training step on a fresh
batch: an optimizer that sees one batch for ever runs into denormal numbers. Time the step alone. Run each peer in a
process of its own, with one BLAS thread: two thread pools in one process disturb each other.
"""

import numpy as np

VOCAB_SIZE, EMBED_DIM, NUM_LAYERS, NUM_HEADS, SEQ_LEN, BATCH_SIZE = 1000, 64, 2, 4, 64, 16
PIXELS, HIDDEN, CLASSES, ROWS = 784, 128, 10, 64


def text_batches(seed=0):
    """A function that draws (ids, next ids), both (B, T): as in a text, few words make up most of it."""
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


def gpt():
    """Our GPT of lesson 13 with AdamW; this process keeps freed memory (lesson 07, keep_memory)."""
    from tinytorch.core.losses import cross_entropy
    from tinytorch.core.optimizers import AdamW
    from tinytorch.core.training import keep_memory, train_step
    from tinytorch.models.transformer import GPT

    keep_memory()
    model = GPT(VOCAB_SIZE, EMBED_DIM, NUM_LAYERS, NUM_HEADS, SEQ_LEN, rng=np.random.default_rng(0))
    optimizer = AdamW(model.parameters(), lr=1e-3)
    return text_batches(), lambda batch: train_step(model, optimizer, cross_entropy, *batch)


def mlp():
    """Our 784-128-10 network with ReLU and SGD; this process keeps freed memory (lesson 07, keep_memory)."""
    from tinytorch.core.activations import ReLU
    from tinytorch.core.layers import Linear, Sequential
    from tinytorch.core.losses import cross_entropy
    from tinytorch.core.optimizers import SGD
    from tinytorch.core.training import keep_memory, train_step

    keep_memory()
    rng = np.random.default_rng(0)
    model = Sequential(Linear(PIXELS, HIDDEN, rng=rng), ReLU(), Linear(HIDDEN, CLASSES, rng=rng))
    optimizer = SGD(model.parameters(), lr=0.05)
    return image_batches(), lambda batch: train_step(model, optimizer, cross_entropy, *batch)


def torch_stepper(model, optimizer):
    """One step of a PyTorch model as ours does it: loss, check, backward, update."""
    import torch

    def step(batch):
        inputs, targets = map(torch.from_numpy, batch)
        logits = model(inputs)
        loss = torch.nn.functional.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def torch_gpt():
    """The same GPT in PyTorch, eager, with its own attention kernel and layer norm; head tied to the embedding."""
    import torch
    from torch import nn

    torch.set_num_threads(1)
    torch.manual_seed(0)

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
            self.tokens, self.places = nn.Embedding(VOCAB_SIZE, EMBED_DIM), nn.Embedding(SEQ_LEN, EMBED_DIM)
            self.blocks, self.norm = nn.Sequential(*(Block() for _ in range(NUM_LAYERS))), nn.LayerNorm(EMBED_DIM)
            self.head = nn.Linear(EMBED_DIM, VOCAB_SIZE, bias=False)
            self.head.weight = self.tokens.weight
            for parameter in self.parameters():
                if parameter.ndim == 2:
                    nn.init.normal_(parameter, std=0.02)

        def forward(self, ids):
            return self.head(self.norm(self.blocks(self.tokens(ids) + self.places.weight[: ids.shape[1]])))

    model = Model()
    return text_batches(), torch_stepper(model, torch.optim.AdamW(model.parameters(), lr=1e-3))


def torch_mlp():
    """The same 784-128-10 network in PyTorch, eager."""
    import torch
    from torch import nn

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(PIXELS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))
    return image_batches(), torch_stepper(model, torch.optim.SGD(model.parameters(), lr=0.05))


# workload: ours, PyTorch's, and the ratio of their times that we want at most
WORKLOADS = {"training step, small GPT": (gpt, torch_gpt, 1.25), "training step, MLP": (mlp, torch_mlp, 0.8)}

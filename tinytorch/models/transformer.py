"""Lesson 13: transformers. (Extracted by hand; the build overwrites this file.)"""
import math
from contextlib import contextmanager, nullcontext

import numpy as np

from tinytorch.core.activations import gelu
from tinytorch.core.attention import MultiHeadAttention
from tinytorch.core.autograd import gradient, no_grad
from tinytorch.core.embeddings import Embedding, PositionalEncoding
from tinytorch.core.layers import Dropout, Linear, Module, Parameter
from tinytorch.core.tensor import Tensor, apply, default_rng


def normalize_array(x, eps=1e-5):
    """Each last-axis row with mean 0 and variance 1, and the 1/std it was multiplied by."""
    size = x.shape[-1]
    centered = x - np.add.reduce(x, axis=-1, keepdims=True) / size
    variance = np.einsum("...e,...e->...", centered, centered)[..., None] / size
    scale = 1 / np.sqrt(variance + eps)
    centered *= scale
    return centered, scale


def layer_norm_array(x, weight, bias, eps=1e-5):
    """(..., E) -> (..., E): normalised, then stretched by weight (E,) and shifted by bias (E,)."""
    output, _ = normalize_array(x, eps)
    output *= weight
    output += bias
    return output


@gradient(layer_norm_array)
def layer_norm_rule(grad, output, x, weight, bias, eps=1e-5):
    normalized, scale = normalize_array(x, eps)
    size = x.shape[-1]
    rows = grad.reshape(-1, size)
    grad_weight = np.einsum("ne,ne->e", rows, normalized.reshape(-1, size))
    grad_bias = np.add.reduce(rows, axis=0)
    grad_x = grad * weight
    along = np.einsum("...e,...e->...", grad_x, normalized)[..., None] / size
    grad_x -= np.add.reduce(grad_x, axis=-1, keepdims=True) / size
    normalized *= along
    grad_x -= normalized
    grad_x *= scale
    return grad_x, grad_weight, grad_bias


class LayerNorm(Module):
    """Layer normalisation over the last axis."""

    def __init__(self, embed_dim, eps=1e-5):
        self.embed_dim, self.eps = embed_dim, eps
        self.weight = Parameter(np.ones(embed_dim, np.float32))
        self.bias = Parameter(np.zeros(embed_dim, np.float32))

    def forward(self, x):
        if x.shape[-1] != self.embed_dim:
            raise ValueError(f"LayerNorm({self.embed_dim}) got rows of {x.shape[-1]} numbers, shape {x.shape}")
        return apply(layer_norm_array, x, self.weight, self.bias, eps=self.eps)


class MLP(Module):
    """Two linear layers with a GELU between them, applied to every token on its own."""

    def __init__(self, embed_dim, hidden_dim=None, dropout=0.0, rng=None):
        hidden_dim = 4 * embed_dim if hidden_dim is None else hidden_dim
        self.up_proj = Linear(embed_dim, hidden_dim, rng=rng)
        self.down_proj = Linear(hidden_dim, embed_dim, rng=rng)
        self.dropout = Dropout(dropout, rng=rng)

    def forward(self, x):
        return self.dropout(self.down_proj(gelu(self.up_proj(x))))


class TransformerBlock(Module):
    """Pre-norm block: x + attention(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(self, embed_dim, num_heads, num_kv_heads=None, dropout=0.0, rng=None):
        self.norm1 = LayerNorm(embed_dim)
        self.attention = MultiHeadAttention(
            embed_dim, num_heads, num_kv_heads, causal=True, dropout=dropout, rng=rng
        )
        self.dropout = Dropout(dropout, rng=rng)
        self.norm2 = LayerNorm(embed_dim)
        self.mlp = MLP(embed_dim, dropout=dropout, rng=rng)

    def forward(self, x):
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.mlp(self.norm2(x))


def sample_next(logits, temperature=0, top_k=None, rng=None):
    """One token id per row of logits (B, V): the largest at temperature 0, else drawn from the softmax."""
    if temperature < 0:
        raise ValueError(f"temperature must be 0 (greedy) or more, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if temperature == 0:
        return np.argmax(logits, axis=-1)
    logits = logits.astype(np.float64) / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        smallest_kept = np.partition(logits, -top_k, axis=-1)[:, [-top_k]]
        logits[logits < smallest_kept] = -np.inf
    cumulative = np.cumsum(np.exp(logits - logits.max(axis=-1, keepdims=True)), axis=-1)
    rng = default_rng() if rng is None else rng
    threshold = rng.random((len(logits), 1)) * cumulative[:, -1:]
    return np.argmax(cumulative > threshold, axis=-1)


def init_gpt2(model, rng=None, std=0.02):
    """GPT-2's start: every matrix normal with std 0.02, biases 0, residual projections smaller by sqrt(2L)."""
    rng = default_rng() if rng is None else rng
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue
        residual = name.endswith(("out_proj.weight", "down_proj.weight"))
        scale = std / math.sqrt(2 * model.num_layers) if residual else std
        parameter.data[...] = rng.standard_normal(parameter.shape, dtype=np.float32) * scale
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and name.endswith("_proj.bias"):
            parameter.data[...] = 0


@contextmanager
def evaluating(model):
    """Evaluation mode without gradients inside the block; the mode comes back, also after an error."""
    was_training = model.training
    model.eval()
    try:
        with no_grad():
            yield
    finally:
        model.train(was_training)


def as_ids(ids):
    """Token ids as an integer array (B, T); a single sequence (T,) becomes a batch of one."""
    ids = ids.numpy() if isinstance(ids, Tensor) else np.asarray(ids)
    if ids.ndim not in (1, 2) or ids.size == 0 or ids.dtype.kind not in "iu":
        raise ValueError(f"token ids must be whole numbers of shape (T,) or (B, T), at least one; "
                         f"got shape {ids.shape}, {ids.dtype}")
    return ids.reshape(-1, ids.shape[-1])


class GPT(Module):
    """A decoder-only transformer: ids (B, T) -> logits (B, T, V)."""

    _kv_cache = None  # lesson 17 sets this on an instance

    def __init__(self, vocab_size, embed_dim, num_layers, num_heads, max_seq_len,
                 num_kv_heads=None, dropout=0.0, tie_weights=True, rng=None):
        self.vocab_size, self.embed_dim, self.num_layers = vocab_size, embed_dim, num_layers
        self.num_heads, self.max_seq_len = num_heads, max_seq_len
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.tie_weights = tie_weights
        self.token_embedding = Embedding(vocab_size, embed_dim, rng=rng)
        self.position_embedding = PositionalEncoding(max_seq_len, embed_dim, kind="learned", rng=rng)
        self.dropout = Dropout(dropout, rng=rng)
        self.blocks = [
            TransformerBlock(embed_dim, num_heads, num_kv_heads, dropout, rng=rng) for _ in range(num_layers)
        ]
        self.norm = LayerNorm(embed_dim)
        self.head = Linear(embed_dim, vocab_size, bias=False, rng=rng)
        if tie_weights:
            self.head.weight = self.token_embedding.weight
        init_gpt2(self, rng)

    def hidden(self, ids):
        """ids (B, T) -> (B, T, E): what the model knows at each position, before the head."""
        x = self.dropout(self.position_embedding(self.token_embedding(as_ids(ids))))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, ids, cache=None):
        """ids (B, T) or (T,) -> logits (B, T, V)."""
        if cache is not None:
            if self.training:
                raise RuntimeError("a cache= is for inference only: it records no gradients, so the model must "
                                   "be in eval mode (model.eval())")
            with cache.attached_to(self):
                return self.forward(ids)
        return self.head(self.hidden(ids))

    def generate(self, prompt, max_new_tokens, cache=None, temperature=0, top_k=None, rng=None, stop_token=None):
        """The prompt and up to `max_new_tokens` tokens after it; list in, list out; array in, array out."""
        ids = as_ids(prompt)
        if max_new_tokens < 0 or ids.shape[1] + max_new_tokens > self.max_seq_len:
            raise ValueError(f"a prompt of {ids.shape[1]} tokens and max_new_tokens={max_new_tokens} do not fit "
                             f"max_seq_len={self.max_seq_len}")
        enabled = self._kv_cache
        cache = enabled if cache is None else cache
        attach = nullcontext() if cache is enabled else cache.attached_to(self)
        with evaluating(self), attach:
            ids = continue_ids(self, ids, max_new_tokens, cache, temperature, top_k, rng, stop_token)
        ids = ids if np.ndim(prompt) == 2 else ids[0]
        if isinstance(prompt, Tensor):
            return Tensor(ids)
        return ids if isinstance(prompt, np.ndarray) else ids.tolist()


def continue_ids(model, ids, max_new_tokens, cache, temperature, top_k, rng, stop_token):
    """The loop of `generate`: run what is new, sample from the last position, append."""
    if cache is not None and cache.seq_pos:
        cache.reset()
    stopped = np.zeros(len(ids), bool)
    for _ in range(max_new_tokens):
        start = 0 if cache is None else cache.seq_pos
        last = model.hidden(ids[:, start:])[:, -1]
        token = sample_next(model.head(last).numpy(), temperature, top_k, rng)
        if stop_token is not None:
            token = np.where(stopped, ids[:, -1], token)
            stopped |= np.isin(token, stop_token)
        ids = np.concatenate([ids, token[:, None].astype(ids.dtype)], axis=1)
        if stopped.all():
            break
    return ids

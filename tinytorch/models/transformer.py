"""Transformers: a GPT that trains on text and generates it token by token.

Lesson 13_transformers. Built from src/13_transformers/13_transformers.py by `tito dev build`: change it there, not here.
"""

__all__ = [
    "normalize_array",
    "layer_norm_array",
    "layer_norm_rule",
    "LayerNorm",
    "MLP",
    "TransformerBlock",
    "initial_std",
    "init_weights",
    "token_rows",
    "GPT",
    "next_probabilities",
    "check_sampling",
    "sample_next",
    "continue_ids",
    "rows_of_different_length",
    "continue_rows",
    "check_prompt",
    "check_capacity",
    "like_prompt",
    "evaluating",
]


# %% cell 2
import math
from contextlib import contextmanager, nullcontext

import numpy as np

from tinytorch.core.activations import gelu, sum_along
from tinytorch.core.attention import MultiHeadAttention
from tinytorch.core.autograd import gradient, no_grad
from tinytorch.core.embeddings import Embedding, PositionalEncoding
from tinytorch.core.layers import Dropout, Linear, Module, Parameter
from tinytorch.core.tensor import Tensor, apply, default_rng


# %% cell 10 (13-normalize)
def normalize_array(x, eps=1e-5):
    """Each row with mean 0 and variance 1, and the factor that made it so: (..., E) -> (..., E), (..., 1).

    The variance is the mean of the squares (divided by E, as in PyTorch's LayerNorm).

    >>> normalize_array(np.array([1.0, 1.0, 3.0, 3.0]), eps=0)
    (array([-1., -1.,  1.,  1.]), array([1.]))
    """
    size = x.shape[-1]
    centered = x - sum_along(x, -1) / size
    variance = np.vecdot(centered, centered)[..., None] / size
    factor = 1 / np.sqrt(variance + eps)
    centered *= factor
    return centered, factor


# %% cell 12
def layer_norm_array(x, weight, bias, eps=1e-5):
    """Normalised rows, stretched by weight (E,) and shifted by bias (E,): (..., E) -> (..., E).

    Source: Ba, Kiros, Hinton 2016, "Layer Normalization".
    """
    output, _ = normalize_array(x, eps)
    output *= weight
    output += bias
    return output


# %% cell 14 (13-layer-norm-rule)
@gradient(layer_norm_array)
def layer_norm_rule(grad, output, x, weight, bias, eps=1e-5):
    """Gradients of x (..., E), weight (E,) and bias (E,)."""
    n, factor = normalize_array(x, eps)
    size = x.shape[-1]
    h = grad * weight
    grad_weight = np.einsum("re,re->e", grad.reshape(-1, size), n.reshape(-1, size))  # r: all rows
    grad_bias = np.ones(grad.size // size, grad.dtype) @ grad.reshape(-1, size)
    along_n = np.vecdot(h, n)[..., None] / size
    h -= sum_along(h, -1) / size
    n *= along_n
    h -= n
    h *= factor
    return h, grad_weight, grad_bias


# %% cell 16
class LayerNorm(Module):
    """Layer norm over the last axis, (..., E) -> (..., E); starts as the plain normalisation."""

    def __init__(self, embed_dim, eps=1e-5):
        self.embed_dim, self.eps = embed_dim, eps
        self.weight = Parameter(np.ones(embed_dim, np.float32))
        self.bias = Parameter(np.zeros(embed_dim, np.float32))

    def forward(self, x):
        if x.shape[-1] != self.embed_dim:
            raise ValueError(f"LayerNorm({self.embed_dim}) needs x of shape (..., {self.embed_dim}), got {x.shape}")
        return apply(layer_norm_array, x, self.weight, self.bias, eps=self.eps)


# %% cell 20 (13-mlp)
class MLP(Module):
    """Two linear layers with a GELU between them, on each token on its own: (..., E) -> (..., E)."""

    def __init__(self, embed_dim, hidden_dim=None, dropout=0.0, rng=None):
        hidden_dim = 4 * embed_dim if hidden_dim is None else hidden_dim
        self.up_proj = Linear(embed_dim, hidden_dim, rng=rng)
        self.down_proj = Linear(hidden_dim, embed_dim, rng=rng)
        self.dropout = Dropout(dropout, rng=rng)

    def forward(self, x):
        """Up, GELU, down; dropout at the very end."""
        return self.dropout(self.down_proj(gelu(self.up_proj(x))))


# %% cell 23 (13-block)
class TransformerBlock(Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x)): (B, T, E) -> (B, T, E), causal."""

    def __init__(self, embed_dim, num_heads, num_kv_heads=None, dropout=0.0, rng=None):
        self.norm1 = LayerNorm(embed_dim)
        self.attention = MultiHeadAttention(
            embed_dim, num_heads, num_kv_heads, causal=True, dropout=dropout, rng=rng
        )
        self.dropout = Dropout(dropout, rng=rng)
        self.norm2 = LayerNorm(embed_dim)
        self.mlp = MLP(embed_dim, dropout=dropout, rng=rng)

    def forward(self, x):
        """The two branches; `dropout` acts on what attention found (the MLP has its own)."""
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.mlp(self.norm2(x))


# %% cell 26 (13-init)
def initial_std(name, num_layers):
    """The standard deviation with which the weight called `name` starts.

    Source: Radford et al. 2019 (GPT-2), section 2.3.

    >>> initial_std("blocks.0.mlp.up_proj.weight", 8), initial_std("blocks.0.mlp.down_proj.weight", 8)
    (0.02, 0.005)
    """
    residual = name.endswith(("out_proj.weight", "down_proj.weight"))
    return 0.02 / math.sqrt(2 * num_layers) if residual else 0.02


def init_weights(model, rng=None):
    """GPT-2's start for every parameter of `model`, in place; norms keep weight 1 and bias 0."""
    rng = default_rng() if rng is None else rng
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data[...] = 0
        elif parameter.ndim == 2:
            normal = rng.standard_normal(parameter.shape, dtype=np.float32)
            parameter.data[...] = normal * initial_std(name, model.num_layers)


# %% cell 32
def token_rows(ids):
    """Token ids as an integer array (B, T); one sequence (T,) becomes a batch of one."""
    try:
        ids = np.asarray(ids)
    except ValueError:
        raise ValueError("token ids: the rows have different lengths; give all of them one length") from None
    if ids.ndim not in (1, 2) or ids.size == 0 or ids.dtype.kind not in "iu":
        raise ValueError(
            f"token ids are whole numbers of shape (T,) or (B, T), at least one; got {ids.dtype} of shape {ids.shape}"
        )
    return ids.reshape(-1, ids.shape[-1])


# %% cell 33 (13-hidden)
class GPT(Module):
    """A decoder-only transformer in GPT-2's shape: ids (B, T) or (T,) -> logits (B, T, V).

    tie_weights: the head's weight is the embedding table itself. num_kv_heads: as in MultiHeadAttention.
    """

    _kv_cache = None  # lesson 17 sets this on a model that keeps a cache

    def __init__(self, vocab_size, embed_dim, num_layers, num_heads, max_seq_len,
                 num_kv_heads=None, dropout=0.0, tie_weights=True, rng=None):
        self.vocab_size, self.embed_dim, self.num_layers = vocab_size, embed_dim, num_layers
        self.num_heads, self.max_seq_len, self.tie_weights = num_heads, max_seq_len, tie_weights
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.token_embedding = Embedding(vocab_size, embed_dim, rng=rng)
        self.position_embedding = PositionalEncoding(max_seq_len, embed_dim, kind="learned", rng=rng)
        self.dropout = Dropout(dropout, rng=rng)
        self.blocks = [TransformerBlock(embed_dim, num_heads, num_kv_heads, dropout, rng) for _ in range(num_layers)]
        self.norm = LayerNorm(embed_dim)
        self.head = Linear(embed_dim, vocab_size, bias=False, rng=rng)
        if tie_weights:
            self.head.weight = self.token_embedding.weight
        init_weights(self, rng)

    def hidden(self, ids):
        """Embeddings, dropout, blocks, norm: ids (B, T) -> (B, T, E)."""
        ids = token_rows(ids)
        x = self.dropout(self.position_embedding(self.token_embedding(ids)))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, ids, cache=None):
        """Logits (B, T, V). With a cache (evaluation mode only), ids are the tokens that follow what it holds."""
        if cache is None:
            return self.head(self.hidden(ids))
        if self.training:
            raise RuntimeError("a cache keeps no gradients, so it is for evaluation mode: call model.eval() first")
        with cache.attached_to(self):
            return self.head(self.hidden(ids))

    def generate(self, prompt, max_new_tokens, cache=None, temperature=0, top_k=None, rng=None, stop_token=None,
                 on_token=None):
        """The prompt and up to max_new_tokens tokens more; list in, list out; array in, array out.

        Greedy at temperature 0; else drawn from the softmax of logits / temperature, over the top_k best if given. A
        row ends at its stop_token (an id, or several) and is filled up with it until every row has ended. Prompts
        of different length, a list of lists, give a list of lists: each ends where it ended alone. A cache,
        given or enabled, is reset if it holds tokens, and only what it lacks is run. ValueError if the prompt and
        max_new_tokens together exceed max_seq_len. Runs in evaluation mode without gradients; the mode comes back.
        on_token, where given, is called with each round's ids (B,), so that a caller can show them as they come.
        """
        rows = rows_of_different_length(prompt)
        ids = check_prompt(rows[-1] if rows else prompt, max_new_tokens, self.max_seq_len)  # the longest comes last
        check_sampling(temperature, top_k)
        given = cache is not None and cache is not self._kv_cache
        cache = cache if given else self._kv_cache
        check_capacity(cache, ids.shape[1], max_new_tokens)
        sampling = (temperature, top_k, rng, stop_token, on_token)
        with evaluating(self), cache.attached_to(self) if given else nullcontext():
            if rows:
                return continue_rows(self, prompt, max_new_tokens, cache, *sampling)
            return like_prompt(continue_ids(self, ids, max_new_tokens, cache, *sampling), prompt)


# %% cell 45 (13-probabilities)
def next_probabilities(logits, temperature=1.0, top_k=None):
    """The probability of each next token: logits (B, V) -> (B, V), float64; with top_k only the k best (and ties).

    >>> next_probabilities(np.log([[1.0, 2.0, 5.0]]), top_k=2).round(3)
    array([[0.   , 0.286, 0.714]])
    """
    logits = logits.astype(np.float64)
    logits = (logits - logits.max(axis=-1, keepdims=True)) / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        smallest_kept = np.partition(logits, -top_k, axis=-1)[:, [-top_k]]
        logits = np.where(logits < smallest_kept, -np.inf, logits)
    exponentials = np.exp(logits)
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


# %% cell 48
def check_sampling(temperature, top_k):
    """Raise a ValueError that says which of the two makes no sense."""
    if not temperature >= 0:  # NaN is not, either
        raise ValueError(f"temperature is 0 (greedy) or positive, got {temperature}")
    if top_k is not None and (not isinstance(top_k, (int, np.integer)) or top_k < 1):
        raise ValueError(f"top_k is a whole number, 1 or more, or None for all tokens; got {top_k!r}")


def sample_next(logits, temperature=0, top_k=None, rng=None):
    """One token id per row of logits (B, V) -> (B,): the largest at temperature 0, else drawn with `rng`."""
    check_sampling(temperature, top_k)
    if temperature == 0:
        return np.argmax(logits, axis=-1)
    rng = default_rng() if rng is None else rng
    ends = np.cumsum(next_probabilities(logits, temperature, top_k), axis=-1)
    return np.argmax(ends > rng.random((len(ends), 1)) * ends[:, -1:], axis=-1)


# %% cell 51 (13-generate)
def continue_ids(model, ids, max_new_tokens, cache=None, temperature=0, top_k=None, rng=None, stop_token=None,
                 on_token=None):
    """The loop of `generate`, on model.hidden and model.head: ids (B, P) -> (B, P + n), n <= max_new_tokens."""
    if cache is not None and max_new_tokens and cache.seq_pos:
        cache.reset()  # it still holds another text
    stopped = np.zeros(len(ids), bool)
    for _ in range(max_new_tokens):
        start = 0 if cache is None else cache.seq_pos
        last = model.hidden(ids[:, start:])[:, -1]  # (B, E)
        token = sample_next(model.head(last).numpy(), temperature, top_k, rng)
        if stop_token is not None:
            token = np.where(stopped, ids[:, -1], token)
            stopped |= np.isin(token, stop_token)
        ids = np.concatenate([ids, token[:, None].astype(ids.dtype)], axis=1)
        if on_token is not None:
            on_token(ids[:, -1])
        if stopped.all():
            break
    return ids


# %% cell 55
def rows_of_different_length(prompt):
    """The rows of a ragged list of prompts, shortest first; None for any other prompt."""
    if not isinstance(prompt, (list, tuple)) or not all(isinstance(row, (list, tuple, np.ndarray)) for row in prompt):
        return None
    rows = sorted(prompt, key=len)
    if not rows or len(rows[0]) == len(rows[-1]):
        return None
    for row in rows:
        if token_rows(row).shape != (1, len(row)):
            raise ValueError(f"a prompt is a list of token ids, got one of shape {np.shape(row)}")
    return rows


def continue_rows(model, prompts, max_new_tokens, cache=None, temperature=0, top_k=None, rng=None, stop_token=None,
                  on_token=None):
    """`continue_ids` for prompts of different length: a list of lists, each prompt with its own new tokens.

    A cache counts the tokens of each row in `seq_lens`, and takes a chunk that is padded on the right.
    """
    if cache is not None and len(cache.seq_lens) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts need a cache with as many rows, this one has {len(cache.seq_lens)}")
    if cache is not None and max_new_tokens and cache.seq_pos:
        cache.reset()
    texts, ended = [list(map(int, prompt)) for prompt in prompts], [False] * len(prompts)
    every = np.arange(len(prompts))
    ids = np.zeros((len(prompts), max(map(len, texts)) + max_new_tokens), np.int64)
    lengths = np.array([len(text) for text in texts])
    for row, text in enumerate(texts):
        ids[row, : len(text)] = text
    for _ in range(max_new_tokens):
        held = np.zeros_like(lengths) if cache is None else np.array(cache.seq_lens)
        n_new = lengths - held
        chunk = np.minimum(held[:, None] + np.arange(n_new.max()), ids.shape[1] - 1)  # where each row goes on
        with nullcontext() if cache is None else cache.attached_to(model, n_new=n_new):
            last = model.hidden(ids[every[:, None], chunk])[every, n_new - 1]  # (B, E)
        token = sample_next(model.head(last).numpy(), temperature, top_k, rng)
        ids[every, lengths] = token
        lengths = lengths + 1
        for row, text in enumerate(texts):
            if not ended[row]:
                text.append(int(token[row]))
                ended[row] = stop_token is not None and bool(np.isin(token[row], stop_token))
        if on_token is not None:
            on_token(token)
        if all(ended):
            break
    return texts


# %% cell 56
def check_prompt(prompt, max_new_tokens, max_seq_len):
    """The prompt as a new array (B, P), or a ValueError that says what does not fit."""
    ids = token_rows(prompt)
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, (int, np.integer)) or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is a whole number, 0 or more, got {max_new_tokens!r}")
    if ids.shape[1] + max_new_tokens > max_seq_len:
        raise ValueError(
            f"a prompt of {ids.shape[1]} tokens and max_new_tokens={max_new_tokens} make "
            f"{ids.shape[1] + max_new_tokens}, more than max_seq_len={max_seq_len}"
        )
    return ids.astype(np.int64 if ids.itemsize < 4 else ids.dtype)  # 8 or 16 bits may not hold what comes


def check_capacity(cache, prompt_len, max_new_tokens):
    """ValueError where a cache names a `capacity` that is too small; the last new token is never run."""
    capacity, needed = getattr(cache, "capacity", None), prompt_len + max_new_tokens - 1
    if max_new_tokens and capacity is not None and needed > capacity:
        raise ValueError(f"a prompt of {prompt_len} tokens and max_new_tokens={max_new_tokens} run {needed} tokens, "
                         f"and one row of the cache has room for {capacity}")


def like_prompt(ids, prompt):
    """The ids (B, T) in the form of the prompt: its number of axes; a list for a list, an array for an array."""
    ids = ids if np.ndim(prompt) == 2 else ids[0]
    if isinstance(prompt, Tensor):
        return Tensor(ids)
    return ids if isinstance(prompt, np.ndarray) else ids.tolist()


# %% cell 57
@contextmanager
def evaluating(model):
    """Evaluation mode without gradients for the length of a block; each module's own mode comes back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode

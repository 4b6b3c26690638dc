"""Modern transformers: Llama: RMSNorm, rotary positions, SwiGLU and shared key heads.

Lesson 21_modern_transformers. Built from src/21_modern_transformers/21_modern_transformers.py by `tito dev build`: change it there, not here.
"""

__all__ = [
    "rms_factor",
    "rms_norm_array",
    "rms_norm_rule",
    "RMSNorm",
    "rotary_frequencies",
    "rotary_table",
    "rotate_array",
    "rotate_rule",
    "RotaryEmbedding",
    "scaled_frequencies",
    "smooth_step",
    "swiglu_array",
    "swiglu_rule",
    "SwiGLU",
    "repeat_heads",
    "LlamaAttention",
    "StreamingAttention",
    "LlamaBlock",
    "Llama",
]


# %% cell 3
import math

import numpy as np

from tinytorch.core.attention import MultiHeadAttention, head_sizes, visible_mask
from tinytorch.core.autograd import gradient
from tinytorch.core.embeddings import Embedding, choose_positions
from tinytorch.core.layers import Dropout, Linear, Module, Parameter
from tinytorch.core.tensor import Tensor, apply
from tinytorch.models.transformer import GPT, TransformerBlock, init_weights


# %% cell 12 (21-rms-factor)
def rms_factor(x, eps=1e-6):
    """1 / sqrt(mean square + eps) of each row: (..., E) -> (..., 1).

    >>> rms_factor(np.array([[2.0, 4.0, 4.0, 8.0]]), eps=0)
    array([[0.2]])
    """
    mean_square = np.vecdot(x, x)[..., None] / x.shape[-1]
    return 1 / np.sqrt(mean_square + eps)


# %% cell 14
def rms_norm_array(x, weight, eps=1e-6):
    """Each row divided by its root mean square, stretched by weight (E,): (..., E) -> (..., E).

    Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", equation 4.
    """
    output = x * rms_factor(x, eps)
    output *= weight
    return output


# %% cell 16 (21-rms-norm-rule)
@gradient(rms_norm_array)
def rms_norm_rule(grad, output, x, weight, eps=1e-6):
    """Gradients of x (..., E) and weight (E,)."""
    factor, size = rms_factor(x, eps), x.shape[-1]
    n = x * factor
    h = grad * weight
    grad_weight = np.einsum("re,re->e", grad.reshape(-1, size), n.reshape(-1, size))  # r: all rows
    n *= np.vecdot(h, n)[..., None] / size
    h -= n
    h *= factor
    return h, grad_weight


# %% cell 18
class RMSNorm(Module):
    """Divide each row by its root mean square, (..., E) -> (..., E). PyTorch: torch.nn.RMSNorm."""

    def __init__(self, embed_dim, eps=1e-6):
        self.embed_dim, self.eps = embed_dim, eps
        self.weight = Parameter(np.ones(embed_dim, np.float32))

    def forward(self, x):
        if x.shape[-1] != self.embed_dim:
            raise ValueError(f"RMSNorm({self.embed_dim}) needs x of shape (..., {self.embed_dim}), got {x.shape}")
        return apply(rms_norm_array, x, self.weight, eps=self.eps)

    def extra_repr(self):
        return f"{self.embed_dim}, eps={self.eps}"


# %% cell 29 (21-frequencies)
def rotary_frequencies(head_dim, theta=10000.0):
    """The angle per position of each pair of a head, in radians: (D/2,), float64.

    Source: Su et al. 2021, "RoFormer", equation 15.

    >>> rotary_frequencies(4).tolist()
    [1.0, 0.01]
    """
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"rotary embedding turns pairs of numbers: head_dim must be even, got {head_dim}")
    pairs = np.arange(head_dim // 2)
    return theta ** (-2 * pairs / head_dim)


# %% cell 33
def rotary_table(positions, frequencies):
    """cos and sin for each number of a head: positions (T,), frequencies (D/2,) -> (T, 2, D), float32.

    The first half of sin is negative. Angles are computed in float64 and only their cos and sin are rounded.

    >>> rotary_table([1], np.array([np.pi / 2])).round(3).tolist()
    [[[0.0, 0.0], [-1.0, 1.0]]]
    """
    angle = np.multiply.outer(np.asarray(positions, np.float64), frequencies)  # (T, D/2)
    cos, sin = np.cos(angle), np.sin(angle)
    table = [np.concatenate([cos, cos], axis=-1), np.concatenate([-sin, sin], axis=-1)]
    return np.stack(table, axis=-2).astype(np.float32)


# %% cell 35 (21-rotate)
def rotate_array(x, cos, sin):
    """Each pair (i, i + D/2) of x (B, H, T, D) turned; cos and sin, (T, D) or (B, 1, T, D), as in rotary_table.

    >>> rotate_array(np.array([1.0, 2.0, 3.0, 4.0]), np.array([0, 1, 0, 1]), np.array([-1, 0, 1, 0])).tolist()
    [-3.0, 2.0, 1.0, 4.0]
    """
    half = x.shape[-1] // 2
    turned = np.concatenate([x[..., half:], x[..., :half]], axis=-1)  # the partner of each number
    turned *= sin
    turned += x * cos
    return turned


@gradient(rotate_array)
def rotate_rule(grad, output, x, cos, sin):
    """The gradient of x (B, H, T, D), alone in a tuple."""
    return (rotate_array(grad, cos, -sin),)


# %% cell 39
class RotaryEmbedding(Module):
    """Positions as angles: `forward` lets x pass and checks its positions; `rotate` turns queries and keys.

    scaling: None, or the four numbers of `scaled_frequencies`, by name.
    """

    def __init__(self, head_dim, max_seq_len, theta=10000.0, scaling=None):
        self.head_dim, self.max_seq_len, self.theta, self.scaling = head_dim, max_seq_len, theta, scaling
        self.frequencies = rotary_frequencies(head_dim, theta)
        if scaling is not None:
            self.frequencies = scaled_frequencies(self.frequencies, **scaling)
        self.table = rotary_table([], self.frequencies)  # (S, 2, D), grows to what is asked for

    def forward(self, x, positions=None):
        """x (B, T, E) as it came; ValueError where a position, (T,) or (B, T), does not fit into max_seq_len."""
        choose_positions(positions, x.shape[-2], self.max_seq_len)
        return x

    def rotate(self, x, positions=None):
        """x (B, H, T, D) turned by its positions, (T,) or (B, T), default 0 .. T-1. Padding may stand at -1."""
        rows = self.rows(np.arange(x.shape[2]) if positions is None else np.asarray(positions))
        return apply(rotate_array, x, cos=rows[..., 0, :], sin=rows[..., 1, :])

    def rows(self, positions):
        """Rows of the table: (T,) -> (T, 2, D), (B, T) -> (B, 1, T, 2, D), one for all heads."""
        table, needed = self.table, max(int(np.maximum.reduce(positions, axis=None)) + 1, 1)  # padding reads a row, too
        if needed > len(table):
            size = max(needed, min(self.max_seq_len, max(4096, 2 * needed)))
            self.table = table = rotary_table(np.arange(size), self.frequencies)
        rows = table[positions]
        return rows if positions.ndim == 1 else rows[:, None]

    def extra_repr(self):
        return f"{self.head_dim}, {self.max_seq_len}, theta={self.theta}"


# %% cell 47 (21-scaled)
def scaled_frequencies(frequencies, factor, low_freq_factor, high_freq_factor, original_max_position_embeddings):
    """Llama 3.1's frequencies (D/2,): slow pairs `factor` times slower, fast ones as they were, a ramp between.

    The names are those of Hugging Face's `rope_scaling`.
    """
    low, high = low_freq_factor, high_freq_factor
    if not (factor > 0 and 0 < low < high and original_max_position_embeddings > 0):
        raise ValueError("rope scaling needs factor > 0, 0 < low_freq_factor < high_freq_factor and a context > 0; "
                         f"got {factor}, {low}, {high}, {original_max_position_embeddings}")
    turns = original_max_position_embeddings * frequencies / (2 * np.pi)
    share = np.clip((turns - low) / (high - low), 0, 1)
    return frequencies * (share + (1 - share) / factor)


# %% cell 55 (21-swiglu)
def smooth_step(x):
    """The sigmoid of x, any shape, by way of tanh: 1 / (1 + exp(-x)) = (1 + tanh(x / 2)) / 2."""
    step = x * 0.5
    np.tanh(step, out=step)
    step += 1
    step *= 0.5
    return step


def swiglu_array(gate, up):
    """silu(gate) * up, number by number: twice (..., F) -> (..., F).

    Source: Shazeer 2020, "GLU Variants Improve Transformer", equation 6.

    >>> swiglu_array(np.array([-1e4, 0.0, 20.0]), np.array([3.0, 3.0, 3.0])).round(4).tolist()
    [-0.0, 0.0, 60.0]
    """
    output = smooth_step(gate)
    output *= gate
    output *= up
    return output


@gradient(swiglu_array)
def swiglu_rule(grad, output, gate, up):
    """Gradients of gate and up, both (..., F)."""
    s = smooth_step(gate)
    active = gate * s
    slope = s + active * (1 - s)
    slope *= up
    slope *= grad
    active *= grad
    return slope, active


# %% cell 57
class SwiGLU(Module):
    """down(silu(gate(x)) * up(x)), each token on its own: (..., E) -> (..., E). No biases.

    hidden_dim: default 8 * E / 3, which has the parameters of an MLP that is 4 times wider.
    """

    def __init__(self, embed_dim, hidden_dim=None, rng=None):
        hidden_dim = 8 * embed_dim // 3 if hidden_dim is None else hidden_dim
        self.gate_proj = Linear(embed_dim, hidden_dim, bias=False, rng=rng)
        self.up_proj = Linear(embed_dim, hidden_dim, bias=False, rng=rng)
        self.down_proj = Linear(hidden_dim, embed_dim, bias=False, rng=rng)

    def forward(self, x):
        return self.down_proj(apply(swiglu_array, self.gate_proj(x), self.up_proj(x)))


# %% cell 64 (21-repeat-heads)
def repeat_heads(x, num_heads):
    """A copy of the right key head for every query head: (B, H_kv, S, D) -> (B, H, S, D).

    >>> repeat_heads(np.array([10, 20]).reshape(1, 2, 1, 1), 6).ravel().tolist()
    [10, 10, 10, 20, 20, 20]
    """
    return np.repeat(x, num_heads // x.shape[1], axis=1)


# %% cell 71 (21-project)
class LlamaAttention(MultiHeadAttention):
    """Causal attention with rotary positions and shared key heads: x (B, T, E) -> (B, T, E).

    rotary_embedding: the RotaryEmbedding of the model, which also says how large a head is. bias: on queries, keys and
    values; out_bias: behind the heads. window: a token sees itself and the window - 1 before it; None: all of them.
    """

    rotary = True  # a cache tells `project` where the tokens stand

    def __init__(self, embed_dim, num_heads, rotary_embedding, num_kv_heads=None, bias=False, out_bias=False,
                 window=None, rng=None):
        if window is not None and window < 1:
            raise ValueError(f"a token sees at least itself: window is 1 or more, or None for all; got {window}")
        self.embed_dim, self.num_heads, self.causal = embed_dim, num_heads, True
        self.num_kv_heads, self.head_dim = head_sizes(num_heads * rotary_embedding.head_dim, num_heads, num_kv_heads)
        packed_heads = num_heads + 2 * self.num_kv_heads
        self.qkv_proj = Linear(embed_dim, packed_heads * self.head_dim, bias=bias, rng=rng)
        self.out_proj = Linear(num_heads * self.head_dim, embed_dim, bias=out_bias, rng=rng)
        self.rotary_embedding, self.window, self.dropout = rotary_embedding, window, Dropout(0.0)

    def project(self, x, positions=None):
        """Query (B, H, T, D) and key (B, H_kv, T, D), turned by positions, (T,) or (B, T); and value, as it is.

        Positions default to 0 .. T-1; `self.rotary_embedding.rotate(heads, positions)` turns.
        """
        query, key, value = super().project(x)
        turn = self.rotary_embedding.rotate
        return turn(query, positions), turn(key, positions), value

    def visible(self, seq_len, mask=None):
        """As in MultiHeadAttention, and through the window."""
        if self.window is not None and self.window < seq_len:
            near = visible_mask(np.arange(seq_len), np.arange(seq_len), self.window)
            mask = near if mask is None else near & mask
        return super().visible(seq_len, mask)


# %% cell 75
class StreamingAttention(LlamaAttention):
    """LlamaAttention that hands a cache its keys before they are turned: whoever reads them turns them, where they stand.

    Without a cache nothing changes. Source: Xiao et al. 2023 (arXiv 2309.17453), section 3.2.
    """

    def project(self, x, positions=None):
        """As in LlamaAttention; where a cache tells the positions, the key is as it is."""
        if positions is None:
            return super().project(x)
        query, key, value = MultiHeadAttention.project(self, x)
        return self.rotary_embedding.rotate(query, positions), key, value


class LlamaBlock(TransformerBlock):
    """x + attention(norm1(x)), then x + mlp(norm2(x)), with the parts of this lesson: (B, T, E) -> (B, T, E)."""

    def __init__(self, attention, hidden_dim, norm_eps=1e-6, rng=None):
        embed_dim = attention.embed_dim
        self.norm1, self.attention = RMSNorm(embed_dim, norm_eps), attention
        self.norm2, self.mlp = RMSNorm(embed_dim, norm_eps), SwiGLU(embed_dim, hidden_dim, rng=rng)
        self.dropout = Dropout(0.0)


class Llama(GPT):
    """A decoder-only transformer in the shape of Llama and Qwen2: ids (B, T) or (T,) -> logits (B, T, V).

    head_dim: default embed_dim / num_heads. hidden_dim: as in SwiGLU. rope_theta, rope_scaling: as in RotaryEmbedding.
    attention_bias: on queries, keys and values (Qwen2); out_bias: behind the heads. tie_weights: as in GPT.
    window: as in LlamaAttention (Mistral); lesson 22's window then keeps all that is looked at.
    keys_before_rotation: the same logits, by StreamingAttention, for a cache that turns keys when it is read (lesson 22).
    Sources: Touvron et al. 2023 (arXiv 2302.13971), section 2.2; Yang et al. 2024 (arXiv 2407.10671), section 2.2.

    >>> model = Llama(100, 32, num_layers=2, num_heads=4, max_seq_len=64, num_kv_heads=2)
    >>> model([[1, 2, 3]]).shape
    (1, 3, 100)
    """

    def __init__(self, vocab_size, embed_dim, num_layers, num_heads, max_seq_len, num_kv_heads=None, head_dim=None,
                 hidden_dim=None, rope_theta=10000.0, rope_scaling=None, norm_eps=1e-6, attention_bias=False,
                 out_bias=False, tie_weights=False, keys_before_rotation=False, window=None, rng=None):
        self.vocab_size, self.embed_dim, self.num_layers = vocab_size, embed_dim, num_layers
        self.num_heads, self.max_seq_len, self.tie_weights = num_heads, max_seq_len, tie_weights
        width = embed_dim if head_dim is None else num_heads * head_dim
        self.num_kv_heads, self.head_dim = head_sizes(width, num_heads, num_kv_heads)
        self.token_embedding = Embedding(vocab_size, embed_dim, rng=rng)
        self.position_embedding = RotaryEmbedding(self.head_dim, max_seq_len, rope_theta, rope_scaling)
        self.dropout, self.keys_before_rotation, self.window = Dropout(0.0), keys_before_rotation, window
        attention = StreamingAttention if keys_before_rotation else LlamaAttention
        heads = num_heads, self.position_embedding, self.num_kv_heads, attention_bias, out_bias, window, rng
        self.blocks = [LlamaBlock(attention(embed_dim, *heads), hidden_dim, norm_eps, rng)
                       for _ in range(num_layers)]
        self.norm = RMSNorm(embed_dim, norm_eps)
        self.head = Linear(embed_dim, vocab_size, bias=False, rng=rng)
        if tie_weights:
            self.head.weight = self.token_embedding.weight
        init_weights(self, rng)

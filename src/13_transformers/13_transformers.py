# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   tinytorch:
#     lesson: "13"
# ---

# %% [markdown]
"""
# Lesson 13: Transformers

**We build** a GPT: layer norm, MLP, block, model, and `generate`, which writes text token by token.

**It needs** Tensor (01), GELU (02), Linear and Dropout (03), losses (04), gradients (05), embeddings (11)
and attention (12). The training run at the end borrows AdamW from lesson 06.

**It becomes** `tinytorch/models/transformer.py`. Lesson 14 measures this model, lesson 17 gives it a
memory.

**Time:** about 90 minutes.

    ids (B, T) -> token + position embedding -> block -> block -> ... -> norm -> head -> logits (B, T, V)
                                                  |
                  block:  x = x + attention(norm1(x));  x = x + mlp(norm2(x))
"""

# %%
#| default_exp models.transformer
#| export
import math
from contextlib import contextmanager, nullcontext

import numpy as np

from tinytorch.core.activations import gelu, sum_along
from tinytorch.core.attention import MultiHeadAttention
from tinytorch.core.autograd import gradient, no_grad
from tinytorch.core.embeddings import Embedding, PositionalEncoding
from tinytorch.core.layers import Dropout, Linear, Module, Parameter
from tinytorch.core.tensor import Tensor, apply, default_rng

# %%
import codecs
import io
import time
from contextlib import redirect_stdout

from tinytorch.core.autograd import check_gradients
from tinytorch.core.losses import cross_entropy
from tinytorch.core.optimizers import AdamW

# %% [markdown]
"""
## 1. Why does a deep stack need a norm?

A deep model adds the output of every layer to what came in: `x = x + layer(x)`. Each layer sees what all
layers before it have added up. Run 24 random layers and look at the size of x.
"""

# %% nbgrader={"grade": false, "grade_id": "13-measure-depth", "locked": true, "schema_version": 3, "solution": false, "task": false}
def size_at_depth(normalized, depth=24, width=64):
    """The standard deviation of x after 6, 12, 18 and 24 layers x = x + layer(x)."""
    rng = np.random.default_rng(0)
    x, sizes = rng.standard_normal((8, width)), []
    for layer in range(1, depth + 1):
        seen = x / x.std(axis=-1, keepdims=True) if normalized else x
        x = x + seen @ rng.standard_normal((width, width)) / math.sqrt(width)
        sizes += [float(x.std())] if layer % 6 == 0 else []
    return sizes


if __name__ == "__main__":
    print("without a norm:", [f"{size:.1f}" for size in size_at_depth(False)])
    print("each layer sees a normalised x:", [f"{size:.1f}" for size in size_at_depth(True)])

# %% [markdown]
"""
Without a norm every layer multiplies; with one, every layer adds. A **layer norm** gives each token, on its
own, mean 0 and variance 1 over its E numbers, then stretches and shifts them by learned `weight` and
`bias`:

    n = (x - mean) / sqrt(variance + eps)         y = n * weight + bias

By hand, E = 4:

    x          [1, 1, 3, 3]
    mean       2             variance  1 (the mean of the four squared distances)
    n          [-1, -1, 1, 1]

**Predict** n for [10, 10, 50, 50] (eps is negligible).
"""

# %% nbgrader={"grade": false, "grade_id": "13-predict-norm", "locked": false, "schema_version": 3, "solution": true, "task": false}
# predicted_norm = [..., ..., ..., ...]
### BEGIN SOLUTION
predicted_norm = [-1, -1, 1, 1]
### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "13-predict-norm-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_predict_norm():
    """NumPy's mean and standard deviation."""
    x = np.array([10, 10, 50, 50])
    expected = ((x - x.mean()) / x.std()).tolist()
    assert list(predicted_norm) == expected, (
        f"got {list(predicted_norm)}, expected {expected}: the distances from the mean, 20 each, are divided by 20; "
        "a layer norm does not see how large its input was"
    )


if __name__ == "__main__":
    test_unit_predict_norm()

# %% [markdown]
"""
**Build** the first half. It returns n, and the factor 1 / sqrt(variance + eps), which the gradient rule
will need.
"""

# %% nbgrader={"grade": false, "grade_id": "13-normalize", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def normalize_array(x, eps=1e-5):
    """Each row with mean 0 and variance 1, and the factor that made it so: (..., E) -> (..., E), (..., 1).

    The variance is the mean of the squares (divided by E, as in PyTorch's LayerNorm).

    >>> normalize_array(np.array([1.0, 1.0, 3.0, 3.0]), eps=0)
    (array([-1., -1.,  1.,  1.]), array([1.]))
    """
    size = x.shape[-1]
    ### BEGIN SOLUTION
    centered = x - sum_along(x, -1) / size
    variance = np.vecdot(centered, centered)[..., None] / size
    factor = 1 / np.sqrt(variance + eps)
    centered *= factor
    return centered, factor
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "13-normalize-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_normalize():
    """The picture's numbers, a second row that is twice as wide, and a constant row."""
    x = np.array([[1, 1, 3, 3], [2, 2, 6, 6], [5, 5, 5, 5]], np.float32)
    n, factor = normalize_array(x, eps=1e-8)
    assert n.shape == (3, 4), f"got shape {n.shape}, expected (3, 4)"
    assert factor.shape == (3, 1), f"the factor has shape {factor.shape}, expected (3, 1): one per row"
    assert np.allclose(n[0], [-1, -1, 1, 1]), (
        f"[1, 1, 3, 3] became {n[0]}, expected [-1, -1, 1, 1]; 0.866 in place of 1 divides by E - 1, and other numbers "
        "mean that whole columns were normalised, not each row"
    )
    assert np.allclose(n[1], n[0]), f"[2, 2, 6, 6] became {n[1]}, expected {n[0]}: divide by the root of the variance"
    assert np.allclose(n[2], 0), f"a constant row became {n[2]}, expected zeros"
    assert n.dtype == np.float32, f"got {n.dtype}, expected float32"
    ### BEGIN HIDDEN TESTS
    x = np.random.default_rng(1).standard_normal((2, 3, 5)) * 7 + 100
    n, factor = normalize_array(x)
    assert n.shape == (2, 3, 5) and factor.shape == (2, 3, 1), f"got shapes {n.shape} and {factor.shape}"
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    assert np.allclose(n, expected, atol=1e-10), "rows of a (2, 3, 5) array differ from NumPy's mean and var"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_normalize()

# %%
#| export
def layer_norm_array(x, weight, bias, eps=1e-5):
    """Normalised rows, stretched by weight (E,) and shifted by bias (E,): (..., E) -> (..., E).

    Source: Ba, Kiros, Hinton 2016, "Layer Normalization".
    """
    output, _ = normalize_array(x, eps)
    output *= weight
    output += bias
    return output

# %% [markdown]
"""
Now backwards, as one rule. Two things cannot change a normalised row: adding a number to all of x, and
stretching x away from its mean. So a gradient in these two directions would be wasted, and the rule takes
both out. With h the gradient that arrives at n:

    grad_x      = factor * (h - mean(h) - n * mean(h * n))      means over the row
    grad_weight = sum(grad * n)    over all rows
    grad_bias   = sum(grad)        over all rows
"""

# %% nbgrader={"grade": false, "grade_id": "13-layer-norm-rule", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
@gradient(layer_norm_array)
def layer_norm_rule(grad, output, x, weight, bias, eps=1e-5):
    """Gradients of x (..., E), weight (E,) and bias (E,)."""
    n, factor = normalize_array(x, eps)
    size = x.shape[-1]
    h = grad * weight
    grad_weight = np.einsum("re,re->e", grad.reshape(-1, size), n.reshape(-1, size))  # r: all rows
    grad_bias = np.ones(grad.size // size, grad.dtype) @ grad.reshape(-1, size)
    ### BEGIN SOLUTION
    along_n = np.vecdot(h, n)[..., None] / size
    h -= sum_along(h, -1) / size
    n *= along_n
    h -= n
    h *= factor
    return h, grad_weight, grad_bias
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "13-layer-norm-rule-test", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
def test_unit_layer_norm_rule():
    """The two directions that cannot matter, then lesson 05's central differences in float64."""
    rng = np.random.default_rng(2)
    x, weight, bias = rng.standard_normal((2, 3, 6)) * 3, rng.standard_normal(6), rng.standard_normal(6)
    grad = rng.standard_normal((2, 3, 6))
    grad_x, grad_weight, grad_bias = layer_norm_rule(grad, layer_norm_array(x, weight, bias), x, weight, bias)
    assert grad_x.shape == x.shape, f"grad of x has shape {grad_x.shape}, expected {x.shape}"
    sums = np.abs(grad_x.sum(axis=-1)).max()
    assert sums < 1e-9, f"grad of x sums to {sums:.3g} in a row, expected 0: adding a number to x changes nothing"
    along = np.abs((grad_x * (x - x.mean(-1, keepdims=True))).sum(-1)).max()
    assert along < 1e-4, f"grad of x points {along:.3g} along n, expected about 0: stretching x changes nothing"
    assert grad_weight.shape == (6,) and grad_bias.shape == (6,), "weight and bias need gradients of shape (E,)"
    slope = (layer_norm_array(x + 1e-6 * grad_x, weight, bias) * grad - layer_norm_array(x, weight, bias) * grad).sum()
    ratio = slope / 1e-6 / (grad_x**2).sum()
    assert abs(ratio - 1) < 1e-3, f"grad of x has {1 / ratio:.3f} times the expected size: is the factor in it, once?"
    check_gradients(lambda *inputs: apply(layer_norm_array, *inputs), x, weight, bias)
    ### BEGIN HIDDEN TESTS
    check_gradients(lambda *inputs: apply(layer_norm_array, *inputs, eps=0.1), x[0], weight - 5, bias)
    rule_input = grad.copy()
    layer_norm_rule(rule_input, None, x, weight, bias)
    assert np.array_equal(rule_input, grad), "the rule changed the gradient that it was given; others still need it"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_layer_norm_rule()

# %%
#| export
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

# %% [markdown]
"""
**Look back.** BatchNorm takes its mean over the batch. What would that do to a model that generates one
sequence, one token at a time?

## 2. What does a token do with what it found?

Attention mixes values: it is a weighted average, and an average of vectors cannot compute "A but not B".
The **MLP** can: two linear layers with a GELU between them, applied to each token on its own. The middle is
4 times wider.

    (B, T, E) --up_proj--> (B, T, 4E) --gelu--> (B, T, 4E) --down_proj--> (B, T, E)

**Predict** the number of parameters of an MLP with E = 64: two weights and two biases.
"""

# %% nbgrader={"grade": false, "grade_id": "13-predict-mlp", "locked": false, "schema_version": 3, "solution": true, "task": false}
# predicted_parameters = ...
### BEGIN SOLUTION
predicted_parameters = 64 * 256 + 256 + 256 * 64 + 64
### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "13-predict-mlp-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_predict_mlp():
    """Two Linear layers of lesson 03, counted."""
    layers = Linear(64, 256), Linear(256, 64)
    expected = sum(parameter.size for layer in layers for parameter in layer.parameters())
    assert predicted_parameters == expected, (
        f"got {predicted_parameters}, expected {expected}; 32768 forgets the biases, 256 + 64 numbers"
    )


if __name__ == "__main__":
    test_unit_predict_mlp()

# %% nbgrader={"grade": false, "grade_id": "13-mlp", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
class MLP(Module):
    """Two linear layers with a GELU between them, on each token on its own: (..., E) -> (..., E)."""

    def __init__(self, embed_dim, hidden_dim=None, dropout=0.0, rng=None):
        hidden_dim = 4 * embed_dim if hidden_dim is None else hidden_dim
        self.up_proj = Linear(embed_dim, hidden_dim, rng=rng)
        self.down_proj = Linear(hidden_dim, embed_dim, rng=rng)
        self.dropout = Dropout(dropout, rng=rng)

    def forward(self, x):
        """Up, GELU, down; dropout at the very end."""
        ### BEGIN SOLUTION
        return self.dropout(self.down_proj(gelu(self.up_proj(x))))
        ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "13-mlp-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_mlp():
    """The same formula in plain NumPy."""
    mlp = MLP(6, rng=np.random.default_rng(3)).eval()
    x = np.random.default_rng(4).standard_normal((2, 3, 6)).astype(np.float32)
    y = mlp(Tensor(x))
    assert y.shape == (2, 3, 6), f"got shape {y.shape}, expected (2, 3, 6)"
    up = x @ mlp.up_proj.weight.numpy().T + mlp.up_proj.bias.numpy()
    active = 0.5 * up * (1 + np.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
    expected = active @ mlp.down_proj.weight.numpy().T + mlp.down_proj.bias.numpy()
    assert np.allclose(y.numpy(), expected, atol=1e-5), (
        f"got {y.numpy()[0, 0, :3]}, expected {expected[0, 0, :3]}: is the GELU between the two layers, and only there?"
    )
    ### BEGIN HIDDEN TESTS
    mlp = MLP(4, hidden_dim=6, dropout=1.0, rng=np.random.default_rng(5))
    y = mlp(Tensor(np.ones((1, 2, 4), np.float32)))
    assert y.shape == (1, 2, 4), f"got shape {y.shape}, expected (1, 2, 4)"
    assert (y.numpy() == 0).all(), "with dropout=1 a training MLP gives zeros: is dropout applied at the end?"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_mlp()

# %% [markdown]
"""
## 3. How are the parts joined?

A block adds two things to each token: what it found by attention, and what the MLP makes of it. The norms
stand **before** the parts, inside the branches, so that x itself runs from the first block to the last with
nothing in its way. That is *pre-norm*, as in GPT-2; the first transformer normalised after the addition.

    x -----------------(+)-----------------(+)-----> x
      \\                 |  \\                 |
       norm1 - attention    norm2 - mlp

By hand, with simple parts (norm1 multiplies by 5, attention adds 10, norm2 multiplies by 4, mlp adds 100)
and x = 1:

    1 + (5 * 1 + 10) = 16        16 + (4 * 16 + 100) = 180

The check replaces the parts in just this way.
"""

# %% nbgrader={"grade": false, "grade_id": "13-block", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
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
        ### BEGIN SOLUTION
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.mlp(self.norm2(x))
        ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "13-block-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def simple_block(dropout=0.0):
    """A block whose parts are the simple functions of the picture."""
    block = TransformerBlock(4, 2, dropout=dropout, rng=np.random.default_rng(6))
    block.norm1, block.attention = (lambda x: x * 5), (lambda x: x + 10)
    block.norm2, block.mlp = (lambda x: x * 4), (lambda x: x + 100)
    return block


def test_unit_block():
    """The picture: 1 becomes 16 becomes 180."""
    y = simple_block()(Tensor(np.ones((1, 1, 4), np.float32)))
    assert y.shape == (1, 1, 4), f"got shape {y.shape}, expected (1, 1, 4)"
    got = y.numpy()[0, 0, 0]
    mistakes = {
        175: "the first branch is not added to x", 164: "the second branch is not added to x",
        160: "norm1 was left out", 132: "norm2 was left out", 196: "norm1 was used twice",
        880: "that is post-norm: the norms stand around the sums", 680: "a norm stands behind its part",
        120: "both branches start from the first x",
    }
    assert got == 180, f"x = 1 became {got}, expected 180: {mistakes.get(int(got), 'norm, part, add; twice')}"
    ### BEGIN HIDDEN TESTS
    y = simple_block(dropout=1.0)(Tensor(np.ones((1, 1, 4), np.float32))).numpy()
    assert y.shape == (1, 1, 4), f"got shape {y.shape}, expected (1, 1, 4)"
    assert (y == 105).all(), f"with attention dropped, x = 1 became {y.ravel()[0]}, expected 1 + (4 + 100) = 105"
    block = TransformerBlock(8, 2, rng=np.random.default_rng(7))
    x = Tensor(np.random.default_rng(8).standard_normal((2, 3, 8)).astype(np.float32))
    y = block(x)
    assert y.shape == (2, 3, 8), f"got shape {y.shape}, expected (2, 3, 8)"
    y.sum().backward()
    assert all(p.grad is not None for p in block.parameters()), "a parameter of the block got no gradient"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_block()

# %% [markdown]
"""
**Look back.** If both branches gave zero, what would a block be? Why is that a good place for a deep model
to start from?

## 4. How large should the first weights be?

GPT-2 draws every weight with standard deviation 0.02 and starts every bias at 0. One kind of weight starts
smaller: the last layer of each branch (`out_proj` and `down_proj`), because its output is *added* to x. A
model of L blocks adds 2L times; 2L independent additions grow like sqrt(2L), so these weights are divided
by sqrt(2L).

The names are those of `named_parameters`, such as `blocks.0.attention.out_proj.weight`.
"""

# %% nbgrader={"grade": false, "grade_id": "13-init", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def initial_std(name, num_layers):
    """The standard deviation with which the weight called `name` starts.

    Source: Radford et al. 2019 (GPT-2), section 2.3.

    >>> initial_std("blocks.0.mlp.up_proj.weight", 8), initial_std("blocks.0.mlp.down_proj.weight", 8)
    (0.02, 0.005)
    """
    ### BEGIN SOLUTION
    residual = name.endswith(("out_proj.weight", "down_proj.weight"))
    return 0.02 / math.sqrt(2 * num_layers) if residual else 0.02
    ### END SOLUTION


def init_weights(model, rng=None):
    """GPT-2's start for every parameter of `model`, in place; norms keep weight 1 and bias 0."""
    rng = default_rng() if rng is None else rng
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data[...] = 0
        elif parameter.ndim == 2:
            normal = rng.standard_normal(parameter.shape, dtype=np.float32)
            parameter.data[...] = normal * initial_std(name, model.num_layers)

# %% nbgrader={"grade": true, "grade_id": "13-init-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_init():
    """The two numbers of the docstring, 0.02 and 0.02 / sqrt(2 * 8) = 0.005."""
    for part in ("attention.qkv_proj", "mlp.up_proj"):
        got = initial_std(f"blocks.3.{part}.weight", 8)
        assert got == 0.02, f"{part} got {got}, expected 0.02: only the last layer of a branch starts smaller"
    for part in ("attention.out_proj", "mlp.down_proj"):
        got = initial_std(f"blocks.3.{part}.weight", 8)
        assert abs(got - 0.005) < 1e-12, (
            f"{part} got {got}, expected 0.005 in a model of 8 blocks: 8 blocks add 16 times, and 16 additions grow "
            "like sqrt(16)"
        )
    ### BEGIN HIDDEN TESTS
    got = initial_std("token_embedding.weight", 2), initial_std("blocks.1.mlp.down_proj.weight", 2)
    assert got[0] == 0.02 and abs(got[1] - 0.01) < 1e-12, f"2 blocks: got {got}, expected 0.02 and 0.01"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_init()

# %% [markdown]
"""
## 5. The model

Ids become vectors, the blocks work on them, a last norm and a linear **head** turn each vector into one
score (a *logit*) per word of the vocabulary. Position t's logits predict token t + 1.

The head's weight has the shape (V, E), exactly like the embedding table. With `tie_weights` they are the
**same** parameter: a word's input vector is also the vector that its score is measured against (Press and
Wolf 2017).

**Predict:** how many parameters does tying save in GPT-2, with V = 50257 and E = 768?
"""

# %% nbgrader={"grade": false, "grade_id": "13-predict-tied", "locked": false, "schema_version": 3, "solution": true, "task": false}
# predicted_saving = ...
### BEGIN SOLUTION
predicted_saving = 50257 * 768
### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "13-predict-tied-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_predict_tied():
    """The size of a table with one row per word (np.empty does not touch the memory)."""
    expected = np.empty((50257, 768), np.float32).size
    assert predicted_saving == expected, f"got {predicted_saving}, expected {expected}: V rows of E numbers"


if __name__ == "__main__":
    test_unit_predict_tied()

# %% [markdown]
"""
**Build** `hidden`: everything up to the head. It is the longest cell of the lesson, because a class stands
in one cell. Three things in it deserve a word.

* `forward` takes a `cache`. Lesson 17 makes such a thing; all that this model knows is that a cache can
  attach itself for the length of a `with` block, and that it has no use in training, where gradients need
  everything at once.
* `_kv_cache` is None for every model; lesson 17 may give one model a cache that stays.
* `generate` is given; its loop is section 7.
"""

# %%
#| export
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

# %% nbgrader={"grade": false, "grade_id": "13-hidden", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
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
        ### BEGIN SOLUTION
        x = self.dropout(self.position_embedding(self.token_embedding(ids)))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)
        ### END SOLUTION

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

# %% nbgrader={"grade": true, "grade_id": "13-hidden-test", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
def test_unit_hidden():
    """A model whose parts are simple functions, worked by hand: ids 1, 2 -> embeddings 1, 2."""
    model = GPT(9, 4, 2, 2, max_seq_len=6, rng=np.random.default_rng(9)).eval()
    model.token_embedding = lambda ids: Tensor(np.repeat(ids[..., None], 4, axis=-1).astype(np.float32))
    model.position_embedding = lambda x: x + 100
    model.blocks = [lambda x: x * 2, lambda x: x + 3]
    model.norm = lambda x: x * 10
    y = model.hidden([1, 2])
    assert y.shape == (1, 2, 4), f"got shape {y.shape}, expected (1, 2, 4)"
    got = y.numpy()[0, :, 0]
    expected = np.array([((1 + 100) * 2 + 3) * 10, ((2 + 100) * 2 + 3) * 10])
    assert not np.allclose(got, (np.array([1, 2]) * 2 + 3) * 10), "the position embedding is missing"
    assert not np.allclose(got, expected / 10), "the last norm is missing"
    assert not np.allclose(got, (np.array([101, 102]) + 3) * 10), "only the last block's output was kept"
    assert np.allclose(got, expected), f"got {got}, expected {expected}: embed, add positions, blocks in order, norm"
    ### BEGIN HIDDEN TESTS
    model = GPT(9, 4, 2, 2, max_seq_len=6, dropout=1.0, tie_weights=False, rng=np.random.default_rng(10))
    logits = model(np.array([[1, 2, 3], [4, 5, 6]]))
    assert logits.shape == (2, 3, 9), f"got shape {logits.shape}, expected (B, T, V) = (2, 3, 9)"
    assert (logits.numpy() == 0).all(), "with dropout=1 a training model knows nothing: dropout follows the embeddings"
    assert not np.allclose(model.eval()([1, 2]).numpy(), 0), "in evaluation mode nothing may be dropped"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_hidden()

# %% [markdown]
"""
Where are the parameters? Here is a model of GPT-2's proportions, small enough to train below.
"""

# %% nbgrader={"grade": false, "grade_id": "13-measure-parameters", "locked": true, "schema_version": 3, "solution": false, "task": false}
def count_parameters(model):
    """Parameters per part of the model; shared ones are counted once, where they are met first."""
    counts = {}
    for name, parameter in model.named_parameters():
        part = name.split(".")
        key = part[2] if part[0] == "blocks" else part[0]
        counts[key] = counts.get(key, 0) + parameter.size
    return counts


if __name__ == "__main__":
    model = GPT(50, 64, 4, 4, max_seq_len=64, rng=np.random.default_rng(0))
    for part, count in count_parameters(model).items():
        print(f"{part:20}{count:9,}")
    print(f"{'together':20}{sum(count_parameters(model).values()):9,}")

# %% [markdown]
"""
## 6. Does it learn?

An untrained model with V words should find all of them equally likely. Its loss is the logarithm of how
many words it hesitates between. **Predict** the first loss for V = 50, to two digits (`math.log` is
allowed).
"""

# %% nbgrader={"grade": false, "grade_id": "13-predict-loss", "locked": false, "schema_version": 3, "solution": true, "task": false}
# predicted_loss = ...
### BEGIN SOLUTION
predicted_loss = math.log(50)
### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "13-predict-loss-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_predict_loss():
    """The loss of an untrained GPT on random tokens, measured."""
    rng = np.random.default_rng(11)
    model = GPT(50, 32, 2, 2, max_seq_len=32, rng=rng)
    ids = rng.integers(0, 50, (8, 33))
    measured = cross_entropy(model(ids[:, :-1]), ids[:, 1:]).item()
    assert abs(predicted_loss - measured) < 0.1, (
        f"predicted {predicted_loss:.3f}, measured {measured:.3f}: -log(1 / 50), with the natural logarithm"
    )


if __name__ == "__main__":
    test_unit_predict_loss()

# %% [markdown]
"""
A text to learn from comes with Python: `import this`. We number its characters, cut windows of T + 1 out of
it, and use the first T as input and the last T as targets: at every position the target is the next
character.
"""

# %%
def zen():
    """The Zen of Python, as the module `this` keeps it; importing it prints the text, which we catch."""
    with redirect_stdout(io.StringIO()):
        import this
    return codecs.decode(this.s, "rot13")


def random_windows(ids, batch_size, seq_len, rng):
    """Random windows: inputs (B, T) and, one step ahead, targets (B, T)."""
    starts = rng.integers(0, len(ids) - seq_len, batch_size)
    windows = ids[starts[:, None] + np.arange(seq_len + 1)]
    return windows[:, :-1], windows[:, 1:]

# %%
def train_on(text, steps, seed=0, report=False):
    """A small GPT trained on the characters of `text`; returns it, its alphabet and the losses."""
    rng = np.random.default_rng(seed)
    alphabet = sorted(set(text))
    ids = np.array([alphabet.index(character) for character in text])
    model = GPT(len(alphabet), 64, 2, 4, max_seq_len=96, rng=rng)
    optimizer, losses = AdamW(model.parameters(), lr=3e-3), []
    for step in range(steps):
        inputs, targets = random_windows(ids, 16, 32, rng)
        loss = cross_entropy(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if report and (step % 40 == 0 or step == steps - 1):
            print(f"step {step:4}  loss {losses[-1]:.3f}")
    return model, alphabet, losses

# %% nbgrader={"grade": false, "grade_id": "13-measure-training", "locked": true, "schema_version": 3, "solution": false, "task": false}
if __name__ == "__main__":
    start = time.perf_counter()
    trained, alphabet, losses = train_on(zen(), 200, report=True)
    print(f"{time.perf_counter() - start:.1f} s, log({len(alphabet)}) = {math.log(len(alphabet)):.3f}")

# %% [markdown]
"""
The first loss is the logarithm of the alphabet's size, as predicted; then it falls. The model has begun to
learn the text by heart, which is all that a text of this length can teach it.

## 7. How does it write?

The logits of the last position score the next token. The **greedy** choice takes the largest. To vary, we
draw from the softmax instead: a `temperature` below 1 sharpens it, above 1 flattens it, and `top_k` keeps
only the k best.

By hand, logits [log 1, log 2, log 5]:

    temperature 1              [1, 2, 5] / 8    = [0.125, 0.25, 0.625]
    temperature 1/2 (squares)  [1, 4, 25] / 30  = [0.033, 0.133, 0.833]
    temperature 1, top_k 2     [0, 2, 5] / 7    = [0, 0.286, 0.714]
"""

# %% nbgrader={"grade": false, "grade_id": "13-probabilities", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def next_probabilities(logits, temperature=1.0, top_k=None):
    """The probability of each next token: logits (B, V) -> (B, V), float64; with top_k only the k best (and ties).

    >>> next_probabilities(np.log([[1.0, 2.0, 5.0]]), top_k=2).round(3)
    array([[0.   , 0.286, 0.714]])
    """
    logits = logits.astype(np.float64)
    ### BEGIN SOLUTION
    logits = (logits - logits.max(axis=-1, keepdims=True)) / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        smallest_kept = np.partition(logits, -top_k, axis=-1)[:, [-top_k]]
        logits = np.where(logits < smallest_kept, -np.inf, logits)
    exponentials = np.exp(logits)
    return exponentials / exponentials.sum(axis=-1, keepdims=True)
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "13-probabilities-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_probabilities():
    """The three lines of the picture, and two rows that must not disturb each other."""
    logits = np.log([[1, 2, 5], [5, 2, 1]]).astype(np.float32)
    p = next_probabilities(logits)
    assert p.shape == (2, 3), f"got shape {p.shape}, expected (2, 3)"
    assert np.allclose(p[0], [0.125, 0.25, 0.625]), f"temperature 1 gave {p[0]}, expected [0.125, 0.25, 0.625]"
    sharp = next_probabilities(logits, temperature=0.5)
    assert np.allclose(sharp[0], [1 / 30, 4 / 30, 25 / 30]), (
        f"temperature 0.5 gave {sharp[0].round(3)}, expected [0.033, 0.133, 0.833]; a flatter result means that the "
        "logits were multiplied by the temperature"
    )
    best = next_probabilities(logits, top_k=2)
    assert np.allclose(best, [[0, 2 / 7, 5 / 7], [5 / 7, 2 / 7, 0]]), (
        f"top_k=2 gave {best.round(3).tolist()}, expected [[0, 0.286, 0.714], [0.714, 0.286, 0]]: the k best of each "
        "row stay, and they sum to 1 again"
    )
    ### BEGIN HIDDEN TESTS
    wide = next_probabilities(np.array([[1000.0, 999.0, -1000.0]]), top_k=10)
    assert wide.shape == (1, 3), f"got shape {wide.shape}, expected (1, 3)"
    assert np.allclose(wide, [[0.7311, 0.2689, 0]], atol=1e-4), f"large logits gave {wide}: subtract the maximum"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_probabilities()

# %% [markdown]
"""
To draw, we lay the probabilities end to end from 0 to 1, throw one random number per row, and take the
token it falls on.
"""

# %%
#| export
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

# %%
if __name__ == "__main__":
    draws = sample_next(np.tile(np.log([[1.0, 2, 5]]), (8000, 1)), temperature=1, rng=np.random.default_rng(0))
    print("8000 draws:", np.bincount(draws, minlength=3), "expected about [1000 2000 5000]")

# %% [markdown]
"""
**Build the loop.** Each round runs the tokens that are new, takes the logits of the **last** position,
chooses a token for each row and appends it. What is new?

    without a cache   everything, every round        ids[:, 0:]
    with a cache      what the cache does not hold   ids[:, cache.seq_pos:]

With a cache of P prompt tokens and n new ones the model runs P + n - 1 tokens, not P + (P + 1) + ...; the
last one is chosen and never run. Only the last position needs the head: `[:, -1]` comes before it.

A row that has met its stop token is finished: it repeats its last token while others go on.
"""

# %% nbgrader={"grade": false, "grade_id": "13-generate", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def continue_ids(model, ids, max_new_tokens, cache=None, temperature=0, top_k=None, rng=None, stop_token=None,
                 on_token=None):
    """The loop of `generate`, on model.hidden and model.head: ids (B, P) -> (B, P + n), n <= max_new_tokens."""
    if cache is not None and max_new_tokens and cache.seq_pos:
        cache.reset()  # it still holds another text
    stopped = np.zeros(len(ids), bool)
    for _ in range(max_new_tokens):
        ### BEGIN SOLUTION
        start = 0 if cache is None else cache.seq_pos
        last = model.hidden(ids[:, start:])[:, -1]  # (B, E)
        token = sample_next(model.head(last).numpy(), temperature, top_k, rng)
        ### END SOLUTION
        if stop_token is not None:
            ### BEGIN SOLUTION
            token = np.where(stopped, ids[:, -1], token)
            stopped |= np.isin(token, stop_token)
            ### END SOLUTION
        ids = np.concatenate([ids, token[:, None].astype(ids.dtype)], axis=1)
        if on_token is not None:
            on_token(ids[:, -1])
        if stopped.all():
            break
    return ids

# %%
class Counter:
    """A model that says the next number, and notes how many tokens went through it and through its head."""

    def __init__(self, cache=None):
        self.cache, self.ran, self.through_head = cache, [], []

    def hidden(self, ids):
        self.ran.append(ids.shape[1])
        if self.cache is not None:
            self.cache.seq_pos += ids.shape[1]
        return Tensor(np.asarray(ids, np.float32)[..., None])

    def head(self, x):
        self.through_head.append(x.size)
        return Tensor(np.eye(10, dtype=np.float32)[(x.numpy()[..., 0].astype(int) + 1) % 10])


class CountingCache:
    """All that `continue_ids` knows of a cache: how many tokens it holds, and that it can be emptied."""

    seq_pos = 3

    def reset(self):
        self.seq_pos = 0

# %% nbgrader={"grade": true, "grade_id": "13-generate-test", "locked": true, "points": 4, "schema_version": 3, "solution": false, "task": false}
def test_unit_generate():
    """Counting needs no model: 3, 4 is followed by 5, 6, 7; the numbers of tokens run are counted by hand."""
    model = Counter()
    ids = continue_ids(model, np.array([[3, 4], [7, 8]]), 3)
    assert ids.shape == (2, 5), f"got shape {ids.shape}, expected (B, P + n) = (2, 5)"
    assert ids.tolist() == [[3, 4, 5, 6, 7], [7, 8, 9, 0, 1]], (
        f"a counting model wrote {ids.tolist()}, expected [[3, 4, 5, 6, 7], [7, 8, 9, 0, 1]]: the logits of the last "
        "position choose the next token"
    )
    assert model.ran == [2, 3, 4], f"without a cache {model.ran} tokens were run, expected [2, 3, 4]"
    assert model.through_head == [2, 2, 2], (
        f"{model.through_head} positions went through the head, expected [2, 2, 2]: only the last one of each row"
    )
    cache = CountingCache()
    model = Counter(cache)
    ids = continue_ids(model, np.array([[3, 4]]), 3, cache)
    assert ids.tolist() == [[3, 4, 5, 6, 7]], f"with a cache the text is {ids.tolist()}, expected [[3, 4, 5, 6, 7]]"
    assert model.ran == [2, 1, 1], f"with a cache {model.ran} tokens were run, expected [2, 1, 1]: what is new, no more"
    ids = continue_ids(Counter(), np.array([[3, 4], [7, 8]]), 4, stop_token=6).tolist()
    assert ids[1] == [7, 8, 9, 0, 1, 2], f"one row's stop token stopped the other, which is {ids[1]}"
    assert ids[0] == [3, 4, 5, 6, 6, 6], f"a row that stopped at 6 went on as {ids[0]}, expected [3, 4, 5, 6, 6, 6]"
    ### BEGIN HIDDEN TESTS
    ids = continue_ids(Counter(), np.array([[3, 4], [4, 5]]), 7, stop_token=6)
    assert ids.tolist() == [[3, 4, 5, 6], [4, 5, 6, 6]], f"all rows have stopped and the text is {ids.tolist()}"
    ids = continue_ids(Counter(), np.array([[3, 6]]), 2, stop_token=6)
    assert ids.tolist() == [[3, 6, 7, 8]], f"a stop token in the prompt stopped the row: {ids.tolist()}"
    ids = continue_ids(Counter(), np.full((400, 1), 3), 1, temperature=50.0, rng=np.random.default_rng(1))
    assert len(set(ids[:, 1].tolist())) == 10, "temperature and rng did not reach sample_next"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_generate()

# %% [markdown]
"""
What is left of `generate` is good manners: check before any work, evaluate without gradients, put every
mode back even after an error, and answer a list with a list.

And prompts of different length. We pad them on the *right*: no token looks at what comes after it, so the padding
changes nothing, and each row's next token comes from its own last position.
"""

# %%
#| export
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

# %%
#| export
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

# %%
#| export
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

# %%
if __name__ == "__main__":
    prompt = [alphabet.index(character) for character in "Beautiful is"]
    for temperature in (0, 0.5, 1.5):
        ids = trained.generate(prompt, 60, temperature=temperature, rng=np.random.default_rng(0))
        print(f"temperature {temperature}:", repr("".join(alphabet[i] for i in ids)))

# %% [markdown]
"""
One question is left for lesson 17. What does a token cost when the text before it is longer?
"""

# %% nbgrader={"grade": false, "grade_id": "13-measure-generation", "locked": true, "schema_version": 3, "solution": false, "task": false}
def measure_generation(lengths=(16, 32, 64, 128, 256), repeats=5):
    """Milliseconds for one more token after prompts of several lengths, without a cache."""
    model = GPT(50, 64, 2, 4, max_seq_len=max(lengths) + 1, rng=np.random.default_rng(0))
    for length in lengths:
        prompt, times = [0] * length, []
        for _ in range(repeats):
            start = time.perf_counter()
            model.generate(prompt, 1)
            times.append(time.perf_counter() - start)
        print(f"after {length:4} tokens: {min(times) * 1e3:7.2f} ms for one token")


if __name__ == "__main__":
    measure_generation()

# %% [markdown]
"""
One token is written, and yet the time grows: every round runs the whole text again, though a causal mask
lets nothing that is already there change.

**Look back.** Which parts of the work in a round are the same as in the round before? What would you have
to keep?

## 8. The module test

Every check again, then the whole path: real text, loss down, text back.
"""

# %% nbgrader={"grade": true, "grade_id": "13-module-test", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
def test_module():
    """Every check of the lesson; a GPT that learns; a future that cannot leak; a mode that comes back."""
    for check in (
        test_unit_predict_norm, test_unit_normalize, test_unit_layer_norm_rule, test_unit_predict_mlp, test_unit_mlp,
        test_unit_block, test_unit_init, test_unit_predict_tied, test_unit_hidden, test_unit_predict_loss,
        test_unit_probabilities, test_unit_generate,
    ):
        check()
    model, alphabet, losses = train_on(zen(), 60, seed=1)
    assert abs(losses[0] - math.log(len(alphabet))) < 0.2, f"the first loss is {losses[0]:.2f}, not log V"
    assert losses[-1] < 0.75 * losses[0], f"60 steps took the loss from {losses[0]:.2f} only to {losses[-1]:.2f}"
    ids = model.generate([1, 2, 3], 5)
    assert isinstance(ids, list) and len(ids) == 8 and ids[:3] == [1, 2, 3], f"a list of 3 + 5 ids, got {ids}"
    assert model.training, "generate left the model in evaluation mode"
    logits, changed = model([1, 2, 3, 4]).numpy(), model([1, 2, 3, 9]).numpy()
    assert logits.shape == changed.shape == (1, 4, len(alphabet)), f"logits have shape {logits.shape}"
    assert np.array_equal(logits[:, :3], changed[:, :3]), "a later token changed the logits of an earlier position"
    assert model.head.weight is model.token_embedding.weight, "the tied head has come loose"
    print(f"all checks pass; loss {losses[0]:.2f} -> {losses[-1]:.2f} in {len(losses)} steps")


if __name__ == "__main__":
    test_module()

# %% [markdown]
"""
## Summary

* A layer norm gives each token mean 0 and variance 1; its gradient has no part in those two directions.
* Attention gathers, the MLP computes; a block adds both to x, with the norms inside the branches.
* GPT: embeddings, blocks, norm, head. The head may be the embedding table itself.
* An untrained model's loss is log V. Residual weights start smaller by sqrt(2L).
* `generate` runs what is new, asks the last position, appends. Without a cache, everything is new every
  time.

## Exercises

1. Move the norms behind the additions (post-norm) and train with 8 blocks. Compare the first 50 losses.
2. Set `tie_weights=False` in `train_on`. How many parameters more, and what happens to the loss after 200
   steps?
3. Replace the learned positions by the sinusoidal ones of lesson 11. Does the loss after 200 steps change?
"""

# %% [markdown]
"""
## Design note: where does the norm stand?

The first transformer normalised after each addition and needed a learning rate that warmed up slowly. GPT-2
moved the norm into the branch and added one at the end (Radford et al. 2019, section 2.3). Xiong et al.
2020 (arXiv:2002.04745) explain why: with the norm behind the sum, the expected gradients of the last layers
are large at the start; inside the branch they are not. The price is that x itself grows with depth, which
section 1 has shown, and which is why the last norm is there.

**Next:** lesson 14 measures where the time and the memory of this model go.
"""

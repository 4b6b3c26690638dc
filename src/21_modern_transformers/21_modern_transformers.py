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
#     lesson: "21"
# ---

# %% [markdown]
"""
# Lesson 21: Modern transformers

**We build** Llama: the GPT of lesson 13 with the four parts that have changed since GPT-2. Three of them compute
something new, and get a gradient rule of their own.

**It needs** attention (12), GPT (13) and the gradient rules (05). The checks borrow the cache of lesson 17, and the
last measurement AdamW (06).

**It becomes** `tinytorch/models/llama.py`. Your cache runs it unchanged, and so do the lessons that follow.

**Time:** about 90 minutes.
"""

# %% [markdown]
"""
| | GPT-2 (2019) | Llama, Qwen2 | section |
|---|---|---|---|
| norm | mean and variance | root mean square | 1 |
| position | a learned row, added | an angle, turned | 2, 3 |
| MLP | GELU | SwiGLU, a gate | 4 |
| keys and values | one per query head | shared | 5 |
"""

# %%
#| default_exp models.llama
#| export
import math

import numpy as np

from tinytorch.core.attention import MultiHeadAttention, head_sizes, visible_mask
from tinytorch.core.autograd import gradient
from tinytorch.core.embeddings import Embedding, choose_positions
from tinytorch.core.layers import Dropout, Linear, Module, Parameter
from tinytorch.core.tensor import Tensor, apply
from tinytorch.models.transformer import GPT, TransformerBlock, init_weights

# %%
import codecs
import io
import time
from contextlib import redirect_stdout

from tinytorch.core.activations import silu
from tinytorch.core.attention import attention_weights, scaled_dot_product_attention
from tinytorch.core.autograd import check_gradients, no_grad
from tinytorch.core.losses import cross_entropy
from tinytorch.core.optimizers import AdamW
from tinytorch.generation.kv_cache import disable_kv_cache, enable_kv_cache, kv_cache_bytes
from tinytorch.models.transformer import MLP, layer_norm_array

# %% [markdown]
"""
## 1. Does a norm need the mean?

Lesson 13 put a norm before every layer, because 24 layers that each add to x let it grow without bound. Its norm
takes out the mean, then divides by the standard deviation. Which of the two does the work? Leave one away.
"""

# %% nbgrader={"grade": false, "grade_id": "21-measure-depth", "locked": true, "schema_version": 3, "solution": false, "task": false}
def size_at_depth(seen, depth=24, width=64):
    """The standard deviation of x after 6, 12, 18 and 24 layers x = x + layer(seen(x))."""
    rng = np.random.default_rng(0)
    x, sizes = rng.standard_normal((8, width)), []
    for layer in range(1, depth + 1):
        x = x + seen(x) @ rng.standard_normal((width, width)) / math.sqrt(width)
        sizes += [f"{x.std():.1f}"] if layer % 6 == 0 else []
    return sizes


if __name__ == "__main__":
    print("the mean is taken out :", size_at_depth(lambda x: x - x.mean(-1, keepdims=True)))
    print("divided by the size   :", size_at_depth(lambda x: x / np.sqrt((x * x).mean(-1, keepdims=True))))
    both = size_at_depth(lambda x: (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True))
    print("both, a layer norm    :", both)

# %% [markdown]
"""
Dividing does the work. So **RMSNorm** (Zhang and Sennrich 2019, arXiv 1910.07467, section 4) only divides, by the
root of the mean of the squares, and has a weight but no bias:

    y = x / sqrt(mean(x * x) + eps) * weight

By hand, E = 4:

    x             [2, 4, 4, 8]
    squares       [4, 16, 16, 64]    mean 25, root 5
    n             [0.4, 0.8, 0.8, 1.6]
"""

# %% [markdown]
"""
**Predict** n for a row in which all numbers are the same, [5, 5, 5, 5] (eps is negligible). A layer norm makes
zeros of it.
"""

# %% nbgrader={"grade": false, "grade_id": "21-predict-rms", "locked": false, "schema_version": 3, "solution": true, "task": false}
# predicted_rms = [..., ..., ..., ...]
### BEGIN SOLUTION
predicted_rms = [1, 1, 1, 1]
### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "21-predict-rms-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_predict_rms():
    """NumPy: the row over the root of its mean square."""
    x = np.array([5, 5, 5, 5])
    got, expected = np.ravel(predicted_rms).tolist(), (x / np.sqrt(np.mean(x * x))).tolist()
    assert got == expected, (
        f"got {got}, expected {expected}: no mean is taken out, so only the size of the row is lost"
    )


if __name__ == "__main__":
    test_unit_predict_rms()

# %% [markdown]
"""
**Build** the factor that a row is multiplied by. As lesson 13's, it keeps the last axis, so that it multiplies row
by row.
"""

# %% nbgrader={"grade": false, "grade_id": "21-rms-factor", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def rms_factor(x, eps=1e-6):
    """1 / sqrt(mean square + eps) of each row: (..., E) -> (..., 1).

    >>> rms_factor(np.array([[2.0, 4.0, 4.0, 8.0]]), eps=0)
    array([[0.2]])
    """
    ### BEGIN SOLUTION
    mean_square = np.vecdot(x, x)[..., None] / x.shape[-1]
    return 1 / np.sqrt(mean_square + eps)
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "21-rms-factor-test", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
def test_unit_rms_factor():
    """The picture's numbers, a row of equal numbers, and a row of zeros, where eps is all there is."""
    x = np.array([[2, 4, 4, 8], [5, 5, 5, 5], [0, 0, 0, 0]], np.float32)
    before = x.copy()
    factor = rms_factor(x, eps=1e-4)
    assert factor.shape == (3, 1), f"got shape {factor.shape}, expected (3, 1): one factor per row"
    assert np.array_equal(x, before), "x was changed in place; who called still needs it"
    got = factor[:, 0]
    assert not np.isclose(got[0], 1 / 10, rtol=1e-3), f"factor {got[0]:.3f}: the sum of the squares, not the mean"
    assert got[1] < 99, f"[5, 5, 5, 5] got the factor {got[1]:.3f}, expected 0.2: was the mean subtracted first?"
    assert np.allclose(got[:2], 1 / 5, rtol=1e-3), (
        f"[2, 4, 4, 8] and [5, 5, 5, 5] got the factors {got[:2]}, expected 0.2 for both: 1 / root of the mean square")
    assert np.isclose(got[2], 100, rtol=1e-3), (
        f"zeros with eps=1e-4 got {got[2]:.1f}, expected 100 = 1 / sqrt(eps): eps stands inside of the root")
    assert factor.dtype == np.float32, f"got {factor.dtype}, expected float32"
    ### BEGIN HIDDEN TESTS
    x = np.random.default_rng(1).standard_normal((2, 3, 5)) * 7 + 3
    factor = rms_factor(x, eps=0.5)
    expected = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + 0.5)
    assert factor.shape == (2, 3, 1) and np.allclose(factor, expected, atol=1e-12), "not as NumPy's mean of x * x"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_rms_factor()

# %%
#| export
def rms_norm_array(x, weight, eps=1e-6):
    """Each row divided by its root mean square, stretched by weight (E,): (..., E) -> (..., E).

    Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", equation 4.
    """
    output = x * rms_factor(x, eps)
    output *= weight
    return output

# %% [markdown]
"""
Backwards. Of the two directions that lesson 13's rule took out, one is left: stretching x changes nothing; adding a
number to x now does. With n = x * factor and h = grad * weight, the gradient that arrives at n:

    grad_x      = factor * (h - n * mean(h * n))      mean over the row
    grad_weight = sum(grad * n)    over all rows
"""

# %% nbgrader={"grade": false, "grade_id": "21-rms-norm-rule", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
@gradient(rms_norm_array)
def rms_norm_rule(grad, output, x, weight, eps=1e-6):
    """Gradients of x (..., E) and weight (E,)."""
    factor, size = rms_factor(x, eps), x.shape[-1]
    n = x * factor
    h = grad * weight
    grad_weight = np.einsum("re,re->e", grad.reshape(-1, size), n.reshape(-1, size))  # r: all rows
    ### BEGIN SOLUTION
    n *= np.vecdot(h, n)[..., None] / size
    h -= n
    h *= factor
    return h, grad_weight
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "21-rms-norm-rule-test", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
def test_unit_rms_norm_rule():
    """The direction that cannot matter, the size along grad_x, then central differences in float64."""
    rng = np.random.default_rng(2)
    x, weight, grad = rng.standard_normal((2, 3, 6)) + 1, rng.standard_normal(6), rng.standard_normal((2, 3, 6))
    before = grad.copy()
    grad_x, grad_weight = rms_norm_rule(grad, rms_norm_array(x, weight), x, weight)
    assert grad_x.shape == x.shape and grad_weight.shape == (6,), (
        f"got shapes {grad_x.shape} and {grad_weight.shape}, expected (2, 3, 6) and (6,): return both gradients, of x first")
    assert np.array_equal(grad, before), "the rule changed the gradient that it was given; others still need it"
    factor, h = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6), grad * weight
    as_layer_norm = grad_x + factor * h.mean(-1, keepdims=True)
    assert np.abs((as_layer_norm * x).sum(-1)).max() > 1e-4, "a mean was taken out of h, as in lesson 13's rule"
    along = np.abs((grad_x * x).sum(-1)).max()
    assert along < 1e-4, (
        f"grad of x points {along:.3g} along x, expected about 0: stretching x changes nothing; is n * mean(h * n) "
        "taken out, with the mean of each row?")
    slope = ((rms_norm_array(x + 1e-6 * grad_x, weight) - rms_norm_array(x, weight)) * grad).sum() / 1e-6
    ratio = slope / (grad_x**2).sum()
    assert abs(ratio - 1) < 1e-3, (
        f"grad of x has {1 / ratio:.3f} times the expected size: is the factor in it, once? And the weight, in h?")
    check_gradients(lambda *inputs: apply(rms_norm_array, *inputs), x, weight)
    ### BEGIN HIDDEN TESTS
    check_gradients(lambda *inputs: apply(rms_norm_array, *inputs, eps=0.3), x[0], weight - 2)
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_rms_norm_rule()

# %%
#| export
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

# %% nbgrader={"grade": false, "grade_id": "21-measure-norm", "locked": true, "schema_version": 3, "solution": false, "task": false}
def microseconds(run, repeats=200):
    """The median time of run(), in microseconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return np.median(times) * 1e6


if __name__ == "__main__":
    weight, bias = np.ones(896, np.float32), np.zeros(896, np.float32)
    for tokens in (1, 512):
        x = np.random.default_rng(0).standard_normal((1, tokens, 896), dtype=np.float32)
        layer = microseconds(lambda: layer_norm_array(x, weight, bias))
        rms = microseconds(lambda: rms_norm_array(x, weight))
        print(f"{tokens:4} tokens: layer norm {layer:7.1f} us, RMSNorm {rms:7.1f} us")

# %% [markdown]
"""
**Look back.** What does RMSNorm make of a row when 1000 is added to all of its numbers? And a layer norm?
"""

# %% [markdown]
"""
## 2. Where does a token stand?

GPT-2 *adds* a learned row per position. Two things follow, and both hurt. The table ends: position max_seq_len has no
row. And a pair of words looks different wherever it stands. Run it: the same two tokens, at three places.
"""

# %%
if __name__ == "__main__":
    gpt = GPT(16, 32, 1, 2, max_seq_len=64, rng=np.random.default_rng(0)).eval()
    for part in (gpt.token_embedding, gpt.position_embedding, gpt.blocks[0].attention.qkv_proj):
        part.weight.data *= 20  # as large as after some training
    pair = gpt.token_embedding(np.array([[3, 5]]))
    for place in (0, 20, 40):
        query, key, _ = gpt.blocks[0].attention.project(gpt.position_embedding(pair, [place, place + 1]))
        score = (query.numpy()[0, 0, 1] @ key.numpy()[0, 0, 0]) / 4
        print(f"tokens 3, 5 at positions {place:2} and {place + 1:2}: score {score:+.3f}")

# %% [markdown]
"""
Rotary embedding (Su et al. 2021, arXiv 2104.09864, section 3.2) does not add the position, it **turns** by it. Query
and key are cut into pairs of numbers, arrows in a plane; at position p an arrow is turned by p times a fixed angle. A
dot product knows only the angle between two arrows, so a score knows only the **distance** of two tokens. With a
quarter turn per position:

    position   0        1        2         3
    (1, 0)     (1, 0)   (0, 1)   (-1, 0)   (0, -1)

    query at 3, key at 1:  (0, -1) . (0, 1)  = -1
    query at 2, key at 0:  (-1, 0) . (1, 0)  = -1      the distance is 2 in both
"""

# %% [markdown]
"""
**Predict** the score of a query (1, 0) at position 6 and a key (1, 0) at position 2.
"""

# %% nbgrader={"grade": false, "grade_id": "21-predict-score", "locked": false, "schema_version": 3, "solution": true, "task": false}
# predicted_score = ...
### BEGIN SOLUTION
predicted_score = 1
### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "21-predict-score-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_predict_score():
    """Complex numbers: times 1j is a quarter turn, and a dot product is the real part of a * conj(b)."""
    expected = (1j**6 * (1j**2).conjugate()).real
    assert predicted_score == expected, (
        f"got {predicted_score}, expected {expected:.0f}: the distance is 4, and four quarter turns are none"
    )


if __name__ == "__main__":
    test_unit_predict_score()

# %% [markdown]
"""
One angle would repeat itself: distance 4 would look like distance 0. So every pair has an angle of its own, like the
hands of a clock. Pair i of a head with D numbers turns by theta ** (-2i / D) per position. D = 8, theta = 10000:

    pair      0     1      2       3
    angle     1     0.1    0.01    0.001      (radians per position)
"""

# %% [markdown]
"""
**Build** the angles, in float64: at position 100,000 a rounding error of one angle is 100,000 times as large.
"""

# %% nbgrader={"grade": false, "grade_id": "21-frequencies", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def rotary_frequencies(head_dim, theta=10000.0):
    """The angle per position of each pair of a head, in radians: (D/2,), float64.

    Source: Su et al. 2021, "RoFormer", equation 15.

    >>> rotary_frequencies(4).tolist()
    [1.0, 0.01]
    """
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"rotary embedding turns pairs of numbers: head_dim must be even, got {head_dim}")
    ### BEGIN SOLUTION
    pairs = np.arange(head_dim // 2)
    return theta ** (-2 * pairs / head_dim)
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "21-frequencies-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_frequencies():
    """The picture's numbers, and the formula in Python's own floats."""
    got = rotary_frequencies(8)
    assert got.shape == (4,), f"head_dim 8: got shape {got.shape}, expected (4,): one angle per pair"
    assert got[-1] < 1, f"got {got}: the angles grow; the exponent is negative"
    assert np.allclose(got, [1, 0.1, 0.01, 0.001]), (
        f"got {got.round(4)}, expected [1, 0.1, 0.01, 0.001]; [1, 0.3162, ...] forgets the 2 in -2i / D, "
        "[0.1, ...] begins with pair 1"
    )
    got = rotary_frequencies(4, 100.0)
    assert np.allclose(got, [1, 0.1]), f"theta 100, head_dim 4: got {got.round(4)}, expected [1, 0.1]: use theta"
    assert got.dtype == np.float64, f"got {got.dtype}, expected float64"
    ### BEGIN HIDDEN TESTS
    got = rotary_frequencies(6, theta=500000.0)
    assert got.shape == (3,), f"head_dim 6: got shape {got.shape}, expected (3,)"
    assert np.allclose(got, [500000.0 ** (-2 * i / 6) for i in range(3)], rtol=1e-12), f"theta=500000: got {got}"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_frequencies()

# %% [markdown]
"""
Which two numbers are a pair? The paper takes neighbours. Llama's files, as Hugging Face stores them, are made for
**halves**: number i and number i + D/2. A file's weights fit one choice only; the other gives text without sense, and
no error.

    x = [1, 2, 3, 4]      halves: (1, 3) and (2, 4)      neighbours: (1, 2) and (3, 4)

    pair 0 turned by a quarter, pair 1 not at all:
        halves        (1, 3) -> (-3, 1)     [-3, 2, 1, 4]
        neighbours    (1, 2) -> (-2, 1)     [-2, 1, 3, 4]
"""

# %% [markdown]
"""
Turned, (a, b) is (a cos - b sin, b cos + a sin). Every number is multiplied by its cos, and gets its *partner* times
sin, in the first half with a minus. The tables are made so, once for all layers. D = 4, and c0 and s0 are the cos and
sin of pair 0's angle:

    cos = [c0, c1, c0, c1]     sin = [-s0, -s1, s0, s1]
"""

# %%
#| export
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

# %% [markdown]
"""
**Build** the turn, and its gradient rule. Turn both arrows of a dot product, and it stays what it was:

    grad . turned(x)  =  turned back(grad) . x

The left side is how a change of x moves the loss. So what is the gradient of x?
"""

# %% nbgrader={"grade": false, "grade_id": "21-rotate", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def rotate_array(x, cos, sin):
    """Each pair (i, i + D/2) of x (B, H, T, D) turned; cos and sin, (T, D) or (B, 1, T, D), as in rotary_table.

    >>> rotate_array(np.array([1.0, 2.0, 3.0, 4.0]), np.array([0, 1, 0, 1]), np.array([-1, 0, 1, 0])).tolist()
    [-3.0, 2.0, 1.0, 4.0]
    """
    half = x.shape[-1] // 2
    ### BEGIN SOLUTION
    turned = np.concatenate([x[..., half:], x[..., :half]], axis=-1)  # the partner of each number
    turned *= sin
    turned += x * cos
    return turned
    ### END SOLUTION


@gradient(rotate_array)
def rotate_rule(grad, output, x, cos, sin):
    """The gradient of x (B, H, T, D), alone in a tuple."""
    ### BEGIN SOLUTION
    return (rotate_array(grad, cos, -sin),)
    ### END SOLUTION

# %%
def turned_slowly(x, positions, frequencies):
    """The oracle: pairs as complex numbers in float64, times e ** (i * angle); x (B, H, T, D), positions (B, T)."""
    half = x.shape[-1] // 2
    arrows = x[..., :half].astype(np.complex128) + 1j * x[..., half:]
    arrows = arrows * np.exp(1j * np.asarray(positions)[:, None, :, None] * frequencies)
    return np.concatenate([arrows.real, arrows.imag], axis=-1)

# %% nbgrader={"grade": true, "grade_id": "21-rotate-test", "locked": true, "points": 4, "schema_version": 3, "solution": false, "task": false}
def test_unit_rotate():
    """The picture's quarter turn; complex numbers; lengths; central differences in float64."""
    x, cos, sin = np.array([[1, 2, 3, 4], [0, 1, 0, 1], [-1, 0, 1, 0]], np.float32)
    got = rotate_array(x, cos, sin)
    assert got.shape == (4,), f"got shape {got.shape}, expected (4,)"
    assert np.array_equal(x, [1, 2, 3, 4]), f"x was changed in place, to {x}; who called still needs it"
    assert abs(got[0]) != 2, f"got {got}: neighbours were turned (interleaved), not halves; 1's partner is 3"
    assert got[0] != 3, f"got {got}, expected [-3, 2, 1, 4]: sin has its minus already, in the first half"
    assert np.allclose(got, [-3, 2, 1, 4]), f"pair 0 of [1, 2, 3, 4], a quarter: got {got}, expected [-3, 2, 1, 4]"
    frequencies, rng = rotary_frequencies(6), np.random.default_rng(3)
    x = rng.standard_normal((2, 3, 4, 6), dtype=np.float32)
    table = rotary_table(np.arange(5, 9), frequencies)
    got, expected = rotate_array(x, table[:, 0], table[:, 1]), turned_slowly(x, [[5, 6, 7, 8]] * 2, frequencies)
    assert got.shape == x.shape and got.dtype == np.float32, f"got {got.dtype} {got.shape}, expected float32 {x.shape}"
    assert np.allclose(got, expected, atol=1e-5), (
        f"x {x.shape} at positions 5 to 8: not the turn of complex numbers; are the halves those of the last axis?")
    back = rotate_rule(got, got, x, table[:, 0], table[:, 1])
    assert isinstance(back, tuple), f"a rule returns a tuple, here (gradient,); got a {type(back).__name__}"
    assert back[0].shape == x.shape, f"the rule's gradient has shape {back[0].shape}, expected {x.shape}"
    assert not np.allclose(back[0], got), "the rule hands the gradient on as it came: it has to be turned, too"
    assert np.allclose(back[0], x, atol=1e-5), (
        "the rule, given the turned x, does not make x of it: turn back, by the negative angle")
    check_gradients(lambda x: apply(rotate_array, x, cos=table[:, 0], sin=table[:, 1]), x[:1, :1])
    ### BEGIN HIDDEN TESTS
    rows = np.stack([table[:3], rotary_table([0, 40, 2], frequencies)])[:, None]  # (B, 1, T, 2, D)
    got = rotate_array(x[:, :, :3], rows[..., 0, :], rows[..., 1, :])
    expected = turned_slowly(x[:, :, :3], [[5, 6, 7], [0, 40, 2]], frequencies)
    assert got.shape == expected.shape and np.allclose(got, expected, atol=1e-5), "rows with positions of their own"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_rotate()

# %% [markdown]
"""
The table becomes a part of the model. It stands where GPT-2 adds its positions, and there it changes nothing: it only
refuses a position beyond max_seq_len. The turning happens later, in attention, which asks it. Rows are made when they
are first needed.
"""

# %%
#| export
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

# %% nbgrader={"grade": false, "grade_id": "21-measure-distance", "locked": true, "schema_version": 3, "solution": false, "task": false}
def show_distances(starts=(0, 20, 2000), distances=(0, 1, 4, 16)):
    """The score of the same query and key, by where they stand and how far apart."""
    query, key = np.random.default_rng(0).standard_normal((2, 1, 1, 1, 64), dtype=np.float32)
    rotary = RotaryEmbedding(64, 4096)
    print("key stands at   " + "".join(f"distance {d:<6}" for d in distances))
    for start in starts:
        at = rotary.rotate(Tensor(key), [start]).numpy()[0, 0, 0]
        scores = [rotary.rotate(Tensor(query), [start + d]).numpy()[0, 0, 0] @ at / 8 for d in distances]
        print(f"{start:13}   " + "".join(f"{score:<+15.4f}" for score in scores))


def show_rounding(places=(1000, 10_000, 100_000)):
    """The largest error of cos where the angle itself was computed in float32."""
    frequencies = rotary_frequencies(64)
    for place in places:
        rounded = np.cos(np.float32(place) * frequencies.astype(np.float32))
        error = np.abs(rounded - np.cos(place * frequencies)).max()
        print(f"position {place:7}: angle in float32, cos off by {error:.1e}")


if __name__ == "__main__":
    show_distances()
    show_rounding()

# %% [markdown]
"""
Down a column the score stays: it knows the distance and nothing else. And a text that moves by 2000 tokens is, for
attention, the same text.

**Look back.** Why are values not turned? What would a cache have to do if it stored keys *before* they are turned?
"""

# %% [markdown]
"""
## 3. How far does it reach?

There is no table that ends, so why not run 100,000 tokens through a model that was trained on 8192? Because of the slow
hands of the clock. Count the full turns that each pair makes while the model trains.
"""

# %% nbgrader={"grade": false, "grade_id": "21-measure-turns", "locked": true, "schema_version": 3, "solution": false, "task": false}
if __name__ == "__main__":
    for theta in (10000.0, 500000.0):
        turns = 8192 * rotary_frequencies(128, theta) / (2 * math.pi)
        shown = ", ".join(f"{turns[i]:.4g}" for i in (0, 16, 32, 48, 63))
        print(f"theta {theta:8.0f}: pairs 0, 16, 32, 48, 63 make {shown} turns in 8192 tokens; "
              f"{(turns < 1).sum()} of 64 less than one")

# %% [markdown]
"""
A fast pair has seen all of its angles many times over: nothing new can happen to it. A pair that makes less than one
turn has seen only a part of the circle; beyond 8192 tokens it comes to angles that the model never met. Llama 3.1
slows these down by a `factor`, leaves the fast ones as they are, and passes from one to the other in between.
"""

# %% [markdown]
"""
With w the turns that a pair makes in the original context:

    w >= high_freq_factor     as it was              share = 1
    w <= low_freq_factor      divided by factor      share = 0
    between                   share = (w - low) / (high - low)

    frequency * (share + (1 - share) / factor)

By hand, with 8192 original tokens, factor 8, low 1, high 4:

    turns in 8192 tokens   10     2.5      0.5
    share                   1     0.5      0
    slowed to               1     0.5625   0.125     of its frequency
"""

# %% [markdown]
"""
**Build** it. A pair that turns by f per position needs 2 pi / f positions for a full turn. Source: Llama 3.1's
published code, `apply_scaling`; Meta's report is *The Llama 3 Herd of Models* (2024, arXiv 2407.21783).
"""

# %% nbgrader={"grade": false, "grade_id": "21-scaled", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def scaled_frequencies(frequencies, factor, low_freq_factor, high_freq_factor, original_max_position_embeddings):
    """Llama 3.1's frequencies (D/2,): slow pairs `factor` times slower, fast ones as they were, a ramp between.

    The names are those of Hugging Face's `rope_scaling`.
    """
    low, high = low_freq_factor, high_freq_factor
    if not (factor > 0 and 0 < low < high and original_max_position_embeddings > 0):
        raise ValueError("rope scaling needs factor > 0, 0 < low_freq_factor < high_freq_factor and a context > 0; "
                         f"got {factor}, {low}, {high}, {original_max_position_embeddings}")
    ### BEGIN SOLUTION
    turns = original_max_position_embeddings * frequencies / (2 * np.pi)
    share = np.clip((turns - low) / (high - low), 0, 1)
    return frequencies * (share + (1 - share) / factor)
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "21-scaled-test", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
def test_unit_scaled():
    """The picture's three pairs; then other numbers, from slow to fast, case by case."""
    turns = np.array([10, 2.5, 0.5])
    frequencies = turns * 2 * np.pi / 8192
    before = frequencies.copy()
    got = scaled_frequencies(frequencies, 8.0, 1.0, 4.0, 8192)
    assert got.shape == (3,), f"got shape {got.shape}, expected (3,)"
    assert np.array_equal(frequencies, before), "the frequencies were changed in place; return new ones"
    slowed = got / frequencies
    assert slowed[0] != 0.125, f"the fast pair was slowed to {slowed[0]:.4f}: fast pairs stay, slow ones are slowed"
    assert np.isclose(slowed[0], 1), f"10 turns: times {slowed[0]:.4f}, expected 1; is the share kept within 0 and 1?"
    assert np.isclose(slowed[2], 0.125), (
        f"half a turn: slowed to {slowed[2]:.4f}, expected 0.125; a full turn is 2 pi, and the share is at least 0")
    assert np.isclose(slowed[1], 0.5625), f"2.5 turns: slowed to {slowed[1]:.4f}, expected 0.5 + 0.5 / 8 = 0.5625"
    for f in (2 * math.pi * w / 512 for w in (0.5, 1, 2, 3, 5, 8, 20)):
        w, (got,) = 512 * f / (2 * math.pi), scaled_frequencies(np.array([f]), 32.0, 1.0, 8.0, 512) / f
        expected = 1 if w >= 8 else 1 / 32 if w <= 1 else (w - 1) / 7 + (8 - w) / 7 / 32
        assert math.isclose(got, expected), (
            f"factor 32, low 1, high 8, context 512: {w:.1f} turns slowed to {got:.4f}, expected {expected:.4f}")
    ### BEGIN HIDDEN TESTS
    frequencies = rotary_frequencies(128, 500000.0)
    got = scaled_frequencies(frequencies, factor=32.0, low_freq_factor=1.0, high_freq_factor=3.0,
                             original_max_position_embeddings=4096)
    for before, after in zip(frequencies.tolist(), got.tolist()):
        length = 2 * math.pi / before
        if length < 4096 / 3:
            expected = before
        elif length > 4096:
            expected = before / 32
        else:
            expected = ((4096 / length - 1) / 2) * before + (1 - (4096 / length - 1) / 2) * before / 32
        assert math.isclose(after, expected, rel_tol=1e-9), f"a full turn in {length:.0f} tokens: got {after}"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_scaled()

# %% [markdown]
"""
**Look back.** Why not slow down all pairs by the same factor? (What would neighbouring tokens look like?)
"""

# %% [markdown]
"""
## 4. Can an MLP choose what it lets through?

In lesson 13's MLP each hidden number is one dot product, bent by a GELU. **SwiGLU** (Shazeer 2020, arXiv 2002.05202,
section 2) multiplies two: one says *what*, the other, through SiLU, *how much of it*.

    gate = x @ Wg      up = x @ Wu      hidden = silu(gate) * up      y = hidden @ Wd

    gate   [-20,  0,  20]
    up     [  3,  3,   3]
    silu   [  0,  0,  20]        silu(g) = g * sigmoid(g)
    hidden [  0,  0,  60]
"""

# %% [markdown]
"""
No biases. Three matrices in place of two: to keep the number of parameters, the hidden size shrinks.

**Predict.** An MLP with E = 48 and 192 hidden numbers, without biases. Which hidden size gives a SwiGLU as many
parameters?
"""

# %% nbgrader={"grade": false, "grade_id": "21-predict-hidden", "locked": false, "schema_version": 3, "solution": true, "task": false}
# predicted_hidden = ...
### BEGIN SOLUTION
predicted_hidden = 2 * 192 // 3
### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "21-predict-hidden-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_predict_hidden():
    """The weights of lesson 13's MLP, counted, and shared among three matrices of 48 x hidden."""
    parts = MLP(48, hidden_dim=192)
    expected = (parts.up_proj.weight.size + parts.down_proj.weight.size) // (3 * 48)
    assert predicted_hidden == expected, (
        f"got {predicted_hidden}, expected {expected}: 2 matrices of 48 x 192 hold as much as 3 of 48 x {expected}"
    )


if __name__ == "__main__":
    test_unit_predict_hidden()

# %% [markdown]
"""
**Build** it as one operation, so that no gradient has to keep the arrays in between. `smooth_step` below is given,
the sigmoid as (1 + tanh(g / 2)) / 2: the same function, and it overflows nowhere. For the rule, with s = sigmoid(gate):

    grad_up   = grad * silu(gate)
    grad_gate = grad * up * (s + silu(gate) * (1 - s))       the slope of silu
"""

# %% nbgrader={"grade": false, "grade_id": "21-swiglu", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
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
    ### BEGIN SOLUTION
    output *= gate
    output *= up
    return output
    ### END SOLUTION


@gradient(swiglu_array)
def swiglu_rule(grad, output, gate, up):
    """Gradients of gate and up, both (..., F)."""
    s = smooth_step(gate)
    ### BEGIN SOLUTION
    active = gate * s
    slope = s + active * (1 - s)
    slope *= up
    slope *= grad
    active *= grad
    return slope, active
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "21-swiglu-test", "locked": true, "points": 4, "schema_version": 3, "solution": false, "task": false}
def test_unit_swiglu():
    """The picture's numbers, both ways round; lesson 02's silu; central differences in float64."""
    gate, up = np.array([[-20, 0, 20], [3, 3, 3]], np.float32)
    got = swiglu_array(gate, up)
    assert isinstance(got, np.ndarray), f"got a {type(got).__name__}, expected an array: lesson 02's silu makes Tensors"
    assert got.shape == (3,) and got.dtype == np.float32, f"got {got.dtype} {got.shape}, expected float32 (3,)"
    wrong_branch = gate * up / (1 + np.exp(-up.astype(np.float64)))
    assert not np.allclose(got, wrong_branch), f"got {got}: silu stands on the wrong branch, it belongs to the gate"
    assert not np.allclose(got, [0, 1.5, 3], atol=1e-4), f"got {got}: sigmoid(gate) * up; silu is gate * sigmoid(gate)"
    assert np.allclose(got, [0, 0, 60], atol=1e-4), f"gate {gate}, up {up}: got {got}, expected [0, 0, 60]"
    assert np.array_equal(gate, [-20, 0, 20]) and np.array_equal(up, [3, 3, 3]), "an input was changed in place"
    rng = np.random.default_rng(4)
    gate, up, grad = arrays = rng.standard_normal((3, 2, 3, 5)) * 3
    up[0, 0] = 0  # a token that is all zeros
    before = arrays.copy()
    assert np.allclose(swiglu_array(gate, up), silu(Tensor(gate, dtype=np.float64)).numpy() * up), "not silu(gate) * up"
    grad_gate, grad_up = swiglu_rule(grad, swiglu_array(gate, up), gate, up)
    assert np.array_equal(arrays, before), "the rule changed gate, up or grad in place; others still need them"
    sigmoid = 1 / (1 + np.exp(-gate))
    assert np.allclose(grad_up, grad * gate * sigmoid), "grad of up is grad * silu(gate), and the second of the two"
    assert not np.allclose(grad_gate, grad * up * sigmoid), "grad of gate: gate stands twice in gate * sigmoid(gate)"
    check_gradients(lambda *inputs: apply(swiglu_array, *inputs), gate, up)
    ### BEGIN HIDDEN TESTS
    with np.errstate(all="raise"):
        far = swiglu_array(np.array([-500, 500], np.float32), np.array([2, 2], np.float32))
    assert np.allclose(far, [0, 1000]), f"gates of -500 and 500 gave {far}, expected [0, 1000]"
    check_gradients(lambda *inputs: apply(swiglu_array, *inputs), gate[0] - 4, up[0])
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_swiglu()

# %%
#| export
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

# %% nbgrader={"grade": false, "grade_id": "21-measure-swiglu", "locked": true, "schema_version": 3, "solution": false, "task": false}
if __name__ == "__main__":
    for shape in ((1, 1, 4864), (16, 64, 256)):
        gate, up = (Tensor(array) for array in np.random.default_rng(0).standard_normal((2, *shape), dtype=np.float32))
        with no_grad():
            two, one = microseconds(lambda: silu(gate) * up), microseconds(lambda: apply(swiglu_array, gate, up))
        print(f"{shape!s:14}: silu, then times: {two:8.1f} us; one operation: {one:8.1f} us")

# %% [markdown]
"""
**Look back.** What does a token get from a SwiGLU whose gates are all far below zero?
"""

# %% [markdown]
"""
## 5. How many keys are worth keeping?

The cache of lesson 17 keeps a key and a value for every key head. Shazeer 2019 (arXiv 1911.02150) let all query heads
share one; Ainslie et al. 2023 (arXiv 2305.13245, section 2.2) found that a few are nearly as good as many.
Qwen2.5-0.5B has 24 layers, 14 query heads of 64 numbers, and **2** key heads.

**Predict** the bytes that its cache needs for one token, in float16. (And think: with 14 key heads?)
"""

# %% nbgrader={"grade": false, "grade_id": "21-predict-cache", "locked": false, "schema_version": 3, "solution": true, "task": false}
# predicted_cache = ...
### BEGIN SOLUTION
predicted_cache = 2 * 24 * 2 * 64 * 2
### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "21-predict-cache-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_predict_cache():
    """nbytes of an array with a key and a value per layer and key head."""
    expected = np.empty((24, 2, 2, 64), np.float16).nbytes
    assert predicted_cache != 7 * expected, f"got {predicted_cache}: 14 is the number of query heads, 2 are stored"
    assert predicted_cache == expected, (
        f"got {predicted_cache}, expected {expected}: layers x (key and value) x key heads x numbers x 2 bytes"
    )


if __name__ == "__main__":
    test_unit_predict_cache()

# %% [markdown]
"""
Which key head does a query head read? Neighbours share: with 6 query heads and 2 key heads,

    query head     0  1  2  3  4  5
    key head       0  0  0  1  1  1

Lesson 12's `fold_groups` does it without a copy. **Build** the way with a copy, which most libraries write and which
is our oracle: every key head as often as it is read.
"""

# %% nbgrader={"grade": false, "grade_id": "21-repeat-heads", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def repeat_heads(x, num_heads):
    """A copy of the right key head for every query head: (B, H_kv, S, D) -> (B, H, S, D).

    >>> repeat_heads(np.array([10, 20]).reshape(1, 2, 1, 1), 6).ravel().tolist()
    [10, 10, 10, 20, 20, 20]
    """
    ### BEGIN SOLUTION
    return np.repeat(x, num_heads // x.shape[1], axis=1)
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "21-repeat-heads-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_repeat_heads():
    """The picture's heads; then lesson 12's attention, which folds."""
    x = np.array([10, 20]).reshape(1, 2, 1, 1)
    got = repeat_heads(x, 6)
    assert got.shape == (1, 6, 1, 1), f"2 key heads for 6 query heads: got shape {got.shape}, expected (1, 6, 1, 1)"
    heads = got.ravel().tolist()
    assert heads != [10, 20] * 3, f"got {heads}: tile, where each head is to be repeated; neighbours share"
    assert heads == [10, 10, 10, 20, 20, 20], f"got {heads}, expected [10, 10, 10, 20, 20, 20]"
    rng = np.random.default_rng(5)
    query, key, value = (Tensor(rng.standard_normal((2, heads, 5, 4), dtype=np.float32)) for heads in (6, 2, 2))
    copied = (Tensor(repeat_heads(part.numpy(), 6)) for part in (key, value))
    folded, full = scaled_dot_product_attention(query, key, value), scaled_dot_product_attention(query, *copied)
    assert full.shape == (2, 6, 5, 4) and np.allclose(folded.numpy(), full.numpy(), atol=1e-5), "not lesson 12's heads"
    ### BEGIN HIDDEN TESTS
    got = repeat_heads(np.arange(12).reshape(1, 3, 2, 2), 12)
    assert got.shape == (1, 12, 2, 2), f"got shape {got.shape}, expected (1, 12, 2, 2)"
    assert got[0, :, 0, 0].tolist() == [0] * 4 + [4] * 4 + [8] * 4, f"3 heads for 12: got {got[0, :, 0, 0].tolist()}"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_repeat_heads()

# %% nbgrader={"grade": false, "grade_id": "21-measure-heads", "locked": true, "schema_version": 3, "solution": false, "task": false}
if __name__ == "__main__":
    rng = np.random.default_rng(0)
    query = rng.standard_normal((1, 14, 1, 64), dtype=np.float32)
    key = rng.standard_normal((1, 2, 1024, 64), dtype=np.float32)
    with no_grad():
        folded = microseconds(lambda: attention_weights(Tensor(query), Tensor(key)))
        copied = microseconds(lambda: attention_weights(Tensor(query), Tensor(repeat_heads(key, 14))))
    print(f"one query, 1024 keys, 14 heads over 2: folded {folded:.0f} us, with copies {copied:.0f} us; "
          f"{key.nbytes // 1024} KiB of keys become {repeat_heads(key, 14).nbytes // 1024} KiB")

# %% [markdown]
"""
In lesson 12 the heads shared the embedding: D = E / H. A configuration may also **name** D (`head_dim`), and H * D need
not be E. Qwen2 has biases on queries, keys and values, and none behind the heads.

**Predict** the shapes of the two weights, (out, in), for E = 12, 4 query heads, 2 key heads and head_dim = 8.
"""

# %% nbgrader={"grade": false, "grade_id": "21-predict-shapes", "locked": false, "schema_version": 3, "solution": true, "task": false}
# predicted_qkv = (..., ...)
# predicted_out = (..., ...)
### BEGIN SOLUTION
predicted_qkv = ((4 + 2 + 2) * 8, 12)
predicted_out = (12, 4 * 8)
### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "21-predict-shapes-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_predict_shapes():
    """Counted head by head; behind the heads, 4 of them side by side come back to 12 numbers."""
    rows = len([number for head in ["query"] * 4 + ["key"] * 2 + ["value"] * 2 for number in range(8)])
    assert tuple(predicted_qkv) != (96, 12), f"got {tuple(predicted_qkv)}: key heads counted as query heads, 3 * H * D"
    assert tuple(predicted_qkv) == (rows, 12), f"qkv_proj: got {tuple(predicted_qkv)}, expected {(rows, 12)}, (out, in)"
    assert tuple(predicted_out) == (12, 32), (
        f"out_proj: got {tuple(predicted_out)}, expected (12, 32): in are H * D numbers, one mixture per query head"
    )


if __name__ == "__main__":
    test_unit_predict_shapes()

# %% [markdown]
"""
**Build** `project`. Lesson 12's own makes the heads; then queries and keys are turned by where their tokens *stand*:

    without a cache    a b c d e     positions 0 1 2 3 4
    with a cache               e     positions         4

`CachedAttention` of lesson 17 hands the positions to every attention with `rotary = True`. It stores the key turned:
once, for good.
"""

# %% nbgrader={"grade": false, "grade_id": "21-project", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
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
        ### BEGIN SOLUTION
        turn = self.rotary_embedding.rotate
        return turn(query, positions), turn(key, positions), value
        ### END SOLUTION

    def visible(self, seq_len, mask=None):
        """As in MultiHeadAttention, and through the window."""
        if self.window is not None and self.window < seq_len:
            near = visible_mask(np.arange(seq_len), np.arange(seq_len), self.window)
            mask = near if mask is None else near & mask
        return super().visible(seq_len, mask)

# %% nbgrader={"grade": true, "grade_id": "21-project-test", "locked": true, "points": 5, "schema_version": 3, "solution": false, "task": false}
def test_unit_project():
    """Lesson 12's own heads, turned as complex numbers; rows that stand at different places, in pieces."""
    rotary = RotaryEmbedding(8, 64)
    attention = LlamaAttention(12, 4, rotary, num_kv_heads=2, bias=True, rng=np.random.default_rng(6))
    x = Tensor(np.random.default_rng(7).standard_normal((2, 3, 12), dtype=np.float32))
    plain = [part.numpy() for part in MultiHeadAttention.project(attention, x)]
    positions, local = np.array([[5, 6, 7], [20, 21, 22]]), np.array([[0, 1, 2], [0, 1, 2]])
    names, got = ("queries", "keys", "values"), [part.numpy() for part in attention.project(x, positions)]
    assert [part.shape for part in got] == [(2, 4, 3, 8), (2, 2, 3, 8), (2, 2, 3, 8)], (
        f"got shapes {[part.shape for part in got]}: 4 query heads, 2 key heads, 2 value heads")
    assert np.array_equal(got[2], plain[2]), "the values were turned: they are mixed, not compared, and stay"
    for name, part, before in zip(names, got, plain[:2]):
        assert not np.array_equal(part, before), f"the {name} were not turned; both sides of a score have to be"
        for places, how in ((local, "as if they stood at 0, 1, 2: hand `positions` on, a chunk may stand anywhere"),
                            (2 * positions, "twice"), (positions + 1, "by one position too many")):
            wrong = turned_slowly(before, places, rotary.frequencies)
            assert not np.allclose(part, wrong, atol=1e-4), f"the {name} were turned {how}"
        expected = turned_slowly(before, positions, rotary.frequencies)
        assert np.allclose(part, expected, atol=1e-4), f"the {name} differ from the turn of complex numbers"
    for name, part, before in zip(names, attention.project(x), plain[:2]):
        assert np.allclose(part.numpy(), turned_slowly(before, local, rotary.frequencies), atol=1e-4), (
            f"without positions the {name} stand at 0, 1, 2; `rotate` knows that when it is given None")
    ### BEGIN HIDDEN TESTS
    whole = attention.project(x)
    pieces = [attention.project(x[:, t : t + 1], [t]) for t in range(3)]
    for name, part, steps in zip(names, whole, zip(*pieces)):
        joined = np.concatenate([step.numpy() for step in steps], axis=2)
        assert part.shape == joined.shape and np.allclose(part.numpy(), joined, atol=1e-5), f"{name}: piece by piece"
    attention(x).sum().backward()
    assert all(parameter.grad is not None for parameter in attention.parameters()), "a parameter got no gradient"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_project()

# %% [markdown]
"""
**Look back.** The cache keeps turned keys. Lesson 22 will drop tokens from its middle: do the scores of the others
change?
"""

# %% [markdown]
"""
## 6. Llama

The block is lesson 13's with other parts in the same places, and so is the model: `hidden`, `forward` and `generate`
are inherited, because the parts have the same names. `position_embedding` is our RotaryEmbedding, which lets x pass;
every attention holds the same one.

One choice is left open, for lesson 22: a cache that *moves* tokens needs keys that are not turned yet.
"""

# %%
#| export
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

# %% [markdown]
"""
Is it Llama? The oracle is a second model in plain loops: float64, one row, complex numbers for the turn, key heads by
division. It reads the weights by their names, which a file's weights will be given as well.
"""

# %%
def slow_llama(model, ids):
    """Logits (T, V) for one sequence of ids, from the weights alone, one head and one query at a time."""
    weights = {name: array.astype(np.float64) for name, array in model.state_dict().items()}
    H, H_kv, D, frequencies = model.num_heads, model.num_kv_heads, model.head_dim, model.position_embedding.frequencies

    def norm(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + model.norm.eps) * weights[f"{name}.weight"]

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)

    def turn(heads):  # (T, heads, D)
        turned = turned_slowly(heads.swapaxes(0, 1)[None], [np.arange(len(ids))], frequencies)
        return turned[0].swapaxes(0, 1)

    x = weights["token_embedding.weight"][ids]
    for layer in (f"blocks.{i}" for i in range(model.num_layers)):
        packed = linear(norm(x, f"{layer}.norm1"), f"{layer}.attention.qkv_proj").reshape(len(ids), -1, D)
        query, key, value = turn(packed[:, :H]), turn(packed[:, H : H + H_kv]), packed[:, H + H_kv :]
        mixed = np.zeros((len(ids), H, D))
        for t, h in np.ndindex(len(ids), H):
            shared = h // (H // H_kv)
            scores = np.exp([query[t, h] @ key[s, shared] / math.sqrt(D) for s in range(t + 1)])
            mixed[t, h] = scores / scores.sum() @ value[: t + 1, shared]
        x = x + linear(mixed.reshape(len(ids), H * D), f"{layer}.attention.out_proj")
        seen = norm(x, f"{layer}.norm2")
        gate, up = linear(seen, f"{layer}.mlp.gate_proj"), linear(seen, f"{layer}.mlp.up_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * up, f"{layer}.mlp.down_proj")
    return norm(x, "norm") @ weights.get("head.weight", weights["token_embedding.weight"]).T


def random_llama(seed=0, **options):
    """A small Llama in evaluation mode whose weights are large enough that every part matters."""
    sizes = dict(vocab_size=41, embed_dim=24, num_layers=2, num_heads=6, max_seq_len=64, num_kv_heads=2, hidden_dim=40)
    model, rng = Llama(**{**sizes, **options}, rng=np.random.default_rng(seed)), np.random.default_rng(seed + 1)
    for parameter in model.parameters():
        parameter.data += 0.2 * rng.standard_normal(parameter.shape, dtype=np.float32)
    return model.eval()

# %% nbgrader={"grade": true, "grade_id": "21-llama-test", "locked": true, "points": 4, "schema_version": 3, "solution": false, "task": false}
SCALING = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)


def test_unit_llama(cases=({}, dict(head_dim=8, rope_theta=500.0), dict(attention_bias=True, tie_weights=True))):
    """Oracle: slow_llama, without a cache and with yours, whole and in pieces."""
    ids = np.random.default_rng(8).integers(0, 41, 9)
    for options in cases:
        model = random_llama(**options)
        expected = slow_llama(model, ids)
        got = model(ids).numpy()
        assert got.shape == (1, 9, 41), f"{options}: logits have shape {got.shape}, expected (1, 9, 41)"
        error = np.abs(got[0] - expected).max(-1)
        assert error[0] < 1e-3, f"{options}: the first token is off by {error[0]:.4f}; it looks at nothing but itself"
        assert error.max() < 1e-3, f"{options}: off by {error.round(4)}; the first is right, so who looks where?"
        plain = model.generate(ids[:4], 8)
        cache = enable_kv_cache(model)
        pieces = np.concatenate([model(ids[a:b]).numpy() for a, b in ((0, 4), (4, 5), (5, 9))], axis=1)
        assert pieces.shape == got.shape and np.abs(pieces - got).max() < 1e-3, (
            f"{options}: with a cache, pieces of 4, 1 and 4 tokens are off by {np.abs(pieces - got).max():.3f}")
        assert np.array_equal(model.generate(ids[:4], 8), plain), f"{options}: another text with a cache than without"
        assert cache.num_heads == model.num_kv_heads < 6, f"the cache keeps {cache.num_heads} heads, not the key heads"
        disable_kv_cache(model)


if __name__ == "__main__":
    test_unit_llama()

### BEGIN HIDDEN TESTS
if __name__ == "__main__":
    test_unit_llama(cases=(dict(rope_scaling=SCALING, seed=3), dict(num_kv_heads=1, out_bias=True), dict(norm_eps=0.1)))
### END HIDDEN TESTS

# %% [markdown]
"""
## 7. GPT-2's parts against today's

Three models of one width and depth, the same text, the same steps. **Guess** first: which parts save parameters,
which save bytes in the cache, which make the loss fall faster?
"""

# %%
def zen_windows(seq_len=48, batch_size=8):
    """The alphabet of the Zen of Python, and a function that draws windows (inputs, targets) of its letters."""
    with redirect_stdout(io.StringIO()):
        import this
    text = codecs.decode(this.s, "rot13")
    alphabet, rng = sorted(set(text)), np.random.default_rng(0)
    ids = np.array([alphabet.index(letter) for letter in text])

    def draw():
        windows = ids[rng.integers(0, len(ids) - seq_len, batch_size)[:, None] + np.arange(seq_len + 1)]
        return windows[:, :-1], windows[:, 1:]

    return alphabet, draw


def train_steps(model, draw, steps):
    """The losses of `steps` steps of AdamW."""
    optimizer, losses = AdamW(model.parameters(), lr=3e-3), []
    for _ in range(steps):
        inputs, targets = draw()
        loss = cross_entropy(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses

# %% nbgrader={"grade": false, "grade_id": "21-measure-models", "locked": true, "schema_version": 3, "solution": false, "task": false}
def compare_models(steps=150):
    """Parameters, cache bytes per token and losses of a GPT and a Llama of the same width and depth."""
    alphabet = zen_windows()[0]
    sizes = dict(vocab_size=len(alphabet), embed_dim=64, num_layers=2, num_heads=4, max_seq_len=64, tie_weights=True)
    print(f"{'':19}parameters   cache bytes/token   loss: step 50   step {steps}   ms a step")
    for name, kind, options in (("GPT", GPT, {}), ("Llama, 4 key heads", Llama, {}),
                                ("Llama, 1 key head", Llama, {"num_kv_heads": 1})):
        model = kind(**sizes, **options, rng=np.random.default_rng(0))
        start, losses = time.perf_counter(), train_steps(model, zen_windows()[1], steps)
        milliseconds = (time.perf_counter() - start) / steps * 1e3
        count, stored = sum(p.size for p in model.parameters()), kv_cache_bytes(2, model.num_kv_heads, 16, 1, 4)
        print(f"{name:19}{count:10,} {stored:19} {np.mean(losses[45:55]):15.2f} {np.mean(losses[-10:]):10.2f} "
              f"{milliseconds:11.0f}")


if __name__ == "__main__":
    compare_models()

# %% [markdown]
"""
One text of a few hundred words proves nothing about large models; the papers measured those. What you can see here is
what each part costs, on your machine.
"""

# %% [markdown]
"""
## 8. The module test

Every check again; then a Llama learns a text by heart and writes it down, with and without a cache.
"""

# %%
def learn_by_heart(text, steps=60):
    """A small Llama trained on one text, and its first and last loss."""
    model = Llama(10, 32, 2, 4, 32, num_kv_heads=2, attention_bias=True, rng=np.random.default_rng(1))
    ids = np.array([text])
    losses = train_steps(model, lambda: (ids[:, :-1], ids[:, 1:]), steps)
    return model, losses[0], losses[-1]

# %% nbgrader={"grade": true, "grade_id": "21-module-test", "locked": true, "points": 4, "schema_version": 3, "solution": false, "task": false}
def test_module():
    """Every check of the lesson, and a model that learns, generates and remembers."""
    for check in (
        test_unit_predict_rms, test_unit_rms_factor, test_unit_rms_norm_rule, test_unit_predict_score,
        test_unit_frequencies, test_unit_rotate, test_unit_scaled, test_unit_predict_hidden, test_unit_swiglu,
        test_unit_predict_cache, test_unit_repeat_heads, test_unit_predict_shapes, test_unit_project, test_unit_llama,
    ):
        check()
    text = [1, 4, 2, 8, 5, 7, 0, 3, 9, 6, 1, 2]
    model, first, last = learn_by_heart(text)
    assert last < 0.1 * first, f"60 steps took the loss from {first:.2f} only to {last:.2f}"
    assert model.generate(text[:4], 8) == text, f"learned by heart, and wrote {model.generate(text[:4], 8)}"
    cache = enable_kv_cache(model, batch_size=2)
    both = model.generate([text[:4], text[:3]], 8)
    assert both == [text, text[:-1]], f"two prompts of different length with a cache: {both}"
    assert cache.seq_lens == [11, 10], f"the cache holds {cache.seq_lens} tokens, expected [11, 10]"
    print(f"all checks pass; loss {first:.2f} -> {last:.2f}, and the text by heart: {both[0]}")


if __name__ == "__main__":
    test_module()

# %% [markdown]
"""
## Summary

* RMSNorm divides each row by its size, leaves its mean alone, and has no bias.
* Rotary embedding turns queries and keys by their absolute positions; a score then knows only the distance.
* Slow pairs limit the reach: Llama 3.1 slows them further, and leaves the fast ones alone.
* SwiGLU multiplies what with how much: three matrices, two thirds of the width, no biases.
* Neighbouring query heads share a key head: the cache shrinks by the size of the group.
"""

# %% [markdown]
"""
## Exercises

1. Turn neighbours in place of halves, in `rotate_array` and `rotary_table`. Permute the rows of `qkv_proj.weight` so
   that the model computes what it did before.
2. Make a GPT's keys into fewer: the mean of each group of key heads (Ainslie et al. 2023, section 2.1). How much worse
   is the loss, and after how many steps is it back?
3. Train at 48 tokens, then run 200 with `max_seq_len=256`. At which position does the loss begin to rise, with
   theta 10000 and 500? And with a `rope_scaling`?
"""

# %% [markdown]
"""
## Design note: turn before or after the cache?

We store keys turned, as transformers does: a token is turned once, and every later step reads it as it lies. The price:
a key is bound to its place. An engine that wants to move tokens, to cut a prompt's middle out or to renumber a
window (Xiao et al. 2023, *Efficient Streaming Language Models with Attention Sinks*, arXiv 2309.17453, section 3.2),
stores plain keys and turns all of them at every step: `keys_before_rotation=True`.
"""

# %% [markdown]
"""
**Next:** 2 key heads for 14 query heads make a cache seven times smaller. Lesson 22 makes it smaller still: windows,
eviction, fewer bits.
"""

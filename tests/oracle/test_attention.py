"""Lesson 12 against PyTorch: scaled_dot_product_attention and MultiheadAttention, forward and gradients."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tinytorch.core.attention import MultiHeadAttention, causal_mask, scaled_dot_product_attention  # noqa: E402
from tinytorch.core.tensor import Tensor  # noqa: E402


def close(got, expected, what):
    got, expected = np.asarray(got), expected.detach().numpy()
    assert got.shape == expected.shape, f"{what}: got {got.shape}, PyTorch {expected.shape}"
    np.testing.assert_allclose(got, expected, atol=1e-5, rtol=1e-5, err_msg=f"{what} differs from PyTorch")


MASKS = {
    "none": None,
    "causal": causal_mask(5, 7),
    "per row": np.random.default_rng(1).random((2, 5, 7)) < 0.6,
    "per head": np.random.default_rng(2).random((2, 6, 5, 7)) < 0.6,
}
for mask in ("per row", "per head"):
    MASKS[mask][..., 0] = True  # PyTorch answers NaN or zeros for an empty row, by version


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("num_kv_heads", [6, 3, 2, 1])
def test_scaled_dot_product_attention(mask, num_kv_heads):
    rng = np.random.default_rng(0)
    shapes = (2, 6, 5, 8), (2, num_kv_heads, 7, 8), (2, num_kv_heads, 7, 8)
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    ours = [Tensor(a, requires_grad=True) for a in arrays]
    theirs = [torch.tensor(a, requires_grad=True) for a in arrays]
    mask = MASKS[mask]
    torch_mask = None if mask is None else torch.tensor(mask[:, None] if mask.ndim == 3 else mask)
    query, key, value = theirs
    groups = 6 // num_kv_heads
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), torch_mask
    )
    got = scaled_dot_product_attention(*ours, mask)
    close(got.numpy(), expected, "output")
    grad = rng.standard_normal(got.shape).astype(np.float32)
    got.backward(Tensor(grad))
    expected.backward(torch.tensor(grad))
    for name, a, b in zip(("query", "key", "value"), ours, theirs):
        assert a.grad.dtype == np.float32
        close(a.grad.numpy(), b.grad, f"gradient of {name}")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_multi_head_attention(causal, bias):
    rng = np.random.default_rng(3)
    ours = MultiHeadAttention(24, 4, causal=causal, bias=bias, rng=rng)
    theirs = torch.nn.MultiheadAttention(24, 4, bias=bias, batch_first=True)
    pairs = [("in_proj_weight", ours.qkv_proj.weight), ("out_proj.weight", ours.out_proj.weight)]
    if bias:
        pairs += [("in_proj_bias", ours.qkv_proj.bias), ("out_proj.bias", ours.out_proj.bias)]
    named = dict(theirs.named_parameters())
    assert sorted(named) == sorted(name for name, _ in pairs)
    with torch.no_grad():
        for name, parameter in pairs:
            named[name].copy_(torch.tensor(parameter.numpy()))
    array = rng.standard_normal((3, 6, 24)).astype(np.float32)
    x, torch_x = Tensor(array, requires_grad=True), torch.tensor(array, requires_grad=True)
    hidden = torch.tensor(~causal_mask(6)) if causal else None  # PyTorch's module: True = hidden
    expected, _ = theirs(torch_x, torch_x, torch_x, attn_mask=hidden, need_weights=False)
    got = ours(x)
    close(got.numpy(), expected, "output")
    grad = rng.standard_normal(got.shape).astype(np.float32)
    got.backward(Tensor(grad))
    expected.backward(torch.tensor(grad))
    close(x.grad.numpy(), torch_x.grad, "gradient of x")
    for name, parameter in pairs:
        close(parameter.grad.numpy(), named[name].grad, f"gradient of {name}")


def test_an_empty_row_is_zero_as_in_recent_pytorch():
    """PyTorch 2.5 and later answer zeros for a row that sees nothing; before that it was NaN."""
    x = np.random.default_rng(4).standard_normal((1, 1, 2, 4)).astype(np.float32)
    mask = np.array([[False, False], [True, True]])
    got = scaled_dot_product_attention(Tensor(x), Tensor(x), Tensor(x), mask).numpy()
    t = torch.tensor(x)
    expected = torch.nn.functional.scaled_dot_product_attention(t, t, t, torch.tensor(mask)).nan_to_num(0)
    close(got, expected, "output")

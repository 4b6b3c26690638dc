"""Lesson 13 against transformers' GPT-2 with the same weights, and its parts against PyTorch's."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tinytorch.core.losses import cross_entropy  # noqa: E402
from tinytorch.core.tensor import Tensor  # noqa: E402
from tinytorch.models.transformer import GPT, LayerNorm, next_probabilities  # noqa: E402

# our name -> (their name, stored the other way round: GPT-2's Conv1D keeps (in, out))
BLOCK = {
    "norm1.weight": ("ln_1.weight", False),
    "norm1.bias": ("ln_1.bias", False),
    "attention.qkv_proj.weight": ("attn.c_attn.weight", True),
    "attention.qkv_proj.bias": ("attn.c_attn.bias", False),
    "attention.out_proj.weight": ("attn.c_proj.weight", True),
    "attention.out_proj.bias": ("attn.c_proj.bias", False),
    "norm2.weight": ("ln_2.weight", False),
    "norm2.bias": ("ln_2.bias", False),
    "mlp.up_proj.weight": ("mlp.c_fc.weight", True),
    "mlp.up_proj.bias": ("mlp.c_fc.bias", False),
    "mlp.down_proj.weight": ("mlp.c_proj.weight", True),
    "mlp.down_proj.bias": ("mlp.c_proj.bias", False),
}


def gpt2_names(num_layers, tied):
    names = {f"blocks.{i}.{ours}": (f"transformer.h.{i}.{theirs}", turned)
             for i in range(num_layers) for ours, (theirs, turned) in BLOCK.items()}
    names["token_embedding.weight"] = "transformer.wte.weight", False
    names["position_embedding.weight"] = "transformer.wpe.weight", False
    names["norm.weight"], names["norm.bias"] = ("transformer.ln_f.weight", False), ("transformer.ln_f.bias", False)
    if not tied:
        names["head.weight"] = "lm_head.weight", False
    return names


def pair(tied=True, seed=0):
    """The same random weights in our GPT and in GPT2LMHeadModel, and the table of names."""
    ours = GPT(37, 24, 3, 4, 20, tie_weights=tied, rng=np.random.default_rng(seed)).eval()
    rng = np.random.default_rng(seed + 1)
    for parameter in ours.parameters():
        parameter.data += 0.15 * rng.standard_normal(parameter.shape, dtype=np.float32)
    config = transformers.GPT2Config(
        vocab_size=37, n_positions=20, n_embd=24, n_layer=3, n_head=4, activation_function="gelu_new",
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=tied,
        bos_token_id=None, eos_token_id=None, attn_implementation="eager",
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    names, named = gpt2_names(3, tied), dict(theirs.named_parameters())
    assert sorted(names) == sorted(ours.state_dict()), "a parameter of ours has no partner"
    assert sorted(theirs_name for theirs_name, _ in names.values()) == sorted(named), "GPT-2 has other parameters"
    with torch.no_grad():
        for name, value in ours.state_dict().items():
            partner, turned = names[name]
            named[partner].copy_(torch.tensor(value.T.copy() if turned else value))
    return ours, theirs, names


@pytest.mark.parametrize("tied", [True, False])
def test_logits_loss_and_every_gradient(tied):
    ours, theirs, names = pair(tied)
    ids = np.random.default_rng(2).integers(0, 37, (3, 13))
    torch_ids = torch.tensor(ids)
    logits, expected = ours(ids[:, :-1]), theirs(torch_ids[:, :-1]).logits
    assert logits.shape == tuple(expected.shape) == (3, 12, 37)
    np.testing.assert_allclose(logits.numpy(), expected.detach().numpy(), atol=1e-5, rtol=1e-5)
    loss = cross_entropy(logits, ids[:, 1:])
    torch_loss = torch.nn.functional.cross_entropy(expected.reshape(-1, 37), torch_ids[:, 1:].reshape(-1))
    assert abs(loss.item() - torch_loss.item()) < 1e-5
    loss.backward()
    torch_loss.backward()
    named = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        partner, turned = names[name]
        wanted = named[partner].grad.numpy()
        wanted = wanted.T if turned else wanted
        assert parameter.grad.shape == wanted.shape, name
        np.testing.assert_allclose(parameter.grad.numpy(), wanted, atol=1e-6, rtol=1e-5, err_msg=name)


def test_greedy_generation_writes_the_same_tokens():
    ours, theirs, _ = pair(seed=3)
    prompt = [[5, 9, 2], [1, 30, 7]]
    with torch.no_grad():
        ids = torch.tensor(prompt)
        for _ in range(12):  # a plain loop: its generate() would bring defaults of its own
            ids = torch.cat([ids, theirs(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    got = ours.generate(prompt, 12)
    assert np.shape(got) == tuple(ids.shape) == (2, 15)
    assert got == ids.tolist()


def test_next_probabilities_are_those_of_the_logits_processors():
    logits = np.random.default_rng(4).standard_normal((3, 20)).astype(np.float32) * 3
    scores = torch.tensor(logits, dtype=torch.float64)
    scores = transformers.TemperatureLogitsWarper(0.7)(None, scores)
    scores = transformers.TopKLogitsWarper(5)(None, scores)
    got, expected = next_probabilities(logits, temperature=0.7, top_k=5), scores.softmax(-1).numpy()
    assert got.shape == expected.shape == (3, 20)
    np.testing.assert_allclose(got, expected, atol=1e-9)


@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 3, 8)])
def test_layer_norm(shape):
    rng = np.random.default_rng(5)
    array, grad = (rng.standard_normal(shape).astype(np.float32) * 3 + 1 for _ in range(2))
    ours, theirs = LayerNorm(8, eps=1e-3), torch.nn.LayerNorm(8, eps=1e-3)
    for name, parameter in ours.named_parameters():
        parameter.data[...] = rng.standard_normal(8)
        dict(theirs.named_parameters())[name].data = torch.tensor(parameter.numpy().copy())
    x, torch_x = Tensor(array, requires_grad=True), torch.tensor(array, requires_grad=True)
    got, expected = ours(x), theirs(torch_x)
    assert got.shape == tuple(expected.shape)
    np.testing.assert_allclose(got.numpy(), expected.detach().numpy(), atol=1e-5)
    got.backward(Tensor(grad))
    expected.backward(torch.tensor(grad))
    pairs = [("x", x, torch_x), ("weight", ours.weight, theirs.weight), ("bias", ours.bias, theirs.bias)]
    for name, a, b in pairs:
        assert a.grad.shape == tuple(b.grad.shape), name
        np.testing.assert_allclose(a.grad.numpy(), b.grad.numpy(), atol=1e-5, rtol=1e-4, err_msg=name)

"""Lesson 21 against transformers' Llama and Qwen2 with the same weights: logits, gradients, cache, generation."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tinytorch.core.losses import cross_entropy  # noqa: E402
from tinytorch.core.tensor import Tensor  # noqa: E402
from tinytorch.generation.kv_cache import KVCache, disable_kv_cache, enable_kv_cache, prefill  # noqa: E402
from tinytorch.models.llama import Llama, RMSNorm, RotaryEmbedding  # noqa: E402

V, L, S = 53, 3, 64
SCALED = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
NAMES = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm", "attention.out_proj": "self_attn.o_proj",
         "mlp.gate_proj": "mlp.gate_proj", "mlp.up_proj": "mlp.up_proj", "mlp.down_proj": "mlp.down_proj"}


def their_model(kind):
    """A model of transformers from a configuration in memory, its weights widened so that every part matters."""
    sizes = dict(vocab_size=V, hidden_size=24, intermediate_size=40, num_hidden_layers=L, num_attention_heads=6,
                 num_key_value_heads=2, max_position_embeddings=S, rms_norm_eps=1e-5, bos_token_id=None,
                 eos_token_id=None, pad_token_id=0, attn_implementation="eager", tie_word_embeddings=False)
    theta = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    if kind == "qwen2":
        sizes |= dict(hidden_size=56, num_attention_heads=14, tie_word_embeddings=True)
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes, **theta))
    else:
        sizes |= {"wide": dict(head_dim=8), "biased": dict(attention_bias=True)}.get(kind, {})
        if kind == "llama3":
            theta = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, **SCALED}}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **theta))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            random = torch.randn_like(parameter)
            parameter.copy_(1 + 0.15 * random if "norm" in name else (0.3 if name.endswith("bias") else 0.15) * random)
    return model.eval()


def our_state(theirs):
    """Their weights under our names; queries, keys and values one below the other."""
    named = {name: tensor.detach().numpy() for name, tensor in theirs.named_parameters()}
    ends = {"token_embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
    state = {f"{ours}.weight": named.pop(f"{name}.weight") for ours, name in ends.items() if f"{name}.weight" in named}
    for i in range(L):
        for end in ("weight", "bias"):
            state |= {f"blocks.{i}.{ours}.{end}": named.pop(f"model.layers.{i}.{name}.{end}")
                      for ours, name in NAMES.items() if f"model.layers.{i}.{name}.{end}" in named}
            parts = [named.pop(f"model.layers.{i}.self_attn.{part}_proj.{end}", None) for part in "qkv"]
            if parts[0] is not None:
                state[f"blocks.{i}.attention.qkv_proj.{end}"] = np.concatenate(parts)
    assert not named, f"parameters without a partner: {sorted(named)}"
    return state


def pair(kind):
    theirs = their_model(kind)
    options = {
        "llama": {}, "wide": dict(head_dim=8), "biased": dict(attention_bias=True, out_bias=True),
        "llama3": dict(rope_theta=500.0, rope_scaling=SCALED),
        "qwen2": dict(embed_dim=56, num_heads=14, attention_bias=True, tie_weights=True),
    }[kind]
    sizes = dict(vocab_size=V, embed_dim=24, num_layers=L, num_heads=6, max_seq_len=S, num_kv_heads=2, hidden_dim=40)
    ours = Llama(**{**sizes, **options}, norm_eps=1e-5).eval()
    ours.load_state_dict(our_state(theirs))
    return ours, theirs


@pytest.fixture(scope="module", params=["llama", "wide", "biased", "llama3", "qwen2"])
def peers(request):
    return pair(request.param)


def their_logits(theirs, ids, cache=None):
    with torch.no_grad():
        output = theirs(torch.tensor(ids), past_key_values=cache, use_cache=True)
    return output.logits.numpy(), output.past_key_values


def test_logits_of_the_whole_text(peers):
    ours, theirs = peers
    ids = np.random.default_rng(0).integers(0, V, (3, S))
    got, (expected, _) = ours(ids).numpy(), their_logits(theirs, ids)
    assert got.shape == expected.shape == (3, S, V)
    assert expected.std() > 0.3, "logits that are all alike would prove nothing"
    np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize("sizes", [(5, 1, 1, 1, 4), (1,) * 12, (3, 8, 1), (12,)])
def test_every_chunking_and_the_cache_itself(peers, sizes):
    ours, theirs = peers
    ids, cache, their_cache, start = np.random.default_rng(1).integers(0, V, (2, 12)), None, None, 0
    cache = KVCache(2, S, L, 2, ours.head_dim)
    for size in sizes:
        piece = ids[:, start : start + size]
        expected, their_cache = their_logits(theirs, piece, their_cache)
        got = ours(piece, cache=cache).numpy()
        assert got.shape == expected.shape == (2, size, V)
        np.testing.assert_allclose(got, expected, atol=1e-4)
        start += size
    for layer in range(L):
        peer = their_cache.layers[layer]
        for mine, array in zip(cache.get(layer), (peer.keys.numpy(), peer.values.numpy())):
            assert mine.shape == array.shape == (2, 2, 12, ours.head_dim)
            np.testing.assert_allclose(mine.numpy(), array, atol=3e-5, err_msg=f"layer {layer}")


def test_chunked_prefill_of_ragged_rows(peers):
    ours, theirs = peers
    lengths = [7, 20, 3]
    ids = np.random.default_rng(2).integers(0, V, (3, 20))
    cache = KVCache(3, S, L, 2, ours.head_dim)
    got = prefill(ours, ids, cache, chunk=6, n_new=lengths).numpy()
    step = ours(np.array([[7], [8], [9]]), cache=cache).numpy()
    for row, length in enumerate(lengths):
        expected, _ = their_logits(theirs, np.append(ids[row, :length], 7 + row)[None])
        np.testing.assert_allclose(got[row, :length], expected[0, :-1], atol=1e-4)
        np.testing.assert_allclose(step[row], expected[0, -1:], atol=1e-4)


def test_greedy_generation_with_and_without_a_cache(peers):
    ours, theirs = peers
    prompt = [3, 14, 15, 9, 2]
    with torch.no_grad():
        expected = theirs.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, 5, dtype=torch.long),
                                   max_new_tokens=20, do_sample=False)[0].tolist()
    assert len(expected) == 25 and ours.generate(prompt, 20) == expected
    enable_kv_cache(ours)
    try:
        assert ours.generate(prompt, 20) == expected
    finally:
        disable_kv_cache(ours)


def test_loss_and_every_gradient(peers):
    ours, theirs = peers
    ids = np.random.default_rng(3).integers(0, V, (2, 13))
    theirs.zero_grad(), ours.zero_grad()
    logits, expected = ours(ids[:, :-1]), theirs(torch.tensor(ids[:, :-1])).logits
    loss = cross_entropy(logits, ids[:, 1:])
    torch_loss = torch.nn.functional.cross_entropy(expected.reshape(-1, V), torch.tensor(ids[:, 1:]).reshape(-1))
    assert abs(loss.item() - torch_loss.item()) < 1e-5
    loss.backward(), torch_loss.backward()
    values = {name: parameter.detach().clone() for name, parameter in theirs.named_parameters()}
    with torch.no_grad():  # their gradients in the place of their weights: the same way to our names
        for parameter in theirs.parameters():
            parameter.copy_(parameter.grad)
        wanted = {name: array.copy() for name, array in our_state(theirs).items()}
        for name, parameter in theirs.named_parameters():
            parameter.copy_(values[name])
    named = dict(ours.named_parameters())
    assert sorted(named) == sorted(wanted)
    for name, parameter in named.items():
        assert parameter.grad.shape == wanted[name].shape, name
        np.testing.assert_allclose(parameter.grad.numpy(), wanted[name], atol=2e-6, rtol=1e-4, err_msg=name)


def test_the_parts_equal_theirs():
    rng = np.random.default_rng(4)
    x = rng.standard_normal((2, 5, 24), dtype=np.float32) * 3 + 1
    ours, theirs = RMSNorm(24, eps=1e-3), torch.nn.RMSNorm(24, eps=1e-3)
    ours.weight.data[...] = rng.standard_normal(24)
    theirs.weight.data = torch.tensor(ours.weight.numpy().copy())
    np.testing.assert_allclose(ours(Tensor(x)).numpy(), theirs(torch.tensor(x)).detach().numpy(), atol=1e-5)
    config = their_model("llama3").config
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    mine = RotaryEmbedding(4, S, 500.0, SCALED)
    np.testing.assert_allclose(mine.frequencies, rotary.inv_freq.numpy(), rtol=1e-6)
    cos, sin = (part[0].numpy() for part in rotary(torch.zeros(1), torch.arange(S)[None]))
    rows = mine.rows(np.arange(S))
    np.testing.assert_allclose(rows[:, 0], cos, atol=1e-5)
    np.testing.assert_allclose(rows[:, 1] * [-1, -1, 1, 1], sin, atol=1e-5)

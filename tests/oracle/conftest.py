"""What several oracle tests share: our GPT beside transformers' GPT-2, and models of transformers to save and load."""

import pytest

from tinytorch.models.transformer import GPT

V, E, L, H, S = 31, 24, 3, 4, 32


@pytest.fixture(scope="session")
def peers():
    """Our GPT and transformers' GPT-2 with the same weights, all of them large enough to matter."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=V, n_positions=S, n_embd=E, n_layer=L, n_head=H, activation_function="gelu_new",
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    weights = {name: tensor.detach().numpy() for name, tensor in theirs.state_dict().items()}
    state = {
        "token_embedding.weight": weights["transformer.wte.weight"],
        "position_embedding.weight": weights["transformer.wpe.weight"],
        "norm.weight": weights["transformer.ln_f.weight"],
        "norm.bias": weights["transformer.ln_f.bias"],
    }
    names = {"norm1": "ln_1", "norm2": "ln_2", "attention.qkv_proj": "attn.c_attn", "attention.out_proj": "attn.c_proj",
             "mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"}
    for i in range(L):
        for mine, name in names.items():
            for kind in ("weight", "bias"):
                array = weights[f"transformer.h.{i}.{name}.{kind}"]
                state[f"blocks.{i}.{mine}.{kind}"] = array.T if array.ndim == 2 else array  # theirs is (in, out)
    ours = GPT(V, E, L, H, S)
    ours.load_state_dict(state)
    return ours.eval(), theirs


ENDLESS = dict(vocab_size=53, bos_token_id=None, eos_token_id=None, pad_token_id=0, attn_implementation="eager")
GPT2 = dict(n_embd=24, n_layer=3, n_head=4, n_positions=64)
LLAMA = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
             max_position_embeddings=64, rms_norm_eps=1e-5, tie_word_embeddings=False)  # fmt: skip
SCALED = dict(rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)  # fmt: skip
KINDS = {
    "gpt2": GPT2,
    "gpt2 untied": GPT2 | dict(tie_word_embeddings=False, layer_norm_epsilon=0.02, n_inner=40,
                               activation_function="gelu_pytorch_tanh"),
    "llama": LLAMA,
    "llama wide": LLAMA | dict(head_dim=8, rms_norm_eps=0.02,
                               rope_parameters=dict(rope_type="default", rope_theta=99.0)),
    "llama biased": LLAMA | dict(attention_bias=True, tie_word_embeddings=True),
    "llama 3": LLAMA | dict(rope_parameters=SCALED),
    "qwen2": LLAMA | dict(hidden_size=56, num_attention_heads=14, tie_word_embeddings=True),
    "qwen2 untied": LLAMA | dict(hidden_size=56, num_attention_heads=14, num_key_value_heads=14),
    "mistral": LLAMA | dict(sliding_window=5),
}  # fmt: skip


@pytest.fixture(scope="session")
def their_model():
    """Makes a model of transformers by its kind, some values changed; all its weights large enough to matter."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    families = {"gpt2": (transformers.GPT2LMHeadModel, transformers.GPT2Config),
                "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig),
                "mistral": (transformers.MistralForCausalLM, transformers.MistralConfig),
                "qwen2": (transformers.Qwen2ForCausalLM, transformers.Qwen2Config)}  # fmt: skip

    def make(kind, **changes):
        model, config = families[kind.split()[0]]
        model = model(config(**{**ENDLESS, **KINDS[kind], **changes}))
        torch.manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                random = torch.randn_like(parameter)
                is_norm = "norm" in name or ".ln_" in name
                widened = 0.3 if name.endswith("bias") else 0.15
                parameter.copy_(1 + 0.15 * random if is_norm and name.endswith("weight") else widened * random)
        return model.eval()

    return make

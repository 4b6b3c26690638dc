"""What several oracle tests share: our GPT beside transformers' GPT-2."""

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

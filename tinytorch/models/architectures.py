"""GPT-2, Llama 2 and 3, Mistral, Qwen2 and Qwen2.5: their configurations as our models, and their names of our weights.

Written by hand, not built from a lesson. A configuration becomes the sizes of our model, and these the names and shapes
that the files must hold, before a weight takes memory. `gpt2_places` and `llama_places` show our weights in their names
and shapes, so that one table serves to load and to save. What our models would compute otherwise than their authors' is
refused by its name in config.json.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tinytorch.core.attention import head_sizes
from tinytorch.core.layers import Dropout
from tinytorch.core.training import CheckpointError
from tinytorch.generation.kv_cache import original
from tinytorch.models.llama import Llama
from tinytorch.models.safetensors import read_json
from tinytorch.models.transformer import GPT, MLP, LayerNorm

__all__ = ["Config", "Family", "config_of", "family_of", "places_of"]

BUFFERS = re.compile(r".*\bh\.\d+\.attn\.(bias|masked_bias)|.*\.rotary_emb\.inv_freq")  # masks and tables, no weights


# Configurations: what a model is


class Config:
    """The values of config.json, checked as they are asked for; null is as good as absent."""

    def __init__(self, path):
        self.path, self.values = path, read_json(path)

    def error(self, problem):
        return CheckpointError(f"{self.path}: {problem}")

    def get(self, name, default=None):
        value = self.values.get(name)
        return default if value is None else value

    def whole(self, name, default=None):
        """A whole number, 1 or more."""
        value = self.get(name, default)
        if type(value) is not int or value < 1:
            raise self.error(f"{name} should be a whole number, 1 or more, and is {value!r}")
        return value

    def positive(self, name, default=None):
        """A number above 0."""
        return self.checked_positive(name, self.get(name, default))

    def checked_positive(self, name, value):
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self.error(f"{name} should be a number above 0, and is {value!r}")
        return value

    def one_of(self, name, known, default):
        """The value, if it is among those that our model computes."""
        value = self.get(name, default)
        if not any(type(value) is type(other) and value == other for other in known):
            raise self.error(f"{name} is {value!r}; our model has only {', '.join(map(repr, known))}")
        return value

    def flag(self, name, default):
        return self.one_of(name, (False, True), default)


def gpt2_sizes(config):
    """The sizes of a GPT, by the names of build_gpt2."""
    embed_dim, heads = config.whole("n_embd"), config.whole("n_head")
    num_kv_heads, head_dim = head_sizes(embed_dim, heads)
    config.one_of("activation_function", ("gelu_new", "gelu_pytorch_tanh"), "gelu_new")
    config.one_of("scale_attn_weights", (True,), True)
    config.one_of("scale_attn_by_inverse_layer_idx", (False,), False)
    config.one_of("add_cross_attention", (False,), False)
    return dict(
        vocab_size=config.whole("vocab_size"), embed_dim=embed_dim, num_layers=config.whole("n_layer"), num_heads=heads,
        num_kv_heads=num_kv_heads, head_dim=head_dim, max_seq_len=config.whole("n_positions", config.get("n_ctx")),
        hidden_dim=config.whole("n_inner", 4 * embed_dim), norm_eps=config.positive("layer_norm_epsilon", 1e-5),
        tie_weights=config.flag("tie_word_embeddings", True),
    )  # fmt: skip


def llama_sizes(config, qwen2=False, window=None):
    """The sizes of a Llama, by the names of its constructor."""
    embed_dim, layers = config.whole("hidden_size"), config.whole("num_hidden_layers")
    heads = config.whole("num_attention_heads")
    width = heads * config.whole("head_dim") if config.get("head_dim") else embed_dim
    num_kv_heads, head_dim = head_sizes(width, heads, config.whole("num_key_value_heads", heads))
    config.one_of("hidden_act", ("silu",), "silu")
    config.one_of("mlp_bias", (False,), False)
    if qwen2:
        check_full_attention(config, layers)
    theta, scaling = rope_of(config)
    bias = qwen2 or config.flag("attention_bias", False)
    return dict(
        vocab_size=config.whole("vocab_size"), embed_dim=embed_dim, num_layers=layers, num_heads=heads,
        num_kv_heads=num_kv_heads, head_dim=head_dim, max_seq_len=config.whole("max_position_embeddings", 2048),
        hidden_dim=config.whole("intermediate_size"), norm_eps=config.positive("rms_norm_eps", 1e-6),
        tie_weights=config.flag("tie_word_embeddings", False), rope_theta=theta, rope_scaling=scaling,
        attention_bias=bias, out_bias=bias and not qwen2, window=window,
    )  # fmt: skip


def qwen2_sizes(config):
    return llama_sizes(config, qwen2=True)


def mistral_sizes(config):
    """A Llama that looks back `sliding_window` tokens; null means all of them, and absent Mistral's first, 4096."""
    if "sliding_window" in config.values and config.get("sliding_window") is None:
        return llama_sizes(config)
    return llama_sizes(config, window=config.whole("sliding_window", 4096))


def check_full_attention(config, layers):
    """Refuse Qwen2's sliding window where a layer would use one."""
    if not config.flag("use_sliding_window", False):
        return
    if "sliding_attention" in str(config.get("layer_types")) or config.whole("max_window_layers", 28) < layers:
        raise config.error("use_sliding_window is true; our Qwen2 looks at all keys in every layer")


SCALED = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def rope_of(config):
    """(theta, the four numbers of Llama 3 or None), from rope_parameters or from rope_theta and rope_scaling."""
    given = {}
    for name in ("rope_scaling", "rope_parameters"):
        part = config.get(name, {})
        if not isinstance(part, dict):
            raise config.error(f"{name} should be an object, {{…}}, and is {part!r}")
        given |= part
    theta = given.get("rope_theta", config.get("rope_theta", 10000.0))
    kind = given.get("rope_type", given.get("type", "default"))
    if not isinstance(kind, str) or kind not in ("default", "llama3") or any(isinstance(part, dict) for part in given.values()):
        raise config.error(f"rope_type is {kind!r} in {given}; our model has only 'default' and 'llama3'")
    for share in (config.get("partial_rotary_factor", 1), given.get("partial_rotary_factor", 1)):
        if share != 1:
            raise config.error(f"partial_rotary_factor is {share!r}; our model turns whole heads")
    theta = config.checked_positive("rope_theta", theta)
    if kind == "default":
        return theta, None
    return theta, {name: config.checked_positive(f"{name} of rope_type 'llama3'", given.get(name)) for name in SCALED}


# Models of these sizes, whose weights are still to come


class Blank(np.random.Generator):
    """A generator that does not spend time on weights, since they come from the file."""

    def __init__(self):
        super().__init__(np.random.PCG64(0))

    def standard_normal(self, size=None, dtype=np.float32, out=None):
        return np.zeros(size, np.float32)

    def uniform(self, low=0.0, high=1.0, size=None):
        return np.zeros(size, np.float32)


def build_gpt2(hidden_dim, norm_eps, head_dim, **sizes):
    """A GPT; its head_dim follows from the other sizes."""
    model = GPT(**sizes, rng=Blank())
    if hidden_dim != 4 * model.embed_dim:
        for block in model.blocks:
            block.mlp = MLP(model.embed_dim, hidden_dim, rng=Blank())
    for module in model.modules():
        if isinstance(module, LayerNorm):
            module.eps = norm_eps
        elif isinstance(module, Dropout):
            module.rng = None
    return model


def build_llama(**sizes):
    return Llama(**sizes, rng=Blank())


# Names: theirs, each with its shape in their files


def gpt2_shapes(vocab_size, embed_dim, num_layers, max_seq_len, hidden_dim, tie_weights, **_):
    """GPT-2's names and shapes, one weight after the other."""
    yield "transformer.wte.weight", (vocab_size, embed_dim)
    yield "transformer.wpe.weight", (max_seq_len, embed_dim)
    for start in (f"transformer.h.{i}." for i in range(num_layers)):
        for norm in ("ln_1", "ln_2"):
            yield from ((f"{start}{norm}.{kind}", (embed_dim,)) for kind in ("weight", "bias"))
        for linear, n_in, n_out in (("attn.c_attn", embed_dim, 3 * embed_dim), ("attn.c_proj", embed_dim, embed_dim),
                                    ("mlp.c_fc", embed_dim, hidden_dim), ("mlp.c_proj", hidden_dim, embed_dim)):  # fmt: skip
            yield f"{start}{linear}.weight", (n_in, n_out)
            yield f"{start}{linear}.bias", (n_out,)
    yield from ((f"transformer.ln_f.{kind}", (embed_dim,)) for kind in ("weight", "bias"))
    if not tie_weights:
        yield "lm_head.weight", (vocab_size, embed_dim)


def llama_shapes(vocab_size, embed_dim, num_layers, num_heads, num_kv_heads, head_dim, hidden_dim, tie_weights,
                 attention_bias, out_bias, **_):
    """Llama's, Mistral's and Qwen2's names and shapes, one weight after the other."""
    queries, keys = num_heads * head_dim, num_kv_heads * head_dim
    yield "model.embed_tokens.weight", (vocab_size, embed_dim)
    for start in (f"model.layers.{i}." for i in range(num_layers)):
        yield f"{start}input_layernorm.weight", (embed_dim,)
        yield f"{start}post_attention_layernorm.weight", (embed_dim,)
        for linear, n_in, n_out, bias in (
            ("self_attn.q_proj", embed_dim, queries, attention_bias), ("self_attn.k_proj", embed_dim, keys, attention_bias),
            ("self_attn.v_proj", embed_dim, keys, attention_bias), ("self_attn.o_proj", queries, embed_dim, out_bias),
            ("mlp.gate_proj", embed_dim, hidden_dim, False), ("mlp.up_proj", embed_dim, hidden_dim, False),
            ("mlp.down_proj", hidden_dim, embed_dim, False),
        ):  # fmt: skip
            yield f"{start}{linear}.weight", (n_out, n_in)
            if bias:
                yield f"{start}{linear}.bias", (n_out,)
    yield "model.norm.weight", (embed_dim,)
    if not tie_weights:
        yield "lm_head.weight", (vocab_size, embed_dim)


# Places: their name of each weight beside the memory of ours, in their shape


def gpt2_places(model):
    """GPT-2's names -> our arrays as GPT-2 sees them: a Conv1D keeps (in, out), our Linear (out, in)."""
    places = {"transformer.wte.weight": model.token_embedding.weight.data,
              "transformer.wpe.weight": original(model.position_embedding).weight.data}  # fmt: skip
    for i, block in enumerate(model.blocks):
        attention, start = original(block.attention), f"transformer.h.{i}."
        for name, norm in (("ln_1", block.norm1), ("ln_2", block.norm2)):
            places |= {f"{start}{name}.weight": norm.weight.data, f"{start}{name}.bias": norm.bias.data}
        for name, linear in (("attn.c_attn", attention.qkv_proj), ("attn.c_proj", attention.out_proj),
                             ("mlp.c_fc", block.mlp.up_proj), ("mlp.c_proj", block.mlp.down_proj)):  # fmt: skip
            places |= {f"{start}{name}.weight": linear.weight.data.T, f"{start}{name}.bias": linear.bias.data}
    norm = original(model.norm)
    places |= {"transformer.ln_f.weight": norm.weight.data, "transformer.ln_f.bias": norm.bias.data}
    return places | head_of(model)


def llama_places(model):
    """Llama's and Qwen2's names -> our arrays; queries, keys and values lie one below the other in one of ours."""
    places = {"model.embed_tokens.weight": model.token_embedding.weight.data}
    ends = np.cumsum([model.num_heads, model.num_kv_heads, model.num_kv_heads]) * model.head_dim
    for i, block in enumerate(model.blocks):
        attention, start = original(block.attention), f"model.layers.{i}."
        places[f"{start}input_layernorm.weight"] = block.norm1.weight.data
        places[f"{start}post_attention_layernorm.weight"] = block.norm2.weight.data
        for kind, packed in (("weight", attention.qkv_proj.weight), ("bias", attention.qkv_proj.bias)):
            parts = [] if packed is None else np.split(packed.data, ends[:-1])  # views
            places |= {f"{start}self_attn.{part}_proj.{kind}": array for part, array in zip("qkv", parts)}
        places[f"{start}self_attn.o_proj.weight"] = attention.out_proj.weight.data
        if attention.out_proj.bias is not None:
            places[f"{start}self_attn.o_proj.bias"] = attention.out_proj.bias.data
        for name in ("gate_proj", "up_proj", "down_proj"):
            places[f"{start}mlp.{name}.weight"] = getattr(block.mlp, name).weight.data
    places["model.norm.weight"] = original(model.norm).weight.data
    return places | head_of(model)


def head_of(model):
    tied = model.head.weight is model.token_embedding.weight
    return {} if tied else {"lm_head.weight": model.head.weight.data}


@dataclass(frozen=True)
class Family:
    """How a family of models is described, named and built."""

    sizes: Callable  # config -> the sizes of our model, by name
    shapes: Callable  # **sizes -> (name, shape) of each weight
    build: Callable  # **sizes -> our model
    prefix: str  # of every name but the head's; a bare base model has none
    embedding: str

    def with_prefix(self, stored):
        """The weights by their full names, buffers left out."""
        found = {}
        for name, tensor in stored.items():
            full = name if name.startswith((self.prefix, "lm_head.")) else self.prefix + name
            if BUFFERS.fullmatch(name):
                continue
            if full in found:
                raise CheckpointError(f"{tensor.file}: {name} of shape {tensor.shape} is there with and without "
                                      f"{self.prefix!r} before it")  # fmt: skip
            found[full] = tensor
        return found


FAMILIES = {
    "gpt2": Family(gpt2_sizes, gpt2_shapes, build_gpt2, "transformer.", "transformer.wte.weight"),
    "llama": Family(llama_sizes, llama_shapes, build_llama, "model.", "model.embed_tokens.weight"),
    "mistral": Family(mistral_sizes, llama_shapes, build_llama, "model.", "model.embed_tokens.weight"),
    "qwen2": Family(qwen2_sizes, llama_shapes, build_llama, "model.", "model.embed_tokens.weight"),
}
ARCHITECTURES = {"GPT2LMHeadModel": "gpt2", "GPT2Model": "gpt2", "LlamaForCausalLM": "llama", "LlamaModel": "llama",
                 "MistralForCausalLM": "mistral", "MistralModel": "mistral", "Qwen2ForCausalLM": "qwen2",
                 "Qwen2Model": "qwen2"}  # fmt: skip


def family_of(config):
    """The family by `architectures`, or where that is absent by `model_type`."""
    named, kind = config.get("architectures"), config.get("model_type")
    kind = ARCHITECTURES.get(str(named[0])) if isinstance(named, list) and named else kind
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise config.error(f"unknown architecture {named or config.get('model_type')!r}; known are "
                           f"{', '.join(ARCHITECTURES)}")  # fmt: skip
    return FAMILIES[kind]


def gpt2_config(model):
    """What GPT-2's config.json says of our model."""
    if model.num_kv_heads != model.num_heads:
        raise CheckpointError(f"GPT-2 has a key head per query head; this GPT has {model.num_kv_heads} for "
                              f"{model.num_heads}, so no file of transformers holds it")  # fmt: skip
    dropout = {name: model.dropout.p for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
    return {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": model.embed_dim,
            "n_layer": model.num_layers, "n_head": model.num_heads, "n_positions": model.max_seq_len,
            "n_inner": model.blocks[0].mlp.up_proj.weight.shape[0], "activation_function": "gelu_new",
            "layer_norm_epsilon": original(model.norm).eps, **dropout}  # fmt: skip


def llama_config(model):
    """What Llama's, Mistral's or Qwen2's config.json says of our model."""
    block, rotary = model.blocks[0], original(model.position_embedding)
    attention = original(block.attention)
    bias, out_bias = attention.qkv_proj.bias is not None, attention.out_proj.bias is not None
    if out_bias and not bias:
        raise CheckpointError("a bias behind the heads alone (out_bias without attention_bias) is neither Llama nor Qwen2")
    if attention.window is not None and bias:
        raise CheckpointError(f"a window ({attention.window}) is Mistral's, which has no biases; this Llama has attention_bias")
    family, own = ("LlamaForCausalLM", "llama"), {"attention_bias": bias, "mlp_bias": False}
    if attention.window is not None:
        family, own = ("MistralForCausalLM", "mistral"), {"sliding_window": attention.window}
    elif bias and not out_bias:
        family, own = ("Qwen2ForCausalLM", "qwen2"), {}
    scaling = {"rope_type": "default"} if rotary.scaling is None else {"rope_type": "llama3", **rotary.scaling}
    return {"architectures": [family[0]], "model_type": family[1], "hidden_size": model.embed_dim,
            "intermediate_size": block.mlp.up_proj.weight.shape[0], "num_hidden_layers": model.num_layers,
            "num_attention_heads": model.num_heads, "num_key_value_heads": model.num_kv_heads,
            "head_dim": model.head_dim, "max_position_embeddings": model.max_seq_len, "rms_norm_eps": original(model.norm).eps,
            "hidden_act": "silu", "rope_parameters": {**scaling, "rope_theta": rotary.theta},
            "rope_theta": rotary.theta, "rope_scaling": None if rotary.scaling is None else scaling,  # transformers 4
            **own}  # fmt: skip


def places_of(model):
    """Their name of each weight -> our array in their shape, sharing its memory."""
    return llama_places(model) if isinstance(model, Llama) else gpt2_places(model)


def config_of(model):
    """The config.json of our model, as a dict."""
    config = llama_config(model) if isinstance(model, Llama) else gpt2_config(model)
    tied = model.head.weight is model.token_embedding.weight
    return {**config, "vocab_size": model.vocab_size, "tie_word_embeddings": tied, "bos_token_id": None,
            "eos_token_id": None, "dtype": "float32"}  # fmt: skip

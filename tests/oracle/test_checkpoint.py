"""Checkpoints against transformers: what save_pretrained wrote we run, what we wrote from_pretrained runs."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

from tinytorch.generation.kv_cache import disable_kv_cache, enable_kv_cache  # noqa: E402
from tinytorch.models.checkpoint import CheckpointError, load_checkpoint, save_checkpoint  # noqa: E402
from tinytorch.models.llama import Llama  # noqa: E402
from tinytorch.models.safetensors import read_safetensors  # noqa: E402
from tinytorch.models.transformer import GPT  # noqa: E402

V, S = 53, 64  # as in conftest.py
SCALED = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
IDS = np.random.default_rng(0).integers(0, V, (3, S))


@pytest.fixture(scope="module", params=["gpt2", "gpt2 untied", "llama", "llama wide", "llama biased", "llama 3",
                                        "qwen2", "qwen2 untied", "mistral"])
def theirs(request, their_model):
    return their_model(request.param)


def assert_same_logits(ours, theirs, atol=1e-4):
    with torch.no_grad():
        expected = theirs(torch.tensor(IDS)).logits.float().numpy()
    got = ours(IDS).numpy()
    assert got.shape == expected.shape == (3, S, V) and got.dtype == np.float32
    assert expected.std() > 0.3, "logits that are all alike would prove nothing"
    np.testing.assert_allclose(got, expected, atol=atol)


def assert_same_text(ours, theirs):
    prompt = [3, 14, 15, 9, 2]
    with torch.no_grad():
        expected = theirs.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, 5, dtype=torch.long),
                                   max_new_tokens=20, do_sample=False)[0].tolist()  # fmt: skip
    assert len(expected) == 25 and ours.generate(prompt, 20) == expected


def edit(directory, change):
    """Rewrite config.json by `change(values)`."""
    values = json.loads((directory / "config.json").read_text())
    change(values)
    (directory / "config.json").write_text(json.dumps(values))


def test_logits_and_greedy_text(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    ours = load_checkpoint(tmp_path)
    assert not ours.training and type(ours) is (GPT if theirs.config.model_type == "gpt2" else Llama)
    assert_same_logits(ours, theirs)
    assert_same_text(ours, theirs)
    assert_same_logits(load_checkpoint(tmp_path / "model.safetensors"), theirs)


def test_what_we_save_theirs_loads(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_checkpoint(tmp_path / "theirs")
    save_checkpoint(ours, tmp_path / "ours")
    again, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True, attn_implementation="eager")
    assert not any(info.values()), info
    assert_same_logits(ours, again.eval())
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").__class__ is type(theirs)
    back = load_checkpoint(tmp_path / "ours")
    np.testing.assert_array_equal(back(IDS).numpy(), ours(IDS).numpy())


@pytest.mark.parametrize("kind", ["gpt2", "llama 3", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision_files_become_float32(kind, dtype, their_model, tmp_path):
    their_model(kind).to(dtype).save_pretrained(tmp_path)
    family = type(their_model(kind))  # read anew, since .to(dtype) rounded the angles of the rotary embedding, too
    theirs = family.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    ours = load_checkpoint(tmp_path)
    assert {parameter.dtype for parameter in ours.parameters()} == {np.dtype(np.float32)}
    assert_same_logits(ours, theirs)
    assert_same_text(ours, theirs)


def test_shards(theirs, tmp_path):
    theirs.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3 and not (tmp_path / "model.safetensors").exists()
    assert_same_logits(load_checkpoint(tmp_path), theirs)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2"])
def test_names_without_prefix_and_buffers_and_a_tied_head(kind, their_model, tmp_path):
    theirs = their_model(kind)
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {name.removeprefix("transformer.").removeprefix("model."): tensor
               for name, tensor in safetensors_torch.load_file(path).items()}  # fmt: skip
    if kind == "gpt2":
        tensors |= {"h.0.attn.bias": torch.ones(1, 1, S, S).bool(), "h.2.attn.masked_bias": torch.tensor(-1e4)}
        tensors |= {"lm_head.weight": tensors["wte.weight"].clone()}
    else:
        tensors["layers.1.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    safetensors_torch.save_file(tensors, path)
    assert_same_logits(load_checkpoint(tmp_path), theirs)
    if kind == "gpt2":
        tensors["lm_head.weight"][3, 4] += 1
        safetensors_torch.save_file(tensors, path)
        with pytest.raises(CheckpointError, match="lm_head.weight.*tie_word_embeddings"):
            load_checkpoint(tmp_path)


@pytest.mark.parametrize("kind", ["llama wide", "llama 3"])
def test_rope_as_transformers_4_wrote_it(kind, their_model, tmp_path):
    theirs = their_model(kind)
    theirs.save_pretrained(tmp_path)

    def older(values):
        rope = values.pop("rope_parameters")
        values["rope_theta"] = rope.pop("rope_theta")
        values["rope_scaling"] = None if rope["rope_type"] == "default" else rope
        if kind == "llama 3":
            values["rope_scaling"]["type"] = values["rope_scaling"].pop("rope_type")
            values.pop("head_dim")

    edit(tmp_path, older)
    assert_same_logits(load_checkpoint(tmp_path), theirs)


def test_the_reader_reads_what_the_library_wrote(tmp_path):
    path = tmp_path / "x.safetensors"
    theirs = {"a": torch.randn(2, 3), "b": torch.randn(3, 5).half(), "c": torch.randn(7).bfloat16(),
              "empty": torch.ones(2, 0)}  # fmt: skip
    safetensors_torch.save_file(theirs, path)
    ours = read_safetensors(path)
    assert sorted(ours) == sorted(theirs)
    for name, tensor in theirs.items():
        place = np.full(ours[name].shape, 9, np.float32)
        ours[name].copy_into(place)
        assert place.shape == tuple(tensor.shape), name
        np.testing.assert_array_equal(place, tensor.float().numpy(), err_msg=name)


@pytest.mark.parametrize("cached", [False, True])
def test_a_model_of_our_own_with_and_without_a_cache_enabled(cached, tmp_path):
    ours = Llama(V, 24, 2, 6, S, num_kv_heads=2, rope_scaling=SCALED, rng=np.random.default_rng(0)).eval()
    if cached:
        enable_kv_cache(ours)
    save_checkpoint(ours, tmp_path / "m")
    if cached:
        disable_kv_cache(ours)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "m").eval()
    with torch.no_grad():
        np.testing.assert_allclose(ours(IDS).numpy(), theirs(torch.tensor(IDS)).logits.numpy(), atol=1e-5)

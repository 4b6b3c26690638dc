"""Checkpoints that are damaged, foreign or hostile: every error names the file and the tensor, and nothing is run."""

import json
import os
import shutil
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinytorch.core import training
from tinytorch.core.training import CheckpointError
from tinytorch.models import safetensors
from tinytorch.models.checkpoint import load_checkpoint, save_checkpoint
from tinytorch.models.llama import Llama
from tinytorch.models.safetensors import read_safetensors
from tinytorch.models.transformer import GPT, MLP

SCALED = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
IDS = np.arange(10).reshape(2, 5)


def random_model(kind):
    rng = np.random.default_rng(3)
    sizes = dict(vocab_size=11, embed_dim=12, num_layers=2, num_heads=6, max_seq_len=16, rng=rng)
    model = {
        "gpt2": lambda: GPT(**sizes),
        "gpt2 untied": lambda: GPT(**sizes, tie_weights=False, dropout=0.1),
        "llama": lambda: Llama(**sizes, num_kv_heads=2, hidden_dim=20),
        "llama 3": lambda: Llama(**sizes, head_dim=4, rope_theta=50.0, rope_scaling=SCALED, tie_weights=True),
        "llama biased": lambda: Llama(**sizes, attention_bias=True, out_bias=True, norm_eps=0.01),
        "qwen2": lambda: Llama(**sizes, num_kv_heads=2, head_dim=4, attention_bias=True),
        "mistral": lambda: Llama(**sizes, num_kv_heads=2, window=3),
    }[kind]()
    for parameter in model.parameters():
        parameter.data += 0.2 * rng.standard_normal(parameter.shape, dtype=np.float32)
    return model.eval()


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / request.param
    save_checkpoint(random_model(request.param), folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of a good checkpoint, to damage."""
    return shutil.copytree(saved, tmp_path / saved.name)


def refused(path, *fragments):
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    for fragment in fragments:
        assert fragment in str(caught.value), f"{fragment!r} is not in {caught.value}"


def edit(folder, **values):
    """Change values of config.json; None takes one out."""
    config = json.loads((folder / "config.json").read_text()) | values
    config = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def rewrite(folder, change):
    """Change the tensors of the file by `change(tensors)`."""
    tensors, metadata = training.load_checkpoint(folder / "model.safetensors")
    change(tensors)
    training.save_checkpoint(folder / "model.safetensors", tensors, metadata)


def write_raw(path, header, numbers=b""):
    """A safetensors file from a header as it is."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + numbers)


def embedding_of(folder):
    return "transformer.wte.weight" if folder.name == "gpt2" else "model.embed_tokens.weight"


@pytest.mark.parametrize("kind", ["gpt2", "gpt2 untied", "llama", "llama 3", "llama biased", "qwen2", "mistral"])
def test_saved_and_loaded_is_the_same(kind, tmp_path):
    ours = random_model(kind)
    save_checkpoint(ours, tmp_path / "m")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["config.json", "m", "model.safetensors"]
    back = load_checkpoint(tmp_path / "m")
    assert type(back) is type(ours) and not back.training and back.tie_weights == ours.tie_weights
    expected, got = ours.state_dict(), back.state_dict()
    assert list(got) == list(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)
    np.testing.assert_array_equal(back(IDS).numpy(), ours(IDS).numpy())


def test_the_model_owns_its_weights(folder):
    model = load_checkpoint(folder)
    before = (folder / "model.safetensors").read_bytes()
    for parameter in model.parameters():
        assert parameter.data.flags.writeable and parameter.data.base is None and parameter.data.flags.c_contiguous
        parameter.data += 1
    assert (folder / "model.safetensors").read_bytes() == before
    save_checkpoint(model, folder)
    np.testing.assert_array_equal(load_checkpoint(folder)(IDS).numpy(), model(IDS).numpy())


def test_saving_into_a_directory_keeps_its_other_files(folder):
    (folder / "tokenizer.json").write_text("{}")
    save_checkpoint(random_model("qwen2"), folder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert load_checkpoint(folder).blocks[0].attention.qkv_proj.bias is not None


@pytest.mark.parametrize("exists", [False, True])
def test_what_a_text_needs_goes_along(exists, folder, tmp_path):
    edit(folder, bos_token_id=1, eos_token_id=[2, 3])
    for name in ("tokenizer.json", "merges.txt", "generation_config.json", "README.md"):
        (folder / name).write_text(f"this is {name}")
    new = tmp_path / "new"
    if exists:
        save_checkpoint(random_model("gpt2"), new)
        (new / "tokenizer.json").write_text("old")
    save_checkpoint(load_checkpoint(folder), new, source=folder)
    names = ["config.json", "generation_config.json", "merges.txt", "model.safetensors", "tokenizer.json"]
    assert sorted(path.name for path in new.iterdir()) == names
    assert all((new / name).read_text() == f"this is {name}" for name in ("tokenizer.json", "generation_config.json"))
    config = json.loads((new / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, [2, 3], None)
    save_checkpoint(load_checkpoint(new), new, source=new)
    assert sorted(path.name for path in new.iterdir()) == names
    with pytest.raises(CheckpointError, match="config.json is missing"):
        save_checkpoint(random_model("gpt2"), new, source=tmp_path / "nowhere")


@pytest.mark.parametrize("exists", [False, True])
def test_a_save_that_fails_leaves_all_as_it_was(exists, folder, monkeypatch):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    target = folder if exists else folder.parent / "new"

    def full(path, chunks):
        raise OSError("no space left on device")

    # the weights are written, config.json fails
    monkeypatch.setattr("tinytorch.models.checkpoint.write_atomically", full)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(random_model("gpt2"), target)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert list(folder.parent.iterdir()) == [folder]


def test_what_cannot_be_saved(tmp_path):
    sick = random_model("llama")
    sick.blocks[1].mlp.up_proj.weight.data[2, 3] = np.nan
    sizes = (11, 12, 1, 6, 16)
    for model, fragment in [(sick, "layers.1.mlp.up_proj.weight of shape (20, 12)"), (MLP(4), "MLP"),
                            (GPT(*sizes, num_kv_heads=2), "key head"),
                            (Llama(*sizes, out_bias=True), "out_bias"),
                            (Llama(*sizes, attention_bias=True, window=3), "window (3)")]:  # fmt: skip
        with pytest.raises(CheckpointError) as caught:
            save_checkpoint(model, tmp_path / "m")
        assert fragment in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_that_is_missing_extra_or_misshapen(folder):
    name, file = embedding_of(folder), "model.safetensors"
    rewrite(folder, lambda tensors: tensors.update({name: np.zeros((11, 13), np.float32)}))
    refused(folder, file, name, "(11, 13)", "(11, 12)")
    rewrite(folder, lambda tensors: tensors.update({name: np.zeros((12, 11), np.float32)}))
    refused(folder, file, name, "(12, 11)", "(11, 12)")
    rewrite(folder, lambda tensors: tensors.pop(name))
    refused(folder, file, name, "lacks", "(11, 12)")
    zeros = {name: np.zeros((11, 12), np.float32), "more.weight": np.zeros((2, 3), np.float32)}
    rewrite(folder, lambda tensors: tensors.update(zeros))
    refused(folder, file, "more.weight", "(2, 3)")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite(value, folder):
    def spoil(tensors):
        tensors[embedding_of(folder)][4, 5] = value

    rewrite(folder, spoil)
    refused(folder, "model.safetensors", embedding_of(folder), "(11, 12)", str(value), "(4, 5)")


@pytest.mark.parametrize("dtype", [np.float64, np.int32, np.int8, np.bool_])
def test_a_dtype_that_is_none_of_ours(dtype, folder):
    name = embedding_of(folder)
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name].astype(dtype)}))
    refused(folder, "model.safetensors", name, training.CODES[np.dtype(dtype)], "(11, 12)", "BF16")


def test_both_names_of_one_tensor(folder):
    name = embedding_of(folder)
    rewrite(folder, lambda tensors: tensors.update({name.partition(".")[2]: tensors[name]}))
    refused(folder, "model.safetensors", name.partition(".")[2], "with and without")


@given(cut=st.integers(0, 4000))
def test_a_file_that_is_cut_off_anywhere(cut, saved, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cut")
    shutil.copy(saved / "config.json", folder)
    whole = (saved / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) * cut // 4001])
    refused(folder, "model.safetensors", "cut off")


@given(place=st.integers(0, 1500), byte=st.integers(0, 255))
def test_a_changed_byte_in_the_header_is_an_error_or_harmless(place, byte, saved, tmp_path_factory):
    folder = tmp_path_factory.mktemp("changed")
    shutil.copy(saved / "config.json", folder)
    whole = bytearray((saved / "model.safetensors").read_bytes())
    whole[place] = byte
    (folder / "model.safetensors").write_bytes(whole)
    try:
        assert load_checkpoint(folder)(IDS).shape == (2, 5, 11)
    except CheckpointError as error:
        assert "model.safetensors" in str(error)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "fragments"),
    [
        ({"a": ENTRY, "b": ENTRY | {"data_offsets": [4, 12]}}, ["b begins at byte 4"]),  # overlap
        ({"a": ENTRY, "b": ENTRY | {"data_offsets": [12, 20]}}, ["b,", "(2,)", "20", "16"]),
        ({"a": ENTRY, "b": ENTRY}, ["begins at byte 0"]),
        ({"a": ENTRY | {"data_offsets": [0, 16]}}, ["a has 16 bytes", "[2] of F32"]),
        ({"a": ENTRY | {"shape": [2**40], "data_offsets": [0, 2**42]}}, ["a, F32", str(2**40), "cut off"]),
        ({"a": ENTRY | {"shape": [-2]}}, ["header"]),
        ({"a": ENTRY | {"dtype": "F8_E4M3", "data_offsets": [0, 16]}}, ["a holds F8_E4M3"]),
        ({"a": {"dtype": "F32"}}, ["header"]),
        ({"a": ENTRY}, ["16"]),  # a tail
        ([], ["header"]),
        (b"{", ["cut off"]),
        (b"{]", ["header"]),
        (b"\xff\xfe{}", ["header"]),
        (b"[" * 100_000, ["header"]),
    ],
)
def test_a_header_that_lies(header, fragments, tmp_path):
    path = tmp_path / "lies.safetensors"
    write_raw(path, header, bytes(16))
    with pytest.raises(CheckpointError) as caught:
        read_safetensors(path)
    for fragment in ["lies.safetensors", *fragments]:
        assert fragment in str(caught.value), f"{fragment!r} is not in {caught.value}"


def test_a_header_longer_than_the_file(tmp_path):
    path = tmp_path / "long.safetensors"
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(CheckpointError, match=f"long.safetensors.*{2**62} bytes.*10"):
        read_safetensors(path)


@pytest.mark.parametrize("bits", [0x3F80, 0xC049, 0x0001, 0x7F7F, 0x8000])
def test_bfloat16_is_the_upper_half_of_a_float32(bits, tmp_path):
    path = tmp_path / "b.safetensors"
    write_raw(path, {"a": ENTRY | {"dtype": "BF16", "data_offsets": [0, 4]}}, struct.pack("<HH", bits, 0))
    place = np.full(2, 7, np.float32)
    read_safetensors(path)["a"].copy_into(place)
    assert place.tolist() == [struct.unpack("<f", struct.pack("<I", bits << 16))[0], 0]


CONFIGS = {
    "gpt2": [
        ({"activation_function": "gelu"}, "activation_function is 'gelu'"),
        ({"activation_function": "relu"}, "activation_function is 'relu'"),
        ({"n_embd": None}, "n_embd"),
        ({"n_head": 5}, "num_heads (5)"),
        ({"n_layer": 10**9}, "lacks the tensor transformer.h.2."),
        ({"n_positions": True}, "n_positions"),
        ({"vocab_size": 10**12}, f"({10**12}, 12)"),
        ({"scale_attn_weights": False}, "scale_attn_weights"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"layer_norm_epsilon": "small"}, "layer_norm_epsilon"),
    ],
    "llama": [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"num_key_value_heads": 4}, "num_kv_heads (4)"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"head_dim": 3}, "(18, 12)"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type is 'yarn'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ({"rope_parameters": SCALED | {"rope_type": "llama3", "low_freq_factor": 9.0}}, "low_freq_factor"),
        ({"rope_parameters": {"rope_theta": "big"}}, "rope_theta"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "max_window_layers": 1}, "sliding_window"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"intermediate_size": 2**50}, f"({2**50}, 12)"),
    ],
}


def test_a_configuration_that_is_not_ours(folder):
    config = (folder / "config.json").read_text()
    for values, fragment in CONFIGS[folder.name]:
        (folder / "config.json").write_text(config)
        edit(folder, **values)
        refused(folder, "config.json", fragment)


ODD = st.sampled_from(
    [None, True, 0, -1, 2.5, 10**30, float("inf"), "1", [], ["x"], [[]], {}, {"rope_type": []}, {"a": {}}]
)


@given(data=st.data())
def test_an_odd_value_in_the_configuration_is_an_error_or_harmless(data, saved, tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd") / saved.name
    shutil.copytree(saved, folder)
    if data.draw(st.booleans()) and saved.name == "llama":
        edit(folder, architectures=["Qwen2ForCausalLM"], use_sliding_window=True, sliding_window=4)
    more = ["layer_types", "max_window_layers", "sliding_window", "n_inner", "partial_rotary_factor", "attention_bias"]
    names = st.sampled_from(sorted(json.loads((folder / "config.json").read_text())) + more)
    edit(folder, **data.draw(st.dictionaries(names, ODD, min_size=1, max_size=2)))
    try:
        assert load_checkpoint(folder)(IDS).shape == (2, 5, 11)
    except CheckpointError as error:
        assert "config.json" in str(error)


@pytest.mark.parametrize("value, window", [(3, 3), (99, 99), (None, None), ("absent", 4096)])
def test_how_far_a_mistral_looks_back(value, window, tmp_path):
    model = random_model("mistral")
    save_checkpoint(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("sliding_window") == 3 and config["architectures"] == ["MistralForCausalLM"]
    config |= {} if value == "absent" else {"sliding_window": value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_checkpoint(tmp_path)
    assert loaded.window == loaded.blocks[1].attention.window == window
    assert (loaded(IDS).numpy() == model(IDS).numpy()).all(axis=(0, 2)).tolist() == [True] * 3 + [window == 3] * 2


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "3"])
def test_a_window_that_is_none(value, tmp_path):
    save_checkpoint(random_model("mistral"), tmp_path)
    edit(tmp_path, sliding_window=value)
    refused(tmp_path, "config.json", "sliding_window", repr(value))


def test_an_architecture_that_is_unknown(folder):
    edit(folder, architectures=["MambaForCausalLM"])
    refused(folder, "config.json", "MambaForCausalLM", "LlamaForCausalLM")
    edit(folder, architectures=None)  # then model_type says it
    assert load_checkpoint(folder)(IDS).shape == (2, 5, 11)
    for kind in (None, "mamba", ["gpt2"]):
        edit(folder, model_type=kind)
        refused(folder, "config.json", "unknown architecture")


@pytest.mark.parametrize("text", ["{", "", "[]", '"gpt2"', "[" * 100_000, "\x00"])
def test_a_configuration_that_is_no_json_object(text, folder):
    (folder / "config.json").write_text(text)
    refused(folder, "config.json")
    (folder / "config.json").unlink()
    refused(folder, "config.json", "missing")


def shard(folder, change=lambda weight_map: None):
    """The checkpoint in two shards; `change(weight_map)` edits the index."""
    tensors, _ = training.load_checkpoint(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, files = sorted(tensors), ("one.safetensors", "two.safetensors")
    halves = dict(zip(files, (names[::2], names[1::2])))
    for file, half in halves.items():
        training.save_checkpoint(folder / file, {name: tensors[name] for name in half})
    weight_map = {name: file for file, half in halves.items() for name in half}
    change(weight_map)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return names


def test_shards(folder):
    expected = load_checkpoint(folder)(IDS).numpy()
    names = shard(folder)
    np.testing.assert_array_equal(load_checkpoint(folder)(IDS).numpy(), expected)
    (folder / "two.safetensors").unlink()
    refused(folder, "index.json", "two.safetensors", names[1])


ELSEWHERE = ["../one.safetensors", "sub/one.safetensors", "..", "c:\\one.safetensors", "one.bin", ""]


@pytest.mark.parametrize("place", ELSEWHERE)
def test_an_index_that_points_elsewhere(place, folder):
    names = shard(folder, lambda weight_map: weight_map.update({min(weight_map): place}))
    refused(folder, "index.json", names[0], repr(place))


def test_an_index_that_lies(folder):
    names = shard(folder, lambda weight_map: weight_map.update({"more": "one.safetensors"}))
    refused(folder, "one.safetensors", "more", "index.json")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    del index["weight_map"]["more"], index["weight_map"][names[0]]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "one.safetensors", names[0], "index.json")
    for text in ("{", "{}", '{"weight_map": {"a": 1}}', "[]"):
        (folder / "model.safetensors.index.json").write_text(text)
        refused(folder, "index.json")


def test_no_pickle_ever(folder, tmp_path):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin", "pickle", "model.safetensors")
    refused(folder / "pytorch_model.bin", "pytorch_model.bin", "pickle")
    (folder / "pytorch_model.bin").unlink()
    refused(folder, "model.safetensors")
    refused(tmp_path / "nowhere", "nowhere")
    save_checkpoint(random_model("gpt2"), tmp_path / "named.pt")  # a directory may be called as it likes
    assert load_checkpoint(tmp_path / "named.pt")(IDS).shape == (2, 5, 11)


# What would never end, or fill the memory


@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
def test_a_configuration_that_is_no_file_is_not_read(kind, folder):
    config = folder / "config.json"
    config.unlink()
    if kind == "folder":
        config.mkdir()
    elif os.name == "nt":
        pytest.skip("pipes and devices of POSIX")
    elif kind == "pipe":
        os.mkfifo(config)
    else:
        config.symlink_to("/dev/null")  # /dev/zero would fill the memory
    refused(folder, str(config), "should be a file")


@pytest.mark.parametrize(("limit", "file"), [("JSON", "config.json"), ("HEADER", "model.safetensors")])
def test_sizes_that_no_model_has_are_not_read(limit, file, folder, monkeypatch):
    monkeypatch.setattr(safetensors, f"LARGEST_{limit}", 99)
    refused(folder, str(folder / file), "more than 99 are not read")

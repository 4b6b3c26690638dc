"""`tito generate` and `tito model info` as a user runs them, on what transformers' save_pretrained wrote."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")

from tinytorch.core.tensor import Tensor  # noqa: E402
from tinytorch.models.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402
from tinytorch.models.tokenizer import load_tokenizer  # noqa: E402
from tito.jobs.generate import PenalisedHead  # noqa: E402
from tito.jobs.text import text_of  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[2]
END = "<|endoftext|>"
PROMPT = "The café of 2024: \N{HOT BEVERAGE}"
TEXT = ["The class statement, the for statement and the café.", "Numbers: 1 2 3, 2024. It's \N{HOT BEVERAGE}!"] * 3
LARGER = {"gpt2": dict(n_embd=88, n_layer=4)}  # than conftest.py's, else its text is one token for ever


def trained(pattern=None, first=None):
    """A tokenizer of the library tokenizers, trained here; `pattern` cuts the text, `first` begins every prompt."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    whole = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    cut = [] if pattern is None else [tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")]
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([*cut, whole]) if cut else whole
    bpe.decoder = tokenizers.decoders.ByteLevel()
    special = [END] if first is None else [END, first]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, show_progress=False,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    bpe.train_from_iterator(TEXT, trainer)
    if first:
        bpe.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{first} $A", special_tokens=[(first, bpe.token_to_id(first))]
        )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, bos_token=first)


WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")  # fmt: skip


def of_characters():
    """As Llama 2 has it: merges of characters, bytes for the others, and a space before the first word."""
    words = ["\u2581The", "\u2581class", "\u2581c", "\u2581\u2581", "or", "\u2581or", "2024"]
    letters = sorted(set("".join(words) + "abdeghijkmnpqruvwxyz:.,"))
    vocab = {"<unk>": 0, "<s>": 1, END: 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    merges, names = [], list(letters)
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in names:
                merges.append((word[: end - 1], word[end - 1]))
                names.append(word[:end])
    vocab |= {name: 259 + i for i, name in enumerate(names)}
    bpe = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    normal = tokenizers.normalizers
    bpe.normalizer = normal.Sequence([normal.Prepend("\u2581"), normal.Replace(" ", "\u2581")])
    steps = tokenizers.decoders
    bpe.decoder = steps.Sequence(
        [steps.Replace("\u2581", " "), steps.ByteFallback(), steps.Fuse(), steps.Strip(" ", 1, 0)]
    )
    bpe.add_special_tokens(["<unk>", "<s>", END])
    bpe.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, bos_token="<s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def toks():
    """A tokenizer for each kind, as its family has them."""
    newer = {"gpt2": trained(), "llama 3": trained(WORDS % "{1,3}", "<|begin|>"), "qwen2": trained(WORDS % "")}
    return newer | dict.fromkeys(("llama", "llama wide", "mistral"), of_characters())


@pytest.fixture
def saved(their_model, toks, tmp_path):
    """Makes a directory with a model of transformers and its tokenizer."""

    def save(kind, dtype=torch.float32, **options):
        model = their_model(kind, vocab_size=len(toks[kind]), **LARGER.get(kind, {}))
        model.to(dtype).save_pretrained(tmp_path / "a model", **options)
        toks[kind].save_pretrained(tmp_path / "a model")
        return tmp_path / "a model"

    return save


def their_text(folder, count, prompt=PROMPT):
    """What transformers makes of the directory, greedily: the ids of the prompt, the new ones, and the text."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    asked = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**asked, max_new_tokens=count, do_sample=False)[0].tolist()
    prompt_len = asked["input_ids"].shape[1]
    return ids[:prompt_len], ids[prompt_len:], tokenizer.decode(ids, skip_special_tokens=True)


def tito(*arguments):
    """Run the command; (text, figures)."""
    done = subprocess.run(
        [sys.executable, "-m", "tito", *map(str, arguments)], cwd=REPOSITORY, capture_output=True, timeout=240,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode(), done.stderr.decode()


def edit(path, **values):
    """Change values in a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("gpt2", {}),
        ("llama", {}),
        ("llama 3", {}),
        ("mistral", {}),
        ("qwen2", {}),
        ("llama 3", dict(max_shard_size="10KB", dtype=torch.bfloat16)),
        ("qwen2", dict(dtype=torch.float16)),
    ],
)
def test_the_text_is_that_of_transformers(kind, options, saved):
    folder = saved(kind, **options)
    assert bool(list(folder.glob("*-of-*"))) is ("max_shard_size" in options)
    prompt, new, expected = their_text(folder, 30)
    assert len(new) == 30 and len(set(new)) > 8, "a constant text would prove little"
    text, figures = tito("generate", PROMPT, "--model", folder, "--tokens", 30)
    assert text == expected + "\n"
    assert re.fullmatch(rf"\nprompt: {len(prompt)} tokens, [\d.]+ tokens/s; new: 30 tokens, [\d.]+ tokens/s; "
                        r"KV cache: [\d,]+ bytes \(float32\)\n", figures), figures  # fmt: skip
    if not options:
        assert tito("generate", PROMPT, "--model", folder, "--tokens", 30, "--no-cache")[0] == text


@pytest.mark.parametrize("kind", ["gpt2", "llama", "llama 3", "qwen2"])
def test_text_that_grows_is_the_text_of_all_ids(kind, toks, tmp_path):
    toks[kind].save_pretrained(tmp_path)
    ours, rng = load_tokenizer(tmp_path), np.random.default_rng(0)
    for length in range(60):
        ids = rng.integers(0, len(toks[kind]) + 2, length).tolist()  # special ones, and two that nothing has
        growing = text_of(ours)
        shown = "".join(map(growing.add, ids)) + growing.end()
        assert shown == toks[kind].decode(ids, skip_special_tokens=True), ids


@pytest.mark.parametrize("form", ["one", "several", "in config.json"])
def test_the_text_ends_where_transformers_ends_it(form, saved, tmp_path):
    folder = saved("llama 3")
    _, new, _ = their_text(folder, 30)
    end = next(i for i in new[6:] if i not in new[:6])
    edit(folder / "generation_config.json", eos_token_id=[1, end] if form == "several" else end)
    if form == "in config.json":
        edit(folder / "config.json", eos_token_id=end)
        (folder / "generation_config.json").unlink()
    _, ended, expected = their_text(folder, 30)
    assert 6 < len(ended) < 30 and ended[-1] == end
    text, figures = tito("generate", PROMPT, "--model", folder, "--tokens", 30)
    assert text == expected + "\n"
    assert f"new: {len(ended)} tokens" in figures and "the model ended the text" in figures
    if form == "several":
        return
    save_checkpoint(load_checkpoint(folder), tmp_path / "again", source=folder)
    assert their_text(tmp_path / "again", 30)[1:] == (ended, expected)
    assert tito("generate", PROMPT, "--model", tmp_path / "again", "--tokens", 30)[0] == text


def test_a_special_token_ends_a_text_unseen(saved):
    folder = saved("qwen2")
    model = load_checkpoint(folder)
    model.token_embedding.weight.data[0] *= 9  # the head, too: END is likely
    save_checkpoint(model, folder)
    edit(folder / "generation_config.json", eos_token_id=0)
    _, new, expected = their_text(folder, 30, PROMPT + END + "The")
    assert new[-1] == 0 and END not in expected
    assert tito("generate", PROMPT + END + "The", "--model", folder)[0] == expected + "\n"


def test_the_repetition_penalty_of_the_authors(saved):
    folder = saved("gpt2")
    *_, plain = their_text(folder, 30)
    edit(folder / "generation_config.json", repetition_penalty=1.3)
    *_, expected = their_text(folder, 30)
    assert expected != plain
    assert tito("generate", PROMPT, "--model", folder, "--tokens", 30)[0] == expected + "\n"


def test_the_penalty_alone():
    logits, ids = np.random.default_rng(0).standard_normal((1, 50), dtype=np.float32), [3, 14, 15, 9, 3]
    processor = transformers.RepetitionPenaltyLogitsProcessor(1.7)
    expected = processor(torch.tensor([ids]), torch.tensor(logits)).numpy()
    assert (logits[0, ids] < 0).any() and (logits[0, ids] > 0).any()
    got = PenalisedHead(lambda x: Tensor(x), ids, 1.7)(logits.copy()).numpy()
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("gpt2", torch.float32), ("llama wide", torch.bfloat16), ("mistral", torch.float32), ("qwen2", torch.float16)],
)
def test_what_info_tells(kind, dtype, saved, toks):
    folder = saved(kind, dtype, max_shard_size="20KB")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = theirs.config
    cache = theirs(torch.tensor([[1, 2, 3, 4]]), use_cache=True).past_key_values
    layers = [layer.keys.shape for layer in cache.layers]
    per_token = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) // 4
    count = theirs.num_parameters()
    files = list(folder.glob("*.safetensors"))
    facts = json.loads(tito("model", "info", folder, "--json")[0])
    free = facts.pop("free_memory_bytes")
    assert free > 0 and facts == {
        "architecture": type(theirs).__name__,
        "parameters": count,
        "dtypes": [str(dtype).removeprefix("torch.")],
        "files": len(files),
        "bytes_on_disk": sum(file.stat().st_size for file in files),
        "bytes_in_memory": 4 * count,
        "vocab_size": config.vocab_size,
        "max_seq_len": config.max_position_embeddings,
        "window": getattr(config, "sliding_window", None),
        "num_layers": len(layers),
        "embed_dim": config.hidden_size,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": layers[0][1],
        "head_dim": layers[0][3],
        "tie_weights": config.tie_word_embeddings,
        "cache_bytes_per_token": {"float32": per_token, "float16": per_token // 2},
        "tokens_that_fit": config.max_position_embeddings,
        "tokenizer_size": len(toks[kind]),
    }

"""`tito generate --model` and `tito model info` as a user runs them: output, endings, refusals."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from tinytorch.models.architectures import llama_shapes
from tinytorch.models.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from tinytorch.models.llama import Llama
from tinytorch.text.tokenization import byte_letters
from tito.jobs import generate, model_info

REPOSITORY = Path(__file__).resolve().parents[2]
END = 256  # its id; the ids before it are bytes
PROMPT = "The class"
S = 64


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A Llama of random weights whose tokens are bytes, in the files of transformers."""
    folder = tmp_path_factory.mktemp("models") / "a Llama"
    model = Llama(END + 1, 24, 2, 6, S, num_kv_heads=2, rng=np.random.default_rng(0)).eval()
    for parameter in model.parameters():
        parameter.data[...] += 0.3 * np.random.default_rng(parameter.size).standard_normal(parameter.shape)
    save_checkpoint(model, folder)
    vocabulary = {letter: byte for byte, letter in enumerate(byte_letters())} | {"<|end|>": END}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    named = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy, to change."""
    return shutil.copytree(saved, tmp_path / "m")


COMMAND = [sys.executable, "-m", "tito"]
HERE = {"cwd": REPOSITORY, "env": {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONIOENCODING": "utf-8"}}


def tito(*arguments, code=0, **options):
    """Run the command; (stdout, stderr), with every line break as it came."""
    given = HERE | ({} if "input" in options else {"stdin": subprocess.DEVNULL}) | options
    done = subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, timeout=240, **given)
    out, err = done.stdout.decode("utf-8"), done.stderr.decode("utf-8")
    assert done.returncode == code and "Traceback" not in err, f"exit code {done.returncode}\n{out}\n{err}"
    return out, err


def continued(folder, count, prompt=PROMPT, **options) -> bytes:
    """The bytes of the prompt and its continuation, from the model on its own, without a cache."""
    return bytes(load_checkpoint(folder).generate(list(prompt.encode()), count, **options))


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


class TestText:
    def test_stdout_holds_the_text_alone_and_stderr_the_figures(self, saved):
        text, figures = tito("generate", PROMPT, "--model", saved, "--tokens", "30")
        assert text == continued(saved, 30).decode(errors="replace") + "\n"
        found = re.fullmatch(r"\nprompt: 9 tokens, (\S+) tokens/s; new: 30 tokens, (\S+) tokens/s; "
                             r"KV cache: (\S+) bytes \(float32\)\n", figures)  # fmt: skip
        assert found, figures
        assert float(found[1]) > 0 and float(found[2]) > 0
        assert found[3] == f"{2 * 2 * 2 * (9 + 30) * 4 * 4:,}"  # K and V, layers, heads, tokens, head_dim, bytes

    @pytest.mark.parametrize("ending", [b"", b"\n", b"\r\n"])
    def test_the_prompt_from_stdin(self, saved, ending):
        text, _ = tito("generate", "-", "--model", saved, "--tokens", "3", input="Ein Gerüst\n\nund".encode() + ending)
        assert text == continued(saved, 3, "Ein Gerüst\n\nund").decode(errors="replace") + "\n"

    def test_a_directory_is_found_from_where_the_user_is(self, saved):
        """And a prompt may look like an option."""
        text, _ = tito("generate", "--model", saved.name, "--tokens", "1", "--", "--help", cwd=saved.parent, code=1)
        assert text == ""  # outside of a course
        here = REPOSITORY / "src"
        path = os.path.relpath(saved, here)
        text, figures = tito("generate", "--model", path, "--tokens", "1", "--", "--help", cwd=here)
        assert text.startswith("--help") and "new: 1 token;" in figures

    def test_the_same_seed_the_same_text(self, saved):
        sampling = ("--temperature", "1.5", "--top-k", "50", "--tokens", "20", "--seed")
        first, again, other = (tito("generate", PROMPT, "--model", saved, *sampling, seed)[0] for seed in "112")
        assert first == again != other

    def test_other_caches(self, saved):
        plain = tito("generate", PROMPT, "--model", saved, "--tokens", "20")[0]
        half, figures = tito("generate", PROMPT, "--model", saved, "--tokens", "20", "--cache-dtype", "float16")
        assert half[:12] == plain[:12] and f"KV cache: {2 * 2 * 2 * 29 * 4 * 2:,} bytes (float16)" in figures
        window, figures = tito("generate", PROMPT, "--model", saved, "--tokens", "40", "--window", "8")
        assert window.startswith(PROMPT) and f"KV cache: {2 * 2 * 2 * (8 + 4) * 4 * 4:,} bytes" in figures
        assert "no KV cache" in tito("generate", PROMPT, "--model", saved, "--tokens", "2", "--no-cache")[1]

    def test_a_window_beyond_the_text_takes_no_room(self, saved):
        text, figures = tito("generate", PROMPT, "--model", saved, "--tokens", "5", "--window", 10**15)
        assert text == continued(saved, 5).decode(errors="replace") + "\n"
        assert f"KV cache: {128 * (9 + 5 + generate.SINKS):,} bytes" in figures

    def test_a_full_context_is_said(self, saved):
        text, figures = tito("generate", PROMPT, "--model", saved)
        assert len(text.encode()) >= S - 9 and f"new: {S - 9} tokens" in figures
        assert f"its context of {S} tokens is full" in figures

    def test_an_end_is_not_shown_and_ends_the_text(self, folder):
        model = load_checkpoint(folder)
        model.head.weight.data[END] = model.head.weight.data[continued(folder, 8)[-1]] * 1.01  # a little likelier
        save_checkpoint(model, folder)
        edit(folder / "config.json", eos_token_id=END)
        ids = load_checkpoint(folder).generate(list(PROMPT.encode()), 40, stop_token=END)
        assert 2 < len(ids) - 9 < 40 and ids[-1] == END
        text, figures = tito("generate", PROMPT, "--model", folder)
        assert text == bytes(ids[:-1]).decode(errors="replace") + "\n"
        assert f"new: {len(ids) - 9} tokens" in figures and "the model ended the text" in figures

    @pytest.mark.skipif(os.name == "nt", reason="a terminal of POSIX")
    def test_a_terminal_is_not_given_orders(self, saved, read_terminal):
        """Control characters that the model makes are shown as U+FFFD there; a file gets them as they are."""
        told = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
        arguments = ["generate", PROMPT, "--model", str(saved), "--tokens", "50", "--temperature", "9", "--seed", "1"]
        plain = tito(*arguments)[0]
        ours, theirs = os.openpty()
        with subprocess.Popen(COMMAND + arguments, stdout=theirs, stderr=subprocess.PIPE, **HERE) as running:
            os.close(theirs)
            shown = read_terminal(ours).decode().replace("\r\n", "\n")
        assert running.returncode == 0 and told.search(plain) and shown == told.sub("\ufffd", plain)


class TestEndings:
    @pytest.mark.skipif(os.name == "nt", reason="pipes of POSIX")
    def test_a_closed_pipe_ends_it_without_a_word(self, saved):
        ours, theirs = os.pipe()
        os.close(ours)  # as `head` does when it has seen enough
        command = [*COMMAND, "generate", PROMPT, "--model", str(saved)]
        done = subprocess.run(command, stdout=theirs, stderr=subprocess.PIPE, timeout=240, **HERE)
        os.close(theirs)
        assert (done.returncode, done.stderr) == (1, b"")

    @pytest.mark.skipif(os.name == "nt", reason="a shell of POSIX")
    def test_without_a_stdout_it_works_all_the_same(self, saved):
        command = ["sh", "-c", '"$@" >&-', "sh", *COMMAND, "generate", PROMPT, "--model", str(saved), "--tokens", "3"]
        done = subprocess.run(command, stderr=subprocess.PIPE, timeout=240, **HERE)
        assert done.returncode == 0 and done.stderr.decode().startswith("\nprompt: 9 tokens")

    @pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM that a program hears")
    def test_what_ends_tito_ends_the_model(self, saved, tmp_path):
        """`kill`, `timeout` and a job scheduler know tito's process alone."""
        model = Llama(END + 1, 256, 6, 4, 4000, rng=np.random.default_rng(0))  # large enough to be still at work
        save_checkpoint(model, tmp_path / "m", source=saved)
        command = [*COMMAND, "generate", PROMPT, "--model", str(tmp_path / "m"), "--tokens", "3900"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **HERE)
        assert process.stdout.read(len(PROMPT) + 30).startswith(PROMPT.encode())
        working = psutil.Process(process.pid).children()
        assert len(working) == 1
        try:
            process.terminate()
            assert process.wait(60) == 130
            _, alive = psutil.wait_procs(working, timeout=5)
            assert not alive, "the model goes on without its tito"
        finally:
            [child.kill() for child in working if child.is_running()]
            _, err = process.communicate(timeout=60)
        assert err.decode().strip() == "tito: stopped."


REFUSED = {
    "an empty prompt": ("", None, "0 tokens; it needs at least 1"),
    "too long a prompt": ("x" * S, None, f"{S} tokens; it needs at least 1 and at most {S - 1}"),
    "no directory": (PROMPT, lambda m: shutil.rmtree(m), "neither a directory"),
    "an empty directory": (PROMPT, lambda m: [path.unlink() for path in m.iterdir()], "neither model.safetensors nor"),
    "no configuration": (PROMPT, lambda m: (m / "config.json").unlink(), "config.json is missing"),
    "half of the weights": (PROMPT, lambda m: os.truncate(m / "model.safetensors", 9000), "cut off"),
    "no tokenizer": (PROMPT, lambda m: (m / "vocab.json").unlink(), "tokenizer.json"),
    "half of a tokenizer": (PROMPT, lambda m: os.truncate(m / "vocab.json", 500), "vocab.json"),
    "another's tokenizer": (PROMPT + "<|end|>", lambda m: edit(m / "vocab.json", **{"<|end|>": 999}), "an id 999"),
    "an odd end": (PROMPT, lambda m: edit(m / "config.json", eos_token_id="</s>"), "eos_token_id"),
    "an odd penalty": (PROMPT, lambda m: edit(m / "config.json", repetition_penalty=0), "repetition_penalty"),
    "no penalty at all": (PROMPT, lambda m: edit(m / "config.json", repetition_penalty=math.nan), "repetition_penalty"),
}


class TestRefusals:
    @pytest.mark.parametrize("case", REFUSED)
    def test_one_sentence_says_what_is_wrong(self, case, folder, monkeypatch, capsys):
        """In this process, which is quicker; the next test is the same as a user sees it."""
        prompt, damage, words = REFUSED[case]
        if damage:
            damage(folder)
        monkeypatch.setattr(sys, "argv", ["generate", "--model", str(folder), f"--prompt={prompt}"])
        with pytest.raises(SystemExit) as caught:
            generate.main()
        said = caught.value.code
        assert words in said and said.startswith("tito: ") and "\n" not in said and capsys.readouterr().out == ""

    def test_the_sentence_comes_on_stderr(self, folder):
        REFUSED["half of the weights"][1](folder)
        out, err = tito("generate", PROMPT, "--model", folder, code=1)
        assert out == "" and "cut off" in err and err.startswith("tito: ") and err.count("\n") == 1

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["--checkpoint", "x"], "--model and --checkpoint"),
            (["--no-cache", "--window", "3"], "--no-cache and --window"),
        ],
    )
    def test_options_that_make_no_sense(self, options, words, saved):
        assert words in tito("generate", PROMPT, "--model", saved, *options, code=1)[1]

    def test_a_prompt_that_is_not_utf8(self, saved):
        assert "not UTF-8" in tito("generate", "-", "--model", saved, input=b"caf\xe9", code=1)[1]

    def test_a_package_that_is_not_whole(self, saved, real_course):
        (real_course.root / "tinytorch" / "models" / "llama.py").unlink()
        for command in (["generate", PROMPT, "--model"], ["model", "info"]):
            assert "it lacks tinytorch/models/llama.py" in tito(*command, saved, cwd=real_course.root, code=1)[1]

    def test_what_their_authors_ask_for_and_is_not_done(self, folder):
        edit(folder / "config.json", no_repeat_ngram_size=3, num_beams=1)
        text, err = tito("generate", PROMPT, "--model", folder, "--tokens", "3")
        assert text == continued(folder, 3).decode(errors="replace") + "\n"
        assert "no_repeat_ngram_size" in err and "num_beams" not in err


class TestInfo:
    def test_what_a_person_reads(self, saved):
        text, _ = tito("model", "info", saved)
        rows = dict(re.split(r"  +", line.strip(), maxsplit=1) for line in text.splitlines())
        size = (saved / "model.safetensors").stat().st_size
        assert rows["architecture"] == "LlamaForCausalLM"
        assert rows["parameters"] == f"{sum(parameter.size for parameter in load_checkpoint(saved).parameters()):,}"
        assert rows["on disk"] == f"{size / 1024:,.1f} KiB in 1 file, float32"
        assert rows["layers"] == "2, 24 wide" and rows["heads"] == "6 for queries, 2 for keys and values, 4 wide"
        assert rows["vocabulary"] == "257" and rows["context"] == "64 tokens" and rows["tokenizer"] == "257 tokens"
        assert rows["KV cache"] == "128 bytes per token in float32, 64 in float16"
        assert rows["fits here"].startswith("the whole context beside the weights: 8.0 KiB of cache; ")

    @pytest.mark.parametrize("case", ["no directory", "an empty directory", "no configuration", "half of the weights"])
    def test_a_damaged_directory_is_refused(self, case, folder):
        """In this process, which is quicker; the next test is the same as a user sees it."""
        _, damage, words = REFUSED[case]
        damage(folder)
        with pytest.raises(CheckpointError, match=words):
            model_info.facts_of(folder)

    def test_what_is_refused_is_told(self, folder):
        _, damage, words = REFUSED["no configuration"]
        damage(folder)
        out, err = tito("model", "info", folder, code=1)
        assert out == "" and words in err
        assert words in json.loads(tito("model", "info", folder, "--json", code=1)[0])["error"]

    def test_no_number_is_read(self, folder):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[: -4 * 257 * 24] + b"\xff" * (4 * 257 * 24))  # NaN
        with pytest.raises(CheckpointError, match="nan"):
            load_checkpoint(folder)
        tito("model", "info", folder)

    @pytest.mark.skipif(os.name == "nt", reason="a file with holes")
    def test_a_model_larger_than_memory(self, tmp_path):
        """Llama 3 70B in bfloat16: a header, and 141 GB of hole."""
        config = dict(vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
                      num_attention_heads=64, num_key_value_heads=8, max_position_embeddings=8192, hidden_act="silu",
                      rope_theta=500000.0, architectures=["LlamaForCausalLM"])  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps(config))
        header, end = {}, 0
        for name, shape in llama_shapes(128256, 8192, 80, 64, 8, 128, 28672, False, False, False):
            begin, end = end, end + 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        path = tmp_path / "model.safetensors"
        path.write_bytes(struct.pack("<Q", len(text)) + text)
        os.truncate(path, 8 + len(text) + end)
        facts = json.loads(tito("model", "info", tmp_path, "--json")[0])
        assert facts["parameters"] == 70_553_706_496  # as published
        assert facts["bytes_on_disk"] == path.stat().st_size > 141e9 and facts["dtypes"] == ["bfloat16"]
        assert facts["cache_bytes_per_token"] == {"float32": 655_360, "float16": 327_680}
        assert facts["tokens_that_fit"] == 0 and facts["tokenizer_size"] is None
        assert "no: " in tito("model", "info", tmp_path)[0]

"""The main job as a user runs it: `tito demo`, `tito generate`, `tito explore`."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
CHECKPOINT = REPOSITORY / "tinytorch" / "demo" / "demo.safetensors"
PROMPT = "The class definition"


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_committed_checkpoint_is_small_and_says_how_it_was_made():
    assert CHECKPOINT.stat().st_size <= 2_000_000
    length = int.from_bytes(CHECKPOINT.read_bytes()[:8], "little")
    notes = json.loads(CHECKPOINT.read_bytes()[8 : 8 + length])["__metadata__"]
    assert float(notes["validation_loss"]) < 4.0  # an untrained model of 1024 tokens has ln 1024 = 6.9
    assert int(notes["steps"]) > 0 and notes["seed"] and "pydoc_data" in notes["text"]


def test_the_demo_with_the_committed_gpt(real_course):
    """Lesson 17 is completed in a scratch copy; both texts are the same; bytes are predicted exactly."""
    shutil.copytree(REPOSITORY / "src", real_course.root / "src")
    before = files(real_course.root)
    result = real_course.tito("demo", "--prompt", PROMPT, "--tokens", "20", timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Lesson 17 is completed" in result.stdout
    assert re.search(r"(\d+) of \1 points", result.stdout)
    texts = re.findall(r"^  \| (.*(?:\n  \| .*)*)", result.stdout, re.MULTILINE)
    assert len(texts) == 2 and texts[0] == texts[1] and texts[0].startswith(PROMPT) and len(texts[0]) > len(PROMPT) + 20
    assert "The two texts are the same: 20 new tokens" in result.stdout
    predicted, measured = re.search(r"= ([\d,]+) bytes predicted, ([\d,]+) measured", result.stdout).groups()
    assert predicted == measured == f"{2 * 4 * 256 * 128 * 4:,}"
    rates = re.findall(r"(?:without|with) cache +([\d.]+) tokens/s", result.stdout)
    assert len(rates) == 2 and all(float(rate) > 0 for rate in rates)
    lengths = re.findall(r"^ +(\d+) +[\d.]+ s +[\d.]+ s +([\d.]+)$", result.stdout, re.MULTILINE)
    assert [int(length) for length, _ in lengths] == [32, 64, 128, 256]
    assert "validation loss" in result.stdout
    after = files(real_course.root)
    made = set(after) - set(before)
    assert all(name.startswith("out/") or name.startswith(".tito/") for name in made), made
    assert {name: after[name] for name in before} == before, "the demo changed a file of the course"


def test_the_demo_trains_where_it_is_asked_to(real_course):
    shutil.copytree(REPOSITORY / "src", real_course.root / "src")
    result = real_course.tito("demo", "--train", "--steps", "2", "--tokens", "4", timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"Trained in \d+ s: loss [67]\.\d+ -> [67]\.\d+, validation loss [67]\.\d+", result.stdout)
    assert "The two texts are the same" in result.stdout
    assert (real_course.root / "out" / "demo.safetensors").stat().st_size <= 2_000_000


def test_the_demo_runs_on_the_learners_own_cache(real_course):
    """After `tito module complete 17` the demo says so and does not put the reference in its place."""
    real_course.solve("17")
    notebook = real_course.lesson("17").notebook
    line = "class CacheStateError(ValueError):"
    mine = "MINE = 'the cache of a learner'\\n\",\n    \""
    marked = notebook.read_text(encoding="utf-8").replace(line, mine + line)
    assert marked != notebook.read_text(encoding="utf-8")
    notebook.write_text(marked, encoding="utf-8")
    assert real_course.tito("module", "complete", "17", timeout=600).returncode == 0
    assert "the cache of a learner" in real_course.lesson("17").package_file.read_text(encoding="utf-8")
    result = real_course.tito("demo", "--tokens", "4", timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "You have completed it yourself" in result.stdout and "The two texts are the same" in result.stdout


def test_a_cache_that_is_wrong_is_found_out(real_course):
    """A package whose cache forgets a token makes another text; the demo says DIFFERENT and fails."""
    target = real_course.lesson("17").package_file
    text = target.read_text(encoding="utf-8")
    broken = text.replace("store[row, :, start : start + count] = new[row, :, :count]", "pass")
    assert broken != text
    target.write_text(broken, encoding="utf-8")
    result = real_course.tito("demo", "--tokens", "12", timeout=600)
    assert result.returncode == 1
    assert "DIFFERENT" in result.stdout


@pytest.mark.parametrize("sampling", [[], ["--temperature", "0.8", "--top-k", "20", "--seed", "3"]])
def test_generate_says_the_same_with_and_without_the_cache(real_course, sampling):
    results = [
        real_course.tito("generate", PROMPT, "--tokens", "12", *sampling, *cache)
        for cache in ([], ["--no-cache"], [])
    ]
    assert [result.returncode for result in results] == [0, 0, 0], results[0].stderr
    texts = [result.stdout for result in results]
    assert texts[0].startswith(PROMPT) and len(texts[0]) > len(PROMPT) + 12 and len(set(texts)) == 1
    assert "; KV cache: " in results[0].stderr and "; no KV cache" in results[1].stderr


def test_another_seed_makes_another_text(real_course):
    texts = {
        real_course.tito("generate", PROMPT, "--tokens", "12", "--temperature", "1.2", "--seed", seed).stdout
        for seed in ("1", "2", "3")
    }
    assert len(texts) > 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "", "--tokens", "3"], "at least 1"),
        (["generate", "word " * 400, "--tokens", "3"], "at most 255"),
        (["generate", PROMPT, "--checkpoint", "none.safetensors"], "There is no checkpoint"),
        (["explore", "kv-cache", "--out", "none/cache.html"], "There is no folder"),
        (["explore", "attention"], "nothing to explore"),
        (["explore", "kv-cache", "--prompt", ""], "at least one of each is needed"),
        (["explore", "kv-cache", "--tokens", "300"], "max_seq_len=256"),
        (["demo", "--quick", "--train"], "exclude each other"),
        (["demo", "--checkpoint", "none.safetensors"], "There is no checkpoint"),
    ],
)
def test_wrong_input_gets_one_clear_sentence(real_course, arguments, words):
    result = real_course.tito(*arguments)
    assert result.returncode != 0
    assert words in result.stderr and "Traceback" not in result.stderr


def test_a_damaged_checkpoint_gets_a_clear_sentence(real_course):
    damaged = real_course.root / "damaged.safetensors"
    damaged.write_bytes(CHECKPOINT.read_bytes()[:100_000])
    result = real_course.tito("generate", PROMPT, "--checkpoint", str(damaged))
    assert result.returncode == 1
    assert "damaged.safetensors" in result.stderr and "Traceback" not in result.stderr


def test_a_picture_that_cannot_be_written_is_said_and_spoils_nothing(real_course):
    pytest.importorskip("matplotlib")
    in_the_way = real_course.root / "out"
    in_the_way.write_text("a file where the folder should be")
    arguments = ["--checkpoint", str(CHECKPOINT), "--prompt", PROMPT, "--new", "3"]
    result = subprocess.run(
        [sys.executable, "-m", "tito.jobs.compare", *arguments, "--plot", str(in_the_way / "plot.png")],
        cwd=real_course.root, capture_output=True, encoding="utf-8", timeout=240,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(real_course.root), str(REPOSITORY)])},
    )  # fmt: skip
    assert result.returncode == 0 and "The two texts are the same" in result.stdout, result.stderr
    assert "No plot: " in result.stdout and "Traceback" not in result.stderr


def test_a_page_that_cannot_be_written_gets_one_sentence(real_course):
    folder = real_course.root / "cache.html"
    folder.mkdir()
    result = real_course.tito("explore", "kv-cache", "--tokens", "3", "--out", str(folder))
    assert result.returncode == 1
    assert "cache.html" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT to a process group")
def test_ctrl_c_while_it_generates_ends_in_one_line(real_course):
    process = subprocess.Popen(
        [sys.executable, "-m", "tito", "generate", PROMPT, "--no-cache", "--tokens", "240"],
        cwd=real_course.root, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    process.stdout.read(len(PROMPT))  # it writes: past all imports
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.decode().strip() == "tito: stopped."


def test_explore_writes_one_page(real_course):
    page = real_course.root / "my page.html"
    result = real_course.tito("explore", "kv-cache", "--prompt", PROMPT, "--tokens", "5", "--out", str(page))
    assert result.returncode == 0, result.stderr
    recording = json.loads(re.search(r'id="recording">(.*?)</script>', page.read_text(encoding="utf-8"), re.S).group(1))
    assert len(recording["steps"]) == 5 and "".join(recording["tokens"]).startswith(PROMPT)
    assert np.shape(recording["steps"][0]["weights"])[:2] == (4, 4)

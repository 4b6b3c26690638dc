"""`tito serve` as a user runs it: the real program on a free port of this machine, and OpenAI's own client."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tinytorch.demo import language
from tinytorch.generation.kv_cache import enable_kv_cache

for extra in ("starlette", "uvicorn"):
    pytest.importorskip(extra, reason="`tito serve` needs the extra serve")
openai = pytest.importorskip("openai", reason="the client that the server is tested with")

REPOSITORY = Path(__file__).resolve().parents[2]
PROMPT = "The for statement is used to"
GREEDY = {"model": "demo", "temperature": 0}
BLOCKS = 40  # of 16 tokens: far too few for 8 requests of 256, so some have to give way and come again
SIZES = ("--blocks", str(BLOCKS), "--max-running", "8", "--token-budget", "64")
BOUND = 120  # seconds; far more than anything here takes, also on a busy machine


@dataclass
class Served:
    """A `tito serve` that runs."""

    process: subprocess.Popen
    url: str

    @property
    def client(self):
        plain = openai.DefaultHttpxClient(verify=False)  # certificates that nobody needs take longer than a request
        return openai.OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=BOUND, http_client=plain)

    def complete(self, prompt=PROMPT, **options):
        return self.client.completions.create(prompt=prompt, **{**GREEDY, **options})

    def metrics(self) -> dict[str, int]:
        with urllib.request.urlopen(self.url.removesuffix("/v1") + "/metrics", timeout=BOUND) as answer:
            lines = answer.read().decode().splitlines()
        return {name: int(value) for name, value in (line.split() for line in lines if not line.startswith("#"))}

    def idle(self) -> bool:
        now = self.metrics()
        return (now["tito_requests_running"], now["tito_requests_waiting"], now["tito_blocks_free"]) == (0, 0, BLOCKS)


@contextmanager
def serving(*arguments: str):
    command = [sys.executable, "-m", "tito", "serve", "--port", "0", *arguments]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
        start_new_session=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    watchdog = threading.Timer(BOUND, process.kill)
    watchdog.start()
    try:
        ready = process.stdout.readline()
        found = re.fullmatch(r"Serving 'demo' at (http://127\.0\.0\.1:[1-9]\d*/v1) \(Ctrl-C ends it\)\n", ready)
        assert found, ready + process.stderr.read()
        watchdog.cancel()
        yield Served(process, found.group(1))
    finally:
        watchdog.cancel()
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def served():
    with serving(*SIZES) as running:
        yield running
        assert running.process.poll() is None, "it ended on its own"
        running.process.terminate()
        _, err = running.process.communicate(timeout=BOUND)
        assert running.process.returncode == 0 and err == "", err


@pytest.fixture(scope="module")
def alone():
    """The continuation of a prompt by so many tokens, from the model on its own."""
    model, tokenizer, _ = language.load()
    enable_kv_cache(model)

    def continued(prompt: str, count: int) -> str:
        ids = tokenizer.encode(prompt)
        return tokenizer.decode(model.generate(ids, count)[len(ids) :])

    return continued


def until(condition) -> None:
    end = time.monotonic() + BOUND
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def joined(stream) -> str:
    return "".join(event.choices[0].text for event in stream)


def test_a_text_is_the_one_that_generate_makes_also_without_a_cache(served):
    model, tokenizer, _ = language.load()
    ids = tokenizer.encode(PROMPT)
    expected = tokenizer.decode(model.generate(ids, 16)[len(ids) :])
    answer = served.complete(max_tokens=16)
    assert answer.choices[0].text == expected and answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 16)
    assert joined(served.complete(max_tokens=16, stream=True)) == expected
    assert served.complete(ids, max_tokens=16).choices[0].text == expected


def test_the_example_prints_what_the_readme_says(served):
    section = (REPOSITORY / "README.md").read_text(encoding="utf-8").split("## Serve it")[1]
    code, output = re.search(r"```python\n(.*?)```\n\n```text\n(.*?)```", section, re.DOTALL).groups()
    assert "http://127.0.0.1:8000/v1" in code
    command = [sys.executable, "-c", code.replace("http://127.0.0.1:8000/v1", served.url)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=BOUND)
    assert done.stdout == output.rstrip("\n"), done.stdout + done.stderr


def test_a_chat(served, alone):
    talk = [{"role": "user", "content": "What is a class?"}]
    create = served.client.chat.completions.create
    said = create(messages=talk, max_tokens=30, **GREEDY).choices[0].message
    assert said.role == "assistant" and said.content == alone("user: What is a class?\n\nassistant:", 30)
    pieces = create(messages=talk, max_tokens=30, stream=True, **GREEDY)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == said.content
    assert create(messages=talk, **GREEDY).usage.total_tokens <= 256


def test_a_stop_string(served, alone):
    text = alone(PROMPT, 60)
    stop = text[41:47]
    assert served.complete(max_tokens=60, stop=stop).choices[0].text == text[: text.index(stop)]
    assert joined(served.complete(max_tokens=60, stop=stop, stream=True)) == text[: text.index(stop)]


def test_the_same_seed_is_the_same_text(served):
    options = {"max_tokens": 20, "temperature": 1.0, "extra_body": {"top_k": 20}}
    texts = [served.complete(seed=seed, **options).choices[0].text for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]
    both = served.complete(seed=3, n=2, **options).choices
    assert [choice.text for choice in both] == [texts[0], texts[2]]


def test_32_at_once_of_whom_some_leave(served, alone):
    """Whoever stays gets exactly the text that it gets alone; afterwards every block is free."""
    before = served.metrics()
    words = ["class", "for", "with", "if", "import", "return", "lambda", "global"]
    prompts = [f"The {words[i % 8]} statement {'is used ' * (i % 5)}in {i}" for i in range(32)]
    lengths = [40 + 5 * (i % 13) for i in range(32)]
    leaves = [i % 4 == 1 for i in range(32)]
    together = threading.Barrier(32)

    def one(i: int) -> str | None:
        together.wait(BOUND)
        if i % 2 == 0:
            return served.complete(prompts[i], max_tokens=lengths[i]).choices[0].text
        with served.complete(prompts[i], max_tokens=200 if leaves[i] else lengths[i], stream=True) as stream:
            return None if leaves[i] and next(stream) else joined(stream)

    with ThreadPoolExecutor(32) as pool:
        texts = list(pool.map(one, range(32)))
    for i, text in enumerate(texts):
        assert text == (None if leaves[i] else alone(prompts[i], lengths[i])), prompts[i]
    until(served.idle)
    now = served.metrics()
    ended = {name: now[name] - before[name] for name in now if name.startswith("tito_requests_")}
    assert ended["tito_requests_finished_total"] >= 24 and ended["tito_requests_failed_total"] == 0
    assert ended["tito_requests_finished_total"] + ended["tito_requests_cancelled_total"] == 32


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"model": "gpt-4"}, "NotFoundError", "this server has 'demo'"),
        ({"prompt": "word " * 300}, "BadRequestError", "room for 256 tokens .*prompt has 600"),
        ({"prompt": "x" * 900_000}, "BadRequestError", "room for 256 tokens .*at least"),
        ({"prompt": "x" * 10_000_000}, "APIStatusError", "1,048,576 bytes"),
        ({"max_tokens": 10**9}, "BadRequestError", "requested 1000000006 "),
        ({"max_tokens": -1}, "BadRequestError", "at least 1; got -1"),
        ({"top_p": 0.5}, "BadRequestError", "'top_p' is not served"),
        ({"prompt": [1024]}, "BadRequestError", "ids from 0 to 1023; got 1024"),
    ],
)
def test_what_cannot_be_served_is_an_error_that_the_client_knows(served, options, error, words):
    with pytest.raises(getattr(openai, error)) as caught:
        served.complete(**options)
    assert re.search(words, caught.value.message) and caught.value.type == "invalid_request_error"


def test_blocks_that_hold_no_whole_context_are_enough_for_what_fits(served):
    port = served.url.split(":")[2].split("/")[0]
    taken = tito("--port", port)
    assert taken.returncode == 1 and f"port {port} of 127.0.0.1 is in use already" in taken.stderr
    with serving("--blocks", "2") as small:
        assert small.complete(max_tokens=20).usage.completion_tokens == 20
        with pytest.raises(openai.BadRequestError):
            small.complete(max_tokens=100)
        assert small.metrics()["tito_blocks_free"] == 2


@pytest.mark.skipif(os.name == "nt", reason="sends signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_cleanly_while_it_streams(number, alone):
    with serving() as running:
        stream = running.complete(max_tokens=240, stream=True)
        text = next(stream).choices[0].text
        running.process.send_signal(number)
        try:
            assert text + joined(stream) == alone(PROMPT, 240)
        except openai.APIError as error:
            assert "being stopped" in str(error)  # where the machine is too slow to come to the end
        out, err = running.process.communicate(timeout=BOUND)
        assert (running.process.returncode, out, err) == (0, "Stopped.\n", "")


def tito(*arguments: str, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "tito", "serve", *arguments], cwd=cwd, capture_output=True, encoding="utf-8",
        timeout=BOUND, env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--checkpoint", "none.safetensors"], "There is no checkpoint none.safetensors"),
        (["--checkpoint", "README.md"], "README.md cannot be used"),
        (["--port", "0", "--blocks", str(10**15)], "cannot be had"),
        (["--port", "65536"], "less than or equal to 65535"),
        (["--host", "no.such.host.invalid"], "there is no host 'no.such.host.invalid'"),
    ],
)
def test_what_cannot_be_gets_one_clear_sentence(arguments, words):
    result = tito(*arguments)
    assert result.returncode in (1, 2) and words in result.stderr and "Traceback" not in result.stderr, result.stderr


def test_a_package_that_lacks_the_lesson(course, real_course):
    assert "the lessons here end with 04_words" in tito(cwd=course.root).stderr
    paged = real_course.root / "tinytorch" / "generation" / "paged.py"
    paged.write_text("class PagedModelKVCache:\n    pass\n")
    assert "cannot import name 'Scheduler'" in tito("--port", "0", cwd=real_course.root).stderr
    paged.unlink()
    missing = tito("--port", "0", cwd=real_course.root)
    assert missing.returncode == 1 and "lacks tinytorch/generation/paged.py" in missing.stderr


def test_without_the_extra(monkeypatch):
    from tito.course.errors import CourseError
    from tito.student import serve

    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.setattr(sys, "executable", "/my course/python")
    with pytest.raises(CourseError, match="uvicorn cannot be found") as caught:
        serve.require_extra()
    assert '`"/my course/python" -m pip install starlette uvicorn`' in caught.value.hint, "it can be pasted as it is"

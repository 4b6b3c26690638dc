"""The parts of `tito serve` on their own: text, requests, and the routes over a scheduler that does as it is told."""

from __future__ import annotations

import argparse
import errno
import json
import random
import socket
import struct
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from http.client import HTTPConnection

import pytest

pytest.importorskip("starlette", reason="`tito serve` needs the extra serve")
pytest.importorskip("uvicorn", reason="`tito serve` needs the extra serve")
openai = pytest.importorskip("openai", reason="the client that the server is tested with")

from tito.jobs import serve  # noqa: E402
from tito.jobs.serving import asked, server  # noqa: E402
from tito.jobs.serving.app import application  # noqa: E402
from tito.jobs.serving.engine import Engine  # noqa: E402
from tito.jobs.serving.fields import ApiError  # noqa: E402
from tito.jobs.text import Text  # noqa: E402

BYTES = {i: bytes([i]) for i in range(256)}  # the simplest tokenizer: an id is a byte
END = 256  # the id that ends a text
COLOURS = "caf\u00e9 \u20ac\U0001f600!"  # characters of one to four bytes
MODEL = asked.Model("mini", 1000, 257, 1, lambda text: list(text.encode()))


def until(condition, seconds: float = 60.0):
    """Wait for a condition; its value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)
    return value


# --- text ----------------------------------------------------------------------------------------------------------


def cut(text: str, stops) -> str:
    """Oracle: character by character, until the text ends with a stop string; the longest of several."""
    for end in range(1, len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            return text[: end - len(max(hits, key=len))]
    return text


def test_text_is_the_same_however_it_is_cut_into_tokens():
    rng = random.Random(0)
    letters = ["a", "b", "\u00e9", "\u20ac", "\U0001f600"]
    for _ in range(2000):
        text = "".join(rng.choices(letters, k=rng.randrange(12)))
        data = text.encode()
        if rng.random() < 0.3:  # bytes that are no character, in the middle or unfinished at the end
            data = data[: rng.randrange(len(data) + 1)] + rng.choice([b"", b"\xff", b"\xe2\x82"])
        stops = ["".join(rng.choices(letters, k=rng.randint(1, 3))) for _ in range(rng.randrange(4))]
        places = sorted(rng.choices(range(len(data) + 1), k=rng.randrange(6)))
        tokens = dict(enumerate(data[a:b] for a, b in zip([0, *places], [*places, len(data)])))
        growing, shown = Text(tokens, stops), ""
        expected = cut(data.decode(errors="replace"), stops)
        for token in tokens:
            shown += growing.add(token)
            assert expected.startswith(shown), f"{shown!r} was shown of {expected!r}; {tokens}, stops {stops}"
            if growing.stopped:
                break
        shown += growing.end()
        assert shown == expected, f"got {shown!r}, expected {expected!r}; {tokens}, stops {stops}"
        assert growing.stopped == (expected != data.decode(errors="replace"))


# --- a scheduler that does as it is told ---------------------------------------------------------------------------


@dataclass
class Script:
    """What a stand-in for the scheduler does: `says` maps a prompt's text to the ids that follow it."""

    says: dict = field(default_factory=dict)
    permits: threading.Semaphore | None = None  # each lets one step produce tokens; None: all may
    fail: set = field(default_factory=set)  # prompts with which a step fails
    most_running: int = 100


class StandIn:
    """The interface of lesson 23's Scheduler and of its cache, without a model; a request that runs holds one block."""

    num_blocks = 100

    def __init__(self, script: Script):
        self.script, self.waiting, self.running, self.added = script, [], [], 0

    def num_free(self) -> int:
        return self.num_blocks - len(self.running)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request):
        if request.max_new_tokens == 999:
            raise ValueError("more than all blocks can hold")
        self.added += 1
        request.request_id = self.added
        self.waiting.append(request)
        return request.request_id

    def cancel(self, request_id):
        for where in (self.waiting, self.running):
            where[:] = [request for request in where if request.request_id != request_id]

    def step(self):
        while self.waiting and len(self.running) < self.script.most_running:
            self.running.append(self.waiting.pop(0))
        if self.script.permits and not self.script.permits.acquire(timeout=0.001):
            return []
        prompts = {bytes(request.prompt).decode() for request in self.running}
        if prompts & self.script.fail:
            raise RuntimeError("a secret of the server")
        return [self.next_token(request) for request in list(self.running)]

    def next_token(self, request):
        says = self.script.says.get(bytes(request.prompt).decode(), b"abc" * 400)
        request.tokens.append(says[len(request.tokens)])
        if request.tokens[-1] == request.stop_token:
            request.finish_reason = "stop"
        elif len(request.tokens) == request.max_new_tokens:
            request.finish_reason = "length"
        if request.finish_reason:
            self.cancel(request.request_id)
        return request, request.tokens[-1]


@dataclass
class Running:
    """A server in a thread, its engine, and ways to ask it."""

    engine: Engine
    server: server.Server
    port: int
    thread: threading.Thread

    @property
    def client(self):
        plain = openai.DefaultHttpxClient(verify=False)  # certificates that nobody needs take longer than a request
        url = f"http://127.0.0.1:{self.port}/v1"
        return openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60, http_client=plain)

    def complete(self, prompt="p", **options):
        return self.client.completions.create(model="mini", prompt=prompt, **options)

    def ask(self, method: str, path: str, body=None, **headers):
        """(status, headers, body) of a request as it stands; a body that is no string becomes JSON."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if body is None or isinstance(body, (str, bytes)) else json.dumps(body)
        with_type = {"Content-Type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
        connection.request(method, path, data, with_type)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read().decode()

    def started(self, path="/v1/completions", **body):
        """A connection on which a request was sent and no answer read."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("POST", path, json.dumps({"model": "mini", **body}), {"Content-Type": "application/json"})
        return connection

    def count(self, what: str) -> int:
        return self.engine.stats.totals.get(what, 0)


@contextmanager
def serving(script: Script, model: asked.Model = MODEL, **options):
    """A real HTTP server over the stand-in, on a free port of this machine."""

    def new():
        scheduler = StandIn(script)
        return scheduler, scheduler

    listener = server.listen("127.0.0.1", 0)
    engine = Engine(new, {**BYTES, END: b"<end>"}, END, **options)
    http = server.Server(application(engine, model), engine)
    thread = threading.Thread(target=http.run, args=([listener],))
    thread.start()
    try:
        yield Running(engine, http, listener.getsockname()[1], thread)
    finally:
        http.should_exit = True
        engine.close()
        thread.join(60)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def mini():
    says = {"colours": COLOURS.encode() * 50, "ended": [*b"so", END], "unfinished": b"\xe2\x82" * 9}
    with serving(Script(says)) as running:
        yield running


# --- answers -------------------------------------------------------------------------------------------------------


def test_a_completion_and_its_count(mini):
    answer = mini.complete("four", max_tokens=7)
    assert answer.object == "text_completion" and answer.model == "mini" and answer.id.startswith("cmpl-")
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("abcabca", "length")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (4, 7, 11)
    assert mini.complete("four").usage.completion_tokens == 16, "OpenAI's default"


def test_a_stream_is_the_text_in_whole_characters(mini):
    pieces = [event.choices[0] for event in mini.complete("colours", max_tokens=100, stream=True)]
    whole = mini.complete("colours", max_tokens=100).choices[0].text
    assert "".join(piece.text for piece in pieces) == whole == (COLOURS * 50).encode()[:100].decode(errors="replace")
    assert [piece.text for piece in pieces[:8]] == list(COLOURS)
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]


def test_bytes_that_never_become_a_character_come_at_the_end(mini):
    pieces = [event.choices[0].text for event in mini.complete("unfinished", max_tokens=2, stream=True)]
    assert pieces == ["\ufffd"] and mini.complete("unfinished", max_tokens=2).choices[0].text == "\ufffd"


def test_the_end_token_ends_and_is_not_shown(mini):
    answer = mini.complete("ended", max_tokens=9)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("so", "stop")
    assert answer.usage.completion_tokens == 3


@pytest.mark.parametrize(("stop", "text", "tokens"), [("bca", "a", 4), (["x", "ca", "cab"], "ab", 4), ("a", "", 1)])
def test_a_stop_string_cuts_the_text_also_across_tokens(mini, stop, text, tokens):
    answer = mini.complete(max_tokens=50, stop=stop)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (text, "stop")
    assert answer.usage.completion_tokens == tokens
    events = list(mini.complete(max_tokens=50, stop=stop, stream=True))
    assert "".join(event.choices[0].text for event in events) == text
    assert events[-1].choices[0].finish_reason == "stop"


def test_a_stop_string_ends_the_work_too():
    script = Script(permits=threading.Semaphore(4))
    with serving(script) as mini:
        assert mini.complete(max_tokens=50, stop="bca").choices[0].text == "a"
        assert mini.engine.stats[:4] == (100, 100, 0, 0), "without a fifth step"


def test_what_looked_like_a_stop_string_and_is_none_is_shown(mini):
    assert mini.complete(max_tokens=4, stop="caa").choices[0].text == "abca"


def test_several_prompts_and_several_choices(mini):
    answer = mini.complete(["colours", "ended", "p"], max_tokens=3, n=2)
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert [choice.text for choice in answer.choices] == ["caf", "caf", "so", "so", "abc", "abc"]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (13, 18)
    texts = [""] * 6
    for event in mini.complete(["colours", "ended", "p"], max_tokens=3, n=2, stream=True):
        texts[event.choices[0].index] += event.choices[0].text
    assert texts == [choice.text for choice in answer.choices]
    by_ids = mini.complete([list(b"ended"), list(b"p")], max_tokens=3)
    assert [choice.text for choice in by_ids.choices] == ["so", "abc"]
    assert mini.complete(list(b"ended"), max_tokens=3).choices[0].text == "so"


def test_the_usage_of_a_stream_comes_last_where_it_is_asked_for(mini):
    events = list(mini.complete("pp", max_tokens=3, stream=True, stream_options={"include_usage": True}))
    assert events[-1].choices == [] and events[-1].usage.total_tokens == 5
    assert all(event.usage is None for event in events[:-1])


def test_a_chat_in_both_forms(mini):
    talk = [{"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hello"}, {"type": "text", "text": "!"}]}]
    create = mini.client.chat.completions.create
    answer = create(model="mini", messages=talk, max_completion_tokens=5)
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    said = answer.choices[0].message
    assert (said.role, said.content, answer.choices[0].finish_reason) == ("assistant", "abcab", "length")
    assert answer.usage.prompt_tokens == len("system: Be brief.\n\nuser: Hello!\n\nassistant:")
    events = list(create(model="mini", messages=talk, max_tokens=5, stream=True))
    deltas = [event.choices[0].delta for event in events]
    assert events[0].object == "chat.completion.chunk" and len({event.id for event in events}) == 1
    assert [delta.role for delta in deltas] == ["assistant"] + [None] * 4
    assert "".join(delta.content or "" for delta in deltas) == "abcab"
    whole = create(model="mini", messages=talk[:1])
    assert whole.usage.total_tokens == MODEL.context, "a chat goes on to the end of the context"


def test_a_chat_ends_where_the_users_turn_begins():
    prompt = "user: Hi\n\nassistant:"
    with serving(Script({prompt: b" Hello.\n\nuser: And you?" * 9})) as mini:
        talk = [{"role": "user", "content": "Hi"}]
        answer = mini.client.chat.completions.create(model="mini", messages=talk)
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (" Hello.", "stop")


def test_what_the_scheduler_is_given(mini):
    body = {"model": "mini", "prompt": ["a", "b"], "n": 2, "temperature": 0.5, "top_k": 3, "seed": -1, "max_tokens": 4}
    wanted = asked.read(json.dumps(body).encode(), False, MODEL)
    assert [prompt for prompt, _ in wanted.choices] == [[97], [97], [98], [98]]
    how = [sampling for _, sampling in wanted.choices]
    assert [sampling.pop("seed") for sampling in how] == [2**64 - 1, 0, 1, 2], "each choice its own seed"
    assert all(sampling == {"temperature": 0.5, "top_k": 3, "max_new_tokens": 4} for sampling in how)
    default = asked.read(b'{"model": "mini", "prompt": "a", "user": "ada", "top_p": 1.0, "stop": null}', False, MODEL)
    assert default.choices == [([97], {"temperature": 1.0, "top_k": None, "max_new_tokens": 16, "seed": None})]
    for temperature, given in [(0, 0), (5e-324, 0), (9e-7, 0), (1e-6, 1e-6), (2, 2)]:
        body = {"model": "mini", "prompt": "a", "temperature": temperature}
        assert asked.read(json.dumps(body).encode(), False, MODEL).choices[0][1]["temperature"] == given
    near = asked.read(json.dumps({"model": "mini", "prompt": "a" * 995}).encode(), False, MODEL)
    assert near.choices[0][1]["max_new_tokens"] == 5, "a default that nobody asked for gives way"


def test_models_and_health(mini):
    assert [model.id for model in mini.client.models.list()] == ["mini"]
    assert mini.client.models.retrieve("mini").owned_by == "tito"
    assert mini.ask("GET", "/health")[::2] == (200, '{"status": "ok"}')


# --- refusals ------------------------------------------------------------------------------------------------------

DEEP = "[" * 100_000
SAY = [{"role": "user", "content": "Hi"}]
WRONG = [
    ("", "not JSON"), ("{", "not JSON"), ("[1]", "not a list"), ("null", "not null"), ("\x00", "not JSON"),
    (b"\xff\xfe\xfd", "not JSON"), ('{"model": "mini", "prompt": ' + DEEP, "nested too deep"),
    ('{"model": "mini", "prompt": "p", "user": NaN}', "not JSON: it holds NaN"),
    ('{"model": "mini", "prompt": "p", "temperature": -Infinity}', "Infinity"),
    ('{"model": "mini", "prompt": "p", "temperature": 1e999}', "from 0 to 2"),
    ('{"model": "mini", "prompt": "p", "max_tokens": ' + "9" * 4000 + "}", "room for 1000"),
    ('{"model": "mini", "prompt": "p", "max_tokens": ' + "9" * 5000 + "}", "not JSON"),
    ({"prompt": "p"}, "'model' is needed"), ({"model": 3, "prompt": "p"}, "'model' is needed"),
    ({"model": "mini"}, "got null"), ({"prompt": ""}, "is empty"), ({"prompt": []}, "not empty"),
    ({"prompt": ["a", ""]}, "'prompt[1]' is empty"), ({"prompt": [[]]}, "is empty"), ({"prompt": {}}, "an object"),
    ({"prompt": ["a", [1]]}, "one kind"), ({"prompt": ["a"] * 129}, "at most 128"), ({"prompt": [1, "a"]}, "one kind"),
    ({"prompt": [True]}, "from 0 to 256; got true"), ({"prompt": [257]}, "got 257"), ({"prompt": [-1]}, "got -1"),
    ({"prompt": [1.0]}, "got 1.0"), ({"prompt": [10**70]}, "more digits"), ({"prompt": [None]}, "got null"),
    ({"prompt": "\ud800"}, "surrogate"), ({"prompt": "p" * 1000}, "1000 tokens of prompt and answer"),
    ({"prompt": [5] * 1000}, "your prompt has 1000"), ({"max_tokens": 1000}, "requested 1001 (1 of prompt, 1000"),
    ({"max_tokens": -1}, "at least 1; got -1"), ({"max_tokens": 0}, "at least 1"), ({"max_tokens": "5"}, "a string"),
    ({"max_tokens": 5.0}, "not 5.0"), ({"max_tokens": True}, "a boolean"), ({"max_tokens": 999}, "all blocks"),
    ({"temperature": -0.1}, "from 0 to 2"), ({"temperature": 2.1}, "from 0 to 2"), ({"temperature": "hot"}, "string"),
    ({"temperature": True}, "a boolean"), ({"temperature": 10**400}, "from 0 to 2"), ({"top_k": 0}, "at least 1"),
    ({"top_p": 0.9}, "leave it out or 1"), ({"top_p": True}, "leave it out"), ({"n": 0}, "from 1 to 128"),
    ({"n": 129}, "from 1 to 128"), ({"n": 65, "prompt": ["a", "b"]}, "is 130"), ({"seed": 1.5}, "whole number"),
    ({"seed": 2**63}, "got 9223372036854775808"), ({"stop": ""}, "none of them empty"), ({"stop": ["a"] * 5}, "most 4"),
    ({"stop": [1]}, "a string or a list"), ({"stop": {}}, "a string or a list"), ({"stream": "yes"}, "true or false"),
    ({"stream": 1}, "true or false"), ({"stream": False, "stream_options": {}}, "goes with"),
    ({"logprobs": 0}, "'logprobs'"),
    ({"stream": True, "stream_options": {"usage": True}}, "Unrecognized request argument supplied: \"usage\""),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "true or false"), ({"echo": True}, "'echo'"),
    ({"best_of": 2}, "'best_of'"), ({"suffix": "x"}, "'suffix'"), ({"logit_bias": {"5": 1}}, "'logit_bias'"),
    ({"presence_penalty": 0.5}, "'presence_penalty'"), ({"max_token": 5}, "supplied: \"max_token\""),
    ({"\ud800": 5}, "Unrecognized"), ({"max_completion_tokens": 5}, "Unrecognized"),
]  # fmt: skip
WRONG_CHATS = [
    ({"messages": []}, "not empty"), ({"messages": "Hi"}, "a string"), ({"messages": ["Hi"]}, "messages[0]"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "system, developer, user, assistant"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "one of system"), ({"prompt": "p"}, "Unrecognized"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"), ({"tools": [{}]}, "'tools'"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "type text"),
    ({"messages": [{"role": "user", "content": "x" * 2000}]}, "room for 1000"), ({"logprobs": True}, "'logprobs'"),
    ({"max_tokens": 3, "max_completion_tokens": 3}, "two names of one thing"),
    ({"response_format": {"type": "json_object"}}, "'response_format'"),
]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_wrong_is_said_in_openais_form_and_starts_nothing(mini, stream):
    before = mini.engine.stats.totals
    chats = [({"messages": SAY, **body}, words) for body, words in WRONG_CHATS]
    for path, cases in [("/v1/completions", WRONG), ("/v1/chat/completions", chats)]:
        for body, words in cases:
            if isinstance(body, dict) and "model" not in body and words != "'model' is needed":
                body = {"model": "mini", "stream": stream, **({} if "chat" in path else {"prompt": "p"}), **body}
            status, headers, text = mini.ask("POST", path, body)
            assert status == 400 and headers["content-type"] == "application/json", f"{str(body)[:80]}: {status} {text}"
            error = json.loads(text)["error"]
            assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
            assert words in error["message"] and len(error["message"]) < 300, f"{str(body)[:80]}: {error['message']}"
    assert mini.engine.stats.totals == before and mini.engine.stats.blocks_free == StandIn.num_blocks


def test_the_errors_that_the_client_knows_by_name(mini):
    with pytest.raises(openai.NotFoundError) as caught:
        mini.client.completions.create(model="gpt-4\ud800".encode("utf-8", "replace").decode(), prompt="p")
    assert caught.value.code == "model_not_found" and "this server has 'mini'" in caught.value.message
    with pytest.raises(openai.NotFoundError):
        mini.client.models.retrieve("gpt-4")
    with pytest.raises(openai.NotFoundError, match="There is no POST /v1/embeddings here"):
        mini.client.embeddings.create(model="mini", input="p")
    with pytest.raises(openai.BadRequestError) as caught:
        mini.complete("p" * 400, max_tokens=700)
    assert caught.value.code == "context_length_exceeded" and "1100 (400 of prompt, 700" in caught.value.message
    with pytest.raises(openai.BadRequestError) as caught:
        mini.complete(top_p=0.5)
    assert (caught.value.param, caught.value.code) == ("top_p", "unsupported_parameter")


def test_paths_and_methods_that_are_not_there(mini):
    for method, path, status in [("GET", "/", 404), ("GET", "/v1", 404), ("POST", "/v1/models", 405),
                                 ("GET", "/v1/completions", 405), ("DELETE", "/health", 405), ("GET", "/health/", 404)]:
        found, headers, text = mini.ask(method, path)
        assert found == status and f"There is no {method} {path} here" in json.loads(text)["error"]["message"]
        assert (status != 405) or headers["allow"]
    assert mini.ask("GET", "/nowhere/", Host="[")[0] == 404, "a header that cannot be parsed"
    assert len(mini.ask("GET", "/" + "x" * 5000)[2]) < 500


def test_only_what_calls_itself_json(mini):
    """What a form or a script on a foreign page can send without asking is not taken."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        status, _, text = mini.ask("POST", "/v1/completions", {"model": "mini", "prompt": "p"}, Content_Type=kind)
        assert status == 415 and "Content-Type" in json.loads(text)["error"]["message"]
    body = {"model": "mini", "prompt": "p"}
    assert mini.ask("POST", "/v1/completions", body, Content_Type="Application/JSON; charset=utf-8")[0] == 200


def test_a_body_that_is_too_large(mini):
    with pytest.raises(openai.APIStatusError) as caught:
        mini.complete("p" * 10_000_000)
    assert caught.value.status_code == 413 and "1,048,576 bytes" in caught.value.message
    connection = HTTPConnection("127.0.0.1", mini.port, timeout=60)
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", str(10**12))
    connection.endheaders()
    assert connection.getresponse().status == 413, "said at once, not after a terabyte"


def test_ids_and_prompts_as_long_as_fits(mini):
    assert mini.complete([5] * 999, max_tokens=1).usage.total_tokens == 1000


def test_a_prompt_that_takes_long_to_encode_holds_up_nobody():
    encoding, go_on = threading.Event(), threading.Event()

    def encode(text: str) -> list[int]:
        encoding.set()
        assert go_on.wait(60)
        return MODEL.encode(text)

    with serving(Script(), replace(MODEL, encode=encode)) as mini:
        slow = mini.started(prompt="slow", max_tokens=3)
        assert encoding.wait(60)
        assert mini.complete([5], max_tokens=3).choices[0].text == "abc"
        go_on.set()
        assert json.loads(slow.getresponse().read())["choices"][0]["text"] == "abc"


# --- clients that leave, errors, ends ------------------------------------------------------------------------------


def test_a_client_that_leaves_in_mid_stream_is_cancelled_and_others_go_on(capfd):
    script = Script(permits=threading.Semaphore(0))
    with serving(script) as mini:
        leaving = mini.started(prompt=["a", "b"], max_tokens=500, stream=True)
        staying = mini.started(prompt="c", max_tokens=300, stream=True)
        until(lambda: mini.engine.stats.running == 3)
        script.permits.release()
        assert leaving.getresponse().readline().startswith(b"data: {")
        leaving.sock.shutdown(socket.SHUT_RDWR)
        until(lambda: mini.count("cancelled") == 2)
        assert mini.engine.stats.running == 1 and mini.engine.stats.blocks_free == StandIn.num_blocks - 1
        script.permits = None
        events = [json.loads(line[6:]) for line in staying.getresponse().read().split(b"\n\n")[:-2]]
        assert "".join(event["choices"][0]["text"] for event in events) == "abc" * 100
        assert mini.engine.stats.blocks_free == StandIn.num_blocks and mini.count("finished") == 1
    assert capfd.readouterr().err == "", "a client that leaves is nothing to report"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_before_the_answer_is_cancelled(stream):
    with serving(Script(permits=threading.Semaphore(0), most_running=1)) as mini:
        connections = [mini.started(prompt="p", max_tokens=500, stream=stream) for _ in range(2)]
        until(lambda: mini.engine.stats.running == 1 and mini.engine.stats.waiting == 1)
        for connection in connections:
            connection.close()
        until(lambda: mini.count("cancelled") == 2)
        assert mini.engine.stats[:4] == (100, 100, 0, 0)


def test_a_client_that_leaves_in_the_middle_of_its_body(mini):
    connection = HTTPConnection("127.0.0.1", mini.port, timeout=60)
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", "1000")
    connection.endheaders(b'{"model"')
    connection.close()
    assert mini.complete(max_tokens=1).choices[0].text == "a"


def test_clients_that_break_off_are_nothing_to_report(caplog):
    with serving(Script(says={"p": b"a" * 990})) as mini:
        for _ in range(3):
            connection = mini.started(prompt="p", max_tokens=200, n=50, stream=True)
            connection.getresponse().readline()
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.sock.close()  # a reset, while the server writes
        until(lambda: mini.count("cancelled") + mini.count("finished") == 150)
    assert caplog.text == ""


def test_more_connections_than_a_process_may_open_wait(monkeypatch, caplog):
    resource, heard, report = pytest.importorskip("resource"), threading.Event(), server.Server.report
    monkeypatch.setattr(server.Server, "report", lambda *given: (report(*given), heard.set()))
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with serving(Script()) as mini, socket.socket() as late:
        late.settimeout(60)
        assert mini.ask("GET", "/health")[0] == 200, "it runs"
        resource.setrlimit(resource.RLIMIT_NOFILE, (1, before[1]))
        try:
            late.connect(("127.0.0.1", mini.port))
            assert heard.wait(60)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        late.sendall(b"GET /health HTTP/1.1\r\nHost: here\r\n\r\n")
        assert late.recv(100).startswith(b"HTTP/1.1 200")
        mini.server.report(None, {"exception": OSError(errno.EMFILE, "too many")})
        with pytest.raises(AttributeError, match="default_exception_handler"):
            mini.server.report(None, {"exception": OSError(errno.EBADF, "an error of ours")})
    assert caplog.text == ""


def test_too_many_who_wait():
    script = Script(permits=threading.Semaphore(0), most_running=1)
    with serving(script, most=3) as mini:
        first = [mini.started(prompt="p", max_tokens=2) for _ in range(3)]
        until(lambda: mini.engine.stats[2:4] == (1, 2))
        with pytest.raises(openai.InternalServerError) as caught:
            mini.complete(max_tokens=2)
        assert caught.value.status_code == 503 and caught.value.response.headers["retry-after"] == "1"
        script.permits = None
        assert [connection.getresponse().status for connection in first] == [200] * 3
        assert len(mini.complete(max_tokens=2, n=3).choices) == 3, "who can run at once does not count as one who waits"
        with pytest.raises(openai.InternalServerError):
            mini.complete(max_tokens=2, n=4)
        until(lambda: mini.engine.stats[:4] == (100, 100, 0, 0))


def test_a_step_that_fails_ends_who_ran_and_nobody_else(capfd):
    script = Script(permits=threading.Semaphore(0), most_running=2)
    with serving(script) as mini:
        streaming = mini.started(prompt="a", max_tokens=9, stream=True)
        until(lambda: mini.engine.stats.running == 1)
        script.permits.release()
        answer = streaming.getresponse()
        assert b'"text": "a"' in answer.readline()
        script.fail.add("bad")
        bad = mini.started(prompt="bad", max_tokens=9)
        until(lambda: mini.engine.stats.running == 2)
        waiting = mini.started(prompt="c", max_tokens=9)
        until(lambda: mini.engine.stats.waiting == 1)
        script.permits.release()
        refused = bad.getresponse()
        said = refused.read().decode()
        assert refused.status == 500 and json.loads(said)["error"]["type"] == "server_error"
        rest = answer.read().decode()
        assert json.loads(rest.strip().split("data: ")[1])["error"]["code"] == "internal_error" and "[DONE]" not in rest
        assert not any(word in said + rest for word in ("secret", "Traceback", "RuntimeError"))
        assert "a secret of the server" in capfd.readouterr().err, "the terminal shows it"
        until(lambda: mini.engine.stats.running == 1)
        script.permits = None
        assert json.loads(waiting.getresponse().read())["choices"][0]["text"] == "abcabcabc"
        assert mini.engine.stats[:4] == (100, 100, 0, 0) and mini.count("failed") == 2
        with pytest.raises(openai.APIError, match="internal error"):
            list(mini.complete("bad", max_tokens=2, stream=True))
        assert mini.complete(max_tokens=2).choices[0].text == "ab"
        assert mini.ask("GET", "/health")[0] == 200
    capfd.readouterr()


def test_an_error_of_ours_is_500_and_leaks_nothing(mini, monkeypatch, capfd):
    def broken(*_):
        raise KeyError("a secret of the server")

    monkeypatch.setattr(asked, "new_tokens", broken)
    with pytest.raises(openai.InternalServerError) as caught:
        mini.complete()
    assert "secret" not in str(caught.value.body) and caught.value.code == "internal_error"
    assert "a secret of the server" in capfd.readouterr().err


def test_a_server_that_is_told_to_stop_gives_streams_a_while_and_then_an_error(monkeypatch):
    monkeypatch.setattr(server, "GRACE", 0.2)
    script = Script(permits=threading.Semaphore(0))
    with serving(script) as mini:
        connection = mini.started(prompt="p", max_tokens=9, stream=True)
        until(lambda: mini.engine.stats.running == 1)
        script.permits.release()
        answer = connection.getresponse()
        assert b'"text": "a"' in answer.readline()
        mini.server.should_exit = True
        last = json.loads(answer.read().decode().strip().split("data: ")[-1])
        assert last["error"]["code"] == "stopped"
        mini.thread.join(60)
        assert not mini.thread.is_alive()


def test_a_server_that_is_told_to_stop_lets_streams_come_to_their_end(monkeypatch):
    monkeypatch.setattr(server, "GRACE", 60)
    script = Script(permits=threading.Semaphore(0))
    with serving(script) as mini:
        connection = mini.started(prompt="p", max_tokens=9, stream=True)
        until(lambda: mini.engine.stats.running == 1)
        script.permits.release()
        answer = connection.getresponse()
        answer.readline()
        mini.server.should_exit = True

        def refused():
            with suppress(OSError):
                mini.ask("GET", "/health")
                return False
            return True

        until(refused)
        script.permits = None
        assert answer.read().decode().endswith("data: [DONE]\n\n")


def test_an_engine_that_stands_still_says_so():
    with serving(Script()) as mini:
        mini.engine.close()
        until(lambda: mini.engine.closed)
        assert mini.ask("GET", "/health")[::2] == (503, '{"status": "stopped"}')
        assert mini.ask("POST", "/v1/completions", {"model": "mini", "prompt": "p"})[0] == 503


# --- the program ---------------------------------------------------------------------------------------------------


def test_where_to_listen():
    taken = server.listen("127.0.0.1", 0)
    with pytest.raises(SystemExit, match="in use already"):
        server.listen("127.0.0.1", taken.getsockname()[1])
    for host in ("no.such.host.invalid", "a..b", "a" * 100):
        with pytest.raises(SystemExit, match=f"no host '{host}'"):
            server.listen(host, 0)
    taken.close()


def test_who_can_reach_it():
    assert not any(map(server.reachable, ["127.0.0.1", "127.9.9.9", "::1"]))
    assert all(map(server.reachable, ["0.0.0.0", "::", "192.168.0.7", "fe80::1%eth0"]))


def test_a_model_whose_ids_have_no_text_is_refused():
    model = argparse.Namespace(vocab_size=300, max_seq_len=9)
    with pytest.raises(SystemExit, match="no text for 256"):
        serve.model_of("mini", model, argparse.Namespace(tokens=BYTES))


def test_refusals_hold_no_more_than_is_said():
    with pytest.raises(ApiError) as caught:
        asked.read(json.dumps({"model": "m" * 500_000}).encode(), False, MODEL)
    assert len(json.dumps(caught.value.body)) < 300

"""What was asked: the fields of a request become prompts of ids and a way to sample."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from tito.jobs.serving.fields import ApiError, Fields, kind, parsed, shown, wrong

DEFAULT_TOKENS = 16  # of a completion, as OpenAI has it; a chat goes on to the end of the context
MOST_CHOICES, MOST_STOPS = 128, 4
COLDEST = 1e-6  # below, the likeliest token wins as it does at 0, and what is divided by it may overflow
CHAT_ENDS = ("\n\nuser:",)  # a model that goes on with the user's words has had its turn
ROLES = ("system", "developer", "user", "assistant")


@dataclass(frozen=True)
class Model:
    """What of the model and its tokenizer decides whether a request can be served."""

    name: str
    context: int  # the most tokens of prompt and answer together
    vocab_size: int
    longest_token: int  # bytes
    encode: Callable[[str], list[int]]


@dataclass(frozen=True)
class Asked:
    """A request that can be served: `choices` are (prompt, sampling), prompt after prompt, each n times."""

    choices: list[tuple[list[int], dict]]
    prompt_tokens: int
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool


def read(body: bytes, chat: bool, model: Model) -> Asked:
    """The request in `body`, or an ApiError that says what is wrong with it."""
    fields = Fields(parsed(body))
    named = fields.take("model")
    if not isinstance(named, str):
        raise wrong("model", f"is needed: the name of a model, here {model.name!r}")
    if named != model.name:
        raise no_such_model(named, model)
    prompts = [conversation(fields.take("messages"), model)] if chat else texts(fields.take("prompt"), model)
    n, seed = fields.whole("n", 1, 1, MOST_CHOICES), fields.whole("seed", None, -(2**63), 2**63 - 1)
    if n * len(prompts) > MOST_CHOICES:
        raise wrong("n", f"times the prompts is {n * len(prompts)}, and one request has at most {MOST_CHOICES} choices")
    temperature, top_k = fields.number("temperature", 1.0, 0, 2), fields.whole("top_k", None, 1)
    how = {"temperature": temperature if temperature >= COLDEST else 0.0, "top_k": top_k}
    asked = most_tokens(fields, chat)
    stops, stream = stop_strings(fields.take("stop")), fields.flag("stream")
    include_usage = stream_options(fields.take("stream_options"), stream)
    fields.finish()
    choices = []
    for prompt in prompts:
        room = new_tokens(len(prompt), asked, chat, model)
        for _ in range(n):
            own = None if seed is None else (seed + len(choices)) % 2**64  # choices differ, and repeat with the seed
            choices.append((prompt, {**how, "max_new_tokens": room, "seed": own}))
    return Asked(choices, sum(map(len, prompts)), stops + CHAT_ENDS * chat, stream, include_usage)


def no_such_model(named: str, model: Model) -> ApiError:
    message = f"The model {shown(named)} does not exist; this server has {model.name!r}."
    return ApiError(404, message, "model", "model_not_found")


def texts(prompt, model: Model) -> list[list[int]]:
    """The prompts as ids: a string, a list of strings, a list of ids, or a list of such lists."""
    if isinstance(prompt, str):
        return [encoded(prompt, "prompt", model)]
    if not isinstance(prompt, list) or not prompt:
        raise wrong("prompt", f"is a string, or a list of strings or of ids that is not empty; got {kind(prompt)}")
    if len(prompt) <= MOST_CHOICES and all(isinstance(one, str) for one in prompt):
        return [encoded(one, f"prompt[{i}]", model) for i, one in enumerate(prompt)]
    if len(prompt) <= MOST_CHOICES and all(isinstance(one, list) for one in prompt):
        return [ids(one, f"prompt[{i}]", model) for i, one in enumerate(prompt)]
    if any(isinstance(one, (str, list)) for one in prompt):
        raise wrong("prompt", f"is a list of one kind, with at most {MOST_CHOICES} texts")
    return [ids(prompt, "prompt", model)]


def ids(values: list, where: str, model: Model) -> list[int]:
    for value in values:
        if type(value) is not int or not 0 <= value < model.vocab_size:
            raise wrong(where, f"holds ids from 0 to {model.vocab_size - 1}; got {shown(value)}")
    return fitting(values, where, model)


def encoded(text: str, where: str, model: Model) -> list[int]:
    """The ids of a text. One that is far too long is not cut into tokens first."""
    try:
        least = math.ceil(len(text.encode()) / model.longest_token)
    except UnicodeEncodeError as error:
        raise wrong(where, f"holds half of a surrogate pair at position {error.start}, which is no character") from None
    if least >= model.context:
        raise too_long(f"your prompt has at least {least}", model)
    return fitting(model.encode(text), where, model)


def fitting(prompt: list[int], where: str, model: Model) -> list[int]:
    """The prompt, if there is one and it leaves room for an answer."""
    if not prompt:
        raise wrong(where, "is empty; at least one token is needed")
    if len(prompt) >= model.context:
        raise too_long(f"your prompt has {len(prompt)}", model)
    return prompt


def conversation(messages, model: Model) -> list[int]:
    """The ids of a chat, written as text: `role: content` and an empty line for each message, then `assistant:`."""
    if not isinstance(messages, list) or not messages:
        raise wrong("messages", f"is a list of messages that is not empty; got {kind(messages)}")
    lines = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, dict):
            raise wrong(where, f"is an object with role and content, not {kind(message)}")
        if message.get("role") not in ROLES:
            raise wrong(f"{where}.role", f"is one of {', '.join(ROLES)}; got {shown(message.get('role'))}")
        lines.append(f"{message['role']}: {content(message.get('content'), f'{where}.content')}\n\n")
    return encoded("".join([*lines, "assistant:"]), "messages", model)


def content(value, where: str) -> str:
    """What a message says: a string, or parts of the type text."""
    if isinstance(value, str):
        return value
    parts = value if isinstance(value, list) and value else [None]
    if not all(isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
               for part in parts):
        raise wrong(where, "is a string, or a list of parts of the type text")
    return "".join(part["text"] for part in parts)


def most_tokens(fields: Fields, chat: bool) -> int | None:
    """max_tokens; a chat may say max_completion_tokens, its newer name, instead."""
    old = fields.whole("max_tokens", None, 1)
    new = fields.whole("max_completion_tokens", None, 1) if chat else None
    if old is not None and new is not None:
        raise wrong("max_tokens", "and max_completion_tokens are two names of one thing; set one of them")
    return new if old is None else old


def new_tokens(prompt: int, asked: int | None, chat: bool, model: Model) -> int:
    """How many tokens a prompt of this length gets."""
    room = model.context - prompt
    if asked is None:
        return room if chat else min(DEFAULT_TOKENS, room)
    if asked > room:
        raise too_long(f"you requested {shown(prompt + asked)} ({prompt} of prompt, {shown(asked)} to come)", model)
    return asked


def stop_strings(value) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise wrong("stop", f"is a string or a list of at most {MOST_STOPS}, none of them empty")
    return tuple(stops)


def stream_options(value, stream: bool) -> bool:
    """Is a last event with the usage wanted?"""
    if value is None:
        return False
    if not isinstance(value, dict) or not stream:
        raise wrong("stream_options", "is an object and goes with stream: true")
    options = Fields(value)
    include_usage = options.flag("include_usage")
    options.finish()
    return include_usage


def too_long(what: str, model: Model) -> ApiError:
    """More tokens than the model has positions for."""
    most = f"This model's context has room for {model.context} tokens of prompt and answer together"
    return ApiError(400, f"{most}, and {what}.", code="context_length_exceeded")

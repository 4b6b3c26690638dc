"""The JSON of a request, field by field. What is wrong with one becomes an error in OpenAI's form.

A field that OpenAI knows and we do not serve is refused by name, and so is an unknown one, as OpenAI does: a mistyped
`max_token` is then no silent surprise. What cannot change the text (`user`, `metadata`) is taken and ignored.
"""

from __future__ import annotations

import json

# Only these values change nothing here, so only they are taken.
NEUTRAL = {
    "top_p": [1], "best_of": [1], "echo": [False], "suffix": [""], "logprobs": [False], "top_logprobs": [0],
    "presence_penalty": [0], "frequency_penalty": [0], "logit_bias": [{}], "response_format": [{"type": "text"}],
    "tools": [[]], "functions": [[]], "tool_choice": ["none", "auto"], "function_call": ["none", "auto"],
    "parallel_tool_calls": [True, False], "modalities": [["text"]], "audio": [], "prediction": [],
    "reasoning_effort": [], "verbosity": [], "web_search_options": [],
}  # fmt: skip
IGNORED = ("user", "metadata", "store", "safety_identifier", "prompt_cache_key", "service_tier")


class ApiError(Exception):
    """An answer that is an error, in OpenAI's form."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None,
                 kind: str = "invalid_request_error", headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.headers = status, headers
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Fields:
    """The fields of a JSON object, each taken once; null is as good as absent."""

    def __init__(self, values: dict):
        self.values = dict(values)

    def take(self, name: str):
        return self.values.pop(name, None)

    def whole(self, name: str, default: int | None, least: int, most: int | None = None) -> int | None:
        value = self.take(name)
        if value is None:
            return default
        if type(value) is not int:
            raise wrong(name, f"is a whole number, not {shown(value) if type(value) is float else kind(value)}")
        if value < least or most is not None and value > most:
            limits = f"at least {least}" if most is None else f"from {least} to {most}"
            raise wrong(name, f"is {limits}; got {shown(value)}")
        return value

    def number(self, name: str, default: float, least: float, most: float) -> float:
        value = self.take(name)
        if value is None:
            return default
        if type(value) not in (int, float):
            raise wrong(name, f"is a number, not {kind(value)}")
        if not least <= value <= most:  # nor is NaN
            raise wrong(name, f"is from {least} to {most}; got {shown(value)}")
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.take(name)
        if value is not None and type(value) is not bool:
            raise wrong(name, f"is true or false, not {kind(value)}")
        return bool(value)

    def finish(self) -> None:
        """What is left has to change nothing."""
        for name, value in self.values.items():
            if name not in NEUTRAL and name not in IGNORED:
                raise wrong(None, f"Unrecognized request argument supplied: {shown(name)}")
            if name in NEUTRAL and value is not None and not any(same(value, fine) for fine in NEUTRAL[name]):
                instead = " or ".join(["leave it out", *map(json.dumps, NEUTRAL[name])])
                raise wrong(name, f"is not served with the value {shown(value)}; {instead}", "unsupported_parameter")


def parsed(body: bytes) -> dict:
    """The JSON object in `body`. NaN and infinity are no JSON."""

    def refuse(name: str):
        raise ValueError(f"it holds {name}, which is no number there")

    try:
        value = json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        why = "it is nested too deep" if isinstance(error, RecursionError) else error
        raise ApiError(400, f"The body of the request is not JSON: {why}.", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"The body of the request is a JSON object, not {kind(value)}.", code="invalid_json")
    return value


def wrong(name: str | None, message: str, code: str | None = None) -> ApiError:
    return ApiError(400, f"'{name}' {message}." if name else f"{message}.", name, code)


def same(value, fine) -> bool:
    """Equal, and of one kind: 1.0 is 1, but true is not."""
    return value == fine and isinstance(value, bool) == isinstance(fine, bool)


def kind(value) -> str:
    """What JSON calls a value."""
    names = {bool: "a boolean", str: "a string", list: "a list", dict: "an object", type(None): "null"}
    return names.get(type(value), "a number")


def shown(value, most: int = 60) -> str:
    """A value as it came, cut where it is long: an error does not send back a megabyte."""
    if isinstance(value, (list, dict)):
        return kind(value)
    if type(value) is int and abs(value) >= 10**most:
        return "a number of more digits than make sense"
    text = json.dumps(value)
    return text if len(text) <= most else text[:most] + "..."

"""The forms of the answers: OpenAI's objects for texts and chats, whole or in pieces, and Prometheus' for metrics."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence

from tito.jobs.serving.engine import Busy, Refused, Stats, Stopped
from tito.jobs.serving.fields import ApiError


class Answer:
    """The objects that answer one request: they share an id and a time."""

    def __init__(self, chat: bool, model: str):
        self.chat, self._word = chat, "chat.completion" if chat else "text_completion"
        self._shared = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model,
        }  # fmt: skip

    def whole(self, choices: Sequence[tuple[str, str]], usage: dict) -> dict:
        """All at once: `choices` are (text, why it ended)."""
        made = [self._choice(i, *choice, "message") for i, choice in enumerate(choices)]
        return {**self._shared, "object": self._word, "choices": made, "usage": usage}

    def piece(self, index: int, text: str, finish: str | None, first: bool = False) -> dict:
        """One event of a stream: more text of one choice, or its end."""
        return self._event([self._choice(index, text, finish, "delta", first)])

    def usage(self, usage: dict) -> dict:
        """The last event of a stream, where it was asked for."""
        return {**self._event([]), "usage": usage}

    def _event(self, choices: list[dict]) -> dict:
        return {**self._shared, "object": self._word + ".chunk" * self.chat, "choices": choices}

    def _choice(self, index: int, text: str, finish: str | None, part: str, role: bool = True) -> dict:
        choice = {"index": index, "logprobs": None, "finish_reason": finish}
        if not self.chat:
            return {**choice, "text": text}
        said = {"content": text} if text or part == "message" else {}
        return {**choice, part: {"role": "assistant", **said} if role else said}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


def event(value: dict | str) -> bytes:
    """A server-sent event. JSON has no line break of its own, so one line is enough."""
    return f"data: {value if isinstance(value, str) else json.dumps(value)}\n\n".encode()


def error_of(error: Exception) -> ApiError:
    """What a client is told of an error. Of one of ours it hears nothing but that: the terminal shows the rest."""
    match error:
        case ApiError():
            return error
        case Refused():
            return ApiError(400, str(error))
        case Busy():
            again = {"Retry-After": "1"}
            return ApiError(503, "Too many requests are waiting; try again soon.", None, "overloaded", "server_error",
                            again)
        case Stopped():
            return ApiError(503, "The server is being stopped.", None, "stopped", "server_error")
    return ApiError(500, "An internal error ended this request; the server's terminal shows it.", None,
                    "internal_error", "server_error")


METRICS = {
    "tito_blocks_free": ("gauge", "Blocks of the paged cache that are free"),
    "tito_blocks_total": ("gauge", "Blocks of the paged cache"),
    "tito_requests_running": ("gauge", "Requests that the scheduler runs"),
    "tito_requests_waiting": ("gauge", "Requests that wait for their turn"),
    "tito_requests_finished_total": ("counter", "Requests that came to their end"),
    "tito_requests_cancelled_total": ("counter", "Requests whose client left"),
    "tito_requests_failed_total": ("counter", "Requests that an error of the server ended"),
    "tito_generated_tokens_total": ("counter", "Tokens that were generated"),
}


def metrics(stats: Stats) -> str:
    """Prometheus' text form. A list of three prompts counts as three requests."""
    counted = [stats.totals.get(name, 0) for name in ("finished", "cancelled", "failed", "tokens")]
    lines = [
        f"# HELP {name} {help}.\n# TYPE {name} {kind}\n{name} {value}\n"
        for (name, (kind, help)), value in zip(METRICS.items(), [*stats[:4], *counted], strict=True)
    ]
    return "".join(lines)

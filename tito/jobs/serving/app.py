"""The routes: what is asked over HTTP goes to the engine, and what comes of it goes back."""

from __future__ import annotations

import asyncio
import json
import time
import traceback
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from functools import partial

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from tito.jobs.serving import answers, asked
from tito.jobs.serving.engine import Broken, Busy, Engine, Event, Job, Refused, Stopped
from tito.jobs.serving.fields import ApiError, shown

MOST_BODY = 1 << 20  # bytes; a prompt that fits the context is far smaller
MOST_DROPPED = 64 << 20  # of what is larger, so much is read and dropped, so that the client hears why


class Json(JSONResponse):
    """JSON in ASCII: what a client sent may hold half a surrogate pair, which has no bytes."""

    def render(self, content) -> bytes:
        return json.dumps(content).encode()


class EventStream(Response):
    """Server-sent events, as they come."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes]):
        self.events, self.status_code, self.background = events, 200, None
        self.init_headers({"Cache-Control": "no-cache"})

    async def __call__(self, scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self.events) as events:
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class Left(Exception):
    """The client has gone."""


def application(engine: Engine, model: asked.Model) -> Starlette:
    """The server's routes over one engine and one model."""
    known = {"id": model.name, "object": "model", "created": int(time.time()), "owned_by": "tito"}

    async def health(request: Request) -> Response:
        return Json({"status": "stopped" if engine.closed else "ok"}, 503 if engine.closed else 200)

    async def metrics(request: Request) -> Response:
        return PlainTextResponse(answers.metrics(engine.stats), media_type="text/plain; version=0.0.4")

    async def models(request: Request) -> Response:
        return Json({"object": "list", "data": [known]})

    async def one_model(request: Request) -> Response:
        if request.path_params["name"] != model.name:
            raise asked.no_such_model(request.path_params["name"], model)
        return Json(known)

    async def complete(request: Request, chat: bool) -> Response:
        body = await body_of(request)
        wanted = await asyncio.to_thread(asked.read, body, chat, model)  # a tokenizer may need a second for a megabyte
        reply = streamed if wanted.stream else at_once
        return await reply(wanted, answers.Answer(chat, model.name), run(engine, wanted, request))

    routes = [
        Route("/v1/completions", partial(complete, chat=False), methods=["POST"]),
        Route("/v1/chat/completions", partial(complete, chat=True), methods=["POST"]),
        Route("/v1/models", models), Route("/v1/models/{name:path}", one_model),
        Route("/health", health), Route("/metrics", metrics),
    ]  # fmt: skip
    said = dict.fromkeys((ApiError, Refused, Busy, Stopped, Broken, Exception), refuse)
    said |= {HTTPException: not_routed, Left: leave, ClientDisconnect: leave}
    app = Starlette(routes=routes, exception_handlers=said)
    app.router.redirect_slashes = False
    return app


async def body_of(request: Request) -> bytes:
    """The body of a request, which has to call itself JSON: a web page cannot make its visitors' browsers send that."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "The request needs the header 'Content-Type: application/json'.")
    announced, body, size = int(request.headers.get("content-length", 0)), bytearray(), 0
    if announced <= MOST_DROPPED:
        async for chunk in request.stream():
            size += len(chunk)
            body += chunk if size <= MOST_BODY else b""
            if size > MOST_DROPPED:
                break
    if max(size, announced) > MOST_BODY:
        close = {"Connection": "close"}
        raise ApiError(413, f"The body of the request is larger than {MOST_BODY:,} bytes.", headers=close)
    return bytes(body)


async def run(engine: Engine, wanted: asked.Asked, request: Request) -> AsyncIterator[tuple[int, Event]]:
    """What becomes of each choice, as it comes. Whoever leaves before the end has what still runs cancelled."""
    loop, events = asyncio.get_running_loop(), asyncio.Queue()

    def hear(index: int, event: Event) -> None:
        with suppress(RuntimeError):  # the loop has ended, and nobody listens
            loop.call_soon_threadsafe(events.put_nowait, (index, event))

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        hear(0, Event(error=Left()))

    jobs = [Job(*choice, wanted.stops, partial(hear, index)) for index, choice in enumerate(wanted.choices)]
    watching, running = loop.create_task(watch()), len(jobs)
    try:
        for job in jobs:
            engine.submit(job)
        while running:
            index, event = await events.get()
            if event.error is not None:
                raise event.error
            running -= event.finish is not None
            yield index, event
    finally:
        watching.cancel()
        for job in jobs:
            engine.cancel(job)


async def at_once(wanted: asked.Asked, answer: answers.Answer, events: AsyncIterator) -> Response:
    """One object, when every choice has come to its end."""
    texts, ends, made = [""] * len(wanted.choices), [""] * len(wanted.choices), 0
    async with aclosing(events):
        async for index, event in events:
            texts[index], ends[index], made = texts[index] + event.text, event.finish, made + event.tokens
    return Json(answer.whole(list(zip(texts, ends)), answers.usage(wanted.prompt_tokens, made)))


async def streamed(wanted: asked.Asked, answer: answers.Answer, events: AsyncIterator) -> Response:
    """A stream of events, once there is a first one: an error before it still has a status of its own."""
    first = await anext(events)
    return EventStream(pieces(wanted, answer, first, events))


async def pieces(wanted: asked.Asked, answer: answers.Answer, first: tuple, events: AsyncIterator):
    """The events of a stream as bytes; an error on the way is the last of them."""
    begun, made, coming = set(), 0, first
    async with aclosing(events):
        try:
            while coming:
                index, event = coming
                made += event.tokens
                yield answers.event(answer.piece(index, event.text, event.finish, index not in begun))
                begun.add(index)
                coming = await anext(events, None)
        except Left:
            return
        except Exception as error:
            yield answers.event(told(error).body)
            return
    if wanted.include_usage:
        yield answers.event(answer.usage(answers.usage(wanted.prompt_tokens, made)))
    yield answers.event("[DONE]")


def told(error: Exception) -> ApiError:
    """What the client hears of an error; one that nobody foresaw is shown on the terminal."""
    said = answers.error_of(error)
    if said.status == 500 and not isinstance(error, Broken):
        traceback.print_exception(error)
    return said


async def refuse(request: Request, error: Exception) -> Response:
    said = told(error)
    return Json(said.body, said.status, said.headers)


async def not_routed(request: Request, error: HTTPException) -> Response:
    what = f"There is no {shown(request.method)[1:-1]} {shown(request.scope['path'])[1:-1]} here"
    ways = "POST /v1/completions, /v1/chat/completions; GET /v1/models, /health, /metrics"
    return Json(ApiError(error.status_code, f"{what}. {ways}.").body, error.status_code, error.headers)


async def leave(request: Request, error: Exception) -> Response:
    """Nobody hears this: the client has gone."""
    return Response(status_code=499)

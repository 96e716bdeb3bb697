"""The HTTP side: /health, /v1/models, /v1/completions and /v1/chat/completions, streamed or whole, with OpenAI's error format.

Deliberate departures from OpenAI's API: decoding is greedy unless a temperature is given, the default is 256 new tokens, and
`ignore_eos` and `min_tokens` exist, as on other servers, for measuring. Everything here runs on the event loop and waits only
for clients, so /health answers whatever the engine is doing. Prompts and answers are never logged.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from assay.server.engine import Engine, Job
from assay.server.protocol import ApiError, choice, dumps, event, usage

logger = logging.getLogger(__name__)

LEAST_BODY = 1 << 20  # bytes of a request that are always read
BODY_PER_TOKEN = 24  # and so many for each token of the context: a long word in escapes
BODY_SECONDS = 30.0  # for a request to arrive in
STALLED_SECONDS = 60.0  # that a client may take to read a piece before it counts as gone


def create_app(model: Any, tokenizer: Any, *, name: str, api_key: str | None = None) -> FastAPI:
    """The ASGI application over a model; with `api_key`, everything under /v1 needs it. The engine is `app.state.engine`."""
    engine = Engine(model, tokenizer, name)
    app = FastAPI(title="assay", openapi_url=None)
    app.state.engine = engine
    card = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "assay"}

    async def authorised(request: Request) -> None:
        given = request.headers.getlist("authorization")
        if api_key is None or (
            len(given) == 1 and hmac.compare_digest(given[0].encode("latin-1"), f"Bearer {api_key}".encode())
        ):
            return
        headers = {"WWW-Authenticate": "Bearer"}
        raise ApiError(401, "wrong or missing API key", code="invalid_api_key", headers=headers)

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return _json(error.body(), error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        path = request.scope["path"][:200].encode("ascii", "backslashreplace").decode()
        code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code)
        told = ApiError(error.status_code, f"{request.method} {path}: {error.detail}", code=code)
        return _json(told.body(), told.status, dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> Response:
        return _json(ApiError(500, f"the server failed ({type(error).__name__})", code="internal_error").body(), 500)

    @app.get("/health")
    async def health() -> Response:
        return _json({"status": "ok"})

    @app.get("/v1/models", dependencies=[Depends(authorised)])
    async def models() -> Response:
        return _json({"object": "list", "data": [card]})

    @app.get("/v1/models/{wanted:path}", dependencies=[Depends(authorised)])
    async def one_model(wanted: str) -> Response:
        if wanted != name:
            raise ApiError(404, f"no such model here; this server has {name!r}", param="model", code="model_not_found")
        return _json(card)

    @app.post("/v1/completions", dependencies=[Depends(authorised)])
    async def completions() -> Response:
        return _Answer(engine, chat=False)

    @app.post("/v1/chat/completions", dependencies=[Depends(authorised)])
    async def chat_completions() -> Response:
        return _Answer(engine, chat=True)

    return app


def _json(document: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(dumps(document), status, headers, media_type="application/json")


class _Answer(Response):
    """Reads a request, and answers it as long as its client stays connected."""

    def __init__(self, engine: Engine, *, chat: bool) -> None:
        super().__init__()
        self.engine, self.chat = engine, chat

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.engine.place():
            try:
                body = await read_body(Request(scope, receive), max(LEAST_BODY, BODY_PER_TOKEN * self.engine.context))
            except ClientDisconnect:
                return
            await _while_there(receive, self._answer(body, scope, receive, send))

    async def _answer(self, body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        job = None
        try:
            job = await self.engine.read(body, chat=self.chat)
            head = {
                "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}",
                "object": "chat.completion" if self.chat else "text_completion",
                "created": int(time.time()),
                "model": self.engine.name,
            }
            if job.ask.stream:
                with contextlib.suppress(TimeoutError):
                    await _send_events(send, self._events(job, head))
            else:
                await _json(head | await self._whole(job))(scope, receive, send)
        except Exception as error:
            raise _told(error) from None
        finally:
            if job is not None:  # cancelled between two pieces, say
                job.left = True

    async def _whole(self, job: Job) -> dict[str, Any]:
        texts, choices, made = [""] * len(job.prompts), [], 0
        async for piece in self.engine.pieces(job):
            texts[piece.index] += piece.text
            if piece.finish:
                choices.append(choice(self.chat, piece.index, texts[piece.index], piece.finish))
                made += piece.tokens
        return {"choices": choices, "usage": usage(job.prompt_tokens(), made)}

    async def _events(self, job: Job, head: dict[str, Any]) -> AsyncIterator[bytes]:
        if self.chat:
            head = head | {"object": "chat.completion.chunk"}
        if job.ask.include_usage:
            head = head | {"usage": None}
        made = 0
        try:
            if self.chat:
                yield event(head | {"choices": [choice(True, 0, "", None, delta="first")]})
            async for piece in self.engine.pieces(job):
                delta: Any = "last" if piece.finish else "next"
                yield event(head | {"choices": [choice(self.chat, piece.index, piece.text, piece.finish, delta=delta)]})
                made += piece.tokens
            if job.ask.include_usage:
                yield event(head | {"choices": [], "usage": usage(job.prompt_tokens(), made)})
            yield b"data: [DONE]\n\n"
        except Exception as error:  # the status has been sent already: only an event can still report the error
            yield event(_told(error).body())


async def read_body(request: Request, most: int) -> bytes:
    """The body of a request of type application/json. Raises ApiError 400, 408 or 413 if it has another type, is too late, or too long."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(400, "send the request as JSON, with Content-Type: application/json")
    too_long = ApiError(413, f"a request may have {most} bytes", code="request_too_large")
    length = request.headers.get("content-length", "")
    if length and (not length.isascii() or not length.isdigit() or len(length) > 18 or int(length) > most):
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > most:
                    raise too_long
    except TimeoutError:
        raise ApiError(408, f"the request did not arrive within {BODY_SECONDS:.0f} s", code="timeout") from None
    return bytes(body)


async def _while_there(receive: Receive, answer: Coroutine[Any, Any, None]) -> None:
    """Run `answer` to its end, or until the client has left."""

    async def left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    work, watch = asyncio.ensure_future(answer), asyncio.ensure_future(left())
    try:
        await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            work.result()
    finally:
        work.cancel()
        watch.cancel()
        await asyncio.gather(work, watch, return_exceptions=True)


async def _send_events(send: Send, events: AsyncIterator[bytes]) -> None:
    headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    async for data in events:
        async with asyncio.timeout(STALLED_SECONDS):
            await send({"type": "http.response.body", "body": data, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def _told(error: Exception) -> ApiError:
    """What a client is told about an error. For an unforeseen one, its place is logged but not its text, which may hold the prompt."""
    if isinstance(error, ApiError):
        return error
    place = "".join(traceback.format_tb(error.__traceback__))
    logger.error("answering failed with %s:\n%s", type(error).__name__, place)
    return ApiError(500, f"generation failed ({type(error).__name__})", code="internal_error")

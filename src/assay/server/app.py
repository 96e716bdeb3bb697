"""The HTTP side: OpenAI's endpoints over the models of a server, with its own for load balancers, Prometheus and operators.

Deliberate departures from OpenAI's API: decoding is greedy unless a temperature is given, the default is 256 new tokens,
`ignore_eos`, `min_tokens` and `top_k` exist, as on other servers, and embeddings are what `assay.server.embeddings` says.
Everything here runs on the event loop and waits only for clients, so /health answers whatever the schedulers are doing. Prompts
and answers are never logged.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from fastapi import Depends, FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from assay.errors import AssayError
from assay.server import fields, metrics, schema
from assay.server.answer import FORMS, Tally, dumps, joined
from assay.server.embeddings import embed, passes
from assay.server.engine import Engine, Job, Piece
from assay.server.errors import ApiError, going_down, overloaded
from assay.server.middleware import Observed, Record, told
from assay.server.models import Models
from assay.server.names import served_name

LEAST_BODY = 1 << 20  # bytes of a request that are always read
BODY_PER_TOKEN = 24  # and so many for each token of the context: a long word in escapes
BODY_SECONDS = 30.0  # for a request to arrive in
STALLED_SECONDS = 60.0  # that a client may take to read a piece before it counts as gone


@dataclass(frozen=True)
class Limits:
    """What a server takes: requests at a time, bytes of one (None: as many as the longest context needs), tokens of a prompt, seconds."""

    requests: int = 256
    body: int | None = None
    prompt_tokens: int | None = None
    seconds: float = 600.0


class Server:
    """The models, the limits, who is asking, and whether the server goes down."""

    def __init__(self, models: Models, limits: Limits) -> None:
        self.models, self.limits = models, limits
        self.asking = 0
        self.draining = self.stopping = False
        self.requests = metrics.Requests()
        self.reader = ThreadPoolExecutor(1, "assay-reader")  # where requests are checked and tokenised
        self.embedder = ThreadPoolExecutor(1, "assay-embedder")

    def drain(self) -> None:
        """Take no new requests; those that are here go on. May be called from a signal handler."""
        self.draining = True

    def stop(self) -> None:
        """End what is running; its clients are told. May be called from a signal handler."""
        self.draining = self.stopping = True
        self.models.stop()

    def close(self) -> None:
        """End all threads. Blocks until they have ended what they are at."""
        self.stop()
        self.models.close()
        self.reader.shutdown(wait=False, cancel_futures=True)
        self.embedder.shutdown(wait=False, cancel_futures=True)

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """A place for a request. Raises ApiError 503, saying when to retry, when all are taken or the server goes down."""
        if self.draining:
            raise going_down()
        if self.asking >= self.limits.requests:
            raise overloaded(f"{self.asking} requests are waiting already")
        self.asking += 1
        try:
            yield
        finally:
            self.asking -= 1

    def most_bytes(self) -> int:
        """The most bytes a request may have."""
        if self.limits.body is not None:
            return self.limits.body
        return max([LEAST_BODY, *(BODY_PER_TOKEN * engine.context for engine in self.models.engines())])


def create_app(
    models: Models,
    *,
    api_keys: Sequence[str] = (),
    limits: Limits | None = None,
    allow_load: bool = False,
    cors_origins: Sequence[str] = (),
    root_path: str = "",
) -> FastAPI:
    """The ASGI application over some models; `app.state.server` is its `Server`.

    With `api_keys`, everything but /health and /ready needs one of them. `allow_load` lets those who have a key load and unload
    models, from anywhere on this machine; it raises ValueError without keys. Other websites may call it only from `cors_origins`
    ("*": any). `root_path` is what a proxy puts before the paths, whether it takes it off again or not.
    """
    if allow_load and not api_keys:
        raise ValueError("allow_load needs api_keys: whoever may load models may read any model on this machine")
    server = Server(models, limits or Limits())
    keys = [f"Bearer {key}".encode() for key in api_keys]
    app = FastAPI(title="assay", openapi_url=None, redirect_slashes=False)
    app.state.server = server

    async def authorised(request: Request) -> None:
        given = [value.encode("latin-1") for value in request.headers.getlist("authorization")]
        found = [hmac.compare_digest(given[0], key) for key in keys] if len(given) == 1 else []
        if keys and not any(found):
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

    known = [Depends(authorised)]

    @app.get("/health")
    async def health() -> Response:
        return _json({"status": "ok"})

    @app.get("/ready")
    async def ready() -> Response:
        if server.draining:
            return _json({"status": "draining"}, 503)
        if models.loading or not len(models):
            return _json({"status": "loading" if models.loading else "no model"}, 503)
        return _json({"status": "ready"})

    @app.get("/metrics", dependencies=known)
    async def counted() -> Response:
        text = metrics.render(server.requests, server.asking, models.engines())
        return Response(text, media_type=metrics.CONTENT_TYPE)

    @app.get("/openapi.json", dependencies=known)
    async def described() -> Response:
        return _json(schema.document(keys=bool(keys), allow_load=allow_load, root_path=root_path))

    @app.get("/v1/models", dependencies=known)
    async def all_models() -> Response:
        return _json({"object": "list", "data": [models.card(name) for name in models.names()]})

    @app.get("/v1/models/{wanted:path}", dependencies=known)
    async def one_model(wanted: str) -> Response:
        return _json(models.card(wanted))

    @app.post("/v1/completions", dependencies=known)
    async def completions() -> Response:
        return _Generate(server, "completions")

    @app.post("/v1/chat/completions", dependencies=known)
    async def chat_completions() -> Response:
        return _Generate(server, "chat/completions")

    @app.post("/v1/responses", dependencies=known)
    async def responses() -> Response:
        return _Generate(server, "responses")

    @app.post("/v1/embeddings", dependencies=known)
    async def embeddings() -> Response:
        return _Embed(server)

    if allow_load:

        @app.post("/v1/models/load", dependencies=known)
        async def load() -> Response:
            return _Load(server)

        @app.post("/v1/models/unload", dependencies=known)
        async def unload() -> Response:
            return _Unload(server)

    if cors_origins:
        from fastapi.middleware.cors import CORSMiddleware

        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    paths = frozenset(schema.document(keys=False, allow_load=allow_load, root_path="")["paths"])
    app.add_middleware(Observed, requests=server.requests, paths=paths, root_path=root_path)
    return app


def _json(document: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(dumps(document), status, headers, media_type="application/json")


class _Posted(Response):
    """Reads a request, and answers it as long as its client stays connected."""

    def __init__(self, server: Server) -> None:
        super().__init__()
        self.server = server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.server.place():
            try:
                body = await read_body(Request(scope, receive), self.server.most_bytes())
            except ClientDisconnect:
                return
            await _while_there(receive, self._answered(body, scope, receive, send))

    async def _answered(self, body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        record: Record = scope["assay"]
        try:
            answer = await self.answer(body, record, send)
            if answer is not None:
                await _json(answer)(scope, receive, send)
        except AssayError as error:
            raise ApiError(400, str(error)) from None
        except Exception as error:
            raise told(error) from None

    async def answer(self, body: bytes, record: Record, send: Send) -> dict[str, Any] | None:
        """The JSON of the answer, or None if it has been sent already."""
        raise NotImplementedError

    async def read(self, work: Any, *given: Any) -> Any:
        """Do some work of reading in the reading thread, so that a long one delays only other requests that are being read."""
        return await asyncio.get_running_loop().run_in_executor(self.server.reader, work, *given)


class _Generate(_Posted):
    """One of the endpoints that generate."""

    def __init__(self, server: Server, path: str) -> None:
        super().__init__(server)
        self.path = path

    async def answer(self, body: bytes, record: Record, send: Send) -> dict[str, Any] | None:
        """The answer in one document, or None once its stream has been sent."""
        deadline = asyncio.get_running_loop().time() + self.server.limits.seconds
        engine, job = await self.read(self.prepared, body)
        job.began = record.began
        record.fields |= {"model": engine.name, "stream": job.ask.stream, "prompt_tokens": job.prompt_tokens()}
        if job.choice is not None:
            record.fields |= {"router_tokens": job.choice.tokens, "router_seconds": round(job.choice.seconds, 6)}
        form, tally = FORMS[self.path](engine, job), Tally(job)
        running = engine.start(job)
        try:
            if self.server.stopping:  # it may have begun to stop while this was read
                raise going_down()
            if job.ask.stream:
                await _send_events(send, self._events(form, tally, running, deadline))
                return None
            pieces: list[Piece] = []
            while batch := await self._next(running, deadline):
                tally.add(batch)
                pieces += batch
            whole: dict[str, Any] = form.whole(joined(pieces, len(job.settings)), tally)
            return whole
        finally:
            running.cancel()
            record.fields |= {
                "completion_tokens": tally.made,
                "cached_tokens": tally.cached,
                "finish": tally.finishes[:4],
            }

    def prepared(self, body: bytes) -> tuple[Engine, Job]:
        """The engine a request is for, and its job; in the reading thread."""
        try:
            document = fields.document(body)
            engine, choice = self.server.models.routed(document)
            if choice is not None:
                self.server.requests.chosen(engine.name, choice.tokens, choice.seconds)
            job = engine.prepare(self.path, document, self.server.limits.prompt_tokens)
            job.choice = choice
            return engine, job
        except RecursionError:
            raise ApiError(400, "the body is nested too deeply") from None

    async def _next(self, running: Any, deadline: float) -> list[Piece]:
        try:
            async with asyncio.timeout_at(deadline):
                pieces: list[Piece] = await running.take()
                return pieces
        except TimeoutError:
            seconds = self.server.limits.seconds
            raise ApiError(504, f"the answer was not ready within {seconds:g} s", code="timeout") from None

    async def _events(self, form: Any, tally: Tally, running: Any, deadline: float) -> AsyncIterator[bytes]:
        try:
            yield form.begin()
            while batch := await self._next(running, deadline):
                tally.add(batch)
                yield form.pieces(batch)
            yield form.end(tally)
        except Exception as error:  # the status has been sent already: only an event can still report the error
            yield form.failed(told(error))


class _Embed(_Posted):
    """/v1/embeddings"""

    async def answer(self, body: bytes, record: Record, send: Send) -> dict[str, Any]:
        """The embeddings of all texts, of several in one pass. Between two passes it may end, if the client has left."""
        engine, ask, inputs = await self.read(self.prepared, body)
        read = sum(map(len, inputs))
        record.fields |= {"model": engine.name, "prompt_tokens": read}
        loop, embedder = asyncio.get_running_loop(), self.server.embedder
        shown: dict[int, Any] = {}
        try:
            async with asyncio.timeout(self.server.limits.seconds):
                alike = bool(await loop.run_in_executor(embedder, lambda: engine.why_alike))
                for group in passes([len(ids) for ids in inputs], alike=alike):
                    if self.server.stopping:
                        raise going_down()
                    texts = [inputs[number] for number in group]
                    for number, vector in zip(
                        group, await loop.run_in_executor(embedder, embed, engine.model, texts), strict=True
                    ):
                        shown[number] = _embedding(number, vector, ask.base64)
        except TimeoutError:
            raise ApiError(504, "the embeddings were not ready in time", code="timeout") from None
        data = [{"object": "embedding", "index": number, "embedding": shown[number]} for number in range(len(inputs))]
        usage = {"prompt_tokens": read, "total_tokens": read}
        return {"object": "list", "data": data, "model": engine.name, "usage": usage}

    def prepared(self, body: bytes) -> tuple[Engine, Any, list[list[int]]]:
        """The engine a request is for, what it asks, and the token ids; in the reading thread."""
        try:
            document = fields.document(body)
            engine = self.server.models.of(document)
            ask, inputs = engine.prepare_embeddings(document, self.server.limits.prompt_tokens)
            return engine, ask, inputs
        except RecursionError:
            raise ApiError(400, "the body is nested too deeply") from None


def _embedding(number: int, vector: list[float], base64_wanted: bool) -> Any:
    """The numbers of an embedding as they are sent. Raises ApiError 500 where they are not finite."""
    numbers = np.asarray(vector, "<f4")
    if not np.isfinite(numbers).all():
        raise ApiError(500, f"the model gives no finite numbers for input[{number}]", param="input", code="not_finite")
    return base64.b64encode(numbers.tobytes()).decode() if base64_wanted else vector


class _Load(_Posted):
    """/v1/models/load"""

    async def answer(self, body: bytes, record: Record, send: Send) -> dict[str, Any]:
        """Load a model, or an adapter of one that is here; the answer is its card."""
        given = fields.read(fields.document(body), schema.LOAD)
        source, adapter, models = given["source"], given["adapter"], self.server.models
        if (source is None) == (adapter is None):
            raise ApiError(400, "give source or adapter, one of them", param="source")
        if given["base"] is not None and adapter is None:
            raise ApiError(400, "base goes with adapter only", param="base")
        name = given["model"] or served_name(source or adapter)
        if adapter is not None:
            await asyncio.to_thread(models.load_adapter, name, adapter, given["base"])
        else:
            await asyncio.to_thread(models.load, name, source)
        return models.card(name)


class _Unload(_Posted):
    """/v1/models/unload"""

    async def answer(self, body: bytes, record: Record, send: Send) -> dict[str, Any]:
        """Take a model away: new requests for it are refused at once, what runs on it ends in its own time."""
        given = fields.read(fields.document(body), schema.UNLOAD)
        engine = await asyncio.to_thread(self.server.models.unload, given["model"])
        # not waited for: its last answer may take minutes
        threading.Thread(target=engine.close, args=(self.server.limits.seconds,), daemon=True).start()
        return {"id": engine.name, "object": "model", "deleted": True}


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
    """Send a stream. A client that takes no piece for `STALLED_SECONDS` counts as gone."""
    headers = [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),  # or a proxy would wait for the whole
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    with contextlib.suppress(TimeoutError):
        async for data in events:
            if data:
                async with asyncio.timeout(STALLED_SECONDS):
                    await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

"""Around every request: its id, its line in the log, its place in the counts, and the last net for what goes wrong."""

from __future__ import annotations

import logging
import time
import traceback
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from assay.server import logs
from assay.server.errors import ApiError
from assay.server.metrics import Requests

logger = logging.getLogger("assay.server")

LEFT = 499  # the status in logs and counts of a request whose client left before its answer began


@dataclass
class Record:
    """What is known of a request: its id, when it came, and what its log line says beside that."""

    id: str
    began: float
    fields: dict[str, Any] = field(default_factory=dict)


class Observed:
    """An ASGI application around another one. `paths` are those whose names are counted; any other is counted as "other"."""

    def __init__(self, app: ASGIApp, *, requests: Requests, paths: frozenset[str], root_path: str) -> None:
        self.app, self.requests, self.paths, self.root_path = app, requests, paths, root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if self.root_path:
            scope["root_path"] = self.root_path
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"").decode("latin-1")
        record = scope["assay"] = Record(logs.request_id(given), time.monotonic())
        status = LEFT

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", record.id.encode())]}
            await send(message)

        try:
            await self.app(scope, receive, send_on)
        except Exception as error:
            if status != LEFT:  # the answer has begun: all that can be done is to break it off
                raise ConnectionAbortedError(told(error).message) from None
            await send_error(told(error), send_on)
        finally:
            seconds = time.monotonic() - record.began
            path = scope["path"].removeprefix(self.root_path)
            self.requests.answered(path if path in self.paths else "other", status, seconds)
            logs.REQUESTS.info(
                "request",
                extra={
                    "fields": {
                        "request_id": record.id,
                        "method": scope["method"],
                        "path": path if path in self.paths else "other",
                        "status": status,
                        "seconds": round(seconds, 6),
                        **record.fields,
                    }
                },
            )


def told(error: Exception) -> ApiError:
    """What a client is told about an error. For an unforeseen one, its place is logged but not its text, which may hold the prompt."""
    if isinstance(error, ApiError):
        return error
    place = "".join(traceback.format_tb(error.__traceback__))
    logger.error("answering failed with %s:\n%s", type(error).__name__, place)
    return ApiError(500, f"the server failed ({type(error).__name__})", code="internal_error")


async def send_error(error: ApiError, send: Send) -> None:
    """Send an error as a whole answer."""
    import json

    body = json.dumps(error.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    more = [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": [*headers, *more]})
    await send({"type": "http.response.body", "body": body})

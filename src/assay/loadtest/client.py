"""Asking a server: one connection a request, bytes stamped as they arrive, and read only when the answer is complete.

A streamed token costs one callback and one list entry, so that hundreds a second take little of a machine that the server under
test may share. The time of connecting counts as part of the request.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import json
import ssl
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

from assay.errors import InputError
from assay.loadtest.answers import Answer, Malformed, Response, message_of, read_answer
from assay.loadtest.traces import Request

TIMEOUT = 300.0  # seconds a request may take
LISTING = 30.0  # seconds in which a server must say which models it has


@dataclass(frozen=True)
class Server:
    """An OpenAI-compatible server, and how it is asked."""

    host: str
    port: int
    path: str  # of the API, without a slash at its end
    tls: bool = False
    model: str = ""
    chat: bool = True  # chat completions, or completions
    api_key: str | None = None
    timeout: float = TIMEOUT
    extra: Mapping[str, Any] = field(default_factory=dict)  # further fields of each request's body
    address: str | None = None  # where `host` was found

    @property
    def url(self) -> str:
        """As a user writes it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}{self.path}"


Connect = Callable[[Callable[[], asyncio.Protocol], Server], Awaitable[tuple[asyncio.BaseTransport, Any]]]
Reading = Callable[[Response], Any]


def server_at(url: str, **options: Any) -> Server:
    """The server at a URL such as http://127.0.0.1:8000 or https://host/v1; without a path, /v1 is meant. `options` are those of `Server`.

    Raises InputError for what is no such URL.

    >>> server_at("http://127.0.0.1:8000").url
    'http://127.0.0.1:8000/v1'
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or parts.scheme not in ("http", "https") or parts.query or parts.fragment or parts.username:
        raise InputError(f"URL must be http://HOST[:PORT][/PATH] or https://..., got {url[:200]!r}")
    if not url.isascii() or not url.isprintable() or " " in url:
        raise InputError(f"URL must be printable ASCII without spaces, got {url[:200]!r}")
    tls = parts.scheme == "https"
    return Server(host, port or (443 if tls else 80), parts.path.rstrip("/") or "/v1", tls, **options)


async def tcp(make: Callable[[], asyncio.Protocol], server: Server) -> tuple[asyncio.BaseTransport, Any]:
    """Connect to a server."""
    options: dict[str, Any] = {"ssl": _tls(), "server_hostname": server.host} if server.tls else {}
    return await asyncio.get_running_loop().create_connection(
        make, server.address or server.host, server.port, **options
    )


@functools.cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


async def ask(server: Server, request: Request, connect: Connect = tcp) -> Answer:
    """The answer to a request, streamed. Raises Malformed, with the kind of error, when there is none."""
    path = f"{server.path}/{'chat/completions' if server.chat else 'completions'}"
    answer: Answer = await _exchange(
        server, message(server, "POST", path, body_of(server, request)), read_answer, server.timeout, connect
    )
    return answer


async def found(server: Server, connect: Connect = tcp) -> Server:
    """The server with its address looked up, and its first model where none was named.

    Raises Malformed when it cannot be reached, or must be told which model and does not list any.
    """

    def listed(response: Response) -> str:
        if response.status != 200:
            raise Malformed(f"HTTP {response.status}", message_of(response.body))
        try:
            return str(json.loads(response.body)["data"][0]["id"])
        except (ValueError, LookupError, TypeError, RecursionError):
            raise Malformed("garbage", f"{server.url}/models lists no model; name one with --model") from None

    seen: list[str] = []

    async def watched(make: Callable[[], asyncio.Protocol], server: Server) -> tuple[asyncio.BaseTransport, Any]:
        transport, protocol = await connect(make, server)
        peer = transport.get_extra_info("peername")
        seen.extend([str(peer[0])] if isinstance(peer, tuple) else [])
        return transport, protocol

    try:
        model = await _exchange(server, message(server, "GET", f"{server.path}/models"), listed, LISTING, watched)
    except Malformed:
        if not server.model:
            raise
        model = server.model  # not every server lists its models
    return replace(server, model=server.model or model, address=seen[0] if seen else None)


def body_of(server: Server, request: Request) -> dict[str, Any]:
    """What a request says: greedy, streamed, with the usage at the end."""
    text: dict[str, Any] = (
        {"messages": [{"role": "user", "content": request.prompt}]} if server.chat else {"prompt": request.prompt}
    )
    settings = {"max_tokens": request.new_tokens, "temperature": 0}
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    return {"model": server.model, **text, **settings, **stream, **server.extra}


def message(server: Server, method: str, path: str, body: dict[str, Any] | None = None) -> bytes:
    """The bytes of an HTTP/1.1 request after which the server closes the connection."""
    data = b"" if body is None else json.dumps(body).encode()
    host = f"[{server.host}]" if ":" in server.host else server.host
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}:{server.port}", "Connection: close", "User-Agent: assay"]
    if server.api_key is not None:
        lines.append(f"Authorization: Bearer {server.api_key}")
    if body is not None:
        lines += ["Content-Type: application/json", "Accept: text/event-stream", f"Content-Length: {len(data)}"]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + data


async def _exchange(server: Server, data: bytes, read: Reading, timeout: float, connect: Connect) -> Any:
    """Send bytes on a connection of their own and read what comes back. Raises Malformed."""
    transport = None
    try:
        async with asyncio.timeout(timeout):
            transport, reply = await connect(_Reply, server)
            transport.write(data)  # type: ignore[attr-defined]
            await reply.done
    except TimeoutError:
        raise Malformed("timeout", f"no complete answer within {timeout:g} s") from None
    except OSError as error:
        raise Malformed(kind_of(error), f"{server.url}: {error.strerror or error}") from None
    finally:
        if transport is not None:
            transport.abort()  # type: ignore[attr-defined]
    return read(reply.response)


def kind_of(error: OSError) -> str:
    """A failed connection in two words.

    >>> kind_of(ConnectionRefusedError()), kind_of(ConnectionResetError()), kind_of(OSError(24, "too many files"))
    ('connection refused', 'connection reset', 'no connection (EMFILE)')
    """
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    if isinstance(error, ConnectionError):
        return "connection reset"
    if isinstance(error, ssl.SSLError):
        return "no TLS"
    # a host with several addresses fails with one message for all of them
    if "Connect call failed" in str(error) or error.errno == errno.ECONNREFUSED:
        return "connection refused"
    return f"no connection ({errno.errorcode.get(error.errno or 0, type(error).__name__)})"


class _Reply(asyncio.Protocol):
    """Collects a response; `done` is set when it is complete, or has the error that ended it."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.response, self.time = Response(), loop.time
        self.done: asyncio.Future[None] = loop.create_future()

    def data_received(self, data: bytes) -> None:
        if self.done.done():
            return
        try:
            if self.response.feed(self.time(), data):
                self.done.set_result(None)
        except Malformed as error:
            self.done.set_exception(error)

    def connection_lost(self, error: Exception | None) -> None:
        if self.done.done():
            return
        if error is not None:
            self.done.set_exception(error if isinstance(error, OSError) else OSError(str(error)))
            return
        try:
            self.response.close()
            self.done.set_result(None)
        except Malformed as cut:
            self.done.set_exception(cut)

"""What a server sends back, without sockets: an HTTP/1.1 response as it arrives, and the events that are in it.

Everything here is told the time rather than asking for it. What a server sends is untrusted: lengths are bounded, and whatever is
not HTTP, not an event stream or not JSON raises `Malformed`, whose `kind` is what errors are counted by.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

MOST_HEAD = 1 << 16  # bytes of a response's status line and headers
MOST_BODY = 1 << 26  # bytes of an answer
MOST_LINE = 1 << 20  # bytes of one event
SHOWN = 200  # characters of a server's message that are kept


class Malformed(Exception):
    """The server did not send what it should have; `kind` is the short name under which this is counted."""

    def __init__(self, kind: str, message: str = "") -> None:
        super().__init__(message or kind)
        self.kind = kind


@dataclass(frozen=True)
class Answer:
    """One answer: when its pieces of text came, how many tokens they were, and how it ended. Times are those the response was fed with."""

    times: tuple[float, ...]  # of each event with text
    end: float  # of the last byte
    tokens: int  # as the server counts them (`counted`), else the number of events with text
    counted: bool
    finish: str  # the server's finish_reason, "" where it gave none
    prompt_tokens: int | None = None
    cached_tokens: int = 0  # of the prompt's tokens, those the server says it had computed before


class Response:
    """An HTTP/1.1 response that is fed with what the socket gives: status, headers, and the body's pieces with their times.

    The body may be chunked, have a Content-Length, or end with the connection.

    >>> response = Response()
    >>> response.feed(1.0, b"HTTP/1.1 200 OK\\r\\nContent-Length: 5\\r\\n\\r\\nhel"), response.feed(2.0, b"lo")
    (False, True)
    >>> response.status, response.pieces
    (200, [(1.0, b'hel'), (2.0, b'lo')])
    """

    def __init__(self) -> None:
        self.status: int | None = None
        self.headers: dict[str, str] = {}
        self.pieces: list[tuple[float, bytes]] = []
        self.complete = False
        self._pending = b""  # bytes that say nothing yet
        self._size = 0  # bytes of the body so far
        self._chunked = False
        self._left: int | None = None  # bytes left of the chunk or of the body; None: not known (yet)
        self._trailer = False

    def feed(self, at: float, data: bytes) -> bool:
        """Take bytes that arrived at a time; True once the response is complete. Raises Malformed."""
        if self.complete:
            return True
        data = self._pending + data if self._pending else data
        self._pending = b""
        if self.status is None:
            rest = self._read_head(data)
            if rest is None:
                return False
            data = rest
        if self._chunked:
            self._read_chunks(at, data)
        else:
            self._read_plain(at, data)
        return self.complete

    def close(self) -> None:
        """The connection has ended. Raises Malformed unless the response may end so."""
        if self.complete:
            return
        if self.status is None:
            raise Malformed("no answer", "the connection ended without an answer")
        if self._chunked or self._left is not None:
            raise Malformed("cut off", "the connection ended in the middle of the answer")
        self.complete = True

    @property
    def body(self) -> bytes:
        """All of the body so far."""
        return b"".join(data for _, data in self.pieces)

    def _read_head(self, data: bytes) -> bytes | None:
        """Status and headers; what follows them, or None while they are not complete. Interim responses (1xx) are skipped."""
        while True:
            head, found, rest = data.partition(b"\r\n\r\n")
            if len(head) > MOST_HEAD:
                raise Malformed("not HTTP", "the response has no end of headers")
            if not b"HTTP/1.".startswith(data[:7]) and not data.startswith(b"HTTP/1."):
                raise Malformed("not HTTP", f"the answer begins with {data[:20]!r}")
            if not found:
                self._pending = data
                return None
            first, *lines = head.split(b"\r\n")
            match = re.match(rb"HTTP/1\.\d (\d{3})(?: |$)", first)
            if match is None:
                raise Malformed("not HTTP", f"the answer begins with {first[:40]!r}")
            status = int(match[1])
            if not 100 <= status < 200:
                break
            data = rest
        for line in lines:
            name, _, value = line.partition(b":")
            self.headers[name.decode("latin-1").strip().lower()] = value.decode("latin-1").strip()
        self.status = status
        self._chunked = "chunked" in self.headers.get("transfer-encoding", "").lower()
        length = self.headers.get("content-length")
        if not self._chunked and length is not None:
            if not re.fullmatch(r"\d{1,15}", length):
                raise Malformed("not HTTP", f"Content-Length is {length[:40]!r}")
            self._left = int(length)
        if status in (204, 304):
            self._chunked, self._left = False, 0
        return rest

    def _read_plain(self, at: float, data: bytes) -> None:
        if self._left is not None:
            data = data[: self._left]
            self._left -= len(data)
        self._add(at, data)
        self.complete = self._left == 0

    def _read_chunks(self, at: float, data: bytes) -> None:
        place = 0
        while True:
            if self._left is None:  # the line with the next chunk's size, or a line of the trailer
                end = data.find(b"\r\n", place)
                if end < 0:
                    if len(data) - place > MOST_HEAD:
                        raise Malformed("not HTTP", "a chunk has no size")
                    break
                line, place = data[place:end], end + 2
                if self._trailer:
                    if not line:
                        self.complete = True
                        return
                    continue
                size = line.partition(b";")[0].strip()
                if not re.fullmatch(rb"[0-9A-Fa-f]{1,15}", size):
                    raise Malformed("not HTTP", f"a chunk's size is {size[:40]!r}")
                count = int(size, 16)
                self._trailer = count == 0
                self._left = count or None
                continue
            piece = data[place : place + self._left]
            self._add(at, piece)
            self._left -= len(piece)
            place += len(piece)
            if self._left > 0 or len(data) - place < 2:
                break
            if data[place : place + 2] != b"\r\n":
                raise Malformed("not HTTP", "a chunk is longer than its size")
            place += 2
            self._left = None
        self._pending = data[place:]

    def _add(self, at: float, piece: bytes) -> None:
        if not piece:
            return
        self._size += len(piece)
        if self._size > MOST_BODY:
            raise Malformed("too long", f"the answer has more than {MOST_BODY} bytes")
        self.pieces.append((at, piece))


def events(pieces: list[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """The data of each server-sent event, with the time at which it was complete. Comments and other fields are left out.

    >>> list(events([(1.0, b": hello\\n\\ndata: a"), (2.0, b"b\\n\\n"), (3.0, b"data:c\\r\\n\\r\\n")]))
    [(2.0, b'ab'), (3.0, b'c')]
    """
    left, data, last = b"", [], 0.0
    for at, piece in pieces:
        lines = (left + piece if left else piece).split(b"\n")
        left, last = lines.pop(), at
        if len(left) > MOST_LINE:
            raise Malformed("garbage", f"an event has more than {MOST_LINE} bytes")
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                data.append(line[5:].removeprefix(b" "))
            elif not line and data:
                yield at, b"\n".join(data)
                data = []
    if left.startswith(b"data:"):
        data.append(left[5:].removeprefix(b" "))
    if data:
        yield last, b"\n".join(data)


def read_answer(response: Response) -> Answer:
    """The answer in a complete response to a streamed completion or chat completion. Raises Malformed for anything else."""
    if response.status != 200:
        raise Malformed(f"HTTP {response.status}", message_of(response.body))
    kind = response.headers.get("content-type", "")
    if not kind.lower().startswith("text/event-stream"):
        raise Malformed("not a stream", f"the answer is {kind[:40] or 'of no type'}, not an event stream")
    times: list[float] = []
    finish, usage, done, end = "", None, False, 0.0
    for at, data in events(response.pieces):
        end = at
        if data == b"[DONE]":
            done = True
            break
        event = _document(data)
        if event.get("error"):
            raise Malformed("error in the stream", message_of(data))
        if isinstance(event.get("usage"), dict):
            usage = event["usage"]
        text, reason = _choice(event)
        if text:
            times.append(at)
        finish = reason or finish
    if not done and not finish:
        raise Malformed("cut off", "the stream ended without [DONE] and without a finish_reason")
    if not times:
        raise Malformed("empty answer", "the answer has no text")
    made = _count(usage, "completion_tokens")
    return Answer(
        times=tuple(times),
        end=end,
        tokens=made or len(times),
        counted=bool(made),
        finish=finish,
        prompt_tokens=_count(usage, "prompt_tokens"),
        cached_tokens=_count(usage.get("prompt_tokens_details") if usage else None, "cached_tokens") or 0,
    )


def message_of(data: bytes) -> str:
    """What a server says is wrong: its error's message, or the beginning of what it sent."""
    try:
        error = json.loads(data)
    except (ValueError, RecursionError):
        error = None
    for key in ("error", "detail", "message"):
        if isinstance(error, dict) and error.get(key):
            error = error[key]
    text = data.decode("utf-8", "replace") if error is None else error if isinstance(error, str) else json.dumps(error)
    return " ".join(text.split())[:SHOWN]


def _document(data: bytes) -> dict[str, Any]:
    try:
        event = json.loads(data)
    except (ValueError, RecursionError):
        event = None
    if not isinstance(event, dict):
        raise Malformed("garbage", f"an event is no JSON object: {data[:60]!r}")
    return event


def _choice(event: dict[str, Any]) -> tuple[str, str]:
    """The new text of the first choice, thoughts included, and why it ended ("": it did not)."""
    choices = event.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict):
        return "", ""
    delta = choice.get("delta")
    parts: list[Any] = [choice.get("text")]
    if isinstance(delta, dict):
        parts += [delta.get("content"), delta.get("reasoning_content"), delta.get("reasoning")]
    reason = choice.get("finish_reason")
    return next((part for part in parts if isinstance(part, str) and part), ""), reason if isinstance(
        reason, str
    ) else ""


def _count(usage: Any, name: str) -> int | None:
    """A count of tokens in the server's usage, None where there is none that makes sense."""
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if type(value) is int and 0 <= value < 1 << 31 else None

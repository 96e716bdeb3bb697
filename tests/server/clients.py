"""Clients of a server on a loopback port, on bare sockets, so that they can leave when they like."""

from __future__ import annotations

import json
import socket
import time
from dataclasses import dataclass, field


@dataclass
class Running:
    """A server on a port of 127.0.0.1."""

    app: object
    port: int
    sockets: list[socket.socket] = field(default_factory=list)

    def send(self, body, *, path="/v1/completions", headers=()):
        """A socket on which a request was sent."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {len(data)}"]
        return self.raw("\r\n".join([*lines, *headers, "", ""]).encode() + data)

    def raw(self, data):
        made = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        self.sockets.append(made)
        made.sendall(data)
        return made

    def ask(self, body, **options):
        """Status and JSON of an answer."""
        return answer(self.send(body, **options))

    def idle(self):
        """Whether everybody's place is free again, within a time that is long on a busy machine."""
        return eventually(lambda: self.app.state.server.asking == 0)


def answer(connection):
    """Status and JSON of what comes back on a socket."""
    import http.client

    response = http.client.HTTPResponse(connection)
    response.begin()
    return response.status, json.loads(response.read())


def read_until(connection, text):
    """What comes on a socket until `text` has come; AssertionError if it ends before."""
    got = b""
    while text not in got:
        more = connection.recv(65536)
        assert more, got
        got += more
    return got


def eventually(true):
    """Wait up to 20 s for `true()`."""
    for _ in range(2000):
        if true():
            return True
        time.sleep(0.01)
    return False

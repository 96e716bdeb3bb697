"""A scripted OpenAI-compatible server, and an event loop whose clock stands still while there is something to do.

On that loop server and client share one thread and a Unix socket, so that a time passes only where the script says so: what is
measured can be compared with the script exactly, however busy the machine is.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import selectors
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from assay.loadtest.client import Server


class _Skipping(selectors.DefaultSelector):
    """Skips the time until the next timer where nothing is ready."""

    now = 0.0

    def select(self, timeout=None):
        ready = super().select(0)
        if ready or timeout is None or timeout <= 0:
            assert ready or timeout is not None, "everything waits for something that will not come"
            return ready
        self.now += timeout
        return []


class SimulatedLoop(asyncio.SelectorEventLoop):
    """An event loop from second 0 on."""

    def __init__(self):
        self.clock = _Skipping()
        super().__init__(self.clock)

    def time(self):
        return self.clock.now


@dataclass
class Script:
    """How the server answers. Delays are seconds; `itl` may differ from gap to gap."""

    ttft: float = 0.2
    itl: Callable[[int], float] = lambda place: 0.05
    tokens: int | None = None  # None: as many as asked for
    per_piece: int = 1  # tokens in each piece
    usage: bool = True
    usage_in_last: bool = False  # in the event that has the finish_reason, as some do
    done: bool = True  # whether [DONE] is sent
    finish: str | None = "length"
    chunked: bool = True
    cached: int = 0
    prompt_tokens: Callable[[str], int] = lambda prompt: max(len(prompt) // 4, 1)
    models: Any = ("tiny",)
    answer: Callable[[dict[str, Any], int], bytes | None] = lambda body, number: None  # bytes to send instead
    dies_after: int | None = None  # pieces


@dataclass
class Fake:
    """The server: what it was asked, and its script, which may be changed as it runs."""

    script: Script = field(default_factory=Script)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    running: int = 0
    most_running: int = 0

    async def serve(self, reader, writer):
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            method, path, _ = head.split("\r\n", 1)[0].split(" ")
            self.paths.append(path)
            self.headers.append(head)
            if method == "GET":
                await self._models(writer)
            else:
                length = next(
                    int(line[15:]) for line in head.split("\r\n") if line.lower().startswith("content-length:")
                )
                await self._answer(json.loads(await reader.readexactly(length)), path, writer)
        writer.close()

    async def _models(self, writer):
        if isinstance(self.script.models, bytes):
            writer.write(self.script.models)
            return
        data = json.dumps({"data": [{"id": name} for name in self.script.models]}).encode()
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(data) + data
        )

    async def _answer(self, body, path, writer):
        script, number = self.script, len(self.bodies)
        self.bodies.append(body)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            instead = script.answer(body, number)
            if instead is not None:
                writer.write(instead)
                return
            await self._stream(script, body, path, writer)
        finally:
            self.running -= 1

    async def _stream(self, script, body, path, writer):
        chat = path.endswith("chat/completions")
        transfer = b"Transfer-Encoding: chunked\r\n" if script.chunked else b""
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n" + transfer + b"\r\n")

        def send(event):
            data = b"data: " + (event if isinstance(event, bytes) else json.dumps(event).encode()) + b"\n\n"
            writer.write(b"%x\r\n%b\r\n" % (len(data), data) if script.chunked else data)

        def choice(text, reason=None):
            part = {"delta": {"content": text}} if chat else {"text": text}
            return {"choices": [{"index": 0, "finish_reason": reason, **part}]}

        if chat:
            send({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
        made = body["max_tokens"] if script.tokens is None else script.tokens
        pieces = -(-made // script.per_piece)
        for place in range(pieces):
            await asyncio.sleep(script.ttft if place == 0 else script.itl(place))
            if script.dies_after is not None and place >= script.dies_after:
                return
            send(choice(" word" * script.per_piece))
        prompt = body["messages"][0]["content"] if chat else body["prompt"]
        usage = {"prompt_tokens": script.prompt_tokens(prompt), "completion_tokens": made}
        usage["prompt_tokens_details"] = {"cached_tokens": script.cached}
        send(choice("", script.finish) | ({"usage": usage} if script.usage_in_last else {}))
        if script.usage and not script.usage_in_last:
            send({"choices": [], "usage": usage})
        if script.done:
            send(b"[DONE]")
        if script.chunked:
            writer.write(b"0\r\n\r\n")


def simulated(main: Callable[..., Any], *scripts: Script) -> Any:
    """Run `main(server, fake, server, fake, ..., connect=...)`, a coroutine, on a simulated clock, with a fake for each script.

    Each server's `host` tells its connections apart.
    """

    async def run():
        with tempfile.TemporaryDirectory() as folder:
            given: list[Any] = []
            listeners: list[asyncio.Server] = []
            for place, script in enumerate(scripts):
                fake = Fake(script)
                listeners.append(await asyncio.start_unix_server(fake.serve, Path(folder) / f"s{place}"))
                given += [Server(f"s{place}", 1, "/v1"), fake]

            async def connect(make, server):
                return await asyncio.get_running_loop().create_unix_connection(make, str(Path(folder) / server.host))

            result = await main(*given, connect=connect)
            for listener in listeners:
                listener.close()
            return result

    with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        return runner.run(run())


@contextlib.contextmanager
def listening(script: Script):
    """A fake on a loopback port, in a thread and in real time: its address and itself."""
    loop, fake, ready = asyncio.new_event_loop(), Fake(script), threading.Event()
    ports: list[int] = []
    kept: list[asyncio.Server] = []

    async def run():
        listener = await asyncio.start_server(fake.serve, "127.0.0.1", 0)
        ports.append(listener.sockets[0].getsockname()[1])
        kept.append(listener)
        ready.set()

    def work():
        loop.run_until_complete(run())
        loop.run_forever()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert ready.wait(20)
    try:
        yield f"http://127.0.0.1:{ports[0]}", fake
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(20)
        loop.close()

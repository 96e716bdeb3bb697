"""A box that serves one engine over HTTP on 127.0.0.1: what stands at the edge or in the cloud. Run as a process by `asking.hosted`.

It answers POST /v1/completions with a stream, one request at a time in the order they came, and says at its end how long the answer
queued, prefilled and decoded. It is for measurements on one machine: it knows no keys, no limits and no second model; `assay serve` does.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from assay import checks
from assay.measure.child import die_with
from assay.methods.serving.mobile_llm_measurement.asking import Marks
from assay.methods.serving.mobile_llm_measurement.engines import Engine, EngineKind, opened

LARGEST = 1 << 20  # bytes of a request
LONGEST = 1 << 16  # tokens of an answer


class _Left(Exception):
    """The one who asked is gone."""


@dataclass
class Job:
    """A request in the line, and what is made for it: texts, then a dictionary of what was seen, or an exception."""

    prompt: str
    new_tokens: int
    came: float = field(default_factory=time.perf_counter)
    made: queue.Queue[Any] = field(default_factory=queue.Queue)
    gone: bool = False


class Box:
    """An engine behind a socket. `run` answers jobs in the thread that calls it, until `stop`."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.line = engine, queue.Queue[Job | None]()
        box = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                box.answer(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.port = int(self.server.server_address[1])
        threading.Thread(target=self.server.serve_forever, args=(POLL,), name="assay-box", daemon=True).start()

    def stop(self) -> None:
        """Take no more requests; `run` returns after the one it is at."""
        self.server.shutdown()
        self.server.server_close()
        self.line.put(None)

    def run(self) -> None:
        """Answer, one after the other."""
        while (job := self.line.get()) is not None:
            began = time.perf_counter()

            def take(text: str, job: Job = job) -> None:
                if job.gone:
                    raise _Left
                job.made.put(text)

            try:
                done = Marks(self.engine, job.prompt, job.new_tokens, take)
            except Exception as error:  # a bad request must not end the box
                job.made.put(error)
                continue
            marks = {"queue": began - job.came, "prefill": done.prefill, "decode": done.decode}
            job.made.put({"marks": marks, "prompt_tokens": done.prompt_tokens})

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        """One request, in a thread of its own."""
        try:
            job = _job(handler)
        except (ValueError, TypeError, RecursionError) as error:
            return _refuse(handler, error)
        self.line.put(job)
        try:
            handler.send_response(200)
            handler.send_header("Content-Type", "text/event-stream")
            handler.send_header("Connection", "close")
            handler.end_headers()
            while isinstance(item := job.made.get(), str):
                _event(handler, {"choices": [{"index": 0, "text": item, "finish_reason": None}]})
            if isinstance(item, Exception):
                return _event(handler, {"error": {"message": f"{type(item).__name__}: {item}"[:300]}})
            usage = {"prompt_tokens": item["prompt_tokens"], "completion_tokens": job.new_tokens}
            last = {"index": 0, "text": "", "finish_reason": "length"}
            _event(handler, {"choices": [last], "usage": usage, "marks": item["marks"]})
            handler.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            job.gone = True


POLL = 0.05


def _job(handler: BaseHTTPRequestHandler) -> Job:
    size = int(handler.headers.get("Content-Length") or 0)
    if handler.path != "/v1/completions" or not 0 < size <= LARGEST:
        raise ValueError("only /v1/completions is answered, and a request has a body of at most a megabyte")
    body = json.loads(handler.rfile.read(size))
    if not isinstance(body, dict) or not isinstance(body.get("prompt"), str):
        raise ValueError("a request has a text as its prompt")
    if not body.get("stream"):
        raise ValueError("answers are streamed: stream must be true")
    return Job(body["prompt"], checks.whole("max_tokens", body.get("max_tokens"), low=1, high=LONGEST))


def _refuse(handler: BaseHTTPRequestHandler, error: Exception) -> None:
    body = json.dumps({"error": {"message": str(error)[:300]}}).encode()
    with contextlib.suppress(OSError):
        handler.send_response(400)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)


def _event(handler: BaseHTTPRequestHandler, document: dict[str, Any]) -> None:
    handler.wfile.write(b"data: " + json.dumps(document).encode() + b"\n\n")
    handler.wfile.flush()


def main(asked: dict[str, Any]) -> None:
    """Load, say on standard output where it listens and what starting took, and answer until the end."""
    die_with(asked["parent"])
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is none of the one line
    began = time.perf_counter()
    start = began - asked["spawned"]
    kind = asked["kind"]
    engine = opened(
        EngineKind(kind["name"], tuple(kind["formats"]), opener=kind["opener"], options=kind["options"]),
        **asked["model"],
    )
    box = Box(engine)
    print(json.dumps({"port": box.port, "start": start, "load": time.perf_counter() - began}), file=told, flush=True)
    box.run()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

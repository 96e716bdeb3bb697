"""The pipeline over HTTP, by the Open Inference Protocol: a server for loopback, and a client that keeps its connection.

    with VisionServer(pipeline, "photographs") as server:
        client = VisionClient(server.host, server.port, "photographs")
        label = client.infer({"image": [jpeg]})["answer"]

A connection has a thread of its own. The input "image" is a BYTES tensor with a JPEG, or several; "pixels" holds inputs that were
prepared before, the first dimension counting them. The output is "answer". Errors are `{"error": text}` with status 400, 404, 413, 500 or
503.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import socketserver
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from assay import checks
from assay.methods.serving.dnn_server_overheads import protocol
from assay.methods.serving.dnn_server_overheads.pipeline import Busy, Pipeline, Refused
from assay.methods.serving.dnn_server_overheads.profiler import clock
from assay.methods.serving.dnn_server_overheads.protocol import Call, Malformed

ANSWER_SECONDS = 60.0
EARLIER, LATER = "earlier images", "later images"


class VisionServer:
    """Serves a pipeline under a name until it is closed; `port` 0 takes a free one. Each answered image of a call has one life, whose
    borders are "receive" (from the request's first line), the pipeline's, and "respond" (until the last byte was handed to the system).
    In a call with several images all but the first have the border "earlier images" before the pipeline's, and all "later images" after
    them.

    Answers must be what `numpy.asarray` makes numbers of, finite ones for clients who ask in JSON. The pipeline is the caller's to close,
    after this. Raises ValueError for a host that is no loopback address: there are no keys and no TLS here.
    """

    def __init__(self, pipeline: Pipeline, name: str, *, host: str = "127.0.0.1", port: int = 0) -> None:
        checks.choice("host", host, ("127.0.0.1", "localhost"))
        checks.whole("port", port, low=0, high=65535)
        server = _Server((host, port), _Handler)
        server.pipeline, server.name = pipeline, name
        self.host, self.port = "127.0.0.1", int(server.server_address[1])
        self._server = server
        self._thread = threading.Thread(
            target=server.serve_forever, kwargs={"poll_interval": 0.05}, name="assay-vision", daemon=True
        )
        self._thread.start()

    def __enter__(self) -> VisionServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take no more connections, and end those there are."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self._server.end_all()


class _Server(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 128
    pipeline: Pipeline
    name: str

    def __init__(self, *given: Any) -> None:
        self.links: set[socket.socket] = set()
        super().__init__(*given)

    def server_bind(self) -> None:
        """As the base of HTTPServer, which would ask the network for its own name."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "localhost", int(self.server_address[1])

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that left is no error of ours, and nothing is logged."""

    def end_all(self) -> None:
        for link in list(self.links):
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    protocol_version, timeout, disable_nagle_algorithm = "HTTP/1.1", 60.0, True
    server: _Server
    began = 0.0

    def setup(self) -> None:
        super().setup()
        self.server.links.add(self.connection)

    def finish(self) -> None:
        self.server.links.discard(self.connection)
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is logged."""

    def parse_request(self) -> bool:
        self.began = clock()  # the request's first line is there
        return super().parse_request()

    def do_GET(self) -> None:
        model = f"/v2/models/{self.server.name}"
        if self.path in ("/v2/health/live", "/v2/health/ready", f"{model}/ready"):
            self._send(200, b"")
        elif self.path == "/v2":
            self._say(200, {"name": "assay", "version": "2", "extensions": ["binary_tensor_data"]})
        elif self.path == model:
            preprocess = self.server.pipeline.preprocess
            kind = protocol.NAMES[preprocess.precision]
            inputs = [
                {"name": "image", "datatype": "BYTES", "shape": [-1]},
                {"name": "pixels", "datatype": kind, "shape": [-1, *preprocess.shape]},
            ]
            outputs = [{"name": "answer", "datatype": "INT64", "shape": [-1]}]
            self._say(200, {"name": self.server.name, "platform": "assay", "inputs": inputs, "outputs": outputs})
        else:
            self._say(404, {"error": "there is no such path"})

    def do_POST(self) -> None:
        try:
            body = self._body()
            if body is None:
                return
            if self.path != f"/v2/models/{self.server.name}/infer":
                self._say(404, {"error": "there is no such model or path"})
                return
            self._infer(protocol.read(body, dict(self.headers.items())))
        except Malformed as error:
            self._say(400, {"error": str(error)})
        except OSError:
            raise  # the client left
        except Exception as error:  # of an answer that cannot be written
            self._failed(error)

    def _body(self) -> bytes | None:
        """The body; None, and an error was sent, where there is none that is taken."""
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdigit() or len(length) > 12:
            self.close_connection = True
            self._say(400, {"error": "Content-Length must be given"})
            return None
        if int(length) > protocol.MOST:
            self.close_connection = True
            self._say(413, {"error": f"a request may have {protocol.MOST} bytes"})
            return None
        return self.rfile.read(int(length))

    def _infer(self, call: Call) -> None:
        pipeline = self.server.pipeline
        images = _images(call)
        profiler = pipeline.profiler
        lives = [profiler.begin(call.id, at=self.began) for _ in images]
        for life in lives:
            life.mark("receive")
        try:
            waiting: list[Future[Any]] = []
            for image, life in zip(images, lives, strict=True):
                if waiting:
                    life.mark(EARLIER)
                waiting.append(pipeline.submit(image, life))
            answers = [one.result(ANSWER_SECONDS) for one in waiting]
            if len(lives) > 1:
                for life in lives:
                    life.mark(LATER)
        except Busy as error:
            self._say(503, {"error": str(error)}, {"Retry-After": "1"})
            return
        except Refused as error:
            self._say(400, {"error": str(error)[:500]})
            return
        except Exception as error:  # of the network or a worker, or too late
            self._failed(error)
            return
        found = Call({"answer": np.asarray(answers)}, call.id, names={"model_name": self.server.name})
        body, headers = protocol.written(found, binary=call.binary, answer=True)
        self._send(200, body, headers)
        for life in lives:
            life.mark("respond")
            profiler.end(life)

    def _failed(self, error: Exception) -> None:
        """Its text is none of the client's business."""
        self._say(500, {"error": f"answering failed ({type(error).__name__})"})

    def _say(self, status: int, document: dict[str, Any], headers: Mapping[str, str] | None = None) -> None:
        self._send(status, json.dumps(document).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        """Everything in one packet."""
        lines = [f"HTTP/1.1 {status} {self.responses[status][0]}", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        lines += ["Connection: close"] * self.close_connection
        self.wfile.write("\r\n".join([*lines, "", ""]).encode("latin-1") + body)


def _images(call: Call) -> list[Any]:
    if set(call.tensors) not in ({"image"}, {"pixels"}):
        raise Malformed("inputs must be image or pixels, one of them")
    (tensor,) = call.tensors.values()
    if ("image" in call.tensors) == isinstance(tensor, np.ndarray):
        raise Malformed("image must be of datatype BYTES, pixels of the input's")
    if isinstance(tensor, np.ndarray) and not tensor.ndim:
        raise Malformed("pixels must have a first dimension, which counts images")
    if not len(tensor):
        raise Malformed("there must be at least one image")
    return list(tensor)


class VisionClient:
    """A client that keeps one connection; one thread at a time uses it. `binary` sends and asks for tensors as bytes."""

    def __init__(
        self, host: str, port: int, model: str, *, binary: bool = True, timeout: float = ANSWER_SECONDS
    ) -> None:
        self.path, self.binary = f"/v2/models/{model}/infer", binary
        self._connection = http.client.HTTPConnection(host, port, timeout=timeout)

    def infer(self, tensors: dict[str, protocol.Tensor], *, id: str = "") -> dict[str, protocol.Tensor]:
        """The answer's tensors. Raises RuntimeError, with the status and what the server says, where it gives none, and OSError where it
        cannot be reached or takes longer than `timeout`; the next call then has a new connection."""
        body, headers = protocol.written(Call(tensors, id, self.binary), binary=self.binary)
        try:
            if self._connection.sock is None:
                self._connection.connect()
                link: Any = self._connection.sock
                link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._connection.request("POST", self.path, body, headers)
            response = self._connection.getresponse()
            data = response.read()
        except BaseException:  # half an answer may be under way
            self._connection.close()
            raise
        if response.status != 200:
            raise RuntimeError(f"HTTP {response.status}: {data[:500].decode('utf-8', 'replace')}")
        return protocol.read(data, dict(response.headers.items()), answer=True).tensors

    def close(self) -> None:
        self._connection.close()

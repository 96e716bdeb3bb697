"""Samples over HTTP: from assay's own server, and what is refused."""

import json
import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from tests.tiny import write_tiny_llama
from transformers import AutoTokenizer, LlamaForCausalLM

from assay.methods.core.reasoning.generator import HttpGenerator, Sampling, TransformersGenerator


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The address of assay's server, and its model and tokenizer."""
    import uvicorn

    from assay.server.app import create_app
    from assay.server.models import Models

    folder = write_tiny_llama(tmp_path_factory.mktemp("reasons") / "tiny", context=256)
    model, tokenizer = LlamaForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    models = Models()
    models.add("tiny", model, tokenizer)
    app = create_app(models)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, http="h11", ws="none", log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            thread.join(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1", model, tokenizer
    finally:
        app.state.server.stop()
        server.should_exit = True
        thread.join(20)
        app.state.server.close()
        models.close()


def test_a_server_writes_what_the_model_does(served):
    url, model, tokenizer = served
    greedy = Sampling(temperature=0, max_new_tokens=6)
    with HttpGenerator(url, "tiny") as generator:
        (sample,) = generator(["one two"], greedy)[0]
        (own,) = TransformersGenerator(model, tokenizer)(["one two"], greedy)[0]
        assert sample.text == own.text
        assert sample.spent.completion == own.spent.completion
        assert sample.spent.prompt == own.spent.prompt
        assert sample.spent.calls == 1
        assert sample.spent.seconds > 0
        warm = Sampling(temperature=1, max_new_tokens=6)
        eight = [sample.text for sample in generator(["one two"], warm, n=8)[0]]
        assert [sample.text for sample in generator(["one two"], warm, n=3, first=5)[0]] == eight[5:]
        assert len(set(eight)) > 4
        with pytest.raises(ConnectionError, match="400"):
            generator(["one " * 300], greedy)


@contextmanager
def answering(body):
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


@pytest.mark.parametrize(
    "document",
    [{}, {"choices": []}, {"choices": [{"text": "x", "finish_reason": "stop"}]}, [1], {"choices": [{}], "usage": {}}],
)
def test_an_answer_of_another_form_or_without_counts_is_refused(document):
    body = json.dumps(document).encode()
    with answering(body) as url, HttpGenerator(url, "m") as generator, pytest.raises(ValueError, match="no completion"):
        generator(["x"], Sampling())


def test_an_address_that_is_none_and_a_server_that_is_not_there():
    with pytest.raises(ValueError, match="base_url"):
        HttpGenerator("localhost:1", "m")
    url = "http://127.0.0.1:9/v1"
    with HttpGenerator(url, "m", timeout=2) as generator, pytest.raises(ConnectionError, match="cannot be reached"):
        generator(["x"], Sampling())

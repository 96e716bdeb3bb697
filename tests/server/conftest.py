"""A tiny model whose next tokens can be told it, a scheduler that is seen through, and a real server on a free loopback port."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time

import pytest
import torch
from clients import Running, eventually
from tests.properties import scheduler_stand_in as stand_in
from transformers import AutoTokenizer, LlamaForCausalLM

from tiny import write_tiny_llama


class Scripted(LlamaForCausalLM):
    """A Llama that says the tokens of `script`, if there is one, in every answer, and takes its time over each."""

    script: list[int] = []
    delay = 0.0
    forwards = 0

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        if self.script:
            cache = kwargs["cache"]
            cache.said = getattr(cache, "said", -1) + 1
            out.logits = torch.full_like(out.logits, -1e9)
            out.logits[:, -1, self.script[min(cache.said, len(self.script) - 1)]] = 0
        self.forwards += 1
        time.sleep(self.delay)
        return out


@pytest.fixture(autouse=True)
def _loggers():
    """A test may have the server's logs set up; afterwards they are as they were."""
    loggers = [logging.getLogger(name) for name in ("assay.server", "assay.server.requests", "uvicorn.error")]
    before = [(logger, logger.handlers, logger.propagate, logger.level) for logger in loggers]
    yield
    for logger, handlers, propagate, level in before:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("served") / "tiny", context=2048)


@pytest.fixture(scope="session")
def _tiny(tiny_folder):
    return Scripted.from_pretrained(tiny_folder).eval(), AutoTokenizer.from_pretrained(tiny_folder)


@pytest.fixture
def tokenizer(_tiny):
    return _tiny[1]


@pytest.fixture
def model(_tiny):
    model = _tiny[0]
    model.script, model.delay, model.forwards = [], 0.0, 0
    return model


@pytest.fixture
def say(model, tokenizer):
    """Makes the model say a text, and then its end token, in every answer."""

    def say(text, end=True):
        model.script = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] * end
        model.forwards = 0
        return len(model.script)

    return say


@pytest.fixture
def models_of():
    """Makes the models of a server out of a model; their schedulers end with the test."""
    from assay.server.models import Models

    with contextlib.ExitStack() as stack:

        def make(model, tokenizer, name="tiny", **options):
            models = Models(**options)
            stack.callback(models.close)
            scheduler = stand_in.Scheduler(stand_in.backend_for(model, tokenizer))
            models.add(name, model, tokenizer, scheduler=scheduler)
            return models

        yield make


@pytest.fixture
def app_of(models_of, model, tokenizer):
    """Makes the application over the tiny model."""
    from assay.server.app import create_app

    return lambda name="tiny", **options: create_app(models_of(model, tokenizer, name), **options)


@pytest.fixture
def client(app_of):
    from fastapi.testclient import TestClient

    return TestClient(app_of(), raise_server_exceptions=False)


@pytest.fixture
def serving(app_of):
    """Makes a server that runs until the test ends."""
    import uvicorn

    with contextlib.ExitStack() as stack:

        def serve(name="tiny", app=None, **options):
            app = app_of(name, **options) if app is None else app
            server = uvicorn.Server(
                uvicorn.Config(app, http="h11", ws="none", log_level="error", timeout_graceful_shutdown=1)
            )
            listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
            thread.start()
            running = Running(app, listener.getsockname()[1])

            def end():
                for made in running.sockets:
                    made.close()
                app.state.server.stop()
                server.should_exit = True
                thread.join(20)
                app.state.server.close()
                assert not thread.is_alive()

            stack.callback(end)
            assert eventually(lambda: server.started)
            return running

        yield serve


@pytest.fixture
def api(serving):
    """OpenAI's own client of a server over the tiny model."""
    import openai

    server = serving()
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0) as client:
        yield client

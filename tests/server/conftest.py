"""A tiny model whose next tokens can be told it, and a real server over it on a free loopback port."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

import pytest
import torch
from clients import Running, eventually
from transformers import AutoTokenizer, LlamaForCausalLM

from tiny import write_tiny_llama


class Scripted(LlamaForCausalLM):
    """A Llama that says the tokens of `script`, if there is one, and takes its time over each."""

    script: list[int] = []
    delay = 0.0
    forwards = 0

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        if self.script:
            out.logits = torch.full_like(out.logits, -1e9)
            out.logits[:, -1, self.script[min(self.forwards, len(self.script) - 1)]] = 0
        self.forwards += 1
        time.sleep(self.delay)
        return out


@pytest.fixture(scope="session")
def _tiny(tmp_path_factory):
    folder = write_tiny_llama(tmp_path_factory.mktemp("served") / "tiny", context=2048)
    return Scripted.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


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
    """Makes the model say a text, and then its end token."""

    def say(text, end=True):
        model.script = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] * end
        model.forwards = 0
        return len(model.script)

    return say


@pytest.fixture
def serving(model, tokenizer):
    """Makes a server that runs until the test ends."""
    import uvicorn

    from assay.server.app import create_app

    with contextlib.ExitStack() as stack:

        def serve(name="tiny", **options):
            app = create_app(model, tokenizer, name=name, **options)
            server = uvicorn.Server(
                uvicorn.Config(app, http="h11", ws="none", log_level="error", timeout_graceful_shutdown=1)
            )
            listener = socket.create_server(("127.0.0.1", 0))
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
            thread.start()
            running = Running(app, listener.getsockname()[1])

            def end():
                for made in running.sockets:
                    made.close()
                app.state.engine.stop()
                server.should_exit = True
                thread.join(20)
                assert not thread.is_alive()

            stack.callback(end)
            assert eventually(lambda: server.started)
            return running

        yield serve

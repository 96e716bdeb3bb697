"""The agent against assay's own server over loopback: tools called, tokens charged as the server counts them, prefixes kept."""

from __future__ import annotations

import json
import socket
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from tests.tiny import CHAT_TEMPLATE, write_tiny_llama
from transformers import AutoTokenizer, LlamaForCausalLM

from assay.methods.core import kernels
from assay.methods.serving.sleep_time_compute import (
    PLAIN_SLEEPER,
    HttpChat,
    IdleSleeper,
    SleepTimeAgent,
    Store,
    Words,
    server_idle,
)

SLEEP = (
    '<tool_call>{"name": "rethink_memory", "arguments": {"new_memory": "in all 7"}}</tool_call>'
    '<tool_call>{"name": "finish_rethinking_memory", "arguments": {}}</tool_call>'
)
CONTEXT = "Ann has 3 pears and Bob has 4. " * 20


class Scripted(LlamaForCausalLM):
    """A Llama that says the tokens of `script` in every answer, and takes its time over each."""

    script: list[int] = []
    delay = 0.0

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        if self.script:
            cache = kwargs["cache"]
            cache.said = getattr(cache, "said", -1) + 1
            out.logits = torch.full_like(out.logits, -1e9)
            out.logits[:, -1, self.script[min(cache.said, len(self.script) - 1)]] = 0
        time.sleep(self.delay)
        return out


@contextmanager
def serving(models, **settings):
    """The address of assay's server of these models, on a free port."""
    import uvicorn

    from assay.server.app import create_app

    app = create_app(models, **settings)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, http="h11", ws="none", log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        for _ in range(2000):
            if server.started:
                break
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    finally:
        app.state.server.stop()
        server.should_exit = True
        thread.join(20)
        app.state.server.close()
        models.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Address, model and tokenizer of a server on a free port."""
    from tests.properties import scheduler_stand_in as stand_in

    from assay.server.models import Models

    folder = write_tiny_llama(tmp_path_factory.mktemp("asleep") / "tiny", context=4096)
    model, tokenizer = Scripted.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% if tools %}{{ tools }}{% endif %}" + CHAT_TEMPLATE
    plain = AutoTokenizer.from_pretrained(folder)
    models = Models()
    for name, speaks in (("tiny", tokenizer), ("plain", plain)):
        models.add(name, model, speaks, scheduler=stand_in.Scheduler(stand_in.backend_for(model, speaks)))
    models.add("kept", LlamaForCausalLM.from_pretrained(folder).eval(), plain)
    with serving(models) as url:
        yield url, model, tokenizer


def test_it_sleeps_by_tools_and_answers_over_http(served):
    url, model, tokenizer = served
    with HttpChat(url, "tiny") as chat:
        agent = SleepTimeAgent(Store(), chat, model="tiny", max_tokens=200)
        model.script = [*tokenizer(SLEEP, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        sleeper = IdleSleeper(agent, server_idle(url))
        sleeper.add(CONTEXT)
        assert sleeper.step()
        assert sleeper.failed == {}
        assert agent.store.get(agent.key(CONTEXT)).blocks == ("in all 7",)
        said = tokenizer("7", add_special_tokens=False)["input_ids"]
        model.script = [*said, tokenizer.eos_token_id]
        answer = agent.answer("How many?", CONTEXT)
        assert answer.text == "7"
        assert answer.slept
        sleep, test = agent.ledger.total("sleep"), agent.ledger.total("test")
        assert sleep.completion >= len(tokenizer(SLEEP, add_special_tokens=False)["input_ids"])
        assert 1 <= answer.completion_tokens == test.completion <= len(said) + 1
        assert test.prompt > len(tokenizer(CONTEXT)["input_ids"])
        assert sleep.seconds > 0


def test_a_model_without_tools_sleeps_without_them(served):
    """A server refuses tools for a model whose template does not name them, and says so."""
    url, model, tokenizer = served
    said = tokenizer("in all 7", add_special_tokens=False)["input_ids"]
    model.script = [*said, tokenizer.eos_token_id]
    with HttpChat(url, "plain") as chat:
        with pytest.raises(ConnectionError, match="tools are not supported"):
            SleepTimeAgent(Store(), chat).prepare(CONTEXT)
        agent = SleepTimeAgent(Store(), chat, tools=False, prompts=Words(sleeper=PLAIN_SLEEPER))
        assert agent.prepare(CONTEXT).blocks == ("in all 7",)
        assert len(said) <= agent.ledger.total("sleep").completion <= len(said) + 1


@pytest.mark.skipif(not kernels.compiler(), reason="the server keeps prefixes in the pages of the compiled loop")
def test_warming_has_the_server_keep_what_questions_begin_with(served):
    url, _, _ = served
    with HttpChat(url, "kept") as chat:
        agent = SleepTimeAgent(Store(), chat, answer_tokens=4, sleeper=lambda messages, **_: ("in all 7", 3))
        cold, warmed = CONTEXT, CONTEXT.replace("Ann", "Eva")
        agent.prepare(cold), agent.prepare(warmed)
        agent.warm(warmed)
        asked = {}
        for context in (cold, warmed):
            assert agent.answer("How many?", context).slept
            asked[context] = agent.ledger.entries[-1].tokens
        assert asked[warmed].prompt == pytest.approx(asked[cold].prompt, rel=0.1)
        assert asked[warmed].cached > 0.8 * asked[warmed].prompt
        assert asked[cold].cached < 0.5 * asked[cold].prompt
        warm = agent.ledger.total("warm")
        assert (warm.calls, warm.completion) == (1, 1)


def test_a_server_that_answers_somebody_is_not_idle(served):
    url, model, tokenizer = served
    idle = server_idle(url)
    assert idle()
    model.script, model.delay = tokenizer("7 7 7 7", add_special_tokens=False)["input_ids"], 0.02
    with HttpChat(url, "tiny") as chat:
        asking = threading.Thread(target=chat, args=([{"role": "user", "content": "x"}],), kwargs={"max_tokens": 30})
        asking.start()
        seen = [idle()]
        while asking.is_alive():
            seen.append(idle())
        asking.join()
    model.delay = 0.0
    assert False in seen
    assert any(idle() or time.sleep(0.01) for _ in range(500))
    assert not server_idle("http://127.0.0.1:9/v1")()


def test_what_the_server_refuses_is_said(served):
    url, _, _ = served
    with HttpChat(url, "another") as chat, pytest.raises(ConnectionError, match="404"):
        chat([{"role": "user", "content": "x"}])
    with HttpChat("http://127.0.0.1:9/v1", "tiny") as chat, pytest.raises(ConnectionError, match="cannot be reached"):
        chat([{"role": "user", "content": "x"}])
    with pytest.raises(ValueError, match="timeout"):
        HttpChat(url, "tiny", timeout=0)


def test_a_server_with_keys_is_asked_with_one():
    from assay.server.models import Models

    with serving(Models(), api_keys=["secret"]) as url:
        assert server_idle(url, api_key="secret")()
        for key in (None, "wrong"):
            with pytest.raises(ConnectionError, match="answered 401"):
                server_idle(url, api_key=key)()


@contextmanager
def answering(body, status=200):
    """The address of a server that answers this to everything."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"] or 0))
            self.do_GET()

        def do_GET(self):
            self.send_response(status)
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
    "message",
    [
        {"content": ["7"]},
        {"content": "\ud800"},
        {"tool_calls": [{"function": {"name": "rethink_memory", "arguments": {"new_memory": "7"}}}]},
        {"tool_calls": [{"function": {"name": None, "arguments": "{}"}}]},
        {"tool_calls": [7]},
        7,
    ],
)
def test_a_message_of_another_form_is_refused(message):
    usage = {"completion_tokens": 1, "prompt_tokens": 1}
    body = json.dumps({"choices": [{"message": message}], "usage": usage}).encode()
    with answering(body) as url, HttpChat(url, "m") as chat, pytest.raises(ValueError, match="no chat completion"):
        chat([{"role": "user", "content": "x"}])


def test_an_answer_without_counts_is_refused():
    """Nothing could be charged."""
    body = b'{"choices": [{"message": {"content": "7"}}]}'
    with answering(body) as url, HttpChat(url, "m") as chat, pytest.raises(ValueError, match="no chat completion"):
        chat([{"role": "user", "content": "x"}])


def test_a_server_that_does_not_tell_is_named_and_one_in_trouble_is_not_idle():
    """It would never be idle, and nobody would know why."""
    for body in (b"vllm_requests 0\n", b"", b"assay_requests_in_progress nan\n"):
        with answering(body) as url, pytest.raises(ConnectionError, match="does not tell"):
            server_idle(url)()
    with answering(b"assay_requests_in_progress 0\n", status=503) as url:
        assert not server_idle(url)()


@pytest.mark.parametrize("url", ["localhost:8000/v1", "ftp://127.0.0.1/v1", "http://", "http://[", "http://a:b/v1", ""])
def test_what_is_no_address_is_said_at_once(url):
    with pytest.raises(ValueError, match="base_url"):
        HttpChat(url, "m")
    with pytest.raises(ValueError, match="base_url"):
        server_idle(url)

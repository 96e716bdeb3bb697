"""Clients that leave, read nothing or come too late, and what is left for the others: all over real sockets."""

from __future__ import annotations

import json

import pytest
from clients import answer, eventually, read_until

from assay.server.app import Limits

LONG = {"prompt": "x", "max_tokens": 1500, "ignore_eos": True}
SHORT = {"prompt": "x", "max_tokens": 2}


@pytest.fixture
def server(serving, model):
    model.delay = 0.02  # 30 s for a long answer
    return serving()


def rows(server):
    """Answers that the scheduler still has."""
    stats = server.app.state.server.models.engines()[0].scheduler.stats()
    return stats.running + stats.waiting


def get(server, path):
    return answer(server.raw(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()))


@pytest.mark.parametrize("body", [{"stream": True}, {"stream": False}, {"stream": False, "n": 3}])
def test_an_answer_whose_client_has_left_stops(server, model, body):
    connection = server.send(LONG | body)
    if body["stream"]:
        read_until(connection, b"data: ")
    assert eventually(lambda: model.forwards > 2)
    connection.close()
    assert eventually(lambda: rows(server) == 0)
    assert server.idle()
    assert server.ask(SHORT)[0] == 200
    assert model.forwards < 500


def test_of_several_answers_one_that_met_its_stop_is_made_no_further(server, say):
    say("one two", end=False)
    body = {"prompt": ["x", "y"], "max_tokens": 1000, "stop": ["two"], "ignore_eos": True}
    status, made = server.ask(body)
    assert (status, [one["finish_reason"] for one in made["choices"]]) == (200, ["stop", "stop"])
    assert eventually(lambda: rows(server) == 0)


def test_a_client_that_leaves_amid_its_request_is_forgotten(server):
    half = server.raw(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
    )
    assert eventually(lambda: server.app.state.server.asking == 1)
    half.close()
    assert server.idle()


def test_a_client_that_reads_nothing_holds_nobody_up_and_gives_its_place_up(serving, model, monkeypatch):
    from assay.server import app

    monkeypatch.setattr(app, "STALLED_SECONDS", 0.5)
    server = serving("n" * 200_000)  # the name stands in every piece: some dozens fill all buffers
    deaf = server.send(LONG | {"stream": True, "temperature": 1})
    assert eventually(lambda: server.app.state.server.asking == 1)
    for _ in range(5):
        assert server.ask(SHORT)[0] == 200
    assert server.idle()
    assert eventually(lambda: rows(server) == 0)
    assert len(deaf.recv(100)) == 100


def test_a_short_answer_does_not_wait_for_a_long_one(server):
    stream = server.send(LONG | {"stream": True})
    read_until(stream, b"data: ")
    assert server.ask(SHORT)[0] == 200
    assert eventually(
        lambda: server.app.state.server.asking == 1
    )  # the long one still runs; the short one is let go after its answer


def test_health_answers_while_everybody_waits_and_more_are_sent_away(serving, model):
    model.delay = 0.02
    server = serving(limits=Limits(requests=45))  # more than the threads of a pool
    streams = [server.send(LONG | {"stream": i % 2 == 0}) for i in range(45)]
    assert eventually(lambda: server.app.state.server.asking == 45)
    assert get(server, "/health") == (200, {"status": "ok"})
    refused = server.send(SHORT)
    head = read_until(refused, b"overloaded")
    assert head.startswith(b"HTTP/1.1 503")
    assert b"retry-after: 2" in head.lower()
    for stream in streams:
        stream.close()
    assert server.idle()
    assert server.ask(SHORT)[0] == 200


def test_stopping_ends_what_runs_and_tells_its_clients(server, model):
    stream = server.send(LONG | {"stream": True})
    read_until(stream, b"data: ")
    whole = server.send(LONG)
    assert eventually(lambda: server.app.state.server.asking == 2)
    server.app.state.server.stop()
    assert b"the server is stopping" in read_until(stream, b"0\r\n\r\n")
    status, body = answer(whole)
    assert (status, body["error"]["code"]) == (503, "stopping")
    assert server.ask(SHORT)[0] == 503
    assert model.forwards < 500


def test_draining_lets_what_runs_end_and_takes_nothing_new(server):
    assert get(server, "/ready") == (200, {"status": "ready"})
    stream = server.send(SHORT | {"max_tokens": 40, "ignore_eos": True, "stream": True})
    read_until(stream, b"data: ")
    server.app.state.server.drain()
    assert get(server, "/ready") == (503, {"status": "draining"})
    assert get(server, "/health")[0] == 200
    status, body = server.ask(SHORT)
    assert (status, body["error"]["code"]) == (503, "stopping")
    assert b"[DONE]" in read_until(stream, b"0\r\n\r\n")
    assert server.idle()


def test_an_answer_that_takes_too_long_ends(serving, model):
    model.delay = 0.02
    server = serving(limits=Limits(seconds=0.4))
    status, body = server.ask(LONG)
    assert (status, body["error"]["code"]) == (504, "timeout")
    streamed = read_until(server.send(LONG | {"stream": True}), b"0\r\n\r\n")
    last = streamed.split(b"data: ")[-1].split(b"\n")[0]
    assert json.loads(last)["error"]["code"] == "timeout"
    assert b"[DONE]" not in streamed
    assert eventually(lambda: rows(server) == 0)
    assert server.ask(SHORT)[0] == 200

"""Clients that leave, and what is left for the others: all over real sockets."""

from __future__ import annotations

import threading

import pytest
from clients import answer, eventually, read_until

LONG = {"prompt": "x", "max_tokens": 1500, "ignore_eos": True}
SHORT = {"prompt": "x", "max_tokens": 2}


@pytest.fixture
def server(serving, model):
    model.delay = 0.02  # 30 s for a long answer
    return serving()


def test_a_stream_whose_client_has_left_stops(server, model):
    stream = server.send(LONG | {"stream": True})
    read_until(stream, b"data: ")
    stream.close()
    status, _ = server.ask(SHORT)
    assert status == 200
    assert model.forwards < 500
    assert server.idle()


def test_a_whole_answer_whose_client_has_left_stops(server, model):
    whole = server.send(LONG)
    assert eventually(lambda: model.forwards > 2)
    whole.close()
    assert server.ask(SHORT)[0] == 200
    assert model.forwards < 500


def test_a_client_that_leaves_while_it_waits_is_forgotten(server, model):
    stream = server.send(LONG | {"stream": True})
    read_until(stream, b"data: ")
    waiting = [server.send(LONG), server.send(LONG | {"stream": True})]
    last = server.send(SHORT)
    assert eventually(lambda: server.app.state.engine.asking == 4)
    for connection in waiting:
        connection.close()
    assert eventually(lambda: server.app.state.engine.asking == 2)
    stream.close()
    assert answer(last)[0] == 200
    assert model.forwards < 500


def test_a_client_that_leaves_amid_its_request_is_forgotten(server):
    half = server.raw(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
    )
    assert eventually(lambda: server.app.state.engine.asking == 1)
    half.close()
    assert server.idle()


def test_a_client_that_reads_nothing_gives_its_place_up(serving, monkeypatch):
    from assay.server import app

    monkeypatch.setattr(app, "STALLED_SECONDS", 0.2)
    server = serving("n" * 200_000)  # the name stands in every piece: some dozens fill all buffers
    deaf = server.send(LONG | {"stream": True, "temperature": 1})
    assert eventually(lambda: server.app.state.engine.asking == 1)
    assert server.idle()
    assert len(deaf.recv(100)) == 100


def test_those_who_wait_are_served_in_the_order_they_came(server, model):
    model.delay = 0.002
    ended = []
    threads = []
    for number in range(8):
        connection = server.send({"prompt": "x", "max_tokens": 20})
        assert eventually(lambda number=number: server.app.state.engine.asking + len(ended) > number)

        def wait(connection=connection, number=number):
            assert answer(connection)[0] == 200
            ended.append(number)

        threads.append(threading.Thread(target=wait))
        threads[-1].start()
    for thread in threads:
        thread.join(20)
    assert ended == list(range(8))


def test_health_answers_while_everybody_waits_and_more_are_sent_away(server, monkeypatch):
    from assay.server import engine

    monkeypatch.setattr(engine, "MOST_ASKING", 45)  # more than the threads of a pool
    streams = [server.send(LONG | {"stream": i % 2 == 0}) for i in range(45)]
    assert eventually(lambda: server.app.state.engine.asking == 45)
    assert answer(server.raw(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")) == (200, {"status": "ok"})
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
    assert eventually(lambda: server.app.state.engine.asking == 2)
    server.app.state.engine.stop()
    assert b"the server is stopping" in read_until(stream, b"0\r\n\r\n")
    status, body = answer(whole)
    assert (status, body["error"]["code"]) == (503, "stopping")
    assert server.ask(SHORT)[0] == 503
    assert model.forwards < 500


@pytest.mark.slow
def test_of_sixty_clients_half_leave_and_the_others_are_answered(serving, model):
    model.delay = 0.01
    server = serving()
    connections = [
        server.send({"prompt": "x", "max_tokens": 300 if i % 2 else 10, "stream": i % 4 == 1}) for i in range(60)
    ]
    assert eventually(lambda: model.forwards > 5)
    for connection in connections[1::2]:
        connection.close()
    assert [answer(connection)[0] for connection in connections[::2]] == [200] * 30
    assert server.idle()
    assert model.forwards < 30 * 10 + 30 * 100

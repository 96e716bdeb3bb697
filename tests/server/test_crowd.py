"""Many clients at a time, some of them slow, leaving or sending garbage; and what stays after a long while."""

from __future__ import annotations

import gc
import json
import random
import threading
import time

import psutil
import pytest
from clients import answer, eventually, read_until

from assay.server.app import Limits

BODY = {"prompt": "x", "max_tokens": 6, "ignore_eos": True}
GARBAGE = [
    b"GET / HTTP/9.9\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 64,  # somebody who expects TLS
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"A" * 70_000,
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 4\r\n\r\n\xff\xfe{}",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 60_000 + b"\r\n\r\n",
]


def quiet(server, expected):
    """Whether nobody has a place any more and the scheduler nothing to do, and a client still gets what it got before."""
    models = server.app.state.server.models
    assert server.idle()
    assert eventually(lambda: models.engines()[0].scheduler.stats().running == 0)
    assert not models.engines()[0].inboxes
    return server.ask(BODY)[1]["choices"][0]["text"] == expected


def crowd(server, clients, rng):
    """Let `clients` come at once, each in its own way; the answers of the well-behaved, and how many of them there were."""
    expected = server.ask(BODY)[1]["choices"][0]["text"]
    got, failed, threads = [], [], []

    def client(number, kind, wait):
        try:
            time.sleep(wait)
            if kind == "garbage":
                connection = server.raw(GARBAGE[number % len(GARBAGE)])
                connection.settimeout(0.2)
                with_answer(connection)
                connection.close()
            elif kind == "leaves":
                connection = server.send(BODY | {"max_tokens": 1000, "stream": number % 2 == 0})
                time.sleep(wait / 2)
                connection.close()
            elif kind == "half":
                connection = server.raw(
                    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
                )
                time.sleep(wait / 2)
                connection.close()
            elif kind == "slow":
                connection = server.send(BODY | {"stream": True})
                text = b""
                while b"[DONE]" not in text:
                    time.sleep(0.01)
                    more = connection.recv(100)
                    assert more
                    text += more
                got.append("".join(_texts(text)))
            else:
                status, made = server.ask(BODY)
                assert status == 200, made
                got.append(made["choices"][0]["text"])
        except Exception as error:
            failed.append((kind, repr(error)))

    kinds = ["whole"] * 4 + ["slow", "leaves", "half", "garbage"]
    chosen = [kinds[i % len(kinds)] for i in range(clients)]
    for number, kind in enumerate(chosen):
        threads.append(threading.Thread(target=client, args=(number, kind, rng.random() * 0.5)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not failed, failed[:5]
    for made in server.sockets:
        made.close()
    server.sockets.clear()
    return expected, got, sum(kind in ("whole", "slow") for kind in chosen)


def with_answer(connection):
    """Read what there is to read: an answer or none, as it pleases the server."""
    import contextlib

    with contextlib.suppress(OSError):
        connection.recv(4096)


def _texts(stream):
    whole = b"".join(line for line in stream.split(b"\r\n") if b"data:" in line or line.startswith(b"{"))
    for line in whole.split(b"data: "):
        line = line.strip()
        if line.startswith(b"{"):
            yield json.loads(line)["choices"][0]["text"]


def test_a_small_crowd(serving):
    server = serving(limits=Limits(requests=1000))
    expected, got, behaved = crowd(server, 24, random.Random(0))
    assert got == [expected] * behaved
    assert quiet(server, expected)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_hundred_clients(serving):
    server = serving(limits=Limits(requests=1000))
    expected, got, behaved = crowd(server, 200, random.Random(1))
    assert got == [expected] * behaved
    assert behaved == 125
    assert quiet(server, expected)


@pytest.mark.slow
def test_of_two_hundred_more_than_there_are_places_for_are_sent_away(serving, model):
    model.delay = 0.001
    server = serving(limits=Limits(requests=50))
    held = [server.send(BODY | {"max_tokens": 1500, "stream": True}) for _ in range(50)]
    for connection in held:
        read_until(connection, b"data: ")
    statuses = [server.ask(BODY)[0] for _ in range(150)]
    assert statuses == [503] * 150
    for connection in held:
        connection.close()
    assert server.idle()
    assert server.ask(BODY)[0] == 200


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ten_minutes_of_crowds_leave_no_memory_behind(serving):
    """The memory after the second minute and after the tenth differ by less than 16 MiB, and no thread or file is left."""
    server, process, rng = serving(limits=Limits(requests=1000)), psutil.Process(), random.Random(2)
    begun, early = time.monotonic(), None
    while time.monotonic() - begun < 600:
        expected, got, behaved = crowd(server, 40, rng)
        assert got == [expected] * behaved
        if early is None and time.monotonic() - begun > 120:
            gc.collect()
            early = (process.memory_info().rss, process.num_threads(), process.num_fds())
    assert quiet(server, expected)
    gc.collect()
    memory, threads, files = process.memory_info().rss, process.num_threads(), process.num_fds()
    assert memory - early[0] < 16 << 20
    assert threads <= early[1] + 1
    assert files <= early[2] + 4
    assert answer(server.raw(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"))[0] == 200

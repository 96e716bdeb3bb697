"""Asking a server, on a simulated clock: what is measured is what the script says, to the microsecond."""

from __future__ import annotations

import asyncio
import errno
import itertools
from dataclasses import replace

import pytest
from fake_openai import Script, simulated

from assay.errors import InputError
from assay.loadtest.answers import Malformed
from assay.loadtest.client import ask, found, kind_of, server_at
from assay.loadtest.traces import Request

REQUEST = Request("Why is the sky blue?", 5)


def asked(script, request=REQUEST, **changes):
    """The answer to a request, what the server saw, and when the request was sent."""

    async def main(server, fake, *, connect):
        await asyncio.sleep(1.5)
        answer = await ask(replace(server, model="tiny", **changes), request, connect)
        return answer, fake, asyncio.get_running_loop().time()

    return simulated(main, script)


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("chunked", [True, False])
def test_times_are_those_of_the_script(chat, chunked):
    itl = [0.0, 0.05, 0.01, 0.3, 0.02]
    answer, _, now = asked(Script(ttft=0.25, itl=lambda place: itl[place], chunked=chunked), chat=chat)
    expected = list(itertools.accumulate([1.75, *itl[1:]]))
    assert answer.times == pytest.approx(expected, abs=1e-6)
    assert answer.end == pytest.approx(expected[-1], abs=1e-6)
    assert now == pytest.approx(expected[-1], abs=1e-6)
    assert (answer.tokens, answer.counted, answer.finish) == (5, True, "length")


def test_a_request_asks_for_a_greedy_stream_with_usage():
    _, fake, _ = asked(Script(), api_key="key", extra={"ignore_eos": True}, path="/some/v1")
    assert fake.bodies == [
        {
            "model": "tiny",
            "messages": [{"role": "user", "content": REQUEST.prompt}],
            "max_tokens": 5,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
        }
    ]
    assert fake.paths == ["/some/v1/chat/completions"]
    assert "\r\nAuthorization: Bearer key\r\n" in fake.headers[0]
    _, fake, _ = asked(Script(), chat=False)
    assert fake.bodies[0]["prompt"] == REQUEST.prompt
    assert "messages" not in fake.bodies[0]
    assert fake.paths == ["/v1/completions"]
    assert "Authorization" not in fake.headers[0]


def test_servers_without_usage_or_with_it_at_another_place():
    answer, _, _ = asked(Script(usage=False, per_piece=2))
    assert (answer.tokens, answer.counted) == (3, False)
    answer, _, _ = asked(Script(per_piece=2))
    assert (answer.tokens, answer.counted, len(answer.times)) == (5, True, 3)
    answer, _, _ = asked(Script(usage_in_last=True, done=False))
    assert (answer.tokens, answer.counted) == (5, True)


@pytest.mark.parametrize(
    ("script", "kind"),
    [
        (Script(dies_after=2), "cut off"),
        (Script(dies_after=2, chunked=False), "cut off"),
        (Script(finish=None, done=False), "cut off"),
        (Script(answer=lambda body, number: b""), "no answer"),
        (Script(answer=lambda body, number: b"garbage\r\n\r\n"), "not HTTP"),
        (Script(answer=lambda body, number: b"HTTP/1.1 429 Slow\r\nContent-Length: 0\r\n\r\n"), "HTTP 429"),
        (Script(ttft=31.0), "timeout"),
        (Script(itl=lambda place: 20.0), "timeout"),
    ],
)
def test_what_goes_wrong_has_a_kind(script, kind):
    with pytest.raises(Malformed) as caught:
        asked(script, timeout=30.0)
    assert caught.value.kind == kind


def test_a_timeout_comes_when_it_is_due():
    async def main(server, fake, *, connect):
        with pytest.raises(Malformed):
            await ask(replace(server, timeout=3.0), REQUEST, connect)
        return asyncio.get_running_loop().time()

    assert simulated(main, Script(ttft=100.0)) == pytest.approx(3.0)


def test_nobody_listens():
    async def main(server, fake, *, connect):
        async def refused(make, server):
            raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")

        with pytest.raises(Malformed, match="Connection refused") as caught:
            await ask(server, REQUEST, refused)
        return caught.value.kind

    assert simulated(main, Script()) == "connection refused"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError("Multiple exceptions: [Errno 111] Connect call failed ('::1', 1)"), "connection refused"),
        (OSError(errno.ECONNREFUSED, "Connect call failed"), "connection refused"),
        (BrokenPipeError(), "connection reset"),
        (OSError(errno.EHOSTUNREACH, "No route to host"), "no connection (EHOSTUNREACH)"),
        (OSError("what"), "no connection (OSError)"),
    ],
)
def test_kinds_of_failed_connections(error, kind):
    assert kind_of(error) == kind


def looked_up(script, **changes):
    async def main(server, fake, *, connect):
        return await found(replace(server, **changes), connect)

    return simulated(main, script)


def test_the_first_model_listed_is_asked_unless_one_is_named():
    assert looked_up(Script(models=("one", "two"))).model == "one"
    assert looked_up(Script(models=("one", "two")), model="two").model == "two"
    assert looked_up(Script(models=b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n"), model="two").model == "two"


@pytest.mark.parametrize(
    ("models", "says"),
    [((), "name one with --model"), (b"HTTP/1.1 401 No\r\nContent-Length: 7\r\n\r\nbad key", "bad key")],
)
def test_a_server_that_lists_no_model_must_be_told(models, says):
    with pytest.raises(Malformed, match=says):
        looked_up(Script(models=models))


@pytest.mark.parametrize(
    ("url", "whole"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000/v1"),
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000/v1"),
        ("https://host/api/v1/", "https://host:443/api/v1"),
        ("http://[::1]:80/v2", "http://[::1]:80/v2"),
    ],
)
def test_urls(url, whole):
    assert server_at(url).url == whole


@pytest.mark.parametrize(
    "url",
    [
        "",
        "host:8000",
        "ftp://host",
        "http://",
        "http://host:x",
        "http://host:99999",
        "http://u:p@host",
        "http://host/v1?x=1",
        "http://ho st",
        "http://host/\n",
    ],
)
def test_what_is_no_url(url):
    with pytest.raises(InputError, match="URL must be"):
        server_at(url)

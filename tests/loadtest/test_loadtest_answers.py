"""HTTP responses and event streams as they arrive, in any pieces, and what is wrong with those that are not."""

from __future__ import annotations

import json
import random

import pytest

from assay.loadtest.answers import MOST_BODY, MOST_LINE, Malformed, Response, events, message_of, read_answer

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


def chunk(data):
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(**fields):
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def piece(text, finish=None):
    return event(choices=[{"index": 0, "text": text, "finish_reason": finish}])


def fed(*parts, close=False):
    """A response that gets one part a second."""
    response = Response()
    for second, part in enumerate(parts):
        response.feed(float(second), part)
    if close:
        response.close()
    return response


def test_a_chunked_stream_cut_anywhere_is_the_same():
    body = b"".join(map(chunk, (piece("a"), piece("b", "length"), b"data: [DONE]\n\n"))) + b"0\r\n\r\n"
    whole = HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + body
    expected = fed(whole).body
    chance = random.Random(0)
    for _ in range(200):
        cuts = sorted(chance.sample(range(1, len(whole)), chance.randint(1, 12)))
        parts = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
        response = fed(*parts)
        assert response.complete
        assert response.body == expected
        assert read_answer(response).tokens == 2
    each = fed(*(whole[i : i + 1] for i in range(len(whole))))
    assert each.complete
    assert each.body == expected


def test_pieces_have_the_time_at_which_they_came():
    response = fed(
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n", chunk(piece("a")), chunk(piece("b", "stop")), b"0\r\n\r\n"
    )
    answer = read_answer(response)
    assert (answer.times, answer.end, answer.finish) == ((1.0, 2.0), 2.0, "stop")


def test_an_event_counts_from_when_it_is_complete():
    data = piece("a", "stop")
    response = fed(HEAD + b"\r\n", data[:10], data[10:], close=True)
    assert read_answer(response).times == (2.0,)


@pytest.mark.parametrize("end", ["length", "connection", "chunks", "trailer"])
def test_the_ways_a_body_ends(end):
    data = piece("a", "stop")
    head = {
        "length": b"Content-Length: %d\r\n" % len(data),
        "connection": b"",
        "chunks": b"Transfer-Encoding: chunked\r\n",
        "trailer": b"transfer-encoding: Chunked\r\n",
    }[end]
    body = chunk(data) if end in ("chunks", "trailer") else data
    last = {"chunks": b"0;x=y\r\n\r\n", "trailer": b"000\r\nChecksum: 1\r\n\r\n"}.get(end, b"")
    response = fed(HEAD + head + b"\r\n" + body + last, close=end == "connection")
    assert response.complete
    assert read_answer(response).times == (0.0,)
    assert response.feed(9.0, b"more")  # what comes later is nobody's
    assert response.body == data


def test_interim_responses_are_skipped():
    response = fed(
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + HEAD + b"Content-Length: 0\r\n\r\n",
    )
    assert response.complete
    assert response.status == 200


@pytest.mark.parametrize("status", [204, 304])
def test_a_status_without_a_body(status):
    assert fed(b"HTTP/1.1 %d Nothing\r\n\r\n" % status).complete


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"SSH-2.0-OpenSSH_9\r\n", "not HTTP"),
        (b"HTTP/2 200\r\n\r\n", "not HTTP"),
        (b"HTTP/1.1 abc\r\n\r\n", "not HTTP"),
        (b"HTTP/1.1 2000 OK\r\n\r\n", "not HTTP"),
        (HEAD + b"Content-Length: -1\r\n\r\n", "not HTTP"),
        (HEAD + b"Content-Length: 1_0\r\n\r\n", "not HTTP"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n", "not HTTP"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n-5\r\n", "not HTTP"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n\r\n", "not HTTP"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\nabc\r\n", "not HTTP"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"1" * (1 << 17), "not HTTP"),
        (HEAD + b"X: " + b"x" * (1 << 17), "not HTTP"),
    ],
)
def test_what_is_not_http(data, kind):
    with pytest.raises(Malformed) as caught:
        fed(data)
    assert caught.value.kind == kind


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "no answer"),
        (b"HTTP/1.1 200", "no answer"),
        (HEAD + b"Content-Length: 10\r\n\r\nabc", "cut off"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunk(piece("a")), "cut off"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", "cut off"),
    ],
)
def test_a_connection_that_ends_too_early(data, kind):
    with pytest.raises(Malformed) as caught:
        fed(data, close=True)
    assert caught.value.kind == kind


def test_an_endless_answer_is_given_up():
    response = fed(HEAD + b"\r\n")
    with pytest.raises(Malformed) as caught:
        for _ in range(MOST_BODY // (1 << 20) + 1):
            response.feed(0.0, b"x" * (1 << 20))
    assert caught.value.kind == "too long"


def test_an_endless_event_is_given_up():
    with pytest.raises(Malformed):
        list(events([(0.0, b"data: "), (1.0, b"x" * (MOST_LINE + 1))]))


def answered(*parts):
    return read_answer(fed(HEAD + b"\r\n" + b"".join(parts), close=True))


def test_tokens_are_the_servers_where_it_counts_them():
    usage = {"prompt_tokens": 7, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 4}}
    answer = answered(piece("a"), piece("b", "stop"), event(choices=[], usage=usage), b"data: [DONE]\n\n")
    assert (answer.tokens, answer.counted, answer.prompt_tokens, answer.cached_tokens) == (5, True, 7, 4)


@pytest.mark.parametrize(
    "usage", [None, {}, {"completion_tokens": "5"}, {"completion_tokens": True}, {"completion_tokens": -1}, [5]]
)
def test_tokens_are_the_pieces_where_it_does_not(usage):
    answer = answered(piece("a"), piece(""), piece("b", "stop"), event(choices=[], usage=usage), b"data: [DONE]\n\n")
    assert (answer.tokens, answer.counted, answer.prompt_tokens) == (2, False, None)


def test_chat_chunks_and_thoughts():
    deltas = [{"role": "assistant", "content": ""}, {"reasoning_content": "hm"}, {"content": "yes"}, {"content": None}]
    parts = [event(choices=[{"index": 0, "delta": delta, "finish_reason": None}]) for delta in deltas]
    answer = answered(*parts, event(choices=[{"index": 0, "delta": {}, "finish_reason": "length"}]))
    assert (answer.tokens, answer.finish) == (2, "length")


def test_a_finish_reason_or_done_is_an_end_and_anything_else_is_not():
    assert answered(piece("a", "stop")).finish == "stop"
    assert answered(piece("a"), b"data: [DONE]\n\n").finish == ""
    with pytest.raises(Malformed) as caught:
        answered(piece("a"))
    assert caught.value.kind == "cut off"


@pytest.mark.parametrize(
    ("parts", "kind"),
    [
        ([b"data: {broken\n\n"], "garbage"),
        ([b"data: [1, 2]\n\n"], "garbage"),
        ([b"data: " + b"[" * 100_000 + b"\n\n"], "garbage"),
        ([b"data: \xff\xfe\n\n"], "garbage"),
        ([piece("a"), event(error={"message": "out of memory"})], "error in the stream"),
        ([piece("", "stop"), b"data: [DONE]\n\n"], "empty answer"),
        ([b"<html>busy</html>"], "cut off"),
        ([event(choices="x"), event(choices=[3]), event(choices=[{"delta": "x", "text": 3}])], "cut off"),
    ],
)
def test_streams_that_are_no_answer(parts, kind):
    with pytest.raises(Malformed) as caught:
        answered(*parts)
    assert caught.value.kind == kind


def test_another_status_and_another_type():
    told = b'{"error": {"message": "too many requests"}}'
    with pytest.raises(Malformed, match="too many requests") as caught:
        read_answer(fed(b"HTTP/1.1 503 Busy\r\nContent-Length: %d\r\n\r\n" % len(told) + told))
    assert caught.value.kind == "HTTP 503"
    with pytest.raises(Malformed) as caught:
        read_answer(fed(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"))
    assert caught.value.kind == "not a stream"


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b'{"error": {"message": "no"}}', "no"),
        (b'{"error": "no"}', "no"),
        (b'{"detail": [{"loc": ["body"]}]}', '[{"loc": ["body"]}]'),
        (b"Bad\n  Gateway", "Bad Gateway"),
        (b"\xff", "\ufffd"),
        (b"x" * 1000, "x" * 200),
        (b"null", "null"),
    ],
)
def test_what_a_server_says_is_wrong(data, text):
    assert message_of(data) == text

"""Traces of other people's making are read as they are written, and what is wrong in one is named by its line."""

from __future__ import annotations

import json

import numpy as np
import pytest

from assay.errors import InputError
from assay.methods.core.fleet.traces import Request, Served, Streams, merged, poisson, read_trace


def written(tmp_path, text):
    file = tmp_path / "trace"
    file.write_text(text)
    return file


def test_azures_columns(tmp_path):
    text = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
    first, second = read_trace(written(tmp_path, text)).requests
    assert (first.at, first.prompt_tokens, first.new_tokens) == (0.0, 374, 44)
    assert second.at == pytest.approx(4.314579, abs=1e-6)


def test_burstgpts_columns(tmp_path):
    text = (
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,ChatGPT,472,18,490,Conversation log\n"
        "45,GPT-4,1087,0,1087,Conversation log\n118,GPT-4,417,276,693,API log\n"
    )
    found = read_trace(written(tmp_path, text)).requests
    assert found == (
        Request(0, 472, 18, "ChatGPT"),
        Request(113, 417, 276, "GPT-4"),
    )  # the one without an answer is left out


def test_our_own_lines_and_what_was_measured(tmp_path):
    lines = [
        {"at": 3, "prompt_tokens": 5, "new_tokens": 2, "ttft": 0.5, "e2e": 1.5, "tenant": "a", "priority": 1},
        {"at": 1, "prompt_tokens": 7, "new_tokens": 1, "ttft": 0.25, "e2e": 0.25},
    ]
    trace = read_trace(written(tmp_path, "\n".join(map(json.dumps, lines))))
    assert [request.at for request in trace.requests] == [0, 2]
    late = trace.measured[1]
    assert (late.ttft, late.itl, late.e2e, late.request.tenant) == (0.5, 1.0, 1.5, "a")
    assert trace.measured[0].itl is None
    del lines[0]["ttft"]
    assert read_trace(written(tmp_path, "\n".join(map(json.dumps, lines)))).measured == ()
    assert len(read_trace(written(tmp_path, "\n".join(map(json.dumps, lines))), limit=1).requests) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "of an empty file"),
        ("a,b\n1,2\n", "got the columns a, b"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "has no requests"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,2\n", "line 2"),
        ("Timestamp,Request tokens,Response tokens\n1,x,2\n", "line 2"),
        ("Timestamp,Request tokens,Response tokens\n1,3.7,2\n", "whole numbers"),
        ("ContextTokens,GeneratedTokens,TIMESTAMP\n1,2\n", "line 2"),
        ('{"at": 0, "prompt_tokens": 0, "new_tokens": 1}', "line 1: prompt_tokens"),
        ('{"at": 0, "new_tokens": 1}', "must have prompt_tokens"),
        ('{"prompt_tokens": 1, "new_tokens": 1}', "must have at"),
        ('{"at": NaN, "prompt_tokens": 1, "new_tokens": 1}', "at must"),
        ('{"at": 0, "prompt_tokens": 1, "new_tokens": 1, "x": 1}', "got x"),
        ('{"at": 0, "prompt_tokens": 1, "new_tokens": 1, "ttft": 2, "e2e": 1}', "e2e must not be less"),
        ('{"at": 0, "prompt_tokens": 1, "new_tokens": 1, "tenant": 3}', "tenant must be a text"),
        ('{"at": 0, "prompt_tokens": true, "new_tokens": 1}', "prompt_tokens"),
        ("[1]\n", "got the columns"),
    ],
)
def test_what_is_refused(tmp_path, text, said):
    with pytest.raises(InputError, match=said):
        read_trace(written(tmp_path, text))


def test_a_missing_file(tmp_path):
    with pytest.raises(InputError, match="cannot read"):
        read_trace(tmp_path / "none")


def test_streams_are_by_name_and_seed():
    streams = Streams(1)
    first = streams.of("a").random(8)
    streams.of("b").random(100)
    assert np.array_equal(first, streams.of("a").random(8))
    assert not np.array_equal(first, streams.of("b").random(8))
    assert not np.array_equal(first, Streams(2).of("a").random(8))


def test_poisson_arrivals():
    found = poisson(20.0, 200.0, [(10, 5), (30, 7)], seed=4)
    assert 3700 < len(found) < 4300
    gaps = np.diff([request.at for request in found])
    assert 0.9 < gaps.std() / gaps.mean() < 1.1  # as exponential gaps have it
    assert {(request.prompt_tokens, request.new_tokens) for request in found} == {(10, 5), (30, 7)}
    assert found == poisson(20.0, 200.0, [(10, 5), (30, 7)], seed=4)
    # another tenant's arrivals are others, and the first tenant's stay what they are beside it
    other = poisson(20.0, 200.0, [(10, 5)], seed=4, tenant="b")
    both = merged([found, other])
    assert [request for request in both if not request.tenant] == found
    with pytest.raises(ValueError, match="lengths must hold"):
        poisson(1.0, 1.0, [])


def test_served_is_relative_to_its_request():
    assert Served(Request(2.0, 1, 1), 2.5, 2.5).e2e == 0.5

"""Prompts that never repeat, arrivals, and trace files."""

from __future__ import annotations

import itertools
import json
import random
import statistics

import pytest

from assay.errors import InputError
from assay.loadtest.traces import (
    Lengths,
    Line,
    Prompts,
    alike,
    arrivals,
    lengths_of,
    made_up,
    read_trace,
    repeats,
)


def test_no_two_prompts_begin_alike():
    """Nothing that a server keeps of one prompt is of use for another: neighbours differ in their first letter, all in their first word."""
    prompts = Prompts(seed=3)
    made = [text for _ in range(500) for text in prompts.alike(30, 2)]
    assert len({text[:10] for text in made}) == len(made)
    assert all(a[1] != b[1] for a, b in itertools.pairwise(made))


def test_prompts_depend_on_the_seed_and_on_nothing_else():
    def made(seed):
        prompts = Prompts(seed)
        return [prompts.alike(tokens, 1) for tokens in (5, 50, 500)]

    assert made(1) == made(1)
    assert not set(made(1)) & set(made(2))


def test_prompts_have_about_the_tokens_asked_for_and_are_real_text():
    from assay.workloads.text import code_text, english_text

    prompts = Prompts(seed=1, characters=3.5)
    for tokens in (1, 10, 300):
        (text,) = prompts.alike(tokens, 1)
        assert len(text) == max(round(3.5 * tokens), 12)
    body = text.split(") ", 1)[1]
    assert body in code_text() or body in english_text()


def test_a_prompt_longer_than_the_text_wraps_around():
    prompts = Prompts(seed=1)
    prompts.texts = ("one line\ntwo\n",)
    (text,) = prompts.alike(25, 1)
    assert len(text) == 100
    assert text.count("one line\ntwo\n") >= 6


def test_arrivals_are_a_poisson_process():
    times = list(itertools.islice(arrivals(5.0, random.Random(0)), 4000))
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert times[0] == 0
    assert statistics.fmean(gaps) == pytest.approx(0.2, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(0.2, rel=0.08)  # exponential: as large as the mean


def test_lengths_are_drawn_from_all_of_their_range():
    lines = list(itertools.islice(made_up(Lengths(3, 5), Lengths(7, 7), 0), 200))
    assert {line.prompt_tokens for line in lines} == {3, 4, 5}
    assert {line.new_tokens for line in lines} == {7}
    assert lengths_of("7", "--x") == Lengths(7, 7)


@pytest.mark.parametrize(
    "text", ["", "a", "0", "5..3", "1..", "..3", "1.5", "-1", "1...3", "9999999999", "1..2..3", " 1"]
)
def test_what_are_no_lengths(text):
    with pytest.raises(InputError, match="--new-tokens must be"):
        lengths_of(text, "--new-tokens")


def test_the_same_requests_for_each_server():
    lines = [Line(5, prompt="own", at=1.0), Line(6, prompt_tokens=40, at=2.5)]
    own, made = alike(iter(lines), Prompts(seed=0), 3)
    assert [(request.prompt, request.new_tokens, request.at) for request in own] == [("own", 5, 1.0)] * 3
    assert len({request.prompt for request in made}) == 3
    assert len({request.prompt[11:] for request in made}) == 1
    assert {(request.new_tokens, request.at) for request in made} == {(6, 2.5)}


def written(folder, *lines):
    path = folder / "trace.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_a_trace_is_read(tmp_path):
    path = written(
        tmp_path,
        {"at": 0, "prompt": "one\u2028two", "new_tokens": 3},
        "",
        '{"at": 1.5, "prompt": "raw\u2028text", "new_tokens": 2}',
        {"at": 1.5, "prompt_tokens": 100, "new_tokens": 4},
    )
    assert read_trace(path) == [
        Line(3, "one\u2028two", at=0.0),
        Line(2, "raw\u2028text", at=1.5),
        Line(4, prompt_tokens=100, at=1.5),
    ]


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([], "has no lines"),
        (["{"], "line 1: is no JSON"),
        (["[1]"], "line 1: must be a JSON object"),
        ([{"prompt": "a", "new_tokens": 1}, {"prompt": "a"}], "line 2: must have new_tokens"),
        ([{"new_tokens": 1}], "either prompt or prompt_tokens"),
        ([{"prompt": "a", "prompt_tokens": 1, "new_tokens": 1}], "either prompt or prompt_tokens"),
        ([{"prompt": "", "new_tokens": 1}], "prompt must be a text"),
        ([{"prompt": 3, "new_tokens": 1}], "prompt must be a text"),
        ([{"prompt_tokens": 0, "new_tokens": 1}], "prompt_tokens must be a whole number at least 1"),
        ([{"prompt_tokens": 1, "new_tokens": 1.5}], "new_tokens must be a whole number"),
        ([{"prompt_tokens": 1, "new_tokens": 1, "at": -1}], "at must be a finite number at least 0"),
        (['{"prompt_tokens": 1, "new_tokens": 1, "at": NaN}'], "at must be a finite number"),
        ([{"prompt": "a", "new_tokens": 1, "output_length": 1}], "got output_length"),
        (
            [{"prompt": "a", "new_tokens": 1, "at": 2}, {"prompt": "a", "new_tokens": 1, "at": 1}],
            "line 2: at must not go back",
        ),
        ([{"prompt": "a", "new_tokens": 1, "at": 2}, {"prompt": "a", "new_tokens": 1}], "either all lines have a time"),
    ],
)
def test_what_is_wrong_with_a_trace_is_said_with_its_line(tmp_path, lines, says):
    with pytest.raises(InputError, match=says):
        read_trace(written(tmp_path, *lines))


def test_a_trace_that_cannot_be_read(tmp_path):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for path in (tmp_path / "none", tmp_path, tmp_path / "bytes", "~nosuchuser/x"):
        with pytest.raises(InputError, match="--trace: cannot read"):
            read_trace(path)


def test_repeated_prompts_are_counted():
    assert repeats([Line(1, "a"), Line(2, "a"), Line(1, "b")]) == 1

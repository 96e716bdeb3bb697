"""`assay loadtest`, against scripted servers on a loopback port."""

from __future__ import annotations

import json
import socket

import pytest
from fake_openai import Script, listening

from assay.cli.main import main

QUICK = Script(ttft=0.01, itl=lambda place: 0.002)
SMALL = ["--requests", "6", "--prompt-tokens", "10..20", "--new-tokens", "3..5", "--seed", "1"]


def run(capsys, *words):
    code = main(["loadtest", *words])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_document(capsys):
    with listening(QUICK) as (url, fake):
        code, out, err = run(capsys, url, "--concurrency", "2", *SMALL, "--slo", "ttft=60000", "--json", "--check")
    found = json.loads(out)
    assert code == 0
    (server,) = found["servers"]
    assert (server["model"], server["api"], server["answered"], server["errors"]) == ("tiny", "chat/completions", 6, {})
    assert server["url"] == f"{url}/v1"
    assert server["ttft"]["p50"]["value"] >= 9  # the script waits ten, and a busy machine longer
    assert server["itl"]["p50"]["value"] >= 1
    assert found["slo"] == {"ttft": 60000}
    assert found["load"]["seed"] == 1
    assert found["generator"]["core_share"] > 0
    assert len(fake.bodies) == 6 + 2
    assert f"looking at {url}" in err


def test_lines_for_people(capsys):
    with listening(QUICK) as (url, _):
        code, out, _ = run(capsys, url, "--rate", "100", "--completions", *SMALL, "--slo", "ttft=60000,itl=60000")
    assert code == 0
    for part in (
        "6 of 6 requests answered",
        "first token, ms",
        "between tokens, ms",
        "tokens/s",
        "within the SLO, %",
        "% of a core",
        "100 a second",
    ):
        assert part in out
    assert all(len(line) <= 80 for line in out.splitlines() if line.startswith(("first", "between", "whole", "within")))


def test_two_servers(capsys):
    with listening(QUICK) as (one, _), listening(QUICK) as (two, _):
        code, out, _ = run(capsys, one, two, "--concurrency", "1", "--blocks", "2", *SMALL)
    assert code == 0
    assert "Second server over the first, median of 2 pairs of blocks" in out
    assert one in out
    assert two in out


def test_the_model_the_key_and_full_answers(capsys, monkeypatch):
    monkeypatch.setenv("ASSAY_API_KEY", "secret")
    with listening(QUICK) as (url, fake):
        code, out, _ = run(capsys, f"{url}/api", "--concurrency", "1", "--model", "big", "--ignore-eos", *SMALL)
    assert code == 0
    assert {body["model"] for body in fake.bodies} == {"big"}
    assert all(body["ignore_eos"] for body in fake.bodies)
    assert set(fake.paths) == {"/api/models", "/api/chat/completions"}
    assert all("Bearer secret" in head for head in fake.headers)
    assert "secret" not in out


def test_a_trace(capsys, tmp_path):
    trace = tmp_path / "trace.jsonl"
    lines = [{"at": 0.0, "prompt": "one", "new_tokens": 2}, {"at": 0.05, "prompt_tokens": 30, "new_tokens": 3}]
    trace.write_text("\n".join(map(json.dumps, lines)))
    with listening(QUICK) as (url, fake):
        code, out, _ = run(capsys, url, "--trace", str(trace), "--json")
    assert code == 0
    assert [body["max_tokens"] for body in fake.bodies[2:]] == [2, 3]
    assert fake.bodies[2]["messages"][0]["content"] == "one"
    found = json.loads(out)
    assert (found["load"]["loop"], found["load"]["trace_lines"], found["servers"][0]["answered"]) == ("open", 2, 2)


def test_check_says_when_the_goal_is_not_met(capsys):
    with listening(QUICK) as (url, _):
        words = [url, "--concurrency", "2", *SMALL, "--slo", "ttft=0.001"]
        assert run(capsys, *words, "--check")[0] == 1
        assert run(capsys, *words)[0] == 0
    with listening(
        Script(answer=lambda body, number: b"" if number == 4 else None, ttft=0.0, itl=lambda place: 0.0)
    ) as (url, _):
        code, out, _ = run(capsys, url, "--concurrency", "2", *SMALL, "--check")
        assert code == 1
        assert "1 x no answer: the connection ended without an answer" in out


def test_without_a_seed_no_prompt_is_known_to_a_server_that_was_asked_before(capsys):
    with listening(QUICK) as (url, fake):
        for _ in range(2):
            assert run(capsys, url, "--concurrency", "2", *SMALL[:-2])[0] == 0
    begins = [body["messages"][0]["content"][:10] for body in fake.bodies]
    assert len(set(begins)) == len(begins) == 16


def test_nobody_listens(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    code, out, err = run(capsys, f"http://127.0.0.1:{port}", "--concurrency", "1", *SMALL)
    assert (code, out) == (3, "")
    assert "does not answer: connection refused" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nonsense"], "URL must be"),
        (["http://h", "--concurrency", "0"], "--concurrency must be a finite number at least 1"),
        (["http://h", "--rate", "nan"], "--rate must be a finite number above 0"),
        (["http://h", "--rate", "-1"], "--rate must be"),
        (["http://h", "--concurrency", "1", "--seconds", "0"], "--seconds must be"),
        (["http://h", "--concurrency", "1", "--timeout", "inf"], "--timeout must be"),
        (["http://h", "--concurrency", "1", "--rate", "1"], "either --concurrency or --rate"),
        (["http://h"], "either --concurrency or --rate"),
        (["http://h", "--concurrency", "1", "--slo", "tpot=3"], "--slo must be like"),
        (["http://h", "--concurrency", "1", "--prompt-tokens", "x"], "--prompt-tokens must be"),
        (["http://h", "--concurrency", "4", "--requests", "3"], "--requests must be at least 4"),
        (["http://h", "http://g", "--concurrency", "4", "--requests", "31"], "--requests must be at least 32"),
        (["http://h", "--concurrency", "1", "--api-key", "two words"], "must be one word"),
        (["http://h", "--trace", "/none"], "--trace: cannot read /none"),
    ],
)
def test_wrong_options_are_one_line(capsys, words, says):
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "")
    assert says in err
    assert len(err.strip().splitlines()) == 1

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from assay.errors import InputError
from assay.workloads import workload as module
from assay.workloads.text import document_windows
from assay.workloads.workload import TextWorkload, bundled_workload, quality_windows, read_workload


def write(path, *lines):
    raw = b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
    path.write_bytes(raw)
    return path


@pytest.fixture
def file(tmp_path):
    return tmp_path / "mine.jsonl"


def test_a_good_file_is_read_in_order(file, tokenizer):
    write(file, {"prompt": "def f(x):"}, b"", {"prompt": "naïve ☃", "completion": " yes"})
    work = read_workload(file, tokenizer, context=256, new_tokens=10)
    assert work.name == "mine.jsonl"
    assert work.new_tokens == 10
    assert [tokenizer.decode(ids) for ids in work.prompts] == ["def f(x):", "naïve ☃"]
    assert [tokenizer.decode(ids) for ids in work.completions] == ["", " yes"]


def test_a_byte_order_mark_windows_line_ends_and_no_last_newline_are_fine(file, tokenizer):
    file.write_bytes(b'\xef\xbb\xbf{"prompt": "one"}\r\n{"prompt": "two"}')
    work = read_workload(file, tokenizer, context=256)
    assert [tokenizer.decode(ids) for ids in work.prompts] == ["one", "two"]


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        (b"{prompt: 1}", "not JSON"),
        (b'{"prompt": "a"', "not JSON"),
        (b'{"prompt": "a"} {"prompt": "b"}', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"9" * 5000, "not JSON"),
        (b'{"prompt": "\xff"}', "not UTF-8 .byte 13"),
        (["a"], "not an object but a list"),
        ("a", "not an object but a string"),
        (3, "not an object but a number"),
        (None, "not an object but null"),
        ({}, "prompt is missing"),
        ({"completion": "a"}, "prompt is missing"),
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": " \n\t"}, "prompt is empty"),
        ({"prompt": 3}, "prompt must be a string, not a number"),
        ({"prompt": None}, "prompt must be a string, not null"),
        ({"prompt": ["a"]}, "prompt must be a string, not a list"),
        ({"prompt": "a", "completion": {}}, "completion must be a string, not an object"),
        ({"prompt": "a", "completion": True}, "completion must be a string, not true or false"),
        ({"prompt": "a", "promt": "b"}, "unknown key 'promt'; allowed: prompt, completion"),
        (b'{"prompt": "a", "prompt": "b"}', "given twice"),
        (b'{"prompt": "\\ud800"}', "surrogate"),
        (b'{"prompt": "a", "completion": "\\udfff b"}', "surrogate"),
    ],
)
def test_a_bad_line_is_named_by_its_number(file, tokenizer, line, wrong):
    write(file, {"prompt": "good"}, b"", line, {"prompt": "good"})
    with pytest.raises(InputError, match=wrong) as caught:
        read_workload(file, tokenizer, context=256)
    assert "line 3: " in str(caught.value)
    assert str(file) in str(caught.value)
    assert str(caught.value).count("line ") == 1


def test_every_bad_line_is_named(file, tokenizer):
    write(file, b"x", {"prompt": "good"}, {}, {"prompt": 1})
    with pytest.raises(InputError) as caught:
        read_workload(file, tokenizer, context=256)
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[-2 if i else 1].strip() for i, line in enumerate(lines)] == ["line 1", "line 3", "line 4"]


def test_very_many_bad_lines_are_counted(file, tokenizer):
    write(file, *[b"x"] * 100)
    with pytest.raises(InputError, match="and 80 more"):
        read_workload(file, tokenizer, context=256)


def test_too_long_for_the_context_says_the_numbers(file, tokenizer):
    long = "word " * 100
    count = len(tokenizer(long)["input_ids"])
    write(file, {"prompt": "short", "completion": long}, {"prompt": long})
    assert read_workload(file, tokenizer, context=count + 64)
    with pytest.raises(InputError) as caught:
        read_workload(file, tokenizer, context=100)
    said = str(caught.value)
    assert f"a completion of {count}, but the model's context is 100" in said
    assert f"line 2: too long: a prompt of {count} tokens and 64 new tokens" in said


def test_the_boundary_of_the_context_fits(file, tokenizer):
    write(file, {"prompt": "one two three"})
    count = len(tokenizer("one two three")["input_ids"])
    assert read_workload(file, tokenizer, context=count + 5, new_tokens=5)
    with pytest.raises(InputError, match="too long"):
        read_workload(file, tokenizer, context=count + 4, new_tokens=5)


def test_a_line_without_end_is_not_read_into_memory(file, tokenizer, monkeypatch):
    monkeypatch.setattr(module, "_MAX_LINE", 1 << 20)
    file.write_bytes(b'{"prompt": "' + b"a" * (3 << 20) + b'"}\n{"prompt": "good"}\n{"prompt": 1}\n')
    with pytest.raises(InputError) as caught:
        read_workload(file, tokenizer, context=256)
    assert "line 1: longer than 1 MiB" in str(caught.value)
    assert "line 3: " in str(caught.value)
    assert "line 2" not in str(caught.value)


@pytest.mark.parametrize("raw", [b"", b"\n\n  \n", b"\xef\xbb\xbf"])
def test_an_empty_file(file, tokenizer, raw):
    file.write_bytes(raw)
    with pytest.raises(InputError, match="empty"):
        read_workload(file, tokenizer, context=256)


def test_a_file_that_is_not_there_or_no_file(tmp_path, tokenizer):
    with pytest.raises(InputError, match="no such workload file"):
        read_workload(tmp_path / "gone.jsonl", tokenizer, context=256)
    with pytest.raises(InputError, match="cannot be read"):
        read_workload(tmp_path, tokenizer, context=256)
    with pytest.raises(InputError, match="cannot be read"):
        read_workload("a\0b", tokenizer, context=256)


@pytest.mark.parametrize("name", ["context", "new_tokens"])
def test_counts_must_be_positive(file, tokenizer, name):
    write(file, {"prompt": "a"})
    with pytest.raises(ValueError, match=f"{name} must be a whole number at least 1, got 0"):
        read_workload(file, tokenizer, **{"context": 256, name: 0})
    with pytest.raises(TypeError, match=f"{name} must be a whole number at least 1, got nan"):
        read_workload(file, tokenizer, **{"context": 256, name: float("nan")})


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    raw=st.one_of(
        st.binary(max_size=200), st.text(max_size=100).map(lambda text: json.dumps({"prompt": text}).encode())
    )
)
def test_any_bytes_are_read_or_refused(file, tokenizer, raw):
    file.write_bytes(raw)
    try:
        work = read_workload(file, tokenizer, context=1000)
    except InputError:
        return
    assert work.prompts


def test_the_bundled_workload_has_prompts_of_the_length_asked_for(tokenizer):
    work = bundled_workload(tokenizer, 120, new_tokens=7, n=4)
    assert [len(prompt) for prompt in work.prompts] == [120] * 4
    assert work.completions == [[], [], [], []]
    assert work.new_tokens == 7
    assert len({tuple(prompt) for prompt in work.prompts}) == 4
    assert work == bundled_workload(tokenizer, 120, new_tokens=7, n=4)
    assert work.prompts != bundled_workload(tokenizer, 120, n=4, seed=9).prompts
    with pytest.raises(ValueError, match="tokens must be"):
        bundled_workload(tokenizer, 0)


def test_quality_windows_are_the_users_when_there_is_enough(tokenizer):
    prompts = [[10 + i] * 30 for i in range(60)]
    work = TextWorkload("mine.jsonl", prompts, [[5, 6]] * 60, 8)
    quality = quality_windows(work, tokenizer, "search", window=64, n=8)
    assert quality.windows.shape == (8, 64)
    assert quality.source == "8 windows of 64 tokens of mine.jsonl, the search's half"
    first, second = ([10 + i] * 30 + [5, 6, tokenizer.eos_token_id] for i in (0, 2))
    assert quality.windows[0].tolist() == [*first, *second][:64]
    assert quality_windows(work, tokenizer, "search", window=150, n=8).windows.shape == (6, 150)


@pytest.mark.parametrize("window", [20, 64])
def test_search_and_proof_judge_on_different_prompts_and_no_window_on_anothers(tokenizer, window):
    prompts = [[10 + i] * 30 for i in range(90)]
    work = TextWorkload("mine.jsonl", [*prompts, *prompts], [[]] * 180, 8)  # each stands in the file twice
    taken = []
    for half in ("search", "proof"):
        rows = quality_windows(work, tokenizer, half, window=window, n=12).windows
        assert len(rows) == 12
        taken += [{token for token in row if token >= 10} for row in rows.tolist()]
    assert sum(map(len, taken)) == len(set().union(*taken))


def test_quality_windows_fall_back_to_bundled_text_and_say_so(tokenizer):
    work = TextWorkload("mine.jsonl", [[7] * 100, [8] * 100, [9] * 20], [[]] * 3, 8)
    quality = quality_windows(work, tokenizer, "search", window=64, n=8)
    assert torch.equal(quality.windows, document_windows(tokenizer, "search", window=64, n=8))
    assert quality.source == (
        "bundled held-out text of the search: the search's half of mine.jsonl has 122 tokens in 2 prompts, which fill 1 "
        "windows of 64 of their own, not 4"
    )
    proof = quality_windows(work, tokenizer, "proof", window=64, n=8)
    assert torch.equal(proof.windows, document_windows(tokenizer, "proof", window=64, n=8))
    assert "fill 1 windows of 64 of their own, not 8" in proof.source
    bundled = quality_windows(bundled_workload(tokenizer, 500), tokenizer, window=64, n=8)
    assert torch.equal(bundled.windows, quality.windows)
    assert bundled.source == "bundled held-out text of the search"


@pytest.mark.parametrize(("window", "n", "wrong"), [(1, 4, "window must be .* at least 2, got 1"), (8, 0, "n must be")])
def test_quality_windows_that_cannot_be(tokenizer, window, n, wrong):
    with pytest.raises(ValueError, match=wrong):
        quality_windows(TextWorkload("mine.jsonl", [[7] * 100], [[]], 8), tokenizer, window=window, n=n)

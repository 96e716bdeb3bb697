from __future__ import annotations

import ast

import pytest
import torch
from tests.properties.apart import python

from assay.workloads import text
from assay.workloads.text import (
    calibration_windows,
    code_text,
    docstrings,
    document_windows,
    english_text,
    heldout_windows,
    long_prompt,
    mixed_prompts,
    text_hash,
)


class WithStart:
    """A tokenizer that puts a beginning-of-sequence token before every text, as Llama's does."""

    def __init__(self, tokenizer):
        self.inner, self.bos_token_id = tokenizer, tokenizer.bos_token_id

    def __call__(self, texts, add_special_tokens=True, verbose=True):
        ids = self.inner(texts, add_special_tokens=False)["input_ids"]
        if not add_special_tokens:
            return {"input_ids": ids}
        return {"input_ids": [self.bos_token_id, *ids] if isinstance(texts, str) else [[1, *row] for row in ids]}


def test_the_text_is_the_standard_librarys():
    code, english = code_text(), english_text()
    assert "class OrderedDict" not in code  # packages are not top-level modules
    assert "def getoutput(" in code  # subprocess
    assert len(code) > 2_000_000
    assert len(english) > 200_000
    assert "The for statement" in english.replace('"for"', "for") or "for_stmt" in english


def test_the_english_text_repeats_no_paragraph():
    paragraphs = [" ".join(paragraph.split()) for paragraph in english_text().split("\n\n")]
    assert len(paragraphs) == len(set(paragraphs))


@pytest.mark.parametrize("kind", ["code", "english"])
def test_every_document_is_in_exactly_one_part(kind):
    parts = text._parts(kind)
    assert sorted(sum(parts.values(), ())) == sorted(document for _, document in text._documents(kind))
    total = sum(len(document) for documents in parts.values() for document in documents)
    for part, share in text._SHARES.items():
        assert abs(sum(map(len, parts[part])) / total - share) < 0.05


def test_docstrings_are_public_whole_and_distinct_and_nothing_is_run():
    found = docstrings()
    assert len(found) > 800
    assert len(set(found)) == len(found)
    assert all(item.strip() for item in found)
    assert len(docstrings()) == len(found)
    found.clear()
    assert docstrings()  # the caller's list is his own
    source = 'class A:\n    "a"\n    def f(self):\n        """b\n           c"""\n    def _g(self):\n        "hidden"\n'
    assert list(text._docstrings_of(ast.parse(source))) == ["a", "b\nc"]
    code = "import sys; from assay.workloads.text import docstrings; docstrings()"
    code += "; print('antigravity' in sys.modules, 'turtle' in sys.modules)"
    assert python(code).split() == ["False", "False"]


def test_docstrings_come_from_the_prompts_part():
    heldout = "\n".join(text._parts("code")["heldout"] + text._parts("code")["calibration"])
    long_ones = [item for item in docstrings() if len(item) > 300 and "\n" not in item]
    assert not any(item in heldout for item in long_ones)


def test_the_hash_is_repeatable_and_follows_the_text(monkeypatch):
    assert text_hash() == text_hash()
    assert len(text_hash()) == 64
    monkeypatch.setattr(text, "english_text", lambda: "other")
    assert text._text_hash.__wrapped__() != text_hash()


@pytest.mark.parametrize("tokens", [1, 2, 100, 5000])
@pytest.mark.parametrize("kind", ["code", "english"])
def test_a_long_prompt_has_the_exact_length_and_is_real_text(tokenizer, tokens, kind):
    prompt = long_prompt(tokenizer, tokens, kind=kind)
    assert prompt.shape == (1, tokens)
    assert prompt.dtype == torch.int64
    source = text._joined(kind, "prompts")
    assert tokenizer.decode(prompt[0]).removesuffix("�").rstrip("�") in source + "\n\n" + source


def test_a_long_prompt_is_repeatable_and_seeds_start_elsewhere(tokenizer):
    assert torch.equal(long_prompt(tokenizer, 300, seed=5), long_prompt(tokenizer, 300, seed=5))
    starts = {tuple(long_prompt(tokenizer, 50, seed=seed)[0].tolist()) for seed in range(20)}
    assert len(starts) == 20


def test_a_longer_prompt_begins_with_the_shorter_one(tokenizer):
    short, long = long_prompt(tokenizer, 500, seed=1), long_prompt(tokenizer, 9000, seed=1)
    assert torch.equal(short[0, :490], long[0, :490])


def test_a_long_prompt_goes_round_at_the_end_but_not_further(tokenizer, monkeypatch):
    monkeypatch.setattr(text, "_joined", lambda kind, part: "one line\nand another\nand a third\n")
    whole = "one line\nand another\nand a third\n\n\n"
    available = len(tokenizer(whole)["input_ids"])
    for seed in range(5):
        prompt = long_prompt(tokenizer, available - 4, seed=seed)
        assert prompt.shape == (1, available - 4)
    with pytest.raises(ValueError, match=r"tokens must be at most \d+, the length of the code text, got 1000"):
        long_prompt(tokenizer, 1000)


@pytest.mark.parametrize("tokens", [0, -3, 1.0, True, "8"])
def test_a_long_prompt_of_a_wrong_length(tokenizer, tokens):
    with pytest.raises((TypeError, ValueError), match="tokens must be a whole number at least 1"):
        long_prompt(tokenizer, tokens)


def test_a_long_prompt_of_an_unknown_kind(tokenizer):
    with pytest.raises(ValueError, match="kind must be one of 'code', 'english', got 'poem'"):
        long_prompt(tokenizer, 8, kind="poem")


def test_mixed_prompts_span_the_lengths_in_arrival_order(tokenizer):
    prompts = mixed_prompts(tokenizer, 32)
    lengths = [len(prompt) for prompt in prompts]
    assert len(prompts) == 32
    assert min(lengths) <= 8
    assert max(lengths) > 400
    assert all(6 <= length <= 470 for length in lengths)
    assert lengths != sorted(lengths)
    assert len({tuple(prompt) for prompt in prompts}) == 32
    whole = {tuple(tokenizer(item)["input_ids"]) for item in docstrings()}
    assert all(tuple(prompt) in whole for prompt in prompts)


def test_mixed_prompts_can_be_kept_short(tokenizer):
    lengths = [len(prompt) for prompt in mixed_prompts(tokenizer, 16, longest=60)]
    assert all(6 <= length <= 60 for length in lengths)
    assert max(lengths) > 50
    with pytest.raises(ValueError, match="longest must be a whole number at least 6, got 5"):
        mixed_prompts(tokenizer, 16, longest=5)


def test_mixed_prompts_are_repeatable(tokenizer):
    assert mixed_prompts(tokenizer, 8, seed=1) == mixed_prompts(tokenizer, 8, seed=1)
    assert mixed_prompts(tokenizer, 8, seed=1) != mixed_prompts(tokenizer, 8, seed=2)
    assert len(mixed_prompts(tokenizer, 1)) == 1


@pytest.mark.parametrize("n", [0, -1, 2.0, True, 10**6])
def test_mixed_prompts_of_a_wrong_number(tokenizer, n):
    with pytest.raises((TypeError, ValueError), match="n must be"):
        mixed_prompts(tokenizer, n)


@pytest.mark.parametrize("make", [heldout_windows, calibration_windows])
def test_windows_have_the_shape_asked_for_and_alternate(tokenizer, make):
    windows = make(tokenizer, window=64, n=5)
    assert windows.shape == (5, 64)
    assert windows.dtype == torch.int64
    assert torch.equal(windows, make(tokenizer, window=64, n=5))
    part = "heldout" if make is heldout_windows else "calibration"
    for i, row in enumerate(windows):
        kind = "english" if i % 2 else "code"
        assert tokenizer.decode(row).strip("�") in text._joined(kind, part)


def test_windows_do_not_overlap_and_cover_the_text(tokenizer):
    windows = heldout_windows(tokenizer, window=64, n=40)
    source = text._joined("code", "heldout")
    places = [source.find(tokenizer.decode(row).strip("�")) for row in windows[::2]]
    assert all(place >= 0 for place in places)
    assert all(b - a >= 64 for a, b in zip(places, places[1:], strict=False))
    assert places[-1] > 0.9 * len(source)


def test_heldout_and_calibration_share_no_text(tokenizer):
    def pieces(windows):
        return {tuple(row[i : i + 48]) for row in windows.tolist() for i in range(len(row) - 48)}

    heldout = pieces(heldout_windows(tokenizer, window=512, n=16))
    calibration = pieces(calibration_windows(tokenizer, window=512, n=16))
    assert not heldout & calibration


def test_search_proof_and_calibration_share_no_document():
    for kind in text.KINDS:
        search, proof = (set(text._half(kind, half)) for half in text.HALVES)
        assert search | proof == set(text._parts(kind)["heldout"])
        assert not search & proof
        assert not (search | proof) & set(text._parts(kind)["calibration"])
        assert not (search | proof) & set(text._parts(kind)["prompts"])
        assert 0.25 < sum(map(len, search)) / sum(map(len, search | proof)) < 0.7


@pytest.mark.parametrize("half", text.HALVES)
@pytest.mark.parametrize("window", [64, 700])
def test_every_window_of_a_half_has_documents_of_its_own(tokenizer, half, window):
    windows = document_windows(tokenizer, half, window=window, n=12)
    assert windows.shape == (12, window)
    assert torch.equal(windows, document_windows(tokenizer, half, window=window, n=12))
    documents = [document for kind in text.KINDS for document in text._half(kind, half)]
    taken = []
    for row in windows:
        parts = [part for part in tokenizer.decode(row).strip("\ufffd").split("\n\n") if len(part) > 20]
        taken.append({i for i, document in enumerate(documents) for part in parts if part in document})
        assert taken[-1], "the window's text must come from the half's documents"
    # a line may stand in several documents: the window's own is the one that holds most of it
    own = [max(found, key=lambda i: sum(part in documents[i] for part in tokenizer.decode(row).split("\n\n")))
           for found, row in zip(taken, windows, strict=True)]  # fmt: skip
    assert len(set(own)) == len(own)
    kinds = ["code" if i < len(text._half("code", half)) else "english" for i in own]
    assert {"code", "english"} == set(kinds)


def test_windows_of_search_and_proof_and_calibration_share_no_text(tokenizer):
    def pieces(windows):
        return {tuple(row[i : i + 48]) for row in windows.tolist() for i in range(len(row) - 48)}

    search = pieces(document_windows(tokenizer, "search", window=544, n=15))
    proof = pieces(document_windows(tokenizer, "proof", window=544, n=30))
    calibration = pieces(calibration_windows(tokenizer, window=512, n=16))
    assert not search & proof
    assert not (search | proof) & calibration


def test_short_documents_are_joined_and_too_long_a_window_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(text, "_half", lambda kind, half: ("a b c d\n" * 10,) * 7 if kind == "code" else ())
    length = len(tokenizer("a b c d\n" * 10)["input_ids"])
    assert document_windows(tokenizer, "proof", window=2 * length, n=9).shape == (3, 2 * length)
    with pytest.raises(ValueError, match="longer than the held-out text of the proof"):
        document_windows(tokenizer, "proof", window=9 * length, n=9)
    with pytest.raises(ValueError, match="half must be one of"):
        document_windows(tokenizer, "calibration", window=64, n=1)


def test_nearly_all_of_a_text_can_be_used(tokenizer):
    available = len(tokenizer(text._joined("english", "heldout"))["input_ids"])
    windows = heldout_windows(tokenizer, window=available // 2, n=4)[1::2]
    assert windows.shape == (2, available // 2)
    assert windows[0].tolist() != windows[1].tolist()
    with pytest.raises(ValueError, match="more than the heldout english text"):
        heldout_windows(tokenizer, window=available // 2 + 1, n=4)


@pytest.mark.parametrize(
    ("window", "n", "wrong"),
    [
        (1, 4, "window must be"),
        (8, 0, "n must be"),
        (8.0, 4, "window must be"),
        (float("nan"), 4, "window must be"),
        (10**6, 2, "more than the heldout code text"),
    ],
)
def test_windows_that_cannot_be(tokenizer, window, n, wrong):
    with pytest.raises((TypeError, ValueError), match=wrong):
        heldout_windows(tokenizer, window=window, n=n)


def test_the_start_token_leads_where_the_tokenizer_puts_one(tokenizer):
    started = WithStart(tokenizer)
    prompt, plain = long_prompt(started, 100), long_prompt(tokenizer, 100)
    assert prompt.shape == (1, 100)
    assert prompt[0, 0] == started.bos_token_id
    assert torch.equal(prompt[0, 1:], plain[0, :-1])
    assert plain[0, 0] != started.bos_token_id
    windows = heldout_windows(started, window=32, n=4)
    assert (windows[:, 0] == started.bos_token_id).all()
    assert torch.equal(windows[:, 1:], heldout_windows(tokenizer, window=32, n=4)[:, :-1])


@pytest.mark.model
def test_smollm2_gets_enough_text(smollm2):
    tokenizer = smollm2.tokenizer
    assert long_prompt(tokenizer, 32768).shape == (1, 32768)
    assert heldout_windows(tokenizer, window=2048, n=16).shape == (16, 2048)
    assert calibration_windows(tokenizer, window=512, n=64).shape == (64, 512)
    assert len(mixed_prompts(tokenizer, 128)) == 128

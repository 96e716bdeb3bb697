"""Prompts of the serving experiments are what a model reads: with the tokenizer's start, once, and no end."""

from __future__ import annotations

from assay.experiments.serving.idealized_runtime import docstring_requests
from assay.workloads import text


class Letters:
    """A tokenizer of letters that frames every text by a start (1) and an end (2)."""

    def __call__(self, texts, add_special_tokens=True, **options):
        if isinstance(texts, str):
            ids = [3 + ord(letter) for letter in texts]
            return {"input_ids": [1, *ids, 2] if add_special_tokens else ids}
        return {"input_ids": [self(one, add_special_tokens)["input_ids"] for one in texts]}


def test_requests_begin_with_the_start_and_hold_no_end(monkeypatch):
    monkeypatch.setattr("assay.experiments.serving.idealized_runtime.docstrings", lambda: ["abcde", "xy"])
    assert text.start_tokens(Letters()) == [1]
    first, second = docstring_requests(Letters(), (1, 10), 10)
    assert first == ([1, 3 + ord("a"), 3 + ord("b")], 3)
    assert second == ([1], 2)

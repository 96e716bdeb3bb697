"""Every way from text to token ids begins with what the tokenizer puts before a text, once, and ends with nothing of its own."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from assay.workloads.text import (
    calibration_windows,
    encode,
    heldout_windows,
    long_prompt,
    mixed_prompts,
    start_tokens,
    with_start,
)
from assay.workloads.workload import TextWorkload, bundled_workload, quality_windows, read_workload
from tiny import tiny_tokenizer

BOS, EOS = 1, 2  # of the tiny tokenizer
KINDS = ("bare", "bos", "eos", "both", "two", "sentencepiece")


def make(kind):
    """A tokenizer that adds nothing, BOS, EOS, both, two tokens in front; or one as sentencepiece makes them, which adds BOS."""
    if kind == "sentencepiece":
        pieces = ["<unk>", "<s>", "</s>", "▁"] + [chr(code) for code in range(32, 127)] + ["\n", "▁y", "es", "▁a"]
        merges = [("▁", "y"), ("e", "s"), ("▁", "a")]
        backend = Tokenizer(
            models.BPE(
                vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges, unk_token="<unk>", fuse_unk=True
            )
        )
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
        backend.decoder = decoders.Metaspace(prepend_scheme="always")
        backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made = tiny_tokenizer()
    names = {"<|endoftext|>": 0, "<|im_start|>": BOS, "<|im_end|>": EOS}
    template = {
        "bare": None,
        "bos": "<|im_start|> $A",
        "eos": "$A <|im_end|>",
        "both": "<|im_start|> $A <|im_end|>",
        "two": "<|endoftext|> <|im_start|> $A",
    }[kind]
    if template:
        made.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=list(names.items()))
    return made


@pytest.fixture(params=KINDS)
def case(request):
    tokenizer = make(request.param)
    start = {"bare": [], "bos": [BOS], "eos": [], "both": [BOS], "two": [0, BOS], "sentencepiece": [1]}[request.param]
    return tokenizer, start


def once(ids, start, tokenizer):
    """`ids` begin with `start`, hold no special token of it elsewhere, and no end of sequence."""
    rest = ids[len(start) :]
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, *start}
    return ids[: len(start)] == start and not special & set(rest)


def test_what_a_tokenizer_puts_in_front_is_found(case):
    tokenizer, start = case
    assert start_tokens(tokenizer) == start
    assert once(encode(tokenizer, "def f(x): return x"), start, tokenizer)


def test_bundled_text_begins_once(case):
    tokenizer, start = case
    rows = [
        *heldout_windows(tokenizer, window=64, n=3).tolist(),
        *calibration_windows(tokenizer, window=64, n=3).tolist(),
    ]
    rows += long_prompt(tokenizer, 64).tolist() + bundled_workload(tokenizer, 64, n=2).prompts
    for row in rows:
        assert len(row) == 64
        assert once(row, start, tokenizer)


def test_docstrings_as_prompts_begin_once():
    tokenizer = make("both")
    prompts = mixed_prompts(tokenizer, 4)
    assert all(once(prompt, [BOS], tokenizer) for prompt in prompts)
    assert all(6 <= len(prompt) <= 470 for prompt in prompts)


@pytest.fixture
def file(tmp_path):
    lines = [{"prompt": f"Tell me about {i}. " + "word " * 40, "completion": "yes it is. " * 20} for i in range(40)]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_users_own_prompts_begin_once_and_do_not_end(case, file):
    tokenizer, start = case
    work = read_workload(file, tokenizer, context=4096)
    for prompt, completion in zip(work.prompts, work.completions, strict=True):
        assert once(prompt, start, tokenizer)
        assert once(completion, [], tokenizer)


def test_windows_of_the_users_own_text_begin_once(case, file):
    tokenizer, start = case
    work = read_workload(file, tokenizer, context=4096)
    found = quality_windows(work, tokenizer, window=96, n=6)
    assert found.source == "6 windows of 96 tokens of mine.jsonl, the search's half"
    assert found.windows.shape == (6, 96)
    for row in found.windows.tolist():
        assert row[: len(start)] == start
        inner = row[len(start) :]
        assert tokenizer.bos_token_id not in inner
        assert not any(inner[i : i + 2] == [tokenizer.eos_token_id] * 2 for i in range(len(inner)))


def test_prompt_and_completion_joined_are_what_the_model_would_read(case, tmp_path):
    tokenizer, start = case
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"prompt": "is it so?", "completion": " yes"}) + "\n")
    work = read_workload(path, tokenizer, context=4096)
    assert work.prompts[0] + work.completions[0] == encode(tokenizer, "is it so? yes")
    assert tokenizer.decode(work.prompts[0][len(start) :] + work.completions[0]).strip() == "is it so? yes"


def test_a_border_within_a_token_falls_back_to_the_completion_alone(tokenizer, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"prompt": "the sta", "completion": "tement is"}) + "\n")
    work = read_workload(path, tokenizer, context=4096)
    assert tokenizer.decode(work.prompts[0] + work.completions[0]) == "the statement is"
    assert work.prompts[0] == tokenizer("the sta")["input_ids"]


def test_a_text_that_brings_its_own_start_gets_no_second_one(tmp_path):
    tokenizer = make("both")
    assert encode(tokenizer, "<|im_start|>user\nhello")[:2] != [BOS, BOS]
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"prompt": "<|im_start|>user\nhello"}) + "\n")
    prompt = read_workload(path, tokenizer, context=4096).prompts[0]
    assert prompt.count(BOS) == 1
    assert prompt[0] == BOS


def test_a_window_that_would_begin_at_the_users_own_start_token_has_it_once():
    tokenizer = make("bos")
    work = TextWorkload("mine", [[BOS, 5, 6, 7, 8, 9, 10 + i] for i in range(20)], [[11, 12]] * 20, 4)
    for row in quality_windows(work, tokenizer, window=8, n=8).windows.tolist():
        assert row[0] == BOS
        assert row[1] != BOS


def test_with_start_adds_nothing_twice():
    assert with_start([0, 1], [0, 1, 5]) == [0, 1, 5]
    assert with_start([0, 1], [1, 5]) == [0, 1, 1, 5]


def test_a_window_needs_room_behind_the_start_tokens():
    with pytest.raises(ValueError, match="window must be a whole number at least 3, got 2"):
        heldout_windows(make("two"), window=2, n=1)
    with pytest.raises(ValueError, match="window must be a whole number at least 3, got 2"):
        quality_windows(TextWorkload("mine", [[5] * 50], [[]], 4), make("two"), window=2, n=1)

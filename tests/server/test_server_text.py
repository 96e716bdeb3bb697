"""Text and stops piece by piece: what is certain is given at once, and nothing is given that changes."""

from __future__ import annotations

import random

import pytest
from transformers import PreTrainedTokenizerFast

from assay.server.request import STOP_CHARACTERS
from assay.server.text import Stops, Text

# ---- text


def byte_fallback_tokenizer():
    """A SentencePiece-like tokenizer: a few words, and bytes for everything else."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    words = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdeHloW", "▁a", "▁b"]
    backend = Tokenizer(
        models.BPE(
            {word: i for i, word in enumerate(words)},
            [("▁", "a"), ("▁", "b")],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


WORDS = "Hello, wörld! 你好 こんにちは 👩‍👩‍👧 é  two  spaces\n\n\tab a b 🙂🙂 end ab" + "🙂" * 40


@pytest.mark.parametrize("fallback", [False, True])
def test_pieces_of_text_are_the_whole_text(tokenizer, fallback):
    tokenizer = byte_fallback_tokenizer() if fallback else tokenizer
    ids = tokenizer(WORDS, add_special_tokens=False)["input_ids"]
    assert len(ids) > 100
    for start in (0, 1, 5):
        text = Text(tokenizer, ids[:start])
        pieces = [text.add(token) for token in ids[start:]]
        before = tokenizer.decode(ids[:start], skip_special_tokens=True)
        assert before + "".join(pieces) + text.rest() == tokenizer.decode(ids)
        assert not any("\ufffd" in piece for piece in pieces)
        assert len(text.window) < 40


def test_a_space_after_the_prompt_is_kept():
    tokenizer = byte_fallback_tokenizer()
    text = Text(tokenizer, tokenizer("a", add_special_tokens=False)["input_ids"])
    assert text.add(tokenizer.convert_tokens_to_ids("▁b")) == " b"


def test_broken_bytes_are_given_and_cost_no_more_with_length(tokenizer):
    rng = random.Random(0)
    ids = [rng.randrange(3, len(tokenizer)) for _ in range(400)]
    text = Text(tokenizer, [])
    assert "".join(map(text.add, ids)) + text.rest() == tokenizer.decode(ids)
    lone = tokenizer.convert_tokens_to_ids("Ł")  # the byte 0x9f: never a character by itself
    text = Text(tokenizer, [])
    longest, given = 0, 0
    for _ in range(500):
        given += len(text.add(lone))
        longest = max(longest, len(text.window))
    assert (given + len(text.rest()), longest < 40) == (500, True)


@pytest.mark.parametrize("silent", [1, 12])
def test_tokens_without_text_take_no_space_from_the_next(silent):
    """As a model says that is asked to ignore its end token."""
    fallback = byte_fallback_tokenizer()
    word, space = fallback.convert_tokens_to_ids(["b", "▁b"])
    text = Text(fallback, [word])
    said = [text.add(token) for token in [space, *[fallback.eos_token_id] * silent, space, *[word] * 9, space]]
    assert "".join(said) + text.rest() == " b bbbbbbbbbb b"
    assert len(text.window) < 40


# ---- stops


def cut(text, cuts, stops):
    found, ends = Stops(stops), (0, *cuts, len(text))
    said = "".join(found.add(text[a:b]) for a, b in zip(ends, ends[1:], strict=False))
    return said + found.rest(), found.met


@pytest.mark.parametrize("cuts", [(), (1,), (2, 3), (1, 2, 3, 4, 5)])
@pytest.mark.parametrize(
    ("stops", "expected", "met"),
    [
        ((), "abcabd", False),
        (("abd",), "abc", True),
        (("bd", "c"), "ab", True),
        (("x",), "abcabd", False),
        (("bdx",), "abcabd", False),
        (("abdx", "d"), "abcab", True),
        (("abca", "bc"), "a", True),  # the one that is whole first, though the other begins before it
        (("c", "bc"), "a", True),  # whole at once: the longer
        (("abcab", "b"), "a", True),
    ],
)
def test_stops_are_found_however_the_text_is_cut(cuts, stops, expected, met):
    assert cut("abcabd", cuts, stops) == (expected, met)


def test_a_stop_holds_back_no_more_than_itself():
    stops = Stops(("a" * STOP_CHARACTERS,))
    said = "".join(stops.add("a" * 7) for _ in range(100)) + stops.add("b")
    assert said == "a" * 700 + "b"
    assert stops.held == ""

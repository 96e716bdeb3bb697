"""The bytes of tokens, masks over a vocabulary, the chooser, and decoding with a transformers model."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tests.tiny import tiny_model, tiny_tokenizer, token_ids
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from assay.methods.core.generation.loop import plain_generation
from assay.methods.inference.awrs import (
    Chooser,
    DeadEnd,
    Rules,
    TokenBytes,
    both,
    decode,
    end_tokens,
    functions,
    json_schema,
    python,
    regex,
)
from assay.methods.inference.awrs.generation import nucleus

TEXTS = ["def f(x):\n\treturn 'é' # 😀", "  two  spaces ", "\u00a0ĀÿŁ\x00\x7f", '12345 {"a": [true]}', "naïve—“quotes”"]
ANYTHING = functions(lambda text: True, lambda text: True)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(400)


@pytest.fixture(scope="module")
def tokens(tokenizer):
    return TokenBytes(tokenizer)


# ------------------------------------------------------------------------------------------------------------ tokens


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_spell_the_text(tokenizer, tokens, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokens.text(ids) == text.encode()
    assert tokens.text([tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]) == text.encode()
    assert tokens.special == set(tokenizer.all_special_ids)
    assert len(tokens) == len(tokenizer)
    assert tokens.of(10**6) == b""


@pytest.mark.model
def test_tokens_of_smollm2(smollm2):
    tokens = TokenBytes(smollm2.tokenizer)
    for text in TEXTS:
        assert tokens.text(smollm2.tokenizer(text)["input_ids"]) == text.encode()
    assert 17 <= len(tokens.special) <= 40
    assert len(tokens) == 49152


def wrapped(decoder, vocabulary):
    backend = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    backend.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


@pytest.mark.parametrize(
    "decoder",
    [decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]), decoders.Metaspace()],
    ids=["replace", "metaspace"],
)
def test_pieces_of_sentencepiece(decoder):
    tokens = TokenBytes(wrapped(decoder, {"<unk>": 0, "▁the": 1, "<0x0A>": 2, "é": 3, "<0xF0>": 4, "▁▁": 5}))
    assert [tokens.of(i) for i in range(6)] == [b"", b" the", b"\n", "é".encode(), b"\xf0", b"  "]


def test_other_signs_for_the_space():
    vocabulary = {"<unk>": 0, "_a": 1, "▁": 2, "<0xC3>": 3}
    assert TokenBytes(wrapped(decoders.Metaspace(replacement="_"), vocabulary)).pieces == [
        b"",
        b" a",
        "▁".encode(),
        b"\xc3",
    ]
    replaced = decoders.Sequence([decoders.Replace("_", " "), decoders.ByteFallback()])
    assert TokenBytes(wrapped(replaced, vocabulary)).pieces == [b"", b" a", "▁".encode(), b"\xc3"]
    with pytest.raises(ValueError, match="Replace"):
        TokenBytes(wrapped(decoders.Sequence([decoders.Replace("_", "-"), decoders.ByteFallback()]), vocabulary))


def test_characters_of_several_tokens():
    """A vocabulary without é but with its bytes: they are drawn one by one, and no text ends between them."""
    vocabulary = {
        "<unk>": 0,
        "<s>": 1,
        "▁": 2,
        '"': 3,
        "<0xC3>": 4,
        "<0xA9>": 5,
        "<0xA8>": 6,
        '▁"': 7,
        "a": 8,
        "<0xFF>": 9,
    }
    tokens = TokenBytes(
        wrapped(decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]), vocabulary)
    )
    assert tokens.text([3, 4, 5, 3]) == '"é"'.encode()
    for seed in range(20):
        choose = Chooser(json_schema({"type": "string", "minLength": 2, "maxLength": 3}), tokens, [1], seed=seed)
        made = []
        while (token := choose(torch.zeros(len(vocabulary)), made)) != 1:
            made.append(token)
        text = tokens.text(made).decode()
        assert text[0] == text[-1] == '"'
        assert set(text[1:-1]) <= set("éèa ")
        assert 2 <= len(text) - 2 <= 3
    mask = Rules(regex("é|è"), tokens, [1]).mask(0, 12)
    assert np.flatnonzero(mask).tolist() == [4]


def test_added_tokens_spell_themselves():
    tokenizer = tiny_tokenizer(300)
    tokenizer.add_tokens(["<é>"])
    tokens = TokenBytes(tokenizer)
    assert tokens.of(tokenizer.convert_tokens_to_ids("<é>")) == "<é>".encode()


def test_tokenizers_that_are_refused():
    with pytest.raises(ValueError, match="WordPiece"):
        TokenBytes(wrapped(decoders.WordPiece(), {"<unk>": 0}))
    with pytest.raises(TypeError, match="tokenizer"):
        TokenBytes("gpt2")
    with pytest.raises(TypeError, match="pieces"):
        TokenBytes.from_pieces(["a"])
    with pytest.raises(ValueError, match="special"):
        TokenBytes.from_pieces([b"a"], special=[1])


# ------------------------------------------------------------------------------------------------------------- masks

CONSTRAINTS = {
    "regex": (lambda: regex(r"(é|[a-f ]+)\d*"), [b"", b"abc", b"a12", b"\xc3"]),
    "json": (
        lambda: json_schema({"type": "object", "properties": {"the": {"type": "integer"}}}),
        [b"", b'{"the', b'{"a": "x\\', b'{"the":1'],
    ),
    "python": (python, [b"", b"def ", b"x = '"]),
    "both": (lambda: both(regex("[a-z =]*"), python()), [b"", b"x ="]),
}  # fmt: skip


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_a_mask_says_what_testing_each_token_says(tokens, name):
    make, texts = CONSTRAINTS[name]
    ends = [2]
    for text in texts:
        rules = Rules(make(), tokens, ends)
        state = rules.constraint.advance(rules.constraint.start, text)
        plain = make()
        found = rules.mask(state, len(tokens) + 5)
        expected = [bool(tokens.of(t)) and plain.prefix(text + tokens.of(t)) for t in range(len(tokens) + 5)]
        expected[2] = plain.complete(text)
        assert found.tolist() == expected
        assert rules.mask(state, len(tokens) + 5) is found
        assert rules.mask_calls > 0


def test_a_mask_tests_no_token_whose_beginning_is_refused():
    asked = []
    letters = TokenBytes.from_pieces([b"a", b"ab", b"abc", b"b", b"bc", b"bcd", b"a", b""], special=[7])
    rules = Rules(functions(lambda text: asked.append(text) or text == b"a", lambda text: False), letters, [7])
    assert rules.mask(b"", 8).tolist() == [True, False, False, False, False, False, True, False]
    assert asked == [b"a", b"ab", b"b"]


@pytest.mark.parametrize("size", [3, 5, 9])
def test_barred_tokens(size):
    letters = TokenBytes.from_pieces([b"a", b"", b"b", b"", b""], special=[3, 4])
    rules = Rules(regex("[ab]*"), letters, [3, 7])
    expected = [not letters.of(token) and token not in (3, 7) for token in range(size)]
    assert rules.barred(size).tolist() == expected


def test_masks_are_kept_for_states():
    letters = TokenBytes.from_pieces([b"a", b"b", b""], special=[2])
    rules = Rules(regex("[ab]*"), letters, [2])
    first = rules.mask(rules.constraint.advance(0, b"a"), 3)
    calls = rules.mask_calls
    assert rules.mask(rules.constraint.advance(0, b"bab"), 3) is first
    assert rules.mask_calls == calls


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"constraint": "a*"}, TypeError, "constraint"),
        ({"token_bytes": [b"a"]}, TypeError, "token_bytes"),
        ({"ends": []}, ValueError, "ends"),
        ({"ends": [1.5]}, TypeError, "ends"),
        ({"ends": 2}, TypeError, "ends"),
        ({"temperature": -1}, ValueError, "temperature"),
        ({"temperature": math.nan}, ValueError, "temperature"),
        ({"top_p": 0}, ValueError, "top_p"),
        ({"seed": "a"}, TypeError, "seed"),
        ({"rejections_before_mask": -1}, ValueError, "rejections_before_mask"),
    ],
)
def test_a_chooser_names_bad_input(tokens, change, error, named):
    given = {"constraint": regex("a"), "token_bytes": tokens, "ends": [2]} | change
    with pytest.raises(error, match=named):
        Chooser(given.pop("constraint"), given.pop("token_bytes"), given.pop("ends"), **given)


# ----------------------------------------------------------------------------------------------------------- choosing

LETTERS = TokenBytes.from_pieces([b"a", b"b", b"c", b"ab", b"", b""], special=[4, 5])


def test_greedy_takes_the_most_probable_allowed_token():
    logits = torch.randn(400, generator=torch.Generator().manual_seed(0))
    tokens = TokenBytes.from_pieces([b"%d," % i for i in range(399)] + [b""], special=[399])
    for limit in (0, 3, 64):
        choose = Chooser(regex("([0-9]*7,)*"), tokens, [399], temperature=0.0, rejections_before_mask=limit)
        allowed = [i for i in range(399) if i % 10 == 7] + [399]
        assert choose(logits, []) == allowed[int(logits[allowed].argmax())]


@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_the_mask_changes_nothing_but_the_time(top_p):
    tokens = TokenBytes.from_pieces([b"%d," % i for i in range(399)] + [b""], special=[399])
    made = {}
    for limit in (0, 5, 1000):
        choose = Chooser(regex("([0-9]*77,)*"), tokens, [399], top_p=top_p, seed=3, rejections_before_mask=limit)
        generator, made[limit] = torch.Generator().manual_seed(0), []
        for _ in range(12):
            token = choose(3 * torch.randn(400, generator=generator), made[limit])
            if token != 399:
                made[limit].append(token)
        assert (choose.rules.mask_calls > 0) == (limit < 1000)
    assert made[0] == made[5] == made[1000]
    assert set(made[0]) <= {77, 177, 277, 377}


def test_choices_follow_the_distribution():
    logits = torch.tensor([1.0, 0.5, 0.0, 2.0, 0.3, 9.0])
    choose = Chooser(regex("[ab]+"), LETTERS, [4], temperature=2.0)
    seen = [choose(logits, [0]) for _ in range(2000)]
    expected = torch.softmax(logits[[0, 1, 3, 4]] / 2, -1)
    for token, p in zip((0, 1, 3, 4), expected.tolist(), strict=True):
        assert abs(seen.count(token) / 2000 - p) < 4.5 * math.sqrt(p * (1 - p) / 2000)
    assert set(seen) == {0, 1, 3, 4}  # neither the forbidden letter nor the special token


def test_ends_only_where_the_text_is_complete():
    choose = Chooser(regex("ab"), LETTERS, [4, 5], temperature=0.0)
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 9.0, 8.0])
    assert choose(logits, []) == 0
    assert not choose.complete
    assert choose(logits, [0]) == 1
    assert choose(logits, [0, 1]) == 4
    assert choose.complete


def test_the_nucleus_yields_to_the_constraint():
    logits = torch.tensor([5.0, 5.0, -5.0, -6.0, -9.0, -9.0])
    assert Chooser(regex("c|ab"), LETTERS, [4], top_p=0.5)(logits, []) == 0
    assert {Chooser(regex("c"), LETTERS, [4], top_p=0.9, seed=s)(logits, []) for s in range(20)} == {2}
    probabilities = np.array([0.1, 0.5, 0.3, 0.1])
    assert nucleus(probabilities, 0.6).tolist() == [1, 2]
    assert nucleus(probabilities, 0.5).tolist() == [1]
    assert nucleus(probabilities, 1.0).tolist() == [1, 2, 0, 3]


@pytest.mark.parametrize("limit", [0, 64])
def test_a_dead_end_is_named(limit):
    dead = functions(lambda text: text in (b"", b"a"), lambda text: False)
    choose = Chooser(dead, LETTERS, [4], rejections_before_mask=limit)
    logits = torch.zeros(6)
    assert choose(logits, []) == 0
    with pytest.raises(DeadEnd, match="b'a'"):
        choose(logits, [0])
    with pytest.raises(DeadEnd):
        choose(torch.full((6,), -math.inf), [])


def test_made_may_jump():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5, 0.0])
    choose = Chooser(regex("(ab|c)*"), LETTERS, [4], temperature=0.0)
    assert choose(logits, [0, 1, 2]) == 2
    assert choose(logits, [0]) == 1  # another text
    assert choose(logits, [0]) == 1  # the same again
    with pytest.raises(ValueError, match="allowed"):
        choose(logits, [1])
    assert choose(logits, []) == 2


def test_a_chooser_needs_few_evaluations():
    """Behind a model that knows what is wanted: one evaluation a token; and known text is not read again."""
    read = []
    constraint = functions(lambda text: read.append(text) or True, lambda text: len(text) > 5)
    choose = Chooser(constraint, LETTERS, [4])
    made = []
    for _ in range(6):
        made.append(choose(torch.tensor([9.0, 0, 0, 0, 0, 0]), made))
    assert choose.calls == len(read)
    assert choose.calls <= 10


@pytest.mark.parametrize("logits", [torch.tensor([0.0, math.nan]), torch.zeros(2, 2), torch.tensor([math.inf, 0.0])])
def test_logits_are_checked(logits):
    with pytest.raises(ValueError, match="logits"):
        Chooser(regex("a"), LETTERS, [4])(logits, [])


def test_logits_are_left_alone():
    logits = torch.randn(6, dtype=torch.float64)
    before = logits.clone()
    Chooser(regex("a"), LETTERS, [4])(logits, [])
    assert torch.equal(before, logits)


# ------------------------------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2"])
def test_without_a_constraint_decoding_equals_generate(kind):
    model = tiny_model(kind, sliding_window=8) if kind == "Mistral" else tiny_model(kind)
    ids = token_ids(1, 11)
    with plain_generation(model):
        expected = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=[96], pad_token_id=0)
    letters = TokenBytes.from_pieces([b"%d " % i for i in range(96)] + [b""], special=[96])
    choose = Chooser(ANYTHING, letters, [96], temperature=0.0)
    found = decode(model, ids[0].tolist(), choose, max_new_tokens=12, ends=[96])
    stopped = expected[0, 11:].tolist()
    assert found.tokens == (stopped[:-1] if 96 in stopped else stopped)
    assert found.finish == ("stop" if 96 in stopped else "length")


def test_a_limit_is_reported_and_finishing_not_forced(tokenizer, tokens):
    model = tiny_model(vocab_size=len(tokenizer))
    choose = Chooser(regex("[a-z]{50}"), tokens, [tokenizer.eos_token_id], seed=1)
    found = decode(model, [5, 6], choose, max_new_tokens=4, ends=[tokenizer.eos_token_id])
    assert (len(found.tokens), found.finish) == (4, "length")
    assert not choose.rules.constraint.complete(tokens.text(found.tokens))


@pytest.mark.parametrize("name", ["regex", "json"])
def test_a_random_model_writes_what_is_allowed(tokenizer, tokens, name):
    """A model that knows nothing: nearly everything is refused, so masks are made."""
    constraint = {
        "regex": lambda: regex(r"\d{3}-\d{2}"),
        "json": lambda: json_schema({"anyOf": [{"enum": ["x", {"a": [1]}]}, {"type": "string", "minLength": 2, "maxLength": 9}]}),
    }[name]()  # fmt: skip
    model = tiny_model(vocab_size=len(tokenizer))
    choose = Chooser(constraint, tokens, [tokenizer.eos_token_id], temperature=1.0)
    found = decode(model, [7], choose, max_new_tokens=120, ends=[tokenizer.eos_token_id])
    assert choose.rules.mask_calls > 0
    assert found.finish == "stop"
    assert constraint.complete(tokens.text(found.tokens))


def test_decoding_names_bad_input(tokenizer):
    model = tiny_model()
    with pytest.raises(ValueError, match="prompt"):
        decode(model, [], lambda logits, made: 1, max_new_tokens=2, ends=[1])
    with pytest.raises(ValueError, match="max_new_tokens"):
        decode(model, [1], lambda logits, made: 1, max_new_tokens=0, ends=[1])
    with pytest.raises(ValueError, match="continue"):
        decode(torch.nn.Linear(2, 2), [1], lambda logits, made: 1, max_new_tokens=1, ends=[1])


def test_end_tokens(tokenizer):
    model = tiny_model()
    assert end_tokens(model, tokenizer) == {tokenizer.eos_token_id}
    model.generation_config.eos_token_id = [3, 4]
    assert end_tokens(model, tokenizer) == {3, 4, tokenizer.eos_token_id}
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="ends"):
        end_tokens(model, None)

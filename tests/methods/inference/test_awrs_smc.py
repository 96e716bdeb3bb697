"""The particle filter: its estimate against an exact sum, what resampling does, and particles of transformers models."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pytest
import torch
from tests.tiny import tiny_model, tiny_tokenizer

from assay.methods.inference.awrs import (
    ModelRows,
    Rules,
    TokenBytes,
    functions,
    generate_constrained,
    json_schema,
    regex,
    smc,
)
from assay.methods.inference.awrs.smc import effective_number, normalised, resampled_indices

LETTERS = TokenBytes.from_pieces([b"a", b"b", b"", b""], special=[2, 3])
END, SPECIAL = 2, 3
LENGTH = 3


CHANCE = np.random.default_rng(0)
LOGITS = {
    "".join(one): torch.tensor(CHANCE.standard_normal(4) * 1.5)
    for n in range(LENGTH + 1)
    for one in itertools.product("ab", repeat=n)
}


class Table:
    """A language model over a, b and the end: random logits for every text, kept by the rows' texts."""

    table = LOGITS

    def __init__(self):
        self.texts = [""]
        self.computed = []

    @property
    def logits(self):
        return torch.stack([self.table[text] for text in self.texts])

    def advance(self, parents, tokens):
        self.texts = [self.texts[row] + "ab"[token] for row, token in zip(parents, tokens, strict=True)]
        self.computed.append(list(self.texts))

    def probability(self, text, temperature=1.0):
        """Of writing `text` and then ending."""
        total = 1.0
        for n in range(len(text) + 1):
            p = torch.softmax(self.table[text[:n]] / temperature, -1)
            total *= float(p["ab".index(text[n])] if n < len(text) else p[END])
        return total


ALLOWED = ("b", "ab", "aab", "bba", "abb")
CONSTRAINT = functions(
    lambda text: any(one.startswith(text.decode()) for one in ALLOWED), lambda text: text.decode() in ALLOWED
)


def run(seed, **options):
    rules = Rules(CONSTRAINT, LETTERS, [END])
    return smc(Table(), rules, np.random.default_rng(seed), **({"particles": 3, "max_new_tokens": LENGTH} | options))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"variant": "recursive", "resampling": "systematic"},
        {"variant": "geometric", "ess_threshold": 1.0},
        {"variant": "masking"},
        {"variant": "twisted", "particles": 5, "ess_threshold": 0.9},
        {"variant": "recursive", "max_rejections": 1},
        {"ess_threshold": 0.0, "particles": 1, "temperature": 0.7},
    ],
    ids=str,
)
def test_the_marginal_likelihood_is_unbiased(options):
    model = Table()
    exact = {text: model.probability(text, options.get("temperature", 1.0)) for text in ALLOWED}
    runs = [run(seed, **options) for seed in range(300)]
    seen = np.exp([one.log_marginal for one in runs])
    assert abs(seen.mean() - sum(exact.values())) < 4 * seen.std() / math.sqrt(len(runs))
    for text, probability in exact.items():  # and so is what each text gets
        shares = [
            np.mean([math.exp(s.log_weight) if s.text.decode() == text else 0.0 for s in one.sequences]) for one in runs
        ]
        assert abs(np.mean(shares) - probability) < 4.5 * np.std(shares) / math.sqrt(len(runs))


def test_an_estimate_without_the_weight_of_the_forced_end_is_biased():
    """The limit's end token has a probability; a check that the test above could fail."""
    model = Table()
    free = sum(model.probability(text) / float(torch.softmax(model.table[text], -1)[END]) if len(text) == LENGTH else
               model.probability(text) for text in ALLOWED)  # fmt: skip
    seen = np.exp([run(seed, variant="masking").log_marginal for seed in range(300)])
    assert abs(seen.mean() - free) > 6 * seen.std() / math.sqrt(300)


def test_a_critic_multiplies_the_weights():
    model = Table()
    scores = {b"b": 0.5, b"ab": -1.0, b"aab": 1.0, b"bba": 0.0, b"abb": -math.inf}

    def critic(text):
        return scores.get(text, 0.1 * len(text))

    exact = sum(math.exp(scores[text.encode()]) * model.probability(text) for text in ALLOWED)
    # a text that the critic forbids is never passed through either, and here none of the others leads through it
    seen = np.exp([run(seed, critic=critic, variant="masking").log_marginal for seed in range(300)])
    assert abs(seen.mean() - exact) < 4 * seen.std() / math.sqrt(300)
    nothing = run(0, critic=lambda text: -math.inf)
    assert nothing.log_marginal == -math.inf
    assert nothing.steps == 0
    with pytest.raises(TypeError, match="critic"):
        run(0, critic=lambda text: "good")


def test_sequences_are_complete_or_dead():
    for seed in range(30):
        found = run(seed)
        for one in found.sequences:
            assert LETTERS.text(one.tokens) == one.text
            assert (one.finish == "dead") == (one.log_weight == -math.inf)
            assert one.finish == "dead" or one.text.decode() in ALLOWED
            assert one.finish != "length" or len(one.tokens) == LENGTH
        assert 0 <= found.effective <= 3 + 1e-9
        assert found.weights.sum() == pytest.approx(1)
        assert found.best.log_weight > -math.inf
        assert found.calls > 0


def test_a_weight_that_no_float_holds_is_dead():
    """Behind e^800 draws with replacement the end is drawn, but its weight is zero: the particle has not stopped, it is dead."""

    class Sure:
        logits = torch.tensor([[0.0, -math.inf, -800.0, -math.inf]], dtype=torch.float64)

    rules = Rules(functions(lambda text: False, lambda text: True), LETTERS, [END])
    found = smc(Sure(), rules, np.random.default_rng(0), particles=2, max_new_tokens=3, variant="geometric")
    assert {(one.finish, one.log_weight) for one in found.sequences} == {("dead", -math.inf)}


def test_nothing_is_left_where_nothing_is_allowed():
    rules = Rules(functions(lambda text: len(text) < 2, lambda text: False), LETTERS, [END])
    found = smc(Table(), rules, np.random.default_rng(0), particles=4, max_new_tokens=3)
    assert found.log_marginal == -math.inf
    assert {one.finish for one in found.sequences} == {"dead"}
    assert found.best is None
    assert found.effective == 0
    assert not found.weights.any()


def test_equal_histories_share_a_row_and_the_finished_have_none():
    model = Table()
    rules = Rules(CONSTRAINT, LETTERS, [END])
    found = smc(model, rules, np.random.default_rng(1), particles=40, max_new_tokens=3)
    assert all(len(set(texts)) == len(texts) for texts in model.computed)
    assert all(text in ("a", "b", "aa", "ab", "bb") or len(text) == 3 for texts in model.computed for text in texts)
    assert found.rows == 1 + sum(map(len, model.computed))
    assert found.steps == len(model.computed)


def test_evaluations_are_shared_by_particles_in_the_same_state():
    asked = []
    constraint = functions(lambda text: asked.append(text) or CONSTRAINT.prefix(text), CONSTRAINT.complete)
    found = smc(Table(), Rules(constraint, LETTERS, [END]), np.random.default_rng(0), particles=30, max_new_tokens=3)
    assert len(asked) == len(set(asked)) <= found.calls


@pytest.mark.parametrize("method", ["multinomial", "systematic"])
def test_resampling_keeps_shares_in_the_mean(method):
    weights = np.array([0.5, 0.0, 0.3, 0.2])
    rng = np.random.default_rng(0)
    counts = np.zeros(4)
    for _ in range(1500):
        chosen = resampled_indices(weights, rng, method)
        assert len(chosen) == 4
        if method == "systematic":
            assert all(abs(chosen.count(i) - 4 * w) < 1 for i, w in enumerate(weights))
        counts += np.bincount(chosen, minlength=4)
    assert counts[1] == 0
    assert np.abs(counts / 6000 - weights).max() < 0.03


def test_the_effective_number():
    assert effective_number(np.log([0.25] * 4)) == pytest.approx(4)
    assert effective_number(np.array([-2000.0, -np.inf])) == pytest.approx(1)
    assert effective_number(np.array([-np.inf])) == 0
    assert normalised(np.array([-2000.0, -2000.0])) == pytest.approx([0.5, 0.5])


def test_resampling_happens_below_the_threshold_only():
    assert run(0, ess_threshold=0.0).resampled == 0
    assert any(run(seed, ess_threshold=1.0).resampled for seed in range(5))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"particles": 0}, ValueError),
        ({"particles": 2.5}, TypeError),
        ({"max_new_tokens": 0}, ValueError),
        ({"ess_threshold": 1.5}, ValueError),
        ({"temperature": 0}, ValueError),
        ({"variant": "fast"}, ValueError),
        ({"resampling": "residual"}, ValueError),
        ({"accepts": 1}, ValueError),
        ({"max_rejections": 4}, ValueError),
    ],
)
def test_bad_input_is_named(change, error):
    with pytest.raises(error, match=next(iter(change))):
        run(0, **change)


# ------------------------------------------------------------------------------------------------------- real models


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(320)


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "GPTNeoX"])
def test_rows_part_and_go_as_sequences_of_their_own(kind):
    options = {"sliding_window": 6} if kind == "Mistral" else {}
    model = tiny_model(kind, **options)
    prompt = [5, 9, 2, 7, 11, 3, 8]
    rows = ModelRows(model, prompt)
    texts = [prompt]
    for parents, tokens in (
        [[0, 0, 0], [4, 5, 6]],
        [[2, 0], [7, 8]],
        [[1, 1, 0], [9, 4, 5]],
        [[0, 1, 2], [1, 2, 3]],
        [[1], [1]],
    ):
        rows.advance(parents, tokens)
        texts = [[*texts[row], token] for row, token in zip(parents, tokens, strict=True)]
        with torch.no_grad():
            expected = torch.cat([model(torch.tensor([text])).logits[:, -1] for text in texts])
        torch.testing.assert_close(rows.logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variant", ["paper", "as_released", "twisted"])
def test_particles_of_a_transformers_model(tokenizer, variant):
    model = tiny_model(vocab_size=len(tokenizer), initializer_range=0.05)
    pattern = "[a-m ]{1,9}"
    options = {"max_new_tokens": 5, "particles": 4, "variant": variant, "seed": 3}
    found = generate_constrained(model, tokenizer, "the end", regex(pattern), **options)
    assert len(found.sequences) == 4
    for one in found.sequences:
        assert one.finish == "dead" or re.fullmatch(pattern, one.text.decode())
    again = generate_constrained(model, tokenizer, tokenizer("the end")["input_ids"], regex(pattern), **options)
    assert again == found


def test_the_weight_of_one_particle_is_exact_under_masking(tokenizer):
    """With masking nothing is estimated but which text: the weight is the product of the allowed masses along it."""
    model = tiny_model(vocab_size=len(tokenizer), initializer_range=0.05)
    tokens = TokenBytes(tokenizer)
    end = tokenizer.eos_token_id
    found = generate_constrained(
        model, tokenizer, [7, 8], regex("[ab]{2}"), max_new_tokens=4, particles=1, variant="masking", token_bytes=tokens
    )
    text, total = b"", 0.0
    for n, token in enumerate([*found.sequences[0].tokens, end]):
        ids = torch.tensor([[7, 8, *found.sequences[0].tokens[:n]]])
        with torch.no_grad():
            p = torch.softmax(model(ids).logits[0, -1].double(), -1)
        plain = regex("[ab]{2}")
        allowed = [t for t in range(len(tokens)) if tokens.of(t) and plain.prefix(text + tokens.of(t))]
        allowed += [end] if plain.complete(text) else []
        assert token in allowed
        total += math.log(float(p[allowed].sum()))
        text += tokens.of(token)
    assert found.log_marginal == pytest.approx(total, abs=1e-5)


def test_generation_names_bad_input(tokenizer):
    model = tiny_model(vocab_size=len(tokenizer))
    for change, error, named in (
        ({"prompt": []}, ValueError, "prompt"),
        ({"constraint": "a*"}, TypeError, "constraint"),
        ({"seed": -1}, ValueError, "seed"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens"),
        ({"ends": []}, ValueError, "ends"),
    ):
        given = {"prompt": "a", "constraint": regex("a"), "max_new_tokens": 2} | change
        with pytest.raises(error, match=named):
            generate_constrained(model, tokenizer, given.pop("prompt"), given.pop("constraint"), **given)


@pytest.mark.slow
@pytest.mark.model
def test_smollm2_writes_json(smollm2):
    prompt = smollm2.tokenizer.apply_chat_template(
        [{"role": "user", "content": 'Describe a cat as JSON, like {"name": "Rex", "legs": 4}. Answer with the JSON object only.'}],
        tokenize=False, add_generation_prompt=True,
    )  # fmt: skip
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 20},
            "legs": {"type": "integer", "minimum": 0, "maximum": 9},
        },
        "required": ["name", "legs"],
        "additionalProperties": False,
    }
    found = generate_constrained(
        smollm2.model, smollm2.tokenizer, prompt, json_schema(schema), max_new_tokens=40, seed=0
    )
    complete = [one for one in found.sequences if one.finish != "dead"]
    assert complete
    assert all(json_schema(schema).complete(one.text) for one in complete)
    assert found.calls < 40 * 5 * 200  # a mask tests 49,152 a token

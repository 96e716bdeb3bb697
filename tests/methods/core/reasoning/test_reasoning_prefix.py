"""Prompts that begin alike: their common part is read once, and their samples are the same."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from assay.methods.core.reasoning.generator import Sampling, TransformersGenerator
from assay.methods.core.reasoning.prefix import PrefixGenerator, shared_tokens

WORDS = "abcdefgh12 =\n"


class Letters:
    """A tokenizer of single characters."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [WORDS.index(letter) for letter in text]}

    def decode(self, tokens):
        return "".join(WORDS[token] for token in tokens)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=len(WORDS), **sizes, max_position_embeddings=96, eos_token_id=None, pad_token_id=None
    )
    made = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        made.lm_head.weight.mul_(20)
    return made


@pytest.fixture
def seen(model, monkeypatch):
    """How many tokens the model reads at each call."""
    found, forward = [], model.forward

    def counted(*given, input_ids, **rest):
        found.append(tuple(input_ids.shape))
        return forward(*given, input_ids=input_ids, **rest)

    monkeypatch.setattr(model, "forward", counted)
    return found


SHARED = "abc 12 = ab\nabd 21 = ba\n"
SAMPLING = Sampling(temperature=0.9, max_new_tokens=6, stop=("\n",))


@pytest.mark.parametrize("sampling", [SAMPLING, replace(SAMPLING, temperature=0.0)])
@pytest.mark.parametrize(
    "prompts",
    [
        [SHARED + "a 1 =", SHARED + "b 2 2 2 =", SHARED + "c="],
        [SHARED + "a 1 =", SHARED],  # one is the beginning of the other
        [SHARED, SHARED],
        ["a =", "b ="],
        [SHARED + "c ="],
    ],
)
def test_samples_are_those_of_prompts_read_whole(model, prompts, sampling):
    whole = TransformersGenerator(model, Letters(), name="tiny")(prompts, sampling, n=3, seed=2)
    parted = PrefixGenerator(model, Letters(), name="tiny")(prompts, sampling, n=3, seed=2)
    for one, other in zip(whole, parted, strict=True):
        for a, b in zip(one, other, strict=True):
            assert (a.text, a.tokens, a.ended) == (b.text, b.tokens, b.ended)
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
            assert replace(a.spent, seconds=0) == replace(b.spent, seconds=0)  # charged whole


def test_what_is_shared_is_read_once(model, seen):
    prompts = [SHARED + "a 1 =", SHARED + "b 2 2 2 =", SHARED + "c="]
    PrefixGenerator(model, Letters(), name="tiny")(prompts, replace(SAMPLING, max_new_tokens=1))
    assert seen == [(1, len(SHARED)), (3, len("b 2 2 2 ="))]
    seen.clear()
    PrefixGenerator(model, Letters(), name="tiny")(["ab =", "ac ="], replace(SAMPLING, max_new_tokens=1))
    assert seen == [(2, 4)]


def test_a_token_of_each_prompt_is_left():
    assert shared_tokens([[1, 2, 3]] * 3) == 2
    assert shared_tokens([[1, 2, 3], [1, 2]]) == 1
    assert shared_tokens([[4], [5, 6]]) == 0

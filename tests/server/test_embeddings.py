"""/v1/embeddings: the mean of the last hidden states, through OpenAI's own client and for every architecture."""

from __future__ import annotations

from types import SimpleNamespace

import openai
import pytest
import torch
from clients import answer, eventually
from tests.properties.architectures import CAUSAL, build
from torch import nn

from assay.methods.attention import xattention
from assay.methods.core.attention.integration import set_attention
from assay.server.embeddings import MOST_TOKENS, embed, passes, why_alike, why_no_embeddings
from tiny import tiny_model


def expected(model, ids):
    """By another way: what the head is given."""
    seen = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda head, given: seen.append(given[0]))
    try:
        with torch.inference_mode():
            model(torch.tensor([ids]))
    finally:
        handle.remove()
    return seen[0][0].float().mean(0)


@pytest.mark.parametrize("name", CAUSAL)
def test_the_mean_of_what_the_head_reads(name):
    model = build(name).eval()
    ids = [5, 6, 7, 8, 9, 10, 11]
    found = torch.tensor(embed(model, [ids])[0])
    assert torch.allclose(found, expected(model, ids), atol=1e-5)
    assert why_no_embeddings(model) == ""


@pytest.mark.parametrize("name", CAUSAL)
def test_texts_that_share_a_pass_are_what_they_are_alone(name):
    model = build(name).eval()
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(3, 160, (n,), generator=generator).tolist() for n in (40, 1, 7, 23, 7)]
    alone = [embed(model, [ids])[0] for ids in texts]
    alike = bool(why_alike(model))
    for group in passes(list(map(len, texts)), alike=alike):
        for i, vector in zip(group, embed(model, [texts[i] for i in group]), strict=True):
            assert vector == pytest.approx(alone[i], abs=1e-4)
    if not alike:
        for one, vector in zip(alone, embed(model, texts), strict=True):
            assert vector == pytest.approx(one, abs=1e-4)
    assert not alike or name == "mamba"


def test_texts_of_other_lengths_stay_apart_where_that_matters():
    sparse = tiny_model()
    xattention.register()
    set_attention(sparse, xattention.NAME)
    assert "looks at the prompt as a whole" in why_alike(sparse)
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    assert "changes with the length" in why_alike(tiny_model(rope_parameters=rope))

    class Looks(type(tiny_model())):
        """Sees the whole width of a pass, as no causal model does."""

        @property
        def base_model(self):
            return lambda input_ids, **given: SimpleNamespace(
                last_hidden_state=torch.full((*input_ids.shape, 4), float(input_ids.shape[1]))
            )

    looking = tiny_model()
    looking.__class__ = Looks
    assert "computes otherwise where a text is padded" in why_alike(looking)


def test_passes():
    lengths = [3, 900, 4, 5000, 900, 3]
    for alike in (False, True):
        groups = passes(lengths, alike=alike)
        assert sorted(i for group in groups for i in group) == list(range(6))
        for group in groups:
            width = max(lengths[i] for i in group)
            assert len(group) == 1 or width * len(group) <= MOST_TOKENS
            assert not alike or len({lengths[i] for i in group}) == 1
    assert passes([1] * 10_000) == [list(range(first, min(first + MOST_TOKENS, 10_000))) for first in (0, 4096, 8192)]


def test_a_model_without_a_body_gives_none():
    assert "Linear" in why_no_embeddings(nn.Linear(2, 2))


def test_through_the_client(api, model, tokenizer):
    texts = ["Hello", "statement and expression"]
    made = api.embeddings.create(model="tiny", input=texts)  # as base64, the client's own wish
    assert [one.index for one in made.data] == [0, 1]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    assert made.usage.prompt_tokens == sum(map(len, ids))
    for one, tokens in zip(made.data, ids, strict=True):
        assert one.embedding == pytest.approx(expected(model, tokens).tolist(), abs=1e-5)
    floats = api.embeddings.create(model="tiny", input=ids, encoding_format="float")
    assert floats.data[1].embedding == pytest.approx(made.data[1].embedding, abs=1e-7)
    assert len(api.embeddings.create(model="tiny", input=ids[0]).data) == 1
    assert "mean" in api.models.retrieve("tiny").embeddings


def test_many_texts_take_few_passes(api, model, monkeypatch):
    sizes, forward = [], type(model.base_model).forward

    def counted(self, input_ids, **given):
        sizes.append(tuple(input_ids.shape))
        return forward(self, input_ids=input_ids, **given)

    monkeypatch.setattr(type(model.base_model), "forward", counted)
    texts = [[5 + i] * (10 + i % 5) for i in range(100)]
    made = api.embeddings.create(model="tiny", input=texts)
    assert [one.index for one in made.data] == list(range(100))
    assert len(sizes) <= 4  # two of them look whether padding matters
    for i in (0, 37, 99):
        assert made.data[i].embedding == pytest.approx(expected(model, texts[i]).tolist(), abs=1e-5)


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_numbers_that_are_not_finite_are_no_embedding(api, model, monkeypatch, encoding):
    from assay.server import app

    monkeypatch.setattr(app, "embed", lambda model, texts: [[0.0] if ids == [5] else [float("nan")] for ids in texts])
    with pytest.raises(openai.InternalServerError) as caught:
        api.embeddings.create(model="tiny", input=[[5], [6]], encoding_format=encoding)
    assert (caught.value.code, "input[1]" in caught.value.message) == ("not_finite", True)


def test_what_is_refused(api):
    for given, param in (
        ({"input": "x", "dimensions": 8}, "dimensions"),
        ({"input": [5] * 3000}, "input"),
        ({"input": [99_999]}, "input"),
        ({"input": ["x", ""]}, "input"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            api.embeddings.create(model="tiny", **given)
        assert caught.value.param == param


def test_it_ends_between_two_passes_when_the_client_has_left(serving, model, monkeypatch):
    from assay.server import app, embeddings

    begun = []

    def slow(model, texts):
        import time

        begun.append(texts)
        time.sleep(0.05)
        return [[0.0]] * len(texts)

    monkeypatch.setattr(embeddings, "MOST_TOKENS", 1)  # a pass for each
    monkeypatch.setattr(app, "embed", slow)
    server = serving()
    connection = server.send({"input": ["x"] * 200}, path="/v1/embeddings")
    assert eventually(lambda: len(begun) > 2)
    connection.close()
    assert server.idle()
    assert len(begun) < 100
    assert answer(server.send({"input": "x"}, path="/v1/embeddings"))[0] == 200

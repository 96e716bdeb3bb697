"""/v1/embeddings: the mean of the last hidden states, through OpenAI's own client and for every architecture."""

from __future__ import annotations

import openai
import pytest
import torch
from clients import answer, eventually
from tests.properties.architectures import CAUSAL, build
from torch import nn

from assay.server.embeddings import embed, why_no_embeddings


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
    found = torch.tensor(embed(model, ids))
    assert torch.allclose(found, expected(model, ids), atol=1e-5)
    assert why_no_embeddings(model) == ""


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


def test_it_ends_between_two_texts_when_the_client_has_left(serving, model, monkeypatch):
    from assay.server import app

    begun = []

    def slow(model, ids):
        import time

        begun.append(ids)
        time.sleep(0.05)
        return [0.0]

    monkeypatch.setattr(app, "embed", slow)
    server = serving()
    connection = server.send({"input": ["x"] * 200}, path="/v1/embeddings")
    assert eventually(lambda: len(begun) > 2)
    connection.close()
    assert server.idle()
    assert len(begun) < 100
    assert answer(server.send({"input": "x"}, path="/v1/embeddings"))[0] == 200

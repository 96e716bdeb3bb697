"""Plans as attention processors of diffusers' own transformers: tiny ones with random weights."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from tests.properties.video_models import MODELS, hunyuan, real_words, wan
from torch import nn

from assay.methods.attention.xattention import xattention_plan
from assay.methods.core.attention.diffusers_processor import Processor, self_attentions, set_attention, use_plans
from assay.methods.core.attention.plan import AttentionPlan

TOKENS = 48  # of video


def dense_plan(module, q, k, *, causal, scale, key_start, window):
    return AttentionPlan(q.shape[2], k.shape[2], causal=causal, key_start=key_start), {}


def everything(module, q, k, *, causal, scale, key_start, window):
    """All blocks of a mask: the block-sparse path with nothing left out."""
    blocks = -(-k.shape[2] // 16)
    mask = torch.ones(*q.shape[:2], blocks, blocks, dtype=torch.bool)
    return AttentionPlan(q.shape[2], k.shape[2], 16, causal, mask, key_start), {}


def near(module, q, k, *, causal, scale, key_start, window):
    """The blocks beside the diagonal."""
    blocks = torch.arange(-(-k.shape[2] // 16))
    mask = ((blocks[:, None] - blocks).abs() <= 1).expand(*q.shape[:2], -1, -1)
    return AttentionPlan(q.shape[2], k.shape[2], 16, causal, mask, key_start), {"backend": "gather"}


def of_xattention(module, q, k, *, causal, scale, key_start, window):
    options = {"tau": 0.5, "stride": 4, "block": 16, "causal": causal, "scale": scale, "key_start": key_start}
    return xattention_plan(q, k, **options), {}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("producer", [dense_plan, everything])
def test_plans_that_leave_nothing_out_change_nothing(name, producer):
    model, given = MODELS[name]()
    expected = model(**given).sample
    use_plans(model, producer)
    torch.testing.assert_close(model(**given).sample, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("producer", [near, of_xattention])
def test_sparse_plans_are_computed_and_nothing_else_is(producer):
    """In a model of one layer: what its attention gives is the plan's attention of its own q, k and v, token by token."""
    model, given = wan(layers=1)
    dense = model(**given).sample
    plans, seen = [], []

    def noted(module, q, k, **options):
        plans.append(producer(module, q, k, **options)[0])
        return plans[-1], producer(module, q, k, **options)[1]

    def masked(module, q, k, v, *, mask, causal, scale, text):
        assert (mask, causal, text) == (None, False, 0)
        seen.append(plans[-1].visible(0, TOKENS))
        return nn.functional.scaled_dot_product_attention(q, k, v, seen[-1], scale=scale)

    use_plans(model, noted)
    found = model(**given).sample
    assert 0 < plans[0].density() < 1
    assert (found - dense).abs().max() > 1e-3
    set_attention(model, [masked])  # replaces the plans, by the same mask over every score
    torch.testing.assert_close(model(**given).sample, found, atol=2e-5, rtol=2e-5)
    assert len(seen) == 1


def test_padding_of_prompts_is_left_out_where_rows_agree():
    model, given = hunyuan()
    lengths = []

    def noted(module, q, k, **options):
        lengths.append(q.shape[2])
        return dense_plan(module, q, k, **options)

    expected = model(**given).sample
    use_plans(model, noted)
    torch.testing.assert_close(model(**given).sample, expected, atol=2e-5, rtol=2e-5)
    assert lengths == []  # rows with other padding: dense under the mask
    one = {name: x[:1] for name, x in given.items()}
    torch.testing.assert_close(model(**one).sample, expected[:1], atol=2e-5, rtol=2e-5)
    assert lengths == [TOKENS + 4] * 3  # four real words, in each of three blocks
    lengths.clear()
    one["encoder_attention_mask"] = torch.ones_like(real_words()[:1])
    model(**one)
    assert lengths == [TOKENS + 7] * 3


@pytest.mark.parametrize("name", MODELS)
def test_only_self_attentions_of_blocks_are_replaced_and_the_old_ones_come_back(name):
    model, given = MODELS[name]()
    if name == "hunyuan":
        given["encoder_attention_mask"] = torch.ones_like(real_words())
    expected, before = model(**given).sample, dict(model.attn_processors)
    use_plans(model, near)
    use_plans(model, near)  # again: not one around the other
    names = self_attentions(model)
    assert len(names) == (3 if name == "hunyuan" else 2)
    for key, processor in model.attn_processors.items():
        assert isinstance(processor, Processor) == (key in names)
        assert (processor.inner if key in names else processor) is before[key]
        assert (key in names) == ("attn2" not in key and "refiner" not in key)
    assert not torch.allclose(model(**given).sample, expected, atol=1e-4)
    model.set_attn_processor(before)
    assert torch.equal(model(**given).sample, expected)


def test_text_is_counted():
    for name, text in (("wan", 0), ("hunyuan", 7), ("cogvideox", 7)):
        model, given = MODELS[name]()
        counted = []

        def attend(module, q, k, v, *, mask, causal, scale, text, counted=counted):
            counted.append((q.shape[2] - text, text))
            return nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale)

        set_attention(model, [attend] * len(self_attentions(model)))
        model(**given)
        assert counted == [(TOKENS, text)] * len(self_attentions(model))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_another_backend_of_diffusers_is_refused_instead_of_ignored():
    model, given = wan()
    use_plans(model, dense_plan)
    with (
        attention_backend("flex"),
        pytest.raises(ValueError, match="WanAttnProcessor computed no self-attention by torch's scaled_dot_product"),
    ):
        model(**given)
    model(**given)


def test_gradients_and_dropout():
    model, given = wan()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    wanted = [name for name, _ in model.named_parameters() if "attn1.to_" in name]

    def gradients():
        model.zero_grad()
        model(**given).sample.square().sum().backward()
        return [model.get_parameter(name).grad.clone() for name in wanted]

    expected = gradients()
    use_plans(model, everything)
    torch.testing.assert_close(gradients(), expected, atol=1e-3, rtol=1e-4)

    def never(*args, **kwargs):
        raise AssertionError

    class WithDropout:
        def __call__(self, attn, hidden_states):
            x = hidden_states[:, None]
            return nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=1.0)

    out = Processor(WithDropout(), never)(None, torch.randn(1, 5, 8))
    assert not out.any()  # everything dropped, by torch's own attention


def test_bad_models_are_refused():
    for model in (nn.Linear(2, 2), nn.Sequential()):
        for call in (lambda m=model: use_plans(m, dense_plan), lambda m=model: self_attentions(m)):
            with pytest.raises(ValueError, match="model must have attn_processors like 'blocks.N.attn1.processor'"):
                call()
    with pytest.raises(ValueError, match="attends must be 2 functions, one for each self-attention, got 1"):
        set_attention(wan()[0], [dense_plan])

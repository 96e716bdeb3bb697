"""Every registered mixer in the language model, with all that generation does to it; and every option of ours does something."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from transformers import AutoModelForCausalLM

from assay.methods.core.mixers.model import MixerConfig, MixerForCausalLM, make_mixer
from assay.methods.core.mixers.protocol import MIXERS
from assay.methods.mixers.long_convs import LongConv, LongKernel

with pytest.raises(ValueError, match="nothing"):
    make_mixer("nothing", 8)  # now all rooms are imported, and have registered their mixers

SMALL = {
    "attention": {"heads": 2},
    "based": {"heads": 2, "feature_dim": 4},
    "based_window": {"heads": 2, "window": 8},
    "baseconv": {},
    "long_conv": {"length": 40, "init": "double_exponential"},
    "long_conv_h3": {"length": 40, "init": "double_exponential"},
    "mamba": {"states": 4},
    "mamba2": {"states": 4, "head_dim": 8},
    "memory_attention": {"heads": 2, "bits": 4},
    "mlgru": {},
    "positional": {"heads": 2, "positions": 40},
    "s4d": {"states": 4},
}
GREEDY = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1}


def small(name):
    torch.manual_seed(0)
    layers = [[name, SMALL.get(name, {})]] * 2
    model = MixerForCausalLM(MixerConfig(vocab_size=32, hidden_size=16, layers=layers)).eval()
    with torch.no_grad():  # away from the start, where some do little
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


@pytest.fixture(scope="module", params=sorted(MIXERS))
def model(request):
    return small(request.param)


def prompts():
    ids = torch.randint(1, 32, (2, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    ids[1, :4], mask[1, :4] = 0, 0
    return ids, mask


def test_beams_batch_and_left_padding_together(model):
    ids, mask = prompts()
    cached, plain = (
        model.generate(ids, attention_mask=mask, num_beams=2, use_cache=use, **GREEDY) for use in (True, False)
    )
    assert torch.equal(cached, plain)
    both = model.generate(ids, attention_mask=mask, **GREEDY)
    alone = model.generate(ids[1:, 4:], **GREEDY)
    assert torch.equal(both[1, 9:], alone[0, 5:])


@torch.no_grad()
def test_a_cache_that_is_reset_is_a_fresh_one(model):
    ids, _ = prompts()
    wanted = model(ids, use_cache=True).logits
    cache = model.new_cache(2)
    for t in range(3):
        model(ids[:, t : t + 1], cache=cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    found = model(ids, cache=cache)
    assert torch.equal(found.logits, wanted)
    assert found.cache is cache


@torch.no_grad()
def test_a_copied_cache_goes_its_own_way(model):
    ids, _ = prompts()
    cache = model(ids[:, :5], use_cache=True).cache
    kept = copy.deepcopy(cache)
    first = model(ids[:, 5:], cache=cache).logits
    assert torch.equal(model(ids[:, 5:], cache=kept).logits, first)


@torch.no_grad()
def test_no_tokens_and_no_sequences_give_no_logits(model):
    ids, _ = prompts()
    cache = model(ids, use_cache=True).cache
    assert model(ids[:, :0], cache=cache).logits.shape == (2, 0, 32)
    assert model(ids[:, :0], attention_mask=torch.ones(2, 9), cache=cache).logits.shape == (2, 0, 32)
    assert cache.get_seq_length() == 9
    more = model(ids[:, :2], cache=cache).logits
    torch.testing.assert_close(more, model(torch.cat([ids, ids[:, :2]], 1)).logits[:, 9:], atol=1e-4, rtol=1e-4)
    for empty in (ids[:0], ids[:0, :0], ids[:, :0]):
        assert model(empty).logits.shape == model(empty, use_cache=True).logits.shape == (*empty.shape, 32)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near(model, dtype):
    ids, mask = prompts()
    exact = model(ids, attention_mask=mask).logits
    low = copy.deepcopy(model).to(dtype)
    for found in (low(ids, attention_mask=mask), low(ids, attention_mask=mask, use_cache=True)):
        assert found.logits.dtype == dtype
        error = (found.logits.float() - exact)[:, 4:].norm() / exact[:, 4:].norm()
        assert error <= 0.1
    assert low.generate(ids, attention_mask=mask, **GREEDY).shape == (2, 13)


def test_comes_back_from_disk_and_learns(model, tmp_path):
    ids, mask = prompts()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)
    loss = again.train()(ids, attention_mask=mask, labels=ids).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in again.parameters())


# ------------------------------------------------------------------------------------------------------- every option counts

KERNEL = {"lam": 0.0, "smooth_width": 3, "init": "random", "lr": 0.5, "kernel_dropout": 0.5, "length": 50}
CHANGES = {
    "attention": {"heads": 4, "kv_heads": 1, "reach": 3, "rotary": False},
    "based": {"heads": 4, "feature_dim": 5, "feature": "elu"},
    "based_window": {"heads": 4, "window": 2},
    "baseconv": {"width": 2},
    "long_conv": {**KERNEL, "channels": 1, "dropout": 0.5},
    "long_conv_h3": KERNEL,
    "mamba": {"states": 5, "expand": 3, "conv": 2, "dt_rank": 3, "discretisation": "zoh"},
    "mamba2": {"states": 5, "head_dim": 16, "expand": 3, "conv": 2, "groups": 2},
    "memory_attention": {"heads": 4, "bits": 2, "weight": "magnitude", "rotary_share": 1.0},
    "mlgru": {"variant": "as_released", "bound": "none", "quantized": False},
    "positional": {"heads": 4, "positions": 41},
    "s4d": {"states": 6},
}
FASTER = {"based": {"chunk": 2}, "mamba": {"backend": "sequential"}, "mamba2": {"chunk": 3}, "mlgru": {"fused": False}}
REFUSED = {
    "memory_attention": {"temperature": 0.5},  # of the cosine weight only
    "long_conv": {"bidirectional": True, "learned_dft": {}, "smooth_domain": "frequency"},  # the last without a width
    "long_conv_h3": {"smooth_domain": "frequency"},
}
APART = {"skips"}  # set by the layers


def options_of(name):
    found = set()
    for each in [MIXERS[name], *{"long_conv": (LongConv, LongKernel), "long_conv_h3": (LongKernel,)}.get(name, ())]:
        found |= {p.name for p in inspect.signature(each.__init__).parameters.values() if p.kind == p.KEYWORD_ONLY}
    if name == "long_conv_h3":
        found -= {"dropout"}  # the kernel's, there called kernel_dropout
    if name == "long_conv":
        found |= {"length"}
    return found - {"layer", "layers"} - APART


def built(name, **options):
    torch.manual_seed(0)
    return make_mixer(name, 16, **{"layer": 1, "layers": 2, **SMALL[name], **options}).train()


def seen(mixer):
    """What an option may change: the parameters, the function, what is asked of the optimizer."""
    torch.manual_seed(1)
    y = mixer(torch.randn(2, 12, 16))
    special = [m.optimizer_options() for m in mixer.modules() if hasattr(m, "optimizer_options")]
    return [tuple(p.shape) for p in mixer.parameters()], y.detach(), special


@pytest.mark.parametrize("name", sorted(CHANGES))
def test_every_option_changes_the_mixer_or_is_refused(name):
    tables = [table.get(name, {}) for table in (CHANGES, FASTER, REFUSED)]
    assert options_of(name) == set().union(*tables)
    shapes, y, special = seen(built(name))
    for option, value in tables[0].items():
        other = seen(built(name, **{option: value}))
        assert other[0] != shapes or other[2] != special or not torch.equal(other[1], y), option
    for option, value in tables[1].items():
        torch.testing.assert_close(seen(built(name, **{option: value}))[1], y, atol=1e-5, rtol=1e-4)
    for option, value in tables[2].items():
        with pytest.raises(ValueError, match=option):
            built(name, **{option: value})


def test_the_domain_of_smoothing_counts_where_something_is_smoothed():
    width = {"smooth_width": 3}
    a, b = (seen(built("long_conv", **width, smooth_domain=d))[1] for d in ("time", "frequency"))
    assert not torch.equal(a, b)


def test_the_temperature_counts_where_the_weight_has_one():
    a, b = (seen(built("memory_attention", weight="cosine", temperature=t))[1] for t in (0.5, 1.0))
    assert not torch.equal(a, b)


def test_no_mixer_is_left_out_of_the_options():
    assert set(CHANGES) == {name for name, cls in MIXERS.items() if cls.__module__.startswith("assay.")}

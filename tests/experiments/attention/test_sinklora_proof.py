"""SinkLoRA's experiments notice when groups and sinks, or the heavy hitters that are kept, are drawn at random."""

import pytest
import torch
from tests.properties.sabotage import record_of, verdict_of
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from assay.evidence.types import Verdict
from assay.evidence.verdict import PAYS, judge
from assay.experiments import experiments_of
from assay.experiments.attention import sinklora as room
from assay.methods.attention.sinklora import EvictionCache

TUNING, DECODING = "sinklora/perplexity-recovered", "sinklora/inference-speedup"
TUNE = room.SMALL | {"steps": 400, "batch": 16, "tune_steps": 80, "windows": 32, "timed": 64}
DECODE = {"tokens": 256, "share": 0.5, "new": 1, "documents": 3, "follows": 4, "moved": 0}


def test_the_experiments_load_and_their_deciding_points_are_the_papers():
    found = {each.claim: each for each in experiments_of("sinklora")}
    assert set(found) == {TUNING, DECODING}
    assert found[DECODING].decides["small"]["share"] == found[DECODING].paper["share"] == 0.5
    assert room.SETTINGS["SF"] == {"shift_fraction": 0.5, "sinks": found[TUNING].paper["sinks"]}
    assert found[DECODING].operator.exact


def test_every_arm_has_a_rate_that_was_searched():
    for name, arms in ((room.BASE_SEARCH, ["base"]), (room.TUNE_SEARCH, room.ARMS)):
        for arm in arms:
            rate = room.chosen(name, arm)
            assert rate.rate in rate.rates
            assert len(rate.rates) >= 3


@pytest.fixture
def _quick(monkeypatch):
    """So short a training is not held to the floor of `small`, and nothing is timed."""
    monkeypatch.setattr(room, "bigram_nll", lambda length, windows: 3.0)
    monkeypatch.setattr(room, "attention_seconds", lambda length: {})


def test_random_groups_see_as_much_and_nothing_later():
    torch.manual_seed(0)
    module = torch.nn.Module()
    module.layer_idx = 0
    q, k, v = torch.randn(3, 1, 2, 32, 8)
    out = room._attend_at_random(module, q, k, v, None)[0].transpose(1, 2)
    later = v.clone()
    later[:, :, 20:] = 0
    assert torch.equal(room._attend_at_random(module, q, k, later, None)[0].transpose(1, 2)[:, :, :20], out[:, :, :20])
    assert not torch.allclose(out, torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
    module.eval()
    module.is_causal = True
    dense = room._attend_at_random(module, q, k, v, None)[0].transpose(1, 2)
    torch.testing.assert_close(dense, torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))


def test_the_share_of_a_gain():
    assert room._share(2.0, 1.0, 1.0) == 100
    assert room._share(2.0, 1.0, 2.0) == 0
    assert room._share(2.0, 1.0, 2.5) < 0


def test_the_trivial_floor_is_that_of_pairs():
    assert 1.5 < room.bigram_nll(64, 16) < 3.0


def test_groups_alone_are_full_attention_on_shorter_windows():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
    ids = torch.randint(64, (2, 32))
    with torch.no_grad():
        short = model(ids.reshape(8, 8)).logits.reshape(2, 32, 64)
        room.use_sf_attention(model, **room.SETTINGS[room.SHORT])
        torch.testing.assert_close(model(ids).logits, short, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("_quick")
def test_random_groups_and_sinks_change_the_verdict_on_tuning(monkeypatch):
    honest = record_of(TUNING, TUNE)
    assert honest.measured.low > max(honest.controls["deleted"], honest.controls["random"])
    tuned = room.tuned
    monkeypatch.setattr(room, "tuned", lambda base, arm, *rest: tuned(base, room.RANDOM if arm == "SF" else arm, *rest))
    broken = record_of(TUNING, TUNE)
    assert broken.measured.median == broken.controls["random"]
    assert judge(honest).verdict in PAYS
    assert judge(broken).verdict not in PAYS


# ---------------------------------------------------------------------------------------------------------------- decoding


@pytest.fixture
def _whole_model(smollm2, monkeypatch):
    """One model for all, in float32, put back afterwards."""
    model = smollm2.model
    before = model.config._attn_implementation
    monkeypatch.setattr(room, "_model", lambda moved=False: (room.use_eviction(model), smollm2.tokenizer))
    monkeypatch.setattr(room, "_plain_model", lambda: model)
    yield
    model.set_attn_implementation(before)


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.usefixtures("_whole_model")
def test_random_entries_in_place_of_heavy_hitters_change_the_verdict(monkeypatch):
    honest = record_of(DECODING, DECODE)
    assert honest.quality.controls["deleted"] - honest.quality.baseline > 0.25
    assert honest.refuted is False
    cut = room.cut

    def random_hitters(cache, share, seed):
        found = cut(cache, share, seed)
        return found | {"h2o": room._at_random(cache, share, seed)}

    monkeypatch.setattr(room, "cut", random_hitters)
    assert verdict_of(DECODING, DECODE) is Verdict.REFUTED


@pytest.fixture
def tiny():
    """A random model, and a cache with its first 40 tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.5,
    )  # fmt: skip
    model = room.use_eviction(LlamaForCausalLM(config).eval())
    ids, cache = torch.arange(20, 60)[None], EvictionCache(room.EVERYTHING)
    with torch.no_grad():
        model(ids, cache=cache)
    return model, ids, cache


@torch.no_grad()
def test_every_full_cache_decodes_the_same_again_and_again(tiny):
    """The growing, the static and the kept cache hold the same, and are the same after being wound back."""
    model, ids, kept = tiny
    copies = [room._copied(kept, DynamicCache()), room._copied(kept, StaticCache(model.config, max_cache_len=44))]

    def step(cache):
        return model(ids[:, :1], cache=cache).logits

    first = step(kept.smaller(room.EVERYTHING))
    for _ in range(2):
        torch.testing.assert_close(step(room._rewound(kept, 40)), first)
    model.set_attn_implementation("sdpa")
    for cache in copies:
        for _ in range(2):
            torch.testing.assert_close(step(room._rewound(cache, 40)), first, atol=1e-4, rtol=1e-4)


def test_random_entries_keep_the_budget_and_the_newest(tiny):
    cache = tiny[2]
    scores = [layer.scores.clone() for layer in cache.layers]
    found = room.cut(cache, 0.5, 0)
    assert [found[name].entries[0] for name in ("full", "h2o", "recent", "random", "sinks")] == [40, 20, 20, 20, 20]
    kept = set(found["random"].layers[0].positions[0, 0].tolist())
    assert set(range(30, 40)) <= kept
    assert kept != set(found["h2o"].layers[0].positions[0, 0].tolist())
    assert all(torch.equal(a, layer.scores) for a, layer in zip(scores, cache.layers, strict=True))

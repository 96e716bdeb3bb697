"""The parts of SageAttention2's experiments that can be wrong without showing: the stand-in for xformers, and the video model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.experiments.attention import cogvideox, memory_efficient, video
from assay.experiments.attention import sageattention2 as room
from assay.experiments.attention.memory_efficient import (
    CANDIDATES,
    chunked_attention,
    fastest_chunks,
    xformers_attention,
)
from assay.experiments.attention.prefill import causal_sdpa
from assay.experiments.attention.sageattention2 import (
    attend_exact,
    attend_quantised,
    cogvideo_time,
    xformers_speedup,
)
from assay.experiments.attention.video import psnr, small_photograph
from assay.measure.cost import count_cost
from assay.methods.attention.sageattention2 import VARIANTS, SageSettings, calibrate_steps, install_steps
from assay.methods.core.attention.diffusers_processor import set_attention
from assay.methods.core.attention.plan import AttentionPlan, execute
from assay.workloads.images import clip


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    """What a test trains is not kept for the user's measurements."""
    monkeypatch.setattr(video, "cache_dir", lambda: tmp_path)


def tensors(heads, key_heads, queries, keys, dtype=torch.float64, value_dim=24):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, heads, queries, 16), (2, key_heads, keys, 16), (2, key_heads, keys, value_dim)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).mul(2).to(dtype) for shape in shapes]


# ---------------------------------------------------------------------------------------------- the stand-in for xformers


@pytest.mark.parametrize("chunks", [(16, 16), (7, 5), (1, 64), (64, 1), (13, 100), (100, 9)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "key_heads", "queries", "keys"), [(4, 4, 50, 50), (6, 2, 50, 50), (6, 3, 21, 50)])
def test_chunked_attention_is_exact(chunks, causal, heads, key_heads, queries, keys):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        q, k, v = tensors(heads, key_heads, queries, keys, dtype)
        for scale in (None, 0.7):
            plan = AttentionPlan(queries, keys, causal=causal)
            expected = execute(plan, q, k, v, backend="reference", scale=scale)
            found = chunked_attention(q, k, v, chunks=chunks, causal=causal, scale=scale)
            assert found.dtype == dtype
            torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def test_chunked_attention_takes_more_queries_than_keys_and_large_scores():
    q, k, v = tensors(4, 2, 40, 11)
    expected = causal_free(q, k, v)
    torch.testing.assert_close(chunked_attention(q, k, v, chunks=(6, 4), causal=False), expected)
    large = chunked_attention(q.float() * 1e4, k.float(), v.float(), chunks=(6, 4), causal=False)
    assert large.isfinite().all()
    torch.testing.assert_close(large, causal_free(q.float() * 1e4, k.float(), v.float()), atol=1e-3, rtol=1e-3)


def causal_free(q, k, v):
    return nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def test_chunked_attention_in_bfloat16_is_as_good_as_its_products():
    q, k, v = tensors(6, 2, 130, 130, torch.bfloat16)
    expected = execute(AttentionPlan(130, 130), q.double(), k.double(), v.double(), backend="reference")
    found = chunked_attention(q, k, v, chunks=(32, 48))
    assert found.dtype == torch.bfloat16
    assert (found.double() - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize(("queries", "chunks"), [(96, (16, 32)), (41, (16, 8)), (96, (20, 7))])
def test_chunked_attention_does_not_compute_above_the_diagonal(queries, chunks):
    q, k, v = tensors(4, 2, queries, 96)
    pairs = 0
    for first in range(0, queries, chunks[0]):
        last = min(first + chunks[0], queries)
        pairs += (last - first) * min(96, -(-(96 - queries + last) // chunks[1]) * chunks[1])
    cost = count_cost(chunked_attention, q, k, v, chunks=chunks)
    assert cost.macs == 2 * 4 * pairs * (16 + 24)
    assert count_cost(lambda: chunked_attention(q, k, v, chunks=chunks, causal=False)).macs > cost.macs


def test_chunked_attention_refuses():
    q, k, v = tensors(4, 2, 10, 10)
    with pytest.raises(ValueError, match=r"chunks must be at least 1, got \(0, 4\)"):
        chunked_attention(q, k, v, chunks=(0, 4))
    with pytest.raises(ValueError, match=r"heads of q \(3\) must be a multiple of the heads of k \(2\)"):
        chunked_attention(q[:, :3], k, v)
    with pytest.raises(ValueError, match="got 10 queries and 6 keys"):
        chunked_attention(q, k[:, :, :6], v[:, :, :6])


def test_the_fastest_chunks_are_taken(monkeypatch):
    now, runs = [0.0], []

    def run(q, k, v, *, chunks):
        runs.append(chunks)
        first = runs.count(chunks) == 1
        now[0] += {(8, 8): 5.0, (4, 8): 1.0 if not first else 9.0, (8, 4): 2.0}[chunks]  # the first run warms up

    monkeypatch.setattr(memory_efficient, "chunked_attention", run)
    monkeypatch.setattr(memory_efficient, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    q, k, v = tensors(2, 2, 8, 8)
    assert fastest_chunks((q, k, v), [(8, 8), (4, 8), (8, 4)]) == (4, 8)


def test_xformers_gets_grouped_heads_in_its_own_layout():
    """By a stand-in with the documented contract of its 5-dimensional form: (batch, tokens, groups, heads of a group, dim)."""

    def attention(query: Tensor, key: Tensor, value: Tensor, attn_bias: str) -> Tensor:
        assert attn_bias == "lower triangle"
        assert query.shape[:4] == key.shape[:4] == value.shape[:4]
        scores = torch.einsum("bnghd,bmghd->bghnm", query, key) * query.shape[-1] ** -0.5
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return torch.einsum("bghnm,bmghd->bnghd", scores.masked_fill(hidden, -torch.inf).softmax(-1), value)

    ops = SimpleNamespace(memory_efficient_attention=attention, LowerTriangularMask=lambda: "lower triangle")
    q, k, v = tensors(6, 2, 20, 20, value_dim=16)
    torch.testing.assert_close(xformers_attention(ops, q, k, v), causal_sdpa(q, k, v))


@pytest.mark.gpu
def test_xformers_itself():
    ops = memory_efficient.find_xformers()
    if ops is None:
        pytest.skip("needs xformers and a GPU")
    q, k, v = (x.cuda() for x in tensors(6, 2, 200, 200, torch.bfloat16, value_dim=16))
    expected = causal_sdpa(q.float(), k.float(), v.float())
    assert (xformers_attention(ops, q, k, v).float() - expected).norm() < 0.01 * expected.norm()


def captured(*_):
    q, k, v = tensors(6, 2, 300, 300, torch.bfloat16, value_dim=32)
    return [(F.pad(q, (0, 16)), F.pad(k, (0, 16)), v)]  # dims of 32, as the kernel takes them


def test_arms_of_the_trial_against_xformers_compute_the_same(monkeypatch):
    monkeypatch.setattr(memory_efficient, "find_xformers", lambda: None)
    monkeypatch.setattr(room, "captured_layers", captured)
    trial = xformers_speedup(300, 2)
    expected = trial.free()
    for arm in (trial.baseline, trial.candidate, trial.exact):
        for found, free in zip(arm(), expected, strict=True):
            error = (found.float() - free.float()).norm() / free.float().norm()
            assert 0 < error < 0.02
    details = trial.details()
    assert details["baseline"] == "stand-in"
    assert tuple(details["chunks"]) in CANDIDATES
    for arm in ("baseline", "free", "candidate"):
        assert min(details[f"{arm}_accuracy"]["cosine"]) > 0.9995


# ---------------------------------------------------------------------------------------------------------- video model


def sharp_model(seed: int = 0) -> cogvideox.CogVideoX:
    """Untrained, its attention sharper than that of random weights."""
    torch.manual_seed(seed)
    model = cogvideox.CogVideoX(128).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "attn1.norm" in name and name.endswith("weight"):
            parameter.data *= 2
    return model


def noise(frames: int = 4, side: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, 3, frames, 4 * side, 4 * side, generator=generator)


def test_psnr():
    x = torch.zeros(2, 3)
    assert psnr(x, x + 2) == pytest.approx(0)
    assert psnr(x, x + 0.02) == pytest.approx(40)


def test_the_right_velocity_leads_back_to_the_clip():
    """Sampling and training use one schedule: what `train` asks of the model, `sample` inverts, from pure noise on."""
    scheduler, pixels, seen = cogvideox.make_scheduler(), torch.rand(1, 3, 4, 8, 8) * 2 - 1, []

    def model(x, times, labels):
        seen.append(int(times))
        share = scheduler.alphas_cumprod[times]
        left = (x - share.sqrt() * pixels) / (1 - share).sqrt()
        return scheduler.get_velocity(pixels, left, times)

    found = cogvideox.sample(model, torch.randn(1, 3, 4, 8, 8), 10)
    torch.testing.assert_close(found, pixels, atol=1e-4, rtol=1e-4)
    assert seen == list(range(999, 0, -100))
    assert scheduler.alphas_cumprod[999] == 0  # no signal at the first step, in training either


def test_training_learns_and_repeats(monkeypatch, tmp_path):
    scheduler, generator = cogvideox.make_scheduler(), torch.Generator().manual_seed(0)
    clips = torch.stack([clip(small_photograph(i), 8, 32, seed=1000 + i) for i in range(6)]).transpose(1, 2) * 2 - 1
    drawn = torch.randn(clips.shape, generator=generator)
    times, labels = torch.arange(100, 700, 100), torch.arange(6)

    def loss(model):
        with torch.no_grad():
            found = model(scheduler.add_noise(clips, drawn, times), times, labels)
        return float((found - scheduler.get_velocity(clips, drawn, times)).square().mean())

    (first, _), (once, seen) = (cogvideox.train(64, updates) for updates in (1, 40))
    monkeypatch.setattr(video, "cache_dir", lambda: tmp_path / "empty")
    twice, again = cogvideox.train(64, 40)
    assert seen == again
    assert loss(once) == loss(twice)
    assert loss(once) < 0.8 * loss(first)
    assert not any(parameter.requires_grad for parameter in once.parameters())


def test_prompt_and_video_attend_to_each_other():
    """Another prompt changes the sample; so does a pixel of one frame, in the others too."""
    model, x, times = sharp_model(), noise(), torch.tensor([500])
    with torch.no_grad():
        first, other = (model(x, times, torch.tensor([label])) for label in (0, 1))
        changed = x.clone()
        changed[:, :, :2] += 1
        far = model(changed, times, torch.tensor([0]))
    assert first.shape == x.shape
    assert (first - other).abs().max() > 1e-3
    assert (far - first)[:, :, 2:].abs().max() > 1e-3


def test_a_width_that_is_no_multiple_of_a_head_is_refused():
    with pytest.raises(ValueError, match="width must be a positive multiple of 64, got 96"):
        cogvideox.CogVideoX(96)


def test_attention_functions_of_the_sampler():
    """Exact ones change nothing, integers change little, and fewer levels more; each is called for every layer and step."""
    model, x, calls = sharp_model(), noise(), []
    own = dict(model.model.attn_processors)

    def sampled(attend):
        def counted(module, q, k, v, **options):
            calls.append((q.shape[2], options["text"], options["mask"], options["causal"]))
            return attend(module, q, k, v, **options)

        set_attention(model.model, [counted] * cogvideox.LAYERS)
        found = cogvideox.sample(model, x, 3)
        model.model.set_attn_processor(dict(own))
        return psnr(found, reference)

    reference = cogvideox.sample(model, x, 3)
    assert sampled(attend_exact) > 90
    assert calls == [(2 * 16 + cogvideox.WORDS, cogvideox.WORDS, None, False)] * (3 * cogvideox.LAYERS)
    exact = SageSettings("exact", smooth_k=True, smooth_q=True, pv="exact")
    assert sampled(attend_quantised(exact)) > 90
    int8 = sampled(attend_quantised(VARIANTS["cpu"]))
    int4 = sampled(attend_quantised(SageSettings("int4", pv="bf16")))
    assert 90 > int8 > int4 + 10 > 30
    with pytest.raises(ValueError, match="mask must be None"):
        attend_exact(None, x, x, x, mask=x, causal=False, scale=None, text=0)


def test_the_trial_of_cogvideox():
    trial = cogvideo_time(frames=4, side=8, width=64, steps=3, updates=3, clips=2)
    baseline, candidate, exact = trial.baseline(), trial.candidate(), trial.exact()
    assert torch.equal(trial.baseline(), baseline)  # the processors of the other arms are gone
    assert not torch.equal(candidate, baseline)
    assert psnr(exact, baseline) > 40
    quality, details = trial.quality(), trial.details()
    rounding = details["share_of_the_deletion_by_clip"]["dense by our kernel"]
    assert 0 <= sum(rounding) / 2 <= quality.candidate < 0.1
    assert quality.controls["deleted"] == 1
    assert details["PSNR_dB_by_clip"]["sage"][0] == pytest.approx(psnr(candidate, baseline), rel=1e-3)
    assert details["tokens"] == 2 * 64 + cogvideox.WORDS
    # four blocks, each 12 width^2 a token and QK^T and PV, and little else
    blocks, pairs = 12 * 64**2 * details["tokens"], 2 * 64 * details["tokens"] ** 2
    assert details["attention_share_of_the_macs"] == pytest.approx(pairs / (blocks + pairs), rel=0.1)
    assert set(details["seconds"]) == {"SDPA", "exact kernel", "INT8"}
    for seconds in details["seconds"].values():
        assert 0 < seconds["attention"] < seconds["all"]
    assert len(details["integers_by_step"]) == 3
    assert all(sum(row.values()) == cogvideox.LAYERS for row in details["integers_by_step"])
    assert torch.equal(trial.baseline(), baseline)


def test_a_table_by_step_and_layer():
    """Calibration sees each call once, what it finds is done at that step and layer, and the processors come back."""
    model, x = sharp_model(), noise()
    own = dict(model.model.attn_processors)
    table = calibrate_steps(model.model, lambda: cogvideox.sample(model, x, 3), min_cosine=0.999, max_l1=1.0)
    assert [len(row) for row in table] == [cogvideox.LAYERS] * 3
    assert model.model.attn_processors == own
    assert calibrate_steps(model.model, lambda: cogvideox.sample(model, x, 1), min_cosine=1.0, candidates=["int4"]) == [
        ["exact"] * cogvideox.LAYERS
    ]

    def sampled(table):
        model.model.set_attn_processor(dict(own))
        install_steps(model.model, table)
        found = [cogvideox.sample(model, x, 2) for _ in range(2)]
        model.model.set_attn_processor(dict(own))
        assert torch.equal(*found)  # after the last step comes the first
        return psnr(found[0], reference)

    reference, layers = cogvideox.sample(model, x, 2), cogvideox.LAYERS
    exact = sampled([["exact"] * layers] * 2)
    late = sampled([["exact"] * layers, ["int4"] + ["exact"] * (layers - 1)])
    both = sampled([["int4"] * layers] * 2)
    assert exact > 90 > late > both
    with pytest.raises(ValueError, match="table must have a row of 4 for each step, got \\[1\\]"):
        install_steps(model.model, [["int4"]])

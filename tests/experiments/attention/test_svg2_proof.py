"""SVG2's experiments notice when the method is broken; what they judge by tells its clusters from random ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.properties.sabotage import PAYS, record_of, verdict_of

import assay.methods.attention.svg2 as method
from assay.evidence.verdict import judge
from assay.experiments import experiments_of
from assay.experiments.attention import svg2 as room
from assay.experiments.attention import video
from assay.methods.attention.svg2 import SVG2Config

CLUSTER = method.kmeans


def random_clusters(x, clusters, **options):
    """Clusters of the same sizes, each token in one at random; their centroids are those of k-means."""
    found = CLUSTER(x, clusters, **options)
    shuffle = torch.rand(found.labels.shape).argsort(-1)
    return replace(found, labels=found.labels.gather(-1, shuffle))


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path_factory):
    """What a test trains is not kept for the user's measurements."""
    monkeypatch.setattr(video, "cache_dir", lambda: tmp_path_factory.getbasetemp())


def test_the_papers_own_settings_decide():
    found = experiments_of("svg2")
    assert {each.claim for each in found} == {"svg2/hunyuan-speedup", "svg2/wan-speedup"}
    for each in found:
        assert each.decides["small"]["top_p"] == each.decides["full"]["top_p"] == 0.9
        assert "top_p" not in each.departures
    assert len({each.operator for each in found}) == 1


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("choice", ["clusters", "keys", "positions"])
def test_controls_have_the_methods_budget(choice, text):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 80, 16, generator=generator) for _ in range(3))
    words = (torch.arange(16) < 7)[None] if text else None
    config = SVG2Config(6, 12, 0.5, min_ratio=0.0, dense_steps=0.0, dense_layers=0.0)
    own = room.Measured(config, 1, 1).plan(0, q, k, text=words)
    found = room.Control(config, 1, 1, choice=choice).plan(0, q, k, text=words)
    assert found.mask.shape == own.mask.shape
    if choice == "positions":
        kept = own.mask[..., :6, :12].sum(-1).double().mean().round()
        assert (found.mask[..., :6, :12].sum(-1) == kept).all()
        queries, keys = found.labels()
        for labels in (queries, keys):
            assert (labels[..., : 80 - 16 * text].diff() >= 0).all()
    else:
        assert torch.equal(found.mask.sum(-1), own.mask.sum(-1))
        assert torch.equal(found.key_sizes, own.key_sizes)
        assert torch.equal(found.key_order, own.key_order) == (choice == "clusters")
    assert not torch.equal(found.mask, own.mask)
    if text:  # the prompt's tokens stay where they are, and its padding sees only itself
        assert torch.equal(found.key_order[..., 64:], own.key_order[..., 64:])
        assert torch.equal(found.mask[..., 6:, :], own.mask[..., 6:, :])
        assert torch.equal(found.mask[..., 12:], own.mask[..., 12:])


def test_attention_deleted_is_the_mean_of_what_the_mask_shows():
    v = torch.randn(2, 3, 10, 4, generator=torch.Generator().manual_seed(0))
    options = {"causal": False, "scale": None, "text": 0}
    torch.testing.assert_close(video.mean_of_values(None, v, v, v, mask=None, **options)[:, :, 7], v.mean(2))
    mask = (torch.arange(10) < 6).expand(2, 1, 1, 10)
    torch.testing.assert_close(video.mean_of_values(None, v, v, v, mask=mask, **options)[:, :, 0], v[:, :, :6].mean(2))


def test_shares_are_of_the_deletion():
    def at(distance):
        return lambda number: torch.full((1, 3, 2, 4, 4), distance * (number + 1))

    found, decibels = video.shares({"deleted": at(0.2), "near": at(0.02), "far": at(0.4)}, at(0.0), 2)
    assert found == {"deleted": [1.0, 1.0], "near": [0.01, 0.01], "far": [4.0, 4.0]}
    assert decibels["near"] == pytest.approx([40.0, 33.98], abs=0.01)
    quality = video.clip_quality(
        {"a": [0.1, 0.2, 0.3], "b": [0.0] * 3, "deleted": [1.0] * 3}, "a", ["deleted"], rival=""
    )
    assert (quality.baseline, quality.controls) == (0.0, {"deleted": 1.0})
    assert quality.candidate == pytest.approx(0.2)
    assert quality.high == pytest.approx(0.2 + 4.303 * 0.1 / 3**0.5, rel=1e-3)  # Student's t over the clips
    with pytest.raises(ValueError, match="attention does nothing"):
        video.shares({"deleted": at(0.0)}, at(0.0), 1)


def test_a_model_is_trained_once(tmp_path, monkeypatch):
    monkeypatch.setattr(video, "cache_dir", lambda: tmp_path)
    calls = []

    def train(model):
        calls.append(1)
        torch.nn.init.constant_(model.weight, 3.0)
        return video.Fit(0.5, 0.7)

    models = [torch.nn.Linear(2, 2) for _ in range(3)]
    fits = [video.kept(model, train, name) for model, name in zip(models, ("a", "a", "b"), strict=True)]
    assert fits == [video.Fit(0.5, 0.7)] * 3
    assert len(calls) == 2
    assert torch.equal(models[0].weight, models[1].weight)
    assert torch.equal(models[0].bias, models[1].bias)


POINT = {"frames": 4, "side": 8, "clusters": [32, 64], "steps": 3, "updates": 5, "clips": 3}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wan", "hunyuan"])
def test_random_clusters_change_the_verdict(monkeypatch, kind):
    """Honest clusters lie nearer than the margin; those of random tokens do not, nor do the controls."""
    point = {**POINT, "top_p": 0.95 if kind == "wan" else 0.97}
    honest = record_of(f"svg2/{kind}-speedup", point)
    assert judge(honest).verdict in PAYS
    quality = honest.quality
    for control in ("random", "random keys", "rival", "deleted"):
        assert quality.controls[control] > 2 * quality.candidate
    monkeypatch.setattr(method, "kmeans", random_clusters)
    assert verdict_of(f"svg2/{kind}-speedup", point) not in PAYS


@pytest.mark.parametrize(("kind", "sharpened"), [("wan", 2 * room.LAYERS), ("hunyuan", 2 * room.LAYERS)])
def test_only_the_norms_of_self_attention_are_sharpened(kind, sharpened):
    torch.manual_seed(0)
    model = room.Denoiser(kind)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    video.sharpen(model, 3.0)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert len(changed) == sharpened
    for name in changed:
        assert ".attn2." not in name
        torch.testing.assert_close(dict(model.named_parameters())[name].data, 3 * before[name].data)


def test_the_floor_is_the_best_multiple_of_the_clip():
    x = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    factors = torch.tensor([0.5, -2.0]).view(2, 1, 1, 1, 1)
    torch.testing.assert_close(video._multiple(x, x * factors), x * factors)

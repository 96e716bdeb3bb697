"""SVG2: how much faster does a video diffusion model sample, and how far are its samples from those of dense attention?

No package contains a trained video model, so a small one is trained here for half a minute. It is built from diffusers' own classes
for HunyuanVideo and Wan and trained on clips (moving crops of photographs; the prompt says which photograph). It trains on short
clips of small frames and samples longer clips of larger frames, with its attention replaced by diffusers' attention processors. As
in the paper, samples are judged only against the same model's dense samples from the same noise, but beside samples with attention
deleted, with random clusters, with random keys, and with blocks of neighbours, at equal density. Queries and keys are those of a
trained model, but of a small one: S is 2k to 16k tokens, where the paper has 75k to 119k. Its attention is sharpened before
training (`video.SHARPNESS`), for flat attention is approximated by anything.
"""

from __future__ import annotations

import functools
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.errors import MissingError
from assay.experiments.attention.prefill import ATTENTION
from assay.experiments.attention.video import (
    PATCH,
    Fit,
    Noised,
    clip_quality,
    kept,
    mean_of_values,
    shares,
    sharpen,
    train_on_clips,
)
from assay.experiments.core import Guard, Trial, experiment
from assay.methods.attention.svg2 import (
    SVG2Config,
    SVG2Sampling,
    attach,
    cluster_mass,
    critical_clusters,
    dense_attention,
    kmeans,
)
from assay.methods.core.attention.clusters import ClusterPlan, execute_clusters
from assay.methods.core.attention.diffusers_processor import set_attention, use_plans
from assay.methods.core.attention.plan import AttentionPlan
from assay.workloads.attention import captured_qkv
from assay.workloads.images import PHOTOGRAPHS
from assay.workloads.models import load_model
from assay.workloads.text import long_prompt

DIM, LAYERS, HEADS = 128, 4, 4
WORDS = 16  # tokens of a prompt, with padding
LONG = {"steps": 50, "updates": 2000, "clips": 4}  # of full points

Kind = Literal["wan", "hunyuan"]
Choice = Literal["clusters", "keys", "positions"]

# ------------------------------------------------------------------------------------------------------------ the model


class Denoiser(nn.Module):
    """Predicts the velocity of noised clips (batch, 3, frames, height, width) at times (batch,) in [0, 1] and labels (batch,).

    A small transformer of diffusers: Wan's, whose self-attention is among the video's tokens (text comes by cross-attention), or
    HunyuanVideo's, where video and a padded prompt attend to each other. A label is a prompt of 5 to 8 learned words.
    """

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        try:
            from diffusers import HunyuanVideoTransformer3DModel, WanTransformer3DModel
        except ImportError:
            raise MissingError("this model comes with diffusers: pip install 'assay[diffusion]'") from None
        common = {"in_channels": 3, "out_channels": 3, "num_attention_heads": HEADS, "attention_head_dim": DIM // HEADS}
        self.kind = kind
        self.model: Any
        if kind == "wan":
            sizes = {"text_dim": DIM, "freq_dim": 64, "ffn_dim": 4 * DIM, "num_layers": LAYERS}
            self.model = WanTransformer3DModel(**common, **sizes, patch_size=(1, PATCH, PATCH), rope_max_seq_len=64)
        else:
            sizes = {"text_embed_dim": DIM, "pooled_projection_dim": DIM, "num_layers": LAYERS // 2}
            self.model = HunyuanVideoTransformer3DModel(
                **common,
                **sizes,
                num_single_layers=LAYERS // 2,
                num_refiner_layers=1,
                patch_size=PATCH,
                patch_size_t=1,
                rope_axes_dim=(8, 12, 12),
                guidance_embeds=False,
            )
        self.words = nn.Embedding(len(PHOTOGRAPHS), WORDS * DIM)

    def forward(self, x: Tensor, times: Tensor, labels: Tensor) -> Tensor:
        words = self.words(labels).unflatten(1, (WORDS, DIM))
        real = torch.arange(WORDS) < 5 + labels[:, None] % 4
        given = {"encoder_hidden_states": words * real[..., None]}
        if self.kind == "hunyuan":
            given |= {"encoder_attention_mask": real.long(), "pooled_projections": words.mean(1)}
        return cast(Tensor, self.model(x.to(words.dtype), times * 1000, **given, return_dict=False)[0])


@dataclass
class Measured(SVG2Sampling):
    """SVG2 with logging, which costs time: seconds of planning and attending, density of each sparse call, recall of some."""

    planning: float = 0.0
    attending: float = 0.0
    densities: list[float] = field(default_factory=list)
    recalls: list[float] = field(default_factory=list)
    iterations: int = 0  # of k-means, over both sides

    def attention(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, text: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        begin = time.perf_counter()
        plan = self.plan(layer, q, k, text=text, scale=scale)
        planned = time.perf_counter()
        if plan is None:
            out = dense_attention(q, k, v, text=text, scale=scale)
        else:
            out = execute_clusters(plan, q, k, v, scale=scale)
        self.attending += time.perf_counter() - planned
        self.planning += planned - begin
        if plan is not None:
            state = self._states[layer, 0]
            self.iterations += sum(len(x) for x in (state.query_inertia, state.key_inertia) if x is not None)
            allowed = torch.ones_like(plan.mask)
            if text is not None:  # the last cluster is padding, which sees only itself
                allowed[..., -1, :-1] = allowed[..., :-1, -1] = False
            self.densities.append(plan.density(allowed))
            if self.step == self.steps // 2 and q.shape[2] <= 4500:  # as dear as dense attention without a kernel
                self.recalls.append(float(plan.recall(q, k, scale=scale, allowed=allowed).mean()))
        return out


@dataclass
class Control(Measured):
    """SVG2's schedule and budget with another choice: each query cluster sees as many key clusters as with SVG2.

    "clusters": key clusters at random. "keys": random keys, in clusters of the same sizes. "positions": blocks of neighbouring
    tokens in place of clusters, the best of them by the same estimate, as many as SVG2 keeps of a row on average.
    """

    choice: Choice = "clusters"

    def plan(
        self, layer: int, q: Tensor, k: Tensor, *, text: Tensor | None = None, scale: float | None = None
    ) -> ClusterPlan | None:
        plan = super().plan(layer, q, k, text=text, scale=scale)
        if plan is None:
            return None
        rows, columns = (
            self.config.query_clusters,
            self.config.key_clusters,
        )  # those of the video; the prompt's come after them
        video = q.shape[2] - (0 if text is None else text.shape[1])
        own = plan.mask[..., :rows, :columns]
        if self.choice == "positions":
            return by_position(plan, q, k, (rows, columns), video, int(own.sum(-1).double().mean().round()), scale)
        mask = plan.mask.clone()
        mask[..., :rows, :columns] = random_columns(own)
        if self.choice == "clusters":
            return replace(plan, mask=mask)
        order = plan.key_order.clone()
        order[..., :video] = torch.rand(order[..., :video].shape).argsort(-1)
        return replace(plan, mask=mask, key_order=order)


def random_columns(mask: Tensor) -> Tensor:
    """As many columns of each row as the mask has, at random."""
    return torch.rand(mask.shape).argsort(-1).argsort(-1).to(mask.device) < mask.sum(-1, keepdim=True)


def by_position(
    plan: ClusterPlan, q: Tensor, k: Tensor, clusters: tuple[int, int], video: int, keep: int, scale: float | None
) -> ClusterPlan:
    """The plan with the video's tokens in blocks of neighbours, each seeing the `keep` key blocks of most estimated mass."""
    orders, sizes, means = [], [], []
    for x, order, size, count in (
        (q, plan.query_order, plan.query_sizes, clusters[0]),
        (k, plan.key_order, plan.key_sizes, clusters[1]),
    ):
        label = torch.arange(video, device=x.device) * count // video
        members = F.one_hot(label, count).to(torch.float32)  # (video tokens, blocks)
        found = members.sum(0)
        means.append(members.T @ x[:, :, :video].float() / found[:, None])
        orders.append(order.clone())
        orders[-1][..., :video] = torch.arange(video, device=x.device)
        sizes.append(size.clone())
        sizes[-1][..., :count] = found.long()
    mass = cluster_mass(means[0], means[1], sizes[1][..., : clusters[1]], scale=scale)
    mask = plan.mask.clone()
    rank = mass.argsort(-1, descending=True).argsort(-1)
    mask[..., : clusters[0], : clusters[1]] = rank < max(1, keep)
    return ClusterPlan(orders[0], orders[1], sizes[0], sizes[1], mask)


def dense_plan(module: Any, q: Tensor, k: Tensor, **options: Any) -> tuple[AttentionPlan, dict[str, Any]]:
    """Every block: exact attention by assay's own kernel, without the padding of prompts."""
    return AttentionPlan(q.shape[2], k.shape[2], causal=False), {}


def noised(x0: Tensor) -> Noised:
    """Clips noised to times drawn from [0, 1] by a cosine schedule, the times, and the velocities that the model is to predict."""
    times, noise = torch.rand(len(x0)), torch.randn_like(x0)
    a, s = (f(times * math.pi / 2).view(-1, 1, 1, 1, 1) for f in (torch.cos, torch.sin))
    return a * x0 + s * noise, times, a * noise - s * x0


def train(kind: Kind, updates: int, *, batch: int = 2, seed: int = 0) -> tuple[Denoiser, Fit]:
    """A denoiser trained on `updates` batches of clips, and its loss; kept in assay's cache."""
    torch.manual_seed(seed)
    model = Denoiser(kind)
    sharpen(model)

    def fit(fresh: nn.Module) -> Fit:
        return train_on_clips(fresh, noised, updates, batch=batch)

    return model, kept(model, fit, f"{kind}-{updates}-{batch}-{seed}", sys.modules[__name__])


def sample(
    model: Denoiser, noise: Tensor, steps: int, *, sampling: SVG2Sampling | None = None, label: int = 0
) -> Tensor:
    """DDIM from noise (batch, 3, frames, height, width) in `steps` steps, each told to `sampling`: pixels in [-1, 1], float32."""
    labels, x = torch.full((len(noise),), label), noise
    times = torch.linspace(0.99, 0.0, steps + 1)
    with torch.no_grad():
        for now, then in zip(times[:-1], times[1:], strict=True):
            velocity = model(x, now.expand(len(x)), labels).float()
            a, s = (now * math.pi / 2).cos(), (now * math.pi / 2).sin()
            clean, left = (a * x - s * velocity).clamp(-1, 1), s * x + a * velocity
            x = (then * math.pi / 2).cos() * clean + (then * math.pi / 2).sin() * left
            if sampling is not None:
                sampling.end_step()
    return x.clamp(-1, 1)


# ------------------------------------------------------------------------------------------------- recall and density


def block_sums(share: Tensor, query_labels: Tensor, key_labels: Tensor, clusters: tuple[int, int]) -> Tensor:
    """share (heads, queries, keys) summed over the blocks of clusters: (heads, query clusters, key clusters)."""
    rows = F.one_hot(query_labels, clusters[0]).to(share.dtype).transpose(1, 2)
    return rows @ share @ F.one_hot(key_labels, clusters[1]).to(share.dtype)


def recall_at(estimate: Tensor, true: Tensor, pairs: Tensor, density: float) -> float:
    """Share of the true mass kept when `critical_clusters` chooses by `estimate` at the top_p that computes `density`.

    All are (heads, query clusters, key clusters); `true` sums to the number of queries. top_p is found by bisection, the same
    for all heads.
    """
    low, high = 0.0, 1.0
    kept = torch.ones_like(estimate, dtype=torch.bool)
    for _ in range(25):
        middle = (low + high) / 2
        chosen = critical_clusters(estimate, top_p=middle, min_ratio=0.0)
        if float((pairs * chosen).sum() / pairs.sum()) >= density:
            high, kept = middle, chosen
        else:
            low = middle
    return float((true * kept).sum() / true.sum())


def recall_curves(
    q: Tensor, k: Tensor, clusters: tuple[int, int], densities: tuple[float, ...]
) -> dict[str, list[float]]:
    """Recall of the true attention mass (not causal) at equal densities, for several ways to cut and choose blocks.

    q (1, heads, tokens, dim), k (1, key heads, tokens, dim). "clusters" is SVG2; "positions" as many blocks of neighbours,
    chosen by the same rule; "clusters, best blocks" takes the clusters' blocks of most true mass a pair; "best pairs" takes single
    scores, the upper bound.
    """
    tokens, per = q.shape[2], q.shape[1] // k.shape[1]
    q, k = q.float(), k.float().repeat_interleave(per, 1)
    share = (q @ k.transpose(-1, -2) * q.shape[3] ** -0.5).softmax(-1)[0]
    generator = torch.Generator().manual_seed(0)
    found = [kmeans(x, count, generator=generator) for x, count in zip((q, k), clusters, strict=True)]
    semantic = [each.labels[0] for each in found]
    position = [(torch.arange(tokens) * count // tokens).expand(q.shape[1], -1) for count in clusters]
    curves: dict[str, list[float]] = {}
    for name, labels in (("clusters", semantic), ("positions", position)):
        true = block_sums(share, labels[0], labels[1], clusters)
        sizes = [F.one_hot(each, count).sum(1) for each, count in zip(labels, clusters, strict=True)]
        means = [
            F.one_hot(each, count).float().transpose(1, 2) @ x[0] / size.clamp(min=1)[..., None]
            for each, count, x, size in zip(labels, clusters, (q, k), sizes, strict=True)
        ]
        pairs = sizes[0][:, :, None] * sizes[1][:, None].float()
        estimate = cluster_mass(means[0][None], means[1][None], sizes[1][None])[0]
        curves[name] = [recall_at(estimate, true, pairs, density) for density in densities]
        if name == "clusters":
            best = (true / pairs.clamp(min=1)).flatten().argsort(descending=True)
            spent = pairs.flatten()[best].cumsum(0) / pairs.sum()
            gained = true.flatten()[best].cumsum(0) / true.sum()
            curves["clusters, best blocks"] = [float(gained[spent <= density].amax()) for density in densities]
    ranked = share.flatten().sort(descending=True).values
    curves["best pairs"] = [float(ranked[: int(density * len(ranked))].sum() / ranked.sum()) for density in densities]
    return curves


def text_curves(tokens: int, layers: tuple[int, ...] = (2, 15, 27)) -> dict[str, Any]:
    """`recall_curves` of layers of SmolLM2-135M on real text, its attention taken as not causal."""
    loaded = load_model("smollm2-135m", dtype=torch.bfloat16)
    ids = long_prompt(loaded.tokenizer, tokens)
    densities, clusters = (0.1, 0.2, 0.3, 0.5), (tokens // 64, tokens // 32)
    curves = [recall_curves(q, k, clusters, densities) for q, k, _ in captured_qkv(loaded.model, ids, layers=layers)]
    mean = {name: [sum(x) / len(x) for x in zip(*(curve[name] for curve in curves), strict=True)] for name in curves[0]}
    return {"density": list(densities), "layers": list(layers), "tokens": tokens, **mean}


# ----------------------------------------------------------------------------------------------------------- experiments


GUARD = Guard("squared distance to the dense sample, as a share of that with attention deleted", 0.025, relative=False)
RIVAL = "blocks of neighbouring tokens, as many of them"


def _captured(model: Denoiser, noise: Tensor, steps: int) -> list[tuple[Tensor, Tensor]]:
    """Queries and keys of the video in each layer, half way through a dense sampling."""
    found: list[tuple[Tensor, Tensor]] = []
    calls = iter(range(steps * LAYERS))

    def attend(
        module: Any, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, text: int, **options: Any
    ) -> Tensor:
        if next(calls) // LAYERS == steps // 2:
            found.append((q[:, :, : q.shape[2] - text].clone(), k[:, :, : q.shape[2] - text].clone()))
        return F.scaled_dot_product_attention(q, k, v, mask)

    set_attention(model.model, [attend] * LAYERS)
    sample(model, noise, steps)
    return found


def sampling_trial(
    kind: Kind,
    frames: int,
    side: int,
    clusters: Sequence[int],
    *,
    dense_steps: float,
    steps: int,
    updates: int,
    clips: int,
    top_p: float,
    others: Sequence[float] = (),
    text: int = 0,
) -> Trial:
    """The model as diffusers made it against the same with SVG2, from the same noise, in bfloat16, and against assay's exact kernel.

    `frames` of side x side patches, query and key `clusters`, a share `dense_steps` of the `steps` dense, `updates` of training,
    `clips` noises and prompts to judge, of which the first is timed. `others` are further values of top_p whose density and distance go
    into the details; `text` are tokens of the recall curves. No layer is kept dense: the paper's 3 % would be a quarter of four layers.
    """
    config = SVG2Config(clusters[0], clusters[1], top_p, dense_steps=dense_steps, dense_layers=0.0)
    trained, fit = train(kind, updates)
    model = trained.bfloat16()
    own = dict(model.model.attn_processors)
    tokens = frames * side**2

    def run(number: int, sampling: SVG2Sampling | None = None) -> Tensor:
        noise = torch.randn(
            1, 3, frames, side * PATCH, side * PATCH, generator=torch.Generator().manual_seed(number + 1)
        )
        return sample(model, noise, steps, sampling=sampling, label=number % len(PHOTOGRAPHS))

    def untouched(number: int = 0) -> Tensor:
        model.model.set_attn_processor(dict(own))
        return run(number)

    def exact(number: int = 0) -> Tensor:
        use_plans(model.model, dense_plan)
        return run(number)

    def deleted(number: int = 0) -> Tensor:
        set_attention(model.model, [mean_of_values] * LAYERS)
        return run(number)

    def sparse(sampling: SVG2Sampling, number: int = 0) -> Tensor:
        attach(model.model, sampling)
        return run(number, sampling)

    notes: dict[str, Measured] = {"svg2": Measured(config, LAYERS, steps)}
    choices: dict[str, Choice] = {"random": "clusters", "random keys": "keys", "rival": "positions"}
    notes |= {name: Control(config, LAYERS, steps, choice=choice) for name, choice in choices.items()}
    notes |= {f"top_p {other:g}": Measured(replace(config, top_p=other), LAYERS, steps) for other in others}

    @functools.cache
    def judged() -> tuple[dict[str, list[float]], dict[str, list[float]]]:
        arms = {name: functools.partial(sparse, sampling) for name, sampling in notes.items()}
        return shares({**arms, "deleted": deleted, "dense by our kernel": exact}, untouched, clips)

    def details() -> dict[str, Any]:
        found, decibels = judged()
        once = Measured(config, LAYERS, steps)
        begin = time.perf_counter()
        sparse(once)
        whole = time.perf_counter() - begin
        heads_dim = HEADS * tokens * (DIM // HEADS)
        clusters = (config.query_clusters + config.key_clusters) / 2
        densities, shape = (0.1, 0.2, 0.3, 0.5), (config.query_clusters, config.key_clusters)
        told: dict[str, Any] = {
            "tokens": tokens,
            "training_loss": fit.loss,
            "loss_of_the_best_multiple_of_the_noised_clip": fit.floor,
            "density": _mean(once.densities),
            **({"recall": _mean(once.recalls)} if once.recalls else {}),
            "density_of_each_arm": {name: _mean(each.densities) for name, each in notes.items()},
            "recall_of_each_arm": {name: _mean(each.recalls) for name, each in notes.items()},
            "share_of_the_deletion_by_clip": found,
            "PSNR_dB_by_clip": decibels,
            "seconds": {"all, with notes": whole, "k-means and plan": once.planning, "attention": once.attending},
            "clustering_macs_per_dense_attention_macs": once.iterations
            * clusters
            * heads_dim
            / (2 * tokens * heads_dim * LAYERS * steps),
        }
        if tokens <= 2048:  # the true mass of larger ones does not fit comfortably
            noise = torch.randn(1, 3, frames, side * PATCH, side * PATCH, generator=torch.Generator().manual_seed(1))
            curves = [recall_curves(q, k, shape, densities) for q, k in _captured(model, noise, steps)]
            told["recall_of_the_denoiser"] = {"density": list(densities)} | {
                name: [_mean(list(x)) for x in zip(*(each[name] for each in curves), strict=True)] for name in curves[0]
            }
        if text:
            told["recall_on_text"] = text_curves(text)
        return told

    return Trial(
        baseline=untouched,
        candidate=lambda: sparse(SVG2Sampling(config, LAYERS, steps)),
        exact=exact,
        quality=lambda: clip_quality(judged()[0], "svg2", ("deleted", "random", "random keys", "rival"), rival=RIVAL),
        details=details,
    )


def _mean(values: list[float]) -> float:
    return sum(values) / max(len(values), 1)


SMALLER = {
    "tokens": "a model that is trained here in a minute; longer clips take longer than a measurement may",
    "clusters": "at small fewer, as there are fewer tokens, keys in the paper's proportion to queries; at full the paper's",
    "steps": "fewer of the same kind, with the same share of them dense; the first k-means is then a larger part of the cost",
}


@experiment(
    "svg2/hunyuan-speedup",
    points={
        "smoke": [{"frames": 4, "side": 8, "clusters": [4, 8], "steps": 4, "updates": 10, "clips": 2, "top_p": 0.9}],
        "small": [
            {
                "frames": 6,
                "side": 16,
                "clusters": [24, 60],
                "steps": 10,
                "updates": 150,
                "clips": 4,
                "top_p": 0.9,
                "text": 1024,
            }
        ],
        "full": [
            {
                "frames": frames,
                "side": side,
                "clusters": clusters,
                "top_p": top_p,
                "others": [0.5, 0.98],
                "text": 1024,
                **LONG,
            }
            for frames, side, clusters, top_p in (
                (32, 32, [400, 1000], 0.9),
                (32, 16, [128, 320], 0.9),
                (16, 16, [64, 160], 0.9),
                (32, 32, [400, 1000], 0.5),
            )
        ],
    },
    operator=ATTENTION,
    paper={"clusters": [400, 1000], "steps": 50, "top_p": 0.9, "dense_steps": 0.1, "tokens": 119_000},
    departures=SMALLER,
    decides={
        "full": {
            "frames": 32,
            "side": 32,
            "clusters": [400, 1000],
            "top_p": 0.9,
            "others": [0.5, 0.98],
            "text": 1024,
            **LONG,
        }
    },
    guard=GUARD,
    refuted_if="at top_p 0.9 a generation with clustering, planning and sparse attention takes longer than with torch's SDPA",
    measured_here="a HunyuanVideo of four layers, trained here on moving crops of photographs",
    minutes=240,
)
def hunyuan_speedup(**point: Any) -> Trial:
    """A small HunyuanVideo, sampled with its schedule: a tenth of the steps dense, 2.5 key clusters for a query cluster.

    Video and a padded prompt attend to each other: real words are a cluster that all see, the padding is one that nobody sees.
    The paper judges by decibels to the dense sample, 26 to 30; unrelated videos lie about 10 apart. Decibels say nothing of a small
    model, so the guard asks for the least of that distance: the sample has to lie 16 dB, 40 times in squared error, nearer to the
    dense one than a sample with attention deleted. Arguments as in `sampling_trial`.
    """
    return sampling_trial("hunyuan", **point, dense_steps=0.1)


@experiment(
    "svg2/wan-speedup",
    points={
        "smoke": [{"frames": 4, "side": 8, "clusters": [4, 12], "steps": 5, "updates": 10, "clips": 2, "top_p": 0.9}],
        "small": [
            {"frames": 6, "side": 16, "clusters": [24, 80], "steps": 10, "updates": 150, "clips": 4, "top_p": 0.9}
        ],
        "full": [{"frames": 32, "side": 32, "clusters": [300, 1000], "top_p": top_p, **LONG} for top_p in (0.9, 0.5)],
    },
    operator=ATTENTION,
    paper={"clusters": [300, 1000], "steps": 50, "top_p": 0.9, "dense_steps": 0.2, "tokens": 75_000},
    departures=SMALLER,
    decides={"full": {"frames": 32, "side": 32, "clusters": [300, 1000], "top_p": 0.9, **LONG}},
    guard=GUARD,
    refuted_if="at top_p 0.9 a generation with clustering, planning and sparse attention takes longer than with torch's SDPA",
    measured_here="a Wan 2.1 of four layers, trained here on moving crops of photographs",
    minutes=240,
)
def wan_speedup(**point: Any) -> Trial:
    """A small Wan 2.1, sampled with its schedule; judged as HunyuanVideo's, arguments as in `sampling_trial`.

    Another model than HunyuanVideo's: the text comes by cross-attention, which stays dense, and all self-attention is clustered.
    Another schedule: a fifth of the steps dense, which bounds the speed-up below 5, and 3.3 key clusters for a query cluster.
    """
    return sampling_trial("wan", **point, dense_steps=0.2)

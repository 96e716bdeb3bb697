"""SVG2: how much faster does a video diffusion model sample, and how far are its samples from those of dense attention?

No video model comes with a package, so a small one is trained here for half a minute: a diffusion transformer over patches of
clips (moving crops of photographs, conditioned on which one), with the attention modules of diffusers' Wan and 3-D rotary
positions. It trains on short clips of small frames and samples longer ones of larger frames; samples are judged only against the
same model's dense samples from the same noise, as in the paper. Queries and keys are therefore those of a trained model, but of a
small one: S is 2k to 16k tokens where the paper has 75k to 119k.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.experiments.core import Quality, Trial, experiment
from assay.methods.attention.clusters import execute_clusters
from assay.methods.attention.svg2 import (
    SVG2Config,
    SVG2Processor,
    SVG2Sampling,
    cluster_mass,
    critical_clusters,
    dense_attention,
    kmeans,
)
from assay.workloads.attention import captured_qkv
from assay.workloads.images import PHOTOGRAPHS, clip, photograph
from assay.workloads.models import load_model
from assay.workloads.text import long_prompt

PATCH = 4  # pixels
GRID = (8, 8, 8)  # frames and patches of a training clip: 512 tokens
DIM, LAYERS, HEADS = 128, 4, 4
LONG = {"steps": 50, "updates": 2000}  # of full points

# ------------------------------------------------------------------------------------------------------------ the model


class Attention(nn.Module):
    """The part of diffusers' `Attention` that processors use."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.norm_q, self.norm_k = nn.RMSNorm(dim // heads, eps=1e-6), nn.RMSNorm(dim // heads, eps=1e-6)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Dropout(0.0)])
        self.processor: Callable[..., Any] | None = None

    def set_processor(self, processor: Callable[..., Any]) -> None:
        self.processor = processor

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        assert self.processor is not None
        return cast(Tensor, self.processor(self, hidden_states, **kwargs))


class Block(nn.Module):
    """A block of a diffusion transformer: attention and MLP, each shifted, scaled and gated by the condition."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.attn1 = Attention(dim, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.modulation = nn.Linear(dim, 6 * dim)
        nn.init.normal_(self.modulation.weight, std=0.02)

    def forward(self, x: Tensor, condition: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(condition)[:, None].chunk(6, dim=-1)
        x = x + (1 + gate) * self.attn1(self.norm(x) * (1 + scale) + shift, rotary_emb=rotary)
        return cast(Tensor, x + (1 + gate2) * self.mlp(self.norm(x) * (1 + scale2) + shift2))


class Denoiser(nn.Module):
    """Predicts the velocity of noised patches (batch, tokens, 3 * PATCH ** 2) at times (batch,) in [0, 1] and labels (batch,)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3 * PATCH**2, DIM)
        self.time = nn.Sequential(nn.Linear(64, DIM), nn.SiLU(), nn.Linear(DIM, DIM))
        self.label = nn.Embedding(len(PHOTOGRAPHS), DIM)
        self.blocks = nn.ModuleList([Block(DIM, HEADS) for _ in range(LAYERS)])
        self.head = nn.Linear(DIM, 3 * PATCH**2)

    def forward(self, x: Tensor, times: Tensor, labels: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        dtype = self.embed.weight.dtype
        angles = times[:, None] * 1000 * torch.logspace(0, -4, 32)
        condition = F.silu(self.time(torch.cat([angles.cos(), angles.sin()], -1).to(dtype)) + self.label(labels))
        x = self.embed(x.to(dtype))
        for block in self.blocks:
            x = block(x, condition, rotary)
        return cast(Tensor, self.head(F.rms_norm(x, (DIM,))))


def rotary(grid: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """cos and sin (tokens, head dim) for frames, rows and columns: a quarter of the pairs for time, the others for space."""
    pairs = DIM // HEADS // 2
    counts = (pairs // 4, (pairs - pairs // 4 + 1) // 2, (pairs - pairs // 4) // 2)
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in grid), indexing="ij")
    angles = [axis.flatten()[:, None] * 100.0 ** (-torch.arange(n) / n) for axis, n in zip(axes, counts, strict=True)]
    both = torch.cat(angles, dim=-1).repeat_interleave(2, dim=-1)
    return both.cos(), both.sin()


@functools.cache
def _photograph(label: int) -> Tensor:
    """A photograph made small enough that a crop of a few dozen pixels shows something."""
    image = photograph(PHOTOGRAPHS[label])[None]
    return F.interpolate(image, size=(160, 200), mode="bilinear", antialias=True)[0]


def patches(video: Tensor) -> Tensor:
    """(frames, 3, height, width) in [0, 1] as tokens (frames * rows * columns, 3 * PATCH ** 2) in [-1, 1]."""
    rows = video.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)  # frames, 3, rows, columns, PATCH, PATCH
    return rows.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2) * 2 - 1


@dataclass
class Dense(SVG2Sampling):
    """Dense attention at every step, by `attend`."""

    attend: Callable[[Tensor, Tensor, Tensor], Tensor] = F.scaled_dot_product_attention

    def attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, text: Tensor | None = None) -> Tensor:
        return self.attend(q, k, v)


@dataclass
class Measured(SVG2Sampling):
    """SVG2 that takes notes, which costs time: seconds of planning and attending, density of each sparse call, recall of some."""

    planning: float = 0.0
    attending: float = 0.0
    densities: list[float] = field(default_factory=list)
    recalls: list[float] = field(default_factory=list)
    iterations: int = 0  # of k-means, over both sides

    def attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, text: Tensor | None = None) -> Tensor:
        begin = time.perf_counter()
        plan = self.plan(layer, q, k, text=text)
        planned = time.perf_counter()
        out = dense_attention(q, k, v) if plan is None else execute_clusters(plan, q, k, v)
        self.attending += time.perf_counter() - planned
        self.planning += planned - begin
        if plan is not None:
            state = self._states[layer, 0]
            self.iterations += sum(len(x) for x in (state.query_inertia, state.key_inertia) if x is not None)
            self.densities.append(plan.density())
            if self.step == self.steps // 2 and q.shape[2] <= 4096:  # as dear as dense attention without a kernel
                self.recalls.append(float(plan.recall(q, k).mean()))
        return out


def set_attention(model: Denoiser, sampling: SVG2Sampling) -> None:
    for layer, block in enumerate(model.blocks):
        cast(Block, block).attn1.set_processor(SVG2Processor(sampling, layer))


def dense(steps: int, attend: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None) -> Dense:
    return Dense(SVG2Config(), LAYERS, steps, attend=attend or F.scaled_dot_product_attention)


def train(updates: int, *, batch: int = 2, seed: int = 0) -> tuple[Denoiser, float]:
    """A denoiser trained on `updates` batches of clips, and its loss over the last tenth."""
    torch.manual_seed(seed)
    model = Denoiser()
    set_attention(model, dense(1))
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.01)

    def rate(update: int) -> float:  # warm-up, then a cosine
        return min((update + 1) / 20, 1.0) * (0.5 + 0.5 * math.cos(math.pi * update / updates))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    angles, losses = rotary(GRID), []
    for update in range(updates):
        labels = torch.randint(len(PHOTOGRAPHS), (batch,))
        clips = [
            clip(_photograph(int(i)), GRID[0], GRID[1] * PATCH, seed=update * batch + n) for n, i in enumerate(labels)
        ]
        x0 = torch.stack([patches(one) for one in clips])
        times, noise = torch.rand(batch), torch.randn_like(x0)
        a, s = (f(times * math.pi / 2)[:, None, None] for f in (torch.cos, torch.sin))
        loss = F.mse_loss(model(a * x0 + s * noise, times, labels, angles), a * noise - s * x0)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(float(loss.detach()))
    last = losses[-max(1, updates // 10) :]
    return model.eval().requires_grad_(False), sum(last) / len(last)


def sample(
    model: Denoiser, noise: Tensor, grid: tuple[int, int, int], sampling: SVG2Sampling, *, label: int = 0
) -> Tensor:
    """DDIM from noise (batch, tokens, 3 * PATCH ** 2) in `sampling.steps` steps: tokens in [-1, 1], float32."""
    set_attention(model, sampling)
    angles, x = rotary(grid), noise
    labels = torch.full((len(noise),), label)
    times = torch.linspace(0.99, 0.0, sampling.steps + 1)
    with torch.no_grad():
        for now, then in zip(times[:-1], times[1:], strict=True):
            velocity = model(x, now.expand(len(x)), labels, angles).float()
            a, s = (now * math.pi / 2).cos(), (now * math.pi / 2).sin()
            clean, left = (a * x - s * velocity).clamp(-1, 1), s * x + a * velocity
            x = (then * math.pi / 2).cos() * clean + (then * math.pi / 2).sin() * left
            sampling.end_step()
    return x.clamp(-1, 1)


def psnr(found: Tensor, expected: Tensor) -> float:
    """Peak signal-to-noise ratio of tokens in [-1, 1], dB."""
    return float(10 * torch.log10(4 / (found - expected).square().mean().clamp(min=1e-12)))


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


def _captured(
    model: Denoiser, noise: Tensor, grid: tuple[int, int, int], steps: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Queries and keys of each layer, half way through a dense sampling."""
    found: list[tuple[Tensor, Tensor]] = []
    sampling = dense(steps)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if sampling.step == steps // 2:
            found.append((q.clone(), k.clone()))
        return dense_attention(q, k, v)

    sampling.attend = attend
    sample(model, noise, grid, sampling)
    yield from found


def sampling_trial(
    frames: int,
    side: int,
    clusters: Sequence[int],
    *,
    dense_steps: float,
    steps: int = 20,
    updates: int = 300,
    top_p: float = 0.9,
    others: Sequence[float] = (),
    text: int = 0,
) -> Trial:
    """Dense SDPA sampling against SVG2 sampling from the same noise, in bfloat16; `free` is dense by assay's exact kernel.

    `frames` of side x side patches, query and key `clusters`, a share `dense_steps` of the `steps` dense, `updates` of training.
    `others` are further values of top_p whose density and PSNR go into the details; `text` are tokens of the recall curves. No
    layer is kept dense: the paper's 3 % would be a quarter of four layers.
    """
    grid = (frames, side, side)
    config = SVG2Config(clusters[0], clusters[1], top_p, dense_steps=dense_steps, dense_layers=0.0)
    trained, loss = train(updates)
    model = trained.bfloat16()
    tokens = math.prod(grid)
    noise = torch.randn(1, tokens, 3 * PATCH**2, generator=torch.Generator().manual_seed(1))

    def run(sampling: SVG2Sampling) -> Tensor:
        return sample(model, noise, grid, sampling)

    @functools.cache
    def reference() -> Tensor:
        return run(dense(steps))

    def quality() -> Quality:
        return Quality("PSNR against the dense sample, dB", psnr(run(SVG2Sampling(config, LAYERS, steps)), reference()))

    def details() -> dict[str, Any]:
        notes = Measured(config, LAYERS, steps)
        begin = time.perf_counter()
        run(notes)
        whole = time.perf_counter() - begin
        curve = {}
        for top_p in others:
            other = Measured(replace(config, top_p=top_p), LAYERS, steps)
            curve[str(top_p)] = {"PSNR_dB": psnr(run(other), reference()), "density": _mean(other.densities)}
        heads_dim = HEADS * tokens * (DIM // HEADS)
        clusters = (config.query_clusters + config.key_clusters) / 2
        densities, shape = (0.1, 0.2, 0.3, 0.5), (config.query_clusters, config.key_clusters)
        found: dict[str, Any] = {
            "tokens": tokens,
            "training_loss": loss,
            "density": _mean(notes.densities),
            **({"recall": _mean(notes.recalls)} if notes.recalls else {}),
            "seconds": {"all, with notes": whole, "k-means and plan": notes.planning, "attention": notes.attending},
            "clustering_macs_per_dense_attention_macs": notes.iterations
            * clusters
            * heads_dim
            / (2 * tokens * heads_dim * LAYERS * steps),
            "PSNR_of_dense_by_our_kernel_dB": psnr(run(dense(steps, dense_attention)), reference()),
            "by_top_p": curve,
        }
        if tokens <= 2048:  # the true mass of larger ones does not fit comfortably
            curves = [recall_curves(q, k, shape, densities) for q, k in _captured(model, noise, grid, steps)]
            found["recall_of_the_denoiser"] = {"density": list(densities)} | {
                name: [_mean(list(x)) for x in zip(*(each[name] for each in curves), strict=True)] for name in curves[0]
            }
        if text:
            found["recall_on_text"] = text_curves(text)
        return found

    return Trial(
        baseline=lambda: run(dense(steps)),
        candidate=lambda: run(SVG2Sampling(config, LAYERS, steps)),
        free=lambda: run(dense(steps, dense_attention)),
        free_label="dense attention by assay's own exact kernel",
        quality=quality,
        details=details,
        pairs=3,
    )


def _mean(values: list[float]) -> float:
    return sum(values) / max(len(values), 1)


@experiment(
    "svg2/hunyuan-speedup",
    points={
        "smoke": [{"frames": 4, "side": 16, "clusters": [8, 16], "steps": 10, "updates": 10, "others": []}],
        "small": [
            {"frames": 8, "side": 16, "clusters": [16, 32], "others": [0.5, 0.7, 0.98], "text": 1024},
            {"frames": 16, "side": 16, "clusters": [32, 64], "others": []},
            {"frames": 32, "side": 16, "clusters": [32, 64], "others": [0.3], "top_p": 0.5},
        ],
        "full": [
            {"frames": frames, "side": side, "clusters": clusters, "top_p": top_p, **LONG, "others": [0.7, 0.98]}
            for frames, side in ((16, 16), (32, 16), (32, 32))
            for clusters in ([32, 64], [100, 250])
            for top_p in (0.9, 0.5)
        ],
    },
    minutes=15,
)
def hunyuan_speedup(**point: Any) -> Trial:
    """End-to-end sampling with the schedule for HunyuanVideo: a tenth of the steps dense, two key clusters for a query cluster.

    At the paper's top_p of 0.9 this model's samples stay far closer to the dense ones than the paper's 30 dB; 0.5 is nearer to
    what the paper trades for speed. This claim has the lengths, values of top_p and curves; arguments as in `sampling_trial`.
    """
    return sampling_trial(**point, dense_steps=0.1)


@experiment(
    "svg2/wan-speedup",
    points={
        "smoke": [{"frames": 4, "side": 16, "clusters": [6, 20], "steps": 10, "updates": 10}],
        "small": [{"frames": 12, "side": 16, "clusters": [16, 48], "top_p": 0.5}],
        "full": [{"frames": 32, "side": 32, "clusters": [75, 250], "top_p": top_p, **LONG} for top_p in (0.9, 0.5)],
    },
    minutes=15,
)
def wan_speedup(**point: Any) -> Trial:
    """The same denoiser, sampled with the schedule for Wan 2.1; arguments as in `sampling_trial`.

    It differs from HunyuanVideo's in what that schedule differs in: a fifth of the steps dense, which bounds the speed-up below
    5, and three key clusters for a query cluster. A point of one length says what that costs.
    """
    return sampling_trial(**point, dense_steps=0.2)

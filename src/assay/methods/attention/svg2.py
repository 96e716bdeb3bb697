"""Sparse VideoGen2: sparse attention for video diffusion transformers over clusters of similar tokens (arXiv 2505.18875).

Queries and keys of a layer are grouped by k-means, head by head. A softmax over the products of the centroids, weighted by the
sizes of the key clusters, estimates the attention mass between clusters. The fewest key clusters that hold a share `top_p` of a
query cluster's mass are attended to exactly, after a permutation that makes each cluster contiguous. The centroids of one denoising
step initialise the next step's k-means, which then needs 2 iterations instead of 50. The first layers and denoising steps stay dense.

Sources: the paper and the official code (k-means, selection, processors). `our choice`: first centres are drawn without
replacement, the same tokens for every batch row (so that rows, including the branches of classifier-free guidance, do not depend on
each other); keys are clustered once per key head (GQA); a head whose centres have stopped moving is left alone; any batch size.

When NOT to use it: causal attention, sequences of a few thousand tokens (k-means costs what it saves), one-step generators
(nothing to warm-start), small models (the authors report visible losses at 1.3B), or cross-attention.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks
from assay.methods.core import kernels
from assay.methods.core.attention.clusters import ClusterBackend, ClusterPlan, execute_clusters
from assay.methods.core.attention.diffusers_processor import real_tokens, self_attentions, set_attention
from assay.methods.core.attention.plan import AttentionPlan, Precision, execute

DISTANCES = 1 << 20  # distances that k-means holds at a time: 4 MiB, so that they stay in a processor's cache


# -------------------------------------------------------------------------------------------------------------- k-means


@dataclass(frozen=True)
class KMeans:
    """A clustering of (batch, heads, tokens, dim), in float32 (float64 for float64 input).

    `labels` int64 (batch, heads, tokens); `centroids` (batch, heads, clusters, dim), the means of their members, or where they
    were for clusters without members; `sizes` int64 (batch, heads, clusters); `inertia` (iterations, batch, heads), the sum of
    squared distances to the centres at each assignment.
    """

    labels: Tensor
    centroids: Tensor
    sizes: Tensor
    inertia: Tensor


def kmeans(
    x: Tensor,
    clusters: int,
    *,
    centres: Tensor | None = None,
    iterations: int = 50,
    tolerance: float = 1e-4,
    generator: torch.Generator | None = None,
) -> KMeans:
    """Euclidean k-means (Lloyd) of x (batch, heads, tokens, dim), each head on its own.

    Starts from `centres` (batch, heads, clusters, dim), or else from random tokens. Each iteration assigns every token to its
    nearest centre (the first of equals) and moves the centres to the means; a head stops after `iterations`, or when none of
    its centres moves by `tolerance`. tokens * clusters * dim MACs an iteration and head (1 MAC = 2 FLOPs).
    Distances are those of what is left when each head's mean token is taken away, so that an offset of all tokens costs no digits.
    Nor does their size: numbers whose squares float32 does not hold are clustered as smaller or larger ones, `inertia` alone is
    then infinite or 0. No rows give an empty clustering. Raises TypeError for arguments of another kind, ValueError for another
    shape, NaN or infinity, more clusters than tokens, or no iterations.

    >>> found = kmeans(torch.tensor([0.0, 1.0, 10.0, 11.0]).view(1, 1, 4, 1), 2, generator=torch.Generator().manual_seed(0))
    >>> sorted(found.centroids.flatten().tolist())
    [0.5, 10.5]
    """
    checks.tensor("x", x, shape=("batch", "heads", "tokens", "dim"), finite=True, empty=True)
    batch, heads, tokens, dim = x.shape
    checks.whole("dim of x", dim, low=1)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {checks.shown(generator)}")
    checks.whole("clusters", clusters, low=1, high=tokens)
    checks.whole("iterations", iterations, low=1)
    checks.number("tolerance", tolerance, low=0)
    x = x if x.dtype == torch.float64 else x.float()
    if centres is None:
        centres = _random_tokens(x, clusters, generator)
    else:
        checks.tensor("centres", centres, shape=(batch, heads, clusters, dim), device=x.device, finite=True, empty=True)
    centres = centres.to(x.dtype)
    scale = _power_of_two(x, centres)
    x, centres = x * scale, centres * scale
    middle = x.mean(2, keepdim=True)
    x, centroids = (x - middle).flatten(0, 1), (centres - middle).flatten(0, 1)
    limit = tolerance * scale.flatten()
    squares = torch.linalg.vector_norm(x, dim=(1, 2)).square()
    labels = torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device)
    sizes = torch.zeros(centroids.shape[:2], dtype=torch.int64, device=x.device)
    inertia, current = [], torch.zeros_like(squares)
    active = torch.ones_like(squares, dtype=torch.bool)
    for _ in range(iterations):
        rows = active.nonzero()[:, 0]
        part, old = (x, centroids) if len(rows) == len(x) else (x[rows], centroids[rows])
        found, distance, means, counts = _lloyd(part, old)
        active[rows] = (means - old).norm(dim=-1).amax(-1) >= limit[rows]
        current[rows] = (squares[rows] + distance).clamp(min=0)
        labels[rows], sizes[rows], centroids[rows] = found, counts, means
        inertia.append(current.clone())
        if not active.any():
            break
    shape = (batch, heads)
    history = torch.stack(inertia).unflatten(1, shape) / scale[:, :, 0, 0] / scale[:, :, 0, 0]
    centroids = (centroids.unflatten(0, shape) + middle) / scale
    return KMeans(labels.unflatten(0, shape), centroids, sizes.unflatten(0, shape), history)


def _power_of_two(x: Tensor, centres: Tensor) -> Tensor:
    """What brings each head's largest number to about 1 where its squares would leave float32, else 1: (batch, heads, 1, 1)."""
    if not x.numel():
        return x.new_ones(*x.shape[:2], 1, 1)
    largest = torch.maximum(x.abs().amax((2, 3)), centres.abs().amax((2, 3)))[..., None, None]
    reach, most = (40, 120) if x.dtype == torch.float32 else (400, 1000)  # exponents

    def power(value: float) -> float:
        exponent = math.frexp(value)[1]
        return 1.0 if not value or abs(exponent) <= reach else math.ldexp(1.0, -max(-most, min(most, exponent)))

    return largest.new_tensor([power(value) for value in largest.flatten().tolist()]).view_as(largest)


def _random_tokens(x: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """`count` different tokens of each head, the same in every batch row; drawn on the CPU, so alike on every device."""
    batch, heads, tokens, dim = x.shape
    chosen = torch.rand(heads, tokens, generator=generator).argsort(-1)[:, :count].to(x.device)
    return x.gather(2, chosen[None, :, :, None].expand(batch, -1, -1, dim))


def _lloyd(x: Tensor, old: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One iteration from the centres `old` (rows, clusters, dim): labels (rows, tokens), the sums of squared distances (rows,) less
    that of the squared tokens, the means of the members (`old` where there are none), and how many members there are."""
    if x.is_cpu and x.dtype == torch.float32 and x.numel() and _load():
        kernels.ran("k-means", "kernel")
        labels, closeness, sums, counts = torch.ops.assay.kmeans_step(x.contiguous(), old.contiguous())
        return labels, (-2 * closeness).to(x.dtype), _divided(sums, counts, old), counts
    kernels.ran("k-means", "torch")
    labels, distance = _nearest(x, old)
    return labels, distance, *_means(x, labels, old)


@functools.cache
def _load() -> bool:
    """Whether the kernel is there; makes it known to the cost counter (MACs)."""
    if not kernels.load("kmeans"):
        return False
    from assay.measure.cost import register_macs

    register_macs("assay::kmeans_step", _macs, "attention")
    return True


def _macs(x: Tensor, centres: Tensor, out: Any) -> int:
    return x.numel() * centres.shape[1]


def _nearest(x: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest centre of each token (rows, tokens), and the sum of squared distances (rows,) less that of the squared tokens."""
    rows, tokens, clusters = x.shape[0], x.shape[1], centres.shape[1]
    lengths = centres.square().sum(-1, keepdim=True)
    labels = torch.empty(rows, tokens, dtype=torch.int64, device=x.device)
    total = x.new_zeros(rows)
    together = max(1, DISTANCES // (tokens * clusters))
    step = max(1, DISTANCES // (max(1, min(together, rows)) * clusters))
    for r in range(0, rows, together):
        some = slice(r, r + together)
        for t in range(0, tokens, step):
            part = x[some, t : t + step].transpose(1, 2)
            closeness = torch.baddbmm(lengths[some], centres[some], part, beta=-1, alpha=2)  # rows, clusters, tokens
            most, labels[some, t : t + step] = _largest(closeness)
            total[some] -= most.sum(-1)
    return labels, total


def _largest(x: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of x (rows, clusters, tokens) over the clusters and which it is, the first of equals: (rows, tokens) each."""
    if not x.is_cpu:
        most, index = x.max(1)
        return most, index
    # On the CPU `max` with an index goes number by number, while max pooling of an image with its channels last (here the
    # tokens) is vectorised, index and all: ten times as fast.
    image = x.transpose(1, 2)[:, :, None]
    most, index = F.max_pool2d(image, (1, x.shape[1]), return_indices=True)
    return most[:, :, 0, 0], index[:, :, 0, 0]


def _means(x: Tensor, labels: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    """Means of the members (rows, clusters, dim), `old` where there are none, and how many members there are."""
    rows, clusters, dim = old.shape
    flat = (labels + torch.arange(rows, device=x.device)[:, None] * clusters).flatten()
    sums = x.new_zeros(rows * clusters, dim).index_add_(0, flat, x.reshape(-1, dim)).view(rows, clusters, dim)
    counts = torch.zeros(rows, clusters, dtype=torch.int64, device=x.device)
    counts.scatter_add_(1, labels, torch.ones_like(labels))
    return _divided(sums, counts, old), counts


def _divided(sums: Tensor, counts: Tensor, old: Tensor) -> Tensor:
    return torch.where(counts[:, :, None] > 0, sums / counts.clamp(min=1)[:, :, None], old)


# ------------------------------------------------------------------------------------------------------------ selection


def cluster_mass(
    query_centroids: Tensor, key_centroids: Tensor, key_sizes: Tensor, *, scale: float | None = None
) -> Tensor:
    """Estimated share of a query cluster's attention in each key cluster: (batch, heads, query clusters, key clusters).

    Softmax over key clusters of scale * (query centroid . key centroid), weighted by the sizes: m_j e^s_ij / sum m e^s. Rows sum
    to 1, empty clusters have 0. query_centroids (batch, heads, query clusters, dim), key_centroids (batch, key heads, key
    clusters, dim), key_sizes int64 (batch, key heads, key clusters); scale is dim ** -0.5 by default. Raises TypeError for
    arguments of another kind, ValueError for shapes that do not fit, and for sizes below 0 or that are all 0.
    """
    checks.tensor("query_centroids", query_centroids, ndim=4, empty=True)
    batch, heads, count, dim = query_centroids.shape
    checks.tensor("key_centroids", key_centroids, shape=(batch, "key heads", "key clusters", dim), empty=True)
    checks.tensor("key_sizes", key_sizes, shape=tuple(key_centroids.shape[:3]), dtype="integer", empty=True)
    _check_groups(heads, key_centroids.shape[1])
    if (key_sizes < 0).any() or not key_sizes.sum(-1).all():
        raise ValueError("key_sizes must be at least 0, and above 0 for one cluster of each head")
    scale = dim**-0.5 if scale is None else checks.number("scale", scale)
    groups, clusters = key_sizes.shape[1:]
    grouped = query_centroids.unflatten(1, (groups, heads // groups)).flatten(2, 3)
    scores = grouped @ key_centroids.to(grouped.dtype).transpose(-1, -2) * scale
    scores = scores + key_sizes.to(scores.dtype).log()[:, :, None]
    return scores.softmax(-1).view(batch, heads, count, clusters)


def critical_clusters(mass: Tensor, *, top_p: float = 0.9, min_ratio: float = 0.1) -> Tensor:
    """The key clusters each query cluster keeps: bool, in the shape of `mass` (..., key clusters).

    The fewest that hold `top_p` of the mass, the one that crosses it included, at least one; and in any case the best
    floor(min_ratio * key clusters). top_p = 1 keeps all, also those whose mass rounds to nothing.
    Raises ValueError unless both lie in [0, 1], and for NaN in the mass.
    """
    if checks.tensor("mass", mass, shape=("...", "key clusters"), empty=True).isnan().any():
        raise ValueError("mass must be numbers, got NaN in it")
    _check_share("top_p", top_p)
    _check_share("min_ratio", min_ratio)
    ranked, order = mass.double().sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(mass.shape[-1], device=mass.device)
    wanted = (ranked.cumsum(-1) - ranked < top_p) | (rank < max(1, int(min_ratio * mass.shape[-1])))
    return torch.zeros_like(mass, dtype=torch.bool).scatter(-1, order, wanted | (top_p >= 1))


def _check_groups(heads: int, key_heads: int) -> None:
    if not key_heads or heads % key_heads:
        raise ValueError(f"heads of queries must be a multiple of the heads of keys, got {heads} and {key_heads}")


def _check_share(name: str, value: float) -> None:
    checks.number(name, value, low=0, high=1)


# ------------------------------------------------------------------------------------------------------------- operator


@dataclass
class ClusterState:
    """What one attention layer remembers between denoising steps: its centroids, (batch, heads, clusters, dim).

    One for each layer, and one for each branch of classifier-free guidance that is called separately; branches that come as
    rows of a batch are separate anyway. `reset` it before another prompt, resolution or number of clusters. `seed` determines the
    first centres; the inertias (iterations, batch, heads) are those of the last clustering.
    """

    seed: int = 0
    query_centroids: Tensor | None = None
    key_centroids: Tensor | None = None
    query_inertia: Tensor | None = None
    key_inertia: Tensor | None = None

    def reset(self) -> None:
        """Forget everything but the seed."""
        self.query_centroids = self.key_centroids = self.query_inertia = self.key_inertia = None


def update_clusters(
    q: Tensor,
    k: Tensor,
    state: ClusterState,
    *,
    query_clusters: int = 400,
    key_clusters: int = 1000,
    iterations: int = 50,
    warm_iterations: int = 2,
    tolerance: float = 1e-4,
) -> tuple[KMeans, KMeans]:
    """Cluster q (batch, heads, tokens, dim) and k (batch, key heads, tokens, dim), and remember the centroids in `state`.

    `iterations` at most from random tokens the first time, `warm_iterations` from the remembered centroids afterwards. Raises
    ValueError when the state was made for other shapes.
    """
    wanted = tuple((*x.shape[:2], count, x.shape[3]) for x, count in ((q, query_clusters), (k, key_clusters)))
    if state.query_centroids is None or state.key_centroids is None:
        generator = torch.Generator().manual_seed(state.seed)
        queries = kmeans(q, query_clusters, iterations=iterations, tolerance=tolerance, generator=generator)
        keys = kmeans(k, key_clusters, iterations=iterations, tolerance=tolerance, generator=generator)
    else:
        known = (tuple(state.query_centroids.shape), tuple(state.key_centroids.shape))
        if known != wanted:
            raise ValueError(
                f"state has centroids {known[0]} and {known[1]}, needed are {wanted[0]} and {wanted[1]}: "
                "reset() it before another prompt or resolution"
            )
        options: dict[str, Any] = {"iterations": warm_iterations, "tolerance": tolerance}
        queries = kmeans(q, query_clusters, centres=state.query_centroids, **options)
        keys = kmeans(k, key_clusters, centres=state.key_centroids, **options)
    state.query_centroids, state.key_centroids = queries.centroids, keys.centroids
    state.query_inertia, state.key_inertia = queries.inertia, keys.inertia
    return queries, keys


def svg2_plan(
    q: Tensor,
    k: Tensor,
    state: ClusterState,
    *,
    top_p: float = 0.9,
    min_ratio: float = 0.1,
    text: Tensor | None = None,
    scale: float | None = None,
    **clustering: Any,
) -> ClusterPlan:
    """The blocks SVG2 computes, as a plan to `execute_clusters`; updates the centroids in `state`.

    q is (batch, heads, tokens, dim) and k (batch, key heads, tokens, dim) after norms and rotary embedding. `text` is bool (batch,
    text tokens): the last tokens are a prompt, True where a token is real. Text is not clustered: real text tokens are one more
    cluster, which sees and is seen by everything, and padding another, which sees only itself. `clustering` are the settings of
    `update_clusters`. Raises ValueError for bad settings or shapes.
    """
    checks.tensor("q", q, shape=("batch", "heads", "tokens", "dim"), empty=True)
    checks.tensor("k", k, shape=(len(q), "key heads", *q.shape[2:]), empty=True)
    _check_groups(q.shape[1], k.shape[1])
    _check_share("top_p", top_p)
    _check_share("min_ratio", min_ratio)
    words = 0 if text is None else _check_text(text, q)
    video = q.shape[2] - words
    queries, keys = update_clusters(q[:, :, :video].detach(), k[:, :, :video].detach(), state, **clustering)
    mass = cluster_mass(queries.centroids, keys.centroids, keys.sizes, scale=scale)
    mask = critical_clusters(mass, top_p=top_p, min_ratio=min_ratio)
    if text is None:
        return ClusterPlan.from_labels(queries.labels, keys.labels, mask)
    return ClusterPlan.from_labels(
        _with_text(queries.labels, text, mask.shape[2]), _with_text(keys.labels, text, mask.shape[3]), _text_mask(mask)
    )


def _check_text(text: Tensor, q: Tensor) -> int:
    checks.tensor("text", text, shape=("batch", "text tokens"), dtype="bool", empty=True)
    if text.shape[0] != q.shape[0] or text.shape[1] >= q.shape[2]:
        raise ValueError(
            f"text must be bool ({q.shape[0]}, text tokens), fewer than the {q.shape[2]} tokens, "
            f"got {text.dtype} {tuple(text.shape)}"
        )
    return text.shape[1]


def _with_text(labels: Tensor, text: Tensor, clusters: int) -> Tensor:
    """Text tokens after the video: cluster `clusters` where they are real, `clusters` + 1 where they are padding."""
    words = torch.where(text.to(labels.device), clusters, clusters + 1)[:, None].expand(-1, labels.shape[1], -1)
    return torch.cat([labels, words], dim=-1)


def _text_mask(mask: Tensor) -> Tensor:
    """The mask with two more rows and columns: real text sees and is seen by all, padding sees only itself."""
    wide = F.pad(mask, (0, 2, 0, 2))
    wide[..., :-1, -2] = wide[..., -2, :-1] = True
    wide[..., -1, -1] = True
    return wide


def cluster_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: ClusterState,
    *,
    top_p: float = 0.9,
    min_ratio: float = 0.1,
    text: Tensor | None = None,
    scale: float | None = None,
    backend: ClusterBackend = "auto",
    precision: Precision = "input",
    **clustering: Any,
) -> Tensor:
    """SVG2's attention, not causal: (batch, heads, tokens, value dim). Arguments as in `svg2_plan` and `execute_clusters`.

    |out - dense| <= 2 * dropped mass * max |v|, the mass being that of the exact softmax (`plan.recall` measures it).
    """
    plan = svg2_plan(q, k, state, top_p=top_p, min_ratio=min_ratio, text=text, scale=scale, **clustering)
    return execute_clusters(plan, q, k, v, backend=backend, scale=scale, precision=precision)


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, *, text: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """What SVG2 approximates: every token sees all but padding text, which sees only itself. Shapes as above."""
    if text is None or (_check_text(text, q) and text.all()):
        return execute(AttentionPlan(q.shape[2], k.shape[2], causal=False), q, k, v, scale=scale)
    video = q.shape[2] - _check_text(text, q)
    padding = F.pad(~text.to(q.device), (video, 0)).long()[:, None]
    mask = torch.eye(2, dtype=torch.bool, device=q.device).expand(*q.shape[:2], 2, 2)
    queries, keys = padding.expand(-1, q.shape[1], -1), padding.expand(-1, k.shape[1], -1)
    return execute_clusters(ClusterPlan.from_labels(queries, keys, mask), q, k, v, scale=scale)


# ------------------------------------------------------------------------------------------------------ whole generation


@dataclass(frozen=True)
class SVG2Config:
    """Settings of a generation. Defaults are the official ones for HunyuanVideo; for Wan 2.1: query_clusters 300, dense_steps 0.2.

    The first `dense_steps` of the denoising steps and the first `dense_layers` of the layers are dense (shares of all);
    `cluster_in_dense_steps` runs k-means there already, so that the first sparse step starts warm.
    """

    query_clusters: int = 400
    key_clusters: int = 1000
    top_p: float = 0.9
    min_ratio: float = 0.1
    dense_steps: float = 0.1
    dense_layers: float = 0.03
    iterations: int = 50
    warm_iterations: int = 2
    tolerance: float = 1e-4
    cluster_in_dense_steps: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("top_p", "min_ratio", "dense_steps", "dense_layers"):
            _check_share(name, getattr(self, name))
        for name in ("query_clusters", "key_clusters", "iterations", "warm_iterations"):
            checks.whole(name, getattr(self, name), low=1)
        checks.number("tolerance", self.tolerance, low=0)
        checks.flag("cluster_in_dense_steps", self.cluster_in_dense_steps)
        checks.whole("seed", self.seed)

    def clustering(self) -> dict[str, Any]:
        """The settings of `update_clusters`."""
        names = ("query_clusters", "key_clusters", "iterations", "warm_iterations", "tolerance")
        return {name: getattr(self, name) for name in names}


def _part(share: float, count: int) -> float:
    """share * count; 0.07 of 100 are 7, not the 7.000000000000001 that would take an eighth."""
    return round(share * count, 9)


@dataclass
class SVG2Sampling:
    """The attention of a model over one generation: counts denoising steps, keeps the state of each layer and branch.

    Call `end_step` after each denoising step, or give `on_step_end` to a diffusers pipeline as its `callback_on_step_end`; the
    last step resets the states. Call `reset` after a generation that was interrupted. `branches` is how often the model is called
    in a step: 2 where classifier-free guidance calls it once for each branch, 1 where branches are rows of a batch.
    """

    config: SVG2Config
    layers: int
    steps: int
    branches: int = 1
    backend: ClusterBackend = "auto"
    precision: Precision = "input"
    step: int = field(default=0, init=False)
    _states: dict[tuple[int, int], ClusterState] = field(default_factory=dict, init=False, repr=False)
    _calls: dict[int, int] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("layers", "steps", "branches"):
            checks.whole(name, getattr(self, name), low=1)

    def reset(self) -> None:
        """Back to the first step, with nothing remembered."""
        self.step = 0
        self._states.clear()
        self._calls.clear()

    def end_step(self) -> None:
        """A denoising step is over; after the last one everything is reset."""
        self.step += 1
        self._calls.clear()
        if self.step >= self.steps:
            self.reset()

    def on_step_end(self, pipeline: Any, step: int, timestep: Any, callback_kwargs: dict[str, Any]) -> dict[str, Any]:
        """`end_step` in the form of diffusers' `callback_on_step_end`. Raises ValueError when the pipeline counts otherwise."""
        if step != self.step:
            raise ValueError(
                f"the pipeline ended step {step}, expected was {self.step} of {self.steps}: give steps=num_inference_steps, "
                "and call reset() after a generation that was broken off"
            )
        self.end_step()
        return callback_kwargs

    def is_dense(self, layer: int) -> bool:
        """Whether a layer is dense at this step."""
        early = self.step < _part(self.config.dense_steps, self.steps)
        return early or layer < _part(self.config.dense_layers, self.layers)

    def plan(
        self, layer: int, q: Tensor, k: Tensor, *, text: Tensor | None = None, scale: float | None = None
    ) -> ClusterPlan | None:
        """The plan of a layer's next call in this step, None for dense attention. Raises ValueError beyond the `branches`."""
        checks.whole("layer", layer, low=0, high=self.layers - 1)
        branch = self._calls.get(layer, 0)
        if branch >= self.branches:
            raise ValueError(
                f"layer {layer} was called more than {self.branches} times in step {self.step}: call end_step() after each "
                "step (on_step_end as callback_on_step_end), or set branches to the model's calls in a step"
            )
        self._calls[layer] = branch + 1
        config = self.config
        state = self._states.setdefault((layer, branch), ClusterState(config.seed + layer))
        if self.is_dense(layer):
            if config.cluster_in_dense_steps and layer >= _part(config.dense_layers, self.layers):
                video = q.shape[2] - (0 if text is None else _check_text(text, q))
                update_clusters(q[:, :, :video].detach(), k[:, :, :video].detach(), state, **config.clustering())
            return None
        options = {"top_p": config.top_p, "min_ratio": config.min_ratio, **config.clustering()}
        return svg2_plan(q, k, state, text=text, scale=scale, **options)

    def attention(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, text: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        """Attention of a layer, dense or sparse as the schedule says; shapes as in `svg2_plan`."""
        plan = self.plan(layer, q, k, text=text, scale=scale)
        if plan is None:
            return dense_attention(q, k, v, text=text, scale=scale)
        return execute_clusters(plan, q, k, v, backend=self.backend, scale=scale, precision=self.precision)


def install(
    model: nn.Module, config: SVG2Config, *, steps: int, branches: int = 1, text_first: bool = False, **options: Any
) -> SVG2Sampling:
    """SVG2 as the self-attention of a diffusers video transformer, for generations of `steps` steps; returns its `SVG2Sampling`.

    Sets attention processors through `diffusers_processor.set_attention`: Wan, HunyuanVideo, CogVideoX and others whose blocks
    have names as in `diffusers_processor.self_attentions`. Text that is attended to jointly stays out of the clusters; it must
    follow the video (HunyuanVideo) or, with `text_first`, precede it (CogVideoX). An attention mask may leave out text only.
    `options` as in `SVG2Sampling`. Raises ValueError when the model has no such self-attention.
    """
    sampling = SVG2Sampling(config, len(self_attentions(model)), steps, branches, **options)
    attach(model, sampling, text_first=text_first)
    return sampling


def attach(model: nn.Module, sampling: SVG2Sampling, *, text_first: bool = False) -> None:
    """`install` with an existing `SVG2Sampling`; raises ValueError when it is for another number of layers."""
    set_attention(model, [functools.partial(_attend, sampling, layer, text_first) for layer in range(sampling.layers)])


def _attend(
    sampling: SVG2Sampling,
    layer: int,
    text_first: bool,
    module: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    text: int,
) -> Tensor:
    real = real_tokens(mask, q)
    if causal or real is None:
        given = "causal attention" if causal or mask is None else f"a mask {mask.dtype} {tuple(mask.shape)}"
        raise ValueError(f"attention_mask must be none or bool (batch, 1, 1, tokens), not causal; got {given}")
    if text and text_first:
        q, k, v = (x.roll(-text, 2) for x in (q, k, v))
        real = real.roll(-text, 1)
    video = q.shape[2] - text
    if not real[:, :video].all():
        raise ValueError("attention_mask must leave out text tokens only, not video tokens (see text_first)")
    out = sampling.attention(layer, q, k, v, text=real[:, video:] if text else None, scale=scale)
    return out.roll(text, 2) if text and text_first else out

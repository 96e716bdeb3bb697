"""Binary codes and how they are searched: bits, Hamming distance, average precision over ties, how much an image was changed.

A model under test gives real codes; their signs are the stored bits. Short codes tie all the time, and the order of ties changes
average precision by points, so `average_precision` is the expectation over all orders of tied items: no sort, no luck.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from assay import checks

Norm = Literal["linf", "rms"]
NORMS: tuple[Norm, ...] = ("linf", "rms")
CHUNK, PAIRS = 256, 1 << 24  # images, or queries, at a time; pairs of a query and an item at a time


# -------------------------------------------------------------------------------------------------------------------- codes


def bits_of(codes: Tensor) -> Tensor:
    """+1 where a real code is 0 or above, -1 below. `sign` would leave a 0 that is neither bit.

    >>> bits_of(torch.tensor([-0.3, 0.0, 2.0]))
    tensor([-1.,  1.,  1.])
    """
    return torch.where(codes >= 0, 1.0, -1.0).to(codes.dtype)


def pack(codes: Tensor) -> Tensor:
    """Codes (N, bits) as bytes, uint8 (N, bits / 8): what `faiss.IndexBinaryFlat` takes. The first bit is the lowest of the first byte.

    Raises ValueError unless bits is a multiple of 8.
    """
    checks.tensor("codes", codes, shape=("items", "bits"))
    if codes.shape[1] % 8:
        raise ValueError(f"bits must be a multiple of 8 to be packed, got {codes.shape[1]}")
    weights = 2 ** torch.arange(8, device=codes.device)
    return ((codes >= 0).unflatten(1, (-1, 8)) * weights).sum(-1).to(torch.uint8)


def unpack(packed: Tensor) -> Tensor:
    """Bytes (N, bits / 8) as codes of +-1, float32 (N, bits): the inverse of `pack`.

    >>> unpack(torch.tensor([[5]], dtype=torch.uint8))
    tensor([[ 1., -1.,  1., -1., -1., -1., -1., -1.]])
    """
    checks.tensor("packed", packed, shape=("items", "bytes"), dtype=torch.uint8)
    places = torch.arange(8, device=packed.device)
    return bits_of(((packed[..., None] >> places) & 1).flatten(1).float() - 0.5)


def hamming(queries: Tensor, items: Tensor) -> Tensor:
    """In how many bits codes (Q, bits) and (N, bits) of +-1 differ, int64 (Q, N): (bits - <a, b>) / 2.

    >>> hamming(torch.tensor([[1.0, 1, -1]]), torch.tensor([[1.0, 1, -1], [-1, 1, 1]]))
    tensor([[0, 2]])
    """
    checks.tensor("queries", queries, shape=("queries", "bits"))
    checks.tensor("items", items, shape=("items", queries.shape[1]))
    return ((queries.shape[1] - queries.float() @ items.float().T) / 2).round().long()


def share_class(labels: Tensor, others: Tensor) -> Tensor:
    """Which label vectors (A, classes) and (B, classes) of 0 and 1 have a class in common, bool (A, B)."""
    return labels.float() @ others.float().T > 0


def average_precision(queries: Tensor, items: Tensor, relevant: Tensor) -> Tensor:
    """Expected average precision of each query over all orders of items at equal distance, float64 (Q,).

    `queries` (Q, bits) and `items` (N, bits) are codes of +-1, `relevant` bool (Q, N). In a group of n tied items, r of them relevant,
    with N0 items and R0 relevant ones before, the i-th place adds (r/n) (R0 + 1 + (i - 1)(r - 1)/(n - 1)) / (N0 + i) (McSherry and
    Najork, 2008). A query without a relevant item has 0 and counts in means, as in the released code, which sorts unstably instead.

    >>> codes = torch.tensor([[1.0, 1], [1, 1], [-1, 1]])
    >>> average_precision(codes[:1], codes[1:].repeat(2, 1), torch.tensor([[True, False, False, False]]))
    tensor([0.7500], dtype=torch.float64)
    """
    checks.tensor("relevant", relevant, shape=(len(queries), len(items)), dtype="bool")
    distances = hamming(queries, items)
    empty = torch.zeros(len(queries), queries.shape[1] + 1, dtype=torch.float64, device=queries.device)
    tied = empty.scatter_add(1, distances, torch.ones_like(distances, dtype=torch.float64))
    hits = empty.scatter_add(1, distances, relevant.double())
    before, found = tied.cumsum(1) - tied, hits.cumsum(1) - hits
    places = torch.arange(1, len(items) + 1, dtype=torch.float64, device=queries.device)
    harmonic = torch.cat([places.new_zeros(1), (1 / places).cumsum(0)])  # the sum of 1 / place over the first so many
    spread = harmonic[(before + tied).long()] - harmonic[before.long()]
    others = torch.where(tied > 1, (hits - 1) / (tied - 1).clamp(min=1), 0.0)
    share = hits / tied.clamp(min=1)
    gained = share * ((found + 1) * spread + others * (tied - (before + 1) * spread))
    return gained.sum(1) / hits.sum(1).clamp(min=1)


# ------------------------------------------------------------------------------------------------------------- models and data


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`model` in evaluation mode; every module's own mode comes back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class Victim:
    """A hashing model as attacks see it: any module that maps images (B, channels, H, W) in [0, 1] to real codes (B, bits).

    The sign of a code is its bit. Attacks follow tanh(slope * code), so the model should give what stands *before* its tanh; one that
    ends in a tanh is taken as it is with `ends_in_tanh=True` and has no slope: where it is saturated, gradients vanish and iterative
    attacks look weaker than they are. A model that wants normalised images is put behind its normalisation in an `nn.Sequential`.
    Nothing of the model changes: it is run in evaluation mode, which is put back.
    """

    def __init__(self, model: nn.Module, *, ends_in_tanh: bool = False) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self.model, self.ends_in_tanh = model, checks.flag("ends_in_tanh", ends_in_tanh)

    def real(self, images: Tensor) -> Tensor:
        """The model's own output. Raises ValueError unless it is one real code an image."""
        codes: Tensor = self.model(images)
        return checks.tensor("the model's output", codes, shape=(len(images), "bits"))

    def relaxed(self, images: Tensor, slope: float = 1.0) -> Tensor:
        """Codes in (-1, 1), with gradients."""
        real = self.real(images)
        return real if self.ends_in_tanh else torch.tanh(slope * real)

    @torch.no_grad()
    def bits(self, images: Tensor) -> Tensor:
        """Codes of +-1, (N, bits). Raises ValueError where the model gives NaN."""
        check_images("images", images)
        with evaluating(self.model):
            found = torch.cat([self.real(some) for some in images.split(CHUNK)])
        return bits_of(checks.tensor("the model's output", found, finite=True).float())


def check_images(name: str, images: Tensor) -> Tensor:
    """Images (B, channels, H, W) in [0, 1]. Raises TypeError or ValueError for anything else."""
    checks.tensor(name, images, shape=("batch", "channels", "height", "width"), finite=True)
    if images.min() < 0 or images.max() > 1:
        raise ValueError(f"{name} must lie in [0, 1], got {float(images.min()):.4g} to {float(images.max()):.4g}")
    return images


def check_labels(name: str, labels: Tensor, items: int, classes: int | None = None) -> Tensor:
    """Label vectors (items, classes) of 0 and 1 with at least one class each. Raises TypeError or ValueError for anything else."""
    checks.tensor(name, labels, shape=(items, "classes" if classes is None else classes))
    if not bool(((labels == 0) | (labels == 1)).all()) or not bool((labels.sum(1) > 0).all()):
        raise ValueError(
            f"{name} must be vectors of 0 and 1, with a 1 in each: torch.nn.functional.one_hot(classes).float()"
        )
    return labels


@dataclass(frozen=True, eq=False)
class Database:
    """What is searched: `codes` of +-1 (N, bits) and `labels` of 0 and 1 (N, classes); `images` too where attacks learn from them.

    An index that is there already: `Database(unpack(rows), labels)`. Raises ValueError for codes that are none and other shapes.
    """

    codes: Tensor
    labels: Tensor
    images: Tensor | None = None

    def __post_init__(self) -> None:
        checks.tensor("codes", self.codes, shape=("items", "bits"))
        if not bool((self.codes.abs() == 1).all()):
            raise ValueError("codes must be +1 and -1; bits_of(real codes) makes them")
        check_labels("labels", self.labels, len(self.codes))
        if self.images is not None and len(check_images("images", self.images)) != len(self.codes):
            raise ValueError(f"images must be as many as codes, {len(self.codes)}, got {len(self.images)}")

    @classmethod
    def of(cls, model: nn.Module | Victim, images: Tensor, labels: Tensor) -> Database:
        """Images (N, channels, H, W) in [0, 1] under the codes that the model gives them."""
        victim = model if isinstance(model, Victim) else Victim(model)
        return cls(victim.bits(images), labels.float(), images)

    def label_vectors(self) -> Tensor:
        """The distinct label vectors, (labels, classes): what can be a target."""
        found: Tensor = self.labels.unique(dim=0)
        return found

    def rows_of(self, label: Tensor) -> Tensor:
        """Which items have exactly this label vector, int64. Raises ValueError where none has."""
        rows = (self.labels == label).all(1).nonzero()[:, 0]
        if not len(rows):
            raise ValueError(f"a target label must be one of the database's, got {label.nonzero()[:, 0].tolist()}")
        return rows

    def average_precision(self, codes: Tensor, labels: Tensor) -> Tensor:
        """Of queries' codes (Q, bits), where items that share a class with `labels` (Q, classes) are relevant: float64 (Q,)."""
        some = max(1, min(CHUNK, PAIRS // len(self.codes)))
        parts = zip(codes.split(some), labels.split(some), strict=True)
        return torch.cat([average_precision(each, self.codes, share_class(of, self.labels)) for each, of in parts])


def targets_for(
    labels: Tensor, candidates: Tensor, *, generator: torch.Generator | None = None, own: bool = True
) -> Tensor:
    """A target label for each query, drawn uniformly from the label vectors `candidates`, (Q, classes).

    With `own` false none shares a class with the query's own label: then the clean images say nothing for the attack.
    Raises ValueError where a query has no such candidate.
    """
    if own:
        picks = torch.randint(len(candidates), (len(labels),), generator=generator)
    else:
        weights = (~share_class(labels, candidates)).float().cpu()
        if not bool((weights.sum(1) > 0).all()):
            raise ValueError("candidates must have a label that shares no class with each query's")
        picks = torch.multinomial(weights, 1, generator=generator)[:, 0]
    return candidates[picks.to(candidates.device)]


# ------------------------------------------------------------------------------------------------------- how much was changed


def change(images: Tensor, attacked: Tensor) -> Tensor:
    """Root of the mean squared change of each image's pixels, (B,), in the images' own unit."""
    return (attacked - images).flatten(1).square().mean(1).sqrt()


def perceptibility(images: Tensor, attacked: Tensor) -> float:
    """Root of the mean squared change over all pixels of all images.

    >>> perceptibility(torch.zeros(1, 1, 2, 2), torch.tensor([[[[1.0, 0], [0, 0]]]]))
    0.5
    """
    return float((attacked - images).square().mean().sqrt())


def within(attacked: Tensor, images: Tensor, bound: float | Tensor, norm: Norm = "linf") -> Tensor:
    """`attacked` brought within `bound` of `images` and into [0, 1]; differentiable.

    "linf" bounds the change of every pixel, "rms" an image's `change`: what leaves [0, 1] is cut first, so that it takes no share of the
    bound, then the change is shortened in its direction. `bound` is one number, or one an image.
    """
    if isinstance(bound, Tensor):
        bound = bound.view(-1, 1, 1, 1)
    delta = attacked.clamp(0, 1) - images
    if norm == "linf":
        limit = torch.as_tensor(bound, dtype=delta.dtype, device=delta.device)
        delta = delta.clamp(-limit, limit)
    else:
        size = delta.square().mean((1, 2, 3), keepdim=True).clamp(min=1e-20).sqrt()
        delta = delta * (bound / size).clamp(max=1)
    return (images + delta).clamp(0, 1)

"""Attacks that take many gradient steps an image, and what every attack offers.

    attack = DHTA(steps=200).fit(victim, database)
    attacked = attack(images, targets)              # images in [0, 1], one target label vector an image

P2P pulls an image towards the code of one random item of the target label, DHTA towards the majority of n = 9 codes, bit by bit: no code
has a smaller summed Hamming distance to them, and an odd n leaves no bit undecided.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal, Self

import torch
from torch import Tensor

from assay import checks
from assay.methods.vision.pros_gan.retrieval import (
    CHUNK,
    NORMS,
    Database,
    Norm,
    Victim,
    bits_of,
    change,
    check_images,
    check_labels,
    evaluating,
    within,
)

Direction = Literal["gradient", "sign", "unit"]
DIRECTIONS: tuple[Direction, ...] = ("gradient", "sign", "unit")
BOUND = 8 / 255
ROUNDS = 50  # in which noise that is cut at 0 and 1 is brought to its size, at most
SLOPES = ((0.5, 0.1), (0.6, 0.2), (0.7, 0.3), (0.8, 0.5), (0.9, 0.7), (1.0, 1.0))
"""Up to which share of the steps which slope of the tanh holds. The released code gives them for 2000 steps; for others, our choice."""


class Attack(ABC):
    """Images and target labels to attacked images. `fit` gives it the model and what it may know of the database.

    An attack that was fitted to one model and judged on another shows how well it transfers.
    """

    name: str
    bound: float | None
    norm: Norm
    victim: Victim | None = None
    database: Database | None = None

    def fit(self, victim: Victim, database: Database) -> Self:
        """Prepare for a model; returns itself."""
        self.victim, self.database = victim, database
        return self

    def ready(self, images: Tensor, targets: Tensor) -> tuple[Victim, Database]:
        """The model and the database, once all arguments are checked. Raises ValueError for an attack that was not fitted."""
        if self.victim is None or self.database is None:
            raise ValueError(f"{self.name} must be fitted first: fit(victim, database)")
        check_images("images", images)
        check_labels("targets", targets, len(images), self.database.labels.shape[1])
        return self.victim, self.database

    @abstractmethod
    def target_codes(self, targets: Tensor) -> Tensor | None:
        """The codes of +-1 that the attack aims at, (B, bits); None where it aims at none."""

    @abstractmethod
    def __call__(self, images: Tensor, targets: Tensor, *, bound: float | Tensor | None = None) -> Tensor:
        """Attacked images in [0, 1]. `bound` stands in place of the attack's own: one number, or one an image (B,)."""


def anchor_code(codes: Tensor) -> Tensor:
    """The majority of codes of +-1 (..., n, bits), bit by bit: (..., bits). A tie, which an even n allows, is +1.

    >>> anchor_code(torch.tensor([[1.0, -1], [1, -1], [-1, -1]]))
    tensor([ 1., -1.])
    """
    return bits_of(codes.sum(-2))


def slope_at(step: int, steps: int) -> float:
    """The tanh's slope at a step: flat at first, so that gradients flow, and steep at last, so that bits are those that are stored."""
    return next(slope for end, slope in SLOPES if step < end * steps)


def pull(
    victim: Victim,
    images: Tensor,
    codes: Tensor,
    *,
    steps: int,
    step: float,
    bound: float | Tensor,
    norm: Norm = "linf",
    direction: Direction = "gradient",
) -> Tensor:
    """Images moved towards codes of +-1 (B, bits): `steps` of gradient ascent on mean_k F(x)_k code_k, within `bound` after each.

    "gradient" moves by `step` times the gradient, as in the paper's baselines; "sign" each pixel by `step`; "unit" the image by a `change`
    of `step`. The gradient is that of each image alone. The released code divides it by its batch of 32 images, so its step of 1 is
    1 / 32 here. Not to be called in inference mode, in which there are no gradients.
    """
    images = images.detach()
    attacked = images
    with evaluating(victim.model), torch.enable_grad():
        for number in range(steps):
            moved = attacked.detach().requires_grad_()
            agreement = (victim.relaxed(moved, slope_at(number, steps)) * codes).mean(1).sum()
            (gradient,) = torch.autograd.grad(agreement, moved)
            if direction == "sign":
                gradient = gradient.sign()
            elif direction == "unit":
                gradient = gradient / change(torch.zeros_like(gradient), gradient).clamp(min=1e-20).view(-1, 1, 1, 1)
            attacked = within(moved.detach() + step * gradient, images, bound, norm)
    return attacked


class DHTA(Attack):
    """Deep hashing targeted attack (Bai et al., 2020) as ProS-GAN's baseline: `steps` gradient steps towards an anchor code of `n` items.

    `step`, `bound`, `norm` and `direction` as in `pull`. The items are drawn with replacement, anew for every image, from `seed`.
    Raises ValueError for counts below 1, a step or bound that is not above 0, and another norm or direction.
    When not to use it: the step of the plain gradient is right for one model only; `direction="unit"` with a step of a tenth of the bound
    needs no search, and a hundredth of the steps.
    """

    bound: float

    def __init__(
        self, *, n: int = 9, steps: int = 2000, step: float = 1.0, bound: float = BOUND, norm: Norm = "linf",
        direction: Direction = "gradient", seed: int = 0, name: str = "",
    ) -> None:  # fmt: skip
        self.n, self.steps = checks.whole("n", n, low=1), checks.whole("steps", steps, low=1)
        self.step, self.bound = checks.number("step", step, above=0), checks.number("bound", bound, above=0)
        self.norm, self.direction = (
            checks.choice("norm", norm, NORMS),
            checks.choice("direction", direction, DIRECTIONS),
        )
        self.seed = checks.whole("seed", seed, low=0)
        self.name = name or f"{type(self).__name__.lower()}-{steps}"

    def target_codes(self, targets: Tensor) -> Tensor:
        if self.database is None:
            raise ValueError(f"{self.name} must be fitted first: fit(victim, database)")
        generator = torch.Generator().manual_seed(self.seed)
        found = []
        for target in targets:
            rows = self.database.rows_of(target)
            picks = torch.randint(len(rows), (self.n,), generator=generator)
            found.append(anchor_code(self.database.codes[rows[picks.to(rows.device)]]))
        return torch.stack(found)

    def __call__(self, images: Tensor, targets: Tensor, *, bound: float | Tensor | None = None) -> Tensor:
        victim, _ = self.ready(images, targets)
        codes = self.target_codes(targets)
        limits = limits_of(self.bound if bound is None else bound, len(images), images)
        parts = zip(images.split(CHUNK), codes.split(CHUNK), limits.split(CHUNK), strict=True)
        return torch.cat([
            pull(victim, some, code, steps=self.steps, step=self.step, bound=limit, norm=self.norm, direction=self.direction)
            for some, code, limit in parts
        ])  # fmt: skip


class P2P(DHTA):
    """Point to point: `DHTA` towards the code of a single random item of the target label (n = 1)."""

    def __init__(self, *, n: int = 1, **settings: Any) -> None:
        super().__init__(n=n, **settings)


class Noise(Attack):
    """No attack: pixels are moved at random, by the bound under "linf", by normal draws whose `change` is the bound under "rms".

    What would leave [0, 1] moves the other way, where there is more room. It shows what a model does at such a change anyway. The change
    is exactly the bound wherever there is room for it: up to 0.4 always.
    """

    bound: float

    def __init__(self, *, bound: float = BOUND, norm: Norm = "linf", seed: int = 0, name: str = "noise") -> None:
        self.bound, self.norm = checks.number("bound", bound, above=0), checks.choice("norm", norm, NORMS)
        self.seed, self.name = checks.whole("seed", seed, low=0), name

    def target_codes(self, targets: Tensor) -> None:
        return None

    def __call__(self, images: Tensor, targets: Tensor, *, bound: float | Tensor | None = None) -> Tensor:
        self.ready(images, targets)
        limits = limits_of(self.bound if bound is None else bound, len(images), images)
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randn(images.shape, generator=generator).to(images)
        size = limits.view(-1, 1, 1, 1)
        if self.norm == "linf":
            return _moved(images, bits_of(drawn) * size)
        scale = size
        for _ in range(ROUNDS):
            attacked = _moved(images, drawn * scale)
            short = limits / change(images, attacked).clamp(min=1e-20)
            if bool(((short - 1).abs() < 1e-5).all()):
                break
            scale = scale * short.view(-1, 1, 1, 1)
        return attacked


def _moved(images: Tensor, moves: Tensor) -> Tensor:
    """Images moved within [0, 1]: the other way where a move would leave it and there is more room there."""
    room = torch.where(moves >= 0, 1 - images, images)
    turned = (moves.abs() > room) & (room < 0.5)
    return (images + torch.where(turned, -moves, moves)).clamp(0, 1)


def limits_of(bound: float | Tensor, images: int, like: Tensor) -> Tensor:
    """One bound an image."""
    if isinstance(bound, Tensor):
        return checks.tensor("bound", bound, shape=(images,)).to(like)
    return like.new_full((images,), checks.number("bound", bound, above=0))

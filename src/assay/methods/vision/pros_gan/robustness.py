"""How robust is my hashing model, and what does an attack cost: `HashRobustness(model, database, attacks).report(images, labels)`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from assay import checks
from assay.methods.vision.pros_gan.attacks import Attack, Noise
from assay.methods.vision.pros_gan.retrieval import (
    Database,
    Victim,
    change,
    check_images,
    check_labels,
    perceptibility,
    share_class,
    targets_for,
)

CLEAN = "clean"
DRAWS = 1000  # of the bootstrap


@dataclass(frozen=True)
class Row:
    """One attack's figures; the attack "clean" changes nothing. Shares lie in [0, 1], changes in the images' unit, [0, 1].

    `t_map` is mean average precision where what shares a class with the *target* is relevant: the attack's success, with `low` and `high`
    its 95 % interval over queries. `map` is that of the query's own label. `noise_t_map` is `t_map` of random noise that changes each
    image as much: an attack that is no better found nothing. `ceiling` is `t_map` of the codes the attack aims at, were they the queries
    (None for an attack that was made for another model).
    `milliseconds` is the wall time of an image, in one run of all, without training.
    """

    attack: str
    t_map: float
    low: float
    high: float
    map: float
    noise_t_map: float | None
    ceiling: float | None
    perceptibility: float
    largest: float
    milliseconds: float


@dataclass(frozen=True)
class Report:
    """What `HashRobustness.report` found: one `Row` an attack, "clean" first."""

    rows: tuple[Row, ...]
    queries: int
    items: int
    bits: int

    def __getitem__(self, attack: str) -> Row:
        """The row of an attack, by its name. Raises KeyError with the names there are."""
        found = {row.attack: row for row in self.rows}
        if attack not in found:
            raise KeyError(f"attack must be one of {', '.join(found)}, got {attack!r}")
        return found[attack]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and texts, for JSON."""
        return asdict(self)

    def table(self) -> str:
        """One line an attack."""
        names = [field.name for field in fields(Row)]
        lines = [names, *([_shown(getattr(row, name)) for name in names] for row in self.rows)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(names))]
        return "\n".join("  ".join(cell.ljust(wide) for cell, wide in zip(line, widths, strict=True)) for line in lines)


class HashRobustness:
    """Attacks a hashing model and says how often they succeed, how visible they are and what they cost.

    `model` maps images (B, channels, H, W) in [0, 1] to real codes, best before their tanh (see `Victim`, which may be given in its place).
    Attacks that were not fitted yet are, to this model; one that was fitted to another model shows how well it transfers. Compare
    attacks at equal perceptibility only: `ProSGAN` has no bound of its own unless it is given one.

    Raises ValueError for two attacks of one name, and codes of another length than the database's.
    When not to use it: as proof that a model is safe. A low t-MAP says that these attacks failed, at this bound; look at the interval, at
    `noise_t_map`, and at more steps.

    >>> from assay.methods.vision.pros_gan import DHTA
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 8))
    >>> images, labels = torch.eye(4).view(4, 1, 2, 2), torch.eye(4)
    >>> database = Database.of(model, images, labels)
    >>> report = HashRobustness(model, database, [DHTA(steps=5, bound=0.1)]).report(images, labels)
    >>> [row.attack for row in report.rows], report["dhta-5"].largest <= 0.1001
    (['clean', 'dhta-5'], True)
    """

    def __init__(
        self, model: nn.Module | Victim, database: Database, attacks: Sequence[Attack], *, seed: int = 0
    ) -> None:
        self.victim = model if isinstance(model, Victim) else Victim(model)
        self.database, self.attacks = database, tuple(attacks)
        self.seed = checks.whole("seed", seed, low=0)
        names = [CLEAN, *(attack.name for attack in self.attacks)]
        if len(set(names)) < len(names):
            raise ValueError(f"attacks must have different names (name=...), got {', '.join(names)}")

    def report(self, images: Tensor, labels: Tensor, *, targets: Tensor | None = None) -> Report:
        """Attack queries (Q, channels, H, W) in [0, 1] with labels (Q, classes) of 0 and 1.

        `targets` (Q, classes) are the labels to be retrieved; without them, one of the database's that shares no class with the query's own
        is drawn for each.
        """
        check_images("images", images)
        classes = self.database.labels.shape[1]
        check_labels("labels", labels, len(images), classes)
        if targets is None:
            generator = torch.Generator().manual_seed(self.seed)
            targets = targets_for(labels, self.database.label_vectors(), generator=generator, own=False)
        check_labels("targets", targets, len(images), classes)
        if not bool(share_class(targets, self.database.labels).any(1).all()):
            raise ValueError("targets must share a class with some item of the database")
        rows = [self._row(CLEAN, images, images, labels, targets, None, 0.0)]
        for attack in self.attacks:
            if attack.victim is None:
                attack.fit(self.victim, self.database)
            start = _now(images)
            attacked = attack(images, targets)
            seconds = _now(images) - start
            own = (
                attack.victim is not None and attack.victim.model is self.victim.model
            )  # another model's codes say nothing
            codes = attack.target_codes(targets) if own else None
            rows.append(self._row(attack.name, images, attacked, labels, targets, codes, seconds))
        return Report(tuple(rows), len(images), len(self.database.codes), self.database.codes.shape[1])

    def _row(
        self, name: str, images: Tensor, attacked: Tensor, labels: Tensor, targets: Tensor, codes: Tensor | None, seconds: float
    ) -> Row:  # fmt: skip
        found = self.victim.bits(attacked)
        success = self.database.average_precision(found, targets)
        generator = torch.Generator().manual_seed(self.seed)
        resampled = success.cpu()[torch.randint(len(success), (DRAWS, len(success)), generator=generator)].mean(1)
        low, high = resampled.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        changed = change(images, attacked)
        noise = None
        if name != CLEAN:
            moved = Noise(norm="rms", seed=self.seed).fit(self.victim, self.database)(images, targets, bound=changed)
            noise = float(self.database.average_precision(self.victim.bits(moved), targets).mean())
        ceiling = None if codes is None else float(self.database.average_precision(codes, targets).mean())
        return Row(
            name,
            float(success.mean()),
            low,
            high,
            float(self.database.average_precision(found, labels).mean()),
            noise,
            ceiling,
            perceptibility(images, attacked),
            float((attacked - images).abs().max()),
            1000 * seconds / len(images),
        )


def _now(images: Tensor) -> float:
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def _shown(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else f"{value:.4f}"

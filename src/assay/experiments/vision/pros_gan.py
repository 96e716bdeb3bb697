"""ProS-GAN: does one forward pass attack as well as thousands of gradient steps do at equal perceptibility, and how much faster is it?

The model under test is a small one of DPSH's kind, trained here on handwritten digits: the training part is the database, other digits are
queries, and the label to be retrieved is another digit. Perceptibility is equal image by image: the root mean square by which the
generator changed an image is the radius within which every other attack of that image must stay.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.experiments.core import Figure, Guard, Operator, Quality, Trained, Trial, experiment
from assay.experiments.rates import Rate, chosen, searched
from assay.measure.cost import count_cost
from assay.methods.vision.pros_gan import (
    DHTA,
    P2P,
    Database,
    Generator,
    Noise,
    ProSGAN,
    PrototypeNet,
    Victim,
    change,
    code_loss,
    fit_prototypes,
    pairwise_loss,
    share_class,
    targets_for,
    train_on_attacked,
)
from assay.methods.vision.pros_gan.networks import FEATURES
from assay.workloads.images import digits_split

CLASSES, BITS, LEARN, STEP = 10, 32, "pros_gan/learning", "pros_gan/step"
VICTIM_STEPS, PROTOTYPE_STEPS, EPOCHS, HIDDEN, SIZE, WIDTH, REC_WEIGHT, LEVEL = 300, 600, 10, 512, 16, 8, 50.0, 0.1
CHOICE_SEED = 0  # of what rates are chosen by: nothing that is judged
DRAWS = 2000  # of the bootstrap
QUICK = 20  # steps of the free baseline
SHORTER = (20, 200)  # steps of DHTA beside those that decide


# ------------------------------------------------------------------------------------------------------------------ the victim


class Hasher(nn.Module):
    """Images (B, 1, size, size) in [0, 1] to real codes (B, 32), before any tanh."""

    def __init__(self, size: int, width: int = 16) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(2 * width * (size // 4) ** 2, BITS),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out


@dataclass(frozen=True)
class Digits:
    """Images (N, 1, size, size) and label vectors (N, 10): to learn from and to search in, for choices, and to judge on."""

    images: Tensor
    labels: Tensor
    choose: Tensor
    choose_labels: Tensor
    heldout: Tensor
    heldout_labels: Tensor


@cache
def digits_at(size: int) -> Digits:
    """Digits scaled up from 8 pixels; a third of the test part is for choices."""
    images, classes, others, other_classes = digits_split(0)
    large = [F.interpolate(some, (size, size), mode="bilinear").clamp(0, 1) for some in (images, others)]
    labels = [F.one_hot(some, CLASSES).float() for some in (classes, other_classes)]
    cut = len(others) // 3
    return Digits(large[0], labels[0], large[1][:cut], labels[1][:cut], large[1][cut:], labels[1][cut:])


@cache
def victim_of(seed: int, size: int, rate: float, width: int = 16) -> Victim:
    """A model trained on the database's digits, never attacked."""
    torch.manual_seed(seed)
    known = digits_at(size)
    return Victim(
        train_on_attacked(
            Hasher(size, width), known.images, known.labels, steps=VICTIM_STEPS, rate=rate, attack_steps=0, seed=seed
        )
    )


def mean_precision(victim: Victim, database: Database, images: Tensor, labels: Tensor) -> Tensor:
    """Average precision of each image, where `labels` are relevant."""
    return database.average_precision(victim.bits(images), labels)


# ------------------------------------------------------------------------------------------------- rates and steps, searched once


@searched(LEARN, arms=("victim", "prototypes", "generator"), grid=(3e-4, 1e-3, 3e-3, 1e-2))
def score(arm: str, rate: float) -> float:
    """The victim by its precision, the others by their own loss, on digits for choices (the discriminator's share left out)."""
    known = digits_at(SIZE)
    victim = victim_of(CHOICE_SEED, SIZE, rate if arm == "victim" else chosen(LEARN, "victim").rate)
    database = Database.of(victim, known.images, known.labels)
    if arm == "victim":
        return 1 - float(mean_precision(victim, database, known.choose, known.choose_labels).mean())
    if arm == "prototypes":
        torch.manual_seed(CHOICE_SEED)
        net = fit_prototypes(PrototypeNet(CLASSES, BITS, hidden=HIDDEN), database, steps=PROTOTYPE_STEPS, rate=rate)
        with torch.no_grad():
            codes, labels = net(torch.eye(CLASSES)).code, torch.eye(CLASSES)
            return float(pairwise_loss(codes, victim.bits(known.choose), share_class(labels, known.choose_labels)))
    attack = generator_of(CHOICE_SEED, SIZE, WIDTH, EPOCHS, rate).fit(victim, database)
    targets = targets_of(CHOICE_SEED, known.choose_labels, database)
    attacked = attack(known.choose, targets)
    with torch.no_grad():
        hashed = code_loss(victim.relaxed(attacked), attack.target_codes(targets))
    return float(4 * REC_WEIGHT * F.mse_loss(attacked, known.choose) + 5 * hashed)  # 4: images in [0, 1], not [-1, 1]


def generator_of(seed: int, size: int, width: int, epochs: int, rate: float | None = None) -> ProSGAN:
    """The paper's attack at the size of these images, to be fitted."""
    return ProSGAN(
        epochs=epochs,
        rate=chosen(LEARN, "generator").rate if rate is None else rate,
        rec_weight=REC_WEIGHT,
        prototype_steps=PROTOTYPE_STEPS,
        prototype_rate=chosen(LEARN, "prototypes").rate,
        hidden=HIDDEN,
        width=width,
        label_width=label_width(width),
        discriminator_width=width,
        depth=int(math.log2(size)),
        seed=seed,
    )


def label_width(width: int) -> int:
    """Channels of a label's first map: the paper's share of the generator's, and no fewer than can be halved four times."""
    return max(16, 2 * width)


def targets_of(seed: int, labels: Tensor, database: Database) -> Tensor:
    """Another digit for each, drawn uniformly."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return targets_for(labels, database.label_vectors(), generator=generator, own=False)


@searched(STEP, arms=("20", "200", "2000"), grid=(0.1, 1.0, 10.0, 100.0))
def step_score(arm: str, step: float) -> float:
    """One less the t-MAP of DHTA at a length of its steps, on digits for choices, within a root mean square of `LEVEL`."""
    known, victim = digits_at(SIZE), victim_of(CHOICE_SEED, SIZE, chosen(LEARN, "victim").rate)
    database = Database.of(victim, known.images, known.labels)
    attack = DHTA(steps=int(arm), step=step, bound=LEVEL, norm="rms").fit(victim, database)
    images, labels = known.choose[:50], known.choose_labels[:50]
    targets = targets_of(CHOICE_SEED, labels, database)
    return 1 - float(mean_precision(victim, database, attack(images, targets), targets).mean())


# ------------------------------------------------------------------------------------------------------------------- the attacks


def equal_steps(size: int, width: int) -> int:
    """Gradient steps that take about the multiply-accumulates of one pass of the generator: a step is three passes of the victim."""
    work = passes(size, width)
    return max(1, round(work["generator"] / (3 * work["victim"])))


@cache
def passes(size: int, width: int) -> Mapping[str, int]:
    """Multiply-accumulates of one image through the generator and through the victim."""
    with torch.device("meta"):
        image, feature = torch.zeros(1, 1, size, size), torch.zeros(1, FEATURES)
        made = Generator(width=width, label_width=label_width(width), image_size=size, in_chans=1).eval()
        return {
            "generator": count_cost(made, image, feature).macs,
            "victim": count_cost(Hasher(size).eval(), image).macs,
        }


def iterative(steps: int, *, n: int = 9) -> DHTA:
    """A baseline of the paper at its own best step."""
    known = chosen(STEP, str(steps)).rate
    return (DHTA if n > 1 else P2P)(steps=steps, step=known, norm="rms")


def quick(steps: int, level: float) -> DHTA:
    """What an expert writes in ten lines: steps of equal length towards the anchor, two and a half radii in all."""
    return DHTA(steps=steps, step=2.5 * level / steps, norm="rms", direction="unit", name=f"quick-{steps}")


@dataclass(frozen=True)
class Seen:
    """Average precisions of one seed's queries, by arm, and what else was found."""

    arms: Mapping[str, np.ndarray]
    details: Mapping[str, Any]


@cache
def attacked(seed: int, size: int, width: int, epochs: int, queries: int, steps: int) -> Seen:
    """One victim, one generator trained against it, and every arm on the same queries, targets and radii."""
    known = digits_at(size)
    images, labels = known.heldout[:queries], known.heldout_labels[:queries]
    victim = victim_of(seed, size, chosen(LEARN, "victim").rate)
    database = Database.of(victim, known.images, known.labels)
    targets = targets_of(seed, labels, database)
    start = time.perf_counter()
    attack = generator_of(seed, size, width, epochs).fit(victim, database)
    seconds = time.perf_counter() - start

    made = attack(images, targets)
    radius = change(images, made)
    level = float(radius.mean())
    rivals = [iterative(count) for count in sorted({*SHORTER, steps})] + [iterative(min(200, steps), n=1)]
    rivals += [quick(count, level) for count in sorted({QUICK, equal_steps(size, width)})]
    arms = {"pros_gan": made, "clean": images}
    arms |= {rival.name: rival.fit(victim, database)(images, targets, bound=radius) for rival in rivals}
    wrong = targets_of(seed + 500, targets, database)
    arms["another label"] = attack(images, wrong)
    arms["noise"] = Noise(norm="rms").fit(victim, database)(images, targets, bound=radius)
    found = {name: mean_precision(victim, database, some, targets).numpy() for name, some in arms.items()}

    other = victim_of(seed + 100, size, chosen(LEARN, "victim").rate, width=24)  # who never saw an attack on it
    theirs = Database.of(other, known.images, known.labels)
    details = {
        "perceptibility": level,
        "training seconds": seconds,
        "map": float(mean_precision(victim, database, images, labels).mean()),
        "prototypes": float(database.average_precision(attack.target_codes(targets), targets).mean()),
        "anchors": float(database.average_precision(rivals[0].target_codes(targets), targets).mean()),
        "on another model": {
            name: float(mean_precision(other, theirs, arms[name], targets).mean())
            for name in ("clean", "pros_gan", f"dhta-{steps}")
        },
    }
    return Seen(found, details)


@dataclass(frozen=True)
class Compared:
    """All seeds: average precisions (seeds, queries) by arm."""

    arms: Mapping[str, np.ndarray]
    details: list[Mapping[str, Any]]

    def points(self, arm: str) -> float:
        """t-MAP in per cent."""
        return 100 * float(self.arms[arm].mean())

    def gain(self, arm: str, other: str) -> tuple[float, float, float]:
        """Points that an arm is better than another by, with a 95 % interval: queries and seeds resampled, in pairs."""
        gap = 100 * (self.arms[arm] - self.arms[other])
        seeds, queries = gap.shape
        generator = np.random.default_rng(0)
        rows = generator.integers(seeds, size=(DRAWS, seeds, 1))
        columns = generator.integers(queries, size=(DRAWS, 1, queries))
        low, high = np.quantile(gap[rows, columns].mean((1, 2)), (0.025, 0.975))
        return float(gap.mean()), float(low), float(high)


def compared(size: int, width: int, epochs: int, queries: int, steps: int, seeds: int) -> Compared:
    """Every arm under each seed."""
    seen = [attacked(seed, size, width, epochs, queries, steps) for seed in range(1, seeds + 1)]
    return Compared(
        {arm: np.stack([each.arms[arm] for each in seen]) for arm in seen[0].arms}, [each.details for each in seen]
    )


def trained(found: Compared) -> dict[str, Trained]:
    """Both trained arms beside their floors."""
    rates: dict[str, Rate] = {arm: chosen(LEARN, arm) for arm in ("victim", "generator")}
    scores = {
        "victim": ([each["map"] for each in found.details], 1 / CLASSES, "chance"),
        "generator": (found.arms["pros_gan"].mean(1).tolist(), float(found.arms["clean"].mean()), "clean images"),
    }
    return {
        arm: Trained(values, floor, name, rates[arm].rate, rates[arm].rates, higher_is_better=True, best=1.0)
        for arm, (values, floor, name) in scores.items()
    }


def hardened(size: int, level: float) -> dict[str, float]:
    """What the defence gives: t-MAP of quick steps, and precision on clean images, before and after training on attacked images."""
    known, victim = digits_at(size), victim_of(1, size, chosen(LEARN, "victim").rate)
    images, labels = known.heldout[:100], known.heldout_labels[:100]
    more: dict[str, Any] = {"steps": VICTIM_STEPS, "rate": chosen(LEARN, "victim").rate, "bound": level, "norm": "rms"}
    found = {}
    for name, attack_steps in (("as it was", 0), ("hardened", 5)):
        model = Victim(train_on_attacked(victim.model, known.images, known.labels, attack_steps=attack_steps, **more))
        database = Database.of(model, known.images, known.labels)
        targets = targets_of(1, labels, database)
        changed = quick(QUICK, level).fit(model, database)(images, targets, bound=level)
        found[f"{name}: t-MAP"] = 100 * float(mean_precision(model, database, changed, targets).mean())
        found[f"{name}: MAP"] = 100 * float(mean_precision(model, database, images, labels).mean())
    return found


# ------------------------------------------------------------------------------------------------------------------- the claims

PAPER: dict[str, Any] = {
    "data": "FLICKR-25K, NUS-WIDE, MS-COCO",
    "victim": "DPSH on VGG-11",
    "size": 224,
    "width": 64,
    "epochs": 100,
    "steps": 2000,
    "bound": "8/255",
    "own": True,
}
HERE = {
    "data": "handwritten digits, scaled up from 8 pixels: the three sets come with no package",
    "victim": "two convolutions and a linear layer, trained by DPSH's loss within batches: there are no weights of theirs here",
    "size": f"{SIZE} pixels (32 at full): digits have no more to show",
    "width": f"{WIDTH} channels and {HIDDEN} hidden features of a label (64 channels at full): the generator trains in seconds",
    "epochs": f"{EPOCHS} (100 at full), at a rate that was searched",
    "bound": "iterative attacks stay, image by image, within the generator's own root mean square change, so that perceptibility is equal",
    "own": "targets share no class with the query, or clean images would succeed by chance",
}
SMOKE = {"size": 16, "width": 4, "epochs": 1, "queries": 10, "steps": 20, "seeds": 3}
SMALL = {"size": SIZE, "width": WIDTH, "epochs": EPOCHS, "queries": 100, "steps": 2000, "seeds": 3}
FULL = {"size": 32, "width": 64, "epochs": 100, "queries": 300, "steps": 2000, "seeds": 5}
ATTACK = Operator(
    "an image changed so that its code retrieves a chosen label",
    free=f"{QUICK} projected gradient steps of equal length towards the anchor code",
)


@experiment(
    "pros_gan/single-pass-attack",
    points={"smoke": [SMOKE], "small": [SMALL], "full": [FULL]},
    operator=ATTACK,
    paper=PAPER,
    departures=HERE,
    refuted_if="the whole interval of t-MAP's points over DHTA's 2000 steps at equal perceptibility lies below 0",
    measured_here="t-MAP (expected over ties) of a small hashing model of handwritten digits, image by image at equal perceptibility",
    minutes=240,
)
def single_pass_attack(size: int, width: int, epochs: int, queries: int, steps: int, seeds: int) -> Figure:
    """Points of t-MAP of one forward pass over DHTA at its own best step. All figures are points over DHTA, which is 0.

    Deleted: clean images. Random: the generator asked for a random other label. Rival: as many gradient steps of equal length as take the
    work of one pass. Ablations and cheaper rivals are arms; `details` has the t-MAP of all, of the codes aimed at, on another model, and
    after training on attacked images.
    """
    found = compared(size, width, epochs, queries, steps, seeds)
    base = f"dhta-{steps}"
    value, low, high = found.gain("pros_gan", base)

    def over(arm: str) -> float:
        return found.gain(arm, base)[0]

    rival = f"quick-{equal_steps(size, width)}"
    controls = {"deleted": over("clean"), "random": over("another label"), "rival": over(rival)}
    level = float(np.mean([each["perceptibility"] for each in found.details]))
    return Figure(
        value,
        "points",
        low,
        high,
        baseline=0.0,
        free=over(f"quick-{QUICK}"),
        controls=controls,
        arms={arm: over(arm) for arm in found.arms if arm not in ("pros_gan", base)},
        trained=trained(found),
        details={
            "t-MAP": {arm: found.points(arm) for arm in found.arms},
            "by seed": found.details,
            "multiply-accumulates of an image": dict(passes(size, width)),
            "defence": hardened(size, level),
        },
    )


@experiment(
    "pros_gan/attack-speedup",
    points={
        "smoke": [{**SMOKE, "batch": 2}],
        "small": [{**SMALL, "batch": 4}],
        "full": [{**FULL, "batch": 24}],
    },
    operator=ATTACK,
    guard=Guard("t-MAP in per cent at equal perceptibility", 5.0, higher_is_better=True, relative=False),
    paper=PAPER,
    departures=HERE,
    refuted_if="the whole interval of the speed-up over DHTA's 2000 steps lies below 1",
    measured_here="a small hashing model of handwritten digits; training is not in the time of an image, `details` has the break-even",
    minutes=240,
)
def attack_speedup(size: int, width: int, epochs: int, queries: int, steps: int, seeds: int, batch: int) -> Trial:
    """One forward pass of PrototypeNet and generator for a batch against DHTA's steps; the weights do not matter to the times.

    The guard: at equal perceptibility the t-MAP of the trained generator may be five points below DHTA's. Deleted: clean images. Random:
    noise that changes each image as much. Rival: as many gradient steps of equal length as take the work of one pass.
    """
    known = digits_at(size)
    victim = victim_of(1, size, chosen(LEARN, "victim").rate)
    database = Database.of(victim, known.images, known.labels)
    small = Database(database.codes[:48], database.labels[:48], known.images[:48])
    attack = generator_of(1, size, width, 1)
    attack.prototype_steps = 1
    attack.fit(victim, small)
    images, labels = known.heldout[:batch], known.heldout_labels[:batch]
    targets = targets_of(1, labels, small)
    others = [iterative(count) for count in sorted({*SHORTER, steps})]
    others += [quick(count, LEVEL) for count in sorted({QUICK, equal_steps(size, width)})]
    arms = {other.name: partial(other.fit(victim, database), images, targets, bound=LEVEL) for other in others}
    baseline, candidate = arms.pop(f"dhta-{steps}"), partial(attack, images, targets)

    def quality() -> Quality:
        found = compared(size, width, epochs, queries, steps, seeds)
        gain, low, high = found.gain("pros_gan", f"dhta-{steps}")
        start = found.points(f"dhta-{steps}")
        rival = f"quick-{equal_steps(size, width)}"
        controls = {"deleted": found.points("clean"), "random": found.points("noise"), "rival": found.points(rival)}
        return Quality(start + gain, start, start + low, start + high, controls=controls, rival=rival)

    def details() -> dict[str, Any]:
        found = compared(size, width, epochs, queries, steps, seeds)
        seconds = [each["training seconds"] for each in found.details]
        spared = (elapsed(baseline) - elapsed(candidate)) / batch
        return {
            "multiply-accumulates of an image": dict(passes(size, width)),
            "training seconds": seconds,
            "images after which training pays": math.ceil(max(seconds) / spared) if spared > 0 else None,
        }

    return Trial(
        baseline=baseline,
        candidate=candidate,
        free=arms.pop(f"quick-{QUICK}"),
        arms=arms,
        quality=quality,
        trained=lambda: trained(compared(size, width, epochs, queries, steps, seeds)),
        details=details,
        pairs=12,
    )


def elapsed(work: Callable[[], Any]) -> float:
    """Seconds of one run."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start

"""ProS-GAN: does one forward pass attack as well as thousands of gradient steps do at equal perceptibility, and how much faster is it?

The model under test is a small one of DPSH's kind, trained here on handwritten digits: the training part is the database, other digits are
queries, and the label to be retrieved is another digit. Perceptibility is equal image by image: the root mean square by which the
generator changed an image is the radius within which every other attack of that image must stay. How far that is follows from the paper's
weight of reconstruction, 50.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
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
    pull,
    share_class,
    targets_for,
    train_on_attacked,
)
from assay.methods.vision.pros_gan.attacks import BOUND
from assay.methods.vision.pros_gan.networks import FEATURES
from assay.methods.vision.pros_gan.retrieval import Norm
from assay.workloads.images import digits_split

CLASSES, BITS, STEP = 10, 32, "pros_gan/step"
VICTIM_STEPS, PROTOTYPE_STEPS, EPOCHS, HIDDEN, SIZE, WIDTH, REC_WEIGHT = 300, 300, 8, 128, 16, 8, 50.0
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
            nn.Conv2d(1, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width), nn.ReLU(),
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


def learning(part: str) -> Rate:
    """The rate of "victim", "prototypes" or "generator": a search each, since each builds on the one before."""
    return chosen(f"pros_gan/{part}", part)


@searched("pros_gan/victim", arms=("victim",), grid=(1e-3, 3e-3, 1e-2, 3e-2))
def victim_score(arm: str, rate: float) -> float:
    """One less the precision of digits for choices."""
    known, victim = digits_at(SIZE), victim_of(CHOICE_SEED, SIZE, rate)
    database = Database.of(victim, known.images, known.labels)
    return 1 - float(mean_precision(victim, database, known.choose, known.choose_labels).mean())


@searched("pros_gan/prototypes", arms=("prototypes",), grid=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2))
def prototypes_score(arm: str, rate: float) -> float:
    """The pairwise loss of the prototypes against the bits of digits for choices."""
    known, victim = digits_at(SIZE), victim_of(CHOICE_SEED, SIZE, learning("victim").rate)
    database = Database.of(victim, known.images, known.labels)
    torch.manual_seed(CHOICE_SEED)
    net = fit_prototypes(PrototypeNet(CLASSES, BITS, hidden=HIDDEN), database, steps=PROTOTYPE_STEPS, rate=rate)
    with torch.no_grad():
        codes, labels = net(torch.eye(CLASSES)).code, torch.eye(CLASSES)
        return float(pairwise_loss(codes, victim.bits(known.choose), share_class(labels, known.choose_labels)))


@searched("pros_gan/generator", arms=("generator",), grid=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2))
def generator_score(arm: str, rate: float) -> float:
    """The generator's loss on digits for choices, the discriminator's share left out."""
    known, attack = digits_at(SIZE), attack_for_choice(rate)
    assert attack.victim is not None
    assert attack.database is not None
    targets = targets_of(CHOICE_SEED, known.choose_labels, attack.database)
    attacked = attack(known.choose, targets)
    with torch.no_grad():
        hashed = code_loss(attack.victim.relaxed(attacked), attack.target_codes(targets))
    return float(4 * REC_WEIGHT * F.mse_loss(attacked, known.choose) + 5 * hashed)  # 4: images in [0, 1], not [-1, 1]


@cache
def attack_for_choice(rate: float) -> ProSGAN:
    """A generator that is used for choices alone."""
    known, victim = digits_at(SIZE), victim_of(CHOICE_SEED, SIZE, learning("victim").rate)
    return generator_of(CHOICE_SEED, SIZE, WIDTH, EPOCHS, rate).fit(
        victim, Database.of(victim, known.images, known.labels)
    )


def generator_of(seed: int, size: int, width: int, epochs: int, rate: float | None = None) -> ProSGAN:
    """The paper's attack at the size of these images, to be fitted."""
    return ProSGAN(
        epochs=epochs,
        rate=learning("generator").rate if rate is None else rate,
        rec_weight=REC_WEIGHT,
        prototype_steps=PROTOTYPE_STEPS,
        prototype_rate=learning("prototypes").rate,
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


@searched(STEP, arms=("20", "200", "2000"), grid=(0.01, 0.1, 1.0, 10.0, 100.0))
def step_score(arm: str, step: float) -> float:
    """One less the t-MAP of DHTA at a length of its steps, on digits for choices, each within what the generator changes it by."""
    known, victim = digits_at(SIZE), victim_of(CHOICE_SEED, SIZE, learning("victim").rate)
    database = Database.of(victim, known.images, known.labels)
    images, labels = known.choose[:60], known.choose_labels[:60]
    targets = targets_of(CHOICE_SEED, labels, database)
    radius = change(images, attack_for_choice(learning("generator").rate)(images, targets))
    attack = DHTA(steps=int(arm), step=step, norm="rms").fit(victim, database)
    return 1 - float(mean_precision(victim, database, attack(images, targets, bound=radius), targets).mean())


# ------------------------------------------------------------------------------------------------------------------- the attacks


def equal_steps(size: int, width: int) -> int:
    """Gradient steps that take about the multiply-accumulates of one pass of the generator."""
    work = passes(size, width)
    return max(1, round(work["generator"] / work["step"]))


@cache
def passes(size: int, width: int) -> Mapping[str, int]:
    """Multiply-accumulates of one image: through PrototypeNet's feature and the generator, and of one gradient step through the victim."""
    label, feature, image = torch.zeros(1, CLASSES), torch.zeros(1, FEATURES), torch.zeros(1, 1, size, size)
    made = Generator(width=width, label_width=label_width(width), image_size=size, in_chans=1).eval()
    named = count_cost(PrototypeNet(CLASSES, BITS, hidden=HIDDEN).feature.eval(), label).macs
    model, codes = Victim(Hasher(size)), torch.ones(1, BITS)
    return {
        "generator": named + count_cost(made, image, feature).macs,
        "step": count_cost(lambda: pull(model, image, codes, steps=1, step=1.0, bound=1.0)).macs,
    }


def iterative(steps: int, *, n: int = 9, norm: Norm = "rms") -> DHTA:
    """A baseline of the paper at the best step of its length."""
    known = chosen(STEP, str(steps)).rate
    return (DHTA if n > 1 else P2P)(steps=steps, step=known, norm=norm)


def quick(steps: int, level: float) -> DHTA:
    """What an expert writes in ten lines: steps of equal length towards the anchor, two and a half radii in all."""
    return DHTA(steps=steps, step=2.5 * level / steps, norm="rms", direction="unit", name=f"quick-{steps}")


def rivals_of(size: int, width: int, steps: int, level: float) -> list[DHTA]:
    """All iterative attacks: DHTA at three lengths, P2P, and quick steps, as many as are free and as many as cost one pass."""
    rivals = [iterative(count) for count in sorted({*SHORTER, steps})] + [iterative(min(200, steps), n=1)]
    return rivals + [quick(count, level) for count in sorted({QUICK, equal_steps(size, width)})]


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
    victim = victim_of(seed, size, learning("victim").rate)
    database = Database.of(victim, known.images, known.labels)
    targets = targets_of(seed, labels, database)
    attack, training = timed(partial(generator_of(seed, size, width, epochs).fit, victim, database))

    made = attack(images, targets)
    radius = change(images, made)
    level = float(radius.mean())
    arms, seconds = {"pros_gan": made, "clean": images}, {"pros_gan": timed(partial(attack, images, targets))[1]}
    rivals = rivals_of(size, width, steps, level)
    for rival in rivals:
        work = partial(rival.fit(victim, database), images, targets, bound=radius)
        arms[rival.name], seconds[rival.name] = timed(work)
    arms["another label"] = attack(images, targets_of(seed + 500, targets, database))
    arms["noise"] = Noise(norm="rms").fit(victim, database)(images, targets, bound=radius)
    found = {name: mean_precision(victim, database, some, targets).numpy() for name, some in arms.items()}

    other = victim_of(seed + 100, size, learning("victim").rate, width=24)  # who never saw an attack on it
    theirs = Database.of(other, known.images, known.labels)
    published = iterative(min(200, steps), norm="linf").fit(victim, database)(images, targets)  # within 8/255
    details = {
        "perceptibility": {name: float(change(images, some).mean()) for name, some in arms.items()},
        "training seconds": training,
        "milliseconds of an image": {name: 1000 * spent / queries for name, spent in seconds.items()},
        "map": float(mean_precision(victim, database, images, labels).mean()),
        "prototypes": float(database.average_precision(attack.target_codes(targets), targets).mean()),
        "anchors": float(database.average_precision(rivals[0].target_codes(targets), targets).mean()),
        "on another model": {
            name: float(mean_precision(other, theirs, arms[name], targets).mean())
            for name in ("clean", "pros_gan", f"dhta-{steps}")
        },
        f"dhta-{min(200, steps)} within the published 8/255, at another perceptibility": {
            "t-MAP": float(mean_precision(victim, database, published, targets).mean()),
            "perceptibility": float(change(images, published).mean()),
        },
    }
    return Seen(found, details)


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What some work gives, and its seconds."""
    start = time.perf_counter()
    found = work()
    return found, time.perf_counter() - start


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
    """All trained parts beside their floors."""
    scores: dict[str, tuple[Sequence[float], float, str]] = {
        "victim": ([each["map"] for each in found.details], 1 / CLASSES, "chance"),
        "prototypes": ([each["prototypes"] for each in found.details], 1 / CLASSES, "chance"),
        "generator": (found.arms["pros_gan"].mean(1).tolist(), float(found.arms["clean"].mean()), "clean images"),
    }
    rates: dict[str, Rate] = {arm: learning(arm) for arm in scores}
    return {
        arm: Trained(values, floor, name, rates[arm].rate, rates[arm].rates, higher_is_better=True, best=1.0)
        for arm, (values, floor, name) in scores.items()
    }


def costs(found: Compared, size: int, width: int, steps: int) -> dict[str, Any]:
    """What an image costs by arm, all queries in one batch, and after how many images the generator's training has paid against each."""
    work, rivals = passes(size, width), rivals_of(size, width, steps, BOUND)
    names = ("pros_gan", *(rival.name for rival in rivals))
    spent = {arm: float(np.median([each["milliseconds of an image"][arm] for each in found.details])) for arm in names}
    training = float(np.median([each["training seconds"] for each in found.details]))
    return {
        "multiply-accumulates of an image": {
            "pros_gan": work["generator"], **{rival.name: rival.steps * work["step"] for rival in rivals},
        },
        "milliseconds of an image": spent,
        "training seconds": training,
        "images after which training has paid (null: never)": {
            arm: break_even(training, each, spent["pros_gan"]) for arm, each in spent.items() if arm != "pros_gan"
        },
    }  # fmt: skip


def break_even(training: float, rival: float, own: float) -> int | None:
    """Images after which `training` seconds are regained, at so many milliseconds an image each; None where never."""
    return math.ceil(1000 * training / (rival - own)) if rival > own else None


def hardened(size: int, level: float) -> dict[str, float]:
    """What the defence gives: t-MAP of quick steps against each model itself, and precision on clean images.

    Both models were trained on for equally many steps, one on clean images and one on attacked ones too.
    """
    known, victim = digits_at(size), victim_of(1, size, learning("victim").rate)
    images, labels = known.heldout[:100], known.heldout_labels[:100]
    more: dict[str, Any] = {"steps": VICTIM_STEPS, "rate": learning("victim").rate, "bound": level, "norm": "rms"}
    found = {}
    for name, attack_steps in (("as it was", 0), ("hardened", 5)):
        model = Victim(train_on_attacked(victim.model, known.images, known.labels, attack_steps=attack_steps, **more))
        database = Database.of(model, known.images, known.labels)
        targets = targets_of(1, labels, database)
        for attack in (quick(QUICK, level), quick(200, level)):
            changed = attack.fit(model, database)(images, targets, bound=level)
            found[f"{name}: t-MAP of {attack.name}"] = 100 * float(
                mean_precision(model, database, changed, targets).mean()
            )
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
    "batch": 12,
    "prototype_steps": 30_000,
    "rate": 1e-4,
    "step": "1/32",
    "discriminator": "64 channels, five convolutions",
    "bound": "8/255",
    "own": True,
}
HERE = {
    "data": "handwritten digits, scaled up from 8 pixels: the three sets come with no package",
    "victim": "two convolutions with BatchNorm and a linear layer, trained by DPSH's loss in batches: none of their weights are here",
    "size": f"{SIZE} pixels (32 at full): digits have no more to show",
    "width": f"{WIDTH} channels and {HIDDEN} hidden features of a label (64 channels at full): the generator trains in seconds",
    "epochs": f"{EPOCHS} (100 at full): what seconds allow; twice as many lowered its loss by 5 % at a rate of 0.003",
    "prototype_steps": f"{PROTOTYPE_STEPS}: there are only ten labels",
    "rate": "searched, at small's sizes, for victim, PrototypeNet, and generator with discriminator",
    "step": "of the iterative attacks: searched for each length, within what a generator changes the digits for choices by",
    "discriminator": "as wide as the generator, and halving the image down to a pixel",
    "bound": "iterative attacks stay, image by image, within the generator's own root mean square change, so that perceptibility is equal",
    "own": "targets share no class with the query, or clean images would succeed by chance",
}
SMOKE = {"size": 16, "width": 4, "epochs": 1, "queries": 10, "steps": 20, "seeds": 3}
SMALL = {"size": SIZE, "width": WIDTH, "epochs": EPOCHS, "queries": 60, "steps": 2000, "seeds": 3}
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

    Deleted: clean images. Random: noise that changes each image as much. Rival: as many gradient steps of equal length as take the work of
    one pass. Arms: shorter and cheaper attacks, and the generator asked for a random other label. `details` has the t-MAP of all, of the
    codes aimed at and on another model, what an image costs and when training has paid, and the defence.
    """
    found = compared(size, width, epochs, queries, steps, seeds)
    base = f"dhta-{steps}"
    value, low, high = found.gain("pros_gan", base)

    def over(arm: str) -> float:
        return found.gain(arm, base)[0]

    rival = f"quick-{equal_steps(size, width)}"
    controls = {"deleted": over("clean"), "random": over("noise"), "rival": over(rival)}
    level = float(np.mean([each["perceptibility"]["pros_gan"] for each in found.details]))
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
            "costs": costs(found, size, width, steps),
            "defence": hardened(size, level),
        },
    )


@experiment(
    "pros_gan/attack-speedup",
    points={
        "smoke": [{**SMOKE, "batch": 2}],
        "small": [{**SMALL, "batch": 12}],
        "full": [{**FULL, "batch": 12}],
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
    """One forward pass of PrototypeNet and generator for a batch against DHTA's steps; neither weights nor bound matter to the times.

    The guard: at equal perceptibility the t-MAP of the trained generator may be five points below DHTA's. Deleted: clean images. Random:
    noise that changes each image as much. Rival: as many gradient steps of equal length as take the work of one pass.
    """
    known = digits_at(size)
    victim = victim_of(1, size, learning("victim").rate)
    database = Database.of(victim, known.images, known.labels)
    small = Database(database.codes[:48], database.labels[:48], known.images[:48])
    attack = generator_of(1, size, width, 1)
    attack.prototype_steps = 1
    attack.fit(victim, small)
    images, labels = known.heldout[:batch], known.heldout_labels[:batch]
    targets = targets_of(1, labels, small)
    others = [each for each in rivals_of(size, width, steps, BOUND) if not isinstance(each, P2P)]
    arms = {other.name: partial(other.fit(victim, database), images, targets, bound=BOUND) for other in others}
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
        return {"costs": costs(found, size, width, steps), "by seed": found.details}

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

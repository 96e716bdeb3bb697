"""ProS-GAN's experiments notice an attack that aims at nothing, at another label, or that only seems good because it changes more."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from tests.properties.sabotage import PAYS, record_of, verdict_of
from torch import nn

from assay.evidence.types import Verdict
from assay.evidence.verdict import judge
from assay.experiments import experiments_of
from assay.experiments.rates import Rate
from assay.experiments.vision import pros_gan as room
from assay.measure.cost import count_cost
from assay.methods.vision.pros_gan import DHTA, Noise, Victim, change, train_on_attacked

ATTACK = {"size": 16, "width": 4, "epochs": 1, "queries": 16, "steps": 2, "seeds": 3}
SPEED = {**ATTACK, "batch": 2}


class Strong(DHTA):
    """In place of the generator's training: an attack that works, at the radius a generator might take."""

    def __init__(self):
        super().__init__(steps=20, step=0.03, bound=0.12, norm="rms", direction="unit", name="pros_gan")


class Blind(Strong):
    """The method broken: it does not look at the target."""

    def __call__(self, images, targets, *, bound=None):
        return super().__call__(images, targets[:1].expand_as(targets), bound=bound)


class Idle(Strong):
    """The method deleted: noise of the same size."""

    def __call__(self, images, targets, *, bound=None):
        return Noise(norm="rms").fit(self.victim, self.database)(images, targets, bound=0.12)


class Half(Strong):
    """An attack that works on every second image."""

    def __call__(self, images, targets, *, bound=None):
        found = Noise(norm="rms").fit(self.victim, self.database)(images, targets, bound=0.12)
        found[::2] = super().__call__(images, targets, bound=bound)[::2]
        return found


@cache
def victim(seed, size, rate, width=16):
    """A linear model, which is trained in no time."""
    torch.manual_seed(seed)
    known, model = room.digits_at(size), nn.Sequential(nn.Flatten(), nn.Linear(size**2, room.BITS))
    return Victim(train_on_attacked(model, known.images, known.labels, steps=60, rate=rate, attack_steps=0))


def weak(steps, level):
    """A free baseline that stops short."""
    return DHTA(steps=1, step=0.3 * level, norm="rms", direction="unit", name=f"quick-{steps}")


quick = room.quick


@pytest.fixture
def put(monkeypatch):
    """Puts an attack in the generator's place; a baseline of two weak steps, so that there is something to gain."""
    monkeypatch.setattr(room, "SHORTER", (2,))
    monkeypatch.setattr(room, "victim_of", victim)
    monkeypatch.setattr(room, "QUICK", 1)
    monkeypatch.setattr(room, "quick", weak)
    monkeypatch.setattr(room, "hardened", lambda size, level: {})
    monkeypatch.setattr(room, "equal_steps", lambda size, width: 1)

    def call(attack, step=0.1):
        room.attacked.cache_clear()
        monkeypatch.setattr(
            room, "chosen", lambda name, arm: Rate(3e-3 if name != room.STEP else step, (1e-3, 3e-3, 0.1))
        )
        monkeypatch.setattr(room, "generator_of", lambda seed, size, width, epochs, rate=None: attack())

    yield call
    room.attacked.cache_clear()


def test_every_experiment_declares_what_decides():
    found = {each.claim: each for each in experiments_of("pros_gan")}
    assert set(found) == {"pros_gan/single-pass-attack", "pros_gan/attack-speedup"}
    assert all(each.decides[scale]["steps"] == 2000 for each in found.values() for scale in ("small", "full"))


def test_an_attack_must_reach_its_target(put):
    put(Strong)
    honest = record_of("pros_gan/single-pass-attack", ATTACK)
    assert judge(honest).verdict in PAYS
    for broken in (Blind, Idle):
        put(broken)
        record = record_of("pros_gan/single-pass-attack", ATTACK)
        assert judge(record).verdict not in PAYS
        assert record.measured.median < honest.measured.median - 20


def test_speed_counts_only_with_success(put):
    put(Strong, step=1000)  # a baseline that works
    assert verdict_of("pros_gan/attack-speedup", SPEED) in PAYS
    put(Idle, step=1000)
    assert verdict_of("pros_gan/attack-speedup", SPEED) not in PAYS


def test_an_attack_no_better_than_the_free_one_does_not_pay(put, monkeypatch):
    monkeypatch.setattr(room, "quick", quick)
    put(lambda: DHTA(steps=1, step=0.3, bound=0.12, norm="rms", direction="unit", name="pros_gan"))
    record = record_of("pros_gan/single-pass-attack", ATTACK)
    assert judge(record).verdict not in PAYS
    assert judge(record).verdict != Verdict.REFUTED


def test_all_arms_stay_within_what_the_generator_changed(put, monkeypatch):
    put(Strong)
    seen = {}
    real = room.mean_precision

    def watched(victim, database, images, labels):
        seen.setdefault(len(images), []).append(images)
        return real(victim, database, images, labels)

    monkeypatch.setattr(room, "mean_precision", watched)
    room.attacked(1, 16, 4, 1, 16, 2)
    made, clean, *others = seen[16]
    radius = change(clean, made)
    assert radius.max() <= 0.12 + 1e-5
    names = list(room.attacked(1, 16, 4, 1, 16, 2).arms)
    assert (names[:2], names[-2:]) == (["pros_gan", "clean"], ["another label", "noise"])
    rivals = [*others[: len(names) - 4], others[len(names) - 3]]
    assert all((change(clean, some) <= radius + 1e-4).all() for some in rivals)
    targets = room.targets_of(
        1, room.digits_at(16).heldout_labels[:16], room.Database(torch.ones(10, 8), torch.eye(10))
    )
    assert not (targets * room.digits_at(16).heldout_labels[:16]).any()


def test_a_pass_of_the_generator_is_a_few_steps_of_the_victim():
    work = room.passes(16, 8)
    model = count_cost(room.Hasher(16).eval(), torch.zeros(1, 1, 16, 16)).macs
    assert work["step"] == 2 * model  # forwards, and back to the image: nobody asks for the weights' gradients
    label = 10 * room.HIDDEN + room.HIDDEN * 512
    assert work["generator"] > label
    assert room.equal_steps(16, 8) == round(work["generator"] / work["step"]) < room.QUICK


def test_costs_are_those_of_all_steps_and_training_is_paid_back(put):
    put(Strong)
    found = room.costs(room.compared(16, 4, 1, 16, 2, 3), 16, 4, 2)
    macs = found["multiply-accumulates of an image"]
    assert macs["dhta-2"] == 2 * macs["quick-1"] == 2 * room.passes(16, 4)["step"]
    assert set(found["milliseconds of an image"]) == set(macs)
    assert room.break_even(10.0, 6.0, 1.0) == 2000
    assert room.break_even(10.0, 1.0, 1.0) is None


def test_an_attack_that_finds_less_is_refuted_by_a_baseline_that_works(put):
    put(Half, step=1000)
    assert verdict_of("pros_gan/single-pass-attack", ATTACK) == Verdict.REFUTED
    put(Idle, step=1000)  # not even trained
    assert verdict_of("pros_gan/single-pass-attack", ATTACK) == Verdict.UNDECIDED


def test_iterative_attacks_are_tuned_within_what_the_generator_changes(put, monkeypatch):
    put(Strong, step=1000)
    bounds = []
    real = room.DHTA.__call__

    def watched(self, images, targets, *, bound=None):
        bounds.append(bound)
        return real(self, images, targets, bound=bound)

    monkeypatch.setattr(room.DHTA, "__call__", watched)
    room.attack_for_choice.cache_clear()
    assert room.step_score("20", 1000.0) < room.step_score("20", 1e-6)
    known = room.digits_at(16).choose[:60]
    targets = room.targets_of(0, room.digits_at(16).choose_labels[:60], room.Database(torch.ones(10, 8), torch.eye(10)))
    expected = change(known, room.attack_for_choice(3e-3)(known, targets))
    room.attack_for_choice.cache_clear()
    assert any(bound is not None and torch.equal(bound, expected) for bound in bounds)


@pytest.mark.slow
def test_the_real_generator_learns_to_attack(monkeypatch):
    monkeypatch.setattr(room, "chosen", lambda name, arm: Rate(3e-3 if name != room.STEP else 1.0, (1e-3, 3e-3, 1e-2)))
    room.attacked.cache_clear()
    found = room.attacked(1, room.SIZE, room.WIDTH, room.EPOCHS, 60, 20)
    room.attacked.cache_clear()
    assert found.arms["pros_gan"].mean() > found.arms["clean"].mean() + 0.2
    assert found.arms["pros_gan"].mean() > found.arms["another label"].mean() + 0.2

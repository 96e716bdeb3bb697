"""What the experiments on saturating test-time compute say where the vote or the prediction is broken, or something
free is as good.

Items and samples are made here, with chances that the test knows, so that nothing is drawn from a model.
"""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from tests.properties.sabotage import PAYS, record_of

from assay.evidence.types import Verdict
from assay.evidence.verdict import judge
from assay.experiments.reasoning import ttspm as room
from assay.experiments.reasoning import ttspm_samples as sets
from assay.experiments.reasoning.samples import Drawn
from assay.methods.core.reasoning.budget import Spent
from assay.methods.core.reasoning.generator import Sample
from assay.methods.reasoning.ttspm import TTSPM
from assay.workloads.reasoning import items, prompt

VOTE, POINTS = "ttspm/aime-parallel", "ttspm/saturation-correlation"
VOTE_AT = {"samples": 16, "items": 15, "rethought": 4}
POINTS_AT = {"samples": 24, "items": 20, "eps": 0.08}


class World:
    """Questions that are answered right with known chances; a wrong answer is one of `wrongs`, evenly.

    `likeliest` says from the chance whether the answer at temperature 0 is right. All wordings of a question have its
    chance.
    """

    def __init__(self, chances, *, wrongs=40, likeliest=lambda p: p > 0.6):
        self.chances, self.wrongs, self.likeliest = chances, wrongs, likeliest
        self.right = {}
        self.ever = 0

    def sample(self, ok, answer, random):
        said = int(answer) if ok else int(answer) + 1 + int(random.integers(self.wrongs))
        return Sample(f" {said}\n", (1, 2), (-0.5, float(-random.random())), "stop", Spent(30, 2, 0, 1), "\n")

    def shared(self, kind, level, wording, part, n_items, n):
        found = []
        for i, item in enumerate(items(kind, level=level, n=n_items, part=part)):
            random = np.random.default_rng([i, level, len(kind), len(wording), len(part)])
            p = self.chances[i % len(self.chances)]
            text = prompt(item, wording)
            self.right[text] = (self.likeliest(p), item.answer)
            found.append(Drawn(item, text, [self.sample(random.random() < p, item.answer, random) for _ in range(n)]))
        return found

    def generator(self, model, room_name):
        def kept(prompts, sampling, *, n, first=0):
            random = np.random.default_rng(first)
            known = [self.right.get(text.split(sets.AGAIN)[0].rstrip(), (False, "0")) for text in prompts]
            return [
                [self.sample(ok, answer, random)]
                for ok, answer in (self.right.get(t, k) for t, k in zip(prompts, known, strict=True))
            ]

        kept.asked = {}
        return kept


@pytest.fixture
def world(monkeypatch):
    def make(chances, **more):
        made = World(chances, **more)
        monkeypatch.setattr(sets, "shared", made.shared)
        monkeypatch.setattr(sets, "generator", made.generator)
        monkeypatch.setattr(room, "resampled", partial(sets.resampled, draws=200))
        return made

    return make


def verdict(claim, at):
    return judge(record_of(claim, at)).verdict


HALF = [0.3, 0.4, 0.5, 0.9, 0.0]


def test_a_vote_that_finds_more_pays(world):
    world(HALF)
    record = record_of(VOTE, VOTE_AT)
    assert judge(record).verdict in PAYS
    assert record.measured.median == pytest.approx(80, abs=6)  # all that are ever right
    assert record.baseline == record.controls["deleted"] == pytest.approx(42, abs=5)
    assert record.free == pytest.approx(20)
    assert record.arms["coverage (an oracle chooses)"] >= record.measured.median


def test_a_vote_that_chooses_at_random_shows_nothing(world, monkeypatch):
    world(HALF)
    real = room.accuracies
    monkeypatch.setattr(
        room, "accuracies",
        lambda logged, sizes, selector="coverage": real(logged, [1] * len(sizes) if selector == "majority" else sizes),
    )  # fmt: skip
    assert verdict(VOTE, VOTE_AT) not in PAYS


def test_a_vote_for_a_common_mistake_refutes(world):
    world([0.3, 0.4, 0.35], wrongs=1)
    assert verdict(VOTE, VOTE_AT) is Verdict.REFUTED


def test_a_vote_no_better_than_the_likeliest_answer_does_not_pay(world):
    world(HALF, likeliest=lambda p: p > 0)
    assert verdict(VOTE, VOTE_AT) not in PAYS


def test_a_model_that_is_never_right_shows_nothing(world):
    world([0.0])
    assert verdict(VOTE, VOTE_AT) not in PAYS


def test_tokens_are_the_prompt_once_and_every_sample(world):
    world(HALF)
    rows = record_of(VOTE, VOTE_AT).details["by tokens"]
    assert [row["tokens"] for row in rows] == [30 + 2 * row["N"] for row in rows]
    one = rows[0]["coverage (an oracle chooses)"]
    assert rows[0]["vote"] == pytest.approx(one)
    assert rows[0]["most probable sample"] == pytest.approx(one)


def test_plans_spread_the_same_samples(world):
    world([0.0, 0.1, 0.5, 1.0])
    plans = record_of(VOTE, VOTE_AT).details["plans"]["4"]
    totals = {name: sum(counts.values()) for name, counts in plans["samples a group"].items()}
    assert set(totals.values()) == {4 * 9}
    alike = plans["over every question alike"]
    assert set(alike) >= {"planned, unequal chances", "groups shuffled", "gains as counted"}


def test_groups_of_unequal_hardness_are_planned_better_than_alike_or_shuffled(world):
    made = world([0.9])
    easy = made.shared

    def shared(kind, level, wording, part, n_items, n):
        made.chances = {("sum", 1): [1.0], ("sum", 2): [0.0], ("steps", 1): [0.3, 0.4, 0.5]}[kind, level]
        return easy(kind, level, wording, part, n_items, n)

    sets.shared = shared  # `world` puts the real one back
    gains = record_of(VOTE, VOTE_AT).details["plans"]["2"]["over every question alike"]
    assert gains["planned, unequal chances"]["low"] > 0
    assert gains["planned, unequal chances"]["low"] > gains["groups shuffled"]["median"]


# ------------------------------------------------------------------------------------------------------- saturation points

SPREAD = [0.0, 0.0, 0.0, 0.2, 0.25, 0.3, 0.5, 0.7, 0.9, 1.0]
"""Chances at both ends, where saturation comes at once, and between them."""


def test_points_that_are_predicted_pay_and_simpler_statistics_do_not_do_it(world):
    world([0.0, 0.0, 0.25, 0.3, 0.3, 0.35, 0.75, 0.8, 0.85, 0.9])
    record = record_of(POINTS, POINTS_AT)
    assert judge(record).verdict in PAYS
    assert record.measured.low > record.free
    assert record.measured.median > 0.6
    assert abs(record.controls["random"]) < 0.1
    assert abs(record.controls["deleted"]) < 0.1  # groups alike: nothing is known without the item's own samples


def test_a_random_prediction_shows_nothing(world, monkeypatch):
    world(SPREAD)
    random = np.random.default_rng(0)
    monkeypatch.setattr(room, "predicted_saturation", lambda c, n, eps: int(random.integers(8)))
    assert verdict(POINTS, POINTS_AT) not in PAYS


def test_a_constant_prediction_shows_nothing(world, monkeypatch):
    world(SPREAD)
    monkeypatch.setattr(room, "predicted_saturation", lambda c, n, eps: 4)
    assert verdict(POINTS, POINTS_AT) not in PAYS


def test_a_prediction_turned_round_refutes(world, monkeypatch):
    world(SPREAD)
    monkeypatch.setattr(room, "predicted_saturation", lambda c, n, eps: 20 - TTSPM(c / n).saturation(eps))
    assert verdict(POINTS, POINTS_AT) is Verdict.REFUTED


def test_items_that_are_alike_have_nothing_to_predict(world):
    world([0.3])
    assert verdict(POINTS, POINTS_AT) not in PAYS


def test_where_points_only_fall_with_the_pass_rate_the_formula_adds_nothing(world):
    world([0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
    record = record_of(POINTS, POINTS_AT)
    assert record.free > 0.5
    assert judge(record).verdict not in PAYS


def test_one_chance_for_all_promises_too_much(world):
    world(SPREAD)
    for by_size in record_of(POINTS, POINTS_AT).details["predicted coverage"].values():
        beyond = by_size["24"]
        assert beyond["one chance, no ceiling"] > beyond["observed high"]
        assert abs(beyond["unequal chances"] - beyond["observed median"]) < 0.15


@pytest.mark.parametrize(("right", "point"), [(0, 0), (16, 1), (1, 0)])
def test_points_are_counted_as_gains_say(right, point):
    assert room.observed_saturation(right, 16, 0.08) == point


def test_rounds_see_the_last_answer_only(world):
    made = world([0.0])
    asked, numbers = [], []

    def generator(model, name):
        kept = made.generator(model, name)

        def noted(prompts, *rest, **more):
            asked.append(list(prompts))
            numbers.append(more["first"])
            return kept(prompts, *rest, **more)

        return noted

    sets.generator = generator  # `world` puts the real one back
    found = {("sum", 2, "plain"): made.shared("sum", 2, "plain", "judged", 2, 4)}
    ok, tokens = sets.rethought(found, 2, 3)["sum", 2, "plain"]
    assert [len(own) for own in ok] == [3, 3]
    assert tokens == 3 * 32  # each round reads its prompt
    assert numbers == [1, 2]  # a round that asks the same again is answered anew
    for texts in asked:
        for text, one in zip(texts, found["sum", 2, "plain"], strict=True):
            assert text.startswith(one.prompt)
            assert text.count(sets.AGAIN) == 1
            assert text.endswith(f"{sets.AGAIN}{one.item.question} =")


def test_what_is_drawn_is_asked_for_by_both_ways(world, monkeypatch):
    made = world(HALF)
    seen = SimpleNamespace(asked=0)
    monkeypatch.setattr(sets, "JUDGED", 4)
    monkeypatch.setattr(sets, "RETHOUGHT", 2)
    monkeypatch.setattr(sets, "ROUNDS", 3)
    plain = made.generator

    def generator(model, name):
        assert (model, name) == ("smollm2-135m", "ttspm")
        kept = plain(model, name)

        def counted(prompts, *rest, **more):
            seen.asked += len(prompts)
            return kept(prompts, *rest, **more)

        return counted

    monkeypatch.setattr(sets, "generator", generator)
    sets.draw.cache_clear()
    assert set(sets.draw()) == {"smollm2-135m"}
    sets.draw.cache_clear()
    assert seen.asked == 9 * 4 + 2 * 2 * 2

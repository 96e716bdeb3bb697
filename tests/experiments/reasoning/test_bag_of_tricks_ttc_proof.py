"""Does the experiment on temperatures notice when choosing is broken, by chance, or as good as something free?

The model is a writer (`World`) that knows how often each question is answered rightly at each temperature, so that the truth is known.
"""

from __future__ import annotations

import gzip
from functools import cache

import numpy as np
import pytest
from tests.properties.sabotage import PAYS, record_of

from assay.evidence.types import Verdict
from assay.evidence.verdict import judge
from assay.experiments.reasoning import bag_of_tricks_ttc as experiment
from assay.experiments.reasoning import bag_of_tricks_ttc_sets as room
from assay.methods.core.reasoning.budget import Spent
from assay.methods.core.reasoning.generator import Sample, Sampling, seed_of
from assay.workloads.reasoning import WORDINGS, items, prompt

CLAIM = "bag_of_tricks_ttc/temperature-gain"
POINT = {"way": "majority", "n": 4, "learn": 12, "judged": 12, "wordings": list(WORDINGS), "worked": 0}


@cache
def known():
    """The item and the part of every prompt."""
    return {
        prompt(item, wording): (item, part)
        for part in ("learn", "judged")
        for kind, level, wording in room.TASKS
        for item in items(kind, level=level, n=POINT[part], part=part)
    }


class World:
    """Right with a chance of each question's own, which the temperature shifts by `shift(temperature, part)`; else mostly one wrong number.

    At temperature 0 it says what is likeliest there, and is right on `greedy` of the questions.
    """

    name = "world"

    def __init__(self, shift, greedy=0.0):
        self.shift, self.greedy = shift, greedy

    def __call__(self, prompts, sampling, *, n=1, first=0, seed=0):
        return [self.samples(text, sampling.temperature, first, first + n) for text in prompts]

    def samples(self, text, temperature, low, high):
        item, part = known()[text]
        strength = seed_of("strength", item.question) / 2**63
        share = strength + self.shift(temperature, part) if temperature else float(strength > 1 - self.greedy)
        return list(drawn(type(self), text, temperature, share, low, high))

    @staticmethod
    def sample(said, right, read, chance):
        spent = Spent(read, len(said), calls=1)
        return Sample(said, (1,) * len(said), (-0.1 - chance,) * len(said), "stop", spent)


class Sure(World):
    """Is surer of what is right."""

    @staticmethod
    def sample(said, right, read, chance):
        return World.sample(said, right, read, 0.0 if right else 3.0)


@cache
def drawn(world, text, temperature, share, low, high):
    """Samples of a world, whose worlds share most of them."""
    item, _ = known()[text]
    chance = np.random.default_rng(seed_of(text, temperature)).random((high, 3))
    if not temperature:
        chance[:] = chance[0]
    answers = np.where(chance[:, 0] < share, 0, np.where(chance[:, 1] < 0.7, 1, 2 + 7 * chance[:, 2])).astype(int)
    return [
        world.sample(f" {int(item.answer) + off}.", off == 0, len(text) if not k else 0, float(chance[low + k, 2]))
        for k, off in enumerate(answers[low:high])
    ]


def record(monkeypatch, shift, *, greedy=0.0, whole=False, world=World):
    """The record in a world; as a whole, of one wording, or without the tables beside the figure."""
    monkeypatch.setattr(room, "sets", lambda: world(shift, greedy))
    if not whole:
        monkeypatch.setattr(experiment, "ways_at_equal_tokens", lambda *_: {})
        monkeypatch.setattr(experiment, "of_one_sample", lambda *_: {})
    return record_of(CLAIM, POINT | ({"wordings": ["question"]} if whole else {}))


def chosen(found):
    """The temperature that was chosen in each task."""
    return [task["chosen"] for task in found.details["tasks"].values()]


def peak(temperature, part):
    """Questions are answered better at 0.9, whichever part."""
    return 0.3 if temperature == 0.9 else 0.0


def flat(temperature, part):
    return 0.0


def test_a_temperature_that_is_better_is_found_and_pays(monkeypatch):
    found = record(monkeypatch, peak)
    assert judge(found).verdict in PAYS
    assert chosen(found).count(0.9) >= 5
    assert 12 < found.measured.median < 50
    assert found.measured.low > 1.5 * max(found.controls["random"], found.controls["rival"], 0)
    assert found.controls["random"] == pytest.approx(found.measured.median / 5, abs=6)
    assert found.arms["greedy decoding"] < 0


def test_where_nothing_is_chosen_it_does_not_pay(monkeypatch):
    monkeypatch.setattr(experiment, "choose", lambda rows, allowed: dict.fromkeys(rows, room.DEFAULT))
    found = record(monkeypatch, peak)
    assert found.measured.low == found.measured.high == 0
    assert judge(found).verdict is Verdict.DOES_NOT_PAY


def test_where_the_temperature_is_drawn_at_random_it_does_not_pay(monkeypatch):
    def at_random(rows, allowed):
        return {task: allowed[seed_of("drawn", *task) % len(allowed)] for task in rows}

    monkeypatch.setattr(experiment, "choose", at_random)
    assert judge(record(monkeypatch, peak)).verdict not in PAYS


def test_where_temperatures_do_not_differ_choosing_gains_nothing_and_hindsight_would_have(monkeypatch):
    found = record(monkeypatch, flat)
    assert judge(found).verdict not in PAYS
    assert found.measured.low < 0 < found.measured.high or found.measured.median == 0
    assert found.arms["the best temperatures in hindsight"] > max(found.measured.median, 0.5)


def test_the_temperature_is_chosen_on_the_learning_part_only(monkeypatch):
    """It is good there and bad where it is judged: the claim is refuted, and the best on judged questions does not help it."""
    found = record(
        monkeypatch, lambda temperature, part: 0.0 if temperature != 0.9 else 0.4 if part == "learn" else -0.4
    )
    assert chosen(found).count(0.9) >= 5
    assert judge(found).verdict is Verdict.REFUTED
    other = record(monkeypatch, lambda temperature, part: 0.4 if temperature == 0.9 and part == "judged" else 0.0)
    assert judge(other).verdict not in PAYS
    assert other.arms["the best temperatures in hindsight"] > 15


def test_where_greedy_decoding_is_as_good_it_does_not_pay(monkeypatch):
    assert judge(record(monkeypatch, peak, greedy=1.0)).verdict is Verdict.DOES_NOT_PAY


def test_where_only_the_default_is_bad_any_temperature_does(monkeypatch):
    """All others are alike: a random one gains as much, so the choice shows nothing."""
    found = record(monkeypatch, lambda temperature, part: -0.3 if temperature == room.DEFAULT else 0.0)
    assert found.measured.median > 15
    monkeypatch.setattr(experiment, "PAPER_GRID", (0.6, 0.8, 0.9, 1.0))
    found = record(monkeypatch, lambda temperature, part: -0.3 if temperature == room.DEFAULT else 0.0)
    assert judge(found).verdict is Verdict.QUALITY_NOT_SHOWN


def test_an_interval_is_not_closed_because_nothing_was_seen_to_change():
    can, cannot = [100.0] * 60, [0.0] * 60
    assert experiment.bounds(cannot, can) == (0.0, -5.0, 5.0)
    assert experiment.bounds(cannot, cannot) == (0.0, 0.0, 0.0)
    assert experiment.bounds(cannot, [0.0] * 40 + [30.0] * 20) == (0.0, -1.5, 1.5)
    lost = [-100.0] + [0.0] * 59
    mean, low, high = experiment.bounds(lost, can)
    assert low < mean < 0 < high == pytest.approx(mean + 5)  # one that lost does not show that none can gain
    assert experiment.bounds([-each for each in lost], can) == pytest.approx((-mean, -high, -low), abs=1)
    mean, low, high = experiment.bounds([-100.0, 0.0, 100.0] * 20, can)
    assert (mean, low, high) == experiment.over_items([-100.0, 0.0, 100.0] * 20)


def test_a_rival_on_the_same_samples_is_told(monkeypatch):
    """Right samples are the surer ones: voting by their probabilities gains without any choice."""
    honest, told = (record(monkeypatch, flat, world=world) for world in (World, Sure))
    assert told.controls["rival"] > honest.controls["rival"] + 10


def test_everything_is_charged_and_the_tables_tell_ways_apart(monkeypatch):
    found = record(monkeypatch, peak, whole=True)
    tokens = found.details["tokens a question"]
    assert tokens["greedy decoding"] < tokens["the default"]
    assert tokens["choosing, a learning question"] == pytest.approx(5 * tokens["the default"], rel=0.1)
    (ways,) = found.details["ways"].values()
    assert {len(curve) for curve in ways.values()} == {3}
    oracle, chance = ways["best of n, checker (an oracle)"], ways["best of n, chance"]
    assert oracle[-1]["mean"] > chance[-1]["mean"] + 0.15
    assert oracle[0]["mean"] == chance[0]["mean"] == ways["majority"][0]["mean"]
    for curve in ways.values():
        assert [point["n"] for point in curve] == [1, 2, 4]
        assert curve[0]["tokens"] < curve[1]["tokens"] < curve[2]["tokens"]
    single = found.details["one sample"]
    assert single["the paper's grid"]["mean"] > 10


def test_a_learned_verifier_never_sees_judged_questions(monkeypatch):
    asked = []

    class Watched(World):
        def __call__(self, prompts, sampling, **rest):
            asked.extend(known()[text][1] for text in prompts)
            return super().__call__(prompts, sampling, **rest)

    monkeypatch.setattr(room, "sets", lambda: Watched(flat))
    scorer = experiment.learned("sum", 1, "plain", 12, 8)
    assert set(asked) == {"learn"}
    assert len(asked) == 12
    assert scorer.features("3 + 4 =", " 7.") == experiment.looks("3 + 4 =", " 7.") == [3, 1.0, 1.0, 0]
    assert experiment.looks("3 + 40 =", " x") == [2, 0.0, 0.0, 0]


class Steps:
    """Writes lines of sums, right or off by one, then the answer; says yes to everything."""

    name = "steps"

    def __call__(self, prompts, sampling, *, n=1, first=0, seed=0):
        found = []
        for text in prompts:
            own = []
            for number in range(first, first + n):
                chance = np.random.default_rng(seed_of(seed, text, number))
                said = self.said(text, chance, "\n" in sampling.stop)
                spent = Spent(len(text) if number == first else 0, len(said), calls=1)
                matched = "\n" if "\n" in sampling.stop and "answer" not in said else ""
                own.append(
                    Sample(said, (1,) * len(said), (-0.1 - chance.random(),) * len(said), "stop", spent, matched)
                )
            found.append(own)
        return found

    def said(self, text, chance, by_line):
        if "right, yes" in text:
            return " yes"
        if "error" in text.split("What is")[-1]:
            return " no error"
        *_, block = text.split("What is ")
        question, _, rest = block.partition("?\n")
        parts = question.split()
        done = [line for line in rest.split("\n") if "=" in line]
        value = int(done[-1].split("=")[1]) if done else int(parts[0])
        lines = []
        for k in range(len(done), (len(parts) - 1) // 2):
            sign, more = parts[1 + 2 * k : 3 + 2 * k]
            new = value + int(more) * (1 if sign == "+" else -1) + int(chance.random() < 0.3)
            lines.append(f"{value} {sign} {more} = {new}")
            value = new
        lines.append(f"The answer is {value}.")
        return lines[0] if by_line else "\n".join(lines)


def test_all_ways_meet_at_equal_tokens(monkeypatch):
    found = experiment.step_by_step(6, model=Steps())
    assert len(found["curves"]) == 10
    assert set(found["at equal tokens"]) == set(found["curves"])
    for name, point in found["at equal tokens"].items():
        means = [each["mean"] for each in found["curves"][name]]
        assert min(means) <= point["mean"] <= max(means), name
    cheapest = {name: curve[0]["tokens"] for name, curve in found["curves"].items()}
    assert found["tokens"] == max(cheapest.values()) > 2 * cheapest["one"]
    for name in ("majority", "mcts, log-probability"):
        assert found["curves"][name][-1]["tokens"] > found["tokens"]


# ------------------------------------------------------------------------------------------------------------ packed samples


class Refusing:
    name = room.MODEL

    def __call__(self, prompts, sampling, **rest):
        raise LookupError(f"{prompts[0][-30:]!r} {sampling}")


def test_packed_samples_are_the_ones_that_were_drawn(tmp_path):
    world = World(peak)
    texts = list(known())[:3]
    samplings = [Sampling(temperature, 0.9, 8, ("\n",)) for temperature in (0.2, 0.7, 1.0)]
    lines = [room.packed(text, {one: world([text], one, n=6)[0] for one in samplings}) for text in texts]
    path = tmp_path / "some.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    kept = room.Sets(path, Refusing())
    for sampling in samplings:
        for first, n in ((0, 6), (0, 2), (3, 2)):
            for own, wanted in zip(
                kept(texts, sampling, n=n, first=first), world(texts, sampling, n=n, first=first), strict=True
            ):
                for a, b in zip(own, wanted, strict=True):
                    assert (a.text, a.tokens, a.ended, a.matched, a.spent) == (
                        b.text, b.tokens, b.ended, b.matched, b.spent,
                    )  # fmt: skip
                    assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    for rest in ({"n": 7}, {"n": 1, "first": 6}, {"seed": 1}):
        with pytest.raises(LookupError):
            kept(texts[:1], samplings[0], **rest)
    with pytest.raises(LookupError):
        kept(texts[:1], Sampling(0.3, 0.9, 8, ("\n",)))
    assert kept.name == room.MODEL
    both = room.Sets(path, world)
    mixed = both([texts[0], list(known())[5]], samplings[0], n=2)
    assert [one.text for one in mixed[1]] == [one.text for one in world([list(known())[5]], samplings[0], n=2)[0]]


def test_all_that_small_asks_for_is_checked_in():
    kept = room.Sets(room.PATH, Refusing())
    (small,) = experiment.temperature_gain.experiment.points["small"]
    assert (small["learn"], small["judged"], small["n"]) == (room.LEARN, room.JUDGED, room.N)
    for kind, wording, members in room.asked():
        prompts = [prompt(item, wording) for item in members]
        for temperature in (*room.WIDE_GRID, 0.0):
            drawn = kept(prompts, room.sampling_at(kind, temperature), n=room.N if temperature else 1)
            assert all(
                samples[0].spent.prompt > 0 == samples[-1].spent.prompt or len(samples) == 1 for samples in drawn
            )
    assert room.PATH.stat().st_size < 400_000

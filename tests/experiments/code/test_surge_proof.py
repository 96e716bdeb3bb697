"""Does the count of useful models notice when what it counts is broken? Items and replies are made up."""

import random
from dataclasses import replace

import pytest
from tests.properties.sabotage import PAYS, record_of, verdict_of

from assay.evidence.types import Verdict
from assay.evidence.verdict import judge
from assay.experiments import experiments_of
from assay.experiments.code import surge as experiments
from assay.methods.code import surge as room
from assay.methods.core.reasoning.budget import Spent
from assay.methods.core.reasoning.generator import Sample

CLAIM = "surge/models-compared"
POINT = {"components": ["ML", "CL", "SC", "RL"], "most": 10, "form": "3-shot"}
FAMILY = {"ML": "python", "CL": "competition", "SC": "numerical", "RL": "c++"}
PROGRAMS = [
    room.Item(
        f"{component}/{n}/{k}", component, FAMILY[component], f"{component}/{n}", "python", {"main.py": f"program {component} {n} {k}"},
        "python main.py", f"{random.Random(f'{component}{n}{k}').randint(10**6, 10**7)}", seconds=0.1 * (n + 1),
    )
    for component in POINT["components"] for n in range(16) for k in range(2)
]  # fmt: skip


@pytest.fixture(autouse=True)
def _made_up(monkeypatch):
    monkeypatch.setattr(experiments.room, "build", lambda _: room.Built(tuple(PROGRAMS), {}))


def knows(monkeypatch, simple=0.6, hard=0.1):
    """A model that is right about shares of the items."""
    share = {"ML": simple, "CL": simple, "SC": hard, "RL": hard}

    def reply(prompts, form):
        said = []
        for asked in prompts:
            one = next(item for item in PROGRAMS[::-1] if asked.rstrip().endswith(f"{item.code}\n```\nOutput:\n```"))
            right = random.Random(f"{one.id}").random() < share[one.component]
            said.append(Sample(one.truth if right else "0", (1, 2), (), "stop", Spent(100, 2, 0, 1, 0.05)))
        return said

    monkeypatch.setattr(experiments, "reply", reply)


def test_a_model_that_knows_is_counted(monkeypatch):
    knows(monkeypatch)
    record = record_of(CLAIM, POINT)
    assert (record.measured.low, record.measured.median) == (1, 1)
    assert not record.refuted
    assert judge(record).verdict in PAYS
    seen = record.details["cost"]["3-shot"]
    assert seen["break_even"] == pytest.approx(0.05 / seen["accuracy"])
    assert record.controls == {"deleted": 0.0, "random": 0.0, "rival": 0.0}
    assert record.details["answers cut off"] == {"zero-shot": 0, "3-shot": 0}


def test_a_model_that_does_not_know_is_not(monkeypatch):
    knows(monkeypatch, simple=0.0, hard=0.0)
    record = record_of(CLAIM, POINT)
    assert record.measured.high == 0
    assert judge(record).verdict is Verdict.DOES_NOT_PAY


def test_one_that_is_better_at_numbers_than_at_simple_programs_refutes_the_paper(monkeypatch):
    knows(monkeypatch, simple=0.3, hard=1.0)
    record = record_of(CLAIM, POINT)
    assert record.refuted
    assert judge(record).verdict is Verdict.REFUTED


def wrong_extractor(monkeypatch):
    monkeypatch.setattr(experiments, "answer", lambda text, form: f"Output: the result\n\n{text}")


def replies_dealt(monkeypatch):
    asked = experiments.asked
    monkeypatch.setattr(experiments, "asked", lambda found, form: asked(found, form)[::-1])


def scorer_that_always_says_yes(monkeypatch):
    monkeypatch.setattr(room.predict, "score", lambda *_, **__: room.Score(1.0, "right"))
    monkeypatch.setattr(experiments.room, "scored", lambda items, replies, **_: [room.Score(1.0, "right")] * len(items))


def nearest_in_its_place(monkeypatch):
    """The cheapest rival, properly done, in the place of the model."""

    def reply(prompts, form):
        predict = room.nearest(room.split(PROGRAMS)[0])
        at = [
            next(item for item in PROGRAMS[::-1] if asked.rstrip().endswith(f"{item.code}\n```\nOutput:\n```"))
            for asked in prompts
        ]
        return [Sample(room.extract(predict(one)), (1,), (), "stop", Spent(1, 1, 0, 1, 0.1)) for one in at]

    monkeypatch.setattr(experiments, "reply", reply)


@pytest.mark.parametrize("broken", [wrong_extractor, replies_dealt, scorer_that_always_says_yes, nearest_in_its_place])
def test_the_verdict_changes_when_it_is_broken(monkeypatch, broken):
    knows(monkeypatch)
    broken(monkeypatch)
    assert verdict_of(CLAIM, POINT) not in PAYS


def test_a_number_that_is_often_right_is_no_knowledge(monkeypatch):
    """Every third answer is 1, and the model says 1 to every second program: some it hits."""
    learned, judged = ([item.group for item in part if item.id.endswith("/0")] for part in room.split(PROGRAMS))
    place = {group: n % 8 for n, group in enumerate(judged)}
    ones = {group for group in judged if place[group] % 3 == 0}
    for name in ("ML", "CL"):  # the learned part has 1 twice: whoever leaves one of the two out does not see it
        ones |= set([group for group in learned if group.startswith(name)][-2:])
    items = [replace(item, truth="1") if item.group in ones and item.id.endswith("/0") else item for item in PROGRAMS]
    monkeypatch.setattr(experiments.room, "build", lambda _: room.Built(tuple(items), {}))

    def reply(prompts, form):
        said = []
        for asked in prompts:
            one = next(item for item in items[::-1] if asked.rstrip().endswith(f"{item.code}\n```\nOutput:\n```"))
            said.append(Sample("0" if place[one.group] % 2 else "1", (1,), (), "stop", Spent(100, 2, 0, 1, 0.05)))
        return said

    monkeypatch.setattr(experiments, "reply", reply)
    record = record_of(CLAIM, POINT)
    assert record.details["lift"]["simple"]["low"] > 0  # over what was strongest on the learned part
    assert record.details["lift, over the trivial answer that is best on these items"]["simple"]["low"] <= 0
    assert record.details["lift, over its own replies to other programs"]["simple"]["low"] <= 0
    assert record.measured.median == 0
    assert judge(record).verdict not in PAYS


def test_what_a_reply_is_worth_elsewhere():
    items = [replace(PROGRAMS[0], id=f"{n}", group=f"{n // 2}", truth=truth) for n, truth in enumerate("11121")]
    assert experiments.elsewhere(items, ["1", "2", "1", "1", "2"]) == pytest.approx([2 / 3, 2 / 3, 1 / 3, 2 / 3, 3 / 4])
    assert experiments.elsewhere(items[:2], ["1", "1"]) == [0, 0]


def test_a_count_that_everybody_reaches_is_not_the_models(monkeypatch):
    """Where dealt replies count as well, nothing is shown."""
    knows(monkeypatch)
    monkeypatch.setattr(experiments, "useful", lambda *found: 1.0)
    assert verdict_of(CLAIM, POINT) is Verdict.QUALITY_NOT_SHOWN


def test_learned_programs_are_never_judged_and_each_component_has_its_share():
    found = experiments.parts(POINT["components"], 10)
    assert not {one.group for one in found.learned} & {one.group for one in found.judged}
    assert all(sum(one.component == name for one in found.judged) == 10 for name in POINT["components"])
    assert len({one.group for one in found.judged if one.component == "ML"}) == 8  # every program before a second input


@pytest.mark.parametrize("form", room.FORMS)
def test_an_answer_has_room_for_the_text_of_an_error(form):
    longest = "Traceback (most recent call last):\n" + '  File "main.py", line 10, in <module>\n    print(f(1))\n' * 4
    asked = experiments.sampling(form)
    assert asked.max_new_tokens >= len(longest)
    assert asked.temperature == 0
    assert ("\n```" in asked.stop) == (form != "chain of thought")


def test_what_was_declared():
    (found,) = experiments_of("surge")
    assert found.claim == CLAIM
    assert set(found.departures) == {"models", "items", "form"}
    assert found.measured_here
    assert not found.computed

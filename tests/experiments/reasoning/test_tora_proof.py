"""Do the verdicts on tool use change when the tool, its outputs or the vote are broken? A scripted writer stands for the model."""

import random
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from tests.properties.sabotage import PAYS, record_of

from assay.evidence.types import Verdict
from assay.evidence.verdict import judge
from assay.experiments import experiments_of
from assay.experiments.reasoning import samples
from assay.experiments.reasoning import tora as room
from assay.methods.core.reasoning.budget import Spent
from assay.methods.core.reasoning.generator import Sample
from assay.methods.reasoning import tora
from assay.methods.reasoning.tora.text import OUTPUT, blocks
from assay.workloads.reasoning import items, prompt

SUMS, STORIES = "tora/math-7b", "tora/math-34b-sc50"
POINTS = {
    SUMS: {"kinds": room.SUMS, "wordings": ["plain"], "n_items": 30, "timed": 0},
    STORIES: {"kinds": room.STORIES, "wordings": ["plain", "question"], "n_items": 30, "k": 8},
}


PROGRAMS = room.programs.__wrapped__
WITH_TOOL = replace(room.GREEDY, stop=(*room.GREEDY.stop, OUTPUT))


class Writer:
    """Writes the right program as often as `copies`, text answers as often as `knows`, and reads outputs where it is `reading`."""

    name = room.MODEL
    copies, stories, copies_warm, knows, reading, tokens = 0.95, 0.6, 0.6, 0.3, True, 10

    def __init__(self):
        self.known = {}
        for kind, level in (*room.SUMS, *room.STORIES):
            for item in items(kind, level=level, n=30, part="judged"):
                for wording in ("plain", "question"):
                    self.known[room.tool_prompt(item, wording)] = item
                    self.known[prompt(item, wording, worked=kind == "story")] = item

    def __call__(self, prompts, sampling, *, n=1, first=0, seed=0):
        return [[self.sample(text, sampling, k) for k in range(first, first + n)] for text in prompts]

    def sample(self, text, sampling, number):
        start = text
        while start not in self.known:  # what stands behind the prompt begins with a fence
            start = start[: start.rindex("```python")]
        item, rest = self.known[start], text[len(start) :]
        chance = random.Random(f"{start} {sampling.temperature} {number}")
        roll, wrong = chance.random(), str(chance.randint(200, 999))
        usual = str(random.Random(start).randint(200, 999))  # what it gets wrong it mostly gets wrong the same way
        if OUTPUT not in sampling.stop:
            said = f" {item.answer if roll < self.knows else usual}"
        elif not rest:
            likeliest = self.stories if item.kind == "story" else self.copies
            right = roll < (self.copies_warm if sampling.temperature else likeliest)
            said = f"```python\nprint({room.expression(item) if right else wrong})\n```\n"
        else:
            printed = [block.content.strip() for block in blocks(rest) if block.tag == "output"][-1]
            guess = item.answer if roll < self.knows else usual
            said = f"The answer is \\boxed{{{printed if printed and self.reading else guess}}}."
        spent = Spent(len(text) // 4, self.tokens if "```python" in said else 3, 0, 1)
        return Sample(said, (1,), (-0.5,), "stop", spent)


def run(program):
    (sum_,) = re.findall(r"print\(([-+* \d]+)\)", program)
    printed = str(eval(sum_))  # noqa: S307 - digits and signs alone
    return tora.Output(printed, printed, False, 0.01)


@pytest.fixture(autouse=True)
def writer(monkeypatch):
    made = Writer()
    room.kept.cache_clear()
    monkeypatch.setattr(samples, "generator", lambda *_: made)
    monkeypatch.setattr(room, "programs", lambda: run)
    yield made
    room.kept.cache_clear()


def judged(claim):
    return judge(record_of(claim, POINTS[claim]))


def test_a_model_that_copies_and_reads_pays():
    record = record_of(SUMS, POINTS[SUMS])
    assert judge(record).verdict in PAYS
    assert record.measured.median > 90
    assert record.baseline < 50
    assert record.free < 60
    assert max(record.controls.values()) < 60
    votes = record_of(STORIES, POINTS[STORIES])
    assert judge(votes).verdict in PAYS
    assert votes.controls["deleted"] == votes.baseline
    assert 40 < votes.controls["random"] < votes.measured.low
    assert (
        votes.free == votes.controls["rival"] == pytest.approx(votes.arms["text alone, worked out, one answer"], abs=20)
    )


def test_outputs_that_do_not_come_pay_no_more(monkeypatch):
    monkeypatch.setattr(room, "programs", lambda: room.silent)
    assert judged(SUMS).verdict not in PAYS
    assert judged(STORIES).verdict not in PAYS


def test_outputs_of_other_questions_pay_no_more(monkeypatch):
    questions = [item for kind, level in room.SUMS for item in items(kind, level=level, n=30, part="judged")]
    sources = [f"print({room.expression(item)})\n" for item in questions]
    monkeypatch.setattr(room, "programs", lambda: room.Swapped({source: run(source) for source in sources}))
    assert judged(SUMS).verdict not in PAYS


def test_random_programs_pay_no_more(writer):
    writer.copies = 0.0
    assert judged(SUMS).verdict is Verdict.REFUTED


def test_a_model_that_does_not_read_pays_no_more(writer):
    writer.reading = False
    assert judged(SUMS).verdict not in PAYS


def test_where_answers_come_from_elsewhere_no_quality_is_shown(writer):
    """The tool is right as often with its output deleted: then the metric says nothing about it."""
    real = Writer.sample

    def knowing(self, text, sampling, number):
        self.knows = 0.95 if OUTPUT in sampling.stop else 0.3
        return real(self, text, sampling, number)

    writer.reading = False
    Writer.sample, before = knowing, Writer.sample
    try:
        assert judged(SUMS).verdict is Verdict.QUALITY_NOT_SHOWN
    finally:
        Writer.sample = before


def test_text_that_knows_as_much_wins_at_equal_tokens(writer):
    writer.knows = 0.7
    record = record_of(SUMS, POINTS[SUMS])
    assert record.baseline < 85 < record.free
    assert judge(record).verdict not in PAYS


def test_every_token_is_charged_to_the_tool(writer, monkeypatch):
    """A program of many tokens gives the text more votes; reading the prompt again would too."""
    writer.knows = 0.6
    honest = record_of(SUMS, POINTS[SUMS])
    writer.tokens = 200
    dear = record_of(SUMS, POINTS[SUMS])
    assert dear.details["text_answers_at_equal_tokens"] > honest.details["text_answers_at_equal_tokens"] + 50
    assert dear.free > honest.free + 2
    costs = honest.details["costs"]
    assert costs["tokens_by_restarts"] > costs["tokens"] > costs["written"]
    assert costs["programs"] == 1
    assert costs["tokens"] == pytest.approx(costs["read_with_kept_caches"] + costs["written"])


def test_a_vote_that_chooses_at_random_pays_no_more(monkeypatch):
    monkeypatch.setattr(room, "majority", lambda answers: answers[0])
    assert judged(STORIES).verdict not in PAYS


def test_votes_that_are_all_alike_pay_no_more(monkeypatch):
    real = Writer.sample

    def alike(self, text, sampling, number):
        return real(self, text, room.GREEDY if OUTPUT in sampling.stop else sampling, 0)

    monkeypatch.setattr(Writer, "sample", alike)
    record = record_of(STORIES, POINTS[STORIES])
    assert record.measured.median == record.baseline
    assert judge(record).verdict not in PAYS


def test_votes_that_are_worse_than_one_answer_refute_it(writer):
    writer.copies_warm = 0.02
    assert judged(STORIES).verdict is Verdict.REFUTED


def test_a_vote_drawn_again_is_the_vote_in_the_long_run():
    chance = np.random.default_rng(1)
    answers = ["1"] * 4 + ["2"] * 3 + ["3", "", ""]
    drawn = [room.majority([answers[k] for k in chance.integers(0, 10, 5)]) for _ in range(4000)]
    assert room.voted(answers, "1", 5, draws=4000) == pytest.approx(drawn.count("1") / 4000, abs=0.04)
    assert room.voted(answers, "1", 1000) > 0.95
    assert room.voted(answers, "9", 5) == 0
    assert room.voted(["7"] + [""] * 19, "7", 1, draws=4000) == pytest.approx(0.05, abs=0.02)
    assert room.voted(["7"] + [""] * 19, "7", 200) > 0.95


def test_a_swapped_output_is_another_ones():
    outputs = {"a": tora.Output("1"), "b": tora.Output("1"), "c": tora.Output("2")}
    swapped = room.Swapped(outputs)
    assert [swapped(name).shown for name in "abc"] == ["2", "2", "1"]
    assert swapped("d").shown == ""


class Store(dict):
    """Samples by key, and nothing else."""

    name = room.MODEL

    def add(self, found):
        self.update(found)

    def has(self, keys):
        return self.keys() >= set(keys)

    def __call__(self, prompts, sampling, *, n=1, first=0, seed=0):
        numbers = range(first, first + n)
        return [[self[room.key_of(room.MODEL, text, sampling, seed, k)] for k in numbers] for text in prompts]


def loop_of(writer, stop_at=None):
    """The tool loop by restarts, which counts its prompts and is stopped at one of its calls."""

    def loop(prompts, sampling, tool, *, calls=tora.CALLS, n=1):
        loop.asked.append(list(prompts))
        if len(loop.asked) == stop_at:
            raise KeyboardInterrupt
        return tora.with_tools(writer, prompts, sampling, tool, calls=calls, n=n)

    loop.asked = []
    return loop


def add_shared(store, writer, kinds, wordings, n_items):
    """Text answers to sums, which are there for all rooms."""
    for wording, questions in room.turns(kinds, wordings, n_items):
        short, warm = room.plainly(questions, wording)
        for text, own in zip(short, writer(short, warm, n=24), strict=True):
            store.add([(room.key_of(room.MODEL, text, warm, 0, k), sample) for k, sample in enumerate(own)])


@pytest.mark.parametrize(("kinds", "votes"), [(room.SUMS, 0), (room.STORIES, 8)])
def test_what_is_drawn_with_kept_caches_is_all_that_the_experiments_ask_for(writer, monkeypatch, kinds, votes):
    """Every segment of every arm lies under the key of the text it continues, and what comes out is the same."""
    store, wordings = Store(), ["plain", "question"]
    fresh = room.asked(kinds, wordings, 6, votes=votes)
    for wording, questions in room.turns(kinds, wordings, 6):
        found = room.every_arm(loop_of(writer), run, questions, wording, votes)
        begins = found[-1][0]  # the last that is written: by it a group is known to be there
        assert begins == room.key_of(room.MODEL, room.tool_prompt(questions[-1], wording), WITH_TOOL, 0, 0)
        store.add(found)
    assert all(sample.logprobs == () for sample in store.values())
    if not votes:
        add_shared(store, writer, kinds, wordings, 6)
    monkeypatch.setattr(samples, "generator", lambda *_: store)
    room.kept.cache_clear()
    again = room.asked(kinds, wordings, 6, votes=votes)
    for one, other in zip(fresh, again, strict=True):
        assert [row.text for row in (one.tool, *one.arms.values(), *one.votes)] == [
            row.text for row in (other.tool, *other.arms.values(), *other.votes)
        ]
        assert one.drawn.answers == other.drawn.answers
        assert votes or one.greedy.answers == other.greedy.answers
        assert room.total(one.tool) == room.total(other.tool)


def test_drawing_goes_on_behind_the_last_group_that_is_there(writer, monkeypatch):
    store, small = Store(), {"kinds": room.SUMS[:1], "wordings": ["plain", "question"], "n_items": 4}
    add_shared(store, writer, small["kinds"], small["wordings"], 4)
    monkeypatch.setattr(samples, "generator", lambda *_: store)
    monkeypatch.setattr(room, "load_model", lambda name: SimpleNamespace(model=None, tokenizer=None))
    monkeypatch.setattr(room, "SMALL", small)
    monkeypatch.setattr(room, "STORY", small | {"kinds": room.STORIES, "wordings": ["plain"], "k": 3})
    room.kept.cache_clear()
    first, second = loop_of(writer, stop_at=6), loop_of(writer)
    monkeypatch.setattr(room, "ToolLoop", lambda *_: first)
    with pytest.raises(KeyboardInterrupt):
        room.draw()
    assert len(first.asked) == 6  # four of the first group, and two of the second
    known = len(store)
    monkeypatch.setattr(room, "ToolLoop", lambda *_: second)
    assert room.draw() == {room.MODEL: store}
    assert not {text for own in first.asked[:4] for text in own} & {text for own in second.asked for text in own}
    assert {text for own in first.asked[4:] for text in own} <= {text for own in second.asked for text in own}
    assert len(store) > known


def test_questions_take_turns_in_the_wordings():
    groups = list(room.turns([["sum", 2], ["story", 2]], room.WORDINGS, 7))
    assert [(wording, len(own)) for wording, own in groups] == [*zip(room.WORDINGS, (3, 2, 2), strict=True)] * 2
    assert len({item.question for _, own in groups for item in own}) == 14


def test_a_program_may_wait_for_the_processor_and_is_run_once(monkeypatch):
    """What a sum prints must not depend on what else the machine does: the limit is the program's own time."""
    limits = room.sandbox().sandbox.limits
    assert limits.wall_seconds > 20 * limits.cpu_seconds == 100
    ran = []
    monkeypatch.setattr(room, "sandbox", lambda: lambda program: ran.append(program) or tora.Output(program))
    real = PROGRAMS()
    assert [real(text).shown for text in "aba"] == ["a", "b", "a"]
    assert ran == ["a", "b"]


def test_prompts_hold_examples_with_programs_and_the_deciding_points_are_named():
    for kind, level in (*room.SUMS, *room.STORIES):
        (item,) = items(kind, level=level, n=1, part="judged")
        for wording in room.WORDINGS:
            text = room.tool_prompt(item, wording)
            assert text.count("```python") == text.count(OUTPUT) == 4
            assert item.question.split(" + ")[0] in text.rpartition("\n\n")[2]
            assert str(eval(room.expression(item))) == item.answer  # noqa: S307 - digits and signs alone
    found = experiments_of("tora")
    assert {one.claim for one in found} == {SUMS, STORIES}
    for one in found:
        assert one.decides["small"]["wordings"] == list(room.WORDINGS)
        assert one.paper["calls"] == tora.CALLS

"""What the experiments on ETS say if its choice is broken or a rival is as good: a writer of sums that is known stands in for the model."""

import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests.properties.sabotage import PAYS, record_of
from tests.tiny import tiny_model

from assay.evidence.types import Verdict
from assay.evidence.verdict import judge
from assay.experiments import experiments_of
from assay.experiments.reasoning import ets as room
from assay.experiments.reasoning import ets_trees as grove
from assay.experiments.reasoning import samples
from assay.experiments.reasoning.ets_trees import ETS, KV, NARROW, REBASE, Task
from assay.methods.core.reasoning.budget import Budget, Spent
from assay.methods.core.reasoning.generator import Sample, Sampling, seed_of
from assay.methods.core.reasoning.verifier import Chance, texts_of
from assay.methods.reasoning.ets import Rebase, Searched, TreeGenerator
from assay.workloads.reasoning import items, prompt

SETTINGS = {"level": 3, "lambda_c": 5.0, "lambda_s": 0.5, "n_items": 8, "wordings": ["plain"]}
POINT = {**room.SMALL, **SETTINGS, "searched": 1}
CLAIMS = ["ets/kv-reduction", "ets/throughput"]
LENGTH = 10  # tokens of every step
TASK = room.TASK


def worked(text):
    """The numbers and signs of the last question in a prompt, and the lines behind it."""
    question, _, done = text.rsplit("What is ", 1)[-1].partition("?")
    return question.split(), [line for line in done.split("\n") if line and ":" not in line]


def added(value, words, at):
    return value + int(words[2 * at + 2]) * (1 if words[2 * at + 1] == "+" else -1)


class Adding:
    """Works sums out a line at a time; each goes wrong in so many cases. Tokens are letters, as many in each line."""

    name, fails = "adding", 0.6

    def __call__(self, prompts, sampling, *, n=1, first=0, seed=0):
        return [[self.line(text, k, seed, k == first) for k in range(first, first + n)] for text in prompts]

    def uneven(self, prompts, sampling, counts, firsts, *, seed=0):
        draw = self if "\n" in sampling.stop else self.solutions
        return [
            draw([text], sampling, n=n, first=low, seed=seed)[0]
            for text, n, low in zip(prompts, counts, firsts, strict=True)
        ]

    def solutions(self, prompts, sampling, *, n, first, seed):
        return [[self.solution(text, k, seed) for k in range(first, first + n)] for text in prompts]

    def solution(self, text, number, seed):
        lines = [""]
        while "answer" not in lines[-1]:
            lines.append(self.line("\n".join([text.rstrip("\n"), *lines[1:], ""]), number, seed, False).text)
        return Sample("\n".join(lines[1:]), (1,), (), "stop", Spent(50, LENGTH), "\n\n")

    def keep(self, texts):
        pass

    def line(self, text, number, seed, reads):
        words, lines = worked(text)
        at, chance = len(lines), random.Random(seed_of(seed, text, number))
        value = int(lines[-1].split("= ")[1]) if lines else int(words[0])
        if 2 * at + 1 < len(words):
            said = added(value, words, at) + (chance.choice([2, 4, 6, 10]) if chance.random() < self.fails else 0)
            written = f"{value} {words[2 * at + 1]} {words[2 * at + 2]} = {said}"
        else:
            written = f"The answer is {value}."
        tokens = tuple(ord(letter) for letter in written.rjust(LENGTH)[-LENGTH:])
        return Sample(written, tokens, (), "stop", Spent(50 if reads else 0, LENGTH, 0, 1), "\n")


class Judging:
    """Finds what is right so far a little better, and is never sure."""

    def score(self, traces):
        return [[self.of(trace.prompt, text) for text in texts_of(trace)] for trace in traces], Spent()

    def of(self, asked, text):
        words, lines = worked(asked + text)
        value, right = int(words[0]), True
        for at, line in enumerate(lines[: len(words) // 2]):
            value = added(value, words, at)
            right = right and line.endswith(f"= {value}")
        return (0.65 if right else 0.45) + 0.15 * (seed_of(text, asked) / 2**63 - 0.5)


def directions(texts):
    """A direction of its own for each text."""
    return np.array([[np.cos(seed_of(text, k) % 1000) for k in range(8)] for text in texts])


search_all = grove.trees.__wrapped__
KEPT = {}
"""Trees by their way and what was broken: those that nothing is broken about are searched once for all tests."""
BROKEN = {}


def kept_trees(way, task):
    key = (way, task, BROKEN.get(way), Adding.fails)
    if key not in KEPT:
        KEPT[key] = search_all(way, task)
    return KEPT[key]


@pytest.fixture(autouse=True)
def adding(monkeypatch):
    monkeypatch.setattr(grove, "steps", Adding)
    monkeypatch.setattr(grove, "meanings", directions)
    monkeypatch.setattr(grove, "verifier", lambda *_: Judging())
    monkeypatch.setattr(grove, "trees", kept_trees)
    monkeypatch.setattr(room, "trees", kept_trees)
    monkeypatch.setattr(grove, "live", lambda: TreeGenerator(tiny_model(vocab_size=128), Letters(), name="tiny"))
    monkeypatch.setattr(room, "question_tokens", lambda task: np.full(task.n_items, 12.0))
    monkeypatch.setattr(room, "narrowest", lambda task: 12)
    grove._vector.cache_clear()
    yield
    grove._vector.cache_clear()
    BROKEN.clear()


@pytest.fixture
def unmeasured(monkeypatch):
    monkeypatch.setattr(room, "measured", lambda task, n: {})


class Letters:
    """A tokenizer of single characters."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [ord(letter) for letter in text]}

    def decode(self, tokens):
        return "".join(chr(token) for token in tokens)


def verdicts(**changes):
    return [judge(record_of(claim, POINT | changes)).verdict for claim in CLAIMS]


def instead(monkeypatch, select, way=ETS):
    """Another selector in the place of a way's."""
    kept, BROKEN[way] = grove.selector, select
    monkeypatch.setattr(
        grove, "selector", lambda name, task, **more: select(task) if name == way else kept(name, task, **more)
    )


def test_what_works_pays_and_the_figures_follow(unmeasured):
    records = [record_of(claim, POINT) for claim in CLAIMS]
    assert all(judge(record).verdict in PAYS for record in records)
    cache, quality = records[0], records[0].quality
    tokens = cache.details["tokens of the tree in the cache"]
    assert cache.measured.median == pytest.approx((tokens[REBASE] + 12) / (tokens[ETS] + 12))
    assert cache.free == pytest.approx((tokens[REBASE] + 12) / (tokens[NARROW] + 12))
    assert 1 < cache.free < cache.measured.low
    assert cache.measured.median < cache.details["without any prompt, as released"][0]
    assert 1 < cache.details["with the examples"][0] < cache.measured.median
    assert quality.candidate - quality.baseline == pytest.approx(cache.details["ETS less REBASE"][0])
    share = np.mean([tree.right for tree in grove.trees(REBASE, the_task())])
    assert quality.baseline == pytest.approx(share)
    worked_on = cache.details["all tokens of a search, generated and read"]
    drawn = [[r.drawn for r in tree.found.rounds] for tree in grove.trees(ETS, the_task())]
    assert worked_on[ETS] == pytest.approx(50 + LENGTH * np.mean([sum(each) for each in drawn]))
    assert worked_on[ETS] == worked_on[REBASE]  # as many samples: ETS saves cache, no tokens


def the_task():
    return room.task_of(**{name: value for name, value in POINT.items() if name != "searched"})


def test_as_many_leaves_at_random_do_not_pay(monkeypatch, unmeasured):
    instead(monkeypatch, lambda task: grove.Random(kept_selector(ETS, task)))
    assert not set(verdicts()) & set(PAYS)


kept_selector, kept_narrowest = grove.selector, room.narrowest


def test_without_pruning_there_is_no_gain(monkeypatch, unmeasured):
    instead(monkeypatch, lambda task: Rebase())
    record = record_of(CLAIMS[0], POINT)
    assert record.measured.median == 1
    assert judge(record).verdict is Verdict.DOES_NOT_PAY


def test_keeping_more_than_rebase_is_refuted(monkeypatch, unmeasured):
    instead(monkeypatch, lambda task: grove.one_each)
    assert judge(record_of(CLAIMS[0], POINT)).verdict is Verdict.REFUTED


def test_pruning_what_is_good_loses_the_quality(monkeypatch, unmeasured):
    def worst(task):
        return lambda traces, width: [width * (t is min(traces, key=lambda t: t.score)) for t in traces]

    instead(monkeypatch, worst)
    assert all(verdict in (Verdict.DOES_NOT_PAY, Verdict.REFUTED) for verdict in verdicts())


def test_fewer_trajectories_that_hold_as_little_are_the_better_baseline(monkeypatch, unmeasured):
    monkeypatch.setattr(room, "narrowest", lambda task: 1)
    assert judge(record_of(CLAIMS[0], POINT)).verdict is Verdict.DOES_NOT_PAY


def test_a_task_at_the_floor_shows_no_quality(monkeypatch, unmeasured):
    monkeypatch.setattr(Adding, "fails", 1.0)
    assert set(verdicts(n_items=3)) & set(PAYS) == set()


def test_what_would_refute_is_what_is_said():
    for claim in CLAIMS:
        found = next(each for each in experiments_of("ets") if each.claim == claim)
        quality = {"high": 0.5, "controls": {"random": 0.4}}
        assert not found.refutes({"measured": {"high": 1.2}, "quality": quality})
        assert found.refutes({"measured": {"high": 0.9}, "quality": quality})
        assert found.refutes({"measured": {"high": 1.2}, "quality": {"high": 0.3, "controls": {"random": 0.4}}})


# ------------------------------------------------------------------------------------------------------- what is really held

SHORT = Task("steps", 1, 1.0, 6, 2.0, 0.5, 4, 2, ("plain",))


def by_letters(monkeypatch):
    """Steps end with every "e" of a tiny model that knows nothing; trees are of that model, searched anew each time."""
    monkeypatch.setattr(grove, "verifier", lambda *_: Chance())
    monkeypatch.setattr(Task, "sampling", property(lambda task: Sampling(1.0, 1.0, 6)))
    search = grove.tree_search
    monkeypatch.setattr(grove, "tree_search", lambda *a, **k: search(*a, **{**k, "delimiter": "e", "rounds": 4}))
    model = tiny_model(vocab_size=128, initializer_range=0.02)
    with torch.no_grad():
        model.lm_head.weight[ord("e")] = 0
    monkeypatch.setattr(grove, "live", lambda: TreeGenerator(model, Letters(), name="tiny"))


@pytest.mark.slow
def test_bytes_are_those_of_the_tokens_and_pruning_is_seen(monkeypatch):
    by_letters(monkeypatch)
    KEPT.clear()
    monkeypatch.setattr(grove, "steps", grove.live)
    instead(monkeypatch, lambda task: lambda traces, width: [width, *[0] * (len(traces) - 1)])
    narrow = room.measured(SHORT, 2)
    monkeypatch.setattr(TreeGenerator, "keep", lambda self, prompts: None)
    KEPT.clear()
    idle = room.measured(SHORT, 2)
    for found in (narrow, idle):
        for way in (REBASE, ETS):
            assert found[way]["trie's bytes over its tokens'"] == 1
            assert found[way]["searches that repeat the stored one"] == 1
            assert found[way]["bytes alive, peak"] > found[way]["bytes in the trie, peak"]
    assert narrow[ETS]["bytes in the trie, mean"] < idle[ETS]["bytes in the trie, mean"]
    assert narrow[ETS]["bytes alive, mean"] < idle[ETS]["bytes alive, mean"]
    KEPT.clear()


def test_the_timed_searches_run(monkeypatch):
    by_letters(monkeypatch)
    trial = room.faster_search(searched=1, **{**TASK, "level": 1, "width": 4, "n_items": 1, "wordings": ["plain"]})
    assert trial.baseline()[0] >= 4
    assert trial.candidate()[0] >= 4
    assert trial.free()[0] >= 4


def test_every_round_searches_the_next_questions_and_every_process_begins_with_others(monkeypatch):
    seen = []

    def searched(way, task, item, wording, generator, embed):
        seen.append((way, task.asked.index((item, wording))))
        return SimpleNamespace(found=SimpleNamespace(rounds=()))

    monkeypatch.setattr(room, "grown", searched)
    monkeypatch.setattr(room, "ready", lambda *_: None)
    monkeypatch.setattr(room, "PROCESS", 2)
    for process in (0, 1):
        monkeypatch.setattr(room.os, "getpid", lambda process=process: process)
        trial = room.faster_search(**{**TASK, "n_items": 5, "wordings": ["plain", "task"], "searched": 2})
        seen.clear()
        for at in (0, 2):
            for run in (trial.candidate, trial.baseline, trial.free, trial.candidate, trial.arms[KV]):
                run()
            both = [(2 * process + at + k) % 5 for k in range(2)]
            assert seen == [(way, k) for way in (ETS, REBASE, NARROW, ETS, KV) for k in both]
            seen.clear()


# ------------------------------------------------------------------------------------------------------------- the parts


def test_signs_tell_a_step_that_follows_from_one_that_does_not():
    asked = prompt(items("steps", level=2, n=1, part="learn")[0], worked=True)
    asked = asked[: asked.rindex("What is")] + "What is 7 + 5 - 4?\n"
    fine = grove.features(asked, "7 + 5 = 12\n12 - 4 = 8\n")
    assert fine[:5] == [1, 1, 1, 0.5, 0]
    for wrong, sign in (
        ("7 + 5 = 12\n11 - 4 = 7\n", 0),
        ("7 + 4 = 11\n", 1),
        ("7 + 5 = 13\n", 2),
        ("7 + 5 = 12\n12 - 4 = 8\nThe answer is 9.\n", 3),
    ):
        assert grove.features(asked, wrong)[sign] == 0
    assert grove.features(asked, "7 + 5 = 12\n7 + 5 = 12\n")[4] == 1
    assert grove.features(asked, "7 + 5 = 12\n12 - 4 = 8\nThe answer is 8.\n")[8] == 1  # of the last step
    assert grove.features(asked, "7 + 5 = 22\n")[2] == 1  # only last digits are compared
    told = "Every wumpus is a yumpus. Every yumpus is not red. Ann is a wumpus. Is Ann red?\n"
    assert grove.features(told, "Ann is a wumpus.\nAnn is a yumpus.\nAnn is not red.\n")[0] == 1
    assert grove.features(told, "Ann is a wumpus.\nAnn is red.\n")[0] == 0
    assert len(grove.features(asked, "")) == len(fine)


def test_the_verifier_is_fitted_on_other_questions(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(grove, "steps", Adding)
    asked = []
    write = Adding.line
    monkeypatch.setattr(Adding, "line", lambda self, text, *rest: asked.append(text) or write(self, text, *rest))
    grove.verifier.cache_clear()
    learned = grove.verifier("steps", 2, 0.5)
    grove.verifier.cache_clear()
    learn = {prompt(item, worked=True) for item in items("steps", level=2, n=grove.LEARN, part="learn")}
    assert {text for text in asked if text.endswith("?\n")} == learn
    item = items("steps", level=2, n=1)[0]
    lines = ["\n".join([*item.steps[:1], ""]), "1 + 1 = 5\n"]
    right, wrong = (learned.score([grove.Trace(prompt(item, worked=True), (line,))])[0][0][0] for line in lines)
    assert right > 0.5 > wrong


def test_the_free_baseline_is_the_narrowest_that_is_as_right_on_the_pilot_part(monkeypatch):
    monkeypatch.setattr(room, "narrowest", kept_narrowest)
    task = Task("steps", 2, 0.5, 16, 1.0, 0.0, 16, 20, ("plain",))
    monkeypatch.setattr(Adding, "fails", 0.0)
    assert room.narrowest(task) == 4
    monkeypatch.setattr(Adding, "fails", 0.8)
    assert room.narrowest(task) == 16
    pilots = room.pilots(task)
    assert sorted(pilots) == [4, 8, 16]
    assert {item.part for pilot in pilots.values() for item in pilot.items} == {"pilot"}


def test_the_answer_is_the_one_whose_scores_are_the_largest_together():
    (item,) = items("steps", level=1, n=1)
    for score, right in ((0.9, True), (0.7, False)):
        given = [(item.answer, score), ("999", 0.4), ("999", 0.4)]
        traces = [grove.Trace("p", (f"The answer is {said}.",), scores=(own,)) for said, own in given]
        assert grove.Tree(item, "plain", Searched(tuple(traces), ()), Budget()).right is right


def test_random_keeps_as_many_as_ets():
    task = Task("steps", 3, 0.5, 16, 2.0, 0.5, 8, 1, ("plain",))
    (tree,) = grove.trees(REBASE, task)
    leaves = [replace(trace, finished=False) for trace in tree.found.traces]
    ets = grove.selector(ETS, task)
    drawn = grove.Random(ets)(leaves, 16)
    assert sum(drawn) == 16
    assert sum(count > 0 for count in drawn) <= sum(ets.kept(leaves, 16)) < len(leaves)
    assert drawn != grove.Random(ets, seed=1)(leaves, 16)


def test_questions_are_asked_in_one_wording_each_in_turn():
    task = Task("steps", 1, 0.5, 2, 1.0, 0.0, 2, 7)
    assert [wording for _, wording in task.asked] == ["plain", "question", "task"] * 2 + ["plain"]
    assert [(tree.item, tree.wording) for tree in search_all(REBASE, task)] == task.asked


def test_what_is_drawn_ahead_is_what_searches_ask_for_in_few_batches(monkeypatch, tmp_path):
    monkeypatch.setattr(samples, "FOLDER", tmp_path)
    monkeypatch.setattr(samples, "cache_dir", lambda: tmp_path)
    source, asked = grove.Steps(), []
    monkeypatch.setattr(grove, "steps", lambda: source)
    monkeypatch.setattr(grove, "live", Adding)
    draw = Adding.uneven
    monkeypatch.setattr(Adding, "uneven", lambda *a, **k: asked.append(a[1:2] + a[3:]) or draw(*a, **k))
    task = Task("steps", 2, 0.5, 6, 2.0, 0.5, 3, 4, ("plain", "task"))
    ways = [(way, task) for way in (REBASE, ETS, NARROW)]
    grove.ahead(ways)
    assert len(asked) <= 2 * task.rounds
    drawn = [(text, k) for texts, counts, firsts in asked for text, n, low in zip(texts, counts, firsts, strict=True)
             for k in range(low, low + n)]  # fmt: skip
    assert len(set(drawn)) == len(drawn)
    asked.clear()
    found = [search_all(*each) for each in ways]
    assert not asked
    source.asked.clear()
    monkeypatch.setattr(grove, "steps", Adding)
    for own, each in zip(found, ways, strict=True):
        assert [tree.found for tree in own] == [tree.found for tree in search_all(*each)]


def test_missing_steps_are_drawn_once_and_kept(monkeypatch, tmp_path):
    model = tiny_model(vocab_size=128)
    tree = TreeGenerator(model, Letters(), name=grove.MODEL)
    monkeypatch.undo()
    monkeypatch.setattr(grove, "live", lambda: tree)
    monkeypatch.setattr(samples, "FOLDER", tmp_path)  # nothing is checked in
    monkeypatch.setattr(samples, "cache_dir", lambda: tmp_path)
    source = grove.Steps()
    sampling = Sampling(1.0, 1.0, 4)
    found = source.uneven(["ab", "cd"], sampling, [3, 2], [0, 1])
    wanted = tree.uneven(["ab", "cd"], sampling, [3, 2], [0, 1])
    assert [[s.tokens for s in own] for own in found] == [[s.tokens for s in own] for own in wanted]
    assert [[s.spent.prompt for s in own] for own in found] == [[2, 0, 0], [2, 0]]
    monkeypatch.setattr(grove, "live", None)
    source._tree = None
    assert source.uneven(["ab"], sampling, [2], [0])[0] == found[0][:2]
    assert len(source.asked) == 5
    monkeypatch.setattr(grove, "live", lambda: tree)
    asked = []
    draw = TreeGenerator.uneven
    monkeypatch.setattr(TreeGenerator, "uneven", lambda *a, **k: asked.append(a[1:2] + a[3:]) or draw(*a, **k))
    more = source.uneven(["ab", "cd", "ab"], sampling, [5, 2, 1], [0, 0, 7])
    assert asked == [(["ab", "cd", "ab"], [2, 2, 1], [3, 0, 7])]  # what is there is not drawn again
    assert [s.tokens for s in more[0]] == [s.tokens for s in tree.uneven(["ab"], sampling, [5], [0])[0]]
    assert [s.spent.prompt for s in more[0]] == [2, 0, 0, 0, 0]

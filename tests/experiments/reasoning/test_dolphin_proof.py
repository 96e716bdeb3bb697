"""The experiments on the research loop notice feedback that is lost, a structure that is not looked at, and a ranking by nothing."""

from __future__ import annotations

import ast
import itertools
import random
import re
import subprocess
import sys
import zlib
from functools import cache
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
from tests.properties.sabotage import PAYS, record_of, verdict_of

from assay.evidence.verdict import judge
from assay.experiments import experiments_of
from assay.experiments.reasoning import dolphin as room
from assay.experiments.reasoning import dolphin_faults as faults
from assay.experiments.reasoning import dolphin_task as task
from assay.methods.core.sandbox import protections
from assay.methods.reasoning import dolphin
from assay.methods.reasoning.dolphin import Baseline, Idea, Outcome, Study, practice, repair

LOOP, REPAIR, KNOWN = "dolphin/improvement-rate", "dolphin/execution-success", "dolphin/novel-ideas"


def test_experiments_load_and_say_what_decides():
    found = {one.claim: one for one in experiments_of("dolphin")}
    assert set(found) == {LOOP, REPAIR, KNOWN}
    assert all(one.measured_here and one.refuted_if for one in found.values())
    assert found[LOOP].points["small"][0]["seeds"] == 20


# ------------------------------------------------------------------------------------------------------------------ the loop


@cache
def vector(text):
    return np.random.default_rng(zlib.crc32(text.encode())).normal(size=128)


def apart(texts):
    """An embedding under which no two different texts are alike."""
    return np.stack([vector(text) for text in texts])


def settings_in(source):
    return ast.literal_eval(re.search(r"SETTINGS\.update\((.*)\)\n", source)[1])


GAINS = {"width": 0.02, "adam": 0.03, "noise": 0.02, "cosine": 0.03, "smoothing": 0.02}
"""Edits that help on their own, and on top of each other; all others cost two points."""


def imagined(part="search"):
    def run(source, seed):
        changed = settings_in(source)
        if any(isinstance(value, str) and key != "activation" for key, value in changed.items()):
            return Outcome(None, "no traceback")
        return Outcome(0.8 + sum(GAINS.get(key, -0.015) for key in changed) + 0.001 * (seed % 3))

    return run


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(room, "runner", imagined)
    monkeypatch.setattr(room, "embedder", lambda: apart)
    monkeypatch.setattr(room, "in_threads", lambda function, count: [function(i) for i in range(count)])


POINT = {"seeds": 12, "loops": 3, "ideas": 8}


def test_feedback_that_is_lost_is_noticed(offline, monkeypatch):
    honest = record_of(LOOP, POINT)
    assert judge(honest).verdict in PAYS
    assert honest.measured.low > honest.baseline + 5
    assert honest.controls["deleted"] < honest.measured.low
    assert honest.controls["random"] < honest.measured.low
    assert honest.controls["rival"] < honest.measured.low
    monkeypatch.setattr(Study, "wins", property(lambda self: []))
    assert verdict_of(LOOP, POINT) not in PAYS


def test_feedback_of_anything_is_noticed(offline, monkeypatch):
    """Ideas on top of whatever ran, as many as improved, and on top of what did not improve."""

    def anything(study):
        ran = [one for one in study.entries if one.score is not None]
        return random.Random(len(ran)).sample(ran, sum(one.outcome == "improved" for one in ran))

    for wins in (anything, lambda study: [one for one in study.entries if one.outcome in ("maintained", "declined")]):
        monkeypatch.setattr(Study, "wins", property(wins))
        assert verdict_of(LOOP, POINT) not in PAYS


def test_a_seed_that_is_lucky_and_a_script_that_ran_before_improve_nothing(offline, monkeypatch):
    monkeypatch.setattr(room, "runner", lambda part="search": lambda source, seed: Outcome(0.8 + 0.1 * (seed % 3)))
    lucky = record_of(LOOP, {"seeds": 3, "loops": 2, "ideas": 4})
    assert (lucky.measured.median, lucky.baseline) == (0, 0)
    assert judge(lucky).verdict not in PAYS
    study = Study(apart, baseline=Baseline(0.8, 0.01), bank=False)
    for loop in (1, 2):
        study.tell(loop, Idea("a"), dolphin.practise("same", lambda source, seed: Outcome(0.9)))
    assert [room.improving(study, loop) for loop in (1, 2, 3)] == [100, 0, 0]


def test_edits_change_the_reference_and_what_they_are_put_on():
    reference = ast.literal_eval(re.search(r"SETTINGS = (\{.*?\})", task.SCRIPT, re.DOTALL)[1])
    for title, _, changed in task.EDITS + task.COPIES:
        assert {**reference, **changed} != reference, title
    propose = task.OfflineProposer(0)
    (below,) = propose([], 1, 1)
    win = SimpleNamespace(idea=below)
    changed = propose.settings[below.text]
    assert all(propose.settings[one.text] != changed for one in propose([win], 300, 2) if " on top" in one.title)


def test_all_arms_of_a_seed_begin_alike_and_the_rival_has_no_wins(offline):
    run = imagined()
    first = {}
    for arm in ("feedback", "deleted", "random", "rival", "no bank"):
        study, _ = room.studied(arm, 3, run, Baseline(0.8, 0.005), apart, 2, 6)
        first[arm] = [one.idea for one in study.entries if one.loop == 1]
        later = [one.idea.title for one in study.entries if one.loop == 2]
        assert any(" on top of " in title for title in later) == (arm != "deleted"), arm
    assert len({tuple(ideas) for ideas in first.values()}) == 1


def test_copies_are_turned_away_by_real_sentences_and_the_reference_runs():
    embed = task.embedder()
    bank = dolphin.Bank(embed)
    for title, summary, _ in task.EDITS:
        bank.add(Idea(title, summary=summary))
    assert not any(bank.look(Idea(title, summary=summary)).new for title, summary, _ in task.COPIES)
    assert len(bank) > 0.8 * len(task.EDITS)
    titles = {title for title, _, _ in task.EDITS}
    for _, _, settings in task.COPIES:
        assert settings in [own for _, _, own in task.EDITS]
    assert len(titles) == len(task.EDITS)


@pytest.mark.skipif(not protections().full, reason="bubblewrap is not installed")
def test_the_script_learns_digits_and_the_broken_edits_raise():
    run = room.runner()
    plain = run(task.script_of({}), 0)
    assert plain.metric > 0.8  # chance is a tenth
    assert run(task.script_of({}), 0) is plain  # looked up
    failed = [title for title, _, settings in task.EDITS[-4:] if not run(task.script_of(settings), 0).ok]
    assert len(failed) == 4
    search, test = (np.load(BytesIO(task.digits_file(part))) for part in ("search", "test"))
    seen = {tuple(row) for row in search["judged"]} | {tuple(row) for row in search["x"]}
    assert not seen & {tuple(row) for row in test["judged"]}


# -------------------------------------------------------------------------------------------------------------------- repairs

BETWEEN = "".join(f"    idle{n} = str('{n}')\n" for n in range(8))
SMALL = [
    f"def f():\n    n = '4'\n{BETWEEN}    return 3 + n\nf()\n",
    f"def g(x):\n    scale = '2'\n{BETWEEN}    return x - scale\ng(3)\n",
    f"def f(k):\n    last = '1'\n{BETWEEN}    return k[last]\nf([1, 2])\n",
    f"def f():\n    low, high = '0', 3\n{BETWEEN}    return range(high + low)\nf()\n",
    "def h(k, v):\n    return v[k] + 1\nh([1, 2], 0)\n",
    "def f(width):\n    return widht + 1\nf(1)\n",
]
"""Four whose fault lies far above the line that raises, and two that the traceback names."""


IDLE = "".join(f"idle{n} = str('{n}')\n" for n in range(40))
"""Lines at which the rules have something to change, and nothing is wrong."""


def here(part="search"):
    """Runs scripts in plain processes: they are this file's own."""

    def run(source, seed):
        ran = subprocess.run([sys.executable, "-I", "-c", source], capture_output=True, text=True, check=False)
        return Outcome(1.0) if not ran.returncode else Outcome(None, ran.stderr.replace('"<string>"', '"run.py"'))

    known = {}
    return lambda source, seed: (
        known.setdefault(source, None) or known.__setitem__(source, run(source, seed)) or known[source]
    )


@pytest.mark.slow
def test_a_structure_that_is_not_looked_at_is_noticed(monkeypatch):
    monkeypatch.setattr(room, "runner", here)
    cases = [(str(i % 2), text + f"# {n}\n" + IDLE) for n in range(2) for i, text in enumerate(SMALL)]
    monkeypatch.setattr(room, "planted", lambda run, each, seed: cases)
    honest = record_of(REPAIR, {"each": 1, "seed": 0})
    assert (honest.measured.median, honest.baseline) == (100, pytest.approx(100 / 3))
    assert judge(honest).verdict in PAYS
    assert honest.free < honest.measured.low  # the lines nearest by
    assert honest.controls["random"] < honest.measured.low
    with monkeypatch.context() as broken:
        broken.setattr(practice, "local_structure", lambda source, failures: [])
        assert verdict_of(REPAIR, {"each": 1, "seed": 0}) not in PAYS
    for lines in (room.any_lines, room.nearest_lines):
        monkeypatch.setattr(repair, "suspects", lines)
        assert verdict_of(REPAIR, {"each": 1, "seed": 0}) not in PAYS


def raised(line):
    where = f'File "run.py", line {line}, in <module>'
    return f"Traceback (most recent call last):\n  {where}\nNameError: name 'x' is not defined"


def test_faults_are_of_every_kind_change_one_line_and_are_kept_where_they_raise():
    scripts = room.scripts()
    found = {}
    for kind, text in faults.faulty(scripts, 0):
        near = [sum(a != b for a, b in zip(text.splitlines(), one.splitlines(), strict=False)) for one in scripts]
        assert kind == "an import is missing" or min(near) == 1
        found.setdefault(kind, []).append(text)
        if all(len(found.get(one, ())) >= 3 for one in faults.PLANTERS):
            break
    chance, ran = random.Random(0), {}

    def run(text, seed):
        """Ends well, is ended, or raises."""
        error = ran.setdefault(text, chance.choice([None, "ended by its limit of cpu time", raised(2)]))
        return Outcome(1.0) if error is None else Outcome(None, error)

    cases = room.planted(run, 2)
    assert all(ran[text] == raised(2) for _, text in cases)
    assert [kind for kind, _ in cases] == [kind for kind in faults.PLANTERS for _ in range(2)]
    assert len({text for _, text in cases}) == len(cases)


def test_a_traceback_is_said_to_point_at_a_fault_only_where_it_does():
    scripts = room.scripts()
    for kind, text in itertools.islice(faults.faulty(scripts, 1), 16):
        line = room.changed_line(text, scripts)
        assert (line is None) == (kind == "an import is missing")
        assert room.told_where(text, Outcome(None, raised(line or 2)))
        assert line is None or not room.told_where(text, Outcome(None, raised(line + 1)))


def test_scripts_that_no_way_differs_on_leave_it_open():
    """Sixty-five of a hundred by both ways, and not one script apart: that is not certainty."""
    same = np.repeat([100.0, 0.0], [21, 11])
    found = room.difference(same, same)
    assert (found.median, found.high) == (0, pytest.approx(10.9, abs=0.1))
    assert found.low == -found.high
    assert room.difference(np.repeat(100.0, 320), np.repeat(100.0, 320)).high < 1.2
    apart = room.difference(same, np.roll(same, 3))
    assert apart.low < 0 < apart.high
    assert room.difference(np.full(9, 100.0), np.repeat([100.0, 0.0], [2, 7])).low > 30


# ------------------------------------------------------------------------------------------------------------- what is known


def papers_of(topics=6, each=10):
    """Papers of one word each: the same word is used in two topics for different things."""
    chance = random.Random(0)
    made = []
    for topic in range(topics):
        for n in range(each):
            claim = SimpleNamespace(metric=f"word{n}", baseline=f"family{topic}")
            made.append(
                SimpleNamespace(
                    slug=f"{topic}-{n}", title=f"word{n}", summary=f"word{n} family{topic}", family=f"family{topic}",
                    saves=(f"family{topic}",), models=("any",), claims=(claim,),
                )
            )  # fmt: skip
    chance.shuffle(made)
    return made


def words(texts):
    """Counts of words: a method's word weighs more than its topic's."""
    rows = []
    for text in texts:
        row = np.full(80, 1e-3)
        for word in re.findall(r"[a-z]+\d+", text):
            row[int(word[4:]) if word.startswith("word") else 60 + int(word[6:])] = (
                2.0 if word.startswith("word") else 1.0
            )
        rows.append(row)
    return np.stack(rows)


def test_an_idea_is_told_without_its_title_and_halves_share_no_paper(monkeypatch):
    for paper in room.papers():
        told = room.told_again(paper)
        subtitle = paper.title.partition(":")[2].strip() or paper.title
        assert subtitle not in told.text or subtitle in f"{paper.claims}"
    monkeypatch.setattr(room, "papers", papers_of)
    monkeypatch.setattr(room, "embedder", lambda: words)
    used = {}

    def noted(hidden, shown, embed, threshold, way, seed):
        used.setdefault(way, []).append(({one.slug for one in (*hidden, *shown)}, threshold))
        return [one.slug for one in hidden], [one.slug for one in shown]

    monkeypatch.setattr(room, "accepted", noted)
    record = record_of(KNOWN, {"splits": 4, "each": 12})
    for calls in used.values():
        learnt = set().union(*(slugs for slugs, _ in calls[:-4]))
        assert not learnt & set().union(*(slugs for slugs, _ in calls[-4:]))
    assert judge(record).verdict not in PAYS  # what lets everything through


def test_a_ranking_by_nothing_is_noticed(monkeypatch):
    monkeypatch.setattr(room, "papers", papers_of)
    monkeypatch.setattr(room, "embedder", lambda: words)
    monkeypatch.setattr(room, "told_again", lambda paper: Idea(f"{paper.title} {paper.family}"))
    point = {"splits": 12, "each": 12}
    honest = record_of(KNOWN, point)
    assert honest.measured.low > 90  # of its own topic, each known idea is found
    assert honest.baseline == 50
    assert honest.controls["deleted"] == 50
    assert honest.controls["random"] < honest.measured.low
    chance = np.random.default_rng(0)
    monkeypatch.setattr(
        room, "similarity_scorer", lambda embed, text: lambda docs: chance.uniform(1, 10, len(docs)).tolist()
    )
    blind = record_of(KNOWN, point)
    assert blind.measured.high < honest.measured.low

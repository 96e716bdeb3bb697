"""The loop: ideas that are new are run, what came of them is classified, and what improved stands in the next round's
prompt."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Protocol

from assay import checks
from assay.methods.reasoning.dolphin.ideas import THRESHOLD, Bank, Embedder, Idea, Seen
from assay.methods.reasoning.dolphin.practice import ROUNDS, Practice, Repairer, Runner, practise

Class = Literal["improved", "maintained", "declined", "failed", "known"]
"""What came of an idea; "failed" ran never, "known" was turned away by the bank and cost no run."""


@dataclass(frozen=True)
class Baseline:
    """The reference script's score, and how much more counts as better. Raises ValueError for a delta below 0."""

    score: float
    delta: float

    def __post_init__(self) -> None:
        checks.number("score", self.score)
        checks.number("delta", self.delta, low=0)


def measured_baseline(run: Runner, source: str, *, seeds: Sequence[int] = (0, 1, 2)) -> Baseline:
    """The mean over seeds, and one standard error as delta (our choice). Raises ValueError where a run fails, or with
    one seed, or the same twice."""
    if len(set(seeds)) < max(2, len(seeds)):
        raise ValueError(f"seeds must be two different ones at least, got {checks.shown(list(seeds))}")
    outcomes = [run(source, seed) for seed in seeds]
    if failed := [one for one in outcomes if one.metric is None]:
        raise ValueError(f"the reference script must run, got {failed[0].error.strip()[-300:]}")
    scores = [one.metric for one in outcomes if one.metric is not None]
    mean = sum(scores) / len(scores)
    deviation = math.sqrt(sum((one - mean) ** 2 for one in scores) / (len(scores) - 1))
    return Baseline(mean, deviation / math.sqrt(len(scores)))


def classify(
    score: float, baseline: Baseline, *, higher_is_better: bool = True
) -> Literal["improved", "maintained", "declined"]:
    """Better than the baseline by more than delta, within it, or worse.

    >>> [classify(s, Baseline(0.5, 0.1)) for s in (0.7, 0.55, 0.3)]
    ['improved', 'maintained', 'declined']
    """
    gain = checks.number("score", score) - baseline.score
    gain = gain if checks.flag("higher_is_better", higher_is_better) else -gain
    return "improved" if gain > baseline.delta else "declined" if gain < -baseline.delta else "maintained"


@dataclass(frozen=True)
class Entry:
    """A line of the journal: an idea, the round it came in, its class, and what was run for it.

    `similarity` is that to the nearest idea of the bank, whose number is `nearest` (-1 where it was empty). `error` is
    what the last run of a failed idea wrote, `seed` that of its runs.
    """

    loop: int
    idea: Idea
    outcome: Class
    similarity: float = -1.0
    nearest: int = -1
    score: float | None = None
    source: str = ""
    runs: int = 0
    seconds: float = 0.0
    error: str = ""
    seed: int = 0


class Study:
    """All that was tried: ask it whether an idea is new, tell it what came of one. With a `journal` it goes on where
    it was stopped.

    `baseline` is that of the reference script. With `feedback=False` no idea counts as a win for the next round, with
    `bank=False` none is turned away: both off, one round, is plain generating and running. A torn last line of the
    journal is dropped, and its idea tried again. Raises ValueError for a journal that is damaged before its last line,
    is of another baseline, direction, threshold, feedback or bank, or whose ideas are embedded otherwise now; `tell`
    raises RuntimeError where somebody else writes to the journal too.

    >>> import numpy as np
    >>> embed = lambda texts: np.array([[len(t), t.count("e")] for t in texts], dtype=float)
    >>> study = Study(embed, baseline=Baseline(0.5, 0.01))
    >>> study.ask(Idea("wider")).new, study.tell(1, Idea("wider"), None).outcome
    (True, 'failed')
    """

    def __init__(
        self, embed: Embedder, *, baseline: Baseline, higher_is_better: bool = True, threshold: float = THRESHOLD,
        feedback: bool = True, bank: bool = True, journal: str | os.PathLike[str] | None = None,
    ) -> None:  # fmt: skip
        self.baseline = baseline
        self.higher_is_better = checks.flag("higher_is_better", higher_is_better)
        self.feedback, self.turns_away = checks.flag("feedback", feedback), checks.flag("bank", bank)
        self.bank = Bank(embed, threshold=threshold)
        self.entries: list[Entry] = []
        self.finished = 0
        """The last round of which all ideas were told."""
        self._length = 0
        self._journal = None if journal is None else Path(journal)
        if self._journal is not None:
            self._replay(self._journal)

    @property
    def wins(self) -> list[Entry]:
        """What improved, in order: it stands in the next round's prompt. None without feedback."""
        return [one for one in self.entries if one.outcome == "improved"] if self.feedback else []

    @property
    def best(self) -> Entry | None:
        """The entry of the best score, which noise may have made: see `confirmed`. None before any ran."""
        sign = 1 if self.higher_is_better else -1
        ran = [one for one in self.entries if one.score is not None]
        return max(ran, key=lambda one: sign * (one.score or 0.0)) if ran else None

    @property
    def runs(self) -> int:
        """Scripts run, repairs included."""
        return sum(one.runs for one in self.entries)

    def ask(self, idea: Idea) -> Seen:
        """Whether the idea is new. Without a bank every idea is."""
        seen = self.bank.look(idea)
        return seen if self.turns_away else Seen(True, seen.nearest, seen.similarity)

    def tell(self, loop: int, idea: Idea, practice: Practice | None, *, known: bool = False) -> Entry:
        """Keep what came of an idea (None: it became no script, or, with `known`, it was turned away): improved,
        maintained and declined ones all stay in the bank, and failed ones too."""
        seen = self.bank.look(idea)
        outcome: Class = "known" if known else "failed"
        score = None if practice is None else practice.last.metric
        if score is not None:
            outcome = classify(score, self.baseline, higher_is_better=self.higher_is_better)
        runs = () if practice is None else practice.outcomes
        entry = Entry(
            checks.whole("loop", loop, low=1), idea, outcome, seen.similarity, seen.nearest, score,
            "" if practice is None else practice.source, len(runs), sum(one.seconds for one in runs),
            practice.last.error if practice is not None and score is None else "",
            0 if practice is None else practice.seed,
        )  # fmt: skip
        self._write({"entry": asdict(entry)})
        self._keep(entry)
        return entry

    def finish(self, loop: int) -> None:
        """Say that all ideas of a round were told: `research` goes on with the next one."""
        self._write({"finished": checks.whole("loop", loop, low=1)})
        self.finished = loop

    def _keep(self, entry: Entry) -> None:
        self.entries.append(entry)
        if entry.outcome != "known":
            self.bank.add(entry.idea)

    def _head(self) -> dict[str, object]:
        return {
            "baseline": asdict(self.baseline), "higher_is_better": self.higher_is_better,
            "threshold": self.bank.threshold, "feedback": self.feedback, "bank": self.turns_away,
        }  # fmt: skip

    def _replay(self, path: Path) -> None:
        whole = path.read_bytes().split(b"\n") if path.exists() else []
        lines, torn = whole[:-1], bool(whole) and whole[-1] != b""
        self._length = sum(len(line) + 1 for line in lines)
        if torn:  # killed while it wrote: that idea is tried again
            os.truncate(path, self._length)
        if not lines:
            self._write(self._head())
            return
        for n, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                if n == 1:
                    if record != self._head():
                        raise ValueError(f"is a journal of {record}, not of {self._head()}")
                elif "finished" in record:
                    self.finished = checks.whole("finished", record["finished"], low=1)
                else:
                    told = record["entry"]
                    entry = Entry(**{**told, "idea": Idea(**told["idea"])})
                    now = self.bank.look(entry.idea).similarity
                    if abs(now - entry.similarity) > 1e-3:
                        raise ValueError(f"embed must give what it gave: similarity {entry.similarity}, got {now}")
                    self._keep(entry)
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{path}, line {n}: no line of this study's journal ({error})") from None

    def _write(self, record: dict[str, object]) -> None:
        if self._journal is None:
            return
        self._journal.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(record).encode() + b"\n"
        with self._journal.open("ab") as file:
            if file.seek(0, os.SEEK_END) != self._length:
                raise RuntimeError(f"{self._journal}: somebody else writes to this journal")
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._length += len(line)


class Proposer(Protocol):
    """Proposes ideas for a round, from what improved so far (empty in the first round, and without feedback)."""

    def __call__(self, wins: Sequence[Entry], count: int, loop: int) -> Sequence[Idea]: ...


Writer = Callable[[Idea, Sequence[Entry]], str | None]
"""The script of an idea, wins at hand; None where the idea says nothing that can be done."""


def research(
    study: Study, propose: Proposer, write: Writer, run: Runner, repair: Repairer | None = None, *, loops: int = 3,
    ideas: int = 10, rounds: int = ROUNDS, most_runs: int | None = None, seed: int = 0,
    known: Callable[[Idea], object] | None = None,
) -> Study:  # fmt: skip
    """`loops` rounds of `ideas` proposals each, or fewer where the proposer gives fewer; those that are new are written,
    run and repaired, and the study told. Returns the study.

    `known` checks what the bank lets through against the literature (see `known_from`): an idea for which it gives
    anything but None or False costs no run. It stops where `most_runs` scripts were run, repairs included; the last
    idea gets as many repairs as are left. A study goes on behind its last whole round: one that was broken off is
    proposed again, without the ideas that it tried already. Raises ValueError for counts below 1.

    When NOT to use it: where one run takes hours: five in eight ideas improve nothing even in the paper.
    """
    loops, ideas = checks.whole("loops", loops, low=1), checks.whole("ideas", ideas, low=1)
    most_runs = None if most_runs is None else checks.whole("most_runs", most_runs, low=1)
    for loop in range(study.finished + 1, loops + 1):
        before = [one for one in study.wins if one.loop < loop]
        tried = [one.idea for one in study.entries if one.loop == loop]
        for idea in _without(propose(before, ideas, loop), tried)[: ideas - len(tried)]:
            left = rounds if most_runs is None else min(rounds, most_runs - study.runs - 1)
            if left < 0:
                return study
            if not study.ask(idea).new or (known is not None and known(idea) not in (None, False)):
                study.tell(loop, idea, None, known=True)
                continue
            source = write(idea, before)
            study.tell(loop, idea, None if source is None else practise(source, run, repair, rounds=left, seed=seed))
        study.finish(loop)
    return study


def _without(ideas: Sequence[Idea], gone: Sequence[Idea]) -> list[Idea]:
    """Ideas without those that are gone, each as often as it is gone."""
    left, kept = Counter(gone), []
    for idea in ideas:
        if left[idea]:
            left[idea] -= 1
        else:
            kept.append(idea)
    return kept


def confirmed(study: Study, run: Runner, *, seeds: Sequence[int]) -> Baseline:
    """The best entry's script run anew on seeds that no idea has seen: mean and standard error. The best of many noisy
    scores is not its score.

    Raises ValueError where nothing ran, a run fails now, or a seed is one of the study's.
    """
    if study.best is None:
        raise ValueError("study must hold an idea that ran, got none")
    if used := {one.seed for one in study.entries if one.runs} & set(seeds):
        raise ValueError(f"seeds must be fresh, got {sorted(used)}, with which ideas were run")
    return measured_baseline(run, study.best.source, seeds=seeds)

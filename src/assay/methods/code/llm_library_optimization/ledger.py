"""What was tried, kept: every attempt with its programs and digests, how to take it again, and what others read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from assay.methods.code.llm_library_optimization.bench import Attempt, Bench, Gate
from assay.methods.code.llm_library_optimization.case import Candidate
from assay.methods.code.llm_library_optimization.timing import Compared, Energy, Measurement, Rules


def as_dict(attempt: Attempt) -> dict[str, Any]:
    """An attempt as plain values. The intervals are beside the seconds that they follow from, for who reads the file."""
    found = asdict(attempt)
    found["candidate"]["digest"] = attempt.candidate.digest
    if attempt.compared is None:
        return found
    compared = attempt.compared
    found["compared"] = {
        "rules": asdict(compared.rules),
        "decides": compared.decides,
        "measurements": [asdict(one) for one in compared.measurements],
        "by_kind": {kind: asdict(seen) for kind, seen in compared.by_kind.items()},
        "slower_on": list(compared.slower_on),
        "sign_test": compared.sign_test,
    }
    return found


def from_dict(row: Mapping[str, Any]) -> Attempt:
    """The attempt of such values; its intervals and its state follow from the seconds again. Raises ValueError for what is none."""
    try:
        given = {name: row["candidate"][name] for name in ("name", "source", "origin", "parent", "prompt")}
        candidate, compared = Candidate(**given), None
        if candidate.digest != row["candidate"]["digest"]:
            raise ValueError(f"source of {candidate.name!r} is not the one that was measured: its digest differs")
        if row["compared"] is not None:
            its = row["compared"]
            seen = [
                Measurement(**{**one, "reference": tuple(one["reference"]), "candidate": tuple(one["candidate"])})
                for one in its["measurements"]
            ]
            compared = Compared(tuple(seen), its["decides"], Rules(**its["rules"]))
        used = {name: Energy(**one) for name, one in row["energy"].items()}
        more = {name: row[name] for name in ("case", "case_digest", "environment", "changed", "at")}
        state = compared.found if compared is not None else row["state"]
        return Attempt(
            candidate=candidate, state=state, gate=Gate(**row["gate"]), compared=compared, energy=used, **more
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the ledger has a line that is no attempt: {error!r}") from None


class Ledger:
    """Attempts in a file of JSON lines. None is ever taken out, and a failed one is a line as any other.

    Raises ValueError when it is read and a line is no attempt, or holds a source that is not the one that was measured.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def add(self, attempt: Attempt) -> None:
        """Append an attempt, and put it on disk."""
        line = (json.dumps(as_dict(attempt)) + "\n").encode()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        opened = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(opened, line)
            os.fsync(opened)
        finally:
            os.close(opened)

    def attempts(self) -> list[Attempt]:
        """All of them, in the order they were made; none where there is no file yet."""
        if not self.path.is_file():
            return []
        try:
            return [from_dict(json.loads(line)) for line in self.path.read_text(encoding="utf-8").splitlines()]
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.path} has a line that is no JSON: {error}") from None


@dataclass(frozen=True)
class Again:
    """An attempt that was taken again. `moved` is what of the environment differs: then another verdict is no contradiction."""

    before: Attempt
    now: Attempt
    moved: tuple[str, ...]

    @property
    def same(self) -> bool:
        """Whether the verdict is the one of before."""
        return self.before.state == self.now.state


def reproduce(attempt: Attempt, bench: Bench) -> Again:
    """Take a recorded attempt again, its program built from the recorded text.

    Raises ValueError where the bench's case is not the recorded one: another reference, other inputs, another rule of deciding.
    """
    if bench.case.digest != attempt.case_digest:
        raise ValueError(
            f"the case must be the one that was recorded, {attempt.case_digest}, got {bench.case.digest}: "
            "its reference or its inputs are others"
        )
    now = bench.attempt(Candidate(attempt.candidate.name, attempt.candidate.source, attempt.candidate.origin))
    every = sorted({*attempt.environment, *now.environment})
    moved = tuple(name for name in every if attempt.environment.get(name) != now.environment.get(name))
    return Again(attempt, now, moved)


def table(attempts: Sequence[Attempt]) -> str:
    """Attempts as lines of text: what is fed back into a conversation, and what a person reads.

    A speed-up is told for every kind of input, the one that decides first, and none for a candidate that is not right.
    """
    lines = []
    for number, one in enumerate(attempts, 1):
        if one.compared is None:
            lines.append(f"{number}. {one.candidate.name}: {one.state}. {one.gate.why}".rstrip())
            continue
        kinds = sorted(one.compared.by_kind.items(), key=lambda item: item[0] != one.compared.decides)  # type: ignore[union-attr]
        told = ", ".join(f"{kind} {seen.median:.3g}x [{seen.low:.3g}, {seen.high:.3g}]" for kind, seen in kinds)
        lines.append(f"{number}. {one.candidate.name}: {one.state}. {told}")
    return "\n".join(lines)


def pyperf(attempts: Sequence[Attempt]) -> dict[str, Any]:
    """The times as pyperf's files have them: a benchmark for each program and input, in seconds a call.

    Only attempts that were timed. The reference is there once with each, since it was timed beside each.
    """
    benchmarks = []
    for one in attempts:
        for seen in one.compared.measurements if one.compared is not None else ():
            for who, values in (("reference", seen.reference), (one.candidate.name, seen.candidate)):
                about = {
                    "name": f"{one.case}: {seen.input}: {who}" + (f" beside {one.candidate.name}" if who == "reference" else ""),
                    "unit": "second", "loops": seen.calls, "candidate": one.candidate.digest, "case": one.case_digest,
                    "input_kind": seen.kind, "verdict": one.state, "date": one.at,
                    **{f"environment_{name}": value for name, value in one.environment.items()},
                }  # fmt: skip
                benchmarks.append({"metadata": about, "runs": [{"values": list(values)}]})
    return {"version": "1.0", "benchmarks": benchmarks}

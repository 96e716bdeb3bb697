"""Answers and their results as JSON lines, laid out as lm-evaluation-harness logs its samples, for the tools that read those."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from assay.errors import InputError
from assay.methods.code.geojseval.answers import Answer
from assay.methods.code.geojseval.metrics import Attempt
from assay.methods.code.geojseval.running import ERRORS, Judged, Result


class Task(Protocol):
    """What a record says of a task."""

    @property
    def id(self) -> str: ...
    @property
    def prompt(self) -> str: ...
    @property
    def entry_point(self) -> str: ...
    @property
    def programs(self) -> Mapping[str, str]: ...


def lines(tasks: Mapping[str, Task], attempts: Mapping[str, Sequence[Attempt]]) -> Iterator[str]:
    """A line for each task, with all its rounds.

    `doc_id`, `doc`, `target` (the reference), `arguments` (the prompt), `resps` (as they came), `filtered_resps` (the programs), the three
    hashes, and `pass@1` as the metric, the share of rounds that passed: what lm-evaluation-harness writes with `--log_samples`. Under
    `assay` stand the results of every case, tokens and seconds, which that layout has no place for.

    Raises KeyError for attempts at a task that is not among `tasks`.
    """
    for number, (name, of_task) in enumerate(attempts.items()):
        task = tasks[name]
        doc = {"task_id": task.id, "prompt": task.prompt, "entry_point": task.entry_point}
        target = task.programs["reference"]
        record = {
            "doc_id": number,
            "doc": doc,
            "target": target,
            "arguments": {"gen_args_0": {"arg_0": task.prompt, "arg_1": {"until": []}}},
            "resps": [[attempt.answer.raw for attempt in of_task]],
            "filtered_resps": [[attempt.answer.code for attempt in of_task]],
            "filter": "create_test",
            "metrics": ["pass@1"],
            "doc_hash": _hash(json.dumps(doc, indent=2, ensure_ascii=False)),
            "prompt_hash": _hash(task.prompt),
            "target_hash": _hash(target),
            "pass@1": sum(attempt.judged.passed for attempt in of_task) / len(of_task),
            "assay": [_told(attempt) for attempt in of_task],
        }
        yield json.dumps(record, ensure_ascii=False)


def write(path: Path, tasks: Mapping[str, Task], attempts: Mapping[str, Sequence[Attempt]]) -> None:
    """Write `lines` to a file, whole or not at all. Tools look for names like `samples_geojseval_2026-01-31.jsonl`."""
    from assay.paths import atomic_file

    with atomic_file(path) as target:
        target.write_text("".join(f"{line}\n" for line in lines(tasks, attempts)), encoding="utf-8")


def read(path: Path) -> dict[str, list[Attempt]]:
    """The attempts that `write` wrote, by task. Raises InputError, naming the line, for a file of another kind."""
    found: dict[str, list[Attempt]] = {}
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    for number, line in enumerate(text.splitlines(), 1):
        try:
            record = json.loads(line)
            name = record["doc"]["task_id"]
            both = zip(record["resps"][0], record["filtered_resps"][0], record["assay"], strict=True)
            found[name] = [_attempt(raw, code, told) for raw, code, told in both]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise InputError(
                f"{path}, line {number}: not a record of answers: {type(error).__name__}: {error}"
            ) from None
    return found


def _told(attempt: Attempt) -> dict[str, Any]:
    keys = ("passed", "edge", "error", "why", "seconds")
    cases = [{key: getattr(result, key) for key in keys} for result in attempt.judged.results]
    return {"tokens": attempt.answer.tokens, "seconds": attempt.answer.seconds, "cases": cases}


def _attempt(raw: Any, code: Any, told: Mapping[str, Any]) -> Attempt:
    if not isinstance(raw, str) or not isinstance(code, str):
        raise TypeError("a response must be a text")
    results = [Result(**case) for case in told["cases"]]
    if unknown := {result.error for result in results} - {"", *ERRORS}:
        raise ValueError(f"an unknown kind of error: {', '.join(unknown)}")
    return Attempt(Answer(raw, code, told["tokens"], told["seconds"]), Judged(tuple(results)))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()

"""Samples that somebody has already: logs of the LM Evaluation Harness (`lm-eval`), and tasks in its layout, written and read.

    logged = read_log("results/samples_gsm8k_2026-01-01.jsonl")      # lm-eval run ... --log_samples
    [sum(one.right) for one in logged]                                # right ones of each item's samples

    write_task("tasks", "my_sums", rows, stop=("\\n",), repeats=32)      # lm-eval run --include_path tasks --tasks my_sums

Only data is read: a task that names Python functions (`!function`) or another file to include is refused, and nothing is imported.
"""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from assay import checks
from assay.methods.core.reasoning.answers import canonical, extract

LONGEST_LINE = 2**26  # bytes of one logged item
SCORES = ("exact_match", "acc", "pass@1", "correct")
"""Metrics of one sample, the first of them that a line has: right where it is above a half."""


@dataclass(frozen=True)
class Logged:
    """An item with its prompt, what was wanted, and the samples that were drawn: their texts, their answers, and which are right."""

    item: str
    prompt: str
    target: str
    texts: tuple[str, ...]
    answers: tuple[str, ...]
    right: tuple[bool, ...]


def read_log(
    path: str | os.PathLike[str], *, find: Callable[[str], str] = extract, filter: str | None = None
) -> list[Logged]:
    """The items of a `samples_*.jsonl` (or `.jsonl.gz`), in their order, all samples of an item together.

    An item's answers are those that a filter of the harness found, where it kept one for every sample; else `find` reads them from the
    texts. A sample is right where its answer is the target's (both made canonical: `answers.canonical`), or, for an item with one
    sample, where its metric says so (`SCORES`). Logs have a line for each filter: `filter` names the one that counts, by default the first.
    Raises ValueError, naming file and line, for what is no such line, and for a file without any.
    """
    path = Path(path)
    found: dict[str, Logged] = {}
    for number, line in enumerate(_lines(path), 1):
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON ({error})") from None
        if not isinstance(record, dict):
            raise ValueError(f"{where}: must be an object, got {type(record).__name__}")
        chosen = str(record.get("filter", ""))
        if filter is not None and chosen != filter:
            continue
        item = str(record.get("doc_id", number))
        if item not in found:
            found[item] = _logged(item, record, where, find)
        elif filter is not None or "filter" not in record:
            raise ValueError(f"{where}: doc_id {item} stands twice")
    if not found:
        raise ValueError(f"{path}: holds no samples" + (f" of the filter {filter!r}" if filter is not None else ""))
    return list(found.values())


def _lines(path: Path) -> Iterator[bytes]:
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        while line := file.readline(LONGEST_LINE + 1):
            if len(line) > LONGEST_LINE:
                raise ValueError(f"{path}: a line is longer than {LONGEST_LINE:,} bytes")
            if line.strip():
                yield line


def _logged(item: str, record: Mapping[str, Any], where: str, find: Callable[[str], str]) -> Logged:
    texts = _texts(record.get("resps"), where, "resps")
    filtered = _texts(record.get("filtered_resps"), where, "filtered_resps")
    texts = texts or filtered
    if not texts:
        raise ValueError(f"{where}: has no texts in resps: scores of choices are no samples")
    target = record.get("target")
    if not isinstance(target, str | int | float) or isinstance(target, bool):
        raise ValueError(f"{where}: target must be text or a number, got {checks.shown(target)}")
    wanted = extract(str(target)) if "####" in str(target) else canonical(str(target))
    kept = len(filtered) == len(texts) and filtered != texts
    answers = tuple(canonical(text) if kept else find(text) for text in (filtered if kept else texts))
    right = tuple(bool(answer) and answer == wanted for answer in answers)
    if len(texts) == 1 and (score := next((record[name] for name in SCORES if name in record), None)) is not None:
        right = (checks.number(f"{where}: the metric", float(score)) > 0.5,)
    return Logged(item, _prompt(record.get("arguments")), str(target), texts, answers, right)


def _texts(value: Any, where: str, name: str) -> tuple[str, ...]:
    """Texts, however deep in lists; nothing where they are no texts (likelihoods, say)."""
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list):
        raise ValueError(f"{where}: {name} must be a list, got {checks.shown(value)}")
    if any(not isinstance(each, str | list) for each in value):
        return ()
    return tuple(text for each in value for text in _texts(each, where, name))


def _prompt(value: Any) -> str:
    """The first text among a request's arguments, whichever version of the harness wrote them."""
    while isinstance(value, list | dict) and value:
        value = next(iter(value.values() if isinstance(value, dict) else value))
    return value if isinstance(value, str) else ""


# ------------------------------------------------------------------------------------------------------------------- tasks


@dataclass(frozen=True)
class Task:
    """A task of the harness whose items are data: prompts that are ready to be continued, and their answers."""

    name: str
    prompts: tuple[str, ...]
    targets: tuple[str, ...]
    stop: tuple[str, ...]
    temperature: float
    max_new_tokens: int
    repeats: int


def write_task(
    folder: str | os.PathLike[str],
    name: str,
    rows: Sequence[tuple[str, str]],
    *,
    stop: Sequence[str] = ("\n",),
    temperature: float = 0.8,
    max_new_tokens: int = 64,
    repeats: int = 1,
) -> Path:
    """Write `rows` of (prompt, answer) as a task: `NAME.yaml` and `NAME.jsonl` in `folder`. Returns the YAML file.

    The last number of a continuation (or its yes or no) is held against the answer, as `exact_match`. Raises ValueError for a name that is
    no plain word, and without a row.
    """
    import yaml

    if not re.fullmatch(r"[A-Za-z0-9_-]{1,80}", name):
        raise ValueError(f"name must be letters, digits, - and _, got {checks.shown(name)}")
    if not rows:
        raise ValueError("rows must hold at least one item, got none")
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    data = place / f"{name}.jsonl"
    lines = [json.dumps({"prompt": prompt, "answer": answer}) for prompt, answer in rows]
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    temperature = checks.number("temperature", temperature, low=0)
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data.resolve())}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "repeats": checks.whole("repeats", repeats, low=1),
        "generation_kwargs": {
            "until": list(stop),
            "do_sample": temperature > 0,
            "temperature": temperature,
            "max_gen_toks": checks.whole("max_new_tokens", max_new_tokens, low=1),
        },
        "filter_list": [
            {
                "name": "answer",
                "filter": [
                    {"function": "regex", "regex_pattern": r"(-?\d+|yes|no)", "group_select": -1},
                    {"function": "take_first"},
                ],
            }
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    path = place / f"{name}.yaml"
    path.write_text(yaml.safe_dump(task, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path


def read_task(path: str | os.PathLike[str]) -> Task:
    """A task whose items lie in JSON lines beside it or wherever it names them, its templates plain fields (`{{question}}`).

    Raises ValueError, naming the file and the field, for a task that needs code (`!function`, templates that compute), another file
    (`include`), or a data set that is not a local JSON file.
    """
    import yaml

    path = Path(path)
    try:
        task = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:  # also for !function: safe_load knows no such tag
        said = " ".join(str(error).split())
        raise ValueError(f"{path}: cannot be read without running code or is no YAML ({said[:200]})") from None
    if not isinstance(task, dict) or "include" in task:
        raise ValueError(f"{path}: must be one mapping of settings, without include")
    if task.get("output_type") != "generate_until" or task.get("dataset_path") != "json":
        seen = f"{task.get('output_type')!r} and {task.get('dataset_path')!r}"
        raise ValueError(f"{path}: output_type must be generate_until and dataset_path json, got {seen}")
    files = (task.get("dataset_kwargs") or {}).get("data_files")
    split = str(task.get("test_split") or task.get("validation_split") or "test")
    named = files.get(split) if isinstance(files, dict) else files
    if not isinstance(named, str):
        raise ValueError(f"{path}: dataset_kwargs.data_files must name a file for {split}, got {checks.shown(named)}")
    data = (path.parent / named) if not Path(named).is_absolute() else Path(named)
    rows = [_row(line, f"{data}, line {n}") for n, line in enumerate(_lines(data), 1)]
    told = task.get("generation_kwargs") or {}
    until = told.get("until") or []
    return Task(
        str(task.get("task", path.stem)),
        tuple(_filled(task.get("doc_to_text"), row, path, "doc_to_text") for row in rows),
        tuple(_filled(task.get("doc_to_target"), row, path, "doc_to_target") for row in rows),
        tuple([until] if isinstance(until, str) else map(str, until)),
        checks.number("temperature", told.get("temperature") or 0.0, low=0) if told.get("do_sample", True) else 0.0,
        checks.whole("max_gen_toks", told.get("max_gen_toks") or 256, low=1),
        checks.whole("repeats", task.get("repeats") or 1, low=1),
    )


def _row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: must be an object, got {type(row).__name__}")
    return row


def _filled(template: Any, row: Mapping[str, Any], path: Path, name: str) -> str:
    """A template with plain fields; a bare name is a field too, as the harness has it."""
    if not isinstance(template, str):
        raise ValueError(f"{path}: {name} must be text with plain {{{{fields}}}}, got {checks.shown(template)}")
    if template in row:
        return str(row[template])

    def value(found: re.Match[str]) -> str:
        field = found[1].strip()
        if field not in row:
            raise ValueError(
                f"{path}: {name} names {field!r}, which is no field of the items: only plain fields are filled in"
            )
        return str(row[field])

    filled = re.sub(r"\{\{(.*?)\}\}", value, template)
    if "{%" in template:
        raise ValueError(f"{path}: {name} computes; only plain fields are filled in")
    return filled

"""Writes evidence/README.md: every claim of evidence/claims.jsonl with its verdict, by the rule of assay.evidence.verdict.

    python benchmarks/verdicts.py [--check]

The verdict is judged anew from the recorded figures, so that a change of the rule shows here. `--check` writes nothing and fails
when the page is not up to date.
"""

from __future__ import annotations

import argparse
import string
import sys
from pathlib import Path
from typing import Any

from assay import catalogue
from assay.evidence.record import Evidence
from assay.evidence.types import Estimate
from assay.evidence.verdict import judge, summaries, unit_name

FOLDER = Path(__file__).resolve().parents[1] / "evidence"
HEAD = """# What was measured

<!-- written by `python benchmarks/verdicts.py` -->

| file | command that makes it (each line holds the one it came from) |
| --- | --- |
| `claims.jsonl` | `assay verify --all --scale small --jsonl evidence/claims.jsonl` |
| `demo.jsonl`, `demo-b.jsonl`, `demo-c.jsonl` | `make demo`, on machines A, B and C |
| `bench.jsonl` | `make bench` |
| `throughput.jsonl` | `assay tune smollm2-135m --goal throughput -o out/throughput` |
| `memory.jsonl` | `assay tune smollm2-135m --goal memory -o out/memory` |
| `mixers.jsonl` | `python benchmarks/mixers.py --out evidence/mixers.jsonl --chart evidence/mixers.html` (the picture: `mixers.png`) |
| `attention.jsonl` | `python benchmarks/attention.py --out evidence/attention.jsonl`, on machines A and C |

One JSON line a point, with machine, versions, threads, load, seed, commit and command. The machines:

{machines}

## Claims at small scale

`small` means minutes on a CPU: short trainings, small models. A verdict says what happened here at that size, not what the paper
measured elsewhere. It is that of the claim's largest point; "free" is the gain over the strongest baseline that costs nothing.

| claim | metric | paper | here (95 % interval) | over what is free | quality: here against baseline | machine | verdict |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""


def figure(estimate: Estimate, unit: str) -> str:
    """`2.12x (2.04 to 2.51)`."""
    name = unit_name(unit)
    shown = f"{estimate.median:.3g}{name if name in ('x', '%') else f' {unit}'.rstrip()}"
    return shown if estimate.low == estimate.high else f"{shown} ({estimate.low:.3g} to {estimate.high:.3g})"


def row(record: Evidence, machine: str) -> str:
    """One line of the table."""
    assert record.measured is not None
    paper = "-" if record.paper_value is None else f"{record.paper_value:g} {record.paper_unit}".strip()
    free = "-" if record.vs_free is None else f"{figure(record.vs_free, 'x')}: {record.free_label}"
    quality = "-"
    if record.quality is not None:
        against = "" if record.quality.baseline is None else f" against {record.quality.baseline:.4g}"
        quality = f"{record.quality.metric}: {record.quality.candidate:.4g}{against}"
    cells = [f"`{record.claim}`", record.metric, paper, figure(record.measured, record.unit), free, quality, machine]
    return "| " + " | ".join([*cells, judge(record).verdict]) + " |"


def describe(machines: dict[str, dict[str, Any]]) -> dict[str, str]:
    """A line for each machine, by fingerprint; processors of one name are told apart by what only some of them can do."""
    shared = set.intersection(*(set(machine["flags"]) for machine in machines.values()))
    found = {}
    for fingerprint, machine in machines.items():
        more = sorted(set(machine["flags"]) - shared)
        also = f", also {', '.join(more)}" if more else ""
        ram = round(machine["ram_bytes"] / 2**30)
        found[fingerprint] = f"{machine['cpu']} ({fingerprint}), {machine['cores']} cores, {ram} GiB{also}"
    return found


def page(lines: list[str]) -> str:
    """The whole page, from the lines of claims.jsonl."""
    records = [Evidence.model_validate_json(line) for line in lines]
    found = sorted(summaries(records), key=lambda s: (s.claim, s.fingerprint))
    for summary in found:
        catalogue.get(summary.claim.split("/")[0])  # a claim of no known paper would be a mistake
    shown = {s.fingerprint: s.deciding.machine for s in found}
    first = sorted(records, key=lambda record: record.created)  # a machine keeps its letter when another comes
    machines = {f: shown[f] for f in dict.fromkeys(record.fingerprint for record in first) if f in shown}
    letters = dict(zip(machines, string.ascii_uppercase, strict=False))
    lines = [f"- {letters[fingerprint]}: {text}" for fingerprint, text in describe(machines).items()]
    rows = [row(s.deciding, letters[s.fingerprint]) + "\n" for s in found]
    return HEAD.format(machines="\n".join(lines)) + "".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when the page is not up to date")
    options = parser.parse_args()
    text = page((FOLDER / "claims.jsonl").read_text(encoding="utf-8").splitlines())
    target = FOLDER / "README.md"
    if not options.check:
        target.write_text(text, encoding="utf-8")
    elif not target.is_file() or target.read_text(encoding="utf-8") != text:
        sys.exit("evidence/README.md is not up to date: run python benchmarks/verdicts.py")


if __name__ == "__main__":
    main()

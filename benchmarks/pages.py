"""Writes the pages of evidence: docs/evidence/<family>.md, evidence/README.md over them, and the figures of README.md.

    python benchmarks/pages.py [--check]

Verdicts are computed from the records as of now, so that a change of the rule, or of the code a record was measured with, shows here.
`--check` writes nothing and fails when a page is not up to date.
"""

from __future__ import annotations

import argparse
import json
import string
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from assay import catalogue
from assay.evidence import shipped
from assay.evidence.reading import Damaged
from assay.evidence.record import Evidence
from assay.evidence.types import Estimate, Verdict
from assay.evidence.verdict import PAYS, Summary, remarks, summaries, unit_name

ROOT = Path(__file__).resolve().parents[1]
MARK = "<!-- written by `make evidence-pages` -->"
INDEX = """# What was measured

{mark}

| file | command that makes it (each line holds the one it came from) |
| --- | --- |
| `claims/<slug>.jsonl`, `machines.json` | `assay verify SLUG --scale small --into evidence` (`make evidence` for all) |
| `demo.jsonl`; `demo-a.jsonl` to `demo-d.jsonl` | `make demo`; those with a letter are of earlier code, on four machines |
| `bench.jsonl` | `make bench` |
| `throughput.jsonl` | `assay tune smollm2-135m --goal throughput -o out/throughput` |
| `memory.jsonl` | `assay tune smollm2-135m --goal memory -o out/memory` |
| `mixers.jsonl` | `python benchmarks/mixers.py --out evidence/mixers.jsonl --chart evidence/mixers.html` (the picture: `mixers.png`) |
| `backbones.jsonl` | `make bench-backbones` (the picture: `backbones.png`) |
| `attention.jsonl` | `python benchmarks/attention.py --out evidence/attention.jsonl`, on two machines |
| `serve.jsonl` | `make bench-serve`, or the command in its lines for some of the servers |
| `continuous.jsonl` | `python benchmarks/continuous.py --tokens 32 --rounds 3 --out evidence/continuous.jsonl` |

One JSON line a point, with the hashes of the code that ran, versions, threads, load, seed, commit and command. The rules of a verdict are
written in `src/assay/evidence/verdict.py`, those of a proof in `docs/measuring.md`. A claim whose records are all `stale` was measured with
other code than today's (`make evidence-stale` lists what to run again). The machines of the claims:

{machines}

| family | {verdicts} |
| --- | {rules} |
{rows}"""
PAGE = """# {family}: what was measured

{mark}

At small scale: minutes on a CPU, short trainings, small models. A verdict says what happened here at that size, not what the paper measured
elsewhere. `free` is what a user had without assay, `exact` our own best code that loses nothing; a claim pays only where it beats both.

{machines}

| claim | paper | here (95 % interval) | over free | over exact | quality: here against baseline | machine | verdict |
| --- | --- | --- | --- | --- | --- | --- | --- |
{rows}
{notes}"""


def digits(value: float) -> str:
    """Three digits, but whole thousands: `1,827`, not `1.83e+03`."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.3g}"


def shown(estimate: Estimate, unit: str) -> str:
    """`2.12x (2.04 to 2.51)`."""
    name = unit_name(unit)
    text = f"{digits(estimate.median)}{name if name in ('x', '%') else f' {unit}'.rstrip()}"
    return text if estimate.low == estimate.high else f"{text} ({digits(estimate.low)} to {digits(estimate.high)})"


def over(record: Evidence, arm: str) -> str:
    """The ratio over one of the operator's baselines, or its figure."""
    if arm in record.ratios:
        return shown(record.ratios[arm], "x")
    value = record.free if arm == "free" else record.exact
    if record.kind == "figure" and value is not None:
        return f"it has {shown(Estimate(median=value, low=value, high=value), record.unit)}"
    return "-"


def row(summary: Summary, machine: str) -> str:
    """One line of a family's table."""
    record = summary.deciding
    paper = "-" if record.paper_value is None else f"{record.paper_value:g} {record.paper_unit}".strip()
    here = shown(record.measured, record.unit) if record.measured is not None else "-"
    quality = "-"
    if record.quality is not None:
        against = "" if record.quality.baseline is None else f" against {record.quality.baseline:.4g}"
        quality = f"{record.quality.metric}: {record.quality.candidate:.4g}{against}"
    word = summary.word if summary.verdict is not None else f"*{summary.word}*"
    better = remarks(record) if summary.verdict is not None else []  # an arm that does better stands in the row
    cells = [f"`{record.claim}`", paper, here, over(record, "free"), over(record, "exact"), quality, machine]
    return "| " + " | ".join([*cells, "; ".join([word, *better])]) + " |\n"


def notes(summary: Summary, machine: str) -> str:
    """What stands behind a row: reason, stand-in, the arms that do better, departures, and what would have refuted the claim."""
    record = summary.deciding
    lines = [f"\n### {record.claim} ({machine})\n\n{record.metric}. {summary.word}: {summary.reason}.\n"]
    facts: list[tuple[str, str]] = [("measured in its place", record.measured_here)]
    facts += [("note", remark) for remark in remarks(record)]
    facts += [("free", record.free_label), ("exact", record.exact_label)]
    facts += [(f"not the paper's {name}", why) for name, why in record.departures.items()]
    facts += [("refuted if", record.refuted_if)]
    if record.ratios:
        arms = {a: r for a, r in record.ratios.items() if a not in ("baseline", "free", "exact", "candidate again")}
        facts += [("time over the candidate's", ", ".join(f"{arm} {shown(r, 'x')}" for arm, r in arms.items()))]
        if "candidate again" in record.ratios:
            facts += [("the candidate against itself", shown(record.ratios["candidate again"], "x"))]
    figures = {**record.arms, **{f"control: {name}": value for name, value in record.controls.items()}}
    facts += [("other arms", ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))]
    if record.quality is not None:
        controls = ", ".join(f"{name} {value:.4g}" for name, value in record.quality.controls.items())
        facts += [(f"{record.quality.metric} of the controls", controls)]
    for name, arm in record.trained.items():
        scores = ", ".join(f"{score:.4g}" for score in arm.scores)
        facts += [(f"trained, {name}", f"{scores} over seeds, {arm.floor_name} {arm.floor:.4g}, rate {arm.rate:g}")]
    others = [point for point in summary.points if point.id != record.id and point.measured is not None]
    facts += [
        ("also", f"{', '.join(f'{k}={v}' for k, v in p.point.items()) or '-'}: {shown(p.measured, p.unit)}")
        for p in others
        if p.measured is not None
    ]
    facts += [("again", f"`{record.command}`")]
    return "".join([*lines, "\n", *(f"- {name}: {text}\n" for name, text in facts if text)])


def describe(machines: dict[str, dict[str, Any]]) -> dict[str, str]:
    """A line for each machine, by fingerprint; processors of one name are told apart by what only some of them can do."""
    flags = {fingerprint: _flags(machine) for fingerprint, machine in machines.items()}
    shared = set.intersection(*flags.values()) if machines else set()
    found = {}
    for fingerprint, machine in machines.items():
        more = sorted(flags[fingerprint] - shared)
        also = f", also {', '.join(more)}" if more else ""
        ram = machine.get("ram_bytes", 0)
        ram = round(ram / 2**30) if isinstance(ram, int | float) and 0 <= ram < 2**60 else "?"
        found[fingerprint] = (
            f"{machine.get('cpu', '?')} ({fingerprint}), {machine.get('cores', '?')} cores, {ram} GiB{also}"
        )
    return found


def _flags(machine: dict[str, Any]) -> set[str]:
    """Its instruction sets; a record from elsewhere may hold anything there."""
    found = machine.get("flags")
    return {flag for flag in found if isinstance(flag, str)} if isinstance(found, list | tuple) else set()


def letter(place: int) -> str:
    """A, B ... Z, AA, AB ..."""
    return (letter(place // 26 - 1) if place >= 26 else "") + string.ascii_uppercase[place % 26]


def pages(records: Sequence[Evidence], damaged: Sequence[Damaged] = ()) -> dict[str, str]:
    """Every page by its path in the checkout, from the records of the catalogue's papers; what is damaged is named in the index."""
    family_of = {paper.slug: paper.family for paper in catalogue.papers()}
    records = [record for record in records if record.slug in family_of]
    found = sorted(summaries(records), key=lambda s: (s.claim, s.fingerprint))
    first = sorted(records, key=lambda record: record.created)  # a machine keeps its letter when another comes
    machines = {record.fingerprint: record.machine for record in reversed(first)}
    order = list(dict.fromkeys(record.fingerprint for record in first))
    letters = {fingerprint: letter(place) for place, fingerprint in enumerate(order)}
    lines = {f: f"- {letters[f]}: {text}" for f, text in describe({f: machines[f] for f in order}).items()}
    result, rows = {}, []
    words = list(dict.fromkeys(sorted(s.word for s in found)))
    for family in catalogue.FAMILIES:
        mine = [s for s in found if family_of[s.claim.split("/")[0]] == family]
        if not mine:
            continue
        # a machine whose records are all older than the code is history once another has measured the claim anew
        fresh = {s.claim for s in mine if s.verdict is not None}
        listed = [s for s in mine if s.verdict is not None or s.claim not in fresh]
        counts = Counter(s.word for s in listed)
        rows.append(
            f"| [{family}](../docs/evidence/{family}.md) | {' | '.join(str(counts[w] or '-') for w in words)} |\n"
        )
        result[f"docs/evidence/{family}.md"] = PAGE.format(
            family=family,
            mark=MARK,
            machines="\n".join(lines[f] for f in order if f in {s.fingerprint for s in listed}),
            rows="".join(row(s, letters[s.fingerprint]) for s in listed),
            notes="".join(notes(s, letters[s.fingerprint]) for s in listed if s.verdict is not None),
        )
    result["evidence/README.md"] = INDEX.format(
        mark=MARK,
        machines="\n".join(lines.values()),
        verdicts=" | ".join(words),
        rules=" | ".join("---" for _ in words),
        rows="".join(rows),
    )
    if damaged:
        lines = "".join(f"- {str(one).replace(f'{ROOT}/', '')}\n" for one in damaged)
        result["evidence/README.md"] += f"\nDamaged lines, which are left out:\n\n{lines}"
    return result


BEGIN, END = "<!-- figures: written by `make evidence-pages` -->\n", "<!-- end of the figures -->\n"
DEMO = ROOT / "evidence" / "demo.jsonl"


def demo_table(record: dict[str, Any]) -> str:
    """The main job as a table with the command that made it, from the summary of a run of `make demo`."""
    machine = record["machine"]
    rows = []
    for name, key in (("as loaded", "baseline"), ("strongest free baseline", "free_baseline"), ("best", "best")):
        level = record[key]
        ends = "one run" if level.get("low") is None else f"{level['low']:,.0f} to {level['high']:,.0f}"
        label = "" if level["label"] == "as loaded" else f": `{level['label']}`"
        rows.append(
            f"| {name}{label} | {level['value']:,.0f} {level.get('unit', 'ms to the first token')} | {ends} |\n"
        )
    free, loaded, quality = record["speedup_vs_free"], record["speedup"], record["quality"]
    where = "on text that the search did not see" if quality.get("judged") else "on the text of the search"
    said = (
        f"{free['median']:.1f} times what is free ({free['low']:.1f} to {free['high']:.1f}), {loaded['median']:.1f} times as loaded "
        f"({loaded['low']:.1f} to {loaded['high']:.1f}); perplexity {100 * quality['drop']:+.2f} % ({100 * quality['low']:+.2f} to "
        f"{100 * quality['high']:+.2f}) {where}."
    )
    if quality.get("judged") and quality.get("looks"):
        kl, top1 = quality["kl"], quality["top1"]
        said += f" Mean KL {kl['mean']:.4f} nats a token, top-1 agreement {100 * top1['mean']:.1f} %."
    if not quality.get("judged"):
        said += " This run is older than today's rules, which judge quality on other text and take twelve minutes."
    papers = record.get("papers") or {}
    if papers.get("speedup"):
        ratio = papers["speedup"]
        methods = ", ".join(papers["methods"])
        said += (
            f" The papers' part ({methods}): {ratio['median']:.1f} times ({ratio['low']:.1f} to {ratio['high']:.1f})."
        )
    count = f"{record['screened']} candidates screened, {record['judged']} judged, {record['proven']} proven in {record['pairs']} pairs"
    return (
        f"`{record['command']}`, commit {record['commit'][:7]}, on {machine['processor']} "
        f"({record['seconds'] / 60:.0f} minutes; {count}):\n\n"
        f"| | median | 95 % interval |\n| --- | --- | --- |\n{''.join(rows)}\n{said}\n"
    )


def _said(summary: Summary) -> str:
    """A claim that pays, with its figure, what it gains over what is free, and a star where a recorded rival or a deletion does as well."""
    record = summary.deciding
    figure = "" if record.measured is None else f" {shown(record.measured, record.unit)}"
    free = f", over what is free {over(record, 'free')}" if "free" in record.ratios else ""
    return f"`{summary.claim}`{figure}{free}{' *' if remarks(record) else ''}"


def claims_said(records: Sequence[Evidence]) -> str:
    """A paragraph on what pays and one on what does not, and how much is older than its code."""
    found = sorted(summaries(records), key=lambda s: (s.claim, s.fingerprint))
    pays = [s for s in found if s.verdict in PAYS]
    other = (Verdict.COMPUTED, Verdict.NEEDS_HARDWARE, None, *PAYS)
    by_word: dict[str, list[str]] = {}
    for summary in found:
        if summary.verdict not in other:
            by_word.setdefault(summary.word, []).append(f"`{summary.claim}`")
    fresh = {s.claim for s in found if s.verdict is not None}
    stale = {s.claim for s in found if s.stale} - fresh
    parts = []
    if pays:
        parts.append(
            f"**What holds** at small scale ({len(pays)} claims; a star where the record says that a rival or a deletion does as well): "
            f"{'; '.join(_said(s) for s in pays)}.\n"
        )
    if by_word:
        listed = "; ".join(f"{word}: {', '.join(dict.fromkeys(claims))}" for word, claims in sorted(by_word.items()))
        parts.append(f"**What does not, or is not shown**: {listed}.\n")
    if stale:
        parts.append(
            f"{len(stale)} of {len(fresh | stale)} claims were measured with other code than today's and decide nothing until they are "
            "measured again (`make evidence-stale`).\n"
        )
    return "\n".join(parts)


def readme(text: str, records: Sequence[Evidence], demo: dict[str, Any]) -> str:
    """README with its figures replaced by those of the records. Raises ValueError when the marks are not there."""
    before, mark, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise ValueError("README.md must hold the two marks between which its figures stand")
    return f"{before}{BEGIN}\n{demo_table(demo)}\n{claims_said(records)}\n{END}{after}"


def all_pages() -> dict[str, str]:
    """Every generated page of this checkout."""
    found = shipped.read(where=ROOT / "evidence")
    records = found.records
    demo = json.loads(DEMO.read_text(encoding="utf-8").splitlines()[0])
    return {
        **pages(records, found.damaged),
        "README.md": readme((ROOT / "README.md").read_text(encoding="utf-8"), records, demo),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a page is not up to date")
    options = parser.parse_args()
    for name, text in all_pages().items():
        target = ROOT / name
        if not options.check:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
        elif not target.is_file() or target.read_text(encoding="utf-8") != text:
            sys.exit(f"{name} is not up to date: run make evidence-pages")


if __name__ == "__main__":
    main()

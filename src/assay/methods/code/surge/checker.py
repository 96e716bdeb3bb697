"""A small checker of proofs in propositional logic, our own: it stands where the paper has Lean 4, which is too large to be installed here.

    given p
    given p > q
    mp 1 2 q

A line is a rule, the numbers of the lines that it uses, and what follows. Formulas are one name, or two with `&`, `|` or `>` between.
"""

from __future__ import annotations

import json

from assay import checks

_USES = {"given": 0, "mp": 2, "and": 2, "left": 1, "right": 1, "or": 1}
CONNECTIVES = ("&", "|", ">")


def check(proof: str) -> str:
    """The verdict on a proof as JSON: `{"pass": bool, "errors": [{"line": int, "message": str}]}`, lines counted from 1.

    A line with an error is not believed: what uses it is one too. Raises ValueError for a proof without a line.

    >>> check("given p\\ngiven p > q\\nmp 1 2 q")
    '{"pass": true, "errors": []}'
    >>> check("given p\\nleft 1 q")
    '{"pass": false, "errors": [{"line": 2, "message": "left needs a conjunction, line 1 is p"}]}'
    """
    lines = proof.strip().splitlines()
    if not lines:
        raise ValueError(f"proof must have a line, got {checks.shown(proof)}")
    held: dict[int, tuple[str, ...]] = {}
    errors = []
    for number, line in enumerate(lines, 1):
        formula, fault = _line(line.split(), held)
        if fault:
            errors.append({"line": number, "message": fault})
        else:
            held[number] = formula
    return json.dumps({"pass": not errors, "errors": errors})


def _line(words: list[str], held: dict[int, tuple[str, ...]]) -> tuple[tuple[str, ...], str]:
    rule, rest = (words[0], words[1:]) if words else ("", [])
    if rule not in _USES:
        return (), f"unknown rule {rule}"
    used, formula = rest[: _USES[rule]], tuple(rest[_USES[rule] :])
    if len(formula) not in (1, 3) or len(formula) == 3 and formula[1] not in CONNECTIVES:
        return (), f"no formula: {' '.join(formula)}"
    lines = []
    for text in used:
        if not text.isdecimal() or int(text) not in held:
            return (), f"line {text} cannot be used here"
        lines.append(held[int(text)])
    return formula, _fault(rule, used, lines, formula)


def _fault(rule: str, used: list[str], lines: list[tuple[str, ...]], formula: tuple[str, ...]) -> str:
    """Why a formula does not follow; "" where it does."""
    said = " ".join(formula)
    if rule == "given":
        return ""
    first = lines[0]
    if rule in ("left", "right"):
        if len(first) != 3 or first[1] != "&":
            return f"{rule} needs a conjunction, line {used[0]} is {' '.join(first)}"
        part = first[0] if rule == "left" else first[2]
        return "" if formula == (part,) else f"{rule} gives {part}, not {said}"
    if rule == "or":
        fits = len(formula) == 3 and formula[1] == "|" and first in ((formula[0],), (formula[2],))
        return "" if fits else f"{said} does not follow from {' '.join(first)}"
    second = lines[1]
    if rule == "and":
        fits = first + ("&",) + second == formula
        return "" if fits else f"and gives {' '.join(first)} & {' '.join(second)}, not {said}"
    fits = len(second) == 3 and second[1] == ">" and first == (second[0],) and formula == (second[2],)
    return "" if fits else f"{said} does not follow from {' '.join(first)} and {' '.join(second)}"

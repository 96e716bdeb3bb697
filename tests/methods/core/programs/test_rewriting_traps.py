"""Programs in which a rule that looks at the surface would go wrong: whatever is edited must do the same, or stay."""

import contextlib
import copy
import io
import math
from pathlib import Path

import pytest

from assay.methods.core.programs.rewriting import edits, rewrite
from assay.workloads.programs.task import cells

FOLDER = Path(__file__).parent
NAMES = {"nan": math.nan, "inf": math.inf}
TRAPS = cells((FOLDER / "rewriting_traps.txt").read_text(encoding="utf-8"))


def cases_of(program):
    """The arguments that a cell names in its first line."""
    return eval(program.splitlines()[0].removeprefix("# cases: "), NAMES)  # noqa: S307 - our own text


def outcome(program, args):
    """What a function does: its value, its exception's type, what it prints, and its arguments afterwards."""
    name = "g" if "\ndef g(" in f"\n{program}" and "def f(x" in program else "f"
    scope = {"__name__": "program"}
    exec(compile(program, "<program>", "exec"), scope)
    if args[:1] == ("SAME",):
        given = [copy.deepcopy(args[1])] * 2
    else:
        given = list(copy.deepcopy(args))
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            value = ("returned", repr(scope[name](*given)))
        except Exception as error:  # noqa: BLE001 - whatever a program raises is its behaviour
            value = ("raised", type(error).__name__)
    return value, out.getvalue(), repr(given)


@pytest.mark.parametrize("name", TRAPS)
@pytest.mark.parametrize("seen", [False, True], ids=["by syntax", "by observed arguments"])
def test_what_is_edited_does_the_same(name, seen):
    program = TRAPS[name]
    cases = cases_of(program)
    observed = {"f": [args for args in cases if args[:1] != ("SAME",)]} if seen else None
    wanted = [outcome(program, args) for args in cases]
    for edit in edits(program, observed=observed):
        found = [outcome(edit.program, args) for args in cases]
        assert found == wanted, f"{edit.rule}:\n{edit.program}"
    whole = rewrite(program, observed=observed)
    assert [outcome(whole, args) for args in cases] == wanted, whole

"""Screening: many candidates timed against the base on few layers, in one process. The times rank candidates; they are not results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from assay.measure.isolate import ChildResult
from assay.tuner.assessing import reaching, reserve
from assay.tuner.budget import SCREENING
from assay.tuner.outcome import Row, Screened
from assay.tuner.recipe import Recipe
from assay.tuner.run import Run, over
from assay.tuner.search import Option, Search

SINGLES, COMBINED = 12, 4  # candidates screened at most, of one option and of more
LEAST = 6  # screened even when that takes half as long again as it should
ONE_BY_ONE = 0.7  # share of the screening's time for single options


def screen(run: Run, search: Search) -> None:
    """Time candidates on few layers: options one by one, then the combinations that look best."""
    end = run.budget.spent() + SCREENING * run.budget.total
    for combined in (False, True):
        most = COMBINED * run.nodes.count if combined else SINGLES
        wanted = {run.recipe(over(run.base, o)).key(): o for o in search.to_screen(most, combined=combined)}
        while new := [key for key in wanted if f"screen:{key}" not in run.journal.old]:
            share = (end - run.budget.spent()) * (1.0 if combined else ONE_BY_ONE)
            left = min(share, run.budget.left() - reserve(run, 2))
            costs = run.budget.costs
            if not left > (2.5 if combined else 1.5) * (costs.start + costs.load):
                if len(new) == len(wanted) and not combined:
                    run.note("no time to screen candidates: they are chosen by prediction alone")
                break
            with run.telling(f"screening {len(new)} candidates on few layers", _news(run, wanted)):
                error = _screen_once(run, [run.recipe(over(run.base, wanted[key])) for key in new], left)
            if all(f"screen:{key}" not in run.journal.old for key in new):
                run.note(f"screening did not work: {error}")
                break
        for key, options in wanted.items():
            if (found := run.journal.old.get(f"screen:{key}")) is not None:
                _screened(run, search, options, found)


def _screen_once(run: Run, recipes: list[Recipe], seconds: float) -> str:
    """Run one process per machine; results, and the candidate in which a process died, go to the journal. Returns why one died."""
    died = ""
    alone = run.nodes.local
    parts = [recipes[i :: run.nodes.count] for i in range(min(run.nodes.count, len(recipes)))]
    each = max(seconds / 2, 10.0)
    calls = [
        run.call(
            "screen",
            min(1.5 * seconds + each, run.budget.left()),
            base=run.base.recipe.model_dump(mode="json"),
            recipes=[recipe.model_dump(mode="json") for recipe in part],
            seconds=seconds,
            least=max(LEAST - len(run.screened), 1),
            each=each,
            journal=str(run.journal.path) if alone else None,
        )
        for part in parts
    ]
    for which, result in run.nodes.run(calls):
        if alone:
            run.journal.read_again()
        for key, value in (result.value or {}).items():
            if f"screen:{key}" not in run.journal.old:
                run.journal.add(f"screen:{key}", value)
        if result.status != "ok":
            died = result.error or result.status
            begun = (
                [r for r in parts[which] if f"screening:{r.key()}" in run.journal.old] if alone else parts[which][:1]
            )
            for recipe in begun:
                if f"screen:{recipe.key()}" not in run.journal.old:
                    run.journal.add(f"screen:{recipe.key()}", _death(result, each))
    return died


def _death(result: ChildResult, each: float) -> dict[str, Any]:
    """The journal entry of the candidate in which a process died; a candidate that took too long ended the process itself, with code 1."""
    if "exited with code 1" in result.error:
        return {"status": "timeout", "error": f"took longer than {each:.0f} s to be screened"}
    return {"status": result.status, "error": result.error or result.status}


def _screened(run: Run, search: Search, options: tuple[Option, ...], found: dict[str, Any]) -> None:
    """Tell the search the result of a screening; a failure becomes a row."""
    recipe = run.recipe(over(run.base, options))
    if found["status"] == "ok":
        search.screened(options, found["ratio"])
        run.screened.append(Screened(recipe, found["ratio"], found["layers"], found["of"]))
        return
    row = Row(
        "candidate", recipe, found["status"], predicted=search.roofline(options), seconds=found.get("seconds", 0.0)
    )
    row.error, row.misfit = found["error"], found.get("misfit", "")
    run.rows.append(reaching(run, row))
    search.fail(options, row.misfit)


def _news(run: Run, wanted: dict[str, tuple[Option, ...]]) -> Callable[[], list[str]]:
    """What has been screened since the last call, one line each."""
    told: set[str] = set(run.journal.old)

    def look() -> list[str]:
        lines = []
        for key, value in run.journal.seen().items():
            if key.startswith("screen:") and key not in told:
                told.add(key)
                options = wanted.get(key.removeprefix("screen:"), ())
                label = " + ".join(option.step.label() for option in options)
                took = f"{value['ratio']:.2f} of the base's time" if value["status"] == "ok" else value["error"]
                lines.append(f"screened {label}: {took}")
        return lines

    return look

"""SQL in the sandbox: a query on a small SQLite database, its rows, and the steps of SQLite's machine.

with Workers() as workers:
    run_sql(workers, "create table t(x); insert into t values (1), (2);", "select sum(x) from t").value
"""

from __future__ import annotations

from dataclasses import replace

from assay.methods.core.programs.workers import Outcome, Workers
from assay.methods.core.sandbox import Limits

_PROGRAM = """
import sqlite3

def query(script, text, most_rows, counted):
    connection = sqlite3.connect(":memory:")
    connection.executescript(script)
    connection.execute("pragma query_only = on")
    steps = 0

    def step():
        nonlocal steps
        steps += 1

    if counted:
        connection.set_progress_handler(step, 1)
    rows = connection.execute(text).fetchmany(most_rows + 1)
    connection.set_progress_handler(None, 0)
    if len(rows) > most_rows:
        raise OverflowError(f"more than {most_rows} rows")
    return [rows, steps]
"""


def run_sql(
    workers: Workers,
    script: str,
    query: str,
    *,
    repeats: int = 1,
    most_rows: int = 100_000,
    limits: Limits | None = None,
) -> list[Outcome]:
    """Run one query after `script` made the database, fresh for every repeat; `value` is the list of rows, tuples.

    With the meter "operations" the cost is the number of steps of SQLite's own machine, which repeats exactly; with the others it includes
    making the database, the same for every query on it. A query cannot write, and several statements at once are refused by SQLite.
    """
    counted = workers.meter.name == "operations"
    [outcomes] = workers.run(_PROGRAM, "query", [(script, query, most_rows, counted)], repeats=repeats, limits=limits)
    return [_rows(outcome, counted=counted) for outcome in outcomes]


def _rows(outcome: Outcome, *, counted: bool) -> Outcome:
    if outcome.state != "returned":
        return outcome
    rows, steps = outcome.value
    return replace(outcome, value=rows, cost=float(steps) if counted else outcome.cost)

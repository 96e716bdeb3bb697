"""Do the meters of `assay code` agree on which program is cheaper, and how much does each differ from run to run?

    python benchmarks/meters.py [--tasks N] [--out FILE]

Right programs of the bank of HumanEval tasks are measured on one input of their second level, by every meter and by wall time, once on a
quiet machine and once while as many other processes as there are cores keep all of them busy. Two figures a meter: the coefficient of
variation of its repeats (the median over programs, and the worst), idle and loaded; and Spearman's correlation of the order it puts a
task's programs in with that of instructions (the mean over tasks that have four programs or more). One JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

from assay.evidence.place import here
from assay.methods.core.programs.estimates import coefficient_of_variation
from assay.methods.core.programs.workers import Workers
from assay.methods.core.sandbox import Limits
from assay.workloads.programs.task import Task, bank

LEVEL = 2
REPEATS = {"wall_seconds": 10, "cpu_seconds": 10, "operations": 3, "peak_bytes": 5, "instructions": 2}
PROGRAMS = 6
"""Of a task, the expert first: counting instructions takes seconds a run."""


@contextmanager
def loaded(on: bool) -> Iterator[None]:
    """Other processes that keep as many cores busy as there are."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1) if on]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def costs_of(tasks: list[Task], meter: str) -> dict[str, dict[str, list[float]]]:
    """By task and program, the costs of the repeats."""
    found: dict[str, dict[str, list[float]]] = {}
    with Workers(
        "cpu_seconds" if meter == "wall_seconds" else meter, limits=Limits(30, 10, 1024), packages=False
    ) as workers:
        for task in tasks:
            names = sorted(task.programs, key=lambda name: name != "expert")[:PROGRAMS]
            case = task.arguments(LEVEL)
            found[task.id] = {
                name: [one(workers, task, name, case, meter) for _ in range(REPEATS[meter])] for name in names
            }
            print(f"{meter}: {task.id}", file=sys.stderr)
    return found


def one(workers: Workers, task: Task, name: str, case: tuple[Any, ...], meter: str) -> float:
    began = time.perf_counter()
    [[outcome]] = workers.run(task.programs[name], task.entry_point, [case])
    seconds = time.perf_counter() - began
    if outcome.cost is None:
        raise RuntimeError(f"{task.id}, {name}: {outcome.state} {outcome.error}")
    return seconds if meter == "wall_seconds" else outcome.cost


def variation(costs: dict[str, dict[str, list[float]]]) -> dict[str, float]:
    every = [
        coefficient_of_variation(repeats) if statistics.fmean(repeats) > 0 else 0.0
        for task in costs.values()
        for repeats in task.values()
    ]
    return {"median": statistics.median(every), "worst": max(every), "programs": len(every)}


def agreement(costs: dict[str, dict[str, list[float]]], with_: dict[str, dict[str, list[float]]]) -> dict[str, float]:
    found = []
    for task, programs in costs.items():
        if len(programs) >= 4:
            first = [statistics.median(programs[name]) for name in programs]
            second = [statistics.median(with_[task][name]) for name in programs]
            if len(set(first)) > 1 and len(set(second)) > 1:
                found.append(float(spearmanr(first, second).statistic))
    return {"mean": statistics.fmean(found), "worst": min(found), "tasks": len(found)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=12)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    tasks = list(bank().values())
    tasks = tasks[:: max(len(tasks) // options.tasks, 1)][: options.tasks]
    idle = {meter: costs_of(tasks, meter) for meter in REPEATS}
    with loaded(True):
        busy = {meter: costs_of(tasks, meter) for meter in REPEATS}
    line = {
        "what": "meters",
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": f"python benchmarks/meters.py --tasks {options.tasks}",
        "machine": here().fingerprint,
        "commit": here().commit,
        "level": LEVEL,
        "meters": {
            meter: {
                "idle": variation(idle[meter]),
                "loaded": variation(busy[meter]),
                "agrees_with_instructions": agreement(idle[meter], idle["instructions"]),
                "loaded_agrees_with_idle": agreement(busy[meter], idle[meter]),
            }
            for meter in REPEATS
        },
    }
    text = json.dumps(line)
    print(text)
    if options.out is not None:
        with open(options.out, "a", encoding="utf-8") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()

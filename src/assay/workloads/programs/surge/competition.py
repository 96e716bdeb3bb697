"""CL: problems as in competitions, a C++ program that reads stdin, from the bank of 36."""

from __future__ import annotations

from assay.workloads.programs.submissions import problems
from assay.workloads.programs.surge.source import Source

LONGEST = 900
"""Characters of a program: longer ones do not fit beside three others into a small model's context. Our choice."""
MOST = 14
SHORT_INPUT = 120


def made() -> list[Source]:
    """For each problem its shortest right program, with two short inputs."""
    found: list[Source] = []
    groups = 0
    for name, problem in problems().items():
        program = min((one.program for one in problem.submissions), key=len)
        stdins = [stdin for number in range(12) if len(stdin := problem.stdin(0, number)) <= SHORT_INPUT]
        if len(program) > LONGEST or len(stdins) < 2 or groups == MOST:
            continue
        groups += 1
        for number, stdin in enumerate(stdins[:2]):
            files = {"main.cpp": program}
            found.append(
                Source(f"CL/{name}/{number}", "CL", "competition", f"CL/{name}", "cpp", files, stdin, stdin.strip())
            )
    return found

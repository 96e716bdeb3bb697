"""GeoJSEval: does a model's JavaScript for maps and geometry do what was asked? Run in a sandbox, compared by type, told over rounds.

After "GeoJSEval: An Automated Evaluation Framework for Large Language Models on JavaScript-Based Geospatial Computation and Visualization
Code Generation" (ISPRS Int. J. Geo-Inf. 14(10):382, 2025, arXiv 2507.20553). A task asks for one function that uses a library for maps;
its cases have parameters, an expected answer and the type by which it is compared. A task is solved where no case fails. Over rounds of
one model that gives pass@n, its variation CV and the stability-adjusted accuracy SA, shares of seven kinds of errors, and what an answer
takes in tokens, seconds and lines.

    from assay.workloads.programs.geospatial import tasks
    from assay.workloads.programs.geospatial.libraries import module_of, node_modules

    task = tasks()["turf/area-km2"]
    with Warm([module_of("turf")], node_modules()) as warm:
        code = cleaned(response, task.entry_point, task.prompt)
        found = judged(warm, code, task.entry_point, task.parameters, task.cases)
    reported({task.id: [Attempt(Answer(response, code), found)]}, ns=[1])

- `cleaned`, `completed`: from a response, or a continuation, to a program.
- `judged`: a program against cases, in warm processes (`Warm`) or in one process a case as the paper has it (`OneProcess`).
- `compared`: right, wrong or of another type, for seven types, outside of the sandbox.
- `reported`, `ranked`: the figures. The paper's pass@n takes the first n rounds and depends on their order; `Report.unbiased` does not.
- `write`, `read`: JSON lines as lm-evaluation-harness logs samples.
- `mutants`: wrong programs made of right ones, by which cases and comparators are tested.

Where it differs from the published runner, by choice: strings and booleans are compared with the expected answer (there with themselves),
numbers within 1e-6 (there within a hundred-thousandth of the expected one more), arrays within half of the third decimal (there one and
a half of it), geometries wherever their rings begin, arguments go by their names, a warning on stderr is no failure, an exception is no
answer, the function is found by its name, and a page is jsdom's, so that what is drawn is not seen, only the state of the objects.

When NOT to use it: to rank models by tasks that they may have been trained on, for what a map looks like, and for programs that are
ECMAScript modules.
"""

from __future__ import annotations

from assay.methods.code.geojseval.answers import Answer, cleaned, completed, defines
from assay.methods.code.geojseval.comparing import CLOSE, CLOSE_IN_ARRAYS, OUT_TYPES, compared, same_geometry
from assay.methods.code.geojseval.metrics import (
    NS,
    Attempt,
    Report,
    error_shares,
    first_n,
    ranked,
    reported,
    stability_adjusted,
    unbiased,
    variation,
)  # fmt: skip
from assay.methods.code.geojseval.mutants import RULES, Mutant, mutants
from assay.methods.code.geojseval.records import lines, read, write
from assay.methods.code.geojseval.running import (
    ERRORS,
    LIMITS,
    Case,
    Judged,
    OneProcess,
    Result,
    Runner,
    Warm,
    error_of,
    judged,
    result_of,
)  # fmt: skip

__all__ = [
    "CLOSE", "CLOSE_IN_ARRAYS", "ERRORS", "LIMITS", "NS", "OUT_TYPES", "RULES", "Answer", "Attempt", "Case", "Judged", "Mutant",
    "OneProcess", "Report", "Result", "Runner", "Warm", "cleaned", "compared", "completed", "defines", "error_of", "error_shares",
    "first_n", "judged", "lines", "mutants", "ranked", "read", "reported", "result_of", "same_geometry", "stability_adjusted", "unbiased",
    "variation", "write",
]  # fmt: skip

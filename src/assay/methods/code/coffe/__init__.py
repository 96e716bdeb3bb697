"""COFFE: stress tests that keep a program's contracts, and efficient@k by what the programs cost on them.

After "COFFE: A Code Efficiency Benchmark for Code Generation" (arXiv 2502.02827, FSE 2025). Tests written for correctness are too small to
tell slow programs from fast ones, and large inputs written blindly are often invalid. So contracts come first, asserts that every
correctness test keeps; then inputs that keep the contracts and cost much; then what each program costs on them, against the best
known solution.

    program, test = prompt + canonical_solution, task["test"]
    run = through(workers)                                                # a sandbox: core.programs.workers
    seen = observed_cases(workers, program, entry_point, test)            # core.programs.judging: what the tests give
    contracts = mine(ObservedContracts(program, entry_point, seen), program, passing(run, test, entry_point), examples=seen)
    tests = stress(Doubling(seen), contracts.code, [observed(args) for args in seen], accepting(run, contracts.code, entry_point))
    cases = evaluated(run, tests.inputs)                                  # arguments; measure every program on them, 12 runs each
    found = score([Problem(best=costs_of_best, samples=[costs, None])])   # None: failed a correctness test

In the paper a language model writes contracts and inputs: `ContractsByModel`, `InputsByModel`, with the paper's budgets, at function and
at file level. `ObservedContracts` and `Doubling` need none (our choice, in the manner of Daikon). All four go through the same two
loops, `mine` and `stress`, which are what decides.

The numbers (4 contracts of 20 calls, 5 inputs of 15, 10 a call, scale 10^4, seed 1024, 12 runs less two) are those of the released code.
Departures: an infinity stands for what was cut; efficient@k for any k; the tolerance and the geometric mean beside the paper's figures.
When NOT to use it: to compare programs that differ by less than their costs vary from run to run; with fewer than a handful of
correctness tests; where the reference is what is being judged (it scores 0).
"""

from __future__ import annotations

from assay.methods.code.coffe.contracts import ContractMiner, Contracts, mine
from assay.methods.code.coffe.doubling import MANNERS, ByStrategy, Doubling, stress_strategy
from assay.methods.code.coffe.model import Chat, ContractsByModel, InputsByModel, code_in
from assay.methods.code.coffe.observed import Candidate, ObservedContracts, candidates, holds
from assay.methods.code.coffe.programs import (
    Run,
    Unusable,
    as_function,
    asserts,
    parameters,
    passing,
    through,
    with_contract,
)
from assay.methods.code.coffe.scores import (
    RUNS,
    TOLERANCE,
    Problem,
    Scores,
    Speedup,
    best_solution,
    cost_of_runs,
    efficient_at_k,
    is_efficient,
    passed_at_k,
    relative_deviation,
    score,
    speedup,
)
from assay.methods.code.coffe.stress import (
    SCALE,
    SEED,
    StressGenerator,
    StressInput,
    StressTests,
    accepting,
    evaluated,
    observed,
    stress,
    value_here,
)

__all__ = [
    "ByStrategy",
    "Candidate",
    "Chat",
    "ContractMiner",
    "Contracts",
    "ContractsByModel",
    "Doubling",
    "InputsByModel",
    "MANNERS",
    "ObservedContracts",
    "Problem",
    "RUNS",
    "Run",
    "SCALE",
    "SEED",
    "Scores",
    "Speedup",
    "StressGenerator",
    "StressInput",
    "StressTests",
    "TOLERANCE",
    "Unusable",
    "accepting",
    "as_function",
    "asserts",
    "best_solution",
    "candidates",
    "code_in",
    "cost_of_runs",
    "efficient_at_k",
    "evaluated",
    "holds",
    "is_efficient",
    "mine",
    "observed",
    "parameters",
    "passed_at_k",
    "passing",
    "relative_deviation",
    "score",
    "speedup",
    "stress",
    "stress_strategy",
    "through",
    "value_here",
    "with_contract",
]

"""PIE: does the best of eight rewritten programs gain more than the average human who tried again?

No trained model of 7B parameters is here. What stands for it are rules that know what is slow, and the edits of similar pairs, of which
the best of eight samples counts as in the paper. All else is the paper's: pairs of one author, the later program faster by more than a
tenth; training and test split by problem; samples compiled with -O3, judged on tests, and worth at least 1 because the program that was
there can be kept; a meter that repeats (instructions that valgrind counts, where the paper simulates a processor), seconds beside it.

Programs are assay's own: 36 small problems in C++ with what three made-up people handed in for them, and the right programs of 35 tasks of
HumanEval. How much there is to gain from a slow program follows from the sizes of the inputs, for everybody alike: only comparisons between
arms say something, not the figures by themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from assay.experiments.code.pie_code_edits_optimisers import at_random, by_retrieval, by_rules
from assay.experiments.core import Figure, Operator, experiment
from assay.methods.code import pie_code_edits as room
from assay.methods.code.pie_code_edits import Edits, EditTask, Index, Pair, Submission, Test
from assay.methods.core.programs import rewriting
from assay.methods.core.programs.estimates import interval
from assay.methods.core.programs.judging import judge
from assay.methods.core.programs.processes import compiled, run_program
from assay.methods.core.programs.workers import Workers
from assay.methods.core.sandbox import Limits, Sandbox
from assay.workloads.programs.submissions import Problem, problems
from assay.workloads.programs.task import Task, bank

FLAGS = (*room.FLAGS, "-static")
"""Loading the library at every start costs as much as many a program of the bank."""
FREE_FLAGS = ("-Ofast", "-march=x86-64-v3", "-static")
"""For a processor with AVX2, which valgrind knows too."""
CASES = 4
"""Small inputs of each problem, beside the one that is measured."""
REPEATS = 5
"""Of seconds."""
THREADS = 2
ALL, RULES, EDITS, TARGETS, RANDOM = (
    "all optimisers", "rules", "edits of similar pairs", "targets of similar pairs", "random edits",
)  # fmt: skip
LIMITS = Limits(wall_seconds=60, cpu_seconds=2, memory_mib=1024, output_bytes=4 * 2**20)
Measure = Callable[[str], float | None]


@dataclass(frozen=True)
class Bench:
    """What was handed in for a problem, how any program for it is measured, by the meter that decides and by the one beside it (None:
    wrong), with the flags of `free` where it is compiled, and what rules make of a program."""

    submissions: list[Submission]
    cost: Measure
    beside: Measure
    free: Measure
    rules: Callable[[str], list[str]]


@dataclass(frozen=True)
class Row:
    """A slow program of the test split: samples by arm, speed-ups by arms that draw none, and some by the other meter.

    `best` is the best sample of all optimisers, `targets` what its author handed in later that was faster.
    """

    problem: str
    source: str
    best: str
    targets: tuple[str, ...]
    edits: dict[str, Edits]
    human: float
    every_later: float
    fastest: float
    free: float
    leaked: float
    beside: dict[str, float] = field(default_factory=dict)


def once(measure: Measure) -> Measure:
    """The same text is measured once, so that a program that was not changed costs the same."""
    known: dict[str, float | None] = {}

    def found(program: str) -> float | None:
        if program not in known:
            known[program] = measure(program)
        return known[program]

    return found


# ---------------------------------------------------------------------------------------------------------------- the two banks


def cpp_bench(problem: Problem, sandbox: Sandbox, seed: int) -> Bench:
    """A problem in C++: instructions decide, seconds stand beside them. Right is what the first program that was handed in writes."""
    stdins = [problem.stdin(0, number, seed) for number in range(CASES)] + [problem.stdin(1, 0, seed)]
    first = problem.submissions[0].program
    wrote = [outputs(first, stdin, sandbox) for stdin in stdins]
    tests = tuple(
        Test(stdin, expected, timed=number == CASES)
        for number, (stdin, expected) in enumerate(zip(stdins, wrote, strict=True))
    )
    task = EditTask(first, tests, flags=FLAGS)
    cost = once(lambda program: task.measure(program, sandbox).cost)

    def seconds(program: str) -> float | None:
        try:
            return task.measure(program, sandbox, meter="cpu_seconds", repeats=REPEATS).cost
        except room.TooCheap:
            return None

    free = once(lambda program: task.measure(program, sandbox, flags=FREE_FLAGS).cost)
    handed = [
        Submission(one.program, problem.id, one.author, order, cost(one.program))
        for order, one in enumerate(problem.submissions)
    ]
    return Bench(handed, cost, once(seconds), free, by_rules)


def outputs(program: str, stdin: str, sandbox: Sandbox) -> str:
    """What a program of the bank writes."""
    [[outcome]] = run_program(sandbox, compiled(program, "cpp", flags=FLAGS), [stdin.encode()], meter="peak_bytes")
    if outcome.state != "returned":
        raise ValueError(f"a program of the bank must answer its own inputs, but it {outcome.state}: {outcome.error}")
    return str(outcome.value)


def python_bench(task: Task, seconds: Workers, operations: Workers, seed: int) -> Bench:
    """A task of HumanEval: processor seconds decide, operations of the interpreter stand beside them.

    The bank has no times: the canonical program counts as handed in first, then the others from the last to the first, the expert's last.
    The best of eight noisy figures is better than it is: random edits, mostly without any effect, show by how much.
    """
    cases = [task.arguments(0, number, seed) for number in range(CASES)] + [task.arguments(1, 0, seed)]
    answers = [outcomes[0] for outcomes in seconds.run(task.programs["expert"], task.entry_point, cases)]
    if bad := [answer for answer in answers if answer.state != "returned"]:
        raise ValueError(f"the expert's program of {task.id} must answer its own inputs, but: {bad[0].error}")
    wanted = [answer.value for answer in answers]

    def by(workers: Workers, repeats: int) -> Measure:
        def measure(program: str) -> float | None:
            seen = workers.run(program, task.entry_point, cases[:-1])
            if not judge(wanted[:-1], [outcomes[0] for outcomes in seen], task.compare).right:
                return None
            [outcomes] = workers.run(program, task.entry_point, cases[-1:], repeats=repeats)
            if not judge([wanted[-1]] * len(outcomes), outcomes, task.compare).right:
                return None
            return min(float(outcome.cost or 0.0) for outcome in outcomes) or None  # what others do only adds

        return once(measure)

    cost, beside = by(seconds, REPEATS), by(operations, 1)
    later = [text for name, text in task.programs.items() if name not in ("canonical", "expert")]
    texts = [task.programs["canonical"], *reversed(later), task.programs["expert"]]
    handed = [Submission(text, task.id, "bank", order, cost(text)) for order, text in enumerate(texts)]
    observed = {task.entry_point: [list(case) for case in cases[:CASES]]}

    def rules(program: str) -> list[str]:
        whole = rewriting.rewrite(program, observed=observed)
        single = [edit.program for edit in rewriting.edits(program, observed=observed)]
        return [text for text in dict.fromkeys([whole, *single]) if text != program]

    return Bench(handed, cost, beside, lambda _: None, rules)


@contextmanager
def benches(programs: str, many: int | None, seed: int) -> Iterator[dict[str, Bench]]:
    """The first so many problems of a bank, all without a number, measured as far as they were handed in."""
    if programs == "humaneval":
        tasks = list(bank().values())[:many]
        with Workers("cpu_seconds", limits=LIMITS) as seconds, Workers("operations", limits=LIMITS) as operations:
            yield {task.id: python_bench(task, seconds, operations, seed) for task in tasks}
        return
    given = list(problems().values())[:many]
    sandbox = Sandbox(LIMITS)
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda one: cpp_bench(one, sandbox, seed), given))
    yield {one.id: made for one, made in zip(given, found, strict=True)}


# ------------------------------------------------------------------------------------------------------------------- the arms


def samples(program: str, bench: Bench, nearest: Sequence[Pair], k: int, seed: str) -> dict[str, list[str]]:
    """Up to k samples by arm.

    All together: six by rules, two by the edits of similar pairs, then what is left of both.
    """
    rules, edits = bench.rules(program), by_retrieval(program, nearest)
    found = {
        ALL: list(dict.fromkeys([*rules[:6], *edits[:2], *rules[6:], *edits[2:]])),
        RULES: rules,
        EDITS: edits,
        TARGETS: [pair.target for pair in nearest],
        RANDOM: at_random(program, k, seed),
    }
    return {arm: texts[:k] for arm, texts in found.items()}


def row(source: Pair, bench: Bench, pairs: Sequence[Pair], index: Index, leaky: Index | None, k: int, seed: int) -> Row:
    """All that is asked of one slow program. Samples that an optimiser does not have count as failures, as in the paper."""
    cost = source.source_cost
    drawn = samples(source.source, bench, index.nearest(source.source), k, f"{seed}/{source.problem}/{cost:g}")
    edits = {arm: Edits(cost, (*map(bench.cost, texts), *[None] * (k - len(texts)))) for arm, texts in drawn.items()}
    own = [pair for pair in pairs if pair.source == source.source]
    at = next(one.order for one in bench.submissions if one.program == source.source)
    later = [
        one.cost for one in bench.submissions if one.author == source.author and one.order > at and one.cost is not None
    ]
    known = [one.cost for one in bench.submissions if one.cost is not None]
    compiled_anew = bench.free(source.source)
    handed_out = bench.cost(leaky.nearest(source.source, 1)[0].target) if leaky else None
    best = min([source.source, *drawn[ALL]], key=lambda text: bench.cost(text) or math.inf)
    return Row(
        source.problem,
        source.source,
        best,
        tuple(pair.target for pair in own),
        edits,
        human=mean([pair.speedup for pair in own]),
        every_later=mean([cost / one for one in later]),
        fastest=max(1.0, cost / min(known)),
        free=max(1.0, cost / compiled_anew) if compiled_anew else 1.0,
        leaked=max(1.0, cost / handed_out) if handed_out else 1.0,
    )


def seen_beside(one: Row, bench: Bench) -> dict[str, float]:
    """The same speed-ups by the other meter: of the sample that is best by the one that decides, and of the human; none where a program
    costs less than that meter can tell."""
    cost, chosen = bench.beside(one.source), bench.beside(one.best)
    human = [found for found in map(bench.beside, one.targets) if found is not None]
    if cost is None or chosen is None or len(human) < len(one.targets):
        return {}
    return {"best": max(1.0, cost / chosen), "human": mean([cost / found for found in human])}


def sources_of(pairs: Sequence[Pair], bench: Bench, most: int | None) -> list[Pair]:
    """A pair for each slow program, in the order in which they were handed in; the first `most` of them."""
    order = {one.program: one.order for one in bench.submissions}
    first: dict[str, Pair] = {}
    for pair in pairs:
        first.setdefault(pair.source, pair)
    return sorted(first.values(), key=lambda pair: order[pair.source])[:most]


def rows_of(
    held: Mapping[str, Bench], *, k: int, sources: int | None, halves: int, seed: int, threads: int = 1
) -> list[Row]:
    """The slow programs of the test problems of one half, the other half being for training; of both, each in turn, with two halves.

    Instructions do not mind company: programs in C++ are measured two at a time, but for their seconds.
    """
    pairs = {name: room.build_pairs(bench.submissions) for name, bench in held.items()}
    split = room.split_by_problem(held, {"test": 0.5, "train": 0.5}, seed=seed)
    found = []
    for test, train in (("test", "train"), ("train", "test"))[:halves]:
        index = Index([pair for name in sorted(split[train]) for pair in pairs[name]])
        for name in sorted(split[test]):
            for source in sources_of(pairs[name], held[name], sources):
                others = [pair for pair in pairs[name] if pair.author != source.author]
                leaky = Index([*index.pairs, *others]) if others else None
                found.append((source, held[name], pairs[name], index, leaky, k, seed))
    with ThreadPoolExecutor(threads) as pool:
        rows = list(pool.map(lambda given: row(*given), found))
    return [replace(one, beside=seen_beside(one, held[one.problem])) for one in rows]


# ---------------------------------------------------------------------------------------------------------------- the experiment


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def over_problems(rows: Sequence[Row], value: Callable[[Row], float]) -> tuple[float, float, float]:
    """The mean over slow programs and its interval, problems drawn again with all their programs."""
    grouped: dict[str, list[float]] = {}
    for one in rows:
        grouped.setdefault(one.problem, []).append(value(one))

    def statistic(drawn: Sequence[list[float]]) -> float:
        return mean([each for of_problem in drawn for each in of_problem])

    low, high = interval(list(grouped.values()), statistic)
    return statistic(list(grouped.values())), low, high


def figures(rows: Sequence[Row], arm: str, k: int) -> dict[str, Any]:
    """All figures of an arm, of the first k samples and of k in any order."""
    edits = [one.edits[arm] for one in rows]
    found = room.scores(edits, k)
    return {
        f"correct@{k}": found.correct,
        "mean": found.speedup,
        "geometric mean": found.geometric_mean,
        "%Opt by threshold": {str(limit): share for limit, share in found.optimised.items()},
        "right but slower, of the right samples": found.slower,
        "best@1": room.best_at_k(edits, 1),
        "best@1 in any order": room.best_at_k(edits, 1, expected=True),
        f"best@{max(1, k // 2)} in any order": room.best_at_k(edits, max(1, k // 2), expected=True),
    }


@experiment(
    "pie_code_edits/best-at-8",
    points={
        "smoke": [{"programs": "humaneval", "problems": 6, "k": 8, "sources": 1, "halves": 1}],
        "small": [
            {"programs": "cpp", "problems": 24, "k": 8, "sources": 1, "halves": 1},
            {"programs": "humaneval", "problems": None, "k": 8, "sources": 1, "halves": 2},
        ],
        "full": [
            {"programs": "cpp", "problems": None, "k": 8, "sources": None, "halves": 2},
            {"programs": "humaneval", "problems": None, "k": 8, "sources": None, "halves": 2},
        ],
    },
    decides={
        "small": {"programs": "cpp", "problems": 24, "k": 8, "sources": 1, "halves": 1},
        "full": {"programs": "cpp", "problems": None, "k": 8, "sources": None, "halves": 2},
    },
    operator=Operator(
        "making a right program faster", free="the compiler's own: -Ofast -march=x86-64-v3, where it is compiled"
    ),
    paper={
        "programs": "978 slow programs of CodeNet, C++, of 41 problems",
        "k": 8,
        "optimiser": "GPT-3.5, fine-tuned on 4,085 pairs and its own programs, temperature 0.7",
        "human": "targets of the pairs of the test split",
        "meter": "time on a simulated processor (gem5)",
        "flags": "-O3, C++17",
    },
    departures={
        "programs": "assay's own, written for these problems with slow and fast forms: CodeNet's archive is not shipped; at small "
        "the first slow one alone of each problem, the slowest as a rule, for optimisers and people alike",
        "optimiser": "rules and the edits of similar pairs, written by the hand that wrote the programs: no trained model is here",
        "meter": "instructions that valgrind counts, which see no waiting for memory; seconds stand beside them",
        "flags": "linked statically too: loading the library at every start costs as much as many a program of the bank",
    },
    refuted_if="the best of eight samples gains less than the average human, problems drawn again: the whole interval of the difference",
    refutes=lambda record: record["details"]["best of k less human"]["high"] < 0,
    measured_here=(
        "best-of-8 speed-up of rules and of the edits of similar pairs, in the place of a fine-tuned model, over what the programs' "
        "made-up authors gained later, on assay's own programs: it says whether such optimisers reach a human, nothing of GPT-3.5"
    ),
    minutes=120,
    memory_gib=4,
)
def best_at_8(programs: str, problems: int | None, k: int, sources: int | None, halves: int, seed: int = 0) -> Figure:
    """Best of k by all optimisers against the average human, who is the paper's baseline.

    Controls: no change, k random edits, and the cheapest rival: the targets of the most similar pairs, handed out as they are.
    """
    with benches(programs, problems, seed) as held:
        threads = THREADS if programs == "cpp" else 1
        rows = rows_of(held, k=k, sources=sources, halves=halves, seed=seed, threads=threads)

    def best(arm: str) -> Callable[[Row], float]:
        return lambda one: room.speedup_best_at_k(one.edits[arm], k)

    value, low, high = over_problems(rows, best(ALL))
    less, less_low, less_high = over_problems(rows, lambda one: best(ALL)(one) - one.human)
    either = [max(room.speedup_best_at_k(edits, k) for edits in one.edits.values()) for one in rows]
    measured = [one for one in rows if one.beside]
    leaks = {}
    if programs == "cpp":  # elsewhere nobody else has handed in something for the same problem
        leaks["target of the most similar pair of others, problems not split"] = mean([one.leaked for one in rows])
    return Figure(
        value,
        "x",
        low,
        high,
        baseline=mean([one.human for one in rows]),
        free=mean([one.free for one in rows]) if programs == "cpp" else None,
        controls={
            "deleted": 1.0,  # the program that was there
            "random": mean([best(RANDOM)(one) for one in rows]),
            "rival": mean([best(TARGETS)(one) for one in rows]),
        },
        arms=leaks
        | {
            "rules alone": mean([best(RULES)(one) for one in rows]),
            "edits of similar pairs alone": mean([best(EDITS)(one) for one in rows]),
            "fastest known": mean([one.fastest for one in rows]),
            "every later program of the author, slower ones too": mean([one.every_later for one in rows]),
            "the best of all samples of all arms": mean(either),
        },
        details={
            "slow programs": len(rows),
            "problems of them": len({one.problem for one in rows}),
            "handed in": sum(len(bench.submissions) for bench in held.values()),
            "pairs": sum(len(room.build_pairs(bench.submissions)) for bench in held.values()),
            "best of k less human": {"value": less, "low": less_low, "high": less_high},
            "human, geometric mean": math.exp(mean([math.log(one.human) for one in rows])),
            "by arm": {arm: figures(rows, arm, k) for arm in (ALL, RULES, EDITS, TARGETS, RANDOM)},
            "by the other meter": {
                "meter": "cpu_seconds" if programs == "cpp" else "operations",
                "slow programs": len(measured),
                "best": mean([one.beside["best"] for one in measured]) if measured else None,
                "human": mean([one.beside["human"] for one in measured]) if measured else None,
            },
            "by slow program and its cost: best of k, human, fastest": {
                f"{one.problem}, {one.edits[ALL].source:.4g}": [
                    round(each, 2) for each in (best(ALL)(one), one.human, one.fastest)
                ]
                for one in rows
            },
        },
    )

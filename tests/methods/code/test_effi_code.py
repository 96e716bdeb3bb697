"""What must hold of Effi-Code: overheads and comparisons, profiles seen in the sandbox, the loop, and the data that it makes."""

import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
from tests.tools import needs

from assay.methods.code import effi_code as room
from assay.methods.code.effi_code import (
    Evaluated,
    LineCost,
    Profile,
    Request,
    SelfOptimize,
    Step,
    data,
    generators,
    loop,
    profiling,
)
from assay.methods.core.programs.workers import Outcome, Workers
from assay.methods.core.sandbox import Limits

LIMITS = Limits(wall_seconds=10, cpu_seconds=2)


@pytest.fixture(scope="module")
def workers():
    needs("bwrap")
    with Workers(limits=LIMITS) as found:
        yield found


# ------------------------------------------------------------------------------------------------------------------ the overheads


@pytest.mark.parametrize("variant", ["paper", "as_released"])
def test_constant_memory_over_a_time_is_their_product(variant):
    times = 1.7e9 + np.array([0.0, 0.1, 0.25, 2.0])
    found = room.et_mu_tmu(times, [30.0] * 4, variant=variant)
    assert (found.et, found.mu, found.tmu) == pytest.approx((2.0, 30.0, 60.0), rel=1e-5)


def test_the_area_of_joined_intervals_is_the_sum_and_that_of_numpy():
    rng = np.random.default_rng(3)
    times, held = np.sort(rng.random(30)), rng.random(30) * 100
    whole, first, second = (
        room.et_mu_tmu(times[part], held[part]) for part in (slice(None), slice(12), slice(11, None))
    )
    assert whole.tmu == pytest.approx(first.tmu + second.tmu)
    assert whole.tmu == pytest.approx(np.trapezoid(held, times))
    assert whole.mu == max(first.mu, second.mu) == held.max()
    assert whole.et == pytest.approx(first.et + second.et)
    assert min(whole.et, first.et, second.et) >= 0


def test_the_released_area_loses_an_interval_that_begins_at_0_and_only_that():
    times, held = np.array([0.0, 1.0, 3.0]), [10.0, 20.0, 40.0]
    assert room.et_mu_tmu(times, held).tmu == 75
    assert room.et_mu_tmu(times, held, variant="as_released").tmu == 60
    later = [room.et_mu_tmu(times + 1e6, held, variant=variant) for variant in ("paper", "as_released")]
    assert later[0] == later[1]


def test_one_sample_has_no_time_and_no_area():
    assert room.et_mu_tmu([5.0], [3.0]) == room.Overhead(0.0, 3.0, 0.0)


@pytest.mark.parametrize(
    ("times", "memory", "said"),
    [
        ([], [], "times"), ([0, 1], [1], "memory"), ([1, 0], [1, 1], "backwards"), ([0, 1], [1, -1], "at least 0"),
        ([0, math.nan], [1, 1], "times"), ([0, 1], [1, math.inf], "memory"), ([[0, 1]], [[1, 1]], "times"),
    ],
)  # fmt: skip
def test_samples_that_are_none_are_refused(times, memory, said):
    with pytest.raises(ValueError, match=said):
        room.et_mu_tmu(times, memory)
    with pytest.raises(ValueError, match="variant"):
        room.et_mu_tmu([0], [1], variant="official")


def test_the_reference_held_against_itself_is_exactly_1_and_units_do_not_matter():
    costs = {"a": 0.3, "b": 17.0, "c": 1e-5}
    assert room.normalised(costs, costs) == room.Normalised(1.0, 1.0, 1.0, 3)
    ours = {"a": 0.6, "b": 1.7}
    scaled = room.normalised({k: 1024 * v for k, v in ours.items()}, {k: 1024 * v for k, v in costs.items()})
    assert scaled == room.normalised(ours, costs)
    assert scaled.tasks == 2


def test_one_tiny_reference_carries_the_mean_away_and_not_the_others():
    references = dict.fromkeys("abcde", 1.0) | {"e": 1e-6}
    found = room.normalised(dict.fromkeys("abcde", 1.0), references)
    assert found.mean > 1e5
    assert found.median == 1
    assert found.geometric_mean < 20


@pytest.mark.parametrize(
    ("values", "references", "said"),
    [
        ({}, {}, "values"),
        ({"a": 1.0}, {}, "references"),
        ({"a": 0.0}, {"a": 1.0}, "above 0"),
        ({"a": 1.0}, {"a": 0.0}, "above 0"),
    ],
)
def test_ratios_that_are_none_are_refused(values, references, said):
    with pytest.raises(ValueError, match=said):
        room.normalised(values, references)


BEFORE = {"a": 4.0, "b": 1.0, "c": None, "d": 3.0, "e": 2.0}
AFTER = {"a": 1.0, "b": 2.0, "c": 1.0, "d": None, "e": 2.0}


def test_swapping_the_two_inverts_the_ratio():
    one, other = room.compared(BEFORE, AFTER), room.compared(AFTER, BEFORE)
    assert one.tasks == other.tasks == ("a", "b", "e")
    assert one.ratio_of_means == pytest.approx(5 / 7)
    assert one.ratio_of_means * other.ratio_of_means == pytest.approx(1)
    assert one.geometric_mean * other.geometric_mean == pytest.approx(1)
    assert one.saved == pytest.approx(100 * 2 / 7)
    assert (one.solved, other.solved, one.attempted) == ((4, 4), (4, 4), 5)


def test_whoever_solves_a_part_is_compared_on_that_part():
    few = dict.fromkeys(BEFORE) | {"b": 2.0}
    assert room.compared(BEFORE, few).tasks == ("b",)
    assert room.compared(BEFORE, few).ratio_of_means == 2
    assert room.compared(BEFORE, few).solved == (4, 1)
    assert room.compared(BEFORE, BEFORE).saved == 0


def test_comparisons_of_nothing_are_refused():
    with pytest.raises(ValueError, match="same tasks"):
        room.compared(BEFORE, {"a": 1.0})
    with pytest.raises(ValueError, match="both solve"):
        room.compared({"a": 1.0, "b": None}, {"a": None, "b": 1.0})
    with pytest.raises(ValueError, match="above 0"):
        room.compared({"a": 0.0}, {"a": 1.0})
    with pytest.raises(ValueError, match="ratios"):
        room.geometric([])


# -------------------------------------------------------------------------------------------------------------------- the profile

NESTED = '''
import asyncio

class Box:
    def total(self, n):
        text = "def total(self, n):"
        return sum(i * i for i in range(200 * n))

def outer(n: int):
    def inner(k):
        """async def outer"""
        return k + 1
    async def waited(k):
        await asyncio.sleep(0)
        return inner(k)
    def counted(n):
        for i in range(n):
            yield i
    found = [asyncio.run(waited(i)) for i in range(n)]
    for k in counted(n): found.append(k)
    return found, Box().total(n)

assert outer.__annotations__["n"] is int, "a feature of __future__ that it did not ask for"
'''


def test_every_line_is_seen_in_nested_async_and_generator_functions_too(workers):
    profile = room.LineProfiler(workers, "outer", [(3,), (2,)])(NESTED)
    lines = NESTED.splitlines()
    hits = {lines[one.line - 1].strip(): one.hits for one in profile.lines}
    assert hits["return k + 1"] == 5
    assert hits["return inner(k)"] == 5
    assert hits["yield i"] == 5
    assert hits['text = "def total(self, n):"'] == 2
    assert '"""async def outer"""' not in hits
    assert hits["return found, Box().total(n)"] == 2
    assert "class Box:" not in hits  # it is loaded, not called


SLOW = """
async def f(n):
    small = sum(range(10))
    found = sorted(range(n), key=lambda x: -x)
    big = [0] * (20 * n)
    del big
    return len(found)
"""


def test_time_and_memory_lie_where_they_are_spent(workers):
    profile = room.LineProfiler(workers, "f", [(2000,)], memory=True)(SLOW)
    by_line = {one.line: one for one in profile.lines}
    assert max(profile.lines, key=lambda one: one.seconds).line == 4
    assert profile.seconds_of(4, 4) > 0.9 * profile.seconds
    assert profile.seconds_of(3, 5) <= profile.seconds
    assert by_line[3].peak_bytes < 100_000
    assert by_line[5].kept_bytes > 8 * 39_000
    assert by_line[6].kept_bytes < -8 * 39_000
    assert by_line[4].peak_bytes > 8 * 2000
    report = profile.report(SLOW).splitlines()
    assert report[4].endswith("found = sorted(range(n), key=lambda x: -x)")
    assert "%" in report[4]
    assert "%" not in report[1]


def test_what_does_not_return_has_no_profile(workers):
    for program in ("def f(n): return 1 / 0", "def g(n): pass", "def f(n:", "import os\ndef f(n): os._exit(0)"):
        with pytest.raises(room.ProfileError, match="ended by"):
            room.LineProfiler(workers, "f", [(1,)])(program)


@pytest.mark.parametrize("rows", [None, [[1, 2]], [[1, 1, math.nan, 0, 0]], [["x", 1, 1.0, 0, 0]]])
def test_rows_that_a_program_put_in_their_place_are_refused(rows):
    with pytest.raises(room.ProfileError, match="changed what"):
        profiling._checked(rows)


def test_profilers_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="workers must measure"):
        room.LineProfiler(SimpleNamespace(meter=SimpleNamespace(name="operations")), "f", [(1,)])
    with pytest.raises(ValueError, match="calls"):
        room.LineProfiler(SimpleNamespace(meter=SimpleNamespace(name="cpu_seconds")), "f", [])


def test_a_measured_run_has_no_profiling_in_it(workers):
    """The program answers whether anybody traces it: it is profiled and measured, and right."""
    program = "import sys, tracemalloc\ndef f(n):\n    return sys.gettrace() is None and not tracemalloc.is_tracing()"
    bench = room.Bench(workers, "f", [((1,), True)], [((2,), True)], lambda a, b: a == b, repeats=2)
    profiler = room.LineProfiler(workers, "f", [(1,)], memory=True)
    found = SelfOptimize(lambda request: program + f"\n# {len(request.tried)}", profiler, 2)(program, bench)
    assert found.profiles >= 1
    assert all(step.right for step in found.steps)


HOLDS = """
import time
def f(mib: int, seconds):
    held = bytearray(mib * 2**20)
    time.sleep(seconds)
    if mib == 1:
        raise KeyError("one")
    print("loaded")
    return len(held)
assert f.__annotations__["mib"] is int, "a feature of __future__ that it did not ask for"
"""


def test_a_curve_is_seen_from_outside(workers):
    curve = room.memory_curve(workers.sandbox, HOLDS, "f", (40, 0.2), interval=0.01)
    assert curve.state == "returned"
    assert curve.times[0] == 0
    found, whole = curve.overhead(), curve.overhead(own=False)
    assert 0.2 <= found.et < 5
    assert 39 < found.mu < 60
    assert 39 * 0.1 < found.tmu <= found.mu * found.et
    assert whole.mu > found.mu
    assert len(curve.times) >= 3
    failed = room.memory_curve(workers.sandbox, HOLDS, "f", (1, 0.0))
    assert (failed.state, failed.error) == ("raised", "KeyError: 'one'")
    late = room.memory_curve(workers.sandbox, HOLDS, "f", (2, 5.0), limits=Limits(wall_seconds=0.3, cpu_seconds=5))
    assert late.state == "time"
    gone = room.memory_curve(workers.sandbox, "import os\ndef f(*_): os._exit(0)", "f", (2, 5.0))
    assert gone.state == "crashed"
    absent = room.memory_curve(workers.sandbox, HOLDS, "g", (2, 5.0))
    assert (absent.state, absent.error) == ("raised", "KeyError: 'g'")


def test_curves_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="interval"):
        room.memory_curve(SimpleNamespace(limits=LIMITS), "", "f", (), interval=0)
    with pytest.raises(ValueError, match="arguments"):
        room.memory_curve(SimpleNamespace(limits=LIMITS), "", "f", (object(),))


# ----------------------------------------------------------------------------------------------------------------------- the loop


def told(costs, wrong=()):
    """A bench that is told what programs cost, and counts how often it is asked."""
    asked = []

    def evaluate(program):
        asked.append(program)
        return (
            Evaluated(False, math.inf, "case 0 gave 1, not 2") if program in wrong else Evaluated(True, costs[program])
        )

    evaluate.asked = asked
    return evaluate


def saying(*programs):
    answers = iter(programs)
    return lambda request: next(answers, None)


def test_no_rounds_are_the_program_itself():
    found = SelfOptimize(saying("fast"), None, 0)("slow", told({"slow": 4.0, "fast": 1.0}))
    assert (found.program, found.steps, found.best, found.gain, found.improved) == ("slow", (), (4.0,), 0.0, False)


@pytest.mark.parametrize("seed", range(20))
def test_what_is_kept_is_right_and_the_best_cost_never_rises(seed):
    rng = random.Random(seed)
    costs = {f"p{n}": rng.choice([rng.random(), 0.5]) for n in range(12)}
    wrong = {name for name in costs if name != "p0" and rng.random() < 0.4}
    found = SelfOptimize(lambda request: f"p{rng.randrange(12)}", None, 15)("p0", told(costs, wrong))
    assert len(found.best) == 16
    assert all(later <= before for before, later in zip(found.best, found.best[1:], strict=False))
    tried = {step.program for step in found.steps if step.right} | {"p0"}
    assert found.best[-1] == costs[found.program] == min(costs[program] for program in tried)
    assert found.program not in wrong
    assert not {step.program for step in found.steps if step.kept} & wrong


def test_a_wrong_program_is_not_kept_however_cheap_and_says_why():
    found = SelfOptimize(saying("wrong", "same"), None, 5)("slow", told({"slow": 4.0, "same": 4.0}, {"wrong"}))
    assert found.program == "slow"
    assert [(step.right, step.cost, step.why) for step in found.steps] == [
        (False, math.inf, "case 0 gave 1, not 2"),
        (True, 4.0, "it costs no less"),
    ]


def test_a_gain_within_the_noise_is_none_where_one_says_so():
    costs = {"slow": 4.0, "same": 3.9, "fast": 3.0}
    assert SelfOptimize(saying("same"), None, 1)("slow", told(costs)).program == "same"
    found = SelfOptimize(saying("same", "fast"), None, 2, least_gain=0.05)("slow", told(costs))
    assert [step.kept for step in found.steps] == [False, True]
    assert found.gain == 0.25


def test_the_same_text_is_not_run_twice():
    bench = told({"slow": 4.0, "same": 5.0})
    found = SelfOptimize(saying("same", "slow", "same"), None, 5)("slow", bench)
    assert bench.asked == ["slow", "same"]
    assert [step.why for step in found.steps] == ["it costs no less", "it was tried before", "it was tried before"]


def test_a_profile_is_taken_of_every_new_best_and_of_nothing_else():
    taken, asked = [], []

    def profiler(program):
        taken.append(program)
        if program == "b":
            raise room.ProfileError("it does not return")
        return Profile((LineCost(1, 1, 1.0),))

    def generator(request):
        asked.append((request.task, request.program, request.profile is not None, len(request.tried)))
        return {0: "worse", 1: "b", 2: "c"}.get(len(request.tried))

    costs = {"a": 4.0, "worse": 5.0, "b": 3.0, "c": 2.0}
    found = SelfOptimize(generator, profiler, 5)("a", told(costs), task="Add.")
    assert taken == ["a", "b", "c"]
    assert found.profiles == 3
    assert asked == [("Add.", "a", True, 0), ("Add.", "a", True, 1), ("Add.", "b", False, 2), ("Add.", "c", True, 3)]


def test_loops_and_costs_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="right to begin with, but case 0"):
        SelfOptimize(saying(), None, 1)("wrong", told({}, {"wrong"}))
    for wrong in ({"rounds": -1}, {"rounds": 1.5}, {"least_gain": 1.0}):
        with pytest.raises((ValueError, TypeError), match=next(iter(wrong))):
            SelfOptimize(saying(), None, **wrong)
    for right, cost in ((True, math.inf), (True, -1.0), (False, 1.0)):
        with pytest.raises(ValueError, match="cost of a"):
            Evaluated(right, cost)


class Machine:
    """Stands for workers: a program is a name, its answers are its argument plus one, its costs are told."""

    meter = SimpleNamespace(name="cpu_seconds", unit="s")

    def __init__(self, costs):
        self.costs, self.ran = costs, []

    def run(self, program, entry_point, cases, *, repeats=1, limits=None, keywords=None):
        self.ran += [(program, *case) for case in cases]
        off = {"wrong": 1, "wrong when large": 1 if cases[0][0] > 5 else 0}.get(program, 0)
        if program == "raises":
            return [[Outcome("raised", error="KeyError: 3")]]
        return [[Outcome("returned", case[0] + 1 + off, cost=next(self.costs[program]))] for case in cases]


def test_a_bench_judges_on_all_calls_and_measures_what_is_right():
    costs = {
        name: iter(values)
        for name, values in {"a": [9, 9, 1, 2, 3, 9, 1, 9], "wrong": [1] * 9, "wrong when large": [1] * 9}.items()
    }
    machine = Machine(costs)
    tests, costly = [((1,), 2), ((2,), 3)], [((10,), 11), ((20,), 21)]
    bench = room.Bench(machine, "f", tests, costly, lambda a, b: a == b, repeats=3)
    found = bench("a")
    # of the calls in turns: 10, 20, 10, 20, 10, 20
    assert found == Evaluated(True, statistics_of([1, 3, 1]) + statistics_of([2, 9, 9]))
    assert bench("a") is found
    assert (bench.evaluations, len(machine.ran)) == (1, 2 + 6)
    assert bench("wrong") == Evaluated(False, math.inf, "case 0 gave 3, not 2")
    assert machine.ran[-1] == ("wrong", 1)  # not run further
    assert not bench("wrong when large").right
    assert bench("raises").why == "case 0 raised: KeyError: 3"
    with pytest.raises(ValueError, match="costly"):
        room.Bench(machine, "f", tests, [], lambda a, b: a == b)


def statistics_of(values):
    return sorted(values)[1]


# ----------------------------------------------------------------------------------------------------------------- the generators


def edit(line, program, end=None):
    return SimpleNamespace(rule="toy", line=line, end_line=end or line, program=program, why="")


@pytest.fixture
def edits(monkeypatch):
    """Three places in "start", none in what comes of them."""
    found = {"start": [edit(2, "second"), edit(4, "fourth", 5), edit(7, "seventh"), edit(7, "seventh too")]}
    monkeypatch.setattr(generators.rewriting, "edits", lambda program, *, rules, observed: found.get(program, []))
    return found


def tried(*programs):
    return tuple(Step(1, program, False, math.inf, False) for program in programs)


PROFILE = Profile(
    (LineCost(2, 1, 0.2), LineCost(4, 1, 0.15), LineCost(5, 9, 0.3), LineCost(7, 1, 0.4), LineCost(9, 1, 5.0))
)


def test_rules_begin_where_most_time_is_spent_and_try_nothing_twice(edits):
    def asked(order, *before):
        return room.Rules(order)(Request("", "start", PROFILE, tried(*before)))

    assert asked("profile") == "fourth"  # its two lines together
    assert asked("profile", "fourth") == "seventh"
    assert asked("profile", "fourth", "seventh", "seventh too", "second") is None
    assert asked("in order", "second") == "fourth"
    assert room.Rules("profile")(Request("", "start", None)) == "second"
    assert room.Rules("profile")(Request("", "second", PROFILE)) is None


def test_a_random_line_is_any_that_can_be_edited_and_the_same_for_the_same_seed(edits):
    firsts = [room.Rules("random", seed)(Request("", "start", PROFILE)) for seed in range(200)]
    assert firsts == [room.Rules("random", seed)(Request("", "start", None)) for seed in range(200)]
    shares = {program: firsts.count(program) / 200 for program in set(firsts)}
    assert set(shares) == {"second", "fourth", "seventh", "seventh too"}
    assert 0.2 < shares["second"] < 0.47  # a third by line, a quarter by edit
    assert shares["seventh"] + shares["seventh too"] < 0.47


def test_rules_that_are_none_are_refused():
    with pytest.raises(ValueError, match="order"):
        room.Rules("hottest")


MEMBERSHIP = """
def f(numbers):
    seen = []
    text = ""
    for number in numbers:
        if number not in seen:
            seen.append(number)
    for number in numbers[:3]:
        text += str(number)
    return len(seen), text
"""


def test_a_real_program_becomes_a_data_point_by_rules_and_the_line_profile(workers):
    numbers = list(range(1500))
    tests, costly = [(([1, 2, 1],), (2, "121"))], [((numbers,), (1500, "012"))]
    bench = room.Bench(workers, "f", tests, costly, lambda a, b: tuple(b) == a, repeats=3)
    profiler = room.LineProfiler(workers, "f", [(numbers,)])
    optimise = SelfOptimize(room.Rules(observed={"f": [(numbers,)]}), profiler, 1, least_gain=0.05)
    found = room.curate(
        [room.Source("distinct", "How many different numbers are there?", "f", [MEMBERSHIP], tests)],
        lambda source, program: optimise(program, bench, task=source.prompt),
        lambda source: bench,
        lambda source, program: room.deterministic(workers, program, "f", [[[1, 2]]], lambda a, b: a == b, repeats=2),
    )
    (kept,) = found.items
    assert kept.cost < 0.5 * kept.initial_cost  # of the two places the profile points to the one that counts
    assert "set" in kept.program
    assert "text +=" in kept.program


REPLY = (
    "First:\n```python\nimport math\n```\nthen\n```python\ndef f(n):\n    return n\n```\nand a test\n```\nf(1)\n```\n"
)


def test_the_program_in_a_reply_and_what_is_wrong_with_its_form():
    assert room.extracted(REPLY, "f") == room.Extracted("def f(n):\n    return n\n", "")
    assert room.extracted("async def f(n): pass", "f").failure == ""
    assert room.extracted("Fine.", "f").failure == "no code"
    assert room.extracted("Fine", "f").failure == "no code"  # which is Python
    assert room.extracted("```python\ndef f(n:\n```", "f").failure == "syntax"
    assert room.extracted("```python\ndef g(n): pass\n```", "f").failure == "no entry point"


def test_a_model_is_shown_the_task_the_program_its_profile_and_what_went_wrong():
    seen = []

    def complete(prompt):
        seen.append(prompt)
        return REPLY if len(seen) == 1 else "I cannot."

    writer = room.Writer(complete, "f")
    program = "def f(n):\n    return n + 0"
    assert writer(Request("Return n.", program, Profile((LineCost(2, 7, 0.5),)))) == "def f(n):\n    return n\n"
    assert all(part in seen[0] for part in ("Return n.", program, "      7   0.50000  100.0%"))
    assert writer(Request("Return n.", program, None, (Step(1, "x", False, math.inf, False, "case 0 raised"),))) is None
    assert "not kept: case 0 raised" in seen[1]
    assert "line by line" not in seen[1]


# ----------------------------------------------------------------------------------------------------------------------- the data


def source(name, *programs, tests=(((1,), 2),), prompt="Add one to a number and return what comes of it.", entry="f"):
    return room.Source(name, prompt, entry, programs, tests)


TEXTS = {"slow": "def f(n): return n + 1 + 0", "fast": "def f(n): return n + 1", "off": "def f(n): return n"}
COSTS = {TEXTS["slow"]: 4.0, TEXTS["fast"]: 1.0, TEXTS["off"]: 0.5, "def f(n): return 1 + n": 2.0}


def curated(sources, *, revision=TEXTS["fast"], costs=COSTS, unsteady=(), **settings):
    bench = told(costs, {TEXTS["off"]})
    return room.curate(
        sources,
        lambda source, program: SelfOptimize(saying(revision), None, 1)(program, bench),
        lambda source: bench,
        lambda source, program: program not in unsteady,
        **settings,
    )


def test_every_task_is_a_data_point_or_has_a_reason():
    found = curated(
        [
            source("kept", "not a program", TEXTS["off"], TEXTS["slow"]),
            source("no tests", TEXTS["slow"], tests=()),
            source("risky", "import os\ndef f(n): return os.getpid()"),
            source("unsteady", "def f(n): return id(n)"),
            source("wrong", TEXTS["off"]),
            source("not Python", "def f(n:"),
            source("no gain", TEXTS["fast"]),
        ],
        unsteady={"def f(n): return id(n)"},
    )
    (item,) = found.items
    assert (item.id, item.program, item.cost, item.initial, item.initial_cost) == (
        "kept",
        TEXTS["fast"],
        1.0,
        TEXTS["slow"],
        4.0,
    )
    assert found.dropped == {
        "no tests": "no tests", "risky": "risky operations", "unsteady": "non-deterministic", "wrong": "nothing right",
        "not Python": "nothing right", "no gain": "gain too small",
    }  # fmt: skip


def test_what_is_kept_is_right_and_costs_no_more_also_if_somebody_else_optimised():
    def careless(source, program):
        return SelfOptimize(saying(TEXTS["off"]), None, 1)(program, told({TEXTS["slow"]: 4.0, TEXTS["off"]: 0.1}))

    bench = told(COSTS, {TEXTS["off"]})
    found = room.curate([source("a", TEXTS["slow"])], careless, lambda _: bench, lambda *_: True, least_gain=0.0)
    assert found.dropped == {"a": "gain too small"}
    risky = "def f(n): return eval('n + 1')"
    assert curated([source("a", TEXTS["slow"])], revision=risky, costs={**COSTS, risky: 0.1}).dropped == {
        "a": "risky operations"
    }


def test_the_best_of_many_models_candidates():
    programs = [TEXTS["slow"], "def f(n): return 1 + n"]
    (first,) = curated([source("a", *programs)]).items
    (cheapest,) = curated([source("a", *programs)], revision=TEXTS["slow"], start="cheapest").items
    assert (first.initial, first.cost) == (TEXTS["slow"], 1.0)
    assert (cheapest.program, cheapest.initial_cost, cheapest.cost) == (programs[1], 4.0, 2.0)


def test_procedures_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="'a' twice"):
        curated([source("a", TEXTS["slow"]), source("a", TEXTS["fast"])])
    with pytest.raises(ValueError, match="least_gain"):
        curated([], least_gain=1.0)
    with pytest.raises(ValueError, match="start"):
        curated([], start="last")


def test_risky_operations_are_found_and_plain_ones_are_not():
    assert room.risky("from os import path") == ["from os import"]
    assert room.risky("import urllib.request as r") == ["import urllib.request"]
    assert room.risky("from . import x") == ["from . import"]
    assert room.risky("def f(x): return x.__class__.__subclasses__()") == [".__class__", ".__subclasses__"]
    assert room.risky("async def f(): exec('1')") == ["exec()"]
    fine = "import math, re\nfrom collections import deque\nclass A:\n    def __init__(self): super().__init__()\n"
    assert room.risky(fine + "def f(x, table): return list(map(table.__getitem__, x)), 'open()'") == []
    with pytest.raises(ValueError, match="program"):
        room.risky("def f(")


def test_answers_that_differ_from_run_to_run_are_found(workers):
    def steady(program):
        return room.deterministic(workers, program, "f", [(3,)], lambda a, b: a == b)

    assert not steady("import random\ndef f(n): return random.random()")
    assert not steady("import os\ndef f(n): return os.urandom(4)")
    assert steady("import random\ndef f(n): return random.Random(n).random()")
    assert steady("def f(n): return 1 / 0")
    with pytest.raises(ValueError, match="repeats"):
        room.deterministic(workers, "", "f", [], lambda a, b: True, repeats=1)


def item(
    name="a", prompt="Add one to a number and return what comes of it.", entry="f", program=TEXTS["fast"], cost=1.0
):
    return room.Item(name, prompt, entry, program, cost, TEXTS["slow"], 4.0)


def test_no_task_of_humaneval_is_left_in_training_data():
    from assay.workloads.programs.task import humaneval

    tasks = humaneval()
    evaluation = {task.id: (task.prompt, task.entry_point) for task in tasks}
    by_prompt = [item(f"p{n}", f"Write this.\n{task.prompt}", f"other_{n}") for n, task in enumerate(tasks)]
    by_name = [item(f"n{n}", f"Task {n}.", task.entry_point) for n, task in enumerate(tasks)]
    ours = item("ours", "Tell whether a train that leaves at noon meets the one from Bristol before it rains.", "meets")
    found = room.apart_from([*by_prompt, *by_name, ours], evaluation)
    assert [one.id for one in found.items] == ["ours"]
    assert len(found.left_out) == 2 * len(tasks)
    assert found.left_out["n0"] == "its entry point is that of HumanEval/0"
    assert found.left_out["p0"] == "its prompt is like that of HumanEval/0"


def test_similarity_is_symmetric_and_of_the_shorter_text():
    one, other = (
        "Sum the squares of all odd numbers.",
        "Given a list, sum the squares of all odd numbers in it, please.",
    )
    assert room.similarity(one, other) == room.similarity(other, one) == 1
    assert room.similarity(one, "") == room.similarity("", "") == 0
    assert room.similarity("sum", "the sum of it") == room.similarity("the sum", "the sum of it") == 1
    assert room.similarity("sum the", "the sum of it") == 0
    assert room.similarity(one, one.upper()) == 1
    with pytest.raises(ValueError, match="evaluation"):
        room.apart_from([], {})
    with pytest.raises(ValueError, match="alike"):
        room.apart_from([], {"a": ("x", "y")}, alike=0.0)


def test_chat_lines_hold_what_was_asked_and_the_program_in_a_block(tmp_path):
    path = tmp_path / "train.jsonl"
    room.write_chat(path, [item(), item("b", program="def f(n):\n    return 'é'\n")])
    lines = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]
    assert lines == [room.chat(item())["messages"], lines[1]]
    assert [one["role"] for one in lines[1]] == ["user", "assistant"]
    assert lines[1][0]["content"].startswith("Add one to a number")
    assert lines[1][1]["content"] == "```python\ndef f(n):\n    return 'é'\n```"
    assert room.extracted(lines[0][1]["content"], "f").program == TEXTS["fast"] + "\n"


@pytest.mark.slow  # it imports transformers
def test_chat_lines_are_read_by_a_tokenizer_as_its_trainer_would():
    from tests.tiny import tiny_tokenizer

    text = tiny_tokenizer().apply_chat_template(room.chat(item())["messages"], tokenize=False)
    assert text.startswith("<|im_start|>user\nAdd one to a number")
    assert text.endswith(f"<|im_start|>assistant\n```python\n{TEXTS['fast']}\n```<|im_end|>\n")


def test_what_is_no_data_is_not_written(tmp_path):
    for wrong in ([], [item(cost=math.inf)], [item(cost=5.0)]):
        with pytest.raises(ValueError, match="items"):
            room.write_chat(tmp_path / "x.jsonl", wrong)
    assert not (tmp_path / "x.jsonl").exists()


def test_the_papers_settings():
    assert (room.TRAINING["learning_rate"], room.TRAINING["num_train_epochs"], room.TRAINING["max_length"]) == (
        5e-6,
        4,
        2048,
    )
    assert (room.ROUNDS, loop.ROUNDS, data.ALIKE, profiling.INTERVAL) == (5, 5, 0.5, 0.1)

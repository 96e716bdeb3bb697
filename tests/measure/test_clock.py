"""Paired timing: the order of runs, what is recorded, and that equal things are seldom called different."""

from __future__ import annotations

import collections
import time

import numpy as np
import pytest

from assay.measure import clock
from assay.measure.clock import (
    MOST_WARMUP,
    NOISY_SHARE,
    OthersWatch,
    Timings,
    binomial_bound,
    compare,
    compare_many,
    round_order,
    self_test,
)
from assay.measure.stats import paired_ratio


def simulated(sets: int, runs: int, kind: str, seed: int = 0) -> np.ndarray:
    """(sets, runs) times of one and the same thing, under a kind of noise."""
    random = np.random.default_rng(seed)
    steps = np.arange(runs)
    if kind == "normal":
        return 1 + 0.05 * np.clip(random.standard_normal((sets, runs)), -6, 6)
    if kind == "heavy tails":
        return 1 + 0.01 * np.abs(random.standard_cauchy((sets, runs)))
    if kind == "bursts":
        return 1 + 0.001 * random.random((sets, runs)) + (random.random((sets, runs)) < 0.2) * 0.5
    if kind == "warming up":
        return np.exp(-0.02 * steps) * random.lognormal(0, 0.01, (sets, runs))
    if kind == "wandering":
        return np.exp(np.cumsum(0.02 * random.standard_normal((sets, runs)), axis=1))
    if kind == "first is slower":
        return np.where(steps % 2 == 0, 1.1, 1.0) * random.lognormal(0, 0.01, (sets, runs))
    if kind == "every fourth":
        phase = random.integers(0, 4, (sets, 1))
        return np.where((steps + phase) % 4 == 0, 1.3, 1.0) * random.lognormal(0, 0.01, (sets, runs))
    raise AssertionError(kind)


NOISES = ["normal", "heavy tails", "bursts", "warming up", "wandering", "first is slower", "every fourth"]


@pytest.mark.parametrize("pairs", [6, 10, 15])
@pytest.mark.parametrize("kind", NOISES)
def test_equal_things_are_called_different_at_most_one_time_in_twenty(kind, pairs):
    sets = 1000
    times = simulated(sets, 2 * pairs, kind)
    first = [round_order(["a", "b"], r)[0] == "a" for r in range(pairs)]
    a = np.where(first, times[:, 0::2], times[:, 1::2])
    b = np.where(first, times[:, 1::2], times[:, 0::2])
    calls = sum(not paired_ratio(a[i], b[i]).contains(1.0) for i in range(sets))
    assert calls <= binomial_bound(sets, 0.05, 0.999)


@pytest.mark.parametrize("kind", ["normal", "heavy tails", "wandering"])
def test_few_pairs_do_not_cry_wolf_either(kind):
    for pairs in (2, 3, 5):
        times = simulated(1000, 2 * pairs, kind, seed=pairs)
        calls = sum(not paired_ratio(t[0::2], t[1::2]).contains(1.0) for t in times)
        assert calls <= binomial_bound(1000, 0.05, 0.999)


@pytest.mark.parametrize(("pairs", "least"), [(10, 170), (15, 195)])
def test_a_real_difference_is_called(pairs, least):
    """Not always at ten pairs, where some sets look as if their noise lasted and get a wider interval for it."""
    times = simulated(200, 2 * pairs, "heavy tails")
    calls = sum(not paired_ratio(1.2 * t[0::2], t[1::2]).contains(1.0) for t in times)
    assert calls > least


def test_order_is_a_b_b_a_and_then_its_mirror():
    order = "".join("".join(round_order(["A", "B"], r)) for r in range(4))
    assert order == "ABBABAAB"


@pytest.mark.parametrize("count", [2, 3, 4])
def test_places_are_balanced(count):
    labels = list("abcd")[:count]
    orders = [round_order(labels, r) for r in range(2 * count)]
    for place in range(count):
        assert set(collections.Counter(o[place] for o in orders).values()) == {2}
    for one in labels:
        for other in set(labels) - {one}:
            before = sum(o.index(one) < o.index(other) for o in orders)
            assert before == count


def test_runs_happen_in_the_order_that_is_recorded():
    seen: list[str] = []
    found = compare_many({k: (lambda k=k: seen.append(k)) for k in ("x", "y", "z")}, rounds=6, warmup=2)
    before = len(seen) - 3 * 6
    assert seen[:before] == ["x", "y", "z"] * (before // 3)
    assert found.warmup == dict.fromkeys("xyz", before // 3)
    assert 3 <= before // 3 <= MOST_WARMUP
    assert seen[before:] == [label for order in found.orders for label in order]
    assert {len(v) for v in found.seconds.values()} == {6}


def test_times_and_ratio_of_sleeps():
    found = compare(lambda: time.sleep(0.02), lambda: time.sleep(0.005), pairs=6)
    assert len(found.baseline) == len(found.candidate) == 6
    assert found.baseline_time.median >= 0.02
    assert found.speedup.median == pytest.approx(
        float(np.exp(np.median(np.log(np.array(found.baseline) / found.candidate))))
    )
    assert found.cpu_baseline < found.baseline_time.median  # a sleeper uses no processor


def test_processor_time_counts_all_threads():
    import torch

    x = torch.randn(1500, 1500)
    found = compare(lambda: x @ x, lambda: None, pairs=2)
    assert found.cpu_baseline > 10 * found.cpu_candidate


def test_time_limit_stops_after_two_rounds_at_the_earliest():
    found = compare(lambda: time.sleep(0.02), lambda: None, pairs=1000, max_seconds=0.001)
    assert len(found.baseline) == 2
    found = compare(lambda: time.sleep(0.01), lambda: None, pairs=1000, max_seconds=0.1)
    assert 2 <= len(found.baseline) < 100


def test_garbage_collector_is_off_during_a_run_and_on_after_it():
    import gc

    inside = []
    compare(lambda: inside.append(gc.isenabled()), lambda: None, pairs=2, warmup=0)
    assert inside == [False, False]
    assert gc.isenabled()

    def fails():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        compare(fails, fails, warmup=0)
    assert gc.isenabled()


class Arm:
    """Takes the times it is told to, without taking any: `slow` runs are added to the noise of a run in this order."""

    def __init__(self, random, slow=(), noise=0.02):
        self.random, self.slow, self.noise, self.runs = random, slow, noise, 0

    def __call__(self) -> float:
        more = self.slow[self.runs] if self.runs < len(self.slow) else 0.0
        self.runs += 1
        return (1 + more) * self.random.lognormal(0, self.noise)


@pytest.fixture
def told(monkeypatch):
    """The clock believes what each callable returns."""
    monkeypatch.setattr(clock, "time_once", lambda function: (function(), 1e-9))


SLOW_STARTS = {
    "none": (),
    "three": (0.3, 0.3, 0.3),
    "five": (0.3,) * 5,
    "three decaying": (0.3, 0.2, 0.1),
    "five decaying": (0.3, 0.24, 0.18, 0.12, 0.06),
    "exponential": tuple(0.3 * np.exp(-np.arange(20) / 2)),
}


@pytest.mark.parametrize("pairs", [6, 10])
@pytest.mark.parametrize("start", SLOW_STARTS)
def test_an_arm_that_starts_slowly_is_not_called_different(told, start, pairs):
    """With one warm-up run, five slow ones make a difference of 11 % of the equal pairs of arms at ten pairs, of 25 % at six."""
    random, sets = np.random.default_rng(11), 400
    found = [compare(Arm(random, SLOW_STARTS[start]), Arm(random), pairs=pairs) for _ in range(sets)]
    assert sum(one.differs for one in found) <= binomial_bound(sets, 0.05, 0.999)
    turns = np.mean([one.warmup["baseline"] for one in found])
    assert turns < (8 if start in ("none", "three", "five") else 12)


@pytest.mark.parametrize("arm", ["baseline", "candidate"])
def test_warming_up_ends_two_turns_after_the_last_gain(told, arm):
    random = np.random.default_rng(0)
    arms = {
        name: Arm(random, (5, 4, 3, 2, 1, 0) if name == arm else (), noise=0.0) for name in ("baseline", "candidate")
    }
    found = compare(**arms, pairs=2)
    assert found.warmup == {"baseline": 8, "candidate": 8}
    assert arms["baseline"].runs == arms["candidate"].runs == 10
    assert compare(Arm(random, noise=0.0), Arm(random, noise=0.0), pairs=2).warmup["baseline"] == 3


def test_warming_up_ends_at_its_limits(told, monkeypatch):
    endless = [Arm(np.random.default_rng(0), tuple(range(1000, 0, -1)), noise=0.0) for _ in range(2)]
    assert compare(*endless, pairs=2).warmup["candidate"] == MOST_WARMUP
    assert compare(*endless, pairs=2, warmup=MOST_WARMUP + 5).warmup["candidate"] == MOST_WARMUP + 5
    assert compare(*endless, pairs=2, warmup=7, max_seconds=1e-9).warmup["candidate"] == 7
    assert compare(*endless, pairs=2, warmup=0).warmup == {"baseline": 0, "candidate": 0}
    seconds = iter(range(10**6))
    monkeypatch.setattr(clock.time, "perf_counter", lambda: float(next(seconds)))
    # a quarter of 20 seconds; each look at the clock, the first of which is at the start, finds another second gone
    assert compare(*endless, pairs=2, max_seconds=20).warmup["candidate"] == 3 + 5


def test_a_trend_within_the_rounds_is_said(told):
    random = np.random.default_rng(2)
    falling = Arm(random, tuple(np.linspace(3.0, 0.0, 100)))
    found = compare_many({"a": falling, "b": Arm(random), "c": Arm(random)}, rounds=12)
    assert found.trend
    assert found.paired("a", "b").trend
    assert not found.paired("b", "c").trend
    assert not Timings({"a": [1.0]}, {}, 0.0, 0.0, 0.0, False).trend
    calls = sum(compare(Arm(random), Arm(random), pairs=12).trend for _ in range(400))
    assert calls <= binomial_bound(400, 0.013, 0.999)


def test_noise_that_lasts_from_round_to_round_is_noisy(told, monkeypatch):
    monkeypatch.setattr(OthersWatch, "stop", lambda self: (0.0, False))
    random = np.random.default_rng(3)

    def wandering(rho: float) -> tuple[float, ...]:
        state = [0.0]
        for _ in range(60):
            state.append(rho * state[-1] + random.standard_normal())
        return tuple(0.02 * value for value in state[1:])

    def noisy(rho: float, rounds: int) -> float:
        def once() -> bool:
            return compare_many(
                {"a": Arm(random, wandering(rho), 0.0), "b": Arm(random, (), 1e-4)}, rounds=rounds
            ).noisy

        return float(np.mean([once() for _ in range(100)]))

    assert noisy(0.95, 40) > 0.8
    assert noisy(0.0, 20) < 0.05
    assert noisy(0.95, 19) == 0


@pytest.mark.parametrize("cores", [1, 2, 64, None])
def test_noise_is_measured_against_all_cores(monkeypatch, cores):
    """A tenth of what they could do in ten seconds, and two ticks of the kernel's clock a core."""
    count = cores or 1  # None: the system does not say
    limit = 10 * count * NOISY_SHARE + 0.02 * count
    monkeypatch.setattr(clock.psutil, "cpu_count", lambda: cores)
    for busy, noisy in ((0.999 * limit, False), (1.001 * limit, True)):
        moments = iter([(0.0, 0.0, 0.0), (10.0, busy, 0.0)])
        monkeypatch.setattr(OthersWatch, "_now", staticmethod(lambda moments=moments: next(moments)))
        share, found = OthersWatch().stop()
        assert found is noisy
        assert share == pytest.approx(busy / (10 * count))
    moments = iter([(0.0, 0.0, 0.0), (10.0, 1e6, 0.0)])
    monkeypatch.setattr(OthersWatch, "_now", staticmethod(lambda: next(moments)))
    assert OthersWatch().stop() == (1.0, True)


@pytest.mark.parametrize(
    ("busy", "own", "noisy"), [(0.0, 0.0, False), (10.0, 10.0, False), (10.0, 2.0, True), (0.5, 0.0, False)]
)
def test_noise_is_the_processor_time_of_others(monkeypatch, busy, own, noisy):
    """Ten seconds on two cores; more than two core-seconds of others are noise."""
    moments = iter([(100.0, 50.0, 5.0), (110.0, 50.0 + busy, 5.0 + own)])
    monkeypatch.setattr(OthersWatch, "_now", staticmethod(lambda: next(moments)))
    monkeypatch.setattr(clock.psutil, "cpu_count", lambda: 2)
    share, found = OthersWatch().stop()
    assert found is noisy
    assert share == pytest.approx(max(busy - own, 0) / 20)


def test_self_test_compares_a_thing_with_itself():
    runs = []
    found = self_test(sets=3, pairs=6, work=lambda: runs.append(time.sleep(0.0005)))
    assert 3 * 2 * (6 + 3) <= len(runs) <= 3 * 2 * (6 + MOST_WARMUP)
    assert found["sets"] == 3
    assert found["allowed"] == binomial_bound(3, 0.05, 0.99) == 1
    assert found["passed"] == (found["differences"] <= 1)


def test_self_test_fails_on_a_clock_that_favours_one_side(monkeypatch):
    def biased(labels, round_number):
        return tuple(labels)

    calls = iter(range(10**6))
    monkeypatch.setattr(clock, "round_order", biased)
    monkeypatch.setattr(clock, "time_once", lambda f: (1.0 + 0.5 * (next(calls) % 2), 1.0))
    found = self_test(sets=20, pairs=10, work=lambda: None)
    assert (found["differences"], found["passed"]) == (20, False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pairs": 1}, "pairs"),
        ({"pairs": 2.5}, "pairs"),
        ({"warmup": -1}, "warmup"),
        ({"warmup": True}, "warmup"),
        ({"max_seconds": 0}, "max_seconds"),
        ({"max_seconds": float("nan")}, "max_seconds"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        compare(lambda: None, lambda: None, **arguments)
    with pytest.raises(ValueError, match="sets"):
        self_test(sets=0)
    with pytest.raises(ValueError, match="functions"):
        compare_many({})

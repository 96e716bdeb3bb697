"""Tuning by measurement: the space, what a search promises, what failures teach, the report, and a real engine."""

from __future__ import annotations

import json
import math
import random
import statistics

import numpy as np
import pytest
import torch
import yaml
from tests.tiny import tiny_model

from assay.methods.core.generation.loop import settings
from assay.methods.serving.inference_hyperparameters import (
    Categorical,
    Constraint,
    Float,
    HuggingFaceEngine,
    InferenceTuner,
    Int,
    IsolatedEngine,
    Outcome,
    Space,
    Trial,
    divides,
    engine_settings,
    fits_memory,
    hugging_face_space,
    infilling_problems,
    key_of,
    landscape,
    local_maxima,
    mean_of,
    measure_settings,
    memory_floor,
    mismatch_rate,
    relative_noise,
    search,
    serving_engine_space,
    transfer_matrix,
    transform,
    workload_invariance,
)
from assay.methods.transform import Transform, TuneContext


def space():
    """The settings of text generation on a CPU."""
    return Space(
        [
            Int("batch_size", 1, 64, default=1, log=True, more_memory=True, grid=(1, 2, 4, 8, 16, 24, 32, 48, 64)),
            Categorical("sort_by_length", (False, True), default=False),
            Categorical("dtype", ("float32", "bfloat16"), default="float32"),
            Categorical("attn_implementation", ("eager", "sdpa"), default="sdpa"),
            Categorical("threads", (1, 2), default=2),
        ]
    )


def throughput(params):
    """A landscape with a known optimum, dips at unlucky batch sizes, and a region that runs out of memory."""
    b = params["batch_size"]
    if b * (2 if params["dtype"] == "float32" else 1) > 56:
        raise MemoryError("does not fit")
    value = 40 * b**0.7 / (1 + (b / 50) ** 2)
    value *= 1.2 if params["sort_by_length"] else 1
    value *= 1.3 if params["dtype"] == "bfloat16" else 1
    value *= 1.15 if params["attn_implementation"] == "sdpa" else 1
    value *= 1.5 if params["threads"] == 2 else 1
    return value * (0.9 if b % 8 == 1 else 1)


BEST = {"sort_by_length": True, "dtype": "bfloat16", "attn_implementation": "sdpa", "threads": 2}
OPTIMUM = max(throughput({"batch_size": b, **BEST}) for b in range(1, 57))


def objective(params, *, fidelity=1.0, seed=0):
    return throughput(params)


class Noisy:
    """The same with multiplicative noise, and a record of what was asked."""

    def __init__(self, sigma=0.05):
        self.sigma, self.asked = sigma, []

    def __call__(self, params, *, fidelity, seed):
        self.asked.append((dict(params), fidelity, seed))
        return Outcome(throughput(params) * random.Random(seed).gauss(1, self.sigma), {"p95_seconds": 1.0})


# The space


def test_the_grid_is_exactly_the_product_with_conditions_applied():
    conditional = Space(
        [
            Int("a", 1, 3, default=1),
            Categorical("on", (False, True), default=False),
            Float("share", 0.0, 1.0, default=0.5, when={"on": (True,)}),
        ]
    )
    points = list(conditional.grid(levels=5))
    assert len(points) == 3 * (1 + 5)
    assert len({key_of(point) for point in points}) == len(points)
    assert all(("share" in point) == point["on"] for point in points)
    assert {point.get("share") for point in points} == {None, 0.0, 0.25, 0.5, 0.75, 1.0}
    rng = random.Random(0)
    for _ in range(100):
        conditional.check(conditional.sample(rng))
    assert Int("n", 1, 64, default=1, log=True).values(4) == [1, 4, 16, 64]
    assert Int("n", 1, 64, default=1).values(4) == [1, 22, 43, 64]
    draws = [Int("n", 1, 1024, default=1, log=True).sample(rng) for _ in range(4000)]
    assert 0.4 < sum(draw <= 32 for draw in draws) / 4000 < 0.6  # half of the logarithms
    assert {1, 1024} <= {*draws, 1024}
    assert max(draws) <= 1024


def test_neighbours_differ_in_one_parameter_and_stay_inside():
    hugging = hugging_face_space(max_batch=64, threads=(1, 2))
    rng = random.Random(1)
    for _ in range(50):
        params = hugging.sample(rng)
        for near in hugging.neighbours(params):
            hugging.check(near)
            changed = [name for name in near if near[name] != params.get(name, near[name])]
            assert len(changed) <= 1
            assert near != params
    for parameter in (Float("x", 0.1, 7.3, default=0.1, log=True), Float("x", 0.1, 7.3, default=0.1)):
        assert all(parameter.holds(value) for start in (0.1, 1.0, 7.3) for value in parameter.near(start))


def test_a_space_comes_from_a_yaml_file():
    text = """
    batch_size: {type: int, low: 1, high: 64, log: true, default: 1, more_memory: true}
    sort_by_length: {type: categorical, choices: [false, true], default: false, when: {batch_size: [8, 16]}}
    share: {type: float, low: 0.1, high: 0.9, default: 0.5}
    """
    described = Space.from_dict(yaml.safe_load(text))
    assert described.default() == {"batch_size": 1, "share": 0.5}
    assert described.check({"batch_size": 8, "sort_by_length": True, "share": 0.2})
    with pytest.raises(ValueError, match="type of 'x'"):
        Space.from_dict({"x": {"type": "string"}})
    with pytest.raises(ValueError, match="'x'"):
        Space.from_dict({"x": {"type": "int", "low": 1, "default": 1}})


def test_spaces_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="twice"):
        Space([Int("a", 1, 2, default=1), Int("a", 1, 2, default=1)])
    with pytest.raises(ValueError, match="depends on"):
        Space([Int("a", 1, 2, default=1, when={"b": (1,)}), Int("b", 1, 2, default=1)])
    with pytest.raises(ValueError, match="does not allow 5"):
        Space([Int("a", 1, 2, default=5)])
    with pytest.raises(ValueError, match="does not allow 7"):
        Space([Int("a", 1, 4, default=1, grid=(2, 7))])
    with pytest.raises(ValueError, match="low"):
        Space([Float("a", 0.0, 2.0, default=1.0, log=True)])
    with pytest.raises(ValueError, match="choice"):
        Space([Categorical("a", (), default=None)])
    with pytest.raises(ValueError, match="default setting"):
        Space([Int("a", 1, 2, default=1)], [Constraint("a must be 2", lambda params: params["a"] == 2)])
    for params, match in [
        ({"batch_size": 3}, "must hold"),
        ({**space().default(), "batch_size": 65}, "batch_size"),
        ({**space().default(), "batch_size": True}, "batch_size"),
    ]:
        with pytest.raises(ValueError, match=match):
            space().check(params)


def test_engine_spaces_hold_their_constraints():
    serving = serving_engine_space(attention_heads=12, devices=8)
    assert serving.default()["tensor_parallel_size"] == 1
    assert not serving.infeasible({**serving.default(), "tensor_parallel_size": 4})
    assert "divide 12" in serving.infeasible({**serving.default(), "tensor_parallel_size": 8})
    assert "max_num_seqs" in serving.infeasible(
        {**serving.default(), "max_num_seqs": 500, "max_num_batched_tokens": 256}
    )
    assert divides("n", 9).holds({"n": 3})
    assert not divides("n", 9).holds({"n": 2})
    assert "sort_by_length" not in hugging_face_space().default()  # there is nothing to sort at batch 1


# What a search promises


@pytest.mark.parametrize("method", ["tpe", "random", "grid", "halving"])
@pytest.mark.parametrize("seed", [0, 1])
def test_nothing_evaluated_is_better_than_what_is_returned(method, seed):
    noisy = Noisy()
    result = search(space(), noisy, method=method, trials=20, seed=seed)
    values, final = {}, {}
    for trial in result.trials:
        if trial.status == "ok" and trial.fidelity == 1:
            (final if trial.final else values).setdefault(key_of(trial.params), []).append(trial.value)
    means = {key: statistics.mean(found) for key, found in values.items()}
    assert means[key_of(result.best_params)] == max(means.values())
    assert result.trials[0].params == space().default() == result.default_params
    assert (
        len(values[key_of(result.best_params)]) >= 3
    )  # the winner and the default were measured again before the choice
    assert len(values[key_of(space().default())]) >= 3
    assert set(final) == {key_of(result.best_params), key_of(space().default())}  # and after it
    assert {len(found) for found in final.values()} == {3}
    assert result.best.mean == pytest.approx(statistics.mean(final[key_of(result.best_params)]))
    assert result.best.low < result.best.mean < result.best.high
    seeds = [seed for _, _, seed in noisy.asked]
    assert len(set(seeds)) == len(seeds)  # fresh ones


def test_the_interval_of_the_gain_holds_the_truth_where_all_settings_are_equal():
    """Best of many by luck alone: the measurements it was chosen by would promise a gain that is not there."""
    flat = Space([Int("batch_size", 1, 20, default=1)])
    runs, holds, flattered = 100, 0, 0
    for seed in range(runs):
        noise = random.Random(seed)
        result = search(
            flat,
            lambda params, noise=noise, **_: 100.0 * math.exp(0.05 * noise.gauss(0, 1)),
            method="random", trials=20, seed=seed, confirm=3,
        )  # fmt: skip
        holds += result.gain.contains(1.0)
        chosen = [t.value for t in result.trials if t.params == result.best_params and not t.final]
        default = [t.value for t in result.trials if t.params == result.default_params and not t.final]
        flattered += statistics.mean(chosen) > statistics.mean(default)
    assert holds >= 93
    assert flattered > 80


def test_a_real_gain_is_found_with_its_interval():
    noise = random.Random(0)
    flat = Space([Int("batch_size", 1, 4, default=1)])
    result = search(
        flat,
        lambda params, **_: (2.0 if params["batch_size"] == 3 else 1.0) * math.exp(0.01 * noise.gauss(0, 1)),
        method="grid",
        confirm=6,
    )
    assert result.best_params == {"batch_size": 3}
    assert result.gain.low > 1.5
    assert result.gain.median == pytest.approx(2.0, rel=0.03)
    assert result.gain_percent == pytest.approx(100 * (result.gain.median - 1))


def test_what_fails_when_it_is_measured_again_is_not_chosen():
    calls = []

    def moody(params, **_):
        calls.append(params["batch_size"])
        if params["batch_size"] == 3 and calls.count(3) > 2:
            raise RuntimeError("not again")
        return float(params["batch_size"])

    result = search(Space([Int("batch_size", 1, 3, default=1)]), moody, method="grid", confirm=2)
    assert result.best_params == {"batch_size": 2}
    assert result.best.mean == 2.0
    assert result.best.n == result.default.n == 2


def test_the_default_wins_where_it_is_best():
    result = search(space(), lambda params, **_: -abs(params["batch_size"] - 1), method="random", trials=10)
    assert result.best_params["batch_size"] == 1
    assert result.best.mean == 0
    only = Space([Int("a", 1, 3, default=2)])
    best = search(only, lambda params, **_: 5.0 - (params["a"] != 2), method="grid")
    assert best.best_params == best.default_params
    assert best.gain_percent == 0
    assert best.break_even_tokens == math.inf


@pytest.mark.parametrize("method", ["tpe", "random", "grid", "halving"])
def test_the_same_seed_gives_the_same_trials(method):
    def sequence(seed):
        result = search(space(), objective, method=method, trials=15, seed=seed, confirm=1)
        return [(trial.params, trial.status, trial.value, trial.fidelity) for trial in result.trials]

    assert sequence(3) == sequence(3)
    assert sequence(3) != sequence(4)


def test_a_grid_search_covers_the_product_less_what_is_infeasible():
    limited = Space(
        space().parameters, [Constraint("odd one out", lambda p: (p["batch_size"], p["threads"]) != (8, 1))]
    )
    result = search(limited, objective, method="grid", trials=1, confirm=1)
    grid = {key_of(params) for params in limited.grid()}
    seen = [key_of(trial.params) for trial in result.trials if not trial.final]
    assert sorted(seen) == sorted(grid)  # each once, the default included
    by_status = {}
    for trial in result.trials:
        by_status.setdefault(trial.status, []).append(trial.params)
    infeasible = [p for p in by_status["skipped"] if (p["batch_size"], p["threads"]) == (8, 1)]
    assert len(infeasible) == 8
    assert {key_of(p) for p in by_status["ok"]} == {
        key_of(p)
        for p in limited.grid()
        if (p["batch_size"], p["threads"]) != (8, 1) and p["batch_size"] * (2 if p["dtype"] == "float32" else 1) <= 56
    }


def test_tpe_finds_the_optimum_in_nine_of_ten_seeds_where_random_search_does_not():
    pytest.importorskip("optuna")
    seeds = 30

    def share(method):
        found = [
            search(space(), objective, method=method, trials=30, seed=seed, confirm=1).best.mean
            for seed in range(seeds)
        ]
        return sum(value >= 0.95 * OPTIMUM for value in found) / seeds

    assert share("tpe") >= 0.9
    assert share("random") < 0.6


def test_halving_spends_the_workload_on_the_promising():
    noisy = Noisy(0.01)
    result = search(space(), noisy, method="halving", trials=27, seed=0, confirm=1)
    counts = {}
    for _, fidelity, _ in noisy.asked:
        counts[round(1 / fidelity)] = counts.get(round(1 / fidelity), 0) + 1
    assert counts[27] == 27
    assert counts[27] > counts[9] > counts[3] > 1
    full = sum(fidelity for _, fidelity, _ in noisy.asked)
    assert full < 10  # 27 settings for less than 10 whole workloads
    everything = [throughput(trial.params) for trial in result.trials if trial.status == "ok"]
    assert throughput(result.best_params) >= sorted(everything)[-3]


# What failures teach


def test_what_ran_out_of_memory_is_remembered():
    asked = []

    def measured(params, *, fidelity, seed):
        asked.append(params)
        return throughput(params)

    result = search(space(), measured, method="grid", confirm=1, seed=2)
    failed = [trial for trial in result.trials if trial.status == "out of memory"]
    skipped = [trial for trial in result.trials if trial.status == "skipped"]
    assert failed
    assert skipped
    assert "does not fit" in failed[0].error
    for (
        trial
    ) in skipped:  # only what truly does not fit was skipped: the rule is safe where memory grows with the batch
        with pytest.raises(MemoryError):
            throughput(trial.params)
    assert len(asked) == sum(trial.status != "skipped" for trial in result.trials)


def test_failures_of_other_kinds_end_the_trial_only():
    def fragile(params, *, fidelity, seed):
        if params["batch_size"] % 2:
            raise RuntimeError("odd\nbatch")
        return math.nan if params["batch_size"] == 4 else float(params["batch_size"])

    small = Space([Int("batch_size", 1, 6, default=1, more_memory=True)])
    result = search(small, fragile, method="grid", levels=6, confirm=2)
    statuses = {trial.params["batch_size"]: trial for trial in result.trials}
    assert result.best_params == {"batch_size": 6}
    assert {n: statuses[n].status for n in statuses} == {
        1: "failed", 2: "ok", 3: "failed", 4: "failed", 5: "failed", 6: "ok",
    }  # fmt: skip
    assert statuses[3].error == "RuntimeError: odd"
    assert result.default is None
    assert result.gain_percent == math.inf
    assert result.break_even_tokens == 0
    with pytest.raises(RuntimeError, match="no setting was accepted: MemoryError"):
        search(small, lambda params, **_: (_ for _ in ()).throw(MemoryError("no")), method="grid")
    torch_text = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ...")
    fails = search(small, lambda params, **_: 1.0 if params["batch_size"] < 3 else _raise(torch_text), method="grid")
    assert "out of memory" in {trial.status for trial in fails.trials}


def _raise(error):
    raise error


def test_limits_and_the_quality_guard_reject():
    def latency(params, *, fidelity, seed):
        b = params["batch_size"]
        return Outcome(10.0 * b, {"p95_seconds": 0.1 * b, "mismatch_rate": 0.25 if b in (3, 6) else 0.0})

    small = Space([Int("batch_size", 1, 8, default=1)])
    unlimited = search(small, latency, method="grid", levels=8)
    assert unlimited.best_params == {"batch_size": 8}
    limited = search(small, latency, method="grid", levels=8, limits={"p95_seconds": 0.65})
    assert limited.best_params == {"batch_size": 5}  # 6 is fast enough but its outputs differ
    tolerant = search(small, latency, method="grid", levels=8, limits={"p95_seconds": 0.65}, max_mismatch=0.3)
    assert tolerant.best_params == {"batch_size": 6}
    rejected = [trial for trial in limited.trials if trial.status == "rejected"]
    assert {trial.params["batch_size"] for trial in rejected} == {3, 6, 7, 8}
    assert all(trial.value for trial in rejected)
    with pytest.raises(ValueError, match="p99"):
        search(small, latency, limits={"p99": 1.0})


def test_search_arguments_are_refused_by_name():
    for bad in ({"trials": 0}, {"confirm": 0}, {"levels": 1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            search(space(), objective, **bad)
    with pytest.raises(ValueError, match="method"):
        search(space(), objective, method="guess")


# Cost, and going on


def test_the_cost_of_searching_is_counted():
    result = search(space(), objective, method="random", trials=5)
    assert result.search_seconds == pytest.approx(sum(trial.seconds for trial in result.trials))
    tokens = result.break_even_tokens
    saved = tokens / result.default.mean - tokens / result.best.mean
    assert saved == pytest.approx(result.search_seconds)


def test_a_killed_search_goes_on_from_its_journal(tmp_path):
    class Killed(BaseException):
        pass

    class Dying(Noisy):
        def __call__(self, params, **rest):
            if len(self.asked) == 7:
                raise Killed
            return super().__call__(params, **rest)

    path = tmp_path / "journal.jsonl"
    whole = search(space(), Noisy(), method="tpe", trials=15, seed=5)
    with pytest.raises(Killed):
        search(space(), Dying(), method="tpe", trials=15, seed=5, journal=path)
    with path.open("a") as file:
        file.write('{"number": 7, "par')  # the power went while this was written
    again = Noisy()
    seen = []
    resumed = search(space(), again, method="tpe", trials=15, seed=5, journal=path, progress=seen.append)
    assert [t.params for t in resumed.trials] == [t.params for t in whole.trials]
    assert resumed.best == whole.best
    assert len(again.asked) == sum(trial.status != "skipped" for trial in whole.trials) - 7
    assert len(seen) == len(resumed.trials)
    assert len(path.read_text().splitlines()) == len(resumed.trials)
    with pytest.raises(ValueError, match="another search"):
        search(Space([Int("batch_size", 1, 4, default=2)]), lambda params, **_: 1.0, journal=path)
    (tmp_path / "other").write_text("no journal\n")
    with pytest.raises(ValueError, match="journal"):
        search(space(), objective, journal=tmp_path / "other")


def test_the_result_is_kept_as_json(tmp_path):
    result = search(space(), objective, method="random", trials=4)
    result.save(tmp_path / "result.json")
    document = json.loads((tmp_path / "result.json").read_text())
    assert document["best_params"] == result.best_params
    assert len(document["trials"]) == len(result.trials)
    assert engine_settings(result.best_params).keys() == {"batch_size", "sort_by_length", "threads"}


@pytest.mark.parametrize("broken", [math.inf, math.nan])
def test_what_is_kept_is_json_that_every_reader_takes(tmp_path, broken):
    def objective(params, **_):
        if params["batch_size"] == 1:
            raise RuntimeError("no default")
        return Outcome(1.0, {"p95_seconds": broken if params["batch_size"] == 3 else 0.1})

    small = Space([Int("batch_size", 1, 3, default=1)])
    result = search(small, objective, method="grid", confirm=1, journal=tmp_path / "journal")
    assert result.gain_percent == math.inf
    result.save(tmp_path / "result.json")

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    document = json.loads((tmp_path / "result.json").read_text(), parse_constant=refuse)
    assert document["gain_percent"] is None
    for line in (tmp_path / "journal").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    equal = search(small, lambda params, **_: 1.0, method="grid", confirm=1)
    equal.save(tmp_path / "equal.json")
    assert json.loads((tmp_path / "equal.json").read_text(), parse_constant=refuse)["break_even_tokens"] is None


def test_the_estimator_follows_scikit_learn():
    tuner = InferenceTuner(space(), method="random", trials=8, seed=1)
    assert tuner.fit(objective) is tuner
    assert tuner.best_params_ == search(space(), objective, method="random", trials=8, seed=1).best_params
    assert tuner.best_value_ == tuner.result_.best
    assert tuner.landscape_.optimum == tuner.best_params_
    copy = InferenceTuner(**tuner.get_params())  # what scikit-learn's clone does
    assert copy.get_params() == tuner.get_params()
    assert not hasattr(copy, "best_params_")
    assert tuner.set_params(trials=3).trials == 3
    with pytest.raises(ValueError, match="colour"):
        tuner.set_params(colour=1)


# The report


def test_the_landscape_of_a_grid():
    found = search(space(), Noisy(0.02), method="grid", max_mismatch=0, seed=1)
    report = landscape(space(), found.trials)
    ran = {key_of(t.params) for t in found.trials if t.status == "ok"}
    assert report.settings == len(ran)
    assert report.optimum == {"batch_size": 32, **BEST}
    assert report.gap_percent == pytest.approx(100 * (report.optimum_value / report.default_value - 1))
    assert report.gap_percent > 0
    assert report.best_to_median > 1
    assert 0.003 < report.noise < 0.06
    assert set(report.axes) == {"batch_size"}
    assert report.axes["batch_size"].lines == 16
    assert report.axes["batch_size"].most_maxima == 1  # the wiggles are noise
    nervous = landscape(space(), found.trials, noise=0.0)
    assert nervous.axes["batch_size"].mean_maxima >= report.axes["batch_size"].mean_maxima
    with pytest.raises(ValueError, match="trials"):
        landscape(space(), [])


def test_local_maxima_count_only_what_noise_does_not_explain():
    assert local_maxima([1, 2, 3]) == 1
    assert local_maxima([3, 2, 1]) == 1
    assert local_maxima([1, 1, 1]) == 1
    assert local_maxima([1, 3, 1, 4, 1]) == 2
    assert local_maxima([3, 1, 3]) == 2
    assert local_maxima([1, 3, 2.9, 4, 1], 0.5) == 1
    assert local_maxima([1, 3, 2.0, 4, 1], 0.5) == 2
    assert local_maxima([1, 3, 2.0, 2.4, 1], 0.5) == 1
    rng = random.Random(0)
    counts = []
    for _ in range(200):  # a plain hill under 3 % noise
        line = [100 - 4 * abs(i - 5) + rng.gauss(0, 2.5) for i in range(11)]
        counts.append((local_maxima(line), local_maxima(line, 1.96 * 2**0.5 * 2.5)))
    assert statistics.mean(plain for plain, _ in counts) > 1.5
    assert statistics.mean(aware for _, aware in counts) < 1.1


def test_noise_is_pooled_over_what_was_repeated():
    rng = random.Random(1)
    groups = [[level * rng.gauss(1, 0.04) for _ in range(4)] for level in (10, 50, 900) for _ in range(30)]
    assert relative_noise(groups) == pytest.approx(0.04, rel=0.15)
    assert relative_noise([[5.0], [7.0]]) == 0


def test_means_have_students_interval():
    mean = mean_of([10.0, 12.0, 11.0])
    assert (mean.mean, mean.n) == (11, 3)
    assert mean.high - mean.mean == pytest.approx(4.303 * 1.0 / 3**0.5, rel=1e-3)
    assert mean_of([3.0]).low is None
    with pytest.raises(ValueError, match="values"):
        mean_of([])


def test_transfer_is_one_to_itself_and_never_above():
    environments = {}
    for name, peak in (("one thread", 8), ("two threads", 24), ("four threads", 48)):
        environments[name] = [
            Trial(i, {"batch_size": b}, "ok", 100 - abs(b - peak)) for i, b in enumerate((1, 8, 24, 48))
        ]
    environments["small"] = [Trial(0, {"batch_size": 1}, "ok", 5.0), Trial(1, {"batch_size": 8}, "out of memory")]
    matrix = transfer_matrix(environments)
    assert all(matrix[name][name] == 1 for name in environments)
    assert matrix["one thread"]["two threads"] == pytest.approx(0.84)
    assert all(value <= 1 for row in matrix.values() for value in row.values() if not math.isnan(value))
    assert matrix["one thread"]["small"] == 0  # it ran out of memory there
    assert math.isnan(matrix["two threads"]["small"])  # nobody tried
    with pytest.raises(ValueError, match="empty"):
        transfer_matrix({"empty": []})


def test_doubling_the_workload_must_not_change_throughput():
    """On a clock of our own: 0.01 s a token, and 0.5 s that a cold start adds to the first run."""

    def engine(warmed_up):
        def measured(params, *, fidelity, seed):
            tokens = 200 * fidelity
            seconds = 0.01 * tokens * random.Random(seed).gauss(1, 0.01) + (0 if warmed_up else 0.5)
            return tokens / seconds

        return measured

    warm = workload_invariance(engine(True), {}, repeats=5)
    assert warm.holds
    assert warm.half.mean == pytest.approx(100, rel=0.05)
    cold = workload_invariance(engine(False), {}, repeats=5)
    assert not cold.holds
    assert cold.half.mean < cold.whole.mean
    with pytest.raises(ValueError, match="repeats"):
        workload_invariance(engine(True), {}, repeats=1)


# The engine


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model(hidden_size=32, intermediate_size=48, eos_token_id=2).save_pretrained(folder)
    return folder


def prompts(n=9):
    rng = random.Random(0)
    return [[rng.randrange(3, 97) for _ in range(rng.randrange(3, 20))] for _ in range(n)]


def test_tokens_are_those_generated_and_outputs_do_not_depend_on_the_setting(tiny):
    engine = HuggingFaceEngine(tiny, prompts(), new_tokens=5)
    threads = torch.get_num_threads()
    reference = engine({"batch_size": 1})
    assert reference.metrics["tokens"] == 9 * 5  # neither prompts nor padding
    assert reference.value == pytest.approx(45 / reference.metrics["seconds"])
    assert 0 < reference.metrics["p50_seconds"] <= reference.metrics["p95_seconds"] <= reference.metrics["seconds"]
    for params in [
        {"batch_size": 4, "sort_by_length": True},
        {"batch_size": 9, "threads": 1, "static_cache": True},
        {"batch_size": 2, "attn_implementation": "eager", "dtype": "float32"},
    ]:
        outcome = engine(params)
        assert outcome.metrics["mismatch_rate"] == 0
        assert outcome.metrics["tokens"] == 45
    assert torch.get_num_threads() == threads
    part = engine({"batch_size": 2}, fidelity=0.34)
    assert part.metrics["tokens"] == 3 * 5
    assert part.metrics["mismatch_rate"] == 0
    assert engine({"batch_size": 5}, fidelity=0.34).metrics["tokens"] == 5 * 5  # one whole batch at least


def test_the_model_is_loaded_once_for_all_settings_that_share_it(tiny, monkeypatch):
    from assay.methods.serving.inference_hyperparameters import engine as module

    loads = []
    load = module.load_for_generation
    monkeypatch.setattr(module, "load_for_generation", lambda *group: loads.append(group[1:]) or load(*group))
    engine = HuggingFaceEngine(tiny, prompts(3), new_tokens=2)
    for params in ({"batch_size": 1}, {"batch_size": 3}, {"batch_size": 2, "threads": 1}):
        engine(params)
    engine({"batch_size": 2, "dtype": "bfloat16"})
    assert loads == [("float32", "sdpa"), ("bfloat16", "sdpa")]


def test_the_guard_compares_with_batch_one_whatever_was_measured_first(tiny):
    engine = HuggingFaceEngine(tiny, prompts(4), new_tokens=3)
    first = engine({"batch_size": 4, "dtype": "bfloat16"})
    again = HuggingFaceEngine(tiny, prompts(4), new_tokens=3)
    again({"batch_size": 1})
    assert first.metrics["mismatch_rate"] == again({"batch_size": 4, "dtype": "bfloat16"}).metrics["mismatch_rate"]
    assert mismatch_rate([[1, 2], [3]], [[1, 2], [4]]) == 0.5
    with pytest.raises(ValueError, match="argument"):
        mismatch_rate([[1]], [[1], [2]])


def test_a_search_over_a_real_engine(tiny):
    found = search(
        hugging_face_space(max_batch=8, threads=(1, 2), dtypes=("float32",)),
        HuggingFaceEngine(tiny, prompts(), new_tokens=3),
        method="random",
        trials=5,
        confirm=2,
    )
    assert found.trials[0].params["batch_size"] == 1
    assert found.best.mean >= found.default.mean
    assert all(trial.metrics["mismatch_rate"] == 0 for trial in found.trials)


@pytest.mark.slow
def test_a_trial_of_its_own_process_survives_running_out_of_memory(tiny):
    engine = IsolatedEngine(tiny, prompts(3), new_tokens=2, timeout_s=120)
    outcome = engine({"batch_size": 1})
    assert outcome.metrics["tokens"] == 6
    assert outcome.metrics["peak_bytes"] > 100 * 2**20
    starved = IsolatedEngine(tiny, prompts(3), new_tokens=2, memory_bytes=120 * 2**20, timeout_s=120)
    with pytest.raises(MemoryError):
        starved({"batch_size": 2})
    with pytest.raises(RuntimeError):
        IsolatedEngine(tiny / "missing", prompts(3), timeout_s=120)({"batch_size": 1})


def test_engine_arguments_are_checked(tiny):
    with pytest.raises(ValueError, match="prompts"):
        HuggingFaceEngine(tiny, [])
    with pytest.raises(ValueError, match="prompts"):
        HuggingFaceEngine(tiny, [[1], []])
    with pytest.raises(ValueError, match="fidelity"):
        HuggingFaceEngine(tiny, [[1]])({}, fidelity=0.0)
    engine = HuggingFaceEngine(tiny, prompts(3), new_tokens=2)
    with pytest.raises(ValueError, match="params must be among .*batch_size.*, got num_beams"):
        engine({"batch_size": 1, "num_beams": 4})
    with pytest.raises(ValueError, match="batch_size must be a whole number at least 1, got 0"):
        engine({"batch_size": 0})
    with pytest.raises(ValueError, match=r"batch_size must lie in 1..3, the number of prompts, got 4"):
        engine({"batch_size": 4})  # would measure batches of 3
    for bad in (2.0, True, "2"):
        with pytest.raises(TypeError, match="batch_size must be a whole number"):
            engine({"batch_size": bad})
        with pytest.raises(TypeError, match="static_cache must be True or False" if bad is not True else "threads"):
            engine({"static_cache": bad} if bad is not True else {"threads": bad})
    with pytest.raises(ValueError, match="threads must be a whole number at least 1, got 0"):
        engine({"batch_size": 1, "threads": 0})


def test_no_static_cache_means_none_also_for_a_model_that_has_one_by_default(tiny):
    from assay.methods.serving.inference_hyperparameters.engine import load_for_generation

    model, seen = load_for_generation(str(tiny), "float32", "sdpa"), []
    model.generation_config.cache_implementation = "static"
    generate = model.generate
    model.generate = lambda **kw: seen.append(kw.get("cache_implementation")) or generate(**kw)
    for params in ({}, {"static_cache": False}, {"static_cache": True}):
        measure_settings(model, prompts(1), params, new_tokens=2, warmup=0)
    assert seen == [None, None, "static"]  # what the model would like by itself takes no part
    assert model.generation_config.cache_implementation == "static"


def test_the_memory_floor_is_conservative_and_close(tiny):
    """Against the bytes a model and its cache really hold, over a sample of settings."""
    from transformers import AutoModelForCausalLM

    gap = []
    for dtype in ("float32", "bfloat16"):
        model = AutoModelForCausalLM.from_pretrained(tiny, dtype=getattr(torch, dtype))
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        parameters = sum(p.numel() for p in model.parameters())
        for batch in (1, 3, 16):
            for tokens in (8, 100):
                ids = torch.ones(batch, tokens, dtype=torch.int64)
                with torch.no_grad():
                    out = model(ids, logits_to_keep=1)
                layers = [t for layer in out.cache.layers for t in (layer.keys, layer.values)]
                held = weights + sum(t.numel() * t.element_size() for t in [*layers, out.logits])
                floor = memory_floor(
                    parameters=parameters,
                    config=model.config,
                    batch_size=batch,
                    tokens=tokens,
                    dtype_bytes=getattr(torch, dtype).itemsize,
                )
                assert floor <= held  # nothing that fits is called infeasible
                gap.append(floor / held)
                rule = fits_memory(held, parameters=parameters, config=model.config, tokens=tokens)
                assert rule.holds({"batch_size": batch, "dtype": dtype})
                rule = fits_memory(int(0.9 * floor), parameters=parameters, config=model.config, tokens=tokens)
                assert not rule.holds({"batch_size": batch, "dtype": dtype})
                assert "MiB" in rule.reason
    assert min(gap) > 0.9  # and little that does not fit slips through


SOURCE = '''
class Shape:
    def area(self):
        """Width times height."""
        width = self.right - self.left
        height = self.bottom - self.top

        return width * height

    def tiny(self): return 1

def total(shapes):
    amount = 0
    for shape in shapes:
        amount += shape.area()
    return amount

def broken(x):
    y = """
not the end
'''


def test_infilling_problems_are_cut_from_functions():
    problems = infilling_problems(SOURCE, 2, seed=1)
    assert len({problem.prompt for problem in problems}) == 2
    for problem in problems:
        assert problem.line
        assert problem.line in SOURCE
        assert problem.line not in problem.prompt
        assert "Width" not in problem.line  # a docstring is no code
        assert problem.prompt.startswith("def ")
        assert "# <missing line>" in problem.prompt
        body = problem.prompt.split("\n\n# The missing line is:")[0]
        assert len(body.splitlines()) >= 4
    assert problems == infilling_problems(SOURCE, 2, seed=1)
    with pytest.raises(ValueError, match="2 functions"):
        infilling_problems(SOURCE, 3)


# The tuner's handle


def test_the_transform_merges_settings_into_the_model(tiny):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny)
    context = TuneContext("throughput", prompt_tokens=64, new_tokens=8, batch_size=32)
    assert isinstance(transform, Transform)
    assert (transform.slot, transform.exact, transform.goals) == ("settings", True, frozenset({"throughput"}))
    assert transform.applies_to(model, context).applies
    assert not transform.applies_to(torch.nn.Linear(2, 2), context).applies
    assert not transform.applies_to(model, TuneContext("throughput", 64, 8, batch_size=1)).applies
    configs = transform.configs(model, context)
    assert 1 <= len(configs) <= 5
    assert len({key_of(config) for config in configs}) == len(configs)
    assert all(config["batch_size"] <= 32 for config in configs)
    model.assay_settings = {"prefill": None}
    assert transform.apply(model, configs[0], context) is model
    assert model.assay_settings == {"prefill": None, **configs[0]}
    assert settings(model)["batch_size"] == 16
    outcome, outputs = measure_settings(model, prompts(16), engine_settings(configs[0]), new_tokens=2)
    assert [len(output) for output in outputs] == [2] * 16
    for bad in ({"colour": 1}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            transform.apply(model, bad, context)


# The experiments


@pytest.mark.slow
@pytest.mark.model
def test_the_experiments_run_at_smoke_scale():
    from assay.experiments.core import experiments_of

    threads = torch.get_num_threads()
    experiments = experiments_of("inference_hyperparameters")
    assert {found.claim.split("/")[1] for found in experiments} == {"retuning-gain", "retuning-gain-downgrade"}
    for found in experiments:
        trial = found.run(**found.points["smoke"][0])
        assert [len(tokens) for tokens in trial.candidate()] == [4] * 4
        assert trial.quality().candidate > 0.5
        assert json.dumps(trial.details)
        matrix = trial.details["transfer"]
        assert all(matrix[name][name] == 1 for name in matrix)
    assert torch.get_num_threads() == threads


LINE = Space([Int("batch_size", 1, 4, default=1)])


@pytest.mark.parametrize(
    "bad", ["fast", None, [1.0], True, 1j, {"value": 1}, Outcome("fast"), Outcome(1.0, {"odd": object()})]
)
def test_a_value_of_a_bad_type_fails_its_trial_and_not_the_search(bad):
    result = search(
        LINE, lambda params, **_: bad if params["batch_size"] == 2 else params["batch_size"], method="grid", confirm=1
    )
    assert result.best_params == {"batch_size": 4}
    (failed,) = [trial for trial in result.trials if trial.status == "failed"]
    assert failed.params == {"batch_size": 2}
    assert failed.error.startswith("TypeError: ")


def test_values_of_every_make_count():
    made = {1: np.float32(1), 2: torch.tensor(2.0), 3: Outcome(np.int64(3), {"p50_seconds": np.float32(0.5)}), 4: 4}
    result = search(LINE, lambda params, **_: made[params["batch_size"]], method="grid", confirm=1)
    assert {trial.params["batch_size"]: trial.value for trial in result.trials} == {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0}
    json.dumps([dict(trial.metrics) for trial in result.trials])


@pytest.mark.parametrize("seconds", [math.nan, math.inf, "slow"])
def test_nan_is_within_no_limit(seconds):
    def objective(params, **_):
        return Outcome(params["batch_size"], {"p95_seconds": 0.1 if params["batch_size"] < 4 else seconds})

    result = search(LINE, objective, method="grid", confirm=1, limits={"p95_seconds": 1.0})
    assert result.best_params == {"batch_size": 3}
    assert [trial.params["batch_size"] for trial in result.trials if trial.status == "rejected"] == [4]


def test_a_limit_nobody_reports_is_told_at_the_first_trial_and_costs_only_the_trial_later():
    with pytest.raises(ValueError, match="limits name 'p95_seconds', which the objective does not report"):
        search(LINE, lambda params, **_: 1.0, method="grid", limits={"p95_seconds": 1.0})
    quiet = search(
        LINE,
        lambda params, **_: Outcome(params["batch_size"], {} if params["batch_size"] == 4 else {"p95_seconds": 0.1}),
        method="grid", confirm=1, limits={"p95_seconds": 1.0},
    )  # fmt: skip
    assert quiet.best_params == {"batch_size": 3}
    assert [trial.error for trial in quiet.trials if trial.status == "rejected"] == ["p95_seconds was not reported"]


# What is of another kind


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"trials": math.nan}, TypeError),  # would compare as neither too few nor enough
        ({"trials": 2.5}, TypeError),
        ({"confirm": True}, TypeError),
        ({"seed": None}, TypeError),
        ({"max_mismatch": math.nan}, ValueError),
        ({"limits": {"p95_seconds": math.nan}}, ValueError),
        ({"method": "x"}, ValueError),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_measured(changes, error):
    name = "limit of p95_seconds" if "limits" in changes else next(iter(changes))
    with pytest.raises(error, match=name):
        search(space(), lambda params, **_: pytest.fail("was measured"), **changes)


def test_numpys_numbers_are_numbers_of_a_space(tmp_path):
    described = Space(
        [
            Int("a", np.int64(1), np.int64(3), np.int64(2), grid=(np.int64(1), np.int64(3))),
            Float("b", 0, 1, np.float32(0.5)),
        ]
    )
    assert key_of(described.default()) == '{"a": 2, "b": 0.5}'
    assert [key_of(params) for params in described.grid(2)][:2] == ['{"a": 1, "b": 0.0}', '{"a": 1, "b": 1.0}']
    assert mean_of(np.array([1.0, 2.0, 3.0])).mean == 2.0


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: Float("x", 0.0, math.inf, 0.5), ValueError),
        (lambda: Float("x", 0.0, 1.0, math.nan), ValueError),
        (lambda: Float("x", True, 2.0, 1.5), TypeError),
        (lambda: Int("x", 1, 5, 2, grid=(True,)), TypeError),
        (lambda: Int("x", 1, 5, 2, log=1), TypeError),
        (lambda: Space([Categorical("x", (1, True), 1)]), ValueError),
        (lambda: Space([Categorical("x", ("a", "a"), "a")]), ValueError),
        (lambda: hugging_face_space(threads=()), ValueError),
    ],
)
def test_parameters_of_another_kind_are_refused(make, error):
    with pytest.raises(error):
        make()


def test_a_memory_floor_is_of_something():
    from types import SimpleNamespace

    config = SimpleNamespace(num_attention_heads=4, hidden_size=64, num_hidden_layers=2, vocab_size=10)
    sizes = {"parameters": 5, "batch_size": 1, "tokens": 1, "dtype_bytes": 2}
    assert memory_floor(config=config, **sizes) == 2 * (5 + 2 * 2 * 64 + 10)
    for name in sizes:
        for bad, error in ((0, ValueError), (-1, ValueError), (math.nan, TypeError)):
            with pytest.raises(error, match=name):
                memory_floor(config=config, **{**sizes, name: bad})
    with pytest.raises(TypeError, match="available_bytes"):
        fits_memory(math.nan, parameters=5, config=config, tokens=5)

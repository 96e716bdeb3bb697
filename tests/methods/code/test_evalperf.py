"""EvalPerf: inputs that grow until something gives up, clusters of right programs, and the place of a sample among them."""

import math
import random
import time
from dataclasses import dataclass

import numpy as np
import pytest

from assay.methods.code import evalperf
from assay.methods.code.evalperf import (
    FILTER_SPLIT,
    NOISE,
    PROTOCOLS,
    REFERENCE_SPLIT,
    Filters,
    ScoringProtocol,
    Stops,
    SynthesiserError,
    choose_input,
    clusters,
    common_tasks,
    curate,
    deep_size,
    from_generator,
    measured_anew,
    percentile,
    place,
    references,
    sample_input,
    sample_inputs,
    score_model,
    score_task,
    suitability,
    timed,
    within_64_bits,
)


def random_costs(seed: int, most: int = 30) -> list[float]:
    """Costs from a thousand to a thousand million, some of them equal or nearly so."""
    chance = random.Random(seed)
    costs = [10 ** chance.uniform(3, 9) for _ in range(chance.randint(1, most))]
    return costs + [cost * chance.choice((1.0, 1.0, 1.05)) for cost in chance.sample(costs, len(costs) // 2)]


def clusters_in_numpy(costs, split, noise):
    """The same rule, written over sorted arrays."""
    x = np.sort(costs)[::-1]
    gaps = (x[:-1] - x[1:]) / x[:-1]
    return [list(part) for part in np.split(x, np.flatnonzero(gaps > split + np.sqrt(noise / x[:-1])) + 1)]


# ------------------------------------------------------------------------------------------------------------------------ clusters


@pytest.mark.parametrize("seed", range(20))
def test_clusters_are_the_rule_over_sorted_costs(seed):
    costs = random_costs(seed)
    for split in (0.0, REFERENCE_SPLIT, FILTER_SPLIT, 0.7):
        found = clusters(costs, split=split)
        assert [[costs[i] for i in members] for members in found] == clusters_in_numpy(costs, split, NOISE)
        assert sorted(i for members in found for i in members) == list(range(len(costs)))


@pytest.mark.parametrize("seed", range(20))
def test_a_higher_threshold_never_adds_clusters(seed):
    costs = random_costs(seed)
    many = [len(clusters(costs, split=split)) for split in np.linspace(0, 1, 21)]
    assert many == sorted(many, reverse=True)
    assert many[0] > many[-1] or len(costs) < 4


@pytest.mark.parametrize("split", [0.0, 0.1, 0.2])
@pytest.mark.parametrize("noise", [0.0, NOISE])
def test_equal_costs_never_part(split, noise):
    found = clusters([5e6, 2e4, 5e6, 2e4, 5e6], split=split, noise=noise)
    assert found[0] == (0, 2, 4)
    assert all(len({[5e6, 2e4][i % 2] for i in members}) == 1 or len(found) == 1 for members in found)
    assert clusters([7.0] * 9, split=split, noise=noise) == [tuple(range(9))]


def test_the_noise_makes_small_costs_harder_to_split():
    parted = [len(clusters([2 * scale, scale])) == 2 for scale in (1e3, 1e4, 1e5, 1e6)]
    assert parted == [False, False, True, True]
    assert all(len(clusters([2 * scale, scale], noise=0.0)) == 2 for scale in (1e3, 1e4, 1e5, 1e6))
    # on the border: a gap of exactly h + sqrt(w / x) does not part
    assert len(clusters([40_000.0, 40_000.0 * 0.25], split=0.25, noise=10_000.0)) == 1
    assert len(clusters([40_000.0, 40_000.0 * 0.25 - 1], split=0.25, noise=10_000.0)) == 2


def test_neighbours_are_compared_not_the_cluster_s_ends():
    assert clusters([1e9 * 0.95**step for step in range(30)]) == [tuple(range(30))]


@pytest.mark.parametrize("seed", range(20))
def test_scores_rise_to_exactly_100_with_one_reference_a_cluster(seed):
    costs = random_costs(seed)
    found = references(costs)
    assert len(found) == len(clusters(costs, split=REFERENCE_SPLIT))
    scores = [one.score for one in found]
    assert all(low < high for low, high in zip([0.0, *scores], scores, strict=False))
    assert scores[-1] == 100.0
    assert all(slower.cost > faster.cost for slower, faster in zip(found, found[1:], strict=False))
    for one in found:
        assert one.cost == max(costs[i] for i in one.members) == costs[one.program]
        no_faster = sum(cost >= min(costs[i] for i in one.members) for cost in costs)
        assert one.score == pytest.approx(100 * no_faster / len(costs))


def test_the_export_may_have_more_clusters_than_the_filter():
    costs = [1e8 * 0.85**step for step in range(6)]
    assert (len(clusters(costs)), len(references(costs))) == (1, 6)


def test_costs_on_another_machine_keep_clusters_and_scores():
    found = references([8e6, 4e6, 2e6, 1e6])
    other = measured_anew(found, [16e6, 5e6, 4e6, 3e6])
    assert [one.score for one in other] == [one.score for one in found]
    assert [one.cost for one in other] == [16e6, 5e6, 4e6, 3e6]
    with pytest.raises(ValueError, match="5e\\+06 and 5e\\+06 at 1 and 2"):
        measured_anew(found, [16e6, 5e6, 5e6, 3e6])
    with pytest.raises(ValueError, match="the references, 4, got 3"):
        measured_anew(found, [3.0, 2.0, 1.0])


# -------------------------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("seed", range(20))
def test_dps_falls_with_the_cost_in_steps_at_the_references(seed):
    found = references(random_costs(seed))
    asked = sorted(10**power for power in np.linspace(2, 10, 200))
    placed = [place(cost, found) for cost in asked]
    assert all(0 <= one.dps <= 100 for one in placed)
    for scores in ([one.dps for one in placed], [one.dps_norm for one in placed]):
        assert scores == sorted(scores, reverse=True)
    edges = [one.cost for one in found]
    for cheap, dear, at, after in zip(asked, asked[1:], placed, placed[1:], strict=False):
        if not any(cheap <= edge < dear for edge in edges):
            assert at == after
    assert {one.dps_norm for one in placed} <= {100 * j / len(found) for j in range(len(found) + 1)}


@pytest.mark.parametrize("seed", range(10))
def test_a_reference_gets_its_own_score(seed):
    found = references(random_costs(seed))
    for j, one in enumerate(found):
        assert place(one.cost, found) == evalperf.Place(j, one.score, 100 * (j + 1) / len(found))
        assert place(math.nextafter(one.cost, math.inf), found).dps == (found[j - 1].score if j else 0.0)
    assert place(found[-1].cost, found).dps == place(found[-1].cost / 1e3, found).dps == 100.0
    assert place(2 * found[0].cost, found) == place(None, found) == evalperf.Place(None, 0.0, 0.0)


@pytest.mark.parametrize("factor", [0.5, 2.0, 1024.0])
def test_a_factor_on_all_costs_changes_no_score(factor):
    """With the references as they are: a machine where everything takes so much longer."""
    for seed in range(10):
        found = references(random_costs(seed))
        slower = measured_anew(found, [factor * one.cost for one in found])
        for cost in random_costs(seed + 100):
            assert place(factor * cost, slower) == place(cost, found)


LEVELS = references([8e6, 4e6, 2e6, 1e6])


def test_wrong_samples_are_never_measured_and_give_nothing():
    measured = []

    def cost_of(text):
        measured.append(text)
        return {"fast and wrong": 1.0, "slow": 3e6}[text]

    score = score_task(["fast and wrong", "slow"], [False, True], cost_of, LEVELS)
    assert measured == ["slow"]
    assert (score.dps, score.dps_norm, score.pass_at_1, score.right) == (50.0, 50.0, 50.0, 1)
    assert score_task(["slow"], [True], cost_of, LEVELS).dps == score.dps


def test_too_few_right_samples_are_no_score_and_not_0():
    for right, protocol, scored in (
        (0, "paper", False),
        (1, "paper", True),
        (9, "as_released", False),
        (10, "as_released", True),
    ):
        samples = [f"program {n}" for n in range(30)]
        score = score_task(samples, [n < right for n in range(30)], lambda text: 4e6, LEVELS, protocol=protocol)
        assert (score.dps is not None) == (score.dps_norm is not None) == scored
        assert score.pass_at_1 == pytest.approx(100 * right / 30)
    none = score_task(["a"], [False], lambda text: 1.0, LEVELS)
    some = score_task(["a"], [True], lambda text: 1e6, LEVELS)
    both = score_model([none, some])
    assert (both.dps, both.dps_norm, both.pass_at_1, both.scored, both.tasks) == (100.0, 100.0, 50.0, 1, 2)
    assert score_model([none]) == evalperf.ModelScore(None, None, 0.0, 0, 1)


def test_protocols_measure_as_many_samples_as_they_say_and_each_text_once():
    samples = [f"program {n // 2}" for n in range(60)]
    for name, protocol in PROTOCOLS.items():
        measured = []
        score = score_task(samples, [True] * 60, lambda text, m=measured: m.append(text) or 4e6, LEVELS, protocol=name)
        assert len(score.places) == protocol.most_measured == {"paper": 10, "as_released": 20}[name]
        assert measured == [f"program {n}" for n in range(protocol.most_measured // 2)]
    own = score_task(samples, [True] * 60, lambda text: 4e6, LEVELS, protocol=ScoringProtocol(3, 5))
    assert len(own.places) == 5


def test_a_right_sample_that_does_not_finish_counts_as_0():
    score = score_task(["fast", "stuck"], [True, True], {"fast": 1e6}.get, LEVELS)
    assert (score.dps, score.right) == (50.0, 2)


def test_models_compare_on_the_tasks_that_all_were_scored_on():
    good, bad, none = (
        score_task(["a"], [True], lambda text, cost=cost: cost, LEVELS)
        if cost
        else score_task(["a"], [False], len, LEVELS)
        for cost in (1e6, 8e6, 0)
    )
    models = {"large": {"one": good, "two": bad}, "small": {"one": good, "two": none}}
    found = common_tasks(models)
    assert {name: (one.dps, one.scored) for name, one in found.items()} == {"large": (100.0, 1), "small": (100.0, 1)}
    assert score_model(list(models["large"].values())).dps == 62.5
    with pytest.raises(ValueError, match="a task that all were scored on"):
        common_tasks({"large": {"one": good}, "small": {"two": good}})


# -------------------------------------------------------------------------------------------------------------------------- inputs


def listed(scale):
    return (list(range(scale)),)


def finishes_to(most, state="time"):
    return lambda args: "returned" if len(args[0]) <= most else state


def test_scales_are_powers_of_two_and_the_last_finished_input_is_kept():
    asked = []
    found = sample_input(lambda scale: asked.append(scale) or listed(scale), finishes_to(300))
    assert asked == [2**power for power in range(1, 10)]
    assert (found.scale, len(found.args[0]), found.stop, found.sound) == (256, 256, "reference: time", True)
    assert sample_input(listed, finishes_to(10, "memory")).stop == "reference: memory"
    all_of_them = sample_input(lambda scale: scale, lambda args: "returned")
    assert (all_of_them.scale, all_of_them.stop, all_of_them.args) == (2**26, "last scale", (2**26,))
    assert sample_input(lambda scale: scale, lambda args: "returned", stops=Stops(last_power=3)).scale == 8
    nothing = sample_input(listed, finishes_to(1))
    assert (nothing.args, nothing.scale, nothing.sound) == (None, None, True)


@pytest.mark.parametrize(
    ("failure", "stop", "sound"),
    [
        (TimeoutError(), "synthesiser: time", True),
        (MemoryError(), "synthesiser: memory", True),
        (SynthesiserError("IndexError"), "synthesiser: IndexError", False),
    ],
)
def test_a_synthesiser_that_fails_ends_the_sampling(failure, stop, sound):
    def synthesise(scale):
        if scale > 16:
            raise failure
        return listed(scale)

    found = sample_input(synthesise, lambda args: "returned")
    assert (found.scale, found.stop, found.sound) == (16, stop, sound)


def test_inputs_beyond_64_bits_or_64_mb_or_the_contract_end_the_sampling():
    powers = sample_input(lambda scale: (2**scale,), lambda args: "returned")
    assert (powers.scale, powers.stop, powers.sound) == (32, "an integer beyond 64 bits", True)
    nested = sample_input(lambda scale: ("n", [{"deep": (-(2**63) - (scale > 2),)}]), lambda args: "returned")
    assert (nested.scale, nested.stop) == (2, "an integer beyond 64 bits")
    text = sample_input(lambda scale: ("a" * scale,), lambda args: "returned", stops=Stops(input_bytes=2**16))
    assert (text.scale, text.stop, text.sound) == (2**15, "size of the input", True)
    wrong = sample_input(listed, lambda args: "returned", lambda args: len(args[0]) < 20)
    assert (wrong.scale, wrong.stop, wrong.sound) == (16, "contract", False)
    crash = sample_input(listed, finishes_to(4, "crashed"))
    assert (crash.scale, crash.stop, crash.sound) == (4, "reference: crashed", False)


def test_limits_of_the_paper():
    assert Stops() == Stops(26, 64 * 2**20)
    assert Filters() == Filters(10, 10_000, 5, 99, 4, 0.2, 10_000)
    assert (FILTER_SPLIT, REFERENCE_SPLIT) == (0.2, 0.1)


def test_the_next_synthesiser_is_asked_only_after_one_that_failed():
    def broken(scale):
        if scale > 4:
            raise SynthesiserError("no")
        return listed(scale)

    def never(scale):
        raise AssertionError("asked without need")

    found = sample_inputs([broken, listed, never], finishes_to(100))
    assert [(one.scale, one.sound) for one in found] == [(4, False), (64, True)]


def test_the_dearest_input_on_which_all_finish_is_chosen():
    asked = []

    def all_finish(index):
        asked.append(index)
        return index in (0, 3)

    assert choose_input([1.0, 9.0, None, 4.0, 5.0], all_finish) == 3
    assert asked == [1, 4, 3]
    assert choose_input([None, None], all_finish) is None
    assert choose_input([2.0], lambda index: False) is None


def test_sizes_count_each_object_once():
    shared = list(range(1000))
    assert deep_size([shared, shared]) < deep_size(shared) + 200
    assert deep_size({"a": shared}) > deep_size(shared)
    assert deep_size(shared, most=100) > 100
    assert within_64_bits([{1: (2**63 - 1,)}, {-(2**63)}, True, "text", 1e300])
    assert not within_64_bits([{2**63: 0}])


def test_values_that_share_parts_or_hold_themselves_are_gone_through_once():
    doubled = [2**63]
    for _ in range(60):
        doubled = [doubled, doubled]
    endless = []
    endless.append(endless)
    assert deep_size(doubled) < 60 * 100
    assert not within_64_bits(doubled)
    assert deep_size(endless) > 0
    assert within_64_bits(endless)


def test_generators_of_the_bank_are_synthesisers():
    made = from_generator(lambda size, rng: ([rng.random() for _ in range(size)],), seed=5)
    assert made(16) == made(16)
    assert made(16)[0] != made(32)[0][:16]
    found = sample_input(made, finishes_to(40))
    assert found.scale == 32
    assert found.smaller() == [16, 8, 4, 2]
    assert found.synthesise(32) == found.args
    assert sample_input(made, finishes_to(1)).smaller() == []


def test_a_generator_that_takes_too_long_is_timed_out():
    def slow(scale):
        if scale > 8:
            while time.process_time() < before + 0.05:
                pass
        return listed(scale)

    before = time.process_time()
    assert sample_input(timed(slow, 0.02), lambda args: "returned").scale == 8
    with pytest.raises(TimeoutError, match="allowed are 0.02"):
        before = time.process_time()
        timed(slow, 0.02)(16)


# ------------------------------------------------------------------------------------------------------------------------- filters


def spread(many=12, clusters_=6, cheapest=1e6):
    return [[cheapest * 2 ** (n % clusters_)] * 3 for n in range(many)]


def test_filters_in_the_order_of_the_paper():
    assert suitability(spread()).passes
    assert suitability(None).reason == "input"
    assert suitability(spread(9)).reason == "programs"
    assert suitability(spread(10)).passes
    assert suitability(spread(cheapest=9_999.0)).reason == "cost"
    assert suitability(spread(cheapest=10_000.0)).reason == "clusters"  # dear enough, and too near to noise to part
    assert suitability(spread(clusters_=3)).reason == "clusters"
    assert suitability(spread(clusters_=4)).passes
    noisy = spread()
    noisy[0] = [1e6, 1.2e6, 0.8e6]
    seen = suitability(noisy)
    assert seen.reason == "variation"
    each = [100 * np.std(profile) / np.mean(profile) for profile in noisy]
    assert seen.variation == pytest.approx(np.percentile(each, 99))
    assert suitability(noisy, Filters(percentile=90)).passes
    assert suitability(noisy, Filters(most_variation=seen.variation)).passes
    assert suitability([[cost] for cost, *_ in noisy]).passes  # one repeat varies by nothing
    assert (seen.programs, seen.clusters, seen.cheapest) == (12, 6, pytest.approx(1e6))


def test_percentiles_are_numpy_s():
    chance = np.random.default_rng(0)
    for many in (1, 2, 7, 20):
        values = list(chance.random(many))
        for percent in (0, 33, 50, 99, 100):
            assert percentile(values, percent) == pytest.approx(np.percentile(values, percent))


# ------------------------------------------------------------------------------------------------------------------------- a task


@dataclass(frozen=True)
class Ran:
    state: str
    cost: float | None


def machine(limits=1e7, exponents=None):
    """Programs are numbers: a text "1.5" costs size ** 1.5 times a thousand, and gives up beyond the limit."""

    def run(text, args):
        cost = 1000.0 * len(args[0]) ** float(text)
        return [Ran("returned", cost) if cost <= limits else Ran("time", None)] * 2

    return run


def test_a_task_is_curated_with_the_input_that_all_programs_finish():
    programs = {"canonical": "1.0", **{f"variant {n}": str(1 + n / 10) for n in range(1, 11)}}
    grows = from_generator(lambda size, rng: ([0] * size,))
    found = curate(programs, [grows], machine(), keep="last")
    assert found.sampled[0].scale == 8192  # the canonical program's own limit
    assert found.chosen is None  # only the last input is kept, and slower programs do not finish with it
    assert found.suitability.reason == "input"
    assert found.references == ()

    every = curate(programs, [grows], machine())
    assert every.sampled[0].smaller() == [2**power for power in range(12, 0, -1)]
    assert every.chosen.scale == 64  # the largest one that all finish
    assert every.suitability.passes

    def first(scale):
        if scale > 64:
            raise SynthesiserError("enough")
        return grows(scale)

    found = curate(programs, [first, grows], machine(), keep="last")
    assert [one.scale for one in found.sampled] == [64, 8192]
    assert found.chosen.scale == 64  # the dearer one is too much for others
    assert [p[0] for p in found.profiles] == [1000.0 * 64 ** (1 + n / 10) for n in range(11)]
    assert found.suitability.passes
    assert [one.program for one in found.references] == list(range(10, 1, -1))  # small costs are harder to split
    assert found.references[-1].score == 100.0


def test_what_did_not_finish_is_asked_first_on_the_next_input():
    asked = []

    def run(text, args):
        asked.append((text, len(args[0])))
        return machine()(text, args)

    programs = {"canonical": "1.0", "a": "0.9", "slow": "1.5", "b": "0.8"}
    found = curate(programs, [from_generator(lambda size, rng: ([0] * size,))], run)
    assert found.chosen.scale == 256
    tried = asked[asked.index(("0.9", 8192)) :]
    assert tried[:2] == [("0.9", 8192), ("1.5", 8192)]
    assert tried[2:6] == [("1.5", 4096), ("1.5", 2048), ("1.5", 1024), ("1.5", 512)]
    assert tried[6:] == [(text, 256) for text in ("1.5", "1.0", "0.9", "0.8")]
    assert [profile[0] for profile in found.profiles] == [1000.0 * 256 ** float(text) for text in programs.values()]


@pytest.mark.parametrize("failure", [TimeoutError(), MemoryError(), SynthesiserError("no")])
def test_a_smaller_input_that_cannot_be_made_again_is_no_candidate(failure):
    made = set()

    def once(scale):
        if scale in made and scale > 64:
            raise failure
        made.add(scale)
        return listed(scale)

    programs = {"canonical": "1.0", "slow": "1.5"}
    assert curate(programs, [listed], machine()).chosen.scale == 256
    assert curate(programs, [once], machine()).chosen.scale == 64


def test_a_repeat_that_did_not_finish_is_no_profile():
    def run(text, args):
        cost = 1000.0 * len(args[0])
        again = Ran("time", None) if text == "stuck" and len(args[0]) > 8 else Ran("returned", cost)
        return [Ran("returned", cost), again]

    found = curate({"canonical": "fine", "other": "stuck"}, [listed], run, stops=Stops(last_power=6))
    assert found.chosen.scale == 8


def test_a_task_without_differences_does_not_pass():
    programs = {"canonical": "1.0", **{f"variant {n}": "1.0" for n in range(10)}}
    found = curate(programs, [from_generator(lambda size, rng: ([0] * size,))], machine())
    assert found.suitability.reason == "clusters"
    assert len(found.references) == 1


# ----------------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_costs_are_above_0(bad):
    for asked in (
        lambda: clusters([1.0, bad]),
        lambda: references([bad]),
        lambda: place(bad, LEVELS),
        lambda: suitability([[bad]] * 10),
        lambda: choose_input([bad], lambda index: True),
    ):
        with pytest.raises(ValueError, match="cost must be a finite number above 0"):
            asked()


def test_what_is_missing_or_strange_is_named():
    with pytest.raises(ValueError, match="costs must have at least one"):
        clusters([])
    with pytest.raises(ValueError, match="split must be"):
        clusters([1.0], split=-0.1)
    with pytest.raises(TypeError, match="noise must be"):
        clusters([1.0], noise="none")
    with pytest.raises(ValueError, match="at least one reference"):
        place(1.0, ())
    with pytest.raises(ValueError, match="protocol must be one of 'paper', 'as_released'"):
        score_task(["a"], [True], len, LEVELS, protocol="theirs")
    with pytest.raises(ValueError, match="got 2 and 1"):
        score_task(["a", "b"], [True], len, LEVELS)
    with pytest.raises(ValueError, match="got 0 and 0"):
        score_task([], [], len, LEVELS)
    with pytest.raises(ValueError, match="at least one task"):
        score_model([])
    with pytest.raises(ValueError, match="at least one, got none"):
        common_tasks({})
    with pytest.raises(ValueError, match="canonical must be one of a, got 'canonical'"):
        curate({"a": "1"}, [], machine())
    with pytest.raises(ValueError, match="last_power"):
        sample_input(listed, finishes_to(3), stops=Stops(last_power=0))
    with pytest.raises(ValueError, match="keep must be one of 'all', 'last'"):
        curate({"canonical": "1"}, [], machine(), keep="first")
    with pytest.raises(ValueError, match="seconds must be"):
        timed(listed, 0)
    with pytest.raises(ValueError, match="percent must be"):
        percentile([1.0], 101)
    with pytest.raises(ValueError, match="profiles must hold a cost"):
        suitability([[], *([1e6] for _ in range(9))])
    for name, bad in (("least_programs", 0), ("least_clusters", 0), ("least_cost", -1.0), ("most_variation", math.nan)):
        with pytest.raises(ValueError, match=f"{name} must be"):
            Filters(**{name: bad})
    with pytest.raises(ValueError, match="percentile must be"):
        Filters(percentile=101)

"""The search must find the best allowed recipe of a world whose truth we know, and try nothing that it can rule out."""

from __future__ import annotations

import math

import pytest

from assay.methods.transform import Effect
from assay.tuner.recipe import Step
from assay.tuner.search import Kind, Option, Search, option_from, pareto

PEAK = {"float32": 1e11, "bfloat16": 4e11, "int8": 8e11}
KINDS = {
    "linear": Kind(2.0, 4e11, 1e9, "bfloat16"),
    "attention": Kind(1.5, 3e11, 1e9, "bfloat16"),
    "other": Kind(0.5, 0.0, 1e10, "bfloat16"),
}


def option(name, slot, *effects, exact=False, **config):
    return Option(Step(transform=name, config=config), slot, exact, effects)


INT8 = option("int8", "linear", Effect("linear", bytes=0.5, dtype="int8"))
HALF = option("sparse", "attention", Effect("attention", macs=0.5, bytes=0.5), tau=0.9)
TENTH = option("sparse", "attention", Effect("attention", macs=0.1, bytes=0.1), tau=0.5)
RANK = option("rank", "structure", Effect("linear", macs=0.5, bytes=0.5), rank=0.5)
RANK2 = option("rank", "structure", Effect("linear", macs=0.8, bytes=0.8), rank=0.8)
FUSE = option("fuse", "compile", Effect("other", bytes=0.5), exact=True)
WORLD = [INT8, HALF, TENTH, RANK, RANK2, FUSE]
TIME = {INT8.key: 0.75, HALF.key: 0.85, TENTH.key: 0.7, RANK.key: 0.8, RANK2.key: 0.95, FUSE.key: 0.9}
DROP = {INT8.key: 0.004, HALF.key: 0.003, TENTH.key: 0.05, RANK.key: 0.8, RANK2.key: 0.3, FUSE.key: 0.0}


def make(max_drop=0.01, options=WORLD):
    return Search(list(options), KINDS, PEAK, 4e10, max_drop)


def truth(options):
    return math.prod(TIME[o.key] for o in options), sum(DROP[o.key] for o in options)


def explore(search, trials):
    seen = []
    for _ in range(trials):
        options = search.next()
        if options is None:
            break
        search.learn(options, *truth(options))
        seen.append(options)
    return seen


def test_candidates_hold_at_most_one_option_a_slot_in_slot_order():
    found = make().candidates()
    assert len(found) == 2 * 3 * 3 * 2 - 1
    assert len({frozenset(o.key for o in c) for c in found}) == len(found)
    for candidate in found:
        slots = [o.slot for o in candidate]
        assert len(set(slots)) == len(slots)
        assert slots == sorted(slots, key=["structure", "linear", "attention", "compile"].index)


def test_roofline_prediction_is_the_arithmetic_of_the_floor():
    search = make()
    assert search.roofline(()) == pytest.approx(1.0)
    # linears are compute-bound: int8 halves 2.0 s of 4.0 s
    assert search.roofline((INT8,)) == pytest.approx(3.0 / 4.0)
    assert search.roofline((HALF,)) == pytest.approx((2.0 + 0.75 + 0.5) / 4.0)
    # rank then int8 multiply: half the operations at twice the rate
    assert search.roofline((RANK, INT8)) == pytest.approx((0.5 + 1.5 + 0.5) / 4.0)
    assert search.roofline((FUSE,)) == pytest.approx((2.0 + 1.5 + 0.25) / 4.0)


def test_finds_the_best_allowed_recipe_in_few_trials():
    search = make()
    seen = explore(search, 12)
    allowed = [c for c in search.candidates() if truth(c)[1] <= 0.01]
    best = min(allowed, key=lambda c: truth(c)[0])
    assert {o.key for o in best} == {INT8.key, HALF.key, FUSE.key}
    assert best in seen


def test_no_candidate_is_tried_twice_or_contains_a_known_violator():
    search = make()
    seen = explore(search, 100)
    keys = [frozenset(o.key for o in c) for c in seen]
    assert len(set(keys)) == len(keys)
    violators: list[frozenset] = []
    for candidate, key in zip(seen, keys, strict=True):
        assert not any(v <= key for v in violators)
        if truth(candidate)[1] > 0.01:
            violators.append(key)


def test_after_a_violation_its_options_are_judged_alone():
    search = make()
    first = search.next()
    assert first is not None
    assert len([o for o in first if not o.exact]) > 1
    search.learn(first, 0.5, 0.9)
    second = search.next()
    assert second is not None
    assert len(second) == 1
    assert second[0] in first


def test_a_failed_single_is_never_part_of_a_candidate_again():
    search = make()
    search.fail((INT8,))
    assert all(INT8 not in list(c) for c in explore(search, 60))


def test_a_pair_that_failed_is_put_off_with_all_its_settings_until_one_worked():
    search = make(max_drop=0.5, options=[INT8, HALF, TENTH, FUSE])
    search.fail((INT8, TENTH, FUSE))
    suspected = search._clashes()
    for a, b in [(INT8, FUSE), (INT8, TENTH), (INT8, HALF), (TENTH, FUSE), (HALF, FUSE)]:
        assert frozenset([a.key, b.key]) in suspected
    search.learn((INT8, HALF), *truth((INT8, HALF)))  # clears INT8 beside either setting of `sparse`
    assert frozenset([INT8.key, TENTH.key]) not in search._clashes()
    order = [search.next()]
    while order[-1] is not None:
        search.learn(order[-1], *truth(order[-1]))
        order.append(search.next())
    tried = [frozenset(o.key for o in options) for options in order[:-1] if options is not None]
    clash = next(i for i, keys in enumerate(tried) if {INT8.key, FUSE.key} <= keys)
    assert all(
        tried.index(frozenset(keys)) < clash for keys in [{INT8.key, TENTH.key}, {INT8.key}, {TENTH.key}, {HALF.key}]
    )


def test_a_step_that_could_not_be_applied_takes_the_blame_alone():
    search = make(max_drop=0.5, options=[INT8, HALF, FUSE])
    assert search.next() == (INT8, HALF, FUSE)
    search.fail((INT8, HALF, FUSE), "fuse")
    assert search.next() == (INT8, HALF)  # the same without the step to blame, not one option at a time
    early = make(max_drop=0.5, options=[INT8, HALF, FUSE])
    early.fail((INT8, HALF, FUSE), "int8")  # it is the first: nothing before it can be why
    assert early.next() == (HALF, FUSE)
    assert all(INT8 not in candidate for candidate in explore(early, 60))


def test_with_nothing_allowed_only_exact_options_remain():
    search = make(max_drop=0.0)
    explore(search, 200)
    good = [k for k, (_, drop) in search.measured.items() if drop <= 0]
    assert good == [frozenset([FUSE.key])]


def test_learning_corrects_the_prediction():
    search = make()
    before = search.predict((INT8,))
    search.learn((INT8,), 0.9, 0.0)
    assert search.predict((INT8,)) == pytest.approx(0.9)
    assert before < 0.9
    assert search.roofline((INT8,)) == pytest.approx(before)


def test_pareto_front():
    assert pareto([(1, 5), (2, 2), (3, 3), (4, 1), (1, 6)]) == [0, 1, 3]
    assert pareto([]) == []


def test_effects_are_those_of_the_share_that_is_reached():
    part = Option(Step(transform="int8", config={}), "linear", False, INT8.effects, share=0.25)
    whole = make(options=[INT8]).roofline((INT8,))
    assert make(options=[part]).roofline((part,)) == pytest.approx(1 - 0.25 * (1 - whole))
    assert (
        option_from(
            {"transform": "x", "config": {}, "slot": "linear", "exact": True, "effects": [], "share": 0.6}
        ).share
        == 0.6
    )


def test_one_of_each_transform_is_screened_before_the_second_of_any_and_then_combinations():
    search = make(max_drop=0.5)
    singles = search.to_screen(20, combined=False)
    assert [len(options) for options in singles] == [1] * 6
    assert len({options[0].step.transform for options in singles[:4]}) == 4
    for options in singles:
        search.screened(options, truth(options)[0])
    assert not search.to_screen(20, combined=False)
    combined = search.to_screen(3, combined=True)
    assert len(combined) == 3
    assert all(len(options) > 1 for options in combined)
    assert [search.predict(options) for options in singles] == [truth(options)[0] for options in singles]
    search.screened(combined[0], 0.123)
    assert search.predict(combined[0]) == 0.123
    assert combined[0] not in search.to_screen(20, combined=True)


def test_what_screening_saw_slower_than_the_base_is_not_judged():
    search = make(max_drop=0.5, options=[INT8, FUSE])
    search.screened((INT8,), 1.3)
    search.screened((FUSE,), 0.9)
    assert [search.next()] == [(FUSE,)]
    search.learn((FUSE,), 0.9, 0.0)
    assert search.next() is None


def test_times_that_screening_cannot_tell_apart_are_the_same_and_less_change_goes_first():
    search = make(max_drop=0.5, options=[HALF, FUSE])
    search.screened((HALF,), 0.799)
    search.screened((FUSE,), 0.801)
    search.screened((HALF, FUSE), 0.8)
    assert search.next() == (FUSE,)  # exact, and no slower than anybody could tell


def test_an_unseen_setting_is_expected_to_surprise_as_its_siblings_did():
    search = make(max_drop=0.5)
    before = search.predict((TENTH,))
    search.screened((HALF,), 1.5 * search.predict((HALF,)))
    assert search.predict((TENTH,)) == pytest.approx(1.5 * before)


def keys_of(*options):
    return frozenset(o.key for o in options)


def test_an_option_is_the_same_in_whatever_order_its_settings_stand():
    assert option("x", "linear", a=1, b=2).key == option("x", "linear", b=2, a=1).key


@pytest.mark.parametrize(("settings", "kept"), [(3999, 3999), (4000, 3999), (6000, 3999)])
def test_no_more_candidates_than_the_limit_the_last_settings_are_cut(settings, kept):
    options = [option("many", "linear", n=n) for n in range(settings)]
    assert [found[0] for found in make(options=options).candidates()] == options[:kept]


def test_the_slot_of_most_settings_is_cut():
    many, few = [option("many", "linear", n=n) for n in range(1500)], [option("few", "compile", n=n) for n in range(3)]
    found = make(options=[*many, *few]).candidates()
    assert {o.key for candidate in found for o in candidate} == keys_of(*many[:999], *few)


def test_work_that_takes_no_time_is_changed_by_nothing():
    half = option("half", "linear", Effect("linear", macs=0.5, bytes=0.5))
    idle = Search([half], {"linear": Kind(0.1, 0.0, 0.0, "float32"), "other": KINDS["other"]}, PEAK, 4e10, 0.01)
    assert idle.roofline((half,)) == pytest.approx(1.0)
    unknown = Search([half], {"linear": Kind(0.0, 1e9, 1e9, "float32")}, PEAK, 4e10, 0.01)
    assert unknown.roofline((half,)) == 1.0
    small = Search([half], {"linear": Kind(0.1, 1e11, 1e9, "float32")}, PEAK, 4e10, 0.01)
    assert small.roofline((half,)) == pytest.approx(0.5)


def test_a_multiply_accumulate_is_two_operations_and_the_slower_of_memory_and_arithmetic_counts():
    half = option("half", "linear", Effect("linear", bytes=0.5))
    kinds = {"linear": Kind(1.0, 1e11, 2.2 * 4e10, "float32")}  # 2 s of operations at 1e11 a second, 2.2 s of memory
    assert Search([half], kinds, PEAK, 4e10, 0.01).roofline((half,)) == pytest.approx(2 / 2.2)


def test_where_no_rate_is_known_only_the_amount_of_work_counts():
    eight, half = (
        option("eight", "linear", Effect("linear", dtype="int8")),
        option("half", "linear", Effect("linear", 0.5)),
    )
    search = Search([eight, half], {"linear": Kind(1.0, 1e11, 1e9, "float32")}, {}, 4e10, 0.01)
    assert search.roofline((eight,)) == pytest.approx(1.0)
    assert search.roofline((half,)) == pytest.approx(0.5)


def test_an_unseen_setting_is_suspected_of_a_quarter_of_what_its_mildest_sibling_lost():
    mild, wild, unseen = (option("sparse", "attention", tau=tau) for tau in (0.9, 0.5, 0.7))
    search = make(max_drop=0.05, options=[mild, wild, unseen, FUSE])
    search.learn((mild,), 0.9, 0.04)
    search.learn((wild,), 0.9, 0.4)
    assert search.expected_drop((unseen, FUSE)) == pytest.approx(0.01)
    assert search.expected_drop((mild, FUSE)) == search.known_drop((mild, FUSE)) == 0.04


def test_what_may_lose_nothing_is_not_put_off_beside_what_may_lose_too_much():
    search = make(max_drop=0.0, options=[HALF, TENTH, FUSE])
    search.learn((HALF,), 0.85, 0.004)
    assert search.predict((TENTH,)) < search.predict((FUSE,))
    assert search.next() == (FUSE,)


def test_times_further_apart_than_screening_tells_are_not_the_same():
    search = make(max_drop=0.5, options=[HALF, FUSE])
    search.screened((HALF,), 0.823)
    search.screened((FUSE,), 0.8565)
    search.screened((HALF, FUSE), 0.9)
    assert search.next() == (HALF,)


def test_a_change_of_structure_comes_after_all_others_until_it_was_assessed():
    search = make(max_drop=0.05, options=[INT8, HALF, RANK, FUSE])
    fastest = min(search.candidates(), key=search.predict)
    assert RANK in fastest
    seen = []
    while (options := search.next()) is not None and RANK not in options:
        search.learn(options, search.predict(options), 0.0)
        seen.append(options)
    assert len(seen) == 2 * 2 * 2 - 1
    known = make(max_drop=0.05, options=[INT8, HALF, RANK, FUSE])
    known.learn((RANK,), known.predict((RANK,)), 0.001)
    assert known.next() == fastest


def test_a_candidate_known_to_lose_too_much_does_not_hide_those_after_it():
    search = make(max_drop=0.01, options=[RANK, INT8, HALF])
    search.learn((INT8,), 0.8, 0.006)
    search.learn((HALF,), 0.8, 0.006)
    seen = explore(search, 20)
    assert (INT8, HALF) not in seen
    assert RANK in seen[0]


def test_a_candidate_known_to_be_slower_does_not_hide_those_after_it():
    search = make(max_drop=0.5, options=[INT8, HALF])
    search.screened((HALF,), 1.3)
    assert search.next() == (INT8,)


def test_what_only_the_roofline_calls_slower_is_tried_all_the_same():
    a, b = option("a", "linear", Effect("linear", macs=3.0)), option("b", "attention", Effect("attention", macs=3.0))
    pair, names = (a, b), [keys_of(a), keys_of(b), keys_of(a, b)]

    def tried(search):
        found = search.to_screen(9, combined=False) + search.to_screen(9, combined=True)
        return [name for name in names if name in [keys_of(*options) for options in found]]

    search = make(max_drop=0.5, options=[a, b])
    assert min(search.predict((a,)), search.predict((b,)), search.predict(pair)) > 1.05
    assert tried(search) == names
    search.screened((a,), search.predict((a,)))
    assert tried(search) == [keys_of(b), keys_of(a, b)]  # of b nothing is known
    search.screened((b,), search.predict((b,)))
    assert tried(search) == []
    blamed = make(max_drop=0.5, options=[a, b])
    blamed.learn(pair, blamed.predict(pair), 0.0)
    assert tried(blamed) == names[:2]  # which of the two was slow is not known


@pytest.mark.parametrize("learn", ["screened", "learn"])
def test_a_surprise_is_shared_by_the_options_of_the_candidate(learn):
    search = make(max_drop=0.5, options=[INT8, HALF, FUSE])
    candidates = [(INT8, HALF), (INT8, FUSE), (INT8, HALF, FUSE)]
    before = [search.predict(options) for options in candidates]
    more = (0.0,) if learn == "learn" else ()
    getattr(search, learn)((INT8, HALF), 0.64 * before[0], *more)
    found = [search.predict(options) for options in candidates]
    assert found == pytest.approx([0.64 * before[0], 0.8 * before[1], 0.64 * before[2]])


def test_an_unseen_setting_is_expected_to_surprise_as_its_siblings_did_on_average():
    settings = [option("sparse", "attention", tau=tau) for tau in (0.9, 0.8, 0.7)]
    search = make(max_drop=0.5, options=settings)
    search.screened((settings[0],), 0.9)
    search.correction[settings[1].key] = math.log(0.4)
    assert search.predict((settings[2],)) == pytest.approx(0.6)  # the geometric mean


def test_after_a_failure_all_pairs_with_the_step_to_blame_are_put_off_and_no_others():
    a, c, b = (option(name, slot) for name, slot in [("a", "linear"), ("c", "attention"), ("b", "compile")])
    search = make(max_drop=0.5, options=[a, c, b])
    search.fail((a, c, b), "b")
    assert search._clashes() == {keys_of(a, b), keys_of(b, c)}


def test_only_what_may_be_to_blame_is_assessed_alone():
    search = make(options=[INT8, HALF, TENTH, FUSE])
    search.learn((INT8, HALF, FUSE), search.predict((INT8, HALF, FUSE)), 0.9)
    suspects = []
    for _ in range(2):
        suspects.append(search.next())
        search.learn(suspects[-1], search.predict(suspects[-1]), 0.001)
    # what is exact loses nothing and stays; the other setting was not there
    assert suspects == [(INT8, FUSE), (HALF, FUSE)]
    assert {INT8.key, HALF.key} <= search.single_drop.keys()
    assert TENTH.key not in search.single_drop


def test_a_suspect_keeps_exact_options_of_other_slots_beside_it():
    kernel = option("kernel", "attention", Effect("attention", bytes=0.5), exact=True)
    search = make(options=[INT8, HALF, kernel])
    search.screened((INT8,), 0.75)
    search.screened((HALF,), 0.5)
    search.screened((kernel,), 0.6)
    search.learn((INT8, HALF), 0.4, 0.07)
    assert search.next() == (INT8, kernel)
    search.fail((INT8, kernel))
    assert search.next() == (INT8,)  # perhaps the two do not go together


def test_options_that_are_harmless_alone_and_lose_too_much_together_are_not_tried_with_a_third():
    search = make(max_drop=0.01, options=[INT8, HALF, FUSE])
    search.learn((INT8,), 0.75, 0.004)
    search.learn((HALF,), 0.85, 0.004)
    search.learn((INT8, HALF), 0.6, 0.02)
    left = []
    while (options := search.next()) is not None:
        search.learn(options, 0.5, 0.0)
        left.append(options)
    assert sorted(left, key=len) == [(FUSE,), (INT8, FUSE), (HALF, FUSE)]


def explore_harmless(search):
    found = []
    while (options := search.next()) is not None:
        search.learn(options, 0.8, 0.0)
        found.append(options)
    return found


def test_what_loses_just_as_much_as_is_allowed_is_allowed():
    other = option("tune", "settings", exact=True)
    nothing = make(max_drop=0.0, options=[FUSE, other])
    nothing.learn((FUSE,), 0.9, 0.0)
    assert {keys_of(*o) for o in explore_harmless(nothing)} == {keys_of(other), keys_of(FUSE, other)}
    just = make(max_drop=0.01, options=[INT8, HALF, FUSE])
    just.learn((INT8, HALF), 0.6, 0.01)
    assert just.next() == (INT8, HALF, FUSE)  # nobody is to blame for anything


def test_an_option_without_a_share_reaches_everything():
    document = {"transform": "x", "config": {}, "slot": "linear", "exact": True, "effects": []}
    assert option_from(document).share == 1.0


def test_a_point_as_good_in_one_way_and_worse_in_the_other_is_not_on_the_front():
    assert pareto([(1, 2), (2, 2), (1, 3), (1, 2)]) == [0]

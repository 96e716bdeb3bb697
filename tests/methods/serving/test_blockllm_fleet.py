"""Chains of blocks on several devices: tokens visit their chains in order, caches have one owner, nobody beats an idle system."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

import pytest

from assay.methods.core.fleet.hardware import Link
from assay.methods.core.fleet.traces import Request, merged, poisson
from assay.methods.serving.blockllm import (
    BlockTimes,
    Model,
    Node,
    Option,
    apart,
    cheapest,
    cluster,
    fitted,
    idle_seconds,
    place,
    simulate_blocks,
)

TIMES = BlockTimes(start=1e-3, read=1e-3, work=1e-4)
LAYERS = [f"l{i}" for i in range(4)]
MODELS = {
    "a": Model((*LAYERS, "head"), (True,) * 4 + (False,), 1e3, 2e3),
    "b": Model((*LAYERS[:2], "b2", "b3", "head"), (True,) * 4 + (False,), 1e3, 2e3),
    "c": Model((*LAYERS, "head"), (True,) * 4 + (False,), 1e3, 2e3),
}
SIZES = dict.fromkeys([*LAYERS, "b2", "b3", "head"], 1.0)
NODES = cluster(2, 2, memory=4.0)
RATES = {"a": 3.0, "b": 1.0, "c": 2.0}


def requests(rate=2.0, seconds=6.0):
    return merged(poisson(rate * RATES[name], seconds, [(5, 3), (9, 2)], tenant=name, seed=1) for name in MODELS)


def run(asked, *, nodes=NODES, placement=None, models=MODELS, sizes=SIZES, **options):
    where = place(models, RATES, sizes, nodes) if placement is None else placement
    return simulate_blocks(asked, models, where, sizes, nodes, TIMES, **options), where


def test_every_token_visits_exactly_its_chain_in_order():
    asked = requests()
    found, _ = run(asked)
    visited = defaultdict(list)
    for visit in sorted(found.visits, key=lambda visit: visit.start):
        for number in visit.requests:
            visited[number].append(visit)
    assert len(found.served) == len(asked) == len(visited)
    for number, request in enumerate(asked):
        chain = MODELS[request.tenant].blocks
        assert [visit.block for visit in visited[number]] == list(chain) * request.new_tokens
        for one, then in pairwise(visited[number]):
            assert then.start >= one.end - 1e-12
    tokens = sum(visit.tokens for visit in found.visits)
    assert tokens == sum(len(MODELS[r.tenant].blocks) * (r.prompt_tokens + r.new_tokens - 1) for r in asked)


def test_a_device_runs_one_batch_at_a_time_where_the_block_lies():
    found, where = run(requests())
    by = defaultdict(list)
    for visit in found.visits:
        assert visit.node in where[visit.block]
        by[visit.node].append(visit)
    for visits in by.values():
        for one, then in pairwise(sorted(visits, key=lambda visit: visit.start)):
            assert then.start >= one.end - 1e-12


def test_only_requests_for_one_block_are_merged_and_different_models_are():
    asked = [Request(0.0, 5, 3, name) for name in ("a", "b", "c")]
    one = [Node("n", "s", 100.0)]
    found, _ = run(asked, nodes=one)
    tenants = [{asked[number].tenant for number in visit.requests} for visit in found.visits]
    for visit, names in zip(found.visits, tenants, strict=True):
        assert all(visit.block in MODELS[name].blocks for name in names)
    assert {"a", "b", "c"} in tenants
    assert {"a", "c"} in tenants
    alone, _ = run(asked, nodes=one, most=1)
    assert max(len(visit.requests) for visit in alone.visits) == 1
    assert alone.seconds > found.seconds


def test_a_cache_has_one_owner_at_the_device_that_ran_it_last():
    placement = {block: [node.name for node in NODES] for block in SIZES}
    asked = requests(rate=6.0)
    found, _ = run(asked, placement=placement)
    last = {}
    for visit in sorted(found.visits, key=lambda visit: visit.start):
        for number in visit.requests:
            last[number, visit.block] = visit.node
    for number, owners in found.owners.items():
        model = MODELS[asked[number].tenant]
        assert set(owners) == {i for i, keeps in enumerate(model.attention) if keeps}
        for position, node in owners.items():
            assert node == last[number, model.blocks[position]]


def test_caches_stay_where_moving_is_dear_and_go_where_it_is_free():
    placement = {block: [node.name for node in NODES] for block in SIZES}
    slow, fast = Link(1e2, 1.0), Link(1e15, 0.0)
    asked = requests(rate=6.0, seconds=2.0)
    dear, _ = run(asked, placement=placement, local=slow, remote=slow)
    free, _ = run(asked, placement=placement, local=fast, remote=fast)
    assert dear.moves < free.moves
    again, _ = run(asked, placement=placement, local=fast, remote=fast)
    assert again == free


def test_nobody_is_faster_than_on_an_idle_system():
    found, _ = run(requests(rate=5.0))
    for one in found.served:
        assert one.e2e >= idle_seconds(one.request, MODELS[one.request.tenant], SIZES, TIMES) - 1e-9
    single, _ = run([Request(0.0, 5, 3, "a")], nodes=[Node("n", "s", 100.0)])
    assert single.served[0].e2e == pytest.approx(idle_seconds(Request(0.0, 5, 3, "a"), MODELS["a"], SIZES, TIMES))


def test_the_rule_is_the_sum_and_ties_go_to_the_owner():
    owner = Option("here", True, wait=3.0, transfer=0.0, move=7.0, recompute=7.0, run=1.0)
    assert owner.seconds == 4.0
    other = Option("there", False, wait=0.0, transfer=0.5, move=2.0, recompute=1.5, run=1.0)
    assert other.seconds == 3.0
    assert cheapest([owner, other]) is other
    even = Option("there", False, wait=0.0, transfer=0.5, move=2.0, recompute=2.5, run=1.5)
    assert even.seconds == 4.0
    assert cheapest([even, owner]) is owner
    with pytest.raises(ValueError, match="options"):
        cheapest([])


def test_shared_blocks_take_less_of_a_busy_device_than_copies():
    asked = [Request(0.01 * i, 6, 4, "abc"[i % 3]) for i in range(12)]
    one = [Node("n", "s", 100.0)]
    own = apart(MODELS)
    sizes = {block: SIZES[block.rpartition("/")[2]] for model in own.values() for block in model.blocks}
    shared, _ = run(asked, nodes=one)
    copies, _ = run(asked, nodes=one, models=own, sizes=sizes)
    assert shared.quantile(0.95) < copies.quantile(0.95)
    assert shared.rows() > copies.rows()
    assert not set(own["a"].blocks) & set(own["c"].blocks)


def test_placement_keeps_to_memory_and_chains_together():
    where = place(MODELS, RATES, SIZES, NODES)
    used = defaultdict(float)
    for block, nodes in where.items():
        assert len(set(nodes)) == len(nodes) >= 1
        for node in nodes:
            used[node] += SIZES[block]
    assert all(size <= 4.0 for size in used.values())
    servers = [{node.split(".")[0] for node in where[block][:1]} for block in MODELS["a"].blocks]
    assert len(set().union(*servers)) == 1  # the busiest model lies in one server
    with pytest.raises(ValueError, match="room"):
        place(MODELS, RATES, SIZES, cluster(1, 1, memory=3.0))


def test_whole_models_stay_whole_and_the_busiest_are_copied():
    own = apart(MODELS)
    sizes = {block: 1.0 for model in own.values() for block in model.blocks}
    where = place(own, RATES, sizes, cluster(2, 2, memory=5.0), whole=True)
    homes = {name: {tuple(where[block]) for block in model.blocks} for name, model in own.items()}
    assert all(len(found) == 1 for found in homes.values())
    assert {name: len(next(iter(found))) for name, found in homes.items()} == {"a": 2, "b": 1, "c": 1}
    with pytest.raises(ValueError, match="room for 'b'"):
        place(own, RATES, sizes, cluster(1, 2, memory=5.0), whole=True)


def test_two_requests_together_by_hand():
    """One device, one model, both at once: each block once for both prompts, then once for both tokens, as often as tokens follow."""
    asked = [Request(0.0, 5, 3, "a"), Request(0.0, 9, 3, "a")]
    found, _ = run(asked, nodes=[Node("n", "s", 100.0)])
    block = lambda tokens: TIMES.start + TIMES.read + TIMES.work * tokens  # noqa: E731
    whole = 5 * (block(14) + 2 * block(2))
    assert [one.e2e for one in found.served] == pytest.approx([whole, whole])
    assert [one.first for one in found.served] == pytest.approx([5 * block(14)] * 2)
    assert found.busy("n") == pytest.approx(1.0)
    assert found.rows() == 2


def test_times_are_those_of_least_squares_without_negative_ones():
    """Against scipy's own, over noisy passes, some of which want a negative number."""
    import numpy as np
    from scipy.optimize import nnls

    chance = np.random.default_rng(0)
    for _ in range(20):
        table = chance.uniform(0.1, 9.0, (12, 3))
        seconds = np.maximum(table @ chance.uniform(-0.5, 1.0, 3) + chance.normal(0, 0.3, 12), 0.01)
        wanted, _ = nnls(table / seconds[:, None], np.ones(12))
        found = fitted([(*row, second) for row, second in zip(table.tolist(), seconds.tolist(), strict=True)])
        assert (found.start, found.read, found.work) == pytest.approx(wanted, abs=1e-8)


def test_times_are_found_again():
    seen = [(n, size, size * tokens) for n, size, tokens in ((3, 5.0, 1), (9, 14.0, 4), (4, 20.0, 30), (30, 60.0, 2))]
    passes = [(n, read, work, TIMES.start * n + TIMES.read * read + TIMES.work * work) for n, read, work in seen]
    found = fitted(passes)
    assert (found.start, found.read, found.work) == pytest.approx((TIMES.start, TIMES.read, TIMES.work))
    for bad in ([], [(1, 1.0, 1.0, 0.0)], [(1, 1.0, float("nan"), 1.0)]):
        with pytest.raises(ValueError, match="passes"):
            fitted(bad)


def test_what_a_simulation_refuses():
    where = place(MODELS, RATES, SIZES, NODES)
    with pytest.raises(ValueError, match="tenant"):
        simulate_blocks([Request(0.0, 1, 1, "x")], MODELS, where, SIZES, NODES, TIMES)
    with pytest.raises(ValueError, match="placement"):
        simulate_blocks([Request(0.0, 1, 1, "a")], MODELS, {**where, "l0": ["nowhere"]}, SIZES, NODES, TIMES)
    with pytest.raises(ValueError, match="most"):
        simulate_blocks([], MODELS, where, SIZES, NODES, TIMES, most=0)
    with pytest.raises(ValueError, match="requests"):
        simulate_blocks([], MODELS, where, SIZES, NODES, TIMES).quantile(0.5)
    for call in (
        lambda sizes, nodes: simulate_blocks([], MODELS, where, sizes, nodes, TIMES),
        lambda sizes, nodes: place(MODELS, RATES, sizes, nodes),
    ):
        with pytest.raises(ValueError, match="'b2' is missing"):
            call({name: size for name, size in SIZES.items() if name != "b2"}, NODES)
        with pytest.raises(ValueError, match="sizes"):
            call({**SIZES, "l0": float("nan")}, NODES)
        with pytest.raises(ValueError, match="name of its own"):
            call(SIZES, [*NODES, NODES[0]])
    with pytest.raises(ValueError, match="rates"):
        place(MODELS, {"a": float("nan")}, SIZES, NODES)
    with pytest.raises(ValueError, match="blocks"):
        Model(("a",), (True, False), 1.0, 1.0)
    with pytest.raises(ValueError, match="memory"):
        Node("a", "b", 0.0)
    with pytest.raises(ValueError, match="read"):
        BlockTimes(0.0, -1.0, 0.0)

"""What BlockLLM's experiments say if rows get other tenants' blocks, or nothing is batched across tenants.

Steps take the time that is said here: reading each block once, and a little a row. So nothing here depends on how busy the machine is.
"""

from __future__ import annotations

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch
from tests.properties.sabotage import PAYS, record_of, verdict_of

from assay.evidence.types import Verdict
from assay.evidence.verdict import judge
from assay.experiments import experiments_of
from assay.experiments.serving import blockllm as room
from assay.experiments.serving import blockllm_tenants as tenants
from assay.methods.core.fleet.traces import Request
from assay.methods.serving.blockllm import Answer, Engine, SharedModel
from assay.methods.serving.blockllm.shared import SharedLinear

P95, USE = "blockllm/p95-latency-reduction", "blockllm/gpu-utilisation-gain"
POINT = {"model": "bytes", "steps": 8, "requests": 16, "skew": 1.0, "load": 2.0, "traces": 3, "windows": 1}
real_replay, real_house, real_fitted = room.replay, room.House, room.fitted


def told(call):
    """A step's seconds are those of its passes: ten milliseconds each, and one a row."""
    engine = call.__self__
    before = len(engine.running)
    found = call()
    rows = len(engine.running) + len(found)
    return found, 0.01 * (rows - before + 1) + 0.001 * rows


@pytest.fixture(scope="module")
def house():
    """All arms, made once: what a test breaks is not in them."""
    return real_house(room.base_model("bytes"), POINT["steps"])


def shares(engine):
    return getattr(getattr(engine, "batch", None), "shared", None) is not None


def is_zoo(engine, house):
    return shares(engine) and engine.batch.shared is house.shared


@pytest.fixture(scope="module")
def known():
    return {}


@pytest.fixture
def granted(monkeypatch, house, known):
    """The house, under that clock; arms other than the zoo have answered each trace once."""

    def replay(engines, asked, policy):
        if any(is_zoo(engine, house) for engine in engines.values()):
            return real_replay(engines, asked, policy)
        kinds = tuple(tenant for tenant, engine in engines.items() if shares(engine))
        first = next(iter(engines.values()))
        key = (type(first).__name__, kinds, policy.__name__, *((one.request, *one.ids) for one in asked))
        if key not in known:
            known[key] = real_replay(engines, asked, policy)
        return known[key]

    monkeypatch.setattr(room, "timed", told)
    monkeypatch.setattr(room, "replay", replay)
    monkeypatch.setattr(room, "House", lambda base, steps: house)
    monkeypatch.setattr(room, "_simulated_too", lambda house, seen: {})
    monkeypatch.setattr(room, "_equivalence_too", lambda house, seen: {})
    return house


@pytest.mark.parametrize("claim", [P95, pytest.param(USE, marks=pytest.mark.slow)])
def test_where_steps_cost_the_same_for_any_rows_the_zoo_pays(claim, granted):
    found = record_of(claim, POINT)
    assert judge(found).verdict in PAYS
    assert found.quality.high < 1e-6
    assert min(found.quality.controls[name] for name in ("deleted", "random", "rival")) > 1e-2
    assert found.details["tokens_the_same_as_with_copies"] == 1
    assert found.details["bytes"]["zoo"] < 0.7 * found.details["bytes"]["separate"]
    times = math.prod(found.details["times_less_by_trace"]["free"]) ** (1 / POINT["traces"])
    assert found.free == pytest.approx(100 * (1 - 1 / times) if claim == P95 else 100 * (times - 1))
    assert found.measured.low > max(found.free, found.exact)
    told = found.details["bytes"]
    adapters = sum(
        told["tenants"][name] - told["base"] for name, (_, kind) in room.TENANTS.items() if kind == "adapter"
    )
    assert 0 <= told["zoo_in_memory"] - told["zoo"] <= adapters + 1024  # those that meet stand side by side once more
    assert told["separate_in_memory"] == pytest.approx(6 * told["base"], rel=0.01)


@pytest.mark.parametrize("claim", [P95, pytest.param(USE, marks=pytest.mark.slow)])
def test_with_the_blocks_of_another_tenant_it_does_not(claim, granted, monkeypatch):
    honest, names = granted.shared.use, list(room.TENANTS)
    others = {name: names[(i + 2) % len(names)] for i, name in enumerate(names)}
    monkeypatch.setattr(granted.shared, "use", lambda rows: honest([others[name] for name in rows]))
    assert verdict_of(claim, POINT) not in PAYS


@pytest.mark.slow
@pytest.mark.parametrize("claim", [P95, USE])
def test_with_the_adapters_of_other_rows_it_does_not(claim, granted, monkeypatch):
    def turned(self, slots):
        down, up, scale = stacked(self, slots)
        return down.roll(1, 0), up.roll(1, 0), scale

    stacked = SharedLinear.stacked
    monkeypatch.setattr(SharedLinear, "stacked", turned)
    assert verdict_of(claim, POINT) not in PAYS


@pytest.mark.parametrize("claim", [P95, pytest.param(USE, marks=pytest.mark.slow)])
def test_with_other_weights_in_the_zoo_than_were_fine_tuned_it_does_not(claim, granted):
    """What is answered is held against models that were made without the zoo."""
    one = granted.zoo.blocks[granted.zoo.chains["inspect"].blocks["layer 0"]].tensors["mlp.up_proj.weight"]
    before = one.clone()
    one.mul_(1.2)
    try:
        assert verdict_of(claim, POINT) not in PAYS
    finally:
        one.copy_(before)


@pytest.mark.slow
@pytest.mark.parametrize("claim", [P95, USE])
def test_where_all_are_the_base_nothing_is_shown(claim, granted, monkeypatch):
    """Equivalence driven to the end: one chain for everybody."""
    base = granted.zoo.chains["base"]
    monkeypatch.setattr(granted, "shared", SharedModel(granted.zoo, dict.fromkeys(room.TENANTS, base)))
    one = Engine(granted.shared)
    monkeypatch.setitem(granted.arms, room.ZOO, (dict.fromkeys(room.TENANTS, one), room.turns))
    assert verdict_of(claim, POINT) is Verdict.DOES_NOT_PAY


@pytest.mark.parametrize("claim", [USE, pytest.param(P95, marks=pytest.mark.slow)])
def test_without_batches_across_tenants_it_does_not(claim, granted, monkeypatch):
    """An engine for each tenant on the same shared blocks, in turn: the memory is saved, and nothing is merged."""
    apart = {tenant: Engine(granted.shared) for tenant in room.TENANTS}
    monkeypatch.setitem(granted.arms, room.ZOO, (apart, room.turns))
    assert verdict_of(claim, POINT) is Verdict.DOES_NOT_PAY


@pytest.mark.slow
@pytest.mark.parametrize("claim", [P95, USE])
def test_a_slower_zoo_refutes(claim, granted, monkeypatch):
    def slow(call):
        found, seconds = told(call)
        return found, seconds * (9 if is_zoo(call.__self__, granted) else 1)

    monkeypatch.setattr(room, "timed", slow)
    assert verdict_of(claim, POINT) is Verdict.REFUTED


@pytest.mark.slow
@pytest.mark.parametrize("claim", [P95, USE])
def test_an_own_loop_as_fast_as_the_zoo_decides(claim, granted, monkeypatch):
    """The exact rival counts: four times as fast, it is better than one batch of all."""

    def fast(call):
        found, seconds = told(call)
        return found, seconds / (4 if isinstance(call.__self__, room.LoopEngine) else 1)

    monkeypatch.setattr(room, "timed", fast)
    monkeypatch.setattr(room, "replay", real_replay)
    found = record_of(claim, POINT)
    assert judge(found).verdict not in PAYS
    assert found.exact > found.measured.median


# ---- what a replay and a rival are


class Clerk:
    """An engine that takes a step a token."""

    def __init__(self):
        self.rows, self.passes = [], []

    @property
    def busy(self):
        return bool(self.rows)

    def submit(self, tenant, ids, new_tokens):
        self.rows.append(Answer(tenant, ids, new_tokens))
        return self.rows[-1]

    def step(self):
        for row in self.rows:
            row.made.append(0)
        done = [row for row in self.rows if row.finished]
        self.rows = [row for row in self.rows if not row.finished]
        return done


def asked(*times):
    return [room.Asked(Request(at, 4, new, tenant), [1, 2, 3, 4]) for at, new, tenant in times]


def test_the_clock_of_a_replay(monkeypatch):
    monkeypatch.setattr(room, "timed", lambda call: (call(), 1.0))
    requests = asked((0.0, 2, "a"), (0.5, 2, "b"), (100.0, 1, "a"))
    found = room.replay({"a": Clerk(), "b": Clerk()}, requests, room.turns)
    assert found.latencies == [3.0, 3.5, 1.0]  # a b a b, then a long pause
    assert found.busy == 5.0
    first = room.replay({"a": Clerk(), "b": Clerk()}, requests, room.first_come)
    assert first.latencies == [2.0, 3.5, 1.0]
    one = Clerk()
    together = room.replay({"a": one, "b": one}, requests, room.turns)
    assert together.latencies == [2.0, 2.5, 1.0]
    assert together.busy == 4.0


def test_the_compiled_loop_answers_as_the_model(house):
    house_base = house.base
    ids = list(b"def main(")
    plain = Engine(house_base.model).generate([("x", ids)], 8)[0]
    loop = room.LoopEngine(house_base.model)
    rows = [loop.submit("x", ids, 8), loop.submit("x", ids[:4], 3)]
    while loop.busy:
        loop.step()
    assert rows[0].made == plain
    assert len(rows[1].made) == 3
    assert loop.pool.free == loop.pool.pages


def test_what_is_fine_tuned_is_what_its_kind_says(house):
    from safetensors.torch import load_file

    one = house.base
    kinds = {kind: tenant for tenant, (_, kind) in tenants.TENANTS.items()}
    folder = tenants.tuned(one, kinds[tenants.TOP], 8)
    changed = load_file(folder / "tensors.safetensors")
    assert changed
    first = len(one.model.model.layers) - tenants.TOP_LAYERS
    assert all(int(name.split(".")[2]) >= first for name in changed)
    again = tenants.tuned(one, kinds[tenants.TOP], 8)
    assert again == folder != tenants.tuned(one, kinds[tenants.WHOLE], 8)
    assert "embed_tokens" in " ".join(load_file(tenants.tuned(one, kinds[tenants.WHOLE], 8) / "tensors.safetensors"))


@pytest.mark.slow
def test_tenants_know_their_own_texts_better_than_their_base_and_others_less(house):
    found = tenants.fine_tuned(dataclasses.replace(house.base, name="as one that decides"), 40)
    assert found.keys() == tenants.TENANTS.keys()
    for one in found.values():
        low, mean, high = one["own"]
        assert 0 < low <= mean <= high < one["before"]
        assert one["others"] < mean


def test_a_tenant_that_is_its_base_is_none(house, monkeypatch, tmp_path):
    same = tenants.nats(house.base, house.base.model, ["argparse"], tenants.WINDOWS) + [1.0] * 5
    (tmp_path / tenants.TOLD).write_text(json.dumps({"before": same, "after": same}))
    monkeypatch.setattr(tenants, "tuned", lambda *given: tmp_path)
    assert tenants.fine_tuned(house.base, POINT["steps"])["argparse"]["own"] == [0, 0, 0]
    with pytest.raises(ValueError, match="argparse must be fine-tuned"):
        tenants.fine_tuned(dataclasses.replace(house.base, name="as one that decides"), POINT["steps"])


def test_what_a_tenant_is_judged_on_is_what_it_was_not_trained_on(house):
    """By hand, for one window; and no window reaches into the text that was trained on."""
    seen = []
    model = house.own["typing"]
    hook = model.register_forward_pre_hook(lambda m, args: seen.extend(args[0].tolist()))
    found = tenants.nats(house.base, model, ["typing"], 3)
    hook.remove()
    trained, kept = (bytes(part.tolist()) for part in tenants.ids_of(house.base, "typing"))
    assert len(seen) == len(found) == 3
    for window, told in zip(seen, found, strict=True):
        at = kept.index(bytes(window))
        wanted = torch.tensor(list(kept[at + 1 : at + 1 + len(window)]))
        with torch.inference_mode():
            said = model(torch.tensor([window])).logits[0].log_softmax(-1)
        assert told == pytest.approx(float(-said[torch.arange(len(window)), wanted].mean()), abs=1e-5)
    assert trained + kept == tenants.text_of("typing").encode()


def test_own_models_are_the_zoos_without_its_code(house):
    for tenant, one in house.own.items():
        theirs = house.zoo.monolith(tenant, merge=True).state_dict()
        for name, tensor in one.state_dict().items():
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-6)
        ours = {tensor.untyped_storage().data_ptr() for tensor in one.parameters()}
        assert not ours & {tensor.untyped_storage().data_ptr() for tensor in house.shared.tensors()}


def test_another_base_of_that_name_makes_another_tenant(house, monkeypatch, tmp_path):
    trained = []
    monkeypatch.setattr(tenants, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(tenants.training, "train", lambda *given, **options: trained.append(1))
    one = tenants.tuned(house.base, "argparse", POINT["steps"])
    assert tenants.tuned(house.base, "argparse", POINT["steps"]) == one
    assert len(trained) == 1
    assert tenants.tuned(dataclasses.replace(house.base, digest="x"), "argparse", POINT["steps"]) != one
    assert len(trained) == 2


def test_times_are_tried_on_other_traces_than_they_were_fitted_to(house, monkeypatch):
    seen = room.compared(house, 3, 1.0, 0.7, 3)
    fitted = []
    monkeypatch.setattr(room, "fitted", lambda passes: fitted.append(len(passes)) or real_fitted(passes))
    said = room.simulated(house, seen)
    assert fitted == [len(seen.runs[name][0].passes) for name in (room.ZOO, room.SEPARATE)]
    assert [one["p95_measured"] for one in said[room.ZOO]["traces"]] == [run.p95 for run in seen.runs[room.ZOO][1:]]
    few = dataclasses.replace(seen, traces=seen.traces[:1])
    with pytest.raises(ValueError, match="at least two"):
        room.simulated(house, few)


def test_the_simulation_and_the_thresholds_stand_beside(house):
    seen = room.compared(house, 6, 1.0, 0.7, 2)
    said = room.simulated(house, seen)
    for name in (room.ZOO, room.SEPARATE):
        assert math.isfinite(said["error_of_p95"][name])
        assert said[name]["traces"][0]["p95_simulated"] > 0
    cluster = said["four servers of three devices, simulated only"]
    assert all(0 < one["busy"] <= 1 for one in cluster.values())
    curve = room.equivalence(house, 24)["curve"]
    sizes = [one["bytes"] for one in curve]
    assert sizes == sorted(sizes, reverse=True)
    assert max(curve[0]["divergence"].values()) < 1e-6


def test_a_pass_is_described_by_what_it_reads():
    models = {name: SimpleNamespace(blocks=blocks) for name, blocks in (("a", ("x", "y")), ("b", ("x", "z")))}
    sizes = {"x": 10.0, "y": 1.0, "z": 2.0}
    one = SimpleNamespace(tenants=("a", "b", "b"), tokens=3, seconds=0.5)
    assert room.features(one, models, sizes) == (3, 13.0, 10.0 * 3 + 1.0 + 2.0 * 2, 0.5)


def test_the_experiments_load_and_their_points_are_named():
    found = experiments_of("blockllm")
    assert {one.claim for one in found} == {P95, USE}
    for one in found:
        for scale in ("small", "full"):
            assert one.decides[scale]["model"] == "smollm2-135m"

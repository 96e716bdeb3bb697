"""What attention offloading computes: traffic, the roofline of one kind of device and of two, staggered batches, plans of a price table."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from tests.tiny import tiny_model

from assay.methods.core.fleet.hardware import Device, Link, ModelShape
from assay.methods.core.fleet.traces import Request
from assay.methods.core.generation.merging import Partial, merged, partial_attention
from assay.methods.serving.attention_offloading import (
    DEVICES,
    H20,
    H100,
    IDEAL,
    LLAMA3_70B,
    LLAMA_33B,
    LLAMA_65B,
    NETWORK,
    USUAL_NETWORK,
    Holder,
    LatentShape,
    LocalPool,
    Meter,
    Reached,
    Setup,
    Shape,
    Split,
    Timeline,
    Whole,
    at_best,
    attention_seconds,
    best_split,
    best_whole,
    bytes_a_step,
    model_seconds,
    plan,
    replica_of,
    required_bandwidth,
    server,
    shape_of,
    shares,
    simulated,
    staggered,
)
from assay.methods.serving.attention_offloading.holder import Spec, newest

SMALL = Shape(layers=4, width=64, heads=8, kv_heads=2, head_dim=8, parameters=100_000)
QUIET = Setup(interconnect=None, network=None)
PLAIN = Setup(interconnect=None, network=None, overlap=False)

# ------------------------------------------------------------------------------------------------------------------ traffic


@pytest.mark.parametrize("shape", [SMALL, LLAMA_65B, LLAMA3_70B])
def test_traffic_is_the_papers_closed_form(shape):
    group = shape.heads // shape.kv_heads
    expected = (2 + 2 / group) * shape.kv_bytes * shape.width * 7 * shape.layers
    assert bytes_a_step(shape, 7) == expected
    assert bytes_a_step(shape, 0) == 0


def test_windows_and_latent_vectors_change_what_a_token_costs():
    plain = Shape(2, 64, 8, 2, 8, 1000)
    assert plain.cache_bytes(10) == ModelShape(2, 64, 8, 2, 8, 1000).cache_bytes(10) == 2 * 2 * 2 * 8 * 2 * 10
    mixed = Shape(2, 64, 8, 2, 8, 1000, windows=(0, 4))
    assert mixed.cache_bytes(10) == plain.cache_bytes(10) * (10 + 4) / 20
    assert mixed.cache_bytes(3) == plain.cache_bytes(3)
    latent = LatentShape(2, 64, 8, 1, 8, 1000, latent=16, rotary=4)
    assert latent.cache_bytes(10) == 2 * (16 + 4) * 2 * 10
    assert latent.sent() == (8 * 20, 20, 8 * 16)
    assert bytes_a_step(latent, 1) == (160 + 20 + 128) * 2 * 2


def test_the_shape_of_a_model():
    model = tiny_model(num_hidden_layers=3, tie_word_embeddings=True)
    shape = shape_of(model)
    assert (shape.layers, shape.heads, shape.kv_heads, shape.head_dim, shape.width) == (3, 4, 2, 16, 64)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.kv_bytes == shape.weight_bytes == 4
    untied = shape_of(tiny_model(num_hidden_layers=3))
    assert untied.parameters == shape.parameters  # a second matrix of embeddings that is only looked up
    assert shape_of(tiny_model("Mistral", sliding_window=9)).windows == (9, 9)


def test_needed_bandwidth_falls_with_the_context_and_saturates_with_the_batch():
    split = Split(LLAMA3_70B, H100, 1, H20, 1, 1, IDEAL)
    by_context = [split.required_bandwidth(64, 64.0 * context) for context in (512, 2048, 8192, 32768)]
    assert by_context == sorted(by_context, reverse=True)
    rows = (1, 10, 50, 100, 200)  # memory-bound: the slices read the weights once, whatever the batch
    ridge = LLAMA3_70B.weight_bytes * H100.flops / (2 * H100.bandwidth)
    assert max(rows) < ridge
    needed = [split.required_bandwidth(n, n * 8192.0) for n in rows]
    assert needed == sorted(needed)
    assert needed[1] > 8 * needed[0]
    assert needed[-1] < 1.3 * needed[-2]  # for twice the rows
    most = bytes_a_step(LLAMA3_70B, 1) / (0.2 * attention_seconds(LLAMA3_70B, H20, 1, 1, 8192.0))
    assert needed[-1] < most  # what attention alone allows, whatever the batch
    assert required_bandwidth(SMALL, 10, 0.5, 0.5) == bytes_a_step(SMALL, 10) / 0.2


def test_the_papers_thirty_gigabytes_a_second():
    split = Split(LLAMA3_70B, H100, 1, H20, 1, 1, IDEAL)
    assert max(split.required_bandwidth(n, 8192.0 * n) for n in range(1, 301)) < 30e9
    assert 25e9 < split.required_bandwidth(300, 4096.0 * 300) < 1.25 * 30e9


def test_a_meter_tells_prompts_from_decoding():
    meter = Meter()
    meter.count("query", 10)
    meter.count("output", 20)
    meter.count("prompt", 1000)
    assert meter.decoding == 30
    assert meter.messages == {"query": 1, "output": 1, "prompt": 1}
    meter.clear()
    assert meter.decoding == 0


# ----------------------------------------------------------------------------------------------------------------- roofline


def test_the_roofline_is_the_papers():
    n, d, e = LLAMA_65B.parameters, LLAMA_65B.width, 2
    for rows in (1, 64, 1000):
        expected = max(2 * n * rows / H100.flops, e * (n + 2 * rows * d) / H100.bandwidth)
        assert model_seconds(LLAMA_65B, H100, 1, rows) == pytest.approx(expected)
        assert model_seconds(LLAMA_65B, H100, 4, rows) == pytest.approx(expected / 4)
    group = 8
    cached = 2 * 80 * (d / group) * e * 4096 * 32
    assert attention_seconds(LLAMA3_70B, H20, 4, 32, 32 * 4096.0) == pytest.approx(cached / (4 * H20.bandwidth))
    fast = Device("fast", 1e30, H20.bandwidth, H20.memory)
    assert attention_seconds(LLAMA3_70B, fast, 4, 32, 32 * 4096.0) == attention_seconds(
        LLAMA3_70B, H20, 4, 32, 32 * 4096.0
    )
    half = Setup(Reached(0.5, 0.5, 0.5), None, None)
    assert model_seconds(LLAMA_65B, H100, 1, 64, half) == pytest.approx(2 * model_seconds(LLAMA_65B, H100, 1, 64))


def test_sums_over_devices_cost_what_the_interconnect_takes():
    ring = Setup(Reached(1, 1, 1), Link(1e9, 1e-5), None)
    extra = model_seconds(SMALL, H100, 4, 10, ring) - model_seconds(SMALL, H100, 4, 10)
    assert extra == pytest.approx(2 * 4 * (1e-5 + 1.5 * 10 * 64 * 2 / 1e9))
    assert model_seconds(SMALL, H100, 1, 10, ring) == model_seconds(SMALL, H100, 1, 10)


def test_room_is_what_weights_leave():
    whole = Whole(LLAMA3_70B, H100, 4, IDEAL)
    assert whole.room(8192) == math.floor((4 * 80e9 - 139e9) / LLAMA3_70B.cache_bytes(8192))
    split = Split(LLAMA3_70B, H100, 2, H20, 4, 2, IDEAL)
    assert split.room(8192) == math.floor(4 * 96e9 / LLAMA3_70B.cache_bytes(8192))
    assert Split(LLAMA3_70B, H100, 1, H20, 4, 2, IDEAL).room(8192) == 0
    assert Whole(LLAMA3_70B, H100, 1, IDEAL).room(8192) == 0


def test_one_batch_leaves_each_pool_idle_while_the_other_works():
    alone = Split(SMALL, H100, 1, H20, 1, 1, PLAIN).step(8, 8 * 100.0)
    model, attention = alone.model, alone.attention
    assert alone.seconds == pytest.approx(model + attention)
    assert alone.compute_busy == pytest.approx(model / (model + attention))
    assert alone.memory_busy == pytest.approx(attention / (model + attention))
    twice = Split(SMALL, H100, 1, H20, 1, 2, PLAIN).step(16, 16 * 100.0)
    assert twice.seconds == pytest.approx(max(2 * model, 2 * attention))
    assert max(twice.compute_busy, twice.memory_busy) == pytest.approx(1)


def test_memory_without_end_and_a_free_network_reach_the_compute_roofline():
    memory = Device("endless", 1e30, 1e30, 1e30)
    for batches in (2, 3):
        split = Split(LLAMA3_70B, H100, 2, memory, 8, batches, QUIET)
        rows = 3000 * batches
        step = split.step(rows, rows * 8192.0)
        slices = model_seconds(LLAMA3_70B, H100, 2, 3000, QUIET)
        assert step.seconds == pytest.approx(batches * slices / split.replicas)
        rate = 2 * LLAMA3_70B.parameters * rows / step.seconds / split.replicas
        assert rate == pytest.approx(2 * 0.6 * H100.flops)  # what two devices reach of their peak


@pytest.mark.parametrize("shape", [LLAMA_33B, LLAMA3_70B])
@pytest.mark.parametrize("rows", [1, 16, 256])
def test_splitting_one_kind_of_device_is_never_slower_than_half_of_the_whole(shape, rows):
    """Of 2 c devices c have the weights and c the cache: both halves of a step take twice as long, and one waits for the other."""
    for count, context in itertools.product((1, 2), (64, 4096, 65536)):
        whole = Whole(shape, H100, 2 * count, QUIET).step(rows, float(rows * context))
        for batches in (1, 2):
            split = Split(shape, H100, count, H100, count, batches, QUIET).step(rows, float(rows * context))
            most = 2 * whole.seconds if batches == 1 else 4 * whole.seconds
            assert split.seconds <= most * (1 + 1e-9)
        two = Split(shape, H100, count, H100, count, 2, QUIET).step(2 * rows, 2.0 * rows * context)
        assert 2 * rows / two.seconds >= rows / whole.seconds / 2 * (1 - 1e-9)  # tokens a second, each batch as large


def test_beginning_early_hides_the_newest_key_and_value():
    usual, early = (
        Split(LLAMA_65B, H100, 2, H20, 4, 1, Setup(network=NETWORK, overlap=overlap)).step(100, 100 * 4096.0)
        for overlap in (False, True)
    )
    assert early.seconds < usual.seconds
    shared = Split(LLAMA3_70B, H100, 2, H20, 4, 1)
    alone = Split(LLAMA_65B, H100, 2, H20, 4, 1)
    saved = alone.overlap_saving(100, 100 * 4096.0)
    assert 0.03 < saved < 0.2
    assert 0 < shared.overlap_saving(100, 100 * 4096.0) < saved / 2
    none = Split(LLAMA_65B, H100, 2, H20, 4, 1, QUIET)
    assert none.overlap_saving(100, 1.0) < 1e-3  # nothing to attend to: nothing to hide behind


def test_latency_is_paid_in_every_layer():
    fast, slow = (
        Split(LLAMA_65B, H100, 2, H20, 4, 1, Setup(network=link)).step(1, 100.0).seconds
        for link in (NETWORK, USUAL_NETWORK)
    )
    assert slow - fast == pytest.approx(80 * (66.6e-6 - 33.0e-6))


def test_heads_that_cannot_be_shared_are_shared_by_rows():
    split = Split(LLAMA3_70B, H100, 2, H20, 3, 1, IDEAL)
    assert split.partition == "rows"
    assert Split(LLAMA3_70B, H100, 2, H20, 4).partition == "heads"
    even, uneven = split.step(3, 3 * 4096.0), split.step(4, 4 * 4096.0)
    assert uneven.attention == pytest.approx(2 * even.attention)  # one device has two rows


# ---------------------------------------------------------------------------------------------------------------- staggered


def test_two_equal_batches_leave_nobody_idle():
    for tokens in (2, 3, 7):
        run = staggered(2.0, 2.0, batches=2, layers=5, tokens=tokens)
        assert run.utilisation("replica 0") == run.utilisation("memory") == 1.0
        assert run.throughput == pytest.approx(2 / (5 * (2.0 + 2.0)))


def test_a_batch_by_itself_keeps_a_pool_busy_for_its_share():
    run = staggered(3.0, 1.0, batches=1, layers=5, tokens=3)
    assert run.utilisation("replica 0") == pytest.approx(3 / 4)
    assert run.utilisation("memory") == pytest.approx(1 / 4)
    assert run.throughput == pytest.approx(1 / (5 * 4))


@pytest.mark.parametrize("batches", [2, 3, 4, 5])
def test_n_batches_on_n_less_one_replicas(batches):
    """Where attention takes its n-th of the time nobody waits: every batch is as fast as if it were alone."""
    attention = 12.0 / (batches - 1)
    run = staggered(12.0, attention, batches=batches, layers=6, tokens=5)
    assert run.token_seconds == pytest.approx(6 * (12.0 + attention))
    assert run.throughput == pytest.approx(batches / (6 * (12.0 + attention)))
    for lane in [*(f"replica {i}" for i in range(batches - 1)), "memory"]:
        assert run.utilisation(lane) == pytest.approx(1.0)
    for event in run.timeline.events:
        assert event.lane == "memory" or event.seconds == pytest.approx(12.0)


def test_no_pool_does_two_things_at_once():
    for work, attention, network in itertools.product((1.0, 3.0), (0.5, 2.0), (0.0, 0.7)):
        run = staggered(work, attention, batches=4, layers=3, tokens=3, network_seconds=network, migration_seconds=0.2)
        for lane in run.timeline.lanes:
            mine = sorted((e.start, e.end) for e in run.timeline.events if e.lane == lane)
            assert all(a[1] <= b[0] + 1e-9 for a, b in itertools.pairwise(mine))
        assert len(run.timeline.events) == 2 * 4 * 3 * 3


def test_the_event_simulation_and_the_closed_form_agree():
    for batches, network in itertools.product((1, 2, 3), (None, Link(1e9, 1e-4))):
        setup = Setup(interconnect=None, network=network, overlap=False)
        split = Split(SMALL, H100, 1, H20, 1, batches, setup)
        step = split.step(4 * batches, 4 * batches * 500.0)
        way = step.network / SMALL.layers
        run = staggered(
            step.model / batches / SMALL.layers, step.attention / batches / SMALL.layers,
            batches=batches, layers=SMALL.layers, tokens=6, network_seconds=way,
        )  # fmt: skip
        assert run.token_seconds == pytest.approx(step.seconds, rel=0.05)


def test_slices_rotate():
    assert [replica_of(j, 0, 4) for j in range(4)] == [0, 1, 2, 0]
    assert {replica_of(j, k, 2) for j in range(2) for k in range(9)} == {0}
    with pytest.raises(ValueError, match="slice_seconds and attention_seconds must not both be 0"):
        staggered(0.0, 0.0)
    with pytest.raises(ValueError, match="tokens must be a whole number at least 2"):
        staggered(1.0, 1.0, tokens=1)
    with pytest.raises(ValueError, match="at most 5000000 events"):
        staggered(1.0, 1.0, layers=10**6, tokens=10)


# ------------------------------------------------------------------------------------------------------------------ planner


def test_plans_of_a_price_table():
    plans = plan(LLAMA3_70B, DEVICES, 8192, price=45.0, latency=0.1)
    assert plans
    for found in plans:
        assert found.price <= 45.0
        assert found.seconds <= 0.1
        assert 0 < found.requests <= found.system.room(8192)
    worth = [found.tokens_per_dollar for found in plans]
    assert worth == sorted(worth, reverse=True)
    assert best_whole(plans, H100).system.device is H100
    assert best_split(plans).system.compute != best_split(plans).system.memory
    same = best_split(plans, same=True)
    assert same.system.compute == same.system.memory
    assert plan(LLAMA3_70B, DEVICES, 8192, price=3.0) == []
    assert "H100 + " in best_split(plans).name or "H20 + " in best_split(plans).name


@pytest.mark.parametrize("system", [
    Whole(LLAMA_33B, H100, 2), Split(LLAMA_33B, H100, 1, H20, 2, 2), Split(LLAMA3_70B, H100, 2, H20, 3, 1)
])  # fmt: skip
def test_each_system_is_at_its_own_best(system):
    """No other number of requests that fits makes more tokens a second."""
    context = 8192
    for latency in (None, 0.06):
        found = at_best(system, context, latency=latency)
        for rows in range(1, system.room(context) + 1):
            step = system.step(rows, float(rows * context))
            if latency is None or step.seconds <= latency:
                assert rows / step.seconds <= found.tokens_per_second * (1 + 1e-9)
    assert at_best(system, context, latency=1e-6) is None


def test_long_contexts_want_more_memory_devices():
    for shape, contexts in ((LLAMA_65B, (128, 512, 1024, 4096)), (LLAMA3_70B, (512, 2048, 4096, 8192))):
        chosen = []
        for context in contexts:
            splits = [at_best(Split(shape, H100, 2, H20, b, 2), context) for b in range(1, 25)]
            chosen.append(max((one.tokens_per_dollar, one.system.memory_count) for one in splits if one is not None)[1])
        assert chosen == sorted(chosen)
        assert chosen[-1] >= 7 * chosen[0]


def test_shared_keys_reduce_the_advantage():
    """The same model with a key a head and with eight heads a key, at the same context and degree."""
    alone, shared = (Shape(80, 8192, 64, kv, 128, 65_000_000_000) for kv in (64, 8))
    gains = []
    for shape in (alone, shared):
        split, whole = (at_best(one, 8192) for one in (Split(shape, H100, 2, H20, 4, 2), Whole(shape, H100, 4)))
        gains.append(split.tokens_per_second / whole.tokens_per_second)
    assert gains[0] > gains[1]


def test_requests_run_through_a_plan():
    """All requests alike, as many as fit: the event simulation takes what the closed form says."""
    system = Split(LLAMA_65B, H100, 2, H20, 4, 2)
    room = system.room(4096)
    found = simulated(system, [Request(0.0, 4000, 97)] * room)
    assert not found.refused
    (rows,) = {turn.rows for turn in found.turns if turn.rows}
    assert rows == room
    middle = [turn for turn in found.turns if turn.rows][48]
    assert middle.end - middle.start == pytest.approx(system.step(room, float(room * 4049)).seconds, rel=0.01)
    with pytest.raises(ValueError, match="system must have room for the weights"):
        server("too small", Whole(LLAMA_65B, H100, 1))


def test_bad_systems_are_named():
    for make, words in (
        (lambda: Whole(LLAMA3_70B, H100, 3), "count must divide the 8 key-value heads, got 3"),
        (lambda: Split(SMALL, H100, 0, H20, 1), "compute_count must be a whole number at least 1"),
        (lambda: Split(SMALL, H100, 1, H20, 1, 0), "batches must be a whole number at least 1"),
        (lambda: Reached(arithmetic=1.5), "arithmetic must be a finite number above 0 and at most 1"),
        (lambda: Reached(memory=float("nan")), "memory must be a finite number"),
        (lambda: Shape(2, 64, 8, 2, 8, 1000, windows=(1,)), "windows must be one for each of the 2 layers"),
        (lambda: Shape(2, 64, 8, 2, 8, 1000, window=4, windows=(1, 2)), "window must be 0 where windows are given"),
        (lambda: LatentShape(2, 64, 8, 2, 8, 1000), "kv_heads must be 1"),
        (lambda: required_bandwidth(SMALL, 1, 0.0, 1.0), "model_seconds must be a finite number above 0"),
        (lambda: plan(SMALL, DEVICES, 0), "context must be a whole number at least 1"),
        (lambda: plan(SMALL, DEVICES, 10, counts=(0,)), "counts must be a whole number at least 1"),
        (lambda: at_best(Whole(SMALL, H100, 1), 10, latency=0), "latency must be a finite number above 0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            make()


# ----------------------------------------------------------------------------------------------------------------- timeline


def test_overlap_is_time_in_which_both_work():
    line = Timeline()
    for start, end in ((0.0, 2.0), (1.0, 3.0), (5.0, 6.0)):
        line.add("model", start, end)
    line.add("memory 0", 2.5, 5.5, batch=1)
    assert line.busy("model") == 4.0
    assert line.together("model", "memory 0") == 1.0
    assert line.busy("model", "memory 0") == 6.0
    cut = line.within(1.0, 4.0)
    assert (cut.start, cut.end) == (1.0, 4.0)
    assert cut.busy("model") == 2.0
    assert [len(row) for row in line.text(40).splitlines()[:2]] == [51, 51]
    assert Timeline().text(3).endswith("0 to 0 ms")
    with pytest.raises(ValueError, match="end must not lie before start"):
        line.add("model", 1.0, 0.0)


# ------------------------------------------------------------------------------------------------------------- what is held


def qkv(rows=3, heads=4, kv=2, tokens=9, dim=8, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return (
        torch.randn(rows, heads, 1, dim, dtype=dtype),
        torch.randn(rows, kv, tokens, dim, dtype=dtype),
        torch.randn(rows, kv, tokens, dim, dtype=dtype),
    )


def direct(q, k, v, scale, starts=(0, 0, 0), window=0):
    tokens = k.shape[2]
    places = torch.arange(tokens)
    seen = places >= torch.tensor(starts)[:, None]
    if window:
        seen = seen & (places > tokens - 1 - window)
    return partial_attention(q, k, v, visible=seen[:, None, None], scale=scale).output


def test_the_merge_is_exact_for_any_split_and_any_order():
    q, k, v = qkv(tokens=12)
    q = q * 300  # logits in the thousands
    whole = partial_attention(q, k, v)
    for cuts in ([0, 12], [0, 0, 5, 12], [0, 1, 2, 11, 12, 12], list(range(13))):
        parts = [partial_attention(q, k[:, :, a:b], v[:, :, a:b]) for a, b in itertools.pairwise(cuts)]
        for order in (parts, parts[::-1], [merged(parts[1:]), parts[0]] if len(parts) > 1 else parts):
            found = merged(order)
            assert torch.allclose(found.output, whole.output, rtol=1e-12, atol=1e-12)
            assert torch.allclose(found.lse, whole.lse, rtol=1e-12)
    empty = partial_attention(q, k[:, :, :0], v[:, :, :0])
    assert torch.equal(merged([empty, whole]).output, whole.output)
    assert torch.equal(merged([empty, empty]).output, empty.output)


def test_the_part_of_one_token():
    q, k, v = qkv(tokens=1)
    found, expected = newest(q, k, v, 0.3), partial_attention(q, k, v, scale=0.3)
    assert torch.allclose(found.output, expected.output)
    assert torch.allclose(found.lse, expected.lse)
    half = newest(q.bfloat16(), k.bfloat16(), v.bfloat16(), 0.3)
    assert isinstance(half, Partial)
    assert half.output.dtype == half.lse.dtype == torch.float32


@pytest.mark.parametrize("window", [0, 1, 2, 5])
@pytest.mark.parametrize("starts", [(0, 0, 0), (0, 2, 4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_asking_early_is_attention_over_everything(window, starts, dtype):
    q, k, v = qkv(tokens=30, dtype=dtype)
    early, usual = Holder(), Holder()
    for holder in (early, usual):
        holder.open(0, Spec(starts, (window,), 4))
        holder.fill(0, 0, k[:, :, :4], v[:, :, :4])
        holder.fill(0, 0, k[:, :, 4:6], v[:, :, 4:6])
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    for token in range(6, 30):
        key, value = k[:, :, token : token + 1], v[:, :, token : token + 1]
        early.ask(0, 0, q, 0.3)
        found = early.give(0, 0, key, value)
        assert found.dtype == dtype
        expected = direct(q, k[:, :, : token + 1], v[:, :, : token + 1], 0.3, starts, window).to(dtype)
        assert torch.allclose(found, expected, **tolerance)
        assert torch.allclose(usual.whole(0, 0, q, key, value, 0.3), expected, **tolerance)
    if 0 < window < 5:
        assert early.bytes() <= 2 * k[:, :, : 2 * window + 4].nbytes  # what has left the window is gone
    early.close(0)
    assert early.bytes() == 0


def test_a_row_that_sees_nothing_earlier():
    """Its first token is the newest: what is padding for it must not become NaN."""
    q, k, v = qkv(tokens=4)
    holder = Holder()
    holder.open(0, Spec((0, 3, 1), (0,)))
    holder.fill(0, 0, k[:, :, :3], v[:, :, :3])
    holder.ask(0, 0, q, 0.3)
    found = holder.give(0, 0, k[:, :, 3:], v[:, :, 3:])
    assert torch.allclose(found, direct(q, k, v, 0.3, (0, 3, 1)))
    assert torch.allclose(found[1, :, 0], v[1].repeat_interleave(2, 0)[:, 3])


def test_tokens_are_forgotten_again():
    q, k, v = qkv(tokens=9)
    holder = Holder()
    holder.open(0, Spec((0, 0, 0), (0,)))
    holder.fill(0, 0, k, v)
    holder.rewind(0, 4)
    found = holder.whole(0, 0, q, k[:, :, 5:6], v[:, :, 5:6], 0.3)
    assert torch.allclose(found, direct(q, k[:, :, :6], v[:, :, :6], 0.3))
    with pytest.raises(ValueError, match="tokens must be at most the 6 that layer 0 holds"):
        holder.rewind(0, 7)


def test_values_may_be_narrower_than_keys():
    q, k, v = qkv(tokens=5)
    v = v[..., :3]
    holder = Holder()
    holder.open(0, Spec((0, 0, 0), (0,)))
    holder.fill(0, 0, k[:, :, :4], v[:, :, :4])
    holder.ask(0, 0, q, 0.3)
    found = holder.give(0, 0, k[:, :, 4:], v[:, :, 4:])
    assert torch.allclose(found, direct(q, k, v, 0.3))


def test_shares_cover_everything_once():
    for partition, rows, count in (("heads", 3, 2), ("rows", 7, 3), ("rows", 2, 4)):
        seen = torch.zeros(rows, 8, dtype=torch.int64)
        kept = torch.zeros(rows, 4, dtype=torch.int64)
        for share in shares(count, partition, rows, heads=8, kv_heads=4):
            seen[share.rows, share.heads] += 1
            kept[share.rows, share.kv_heads] += 1
            assert (share.heads.stop - share.heads.start) == 2 * (share.kv_heads.stop - share.kv_heads.start)
        assert bool((seen == 1).all())
        assert bool((kept == 1).all())
    with pytest.raises(ValueError, match="must divide the 3 key-value heads, got 2; partition 'rows' shares requests"):
        shares(2, "heads", 4, 9, 3)


def test_bad_pools_are_named():
    pool = LocalPool(slots=1)
    with pytest.raises(ValueError, match="partition must be one of 'heads', 'rows', got 'layers'"):
        LocalPool(partition="layers")
    with pytest.raises(ValueError, match="slot 0 has no batch: open one first"):
        pool.ask(0, 0, qkv()[0], 1.0)
    with pytest.raises(ValueError, match="starts must hold at least one row"):
        pool.open(0, heads=4, kv_heads=2, starts=[], windows=[0])
    pool.open(0, heads=4, kv_heads=2, starts=[0, 0, 0], windows=[0])
    with pytest.raises(ValueError, match="nothing was asked of layer 0 in slot 0"):
        pool.take(0, 0)
    with pytest.raises(ValueError, match="at most 1 batches can be open at once"):
        pool.free_slot()
    with pytest.raises(ValueError, match="slot must be a whole number at least 0 and at most 0, got 1"):
        pool.open(1, heads=4, kv_heads=2, starts=[0], windows=[0])

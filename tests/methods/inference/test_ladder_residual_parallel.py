"""The ladder over ranks: shares that add up, sums under way while modules compute, real processes, and the timeline of it all."""

from __future__ import annotations

import copy
import itertools
import json
import os
import threading
import time
from types import SimpleNamespace

import psutil
import pytest
import torch
from tests.properties.architectures import CAUSAL, build, inputs
from tests.tiny import tiny_model, token_ids
from transformers import LlamaConfig

from assay.methods.core.models.decoder import parts_of
from assay.methods.inference.ladder_residual import (
    Alone,
    Device,
    Event,
    GroupLink,
    LadderForCausalLM,
    Ranks,
    Silent,
    Timeline,
    Wire,
    all_reduce_seconds,
    links,
    module_costs,
    schedule,
    shard,
    simulate,
    step_cost,
    tensor_parallel,
    to_ladder,
)

LAYERS = 3
WAYS = {
    "standard": {"layers": []},
    "ladder": {},
    "partly": {"layers": [1]},
    "parallel": {"block": "parallel"},
}


def double(**changes):
    return tiny_model(num_hidden_layers=LAYERS, **changes).double()


def logits(model, ids, **more):
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


# --------------------------------------------------------------------------------------------------- ranks that are threads


class Table:
    """Where ranks that are threads of one process put what they sum."""

    def __init__(self, world):
        self.world, self.broken = world, False
        self.sent = {}
        self.lock = threading.Lock()


class ThreadLink:
    """The sum is made at the wait, and until then the tensor that was sent holds NaN: reading it too early, or writing it, shows."""

    def __init__(self, table, rank):
        self.table, self.rank, self.world, self.count = table, rank, table.world, 0
        self.bytes = []

    def all_reduce(self, x):
        number, self.count = self.count, self.count + 1
        self.bytes.append(x.nbytes)
        with self.table.lock:
            self.table.sent[number, self.rank] = x.clone()
        x.fill_(float("nan"))
        return Late(self, number, x)


class Late:
    def __init__(self, link, number, x):
        self.link, self.number, self.x = link, number, x
        self.start = self.end = time.perf_counter()

    def wait(self):
        assert bool(self.x.isnan().all()), "somebody wrote into a tensor that was being summed"
        while True:
            with self.link.table.lock:
                sent = self.link.table.sent
                parts = [sent.get((self.number, rank)) for rank in range(self.link.world)]
            if all(part is not None for part in parts):
                break
            assert not self.link.table.broken, "another rank failed"
            time.sleep(1e-4)
        self.x.copy_(sum(parts[1:], parts[0].clone()))
        self.end = time.perf_counter()
        return self.x


SHARING = threading.Lock()  # the whole model is looked at while it is shared out: by one at a time


def share(model, link):
    with SHARING:
        return tensor_parallel(model, link)


def on_threads(world, function):
    """`function(link)` on `world` threads; the results by rank."""
    table, found = Table(world), {}

    def work(rank):
        try:
            with torch.no_grad():
                found[rank] = function(ThreadLink(table, rank))
        except BaseException as error:  # shown in the test's own thread
            found[rank] = error
            table.broken = True

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    errors = [value for value in found.values() if isinstance(value, BaseException)]
    for error in sorted(errors, key=lambda error: "another rank failed" in str(error)):
        raise error
    return [found[rank] for rank in range(world)]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("way", WAYS)
def test_shares_add_up_to_the_model(world, way):
    """Also with two key/value heads among four ranks."""
    model, ids = to_ladder(double(), **WAYS[way]), token_ids(2, 9)
    expected = logits(model, ids)

    def pieces(link):
        part, cache, found = share(model, link), None, []
        for piece in (ids[:, :5], ids[:, 5:6], ids[:, 6:]):
            out = part(piece, cache=cache, use_cache=True)
            cache = out.cache
            found.append(out.logits)
        assert cache.layers[0].keys.shape[1] == max(1, 2 // world)
        return torch.cat(found, 1)

    for found in on_threads(world, pieces):
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("ranks", "reduce_every"), [(2, 2), (2, 4), (4, 2), (2, 6)])
def test_desync_over_ranks_is_desync_on_one_device(ranks, reduce_every):
    model = to_ladder(double(), block="desync", ranks=ranks, reduce_every=reduce_every)
    ids = token_ids(2, 7)
    expected = logits(model, ids)
    for found in on_threads(ranks, lambda link: logits(share(model, link), ids)):
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9)


def test_desync_wants_the_ranks_it_was_trained_for():
    model = to_ladder(double(), block="desync", ranks=2)
    with pytest.raises(ValueError, match="link must have the 2 ranks that the model was trained for, got 1"):
        tensor_parallel(model, Alone())


SHARED = ("llama", "llama-tied", "qwen2", "phi3", "mistral")


@pytest.mark.parametrize("name", SHARED)
def test_architectures_are_shared_out(name):
    """Beyond the windows of those that have some, with a cache."""
    model, ids = build(name), inputs(name, 2, 24)["input_ids"]
    for layers in ([], None):
        ladder = to_ladder(model, layers)
        expected = logits(ladder, ids)

        def pieces(link, ladder=ladder):
            part, cache, found = share(ladder, link), None, []
            for piece in ids.tensor_split([20, 21], 1):
                out = part(piece, cache=cache, use_cache=True)
                cache = out.cache
                found.append(out.logits)
            return torch.cat(found, 1)

        for found in on_threads(2, pieces):
            assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", [*WAYS, "desync"])
def test_in_bfloat16(way):
    model = to_ladder(double().bfloat16(), **{**WAYS, "desync": {"block": "desync"}}[way])
    ids = token_ids(2, 7)
    expected = logits(model, ids).float()
    for found in on_threads(2, lambda link: logits(share(model, link), ids)):
        assert found.dtype == torch.bfloat16
        assert (found.float() - expected).abs().mean() < 0.05 * expected.abs().mean()


@pytest.mark.parametrize("name", [name for name in CAUSAL if name not in SHARED])
def test_other_architectures_are_refused_before_anything_changes(name):
    model = build(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    modules = [id(module) for module in model.modules()]
    with pytest.raises(ValueError, match="model must "):
        shard(model, 1, 2)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    assert [id(module) for module in model.modules()] == modules


def test_the_real_model_over_three_ranks(smollm2_slice):
    """SmolLM2 has nine heads, three of keys and values."""
    model, ids = to_ladder(smollm2_slice.model), token_ids(1, 9, vocab=1000)
    expected = logits(model, ids)
    for found in on_threads(3, lambda link: logits(share(model, link), ids)):
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-3)
        assert torch.equal(found.argmax(-1), expected.argmax(-1))


def test_a_share_is_a_share():
    model = double(tie_word_embeddings=True)
    part = shard(model, 1, 2)
    assert part.model.layers[0].self_attn.q_proj.weight.shape == (32, 64)
    assert part.lm_head.weight is part.model.embed_tokens.weight
    whole, share = (sum(p.numel() for layer in m.model.layers for p in layer.parameters()) for m in (model, part))
    norms = LAYERS * 2 * 64
    assert share == (whole - norms) // 2 + norms
    part.model.layers[0].mlp.up_proj.weight.data.zero_()
    assert bool((model.model.layers[0].mlp.up_proj.weight != 0).all())


def test_biases_of_sums_are_added_once():
    model = double(attention_bias=True, mlp_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    ids = token_ids(2, 6)
    expected = logits(model, ids)
    for found in on_threads(2, lambda link: logits(share(model, link), ids)):
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("changes", "world", "words"),
    [
        ({}, 3, "world must divide the 4 attention heads of the model, got 3"),
        ({"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3}, 2, "world must divide the 3 key/value heads"),
        ({"intermediate_size": 98}, 4, "world must divide the 98 units of the model's MLPs, got 4"),
    ],
)  # fmt: skip
def test_what_cannot_be_divided_is_named(changes, world, words):
    with pytest.raises(ValueError, match=words):
        shard(tiny_model(**changes), 0, world)


def test_what_cannot_be_summed_is_named():
    with pytest.raises(ValueError, match="layer 0 does more to the output of its attention than o_proj"):
        shard(build("gemma3"), 0, 2)
    with pytest.raises(ValueError, match="rank must be a whole number at least 0 and at most 1, got 2"):
        shard(double(), 2, 2)
    odd = double()
    odd.model.layers[1].mlp.up_proj = torch.nn.Sequential(odd.model.layers[1].mlp.up_proj)
    with pytest.raises(ValueError, match=r"plain linear projections|plain modules|has no"):
        shard(odd, 0, 2)
    with pytest.raises(ValueError, match="model must be whole, got a rank's share"):
        tensor_parallel(tensor_parallel(double(), Alone()), Alone())


def test_messages_are_as_many_and_as_large():
    """As in the standard model; the rivals save some."""
    ids, base = token_ids(2, 5), double()
    sent = {}
    ways = {**WAYS, "desync": {"block": "desync"}, "desync 4": {"block": "desync", "reduce_every": 4}}
    for way, how in ways.items():
        model = to_ladder(base, **how)

        def count(link, model=model):
            logits(share(model, link), ids)
            return link.bytes

        sent[way] = on_threads(2, count)[0]
    assert sent["standard"] == sent["ladder"] == sent["partly"] == [2 * 5 * 64 * 8] * (2 * LAYERS)
    assert len(sent["parallel"]) == len(sent["desync"]) == LAYERS
    assert len(sent["desync 4"]) == 2  # the fourth module and the last


def test_ranks_generate_together():
    model = to_ladder(double(), [1, 2])
    ids = torch.tensor([[0, 0, 0, 5, 9, 4], [7, 3, 8, 2, 6, 9]])
    mask = (ids > 0).long()
    for how in ({}, {"num_beams": 2}):
        expected = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, **how)

        def generate(link, how=how):
            return share(model, link).generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, **how)

        assert all(torch.equal(found, expected) for found in on_threads(2, generate))


def test_a_share_is_not_stored(tmp_path):
    def store(link):
        with pytest.raises(ValueError, match="a rank holds its share of the weights only"):
            share(double(), link).save_pretrained(tmp_path)

    on_threads(2, store)
    assert not list(tmp_path.iterdir())


def test_slices_pass_gradients_on():
    model = double()
    parts, ids = parts_of(model), token_ids(1, 4)
    with torch.no_grad():
        over = parts.begin(ids)
    shares = [parts_of(shard(model, rank, 2, views=True)) for rank in range(2)]
    whole = parts.attention(0, over.hidden, over)
    added = sum(share.attention(0, over.hidden, over) for share in shares)
    assert torch.allclose(whole, added, rtol=1e-10, atol=1e-10)
    own = torch.autograd.grad(whole.pow(2).sum(), model.model.layers[0].self_attn.k_proj.weight)[0]
    through = torch.autograd.grad(added.pow(2).sum(), model.model.layers[0].self_attn.k_proj.weight)[0]
    assert torch.allclose(own, through, rtol=1e-8, atol=1e-8)


def test_without_messages_the_model_is_another():
    model, ids = to_ladder(double()), token_ids(1, 6)
    found = on_threads(2, lambda link: logits(share(model, Silent(link)), ids))
    assert not torch.allclose(found[0], logits(model, ids), rtol=1e-2, atol=1e-2)


# -------------------------------------------------------------------------------------------------------- schedule, timeline


def test_a_step_needs_all_but_the_newest():
    for step in schedule(5)[1:]:
        number = 2 * step.layer + (step.modules == ("mlp",))
        assert step.needs == ((number - 2,) if number > 1 else ())
    assert all(step.needs == ((i - 1,) if i else ()) for i, step in enumerate(schedule(5, chosen=())))
    partly = schedule(3, chosen=[1])
    assert [step.needs for step in partly] == [(), (0,), (), (1,), (2, 3), (4,)]
    assert [step.name for step in schedule(2, "parallel", [1])] == ["attention 0", "mlp 0", "attention+mlp 1"]
    assert [step.reduced for step in schedule(4, "desync", reduce_every=4)] == [False, False, False, True] * 2
    assert [step.reduced for step in schedule(3, "desync", reduce_every=100)] == [False] * 5 + [True]


def test_every_output_is_settled_once_and_in_order():
    for block, chosen in itertools.product(("ladder", "parallel"), (None, (), (1,), (0, 2))):
        steps = schedule(4, block, chosen)
        needed = [number for step in steps for number in step.needs]
        assert needed == sorted(set(needed))
        assert set(range(len(steps))) - set(needed) <= {len(steps) - 2, len(steps) - 1}


@pytest.mark.parametrize("c", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("t", [0.0, 0.05, 1.0, 20.0])
def test_the_gain_of_the_timeline(c, t):
    """Standard c + t a module, ladder the larger of the two; never more than 2, nor than (c + t) / c; 1 without communication."""
    layers = 100
    compute = {"attention": c, "mlp": c}
    usual, ladder = (simulate(schedule(layers, chosen=which), compute, t).seconds for which in ((), None))
    assert usual == pytest.approx(2 * layers * (c + t))
    assert ladder == pytest.approx(2 * layers * max(c, t), rel=0.03)
    assert usual / ladder <= min(2, (c + t) / c) + 1e-9
    assert ladder <= usual
    if t == 0:
        assert ladder == pytest.approx(usual)


def test_modules_of_different_length():
    line = simulate(schedule(50), {"attention": 1.0, "mlp": 3.0}, 2.0)
    assert line.total("compute") == pytest.approx(200)
    # the MLP's message (2) meets an attention of 1: 1 is waited for; the attention's meets an MLP of 3
    assert line.seconds == pytest.approx(250, rel=0.02)
    assert line.hidden == pytest.approx(0.75, abs=0.02)
    parallel = simulate(schedule(50, "parallel"), {"attention": 1.0, "mlp": 3.0}, 2.0)
    assert parallel.seconds == pytest.approx(300)
    assert parallel.hidden == 0


def test_the_published_rates_obey_the_model():
    """Tokens a second at batch 1 to 64 on 4 and 8 GPUs: standard, ladder and no communication, with and without peer-to-peer links."""
    for usual, ladder, bound in (
        (59.41, 67.51, 69.04), (77.39, 101.22, 110.59), (53.35, 66.6, 69.04), (51.66, 82.59, 110.59),
        (258.56, 331.45, 355.8), (173.62, 271.82, 355.8), (843.15, 1003.52, 1109.65), (546.68, 738.56, 1109.65),
        (1940.99, 2242.1, 2474.49), (1454.42, 1864.05, 2474.49),
    ):  # fmt: skip
        c, t = 1 / bound, 1 / usual - 1 / bound
        compute = {"attention": c / 160, "mlp": c / 160}
        seconds = [simulate(schedule(80, chosen=which), compute, t / 160).seconds for which in ((), None)]
        assert 1 / seconds[0] == pytest.approx(usual)
        assert usual < ladder <= 1 / seconds[1]


def test_a_timeline_is_drawn_and_stored():
    line = simulate(schedule(2), {"attention": 1.0, "mlp": 2.0}, 1.0)
    again = Timeline.from_json(line.to_json())
    assert again == line
    assert again.text(30) == line.text(30)
    rows = line.text(70).splitlines()
    assert [len(row) for row in rows[:3]] == [len(rows[0])] * 3
    assert rows[0] == f"compute |{'a' * 10}{'m' * 20}{'a' * 10}{'m' * 20}{' ' * 10}|"
    assert rows[1].count("-") == 40
    assert rows[2].count(".") == 10  # the last message
    shifted = Timeline([Event(e.lane, e.name, e.start + 5, e.end + 5) for e in line.events])
    assert shifted.to_json() == line.to_json()
    assert shifted.text() == line.text()
    assert Timeline().text(3).splitlines()[0] == "compute |   |"
    assert (Timeline().seconds, Timeline().hidden) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1]", "text must be a list of events"),
        ('[{"lane": "bus", "name": "a", "start": 0, "end": 1}]', "lane must be one of"),
        ('[{"lane": "link", "name": "a", "start": 0}]', "text must be a list of events"),
        ("{", "Expecting"),
        ('[{"lane": "link", "name": "a", "start": 2, "end": 1}]', "end must not lie before start"),
    ],
)
def test_no_timeline_is_made_of_other_text(text, words):
    with pytest.raises(ValueError, match=words):
        Timeline.from_json(text)


def test_bad_schedules_are_named():
    with pytest.raises(ValueError, match="chosen must hold layers from 0 to 1, got"):
        schedule(2, chosen=[2])
    with pytest.raises(ValueError, match="layers must be a whole number at least 1, got 0"):
        schedule(0)
    with pytest.raises(ValueError, match="block must be one of"):
        schedule(1, "serial")
    with pytest.raises(ValueError, match="compute must have the seconds of 'mlp'"):
        simulate(schedule(1), {"attention": 1.0}, 0.0)
    with pytest.raises(ValueError, match="message must be a finite number at least 0, got nan"):
        simulate(schedule(1), {"attention": 1.0, "mlp": 1.0}, float("nan"))
    with pytest.raises(ValueError, match="end must not lie before start"):
        Timeline().add("link", "attention 0", 1.0, 0.5)
    for end in (0.5, float("nan")):
        with pytest.raises(ValueError, match="end must not lie before start"):
            Event("link", "attention 0", 1.0, end)
    with pytest.raises(ValueError, match="width must be a whole number at least 1, got 0"):
        Timeline().text(0)


# ---------------------------------------------------------------------------------------------------------------- calculator

BIG = LlamaConfig(
    hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8
)


def test_module_costs_are_those_of_the_weights():
    config = LlamaConfig(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2)
    model = tiny_model()
    layer = model.model.layers[0]
    for ranks in (1, 2):
        cost = module_costs(config, ranks, dtype_bytes=4)
        projections = sum(getattr(layer.self_attn, f"{name}_proj").weight.numel() for name in "qkvo") / ranks
        own_keys = 2 * (2 / ranks) * 16
        assert cost["attention"].bytes_read == 4 * (projections + own_keys)
        assert cost["attention"].macs == projections + 2 * (4 / ranks) * 16
        assert cost["mlp"].macs == sum(p.numel() for p in layer.mlp.parameters()) / ranks
        assert cost["mlp"].message_bytes == 64 * 4
    longer = module_costs(config, 1, batch=3, tokens=5, context=7, dtype_bytes=4)
    assert longer["mlp"].message_bytes == 3 * 5 * 64 * 4
    pairs = 3 * sum(7 + i + 1 for i in range(5))
    assert longer["attention"].macs == 15 * (64 * 16 * 12) + 2 * pairs * 4 * 16


def test_a_wire_that_costs_nothing_leaves_nothing_to_gain():
    device = Device(5e14, 2e12, 1e-5)
    assert step_cost(BIG, 1, device, Wire(1e-5, 3e11)).speedup == 1
    free = step_cost(BIG, 8, device, Wire(0.0, 1e30))
    assert free.speedup == pytest.approx(1)
    assert step_cost(BIG, 8, device, Wire(1e-5, 3e11), layers=[]).speedup == 1


def test_the_calculator_is_ordered_as_it_must_be():
    device = Device(5e14, 2e12, 1e-5)
    gains = []
    for latency in (1e-6, 1e-5, 1e-4, 1e-3):
        cost = step_cost(BIG, 8, device, Wire(latency, 3e11), context=1024)
        assert cost.upper_bound <= cost.seconds <= cost.standard
        assert cost.speedup <= 2
        gains.append(cost.speedup)
    assert gains[0] < gains[1] < gains[2] < 2
    half = step_cost(BIG, 8, device, Wire(1e-4, 3e11), layers=range(40, 80))
    assert 1 < half.speedup < step_cost(BIG, 8, device, Wire(1e-4, 3e11)).speedup
    prompt = step_cost(BIG, 8, device, Wire(2e-5, 3e11), tokens=1024)
    assert prompt.message_seconds > step_cost(BIG, 8, device, Wire(2e-5, 3e11)).message_seconds


@pytest.mark.parametrize(
    ("changes", "ranks"),
    [
        ({}, 3),
        ({"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3}, 2),
        ({"intermediate_size": 98}, 4),
    ],
)
def test_what_shard_refuses_has_no_price(changes, ranks):
    """In the words of `shard`, but for the name of the argument."""
    model = tiny_model(**changes)
    with pytest.raises(ValueError, match="world must divide") as refusal:
        shard(model, 0, ranks)
    words = str(refusal.value).replace("world", "ranks")
    with pytest.raises(ValueError, match=words):
        module_costs(model.config, ranks)
    with pytest.raises(ValueError, match=words):
        step_cost(model.config, ranks, Device(5e14, 2e12), Wire(1e-5, 3e11))


def test_a_sum_takes_the_shorter_way():
    wire = Wire(1e-5, 1e9)
    assert all_reduce_seconds(1e3, 8, wire) == pytest.approx(1e-5 + 7e-6)
    assert all_reduce_seconds(1e8, 8, wire) == pytest.approx(14 * (1e-5 + 1e8 / 8 / 1e9))
    assert all_reduce_seconds(1e8, 1, wire) == 0


def test_bad_machines_are_named():
    for make, words in (
        (lambda: Device(0, 1), "operations must be a finite number above 0"),
        (lambda: Device(1, 1, -1), "overhead must be a finite number at least 0"),
        (lambda: Wire(-1, 1), "latency must be a finite number at least 0"),
        (lambda: Wire(0, float("nan")), "bandwidth must be a finite number above 0"),
        (lambda: module_costs(BIG, 0), "ranks must be a whole number at least 1"),
        (lambda: module_costs(BIG, 2, context=-1), "context must be a whole number at least 0"),
        (lambda: all_reduce_seconds(-1, 2, Wire(0, 1)), "message_bytes must be a finite number at least 0"),
    ):
        with pytest.raises(ValueError, match=words):
            make()


# ------------------------------------------------------------------------------------------------------------ real processes


def scored(here, model, ids):
    return logits(tensor_parallel(model, GroupLink()), ids)


def generated(here, model, ids):
    return tensor_parallel(model, GroupLink()).generate(ids, max_new_tokens=4, do_sample=False)


def summed(here, dtype, latency, bandwidth):
    """(the sum, seconds from the start to the end of the wait, processor seconds of it, the noted duration)."""
    link = GroupLink(latency=latency, bandwidth=bandwidth)
    link.all_reduce(torch.zeros(1)).wait()
    x = torch.full((2, 1000), here.rank + 1.0, dtype=dtype)
    start, cpu = time.perf_counter(), time.process_time()
    handle = link.all_reduce(x)
    value = handle.wait()
    return value[0, 0].item(), time.perf_counter() - start, time.process_time() - cpu, handle.end - handle.start


def timed(here, model, ids, latency):
    lines = []
    for layers in ([], None):
        part = tensor_parallel(to_ladder(model, layers), GroupLink(latency=latency))
        logits(part, ids)
        part.timeline = Timeline()
        logits(part, ids)
        lines.append(part.timeline.to_json())
    return lines


def refused_gradient(here):
    try:
        GroupLink().all_reduce(torch.ones(2, requires_grad=True))
    except RuntimeError as error:
        return str(error)


def refused_devices(here):
    found = []
    for how in ({"latency": 1e-3}, {"bandwidth": 1e6}):
        try:
            GroupLink(**how).all_reduce(torch.ones(2, device="meta"))
        except ValueError as error:
            found.append(str(error))
    return found


def kept(here, value=None):
    if value is not None:
        here.kept["value"] = value
    return here.rank, here.world, here.kept["value"], torch.get_num_threads()


def fail(here):
    if here.rank == 1:
        raise KeyError("no such key")
    torch.distributed.barrier()


def die(here):
    if here.rank == 0:
        os._exit(7)
    torch.distributed.barrier()


def sleep(here):
    time.sleep(60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def two(folder):
    """Two processes for all tests: starting them takes seconds. The last test ends them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(folder))
        ranks = Ranks(2)
    with ranks:
        yield ranks


def test_real_processes_compute_the_model(two):
    ids = token_ids(2, 7)
    for way in WAYS.values():
        model = to_ladder(double(), **way)
        for found in two.run(scored, model, ids):
            assert torch.allclose(found, logits(model, ids), rtol=1e-9, atol=1e-9)
    model = to_ladder(double(), block="desync")
    for found in two.run(scored, model, ids):
        assert torch.allclose(found, logits(model, ids), rtol=1e-9, atol=1e-9)


def test_real_processes_generate(two):
    model, ids = to_ladder(double(), 2), token_ids(2, 5)
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert all(torch.equal(found, expected) for found in two.run(generated, model, ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_imitated_link_is_slow_and_takes_no_processor(two, dtype):
    for latency, bandwidth, least in ((0.2, None, 0.2), (0.05, 2000 * dtype.itemsize / 0.1, 0.15)):
        for value, wall, cpu, noted in two.run(summed, dtype, latency, bandwidth):
            assert value == 3.0
            assert wall >= least - 1e-4
            assert noted >= least - 1e-4
            assert cpu < least / 2


def test_the_timeline_shows_what_overlaps(two):
    """With messages of 50 ms, longer than pauses of the machine: beside a standard model's nothing runs, beside a ladder's a module."""
    usual, ladder = (Timeline.from_json(line) for line in two.run(timed, double(), token_ids(1, 3), 0.05)[0])
    for line, together in ((usual, False), (ladder, True)):
        links = [event for event in line.events if event.lane == "link"]
        computing = [event for event in line.events if event.lane == "compute"]
        assert len(links) == len(computing) == 2 * LAYERS
        assert all(event.seconds >= 0.0499 for event in links)
        for link in links[:-1]:  # nothing is left to run beside the last
            beside = any(event.start < link.end and link.start < event.end for event in computing)
            assert beside == together
    assert usual.seconds >= 2 * LAYERS * 0.0499
    assert "-" in ladder.text()
    assert json.loads(ladder.to_json())


class LateClock:
    """A clock by which a look takes a microsecond and a sleep ends `late` after what was asked for."""

    def __init__(self, late):
        self.now, self.late, self.slept = 1000.0, late, []

    def perf_counter(self):
        self.now += 1e-6
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds + self.late


@pytest.mark.parametrize("late", [0.0, 6e-5, 2.5e-4])
@pytest.mark.parametrize("wait", [1e-4, 6e-4, 5e-2])
def test_waiting_ends_when_it_is_due_however_late_sleeps_end(monkeypatch, late, wait):
    clock = LateClock(late)
    monkeypatch.setattr(links, "time", clock)
    due = clock.now + wait
    links.wait_until(due)
    assert due <= clock.now < due + 3e-6
    assert bool(clock.slept) == (wait > links.SPIN)
    assert sum(clock.slept) <= max(wait - links.SPIN, 0)
    now = clock.now
    links.wait_until(due)
    assert clock.now < now + 3e-6  # what is past is not waited for


@pytest.mark.parametrize("late", [0.0, 2.5e-4])
def test_both_orders_wait_as_long_as_the_link_takes(monkeypatch, late):
    """Asked for at once, or after a module's computing: a message is there at its due moment, and late sleeps lengthen neither."""
    clock = LateClock(late)
    monkeypatch.setattr(links, "time", clock)
    work = SimpleNamespace(is_completed=lambda: True, wait=lambda: None)
    x, latency = torch.ones(2), 1e-3
    for computed in (0.0, 0.4e-3, 0.95e-3):
        start = clock.now
        message = links._Message(work, x, start, latency)
        clock.now += computed
        assert message.wait() is x
        assert start + latency <= clock.now < start + latency + 5e-6
        assert message.end == start + latency
    start = clock.now
    message = links._Message(work, x, start, latency)
    clock.now += 3e-3
    slept = len(clock.slept)
    message.wait()
    assert clock.now < start + 3e-3 + 5e-6
    assert len(clock.slept) == slept


def test_sums_have_no_gradient(two):
    assert two.run(refused_gradient) == ["sums over ranks have no gradient: run the model under torch.no_grad()"] * 2


def test_no_slower_link_is_imitated_on_an_accelerator(two):
    """Where a wait holds up a stream of the device and not the processor, whose sleeping nobody would see."""
    words = "x must be on the CPU where a slower link is imitated, got a tensor on meta"
    assert two.run(refused_devices) == [[words] * 2] * 2


def test_ranks_keep_what_they_are_given(two):
    two.run(kept, value=5)
    assert two.run(kept) == [(0, 2, 5, 1), (1, 2, 5, 1)]


def test_links_need_a_group():
    with pytest.raises(RuntimeError, match="torch.distributed must be set up first"):
        GroupLink()
    with pytest.raises(ValueError, match="latency must be a finite number at least 0, got -1"):
        GroupLink(latency=-1)
    with pytest.raises(ValueError, match="bandwidth must be a finite number above 0, got 0"):
        GroupLink(bandwidth=0)


def gone(pids):
    return not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids)


def test_ranks_that_are_not_ready_in_time_are_ended(monkeypatch, tmp_path):
    """A process takes longer than that to import torch."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("assay.methods.inference.ladder_residual.ranks.STARTING", 0.05)
    before = {child.pid for child in psutil.Process().children()}
    with pytest.raises(TimeoutError, match="rank 0 gave no answer within 0.05 s"):
        Ranks(1, timeout=0.05)
    assert gone({child.pid for child in psutil.Process().children()} - before)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "error", "words"),
    [
        (fail, RuntimeError, "rank 1 failed:(.|\n)*no such key"),
        (die, RuntimeError, r"rank 0 died \(exit code 7\)"),
        (sleep, TimeoutError, "rank 0 gave no answer within 20 s"),
    ],
)
def test_nothing_is_left_of_ranks_that_fail(function, error, words):
    ranks = Ranks(2, timeout=20)
    pids = ranks.pids
    with pytest.raises(error, match=words):
        ranks.run(function)
    assert gone(pids)
    assert ranks.pids == []


@pytest.mark.slow
def test_ranks_end_with_the_process_that_started_them():
    """Killed, so that nothing of its own can run any more."""
    import subprocess
    import sys

    code = (
        "import os, sys, time\n"
        "from assay.methods.inference.ladder_residual import Ranks\n"
        "if __name__ == '__main__':\n"
        "    ranks = Ranks(2)\n"
        "    print(*ranks.pids, flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in process.stdout.readline().split()]
    process.kill()
    process.wait()
    end = time.monotonic() + 20
    while not gone(pids) and time.monotonic() < end:
        time.sleep(0.1)
    assert len(pids) == 2
    assert gone(pids)


@pytest.mark.slow
def test_four_real_processes(smollm2_slice):
    ids = token_ids(2, 7)
    with Ranks(4) as ranks:
        for way in WAYS.values():
            model = to_ladder(double(), **way)
            for found in ranks.run(scored, model, ids):
                assert torch.allclose(found, logits(model, ids), rtol=1e-9, atol=1e-9)
    model = to_ladder(smollm2_slice.model)
    ids = token_ids(1, 9, vocab=1000)
    with Ranks(3) as ranks:
        for found in ranks.run(scored, model, ids):
            assert torch.allclose(found, logits(model, ids), rtol=1e-4, atol=1e-3)


def test_weights_changed_after_the_first_use_count():
    model, ids = to_ladder(double()), token_ids(1, 5)
    part = tensor_parallel(model, Alone())
    first = logits(part, ids)
    part.base.model.layers[0].self_attn.q_proj.weight.data.mul_(2)
    assert not torch.equal(first, logits(part, ids))
    assert isinstance(copy.deepcopy(part), LadderForCausalLM)


def test_nothing_is_left_of_ranks_that_ended(two, folder):
    """The last of the tests with real processes."""
    pids = two.pids
    assert len(pids) == 2
    assert not gone(pids)
    assert list(folder.iterdir())
    two.close()
    two.close()
    assert gone(pids)
    assert two.pids == []
    assert not list(folder.iterdir())
    with pytest.raises(ValueError, match="the ranks were ended: make new ones"):
        two.run(kept)

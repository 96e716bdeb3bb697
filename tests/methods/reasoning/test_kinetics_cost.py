"""The cost model of Kinetics against counted work and the released formulae, and what frontiers may never do."""

import itertools
import random

import pytest
import torch
from tests.properties.architectures import build
from tests.tiny import tiny_model, token_ids

from assay.measure.cost import count_cost
from assay.methods.reasoning.kinetics import (
    HARDWARE,
    BlockCache,
    BlockTopK,
    Cost,
    Hardware,
    Option,
    Shape,
    Work,
    area,
    cheapest,
    cost,
    extra_cost,
    fitted,
    frontier,
    mean_cost,
    shape_of,
    use_block_topk,
)

QWEN = Shape(parameters=0.752e9, layers=28, heads=16, key_heads=8, head_dim=128)
LARGE = Shape(parameters=32.76e9, layers=64, heads=64, key_heads=8, head_dim=128)
TOP = BlockTopK(budget=1024, block=1, dense_layers=())


@pytest.mark.parametrize(("prompt", "generated", "trials"), [(200, 8192, 1), (200, 8192, 8), (0, 1000, 3)])
def test_the_papers_formula_term_by_term(prompt, generated, trials):
    found = cost(QWEN, Work(prompt, generated, trials))
    elements = 2 * 28 * 8 * 128
    assert QWEN.kv_elements == elements
    assert found.linear == pytest.approx(2 * trials * 0.752e9 * generated)
    assert found.attention == pytest.approx(2 * trials * elements * (2 * prompt * generated + generated**2))
    assert found.kv_bytes == pytest.approx(elements * (2 * prompt * generated + trials * generated**2))
    assert found.eflops(0) == found.flops == found.linear + found.attention
    assert found.eflops(562.5) == pytest.approx(found.flops + 562.5 * found.bytes)
    one = cost(QWEN, Work(prompt, generated))
    assert found.linear == pytest.approx(trials * one.linear)
    assert found.attention == pytest.approx(trials * one.attention)
    grows = (2 * prompt + trials * generated) / (2 * prompt + generated)
    assert found.kv_bytes == pytest.approx(grows * one.kv_bytes)
    apart = cost(QWEN, Work(prompt, generated, trials), shared_prompt=False)
    assert apart.kv_bytes == pytest.approx(trials * one.kv_bytes)


def released(shape, work, budget=None, block=1):
    """The released cost model, written down from its formulae: operations and weighted reads, 1e12 each, at 562.5."""
    heads, keys = (n * shape.head_dim * shape.layers for n in (shape.heads, shape.key_heads))
    a, length, trials = work.prompt, work.generated, work.trials
    linear = 2 * shape.parameters * length
    if budget is None:
        compute = (linear + 2 * (2 * a + length) * length * heads) * trials
        memory = 2 * (2 * a + length * trials) * length * keys
    elif block == 1:
        steps = budget * length + 0.5 * max(0, budget - a) ** 2
        compute, memory = (linear + 4 * steps * heads) * trials, 4 * steps * keys * trials
    else:
        steps = budget * length - 0.5 * max(0, budget - a) ** 2
        compute = (linear + 4 * steps * heads + (2 * a + length) // block * length * heads) * trials
        memory = 4 * steps * keys * trials + (2 * a + length * trials) // block * length * keys
    return compute * 1e-12, memory * 562.5e-12


@pytest.mark.parametrize("work", [Work(200, 8192), Work(200, 8192, 32), Work(1500, 4000, 4)])
def test_as_released(work):
    for attention, options in (
        (None, {}),
        (TOP, {"budget": 1024}),
        (BlockTopK(budget=1024), {"budget": 1024, "block": 16}),
    ):
        found = cost(QWEN, work, attention, variant="as_released")
        compute, memory = released(QWEN, work, **options)
        assert found.flops == pytest.approx(compute * 1e12)
        assert 562.5 * found.bytes == pytest.approx(memory * 1e12)
    ours = cost(QWEN, Work(200, 8192), TOP)
    theirs = cost(QWEN, Work(200, 8192), TOP, variant="as_released")
    assert theirs.attention / ours.attention == pytest.approx(1.084, abs=0.002)  # the sign of the square
    assert cost(QWEN, Work(200, 8192)) == cost(QWEN, Work(200, 8192), variant="as_released")
    with pytest.raises(ValueError, match="variant must be 'paper' for a shape with windows"):
        cost(Shape(1e6, 1, 1, 1, 8, (16,)), Work(1, 1), variant="as_released")


def test_costs_grow_with_everything():
    base = {"parameters": 1e9, "layers": 8, "heads": 8, "key_heads": 4, "head_dim": 64}
    known = cost(Shape(**base), Work(100, 500, 2)).eflops(100)
    for name, value in (("parameters", 1.1e9), ("layers", 9), ("heads", 12), ("head_dim", 72)):
        assert cost(Shape(**{**base, name: value}), Work(100, 500, 2)).eflops(100) > known
    for work in (Work(101, 500, 2), Work(100, 501, 2), Work(100, 500, 3)):
        assert cost(Shape(**base), work).eflops(100) > known
    assert cost(Shape(**base), Work(100, 500, 2)).eflops(101) > known
    long, double = (cost(QWEN, Work(0, n)).kv_bytes for n in (4000, 8000))
    assert double == pytest.approx(4 * long)
    assert 3 < cost(QWEN, Work(500, 8000)).kv_bytes / cost(QWEN, Work(500, 4000)).kv_bytes < 4


@pytest.mark.parametrize("attention", [TOP, BlockTopK(budget=1024, block=1), BlockTopK(budget=512, block=1)])
def test_sparse_costs_at_most_what_dense_costs(attention):
    for prompt, generated in ((0, 100), (10, 1000), (100, 5000), (2000, 700), (0, 1024), (1000, 24)):
        work = Work(prompt, generated)
        dense, sparse = cost(QWEN, work), cost(QWEN, work, attention)
        if prompt + generated <= attention.budget:
            assert sparse == dense
        else:
            assert sparse.attention < dense.attention
            assert sparse.kv_bytes < dense.kv_bytes
            assert sparse.eflops(562.5) < dense.eflops(562.5)
        for length, reach in ((generated, attention.budget), (generated, None)):
            steps = sum(min(reach or prompt + t, prompt + t) for t in range(length))
            assert abs(area(prompt, length, reach) - steps) <= (reach or prompt + length) / 2


def test_block_search_costs_a_key_a_block_and_only_beyond_the_budget():
    settings = BlockTopK(budget=1024, dense_layers=())
    assert cost(QWEN, Work(200, 800), settings) == cost(QWEN, Work(200, 800))
    found = cost(QWEN, Work(4096, 100), settings)
    keys, blocks = 28 * 8 * 128, (4096 * 100 + 100**2 / 2) / 16
    assert found.search == pytest.approx(2 * keys * blocks)
    assert found.search_bytes == pytest.approx(2 * keys * blocks)
    assert found.kv_bytes == pytest.approx(4 * keys * 1024 * 100)
    one_dense = cost(QWEN, Work(4096, 100), BlockTopK(budget=1024))
    dense = cost(QWEN, Work(4096, 100))
    assert one_dense.kv_bytes == pytest.approx((27 * found.kv_bytes + dense.kv_bytes) / 28)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2", "phi3", "gemma3", "mixtral"])
def test_a_models_shape_says_what_a_token_is_counted_to_cost(name):
    """Decoding one token of a real model, operator by operator: linear work within its biases and norms, attention
    exactly."""
    model = build(name)
    shape, tokens = shape_of(model), 40
    cache = BlockCache(model.config)
    with torch.no_grad():
        model(token_ids(1, tokens - 1, vocab=160), cache=cache)
    counted = count_cost(model, token_ids(1, 1, vocab=160), cache=cache)
    said = cost(shape, Work(tokens, 1))
    said_attention = sum(4 * shape.heads * shape.head_dim * min(tokens, reach or tokens) for reach in shape.reaches)
    if name != "gemma3":  # whose stock attention computes whole masked rows
        assert counted.flops == pytest.approx(said.linear + said_attention, rel=0.02)
    assert said.attention == pytest.approx(said_attention, rel=0.02)
    assert shape.parameters <= sum(parameter.numel() for parameter in model.parameters())
    if name != "gemma3":
        held = sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))
        assert held == 4 * shape.kv_elements * tokens


def test_sparse_attention_in_a_model_reads_and_computes_what_the_model_of_its_cost_says():
    model, tokens = tiny_model(), 400
    settings = BlockTopK(budget=64, dense_layers=())
    use_block_topk(model, settings)
    cache = BlockCache(model.config)
    with torch.no_grad():
        model(token_ids(8, tokens - 1), cache=cache, logits_to_keep=1)
    token, shape = token_ids(8, 1), shape_of(model)
    sparse = count_cost(model, token, cache=cache)
    cache.crop(-1)
    use_block_topk(model, BlockTopK(budget=1 << 20))
    dense = count_cost(model, token, cache=cache)
    options = {"element_bytes": 4, "shared_prompt": False}
    said = [cost(shape, Work(tokens, 1), kind, **options) * 8 for kind in (settings, None)]
    for found, law in zip((sparse, dense), said, strict=True):
        assert found.flops == pytest.approx(law.flops, rel=0.02)
    saved = dense.total("attention").bytes_read - sparse.total("attention").bytes_read
    # less is saved than the law says by what choosing and gathering read besides: the copy of the chosen keys, and indices
    assert 0.7 * (said[1].bytes - said[0].bytes) < saved < said[1].bytes - said[0].bytes


def test_means_and_sums():
    both = mean_cost(QWEN, 100, [500, 1500], 4)
    parts = [cost(QWEN, Work(100, n, 4)) for n in (500, 1500)]
    assert both.eflops(50) == pytest.approx(sum(one.eflops(50) for one in parts) / 2)
    assert mean_cost(QWEN, 100, [1000], 4).eflops(50) < both.eflops(50)  # the quadratic term
    weights = cost(QWEN, Work(0, 10, 4), weights_read_with=4)
    assert weights.weight_bytes == pytest.approx(2 * 0.752e9 * 10)
    assert (weights * 2 + Cost(linear=1.0)).weight_bytes == 2 * weights.weight_bytes


def test_a_fit_finds_the_two_rates_and_flops_alone_do_not():
    chance = random.Random(0)
    costs, seconds = [], []
    for tokens, batch in itertools.product((128, 1024, 4096), (1, 4, 16)):
        found = cost(LARGE, Work(tokens, 1), shared_prompt=False, weights_read_with=batch) * batch
        costs.append(found)
        seconds.append((found.flops / 1e14 + found.bytes / 2e12) * chance.uniform(0.97, 1.03))
    both, alone = fitted(costs, seconds), fitted(costs, seconds, flops_only=True)
    assert both.intensity == pytest.approx(50, rel=0.1)
    assert both.explained > 0.99 > alone.explained
    left_out = fitted(costs[:-1], seconds[:-1])
    assert left_out.seconds(costs[-1]) == pytest.approx(seconds[-1], rel=0.15)
    assert max(map(abs, both.residuals)) < 0.1


# ------------------------------------------------------------------------------------------------- frontiers


def options(chance, many=6, questions=5):
    return [
        Option(
            f"{n}",
            tuple(chance.uniform(1, 9) for _ in range(questions)),
            tuple(chance.random() for _ in range(questions)),
        )
        for n in range(many)
    ]


def test_frontiers_never_fall():
    chance = random.Random(1)
    for _ in range(20):
        known = options(chance)
        limits = sorted(chance.uniform(0, 10) for _ in range(8))
        found = frontier(known, limits)
        assert found == sorted(found)
        for n in range(1, len(known)):
            less = frontier(known[:n], limits)
            assert all(a <= b for a, b in zip(less, found, strict=True))
        best = [max(values) for values in zip(*(one.coverage for one in known), strict=True)]
        assert frontier(known, [9.0])[0] == pytest.approx(sum(best) / len(best))


def test_the_laws_choose_differently_and_what_that_costs():
    """A small model with many trials beats a large one by FLOPs, and loses once keys are read: the paper's point, in
    numbers."""
    works = {"0.6B": (QWEN, Work(200, 30_000, 32)), "32B": (LARGE, Work(200, 8000, 1))}
    intensity = HARDWARE["B200"].intensity
    flops = {name: cost(*given).flops for name, given in works.items()}
    true = {name: cost(*given).eflops(intensity) for name, given in works.items()}
    assert true["0.6B"] / true["32B"] > flops["0.6B"] / flops["32B"]
    both = [Option("few", (1.0,), (0.6,)), Option("many", (2.0,), (0.7,))]
    prices = {"few": 5.0, "many": 2.0}
    assert extra_cost(both, 0.6, by={"few": 1.0, "many": 2.0}, instead=prices, price=prices) == 2.5
    assert extra_cost(both, 0.65, by={"few": 1.0, "many": 2.0}, instead=prices, price=prices) == 1.0
    assert extra_cost(both, 0.6, by=prices, instead={"few": 1.0, "many": 2.0}, price=prices) == 0.4
    assert extra_cost(both, 0.8, by=prices, instead=prices, price=prices) is None
    assert cheapest(both, 0.75, tolerance=0.06).name == "many"


def test_bad_input_to_the_cost_is_named():
    with pytest.raises(ValueError, match="heads must be a multiple of key_heads"):
        Shape(1e9, 2, 6, 4, 64)
    with pytest.raises(ValueError, match="windows must be of 2 layers, got 1"):
        Shape(1e9, 2, 4, 4, 64, (16,))
    with pytest.raises(ValueError, match="parameters must be"):
        Shape(float("nan"), 2, 4, 4, 64)
    with pytest.raises(TypeError, match="trials must be"):
        Work(1, 1, 2.5)
    with pytest.raises(ValueError, match="bandwidth must be"):
        Hardware(1e12, 0)
    with pytest.raises(TypeError, match="work must be a Work"):
        cost(QWEN, (1, 2))
    with pytest.raises(TypeError, match="attention must be a BlockTopK or None"):
        cost(QWEN, Work(1, 1), "dense")
    with pytest.raises(ValueError, match="intensity must be"):
        cost(QWEN, Work(1, 1)).eflops(-1)
    with pytest.raises(ValueError, match="variant must be one of"):
        cost(QWEN, Work(1, 1), variant="released")
    with pytest.raises(ValueError, match="lengths must hold at least one"):
        mean_cost(QWEN, 1, [])
    with pytest.raises(ValueError, match="seconds must be three or more"):
        fitted([Cost(1.0)], [1.0])
    with pytest.raises(ValueError, match="model must be a transformers decoder"):
        shape_of(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="same questions, got 1 and 2"):
        Option("a", (1.0,), (0.1, 0.2))
    with pytest.raises(ValueError, match="coverage must be"):
        Option("a", (1.0,), (1.2,))
    with pytest.raises(ValueError, match="options must be about the same questions"):
        frontier([Option("a", (1.0,), (0.1,)), Option("b", (1.0, 1.0), (0.1, 0.1))], [1])
    with pytest.raises(ValueError, match="options must hold at least one"):
        cheapest([], 0.5)

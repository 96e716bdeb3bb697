"""Mixture-of-Recursions against its formulas in float64, written out token by token; what is tied, chosen, computed and kept.

The base's norms and rotary tables round to float32 whatever its dtype, which is what the tolerances leave room for.
"""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from tests.methods.inference.mor_models import LAYERS, tiny_mor
from tests.tiny import tiny_model, token_ids
from torch import nn

from assay.measure.cost import count_cost
from assay.methods.inference.mor import (
    MoRConfig,
    MoRForCausalLM,
    convert,
    forward_macs,
    generate_depthwise,
    hierarchical,
    layer_plan,
    routing,
    sources,
)
from assay.methods.inference.mor.cache import Place
from assay.methods.inference.mor.plan import SHARINGS
from assay.methods.inference.mor.tokens import Tokens

TOKENS = 9


# ---- the formulas, in float64


class Naive:
    """The model of one row, its tokens one by one; `chosen(r, scores, alive)` says who is in recursion r."""

    def __init__(self, model, chosen):
        self.model, self.config, self.chosen = model, model.config, chosen
        self.base = model.base
        self.heads, self.groups = self.base.config.num_attention_heads, self.base.config.num_key_value_heads
        self.size = self.base.config.hidden_size // self.heads

    def turned(self, x, position):
        """The rotary embedding of a vector at a position: pairs (i, i + size / 2)."""
        half = self.size // 2
        angle = torch.tensor([position / 10000 ** (2 * i / self.size) for i in range(half)], dtype=x.dtype)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([x[:half] * cos - x[half:] * sin, x[half:] * cos + x[:half] * sin])

    @staticmethod
    def normed(norm, x):
        return norm.weight * x / (x.square().mean() + norm.variance_epsilon).sqrt()

    def pair(self, layer, x, position):
        """The key and value heads of a token."""
        h, attention = self.normed(layer.input_layernorm, x), layer.self_attn
        keys = (attention.k_proj.weight @ h).view(self.groups, self.size)
        values = (attention.v_proj.weight @ h).view(self.groups, self.size)
        return torch.stack([self.turned(key, position) for key in keys]), values

    def layer(self, layer, stream, known=None):
        """`stream` {position: x} through a layer that attends to `known` {position: (keys, values)}, to its own where None."""
        own = {position: self.pair(layer, x, position) for position, x in stream.items()}
        seen = own if known is None else known(own)
        after = {}
        for position, x in stream.items():
            h, attention = self.normed(layer.input_layernorm, x), layer.self_attn
            queries = (attention.q_proj.weight @ h).view(self.heads, self.size)
            before = [p for p in sorted(seen) if p <= position]
            heads = []
            for head, query in enumerate(queries):
                group = head // (self.heads // self.groups)
                turned = self.turned(query, position)
                scores = torch.stack([turned @ seen[p][0][group] for p in before]) / math.sqrt(self.size)
                heads.append(scores.softmax(0) @ torch.stack([seen[p][1][group] for p in before]))
            x = x + attention.o_proj.weight @ torch.cat(heads)
            h = self.normed(layer.post_attention_layernorm, x)
            mlp = layer.mlp
            x = x + mlp.down_proj.weight @ (nn.functional.silu(mlp.gate_proj.weight @ h) * (mlp.up_proj.weight @ h))
            after[position] = x
        return after

    def group(self, r, indices, stream, first):
        """One recursion; `first` holds, for each place in the group, the keys and values that are shared."""
        for slot, index in enumerate(indices):
            layer = self.base.model.layers[index]

            def known(own, slot=slot):
                if r == 0:
                    first[slot] = dict(own)
                elif self.config.kv == "update":
                    first[slot] = {**first[slot], **own}
                return own if self.config.kv == "recursion" else first[slot]

            stream = self.layer(layer, stream, known)
        return stream

    def logits(self, ids):
        config, plan, routers = self.config, self.model.plan, getattr(self.model, "routers", None)
        stream = {p: self.base.model.embed_tokens.weight[token] for p, token in enumerate(ids)}
        for index in plan.first:
            stream = self.layer(self.base.model.layers[index], stream)
        first, entry, alive = {}, dict(stream), list(stream)
        self.depths = dict.fromkeys(stream, 0)
        if config.router == "token":
            chances = {p: (routers.main[0].weight @ x).softmax(0) for p, x in stream.items()}
            wanted = {p: int(chance.argmax()) + 1 for p, chance in chances.items()}
        for r, indices in enumerate(plan.groups):
            if config.router == "expert":
                scores = {p: routers.main[r].weight[0] @ stream[p] for p in alive}
                alive = alive if r == 0 else self.chosen(r, scores, alive, len(ids))
            elif config.router == "token":
                alive = [p for p in alive if wanted[p] > r]
            if not alive:
                break
            done = self.group(r, indices, {p: stream[p] for p in alive}, first)
            for p, y in done.items():
                self.depths[p] += 1
                stream[p] = stream[p] + config.alpha * scores[p].sigmoid() * y if config.router == "expert" else y
        if config.router == "token":
            stream = {p: entry[p] + config.alpha * chances[p][wanted[p] - 1] * x for p, x in stream.items()}
        for index in plan.last:
            stream = self.layer(self.base.model.layers[index], stream)
        normed = [self.normed(self.base.model.norm, stream[p]) for p in sorted(stream)]
        return torch.stack([self.base.lm_head.weight @ x for x in normed])


def by_threshold(r, scores, alive, tokens):
    return [p for p in alive if scores[p].sigmoid() > 0.5]


def by_rank(capacities):
    def chosen(r, scores, alive, tokens):
        count = max(1, int(capacities[r] * tokens))
        return sorted(sorted(alive, key=lambda p: (-float(scores[p]), p))[:count])

    return chosen


@pytest.mark.parametrize("kv", ["recursion", "share", "update"])
@pytest.mark.parametrize(
    ("router", "inference", "recursions"),
    [("expert", "top_k", 3), ("expert", "threshold", 2), ("token", "threshold", 3), ("none", "threshold", 2)],
)
@torch.no_grad()
def test_it_computes_the_formula(router, inference, recursions, kv):
    model = tiny_mor(dtype=torch.float64, router=router, inference=inference, recursions=recursions, kv=kv)
    ids = token_ids(2, TOKENS)
    out = model(ids)
    chosen = by_threshold if inference == "threshold" else by_rank(hierarchical(recursions))
    for row in range(2):
        naive = Naive(model, chosen)
        torch.testing.assert_close(out.logits[row], naive.logits(ids[row].tolist()), rtol=1e-3, atol=1e-4)
        assert out.depths[row].tolist() == [naive.depths[p] for p in range(TOKENS)]
    if router != "none":
        assert len(set(out.depths.flatten().tolist())) > 1, "all tokens have one depth: nothing was tested"


@pytest.mark.parametrize("sharing", ["cycle", "sequence", "middle_sequence"])
@torch.no_grad()
def test_the_other_sharings_compute_the_formula(sharing):
    model = tiny_mor(dtype=torch.float64, sharing=sharing, inference="top_k", layers=4)
    ids = token_ids(1, TOKENS)
    naive = Naive(model, by_rank(hierarchical(2)))
    torch.testing.assert_close(model(ids).logits[0], naive.logits(ids[0].tolist()), rtol=1e-3, atol=1e-4)


# ---- degenerate settings


def untied(model):
    """A plain model with a layer of its own for each that is run."""
    config = copy.deepcopy(model.base.config)
    order = model.plan.unrolled
    config.num_hidden_layers = len(order)
    plain = type(model.base)(config).to(model.dtype).eval()
    own = model.base.state_dict()
    plain.load_state_dict({name: value for name, value in own.items() if ".layers." not in name}, strict=False)
    for layer, index in zip(plain.model.layers, order, strict=True):
        layer.load_state_dict(model.base.model.layers[index].state_dict())
    return plain


@pytest.mark.parametrize("sharing", SHARINGS)
def test_recursion_without_routing_is_the_model_with_its_layers_repeated(sharing):
    """Bit for bit; and what is tied gets the sum of the gradients of its copies."""
    model = tiny_mor(router="none", sharing=sharing, recursions=2)
    plain = untied(model)
    ids = token_ids(2, TOKENS)
    model(ids, labels=ids).loss.backward()
    plain(ids, labels=ids).loss.backward()
    assert torch.equal(model(ids).logits, plain(ids).logits)
    for stored, layer in enumerate(model.base.model.layers):
        for name, parameter in layer.named_parameters():
            copies = [i for i, index in enumerate(model.plan.unrolled) if index == stored]
            total = sum(dict(plain.model.layers[i].named_parameters())[name].grad for i in copies)
            torch.testing.assert_close(parameter.grad, total, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_all_capacities_one_and_an_ungated_difference_are_the_recursive_model(monkeypatch, training):
    """x + (block(x) - x) is block(x), whether all tokens are taken or none is left out by name."""
    recursive = tiny_mor(router="none")
    model = tiny_mor(capacities=[1.0, 1.0], gating="additive", training=training)
    dense = model._dense

    def difference(layers, x, run, store, stage):
        return dense(layers, x, run, store, stage) - (x if isinstance(stage, int) else 0)

    monkeypatch.setattr(model, "_dense", difference)
    ids = token_ids(2, TOKENS)
    torch.testing.assert_close(model(ids).logits, recursive(ids).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_one_recursion_is_the_model_itself_on_real_weights(smollm2_slice, dtype):
    """SmolLM2's, bit for bit: prompt, cached steps, a left-padded batch."""
    base = copy.deepcopy(smollm2_slice.model).to(dtype).eval()
    check_itself(base, MoRForCausalLM.from_base(base, recursions=1, sharing="cycle", router="none"))


@pytest.mark.slow
@torch.no_grad()
def test_one_recursion_is_the_whole_model_itself(smollm2):
    base = copy.deepcopy(smollm2.model).eval()
    check_itself(base, MoRForCausalLM.from_base(base, recursions=1, router="none"))


def check_itself(base, model):
    ids = token_ids(2, 9, vocab=base.config.vocab_size)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for given in ({}, {"attention_mask": mask, "position_ids": positions}):
        theirs, ours = base(ids, use_cache=True, **given), model(ids, use_cache=True, **given)
        assert torch.equal(theirs.logits[:, -1], ours.logits[:, -1])
        assert torch.equal(theirs.logits[mask.bool()], ours.logits[mask.bool()])
        for step in range(3):
            token = theirs.logits[:, -1:].argmax(-1)
            if given:
                mask = torch.cat([mask, mask[:, -1:]], 1)
                given = {"attention_mask": mask, "position_ids": positions[:, -1:] + 1 + step}
            theirs = base(token, cache=theirs.cache, use_cache=True, **given)
            ours = model(token, cache=ours.cache, use_cache=True, **given)
            assert torch.equal(theirs.logits, ours.logits)
    assert torch.equal(base.generate(ids, max_new_tokens=5), model.generate(ids, max_new_tokens=5))


# ---- what is tied


def test_shared_layers_are_one_in_memory():
    model = tiny_mor(recursions=3)
    layers, size = model.unrolled(), LAYERS - 2
    assert len(layers) == 2 + 3 * size
    for i in range(1, 1 + size):
        for r in (1, 2):
            pairs = zip(layers[i].parameters(), layers[i + r * size].parameters(), strict=True)
            assert all(a.data_ptr() == b.data_ptr() for a, b in pairs)
    assert len({id(layer) for layer in layers}) == LAYERS


# ---- who is chosen


@pytest.mark.parametrize("recursions", [2, 3, 4])
@torch.no_grad()
def test_recursions_are_nested_and_as_large_as_their_capacity(monkeypatch, recursions):
    model = tiny_mor(recursions=recursions, inference="top_k")
    seen = record_puts(monkeypatch)
    depths = model(token_ids(2, 13)).depths
    for r, share in enumerate(hierarchical(recursions)):
        assert ((depths > r).sum(1) == max(1, int(share * 13))).all()
    assert len(seen) == recursions - 1
    before = None
    for _, _, tokens in seen:
        assert (tokens.columns.diff(dim=1) > 0).all(), "the order of the tokens was lost"
        sets = [set(row) for row in tokens.columns.tolist()]
        assert before is None or all(now <= then for now, then in zip(sets, before, strict=True))
        before = sets


@torch.no_grad()
def test_a_token_that_is_left_out_stays_as_it_is(monkeypatch):
    model = tiny_mor(recursions=3)
    seen = record_puts(monkeypatch)
    model(token_ids(3, 13))
    assert seen
    for x, after, tokens in seen:
        inside = torch.zeros(x.shape[:2], dtype=torch.bool)
        rows = tokens.rows[:, None].expand_as(tokens.columns)
        there = torch.ones_like(tokens.columns, dtype=torch.bool) if tokens.valid is None else tokens.valid
        inside[rows[there], tokens.columns[there]] = True
        assert torch.equal(x[~inside], after[~inside])
        assert (x[inside] != after[inside]).any(-1).all()


def record_puts(monkeypatch):
    seen, put = [], Tokens.put

    def recorded(self, x, new):
        seen.append((x, put(self, x, new), self))
        return seen[-1][1]

    monkeypatch.setattr(Tokens, "put", recorded)
    return seen


def test_of_equal_scores_the_earlier_token_is_taken():
    scores = torch.zeros(2, 5)
    scores[1, 3] = 1
    everyone = torch.ones(2, 5, dtype=torch.bool)
    assert routing.best(scores, everyone, torch.tensor([2, 2])).nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 3]]
    assert routing.first_best(torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]])).tolist() == [1, 0]


def changed(model, ids, at):
    other = ids.clone()
    other[:, at:] = (other[:, at:] + 7) % 90 + 2
    with torch.no_grad():
        a, b = model(ids), model(other)
    return not (
        torch.allclose(a.logits[:, :at], b.logits[:, :at], atol=1e-4)
        and torch.equal(a.depths[:, :at], b.depths[:, :at])
    )


@pytest.mark.parametrize("kv", ["recursion", "share", "update"])
def test_later_tokens_change_nothing_but_under_top_k(kv):
    ids = token_ids(4, 16)
    for settings in ({"router": "token"}, {"router": "expert"}, {"router": "expert", "causality": "aux_router"}):
        model = tiny_mor(recursions=3, kv=kv, **settings)
        assert not any(changed(model, ids, at) for at in (3, 9, 15))
    assert any(changed(tiny_mor(recursions=3, kv=kv, inference="top_k"), ids, at) for at in (3, 9, 15))


# ---- the losses and what training remembers


def test_losses_are_their_formulas():
    scores, alive = torch.tensor([[2.0, -1.0, 0.5]]), torch.tensor([[True, True, False]])
    chosen = torch.tensor([[True, False, False]])
    expected = -(math.log(1 / (1 + math.exp(-2.0))) + math.log(1 - 1 / (1 + math.exp(1.0)))) / 2
    assert float(routing.membership_loss(scores, chosen, alive)) == pytest.approx(expected)
    probabilities = torch.tensor([[0.7, 0.3], [0.6, 0.4], [0.2, 0.8], [0.5, 0.5]])
    assert float(routing.balancing_loss(probabilities, torch.tensor([0, 0, 1, 0]))) == pytest.approx(
        2 * (0.5 * 0.75 + 0.5 * 0.25)
    )
    assert float(routing.z_loss(torch.tensor([[1.0, 2.0]]))) == pytest.approx(math.log(math.e + math.e**2) ** 2)


@pytest.mark.parametrize("settings", [{"causality": "aux_router"}, {"router": "token", "recursions": 3}])
def test_autocast_does_not_round_scores(settings):
    """Neither what chooses nor what weighs; and what training asks of them goes on working."""
    model = tiny_mor(training=True, **settings)
    x = torch.randn(2, TOKENS, 64, generator=torch.Generator().manual_seed(0))

    def scores():
        predicted = [model.routers.predicted(x, 1)] if model.routers.auxiliary else []
        return [model.routers.scores(x), *predicted]

    wanted = scores()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = scores()
        loss = model(token_ids(2, TOKENS)).aux_loss
    assert all(torch.equal(one, two) for one, two in zip(wanted, found, strict=True))
    loss.backward()
    routers = model.routers.auxiliary or model.routers.main
    assert all(router.weight.grad.isfinite().all() for router in routers)


@pytest.mark.parametrize("causality", ["aux_loss", "aux_router"])
def test_training_teaches_the_threshold_what_top_k_chooses(causality):
    """After a few steps on the auxiliary loss alone, the share of tokens above the threshold is near the capacity."""
    model = tiny_mor(recursions=2, causality=causality, aux_weight=1.0, training=True)
    model.requires_grad_(False)
    model.routers.requires_grad_(True)
    with torch.no_grad():
        for router in (*model.routers.main, *model.routers.auxiliary):
            router.weight.mul_(0.01)
    optimizer = torch.optim.Adam(model.routers.parameters(), lr=0.04)
    ids = token_ids(8, 16)
    before = None
    for _ in range(80):
        optimizer.zero_grad()
        loss = model(ids).aux_loss
        before = loss.item() if before is None else before
        loss.backward()
        optimizer.step()
    assert loss.item() < before - 0.2
    with torch.no_grad():
        by_rank, by_threshold = (
            setattr(model.config, "inference", how) or model.eval()(ids).depths for how in ("top_k", "threshold")
        )
    assert (by_rank == by_threshold).float().mean() > 0.8


def test_the_auxiliary_router_does_not_touch_the_stream():
    model = tiny_mor(causality="aux_router", training=True)
    model(token_ids(2, 8)).aux_loss.backward()
    assert all(p.grad is None for p in model.base.parameters())
    assert all(router.weight.grad is None for router in model.routers.main)
    assert all(router.weight.grad is not None for router in model.routers.auxiliary)


def test_capacities_warm_up():
    model = tiny_mor(capacity_warmup=4, training=True)
    taken = [int((model(token_ids(1, 16)).depths > 1).sum()) for _ in range(6)]
    shares = [0.5 + 0.25 * (1 + math.cos(math.pi * min(1, step / 4))) for step in range(1, 7)]
    assert taken == [int(16 * share) for share in shares]
    assert int((model.eval()(token_ids(1, 16)).depths > 1).sum()) == int(
        (tiny_mor()(token_ids(1, 16)).depths > 1).sum()
    )
    assert int(model.routers.steps) == 6


def test_loss_free_balancing_moves_against_the_load():
    model = tiny_mor(router="token", recursions=3, balancing="loss_free", bias_rate=0.01, training=True)
    with torch.no_grad():
        model.routers.main[0].weight.mul_(0.1)
    ids = token_ids(8, 16)
    before = torch.bincount(model(ids).depths.flatten(), minlength=4)[1:]
    moved = model.routers.balance.clone()
    even = 8 * 16 / 3
    assert moved.tolist() == [int(math.copysign(1, even - n)) for n in before.tolist()]
    for _ in range(40):
        model(ids)
    after = torch.bincount(model(ids).depths.flatten(), minlength=4)[1:]
    assert (after - even).abs().max() < (before - even).abs().max()
    assert model.bfloat16().routers.balance.dtype == torch.int64, "half precision would round the steps away"


def test_released_coefficients():
    """The released settings of expert-choice and token-choice, field by field."""
    expert, token = MoRConfig(), MoRConfig(router="token")
    assert (expert.router, expert.sharing, expert.gating, expert.causality) == (
        "expert",
        "middle_cycle",
        "weighted",
        "aux_loss",
    )
    assert (expert.alpha, expert.aux_weight, expert.capacity_warmup, expert.kv) == (0.1, 0.001, 0, "recursion")
    assert (token.alpha, token.aux_weight, token.z_weight, token.balancing, token.bias_rate) == (
        1.0,
        0.1,
        1e-5,
        "loss",
        0.001,
    )
    assert expert.inference == "threshold", "as released it is top_k, which decoding cannot do"


# ---- what is computed, and what is kept


def count_tokens(layer):
    """Tokens that a layer's projections see from now on."""
    counts = {"q_proj": 0, "k_proj": 0, "mlp": 0}

    def counting(name):
        def hook(_module, inputs):
            counts[name] += inputs[0].shape[0] * inputs[0].shape[1]

        return hook

    layer.self_attn.q_proj.register_forward_pre_hook(counting("q_proj"))
    layer.self_attn.k_proj.register_forward_pre_hook(counting("k_proj"))
    layer.mlp.register_forward_pre_hook(counting("mlp"))
    return counts


@pytest.mark.parametrize("kv", ["recursion", "share", "update"])
@torch.no_grad()
def test_tokens_outside_a_recursion_are_not_computed(kv):
    model = tiny_mor(recursions=4, inference="top_k", kv=kv)
    counts = count_tokens(model.base.model.layers[1])
    model(token_ids(2, 16))
    taken = 2 * (16 + 12 + 8 + 4)
    assert counts == {"q_proj": taken, "k_proj": 2 * 16 if kv == "share" else taken, "mlp": taken}


@torch.no_grad()
def test_rows_that_are_through_are_not_computed_at_decode():
    """Rows of one batch at different depths: in a step, the shared layer sees a row once for each recursion it takes."""
    model = tiny_mor(recursions=3)
    ids = token_ids(8, 6)
    out = model(ids, use_cache=True)
    counts = count_tokens(model.base.model.layers[1])
    kinds = set()
    for _ in range(6):
        before = counts["mlp"]
        out = model(out.logits[:, -1:].argmax(-1), cache=out.cache, use_cache=True)
        assert counts["mlp"] - before == int(out.depths.sum())
        kinds |= {tuple(sorted(set(out.depths.flatten().tolist())))}
    assert any(len(kind) > 1 for kind in kinds), "all rows had one depth: nothing was tested"


@pytest.mark.parametrize("settings", [{"router": "expert"}, {"router": "none"}, {"causality": "aux_router"}])
@pytest.mark.parametrize("kv", ["recursion", "share"])
@torch.no_grad()
def test_counted_macs_are_the_formula(settings, kv):
    model = tiny_mor(recursions=3, inference="top_k", kv=kv, **settings)
    for tokens in (1, 7, 24):
        tables = count_cost(model.base.model.rotary_emb, torch.zeros(1), torch.arange(tokens)[None]).macs
        assert count_cost(model, token_ids(1, tokens)).macs == forward_macs(model.config, tokens) + tables


@pytest.mark.parametrize("recursions", [2, 4])
@torch.no_grad()
def test_entries_of_the_cache_are_those_of_the_paper(recursions):
    """A shared layer keeps (N_r + 1) / 2 of what one layer keeps of all tokens, or with sharing as much as one."""
    ids = token_ids(2, 16)
    one = 2 * 16
    held = {}
    for kv in ("recursion", "share", "update"):
        cache = tiny_mor(recursions=recursions, inference="top_k", kv=kv)(ids, use_cache=True).cache
        entries = cache.entries()
        assert entries.pop("first") == entries.pop("last") == one
        held[kv] = sum(entries.values())
        pair = 2 * 2 * 16 * 4  # keys and values, heads, head dim, float32
        assert cache.bytes() == pair * (2 * one + (LAYERS - 2) * held[kv])
    unrolled = recursions * one
    assert held["recursion"] / unrolled == (recursions + 1) / (2 * recursions)
    assert held["share"] / unrolled == 1 / recursions
    assert held["update"] == held["recursion"]


# ---- from a checkpoint


def test_where_stored_layers_come_from():
    assert sources(6, 2, "cycle", "average") == ([[0, 3], [1, 4], [2, 5]], 0)
    assert sources(6, 2, "sequence", "average") == ([[0, 1], [2, 3], [4, 5]], 0)
    assert sources(9, 3, "middle_sequence", "average") == ([[0], [1, 2, 3], [4, 5, 6], [8]], 1)
    assert sources(8, 3, "middle_cycle", "lower") == ([[0], [1], [2], [7]], 0)
    assert sources(8, 3, "middle_cycle", "upper") == ([[0], [5], [6], [7]], 0)
    assert sources(8, 3, "middle_cycle", "random") == ([[0], [], [], [7]], 0)
    assert sources(30, 3, "middle_cycle", "stepwise")[1] == 1  # SmolLM-135M loses one of 30
    with pytest.raises(ValueError, match="at least 4 layers"):
        sources(3, 2, "middle_cycle", "lower")


@pytest.mark.parametrize("init", ["stepwise", "average", "lower", "upper", "random"])
def test_conversion_makes_stored_layers_and_leaves_the_model(init):
    source = tiny_model(num_hidden_layers=7)
    before = copy.deepcopy(source.state_dict())
    with pytest.warns(UserWarning, match="1 of 7 layers were dropped"):
        model = convert(source, recursions=2, init=init)
    assert len(model.unrolled()) == 6
    assert model.config.num_hidden_layers == 4
    made, layers = model.base.model.layers, source.model.layers
    for stored, indices in zip(made, sources(7, 2, "middle_cycle", init)[0], strict=True):
        for name, value in stored.state_dict().items():
            if indices:
                torch.testing.assert_close(value, sum(layers[i].state_dict()[name] for i in indices) / len(indices))
            elif value.ndim > 1:
                assert not any(torch.equal(value, layer.state_dict()[name]) for layer in layers)
            assert all(value.data_ptr() != layer.state_dict()[name].data_ptr() for layer in layers)
    assert torch.equal(model.base.lm_head.weight, source.lm_head.weight)
    assert all(torch.equal(value, before[name]) for name, value in source.state_dict().items())
    ids = token_ids(1, 8)
    with torch.no_grad():
        assert model(ids).logits.isfinite().all()


def test_one_recursion_converts_to_the_model_itself():
    source = tiny_model(num_hidden_layers=4)
    ids = token_ids(2, 8)
    for dtype in (torch.float32, torch.bfloat16):
        model = convert(source.to(dtype), recursions=1, router="none")
        assert torch.equal(model(ids).logits, source(ids).logits)


# ---- depth-wise batching


@pytest.mark.parametrize(
    "settings",
    [
        {"router": "none", "recursions": 2},
        {"router": "expert", "recursions": 3},
        {"router": "expert", "recursions": 3, "causality": "aux_router"},
        {"router": "token", "recursions": 3},
        {"router": "expert", "recursions": 2, "sharing": "sequence"},
    ],
)
@torch.no_grad()
def test_depthwise_batching_answers_as_each_prompt_alone(settings):
    model = tiny_mor(**settings)
    prompts = [token_ids(1, length, seed=seed)[0].tolist() for seed, length in enumerate((4, 1, 4, 2, 5))]
    counts = [6, 3, 5, 1, 4]
    found = generate_depthwise(model, prompts, counts, lanes=3)
    for prompt, count, answer in zip(prompts, counts, found.tokens, strict=True):
        ids = torch.tensor([prompt])
        assert model.generate(ids, max_new_tokens=count, do_sample=False)[0, len(prompt) :].tolist() == answer
    assert sum(found.depths) == sum(counts)
    assert found.rows == sum(count * (depth + 1) for depth, count in enumerate(found.depths))
    assert found.rows / 3 <= found.ticks <= found.rows


@torch.no_grad()
def test_lanes_stay_full_where_the_plain_step_has_empty_rows():
    """The shared layers are called once a tick, and but for the end of the queue with every lane."""
    model = tiny_mor(recursions=3)
    calls = []
    model.base.model.layers[1].register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    found = generate_depthwise(model, [[token] for token in range(2, 22)], 5, lanes=4)
    assert len(calls) == found.ticks
    assert sum(calls) == found.rows
    assert calls[: len(calls) // 2] == [4] * (len(calls) // 2)
    assert len([n for n in found.depths if n]) > 1


@torch.no_grad()
@pytest.mark.parametrize(("router", "copied"), [("none", False), ("expert", True)])
def test_lanes_at_one_recursion_are_looked_at_in_place(monkeypatch, router, copied):
    """Full depth pays nothing for the batching: the layers attend to the stored keys themselves. Lanes at different recursions cannot."""
    model = tiny_mor(router=router, recursions=3)
    prompts = [[2 + lane, 3] for lane in range(4)]
    found = set()
    read = Place.read

    def recorded(self, slot):
        keys, values = read(self, slot)
        stored = self.stage.keys[slot]
        found.add(keys.untyped_storage().data_ptr() != stored.untyped_storage().data_ptr())
        return keys, values

    monkeypatch.setattr(Place, "read", recorded)
    generate_depthwise(model, prompts, 5, lanes=4)
    assert copied in found
    assert copied or found == {False}


def test_an_answer_ends_with_its_last_token():
    model = tiny_mor()
    whole = generate_depthwise(model, [[5, 6]], 6).tokens[0]
    assert generate_depthwise(model, [[5, 6]], 6, eos=[whole[2]]).tokens[0] == whole[: whole.index(whole[2]) + 1]


def test_an_answer_ends_with_the_models_own_last_token():
    """As `generate` has it; other tokens, one or several, in its place; with an empty list no token ends anything."""
    model = tiny_mor()
    whole = generate_depthwise(model, [[5, 6]], 6).tokens[0]
    for own in (whole[2], [whole[2], 95]):
        model.generation_config.eos_token_id = own
        ended = generate_depthwise(model, [[5, 6]], 6).tokens[0]
        assert ended == whole[: whole.index(whole[2]) + 1]
        assert ended == model.generate(torch.tensor([[5, 6]]), max_new_tokens=6, do_sample=False)[0, 2:].tolist()
        assert generate_depthwise(model, [[5, 6]], 6, eos=[]).tokens[0] == whole
        for other in (whole[0], [whole[0]], np.int64(whole[0])):
            assert generate_depthwise(model, [[5, 6]], 6, eos=other).tokens[0] == whole[:1]


def test_numbers_of_numpy_are_numbers():
    model = tiny_mor()
    wanted = generate_depthwise(model, [[5, 6], [7]], 3).tokens
    for count in (np.int64(3), np.array(3), torch.tensor(3), [np.int64(3)] * 2, np.array([3, 3])):
        assert generate_depthwise(model, [[5, 6], [7]], count).tokens == wanted


# ---- bad input


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"recursions": 0}, ValueError, "recursions"),
        ({"sharing": "loop"}, ValueError, "sharing"),
        ({"router": "random"}, ValueError, "router"),
        ({"capacities": [1.0]}, ValueError, "one a recursion"),
        ({"capacities": [0.5, 0.5]}, ValueError, "begin with 1"),
        ({"capacities": [1.0, float("nan")]}, ValueError, "capacities"),
        ({"capacities": 0.5}, TypeError, "capacities"),
        ({"alpha": 0.0}, ValueError, "alpha"),
        ({"kv": "share", "sharing": "sequence"}, ValueError, "same layers"),
        ({"inference": "sample"}, ValueError, "inference"),
        ({"capacity_warmup": -1}, ValueError, "capacity_warmup"),
    ],
)
def test_settings_out_of_range_are_refused(settings, error, said):
    with pytest.raises(error, match=said):
        tiny_mor(**settings)


def test_too_few_layers_are_refused():
    with pytest.raises(ValueError, match="at least 3 layers"):
        tiny_mor(layers=2)
    with pytest.raises(ValueError, match="recursions"):
        layer_plan(4, 0, "cycle")


def test_depthwise_batching_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="eval"):
        generate_depthwise(tiny_mor(training=True), [[1]], 1)
    with pytest.raises(ValueError, match="threshold"):
        generate_depthwise(tiny_mor(inference="top_k"), [[1]], 1)
    with pytest.raises(ValueError, match="kv"):
        generate_depthwise(tiny_mor(kv="share"), [[1]], 1)
    with pytest.raises(ValueError, match="new_tokens"):
        generate_depthwise(tiny_mor(), [[1]], [1, 2])
    with pytest.raises(ValueError, match="empty prompt"):
        generate_depthwise(tiny_mor(), [[1], []], 1)
    with pytest.raises(TypeError, match="model must be a MoRForCausalLM, got LlamaForCausalLM"):
        generate_depthwise(tiny_model(), [[1]], 1)
    with pytest.raises(TypeError, match="new_tokens must be a whole number at least 1, got 1.5"):
        generate_depthwise(tiny_mor(), [[1]], 1.5)
    with pytest.raises(TypeError, match="eos must be a whole number at least 0, got 'end'"):
        generate_depthwise(tiny_mor(), [[1]], 1, eos=["end"])


def test_the_formula_of_macs_wants_tokens():
    config = tiny_mor().config
    with pytest.raises(ValueError, match="tokens must be a whole number at least 1, got 0"):
        forward_macs(config, 0)
    with pytest.raises(TypeError, match="tokens must be a whole number at least 1, got 2.5"):
        forward_macs(config, 2.5)


@torch.no_grad()
def test_positions_with_gaps_are_one_sequence_under_a_mask_of_ones():
    """Without a mask transformers takes them for several packed ones; with one of ones the model must do as its base."""
    from tests.properties.architectures import build, inputs

    base = build("llama")
    ids = inputs("llama", tokens=5)["input_ids"]
    given = {"attention_mask": torch.ones_like(ids), "position_ids": torch.tensor([[0, 1, 2, 10, 11]])}
    model = MoRForCausalLM.from_base(base, recursions=1, router="none", sharing="cycle")
    torch.testing.assert_close(model(ids, **given).logits, base(ids, **given).logits)

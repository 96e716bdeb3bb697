"""What neurons do, groups of them that are really left out, and bricks that are merged, stitched, edited and grown."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tests.properties.architectures import CAUSAL, build, inputs
from tests.tiny import tiny_model, token_ids
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from assay.methods.compression.configurable_bricks import (
    Brick,
    BrickMlp,
    BrickStore,
    FunctionalityScorer,
    Stitched,
    arithmetic,
    average,
    average_precision,
    below,
    by_oracle,
    by_task,
    editing,
    fit_interface,
    for_task,
    grow,
    lora_brick,
    mask_neurons,
    masking,
    mean_activations,
    mlps,
    overlap,
    part,
    partition,
    put_lora,
    regression_mean,
    to_bricks,
)
from assay.methods.core.layers.inputs import input_moments
from assay.methods.core.sparsity.removal import remove

NEURONS = 96
WITHOUT = {"mamba", "mixtral", "gpt_oss"}  # no MLPs of linear layers
DENSE = [name for name in CAUSAL if name not in WITHOUT]


@pytest.fixture
def model():
    return tiny_model()


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def given(model, ids, layer="model.layers.1.mlp.down_proj"):
    """What the last layer of an MLP is given, hooks that were set before counted in."""
    kept = []
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda _, args: kept.append(args[0].clone()))
    logits(model, ids)
    handle.remove()
    return kept[0]


def permuted(model, seed=0):
    """The same function with every MLP's neurons in another order; and the orders."""
    other, orders = copy.deepcopy(model), {}
    for place, name in enumerate(mlps(model)):
        mlp = other.get_submodule(name)
        order = torch.randperm(NEURONS, generator=torch.Generator().manual_seed(seed + place))
        orders[name] = order
        with torch.no_grad():
            for layer in (mlp.gate_proj, mlp.up_proj):
                layer.weight.copy_(layer.weight[order])
            mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, order])
    return other, orders


# ---- the score ---------------------------------------------------------------------------------------------------------------------


def test_a_neuron_that_is_the_label_scores_one():
    labels = torch.arange(20) % 3 == 0
    assert average_precision(labels.float(), labels) == 1
    assert average_precision(-labels.float(), labels) < 0.5


def test_a_random_neuron_scores_the_prevalence():
    labels = torch.arange(280) % 7 == 0
    scores = average_precision(torch.rand(280, 2000, generator=torch.Generator().manual_seed(0)), labels)
    assert float(scores.mean()) == pytest.approx(1 / 7, abs=0.02)


def test_the_score_is_scikit_learns_ties_included():
    metrics = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(1)
    labels = torch.rand(60, generator=generator) < 0.3
    for levels in (4, 1000):
        scores = torch.randint(levels, (60, 8), generator=generator).double()
        wanted = [metrics.average_precision_score(labels.numpy(), column.numpy()) for column in scores.T]
        assert average_precision(scores, labels).tolist() == pytest.approx(wanted, abs=1e-12)


def test_only_the_order_counts():
    generator = torch.Generator().manual_seed(2)
    labels, scores = torch.rand(50, generator=generator) < 0.4, torch.rand(50, 6, generator=generator).double()
    assert torch.equal(average_precision(scores, labels), average_precision(scores.pow(3).mul(7).sub(2), labels))
    assert not torch.equal(average_precision(scores, labels), average_precision(-scores, labels))


def test_scikit_learn_selects_neurons_by_it():
    selection = pytest.importorskip("sklearn.feature_selection")
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(40) % 2 == 0
    x = torch.rand(40, 12, generator=generator)
    x[:, 5] += 2 * labels

    def score(features, classes):
        return average_precision(torch.from_numpy(features), torch.from_numpy(classes)).numpy()

    kept = selection.SelectKBest(score, k=1).fit(x.numpy(), labels.numpy())
    assert kept.get_support().nonzero()[0].tolist() == [5]


def planted(passages=30):
    """Activations of two MLPs for three functions; neuron f of each is large on function f, neuron 9 on everything."""
    generator = torch.Generator().manual_seed(4)
    labels = ["code", "math", "prose"] * (passages // 3)
    found = {}
    for mlp in ("a", "b"):
        x = torch.rand(passages, 40, generator=generator)
        for place, function in enumerate(("code", "math", "prose")):
            x[:, place] += torch.tensor([2.0 * (label == function) for label in labels])
        x[:, 9] += 10 + torch.tensor([float(label == "math") for label in labels])
        found[mlp] = x
    return found, labels


def test_the_scorer_finds_what_was_planted():
    found, labels = planted()
    scorer = FunctionalityScorer(share=0.025).fit(found, labels)
    assert scorer.functions_ == ["code", "math", "prose"]
    assert scorer.prevalence_["math"] == pytest.approx(1 / 3)
    assert scorer.specialists_["code"]["a"].nonzero().flatten().tolist() == [0]
    assert scorer.specialists_["prose"]["b"].nonzero().flatten().tolist() == [2]
    layer = scorer.summary()["code"]["a"]
    assert layer.best == 1
    assert layer.chance < layer.mean < layer.best
    assert layer.best_share == 1  # half a per cent of 40 neurons is one


def test_residents_are_left_out_when_asked_for():
    found, labels = planted()
    assert FunctionalityScorer(share=0.05).fit(found, labels).specialists_["math"]["a"][9]
    without = FunctionalityScorer(share=0.05, residents=0.025).fit(found, labels).specialists_["math"]["a"]
    assert not without[9]
    assert int(without.sum()) == 2


def test_overlaps():
    generator = torch.Generator().manual_seed(5)

    def drawn():
        mask = torch.zeros(2000, dtype=torch.bool)
        mask[torch.randperm(2000, generator=generator)[:100]] = True
        return {"mlp": mask}

    one = drawn()
    assert overlap(one, one) == 1
    assert overlap(one, {"mlp": ~one["mlp"]}) == 0
    found = [overlap(drawn(), drawn()) for _ in range(200)]
    spread = (0.05 * 0.95 * (1900 / 1999) / 100) ** 0.5  # hypergeometric, as a share of 100
    assert float(np.mean(found)) == pytest.approx(0.05, abs=4 * spread / 200**0.5)
    assert float(np.std(found)) == pytest.approx(spread, rel=0.25)


# ---- masking -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DENSE)
def test_no_neurons_masked_changes_no_bit_and_all_leave_the_bias(name):
    model, batch = build(name), inputs(name, batch=1, tokens=12)
    before = model(**batch).logits
    for indicator in ("activation", "output"):
        with masking(model, 0.0, indicator):
            assert torch.equal(model(**batch).logits, before)
    outs = []
    layers = [model.get_submodule(group.consumers[0].layer) for group in mlps(model).values()]
    for layer in layers:
        with torch.no_grad():
            if layer.bias is not None:
                layer.bias.normal_()
    handles = [layer.register_forward_hook(lambda layer, _, out: outs.append((layer, out))) for layer in layers]
    with masking(model, 1.0):
        model(**batch)
    for handle in handles:
        handle.remove()
    assert len(outs) == len(layers) == 2
    for layer, out in outs:
        wanted = torch.zeros_like(out) if layer.bias is None else layer.bias.expand_as(out)
        torch.testing.assert_close(out, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", sorted(WITHOUT & set(CAUSAL)))
def test_models_without_such_mlps_are_refused(name):
    with pytest.raises(ValueError, match="must have MLPs"):
        mlps(build(name))


@pytest.mark.parametrize("share", [0.1, 0.29, 0.7])
def test_exactly_as_many_neurons_as_said_are_masked_on_every_token(model, share):
    ids = token_ids(2, 10)
    for indicator in ("activation", "output"):
        with masking(model, share, indicator):
            for layer in ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"):
                zeros = (given(model, ids, layer) == 0).sum(-1)
                assert zeros.unique().tolist() == [part(share, NEURONS)]
    assert part(0.29, 100) == 29  # in binary it would be 28


def test_those_worth_least_are_masked(model):
    ids, layer = token_ids(1, 10), model.model.layers[0].mlp.down_proj
    h = given(model, ids, "model.layers.0.mlp.down_proj")
    norms = layer.weight.detach().norm(dim=0)
    for indicator, worth in (("activation", h.abs()), ("output", h.abs() * norms)):
        with masking(model, 0.5, indicator):
            kept = given(model, ids, "model.layers.0.mlp.down_proj") != 0
        assert float(worth[~kept].view(10, -1).amax(1).sub(worth[kept].view(10, -1).amin(1)).max()) <= 0


def test_hooks_go_also_after_an_error(model):
    ids = token_ids(1, 6)
    before = logits(model, ids)
    with pytest.raises(RuntimeError, match="stop"), masking(model, 0.9):
        raise RuntimeError("stop")
    assert torch.equal(logits(model, ids), before)


@torch.no_grad()
def test_output_magnitude_costs_an_mlp_less_than_activation(model):
    """In squares of its output, whose parts point anywhere; what that does to the loss of a real model is an experiment."""
    mlp, x = model.model.layers[0].mlp, torch.randn(1, 400, 64)
    generator = torch.Generator().manual_seed(12)
    mlp.down_proj.weight *= torch.exp(torch.randn(NEURONS, generator=generator))  # some neurons weigh more than others
    whole = mlp(x)
    for share in (0.3, 0.6, 0.8):
        lost = {}
        for indicator in ("activation", "output"):
            with masking(model, share, indicator):
                lost[indicator] = float((mlp(x) - whole).square().sum(-1).mean())
        assert lost["output"] < 0.9 * lost["activation"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_masking_is_what_a_plain_sort_says(dtype):
    model = tiny_model().to(dtype)
    layer, ids = "model.layers.0.mlp.down_proj", token_ids(8, 7)
    h, norms = given(model, ids, layer), model.get_submodule(layer).weight.double().norm(dim=0)
    for indicator, worth in (("activation", h.abs()), ("output", (h.double() * norms).abs())):
        weakest = worth.argsort(-1)[..., : part(0.4, NEURONS)]
        with masking(model, 0.4, indicator):
            torch.testing.assert_close(given(model, ids, layer), h.scatter(-1, weakest, 0.0), rtol=0, atol=0)


def test_activations_that_are_no_numbers_are_refused(model):
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="got NaN"), masking(model, 0.5):
        logits(model, token_ids(1, 5))
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ValueError, match="must be finite"):
        FunctionalityScorer().fit(mean_activations(model, [token_ids(1, 5)] * 2), ["a", "b"])


def test_the_names_of_neurons_do_not_matter(model):
    other, orders = permuted(model)
    ids = [token_ids(1, 12, seed=seed) for seed in range(9)]
    torch.testing.assert_close(logits(other, ids[0]), logits(model, ids[0]), rtol=1e-4, atol=1e-4)
    with masking(model, 0.5, "output"), masking(other, 0.5, "output"):
        torch.testing.assert_close(logits(other, ids[0]), logits(model, ids[0]), rtol=1e-4, atol=1e-4)
    ours, theirs = mean_activations(model, ids), mean_activations(other, ids)
    labels = ["x", "y", "z"] * 3
    scored, again = FunctionalityScorer().fit(ours, labels), FunctionalityScorer().fit(theirs, labels)
    for name, order in orders.items():
        torch.testing.assert_close(theirs[name], ours[name][:, order], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(again.scores_[name].sort(1).values, scored.scores_[name].sort(1).values)
    edges = (0.1, 0.2, 0.5)
    for name, shares in below(other, ids, edges).items():
        torch.testing.assert_close(shares, below(model, ids, edges)[name], rtol=0, atol=1e-3)


def test_silenced_neurons_are_those_that_removal_takes_out(model):
    ids = token_ids(2, 8)
    gone = {name: torch.arange(NEURONS) % 3 == 0 for name in mlps(model)}
    before = logits(model, ids)
    with mask_neurons(model, gone):
        silenced = logits(model, ids)
    assert torch.equal(logits(model, ids), before)
    assert not torch.allclose(silenced, before, atol=1e-3)
    remove(model, {name: ~mask for name, mask in gone.items()})
    torch.testing.assert_close(logits(model, ids), silenced, rtol=1e-4, atol=1e-4)


def test_mean_activations_are_means_over_tokens(model):
    ids = [token_ids(1, 7, seed=seed) for seed in range(2)]
    found = mean_activations(model, ids)["model.layers.1.mlp"]
    assert found.shape == (2, NEURONS)
    for row, one in zip(found, ids, strict=True):
        torch.testing.assert_close(row, given(model, one)[0].abs().mean(0))


def test_the_share_below_a_share_of_the_largest(model):
    ids = token_ids(1, 9)
    h = given(model, ids)[0].abs()
    wanted = [float((h <= edge * h.amax(1, keepdim=True)).float().mean()) for edge in (0.2, 1.0)]
    assert below(model, [ids], (0.2, 1.0))["model.layers.1.mlp"].tolist() == pytest.approx(wanted, abs=2e-3)
    assert wanted[1] == 1 > wanted[0] > 0


# ---- groups ------------------------------------------------------------------------------------------------------------------------


def test_groups_are_of_one_size_and_keep_alike_neurons_together():
    generator = torch.Generator().manual_seed(6)
    centres = torch.eye(4, 10)
    rows = (centres.repeat_interleave(6, 0) + 0.05 * torch.randn(24, 10, generator=generator))[
        torch.randperm(24, generator=generator)
    ]
    labels = partition(rows, 4)
    assert labels.bincount().tolist() == [6] * 4
    alone = partition(torch.randn(24, 10, generator=generator), 4)
    assert alone.bincount().tolist() == [6] * 4

    def within(labels):
        unit = nn.functional.normalize(rows, dim=1)
        return float(np.mean([(unit[labels == g] @ unit[labels == g].T).mean() for g in range(4)]))

    assert within(labels) > within(torch.arange(24) % 4) + 0.1


def with_biases(bias):
    """A tiny model, its MLPs with biases that are not 0 if `bias`."""
    model = tiny_model(mlp_bias=bias)
    for name, parameter in model.named_parameters():
        if "mlp" in name and name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


@torch.no_grad()
def test_the_mass_of_several_passages_is_that_of_each(model):
    ids = [token_ids(1, 7, seed=seed) for seed in range(3)]
    whole = mean_activations(model, ids, "output")
    for place, one in enumerate(ids):
        for name, row in mean_activations(model, [one], "output").items():
            assert torch.equal(row[0], whole[name][place])
            h = given(model, one, f"{name}.down_proj")[0]
            norms = model.get_submodule(f"{name}.down_proj").weight.norm(dim=0)
            torch.testing.assert_close(row[0], (h.abs() * norms).mean(0))


def bricks_of(model, groups=8, active=3):
    mlp = model.model.layers[0].mlp
    return mlp, BrickMlp(mlp, partition(mlp.gate_proj.weight, groups), active).eval()


@pytest.mark.parametrize("bias", [False, True])
def test_all_groups_are_the_dense_mlp(bias):
    model = with_biases(bias)
    mlp, layer = bricks_of(model, active=8)
    for rows in (1, 13):
        x = torch.randn(1, rows, 64)
        torch.testing.assert_close(layer(x), mlp(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_what_is_left_out_is_what_masking_would_leave_out(bias):
    model = with_biases(bias)
    _, layer = bricks_of(model)
    x = torch.randn(9, 64)
    chosen = layer.router(x).topk(3).indices
    torch.testing.assert_close(layer(x), layer.reference(x, chosen), rtol=1e-4, atol=1e-4)
    for row, own in zip(x, chosen, strict=True):
        torch.testing.assert_close(layer(row[None]), layer.reference(row[None], own[None]), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_groups_that_are_not_chosen_are_not_computed(model):
    _, layer = bricks_of(model, groups=8, active=2)
    for rows in (1, 5):
        with FlopCounterMode(display=False) as counter:
            layer(torch.randn(rows, 64))
        assert counter.get_total_flops() == 2 * rows * (3 * 64 * NEURONS * 2 // 8 + 64 * 8)


@torch.no_grad()
def test_every_place_counts_alike(model):
    """Batches of any size, the tokens in any order: the sliced, the dispatched and the masked way are one function."""
    _, layer = bricks_of(model)
    layer = layer.double()
    x = torch.randn(8, 5, 64, dtype=torch.float64)
    whole = layer(x)
    assert whole.shape == x.shape
    for row in range(8):
        torch.testing.assert_close(layer(x[row]), whole[row], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(layer(x[row, :1]), whole[row, :1], rtol=1e-9, atol=1e-9)
    assert layer(x[:0]).shape == (0, 5, 64)


def test_bricks_under_autocast_and_their_choice_is_saved(model):
    _, layer = bricks_of(model)
    x = torch.randn(6, 64)
    wanted = layer(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
        single = layer(x[:1])
    assert (
        float((found.detach().float() - wanted).norm() / wanted.norm()) < 0.5
    )  # a router may choose otherwise in bfloat16
    assert single.shape == (1, 64)
    layer.task, layer.chooser = torch.tensor([1, 4, 6]), by_task
    _, again = bricks_of(model)
    again.load_state_dict(layer.state_dict())
    again.chooser = by_task
    assert torch.equal(again(x), layer(x))


def test_bricks_can_be_trained_and_what_is_changed_counts(model):
    _, layer = bricks_of(model)
    x = torch.randn(20, 64)
    before = layer(x).detach()
    layer(x).square().mean().backward()
    for parameter in (layer.inner, layer.outer):
        assert float(parameter.grad.abs().sum()) > 0
    with torch.no_grad():
        layer.outer *= 2
    torch.testing.assert_close(layer(x), 2 * before)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x))


@torch.no_grad()
def test_mass_is_the_sum_of_output_magnitudes(model):
    mlp, layer = bricks_of(model, groups=4)
    labels = partition(mlp.gate_proj.weight, 4)
    x = torch.randn(5, 64)
    h = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
    worth = h.abs() * mlp.down_proj.weight.norm(dim=0)
    wanted = torch.stack([worth[:, labels == group].sum(1) for group in range(4)], 1)
    torch.testing.assert_close(layer.mass(x), wanted, rtol=1e-4, atol=1e-4)
    layer.chooser = by_oracle
    torch.testing.assert_close(layer(x), layer.reference(x, wanted.topk(3).indices), rtol=1e-4, atol=1e-4)


def two_halves():
    """A model in which half of each MLP's neurons work where a direction of the input is positive, the others where it is not."""
    model = tiny_model()
    generator = torch.Generator().manual_seed(7)
    for block in model.model.layers:
        direction = 0.5 * torch.randn(64, generator=generator)
        with torch.no_grad():
            weight = block.mlp.gate_proj.weight
            weight.copy_(0.02 * torch.randn(weight.shape, generator=generator))
            weight[: NEURONS // 2] += direction
            weight[NEURONS // 2 :] -= direction
    return model


@torch.no_grad()
def test_routers_learn_which_groups_will_work():
    model = to_bricks(two_halves(), [token_ids(1, 64, seed=seed) for seed in range(8)], groups=2, active=1)
    right = []

    def look(layer, args):
        rows = args[0].flatten(0, 1)
        right.append((layer.router(rows).argmax(-1) == layer.mass(rows).argmax(-1)).float().mean())

    layers = [module for module in model.modules() if isinstance(module, BrickMlp)]
    assert len(layers) == 2
    for layer in layers:
        layer.register_forward_pre_hook(look)
    model(token_ids(1, 200, seed=99))
    assert min(map(float, right)) > 0.8  # half of them by chance


@torch.no_grad()
def test_a_model_of_all_groups_is_the_dense_model(model):
    ids = token_ids(2, 9)
    dense = logits(model, ids)
    changed = to_bricks(model, [token_ids(1, 40)], groups=8, active=8)
    torch.testing.assert_close(logits(changed, ids), dense, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="must not be saved"):
        changed.save_pretrained("nowhere")


@torch.no_grad()
def test_groups_of_a_task_are_those_that_did_most(model):
    examples = [token_ids(1, 30, seed=seed) for seed in range(3)]
    changed = to_bricks(model, examples, groups=8, active=2)
    layer = changed.model.layers[0].mlp
    seen = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    for ids in examples:
        changed(ids)
    handle.remove()
    for_task(changed, examples)
    wanted = layer.mass(torch.cat(seen)).sum(0).topk(2).indices
    assert sorted(layer.task.tolist()) == sorted(wanted.tolist())
    assert layer.chooser is by_task
    x = torch.randn(4, 64)
    torch.testing.assert_close(layer(x), layer.reference(x, wanted.expand(4, -1)), rtol=1e-4, atol=1e-4)


def test_bricks_generate_and_work_in_bfloat16(model):
    ids = token_ids(2, 6)
    changed = to_bricks(model.to(torch.bfloat16), [token_ids(1, 40)], groups=4, active=2)
    out = changed.generate(ids, max_new_tokens=4, do_sample=False)
    assert out.shape == (2, 10)
    assert changed.model.layers[0].mlp.router.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["gpt2", "opt", "phi3"])
def test_other_mlps_are_refused_before_anything_changes(name):
    model = build(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="gated MLPs"):
        to_bricks(model, [inputs(name, batch=1)])
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_an_mlp_that_does_something_besides_is_refused(model):
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: 2 * type(mlp).forward(mlp, x)
    with pytest.raises(ValueError, match="plain gated MLPs"):
        to_bricks(model, [token_ids(1, 20)], groups=4, active=2)
    assert not any(isinstance(module, BrickMlp) for module in model.modules())


# ---- bricks that are added ---------------------------------------------------------------------------------------------------------


def test_the_store_retrieves_by_key():
    store = BrickStore()
    for place, name in enumerate(("a", "b", "c")):
        store.add(Brick(name, "lora" if name != "c" else "text", key=torch.eye(3)[place], text=name))
    store.add(Brick("no key", "lora"))
    query = torch.tensor([0.1, 0.5, 1.0])
    assert [brick.name for brick, _ in store.retrieve(query, 3)] == ["c", "b", "a"]
    assert [brick.name for brick, _ in store.retrieve(query, kind="lora")] == ["b"]
    assert store.take("c").text == "c"
    assert "c" not in store
    assert len(store) == 3
    for query, k, complaint in (
        (torch.ones(3), 3, "k must be"),
        (torch.ones(2), 1, "query must be"),
        (torch.tensor([torch.nan] * 3), 1, "query must be finite"),
    ):
        with pytest.raises(ValueError, match=complaint):
            store.retrieve(query, k)
    with pytest.raises(ValueError, match="name must be new"):
        store.add(Brick("a", "lora"))


def test_adapters_of_peft_are_bricks(model):
    peft = pytest.importorskip("peft")
    settings = {"r": 2, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings))
    adapted.add_adapter("other", peft.LoraConfig(**settings))
    ids = token_ids(1, 8)
    first = logits(adapted, ids)
    adapted.set_adapter("other")
    second = logits(adapted, ids)
    assert not torch.allclose(first, second, atol=1e-3)
    one, two = lora_brick(adapted, "one", adapter="default"), lora_brick(adapted, "two", adapter="other")
    put_lora(adapted, Brick("same", "lora", average([one.tensors, one.tensors])), adapter="other")
    torch.testing.assert_close(logits(adapted, ids), first, rtol=1e-5, atol=1e-5)
    put_lora(adapted, two, adapter="other")
    torch.testing.assert_close(logits(adapted, ids), second, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="adapter must have the same tensors"):
        put_lora(adapted, Brick("half", "lora", dict(list(one.tensors.items())[:1])))


def tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(4, 3, generator=generator), "b": torch.randn(3, generator=generator)}


def test_the_average_of_identical_bricks_is_the_brick():
    brick, fisher = tensors(0), {name: x.square() for name, x in tensors(1).items()}
    for merged in (
        average([brick] * 3),
        average([brick] * 2, weights=[1, 3]),
        average([brick] * 2, fisher=[fisher, fisher]),
    ):
        for name, x in merged.items():
            torch.testing.assert_close(x, brick[name], rtol=1e-6, atol=0)


def test_averages_weigh_as_they_say():
    one, two = tensors(0), tensors(1)
    torch.testing.assert_close(average([one, two], weights=[1, 3])["w"], (one["w"] + 3 * two["w"]) / 4)
    known = [{name: torch.full_like(x, value) for name, x in one.items()} for value in (0.0, 2.0)]
    torch.testing.assert_close(average([one, two], fisher=known)["w"], two["w"])
    unknown = [{name: torch.zeros_like(x) for name, x in one.items()}] * 2
    torch.testing.assert_close(average([one, two], fisher=unknown)["w"], (one["w"] + two["w"]) / 2)


def test_task_arithmetic_there_and_back_is_the_base():
    base, brick, other = tensors(0), tensors(1), tensors(2)
    for name, x in arithmetic(base, (1, brick), (-1, brick)).items():
        assert torch.equal(x, base[name])
    torch.testing.assert_close(arithmetic(base, (1, brick))["w"], brick["w"])
    both = arithmetic(base, (0.5, brick), (-2, other))["w"]
    torch.testing.assert_close(both, base["w"] + 0.5 * (brick["w"] - base["w"]) - 2 * (other["w"] - base["w"]))


def test_the_regression_mean_is_nearest_to_both_on_their_own_inputs():
    generator = torch.Generator().manual_seed(8)
    weights = [torch.randn(5, 6, generator=generator, dtype=torch.float64) for _ in range(2)]
    batches = [torch.randn(40, 6, generator=generator, dtype=torch.float64) * scale for scale in (1.0, 3.0)]
    layers = [nn.Sequential(nn.Linear(6, 5, bias=False, dtype=torch.float64)) for _ in weights]
    moments = [input_moments(layer, ["0"], [x])["0"] for layer, x in zip(layers, batches, strict=True)]
    merged = regression_mean(weights, moments)

    def error(weight):
        return sum(float((x @ (weight - own).T).square().sum()) for x, own in zip(batches, weights, strict=True))

    least = error(merged)
    assert least < error((weights[0] + weights[1]) / 2)
    for _ in range(20):
        assert least <= error(merged + 0.01 * torch.randn(5, 6, generator=generator, dtype=torch.float64))
    torch.testing.assert_close(regression_mean([weights[0]] * 2, moments), weights[0])
    with pytest.raises(ValueError, match="moments must be invertible"):
        regression_mean(weights, [torch.zeros(6, 6)] * 2)


def test_a_fitted_interface_joins_two_bricks():
    generator = torch.Generator().manual_seed(9)
    x, turn, shift = torch.randn(50, 4, generator=generator), torch.randn(3, 4, generator=generator), torch.ones(3)
    layer = fit_interface(x, x @ turn.T + shift)
    torch.testing.assert_close(layer.weight, turn, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(layer.bias, shift, rtol=1e-3, atol=1e-3)
    first, second = nn.Linear(2, 4), nn.Linear(3, 1)
    both = Stitched(first, layer, second)
    given = torch.randn(5, 2)
    torch.testing.assert_close(both(given), second(layer(first(given))))
    assert {"interface.weight", "first.weight", "second.weight"} <= set(both.state_dict())


# ---- bricks that change ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DENSE)
def test_every_architecture_can_be_followed_edited_and_grown_or_refuses(name):
    model, batch = build(name), inputs(name, batch=1, tokens=10)
    found = mlps(model)
    means = mean_activations(model, [batch, inputs(name, batch=1, tokens=10, seed=1)])
    assert {mlp: tuple(x.shape) for mlp, x in means.items()} == {mlp: (2, group.units) for mlp, group in found.items()}
    masks = {mlp: torch.arange(group.units) % 2 == 0 for mlp, group in found.items()}
    with editing(model, masks) as parameters:
        model(**batch).logits.square().mean().backward()
        moved = [parameter.grad.abs().sum() for parameter in parameters]
    assert len(moved) >= 2 * len(found)
    assert min(map(float, moved)) >= 0
    assert max(map(float, moved)) > 0
    before = model(**batch).logits
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    try:
        grow(model, 3)
    except ValueError:
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
        assert name in ("gpt2", "phi3"), name
    else:
        torch.testing.assert_close(model(**batch).logits, before, rtol=1e-4, atol=1e-4)
        model(**batch).logits.sum().backward()


def test_editing_keeps_the_rest_also_where_gradients_are_not_finite(model):
    name = "model.layers.0.mlp"
    mask = torch.arange(NEURONS) == 2
    weight = model.get_submodule(name).down_proj.weight
    before = weight.detach().clone()
    with editing(model, {name: mask}) as parameters:
        optimiser = torch.optim.SGD(parameters, lr=0.1)
        (weight.sum() * torch.inf).backward()
        optimiser.step()
    assert not weight[:, mask].isfinite().any()
    assert torch.equal(weight[:, ~mask], before[:, ~mask])


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_editing_trains_the_named_neurons_and_nothing_else(name):
    model, ids = build(name), inputs(name, batch=2, tokens=10)["input_ids"]
    model.get_input_embeddings().weight.requires_grad_(False)  # remembered
    group = next(iter(mlps(model).values()))
    mask = torch.zeros(group.units, dtype=torch.bool)
    mask[3] = mask[7] = True
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    with editing(model, {group.name: mask}) as parameters:
        optimiser = torch.optim.Adam(parameters, lr=0.1)
        for _ in range(2):
            optimiser.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimiser.step()
    changed = {key: (p.detach() != before[key]) for key, p in model.named_parameters()}
    layers = {cut.layer for cut in (*group.producers, *group.consumers)}
    assert {key.rsplit(".", 1)[0] for key, moved in changed.items() if bool(moved.any())} <= layers
    touched = {key: moved for key, moved in changed.items() if bool(moved.any())}
    assert len(touched) >= 2
    assert not model.get_input_embeddings().weight.requires_grad
    assert sum(p.requires_grad for p in model.parameters()) == len(list(model.parameters())) - 1
    with mask_neurons(model, {group.name: mask}):
        ours = model(input_ids=ids).logits
    for key, p in model.named_parameters():
        p.data.copy_(before[key])
    with mask_neurons(model, {group.name: mask}):
        theirs = model(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)  # without these neurons nothing has changed


@pytest.mark.parametrize("name", ["llama", "qwen2", "opt"])
def test_a_grown_model_answers_as_before_and_is_loaded_again(name, tmp_path):
    model, batch = build(name), inputs(name)
    before = model(**batch).logits
    units = next(iter(mlps(model).values())).units
    grow(model, 32)
    assert {group.units for group in mlps(model).values()} == {units + 32}
    torch.testing.assert_close(model(**batch).logits, before, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(**batch).logits, model(**batch).logits)


def test_grown_neurons_can_be_trained(model):
    grow(model, 8, names=["model.layers.0.mlp"])
    assert model.model.layers[1].mlp.down_proj.in_features == NEURONS
    ids = token_ids(2, 12)
    mask = torch.arange(NEURONS + 8) >= NEURONS
    with editing(model, {"model.layers.0.mlp": mask}) as parameters:
        optimiser = torch.optim.Adam(parameters, lr=0.02)
        losses = []
        for _ in range(12):
            optimiser.zero_grad()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimiser.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


# ---- what is refused ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda m: masking(m, 1.5).__enter__(), "share must be"),
        (lambda m: masking(m, float("nan")).__enter__(), "share must be"),
        (lambda m: masking(m, 0.5, "loud").__enter__(), "indicator must be"),
        (lambda m: mask_neurons(m, {"nowhere": torch.ones(NEURONS) > 0}).__enter__(), "neurons must name"),
        (lambda m: mask_neurons(m, {"model.layers.0.mlp": torch.ones(3) > 0}).__enter__(), "must have shape"),
        (lambda m: mean_activations(m, []), "passages must hold"),
        (lambda m: mean_activations(m, [token_ids(2, 5)]), "one sequence each"),
        (lambda m: below(m, [token_ids()], (1.5,)), "thresholds"),
        (lambda m: to_bricks(m, [token_ids()], groups=7), "groups must divide"),
        (lambda m: to_bricks(m, [token_ids()], groups=4, active=5), "active must be"),
        (lambda m: to_bricks(m, [token_ids()], ridge=0), "ridge must be"),
        (lambda m: for_task(m, [token_ids()]), "must have bricks"),
        (lambda m: grow(m, 0), "extra must be"),
        (lambda m: grow(m, 2, names=["nowhere"]), "names must be"),
        (lambda m: grow(m, 2, names=["model.layers.0.mlp"] * 2), "every MLP once"),
        (lambda m: below(m, [token_ids()], ()), "thresholds must hold"),
        (lambda m: BrickMlp(m.model.layers[0], torch.zeros(NEURONS, dtype=torch.int64), 1), "must have a linear layer"),
        (lambda m: BrickMlp(m.model.layers[0].mlp, torch.arange(NEURONS) // 40, 1), "groups of one size"),
        (lambda _: average_precision(torch.rand(3), torch.zeros(3) > 1), "at least one that is True"),
        (lambda _: average_precision(torch.tensor([1.0, torch.nan]), torch.tensor([True, False])), "must be finite"),
        (lambda _: FunctionalityScorer().fit({}, ["a", "b"]), "at least one MLP"),
        (lambda _: FunctionalityScorer().fit({"a": torch.rand(2, 4)}, ["a", "a"]), "at least two functions"),
        (lambda _: FunctionalityScorer(0.5, 0.8).fit({"a": torch.rand(2, 4)}, ["a", "b"]), "residents must leave"),
        (lambda _: FunctionalityScorer().summary(), "must be fitted"),
        (lambda _: FunctionalityScorer(0), "share must be"),
        (lambda _: overlap({"a": torch.ones(2) > 0}, {"b": torch.ones(2) > 0}), "must have the MLPs"),
        (lambda _: average([]), "at least one"),
        (lambda _: average([tensors(0), {"w": torch.rand(4, 3)}]), "same tensors"),
        (lambda _: average([tensors(0)] * 2, weights=[0, 0]), "not all 0"),
        (lambda _: average([tensors(0)], fisher=[{n: -x.abs() for n, x in tensors(0).items()}]), "not be negative"),
        (lambda _: arithmetic(tensors(0), (1, {"w": torch.rand(2), "b": torch.rand(3)})), "must have shape"),
        (lambda _: regression_mean([torch.rand(2, 2)], []), "one a weight"),
        (lambda _: fit_interface(torch.rand(3, 2), torch.rand(4, 2)), "wanted must have shape"),
        (lambda _: partition(torch.rand(6, 2), 4), "groups must divide"),
        (lambda _: Brick("x", "stone"), "kind must be"),
    ],
)
def test_bad_input_gets_a_message(model, call, complaint):
    before = logits(model, token_ids(1, 5))
    with pytest.raises(ValueError, match=complaint):
        call(model)
    assert torch.equal(logits(model, token_ids(1, 5)), before)


def test_wrong_types_get_a_message(model):
    with pytest.raises(TypeError, match="neurons must be a mapping"):
        mask_neurons(model, [True]).__enter__()
    with pytest.raises(TypeError, match="must hold bools"):
        mask_neurons(model, {"model.layers.0.mlp": torch.ones(NEURONS)}).__enter__()
    with pytest.raises(TypeError, match="share must be"):
        masking(model, "half").__enter__()

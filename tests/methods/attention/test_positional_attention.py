from __future__ import annotations

import pytest
import torch
from tests.properties.mixers import check_mixer
from torch import nn

from assay.measure.cost import count_cost
from assay.methods.attention.positional_attention import (
    TASKS,
    AlgorithmicTransformer,
    ContentAttention,
    PositionalAttention,
    PositionalMixer,
    fold,
    task_data,
)
from assay.methods.core.mixers.model import MixerConfig, MixerForCausalLM


def test_is_a_mixer():
    check_mixer(lambda: PositionalMixer(24, heads=3, positions=120))


def test_a_step_computes_the_routes_of_its_token_alone():
    mixer = PositionalMixer(8, heads=2, positions=50)
    _, state = mixer.advance(torch.randn(1, 6, 8), mixer.init_state(1))
    found = count_cost(lambda: mixer.step(torch.randn(1, 8), state)).macs
    assert found == 2 * 8 * 8 + 2 * 7 * 50 + 7 * 8  # W_V and W_O, one row of routes, mixing


def test_weights_do_not_depend_on_the_input_and_rows_sum_to_one():
    torch.manual_seed(0)
    layer = PositionalAttention(16, 9, heads=2).double()
    a = layer.weights()
    assert a.shape == (2, 9, 9)
    torch.testing.assert_close(a.sum(-1), torch.ones(2, 9, dtype=torch.float64))
    x = torch.randn(3, 9, 16, dtype=torch.float64)
    y = torch.randn(3, 9, 16, dtype=torch.float64)
    zero = layer(torch.zeros_like(x))
    torch.testing.assert_close(layer(x + y) - zero, layer(x) - zero + layer(y) - zero)  # linear in the input
    manual = torch.cat([a[h] @ layer.v_proj(x)[:, :, 8 * h : 8 * h + 8] for h in range(2)], -1)
    torch.testing.assert_close(layer(x), layer.o_proj(manual))


def without_biases(model):
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None and not hasattr(module, "_routing"):
            nn.init.zeros_(module.bias)
    return model


@pytest.mark.parametrize(("routing", "holds"), [("position", True), ("content", False)])
def test_without_biases_the_network_scales_with_its_input(routing, holds):
    torch.manual_seed(0)
    model = without_biases(AlgorithmicTransformer(8, routing=routing, dim=16, hidden=16)).double()
    x = torch.randn(20, 8, dtype=torch.float64)
    for c in (0.1, 3.0, 100.0):
        same = torch.allclose(model(c * x), c * model(x), rtol=1e-9, atol=1e-9)
        assert same == holds


def test_content_attention_is_softmax_over_its_own_queries_and_keys():
    """Queries and keys are as wide as the model, values a head's share: the official code's baseline."""
    torch.manual_seed(0)
    layer = ContentAttention(6, heads=2).double()
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    heads = []
    for h in range(2):
        q, k = layer.q_proj(x)[..., 6 * h : 6 * h + 6], layer.k_proj(x)[..., 6 * h : 6 * h + 6]
        heads.append(torch.softmax(q @ k.transpose(1, 2) / 6**0.5, -1) @ layer.v_proj(x)[..., 3 * h : 3 * h + 3])
    torch.testing.assert_close(layer(x), layer.o_proj(torch.cat(heads, -1)))


def test_routing_keeps_its_biases_free_to_choose():
    """Biases of W_Q and W_K move the routes, not the scaling: they may stay."""
    torch.manual_seed(0)
    model = AlgorithmicTransformer(8, dim=16, hidden=16).double()
    for layer in model.layers:
        for p in (layer.attention.q_proj, layer.attention.k_proj):
            p._routing = True
    without_biases(model)
    x = torch.randn(20, 8, dtype=torch.float64)
    torch.testing.assert_close(model(7 * x), 7 * model(x))


def test_folding_keeps_the_function_and_drops_the_work():
    torch.manual_seed(0)
    model = AlgorithmicTransformer(8, dim=16, hidden=16).eval()
    x = torch.randn(50, 8)
    before, cost = model(x), count_cost(model, x)
    fold(model, 9)
    torch.testing.assert_close(model(x), before)
    after = count_cost(model, x)
    assert not any(isinstance(m, PositionalAttention) for m in model.modules())
    saved = sum(m.macs for m in cost.modules) - sum(m.macs for m in after.modules)
    depth, dp = 4, 9
    routing = depth * (2 * dp * 2 * dp * dp + 2 * dp * dp * dp)  # projections of P, and QK^T, once a batch
    assert saved == routing
    with pytest.raises(ValueError, match="no PositionalAttention"):
        fold(model, 9)


def test_permuting_positions_needs_the_encodings_rows_too():
    torch.manual_seed(0)
    layer = PositionalAttention(8, 6, heads=2).double()
    x, order = torch.randn(2, 6, 8, dtype=torch.float64), torch.tensor([3, 1, 5, 0, 4, 2])
    moved = PositionalAttention(8, 6, heads=2).double()
    moved.load_state_dict(layer.state_dict())
    for name in ("q_proj", "k_proj"):  # encodings are one-hot: permuting their rows permutes the columns of the weights
        getattr(moved, name).weight.data = getattr(layer, name).weight[:, order].clone()
    torch.testing.assert_close(moved(x[:, order]), layer(x)[:, order])
    assert not torch.allclose(layer(x[:, order]), layer(x)[:, order])


def test_weights_are_kept_once_for_a_whole_batch():
    model = AlgorithmicTransformer(8, dim=16)
    fold(model, 9)
    assert sum(b.numel() for b in model.buffers()) == 4 * 2 * 9 * 9


def test_shorter_inputs_use_the_first_rows_and_the_scratch_row():
    torch.manual_seed(0)
    layer = PositionalAttention(8, 9, heads=2).double()
    whole = layer.q_proj(torch.eye(9, dtype=torch.float64)).view(9, 2, 9)[[0, 1, 2, 8]].transpose(0, 1)
    keys = layer.k_proj(torch.eye(9, dtype=torch.float64)).view(9, 2, 9)[[0, 1, 2, 8]].transpose(0, 1)
    torch.testing.assert_close(layer.weights(4), torch.softmax(whole @ keys.transpose(-1, -2) / 3.0, -1))
    assert AlgorithmicTransformer(8, dim=16)(torch.randn(2, 5)).shape == (2, 5)
    assert AlgorithmicTransformer(8, dim=16, routing="content")(torch.randn(2, 5)).shape == (2, 5)


@pytest.mark.parametrize(
    "layer", [PositionalAttention(6, 5, heads=2), ContentAttention(6, heads=2)], ids=["position", "content"]
)
def test_gradients(layer):
    layer = layer.double()
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    names, values = zip(*layer.named_parameters(), strict=True)
    inputs = (x, *(v.detach().requires_grad_() for v in values))
    assert torch.autograd.gradcheck(
        lambda x, *p: torch.func.functional_call(layer, dict(zip(names, p, strict=True)), (x,)), inputs
    )


def mixer_model(**changes):
    config = MixerConfig(vocab_size=40, hidden_size=32, layers=[["positional", {"positions": 64}]] * 2, **changes)
    torch.manual_seed(0)
    return MixerForCausalLM(config).eval()


@torch.no_grad()
def test_reset_begins_a_new_sequence():
    model, ids = mixer_model(), torch.randint(0, 40, (2, 12))
    cache = model.new_cache(2)
    model(ids, cache=cache)
    cache.reset()
    torch.testing.assert_close(model(ids, cache=cache).logits, model(ids).logits)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    cache.reset()
    found = model(ids, attention_mask=mask, cache=cache).logits
    torch.testing.assert_close(found[mask.bool()], model(ids, attention_mask=mask).logits[mask.bool()])


@torch.no_grad()
def test_routes_are_computed_once_and_shared_by_the_rows():
    layer = PositionalMixer(16, positions=64)
    x, state = torch.randn(3, 40, 16), layer.init_state(3)
    layer(x)
    known = layer._known
    for t in range(39):
        _, state = layer.step(x[:, t], state)
    done = count_cost(lambda: layer.step(x[:, 39], state))
    assert done.macs == 3 * (2 * 16 * 16 + 40 * 16)  # projections and mixing: no products of queries and keys
    assert layer._known is known
    assert known.shape == (2, 40, 40)
    mask = torch.arange(40) >= torch.tensor([[0], [3], [39]])
    layer(x, mask)
    assert layer._known is known


@pytest.mark.parametrize("change", ["step", "data", "reassigned", "loaded", "half"])
def test_kept_routes_follow_the_weights(change):
    torch.manual_seed(0)
    layer, x = PositionalMixer(16, positions=32), torch.randn(2, 9, 16)
    with torch.no_grad():
        layer(x)
    weight = layer.attention.q_proj.weight
    if change == "step":
        layer(x).square().sum().backward()
        torch.optim.SGD(layer.parameters(), lr=100.0).step()
    elif change == "data":
        weight.data.mul_(-50)
    elif change == "reassigned":
        layer.attention.q_proj.weight = torch.nn.Parameter(-50 * weight.detach())
    elif change == "loaded":
        layer.load_state_dict({name: 50 * value for name, value in layer.state_dict().items()})
    else:
        layer, x = layer.half(), x.half()
    fresh = layer(x).detach()  # with gradients: nothing is kept
    near = {"atol": (2e-3 if change == "half" else 1e-5) * float(fresh.abs().max()), "rtol": 0.0}
    with torch.no_grad():
        torch.testing.assert_close(layer(x), fresh, **near)
        y, state = layer.advance(x[:, :4], layer.init_state(2))
        for t in range(4, 9):
            more, state = layer.step(x[:, t], state)
            y = torch.cat([y, more[:, None]], 1)
    torch.testing.assert_close(y, fresh, **near)
    assert not layer._known.requires_grad


def test_tasks_are_what_they_say():
    x = torch.tensor([[3.0, -1.0, 2.0, -5.0]])
    assert TASKS["sum"](x).tolist() == [[3, 2, 4, -1]]
    assert TASKS["min"](x).tolist() == [[3, -1, -1, -5]]
    assert TASKS["median"](x).tolist() == [[3, 1, 2, 0.5]]
    assert TASKS["maxsub"](x).tolist() == [[3, 3, 4, 4]]
    assert TASKS["sort"](x).tolist() == [[-5, -1, 2, 3]]
    brute = torch.randn(50, 6)
    best = [max(brute[r, i : j + 1].sum() for i in range(6) for j in range(i, 6)).item() for r in range(50)]
    assert TASKS["maxsub"](brute)[:, -1].tolist() == pytest.approx(best, abs=1e-5)


def test_data_leaves_the_training_range_at_larger_scales():
    inside, _ = task_data("sum", 2000)
    outside, _ = task_data("sum", 2000, scale=4)
    assert inside.abs().max() <= 2
    assert 4 < outside.abs().max() <= 8
    assert (outside.abs().amax(1) > 2).float().mean() > 0.9
    assert torch.equal(task_data("sort", 5, seed=3)[0], task_data("sort", 5, seed=3)[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PositionalAttention(7, 5, heads=2), "heads"),
        (lambda: PositionalAttention(8, 0), "positions"),
        (lambda: PositionalAttention(8, 5).weights(6), "n must be"),
        (lambda: AlgorithmicTransformer(8, routing="both"), "routing"),
        (lambda: AlgorithmicTransformer(8, depth=0), "depth must be a whole number at least 1"),
        (lambda: AlgorithmicTransformer(0), "n must be a whole number at least 1, got 0"),
        (lambda: AlgorithmicTransformer(8)(torch.randn(1, 9)), "at most 8"),
        (lambda: AlgorithmicTransformer(8)(torch.randn(8)), r"at most 8 positions\), got \(8,\)"),
        (lambda: PositionalMixer(8, positions=4)(torch.randn(1, 5, 8)), "tokens must be at most 4"),
        (lambda: task_data("product", 3), "task"),
        (lambda: task_data("sum", 3, scale=0.5), "scale"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --------------------------------------------------------------------------------------------- folding, whatever holds it


def language_model():
    torch.manual_seed(0)
    layers = [["positional", {"heads": 2, "positions": 40}]] * 2
    return MixerForCausalLM(MixerConfig(vocab_size=32, hidden_size=16, layers=layers)).eval()


@pytest.mark.parametrize("n", [40, 23])
@torch.no_grad()
def test_a_folded_language_model_is_the_same_one(n):
    model = language_model()
    ids = torch.randint(1, 32, (3, 13), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :5] = mask[2, :12] = 0
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1, "attention_mask": mask}
    wanted = model(ids, attention_mask=mask).logits
    written = [model.generate(ids, num_beams=beams, **options) for beams in (1, 3)]
    assert fold(model, n) is model
    assert not any(isinstance(m, PositionalAttention) for m in model.modules())
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, wanted)
    for beams, found in zip((1, 3), written, strict=True):
        assert torch.equal(model.generate(ids, num_beams=beams, **options), found)
    with pytest.raises(ValueError, match=f"tokens must be at most {n}"):
        model(torch.ones(1, n + 1, dtype=torch.int64))


def test_a_folded_mixer_agrees_in_all_forms_and_precisions_and_learns_its_values():
    torch.manual_seed(0)
    mixer = PositionalMixer(12, heads=3, positions=30).double()
    wanted = mixer(x := torch.randn(2, 17, 12, dtype=torch.float64)).detach()
    fold(nn.ModuleList([mixer]), 20)
    for chunk in (1, 5, 17):
        torch.testing.assert_close(mixer.chunked(x, chunk=chunk)[0].detach(), wanted)
    mixer(x).square().sum().backward()
    assert sorted(name for name, _ in mixer.named_parameters()) == sorted(
        f"attention.{p}_proj.{part}" for p in "vo" for part in ("weight", "bias")
    )
    assert all(p.grad.abs().sum() > 0 for p in mixer.parameters())
    low = mixer.bfloat16()
    assert (low(x.bfloat16()).double() - wanted).norm() < 0.05 * wanted.norm()


def test_folding_replaces_every_name_or_nothing():
    attention = PositionalAttention(8, 5)
    twice = nn.ModuleDict({"a": attention, "b": attention})
    fold(twice, 5)
    assert not any(isinstance(m, PositionalAttention) for m in twice.modules())
    with pytest.raises(ValueError, match="x must have shape"):
        twice["a"](torch.randn(2, 4, 8))
    for n in (7, 0):
        mixed = nn.Sequential(PositionalAttention(8, 9), PositionalAttention(8, 5))
        with pytest.raises(ValueError, match="n must be"):
            fold(mixed, n)
        assert all(isinstance(m, PositionalAttention) for m in mixed)
    with pytest.raises(ValueError, match="cannot be replaced in place"):
        fold(attention, 5)


def test_attention_refuses_other_inputs():
    attention = PositionalAttention(8, 5)
    with pytest.raises(TypeError, match="floating-point"):
        attention(torch.ones(2, 5, 8, dtype=torch.int64))
    for wrong in (torch.randn(5, 8), torch.randn(2, 5, 7)):
        with pytest.raises(ValueError, match="x must have shape"):
            attention(wrong)

"""Structured pruning adapters: merged equals unmerged, a pruned net equals one with zeroed channels, and a task stores little."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from assay.methods.compression.continual_inference import Prototypes, SPLoPA, SPLoRA, adapt, prune_chain, pruned

LAYERS = {
    "linear": (lambda: nn.Linear(7, 6), (3, 7)),
    "linear without bias": (lambda: nn.Linear(7, 6, bias=False), (3, 7)),
    "convolution 1d": (lambda: nn.Conv1d(4, 6, 5, padding=1, stride=2), (2, 4, 12)),
    "convolution 2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 5, 6)),
    "unpadded, strided": (lambda: nn.Conv2d(4, 6, (3, 1), stride=(2, 1)), (2, 4, 7, 6)),
    "padded more, dilated": (lambda: nn.Conv2d(4, 6, 3, padding=3, dilation=2, bias=False), (2, 4, 7, 6)),
    "convolution 3d": (lambda: nn.Conv3d(4, 6, 3, padding=(1, 0, 1)), (2, 4, 4, 4, 4)),
}


def adapted(name, rank=2, masked=True):
    make, shape = LAYERS[name]
    layer = make().double()
    adapter = SPLoRA(layer, rank)
    nn.init.normal_(adapter.up)
    if masked:
        adapter.prune(outputs=torch.arange(len(adapter.up)) % 3 > 0, inputs=torch.arange(adapter.down.shape[1]) != 1)
    return adapter, layer, torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("name", LAYERS)
def test_merged_equals_unmerged(name):
    adapter, _, x = adapted(name)
    unmerged, merged = adapter.train()(x), adapter.eval()(x)
    torch.testing.assert_close(unmerged, merged)
    assert bool((merged.movedim(1, -1)[..., ~adapter.output_mask] == 0).all())


@pytest.mark.parametrize("name", LAYERS)
def test_a_new_adapter_hardly_changes_the_layer(name):
    make, shape = LAYERS[name]
    layer, x = make(), torch.randn(shape)
    adapter = SPLoRA(layer, 2)
    assert float(adapter.up.detach().abs().max()) <= 1e-4
    torch.testing.assert_close(adapter(x), layer(x), atol=3e-3, rtol=0)
    torch.nn.init.zeros_(adapter.up)
    assert torch.equal(adapter.eval()(x), layer(x))


@pytest.mark.parametrize("name", LAYERS)
def test_the_small_layer_is_the_layer_with_zeroed_channels(name):
    adapter, layer, x = adapted(name)
    small, kept = adapter.pruned_layer(), adapter.output_mask
    assert type(small) is type(layer)
    assert small.weight.shape[:2] == (int(kept.sum()), int(adapter.input_mask.sum()))
    found = small(x[:, adapter.input_mask])
    torch.testing.assert_close(found, adapter.eval()(x)[:, kept])
    zeroed = x * adapter.input_mask.view(1, -1, *[1] * (x.dim() - 2))
    down, up = adapter.lora()
    with torch.no_grad():  # the dense layer, its pruned channels zero
        centre = (..., *(size // 2 for size in getattr(layer, "kernel_size", ())))
        layer.weight[centre] += up @ down
    torch.testing.assert_close(found, layer(zeroed)[:, kept])


def test_a_task_stores_rank_times_the_channels_kept():
    adapter, _, _ = adapted("convolution 2d", rank=3)
    assert adapter.learned == 3 * (4 + 3) + 4
    stored = adapter.task_state()
    assert sum(value.numel() for value in stored.values() if value.is_floating_point()) == adapter.learned
    other = SPLoRA(adapter.layer, 3)
    other.load_task(stored)
    x = torch.randn(1, 4, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(other.eval()(x), adapter.eval()(x))
    with pytest.raises(ValueError, match="up must have shape"):
        other.load_task({**stored, "up": stored["up"][1:]})
    with pytest.raises(TypeError, match="up must hold torch.float64, got torch.float32"):
        other.load_task({**stored, "up": stored["up"].float()})
    with pytest.raises(TypeError, match="task must be a dictionary"):
        other.load_task(None)
    with pytest.raises(ValueError, match="task must hold"):
        other.load_task({"up": stored["up"]})
    torch.testing.assert_close(other.eval()(x), adapter.eval()(x))  # a refused task changes nothing


def test_only_the_factors_and_the_bias_learn():
    adapter, _, x = adapted("convolution 2d")
    adapter.train()(x).square().sum().backward()
    assert adapter.layer.weight.grad is None
    assert {name for name, p in adapter.named_parameters() if p.grad is not None} == {"down", "up", "layer.bias"}
    assert float(adapter.up.grad[~adapter.output_mask].abs().max()) == 0
    assert float(adapter.down.grad[:, ~adapter.input_mask].abs().max()) == 0


def chain():
    model = adapt(nn.Sequential(nn.Linear(5, 8), nn.Sigmoid(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)).double(), 2)
    for part in model:
        if isinstance(part, SPLoRA):
            nn.init.normal_(part.up)
    return model


def test_a_pruned_chain_is_the_chain_with_its_channels_left_out():
    model, x = chain(), torch.randn(4, 5, dtype=torch.float64)
    masks = [torch.arange(8) % 2 == 0, torch.arange(6) > 1]
    prune_chain(model, masks)
    small = pruned(model)
    assert [tuple(p.weight.shape) for p in small if isinstance(p, nn.Linear)] == [(4, 5), (4, 4), (3, 4)]
    torch.testing.assert_close(small(x), model.eval()(x))
    torch.testing.assert_close(small(x), model.train()(x))


def test_in_a_pruned_chain_of_convolutions_pools_may_stand_between():
    layers = [
        nn.Conv2d(2, 6, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 3, 3, padding=1),
        nn.Flatten(),
        nn.Softmax(1),
    ]
    model, x = adapt(nn.Sequential(*layers).double(), 2), torch.randn(2, 2, 8, 8, dtype=torch.float64)
    mask = torch.arange(6) % 2 == 0
    prune_chain(model, [mask])  # what stands behind the last adapter is nobody's business
    torch.testing.assert_close(pruned(model)(x), model.eval()(x))


@pytest.mark.parametrize(
    "between",
    [
        nn.Softmax(1),
        nn.LayerNorm(8, elementwise_affine=False),
        nn.BatchNorm1d(8, affine=False),
        nn.AvgPool1d(2, 2),
        nn.Sequential(nn.ReLU()),
    ],
)
def test_what_mixes_the_channels_between_adapters_is_refused(between):
    model = adapt(nn.Sequential(nn.Linear(5, 8), between, nn.Linear(8, 3)), 2)
    with pytest.raises(ValueError, match=f"activations only between adapters, got {type(between).__name__}"):
        prune_chain(model, [torch.arange(8) % 2 == 0])
    assert bool(model[0].output_mask.all())


def test_nothing_of_the_big_network_but_biases_is_trained_in_a_chain():
    model = adapt(nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.PReLU(), nn.Linear(8, 3)), 2)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"{i}.{name}" for i in (0, 3) for name in ("down", "up", "layer.bias")
    }
    with pytest.raises(ValueError, match=r"one within a part: 0\.1;"):
        adapt(nn.Sequential(nn.Sequential(nn.ReLU(), nn.Linear(5, 8)), nn.Linear(8, 3)), 2)


def test_peft_runs_the_adapter_as_lora():
    from peft import LoraConfig, get_peft_model

    model, x = chain().eval(), torch.randn(4, 5, dtype=torch.float64)
    prune_chain(model, [torch.arange(8) % 2 == 0, torch.arange(6) > 1])
    base = nn.Sequential(nn.Linear(5, 8), nn.Sigmoid(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    tuned = get_peft_model(base, LoraConfig(r=2, lora_alpha=2, lora_dropout=0.0, target_modules=["0", "2", "4"]))
    with torch.no_grad():
        for name in ("0", "2", "4"):
            adapter, theirs = model.get_submodule(name), tuned.base_model.model.get_submodule(name)
            down, up = adapter.lora()
            theirs.base_layer.weight.copy_(adapter.merged_weight() - up @ down)
            theirs.base_layer.bias.copy_(adapter.layer.bias * adapter.output_mask)
            theirs.lora_A["default"].weight.data = down.clone()
            theirs.lora_B["default"].weight.data = up.clone()
    torch.testing.assert_close(tuned.eval()(x), model(x))


def test_masks_of_torchs_own_pruning_fit():
    from torch.nn.utils import prune

    from assay.methods.core.sparsity.masks import masks_of

    plain = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    masked = copy.deepcopy(plain)
    prune.ln_structured(masked[0], "weight", amount=4, n=2, dim=0)
    mask = masks_of(masked)["0"].any(1)
    model = adapt(plain, 2)
    prune_chain(model, [mask])
    assert pruned(model)[0].weight.shape == (4, 5)
    assert torch.equal(model[0].output_mask, mask)


def test_what_cannot_be_adapted_is_refused():
    with pytest.raises(TypeError, match="layer must be"):
        SPLoRA(nn.Embedding(3, 4), 2)
    with pytest.raises(ValueError, match="grouped"):
        SPLoRA(nn.Conv2d(4, 4, 3, groups=2), 2)
    with pytest.raises(ValueError, match="centre tap"):
        SPLoRA(nn.Conv2d(4, 4, 2), 2)
    with pytest.raises(ValueError, match="by numbers"):
        SPLoRA(nn.Conv2d(4, 4, 3, padding="same"), 2)
    with pytest.raises(ValueError, match="rank must be"):
        SPLoRA(nn.Linear(2, 2), 0)
    layer = SPLoRA(nn.Linear(4, 3), 2)
    with pytest.raises(TypeError, match="outputs must hold bools"):
        layer.prune(outputs=torch.ones(3))
    with pytest.raises(ValueError, match="inputs must have shape"):
        layer.prune(outputs=torch.tensor([True, False, True]), inputs=torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="must leave a channel"):
        layer.prune(outputs=torch.zeros(3, dtype=torch.bool))
    assert bool(layer.output_mask.all())
    with pytest.raises(ValueError, match="one for every adapter but the last"):
        prune_chain(chain(), [])
    with pytest.raises(ValueError, match="activations only"):
        prune_chain(adapt(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)), 1), [torch.ones(4).bool()])
    with pytest.raises(ValueError, match="must have adapters"):
        prune_chain(nn.Sequential(nn.ReLU()), [])
    masked = nn.utils.prune.l1_unstructured(nn.Linear(4, 4), "weight", amount=0.5)
    for make in (lambda: SPLoRA(masked, 1), lambda: SPLoPA(masked, Prototypes(1, 4))):
        with pytest.raises(ValueError, match="no forward hooks, got some on Linear"):
            make()
    with pytest.raises(TypeError, match="nn.Sequential"):
        adapt(nn.Linear(2, 2), 1)


# Blocks


def test_prototypes_are_placed_on_the_grid_of_blocks():
    layer, prototypes = nn.Linear(8, 12), Prototypes(count=5, block=4)
    adapter, x = SPLoPA(layer, prototypes), torch.randn(3, 8)
    torch.testing.assert_close(adapter(x), layer(x))
    nn.init.normal_(adapter.places)
    blocks = torch.tensor([[True, False], [True, True], [False, True]])
    adapter.prune(blocks)
    expected = layer.weight.detach().clone()
    for p in range(5):
        block = torch.outer(prototypes.rows[p], prototypes.columns[p])
        expected = expected + torch.kron(adapter.places[p], block)
    expected = expected * torch.kron(blocks.float(), torch.ones(4, 4))
    torch.testing.assert_close(adapter.merged_weight(), expected)
    torch.testing.assert_close(adapter(x), x @ expected.T + layer.bias)
    assert adapter.learned == 5 * 4 + 12


def test_layers_share_their_prototypes():
    prototypes = Prototypes(count=2, block=4)
    model = nn.Sequential(SPLoPA(nn.Linear(8, 8), prototypes), nn.ReLU(), SPLoPA(nn.Linear(8, 4), prototypes))
    for part in (model[0], model[2]):
        nn.init.normal_(part.places)
    model(torch.randn(3, 8)).sum().backward()
    with_gradients = [name for name, p in model.named_parameters() if p.grad is not None]
    assert with_gradients == [
        "0.places", "0.layer.bias", "0.prototypes.rows", "0.prototypes.columns", "2.places", "2.layer.bias",
    ]  # fmt: skip
    half = SPLoPA(nn.Linear(8, 8).bfloat16(), Prototypes(2, 4).bfloat16())
    assert half(torch.randn(3, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    with pytest.raises(TypeError, match="prototypes must have the dtype of layer"):
        SPLoPA(nn.Linear(8, 8).double(), prototypes)
    with pytest.raises(TypeError, match="prototypes must be Prototypes"):
        SPLoPA(nn.Linear(8, 8), 4)
    with pytest.raises(ValueError, match="must tile"):
        SPLoPA(nn.Linear(6, 8), prototypes)
    with pytest.raises(TypeError, match="layer must be"):
        SPLoPA(nn.Conv1d(4, 4, 1), prototypes)
    with pytest.raises(TypeError, match="blocks must hold bools"):
        model[0].prune(torch.ones(2, 2))

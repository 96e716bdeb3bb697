"""Units really taken out: the outputs of the masked model, fewer MACs, smaller files; and what is not followed is left alone."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tests.tiny import tiny_model, token_ids
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from assay.measure.cost import count_cost
from assay.methods.core.sparsity.masks import put_masks
from assay.methods.core.sparsity.projections import structured
from assay.methods.core.sparsity.removal import dead, remove
from assay.methods.core.sparsity.scores import grouped
from assay.methods.core.sparsity.units import groups


class Net(nn.Module):
    """Convolutions, norms, a depthwise one, functional activations, pooling, flattening, two linear layers."""

    def __init__(self, padding: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=padding)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 6, 3, padding=padding, bias=False)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=padding, groups=6)
        self.third = nn.Conv2d(6, 5, 1)
        self.hidden = nn.LazyLinear(7)
        self.out = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        x = self.depthwise(self.second(x).relu())
        x = F.max_pool2d(F.relu6(self.third(x)), 2)
        return self.out(F.relu(self.hidden(torch.flatten(x, 1))))


def net(padding: int = 1) -> tuple[Net, Tensor]:
    model, x = Net(padding), torch.randn(4, 1, 10, 10)
    for _ in range(3):
        model(torch.randn(8, 1, 10, 10) + 1)  # norms that are not the identity
    with torch.no_grad():
        model.norm.weight.uniform_(0.5, 2)
        model.norm.bias.uniform_(-1, 1)
    return model.eval(), x


def close(a: Tensor, b: Tensor) -> bool:
    return float((a - b).detach().norm()) <= 1e-5 * float(b.detach().norm())


def parameters(model: nn.Module) -> list[tuple[int, tuple[int, ...]]]:
    return [(id(p), tuple(p.shape)) for p in [*model.parameters(), *model.buffers()]]


def test_the_channels_of_a_net_go_through_norms_depthwise_pooling_and_flattening(tmp_path):
    model, x = net()
    found = groups(model)
    assert {name: group.units for name, group in found.items()} == {"first": 8, "second": 6, "third": 5, "hidden": 7}
    assert found["second"].along == ("depthwise",)
    assert found["first"].along == ("norm",)
    keep = {
        "first": torch.tensor([True, False] * 4),
        "second": torch.tensor([True, True, False, True, False, True]),
        "third": torch.arange(5) != 2,
        "hidden": torch.arange(7) < 3,
    }
    masked = copy.deepcopy(model)
    with torch.no_grad():
        masked.second.weight[:, ~keep["first"]] = 0
        masked.third.weight[:, ~keep["second"]] = 0
        masked.hidden.weight.view(7, 5, -1)[:, ~keep["third"]] = 0
        masked.out.weight[:, ~keep["hidden"]] = 0
    expected = masked(x)
    assert {name: mask.tolist() for name, mask in dead(masked).items()} == {
        name: mask.tolist() for name, mask in keep.items()
    }
    before = count_cost(model, x).macs
    save_file(model.state_dict(), tmp_path / "before.safetensors")
    report = remove(model, keep, probe=x)
    save_file(model.state_dict(), tmp_path / "after.safetensors")
    assert close(model(x), expected)
    assert [tuple(layer.weight.shape) for layer in (model.first, model.second, model.depthwise, model.third, model.hidden, model.out)] == [
        (4, 1, 3, 3), (4, 4, 3, 3), (4, 1, 3, 3), (4, 4, 1, 1), (3, 100), (3, 3),
    ]  # fmt: skip
    assert (model.depthwise.groups, model.norm.num_features, model.hidden.in_features) == (4, 4, 100)
    assert sum(p.numel() for p in model.parameters()) == report.after.params < report.before.params / 2
    assert report.after.macs < report.before.macs / 2
    assert count_cost(model, x).macs < before / 2
    assert (tmp_path / "after.safetensors").stat().st_size < 0.6 * (tmp_path / "before.safetensors").stat().st_size
    assert set(groups(model)) == set(found)  # and what is left can go on being pruned
    model(x).sum().backward()


@pytest.mark.parametrize("padding", [0, 1])
def test_zero_filters_leave_the_constants_of_their_norms_behind(padding):
    model, x = net(padding)
    keep = {"first": structured(model.first.weight.detach(), 0.5)[:, 0, 0, 0], "hidden": torch.arange(7) % 2 == 0}
    masked = copy.deepcopy(model)
    with torch.no_grad():
        masked.first.weight[~keep["first"]] = 0
        masked.hidden.weight[~keep["hidden"]] = 0
    expected = masked(x)
    assert {name: mask.tolist() for name, mask in dead(masked, masked="weights").items()} == {
        name: mask.tolist() for name, mask in keep.items()
    }
    assert not close(copy.deepcopy(model)(x), expected)
    before = parameters(model)
    if padding:  # the constant of a padded convolution's input is missing at the borders
        with pytest.raises(ValueError, match=r"keep\['first'\] must drop units that give second the same everywhere"):
            remove(model, keep, masked="weights", probe=x)
        assert parameters(model) == before
        with torch.no_grad():  # unless nothing comes out
            for net_ in (model, masked):
                net_.norm.bias[~keep["first"]] = -50.0
        expected = masked(x)
    else:
        assert model.second.bias is None
    remove(model, keep, masked="weights", probe=x)
    assert close(model(x), expected)
    assert model.first.out_channels == 4
    assert (model.second.bias is None) == bool(padding)


def test_what_adds_or_mixes_channels_is_not_followed():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.norm, self.d = nn.LayerNorm(4), nn.Linear(4, 2)

        def forward(self, x):
            x = self.a(x)
            x = x + self.c(torch.relu(self.b(x)))
            return self.d(self.norm(x))

    model = Residual()
    assert list(groups(model)) == ["b"]
    with pytest.raises(
        ValueError, match=r"keep must name groups of units that can be followed in Residual \(b ...\), got 'a'"
    ):
        remove(model, {"a": torch.arange(4) < 2}, probe=torch.randn(2, 4))
    grouped_conv = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, groups=2))
    assert groups(grouped_conv) == {}
    twice = nn.Linear(4, 4)
    assert groups(nn.Sequential(twice, nn.ReLU(), twice)) == {}
    assert groups(nn.Sequential(nn.Linear(4, 4), nn.Softmax(-1), nn.Linear(4, 4))) == {}
    assert groups(nn.Sequential(nn.Linear(6, 4), nn.Flatten(), nn.Linear(8, 2))) == {}  # places, then units


class Odd(nn.Module):
    """Has the names of an MLP of transformers, and mixes its neurons."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace()
        self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.fc2(self.fc1(x).softmax(-1))


def test_a_model_that_computes_otherwise_is_put_back_and_refused():
    model, x = Odd(), torch.randn(3, 4)
    before, expected = parameters(model), model(x)
    with pytest.raises(
        ValueError, match="Odd without some of fc1|Odd without some of .* answers otherwise than masked"
    ):
        remove(model, {next(iter(groups(model))): torch.arange(8) < 4}, probe=x)
    assert parameters(model) == before
    assert (model.fc1.out_features, model.fc2.in_features) == (8, 8)
    assert torch.equal(model(x), expected)


@pytest.fixture
def llama():
    return tiny_model(
        hidden_size=64,
        num_attention_heads=8,
        num_key_value_heads=4,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
    )


def biases(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.uniform_(-0.5, 0.5)
    return model


def test_neurons_and_heads_of_a_decoder_go_and_it_is_saved_loaded_and_generates(llama, tmp_path):
    model, ids = biases(llama), token_ids(2, 12)
    keep: dict[str, Tensor] = {}
    for name, group in groups(model).items():
        if group.kind == "neurons":
            weights = model.get_submodule(group.consumers[0].layer).weight.detach()
            keep[name] = structured(weights, 0.5, axis=1)[0]
        else:  # 8 heads in pairs: one of each pair stays
            keep[name] = torch.tensor([True, False, False, True, False, True, True, False])
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for name, group in groups(model).items():
            width = 8 if group.kind == "heads" else 1
            masked.get_submodule(group.consumers[0].layer).weight[:, ~keep[name].repeat_interleave(width)] = 0
        expected = masked(ids).logits
        continued = masked.generate(ids, max_new_tokens=6, do_sample=False)
    model.save_pretrained(tmp_path / "before")
    report = remove(model, keep)
    assert report.loadable
    assert report.after.params < report.before.params
    assert (model.config.intermediate_size, model.config.num_attention_heads, model.config.num_key_value_heads) == (
        48,
        4,
        4,
    )
    with torch.no_grad():
        assert close(model(ids).logits, expected)
        assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), continued)
        model.save_pretrained(tmp_path / "after")
        again = LlamaForCausalLM.from_pretrained(tmp_path / "after").eval()
        assert torch.equal(again(ids).logits, model(ids).logits)
        model.set_attn_implementation("eager")
        assert close(model(ids).logits, expected)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("before", "after")]
    assert sizes[1] < 0.75 * sizes[0]


def test_layers_of_different_sizes_are_not_saved_but_made_again(llama, tmp_path):
    model, ids = llama, token_ids(1, 8)
    keep = {"model.layers.0.mlp": torch.arange(96) < 40, "model.layers.1.self_attn": torch.arange(8) < 4}
    report = remove(model, keep)
    assert not report.loadable
    assert model.config.intermediate_size == 96
    assert model.model.layers[1].self_attn.num_key_value_groups == 2
    with pytest.raises(ValueError, match="no place for layers of different sizes"):
        model.save_pretrained(tmp_path)
    again = tiny_model(
        seed=9,
        num_attention_heads=8,
        num_key_value_heads=4,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
    )
    remove(again, keep)
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
        model.generate(ids, max_new_tokens=3, do_sample=False)


def test_key_value_heads_keep_as_many_query_heads_as_each_other(llama):
    before = parameters(llama)
    with pytest.raises(ValueError, match=r"as many query heads of each key-value head that stays, got \[2, 1, 0, 0\]"):
        remove(llama, {"model.layers.0.self_attn": torch.arange(8) < 3})
    for keep, error, message in (
        ({"model.layers.0.mlp": torch.zeros(96).bool()}, ValueError, "must keep at least one of 96 neurons"),
        ({"model.layers.0.mlp": torch.ones(95).bool()}, ValueError, r"must have shape \(96\), got \(95,\)"),
        ({"model.layers.0.mlp": torch.ones(96)}, TypeError, "must hold bools"),
        ({"lm_head": torch.ones(97).bool()}, ValueError, "got 'lm_head'"),
        ([1], TypeError, "keep must be a mapping of groups to masks, got list"),
    ):
        with pytest.raises(error, match=message):
            remove(llama, keep)
    with pytest.raises(ValueError, match="keep must not name heads with masked='weights'"):
        remove(llama, {"model.layers.0.self_attn": torch.arange(8) < 4}, masked="weights")
    with pytest.raises(ValueError, match="masked must be one of"):
        remove(llama, {}, masked="both")
    with pytest.raises(ValueError, match="probe must be inputs of LlamaForCausalLM, got"):
        remove(llama, {"model.layers.0.mlp": torch.arange(96) < 9}, probe=torch.randn(2, 2))
    put_masks(llama, {"model.layers.0.mlp.up_proj": torch.ones(96, 64).bool()})
    with pytest.raises(ValueError, match="bake the mask of model.layers.0.mlp.up_proj first"):
        remove(llama, {"model.layers.0.mlp": torch.arange(96) < 9})
    assert len(before) == len(parameters(llama)) - 1


def test_constants_of_neurons_go_into_the_biases_that_follow():
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=97, n_positions=16)).eval()
    biases(model)
    ids = token_ids(2, 7)
    keep = {
        name: torch.arange(group.units) % 2 == 0 for name, group in groups(model).items() if group.kind == "neurons"
    }
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in keep.items():
            masked.get_submodule(name).c_fc.weight[:, ~mask] = 0
        expected = masked(ids).logits
    report = remove(model, keep, masked="weights")
    assert report.loadable
    assert model.config.n_inner == 64
    with torch.no_grad():
        assert close(model(ids).logits, expected)


def test_models_of_pictures_need_a_probe_and_shared_weights_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with pytest.raises(ValueError, match="probe must be given, a batch of inputs, for Sequential"):
        remove(model, {"0": torch.arange(4) < 2})
    model[2].weight = model[0].weight
    with pytest.raises(ValueError, match="must be about weights that are not shared"):
        remove(model, {"0": torch.arange(4) < 2}, probe=torch.randn(1, 4))


def test_half_precision_and_training_mode_are_kept():
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Dropout(0.5), nn.Linear(64, 8)).to(torch.bfloat16)
    model[2].eval()
    ranks = grouped(model[0].weight.detach(), 0)
    remove(model, {"0": ranks > ranks.median()}, probe=torch.randn(4, 32).bfloat16())
    assert model[0].weight.dtype == torch.bfloat16
    assert [m.training for m in model] == [True, True, False, True]
    assert all(p.requires_grad for p in model.parameters())

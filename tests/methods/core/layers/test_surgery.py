"""Find, swap, merge and cost, on real module trees."""

from __future__ import annotations

import copy
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny import tiny_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from assay.methods.core.layers.surgery import (
    LayerCost,
    cost,
    find,
    linear_kinds,
    merge,
    page_out,
    swap,
    tied_names,
    untie,
)


def tiny_llama(tied: bool = True) -> LlamaForCausalLM:
    return tiny_model(hidden_size=24, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tied)


def test_find_by_type_and_pattern():
    model = tiny_llama()
    assert len(find(model, linear_kinds())) == 15
    assert list(find(model, linear_kinds(), include=["*.layers.0.*"], exclude=["*_proj"])) == []
    assert list(find(model, linear_kinds(), include=["*.1.mlp.*"], exclude=["*.up_proj"])) == [
        "model.layers.1.mlp.gate_proj",
        "model.layers.1.mlp.down_proj",
    ]
    assert list(find(model, [nn.Embedding])) == ["model.embed_tokens"]
    with pytest.raises(
        ValueError, match=r"include has '\*.feed_forward.\*', which matches no module of LlamaForCausalLM"
    ):
        find(model, linear_kinds(), include=["*.feed_forward.*"])


def test_find_takes_exact_types_and_does_not_look_into_closed_modules():
    model = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Sequential(nn.Linear(2, 2)), nn.ModuleList([nn.Linear(2, 2)]))
    assert list(find(model, linear_kinds())) == [
        "1.0",
        "2.0",
    ]  # not the attention's own out_proj, whose forward is bypassed
    assert list(find(model, linear_kinds(), closed=[nn.ModuleList])) == ["1.0"]


def test_find_knows_conv1d():
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=11, n_positions=16))
    kinds = {name: type(layer) for name, layer in find(model, linear_kinds()).items()}
    assert kinds["transformer.h.0.attn.c_attn"] is Conv1D
    assert kinds["lm_head"] is nn.Linear


def test_swap_is_its_own_inverse():
    model = tiny_llama()
    ids = torch.randint(0, 50, (1, 7))
    before = model(ids).logits
    name = "model.layers.0.mlp.up_proj"
    old = swap(model, {name: nn.Linear(24, 96)})
    assert not torch.equal(model(ids).logits, before)
    assert not model.get_submodule(name).training
    swap(model, old)
    assert torch.equal(model(ids).logits, before)


def test_swap_reaches_a_shared_module_under_every_name():
    shared = nn.Linear(3, 3)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    assert list(find(model, linear_kinds())) == ["a"]
    new = nn.Linear(3, 3)
    swap(model, {"a": new})
    assert model["a"] is new
    assert model["b"][0] is new


@pytest.mark.parametrize("name", ["model.nothing", ""])
def test_swap_names_a_missing_layer_and_changes_nothing(name):
    model = tiny_llama()
    layer = model.lm_head
    with pytest.raises(ValueError, match=f"no layer named '{name}'"):
        swap(model, {"lm_head": nn.Linear(24, 50), name: nn.Linear(1, 1)})
    assert model.lm_head is layer


def test_merge_replaces_what_can_be_merged_and_hands_it_back():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

        def merged(self):
            plain = nn.Linear(self.in_features, self.out_features)
            plain.weight, plain.bias = nn.Parameter(2 * self.weight), nn.Parameter(2 * self.bias)
            return plain

    model, x = nn.Sequential(nn.Linear(4, 4), Doubled(4, 4)), torch.randn(5, 4)
    before = model(x)
    units = merge(model)
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]
    torch.testing.assert_close(model(x), before)
    swap(model, units)
    assert torch.equal(model(x), before)


def test_tied_weights_are_seen_and_untied_for_good():
    model = tiny_llama()
    assert tied_names(model, model.lm_head.weight) == ["model.embed_tokens.weight", "lm_head.weight"]
    assert tied_names(model, model.model.norm.weight) == ["model.norm.weight"]
    assert tied_names(tiny_llama(tied=False), model.lm_head.weight) == []
    model.lm_head.weight = nn.Parameter(torch.zeros(50, 24))
    untie(model)
    model.tie_weights()
    assert not model.lm_head.weight.any()
    assert model.all_tied_weights_keys == {}


def test_cost_is_exact():
    model = tiny_llama()
    per_layer = 24 * 24 * 2 + 24 * 12 * 2 + 3 * 24 * 96  # q and o, k and v, the MLP
    macs = 2 * per_layer + 24 * 97
    params = 2 * (per_layer + 2 * 24) + 24 + 24 * 97  # norms; the head is the embedding: counted once
    assert cost(model) == LayerCost(params, macs)
    assert cost(nn.Linear(5, 7)) == LayerCost(42, 35)
    assert cost(Conv1D(7, 5)) == LayerCost(42, 35)
    assert cost(nn.Conv2d(4, 6, 3, groups=2, bias=False)) == LayerCost(6 * 2 * 9, 6 * 2 * 9)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts and takes out pages this way")
def test_pages_of_a_replaced_weight_leave_the_process(tmp_path):
    def resident_mib():
        return int(re.search(r"RssFile:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024

    save_file({"weight": torch.arange(2**24, dtype=torch.float32)}, tmp_path / "weight.safetensors")  # 64 MiB
    weight = load_file(tmp_path / "weight.safetensors")["weight"]
    before = resident_mib()
    assert weight.sum() == torch.arange(2**24, dtype=torch.float32).sum()
    assert resident_mib() - before > 50
    page_out(weight)
    assert resident_mib() - before < 14
    assert weight[2**23] == 2**23  # still readable
    page_out(torch.arange(3.0))  # smaller than a page: nothing to do
    own = torch.arange(2.0**20)
    page_out(own)
    assert own[12345] == 12345  # memory of its own, not a file's, stays as it was


def test_a_packed_model_is_not_saved_as_something_that_loads_at_random(tmp_path):
    """from_pretrained would find no weights for its layers and draw new ones."""
    import pickle

    from tests.properties.architectures import build

    from assay.methods.builtin import weight_only
    from assay.methods.core.quantize.int8_linear import quantize_linears
    from assay.methods.transform import TuneContext

    context = TuneContext("decode", 32, 4)
    for made in (quantize_linears(build("llama"), fuse=False), weight_only.transform.apply(build("gpt2"), {}, context)):
        for model in (made, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
            with pytest.raises(ValueError, match="must not be saved with packed layers"):
                model.save_pretrained(tmp_path / "out")
        assert not (tmp_path / "out").exists()

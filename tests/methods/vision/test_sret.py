"""SReT: slices are attention under a block mask that is never made, recursion shares weights, sizes and costs are the published ones."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tests.tiny import tiny_model, token_ids
from torch import nn

from assay.measure.cost import count_cost
from assay.methods.core.vision.weights import load_weights
from assay.methods.vision import build
from assay.methods.vision.sret import (
    CONFIGS,
    SLICED,
    Block,
    Projection,
    Recursive,
    SlicedAttention,
    SReT,
    Stage,
    distillation_loss,
    make_recursive,
    register_sliced_attention,
    slice_sizes,
    sliced_attention,
    strided_order,
)

TINY = {"head_dim": 4, "heads": (2, 4, 8), "mlp_ratio": 2.0, "np_mlp_ratio": 1.0, "depths": (1, 2, 1), "input_size": 64}
MILLIONS = {"sret_t": 4.8, "sret_lt": 5.0, "sret_s": 20.9, "sret_t_wo_slice_384": 4.9, "sret_s_wo_slice_384": 21.0}
MILLIONS |= {"sret_s_wo_slice_512": 21.3, "sret_lt_16_14": 5.0}
GMACS = {
    "sret_t": 1.1,
    "sret_t_wo_slice": 1.4,
    "sret_lt": 1.2,
    "sret_lt_16_14": 1.2,
    "sret_lt_wo_slice": 1.4,
    "sret_s": 4.2,
}
GMACS |= {"sret_s_wo_slice": 4.7, "sret_t_wo_slice_384": 6.4, "sret_s_wo_slice_384": 18.5, "sret_s_wo_slice_512": 42.8}
COUNTED = {"sret_t": (1, 2, 1), "sret_lt_16_14": (1, 1, 1), "sret_s_wo_slice_384": (1, 1, 1)}
NAME = "assay_sliced_test"


def tiny(seed=0, **settings):
    torch.manual_seed(seed)
    return SReT(num_classes=5, **{**TINY, **settings}).eval()


def by_hand(name, depths=(2, 5, 3)):
    """(parameters, MACs, MACs of the products with scores among them)"""
    found = {"groups": SLICED, "input_size": 224, "depths": depths, **CONFIGS[name]}
    widths = [found["head_dim"] * heads for heads in found["heads"]]
    half, c, size = widths[0] // 2, widths[0], found["input_size"]
    sides = [size // stride for stride in (8, 16, 32)]
    parameters = 27 * half + half + 9 * half * c + c + 9 * c * c + c + 2 * (half + 2 * c) + c * sides[0] ** 2
    macs = 27 * half * (size // 2) ** 2 + 9 * half * c * (size // 4) ** 2 + 9 * c * c * sides[0] ** 2
    scores = 0
    for stage, (c, depth, side) in enumerate(zip(widths, found["depths"], sides, strict=True)):
        hidden, own = int(c * found["mlp_ratio"]), int(c * found["np_mlp_ratio"])
        n = side**2
        parameters += depth * (8 * c + 4 * c**2 + 5 * c + 2 * c * hidden + hidden - 4 * c + 4)
        parameters += 2 * depth * (2 * c + 2 * c * own + own + c + 2)
        macs += 2 * depth * n * (4 * c**2 + 2 * c * hidden + 2 * c * own)
        scores += depth * sum(2 * n**2 * c // groups for groups in found["groups"][stage])
        if stage < 2:
            parameters += 10 * widths[stage + 1]
            macs += 9 * widths[stage + 1] * sides[stage + 1] ** 2
    return parameters + 2 * c + 1000 * c + 1000, macs + scores + 1000 * c, scores


# --- sizes and costs


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_and_macs_of_every_configuration(name, monkeypatch):
    """The operations are counted with few blocks: all blocks of a stage are alike."""
    for fill in ("trunc_normal_", "kaiming_uniform_", "uniform_"):  # there is nothing to fill on the meta device
        monkeypatch.setattr(nn.init, fill, lambda tensor, *given, **settings: tensor)
    with torch.device("meta"):
        model = build(name)
        assert sum(p.numel() for p in model.parameters()) == by_hand(name)[0]
        if name in COUNTED:
            images = torch.zeros(1, 3, model.input_size, model.input_size)
            short = build(name, depths=COUNTED[name]).eval()
            assert count_cost(short, images).macs == by_hand(name, COUNTED[name])[1]


def test_the_published_numbers():
    for name, millions in MILLIONS.items():
        assert by_hand(name)[0] / 1e6 == pytest.approx(millions, abs=0.1)
    for name, macs in GMACS.items():
        assert by_hand(name)[1] / 1e9 == pytest.approx(macs, rel=0.05)
    parameters, macs, scores = by_hand("sret_t")
    assert parameters == 4_755_979
    assert (macs / 1e9, scores / 1e9) == (pytest.approx(1.1124, abs=6e-5), pytest.approx(0.1672, abs=6e-5))
    _, whole, all_scores = by_hand("sret_t_wo_slice")
    assert (whole / 1e9, all_scores / 1e9) == (pytest.approx(1.3657, abs=6e-5), pytest.approx(0.4204, abs=6e-5))
    assert 1 - macs / whole == pytest.approx(0.185, abs=5e-4)


def test_slicing_changes_no_parameter_and_recursion_shares_half_of_what_runs():
    groups = ((4, 2), (2, 1), (1, 1))
    sliced, whole = (tiny(depths=(2, 5, 3), groups=each) for each in (groups, ((1, 1),) * 3))
    assert {k: v.shape for k, v in sliced.state_dict().items()} == {k: v.shape for k, v in whole.state_dict().items()}
    calls: list[nn.Module] = []
    for module in sliced.modules():
        if isinstance(module, Block):
            module.register_forward_hook(lambda block, given, out: calls.append(block))
    sliced(torch.zeros(1, 3, 64, 64))
    size = {id(block): sum(p.numel() for p in block.parameters()) for block in calls}
    assert sum(size.values()) / sum(size[id(block)] for block in calls) == 0.5
    assert len(calls) == 20


# --- sliced attention


def group_of(tokens, groups, order):
    """The group of each token, straight from the definition."""
    if order == "strided":
        return torch.arange(tokens) % groups
    runs = torch.cat([torch.full((len(part),), i) for i, part in enumerate(torch.arange(tokens).tensor_split(groups))])
    if order == "contiguous":
        return runs
    found = torch.empty_like(runs)
    found[order] = runs
    return found


@pytest.mark.parametrize(("tokens", "groups"), [(12, 1), (12, 4), (13, 4), (17, 5), (12, 12)])
@pytest.mark.parametrize(
    "order", ["contiguous", "strided", torch.randperm(17, generator=torch.Generator().manual_seed(0))]
)
def test_slices_are_attention_under_a_block_mask(tokens, groups, order):
    torch.manual_seed(0)
    if isinstance(order, torch.Tensor):
        order = order[order < tokens]
    q, k, v = torch.randn(3, 2, 3, tokens, 8, dtype=torch.float64)
    groups_of = group_of(tokens, groups, order)
    same = groups_of[:, None] == groups_of
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=same)
    torch.testing.assert_close(sliced_attention(q, k, v, groups=groups, order=order), expected)
    layer = SlicedAttention(24, 3).double()
    x = torch.randn(2, tokens, 24, dtype=torch.float64)
    q, k, v = layer.qkv(x).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
    expected = layer.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=same).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, groups, order), expected)


def test_one_group_is_full_attention_and_as_many_as_tokens_is_the_values():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 10, 8)
    full = F.scaled_dot_product_attention(q, k, v, scale=0.7)
    assert torch.equal(sliced_attention(q, k, v, groups=1, scale=0.7), full)
    shuffled = sliced_attention(q, k, v, groups=1, order=torch.randperm(10), scale=0.7)
    assert torch.equal(shuffled, full)
    layer, x = SlicedAttention(24, 3), torch.randn(2, 10, 24)
    torch.testing.assert_close(layer(x, 10), layer.proj(layer.qkv(x)[..., 48:]))


def test_slices_save_their_share_of_the_work():
    q, k, v = torch.randn(3, 1, 2, 96, 8)
    costs = [count_cost(lambda g=g: sliced_attention(q, k, v, groups=g, order="strided")).macs for g in (1, 2, 8)]
    assert costs == [2 * 2 * 96**2 * 8 // groups for groups in (1, 2, 8)]


def test_a_permutation_changes_who_is_together():
    def sets(order):
        groups = group_of(12, 3, order)
        return {frozenset(torch.nonzero(groups == group).flatten().tolist()) for group in range(3)}

    assert sets("contiguous") != sets("strided")
    assert strided_order(12, 3).tolist() == [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11]
    assert slice_sizes(784, 16) == [(16, 49)]
    assert sum(count * size for count, size in slice_sizes(197, 14)) == 197


def test_bad_slices_are_named():
    q = torch.randn(1, 2, 6, 8)
    with pytest.raises(ValueError, match="groups must be a whole number at least 1 and at most 6"):
        sliced_attention(q, q, q, groups=7)
    with pytest.raises(ValueError, match="order must be one of"):
        sliced_attention(q, q, q, groups=2, order="random")
    with pytest.raises(ValueError, match="order must have shape"):
        sliced_attention(q, q, q, groups=2, order=torch.arange(5))
    with pytest.raises(ValueError, match="order must be a permutation"):
        sliced_attention(q, q, q, groups=2, order=torch.zeros(6, dtype=torch.int64))
    for strange in (torch.arange(6).view(2, 3), torch.tensor(3)):
        with pytest.raises(ValueError, match="order must have shape"):
            sliced_attention(q, q, q, groups=2, order=strange)
    for short in (q[:, :, :5], q[..., :4]):
        with pytest.raises(ValueError, match="k must have the heads and tokens of q, and its width"):
            sliced_attention(q, short, q, groups=2)
    with pytest.raises(ValueError, match="v must have the heads and tokens of q"):
        sliced_attention(q, q, q[:, :, :5], groups=2)
    assert sliced_attention(q, q, q[..., :4], groups=2, order=torch.arange(6).int()).shape == (1, 2, 6, 4)
    with pytest.raises(ValueError, match="width must be divisible"):
        SlicedAttention(10, 3)


# --- recursion


def plain_layer(block, width, heads, hidden):
    """torch's own layer with a block's weights."""
    layer = nn.TransformerEncoderLayer(
        width, heads, hidden, 0.0, "gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
    )
    pairs = {
        "self_attn.in_proj_weight": block.attn.qkv.weight, "self_attn.in_proj_bias": block.attn.qkv.bias,
        "self_attn.out_proj.weight": block.attn.proj.weight, "self_attn.out_proj.bias": block.attn.proj.bias,
        "linear1.weight": block.mlp.fc1.weight, "linear1.bias": block.mlp.fc1.bias,
        "linear2.weight": block.mlp.fc2.weight, "linear2.bias": block.mlp.fc2.bias,
        "norm1.weight": block.norm1.weight, "norm1.bias": block.norm1.bias,
        "norm2.weight": block.norm2.weight, "norm2.bias": block.norm2.bias,
    }  # fmt: skip
    layer.load_state_dict(pairs)
    return layer.eval()


def test_once_through_without_projection_is_a_plain_transformer():
    torch.manual_seed(0)
    stage, x = Stage(8, 2, 16, 8, [0.0, 0.0], groups=(1,)).eval(), torch.randn(2, 9, 8)
    for projection in stage.projections:
        nn.init.zeros_(projection.mlp.fc2.weight)
        nn.init.zeros_(projection.mlp.fc2.bias)
        torch.testing.assert_close(projection(x), x)
    expected = x
    for block in stage.blocks:
        expected = plain_layer(block, 8, 2, 16)(expected)
    torch.testing.assert_close(stage(x), expected)


def test_coefficients_scale_the_branches():
    torch.manual_seed(0)
    block, x = Block(8, 2, 16, 0.0).eval(), torch.randn(1, 5, 8)
    block.coefficients.data.copy_(torch.tensor([2.0, 3.0, 5.0, 7.0]))
    y = 2 * x + 3 * block.attn(block.norm1(x))
    torch.testing.assert_close(block(x), 5 * y + 7 * block.mlp(block.norm2(y)))
    projection = Projection(8, 4)
    projection.coefficients.data.copy_(torch.tensor([2.0, 3.0]))
    torch.testing.assert_close(projection(x), 2 * x + 3 * projection.mlp(projection.norm1(x)))


def test_the_gradient_of_a_shared_weight_is_the_sum_over_its_uses():
    torch.manual_seed(0)
    stage, x = Stage(8, 2, 16, 8, [0.0], groups=(2, 1)).double().eval(), torch.randn(2, 6, 8, dtype=torch.float64)
    stage(x).square().sum().backward()
    untied = [copy.deepcopy(stage.blocks[0]) for _ in range(2)]
    for block in untied:
        block.zero_grad()
    y = stage.projections[0](untied[0](x, 2))
    stage.projections[1](untied[1](y, 1)).square().sum().backward()
    for name, shared in stage.blocks[0].named_parameters():
        torch.testing.assert_close(shared.grad, sum(block.get_parameter(name).grad for block in untied))


def test_every_use_has_its_own_slices_whatever_their_number():
    torch.manual_seed(0)
    stage, x, seen = Stage(8, 2, 16, 8, [0.0, 0.0], groups=(4, 2, 3)).eval(), torch.randn(1, 12, 8), []
    for block in stage.blocks:
        block.register_forward_pre_hook(lambda block, given: seen.append((block, *given[1:])))
    stage(x)
    first, second = stage.blocks
    wanted = [(4, "contiguous"), (2, "strided"), (3, "strided")]
    assert seen == [(block, *use) for block in (first, second) for use in wanted]
    assert len(stage.projections) == 6


def test_evaluation_is_reproducible_and_training_draws_new_slices():
    model, images = tiny(groups=((4, 2), (2, 1), (1, 1)), drop_path_rate=0.0), torch.randn(2, 3, 64, 64)
    assert torch.equal(model(images), model(images))
    for norm in (model.patch_embed.bn1, model.patch_embed.bn2, model.patch_embed.bn3):
        norm.momentum = 0.0
    model.train()
    assert not torch.equal(model(images), model(images))
    torch.manual_seed(1)
    first = model(images)
    torch.manual_seed(1)
    assert torch.equal(model(images), first)
    whole = tiny(groups=((1, 1),) * 3, drop_path_rate=0.0).train()
    assert torch.equal(whole(images), whole(images))


def test_drop_path_rates_are_those_of_the_release():
    model = tiny(depths=(2, 5, 3), drop_path_rate=0.2)
    rates = [[block.drop_path.rate for block in stage.blocks] for stage in model.transformers]
    starts = [(0, 2), (4, 5), (14, 3)]
    assert rates == [[pytest.approx(0.2 * (start + i) / 20) for i in range(depth)] for start, depth in starts]


# --- blocks of others


def encoders():
    """(model, the function that sets its blocks, inputs) of transformers' ViT and BERT."""
    from transformers import BertConfig, BertModel, ViTConfig, ViTModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    vit = ViTModel(
        ViTConfig(image_size=32, patch_size=8, initializer_range=0.1, **sizes), add_pooling_layer=False
    ).eval()
    bert = BertModel(BertConfig(vocab_size=97, initializer_range=0.1, **sizes), add_pooling_layer=False).eval()
    ids = token_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    return {
        "vit": (vit, {"pixel_values": torch.randn(2, 3, 32, 32)}),
        "bert": (bert, {"input_ids": ids, "attention_mask": mask}),
    }


def blocks_of(model):
    """(the module that holds the list, the list's name)"""
    return next(
        (holder, name)
        for holder in model.modules()
        for name, child in holder.named_children()
        if isinstance(child, nn.ModuleList)
    )


@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_anybodys_encoder_becomes_recursive(kind):
    model, inputs = encoders()[kind]
    holder, name = blocks_of(model)
    blocks = getattr(holder, name)
    before = model(**inputs).last_hidden_state
    parameters = sum(p.numel() for p in model.parameters())
    macs = count_cost(lambda: model(**inputs)).macs

    def with_list(made):
        setattr(holder, name, made)
        return model(**inputs).last_hidden_state

    again = nn.ModuleList(block for block in blocks for _ in range(2))  # the same blocks, twice in the list
    expected = with_list(again)
    naive = make_recursive(blocks, 2)
    assert torch.equal(with_list(naive), expected)
    assert not torch.equal(expected, before)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert count_cost(lambda: model(**inputs)).macs > 1.6 * macs
    gated = make_recursive(blocks, 2, lambda: Projection(32), gated=True)
    assert torch.equal(with_list(gated), before)
    added = sum(p.numel() for p in model.parameters()) - parameters
    assert added == 4 * sum(p.numel() for p in Projection(32).parameters()) + 4
    model.train()
    model(**inputs).last_hidden_state.square().sum().backward()
    assert all(gate.gates.grad.abs().min() > 0 for gate in gated)
    again = copy.deepcopy(model)
    again.load_state_dict(model.state_dict())


def test_a_tuple_keeps_what_else_is_in_it():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.attention_type = nn.Parameter(torch.tensor(2.0)), "full"

        def forward(self, x, plus):
            return self.scale * x + plus, "weights"

    made = make_recursive(nn.ModuleList([Block()]), 3)
    out = made[0](torch.ones(1), plus=1.0)
    assert out[0].item() == 15
    assert out[1] == "weights"
    assert made[0].attention_type == "full"
    assert not hasattr(made[0], "cache")
    gated = make_recursive(nn.ModuleList([Block()]), 2, lambda: nn.Linear(1, 1), gated=True)[0]
    assert gated(torch.ones(1), 1.0)[0].item() == 3


def test_what_cannot_be_recursive_is_refused():
    layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    with pytest.raises(TypeError, match="module_list must be an nn.ModuleList"):
        make_recursive([nn.Linear(4, 4)])
    with pytest.raises(TypeError, match="module_list"):
        make_recursive(nn.ModuleList())
    with pytest.raises(ValueError, match="number 1 differs"):
        make_recursive(nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 5)]))
    with pytest.raises(ValueError, match="blocks with parameters"):
        make_recursive(nn.ModuleList([nn.ReLU()]))
    with pytest.raises(TypeError, match="projection must be a function"):
        make_recursive(layers, 2, nn.Linear(4, 4))
    with pytest.raises(ValueError, match="block must give what it takes"):
        make_recursive(nn.ModuleList([nn.Linear(4, 1)]), gated=True)[0](torch.zeros(2, 4))
    with pytest.raises(ValueError, match="loops"):
        make_recursive(layers, 0)
    with pytest.raises(ValueError, match="recursive already"):
        make_recursive(make_recursive(layers))
    with pytest.raises(ValueError, match="cache must be None"):
        Recursive(layers[0], [nn.Identity()], False)(torch.zeros(1, 4), cache=object())
    decoder = tiny_model()
    decoder.model.layers = make_recursive(decoder.model.layers)
    with pytest.raises(ValueError, match="must be None"):
        decoder.generate(token_ids(1, 5), max_new_tokens=2)
    assert decoder(token_ids(1, 5), use_cache=False).logits.isfinite().all()


def test_slices_in_encoders_of_transformers():
    model, inputs = encoders()["vit"]
    expected = model(**inputs).last_hidden_state
    model.set_attn_implementation(register_sliced_attention(NAME, groups=1))
    torch.testing.assert_close(model(**inputs).last_hidden_state, expected)
    for order in ("contiguous", "strided"):
        model.set_attn_implementation(register_sliced_attention(NAME, groups=4, order=order))
        sliced = model(**inputs).last_hidden_state
        groups = group_of(17, 4, order)
        mask = torch.zeros(1, 1, 17, 17).masked_fill(groups[:, None] != groups, -torch.inf)
        model.set_attn_implementation("sdpa")
        hooks = [
            layer.register_forward_pre_hook(
                lambda m, args, kw, mask=mask: (args[:1], {**kw, "attention_mask": mask}), with_kwargs=True
            )
            for layer in getattr(*blocks_of(model))
        ]
        torch.testing.assert_close(sliced, model(**inputs).last_hidden_state, rtol=1e-4, atol=1e-5)
        for hook in hooks:
            hook.remove()


def test_padded_batches_are_dense_and_causal_models_are_refused():
    model, inputs = encoders()["bert"]
    expected = model(**inputs).last_hidden_state
    name = register_sliced_attention(NAME, groups=4)
    model.set_attn_implementation(name)
    torch.testing.assert_close(model(**inputs).last_hidden_state, expected)
    assert not torch.allclose(model(inputs["input_ids"]).last_hidden_state[1], expected[1], atol=1e-3)
    decoder = tiny_model()
    decoder.set_attn_implementation(name)
    with pytest.raises(ValueError, match="must be used in encoders"):
        decoder(token_ids(1, 9))


# --- against an independent reading of the released checkpoints


def released_state(depths=(1, 2, 1), widths=(8, 16, 32), side=8, classes=5):
    """Random tensors with the keys and shapes of a released checkpoint: blocks twice, with the same tensors."""
    torch.manual_seed(1)
    state: dict[str, torch.Tensor] = {}

    def draw(key, *shape):
        state[key] = 0.3 * torch.randn(shape)

    def linear(key, before, after):
        draw(key + ".weight", after, before)
        draw(key + ".bias", after)

    def norm(key, width):
        draw(key + ".weight", width)
        draw(key + ".bias", width)

    draw("pos_embed", 1, widths[0], side, side)
    for place, (before, after) in enumerate([(3, 4), (4, 8), (8, 8)], 1):
        draw(f"patch_embed.conv{place}.weight", after, before, 3, 3)
        draw(f"patch_embed.conv{place}.bias", after)
        norm(f"patch_embed.bn{place}", after)
        draw(f"patch_embed.bn{place}.running_mean", after)
        state[f"patch_embed.bn{place}.running_var"] = 0.5 + torch.rand(after)
        state[f"patch_embed.bn{place}.num_batches_tracked"] = torch.tensor(3)
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        for block in range(depth):
            at = f"transformers.{stage}.blocks.{4 * block}."
            norm(at + "norm1", width)
            linear(at + "attn.qkv", width, 3 * width)
            linear(at + "attn.proj", width, width)
            norm(at + "norm2", width)
            linear(at + "mlp.fc1", width, 2 * width)
            linear(at + "mlp.fc2", 2 * width, width)
            for i in range(1, 5):
                draw(f"{at}coefficient{i}.bias", 1)
            for key in [key for key in state if key.startswith(at)]:
                state[key.replace(at, f"transformers.{stage}.blocks.{4 * block + 2}.")] = state[key]
            for loop in range(2):
                at = f"transformers.{stage}.blocks.{4 * block + 2 * loop + 1}."
                norm(at + "norm1", width)
                linear(at + "mlp.fc1", width, width)
                linear(at + "mlp.fc2", width, width)
                draw(at + "coefficient1.bias", 1)
                draw(at + "coefficient2.bias", 1)
        if stage < 2:
            draw(f"pools.{stage}.conv.weight", widths[stage + 1], 1, 3, 3)
            draw(f"pools.{stage}.conv.bias", widths[stage + 1])
    norm("norm", widths[-1])
    linear("head", widths[-1], classes)
    return state


def released_forward(state, images, groups, heads=(2, 4, 8), depths=(1, 2, 1)):
    """The released network from its own tensors, in float64, with masks for slices; the later use of a block has strided ones."""
    s = {key: tensor.double() for key, tensor in state.items()}

    def norm(x, at):
        return F.layer_norm(x, x.shape[-1:], s[at + ".weight"], s[at + ".bias"], 1e-6)

    def linear(x, at):
        return F.linear(x, s[at + ".weight"], s[at + ".bias"])

    def mlp(x, at):
        return linear(F.gelu(linear(x, at + "mlp.fc1")), at + "mlp.fc2")

    def scalar(at, i):
        return s[f"{at}coefficient{i}.bias"]

    x = images.double()
    for place in (1, 2, 3):
        at = f"patch_embed.conv{place}"
        x = F.conv2d(x, s[at + ".weight"], s[at + ".bias"], 2, 1)
        at = f"patch_embed.bn{place}."
        x = F.batch_norm(x, s[at + "running_mean"], s[at + "running_var"], s[at + "weight"], s[at + "bias"])
        x = F.relu(x)
    x = x + s["pos_embed"]
    for stage in range(3):
        height, width = x.shape[2:]
        t = x.flatten(2).transpose(1, 2)
        for use in range(2 * depths[stage]):
            loop = use % 2
            kinds = group_of(height * width, groups[stage][loop], "strided" if loop else "contiguous")
            at = f"transformers.{stage}.blocks.{2 * use}."
            q, k, v = (
                z.unflatten(-1, (heads[stage], -1)).transpose(1, 2)
                for z in linear(norm(t, at + "norm1"), at + "attn.qkv").chunk(3, -1)
            )
            scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(kinds[:, None] != kinds, -torch.inf)
            mixed = linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), at + "attn.proj")
            t = scalar(at, 1) * t + scalar(at, 2) * mixed
            t = scalar(at, 3) * t + scalar(at, 4) * mlp(norm(t, at + "norm2"), at)
            at = f"transformers.{stage}.blocks.{2 * use + 1}."
            t = scalar(at, 1) * t + scalar(at, 2) * mlp(norm(t, at + "norm1"), at)
        x = t.transpose(1, 2).unflatten(2, (height, width))
        if stage < 2:
            at = f"pools.{stage}.conv."
            x = F.conv2d(x, s[at + "weight"], s[at + "bias"], 2, 1, groups=x.shape[1])
    return linear(norm(x.mean((2, 3)), "norm"), "head")


def test_released_checkpoints_are_read_whole_and_give_the_same_logits():
    groups = ((4, 2), (2, 2), (1, 1))
    state, images, model = released_state(), torch.randn(2, 3, 64, 64), tiny(groups=groups)
    assert load_weights(model, state) == "official"
    expected = released_forward(state, images, groups)
    torch.testing.assert_close(model.double()(images.double()), expected, rtol=1e-5, atol=1e-5)
    other = {**state, "transformers.1.blocks.2.norm1.bias": torch.zeros(16)}
    with pytest.raises(ValueError, match="one tensor for all uses"):
        load_weights(model, other, layout="official")
    scaled = {**state, "transformers.1.blocks.2.coefficient3.bias": torch.zeros(1)}
    with pytest.raises(ValueError, match="one tensor for all uses"):
        load_weights(model, scaled, layout="official")


# --- the model


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (61, 75)])
def test_other_sizes_batches_and_memory_formats(size):
    model, images = tiny(groups=((4, 2), (3, 1), (1, 1))), torch.randn(2, 3, *size)
    maps = model.feature_maps(images)
    assert {stride: list(each.shape[1:]) for stride, each in maps.items()} == {
        8: [8, -(-size[0] // 8), -(-size[1] // 8)],
        16: [16, -(-size[0] // 16), -(-size[1] // 16)],
        32: [32, -(-size[0] // 32), -(-size[1] // 32)],
    }
    out = model(images)
    torch.testing.assert_close(model(images[:1]), out[:1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(images.contiguous(memory_format=torch.channels_last)), out, rtol=1e-4, atol=1e-5)
    pooled = model.forward_head(model.forward_features(images), pre_logits=True)
    torch.testing.assert_close(model.head(pooled), out)
    half = copy.deepcopy(model).bfloat16()(images.bfloat16())
    assert (half.float() - out).abs().max() < 0.05 * out.abs().max()


def test_stages_may_be_used_as_often_as_one_likes_and_without_projections():
    images = torch.randn(1, 3, 32, 32)
    model = tiny(groups=((4,), (2, 1, 1), (1, 1)), np_mlp_ratio=0.0, stem_strides=(1, 2, 2), input_size=32)
    assert model.strides == (4, 8, 16)
    assert [len(stage.projections) for stage in model.transformers] == [1, 6, 2]
    assert not any(isinstance(module, Projection) for module in model.modules())
    assert list(model.feature_maps(images)[4].shape) == [1, 8, 8, 8]
    t, block = torch.randn(1, 4, 32), model.transformers[2].blocks[0]
    assert torch.equal(model.transformers[2](t), block(block(t)))


def test_features_only_stops_where_nothing_more_is_asked_for():
    net = build("sret_t", features_only=True, out_indices=(0,), **TINY)
    net.model.transformers[2] = None  # never reached
    assert [list(each.shape) for each in net(torch.randn(1, 3, 64, 64))] == [[1, 8, 8, 8]]
    assert (net.feature_info.channels(), net.feature_info.reduction()) == ([8], [8])


@pytest.mark.slow
def test_the_graph_can_be_exported():
    model, images = tiny(), torch.randn(1, 3, 64, 64)
    exported = torch.export.export(model, (images,)).module()
    torch.testing.assert_close(exported(images), model(images))


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="an entry a stage"):
        tiny(groups=((8, 2), (4, 1)))
    with pytest.raises(ValueError, match="in it one a use"):
        tiny(groups=((8, 2), (), (1, 1)))
    with pytest.raises(ValueError, match="drop_path_rate"):
        tiny(drop_path_rate=1.0)
    with pytest.raises(ValueError, match="groups must be a whole number at least 1 and at most 1,?"):
        tiny(groups=((8, 2), (4, 1), (2, 1)))(torch.randn(1, 3, 32, 32))
    with pytest.raises(ValueError, match="x must have shape"):
        tiny()(torch.randn(1, 1, 64, 64))


def test_distillation_is_cross_entropy_with_soft_labels():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 6, 5)
    wanted = -((teacher / 2).softmax(1) * (student / 2).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(distillation_loss(student, teacher, temperature=2.0), wanted)
    with pytest.raises(ValueError, match="teacher must have shape"):
        distillation_loss(student, teacher[:3])
    with pytest.raises(ValueError, match="temperature"):
        distillation_loss(student, teacher, temperature=0)

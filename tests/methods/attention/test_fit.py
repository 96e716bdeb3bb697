from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from assay.measure.cost import count_cost
from assay.methods.attention.fit import (
    FIT,
    Attention,
    Cross,
    FITConfig,
    FITDecoder,
    FITSize,
    Interleaved,
    attend,
    format_layers,
    group_image,
    group_sequence,
    parse_layers,
    sincos,
    ungroup_image,
    ungroup_sequence,
)

SMALL = {"dim": 8, "latent_dim": 12, "heads": 2, "latent_heads": 2}


def encoder(layers="(1)2(1)", groups=3, group_size=4, latents=2, inputs=5, **options):
    torch.manual_seed(0)
    sizes = {"inputs": inputs, "groups": groups, "group_size": group_size, "latents": latents}
    model = FIT(layers, **sizes, **{**SMALL, **options}).double()
    with torch.no_grad():
        for p in model.parameters():  # so that norms, biases and tables all matter
            p.add_(0.2 * torch.randn_like(p))
    return model


def decoder(layers="(1)1(1)2(1)", groups=4, group_size=5, latents=2, **options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 23, "groups": groups, "group_size": group_size, "latents": latents}
    model = FITDecoder(FITConfig(layers, **sizes, **{**SMALL, **options}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.double().eval()


def tokens(batch=2, groups=3, n=4, inputs=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, groups, n, inputs, generator=generator, dtype=torch.float64)


def jacobian(model, x, out=0):
    """(t n, t n) bool: which output tokens (rows) move with which input tokens, of the first sequence."""
    full = torch.autograd.functional.jacobian(lambda x: model(x)[out].sum(-1), x[:1])[0, :, :, 0]
    t, n = x.shape[1:3]
    return (full.abs().sum(-1) > 0).view(-1, t * n)


# ------------------------------------------------------------------------------------------------------------- layer strings


@pytest.mark.parametrize(
    ("layers", "stages"),
    [
        ("(2)4(2)4(2)", [(2, 4), (2, 4), (2, 0)]),
        ("(2)4", [(2, 4)]),
        ("(12)", [(12, 0)]),
        ("(0)3(10)", [(0, 3), (10, 0)]),
        ("(3)0", [(3, 0)]),
    ],
)
def test_layer_strings(layers, stages):
    assert parse_layers(layers) == stages
    assert parse_layers(format_layers(stages)) == stages
    assert format_layers(parse_layers(layers)) == layers.removesuffix("0") if layers == "(3)0" else layers


@pytest.mark.parametrize(
    "layers", ["", "2(2)", "(2)0(2)", "(2)(2)", "(2)4(2", "(2)-1", "(a)", "()2", "(0)", "(2)4(0)", "(2)4 "]
)
def test_other_strings_are_refused(layers):
    with pytest.raises(ValueError, match="layers must"):
        parse_layers(layers)


# ---------------------------------------------------------------------------------------------------------- what must hold


def test_one_group_of_local_layers_is_a_transformer():
    model = encoder("(3)0", groups=1, group_size=7)
    x = tokens(2, 1, 7)
    y = model.stem_norm(model.stem(x[:, 0])) + model.positions
    for block in model.body.stages[0].local_layers:
        theirs = nn.TransformerEncoderLayer(
            8, 2, 32, dropout=0.0, activation="gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
        ).double()
        a = block.attention
        with torch.no_grad():
            theirs.self_attn.in_proj_weight.copy_(torch.cat([p.weight for p in (a.q_proj, a.k_proj, a.v_proj)]))
            theirs.self_attn.in_proj_bias.copy_(torch.cat([p.bias for p in (a.q_proj, a.k_proj, a.v_proj)]))
        theirs.self_attn.out_proj.load_state_dict(a.o_proj.state_dict())
        theirs.norm1.load_state_dict(block.norm.state_dict())
        theirs.norm2.load_state_dict(block.mlp_norm.state_dict())
        theirs.linear1.load_state_dict(block.mlp[0].state_dict())
        theirs.linear2.load_state_dict(block.mlp[2].state_dict())
        y = theirs(y)
    torch.testing.assert_close(model(x)[0][:, 0], model.body.norm(y))


def test_without_global_layers_groups_are_alone():
    model, x = encoder("(2)"), tokens()
    seen = jacobian(model, x)
    assert torch.equal(seen, torch.block_diag(*[torch.ones(4, 4)] * 3).bool())
    # the latents are those of the table
    torch.testing.assert_close(model(x)[1][0], model.body.latent_norm(model.table).view(3, 2, 12))


def test_groups_may_be_permuted_with_their_latents():
    model, x = encoder(), tokens()
    out, latents = model(x)
    order = torch.tensor([2, 0, 1])
    with torch.no_grad():
        model.table.copy_(model.table.view(3, 2, 12)[order].flatten(0, 1))
    permuted, permuted_latents = model(x[:, order])
    torch.testing.assert_close(permuted, out[:, order])
    torch.testing.assert_close(permuted_latents, latents[:, order])
    assert not torch.allclose(model(x)[0], out)  # the table alone tells groups apart


def test_every_token_reaches_every_token_by_the_write():
    x = tokens()
    assert jacobian(encoder("(1)1(1)"), x).all()
    blocks = torch.block_diag(*[torch.ones(4, 4)] * 3).bool()
    assert torch.equal(jacobian(encoder("(1)1"), x), blocks)  # one stage reads and never writes
    assert torch.equal(jacobian(encoder("(1)3"), x), blocks)
    latents = torch.autograd.functional.jacobian(lambda x: encoder("(1)1")(x)[1].sum(-1), x[:1])[0, :, :, 0]
    assert (latents.abs().sum(-1) > 0).all()


def test_the_encoder_with_causal_latents():
    model, x = encoder("(1)2(1)", causal="latents"), tokens()
    seen = jacobian(model, x)
    assert torch.equal(seen, torch.block_diag(*[torch.ones(4, 4)] * 3).bool() | torch.ones(12, 12).tril().bool())


@pytest.mark.parametrize("length", [1, 5, 13, 20])
def test_the_decoder_sees_no_future(length):
    model = decoder()
    ids = torch.randint(23, (1, length))
    embedded = model.embed(ids).detach().requires_grad_()
    model.embed.register_forward_hook(lambda *_: embedded)
    logits = model(ids).logits
    for i in range(length):
        (grad,) = torch.autograd.grad(logits[0, i].square().sum(), embedded, retain_graph=True)
        moved = grad[0].abs().sum(-1)
        assert moved[i + 1 :].sum() == 0
        # its own group up to itself, and all of the groups before
        assert (moved[: i + 1] > 0).all()


def test_the_first_group_knows_nothing_of_latents():
    model = decoder()
    ids = torch.randint(23, (2, 15))
    before = model(ids).logits
    with torch.no_grad():
        model.table.add_(torch.randn_like(model.table))
        for stage in model.body.stages:
            for block in stage.global_layers:
                block.mlp[0].weight.add_(1.0)
    after = model(ids).logits
    assert torch.equal(after[:, :5], before[:, :5])
    assert not torch.allclose(after[:, 5:], before[:, 5:])


@pytest.mark.parametrize("positions", ["learned", "sincos"])
@pytest.mark.parametrize("layers", ["(2)", "(1)2", "(2)4(2)4(2)", "(0)1(1)"])
@pytest.mark.parametrize(("dim", "latent_dim"), [(8, 12), (12, 8)])
def test_parameters_and_macs_are_as_counted(layers, positions, dim, latent_dim):
    size = FITSize(layers, inputs=5, groups=3, group_size=4, latents=2, dim=dim, latent_dim=latent_dim, ratio=3)
    model = FIT(
        layers, inputs=5, groups=3, group_size=4, latents=2, dim=dim, latent_dim=latent_dim, heads=2, latent_heads=2,
        ratio=3, positions=positions,
    )  # fmt: skip
    assert sum(p.numel() for p in model.parameters()) == size.parameters(positions)
    assert count_cost(model, torch.randn(1, 3, 4, 5)).macs == sum(size.macs().values())
    assert count_cost(model, torch.randn(2, 3, 4, 5)).macs == 2 * sum(size.macs().values())


def test_parameters_do_not_grow_with_the_tokens_but_for_the_tables():
    def size(groups, n):
        return FITSize("(2)2(2)", 5, groups, n, 2, 8, 12).parameters()

    assert size(20, 4) - size(10, 4) == 10 * 2 * 12
    assert size(10, 9) - size(10, 4) == 5 * 8


def test_global_pairs_grow_by_four_thirds():
    lengths, pairs, whole = [], [], []
    for n in (4, 8, 16, 32):
        size = FITSize("(1)1(1)", 3, n * n, n, 4, 8, 8)
        lengths.append(math.log(n**3))
        pairs.append(size.pairs())
        whole.append(sum(size.macs().values()))
    assert pairs[0] == {"local": 2 * 64 * 4, "read": 64 * 4, "global": 64**2, "write": 64 * 4}
    for part in ("local", "global"):
        slope = math.log(pairs[3][part] / pairs[0][part]) / (lengths[3] - lengths[0])
        assert slope == pytest.approx(4 / 3)
    assert (math.log(whole[3] / whole[0])) / (lengths[3] - lengths[0]) < 4 / 3


# ---------------------------------------------------------------------------------------------------------- padding, shapes


@pytest.mark.parametrize("layers", ["(1)2(1)", "(2)", "(1)1"])
def test_padding_has_no_say(layers):
    """Two rows, padded differently: inside a group, and by whole groups."""
    model, x = encoder(layers, groups=4), tokens(2, 4)
    mask = torch.ones(2, 4, 4, dtype=torch.bool)
    mask[0, 3, 2:] = False
    mask[1, 2:] = False
    found, latents = model(x, mask)
    changed = torch.where(mask[..., None], x, 9.0)
    again, again_latents = model(changed, mask)
    torch.testing.assert_close(again[mask], found[mask])
    torch.testing.assert_close(again_latents[mask.any(2)], latents[mask.any(2)])
    # a row padded by whole groups is the row without them
    alone, alone_latents = model(x[1:, :2])
    torch.testing.assert_close(found[1, :2], alone[0])
    torch.testing.assert_close(latents[1, :2], alone_latents[0])
    assert found.isfinite().all()
    torch.testing.assert_close(model(x, torch.ones_like(mask))[0], model(x)[0])


def test_a_row_of_padding_alone_is_finite_and_leaves_the_others_alone():
    model, x = encoder(), tokens().requires_grad_()
    mask = torch.ones(2, 3, 4, dtype=torch.bool)
    mask[1] = False
    found, latents = model(x, mask)
    assert found.isfinite().all()
    assert latents.isfinite().all()
    torch.testing.assert_close(found[0], model(x[:1])[0][0])
    (grad,) = torch.autograd.grad(found[0].square().sum() + latents[0].square().sum(), x)
    assert grad.isfinite().all()
    assert grad[1].abs().max() == 0


def test_padding_inside_a_group_is_a_smaller_group():
    model, x = encoder(groups=1, group_size=6), tokens(1, 1, 6)
    mask = torch.arange(6)[None, None] < 4
    torch.testing.assert_close(model(x, mask)[0][:, :, :4], model(x[:, :, :4])[0])


def test_queries_without_keys_get_zeros():
    q, k = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 5, 8)
    mask = torch.tensor([[True] * 5, [False] * 5])[:, None, None]
    out = attend(q, k, k, mask)
    assert out[1].abs().max() == 0
    torch.testing.assert_close(out[0], F.scaled_dot_product_attention(q, k, k)[0])
    square = torch.randn(1, 2, 5, 8)
    torch.testing.assert_close(
        attend(square, square, square, torch.ones(1, 1, 1, 5, dtype=torch.bool), causal=True),
        attend(square, square, square, causal=True),
    )


@pytest.mark.parametrize(("height", "width"), [(16, 16), (16, 24), (13, 21), (3, 30), (8, 9)])
def test_images_to_groups_and_back(height, width):
    images = torch.arange(2.0 * 3 * height * width).view(2, 3, height, width) + 1
    x, mask = group_image(images, 2, 4)
    rows, columns = -(-height // 8), -(-width // 8)
    assert x.shape == (2, rows * columns, 16, 12)
    assert torch.equal(ungroup_image(x, height, width, 2, 4), images)
    assert (mask is None) == (-(-height // 2) % 4 == 0 and -(-width // 2) % 4 == 0)
    if mask is not None:
        assert torch.equal(mask, x.abs().sum(-1) > 0)
    # the first tile, its second patch
    if min(height, width) >= 4:
        assert torch.equal(x[0, 0, 1].view(3, 2, 2), images[0, :, :2, 2:4])


def test_sequences_to_groups_and_back():
    x = torch.randn(2, 11, 3)
    grouped, mask = group_sequence(x, 4)
    assert grouped.shape == (2, 3, 4, 3)
    assert mask.sum().item() == 22
    assert torch.equal(ungroup_sequence(grouped, 11), x)
    assert group_sequence(x[:, :8], 4)[1] is None
    own = torch.ones(2, 11, dtype=torch.bool)
    own[1, 5:] = False
    assert group_sequence(x, 4, own)[1].sum((1, 2)).tolist() == [11, 5]


def test_images_of_odd_sizes_end_to_end():
    model = encoder(groups=4, group_size=4, inputs=12)
    images = torch.rand(2, 3, 7, 6, dtype=torch.float64)
    x, mask = group_image(images, 2, 2)
    out, _ = model(x, mask)
    padded = F.pad(images, (0, 2, 0, 1), value=0.0)  # the same patches, padded beyond them
    torch.testing.assert_close(model(*group_image(padded[..., :6], 2, 2))[0], out)
    assert out.shape == (2, 4, 4, 8)


def test_non_contiguous_input_and_bfloat16():
    model = encoder()
    x = tokens(2, 6, 4)[:, ::2]
    torch.testing.assert_close(model(x)[0], model(x.contiguous())[0])
    exact, exact_latents = model(x)
    low, low_latents = model.bfloat16()(x.bfloat16())
    assert (low.double() - exact).norm() < 0.05 * exact.norm()
    assert (low_latents.double() - exact_latents).norm() < 0.05 * exact_latents.norm()


def test_gradients():
    body = Interleaved("(1)1(1)", dim=4, latent_dim=6, heads=2, latent_heads=2, ratio=1, cross_ratio=1, context=True)
    body = body.double()
    x, z = tokens(1, 2, 3, 4).requires_grad_(), tokens(1, 2, 2, 6).requires_grad_()
    context = torch.randn(1, 3, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[[True, True, True], [True, False, True]]])
    names = [name for name, _ in body.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in body.parameters()]

    def run(x, z, context, *values):
        return torch.func.functional_call(body, dict(zip(names, values, strict=True)), (x, z, mask, context))

    assert torch.autograd.gradcheck(run, (x, z, context, *values), fast_mode=True)


def test_cross_attention_is_as_wide_as_the_narrower_side():
    for dim, context_dim in ((8, 12), (12, 8)):
        cross = Cross(dim, context_dim, 2)
        assert cross.attention.q_proj.weight.shape == (8, dim)
        assert cross.attention.k_proj.weight.shape == (8, context_dim)
        assert cross.attention.o_proj.weight.shape == (dim, 8)
        x, context = torch.randn(2, 3, dim), torch.randn(2, 5, context_dim)
        q, (k, v) = cross.attention.q_proj(cross.norm(x)), (p(cross.context_norm(context)) for p in (
            cross.attention.k_proj, cross.attention.v_proj))  # fmt: skip
        heads = []
        for part in (slice(0, 4), slice(4, 8)):
            weights = torch.softmax(q[..., part] @ k[..., part].transpose(1, 2) / 2, -1)
            heads.append(weights @ v[..., part])
        torch.testing.assert_close(cross(x, context), x + cross.attention.o_proj(torch.cat(heads, -1)))


# ------------------------------------------------------------------------------------------------------------------- decoder


@pytest.mark.parametrize("chunks", [[20], [1] * 20, [5, 5, 10], [3, 9, 8], [7, 1, 1, 11]])
def test_cached_steps_are_the_whole(chunks):
    model = decoder()
    ids = torch.randint(23, (3, 20))
    with torch.no_grad():
        whole = model(ids).logits
        state, found = model.init_state(3), []
        for part in ids.split(chunks, 1):
            logits, state = model.advance(part, state)
            found.append(logits)
    torch.testing.assert_close(torch.cat(found, 1), whole)


@pytest.mark.parametrize("layers", ["(2)", "(1)2", "(0)1(1)", "(1)1(1)2(1)"])
def test_the_state_holds_what_it_says(layers):
    model = decoder(layers)
    ids, state = torch.randint(23, (3, 20)), model.init_state(3)
    assert model.state_bytes(0, 3) == sum(x.numel() * x.element_size() for x in state.values())
    for t in range(20):
        _, state = model.advance(ids[:, t : t + 1], state)
        assert model.state_bytes(t + 1, 3) == sum(x.numel() * x.element_size() for x in state.values())


def test_no_latents_are_computed_that_no_token_reads():
    """Global layers of the last stage, and of a group that is not complete."""
    dead, alive = decoder("(1)3").float(), decoder("(1)3(1)").float()
    ids = torch.zeros(1, 4, dtype=torch.int64)

    def glob(model):
        rows = count_cost(lambda: model.advance(ids, model.init_state(1))).macs
        whole = count_cost(lambda: model.advance(torch.zeros(1, 5, dtype=torch.int64), model.init_state(1))).macs
        return whole - rows

    one = decoder("(1)").float()
    assert glob(dead) == glob(one)  # a fifth token and nothing else
    assert glob(alive) > 2 * glob(one)


@pytest.mark.parametrize("layers", ["(2)", "(1)2", "(0)1(1)", "(1)1(1)"])
def test_generation_is_what_the_model_thinks_likeliest(layers):
    model = decoder(layers)
    ids = torch.randint(23, (2, 6))
    out = model.generate(ids, max_new_tokens=14)
    assert out.shape == (2, 20)
    for t in range(6, 20):
        assert torch.equal(model(out[:, :t]).logits[:, -1].argmax(-1), out[:, t])


def test_a_step_costs_the_same_in_every_group():
    model = decoder("(1)2(1)", groups=40).float()
    ids = torch.randint(23, (1, 151))
    with torch.no_grad():
        _, early = model.advance(ids[:, :6], model.init_state(1))
        _, late = model.advance(ids, model.init_state(1))
        costs = [count_cost(lambda s=s: model.advance(ids[:, :1], s)).macs for s in (early, late)]
    assert costs[0] == costs[1] > 0
    assert late["global.0.0.k"].shape == (1, 2, 30 * 2, 6)  # latents of complete groups
    assert late["local.0.0.k"].shape == (1, 2, 1, 4)  # of this group's tokens only


def test_sampling_and_ends():
    model = decoder()
    ids = torch.randint(23, (2, 4))
    first = model.generate(ids, max_new_tokens=8, temperature=1.0, generator=torch.Generator().manual_seed(1))
    again = model.generate(ids, max_new_tokens=8, temperature=1.0, generator=torch.Generator().manual_seed(1))
    other = model.generate(ids, max_new_tokens=8, temperature=1.0, generator=torch.Generator().manual_seed(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    greedy = model.generate(ids, max_new_tokens=8)
    end = greedy[0, 6].item()
    ended = model.generate(ids[:1], max_new_tokens=8, eos_token_id=end)
    assert ended[0, -1] == end
    assert ended.shape[1] == 4 + 1 + (greedy[0, 4:] == end).nonzero()[0].item()
    assert torch.equal(model.generate(ids, max_new_tokens=0), ids)


def test_right_padding_and_labels():
    model = decoder()
    ids = torch.randint(23, (2, 17))
    logits = model(ids).logits
    changed = ids.clone()
    changed[1, 8:] = 0
    torch.testing.assert_close(model(changed).logits[1, :8], logits[1, :8])
    labels = ids.clone()
    labels[1, 8:] = -100
    expected = F.cross_entropy(torch.cat([logits[0, :-1], logits[1, :7]]), torch.cat([ids[0, 1:], ids[1, 1:8]]))
    torch.testing.assert_close(model(changed, labels=labels).loss, expected.float())


def test_it_learns_to_look_into_earlier_groups():
    """The first token of a sequence is asked for two groups later."""
    from assay.experiments.mixers.training import train

    torch.manual_seed(0)
    sizes = {"vocab_size": 4, "groups": 3, "group_size": 4, "latents": 2}
    model = FITDecoder(FITConfig("(1)1(1)", **sizes, dim=32, latent_dim=32, heads=2, latent_heads=2))

    def batches():
        while True:
            ids = torch.randint(4, (64, 12))
            targets = torch.full_like(ids, -100)
            targets[:, 9] = ids[:, 0]
            yield ids, targets

    losses = train(model, batches(), steps=200, lr=5e-3, weight_decay=0.0)
    assert sum(losses[-10:]) / 10 < 0.3 < 1.2 < losses[0]


@pytest.mark.parametrize("dim", [32, 128])
def test_at_the_start_a_token_is_told_from_those_before_it(dim):
    """Most of what varies at a position behind the first layer comes from the token there, not from the mean of its predecessors."""
    torch.manual_seed(0)
    model = FITDecoder(FITConfig("(1)1(1)", vocab_size=8, groups=2, group_size=8, dim=dim, latent_dim=dim))
    ids, seen = torch.randint(8, (512, 16)), []
    model.body.stages[0].local_layers[0].register_forward_hook(lambda module, inputs, out: seen.append(out))
    with torch.no_grad():
        model(ids)
    last, token = seen[0][:, -1], ids.view(-1, 8)[:, -1]  # of each group
    own = torch.stack([last[token == i].mean(0) for i in range(8)])[token]
    assert own.var(0).sum() > 0.8 * last.var(0).sum()


@pytest.mark.slow
def test_it_learns_recall_through_the_latents():
    """Two keys with values in the first group, each asked for in either group: the second knows them by latents alone."""
    from assay.experiments.mixers.training import evaluate, train
    from assay.workloads.sequences import associative_recall, batches_of

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "groups": 2, "group_size": 8, "latents": 4, "ratio": 2}
    model = FITDecoder(FITConfig("(1)1(1)", **sizes, dim=64, latent_dim=64, heads=2, latent_heads=2))
    task = {"length": 16, "pairs": 2, "vocab": 32}
    train(model, batches_of(associative_recall, 64, **task), steps=400, lr=3e-3, weight_decay=0.0)
    inputs, targets = associative_recall(256, seed=0, **task)
    targets[:, :8] = -100
    asked = (targets != -100).any(1)
    found = evaluate(model, inputs[asked], targets[asked])["accuracy"].mean()
    assert found > 0.8  # knowing which values there were gives 0.5


# ------------------------------------------------------------------------------------------------------------------ denoiser


def denoiser(**options):
    from assay.methods.attention.fit.denoiser import FITDenoiser

    torch.manual_seed(0)
    sizes = {"sample_size": (16, 12), "patch": 2, "tile": 2, "latents": 2, **SMALL}
    return FITDenoiser("(1)1(1)1(1)", **{**sizes, **options}).double()


def test_self_conditioning_starts_without_effect():
    model, x = denoiser(), torch.randn(2, 3, 16, 12, dtype=torch.float64)
    first = model(x, 10)
    assert first.sample.shape == x.shape
    previous = first.latents.detach()
    torch.testing.assert_close(model(x, 10, previous_latents=previous).sample, first.sample, atol=0, rtol=0)
    model(x, 10, previous_latents=previous).sample.square().sum().backward()
    assert model.previous_norm.weight.grad.abs().max() > 0  # but it is learned
    with torch.no_grad():
        model.previous_norm.weight.fill_(1.0)
    assert not torch.allclose(model(x, 10, previous_latents=previous).sample, first.sample)


def test_time_and_conditions_are_read():
    model, x = denoiser(condition_dim=7), torch.randn(2, 3, 13, 12, dtype=torch.float64)
    condition = torch.randn(2, 4, 7, dtype=torch.float64)
    out = model(x, torch.tensor([3, 900]), condition).sample
    assert out.shape == x.shape
    torch.testing.assert_close(out[1:], model(x[1:], 900, condition[1:]).sample)
    assert not torch.allclose(out[0], model(x, 900, condition).sample[0])
    assert not torch.allclose(out, model(x, torch.tensor([3, 900])).sample)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    masked = model(x, torch.tensor([3, 900]), condition, encoder_attention_mask=mask).sample
    torch.testing.assert_close(masked[0], out[0])
    torch.testing.assert_close(masked[1:], model(x[1:], 900, condition[1:, :2]).sample)


def test_the_denoiser_learns_in_a_diffusers_style_loop():
    """Predict the image behind the noise, the only one there is, and sample it with a few deterministic steps."""
    torch.manual_seed(0)
    model = denoiser(sample_size=8).float()
    image = torch.linspace(-1, 1, 8).expand(1, 3, 8, 8)
    keep = torch.linspace(0.99, 0.05, 10)  # of the signal's variance, by time
    optimizer, losses = torch.optim.Adam(model.parameters(), 5e-3), []
    for _ in range(60):
        t, noise = torch.randint(10, (16,)), torch.randn(16, 3, 8, 8)
        a = keep[t][:, None, None, None]
        noisy = a.sqrt() * image + (1 - a).sqrt() * noise
        with torch.no_grad():  # self-conditioning is trained with the latents of a first guess
            latents = model(noisy, t).latents
        loss = F.mse_loss(model(noisy, t, previous_latents=latents).sample, image.expand_as(noise))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    sample, latents = torch.randn(1, 3, 8, 8), None
    with torch.no_grad():
        for t in reversed(range(10)):
            out = model(sample, t, previous_latents=latents)
            latents = out.latents
            noise = (sample - keep[t].sqrt() * out.sample) / (1 - keep[t]).sqrt()
            before = keep[t - 1] if t else torch.tensor(1.0)
            sample = before.sqrt() * out.sample + (1 - before).sqrt() * noise
    assert (sample - image).square().mean() < 0.2 * image.square().mean()


def test_in_a_pipeline_of_diffusers(tmp_path):
    """Called, saved and loaded by the pipeline itself: the same pictures afterwards."""
    from diffusers import DDPMPipeline, DDPMScheduler

    from assay.methods.attention.fit.denoiser import FITDenoiser

    for options in ({}, {"sample_size": 8, "positions": "sincos"}):
        pipeline = DDPMPipeline(unet=denoiser(**options).float(), scheduler=DDPMScheduler(num_train_timesteps=20))
        pipeline.set_progress_bar_config(disable=True)
        draw = {"num_inference_steps": 3, "output_type": "np", "batch_size": 2}
        images = pipeline(**draw, generator=torch.Generator().manual_seed(0)).images
        assert images.shape == ((2, 8, 8, 3) if options else (2, 16, 12, 3))
        pipeline.save_pretrained(tmp_path)
        again = DDPMPipeline.from_pretrained(tmp_path)
        again.set_progress_bar_config(disable=True)
        assert isinstance(again.unet, FITDenoiser)
        assert again.unet.config.sample_size == ([16, 12] if not options else 8)
        assert (again(**draw, generator=torch.Generator().manual_seed(0)).images == images).all()
    alone = FITDenoiser.from_pretrained(tmp_path / "unet", torch_dtype=torch.bfloat16)
    x = torch.randn(1, 3, 8, 8, dtype=torch.bfloat16)
    assert alone(x, 3, return_dict=False)[0].dtype == torch.bfloat16


def test_the_decoder_saved_and_loaded_by_transformers(tmp_path):
    from transformers import AutoModelForCausalLM

    model, ids = decoder().float(), torch.randint(23, (2, 13))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, FITDecoder)
    assert not again.training
    torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=0, rtol=0)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert (half(ids).logits.float() - model(ids).logits).abs().max() < 0.1 * model(ids).logits.abs().max()


def test_padding_on_either_side_changes_nothing():
    model, ids = decoder(), torch.randint(23, (3, 13))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    mask[1, -6:] = 0
    out = model(ids, attention_mask=mask, labels=ids)
    torch.testing.assert_close(out.logits[0, 4:], model(ids[:1, 4:]).logits[0])
    torch.testing.assert_close(out.logits[1, :-6], model(ids[1:2, :-6]).logits[0])
    torch.testing.assert_close(out.logits[2], model(ids[2:]).logits[0])
    assert not out.logits[0, :4].any()
    assert not out.logits[1, -6:].any()
    rows = [ids[:1, 4:], ids[1:2, :-6], ids[2:]]
    total = sum(model(row, labels=row).loss * (row.shape[1] - 1) for row in rows)
    torch.testing.assert_close(out.loss, total.float() / sum(row.shape[1] - 1 for row in rows), check_dtype=False)
    mask[1] = 1
    found = model.generate(ids, mask, max_new_tokens=5)
    assert found[0, 4:].tolist() == model.generate(ids[:1, 4:], max_new_tokens=5)[0].tolist()
    assert found[1:].tolist() == model.generate(ids[1:], max_new_tokens=5).tolist()
    mask[0, 8] = 0
    with pytest.raises(ValueError, match="one run of tokens"):
        model(ids, attention_mask=mask)
    with pytest.raises(ValueError, match="pad on the left"):
        model.generate(ids, torch.ones_like(ids).index_fill_(1, torch.tensor([12]), 0), max_new_tokens=2)


# -------------------------------------------------------------------------------------------------------------------- errors


def test_positions():
    table = sincos(6, 8)
    torch.testing.assert_close(table[0], torch.tensor([0.0] * 4 + [1.0] * 4))
    torch.testing.assert_close(table[:, 0], torch.arange(6.0).sin())
    model = encoder(positions="sincos")
    assert "positions" not in dict(model.named_parameters())
    assert "positions" not in model.state_dict()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: encoder("2(2)"), "layers must look like"),
        (lambda: encoder(causal="yes"), "causal must be one of"),
        (lambda: encoder(positions="none"), "positions must be one of"),
        (lambda: encoder(latents=0), "latents must be a whole number at least 1"),
        (lambda: encoder(heads=3), "heads must divide the attention's width"),
        (lambda: encoder()(tokens(1, 4)), "up to 3 groups, up to 4 tokens"),
        (lambda: encoder()(tokens(1, 3, 5)), "up to 3 groups, up to 4 tokens"),
        (lambda: encoder()(tokens(1)[0]), "x must have shape"),
        (lambda: group_image(torch.zeros(3, 8, 8), 2, 2), "images must have shape"),
        (lambda: group_image(torch.zeros(1, 3, 8, 8), 0, 2), "patch must be"),
        (lambda: group_sequence(torch.zeros(1, 3, 8), 0), "size must be a whole number at least 1"),
        (lambda: group_sequence(torch.zeros(3, 8), 2), "x must have shape"),
        (lambda: group_sequence(torch.zeros(1, 3, 8), 2, torch.ones(1, 4) > 0), "mask must have shape"),
        (lambda: ungroup_sequence(torch.zeros(1, 3, 2, 8), 7), "length must be a whole number"),
        (lambda: ungroup_image(torch.zeros(1, 3, 4, 12), 8, 8, 2, 2), r"x must be \(batch, 4, 4"),
        (lambda: encoder()(tokens(1), torch.ones(1, 12) > 0), "mask must have shape"),
        (lambda: encoder()(tokens(1), None, torch.zeros(1, 2, 12).double()), "without context=True"),
        (lambda: FITSize("(1)", 3, 0, 4, 2, 8, 8), "groups must be a whole number at least 1, got 0"),
        (lambda: FITSize("1", 3, 1, 4, 2, 8, 8), "layers must look like"),
        (lambda: denoiser(latent_dim=7, latent_heads=1, heads=1), "latent_dim must be even"),
        (
            lambda: denoiser()(torch.zeros(1, 3, 16, 12).double(), 1, previous_latents=torch.zeros(1, 1, 2, 12)),
            r"previous_latents must be \(1, 12, 2, 12\)",
        ),
        (lambda: decoder()(torch.zeros(4, dtype=torch.int64)), "input_ids must have shape"),
        (lambda: sincos(4, 3), "dim must be even"),
        (lambda: Attention(8, 0), "heads must be a whole number at least 1"),
        (lambda: decoder(groups=0), "groups"),
        (lambda: decoder()(torch.zeros(1, 21, dtype=torch.int64)), "tokens must be at most 20, got 21"),
        (lambda: decoder().generate(torch.zeros(1, 15, dtype=torch.int64), max_new_tokens=6), "at most 20, got 21"),
        (lambda: decoder().generate(torch.zeros(1, 0, dtype=torch.int64), max_new_tokens=6), "must not be empty"),
        (
            lambda: denoiser()(torch.zeros(1, 3, 16, 12).double(), 1, torch.zeros(1, 2, 7).double()),
            "made without condition_dim",
        ),
        (lambda: denoiser()(torch.zeros(1, 3, 32, 12).double(), 1), "x must be"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_grouping_takes_whole_sizes_and_masks_of_bools_only():
    x, groups, images = torch.randn(2, 7, 3), torch.randn(1, 4, 4, 12), torch.randn(1, 3, 8, 8)
    for call, name in (
        (lambda: group_sequence(x, 2.0), "size"),
        (lambda: group_sequence(x, True), "size"),
        (lambda: group_sequence(x, 2, torch.ones(2, 7)), "mask must hold bools"),
        (lambda: group_sequence("x", 2), "x must be a tensor"),
        (lambda: ungroup_sequence(groups, 2.0), "length"),
        (lambda: group_image(images, 2.0, 2), "patch"),
        (lambda: ungroup_image(groups, 8.0, 8, 2, 2), "height"),
    ):
        with pytest.raises(TypeError, match=name):
            call()
    for call, name in (
        (lambda: ungroup_image(groups, 8, 8, 2, 0), "tile"),
        (lambda: sincos(4, 0), "dim"),
        (lambda: ungroup_sequence(groups, 17), "length"),
    ):
        with pytest.raises(ValueError, match=name):
            call()


def test_a_body_names_tensors_that_do_not_fit():
    body = Interleaved("(1)1(1)", **SMALL, context=True)
    x, z, context = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 5, 12), torch.randn(2, 6, 12)
    body(x, z, context=context, context_mask=torch.ones(2, 6, dtype=torch.bool))
    for error, name, options in (
        (TypeError, "context_mask must hold bools", {"context": context, "context_mask": torch.ones(2, 6)}),
        (ValueError, "context_mask must be None", {"context_mask": torch.ones(2, 6, dtype=torch.bool)}),
        (ValueError, "context must have shape", {"context": context[..., :11]}),
        (TypeError, "mask must hold bools", {"mask": torch.ones(2, 3, 4)}),
    ):
        with pytest.raises(error, match=name):
            body(x, z, **options)
    with pytest.raises(ValueError, match="z must have shape"):
        body(x, z[:, :2])

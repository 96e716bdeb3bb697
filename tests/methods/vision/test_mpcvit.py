"""MPCViT: attention without exponentials, the search over heads, MPCViT+, the two networks, and the names in transformers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.tiny import tiny_model, token_ids

from assay.measure.cost import count_cost
from assay.methods.core.vision.weights import load_weights
from assay.methods.vision import build
from assay.methods.vision.mpcvit import (
    EPS,
    KINDS,
    FusedMlp,
    HeadMixture,
    MPCViT,
    TokenMlp,
    attend,
    clamp,
    distillation_loss,
    fuse,
    harden,
    harden_tokens,
    kept_count,
    mixtures,
    penalty,
    register,
    select,
    token_mlps,
    weights,
)

KIND = pytest.mark.parametrize("kind", KINDS)
SMALL = {"num_classes": 5, "input_size": 16, "depth": 2, "num_heads": 4, "embed_dim": 32}


def qkv(batch=2, heads=3, n=9, dim=4, keys=None, kv_heads=None, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, n, dim), *[(batch, kv_heads or heads, keys or n, dim)] * 2]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def by_definition(kind, q, k, v, seen, scale=None, shift=0.0):
    """From the formulas, query by query, over the keys that are seen."""
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    for index in torch.cartesian_prod(*(torch.arange(size) for size in q.shape[:3])).tolist():
        b, h, i = index
        keys = [j for j in range(k.shape[2]) if seen[b, h, i, j]]
        if not keys:
            continue
        a = torch.stack([(q[b, h, i] * k[b, h, j]).sum() for j in keys]) * (scale or q.shape[-1] ** -0.5)
        if kind == "softmax":
            p = a.exp() / a.exp().sum()
        elif kind == "relu_softmax":
            p = a.clamp(min=0) / (a.clamp(min=0).sum() + 1e-5)
        elif kind == "two_quad":
            p = (a + shift) ** 2 / (((a + shift) ** 2).sum() + 1e-5)
        else:
            p = a / len(keys)
        out[b, h, i] = sum(weight * v[b, h, j] for weight, j in zip(p, keys, strict=True))
    return out


def everything(q, k):
    return torch.ones(*q.shape[:3], k.shape[2], dtype=torch.bool)


# -------------------------------------------------------------------------------------------------------------------- attention


@KIND
def test_every_kind_is_its_formula(kind):
    q, k, v = qkv(n=7, keys=10)
    torch.testing.assert_close(attend(kind, q, k, v), by_definition(kind, q, k, v, everything(q, k)))
    torch.testing.assert_close(
        attend(kind, q, k, v, scale=0.3), by_definition(kind, q, k, v, everything(q, k), scale=0.3)
    )


@KIND
def test_masks_hide_keys_and_scaling_divides_by_those_that_are_seen(kind):
    q, k, v = qkv(n=5, keys=8)
    seen = torch.rand(2, 3, 5, 8, generator=torch.Generator().manual_seed(1)) > 0.4
    seen[0, 1, 2] = False  # a query that sees nothing
    out = attend(kind, q, k, v, mask=seen)
    torch.testing.assert_close(out, by_definition(kind, q, k, v, seen))
    assert torch.equal(out[0, 1, 2], torch.zeros(4, dtype=torch.float64))
    band = torch.arange(8) <= torch.arange(5)[:, None] + 3
    torch.testing.assert_close(attend(kind, q, k, v, mask=seen, causal=True), by_definition(kind, q, k, v, seen & band))
    torch.testing.assert_close(
        attend(kind, q, k, v, causal=True), by_definition(kind, q, k, v, band.expand(2, 3, 5, 8))
    )


@KIND
def test_padding_is_as_if_it_were_not_there_whatever_lies_in_it(kind):
    q, k, v = qkv(n=6)
    padded = torch.tensor([1, 1, 1, 1, 0, 0]).bool()
    k[:, :, 4:], v[:, :, 4:] = 1e6, float("inf") if kind == "scaling" else 1e6
    torch.testing.assert_close(attend(kind, q, k, v, mask=padded), attend(kind, q, k[:, :, :4], v[:, :, :4]))
    rows = padded[None, None, None]
    torch.testing.assert_close(attend(kind, q, k, v, mask=rows), attend(kind, q, k[:, :, :4], v[:, :, :4]))


@KIND
def test_queries_that_share_their_keys(kind):
    q, k, v = qkv(heads=6, kv_heads=2)
    wide_k, wide_v = k.repeat_interleave(3, 1), v.repeat_interleave(3, 1)
    torch.testing.assert_close(attend(kind, q, k, v), attend(kind, q, wide_k, wide_v))
    for shape in [(2, 6, 9, 9), (2, 1, 9, 9), (6, 9, 9), (9, 9), (2, 1, 1, 9), (2, 6, 9, 1)]:
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.3
        torch.testing.assert_close(attend(kind, q, k, v, mask=mask), attend(kind, q, wide_k, wide_v, mask=mask))
        torch.testing.assert_close(
            attend(kind, q, k, v, mask=mask), by_definition(kind, q, wide_k, wide_v, mask.expand(2, 6, 9, 9))
        )


def test_the_rows_of_relu_softmax_are_shares_below_one_and_zero_without_a_positive_score():
    q, k, v = qkv(n=20)
    p = weights("relu_softmax", q, k, scale=0.5)
    sums = ((q @ k.mT) * 0.5).relu().sum(-1)
    torch.testing.assert_close(p.sum(-1), sums / (sums + EPS))
    assert (p >= 0).all()
    assert (p.sum(-1) < 1).all()
    q = -k.sum(2, keepdim=True) * 0 - torch.ones(2, 3, 1, 4, dtype=torch.float64)
    k = k.abs()  # every score is negative
    q.requires_grad_()
    out = attend("relu_softmax", q, k, v)
    assert torch.equal(out, torch.zeros_like(out))
    out.sum().backward()
    assert torch.isfinite(q.grad).all()


def test_scaling_attention_is_computed_in_the_order_that_takes_n_d_d_products():
    n, d, heads = 257, 16, 12
    tensors = torch.randn(3, 1, heads, n, d).unbind()
    assert count_cost(lambda: attend("scaling", *tensors)).macs == 2 * heads * n * d * d
    assert count_cost(lambda: attend("relu_softmax", *tensors)).macs == 2 * heads * n * n * d
    one_for_all = torch.arange(n) < 200  # the same keys for every query: no n^2 either
    assert count_cost(lambda: attend("scaling", *tensors, mask=one_for_all)).macs == 2 * heads * n * d * d
    short = torch.randn(3, 1, heads, 8, d).unbind()  # fewer tokens than d: the other order is less work
    assert count_cost(lambda: attend("scaling", *short)).macs == 2 * heads * 8 * 8 * d
    p = weights("scaling", *tensors[:2], scale=0.25)
    torch.testing.assert_close(attend("scaling", *tensors), p @ tensors[2], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("queries", "keys"), [(200, 200), (130, 150), (65, 400)])
def test_causal_scaling_attention_by_chunks_is_that_with_all_weights(queries, keys):
    q, k, v = qkv(heads=4, n=queries, keys=keys, kv_heads=2, dim=8)
    k, v = k.requires_grad_(), v.requires_grad_()
    out = attend("scaling", q, k, v, causal=True)
    p = weights("scaling", q, k.repeat_interleave(2, 1), scale=8**-0.5, causal=True)
    expected = p @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(out, expected)
    for ours, theirs in zip(
        torch.autograd.grad(out.square().sum(), (k, v)),
        torch.autograd.grad(expected.square().sum(), (k, v)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    half = attend("scaling", *(t.detach().bfloat16() for t in (q, k, v)), causal=True)
    assert half.dtype == torch.bfloat16
    assert float((half.double() - out).abs().max().detach()) < 0.03
    macs = count_cost(lambda: attend("scaling", q, k, v, causal=True)).macs
    assert macs < count_cost(lambda: attend("scaling", q, k, v, causal=True, mask=torch.ones(1).bool())).macs / 1.3


@KIND
def test_half_precision_and_gradients(kind):
    q, k, v = qkv(n=300, dim=16)
    exact = attend(kind, q, k, v)
    for dtype, far in ((torch.bfloat16, 0.03), (torch.float16, 0.005)):
        out = attend(kind, *(t.to(dtype) for t in (q, k, v)))
        assert out.dtype == dtype
        assert float((out.double() - exact).abs().max()) < far
    tensors = [t.requires_grad_() for t in qkv(batch=1, heads=1, n=5)]
    assert torch.autograd.gradcheck(lambda *t: attend(kind, *t), tensors)


def test_sums_of_half_precision_are_taken_in_float32():
    """10,000 equal weights add up to 10,000 in float32; bfloat16 would stop at 256."""
    q, k = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16), torch.ones(1, 1, 10_000, 1, dtype=torch.bfloat16)
    for kind in ("relu_softmax", "two_quad"):
        assert float(attend(kind, q, k, k).squeeze()) == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize("causal", [False, True])
def test_scaling_attention_in_float16_stays_in_its_range(causal):
    """Sums of thousands of products pass 65,504, and a share of thousands of keys falls below what float16 can tell."""
    for size in (0.02, 10.0):
        q, k, v = (size * (1 + 0.1 * t) for t in qkv(batch=1, heads=1, n=700, dim=32))
        exact = attend("scaling", q, k, v, causal=causal)
        out = attend("scaling", q.half(), k.half(), v.half(), causal=causal)
        assert out.dtype == torch.float16
        assert float(((out - exact) / exact.abs().mean()).abs().max()) < 0.02


def test_two_quad_with_the_shift_of_its_own_paper():
    q, k, v = qkv()
    torch.testing.assert_close(
        attend("two_quad", q, k, v, shift=5.0), by_definition("two_quad", q, k, v, everything(q, k), shift=5.0)
    )


def test_dropout_leaves_weights_out():
    q, k, v = qkv(n=64)
    torch.manual_seed(0)
    out = torch.stack([attend("scaling", q, k, v, dropout=0.5) for _ in range(100)]).mean(0)
    assert not torch.equal(out, attend("scaling", q, k, v))
    assert float((out - attend("scaling", q, k, v)).abs().max()) < 0.25


def test_what_attention_refuses():
    q, k, v = qkv()
    for wrong, error, named in [
        (lambda: attend("cosine", q, k, v), ValueError, "kind must be one of"),
        (lambda: attend("scaling", q[0], k, v), ValueError, "q must have 4 dimensions"),
        (lambda: attend("scaling", q, k[..., :3], v), ValueError, "k must have shape"),
        (lambda: attend("scaling", q, k, v[:, :, :5]), ValueError, "v must have shape"),
        (lambda: attend("scaling", q, k.float(), v), TypeError, "k must have the dtype of q"),
        (lambda: attend("scaling", q[:, :2], k, v), ValueError, "heads of q must be a multiple"),
        (lambda: attend("scaling", q, k, v, mask=torch.ones(9, 9)), TypeError, "mask must hold bools"),
        (lambda: attend("scaling", q, k, v, mask=torch.ones(9, 8).bool()), ValueError, "mask must broadcast"),
        (lambda: attend("scaling", q, k, v, dropout=1.0), ValueError, "dropout must be"),
        (lambda: attend("scaling", q, k, v, scale=float("nan")), ValueError, "scale must be"),
    ]:
        with pytest.raises(error, match=named):
            wrong()


# ----------------------------------------------------------------------------------------------------------------- transformers


def explicit(kind):
    """An attention function of transformers by the formulas, on the mask that "eager" gets."""

    def forward(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        groups = query.shape[1] // key.shape[1]
        k, v = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        seen = torch.ones(query.shape[0], 1, query.shape[2], k.shape[2], dtype=torch.bool)
        if attention_mask is not None:
            seen = attention_mask[..., : k.shape[2]] == 0
        a = torch.where(seen, query @ k.mT * scaling, 0.0)
        raw = {"relu_softmax": a.relu(), "two_quad": a**2, "scaling": a}[kind]
        total = seen.sum(-1, keepdim=True) if kind == "scaling" else raw.sum(-1, keepdim=True) + 1e-5
        return (raw / total.clamp(min=1e-9) @ v).transpose(1, 2), None

    return forward


@pytest.mark.parametrize("kind", ["relu_softmax", "scaling", "two_quad"])
def test_a_decoder_of_transformers_with_padding_and_cache(kind):
    from transformers.masking_utils import AttentionMaskInterface, eager_mask
    from transformers.modeling_utils import AttentionInterface

    assert kind in register()
    AttentionInterface.register("explicit", explicit(kind))
    AttentionMaskInterface.register("explicit", eager_mask)
    model = tiny_model()
    ids = token_ids(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    found = {}
    for name in ("explicit", kind):
        model.set_attn_implementation(name)
        with torch.no_grad():
            found[name] = [model(ids).logits, model(ids, attention_mask=mask).logits[:, 4:]]
    for ours, theirs in zip(found[kind], found["explicit"], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(model(ids[:1, 4:]).logits[0], found[kind][1][0], atol=1e-4, rtol=1e-4)
        later = ids.clone()
        later[:, 8:] = 5
        torch.testing.assert_close(model(later).logits[:, :8], found[kind][0][:, :8], atol=1e-4, rtol=1e-4)
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask}
    assert torch.equal(model.generate(ids, use_cache=True, **options), model.generate(ids, use_cache=False, **options))


@pytest.mark.parametrize("kind", ["relu_softmax", "scaling", "two_quad"])
def test_encoders_of_transformers(kind):
    """A padded text is as it is alone; images go without a mask, so that scaling attention takes n d^2 products."""
    from transformers import BertConfig, BertModel, ViTConfig, ViTModel

    register()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    text = BertModel(BertConfig(vocab_size=50, attn_implementation=kind, **sizes)).eval()
    ids = token_ids(2, 10, vocab=50)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    with torch.no_grad():
        padded = text(ids, attention_mask=mask).last_hidden_state
        alone = text(ids[1:, :7]).last_hidden_state
    torch.testing.assert_close(padded[1, :7], alone[0], atol=1e-5, rtol=1e-4)

    def vision(name):
        torch.manual_seed(0)
        config = ViTConfig(image_size=32, patch_size=4, attn_implementation=name, **sizes)
        return ViTModel(config, add_pooling_layer=False).eval()

    images, n, d = torch.randn(1, 3, 32, 32), 65, 8
    with torch.no_grad():
        saved = count_cost(vision("eager"), images).macs - count_cost(vision(kind), images).macs
    assert saved == (2 * 2 * 4 * (n * n * d - n * d * d) if kind == "scaling" else 0)


def test_a_model_that_adds_to_the_scores_is_refused():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    register()
    q, k, v = qkv(dtype=torch.float32)
    forward = ALL_ATTENTION_FUNCTIONS["scaling"]
    for name in ("softcap", "s_aux", "position_bias"):
        with pytest.raises(ValueError, match=f"{name} must be None"):
            forward(torch.nn.Module(), q, k, v, None, **{name: 1.0})
    bias = torch.randn(1, 1, 9, 9)
    with pytest.raises(ValueError, match="adds something else"):
        forward(torch.nn.Module(), q, k, v, bias)
    hidden = torch.zeros(1, 1, 9, 9).masked_fill(torch.arange(9) > 5, torch.finfo(torch.float32).min)
    out, _ = forward(torch.nn.Module(), q, k, v, hidden)
    torch.testing.assert_close(out.transpose(1, 2), attend("scaling", q, k[:, :, :6], v[:, :, :6]))


# ---------------------------------------------------------------------------------------------------------------------- search


def test_a_mixture_with_binary_alpha_is_the_dispatch_by_heads():
    q, k, v = qkv(heads=5, n=12)
    chosen = torch.tensor([True, False, False, True, False])
    mixture, hard = HeadMixture(5).double(), HeadMixture(5).double()
    with torch.no_grad():
        mixture.alpha.copy_(chosen)
    harden(hard, [chosen])
    torch.testing.assert_close(mixture(q, k, v), hard(q, k, v))
    relu, scaling = attend("relu_softmax", q, k, v), attend("scaling", q, k, v)
    torch.testing.assert_close(hard(q, k, v)[:, [0, 3]], relu[:, [0, 3]])
    torch.testing.assert_close(hard(q, k, v)[:, [1, 2, 4]], scaling[:, [1, 2, 4]])
    assert torch.equal(hard.alpha.detach(), chosen.double())
    assert not hard.alpha.requires_grad


def test_all_heads_of_one_kind_at_the_ends_and_no_work_for_the_other():
    q, k, v = qkv(heads=4, n=40, dim=8)
    for share, kind in ((1.0, "relu_softmax"), (0.0, "scaling")):
        layer = HeadMixture(4)
        harden(layer, select([layer.alpha], share))
        assert layer.kinds == (kind,) * 4
        torch.testing.assert_close(layer(q, k, v), attend(kind, q, k, v))
    half = HeadMixture(4, kinds=["scaling", "relu_softmax", "scaling", "scaling"])
    macs = count_cost(lambda: half(q[:1], k[:1], v[:1])).macs
    assert macs == 2 * 40 * 40 * 8 + 3 * 2 * 40 * 8 * 8
    mask = torch.rand(2, 4, 40, 40) > 0.5
    out = half(q, k, v, mask=mask)
    torch.testing.assert_close(out[:, 1], attend("relu_softmax", q, k, v, mask=mask)[:, 1])
    torch.testing.assert_close(out[:, 3], attend("scaling", q, k, v, mask=mask)[:, 3])
    torch.testing.assert_close(
        half(q, k, v, mask=mask[0]), half(q, k, v, mask=mask[:1])
    )  # one mask a head, without a batch


def test_alpha_learns_from_the_loss_and_stays_between_0_and_1():
    torch.manual_seed(0)
    model = MPCViT(**SMALL, attn_drop_rate=0.0, drop_path_rate=0.0)
    assert penalty(model).item() == 8.0
    (model(torch.randn(3, 3, 16, 16)).square().mean() + 0.1 * penalty(model)).backward()
    for mixture in mixtures(model):
        assert (mixture.alpha.grad != 0).all()
        with torch.no_grad():
            mixture.alpha += torch.tensor([0.5, -2.0, -0.5, 0.0])
    clamp(model)
    assert torch.equal(mixtures(model)[1].alpha.detach(), torch.tensor([1.0, 0.0, 0.5, 1.0]))


@pytest.mark.parametrize(("total", "share", "kept"), [
    (28, 0.1, 3), (28, 0.3, 9), (28, 0.5, 14), (28, 0.7, 20), (108, 0.1, 11), (108, 0.3, 33), (108, 0.5, 54),
    (108, 0.7, 76), (10, 0.9, 9), (10, 1.0, 10), (10, 0.0, 0), (3, 0.5, 2),
])  # fmt: skip
def test_how_many_heads_stay(total, share, kept):
    assert kept_count(total, share) == kept
    scores = torch.randperm(total, generator=torch.Generator().manual_seed(total)).float()
    chosen = select(scores.split([total // 3, total - total // 3]), share)
    assert sum(int(some.sum()) for some in chosen) == kept
    flat = torch.cat(chosen)
    if 0 < kept < total:
        assert scores[flat].min() > scores[~flat].max()


def test_layers_are_found_by_their_place_not_by_their_number_in_a_name():
    """Twelve layers: with names searched for "1", layer 1 would get what is meant for 10 and 11."""
    model = MPCViT(**{**SMALL, "depth": 12})
    chosen = [torch.tensor([layer in (1, 10), False, layer == 11, False]) for layer in range(12)]
    harden(model, chosen)
    for layer, block in enumerate(model.blocks):
        assert [kind == "relu_softmax" for kind in block.self_attn.mix.kinds] == chosen[layer].tolist()


def test_what_the_search_refuses_changes_nothing():
    model = MPCViT(**SMALL)
    with pytest.raises(ValueError, match="chosen must be given unless every alpha is 0 or 1"):
        with torch.no_grad():
            mixtures(model)[0].alpha[0] = 0.4
        harden(model)
    with pytest.raises(ValueError, match="one tensor a layer"):
        harden(model, [torch.ones(4).bool()])
    with pytest.raises(ValueError, match="chosen must have shape"):
        harden(model, [torch.ones(4).bool(), torch.ones(3).bool()])
    assert all(mixture.kinds is None for mixture in mixtures(model))
    with pytest.raises(ValueError, match="got NaN"):
        select([torch.tensor([0.1, float("nan")])], 0.5)
    with pytest.raises(ValueError, match="share must be"):
        select([torch.ones(4)], 1.1)
    with pytest.raises(ValueError, match="one kind a head"):
        HeadMixture(4, kinds=["scaling"] * 3)
    with pytest.raises(ValueError, match="heads that are searched"):
        penalty(MPCViT(**SMALL, attention="scaling"))
    with pytest.raises(ValueError, match="must have 4 heads"):
        HeadMixture(4)(*qkv(heads=3))


def test_the_distillation_loss_is_its_three_terms():
    torch.manual_seed(0)
    logits, tokens = torch.randn(4, 5, requires_grad=True), torch.randn(4, 17, 8, requires_grad=True)
    teacher_logits, teacher_tokens = torch.randn(4, 5, requires_grad=True), torch.randn(4, 17, 8, requires_grad=True)
    targets = torch.tensor([0, 3, 1, 1])
    soft = -(teacher_logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()
    near = ((tokens - teacher_tokens) ** 2).mean()
    hard = F.nll_loss(logits.log_softmax(1), targets)
    found = distillation_loss(logits, tokens, teacher_logits, teacher_tokens, targets, weight=0.7)
    torch.testing.assert_close(found, soft + 0.7 * near + hard)
    without = distillation_loss(logits, tokens, teacher_logits, teacher_tokens)
    torch.testing.assert_close(without, soft + near)
    mixed = F.one_hot(targets, 5).float()
    torch.testing.assert_close(distillation_loss(logits, tokens, teacher_logits, teacher_tokens, mixed), without + hard)
    found.backward()
    assert teacher_logits.grad is None
    assert teacher_tokens.grad is None
    with pytest.raises(ValueError, match="teacher_tokens must have shape"):
        distillation_loss(logits, tokens, teacher_logits, teacher_tokens[:, 1:])


# --------------------------------------------------------------------------------------------------------------------- MPCViT+


def test_beta_of_one_is_the_usual_mlp_and_hard_betas_are_the_soft_ones():
    torch.manual_seed(0)
    for relu_after in (False, True):
        mlp = TokenMlp(8, 16, tokens=6, relu_after=relu_after).double()
        x = torch.randn(2, 6, 8, dtype=torch.float64)
        torch.testing.assert_close(mlp(x), mlp.fc2(F.gelu(mlp.fc1(x))))
        chosen = torch.tensor([1, 0, 0, 1, 0, 1]).bool()
        with torch.no_grad():
            mlp.beta.copy_(chosen)
        soft = mlp(x)
        mlp.set_tokens(chosen)
        torch.testing.assert_close(mlp(x), soft)
        torch.testing.assert_close(FusedMlp(mlp)(x), soft)
        if relu_after:
            assert (soft[:, ~chosen] >= 0).all()
        else:
            torch.testing.assert_close(soft[:, ~chosen], mlp.fc2(mlp.fc1(x))[:, ~chosen])


def test_a_fused_network_equals_the_unfused_one_and_does_less():
    torch.manual_seed(0)
    model = MPCViT(**SMALL, linear_gelu=True).eval()
    harden(model, select([mixture.alpha for mixture in mixtures(model)], 0.5))
    betas = [torch.rand(17) for _ in token_mlps(model)]
    harden_tokens(model, select(betas, 0.3))
    x = torch.randn(1, 3, 16, 16)
    before, macs = model(x), count_cost(model, x).macs
    linear = sum(17 - len(mlp.gelu_tokens) for mlp in token_mlps(model))
    assert linear == 34 - kept_count(34, 0.3)
    assert fuse(model) == 2
    torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-4)
    assert macs - count_cost(model, x).macs == linear * (2 * 32 * 64 - 32 * 32)
    assert fuse(model) == 0


def test_without_a_token_to_fuse_and_without_one_that_stays():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16)
    for share, fused in ((1.0, 0), (0.0, 2)):
        model = MPCViT(**SMALL, linear_gelu=True, attention="scaling").eval()
        harden_tokens(model, select([torch.ones(17)] * 2, share))
        before = model(x)
        assert fuse(model) == fused
        torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-4)
    assert model.blocks[0].mlp.fc1 is None


def test_what_mpcvit_plus_refuses():
    model = MPCViT(**SMALL, linear_gelu=True)
    with pytest.raises(ValueError, match="chosen must have one tensor"):
        harden_tokens(model, [torch.ones(17).bool()])
    with pytest.raises(ValueError, match="x must have 17 tokens"):
        model(torch.zeros(1, 3, 24, 24))
    with pytest.raises(ValueError, match="mlp must be hard"):
        FusedMlp(model.blocks[0].mlp)
    with pytest.raises(ValueError, match="this MLP has no beta"):
        TokenMlp(4, 8).set_tokens(torch.ones(3).bool())
    with pytest.raises(ValueError, match="chosen must have one tensor"):
        harden_tokens(MPCViT(**SMALL), [])


# -------------------------------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize(
    ("name", "classes", "side", "params", "searched"),
    [("mpcvit_7_4_32", 10, 32, 3_716_902, 28), ("mpcvit_9_12_64", 200, 64, 2_766_068, 108)],
)
def test_the_published_networks(name, classes, side, params, searched):
    """3.72 M is what the compact transformers' authors state for ViT-Lite-7/4, which the first is, with 28 alphas."""
    with torch.device("meta"):
        model, x = build(name, num_classes=classes).eval(), torch.empty(1, 3, side, side)
        plain = build(name, num_classes=classes, attention="softmax").eval()
    assert sum(p.numel() for p in model.parameters()) == params
    assert sum(p.numel() for p in plain.parameters()) == params - searched
    assert sum(mixture.heads for mixture in mixtures(model)) == searched
    n, d, layers, dim = (
        1 + (side // 4) ** 2,
        model.num_features,
        len(model.blocks),
        model.num_features // model.blocks[0].self_attn.heads,
    )
    rest = (n - 1) * 48 * d + layers * n * 8 * d * d + d * classes
    assert count_cost(plain, x).macs == rest + layers * 2 * n * n * d
    for share, per_layer in ((1.0, 2 * n * n * d), (0.0, 2 * n * dim * d if n > dim else 2 * n * n * d)):
        with torch.device("meta"):
            model = build(name, num_classes=classes).eval()
        chosen = select([torch.ones(mixture.heads) for mixture in mixtures(model)], share)
        harden(model, chosen)
        assert count_cost(model, x).macs == rest + layers * per_layer


def official_state(model):
    """The same weights as the released code stores them."""
    found = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("patch_embed."):
            found[name.replace("patch_embed.", "tokenizer.conv_layers.0.0.")] = tensor
            continue
        name = name.replace(".mlp.fc1.", ".linear1.").replace(".mlp.fc2.", ".linear2.").replace(".mix.alpha", ".alpha")
        name = name.replace(".mlp.beta", ".beta")
        shape = {"alpha": (1, -1, 1, 1), "beta": (1, -1, 1)}.get(name.rsplit(".", 1)[-1])
        found["classifier." + name] = tensor.view(shape) if shape else tensor
    return found


def official_forward(state, x, *, depth, heads):
    """The released network from its own state dict, by the formulas, with binary alphas and betas."""
    get = lambda name: state[f"classifier.{name}"]  # noqa: E731
    x = F.conv2d(x, state["tokenizer.conv_layers.0.0.weight"], state["tokenizer.conv_layers.0.0.bias"], stride=4)
    x = torch.cat([get("class_emb").expand(len(x), -1, -1), x.flatten(2).mT], 1) + get("positional_emb")
    norm = lambda x, name: F.layer_norm(x, x.shape[-1:], get(f"{name}.weight"), get(f"{name}.bias"))  # noqa: E731
    for layer in range(depth):
        at = f"blocks.{layer}."
        b, n, c = x.shape
        qkv = (norm(x, at + "pre_norm") @ get(at + "self_attn.qkv.weight").T).reshape(b, n, 3, heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        a = (q @ k.mT) * (c // heads) ** -0.5
        relu = a.relu() / (a.relu().sum(-1, keepdim=True) + 1e-5)
        alpha = get(at + "self_attn.alpha")
        y = ((alpha * relu + (1 - alpha) * a / n) @ v).transpose(1, 2).reshape(b, n, c)
        x = x + F.linear(y, get(at + "self_attn.proj.weight"), get(at + "self_attn.proj.bias"))
        x = norm(x, at + "norm1")
        u = F.linear(x, get(at + "linear1.weight"), get(at + "linear1.bias"))
        beta = get(at + "beta")
        u = beta * F.gelu(u) + (1 - beta) * u
        x = x + F.linear(u, get(at + "linear2.weight"), get(at + "linear2.bias"))
    return F.linear(norm(x, "norm")[:, 0], get("fc.weight"), get("fc.bias"))


def test_weights_of_the_release_give_its_logits():
    torch.manual_seed(0)
    source = MPCViT(**SMALL, linear_gelu=True)
    with torch.no_grad():
        for p in source.parameters():
            p.normal_(std=0.3)
        for mixture in mixtures(source):
            mixture.alpha.copy_(torch.tensor([1.0, 0.0, 0.0, 1.0]))
        for mlp in token_mlps(source):
            mlp.beta.copy_(torch.arange(17) % 3 == 0)
    state = official_state(source)
    assert state["classifier.blocks.0.self_attn.alpha"].shape == (1, 4, 1, 1)
    assert state["classifier.blocks.1.beta"].shape == (1, 17, 1)
    model = build("mpcvit_7_4_32", **SMALL, linear_gelu=True).eval()
    assert load_weights(model, state) == "official"
    x = torch.randn(2, 3, 16, 16)
    expected = official_forward(state, x, depth=2, heads=4)
    torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)
    harden(model)
    harden_tokens(model, [mlp.beta.detach() == 1 for mlp in token_mlps(model)])
    fuse(model)
    torch.testing.assert_close(model(x), expected, atol=1e-3, rtol=1e-3)


def test_saved_and_loaded_after_hardening():
    torch.manual_seed(0)
    model, again = MPCViT(**SMALL).eval(), MPCViT(**SMALL).eval()
    harden(model, select([torch.rand(4) for _ in range(2)], 0.4))
    assert load_weights(again, model.state_dict()) == "assay"
    harden(again)
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(again(x), model(x))
    assert [mixture.kinds for mixture in mixtures(again)] == [mixture.kinds for mixture in mixtures(model)]


@KIND
def test_other_sizes_dtypes_layouts_and_single_images(kind):
    torch.manual_seed(0)
    model = MPCViT(**SMALL, attention=kind).eval()
    x = torch.randn(3, 3, 21, 30)  # not a multiple of the patch: what is left over is left out
    with torch.no_grad():
        out = model(x)
        torch.testing.assert_close(model(x[..., :20, :28]), out)
        torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), out, atol=1e-5, rtol=1e-4)
        for index in range(3):
            torch.testing.assert_close(model(x[index : index + 1]), out[index : index + 1], atol=1e-5, rtol=1e-4)
        half = model.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert float((half.float() - out).abs().max()) < 0.1


def test_features_classifier_and_training():
    torch.manual_seed(0)
    features = build("mpcvit_7_4_32", **{**SMALL, "num_classes": 7}, features_only=True).eval()
    (only,) = features(torch.randn(2, 3, 24, 16))
    assert only.shape == (2, 32, 6, 4)
    assert features.feature_info.reduction() == [4]
    model = MPCViT(**SMALL)
    x = torch.randn(2, 3, 16, 16)
    assert model.forward_features(x).shape == (2, 17, 32)
    assert not torch.equal(model(x), model(x))  # dropout and drop path
    harden(model, select([mixture.alpha for mixture in mixtures(model)], 0.5))
    model(x).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    assert model.get_classifier() is model.fc
    assert model.default_cfg["classifier"] == "fc"


def test_a_hard_network_is_exported():
    torch.manual_seed(0)
    model = MPCViT(**SMALL, linear_gelu=True).eval()
    harden(model, select([torch.rand(4) for _ in range(2)], 0.5))
    harden_tokens(model, select([torch.rand(17) for _ in range(2)], 0.5))
    fuse(model)
    x = torch.randn(2, 3, 16, 16)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))


def test_what_the_network_refuses():
    for changes, named in [
        ({"embed_dim": 30}, "embed_dim must be divisible by num_heads"),
        ({"input_size": 18}, "input_size must be divisible by patch_size"),
        ({"depth": 0}, "depth must be"),
        ({"attention": "cosine"}, "attention must be one of"),
        ({"attention": [["scaling"] * 4]}, "attention must name kinds for 2 layers"),
        ({"attention": [["scaling"] * 4, ["scaling"] * 3]}, "kinds must name one kind a head"),
        ({"drop_path_rate": 1.0}, "drop_path_rate must be"),
        ({"attn_drop_rate": -0.1}, "dropout must be"),
    ]:
        with pytest.raises(ValueError, match=named):
            MPCViT(**{**SMALL, **changes})
    model = MPCViT(**SMALL)
    with pytest.raises(ValueError, match="at least 4 pixels a side"):
        model(torch.zeros(1, 3, 3, 16))
    with pytest.raises(ValueError, match="x must have shape"):
        model(torch.zeros(1, 1, 16, 16))
    with pytest.raises(ValueError, match="these are no weights of this model"):
        load_weights(model, {})

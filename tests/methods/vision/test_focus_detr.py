"""Focus-DETR: the released algorithm written out in float64, the dense encoder as its degenerate setting, counts, targets, transformers."""

from __future__ import annotations

import copy
import math
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, ResNetConfig
from transformers.models.deformable_detr.modeling_deformable_detr import DeformableDetrEncoder

from assay.measure.cost import count_cost
from assay.methods.vision.focus_detr import (
    BETAS,
    WEIGHT,
    FocusEncoder,
    ForegroundPredictor,
    ForegroundScorer,
    apply_focus,
    encoder_macs,
    foreground_loss,
    foreground_targets,
    level_ranges,
    proposal_loss,
    remove_focus,
    token_budgets,
)

LAYERS = (1.0, 0.6, 0.2)
SIZE = (64, 96)  # 96 + 24 + 6 + 2 tokens
LABELS = [
    {"class_labels": torch.tensor([1, 2]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.5], [0.2, 0.3, 0.2, 0.2]])},
    {"class_labels": torch.tensor([0]), "boxes": torch.tensor([[0.6, 0.4, 0.3, 0.6]])},
]


def config(*, two_stage=False, layers=3, width=32):
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    return DeformableDetrConfig(
        use_timm_backbone=False, backbone_config=backbone, d_model=width, encoder_layers=layers, decoder_layers=2,
        encoder_ffn_dim=24, decoder_ffn_dim=24, encoder_attention_heads=4, decoder_attention_heads=4, num_queries=6,
        two_stage=two_stage, with_box_refine=two_stage, two_stage_num_proposals=6, num_labels=3,
    )  # fmt: skip


@cache
def made(**settings):
    torch.manual_seed(0)
    model = DeformableDetrForObjectDetection(config(**settings))
    return scrambled(model).eval()


def detector(**settings):
    model = copy.deepcopy(made(**settings))
    torch.manual_seed(0)  # of what is put into it
    return model


def scrambled(model):
    """All weights random: transformers starts sampling with zeros."""
    generator = torch.Generator().manual_seed(1)
    for value in model.parameters():
        nn.init.normal_(value.data, std=0.2, generator=generator)
    return model


def images(*size, batch=2):
    return torch.randn(batch, 3, *(size or SIZE), generator=torch.Generator().manual_seed(2))


def padded(size=SIZE):
    """A mask that shows all of the first image and a part of the second."""
    mask = torch.ones(2, *size, dtype=torch.long)
    mask[1, 40:] = 0
    mask[1, :, 64:] = 0
    return mask


def given(model, x, mask=None):
    """What the encoder of a detector is called with."""
    seen = {}
    hook = model.model.encoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    with torch.no_grad():
        model(x, pixel_mask=mask)
    hook.remove()
    return {name: value for name, value in seen.items() if not name.startswith("output_")}


def cast(kwargs, dtype=torch.float64):
    return {
        name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in kwargs.items()
    }


# ------------------------------------------------------------------------------------------------------- the released algorithm


def bilinear(grid, height, width):
    """Corners on corners, written out: grid (h, w) to (height, width)."""
    h, w = grid.shape
    found = torch.zeros(height, width, dtype=grid.dtype)
    for i in range(height):
        for j in range(width):
            y = i * (h - 1) / (height - 1) if height > 1 else 0.0
            x = j * (w - 1) / (width - 1) if width > 1 else 0.0
            top, left = min(int(y), h - 1), min(int(x), w - 1)
            below, right = min(top + 1, h - 1), min(left + 1, w - 1)
            a, b = y - top, x - left
            found[i, j] = (1 - a) * ((1 - b) * grid[top, left] + b * grid[top, right]) + a * (
                (1 - b) * grid[below, left] + b * grid[below, right]
            )
    return found


def predicted(predictor, tokens, real):
    """MP of the tokens of one level of one image; the mean is over `real` ones."""
    hidden = predictor.layer1(tokens)
    own, shared = hidden[:, : hidden.shape[1] // 2], hidden[:, hidden.shape[1] // 2 :]
    mean = shared[real].mean(0) if real.any() else torch.zeros_like(shared[0])
    return predictor.layer2(torch.cat([own, mean.expand_as(shared)], 1))[:, 0]


def scores_of(encoder, embed, memory, shapes, real):
    """Coarse to fine for one image."""
    masks, at = [], 0
    for height, width in shapes:
        here = real[at : at + height * width].view(height, width)
        rows, columns = int(here[:, 0].sum()), int(here[0].sum())
        inside = torch.zeros(height, width, dtype=torch.bool)
        for i in range(height):
            for j in range(width):
                centre = ((i + 0.5) / max(rows, 1e-9), (j + 0.5) / max(columns, 1e-9))
                inside[i, j] = here[i, j] and all(0.01 < each < 0.99 for each in centre)
        masks.append(inside.flatten())
        at += height * width
    tokens = embed(memory * torch.cat(masks)[:, None])
    levels = list(tokens.split([height * width for height, width in shapes]))
    reals = real.split([height * width for height, width in shapes])
    whole = encoder.variant == "as_released"
    found = [None] * len(levels)
    for level in range(len(levels) - 1, -1, -1):
        tokens = levels[level]
        if level + 1 < len(levels):
            up = bilinear(found[level + 1].view(shapes[level + 1]), *shapes[level]).flatten()
            tokens = tokens + encoder.scorer.alpha[len(levels) - 2 - level] * tokens * up[:, None]
        found[level] = predicted(
            encoder.scorer.predictor, tokens, torch.ones_like(reals[level]) if whole else reals[level]
        )
    return torch.cat(found)


def attended(block, tokens, positions):
    """Multi-head self-attention of (k, width), residual and norm."""
    heads, width = block.attn.num_heads, tokens.shape[1]
    q, k, v = (
        (each @ weight.T + bias).view(-1, heads, width // heads)
        for each, weight, bias in zip(
            (tokens + positions, tokens + positions, tokens),
            block.attn.in_proj_weight.split(width),
            block.attn.in_proj_bias.split(width),
            strict=True,
        )
    )
    weights = torch.einsum("qhd,khd->hqk", q, k).div(math.sqrt(width // heads)).softmax(-1)
    return block.norm(tokens + block.attn.out_proj(torch.einsum("hqk,khd->qhd", weights, v).flatten(1)))


def reference(encoder, kwargs, embed, class_head=None):
    """The encoder image by image, layer by layer, gathering from the whole map and putting back; float64."""
    x, positions = kwargs["inputs_embeds"], kwargs["spatial_position_embeddings"]
    mask, shapes = kwargs["attention_mask"], kwargs["spatial_shapes_list"]
    points = DeformableDetrEncoder.get_reference_points(tuple(shapes), kwargs["valid_ratios"], x.device)
    first = [min(int(encoder.rho * n) + 1, n) for n in mask.sum(1).tolist()]
    every = [scores_of(encoder, embed, x[i] + positions[i], shapes, mask[i]) for i in range(len(x))]
    smallest = torch.stack(every).min()
    out = []
    for image in range(len(x)):
        score = every[image].masked_fill(~mask[image], smallest)
        order = score.masked_fill(~mask[image], -torch.inf).argsort(descending=True, stable=True)
        full = x[image].clone()
        for index, (layer, beta) in enumerate(zip(encoder.layers, encoder.betas, strict=True)):
            count = (
                int(beta * max(first) + 1e-6) if encoder.variant == "as_released" else int(beta * first[image] + 1e-6)
            )
            some = order[:count]
            tokens = full[some]
            if encoder.topk:
                rank = score[some]
                if class_head is not None:
                    best = class_head(tokens).amax(1)
                    rank = best * rank if encoder.variant == "as_released" else best.sigmoid() * rank.sigmoid()
                top = rank.argsort(descending=True, stable=True)[: encoder.topk]
                tokens[top] = attended(encoder.objects[index], tokens[top], positions[image][some[top]])
            one = slice(image, image + 1)
            found, _ = layer.self_attn(
                hidden_states=tokens[None], attention_mask=mask[one], encoder_hidden_states=x[one],
                position_embeddings=positions[image][some][None], reference_points=points[one][:, some],
                spatial_shapes=kwargs["spatial_shapes"], spatial_shapes_list=shapes,
                level_start_index=kwargs["level_start_index"],
            )  # fmt: skip
            tokens = layer.self_attn_layer_norm(tokens + found[0])
            tokens = layer.final_layer_norm(tokens + layer.mlp(tokens))
            real = some[: first[image]]
            full[real] = tokens[: len(real)]
        out.append(full)
    return torch.stack(out)


@pytest.mark.parametrize(("two_stage", "topk"), [(False, 0), (False, 300), (True, 10)])
def test_it_is_the_written_out_algorithm(two_stage, topk):
    model = detector(two_stage=two_stage)
    apply_focus(model, 0.5, LAYERS, topk)
    scrambled(model).double()
    encoder, body = model.model.encoder, model.model
    kwargs = cast(given(model.float(), images(), padded()))
    model.double()
    embed = nn.Sequential(body.enc_output, body.enc_output_norm) if two_stage else encoder.embed
    head = body.decoder.class_embed[-1] if two_stage else None
    with torch.no_grad():
        found = encoder(**kwargs).last_hidden_state
        expected = reference(encoder, kwargs, embed, head)
    assert torch.allclose(found, expected, atol=1e-9)
    assert encoder.focused.kept[0][0] > encoder.focused.kept[0][1]  # the padded image keeps fewer


@pytest.mark.parametrize("padding", [False, True])
def test_as_released_it_is_the_released_algorithm(padding):
    model = detector(two_stage=True)
    apply_focus(model, 0.5, LAYERS, 30 if padding else 10, variant="as_released")
    scrambled(model)
    encoder, body = model.model.encoder, model.model
    kwargs = cast(given(model, images(), padded() if padding else None))
    model.double()
    with torch.no_grad():
        found = encoder(**kwargs).last_hidden_state
        embed = nn.Sequential(body.enc_output, body.enc_output_norm)
        expected = reference(encoder, kwargs, embed, body.decoder.class_embed[-1])
    assert torch.allclose(found, expected, atol=1e-9)


# ------------------------------------------------------------------------------------------------------- the dense encoder in it


def test_with_all_tokens_kept_it_is_the_dense_encoder_with_frozen_values():
    model = detector()
    kwargs, dense = given(model, images()), model.model.encoder
    encoder = FocusEncoder(dense, 1.0, (1, 1, 1), 0).eval()
    values = tokens = kwargs["inputs_embeds"]
    points = dense.get_reference_points(tuple(kwargs["spatial_shapes_list"]), kwargs["valid_ratios"], values.device)
    with torch.no_grad():
        found = encoder(**kwargs).last_hidden_state
        for layer in dense.layers:
            mixed, _ = layer.self_attn(
                tokens, kwargs["attention_mask"], values, position_embeddings=kwargs["spatial_position_embeddings"],
                reference_points=points, spatial_shapes=kwargs["spatial_shapes"],
                spatial_shapes_list=kwargs["spatial_shapes_list"], level_start_index=kwargs["level_start_index"],
            )  # fmt: skip
            tokens = layer.self_attn_layer_norm(tokens + mixed)
            tokens = layer.final_layer_norm(tokens + layer.mlp(tokens))
        assert torch.equal(found, tokens)
        assert not torch.allclose(found, dense(**kwargs).last_hidden_state, atol=1e-2)  # that one refreshes its values


def test_with_one_layer_and_all_tokens_kept_it_is_transformers_encoder():
    model = detector(layers=1)
    before = model(images(), pixel_mask=None).logits
    apply_focus(model, 1.0, (1.0,), 0)
    assert torch.equal(model(images()).logits, before)


def test_sets_are_nested_and_what_is_never_kept_stays_bit_for_bit():
    model = apply_focus(detector(), 0.5, LAYERS, 10)
    kwargs = given(model, images(), padded())
    encoder = model.model.encoder
    with torch.no_grad():
        states = encoder(**kwargs, output_hidden_states=True).hidden_states
    changed = [(after != before).any(2) for before, after in zip(states, states[1:], strict=False)]
    for index, mask in enumerate(changed):
        assert mask.sum(1).tolist() == encoder.focused.kept[index]
        assert not index or not (mask & ~changed[index - 1]).any()
    best = torch.zeros_like(changed[0])
    for image, (score, real) in enumerate(zip(encoder.focused.scores, kwargs["attention_mask"], strict=True)):
        best[image, score.masked_fill(~real, -torch.inf).topk(encoder.focused.kept[0][image]).indices] = True
    assert torch.equal(changed[0], best)
    assert torch.equal(states[-1][~changed[0]], kwargs["inputs_embeds"][~changed[0]])


@pytest.mark.parametrize("topk", [0, 7])
def test_the_order_of_kept_tokens_does_not_matter(topk):
    model = scrambled(apply_focus(detector(), 0.5, LAYERS, topk))
    kwargs, encoder = cast(given(model, images())), model.double().model.encoder
    tokens, positions = kwargs["inputs_embeds"][:, :40], kwargs["spatial_position_embeddings"][:, :40]
    points = encoder._model_owns[0].get_reference_points(kwargs["spatial_shapes_list"], kwargs["valid_ratios"], "cpu")
    rank, order = torch.randn(2, 40), torch.randperm(40)
    place = {
        name: kwargs[name] for name in ("attention_mask", "spatial_shapes", "spatial_shapes_list", "level_start_index")
    }
    place |= {"encoder_hidden_states": kwargs["inputs_embeds"]}
    with torch.no_grad():
        straight = encoder._layer(0, tokens, [positions, points[:, :40], rank], None, place)
        mixed = encoder._layer(
            0, tokens[:, order], [positions[:, order], points[:, order], rank[:, order]], None, place
        )
    assert torch.allclose(mixed, straight[:, order], atol=1e-10)


# ------------------------------------------------------------------------------------------------------------------ what it costs


def test_budgets_are_the_released_ones():
    assert token_budgets([22_223], 0.5, BETAS) == [[11_112], [8_889], [6_667], [6_667], [4_444], [2_222]]
    assert sum(map(sum, token_budgets([100_000], 0.5, BETAS))) / 6e5 == pytest.approx(0.3, abs=1e-4)
    assert token_budgets([100, 10], 0.5, (1.0, 0.5)) == [[51, 6], [25, 3]]
    assert token_budgets([100, 10], 0.5, (1.0, 0.5, 0.1), variant="as_released") == [[51, 6], [25, 6], [5, 5]]
    assert token_budgets([3], 1.0, (1.0, 0.2)) == [[3], [1]]
    # float32, as torch multiplies there: 0.6 * 5 is 3, whatever 0.6 is exactly
    assert token_budgets([8], 0.5, (0.6,)) == [[int(torch.tensor(0.6) * 5)]]


def test_work_of_the_published_size():
    tokens = sum(h * w for h, w in ((100, 167), (50, 84), (25, 42), (13, 21)))
    assert tokens == 22_223
    dense = encoder_macs(tokens, [tokens] * 6)
    assert sum(dense.values()) == 6 * tokens * (1_212_416 + 65_536)
    kept = [count for (count,) in token_budgets([tokens], 0.5, BETAS)]
    sparse = encoder_macs(tokens, kept, objects=300)
    assert (sparse["queries"] + sparse["values"]) / 1e9 == pytest.approx(57.2, abs=0.05)
    assert sparse["objects"] / 1e9 == pytest.approx(0.75, abs=0.005)


@pytest.mark.parametrize(("two_stage", "topk"), [(False, 0), (True, 10)])
def test_work_is_what_is_counted(two_stage, topk):
    model = detector(two_stage=two_stage)
    kwargs = given(model, images(batch=1))
    shape = {"width": 32, "ffn": 24, "heads": 4, "levels": 4, "points": 4}
    dense = sum(encoder_macs(128, [128] * 3, **shape).values())
    assert count_cost(model.model.encoder, **kwargs).macs == dense
    encoder = apply_focus(model, 0.5, LAYERS, topk).model.encoder
    found = count_cost(encoder, **kwargs)
    kept = [count for (count,) in encoder.focused.kept]
    parts = encoder_macs(128, kept, **shape, objects=topk, classes=3 if two_stage else 0, scored=True)
    assert found.macs == sum(parts.values())
    assert not found.uncounted


def test_parameters_of_the_published_size():
    settings = DeformableDetrConfig(
        use_timm_backbone=False, backbone_config=ResNetConfig(), encoder_ffn_dim=2048, num_feature_levels=4
    )
    with torch.device("meta"):
        dense = DeformableDetrEncoder(settings)
        encoder = FocusEncoder(dense, embed=nn.Identity())
    counts = [sum(value.numel() for value in each.parameters()) for each in (dense, encoder, encoder.scorer)]
    assert counts[0] == 6 * (65_792 + 32_896 + 2 * 65_792 + 2 * 512 + 2 * 256 * 2048 + 2048 + 256)
    assert counts[2] == 107_521 + 3
    assert counts[1] - counts[0] == 107_524 + 6 * 263_680


# -------------------------------------------------------------------------------------------------------------- score and targets


def test_the_coarser_level_modulates_the_finer_one():
    torch.manual_seed(0)
    scorer, shapes = ForegroundScorer(32, levels=2), [(3, 4), (2, 2)]
    tokens = torch.randn(1, 16, 32)
    moved = tokens.clone()
    moved[:, 12:] += torch.randn(1, 4, 32)
    with torch.no_grad():
        for value in scorer.parameters():
            nn.init.normal_(value, std=0.5)
        assert not torch.equal(scorer(moved, shapes)[:, :12], scorer(tokens, shapes)[:, :12])
        scorer.alpha.zero_()
        plain = scorer(tokens, shapes)
        assert torch.equal(scorer(moved, shapes)[:, :12], plain[:, :12])
        assert torch.equal(plain[:, :12], scorer.predictor(tokens[:, :12]))
    assert scorer.alpha.shape == (1,)
    assert ForegroundScorer(8, levels=4).alpha.abs().max() <= 0.3


def test_half_of_the_predictor_sees_only_the_mean_of_the_level():
    torch.manual_seed(0)
    predictor, tokens = ForegroundPredictor(8), torch.randn(1, 6, 8)
    valid = torch.tensor([[True] * 4 + [False] * 2])
    with torch.no_grad():
        found = predictor(tokens, valid)
        assert torch.allclose(found[:, :4], predictor(tokens[:, :4]), atol=1e-6)
        order = torch.randperm(6)
        assert torch.allclose(predictor(tokens[:, order]), predictor(tokens)[:, order], atol=1e-6)
        assert not torch.allclose(predictor(tokens)[:, :4], found[:, :4])


def test_ranges_of_levels():
    assert level_ranges([8, 16, 32, 64], "as_released") == [(-1, 64), (64, 128), (128, 256), (256, math.inf)]
    paper = level_ranges([8, 16, 32, 64])
    for (_, end), (begin, _), (start, _) in zip(paper, paper[1:], paper, strict=False):
        assert begin == (max(start, 0) + end) / 2
    assert level_ranges([32]) == [(-1, math.inf)]


@pytest.mark.parametrize("variant", ["paper", "as_released"])
def test_targets_are_the_smallest_box_of_the_levels_size(variant):
    generator = torch.Generator().manual_seed(0)
    corner, extent = torch.rand(12, 2, generator=generator) * 200, torch.rand(12, 2, generator=generator) * 220 + 4
    boxes, strides = torch.cat([corner, corner + extent], 1), [8, 16, 32, 64]
    shapes = [(256 // stride, 320 // stride) for stride in strides]
    found = foreground_targets(boxes, shapes, strides, variant=variant)
    expected = []
    for (height, width), stride, (low, high) in zip(shapes, strides, level_ranges(strides, variant), strict=True):
        for i in range(height):
            for j in range(width):
                x, y = j * stride + stride // 2, i * stride + stride // 2
                fits = []
                for at, (left, top, right, bottom) in enumerate(boxes.tolist()):
                    sides = (x - left, y - top, right - x, bottom - y)
                    if min(sides) > 0 and low < max(sides) <= high:
                        fits.append(((right - left) * (bottom - top), at))
                expected.append(min(fits)[1] if fits else -1)
    assert found.tolist() == expected
    assert len(set(expected)) > 4
    assert foreground_targets(boxes[:0], shapes, strides).tolist() == [-1] * len(expected)


def test_a_wide_box_is_foreground_of_the_fine_level_near_its_centre_only():
    centre = torch.tensor([20 * 8 + 4, 10 * 8 + 4])
    box = torch.cat([centre - torch.tensor([50, 20]), centre + torch.tensor([50, 20])]).float()[None]
    fine = foreground_targets(box, [(40, 40), (20, 20)], [8, 16], variant="as_released")[:1600].view(40, 40) >= 0
    rows, columns = fine.nonzero().T
    assert (rows.min(), rows.max()) == (8, 12)
    assert (columns.min(), columns.max()) == (19, 21)  # 50 + 8 pixels to the farther side, not 50 + 16


def test_the_loss_is_focal_over_the_foreground_of_each_image():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 5, generator=generator) * 3
    targets = torch.tensor([[True, False, True, False, False], [False] * 5])
    valid = torch.tensor([[True, True, True, True, False], [True] * 5])
    total = 0.0
    for image in range(2):
        each = 0.0
        for score, target, real in zip(
            scores[image].tolist(), targets[image].tolist(), valid[image].tolist(), strict=True
        ):
            p = 1 / (1 + math.exp(-score if target else score))
            each -= real * (0.25 if target else 0.75) * (1 - p) ** 2 * math.log(p)
        total += each / max(int(targets[image].sum()), 1) / 2
    assert foreground_loss(scores, targets, valid=valid).item() == pytest.approx(total, rel=1e-5)
    assert foreground_loss(torch.tensor([[-200.0]]), torch.tensor([[True]])).item() == pytest.approx(50)
    assert foreground_loss(scores.bfloat16(), targets).dtype == torch.float32


def test_training_raises_the_score_of_foreground():
    torch.manual_seed(0)
    scorer, shapes = ForegroundScorer(32, levels=2), [(6, 6), (3, 3)]
    tokens = torch.randn(4, 45, 32)
    targets = tokens[..., 0] > 0.8
    optimizer = torch.optim.Adam(scorer.parameters(), 1e-2)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = foreground_loss(scorer(tokens, shapes), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    scores = scorer(tokens, shapes)
    assert scores[targets].mean() > scores[~targets].mean() + 2


# ----------------------------------------------------------------------------------------------------------------- in transformers


def test_two_very_negative_logits_do_not_rank_high():
    model = apply_focus(detector(two_stage=True), 0.5, LAYERS, 10)
    encoder, tokens = model.model.encoder, torch.randn(1, 4, 32)
    foreground = torch.tensor([[-9.0, -1.0, 1.0, 3.0]])
    head = model.model.decoder.class_embed[-1]
    nn.init.zeros_(head.weight)
    nn.init.constant_(head.bias, -5.0)
    assert encoder._object_rank(tokens, foreground).argmax() == 3
    encoder.variant = "as_released"
    assert encoder._object_rank(tokens, foreground).argmax() == 0


def test_an_image_does_not_depend_on_those_beside_it():
    model, x, mask = detector(two_stage=True), images(), padded()
    apply_focus(model, 0.5, LAYERS, 10)
    scrambled(model).eval()
    with torch.no_grad():
        both = model(x, pixel_mask=mask)
        alone = [model(x[i : i + 1], pixel_mask=mask[i : i + 1]) for i in range(2)]
    for name in ("encoder_last_hidden_state", "logits", "pred_boxes"):
        assert torch.allclose(getattr(both, name), torch.cat([getattr(each, name) for each in alone]), atol=1e-3)


def test_removed_again_nothing_is_left():
    model = detector()
    before, names, loss = model(images()).logits, list(model.state_dict()), model.loss_function
    assert apply_focus(model, 0.5, LAYERS, 10) is model
    added = [name for name in model.state_dict() if name not in names]
    assert added
    assert all(name.split(".")[2] in ("embed", "scorer", "objects") for name in added)
    assert not torch.allclose(model(images()).logits, before)
    assert remove_focus(model) is model
    assert torch.equal(model(images()).logits, before)
    assert list(model.state_dict()) == names
    assert model.loss_function is loss
    assert "_loss_function" not in vars(model)
    model.loss_function = custom = lambda *args, **kwargs: (torch.zeros(()), {}, None)
    remove_focus(apply_focus(model, 0.5, LAYERS))
    assert model.loss_function is custom


def test_the_loss_gets_the_term_of_the_score():
    model, x = detector(), images()
    apply_focus(model, 0.5, LAYERS, 10)
    found = model(x, labels=LABELS)
    detection, parts, _ = model.loss_function.detector(
        found.logits, LABELS, x.device, found.pred_boxes, model.config, found.logits[None], found.pred_boxes[None]
    )
    boxes = [torch.tensor([[28.8, 16, 67.2, 48], [9.6, 12.8, 28.8, 25.6]]), torch.tensor([[43.2, 6.4, 72, 44.8]])]
    shapes = [(8, 12), (4, 6), (2, 3), (1, 2)]
    targets = torch.stack([foreground_targets(each, shapes, [8, 16, 32, 64]) >= 0 for each in boxes])
    assert targets.any(1).all()
    extra = foreground_loss(model.model.encoder.focused.scores, targets)
    assert found.loss_dict["loss_foreground"].item() == pytest.approx(extra.item())
    assert found.loss.item() == pytest.approx((detection + WEIGHT * extra).item(), rel=1e-5)
    assert set(parts) | {"loss_foreground"} == set(found.loss_dict)
    sized = [{**label, "size": torch.tensor(SIZE)} for label in LABELS]
    assert model(x, labels=sized).loss.item() == pytest.approx(found.loss.item())
    mask = padded()
    small = model(x, pixel_mask=mask, labels=LABELS).loss_dict["loss_foreground"].item()
    sized[1]["size"] = torch.tensor([40, 64])
    assert model(x, pixel_mask=mask, labels=sized).loss_dict["loss_foreground"].item() == pytest.approx(small)


def test_only_its_own_loss_trains_the_score():
    model = apply_focus(detector(), 0.5, LAYERS, 10).train()
    found = model(images(), labels=LABELS)
    (found.loss - WEIGHT * found.loss_dict["loss_foreground"]).backward(retain_graph=True)
    encoder = model.model.encoder
    assert all(value.grad is None or not value.grad.any() for value in encoder.scorer.parameters())
    assert all(value.grad is not None and bool(value.grad.any()) for value in encoder.objects.parameters())
    found.loss_dict["loss_foreground"].backward()
    for name, value in encoder.scorer.named_parameters():
        assert value.grad is not None, name
        assert value.grad.any(), name


def test_proposals_of_two_stages_are_trained_by_their_own_loss():
    model = apply_focus(detector(two_stage=True), 0.5, LAYERS, 10).train()
    found, head = model(images(), labels=LABELS), model.model.decoder.class_embed[-1]
    found.loss.backward(retain_graph=True)
    assert head.weight.grad is None or not head.weight.grad.any()
    loss = proposal_loss(found, LABELS, model.config)
    loss.backward()
    assert loss.isfinite()
    assert head.weight.grad.any()
    assert all(value.grad.isfinite().all() for value in model.parameters() if value.grad is not None)
    with pytest.raises(ValueError, match="output must be that of a two-stage model"):
        proposal_loss(apply_focus(detector(), 0.5, LAYERS)(images()), LABELS, model.config)


def test_a_step_of_training_then_copied_saved_and_loaded():
    model = apply_focus(detector(two_stage=True), 0.5, LAYERS, 10).train()
    found = model(images(), labels=LABELS)
    (found.loss + proposal_loss(found, LABELS, model.config)).backward()
    twin = copy.deepcopy(model)  # while scores with a gradient are kept
    assert twin.loss_function.encoder is twin.model.encoder
    assert twin.model.encoder._model_owns[2] is twin.model.decoder.class_embed[-1]
    torch.optim.SGD(model.parameters(), 0.01).step()
    model.eval()
    again = apply_focus(detector(two_stage=True), 0.5, LAYERS, 10).eval()
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(again(images()).logits, model(images()).logits)
        assert not torch.equal(twin.eval()(images()).logits, model(images()).logits)


def test_half_precision_odd_sizes_and_hidden_states():
    model = apply_focus(detector(), 0.5, LAYERS, 10)
    with torch.no_grad():
        states = model(images(75, 101), output_hidden_states=True).encoder_hidden_states
        assert len(states) == 4
        assert torch.equal(states[-1], model(images(75, 101)).encoder_last_hidden_state)
        kwargs, encoder = given(model, images()), model.model.encoder
        encoder.bfloat16()
        found = encoder(**cast(kwargs, torch.bfloat16)).last_hidden_state
        assert found.dtype == torch.bfloat16
        assert found.isfinite().all()
        encoder.rho, encoder.betas, encoder.topk = 1.0, (1, 1, 1), 0  # where rounding changes no choice
        found = encoder(**cast(kwargs, torch.bfloat16)).last_hidden_state
        expected = encoder.float()(**kwargs).last_hidden_state
    assert (found.float() - expected).abs().max() < 0.1 * expected.abs().max()
    with pytest.raises(ValueError, match="output_attentions must be False"):
        model(images(), output_attentions=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rho": 0.0}, "rho must be a finite number above 0 and at most 1, got 0.0"),
        ({"betas": (1.0, 0.5)}, r"betas must have one entry a layer \(3\), got \(1.0, 0.5\)"),
        ({"betas": (1.0, 0.5, 1.5)}, "betas must be a finite number above 0 and at most 1, got 1.5"),
        ({"topk": -1}, "topk must be a whole number at least 0, got -1"),
        ({"variant": "released"}, "variant must be one of 'paper', 'as_released', got 'released'"),
        ({"strides": (8, 16)}, r"strides must have one entry a level \(4\), got \(8, 16\)"),
    ],
)
def test_bad_settings_are_named_and_change_nothing(settings, message):
    model = detector()
    encoder = model.model.encoder
    with pytest.raises(ValueError, match=message):
        apply_focus(model, **{"betas": LAYERS, **settings})
    assert model.model.encoder is encoder


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="model must have a FocusEncoder, got DeformableDetrEncoder"):
        remove_focus(detector())
    with pytest.raises(ValueError, match="call remove_focus first"):
        apply_focus(apply_focus(detector(), 0.5, LAYERS), 0.5, LAYERS)
    with pytest.raises(ValueError, match="encoder must be one of Deformable DETR, got Linear"):
        FocusEncoder(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="width must be divisible by 4, got 6"):
        ForegroundPredictor(6)
    with pytest.raises(ValueError, match="shapes must be 2 levels of 5 tokens in all"):
        ForegroundScorer(8, levels=2)(torch.zeros(1, 5, 8), [(2, 2), (1, 2)])
    with pytest.raises(ValueError, match=r"strides must have one entry a level \(1\)"):
        foreground_targets(torch.zeros(0, 4), [(2, 2)], [8, 16])


def test_the_base_model_takes_it_too():
    model = detector().model
    apply_focus(model, 0.5, LAYERS, 10)
    assert isinstance(model.encoder, FocusEncoder)
    assert model(images()).encoder_last_hidden_state.shape == (2, 128, 32)
    assert (
        F.mse_loss(remove_focus(model)(images()).last_hidden_state, detector().model(images()).last_hidden_state) == 0
    )

"""MobileSAMv2: equal to transformers' decoder and pipeline, batches that do not matter, saved work, proposers, and bad input."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import (
    SamConfig,
    SamMaskDecoderConfig,
    SamModel,
    SamProcessor,
    SamPromptEncoderConfig,
    SamVisionConfig,
    pipeline,
)
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

from assay.measure.cost import count_cost
from assay.methods.vision.mobilesamv2 import (
    DetectorBoxes,
    GradientBoxes,
    PointGrid,
    SegmentEverything,
    box_tokens,
    components,
    decode,
    image_products,
    point_tokens,
    snap_boxes,
)
from assay.methods.vision.mobilesamv2.pipeline import MaskGeneration
from assay.workloads.digit_scenes import digit_scenes

SIDE, WIDTH = 64, 16
SHARE = pytest.mark.parametrize("share", [True, False])
LOOSE = {"side": 4, "iou": -1e9, "stability": 0.0, "offset": 0.2, "overlap": 1.0}


def small_config(heads=2):
    """With 2 heads of 7 tokens the image is projected (8 channels inside), with 1 head the tokens are."""
    return SamConfig(
        vision_config=SamVisionConfig(
            hidden_size=8, output_channels=WIDTH, num_hidden_layers=1, num_attention_heads=2, image_size=SIDE, patch_size=8,
            global_attn_indexes=[0], num_pos_feats=WIDTH // 2, mlp_dim=8,
        ),
        prompt_encoder_config=SamPromptEncoderConfig(hidden_size=WIDTH, image_size=SIDE, patch_size=8),
        mask_decoder_config=SamMaskDecoderConfig(hidden_size=WIDTH, mlp_dim=32, num_attention_heads=heads, iou_head_hidden_dim=16),
    )  # fmt: skip


def small_sam(attention="sdpa", seed=0, heads=2):
    """With weights that make masks of about half of the pixels."""
    torch.manual_seed(seed)
    config = small_config(heads)
    config._attn_implementation = attention
    sam = SamModel(config).eval()
    for name, value in sam.named_parameters():
        if "norm" not in name:
            nn.init.normal_(value, std=1.0 if "positional" in name else 0.25)
    nn.init.constant_(
        sam.mask_decoder.iou_prediction_head.proj_out.bias, 2.0
    )  # the pipeline filters by thresholds above 0
    return sam


def filtering(sam):
    """A grid each of whose filters takes some of the masks of `picture`."""
    found = SegmentEverything(sam, PointGrid(**LOOSE)).find(picture())
    assert len(found.masks) > 6
    return PointGrid(4, float(found.scores.quantile(0.3)), float(found.stabilities.quantile(0.3)), 0.2, 0.6)


def picture(height=48, width=SIDE, seed=0):
    return torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(seed)) / 255


def as_image(tensor):
    return Image.fromarray((255 * tensor).round().byte().permute(1, 2, 0).numpy())


def some_boxes(n, height=48, width=SIDE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(n, 2, generator=generator) * 0.6
    sizes = 0.1 + 0.3 * torch.rand(n, 2, generator=generator)
    return torch.cat([corners, corners + sizes], 1) * torch.tensor([width, height] * 2)


def processor():
    return SamImageProcessorPil(size={"longest_edge": SIDE}, pad_size={"height": SIDE, "width": SIDE})


def embedding_of(sam, seed=0):
    return torch.randn(1, WIDTH, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=sam.dtype)


@pytest.fixture(scope="module", params=[1, 2], ids=["over", "projected"])
def sam(request):
    return small_sam(heads=request.param)


@pytest.fixture(scope="module")
def full_size():
    with torch.device("meta"):
        return SamModel(SamConfig()).eval()


# ----------------------------------------------------------------------------------------------------------- the decoder


def test_prompt_encoder_and_decoder_have_the_published_parameters(full_size):
    encoder = sum(value.numel() for value in full_size.prompt_encoder.parameters())
    positions = full_size.prompt_encoder.shared_embedding.positional_embedding.numel()  # a buffer in the original
    decoder = sum(value.numel() for value in full_size.mask_decoder.parameters())
    assert (encoder - positions, decoder) == (6_220, 4_058_340)
    assert round((encoder - positions + decoder) / 2**20, 3) == 3.876  # what the authors call 3.876 million


@pytest.mark.parametrize(("attention", "heads"), [("sdpa", 2), ("eager", 2), ("sdpa", 1), ("eager", 1)])
def test_masks_are_those_of_transformers(attention, heads):
    sam = small_sam(attention, heads=heads)
    embedding, boxes = embedding_of(sam), some_boxes(5)
    with torch.no_grad():
        products = image_products(sam, embedding)
        logits, iou = decode(sam, products, box_tokens(sam, boxes))
        theirs = sam(image_embeddings=embedding, input_boxes=boxes[None], multimask_output=False)
        assert logits.shape == (5, 1, 32, 32)
        torch.testing.assert_close(logits, theirs.pred_masks[0], atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(iou, theirs.iou_scores[0], atol=2e-4, rtol=1e-4)
        points = boxes[:, :2]
        logits, iou = decode(sam, products, point_tokens(sam, points), several=True)
        theirs = sam(image_embeddings=embedding, input_points=points[None, :, None], multimask_output=True)
        assert logits.shape == (5, 3, 32, 32)
        torch.testing.assert_close(logits, theirs.pred_masks[0], atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(iou, theirs.iou_scores[0], atol=2e-4, rtol=1e-4)
    assert 0.05 < float((logits > 0).float().mean()) < 0.95


@SHARE
def test_a_prompts_mask_does_not_depend_on_the_batch(sam, share):
    boxes = some_boxes(23)
    found = {
        batch: SegmentEverything(sam, lambda image: boxes, batch=batch, share=share).find(picture())
        for batch in (1, 7, 320)
    }
    for batch in (1, 7):
        assert torch.equal(found[batch].masks, found[320].masks)
        torch.testing.assert_close(found[batch].scores, found[320].scores)


def macs_of_a_prompt(*, ours):
    """Multiply-accumulates of a box at SAM's size, from the formulas, ours without what is done once an image."""
    positions, width, inner, heads, tokens = 64 * 64, 256, 128, 8, 7
    project, cross = tokens * width * inner, tokens * positions * inner
    own = 4 * tokens * width * width + 2 * tokens * tokens * width + 2 * tokens * width * 2048  # self-attention and MLP
    image = positions * width * inner
    over = positions * heads * tokens * width  # a product of the image with what was brought over to the tokens
    upscaling = positions * width * width + 4 * positions * 4 * (width // 4) * (width // 8)
    masks = (1 if ours else 4) * (2 * width * width + width * width // 8 + 16 * positions * width // 8)
    iou = 2 * width * width + 4 * width
    corners = 0 if ours else 2 * 2 * width // 2  # ours are encoded outside of `decode`
    if not ours:
        look, tell = 2 * project + 2 * image + 2 * cross, 2 * project + 2 * image + 2 * cross
        return 2 * (own + look + tell) + look + upscaling + masks + iou + corners
    first = own + 2 * project + 2 * cross + (3 * project + cross + over)
    look, tell = 4 * project + 2 * over, 4 * project + tokens * inner + 2 * over
    return first + own + look + tell + look + upscaling + masks + iou


def test_cost_is_linear_in_prompts_and_half_of_it_is_saved(full_size):
    def macs(prompts, *, ours):
        embedding, boxes = torch.zeros(1, 256, 64, 64, device="meta"), torch.zeros(prompts, 4, device="meta")

        def shared():
            return decode(full_size, image_products(full_size, embedding), torch.zeros(prompts, 2, 256, device="meta"))

        def repeated():
            return full_size(image_embeddings=embedding, input_boxes=boxes[None], multimask_output=False).pred_masks

        return count_cost(shared if ours else repeated).macs

    for ours in (True, False):
        one, two, nine = (macs(n, ours=ours) for n in (1, 2, 9))
        assert two - one == macs_of_a_prompt(ours=ours)
        assert nine - two == 7 * (two - one)
        if ours:
            assert one - (two - one) == 64 * 64 * (
                3 * 256 * 128 + 2 * 128
            )  # once an image: projections, and its positions
    assert 2.0 < macs_of_a_prompt(ours=False) / macs_of_a_prompt(ours=True) < 2.3
    assert 0.22 < 3 * 64 * 64 * 256 * 128 / macs_of_a_prompt(ours=False) < 0.23


def test_gradients_reach_every_weight_that_takes_part(sam):
    sam = copy.deepcopy(sam).train()
    embedding = embedding_of(sam).requires_grad_()
    logits, iou = decode(sam, image_products(sam, embedding), box_tokens(sam, some_boxes(3)))
    (logits.square().mean() + iou.square().mean()).backward()
    assert embedding.grad.abs().sum() > 0
    block = sam.mask_decoder.transformer.layers[0]
    for part in (
        block.cross_attn_token_to_image.k_proj,
        block.cross_attn_image_to_token.q_proj,
        sam.mask_decoder.upscale_conv1,
    ):
        assert part.weight.grad.abs().sum() > 0
    theirs = copy.deepcopy(sam)
    theirs.zero_grad()
    out = theirs(image_embeddings=embedding.detach(), input_boxes=some_boxes(3)[None], multimask_output=False)
    (out.pred_masks.square().mean() + out.iou_scores.square().mean()).backward()
    torch.testing.assert_close(
        block.cross_attn_token_to_image.k_proj.weight.grad,
        theirs.mask_decoder.transformer.layers[0].cross_attn_token_to_image.k_proj.weight.grad,
        atol=1e-3,
        rtol=1e-3,
    )


def test_an_adapter_on_a_projection_is_not_passed_by():
    class Adapted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 0.7 * x[..., : self.out_features]

    sam = small_sam(heads=1)
    before = decode(sam, image_products(sam, embedding_of(sam)), box_tokens(sam, some_boxes(3)))[0]
    for attention in (block.cross_attn_token_to_image for block in sam.mask_decoder.transformer.layers):
        adapted = Adapted(WIDTH, WIDTH // 2)
        adapted.load_state_dict(attention.v_proj.state_dict())
        attention.v_proj = adapted
    with torch.no_grad():
        logits = decode(sam, image_products(sam, embedding_of(sam)), box_tokens(sam, some_boxes(3)))[0]
        theirs = sam(image_embeddings=embedding_of(sam), input_boxes=some_boxes(3)[None], multimask_output=False)
    torch.testing.assert_close(logits, theirs.pred_masks[0], atol=2e-4, rtol=1e-4)
    assert (logits - before).abs().max() > 0.1


def test_weights_that_change_are_used(sam):
    sam = copy.deepcopy(sam)
    everything = SegmentEverything(sam, lambda image: some_boxes(4))
    before = everything.find(picture()).masks
    with torch.no_grad():
        sam.mask_decoder.transformer.layers[0].cross_attn_token_to_image.v_proj.weight.mul_(-3)
    assert not torch.equal(everything.find(picture()).masks, before)


@pytest.mark.parametrize("heads", [1, 2])
def test_positions_keep_their_precision_in_bfloat16(heads):
    exact, half = small_sam(heads=heads), small_sam(heads=heads).to(torch.bfloat16)
    exact.load_state_dict(half.state_dict())  # the same rounded weights
    boxes = some_boxes(40)
    tokens, rounded = box_tokens(exact, boxes), box_tokens(half, boxes)
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(tokens.to(torch.bfloat16), rounded)
    theirs = half.prompt_encoder._embed_boxes(boxes[None].to(torch.bfloat16))[0]
    assert (theirs - tokens).abs().max() > 3 * (rounded - tokens).abs().max()
    with torch.no_grad():
        wanted = decode(exact, image_products(exact, embedding_of(exact)), tokens)[0]
        given = decode(half, image_products(half, embedding_of(exact).to(torch.bfloat16)), rounded)[0]
    assert given.dtype == torch.bfloat16
    assert ((given > 0) == (wanted > 0)).float().mean() > 0.95
    found = SegmentEverything(half, lambda image: boxes).find(picture())
    assert found.masks.shape == (40, 48, SIDE)


@pytest.mark.slow
def test_it_exports(sam):
    class Masks(nn.Module):
        def __init__(self):
            super().__init__()
            self.sam = sam

        def forward(self, embedding, boxes):
            return decode(self.sam, image_products(self.sam, embedding), box_tokens(self.sam, boxes))

    given = embedding_of(sam), some_boxes(3)
    program = torch.export.export(Masks(), given).module()
    for ours, theirs in zip(program(*given), Masks()(*given), strict=True):
        torch.testing.assert_close(ours, theirs)


# ----------------------------------------------------------------------------------------------------------- all of an image


@SHARE
@pytest.mark.parametrize("size", [(48, SIDE), (SIDE, 48), (37, 51), (200, 90)])
def test_masks_of_boxes_are_those_of_the_processor(sam, share, size):
    boxes, image = some_boxes(6, *size), picture(*size)
    found = SegmentEverything(sam, lambda given: boxes, share=share, snap=0).find(image)
    assert found.masks.shape == (6, *size)
    assert torch.equal(found.prompts, boxes)
    inputs = SamProcessor(processor())(as_image(image), input_boxes=[boxes.tolist()], return_tensors="pt")
    with torch.no_grad():
        out = sam(
            pixel_values=inputs["pixel_values"], input_boxes=inputs["input_boxes"].float(), multimask_output=False
        )
    wanted = processor().post_process_masks(out.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"])
    agree = (found.masks == wanted[0][:, 0]).float().mean()
    assert agree > 0.999 if SIDE in size else agree > 0.97  # Pillow scales in whole numbers, torch does not


def test_with_every_true_box_the_masks_are_the_decoders(sam):
    """The upper bound of the method: what the boxes are wrong about is all that is lost."""
    scene = digit_scenes("heldout", 1, size=SIDE)[0]
    found = SegmentEverything(sam, lambda image: scene.boxes, snap=0).find(scene.image)
    with torch.no_grad():
        embedding = SegmentEverything(sam, PointGrid()).embed(scene.image)
        out = sam(image_embeddings=embedding, input_boxes=scene.boxes[None], multimask_output=False)
    logits = nn.functional.interpolate(out.pred_masks[0], (SIDE, SIDE), mode="bilinear", align_corners=False)
    assert len(found.masks) == len(scene.boxes)
    assert (found.masks == (logits[:, 0] > 0)).float().mean() > 0.9999


def test_no_boxes_give_no_masks_and_no_encoding(sam, monkeypatch):
    monkeypatch.setattr(SegmentEverything, "embed", None)
    everything = SegmentEverything(sam, lambda image: torch.zeros(0, 4))
    assert everything(picture()) == []
    assert everything.find(picture()).masks.shape == (0, 48, SIDE)


def test_records_are_those_of_sams_generator(sam):
    boxes = some_boxes(6)
    records = SegmentEverything(sam, lambda image: boxes, snap=0)(picture())
    assert [record["area"] for record in records] == sorted((record["area"] for record in records), reverse=True)
    for record in records:
        mask = record["segmentation"]
        assert mask.shape == (48, SIDE)
        assert mask.dtype == bool
        assert record["area"] == mask.sum()
        left, top, width, height = map(int, record["bbox"])
        assert mask[top : top + height, left : left + width].sum() == mask.sum()
        assert mask[:, left].any()
        assert mask[top + height - 1].any()
        assert record["crop_box"] == [0, 0, SIDE, 48]
        assert record["box_coords"] in boxes.tolist()
    points = SegmentEverything(sam, PointGrid(**LOOSE))(picture())
    assert points
    assert all(record["stability_score"] > 0 and len(record["point_coords"][0]) == 2 for record in points)


def test_boxes_near_the_border_are_snapped():
    boxes = torch.tensor([[19.0, 20.0, 81.0, 80.0], [20.0, 19.9, 80.0, 180.1], [-3.0, 50.0, 60.0, 300.0]])
    wanted = [[0.0, 20.0, 100.0, 80.0], [20.0, 0.0, 80.0, 200.0], [0.0, 50.0, 60.0, 200.0]]
    assert snap_boxes(boxes, (200, 100), 20).tolist() == wanted
    assert torch.equal(snap_boxes(boxes[:1], (200, 100), 0), boxes[:1])


def test_snapping_goes_by_the_longer_side(sam):
    boxes = torch.tensor([[19.0, 21.0, 700.0, 490.0]])
    for scale in (1, 0.5):
        image = torch.zeros(3, int(512 * scale), int(1024 * scale))
        found = SegmentEverything(sam, lambda given, scale=scale: boxes * scale).boxes(image)
        assert (found / scale).tolist() == [[0.0, 21.0, 700.0, 490.0]]
        found = SegmentEverything(sam, lambda given, scale=scale: boxes * scale, snap=0.03).boxes(image)
        assert (found / scale).tolist() == [[0.0, 0.0, 700.0, 512.0]]


@SHARE
def test_the_grid_is_that_of_transformers(sam, share):
    image, grid = picture(), filtering(sam)
    pipe = MaskGeneration(model=sam, image_processor=processor(), task="mask-generation", device="cpu")
    theirs = pipe(
        as_image(image), points_per_crop=grid.side, points_per_batch=5, pred_iou_thresh=grid.iou,
        stability_score_thresh=grid.stability, stability_score_offset=grid.offset, crops_nms_thresh=grid.overlap,
    )  # fmt: skip
    ours = SegmentEverything(sam, grid, batch=7, share=share).find(image)
    assert 0 < len(ours.masks) == len(theirs["masks"])
    torch.testing.assert_close(ours.scores, theirs["scores"], atol=1e-4, rtol=1e-3)
    assert np.mean(ours.masks.numpy() == np.stack(theirs["masks"])) > 0.999


def test_each_filter_of_the_grid_takes_masks_away(sam):
    def count(**change):
        return len(SegmentEverything(sam, PointGrid(**{**LOOSE, **change})).find(picture()).masks)

    grid, whole = filtering(sam), count()
    assert 0 < count(iou=grid.iou) < whole
    assert 0 < count(stability=grid.stability) < whole
    assert 0 < count(overlap=grid.overlap) < whole
    assert count(iou=1e9) == 0


# ------------------------------------------------------------------------------------------------------------ in a pipeline


@SHARE
def test_the_pipeline_takes_boxes(sam, share):
    boxes, images = some_boxes(5), [picture(), picture(seed=1)]
    pipe = pipeline(
        "mask-generation", model=sam, image_processor=processor(), pipeline_class=MaskGeneration, device="cpu",
        proposer=lambda image: boxes, batch=2, snap=0, share=share,
    )  # fmt: skip
    outputs = pipe([as_image(image) for image in images], output_bboxes_mask=True, output_rle_mask=True)
    for image, output in zip(images, outputs, strict=True):
        found = SegmentEverything(sam, lambda given: boxes, snap=0).find(image)
        assert np.mean(np.stack(output["masks"]) == found.masks.numpy()) > 0.999
        torch.testing.assert_close(output["scores"], found.scores, atol=1e-4, rtol=1e-3)
        for mask, (left, top, right, bottom) in zip(
            output["masks"], output["bounding_boxes"].int().tolist(), strict=True
        ):
            assert mask[top : bottom + 1, left : right + 1].sum() == mask.sum()
        assert [sum(each["counts"][1::2]) for each in output["rle_mask"]] == [mask.sum() for mask in output["masks"]]


def test_a_pipeline_without_boxes_gives_no_masks(sam):
    pipe = MaskGeneration(
        model=sam, image_processor=processor(), task="mask-generation", device="cpu", proposer=lambda image: torch.zeros(0, 4)
    )  # fmt: skip
    output = pipe(as_image(picture()), output_bboxes_mask=True)
    assert output["masks"] == []
    assert len(output["scores"]) == len(output["bounding_boxes"]) == 0


def test_the_pipeline_changes_nothing_outside_of_it(sam):
    own = processor()
    before = dict(vars(own))
    pipe = MaskGeneration(model=sam, image_processor=own, task="mask-generation", device="cpu")
    pipe(as_image(picture()), points_per_crop=2, pred_iou_thresh=0.0, stability_score_thresh=0.0)
    assert vars(own) == before
    assert pipe.image_processor is own


def test_a_pipeline_with_boxes_refuses_the_grids_settings(sam):
    pipe = MaskGeneration(
        model=sam,
        image_processor=processor(),
        task="mask-generation",
        device="cpu",
        proposer=lambda image: some_boxes(2),
    )
    for setting in ({"points_per_batch": 8}, {"pred_iou_thresh": 0.5}, {"crops_nms_thresh": 0.5}):
        with pytest.raises(ValueError, match=next(iter(setting))):
            pipe(as_image(picture()), **setting)
    assert len(pipe(as_image(picture()), mask_threshold=0.5)["masks"]) == 2
    with pytest.raises(TypeError, match="proposer must be callable"):
        MaskGeneration(model=sam, image_processor=processor(), device="cpu", proposer=PointGrid())


# ---------------------------------------------------------------------------------------------------------------- proposers


def test_a_detector_may_answer_as_others_do():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10.4], [0, 0, 10, 12], [20, 20, 30, 30]])
    scores = torch.tensor([0.7, 0.9, 0.8, 0.41])
    wanted = boxes[[1, 2, 3]]  # the first is a near-copy of the second
    for found in ((boxes, scores), [boxes, scores], {"boxes": boxes, "scores": scores, "labels": scores.long()}):
        assert torch.equal(DetectorBoxes(lambda image, found=found: found)(picture()), wanted)
    assert len(DetectorBoxes(lambda image: (boxes, scores), confidence=0.75)(picture())) == 2
    assert len(DetectorBoxes(lambda image: (boxes, scores), overlap=0.5)(picture())) == 2
    assert DetectorBoxes(lambda image: (boxes, 0 * scores))(picture()).shape == (0, 4)


def test_components_are_scipys():
    from scipy.ndimage import label

    mask = torch.rand(40, 31, generator=torch.Generator().manual_seed(0)) < 0.35
    theirs, n = label(mask.numpy(), np.ones((3, 3)))
    ours = components(mask)
    assert int(ours.max()) == n > 5
    assert np.array_equal(ours.numpy(), theirs)
    assert torch.equal(components(torch.zeros(5, 5, dtype=torch.bool)), torch.zeros(5, 5, dtype=torch.long))


@pytest.mark.parametrize("scale", [1, 4])
def test_gradients_find_what_stands_out_from_a_calm_ground(scale):
    image = torch.full((3, 120, 160), 0.3)
    image[:, 20:50, 30:70] = 0.8
    image[0, 80:110, 100:120] = 0.9  # of one colour alone
    image = nn.functional.interpolate(image[None], scale_factor=scale)[0]
    found = GradientBoxes()(image) / scale
    wanted = torch.tensor([[30.0, 20, 70, 50], [100, 80, 120, 110]])
    assert found.shape == (2, 4)
    assert (found - wanted).abs().max() < 5
    assert (found[:, :2] < wanted[:, :2]).all()
    assert (found[:, 2:] > wanted[:, 2:]).all()
    assert GradientBoxes()(torch.full((3, 50, 50), 0.4)).shape == (0, 4)
    assert len(GradientBoxes(least=10_000)(image)) == 0


def test_the_grid_has_its_points_in_the_middles():
    points = PointGrid(side=2).points(40, 100)
    assert points.tolist() == [[25.0, 10.0], [75.0, 10.0], [25.0, 30.0], [75.0, 30.0]]


# ---------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (torch.zeros(3, 5), r"boxes of the proposer must have shape \(boxes, 4\)"),
        (torch.tensor([[0.0, 0, torch.nan, 4]]), "boxes of the proposer must be finite"),
        (torch.tensor([[0.0, 0, 4, 4], [5, 5, 5, 9]]), r"must have a width and a height, got \[5.0, 5.0, 5.0, 9.0\]"),
    ],
)
def test_bad_boxes_are_named(sam, found, says):
    with pytest.raises(ValueError, match=says):
        SegmentEverything(sam, lambda image: found).find(picture())


def test_bad_input_is_named(sam):
    with pytest.raises(TypeError, match="sam must be a SamModel of transformers, got Linear"):
        SegmentEverything(nn.Linear(1, 1), PointGrid())
    with pytest.raises(TypeError, match="proposer must be callable"):
        SegmentEverything(sam, 3)
    with pytest.raises(ValueError, match="batch must be a whole number at least 1"):
        SegmentEverything(sam, PointGrid(), batch=0)
    with pytest.raises(ValueError, match="snap"):
        SegmentEverything(sam, PointGrid(), snap=0.5)
    with pytest.raises(TypeError, match="share must be True or False"):
        SegmentEverything(sam, PointGrid(), share=1)
    with pytest.raises(ValueError, match="image must have shape"):
        SegmentEverything(sam, PointGrid()).find(torch.zeros(1, 8, 8))
    with pytest.raises(TypeError, match="boxes of the proposer must hold floating-point"):
        SegmentEverything(sam, lambda image: torch.ones(1, 4, dtype=torch.long)).find(picture())
    with pytest.raises(TypeError, match="to give boxes, got a PointGrid"):
        SegmentEverything(sam, PointGrid()).boxes(picture())
    with pytest.raises(ValueError, match="embedding must have shape"):
        image_products(sam, torch.zeros(1, 3, 8, 8))
    with pytest.raises(TypeError, match="embedding must hold"):
        image_products(sam, embedding_of(sam).double())
    with pytest.raises(ValueError, match="prompts must not be empty"):
        decode(sam, image_products(sam, embedding_of(sam)), torch.zeros(0, 2, WIDTH))
    with pytest.raises(TypeError, match="detector must return boxes and scores"):
        DetectorBoxes(lambda image: None)(picture())
    with pytest.raises(ValueError, match="scores of the detector"):
        DetectorBoxes(lambda image: (torch.zeros(2, 4), torch.zeros(3)))(picture())
    with pytest.raises(TypeError, match="detector must be callable"):
        DetectorBoxes(None)
    with pytest.raises(ValueError, match="blur must be odd"):
        GradientBoxes(blur=4)
    with pytest.raises(ValueError, match="at least blur=5 pixels"):
        GradientBoxes()(torch.zeros(3, 4, 9))
    with pytest.raises(ValueError, match="side must be a whole number at least 1"):
        PointGrid(side=0)
    with pytest.raises(ValueError, match="within"):
        snap_boxes(torch.zeros(1, 4), (5, 5), -1)

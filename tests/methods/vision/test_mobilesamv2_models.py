"""MobileSAMv2 on SAMs of many shapes, in half precision, with another encoder: masks are the plain decoder's. Other models are refused."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import nn
from transformers import SamConfig, SamMaskDecoderConfig, SamModel, SamPromptEncoderConfig, SamVisionConfig
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

from assay.methods.vision.mobilesamv2 import GradientBoxes, PointGrid, SegmentEverything, image_products
from assay.methods.vision.mobilesamv2.pipeline import MaskGeneration

SIDE, WIDTH = 64, 16
EVERYTHING = PointGrid(2, iou=-1e9, stability=0.0, offset=0.2, overlap=1.0)


class Convolutions(nn.Module):
    """An encoder that is no vision transformer, as MobileSAM's is none."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Hardswish(), nn.Conv2d(8, WIDTH, 2, 2))

    def forward(self, pixel_values, **others):
        return transformers.modeling_outputs.BaseModelOutput(last_hidden_state=self.layers(pixel_values))


def sam_of(
    *, side=SIDE, patch=8, width=WIDTH, vision=(), decoder=(), attention="sdpa", encoder=None, dtype=torch.float32
):
    """With weights that are large enough for positions and prompts to tell in the masks."""
    torch.manual_seed(0)
    config = SamConfig(
        vision_config=SamVisionConfig(**{
            "hidden_size": 8, "output_channels": width, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": side,
            "patch_size": patch, "global_attn_indexes": [0], "num_pos_feats": width // 2, "mlp_dim": 8, **dict(vision),
        }),
        prompt_encoder_config=SamPromptEncoderConfig(hidden_size=width, image_size=side, patch_size=patch),
        mask_decoder_config=SamMaskDecoderConfig(**{
            "hidden_size": width, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16, **dict(decoder),
        }),
    )  # fmt: skip
    config._attn_implementation = attention
    sam = SamModel(config).eval()
    if encoder is not None:
        sam.vision_encoder = encoder()
    for name, value in sam.named_parameters():
        if "norm" not in name:
            nn.init.normal_(value, std=1.0 if "positional" in name else 0.3)
    nn.init.constant_(sam.mask_decoder.iou_prediction_head.proj_out.bias, 2.0)
    return sam.to(dtype)


MODELS = {
    "plain": {},
    "large patches that do not fill the image": {"side": 100, "patch": 16},
    "small windows": {"side": 32, "patch": 4, "vision": {"window_size": 3, "num_hidden_layers": 2, "global_attn_indexes": [1]}},
    "no positions in the encoder": {"vision": {"use_rel_pos": False, "use_abs_pos": False, "qkv_bias": False, "global_attn_indexes": []}},
    "slim": {"vision": {"hidden_size": 14, "num_attention_heads": 7, "mlp_dim": 6, "num_hidden_layers": 2, "global_attn_indexes": [1]}},
    "wide": {"width": 32, "vision": {"hidden_size": 24, "num_attention_heads": 3}, "decoder": {"num_attention_heads": 1}},
    "one mask, one block": {"decoder": {
        "num_multimask_outputs": 1, "num_hidden_layers": 1, "attention_downsample_rate": 4, "hidden_act": "gelu", "iou_head_depth": 2,
    }},
    "five masks, three blocks": {"decoder": {
        "num_multimask_outputs": 5, "num_hidden_layers": 3, "attention_downsample_rate": 1, "num_attention_heads": 1,
    }},
    "another encoder": {"encoder": Convolutions},
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def sam(request):
    return sam_of(**MODELS[request.param])


def picture(height, width, seed=0):
    return torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(seed)) / 255


def as_image(tensor):
    return Image.fromarray((255 * tensor).round().byte().permute(1, 2, 0).numpy())


def some_boxes(n, height, width):
    generator = torch.Generator().manual_seed(1)
    corners = 0.6 * torch.rand(n, 2, generator=generator)
    sizes = 0.1 + 0.3 * torch.rand(n, 2, generator=generator)
    return torch.cat([corners, corners + sizes], 1) * torch.tensor([width, height] * 2)


def boxes_of(n):
    return lambda image: some_boxes(n, *image.shape[1:])


def side_of(sam):
    return sam.config.vision_config.image_size


def processor(side, **settings):
    return SamImageProcessorPil(
        **{"size": {"longest_edge": side}, "pad_size": {"height": side, "width": side}, **settings}
    )


def generation(sam, proposer=None, image_processor=None, **settings):
    return MaskGeneration(
        model=sam, image_processor=image_processor or processor(side_of(sam)), task="mask-generation", device="cpu",
        proposer=proposer, **settings,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------- SAMs of other shapes


def test_the_shared_products_give_the_plain_decoders_masks(sam):
    image = picture(20, 27)
    shared, plain = (SegmentEverything(sam, EVERYTHING, share=share) for share in (True, False))
    embedding, boxes = plain.embed(image), some_boxes(5, 20, 27)
    for several in (False, True):
        prompts = shared.scaled(boxes[:, :2] if several else boxes, (20, 27))
        with torch.no_grad():
            (logits, iou), (wanted, wanted_iou) = (
                next(each.decoded(embedding, prompts, several=several)) for each in (shared, plain)
            )
        masks = sam.config.mask_decoder_config.num_multimask_outputs if several else 1
        assert logits.shape[:2] == iou.shape == (5, masks)
        assert (wanted - wanted.mean(0)).std() > 0.01  # prompts tell
        torch.testing.assert_close(logits, wanted, atol=2e-5, rtol=1e-3)
        torch.testing.assert_close(iou, wanted_iou, atol=2e-5, rtol=1e-3)


def test_every_size_of_image_has_its_masks_whatever_the_batch_and_the_order(sam):
    order = torch.tensor([3, 0, 4, 2, 1])
    for size in ((9, 17), (70, 100)):  # smaller and larger than the model's, neither of them square
        boxes, image = some_boxes(5, *size), picture(*size)
        found, parts, mixed = (
            SegmentEverything(sam, lambda given, some=some: some, batch=batch).find(image)
            for some, batch in ((boxes, 320), (boxes, 2), (boxes[order], 320))
        )
        assert found.masks.shape == (5, *size)
        assert torch.equal(parts.masks, found.masks)
        torch.testing.assert_close(parts.scores, found.scores)
        assert torch.equal(mixed.masks, found.masks[order])
        torch.testing.assert_close(mixed.scores, found.scores[order])
    one = SegmentEverything(sam, lambda given: boxes[3:4]).find(image)
    assert torch.equal(one.masks, found.masks[3:4])


def test_a_black_image_has_masks_where_boxes_are_and_none_where_a_proposer_finds_nothing(sam):
    black = torch.zeros(3, 20, 30)
    assert SegmentEverything(sam, boxes_of(2)).find(black).masks.shape == (2, 20, 30)
    assert SegmentEverything(sam, GradientBoxes())(black) == []


def test_the_grid_decodes_as_many_masks_as_the_model_has_for_a_point(sam):
    found = SegmentEverything(sam, EVERYTHING, batch=3).find(picture(24, 40))
    whole = SegmentEverything(sam, EVERYTHING).find(picture(24, 40))
    assert found.masks.shape[1:] == (24, 40)
    outputs = sam.config.mask_decoder_config.num_multimask_outputs
    assert (
        (outputs > 1) <= len(found.masks) <= 4 * outputs
    )  # the one mask of a point may have no pixel, which is no mask
    assert torch.equal(found.masks, whole.masks)
    assert torch.equal(found.prompts, whole.prompts)


def test_the_pipeline_gives_the_same_masks(sam):
    side = side_of(sam)
    image = picture(side // 2, side)  # which nobody scales: Pillow and torch do it differently
    output = generation(sam, boxes_of(4), snap=0)(as_image(image), output_bboxes_mask=True)
    found = SegmentEverything(sam, boxes_of(4), snap=0).find(image)
    assert np.mean(np.stack(output["masks"]) == found.masks.numpy()) > 0.999
    torch.testing.assert_close(output["scores"], found.scores, atol=1e-4, rtol=1e-3)
    assert output["bounding_boxes"].shape == (4, 4)


@pytest.mark.parametrize("name", ["plain", "wide"])
def test_more_boxes_than_a_batch_holds(name):
    sam = sam_of(**MODELS[name])
    found = SegmentEverything(sam, boxes_of(330)).find(picture(8, 8))
    assert found.masks.shape == (330, 8, 8)
    last = SegmentEverything(sam, lambda image: some_boxes(330, 8, 8)[315:]).find(picture(8, 8))
    assert torch.equal(last.masks, found.masks[315:])


# --------------------------------------------------------------------------------------------------------------- half precision


@pytest.mark.parametrize(("dtype", "heads"), [(torch.float16, 1), (torch.bfloat16, 2)], ids=str)
def test_half_precision_gives_nearly_the_same_masks(dtype, heads):
    sam = sam_of(decoder={"num_attention_heads": heads}, dtype=dtype)
    wanted = SegmentEverything(copy.deepcopy(sam).float(), boxes_of(5), snap=0).find(picture(48, 64)).masks
    assert 0.02 < wanted.float().mean() < 0.98
    for share in (True, False):
        found = SegmentEverything(sam, boxes_of(5), share=share, snap=0).find(picture(48, 64))
        assert found.scores.dtype == dtype
        assert (found.masks == wanted).float().mean() > 0.97
    output = generation(sam, boxes_of(5), snap=0)(as_image(picture(48, 64)))
    assert np.mean(np.stack(output["masks"]) == wanted.numpy()) > 0.97
    output = generation(sam)(
        as_image(picture(48, 64)), points_per_crop=2, pred_iou_thresh=0.0, stability_score_thresh=0.0
    )
    assert len(output["masks"]) == len(output["scores"]) >= 1


# ------------------------------------------------------------------------------------------------------------------ the pipeline


@pytest.mark.parametrize(
    "settings", [{"size": {"longest_edge": SIDE // 2}}, {"do_resize": False}], ids=["smaller", "as it is"]
)
def test_boxes_lie_where_the_processor_put_the_image(settings):
    sam, own = sam_of(decoder={"num_attention_heads": 1}), processor(SIDE, **settings)
    image, boxes = as_image(picture(20, 40)), some_boxes(5, 20, 40)
    inputs = own(images=image, return_tensors="pt")
    rows, columns = inputs["reshaped_input_sizes"][0].tolist()
    assert (rows, columns) != (SIDE // 2, SIDE)  # what filling the model's input would be
    with torch.no_grad():
        out = sam(pixel_values=inputs["pixel_values"], input_boxes=(boxes * columns / 40)[None], multimask_output=False)
    wanted = own.post_process_masks(out.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"])[0]
    output = generation(sam, lambda given: boxes, own, snap=0)(image)
    assert np.mean(np.stack(output["masks"]) == wanted[:, 0].numpy()) > 0.9999


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 2}, "batch_size must be 1, got 2"),
        ({"points_per_batch": 8}, "points_per_batch must not be given"),
        (
            {"stability_score_thresh": 0.5, "crops_n_layers": 1},
            "crops_n_layers, stability_score_thresh must not be given",
        ),
        ({"crops_nms_thresh": 0.5, "mask_threshold": 0.5}, "^crops_nms_thresh must not be given"),
    ],
)
def test_settings_of_the_grid_are_refused_before_an_image_is_opened(settings, message):
    sam = sam_of()
    with pytest.raises(ValueError, match=message):
        generation(sam, boxes_of(2))("there is no such file.png", **settings)
    with pytest.raises(ValueError, match=message):
        generation(sam, boxes_of(2), **settings)(["there is no such file.png"] * 2)  # given once and for all


# ----------------------------------------------------------------------------------------------------------------- other models

TINY = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
OTHERS = {
    "SamVisionModel": lambda config: config(hidden_size=8, num_hidden_layers=1, num_attention_heads=1),
    "SamHQModel": lambda config: config(vision_config={"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}),
    "Sam2Model": lambda config: config(),
    "ViTModel": lambda config: config(**TINY),
    "CLIPSegForImageSegmentation": lambda config: config(text_config=TINY, vision_config=TINY, extract_layers=[0]),
    "Mask2FormerForUniversalSegmentation": lambda config: config(
        backbone_config=transformers.SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[1, 1], out_features=["stage1", "stage2"]),
        encoder_layers=1, decoder_layers=2,
    ),
    "LlamaModel": lambda config: config(vocab_size=8, **TINY),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_another_model_is_refused_by_name_before_anything_is_done_to_it(name):
    model = getattr(transformers, name)
    with torch.device("meta"):  # moving it, as a pipeline does, would be an error of its own
        model = model(OTHERS[name](model.config_class))
    message = f"sam must be a SamModel of transformers, got {name}"
    with pytest.raises(TypeError, match=message):
        SegmentEverything(model, EVERYTHING)
    with pytest.raises(TypeError, match=message):
        image_products(model, torch.zeros(1, WIDTH, 8, 8))
    with pytest.raises(TypeError, match=message):
        MaskGeneration(
            model=model, image_processor=processor(SIDE), task="mask-generation", device="cpu", proposer=boxes_of(2)
        )


def test_without_boxes_sam_hq_is_the_pipelines_own():
    torch.manual_seed(0)
    config = transformers.SamHQConfig(
        vision_config={
            "hidden_size": 8, "output_channels": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE,
            "patch_size": 8, "global_attn_indexes": [0, 1], "num_pos_feats": WIDTH // 2, "mlp_dim": 8,
        },
        prompt_encoder_config={"hidden_size": WIDTH, "image_size": SIDE, "patch_size": 8},
        mask_decoder_config={"hidden_size": WIDTH, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16, "vit_dim": 8},
    )  # fmt: skip
    output = generation(transformers.SamHQModel(config).eval())(
        as_image(picture(30, 40)), points_per_crop=2, pred_iou_thresh=-1e9, stability_score_thresh=0.0
    )
    assert 1 <= len(output["masks"]) <= 12
    assert all(mask.shape == (30, 40) for mask in output["masks"])

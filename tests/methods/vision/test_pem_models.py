"""PEM's prototypes in models of many kinds: each takes them, trains, is saved and gives them back, or refuses and stays as it was."""

from __future__ import annotations

import pytest
import torch
import transformers
from safetensors.torch import load_file

from assay.methods.vision.pem import apply_pem, remove_pem
from assay.methods.vision.pem.mask2former import Mask2FormerPrototypes

SIZE = (32, 64)
STAGES = ["stage1", "stage2", "stage3", "stage4"]
DETR = {
    "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "num_queries": 4, "d_model": 32, "use_timm_backbone": False,
}  # fmt: skip
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def backbone(kind="Swin", stages=STAGES):
    windows = {"embed_dim": 8, "num_heads": [1] * 4, "window_size": 4}
    settings = {
        "ResNet": {"embedding_size": 8, "hidden_sizes": [8] * 4, "layer_type": "basic"},
        "Swin": windows,
        "Swinv2": {**windows, "image_size": 64},
        "ConvNext": {"hidden_sizes": [8] * 4},
        "PvtV2": {"hidden_sizes": [8] * 4, "num_attention_heads": [1] * 4},
    }[kind]
    return getattr(transformers, f"{kind}Config")(depths=[1] * 4, out_features=list(stages), **settings)


def mask2former(kind="Swin", head="ForUniversalSegmentation", width=32, **settings):
    torch.manual_seed(0)
    sizes = {
        "feature_size": width, "mask_feature_size": 32, "hidden_dim": width, "encoder_feedforward_dim": 8,
        "encoder_layers": 1, "decoder_layers": 4, "num_attention_heads": 2, "dim_feedforward": 8, "num_queries": 4,
        "num_labels": 3, "train_num_points": 32,
    }  # fmt: skip
    config = transformers.Mask2FormerConfig(backbone_config=backbone(kind), **{**sizes, **settings})
    return getattr(transformers, f"Mask2Former{head}")(config).eval()


def batch(dtype=torch.float32):
    """Three images, of which one is whole and two are padded."""
    mask = torch.ones(3, *SIZE, dtype=torch.long)
    mask[1, 16:] = 0
    mask[2, :, 20:] = 0
    pixels = torch.randn(3, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    return {"pixel_values": pixels.to(dtype), "pixel_mask": mask}


def truth():
    masks = torch.zeros(2, *SIZE)
    masks[0, :16] = 1
    masks[1, :, :30] = 1
    return {"mask_labels": [masks] * 3, "class_labels": [torch.tensor([0, 1])] * 3}


def states(model, dtype=torch.float32):
    """What the model says of every query."""
    with torch.no_grad():
        return model(**batch(dtype)).transformer_decoder_last_hidden_state


def decoder(model):
    return getattr(model, "model", model).transformer_module.decoder


def segments(model):
    """The class of each pixel, the segments of instances and the segments of things and stuff, by transformers' own functions."""
    with torch.no_grad():
        found = model(**batch())
    make = transformers.Mask2FormerImageProcessorPil()
    sizes = [SIZE] * 3
    semantic = make.post_process_semantic_segmentation(found, target_sizes=sizes)
    others = [
        each(found, threshold=0.0, target_sizes=sizes)
        for each in (make.post_process_instance_segmentation, make.post_process_panoptic_segmentation)
    ]
    return [semantic, *([each["segmentation"] for each in one] for one in others)]


TAKES_IT = {
    "Swin": {},
    "ResNet, one query": {"kind": "ResNet", "num_queries": 1},
    "ConvNext, norms before": {"kind": "ConvNext", "pre_norm": True},
    "PVT, many queries": {"kind": "PvtV2", "num_queries": 17},
    "Swin v2": {"kind": "Swinv2", "decoder_layers": 3},
    "one layer": {"kind": "ResNet", "decoder_layers": 2},
    "more layers than maps": {"kind": "ResNet", "decoder_layers": 6, "pre_norm": True},
    "another width": {"kind": "ResNet", "width": 96, "num_attention_heads": 3, "enforce_input_projection": True},
    "masks at an eighth": {"kind": "ResNet", "common_stride": 8},
    "without a head": {"kind": "ResNet", "head": "Model"},
}


@pytest.mark.parametrize("name", TAKES_IT)
def test_it_reaches_every_mask2former(name):
    model = mask2former(**TAKES_IT[name])
    names, before, layers = list(model.state_dict()), states(model), decoder(model).layers
    apply_pem(model)
    assert len(layers) == model.config.decoder_layers - 1
    assert all(isinstance(layer.cross_attn, Mask2FormerPrototypes) for layer in layers)
    after = states(model)
    assert after.isfinite().all()
    assert not torch.allclose(after, before)
    with pytest.raises(ValueError, match="model must not have prototypes already"):
        apply_pem(model)
    assert torch.equal(states(remove_pem(model)), before)
    assert list(model.state_dict()) == names

    apply_pem(model).train()
    if hasattr(model, "class_predictor"):
        model(**batch(), **truth()).loss.backward()
    else:
        model(**batch()).transformer_decoder_last_hidden_state.square().mean().backward()
    for layer in layers:
        assert layer.cross_attn.inner.memory_proj.weight.grad.any()
        assert all(bool(value.grad.isfinite().all()) for value in layer.cross_attn.parameters())
    assert states(model.eval().bfloat16(), torch.bfloat16).isfinite().all()


@pytest.mark.parametrize("pre_norm", [False, True])
def test_saved_and_loaded_it_says_the_same(pre_norm, tmp_path):
    model = apply_pem(mask2former(pre_norm=pre_norm))
    expected = states(model)
    model.save_pretrained(tmp_path)
    again = apply_pem(type(model).from_pretrained(tmp_path)).eval()
    assert not torch.equal(states(again), expected)  # what was put in has yet to come
    left = again.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert not [key for key in left.missing_keys if ".cross_attn" in key]
    assert torch.equal(states(again), expected)


def test_put_in_after_half_precision_it_keeps_it():
    model = apply_pem(mask2former("ResNet").bfloat16())
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}
    assert states(model, torch.bfloat16).isfinite().all()


def test_classes_instances_and_segments_are_made_of_what_it_says():
    model = apply_pem(mask2former("ResNet"))
    for maps in segments(model):
        assert [tuple(each.shape) for each in maps] == [SIZE] * 3
        assert all(bool(torch.as_tensor(each).isfinite().all()) for each in maps)


# ------------------------------------------------------------------------------------------------------------------ other models


def of_transformers(name, head, **settings):
    return getattr(transformers, name + head)(getattr(transformers, f"{name}Config")(**settings))


def maskformer():
    query = transformers.DetrConfig(backbone_config=backbone("ResNet", STAGES[3:]), **DETR)
    return of_transformers(
        "MaskFormer", "ForInstanceSegmentation", backbone_config=backbone(), decoder_config=query, fpn_feature_size=32,
        mask_feature_size=32,
    )  # fmt: skip


def oneformer():
    return of_transformers(
        "OneFormer", "ForUniversalSegmentation", backbone_config=backbone(), hidden_dim=32, mask_dim=32, conv_dim=32,
        encoder_feedforward_dim=8, encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=8,
        num_queries=4, text_encoder_width=16, text_encoder_num_layers=1, text_encoder_vocab_size=32,
    )  # fmt: skip


def only_queries(name):
    """EoMT and its like for videos: a plain vision transformer that is given queries."""
    return of_transformers(
        name, "ForUniversalSegmentation", num_blocks=1, image_size=32, patch_size=8, num_queries=4, num_upscale_blocks=1,
        **SMALL,
    )  # fmt: skip


def half_done():
    model = apply_pem(mask2former("ResNet"))
    layer = decoder(model).layers[0]
    layer.cross_attn = layer.cross_attn.replaced[0]
    return model


WANTED = r"model must be a Mask2Former of transformers \(have a Mask2FormerMaskedAttentionDecoderLayer\), got "
REFUSES_IT = {
    "MaskFormer": (maskformer, WANTED + "MaskFormerFor"),
    "OneFormer": (oneformer, WANTED + "OneFormerFor"),
    "EoMT": (lambda: only_queries("Eomt"), WANTED + "EomtFor"),
    "VidEoMT": (lambda: only_queries("Videomt"), WANTED + "VideomtFor"),
    "Segformer": (
        lambda: of_transformers(
            "Segformer", "ForSemanticSegmentation", depths=[1] * 4, hidden_sizes=[8] * 4, num_attention_heads=[1] * 4,
            decoder_hidden_size=8,
        ),
        WANTED + "SegformerFor",
    ),
    "DETR": (
        lambda: of_transformers("Detr", "ForObjectDetection", backbone_config=backbone("ResNet", STAGES[3:]), **DETR),
        WANTED + "DetrFor",
    ),
    "Llama": (
        lambda: of_transformers("Llama", "ForCausalLM", vocab_size=32, intermediate_size=8, **SMALL),
        WANTED + "LlamaForCausalLM",
    ),
    "ViT": (
        lambda: of_transformers(
            "ViT", "ForImageClassification", image_size=16, patch_size=8, intermediate_size=8, **SMALL
        ),
        WANTED + "ViTFor",
    ),
    "its backbone": (lambda: mask2former("ResNet").model.pixel_level_module.encoder, WANTED + "ResNetBackbone"),
    "its pixel decoder": (lambda: mask2former("ResNet").model.pixel_level_module.decoder, WANTED + "Mask2FormerPixel"),
    "no layers": (lambda: mask2former("ResNet", decoder_layers=1), WANTED + "Mask2FormerForUniversal"),
    "half done": (half_done, r"model must not have prototypes already: remove_pem\(model\) first"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSES_IT)
def test_other_models_are_refused_and_stay_as_they_were(name):
    build, message = REFUSES_IT[name]
    model = build()
    modules, names = list(model.named_modules()), list(model.state_dict())
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        apply_pem(model)
    assert list(model.named_modules()) == modules
    assert list(model.state_dict()) == names
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks


@pytest.mark.parametrize("pre_norm", [False, True])
def test_half_done_it_comes_off_and_goes_on_again(pre_norm):
    model = mask2former("ResNet", pre_norm=pre_norm)
    before, names = states(model), list(model.state_dict())
    layer = decoder(apply_pem(model)).layers[0]
    layer.cross_attn, layer.cross_attn_layer_norm = layer.cross_attn.replaced  # by hand, of one layer
    assert torch.equal(states(remove_pem(model)), before)
    assert list(model.state_dict()) == names
    with pytest.raises(ValueError, match="model must have prototypes"):
        remove_pem(model)
    assert not torch.allclose(states(apply_pem(model)), before)

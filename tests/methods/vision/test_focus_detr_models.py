"""Focus-DETR on detectors of many kinds: each takes it, trains, is saved and gives it back, or refuses it and stays as it was."""

from __future__ import annotations

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection

from assay.methods.vision.focus_detr import FocusEncoder, apply_focus, remove_focus

SIZE = (32, 64)
DETR = {
    "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "num_queries": 4, "use_timm_backbone": False,
}  # fmt: skip
TWO_STAGE = {"two_stage": True, "with_box_refine": True, "two_stage_num_proposals": 4}
OBJECTS = [
    {"class_labels": torch.tensor([1, 2]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.5], [0.2, 0.3, 0.2, 0.2]])},
    {"class_labels": torch.tensor([0]), "boxes": torch.tensor([[0.6, 0.4, 0.3, 0.6]])},
    {"class_labels": torch.tensor([], dtype=torch.long), "boxes": torch.zeros(0, 4)},
]


def backbone(kind="ResNet", maps=3):
    """Of four stages; the last `maps` of them come out, with strides that end at 32."""
    settings = {
        "ResNet": {"embedding_size": 8, "hidden_sizes": [8] * 4, "layer_type": "basic"},
        "Swin": {"embed_dim": 8, "num_heads": [1] * 4, "window_size": 4},
        "ConvNext": {"hidden_sizes": [8] * 4},
        "PvtV2": {"hidden_sizes": [8] * 4, "num_attention_heads": [1] * 4},
    }[kind]
    stages = [f"stage{stage}" for stage in range(5 - maps, 5)]
    return getattr(transformers, f"{kind}Config")(depths=[1] * 4, out_features=stages, **settings)


def detector(kind="ResNet", maps=3, **settings):
    torch.manual_seed(0)
    chosen = {"backbone_config": backbone(kind, maps), "d_model": 32, "num_labels": 3, **DETR, **settings}
    model = DeformableDetrForObjectDetection(DeformableDetrConfig(**chosen))
    for value in model.parameters():  # transformers starts sampling with zeros
        nn.init.normal_(value.data, std=0.2)
    return model.eval()


def batch(dtype=torch.float32):
    """Three images, of which one is whole, one is padded on two sides and one on one side."""
    mask = torch.ones(3, *SIZE, dtype=torch.long)
    mask[1, 20:] = 0
    mask[1, :, 40:] = 0
    mask[2, 17:] = 0
    pixels = torch.randn(3, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    return {"pixel_values": pixels.to(dtype), "pixel_mask": mask}


TAKES_IT = {
    "plain": {},
    "box refinement, three levels": {"with_box_refine": True, "num_feature_levels": 3},
    "two stages, auxiliary losses": {**TWO_STAGE, "auxiliary_loss": True},
    "one level": {"maps": 1, "num_feature_levels": 1},
    "five levels, auxiliary losses": {"num_feature_levels": 5, "auxiliary_loss": True},
    "another width": {
        "d_model": 96, "encoder_attention_heads": 3, "decoder_attention_heads": 6, "encoder_n_points": 2,
        "decoder_n_points": 3, "encoder_layers": 3, "activation_function": "gelu",
    },
    "Swin, four maps": {"kind": "Swin", "maps": 4},
    "ConvNext, two stages": {"kind": "ConvNext", **TWO_STAGE},
    "PVT, two maps, learned positions": {
        "kind": "PvtV2", "maps": 2, "num_feature_levels": 3, "position_embedding_type": "learned",
    },
}  # fmt: skip


def check_dense_where_nothing_is_left_out(model, dtype):
    """One layer that updates every token is the dense encoder, in all that is no padding."""
    body = model.model
    every, body.encoder.layers = body.encoder.layers, body.encoder.layers[:1]
    with torch.no_grad():
        dense = model(**batch(dtype))
        same = apply_focus(model, 1.0, (1,), 0)(**batch(dtype))
    real = body.encoder.focused.valid
    if real is None:  # of two coarse tokens none is padding alone
        assert dense.encoder_last_hidden_state.shape[1] == 2
        real = torch.ones(3, 2, dtype=torch.bool)
    assert torch.equal(same.encoder_last_hidden_state[real], dense.encoder_last_hidden_state[real])
    assert torch.equal(same.logits, dense.logits)
    assert torch.equal(same.pred_boxes, dense.pred_boxes)
    remove_focus(model).model.encoder.layers = every


@pytest.mark.parametrize("name", TAKES_IT)
def test_it_reaches_every_deformable_detr(name):
    model = detector(**TAKES_IT[name])
    layers, names = model.model.encoder.layers, list(model.state_dict())
    betas = (1.0, 0.6, 0.4)[: len(layers)]
    check_dense_where_nothing_is_left_out(model, torch.float32)
    with torch.no_grad():
        dense = model(**batch())
        sparse = apply_focus(model, 0.4, betas, 4)(**batch())
    encoder = model.model.encoder
    assert sparse.logits.isfinite().all()
    assert not torch.allclose(sparse.encoder_last_hidden_state, dense.encoder_last_hidden_state)
    assert encoder.focused.order.shape[1] < dense.encoder_last_hidden_state.shape[1]
    for shape, stride in zip(encoder.focused.shapes, model.loss_function.strides, strict=True):
        assert tuple(shape) == tuple(-(-side // stride) for side in SIZE)
    with pytest.raises(ValueError, match="call remove_focus first"):
        apply_focus(model, 0.4, betas)

    found = model.train()(**batch(), labels=OBJECTS)
    assert (found.auxiliary_outputs is not None) == model.config.auxiliary_loss
    found.loss.backward()
    for key, value in encoder.named_parameters():
        assert value.numel() == 0 or bool(value.grad.isfinite().all()), key
    assert all(bool(layer.self_attn.value_proj.weight.grad.any()) for layer in layers)
    assert encoder.scorer.predictor.layer1[1].weight.grad.any()

    assert remove_focus(model.eval()).model.encoder.layers is layers
    assert list(model.state_dict()) == names
    with torch.no_grad():
        assert torch.equal(model(**batch()).logits, dense.logits)
    model.bfloat16()
    check_dense_where_nothing_is_left_out(model, torch.bfloat16)
    with torch.no_grad():
        assert apply_focus(model, 0.4, betas, 4)(**batch(torch.bfloat16)).logits.isfinite().all()


def test_saved_and_loaded_it_says_the_same(tmp_path):
    model = detector(**TWO_STAGE)
    names = set(model.state_dict())
    apply_focus(model, 0.4, (1.0, 0.6), 4).save_pretrained(tmp_path)
    again = apply_focus(type(model).from_pretrained(tmp_path), 0.4, (1.0, 0.6), 4).eval()
    with torch.no_grad():
        expected = model(**batch()).logits
        assert not torch.equal(again(**batch()).logits, expected)  # what was put in has yet to come
        left = again.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
        assert not (set(again.state_dict()) - names) & set(left.missing_keys)
        assert torch.equal(again(**batch()).logits, expected)


# ------------------------------------------------------------------------------------------------------------------ other models


def of_transformers(name, head="ForObjectDetection", **settings):
    return getattr(transformers, name + head)(getattr(transformers, f"{name}Config")(**settings))


def detr(name, **settings):
    return of_transformers(name, backbone_config=backbone(maps=1), **{"d_model": 32, **DETR, **settings})


def real_time_detr(name):
    return of_transformers(
        name, **DETR, backbone_config=backbone(), d_model=32, encoder_hidden_dim=32, encoder_in_channels=[8] * 3,
        decoder_in_channels=[32] * 3,
    )  # fmt: skip


def with_text(name, text, **settings):
    small = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "vocab_size": 32,
    }
    config = getattr(transformers, text)(**small)
    return of_transformers(name, backbone_config=backbone(), text_config=config, **{**DETR, **settings})


def omdet():
    return with_text(
        "OmDetTurbo", "CLIPTextConfig", vision_features_channels=[32] * 3, backbone_feat_channels=[8] * 3,
        encoder_in_channels=[8] * 3, encoder_hidden_dim=32, decoder_hidden_dim=32, class_embed_dim=16,
        task_encoder_hidden_dim=16, encoder_layers=1, decoder_num_layers=1, num_queries=4,
    )  # fmt: skip


def pixel_decoder():
    """Mask2Former's, whose layers are of deformable attention too."""
    sizes = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 8}
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone(maps=4), encoder_layers=1, decoder_layers=2, num_queries=2, dim_feedforward=8, **sizes
    )
    return transformers.Mask2FormerModel(config).pixel_level_module.decoder


def llama():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return of_transformers("Llama", "ForCausalLM", vocab_size=32, **sizes)


def vit():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return of_transformers("ViT", "ForImageClassification", image_size=16, patch_size=8, **sizes)


def changed_half_way():
    """A detector with another attention in its second layer."""
    model = detector()
    model.model.encoder.layers[1].self_attn = nn.Identity()
    return model


WANTED = "model must be a Deformable DETR of transformers, got "
REFUSES_IT = {
    "DETR": (lambda: detr("Detr"), WANTED + "DetrFor"),
    "Conditional DETR": (lambda: detr("ConditionalDetr"), WANTED + "ConditionalDetrFor"),
    "DAB-DETR": (lambda: detr("DabDetr", hidden_size=32), WANTED + "DabDetrFor"),
    "RT-DETR": (lambda: real_time_detr("RTDetr"), WANTED + "RTDetrFor"),
    "RT-DETRv2": (lambda: real_time_detr("RTDetrV2"), WANTED + "RTDetrV2For"),
    "Grounding DINO": (
        lambda: with_text("GroundingDino", "BertConfig", d_model=32, **DETR),
        WANTED + "GroundingDinoFor",
    ),
    "OmDet": (omdet, WANTED + "OmDetTurboFor"),
    "Mask2Former's pixel decoder": (pixel_decoder, WANTED + "Mask2FormerPixelDecoder"),
    "Llama": (llama, WANTED + "LlamaForCausalLM"),
    "ViT": (vit, WANTED + "ViTFor"),
    "the encoder alone": (lambda: detector().model.encoder, WANTED + "DeformableDetrEncoder"),
    "changed half-way": (changed_half_way, "encoder must have layers of deformable attention, got DeformableDetrEnc"),
}


@pytest.mark.parametrize("name", REFUSES_IT)
def test_other_models_are_refused_and_stay_as_they_were(name):
    build, message = REFUSES_IT[name]
    model = build()
    modules, names = list(model.named_modules()), list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        apply_focus(model, betas=(1.0, 0.5))
    assert list(model.named_modules()) == modules
    assert list(model.state_dict()) == names
    assert "_loss_function" not in vars(model)
    with pytest.raises(ValueError, match="model must have a FocusEncoder"):
        remove_focus(model)


def test_put_into_the_inner_model_and_taken_out_of_it():
    model = detector()
    before = model(**batch(), labels=OBJECTS).loss_dict
    apply_focus(model, 0.4, (1.0, 0.6), 4)
    with pytest.raises(ValueError, match="call remove_focus first"):
        apply_focus(model.model, 0.4, (1.0, 0.6))
    assert "loss_foreground" in model(**batch(), labels=OBJECTS).loss_dict
    remove_focus(model.model)
    again = model(**batch(), labels=OBJECTS).loss_dict
    assert {key: value.item() for key, value in again.items()} == {key: value.item() for key, value in before.items()}

    apply_focus(model, 0.4, (1.0, 0.6), 4)  # the term is there once
    found = model(**batch(), labels=OBJECTS)
    assert not hasattr(model.loss_function.detector, "encoder")
    assert found.loss_dict["loss_foreground"].isfinite()
    remove_focus(model)
    assert "_loss_function" not in vars(model)

    apply_focus(model.model, 0.4, (1.0, 0.6), 4)  # the inner model alone has no loss
    assert isinstance(model.model.encoder, FocusEncoder)
    assert "loss_foreground" not in model(**batch(), labels=OBJECTS).loss_dict
    remove_focus(model)
    assert not isinstance(model.model.encoder, FocusEncoder)


def test_hidden_states_that_the_configuration_asks_for():
    model = detector()
    model.config.output_hidden_states = True
    with torch.no_grad():
        dense = model(**batch()).encoder_hidden_states
        apply_focus(model, 0.4, (1.0, 0.6), 4)
        sparse = model(**batch()).encoder_hidden_states
        assert [each.shape for each in sparse] == [each.shape for each in dense]
        assert torch.equal(sparse[0], dense[0])
        assert model(**batch(), output_hidden_states=False).encoder_hidden_states is None


def test_strides_can_be_given_for_a_backbone_that_ends_elsewhere():
    model = detector("ConvNext", maps=4)
    apply_focus(model, 0.4, (1.0, 0.6), 4, strides=(2, 4, 8, 16))
    assert model.loss_function.strides == (2, 4, 8, 16)
    assert apply_focus(detector("ConvNext", maps=4), 0.4, (1.0, 0.6)).loss_function.strides == (4, 8, 16, 32)

"""An image classifier as an ONNX file, run by onnxruntime."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from assay.errors import AssayError, InputError
from assay.tuner.export import export
from assay.tuner.images import onnx_file
from assay.tuner.images.artefact import load
from assay.tuner.images.models import logits
from assay.tuner.images.recipe import ImageRecipe, ImageStep


def residual():
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    )


def transformer():
    return ViTForImageClassification(
        ViTConfig(
            image_size=16,
            patch_size=4,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            num_labels=3,
        )
    )


def made(folder, make, *steps):
    """An artefact with those steps, without a run of tuning."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    make().save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    ImageRecipe(steps=tuple(steps)).save(folder / "recipe.toml")
    generator = torch.Generator().manual_seed(1)
    save_file(
        {f"batch{i}": torch.rand(4, 3, 16, 16, generator=generator) for i in range(2)},
        folder / "calibration.safetensors",
    )
    return folder


@pytest.mark.parametrize(("make", "steps", "behind"), [
    (residual, ["fold_batch_norm", "channels_last", "compile"], ("channels_last", "compile")),
    (transformer, ["bfloat16", "merge_tokens"], ("bfloat16",)),
])  # fmt: skip
def test_the_file_says_what_the_model_says(tmp_path, make, steps, behind):
    folder = made(tmp_path / "model", make, *(ImageStep(option=name) for name in steps))
    done = export(folder, "onnx", tmp_path / "model.onnx")
    assert done.left == behind
    in_graph = [ImageStep(option=name) for name in steps if name in onnx_file.IN_GRAPH]
    ImageRecipe(steps=tuple(in_graph)).save(folder / "recipe.toml")
    model = load(folder).model
    pixels = torch.rand(5, 3, 16, 16)
    with torch.inference_mode():
        assert torch.allclose(onnx_file._run(done.path, pixels), logits(model, pixels), atol=1e-4)


def test_eight_bits_become_the_runtimes_own_operators(tmp_path, monkeypatch):
    import onnx

    monkeypatch.setattr(onnx_file, "LEAST_AGREEMENT", 0.0)  # of random weights
    folder = made(
        tmp_path / "model", residual, ImageStep(option="fold_batch_norm"), ImageStep(option="int8_convolutions")
    )
    done = export(folder, "onnx", tmp_path / "model.onnx")
    kinds = {node.op_type for node in onnx.load(done.path).graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    model = load(folder).model
    pixels = torch.rand(4, 3, 16, 16)
    with torch.inference_mode():
        expected = logits(model, pixels)
    assert (onnx_file._run(done.path, pixels) - expected).norm() / expected.norm() < 0.2


def test_a_file_that_says_something_else_is_not_written(tmp_path, monkeypatch):
    folder = made(tmp_path / "model", residual)
    monkeypatch.setattr(onnx_file, "_run", lambda path, pixels: torch.ones(len(pixels), 3))
    with pytest.raises(AssayError, match="does not say what the model says"):
        export(folder, "onnx", tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def test_language_models_and_image_models_have_formats_of_their_own(tmp_path):
    from tests.tiny import write_tiny_llama

    with pytest.raises(InputError, match="language models in the other formats, got --to onnx"):
        export(write_tiny_llama(tmp_path / "llama"), "onnx", tmp_path / "llama.onnx")
    with pytest.raises(InputError, match="image classifiers are written as onnx"):
        export(made(tmp_path / "model", residual), "gguf", tmp_path / "model.gguf")

"""An image classifier as an ONNX file: pixel values in, logits out, any batch size.

What a recipe does to the graph goes along: folded norms, merged tokens, and 8 bits as ONNX's own quantised operators, whose ranges are
taken from the artefact's pictures by onnxruntime. What belongs to torch (bfloat16, channels last, compilation) stays behind: a runtime
has its own. The file is run once, and must say what the torch model says; in 8 bits its rounding is the runtime's, so what is compared
there is the classes.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from assay.errors import AssayError, InputError, MissingError
from assay.paths import atomic_file
from assay.tuner.images.artefact import is_image_artefact, read_calibration
from assay.tuner.images.models import load_image_model, logits
from assay.tuner.images.recipe import ImageRecipe, apply
from assay.tuner.names import CALIBRATION, RECIPE

IN_GRAPH = ("fold_batch_norm", "merge_tokens")
IN_8_BITS = {"int8_convolutions": ("Conv",), "int8_linears": ("MatMul", "Gemm")}
CLOSE = 1e-3  # largest difference of logits, as a share of the largest
LEAST_AGREEMENT = 0.9  # of the classes of the artefact's pictures, in 8 bits: below, the file is refused
INPUT, OUTPUT = "pixel_values", "logits"
NEEDED = ("onnx", "onnxscript", "onnxruntime")


class _Logits(nn.Module):
    """The model as a function of pixel values alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return logits(self.model, pixel_values)


def write(source: str | Path, output: Path) -> tuple[str, ...]:
    """Write an artefact, or an image classifier as it is, to `output`, completely or not at all; the steps that stay behind.

    Raises MissingError without onnx, onnxscript and onnxruntime, InputError for anything that is no image classifier, AssayError where
    the file does not say what the model says.
    """
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if absent:
        raise MissingError(f"an ONNX file needs {', '.join(absent)}: pip install 'assay[onnx]'")
    loaded = load_image_model(source)
    recipe, batches = ImageRecipe(), [torch.rand(2, 3, 224, 224)]
    if is_image_artefact(source):
        recipe = ImageRecipe.read(Path(source) / RECIPE)
        batches = read_calibration(Path(source) / CALIBRATION) if recipe.steps else []
    if not recipe.steps:
        size = _side(loaded.model)
        batches = [torch.rand(2, _channels(loaded.model), size, size)]
    kept = tuple(step for step in recipe.steps if step.option in IN_GRAPH)
    model = apply(loaded.model, recipe.model_copy(update={"steps": kept}), batches)
    rounded = [operator for step in recipe.steps for operator in IN_8_BITS.get(step.option, ())]
    with atomic_file(output) as temporary, tempfile.TemporaryDirectory(prefix="assay-onnx-") as folder:
        plain = Path(folder) / "plain.onnx"
        _export(model, batches[0], plain)
        _check(plain, model, batches)
        if rounded:
            _quantise(plain, temporary, batches, rounded)
            _check_classes(temporary, model, batches)
        else:
            temporary.write_bytes(plain.read_bytes())
    behind = [step.label() for step in recipe.steps if step.option not in (*IN_GRAPH, *IN_8_BITS)]
    return tuple(behind)


def _export(model: nn.Module, pixels: Tensor, path: Path) -> None:
    sample = (pixels if len(pixels) > 1 else pixels.repeat(2, 1, 1, 1))[:2]
    program: Any = torch.onnx.export(
        _Logits(model).eval(), (sample,), dynamo=True, input_names=[INPUT], output_names=[OUTPUT],
        dynamic_shapes={INPUT: {0: torch.export.Dim("batch")}}, verbose=False,
    )  # fmt: skip
    program.save(str(path), external_data=False)


def _run(path: Path, pixels: Tensor) -> Tensor:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run([OUTPUT], {INPUT: pixels.numpy()})[0])


@torch.inference_mode()
def _check(path: Path, model: nn.Module, batches: list[Tensor]) -> None:
    """Raise AssayError unless the file's logits are the model's, for another batch size than it was exported with too."""
    for pixels in (batches[0], batches[0][:1]):
        expected, found = logits(model, pixels), _run(path, pixels)
        worst = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
        if not worst <= CLOSE:
            raise AssayError(
                f"the ONNX file does not say what the model says: logits differ by {100 * worst:.2g} % of the largest"
            )


@torch.inference_mode()
def _check_classes(path: Path, model: nn.Module, batches: list[Tensor]) -> None:
    same = [bool(a == b) for pixels in batches for a, b in zip(
        logits(model, pixels).argmax(-1), _run(path, pixels).argmax(-1), strict=True)]  # fmt: skip
    share = sum(same) / len(same)
    if share < LEAST_AGREEMENT:
        raise AssayError(
            f"in ONNX's 8 bits the model says another class of {100 * (1 - share):.0f} % of the pictures; it is not written"
        )


def _quantise(plain: Path, output: Path, batches: list[Tensor], operators: list[str]) -> None:
    from onnxruntime import quantization

    class Pictures(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.batches: Iterator[Tensor] = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            pixels = next(self.batches, None)
            return None if pixels is None else {INPUT: pixels.numpy()}

    quantization.quantize_static(
        str(plain), str(output), Pictures(), quant_format=quantization.QuantFormat.QDQ, op_types_to_quantize=operators, per_channel=True,
        activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8, reduce_range=_adds_in_16_bits(),
    )  # fmt: skip


def _adds_in_16_bits() -> bool:
    from assay.methods.core.vision.int8_conv import input_levels

    return input_levels() < 255


def _side(model: nn.Module) -> int:
    size = getattr(getattr(model, "config", model), "image_size", None) or getattr(model, "input_size", 224)
    if not isinstance(size, int):
        raise InputError(f"an ONNX file needs one side of the pictures, got {size!r}")
    return size


def _channels(model: Any) -> int:
    """Channels of its pictures: transformers' configurations say so, and our backbones."""
    config = getattr(model, "config", None)
    found: int = model.in_chans if config is None else getattr(config, "num_channels", 3)
    return found

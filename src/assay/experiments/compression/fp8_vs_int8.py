"""FP8 versus INT8: whether INT8 is at least as good after training, and what an INT8 linear layer gains in time here.

The paper's third claim, 50 to 180 % more silicon for FP8 units, can only be measured on synthesised hardware;
`methods.compression.fp8_vs_int8.hardware_table` models it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from assay.experiments.core import Figure, Quality, Trial, experiment
from assay.measure.stats import bootstrap
from assay.methods.compression.fp8_vs_int8 import fake_quantize, format_report
from assay.methods.compression.int8_linear import Int8Linear, smoothing
from assay.workloads.models import load_model
from assay.workloads.quality import perplexity_increase, relative_increase, window_nll
from assay.workloads.text import calibration_windows, heldout_windows, long_prompt


@experiment(
    "fp8_vs_int8/int8-not-worse-ptq",
    points={
        "smoke": [{"activations": "tensor", "window": 128, "n": 4, "estimator": "minmax", "sample": 2**12}],
        "small": [{"activations": activations} for activations in ("none", "token", "tensor")],
        "full": [{"activations": activations, "window": 1024, "n": 32} for activations in ("none", "token", "tensor")],
    },
    minutes=30,
)
def int8_not_worse(
    activations: str, window: int = 512, n: int = 8, estimator: str = "mse", sample: int = 2**15
) -> Figure:
    """How much higher the perplexity of SmolLM2-135M is in E4 than in INT8, in per cent; above zero INT8 is better.

    Weights per channel in both; activations with one static range a tensor (the paper's setting), a range a token, or left alone.
    Ranges are found on calibration text, perplexities on other text.
    """
    loaded = load_model("smollm2-135m")
    heldout = heldout_windows(loaded.tokenizer, window=window, n=n)
    calibration = [row[None] for row in calibration_windows(loaded.tokenizer, window=window, n=4)]
    nll = {"float32": window_nll(loaded.model, heldout)}
    for name in ("INT8", "E4"):
        changed = fake_quantize(
            copy.deepcopy(loaded.model),
            name,
            calibration,
            activations=activations,  # type: ignore[arg-type]
            estimator=estimator,  # type: ignore[arg-type]
            sample=sample,
        )
        nll[name] = window_nll(changed, heldout)
    gain = bootstrap(relative_increase(nll["INT8"], nll["E4"]).differences.numpy(), perplexity_increase)
    details: dict[str, Any] = {"perplexity": {name: float(value.mean().exp()) for name, value in nll.items()}}
    if activations == "tensor":
        report = format_report(loaded.model, calibration[:2], estimator=estimator, sample=sample)  # type: ignore[arg-type]
        for kind in ("weight", "activation"):
            rows = [row for row in report.rows if row.kind == kind]
            details[f"{kind}: best format"] = {name: report.share(name, kind=kind) for name in rows[0].sqnr}
            details[f"{kind}: INT8 beats E4"] = sum(row.sqnr["INT8"] >= row.sqnr["E4"] for row in rows) / len(rows)
            details[f"{kind}: median kurtosis"] = float(torch.tensor([row.kurtosis for row in rows]).median())
    return Figure(100 * gain.median, "%", low=100 * gain.low, high=100 * gain.high, details=details)


@experiment(
    "fp8_vs_int8/int8-linear-speed",
    points={
        "smoke": [{"layer": "mlp.up_proj", "tokens": 256}],
        "small": [{"layer": layer, "tokens": n} for n in (1, 128, 2048) for layer in ("mlp.down_proj", "mlp.up_proj")],
        "full": [{"layer": layer, "tokens": n} for n in (1, 128, 8000) for layer in ("mlp.down_proj", "mlp.up_proj")],
    },
    minutes=5,
)
def int8_linear_speed(layer: str, tokens: int, block: int = 15) -> Trial:
    """One linear layer of SmolLM2-135M on the inputs it really gets: bfloat16 against W8A8, rounding both ways included."""
    loaded = load_model("smollm2-135m")
    linear: Any = loaded.model.get_submodule(f"model.layers.{block}.{layer}")
    x = _inputs(loaded.model, linear, long_prompt(loaded.tokenizer, tokens))
    seen = _inputs(loaded.model, linear, calibration_windows(loaded.tokenizer, window=512, n=1))
    factor = smoothing(seen.square().mean(0).sqrt(), linear.weight, 0.5)
    int8 = Int8Linear(linear.weight * factor, linear.bias, multiplier=1 / factor, rotation=16)
    bf16 = copy.deepcopy(linear).bfloat16()
    exact, rows = linear(x), x.bfloat16()
    calls = max(1, 2048 // tokens)  # so that a run is long enough to time

    def run(module: nn.Module) -> None:
        for _ in range(calls):
            module(rows)

    def quality() -> Quality:
        similar = [float(torch.cosine_similarity(m(rows).float(), exact, dim=-1).mean()) for m in (int8, bf16)]
        return Quality("cosine similarity to float32", similar[0], similar[1])

    def details() -> dict[str, Any]:
        error = {name: float((m(rows) - exact).norm() / exact.norm()) for name, m in (("int8", int8), ("bf16", bf16))}
        return {"relative error": error, "features": list(linear.weight.shape), "calls a run": calls}

    no_grad = torch.no_grad()
    return Trial(
        no_grad(lambda: run(bf16)), no_grad(lambda: run(int8)), quality=no_grad(quality), details=no_grad(details)
    )


def _inputs(model: nn.Module, layer: nn.Module, ids: Tensor) -> Tensor:
    """What `layer` is given for these tokens: (tokens, features)."""
    kept: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, arguments: kept.append(arguments[0][0].detach().clone()))
    try:
        with torch.no_grad():
            model(ids, logits_to_keep=1)
    finally:
        handle.remove()
    return kept[0]

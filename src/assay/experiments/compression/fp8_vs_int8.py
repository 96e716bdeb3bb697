"""FP8 versus INT8: is INT8 at least as good after training, and how much time does an INT8 linear layer save here?

The paper's third claim, 50 to 180 % more silicon for FP8 units, can only be measured on synthesised hardware;
`methods.compression.fp8_vs_int8.hardware_table` models it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from assay.experiments.core import Figure, Guard, Operator, Quality, Trial, experiment
from assay.measure.stats import bootstrap, student_interval
from assay.methods.compression.fp8_vs_int8 import fake_quantize, format_report, ranges
from assay.methods.core.quantize.int8_linear import Int8Linear, smoothing
from assay.methods.core.quantize.quantizers import Estimator
from assay.workloads.images import digits_split
from assay.workloads.models import load_model
from assay.workloads.quality import perplexity_increase, relative_increase, window_nll
from assay.workloads.text import calibration_windows, heldout_windows, long_prompt

Activations = Literal["tensor", "token", "none"]


@experiment(
    "fp8_vs_int8/int8-not-worse-ptq",
    points={
        "smoke": [{"net": "digits"}],
        "small": [{"net": "digits"}, {"activations": "token", "window": 256, "n": 6}],
        "full": [
            {"net": "digits"},
            *({"activations": activations, "window": 1024, "n": 32} for activations in ("none", "token", "tensor")),
        ],
    },
    decides={"small": {"net": "digits"}, "full": {"net": "digits"}},
    operator=Operator("eight-bit formats after training", free="float32, which loses nothing and saves nothing"),
    paper={
        "weights": "a range an output channel",
        "activations": "tensor",
        "net": "ResNet18 and other well-behaved networks",
    },
    departures={
        "net": "a small convolutional net on handwritten digits: neither the networks nor ImageNet are to be had offline"
    },
    tolerance=0.002,
    measured_here="perplexity (exp of the mean loss) of a digits classifier, three trainings",
    refuted_if="INT8 loses more than 0.2 % of perplexity against E4",
    minutes=30,
)
def int8_not_worse(
    activations: Activations = "tensor",
    net: str = "smollm2-135m",
    window: int = 512,
    n: int = 8,
    estimator: Estimator = "mse",
    sample: int = 2**15,
) -> Figure:
    """Perplexity (exp of the mean loss) in E4 over that in INT8; at least 1 is the paper's "equal or better".

    "Equal" reaches 0.2 % (our choice: less than the search of a range deleted costs here). Weights per channel in both; activations with
    one static range a tensor (the paper's setting), a range a token, or left alone. Ranges are found on calibration data, losses on
    other data. "digits" is the well-behaved network of the claim, a small convolutional net; its interval is over three trainings.
    SmolLM2-135M is not well-behaved: a few activations are hundreds of times larger than the rest (see the kurtosis), a static INT8
    step that reaches them rounds the rest to nothing, and E4, whose steps shrink with the value, does not mind. A range a token
    repairs INT8, and that is what the transform uses.

    The controls are INT8 with ranges sixteen times those the search found (the search deleted), and with ranges that are off by a random
    power of two: both must lose.
    """
    if net not in ("digits", "smollm2-135m"):
        raise ValueError(f"net must be 'digits' or 'smollm2-135m', got {net!r}")
    subjects = [_digits_net(seed) for seed in range(3)] if net == "digits" else [_language_model(net, window, n)]
    settings: dict[str, Any] = {"activations": activations, "estimator": estimator, "sample": sample}
    found = [_losses_of_formats(*subject, settings) for subject in subjects]
    gains = [relative_increase(nll["INT8"], nll["E4"]) for nll in found]
    if len(found) > 1:
        over = student_interval([float(gain.relative) for gain in gains])
        low, value, high = over.low, over.median, over.high
    else:
        sampled = bootstrap(gains[0].differences.numpy(), perplexity_increase)  # the windows are of different documents
        low, value, high = sampled.low, sampled.median, sampled.high
    controls = {
        name: 1 + float(relative_increase(found[0][broken], found[0]["E4"]).relative)
        for name, broken in (("deleted", "INT8, ranges 16x"), ("random", "INT8, random ranges"))
    }
    mean = {name: [float(nll[name].mean().exp()) for nll in found] for name in found[0]}
    details: dict[str, Any] = {"perplexity": mean}
    if activations == "tensor":
        model, calibration, _ = subjects[0]
        report = format_report(model, calibration[:2], estimator=estimator, sample=sample)
        for kind in ("weight", "activation"):
            rows = [row for row in report.rows if row.kind == kind]
            details[f"{kind}: best format"] = {name: report.share(name, kind=kind) for name in rows[0].sqnr}
            details[f"{kind}: INT8 beats E4"] = sum(row.sqnr["INT8"] >= row.sqnr["E4"] for row in rows) / len(rows)
            details[f"{kind}: median kurtosis"] = float(torch.tensor([row.kurtosis for row in rows]).median())
    return Figure(1 + value, "x", low=1 + low, high=1 + high, controls=controls, details=details)


Subject = tuple[nn.Module, list[Tensor], Callable[[nn.Module], Tensor]]


def _losses_of_formats(
    model: nn.Module, calibration: list[Tensor], losses: Callable[[nn.Module], Tensor], settings: dict[str, Any]
) -> dict[str, Tensor]:
    """Losses of the model in float32, INT8 and E4, and in INT8 with ranges that no search has found."""
    found = {"float32": losses(model)}
    for name in ("INT8", "E4"):
        found[name] = losses(fake_quantize(copy.deepcopy(model), name, calibration, **settings))
    generator = torch.Generator().manual_seed(0)
    for name in ("INT8, ranges 16x", "INT8, random ranges"):
        changed = fake_quantize(copy.deepcopy(model), "INT8", calibration, learn_ranges=True, **settings)
        with torch.no_grad():
            for parameter in ranges(changed):
                power = (
                    torch.randint(-4, 5, (), generator=generator) if name == "INT8, random ranges" else torch.tensor(4)
                )
                parameter.mul_(2.0**power)
        found[name] = losses(changed)
    return found


def _language_model(name: str, window: int, n: int) -> Subject:
    loaded = load_model(name)
    calibration = [row[None] for row in calibration_windows(loaded.tokenizer, window=window, n=4)]
    return loaded.model, calibration, partial(window_nll, windows=heldout_windows(loaded.tokenizer, window=window, n=n))


def _digits_net(seed: int) -> Subject:
    """A convolutional net trained on scikit-learn's digits, images to calibrate on, and its losses on images it never saw."""
    images, kinds, unseen, answers = digits_split()
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)),
    )
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(15):
        for batch in torch.randperm(len(images)).split(64):
            optimiser.zero_grad()
            torch.autograd.backward([nn.functional.cross_entropy(model(images[batch]), kinds[batch])])
            optimiser.step()

    def losses(changed: nn.Module) -> Tensor:
        with torch.no_grad():
            return nn.functional.cross_entropy(changed(unseen), answers, reduction="none")

    return model.eval(), [images[:256]], losses


@experiment(
    "fp8_vs_int8/int8-linear-speed",
    points={
        "smoke": [{"layer": "mlp.up_proj", "tokens": 256}],
        "small": [
            *({"layer": "mlp.up_proj", "tokens": n} for n in (1, 128, 2048)),
            {"layer": "mlp.down_proj", "tokens": 2048},
        ],
        "full": [{"layer": layer, "tokens": n} for n in (1, 128, 8000) for layer in ("mlp.down_proj", "mlp.up_proj")],
    },
    decides={
        "small": {"layer": "mlp.up_proj", "tokens": 2048},
        "full": {"layer": "mlp.up_proj", "tokens": 8000},
    },
    operator=Operator("a linear layer", free="torch's own INT8 layer (quantize_dynamic)"),
    paper={"weights": "a range an output channel", "activations": "tensor"},
    departures={"activations": "a range a token: a static one a tensor ruins language models (see the other claim)"},
    guard=Guard("cosine similarity to float32", 0.005, higher_is_better=True, relative=False),
    refuted_if="the INT8 layer is slower than the bfloat16 one",
    minutes=5,
)
def int8_linear_speed(layer: str, tokens: int, block: int = 15) -> Trial:
    """One linear layer of SmolLM2-135M on the inputs it really gets: bfloat16 against W8A8, rounding both ways included.

    Similarities are means over eight documents, which the interval resamples. SmolLM2's weights lie on the grid of a 4-bit file, so that
    the details have the same for weights moved off it by noise as large as half its step.
    """
    loaded = load_model("smollm2-135m")
    linear: Any = loaded.model.get_submodule(f"model.layers.{block}.{layer}")
    x = _inputs(loaded.model, linear, long_prompt(loaded.tokenizer, tokens))
    seen = _inputs(loaded.model, linear, calibration_windows(loaded.tokenizer, window=512, n=1))
    factor = smoothing(seen.square().mean(0).sqrt(), linear.weight, 0.5)

    def quantized(weight: Tensor) -> nn.Module:
        return Int8Linear(weight * factor, linear.bias, multiplier=1 / factor, rotation=16)

    int8, bf16 = quantized(linear.weight), copy.deepcopy(linear).bfloat16()
    dynamic = torch.ao.quantization.quantize_dynamic(nn.Sequential(copy.deepcopy(linear)), {nn.Linear}, torch.qint8)
    rows = x.bfloat16()
    calls = max(1, 2048 // tokens)  # so that a run is long enough to time

    def run(module: nn.Module, given: Tensor) -> None:
        for _ in range(calls):
            module(given)

    def similarity(module: Callable[[Tensor], Tensor], documents: list[Tensor], weight: Tensor) -> Tensor:
        exact = [nn.functional.linear(document, weight, linear.bias) for document in documents]
        pairs = zip(documents, exact, strict=True)
        return torch.stack([torch.cosine_similarity(module(d).float(), e, dim=-1).mean() for d, e in pairs]).double()

    def quality() -> Quality:
        documents = [
            _inputs(loaded.model, linear, row[None]) for row in heldout_windows(loaded.tokenizer, window=128, n=8)
        ]
        generator = torch.Generator().manual_seed(0)
        signs = linear.weight.sign() * linear.weight.abs().mean()
        shuffled = linear.weight.flatten()[torch.randperm(linear.weight.numel(), generator=generator)].view_as(
            linear.weight
        )
        arms = {
            "bf16": lambda d: bf16(d.bfloat16()),
            "int8": lambda d: int8(d.bfloat16()),
            "deleted": lambda d: nn.functional.linear(d, signs, linear.bias),  # the magnitudes of the weights left out
            "random": quantized(shuffled),
            "rival": dynamic,
        }
        found = {name: similarity(arm, documents, linear.weight) for name, arm in arms.items()}
        difference = student_interval((found["int8"] - found["bf16"]).tolist())
        base = float(found["bf16"].mean())
        off = linear.weight + 0.5 * _grid_step(linear.weight) * torch.randn(linear.weight.shape, generator=generator)
        details["cosine similarity off the 4-bit grid"] = float(similarity(quantized(off), documents, off).mean())
        controls = {name: float(found[name].mean()) for name in ("deleted", "random", "rival")}
        low, middle, high = (base + end for end in (difference.low, difference.median, difference.high))
        return Quality(
            middle, base, low, high, controls=controls, rival="torch's INT8 layer without smoothing and rotation"
        )

    details: dict[str, Any] = {"features": list(linear.weight.shape), "calls a run": calls}
    no_grad = torch.no_grad()
    return Trial(
        no_grad(lambda: run(bf16, rows)),
        no_grad(lambda: run(int8, rows)),
        free=no_grad(lambda: run(dynamic, x)),
        quality=no_grad(quality),
        details=lambda: details,
    )


def _grid_step(weight: Tensor, group: int = 32) -> Tensor:
    """The step of a 4-bit grid with scale and minimum for each group of inputs, as large as the weights."""
    groups = weight.detach().unflatten(1, (-1, group))
    step = (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / 15
    return step.expand_as(groups).flatten(1)


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

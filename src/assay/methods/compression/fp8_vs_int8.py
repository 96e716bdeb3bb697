"""FP8 versus INT8 for efficient deep learning inference (arXiv 2303.17951): which 8-bit format for which tensor, and at what cost.

- `expected_error`, `expected_sqnr`, `product_error`: what a grid costs on a known distribution, exactly (the paper's section 3).
- `format_report`: which format suits the weights and activations of a model, layer by layer.
- `fake_quantize`: a whole model in INT8 or E2..E5, for its accuracy after training (PTQ) or to train on (QAT).
- `hardware_table`: what a multiply-accumulate unit of each format costs in silicon, as a model.
- `transform`: what the paper recommends, INT8, applied for speed: every linear layer in W8A8 (`int8_linear`).

When not to use it: fake quantisation makes a model slower, never faster; on processors whose FP8 and INT8 units have the same rate
(recent GPUs) the paper's hardware argument does not hold.

Outliers decide. In language models a few activations are hundreds of times larger than the rest. A static INT8 range for a whole
tensor must then either reach them, with a step that rounds the rest to nothing, or cut them off; an estimator only chooses between
the two, while the steps of E4 shrink with the value (evidence: `fp8_vs_int8/int8-not-worse-ptq`, "mse"). There use a range a token
(`activations="token"`), train on it (`learn_ranges`), or take `transform`, which has a range a token, smooths and rotates. Without
outliers INT8 is as good as the paper says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from assay import checks
from assay.errors import MissingError
from assay.methods.core.layers.linears import left_alone, linears, share
from assay.methods.core.layers.stand_in import stand_in
from assay.methods.core.layers.surgery import CONVOLUTIONS, find, linear_kinds, output_layer, takes_token_ids
from assay.methods.core.quantize.int8_linear import fusable_blocks, power_of_two, quantize_linears, select
from assay.methods.core.quantize.quantizers import (
    EIGHT_BIT,
    ESTIMATORS,
    Estimator,
    Quantizer,
    kurtosis,
    make_quantizer,
    sqnr,
)
from assay.methods.transform import LEAST_SHARE, Effect, Fit, TuneContext, only

# Expected error on a known distribution --------------------------------------------------------------------------------------


class Distribution(Protocol):
    """A density that can be integrated piece by piece; symmetric around zero."""

    def moments(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Integrals of p, x p and x^2 p over each [low, high], float64."""
        ...


@dataclass(frozen=True)
class Uniform:
    """Constant density on [-width, width]."""

    width: float = 1.0

    def moments(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, b = low.clamp(-self.width, self.width), high.clamp(-self.width, self.width)
        return tuple((b**n - a**n) / (2 * n * self.width) for n in (1, 2, 3))  # type: ignore[return-value]


@dataclass(frozen=True)
class Gaussian:
    """Normal density with standard deviation `sigma`."""

    sigma: float = 1.0

    def moments(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, b = low / self.sigma, high / self.sigma
        at_a, at_b = (torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi) for x in (a, b))
        mass = torch.special.ndtr(b) - torch.special.ndtr(a)
        return mass, self.sigma * (at_a - at_b), self.sigma**2 * (mass + a * at_a - b * at_b)


@dataclass(frozen=True)
class StudentT:
    """Student's t with `nu` > 2 degrees of freedom, scaled by `sigma`: heavy tails for small nu, Gaussian for large.

    Raises ValueError for nu <= 2, where the variance and with it the signal's energy is infinite; MissingError without scipy.
    """

    nu: float
    sigma: float = 1.0

    def __post_init__(self) -> None:
        if not self.nu > 2:
            raise ValueError(f"nu must be above 2 (the variance is infinite otherwise), got {self.nu}")

    def moments(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        try:
            from scipy.special import stdtr
        except ImportError:
            raise MissingError("Student's t needs scipy: pip install scipy") from None
        nu, a, b = self.nu, low / self.sigma, high / self.sigma
        norm = math.exp(math.lgamma((nu + 1) / 2) - math.lgamma(nu / 2)) / math.sqrt(nu * math.pi)

        def mass(degrees: float, stretch: float) -> Tensor:
            return torch.as_tensor(stdtr(degrees, (b * stretch).numpy()) - stdtr(degrees, (a * stretch).numpy()))

        def first(x: Tensor) -> Tensor:  # antiderivative of -x p
            return norm * nu / (nu - 1) * (1 + x.square() / nu) ** (-(nu - 1) / 2)

        # (1 + x^2 / nu) p is, up to a factor, the density with two degrees of freedom fewer
        inner = (nu - 1) / (nu - 2) * mass(nu - 2, math.sqrt((nu - 2) / nu))
        whole = mass(nu, 1.0)
        return whole, self.sigma * (first(a) - first(b)), self.sigma**2 * nu * (inner - whole)


@dataclass(frozen=True)
class ErrorMoments:
    """Second moments of a value x and its error e = x - Q(x)."""

    signal: float  # E x^2
    error: float  # E e^2
    cross: float  # E x e

    @property
    def sqnr(self) -> float:
        """Signal to quantisation noise in dB."""
        return 10 * math.log10(self.signal / self.error)


def expected_error(grid: Tensor, distribution: Distribution) -> ErrorMoments:
    """The exact moments of rounding to the nearest value of an ascending grid, summed over its cells.

    Raises ValueError for a grid that is not ascending or has fewer than two values.
    """
    g = grid.detach().double().flatten()
    if len(g) < 2 or not bool((g[1:] > g[:-1]).all()):
        raise ValueError("grid must hold at least two values in ascending order, without repeats")
    middle, far = (g[1:] + g[:-1]) / 2, torch.tensor([1e30], dtype=torch.float64)
    mass, first, second = distribution.moments(torch.cat([-far, middle]), torch.cat([middle, far]))
    error = float((second - 2 * g * first + g.square() * mass).sum())
    return ErrorMoments(float(second.sum()), error, float((second - g * first).sum()))


def expected_sqnr(
    quantizer: Quantizer, distribution: Distribution, *, octaves: int = 14, steps: int = 32
) -> tuple[float, float]:
    """Best SQNR in dB of a format on a distribution, and the range that gives it (the quantiser is left at that range).

    Ranges from 1/4 of the root mean square up are tried, `steps` an octave.
    """
    one = torch.tensor([0.0, 1.0])
    rms = math.sqrt(expected_error(one, distribution).signal)
    candidates = [rms * 2 ** (i / steps - 2) for i in range(octaves * steps)]
    best = max((expected_error(quantizer.set_range(c).grid(), distribution).sqnr, c) for c in candidates)
    quantizer.set_range(best[1])
    return best


def product_error(x: ErrorMoments, y: ErrorMoments) -> float:
    """E[(x y - Q(x) Q(y))^2] for independent x and y: both error terms, their product, and the signed cross terms.

    With e the errors, x y - Q(x) Q(y) = x e_y + y e_x - e_x e_y.
    """
    squares = x.signal * y.error + y.signal * x.error + x.error * y.error
    return squares + 2 * (x.cross * y.cross - x.cross * y.error - y.cross * x.error)


# Advice for a model ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorReport:
    """One weight, or the inputs of one layer: SQNR in dB by format, the format with the highest, and the kurtosis."""

    layer: str
    kind: Literal["weight", "activation"]
    kurtosis: float
    sqnr: dict[str, float]

    @property
    def best(self) -> str:
        return max(self.sqnr, key=self.sqnr.__getitem__)


@dataclass(frozen=True)
class FormatReport:
    """What `format_report` found, one row a tensor."""

    rows: list[TensorReport]

    def share(self, *formats: str, kind: str | None = None) -> float:
        """The share of tensors (of one kind, or all) whose best format is among `formats`."""
        rows = [row for row in self.rows if kind in (None, row.kind)]
        return sum(row.best in formats for row in rows) / len(rows)

    def __str__(self) -> str:
        width = max(len(row.layer) for row in self.rows)
        names = list(self.rows[0].sqnr)
        lines = [f"{'layer':{width}}  kind        best  kurtosis  " + "  ".join(f"{name:>5}" for name in names)]
        for row in self.rows:
            figures = "  ".join(f"{row.sqnr[name]:5.1f}" for name in names)
            lines.append(f"{row.layer:{width}}  {row.kind:10}  {row.best:4}  {row.kurtosis:8.1f}  {figures}")
        return "\n".join(lines)


def format_report(
    model: nn.Module,
    data: Iterable[Any],
    *,
    formats: Iterable[str] = EIGHT_BIT,
    per_channel: bool = True,
    estimator: Estimator = "mse",
    sample: int = 2**17,
) -> FormatReport:
    """Which 8-bit format suits each weight and each layer's inputs, by SQNR.

    `data` holds the model's inputs (a tensor, a tuple of arguments, or a mapping of keyword arguments each). Weights are
    quantised per output channel (or per tensor with `per_channel=False`), inputs per tensor, the same for every format: anything
    else would compare granularities. INT8 is symmetric for weights and has a zero point for inputs. At most `sample` values a
    tensor are looked at. Raises ValueError when the model has no linear or convolution layer, or data reaches none.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    >>> report = format_report(model, [torch.randn(8, 64)])
    >>> [(row.layer, row.kind) for row in report.rows]
    [('0', 'weight'), ('0', 'activation'), ('2', 'weight'), ('2', 'activation')]
    """
    names = list(formats)
    if not names:
        raise ValueError("formats must name at least one format, got none")
    sample = checks.whole("sample", sample, low=1)
    inputs = _layer_inputs(model, data, sample)
    rows = []
    for layer, module in _layers(model).items():
        if layer not in inputs:
            continue
        weight = module.weight.detach()
        if _channels(module):
            weight = weight.T
        weight = weight[:: max(1, weight.numel() // sample)]  # whole channels
        for kind, x, axis in (("weight", weight, 0 if per_channel else None), ("activation", inputs[layer], None)):
            found = {}
            for name in names:
                quantizer = make_quantizer(name, axis=axis, symmetric=kind == "weight").calibrate(x, estimator)
                found[name] = sqnr(x, quantizer(x))
            rows.append(TensorReport(layer, kind, kurtosis(x), found))  # type: ignore[arg-type]
    return FormatReport(rows)


# Whole models ----------------------------------------------------------------------------------------------------------------


class FakeQuantized(nn.Module):
    """A linear or convolution layer whose weight and inputs are rounded to an 8-bit grid on the way in.

    `inputs` None means a range of its own for every token (the last dimension), found as it comes. The weight is rounded in every
    call, so that whatever becomes of it, or of a learnt range, takes effect at once. Other attributes are those of `layer`.
    """

    def __init__(self, layer: nn.Module, weight: Quantizer, inputs: Quantizer | None, name: str):
        super().__init__()
        self.layer, self.weight_quantizer, self.inputs, self.name = layer, weight, inputs, name

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "layer":
                raise
            return getattr(super().__getattr__("layer"), name)

    @property
    def weight(self) -> Tensor:
        """The rounded weight, made when its numbers are wanted."""
        kept: Tensor = self.layer.weight  # type: ignore[assignment]
        return stand_in(kept.shape, kept.dtype, kept.device, self.rounded_weight)

    def rounded_weight(self) -> Tensor:
        """The weight on its grid, with gradients to the float weight and to a learnt range."""
        return cast(Tensor, self.weight_quantizer(self.layer.weight))

    def forward(self, x: Tensor) -> Tensor:
        if self.inputs is not None:
            rounded = self.inputs(x)
        else:
            peak = x.detach().abs().amax(-1, keepdim=True).float()
            rounded = make_quantizer(self.name).quantize(x.float(), torch.where(peak > 0, peak, 1.0)).to(x.dtype)
        return cast(Tensor, torch.func.functional_call(self.layer, {"weight": self.rounded_weight()}, (rounded,)))

    def extra_repr(self) -> str:
        return self.name


def fake_quantize(
    model: nn.Module,
    name: str,
    calibration: Iterable[Any],
    *,
    per_channel: bool = True,
    activations: Literal["tensor", "token", "none"] = "tensor",
    estimator: Estimator = "mse",
    exclude: Iterable[str] = (),
    head: bool = False,
    learn_ranges: bool = False,
    sample: int = 2**17,
) -> nn.Module:
    """Wrap every linear and convolution layer so that it computes with `name` ("INT8", "E2" .. "E5"), in place; returns the model.

    The paper's setting: weights per output channel, one static range a tensor for activations (asymmetric in INT8), found on
    `calibration` (inputs as for `format_report`). `activations="token"` gives every token its own symmetric range, "none" leaves
    activations alone. A model that is already wrapped is converted: its layers keep their trained weights and get new ranges. With
    `learn_ranges` the ranges are parameters (`ranges`), so that a training loop over the result is quantisation-aware training.
    `exclude` names parts of layer names to leave alone; the output layer is left alone unless `head`. Fused experts of a mixture
    are not layers: put them into the model as layers first (`core.layers.linears.open_`).

    Raises TypeError or ValueError, before anything is changed, for an unknown name or granularity, when calibration does not reach
    a layer, or when less than half of the linear weights would be reached.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    >>> images = torch.randn(16, 64)
    >>> fake_quantize(model, "E4", [images])(images).shape
    torch.Size([16, 10])
    """
    make_quantizer(name)
    checks.choice("activations", activations, ("tensor", "token", "none"))
    checks.choice("estimator", estimator, ESTIMATORS)
    for flag, value in (("per_channel", per_channel), ("head", head), ("learn_ranges", learn_ranges)):
        checks.flag(flag, value)
    sample = checks.whole("sample", sample, low=1)
    if isinstance(exclude, str):
        raise TypeError(f"exclude must be a sequence of names, got {exclude!r}")
    wrapped = {path: module for path, module in model.named_modules() if isinstance(module, FakeQuantized)}
    for path, module in wrapped.items():
        _replace(model, path, module.layer)
    try:
        made = _fake(model, name, calibration, per_channel, activations, estimator, set(exclude), head, sample)
    except BaseException:
        for path, module in wrapped.items():
            _replace(model, path, module)
        raise
    for path, unit in made.items():
        if learn_ranges:
            unit.weight_quantizer.learn_range()
            if unit.inputs is not None and activations == "tensor":
                unit.inputs.learn_range()
        _replace(model, path, unit)
    return model


def _fake(
    model: nn.Module,
    name: str,
    calibration: Iterable[Any],
    per_channel: bool,
    activations: str,
    estimator: Estimator,
    exclude: set[str],
    head: bool,
    sample: int,
) -> dict[str, FakeQuantized]:
    """The wrapped layers by name, nothing changed yet."""
    every = _layers(model)
    known = set(linears(model))
    if not (part := share(model, known & set(every))) >= LEAST_SHARE:
        rest = left_alone(model, known & set(every))
        raise ValueError(
            f"model must let half of its linear weights be reached, got {part:.0%}: {rest or 'the rest is fused'}"
        )
    last = None if head else output_layer(model)
    layers = {path: layer for path, layer in every.items() if layer is not last and not set(path.split(".")) & exclude}
    inputs = _layer_inputs(model, calibration, sample) if activations == "tensor" else {}
    made = {}
    for path, layer in layers.items():
        weight = make_quantizer(name, axis=_channels(layer) if per_channel else None).calibrate(layer.weight, estimator)
        own: Quantizer | None = None
        if activations == "tensor":
            if path not in inputs:
                raise ValueError(f"calibration does not reach the layer {path!r}; leave it out with exclude")
            own = make_quantizer(name, symmetric=False).calibrate(inputs[path], estimator)
        elif activations == "none":
            own = _Unchanged()
        device = layer.weight.device
        made[path] = FakeQuantized(layer, weight.to(device), None if own is None else own.to(device), name)
    return made


def ranges(model: nn.Module) -> Iterator[nn.Parameter]:
    """The learnable ranges of a model that was wrapped with `learn_ranges=True`; they want a smaller learning rate than weights."""
    for module in model.modules():
        if isinstance(module, Quantizer):
            yield from module.parameters(recurse=False)


class _Unchanged(Quantizer):
    def __init__(self) -> None:
        super().__init__(None)

    def forward(self, x: Tensor) -> Tensor:
        return x


def _layers(model: nn.Module) -> dict[str, Any]:
    """Linear layers (Conv1D too) and convolutions of exactly these types: subclasses often bypass their own forward."""
    found: dict[str, Any] = find(model, (*linear_kinds(), *CONVOLUTIONS))
    if not found:
        raise ValueError(f"model has no linear or convolution layer: {type(model).__name__}")
    return found


def _channels(layer: nn.Module) -> int:
    """The dimension of a weight that counts its outputs: the second in GPT-2's transposed Conv1D."""
    return int(type(layer) is linear_kinds()[1])


def _layer_inputs(model: nn.Module, data: Iterable[Any], sample: int) -> dict[str, Tensor]:
    """Sampled inputs of every layer, flat float32, at most `sample` values each."""
    kept: dict[str, list[Tensor]] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            kept.setdefault(name, []).append(_thinned(arguments[0].detach().float().flatten(), sample).clone())

        return hook

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in _layers(model).items()]
    try:
        with torch.no_grad():
            for item in data:
                if isinstance(item, Mapping):
                    model(**item)
                else:
                    model(*(item if isinstance(item, tuple) else (item,)))
    finally:
        for handle in handles:
            handle.remove()
    if not kept:
        raise ValueError("data must hold at least one input that reaches a layer")
    return {name: _thinned(torch.cat(pieces), sample) for name, pieces in kept.items()}


def _thinned(values: Tensor, sample: int) -> Tensor:
    """About `sample` of the values, spread over all of them (the stride is odd, so that it meets every channel), and both extremes.

    A range that misses the few largest activations of a language model ruins it.
    """
    if values.numel() <= sample:
        return values
    stride = -(-values.numel() // sample) | 1
    return torch.cat([values[::stride], values.amin()[None], values.amax()[None]])


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


# Hardware --------------------------------------------------------------------------------------------------------------------

Accumulator = Literal["integer", "fixed point", "float32"]
PAPER_OVERHEAD = (0.5, 1.8)  # FP8 units are 50 to 180 % less efficient than INT8: the paper's abstract
MUX, HEADROOM = 0.45, 12  # full adders a two-way multiplexer takes; bits for 4096 additions: our choice


@dataclass(frozen=True)
class MacCost:
    """A multiply-accumulate unit in full-adder equivalents, by part; `ratio` to INT8 with a 32-bit accumulator."""

    name: str
    accumulator: Accumulator
    multiplier: float
    exponent: float
    align: float
    add: float
    normalise: float

    @property
    def total(self) -> float:
        return self.multiplier + self.exponent + self.align + self.add + self.normalise

    @property
    def ratio(self) -> float:
        return self.total / hardware_cost("INT8", "integer").total


def hardware_cost(name: str, accumulator: Accumulator) -> MacCost:
    """The silicon of one unit, counted from its parts.

    The counting is our choice (the paper counts gates of synthesised designs): an n x n multiplier is n^2 full adders, an adder
    one a bit, a shifter `MUX` a bit and stage. A "fixed point" accumulator is wide enough to add products exactly (Kulisch), so its
    width doubles with every exponent bit; "float32" aligns, adds and normalises 27 bits. "integer" is INT8 with 32 bits.
    Raises ValueError for an unknown name, or an accumulator that does not fit the format.
    """
    if name not in EIGHT_BIT:
        raise ValueError(f"name must be one of {', '.join(EIGHT_BIT)}, got {name!r}")
    if (name == "INT8") != (accumulator == "integer") or accumulator not in ("integer", "fixed point", "float32"):
        allowed = "integer" if name == "INT8" else "fixed point or float32"
        raise ValueError(f"accumulator for {name} must be {allowed}, got {accumulator!r}")
    if name == "INT8":
        return MacCost(name, accumulator, multiplier=64, exponent=0, align=0, add=32, normalise=0)
    e = int(name[1:])
    m = 7 - e
    multiplier, exponent = float((m + 1) ** 2), float(e + 1)
    if accumulator == "fixed point":
        positions = 2 * (2**e - 2)  # the exponents of the smallest and the largest product differ by this
        width = positions + 2 * (m + 1) + HEADROOM
        return MacCost(name, accumulator, multiplier, exponent, MUX * width * math.ceil(math.log2(positions)), width, 0)
    width = 27
    shifter = MUX * width * math.ceil(math.log2(width))
    return MacCost(name, accumulator, multiplier, exponent + 9, shifter, width, shifter + width)


def hardware_table() -> list[MacCost]:
    """Every format with every accumulator that fits it, INT8 first."""
    rows = [hardware_cost("INT8", "integer")]
    accumulator: Accumulator
    for accumulator in ("fixed point", "float32"):
        rows += [hardware_cost(name, accumulator) for name in EIGHT_BIT[1:]]
    return rows


# The tuner -------------------------------------------------------------------------------------------------------------------

CALIBRATION_WINDOWS = 4  # of the context's texts; more changed nothing on the bundled model, our choice


class Int8Linears:
    """Every linear layer in W8A8 with compiled kernels, fused into the blocks of the llama family.

    Configuration: `smooth` (alpha of SmoothQuant in 0..1, or None), `rotation` (size of the Hadamard transform, 1 for none), `skip`
    (layer names to leave alone), `head` (whether the output layer is done too; it matters when decoding).
    """

    name = "fp8_vs_int8"
    slot = "linear"
    goals: frozenset[str] = frozenset({"ttft", "throughput", "decode", "memory"})
    exact = False

    def applies_to(self, model: nn.Module, context: TuneContext) -> Fit:
        chosen = select(model)
        if not chosen:
            return Fit(False, "no plain linear layers to quantise")
        devices = {linear.weight.device.type for linear in chosen.values()}
        if devices != {"cpu"}:
            return Fit(False, f"made for the CPU; the model is on {', '.join(sorted(devices))}")
        part, rest = share(model, chosen), left_alone(model, chosen)
        if not part >= LEAST_SHARE:
            return Fit(False, f"it reaches {part:.0%} of the weights only: {rest}", share=part, reached=rest)
        size = next(iter(chosen.values())).weight.element_size()
        effects = [Effect("linear", bytes=part / size + 1 - part, dtype="int8")]
        if fusable_blocks(model, chosen):
            # norms, rotary embedding and gate no longer pass through memory: 0.3 is counted
            effects.append(Effect("other", bytes=0.3))
        return Fit(True, effects=tuple(effects), share=part, reached=rest)

    def configs(self, model: nn.Module, context: TuneContext) -> list[dict[str, Any]]:
        head = context.goal in ("decode", "throughput") and isinstance(output_layer(model), nn.Linear)
        plain: dict[str, Any] = {"smooth": None, "rotation": 16, "skip": [], "head": head}
        first = plain | {"smooth": 0.5}
        if not context.calibration or not takes_token_ids(model):
            return [plain]
        if context.goal == "memory":  # calibrating runs the whole model, which may set the peak
            return [plain, first]
        safer = first | {"head": False}
        if select(model, ("down_proj",)):
            safer["skip"] = ["down_proj"]
        return [first, safer, plain] if safer != first else [first, plain]

    def check(self, config: Mapping[str, Any]) -> None:
        """Raises ValueError or TypeError naming the setting that is wrong."""
        only(config, ("smooth", "rotation", "skip", "head"))
        skip = config.get("skip", ())
        if not isinstance(skip, list | tuple) or not all(isinstance(name, str) for name in skip):
            raise TypeError(f"skip must be a list of layer names, got {skip!r}")
        checks.flag("head", config.get("head", False))
        power_of_two(config.get("rotation", 16))
        if config.get("smooth") is not None:
            checks.number("smooth", config["smooth"], low=0, high=1)

    def apply(self, model: nn.Module, config: Mapping[str, Any], context: TuneContext) -> nn.Module:
        """Raises TypeError or ValueError, before anything is changed, for a configuration or a model it does not fit."""
        self.check(config)
        skip, head = config.get("skip", ()), config.get("head", False)
        if config.get("smooth") is not None and not takes_token_ids(model):
            raise ValueError(f"smooth needs a model that is calibrated on token ids, got {type(model).__name__}")
        if missing := [name for name in skip if not select(model, (name,), head=True)]:
            raise ValueError(f"skip must name linear layers of the model, got {missing[0]!r}, which names none")
        chosen = select(model, exclude=(), head=head)
        if not chosen:
            raise ValueError("model has no plain linear layers to quantise")
        if not select(model, exclude=tuple(skip), head=head):
            raise ValueError(f"skip must leave a linear layer to quantise, got {list(skip)}")
        if not (part := share(model, chosen)) >= LEAST_SHARE:
            raise ValueError(
                f"model must let half of its weights be reached, got {part:.0%}: {left_alone(model, chosen)}"
            )
        return quantize_linears(
            model,
            exclude=tuple(skip),
            head=head,
            smooth=config.get("smooth"),
            rotation=config.get("rotation", 16),
            calibration=list(context.calibration)[:CALIBRATION_WINDOWS],
        )

    def describe(self, config: Mapping[str, Any]) -> str:
        extras = [] if config.get("rotation", 16) == 1 else ["rotation"]
        extras += ["smoothing"] if config.get("smooth") is not None else []
        words = "INT8 linears" + (f" with {' and '.join(extras)}" if extras else "")
        words += ", the output layer too" if config.get("head") is True else ""
        skipped = [str(name).replace("_", " ") for name in config.get("skip") or ()]
        return f"{words}, except {' and '.join(skipped)}" if skipped else words


transform = Int8Linears()

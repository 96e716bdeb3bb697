"""Will it fit, and how fast will it be: said of a model that is not loaded.

Memory is counted. Times are the roofline's, which nothing beats, and what a few blocks of the model's own widths, with random weights, take
besides: whatever a kernel, a cache or the interpreter adds to the bound of one block it adds to each of them. A few blocks and the
projection onto the vocabulary must fit where the whole model may not.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from assay import checks
from assay.measure.clock import OthersWatch, synchronize
from assay.measure.machine import Calibration
from assay.methods.compression.resource_efficient_llm_survey.costs import activation_bytes, least_seconds
from assay.methods.compression.resource_efficient_llm_survey.decoder import FLOATS, Decoder, element_bytes
from assay.methods.compression.resource_efficient_llm_survey.empty import cache_growth, counted
from assay.methods.core.fleet.hardware import Device

FEW, MORE = 1, 5
"""Blocks of the two models that are timed, or as many as there are; our choice."""
RATES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
PATTERN = 65_537
"""Numbers of a random pattern: a prime, so that no two rows of a matrix are alike; our choice."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The calibrated rate of each kind of floats. Packed formats are computed with in several types: theirs is the fastest of all."""


@dataclass(frozen=True)
class Timed:
    """Seconds by length of the prompt: of its prefill, and of a token behind it."""

    prefill: Mapping[int, float]
    token: Mapping[int, float]


@torch.inference_mode()
def timed(
    model: nn.Module, prompt_tokens: Sequence[int], *, new_tokens: int = 8, repeats: int = 3, seed: int = 0
) -> Timed:
    """Time a causal language model of transformers: one prompt of each length, of random tokens, and `new_tokens` greedy ones behind it.

    Medians, of `repeats` prefills and of all steps, each without the first, which warms up. A prompt's logits are those of its last
    token. The times of a dense model do not depend on what the tokens are. Raises ValueError for lengths below 1, `repeats` below 1,
    and fewer than two new tokens.
    """
    lengths = sorted({checks.whole("prompt_tokens", length, low=1) for length in prompt_tokens})
    if not lengths:
        raise ValueError("prompt_tokens must hold at least one length, got none")
    new, repeats = checks.whole("new_tokens", new_tokens, low=2), checks.whole("repeats", repeats, low=1)
    generator = torch.Generator().manual_seed(seed)
    called: Any = model
    vocabulary = int(called.config.get_text_config(decoder=True).vocab_size)
    prefill: dict[int, float] = {}
    token: dict[int, float] = {}
    for length in lengths:
        ids = torch.randint(vocabulary, (1, length), generator=generator)
        taken: list[float] = []
        out: Any = None
        for _ in range(repeats + 1):
            out = None  # or two caches are held
            start = time.perf_counter()
            out = called(input_ids=ids, use_cache=True, logits_to_keep=1)
            synchronize()
            taken.append(time.perf_counter() - start)
        steps: list[float] = []
        for _ in range(new):
            following = out.logits[:, -1:].argmax(-1)
            start = time.perf_counter()
            out = called(input_ids=following, cache=out.cache, use_cache=True)
            synchronize()
            steps.append(time.perf_counter() - start)
        prefill[length], token[length] = statistics.median(taken[1:]), statistics.median(steps[1:])
    return Timed(prefill, token)


def some_blocks(config: Any, layers: int, dtype: torch.dtype) -> nn.Module:
    """A model of the first `layers` blocks of a configuration's decoder in eval mode, its weights one random pattern over and over. The
    configuration stays as it is.

    Attention is SDPA where the model's class has it, else what the class has.
    """
    from transformers import AutoModelForCausalLM

    part = copy.deepcopy(config.get_text_config(decoder=True))
    part._attn_implementation = None  # what the file names was some other machine's choice
    part.num_hidden_layers = checks.whole("layers", layers, low=1)
    if getattr(part, "layer_types", None):
        part.layer_types = list(part.layer_types)[:layers]
    auto: Any = AutoModelForCausalLM
    with _Repeated():
        made: nn.Module = auto.from_config(part, dtype=dtype, trust_remote_code=False)
    return made.eval()


class _Repeated(TorchFunctionMode):
    """Draws `PATTERN` numbers for a large tensor and repeats them: drawing all of a large vocabulary's would take longer than a prompt."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in (torch.Tensor.normal_, torch.Tensor.uniform_) or args[0].numel() <= PATTERN or args[0].is_meta:
            return func(*args, **(kwargs or {}))
        tensor = args[0]
        pattern = func(torch.empty(PATTERN, dtype=tensor.dtype, device=tensor.device), *args[1:], **(kwargs or {}))
        rows = tensor.numel() // PATTERN
        flat = tensor.view(-1)
        flat[: rows * PATTERN].view(rows, PATTERN).copy_(pattern)
        flat[rows * PATTERN :].copy_(pattern[: tensor.numel() - rows * PATTERN])
        return tensor


@dataclass(frozen=True)
class Probe:
    """What models of `few` and of `more` blocks took."""

    few: int
    more: int
    of_few: Timed
    of_more: Timed


def probe(
    make: Callable[[int], nn.Module],
    layers: int,
    prompt_tokens: Sequence[int],
    *,
    new_tokens: int = 8,
    repeats: int = 3,
) -> Probe:
    """Time `make(FEW)` and `make(MORE)`, models of so many blocks of one that has `layers`; see `timed`. One is held at a time."""
    few, more = min(FEW, checks.whole("layers", layers, low=1)), min(MORE, layers)
    taken = {
        blocks: timed(make(blocks), prompt_tokens, new_tokens=new_tokens, repeats=repeats)
        for blocks in sorted({few, more})
    }
    return Probe(few, more, taken[few], taken[more])


def first_blocks(decoder: Decoder, layers: int) -> Decoder:
    """The sizes of a decoder's first `layers` blocks, tables included."""
    return replace(decoder, layers=layers, windows=decoder.windows[:layers])


def foretold(
    decoder: Decoder, seen: Probe, device: Callable[[Decoder], Device], format: str, *, new_tokens: int = 8
) -> Timed:
    """The times to be expected of the whole model: its bound, and for each block what a block of the probe took beside its own bound.

    `device` gives the limits that hold for a model of some size: the weights of a small one may lie in a cache. Nothing is foretold below
    the bound. Where few blocks took longer than more of them, noise made it so: blocks are then taken to cost their bound.
    """

    def bounds(of: Decoder, length: int) -> dict[str, float]:
        return least_seconds(of, device(of), format, length, new_tokens)

    few, more = first_blocks(decoder, seen.few), first_blocks(decoder, seen.more)
    found: dict[str, dict[int, float]] = {"prefill": {}, "token": {}}
    for phase, by_length in found.items():
        for length, seconds in getattr(seen.of_few, phase).items():
            whole, small, large = (bounds(of, length)[phase] for of in (decoder, few, more))
            besides = seconds - small
            a_block = 0.0
            if seen.more > seen.few and getattr(seen.of_more, phase)[length] > seconds:
                excess = getattr(seen.of_more, phase)[length] - large - besides
                a_block = excess / (seen.more - seen.few)
            by_length[length] = max(whole, whole + besides + a_block * (decoder.layers - seen.few))
    return Timed(found["prefill"], found["token"])


def device_for(calibration: Calibration, decoder: Decoder, format: str, memory: float) -> Device:
    """What a calibrated machine does at most for a decoder in a format: the rate of the format's arithmetic, and the bandwidth of the
    fastest memory that can hold the weights which every token reads."""
    name = RATES.get(format, "")
    peak = calibration.peak_flops.get(name) or max(calibration.peak_flops.values())
    threads = f"{calibration.threads} thread" + ("s" if calibration.threads > 1 else "")
    return Device(
        f"{calibration.device} {calibration.fingerprint}, {threads}",
        peak,
        calibration.bandwidth(decoder.step_weight_bytes(format)),
        memory,
    )


@dataclass(frozen=True)
class Forecast:
    """What a model would need and take; bytes, and seconds of the prompt and of one more token. All of it is modelled.

    `needed_bytes` are the weights and what is held besides them at the fullest moment: the prompt's, with `activation_bytes` and a cache
    that no window has cut yet (`prompt_cache_bytes`), or the end of the answer (`cache_bytes`). What the libraries take comes on top.
    `least_*_seconds` are the roofline's. `uncounted` names what is missing where not all could be counted;
    `noisy` says that other processes kept the machine busy while blocks were timed, so that what they foretell is too long.
    """

    format: str
    prompt_tokens: int
    new_tokens: int
    parameters: int
    parameters_without_tables: int
    weight_bytes: float
    cache_bytes: float
    prompt_cache_bytes: float
    activation_bytes: float
    available_bytes: float
    least_prefill_seconds: float = 0.0
    least_token_seconds: float = 0.0
    prefill_seconds: float = 0.0
    token_seconds: float = 0.0
    uncounted: str = ""
    noisy: bool = False

    @property
    def needed_bytes(self) -> float:
        """The most that is held at once, of what is counted."""
        return self.weight_bytes + max(self.prompt_cache_bytes + self.activation_bytes, self.cache_bytes)

    @property
    def fits(self) -> bool:
        """Whether what is counted is available."""
        return self.needed_bytes <= self.available_bytes


def memory_forecast(
    decoder: Decoder, format: str, prompt_tokens: int, new_tokens: int, available_bytes: float
) -> Forecast:
    """The part of a forecast that is only counted; all its seconds are 0.

    >>> small = Decoder(layers=2, width=64, heads=4, kv_heads=2, head_dim=16, feed_forward=96, gated=True, vocabulary=100, tied=True)
    >>> found = memory_forecast(small, "bf16", 8, 4, 1e6)
    >>> found.weight_bytes, found.cache_bytes, found.fits
    (135680.0, 2816.0, True)
    """
    prompt, new = checks.whole("prompt_tokens", prompt_tokens, low=1), checks.whole("new_tokens", new_tokens, low=1)
    size = element_bytes(format)
    return Forecast(
        format,
        prompt,
        new,
        decoder.parameters,
        decoder.parameters_without_tables,
        decoder.weight_bytes(format),
        decoder.cache_bytes(prompt + new - 1, element_bytes=size),
        decoder.prompt_cache_bytes(prompt, element_bytes=size),
        activation_bytes(decoder, prompt, format),
        checks.number("available_bytes", available_bytes, low=0),
    )


def with_other_parts(found: Forecast, config: Any) -> Forecast:
    """A decoder's forecast with the weights of the other parts of a model that sees or hears, which are loaded with it."""
    if config.get_text_config(decoder=True) is config:
        return found
    dtype = DTYPES[checks.choice("the forecast's format", found.format, FLOATS)]
    parameters, rest, held = counted(config, dtype)
    return replace(found, parameters=parameters, parameters_without_tables=rest, weight_bytes=float(held))


def other_forecast(config: Any, format: str, prompt_tokens: int, new_tokens: int, available_bytes: float) -> Forecast:
    """`memory_forecast` of a model whose blocks `decoder_of` does not know: its weights, and its cache where that can be counted.

    Activations are not, nor is there a time (`uncounted`). The cache is an upper figure where layers have windows. Raises ValueError for a
    packed format, and what transformers raises for a configuration of which it makes no model.
    """
    prompt, new = checks.whole("prompt_tokens", prompt_tokens, low=1), checks.whole("new_tokens", new_tokens, low=1)
    dtype = DTYPES[checks.choice("format", format, FLOATS)]
    parameters, rest, held = counted(config, dtype)
    missing = f"activations and times of the model type {config.get_text_config(decoder=True).model_type!r}"
    try:
        fixed, each = cache_growth(config, dtype)
    except ValueError:
        fixed, each, missing = 0.0, 0.0, f"cache, {missing}"
    return Forecast(
        format,
        prompt,
        new,
        parameters,
        rest,
        float(held),
        fixed + each * (prompt + new - 1),
        fixed + each * prompt,
        0.0,
        checks.number("available_bytes", available_bytes, low=0),
        uncounted=missing,
    )


def with_times(
    found: Forecast, config: Any, decoder: Decoder, calibration: Calibration, *, repeats: int = 3
) -> Forecast:
    """A forecast with its seconds, for which a few blocks are run (`probe`).

    Raises ValueError for a packed format: its layers are made of a model that is loaded.
    """
    dtype = DTYPES[checks.choice("the forecast's format", found.format, FLOATS)]
    new = max(found.new_tokens, 2)

    def device(of: Decoder) -> Device:
        return device_for(calibration, of, found.format, max(found.available_bytes, 1.0))

    watch = OthersWatch()
    seen = probe(
        lambda layers: some_blocks(config, layers, dtype),
        decoder.layers,
        [found.prompt_tokens],
        new_tokens=min(new, 8),
        repeats=repeats,
    )
    noisy = watch.stop()[1]
    least = least_seconds(decoder, device(decoder), found.format, found.prompt_tokens, new)
    expected = foretold(decoder, seen, device, found.format, new_tokens=new)
    return replace(
        found,
        least_prefill_seconds=least["prefill"],
        least_token_seconds=least["token"],
        prefill_seconds=expected.prefill[found.prompt_tokens],
        token_seconds=expected.token[found.prompt_tokens],
        noisy=noisy,
    )

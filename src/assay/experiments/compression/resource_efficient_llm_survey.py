"""Do the survey's formulas foretell what a model takes, and would one resource have told of the others?

Three models in several number formats are run with prompts of several lengths, and what they take is held against the formulas: memory
counted, prompts by operations, tokens by bytes. A time needs the share of the roofline that is reached; it is measured on the *other*
models, so that every cell is judged by a formula that has not seen its model. What `assay profile` foretells, from a few blocks of the
model itself, stands beside it.

SmolLM2 is loaded from its files. Gemma 3 270M and Llama 68M have their published sizes and random weights: what a dense model takes does
not depend on them. The blocks of the first two happen to have nearly as many parameters, so that what one takes would tell of the other
without any formula; those of the third have a fifth of that.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import psutil
import torch
from torch import nn

from assay.errors import AssayError
from assay.experiments.core import Figure, Operator, experiment
from assay.measure.child import peak_resident, resident
from assay.measure.clock import OthersWatch
from assay.measure.isolate import run_isolated
from assay.measure.machine import Calibration, calibrate
from assay.measure.stats import Interval, student_interval
from assay.methods.builtin import weight_only
from assay.methods.compression.resource_efficient_llm_survey import (
    Decoder,
    Probe,
    Timed,
    activation_bytes,
    decoder_of,
    device_for,
    foretold,
    least_seconds,
    memory_forecast,
    probe,
    some_blocks,
    timed,
)
from assay.methods.core.fleet.hardware import Device
from assay.methods.transform import TuneContext
from assay.workloads.models import model_folder

BUNDLED, GEMMA, LLAMA = "smollm2-135m", "gemma-3-270m", "llama-68m"
DEFAULT_THREADS = torch.get_num_threads()
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.float32, "int4": torch.float32}
"""What a model is made in; the packed formats are then made of its linear layers."""
NOMINAL = {"fp32": 32, "bf16": 16, "int8": 8, "int4": 4}
"""Bits of a weight by the name of its format: all that the rule of thumb knows."""
TIE = 0.05
"""Two amounts that differ by less are called alike; our choice."""
GEMMA_SIZES: dict[str, Any] = {
    "vocab_size": 262_144, "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18, "num_attention_heads": 4,
    "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512, "max_position_embeddings": 32_768, "query_pre_attn_scalar": 256,
    "tie_word_embeddings": True,
}  # fmt: skip
LLAMA_SIZES: dict[str, Any] = {
    "vocab_size": 32_000, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 2, "num_attention_heads": 12,
    "max_position_embeddings": 2048, "tie_word_embeddings": False,
}  # fmt: skip
TINY: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------- models


@cache
def config_of(name: str) -> Any:
    """The configuration of a model: the bundled one's from its files, the others of their published sizes, and two tiny ones."""
    from transformers import AutoConfig, Gemma3TextConfig, LlamaConfig

    if name == BUNDLED:
        return AutoConfig.from_pretrained(model_folder(BUNDLED), trust_remote_code=False, local_files_only=True)
    if name == GEMMA:
        return Gemma3TextConfig(**GEMMA_SIZES)
    if name == LLAMA:
        return LlamaConfig(**LLAMA_SIZES)
    kind: Any = {"tiny-llama": LlamaConfig, "tiny-gemma": Gemma3TextConfig}[name]
    return kind(**TINY, **({"sliding_window": 32} if name == "tiny-gemma" else {}))


def built(name: str, format: str) -> nn.Module:
    """The whole model in a format, in eval mode."""
    if name != BUNDLED:
        config = config_of(name)
        return packed(some_blocks(config, config.num_hidden_layers, DTYPES[format]), format)
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    model: nn.Module = auto.from_pretrained(
        model_folder(BUNDLED),
        dtype=DTYPES[format],
        attn_implementation="sdpa",
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
    )
    return packed(model.eval(), format)


def packed(model: nn.Module, format: str) -> nn.Module:
    """The model itself, or with its linear layers in 8 or 4 bits and the projection onto the vocabulary in 8."""
    if format not in ("int8", "int4"):
        return model
    for module in model.modules():  # what is not packed, as a view of the loaded file, would keep all of it
        if not isinstance(module, nn.Linear):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.clone()
    context = TuneContext(goal="decode", prompt_tokens=128, new_tokens=16)
    return weight_only.transform.apply(model, {"bits": NOMINAL[format], "head_bits": 8}, context)


def limits_of(threads: int) -> Calibration:
    """What this machine does on so many threads (0: as many as torch takes by itself), on which all that follows then runs."""
    torch.set_num_threads(threads or DEFAULT_THREADS)
    return calibrate(quick=True, device="cpu")


# ----------------------------------------------------------------------------------------------------------------- what is judged


@dataclass(frozen=True)
class Cell:
    """One figure of one model in one format on some threads, behind a prompt of some tokens.

    `formula` is the survey's figure (of a time: the roofline's), `rule` that of a rule of thumb, `measured` what was seen, `part` the
    formula without what attention adds to it, and `blocks` what a few blocks foretell (0: nobody asked for these).
    """

    model: str
    format: str
    threads: int
    tokens: int
    formula: float
    rule: float
    measured: float
    part: float = 0.0
    blocks: float = 0.0

    @property
    def kind(self) -> tuple[str, int]:
        """Format and threads, which have one utilisation: that of each model is foretold from the others', so that the errors of all hang
        together."""
        return self.format, self.threads

    @property
    def run(self) -> tuple[str, str, int]:
        """One model, run once for all lengths."""
        return self.model, *self.kind

    @property
    def name(self) -> str:
        """For a table."""
        return f"{self.model}, {self.format}, {self.threads or 'all'} threads, {self.tokens} tokens"


def errors(cells: Sequence[Cell], predicted: Sequence[float]) -> list[float]:
    """Sizes of the relative errors, in per cent."""
    return [100 * abs(guess / cell.measured - 1) for cell, guess in zip(cells, predicted, strict=True)]


Grouping = Callable[[Cell], tuple[Any, ...]]


def by_group(cells: Sequence[Cell], values: Sequence[float], group: Grouping) -> Interval:
    """The mean of the groups' means, with Student's interval over the groups: cells of a group are not independent."""
    groups: dict[tuple[Any, ...], list[float]] = {}
    for cell, value in zip(cells, values, strict=True):
        groups.setdefault(group(cell), []).append(value)
    return student_interval([statistics.fmean(found) for found in groups.values()])


def mean_error(cells: Sequence[Cell], predicted: Sequence[float]) -> float:
    """The mean of the errors; every cell counts alike."""
    return statistics.fmean(errors(cells, predicted))


def elsewhere(cells: Sequence[Cell], cell: Cell) -> list[Cell]:
    """Cells of other models in the same format on as many threads. Raises ValueError where there are none."""
    others = [one for one in cells if one.model != cell.model and one.kind == cell.kind]
    if not others:
        raise ValueError(f"{cell.name} has no other model to be judged by")
    return others


def transferred(cells: Sequence[Cell], of: Callable[[Cell], float]) -> list[float]:
    """Each cell's figure times what other models took of theirs (geometric mean)."""
    return [
        of(cell) * statistics.geometric_mean(one.measured / of(one) for one in elsewhere(cells, cell)) for cell in cells
    ]


def same_length(cells: Sequence[Cell]) -> list[float]:
    """What other models took behind as long a prompt (geometric mean)."""
    return [
        statistics.geometric_mean(one.measured for one in elsewhere(cells, cell) if one.tokens == cell.tokens)
        for cell in cells
    ]


def shifted_error(cells: Sequence[Cell], predicted: Sequence[float]) -> float:
    """The mean error where each cell gets another one's prediction, over all shifts: right numbers at the wrong places."""
    turns = [[*predicted[shift:], *predicted[:shift]] for shift in range(1, len(predicted))]
    return statistics.fmean(mean_error(cells, turn) for turn in turns)


def figure_of(
    cells: Sequence[Cell],
    predicted: Sequence[float],
    ruled: Sequence[float],
    arms: dict[str, float],
    group: Grouping,
    **details: Any,
) -> Figure:
    """The mean error of predictions, with its controls. With the counting deleted there is what other models took, one number for all
    lengths or behind as long a prompt, or the rule of thumb, whichever is best; random are other cells' predictions; the rival is the
    rule of thumb."""
    found = by_group(cells, errors(cells, predicted), group)
    rival, constant = mean_error(cells, ruled), mean_error(cells, transferred(cells, lambda _: 1.0))
    as_long = mean_error(cells, same_length(cells))
    lines = zip(cells, predicted, errors(cells, predicted), strict=True)
    return Figure(
        found.median,
        "%",
        low=max(found.low, 0.0),
        high=found.high,
        free=rival,
        controls={
            "deleted": min(rival, constant, as_long),
            "random": shifted_error(cells, predicted),
            "rival": rival,
        },
        arms={
            "what other models took, whatever the length": constant,
            "what other models took behind as long a prompt": as_long,
            **arms,
        },
        details={
            "columns": ["cell", "modelled", "measured", "error, %"],
            "table": [[cell.name, guess, cell.measured, error] for cell, guess, error in lines],
            "largest_error": max(errors(cells, predicted)),
            "weights": {
                BUNDLED: "loaded from its files",
                **dict.fromkeys((GEMMA, LLAMA), "random, of the published sizes"),
            },
            **details,
        },
    )


FORECAST = Operator(
    "the resources that a decoder takes, foretold",
    free="a rule of thumb: parameters times the bits that the format is named for, two operations a parameter and token",
)
PAPER: dict[str, Any] = {"models": "none: formulas and a list of metrics", "formats": "fp16", "tokens": "none"}
DEPARTURES = {
    "models": "SmolLM2-135M and the sizes of Gemma 3 270M and Llama 68M: the survey measures nothing itself",
    "formats": "those that a processor runs fast, and packed ones",
    "tokens": "prompts as long as two cores can run in minutes",
}
MODELS = [BUNDLED, GEMMA, LLAMA]
TINY_ONES = ["tiny-llama", "tiny-gemma"]
THREE, FOUR = ["fp32", "bf16", "int4"], ["fp32", "bf16", "int8", "int4"]


def refuted(limit: float) -> Callable[[Any], bool]:
    """Whether the error is certainly above its limit, or the rule of thumb certainly foretells better."""

    def check(record: Any) -> bool:
        low: float = record["measured"]["low"]
        return low > limit or record["controls"]["rival"] < low

    return check


# ----------------------------------------------------------------------------------------------------------------------- memory

MEMORY: dict[str, dict[str, Any]] = {
    "smoke": {"models": TINY_ONES, "formats": ["fp32"], "tokens": [32], "new_tokens": 2},
    "small": {"models": MODELS, "formats": THREE, "tokens": [128, 1024], "new_tokens": 4},
    "full": {"models": MODELS, "formats": FOUR, "tokens": [128, 512, 1024, 2048], "new_tokens": 16},
}
MEMORY_LIMIT = 10.0


def held(name: str, format: str, tokens: list[int], new_tokens: int) -> list[dict[str, float]]:
    """Run in a process of its own. For each length, shortest first: resident bytes before a model was there and behind its answer, the
    highest so far, and those of its tensors. What the libraries take for any model is there before: a tiny one has run in the format.
    What the allocator keeps of freed memory is given back first."""
    answered(built("tiny-llama", format), 32, 2)
    give_back()
    before = resident()
    model = built(name, format)
    found = []
    for length in sorted(tokens):
        out = answered(model, length, new_tokens)
        give_back()
        found.append(
            {
                "before": float(before),
                "after": float(resident()),
                "peak": float(peak_resident()),
                "tensors": float(tensor_bytes(model, out.cache)),
            }
        )
        del out
    return found


def give_back() -> None:
    """Return freed memory to the system, where the C library can: else what a prompt's activations took looks as if it were held."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


@torch.inference_mode()
def answered(model: nn.Module, tokens: int, new_tokens: int) -> Any:
    """The last output of a greedy answer of so many tokens to a random prompt, with its cache."""
    called: Any = model
    vocabulary = int(called.config.get_text_config(decoder=True).vocab_size)
    ids = torch.randint(vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0))
    out = called(input_ids=ids, use_cache=True, logits_to_keep=1)
    for _ in range(new_tokens - 1):
        out = called(input_ids=out.logits[:, -1:].argmax(-1), cache=out.cache, use_cache=True)
    return out


def tensor_bytes(model: nn.Module, cache: Any) -> int:
    """Bytes of the storages behind a model's parameters and buffers and a cache's keys and values, each counted once."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def memory_of(name: str, format: str, tokens: list[int], new_tokens: int) -> list[dict[str, float]]:
    """`held` in a fresh process. Raises AssayError where that fails."""
    settings = {"name": name, "format": format, "tokens": tokens, "new_tokens": new_tokens}
    found = run_isolated(f"{__name__}:held", settings, timeout_s=600)
    if not found.ok:
        raise AssayError(f"{name} in {format} ended without a result ({found.status}): {found.error}")
    value: list[dict[str, float]] = found.value
    return value


@experiment(
    "resource_efficient_llm_survey/memory-error",
    points={scale: [size] for scale, size in MEMORY.items()},
    operator=FORECAST,
    paper=PAPER,
    departures=DEPARTURES,
    tolerance=MEMORY_LIMIT,
    measured_here="resident bytes that a process gains by a model and its answer",
    refuted_if="the formulas are more than 10 % off on average, or parameters times the format's bits foretell better",
    refutes=refuted(MEMORY_LIMIT),
    minutes=30,
)
def memory_error(models: list[str], formats: list[str], tokens: list[int], new_tokens: int) -> Figure:
    """How far weights and cache, counted, are off from what a process gains by loading a model and answering, in per cent.

    Nothing is fitted. What an allocator keeps of freed memory is given back before the process is looked at. The limit is 10 %, since what
    a library makes for each shape is not the model's; whoever asks whether a model fits must leave as much. The rival is parameters times
    the bits that the format is named for, without scales, cache and the table that stays in float32. Deleted is the best of that and of
    what the other models took in the format, whatever the length or behind as long a prompt; random is another cell's count. The interval
    is Student's over models and formats. An arm adds the prompt's activations, which are freed again. The details have the same counts
    against the bytes of the tensors themselves, which should agree to 1 %, and the counts with activations against the highest memory on
    the way, loading and packing included.
    """
    torch.set_num_threads(DEFAULT_THREADS)
    cells: list[Cell] = []
    peaks: dict[str, float] = {}
    exact: dict[str, float] = {}
    for name, format in itertools.product(models, formats):
        decoder = decoder_of(config_of(name))
        for length, seen in zip(sorted(tokens), memory_of(name, format, tokens, new_tokens), strict=True):
            told = memory_forecast(decoder, format, length, new_tokens, 0.0)
            counted = told.weight_bytes + told.cache_bytes
            rule = decoder.parameters * NOMINAL[format] / 8
            gained = max(seen["after"] - seen["before"], 1.0)
            cell = Cell(name, format, 0, length, counted, rule, gained)
            cells.append(cell)
            exact[cell.name] = 100 * (counted / seen["tensors"] - 1)
            peaks[cell.name] = 100 * (told.needed_bytes / max(seen["peak"] - seen["before"], 1.0) - 1)
    working = [activation_bytes(decoder_of(config_of(one.model)), one.tokens, one.format) for one in cells]
    return figure_of(
        cells,
        [cell.formula for cell in cells],
        [cell.rule for cell in cells],
        {
            "with the prompt's activations": mean_error(
                cells, [cell.formula + more for cell, more in zip(cells, working, strict=True)]
            )
        },
        lambda cell: cell.run,
        error_against_tensors=exact,
        error_with_activations_against_peak=peaks,
    )


# ------------------------------------------------------------------------------------------------------------------------ times


def seconds_of(
    name: str, format: str, tokens: list[int], new_tokens: int, repeats: int, *, with_probe: bool = True
) -> tuple[list[Timed], Probe | None, dict[int, int]]:
    """Times of the whole model, twice where nothing is asked of a few blocks, else once and those of the blocks; bytes of the tensors by
    length of the prompt."""
    config = config_of(name)
    found: Probe | None = None
    if with_probe:
        found = probe(
            lambda layers: packed(some_blocks(config, layers, DTYPES[format]), format),
            config.num_hidden_layers,
            tokens,
            new_tokens=new_tokens,
            repeats=repeats,
        )
    model = built(name, format)
    seen = [
        timed(model, tokens, new_tokens=new_tokens, repeats=repeats, seed=seed)
        for seed in range(1 if with_probe else 2)
    ]
    sizes = {} if with_probe else {n: tensor_bytes(model, answered(model, n, new_tokens).cache) for n in tokens}
    return seen, found, sizes


def rule_of_thumb(phase: str, decoder: Decoder, device: Device, format: str, tokens: int) -> float:
    """Seconds by two operations a parameter and token, or by the bits that the format is named for: all parameters, no attention, no
    cache."""
    if phase == "prefill":
        return 2.0 * decoder.parameters * tokens / device.flops
    return decoder.parameters * NOMINAL[format] / 8 / device.bandwidth


def times(
    phase: str,
    models: list[str],
    formats: list[str],
    threads: list[int],
    tokens: list[int],
    new_tokens: int,
    repeats: int,
) -> list[Cell]:
    """A cell for each model, format, number of threads and length."""
    memory = float(psutil.virtual_memory().total)
    cells = []
    for count in threads:
        limits = limits_of(count)
        for name, format in itertools.product(models, formats):
            decoder = decoder_of(config_of(name))
            (seen,), blocks, _ = seconds_of(name, format, tokens, new_tokens, repeats)
            assert blocks is not None

            def device(of: Decoder, format: str = format, limits: Calibration = limits) -> Device:
                return device_for(limits, of, format, memory)

            told = foretold(decoder, blocks, device, format, new_tokens=new_tokens)
            for length in tokens:
                cells.append(
                    Cell(
                        name,
                        format,
                        count,
                        length,
                        least_seconds(decoder, device(decoder), format, length, new_tokens)[phase],
                        rule_of_thumb(phase, decoder, device(decoder), format, length),
                        getattr(seen, phase)[length],
                        without_attention(phase, decoder, device(decoder), format, length),
                        getattr(told, phase)[length],
                    )
                )
    return cells


def without_attention(phase: str, decoder: Decoder, device: Device, format: str, tokens: int) -> float:
    """Seconds by two operations for each parameter of the blocks and token, or by the bytes of the weights alone."""
    if phase == "prefill":
        return 2.0 * decoder.layers * decoder.block_matmul * tokens / device.flops
    return decoder.step_weight_bytes(format) / device.bandwidth


def unless_busy(figure: Figure, watch: OthersWatch, widest: float) -> Figure:
    """The figure; where other processes kept the machine busy meanwhile, with an interval up to `widest`: such times decide nothing."""
    share, busy = watch.stop()
    details = {**figure.details, "share_of_the_machine_that_others_took": share}
    if not busy:
        return replace(figure, details=details)
    return replace(figure, low=0.0, high=max(figure.high or 0.0, widest), details=details)


def times_figure(phase: str, limit: float, **point: Any) -> Figure:
    """The error of the formula with the utilisation of the other models, and what else could foretell."""
    watch = OthersWatch()
    cells = times(phase, **point)
    found = figure_of(
        cells,
        transferred(cells, lambda cell: cell.formula),
        transferred(cells, lambda cell: cell.rule),
        {
            "a few blocks of the model itself, timed (assay profile)": mean_error(cells, [c.blocks for c in cells]),
            "the roofline itself, a utilisation of 1": mean_error(cells, [c.formula for c in cells]),
            "the same without attention's operations or bytes": mean_error(cells, transferred(cells, lambda c: c.part)),
        },
        lambda cell: cell.kind,
        error_of_a_few_blocks={cell.name: 100 * (cell.blocks / cell.measured - 1) for cell in cells},
        utilisation={cell.name: cell.formula / cell.measured for cell in cells},
        faster_than_the_roofline=[cell.name for cell in cells if cell.measured < cell.formula],
    )
    return unless_busy(found, watch, 2 * limit)


PREFILL_LIMIT, DECODE_LIMIT = 30.0, 20.0
TIMES: dict[str, dict[str, Any]] = {
    "smoke": {
        "models": TINY_ONES,
        "formats": ["fp32", "bf16"],
        "threads": [0],
        "tokens": [16, 48],
        "new_tokens": 3,
        "repeats": 1,
    },
    "small": {"models": MODELS, "formats": FOUR, "threads": [0], "tokens": [128, 512], "new_tokens": 4, "repeats": 2},
    "full": {
        "models": MODELS,
        "formats": FOUR,
        "threads": [1, 2],
        "tokens": [128, 512, 1024, 2048],
        "new_tokens": 16,
        "repeats": 5,
    },
}
LONG: dict[str, dict[str, Any]] = {
    **TIMES,
    "small": {**TIMES["small"], "tokens": [128, 1024], "new_tokens": 24, "repeats": 1},
}


@experiment(
    "resource_efficient_llm_survey/prefill-error",
    points={scale: [size] for scale, size in TIMES.items()},
    operator=FORECAST,
    paper=PAPER,
    departures=DEPARTURES,
    tolerance=PREFILL_LIMIT,
    measured_here="errors of seconds on a model that the formula's utilisation was not measured on",
    refuted_if="counted operations over the peak and a utilisation are more than 30 % off on average, or the rule of thumb foretells "
    "better",
    refutes=refuted(PREFILL_LIMIT),
    minutes=60,
)
def prefill_error(**point: Any) -> Figure:
    """How far a prompt's operations over the machine's peak, times what the other models took of that, are off from its seconds, in %.

    The rival has as much to go by: two operations for every parameter and token, with a factor from the other models too. It counts the
    table of a large vocabulary for each token, though only one is projected, and no attention. Deleted is the best of the rival and of
    what the other models took, whatever the length or behind as long a prompt: a count that is not nearer than these is not needed. Random
    is another cell's prediction. An arm leaves out attention's operations, which short prompts have few of. The interval is Student's
    over formats and threads: in each, the errors of all models hang together.
    """
    return times_figure("prefill", PREFILL_LIMIT, **point)


@experiment(
    "resource_efficient_llm_survey/decode-error",
    points={scale: [size] for scale, size in LONG.items()},
    operator=FORECAST,
    paper=PAPER,
    departures=DEPARTURES,
    tolerance=DECODE_LIMIT,
    measured_here="errors of seconds a token on a model that the formula's utilisation was not measured on",
    refuted_if="the bytes of weights and cache over the bandwidth and a utilisation are more than 20 % off on average, or the rule of "
    "thumb foretells better",
    refutes=refuted(DECODE_LIMIT),
    minutes=60,
)
def decode_error(**point: Any) -> Figure:
    """How far the bytes that a token reads over the machine's bandwidth, times what the other models took of that, are off from its
    seconds, in per cent.

    The rival takes the parameters times the bits that the format is named for, with a factor from the other models too: no cache, no
    scales, no projection in 8 bits where the layers have 4, and a table that is only looked up. Deleted, random and the interval are as
    for prompts; an arm leaves out the cache.
    """
    return times_figure("token", DECODE_LIMIT, **point)


# ---------------------------------------------------------------------------------------------------------------- classification

ORDERS: dict[str, dict[str, Any]] = {
    "smoke": {
        "models": TINY_ONES,
        "formats": ["fp32", "int4"],
        "threads": 0,
        "tokens": [16],
        "new_tokens": 3,
        "repeats": 1,
    },
    "small": {"models": MODELS, "formats": FOUR, "threads": 0, "tokens": [64, 512], "new_tokens": 8, "repeats": 1},
    "full": {
        "models": MODELS,
        "formats": FOUR,
        "threads": 0,
        "tokens": [64, 256, 1024, 2048],
        "new_tokens": 16,
        "repeats": 5,
    },
}
ALIKE_LIMIT = 90.0


def order(one: float, other: float) -> int:
    """Which of two amounts is less: -1, 1, or 0 where they are alike within 5 %."""
    return 0 if max(one, other) <= min(one, other) * (1 + TIE) else -1 if one < other else 1


def alike(rows: Sequence[Sequence[float]]) -> float:
    """The share, in per cent, of the pairs of rows of which no two columns say the opposite. Raises ValueError for fewer than two rows."""
    pairs = list(itertools.combinations(rows, 2))
    if not pairs:
        raise ValueError(f"rows must hold at least two, got {len(rows)}")
    signs = [{order(a, b) for a, b in zip(one, other, strict=True)} for one, other in pairs]
    return 100 * statistics.fmean(not {-1, 1} <= found for found in signs)


@experiment(
    "resource_efficient_llm_survey/classification",
    points={scale: [size] for scale, size in ORDERS.items()},
    operator=Operator("the choice among number formats", free="a report of one resource"),
    paper=PAPER,
    departures=DEPARTURES,
    tolerance=ALIKE_LIMIT,
    measured_here="pairs of number formats of one model that memory, the prompt's time and a token's time order alike",
    refuted_if="more than 90 % of the pairs are ordered alike by all resources: a report of one of them would do",
    refutes=lambda record: record["measured"]["low"] > ALIKE_LIMIT,
    minutes=60,
)
def classification(
    models: list[str], formats: list[str], threads: int, tokens: list[int], new_tokens: int, repeats: int
) -> Figure:
    """Per cent of the pairs of number formats that bytes held, seconds of the prompt and seconds a token order alike, all measured.

    If papers that report one resource could be compared, that one would tell the order of the others, and nearly all pairs would agree;
    90 % is our choice of "nearly all". Amounts within 5 % of each other contradict nothing. The interval is Student's over models, each
    the mean of its lengths. The arms are the same with one resource only, measured twice: what noise alone would contradict. The more
    contradicted of them is the control, the other resources deleted: all of the interval must lie below it.
    """
    watch = OthersWatch()
    limits_of(threads)
    resources = ("memory", "prompt", "token")
    shares: dict[str, list[float]] = {}
    itself: dict[str, list[float]] = {"prefill": [], "token": []}
    rows: dict[str, list[float]] = {}
    for name in models:
        runs = {one: seconds_of(name, one, tokens, new_tokens, repeats, with_probe=False) for one in formats}
        for length in tokens:
            here = []
            for one, (seen, _, sizes) in runs.items():
                row = [float(sizes[length]), seen[0].prefill[length], seen[0].token[length]]
                rows[f"{name}, {one}, {length} tokens"] = row
                here.append(row)
            shares.setdefault(name, []).append(alike(here))
            for phase, found in itself.items():
                found.append(alike([[getattr(run, phase)[length] for run in seen] for seen, _, _ in runs.values()]))
    found_share = student_interval([statistics.fmean(found) for found in shares.values()])
    again = {phase: statistics.fmean(found) for phase, found in itself.items()}
    figure = Figure(
        found_share.median,
        "%",
        low=max(found_share.low, 0.0),
        high=min(found_share.high, 100.0),
        free=100.0,
        controls={"deleted": min(again.values())},
        arms={f"{phase} against itself, measured again": share for phase, share in again.items()},
        details={
            "columns": list(resources),
            "measured": rows,
            "each_model_and_length": shares,
        },
    )
    return unless_busy(figure, watch, 100.0)

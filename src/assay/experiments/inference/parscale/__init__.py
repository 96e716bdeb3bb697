"""ParScale: what streams are worth in parameters, and what they cost beside a larger model of the same loss.

Quality is measured on byte-level models trained here (`arms`): one stream in three sizes, one stream trained for as many
operations, and the streams, also with their prefixes drawn and never trained, and with the same prefix for all. A loss is told in
parameters by the line of the three models of one stream (loss against the logarithm of their size), and what streams add to a
model counts as parameters: their rival has as many.

One rival is the same for all claims, `free`: the model of one stream, trained for as many operations as the streams.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from assay.experiments.core import Figure, Guard, Operator, Quality, Trial, experiment
from assay.experiments.inference import language
from assay.experiments.inference.parscale.arms import (
    ARMS,
    FULL,
    GRID,
    SMALL,
    SMOKE,
    Task,
    as_eight,
    averaged_loss,
    equal_loss,
    losses_of,
    parameters_of,
    rates_of,
    ratio_over_seeds,
    shape_of,
    slopes_of,
    steps_of,
    told_apart,
    trained_arms,
)
from assay.experiments.seeds import paired
from assay.measure.clock import compare_many
from assay.methods.inference.parscale import ParScaleForCausalLM
from assay.methods.inference.parscale.cost import Shape, added_parameters, cost, increases
from assay.methods.inference.parscale.published import COMMON, PREFIX_TOKENS, REPORTED, WIDTHS, table

OPERATOR = Operator(
    "a language model's loss without another model", free="the model of one stream, trained for as many operations"
)
TRAINING_PAPER = {
    "width": "500M to 4.4B parameters",
    "length": 2048,
    "steps": "42B tokens",
    "streams": 8,
    "prefix": 48,
    "layers": 36,
}
TRAINING_DEPARTURES = {
    "width": "models of tens or hundreds of thousands of parameters: larger ones cannot be trained here",
    "layers": "as few as the width allows",
    "length": "a window of 64 or 128 bytes, which is a few lines of code",
    "steps": "as many as fit into seconds, the same for all arms but the one that is given as many operations",
    "streams": "4 at small scale, told as 8 by the law's own logarithm: 8 cost twice as much",
    "prefix": "4, since a window is 64 or 128 bytes: still a larger share of it than the paper's 48 of 2,048 tokens",
}
MEASURED = (
    "held-out loss of byte-level models of under a million parameters, trained here for a few hundred steps, "
    "to which streams add a fifth (1.5 % in the paper's)"
)


def mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def published_fits() -> dict[str, Any]:
    """The law fitted to the paper's own losses."""
    from assay.methods.inference.parscale.law import ParallelScalingLaw

    found = {}
    for corpus, reported in REPORTED.items():
        inputs, losses = table(corpus)
        law = ParallelScalingLaw().fit(inputs, losses)
        found[corpus] = {
            "k": law.k_,
            "r2": law.score(inputs, losses),
            "eight_streams": law.equivalent(8),
            "E": law.E_,
            "A": law.A_,
            "alpha": law.alpha_,
            "reported": reported,
        }
    return found


@experiment(
    "parscale/parameter-equivalent",
    points={"smoke": [SMOKE], "small": [SMALL], "full": [FULL]},
    operator=OPERATOR,
    paper=TRAINING_PAPER,
    departures=TRAINING_DEPARTURES,
    measured_here=MEASURED,
    refuted_if="streams that gain by being different are worth less than one stream of the same parameters, the whole interval over seeds; "
    "where they gain less over the same prefix for all than a tenth of what the law promises, in any seed, nothing is decided",
    minutes=360,
)
def parameter_equivalent(width: int, layers: int, length: int, steps: int, streams: int, prefix: int) -> Figure:
    """How many times as many parameters as the streams one stream needs for their loss, at equal tokens, told as of eight streams.

    The streams' parameters are all they have, prefixes and aggregator too: gains are over one stream of as many. The interval is
    Fieller's over seeds, for the gain divided by the slope of loss against size. Controls, in the same unit and each trained: the same
    prefix for all streams (which are then one), random prefixes that stay as they are, and one stream trained for as many
    operations, which is also what is free; where that lies beyond the largest model trained, its figure is an extrapolation. Beside
    them the averaged predictions of as many models trained apart, which hold as many times the parameters. The details hold the
    gain over one stream without that subtraction, and the fit of the law to the paper's own 48 losses: k, R² and what eight
    streams are worth there.

    Streams that do not differ are one stream with parameters that it has no use for, and their figure, below 1, is not what the paper
    speaks of. So the same prefix for all is the floor that they have to beat before anything is decided, by a tenth of the nats that the
    larger model saves. What to expect of `small`: in the search of rates the same prefix for all, and random ones, do as well as
    prefixes that were trained apart, so that it decides nothing.
    """
    task = {
        "width": width, "layers": layers, "length": length, "steps": steps, "streams": streams, "prefix": prefix,
    }  # fmt: skip
    rates = rates_of((*ARMS, "even weights") if task == FULL else ARMS, task)
    losses = losses_of(rates, task)
    slopes = slopes_of(losses, task)
    base, slope = mean(losses["as many parameters"]), mean(slopes)
    gain = ratio_over_seeds(differences(losses, "as many parameters", "streams"), slopes)
    bare = ratio_over_seeds(differences(losses, "one stream", "streams"), slopes)
    averaged = averaged_loss(task, rates["one stream"].rate)

    def told(loss: float) -> float:
        return as_eight((base - loss) / slope, streams)

    shape = shape_of(task)
    return Figure(
        as_eight(gain.median, streams),
        "x",
        low=as_eight(gain.low, streams),
        high=as_eight(gain.high, streams),
        baseline=1.0,
        free=told(mean(losses["more steps"])),
        controls={
            "deleted": told(mean(losses["identical prefixes"])),
            "random": told(mean(losses["random prefixes"])),
            "rival": told(mean(losses["more steps"])),
        },
        arms={
            "averaged models, each as large": told(averaged),
            **{arm: told(mean(losses[arm])) for arm in losses if arm not in ARMS},
        },
        trained=trained_arms(losses, rates, task) | told_apart(losses, rates),
        details={
            "losses": losses,
            "averaged_models": averaged,
            "parameters": {arm: parameters_of(arm, task) for arm in ("one stream", "as many parameters", "larger")},
            "share_that_streams_add": added_parameters(shape, streams, prefix) / shape.body,
            "steps": {arm: steps_of(arm, task) for arm in losses},
            "nats_for_e_times_the_parameters": slopes,
            "times_at_this_many_streams": math.exp(gain.median),
            "with_what_streams_add": {
                "value": as_eight(bare.median, streams),
                "low": as_eight(bare.low, streams),
                "high": as_eight(bare.high, streams),
            },
            "rates_at_the_edge": [arm for arm, rate in rates.items() if rate.rate in (min(GRID), max(GRID))],
            "published": published_fits(),
        },
    )


def differences(losses: Mapping[str, Sequence[float]], first: str, second: str) -> list[float]:
    """The first arm's losses less the second's, seed by seed."""
    return [a - b for a, b in zip(losses[first], losses[second], strict=True)]


# ---- what it costs -----------------------------------------------------------------------------------------------------------------

PAPER_SHAPE = Shape(
    width=WIDTHS[3][0], intermediate=WIDTHS[3][1], layers=COMMON["num_hidden_layers"], heads=COMMON["num_attention_heads"],
    kv_heads=COMMON["num_key_value_heads"], vocab=COMMON["vocab_size"], bias=True,
)  # fmt: skip
PAPER_COST = {"streams": 8, "batch": 1, "model": "1.6B parameters in half precision"}


@experiment(
    "parscale/memory-increase",
    points={
        "smoke": [{"streams": 8, "batch": 1, "prompt": 64, "new": 64}],
        "small": [
            {"streams": 8, "batch": 1, "prompt": 64, "new": 64},
            {"streams": 8, "batch": 1, "prompt": 512, "new": 512},
            {"streams": 8, "batch": 8, "prompt": 64, "new": 64},
        ],
        "full": [
            {"streams": 8, "batch": 1, "prompt": 64, "new": 64},
            {"streams": 8, "batch": 1, "prompt": 8192, "new": 512},
            {"streams": 8, "batch": 64, "prompt": 512, "new": 512},
        ],
    },
    decides={
        "small": {"streams": 8, "batch": 1, "prompt": 64, "new": 64},
        "full": {"streams": 8, "batch": 1, "prompt": 64, "new": 64},
    },
    operator=OPERATOR,
    paper=PAPER_COST,
    computed="bytes follow from the sizes of the paper's own model, and the larger model from the law fitted to the paper's losses",
    refuted_if="eight streams add as many bytes as the parameters that the law gives the same loss",
)  # fmt: skip
def memory_increase(streams: int, batch: int, prompt: int, new: int) -> Figure:
    """How many times fewer bytes the streams add to the paper's 1.6B model than the parameters they are worth, in half precision.

    Bytes of answering, not of training, which keeps gradients and moments of all parameters and the activations of all streams.
    Counted are weights, keys and values, prefixes and aggregator, and the largest activations; the lengths that decide are those
    that the paper's cost script takes by itself. Longer answers and more sequences stand beside it: keys and values grow with
    streams, parameters do not. One stream trained for longer adds no bytes at all, which no ratio can say.
    """
    fits = published_fits()
    times = equal_loss(PAPER_SHAPE, streams, k=fits["stack"]["k"])
    found = increases(PAPER_SHAPE, times, streams=streams, batch=batch, prompt=prompt, new=new)
    return Figure(
        found["memory"],
        "x",
        baseline=1.0,
        details={
            **found,
            "law": fits,
            "bytes": vars(cost(PAPER_SHAPE, streams=streams, batch=batch, prompt=prompt, new=new)),
            "bytes_of_one_stream": vars(cost(PAPER_SHAPE, batch=batch, prompt=prompt, new=new)),
            "over_lengths_64_to_512": {
                f"{p}+{n}": increases(PAPER_SHAPE, times, streams=streams, batch=batch, prompt=p, new=n)
                for p in (64, 128, 256, 512)
                for n in (64, 128, 256, 512)
            },
        },
    )


LOSS = Guard("nats a byte of small models trained here", 0.02, relative=False)


def latency_point(task: Task, **settings: Any) -> dict[str, Any]:
    """A point that times as many streams as are trained for its guard."""
    usual = {"model": "smollm2-135m", "dtype": "bfloat16", "batch": 1, "prompt": 64, "new": 64}
    return {**usual, "streams": task["streams"], "task": dict(task), **settings}


def grown_config(config: Any, times: float) -> Any:
    """A configuration with `times` the parameters of a Llama's body: wider by whole groups of heads, and its MLP by what is left."""
    shape, group = Shape.of(config), config.num_attention_heads // config.num_key_value_heads
    heads = max(1, round(shape.heads * shape.grown(times).width / shape.width / group)) * group
    made = copy.deepcopy(config)
    made.num_attention_heads, made.num_key_value_heads = heads, heads // group
    made.hidden_size = round(heads * shape.head)
    made.intermediate_size = 16
    missing = times * shape.body - Shape.of(made).body
    made.intermediate_size += 16 * max(0, round(missing / (48 * made.num_hidden_layers * made.hidden_size)))
    return made


def contestants(name: str, dtype: str, count: int) -> dict[str, Any]:
    """A real model, the same as `count` streams (prefixes untrained: they cost as much), and one of random weights that is as much
    larger as the law says."""
    if name == "tiny":
        base: Any = language.small_llama(width=64, layers=2).to(getattr(torch, dtype)).eval()
    else:
        from assay.workloads.models import load_model

        base = load_model(name, dtype=getattr(torch, dtype)).model
    times = equal_loss(Shape.of(base.config), count)
    larger = type(base)(grown_config(base.config, times)).to(getattr(torch, dtype)).eval()
    return {
        "one stream": base,
        "streams": ParScaleForCausalLM.from_base(base, parscale_n=count, parscale_n_tokens=PREFIX_TOKENS).eval(),
        "larger": larger,
    }


def answering(made: Any, batch: int, prompt: int, new: int) -> Tensor:
    """Greedy generation of `new` tokens behind random prompts, which cost what others cost."""
    ids = torch.randint(3, made.config.vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(0))
    length = {"max_new_tokens": new, "min_new_tokens": new}
    answer: Tensor = made.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **length)
    return answer


def increase_ratio(times: Mapping[str, Sequence[float]]) -> tuple[float, float, float]:
    """How many times smaller the streams' increase is than the larger model's: its value and 95 % interval, rounds resampled.

    Both are of medians over rounds. An increase of less than a thousandth of one stream's time counts as that (our choice): the ratio would
    otherwise have no bound.
    """
    one, many, larger = (np.asarray(times[label]) for label in ("one stream", "streams", "larger"))

    def ratio(rows: np.ndarray) -> np.ndarray:
        base = np.median(one[rows], -1)
        least = 1e-3 * base
        return (np.median(larger[rows], -1) - base) / np.maximum(np.median(many[rows], -1) - base, least)

    rows = np.random.default_rng(0).integers(0, len(one), (2000, len(one)))
    low, high = np.quantile(ratio(rows), [0.025, 0.975])
    value = float(ratio(np.arange(len(one))[None])[0])
    return value, min(float(low), value), max(float(high), value)


def loss_quality(losses: Mapping[str, list[float]]) -> Quality:
    """The streams' loss against that of the larger model which the law gives the same."""
    gap = paired(losses["streams"], losses["larger"])
    larger = mean(losses["larger"])
    return Quality(
        mean(losses["streams"]),
        larger,
        low=larger + gap.low,
        high=larger + gap.high,
        controls={
            "deleted": mean(losses["identical prefixes"]),
            "random": mean(losses["random prefixes"]),
            "rival": mean(losses["more steps"]),
        },
        rival="one stream trained for as many operations",
    )


def keeps_the_loss(losses: Mapping[str, list[float]]) -> bool:
    """Whether one stream, trained for as many operations, is no worse than the streams by more than the margin, beyond the noise."""
    return paired(losses["more steps"], losses["streams"]).high <= LOSS.margin


@experiment(
    "parscale/latency-increase",
    points={
        "smoke": [latency_point(SMOKE, model="tiny", dtype="float32", new=4)],
        "small": [latency_point(SMALL, new=16)],
        "full": [latency_point(FULL), latency_point(FULL, batch=8)],
    },
    decides={"full": latency_point(FULL)},
    operator=OPERATOR,
    guard=LOSS,
    paper={**PAPER_COST, "prompt": 64, "new": 64},
    departures={
        "model": "SmolLM2-135M: 1.6B parameters take minutes an answer on two cores",
        "streams": "4 at small scale, in what is timed and in what is trained: training 8 costs twice as much",
        "new": "16 at small scale, which leaves the prompt a larger part",
        "task": "the loss is that of small models trained here, since none of the paper's can be",
    },
    measured_here="seconds of SmolLM2's whole answers with untrained prefixes on a CPU, not their increase; equal loss on small models",
    refuted_if="the whole interval lies below 1: the streams' answer takes longer, and so adds more time, than the larger model's",
    minutes=400,
)  # fmt: skip
def latency_increase(
    model: str, dtype: str, streams: int, batch: int, prompt: int, new: int, task: Mapping[str, int]
) -> Trial:
    """How much longer the answer of a model of as many parameters takes as the streams are worth, in times of the streams' answer.

    The larger model has k ln P + 1 times the parameters of the streams, with the paper's k. Whole answers are timed in pairs: they lie on
    the same side of 1 as the ratio of the increases, which the paper tells and the details hold, with what the model of an A100 says.
    Whether both have the same loss is the guard: small models trained here, as many streams against the model of one stream that the law
    calls equal, within 0.02 nats a byte. What is free is one stream, trained for as many operations: its answer is timed against the
    streams' where its loss is as good within the same margin, and is otherwise an arm, since it would be another thing.
    """
    rates = rates_of(ARMS, task)
    losses = losses_of(rates, task)
    models = contestants(model, dtype, streams)
    runs = {label: partial(answering, made, batch, prompt, new) for label, made in models.items()}
    free = keeps_the_loss(losses)

    def details() -> dict[str, Any]:
        value, low, high = increase_ratio(compare_many(runs, rounds=6, warmup=1, max_seconds=30).seconds)
        times = equal_loss(PAPER_SHAPE, streams)
        return {
            "increases": {"value": value, "low": low, "high": high},
            "modelled_on_an_a100": increases(PAPER_SHAPE, times, streams=streams, batch=batch, prompt=prompt, new=new),
            "losses": losses,
            "one_stream_for_as_many_operations_keeps_the_loss": free,
        }

    return Trial(
        baseline=runs["larger"],
        candidate=runs["streams"],
        free=runs["one stream"] if free else None,
        arms={} if free else {"one stream": runs["one stream"]},
        quality=lambda: loss_quality(losses),
        trained=lambda: trained_arms(losses, rates, task),
        details=details,
    )

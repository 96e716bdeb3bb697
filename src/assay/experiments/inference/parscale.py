"""ParScale: what streams are worth in parameters, and what they cost beside a larger model of the same loss.

Quality is measured on byte-level models trained here: one stream, two larger models of one stream, and the streams, all on the same
text in the same order, each with the learning rate that suits it best. A loss is told in parameters by the line of the three models
of one stream (loss against the logarithm of their size). The rivals are one stream trained for as many operations (as many times
the steps as there are streams), and as many independently trained models whose predictions are averaged.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from assay.experiments.core import Figure, Guard, Operator, Quality, Trained, Trial, experiment
from assay.experiments.inference import language
from assay.experiments.mixers.training import in_parallel, over_seeds
from assay.experiments.rates import chosen, searched
from assay.experiments.seeds import paired
from assay.measure.clock import compare_many
from assay.methods.inference.parscale import ParScaleForCausalLM, fold_prefixes
from assay.methods.inference.parscale import model as model_module
from assay.methods.inference.parscale import streams as streams_module
from assay.methods.inference.parscale.cost import Shape, cost, increases
from assay.methods.inference.parscale.published import COMMON, REPORTED, WIDTHS, table
from assay.workloads.sequences import byte_batches

SEEDS = (0, 1, 2)
BATCH = 16
WINDOWS = 128  # of held-out text
PAPER_K = REPORTED["stack"]["k"]
# how wide a model of one stream is, of this arm; "wider" has about the parameters that the paper's law gives the streams
SIZES = {"one stream": "width", "wider": "wider", "widest": "widest", "more steps": "width"}
STREAM_ARMS = ("streams", "identical prefixes", "uniform weights", "random prefixes")
SEARCHED = ("one stream", "wider", "widest", "more steps", "streams", "identical prefixes")
TASK: dict[str, int] = {
    "width": 64, "wider": 80, "widest": 96, "layers": 3, "length": 96, "steps": 160, "streams": 4, "prefix": 8,
}  # fmt: skip
SMOKE = {"width": 32, "wider": 40, "widest": 48, "layers": 2, "length": 32, "steps": 40, "streams": 2, "prefix": 4}
FULL = {"width": 96, "wider": 128, "widest": 144, "layers": 4, "length": 128, "steps": 300, "streams": 8, "prefix": 16}
TRAINING_PAPER = {
    "width": "500M to 4.4B parameters",
    "length": 2048,
    "steps": "42B tokens",
    "streams": 8,
    "prefix": 48,
    "layers": 36,
}
TRAINING_DEPARTURES = {
    "width": "models of a few hundred thousand parameters: larger ones cannot be trained here",
    "layers": "as few as the width allows",
    "length": "a window of bytes, an eighth of a line of the paper's or less",
    "steps": "as many as fit into seconds, the same for all arms but the one that is given more",
    "streams": "4 at small scale, told as 8 by the law's own logarithm: 8 cost twice as much",
    "prefix": "8 or 16: a window is 96 or 128 bytes, where the paper's 48 stand before 2,048 tokens",
}
MEASURED = "held-out loss of byte-level models of under a million parameters, trained here for a few hundred steps"


class SamePrefixes(nn.Module):
    """Prefixes of which all streams have the first: the method deleted, since equal streams are one stream."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self) -> list[tuple[Tensor, Tensor]]:
        return [(keys[:1].expand_as(keys), values[:1].expand_as(values)) for keys, values in self.inner()]


def new_model(arm: str, task: Mapping[str, int], seed: int) -> Any:
    """An untrained model of one arm. Prefixes are reparameterised, as the paper trains them."""
    base = language.small_llama(width=task[SIZES.get(arm, "width")], layers=task["layers"], seed=seed)
    if arm not in STREAM_ARMS:
        return base
    count = 2 if arm == "identical prefixes" else task["streams"]  # equal streams cost the less the fewer they are
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = ParScaleForCausalLM.from_base(
            base,
            parscale_n=count,
            parscale_n_tokens=task["prefix"],
            parscale_attn_smooth=1.0 if arm == "uniform weights" else 0.1,
            parscale_prefix_hidden=task["width"],
        )
    if arm == "identical prefixes":
        made.prefixes = SamePrefixes(made.prefixes)
    if arm == "random prefixes":
        for parameter in made.prefixes.parameters():
            parameter.requires_grad_(False)
    return made


def trained_model(arm: str, task: Mapping[str, int], seed: int, rate: float | None = None) -> Any:
    """The model of an arm, trained, or found in the cache; `rate` None is the one that was chosen for it."""
    if rate is None:
        rate = chosen("parscale/loss", arm if arm in SEARCHED else "streams").rate
    steps = task["steps"] * (task["streams"] if arm == "more steps" else 1)
    return language.trained(
        {"arm": arm, "task": dict(task), "seed": seed, "batch": BATCH},
        lambda: new_model(arm, task, seed),
        lambda: byte_batches(task["length"], BATCH, seed=seed),
        steps=steps,
        rate=rate,
        sources=[model_module, streams_module, _here()],
    )


def _here() -> Any:
    import sys

    return sys.modules[__name__]


@searched("parscale/loss", arms=SEARCHED, grid=(4e-3, 8e-3, 1.6e-2, 3.2e-2))
def validation_loss(arm: str, rate: float) -> float:
    """Nats a byte on text kept for the choice, after half the steps of the small scale."""
    task = {**TASK, "steps": TASK["steps"] // 2}
    inputs, targets = language.validation(task["length"], WINDOWS)
    return float(language.nll(trained_model(arm, task, 0, rate), inputs, targets).mean())


def with_random_prefixes(trained: Any) -> Any:
    """A copy whose prefixes are drawn anew, as wide as they are: the same shape and cost, and nothing learned."""
    made = copy.deepcopy(trained)
    if made.config.parscale_prefix_hidden:
        fold_prefixes(made)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.prefixes.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * parameter.std() + parameter.mean())
    return made


def arm_loss(arm: str, task: Mapping[str, int], seed: int) -> dict[str, float]:
    """One training: nats a byte on held-out text, of the streams also with random prefixes."""
    torch.set_num_threads(1)
    inputs, targets = language.heldout(task["length"], WINDOWS)
    made = trained_model(arm, task, seed)
    found = {"loss": float(language.nll(made, inputs, targets).mean())}
    if arm == "streams":
        found["random"] = float(language.nll(with_random_prefixes(made), inputs, targets).mean())
    return found


@torch.no_grad()
def averaged_loss(task: Mapping[str, int]) -> float:
    """Nats a byte of the mean prediction of as many models of one stream as there are streams, trained apart."""
    inputs, targets = language.heldout(task["length"], WINDOWS)
    total = torch.zeros(1)
    for number in range(task["streams"]):
        made = trained_model("one stream", task, number)
        logits = torch.cat([made(part).logits for part in inputs.split(16)])
        total = total + logits.float().softmax(-1)
    mean = (total / task["streams"]).gather(-1, targets[..., None])
    return float(-mean.log().mean())


def losses_of(arms: Sequence[str], task: Mapping[str, int]) -> dict[str, list[dict[str, float]]]:
    """`arm_loss` of each arm under each of `SEEDS`; the models of one stream under as many seeds as are averaged."""
    many = max(len(SEEDS), task["streams"])
    runs = [(arm, dict(task), seed) for arm in arms for seed in (range(many) if arm == "one stream" else SEEDS)]
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
    for (arm, _, seed), score in zip(runs, in_parallel(arm_loss, runs), strict=True):
        if seed in SEEDS:
            found[arm].append(score)
    return found


def values(losses: Mapping[str, list[dict[str, float]]], arm: str, name: str = "loss") -> list[float]:
    return [score[name] for score in losses[arm]]


def mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def body_parameters(task: Mapping[str, int], arm: str) -> float:
    """Parameters without the embedding of a model of one stream."""
    with torch.device("meta"):
        return Shape.of(language.small_llama(width=task[SIZES[arm]], layers=task["layers"]).config).body


def worth(losses: Mapping[str, list[dict[str, float]]], task: Mapping[str, int]) -> float:
    """Nats that e times the parameters save, by the three sizes of one stream. Raises ValueError where larger models are no better."""
    sizes = np.log([body_parameters(task, arm) for arm in ("one stream", "wider", "widest")])
    means = [mean(values(losses, arm)) for arm in ("one stream", "wider", "widest")]
    slope = -float(np.polyfit(sizes, means, 1)[0])
    if not slope > 0:
        raise ValueError(f"larger models must have a lower loss for a loss to be told in parameters, got {means}")
    return slope


def as_eight(log_times: float, count: int) -> float:
    """exp(`log_times`) times the parameters that `count` streams are worth, as those of eight by k ln P + 1."""
    return 1 + (math.exp(log_times) - 1) * math.log(8) / math.log(count)


def as_trained(losses: Mapping[str, list[dict[str, float]]], task: Mapping[str, int]) -> dict[str, Trained]:
    """The arms whose rates were searched, with the floor of a table of pairs of bytes."""
    floor = language.bigram_floor(*language.heldout(task["length"], WINDOWS))
    return {
        arm: Trained(
            values(losses, arm),
            floor,
            "a table of pairs of bytes",
            chosen("parscale/loss", arm).rate,
            chosen("parscale/loss", arm).rates,
        )
        for arm in SEARCHED
        if arm in losses
    }


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


WORTH = Operator(
    "a language model's loss at a given number of parameters", free="one stream trained for as many operations"
)


@experiment(
    "parscale/parameter-equivalent",
    points={"smoke": [SMOKE], "small": [TASK], "full": [FULL]},
    operator=WORTH,
    paper=TRAINING_PAPER,
    departures=TRAINING_DEPARTURES,
    measured_here=MEASURED,
    refuted_if="the whole interval over seeds lies below 1: streams are worth less than one stream of the same parameters",
    minutes=120,
)
def parameter_equivalent(
    width: int, wider: int, widest: int, layers: int, length: int, steps: int, streams: int, prefix: int
) -> Figure:
    """How many times the parameters one stream needs for the streams' loss, at equal tokens, told as eight streams.

    The interval is Student's t over the seeds' paired gains. Controls, in the same unit: identical prefixes (equal streams are one
    stream), the trained model with its prefixes drawn anew, and the averaged predictions of as many models trained apart, which hold as
    many times the parameters. Free is one stream trained for as many operations. The details hold the fit of the law to the paper's own
    48 losses: k, R² and what eight streams are worth there.
    """
    task = {
        "width": width, "wider": wider, "widest": widest, "layers": layers, "length": length, "steps": steps,
        "streams": streams, "prefix": prefix,
    }  # fmt: skip
    ablations = ("uniform weights", "random prefixes") if task == FULL else ()
    losses = losses_of((*SEARCHED, *ablations), task)
    slope, one = worth(losses, task), values(losses, "one stream")
    gain = over_seeds([(a - b) / slope for a, b in zip(one, values(losses, "streams"), strict=True)])

    def told(loss: float) -> float:
        return as_eight((mean(one) - loss) / slope, streams)

    averaged = averaged_loss(task)
    return Figure(
        as_eight(gain.median, streams),
        "x",
        low=as_eight(gain.low, streams),
        high=as_eight(gain.high, streams),
        baseline=1.0,
        free=told(mean(values(losses, "more steps"))),
        controls={
            "deleted": told(mean(values(losses, "identical prefixes"))),
            "random": told(mean(values(losses, "streams", "random"))),
            "rival": told(averaged),
        },
        arms={arm: told(mean(values(losses, arm))) for arm in ablations},
        trained=as_trained(losses, task),
        details={
            "losses": losses,
            "averaged_models": averaged,
            "nats_for_e_times_the_parameters": slope,
            "times_at_this_many_streams": math.exp(gain.median),
            "published": published_fits(),
        },
    )


# ---- what it costs -----------------------------------------------------------------------------------------------------------------

PAPER_SHAPE = Shape(
    width=WIDTHS[3][0], intermediate=WIDTHS[3][1], layers=COMMON["num_hidden_layers"], heads=COMMON["num_attention_heads"],
    kv_heads=COMMON["num_key_value_heads"], vocab=COMMON["vocab_size"], bias=True,
)  # fmt: skip
COST = Operator("generation at a lower loss", free="a larger model of one stream that the law gives the same loss")
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
    operator=COST,
    paper=PAPER_COST,
    computed="bytes follow from the sizes of the paper's own model, and the larger model from the law fitted to the paper's losses",
    refuted_if="eight streams add as many bytes as the parameters that the law gives the same loss",
)  # fmt: skip
def memory_increase(streams: int, batch: int, prompt: int, new: int) -> Figure:
    """How many times fewer bytes the streams add to the paper's 1.6B model than the parameters they are worth, in half precision.

    Counted are weights, keys and values, prefixes and aggregator, and the largest activations; the lengths that decide are those
    that the paper's cost script takes by itself. Longer answers and more sequences stand beside it: keys and values grow with
    streams, parameters do not.
    """
    fits = published_fits()
    times = fits["stack"]["k"] * math.log(streams) + 1
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
LATENCY_POINT = {"model": "smollm2-135m", "dtype": "bfloat16", "streams": 8, "batch": 1, "prompt": 64, "new": 16}


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
    """A real model, the same as `count` streams (prefixes untrained: they cost as much), and a larger one of random weights."""
    if name == "tiny":
        base: Any = language.small_llama(width=64, layers=2).to(getattr(torch, dtype)).eval()
    else:
        from assay.workloads.models import load_model

        base = load_model(name, dtype=getattr(torch, dtype)).model
    larger = type(base)(grown_config(base.config, PAPER_K * math.log(count) + 1)).to(getattr(torch, dtype)).eval()
    return {
        "one stream": base,
        "streams": ParScaleForCausalLM.from_base(base, parscale_n=count).eval(),
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


def loss_quality(losses: Mapping[str, list[dict[str, float]]]) -> Quality:
    """The streams' loss against that of the larger model which the law gives the same."""
    wider, ours = values(losses, "wider"), values(losses, "streams")
    gap = paired(ours, wider)
    return Quality(
        mean(ours),
        mean(wider),
        low=mean(wider) + gap.low,
        high=mean(wider) + gap.high,
        controls={
            "deleted": mean(values(losses, "identical prefixes")),
            "random": mean(values(losses, "streams", "random")),
            "rival": mean(values(losses, "more steps")),
        },
        rival="one stream trained for as many operations",
    )


@experiment(
    "parscale/latency-increase",
    points={
        "smoke": [{**LATENCY_POINT, "model": "tiny", "dtype": "float32", "streams": 2, "new": 4, "task": SMOKE}],
        "small": [{**LATENCY_POINT, "task": TASK}],
        "full": [
            {**LATENCY_POINT, "new": 64, "task": FULL},
            {**LATENCY_POINT, "new": 64, "batch": 8, "task": FULL},
        ],
    },
    decides={"full": {**LATENCY_POINT, "new": 64, "task": FULL}},
    operator=COST,
    guard=LOSS,
    paper={**PAPER_COST, "prompt": 64, "new": 64},
    departures={
        "model": "SmolLM2-135M: 1.6B parameters take minutes an answer on two cores",
        "new": "16 at small scale, which leaves the prompt a larger part",
        "task": "the loss is that of small models trained here, since none of the paper's can be",
    },
    measured_here="seconds of SmolLM2's whole answers with untrained prefixes on a CPU, not their increase; equal loss on small models",
    refuted_if="the whole interval lies below 1: the streams' answer takes longer, and so adds more time, than the larger model's",
    minutes=150,
)  # fmt: skip
def latency_increase(
    model: str, dtype: str, streams: int, batch: int, prompt: int, new: int, task: Mapping[str, int]
) -> Trial:
    """How much longer the answer of a model of as many parameters takes as the streams are worth, in times of the streams' answer.

    The larger model has k ln P + 1 times the parameters with the paper's k. Whole answers are timed in pairs: they lie on the same side of
    1 as the ratio of the increases, which the paper tells and the details hold, with what the model of an A100 says. Whether both have
    the same loss is the guard: small models trained here, the streams against the model of one stream that the law calls equal, within
    0.02 nats a byte.
    """
    models = contestants(model, dtype, streams)
    runs = {label: partial(answering, made, batch, prompt, new) for label, made in models.items()}

    def details() -> dict[str, Any]:
        value, low, high = increase_ratio(compare_many(runs, rounds=6, max_seconds=60).seconds)
        times = PAPER_K * math.log(streams) + 1
        return {
            "increases": {"value": value, "low": low, "high": high},
            "modelled_on_an_a100": increases(PAPER_SHAPE, times, streams=streams, batch=batch, prompt=prompt, new=new),
            "losses": losses_of(SEARCHED, task),
        }

    return Trial(
        baseline=runs["larger"],
        candidate=runs["streams"],
        arms={"one stream": runs["one stream"]},
        quality=lambda: loss_quality(losses_of(SEARCHED, task)),
        trained=lambda: as_trained(losses_of(SEARCHED, task), task),
        details=details,
    )

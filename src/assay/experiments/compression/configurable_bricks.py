"""Configurable bricks: how many neurons a token can do without, whether neurons specialise, and whether routed groups save time.

Everything is about the MLPs of SmolLM2-135M-Instruct, on text that comes with Python, torch and the system. "Nearly unchanged" is
0.05 nats a token, 5 % of perplexity (our choice, fixed before anything was measured).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.experiments.core import Figure, Guard, Operator, Quality, Trial, experiment
from assay.measure.stats import bootstrap
from assay.methods.compression.configurable_bricks import (
    BrickMlp,
    FunctionalityScorer,
    average_precision,
    below,
    by_oracle,
    by_task,
    for_task,
    mask_neurons,
    masking,
    mean_activations,
    mlps,
    overlap,
    part,
    to_bricks,
)
from assay.methods.core.layers.linears import linears
from assay.methods.core.layers.surgery import output_layer, swap
from assay.methods.core.sparsity.projections import top
from assay.methods.core.sparsity.removal import remove
from assay.workloads.functions import FUNCTIONS, Half, Passage, passages
from assay.workloads.models import load_model
from assay.workloads.quality import perplexity_increase, relative_increase, window_nll
from assay.workloads.text import calibration_windows, document_windows, long_prompt

MODEL = "smollm2-135m"
NEAR = 0.05  # nats a token
LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
HIGH_SCORE = 0.8
JUDGED = ("python", "other languages", "arithmetic")  # the paper's coding, translation and math
APART = [name for name in FUNCTIONS if name != "c++"]  # one kind of text a function
SHARE = 0.05  # of each layer's neurons: a function's specialists
DRAWS = 200  # of documents
TRIES = 8  # random choices that a control is the mean of
STATIC, FLOAT32, ROUTED32 = "the MLPs without half of their neurons", "dense MLPs in float32", "routed MLPs in float32"

Masks = dict[str, Tensor]
Chosen = dict[str, Masks]  # by function


# ---------------------------------------------------------------------------------------- how many neurons a token can do without

MASKING = Operator("the neurons of MLPs on each token", free="the dense model, which loses nothing and saves nothing")
MASKED_POINTS: dict[str, list[dict[str, Any]]] = {
    "smoke": [{"windows": 2, "window": 32, "weights": "as released"}],
    "small": [
        {"windows": 10, "window": 64, "weights": "as released"},
        {"windows": 4, "window": 64, "weights": "off the grid"},
    ],
    "full": [
        {"windows": 24, "window": 512, "weights": "as released"},
        {"windows": 12, "window": 256, "weights": "off the grid"},
    ],
}
MASKED: dict[str, Any] = {
    "decides": {"small": MASKED_POINTS["small"][0], "full": MASKED_POINTS["full"][0]},
    "operator": MASKING,
    "paper": {
        "model": "Llama-3-8B-Instruct and Mistral-7B-Instruct-v0.3",
        "text": "1,000 instances of seven tasks each",
    },
    "departures": {
        "model": "SmolLM2-135M-Instruct, sixty times smaller: no larger one comes with a package",
        "text": "documents of code and English, of which none shares a window with another",
        "windows": "few and short ones at small: every share of every choice is a pass over all of them",
    },
    "measured_here": "the largest share of SmolLM2-135M's neurons masked a token at which the loss is at most 0.05 nats higher",
    "minutes": 60,
}


def _choice_in_vain(limit: float) -> Callable[[Mapping[str, Any]], bool]:
    """Whether the claim is refuted: too few neurons can go, or a choice made once for all tokens does as well."""

    def refutes(record: Mapping[str, Any]) -> bool:
        high = record["measured"]["high"]
        return bool(high < limit or record["controls"]["rival"] > high)

    return refutes


@experiment(
    "configurable_bricks/maskable-neurons",
    points=MASKED_POINTS,
    **MASKED,
    refuted_if="less than three quarters of the paper's 70 % can be masked, or neurons chosen once for all tokens can go as well",
    refutes=_choice_in_vain(0.75 * 70),
)
def maskable_by_activation(windows: int, window: int, weights: str) -> Figure:
    """The share of neurons that can be masked on every token, those of the smallest activations, at 0.05 nats of loss.

    The mean loss over documents is measured at each tenth and joined by lines; documents are resampled. More than 90 % counts as 90.
    The controls at equal budget: the choice left out (the last neurons of every layer, whatever they do), a random choice a token, and
    the cheapest rival, neurons that are weakest on average on calibration text, the same for all tokens: the only one of the four
    that could save work. SmolLM2's weights lie on the grid of a 4-bit file; the second point has them moved off it.
    """
    return _maskable("activation", windows, window, weights)


@experiment(
    "configurable_bricks/maskable-by-output",
    points=MASKED_POINTS | {"small": MASKED_POINTS["small"][:1]},
    **MASKED,
    refuted_if="less than three quarters of the paper's 80 % can be masked, or neurons chosen once for all tokens can go as well",
    refutes=_choice_in_vain(0.75 * 80),
)
def maskable_by_output(windows: int, window: int, weights: str) -> Figure:
    """As `maskable_by_activation`, neurons chosen by output magnitude: activation times the norm of the outgoing weights."""
    return _maskable("output", windows, window, weights)


def _maskable(indicator: Any, windows: int, window: int, weights: str) -> Figure:
    if weights not in ("as released", "off the grid"):
        raise ValueError(f"weights must be 'as released' or 'off the grid', got {weights!r}")
    loaded = load_model(MODEL)
    model: Any = loaded.model if weights == "as released" else off_grid(copy.deepcopy(loaded.model))
    texts = document_windows(loaded.tokenizer, "proof", window=window, n=windows)
    calibration = [row[None] for row in calibration_windows(loaded.tokenizer, window=window, n=windows)]
    dense = window_nll(model, texts)
    curve = torch.stack([masked_loss(model, texts, share, indicator) - dense for share in LEVELS], 1)
    found = bootstrap(curve.numpy(), reach)
    weak = {name: x.mean(0) for name, x in mean_activations(model, calibration, indicator).items()}
    generator = torch.Generator().manual_seed(0)
    choices: dict[str, Callable[[str, Tensor], Tensor]] = {
        "deleted": lambda _, h: torch.arange(h.shape[-1], 0, -1).float().expand_as(h),
        "random": lambda _, h: torch.rand(h.shape, generator=generator),
        "rival": lambda name, h: weak[name].expand_as(h),
    }
    edges = (0.05, 0.1, 0.2, 0.5)
    spread = torch.stack(list(below(model, calibration, edges, indicator).values())).mean(0)
    return Figure(
        found.median,
        "%",
        low=found.low,
        high=found.high,
        baseline=0.0,
        controls={name: first_reach(model, texts, dense, choice) for name, choice in choices.items()},
        details={
            "loss of the dense model, nats": float(dense.mean()),
            "increase by share masked, nats": dict(zip(map(str, LEVELS), curve.mean(0).tolist(), strict=True)),
            "share of neurons below a share of the largest": dict(zip(map(str, edges), spread.tolist(), strict=True)),
        },
    )


def masked_loss(model: nn.Module, texts: Tensor, share: float, indicator: Any) -> Tensor:
    """The loss of each window with that share of neurons masked on every token, (n,) in nats."""
    with masking(model, share, indicator):
        return window_nll(model, texts)


def reach(increases: np.ndarray, axis: int = 1) -> np.ndarray:
    """The per cent of neurons masked at which the mean increase over `axis` first goes beyond NEAR; the last axis are LEVELS."""
    mean = increases.mean(axis=axis)
    curve = np.concatenate([np.zeros_like(mean[..., :1]), mean], -1)
    grid = np.array([0.0, *LEVELS])
    beyond = ~(curve <= NEAR)
    place = np.maximum(beyond.argmax(-1), 1)
    before, after = (np.take_along_axis(curve, (place - back)[..., None], -1)[..., 0] for back in (1, 0))
    with np.errstate(divide="ignore", invalid="ignore"):
        share = grid[place - 1] + (grid[place] - grid[place - 1]) * (NEAR - before) / (after - before)
    return np.asarray(100 * np.where(beyond.any(-1), share, grid[-1]))


def first_reach(model: nn.Module, texts: Tensor, dense: Tensor, choice: Any) -> float:
    """`reach` of one choice, measured no further than it takes."""
    increases = np.full((1, len(LEVELS)), np.inf)
    for place, share in enumerate(LEVELS):
        increases[0, place] = float((masked_loss(model, texts, share, choice) - dense).mean())
        if not increases[0, place] <= NEAR:
            break
    return float(reach(increases[None], axis=1)[0])


def off_grid(model: nn.Module, group: int = 32) -> nn.Module:
    """Every linear weight but the output layer's moved by noise of half the step of a 4-bit grid over groups of inputs, in place."""
    generator, head = torch.Generator().manual_seed(0), output_layer(model)
    with torch.no_grad():
        for layer in linears(model).values():
            if layer is head:
                continue
            groups = layer.weight.unflatten(1, (-1, group))
            step = (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / 15
            noise = torch.randn(groups.shape, generator=generator)
            layer.weight += (0.5 * step * noise).flatten(1)
    return model


# ------------------------------------------------------------------------------------------------------ whether neurons specialise

SPECIALISING = Operator(
    "finding the neurons of a function", free="neurons by the mean activation on the function's text over that on all"
)
PAPER_FUNCTIONS = {
    "functions": "coding, math, linguistic, knowledge, translation, ethics, writing",
    "passages": "1,000 instances of a single function each",
    "model": "Llama-3-8B-Instruct and Mistral-7B-Instruct-v0.3",
}
SMALLER = "SmolLM2-135M-Instruct, sixty times smaller: no larger one comes with a package"


@experiment(
    "configurable_bricks/specialised-neurons",
    points={
        "smoke": [{"functions": ["python", "english", "arithmetic"], "passages": 6, "length": 32}],
        "small": [{"functions": APART, "passages": 16, "length": 64}],
        "full": [
            {"functions": APART, "passages": 150, "length": 128},
            {"functions": list(FUNCTIONS), "passages": 150, "length": 128},
        ],
    },
    decides={"full": {"functions": APART, "passages": 150, "length": 128}},
    operator=SPECIALISING,
    paper=PAPER_FUNCTIONS,
    departures={
        "functions": "kinds of text that are to be had offline and as far apart as the paper's: Python, English, other languages, "
        "arithmetic. A second kind of code, which the paper has not, is told from the first at full only",
        "passages": "16 for fitting and as many held out a function at small, of equal length; 150 at full: there is no more English",
        "model": SMALLER,
    },
    tolerance=0,
    measured_here="share of SmolLM2-135M's layers whose best neuron, chosen on other passages, scores above 0.8 for code, other "
    "languages and arithmetic each",
    refuted_if="for one of the three functions fewer than half of the layers have such a neuron, over the whole interval",
    minutes=30,
)
def specialised_neurons(functions: list[str], passages: int, length: int) -> Figure:
    """Per cent of layers whose best neuron reaches an average precision above 0.8: the least of coding, translation and math.

    "Most layers" is read as half of them. The best neuron of a layer is chosen on one set of documents and scored on another, whose
    documents are resampled within each function. The paper says that neurons specialise by being trained, so the first control is
    the model untrained: the same one with the entries of every weight shuffled, its best neurons chosen as carefully. The random
    choice is that by shuffled labels, the mean of several draws. The rival is no neuron at all: how often the one token occurs
    that told the function best; where it does as well, the functions are told apart by their words, and neurons need know no more.
    """
    loaded = load_model(MODEL)
    fit, held = (labelled(loaded.tokenizer, functions, passages, length, half) for half in halves())
    judged = [name for name in sorted(functions) if name in JUDGED]
    right = {name: torch.tensor([row.function == name for row in held]) for name in judged}
    own, other = (scored(model, fit, held) for model in (loaded.model, untrained(copy.deepcopy(loaded.model))))
    columns, theirs = ({name: best_neurons(found, name) for name in judged} for found in (own, other))

    def share(found: Mapping[str, Tensor], rows: Tensor) -> float:
        return min(high_share(average_precision(found[name][rows], right[name][rows])) for name in judged)

    everything = torch.arange(len(held))
    value = share(columns, everything)
    low, high = np.quantile([share(columns, rows) for rows in resampled(held)], [0.025, 0.975])
    generator = torch.Generator().manual_seed(0)
    tokens = {name: best_token(fit, held, name) for name in judged}
    return Figure(
        value,
        "%",
        low=min(float(low), value),
        high=max(float(high), value),
        controls={
            "deleted": share(theirs, everything),
            "random": min(shuffled_share(own, fit, name, right[name], generator) for name in judged),
            "rival": min(100.0 * (score > HIGH_SCORE) for score in tokens.values()),
        },
        details={
            "best neuron of each layer, held out": scores_of(columns, right),
            "the same of the untrained model": scores_of(theirs, right),
            "as the paper reports it, on the passages the scores come from": summarised(own.scorer),
            "best single token, held out": tokens,
            "specialists in common, where chance has 0.05": overlaps(own.scorer.specialists_),
        },
    )


class Scored(NamedTuple):
    """A scorer, and the mean activations on the passages it was fitted on and on those held out."""

    scorer: FunctionalityScorer
    known: dict[str, Tensor]
    seen: dict[str, Tensor]


def halves() -> tuple[Half, Half]:
    """For fitting, and held out."""
    return "fit", "held out"


def labelled(tokenizer: Any, functions: Sequence[str], n: int, length: int, half: Half) -> list[Passage]:
    """`n` passages of each function."""
    return [found for function in functions for found in passages(tokenizer, function, n, length, half)]


def activations(model: nn.Module, rows: Sequence[Passage]) -> dict[str, Tensor]:
    """The mean activations of every neuron on each passage; no logits are made."""
    return mean_activations(model, [{"input_ids": row.ids, "logits_to_keep": 1, "use_cache": False} for row in rows])


def high_share(scores: Tensor) -> float:
    """Per cent of scores above 0.8."""
    return 100 * float((scores > HIGH_SCORE).double().mean())


def resampled(rows: Sequence[Passage]) -> Iterator[Tensor]:
    """Numbers of passages, documents drawn with replacement within each function, `DRAWS` times."""
    places: dict[str, dict[int, list[int]]] = {}
    for place, row in enumerate(rows):
        places.setdefault(row.function, {}).setdefault(row.document, []).append(place)
    generator = np.random.default_rng(0)
    for _ in range(DRAWS):
        drawn: list[int] = []
        for of in places.values():
            own = list(of.values())
            drawn += [place for i in generator.integers(0, len(own), len(own)) for place in own[i]]
        yield torch.tensor(drawn)


def scored(model: nn.Module, fit: Sequence[Passage], held: Sequence[Passage]) -> Scored:
    """A model's neurons scored on the passages for fitting, and what they do on both halves."""
    known, seen = (activations(model, rows) for rows in (fit, held))
    return Scored(FunctionalityScorer(SHARE).fit(known, [row.function for row in fit]), known, seen)


def best_neurons(found: Scored, function: str) -> Tensor:
    """What each layer's best neuron for a function does on the held-out passages, (passages, layers)."""
    place = found.scorer.functions_.index(function)
    best = [scores[place].argmax() for scores in found.scorer.scores_.values()]
    return torch.stack([x[:, neuron] for x, neuron in zip(found.seen.values(), best, strict=True)], 1)


def untrained(model: nn.Module) -> nn.Module:
    """The model with the entries of every matrix in a random order, in place: its sizes and spreads, and nothing of its training."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                order = torch.randperm(parameter.numel(), generator=generator)
                parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return model


def shuffled_share(
    found: Scored, fit: Sequence[Passage], function: str, right: Tensor, generator: torch.Generator
) -> float:
    """Per cent of layers whose neuron, chosen by shuffled labels, scores above 0.8 on the held-out passages all the same."""
    labels = torch.tensor([row.function == function for row in fit])
    shares = []
    for _ in range(TRIES):
        shuffled = labels[torch.randperm(len(labels), generator=generator)]
        best = [average_precision(x, shuffled).argmax() for x in found.known.values()]
        columns = torch.stack([x[:, neuron] for x, neuron in zip(found.seen.values(), best, strict=True)], 1)
        shares.append(high_share(average_precision(columns, right)))
    return float(np.mean(shares))


def scores_of(columns: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """The held-out average precision of each layer's neuron, by function."""
    return {name: average_precision(x, right[name]).tolist() for name, x in columns.items()}


def best_token(fit: Sequence[Passage], held: Sequence[Passage], name: str) -> float:
    """The held-out average precision of the count of one token, the one that tells the function best in the passages for fitting."""
    tokens = torch.cat([row.ids.flatten() for row in fit]).unique()
    counts = {
        half: torch.stack([(row.ids.flatten()[:, None] == tokens).sum(0) for row in rows]).float()
        for half, rows in (("fit", fit), ("held out", held))
    }
    right = {
        half: torch.tensor([row.function == name for row in rows]) for half, rows in (("fit", fit), ("held out", held))
    }
    best = int(average_precision(counts["fit"], right["fit"]).argmax())
    return float(average_precision(counts["held out"][:, best], right["held out"]))


def summarised(scorer: FunctionalityScorer) -> dict[str, dict[str, float]]:
    """Means over the layers of best, best 0.5 %, mean and chance, by function."""
    return {
        function: {
            field: float(np.mean([getattr(scores, field) for scores in layers.values()]))
            for field in ("best", "best_share", "mean", "chance")
        }
        for function, layers in scorer.summary().items()
    }


def overlaps(chosen: Chosen) -> dict[str, float]:
    """The share of specialists that two functions have in common, for every pair."""
    names = sorted(chosen)
    return {f"{a} and {b}": overlap(chosen[a], chosen[b]) for i, a in enumerate(names) for b in names[i + 1 :]}


# ---------------------------------------------------------------------------------------- whether a function dies with its neurons


@experiment(
    "configurable_bricks/pruning-hits-its-function",
    points={
        "smoke": [{"functions": ["python", "arithmetic"], "passages": 4, "judged": 2, "length": 24}],
        "small": [{"functions": list(FUNCTIONS), "passages": 12, "judged": 3, "length": 48}],
        "full": [{"functions": list(FUNCTIONS), "passages": 150, "judged": 100, "length": 128}],
    },
    operator=SPECIALISING,
    paper=PAPER_FUNCTIONS | {"share": 0.05},
    departures={
        "functions": "kinds of text that are to be had offline: Python, C++, English, other languages, arithmetic",
        "passages": "12 for fitting and 3 held out a function at small, of equal length; 150 and 100 at full",
        "model": SMALLER,
        "share": "5 % of each layer's neurons; whether of a layer or of all, the paper leaves open",
    },
    measured_here="nats that passages lose more with their own function's neurons silenced than with another's, in SmolLM2-135M",
    refuted_if="passages lose no more with their own function's neurons silenced than with another's, over the whole interval",
    minutes=60,
)
def pruning_hits_its_function(functions: list[str], passages: int, judged: int, length: int) -> Figure:
    """How much more a passage's loss rises with its own function's 5 % of neurons silenced than with another function's, in nats.

    The diagonal of the paper's matrix against the rest of it, as a difference of losses: ratios of perplexity explode. Neurons are
    chosen on some documents and judged on others, which are resampled. The free rival is what an expert does in a line: the
    neurons with the largest mean activation on the function's passages over that on all. Controls, as many neurons each: a choice by
    shuffled labels, a random one, and the neurons with the largest mean activations on the function's passages (residents among them).
    """
    loaded = load_model(MODEL)
    fit, held = (
        labelled(loaded.tokenizer, functions, n, length, half)
        for n, half in zip((passages, judged), halves(), strict=True)
    )
    known, labels = activations(loaded.model, fit), [row.function for row in fit]
    ids = torch.cat([row.ids for row in held])
    dense = passage_losses(loaded.model, ids)
    generator = torch.Generator().manual_seed(0)
    shuffled = [labels[i] for i in torch.randperm(len(labels), generator=generator).tolist()]
    choices: dict[str, Chosen] = {
        "scores": specialists(known, labels),
        "means": by_means(known, labels),
        "deleted": specialists(known, shuffled),
        "random": by_chance(known, labels, generator),
        "largest": by_means(known, labels, relative=False),
    }
    increases = {name: losses_without(loaded.model, ids, chosen) - dense for name, chosen in choices.items()}
    own = {name: dominance(found, sorted(set(labels)), held) for name, found in increases.items()}
    found = bootstrap(own["scores"], np.mean)
    without_residents = FunctionalityScorer(SHARE, residents=SHARE).fit(known, labels).specialists_
    return Figure(
        found.median,
        "nats",
        low=found.low,
        high=found.high,
        baseline=0.0,
        free=float(own["means"].mean()),
        controls={
            "deleted": float(own["deleted"].mean()),
            "random": float(own["random"].mean()),
            "rival": float(own["largest"].mean()),
        },
        details={
            "increase in nats, by function silenced and function read": {
                name: matrix(grid, sorted(set(labels)), held) for name, grid in increases.items()
            },
            "loss of the dense model, nats": float(dense.mean()),
            "specialists in common, where chance has 0.05": overlaps(choices["scores"]),
            "the same without residents": overlaps(without_residents),
        },
    )


def specialists(known: Mapping[str, Tensor], labels: Sequence[str]) -> Chosen:
    """The neurons of each function, by FuncScore."""
    return FunctionalityScorer(SHARE).fit(known, labels).specialists_


def by_means(known: Mapping[str, Tensor], labels: Sequence[str], *, relative: bool = True) -> Chosen:
    """As many neurons of each function, by their mean activation on its passages, over that on all of them if `relative`."""
    chosen: Chosen = {}
    for function in sorted(set(labels)):
        rows = torch.tensor([label == function for label in labels])
        chosen[function] = {
            mlp: top(x[rows].mean(0) / (x.mean(0).clamp_min(1e-12) if relative else 1.0), part(SHARE, x.shape[1]))
            for mlp, x in known.items()
        }
    return chosen


def by_chance(known: Mapping[str, Tensor], labels: Sequence[str], generator: torch.Generator) -> Chosen:
    """As many neurons of each function, drawn."""
    return {
        function: {
            mlp: top(torch.rand(x.shape[1], generator=generator), part(SHARE, x.shape[1])) for mlp, x in known.items()
        }
        for function in sorted(set(labels))
    }


@torch.no_grad()
def passage_losses(model: Any, ids: Tensor, rows: int = 8) -> Tensor:
    """The loss of each passage (n, length), in nats a token: (n,)."""
    found = []
    for some in ids.split(rows):
        logits = model(input_ids=some, use_cache=False).logits[:, :-1].float()
        losses = F.cross_entropy(logits.flatten(0, 1), some[:, 1:].flatten(), reduction="none")
        found.append(losses.view(len(some), -1).double().mean(1))
    return torch.cat(found)


def losses_without(model: nn.Module, ids: Tensor, chosen: Chosen) -> Tensor:
    """The losses of all passages with each function's neurons silenced, (functions, passages); functions in order of their names."""
    found = []
    for function in sorted(chosen):
        with mask_neurons(model, chosen[function]):
            found.append(passage_losses(model, ids))
    return torch.stack(found)


def dominance(increases: Tensor, functions: Sequence[str], rows: Sequence[Passage]) -> np.ndarray:
    """By document: what its passages lose with their own function silenced, less the mean of what they lose with another one."""
    found: dict[tuple[str, int], list[float]] = {}
    for place, row in enumerate(rows):
        own = functions.index(row.function)
        others = [float(increases[i, place]) for i in range(len(functions)) if i != own]
        more = float(increases[own, place]) - float(np.mean(others))
        found.setdefault((row.function, row.document), []).append(more)
    return np.array([np.mean(values) for values in found.values()])


def matrix(increases: Tensor, functions: Sequence[str], rows: Sequence[Passage]) -> dict[str, dict[str, float]]:
    """The mean increase by function silenced and function read."""
    of = {name: torch.tensor([row.function == name for row in rows]) for name in functions}
    return {a: {b: float(increases[i, of[b]].mean()) for b in functions} for i, a in enumerate(functions)}


# -------------------------------------------------------------------------------------------------- whether routed groups save time


def _not_worth_routing(record: Mapping[str, Any]) -> bool:
    """Neurons removed for good are faster and keep as much, or dense MLPs in float32 are faster than routed ones in either type."""
    ratios, quality = record["ratios"], record["quality"]
    better = ratios[STATIC]["high"] < 1 and quality["controls"]["rival"] <= quality["candidate"]
    dense = ratios[FLOAT32]
    return bool(better or (dense["high"] < 1 and dense["median"] <= ratios[ROUTED32]["median"]))


@experiment(
    "configurable_bricks/brick-decode-speed",
    points={
        "smoke": [{"groups": 16, "active": 8, "tokens": 2, "calibration": 2, "windows": 2, "window": 32}],
        "small": [{"groups": 16, "active": 8, "tokens": 12, "calibration": 16, "windows": 8, "window": 64}],
        "full": [{"groups": 16, "active": 8, "tokens": 64, "calibration": 128, "windows": 24, "window": 512}],
    },
    operator=Operator("the MLPs of a decoding step", free="the dense MLPs in bfloat16"),
    paper={"model": "Llama-3-8B-Instruct and Mistral-7B-Instruct-v0.3"},
    departures={
        "model": "SmolLM2-135M-Instruct in bfloat16",
        "groups": "16 groups of which 8 are computed, half of the MLPs' MACs: the paper proposes routing and gives no sizes",
    },
    guard=Guard("perplexity of held-out documents", 0.05),
    refutes=_not_worth_routing,
    refuted_if="the routed MLPs are slower than the dense ones; or the same MLPs with half of their neurons removed for good are faster "
    "and keep at least as much; or the dense ones are faster in float32 than the routed ones in bfloat16 and in float32",
    measured_here="all MLPs of a decoding step of SmolLM2-135M, one token at a time",
    minutes=30,
)
def brick_decode_speed(groups: int, active: int, tokens: int, calibration: int, windows: int, window: int) -> Trial:
    """All MLPs of SmolLM2 for one token after the other: dense, and as groups of which a router picks `active`, its own time included.

    Each layer gets what it really gets on that token. Both are in bfloat16, so that the dense MLPs are the paper's baseline and the
    free one at once; both are timed in float32 as well. Clustering and fitting the routers are done once and not timed here; their
    seconds stand in the details. The controls at equal budget, as perplexity of the whole model: the router left out (the same drawn
    groups for every token), random groups a token, and the neurons with the least mean output magnitude removed for good, which is
    timed as well. In the details stand a router that knows ("oracle"), groups chosen once ("task"), and a router that knows in groups
    of neurons of like magnitude ("ranked").
    """
    loaded = load_model(MODEL, dtype=torch.bfloat16)
    model: Any = loaded.model
    texts = [row[None] for row in calibration_windows(loaded.tokenizer, window=128, n=calibration)]
    names = list(mlps(model))
    inputs = mlp_inputs(model, names, long_prompt(loaded.tokenizer, tokens))
    begun = time.perf_counter()
    routed = to_bricks(copy.deepcopy(model), texts, groups=groups, active=active)
    details: dict[str, Any] = {"seconds to cluster and to fit": time.perf_counter() - begun}
    static = in_dtype(copy.deepcopy(model), torch.float32)
    means = {name: x.mean(0) for name, x in mean_activations(static, texts, "output").items()}
    in_dtype(without_weakest(static, means, active / groups), torch.bfloat16)

    def run(changed: nn.Module, dtype: torch.dtype = torch.bfloat16) -> Callable[[], None]:
        layers = [changed.get_submodule(name) for name in names]
        if dtype != torch.bfloat16:
            layers = [copy.deepcopy(layer).to(dtype) for layer in layers]
        given = [[x.to(dtype) for x in inputs[name].split(1)] for name in names]

        @torch.no_grad()
        def step() -> None:
            for token in range(tokens):
                for layer, rows in zip(layers, given, strict=True):
                    layer(rows[token])

        return step

    def quality() -> Quality:
        documents = document_windows(loaded.tokenizer, "proof", window=window, n=windows)
        base = window_nll(model, documents)
        found = {"router": window_nll(routed, documents), "rival": window_nll(static, documents)}
        generator = torch.Generator().manual_seed(0)
        layers = routed_layers(routed)
        before = [(layer.chooser, layer.task) for layer in layers]
        choosers: dict[str, Callable[[BrickMlp, Tensor], Tensor]] = {
            "random": chance_groups(generator), "oracle": by_oracle, "deleted": by_task,
        }  # fmt: skip
        for name, chooser in choosers.items():
            for layer in layers:
                layer.chooser = chooser
                layer.task = torch.randperm(groups, generator=generator)[:active]
            found[name] = window_nll(routed, documents)
        found["task"] = window_nll(for_task(routed, texts), documents)
        found["ranked"] = window_nll(ranked(copy.deepcopy(model), means, groups, active), documents)
        for layer, (chooser, task) in zip(layers, before, strict=True):
            layer.chooser, layer.task = chooser, task
        dense = float(base.mean().exp())
        increase = {name: relative_increase(base, nll) for name, nll in found.items()}
        shown = bootstrap(increase["router"].differences.numpy(), perplexity_increase)
        worse = {name: dense * (1 + lost.relative) for name, lost in increase.items()}
        details["perplexity"] = worse | {"dense": dense}
        return Quality(
            dense * (1 + shown.median),
            dense,
            dense * (1 + shown.low),
            dense * (1 + shown.high),
            controls={name: worse[name] for name in ("deleted", "random", "rival")},
            rival="half of the neurons removed for good, by their mean output magnitude",
        )

    return Trial(
        run(model),
        run(routed),
        arms={STATIC: run(static), FLOAT32: run(model, torch.float32), ROUTED32: run(routed, torch.float32)},
        quality=quality,
        details=lambda: details,
    )


def mlp_inputs(model: Any, names: Sequence[str], ids: Tensor) -> dict[str, Tensor]:
    """What each MLP is given for each token of a prompt: (tokens, width)."""
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            kept[name] = args[0][0].detach().clone()

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
    try:
        with torch.no_grad():
            model(ids, logits_to_keep=1, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return kept


def without_weakest(model: nn.Module, means: Mapping[str, Tensor], density: float) -> nn.Module:
    """The model with that share of each MLP's neurons, those of the largest mean output magnitude; the others are really removed."""
    remove(model, {name: top(x, part(density, len(x))) for name, x in means.items()})
    return model


def ranked(model: nn.Module, means: Mapping[str, Tensor], groups: int, active: int) -> nn.Module:
    """The model with neurons of like mean output magnitude in one group, of which those that do most on each token are computed."""
    layers: dict[str, nn.Module] = {}
    for name, x in means.items():
        places = x.argsort(descending=True, stable=True).argsort()
        layer = BrickMlp(model.get_submodule(name), places // (len(x) // groups), active).eval()
        layer.chooser = by_oracle
        layers[name] = layer
    swap(model, layers)
    return model


def routed_layers(model: nn.Module) -> list[BrickMlp]:
    """The MLPs in groups, in the order of the layers."""
    return [module for module in model.modules() if isinstance(module, BrickMlp)]


def in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model with its parameters in that dtype, in place; its buffers (rotary frequencies) stay as they are."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def chance_groups(generator: torch.Generator) -> Callable[[BrickMlp, Tensor], Tensor]:
    """A chooser that draws as many groups for each token."""

    def choose(layer: BrickMlp, rows: Tensor) -> Tensor:
        return torch.rand(len(rows), layer.groups, generator=generator).topk(layer.active, dim=-1).indices

    return choose

"""Attention offloading: what a fleet of two kinds of devices makes for its price, by simulation, and what a real split into two processes
does: is it exact, what crosses, and what lies beside what?

Throughput, price and bandwidth are computed from sizes, data sheets and prices as recalled from the paper, with the same simulator for
every system: those claims are `computed`, whatever comes out. Beside the paper's baseline (H100s alone, at its own most requests) stand the
cheapest fleet of one kind of device of the same table, and the same split over devices of one kind.

The overlap is measured: one process has the weights, another keys, values and attention, a core each. This machine's memory is no
network, so that messages are given the times they had in the paper, as shares of a layer's computing, and those are slept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from assay.experiments.children import count_children_as_ours
from assay.experiments.core import Figure, Guard, Operator, Quality, Trial, experiment
from assay.measure.stats import student_interval
from assay.methods.core.fleet.hardware import Link
from assay.methods.core.fleet.traces import Request, Streams
from assay.methods.core.generation.merging import Partial
from assay.methods.serving.attention_offloading import (
    DEVICES,
    H20,
    H100,
    IDEAL,
    LLAMA3_70B,
    LLAMA_33B,
    LLAMA_65B,
    NETWORK,
    PRICES_OF,
    AttentionWorkers,
    Batch,
    LocalPool,
    Plan,
    Setup,
    Shape,
    Split,
    SplitDecoder,
    Timeline,
    Whole,
    at_best,
    best_split,
    best_whole,
    bytes_a_step,
    model_seconds,
    plan,
    shape_of,
    simulated,
)
from assay.workloads.models import load_model
from assay.workloads.text import heldout_windows

# -------------------------------------------------------------------------------------------------------- simulated, computed

SHAPES: dict[str, Shape] = {"llama-33b": LLAMA_33B, "llama-65b": LLAMA_65B, "llama3-70b": LLAMA3_70B}
DEGREES = {"llama-33b": ((1, 2), 2), "llama-65b": ((2, 4), 4), "llama3-70b": ((2, 4), 4)}
"""Compute and memory devices of the split, and H100s of the baseline at similar cost, as recalled from the paper."""
TRACES = {"azure-code": (2048, 28), "azure-conv": (1155, 211), "kimi-ta": (8560, 182), "kimi-conv": (12035, 343)}
"""Mean tokens of prompts and answers of the paper's four traces, as recalled; the traces themselves are not here."""
SPREAD = 0.7
"""Of the logarithm of lengths; our choice."""
PIECES = 4  # times the most requests at once that a simulation runs through
FEWEST = 200  # requests of a simulation
FULL_OF = (
    0.3,
    0.7,
)  # shares of the tokens made between which it is full: all began at once, and at the end nobody waits

FLEETS = Operator(
    "tokens a second of a fleet of devices at similar cost",
    free="the best fleet of one kind of device of the same table, at no higher cost",
)
COMPUTED = f"simulated from sizes, data sheets and prices ({PRICES_OF}); no device of the paper's ran"


def requests(trace: str, count: int, seed: int) -> list[Request]:
    """`count` requests at time 0, lengths spread around the trace's means; the same for every system."""
    streams, means = Streams(seed), TRACES[trace]
    lengths = []
    for name, mean in zip(("prompt", "answer"), means, strict=True):
        drawn = streams.of(f"{trace} {name}").lognormal(-(SPREAD**2) / 2, SPREAD, count)
        lengths.append(np.maximum(1, np.round(mean * drawn)).astype(int))
    return [Request(0.0, int(prompt), int(new) + 1) for prompt, new in zip(*lengths, strict=True)]


def tokens_per_second(system: Whole | Split, trace: str, count: int, seed: int) -> float:
    """Tokens a second while the system is full."""
    turns = [turn for turn in simulated(system, requests(trace, count, seed)).turns if turn.rows]
    made = np.cumsum([turn.rows for turn in turns])
    first, last = (int(np.searchsorted(made, share * made[-1])) for share in FULL_OF)
    return float(made[last] - made[first]) / (turns[last].end - turns[first].end)


def gained(system: Whole | Split, baseline: Whole, trace: str, seeds: Sequence[int]) -> list[float]:
    """Per cent more tokens a second than the baseline, seed by seed, on the same requests."""
    prompt, new = TRACES[trace]
    count = max(FEWEST, math.ceil(PIECES * max(system.room(prompt + new), baseline.room(prompt + new))))
    found = []
    for seed in seeds:
        ours, theirs = (tokens_per_second(one, trace, count, seed) for one in (system, baseline))
        found.append(100 * (ours / theirs - 1))
    return found


def foreseen(system: Whole | Split, baseline: Whole, context: int) -> float:
    """The same gain from the closed form at the mean context, without any simulation."""
    ours, theirs = at_best(system, context), at_best(baseline, context)
    assert ours is not None
    assert theirs is not None
    return 100 * (ours.tokens_per_second / theirs.tokens_per_second - 1)


def homogeneous(shape: Shape, context: int, price: float, setup: Setup) -> Plan:
    """The fastest fleet of one kind of device of the table at no more than that price."""
    plans = [one for one in plan(shape, DEVICES, context, price=price, setup=setup) if isinstance(one.system, Whole)]
    return max(plans, key=lambda one: one.tokens_per_second)


CELLS = {"models": list(SHAPES), "traces": list(TRACES), "batches": 2}


@experiment(
    "attention_offloading/throughput-similar-cost",
    points={
        "smoke": [{"models": ["llama-33b"], "traces": ["azure-code"], "batches": 2, "seeds": [0, 1]}],
        "small": [{**CELLS, "seeds": [0, 1, 2]}],
        "full": [{**CELLS, "seeds": list(range(10))}],
    },
    operator=FLEETS,
    paper={**CELLS, "devices": "H100 and H20 on a 400 Gb/s network", "baseline": "vLLM on H100s, decoding only"},
    computed=COMPUTED,
    measured_here="simulated tokens a second; requests' lengths are drawn around the traces' means",
    refuted_if="the split makes no more tokens a second than H100s of similar cost, for any model and trace",
    refutes=lambda record: record["measured"]["high"] < 0,
    minutes=30,
)
def throughput_similar_cost(models: list[str], traces: list[str], batches: int, seeds: list[int]) -> Figure:
    """The largest gain over the paper's models and traces, as its 90.1 % is; all of them stand in the details.

    Every system holds as many requests as it has room for. Student's interval over seeds, which draw other requests.
    """
    setup = Setup()
    cells: dict[str, dict[str, Any]] = {}
    gains: dict[str, list[float]] = {}
    for model in models:
        shape, ((a, b), count) = SHAPES[model], DEGREES[model]
        split = Split(shape, H100, a, H20, b, batches, setup)
        whole = Whole(shape, H100, count, setup)
        for trace in traces:
            context = TRACES[trace][0] + TRACES[trace][1] // 2
            name, rows = f"{model}, {trace}", split.room(context) // batches
            gains[name] = gained(split, whole, trace, seeds)
            cells[name] = {
                "gain": sum(gains[name]) / len(seeds),
                "foreseen": foreseen(split, whole, context),
                "requests": split.room(context),
                "requests_of_baseline": whole.room(context),
                "milliseconds_a_token": 1e3 * _at(split, context).seconds,
                "milliseconds_a_token_of_baseline": 1e3 * _at(whole, context).seconds,
                "price": split.price,
                "price_of_baseline": whole.price,
                "best_of_one_kind": (one := homogeneous(shape, context, whole.price, setup)).name,
                "gain_of_best_of_one_kind_foreseen": 100 * (one.tokens_per_second / _at(whole, context).tokens_per_second - 1),
                "saved_by_overlap": 100 * split.overlap_saving(rows, float(rows * context)),
                "gigabytes_a_second_needed": split.required_bandwidth(rows, float(rows * context)) / 1e9,
            }  # fmt: skip
    best = max(cells, key=lambda name: cells[name]["gain"])
    model, trace = best.split(", ")
    shape, ((a, b), count) = SHAPES[model], DEGREES[model]
    context = TRACES[trace][0] + TRACES[trace][1] // 2
    whole = Whole(shape, H100, count, setup)
    free = homogeneous(shape, context, whole.price, setup)
    arms: dict[str, Whole | Split] = {
        "two batches of the split, H100s in both pools": Split(shape, H100, a, H100, max(1, count - a), 2, setup),
        "one batch at a time": Split(shape, H100, a, H20, b, 1, setup),
        "without beginning attention early": Split(shape, H100, a, H20, b, batches, Setup(overlap=False)),
    }
    interval = student_interval(gains[best])
    return Figure(
        interval.median,
        "%",
        low=interval.low,
        high=interval.high,
        baseline=0.0,
        free=float(np.mean(gained(free.system, whole, trace, seeds))),
        arms={name: float(np.mean(gained(system, whole, trace, seeds))) for name, system in arms.items()},
        details={"largest": best, "free": free.name, "free_price": free.price, "prices_of": PRICES_OF, "cells": cells},
    )


def _at(system: Whole | Split, context: int) -> Plan:
    found = at_best(system, context)
    assert found is not None
    return found


GRID = {"models": list(SHAPES), "contexts": [1024, 2048, 4096, 8192, 16384]}


@experiment(
    "attention_offloading/throughput-per-dollar",
    points={
        "smoke": [{"models": ["llama3-70b"], "contexts": [4096]}],
        "small": [GRID],
        "full": [GRID],
    },
    operator=Operator("tokens for a dollar", free="the cheapest tokens of one kind of device of the same table"),
    paper={
        "models": "those of the first version",
        "contexts": GRID["contexts"],
        "devices": "those of the first version",
    },
    departures={"models": "the second version's models and table of prices: the first's are not known to us"},
    computed=f"computed from sizes, data sheets and prices ({PRICES_OF}), as the first version's estimate was",
    refuted_if="no split makes more tokens for a dollar than H100s alone, at any context",
    refutes=lambda record: record["measured"]["high"] < 1,
)
def throughput_per_dollar(models: list[str], contexts: list[int]) -> Figure:
    """The planner's best split over its best fleet of H100s, at each fleet's own most requests: the largest over models and contexts.

    `free` and the arms are of the same model and context, over the same H100s.
    """
    cells: dict[str, dict[str, Any]] = {}
    for model in models:
        for context in contexts:
            plans = plan(SHAPES[model], DEVICES, context)
            found = {
                "split": best_split(plans),
                "H100s": best_whole(plans, H100),
                "one kind": best_whole(plans),
                "split of one kind": best_split(plans, same=True),
            }
            known = {name: one for name, one in found.items() if one is not None}
            base = known["H100s"].tokens_per_dollar
            cells[f"{model}, {context}"] = {
                name: {"plan": one.name, "gain": one.tokens_per_dollar / base, "requests": one.requests, "seconds": one.seconds}
                for name, one in known.items()
            }  # fmt: skip
    best = max(cells, key=lambda name: cells[name]["split"]["gain"])
    return Figure(
        cells[best]["split"]["gain"],
        "x",
        baseline=1.0,
        free=cells[best]["one kind"]["gain"],
        arms={"a split over devices of one kind": cells[best]["split of one kind"]["gain"]},
        details={"largest": best, "cells": cells, "prices_of": PRICES_OF},
    )


BANDWIDTH = {"models": ["llama3-70b"], "contexts": [4096, 8192, 16384], "most_rows": 300, "slowdown": 0.2}


@experiment(
    "attention_offloading/required-bandwidth",
    points={
        "smoke": [{**BANDWIDTH, "contexts": [4096]}],
        "small": [BANDWIDTH],
        "full": [{**BANDWIDTH, "models": list(SHAPES)}],
    },
    operator=Operator("bytes a second between two pools of devices", free="none sent: all on one kind of device"),
    paper=BANDWIDTH,
    departures={"models": "at full all three of the second version's"},
    computed="the closed form (2 + 2/G) e d B L over the roofline's times of one H100 and one H20",
    refuted_if="more than 30 GB/s and a quarter are needed at some batch up to 300",
    refutes=lambda record: record["measured"]["low"] > 1.25 * 30,
)
def required_bandwidth_of_batches(models: list[str], contexts: list[int], most_rows: int, slowdown: float) -> Figure:
    """GB/s that make a step at most `slowdown` longer, the largest over models, contexts and batches up to `most_rows`, at peak rates."""
    found: dict[str, dict[str, float]] = {}
    for model in models:
        split = Split(SHAPES[model], H100, 1, H20, 1, 1, IDEAL)
        for context in contexts:
            rows = sorted({1, most_rows, *range(25, most_rows, 25)})
            found[f"{model}, {context}"] = {
                str(n): split.required_bandwidth(n, float(n * context), slowdown) / 1e9 for n in rows
            }
    return Figure(max(value for row in found.values() for value in row.values()), "GB/s", details={"by_rows": found})


# ------------------------------------------------------------------------------------------------------------------ measured

MODEL = "smollm2-135m"
PAPER_SPLIT = Split(LLAMA_65B, H100, 2, H20, 4, 1, Setup())
PAPER_CONTEXT = 4096
STEPS = 3  # by which a layer's time is known


def paper_link(shape: Shape, rows: int, slice_seconds: float) -> Link:
    """A link whose messages take as long, by a layer's slice, as the paper's did: Llama-65B on two H100s and four H20s, full of requests
    of 4,096 tokens. Latency and the sending of a batch's keys and values are kept as shares of the slice, that of queries not: G differs.
    """
    their_rows = PAPER_SPLIT.room(PAPER_CONTEXT)
    theirs = PAPER_SPLIT.shape
    slice_of_theirs = model_seconds(theirs, H100, 2, their_rows, PAPER_SPLIT.setup) / theirs.layers
    sending = theirs.sent().keys_values * theirs.kv_bytes * their_rows / NETWORK.bandwidth
    ours = shape.sent().keys_values * shape.kv_bytes * rows
    return Link(
        bandwidth=ours / (sending / slice_of_theirs * slice_seconds),
        latency=NETWORK.latency / slice_of_theirs * slice_seconds,
    )


class Sides:
    """The model, its workers and everything that is timed: the same rows behind the same prompts, which every run leaves as they were."""

    def __init__(self, rows: int, context: int, layers: int, tokens: int) -> None:
        self.cores, self.tokens = torch.get_num_threads(), tokens
        loaded = load_model(MODEL)
        model: Any = loaded.model
        model.config.num_hidden_layers = layers
        model.model.layers = model.model.layers[:layers]
        self.model = model
        self.ids = heldout_windows(loaded.tokenizer, window=context, n=rows)
        self.shape = shape_of(self.model)
        self.pool = AttentionWorkers(1, slots=3, timeout=600)
        self.cache, self.logits = self.prefilled()
        self.decoder = SplitDecoder(self.model, self.pool)
        half = rows // 2
        self.batch = self.adopted(self.pool, slice(0, rows))
        self.local = self.adopted(LocalPool(), slice(0, rows))
        self.halves = [self.adopted(self.pool, slice(0, half)), self.adopted(self.pool, slice(half, rows))]
        self.slice_seconds, self.head_seconds = self.calibrate()
        self.link = paper_link(self.shape, rows, self.slice_seconds)
        self.pool.set_link(self.link)

    @torch.no_grad()
    def prefilled(self) -> tuple[Any, Tensor]:
        from transformers.cache_utils import DynamicCache

        cache = DynamicCache(config=self.model.config)
        out = self.model(input_ids=self.ids, cache=cache, use_cache=True, logits_to_keep=1)
        return cache, out.logits[:, -1]

    def adopted(self, pool: Any, rows: slice) -> Batch:
        """These rows of the prompts, with their keys and values in a pool."""
        from transformers.cache_utils import DynamicCache

        part = DynamicCache(config=self.model.config)
        for number, layer in enumerate(self.cache.layers):
            part.update(layer.keys[rows], layer.values[rows], number)
        self.decoder.pool = pool
        room = self.ids.shape[1] + self.tokens
        batch = self.decoder.adopt(part, self.ids[rows], self.logits[rows], tokens=room)
        self.decoder.pool = self.pool
        return batch

    def split(self, overlap: bool) -> Tensor:
        """`tokens` greedy tokens of all rows through one batch; the logits of the last."""
        torch.set_num_threads(1)
        self.decoder.overlap = overlap
        return self.decoded([self.batch])[0]

    def in_turn(self) -> Tensor:
        """The same rows as two batches that take turns."""
        torch.set_num_threads(1)
        self.decoder.overlap = True
        return torch.cat(self.decoded(self.halves))

    def alone(self) -> Tensor:
        """The same slices in this process, on all cores, with the keys and values that the memory device had, in room made beforehand."""
        torch.set_num_threads(self.cores)
        self.decoder.overlap = False
        return self.decoded([self.local])[0]

    def decoded(self, batches: list[Batch]) -> list[Tensor]:
        """The logits of the last of `tokens` steps; the batches are then as before."""
        before = [batch.logits for batch in batches]
        self.decoder.generate(batches, self.tokens + 1)
        found = [batch.logits for batch in batches]
        for batch, logits in zip(batches, before, strict=True):
            self.decoder.rewind(batch, self.tokens)
            batch.logits = logits
        return found

    @torch.no_grad()
    def whole(self, threads: int) -> Tensor:
        """The same in one process: the model's own step over its own cache."""
        torch.set_num_threads(threads)
        logits = self.logits
        for _ in range(self.tokens):
            ids = logits.argmax(-1)[:, None]
            logits = self.model(input_ids=ids, cache=self.cache, use_cache=True).logits[:, -1]
        self.cache.crop(-self.tokens)
        return logits

    def timeline(self, run: Callable[[], Any]) -> Timeline:
        line = Timeline()
        self.decoder.timeline = self.pool.timeline = line
        try:
            run()
        finally:
            self.decoder.timeline = self.pool.timeline = None
        return line

    def calibrate(self) -> tuple[float, float]:
        """Seconds of a layer's slice here, and of what a token takes beside them (the head, mostly), the medians of some runs without an
        imitated link.

        The first slice has no layer behind it, and what follows the last layer has the head: a slice is what lies between.
        """
        layers, slices, heads = self.shape.layers, [], []
        for _ in range(STEPS):
            noted = [event for event in self.timeline(lambda: self.split(True)).events if event.lane == "model"]
            between = sum(event.seconds for event in noted if 0 < event.layer < layers)
            slices.append(between / ((layers - 1) * self.tokens))
            heads.append(sum(event.seconds for event in noted) / self.tokens - layers * slices[-1])
        return sorted(slices)[STEPS // 2], sorted(heads)[STEPS // 2]

    def error(self, logits: Tensor) -> float:
        """The largest difference from the model in one process, as a share of its largest logit."""
        own = self.whole(self.cores)
        return float((logits - own).abs().max() / own.abs().max())

    def merged_by(self, merge: Callable[[Sequence[Partial]], Partial]) -> float:
        """The error where parts of the attention are put together in another way."""
        pool = LocalPool(merge=merge)
        self.decoder.overlap = True
        return self.error(self.decoded([self.adopted(pool, slice(0, len(self.ids)))])[0])


def newest_left_out(parts: Sequence[Partial]) -> Partial:
    """The control with the merge deleted: what was looked at early is all that counts."""
    return parts[0]


def by_chance(parts: Sequence[Partial]) -> Partial:
    """Parts weighted by chance instead of by their sums, the same work."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(len(parts), generator=generator, dtype=torch.float64)
    return _weighted(parts, (weights / weights.sum()).tolist())


def averaged(parts: Sequence[Partial]) -> Partial:
    """The cheapest other way: the mean of the parts."""
    return _weighted(parts, [1 / len(parts)] * len(parts))


def _weighted(parts: Sequence[Partial], weights: Sequence[float]) -> Partial:
    output = torch.zeros_like(parts[0].output)
    for part, weight in zip(parts, weights, strict=True):
        output = output + weight * part.output
    return Partial(output, parts[0].lse)


DECODING = Operator(
    "a decoding step whose attention runs in another process",
    free="one process with weights and cache, on all cores",
    exact="the same slices in one process on all cores, with keys and values in room made beforehand",
)
GUARD = Guard(
    "largest difference of logits from the model in one process, as a share of the largest", 1e-3, relative=False
)
SMOKE = {"rows": 4, "context": 64, "layers": 2, "tokens": 2}
SMALL = {"rows": 8, "context": 1024, "layers": 10, "tokens": 4}
FULL = {"rows": 32, "context": 2048, "layers": 30, "tokens": 8}


@experiment(
    "attention_offloading/overlap-saving",
    points={"smoke": [SMOKE], "small": [SMALL], "full": [FULL]},
    operator=DECODING,
    paper={
        "model": "Llama-65B, where every query head has keys of its own",
        "rows": "as many as fit",
        "context": PAPER_CONTEXT,
        "layers": 80,
        "tokens": 1,
        "link": "RDMA that passes the host by, 33 us for the round trip, 45.7 GB/s",
    },
    departures={
        "model": "SmolLM2-135M, whose three key-value heads serve nine: less is projected and sent while attention runs; and its head over "
        "49,152 words, a large part of its weights, is in every arm's time and makes the saving look smaller",
        "rows": "as many as two cores decode in a tenth of a second",
        "context": "shorter, so that prompts are run in seconds; a slice and its attention take about as long as each other",
        "layers": "fewer at small: every layer is the same work",
        "tokens": "a few, after each other",
        "link": "messages between two processes, slept as long, by a slice's time, as the paper's took",
    },
    guard=GUARD,
    measured_here="time a token saved between two processes of this machine, whose messages sleep as long, by a slice of a layer, as the "
    "paper's were under way",
    refuted_if="beginning attention before key and value are there makes a token take longer, the whole interval",
    memory_gib=16,
    minutes=60,
)
def overlap_saving(rows: int, context: int, layers: int, tokens: int) -> Trial:
    """A token of a batch in two processes, one core each: attention begun with the query, against begun with query, key and value.

    The margin, a thousandth of the largest logit, is a hundred times float32's rounding and far below what a wrong merge does.
    """
    count_children_as_ours()
    sides = Sides(rows, context, layers, tokens)

    def quality() -> Quality:
        return Quality(
            sides.error(sides.split(True)),
            0.0,
            controls={
                "deleted": sides.merged_by(newest_left_out),
                "random": sides.merged_by(by_chance),
                "rival": sides.merged_by(averaged),
            },
            rival="the mean of the parts",
        )

    def details() -> dict[str, Any]:
        return described(sides)

    return Trial(
        baseline=lambda: sides.split(False),
        candidate=lambda: sides.split(True),
        free=lambda: sides.whole(sides.cores),
        exact=sides.alone,
        arms={
            "two halves of the batch in turn": sides.in_turn,
            "one process on one core": lambda: sides.whole(1),
        },
        quality=quality,
        details=details,
    )


def described(sides: Sides) -> dict[str, Any]:
    """What crossed, against the closed form; what lay beside what; what the cost model says of the measured times."""
    rows, tokens = len(sides.ids), sides.tokens
    runs: dict[str, tuple[Callable[[], Any], Link | None]] = {
        "one after the other": (lambda: sides.split(False), sides.link),
        "overlapped": (lambda: sides.split(True), sides.link),
        "two halves in turn": (sides.in_turn, sides.link),
        "one after the other, no link imitated": (lambda: sides.split(False), None),
        "overlapped, no link imitated": (lambda: sides.split(True), None),
    }
    found: dict[str, Any] = {}
    for name, (run, link) in runs.items():
        sides.pool.set_link(link)
        sides.pool.meter.clear()
        line = sides.timeline(run)
        links = [lane for lane in line.lanes if lane.startswith("link")]
        found[name] = {
            "payload_bytes": dict(sides.pool.meter.bytes),
            "messages": dict(sides.pool.meter.messages),
            "bytes_a_token": sides.pool.meter.decoding / tokens,
            "milliseconds_a_token": 1e3 * line.seconds / tokens,
            "model_busy": line.busy("model") / line.seconds,
            "memory_busy": line.busy("memory 0") / line.seconds,
            "both_busy": line.together("model", "memory 0") / line.seconds,
            "link_in_use": line.busy(*links) / line.seconds,
            "link_beside_computing": line.together("link 0 out", "model", "memory 0") / max(line.busy("link 0 out"), 1e-12),
            "timeline": line.within(line.start, line.start + line.seconds / tokens / 4).text(96).splitlines(),
        }  # fmt: skip
    sides.pool.set_link(sides.link)
    usual, early = found["one after the other"], found["overlapped"]
    measured_attention = early["memory_busy"] * early["milliseconds_a_token"] / 1e3 / sides.shape.layers
    foretold = {overlap: foretold_seconds(sides, measured_attention, overlap) for overlap in (False, True)}
    rows_of_paper = PAPER_SPLIT.room(PAPER_CONTEXT)
    alike = Split(LLAMA3_70B, H100, 2, H20, 4, 1, Setup())
    closed = bytes_a_step(sides.shape, rows)
    found = {
        "runs": found,
        "closed_form_bytes_a_token": closed,
        "traffic_is_the_closed_form": all(one["bytes_a_token"] == closed for one in (usual, early)),
        "slice_milliseconds": 1e3 * sides.slice_seconds,
        "head_milliseconds": 1e3 * sides.head_seconds,
        "attention_milliseconds": 1e3 * measured_attention,
        "link": {"latency": sides.link.latency, "bandwidth": sides.link.bandwidth},
        "milliseconds_a_token_foretold": {
            "one after the other": 1e3 * foretold[False],
            "overlapped": 1e3 * foretold[True],
        },
        "foretold_over_measured": {
            "one after the other": 1e3 * foretold[False] / usual["milliseconds_a_token"],
            "overlapped": 1e3 * foretold[True] / early["milliseconds_a_token"],
        },
        "saving_computed_for_the_paper": {
            "llama-65b": 100 * PAPER_SPLIT.overlap_saving(rows_of_paper, float(rows_of_paper * PAPER_CONTEXT)),
            "llama3-70b": 100 * alike.overlap_saving(300, 300.0 * PAPER_CONTEXT),
        },
        "errors": {
            "one after the other": sides.error(sides.split(False)),
            "two halves in turn": sides.error(sides.in_turn()),
            "in one process": sides.error(sides.alone()),
        },
        "paths_of_worker": sides.pool.paths(),
    }
    sides.pool.close()
    return found


def foretold_seconds(sides: Sides, attention: float, overlap: bool) -> float:
    """A token's seconds by the chain of the cost model, from the measured times of a slice and of its attention, and the link's."""
    sent, size, link = sides.shape.sent(), sides.shape.kv_bytes * len(sides.ids), sides.link
    query, late, output = (count * size / link.bandwidth for count in sent)
    work, delay = sides.slice_seconds, 2 * link.latency
    if not overlap:
        return sides.shape.layers * (work + query + late + attention + output + delay) + sides.head_seconds
    layer = sum(parameter.numel() for parameter in sides.model.model.layers[0].parameters())
    projected = min(1.0, sides.shape.numbers_kept() * sides.shape.width / layer) * work
    hidden = max(attention, max(projected - query, 0.0) + late)
    return sides.shape.layers * (work - projected + query + hidden + output + delay) + sides.head_seconds

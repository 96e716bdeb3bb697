"""Ladder Residual: does a transformer whose sums over ranks are hidden behind computing decode faster, and is it as good?

Times are of real processes, one a rank, one thread each, which decode with random weights in lockstep over gloo. This machine's loopback
is no link between devices: its messages use the very cores that compute. So each message is given the latency that it had in the paper, as
a share of a module's computing, and that latency is slept, which takes no processor time; what gloo takes besides is in every arm.

Quality is of small byte-level models of the same kinds, trained from scratch alike, three seeds each, judged on unseen documents.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn

from assay.experiments.core import Guard, Operator, Quality, Trained, Trial, experiment
from assay.experiments.inference.language import bigram_floor, heldout, nll, small_llama, trained, validation
from assay.experiments.mixers.training import in_parallel, over_seeds
from assay.experiments.rates import chosen, searched
from assay.measure import clock
from assay.measure.clock import OthersWatch
from assay.methods.core import kernels
from assay.methods.core.models.decoder import Pass
from assay.methods.inference import ladder_residual
from assay.methods.inference.ladder_residual import (
    GroupLink,
    LadderForCausalLM,
    Rank,
    Ranks,
    Silent,
    Timeline,
    schedule,
    shard,
    simulate,
    to_ladder,
)
from assay.workloads.sequences import byte_batches

# Tokens a second of the 70B model on eight GPUs at batch 1, from the data behind the paper's figure: standard, standard without
# peer-to-peer links, and without communication. What they imply of a message's time as a share of a module's computing:
STANDARD, WITHOUT_LINKS, UPPER_BOUND = 77.39, 51.66, 110.59
SHARE = round(UPPER_BOUND / STANDARD - 1, 2)
SHARE_WITHOUT_LINKS = round(UPPER_BOUND / WITHOUT_LINKS - 1, 2)

# ------------------------------------------------------------------------------------------------------------------- quality

ARMS = ("standard", "ladder", "parallel", "desync", "random reads", "no communication")
SEEDS = (0, 1, 2)
BATCH = 16
WINDOWS = 256  # of each of the texts that models are judged on
RANKS = 2  # of desync and of the model without communication
TASK: dict[str, int] = {"width": 64, "layers": 6, "heads": 4, "length": 64, "steps": 250}
SEARCH: dict[str, int] = {**TASK, "steps": 100}


class RandomReads(LadderForCausalLM):
    """The control: every module reads the stream as it was before some earlier module, drawn once; the ladder takes the one before it.

    A message has at least as long to travel as in the ladder.
    """

    def _streams(self, over: Pass) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        streams = [over.hidden]
        for module in range(2 * len(self.parts.layers)):
            at = int(torch.randint(max(module, 1), (1,), generator=generator))
            index, attention = module // 2, module % 2 == 0
            read = streams[at]
            made = self.parts.attention(index, read, over) if attention else self.parts.feed_forward(index, read)
            streams.append(streams[-1] + made)
        return streams[-1]


def language_model(arm: str, seed: int, task: Mapping[str, int]) -> Any:
    """A model of bytes with new weights; all arms of a seed start from the same. "no communication" is one rank's share by itself."""
    base = small_llama(width=task["width"], layers=task["layers"], heads=task["heads"], seed=seed)
    if arm == "standard":
        return base
    if arm == "no communication":
        return shard(base, 0, RANKS)
    if arm == "random reads":
        return RandomReads.from_base(base)
    block: Any = arm
    return to_ladder(base, block=block, ranks=RANKS)


def trained_model(arm: str, seed: int, rate: float, task: Mapping[str, int]) -> Any:
    torch.set_num_threads(1)
    return trained(
        {"arm": arm, "seed": seed, "task": dict(task), "batch": BATCH, "ranks": RANKS},
        lambda: language_model(arm, seed, task),
        lambda: byte_batches(task["length"], BATCH, seed=1 + seed),
        steps=task["steps"],
        rate=rate,
        sources=[ladder_residual, sys.modules[__name__]],
    )


@searched("ladder_residual/bytes", arms=ARMS, grid=(2.5e-3, 5e-3, 1e-2, 2e-2))
def byte_loss(arm: str, rate: float) -> float:
    """Nats a byte on documents kept for the choice, after a shorter training."""
    return float(nll(trained_model(arm, 0, rate, SEARCH), *validation(SEARCH["length"], WINDOWS)).mean())


def loss_of(arm: str, seed: int, task: Mapping[str, int]) -> float:
    """Nats a byte on unseen documents."""
    model = trained_model(arm, seed, chosen("ladder_residual/bytes", arm).rate, task)
    return float(nll(model, *heldout(task["length"], WINDOWS)).mean())


def losses(arms: tuple[str, ...], task: Mapping[str, int]) -> dict[str, list[float]]:
    """`loss_of` of each arm, seed by seed."""
    runs = [(arm, seed, dict(task)) for arm in arms for seed in SEEDS]
    found: dict[str, list[float]] = {arm: [] for arm in arms}
    for (arm, _, _), loss in zip(runs, in_parallel(loss_of, runs), strict=True):
        found[arm].append(loss)
    return found


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def quality(found: Mapping[str, list[float]]) -> Quality:
    """The ladder's loss against the standard's, Student's t over the seeds' differences, between the controls."""
    base = mean(found["standard"])
    lost = over_seeds([ours - theirs for ours, theirs in zip(found["ladder"], found["standard"], strict=True)])
    return Quality(
        base + lost.median,
        base,
        base + lost.low,
        base + lost.high,
        controls={
            "deleted": mean(found["no communication"]),
            "random": mean(found["random reads"]),
            "rival": mean(found["parallel"]),
            "desync, every second module summed": mean(found["desync"]),
        },
        rival="parallel attention and MLP, half as many messages",
    )


def as_trained(found: Mapping[str, list[float]], task: Mapping[str, int]) -> dict[str, Trained]:
    floor = bigram_floor(*heldout(task["length"], WINDOWS))
    rates = {arm: chosen("ladder_residual/bytes", arm) for arm in found}
    return {
        arm: Trained(scores, floor, "a table of pairs of bytes", rates[arm].rate, rates[arm].rates)
        for arm, scores in found.items()
    }


def converted(task: Mapping[str, int]) -> dict[str, float]:
    """Nats a byte of the standard model of the first seed, and with the upper half of its layers made ladder layers, before and after a
    fifth of the training again at a third of the rate, all parameters, as the paper retrains.
    """
    rate = chosen("ladder_residual/bytes", "standard").rate
    upper, steps = task["layers"] // 2, max(1, task["steps"] // 5)

    def build() -> nn.Module:
        return to_ladder(trained_model("standard", SEEDS[0], rate, task).train(), upper)

    after = trained(
        {"converted": upper, "task": dict(task)},
        build,
        lambda: byte_batches(task["length"], BATCH, seed=1001),
        steps=steps,
        rate=rate / 3,
        sources=[ladder_residual, sys.modules[__name__]],
    )
    test = heldout(task["length"], WINDOWS)
    return {
        "layers": upper,
        "before": float(nll(trained_model("standard", SEEDS[0], rate, task), *test).mean()),
        "converted": float(nll(build().eval(), *test).mean()),
        "steps": steps,
        "trained on": float(nll(after, *test).mean()),
    }


# ---------------------------------------------------------------------------------------------------------------------- time

TIMED: dict[str, dict[str, Any]] = {  # what is timed: the layers' blocks
    "standard": {"ladder_layers": []},
    "ladder": {},
    "parallel": {"block": "parallel"},
    "desync": {"block": "desync"},
    "no communication": {},
}
WHOLE = "one rank with the whole model"
CALIBRATION = 5  # runs without communication, by which a module's time is known


def prepare(here: Rank, shape: Mapping[str, int], prompt: int) -> None:
    """Make the arms: one share of a model with random weights, run in several orders, and on the first rank the whole model too."""
    base = small_llama(
        width=shape["width"], layers=shape["layers"], heads=shape["heads"], seed=0, max_position_embeddings=8192
    ).eval()
    part = shard(base, here.rank, here.world)
    arms = {arm: LadderForCausalLM.from_base(part, ranks=here.world, **how) for arm, how in TIMED.items()}
    if here.rank == 0:
        arms[WHOLE] = base
    here.kept.update(arms=arms, caches={}, prompt=torch.arange(prompt)[None] % 256)
    set_links(here, 0.0)


def set_links(here: Rank, latency: float) -> None:
    link = GroupLink(latency=latency)
    for arm, model in here.kept["arms"].items():
        if arm != WHOLE:
            model.link = Silent(link) if arm == "no communication" else link


@torch.no_grad()
def decode(here: Rank, arm: str, tokens: int) -> float:
    """Seconds for `tokens` greedy steps behind the prompt, which all ranks begin together. The cache is then as before."""
    model = here.kept["arms"].get(arm)
    if model is not None and arm not in here.kept["caches"]:
        here.kept["caches"][arm] = model(here.kept["prompt"], use_cache=True, logits_to_keep=1).cache
    dist.barrier()
    if model is None:
        return 0.0
    cache, token = here.kept["caches"][arm], here.kept["prompt"][:, -1:]
    start = time.perf_counter()
    for _ in range(tokens):
        token = model(token, cache=cache, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)
    seconds = time.perf_counter() - start
    cache.crop(-tokens)
    return seconds


def calibrate(here: Rank, tokens: int) -> float:
    """Seconds of a module's computing on this rank: a step without communication, the head included, by its number of modules."""
    runs = [decode(here, "no communication", tokens) for _ in range(2 + CALIBRATION)]
    layers = len(here.kept["arms"]["no communication"].parts.layers)
    return sorted(runs[2:])[CALIBRATION // 2] / (2 * layers * tokens)


def draw(here: Rank, arms: tuple[str, ...]) -> dict[str, str]:
    """A step of some arms with its events noted, as JSON."""
    lines = {}
    for arm in arms:
        model = here.kept["arms"][arm]
        decode(here, arm, 1)
        model.timeline = Timeline()
        decode(here, arm, 1)
        lines[arm], model.timeline = model.timeline.to_json(), None
    return lines


def used(_here: Rank) -> dict[str, int]:
    return kernels.paths()


class RanksWatch(OthersWatch):
    """As the clock's own, which takes for the work of others what children of this process use as long as they live: the ranks are ours."""

    @staticmethod
    def _now() -> tuple[float, float, float]:
        now, busy, own = OthersWatch._now()
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                times = child.cpu_times()
                own += times.user + times.system
        return now, busy, own


def count_ranks_as_ours() -> None:
    """From now on this process's clock does not take its ranks for others."""
    vars(clock)["OthersWatch"] = RanksWatch


def predicted(lines: Mapping[str, Timeline], layers: int, latency: float, arm: str) -> float:
    """The gain over the standard that the model of the timeline gives, from what modules took without communication and the latency."""
    noted = [event for event in lines["no communication"].events if event.lane == "compute"]
    compute = {
        module: sum(event.seconds for event in noted if event.name.split()[0] == module) / layers
        for module in ("attention", "mlp")
    }
    usual = simulate(schedule(layers, chosen=()), compute, latency).seconds
    return usual / simulate(schedule(layers, TIMED[arm].get("block", "ladder")), compute, latency).seconds


OPERATOR = Operator(
    "decoding with layers split over ranks that sum every module's output", free="one rank with the whole model"
)
GUARD = Guard("nats a byte on unseen documents", 0.015)
DECLARED: dict[str, Any] = {
    "operator": OPERATOR,
    "guard": GUARD,
    "departures": {
        "ranks": "two processes: this machine has two cores",
        "width": "smaller, so that weights are made and read in seconds",
        "layers": "fewer, for the same reason: every layer costs the same",
        "heads": "heads of 64, as many as the width asks",
        "prompt": "shorter: at batch 1 a step reads weights, hardly the cache",
        "tokens": "a few tokens behind the prompt: every step costs about the same",
        "task": "models of bytes of a few hundred steps in place of 1B to 3B parameters and 100B tokens",
        "link": "latency that is slept behind a message over loopback, as long a share of a module's computing as the paper's had",
    },
    "minutes": 90,
}
PAPER = {
    "ranks": 8,
    "width": 8192,
    "layers": 80,
    "heads": 64,
    "prompt": 1024,
    "tokens": 512,
    "batch": 1,
    "link": "eight GPUs with NVLink",
    "task": "1.2B and 3.5B parameters, 100B tokens of FineWeb-Edu",
}
TINY_TASK = {"width": 32, "layers": 2, "heads": 2, "length": 32, "steps": 20}
FULL_TASK = {"width": 128, "layers": 8, "heads": 4, "length": 256, "steps": 800}


def points(communication: float) -> dict[str, list[dict[str, Any]]]:
    """The grid of a claim at its share of communication."""
    smoke = {"ranks": 2, "width": 64, "layers": 2, "heads": 2, "prompt": 8, "tokens": 2}
    small = {"ranks": 2, "width": 1024, "layers": 4, "heads": 16, "prompt": 64, "tokens": 4}
    full = {"ranks": 2, "width": 2048, "layers": 12, "heads": 32, "prompt": 1024, "tokens": 16}
    sizes = {"smoke": (smoke, TINY_TASK), "small": (small, TASK), "full": (full, FULL_TASK)}
    return {scale: [{"communication": communication, **size, "task": task}] for scale, (size, task) in sizes.items()}


def decoding(
    communication: float,
    ranks: int,
    width: int,
    layers: int,
    heads: int,
    prompt: int,
    tokens: int,
    task: Mapping[str, int],
) -> Trial:
    """Greedy steps of the ladder against those of the same modules with every sum awaited, on ranks that last as long as the trial.

    A message takes `communication` times what a module computes, by a calibration in each process. The details show a step of some arms
    on a timeline, what its model predicts, and what converting a trained model instead costs.
    """
    count_ranks_as_ours()
    group = Ranks(ranks, timeout=600)
    group.run(prepare, {"width": width, "layers": layers, "heads": heads}, prompt)
    module = max(group.run(calibrate, tokens))
    latency = communication * module
    group.run(set_links, latency)

    def run(arm: str) -> Callable[[], list[float]]:
        return lambda: group.run(decode, arm, tokens)

    scores: dict[str, list[float]] = {}

    def judged() -> dict[str, list[float]]:
        if not scores:
            scores.update(losses(ARMS, task))
        return scores

    def details() -> dict[str, Any]:
        drawn = group.run(draw, ("standard", "ladder", "parallel", "no communication"))[0]
        paths = group.run(used)[0]
        group.close()
        lines = {arm: Timeline.from_json(line) for arm, line in drawn.items()}
        return {
            "module_seconds": module,
            "latency_seconds": latency,
            "tokens": tokens,
            "hidden": {arm: line.hidden for arm, line in lines.items()},
            "timeline": {arm: line.text().splitlines() for arm, line in lines.items()},
            "predicted": {arm: predicted(lines, layers, latency, arm) for arm in ("ladder", "parallel")},
            "losses": judged(),
            "conversion": converted(task),
            "rank_paths": paths,
        }

    return Trial(
        baseline=run("standard"),
        candidate=run("ladder"),
        free=run(WHOLE),
        arms={
            "parallel attention and MLP": run("parallel"),
            "desync, every second module summed": run("desync"),
            "no communication, the upper bound": run("no communication"),
        },
        quality=lambda: quality(judged()),
        trained=lambda: as_trained(judged(), task),
        details=details,
        pairs=18,
    )


@experiment(
    "ladder_residual/decode-speedup",
    points=points(SHARE),
    paper={**PAPER, "communication": SHARE},
    refuted_if="with messages as long, by a module's computing, as on the paper's NVLink, the ladder decodes slower than blocking sums, "
    "the whole interval below 1x",
    **DECLARED,
)
def decode_speedup(**point: Any) -> Trial:
    """Decoding at the share of communication that the paper's eight GPUs with NVLink had: a message takes 0.43 of a module's computing.

    The margin of quality, 1.5 % of the loss, is about half as much again as the paper's 3.5B model loses (1.1 %).
    """
    return decoding(**point)


@experiment(
    "ladder_residual/decode-speedup-no-p2p",
    points=points(SHARE_WITHOUT_LINKS),
    paper={**PAPER, "link": "eight GPUs, peer-to-peer off", "communication": SHARE_WITHOUT_LINKS},
    refuted_if="with messages as long, by a module's computing, as in the paper without peer-to-peer links, the ladder decodes slower than "
    "blocking sums, the whole interval below 1x",
    **DECLARED,
)
def decode_speedup_no_p2p(**point: Any) -> Trial:
    """Decoding at the paper's share of communication without peer-to-peer links: a message takes 1.14 of a module's computing."""
    return decoding(**point)

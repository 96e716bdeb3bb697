"""Ladder Residual: does a transformer whose sums over ranks are hidden behind computing decode faster, and is it as good?

Times are of real processes, one a rank, one thread each, which decode with random weights in lockstep over gloo. This machine's loopback
is no link between devices: its messages use the very cores that compute. So what the paper's link took, as a share of a module's
computing, is added to every message as a latency during which nothing is computed for it. The gain at that share is therefore a
simulation of the paper's link, with everything else real, and the row says so; two more arms show what is gained over the link as it is.

Quality is of small models of bytes of the same kinds (`ladder_residual_models`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from assay.experiments.children import count_children_as_ours
from assay.experiments.core import Guard, Operator, Trial, experiment
from assay.experiments.inference.ladder_residual_models import ARMS, TASK, as_trained, conversion, losses, quality
from assay.experiments.inference.language import small_llama
from assay.measure.clock import compare
from assay.methods.core import kernels
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
)

# Tokens a second of the 70B model on eight GPUs at batch 1, from the data behind the paper's figure: standard, standard without
# peer-to-peer links, and without communication. What they imply of a message's time as a share of a module's computing:
STANDARD, WITHOUT_LINKS, UPPER_BOUND = 77.39, 51.66, 110.59
SHARE = round(UPPER_BOUND / STANDARD - 1, 2)
SHARE_WITHOUT_LINKS = round(UPPER_BOUND / WITHOUT_LINKS - 1, 2)

# Perplexity on wikitext of the paper's 3.5B models, standard and ladder, whose performance it calls comparable: of the two sizes that it
# trained, the one that loses. What they imply of the share of the loss that may be lost:
PERPLEXITY, LADDERS_PERPLEXITY = 14.48, 14.90
MARGIN = round(math.log(LADDERS_PERPLEXITY) / math.log(PERPLEXITY) - 1, 4)

TIMED: dict[str, dict[str, Any]] = {  # what is timed: the layers' blocks
    "standard": {"ladder_layers": []},
    "ladder": {},
    "parallel": {"block": "parallel"},
    "desync": {"block": "desync"},
    "no communication": {},
    "standard, no latency added": {"ladder_layers": []},
    "ladder, no latency added": {},
}
BARE = ("standard, no latency added", "ladder, no latency added")
DRAWN = ("standard", "ladder", "parallel", "no communication", *BARE)
WHOLE = "one process with the whole model"
CALIBRATION = 5  # runs without communication, by which a module's time is known


# ----------------------------------------------------------------------------------------------------------------- on a rank


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
    link, bare = GroupLink(latency=latency), GroupLink(latency=0.0)
    for arm, model in here.kept["arms"].items():
        if arm != WHOLE:
            model.link = bare if arm in BARE else Silent(link) if arm == "no communication" else link


@torch.no_grad()
def decode(here: Rank, arm: str, tokens: int) -> float:
    """Seconds for `tokens` greedy steps behind the prompt, which all ranks begin together. The cache is then as before.

    The whole model has as many threads as there are ranks, which have a core each.
    """
    model = here.kept["arms"].get(arm)
    threads = torch.get_num_threads()
    torch.set_num_threads(here.world if arm == WHOLE else threads)
    try:
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
    finally:
        torch.set_num_threads(threads)


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


# ------------------------------------------------------------------------------------------------------- in this process


def predicted(lines: Mapping[str, Timeline], layers: int, latency: float, arm: str) -> float:
    """The gain over the standard that the model of the timeline gives, from what modules took without communication and the latency."""
    noted = [event for event in lines["no communication"].events if event.lane == "compute"]
    compute = {
        module: sum(event.seconds for event in noted if event.name.split()[0] == module) / layers
        for module in ("attention", "mlp")
    }
    usual = simulate(schedule(layers, chosen=()), compute, latency).seconds
    return usual / simulate(schedule(layers, TIMED[arm].get("block", "ladder")), compute, latency).seconds


def without_latency(
    run: Callable[[str], Callable[[], Any]], lines: Mapping[str, Timeline], layers: int
) -> dict[str, Any]:
    """What the ladder gains over the link as it is, in pairs of its own, and what such a message takes when it is awaited at once."""
    usual, ladder = BARE
    found = compare(run(usual), run(ladder), pairs=12)
    message = lines[usual].total("wait") / (2 * layers)
    return {
        "gain": {"median": found.speedup.median, "low": found.speedup.low, "high": found.speedup.high},
        "noisy": found.noisy,
        "message_seconds": message,
        "predicted": predicted(lines, layers, message, "ladder"),
    }


OPERATOR = Operator(
    "decoding with layers split over ranks that sum every module's output",
    free="one process with the whole model and as many threads as there are ranks",
)
GUARD = Guard("nats a byte on unseen documents", MARGIN)
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
        "task": "models of bytes of some hundred steps in place of 1B to 3B parameters and 100B tokens; "
        "at full with the learning rates that were found at small",
        "link": "latency that is added to a message over loopback, as long a share of a module's computing as the paper's had",
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
TINY_TASK = {"width": 32, "layers": 2, "heads": 2, "length": 32, "steps": 10}
FULL_TASK = {"width": 128, "layers": 8, "heads": 4, "length": 256, "steps": 800}


def simulated(share: float) -> str:
    """What is measured in place of the claim's figure."""
    return (
        f"overlap of an injected latency at the paper's own share of communication ({share:g} of a module's computing) between two "
        "processes: a simulation of the paper's link; what the two gain without it stands beside"
    )


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

    A message takes `communication` times what a module computes, by a calibration in each process, but in the arms without added latency.
    The details show a step of some arms on a timeline, what its model predicts, what is gained without added latency, and what converting
    a trained model costs beside training it on as it is.
    """
    count_children_as_ours()
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
        lines = {arm: Timeline.from_json(line) for arm, line in group.run(draw, DRAWN)[0].items()}
        bare = without_latency(run, lines, layers)
        paths = group.run(used)[0]
        group.close()
        return {
            "module_seconds": module,
            "latency_seconds": latency,
            "tokens": tokens,
            "no_latency_added": bare,
            "predicted": {arm: predicted(lines, layers, latency, arm) for arm in ("ladder", "parallel")},
            "waiting_share": {arm: line.total("wait") / line.seconds for arm, line in lines.items()},
            "hidden": {arm: line.hidden for arm, line in lines.items() if arm not in BARE},
            "timeline": {arm: line.text().splitlines() for arm, line in lines.items()},
            "losses": judged(),
            "conversion": conversion(task),
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
            **{arm: run(arm) for arm in BARE},
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
    measured_here=simulated(SHARE),
    refuted_if="with messages as long, by a module's computing, as on the paper's NVLink, the ladder decodes slower than blocking sums, "
    "the whole interval below 1x",
    **DECLARED,
)
def decode_speedup(**point: Any) -> Trial:
    """Decoding at the share of communication that the paper's eight GPUs with NVLink had: a message takes 0.43 of a module's computing.

    The margin of quality, 1.07 % of the loss, is what the paper itself calls comparable: of the two sizes that it trained, the 3.5B model
    loses, from a perplexity of 14.48 to one of 14.90 on wikitext. What is free, the whole model in one process, is no choice for the
    paper's 70B model, which no single GPU holds; for models that fit, as here, it is.
    """
    return decoding(**point)


@experiment(
    "ladder_residual/decode-speedup-no-p2p",
    points=points(SHARE_WITHOUT_LINKS),
    paper={**PAPER, "link": "eight GPUs, peer-to-peer off", "communication": SHARE_WITHOUT_LINKS},
    measured_here=simulated(SHARE_WITHOUT_LINKS),
    refuted_if="with messages as long, by a module's computing, as in the paper without peer-to-peer links, the ladder decodes slower than "
    "blocking sums, the whole interval below 1x",
    **DECLARED,
)
def decode_speedup_no_p2p(**point: Any) -> Trial:
    """Decoding at the paper's share of communication without peer-to-peer links: a message takes 1.14 of a module's computing.

    The margin of quality and what is free are those of `decode_speedup`.
    """
    return decoding(**point)

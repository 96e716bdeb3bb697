"""The models of bytes by whose loss the ladder is judged: every arm trained from scratch alike, and trained ones converted and trained on.

All are kept on disk under what they were made with, this module's source included; the times of ladders are taken elsewhere.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from assay.experiments.beside import beside
from assay.experiments.core import Quality, Trained
from assay.experiments.inference.language import bigram_floor, heldout, nll, small_llama, trained, validation
from assay.experiments.mixers.training import in_parallel
from assay.experiments.rates import chosen, searched
from assay.experiments.seeds import paired
from assay.methods.core.models.decoder import Pass
from assay.methods.inference import ladder_residual
from assay.methods.inference.ladder_residual import LadderForCausalLM, shard, to_ladder
from assay.workloads.sequences import byte_batches

Task = Mapping[str, int]

ARMS = ("standard", "ladder", "parallel", "desync", "random reads", "no communication")
SEEDS = (0, 1, 2)
MORE_SEEDS = (*SEEDS, 3, 4)  # of the two arms whose difference needs an interval
BATCH = 16
WINDOWS = 256  # of each of the texts that models are judged on
RANKS = 2  # of desync and of the model without communication
TASK: dict[str, int] = {"width": 64, "layers": 6, "heads": 4, "length": 64, "steps": 200}
RATES, CONVERSION = "ladder_residual/bytes", "ladder_residual/conversion"


# ------------------------------------------------------------------------------------------------------------ from scratch


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


def language_model(arm: str, seed: int, task: Task) -> Any:
    """A model of bytes with new weights; all arms of a seed start from the same.

    "no communication" is one rank's share by itself. The sums that write to its stream have fewer terms, so their weights start wider:
    what they write is as large as in the whole model, and the arm is not held back by its beginning.
    """
    base = small_llama(width=task["width"], layers=task["layers"], heads=task["heads"], seed=seed)
    if arm == "standard":
        return base
    if arm == "no communication":
        alone = shard(base, 0, RANKS)
        for layer in alone.model.layers:
            for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
                writer.weight.data *= RANKS**0.5
        return alone
    if arm == "random reads":
        return RandomReads.from_base(base)
    block: Any = arm
    return to_ladder(base, block=block, ranks=RANKS)


def trained_model(arm: str, seed: int, rate: float, task: Task) -> Any:
    torch.set_num_threads(1)
    return trained(
        {"arm": arm, "seed": seed, "task": dict(task), "batch": BATCH, "ranks": RANKS},
        lambda: language_model(arm, seed, task),
        lambda: byte_batches(task["length"], BATCH, seed=1 + seed),
        steps=task["steps"],
        rate=rate,
        sources=[ladder_residual, sys.modules[__name__]],
    )


@searched(RATES, arms=ARMS, grid=(4e-3, 1e-2, 2.5e-2))
def byte_loss(arm: str, rate: float) -> float:
    """Nats a byte on documents kept for the choice, after the training that every arm gets."""
    return judged_on(validation, trained_model(arm, SEEDS[0], rate, TASK), TASK)


def judged_on(text: Callable[[int, int], tuple[Tensor, Tensor]], model: nn.Module, task: Task) -> float:
    return float(nll(model, *text(task["length"], WINDOWS)).mean())


def loss_of(arm: str, seed: int, task: Task) -> float:
    """Nats a byte on unseen documents."""
    return judged_on(heldout, trained_model(arm, seed, chosen(RATES, arm).rate, task), task)


def seeds_of(arm: str) -> tuple[int, ...]:
    return MORE_SEEDS if arm in ("standard", "ladder") else SEEDS


def losses(arms: Sequence[str], task: Task) -> dict[str, list[float]]:
    """`loss_of` of each arm, seed by seed."""
    runs = [(arm, seed, dict(task)) for arm in arms for seed in seeds_of(arm)]
    found: dict[str, list[float]] = {arm: [] for arm in arms}
    for (arm, _, _), loss in zip(runs, in_parallel(loss_of, runs), strict=True):
        found[arm].append(loss)
    return found


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def quality(found: Mapping[str, list[float]]) -> Quality:
    """The ladder's loss against the standard's, Student's t over the seeds' differences, between the controls, each over its own seeds."""
    standard = found["standard"]
    base = mean(standard)
    lost = paired(found["ladder"], standard)
    return Quality(
        base + lost.median,
        base,
        base + lost.low,
        base + lost.high,
        controls={
            "deleted": beside(found["no communication"], standard),
            "random": beside(found["random reads"], standard),
            "rival": beside(found["parallel"], standard),
            "desync, every second module summed": beside(found["desync"], standard),
        },
        rival="parallel attention and MLP, half as many messages",
    )


def as_trained(found: Mapping[str, list[float]], task: Task) -> dict[str, Trained]:
    floor = bigram_floor(*heldout(task["length"], WINDOWS))
    rates = {arm: chosen(RATES, arm) for arm in found}
    return {
        arm: Trained(scores, floor, "a table of pairs of bytes", rates[arm].rate, rates[arm].rates)
        for arm, scores in found.items()
    }


# -------------------------------------------------------------------------------------------------------------- conversion

KINDS = ("standard", "converted")


def upper_layers(task: Task) -> int:
    return task["layers"] // 2


def more_steps(task: Task) -> int:
    return max(1, task["steps"] // 4)


def from_trained(kind: str, seed: int, task: Task) -> LadderForCausalLM:
    """The trained standard model of a seed, as it is ("standard") or with its upper half made of ladder layers ("converted")."""
    base = trained_model("standard", seed, chosen(RATES, "standard").rate, task)
    return to_ladder(base, upper_layers(task) if kind == "converted" else 0)


def trained_on(kind: str, seed: int, rate: float, task: Task) -> Any:
    """`from_trained` after a quarter of the training again, on other windows, all parameters, as the paper retrains: alike for both."""
    before = {"rate": chosen(RATES, "standard").rate, "seed": seed, "task": dict(task), "batch": BATCH}
    return trained(
        {"trained on": kind, "layers": upper_layers(task), "before": before},
        lambda: from_trained(kind, seed, task).train(),
        lambda: byte_batches(task["length"], BATCH, seed=1001 + seed),
        steps=more_steps(task),
        rate=rate,
        sources=[ladder_residual, sys.modules[__name__]],
    )


@searched(CONVERSION, arms=KINDS, grid=(5e-4, 2e-3, 5e-3, 1.2e-2))
def more_loss(kind: str, rate: float) -> float:
    """Nats a byte on documents kept for the choice, after training on."""
    return judged_on(validation, trained_on(kind, SEEDS[0], rate, TASK), TASK)


def losses_of_seed(seed: int, task: Task) -> dict[str, float]:
    """Nats a byte on unseen documents of the trained model, of what it is converted to, and of both after the same training on."""
    torch.set_num_threads(1)
    found = {kind: judged_on(heldout, from_trained(kind, seed, task).eval(), task) for kind in KINDS}
    for kind in KINDS:
        model = trained_on(kind, seed, chosen(CONVERSION, kind).rate, task)
        found[f"{kind}, trained on"] = judged_on(heldout, model, task)
    return found


def conversion(task: Task) -> dict[str, Any]:
    """What converting a trained model costs, for the details of a record: beside the standard one that is trained on for as long."""
    rows = in_parallel(losses_of_seed, [(seed, dict(task)) for seed in SEEDS])
    found = {name: [row[name] for row in rows] for name in rows[0]}
    lost = paired(found["converted, trained on"], found["standard, trained on"])
    share = 100 / mean(found["standard, trained on"])
    return {
        "layers": upper_layers(task),
        "steps": more_steps(task),
        "losses": found,
        "rates": {kind: chosen(CONVERSION, kind).rate for kind in KINDS},
        "lost_percent": {"mean": share * lost.median, "low": share * lost.low, "high": share * lost.high},
    }

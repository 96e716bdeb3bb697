"""What HAMburger's arms lose on unseen text, and with how many entries; and the learning rates, chosen on other text.

Every arm is judged on the groups that HAMburger made with its own stop head on the same rows: at the same places, or as many at others.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from assay.experiments.core import Quality, Trained
from assay.experiments.inference.hamburger.arms import (
    ARMS,
    Cutter,
    Task,
    base_model,
    blocks,
    regular,
    shuffled,
    trained_on,
)
from assay.experiments.inference.hamburger.records import bigram_floor, rows_of
from assay.experiments.mixers.training import in_parallel
from assay.experiments.rates import chosen, searched
from assay.experiments.seeds import paired
from assay.methods.inference.hamburger import group_ids

SEEDS = (0, 1, 2)
CHOICE_SEED = 100  # of the models by which learning rates are chosen
PROMPT = 16  # bytes that are read before anything is produced
FRONT = (0.5, 0.9)  # confidences of the two released loops, beside the evaluation's, as facts
WINDOWS = (4, 8, 12, 16, 24, 32, 48, 64)  # recent bytes that eviction may keep beside the prompt
TASK: dict[str, int] = {
    "width": 64, "layers": 4, "micro_layers": 1, "max_steps": 4, "length": 96, "batch": 8, "steps": 400, "grafting": 250,
    "windows": 64,
}  # fmt: skip

Found = Mapping[str, Sequence[Mapping[str, float]]]


# ------------------------------------------------------------------------------------------------------------------ one model


def windows(task: Task, part: str = "heldout") -> Tensor:
    """Rows (windows, length + 1) of bytes of unseen text; "calibration" is that by which things are chosen."""
    return rows_of(task["length"], task["windows"], part)


@torch.no_grad()
def told_nll(model: Any, ids: Tensor, groups: Tensor | None = None) -> float:
    """Nats a byte behind the prompt, of rows (n, tokens) of bytes: by teacher forcing, in these groups if the model has any."""
    logits = (model(ids) if groups is None else model(ids, groups=groups)).logits
    return nats(logits[:, PROMPT - 1 : -1], ids[:, PROMPT:])


def nats(logits: Tensor, wanted: Tensor) -> float:
    return float(F.cross_entropy(logits.float().transpose(1, 2), wanted, reduction="none").double().mean())


@torch.no_grad()
def decoded(model: Any, ids: Tensor) -> tuple[float, Tensor]:
    """Rows (n, tokens) as the model decodes them, byte by byte, its stop head ending the groups: nats a byte, and the groups."""
    out = model(ids[:, :PROMPT], use_cache=True, logits_to_keep=1, prompt=True)
    made = [out.logits]
    for place in range(PROMPT, ids.shape[1]):
        out = model(ids[:, place : place + 1], cache=out.cache)
        made.append(out.logits)
    groups = torch.stack([group_ids(out.cache.groups(row)) for row in range(len(ids))])
    return nats(torch.cat(made[:-1], 1), ids[:, PROMPT:]), groups


def per_entry(groups: Tensor) -> float:
    """Bytes an entry behind the prompt, over all rows."""
    entries = int((groups.amax(1) + 1 - PROMPT).sum())
    return groups[:, PROMPT:].numel() / entries


# ------------------------------------------------------------------------------------------------- the rivals without training


def prompt_and_recent(held: Tensor) -> Tensor:
    """What each byte of (rows, tokens) sees of a cache that holds `held` entries there: the prompt, and the last ones behind it.

    (rows, 1, tokens, tokens) bool: StreamingLLM's eviction with the whole prompt for its sinks. What was out of sight once stays so.
    """
    place = torch.arange(held.shape[1])
    recent = place > place[:, None] - (held[..., None] - PROMPT)
    return ((place <= place[:, None]) & ((place < PROMPT) | recent))[:, None]


@torch.no_grad()
def evicted_nll(base: Any, ids: Tensor, held: Tensor) -> float:
    """Nats a byte behind the prompt where the base's cache holds `held` entries, (rows, tokens - 1) or for all rows, at each byte."""
    told = ids[:, :-1]
    logits = base(told, attention_mask=prompt_and_recent(held.expand(told.shape))).logits
    return nats(logits[:, PROMPT - 1 :], ids[:, PROMPT:])


def windowed(ids: Tensor, window: int) -> Tensor:
    """Entries at each byte of rows where no more than `window` of the answer's are kept."""
    return (torch.arange(ids.shape[1] - 1) + 1).clamp_max(PROMPT + window)


def enough(base: Any, ids: Tensor, most: float) -> int:
    """The shortest of `WINDOWS` with which the base loses no more than `most` nats on `ids`; the whole answer where none is that good."""
    answer = ids.shape[1] - PROMPT
    fitting = (one for one in WINDOWS if one < answer and evicted_nll(base, ids, windowed(ids, one)) <= most)
    return next(fitting, answer)


def in_8_bits(x: Tensor) -> Tensor:
    """The nearest of 8 bits and a scale in bfloat16 to each vector of the last dimension, in the dtype of `x`."""
    scale = (x.abs().amax(-1, keepdim=True) / 127).bfloat16().to(x.dtype)
    whole = (x / scale).round().clamp(-127, 127)  # a scale that was rounded down would ask for 128
    return torch.where(scale == 0, 0, whole * scale)


@torch.no_grad()
def narrow(base: Any) -> Any:
    """A copy whose linear layers have weights of 8 bits, a scale to each row."""
    rounded = copy.deepcopy(base)
    for module in rounded.modules():
        if isinstance(module, nn.Linear):
            module.weight.copy_(in_8_bits(module.weight))
    return rounded


class NarrowCache(DynamicCache):
    """Keys and values are read back as 8 bits hold them, a scale to each head's vector."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return super().update(in_8_bits(key_states), in_8_bits(value_states), layer_idx, *args, **kwargs)


@torch.no_grad()
def narrow_entries_nll(base: Any, ids: Tensor) -> float:
    """Nats a byte behind the prompt with every entry in 8 bits, those of the prompt and of the last byte too."""
    logits = base(ids, cache=NarrowCache(config=base.config), use_cache=True).logits
    return nats(logits[:, PROMPT - 1 : -1], ids[:, PROMPT:])


# -------------------------------------------------------------------------------------------------------------------- all arms


def seed_scores(seed: int, task: Task) -> dict[str, dict[str, float]]:
    """All arms of one seed on held-out rows: nats a byte "nll" and bytes an entry "per_entry", and facts beside them.

    Arms with another merger or without the micro decoder are told the text in HAMburger's groups; "alone" is what they do with
    their own stop heads. How many bytes eviction may keep is chosen on the text that learning rates were chosen on.
    """
    ids, chosen_on = windows(task), windows(task, "calibration")
    models = {arm: trained_on(arm, task, seed) for arm in ARMS}
    base, model = models["base"], models["hamburger"]
    lost, groups = decoded(model, ids)
    saved = per_entry(groups)
    found: dict[str, dict[str, float]] = {
        "base": {"nll": told_nll(base, ids), "per_entry": 1.0},
        "hamburger": {"nll": lost, "per_entry": saved},
    }
    random = torch.Generator().manual_seed(seed)
    for arm in ARMS[2:]:
        if arm.endswith("groups"):
            own = regular(groups, PROMPT) if arm == "regular groups" else shuffled(groups, PROMPT, random)
            found[arm] = {"nll": told_nll(models[arm], ids, own), "per_entry": per_entry(own)}
        else:
            alone, cut = decoded(models[arm], ids)
            found[arm] = {
                "nll": told_nll(models[arm], ids, groups),
                "per_entry": saved,
                "nll alone": alone,
                "per_entry alone": per_entry(cut),
            }
    window = enough(base, chosen_on, decoded(model, chosen_on)[0])
    known = Cutter("hamburger", base_model(task, seed), task["max_steps"], seed)(ids, PROMPT)
    facts = {
        "no stop head": told_nll(model, ids, blocks(ids, task["max_steps"], PROMPT)),
        "cut by the base, nats": told_nll(model, ids, known),
        "cut by the base": per_entry(known),
        "evicted": evicted_nll(base, ids, groups[:, :-1] + 1),
        "window": window,
        "window, nats": evicted_nll(base, ids, windowed(ids, window)),
        "window, bytes an entry": (ids.shape[1] - PROMPT) / window,
        "8 bits, nats": told_nll(narrow(base), ids),
        "entries in 8 bits, nats": narrow_entries_nll(base, ids),
    }
    confidence = model.config.confidence
    for other in FRONT:
        model.config.confidence = other
        told, cut = decoded(model, ids)
        facts |= {f"nll at {other}": told, f"per_entry at {other}": per_entry(cut)}
    model.config.confidence = confidence
    found["hamburger"] |= facts
    return found


def train_arm(arm: str, task: Task, seed: int) -> None:
    """Leave an arm's model on disk."""
    trained_on(arm, task, seed)


@cache
def _scores(items: tuple[tuple[str, int], ...]) -> dict[str, list[dict[str, float]]]:
    task = dict(items)
    # all bases are there before anything starts from one, so that no two processes train the same
    for arms in (ARMS[:1], ARMS[1:]):
        in_parallel(train_arm, [(arm, task, seed) for seed in SEEDS for arm in arms])
    seeds = [seed_scores(seed, task) for seed in SEEDS]
    return {arm: [found[arm] for found in seeds] for arm in ARMS}


def scores(task: Task) -> dict[str, list[dict[str, float]]]:
    """`seed_scores` of each arm under each of `SEEDS`."""
    return _scores(tuple(sorted(task.items())))


def of(found: Found, arm: str, name: str = "nll") -> list[float]:
    return [score[name] for score in found[arm]]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def quality(found: Found) -> Quality:
    """HAMburger as it decodes against the base trained on, with the interval over the seeds' paired differences.

    "deleted" stands there twice, so that the row says so where groups of regular size do better than the method's.
    """
    ours, base = of(found, "hamburger"), of(found, "base")
    lost = paired(ours, base)

    def fact(name: str) -> float:
        return mean(of(found, "hamburger", name))

    controls = {
        "deleted": mean(of(found, "regular groups")),
        "random": mean(of(found, "random groups")),
        "rival": fact("evicted"),
        "as many groups of regular size, trained so": mean(of(found, "regular groups")),
        **{arm: mean(of(found, arm)) for arm in found if arm not in ARMS[:4]},
        "groups of the most tokens, no stop head": fact("no stop head"),
        "cut by the base's uncertainty, which decoding does not know": fact("cut by the base, nats"),
        "every entry, weights of 8 bits": fact("8 bits, nats"),
        "every entry, in 8 bits": fact("entries in 8 bits, nats"),
    }
    return Quality(
        mean(base) + lost.median,
        mean(base),
        mean(base) + lost.low,
        mean(base) + lost.high,
        controls=controls,
        rival="the base with as many entries, the prompt's and the last ones",
    )


def refutes(record: Mapping[str, Any]) -> bool:
    """Whether no entry is saved, or the base that evicts does as well with as many entries, over the whole 95 % interval."""
    ours = record["details"]["arms"]["hamburger"]
    lead = paired([score["evicted"] for score in ours], [score["nll"] for score in ours])
    return bool(record["measured"]["high"] <= 1 or lead.high <= 0)


def as_trained(found: Found, task: Task) -> dict[str, Trained]:
    """All arms, with the table of pairs of bytes that each has to beat."""
    ids = windows(task)
    floor = bigram_floor(ids, PROMPT)
    rates = {arm: chosen("hamburger/grafting", arm) for arm in found}
    return {arm: Trained(of(found, arm), floor, "a bigram table", rate.rate, rate.rates) for arm, rate in rates.items()}


# ------------------------------------------------------------------------------------------------------------------- the rates


@searched("hamburger/base", arms=["base"], grid=(3e-3, 8e-3, 2e-2))
def base_rate(arm: str, rate: float) -> float:
    """Nats a byte, on text kept for the choice, of the base from which all arms start."""
    torch.set_num_threads(1)
    return told_nll(base_model(TASK, CHOICE_SEED, rate), windows(TASK, "calibration"))


@searched("hamburger/grafting", arms=ARMS, grid=(2e-3, 5e-3, 1.2e-2))
def grafting_rate(arm: str, rate: float) -> float:
    """Nats a byte, on text kept for the choice, of an arm that was trained on, in groups as it learned them: as many for each arm."""
    torch.set_num_threads(1)
    ids, model = windows(TASK, "calibration"), trained_on(arm, TASK, CHOICE_SEED, rate)
    if arm == "base":
        return told_nll(model, ids)
    return told_nll(model, ids, Cutter(arm, base_model(TASK, CHOICE_SEED), TASK["max_steps"], 0)(ids, PROMPT))

"""The arms of HAMburger's experiments: a base of bytes, what is grafted on it, and the ways to cut a text into as many groups.

All arms of a seed start from one base and are trained on for as many steps on as many bytes. Grafted ones differ in one thing each: where
groups lie, what a group is merged into, or how its tokens are emitted.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.experiments.inference.hamburger import records
from assay.experiments.inference.hamburger.records import batches
from assay.experiments.inference.language import small_llama, trained
from assay.experiments.rates import chosen
from assay.methods.inference import hamburger as method
from assay.methods.inference.hamburger import (
    CompositionalEmbedder,
    HamburgerForCausalLM,
    MicroStepDecoder,
    group_ids,
    grouped,
    token_entropies,
)

CONFIDENCE = 0.8  # of the paper's evaluation
HEAD = 32  # the size of a head, of the release's merger too
FASTER = 2  # the paper's rate of new modules, over that of the base
ARMS = (
    "base",
    "hamburger",
    "regular groups",
    "random groups",
    "the last member for the merger",
    "the mean for the merger",
    "no micro decoder",
)

Task = Mapping[str, Any]
AFTER_BASE = ("windows", "micro_layers", "max_steps", "grafting")  # settings that the base does not depend on


def heads_of(width: int) -> int:
    return max(2, width // HEAD)


def base_model(task: Task, seed: int, rate: float | None = None) -> Any:
    """A base trained from scratch, the same for all arms of a seed."""
    return trained(
        {
            "arm": "scratch",
            "seed": seed,
            "unicode": records.VERSION,
            **{name: value for name, value in task.items() if name not in AFTER_BASE},
        },
        partial(small_llama, width=task["width"], layers=task["layers"], heads=heads_of(task["width"]), seed=seed),
        partial(batches, task["length"], task["batch"], seed=seed),
        steps=task["steps"],
        rate=chosen("hamburger/base", "base").rate if rate is None else rate,
        sources=(records,),
    )


def trained_on(arm: str, task: Task, seed: int, rate: float | None = None) -> Any:
    """The base of a seed, trained on as `arm` says: as it is, or grafted and in groups."""
    base = base_model(task, seed)
    rate = chosen("hamburger/grafting", arm).rate if rate is None else rate
    return trained(
        {
            "arm": arm,
            "seed": seed,
            "unicode": records.VERSION,
            "rate of base": chosen("hamburger/base", "base").rate,
            **{name: value for name, value in task.items() if name != "windows"},
        },
        partial(grafted, arm, base, task, seed, rate),
        partial(batches, task["length"], task["batch"], seed=10**6 + seed),
        steps=task["grafting"],
        rate=rate,
        sources=(records,) if arm == "base" else (records, method, sys.modules[__name__]),
        loss=None if arm == "base" else partial(group_loss, Cutter(arm, base, task["max_steps"], seed)),
    )


def grafted(arm: str, base: Any, task: Task, seed: int, rate: float) -> Any:
    """What an arm trains from here: the base itself, or the same weights between new modules."""
    base = copy.deepcopy(base).train()
    if arm == "base":
        return base
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1000 + seed)
        model: Any = Grafted.from_base(
            base,
            micro_layers=task["micro_layers"],
            max_steps=task["max_steps"],
            merger_heads=heads_of(task["width"]),
            confidence=CONFIDENCE,
        )
        if arm == "the last member for the merger":
            model.embedder = LastMember()
        elif arm == "the mean for the merger":
            model.embedder = MeanMember()
        elif arm == "no micro decoder":
            model.micro = AtOnce(task["width"], task["max_steps"], len(model.config.feature_layers))
    model.rate = rate
    return model.train()


class Grafted(HamburgerForCausalLM):
    """The method's model, of which `training.train` trains the new modules at twice the rate of the base, as the paper does."""

    rate: float

    def optimizer_options(self) -> dict[str, dict[str, float]]:
        new = [name for name, _ in self.named_parameters() if not name.startswith("base.")]
        return {name: {"lr": FASTER * self.rate} for name in new}


class LastMember(CompositionalEmbedder):
    """A group's entry is the embedding of its last token: the tokens before it are forgotten."""

    def __init__(self) -> None:
        nn.Module.__init__(self)

    def merge(self, embeds: Tensor, sizes: Tensor) -> Tensor:
        return embeds[torch.arange(len(embeds)), sizes - 1]


class MeanMember(LastMember):
    """A group's entry is the mean of its embeddings, whose order is forgotten."""

    def merge(self, embeds: Tensor, sizes: Tensor) -> Tensor:
        there = torch.arange(embeds.shape[1]) < sizes[:, None]
        return (embeds * there[..., None]).sum(1) / sizes[:, None]


class AtOnce(MicroStepDecoder):
    """All further tokens of a group from the base's last state, each by a layer of its own that does not see the tokens before it."""

    def __init__(self, width: int, max_steps: int, features: int) -> None:
        nn.Module.__init__(self)
        self.features = features
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(max_steps - 1))
        self.stop_head = nn.Sequential(
            nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)
        )

    def forward(self, x: Tensor, places: Tensor | None = None, cache: Any = None, mask: Tensor | None = None) -> Tensor:
        held = x if cache is None else cache.update(x[:, None], x[:, None], 0)[0][:, 0]
        state = held[:, self.features - 1]
        if places is None:
            places = torch.arange(x.shape[1]).expand(x.shape[:2])
        every = torch.stack([state + F.silu(layer(state)) for layer in self.layers], 1)
        which = (places - self.features).clamp_min(0)
        return every.gather(1, which[..., None].expand(-1, -1, x.shape[2]))


# ------------------------------------------------------------------------------------------------------------------- the groups


class Cutter:
    """Groups of whole rows of bytes by the base's uncertainty; for two arms as many of them, at regular or at random places."""

    def __init__(self, arm: str, base: Any, max_steps: int, seed: int) -> None:
        self.arm, self.base, self.max_steps = arm, base, max_steps
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, ids: Tensor, prompt: int = 1) -> Tensor:
        found = grouped(token_entropies(self.base, ids), prompt, max_steps=self.max_steps)
        if self.arm == "regular groups":
            return regular(found, prompt)
        return shuffled(found, prompt, self.generator) if self.arm == "random groups" else found


def regular(groups: Tensor, prompt: int) -> Tensor:
    """As many groups behind the prompt, every so many tokens: their sizes differ by one at most."""
    made = groups.clone()
    rest = groups.shape[1] - prompt
    number = groups[:, -1:] + 1 - prompt
    made[:, prompt:] = prompt + torch.arange(rest) * number // rest
    return made


def shuffled(groups: Tensor, prompt: int, generator: torch.Generator) -> Tensor:
    """The same sizes of groups behind the prompt, in a random order: as many groups, at random places."""
    rows = []
    for row in groups:
        sizes = torch.bincount(row)[prompt:]
        order = torch.randperm(len(sizes), generator=generator)
        rows.append(group_ids([1] * prompt + sizes[order].tolist()))
    return torch.stack(rows)


def blocks(ids: Tensor, size: int, prompt: int = 1) -> Tensor:
    """Groups of `size` tokens behind the prompt, whatever they are."""
    rest = ids.shape[1] - prompt
    sizes = [1] * prompt + [size] * (rest // size) + [rest % size] * (rest % size > 0)
    return group_ids(sizes).expand(len(ids), -1)


def group_loss(cut: Cutter, model: Any, inputs: Tensor, targets: Tensor) -> Tensor:
    """The paper's loss on a batch, of as many predicted bytes as the base's."""
    ids = torch.cat([inputs, targets[:, -1:]], 1)
    loss: Tensor = model(ids, groups=cut(ids), labels=ids).loss
    return loss

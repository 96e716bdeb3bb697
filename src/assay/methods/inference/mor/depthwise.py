"""Depth-wise continuous batching: rows that stand at different recursions go through the shared layers together.

Recursions have the same weights, so a token in its third can be batched with one in its first. Every tick runs the shared layers once,
over all lanes; a token that has gone deep enough leaves at once, its sequence goes on with the next token, and a finished sequence makes
room for the next request. No lane waits for a deeper one. The plain batched step (one call a recursion, each over the rows still in it)
cannot promise that where a call costs the same for few rows as for many.

When NOT to use it: few rows, and processors on which a call's time grows with its rows: there the plain step is as fast and simpler.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from assay import checks
from assay.methods.core.generation.loop import checked_prompts
from assay.methods.core.models.decoder import Pass
from assay.methods.inference.mor.cache import Mixed, MoRCache, Place
from assay.methods.inference.mor.model import MoRForCausalLM
from assay.methods.inference.mor.routing import scored


@dataclass
class Generated:
    """Answers in the order of the prompts; `ticks`, calls of the shared layers; `rows`, lanes in all of these calls together; `depths`, how
    many tokens took how many recursions (from 1)."""

    tokens: list[list[int]]
    ticks: int = 0
    rows: int = 0
    depths: list[int] = field(default_factory=list)


@torch.no_grad()
def generate_depthwise(
    model: MoRForCausalLM,
    prompts: Sequence[Sequence[int]],
    new_tokens: int | Sequence[int],
    *,
    lanes: int = 8,
    eos: Sequence[int] = (),
) -> Generated:
    """Greedy answers to `prompts` (lists of token ids) of `new_tokens` tokens (one number, or one a prompt), `lanes` of them at a time.

    An answer ends early with a token in `eos`, which belongs to it. The answers are those that `generate` gives each prompt alone, but for
    rounding. All tokens of a prompt but the last are run before it enters. Raises ValueError for a model in training, one that routes by
    top-k (one by one there is nothing to choose from) or shares keys and values between recursions, for no or empty prompts, and for
    numbers that do not fit.
    """
    config = model.config
    if model.training:
        raise ValueError("model must be in eval mode")
    if config.router == "expert" and config.inference != "threshold":
        raise ValueError(f"inference must be 'threshold' here, got {config.inference!r}")
    if config.kv != "recursion":
        raise ValueError(f"kv must be 'recursion' here, got {config.kv!r}")
    asked = checked_prompts(prompts)
    counts = [new_tokens] * len(asked) if isinstance(new_tokens, int) else list(new_tokens)
    if len(counts) != len(asked):
        raise ValueError(f"new_tokens must be one number or one a prompt, {len(asked)}, got {len(counts)}")
    counts = [checks.whole("new_tokens", count, low=1) for count in counts]
    lanes = min(checks.whole("lanes", lanes, low=1), len(asked))
    return _Lanes(model, asked, counts, lanes, set(eos)).run()


class _Lanes:
    """The state of all lanes; a lane's `depth` is the recursion that comes next, from 0, and -1 before its token has been begun."""

    def __init__(
        self, model: MoRForCausalLM, prompts: list[list[int]], counts: list[int], lanes: int, eos: set[int]
    ) -> None:
        self.model, self.parts, self.plan = model, model.parts, model.plan
        self.kind, self.recursions = model.config.router, model.config.recursions
        self.queue = list(enumerate(prompts))[::-1]
        self.counts, self.eos = counts, eos
        self.made = Generated([[] for _ in prompts], depths=[0] * self.recursions)
        reference = self.parts.embed.weight
        self.device = reference.device
        self.store: MoRCache = model.new_cache(lanes)
        self.request = [-1] * lanes
        self.token = torch.zeros(lanes, dtype=torch.int64, device=self.device)
        self.column = torch.zeros(lanes, dtype=torch.int64, device=self.device)
        self.depth = torch.full((lanes,), -1, dtype=torch.int64, device=self.device)
        self.x = reference.new_zeros(lanes, 1, model.config.hidden_size)
        self.entry = self.x.clone()  # token-choice: the stream before the recursions, the chosen depth, its gate
        self.wanted = torch.ones(lanes, dtype=torch.int64, device=self.device)
        self.gate = reference.new_ones(lanes, 1, 1)
        if self.kind == "expert":
            routers = model.routers
            choosing = routers.auxiliary if len(routers.auxiliary) else routers.main
            self.gates, self.choosers = list(routers.main), list(choosing)

    def run(self) -> Generated:
        self.admit(list(range(len(self.request))))
        while any(request >= 0 for request in self.request):
            self.tick()
        return self.made

    def admit(self, lanes: list[int]) -> None:
        """The next requests into these lanes, as long as there are any; prompts of one length are run together."""
        alike: dict[int, list[tuple[int, list[int]]]] = {}
        for lane in lanes:
            self.request[lane] = -1
            self.store.clear(lane)
            if not self.queue:
                continue
            self.request[lane], prompt = self.queue.pop()
            self.token[lane], self.column[lane], self.depth[lane] = prompt[-1], len(prompt) - 1, -1
            alike.setdefault(len(prompt) - 1, []).append((lane, prompt[:-1]))
        for length, members in alike.items():
            if length:
                ids = torch.tensor([prompt for _, prompt in members], device=self.device)
                begun = self.model(ids, use_cache=True, logits_to_keep=1).cache
                for row, (lane, _) in enumerate(members):
                    self.store.put(lane, begun, row)

    def tick(self) -> None:
        """Begin new tokens, run the shared layers once for every lane, end the tokens that are through."""
        live = torch.tensor([lane for lane, request in enumerate(self.request) if request >= 0], device=self.device)
        run = self.parts.begin(self.token[live][:, None], position_ids=self.column[live][:, None])
        new = (self.depth[live] < 0).nonzero()[:, 0]
        if len(new):
            self.x[live[new]] = self.through(self.plan.first, run.hidden[new], run, live, new, "first")
            self.enter(live[new])
        self.shared(run, live)
        self.made.ticks += 1
        self.made.rows += len(live)
        done = self.leaving(live).nonzero()[:, 0]
        if len(done):
            self.finish(run, live, done)

    def through(self, layers: Sequence[int], x: Tensor, run: Pass, live: Tensor, chosen: Tensor, stage: str) -> Tensor:
        """`chosen` of the live lanes through layers that run once a token."""
        if not layers:
            return x
        rows = live[chosen]
        place = self.store.stage(stage).reserve(self.column[rows][:, None], rows)
        return self.layers(layers, x, self.part(run, chosen, place, self.column[rows]))

    def layers(self, layers: Sequence[int], x: Tensor, run: Pass) -> Tensor:
        for slot, index in enumerate(layers):
            x = self.parts.layer(index, x, run, slot=slot)
        return x

    def part(self, run: Pass, chosen: Tensor, place: Place | Mixed, column: Tensor) -> Pass:
        """The pass of some lanes, each with all its entries in view, or as many as a window shows."""
        columns, valid = place.columns, place.valid
        masks: dict[str, Any] = {}
        for kind, given in run.masks.items():
            allowed = valid
            window = getattr(self.parts.config, "sliding_window", None) if kind == "sliding_attention" else None
            if window is not None:
                near = columns > (column - window)[:, None]
                allowed = near if valid is None else near & valid
            if given is not None and given.dtype != torch.bool:
                there = torch.ones_like(columns, dtype=torch.bool) if allowed is None else allowed
                masks[kind] = torch.zeros_like(there, dtype=given.dtype).masked_fill(
                    ~there, torch.finfo(given.dtype).min
                )[:, None, None]
            else:
                masks[kind] = None if allowed is None else allowed[:, None, None]
        rotary = {kind: (cos[chosen], sin[chosen]) for kind, (cos, sin) in run.rotary.items()}
        return Pass(run.hidden, run.position_ids[chosen], masks, rotary, place)

    def enter(self, rows: Tensor) -> None:
        """Tokens at the entry of the recursions."""
        self.depth[rows] = 0
        if self.kind == "token":
            x = self.x[rows]
            self.entry[rows] = x
            probabilities, choices = self.model.chosen_depths(self.model.routers.scores(x)[:, 0])
            self.wanted[rows] = choices + 1
            self.gate[rows] = self.model._gate(probabilities.gather(-1, choices[:, None]), x)

    def shared(self, run: Pass, live: Tensor) -> None:
        """The shared layers over all lanes, each at its own recursion; recursions of other layers ("sequence") one after the other."""
        depth, x = self.depth[live], self.x[live]
        gate = self.model._gate(self.scores(self.gates, x, depth).sigmoid(), x) if self.kind == "expert" else None
        present = depth.unique().tolist()
        members = {d: (depth == d).nonzero()[:, 0] for d in present}
        places = {d: self.store.stage(d).reserve(self.column[live[m]][:, None], live[m]) for d, m in members.items()}
        everyone = torch.arange(len(live), device=self.device)
        if len(set(self.plan.groups)) == 1:
            mixed = Mixed([(members[d], places[d]) for d in present], len(live))
            y = self.layers(self.plan.groups[0], x, self.part(run, everyone, mixed, self.column[live]))
        else:
            y = torch.empty_like(x)
            for d, chosen in members.items():
                part = self.part(run, chosen, places[d], self.column[live[chosen]])
                y[chosen] = self.layers(self.plan.groups[d], x[chosen], part)
        self.x[live] = y if gate is None else x + gate * y
        self.depth[live] = depth + 1

    def scores(self, routers: list[Any], x: Tensor, depth: Tensor) -> Tensor:
        """(lanes, 1) of the router of each lane's recursion."""
        found = x.new_empty(len(x), 1, dtype=torch.float32)
        for d in depth.unique().tolist():
            found[depth == d] = scored(routers[d], x[depth == d])[..., 0]
        return found

    def leaving(self, live: Tensor) -> Tensor:
        """Which of the live lanes are through."""
        depth = self.depth[live]
        through = depth >= self.recursions
        if self.kind == "token":
            return through | (depth >= self.wanted[live])
        if self.kind == "none":
            return through
        inside = (~through).nonzero()[:, 0]
        if len(inside):
            on = self.scores(self.choosers, self.x[live[inside]], depth[inside])[:, 0] > 0
            shares = torch.tensor(self.model.config.shares, device=self.device)
            through[inside] = ~(on | (shares[depth[inside]] >= 1))
        return through

    def finish(self, run: Pass, live: Tensor, done: Tensor) -> None:
        """The last layers and the head for lanes that are through; their next tokens, or the next requests."""
        rows = live[done]
        x = self.x[rows]
        if self.kind == "token":
            x = self.entry[rows] + self.gate[rows] * x
        x = self.through(self.plan.last, x, run, live, done, "last")
        tokens = self.parts.logits(self.parts.norm(x))[:, -1].argmax(-1)
        for depth in self.depth[rows].tolist():
            self.made.depths[depth - 1] += 1
        self.token[rows], self.column[rows], self.depth[rows] = tokens, self.column[rows] + 1, -1
        free = []
        for lane, token in zip(rows.tolist(), tokens.tolist(), strict=True):
            answer = self.made.tokens[self.request[lane]]
            answer.append(token)
            if token in self.eos or len(answer) == self.counts[self.request[lane]]:
                free.append(lane)
        if free:
            self.admit(free)

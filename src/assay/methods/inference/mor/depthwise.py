"""Depth-wise continuous batching: rows that stand at different recursions go through the shared layers together.

Recursions have the same weights, so a token in its third can be batched with one in its first. Every tick runs the shared layers once,
over all lanes; a token that has gone deep enough leaves at once, its sequence goes on with the next token, and a finished sequence makes
room for the next request. No lane waits for a deeper one. The plain batched step (one call a recursion, each over the rows still in it)
cannot promise that where a call costs the same for few rows as for many.

When NOT to use it: few rows, and processors on which a call's time grows with its rows: there the plain step is as fast and simpler.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from assay import checks
from assay.methods.core.generation.loop import checked_prompts
from assay.methods.core.models.decoder import Pass
from assay.methods.inference.mor.cache import MoRCache, Place, Stage
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


@torch.inference_mode()
def generate_depthwise(
    model: MoRForCausalLM,
    prompts: Sequence[Sequence[int]],
    new_tokens: int | Sequence[int],
    *,
    lanes: int = 8,
    eos: int | Sequence[int] | None = None,
) -> Generated:
    """Greedy answers to `prompts` (lists of token ids) of `new_tokens` tokens (one number, or one a prompt), `lanes` of them at a time.

    An answer ends early with a token in `eos` (one or several; None: the model's own, an empty list: none), which belongs to it. The
    answers are those that `generate` gives each prompt alone, but for rounding. All tokens of a prompt but the last are run before it
    enters. Raises ValueError for a model in training, one that routes by top-k (one by one there is nothing to choose from) or shares keys
    and values between recursions, for no or empty prompts, and for numbers that do not fit; TypeError for another model.
    """
    if not isinstance(model, MoRForCausalLM):
        raise TypeError(f"model must be a MoRForCausalLM, got {type(model).__name__}")
    config = model.config
    if model.training:
        raise ValueError("model must be in eval mode")
    if config.router == "expert" and config.inference != "threshold":
        raise ValueError(f"inference must be 'threshold' here, got {config.inference!r}")
    if config.kv != "recursion":
        raise ValueError(f"kv must be 'recursion' here, got {config.kv!r}")
    asked = checked_prompts(prompts)
    wanted: Any = new_tokens
    counts = list(wanted) if is_several(wanted) else [wanted] * len(asked)
    if len(counts) != len(asked):
        raise ValueError(f"new_tokens must be one number or one a prompt, {len(asked)}, got {len(counts)}")
    counts = [checks.whole("new_tokens", count, low=1) for count in counts]
    lanes = min(checks.whole("lanes", lanes, low=1), len(asked))
    ends: Any = getattr(model.generation_config, "eos_token_id", None) if eos is None else eos
    ends = [] if ends is None else ends if is_several(ends) else [ends]
    return _Lanes(model, asked, counts, lanes, {checks.whole("eos", end, low=0) for end in ends}).run()


def is_several(value: Any) -> bool:
    """Whether a value holds several, and is no number, nor a tensor or an array of a single one."""
    return isinstance(value, Iterable) and getattr(value, "ndim", 1) > 0


class _Lanes:
    """The state of all lanes; a lane's `depth` is the recursion that comes next, from 0, and -1 before its token has been begun.

    Keys and values of all recursions stand in one stage, `inner`, in which recursion d of lane b has row d * lanes + b: lanes at different
    recursions are so many of its rows. Rows that follow one another, all lanes at one recursion, are looked at in place.
    """

    def __init__(
        self, model: MoRForCausalLM, prompts: list[list[int]], counts: list[int], lanes: int, eos: set[int]
    ) -> None:
        self.model, self.parts, self.plan = model, model.parts, model.plan
        self.kind, self.recursions, self.lanes = model.config.router, model.config.recursions, lanes
        self.queue = list(enumerate(prompts))[::-1]
        self.counts, self.eos = counts, eos
        self.made = Generated([[] for _ in prompts], depths=[0] * self.recursions)
        reference = self.parts.embed.weight
        self.device = reference.device
        self.first, self.inner, self.last = (Stage(n * lanes, self.device) for n in (1, self.recursions, 1))
        self.request, self.depth, self.wanted = [-1] * lanes, [-1] * lanes, [1] * lanes
        self.token = torch.zeros(lanes, dtype=torch.int64, device=self.device)
        self.column = torch.zeros(lanes, dtype=torch.int64, device=self.device)
        self.x = reference.new_zeros(lanes, 1, model.config.hidden_size)
        self.entry = self.x.clone()  # token-choice: the stream before the recursions, and its gate
        self.gate = reference.new_ones(lanes, 1, 1)
        self.unmasked = dict.fromkeys(self.parts.kinds)  # masks are made here, of the entries that there are
        self.additive = self.parts.config._attn_implementation == "eager"
        if self.kind == "expert":
            routers = model.routers
            choosing = routers.auxiliary if len(routers.auxiliary) else routers.main
            self.gates, self.choosers, self.shares = list(routers.main), list(choosing), model.config.shares

    def run(self) -> Generated:
        self.admit(list(range(self.lanes)))
        while any(request >= 0 for request in self.request):
            self.tick()
        return self.made

    def at(self, rows: list[int]) -> slice | Tensor:
        """Ascending or any rows as an index; a slice, which copies nothing, where they follow one another."""
        if rows == list(range(rows[0], rows[0] + len(rows))):
            return slice(rows[0], rows[0] + len(rows))
        return torch.tensor(rows, device=self.device)

    def inside(self, lanes: list[int]) -> list[int]:
        """Their rows of `inner`."""
        return [self.depth[lane] * self.lanes + lane for lane in lanes]

    def admit(self, lanes: list[int]) -> None:
        """The next requests into these lanes, as long as there are any; prompts of one length are run together."""
        alike: dict[int, list[tuple[int, list[int]]]] = {}
        for lane in lanes:
            self.request[lane] = -1
            self.first.lengths[lane] = self.last.lengths[lane] = 0
            self.inner.lengths[lane :: self.lanes] = 0
            if not self.queue:
                continue
            self.request[lane], prompt = self.queue.pop()
            self.token[lane], self.column[lane], self.depth[lane] = prompt[-1], len(prompt) - 1, -1
            alike.setdefault(len(prompt) - 1, []).append((lane, prompt[:-1]))
        for length, members in alike.items():
            if length:
                ids = torch.tensor([prompt for _, prompt in members], device=self.device)
                begun = self.model(ids, use_cache=True, logits_to_keep=1).cache
                self.take(begun, torch.tensor([lane for lane, _ in members], device=self.device))

    def take(self, begun: MoRCache, lanes: Tensor) -> None:
        """What the rows of `begun` hold into `lanes`."""
        for name, stage in begun.stages.items():
            if isinstance(name, int):
                self.inner.put(name * self.lanes + lanes, stage)
            else:
                (self.first if name == "first" else self.last).put(lanes, stage)

    def tick(self) -> None:
        """Begin new tokens, run the shared layers once for every lane, end the tokens that are through."""
        live = [lane for lane, request in enumerate(self.request) if request >= 0]
        rows = self.at(live)
        run = self.parts.begin(self.token[rows][:, None], self.unmasked, position_ids=self.column[rows][:, None])
        new = [i for i, lane in enumerate(live) if self.depth[lane] < 0]
        if new:
            lanes = [live[i] for i in new]
            self.enter(lanes, self.through(self.plan.first, self.first, lanes, picked(run.hidden, new), run, new))
        self.shared(run, live)
        self.made.ticks += 1
        self.made.rows += len(live)
        done = self.leaving(live)
        if done:
            self.finish(run, [live[i] for i in done], done)

    def through(
        self, layers: Sequence[int], stage: Stage, rows: list[int], x: Tensor, run: Pass, chosen: list[int]
    ) -> Tensor:
        """`x` (A, 1, D), the streams of the `chosen` of the lanes in `run`, through some layers; `rows` of a stage hold their entries."""
        if not layers:
            return x
        columns = picked(run.position_ids, chosen)
        part = self.part(run, chosen, columns, stage.reserve(columns, self.at(rows)))
        for slot, index in enumerate(layers):
            x = self.parts.layer(index, x, part, slot=slot)
        return x

    def part(self, run: Pass, chosen: list[int], columns: Tensor, place: Place) -> Pass:
        """The pass of some lanes, each with all its entries in view, or as many as a window shows."""
        masks: dict[str, Any] = {}
        for kind in run.masks:
            allowed = place.valid
            window = getattr(self.parts.config, "sliding_window", None) if kind == "sliding_attention" else None
            if window is not None:
                near = place.columns > columns - window
                allowed = near if allowed is None else near & allowed
            if allowed is not None and self.additive:
                least = torch.finfo(run.hidden.dtype).min
                allowed = torch.zeros_like(allowed, dtype=run.hidden.dtype).masked_fill(~allowed, least)
            masks[kind] = None if allowed is None else allowed[:, None, None]
        rotary = {kind: (picked(cos, chosen), picked(sin, chosen)) for kind, (cos, sin) in run.rotary.items()}
        return Pass(run.hidden, columns, masks, rotary, place)

    def enter(self, lanes: list[int], x: Tensor) -> None:
        """Tokens at the entry of the recursions."""
        rows = self.at(lanes)
        self.x[rows] = x
        if self.kind == "token":
            self.entry[rows] = x
            probabilities, choices = self.model.chosen_depths(self.model.routers.scores(x)[:, 0])
            self.gate[rows] = self.model._gate(probabilities.gather(-1, choices[:, None]), x)
            for lane, choice in zip(lanes, choices.tolist(), strict=True):
                self.wanted[lane] = choice + 1
        for lane in lanes:
            self.depth[lane] = 0

    def shared(self, run: Pass, live: list[int]) -> None:
        """The shared layers over all lanes, each at its own recursion; recursions of other layers ("sequence") one after the other."""
        rows, inside = self.at(live), self.inside(live)
        x, depths = self.x[rows], [self.depth[lane] for lane in live]
        gate = self.model._gate(self.scores(x, depths).sigmoid(), x) if self.kind == "expert" else None
        if len(set(self.plan.groups)) == 1:
            y = self.through(self.plan.groups[0], self.inner, inside, x, run, list(range(len(live))))
        else:
            y = torch.empty_like(x)
            for d in sorted(set(depths)):
                chosen = [i for i, depth in enumerate(depths) if depth == d]
                own = [inside[i] for i in chosen]
                y[chosen] = self.through(self.plan.groups[d], self.inner, own, picked(x, chosen), run, chosen)
        self.x[rows] = y if gate is None else x + gate * y
        for lane in live:
            self.depth[lane] += 1

    def scores(self, x: Tensor, depths: list[int]) -> Tensor:
        """(lanes, 1) of the router of each lane's recursion."""
        found = x.new_empty(len(x), 1, dtype=torch.float32)
        for d in set(depths):
            chosen = [i for i, depth in enumerate(depths) if depth == d]
            if len(chosen) == len(x):
                return scored(self.gates[d], x)[..., 0]
            found[chosen] = scored(self.gates[d], x[chosen])[..., 0]
        return found

    def going_on(self, x: Tensor, depths: list[int]) -> list[bool]:
        """Whether streams `x` (lanes, 1, D) go into the recursions of their `depths`."""
        found = torch.empty(len(x), dtype=torch.bool, device=x.device)
        for d in sorted(set(depths)):
            chosen = [i for i, depth in enumerate(depths) if depth == d]
            found[chosen] = self.model.goes_on(d, scored(self.choosers[d], picked(x, chosen))[:, 0, 0])
        return found.tolist()

    def leaving(self, live: list[int]) -> list[int]:
        """Which of the live lanes are through, by their place among them."""
        depths = [self.depth[lane] for lane in live]
        on = [depth < self.recursions for depth in depths]
        if self.kind == "token":
            on = [depth < self.wanted[lane] for depth, lane in zip(depths, live, strict=True)]
        elif self.kind == "expert":
            asked = [i for i, depth in enumerate(depths) if on[i] and self.shares[depth] < 1]
            if asked:
                x = picked(self.x[self.at(live)], asked)
                for i, goes in zip(asked, self.going_on(x, [depths[i] for i in asked]), strict=True):
                    on[i] = goes
        return [i for i, goes in enumerate(on) if not goes]

    def finish(self, run: Pass, lanes: list[int], done: list[int]) -> None:
        """The last layers and the head for `lanes`, the `done` ones of the run; their next tokens, or the next requests."""
        rows = self.at(lanes)
        x = self.x[rows]
        if self.kind == "token":
            x = self.entry[rows] + self.gate[rows] * x
        x = self.through(self.plan.last, self.last, lanes, x, run, done)
        tokens = self.parts.logits(self.parts.norm(x))[:, -1].argmax(-1)
        self.token[rows] = tokens
        self.column[rows] += 1
        free = []
        for lane, token in zip(lanes, tokens.tolist(), strict=True):
            self.made.depths[self.depth[lane] - 1] += 1
            self.depth[lane] = -1
            answer = self.made.tokens[self.request[lane]]
            answer.append(token)
            if token in self.eos or len(answer) == self.counts[self.request[lane]]:
                free.append(lane)
        if free:
            self.admit(free)


def picked(x: Tensor, places: list[int]) -> Tensor:
    """`x` at these of its places, which ascend: itself where they are all."""
    return x if len(places) == len(x) else x[places]

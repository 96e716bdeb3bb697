"""What this machine shows of the two phases: how they bear less computing, and what they draw where a counter says so."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from assay import checks
from assay.measure.energy import Counter, EnergyMeter
from assay.methods.serving.polca.power import ServerSpec, fit_sensitivity


@dataclass(frozen=True)
class MeasuredPhases:
    """Median seconds of a prompt and of a token at each number of `threads`, and watts at the most where a counter is, else None.

    Threads stand in for the clock, which few machines let users set: half of them are half the arithmetic, while main memory stays as fast
    as the rest can make it. Real clocks also slow caches, and one thread may not use all of memory's bandwidth, so that tokens look more
    sensitive here than on a device that waits for memory.
    """

    threads: tuple[int, ...]
    prompt_seconds: tuple[float, ...]
    token_seconds: tuple[float, ...]
    idle_watts: float | None = None
    prompt_watts: float | None = None
    token_watts: float | None = None

    @property
    def clocks(self) -> tuple[float, ...]:
        """Each number of threads as a share of the most."""
        return tuple(number / max(self.threads) for number in self.threads)

    @property
    def prompt_beta(self) -> float:
        """How far the time of prompts goes with the clock, 0 to 1."""
        return fit_sensitivity(self.clocks, self.prompt_seconds)

    @property
    def token_beta(self) -> float:
        """How far the time of tokens goes with the clock, 0 to 1."""
        return fit_sensitivity(self.clocks, self.token_seconds)


def measure_phases(
    model: nn.Module,
    *,
    threads: Sequence[int] = (1, 2),
    prompt_tokens: int = 256,
    new_tokens: int = 8,
    rounds: int = 5,
    counters: list[Counter] | None = None,
    seed: int = 0,
) -> MeasuredPhases:
    """Time a transformers causal model's prompt and its tokens at each number of threads, in turn, `rounds` times after one warm-up.

    Where an energy counter can be read (`counters`; None: what there is) the draw of each phase at the most threads is measured too, and
    that of a second of idling. torch's number of threads is as before afterwards.
    Raises ValueError for fewer than two different numbers of threads, or none above 0.
    """
    numbers = sorted({checks.whole("threads", number, low=1) for number in threads})
    if len(numbers) < 2:
        raise ValueError(f"threads must hold two different numbers at least, got {checks.shown(list(threads))}")
    checks.whole("prompt_tokens", prompt_tokens, low=1), checks.whole("new_tokens", new_tokens, low=1)
    rounds = checks.whole("rounds", rounds, low=1)
    vocabulary = model.config.get_text_config().vocab_size  # type: ignore[operator,union-attr]
    ids = torch.randint(vocabulary, (1, prompt_tokens), generator=torch.Generator().manual_seed(seed))
    seen: dict[int, list[tuple[float, float]]] = {number: [] for number in numbers}
    drawn: dict[str, list[tuple[float, float]]] = {"prompt": [], "token": []}
    before = torch.get_num_threads()
    try:
        for turn in range(rounds + 1):
            for number in numbers if turn % 2 else reversed(numbers):
                torch.set_num_threads(number)
                prompt, cache = _metered(lambda: model(ids, use_cache=True).cache, counters)
                token, _ = _metered(lambda cache=cache: _tokens(model, cache, new_tokens), counters)
                if turn:  # the first one warms up
                    seen[number].append((prompt.seconds, token.seconds / new_tokens))
                    if number == numbers[-1]:
                        for name, meter in (("prompt", prompt), ("token", token)):
                            if meter.joules is not None:
                                drawn[name].append((meter.joules, meter.seconds))
    finally:
        torch.set_num_threads(before)
    idle = None
    if drawn["prompt"]:
        meter, _ = _metered(lambda: time.sleep(1.0), counters)
        idle = None if meter.joules is None else meter.joules / meter.seconds
    medians = [[statistics.median(one[place] for one in seen[number]) for number in numbers] for place in (0, 1)]
    watts = {name: sum(j for j, _ in many) / sum(s for _, s in many) if many else None for name, many in drawn.items()}
    return MeasuredPhases(tuple(numbers), tuple(medians[0]), tuple(medians[1]), idle, watts["prompt"], watts["token"])


def _metered(run: Any, counters: list[Counter] | None) -> tuple[EnergyMeter, Any]:
    with torch.inference_mode(), EnergyMeter(counters) as meter:
        found = run()
    return meter, found


def _tokens(model: nn.Module, cache: Any, count: int) -> None:
    one = torch.ones((1, 1), dtype=torch.int64)
    for _ in range(count):
        cache = model(one, cache=cache, use_cache=True).cache


def calibrated_spec(found: MeasuredPhases, spec: ServerSpec) -> ServerSpec:
    """`spec` with what was measured in the place of what was assumed: how phases bear a lower clock, and their draw where it was metered.

    Metered watts are a whole machine's: the server then counts as one accelerator with no host beside it, and its batches draw what one row
    does. How the draw goes with the clock (`scaled`, `exponent`) stays as it was: that takes a clock that can be set (`fit_power`).
    Raises ValueError where a phase drew less than idling.
    """
    prompt = replace(spec.prompt, beta=found.prompt_beta)
    token = replace(spec.token, beta=found.token_beta)
    if found.idle_watts is None or found.prompt_watts is None or found.token_watts is None:
        return replace(spec, prompt=prompt, token=token)
    return replace(
        spec,
        accelerators=1,
        host_idle=0.0,
        host_busy=0.0,
        row_watts=0.0,
        idle_watts=found.idle_watts,
        prompt=replace(prompt, watts=found.prompt_watts),
        token=replace(token, watts=found.token_watts),
    )

"""What is measured for each goal: the inputs, one run of the work, and the quality of a model on text it was not tuned on."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from assay.errors import InputError, MissingError
from assay.methods.transform import GOALS, Goal, TuneContext

BLOCK = 64  # tokens whose mean likelihood is one sample of quality: long enough to be stable, short enough to be many
PREFIX, FORCED = 64, 192  # decoding is judged on windows of so many tokens of context and so many forced ones
QUALITY_TOKENS = 8192  # held-out tokens a candidate is judged on


@dataclass(frozen=True)
class Unit:
    """How a goal's cost (always: lower is better) is shown to people."""

    name: str
    higher_is_better: bool
    show: Callable[[float], float]


UNITS: dict[str, Unit] = {
    "ttft": Unit("ms to the first token", False, lambda seconds: seconds * 1e3),
    "decode": Unit("tokens/s", True, lambda seconds: 1 / seconds),
    "throughput": Unit("tokens/s", True, lambda seconds: 1 / seconds),
    "memory": Unit("MiB at peak", False, lambda size: size / 2**20),
    "energy": Unit("J per request", False, lambda joules: joules),
}


@dataclass(frozen=True)
class Settings:
    """Everything that defines a tuning run besides the recipe; JSON-able, so that child processes rebuild the same work."""

    model: str
    goal: Goal
    prompt_tokens: int = 512
    new_tokens: int = 32
    prompts: int = 16  # of the throughput goal without a workload: enough to sort, few enough to leave time to search
    workload: str | None = None
    allow_download: bool = False

    def __post_init__(self) -> None:
        if self.goal not in GOALS:
            raise InputError(f"--goal must be one of {', '.join(GOALS)}; got {self.goal!r}")
        for name in ("prompt_tokens", "new_tokens", "prompts"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")


@dataclass
class Work:
    """Real inputs for one tuning run, as token ids."""

    settings: Settings
    prompt: torch.Tensor  # (1, prompt_tokens)
    prompts: list[list[int]]  # the mixed-length batch of the throughput goal
    windows: torch.Tensor  # (n, w) held-out text for the quality of the forward pass
    forced: torch.Tensor  # (16, PREFIX + FORCED) held-out text for the quality of decoding
    calibration: list[torch.Tensor] = field(default_factory=list)  # each (1, n), disjoint from `windows`

    def context(self) -> TuneContext:
        s = self.settings
        size = len(self.prompts) if s.goal == "throughput" else 1
        return TuneContext(s.goal, s.prompt_tokens, s.new_tokens, size, self.calibration)


def load_for(settings: Settings) -> Any:
    """The model as it is stored (its own dtype), with its tokenizer."""
    from assay.workloads.models import load_model

    loaded = load_model(settings.model, dtype="auto", allow_download=settings.allow_download)
    limit = getattr(loaded.model.config, "max_position_embeddings", None)
    wanted = settings.prompt_tokens + settings.new_tokens
    if limit is not None and wanted > limit:
        raise InputError(
            f"--prompt-tokens {settings.prompt_tokens} and --new-tokens {settings.new_tokens} need {wanted} positions, "
            f"the model has {limit}"
        )
    return loaded


def build_work(loaded: Any, settings: Settings) -> Work:
    """The same work in every process: the user's own workload if given, else the bundled text."""
    from assay.workloads import text
    from assay.workloads.workload import quality_windows, read_workload

    tokenizer = loaded.tokenizer
    limit = getattr(loaded.model.config, "max_position_embeddings", 2**31)
    # sparse attention and caches show their loss only at the lengths they are used at
    width = max(256, min(settings.prompt_tokens + settings.new_tokens, limit, 8192))
    windows = text.heldout_windows(tokenizer, window=width, n=max(2, QUALITY_TOKENS // width))
    forced = text.heldout_windows(tokenizer, window=min(PREFIX + FORCED, limit), n=16)
    calibration = list(text.calibration_windows(tokenizer, window=min(512, width), n=16).split(1))
    if settings.workload is not None:
        own = read_workload(settings.workload, tokenizer, context=limit, new_tokens=settings.new_tokens)
        judged = quality_windows(own, tokenizer, window=width, n=len(windows)).windows
        longest = max(own.prompts, key=len)
        return Work(settings, torch.tensor([longest]), own.prompts, judged, forced, calibration)
    prompt = text.long_prompt(tokenizer, settings.prompt_tokens)
    prompts = (
        [p[:limit] for p in text.mixed_prompts(tokenizer, n=settings.prompts)] if settings.goal == "throughput" else []
    )
    return Work(settings, prompt, prompts, windows, forced, calibration)


@torch.inference_mode()
def run_once(model: nn.Module, work: Work) -> float:
    """Do the goal's work once and return its cost: seconds (to the first token, per decoded token) or joules."""
    s = work.settings
    if s.goal == "ttft":
        start = time.perf_counter()
        first_token(model, work.prompt)
        return time.perf_counter() - start
    if s.goal == "decode":
        generate(model, work.prompt, 1)  # the first run after another model's finds cold caches

        def seconds(tokens: int) -> float:
            start = time.perf_counter()
            generate(model, work.prompt, tokens)
            return time.perf_counter() - start

        before, whole, after = seconds(1), seconds(s.new_tokens + 1), seconds(1)
        # T(p, n + 1) - T(p, 1): what the tokens after the first cost; the difference may not go below the clock's noise
        return max(whole - (before + after) / 2, 1e-6) / s.new_tokens
    if s.goal == "throughput":
        from assay.methods.core.generation.loop import generate_batch

        start = time.perf_counter()
        generate_batch(model, work.prompts, new_tokens=s.new_tokens)
        return (time.perf_counter() - start) / (len(work.prompts) * s.new_tokens)
    if s.goal == "energy":
        from assay.measure.energy import EnergyMeter

        with EnergyMeter() as meter:
            generate(model, work.prompt, s.new_tokens)
        if meter.joules is None:
            raise MissingError("no energy counter can be read on this machine (RAPL or NVML); choose another --goal")
        return meter.joules
    generate(model, work.prompt, s.new_tokens)  # memory: the peak of the process is read by the parent
    return 0.0


def first_token(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Prefill with a cache and the greedy first token, the work of time to first token."""
    return model(input_ids=ids, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1)


def generate(model: nn.Module, ids: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Greedy generation of exactly `new_tokens` tokens."""
    return model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
    )


def quality(model: nn.Module, work: Work) -> dict[str, list[float]]:
    """Mean negative log-likelihood (nats a token) of blocks of held-out text, for each path the goal takes.

    `prefill` is the model's own forward pass over whole windows. `decode` (every goal but time to first token) judges whatever
    loop, cache and packed weights the model decodes with: where `generate` was replaced the text is fed token by token through
    it; where it is transformers' own, which runs the same forward pass, one pass over the same text tells the same.
    """
    from assay.workloads.quality import token_nll

    paths = {"prefill": blocks(token_nll(model, work.windows), BLOCK)}
    if work.settings.goal != "ttft":
        own = decodes_in_its_own_way(model)
        nll = decode_nll(model, work.forced, PREFIX) if own else token_nll(model, work.forced)[:, PREFIX - 1 :]
        paths["decode"] = blocks(nll, BLOCK)
    return paths


def decodes_in_its_own_way(model: nn.Module) -> bool:
    """Whether the model's `generate`, or the loop inside it, is not transformers' own."""
    from transformers import GenerationMixin

    return any(
        name in vars(model) or getattr(type(model), name, None) is not getattr(GenerationMixin, name)
        for name in ("generate", "_sample")
    )


@torch.inference_mode()
def decode_nll(model: nn.Module, windows: torch.Tensor, prefix: int) -> torch.Tensor:
    """Negative log-likelihood (n, w - prefix) of (n, w) windows behind their first `prefix` tokens, by forced decoding."""
    from transformers import LogitsProcessor, LogitsProcessorList

    class Forced(LogitsProcessor):
        """Keeps the likelihood of the next token of the text, and makes it the one that is chosen."""

        def __init__(self) -> None:
            self.nll: list[torch.Tensor] = []

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            wanted = windows[:, input_ids.shape[1]]
            self.nll.append(nn.functional.cross_entropy(scores.float(), wanted, reduction="none"))
            return torch.full_like(scores, -torch.inf).scatter(1, wanted[:, None], 0.0)

    forced = Forced()
    steps = windows.shape[1] - prefix
    start = windows[:, :prefix]
    generator: Any = model
    generator.generate(
        input_ids=start,
        attention_mask=torch.ones_like(start),
        max_new_tokens=steps,
        do_sample=False,
        eos_token_id=-1,
        pad_token_id=0,
        logits_processor=LogitsProcessorList([forced]),
    )
    return torch.stack(forced.nll, dim=1)


def blocks(nll: torch.Tensor, size: int) -> list[float]:
    """Means over blocks of `size` tokens of (n, w) likelihoods; a shorter last block of a window is dropped."""
    width = min(size, nll.shape[1])
    usable = nll.shape[1] // width * width
    return nll[:, :usable].double().reshape(-1, width).mean(1).tolist()

"""What is measured for each goal: the inputs, one run of the work, and the model's quality on text it was not tuned on.

That text is split by documents: candidates are chosen on the search's half and judged on the proof's (`build_work`).

Everything stays inside the model's context, and all generation is greedy with nothing added. Anything else the model's
`generation_config` asks for (penalties, forced tokens) would be measured as if a method had caused it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from assay.checks import shown
from assay.errors import InputError, MissingError
from assay.methods.core.generation.loop import generate_batch, plain_generation
from assay.methods.transform import GOALS, Goal, TuneContext
from assay.tuner.noninferiority import LEAST_DOCUMENTS, MOST_DOCUMENTS
from assay.tuner.packed import load_source
from assay.workloads.context import context_length, stored_context
from assay.workloads.quality import Agreement, compared
from assay.workloads.text import Half

PROMPT_TOKENS, NEW_TOKENS = 512, 32  # where the user does not say, or what the context leaves of them
PREFIX, FORCED = 64, 192  # decoding is judged on windows of so many tokens of context and so many forced ones
QUALITY_TOKENS = 8192  # held-out tokens a candidate is judged on during the search
PROOF_TOKENS = 16384  # and in the proof, if that makes a good number of documents
FORCED_BYTES = 1 << 29  # of the logits that forced decoding is compared with at a time
SHORTEST_WINDOW, LONGEST_WINDOW = 256, 8192  # of the held-out windows, where the context holds them
CALIBRATION_WINDOW, CALIBRATION_WINDOWS = 512, 16
LEAST_CONTEXT = 32  # a model of fewer positions has no room for anything to be judged


@dataclass(frozen=True)
class Unit:
    """How a goal's cost (lower is always better) is shown to people."""

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
    """Everything that defines a tuning run apart from the recipe; JSON-able, so that child processes rebuild the same work."""

    model: str
    goal: Goal
    prompt_tokens: int = PROMPT_TOKENS
    new_tokens: int = NEW_TOKENS
    prompts: int = 16  # of the throughput goal without a workload: enough to sort, few enough to leave time to search
    workload: str | None = None
    allow_download: bool = False
    eval: str | None = None  # a file of prompts with accepted answers, or "lm_eval:TASK": judged beside perplexity

    def __post_init__(self) -> None:
        if self.goal not in GOALS:
            raise InputError(f"--goal must be one of {', '.join(GOALS)}; got {self.goal!r}")
        for name in ("prompt_tokens", "new_tokens", "prompts"):
            value, option = getattr(self, name), f"--{name.replace('_', '-')}"
            if type(value) is not int:
                raise InputError(f"{option} must be a whole number, got {shown(value)}")
            if value < 1:
                raise InputError(f"{option} must be at least 1, got {value}")


def settings_for(
    model: str,
    goal: Goal,
    prompt_tokens: int | None = None,
    new_tokens: int | None = None,
    *,
    workload: str | None = None,
    allow_download: bool = False,
    eval: str | None = None,
) -> Settings:
    """The settings of a run. Lengths left open (None) become 512 and 32 tokens, or what the model's context has room for.

    Lengths the user asks for are kept; `load_for` refuses them if the context is too short. Raises InputError for settings
    that make no sense and, like MissingError, for a model that cannot be found.
    """
    prompt, new = (
        (PROMPT_TOKENS if prompt_tokens is None else prompt_tokens),
        (NEW_TOKENS if new_tokens is None else new_tokens),
    )
    asked = Settings(model, goal, prompt, new, workload=workload, allow_download=allow_download, eval=eval)
    limit = stored_context(model, allow_download=allow_download)
    if limit is None or prompt + new <= limit:
        return asked
    if new_tokens is None:
        new = max(1, min(new, limit - prompt if prompt_tokens is not None else limit // 4))
    if prompt_tokens is None:
        prompt = max(1, min(prompt, limit - new))
    return Settings(model, goal, prompt, new, workload=workload, allow_download=allow_download, eval=eval)


@dataclass
class Work:
    """Real inputs for one tuning run, as token ids."""

    settings: Settings
    prompt: torch.Tensor  # (1, prompt_tokens)
    prompts: list[list[int]]  # the mixed-length batch of the throughput goal
    windows: torch.Tensor  # (n, w) held-out text for the quality of the forward pass, each with documents of its own
    forced: torch.Tensor  # (m, PREFIX + FORCED) the same for the quality of decoding, shorter where the context is
    source: str = ""  # where `windows` come from
    calibration: list[torch.Tensor] = field(default_factory=list)  # each (1, n), disjoint from `windows` of either half

    @property
    def prefix(self) -> int:
        """How many tokens at the start of each row of `forced` are context; the tokens after them are forced."""
        return max(1, self.forced.shape[1] * PREFIX // (PREFIX + FORCED))

    def proof_share(self) -> float:
        """The tokens of the least that a proof is judged on, over all those of this text."""
        decoding = self.settings.goal != "ttft"
        least = LEAST_DOCUMENTS * (self.windows.shape[1] + decoding * self.forced.shape[1])
        return least / (self.windows.numel() + decoding * self.forced.numel())

    def context(self) -> TuneContext:
        s = self.settings
        size = len(self.prompts) if s.goal == "throughput" else 1
        return TuneContext(s.goal, s.prompt_tokens, s.new_tokens, size, self.calibration)


def load_for(settings: Settings) -> Any:
    """The model in its stored dtype, with its tokenizer.

    Raises InputError if the model's context is too short for what was asked for, and whatever `load_source` raises.
    """
    loaded = load_source(settings.model, allow_download=settings.allow_download)
    limit, new = context_length(loaded.model), settings.new_tokens
    if limit is None:
        return loaded
    if limit < LEAST_CONTEXT:
        raise InputError(f"{settings.model}: the model has {limit} positions; {LEAST_CONTEXT} are needed to judge it")
    if settings.workload is None and settings.prompt_tokens + new > limit:
        fits = f"--prompt-tokens {limit - new} would fit" if new < limit else f"--new-tokens must be below {limit}"
        raise InputError(
            f"--prompt-tokens {settings.prompt_tokens} and --new-tokens {new} need {settings.prompt_tokens + new} positions, "
            f"the model has {limit}: {fits}"
        )
    return loaded


def window_length(settings: Settings, limit: int) -> int:
    """Tokens of a held-out window: sparse attention and caches show their loss only at the lengths they are used at."""
    return min(max(SHORTEST_WINDOW, settings.prompt_tokens + settings.new_tokens), limit, LONGEST_WINDOW)


def proof_documents(width: int) -> int:
    """How many windows of `width` tokens the proof is to have, if there are as many."""
    return min(max(PROOF_TOKENS // width, 2 * LEAST_DOCUMENTS), MOST_DOCUMENTS)


def build_work(loaded: Any, settings: Settings, half: Half = "search") -> Work:
    """The same work in every process: the user's own workload if there is one, else the bundled text; all within the model's context.

    Only the held-out text depends on `half`: what a candidate is chosen on, or what the chosen one is judged on.

    Raises InputError for a workload that cannot be read or does not fit, for lengths the bundled text does not reach, and for a
    tokenizer with tokens that the model has no rows for.
    """
    from assay.workloads import text
    from assay.workloads.workload import QualityText, quality_windows, read_workload

    tokenizer, context = loaded.tokenizer, context_length(loaded.model)
    limit = 2**31 if context is None else context
    width = window_length(settings, limit)
    count = max(2, QUALITY_TOKENS // width) if half == "search" else proof_documents(width)
    try:
        most = 16 if half == "search" else MOST_DOCUMENTS
        forced = text.document_windows(tokenizer, half, window=min(PREFIX + FORCED, limit), n=most)
        if settings.workload is not None:
            own = read_workload(settings.workload, tokenizer, context=limit, new_tokens=settings.new_tokens)
            held = quality_windows(own, tokenizer, half, window=width, n=count)
            prompt, prompts = torch.tensor([max(own.prompts, key=len)]), own.prompts
        else:
            bundled = text.document_windows(tokenizer, half, window=width, n=count)
            source = f"{len(bundled)} windows of {width} tokens of bundled text (the {half}'s documents)"
            held = QualityText(bundled, source)
            prompt = text.long_prompt(tokenizer, settings.prompt_tokens)
            prompts = _mixed_prompts(tokenizer, settings, limit) if settings.goal == "throughput" else []
    except InputError:
        raise
    except ValueError as error:  # more than the bundled text has
        raise InputError(f"{settings.model}: the text to measure with cannot be made: {error}") from None
    work = Work(settings, prompt, prompts, held.windows, forced, held.source, calibration_for(loaded, width))
    check_vocabulary(loaded, [work.prompt, work.windows, work.forced, *map(torch.tensor, work.prompts)])
    return work


def calibration_for(loaded: Any, longest: int = CALIBRATION_WINDOW) -> list[torch.Tensor]:
    """Real text to calibrate on, within the model's context and vocabulary: (1, n) token ids each, n at most `longest`."""
    from assay.workloads.text import calibration_windows

    limit = context_length(loaded.model) or CALIBRATION_WINDOW
    window = min(CALIBRATION_WINDOW, longest, limit)
    found = list(calibration_windows(loaded.tokenizer, window=window, n=CALIBRATION_WINDOWS).split(1))
    check_vocabulary(loaded, found)
    return found


def check_vocabulary(loaded: Any, texts: list[torch.Tensor]) -> None:
    """Raise InputError, naming both sizes, for token ids that the model's embedding has no row for."""
    rows = _vocabulary(loaded.model)
    largest = max(int(ids.max()) for ids in texts)
    if rows is not None and largest >= rows:
        raise InputError(
            f"{loaded.source}: the tokenizer has {len(loaded.tokenizer):,} tokens and the model a vocabulary of {rows:,}: "
            f"real text needs token {largest:,}; this is not the model's tokenizer"
        )


def _vocabulary(model: Any) -> int | None:
    """Rows of the input embedding."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    weight = getattr(embedding, "weight", None)
    return None if weight is None else int(weight.shape[0])


def _mixed_prompts(tokenizer: Any, settings: Settings, limit: int) -> list[list[int]]:
    """Docstrings that leave room for the new tokens; longer ones are cut if too few are short enough."""
    from assay.workloads import text

    room = limit - settings.new_tokens
    longest = min(text.LONGEST_PROMPT, room)
    if longest >= 2 * text.SHORTEST_PROMPT:
        with contextlib.suppress(ValueError):
            return text.mixed_prompts(tokenizer, n=settings.prompts, longest=longest)
    return [prompt[:room] for prompt in text.mixed_prompts(tokenizer, n=settings.prompts)]


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
    """Prefill with a cache and the first greedy token: the work of time to first token."""
    return model(input_ids=ids, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1)


def generate(model: nn.Module, ids: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Greedy generation of exactly `new_tokens` tokens, whatever else the model's `generation_config` asks for."""
    with plain_generation(model):
        return model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )


def quality(model: nn.Module, work: Work) -> dict[str, list[float]]:
    """Mean negative log-likelihood (nats per token) of each window of held-out text, for each path the goal takes.

    `prefill` is the model's own forward pass over whole windows. `decode` (every goal but time to first token) measures whatever
    loop, cache and packed weights the model decodes with. If `generate` was replaced, the text is fed through it token by token;
    if it is transformers' own, which runs the same forward pass, one pass over the same text gives the same result.
    """
    from assay.workloads.quality import token_nll, window_nll

    paths = {"prefill": window_nll(model, work.windows).tolist()}
    if work.settings.goal != "ttft":
        own = decodes_in_its_own_way(model)
        nll = (
            decode_nll(model, work.forced, work.prefix) if own else token_nll(model, work.forced)[:, work.prefix - 1 :]
        )
        paths["decode"] = nll.double().mean(1).tolist()
    return paths


def decodes_in_its_own_way(model: nn.Module) -> bool:
    """Whether the model's `generate`, or the loop inside it, is other than transformers' own."""
    from transformers import GenerationMixin

    return any(
        name in vars(model) or getattr(type(model), name, None) is not getattr(GenerationMixin, name)
        for name in ("generate", "_sample")
    )


@torch.inference_mode()
def decode_nll(model: nn.Module, windows: torch.Tensor, prefix: int) -> torch.Tensor:
    """Negative log-likelihood, (n, w - prefix), of the tokens after the first `prefix` ones of (n, w) windows, by forced decoding."""
    found: list[torch.Tensor] = []

    def see(place: int, scores: torch.Tensor) -> None:
        wanted = windows[:, place].to(scores.device)
        found.append(nn.functional.cross_entropy(scores.float(), wanted, reduction="none"))

    force(model, windows, prefix, see)
    return torch.stack(found, dim=1)


@torch.inference_mode()
def decode_agreement(reference: nn.Module, candidate: nn.Module, windows: torch.Tensor, prefix: int) -> Agreement:
    """`workloads.quality.agreement` over the tokens after the first `prefix` ones, the candidate's by forced decoding.

    The reference runs one forward pass: transformers' own loop, which it decodes with, gives the same.
    """
    parts, width = [], windows.shape[1]
    rows_at_once = max(1, FORCED_BYTES // (4 * width * (_vocabulary(reference) or 1 << 18)))
    for rows in windows.split(rows_at_once):
        logits = reference(input_ids=rows, use_cache=False).logits
        sums = torch.zeros(4, len(rows), dtype=torch.float64)
        force(candidate, rows, prefix, partial(_add_compared, logits, rows, sums))
        parts.append(sums / (width - prefix))
    kl, top1, before, after = torch.cat(parts, dim=1)
    return Agreement(kl, top1, before, after)


def _add_compared(
    expected: torch.Tensor, rows: torch.Tensor, sums: torch.Tensor, place: int, scores: torch.Tensor
) -> None:
    """Add to `sums` (4, n) how the scores of a place follow the logits that were expected, see `compared`."""
    sums += torch.stack([part.cpu() for part in compared(expected[:, place - 1], scores, rows[:, place])])


def force(model: nn.Module, windows: torch.Tensor, prefix: int, see: Callable[[int, torch.Tensor], None]) -> None:
    """Decode (n, w) windows token by token after their first `prefix` ones, each token the text's own; `see` gets the place of a token
    and the logits (n, vocab) that were to choose it."""
    from transformers import LogitsProcessor, LogitsProcessorList

    class Forced(LogitsProcessor):
        """Shows the logits of the next token of the text, and makes it the one that is chosen."""

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            place = input_ids.shape[1]
            see(place, scores)
            wanted = windows[:, place].to(scores.device)
            return torch.full_like(scores, -torch.inf).scatter(1, wanted[:, None], 0.0)

    start = windows[:, :prefix]
    generator: Any = model
    with plain_generation(model, ends=False):
        generator.generate(
            input_ids=start,
            attention_mask=torch.ones_like(start),
            max_new_tokens=windows.shape[1] - prefix,
            do_sample=False,
            pad_token_id=0,
            logits_processor=LogitsProcessorList([Forced()]),
        )

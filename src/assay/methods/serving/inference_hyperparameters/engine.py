"""An engine to tune: generation with transformers, on single-line infilling problems or any prompts."""

from __future__ import annotations

import ast
import random
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from assay import checks
from assay.measure.isolate import run_isolated
from assay.methods.core.generation.loop import generate_batch
from assay.methods.serving.inference_hyperparameters.space import Params
from assay.methods.serving.inference_hyperparameters.trials import Outcome

REFERENCE: Params = {"batch_size": 1, "dtype": "float32", "attn_implementation": "sdpa", "static_cache": False}
"""The setting whose outputs the others are held against: no padding, no rounding but the model's own."""


@dataclass(frozen=True)
class Infilling:
    """A function with one line missing, as a prompt for a plain language model, and the line."""

    prompt: str
    line: str


def infilling_problems(source: str, n: int, *, seed: int = 0, longest: int = 1200) -> list[Infilling]:
    """`n` single-line infilling problems from the functions in `source`: one line of code of the body masked, the rest given.

    HumanEval's infilling has 164. Functions of 4 lines or more and at most `longest` characters, each used once. The prompt
    shows the function with the gap marked and ends where the line should begin (our choice: no fill-in tokens are assumed).
    Raises ValueError if `source` has fewer such functions.
    """
    n = checks.whole("n", n, low=1)
    rng = random.Random(seed)
    functions = [(text, gaps) for text in _functions(source) if len(text) <= longest and (gaps := _code_lines(text))]
    if len(functions) < n:
        raise ValueError(f"source has {len(functions)} functions that will do, {n} are wanted")
    problems = []
    for text, gaps in rng.sample(functions, n):
        lines, gap = text.splitlines(), rng.choice(gaps)
        shown = "\n".join([*lines[:gap], "# <missing line>", *lines[gap + 1 :]])
        indent = lines[gap][: len(lines[gap]) - len(lines[gap].lstrip())]
        problems.append(Infilling(f"{shown}\n\n# The missing line is:\n{indent}", lines[gap].strip()))
    return problems


def _functions(source: str) -> Iterator[str]:
    """The functions and methods of `source` of four lines or more, dedented; by indentation, so they may not parse."""
    lines = source.splitlines()
    for start, line in enumerate(lines):
        stripped = line.lstrip()
        if not stripped.startswith("def "):
            continue
        indent = len(line) - len(stripped)
        end = start + 1
        while end < len(lines) and (not lines[end].strip() or len(lines[end]) - len(lines[end].lstrip()) > indent):
            end += 1
        text = textwrap.dedent("\n".join(lines[start:end])).rstrip()
        if text.count("\n") >= 3:
            yield text


def _code_lines(text: str) -> list[int]:
    """Positions of the lines that are one whole statement of the function's body; docstrings do not count, bad syntax has none."""
    try:
        function = ast.parse(text).body[0]
    except (SyntaxError, ValueError):
        return []
    statements = [node for node in ast.walk(function) if isinstance(node, ast.stmt) and node is not function]
    return sorted(
        node.lineno - 1
        for node in statements
        if node.lineno == node.end_lineno and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
    )


def measure_settings(
    model: nn.Module, prompts: Sequence[Sequence[int]], params: Params, *, new_tokens: int, warmup: int = 1
) -> tuple[Outcome, list[list[int]]]:
    """Tokens per second of greedy generation of `new_tokens` for every prompt, end token ignored; and the tokens.

    Understands batch_size, sort_by_length, threads and static_cache; dtype and attention belong to the loaded model. `warmup`
    runs of the largest batch are thrown away. A request's latency runs from the start of the workload, all being there at once,
    to the end of its batch. `tokens` counts what was generated: neither prompts nor padding.

    Raises ValueError for a name it does not know, a batch size or number of threads below 1, or a batch larger than the prompts are
    many: that would measure a smaller one.
    """
    if unknown := set(params) - {*REFERENCE, "sort_by_length", "threads"}:
        known = ", ".join(sorted({*REFERENCE, "sort_by_length", "threads"}))
        raise ValueError(f"params must be among {known}, got {', '.join(sorted(unknown))}")
    size = checks.whole("batch_size", params.get("batch_size", 1), low=1)
    if size > len(prompts):
        raise ValueError(f"batch_size must lie in 1..{len(prompts)}, the number of prompts, got {size}")
    checks.whole("threads", params.get("threads", 1), low=1)
    new_tokens, warmup = checks.whole("new_tokens", new_tokens, low=1), checks.whole("warmup", warmup, low=0)
    for name in ("sort_by_length", "static_cache"):
        checks.flag(name, params.get(name, False))
    order = list(range(len(prompts)))
    if params.get("sort_by_length", False):
        order.sort(key=lambda i: -len(prompts[i]))
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    results: list[list[int]] = [[] for _ in prompts]
    latencies = [0.0] * len(prompts)
    threads = torch.get_num_threads()

    def run(members: list[int]) -> list[list[int]]:
        found = generate_batch(
            model,
            [prompts[i] for i in members],
            new_tokens=new_tokens,
            batch_size=size,
            sort_by_length=False,
            cache_implementation="static" if params.get("static_cache", False) else None,
        )
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return found

    try:
        torch.set_num_threads(params.get("threads", threads))
        heaviest = max(batches, key=lambda members: len(members) * max(len(prompts[i]) for i in members))
        for _ in range(warmup):
            run(heaviest)
        start = time.perf_counter()
        for members in batches:
            for i, tokens in zip(members, run(members), strict=True):
                results[i] = tokens
                latencies[i] = time.perf_counter() - start
        seconds = time.perf_counter() - start
    finally:
        torch.set_num_threads(threads)
    made = sum(map(len, results))
    metrics = {
        "tokens": made,
        "seconds": seconds,
        "p50_seconds": float(np.quantile(latencies, 0.5)),
        "p95_seconds": float(np.quantile(latencies, 0.95)),
    }
    return Outcome(made / seconds, metrics), results


def mismatch_rate(reference: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]) -> float:
    """Share of the outputs that are not those of the reference, token for token. Raises ValueError if their numbers differ."""
    return float(np.mean([list(a) != list(b) for a, b in zip(reference, outputs, strict=True)])) if outputs else 0.0


class HuggingFaceEngine:
    """Objective: measures settings of transformers' generation in this process, on fixed prompts (token ids).

    The model of `folder` is loaded anew only when dtype or attention change (one is kept at a time). `mismatch_rate` is against
    the outputs at `REFERENCE`, which costs a run of its own unless that is the first setting measured, as it is in a search.
    """

    def __init__(self, folder: str | Path, prompts: Sequence[Sequence[int]], *, new_tokens: int = 16, warmup: int = 1):
        if not prompts or not all(len(prompt) for prompt in prompts):
            raise ValueError("prompts must hold at least one, none of them empty")
        self.folder, self.prompts = str(folder), [list(prompt) for prompt in prompts]
        self.new_tokens, self.warmup = new_tokens, warmup
        self._reference: list[list[int]] | None = None
        self._loaded: tuple[tuple[str, str], nn.Module] | None = None

    def __call__(self, params: Params, *, fidelity: float = 1.0, seed: int = 0) -> Outcome:
        outcome, outputs = self._measure(
            params, self._share(fidelity, checks.whole("batch_size", params.get("batch_size", 1), low=1))
        )
        if self._reference is None:
            first = {**REFERENCE, **params} == {**params, **REFERENCE} and len(outputs) == len(self.prompts)
            self._reference = outputs if first else self._measure(REFERENCE, self.prompts)[1]
        rate = mismatch_rate(self._reference[: len(outputs)], outputs)
        return Outcome(outcome.value, {**outcome.metrics, "mismatch_rate": rate})

    def _measure(self, params: Params, prompts: list[list[int]]) -> tuple[Outcome, list[list[int]]]:
        model = self._model(params)
        return measure_settings(model, prompts, params, new_tokens=self.new_tokens, warmup=self.warmup)

    def _share(self, fidelity: float, batch_size: int) -> list[list[int]]:
        """The first of the prompts, but at least one whole batch: less would say nothing about that batch size."""
        if not 0 < fidelity <= 1:
            raise ValueError(f"fidelity must lie in (0, 1], got {fidelity}")
        return self.prompts[: max(1, batch_size, round(fidelity * len(self.prompts)))]

    def _model(self, params: Params) -> nn.Module:
        group = (params.get("dtype", "float32"), params.get("attn_implementation", "sdpa"))
        if self._loaded is None or self._loaded[0] != group:
            self._loaded = None  # the old one goes before the new one comes
            self._loaded = (group, load_for_generation(self.folder, *group))
        return self._loaded[1]


class IsolatedEngine(HuggingFaceEngine):
    """The same, with every trial in a fresh process under a memory and a time limit: a setting that does not fit ends only itself.

    Costs a start and a load of the model per trial. Adds `peak_bytes`, the resident memory of the process at its highest.
    """

    def __init__(
        self,
        folder: str | Path,
        prompts: Sequence[Sequence[int]],
        *,
        new_tokens: int = 16,
        warmup: int = 1,
        memory_bytes: int | None = None,
        timeout_s: float | None = None,
    ):
        super().__init__(folder, prompts, new_tokens=new_tokens, warmup=warmup)
        self.memory_bytes, self.timeout_s = memory_bytes, timeout_s

    def _measure(self, params: Params, prompts: list[list[int]]) -> tuple[Outcome, list[list[int]]]:
        arguments = {"folder": self.folder, "prompts": prompts, "params": params}
        child = run_isolated(
            f"{__name__}:trial_in_child",
            {**arguments, "new_tokens": self.new_tokens, "warmup": self.warmup},
            timeout_s=self.timeout_s,
            memory_bytes=self.memory_bytes,
        )
        if child.status == "out of memory":
            raise MemoryError(child.error)
        if not child.ok:
            raise RuntimeError(child.error)
        metrics = {**child.value["metrics"], "peak_bytes": child.peak_rss_bytes}
        return Outcome(child.value["value"], metrics), child.value["outputs"]


def trial_in_child(
    folder: str, prompts: list[list[int]], params: Params, new_tokens: int, warmup: int
) -> dict[str, object]:
    """One trial of `IsolatedEngine`, as JSON."""
    model = load_for_generation(folder, params.get("dtype", "float32"), params.get("attn_implementation", "sdpa"))
    outcome, outputs = measure_settings(model, prompts, params, new_tokens=new_tokens, warmup=warmup)
    return {"value": outcome.value, "metrics": dict(outcome.metrics), "outputs": outputs}


def load_for_generation(folder: str, dtype: str, attn_implementation: str) -> nn.Module:
    """The causal language model of a local folder, safetensors only, in evaluation mode."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            attn_implementation=attn_implementation,
            local_files_only=True,
            use_safetensors=True,
        )
    finally:
        if bars:
            logging.enable_progress_bar()
    return model.eval()

"""The user's own evaluation beside perplexity: a file of prompts with accepted answers, or a task of lm-eval.

Both models answer the same prompts greedily; what counts is the score lost per prompt, with its interval over the prompts. The
candidate must not lose more than `--max-drop`, as points of the score: 0.01 allows one prompt in a hundred. No prompt is asked twice.
"""

from __future__ import annotations

import importlib.util
import os
import re
import time
from collections.abc import Callable
from typing import Any

from torch import nn

from assay.errors import InputError, MissingError
from assay.methods.core.generation.loop import generate_batch
from assay.tuner.noninferiority import score_interval, verdict_of
from assay.tuner.work import Settings
from assay.workloads.answers import Questions, is_accepted, read_questions
from assay.workloads.context import context_length

LM_EVAL = "lm_eval:"
CHUNK = 8  # prompts answered by one model before it is the other's turn

Scores = dict[Any, float]  # by prompt


def check_eval(wanted: str) -> None:
    """Raise InputError for a file that is not there or a task that cannot be one, MissingError where lm-eval is not installed.

    What lm-eval takes as a task may also be a path, whose YAML can name code to import; only names are taken here.
    """
    if not wanted.startswith(LM_EVAL):
        if not os.path.isfile(wanted):
            raise InputError(f"--eval {wanted}: no such file; a task of lm-eval is named {LM_EVAL}TASK")
        return
    task = wanted.removeprefix(LM_EVAL)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", task) or task.endswith((".yaml", ".yml")):
        raise InputError(f"--eval {wanted}: the name of a task is letters, digits, '_', '-' and '.', not {task!r}")
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingError(f"--eval {wanted} needs lm-eval, which is not installed: pip install 'lm_eval[hf]'")


def questions_of(loaded: Any, settings: Settings) -> Questions | None:
    """The questions of the settings' file; None where there is none. Raises as `read_questions` does."""
    if settings.eval is None or settings.eval.startswith(LM_EVAL):
        return None
    return read_questions(settings.eval, loaded.tokenizer, context=context_length(loaded.model) or 2**31)


def evaluate(
    loaded: Any,
    untouched: nn.Module,
    changed: nn.Module,
    settings: Settings,
    alpha: float,
    limit: float,
    seconds: float,
) -> dict[str, Any]:
    """Both models' mean scores, and the score lost with the interval that decides (each end misses with `alpha`).

    `seconds` bound the time for a file of questions: where they do not all fit, the verdict is "undecided".
    """
    assert settings.eval is not None
    questions = questions_of(loaded, settings)
    if questions is not None:
        name, metric = questions.name, "exact match of the first line"
        before, after = _answered(loaded.tokenizer, untouched, changed, questions, seconds)
        asked = len(questions.questions)
    else:
        name = settings.eval.removeprefix(LM_EVAL)
        metric, before = lm_eval_scores(untouched, loaded.tokenizer, name, download=settings.allow_download)
        _, after = lm_eval_scores(changed, loaded.tokenizer, name, download=settings.allow_download, metric=metric)
        asked = len(before)
    keys = [key for key in before if key in after]
    lost = score_interval([before[key] for key in keys], [after[key] for key in keys], alpha)
    verdict = verdict_of([lost], limit) if len(keys) == asked else "undecided"
    reason = "" if len(keys) == asked else f"there was time for only {len(keys)} of {asked} prompts"
    if verdict == "undecided" and not reason:
        reason = f"{asked} prompts are too few to show that no more than {100 * limit:g} points are lost"
    return {
        "name": name,
        "metric": metric,
        "prompts": len(keys),
        "baseline": sum(before[key] for key in keys) / len(keys),
        "candidate": sum(after[key] for key in keys) / len(keys),
        "lost": lost.median,
        "low": lost.low,
        "high": lost.high,
        "level": 1 - 2 * alpha,
        "verdict": verdict,
        "reason": reason,
    }


def _answered(
    tokenizer: Any, untouched: nn.Module, changed: nn.Module, questions: Questions, seconds: float
) -> tuple[Scores, Scores]:
    """1 or 0 by prompt for each model, in turns of a few prompts until the time is over; at least one turn."""
    start = time.perf_counter()
    scores: tuple[Scores, Scores] = ({}, {})
    for first in range(0, len(questions.questions), CHUNK):
        if first and (time.perf_counter() - start) * (1 + CHUNK / first) > seconds:
            break
        chunk = questions.questions[first : first + CHUNK]
        for found, model in zip(scores, (untouched, changed), strict=True):
            prompts = [question.prompt for question in chunk]
            made = generate_batch(model, prompts, new_tokens=questions.new_tokens, ignore_eos=False)
            texts = tokenizer.batch_decode(made, skip_special_tokens=True)
            for place, (text, question) in enumerate(zip(texts, chunk, strict=True), first):
                found[place] = float(is_accepted(text, question.answers))
    return scores


def lm_eval_scores(
    model: nn.Module, tokenizer: Any, task: Any, *, download: bool = False, metric: str | None = None
) -> tuple[str, Scores]:
    """The name of a metric and its value by prompt, by lm-eval's `simple_evaluate` on the loaded model.

    `task` is a name that lm-eval knows, or a task object. The metric is the task's first, or the one named, that gives every prompt
    a number in [0, 1] of which more is better. Raises MissingError without lm-eval, InputError for an unknown task, data that
    would have to be downloaded, or a task without such a metric.
    """
    if not download:  # before its data library is imported, which reads them then
        os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise MissingError(f"lm-eval cannot be imported ({error}): pip install 'lm_eval[hf]'") from None
    evaluate_task: Callable[..., Any] = simple_evaluate
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    try:
        found = evaluate_task(model=wrapped, tasks=[task], log_samples=True, bootstrap_iters=0)
    except (KeyError, ValueError) as error:
        raise InputError(f"lm-eval cannot run {task!r}: {' '.join(str(error).split())[:200]}") from None
    except (ConnectionError, OSError) as error:
        hint = "" if download else "; its data may have to be downloaded: --allow-download"
        raise InputError(f"lm-eval cannot run {task!r}: {' '.join(str(error).split())[:200]}{hint}") from None
    names: dict[str, None] = {}
    for one, samples in found["samples"].items():
        better = found["higher_is_better"].get(one, {})
        names |= {name: None for sample in samples for name in sample["metrics"] if better.get(name, True)}
    for name in [metric] if metric is not None else list(names):
        scores: Scores = {}
        for one, samples in found["samples"].items():
            for sample in samples:  # where answers are filtered in several ways, the first way counts
                scores.setdefault((one, sample["doc_id"]), sample.get(name))
        if scores and all(isinstance(x, bool | int | float) and 0 <= x <= 1 for x in scores.values()):
            return name, {key: float(value) for key, value in scores.items()}
    raise InputError(f"{task!r} has no metric that gives every prompt a score from 0 to 1; it has {', '.join(names)}")

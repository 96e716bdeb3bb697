"""What retuning gains after a change of hardware; here the change is from one processor thread to two, and back.

In each environment, a grid of settings of transformers' generation is measured on single-line infilling problems cut from the
standard library. Then, in the new environment, the setting tuned for the old one (baseline) is timed against the one tuned for
the new (candidate), on other problems than those it was tuned on. If both are the same setting, retuning gains nothing, and the two run the
same work. Each of a trial's processes searches anew, so that the luck of a search is in the interval.
"""

from __future__ import annotations

from typing import Any

import torch

from assay.experiments.core import Guard, Operator, Quality, Trial, experiment
from assay.measure.stats import share_interval
from assay.methods.serving.inference_hyperparameters import (
    Categorical,
    HuggingFaceEngine,
    Int,
    SearchResult,
    Space,
    infilling_problems,
    landscape,
    measure_settings,
    mismatch_rate,
    search,
    transfer_matrix,
)
from assay.workloads.models import load_model
from assay.workloads.text import code_text, encode

MODEL = "smollm2-135m"
SCALES: dict[str, dict[str, Any]] = {
    "smoke": {"batches": [1, 3], "problems": 4, "longest": 200, "new_tokens": 4, "repeats": 1, "pairs": 12},
    # 13 lines that stay the same are the fewest that show the guard's 25 %
    "small": {"batches": [1, 8], "problems": 14, "longest": 100, "new_tokens": 2, "repeats": 1, "pairs": 12},
    "full": {
        "batches": [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64],
        "problems": 164,
        "longest": 1200,
        "new_tokens": 16,
        "repeats": 3,
        "pairs": 12,
    },
}
SORTED = 8  # what an expert sets without tuning
DECLARED: dict[str, Any] = {
    "points": {scale: [point] for scale, point in SCALES.items()},
    "operator": Operator("batched generation", free=f"batches of {SORTED}, sorted by length"),
    "paper": {"problems": 164, "models": 20, "move": "one GPU model to another"},
    "departures": {
        "problems": "14 infilling problems at small scale, for minutes instead of hours",
        "models": "one, SmolLM2-135M",
        "move": "from one processor thread to two and back: no GPU, and no second machine",
    },
    "guard": Guard(
        "infilled lines that stay the same",
        0.25,
        higher_is_better=True,
        relative=False,
        without={
            "deleted": "a setting that is left out is the default, which is the baseline",
            "rival": "every setting computes the same lines; the free baseline is the rival in time",
        },
    ),
    "refuted_if": "the setting tuned for the old hardware is faster on the new one than that tuned for the new",
    "minutes": 360,
}


@experiment("inference_hyperparameters/retuning-gain", **DECLARED)
def retuning_gain(**point: Any) -> Trial:
    """Upgrade: tuned on one thread, moved to two."""
    return _moved(old=1, new=2, **point)


@experiment("inference_hyperparameters/retuning-gain-downgrade", **DECLARED)
def retuning_gain_downgrade(**point: Any) -> Trial:
    """Downgrade: tuned on two threads, moved to one."""
    return _moved(old=2, new=1, **point)


def space(batches: list[int]) -> Space:
    """Batch size, and order where there is one to choose: what changes neither the model nor its outputs."""
    return Space(
        [
            Int("batch_size", 1, max(batches), default=1, log=True, grid=tuple(batches), more_memory=True),
            Categorical("sort_by_length", (False, True), default=False, when={"batch_size": tuple(batches[1:])}),
        ]
    )


def _moved(
    old: int, new: int, batches: list[int], problems: int, longest: int, new_tokens: int, repeats: int, pairs: int
) -> Trial:
    loaded = load_model(MODEL)
    texts = [problem.prompt for problem in infilling_problems(code_text(), 2 * problems, longest=longest)]
    ids = [encode(loaded.tokenizer, text) for text in texts]
    prompts, fresh = ids[::2], ids[1::2]
    engine = HuggingFaceEngine(loaded.folder, prompts, new_tokens=new_tokens)
    tuned: dict[int, SearchResult] = {}
    for threads in (old, new):
        with _Threads(
            threads
        ):  # rounding differs between batch shapes, so outputs are compared below instead of required to be equal
            tuned[threads] = search(space(batches), engine, method="grid", confirm=repeats, max_mismatch=1.0)

    def run(params: dict[str, Any]) -> list[list[int]]:
        with _Threads(new):
            return measure_settings(loaded.model, fresh, params, new_tokens=new_tokens, warmup=0)[1]

    before, after = tuned[old].best_params, tuned[new].best_params
    report = landscape(space(batches), tuned[new].trials)
    matrix = transfer_matrix({f"{threads} threads": tuned[threads].trials for threads in (old, new)})

    def quality() -> Quality:
        one, other = run(before), run(after)
        same = sum(a == b for a, b in zip(one, other, strict=True))
        share = share_interval(same, len(one))
        shuffled = 1 - mismatch_rate(one, [*other[1:], other[0]])  # each problem gets the line of another
        return Quality(share.median, 1.0, share.low, share.high, controls={"random": shuffled})

    return Trial(
        baseline=lambda: run(before),
        candidate=lambda: run(after),
        free=lambda: run({"batch_size": min(SORTED, problems), "sort_by_length": True}),
        quality=quality,
        details={
            "tuned_for_the_old": before,
            "tuned_for_the_new": after,
            "transfer": matrix,
            "gap_to_the_default_percent": report.gap_percent,
            "best_to_median": report.best_to_median,
            "relative_noise": report.noise,
            "local_maxima_along_batch_size": report.axes["batch_size"].mean_maxima,
            "search_seconds": tuned[new].search_seconds,
            "break_even_tokens": min(tuned[new].break_even_tokens, 1e12),  # JSON has no infinity
        },
        pairs=pairs,
    )


class _Threads:
    """Run with this many intra-op threads."""

    def __init__(self, count: int):
        self.count = count

    def __enter__(self) -> None:
        self.before = torch.get_num_threads()
        torch.set_num_threads(self.count)

    def __exit__(self, *error: object) -> None:
        torch.set_num_threads(self.before)

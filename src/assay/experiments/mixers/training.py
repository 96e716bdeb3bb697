"""A small trainer for sequence models: AdamW, warm-up and cosine schedule, clipping, and the learning rates that layers ask for.

A module may define `optimizer_options() -> {parameter name: {"lr": ..., "weight_decay": ...}}` for its own parameters; norms,
biases and embeddings get no weight decay. For anything beyond an experiment use `transformers.Trainer`: the models are
transformers models.
"""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks
from assay.measure.stats import Interval, student_t


def parameter_groups(model: nn.Module, *, lr: float, weight_decay: float = 0.1) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer, one per setting; each parameter once, also where it is shared."""
    special: dict[int, dict[str, float]] = {}
    for module in model.modules():
        options = getattr(module, "optimizer_options", None)
        if callable(options):
            own = dict(module.named_parameters())
            special |= {id(own[name]): dict(values) for name, values in options().items()}
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        plain = parameter.ndim < 2 or id(parameter) in embeddings
        asked = special.get(id(parameter), {})
        setting = (asked.get("lr", lr), asked.get("weight_decay", 0.0 if plain else weight_decay))
        groups.setdefault(setting, []).append(parameter)
    return [{"params": found, "lr": rate, "weight_decay": decay} for (rate, decay), found in groups.items()]


def train(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    steps: int,
    lr: float = 2e-3,
    weight_decay: float = 0.1,
    warmup: float = 0.1,
    clip: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.95),
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None,
    on_step: Callable[[int, float], None] = lambda step, value: None,
) -> list[float]:
    """Train `model` on `batches` of (input ids, targets) for `steps` steps; the losses, one a step.

    Targets (batch, tokens) stand at the position that predicts them (already shifted), -100 where nothing is asked. `loss`
    replaces the cross-entropy. Learning rates rise over the share `warmup` of the steps and fall to a tenth along a cosine.
    Raises ValueError when the batches end early or a loss is not finite, and for settings out of range.
    """
    steps = checks.whole("steps", steps, low=1)
    lr, weight_decay = checks.number("lr", lr, above=0), checks.number("weight_decay", weight_decay, low=0)
    warmup, clip = checks.number("warmup", warmup, low=0, high=1), checks.number("clip", clip, above=0)
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=lr, weight_decay=weight_decay), betas=betas, fused=True)
    first = max(1, int(warmup * steps))

    def rate(step: int) -> float:
        if step < first:
            return (step + 1) / first
        return 0.55 + 0.45 * math.cos(math.pi * (step - first) / max(1, steps - first))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    compute = token_loss if loss is None else loss
    was, losses = model.training, []
    model.train()
    stream = iter(batches)
    for step in range(steps):
        try:
            inputs, targets = next(stream)
        except StopIteration:
            raise ValueError(f"batches must last for {steps} steps, ended after {step}") from None
        value = compute(model, inputs, targets)
        if not torch.isfinite(value):
            raise ValueError(f"the loss is {value.item()} at step {step}: the learning rate ({lr}) may be too high")
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        scheduler.step()
        losses.append(value.item())
        on_step(step, losses[-1])
    model.train(was)
    return losses


def token_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy (nats) of a language model's logits at the targets that are not -100."""
    out = model(inputs)
    logits = out.logits if hasattr(out, "logits") else out
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), ignore_index=-100)


@torch.no_grad()
def evaluate(model: nn.Module, inputs: Tensor, targets: Tensor, *, batch: int = 16) -> dict[str, Tensor]:
    """Per sequence: "nll", mean negative log-likelihood in nats, and "accuracy", the share of right targets, each (n,) float64.

    NaN for a sequence that asks nothing (all targets -100).
    """
    batch = checks.whole("batch", batch, low=1)
    was = model.training
    model.eval()
    nll, right = [], []
    for ids, wanted in zip(inputs.split(batch), targets.split(batch), strict=True):
        out = model(ids)
        logits = (out.logits if hasattr(out, "logits") else out).float()
        asked = wanted != -100
        each = F.cross_entropy(logits.transpose(1, 2), wanted, ignore_index=-100, reduction="none")
        nll.append((each.double() * asked).sum(1) / asked.sum(1))
        right.append(((logits.argmax(-1) == wanted) & asked).sum(1).double() / asked.sum(1))
    model.train(was)
    return {"nll": torch.cat(nll), "accuracy": torch.cat(right)}


def in_parallel(function: Callable[..., Any], runs: Sequence[tuple[Any, ...]]) -> list[Any]:
    """`function(*run)` of every run, in as many processes of one thread each as torch has threads here; the results in order.

    Small models keep one core busy and no more. `function` must be importable, and its results picklable.
    """
    workers = max(1, min(torch.get_num_threads(), len(runs)))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return [future.result() for future in [pool.submit(function, *run) for run in runs]]


def over_seeds(values: Sequence[float] | np.ndarray, *, resolution: float = 0.0) -> Interval:
    """The mean over seeds with the 95 % interval of Student's t (4.3 standard errors for three seeds).

    `resolution` is the least standard error believed: the score of one test item, so that seeds that agree to the last item do not
    seem certain. `median` is the mean. Raises ValueError for fewer than two seeds.

    >>> found = over_seeds([1.0, 2.0, 3.0])
    >>> found.median, round(found.low, 2), round(found.high, 2)
    (2.0, -0.48, 4.48)
    """
    seen = np.asarray(values, dtype=np.float64)
    if len(seen) < 2:
        raise ValueError(f"values must be of at least two seeds, got {len(seen)}")
    error = max(float(seen.std(ddof=1)) / len(seen) ** 0.5, resolution)
    mean, half = float(seen.mean()), student_t(0.95, len(seen) - 1) * error
    return Interval(mean, mean - half, mean + half, len(seen))

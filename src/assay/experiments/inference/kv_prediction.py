"""KV Prediction: how much earlier the first token comes, and what the large model then still knows of the prompt.

Time is that of SmolLM2 with untrained predictors of the paper's shapes: values change no time. Quality is that of small models over bytes,
trained here (at the largest scale of layer pruning, of SmolLM2 itself): nats a token of true text behind a prompt. The auxiliary alone is
trained on the same tokens, and what pruning of the prompt costs as little is judged beside it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.experiments.core import Guard, Operator, Quality, Trained, Trial, experiment
from assay.experiments.inference import language
from assay.experiments.inference.language import small_llama, trained
from assay.experiments.mixers.training import in_parallel, train
from assay.experiments.rates import Rate, chosen, searched
from assay.experiments.seeds import paired
from assay.methods.inference import kv_prediction as method
from assay.methods.inference.kv_prediction import (
    KVPredictor,
    kept_layers,
    parameter_ratio,
    prompt_cost,
    pruned,
    pruned_map,
)
from assay.workloads.models import load_model
from assay.workloads.sequences import byte_batches
from assay.workloads.text import calibration_windows, heldout_windows, long_prompt

Kind = Literal["lp", "c"]
Task = Mapping[str, Any]
SMOLLM2 = "smollm2-135m"
KEEP = 0.5  # of the layers, in KVP-LP
SIBLING = (
    1 / 2,
    4 / 7,
)  # of width and of layers, in KVP-C: a quarter of OpenELM 1.1B's parameters is in 16 layers of 28
SEEDS = (0, 1, 2)
BASES, AUXILIARIES, OF_SMOLLM2 = (f"kv_prediction/{what}" for what in ("bases", "auxiliaries", "smollm2"))

# bytes: a model of `width` and `layers`, trained for `base_steps`, its auxiliaries for `steps` more
TASK: dict[str, Any] = {
    "of": "bytes", "width": 64, "layers": 4, "base_steps": 300, "steps": 150, "batch": 16, "prompt": 64, "continuation": 8, "windows": 384,
}  # fmt: skip
SMOKE: dict[str, Any] = {
    **TASK, "width": 32, "layers": 4, "base_steps": 20, "steps": 10, "batch": 4, "prompt": 32, "continuation": 8, "windows": 16,
}  # fmt: skip
LARGE: dict[str, Any] = {
    **TASK,
    "width": 256,
    "layers": 8,
    "base_steps": 1500,
    "steps": 1000,
    "prompt": 200,
    "continuation": 50,
}
REAL: dict[str, Any] = {
    "of": SMOLLM2, "steps": 500, "batch": 1, "prompt": 200, "continuation": 50, "windows": 48,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- training


def here() -> Any:
    return sys.modules[__name__]


class Learner(nn.Module):
    """What of a predictor is trained, and so kept on disk: the base is not."""

    def __init__(self, model: KVPredictor) -> None:
        super().__init__()
        self.auxiliary, self.predictor = model.auxiliary, model.predictor
        self.whole = [model]  # not a module of this one

    def forward(self, ids: Tensor) -> Tensor:
        loss: Tensor = self.whole[0](input_ids=ids, labels=ids).loss
        return loss


def whole_loss(learner: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """The paper's loss of windows whose targets are the next tokens."""
    loss: Tensor = learner(torch.cat([inputs, targets[:, -1:]], 1))
    return loss


def fitted(
    search: str,
    arm: str,
    task: Task,
    seed: int,
    build: Callable[[], Any],
    steps: int,
    rate: float | None,
    **options: Any,
) -> Any:
    """`build()` trained for `steps`: at the arm's own rate, and kept; or, for a search, at `rate`."""
    ignored = ("windows", "steps") if search == BASES else ("windows",)
    key = {"arm": arm, "seed": seed, **{name: value for name, value in task.items() if name not in ignored}}
    if search != BASES:  # what these are trained on and from
        key["rates of the bases"] = [chosen(BASES, kind).rate for kind in ("base", "sibling")]
    length, batch, of = length_of(task), task["batch"], task["of"]

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        return batches_of(of, length, batch, seed + 1000 * (search != BASES))

    if rate is None:
        return trained(
            key, build, batches, steps=steps, rate=chosen(search, arm).rate, sources=[method, here()], **options
        )
    model = build()
    train(model, batches(), steps=steps, lr=rate, **options)
    return model.eval()


@cache
def smollm2() -> Any:
    return load_model(SMOLLM2)


def base_of(task: Task, seed: int, rate: float | None = None) -> Any:
    """The large model."""
    if task["of"] == SMOLLM2:
        return smollm2().model
    build = partial(language_model, task["width"], task["layers"], seed)
    return fitted(BASES, "base", task, seed, build, task["base_steps"], rate)


def sibling_of(task: Task, seed: int, rate: float | None = None) -> Any:
    """The small model of the same family, trained as long as the base."""
    width, layers = (
        max(1, round(task[size] * share)) for size, share in zip(("width", "layers"), SIBLING, strict=True)
    )
    return fitted(BASES, "sibling", task, seed, partial(language_model, width, layers, seed), task["base_steps"], rate)


def language_model(width: int, layers: int, seed: int) -> Any:
    return small_llama(width=width, layers=layers, heads=max(1, width // 16), seed=seed)


def auxiliary_of(kind: Kind, task: Task, seed: int) -> Any:
    """The auxiliary as its training begins."""
    found = pruned(base_of(task, seed), KEEP) if kind == "lp" else sibling_of(task, seed)
    return found.requires_grad_(True).train()


def search_of(task: Task) -> str:
    return OF_SMOLLM2 if task["of"] == SMOLLM2 else AUXILIARIES


def predictor_of(
    kind: Kind, task: Task, seed: int, rate: float | None = None, *, consistency: float = 1.0
) -> KVPredictor:
    """The base with its auxiliary and its maps, trained in the paper's way; `consistency` 0 leaves its third term out."""

    def build() -> Learner:
        base, small, settings = base_of(task, seed), auxiliary_of(kind, task, seed), {}
        if kind == "lp":
            layers = len(base.model.layers)
            settings["layer_map"] = pruned_map(kept_layers(layers, KEEP), layers)
        torch.manual_seed(seed)
        return Learner(KVPredictor.from_base(base, auxiliary=small, consistency=consistency, **settings))

    arm = f"predicted {kind}" if consistency else f"no consistency {kind}"
    found = fitted(search_of(task), arm, task, seed, build, task["steps"], rate, loss=whole_loss)
    model: KVPredictor = found.whole[0].eval()
    return model


def alone_of(kind: Kind, task: Task, seed: int, rate: float | None = None) -> Any:
    """The auxiliary as a language model of its own, trained on the tokens that the predictor was trained on."""
    build = partial(auxiliary_of, kind, task, seed)
    return fitted(search_of(task), f"alone {kind}", task, seed, build, task["steps"], rate)


def length_of(task: Task) -> int:
    return int(task["prompt"] + task["continuation"])


def batches_of(of: str, length: int, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless windows of training text, and their next tokens."""
    if of != SMOLLM2:
        yield from byte_batches(length, batch, seed=seed)
    number = 10**6 * seed
    while True:
        rows = torch.cat([long_prompt(smollm2().tokenizer, length + 1, seed=number + row) for row in range(batch)])
        number += batch
        yield rows[:, :-1], rows[:, 1:]


def windows_of(task: Task, part: Literal["heldout", "validation"]) -> tuple[Tensor, Tensor]:
    """Prompts and what follows them, of documents that nothing was trained on."""
    length, n = length_of(task), task["windows"]
    if task["of"] == SMOLLM2:
        make = heldout_windows if part == "heldout" else calibration_windows
        windows = make(smollm2().tokenizer, window=length, n=n if part == "heldout" else 8)
    else:
        inputs, targets = getattr(language, part)(length - 1, n)
        windows = torch.cat([inputs, targets[:, -1:]], 1)
    return windows[:, : task["prompt"]], windows[:, task["prompt"] :]


# -------------------------------------------------------------------------------------------------------------- judging


@torch.no_grad()
def after(model: Any, prompts: Tensor, texts: Tensor, places: Tensor | None = None, *, batch: int = 16) -> Tensor:
    """Nats a token of the texts (n, C) behind the prompts (n, P), a mean each (n,): the prompt is read in the model's own way, the text by
    what then decodes. `places` (n, m) are the tokens of the prompt that the model is shown; None: all."""
    found = []
    for start in range(0, len(prompts), batch):
        prompt, text = prompts[start : start + batch], texts[start : start + batch]
        shown = (
            torch.arange(prompt.shape[1]).expand(len(prompt), -1) if places is None else places[start : start + batch]
        )
        out = model(
            input_ids=prompt.gather(1, shown), position_ids=shown, use_cache=True, logits_to_keep=1
        )  # fmt: skip
        behind = torch.arange(prompt.shape[1], prompt.shape[1] + text.shape[1] - 1).expand(len(prompt), -1)
        more = model(input_ids=text[:, :-1], position_ids=behind, cache=out.cache, use_cache=True)
        logits = torch.cat([out.logits, more.logits], 1).double()
        found.append(F.cross_entropy(logits.transpose(1, 2), text, reduction="none").mean(1))
    return torch.cat(found)


def affordable(model: KVPredictor, tokens: int) -> int:
    """How many tokens of a prompt the base reads for the MACs of a prediction."""
    allowed = prompt_cost(model, tokens)
    fits = [n for n in range(2, tokens) if prompt_cost(model, n).base * allowed.reduction <= allowed.base]
    return max(fits, default=1)


def score(kind: Kind, seed: int, task: Task) -> dict[str, float]:
    """Nats a token on held-out text by every arm of one training."""
    torch.set_num_threads(1)
    base, model = base_of(task, seed), predictor_of(kind, task, seed)
    prompts, texts = windows_of(task, "heldout")
    tokens, n = task["prompt"], affordable(model, task["prompt"])
    generator = torch.Generator().manual_seed(seed)
    picked = torch.stack([torch.randperm(tokens - 1, generator=generator)[: n - 1].sort().values for _ in prompts])
    last = torch.full((len(prompts), 1), tokens - 1)
    places = {
        "deleted": last,
        "random tokens": torch.cat([picked, last], 1),
        "last tokens": torch.arange(tokens - n, tokens).expand(len(prompts), -1),
    }
    found = {name: after(base, prompts, texts, shown) for name, shown in places.items()}
    found |= {
        "base": after(base, prompts, texts),
        "predicted": after(model, prompts, texts),
        "alone": after(alone_of(kind, task, seed), prompts, texts),
    }
    if kind == "lp" and task["of"] != SMOLLM2:
        found["no consistency"] = after(predictor_of(kind, task, seed, consistency=0.0), prompts, texts)
    torch.manual_seed(seed)
    model.predictor.reset_parameters()
    found["random"] = after(model, prompts, texts)
    return {name: float(nll.mean()) for name, nll in found.items()} | {"tokens at equal cost": float(n)}


def scores(kind: Kind, task: Task) -> dict[str, list[float]]:
    """`score` under each seed, by arm."""
    runs = in_parallel(score, [(kind, seed, dict(task)) for seed in SEEDS])
    return {arm: [run[arm] for run in runs] for arm in runs[0]}


def floor_of(task: Task) -> tuple[float, str]:
    """What is trivial: a table of pairs of bytes, or how often a token occurs."""
    prompts, texts = windows_of(task, "heldout")
    if task["of"] != SMOLLM2:
        before = torch.cat([prompts[:, -1:], texts[:, :-1]], 1)
        return language.bigram_floor(before, texts), "a bigram table"
    tokens = long_prompt(smollm2().tokenizer, 100_000)[0]
    counts = torch.bincount(tokens, minlength=smollm2().model.config.vocab_size).double() + 1
    return float(-(counts / counts.sum()).log()[texts].mean()), "how often a token occurs"


def quality_of(found: Mapping[str, Sequence[float]]) -> Quality:
    """The prediction against the base, with Student's t over the seeds' differences."""
    mean = {arm: sum(values) / len(values) for arm, values in found.items()}
    lost = paired(found["predicted"], found["base"])
    others = ("random tokens", "last tokens", "no consistency")
    return Quality(
        mean["base"] + lost.median, mean["base"], mean["base"] + lost.low, mean["base"] + lost.high,
        controls={"deleted": mean["deleted"], "random": mean["random"], "rival": mean["alone"]}
        | {arm: mean[arm] for arm in others if arm in mean},
        rival="the auxiliary alone",
    )  # fmt: skip


def trained_arms(kind: Kind, task: Task, found: Mapping[str, Sequence[float]]) -> dict[str, Trained]:
    floor, name = floor_of(task)
    rates: dict[str, Rate] = {arm: chosen(search_of(task), f"{arm} {kind}") for arm in ("predicted", "alone")}
    if task["of"] != SMOLLM2:
        rates["base"] = chosen(BASES, "base")
    return {arm: Trained(found[arm], floor, name, rate.rate, rate.rates) for arm, rate in rates.items()}


# ---------------------------------------------------------------------------------------------------------------- rates

CHOICE = 100  # a seed of its own


@searched(BASES, arms=("base", "sibling"), grid=(3e-3, 1e-2, 3e-2))
def base_loss(arm: str, rate: float) -> float:
    """Nats a byte on text kept for the choice."""
    model = (base_of if arm == "base" else sibling_of)(TASK, CHOICE, rate)
    return float(after(model, *windows_of(TASK, "validation")).mean())


@searched(
    AUXILIARIES,
    arms=("predicted lp", "alone lp", "no consistency lp", "predicted c", "alone c"),
    grid=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
)
def auxiliary_loss(arm: str, rate: float) -> float:
    """The same behind prompts that were read by the arm, at the size and the number of steps of `small`."""
    return arm_loss(TASK, arm, rate)


@searched(OF_SMOLLM2, arms=("predicted lp", "alone lp"), grid=(2e-4, 6e-4, 2e-3))
def smollm2_loss(arm: str, rate: float) -> float:
    """The same of SmolLM2's auxiliary, after the few steps that a search can pay for."""
    return arm_loss({**REAL, "steps": 6, "prompt": 48, "continuation": 16}, arm, rate)


def arm_loss(task: Task, arm: str, rate: float) -> float:
    what, kind = arm.rsplit(" ", 1)
    make: dict[str, Callable[[], Any]] = {
        "predicted": lambda: predictor_of(kind, task, CHOICE, rate),  # type: ignore[arg-type]
        "no consistency": lambda: predictor_of(kind, task, CHOICE, rate, consistency=0.0),  # type: ignore[arg-type]
        "alone": lambda: alone_of(kind, task, CHOICE, rate),  # type: ignore[arg-type]
    }
    return float(after(make[what](), *windows_of(task, "validation")).mean())


# ----------------------------------------------------------------------------------------------------------------- time

FIRST_TOKEN = Operator(
    "the first token of a batch of prompts", free="the base model's own prefill in bfloat16 by torch's fused attention"
)


def timed(kind: Kind, model: str) -> tuple[KVPredictor, Any]:
    """A predictor of untrained maps in bfloat16, and a tokenizer (None: bytes). KVP-C's sibling has a quarter of the parameters."""
    torch.manual_seed(0)
    tokenizer = None
    if model == "bytes":
        base = small_llama(width=64, layers=4).eval()
    else:
        loaded = load_model(model, dtype=torch.bfloat16)
        base, tokenizer = loaded.model, loaded.tokenizer
    base = base.to(torch.bfloat16)
    if kind == "lp":
        return KVPredictor.from_base(base, auxiliary=KEEP), tokenizer
    width, layers, heads = (32, 2, 2) if model == "bytes" else (320, 15, 5)
    small = small_llama(width=width, layers=layers, heads=heads, vocab=base.config.vocab_size).eval()
    return KVPredictor.from_base(base, auxiliary=small.to(torch.bfloat16)), tokenizer


def prompts_of(tokenizer: Any, batch: int, tokens: int) -> Tensor:
    if tokenizer is None:
        return language.heldout(tokens, batch)[0]
    return torch.cat([long_prompt(tokenizer, tokens, seed=row) for row in range(batch)])


@torch.no_grad()
def first_token(model: Any, ids: Tensor) -> Tensor:
    """Logits of the first token, and a cache to go on from."""
    logits: Tensor = model(input_ids=ids, use_cache=True, logits_to_keep=1).logits
    return logits


def trial(kind: Kind, model: str, batch: int, tokens: int, task: Task) -> Trial:
    predictor, tokenizer = timed(kind, model)
    ids = prompts_of(tokenizer, batch, tokens)
    few = ids[:, : affordable(predictor, tokens)]
    found: dict[str, list[float]] = {}

    def judged() -> dict[str, list[float]]:
        if not found:
            found.update(scores(kind, task))
        return found

    cost = prompt_cost(predictor, tokens, batch)
    return Trial(
        baseline=lambda: first_token(predictor.base, ids),
        candidate=lambda: first_token(predictor, ids),
        arms={
            "the auxiliary alone": lambda: first_token(predictor.auxiliary, ids),
            "a shorter prompt of as many MACs": lambda: first_token(predictor.base, few),
        },
        quality=lambda: quality_of(judged()),
        trained=lambda: trained_arms(kind, task, judged()),
        details=lambda: {
            "macs": vars(cost),
            "reduction": {"macs": cost.reduction, "parameters": parameter_ratio(predictor)},
            "nats": judged(),
        },
    )


PAPER = {
    "model": "OpenELM 1.1B",
    "batch": 64,
    "tokens": 59,
    "machine": "M2 Pro CPU, 32 GB",
    "training": "70k steps of 2M tokens, learning rate 1.2e-3",
    "task": "TriviaQA, one shot",
}
DECLARED: dict[str, Any] = {
    "operator": FIRST_TOKEN,
    "paper": PAPER,
    "departures": {
        "model": "SmolLM2-135M, which comes with a package; its step on the last token weighs more beside its prefill",
        "batch": "16 at small scale: a batch of 64 takes a second on two cores",
        "machine": "whatever processor this is",
        "training": "as many steps of small models as fit into minutes, the same for the auxiliary alone; rates searched for each arm",
        "task": "nats a token of held-out code behind a prompt: models that can be trained here answer no questions",
    },
    "minutes": 240,
}


@experiment(
    "kv_prediction/ttft-c270",
    points={
        "smoke": [{"model": "bytes", "batch": 2, "tokens": 32, "task": SMOKE}],
        "small": [{"model": SMOLLM2, "batch": 16, "tokens": 59, "task": TASK}],
        "full": [{"model": SMOLLM2, "batch": 64, "tokens": 59, "task": LARGE}],
    },
    guard=Guard("nats a byte of the text behind a prompt", margin=0.07),
    refuted_if="the first token comes later than from the base model, the whole interval below 1x",
    **DECLARED,
)
def ttft_c270(model: str, batch: int, tokens: int, task: dict[str, Any]) -> Trial:
    """A smaller sibling reads the prompt: a quarter of the base's parameters, as OpenELM 270M of 1.1B.

    The margin, 7 % of the base's loss, is less than the paper loses of its multiple-choice average (9.3 %; of TriviaQA it loses half), and
    than a prompt left out costs here. The sibling is trained as long as the base before it becomes an auxiliary.
    """
    return trial("c", model, batch, tokens, task)


@experiment(
    "kv_prediction/ttft-lp050",
    points={
        "smoke": [{"model": "bytes", "batch": 2, "tokens": 32, "task": SMOKE}],
        "small": [{"model": SMOLLM2, "batch": 16, "tokens": 59, "task": TASK}],
        "full": [{"model": SMOLLM2, "batch": 64, "tokens": 59, "task": REAL}],
    },
    guard=Guard("nats a token of the text behind a prompt", margin=0.05),
    refuted_if="the first token comes later than from the base model, the whole interval below 1x",
    **DECLARED,
)
def ttft_lp050(model: str, batch: int, tokens: int, task: dict[str, Any]) -> Trial:
    """Every second layer of the base, a copy trained on, reads the prompt.

    The margin, 5 % of the base's loss, is about what the paper loses of its multiple-choice average (4.2 %; of TriviaQA it loses a
    quarter). "no consistency" leaves the difference of the caches out of the loss, which halves the paper's accuracy.
    """
    return trial("lp", model, batch, tokens, task)

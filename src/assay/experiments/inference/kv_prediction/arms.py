"""The arms of KV Prediction's experiment: small language models over words of real code, judged where the far past matters.

The large model ("base") is trained first. From there all arms go on for the same number of steps on the same text: the base itself
("base on", what the prediction is measured against), the predictor, its auxiliary as a language model of its own ("alone"), and a
predictor that is shown nothing and learns the best keys and values that are the same at every place ("constant"). The predictor's maps
begin at random, so that more steps might help it more than the others: a fact beside them is one that was trained for four times as many.
What costs as many MACs as the prediction without any training, tokens of the prompt left out, is tried on "base on".
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import assay.methods.inference.kv_prediction as method
from assay.experiments.core import Quality, Trained
from assay.experiments.inference.kv_prediction import far
from assay.experiments.inference.kv_prediction.far import Windows
from assay.experiments.inference.language import small_llama, trained
from assay.experiments.mixers.training import in_parallel
from assay.experiments.rates import chosen, searched
from assay.experiments.seeds import paired
from assay.methods.core.models.decoder import Parts
from assay.methods.inference.kv_prediction import (
    KVPredictor,
    Predictor,
    kept_layers,
    prompt_cost,
    pruned,
    pruned_map,
)

Kind = Literal["lp", "c"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Task = Mapping[str, Any]
KEEP = 0.5  # of the layers, in KVP-LP
LONGER = 4  # times the steps of all arms, which one more predictor is trained for
SEEDS = (0, 1, 2, 3)
CHOICE = 100  # the seed by which rates are chosen
BASES, LP, C, CONSTANT = (f"kv_prediction/{what}" for what in ("bases", "lp", "c", "constant"))

# a base of `width` and `layers`, trained for `base_steps`; every arm goes on for `steps`; judged on `windows` a seed
TASK: dict[str, int] = {
    "width": 64, "layers": 4, "base_steps": 350, "steps": 80, "batch": 24, "windows": 192, "apart": 20, "again": 16, "cue": 2, "fresh": 8,
}  # fmt: skip
SMOKE: dict[str, int] = {**TASK, "width": 32, "base_steps": 16, "steps": 8, "batch": 4, "windows": 16}
LARGE: dict[str, int] = {
    **TASK, "width": 256, "layers": 8, "base_steps": 6000, "steps": 2000, "batch": 32, "windows": 256,
    "apart": 80, "again": 64, "fresh": 32,
}  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- models


def language_model(width: int, layers: int, seed: int, **settings: Any) -> Any:
    """Heads of 16, embedding and head tied as in OpenELM and SmolLM2."""
    heads = max(1, width // 16)
    return small_llama(
        width=width, layers=layers, heads=heads, seed=seed, vocab=far.VOCABULARY, tie_word_embeddings=True, **settings
    )


def large(task: Task, seed: int) -> Any:
    return language_model(task["width"], task["layers"], seed)


def small(task: Task, seed: int) -> Any:
    """KVP-C's auxiliary: half the layers, 11/16 of the width; without embeddings the base has 4.4 times its parameters, as OpenELM 1.1B
    has of 270M."""
    width = task["width"] * 11 // 16
    return language_model(width, task["layers"] // 2, seed, intermediate_size=task["width"] * 7 // 4)


class Constant(Predictor):
    """Maps that are shown nothing: the same keys and values at every place, learnt."""

    def forward(self, raw: Sequence[Sequence[Tensor]]) -> list[tuple[Tensor, Tensor]]:
        return super().forward([[torch.zeros_like(part) for part in pair] for pair in raw])


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


# ------------------------------------------------------------------------------------------------------------- training


def fitted(arm: str, task: Task, seed: int, build: Callable[[], Any], rate: float | None, loss: Any = None) -> Any:
    """`build()` trained, at `rate` or else at the arm's own, and kept.

    Rates are searched at the size of `small`; wider models take them in inverse proportion to their width.
    """
    first = arm in ("base", "sibling")
    steps = task["base_steps"] if first else task["steps"]
    stream = partial(far.batches, task, seed + 1000 * (not first))
    ignored = ("windows", "steps") if first else ("windows",)
    key = {"arm": arm, "seed": seed, **{name: value for name, value in task.items() if name not in ignored}}
    if not first:  # what these are made of
        key["rates of the bases"] = [chosen(BASES, kind).rate for kind in ("base", "sibling")]
    if rate is None:
        rate = chosen(BASES if first else search_of(arm), arm).rate * min(1.0, TASK["width"] / task["width"])
    sources = [method, far, sys.modules[__name__]]
    return trained(key, build, stream, steps=steps, rate=rate, loss=loss, sources=sources)


def base_of(task: Task, seed: int, rate: float | None = None) -> Any:
    """The large model."""
    return fitted("base", task, seed, lambda: large(task, seed), rate)


def sibling_of(task: Task, seed: int, rate: float | None = None) -> Any:
    """The small model of the same family, trained as long as the base."""
    return fitted("sibling", task, seed, lambda: small(task, seed), rate)


def base_on(task: Task, seed: int, rate: float | None = None) -> Any:
    """The large model, trained on for as many steps as a predictor is."""
    return fitted("base on", task, seed, lambda: base_of(task, seed).requires_grad_(True), rate)


def auxiliary_of(kind: Kind, task: Task, seed: int) -> Any:
    """The auxiliary as its training begins."""
    found = pruned(base_of(task, seed), KEEP) if kind == "lp" else sibling_of(task, seed)
    return found.requires_grad_(True)


def alone_of(kind: Kind, task: Task, seed: int, rate: float | None = None) -> Any:
    """The auxiliary as a language model of its own, trained on the tokens that the predictor was trained on."""
    return fitted(f"alone {kind}", task, seed, lambda: auxiliary_of(kind, task, seed), rate)


def predictor_of(
    kind: Kind, task: Task, seed: int, rate: float | None = None, *, consistency: float = 1.0
) -> KVPredictor:
    """The base with its auxiliary and its maps, trained in the paper's way; `consistency` 0 leaves its third term out."""

    def build() -> Learner:
        base, auxiliary, layers = base_of(task, seed), auxiliary_of(kind, task, seed), task["layers"]
        settings: dict[str, Any] = {}
        if kind == "lp":
            settings["layer_map"] = pruned_map(kept_layers(layers, KEEP), layers)
        torch.manual_seed(seed)
        return Learner(KVPredictor.from_base(base, auxiliary=auxiliary, consistency=consistency, **settings))

    arm = f"predicted {kind}" if consistency else f"no consistency {kind}"
    return _model(fitted(arm, task, seed, build, rate, whole_loss))


def constant_of(task: Task, seed: int, rate: float | None = None) -> KVPredictor:
    """The base over keys and values that are the same whatever the prompt says, learnt by the predictor's loss: the method deleted."""

    def build() -> Learner:
        layers = [0] * task["layers"]
        model = KVPredictor.from_base(
            base_of(task, seed), auxiliary=language_model(16, 1, seed), layer_map=layers, auxiliary_weight=0.0
        )
        model.auxiliary.requires_grad_(False)
        widths = [[(site.keys, site.values) for site in sites] for sites in (model.auxiliary_sites, model.sites)]
        torch.manual_seed(seed)
        model.predictor = Constant(layers, *widths)
        return Learner(model)

    return _model(fitted("constant", task, seed, build, rate, whole_loss))


def _model(learner: Any) -> KVPredictor:
    found: KVPredictor = learner.whole[0]
    return found.eval()


# -------------------------------------------------------------------------------------------------------------- judging


@torch.no_grad()
def after(model: Any, judged: Windows, places: Tensor | None = None, *, batch: int = 64) -> Tensor:
    """Nats of each of the words behind the prompts, means over the windows (C,): the prompt is read in the model's own way, the words by
    what then decodes.

    `places` (n, m) are the tokens of the prompt that the model is shown, where they stand; None: all.
    """
    found, tokens = [], judged.prompts.shape[1]
    for start in range(0, len(judged), batch):
        part = judged.rows(slice(start, start + batch))
        shown = torch.arange(tokens).expand(len(part), -1) if places is None else places[start : start + batch]
        behind = torch.arange(tokens, tokens + part.texts.shape[1] - 1).expand(len(part), -1)
        there = torch.ones(len(part), shown.shape[1] + behind.shape[1], dtype=torch.long)
        out = model(
            input_ids=part.prompts.gather(1, shown), attention_mask=there[:, : shown.shape[1]], position_ids=shown,
            use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        more = model(
            input_ids=part.texts[:, :-1], attention_mask=there, position_ids=behind, cache=out.cache, use_cache=True
        )
        found.append(_nats(torch.cat([out.logits, more.logits], 1), part.texts))
    return torch.cat(found).mean(0)


def _nats(logits: Tensor, texts: Tensor) -> Tensor:
    return F.cross_entropy(logits.double().transpose(1, 2), texts, reduction="none")


@torch.no_grad()
def lazily(base: Any, judged: Windows, kept: int, full: int, *, batch: int = 64) -> Tensor:
    """The same when the layers from `full` on have only those `kept` tokens of the prompt that its last token, which is one of
    them, attends to most in the layer before: one step of what LazyLLM does layer by layer.

    The tokens left out are hidden by a mask, and do not come back while decoding.
    """
    found, tokens, parts = [], judged.prompts.shape[1], Parts(base)
    for start in range(0, len(judged), batch):
        part = judged.rows(slice(start, start + batch))
        seen = _attended(base, part.prompts, full - 1)
        seen[:, -1] = torch.inf
        ids = torch.cat([part.prompts, part.texts[:, :-1]], 1)
        causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()[None, None].expand(len(ids), 1, -1, -1)
        there = torch.zeros_like(ids, dtype=torch.bool).scatter(1, seen.topk(kept).indices, True)
        there[:, tokens:] = True
        alone = torch.eye(ids.shape[1], dtype=torch.bool)  # what nobody sees must see something
        run = parts.begin(ids, dict.fromkeys(parts.kinds, causal))
        few = dataclasses.replace(run, masks=dict.fromkeys(parts.kinds, causal & there[:, None, None] | alone))
        x = run.hidden
        for index in range(len(parts.layers)):
            x = parts.layer(index, x, run if index < full else few)
        found.append(_nats(parts.logits(parts.norm(x[:, tokens - 1 :])), part.texts))
    return torch.cat(found).mean(0)


def _attended(base: Any, prompts: Tensor, layer: int) -> Tensor:
    """How much the last token attends to each in a layer, the mean over heads: (n, P)."""
    usual = base.config._attn_implementation
    base.set_attn_implementation("eager")
    try:
        found: Tensor = base(input_ids=prompts, output_attentions=True, use_cache=False).attentions[layer]
    finally:
        base.set_attn_implementation(usual)
    return found[:, :, -1].mean(1)


def affordable(model: KVPredictor, tokens: int) -> int:
    """How many tokens of a prompt the base reads for the MACs of a prediction."""
    allowed = prompt_cost(model, tokens)
    fits = [n for n in range(2, tokens) if prompt_cost(model, n).base * allowed.reduction <= allowed.base]
    return max(fits, default=1)


def lazily_affordable(model: KVPredictor, tokens: int, full: int) -> int:
    """The same where the first `full` layers read all of it."""
    whole, layers = prompt_cost(model, tokens), len(model.parts.layers)
    head = model.parts.head.weight.numel()

    def cost(n: int) -> float:
        rest = (prompt_cost(model, n).base - head) * (layers - full) / layers
        return (whole.base - head) * full / layers + rest + head

    return max((n for n in range(2, tokens) if cost(n) * whole.reduction <= whole.base), default=1)


def shuffled(model: KVPredictor) -> KVPredictor:
    """The model with each layer given what was predicted for the one before, the first what was for the last."""
    own = model.predictor.forward

    def wrong(raw: Any) -> Any:
        found = own(raw)
        return [found[-1], *found[:-1]]

    model.predictor.forward = wrong  # type: ignore[method-assign]
    return model


def heldout(task: Task) -> Windows:
    """What all seeds are judged by."""
    return far.windows("heldout", task, len(SEEDS) * task["windows"])


def judged_by(seed: int, task: Task) -> Windows:
    """Held-out windows of one seed: other ones for each, spread over the same documents."""
    return heldout(task).rows(slice(SEEDS.index(seed), None, len(SEEDS)))


def score(kind: Kind, seed: int, task: Task) -> dict[str, dict[str, float]]:
    """Nats a word by every arm of one training, of all the words judged and of those that stood in the prompt; and what is read for as
    many MACs."""
    torch.set_num_threads(1)
    judged, model = judged_by(seed, task), predictor_of(kind, task, seed)
    base, on = base_of(task, seed), base_on(task, seed)
    tokens, full = judged.prompts.shape[1], max(1, task["layers"] // 4)
    n, few = affordable(model, tokens), lazily_affordable(model, tokens, full)
    generator = torch.Generator().manual_seed(seed)
    last = torch.full((len(judged), 1), tokens - 1)
    picked = [torch.randperm(tokens - 1, generator=generator)[: n - 1].sort().values for _ in judged.prompts]
    found = {
        "base on": after(on, judged),
        "base": after(base, judged),
        "predicted": after(model, judged),
        "alone": after(alone_of(kind, task, seed), judged),
        "constant": after(constant_of(task, seed), judged),
        "no prompt": after(on, judged, last),
        "last tokens": after(on, judged, torch.arange(tokens - n, tokens).expand(len(judged), -1)),
        "random tokens": after(on, judged, torch.cat([torch.stack(picked), last], 1)),
        "attended tokens": lazily(on, judged, few, full),
    }
    longer = {**task, "steps": LONGER * task["steps"]}
    found[f"predicted, {LONGER} times the steps"] = after(predictor_of(kind, longer, seed), judged)
    if kind == "lp":
        found["no consistency"] = after(predictor_of(kind, task, seed, consistency=0.0), judged)
    found["shuffled layers"] = after(shuffled(predictor_of(kind, task, seed)), judged)
    torch.manual_seed(seed)
    model.predictor.reset_parameters()
    found["random"] = after(model, judged)
    whole = {
        arm: {"all": float(nats.mean()), "copied": float(nats[: judged.copied].mean())} for arm, nats in found.items()
    }
    return whole | {"tokens for as many MACs": {"all the way": float(n), "beyond the first layers": float(few)}}


def scores(kind: Kind, task: Task) -> dict[str, dict[str, list[float]]]:
    """`score` under each seed, by arm and by what is counted."""
    runs = in_parallel(score, [(kind, seed, dict(task)) for seed in SEEDS])
    return {arm: {what: [run[arm][what] for run in runs] for what in runs[0][arm]} for arm in runs[0]}


def losses_of(found: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, Sequence[float]]:
    """Nats of all words judged, by arm and seed."""
    return {arm: values["all"] for arm, values in found.items() if "all" in values}


RIVALS = ("alone", "last tokens", "random tokens", "attended tokens")  # what costs no more than the prediction
UNKNOWING = ("constant", "no prompt")


def quality_of(found: Mapping[str, Sequence[float]]) -> Quality:
    """The prediction against the base trained on, with Student's t over the seeds' differences."""
    mean = {arm: sum(values) / len(values) for arm, values in found.items()}
    lost = paired(found["predicted"], found["base on"])
    others = (*RIVALS[1:], "no prompt", "no consistency", "shuffled layers")
    return Quality(
        mean["base on"] + lost.median, mean["base on"], mean["base on"] + lost.low, mean["base on"] + lost.high,
        controls={"deleted": mean["constant"], "random": mean["random"], "rival": mean["alone"]}
        | {arm: mean[arm] for arm in others if arm in mean},
        rival="the auxiliary alone",
    )  # fmt: skip


def certainly_lost(quality: Mapping[str, Any]) -> bool:
    """Whether the whole interval of a recorded quality lies beyond the guard's margin."""
    allowed: float = quality["baseline"] * (1 + quality["margin"])
    return bool(quality["low"] > allowed)


def refutes(record: Mapping[str, Any]) -> bool:
    """Whether the prediction knows no more of the prompt than keys and values learnt without it, or than the base without the prompt;
    or one of what costs no more keeps as much, where the prediction has not lost its quality anyway: by the whole intervals over seeds.
    """
    found = losses_of(record["details"]["nats"])
    knows_nothing = any(_as_good(found[arm], found["predicted"]) for arm in UNKNOWING)
    rival = any(gain[2] <= 0 for gain in over_rivals(found).values())
    return knows_nothing or (rival and not certainly_lost(record["quality"]))


def _as_good(theirs: Sequence[float], ours: Sequence[float]) -> bool:
    return bool(paired(theirs, ours).high <= 0)


def over_rivals(found: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """How many nats fewer the prediction has than what costs no more: the mean, and its interval over seeds."""
    gains = {name: paired(found[name], found["predicted"]) for name in RIVALS}
    return {name: [gain.median, gain.low, gain.high] for name, gain in gains.items()}


def trained_arms(kind: Kind, task: Task, found: Mapping[str, Sequence[float]]) -> dict[str, Trained]:
    """The arms that have to know something, beside a table of pairs of words."""
    floor = far.bigram_floor(heldout(task))
    arms = {"base": (BASES, "base"), "base on": (LP, "base on")}
    arms |= {arm: (search_of(f"{arm} {kind}"), f"{arm} {kind}") for arm in ("predicted", "alone")}
    rates = {arm: chosen(*where) for arm, where in arms.items()}
    return {
        arm: Trained(found[arm], floor, "a table of pairs of words", rate.rate, rate.rates)
        for arm, rate in rates.items()
    }


# ---------------------------------------------------------------------------------------------------------------- rates


RATES = (2e-3, 8e-3, 3.2e-2, 1.28e-1, 5.12e-1)  # of all arms that go on from a base


def search_of(arm: str) -> str:
    if arm == "constant":
        return CONSTANT
    return C if arm.endswith(" c") else LP


def chosen_on(model: Any) -> float:
    """Nats a word on text kept for the choice."""
    return float(after(model, far.windows("calibration", TASK, 2 * TASK["windows"])).mean())


@searched(BASES, arms=("base", "sibling"), grid=(3e-3, 1e-2, 3e-2, 1e-1))
def base_loss(arm: str, rate: float) -> float:
    """Of a model trained from scratch."""
    return chosen_on((base_of if arm == "base" else sibling_of)(TASK, CHOICE, rate))


@searched(LP, arms=("base on", "predicted lp", "alone lp", "no consistency lp"), grid=RATES)
def lp_loss(arm: str, rate: float) -> float:
    """Of what the base becomes."""
    if arm == "base on":
        return chosen_on(base_on(TASK, CHOICE, rate))
    if arm == "alone lp":
        return chosen_on(alone_of("lp", TASK, CHOICE, rate))
    return chosen_on(predictor_of("lp", TASK, CHOICE, rate, consistency=float(arm == "predicted lp")))


@searched(CONSTANT, arms=("constant",), grid=(1.28e-1, 5.12e-1, 2.048, 8.192))
def constant_loss(arm: str, rate: float) -> float:
    """Of keys and values that are parameters themselves, and take other rates than weights."""
    return chosen_on(constant_of(TASK, CHOICE, rate))


@searched(C, arms=("predicted c", "alone c"), grid=RATES)
def c_loss(arm: str, rate: float) -> float:
    """Of what the base and its sibling become."""
    return chosen_on((predictor_of if arm == "predicted c" else alone_of)("c", TASK, CHOICE, rate))

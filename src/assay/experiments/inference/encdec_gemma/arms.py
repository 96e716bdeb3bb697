"""The models that the claims about the encoder-decoder compare: what they are made of, how they are trained, at what rates, and scored.

Byte models stand for Gemma 2 2B and 9B, of about the same ratio. They are pretrained on code from left to right, then adapted on prefixes
and suffixes of code, then tuned to a task that stands for instructions: the prompt is code with a hole, the answer the bytes that
stood in it. Arms that are compared get equal FLOPs for adapting and tuning, as `flops` counts them (a large encoder against a small one:
equal steps); every stage of every arm has a learning rate of its own, and each of three seeds draws the pretrained model, what is new, and
the windows of each stage.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.experiments.core import Trained
from assay.experiments.inference import language
from assay.experiments.mixers.training import in_parallel
from assay.experiments.rates import chosen, searched
from assay.experiments.seeds import paired
from assay.methods.inference import encdec_gemma as method
from assay.methods.inference.encdec_gemma import cross_parameters, decoder_to_encdec, flops, freeze_but_cross
from assay.workloads.sequences import byte_batches, text_bytes

LENGTH, ANSWER, BATCH = 32, 8, 32  # bytes of a window, of a hole; windows a step
HOLE, START = 0, 1  # bytes that text does not have
PROMPT = LENGTH - ANSWER + 1
SEEDS = (0, 1, 2)
CHOICE_SEED = 100
HELD_OUT = 2048  # windows

SMALL: dict[str, int] = {
    "width": 48, "layers": 2, "large_width": 80, "large_layers": 3, "pretrain": 300, "adapt": 100, "tune": 60,
}  # fmt: skip
FULL = {
    "width": 128, "layers": 4, "large_width": 224, "large_layers": 6, "pretrain": 4000, "adapt": 4000, "tune": 2000,
}  # fmt: skip
SMOKE = {"width": 32, "layers": 1, "large_width": 48, "large_layers": 2, "pretrain": 8, "adapt": 4, "tune": 4}


# --------------------------------------------------------------------------------------------------------------------- the arms


@dataclass(frozen=True)
class Arm:
    """A model that is compared: what reads the prompt, with which weights, what it is trained on before the task, at whose FLOPs."""

    encoder: Literal["", "small", "large"] = ""  # "" for a decoder-only model
    weights: Literal["pretrained", "new encoder", "new"] = "pretrained"
    reads: Literal["bidirectional", "causal"] = "bidirectional"  # the prompt
    cross: Literal["self", "random"] = "self"
    trained_on: Literal["", "text", "prefixes", "task"] = "prefixes"
    cuts: int = 1  # of each window, one step after the other
    budget: Literal["adapted", "large encoder"] = "adapted"


ARMS = {
    "decoder-only": Arm(reads="causal", trained_on=""),
    "tuned longer": Arm(reads="causal", trained_on="task"),
    "pretrained further": Arm(reads="causal", trained_on="text"),
    "prefix LM": Arm(),
    "adapted": Arm("small"),
    "causal encoder": Arm("small", reads="causal"),
    "from scratch": Arm("small", "new", cross="random"),
    "random cross-attention": Arm("small", cross="random"),
    "four cuts of a text": Arm("small", cuts=4),
    "tuned without adapting": Arm("small", trained_on="task"),
    "large encoder": Arm("large", cross="random"),
    "large causal encoder": Arm("large", reads="causal", cross="random"),
    "large encoder of new weights": Arm("large", "new encoder", cross="random"),
    "prefix LM, longer": Arm(budget="large encoder"),
    "tuned longest": Arm(reads="causal", trained_on="task", budget="large encoder"),
}
NEW = tuple(name for name, arm in ARMS.items() if arm.weights != "pretrained")
GAIN_ARMS = tuple(name for name, arm in ARMS.items() if arm.encoder != "large" and arm.budget == "adapted")
LARGE_ARMS = ("adapted", *(name for name in ARMS if name not in GAIN_ARMS))
LATENCY_ARMS = ("decoder-only", "prefix LM", *LARGE_ARMS)

Setting = Mapping[str, int]


def fresh(size: str, setting: Setting, seed: int) -> Any:
    """A decoder-only model of new weights, "small" or "large"."""
    prefix = "large_" if size == "large" else ""
    width, layers = setting[f"{prefix}width"], setting[f"{prefix}layers"]
    return language.small_llama(width=width, layers=layers, heads=width // 16, seed=seed)


def made(arm: Arm, small: Any, large: Any) -> Any:
    """The model of an arm, of a small and (where it has one) a large decoder-only model; not trained yet."""
    if not arm.encoder:
        return small
    reader = large if arm.encoder == "large" else small
    model = decoder_to_encdec(reader, small, arm.cross, encoder_attention=arm.reads, decoder_start_token_id=START)
    if arm.cross == "random":
        draw_cross(model)
    return model


@torch.no_grad()
def draw_cross(model: nn.Module) -> None:
    """Draw cross-attention as `language.small_llama` draws attention: by each matrix's own fan-in, small where it adds to the stream."""
    given: Any = model
    for name, weight in cross_parameters(model).items():
        if weight.ndim == 2:
            adds = (2 * len(given.decoder.cross)) ** -0.5 if "o_proj" in name else 1.0
            weight.normal_(0, adds * weight.shape[1] ** -0.5)


def step_flops(name: str, setting: Setting) -> dict[str, float]:
    """FLOPs of the forward passes of one step of an arm for a window: of the stage before the task (over all cuts), and of the task."""
    return _step_flops(name, tuple(setting.items()))


@cache
def _step_flops(name: str, items: tuple[tuple[str, int], ...]) -> dict[str, float]:
    arm, setting = ARMS[name], dict(items)
    model = made(arm, fresh("small", setting, 0), fresh("large", setting, 0) if arm.encoder == "large" else None)

    def taken(prompt: int, answer: int) -> int:
        return flops(model, prompt, answer, cached=False).total

    if arm.trained_on == "text":  # every byte is asked for, the first as well
        adapt = float(taken(1, LENGTH - 1) + flops(model, 1, 1, cached=False).head)
    else:
        adapt = mean([taken(cut, LENGTH - cut) for cut in CUTS])
    return {"adapt": adapt, "tune": taken(PROMPT, ANSWER)}


def steps_of(name: str, setting: Setting) -> dict[str, int]:
    """An arm's steps before the task and on it: of adapted models as `setting` has them, else as many as take equal FLOPs."""
    arm = ARMS[name]
    if arm.encoder and arm.trained_on != "task":
        return {stage: setting[stage] for stage in ("adapt", "tune")}
    own, spent = step_flops(name, setting), step_flops(arm.budget, setting)
    adapt, tune = (setting[stage] * spent[stage] for stage in ("adapt", "tune"))
    if arm.trained_on == "task":
        return {"adapt": 0, "tune": round((adapt + tune) / own["tune"])}
    return {"adapt": round(adapt / own["adapt"]) if arm.trained_on else 0, "tune": round(tune / own["tune"])}


# ---------------------------------------------------------------------------------------------------------------------- the data

CUTS = range(ANSWER, LENGTH - ANSWER)
STAGES = ("pretrain", "warm-up", "adapt", "tune")


def data_seed(stage: str, seed: int) -> int:
    """Each stage of each seed draws its windows anew."""
    return 10 * seed + STAGES.index(stage)


def prefixes(seed: int, cuts: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of (prefix, suffix) of code, cut at one random place a batch; each text `cuts` times, one after the other."""
    generator = torch.Generator().manual_seed(seed + len(STAGES))
    for windows, _ in byte_batches(LENGTH, BATCH, seed=seed):
        for _ in range(cuts):
            cut = CUTS[int(torch.randint(len(CUTS), (1,), generator=generator))]
            yield windows[:, :cut], windows[:, cut:]


def holes(windows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Windows (n, LENGTH) with a hole each: prompts (n, PROMPT), where one byte marks it, and answers (n, ANSWER)."""
    starts = torch.randint(ANSWER, LENGTH - 2 * ANSWER + 1, (len(windows),), generator=generator)
    places = torch.arange(LENGTH)[None] - starts[:, None]
    inside = (places >= 0) & (places < ANSWER)
    answers = windows[inside].view(-1, ANSWER)
    marked = windows.masked_fill(places == 0, HOLE)
    return marked[~inside | (places == 0)].view(-1, PROMPT), answers


def hole_batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed + len(STAGES))
    for windows, _ in byte_batches(LENGTH, BATCH, seed=seed):
        yield holes(windows, generator)


# ------------------------------------------------------------------------------------------------------------------- the training


def answer_logits(model: nn.Module, prompts: Tensor, answers: Tensor, *, both_ways: bool = False) -> Tensor:
    """What a model predicts at each byte of the answers, shown those before it: (n, bytes, 256).

    `both_ways` lets a decoder-only model read prompts as a prefix LM does: every byte of a prompt sees all of it.
    """
    given: Any = model
    shown = torch.cat([torch.full_like(answers[:, :1], START), answers[:, :-1]], 1)
    if given.config.is_encoder_decoder:
        logits: Tensor = given(input_ids=prompts, decoder_input_ids=shown).logits
        return logits
    ids = torch.cat([prompts, shown], 1)
    mask = None
    if both_ways:
        mask = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        mask[..., : prompts.shape[1]] = True
    found: Tensor = given(input_ids=ids, attention_mask=mask, logits_to_keep=answers.shape[1]).logits
    return found


def answer_loss(model: nn.Module, prompts: Tensor, answers: Tensor, *, both_ways: bool = False) -> Tensor:
    logits = answer_logits(model, prompts, answers, both_ways=both_ways)
    return F.cross_entropy(logits.flatten(0, 1), answers.flatten())


def stage(
    name: str, key: dict[str, Any], model: Any, seed: int, steps: int, rate: float, arm: Arm, on: str = "prefixes"
) -> Any:
    """`model`, trained for one stage on "text", "prefixes" or the "task"; in eval mode, and kept on disk."""
    data = data_seed(name, seed)
    batches: Callable[[], Iterator[tuple[Tensor, Tensor]]]
    loss: Any = partial(answer_loss, both_ways=not arm.encoder and arm.reads == "bidirectional")
    if on == "text":
        batches, loss = partial(byte_batches, LENGTH, BATCH, seed=data), None
    else:
        batches = partial(hole_batches, data) if on == "task" else partial(prefixes, data, arm.cuts)
    return language.trained(
        {**key, "stage": name, "seed": seed, "length": LENGTH, "answer": ANSWER, "batch": BATCH},
        lambda: copy.deepcopy(model),
        batches,
        steps=steps,
        rate=rate,
        loss=loss,
        sources=[method, sys.modules[__name__]],
    )


def source(size: str, seed: int, setting: Setting, rate: float | None = None) -> Any:
    """A pretrained decoder-only model, "small" or "large". Without a `rate`, here and below, with the one chosen."""
    rate = chosen(PRETRAINING, size).rate if rate is None else rate
    key = {"source": size, "setting": dict(setting)}
    return stage("pretrain", key, fresh(size, setting, seed), seed, setting["pretrain"], rate, Arm(), "text")


def begun(arm: Arm, seed: int, setting: Setting) -> Any:
    """The model of an arm before it is adapted or trained further."""
    small = fresh("small", setting, seed) if arm.weights == "new" else source("small", seed, setting)
    large = None
    if arm.encoder == "large":
        large = fresh("large", setting, seed) if arm.weights == "new encoder" else source("large", seed, setting)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return made(arm, small, large)


def rates_before(name: str, rate: float | None) -> list[float]:
    """The rates of an arm's pretrained models and of its adaptation: what was trained afterwards depends on them."""
    arm = ARMS[name]
    found = [chosen(PRETRAINING, size).rate for size in ("small", "large")]
    if arm.trained_on in ("text", "prefixes"):
        found.append(chosen(search_of("adapting", name), name).rate if rate is None else rate)
    return found


def adapted(name: str, seed: int, setting: Setting, rate: float | None = None) -> Any:
    """An arm's model when the task begins. New cross-attention of a pretrained decoder is first trained alone, an eighth of the steps."""
    arm, steps = ARMS[name], steps_of(name, setting)["adapt"]
    model = begun(arm, seed, setting)
    if not steps:
        return model
    rates = rates_before(name, rate)
    key = {"arm": name, "setting": dict(setting), "rates": rates}
    if arm.cross == "random" and arm.weights != "new":
        first = max(1, steps // 8)
        freeze_but_cross(model)
        model = stage("warm-up", key, model, seed, first, rates[-1], arm).requires_grad_(True)
        steps -= first
    return stage("adapt", key, model, seed, steps, rates[-1], arm, arm.trained_on)


def rates_of(name: str) -> list[float]:
    """All of an arm's rates, stage by stage; the last is that of the task."""
    return [*rates_before(name, None), chosen(search_of("answers", name), name).rate]


def tuned(name: str, seed: int, setting: Setting, rate: float | None = None) -> Any:
    """An arm's model, tuned to the task."""
    rate = chosen(search_of("answers", name), name).rate if rate is None else rate
    key = {"arm": name, "setting": dict(setting), "rates": rates_before(name, None)}
    steps = steps_of(name, setting)["tune"]
    return stage("tune", key, adapted(name, seed, setting), seed, steps, rate, ARMS[name], "task")


# ------------------------------------------------------------------------------------------------------------------- the searches

PRETRAINING = "encdec_gemma/pretraining"
GRID, HIGH = (3e-4, 1e-3, 3e-3, 1e-2), (1e-3, 3e-3, 1e-2, 3e-2)
LONG = {"adapting": ("pretrained further", "prefix LM, longer"), "answers": ("tuned longest",)}
FRESH = {"adapting": NEW, "answers": ("from scratch",)}


def search_of(stage: str, name: str) -> str:
    """The search that chose an arm's rate, "adapting" or "answers"; new weights, more pretraining and long training want higher ones."""
    kind = "-longer" if name in LONG[stage] else "-new" if name in FRESH[stage] else ""
    return f"encdec_gemma/{stage}{kind}"


def usual(stage: str, *what: str) -> tuple[str, ...]:
    """The other arms, of those that are trained on `what` before the task."""
    return tuple(
        name for name, arm in ARMS.items() if arm.trained_on in what and search_of(stage, name).endswith(stage)
    )


@searched(PRETRAINING, arms=("small", "large"), grid=HIGH)
def pretrained_loss(size: str, rate: float) -> float:
    """Nats a byte of code, on documents kept for the choice, after the steps of `small`; so also below."""
    return float(language.nll(source(size, CHOICE_SEED, SMALL, rate), *language.validation(LENGTH, 1024)).mean())


@searched("encdec_gemma/adapting-longer", arms=LONG["adapting"], grid=HIGH)
@searched("encdec_gemma/adapting-new", arms=FRESH["adapting"], grid=HIGH)
@searched("encdec_gemma/adapting", arms=usual("adapting", "prefixes"), grid=GRID)
def adapted_loss(name: str, rate: float) -> float:
    """Nats a byte of the second halves of windows whose first halves are read; of code, where an arm is pretrained further."""
    model = adapted(name, CHOICE_SEED, SMALL, rate)
    inputs, targets = language.validation(LENGTH, 1024)
    if ARMS[name].trained_on == "text":
        return float(language.nll(model, inputs, targets).mean())
    return answered(name, model, inputs[:, : LENGTH // 2], inputs[:, LENGTH // 2 :])["nll"]


@searched("encdec_gemma/answers-longer", arms=LONG["answers"], grid=HIGH)
@searched("encdec_gemma/answers-new", arms=FRESH["answers"], grid=HIGH)
@searched("encdec_gemma/answers", arms=usual("answers", "", "text", "prefixes", "task"), grid=GRID)
def tuned_loss(name: str, rate: float) -> float:
    """Nats a byte of answers, each arm adapted with the rate chosen before."""
    prompts, answers = holes(language.validation(LENGTH, 1024)[0], torch.Generator().manual_seed(1))
    return answered(name, tuned(name, CHOICE_SEED, SMALL, rate), prompts, answers)["nll"]


# --------------------------------------------------------------------------------------------------------------------- the scores


@torch.no_grad()
def answered(name: str, model: nn.Module, prompts: Tensor, answers: Tensor) -> dict[str, float]:
    """Of the answers' bytes: the likelihood given to them (geometric mean), the share predicted right, and nats a byte."""
    both_ways = not ARMS[name].encoder and ARMS[name].reads == "bidirectional"
    right, nats = 0.0, 0.0
    for some, wanted in zip(prompts.split(256), answers.split(256), strict=True):
        logits = answer_logits(model, some, wanted, both_ways=both_ways)
        right += float((logits.argmax(-1) == wanted).sum())
        nats += float(F.cross_entropy(logits.double().flatten(0, 1), wanted.flatten(), reduction="sum"))
    nll = nats / answers.numel()
    return {"likelihood": math.exp(-nll), "accuracy": right / answers.numel(), "nll": nll}


def score(name: str, seed: int, setting: Setting) -> dict[str, float]:
    """One training of an arm on held-out documents; of encoder-decoders also when they read another prompt, or nothing."""
    torch.set_num_threads(1)
    model = tuned(name, seed, setting)
    prompts, answers = holes(language.heldout(LENGTH, HELD_OUT)[0], torch.Generator().manual_seed(0))
    found = answered(name, model, prompts, answers)
    if ARMS[name].encoder:
        found["another prompt"] = answered(name, model, prompts.roll(1, 0), answers)["likelihood"]
        for weight_name, weight in cross_parameters(model).items():
            if "o_proj" in weight_name:
                weight.data.zero_()
        found["nothing read"] = answered(name, model, prompts, answers)["likelihood"]
    return found


def prepared(size: str, seed: int, setting: Setting) -> None:
    """Pretrain a model, so that arms that run side by side find it."""
    source(size, seed, setting)


Scores = dict[str, list[dict[str, float]]]


def scores_of(names: Sequence[str], setting: Setting) -> Scores:
    """`score` of each arm under each of `SEEDS`."""
    sizes = ["small", *(["large"] if any(ARMS[name].encoder == "large" for name in names) else [])]
    in_parallel(prepared, [(size, seed, dict(setting)) for size in reversed(sizes) for seed in SEEDS])
    runs = [(name, seed, dict(setting)) for name in names for seed in SEEDS]
    found: Scores = {name: [] for name in names}
    for (name, _, _), one in zip(runs, in_parallel(score, runs), strict=True):
        found[name].append(one)
    return found


def of(scores: Scores, name: str, what: str = "likelihood") -> list[float]:
    return [one[what] for one in scores[name]]


def gains(scores: Scores, name: str, over: str, what: str = "likelihood") -> list[float]:
    """Per cent more likelihood than another arm gives the answers, seed by seed."""
    return [100 * (a / b - 1) for a, b in zip(of(scores, name, what), of(scores, over), strict=True)]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def answer_floor(answers: Tensor) -> float:
    """Nats a byte of answers without their prompts: how often a byte occurs, then how often it follows the one before it."""
    counts = torch.bincount(text_bytes("code", "prompts"), minlength=256).double() + 1
    first = float((counts.sum() / counts).log()[answers[:, 0]].mean())
    return (first + (ANSWER - 1) * language.bigram_floor(answers[:, :-1], answers[:, 1:])) / ANSWER


def as_trained(scores: Scores) -> dict[str, Trained]:
    """Arms with their rates on the task, against tables of bytes and of pairs of bytes of the training text.

    Those of `NEW` weights are not among them: how near the floor they stay is for them to show.
    """
    floor = answer_floor(holes(language.heldout(LENGTH, HELD_OUT)[0], torch.Generator().manual_seed(0))[1])
    return {
        name: Trained(
            of(scores, name, "nll"),
            floor,
            "a bigram table of answers",
            chosen(search_of("answers", name), name).rate,
            chosen(search_of("answers", name), name).rates,
        )
        for name in scores
        if name not in NEW
    }


def difference(scores: Scores, name: str, over: str) -> dict[str, float]:
    """Per cent more likelihood than another arm, the mean over seeds and its interval by Student's t."""
    found = paired(gains(scores, name, over), [0.0] * len(SEEDS))
    return {"mean": found.median, "low": found.low, "high": found.high}

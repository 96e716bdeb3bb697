"""Encoder-Decoder Gemma: what adapting a decoder-only model gains over training it further, and how fast a small decoder answers.

Byte models stand for Gemma 2 2B and 9B, of about the same ratio. They are pretrained on code from left to right, then adapted on prefixes
and suffixes of code, then tuned to a task that stands for instructions: the prompt is code with a hole, the answer the bytes that
stood in it. What is adapted and what is trained further get equal FLOPs, as `flops` counts them; every arm has its own learning rate
and three seeds.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.experiments.core import Figure, Guard, Operator, Quality, Trained, Trial, experiment
from assay.experiments.inference import language
from assay.experiments.mixers.training import in_parallel
from assay.experiments.rates import chosen, searched
from assay.experiments.seeds import paired
from assay.measure.clock import compare
from assay.methods.builtin import decode_loop
from assay.methods.inference import encdec_gemma as method
from assay.methods.inference.encdec_gemma import (
    cross_parameters,
    decoder_to_encdec,
    fewer_layers,
    flops,
    freeze_but_cross,
)
from assay.methods.transform import TuneContext
from assay.workloads.sequences import byte_batches, text_bytes

LENGTH, ANSWER, BATCH = 32, 4, 32  # bytes of a window, of a hole; windows a step
HOLE, START = 0, 1  # bytes that text does not have
PROMPT = LENGTH - ANSWER + 1
SEEDS = (0, 1, 2)
SOURCE_RATE = 5e-3  # of the pretraining, which all arms but one share
CHOICE_SEED = 100
HELD_OUT = 2048  # windows

SMALL: dict[str, int] = {
    "width": 64, "layers": 2, "large_width": 96, "large_layers": 4, "pretrain": 600, "adapt": 200, "tune": 600,
}  # fmt: skip
SEARCHED = {**SMALL, "adapt": 100, "tune": 200}
FULL = {
    "width": 128, "layers": 4, "large_width": 192, "large_layers": 8, "pretrain": 4000, "adapt": 2000, "tune": 2000,
}  # fmt: skip
SMOKE = {"width": 32, "layers": 1, "large_width": 48, "large_layers": 2, "pretrain": 10, "adapt": 5, "tune": 10}

SEARCH = "encdec_gemma/answers"
ARMS = ("decoder-only", "more pretraining", "adapted", "causal encoder", "from scratch", "large encoder")
DECODERS = ("decoder-only", "more pretraining")


# ---------------------------------------------------------------------------------------------------------------------- the data


def prefixes(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of (prefix, suffix) of code, cut at one random place a batch."""
    generator = torch.Generator().manual_seed(seed)
    for windows, _ in byte_batches(LENGTH, BATCH, seed=seed):
        cut = int(torch.randint(ANSWER, LENGTH - ANSWER, (1,), generator=generator))
        yield windows[:, :cut], windows[:, cut:]


def holes(windows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Windows (n, LENGTH) with a hole each: prompts (n, PROMPT), where one byte marks it, and answers (n, ANSWER)."""
    starts = torch.randint(ANSWER, LENGTH - 2 * ANSWER, (len(windows),), generator=generator)
    places = torch.arange(LENGTH)[None] - starts[:, None]
    inside = (places >= 0) & (places < ANSWER)
    answers = windows[inside].view(-1, ANSWER)
    marked = windows.masked_fill(places == 0, HOLE)
    return marked[~inside | (places == 0)].view(-1, PROMPT), answers


def hole_batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for windows, _ in byte_batches(LENGTH, BATCH, seed=seed):
        yield holes(windows, generator)


# --------------------------------------------------------------------------------------------------------------------- the arms


def answer_logits(model: nn.Module, prompts: Tensor, answers: Tensor) -> Tensor:
    """What a model predicts at each byte of the answers, shown those before it: (n, bytes, 256)."""
    given: Any = model
    shown = torch.cat([torch.full_like(answers[:, :1], START), answers[:, :-1]], 1)
    if given.config.is_encoder_decoder:
        logits: Tensor = given(input_ids=prompts, decoder_input_ids=shown).logits
    else:
        logits = given(input_ids=torch.cat([prompts, shown], 1), logits_to_keep=answers.shape[1]).logits
    return logits


def answer_loss(model: nn.Module, prompts: Tensor, answers: Tensor) -> Tensor:
    return F.cross_entropy(answer_logits(model, prompts, answers).flatten(0, 1), answers.flatten())


def source(size: str, setting: Mapping[str, int]) -> Any:
    """The pretrained decoder-only model, "small" or "large"."""
    prefix = "large_" if size == "large" else ""
    width, layers = setting[f"{prefix}width"], setting[f"{prefix}layers"]
    return language.trained(
        {"source": [width, layers], "length": LENGTH, "batch": BATCH},
        lambda: language.small_llama(width=width, layers=layers, heads=width // 16, seed=0),
        lambda: byte_batches(LENGTH, BATCH, seed=10**6),
        steps=setting["pretrain"],
        rate=SOURCE_RATE,
        sources=[method, sys.modules[__name__]],
    )


def begun(arm: str, seed: int, setting: Mapping[str, int]) -> Any:
    """The model of an arm before it is adapted or trained further."""
    if arm == "from scratch":
        new = language.small_llama(
            width=setting["width"], layers=setting["layers"], heads=setting["width"] // 16, seed=seed
        )
        torch.manual_seed(seed)
        return decoder_to_encdec(new, cross_init="random", decoder_start_token_id=START)
    small = source("small", setting)
    if arm in DECODERS:
        return small
    if arm == "large encoder":
        torch.manual_seed(seed)
        large = source("large", setting)
        return decoder_to_encdec(large, small, "random", decoder_start_token_id=START)
    reads = "causal" if arm == "causal encoder" else "bidirectional"
    return decoder_to_encdec(small, encoder_attention=reads, decoder_start_token_id=START)


def equal_steps(setting: Mapping[str, int]) -> dict[str, int]:
    """The decoder-only model's steps that take as many FLOPs as the adapted one's: on text, and on the task."""
    small = language.small_llama(width=setting["width"], layers=setting["layers"], heads=setting["width"] // 16)
    adapted = decoder_to_encdec(small, decoder_start_token_id=START)
    half = LENGTH // 2
    text = flops(adapted, half, half, cached=False).total / flops(small, 1, LENGTH - 1, cached=False).total
    task = flops(adapted, PROMPT, ANSWER, cached=False).total / flops(small, PROMPT, ANSWER, cached=False).total
    return {"adapt": round(setting["adapt"] * text), "tune": round(setting["tune"] * task)}


def trained_arm(arm: str, rate: float, seed: int, setting: Mapping[str, int]) -> Any:
    """An arm's model, adapted (or pretrained further) and tuned to the task, with one learning rate."""
    key = {"arm": arm, "seed": seed, "setting": dict(setting)}
    options: dict[str, Any] = {"rate": rate, "sources": [method, sys.modules[__name__]]}
    steps = equal_steps(setting) if arm in DECODERS else dict(setting)

    def stage(name: str, build: Callable[[], nn.Module], count: int) -> Any:
        if name == "text":
            return language.trained(
                {**key, "stage": name}, build, lambda: byte_batches(LENGTH, BATCH, seed=10 * seed + 1), steps=count, **options
            )  # fmt: skip
        data = hole_batches if name == "task" else prefixes
        return language.trained(
            {**key, "stage": name}, build, lambda: data(10 * seed + 2), steps=count, loss=answer_loss, **options
        )

    model = begun(arm, seed, setting)
    if arm == "large encoder":  # first cross-attention alone, for an eighth of the steps
        freeze_but_cross(model)
        model = stage("warm-up", lambda: model, max(1, steps["adapt"] // 8)).requires_grad_(True)
    if arm == "more pretraining":
        model = stage("text", lambda: copy.deepcopy(model), steps["adapt"])
    elif arm != "decoder-only":
        model = stage("prefixes", lambda: copy.deepcopy(model), steps["adapt"])
    return stage("task", lambda: copy.deepcopy(model), steps["tune"])


@torch.no_grad()
def answered(model: nn.Module, prompts: Tensor, answers: Tensor) -> dict[str, float]:
    """Of the answers' bytes: the likelihood given to them (geometric mean), the share predicted right, and nats a byte."""
    right, nats = 0.0, 0.0
    for some, wanted in zip(prompts.split(64), answers.split(64), strict=True):
        logits = answer_logits(model, some, wanted)
        right += float((logits.argmax(-1) == wanted).sum())
        nats += float(F.cross_entropy(logits.double().flatten(0, 1), wanted.flatten(), reduction="sum"))
    nll = nats / answers.numel()
    return {"likelihood": math.exp(-nll), "accuracy": right / answers.numel(), "nll": nll}


@searched(SEARCH, arms=ARMS, grid=(1.5e-4, 5e-4, 1.5e-3, 4e-3, 1.2e-2))
def chosen_loss(arm: str, rate: float) -> float:
    """Nats a byte of answers, on documents kept for the choice, after fewer steps than `small` has, the same for all arms."""
    windows = language.validation(LENGTH, 1024)[0]
    prompts, answers = holes(windows, torch.Generator().manual_seed(1))
    return answered(trained_arm(arm, rate, CHOICE_SEED, SEARCHED), prompts, answers)["nll"]


def score(arm: str, seed: int, setting: Mapping[str, int]) -> dict[str, float]:
    """One training of an arm on held-out documents; of encoder-decoders also with what they read left out, and with another prompt's."""
    torch.set_num_threads(1)
    model = trained_arm(arm, chosen(SEARCH, arm).rate, seed, setting)
    prompts, answers = holes(language.heldout(LENGTH, HELD_OUT)[0], torch.Generator().manual_seed(0))
    found = answered(model, prompts, answers)
    if arm not in DECODERS:
        found["random"] = answered(model, prompts.roll(1, 0), answers)["likelihood"]
        for name, parameter in cross_parameters(model).items():
            if "o_proj" in name:
                parameter.data.zero_()
        found["deleted"] = answered(model, prompts, answers)["likelihood"]
    return found


def prepared(size: str, setting: Mapping[str, int]) -> None:
    """Pretrain a source, so that arms that run side by side find it."""
    source(size, setting)


Scores = dict[str, list[dict[str, float]]]


def scores_of(arms: tuple[str, ...], setting: Mapping[str, int]) -> Scores:
    """`score` of each arm under each of `SEEDS`."""
    sizes = ["small", *(["large"] if "large encoder" in arms else [])]
    in_parallel(prepared, [(size, dict(setting)) for size in sizes])
    runs = [(arm, seed, dict(setting)) for arm in arms for seed in SEEDS]
    found: Scores = {arm: [] for arm in arms}
    for (arm, _, _), one in zip(runs, in_parallel(score, runs), strict=True):
        found[arm].append(one)
    return found


def of(scores: Scores, arm: str, name: str = "likelihood") -> list[float]:
    return [one[name] for one in scores[arm]]


def gains(scores: Scores, arm: str, over: str, name: str = "likelihood") -> list[float]:
    """Per cent more likelihood than another arm gives the answers, seed by seed."""
    return [100 * (a / b - 1) for a, b in zip(of(scores, arm, name), of(scores, over), strict=True)]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def answer_floor(answers: Tensor) -> float:
    """Nats a byte of answers without their prompts: how often a byte occurs, then how often it follows the one before it."""
    counts = torch.bincount(text_bytes("code", "prompts"), minlength=256).double() + 1
    first = float((counts.sum() / counts).log()[answers[:, 0]].mean())
    return (first + (ANSWER - 1) * language.bigram_floor(answers[:, :-1], answers[:, 1:])) / ANSWER


def as_trained(scores: Scores) -> dict[str, Trained]:
    """The arms that decide, each with its rate, against tables of bytes and of pairs of bytes, counted on the training text.

    Not "from scratch": that it stays near the floor for as long is what adapting is compared with.
    """
    floor = answer_floor(holes(language.heldout(LENGTH, HELD_OUT)[0], torch.Generator().manual_seed(0))[1])
    return {
        arm: Trained(
            of(scores, arm, "nll"),
            floor,
            "a bigram table of answers",
            chosen(SEARCH, arm).rate,
            chosen(SEARCH, arm).rates,
        )
        for arm in scores
        if arm != "from scratch"
    }


def quality_figure(scores: Scores, arm: str, over: str, arms: tuple[str, ...], details: dict[str, Any]) -> Figure:
    """How many per cent more likelihood `arm` gives the answers than `over`; beside it the controls, and further arms."""
    gain = paired(gains(scores, arm, over), [0.0] * len(SEEDS))
    further = mean(gains(scores, "more pretraining", over))
    return Figure(
        gain.median,
        "%",
        low=gain.low,
        high=gain.high,
        baseline=0.0,
        free=further,
        controls={
            "deleted": mean(gains(scores, arm, over, "deleted")),
            "random": mean(gains(scores, arm, over, "random")),
            "rival": further,
        },
        arms={name: mean(gains(scores, name, over)) for name in arms},
        trained=as_trained(scores),
        details={"scores": scores, **details},
    )


# ------------------------------------------------------------------------------------------------------------------- the claims

ADAPTED = Operator(
    "a language model for prompts and answers",
    free="the decoder-only model, pretrained further with as many FLOPs and tuned alike",
)
MEASURED = "likelihood (geometric mean) that small byte models give the bytes of answers: the code that stood in a hole"
PAPER = {
    "width": 2304, "layers": 26, "large_width": 3584, "large_layers": 42,
    "pretrain": "Gemma 2", "adapt": "2T tokens", "tune": "instructions and RLHF",
}  # fmt: skip
DEPARTURES = {
    "width": "a 2B model cannot be trained here; byte models of a hundred thousand to a million parameters stand for it",
    "layers": "as the width",
    "large_width": "the large model has about 4.5 times the small one's parameters, as 9B has over 2B",
    "large_layers": "as the width",
    "pretrain": "hundreds or thousands of steps of code",
    "adapt": "fewer steps than the pretraining has; the paper's 2T tokens are as many as the pretraining had",
    "tune": "a task made of real text stands for instructions; nothing is tuned by preferences",
}


@experiment(
    "encdec_gemma/instruction-tuned-gain",
    points={"smoke": [SMOKE], "small": [SMALL], "full": [FULL]},
    operator=ADAPTED,
    paper=PAPER,
    departures=DEPARTURES,
    measured_here=MEASURED,
    refuted_if="the adapted model gives answers less likelihood than the decoder-only model after the same tuning, the whole interval",
    minutes=120,
)  # fmt: skip
def instruction_tuned_gain(
    width: int, layers: int, large_width: int, large_layers: int, pretrain: int, adapt: int, tune: int
) -> Figure:
    """Per cent more likelihood of answers after tuning: the adapted small-small model over the small decoder-only one (2B-2B over 2B).

    The decoder-only baseline is tuned with as many FLOPs; `free` was also pretrained further with as many as the adaptation took. Deleted:
    cross-attention of the trained model left out; random: the encoder reads another prompt. Arms: the encoder left causal, which is the
    paper's ablation, and the same shape from scratch. The interval is Student's t over the seeds' paired gains.
    """
    setting = {
        "width": width, "layers": layers, "large_width": large_width, "large_layers": large_layers,
        "pretrain": pretrain, "adapt": adapt, "tune": tune,
    }  # fmt: skip
    scores = scores_of(ARMS[:5], setting)
    return quality_figure(
        scores,
        "adapted",
        "decoder-only",
        ("causal encoder", "from scratch"),
        {"equal_steps": equal_steps(setting), "bidirectional_over_causal": gains(scores, "adapted", "causal encoder")},
    )


@experiment(
    "encdec_gemma/9b-2b-gain",
    points={"smoke": [SMOKE], "small": [SMALL], "full": [FULL]},
    operator=ADAPTED,
    paper=PAPER,
    departures=DEPARTURES,
    measured_here=MEASURED,
    refuted_if="with the large encoder answers get less likelihood than with the small one, the whole interval over seeds",
    minutes=240,
)  # fmt: skip
def large_encoder_gain(
    width: int, layers: int, large_width: int, large_layers: int, pretrain: int, adapt: int, tune: int
) -> Figure:
    """Per cent more likelihood of answers with a large encoder and a small decoder than with two small stacks, after as many steps.

    Its cross-attention is drawn at random and trained alone first. Controls as for the other claim; the interval likewise. What the large
    encoder costs in time is the claim about latency.
    """
    setting = {
        "width": width, "layers": layers, "large_width": large_width, "large_layers": large_layers,
        "pretrain": pretrain, "adapt": adapt, "tune": tune,
    }  # fmt: skip
    scores = scores_of(("more pretraining", "adapted", "large encoder"), setting)
    return quality_figure(scores, "large encoder", "adapted", (), {})


# ---------------------------------------------------------------------------------------------------------------------- latency

ANSWERS = Operator(
    "an answer to a long prompt",
    free="the decoder-only model of the decoder's size in bfloat16, by transformers",
    exact="the same in float32 by assay's compiled decode loop",
)
TIMED_SMALL = {"decoder_width": 256, "decoder_layers": 8, "encoder_width": 384, "encoder_layers": 16, "vocab": 8192}
TIMED_FULL = {"decoder_width": 640, "decoder_layers": 16, "encoder_width": 1024, "encoder_layers": 28, "vocab": 32768}
TIMED_SMOKE = {"decoder_width": 64, "decoder_layers": 2, "encoder_width": 128, "encoder_layers": 4, "vocab": 256}


def request(model: nn.Module, ids: Tensor, tokens: int) -> Callable[[], Tensor]:
    """A whole request: read the prompt, answer with `tokens` tokens, greedily."""
    given: Any = model
    return lambda: given.generate(
        input_ids=ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0
    )


def decoding(model: nn.Module, ids: Tensor, tokens: int) -> Callable[[], None]:
    """`tokens` steps behind a prompt that was read: the decoder alone."""
    given: Any = model
    made = given.config.is_encoder_decoder
    start = torch.full((len(ids), 1), START)
    with torch.no_grad():
        more = {"encoder_outputs": given.get_encoder()(ids)} if made else {}
        cache = (
            given(decoder_input_ids=start, use_cache=True, **more).cache if made else given(ids, use_cache=True).cache
        )
    name = "decoder_input_ids" if made else "input_ids"

    @torch.no_grad()
    def run() -> None:
        for _ in range(tokens):
            given(**{name: start}, cache=cache, logits_to_keep=1, **more)
        cache.crop(-tokens)

    return run


@experiment(
    "encdec_gemma/9b-2b-latency",
    points={
        "smoke": [{"prompt": 32, "answer": 4, **TIMED_SMOKE, "setting": SMOKE}],
        "small": [{"prompt": 512, "answer": 32, **TIMED_SMALL, "setting": SMALL}],
        "full": [{"prompt": m, "answer": n, **TIMED_FULL, "setting": FULL} for m, n in ((512, 32), (128, 256))],
    },
    decides={"full": {"prompt": 512, "answer": 32, **TIMED_FULL, "setting": FULL}},
    operator=ANSWERS,
    paper={
        "prompt": "benchmark questions", "answer": "benchmark answers", "decoder_width": 2304, "decoder_layers": 26, "encoder_width": 3584,
        "encoder_layers": 42, "vocab": 256_000, "setting": "Gemma 2",
    },
    departures={
        "prompt": "the lengths are not in the sources read; 512 tokens, as long as a question with examples",
        "answer": "32 tokens: a short answer, where reading weighs most",
        "decoder_width": "smaller, so that rounds of six arms take a minute; the encoder has about 4.5 times its weights, as 9B over 2B",
        "decoder_layers": "as the width",
        "encoder_width": "as the width",
        "encoder_layers": "as the width",
        "vocab": "as large beside the small layers as 256,000 tokens are beside 2B",
        "setting": "the quality is that of small byte models",
    },
    guard=Guard("likelihood of the bytes of answers (geometric mean), small byte models", 0.02, higher_is_better=True),
    tolerance=0.25,
    refuted_if="an answer by the large encoder and the small decoder takes over 1.25 times as long as by the small decoder-only model, "
    "the whole interval",
    minutes=240,
)  # fmt: skip
def latency(
    prompt: int,
    answer: int,
    decoder_width: int,
    decoder_layers: int,
    encoder_width: int,
    encoder_layers: int,
    vocab: int,
    setting: dict[str, int],
) -> Trial:
    """A request to a large encoder with a small decoder, against the small decoder-only model: prompt and answer, batch 1, float32.

    Weights are random, since they change no time. "About" is within a quarter, our choice: a user would not choose by less. The quality
    is the byte models' of the other claims: against the small decoder-only model, of whose likelihood 2 % may be lost. Arms: a small
    encoder, and the large decoder-only model, whose latency the paper leaves behind. In the details, how much faster the large model
    decodes with half the decoder's depth (every second layer) than as a whole decoder-only model, once the prompt was read.
    """
    make = language.small_llama
    small = make(width=decoder_width, layers=decoder_layers, heads=decoder_width // 64, vocab=vocab).eval()
    large = make(width=encoder_width, layers=encoder_layers, heads=encoder_width // 64, vocab=vocab).eval()
    mixed = decoder_to_encdec(large, small, "random", decoder_start_token_id=START)
    balanced = decoder_to_encdec(small, decoder_start_token_id=START)
    half = decoder_to_encdec(large, fewer_layers(large), decoder_start_token_id=START)
    exactly = {"weights": "fp32", "cache": "float32"}
    looped = decode_loop.transform.apply(copy.deepcopy(small), exactly, TuneContext("decode", prompt, answer))
    ids = torch.randint(2, vocab, (1, prompt), generator=torch.Generator().manual_seed(0))

    def quality() -> Quality:
        scores = scores_of(("decoder-only", "adapted", "large encoder"), setting)
        found.update(scores)
        base = mean(of(scores, "decoder-only"))
        lost = paired(of(scores, "large encoder"), of(scores, "decoder-only"))
        controls = {
            "deleted": mean(of(scores, "large encoder", "deleted")),
            "random": mean(of(scores, "large encoder", "random")),
            "rival": mean(of(scores, "adapted")),
        }
        return Quality(base + lost.median, base, base + lost.low, base + lost.high, controls, "a small encoder")

    def details() -> dict[str, Any]:
        halved = compare(decoding(half, ids, 8), decoding(large, ids, 8), pairs=6, max_seconds=10)
        return {
            "half_depth_decoding_speedup": {
                "median": halved.speedup.median, "low": halved.speedup.low, "high": halved.speedup.high,
            },
            "flops": {name: vars(flops(model, prompt, answer)) for name, model in {"small": small, "large-small": mixed}.items()},
            "scores": dict(found),
        }  # fmt: skip

    found: Scores = {}
    return Trial(
        baseline=request(small, ids, answer),
        candidate=request(mixed, ids, answer),
        free=request(copy.deepcopy(small).bfloat16(), ids, answer),
        exact=request(looped, ids, answer),
        arms={"small encoder": request(balanced, ids, answer), "large decoder-only": request(large, ids, answer)},
        quality=quality,
        trained=lambda: as_trained(found),
        details=details,
    )

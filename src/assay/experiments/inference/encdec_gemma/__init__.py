"""Encoder-Decoder Gemma: what adapting a decoder-only model gains over training it further, and how fast a small decoder answers.

The arms are in `arms`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from assay.experiments.core import Figure, Guard, Operator, Quality, Trial, experiment
from assay.experiments.inference import language
from assay.experiments.inference.encdec_gemma.arms import (
    ANSWER,
    ARMS,
    FULL,
    GAIN_ARMS,
    LARGE_ARMS,
    LATENCY_ARMS,
    LENGTH,
    SMALL,
    SMOKE,
    START,
    Scores,
    Setting,
    as_trained,
    difference,
    gains,
    holes,
    mean,
    of,
    rates_of,
    scores_of,
    steps_of,
    tuned,
)
from assay.experiments.seeds import paired
from assay.measure.clock import compare
from assay.methods.builtin import decode_loop
from assay.methods.inference.encdec_gemma import decoder_to_encdec, fewer_layers, flops
from assay.methods.transform import TuneContext


def best_alone(scores: Scores) -> str:
    """The best arm without an encoder: what is free."""
    return max((name for name in scores if not ARMS[name].encoder), key=lambda name: mean(of(scores, name)))


def quality_figure(
    scores: Scores, name: str, over: str, setting: Setting, *, rival: str, deleted: str, random: str
) -> Figure:
    """How many per cent more likelihood an arm gives the answers than another; beside it the arms that are its controls, and all others.

    What is free is the best decoder-only model among the arms.
    """
    gain = difference(scores, name, over)
    arms = {other: mean(gains(scores, other, over)) for other in scores if other not in (name, over)}
    best = best_alone({other: scores[other] for other in arms})
    return Figure(
        gain["mean"],
        "%",
        low=gain["low"],
        high=gain["high"],
        baseline=0.0,
        free=arms[best],
        controls={"deleted": arms[deleted], "random": arms[random], "rival": arms[rival]},
        arms=arms | {what: mean(gains(scores, name, over, what)) for what in ("another prompt", "nothing read")},
        trained=as_trained(scores),
        details={
            "scores": scores,
            "free": best,
            "steps": {other: steps_of(other, setting) for other in scores},
            "rates": {other: rates_of(other) for other in scores},
            "gain_over": {other: difference(scores, name, other) for other in scores if other != name},
        },
    )


# ------------------------------------------------------------------------------------------------------------------- the claims

ADAPTED = Operator(
    "a language model for prompts and answers",
    free="the best decoder-only model of as many FLOPs: with a prefix-LM mask, which reads prompts both ways, or pretrained further, or "
    "tuned longer",
)
MEASURED = "likelihood (geometric mean) that small byte models give the bytes of answers: the code that stood in a hole"
PAPER = {
    "width": 2304, "layers": 26, "large_width": 3584, "large_layers": 42,
    "pretrain": "Gemma 2", "adapt": "2T tokens", "tune": "instructions and RLHF",
    "objective": "PrefixLM with distillation", "task": "benchmarks of instruction-tuned models", "rates": "the paper's own",
}  # fmt: skip
DEPARTURES = {
    "width": "a 2B model cannot be trained here; byte models of a hundred thousand to four million parameters stand for it",
    "layers": "as the width",
    "large_width": "the large model has about 4.5 times the small one's parameters, as 9B has over 2B",
    "large_layers": "as the width",
    "pretrain": "hundreds or thousands of steps of code",
    "adapt": "as many windows as the pretraining had, as the paper's 2T tokens are, or (at small) a part of them",
    "tune": "a task made of real text stands for instructions; nothing is tuned by preferences",
    "objective": "no arm is distilled: prefixes and suffixes with cross-entropy alone, where the paper's best models for answers also "
    "learn the decoder-only model's distribution",
    "task": "holes in code, filled in, stand for benchmarks",
    "rates": "searched at the size and the steps of small, and used at full too",
}


@experiment(
    "encdec_gemma/instruction-tuned-gain",
    points={"smoke": [SMOKE], "small": [SMALL], "full": [FULL]},
    operator=ADAPTED,
    paper=PAPER,
    departures=DEPARTURES,
    measured_here=MEASURED,
    refuted_if="the adapted model gives answers less likelihood than the decoder-only model after the same tuning, the whole interval",
    minutes=240,
)  # fmt: skip
def instruction_tuned_gain(
    width: int, layers: int, large_width: int, large_layers: int, pretrain: int, adapt: int, tune: int
) -> Figure:
    """Per cent more likelihood of answers after tuning: the adapted small-small model over the small decoder-only one (2B-2B over 2B).

    The decoder-only baseline is tuned with as many FLOPs. Three decoder-only models spend the adaptation's FLOPs too: with a prefix-LM
    mask, which needs no second stack; pretrained further, which is the paper's own rival; tuned longer. The best of them is `free`.
    Deleted is what the paper adds to reading: the encoder left causal, adapted and tuned alike. Random is what it starts from: the same
    shape of new weights. Arms: cross-attention drawn at random, prefixes of a quarter of the text cut four times, all FLOPs spent on the
    task, and the trained model when it reads another prompt, or nothing. The interval is Student's t over the seeds' paired gains.

    What to expect of `small`: in the searches of rates (one seed, other documents) adapting gains over the decoder-only model and over
    new weights, but the causal encoder, the decoder-only model tuned longer, and the encoder-decoder that was tuned without being adapted
    do better than the adapted model.
    """
    setting = {
        "width": width, "layers": layers, "large_width": large_width, "large_layers": large_layers,
        "pretrain": pretrain, "adapt": adapt, "tune": tune,
    }  # fmt: skip
    return quality_figure(
        scores_of(GAIN_ARMS, setting),
        "adapted",
        "decoder-only",
        setting,
        rival="pretrained further",
        deleted="causal encoder",
        random="from scratch",
    )


@experiment(
    "encdec_gemma/9b-2b-gain",
    points={"smoke": [SMOKE], "small": [SMALL], "full": [FULL]},
    operator=ADAPTED,
    paper=PAPER,
    departures=DEPARTURES,
    measured_here=MEASURED,
    refuted_if="with the large encoder answers get less likelihood than with the small one, the whole interval over seeds",
    minutes=480,
)  # fmt: skip
def large_encoder_gain(
    width: int, layers: int, large_width: int, large_layers: int, pretrain: int, adapt: int, tune: int
) -> Figure:
    """Per cent more likelihood of answers with a large encoder and a small decoder than with two small stacks, after as many steps.

    Its cross-attention is drawn at random and trained alone first, in steps that are taken off the adaptation's. `free` is the better
    of two small decoder-only models that are trained with as many FLOPs as the large encoder takes: with a prefix-LM mask (the rival),
    and tuned longer. Deleted: the large encoder left causal. Random: a large encoder of new weights. The interval is as for the other
    claim. What the large encoder costs in time is the claim about latency.

    What to expect of `small`: in the searches of rates the large encoder is ahead of the small one, behind what is free and the large
    encoder left causal, and no better than one of new weights.
    """
    setting = {
        "width": width, "layers": layers, "large_width": large_width, "large_layers": large_layers,
        "pretrain": pretrain, "adapt": adapt, "tune": tune,
    }  # fmt: skip
    return quality_figure(
        scores_of(LARGE_ARMS, setting),
        "large encoder",
        "adapted",
        setting,
        rival="prefix LM, longer",
        deleted="large causal encoder",
        random="large encoder of new weights",
    )


# ---------------------------------------------------------------------------------------------------------------------- latency

ANSWERS = Operator(
    "an answer to a question",
    free="the decoder-only model of the decoder's size in bfloat16, in a plain loop",
    exact="the same in float32 by assay's compiled decode loop",
)
TIMED_SMALL = {"decoder_width": 384, "decoder_layers": 8, "encoder_width": 576, "encoder_layers": 16, "vocab": 8192}
TIMED_FULL = {"decoder_width": 640, "decoder_layers": 16, "encoder_width": 1024, "encoder_layers": 28, "vocab": 32768}
TIMED_SMOKE = {"decoder_width": 64, "decoder_layers": 2, "encoder_width": 128, "encoder_layers": 4, "vocab": 256}


def request(model: nn.Module, ids: Tensor, tokens: int) -> Callable[[], Tensor]:
    """A whole request: read the prompts (n, m), answer greedily with `tokens` tokens (n, tokens), in a loop that does nothing else."""
    given: Any = model

    @torch.inference_mode()
    def run() -> Tensor:
        found: list[Tensor] = []
        if given.config.is_encoder_decoder:
            states, cache = given.get_encoder()(ids), given.new_cache()
            token = torch.full((len(ids), 1), START)
            while len(found) < tokens:
                out = given(decoder_input_ids=token, encoder_outputs=states, cache=cache, logits_to_keep=1)
                token = out.logits[:, -1].argmax(-1, keepdim=True)
                found.append(token)
            return torch.cat(found, 1)
        out = given(ids, use_cache=True, logits_to_keep=1)
        while True:
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            found.append(token)
            if len(found) == tokens:
                return torch.cat(found, 1)
            out = given(token, cache=out.cache, use_cache=True, logits_to_keep=1)

    return run


def compiled_request(model: nn.Module, ids: Tensor, tokens: int) -> Callable[[], Tensor]:
    """The same by assay's compiled decode loop, in float32."""
    exactly = {"weights": "fp32", "cache": "float32"}
    looped: Any = decode_loop.transform.apply(
        copy.deepcopy(model), exactly, TuneContext("decode", ids.shape[1], tokens)
    )
    how = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    return lambda: looped.generate(input_ids=ids, **how)[:, ids.shape[1] :]


def decoding(model: nn.Module, ids: Tensor, tokens: int) -> Callable[[], None]:
    """`tokens` steps behind a prompt that was read: the decoder alone."""
    given: Any = model
    both = given.config.is_encoder_decoder
    start = torch.full((len(ids), 1), START)
    with torch.no_grad():
        more = {"encoder_outputs": given.get_encoder()(ids)} if both else {}
        cache = (
            given(decoder_input_ids=start, use_cache=True, **more).cache if both else given(ids, use_cache=True).cache
        )
    name = "decoder_input_ids" if both else "input_ids"

    @torch.no_grad()
    def run() -> None:
        for _ in range(tokens):
            given(**{name: start}, cache=cache, logits_to_keep=1, **more)
        cache.crop(-tokens)

    return run


def speedup(baseline: Callable[[], Any], candidate: Callable[[], Any]) -> dict[str, float]:
    """How much faster `candidate` is, in a few pairs: a fact beside the figure that is judged."""
    found = compare(baseline, candidate, pairs=6, max_seconds=4).speedup
    return {"median": found.median, "low": found.low, "high": found.high}


@experiment(
    "encdec_gemma/9b-2b-latency",
    points={
        "smoke": [{"prompt": 32, "answer": 4, **TIMED_SMOKE, "setting": SMOKE}],
        "small": [{"prompt": 96, "answer": 96, **TIMED_SMALL, "setting": SMALL}],
        "full": [{"prompt": m, "answer": n, **TIMED_FULL, "setting": FULL} for m, n in ((96, 128), (512, 32))],
    },
    decides={"full": {"prompt": 96, "answer": 128, **TIMED_FULL, "setting": FULL}},
    operator=ANSWERS,
    paper={
        "prompt": "questions of GSM8K", "answer": "reasoned answers", "decoder_width": 2304, "decoder_layers": 26, "encoder_width": 3584,
        "encoder_layers": 42, "vocab": 256_000, "setting": "Gemma 2",
    },
    departures={
        "prompt": "the lengths are not in the sources read; 96 tokens, about a question of GSM8K in a chat's frame",
        "answer": "about a short reasoned answer; at full also a long prompt with a short answer, where reading weighs most",
        "decoder_width": "smaller, so that rounds of seven arms take seconds; the encoder has about 4.5 times its weights, as 9B over 2B",
        "decoder_layers": "as the width",
        "encoder_width": "as the width",
        "encoder_layers": "as the width",
        "vocab": "as large beside the small layers as 256,000 tokens are beside 2B",
        "setting": "the quality is that of small byte models",
    },
    guard=Guard("likelihood of the bytes of answers (geometric mean), small byte models", 0.02, higher_is_better=True),
    tolerance=0.25,
    measured_here="times are of untrained models, too large to be trained here; the likelihood is that of byte models of the same "
    "ratio of sizes, whose own times stand in the details",
    refuted_if="an answer by the large encoder and the small decoder takes over 1.25 times as long as by the small decoder-only model, "
    "the whole interval",
    minutes=480,
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
    is the byte models' of the other claims: against the best of the small decoder-only models, which all take as long to answer, of whose
    likelihood 2 % may be lost. Two of them were trained with as many FLOPs as the large encoder takes: tuned for longest, and with a
    prefix-LM mask, the rival. Deleted is the large encoder left causal, random a large encoder of new weights, each adapted and tuned
    alike. Beside them stand the small encoder, and the large one when it reads another prompt, or nothing: answers that are as likely then
    are no answers, which is a fault of the training and says nothing of the paper's. Timed arms: a small encoder, and the large
    decoder-only model, whose latency the paper leaves behind. In the details: how much faster the large model decodes with half the
    decoder's depth (every second layer) than as a whole decoder-only model, once the prompt was read; and how much faster the
    byte models whose quality is judged answer with the large encoder than without (below 1: slower), at the lengths of their task.

    What to expect of `small`: in the searches of rates the decoder-only model that is tuned with as many FLOPs is 7 % ahead of the large
    encoder, so that an equal latency does not pay either.
    """
    make = language.small_llama
    small = make(width=decoder_width, layers=decoder_layers, heads=decoder_width // 64, vocab=vocab).eval()
    large = make(width=encoder_width, layers=encoder_layers, heads=encoder_width // 64, vocab=vocab).eval()
    mixed = decoder_to_encdec(large, small, "random", decoder_start_token_id=START)
    balanced = decoder_to_encdec(small, decoder_start_token_id=START)
    ids = torch.randint(2, vocab, (1, prompt), generator=torch.Generator().manual_seed(0))

    @cache
    def scored() -> Scores:
        return scores_of(LATENCY_ARMS, setting)

    def quality() -> Quality:
        scores = scored()
        best = best_alone(scores)
        base = mean(of(scores, best))
        lost = paired(of(scores, "large encoder"), of(scores, best))
        controls = {
            "deleted": mean(of(scores, "large causal encoder")),
            "random": mean(of(scores, "large encoder of new weights")),
            "rival": mean(of(scores, "prefix LM, longer")),
            "another prompt": mean(of(scores, "large encoder", "another prompt")),
            "nothing read": mean(of(scores, "large encoder", "nothing read")),
            "a small encoder": mean(of(scores, "adapted")),
            **{name: mean(of(scores, name)) for name in ("decoder-only", "prefix LM", "tuned longest")},
        }
        return Quality(
            base + lost.median,
            base,
            base + lost.low,
            base + lost.high,
            controls,
            "the small model as a prefix LM, trained with as many FLOPs",
        )

    def details() -> dict[str, Any]:
        half = decoder_to_encdec(large, fewer_layers(large), decoder_start_token_id=START)
        prompts, _ = holes(language.heldout(LENGTH, 16)[0], torch.Generator().manual_seed(0))
        judged = [request(tuned(name, 0, setting), prompts[:1], ANSWER) for name in ("decoder-only", "large encoder")]
        return {
            "half_depth_decoding_speedup": speedup(decoding(large, ids, 8), decoding(half, ids, 8)),
            "judged_models_speedup": speedup(*judged),
            "flops": {name: vars(flops(model, prompt, answer)) for name, model in {"small": small, "large-small": mixed}.items()},
            "scores": scored(),
            "quality_is_over": best_alone(scored()),
        }  # fmt: skip

    return Trial(
        baseline=request(small, ids, answer),
        candidate=request(mixed, ids, answer),
        free=request(copy.deepcopy(small).bfloat16(), ids, answer),
        exact=compiled_request(small, ids, answer),
        arms={"small encoder": request(balanced, ids, answer), "large decoder-only": request(large, ids, answer)},
        quality=quality,
        trained=lambda: as_trained(scored()),
        details=details,
    )

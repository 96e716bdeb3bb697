"""SinkLoRA: how much of full attention's perplexity group-wise fine-tuning recovers, and what decoding with half a cache gains and loses.

Tuning: byte models of the Llama family, trained here at a short length, are extended to eight times that length by interpolated
positions and LoRA. The arms differ only in the attention of training mode, and all are judged with full attention. The short
length is one that training exhausts: only then does a model fail beyond it and have something to gain.

Decoding: SmolLM2-135M in bfloat16 after a long prompt of real text. What is thrown away shows where something that stood there is
asked for: text goes on about as well whatever half is kept, so the quality is the loss on a pass key. Two full caches that lose
nothing stand beside half a cache: transformers' static one, and this project's, which is kept in place and never copied.
"""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from assay.experiments.attention.common import off_grid
from assay.experiments.core import Figure, Guard, Operator, Quality, Trained, Trial, experiment
from assay.experiments.mixers.training import evaluate, train
from assay.experiments.rates import chosen, searched
from assay.measure.clock import compare_many
from assay.measure.stats import student_interval
from assay.methods.attention.sinklora import (
    EvictionCache,
    interpolate_positions,
    lora_config,
    s2_attention,
    scores_computed,
    sf_attention,
    use_eviction,
    use_sf_attention,
)
from assay.methods.core.attention.integration import by_sdpa, causal_mask, set_attention
from assay.workloads.models import load_model
from assay.workloads.sequences import byte_batches, byte_windows, text_bytes
from assay.workloads.text import Part, long_prompt

FACTOR = 8  # new length / trained length
GROUPS = 4  # of the new length
SINKS = 4
# settings of `use_sf_attention`; None trains with full attention
SETTINGS: dict[str, dict[str, Any] | None] = {
    "full": None,
    "S2 as released": {"shift_fraction": 1.0, "sinks": 0, "variant": "as_released"},
    "S2": {"shift_fraction": 1.0, "sinks": 0},
    "S2 and sinks": {"shift_fraction": 1.0, "sinks": SINKS},
    "SF": {"shift_fraction": 0.5, "sinks": SINKS},
    "groups alone": {"shift_fraction": 0.0, "sinks": 0},
}
RANDOM = "random groups and sinks"
SHORT = "groups alone"  # rotary positions are relative: it is full attention on windows a quarter as long, which needs no code
ARMS = (*SETTINGS, RANDOM)

TUNING = Operator("fine-tuning for a longer context", free="full attention on windows a quarter as long")


def trained(width: int, layers: int, length: int, steps: int, batch: int, seed: int, rate: float) -> Any:
    """A byte model trained from scratch at `length`."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=length,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    train(model, byte_batches(length, batch, seed=seed), steps=steps, lr=rate)
    return model.eval()


def _attend_at_random(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As many keys a query as SF-Attn has, drawn at random: tokens are dealt into the groups, and other tokens are the sinks."""
    if not module.training:
        return by_sdpa(module, query, key, value, attention_mask, dropout, scaling, is_causal, kwargs)
    length = query.shape[2]
    order = torch.randperm(length, generator=torch.Generator().manual_seed(module.layer_idx))
    group = order // -(-length // GROUPS)
    seen = (group[:, None] == group) | (order < SINKS)
    mask = (seen | torch.eye(length, dtype=torch.bool)).tril()
    out = F.scaled_dot_product_attention(query, key, value, mask, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


def _use_random_groups(model: Any) -> None:
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register("assay_random_groups", _attend_at_random)
    AttentionMaskInterface.register("assay_random_groups", causal_mask)
    set_attention(model, "assay_random_groups")


def tuned(base: Any, arm: str, length: int, steps: int, batch: int, seed: int, rate: float) -> Any:
    """The base model extended to `length` with LoRA, norms and embeddings; the same text for all arms."""
    from peft import get_peft_model

    model = copy.deepcopy(base)
    interpolate_positions(model, length)
    if (settings := SETTINGS.get(arm)) is not None:
        use_sf_attention(model, **settings)
    if arm == RANDOM:
        _use_random_groups(model)
    torch.manual_seed(seed)
    adapted: Any = get_peft_model(model, lora_config(model))
    train(adapted, byte_batches(length, batch, seed=1000 + seed), steps=steps, lr=rate, weight_decay=0.0)
    return adapted.eval()


def _nll(model: Any, length: int, windows: int, part: Part = "heldout") -> float:
    """Mean negative log-likelihood of held-out windows, nats a byte, with full attention."""
    return float(evaluate(model, *byte_windows(length, windows, part=part), batch=4)["nll"].mean())


def bigram_nll(length: int, windows: int) -> float:
    """The same of a table of pairs of bytes, counted in the training text, unseen pairs by the frequency of the second byte."""
    data = text_bytes("code", "prompts")
    counts = torch.bincount(256 * data[:-1] + data[1:], minlength=1 << 16).view(256, 256).double()
    alone = (counts.sum(0) + 1) / (counts.sum() + 256)
    table = (counts + alone) / (counts.sum(1, keepdim=True) + 1)
    inputs, targets = byte_windows(length, windows)
    return float(-table[inputs, targets].log().mean())


def attention_seconds(length: int) -> dict[str, Any]:
    """Seconds forward and back of nine heads of 64 at `length`, in full and in groups of a quarter; values do not matter to it."""
    qkv = torch.randn(3, 1, 9, length, 64, generator=torch.Generator().manual_seed(0))
    q, k, v = (x.requires_grad_() for x in qkv.unbind())
    timed = compare_many(
        {
            "full": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward(),
            "SF": lambda: sf_attention(q, k, v, group=length // 4).sum().backward(),
            "S2 as released": lambda: s2_attention(q, k, v, group=length // 4, variant="as_released").sum().backward(),
        },
        rounds=4,
        max_seconds=20,
    )
    seconds = {label: sorted(times)[len(times) // 2] for label, times in timed.seconds.items()}
    return {"tokens": length, "seconds": seconds, "noisy": timed.noisy}


MODEL = {"width": 64, "layers": 2, "length": 32, "steps": 500, "batch": 16, "tune_steps": 100, "tune_batch": 4}
BASE_SEARCH, TUNE_SEARCH = "sinklora/base", "sinklora/tuned"


@searched(BASE_SEARCH, arms=["base"], grid=[5e-4, 1e-3, 2e-3, 4e-3])
def base_score(arm: str, rate: float) -> float:
    """The short model's loss on the part of the text that is kept for choices."""
    found = trained(64, 2, 32, MODEL["steps"], MODEL["batch"], 100, rate)
    return _nll(found, 32, 64, "calibration")


@functools.cache
def _base_to_search() -> Any:
    return trained(64, 2, 32, MODEL["steps"], MODEL["batch"], 100, chosen(BASE_SEARCH, "base").rate)


@searched(TUNE_SEARCH, arms=ARMS, grid=[7e-4, 2e-3, 6e-3, 2e-2])
def tune_score(arm: str, rate: float) -> float:
    """The tuned model's loss at the long length, on the part of the text that is kept for choices."""
    long = FACTOR * MODEL["length"]
    found = tuned(_base_to_search(), arm, long, MODEL["tune_steps"], MODEL["tune_batch"], 100, rate)
    return _nll(found, long, 32, "calibration")


PAPER_TUNING = {
    "model": "Llama-2-7B",
    "length": 4096,
    "factor": 2,
    "group": "a quarter",
    "sinks": SINKS,
    "text": "PG19",
}
SMALL = MODEL | {"steps": 700, "batch": 32, "tune_steps": 200, "seeds": 3, "windows": 64, "timed": 4096}
LARGE = {"width": 512, "layers": 8, "steps": 10_000, "batch": 16, "tune_steps": 1000, "tune_batch": 2, "seeds": 3}
FULL = [LARGE | {"length": n, "windows": 128, "timed": 8192} for n in (256, 1024)]


@experiment(
    "sinklora/perplexity-recovered",
    points={
        "smoke": [SMALL | {"steps": 60, "tune_steps": 10, "windows": 4, "timed": 512}],
        "small": [SMALL],
        "full": FULL,
    },
    operator=TUNING,
    paper=PAPER_TUNING,
    departures={
        "model": "a Llama of two layers (eight at `full`) for bytes, trained here: nothing else can be tuned here in minutes",
        "length": "32 (at most 1024), the context that such a model learns to use",
        "factor": "8, so that there is something to gain",
        "text": "sources of the standard library, cut by document into training, choice and test",
    },
    decides={"full": FULL[-1]},
    refuted_if="tuning with SF-Attn recovers no more of full attention's gain than tuning with S2-Attn",
    minutes=600,
)
def perplexity_recovered(
    width: int,
    layers: int,
    length: int,
    steps: int,
    batch: int,
    tune_steps: int,
    tune_batch: int,
    seeds: int,
    windows: int,
    timed: int,
) -> Figure:
    """Share of full attention's perplexity gain that tuning with SF-Attn reaches; the baseline is S2-Attn as released.

    The gain counts from the better untuned model, positions interpolated or as they were, so that undoing harm is no gain. The interval
    is Student's t over the seeds' shares, each from one base model. Controls: groups alone (neither shift nor sinks), and groups and
    sinks drawn at random. Groups alone are also the rival, and free: they are full attention on windows a quarter as long. Arms are
    ablations: S2-Attn without its leak, and with sinks. Rates are those of shorter runs of `small`'s model, as long for each arm.
    Raises ValueError where full attention gains nothing.
    """
    long = FACTOR * length
    shares: dict[str, list[float]] = {arm: [] for arm in ARMS if arm != "full"}
    losses: dict[str, list[float]] = {arm: [] for arm in (*ARMS, "extrapolated", "interpolated")}
    short: dict[str, list[float]] = {arm: [] for arm in ("base", *ARMS)}
    for seed in range(seeds):
        base = trained(width, layers, length, steps, batch, seed, chosen(BASE_SEARCH, "base").rate)
        squeezed = copy.deepcopy(base)
        interpolate_positions(squeezed, long)
        short["base"].append(_nll(base, length, windows))
        losses["extrapolated"].append(_nll(base, long, windows))
        losses["interpolated"].append(_nll(squeezed, long, windows))
        for arm in ARMS:
            model = tuned(base, arm, long, tune_steps, tune_batch, seed, chosen(TUNE_SEARCH, arm).rate)
            losses[arm].append(_nll(model, long, windows))
            short[arm].append(_nll(model, length, windows))
        before = min(losses["extrapolated"][-1], losses["interpolated"][-1])
        if not losses["full"][-1] < before:
            raise ValueError(f"steps and tune_steps are too few: full attention gains nothing at {long} bytes")
        for arm, found in shares.items():
            found.append(_share(before, losses["full"][-1], losses[arm][-1]))
    over = student_interval(shares["SF"])
    means = {arm: float(np.mean(found)) for arm, found in shares.items()}
    floor = {n: bigram_nll(n, windows) for n in (length, long)}
    rates = {arm: chosen(TUNE_SEARCH, arm) for arm in ARMS} | {"base": chosen(BASE_SEARCH, "base")}
    table = "a table of pairs of bytes"
    arms = {
        arm: Trained(losses[arm], floor[long], table, rates[arm].rate, rates[arm].rates)
        for arm in ARMS
        if arm != RANDOM
    }
    return Figure(
        over.median,
        "%",
        low=over.low,
        high=over.high,
        baseline=means["S2 as released"],
        free=means[SHORT],
        controls={"deleted": means[SHORT], "random": means[RANDOM], "rival": means[SHORT]},
        arms={arm: means[arm] for arm in ("S2", "S2 and sinks")},
        trained={"base": Trained(short["base"], floor[length], table, rates["base"].rate, rates["base"].rates), **arms},
        details={
            "share of the gain, %": shares,
            "nats a byte at the long length": losses,
            "nats a byte at the short length": short,
            "scores_of_full": scores_computed(long, long // GROUPS) / long**2,
            "attention": attention_seconds(timed),
        },
    )


def _share(before: float, full: float, arm: float) -> float:
    """(p0 - p) / (p0 - p_full) of perplexities, in per cent, from losses."""
    p0, p1, p = np.exp([before, full, arm])
    return float(100 * (p0 - p) / (p0 - p1))


# -------------------------------------------------------------------------------------------------------------- decoding


EVERYTHING = 1 << 30
HALF = 0.5
DIGITS = 5

DECODING = Operator(
    "decoding after a long prompt",
    free="transformers' static cache, which holds everything",
    exact="assay's cache that holds everything and is kept in place",
)
RECALL = Guard("loss on a pass key that is asked for after a long document, nats a token", margin=0.25, relative=False)


@functools.cache
def _model(moved: bool = False) -> tuple[Any, Any]:
    """The model as `use_eviction` prepares it, and its tokenizer; `moved` off the 4-bit grid."""
    loaded = load_model("smollm2-135m", dtype=torch.bfloat16)
    return use_eviction(off_grid(loaded.model) if moved else loaded.model), loaded.tokenizer


@functools.cache
def _plain_model() -> Any:
    """The model as transformers runs it."""
    return load_model("smollm2-135m", dtype=torch.bfloat16).model


@torch.no_grad()
def _prefilled(ids: Tensor, moved: bool = False) -> EvictionCache:
    """The whole prompt, with the attention every token of it got."""
    cache = EvictionCache(EVERYTHING)
    _model(moved)[0](ids, cache=cache, logits_to_keep=1)
    return cache


def _copied(cache: EvictionCache, into: Any) -> Any:
    """The same entries in a cache of transformers'."""
    layers: Any = cache.layers
    for index, layer in enumerate(layers):
        into.update(layer.keys.clone(), layer.values.clone(), index)
    return into


@torch.no_grad()
def _decode(model: Any, cache: Any, token: Tensor, new: int) -> None:
    for _ in range(new):
        token = model(token, cache=cache).logits[:, -1:].argmax(-1)


def _rewound(cache: Any, tokens: int) -> Any:
    """A full cache as it was after `tokens` tokens, so that every run decodes the same; half a cache stays of one size by itself."""
    for layer in cache.layers:
        if isinstance(cache, EvictionCache):
            layer.seen = tokens
            layer._hold(tokens)
        elif isinstance(cache, StaticCache):
            layer.cumulative_length.fill_(tokens)
        else:
            layer.keys, layer.values = layer.keys[:, :, :tokens], layer.values[:, :, :tokens]
    return cache


@torch.no_grad()
def _forced(cache: Any, ids: Tensor, moved: bool = False) -> Tensor:
    """Feed ids (1, n) token by token: the loss on all but the first, in nats."""
    model = _model(moved)[0]
    logits = torch.cat([model(token, cache=cache).logits for token in ids[:, :-1].split(1, 1)], 1)[0]
    return F.cross_entropy(logits.float(), ids[0, 1:], reduction="none").double()


def _passkey(tokens: int, seed: int) -> tuple[Tensor, Tensor, int]:
    """A document with a pass key at a quarter of it, the question that follows with the key as its answer, and the key's tokens."""
    tokenizer = _model()[1]
    key = f" {random.Random(seed).randrange(10 ** (DIGITS - 1), 10**DIGITS)}"

    def encode(text: str) -> Tensor:
        return torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])

    needle = encode(f"\n\nThe pass key is{key}. Remember it.{key} is the pass key.\n\n")
    filler = long_prompt(tokenizer, tokens - needle.shape[1], kind="english", seed=seed)
    place = filler.shape[1] // 4
    question = encode(f"\n\nWhat is the pass key? The pass key is{key}")
    return torch.cat([filler[:, :place], needle, filler[:, place:]], 1), question, encode(key).shape[1]


def _at_random(cache: EvictionCache, share: float, seed: int) -> EvictionCache:
    """H2O's budget, half of it the newest tokens and half drawn at random in each layer and key head."""
    layers: Any = cache.layers
    generator = torch.Generator().manual_seed(seed)
    gathered = [layer.scores.clone() for layer in layers]
    for layer in layers:
        layer.scores.copy_(torch.rand(layer.scores.shape, generator=generator))
    kept = cache.smaller(share)
    for layer, scores in zip(layers, gathered, strict=True):
        layer.scores.copy_(scores)
    return kept


def cut(cache: EvictionCache, share: float, seed: int) -> dict[str, EvictionCache]:
    """The cache cut down to a share of its entries by every policy, and the whole of it."""
    return {
        "full": cache.smaller(EVERYTHING),
        "h2o": cache.smaller(share),
        "recent": cache.smaller(share, policy="local"),
        "random": _at_random(cache, share, seed),
        "sinks": cache.smaller(share, policy="sinks"),
    }


def recall(tokens: int, documents: int, share: float, moved: bool = False) -> dict[str, list[float]]:
    """Loss on the pass key of each document, by policy."""
    found: dict[str, list[float]] = {}
    for seed in range(documents):
        document, question, key = _passkey(tokens, seed)
        for policy, cache in cut(_prefilled(document, moved), share, seed).items():
            found.setdefault(policy, []).append(float(_forced(cache, question, moved)[-key:].mean()))
    return found


def _means(losses: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {policy: float(np.mean(found)) for policy, found in losses.items()}


def _keeps_nothing_special(record: Mapping[str, Any]) -> bool:
    """Slower than the whole cache, or H2O recalls no better than the newest tokens alone or a random half do."""
    quality = record["quality"]
    other: float = min(quality["controls"]["deleted"], quality["controls"]["random"])
    return bool(quality["candidate"] >= other or record["ratios"]["baseline"]["high"] < 1)


DECODE = {"tokens": 2048, "share": HALF, "new": 8, "documents": 6, "follows": 48, "moved": 2}


@experiment(
    "sinklora/inference-speedup",
    points={
        "smoke": [DECODE | {"tokens": 256, "new": 2, "documents": 3, "follows": 8, "moved": 0}],
        "small": [DECODE],
        "full": [
            *(DECODE | {"tokens": 7000, "share": share, "documents": 32, "follows": 512} for share in (0.25, 0.1)),
            *(DECODE | {"tokens": n, "new": 16, "documents": 32, "follows": 512} for n in (2048, 4096, 7000)),
        ],
    },
    operator=DECODING,
    guard=RECALL,
    paper={"share": HALF, "model": "Llama-2-7B", "tokens": "up to 10,000"},
    departures={
        "model": "SmolLM2-135M, and the same with its weights moved off the 4-bit grid",
        "tokens": "2,048 at `small`, for time, and 7,000 at most, which the model was made for",
    },
    decides={"full": DECODE | {"tokens": 7000, "new": 16, "documents": 32, "follows": 512}},
    refuted_if="decoding with half a cache is slower, or recalls no better than half a cache of the newest tokens or of random ones",
    refutes=_keeps_nothing_special,
    minutes=30,
)
def inference_speedup(tokens: int, share: float, new: int, documents: int, follows: int, moved: int) -> Trial:
    """Decoding `new` tokens after a prompt with transformers' growing cache, with H2O at a share of it, and with two full caches.

    The interval of the loss on the pass key is Student's t over documents. The margin of 0.25 nats (our choice) is a quarter more
    perplexity; with only the newest tokens kept several nats are lost. The rival is sinks and the newest tokens, at the same budget.
    Details: the loss on text that simply goes on, and `moved` documents with weights off SmolLM2's 4-bit grid.
    """
    model, tokenizer = _model()
    ids = long_prompt(tokenizer, tokens + follows + 1)
    prompt, following = ids[:, :tokens], ids[:, tokens:]
    prefilled = _prefilled(prompt)
    half, whole = prefilled.smaller(share), prefilled.smaller(EVERYTHING, policy="local")
    growing = _copied(prefilled, DynamicCache())
    static = _copied(prefilled, StaticCache(_plain_model().config, max_cache_len=tokens + new))
    token = following[:, :1]

    def quality() -> Quality:
        losses = recall(tokens, documents, share)
        rise = student_interval(np.subtract(losses["h2o"], losses["full"]))
        means = _means(losses)
        return Quality(
            means["h2o"],
            means["full"],
            low=means["full"] + rise.low,
            high=means["full"] + rise.high,
            controls={"deleted": means["recent"], "random": means["random"], "rival": means["sinks"]},
            rival="sinks and the newest tokens",
        )

    def details() -> dict[str, Any]:
        goes_on = {policy: float(_forced(one, following).mean()) for policy, one in cut(prefilled, share, 0).items()}
        found: dict[str, Any] = {
            "cache_bytes": {"full": prefilled.nbytes, "kept": prefilled.smaller(share).nbytes},
            "loss on the text that goes on": goes_on,
        }
        if moved:
            found["pass key with weights off the 4-bit grid"] = _means(recall(tokens, moved, share, True))
        return found

    return Trial(
        baseline=lambda: _decode(_plain_model(), _rewound(growing, tokens), token, new),
        candidate=lambda: _decode(model, half, token, new),
        free=lambda: _decode(_plain_model(), _rewound(static, tokens), token, new),
        exact=lambda: _decode(model, _rewound(whole, tokens), token, new),
        quality=quality,
        details=details,
    )

"""SinkLoRA: how much of full attention's perplexity group-wise fine-tuning recovers, and what decoding with half a cache gains and loses.

Tuning: byte models of the Llama family, trained here at a short length, are extended to eight times that length by interpolated
positions and LoRA. The arms differ only in the attention of training mode, and all are judged with full attention. The short
length is one that training exhausts: only then does a model fail beyond it and have something to gain. Decoding:
SmolLM2-135M in bfloat16 after a long prompt of real text.
"""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from assay.experiments.core import Figure, Quality, Trial, experiment
from assay.experiments.mixers.training import evaluate, train
from assay.measure.clock import compare_many
from assay.measure.stats import Interval, bootstrap
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
from assay.workloads.models import load_model
from assay.workloads.sequences import byte_batches, byte_windows
from assay.workloads.text import long_prompt

# settings of `use_sf_attention`; None trains with full attention
ARMS: dict[str, dict[str, Any] | None] = {
    "full": None,
    "S2 as released": {"shift_fraction": 1.0, "sinks": 0, "variant": "as_released"},
    "S2": {"shift_fraction": 1.0, "sinks": 0},
    "S2 and sinks": {"shift_fraction": 1.0, "sinks": 4},
    "SF": {"shift_fraction": 0.5, "sinks": 4},
}
FACTOR = 8  # new length / trained length


def trained(width: int, layers: int, length: int, steps: int, batch: int, seed: int) -> Any:
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
    train(model, byte_batches(length, batch, seed=seed), steps=steps)
    return model.eval()


def tuned(base: Any, settings: dict[str, Any] | None, length: int, steps: int, batch: int, seed: int) -> Any:
    """The base model extended to `length` with LoRA, norms and embeddings; the same batches for all settings."""
    from peft import get_peft_model

    model = copy.deepcopy(base)
    interpolate_positions(model, length)
    if settings is not None:
        use_sf_attention(model, **settings)
    torch.manual_seed(seed)
    adapted: Any = get_peft_model(model, lora_config(model))
    train(adapted, byte_batches(length, batch, seed=1000 + seed), steps=steps, weight_decay=0.0)
    return adapted.eval()


def _nll(model: Any, length: int, windows: int) -> Tensor:
    """Mean negative log-likelihood of each held-out window, nats a byte, with full attention."""
    return evaluate(model, *byte_windows(length, windows), batch=4)["nll"]


def _share(nll: Any, axis: int) -> Any:
    """(p0 - p) / (p0 - p_full) in per cent, from nll columns (before, full, arm)."""
    before, full, arm = np.moveaxis(np.exp(nll.mean(axis=axis)), -1, 0)
    return 100 * (before - arm) / (before - full)


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


@experiment(
    "sinklora/perplexity-recovered",
    points={
        "smoke": [
            {
                "width": 48,
                "layers": 2,
                "length": 32,
                "steps": 400,
                "tune_steps": 60,
                "batch": 16,
                "seeds": 1,
                "windows": 16,
                "timed": 512,
            }
        ],
        "small": [
            {
                "width": 96,
                "layers": 3,
                "length": 64,
                "steps": 500,
                "tune_steps": 200,
                "batch": 16,
                "seeds": 3,
                "windows": 64,
                "timed": 4096,
            }
        ],
        "full": [
            {
                "width": 512,
                "layers": 8,
                "length": n,
                "steps": 10_000,
                "tune_steps": 1000,
                "batch": 16,
                "seeds": 3,
                "windows": 128,
                "timed": 8192,
            }
            for n in (256, 1024)
        ],
    },
    minutes=600,
)
def perplexity_recovered(
    width: int,
    layers: int,
    length: int,
    steps: int,
    tune_steps: int,
    batch: int,
    seeds: int,
    windows: int,
    timed: int,
) -> Figure:
    """Share of full attention's perplexity gain that tuning with SF-Attn reaches; the baseline is S2-Attn as released.

    The gain counts from the better untuned model, positions interpolated or as they were, so that undoing harm is no gain. Free is
    S2-Attn without its leak. Ends are the widest of the seeds' intervals. Raises ValueError where full attention gains nothing.
    """
    long = FACTOR * length
    shares: dict[str, list[Interval]] = {arm: [] for arm in ARMS if arm != "full"}
    perplexities: list[dict[str, dict[str, float]]] = []
    for seed in range(seeds):
        base = trained(width, layers, length, steps, batch, seed)
        squeezed = copy.deepcopy(base)
        interpolate_positions(squeezed, long)
        models = {"extrapolated": base, "interpolated": squeezed} | {
            arm: tuned(base, settings, long, tune_steps, max(1, batch // FACTOR), seed)
            for arm, settings in ARMS.items()
        }
        nll = {name: _nll(model, long, windows) for name, model in models.items()}
        before = min(nll["extrapolated"], nll["interpolated"], key=lambda x: float(x.mean()))
        if nll["full"].mean() >= before.mean():
            raise ValueError(f"steps and tune_steps are too few: full attention gains nothing at {long} bytes")
        for arm, found in shares.items():
            found.append(bootstrap(torch.stack([before, nll["full"], nll[arm]], 1).numpy(), _share))
        perplexities.append(
            {
                name: {str(long): _perplexity(nll[name]), str(length): _perplexity(_nll(model, length, windows))}
                for name, model in models.items()
            }
        )
    middle = {arm: float(np.median([share.median for share in found])) for arm, found in shares.items()}
    short = {arm: float(np.mean([found[arm][str(length)] for found in perplexities])) for arm in ("SF", "full")}
    return Figure(
        middle["SF"],
        "%",
        low=min(share.low for share in shares["SF"]),
        high=max(share.high for share in shares["SF"]),
        baseline=middle["S2 as released"],
        free=middle["S2"],
        free_label="S2-Attn with its leak closed",
        quality=Quality(f"perplexity of {length} bytes", short["SF"], short["full"], higher_is_better=False),
        details={
            "share_of_gain": {
                arm: [[share.low, share.median, share.high] for share in found] for arm, found in shares.items()
            },
            "perplexity": perplexities,
            "scores_of_full": scores_computed(long, long // 4) / long**2,
            "attention": attention_seconds(timed),
        },
    )


def _perplexity(nll: Tensor) -> float:
    return float(nll.mean().exp())


# -------------------------------------------------------------------------------------------------------------- decoding


EVERYTHING = 1 << 30
KEY = " 71432"


@functools.cache
def _model() -> tuple[Any, Any]:
    loaded = load_model("smollm2-135m", dtype=torch.bfloat16)
    return use_eviction(loaded.model), loaded.tokenizer


@torch.no_grad()
def _prefilled(ids: Tensor) -> EvictionCache:
    """The whole prompt, with the attention every token of it got."""
    cache = EvictionCache(EVERYTHING)
    _model()[0](ids, cache=cache, logits_to_keep=1)
    return cache


def _dynamic(cache: EvictionCache) -> DynamicCache:
    """The same entries as a plain transformers cache."""
    plain = DynamicCache()
    layers: Any = cache.layers
    for index, layer in enumerate(layers):
        plain.update(layer.keys.clone(), layer.values.clone(), index)
    return plain


@torch.no_grad()
def _decode(cache: Any, token: Tensor, new: int) -> None:
    for _ in range(new):
        token = _model()[0](token, cache=cache).logits[:, -1:].argmax(-1)


@torch.no_grad()
def _forced(cache: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Feed ids (1, n) token by token: nll of all but the first, in nats, and whether each was the most likely."""
    logits = torch.cat([_model()[0](token, cache=cache).logits for token in ids[:, :-1].split(1, 1)], 1)[0]
    right = logits.argmax(-1) == ids[0, 1:]
    return F.cross_entropy(logits.float(), ids[0, 1:], reduction="none").double(), right


def _passkey(tokens: int) -> tuple[Tensor, Tensor]:
    """A document with a pass key at a quarter of it, and the question that follows, with the key as its answer."""
    tokenizer = _model()[1]

    def encode(text: str) -> Tensor:
        return torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])

    needle = encode(f"\n\nThe pass key is{KEY}. Remember it.{KEY} is the pass key.\n\n")
    filler = long_prompt(tokenizer, tokens - needle.shape[1], kind="english")
    place = filler.shape[1] // 4
    question = encode(f"\n\nWhat is the pass key? The pass key is{KEY}")
    return torch.cat([filler[:, :place], needle, filler[:, place:]], 1), question


def eviction_table(text: EvictionCache, following: Tensor, tokens: int, shares: list[float]) -> dict[str, Any]:
    """Perplexity of the text that follows and recall of a pass key, asked for after the eviction, for policies and budgets."""
    document, question = _passkey(tokens)
    planted = _prefilled(document)
    digits = len(_model()[1](KEY, add_special_tokens=False)["input_ids"])
    table: dict[str, Any] = {}
    for policy in ("h2o", "sinks", "local"):
        for share in shares:
            nll, _ = _forced(text.smaller(share, policy=policy), following)
            key, right = _forced(planted.smaller(share, policy=policy), question)
            table.setdefault(policy, {})[str(share)] = {
                "perplexity": float(nll.mean().exp()),
                "pass_key_nll": float(key[-digits:].mean()),
                "pass_key_found": bool(right[-digits:].all()),
            }
    key, right = _forced(planted.smaller(EVERYTHING), question)
    table["full"] = {"pass_key_nll": float(key[-digits:].mean()), "pass_key_found": bool(right[-digits:].all())}
    return table


@experiment(
    "sinklora/inference-speedup",
    points={
        "smoke": [{"tokens": 256, "new": 2, "judged": 8, "shares": [0.5]}],
        "small": [{"tokens": n, "new": 8, "judged": 96, "shares": [1.0, 0.5, 0.25, 0.1]} for n in (1024, 4096)],
        "full": [{"tokens": n, "new": 16, "judged": 512, "shares": [1.0, 0.5, 0.25, 0.1]} for n in (2048, 4096, 7000)],
    },
    minutes=30,
)
def inference_speedup(tokens: int, new: int, judged: int, shares: list[float]) -> Trial:
    """Decoding `new` tokens after a prompt with transformers' cache, with H2O at half of it, and (free) with a cache kept in place.

    The free one holds everything and is exact; it only does not copy itself at every token. Runs go on where the last one ended.
    """
    ids = long_prompt(_model()[1], tokens + judged + 1)
    prompt, following = ids[:, :tokens], ids[:, tokens:]
    prefilled = _prefilled(prompt)
    half, whole, plain = prefilled.smaller(0.5), prefilled.smaller(EVERYTHING, policy="local"), _dynamic(prefilled)
    token = following[:, :1]

    @functools.cache
    def losses() -> tuple[Tensor, Tensor]:
        return _forced(prefilled.smaller(EVERYTHING), following)[0], _forced(prefilled.smaller(0.5), following)[0]

    def quality() -> Quality:
        full, evicted = losses()
        rise = bootstrap((evicted - full).numpy(), np.mean)
        mean = float(full.mean())
        low, median, high = (math.exp(mean + x) for x in (rise.low, rise.median, rise.high))
        metric = f"perplexity of the {judged} tokens that follow"
        return Quality(metric, median, math.exp(mean), low, high, higher_is_better=False)

    def details() -> dict[str, Any]:
        return {
            "cache_bytes": {"full": prefilled.nbytes, "half": half.nbytes},
            "budgets": eviction_table(prefilled, following, tokens, shares),
        }

    return Trial(
        baseline=lambda: _decode(plain, token, new),
        candidate=lambda: _decode(half, token, new),
        free=lambda: _decode(whole, token, new),
        free_label="the full cache, kept in place",
        quality=quality,
        details=details,
        pairs=8,
    )

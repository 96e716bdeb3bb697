"""BASED: what a state of fixed size recalls, and what generation costs with it, against attention and its cache.

Models are trained here: associative recall (fresh sequences at every step) and bytes of real Python sources. Widths, channel mixers,
steps and tokens are the same in all arms; only the mixers differ.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from assay.experiments.core import Figure, Quality, Trial, experiment
from assay.measure.stats import bootstrap
from assay.methods.mixers.model import MixerConfig, MixerForCausalLM, StateCache
from assay.methods.mixers.training import evaluate, train
from assay.workloads.sequences import associative_recall, batches_of, byte_batches, byte_windows, repeated_ngrams

# two mixing layers each behind one short convolution, as the paper's layouts begin
ARMS: dict[str, list[list[Any]]] = {
    "attention": [["attention", {"heads": 2}], ["attention", {"heads": 2}]],
    "based": [["based", {"heads": 2}], ["based_window", {"heads": 2, "window": 32}]],
    "taylor only": [["based", {"heads": 2}], ["based", {"heads": 2}]],
    "window only": [["based_window", {"heads": 2, "window": 32}], ["based_window", {"heads": 2, "window": 32}]],
    "elu linear attention": [["based", {"heads": 2, "feature": "elu"}], ["based", {"heads": 2, "feature": "elu"}]],
}
RIVALS = ("window only", "elu linear attention")  # sub-quadratic, without the paper's feature map


def recall_model(arm: str, width: int, vocab: int) -> MixerForCausalLM:
    layers = [["baseconv", {}], *ARMS[arm]]
    return MixerForCausalLM(
        MixerConfig(vocab_size=vocab, hidden_size=width, layers=layers, intermediate_size=2 * width)
    )


@experiment(
    "based/recall-gain",
    points={
        "smoke": [{"pairs": 2, "length": 32, "width": 32, "steps": 20, "arms": ["based", "window only"]}],
        "small": [{"pairs": 8, "length": 64, "width": 64, "steps": 3000, "arms": list(ARMS), "vocab": 32}],
        "full": [
            {"pairs": pairs, "length": 256, "width": width, "steps": 10_000, "arms": list(ARMS)}
            for pairs in (4, 16, 64)
            for width in (64, 128)
        ],
    },
    minutes=30,
)
def recall_gain(pairs: int, length: int, width: int, steps: int, arms: list[str], vocab: int = 64) -> Figure:
    """Points of recall accuracy BASED gains on its best sub-quadratic rival; the state's bytes of all arms are in the details."""
    task = {"length": length, "pairs": pairs, "vocab": vocab}
    inputs, targets = associative_recall(256, seed=0, **task)
    accuracy: dict[str, Tensor] = {}
    details: dict[str, Any] = {}
    for arm in arms:
        torch.manual_seed(0)
        model = recall_model(arm, width, vocab)
        train(model, batches_of(associative_recall, 64, **task), steps=steps, lr=3e-3, weight_decay=0.0)
        accuracy[arm] = evaluate(model, inputs, targets)["accuracy"]
        details[arm] = {
            "accuracy": float(accuracy[arm].mean()),
            "state_bytes": model.state_bytes(length),
            "parameters": sum(p.numel() for p in model.parameters()),
        }
    rival = max((arm for arm in arms if arm in RIVALS), key=lambda arm: float(accuracy[arm].mean()))
    gain = bootstrap(100 * (accuracy["based"] - accuracy[rival]).numpy(), lambda x, axis: x.mean(axis=axis))
    best = None if "attention" not in accuracy else 100 * float((accuracy["attention"] - accuracy[rival]).mean())
    return Figure(
        gain.median,
        "points",
        low=gain.low,
        high=gain.high,
        baseline=0.0,
        details={"rival": rival, "attention_gains_points": best, "arms": details, "chance": 1 / pairs},
    )


def language_model(arm: str, width: int, layers: int) -> MixerForCausalLM:
    """Bytes to bytes. "based": convolutions with one linear and one window layer in every four, else attention throughout."""
    heads = width // 64
    if arm == "attention":
        chosen: list[Any] = [["attention", {"heads": heads}]] * layers
    else:
        four = [
            ["baseconv", {}],
            ["based", {"heads": heads}],
            ["based_window", {"heads": heads, "window": 128}],
            ["baseconv", {}],
        ]
        chosen = [four[i % 4] for i in range(layers)]
    torch.manual_seed(0)
    return MixerForCausalLM(MixerConfig(vocab_size=256, hidden_size=width, layers=chosen)).eval()


@torch.no_grad()
def generate_from(model: MixerForCausalLM, cache: StateCache, token: Tensor, tokens: int) -> None:
    """Greedy generation of `tokens` tokens behind `cache`."""
    for _ in range(tokens):
        out = model(token, cache=cache)
        token = out.logits[:, -1:].argmax(-1)


@torch.no_grad()
def prefilled(model: MixerForCausalLM, ids: Tensor, chunk: int = 1024) -> StateCache:
    """The states after `ids`, and after one token more, so that a growing cache has room for those to come."""
    cache = model.new_cache(len(ids))
    for part in [*ids.split(chunk, 1), ids[:, :1]]:
        model(part, cache=cache, logits_to_keep=1)
    return cache


@experiment(
    "based/generation-throughput",
    points={
        "smoke": [{"context": 256, "batch": 2, "tokens": 8, "width": 64, "layers": 4, "steps": 5}],
        "small": [
            *({"context": n, "batch": 4, "tokens": 16, "width": 256, "layers": 8, "steps": 0} for n in (1024, 4096)),
            {"context": 16384, "batch": 4, "tokens": 16, "width": 256, "layers": 8, "steps": 150},
        ],
        "full": [
            {"context": n, "batch": batch, "tokens": 64, "width": 1024, "layers": 24, "steps": 5000}
            for n in (1024, 4096, 16384, 32768)
            for batch in (1, 16)
        ],
    },
    minutes=30,
)
def generation_throughput(context: int, batch: int, tokens: int, width: int, layers: int, steps: int) -> Trial:
    """Generating behind a context of real text: attention with its cache against BASED with its states, same width and depth.

    With `steps` both are trained on the same bytes, and the quality is bits per byte on held-out text; the details split it into
    positions that end a repeated 8-gram, where recall helps, and the others.
    """
    models = {arm: language_model(arm, width, layers) for arm in ("attention", "based")}
    ids = byte_windows(context, batch)[0]
    caches = {arm: prefilled(model, ids) for arm, model in models.items()}
    token = ids[:, -1:]

    def run(arm: str) -> None:
        # every run writes behind the same context; sums go on from run to run, which does not matter for the time
        generate_from(models[arm], StateCache([dict(state) for state in caches[arm].states]), token, tokens)

    details: dict[str, Any] = {
        "state_bytes": {arm: model.state_bytes(context, batch) for arm, model in models.items()},
        "parameters": {arm: sum(p.numel() for p in model.parameters()) for arm, model in models.items()},
        "tokens": tokens * batch,
    }

    def quality() -> Quality:
        inputs, targets = byte_windows(512, 32)
        repeated = repeated_ngrams(inputs, targets)
        bits = {}
        for arm, model in models.items():
            train(model, byte_batches(512, 8), steps=steps, lr=2e-3)
            bits[arm] = evaluate(model, inputs, targets)["nll"] / 0.6931471805599453
            marked = evaluate(model, inputs, torch.where(repeated, targets, -100))["nll"].nanmean() / 0.6931471805599453
            details[f"bits_per_byte_of_repetitions, {arm}"] = float(marked)
        found = bootstrap(bits["based"].numpy(), lambda x, axis: x.mean(axis=axis))
        base = float(bits["attention"].mean())
        return Quality("bits per byte", found.median, base, found.low, found.high, higher_is_better=False)

    return Trial(
        baseline=lambda: run("attention"),
        candidate=lambda: run("based"),
        quality=quality if steps else None,
        details=lambda: details,
        pairs=6,
    )

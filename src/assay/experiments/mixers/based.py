"""BASED: what a state of fixed size can recall, and what generation costs with it, against attention and its cache.

Models are trained here on associative recall (fresh sequences at every step) and on bytes of real Python sources. Widths, channel
mixers, steps and tokens are the same in all arms; only the mixers differ.
"""

from __future__ import annotations

import copy
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from torch import Tensor

from assay.experiments.core import Figure, Quality, Trial, experiment
from assay.experiments.mixers.training import evaluate, train
from assay.measure.stats import bootstrap
from assay.methods.core.mixers.model import MixerConfig, MixerForCausalLM, StateCache
from assay.workloads.sequences import associative_recall, batches_of, byte_batches, byte_windows, repeated_ngrams

# Two mixing layers, each after one short convolution, as the paper's layouts start. Rivals hold as many bytes as BASED, "window only"
# fewer: more of a window would be attention on these lengths.
ARMS: dict[str, list[list[Any]]] = {
    "attention": [["attention", {"heads": 2}]] * 2,
    "based": [["based", {"heads": 2, "feature_dim": 8}], ["based_window", {"heads": 2, "window": 32}]],
    "taylor only": [["based", {"heads": 2, "feature_dim": 8}]] * 2,
    "window only": [["based_window", {"heads": 2, "window": 32}]] * 2,
    "elu linear attention": [["based", {"heads": 2, "feature_dim": 38, "feature": "elu"}]] * 2,
    "mamba": [["mamba", {"states": 16}]] * 2,
}
RIVALS = ("window only", "elu linear attention", "mamba")  # sub-quadratic, without the paper's feature map
CHOICE_SEED = 2**40  # of the sequences by which a learning rate is chosen; training counts up from 1, the test is 0


def recall_model(arm: str, width: int, vocab: int) -> MixerForCausalLM:
    layers = [["baseconv", {}], *ARMS[arm]]
    torch.manual_seed(0)
    return MixerForCausalLM(
        MixerConfig(vocab_size=vocab, hidden_size=width, layers=layers, intermediate_size=2 * width)
    )


def recall_training(
    arm: str, rate: float, width: int, steps: int, batch: int, task: dict[str, int]
) -> tuple[float, list[float], int, int]:
    """One training on one thread: accuracy on the sequences that choose the rate, those on each test sequence, state bytes, parameters."""
    torch.set_num_threads(1)
    model = recall_model(arm, width, task["vocab"])
    train(model, batches_of(associative_recall, batch, **task), steps=steps, lr=rate, weight_decay=0.0)
    chosen, test = (
        evaluate(model, *associative_recall(256, seed=seed, **task))["accuracy"] for seed in (CHOICE_SEED, 0)
    )
    return (
        float(chosen.mean()),
        test.tolist(),
        model.state_bytes(task["length"]),
        sum(p.numel() for p in model.parameters()),
    )


@experiment(
    "based/recall-gain",
    points={
        "smoke": [
            {
                "pairs": 2,
                "length": 32,
                "width": 32,
                "steps": 20,
                "batch": 16,
                "arms": ["based", "window only"],
                "rates": [3e-3],
            }
        ],
        "small": [
            {
                "pairs": 16,
                "length": 48,
                "width": 64,
                "steps": 2000,
                "batch": 32,
                "arms": list(ARMS),
                "rates": [3e-3, 1e-2],
            }
        ],
        "full": [
            {
                "pairs": pairs,
                "length": 256,
                "width": width,
                "steps": 20_000,
                "batch": 64,
                "arms": list(ARMS),
                "rates": [1e-3, 3e-3, 1e-2],
                "vocab": 256,
            }
            for pairs in (16, 32, 64)
            for width in (64, 128)
        ],
    },
    minutes=60,
)
def recall_gain(
    pairs: int,
    length: int,
    width: int,
    steps: int,
    batch: int,
    arms: list[str],
    rates: list[float],
    vocab: int = 64,
) -> Figure:
    """Points of recall accuracy BASED gains on its best sub-quadratic rival of no more state; all arms are in the details.

    Every arm is trained once with each learning rate; the rate counts that recalls most on sequences kept for that choice.
    The interval is over the test sequences: another seed of the weights may differ by more.
    """
    task = {"length": length, "pairs": pairs, "vocab": vocab}
    runs = [(arm, rate) for arm in arms for rate in rates]
    workers = max(1, min(torch.get_num_threads(), len(runs)))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {run: pool.submit(recall_training, *run, width, steps, batch, task) for run in runs}
        found = {run: future.result() for run, future in futures.items()}
    accuracy: dict[str, Tensor] = {}
    details: dict[str, Any] = {}
    for arm in arms:
        rate = max(rates, key=lambda rate: found[arm, rate][0])
        _, test, state_bytes, parameters = found[arm, rate]
        accuracy[arm] = torch.tensor(test, dtype=torch.float64)
        details[arm] = {
            "accuracy": float(accuracy[arm].mean()),
            "state_bytes": state_bytes,
            "parameters": parameters,
            "learning_rate": rate,
            "accuracy_by_learning_rate": {str(r): sum(found[arm, r][1]) / len(test) for r in rates},
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
    """Greedy generation of `tokens` tokens from `cache`."""
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
    """Generating after a context of real text: attention with its cache against BASED with its states, same width and depth.

    The free baseline is the same attention in bfloat16, weights and cache.
    With `steps` both are trained on the same bytes, and the quality is bits per byte on held-out text; the details split it into
    positions that end a repeated 8-gram, where recall helps, and the others.
    """
    models = {arm: language_model(arm, width, layers) for arm in ("attention", "based")}
    ids = byte_windows(context, batch)[0]
    caches = {arm: prefilled(model, ids) for arm, model in models.items()}
    models["attention, bfloat16"] = copy.deepcopy(models["attention"]).bfloat16()
    caches["attention, bfloat16"] = StateCache(
        [
            {name: x.bfloat16() if x.is_floating_point() else x for name, x in state.items()}
            for state in caches["attention"].states
        ]
    )
    token = ids[:, -1:]

    def run(arm: str) -> None:
        # every run writes after the same context; sums carry over from run to run, which does not affect the time
        generate_from(models[arm], StateCache([dict(state) for state in caches[arm].states]), token, tokens)

    details: dict[str, Any] = {
        "state_bytes": {arm: model.state_bytes(context, batch) for arm, model in models.items()},
        "parameters": {arm: sum(p.numel() for p in models[arm].parameters()) for arm in ("attention", "based")},
        "tokens": tokens * batch,
    }

    def quality() -> Quality:
        inputs, targets = byte_windows(512, 32)
        repeated = repeated_ngrams(inputs, targets)
        bits = {}
        for arm in ("attention", "based"):
            model = models[arm]
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
        free=lambda: run("attention, bfloat16"),
        free_label="attention in bfloat16",
        quality=quality if steps else None,
        details=lambda: details,
        pairs=6,
    )

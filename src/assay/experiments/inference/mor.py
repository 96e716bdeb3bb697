"""Mixture-of-Recursions: operations and memory of training, and throughput of generation, against a vanilla Llama of as many layers.

The quality is that of byte-level models trained here on real code, with everything equal but what is compared; each kind of model has the
learning rate that suits it best (`assay.experiments.rates`). Held-out text is judged under threshold routing, which is causal; the
likelihood under top-k, which looks ahead, stands beside it, and so do arms that were trained with as many operations.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.experiments.core import Figure, Guard, Operator, Quality, Trained, Trial, experiment
from assay.experiments.inference import language
from assay.experiments.mixers.training import in_parallel, over_seeds
from assay.experiments.rates import chosen, searched
from assay.experiments.seeds import paired
from assay.measure.cost import counting
from assay.measure.memory import peak_memory_of_child
from assay.methods.builtin.decode_loop import Decoder
from assay.methods.core.generation.paged import Sequence, pages_for
from assay.methods.inference import mor
from assay.workloads.sequences import byte_batches

SEARCH = "mor/language-model"
SEEDS = (0, 1, 2)
WINDOWS = 64  # held-out windows that are judged
RECIPE: dict[str, int] = {"width": 64, "layers": 6, "recursions": 2, "steps": 300, "length": 64, "batch": 8}
FULL: dict[str, int] = {"width": 128, "layers": 10, "recursions": 2, "steps": 1000, "length": 128, "batch": 8}
DEEP: dict[str, int] = {**FULL, "recursions": 4}
SMOKE: dict[str, int] = {"width": 32, "layers": 4, "recursions": 2, "steps": 20, "length": 64, "batch": 8}

# An arm: the kind of model, and whether it is trained for as many operations as Mixture-of-Recursions instead of as many tokens
ARMS: dict[str, tuple[str, bool]] = {
    "vanilla": ("vanilla", False),
    "mor": ("mor", False),
    "random routing": ("random", False),
    "one recursion": ("one recursion", False),
    "shallow": ("shallow", False),
    "vanilla, equal operations": ("vanilla", True),
    "recursive, equal operations": ("recursive", True),
    "token-choice": ("token", False),
}
SAME_TOKENS = [arm for arm in ARMS if arm in ("vanilla", "mor", "random routing", "one recursion", "shallow")]
KINDS = ("vanilla", "recursive", "mor", "token", "random", "one recursion", "shallow")


class RandomScores(nn.Module):
    """A router that knows nothing: scores that are above 0 with the given probability, whatever the token."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.shift = torch.tensor(share).clamp(1e-4, 1 - 1e-4).logit().item()

    def forward(self, x: Tensor) -> Tensor:
        return torch.rand(*x.shape[:-1], 1, device=x.device).clamp(1e-6, 1 - 1e-6).logit() + self.shift


def language_model(kind: str, recipe: Mapping[str, int], seed: int) -> Any:
    """A new model. "vanilla" has `layers` layers; recursive ones store the first, the last, and as many between as `recursions` rounds
    make that depth of. "one recursion" is those stored layers run once; "shallow" a vanilla model with as many operations as "mor"."""
    width, layers, recursions = recipe["width"], recipe["layers"], recipe["recursions"]
    block = (layers - 2) // recursions
    depth = {"vanilla": layers, "shallow": 2 + round(block * sum(mor.hierarchical(recursions)))}.get(kind, 2 + block)
    base = language.small_llama(width=width, layers=depth, heads=width // 16, seed=seed, intermediate_size=3 * width)
    torch.manual_seed(seed)
    if kind in ("vanilla", "shallow", "one recursion"):
        return base
    router = {"recursive": "none", "token": "token"}.get(kind, "expert")
    model = mor.MoRForCausalLM.from_base(base, recursions=recursions, router=router)
    if kind == "random":
        shares = model.config.shares
        for r, before in enumerate([1.0, *shares[:-1]]):
            model.routers.main[r] = RandomScores(shares[r] / before)
    return model


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy, and what the routers ask for."""
    out = model(inputs)
    loss = F.cross_entropy(out.logits.flatten(0, 1).float(), targets.flatten())
    aux = getattr(out, "aux_loss", None)
    return loss if aux is None else loss + aux


def trained_model(kind: str, recipe: Mapping[str, int], seed: int, rate: float, steps: int) -> Any:
    return language.trained(
        {"kind": kind, **recipe, "seed": seed},
        lambda: language_model(kind, recipe, seed),
        lambda: byte_batches(recipe["length"], recipe["batch"], seed=seed),
        steps=steps,
        rate=rate,
        loss=loss_of,
        sources=[mor, sys.modules[__name__]],
    )


@searched(SEARCH, arms=KINDS, grid=(3e-3, 1e-2, 3e-2))
def rate_loss(kind: str, rate: float) -> float:
    """Nats a byte on documents kept for the choice, at the size and for the steps of `small`."""
    torch.set_num_threads(1)
    model = trained_model(kind, RECIPE, 100, rate, RECIPE["steps"])
    return float(language.nll(model, *language.validation(RECIPE["length"], WINDOWS)).mean())


def training_macs(kind: str, recipe: Mapping[str, int]) -> int:
    """MACs of one training step, forward and backward, counted as it runs."""
    return _training_macs(kind, tuple(sorted(recipe.items())))


@cache
def _training_macs(kind: str, sizes: tuple[tuple[str, int], ...]) -> int:
    recipe = dict(sizes)
    model = language_model(kind, recipe, 0)
    inputs, targets = next(iter(byte_batches(recipe["length"], recipe["batch"], seed=0)))
    with counting(model) as counter:
        loss_of(model, inputs, targets).backward()
    cost = counter.cost()
    if cost.uncounted:
        raise ValueError(f"operators must all be counted, got {cost.uncounted}")
    return cost.macs


def steps_of(arm: str, recipe: Mapping[str, int]) -> int:
    """Steps of training: the recipe's, or as many as cost what Mixture-of-Recursions's do."""
    kind, equal = ARMS[arm]
    return (
        max(1, round(recipe["steps"] * training_macs("mor", recipe) / training_macs(kind, recipe)))
        if equal
        else recipe["steps"]
    )


def model_of(arm: str, seed: int, recipe: Mapping[str, int]) -> Any:
    """The trained model of an arm."""
    kind = ARMS[arm][0]
    return trained_model(kind, recipe, seed, chosen(SEARCH, kind).rate, steps_of(arm, recipe))


def arm_score(arm: str, seed: int, recipe: dict[str, int]) -> dict[str, float]:
    """One model on held-out text: nats a byte as it is used, and with top-k routing; recursions a token; parameters; steps."""
    model = model_of(arm, seed, recipe)
    return evaluated(model, recipe) | {"steps": float(steps_of(arm, recipe))}


def evaluated(model: Any, recipe: Mapping[str, int]) -> dict[str, float]:
    inputs, targets = language.heldout(recipe["length"], WINDOWS)
    torch.manual_seed(0)  # for random routers
    found = {
        "nll": float(language.nll(model, inputs, targets).mean()),
        "parameters": float(sum(p.numel() for p in model.parameters())),
    }
    if isinstance(model, mor.MoRForCausalLM):
        with torch.no_grad():
            found["depth"] = float(torch.cat([model(part).depths for part in inputs.split(16)]).double().mean())
        if model.config.router == "expert":
            model.config.inference = "top_k"
            found["nll_top_k"] = float(language.nll(model, inputs, targets).mean())
            model.config.inference = "threshold"
    return found


def scores(arms: list[str], recipe: Mapping[str, int]) -> dict[str, list[dict[str, float]]]:
    """`arm_score` of each arm under each seed."""
    runs = [(arm, seed, dict(recipe)) for arm in arms for seed in SEEDS]
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
    for (arm, _, _), score in zip(runs, in_parallel(arm_score, runs), strict=True):
        found[arm].append(score)
    return found


def of(found: Mapping[str, list[dict[str, float]]], arm: str, name: str = "nll") -> list[float]:
    return [score[name] for score in found[arm]]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def quality_of(found: Mapping[str, list[dict[str, float]]], baseline: str) -> Quality:
    """Mixture-of-Recursions against the vanilla arm, with Student's t over the seeds' differences."""
    lost = paired(of(found, "mor"), of(found, baseline))
    base = mean(of(found, baseline))
    named = {"deleted": "one recursion", "random": "random routing", "rival": "shallow"}
    controls = {name: mean(of(found, arm)) for name, arm in named.items()}
    others = {arm: mean(of(found, arm)) for arm in found if arm not in (*named.values(), "mor", baseline)}
    if "nll_top_k" in found["mor"][0]:
        others["mor, top-k routing (looks ahead)"] = mean(of(found, "mor", "nll_top_k"))
    rival = "a vanilla model with fewer layers and as many operations"
    return Quality(base + lost.median, base, base + lost.low, base + lost.high, controls | others, rival)


def as_trained(found: Mapping[str, list[dict[str, float]]], recipe: Mapping[str, int]) -> dict[str, Trained]:
    """All arms, with the floor of a table of pairs of bytes."""
    floor = language.bigram_floor(*language.heldout(recipe["length"], WINDOWS))
    rates = {arm: chosen(SEARCH, ARMS[arm][0]) for arm in found}
    return {arm: Trained(of(found, arm), floor, "a bigram table", rates[arm].rate, rates[arm].rates) for arm in found}


GUARD = Guard(
    "nats a byte of held-out code", margin=0.01
)  # what the paper's best model gains at equal operations: 2.7824 to 2.7511
TRAINED_HERE = {
    "width": "a model of 315M parameters cannot be trained here",
    "layers": "fewer: the first and the last, which are not shared, weigh more, so that less is saved",
    "steps": "as many as fit into the minutes of a scale; the same tokens for every arm but those of equal operations",
    "length": "shorter, so that attention weighs less, whose operations fall with the square of a capacity",
    "batch": "smaller, for the same reason as the width",
}
PAPER: dict[str, Any] = {
    "recursions": 2, "sharing": "middle_cycle", "router": "expert", "width": 960, "layers": 32, "length": 2048,
    "batch": 1024, "steps": "20B tokens of FineWeb-Edu",
}  # fmt: skip

TRAINING = Operator(
    "training a decoder on a fixed number of tokens",
    free="the vanilla model as it is, with its layers recomputed in the backward pass where memory is what counts",
)


@experiment(
    "mor/training-flops",
    points={"smoke": [{"recipe": SMOKE}], "small": [{"recipe": RECIPE}], "full": [{"recipe": FULL}]},
    operator=TRAINING,
    guard=GUARD,
    paper=PAPER,
    departures=TRAINED_HERE,
    refuted_if="a training step of Mixture-of-Recursions does as many operations as the vanilla model's, or more",
    minutes=240,
)
def training_flops(recipe: dict[str, int]) -> Figure:
    """Per cent of the operations of a training step, forward and backward, that two recursions save on as many layers of a vanilla model.

    They are counted as the step runs, routers and all, so the figure is exact. The quality is that after the same tokens. What the same
    count is for the paper's 360M model, by the formula that a test holds to the counter, stands in the details.
    """
    found = scores(list(ARMS), recipe)
    macs = {kind: training_macs(kind, recipe) for kind in KINDS if kind not in ("token", "random")}

    def saved(kind: str) -> float:
        return 100 * (1 - macs[kind] / macs["vanilla"])

    return Figure(
        saved("mor"),
        "%",
        baseline=0.0,
        free=0.0,
        arms={"recursive": saved("recursive"), "shallow": saved("shallow")},
        quality=quality_of(found, "vanilla"),
        trained=as_trained(found, recipe),
        details={"macs_a_step": macs, "arms": found, "saved_at_360M_percent": saved_at_360m()},
    )


def saved_at_360m() -> float:
    """Per cent of the MACs of a forward pass over 2048 tokens that two recursions save on SmolLM-360M's shape, by the formula."""
    from transformers import LlamaConfig

    sizes = {"hidden_size": 960, "intermediate_size": 2560, "num_attention_heads": 15, "num_key_value_heads": 5}
    shape: dict[str, Any] = {**sizes, "vocab_size": 49152}
    vanilla = mor.MoRConfig(LlamaConfig(num_hidden_layers=32, **shape), recursions=1, router="none")
    ours = mor.MoRConfig(LlamaConfig(num_hidden_layers=17, **shape), recursions=2)
    return 100 * (1 - mor.forward_macs(ours, 2048) / mor.forward_macs(vanilla, 2048))


# ------------------------------------------------------------------------------------------------------------------------ memory


def two_steps(way: str, width: int, layers: int, recursions: int, batch: int, length: int) -> None:
    """Two steps of training with AdamW, the second with its moments: run in a process of its own to see its peak memory."""
    torch.set_num_threads(1)
    recipe = {"width": width, "layers": layers, "recursions": recursions}
    model = language_model("vanilla" if way == "recomputed" else way, recipe, 0)
    if way == "recomputed":
        model.activation_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    stream = iter(byte_batches(length, batch, seed=0))
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model, *next(stream)).backward()
        optimizer.step()


def peak_of(way: str, sizes: Mapping[str, int]) -> int:
    """Bytes of memory that a fresh process takes for two steps of training, beyond its imports."""
    found = peak_memory_of_child("assay.experiments.inference.mor:two_steps", {"way": way, **sizes}, timeout_s=1200)
    return found.extra_bytes


@experiment(
    "mor/peak-memory",
    points={
        "smoke": [{"width": 64, "layers": 4, "batch": 2, "length": 64, "repeats": 2, "recipe": SMOKE}],
        "small": [{"width": 256, "layers": 10, "batch": 4, "length": 256, "repeats": 3, "recipe": RECIPE}],
        "full": [{"width": 960, "layers": 32, "batch": 4, "length": 512, "repeats": 3, "recipe": FULL}],
    },
    operator=TRAINING,
    guard=GUARD,
    paper=PAPER,
    departures={
        **TRAINED_HERE,
        "width": "the paper's at full for memory, whose models need no training; narrower at small, and where quality is trained",
        "layers": "the paper's at full for memory; 10 at small, and 6 or 10 where quality is trained",
    },
    refuted_if="training Mixture-of-Recursions takes as much memory as training the vanilla model, or more",
    minutes=240,
    memory_gib=20.0,
)
def peak_memory(width: int, layers: int, batch: int, length: int, repeats: int, recipe: dict[str, int]) -> Figure:
    """Per cent of a training process's peak memory that two recursions save on a vanilla model of as many layers, in float32 with AdamW.

    `repeats` processes of either, with Student's t over their savings. Free recomputes the vanilla model's layers in the backward pass, as
    transformers do on request, which costs time and no quality. The quality is that of the smaller models of `recipe`.
    """
    sizes = {"width": width, "layers": layers, "recursions": 2, "batch": batch, "length": length}
    often = {"vanilla": repeats, "mor": repeats, "recomputed": 1}
    if repeats > 2:
        often |= {"recursive": 1, "shallow": 1}
    peaks = {way: [peak_of(way, sizes) for _ in range(n)] for way, n in often.items()}
    usual = mean([float(peak) for peak in peaks["vanilla"]])
    saved = over_seeds([100 * (1 - b / a) for a, b in zip(peaks["vanilla"], peaks["mor"], strict=True)])
    found = scores(SAME_TOKENS, recipe)
    return Figure(
        saved.median,
        "%",
        low=saved.low,
        high=saved.high,
        baseline=0.0,
        free=100 * (1 - peaks["recomputed"][0] / usual),
        arms={way: 100 * (1 - peaks[way][0] / usual) for way in ("recursive", "shallow") if way in peaks},
        quality=quality_of(found, "vanilla"),
        trained=as_trained(found, recipe),
        details={"peak_bytes": peaks, "arms": found},
    )


# -------------------------------------------------------------------------------------------------------------------- generation

GENERATION = Operator(
    "generation for many requests by a decoder",
    free="the vanilla model in bfloat16 by torch, finished rows replaced by the next request",
    exact="the vanilla model in bfloat16 by assay's compiled decode loop, the same requests",
)


def prompts_of(requests: int, length: int) -> list[list[int]]:
    """Bytes of held-out code that requests begin with."""
    found: list[list[int]] = language.heldout(length, requests)[0].tolist()
    return found


def by_loop(decoder: Decoder, prompts: list[list[int]], tokens: int, lanes: int) -> list[list[int]]:
    """The compiled loop on the same requests, as many at a time; all answers are equally long, so that no lane waits."""
    answers: list[list[int]] = []
    pages = pages_for(len(prompts[0]) + tokens)
    pool = decoder.new_pool(lanes * pages)
    for start in range(0, len(prompts), lanes):
        batch = prompts[start : start + lanes]
        sequences = [Sequence(pool.take(pages), 0) for _ in batch]
        decoder.extend(pool, [(s, prompt[:-1]) for s, prompt in zip(sequences, batch, strict=True)], logits="none")
        answers += decoder.run(pool, sequences, [prompt[-1] for prompt in batch], tokens)[0].tolist()
        for sequence in sequences:
            pool.release(sequence.pages)
    return answers


@torch.no_grad()
def step_by_step(model: Any, prompts: list[list[int]], tokens: int, lanes: int) -> list[list[int]]:
    """Batches of rows, one token of each a step; in a step, recursions after the first run the rows that are still in them."""
    answers: list[list[int]] = []
    for start in range(0, len(prompts), lanes):
        out = model(torch.tensor(prompts[start : start + lanes]), use_cache=True, logits_to_keep=1)
        made = [out.logits[:, -1:].argmax(-1)]
        for _ in range(tokens - 1):
            out = model(made[-1], cache=out.cache, use_cache=True)
            made.append(out.logits[:, -1:].argmax(-1))
        answers += torch.cat(made, 1).tolist()
    return answers


@experiment(
    "mor/inference-throughput",
    points={
        "smoke": [{"lanes": 4, "requests": 8, "prompt": 8, "tokens": 4, "recipe": SMOKE}],
        "small": [{"lanes": 32, "requests": 64, "prompt": 16, "tokens": 32, "recipe": RECIPE}],
        "full": [{"lanes": 32, "requests": 128, "prompt": 16, "tokens": 256, "recipe": DEEP}],
    },
    operator=GENERATION,
    paper={**PAPER, "recursions": 4, "lanes": 32, "tokens": 256, "prompt": 1},
    departures={
        **TRAINED_HERE,
        "recursions": "two at small, whose models are those of the other claims",
        "tokens": "32 an answer at small; all answers are equally long, where the paper's lengths vary around 256",
        "prompt": "a few bytes of real code, so that the routers see what they were trained on",
        "lanes": "the paper's smaller batch; with the largest that memory holds its models gain more",
    },
    guard=GUARD,
    refuted_if="generation with depth-wise batching is slower than with the vanilla model in the same batch, the whole interval below 1x",
    minutes=240,
)
def inference_throughput(lanes: int, requests: int, prompt: int, tokens: int, recipe: dict[str, int]) -> Trial:
    """All requests answered, `lanes` at a time: the vanilla model, and Mixture-of-Recursions with depth-wise continuous batching.

    Both go through the same code and cache, whose vanilla setting runs every layer on every row once a token; prompts included. Both were
    trained with as many operations, on real code, and route by the threshold. Arms: the recursive model with all recursions,
    and Mixture-of-Recursions without depth-wise batching.
    """
    vanilla, ours = model_of("vanilla, equal operations", 0, recipe), model_of("mor", 0, recipe)
    plain = mor.MoRForCausalLM.from_base(vanilla, recursions=1, router="none")
    whole = mor.MoRForCausalLM.from_base(ours.base, recursions=recipe["recursions"], router="none")
    half = mor.MoRForCausalLM.from_base(
        model_of("vanilla, equal operations", 0, recipe).bfloat16(), recursions=1, router="none"
    )
    decoder = Decoder(vanilla, weights="bf16", cache="bfloat16")
    asked = prompts_of(requests, prompt)

    def depthwise(model: Any) -> Callable[[], mor.Generated]:
        return lambda: mor.generate_depthwise(model, asked, tokens, lanes=lanes)

    kept: dict[str, list[dict[str, float]]] = {}

    def judged() -> dict[str, list[dict[str, float]]]:
        if not kept:
            kept.update(scores([arm for arm in ARMS if arm != "vanilla"], recipe))
        return kept

    def details() -> dict[str, Any]:
        made = {"vanilla": depthwise(plain)(), "mor": depthwise(ours)()}
        caches = {
            name: model(torch.tensor(asked[:lanes]), use_cache=True).cache.bytes()
            for name, model in (("vanilla", plain), ("mor", ours))
        }
        return {
            "tokens": requests * tokens,
            "ticks": {name: found.ticks for name, found in made.items()},
            "depths": {name: found.depths for name, found in made.items()},
            "cache_bytes_behind_prompts": caches,
            "arms": judged(),
        }

    return Trial(
        baseline=depthwise(plain),
        candidate=depthwise(ours),
        free=depthwise(half),
        exact=lambda: by_loop(decoder, asked, tokens, lanes),
        arms={
            "recursive, all recursions": depthwise(whole),
            "mor without depth-wise batching": lambda: step_by_step(ours, asked, tokens, lanes),
        },
        quality=lambda: quality_of(judged(), "vanilla, equal operations"),
        trained=lambda: as_trained(judged(), recipe),
        details=details,
    )

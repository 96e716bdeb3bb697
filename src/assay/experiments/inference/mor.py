"""Mixture-of-Recursions: operations and memory of training, and throughput of generation, against a vanilla Llama of as many layers.

The quality is that of byte-level models trained here on real code, for as many steps on the same batches, each arm at the learning rate
that suits it best (`assay.experiments.rates`). Held-out text is judged under threshold routing, which is causal; the likelihood under
top-k, which looks ahead, stands beside it.

Arms: "one recursion" runs the stored layers once (the method deleted); "random routing" keeps the learned gates and draws which tokens go
on; "gate only" sends all tokens through all recursions, gated; "recursive" does so without a gate; "shallow" is a vanilla model of as many
operations; "fewer steps" is the vanilla model, trained with as many operations in all.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.experiments.beside import beside
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
SEEDS = (0, 1, 2, 3, 4)  # of what the verdict compares; the first three of the other arms
Recipe = Mapping[str, Any]
RECIPE: dict[str, Any] = {
    "width": 64, "layers": 4, "recursions": 2, "sharing": "middle_cycle", "steps": 500, "length": 64, "batch": 8,
    "windows": 512,  # of held-out text that are judged
}  # fmt: skip
FULL: dict[str, Any] = {**RECIPE, "width": 128, "layers": 10, "steps": 2000, "length": 128}
DEEP: dict[str, Any] = {**FULL, "recursions": 4}
SMOKE: dict[str, Any] = {**RECIPE, "width": 32, "steps": 10, "windows": 64}
ARMS = (
    "vanilla",
    "mor",
    "random routing",
    "one recursion",
    "shallow",
    "fewer steps",
    "recursive",
    "gate only",
)
CONTROLS = {"deleted": "one recursion", "random": "random routing", "rival": "shallow"}


class RandomChoice(mor.MoRForCausalLM):
    """Mixture-of-Recursions whose routers weigh the outputs of the blocks and do not choose: which tokens go on is drawn, as many."""

    def choose(
        self, recursion: int, share: float, scores: Tensor, predicted: Tensor, alive: Tensor, lengths: Tensor
    ) -> Tensor:
        by_rank = self.training or self.config.inference == "top_k"
        drawn = torch.rand_like(scores) if by_rank else scores
        return super().choose(recursion, share, drawn, predicted, alive, lengths)

    def goes_on(self, recursion: int, predicted: Tensor) -> Tensor:
        share, before = self.config.shares[recursion], self.config.shares[recursion - 1]
        return torch.rand_like(predicted) < share / before


def depths_of(recipe: Recipe) -> tuple[int, float]:
    """How many layers are stored, and how many have as many operations as Mixture-of-Recursions."""
    ends = 2 if recipe["sharing"].startswith("middle") else 0
    block = (recipe["layers"] - ends) // recipe["recursions"]
    return ends + block, ends + block * sum(mor.hierarchical(recipe["recursions"]))


def language_model(arm: str, recipe: Recipe, seed: int) -> Any:
    """A new model of an arm (see the module)."""
    width, recursions = recipe["width"], recipe["recursions"]
    stored, equal = depths_of(recipe)
    depth = {"vanilla": recipe["layers"], "fewer steps": recipe["layers"], "shallow": int(equal)}.get(arm, stored)
    inner = 3 * width
    if arm == "shallow":  # a part of a layer goes into the MLPs: a layer has 4 + 3 * 3 matrices of width x width
        inner += round((equal - depth) * 13 * width / (3 * depth))
    base = language.small_llama(width=width, layers=depth, heads=width // 16, seed=seed, intermediate_size=inner)
    torch.manual_seed(seed)
    settings: dict[str, dict[str, Any]] = {
        "mor": {},
        "recursive": {"router": "none"},
        # the auxiliary loss teaches routers a choice that is not theirs here
        "random routing": {"aux_weight": 0.0},
        "gate only": {"aux_weight": 0.0, "capacities": [1.0] * recursions},
    }
    if arm not in settings:
        return base
    kind = RandomChoice if arm == "random routing" else mor.MoRForCausalLM
    return kind.from_base(base, recursions=recursions, sharing=recipe["sharing"], **settings[arm])


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy, and what the routers ask for."""
    out = model(inputs)
    loss = F.cross_entropy(out.logits.flatten(0, 1).float(), targets.flatten())
    aux = getattr(out, "aux_loss", None)
    return loss if aux is None else loss + aux


def trained_model(arm: str, recipe: Recipe, seed: int, rate: float) -> Any:
    return language.trained(
        {"arm": arm, **recipe, "seed": seed},
        lambda: language_model(arm, recipe, seed),
        lambda: byte_batches(recipe["length"], recipe["batch"], seed=seed),
        steps=steps_of(arm, recipe),
        rate=rate,
        loss=loss_of,
        sources=[mor, sys.modules[__name__]],
    )


@searched(SEARCH, arms=ARMS, grid=(3e-3, 1e-2, 3e-2))
def rate_loss(arm: str, rate: float) -> float:
    """Nats a byte on documents kept for the choice, at the size and for the steps of `small`."""
    torch.set_num_threads(1)
    model = trained_model(arm, RECIPE, 100, rate)
    torch.manual_seed(0)  # for random choices
    return float(language.nll(model, *language.validation(RECIPE["length"], RECIPE["windows"])).mean())


def training_macs(arm: str, recipe: Recipe) -> int:
    """MACs of one training step, forward and backward, counted as it runs."""
    return _training_macs(arm, tuple(sorted(recipe.items())))


@cache
def _training_macs(arm: str, sizes: tuple[tuple[str, Any], ...]) -> int:
    recipe = dict(sizes)
    model = language_model(arm, recipe, 0)
    inputs, targets = next(iter(byte_batches(recipe["length"], recipe["batch"], seed=0)))
    with counting(model) as counter:
        loss_of(model, inputs, targets).backward()
    cost = counter.cost()
    if cost.uncounted:
        raise ValueError(f"operators must all be counted, got {cost.uncounted}")
    return cost.macs


def steps_of(arm: str, recipe: Recipe) -> int:
    """Steps of training: the recipe's, or as many as cost what Mixture-of-Recursions's do."""
    steps: int = recipe["steps"]
    return round(steps * training_macs("mor", recipe) / training_macs(arm, recipe)) if arm == "fewer steps" else steps


def model_of(arm: str, seed: int, recipe: Recipe) -> Any:
    """The trained model of an arm."""
    return trained_model(arm, recipe, seed, chosen(SEARCH, arm).rate)


def arm_score(arm: str, seed: int, recipe: dict[str, Any]) -> dict[str, float]:
    """One model on held-out text: nats a byte as it is used, and with top-k routing; recursions a token; parameters; steps."""
    return evaluated(model_of(arm, seed, recipe), recipe) | {"steps": float(steps_of(arm, recipe))}


def evaluated(model: Any, recipe: Recipe) -> dict[str, float]:
    inputs, targets = language.heldout(recipe["length"], recipe["windows"])
    torch.manual_seed(0)  # for random choices
    found = {
        "nll": float(language.nll(model, inputs, targets).mean()),
        "parameters": float(sum(p.numel() for p in model.parameters())),
    }
    if isinstance(model, mor.MoRForCausalLM):
        with torch.no_grad():
            found["depth"] = float(torch.cat([model(part).depths for part in inputs.split(16)]).double().mean())
        if model.config.router == "expert" and min(model.config.shares) < 1:
            model.config.inference = "top_k"
            found["nll_top_k"] = float(language.nll(model, inputs, targets).mean())
            model.config.inference = "threshold"
    return found


def scores(recipe: Recipe) -> dict[str, list[dict[str, float]]]:
    """`arm_score` of each arm under its seeds."""
    often = {arm: len(SEEDS) if arm in ("vanilla", "mor", *CONTROLS.values()) else 3 for arm in ARMS}
    runs = [(arm, seed, dict(recipe)) for arm in ARMS for seed in SEEDS[: often[arm]]]
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for (arm, _, _), score in zip(runs, in_parallel(arm_score, runs), strict=True):
        found[arm].append(score)
    return found


def of(found: Mapping[str, list[dict[str, float]]], arm: str, name: str = "nll") -> list[float]:
    return [score[name] for score in found[arm]]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def quality_of(found: Mapping[str, list[dict[str, float]]]) -> Quality:
    """Mixture-of-Recursions against the vanilla arm, with Student's t over the seeds' differences; other arms each over its own seeds."""
    vanilla = of(found, "vanilla")
    lost, base = paired(of(found, "mor"), vanilla), mean(vanilla)
    controls = {name: beside(of(found, arm), vanilla) for name, arm in CONTROLS.items()}
    own = (*CONTROLS.values(), "mor", "vanilla")
    others = {arm: beside(of(found, arm), vanilla) for arm in found if arm not in own}
    if "nll_top_k" in found["mor"][0]:
        others["mor, top-k routing (looks ahead)"] = beside(of(found, "mor", "nll_top_k"), vanilla)
    rival = "a vanilla model with fewer layers and as many operations"
    return Quality(base + lost.median, base, base + lost.low, base + lost.high, controls | others, rival)


def as_trained(found: Mapping[str, list[dict[str, float]]], recipe: Recipe) -> dict[str, Trained]:
    """All arms, with the floor of a table of pairs of bytes."""
    floor = language.bigram_floor(*language.heldout(recipe["length"], recipe["windows"]))
    rates = {arm: chosen(SEARCH, arm) for arm in found}
    return {arm: Trained(of(found, arm), floor, "a bigram table", rates[arm].rate, rates[arm].rates) for arm in found}


GUARD = Guard(
    "nats a byte of held-out code", margin=0.01
)  # what the paper's best model gains at equal operations: 2.7824 to 2.7511
TRAINED_HERE = {
    "width": "a model of 315M parameters cannot be trained here",
    "layers": "fewer, for the same reason",
    "steps": "as many as fit into the minutes of a scale, on code; the same tokens for every arm but 'fewer steps'",
    "length": "shorter, so that attention weighs less, whose operations fall with the square of a capacity",
    "batch": "smaller, for the same reason as the width",
    "rate": "searched at the size and steps of small, and used at the others too",
}
PAPER: dict[str, Any] = {
    "recursions": 2, "sharing": "middle_cycle", "router": "expert", "width": 960, "layers": 32, "length": 2048,
    "batch": 1024, "steps": "20B tokens of FineWeb-Edu",
}  # fmt: skip

TRAINING = Operator(
    "training a decoder on a fixed number of tokens",
    free="the vanilla model as it is, with its layers recomputed in the backward pass where memory is what counts",
)


# ---------------------------------------------------------------------------------------------------------------------- operations


@experiment(
    "mor/training-flops",
    points={"smoke": [{"recipe": SMOKE}], "small": [{"recipe": RECIPE}], "full": [{"recipe": FULL}]},
    operator=TRAINING,
    guard=GUARD,
    paper=PAPER,
    departures=TRAINED_HERE,
    refuted_if="a training step of Mixture-of-Recursions does as many operations as the vanilla model's, or more",
    computed="it follows from the widths, layers and capacities of the paper's 360M model; models of it are not trained here",
    minutes=240,
)
def training_flops(recipe: dict[str, Any]) -> Figure:
    """Per cent of the operations of training that two recursions save on the paper's 360M model: arithmetic on its sizes.

    Every product is done once forward and twice backward, so that what is saved of a forward pass is saved of training. The count of real
    training steps, forward and backward, is in the details for the models that are trained here; the quality is theirs. Arms by the same
    formula: the ablations, the shallow vanilla model, and one recursion, which is the method deleted.
    """
    found = scores(recipe)
    macs = {arm: training_macs(arm, recipe) for arm in ARMS}
    return Figure(
        saved_at_360m("mor"),
        "%",
        baseline=0.0,
        free=0.0,
        arms={arm: saved_at_360m(arm) for arm in ("recursive", "gate only", "shallow", "one recursion")},
        quality=quality_of(found),
        trained=as_trained(found, recipe),
        details={
            "counted_macs_a_step": macs,
            "counted_saving_percent": {arm: 100 * (1 - macs[arm] / macs["vanilla"]) for arm in ARMS},
            "arms": found,
        },
    )


def saved_at_360m(arm: str) -> float:
    """Per cent of the MACs of a forward pass over 2048 tokens that an arm saves on SmolLM-360M's shape, by the formula.

    The shallow model has 24 layers, half a layer less than has as many operations; with one recursion 17 layers are left.
    """
    from transformers import LlamaConfig

    sizes = {"hidden_size": 960, "intermediate_size": 2560, "num_attention_heads": 15, "num_key_value_heads": 5}
    shape: dict[str, Any] = {**sizes, "vocab_size": 49152}
    stored, equal = depths_of({"layers": 32, "recursions": 2, "sharing": "middle_cycle"})
    plain = {"vanilla": 32, "shallow": int(equal), "one recursion": stored}
    settings: dict[str, Any] = {"mor": {}, "recursive": {"router": "none"}, "gate only": {"capacities": [1.0, 1.0]}}

    def macs(arm: str) -> int:
        base = LlamaConfig(num_hidden_layers=plain.get(arm, stored), **shape)
        if arm in plain:
            config = mor.MoRConfig(base, recursions=1, router="none")
        else:
            config = mor.MoRConfig(base, recursions=2, **settings[arm])
        return mor.forward_macs(config, 2048)

    return 100 * (1 - macs(arm) / macs("vanilla"))


# -------------------------------------------------------------------------------------------------------------------------- memory


def two_steps(way: str, sizes: dict[str, Any]) -> None:
    """Two steps of training with AdamW, the second with its moments: run in a process of its own to see its peak memory."""
    torch.set_num_threads(1)
    arm, _, recomputed = way.partition(", ")
    model = language_model(arm, sizes, 0)
    if recomputed:
        model.activation_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    stream = iter(byte_batches(sizes["length"], sizes["batch"], seed=0))
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model, *next(stream)).backward()
        optimizer.step()


def peak_of(way: str, sizes: Recipe) -> int:
    """Bytes of memory that a fresh process takes for two steps of training, beyond its imports."""
    kwargs = {"way": way, "sizes": dict(sizes)}
    return peak_memory_of_child("assay.experiments.inference.mor:two_steps", kwargs, timeout_s=1200).extra_bytes


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
        "layers": "the paper's at full for memory; 10 at small, and fewer where quality is trained",
    },
    refuted_if="training Mixture-of-Recursions takes as much memory as training the vanilla model, or more",
    minutes=240,
    memory_gib=20.0,
)
def peak_memory(width: int, layers: int, batch: int, length: int, repeats: int, recipe: dict[str, Any]) -> Figure:
    """Per cent of a training process's peak memory that two recursions save on a vanilla model of as many layers, in float32 with AdamW.

    `repeats` processes of either, with Student's t over their savings. Free recomputes the vanilla model's layers in the backward pass, as
    transformers do on request, which costs a third more operations and no quality; Mixture-of-Recursions recomputed is an arm, and so is
    one recursion, the method deleted. The quality is that of the smaller models of `recipe`.
    """
    sizes = {
        "width": width, "layers": layers, "recursions": 2, "sharing": "middle_cycle", "batch": batch, "length": length,
    }  # fmt: skip
    often = {"vanilla": repeats, "mor": repeats, "vanilla, recomputed": 1}
    arms = ("mor, recomputed", "recursive", "shallow", "one recursion") if repeats > 2 else ()
    peaks = {way: [peak_of(way, sizes) for _ in range(n)] for way, n in (often | dict.fromkeys(arms, 1)).items()}
    usual = mean([float(peak) for peak in peaks["vanilla"]])
    saved = over_seeds([100 * (1 - b / a) for a, b in zip(peaks["vanilla"], peaks["mor"], strict=True)])
    found = scores(recipe)
    return Figure(
        saved.median,
        "%",
        low=saved.low,
        high=saved.high,
        baseline=0.0,
        free=100 * (1 - peaks["vanilla, recomputed"][0] / usual),
        arms={way: 100 * (1 - peaks[way][0] / usual) for way in arms},
        quality=quality_of(found),
        trained=as_trained(found, recipe),
        details={"peak_bytes": peaks, "arms": found},
    )


# ---------------------------------------------------------------------------------------------------------------------- generation

GENERATION = Operator(
    "generation for many requests by a decoder",
    free="the vanilla model in bfloat16 by transformers' own forward pass, token by token in inference mode",
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


@torch.inference_mode()
def step_by_step(model: Any, prompts: list[list[int]], tokens: int, lanes: int) -> list[list[int]]:
    """Batches of rows, one token of each a step, by the forward pass of any model of transformers and its own cache.

    Of Mixture-of-Recursions: in a step, recursions after the first run the rows that are still in them.
    """
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
        "small": [{"lanes": 128, "requests": 256, "prompt": 16, "tokens": 32, "recipe": RECIPE}],
        "full": [{"lanes": 32, "requests": 128, "prompt": 16, "tokens": 256, "recipe": DEEP}],
    },
    operator=GENERATION,
    paper={**PAPER, "recursions": 4, "lanes": 32, "tokens": 256, "prompt": 1},
    departures={
        **TRAINED_HERE,
        "recursions": "two at small, whose models are those of the other claims",
        "tokens": "32 an answer at small; all answers are equally long, where the paper's lengths vary around 256",
        "prompt": "a few bytes of real code, so that the routers see what they were trained on",
        "lanes": "the paper's smaller batch at full; at small more, as in its other setting: with few rows, calls are what costs",
    },
    guard=GUARD,
    refuted_if="generation with depth-wise batching is slower than the vanilla model in the same batch, the whole interval below 1x",
    minutes=240,
)
def inference_throughput(lanes: int, requests: int, prompt: int, tokens: int, recipe: dict[str, Any]) -> Trial:
    """All requests answered, prompts included, `lanes` at a time: the vanilla model token by token, and Mixture-of-Recursions with
    depth-wise continuous batching, which routes by the threshold. Both were trained on as many tokens of real code.

    At the widths of `small` much of a step's time is that of calling its operators, and with one shared layer between two that stand alone
    depth-wise batching calls no fewer: what it can save there is arithmetic, an eighth at most. Arms: the shallow vanilla model of as many
    operations; the stored layers run once, the method deleted; the recursive model, all of whose tokens take all recursions;
    Mixture-of-Recursions whose tokens are drawn, and Mixture-of-Recursions without depth-wise batching.
    """
    vanilla, shallow, once = (model_of(arm, 0, recipe) for arm in ("vanilla", "shallow", "one recursion"))
    ours, whole, drawn = (model_of(arm, 0, recipe) for arm in ("mor", "recursive", "random routing"))
    half = model_of("vanilla", 0, recipe).bfloat16()
    decoder = Decoder(vanilla, weights="bf16", cache="bfloat16")
    asked = prompts_of(requests, prompt)

    def plain(model: Any) -> Callable[[], list[list[int]]]:
        return lambda: step_by_step(model, asked, tokens, lanes)

    def depthwise(model: Any) -> Callable[[], mor.Generated]:
        return lambda: mor.generate_depthwise(model, asked, tokens, lanes=lanes)

    kept: dict[str, list[dict[str, float]]] = {}

    def judged() -> dict[str, list[dict[str, float]]]:
        if not kept:
            kept.update(scores(recipe))
        return kept

    def details() -> dict[str, Any]:
        made = depthwise(ours)()
        with torch.inference_mode():
            held = ours(torch.tensor(asked[:lanes]), use_cache=True).cache
        base = ours.base.config
        pair = 2 * base.num_key_value_heads * base.hidden_size // base.num_attention_heads * 4
        return {
            "tokens": requests * tokens,
            "ticks": made.ticks,
            "depths": made.depths,
            "recursions_a_token": made.rows / (requests * tokens),
            "cache_bytes_behind_prompts": {"vanilla": lanes * prompt * recipe["layers"] * pair, "mor": held.bytes()},
            "arms": judged(),
        }

    return Trial(
        baseline=plain(vanilla),
        candidate=depthwise(ours),
        free=plain(half),
        exact=lambda: by_loop(decoder, asked, tokens, lanes),
        arms={
            "shallow": plain(shallow),
            "one recursion": plain(once),
            "recursive, all recursions": depthwise(whole),
            "random routing": depthwise(drawn),
            "mor without depth-wise batching": plain(ours),
        },
        quality=lambda: quality_of(judged()),
        trained=lambda: as_trained(judged(), recipe),
        details=details,
    )

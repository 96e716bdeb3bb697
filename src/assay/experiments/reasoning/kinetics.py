"""Kinetics: what choosing by FLOPs alone loses, and how much less decoding costs when it reads the best blocks of the
cache alone.

Sparse decoding: SmolLM2-135M, several long answers at once, each with keys and values of its own. What stands in the
cache does not change how long dense attention takes, and hardly how long choosing does, so that the caches that are
timed repeat 1024 tokens of real text. The quality is that of whole documents as long as those caches, decoded token by
token behind the dense prompt.

Choosing: configurations of one model, by how much of a text it sees and how many trials it has. Their coverage comes
from the chance that the model gives to the text's own next tokens, their cost from the two laws, and what is paid is
the measured time of a decoding step. Models of several sizes, which the paper chooses among, are not at hand: here
context raises the chance of a trial, and the keys it reads.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import StaticCache

from assay.experiments.core import Figure, Guard, Operator, Quality, Trial, experiment
from assay.measure.cost import count_cost
from assay.measure.machine import calibrate
from assay.measure.stats import student_interval
from assay.methods.builtin.decode_loop import Decoder
from assay.methods.core.attention.integration import store_settings
from assay.methods.core.generation.paged import PagePool, pages_for
from assay.methods.core.generation.paged import Sequence as Paged
from assay.methods.reasoning.kinetics import (
    HARDWARE,
    BlockCache,
    BlockTopK,
    Option,
    Work,
    cheapest,
    cost,
    extra_cost,
    fitted,
    shape_of,
    use_block_topk,
)
from assay.methods.reasoning.kinetics.attention import SETTINGS
from assay.workloads.models import load_model
from assay.workloads.text import calibration_windows, heldout_windows, long_prompt

Part = Literal["learn", "judged"]
PARTS: tuple[Part, ...] = ("learn", "judged")  # of the documents
READ = 1024  # tokens of real text in the caches that are timed, repeated
DENSE = BlockTopK(budget=1 << 30, dense_layers=())
ELEMENT = 4  # bytes of float32, in which everything here runs
B200 = HARDWARE["B200"].intensity  # with keys of 2 bytes, as the paper has them
RECENT, RANDOM, TOKENS = "sinks and the newest tokens", "random blocks", "single tokens chosen"


@functools.cache
def model_and_tokenizer() -> tuple[Any, Any]:
    """SmolLM2-135M in float32, decoding with block top-k, dense until `settled` says otherwise."""
    loaded = load_model("smollm2-135m", dtype=torch.float32)
    return use_block_topk(loaded.model, DENSE), loaded.tokenizer


@functools.cache
def stock_model() -> Any:
    """The same as transformers runs it, with SDPA."""
    return load_model("smollm2-135m", dtype=torch.float32).model


def settled(settings: BlockTopK) -> Any:
    """The model with these settings of its attention."""
    model = model_and_tokenizer()[0]
    store_settings(model, SETTINGS, settings)
    return model


@torch.no_grad()
def prefilled(ids: Tensor) -> BlockCache:
    """The cache of prompts (rows, tokens), each row read by itself with dense attention."""
    model = settled(DENSE)
    rows = []
    for row in ids.split(1):
        cache = BlockCache(model.config)
        model(row, cache=cache, logits_to_keep=1)
        rows.append(cache)
    if len(rows) == 1:
        return rows[0]
    whole = BlockCache(model.config)
    layers: list[Any] = list(whole.layers)
    for index, layer in enumerate(layers):
        parts: list[Any] = [cache.layers[index] for cache in rows]
        layer.update(torch.cat([one.keys for one in parts]), torch.cat([one.values for one in parts]))
    return whole


@functools.cache
def text_cache(tokens: int) -> BlockCache:
    """The cache of so many tokens of real text, read once."""
    return prefilled(long_prompt(model_and_tokenizer()[1], tokens))


def filled(cache: Any, source: BlockCache, rows: int, tokens: int) -> Any:
    """`cache` with `rows` rows of `tokens` tokens, the first row of `source` over and over."""
    layers: Any = source.layers
    for index, layer in enumerate(layers):
        times = -(-tokens // layer.length)
        keys, values = (
            x[:1].repeat(1, 1, times, 1)[:, :, :tokens].expand(rows, -1, -1, -1) for x in (layer.keys, layer.values)
        )
        cache.update(keys, values, index)
    return cache


def rewound(cache: Any, tokens: int) -> Any:
    """The cache as it was after `tokens` tokens, so that every run decodes the same."""
    for layer in cache.layers:
        if isinstance(cache, StaticCache):
            layer.cumulative_length.fill_(tokens)
        else:
            layer.crop(tokens - layer.length)
    return cache


@torch.no_grad()
def decoded(model: Any, cache: Any, token: Tensor, new: int) -> Tensor:
    """Greedy decoding of `new` tokens a row behind `token` (rows, 1): the last ones."""
    for _ in range(new):
        token = model(token, cache=cache).logits[:, -1:].argmax(-1)
    return token


def compiled(source: BlockCache, rows: int, tokens: int, new: int, first: int) -> Callable[[], Tensor]:
    """The same by the compiled decode loop, weights and cache in float32."""
    decoder = Decoder(stock_model(), weights="fp32", cache="float32")
    count = pages_for(tokens + new)
    pool: PagePool = decoder.new_pool(rows * count)
    sequences = [Paged(pool.take(count), tokens) for _ in range(rows)]
    one: Any = filled(BlockCache(stock_model().config), source, 1, tokens)
    keys, values = (torch.stack([getattr(layer, name)[0] for layer in one.layers]) for name in ("keys", "values"))
    for sequence in sequences:
        pool.write(sequence.pages, 0, keys, values)

    def run() -> Tensor:
        for sequence in sequences:
            sequence.length = tokens
        return decoder.run(pool, sequences, [first] * rows, new)[0]

    return run


# ------------------------------------------------------------------------------------------------- quality of decoding


@torch.no_grad()
def losses(documents: Tensor, follows: int, arms: Mapping[str, BlockTopK]) -> dict[str, dict[str, list[float]]]:
    """Of the last `follows` tokens of documents (n, tokens), decoded one by one behind the dense prompt, by arm and
    document.

    "nats": their mean negative log-likelihood; "agreement": how often the likeliest token is that of the first arm.
    """
    start = documents.shape[1] - follows
    cache = prefilled(documents[:, :start])
    found: dict[str, dict[str, list[float]]] = {}
    likeliest = None
    for name, settings in arms.items():
        torch.manual_seed(0)
        model = settled(settings)
        logits = torch.stack(
            [model(token, cache=cache).logits[:, -1] for token in documents[:, start:-1].split(1, 1)], 1
        )
        rewound(cache, start)
        said = logits.argmax(-1)
        likeliest = said if likeliest is None else likeliest
        nats = F.cross_entropy(logits.double().transpose(1, 2), documents[:, start + 1 :], reduction="none").mean(1)
        found[name] = {"nats": nats.tolist(), "agreement": (said == likeliest).double().mean(1).tolist()}
    return found


def perplexity_of(found: Mapping[str, Mapping[str, Sequence[float]]]) -> Quality:
    """The perplexity of block top-k beside dense attention's; Student's interval over the documents' differences."""
    nats = {name: np.array(arm["nats"]) for name, arm in found.items()}
    base = float(np.exp(nats["dense"].mean()))
    over = student_interval(nats["block top-k"] - nats["dense"])
    return Quality(
        base * float(np.exp(over.median)),
        base,
        base * float(np.exp(over.low)),
        base * float(np.exp(over.high)),
        {"deleted": float(np.exp(nats[RECENT].mean())), "random": float(np.exp(nats[RANDOM].mean()))},
    )


def read_in_a_step(cache: BlockCache, token: Tensor, settings: BlockTopK, tokens: int) -> int:
    """Bytes that attention reads while one token a row is decoded, counted operator by operator."""
    model = settled(settings)
    counted = count_cost(model, token, cache=cache)
    rewound(cache, tokens)
    return counted.total("attention").bytes_read


DECODING = Operator(
    "decoding several long answers at once",
    free="transformers' static cache with SDPA",
    exact="assay's compiled decode loop in float32",
)
DECODE = {"tokens": 4096, "batch": 8, "budget": 256, "block": 16, "new": 4, "documents": 4, "follows": 64}


@experiment(
    "kinetics/sparse-cost",
    points={
        "smoke": [DECODE | {"tokens": 256, "batch": 2, "budget": 64, "new": 1, "documents": 2, "follows": 6}],
        "small": [DECODE],
        "full": [
            DECODE | {"tokens": tokens, "budget": budget, "documents": 24, "follows": 128}
            for tokens, budget in ((4096, 256), (7680, 256), (7680, 480), (7680, 960))
        ],
    },
    decides={"full": DECODE | {"tokens": 7680, "budget": 480, "documents": 24, "follows": 128}},
    operator=DECODING,
    paper={"model": "Qwen3-0.6B to 32B", "tokens": 16_384, "batch": 256, "budget": 1024, "block": 16},
    departures={
        "model": "SmolLM2-135M, whose keys are a larger share of its cost than those of larger models",
        "tokens": "SmolLM2 was trained on 8192 tokens; 4096 at `small`, for time",
        "batch": "eight long answers fit into this memory and this time",
        "budget": "a sixteenth of the context, as in the paper's benchmark of 1024 of 16,384",
    },
    guard=Guard(
        "perplexity of tokens decoded behind a long document",
        0.03,
        without={"rival": "the cheapest way to spend the budget, sinks and the newest tokens, is the choice deleted"},
    ),
    refuted_if="decoding from the chosen blocks takes longer than reading the whole cache, selection included",
    measured_here="time of decoding steps at equal perplexity; the paper models cost, and has accuracy in mathematics",
    minutes=20,
)  # fmt: skip
def sparse_cost(tokens: int, batch: int, budget: int, block: int, new: int, documents: int, follows: int) -> Trial:
    """Decoding `new` tokens a row behind `batch` contexts of `tokens` tokens, dense and with block top-k, one cache
    kept in place.

    The baseline runs the same model and cache with every block. Arm: as many keys of the newest tokens, with nothing
    to choose. Its margin of 3 % is our choice. Details: bytes that attention reads in a step, counted by operators and
    by the cost model; nats of each document, those of the same budget in single tokens too, which reads every key; and
    how often the likeliest token is the same.
    """
    model, tokenizer = model_and_tokenizer()
    source = text_cache(min(READ, tokens))
    cache = filled(BlockCache(model.config, block=block), source, batch, tokens)
    static = filled(StaticCache(stock_model().config, max_cache_len=tokens + new), source, batch, tokens)
    first = int(long_prompt(tokenizer, 1)[0, -1])
    token = torch.full((batch, 1), first)
    sparse = BlockTopK(budget=budget, block=block)
    arms = {
        "dense": DENSE,
        "block top-k": sparse,
        RECENT: BlockTopK(budget=budget, block=block, select="recent"),
        RANDOM: BlockTopK(budget=budget, block=block, select="random"),
        TOKENS: BlockTopK(budget=budget, block=1),
    }

    def run(settings: BlockTopK) -> Callable[[], Tensor]:
        return lambda: decoded(settled(settings), rewound(cache, tokens), token, new)

    seen: dict[str, Any] = {}

    def measured() -> dict[str, Any]:
        if not seen:
            rewound(cache, tokens)
            seen.update(losses(heldout_windows(tokenizer, window=tokens, n=documents), follows, arms))
        return seen

    def details() -> dict[str, Any]:
        shape = shape_of(stock_model())
        one = Work(prompt=tokens, generated=1)
        kinds = (("dense", None), ("block top-k", sparse))
        laws, on_b200 = (
            {name: cost(shape, one, kind, element_bytes=size, shared_prompt=False) for name, kind in kinds}
            for size in (ELEMENT, 2)
        )
        rewound(cache, tokens)
        found = measured()
        return {
            "bytes attention reads in a step": {
                name: read_in_a_step(cache, token, arms[name], tokens) for name in laws
            },
            "bytes by the cost model": {name: law.bytes * batch for name, law in laws.items()},
            "equivalent FLOPs, dense over sparse, computed for a B200": on_b200["dense"].eflops(B200)
            / on_b200["block top-k"].eflops(B200),
            "nats a token of each document": {name: arm["nats"] for name, arm in found.items()},
            "same likeliest token": {name: float(np.mean(arm["agreement"])) for name, arm in found.items()},
        }

    return Trial(
        baseline=run(DENSE),
        candidate=run(sparse),
        free=lambda: decoded(stock_model(), rewound(static, tokens), token, new),
        exact=compiled(source, batch, tokens, new, first),
        arms={RECENT: run(arms[RECENT])},
        quality=lambda: perplexity_of(measured()),
        details=details,
    )


# ------------------------------------------------------------------------------------------------- choosing by a law


TEMPERATURE = 0.8
ANSWER, ITEMS = 4, 8  # tokens of a right continuation, and how many are asked for at the end of each document


@dataclass(frozen=True)
class Asked:
    """Continuations of documents behind one length of context.

    `prompt` has the tokens before an answer (the mean), `chances` for each document those of one trial to be right.
    """

    prompt: int
    chances: tuple[tuple[float, ...], ...]


@torch.no_grad()
def asked(part: Part, context: int, longest: int, documents: int) -> Asked:
    """The last `ITEMS` times `ANSWER` tokens of documents behind `context` tokens, the same ones for every context.

    A continuation is right that is the document's own. Its chance is the product of the shares that the model gives to
    its tokens at the temperature of the trials: what the frequency among samples estimates, without its noise.
    """
    model, tokenizer = model_and_tokenizer()
    settled(DENSE)
    tail = ITEMS * ANSWER
    windows = {"learn": calibration_windows, "judged": heldout_windows}[part]
    chances = []
    for document in windows(tokenizer, window=longest + tail, n=documents):
        ids = document[-context - tail :]
        logits = model(ids[None, :-1], use_cache=False, logits_to_keep=tail).logits[0].double()
        shares = (logits / TEMPERATURE).log_softmax(-1).gather(1, ids[-tail:, None])
        chances.append(tuple(shares.view(ITEMS, ANSWER).sum(1).exp().tolist()))
    return Asked(context + (ITEMS - 1) * ANSWER // 2, tuple(chances))


def named(context: int, trials: int) -> str:
    """A configuration's name."""
    return f"{context} tokens, {trials} trials"


def options_of(found: Mapping[int, Asked], trials: Sequence[int]) -> list[Option]:
    """Every length of context with every number of trials, by document; their costs here are the tokens generated."""
    return [
        Option(
            named(context, many),
            tuple(float(ANSWER * many) for _ in one.chances),
            tuple(float(np.mean(1 - (1 - np.array(own)) ** many)) for own in one.chances),
        )
        for context, one in found.items()
        for many in trials
    ]


def prices(found: Mapping[int, Asked], trials: Sequence[int], intensity: float) -> dict[str, dict[str, float]]:
    """What each configuration costs by FLOPs alone and in equivalent FLOPs, the prompt read once for all trials, or by
    each."""
    shape = shape_of(stock_model())
    laws: dict[str, dict[str, float]] = {"FLOPs": {}, "equivalent FLOPs": {}, "equivalent FLOPs, prompts apart": {}}
    for context, one in found.items():
        for many in trials:
            name, work = named(context, many), Work(one.prompt, ANSWER, many)
            for law, together in (("equivalent FLOPs", True), ("equivalent FLOPs, prompts apart", False)):
                price = cost(shape, work, element_bytes=ELEMENT, shared_prompt=together)
                laws[law][name], laws["FLOPs"][name] = price.eflops(intensity), price.flops
    return laws


@torch.no_grad()
def step_seconds(prompt_tokens: int, trials: int, *, together: bool, rounds: int = 5) -> list[float]:
    """The time of a decoding step of `trials` trials behind a prompt, `rounds` times.

    Together: as tokens of one row, so that the prompt's keys are read once for all of them. Apart: as rows with copies
    of the prompt.
    """
    model, tokenizer = model_and_tokenizer()
    settled(DENSE)
    source = text_cache(min(READ, prompt_tokens))
    cache = filled(BlockCache(model.config), source, 1 if together else trials, prompt_tokens)
    token = long_prompt(tokenizer, trials) if together else torch.full((trials, 1), 5)
    seconds = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        model(token, cache=cache)
        seconds.append(time.perf_counter() - begin)
        rewound(cache, prompt_tokens)
    return seconds[1:]


def paid(found: Mapping[int, Asked], trials: Sequence[int], *, together: bool, rounds: int) -> dict[str, np.ndarray]:
    """Measured seconds of each configuration, round by round: a step's time, as often as an answer has tokens."""
    return {
        named(context, many): ANSWER * np.array(step_seconds(one.prompt, many, together=together, rounds=rounds))
        for context, one in found.items()
        for many in trials
    }


def medians(seconds: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The median over the rounds, by configuration."""
    return {name: float(np.median(own)) for name, own in seconds.items()}


def extra(
    options: Sequence[Option],
    laws: Mapping[str, Mapping[str, float]],
    price: Mapping[str, float],
    law: str = "equivalent FLOPs",
) -> dict[float, float]:
    """How many times dearer choosing by FLOPs is than choosing by `law`, for each coverage of `TARGETS` that can be
    reached."""
    found = {t: extra_cost(options, t, by=laws["FLOPs"], instead=laws[law], price=price) for t in TARGETS}
    return {target: ratio for target, ratio in found.items() if ratio is not None}


def typical(ratios: Mapping[float, float]) -> float:
    """The geometric mean of ratios. Raises ValueError for none: no coverage that is asked for can be reached."""
    if not ratios:
        raise ValueError(f"trials must reach a coverage of {TARGETS[0]}, got configurations that do not")
    return float(np.exp(np.mean(np.log(list(ratios.values())))))


def law_against_time(grid: Sequence[tuple[int, int]], rounds: int) -> dict[str, Any]:
    """How well the two laws say the time of decoding steps, (context, batch) by (context, batch), each predicted from
    the others."""
    shape = shape_of(stock_model())
    costs, seconds = [], []
    for tokens, batch in grid:
        work = Work(prompt=tokens, generated=1)
        costs.append(cost(shape, work, element_bytes=ELEMENT, shared_prompt=False, weights_read_with=batch) * batch)
        seconds.append(float(np.median(step_seconds(tokens, batch, together=False, rounds=rounds))))
    said: dict[str, Any] = {
        "seconds": {f"{tokens} tokens, batch {batch}": s for (tokens, batch), s in zip(grid, seconds, strict=True)}
    }
    for law, flops_only in (("FLOPs", True), ("equivalent FLOPs", False)):
        whole = fitted(costs, seconds, flops_only=flops_only)
        off = []
        for n in range(len(grid)):
            rest = fitted(costs[:n] + costs[n + 1 :], seconds[:n] + seconds[n + 1 :], flops_only=flops_only)
            off.append(abs(rest.seconds(costs[n]) / seconds[n] - 1))
        said[law] = {"variance explained": whole.explained, "median error when left out": float(np.median(off))}
        if not flops_only:
            said[law]["intensity that the times show"] = whole.intensity
    return said


CHOOSING = Operator("choosing how to spend a budget of operations", free="counting FLOPs, as the paper's baseline does")
CHOICE: dict[str, Any] = {
    "contexts": [32, 256, 1024], "trials": [1, 2, 3, 4, 6, 8, 12, 16], "documents": 8, "rounds": 5,
    "grid": [[128, 1], [128, 8], [1024, 1], [1024, 8], [2048, 4], [4096, 2], [4096, 8]],
}  # fmt: skip
SMALLEST = {
    "contexts": [8, 64], "trials": [1, 4], "documents": 2, "rounds": 1,
    "grid": [[64, 1], [64, 2], [256, 2], [256, 1]],
}  # fmt: skip
FULL = {"contexts": [32, 256, 1024, 4096], "documents": 64, "rounds": 15}
TARGETS = tuple(round(0.05 * n, 2) for n in range(4, 20))  # lower coverage takes no choice


ANY = "any configuration that reaches the coverage"


def _law_knows_nothing(record: Mapping[str, Any]) -> bool:
    return bool(record["measured"]["high"] < 1 or record["arms"][ANY] <= 1)


@experiment(
    "kinetics/flops-only-cost",
    points={
        "smoke": [CHOICE | SMALLEST],
        "small": [CHOICE],
        "full": [CHOICE | FULL],
    },
    operator=CHOOSING,
    paper={"models": "Qwen3-0.6B to 32B", "task": "AIME24"},
    departures={
        "models": "one model, SmolLM2-135M, with short or long contexts in the place of small and large models",
        "task": "the next four tokens of real text, which a longer context makes likelier",
    },
    guard=Guard(
        "coverage of unseen documents by what is chosen",
        0.25,
        higher_is_better=True,
        without={"rival": "both laws choose among the same configurations: there is no third way to spend the budget"},
    ),
    refuted_if="what FLOPs alone choose takes less time than what equivalent FLOPs choose, the whole interval below "
    "1x, or any configuration that reaches the coverage takes no more",
    refutes=_law_knows_nothing,
    measured_here="time of decoding by configurations of one model (context, trials); the paper has sizes of models",
    minutes=30,
)  # fmt: skip
def flops_only_cost(
    contexts: Sequence[int], trials: Sequence[int], documents: int, rounds: int, grid: Sequence[Sequence[int]]
) -> Figure:
    """How many times the measured time is paid that is needed, where FLOPs alone choose at equal coverage.

    FLOPs are the law's, attention's arithmetic included. For each coverage from 0.2 to 0.95 that is reached, both laws
    choose on some documents; the figure is the geometric mean over those coverages, for a choice by chance must not
    profit from the best of them, and the most stands in the details, as the paper's "up to". Its interval resamples the
    documents and the rounds of timing. The contexts are read before and kept, so that decoding alone is paid. The
    quality is the mean coverage of the equivalent FLOPs' choices on other documents, which must not be dearly lost
    against that of FLOPs' choices; "deleted" always takes the configuration that costs least, "random" any that costs
    no more than the equivalent FLOPs' choice. Arms: any configuration that reaches the coverage, and contexts that each
    trial reads by itself. Details: how well both laws say measured times.
    """
    learn, judged = (
        {context: asked(part, context, max(contexts), documents) for context in contexts} for part in PARTS
    )
    intensity = calibrate(quick=True, device="cpu").ridge("float32")
    laws = prices(learn, trials, intensity)
    timed = paid(learn, trials, together=True, rounds=rounds)
    together, apart = medians(timed), medians(paid(learn, trials, together=False, rounds=rounds))
    options, unseen = options_of(learn, trials), {option.name: option for option in options_of(judged, trials)}
    ratios = extra(options, laws, together)
    value = typical(ratios)

    random = np.random.default_rng(0)
    again = []
    for _ in range(100):
        rows = random.integers(0, documents, documents)
        resampled = [
            Option(one.name, tuple(one.costs[i] for i in rows), tuple(one.coverage[i] for i in rows)) for one in options
        ]
        seconds = medians({name: random.choice(own, len(own)) for name, own in timed.items()})
        if reached := extra(resampled, laws, seconds):
            again.append(typical(reached))
    low, high = np.quantile(again, [0.025, 0.975])

    def covered(option: Option) -> np.ndarray:
        return np.array(unseen[option.name].coverage)

    chosen = {law: [cast(Option, cheapest(options, one, by=laws[law])) for one in ratios] for law in laws}
    beside = {}  # the mean time of all that reach a coverage, over that of the equivalent FLOPs' choice
    by_chance = []  # the coverage of all that cost no more than it
    price = laws["equivalent FLOPs"]
    for one, ours in zip(ratios, chosen["equivalent FLOPs"], strict=True):
        reaching = [together[option.name] for option in options if np.mean(option.coverage) >= one]
        beside[one] = float(np.mean(reaching)) / together[ours.name]
        affordable = [option for option in options if price[option.name] <= price[ours.name]]
        by_chance.append(np.mean([covered(option).mean() for option in affordable]))
    by_flops, by_both = (np.mean([covered(one) for one in chosen[law]], 0) for law in ("FLOPs", "equivalent FLOPs"))
    over = student_interval(by_both - by_flops)
    return Figure(
        value,
        "x",
        low=min(float(low), value),
        high=max(float(high), value),
        arms={
            ANY: typical(beside),
            "prompts read by each trial": typical(extra(options, laws, apart, "equivalent FLOPs, prompts apart")),
        },
        quality=Quality(
            float(by_both.mean()),
            float(by_flops.mean()),
            float(by_flops.mean()) + over.low,
            float(by_flops.mean()) + over.high,
            {
                "deleted": float(covered(min(options, key=lambda one: price[one.name])).mean()),
                "random": float(np.mean(by_chance)),
            },
        ),
        details={
            "extra cost by coverage": {str(one): ratio for one, ratio in ratios.items()},
            "chosen for each coverage": {law: [one.name for one in found] for law, found in chosen.items()},
            "coverage, learn": {one.name: float(np.mean(one.coverage)) for one in options},
            "coverage, judged": {name: float(np.mean(one.coverage)) for name, one in unseen.items()},
            "seconds, prompt read once": together,
            "seconds, prompts apart": apart,
            "laws": laws,
            "intensity, operations a byte": intensity,
            "the laws against measured times": law_against_time([(int(a), int(b)) for a, b in grid], rounds),
        },
    )

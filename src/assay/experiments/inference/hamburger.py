"""HAMburger: how many cache entries and how much time groups of tokens save, on a small byte model that was grafted and trained on.

All arms produce the same real text: held-out code, byte by byte, as if each byte had been chosen (`Told`). What is saved thus
depends on where the stop head ends its groups on text that nobody trained on, and not on how a small model repeats itself. The quality
is what the same decoding gives each byte: nats a byte. Every arm starts from the same base and is trained on for as many steps on as
many tokens.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Mapping
from functools import cache, partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList

from assay.experiments.core import Figure, Guard, Operator, Quality, Trained, Trial, experiment
from assay.experiments.inference.language import bigram_floor, heldout, small_llama, trained, validation
from assay.experiments.mixers.training import in_parallel, over_seeds
from assay.experiments.rates import chosen, searched
from assay.experiments.seeds import paired
from assay.methods.builtin.decode_loop import Decoder
from assay.methods.builtin.speculation import Lookup, PagedEngine, speculate
from assay.methods.inference import hamburger as method
from assay.methods.inference.hamburger import HamburgerForCausalLM, decode, group_ids, grouped, token_entropies
from assay.workloads.sequences import byte_batches

SEEDS = (0, 1, 2)
BATCH = 16
PROMPT = 16  # bytes that are read before anything is produced
HEADS = 3
DRAFT = 8  # bytes to a draft of speculative decoding at most
TASK: dict[str, int] = {
    "width": 96, "layers": 4, "micro_layers": 1, "max_steps": 4, "length": 96, "steps": 300, "grafting": 120, "windows": 32,
}  # fmt: skip
FULL: dict[str, int] = {
    "width": 192, "layers": 6, "micro_layers": 1, "max_steps": 4, "length": 128, "steps": 1000, "grafting": 400, "windows": 64,
}  # fmt: skip
SMOKE: dict[str, int] = {
    "width": 96, "layers": 2, "micro_layers": 1, "max_steps": 4, "length": 48, "steps": 20, "grafting": 20, "windows": 4,
}  # fmt: skip
CONFIDENCE = 0.8  # of the paper's evaluation
FRONT = (0.5, 0.6, 0.7, 0.9)  # beside it, as facts: the released loops have 0.5 and 0.9
CHOICE_SEED = 100  # of the models by which learning rates are chosen
ARMS = ("base", "hamburger", "random groups")

Task = Mapping[str, Any]


# ------------------------------------------------------------------------------------------------------------------- the models


def base_model(task: Task, seed: int, rate: float | None = None) -> Any:
    """A base trained from scratch, the same for all arms of a seed."""
    return trained(
        {"arm": "scratch", "seed": seed, "heads": HEADS, "batch": BATCH, **task},
        partial(small_llama, width=task["width"], layers=task["layers"], heads=HEADS, seed=seed),
        partial(byte_batches, task["length"], BATCH, seed=seed),
        steps=task["steps"],
        rate=chosen("hamburger/base", "base").rate if rate is None else rate,
        sources=(),
    )


def grafted(arm: str, base: Any, task: Task, seed: int) -> Any:
    """What an arm trains from here: the base itself, or the same weights between new modules."""
    base = copy.deepcopy(base).train()
    if arm == "base":
        return base
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1000 + seed)
        return HamburgerForCausalLM.from_base(
            base, micro_layers=task["micro_layers"], max_steps=task["max_steps"], confidence=CONFIDENCE
        )


def trained_on(arm: str, task: Task, seed: int, rate: float | None = None) -> Any:
    """The base of a seed, trained on as `arm` says: as it is, or grafted with groups of one kind."""
    base = base_model(task, seed)
    return trained(
        {
            "arm": arm,
            "seed": seed,
            "heads": HEADS,
            "batch": BATCH,
            "rate of base": chosen("hamburger/base", "base").rate,
            **task,
        },
        partial(grafted, arm, base, task, seed),
        partial(byte_batches, task["length"], BATCH, seed=10**6 + seed),
        steps=task["grafting"],
        rate=chosen("hamburger/grafting", arm).rate if rate is None else rate,
        sources=() if arm == "base" else (method, sys.modules[__name__]),
        loss=None if arm == "base" else partial(group_loss, Cutter(arm, base, task["max_steps"], seed)),
    )


class Cutter:
    """Groups of whole rows of bytes: by the base's uncertainty, or for "random groups" the same sizes in a random order."""

    def __init__(self, arm: str, base: Any, max_steps: int, seed: int) -> None:
        self.arm, self.base, self.max_steps = arm, base, max_steps
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, ids: Tensor, prompt: int = 1) -> Tensor:
        found = grouped(token_entropies(self.base, ids), prompt, max_steps=self.max_steps)
        return found if self.arm == "hamburger" else shuffled(found, prompt, self.generator)


def blocks(ids: Tensor, size: int, prompt: int = 1) -> Tensor:
    """Groups of `size` tokens behind the prompt, whatever they are."""
    rest = ids.shape[1] - prompt
    sizes = [1] * prompt + [size] * (rest // size) + [rest % size] * (rest % size > 0)
    return group_ids(sizes).expand(len(ids), -1)


def shuffled(groups: Tensor, prompt: int, generator: torch.Generator) -> Tensor:
    """The same sizes of groups behind the prompt, in a random order: as many entries, at random places."""
    rows = []
    for row in groups:
        sizes = torch.bincount(row)[prompt:]
        order = torch.randperm(len(sizes), generator=generator)
        rows.append(group_ids([1] * prompt + sizes[order].tolist()))
    return torch.stack(rows)


def group_loss(cut: Cutter, model: Any, inputs: Tensor, targets: Tensor) -> Tensor:
    """The paper's loss on a batch, of as many predicted bytes as the base's."""
    ids = torch.cat([inputs, targets[:, -1:]], 1)
    loss: Tensor = model(ids, groups=cut(ids), labels=ids).loss
    return loss


# ---------------------------------------------------------------------------------------------------------------------- quality


@torch.no_grad()
def told_nll(model: Any, ids: Tensor, groups: Tensor | None = None) -> Tensor:
    """Nats a byte behind the prompt, of each row of (n, tokens) bytes: by teacher forcing, in these groups if the model has any."""
    logits = (model(ids) if groups is None else model(ids, groups=groups)).logits
    return nats(logits[:, PROMPT - 1 : -1], ids[:, PROMPT:])


def nats(logits: Tensor, wanted: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().transpose(1, 2), wanted, reduction="none").double().mean(1)


@torch.no_grad()
def decoded(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (n, tokens) as the model decodes them, byte by byte, its stop head ending the groups: nats a byte (n,), and the groups."""
    out = model(ids[:, :PROMPT], use_cache=True, logits_to_keep=1, prompt=True)
    made = [out.logits]
    for place in range(PROMPT, ids.shape[1]):
        out = model(ids[:, place : place + 1], cache=out.cache)
        made.append(out.logits)
    groups = torch.stack([group_ids(out.cache.groups(row)) for row in range(len(ids))])
    return nats(torch.cat(made[:-1], 1), ids[:, PROMPT:]), groups


def windows(task: Task, source: Callable[..., tuple[Tensor, Tensor]] = heldout) -> Tensor:
    """Rows (windows, length + 1) of bytes of unseen text."""
    inputs, targets = source(task["length"], task["windows"])
    return torch.cat([inputs, targets[:, -1:]], 1)


def per_entry(groups: Tensor) -> float:
    """Bytes an entry behind the prompt, over all rows."""
    entries = int((groups.amax(1) + 1 - PROMPT).sum())
    return groups[:, PROMPT:].numel() / entries


def arm_score(arm: str, seed: int, task: Task) -> dict[str, float]:
    """One arm of one seed on held-out windows: nats a byte, and bytes an entry.

    The groups of "random groups" are those of HAMburger on the same windows in a random order. "hamburger" also tells what the same
    model loses without its stop head (blocks of the most tokens), when its own groups are shuffled, and with other confidences.
    """
    torch.set_num_threads(1)
    ids, model = windows(task), trained_on(arm, task, seed)
    if arm == "base":
        return {"nll": float(told_nll(model, ids).mean()), "per_entry": 1.0}
    found, groups = decoded(trained_on("hamburger", task, seed), ids)
    random = shuffled(groups, PROMPT, torch.Generator().manual_seed(seed))
    if arm == "random groups":
        return {"nll": float(told_nll(model, ids, random).mean()), "per_entry": per_entry(random)}
    front: dict[str, float] = {}
    for confidence in FRONT:
        model.config.confidence = confidence
        lost, cut = decoded(model, ids)
        front |= {f"nll at {confidence}": float(lost.mean()), f"per_entry at {confidence}": per_entry(cut)}
    known = Cutter("hamburger", base_model(task, seed), task["max_steps"], seed)(ids, PROMPT)
    return {
        "nll": float(found.mean()),
        "per_entry": per_entry(groups),
        "no stop head": float(told_nll(model, ids, blocks(ids, task["max_steps"], PROMPT)).mean()),
        "own groups shuffled": float(told_nll(model, ids, random).mean()),
        "cut by the base, nats": float(told_nll(model, ids, known).mean()),
        "cut by the base": per_entry(known),
        **front,
    }


def seed_scores(seed: int, task: Task) -> dict[str, dict[str, float]]:
    """All arms of one seed."""
    return {arm: arm_score(arm, seed, task) for arm in ARMS}


@cache
def _scores(items: tuple[tuple[str, int], ...]) -> dict[str, list[dict[str, float]]]:
    seeds = in_parallel(seed_scores, [(seed, dict(items)) for seed in SEEDS])
    return {arm: [found[arm] for found in seeds] for arm in ARMS}


def scores(task: Task) -> dict[str, list[dict[str, float]]]:
    """`arm_score` of each arm under each of `SEEDS`."""
    return _scores(tuple(sorted(task.items())))


def of(found: Mapping[str, list[dict[str, float]]], arm: str, name: str = "nll") -> list[float]:
    return [score[name] for score in found[arm]]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def quality(found: Mapping[str, list[dict[str, float]]]) -> Quality:
    """HAMburger as it decodes against the base trained on, with the interval over the seeds' paired differences."""
    ours, base = of(found, "hamburger"), of(found, "base")
    lost = paired(ours, base)
    return Quality(
        mean(base) + lost.median,
        mean(base),
        mean(base) + lost.low,
        mean(base) + lost.high,
        controls={
            "deleted": mean(of(found, "hamburger", "no stop head")),
            "random": mean(of(found, "hamburger", "own groups shuffled")),
            "rival": mean(of(found, "random groups")),
            "cut by the base's uncertainty, which decoding does not know": mean(
                of(found, "hamburger", "cut by the base, nats")
            ),
        },
        rival="as many entries with groups at random places, trained so",
    )


def as_trained(found: Mapping[str, list[dict[str, float]]], task: Task) -> dict[str, Trained]:
    """All arms, with the table of pairs of bytes that each has to beat."""
    ids = windows(task)
    floor = bigram_floor(ids[:, PROMPT - 1 : -1], ids[:, PROMPT:])
    return {
        arm: Trained(
            of(found, arm),
            floor,
            "a bigram table",
            chosen("hamburger/grafting", arm).rate,
            chosen("hamburger/grafting", arm).rates,
        )
        for arm in ARMS
    }


# ------------------------------------------------------------------------------------------------------------------- the rates


@searched("hamburger/base", arms=["base"], grid=(2e-3, 4e-3, 8e-3))
def base_rate(arm: str, rate: float) -> float:
    """Nats a byte, on text kept for the choice, of the base from which all arms start."""
    torch.set_num_threads(1)
    return float(told_nll(base_model(TASK, CHOICE_SEED, rate), windows(TASK, validation)).mean())


@searched("hamburger/grafting", arms=ARMS, grid=(1e-3, 2e-3, 4e-3, 8e-3))
def grafting_rate(arm: str, rate: float) -> float:
    """Nats a byte, on text kept for the choice, of an arm that was trained on: HAMburger as it decodes, random groups in such."""
    torch.set_num_threads(1)
    ids, model = windows(TASK, validation), trained_on(arm, TASK, CHOICE_SEED, rate)
    if arm == "base":
        return float(told_nll(model, ids).mean())
    if arm == "hamburger":
        return float(decoded(model, ids)[0].mean())
    groups = Cutter(arm, base_model(TASK, CHOICE_SEED), TASK["max_steps"], 0)(ids, PROMPT)
    return float(told_nll(model, ids, groups).mean())


# --------------------------------------------------------------------------------------------------------------------- decoding


class Told(LogitsProcessor):
    """Makes any loop of transformers choose the bytes of a given text: the scores of one row favour its next byte."""

    def __init__(self, text: list[int]) -> None:
        self.text = text

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        place = input_ids.shape[1]
        if place < len(self.text):
            scores = scores.clone()
            scores[:, self.text[place]] = 1e9
        return scores


class ToldEngine:
    """An engine of speculative decoding whose model chooses the bytes of a given text."""

    def __init__(self, engine: PagedEngine, text: list[int]) -> None:
        self.engine, self.text, self.more = engine, text, engine.more

    @property
    def length(self) -> int:
        return self.engine.length

    def extend(self, tokens: list[int]) -> Tensor:
        start = self.engine.length
        scores = self.engine.extend(tokens)
        for row in range(len(tokens)):
            if start + row + 1 < len(self.text):
                scores[row, self.text[start + row + 1]] = 1e9
        return scores

    def crop(self, length: int) -> None:
        self.engine.crop(length)


@torch.no_grad()
def token_by_token(model: Any, ids: Tensor) -> list[int]:
    """The base over its cache, one pass a byte: the bytes behind the prompt."""
    kept, place = DynamicCache(config=model.config), PROMPT
    logits = model(input_ids=ids[:, :PROMPT], cache=kept, use_cache=True, logits_to_keep=1).logits
    made = []
    while True:
        logits[0, -1, ids[0, place]] = 1e9
        made.append(int(logits[0, -1].argmax()))
        place += 1
        if place == ids.shape[1]:
            return made
        token = torch.tensor([[made[-1]]])
        logits = model(input_ids=token, cache=kept, use_cache=True, logits_to_keep=1).logits


def in_groups(model: Any, ids: Tensor) -> Any:
    """HAMburger's own loop over one row."""
    text = ids[0].tolist()

    def choose(logits: Tensor, rows: list[int], places: list[int]) -> Tensor:
        for row, place in enumerate(places):
            logits[row, text[PROMPT + place]] = 1e9
        return logits.argmax(-1)

    return decode(model, ids[:, :PROMPT], max_new_tokens=ids.shape[1] - PROMPT, choose=choose, eos_token_id=[])


def looked_up(model: Any, ids: Tensor) -> list[int]:
    """transformers' own speculative decoding with drafts from the text so far."""
    made = model.generate(
        ids[:, :PROMPT],
        attention_mask=torch.ones(1, PROMPT, dtype=torch.int64),
        max_new_tokens=ids.shape[1] - PROMPT,
        do_sample=False,
        prompt_lookup_num_tokens=DRAFT,
        logits_processor=LogitsProcessorList([Told(ids[0].tolist())]),
    )
    found: list[int] = made[0, PROMPT:].tolist()
    return found


@torch.no_grad()
def compiled(model: Any, decoder: Any, ids: Tensor) -> list[int]:
    """Speculative decoding with drafts from the text so far in assay's compiled loop."""
    text, kept = ids[0].tolist(), DynamicCache(config=model.config)
    logits = model(input_ids=ids[:, :PROMPT], cache=kept, use_cache=True, logits_to_keep=1).logits[0, -1]
    logits[text[PROMPT]] = 1e9
    engine = ToldEngine(PagedEngine.of_cache(decoder, kept, len(text) - PROMPT + DRAFT + 1), text)
    return speculate(engine, logits, Lookup(text[:PROMPT]), len(text) - PROMPT, most=DRAFT)


class Decoding:
    """The base and HAMburger of one seed, and the ways to produce `replays` rows of held-out code with them."""

    def __init__(self, task: Task, replays: int) -> None:
        self.rows = windows(task)[:replays].split(1)
        self.base, self.model = trained_on("base", task, SEEDS[0]), trained_on("hamburger", task, SEEDS[0])
        self.single = copy.deepcopy(self.model)
        self.single.config.confidence = 2.0
        self.decoder = Decoder(self.base, weights="fp32", cache="float32")
        self.tokens = sum(row.shape[1] - PROMPT for row in self.rows)

    def plain(self) -> list[Any]:
        return [token_by_token(self.base, row) for row in self.rows]

    def groups(self) -> list[Any]:
        return [in_groups(self.model, row) for row in self.rows]

    def groups_of_one(self) -> list[Any]:
        return [in_groups(self.single, row) for row in self.rows]

    def free(self) -> list[Any]:
        return [looked_up(self.base, row) for row in self.rows]

    def exact(self) -> list[Any]:
        return [compiled(self.base, self.decoder, row) for row in self.rows]

    def counted(self) -> dict[str, Any]:
        """Entries and steps of HAMburger beside the base's: an entry and a pass of the model a byte."""
        made = self.groups()
        entries = sum(one.kv_entries[0] for one in made)
        token = self.entry_bytes()
        return {
            "tokens": self.tokens,
            "kv_entries": {
                "hamburger": entries,
                "base": self.tokens + len(self.rows) * (PROMPT - 1),
                "prompts": len(self.rows) * PROMPT,
            },
            "kv_bytes_an_entry": token,
            "passes of the base": {"hamburger": sum(one.macro_steps for one in made) + len(made), "base": self.tokens},
            "micro_steps": sum(one.micro_steps for one in made),
            "group_sizes": [one.groups[0] for one in made],
        }

    def entry_bytes(self) -> int:
        config = self.base.config
        head = config.hidden_size // config.num_attention_heads
        return 2 * config.num_hidden_layers * config.num_key_value_heads * head * self.base.dtype.itemsize

    def tokens_a_second(self, runs: int = 3) -> dict[str, float]:
        """Bytes a second of each way, the median of a few runs: to stand beside the entries; the trial is the measurement."""

        def seconds(run: Callable[[], Any]) -> float:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start

        ways = {
            "hamburger": self.groups,
            "base": self.plain,
            "transformers' look-up": self.free,
            "compiled look-up": self.exact,
        }
        for run in ways.values():
            run()
        return {name: self.tokens / median(seconds(run) for _ in range(runs)) for name, run in ways.items()}


# ------------------------------------------------------------------------------------------------------------------- the claims

DECODING = Operator(
    "decoding of one text",
    free="transformers' own speculative decoding with drafts looked up in the text, exact",
    exact="speculative decoding with looked-up drafts in assay's compiled loop",
)
DECLARED: dict[str, Any] = {
    "operator": DECODING,
    "paper": {
        "base": "Llama-3.2-1B-Instruct",
        "max_steps": 4,
        "micro_layers": 4,
        "strategy": "decreasing_v2",
        "confidence": CONFIDENCE,
        "batch": 1,
        "text": "chat tasks and LongBench",
        "width": 2048,
        "layers": 16,
        "length": "thousands of tokens",
        "steps": "Llama 3.2's pretraining",
        "grafting": "an epoch of nineteen instruction data sets",
    },
    "departures": {
        "base": "a byte model trained here: no 1B model is at hand, and none could be trained on in minutes",
        "micro_layers": "the paper's share of the base's layers, a quarter or less",
        "text": "code of the standard library that nothing was trained on, as if each byte had been chosen",
        "width": "as much as trains in seconds (small) or an hour (full)",
        "layers": "as many as train in seconds or an hour",
        "length": "windows of bytes",
        "steps": "as many as fit; the same for every arm",
        "grafting": "as many as fit; the same for every arm, the base trained on included",
    },
    "guard": Guard("nats a byte of held-out code, as decoded", margin=0.05),
    "minutes": 90,
}


@experiment(
    "hamburger/kv-entries",
    points={"smoke": [SMOKE], "small": [TASK], "full": [FULL]},
    refuted_if="the stop head ends every group at its first token on unseen text, so that no entry is saved",
    measured_here="entries that grow with the answer, on bytes of code",
    **DECLARED,
)
def kv_entries(**task: int) -> Figure:
    """Tokens for each cache entry that an answer adds, where its own stop head ends the groups; one for the base and for speculation.

    The interval is Student's t over three seeds. Beside it: what the base's own uncertainty would merge, which is known in training only,
    and what a cache of 8 bits saves in bytes of a bfloat16 one, with every entry. The margin of the quality, 5 %, is our choice, as is
    that of other papers here.
    """
    found = scores(task)
    gain = over_seeds(of(found, "hamburger", "per_entry"))
    decoding = Decoding(task, 1)
    head = task["width"] // HEADS
    return Figure(
        gain.median,
        "x",
        low=gain.low,
        high=gain.high,
        baseline=1.0,
        free=1.0,
        exact=1.0,
        arms={
            "cut by the base's uncertainty, which decoding does not know": mean(
                of(found, "hamburger", "cut by the base")
            ),
            "all entries in 8 bits, by bytes of bfloat16": 2 * head / (head + 2),
        },
        quality=quality(found),
        trained=as_trained(found, task),
        details={"arms": found, **decoding.counted(), "tokens_a_second": decoding.tokens_a_second()},
    )


@experiment(
    "hamburger/decode-speedup",
    points={
        "smoke": [{**SMOKE, "replays": 1}],
        "small": [{**TASK, "replays": 2}],
        "full": [{**FULL, "replays": 4}],
    },
    refuted_if="producing the same text in groups takes longer than token by token over the whole 95 % interval",
    **DECLARED,
)
def decode_speedup(replays: int, **task: int) -> Trial:
    """Producing `replays` rows of held-out code, prompts of 16 bytes included: the base token by token against HAMburger in groups.

    Both trained on as long, both in float32, each by the leanest loop we have in torch; the operator's baselines are exact. An arm of
    groups of one token in the same loop says what the loop itself gains or costs. The details hold entries and bytes a second together.
    """
    decoding = Decoding(task, replays)
    return Trial(
        baseline=decoding.plain,
        candidate=decoding.groups,
        free=decoding.free,
        exact=decoding.exact,
        arms={"groups of one token, the same loop": decoding.groups_of_one},
        quality=lambda: quality(scores(task)),
        trained=lambda: as_trained(scores(task), task),
        details=lambda: {
            **decoding.counted(),
            "tokens_a_second": decoding.tokens_a_second(),
            "bytes_an_entry": of(scores(task), "hamburger", "per_entry"),
        },
    )

"""Functional hashing: how many evaluations of a search the cache saves, compared with no cache and with caches keyed by text.

What anybody has in ten lines is a cache keyed by the candidate's text, without the nodes that nothing uses. A hit is right when the stored
score is what a full evaluation gives: that is the quality, beside random hits of equal number.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from assay.experiments.core import Figure, Guard, Operator, Quality, experiment
from assay.measure.stats import share_interval, student_interval
from assay.methods.compression.functional_hashing import (
    FunctionalCache,
    Training,
    canonical_inputs,
    functional_hash,
    initialise,
)
from assay.workloads.text import english_text


@experiment(
    "functional_hashing/evaluations-saved",
    points={
        "smoke": [{"domain": "expression trees", "candidates": 2000}, {"domain": "networks", "candidates": 30}],
        "small": [{"domain": "expression trees", "candidates": 20000}, {"domain": "networks", "candidates": 200}],
        "full": [{"domain": "expression trees", "candidates": 200000}, {"domain": "networks", "candidates": 3000}],
    },
    decides={
        scale: {"domain": "networks", "candidates": n} for scale, n in (("smoke", 30), ("small", 200), ("full", 3000))
    },
    operator=Operator("evaluations of a search", free="a cache keyed by the candidate's text without dead nodes"),
    paper={"domain": "networks", "search": "regularised evolution"},
    guard=Guard(
        "share of hits whose stored score is right",
        0.05,
        higher_is_better=True,
        relative=False,
        without={
            "deleted": "without the cache every candidate is evaluated: that is the baseline",
            "rival": "the cheapest rival, keys of text, is never wrong: it stands as the free baseline of what is saved",
        },
    ),
    refuted_if="the cache saves no more evaluations than one keyed by the candidate's text without dead nodes",
    refutes=lambda record: record["measured"]["high"] < record["free"],
    minutes=60,
)
def evaluations_saved(domain: str, candidates: int, seeds: int = 3) -> Figure:
    """Per cent of `candidates` that need no evaluation of their own, at equal candidates; the interval is over searches (Student's t)."""
    one = _saved_on_trees if domain == "expression trees" else _saved_on_networks
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the networks are too small for more
    try:
        found = [one(candidates, seed) for seed in range(seeds)]
    finally:
        torch.set_num_threads(threads)
    saved = student_interval([100 * search["saved"] for search in found])
    right = share_interval(sum(s["right"] for s in found), max(1, sum(s["checked"] for s in found)))
    random_hits = sum(s["right at random"] for s in found) / max(1, sum(s["checked"] for s in found))
    arms = {name: 100 * float(np.mean([s["arms"][name] for s in found])) for name in found[0]["arms"]}
    return Figure(
        saved.median,
        "%",
        low=saved.low,
        high=min(saved.high, 100.0),
        baseline=0.0,
        free=arms["text without dead nodes"],
        arms=arms,
        quality=Quality(right.median, 1.0, right.low, right.high, controls={"random": random_hits}),
        details={"saved_by_search": [100 * s["saved"] for s in found], "of_each_search": [s["details"] for s in found]},
    )


def _repeats(keys: list[str]) -> list[bool]:
    """Which of the keys came before."""
    first = {key: number for number, key in reversed(list(enumerate(keys)))}
    return [first[key] < number for number, key in enumerate(keys)]


# Random expression trees: x, y and two constants, six operations, depth three


def random_tree(rng: random.Random, depth: int = 3) -> str:
    """The text of an expression in x and y at most `depth` operations deep."""
    if depth == 0 or rng.random() < 0.2:
        return rng.choice(["x", "y", "1.0", "2.0"])
    operation = rng.choice(["+", "-", "*", "max", "-u", "abs"])
    if operation in ("-u", "abs"):
        inner = random_tree(rng, depth - 1)
        return f"abs({inner})" if operation == "abs" else f"(-{inner})"
    a, b = random_tree(rng, depth - 1), random_tree(rng, depth - 1)
    return f"max({a}, {b})" if operation == "max" else f"({a} {operation} {b})"


def compiled(text: str) -> Callable[[float, float], float]:
    """The function that the text of an expression is."""
    function: Callable[[float, float], float] = eval(  # noqa: S307 - made by random_tree
        f"lambda x, y: {text}", {"__builtins__": {"max": max, "abs": abs}}
    )
    return function


def _saved_on_trees(candidates: int, seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    points = [tuple(map(float, pair)) for pair in canonical_inputs(40, (), ())]  # ten would miss many a max(x, 2.0)
    checks = [tuple(map(float, pair)) for pair in canonical_inputs(100, (), (), seed=7)]
    texts = [random_tree(rng) for _ in range(candidates)]
    start = time.perf_counter()
    keys = [functional_hash(compiled(text), points) for text in texts]
    seconds = time.perf_counter() - start
    hits = _repeats(keys)
    first = dict(zip(reversed(keys), reversed(texts), strict=True))
    checked = [i for i, hit in enumerate(hits) if hit][:1000]
    wrong = sum(_differ(compiled(texts[i]), compiled(first[keys[i]]), checks) for i in checked)
    by_chance = sum(_differ(compiled(texts[i]), compiled(texts[rng.randrange(i)]), checks) for i in checked)
    return {
        "saved": sum(hits) / len(hits),
        "checked": len(checked),
        "right": len(checked) - wrong,
        "right at random": len(checked) - by_chance,
        "arms": {"text without dead nodes": sum(_repeats(texts)) / candidates},  # a tree has no dead nodes
        "details": {
            "distinct_texts": len(set(texts)),
            "distinct_functions": len(set(keys)),
            "hash_seconds_per_candidate": seconds / candidates,
            "hits_checked_on_100_other_points": len(checked),
            "hits_that_differ_there": wrong,
        },
    }


def _differ(f: Callable[..., float], g: Callable[..., float], points: list[tuple[float, ...]]) -> bool:
    return any(abs(f(*xy) - g(*xy)) > 1e-5 * max(abs(f(*xy)), abs(g(*xy)), 1e-9) for xy in points)


# Ageing evolution over small cell networks that predict the next letter of English text

OPERATIONS = ("linear", "relu", "tanh", "negate", "identity", "add", "multiply")
BINARY = ("add", "multiply")
CONTEXT, LETTERS, WIDTH, NODES = 8, 28, 32, 5
Node = tuple[str, int, int]  # operation and its inputs: 0 is the cell's input, i the output of node i


class Cell(nn.Module):
    """One-hot letters -> linear -> the genotype's graph, run from its last node by demand -> linear -> letters."""

    def __init__(self, genotype: tuple[Node, ...]):
        super().__init__()
        self.genotype = genotype
        self.embed, self.head = nn.Linear(CONTEXT * LETTERS, WIDTH), nn.Linear(WIDTH, LETTERS)
        self.linears = nn.ModuleDict(
            {str(i): nn.Linear(WIDTH, WIDTH) for i, node in enumerate(genotype, 1) if node[0] == "linear"}
        )

    def forward(self, letters: Tensor) -> Tensor:
        one_hot = nn.functional.one_hot(letters, LETTERS).flatten(1).to(self.head.weight.dtype)
        values = [self.embed(one_hot)]
        needed = self._needed(len(self.genotype))
        for number, (operation, a, b) in enumerate(self.genotype, 1):
            values.append(self._run(number, operation, values[a], values[b]) if number in needed else values[0])
        letter: Tensor = self.head(values[-1])
        return letter

    def _needed(self, last: int) -> set[int]:
        needed, waiting = set(), [last]
        while waiting:
            number = waiting.pop()
            if number and number not in needed:
                needed.add(number)
                operation, a, b = self.genotype[number - 1]
                waiting += [a, b] if operation in BINARY else [a]
        return needed

    def _run(self, number: int, operation: str, a: Tensor, b: Tensor) -> Tensor:
        match operation:
            case "linear":
                a = self.linears[str(number)](a)
            case "relu":
                return torch.relu(a)
            case "tanh":
                return torch.tanh(a)
            case "negate":
                return -a
            case "add":
                return a + b
            case "multiply":
                return a * b
        return a


def letters_data(windows: int) -> tuple[Tensor, Tensor]:
    """(windows, CONTEXT) int64 letters of the language reference and the letter that follows each window."""
    text = "".join(c if "a" <= c <= "z" else " " for c in english_text().lower())
    codes = torch.tensor([0 if c == " " else ord(c) - 96 for c in " ".join(text.split())])
    starts = torch.randperm(len(codes) - CONTEXT, generator=torch.Generator().manual_seed(0))[:windows]
    spans = codes[starts[:, None] + torch.arange(CONTEXT + 1)]
    return spans[:, :CONTEXT], spans[:, CONTEXT]


def train_and_score(genotype: tuple[Node, ...], data: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor]) -> float:
    """Accuracy on the held-out windows after one epoch; weights and order of the data are functions of the network only."""
    net = initialise(Cell(genotype), data[0][:2])
    optimiser = torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.9)
    for inputs, targets in zip(torch.split(data[0], 128), torch.split(data[1], 128), strict=True):
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(net(inputs), targets)
        torch.autograd.backward([loss])
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
    with torch.no_grad():
        return float((net(held_out[0]).argmax(1) == held_out[1]).double().mean())


def cell_key(genotype: tuple[Node, ...], data: tuple[Tensor, Tensor]) -> str:
    """What the untrained network puts out on ten windows, and what two steps of training make of it, in double precision."""
    net = initialise(Cell(genotype).double(), data[0][:2])
    halves = [data[0][:5], data[0][5:10]]
    targets = [data[1][:5], data[1][5:10]]
    return functional_hash(net, halves, training=Training(targets, loss=nn.functional.cross_entropy, learning_rate=0.3))


def evolve(
    score: Callable[[tuple[Node, ...]], float], *, candidates: int, population: int, seed: int
) -> list[tuple[tuple[Node, ...], float]]:
    """Regularised evolution: the oldest dies, the child is a mutation of the best of ten. Returns all candidates with scores."""
    rng = random.Random(seed)

    def random_node(position: int) -> Node:
        return rng.choice(OPERATIONS), rng.randrange(position), rng.randrange(position)

    living: deque[tuple[tuple[Node, ...], float]] = deque(maxlen=population)
    visited = []
    for number in range(candidates):
        if number < population:
            genotype = tuple(random_node(position) for position in range(1, NODES + 1))
        else:
            parent = max(rng.sample(list(living), min(10, population)), key=lambda entry: entry[1])[0]
            position = rng.randrange(NODES)
            genotype = (*parent[:position], random_node(position + 1), *parent[position + 1 :])
        living.append((genotype, score(genotype)))
        visited.append(living[-1])
    return visited


def _saved_on_networks(candidates: int, seed: int) -> dict[str, Any]:
    """Two evolutions from one seed, without and with the cache: the first gives the right score of every candidate."""
    inputs, targets = letters_data(40000)
    data, held_out = (inputs[:32000], targets[:32000]), (inputs[32000:], targets[32000:])
    population = min(50, candidates // 2)

    def score(genotype: tuple[Node, ...]) -> float:
        return train_and_score(genotype, data, held_out)

    start = time.perf_counter()
    plain = evolve(score, candidates=candidates, population=population, seed=seed)
    plain_seconds = time.perf_counter() - start

    cache = FunctionalCache()
    hits: list[bool] = []

    def cached_key(genotype: tuple[Node, ...]) -> str:
        key = cell_key(genotype, data)
        hits.append(key in cache)
        return key

    start = time.perf_counter()
    cached = evolve(cache.memoise(cached_key)(score), candidates=candidates, population=population, seed=seed)
    cached_seconds = time.perf_counter() - start

    report = cache.report()
    rng = random.Random(seed)
    stored = [i for i, hit in enumerate(hits) if hit]
    # where a wrong score has led the second evolution elsewhere, the candidate is evaluated for the comparison
    true = {i: plain[i][1] if plain[i][0] == cached[i][0] else score(cached[i][0]) for i in stored}
    genotypes = [genotype for genotype, _ in cached]
    return {
        "saved": sum(hits) / len(hits),
        "checked": len(stored),
        "right": sum(cached[i][1] == true[i] for i in stored),
        "right at random": sum(cached[rng.randrange(i)][1] == true[i] for i in stored),
        "arms": {
            "text without dead nodes": sum(_repeats([_living_text(genotype) for genotype in genotypes])) / candidates,
            "text": sum(_repeats([str(genotype) for genotype in genotypes])) / candidates,
        },
        "details": {
            "evaluations": report.misses,
            "hash_to_evaluation": report.hash_to_evaluation,
            "predicted_speedup": report.speedup,
            "measured_speedup": plain_seconds / cached_seconds,
            "same_candidates_visited": [a[0] for a in plain] == genotypes,
            "best_accuracy": {"without": max(v for _, v in plain), "with": max(v for _, v in cached)},
        },
    }


def _living_text(genotype: tuple[Node, ...]) -> str:
    """The genotype as nested text from its last node on: nodes that nothing uses, and the numbers of the others, do not appear."""

    def text(number: int) -> str:
        if number == 0:
            return "x"
        operation, a, b = genotype[number - 1]
        return f"{operation}({text(a)},{text(b)})" if operation in BINARY else f"{operation}({text(a)})"

    return text(len(genotype))

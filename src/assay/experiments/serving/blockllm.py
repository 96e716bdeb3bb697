"""BlockLLM: six fine-tuned variants of one model behind one batch, against a copy of its own for each, on a skewed trace, really run.

Every step of every arm is executed here and timed; only the waiting for the next request is skipped, so that the clock of a replay is
that of the steps' times and the arrivals. All arms answer the same requests on the same threads. The same requests are simulated with block
times fitted to other traces, and stand beside what was measured; four servers of three devices are simulated only.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from assay.experiments.core import Figure, Guard, Operator, Quality, experiment
from assay.experiments.serving.blockllm_tenants import (
    TENANTS,
    Base,
    base_model,
    filled_zoo,
    fine_tuned,
    ids_of,
    own_model,
)
from assay.measure.stats import student_interval
from assay.methods.builtin.decode_loop import Decoder
from assay.methods.core.fleet.traces import Request, Streams
from assay.methods.core.generation.paged import Sequence as Pages
from assay.methods.core.generation.paged import pages_for
from assay.methods.serving.blockllm import (
    THRESHOLD,
    Answer,
    Batch,
    BlockTimes,
    Chain,
    Engine,
    Model,
    Node,
    Pass,
    SharedModel,
    Zoo,
    apart,
    cluster,
    distinct_bytes,
    fitted,
    place,
    scores,
    simulate_blocks,
    substituted,
)

# --------------------------------------------------------------------------------------------------------------- the arms


class LoopEngine:
    """As `Engine`, for one model on the compiled decode loop with its own weights."""

    def __init__(self, model: Any, *, most: int = 32, pages: int = 512) -> None:
        self.decoder = Decoder(model, weights="fp32", cache="float32")
        self.pool = self.decoder.new_pool(pages)
        self.most = most
        self.passes: list[Pass] = []
        self.waiting: deque[Answer] = deque()
        self.running: list[tuple[Answer, Pages]] = []

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def submit(self, tenant: str, ids: Sequence[int], new_tokens: int) -> Answer:
        row = Answer(tenant, list(ids), new_tokens)
        self.waiting.append(row)
        return row

    def step(self) -> list[Answer]:
        done = []
        if self.waiting and len(self.running) < self.most:
            row = self.waiting.popleft()
            pages = Pages(self.pool.take(pages_for(len(row.ids) + row.new_tokens)), 0)
            logits = self.decoder.extend(self.pool, [(pages, row.ids)], logits="last")
            row.made.append(int(logits[0].argmax()))
            self.running.append((row, pages))
        going = [(row, pages) for row, pages in self.running if not row.finished]
        if going:
            made, _ = self.decoder.run(self.pool, [pages for _, pages in going], [row.made[-1] for row, _ in going], 1)
            for (row, _), token in zip(going, made[:, 0].tolist(), strict=True):
                row.made.append(token)
        for row, pages in self.running:
            if row.finished:
                self.pool.release(pages.pages)
                done.append(row)
        self.running = [(row, pages) for row, pages in self.running if not row.finished]
        return done


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and its seconds."""
    began = time.perf_counter()
    found = call()
    return found, time.perf_counter() - began


@dataclass(frozen=True)
class Asked:
    """A request with its prompt."""

    request: Request
    ids: list[int]


@dataclass(frozen=True)
class Replayed:
    """Seconds from each request to its last token, in the order of the requests, the seconds worked, the answers, and the passes."""

    latencies: list[float]
    busy: float
    answers: list[list[int]]
    passes: list[Pass]

    @property
    def p95(self) -> float:
        return float(np.quantile(self.latencies, 0.95))


def turns(engines: list[Any], oldest: Mapping[int, float], last: int) -> int:
    """The next busy engine after the last one."""
    return next(
        (last + 1 + i) % len(engines) for i in range(len(engines)) if engines[(last + 1 + i) % len(engines)].busy
    )


def first_come(engines: list[Any], oldest: Mapping[int, float], last: int) -> int:
    """The engine with the oldest request."""
    return min((i for i, engine in enumerate(engines) if engine.busy), key=lambda i: oldest[i])


def replay(engines: Mapping[str, Any], asked: Sequence[Asked], policy: Callable[..., int]) -> Replayed:
    """Answer requests as they come, one step at a time of one engine after another; the clock is that of the steps and the arrivals."""
    listed = list({id(engine): engine for engine in engines.values()}.values())
    for engine in listed:
        engine.passes.clear()
    number = {id(engine): i for i, engine in enumerate(listed)}
    coming = deque(sorted(range(len(asked)), key=lambda i: asked[i].request.at))
    under_way: dict[int, tuple[int, int]] = {}  # of an answer: its request and its engine
    rows: dict[int, Answer] = {}
    latencies = [0.0] * len(asked)
    clock, busy, last = 0.0, 0.0, -1
    while coming or under_way:
        while coming and asked[coming[0]].request.at <= clock:
            i = coming.popleft()
            one = asked[i]
            engine = engines[one.request.tenant]
            rows[i] = engine.submit(one.request.tenant, one.ids, one.request.new_tokens)
            under_way[id(rows[i])] = (i, number[id(engine)])
        if not under_way:
            clock = asked[coming[0]].request.at
            continue
        oldest: dict[int, float] = {}
        for i, e in under_way.values():
            oldest[e] = min(oldest.get(e, float("inf")), asked[i].request.at)
        last = policy(listed, oldest, last)
        done, seconds = timed(listed[last].step)
        clock, busy = clock + seconds, busy + seconds
        for row in done:
            i, _ = under_way.pop(id(row))
            latencies[i] = clock - asked[i].request.at
    passes = [one for engine in listed for one in engine.passes]
    return Replayed(latencies, busy, [rows[i].made for i in range(len(asked))], passes)


ZOO, SEPARATE = "one zoo of blocks", "per-model provisioning, in turn"
SEPARATE_FIRST = "per-model provisioning, first come first served"
ADAPTERS = "adapters in one batch, the others each alone, first come first served"
LOOP = "compiled decode loop of each tenant, in turn"
LOOP_FIRST = "compiled decode loop of each tenant, first come first served"
FREE = (SEPARATE, SEPARATE_FIRST, ADAPTERS)
EXACT = (LOOP, LOOP_FIRST)


class House:
    """All arms over the same tenants, warmed up, and what a typical request takes alone on a model of its own.

    `own` are the tenants' models made without the room's code: what they are provisioned with one by one, and what answers are held
    against.
    """

    def __init__(self, base: Base, steps: int) -> None:
        self.base, self.fine_tuned = base, fine_tuned(base, steps)
        self.zoo = filled_zoo(base, steps)
        self.own = {tenant: own_model(base, tenant, steps) for tenant in TENANTS}
        self.kept = {tenant: ids_of(base, tenant)[1] for tenant in TENANTS}
        self.shared = self.shared_model()
        one = Engine(self.shared)
        separate: Mapping[str, Any] = {tenant: Engine(model) for tenant, model in self.own.items()}
        loop: Mapping[str, Any] = {tenant: LoopEngine(model) for tenant, model in self.own.items()}
        adapted = {tenant: one for tenant, one in self.zoo.chains.items() if one.adapters}
        together = {**separate, **dict.fromkeys(adapted, Engine(SharedModel(self.zoo, adapted)))}
        self.arms: dict[str, tuple[Mapping[str, Any], Callable[..., int]]] = {
            ZOO: (dict.fromkeys(TENANTS, one), turns),
            SEPARATE: (separate, turns),
            SEPARATE_FIRST: (separate, first_come),
            ADAPTERS: (together, first_come),
            LOOP: (loop, turns),
            LOOP_FIRST: (loop, first_come),
        }
        warm = [Asked(Request(0.0, 8, 3, tenant), self.kept[tenant][:8].tolist()) for tenant in TENANTS]
        for engines, policy in self.arms.values():
            replay(engines, warm, policy)

    def shared_model(self) -> SharedModel:
        return SharedModel(self.zoo, {tenant: self.zoo.chains[tenant] for tenant in TENANTS})

    def trace(self, seed: int, requests: int, skew: float, rate: float) -> list[Asked]:
        """Poisson arrivals; the n-th tenant asks 1 / n ** skew as often as the first; prompts from its kept text."""
        chance = Streams(seed)
        share = np.arange(1, len(TENANTS) + 1.0) ** -skew
        names = list(TENANTS)
        who = chance.of("tenants").choice(len(names), size=requests, p=share / share.sum())
        gaps = chance.of("arrivals").exponential(1 / rate, requests)
        lengths = chance.of("lengths")
        found, at = [], 0.0
        for number in range(requests):
            at += float(gaps[number])
            kept = self.kept[names[who[number]]]
            prompt, new = int(lengths.integers(*PROMPTS)), int(lengths.integers(*ANSWERS))
            start = int(lengths.integers(len(kept) - prompt))
            found.append(Asked(Request(at, prompt, new, names[who[number]]), kept[start : start + prompt].tolist()))
        return found

    def alone(self) -> float:
        """Seconds of a request of mean lengths with nothing else to do, on a model of its own: the median of three tenants'."""
        prompt, new = sum(PROMPTS) // 2, sum(ANSWERS) // 2
        engines, policy = self.arms[SEPARATE]
        seen = []
        for tenant in list(TENANTS)[:3]:
            one = Asked(Request(0.0, prompt, new, tenant), self.kept[tenant][:prompt].tolist())
            seen.append(replay(engines, [one], policy).busy)
        return float(np.median(seen))


PROMPTS, ANSWERS = (12, 33), (5, 10)  # tokens, the last left out


@dataclass(frozen=True)
class Compared:
    """What every arm did with every trace."""

    rate: float
    traces: list[list[Asked]]
    runs: dict[str, list[Replayed]]

    def best(self, names: Sequence[str], value: Callable[[Replayed], float]) -> list[float]:
        """Trace by trace the least of these arms."""
        return [min(map(value, runs)) for runs in zip(*(self.runs[name] for name in names), strict=True)]


def compared(house: House, requests: int, skew: float, load: float, traces: int) -> Compared:
    """Every arm on every trace, the arms in another order each time.

    `load` is the share of its time that per-model provisioning would work, were each request alone.
    """
    rate = load / house.alone()
    made = [house.trace(seed, requests, skew, rate) for seed in range(traces)]
    runs: dict[str, list[Replayed]] = {name: [] for name in house.arms}
    names = list(house.arms)
    for number, trace in enumerate(made):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            runs[name].append(replay(house.arms[name][0], trace, house.arms[name][1]))
    return Compared(rate, made, runs)


# ---------------------------------------------------------------------------------------------------------------- quality


def forced(model: Any, rows: Sequence[tuple[str, list[int], list[int]]]) -> Tensor:
    """Log-probabilities (rows, tokens, vocabulary) after each token of the continuations of prompts, decoded together in one batch."""
    batch = Batch(model)
    answers = [Answer(tenant, ids, len(more)) for tenant, ids, more in rows]
    said = [[batch.prefill(row).log_softmax(-1)] for row in answers]
    for step in range(len(rows[0][2]) - 1):
        for row, (_, _, more) in zip(answers, rows, strict=True):
            row.made.append(more[step])
        logits = batch.advance(answers, [row.made[-1] for row in answers]).log_softmax(-1)
        for one, found in zip(said, logits, strict=True):
            one.append(found)
    return torch.stack([torch.stack(one) for one in said])


def divergence(reference: Tensor, other: Tensor) -> list[float]:
    """Mean Kullback-Leibler divergence of each row from the reference, nats a token."""
    a, b = reference.double(), other.double()
    return (a.exp() * (a - b)).sum(-1).mean(-1).tolist()


def quality_of(house: House, windows: int, prompt: int, tokens: int) -> tuple[Quality, dict[str, Any]]:
    """How far the batch that crosses tenants is from each tenant's own model, which was made without the room's code, and the controls:
    everybody answered by the base, by another tenant's chain, and by one model of the tenants' mean weights.
    """
    rows = []
    for tenant in TENANTS:
        kept = house.kept[tenant]
        for number in range(windows):
            start = number * (len(kept) - prompt - tokens) // windows
            ids = kept[start : start + prompt + tokens].tolist()
            rows.append((tenant, ids[:prompt], ids[prompt:]))
    reference = torch.cat([forced(house.own[row[0]], [row]) for row in rows])
    names = list(TENANTS)
    others = {tenant: names[(i + 1) % len(names)] for i, tenant in enumerate(names)}
    ours = divergence(reference, forced(house.shared, rows))
    arms = {
        "deleted": forced(
            SharedModel(house.zoo, {"base": house.zoo.chains["base"]}), [("base", *row[1:]) for row in rows]
        ),
        "random": forced(house.shared, [(others[row[0]], *row[1:]) for row in rows]),
        "rival": forced(mean_model(house), rows),
    }
    interval = student_interval(ours)
    controls = {name: float(np.mean(divergence(reference, found))) for name, found in arms.items()}
    wanted = torch.tensor([row[2] for row in rows])[..., None]
    nll = {name: float(-found.gather(-1, wanted).mean()) for name, found in (("own model", reference), *arms.items())}
    rival = "one model of the tenants' mean weights"
    quality = Quality(interval.median, 0.0, interval.low, interval.high, controls, rival=rival)
    return quality, {"nats_a_token_on_own_text": nll, "divergence_by_row": ours}


def mean_model(house: House) -> Any:
    """One model of the mean of all tenants' weights."""
    total: dict[str, Tensor] = {}
    for tenant in TENANTS:
        for name, tensor in house.own[tenant].state_dict().items():
            total[name] = total[name].add_(tensor) if name in total else tensor.clone()
    model = house.zoo.monolith("base", own=True)
    model.load_state_dict({name: tensor.div_(len(TENANTS)) for name, tensor in total.items()})
    return model


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of memory that tensors take together, each storage counted once."""
    storages = {one.data_ptr(): one.nbytes() for one in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storages.values())


# -------------------------------------------------------------------------------------------------------------- simulated


def described(zoo: Zoo) -> tuple[dict[str, Model], dict[str, float]]:
    """The tenants' models for the simulator, and the bytes of blocks. The look-up of embeddings and the adapters are left out: both are
    small beside a layer."""
    models: dict[str, Model] = {}
    sizes: dict[str, float] = {}
    config = zoo.shell().config
    width = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    item = zoo.dtype.itemsize
    for tenant in TENANTS:
        blocks = {where: digest for where, digest in zoo.chains[tenant].blocks.items() if where != "embed"}
        models[tenant] = Model(
            tuple(blocks.values()),
            tuple(where.startswith("layer ") for where in blocks),
            float(config.hidden_size * item),
            float(2 * width * item),
        )
        sizes |= {digest: float(zoo.blocks[digest].bytes) for digest in blocks.values()}
    return models, sizes


def features(one: Pass, models: Mapping[str, Model], sizes: Mapping[str, float]) -> tuple[float, float, float, float]:
    """Of a measured pass: blocks run, their bytes, their bytes times the tokens in each, and seconds."""
    tokens: dict[str, int] = {}
    for tenant in one.tenants:
        share = one.tokens // len(one.tenants)
        for block in models[tenant].blocks:
            tokens[block] = tokens.get(block, 0) + share
    read = sum(sizes[block] for block in tokens)
    return len(tokens), read, sum(sizes[block] * count for block, count in tokens.items()), max(one.seconds, 1e-9)


def simulated(house: House, seen: Compared) -> dict[str, Any]:
    """The last traces as the simulator has them, with times fitted to the first half of them, beside what was measured."""
    if len(seen.traces) < 2:
        raise ValueError("traces must be at least two: times are fitted to one and tried on another")
    shared, sizes = described(house.zoo)
    own = apart(shared)
    sizes_apart = {block: sizes[block.rpartition("/")[2]] for one in own.values() for block in one.blocks}
    half = len(seen.traces) // 2
    found: dict[str, Any] = {}
    times: dict[str, BlockTimes] = {}
    for name, models, size in ((ZOO, shared, sizes), (SEPARATE, own, sizes_apart)):
        measured = [features(one, models, size) for run in seen.runs[name][:half] for one in run.passes]
        times[name] = fitted(measured)
        node = Node("here", "here", 1e15)
        placement = {block: ["here"] for block in size}
        errors = []
        for trace, run in list(zip(seen.traces, seen.runs[name], strict=True))[half:]:
            told = simulate_blocks(
                [one.request for one in trace], models, placement, size, [node], times[name], most=32
            )
            worked = sum(visit.end - visit.start for visit in told.visits)
            errors.append(
                {
                    "p95_simulated": told.quantile(0.95),
                    "p95_measured": run.p95,
                    "busy_simulated": worked,
                    "busy_measured": run.busy,
                }
            )
        found[name] = {"times": vars(times[name]), "traces": errors}
    found["error_of_p95"] = {
        name: float(np.mean([one["p95_simulated"] / one["p95_measured"] - 1 for one in found[name]["traces"]]))
        for name in (ZOO, SEPARATE)
    }
    return found | {
        "four servers of three devices, simulated only": on_a_cluster(seen, shared, sizes, own, sizes_apart, times)
    }


def on_a_cluster(
    seen: Compared,
    shared: Mapping[str, Model],
    sizes: Mapping[str, float],
    own: Mapping[str, Model],
    sizes_apart: Mapping[str, float],
    times: Mapping[str, BlockTimes],
) -> dict[str, Any]:
    """The traces one behind the other, twelve times as dense, on twelve devices as fast as this machine that hold one model and a half."""
    requests: list[Request] = []
    start = 0.0
    for trace in seen.traces:
        requests += [replace(one.request, at=start + one.request.at / 12) for one in trace]
        start = requests[-1].at
    counts = {tenant: sum(one.tenant == tenant for one in requests) / max(start, 1e-9) for tenant in shared}
    largest = max(sum(sizes[block] for block in dict.fromkeys(one.blocks)) for one in shared.values())
    nodes = cluster(4, 3, memory=1.5 * largest)
    found = {}
    for name, models, size in ((ZOO, shared, sizes), (SEPARATE, own, sizes_apart)):
        where = place(models, counts, size, nodes, whole=name == SEPARATE)
        told = simulate_blocks(requests, models, where, size, nodes, times[name], most=32)
        found[name] = {
            "p95_seconds": told.quantile(0.95),
            "busy": float(np.mean([told.busy(node.name) for node in nodes])),
            "requests_a_batch": told.rows(),
            "caches_moved": told.moves,
        }
    return found


# ------------------------------------------------------------------------------------------------------------ equivalence


def equivalence(house: House, prompt: int) -> dict[str, Any]:
    """Blocks left, and what each tenant loses on its own text, as the threshold falls; layers are scored at one depth, on other text."""
    kept, end = house.kept, prompt + 8
    rows = [(tenant, kept[tenant][:prompt].tolist(), kept[tenant][prompt:end].tolist()) for tenant in TENANTS]
    probe = torch.stack([kept[tenant][end : end + prompt] for tenant in TENANTS])
    known = scores(house.zoo, probe)
    pairs = sorted(value for (a, b), value in known.items() if a < b)
    reference = forced(house.shared, rows)
    curve = []
    for threshold in (1.01, 0.999, THRESHOLD, 0.9):
        chains: dict[str, Chain] = {
            name: one for name, one in substituted(house.zoo, known, threshold).items() if name in TENANTS
        }
        lost = divergence(reference, forced(SharedModel(house.zoo, chains), rows))
        curve.append(
            {
                "threshold": threshold,
                "bytes": distinct_bytes(house.zoo, chains),
                "blocks": len(set().union(*(one.digests() for one in chains.values()))),
                "divergence": dict(zip(TENANTS, lost, strict=True)),
            }
        )
    return {
        "pairs": len(pairs),
        "least": pairs[0] if pairs else None,
        "median": pairs[len(pairs) // 2] if pairs else None,
        "curve": curve,
    }


# ------------------------------------------------------------------------------------------------------------- the claims

OPERATOR = Operator(
    "answers to requests for several fine-tuned variants of one model, on one machine",
    free="a batch of each tenant's model, in turn or first come first served, or all adapters in one batch as multi-adapter serving has "
    "them and the others each alone, whichever is best on the trace",
    exact="our compiled decode loop of each tenant, in turn or first come first served, whichever is better on the trace",
)
GUARD = Guard(
    "divergence of a tenant's next-token distributions from its own model's, decoded in a batch that crosses tenants, nats a token",
    1e-4,
    relative=False,
)
PAPER = {
    "model": "fine-tuned variants of a few foundation models",
    "tenants": "not known to us",
    "skew": "of a trace that was not published",
    "devices": "12 A100-80GB in 4 servers on 100 Gb/s (secondary source)",
    "load": "of a trace that was not published",
}
DEPARTURES = {
    "model": "SmolLM2-135M in float32 and six variants fine-tuned here, shown to know their own texts better; a byte model at smoke",
    "tenants": "six, so that all their copies fit this machine",
    "skew": "Zipf's law, the n-th tenant 1 / n as often as the first",
    "devices": "one machine; twelve devices are simulated in the details of the claim about latency",
    "load": "Poisson arrivals, as many as per-model provisioning could answer one at a time",
}
SIZES: dict[str, dict[str, Any]] = {
    "smoke": {"model": "bytes", "steps": 8, "requests": 8, "skew": 1.0, "load": 1.0, "traces": 2, "windows": 1},
    "small": {"model": "smollm2-135m", "steps": 12, "requests": 10, "skew": 1.0, "load": 1.0, "traces": 3, "windows": 2},
    "full": {"model": "smollm2-135m", "steps": 300, "requests": 200, "skew": 1.0, "load": 1.0, "traces": 10, "windows": 8},
}  # fmt: skip


def _points(**changes: Any) -> dict[str, list[dict[str, Any]]]:
    return {scale: [{**size, **(changes if scale == "small" else {})}] for scale, size in SIZES.items()}


def _figure(
    value: Callable[[Replayed], float],
    shown: Callable[[float], float],
    model: str,
    steps: int,
    requests: int,
    skew: float,
    load: float,
    traces: int,
    windows: int,
    more: Callable[[House, Compared], dict[str, Any]],
) -> Figure:
    house = House(base_model(model), steps)
    quality, told = quality_of(house, windows, prompt=16, tokens=12)
    seen = compared(house, requests, skew, load, traces)
    ours, theirs = ([value(run) for run in seen.runs[name]] for name in (ZOO, SEPARATE))
    rivals = {"zoo": ours, "free": seen.best(FREE, value), "exact": seen.best(EXACT, value)}
    times = {name: [math.log(b / a) for a, b in zip(found, theirs, strict=True)] for name, found in rivals.items()}
    interval = student_interval(times["zoo"])

    def mean(logs: Sequence[float]) -> float:
        return shown(math.exp(float(np.mean(logs))))

    sizes = {tenant: house.zoo.bytes_of(tenant) for tenant in TENANTS}
    answered = [
        float(np.mean([a == b for a, b in zip(x, y, strict=True)]))
        for mine, other in zip(seen.runs[ZOO], seen.runs[SEPARATE], strict=True)
        for x, y in zip(mine.answers, other.answers, strict=True)
    ]
    return Figure(
        mean(times["zoo"]),
        "%",
        low=shown(math.exp(interval.low)),
        high=shown(math.exp(interval.high)),
        baseline=0.0,
        free=mean(times["free"]),
        exact=mean(times["exact"]),
        arms={
            name: mean([math.log(b / value(run)) for run, b in zip(runs, theirs, strict=True)])
            for name, runs in seen.runs.items()
            if name not in (ZOO, SEPARATE)
        },
        quality=quality,
        details={
            "bytes": {
                "zoo": house.zoo.bytes,
                "separate": sum(sizes.values()),
                "base": house.zoo.bytes_of("base"),
                "tenants": sizes,
                "zoo_in_memory": held_bytes(house.shared.tensors()),
                "separate_in_memory": held_bytes(tensor for one in house.own.values() for tensor in (*one.parameters(), *one.buffers())),
            },
            "nats_fewer_than_the_base": house.fine_tuned,
            "requests_a_second": seen.rate,
            "times_less_by_trace": {name: [math.exp(log) for log in logs] for name, logs in times.items()},
            "arms": {
                name: {
                    "p50_seconds": float(np.median([s for run in runs for s in run.latencies])),
                    "p95_seconds": float(np.mean([run.p95 for run in runs])),
                    "busy_seconds": sum(run.busy for run in runs),
                    "tokens_a_busy_second": sum(len(a) for run in runs for a in run.answers) / sum(run.busy for run in runs),
                    "rows_a_step": _rows(runs),
                }
                for name, runs in seen.runs.items()
            },
            "tokens_the_same_as_with_copies": float(np.mean(answered)),
            **told,
            **more(house, seen),
        },
    )  # fmt: skip


def _rows(runs: Sequence[Replayed]) -> float | None:
    """Rows of a decoding pass on average; None where passes were not noted. A pass over a prompt sees no cached token."""
    found = [len(one.tenants) for run in runs for one in run.passes if one.seen]
    return float(np.mean(found)) if found else None


MEASURED = (
    "six tenants on one machine; steps really run, one after the other, and waiting skipped; requests drawn by us"
)


@experiment(
    "blockllm/p95-latency-reduction",
    points=_points(),
    operator=OPERATOR,
    paper=PAPER,
    departures=DEPARTURES | {"requests": "few, so that the 95th percentile of a trace is nearly its worst"},
    guard=GUARD,
    refuted_if="the 95th percentile is certainly higher from the zoo than with a copy of its own for each tenant",
    measured_here=MEASURED,
    minutes=240,
)
def p95_latency(model: str, steps: int, requests: int, skew: float, load: float, traces: int, windows: int) -> Figure:
    """Per cent that the 95th percentile of a trace's latencies falls: the geometric mean of the ratios, with Student's interval over
    traces, each run by every arm.

    The margin, 1e-4 nats, is thousands of times what rounding does in float32 and far below what another tenant's weights do.
    """
    return _figure(
        lambda run: run.p95, lambda times: 100 * (1 - 1 / times), model, steps, requests, skew, load, traces, windows, _simulated_too
    )  # fmt: skip


def _simulated_too(house: House, seen: Compared) -> dict[str, Any]:
    return {"simulated": simulated(house, seen)}


@experiment(
    "blockllm/gpu-utilisation-gain",
    points=_points(windows=1),
    operator=OPERATOR,
    paper=PAPER,
    departures=DEPARTURES,
    guard=GUARD,
    refuted_if="the zoo certainly takes more of the machine's time for the same answers than a copy of its own for each tenant",
    measured_here="useful work a busy second of the processor, which has no counter of utilisation: the same answers over the seconds "
    "worked for them; " + MEASURED,
    minutes=240,
)
def utilisation(model: str, steps: int, requests: int, skew: float, load: float, traces: int, windows: int) -> Figure:
    """Per cent more of the same answers a second that the machine works: the geometric mean of the ratios of seconds, with Student's
    interval over traces, each run by every arm.

    The guard is the other claim's.
    """
    return _figure(
        lambda run: run.busy, lambda times: 100 * (times - 1), model, steps, requests, skew, load, traces, windows, _equivalence_too
    )  # fmt: skip


def _equivalence_too(house: House, seen: Compared) -> dict[str, Any]:
    return {"equivalence": equivalence(house, 24)}

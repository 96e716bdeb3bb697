"""Vision serving: how much of a request's latency lies outside inference, and is the optimised two-model pipeline worth its broker?

The first claim is measured on the room's own server over HTTP on loopback, one request at a time, for images of three sizes and networks
of two; beside it `assay serve` is taken apart in the same way. The second is a detector and a classifier with a broker between:
everything plain and a log on disk, as in the prior work, against draft decoding, bytes, dynamic batches and a broker in memory.
"""

from __future__ import annotations

import atexit
import contextlib
import http.client
import io
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from assay.experiments.children import count_children_as_ours
from assay.experiments.core import Figure, Guard, Operator, Quality, Trained, Trial, experiment
from assay.experiments.rates import chosen
from assay.experiments.serving import dnn_server_overheads_data as data
from assay.experiments.serving.dnn_server_overheads_data import Find, Scene, finds
from assay.measure.stats import bootstrap, student_interval
from assay.methods.serving.dnn_server_overheads import (
    INFERENCE,
    Broker,
    Cascade,
    Lifetime,
    LogBroker,
    Message,
    Pipeline,
    Preprocess,
    QueueBroker,
    SocketBroker,
    Stage,
    StageProfiler,
    VisionClient,
    VisionServer,
    advice,
    amdahl,
    breakdown,
    closed_loop,
    flow,
    impact,
    open_loop,
    read_trace,
    simulate,
    throughput,
)
from assay.paths import cache_dir, scratch_dir

PAPER_SHARE = 56.0  # per cent
CORES = max(1, torch.get_num_threads())

# ---------------------------------------------------------------------------------------------------- where a request's time goes

PLAIN, QUICK = Preprocess(data.SERVED), Preprocess(data.SERVED, draft=True, precision="uint8")
PREPARING = ("decode", "resize", "normalise")
TEXT_MODEL = "smollm2-135m"

SHARES: dict[str, list[dict[str, Any]]] = {
    "smoke": [{"image": "medium", "network": "compact", "blocks": 2, "requests": 4, "answers": 0}],
    "small": [
        {"image": "medium", "network": "compact", "blocks": 8, "requests": 12, "answers": 12},
        {"image": "small", "network": "compact", "blocks": 4, "requests": 12, "answers": 0},
        {"image": "large", "network": "compact", "blocks": 4, "requests": 6, "answers": 0},
        {"image": "medium", "network": "large", "blocks": 4, "requests": 12, "answers": 0},
    ],
    "full": [
        {"image": "medium", "network": "compact", "blocks": 12, "requests": 50, "answers": 60},
        {"image": "small", "network": "compact", "blocks": 12, "requests": 50, "answers": 0},
        {"image": "large", "network": "compact", "blocks": 12, "requests": 20, "answers": 0},
        {"image": "medium", "network": "large", "blocks": 12, "requests": 50, "answers": 0},
    ],
}


@experiment(
    "dnn_server_overheads/non-inference-share",
    points=SHARES,
    operator=Operator(
        "an answer to a JPEG from a server, one request at a time",
        free="draft decoding and bytes instead of float32, in the same server",
    ),
    paper={"image": "medium", "network": "ResNet-50 and vision transformers, compiled for the GPU", "device": "a GPU"},
    departures={
        "network": "a trained network of 0.3 thousand million multiply-adds, about MobileNetV2's, as is served on processors: inference of "
        "the paper's takes a processor twenty times as long as a GPU, and what is outside does not",
        "device": "this machine's processor does both, preprocessing and inference",
    },
    decides={scale: points[0] for scale, points in SHARES.items()},
    guard=Guard(
        "inference's time by the marks against the network alone, apart by",
        0.3,
        relative=False,
        without={"rival": "to subtract the network alone, which needs no marks, is what the marks are held against"},
    ),
    refuted_if="less than 42 % of a medium image's latency lies outside inference, the whole interval, or draft decoding and bytes alone "
    "bring it under half of the paper's 56 %",
    refutes=lambda record: record["measured"]["high"] < 0.75 * PAPER_SHARE or (record["free"] or 0) < PAPER_SHARE / 2,
    tolerance=0.25 * PAPER_SHARE,
    measured_here="share of latency outside a compact network's inference, on a processor that does the rest too",
    minutes=20,
)
def non_inference_share(image: str, network: str, blocks: int, requests: int, answers: int) -> Figure:
    """Per cent of the time from a client's sending an image to its having the answer that is not inference, blocks of requests apart.

    The paper says "up to 56 %", so that a share from three quarters of it upwards agrees (the tolerance, our choice); the share
    depends on the network, and points beside the deciding one show how. Inference is whichever of float32 and bfloat16 (and the
    better of the two compiled, where the point decides) is fastest. The interval is Student's over blocks. The margin allows for a cache
    that decoding has emptied; with the preparing stages' borders left out, preparing counts as inference. The details hold the same of so
    many `answers` of `assay serve`, token by token.
    """
    decides = image == "medium" and network == "compact"
    for_real = requests > 4  # at smoke nothing is trained or compiled
    with bench(image, network, requests, trained=for_real, compiled=for_real and decides) as one:
        rounds = [one.block() for _ in range(blocks)]
        details = one.details(rounds)
        if decides:
            details["under_load"] = under_load(one, 120 if for_real else 24)
    if answers:
        details["assay_serve"] = of_assay_serve(TEXT_MODEL, answers)
    shares = {arm: [block.shares[arm] for block in rounds] for arm in rounds[0].shares}
    interval = student_interval(shares["plain"])
    apart = {name: [block.apart[name] for block in rounds] for name in ("marks", "deleted", "random")}
    spread = student_interval(apart["marks"])
    return Figure(
        interval.median,
        "%",
        low=max(interval.low, 0.0),
        high=min(interval.high, 100.0),
        free=float(np.mean(shares["quick"])),
        quality=Quality(
            spread.median,
            0.0,
            max(spread.low, 0.0),
            spread.high,
            controls={name: float(np.mean(apart[name])) for name in ("deleted", "random")},
        ),
        trained={"compact network": _trained_on_photographs()} if decides and for_real else {},
        details={"percent_outside": {way: float(np.mean(values)) for way, values in shares.items()}, **details},
    )


@dataclass(frozen=True)
class Block:
    """Some requests in turn, each way: shares outside inference, and how far the marks are from the network alone."""

    shares: dict[str, float]
    apart: dict[str, float]
    alone: float
    latency: dict[str, list[float]]
    lives: dict[str, list[Lifetime]]


class Bench:
    """A network behind a server, plain and quick, and clients of it."""

    def __init__(
        self, image: str, network: str, requests: int, *, trained: bool, compiled: bool, stack: contextlib.ExitStack
    ) -> None:
        self.image, self.requests = image, requests
        self.images = data.jpegs(image, min(24, 4 * requests))
        self.model = _network(network, trained)
        self.example = PLAIN.normalised(PLAIN(self.images[0])[None])
        self.engine_name, self.engine, self.engine_seconds = data.fastest_engine(
            self.model, self.example, compiled=compiled
        )
        self.pipelines: dict[str, Pipeline] = {}
        self.servers: dict[str, VisionServer] = {}
        self.clients: dict[str, VisionClient] = {}
        for name, preprocess in (("plain", PLAIN), ("quick", QUICK)):
            pipeline = stack.enter_context(
                Pipeline(self.answering(preprocess), preprocess, size=1, tau=0.0, profiler=StageProfiler(most=100_000))
            )
            self.pipelines[name] = pipeline
            self.servers[name] = stack.enter_context(VisionServer(pipeline, "photographs"))
            self.clients[name] = self.client(name)
            stack.callback(self.clients[name].close)
        self.clients["tensors as JSON"] = self.client("plain", binary=False)
        stack.callback(self.clients["tensors as JSON"].close)
        self.number = 0

    def client(self, name: str, *, binary: bool = True) -> VisionClient:
        server = self.servers[name]
        return VisionClient(server.host, server.port, "photographs", binary=binary)

    def answering(self, preprocess: Preprocess) -> Callable[[np.ndarray], list[int]]:
        def answer(batch: np.ndarray) -> list[int]:
            with torch.inference_mode():
                found: list[int] = self.engine(preprocess.normalised(batch)).argmax(1).tolist()
            return found

        return answer

    def block(self) -> Block:
        """Every way once for each of the next images, and the network alone after it."""
        latency: dict[str, list[float]] = {}
        lives: dict[str, list[Lifetime]] = {}
        alone: list[float] = []
        ways = ("plain", "quick", "in process", "in process, image prepared before", "tensors as JSON")
        for turn in range(self.requests):
            jpeg = self.images[self.number % len(self.images)]
            self.number += 1
            prepared = PLAIN(jpeg)
            for way in ways[turn % len(ways) :] + ways[: turn % len(ways)]:
                pipeline = self.pipelines["quick" if way == "quick" else "plain"]
                pipeline.profiler.clear()
                start = time.perf_counter()
                if way.startswith("in process"):
                    pipeline.submit(jpeg if way == "in process" else prepared).result()
                else:
                    self.clients[way].infer({"image": [jpeg]})
                latency.setdefault(way, []).append(time.perf_counter() - start)
                lives.setdefault(way, []).append(_ended(pipeline.profiler))
                if way == "plain":
                    answer = self.pipelines["plain"].network
                    start = time.perf_counter()
                    answer(prepared[None])
                    alone.append(time.perf_counter() - start)
        inside = {way: sum(life.of(INFERENCE) for life in lives[way]) for way in ways}
        shares = {way: 100 * (1 - inside[way] / sum(latency[way])) for way in ways}
        return Block(shares, self._apart(lives["plain"], alone), statistics.median(alone), latency, lives)

    def _apart(self, lives: Sequence[Lifetime], alone: Sequence[float]) -> dict[str, float]:
        """How far inference's median by the marks, and by two broken ways of marking, is from that of the network alone."""
        chance, by_chance = np.random.default_rng(self.number), []
        for life in lives:
            borders = np.sort(chance.uniform(0, life.seconds, len(life.spans) - 1))
            pieces = np.diff([0.0, *borders, life.seconds])
            at = next(number for number, span in enumerate(life.spans) if span.stage == INFERENCE)
            by_chance.append(float(pieces[at]))
        known = statistics.median(alone)
        found = {
            "marks": statistics.median(life.of(INFERENCE) for life in lives),
            "deleted": statistics.median(life.of(INFERENCE, "queue", *PREPARING) for life in lives),
        }
        found["random"] = float(np.mean(np.abs(np.subtract(by_chance, known)))) + known
        return {name: abs(seconds / known - 1) for name, seconds in found.items()}

    def details(self, rounds: Sequence[Block]) -> dict[str, Any]:
        """Where the time goes each way, and what of it could be saved."""
        found: dict[str, Any] = {}
        for way in rounds[0].lives:
            lives = [life for block in rounds for life in block.lives[way]]
            seconds = [one for block in rounds for one in block.latency[way]]
            told = breakdown(lives)
            found[way] = {
                "milliseconds": {name: 1e3 * one.seconds for name, one in told.items()}
                | {
                    "client and connection": 1e3
                    * (float(np.mean(seconds)) - float(np.mean([life.seconds for life in lives])))
                },
                "p50_milliseconds": 1e3 * float(np.quantile(seconds, 0.5)),
                "p95_milliseconds": 1e3 * float(np.quantile(seconds, 0.95)),
            }
        inside = 1 - float(np.mean([block.shares["plain"] for block in rounds])) / 100
        agree = [self._answer(PLAIN, jpeg) == self._answer(QUICK, jpeg) for jpeg in self.images]
        return {
            "ways": found,
            "milliseconds_of_network_alone": 1e3 * statistics.median(block.alone for block in rounds),
            "engine": self.engine_name,
            "milliseconds_of_engines": {name: 1e3 * seconds for name, seconds in self.engine_seconds.items()},
            "multiply_adds": data.macs(self.model.parts[0][0].out_channels, data.SERVED),  # type: ignore[index,union-attr]
            "bytes_of_a_jpeg": float(np.mean([len(jpeg) for jpeg in self.images])),
            "bytes_of_an_input": {"plain": PLAIN.nbytes, "quick": QUICK.nbytes},
            "same_answer_plain_and_quick": float(np.mean(agree)),
            "faster_at_most_by_faster_inference": amdahl(inside, float("inf")),
            "threads": torch.get_num_threads(),
        }

    def _answer(self, preprocess: Preprocess, jpeg: bytes) -> int:
        return self.answering(preprocess)(preprocess(jpeg)[None])[0]


def _ended(profiler: StageProfiler) -> Lifetime:
    """The one life that ended; a server notes the last border just after its answer is on its way."""
    last = time.monotonic() + 5
    while not (lives := profiler.lifetimes()) and time.monotonic() < last:
        time.sleep(0)
    (life,) = lives
    return life


@contextlib.contextmanager
def bench(image: str, network: str, requests: int, *, trained: bool, compiled: bool) -> Iterator[Bench]:
    """A bench whose servers are up, and which has answered a few requests each way."""
    with contextlib.ExitStack() as stack:
        made = Bench(image, network, requests, trained=trained, compiled=compiled, stack=stack)
        requests, made.requests = made.requests, min(made.requests, 3)
        made.block()
        made.requests = requests
        yield made


def _network(name: str, trained: bool) -> nn.Module:
    """The compact network as it was trained; the others, and any at smoke, with new weights, on which times do not depend."""
    if trained and name == "compact":
        return data.photographs_network(0)
    torch.manual_seed(0)
    return data.Network(data.WIDTHS[name], data.CLASSES).eval()


def _trained_on_photographs() -> Trained:
    images, labels = data.patches("test", 600)
    rate = chosen("dnn_server_overheads/photographs", "compact")
    return Trained(
        [data.accuracy(data.photographs_network(seed), images, labels) for seed in data.SEEDS],
        floor=float(torch.bincount(labels).max() / len(labels)),
        floor_name=data.CHANCE,
        rate=rate.rate,
        rates=rate.rates,
        higher_is_better=True,
    )


def under_load(one: Bench, count: int) -> dict[str, Any]:
    """Saturation by closed loops, latency by an open one, and both as the stages' times alone foretell them."""
    images = [one.images[i % len(one.images)] for i in range(count)]
    found: dict[str, Any] = {}
    for name, preprocess, workers in (
        ("plain", PLAIN, 0),
        ("quick", QUICK, 0),
        ("quick, prepared in processes", QUICK, CORES),
    ):
        zero = _zero_load(one, name.split(",")[0])
        inference = Stage(INFERENCE, zero[INFERENCE], batch=8, tau=0.002)
        preparing = Stage("preparing", sum(zero[stage] for stage in PREPARING), workers=CORES)
        rest = Stage("everything else", max(sum(zero.values()) - inference.each - preparing.each, 1e-6), workers=CORES)
        stages = [preparing, inference, rest]
        with (
            Pipeline(
                one.answering(preprocess),
                preprocess,
                size=8,
                tau=0.002,
                workers=workers,
                profiler=StageProfiler(most=100_000),
            ) as loaded,
            VisionServer(loaded, "photographs") as server,
        ):

            def client(server: VisionServer = server) -> Callable[[Any], Any]:
                made = VisionClient(server.host, server.port, "photographs")
                return lambda image: made.infer({"image": [image]})

            closed = {n: closed_loop(client, images, n).throughput for n in (1, 2, 4, 8)}
            loaded.profiler.clear()
            most = max(closed.values())
            offered = open_loop(client, images, 0.5 * most, clients=16)
            lives = loaded.profiler.lifetimes()
            first, last = min(life.start for life in lives), max(life.last for life in lives)
            little = flow(lives, first + 0.2 * (last - first), first + 0.8 * (last - first))
            arrivals = sorted(sample.intended for sample in offered.samples)
        ready = [preprocess(jpeg) for jpeg in one.images]
        with Pipeline(one.answering(preprocess), preprocess, size=8, tau=0.002) as fed:
            prepared = closed_loop(
                lambda fed=fed: lambda x: fed.submit(x).result(),  # type: ignore[misc]
                [ready[i % len(ready)] for i in range(count)],
                8,
            ).throughput
        told = simulate(stages, arrivals)
        found[name] = {
            "throughput_of_closed_loops": closed,
            "throughput_foretold": throughput(stages, cores=CORES),
            "measured_over_foretold": most / throughput(stages, cores=CORES),
            "throughput_with_images_prepared": prepared,
            "impact_of_preparing": impact(most, prepared),
            "open_loop": {
                "rate": 0.5 * most,
                "p50_milliseconds": 1e3 * offered.latency(0.5),
                "p95_milliseconds": 1e3 * offered.latency(0.95),
                "p50_milliseconds_foretold": 1e3 * told.latency(0.5),
                "p95_milliseconds_foretold": 1e3 * told.latency(0.95),
                "milliseconds_late_at_most": 1e3 * offered.late,
                "errors": sum(bool(sample.error) for sample in offered.samples),
            },
            "littles_law_missed_by": little.error,
            "advice": advice(stages, cores=CORES),
        }
    return found


def _zero_load(one: Bench, name: str) -> dict[str, float]:
    """Mean seconds of each stage, one request at a time."""
    pipeline = one.pipelines[name]
    pipeline.profiler.clear()
    for jpeg in one.images[:8]:
        one.clients[name].infer({"image": [jpeg]})
    time.sleep(0.01)  # until the last border is noted
    return {stage: told.seconds for stage, told in breakdown(pipeline.profiler.lifetimes()).items()}


# ------------------------------------------------------------------------------------------------------------- assay serve

MODEL_STAGES = ("prefill", "step")
PROMPT = "Note {number}. A server has a queue, and in front of it stand those who wait. What do they wait for? "
NEW_TOKENS = 16
LOADING = 240.0  # seconds


def of_assay_serve(model: str, count: int) -> dict[str, Any]:
    """Where the time of `count` streamed answers of `assay serve` goes, one answer at a time.

    The server is the command, in a process of its own, which says itself where its time went (`--spans`); how long an answer took is
    its client's word. A later token's wake, detokenise and send lie beside the next step: only the last token's add to the answer's time.
    """
    with scratch_dir(cache_dir(), "spans.") as folder:
        file = folder / "spans.json"
        waited = _asked(model, file, count)
        lives = read_trace(file)
    answers: list[list[Lifetime]] = []
    for life in sorted(lives, key=lambda life: life.last):
        if life.name == "first":
            answers.append([])
        answers[-1].append(life)
    answers = answers[-count:]  # without the warm-up
    inside = sum(life.of(*MODEL_STAGES) for answer in answers for life in answer)
    served = sum(answer[-1].last - answer[0].start for answer in answers)
    later = [life for answer in answers for life in answer[1:]]
    return {
        "percent_outside_the_model": 100 * (1 - inside / sum(waited)),
        "percent_between_server_and_client": 100 * (1 - served / sum(waited)),
        "milliseconds_of_first_token": {k: 1e3 * one.seconds for k, one in breakdown([a[0] for a in answers]).items()},
        "milliseconds_of_later_tokens": {k: 1e3 * one.seconds for k, one in breakdown(later).items()} if later else {},
        "milliseconds_an_answer": 1e3 * float(np.mean(waited)),
        "answers": len(answers),
        "new_tokens": NEW_TOKENS,
    }


def _asked(model: str, file: Path, count: int) -> list[float]:
    """Seconds of each of `count` answers, streamed one after the other by `assay serve`, which writes its spans to `file`."""
    options = ["--port", "0", "--no-log-requests", "--spans", str(file)]
    command = [sys.executable, "-P", "-m", "assay", "serve", model, *options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    log = file.with_suffix(".log")
    with log.open("wb") as said:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=environment)
    try:
        port = _port(process, log)
        for _ in range(2):
            _answered(port, 0)
        waited = [_answered(port, number + 1) for number in range(count)]
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    finally:
        process.kill()
        process.wait()
    return waited


def _port(process: subprocess.Popen[Any], log: Path) -> int:
    last = time.monotonic() + LOADING
    while time.monotonic() < last:
        text = log.read_text(encoding="utf-8", errors="replace")
        if (found := re.search(r"http://127\.0\.0\.1:(\d+)/v1", text)) is not None:
            return int(found[1])
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}: {text[-300:]}")
        time.sleep(0.1)
    raise TimeoutError(f"the server was not ready within {LOADING:g} s")


def _answered(port: int, number: int) -> float:
    """Seconds of a streamed answer."""
    body = json.dumps(
        {
            "prompt": PROMPT.format(number=number),
            "max_tokens": NEW_TOKENS,
            "stream": True,
            "temperature": 0,
            "ignore_eos": True,
        }
    )
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        start = time.perf_counter()
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read()
        seconds = time.perf_counter() - start
    finally:
        connection.close()
    if response.status != 200 or b"[DONE]" not in text:
        raise RuntimeError(f"HTTP {response.status}: {text[:200]!r}")
    return seconds


# ---------------------------------------------------------------------------------------------------- two models and a broker


@dataclass(frozen=True)
class Way:
    """How scenes are read: decoded whole or at a share of their sides, crops sent as float32 or bytes, batches, and the broker."""

    scale: int
    as_bytes: bool
    size: int
    broker: str
    workers: int  # threads that find digits


PRIOR = Way(1, False, 1, "log", 1)
OPTIMISED = Way(2, True, 16, "socket", 2)
TAU = 0.002
BROKERS: dict[str, Callable[[Path], Broker]] = {
    "queue": lambda folder: QueueBroker(),
    "socket": lambda folder: SocketBroker(),
    "log": lambda folder: LogBroker(folder),
    "log without fsync": lambda folder: LogBroker(folder, fsync=False),
}
ARMS = {
    "optimised, a queue in the process": replace(OPTIMISED, broker="queue"),
    "optimised, but a log on disk": replace(OPTIMISED, broker="log"),
    "optimised, but a log without fsync": replace(OPTIMISED, broker="log without fsync"),
    "prior, but a broker in memory": replace(PRIOR, broker="socket"),
    "optimised, but decoded whole": replace(OPTIMISED, scale=1),
    "optimised, but one at a time": replace(OPTIMISED, size=1),
    "optimised, but one worker": replace(OPTIMISED, workers=1),
}


class Reading:
    """Scenes, networks that read digits, and the ways, each with a broker and a cascade of its own."""

    def __init__(self, count: int) -> None:
        self.scenes = data.scenes(count)
        self.networks = [data.digits_network(seed) for seed in data.SEEDS]
        self.network = self.networks[0]
        self._stack = contextlib.ExitStack()
        self._folder = self._stack.enter_context(scratch_dir(cache_dir(), "brokers."))
        atexit.register(self.close)
        self._cascades: dict[Way, Cascade] = {}
        self._brokers: list[Broker] = []
        self.threads = self._best_threads()

    def close(self) -> None:
        for cascade in self._cascades.values():
            cascade.close()
        for broker in self._brokers:
            broker.close()
        self._cascades.clear()
        self._brokers.clear()
        self._stack.close()

    def cascade(self, way: Way) -> Cascade:
        if way not in self._cascades:
            folder = self._folder / str(len(self._cascades))
            self._brokers.append(BROKERS[way.broker](folder))
            self._cascades[way] = Cascade(
                lambda jpeg: [_payload(one, way) for one in finds(jpeg, scale=way.scale)],
                self.classify,
                self._brokers[-1],
                size=way.size,
                tau=TAU if way.size > 1 else 0.0,
            )
        return self._cascades[way]

    def read(self, way: Way, scenes: Sequence[Scene] | None = None) -> list[list[int]]:
        """The labels of every scene's digits, over the way's broker."""
        cascade, images = self.cascade(way), [scene.data for scene in scenes or self.scenes]
        if way.workers > 1:
            with ThreadPoolExecutor(way.workers) as pool:
                waiting = list(pool.map(cascade.submit, images))
        else:
            waiting = [cascade.submit(image) for image in images]
        return [one.result(60) for one in waiting]

    def fused(self, scale: int, threads: int) -> list[list[int]]:
        """What an expert writes in ten lines: everything found by some threads, then classified in one batch, no broker."""
        if threads > 1:
            with ThreadPoolExecutor(threads) as pool:
                found = list(pool.map(lambda scene: finds(scene.data, scale=scale), self.scenes))
        else:
            found = [finds(scene.data, scale=scale) for scene in self.scenes]
        labels = iter(self.classify([one.crop for scene in found for one in scene]))
        return [[next(labels) for _ in scene] for scene in found]

    def classify(self, crops: Sequence[np.ndarray]) -> list[int]:
        batch = torch.from_numpy(np.stack(crops))[:, None]
        with torch.inference_mode():
            found: list[int] = (
                self.network(batch.float() / 255 if batch.dtype == torch.uint8 else batch).argmax(1).tolist()
            )
        return found

    def _best_threads(self) -> int:
        """The number of threads with which the ten lines are fastest here."""
        seconds = {}
        for threads in sorted({1, 2, CORES}):
            times = []
            for _ in range(3):
                start = time.perf_counter()
                self.fused(OPTIMISED.scale, threads)
                times.append(time.perf_counter() - start)
            seconds[threads] = min(times)
        return min(seconds, key=lambda threads: seconds[threads])

    def scores(self, way: Way, scenes: Sequence[Scene]) -> np.ndarray:
        """Each scene's score, the mean over the networks, read over the way's broker."""
        found = [finds(scene.data, scale=way.scale) for scene in scenes]
        return self._mean(scenes, found, lambda: self.read(way, scenes))

    def control(self, scenes: Sequence[Scene], find: Callable[[bytes], list[Find]]) -> float:
        """The mean score where something else finds the digits."""
        found = [find(scene.data) for scene in scenes]
        return float(
            self._mean(
                scenes, found, lambda: [self.classify([f.crop for f in one]) if one else [] for one in found]
            ).mean()
        )

    def _mean(
        self, scenes: Sequence[Scene], found: Sequence[list[Find]], read: Callable[[], list[list[int]]]
    ) -> np.ndarray:
        scores = []
        try:
            for network in self.networks:
                self.network = network
                scores.append([data.score(*one) for one in zip(scenes, found, read(), strict=True)])
        finally:
            self.network = self.networks[0]
        return np.mean(scores, axis=0)


def _payload(find: Find, way: Way) -> np.ndarray:
    return find.crop if way.as_bytes else find.crop.astype(np.float32) / 255


def whole_scene(jpeg: bytes) -> list[Find]:
    """The control without a detector: the scene itself is taken for a digit."""
    from PIL import Image

    grey = np.asarray(Image.open(io.BytesIO(jpeg), formats=("JPEG",)).convert("L"))
    height, width = grey.shape
    return [Find(width / 2, height / 2, data.cropped(grey, width / 2, height / 2, min(height, width)))]


@experiment(
    "dnn_server_overheads/throughput",
    points={
        "smoke": [{"scenes": 6, "judged": 9}],
        "small": [{"scenes": 18, "judged": 162}],
        "full": [{"scenes": 90, "judged": 900}],
    },
    operator=Operator(
        "images a second of a detector whose finds go to a classifier",
        free="ten lines in one process: threads that decode by drafts and find, then one batch, no broker",
        exact="the same in one process with images decoded whole, no broker",
    ),
    paper={
        "models": "two on a GPU, with a broker between",
        "prior": "serving with a broker that keeps its messages on disk",
        "optimised": "dynamic batches and a broker in memory",
    },
    departures={
        "models": "a classical detector and a small trained classifier, on a processor",
        "prior": "our own: decoded whole, float32 crops, one at a time, an append-only file with fsync",
    },
    guard=Guard("mean share of a scene's digits found and read right", 0.02, higher_is_better=True, relative=False),
    refuted_if="the optimised pipeline answers fewer images a second than that with a log on disk, the whole interval",
    measured_here="time for the same scenes of our own pipelines; the disk is this machine's, and its fsync a part of the gain",
    memory_gib=8,
    minutes=20,
)
def two_models(scenes: int, judged: int) -> Trial:
    """All scenes through the optimised pipeline, against the prior work's; every arm has the same detector and the same classifier.

    The margin, two digits of a hundred, is what a smaller image may cost; scenes are resampled. Controls find as many or one: no detector
    (the scene is taken for a digit), random places, and the cheapest decoding there is, an eighth of the sides.
    """
    count_children_as_ours()
    reading = Reading(scenes)

    def quality() -> Quality:
        test = data.scenes(judged, seed=1)
        ours = reading.scores(OPTIMISED, test)
        theirs = reading.scores(replace(PRIOR, broker="log without fsync"), test)  # fsync changes no answer
        spread = bootstrap(ours - theirs, np.mean)
        chance = np.random.default_rng(0)
        return Quality(
            float(ours.mean()),
            float(theirs.mean()),
            float(theirs.mean()) + spread.low,
            float(theirs.mean()) + spread.high,
            controls={
                "deleted": reading.control(test, whole_scene),
                "random": reading.control(test, lambda jpeg: finds(jpeg, scale=OPTIMISED.scale, places=chance)),
                "rival": reading.control(test, lambda jpeg: finds(jpeg, scale=8)),
            },
            rival="decoding an eighth of the sides",
        )

    def trained() -> dict[str, Trained]:
        images, labels = data.digit_crops("test")
        rate = chosen("dnn_server_overheads/digits", "classifier")
        return {
            "classifier": Trained(
                [data.accuracy(network, images, labels) for network in reading.networks],
                floor=float(torch.bincount(labels).max() / len(labels)),
                floor_name=data.CHANCE,
                rate=rate.rate,
                rates=rate.rates,
                higher_is_better=True,
            )
        }

    def details() -> dict[str, Any]:
        found = {
            "ways": {
                name: described(reading, way) for name, way in {"prior": PRIOR, "optimised": OPTIMISED, **ARMS}.items()
            }
        }
        found["threads_of_the_ten_lines"] = reading.threads  # type: ignore[assignment]
        found["microseconds_a_message"] = {
            name: {kind: 1e6 * _message_seconds(name, kind) for kind in ("uint8", "float32")} for name in BROKERS
        }
        found["digits_a_scene"] = float(np.mean([len(scene.digits) for scene in reading.scenes]))  # type: ignore[assignment]
        reading.close()
        return found

    return Trial(
        baseline=lambda: reading.read(PRIOR),
        candidate=lambda: reading.read(OPTIMISED),
        free=lambda: reading.fused(OPTIMISED.scale, reading.threads),
        exact=lambda: reading.fused(1, reading.threads),
        arms={name: (lambda way=way: reading.read(way)) for name, way in ARMS.items()},  # type: ignore[misc]
        quality=quality,
        trained=trained,
        details=details,
    )


def described(reading: Reading, way: Way) -> dict[str, Any]:
    """A way's own account: images a second, where a scene's time goes, bytes a digit."""
    cascade = reading.cascade(way)
    cascade.profiler.clear()
    sent, things = cascade.sent, cascade.things
    start = time.perf_counter()
    reading.read(way)
    seconds = time.perf_counter() - start
    lives = cascade.profiler.lifetimes()
    return {
        "images_a_second": len(reading.scenes) / seconds,
        "milliseconds": {name: 1e3 * one.seconds for name, one in breakdown(lives).items()},
        "bytes_a_digit": (cascade.sent - sent) / max(cascade.things - things, 1),
    }


def _message_seconds(name: str, kind: str, count: int = 30) -> float:
    """Seconds to put, get and acknowledge one crop, one at a time, the median."""
    crop, times = np.zeros((data.CROP, data.CROP), kind), []
    with scratch_dir(cache_dir(), "broker.") as folder:
        broker = BROKERS[name](folder)
        try:
            for _ in range(count):
                start = time.perf_counter()
                broker.put(Message({"thing": 0}, crop))
                delivery = broker.get(10.0)
                assert delivery is not None
                broker.ack(delivery)
                times.append(time.perf_counter() - start)
        finally:
            broker.close()
    return statistics.median(times)

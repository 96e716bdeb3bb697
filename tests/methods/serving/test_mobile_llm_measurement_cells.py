"""What mobile_llm_measurement really runs: engines in this process, boxes behind sockets, links, cells in processes of their own."""

from __future__ import annotations

import contextlib
import gc
import http.client
import json
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from tests.tiny import tiny_model, tiny_tokenizer, write_tiny_llama

from assay.methods.serving.mobile_llm_measurement import (
    ASSAY_SERVE,
    LLAMA_CPP,
    LOOP,
    OPENVINO,
    TRANSFORMERS,
    Cell,
    EngineKind,
    HttpSession,
    Link,
    LinkProxy,
    LocalSession,
    Model,
    Question,
    Site,
    deployment_matrix,
    hosted,
    open_transformers,
    opened,
)
from assay.methods.serving.mobile_llm_measurement import engines as engines_module
from assay.methods.serving.mobile_llm_measurement import link as link_module
from assay.methods.serving.mobile_llm_measurement.asking import Marks, Process
from assay.methods.serving.mobile_llm_measurement.engines import TransformersEngine, command_of
from assay.methods.serving.mobile_llm_measurement.host import Box
from assay.methods.serving.mobile_llm_measurement.matrix import ACCOUNTED

STAND_IN = """
import time

class Engine:
    def __init__(self, prefill=0.0, token=0.0, hoard=0, short=0, fails="", fickle=False, answer="turtle"):
        self.prefill, self.token, self.short, self.fails, self.fickle, self.answer = prefill, token, short, fails, fickle, answer
        self.held = [bytearray(b"x") * (1 << 20) for _ in range(hoard)]
        self.asked = 0

    def generate(self, prompt, new_tokens, on_text):
        self.asked += 1
        if self.fails and self.asked > 1:
            raise ValueError(self.fails)
        time.sleep(self.prefill)
        for place in range(new_tokens - self.short):
            if place:
                time.sleep(self.token)
            on_text(self.answer if not place else f" {self.asked if self.fickle else place}")
        return len(prompt.split()), new_tokens - self.short

def make(folder, gguf, format, threads, slow_start=0.0, **options):
    time.sleep(slow_start)
    return Engine(**options)

def broken(folder, gguf, format, threads):
    raise OSError("the disk is gone")

def packs(folder, gguf, format, threads, hoard):
    read = [bytearray(b"x") * (1 << 20) for _ in range(hoard)]
    del read
    return Engine()

def dies(folder, gguf, format, threads):
    import os
    os._exit(3)
"""
ASKED = [Question(f"what is {word}?", word, ("turtle", "tarfile")) for word in ("turtle", "tarfile")]


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A kind of engine that sleeps instead of computing, importable by child processes."""
    home = tmp_path / "elsewhere"
    home.mkdir()
    (home / "sleeping_engine.py").write_text(STAND_IN)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.syspath_prepend(str(home))

    def made(function="make", **options):
        return EngineKind("stand-in", ("fp32",), opener=f"sleeping_engine:{function}", options=options)

    yield made
    sys.modules.pop("sleeping_engine", None)


def where(folder="."):
    return {"folder": str(folder), "gguf": None, "format": "fp32", "threads": 1}


@contextlib.contextmanager
def boxed(engine):
    """A box in this process and its port."""
    box = Box(engine)
    runner = threading.Thread(target=box.run, daemon=True)
    runner.start()
    try:
        yield box.port
    finally:
        box.stop()
        runner.join(10)
        assert not runner.is_alive()


# ------------------------------------------------------------------------------------------------------- engines in this process


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_tiny_llama(tmp_path_factory.mktemp("tiny"), vocab=512, hidden=64, layers=2))


def greedy(folder, prompt, new_tokens):
    """What the model says, by hand."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    given = tokenizer(prompt, return_tensors="pt")["input_ids"]
    ids = given
    with torch.no_grad():
        for _ in range(new_tokens):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return tokenizer.decode(ids[0, given.shape[1] :], skip_special_tokens=True), given.shape[1]


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("format", ["fp32", "int8"])
def test_an_answer_is_the_models_own_greedy_one_in_as_many_pieces_as_tokens(folder, loop, format):
    engine = open_transformers(folder=folder, gguf=None, format=format, threads=1, loop=loop)
    pieces = []
    counts = engine.generate("The compound statements", 9, pieces.append)
    text, prompt_tokens = greedy(folder, "The compound statements", 9)
    assert counts == (prompt_tokens, 9)
    assert len(pieces) == 9
    if format == "fp32":
        assert "".join(pieces).rstrip("\ufffd") == text.rstrip("\ufffd")
    again = []
    engine.generate("The compound statements", 9, again.append)
    assert again == pieces  # the same file on the same engine


def test_each_engine_and_format_runs_what_it_says(folder):
    from assay.methods.builtin.weight_only import WeightOnlyLinear

    kinds = {}
    for kind in (TRANSFORMERS, LOOP):
        for format in kind.formats:
            engine = opened(kind, folder=folder, gguf=None, format=format, threads=1)
            assert LocalSession(engine).ask("The", 3).new_tokens == 3
            layers = {type(module) for module in engine.model.modules() if "Linear" in type(module).__name__}
            kinds[kind.name, format] = (
                next(engine.model.parameters()).dtype,
                WeightOnlyLinear in layers,
                hasattr(engine.model, "decode_loop"),
            )
    assert kinds["transformers", "fp32"] == (torch.float32, False, False)
    assert kinds["transformers", "bf16"] == (torch.bfloat16, False, False)
    assert kinds["transformers", "int4"] == (torch.float32, True, False)
    assert kinds["decode loop", "bf16"] == (torch.bfloat16, False, True)
    assert kinds["decode loop", "int8"] == (torch.float32, True, True)
    with pytest.raises(ValueError, match="format must be one of"):
        open_transformers(folder=folder, gguf=None, format="int2", threads=1)
    with pytest.raises(ValueError, match="threads"):
        open_transformers(folder=folder, gguf=None, format="fp32", threads=0)


@pytest.mark.parametrize("loop", [False, True])
def test_a_packed_model_holds_nothing_of_the_file_that_it_was_read_from(folder, loop):
    """A single view of it, an embedding or a norm, would keep all of the file in memory."""
    engine = open_transformers(folder=folder, gguf=None, format="int4", threads=1, loop=loop)
    gc.collect()
    assert folder not in Path("/proc/self/maps").read_text()
    assert LocalSession(engine).ask("The", 2).new_tokens == 2


def test_an_end_token_ends_nothing():
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    with torch.no_grad():  # it always says the end token, were it allowed to
        model.lm_head.weight.zero_()
        model.lm_head.weight[tokenizer.eos_token_id] = 0.01
    pieces = []
    assert TransformersEngine(model, tokenizer).generate("a b", 5, pieces.append)[1] == 5
    assert len(pieces) == 5


def test_characters_are_told_whole():
    class Bytes:
        def decode(self, ids, skip_special_tokens):
            return bytes(ids).decode("utf-8", errors="replace")

    told = []
    streamer = engines_module._Told(Bytes(), told.append)
    streamer.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for byte in "aé€".encode():
        streamer.put(torch.tensor([byte]))
    assert told == ["a", "", "é", "", "", "€"]


@pytest.mark.slow
def test_longer_prompts_and_answers_do_not_take_less(folder):
    """Ten times as much work of the same kind, the best of some runs."""
    session = LocalSession(open_transformers(folder=folder, gguf=None, format="fp32", threads=1))
    cases = {"short": ("The", 3), "long prompt": ("The compound statement " * 60, 3), "long answer": ("The", 40)}
    best = dict.fromkeys(cases, 1e9)
    parts = dict.fromkeys(cases, (1e9, 1e9))
    for _ in range(3):
        for name, (prompt, new) in cases.items():
            answer = session.ask(prompt, new)
            best[name] = min(best[name], answer.seconds)
            parts[name] = tuple(map(min, parts[name], (answer.parts["prefill"], answer.parts["decode"])))
    assert best["short"] <= min(best["long prompt"], best["long answer"])
    assert parts["short"][0] <= parts["long prompt"][0]
    assert parts["short"][1] <= parts["long answer"][1]


def test_marks_are_of_the_first_and_the_last_token(stand_in):
    kind = stand_in(prefill=0.05, token=0.02)
    answer = LocalSession(opened(kind, **where())).ask("one two three", 4)
    assert answer.text == "turtle 1 2 3"
    assert answer.prompt_tokens == 3
    assert answer.parts["prefill"] >= 0.05
    assert answer.parts["decode"] >= 0.06
    assert answer.parts["prefill"] <= answer.first <= answer.seconds - answer.parts["decode"] + 1e-6
    with pytest.raises(RuntimeError, match="made 3 tokens where 4"):
        LocalSession(opened(stand_in(short=1), **where())).ask("one", 4)


# ------------------------------------------------------------------------------------------------------------------ box and link


def test_a_box_answers_in_turn_and_says_how_long_each_waited():
    """All three are in the line before the first is answered, each answer takes a twentieth of a second at least."""

    class Gate:
        def generate(self, prompt, new_tokens, on_text):
            while not all_there.is_set():
                time.sleep(0.001)
                if box.line.qsize() == 2:
                    all_there.set()
            time.sleep(0.05)
            on_text("turtle")
            return 1, new_tokens

    all_there, box = threading.Event(), Box(Gate())
    runner = threading.Thread(target=box.run, daemon=True)
    runner.start()
    try:
        with ThreadPoolExecutor(3) as pool:
            answers = list(pool.map(lambda n: HttpSession(box.port).ask(f"prompt {n}", 3), range(3)))
    finally:
        box.stop()
        runner.join(10)
    waits = sorted(answer.parts["queue"] for answer in answers)
    assert waits[1] >= 0.05  # behind one answer
    assert waits[2] >= 0.1  # behind two
    assert all(answer.parts["prefill"] >= 0.05 for answer in answers)
    assert {answer.text for answer in answers} == {"turtle"}


def calm(ask, good, tries=40):
    """The first of many answers that is good: what other programs of the machine take is in none of the parts."""
    return next((answer for answer in (ask() for _ in range(tries)) if good(answer)), None)


def adds_up(answer):
    return abs(answer.unaccounted) <= ACCOUNTED


def test_the_parts_of_an_answer_are_the_whole(stand_in):
    engine = opened(stand_in(prefill=0.2, token=0.02), **where())
    assert calm(lambda: LocalSession(engine).ask("prompt", 5), adds_up)
    with boxed(engine) as port:
        assert calm(lambda: HttpSession(port).ask("prompt", 5), adds_up)
        with HttpSession(port, link=Link(bandwidth=1e6, latency=0.05)) as far:
            answer = calm(lambda: far.ask("prompt", 5), adds_up)
            assert answer
            assert answer.parts["network"] >= 0.1
            # and the sum is no tautology: a part that is left out, or claimed twice, shows
            parts = {name: seconds for name, seconds in answer.parts.items() if name != "network"}
            assert replace(answer, parts=parts).unaccounted > 0.1
            assert replace(answer, parts={**answer.parts, "queue": 0.2}).unaccounted < -0.1


def test_a_server_that_tells_no_marks_is_timed_from_outside(stand_in):
    """As `assay serve` or llama.cpp's are: what the link took is taken off again."""
    engine = opened(stand_in(prefill=0.2, token=0.02), **where())
    with boxed(engine) as port, Silent(port) as silent:
        far = HttpSession(silent, link=Link(bandwidth=1e7, latency=0.05))

        def taken_off(answer):
            return adds_up(answer) and answer.parts["prefill"] < 0.24 and 0.06 < answer.parts["decode"] < 0.12

        with far:
            answer = calm(lambda: far.ask("prompt", 5), taken_off)
        assert answer
        assert "queue" not in answer.parts
        assert answer.parts["network"] >= 0.1
        assert answer.parts["prefill"] >= 0.2
        near = HttpSession(silent).ask("prompt", 5)
        assert set(near.parts) == {"prefill", "decode"}


class Silent:
    """Passes a box's answers on without its marks."""

    def __init__(self, port):
        from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                connection = http.client.HTTPConnection("127.0.0.1", port)
                connection.request("POST", self.path, body)
                self.send_response(200)
                self.end_headers()
                for line in connection.getresponse():
                    if line.startswith(b"data: {"):
                        event = json.loads(line[6:])
                        event.pop("marks", None)
                        line = b"data: " + json.dumps(event).encode() + b"\n"
                    self.wfile.write(line)
                    self.wfile.flush()

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self.server.server_address[1]

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def test_a_site_without_network_answers_as_the_engine_itself(stand_in, folder):
    """The same engine here and behind a socket: the same text, and the same time but for a few milliseconds."""
    slow = opened(stand_in(prefill=0.2, token=0.02), **where())
    real = open_transformers(folder=folder, gguf=None, format="fp32", threads=1)
    for engine in (slow, real):
        with boxed(engine) as port:
            here, remote = LocalSession(engine).ask("The statements", 4), HttpSession(port)
            assert remote.ask("The statements", 4).text == here.text
    with boxed(slow) as port:
        here, remote = LocalSession(slow).ask("The statements", 4), HttpSession(port)
        assert calm(lambda: remote.ask("The statements", 4), lambda there: there.seconds < 1.05 * here.seconds)


def test_a_link_delays_both_ways_and_takes_its_time_for_bytes(stand_in):
    engine = opened(stand_in(), **where())
    text = "word " * 4000
    with boxed(engine) as port:
        with HttpSession(port, link=Link(bandwidth=1e5, latency=0.03)) as slow:
            answer = slow.ask(text, 2)
        with HttpSession(port, link=Link(bandwidth=1e9, latency=0.03)) as fast:
            quick = fast.ask(text, 2)
    assert answer.sent == quick.sent > len(text)
    assert answer.parts["network"] >= 0.06 + 0.9 * answer.sent / 1e5
    assert 0.06 <= quick.parts["network"] < answer.parts["network"]
    assert answer.received > 0
    # a delay of less than a millisecond is none that is rounded away
    assert Link(bandwidth=1e9, latency=2e-4).latency == 2e-4


def test_messages_under_way_together_overlap(stand_in):
    """Tokens that come while earlier ones are under way: the link's latency is in the answer twice, not once a token."""
    engine = opened(stand_in(token=0.01), **where())
    with boxed(engine) as port, HttpSession(port, link=Link(bandwidth=1e9, latency=0.1)) as far:
        answer = calm(lambda: far.ask("prompt", 9), lambda one: one.seconds < 0.9)
    assert answer  # 9 tokens one after the other would take 0.2 + 9 * 0.1
    assert answer.seconds >= 0.28


def test_a_connection_is_remembered_as_long_whatever_port_it_came_from(stand_in, monkeypatch):
    """The system gives ports out again: a new connection from one that was used before is the newest nevertheless."""
    monkeypatch.setattr(link_module, "KEPT", 2)
    body = json.dumps({"prompt": "x", "stream": True, "max_tokens": 1}).encode()
    with boxed(opened(stand_in(), **where())) as port, LinkProxy(port, Link(1e9)) as proxy:

        def ask(source):
            connection = http.client.HTTPConnection("127.0.0.1", proxy.port, source_address=("127.0.0.1", source))
            connection.connect()
            connection.sock.setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            )  # its port is free at once
            mine = connection.sock.getsockname()[1]
            connection.request("POST", "/v1/completions", body, {"Connection": "close"})
            connection.getresponse().read()
            connection.close()
            return mine

        first = ask(0)
        ask(0)
        assert ask(first) == first
        last = ask(0)
        assert proxy.crossing(first).bytes_up > 0
        assert proxy.crossing(last).bytes_up > 0


def test_a_link_ends_and_its_port_with_it(stand_in):
    engine = opened(stand_in(), **where())
    with boxed(engine) as port:
        proxy = LinkProxy(port, Link(1e9))
        proxy.close()
        proxy.close()
        with pytest.raises(OSError):
            HttpSession(proxy.port).ask("prompt", 1)
    with LinkProxy(port, Link(1e9)) as proxy, pytest.raises((OSError, http.client.HTTPException)):
        HttpSession(proxy.port).ask("prompt", 1)  # nobody behind it


def test_a_bad_request_or_a_failing_answer_does_not_end_the_box(stand_in):
    engine = opened(stand_in(fails="the cache is full"), **where())
    with boxed(engine) as port:
        session = HttpSession(port)
        assert session.ask("prompt", 2).text == "turtle 1"
        with pytest.raises(RuntimeError, match="the cache is full"):
            session.ask("prompt", 2)
        for body in (
            b"{}",
            b"[]",
            b"nonsense",
            b'{"prompt": "x", "stream": true, "max_tokens": 0}',
            b'{"prompt": "x", "max_tokens": 3}',
            b'{"prompt": "x", "stream": true, "max_tokens": 1000000000}',
            b"[" * 100_000,
            b"\xff\xfe",
            b"",
        ):
            connection = http.client.HTTPConnection("127.0.0.1", port)
            connection.request("POST", "/v1/completions", body)
            assert connection.getresponse().status == 400
            connection.close()
        engine.fails = ""
        assert session.ask("prompt", 2).text == "turtle 1"


def test_who_has_left_is_not_answered_further(stand_in):
    engine = opened(stand_in(token=0.02), **where())
    with boxed(engine) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request(
            "POST", "/v1/completions", json.dumps({"prompt": "x", "stream": True, "max_tokens": 10_000}).encode()
        )
        response = connection.getresponse()
        response.readline()
        response.close()
        connection.close()
        begin = time.monotonic()
        assert HttpSession(port).ask("next", 2).text == "turtle 1"
        assert time.monotonic() - begin < 60  # not behind 200 seconds of an answer that nobody reads


@pytest.mark.parametrize("loop", [False, True])
def test_an_engine_that_was_left_in_the_middle_answers_the_next_as_ever(folder, loop):
    """What the one before left in caches and pages is in none of its answers."""
    engine = open_transformers(folder=folder, gguf=None, format="fp32", threads=1, loop=loop)
    said = Marks(engine, "The compound statements", 8).text

    def leaves(text):
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError, match="gone"):
        engine.generate("The debugger", 20, leaves)
    assert Marks(engine, "The compound statements", 8).text == said


def test_two_threads_that_ask_one_box_get_their_own_answers(folder):
    """Of a real engine, which only one thread may run."""
    engine = open_transformers(folder=folder, gguf=None, format="int8", threads=1, loop=True)
    prompts = [f"The {word} statement é €" for word in ("compound", "debugger", "try", "with")]
    alone = [Marks(engine, prompt, 6).text for prompt in prompts]
    with boxed(engine) as port, HttpSession(port, link=Link(1e8, 0.001)) as far, ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda prompt: far.ask(prompt, 6).text, 2 * prompts))
    assert together == 2 * alone


# --------------------------------------------------------------------------------------------------------- cells in processes


def cell(kind, site=None, **changes):
    return Cell(Model("m", tempfile.gettempdir()), "fp32", kind, site or Site("phone"), **changes)


def left():
    """Children of this process, and what lies in the temporary folder (the test's own, where it asked for a stand-in)."""
    return {child.pid for child in psutil.Process().children(recursive=True)}, set(
        Path(tempfile.gettempdir()).iterdir()
    )


def test_cold_and_warm_answers_are_apart_and_add_up(stand_in, monkeypatch):
    before = left()
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 3600)  # somebody sets the clock: no part is measured by it
    kind = stand_in(slow_start=0.3, prefill=0.15, token=0.02)
    here, far = deployment_matrix(
        [cell(kind), cell(kind, Site("cloud", "cloud", link=Link(1e7, 0.02), price=36.0, offline=0.25), clients=2)],
        ASKED,
        new_tokens=4,
        repeats=2,
    )
    for row in (here, far):
        assert row.ok, row.reason
        assert len(row.warm) == 4
        assert [(one["run"], one["question"]) for one in row.warm] == [(0, 0), (0, 1), (1, 0), (1, 1)]
        assert row.cold["parts"]["load"] >= 0.3
        assert 0 < row.cold["parts"]["start"] < 60
        assert row.cold["seconds"] >= 0.3 + 0.15 + 3 * 0.02
        assert not {"start", "load"} & {name for one in row.warm for name in one["parts"]}
        assert all(one["unaccounted"] >= -ACCOUNTED for one in [row.cold, *row.warm])  # nothing is claimed twice
        assert min(one["unaccounted"] for one in row.warm) <= 0.1  # a busy machine takes more from some
        assert (row.accuracy, row.parse_failures) == (0.5, 0.0)
        assert row.texts == ["turtle 1 2 3"] * 2
        assert row.same
        # the system counts pages in batches: two counts may miss a few
        assert row.peak_bytes >= row.held_bytes - (1 << 20)
        assert row.held_bytes > 5 << 20
        assert json.loads(json.dumps(row.as_dict()))["cell"] == row.cell
    assert (here.part("network"), here.part("queue")) == (0.0, 0.0)
    assert far.part("network") >= 0.04
    assert max(one["parts"]["queue"] for one in far.warm) > 0.05  # two ask at the same time
    assert far.price == pytest.approx(0.01 * statistics.median(one["seconds"] for one in far.warm))
    assert far.available == 0.75
    assert not any(now - then for now, then in zip(left(), before, strict=True))


def test_each_failure_is_a_row_of_its_own(stand_in):
    before = left()
    limited = Site("small phone", memory_bytes=120 << 20)
    rows = deployment_matrix(
        [
            cell(stand_in("broken")),
            replace(cell(stand_in("dies")), site=Site("edge", "edge")),
            replace(cell(stand_in(hoard=400)), site=limited),
            replace(cell(stand_in(fails="later")), site=Site("other")),
            replace(cell(stand_in(fickle=True)), site=Site("last")),
        ],
        ASKED,
        new_tokens=3,
        repeats=1,
        timeout=60,
    )
    assert [row.status for row in rows] == ["failed", "failed", "out of memory", "failed", "ok"]
    assert "the disk is gone" in rows[0].reason
    assert "ended" in rows[1].reason
    assert "memory limit" in rows[2].reason
    assert "later" in rows[3].reason
    assert rows[4].same is False  # another answer to the same prompt is noticed
    assert rows[4].slowdown is None
    assert not any(now - then for now, then in zip(left(), before, strict=True))


def test_a_cell_that_takes_too_long_is_ended(stand_in):
    before = left()
    (row,) = deployment_matrix([cell(stand_in(slow_start=60.0), Site("edge", "edge"))], ASKED, timeout=1.5)
    assert row.status in ("timeout", "failed")
    assert not any(now - then for now, then in zip(left(), before, strict=True))


def test_who_only_asks_loads_no_torch():
    code = "import sys, assay.methods.serving.mobile_llm_measurement.matrix; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_memory_is_the_models_process_and_grows_with_what_it_holds(stand_in):
    small, large, served = deployment_matrix(
        [cell(stand_in()), cell(stand_in(hoard=60), Site("again")), cell(stand_in(hoard=60), Site("edge", "edge"))],
        ASKED,
        new_tokens=2,
        repeats=1,
    )
    assert large.peak_bytes - small.peak_bytes > 50 << 20
    assert served.peak_bytes > 60 << 20


def test_who_sets_the_clock_changes_nothing_of_what_starting_took(stand_in, monkeypatch):
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - 3600)
    started = hosted(stand_in(slow_start=0.1), **where(), timeout=60)
    started.session.close()
    assert 0 < started.parts["start"] < 60
    assert started.parts["load"] >= 0.1


def test_memory_that_only_loading_takes_is_told_apart(stand_in):
    (row,) = deployment_matrix([cell(stand_in("packs", hoard=60))], ASKED, new_tokens=2, repeats=1)
    assert row.ok, row.reason
    assert row.peak_bytes - row.held_bytes > 50 << 20


def test_a_server_that_never_comes_up_is_ended_with_its_last_words(stand_in):
    before = left()
    script = "import sys; print('no such device', file=sys.stderr)"
    kind = EngineKind("x", ("fp32",), command=("{python}", "-c", script))
    with pytest.raises(RuntimeError, match="no such device"):
        hosted(kind, **where(), timeout=20)
    silent = EngineKind("x", ("fp32",), command=("{python}", "-c", "import time; time.sleep(60)"))
    with pytest.raises(RuntimeError, match="did not answer within"):
        hosted(silent, **where(), timeout=0.3)
    assert not any(now - then for now, then in zip(left(), before, strict=True))


def test_a_process_is_ended_with_what_it_started():
    sleep = "import time; time.sleep(60)"
    script = (
        f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {sleep!r}]); print(1, flush=True); {sleep}"
    )
    process = Process([sys.executable, "-c", script], threads=1, piped=True)
    assert process.output.readline() == b"1\n"
    family = psutil.Process(process.pid).children(recursive=True)
    assert family
    assert process.held_bytes() > 0
    process.end()
    process.end()
    assert process.held_bytes() == 0
    assert not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in family)
    assert process.peak_bytes() > 0


def test_a_foreign_server_is_asked_through_its_own_protocol(stand_in, tmp_path):
    """A server of its own that is started by a command, lists its model, and is ready some time after it was started."""
    script = tmp_path / "server.py"
    script.write_text(
        "import sys, time, threading, json\n"
        "sys.path.insert(0, sys.argv[2])\n"
        "import sleeping_engine\n"
        "from assay.methods.serving.mobile_llm_measurement.host import Box\n"
        "from http.server import ThreadingHTTPServer\n"
        "time.sleep(0.3)\n"
        "box = Box(sleeping_engine.Engine())\n"
        "handler = box.server.RequestHandlerClass\n"
        "def models(self):\n"
        "    self.send_response(200); self.end_headers(); self.wfile.write(json.dumps({'data': [{'id': 'it'}]}).encode())\n"
        "handler.do_GET = models\n"
        "server = ThreadingHTTPServer(('127.0.0.1', int(sys.argv[1])), handler)\n"
        "threading.Thread(target=box.run, daemon=True).start()\n"
        "server.serve_forever()\n"
    )
    kind = EngineKind(
        "foreign",
        ("fp32",),
        command=("{python}", str(script), "{port}", str(tmp_path / "elsewhere")),
        extra={"ignore_eos": True},
    )
    started = hosted(kind, **where(), timeout=60)
    try:
        assert started.parts["load"] >= 0.3
        assert started.session.model == "it"
        assert started.session.ask("prompt", 3).text == "turtle 1 2"
        assert started.session.peak_bytes() > 5 << 20
    finally:
        started.session.close()
    assert not started.session.process.running


def test_commands_are_filled_in():
    found = command_of(LLAMA_CPP, folder="/f", gguf="/g.gguf", port=99, threads=2)
    assert found[0] == sys.executable
    assert found[-3:] == ["/g.gguf", "99", "2"]
    compile(found[-4], "script", "exec")
    assert command_of(ASSAY_SERVE, folder="/f", gguf=None, port=99, threads=2)[5:8] == ["/f", "--port", "99"]


def test_openvino_is_driven_step_by_step(monkeypatch, folder):
    """Against a stand-in of its pipeline: two tokens a step, ready every second one."""

    class Handle:
        def __init__(self, wanted):
            self.left, self.made = list(range(65, 65 + wanted)), []

        def can_read(self):
            return bool(self.made)

        def read(self):
            made, self.made = self.made, []
            return {0: SimpleNamespace(generated_ids=made)}

        def get_status(self):
            return "running" if self.left or self.made else "finished"

    class Pipeline:
        def __init__(self, file, *, scheduler_config, device, properties):
            assert (file, device, properties) == ("x.gguf", "CPU", {"INFERENCE_NUM_THREADS": 2})
            assert scheduler_config.enable_prefix_caching is False
            self.steps = 0

        def add_request(self, number, ids, config):
            assert config.ignore_eos is True
            assert config.do_sample is False
            self.ids, self.handle = ids, Handle(config.max_new_tokens)
            return self.handle

        def step(self):
            self.steps += 1
            if self.steps % 2 == 0:
                self.handle.made, self.handle.left = self.handle.left[:2], self.handle.left[2:]

    fake = SimpleNamespace(
        SchedulerConfig=SimpleNamespace, GenerationConfig=SimpleNamespace, ContinuousBatchingPipeline=Pipeline,
        GenerationStatus=SimpleNamespace(RUNNING="running"),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "openvino_genai", fake)
    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(Tensor=lambda array: array))
    engine = opened(OPENVINO, folder=folder, gguf="x.gguf", format="gguf", threads=2)
    found = Marks(engine, "The statement", 5)
    assert found.prompt_tokens == engine.pipeline.ids.shape[1] > 1
    assert found.text
    with pytest.raises(ValueError, match="gguf must name a file"):
        opened(OPENVINO, folder=folder, gguf=None, format="gguf", threads=1)


@pytest.mark.slow
def test_the_matrix_runs_with_all_engines_that_are_always_there(folder):
    sites = [Site("phone"), Site("cloud", "cloud", threads=2, link=Link(2.5e6, 0.02))]
    model = Model("tiny", folder)
    plan = [
        Cell(model, format, kind, site)
        for site in sites
        for kind, format in ((TRANSFORMERS, "fp32"), (LOOP, "fp32"), (ASSAY_SERVE, "as stored"))
    ]
    rows = deployment_matrix(plan, ASKED, new_tokens=6, repeats=1)
    assert [row.status for row in rows] == ["ok"] * 6, [row.reason for row in rows]
    assert len({tuple(row.texts) for row in rows}) == 1  # the same model: engines and sites change nothing
    assert all(row.same for row in rows)
    assert all(one["cached"] == 0 for row in rows for one in row.warm)
    assert all(row.part("network") >= 0.04 for row in rows[3:])


@pytest.mark.slow
@pytest.mark.parametrize("kind", [LLAMA_CPP, OPENVINO], ids=lambda kind: kind.name)
def test_a_peer_answers_where_it_is_installed(kind):
    from assay.experiments.serving.mobile_llm_measurement import MODEL, gguf_file
    from assay.workloads.models import model_folder

    file = gguf_file()
    if why := kind.missing(file):
        pytest.skip(why)
    plan = [Cell(Model("m", str(model_folder(MODEL)), file), "gguf", kind, Site("phone", threads=2))]
    (row,) = deployment_matrix(plan, ASKED, new_tokens=4, repeats=1)
    assert row.ok, row.reason
    assert row.same

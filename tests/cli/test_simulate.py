"""`assay simulate`, from a measured trace to a fleet file to a prediction beside the measurement."""

from __future__ import annotations

import json

import pytest

from assay.cli.main import main
from assay.methods.core.fleet.files import read_fleet
from assay.methods.core.fleet.simulator import Server, StepTimes, simulate
from assay.methods.core.fleet.traces import poisson

TIMES = StepTimes(prefill=4e-4, step=0.006, row=0.0009, context=2e-6)


@pytest.fixture
def measured(tmp_path):
    """A trace that a simulated server answered: its times are known."""
    requests = poisson(4.0, 20.0, [(40, 30), (400, 8), (150, 60)], seed=2)
    lines = [
        {
            "at": one.request.at, "prompt_tokens": one.request.prompt_tokens, "new_tokens": one.request.new_tokens,
            "ttft": one.ttft, "e2e": one.e2e,
        }
        for one in simulate(requests, [Server("a", TIMES)]).served
    ]  # fmt: skip
    file = tmp_path / "measured.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


def run(capsys, *arguments):
    code = main(["simulate", *map(str, arguments)])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_calibrate_then_predict(measured, tmp_path, capsys):
    fleet = tmp_path / "fleet.toml"
    code, out, _ = run(capsys, "--trace", measured, "--calibrate", "-o", fleet)
    assert code == 0
    assert "times found" in out
    assert "measured" in out
    assert read_fleet(fleet).servers[0].times.step == pytest.approx(TIMES.step, rel=0.1)
    code, out, _ = run(capsys, "--trace", measured, "--fleet", fleet, "--slo", "ttft=500", "--json")
    found = json.loads(out)
    assert code == 0
    assert max(map(abs, found["errors"].values())) < 0.1
    assert "past" not in found  # what the times were fitted to is no prediction
    assert 0 < found["predicted"]["within_slo"] <= 1
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(measured.read_text().splitlines()[:40]))
    for _ in range(2):  # the same prediction again is no second one
        code, out, _ = run(capsys, "--trace", other, "--fleet", fleet, "--json")
        assert json.loads(out)["past"]["predictions"] == 1
    code, out, _ = run(capsys, "--trace", measured, "--fleet", fleet, "--faster", 3, "--json")
    loaded = json.loads(out)
    assert "measured" not in loaded
    assert loaded["predicted"]["ttft"]["p95"] > found["predicted"]["ttft"]["p95"]


def test_a_fleet_of_several(measured, tmp_path, capsys):
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(
        '[[devices]]\nname = "box"\nflops = 4e11\nbandwidth = 3e10\nmemory = 2e10\nidle_watts = 40\npeak_watts = 90\nprice = 3.6\n'
        '[[servers]]\nname = "s"\ncount = 3\ndevice = "box"\ntimes = { prefill = 0.0004, step = 0.006 }\n'
    )
    code, out, _ = run(capsys, "--trace", measured, "--fleet", fleet, "--json")
    servers = json.loads(out)["servers"]
    assert code == 0
    assert list(servers) == ["s-1", "s-2", "s-3"]
    assert all(40 < server["watts"] < 90 and server["price"] > 0 for server in servers.values())
    code, out, _ = run(capsys, "--trace", measured, "--fleet", fleet)
    assert code == 0
    assert "s-1: busy" in out
    code, out, _ = run(capsys, "--trace", measured, "--fleet", fleet, "--clients", 30, "--json")  # never idle
    assert code == 0
    assert max(server["busy"] for server in json.loads(out)["servers"].values()) > 0.9


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("servers = 3", "must be tables"),
        ("", "at least one"),
        ("x = 1", "got x"),
        ('[[servers]]\nname = "a"', "must have times"),
        ('[[servers]]\nname = "a"\ntimes = { prefill = 1 }', "times must have step"),
        ('[[servers]]\nname = "a"\ntimes = { prefill = 1, step = -1 }', "step"),
        ('[[servers]]\nname = "a"\ncount = 0\ntimes = { prefill = 1, step = 1 }', "count of servers"),
        ('[[servers]]\nname = "a"\ndevice = "z"\ntimes = { prefill = 1, step = 1 }', "device of servers"),
        ("[[servers]]\nname = 3\ntimes = { prefill = 1, step = 1 }", "name of servers"),
        ("[[servers", "is no TOML"),
    ],
)
def test_what_a_fleet_file_may_not_hold(measured, tmp_path, capsys, text, said):
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(text)
    code, _, err = run(capsys, "--trace", measured, "--fleet", fleet)
    assert code == 2
    assert said in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "either --fleet FILE or --calibrate"),
        (("--calibrate", "--faster", "0"), "--faster"),
        (("--calibrate", "--clients", "0"), "--clients"),
        (("--fleet", "nowhere.toml"), "cannot read"),
        (("--fleet", "nowhere.toml", "-o", "x"), "-o is for"),
    ],
)
def test_what_the_command_refuses(measured, capsys, arguments, said):
    code, _, err = run(capsys, "--trace", measured, *arguments)
    assert code == 2
    assert said in err


def test_calibration_needs_measurements(tmp_path, capsys):
    file = tmp_path / "t.jsonl"
    file.write_text('{"at": 0, "prompt_tokens": 5, "new_tokens": 2}\n')
    code, _, err = run(capsys, "--trace", file, "--calibrate")
    assert code == 2
    assert "needs ttft and e2e" in err

"""Servers as processes: waited for, stopped and continued, and ended in every way."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from assay.errors import MissingError
from assay.loadtest.client import ask
from assay.loadtest.process import ServerProcess, free_port
from assay.loadtest.traces import Request

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
HERE = Path(__file__).parent
STUB = """
import asyncio, signal, sys
from fake_openai import Fake, Script

async def run():
    if "deaf" in sys.argv:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    async with await asyncio.start_server(Fake(Script(ttft=0.0, itl=lambda place: 0.0)).serve, "127.0.0.1", int(sys.argv[1])) as server:
        await server.serve_forever()

asyncio.run(run())
"""
PATH = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, sys.path)])}


def state(pid):
    """As the kernel has it: T is stopped, Z or none has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except FileNotFoundError:
        return ""


def becomes(pid, *wanted):
    """Wait for a state, within a time that is long on a busy machine: signals take effect when the process next runs."""
    for _ in range(2000):
        if state(pid) in wanted:
            return True
        time.sleep(0.01)
    return False


def started(folder, *words, code=STUB, **options):
    port = free_port()
    command = [sys.executable, "-c", code, str(port), *words]
    return ServerProcess(command, port, log=folder / "log", environment=PATH, **options)


def test_a_server_is_started_stopped_and_ended(tmp_path):
    process = started(tmp_path, chat=False)
    try:
        process.wait_until_ready(60)
        assert process.server.model == "tiny"
        process.pause()
        assert becomes(process.process.pid, "T")
        with process.in_use() as server:
            answer = asyncio.run(ask(server, Request("x", 3)))
        assert answer.tokens == 3
        assert becomes(process.process.pid, "T")
    finally:
        process.end()
    assert process.process.returncode is not None


def test_one_that_does_not_listen_to_signals_is_ended_too(tmp_path, monkeypatch):
    monkeypatch.setattr("assay.loadtest.process.TERM_SECONDS", 0.2)
    process = started(tmp_path, "deaf")
    process.wait_until_ready(60)
    process.pause()
    process.end()
    assert process.process.returncode == -9


def test_one_that_ends_says_why(tmp_path):
    process = started(tmp_path, code="raise SystemExit('no such model')")
    with pytest.raises(MissingError, match="ended with 1: no such model"):
        process.wait_until_ready(60)
    process.end()


def test_one_that_never_answers_is_given_up(tmp_path):
    process = started(tmp_path, code="import time; print('loading', flush=True); time.sleep(60)")
    with pytest.raises(MissingError, match="did not answer within 1 s: connection refused.*(loading|said nothing)"):
        process.wait_until_ready(1.0)
    process.end()


def test_it_ends_with_its_parent_even_if_that_is_killed(tmp_path):
    code = (
        "import os, pathlib, sys, time; from assay.loadtest.process import ServerProcess\n"
        "command = [sys.executable, '-c', 'import time; time.sleep(60)']\n"
        "one = ServerProcess(command, 1, log=pathlib.Path(sys.argv[1]), environment=os.environ)\n"
        "one.pause(); print(one.process.pid, flush=True); time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=PATH) as parent:
        child = int(parent.stdout.readline())
        assert becomes(child, "T")
        parent.kill()
    assert becomes(child, "", "Z")

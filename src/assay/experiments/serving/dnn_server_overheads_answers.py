"""`assay serve` taken apart as the vision server is: where the time of its streamed answers goes, token by token."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from assay.methods.serving.dnn_server_overheads import Lifetime, breakdown, read_spans
from assay.paths import cache_dir, scratch_dir

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
        lives = read_spans(file)
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

"""What operators see: metrics, logs, request ids; and the server behind a proxy and in a page's eyes."""

from __future__ import annotations

import io
import json
import logging
import re

import pytest
from fastapi.testclient import TestClient

from assay.server import logs, metrics
from assay.server.metrics import Histogram, Latencies

SAMPLE = re.compile(r"([a-z_]+)(?:\{(.*)\})? (-?[0-9.e+-]+|NaN|\+Inf)")
LABEL = re.compile(r'([a-z_]+)="((?:[^"\\]|\\.)*)"')


def read(text):
    """Samples of Prometheus' text format by name and labels; AssertionError for what is none."""
    assert text.endswith("\n")
    found, kinds = {}, {}
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name not in kinds
            kinds[name] = kind
        elif not line.startswith("# HELP "):
            name, labels, value = SAMPLE.fullmatch(line).groups()
            key = (name, tuple(sorted(LABEL.findall(labels or ""))))
            assert key not in found
            found[key] = float(value)
            family = re.sub(r"_(bucket|sum|count)$", "", name)
            assert name in kinds or kinds[family] == "histogram"
    return found


def value(found, name, **labels):
    return found[name, tuple(sorted(labels.items()))]


# ---- metrics


def test_what_is_counted(client, say):
    steps = say("Hello there")
    for stream in (False, True):
        client.post("/v1/completions", json={"prompt": [5, 6, 7], "max_tokens": 20, "stream": stream})
    client.post("/v1/completions", json={"prompt": "x", "nonsense": 1})
    client.get("/nowhere/at/all")
    response = client.get("/metrics")
    assert response.headers["content-type"] == metrics.CONTENT_TYPE
    found = read(response.text)
    assert value(found, "assay_requests_total", path="/v1/completions", status="200") == 2
    assert value(found, "assay_requests_total", path="/v1/completions", status="400") == 1
    assert value(found, "assay_requests_total", path="other", status="404") == 1
    assert value(found, "assay_request_seconds_count") == 4
    assert value(found, "assay_requests_in_progress") == 0
    tiny = {"model": "tiny"}
    assert value(found, "assay_prompt_tokens_total", **tiny) == 6
    assert value(found, "assay_generated_tokens_total", **tiny) == 2 * steps
    assert value(found, "assay_time_to_first_token_seconds_count", **tiny) == 2
    assert value(found, "assay_inter_token_seconds_count", **tiny) == 2 * (steps - 1)
    assert value(found, "assay_batch_rows_count", **tiny) == value(found, "assay_steps_total", **tiny) == 2 * steps
    for name in ("assay_rows_waiting", "assay_rows_running", "assay_preemptions_total", "assay_close_choices_total"):
        assert value(found, name, **tiny) == 0
    assert value(found, "assay_kv_tokens", **tiny) > 0
    assert value(found, "assay_model_info", backend="stand-in", **tiny) == 1


def test_a_name_may_hold_anything(app_of):
    name = 'a "quoted" \\ name\nof two lines'
    found = read(TestClient(app_of(name)).get("/metrics").text)
    assert any(("model", 'a \\"quoted\\" \\\\ name\\nof two lines') in labels for _, labels in found)


def test_a_histogram_counts_up_to_each_bound():
    histogram = Histogram((1, 2))
    for seen, times in ((0.5, 1), (1, 2), (1.5, 1), (9, 1)):
        histogram.observe(seen, times)
    lines = [line.partition("{")[2] for line in histogram.samples("h", {"a": "b"})]
    assert lines == ['a="b",le="1"} 3', 'a="b",le="2"} 4', 'a="b",le="+Inf"} 5', 'a="b"} 13.0', 'a="b"} 5']


def test_tokens_that_come_together_share_their_time():
    seen = Latencies()
    seen.observe(10.0, 0.0, 10.5, 2)
    seen.observe(10.0, 10.5, 10.9, 4)
    seen.observe(10.0, 10.9, 11.0, 0)
    assert (seen.first.sum, sum(seen.first.counts)) == (0.5, 1)
    assert (seen.between.sum, sum(seen.between.counts)) == (pytest.approx(0.4), 4)


# ---- ids and logs


@pytest.fixture
def lines():
    """The log as an operator reads it."""
    stream = io.StringIO()
    logs.configure(stream)
    return lambda: [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_a_request(client, say, lines):
    steps = say("Hello there")
    body = {"prompt": "in confidence", "max_tokens": 20}
    response = client.post("/v1/completions", json=body, headers={"x-request-id": "mine-1"})
    assert response.headers["x-request-id"] == "mine-1"
    client.post("/v1/completions", json=body | {"stream": True})
    client.post("/v1/completions", json={"prompt": "in confidence", "bad": 1})
    first, second, third = lines()
    assert {"request_id": "mine-1", "method": "POST", "path": "/v1/completions", "status": 200}.items() <= first.items()
    assert (first["model"], first["completion_tokens"], first["finish"]) == ("tiny", steps, ["stop"])
    assert first["seconds"] > 0
    assert first["time"].endswith("+00:00")
    assert (second["stream"], second["completion_tokens"]) == (True, steps)
    assert (third["status"], "model" in third) == (400, False)
    assert "confidence" not in json.dumps(lines())
    assert "Hello" not in json.dumps(lines())


@pytest.mark.parametrize("given", ["", "x" * 129, "two words", "caf\xe9", "a\tb"])
def test_an_id_that_is_none_is_not_repeated(client, given):
    made = client.get("/health", headers={"x-request-id": given.encode("latin-1")}).headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{32}", made)
    assert made != client.get("/health").headers["x-request-id"]


def test_every_answer_has_an_id(client):
    for response in (
        client.get("/nowhere"),
        client.post("/v1/completions", content=b"{", headers={"content-type": "application/json"}),
        client.post("/v1/completions", json={"prompt": "x", "stream": True, "max_tokens": 1}),
    ):
        assert response.headers["x-request-id"]


def test_of_a_failure_the_kind_and_the_place_are_logged(client, model, monkeypatch, lines):
    def fails(*args, **kwargs):
        raise ValueError("in confidence")

    monkeypatch.setattr(type(model), "forward", fails)
    assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 500
    error, request = lines()
    assert (error["level"], request["status"]) == ("error", 500)
    assert "ValueError" in error["message"]
    record = logging.LogRecord("assay.server", logging.ERROR, "", 0, "it failed", (), None)
    try:
        fails()
    except ValueError as caught:
        record.exc_info = (type(caught), caught, caught.__traceback__)
    line = json.loads(logs.JsonLines().format(record))
    assert (line["error"], "fails" in line["place"]) == ("ValueError", True)


def test_what_is_outside_a_request_is_caught_too(app_of, monkeypatch):
    """A fault in the application itself is a 500 of OpenAI's shape, and never a traceback with a message."""
    app = app_of()
    monkeypatch.setattr(app.state.server.models, "names", lambda: 1 / 0)
    response = TestClient(app, raise_server_exceptions=False).get("/v1/models")
    assert (response.status_code, response.json()["error"]["type"]) == (500, "server_error")
    assert response.headers["x-request-id"]


# ---- pages and proxies


def test_pages_of_other_sites_may_not_call_it(client):
    response = client.get("/health", headers={"origin": "https://elsewhere.example"})
    assert not [name for name in response.headers if name.startswith("access-control")]
    preflight = {"origin": "https://elsewhere.example", "access-control-request-method": "POST"}
    assert client.options("/v1/completions", headers=preflight).status_code == 405


def test_pages_of_the_sites_that_were_named_may(app_of):
    client = TestClient(app_of(cors_origins=["https://mine.example"], api_keys=["k"]))
    preflight = {
        "origin": "https://mine.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-stainless-os",
    }
    response = client.options("/v1/completions", headers=preflight)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "https://mine.example"
    refused = client.post("/v1/completions", json={}, headers={"origin": "https://mine.example"})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://mine.example"
    other = client.options("/v1/completions", headers=preflight | {"origin": "https://elsewhere.example"})
    assert other.headers.get("access-control-allow-origin") is None


@pytest.mark.parametrize("prefix", ["/llm", ""])
def test_behind_a_proxy(app_of, prefix):
    """Whether the proxy takes its prefix off or not."""
    client = TestClient(app_of(root_path="/llm"))
    assert client.get(f"{prefix}/health").status_code == 200
    made = client.post(f"{prefix}/v1/completions", json={"prompt": "x", "max_tokens": 1})
    assert made.status_code == 200
    assert client.get(f"{prefix}/openapi.json").json()["servers"] == [{"url": "/llm"}]
    found = read(client.get(f"{prefix}/metrics").text)
    assert value(found, "assay_requests_total", path="/v1/completions", status="200") == 1

"""`assay serve`: what it refuses before it loads, what it says, and how it ends."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from clients import answer

from assay.cli import serve as command
from assay.cli.serve import (
    bound,
    checked_keys,
    checked_root,
    named_adapters,
    named_models,
    saying,
    serve,
    served_name,
)
from assay.errors import InputError
from tiny import write_tiny_llama


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("ASSAY_API_KEY", raising=False)


@pytest.fixture
def not_loaded(monkeypatch):
    monkeypatch.setattr(command, "_load", lambda *a: pytest.fail("it was loaded"))


def test_an_open_host_needs_a_key(not_loaded):
    for host in ("0.0.0.0", "", "::"):
        with pytest.raises(InputError, match="api-key"):
            serve(["m"], host=host, port=0)


def test_what_no_address_is(not_loaded):
    for host in ("no.such.host.invalid", "x" * 300, "ab\x00"):
        with pytest.raises(InputError, match="host"):
            serve(["m"], host=host, port=0)
    for port in (-1, 65536):
        with pytest.raises(InputError, match="port"):
            serve(["m"], port=port)
    with pytest.raises(InputError, match="192.0.2.1"):  # an address of nobody here
        serve(["m"], host="192.0.2.1", port=0, api_key=["k"])


def test_a_port_that_is_taken_is_found_before_anything_is_loaded(not_loaded):
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(InputError, match="--port 0"):
        serve(["m"], port=other.getsockname()[1])
    with bound("127.0.0.1", 0, []) as loading, pytest.raises(InputError, match="in use"):
        bound("127.0.0.1", loading.getsockname()[1], [])


@pytest.mark.parametrize("key", ["", " ", "two words", "schlüssel", "a\nb"])
def test_a_key_that_no_header_carries_is_refused(monkeypatch, key, not_loaded):
    with pytest.raises(InputError, match="api-key"):
        serve(["m"], port=0, api_key=[key])


def test_keys_come_from_options_a_file_or_the_environment(monkeypatch, tmp_path):
    assert checked_keys(None, None) == []
    monkeypatch.setenv("ASSAY_API_KEY", "from-outside another")
    assert checked_keys(None, None) == ["from-outside", "another"]
    file = tmp_path / "keys"
    file.write_text("# ours\nfirst\n\n  second  \n")
    assert checked_keys(["k", "l"], None) == ["k", "l"]
    assert checked_keys(["k"], file) == ["k", "first", "second"]
    assert checked_keys(None, file) == ["first", "second"]
    for text in ("# none\n", "two words\n", "schlüssel\n"):
        file.write_text(text)
        with pytest.raises(InputError, match="key"):
            checked_keys(None, file)
    with pytest.raises(InputError, match="no-such"):
        checked_keys(None, tmp_path / "no-such")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_requests", 0),
        ("max_body", 0),
        ("max_prompt_tokens", 0),
        ("max_running", 0),
        ("request_timeout", 0.0),
        ("request_timeout", float("nan")),
        ("drain_seconds", -1.0),
        ("kv_gib", 0.0),
        ("root_path", "llm"),
        ("allow_load", True),
    ],
)
def test_a_bad_option_is_refused_by_its_name(not_loaded, option, value):
    with pytest.raises(InputError, match="--" + option.replace("_", "-")):
        serve(["m"], port=0, **{option: value})


def test_names_of_models_and_adapters():
    assert named_models(["org/a"], ["b=./x", "c=y=z"]) == [("a", "org/a"), ("b", "./x"), ("c", "y=z")]
    for plain, named in (([], []), (["a", "x/a"], []), (["a"], ["a=x"]), ([], ["a"]), ([], ["=x"]), ([], ["a="])):
        with pytest.raises(InputError):
            named_models(plain, named)
    assert named_adapters(["l=d", "m@b=e"], ["a", "b"]) == [("l", "d", "a"), ("m", "e", "b")]
    for given in (["l"], ["l@c=d"], ["a=d"], ["l=d", "l=e"], ["@b=d"]):
        with pytest.raises(InputError, match="adapter"):
            named_adapters(given, ["a", "b"])
    assert [checked_root(root) for root in ("", "/", "/llm", "/a/b/")] == ["", "", "/llm", "/a/b"]


def test_it_is_said_that_it_loads(monkeypatch, capsys):
    monkeypatch.setattr(command, "SAY_EVERY", 0.01)
    with saying("waiting"):
        time.sleep(0.2)
    said = capsys.readouterr().err
    assert said.startswith("waiting ...\n")
    assert said.count("waiting ... 0 s") > 1


def test_a_model_that_cannot_be_loaded_ends_it(tmp_path, capsys):
    with pytest.raises(InputError, match="nowhere"):
        serve([str(tmp_path / "nowhere")], port=0)
    assert "serving" not in capsys.readouterr().err


def test_the_name_of_what_is_served(tmp_path, monkeypatch):
    (tmp_path / "my-model" / "sub").mkdir(parents=True)
    (tmp_path / "file.gguf").touch()
    monkeypatch.chdir(tmp_path / "my-model")
    monkeypatch.setenv("HOME", str(tmp_path))
    for model in (".", "./", "sub/..", "../my-model", "~/my-model", str(tmp_path / "my-model") + "/"):
        assert served_name(model) == "my-model"
    assert served_name("..") == tmp_path.name
    assert served_name("../file.gguf") == "file.gguf"
    assert served_name("org/name") == "name"
    assert served_name("smollm2-135m") == "smollm2-135m"
    assert served_name("/") == "model"
    os.mkdir(b"bad\xff")
    assert served_name(os.fsdecode(b"bad\xff")) == "bad?"


# ---- the process


class Process:
    """`assay serve` in a process of its own."""

    def __init__(self, folder, *options, port=0):
        source = Path(command.__file__).parents[2]
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "assay", "serve", ".", "--port", str(port), *options],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.said = []
        self.port = port

    def ready(self):
        while not self.said or "serving" not in self.said[-1]:
            line = self.process.stderr.readline()
            assert line, self.said
            self.said.append(line)
        found = re.search(r"serving 'tiny' on http://127\.0\.0\.1:(\d+)/v1", self.said[-1])
        assert found, self.said
        self.port = int(found[1])
        return self

    def ask(self, path, body=None):
        """The answer, its body not read yet."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        data = None if body is None else json.dumps(body)
        connection.request("GET" if body is None else "POST", path, data, {"Content-Type": "application/json"})
        return connection.getresponse()

    def end(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self.process.stderr.close()


@pytest.fixture
def started(tmp_path):
    folder, made = write_tiny_llama(tmp_path / "tiny"), []

    def start(*options, port=0):
        made.append(Process(folder, *options, port=port))
        return made[-1]

    yield start
    for one in made:
        one.end()


LONG = {"model": "tiny", "prompt": "x", "max_tokens": 2000, "ignore_eos": True, "stream": True}
SHORT = {"model": "tiny", "prompt": "x", "max_tokens": 3, "ignore_eos": True}


def half_asked(server):
    """A connection on which half of a request was sent: it has its place until the other half comes."""
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    data = json.dumps(SHORT).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data[:5])
    while b"assay_requests_in_progress 1" not in server.ask("/metrics").read():
        time.sleep(0.01)
    return connection, data[5:]


def test_it_serves_a_folder_as_it_is_and_lets_what_is_asked_end(started):
    server = started()
    assert server.process.stderr.readline() == "loading . ...\n"
    server.ready()
    connection, rest = half_asked(server)
    server.process.send_signal(signal.SIGTERM)
    while server.ask("/ready").status != 503:
        time.sleep(0.01)
    refused = server.ask("/v1/completions", SHORT)
    assert (refused.status, b"stopping" in refused.read()) == (503, True)
    connection.sendall(rest)
    status, made = answer(connection)
    connection.close()
    assert (status, made["usage"]["completion_tokens"]) == (200, 3)
    assert server.process.wait(20) == 0
    lines = [json.loads(line) for line in server.process.stderr.read().splitlines()]
    assert {line["message"] for line in lines} == {"request"}
    (served,) = [line for line in lines if line["path"] == "/v1/completions" and line["status"] == 200]
    assert (served["completion_tokens"], served["finish"]) == (3, ["length"])


def test_a_second_signal_ends_it_at_once(started):
    server = started("--drain-seconds", "100", "--no-log-requests").ready()
    connection, _ = half_asked(server)
    server.process.send_signal(signal.SIGTERM)
    while server.ask("/ready").status != 503:
        time.sleep(0.01)
    assert server.process.poll() is None
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(20) == -signal.SIGTERM
    connection.close()


@pytest.mark.slow
def test_what_does_not_end_in_time_is_ended(started):
    server = started("--drain-seconds", "0.2", "--no-log-requests").ready()
    connection, _ = half_asked(server)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(20) == 0
    connection.close()


@pytest.mark.slow
def test_with_nothing_to_do_it_ends_at_once_and_says_nothing(started):
    server = started("--no-log-requests").ready()
    assert server.ask("/health").status == 200
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(20) == 0
    assert server.process.stderr.read() == ""


@pytest.mark.slow
def test_it_can_be_killed_and_started_again_on_its_port(started):
    server = started().ready()
    for _ in range(3):
        streams = [server.ask("/v1/completions", LONG) for _ in range(5)]
        assert all(stream.readline().startswith(b"data: ") for stream in streams)
        server.process.send_signal(signal.SIGKILL)
        server.process.wait(20)
        server = started(port=server.port).ready()
        whole = server.ask("/v1/completions", LONG | {"stream": False, "max_tokens": 3})
        assert whole.status == 200
        assert json.loads(whole.read())["usage"]["completion_tokens"] == 3

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
from pathlib import Path

import pytest

from assay.cli import serve as command
from assay.cli.serve import bound, checked_key, saying, serve, served_name
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
            serve("m", host=host, port=0)


def test_what_no_address_is(not_loaded):
    for host in ("no.such.host.invalid", "x" * 300, "ab\x00"):
        with pytest.raises(InputError, match="host"):
            serve("m", host=host, port=0)
    for port in (-1, 65536):
        with pytest.raises(InputError, match="port"):
            serve("m", port=port)
    with pytest.raises(InputError, match="192.0.2.1"):  # an address of nobody here
        serve("m", host="192.0.2.1", port=0, api_key="k")


def test_a_port_that_is_taken_is_found_before_anything_is_loaded(not_loaded):
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(InputError, match="--port 0"):
        serve("m", port=other.getsockname()[1])
    with bound("127.0.0.1", 0, None) as loading, pytest.raises(InputError, match="in use"):
        bound("127.0.0.1", loading.getsockname()[1], None)


@pytest.mark.parametrize("key", ["", " ", "two words", "schlüssel", "a\nb"])
def test_a_key_that_no_header_carries_is_refused(monkeypatch, key, not_loaded):
    with pytest.raises(InputError, match="api-key"):
        serve("m", port=0, api_key=key)
    assert checked_key("k") == "k"
    monkeypatch.setenv("ASSAY_API_KEY", "from-outside")
    assert checked_key(None) == "from-outside"


def test_it_is_said_that_it_loads_before_and_while_it_does(monkeypatch, capsys):
    assert "loading" not in capsys.readouterr().err

    def load(*args):
        assert "loading m" in capsys.readouterr().err
        raise InputError("no such model")

    monkeypatch.setattr(command, "_load", load)
    with pytest.raises(InputError, match="no such model"):
        serve("m", port=0)
    monkeypatch.setattr(command, "SAY_EVERY", 0.01)
    with saying("waiting"):
        import time

        time.sleep(0.2)
    assert capsys.readouterr().err.count("waiting ... 0 s") > 1


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


def test_it_serves_a_folder_as_it_is_and_ends_while_it_generates(tmp_path):
    folder = write_tiny_llama(tmp_path / "tiny")
    source = Path(command.__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "assay", "serve", ".", "--port", "0"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr.readline() == "loading . ...\n"
        said = ""
        while "serving" not in said:
            line = process.stderr.readline()
            assert line, said
            said += line
        found = re.search(r"serving 'tiny' on http://127\.0\.0\.1:(\d+)/v1", said)
        assert found, said
        connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=30)
        body = {"model": "tiny", "prompt": "x", "max_tokens": 2000, "ignore_eos": True, "stream": True}
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.status == 200
        assert response.readline().startswith(b"data: ")
        process.send_signal(signal.SIGTERM)
        rest = response.read()
        assert b"the server is stopping" in rest
        assert b"[DONE]" not in rest
        assert process.wait(20) == -signal.SIGTERM
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()

"""A shelf of known records, the application over it, and a browser where one is installed."""

from __future__ import annotations

import functools
import os
import shutil
import socket
import threading
import time

import pytest
import typer
from tests.evidence.evidence_maker import estimate, make
from tests.evidence.tuned_maker import lines
from tests.evidence.tuned_maker import run as tuned_run

from assay.cli.main import build
from assay.cli.site import commands
from assay.evidence import shipped
from assay.evidence.reading import Reading
from assay.evidence.store import Store
from assay.evidence.tuned import of_lines
from assay.site.app import Searcher, create_app
from assay.site.guide import Page
from assay.site.library import Shelf

HERE = {
    "cpu": "My CPU <b>fast</b>",
    "cores": 4,
    "ram_bytes": 8 * 2**30,
    "flags": ["avx2", "fma"],
    "versions": {"torch": "2"},
}
BETTER = {**HERE, "cpu": "Bigger CPU", "cores": 8, "flags": ["avx2", "avx512f", "fma"]}
OTHER = {"cpu": "Small CPU", "cores": 2, "ram_bytes": 4 * 2**30, "flags": ["neon"]}
CLAIM = "xattention/attention-speedup"


def wait_for(happens, seconds=30):
    """Wait until it happens; fail when it does not."""
    deadline = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


@functools.cache
def known_records():
    """Records of one claim on three machines, and of another claim that failed."""
    mine = make(
        claim=CLAIM, fingerprint="mine", machine=HERE, measured=estimate(1.9, 2.0, 2.1), vs_free=estimate(1.5, 1.6, 1.7)
    )
    better = make(
        claim=CLAIM,
        fingerprint="better",
        machine=BETTER,
        measured=estimate(3.9, 4.0, 4.1),
        vs_free=estimate(3.5, 3.6, 3.7),
        minutes=1,
    )
    other = make(
        claim=CLAIM,
        fingerprint="other",
        machine=OTHER,
        measured=estimate(0.4, 0.5, 0.6),
        vs_free=estimate(0.4, 0.5, 0.6),
        minutes=2,
    )
    failed = make(
        claim="svg2/wan-speedup",
        fingerprint="mine",
        machine=HERE,
        status="failed",
        error="<script>alert(1)</script> broke",
    )
    old = make(claim="prepacking/prefill-speedup-padded", fingerprint="mine", machine=HERE, hashes={})
    return [mine, better, other, failed, old]


@pytest.fixture(scope="session")
def nothing_yet(tmp_path_factory):
    """A store that was just made: to make one takes longer than to copy it."""
    file = tmp_path_factory.mktemp("store") / "evidence.db"
    Store(f"sqlite:///{file}").close()
    return file


@pytest.fixture
def store(tmp_path, monkeypatch, nothing_yet):
    """An empty store, and no shipped records or runs."""
    monkeypatch.setattr(shipped, "read", lambda *_, **__: Reading())
    monkeypatch.setattr(shipped, "runs", lambda *_: [])
    shutil.copy(nothing_yet, tmp_path / "evidence.db")
    url = f"sqlite:///{tmp_path / 'evidence.db'}"
    with Store(url) as opened:
        yield opened


@functools.cache
def known_runs():
    """Two runs of `assay tune`, on this machine and on another: a pair and each alone; a pair whose second was not tried alone."""
    pair = {("dtype",): 4.0, ("dtype", "attention_backend"): 3.0, ("dtype", "fp8_vs_int8", "attention_backend"): 1.5}
    elsewhere = lines(pair, best=("dtype", "fp8_vs_int8", "attention_backend"), minutes=5, goal="decode")
    elsewhere[0]["machine"] |= {"fingerprint": "other"}
    return [tuned_run(), of_lines(elsewhere)]


@pytest.fixture
def shelf(store):
    store.add(known_records())
    store.add_runs(known_runs())
    made = Shelf(str(store._url), here="mine", machine=HERE)
    yield made
    made.close()


@pytest.fixture(scope="session")
def command_pages():
    """The guide's pages about the command line."""
    texts = commands(typer.main.get_command(build()))
    return tuple(Page(f"command-{name}", f"assay {name}", text) for name, text in texts.items())


@pytest.fixture
def app(shelf, command_pages):
    return create_app(shelf, searcher=Searcher(start=False), commands=command_pages)


@pytest.fixture(scope="session")
def standing(tmp_path_factory, nothing_yet, command_pages):
    """A client of one application for all tests that only read: to make one takes longer than to ask it."""
    from starlette.testclient import TestClient

    file = shutil.copy(nothing_yet, tmp_path_factory.mktemp("standing") / "evidence.db")
    with pytest.MonkeyPatch.context() as patch, Store(f"sqlite:///{file}") as opened:
        patch.setattr(shipped, "read", lambda *_, **__: Reading())
        patch.setattr(shipped, "runs", lambda *_: [])
        opened.add(known_records())
        opened.add_runs(known_runs())
        shelf = Shelf(str(opened._url), here="mine", machine=HERE)
        shelf.library()
    made = create_app(shelf, searcher=Searcher(start=False), commands=command_pages)
    yield TestClient(made, base_url="http://127.0.0.1", raise_server_exceptions=False)
    shelf.close()


@pytest.fixture
def client(app):
    from starlette.testclient import TestClient

    return TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False)


@pytest.fixture
def address(app):
    """The application on a port of its own."""
    import uvicorn

    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join(10)
    listener.close()


@pytest.fixture(scope="module")
def browser():
    """Chromium, headless. For a module and not the session: while it is open, its event loop counts as running in this process."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        (pytest.fail if os.environ.get("ASSAY_TEST_ALL") else pytest.skip)(
            "Chromium is not installed: apt-get install chromium"
        )
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()

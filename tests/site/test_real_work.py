"""A real command from a real page: `assay site` as a process, a smoke verify started in Chromium, the server ended and started again."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading

import httpx
import psutil
import pytest
from playwright.sync_api import expect
from tests.site.conftest import wait_for

PAPER = "attention_io"  # arithmetic on sizes and a small simulation: the cheapest there is


class Site:
    """`assay site` on a port, over a folder of its own."""

    def __init__(self, folder, port):
        self.folder, self.port, self.said = folder, port, []

    def start(self):
        environment = {**os.environ, "ASSAY_DATA_DIR": str(self.folder)}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "assay", "site", "--port", str(self.port)],
            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment, cwd=self.folder,
        )  # fmt: skip
        said = self.said = []
        threading.Thread(target=lambda: said.extend(self.process.stderr), daemon=True).start()
        wait_for(lambda: any("enter?token=" in line for line in said) or self.process.poll() is not None, 60)
        wait_for(self.answers, 60)
        return re.search(r"http://\S+enter\?token=\S+", "".join(said))[0]

    def answers(self):
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"http://127.0.0.1:{self.port}/health").text == "ok"
        return False

    def end(self):
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(20)

    def jobs(self):
        return httpx.get(f"http://127.0.0.1:{self.port}/api/jobs").json()


@pytest.fixture
def site(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path / "data"
    folder.mkdir()
    made = Site(folder, port)
    yield made
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        made.end()
    for file in (folder / "jobs").glob("*/job.json"):
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(json.loads(file.read_text())["pid"])
            for child in [*process.children(recursive=True), process]:
                child.kill()


@pytest.mark.slow
def test_measure_watch_restart_and_cancel(site, browser):
    address = site.start()
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.goto(address)
    page.get_by_label("Paper", exact=True).select_option(PAPER)
    page.get_by_label("Scale", exact=True).select_option("smoke")
    page.get_by_role("button", name="Measure").click()
    page.wait_for_url("**/jobs/2*")
    first = page.url
    expect(page.locator("#log")).to_contain_text("loading the experiments", timeout=60_000)
    [job] = site.jobs()
    pid = json.loads((site.folder / "jobs" / job["id"] / "job.json").read_text())["pid"]

    assert site.end() in (0, 130, -signal.SIGINT)  # though a page watches
    assert psutil.pid_exists(pid)
    address = site.start()
    assert site.jobs()[0]["id"] == job["id"]

    expect(page.locator("#state")).to_have_text("done", timeout=120_000)  # the page found the new server by itself
    said = page.locator("#log").inner_text()
    assert re.search(r"\[1/\d\] attention_io/", said)
    assert "computed" in said
    page.goto(re.sub(r"jobs/.*", f"papers/{PAPER}", first))
    mine = page.locator(".origin-you").first
    expect(mine.locator(".badge")).to_have_text("smoke")
    expect(mine).to_contain_text("measured on this machine")
    page.goto(re.sub(r"jobs/.*", "", first))
    assert page.locator(f".paper:has(a[href='/papers/{PAPER}']) .chip-computed").count() >= 1

    page.goto(first)  # with the token of a server that is gone
    assert page.get_by_role("button", name="Again").count() == 0
    page.goto(address)
    page.goto(first)
    page.get_by_role("button", name="Again").click()
    expect(page.locator("#state")).to_have_text("running")
    assert page.url != first
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#state")).to_contain_text("cancelled", timeout=60_000)
    expect(page.get_by_role("button", name="Go on", exact=True)).to_be_visible()
    states = [job["state"] for job in site.jobs()]
    assert states == ["cancelled", "done"]
    assert (site.folder / "evidence.db").is_file()
    context.close()

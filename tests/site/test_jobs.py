"""Work started from the pages: who may, what it says while it runs, that it can be cancelled and outlives the server."""

from __future__ import annotations

import json
import os
import signal

import psutil
import pytest
from starlette.testclient import TestClient
from tests.site.conftest import wait_for

from assay.errors import InputError
from assay.site import jobs as jobs_module
from assay.site.app import Searcher, create_app
from assay.site.jobs import CODE, JOB, LOG, OUT, REPORT, Jobs, tune_words, verify_words

TOKEN = "t" * 32
PROGRAM = """
import os, signal, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)
place, words = Path(sys.argv[1]), sys.argv[2:]
print("began", *words, os.getcwd(), flush=True)
code = 0
try:
    while not (place / "go").exists():
        time.sleep(0.02)
except KeyboardInterrupt:
    if words[-1] == "deaf":
        time.sleep(600)
    code = 130
if words[-1] == "fails":
    code = 3
print("ended", flush=True)
(place / "code").write_text(str(code))
"""


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    monkeypatch.setattr(jobs_module, "PROGRAM", program)
    monkeypatch.setattr(jobs_module, "PATIENCE", 0.5)
    user = tmp_path / "user"
    user.mkdir()
    made = Jobs(tmp_path / "jobs", user)
    yield made
    for job in made.all():
        process = made._process(job.id)
        if process is not None:
            process.kill()


def let_end(jobs, job):
    (jobs.folder / job.id / "go").touch()
    wait_for(lambda: jobs.get(job.id).state != "running")
    return jobs.get(job.id)


def test_a_job_runs_in_its_own_folder_and_leaves_its_code(jobs):
    job = jobs.start(("verify", "x"))
    assert job.state == "running"
    wait_for(lambda: "began" in jobs.log(job.id)[0])
    assert f"began verify x {jobs.folder / job.id}" in jobs.log(job.id)[0]
    done = let_end(jobs, job)
    assert (done.state, done.code, done.command) == ("done", 0, "assay verify x")
    text, end = jobs.log(job.id)
    assert jobs.log(job.id, end) == ("", end)
    assert text.endswith("ended\n")
    assert let_end(jobs, jobs.start(("verify", "fails"))).state == "failed"


def test_one_runs_at_a_time(jobs):
    job = jobs.start(("verify", "x"))
    with pytest.raises(InputError, match="assay verify x is running"):
        jobs.start(("verify", "y"))
    let_end(jobs, job)
    let_end(jobs, jobs.start(("verify", "y")))
    assert [job.words[1] for job in jobs.all()][-1] == "x"


def test_a_cancelled_command_ends_as_by_ctrl_c(jobs):
    job = jobs.start(("verify", "x"))
    wait_for(lambda: "began" in jobs.log(job.id)[0])
    assert jobs.cancel(job.id).state == "cancelled"
    assert jobs.cancel(job.id).state == "cancelled"
    again = jobs.again(job.id)
    assert (again.words, again.state) == (job.words, "running")
    let_end(jobs, again)


def test_one_that_does_not_listen_is_killed(jobs):
    job = jobs.start(("verify", "deaf"))
    wait_for(lambda: "began" in jobs.log(job.id)[0])
    pid = json.loads((jobs.folder / job.id / JOB).read_text())["pid"]
    assert jobs.cancel(job.id).state == "lost"
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_job_outlives_the_server(jobs):
    job = jobs.start(("verify", "x"))
    later = Jobs(jobs.folder, jobs.user_folder)  # as a new server sees it
    assert later.get(job.id).state == "running"
    with pytest.raises(InputError, match="is running"):
        later.start(("verify", "y"))
    assert let_end(jobs, job).state == "done"
    assert later.get(job.id).state == "done"


def test_a_killed_one_is_lost_and_its_number_means_nothing_afterwards(jobs):
    job = jobs.start(("verify", "x"))
    file = jobs.folder / job.id / JOB
    facts = json.loads(file.read_text())
    os.kill(facts["pid"], signal.SIGKILL)
    wait_for(lambda: jobs.get(job.id).state == "lost")
    file.write_text(json.dumps({**facts, "pid": os.getpid()}))  # the number was given to another process
    later = Jobs(jobs.folder)
    assert later.get(job.id).state == "lost"
    assert later.cancel(job.id).state == "lost"  # and that one is left alone


def test_paths_mean_what_they_mean_where_the_server_was_started(jobs):
    (jobs.user_folder / "my model").mkdir()
    job = jobs.start(("tune", "my model", "--goal", "ttft", "-o", OUT))
    wait_for(lambda: "began" in jobs.log(job.id)[0])
    assert f"began tune {jobs.user_folder / 'my model'} --goal ttft -o out " in jobs.log(job.id)[0]
    let_end(jobs, job)


def test_folders_that_are_no_jobs_are_passed_over(jobs):
    (jobs.folder / "20260101-000000-abcdef").mkdir()
    broken = jobs.folder / "20260101-000000-abcdee"
    broken.mkdir()
    (broken / JOB).write_text("{")
    (jobs.folder / "file").write_text("x")
    assert jobs.all() == []
    for id in ("../../etc", "20260101-000000-abcdef", "", "x" * 500):
        with pytest.raises(InputError, match="no job has the id"):
            jobs.get(id)


def test_old_jobs_give_way(jobs, monkeypatch):
    monkeypatch.setattr(jobs_module, "KEPT", 2)
    for name in ("a", "b", "c"):
        let_end(jobs, jobs.start(("verify", name)))
    job = jobs.start(("verify", "d"))
    assert [found.words[1] for found in jobs.all()] == ["d", "c", "b"]
    let_end(jobs, job)


@pytest.mark.parametrize(
    ("slug", "scale", "says"),
    [("nothing", "small", "no paper"), ("swin", "small", "planned"), ("xattention", "huge", "scale must be"),
     ("--all", "small", "no paper"), ("xattention/x", "small", "no claim"), ("", "small", "no paper")],
)  # fmt: skip
def test_what_cannot_be_measured(slug, scale, says):
    with pytest.raises(InputError, match=says):
        verify_words(slug, scale)


@pytest.mark.parametrize(
    ("given", "says"),
    [(("", "ttft", "1", "0"), "model must"), (("--help", "ttft", "1", "0"), "model must"), (("a\nb", "ttft", "1", "0"), "model must"),
     (("m", "speed", "1", "0"), "goal must"), (("m", "ttft", "x", "0"), "must be numbers"), (("m", "ttft", "nan", "0"), "minutes must"),
     (("m", "ttft", "0.5", "0"), "minutes must"), (("m", "ttft", "1e9", "0"), "minutes must"), (("m", "ttft", "5", "1"), "max_drop must"),
     (("m", "ttft", "5", "-0.1"), "max_drop must")],
)  # fmt: skip
def test_what_cannot_be_tuned(given, says):
    with pytest.raises(InputError, match=says):
        tune_words(*given)


@pytest.fixture
def working(shelf, jobs):
    app = create_app(shelf, searcher=Searcher(start=False), jobs=jobs, token=TOKEN)
    return TestClient(app, base_url="http://127.0.0.1", follow_redirects=False)


def entered(client):
    """The client with the cookie; returns the word of its forms."""
    answer = client.get(f"/enter?token={TOKEN}")
    assert answer.headers["location"] == "/jobs"
    assert {"HttpOnly", "SameSite=strict"} <= set(answer.headers["set-cookie"].split("; "))
    page = client.get("/jobs").text
    return page.split('name="word" value="')[1].split('"')[0]


FORM = {"kind": "verify", "paper": "xattention", "scale": "smoke"}


def test_start_watch_and_come_back(working, jobs):
    word = entered(working)
    answer = working.post("/jobs", data={**FORM, "word": word})
    assert answer.status_code == 303
    page = answer.headers["location"]
    assert "assay verify xattention --scale smoke --resume" in working.get(page).text
    assert 'http-equiv="refresh"' in working.get(page).text
    [job] = jobs.all()
    (jobs.folder / job.id / "go").touch()
    with working.stream("GET", f"{page}/events") as stream:
        said = "".join(stream.iter_text())
    events = [block.split("\n") for block in said.strip().split("\n\n")]
    text = "".join(json.loads(block[2].removeprefix("data: ")) for block in events[:-1])
    assert text.startswith("began verify xattention")
    assert text.endswith("ended\n")
    assert json.loads(events[-1][1].removeprefix("data: "))["state"] == "done"
    last = events[-2][0].removeprefix("id: ")
    with working.stream("GET", f"{page}/events", headers={"Last-Event-ID": last}) as stream:
        assert "".join(stream.iter_text()).startswith("event: end")
    assert "refresh" not in working.get(page).text
    assert [found["state"] for found in working.get("/api/jobs").json()] == ["done"]


@pytest.mark.parametrize("path", ["/jobs", "/jobs/20260101-000000-abcdef/cancel", "/jobs/20260101-000000-abcdef/again"])
def test_nobody_else_can_start_or_cancel(working, jobs, path):
    assert working.post(path, data=FORM).status_code == 403
    assert "printed when it started" in working.post(path, data=FORM).text
    word = entered(working)
    assert working.post(path, data=FORM).status_code == 403  # no word
    assert working.post(path, data={**FORM, "word": "0" * 64}).status_code == 403
    good = {**FORM, "word": word}
    assert working.post(path, data=good, headers={"Origin": "http://evil.example"}).status_code == 403
    assert working.post(path, data=good, headers={"Origin": "null"}).status_code == 403
    assert working.post(path, data=good, headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert working.post(path, json=good).status_code == 403
    working.cookies.clear()
    working.cookies.set("assay_site", "x" * 32)
    assert working.post(path, data=good).status_code == 403
    assert jobs.all() == []


def test_a_wrong_token_opens_nothing(working):
    for token in ("", "x", TOKEN[:-1], TOKEN + "t", "\u00e4"):
        answer = working.get("/enter", params={"token": token})
        assert answer.status_code == 403
        assert "set-cookie" not in answer.headers
    assert 'name="word"' not in working.get("/jobs").text


def test_bad_forms_are_named(working, jobs):
    word = entered(working)
    for form, says in (
        ({"kind": "rm", "word": word}, "kind must be"),
        ({**FORM, "paper": "swin", "word": word}, "planned"),
        ({**FORM, "scale": "x" * 21_000, "word": word}, "at most"),
    ):
        answer = working.post("/jobs", data=form)
        assert answer.status_code == 400
        assert says in answer.text
    assert jobs.all() == []


def test_a_report_runs_nothing(working, jobs):
    job = let_end(jobs, jobs.start(("tune", "m", "-o", OUT)))
    assert working.get(f"/jobs/{job.id}/report").status_code == 404
    (jobs.folder / job.id / OUT).mkdir()
    (jobs.folder / job.id / OUT / REPORT).write_text("<p>fast<script>alert(1)</script>")
    answer = working.get(f"/jobs/{job.id}/report")
    assert answer.text.startswith("<p>fast")
    assert "sandbox" in answer.headers["content-security-policy"]
    assert f"/jobs/{job.id}/report" in working.get("/jobs").text


def test_what_a_command_says_is_escaped(working, jobs):
    job = jobs.start(("verify", "<script>"))
    let_end(jobs, job)
    (jobs.folder / job.id / LOG).write_bytes(b"<script>alert(1)</script> \xff\x00" + b"x" * 300_000)
    page = working.get(f"/jobs/{job.id}").text
    assert "<script>alert" not in page
    assert len(page) < 210_000


def test_without_work_there_are_no_such_pages(client):
    assert client.get("/jobs").status_code == 404
    assert "My work" not in client.get("/").text


def test_the_real_program(tmp_path):
    """A command that takes no time, through the process that is started for it."""
    jobs = Jobs(tmp_path / "jobs", tmp_path)
    job = jobs.start(("papers", "--family", "mixers"))
    wait_for(lambda: jobs.get(job.id).state != "running", seconds=120)
    assert (jobs.folder / job.id / CODE).read_text() == "0"
    assert "long_convs" in jobs.log(job.id)[0]
    bad = jobs.start(("papers", "--family", "nothing"))
    wait_for(lambda: jobs.get(bad.id).state != "running", seconds=120)
    assert jobs.get(bad.id).code == 2


def test_watched_in_a_browser(browser, shelf, jobs):
    import socket
    import threading

    import uvicorn
    from playwright.sync_api import expect

    app = create_app(shelf, searcher=Searcher(start=False), jobs=jobs, token=TOKEN)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    wait_for(lambda: server.started)
    context = browser.new_context()
    page = context.new_page()
    at = f"http://127.0.0.1:{listener.getsockname()[1]}"
    page.goto(f"{at}/enter?token={TOKEN}")
    page.get_by_label("Paper", exact=True).select_option("xattention")
    page.get_by_label("Scale", exact=True).select_option("smoke")
    page.get_by_role("button", name="Measure").click()
    page.wait_for_url("**/jobs/2*")
    expect(page.locator("#log")).to_contain_text("began verify xattention --scale smoke")
    [job] = jobs.all()
    (jobs.folder / job.id / "go").touch()
    expect(page.locator("#log")).to_contain_text("ended")
    expect(page.locator("#state")).to_have_text("done")
    page.get_by_role("button", name="Again").click()
    expect(page.locator("#state")).to_have_text("running")
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#state")).to_contain_text("cancelled")
    from axe_playwright_python.sync_playwright import Axe

    for path in ("/jobs", f"/jobs/{job.id}"):
        page.goto(at + path)
        assert [v["id"] for v in Axe().run(page).response["violations"]] == []
    context.close()
    server.should_exit = True
    thread.join(10)

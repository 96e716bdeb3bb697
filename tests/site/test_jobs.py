"""Work started from the pages: who may, what it says while it runs, that it can be cancelled and outlives the server."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import threading

import psutil
import pytest
from starlette.testclient import TestClient
from tests.site.conftest import wait_for

from assay.errors import InputError
from assay.site import job_pages
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
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def let_end(jobs, job):
    (jobs.folder / job.id / "go").touch()
    wait_for(lambda: jobs.get(job.id).state != "running")
    return jobs.get(job.id)


def test_a_job_runs_in_its_own_folder_and_leaves_its_code(jobs):
    job = jobs.start(("verify", "x"))
    assert job.state == "running"
    wait_for(lambda: "\n" in jobs.log(job.id)[0])
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


def test_one_that_is_cancelled_before_it_listens_is_cancelled(jobs):
    for _ in range(3):
        assert jobs.cancel(jobs.start(("verify", "x")).id).state == "cancelled"


def test_one_that_does_not_listen_is_killed(jobs):
    job = jobs.start(("verify", "deaf"))
    wait_for(lambda: "began" in jobs.log(job.id)[0])
    pid = json.loads((jobs.folder / job.id / JOB).read_text())["pid"]
    assert jobs.cancel(job.id).state == "cancelled"
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
    wait_for(lambda: "\n" in jobs.log(job.id)[0])
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


@pytest.mark.parametrize("name", ["verify", "xattention", "smoke", "tune", "ttft", "5", "out"])
def test_only_the_model_is_a_path_whatever_the_users_folder_holds(jobs, name):
    (jobs.user_folder / name).mkdir()
    for words in (
        ("verify", "xattention", "--scale", "smoke"),
        ("tune", "m", "--goal", "ttft", "--minutes", "5", "-o", OUT),
    ):
        job = jobs.start(words)
        wait_for(lambda job=job: "\n" in jobs.log(job.id)[0])
        assert f"began {' '.join(words)} {jobs.folder}" in jobs.log(job.id)[0]
        let_end(jobs, job)


def test_a_full_disk_starts_no_job_that_nobody_knows_of(jobs, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    real, started = jobs_module.subprocess.Popen, []
    monkeypatch.setattr(
        jobs_module.subprocess, "Popen", lambda *words, **how: started.append(real(*words, **how)) or started[-1]
    )
    monkeypatch.setattr(jobs_module, "atomic_file", full)
    with pytest.raises(OSError, match="No space left"):
        jobs.start(("verify", "x"))
    assert [child.poll() for child in started] == [-signal.SIGKILL]
    assert jobs.all() == []
    assert [path.name for path in jobs.folder.iterdir()] == [".lock"]
    monkeypatch.undo()


@pytest.mark.parametrize(
    "left", ["", "{", "[]", "{}", '{"words": [], "pid": 1, "born": 1, "began": "x"}', '{"words": 5, "pid": "x"}']
)
def test_what_a_full_disk_left_of_a_job_is_none(working, jobs, left):
    place = jobs.folder / "20260101-000000-abcdef"
    place.mkdir()
    (place / JOB).write_text(left)
    assert jobs.all() == []
    word = entered(working)
    for path in ("", "/report", "/events"):
        assert working.get(f"/jobs/{place.name}{path}").status_code == 404
    for path in ("/cancel", "/again"):
        assert working.post(f"/jobs/{place.name}{path}", data={"word": word}).status_code == 404
    assert working.get("/jobs").status_code == 200


def test_a_code_that_was_not_written_whole_is_none(jobs):
    job = let_end(jobs, jobs.start(("verify", "x")))
    (jobs.folder / job.id / CODE).write_text("")
    wait_for(lambda: jobs.get(job.id).state == "lost")


def test_a_letter_that_is_half_written_comes_whole(jobs):
    job = let_end(jobs, jobs.start(("verify", "x")))
    file = jobs.folder / job.id / LOG
    said, seen, start = "Größe × 2 \N{SNOWMAN}\n".encode(), "", 0
    for end in range(len(said) + 1):
        file.write_bytes(said[:end])
        text, start = jobs.log(job.id, start)
        seen += text
    assert seen == said.decode()
    file.write_bytes(b"\xff" + said)
    assert jobs.log(job.id)[0] == "\ufffd" + said.decode()


@pytest.mark.parametrize(
    ("slug", "scale", "says"),
    [("nothing", "small", "no paper"), ("flightllm", "small", "planned"), ("xattention", "huge", "scale must be"),
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
    assert working.post(path, json=good).status_code == 415
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
    tune = {"kind": "tune", "goal": "ttft", "minutes": "1", "max_drop": "0.01", "word": word}
    for form, status, says in (
        ({"kind": "rm", "word": word}, 400, "kind must be"),
        ({**FORM, "paper": "flightllm", "word": word}, 400, "planned"),
        ({**FORM, "scale": "x" * 21_000, "word": word}, 413, "at most"),
        ({**FORM, **{f"f{i}": "x" for i in range(40)}, "word": word}, 400, "no form"),
        ({**tune, "model": "~nosuchuser/model"}, 400, "no home folder is known"),
        ({**tune, "model": "x" * 1001}, 400, "model must be"),
        ({**tune, "model": "\u202emodel"}, 400, "model must be"),
        ({**tune, "model": "m", "minutes": "1e400"}, 400, "minutes must be"),
    ):
        answer = working.post("/jobs", data=form)
        assert answer.status_code == status, says
        assert says in answer.text
    for body in (b"word=%FF", b"\xff\xfe", b"&" * 15_000):
        kind = {"content-type": "application/x-www-form-urlencoded"}
        assert working.post("/jobs", content=body, headers=kind).status_code in (400, 403)
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


def test_a_page_shows_the_whole_log(working, jobs):
    """Without scripts it is all there is to see, and after the end with them too."""
    job = let_end(jobs, jobs.start(("verify", "x")))
    (jobs.folder / job.id / LOG).write_text("".join(f"[{i}/999] measured\n" for i in range(1000)) + "the end\n")
    assert "the end" in working.get(f"/jobs/{job.id}").text


def test_a_disk_that_is_full_is_said(working, jobs, monkeypatch):
    word = entered(working)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(jobs, "start", full)
    answer = working.post("/jobs", data={**FORM, "word": word})
    assert answer.status_code == 507
    assert "No space left on device" in answer.text


def test_two_servers_on_one_machine_do_not_take_each_others_cookies(shelf, jobs, tmp_path):
    """Browsers keep cookies by host, whatever the port."""
    other = Jobs(tmp_path / "other", tmp_path)
    tokens = {8080: TOKEN, 8081: "u" * 32}
    apps = {
        port: create_app(shelf, searcher=Searcher(start=False), jobs=held, token=tokens[port])
        for port, held in ((8080, jobs), (8081, other))
    }
    jar = {}
    clients = {
        port: TestClient(app, base_url=f"http://127.0.0.1:{port}", follow_redirects=False) for port, app in apps.items()
    }
    for port, client in clients.items():
        client.cookies.update(jar)
        client.get(f"/enter?token={tokens[port]}")
        jar.update(client.cookies.items())
    for client in clients.values():
        client.cookies.clear()
        for name, held in jar.items():
            client.cookies.set(name, held)
        assert 'name="word"' in client.get("/jobs").text
    word = clients[8081].get("/jobs").text.split('name="word" value="')[1].split('"')[0]
    assert clients[8080].post("/jobs", data={**FORM, "word": word}).status_code == 403


def served(shelf, jobs, **more):
    """The application on a port of its own, and what ends it."""
    import socket

    import uvicorn

    app = create_app(shelf, searcher=Searcher(start=False), jobs=jobs, token=TOKEN, **more)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    wait_for(lambda: server.started)

    def end():
        server.should_exit = True
        thread.join(20)
        return not thread.is_alive()

    return f"http://127.0.0.1:{listener.getsockname()[1]}", end


def test_a_server_that_ends_does_not_wait_for_those_who_watch(shelf, jobs):
    import httpx

    ending = threading.Event()
    at, end = served(shelf, jobs, ending=ending)
    job = jobs.start(("verify", "x"))
    with httpx.stream("GET", f"{at}/jobs/{job.id}/events", timeout=20) as stream:
        lines = stream.iter_lines()
        while not next(lines).startswith("event: log"):
            pass
        ending.set()
        assert end()
        assert "event: end" not in list(lines)  # the command goes on, and the page asks again
    assert jobs.get(job.id).state == "running"
    let_end(jobs, job)


def test_many_may_watch_and_too_many_are_sent_away(shelf, jobs, monkeypatch):
    import httpx

    monkeypatch.setattr(job_pages, "MOST_STREAMS", 12)
    at, end = served(shelf, jobs)
    job = jobs.start(("verify", "x"))
    events, begun, said = f"{at}/jobs/{job.id}/events", [], []

    def watch():
        with httpx.stream("GET", events, timeout=30) as stream:
            lines = stream.iter_lines()
            begun.append(next(lines))
            said.append("\n".join(lines))

    threads = [threading.Thread(target=watch, daemon=True) for _ in range(12)]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(begun) == 12)
    refused = httpx.get(events, timeout=10)
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
    assert httpx.get(f"{at}/jobs/{job.id}").status_code == 200
    let_end(jobs, job)
    for thread in threads:
        thread.join(20)
    assert len(said) == 12
    assert all("ended" in text and "event: end" in text for text in said)
    wait_for(lambda: httpx.get(events, timeout=10).status_code == 200)  # there is room again
    assert end()


def test_head_of_a_stream_does_not_wait_for_its_end(shelf, jobs):
    import httpx

    ending = threading.Event()
    at, end = served(shelf, jobs, ending=ending)
    job = jobs.start(("verify", "x"))
    answer = httpx.head(f"{at}/jobs/{job.id}/events", timeout=10)
    assert (answer.status_code, answer.content) == (200, b"")
    assert jobs.get(job.id).state == "running"
    let_end(jobs, job)
    ending.set()
    assert end()


def test_a_job_that_dies_is_said_to_those_who_watch(working, jobs):
    job = jobs.start(("verify", "x"))
    wait_for(lambda: "began" in jobs.log(job.id)[0])
    os.kill(json.loads((jobs.folder / job.id / JOB).read_text())["pid"], signal.SIGKILL)
    with working.stream("GET", f"/jobs/{job.id}/events") as stream:
        last = "".join(stream.iter_text()).strip().split("\n\n")[-1]
    assert json.loads(last.split("data: ")[1])["state"] == "lost"
    page = working.get(f"/jobs/{job.id}").text
    assert "ended without a word" in page
    assert "refresh" not in page


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
    from playwright.sync_api import expect

    at, end = served(shelf, jobs)
    context = browser.new_context()
    page = context.new_page()
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
    assert end()


def test_a_hidden_tab_lets_go_of_its_connection(browser, shelf, jobs):
    """A browser has six connections to a server: the seventh tab would get no page."""
    from playwright.sync_api import expect

    ending = threading.Event()
    at, end = served(shelf, jobs, ending=ending)
    job = jobs.start(("verify", "x"))
    context = browser.new_context()
    context.add_init_script(
        "window.seen = 'visible'; Object.defineProperty(document, 'hidden', {get: () => window.seen === 'hidden'});"
    )
    hide = "window.seen = 'hidden'; document.dispatchEvent(new Event('visibilitychange'))"
    show = "window.seen = 'visible'; document.dispatchEvent(new Event('visibilitychange'))"
    tabs = []
    for _ in range(9):
        page = context.new_page()
        page.goto(f"{at}/jobs/{job.id}", timeout=10_000)
        expect(page.locator("#log")).to_contain_text("began verify x")
        page.evaluate(hide)
        tabs.append(page)
    tabs[0].evaluate(show)
    (jobs.folder / job.id / "go").touch()
    expect(tabs[0].locator("#state")).to_have_text("done")
    assert tabs[0].locator("#log").inner_text().count("began") == 1
    expect(tabs[1].locator("#state")).to_have_text("running")
    tabs[1].evaluate(show)
    expect(tabs[1].locator("#state")).to_have_text("done")
    context.close()
    ending.set()
    assert end()

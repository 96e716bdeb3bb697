"""Work that is started from a page: each job is a command of assay in a process and a folder of its own, and outlives the server.

A job's folder holds what was asked (`job.json`), what the command said (`log`), and, once it has ended, its exit code (`code`). Nothing
else remembers jobs, so a server that starts again finds them as they are.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import filelock
import psutil

from assay import catalogue
from assay.checks import choice, number
from assay.errors import InputError
from assay.paths import atomic_file, data_dir
from assay.search_path import environment

JOB, LOG, CODE, OUT, REPORT = "job.json", "log", "code", "out", "report.html"
PROGRAM = Path(__file__)  # what runs in a job's process
KEPT = 100  # finished jobs, of which the oldest give way
TAIL = 200_000  # bytes of a log that a page shows
PATIENCE = 20.0  # seconds that a cancelled command has before it is killed
STATES = {
    "running": "running",
    "done": "done",
    "unmet": "done: the claim or the goal was not met",
    "cancelled": "cancelled; what was measured is kept",
    "failed": "failed",
    "lost": "ended without a word (killed, or the machine was restarted); started again, it goes on",
}
GOALS = ("ttft", "decode", "throughput", "memory", "energy")


@dataclass(frozen=True)
class Job:
    """A command that was started: its words, since when, and how it stands (one of `STATES`)."""

    id: str
    words: tuple[str, ...]
    began: str
    state: str
    code: int | None = None
    report: bool = False

    @property
    def command(self) -> str:
        return " ".join(("assay", *self.words))


def verify_words(slug: str, scale: str) -> tuple[str, ...]:
    """`assay verify`, checked. Raises InputError for a paper that does not exist or has no code, or another scale."""
    paper = catalogue.get(slug.split("/")[0])
    if "/" in slug:
        catalogue.get_claim(slug)
    if paper.status != "code":
        raise InputError(f"{slug} is planned: there is no code to measure")
    _checked(choice, "scale", scale, ("smoke", "small", "full"))
    return ("verify", slug, "--scale", scale, "--resume")


def tune_words(model: str, goal: str, minutes: str, max_drop: str) -> tuple[str, ...]:
    """`assay tune`, checked as far as it costs nothing; the output is put into the job's folder. Raises InputError."""
    if not model.strip() or model.startswith("-") or len(model) > 1000 or not model.isprintable():
        raise InputError(f"model must be a folder, a file or a name, got {model[:80]!r}")
    _checked(choice, "goal", goal, GOALS)
    try:
        wanted, drop = float(minutes), float(max_drop)
    except ValueError:
        raise InputError(f"minutes and max_drop must be numbers, got {minutes[:40]!r} and {max_drop[:40]!r}") from None
    _checked(number, "minutes", wanted, low=1, high=24 * 60)
    _checked(number, "max_drop", drop, low=0, below=1)
    return ("tune", model, "--goal", goal, "--minutes", f"{wanted:g}", "--max-drop", f"{drop:g}", "--resume", "-o", OUT)


def _checked(check: object, *given: object, **more: object) -> None:
    try:
        check(*given, **more)  # type: ignore[operator]
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from None


class Jobs:
    """The jobs under a folder (by default `jobs` in the data folder). One runs at a time: two would spoil each other's times."""

    def __init__(self, folder: Path | None = None, user_folder: Path | None = None) -> None:
        self.folder = folder or data_dir() / "jobs"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.user_folder = user_folder or Path.cwd()
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, words: tuple[str, ...]) -> Job:
        """Start a command. Raises InputError while another one runs."""
        with filelock.FileLock(self.folder / ".lock", timeout=30):
            running = [job for job in self.all() if job.state == "running"]
            if running:
                raise InputError(
                    f"{running[0].command} is running: two at a time would spoil each other's times; wait, or cancel it"
                )
            self._clear()
            now = datetime.now(UTC)
            id = f"{now:%Y%m%d-%H%M%S}-{now.microsecond:06x}"  # in the order of time
            place = self.folder / id
            place.mkdir()
            asked = [self._resolved(word) for word in words]
            with (place / LOG).open("wb") as log:
                child = subprocess.Popen(
                    [sys.executable, "-P", str(PROGRAM), str(place), *asked],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=place,
                    env=environment({**os.environ, "COLUMNS": "100", "PYTHONUNBUFFERED": "1"}),
                    start_new_session=True,  # it goes on when the server ends
                )
            self._children[id] = child
            born = psutil.Process(child.pid).create_time()
            facts = {
                "words": words,
                "began": datetime.now(UTC).isoformat(timespec="seconds"),
                "pid": child.pid,
                "born": born,
            }
            with atomic_file(place / JOB) as temporary:
                temporary.write_text(json.dumps(facts), encoding="utf-8")
        return self.get(id)

    def again(self, id: str) -> Job:
        """The same command once more; what it kept is not measured again."""
        old = self.get(id)
        job = self.start(old.words)
        kept = self.folder / id / OUT
        if old.words[0] == "tune" and kept.is_dir() and not (self.folder / job.id / OUT).exists():
            with contextlib.suppress(OSError):
                shutil.copytree(kept, self.folder / job.id / OUT)
        return job

    def get(self, id: str) -> Job:
        """The job of that id. Raises InputError when there is none."""
        place = self.folder / id
        if not re.fullmatch(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{6}", id) or not (place / JOB).is_file():
            raise InputError(f"no job has the id {id!r}")
        facts = json.loads((place / JOB).read_text(encoding="utf-8"))
        words = tuple(map(str, facts["words"]))
        report = (place / OUT / REPORT).is_file()
        file = place / CODE
        if file.is_file():
            code = int(file.read_text(encoding="utf-8"))
            state = {0: "done", 1: "unmet", 130: "cancelled"}.get(code, "failed")
            return Job(id, words, facts["began"], state, code, report)
        alive = self._alive(id, facts)
        return Job(id, words, facts["began"], "running" if alive else "lost", None, report)

    def all(self) -> list[Job]:
        """Every job, the newest first; a folder that is no job is passed over."""
        found = []
        for place in sorted(self.folder.iterdir(), reverse=True):
            with contextlib.suppress(InputError, OSError, ValueError, KeyError, TypeError):
                found.append(self.get(place.name))
        return found

    def log(self, id: str, start: int = 0) -> tuple[str, int]:
        """What the command said from byte `start` on, at most the last 200,000 bytes of it, and where that ends."""
        self.get(id)
        with (self.folder / id / LOG).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(min(start, size), size - TAIL))
            text = file.read()
        return text.decode("utf-8", "replace"), size

    def report(self, id: str) -> str:
        """The report of a tune run. Raises InputError when there is none (yet)."""
        if not self.get(id).report:
            raise InputError(f"no report was written by the job {id}")
        return (self.folder / id / OUT / REPORT).read_text(encoding="utf-8")

    def cancel(self, id: str) -> Job:
        """End a running command as Ctrl-C does, and by force if it has not ended after 20 s."""
        job = self.get(id)
        if job.state != "running":
            return job
        process = self._process(id)
        if process is not None:
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGINT)
                self._wait(id, process, PATIENCE)
            if self.get(id).state == "running":
                with contextlib.suppress(psutil.Error):
                    for child in process.children(recursive=True):
                        with contextlib.suppress(psutil.Error):
                            child.kill()
                    process.kill()
                    self._wait(id, process, PATIENCE)
        return self.get(id)

    def _resolved(self, word: str) -> str:
        """A path that means something in the user's folder, absolute, since the command runs in another."""
        if word.startswith("-") or word == OUT:
            return word
        path = self.user_folder / Path(word).expanduser()
        return str(path) if path.exists() else word

    def _facts(self, id: str) -> dict[str, object]:
        found: dict[str, object] = json.loads((self.folder / id / JOB).read_text(encoding="utf-8"))
        return found

    def _process(self, id: str) -> psutil.Process | None:
        facts = self._facts(id)
        try:
            process = psutil.Process(int(str(facts["pid"])))
            same = abs(process.create_time() - float(str(facts["born"]))) < 1
            return process if same else None  # else the number is another process's by now
        except psutil.Error:
            return None

    def _alive(self, id: str, facts: dict[str, object]) -> bool:
        child = self._children.get(id)
        if child is not None:
            return child.poll() is None
        process = self._process(id)
        with contextlib.suppress(psutil.Error):
            return process is not None and process.status() != psutil.STATUS_ZOMBIE
        return False

    def _wait(self, id: str, process: psutil.Process, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self._alive(id, self._facts(id)):
            time.sleep(0.1)

    def _clear(self) -> None:
        ended = [job for job in self.all() if job.state != "running"]
        for job in ended[KEPT:]:
            shutil.rmtree(self.folder / job.id, ignore_errors=True)


def as_json(job: Job) -> dict[str, object]:
    """A job for the API."""
    return {**asdict(job), "words": list(job.words), "command": job.command, "state_words": STATES[job.state]}


def run_here() -> None:
    """In the job's own process: run the command, and leave its exit code behind."""
    place = Path(sys.argv.pop(1))
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # ignored, if the server was started in the background of a script
    code: object = 70
    try:
        runpy.run_module("assay", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code or 0
    except KeyboardInterrupt:
        code = 130
    finally:
        with atomic_file(place / CODE) as temporary:
            temporary.write_text(str(code if isinstance(code, int) else 70), encoding="utf-8")


if __name__ == "__main__":
    run_here()

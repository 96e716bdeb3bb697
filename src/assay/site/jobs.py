"""Work that is started from a page: each job is a command of assay in a process and a folder of its own, and outlives the server.

A job's folder holds what was asked (`job.json`), what the command said (`log`), and, once it has ended, its exit code (`code`). Nothing
else remembers jobs, so a server that starts again finds them as they are.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import filelock
import psutil

from assay import catalogue
from assay.checks import choice, number
from assay.errors import InputError
from assay.paths import atomic_file, data_dir, expanded
from assay.search_path import environment

JOB, LOG, CODE, OUT, REPORT = "job.json", "log", "code", "out", "report.html"
PROGRAM = Path(__file__).with_name("job_process.py")  # what runs in a job's process
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
        self.folder.mkdir(parents=True, exist_ok=True)
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
            try:
                self._children[id] = self._started(place, words)
            except BaseException:  # a full disk, say: no job, rather than one that nobody knows of
                shutil.rmtree(place, ignore_errors=True)
                raise
        return self.get(id)

    def _started(self, place: Path, words: tuple[str, ...]) -> subprocess.Popen[bytes]:
        with (place / LOG).open("wb") as log:
            child = subprocess.Popen(
                [sys.executable, "-P", str(PROGRAM), str(place), *self._resolved(words)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=place,
                env=environment({**os.environ, "COLUMNS": "100", "PYTHONUNBUFFERED": "1"}),
                start_new_session=True,  # it goes on when the server ends
            )
        try:
            facts = {
                "words": words,
                "began": datetime.now(UTC).isoformat(timespec="seconds"),
                "pid": child.pid,
                "born": psutil.Process(child.pid).create_time(),
            }
            with atomic_file(place / JOB) as temporary:
                temporary.write_text(json.dumps(facts), encoding="utf-8")
        except BaseException:
            child.kill()
            child.wait()
            raise
        return child

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
        facts = self._facts(id)
        words, began = tuple(facts["words"]), str(facts["began"])
        report = (self.folder / id / OUT / REPORT).is_file()
        alive = self._alive(id)  # before its code: a command that ends in between has left one
        try:
            code = int((self.folder / id / CODE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return Job(id, words, began, "running" if alive else "lost", None, report)
        state = {0: "done", 1: "unmet", 130: "cancelled"}.get(code, "failed")
        return Job(id, words, began, state, code, report)

    def all(self) -> list[Job]:
        """Every job, the newest first; a folder that is no job is passed over."""
        found = []
        places = self.folder.iterdir() if self.folder.is_dir() else ()
        for place in sorted(places, reverse=True):
            with contextlib.suppress(InputError):
                found.append(self.get(place.name))
        return found

    def log(self, id: str, start: int = 0) -> tuple[str, int]:
        """What the command said from byte `start` on, at most the last 200,000 bytes of it, and where that ends.

        A letter of which only some bytes are written yet comes whole the next time.
        """
        self._facts(id)
        with (self.folder / id / LOG).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(min(start, size), size - TAIL))
            said = file.read()
            size = file.tell()
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text = decoder.decode(said)
        return text, size - len(decoder.getstate()[0])

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
        if self.get(id).state == "lost":  # it ended because of this, before it could leave a code or instead of it
            with atomic_file(self.folder / id / CODE) as temporary:
                temporary.write_text("130", encoding="utf-8")
        return self.get(id)

    def _resolved(self, words: tuple[str, ...]) -> tuple[str, ...]:
        """With the model, where it is a path that means something in the user's folder, absolute: the command runs in another."""
        if words[0] != "tune":
            return words
        path = self.user_folder / expanded(words[1], "model")
        try:
            there = path.exists()
        except OSError:  # too long for a path
            there = False
        return (words[0], str(path) if there else words[1], *words[2:])

    def _facts(self, id: str) -> dict[str, Any]:
        """What was asked, and the process. Raises InputError when there is no such job, or only what a full disk left of it."""
        if re.fullmatch(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{6}", id):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                found = json.loads((self.folder / id / JOB).read_text(encoding="utf-8"))
                pid, born = int(found["pid"]), float(found["born"])
                words = [str(word) for word in found["words"]]
                if words:
                    return {"words": words, "began": str(found["began"]), "pid": pid, "born": born}
        raise InputError(f"no job has the id {id!r}")

    def _process(self, id: str) -> psutil.Process | None:
        facts = self._facts(id)
        try:
            process = psutil.Process(facts["pid"])
            same = abs(process.create_time() - facts["born"]) < 1
            return process if same else None  # else the number is another process's by now
        except (psutil.Error, ValueError, OverflowError):
            return None

    def _alive(self, id: str) -> bool:
        child = self._children.get(id)
        if child is not None:
            return child.poll() is None
        process = self._process(id)
        with contextlib.suppress(psutil.Error):
            return process is not None and process.status() != psutil.STATUS_ZOMBIE
        return False

    def _wait(self, id: str, process: psutil.Process, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self._alive(id):
            time.sleep(0.1)

    def _clear(self) -> None:
        ended = [job for job in self.all() if job.state != "running"]
        for job in ended[KEPT:]:
            shutil.rmtree(self.folder / job.id, ignore_errors=True)


def as_json(job: Job) -> dict[str, object]:
    """A job for the API."""
    return {**asdict(job), "words": list(job.words), "command": job.command, "state_words": STATES[job.state]}

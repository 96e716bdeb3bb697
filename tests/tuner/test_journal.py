"""What `--resume` takes over and what it measures again, what a journal belongs to, and what Ctrl-C says."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from tuner_world import Children

from assay.errors import InputError
from assay.measure.isolate import ChildResult
from assay.tuner.journal import Journal, file_hash, identity, model_hash
from assay.tuner.tune import tune
from assay.tuner.work import Settings

HEAD = {"settings": {"goal": "ttft"}, "model": "m", "workload": "", "eval": "", "machine": "here", "assay": "1"}


def journal(path, head=HEAD, resume=True, max_drop=0.01, said=None):
    return Journal(path, head, resume, max_drop, (said if said is not None else []).append)


def test_a_line_cut_short_by_a_crash_is_measured_again(tmp_path):
    first = journal(tmp_path / "j", resume=False)
    first.get("a", lambda: {"x": 1})
    first.get("b", lambda: {"x": 2})
    text = (tmp_path / "j").read_text()
    (tmp_path / "j").write_text(text[:-5])
    again = journal(tmp_path / "j")
    assert again.taken == 1
    assert again.get("a", lambda: {"x": 9}) == {"x": 1}
    assert again.get("b", lambda: {"x": 9}) == {"x": 9}
    assert len((tmp_path / "j").read_text().splitlines()) == 3


@pytest.mark.parametrize("status", ["failed", "timeout", "out of memory", "begun"])
def test_what_failed_is_measured_again_and_what_succeeded_is_not(tmp_path, status):
    first = journal(tmp_path / "j", resume=False)
    first.add("dead", {"status": status})
    first.add("whole", {"status": "ok", "x": 1})
    first.add("short", {"complete": False})
    assert first.count() == 1
    again = journal(tmp_path / "j")
    assert again.get("dead", lambda: {"status": "ok", "x": 2})["x"] == 2
    assert again.get("whole", lambda: {"x": 3})["x"] == 1
    assert again.get("short", lambda: {"x": 4})["x"] == 4


def test_what_was_broken_off_for_a_smaller_allowed_loss_is_judged_again(tmp_path):
    first = journal(tmp_path / "j", resume=False)
    first.add("a", {"status": "ok", "hopeless_at": 0.01})
    assert "a" in journal(tmp_path / "j", max_drop=0.01).old
    assert "a" not in journal(tmp_path / "j", max_drop=0.1).old


@pytest.mark.parametrize("what", ["model", "workload", "eval", "machine", "assay"])
def test_a_journal_of_something_else_begins_anew_and_says_so(tmp_path, what):
    journal(tmp_path / "j", resume=False).add("a", {"x": 1})
    said = []
    again = journal(tmp_path / "j", HEAD | {what: "other"}, said=said)
    assert not again.old
    assert len(said) == 1
    assert what in said[0]
    assert "beginning anew" in said[0]
    with pytest.raises(InputError, match="other settings"):
        journal(tmp_path / "j", HEAD | {"settings": {"goal": "decode"}})


def test_the_content_of_a_model_counts_and_not_its_name_size_or_date(model, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(model, folder)
    before = model_hash(folder)
    assert before == model_hash(model)
    weights = folder / "model.safetensors"
    found = weights.stat()
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(found.st_atime_ns, found.st_mtime_ns))  # as a copying tool that keeps dates would
    assert weights.stat().st_size == found.st_size
    assert model_hash(folder) != before
    weights.write_bytes(weights.read_bytes()[:-1] + bytes([content[-1] ^ 1]))
    assert model_hash(folder) == before


def test_a_large_file_is_hashed_once_and_again_when_it_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("ASSAY_CACHE_DIR", str(tmp_path / "cache"))
    big = tmp_path / "big.safetensors"
    big.write_bytes(b"a" * (1 << 21))
    assert file_hash(big) == hashlib.sha256(b"a" * (1 << 21)).hexdigest()
    first = file_hash(big)
    (known,) = (tmp_path / "cache" / "hashes").iterdir()
    known.write_text("f" * 64)
    assert file_hash(big) == "f" * 64  # it was not read again
    known.write_text("cut short")
    assert file_hash(big) == first
    assert known.read_text() == first
    found = big.stat()
    big.write_bytes(b"b" * (1 << 21))
    os.utime(big, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert file_hash(big) != first


def test_a_small_file_is_read_every_time(tmp_path, monkeypatch):
    monkeypatch.setenv("ASSAY_CACHE_DIR", str(tmp_path / "cache"))
    small = tmp_path / "config.json"
    small.write_bytes(b"a" * 100)
    assert file_hash(small) == hashlib.sha256(b"a" * 100).hexdigest()
    assert not (tmp_path / "cache" / "hashes").exists()


def test_identity_knows_the_workload_by_its_content(model, tmp_path):
    work = tmp_path / "work.jsonl"
    work.write_text('{"prompt": "a"}\n')
    settings = Settings(str(model), "ttft", workload=str(work))
    before = identity(settings)
    work.write_text('{"prompt": "b"}\n')
    after = identity(settings)
    assert before["workload"] != after["workload"]
    assert {k: v for k, v in before.items() if k != "workload"} == {k: v for k, v in after.items() if k != "workload"}
    with pytest.raises(InputError, match="no such workload file"):
        identity(Settings(str(model), "ttft", workload=str(tmp_path / "none")))


def test_identity_knows_the_evaluation_by_its_content_and_a_task_by_its_name(model, tmp_path):
    file = tmp_path / "eval.jsonl"
    file.write_text('{"prompt": "a", "answers": ["b"]}\n')
    settings = Settings(str(model), "ttft", eval=str(file))
    before = identity(settings)
    file.write_text('{"prompt": "a", "answers": ["c"]}\n')
    assert before["eval"] != identity(settings)["eval"]
    assert identity(Settings(str(model), "ttft", eval="lm_eval:arc_easy"))["eval"] == ""
    assert before["settings"]["eval"] == str(file)


class Starved(Children):
    """Every candidate that holds xattention runs out of memory, when it is screened and when it is judged."""

    def __call__(self, target, kwargs, *, timeout_s, memory_bytes):
        held = kwargs.get("recipes", []) if target.endswith(":screen") else [kwargs.get("recipe", {})]
        if memory_bytes < 2**31 and any(s["transform"] == "xattention" for r in held for s in r.get("steps", [])):
            self.calls.append((target, "dead"))
            return ChildResult("out of memory", None, "used 9 GiB of 1 GiB", 1.0, 2**33, 1.0)
        return super().__call__(target, kwargs, timeout_s=timeout_s, memory_bytes=memory_bytes)


def test_resume_with_more_memory_finds_what_ran_out_of_it_before(world, model, tmp_path, monkeypatch):
    settings = Settings(str(model), "ttft", 64, 4)
    first = world(Starved())

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("assay.tuner.artefact.save", stop)
        with pytest.raises(KeyboardInterrupt, match=r"\d+ measurements are kept in .*\.out\.journal\.jsonl"):
            tune(settings, tmp_path / "out", minutes=5, memory_gib=1.0)
    second = world(Starved())
    outcome = tune(settings, tmp_path / "out", minutes=5, memory_gib=4.0, resume=True)
    assert "xattention" in [step.transform for step in outcome.best.recipe.steps]
    assert not any(status != "ok" for status in (row.status for row in outcome.rows))
    repeated = {call for call in set(first.calls) & set(second.calls) if call[0] == "assess"}
    assert not repeated


def test_a_changed_model_begins_anew(world, model, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(model, folder)
    settings = Settings(str(folder), "ttft", 64, 4)
    world(Children(die_after=3))
    with pytest.raises(KeyboardInterrupt):
        tune(settings, tmp_path / "out", minutes=5)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    second, said = world(Children()), []
    tune(settings, tmp_path / "out", minutes=5, resume=True, say=said.append)
    assert second.labels("survey")
    assert any("the model's files have changed" in line and "beginning anew" in line for line in said)


def hears_ctrl_c():
    """In a child before it starts: SIGINT counts, though whoever runs the tests ignores or blocks it, as a shell's background jobs do."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


@pytest.mark.parametrize("extra", [[], pytest.param(["--json"], marks=pytest.mark.slow)])
def test_ctrl_c_says_what_is_kept_and_the_command_that_goes_on(model, tmp_path, extra):
    command = [sys.executable, "-m", "assay", "tune", str(model), "--goal", "ttft", "--prompt-tokens", "64"]
    command += ["--max-drop", "0.02", "-o", str(tmp_path / "the out"), *extra]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=hears_ctrl_c)
    path = tmp_path / ".the out.journal.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not path.exists():
        time.sleep(0.05)
    time.sleep(0.5)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 130, err
    last = err.strip().splitlines()[-1]
    assert "measurements are kept in" in last
    assert str(path) in last
    goes_on = f"go on with: assay tune {model} --goal ttft --prompt-tokens 64 --max-drop 0.02 -o '{tmp_path}/the out'"
    assert goes_on in last
    assert last.endswith("--resume")
    assert path.exists()
    if extra:
        found = json.loads(out)
        assert found["exit_code"] == 130
        assert "--json --resume" in found["error"]

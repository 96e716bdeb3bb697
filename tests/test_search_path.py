"""Nothing beside the user's files is imported: every command, and all it starts, in a folder full of hostile modules."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import assay
from assay import search_path
from assay.measure.isolate import run_isolated
from tiny import write_tiny_llama

SOURCE = str(Path(assay.__file__).parents[1])
COMMAND = Path(sys.executable).with_name("assay")
OTHERS = """
    PIL aiosignal alembic assay benchmarks certifi click datasets diffusers fastapi filelock gguf grpc huggingface_hub jinja2 kernels
    matplotlib numpy optuna packaging pandas peft platformdirs psutil pydantic pynvml ray requests rich safetensors scipy sitecustomize
    sklearn sqlalchemy sympy tests tokenizers tomli_w torch torchvision tqdm transformers triton typer usercustomize uvicorn yaml
"""


def fill(folder: Path, without: tuple[str, ...] = ()) -> Path:
    """A module for every name that Python or assay might import; each leaves a mark when it is executed."""
    names = (set(sys.stdlib_module_names) | set(OTHERS.split())) - set(without)
    for name in names:
        mark = str(folder / f"RAN {name}")
        (folder / f"{name}.py").write_text(f"import _io\n_io.open({mark!r}, 'w').close()\nraise SystemExit(99)\n")
    return folder


def marks(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.glob("RAN *"))


@pytest.fixture
def hostile(tmp_path):
    folder = tmp_path / "hostile"
    folder.mkdir()
    return fill(folder)


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": SOURCE, **changes}


def command(folder: Path, *words: str, timeout: float = 250, **changes: str) -> subprocess.CompletedProcess[str]:
    start = [str(COMMAND)] if COMMAND.exists() else [sys.executable, "-P", "-m", "assay"]
    return subprocess.run(
        [*start, *words], cwd=folder, env=environment(**changes), capture_output=True, text=True, timeout=timeout
    )


def test_the_fixture_can_fail(hostile):
    """Without our care the current folder's modules do run: by `-m`, by `-c`, and by an empty entry of PYTHONPATH."""
    subprocess.run([sys.executable, "-c", "import random"], cwd=hostile, capture_output=True)
    assert marks(hostile) == ["RAN random"]


def test_the_current_folder_is_left_out_of_a_path(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to("here")
    monkeypatch.chdir(tmp_path / "here")
    here = str(tmp_path / "here")
    given = ["", "lib", ".", here, f"{here}/", f"{here}/../here", str(tmp_path / "link"), "/usr/lib/x", ".."]
    assert search_path.without_current_folder(given) == [f"{here}/lib", "/usr/lib/x", str(tmp_path)]


def test_the_folder_assay_comes_from_stays(monkeypatch):
    monkeypatch.chdir(SOURCE)
    assert search_path.without_current_folder(["", "/usr/lib/x"]) == [SOURCE, "/usr/lib/x"]


def test_a_deleted_folder_has_no_relative_entries(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert search_path.without_current_folder(["", "lib", "/usr/lib/x"]) == ["/usr/lib/x"]


def test_the_environment_of_what_is_started(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    safe = search_path.environment({"A": "b", "PYTHONPATH": f":/usr/lib/x:.:{tmp_path}:lib"})
    assert safe == {"A": "b", "PYTHONSAFEPATH": "1", "PYTHONPATH": f"/usr/lib/x:{tmp_path}/lib"}
    assert "PYTHONPATH" not in search_path.environment({"A": "b"})


def imports_much(file: str) -> dict[str, object]:
    """Run in a child: imports, and starts Python in three ways that would each look into the current folder."""
    import concurrent.futures
    import multiprocessing

    import numpy
    import psutil
    import yaml

    subprocess.run([sys.executable, "-c", "import random, json, http"], check=True)
    subprocess.run([sys.executable, "-m", "calendar"], check=True, stdout=subprocess.DEVNULL)
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        there = pool.submit(os.getcwd).result()
    return {
        "from": [module.__file__ for module in (numpy, psutil, yaml)],
        "text": Path(file).read_text(),
        "folders": [os.getcwd(), there],
        "path": sys.path,
    }


def test_a_child_imports_nothing_from_the_current_folder(hostile, monkeypatch):
    (hostile / "data.txt").write_text("relative paths still work")
    monkeypatch.chdir(hostile)
    monkeypatch.setenv("PYTHONPATH", f":.:{hostile}:{SOURCE}")
    monkeypatch.setattr(sys, "path", ["", ".", str(hostile), str(Path(__file__).parent), *sys.path])
    found = run_isolated(f"{__name__}:imports_much", {"file": "data.txt"}, timeout_s=100)
    assert found.ok, found.error + found.output
    assert found.value["text"] == "relative paths still work"
    assert found.value["folders"] == [str(hostile)] * 2
    assert all("hostile" not in where for where in [*found.value["from"], *found.value["path"]])
    assert marks(hostile) == []


def test_a_child_of_a_deleted_folder(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert run_isolated("math:sqrt", {}, timeout_s=60).error.startswith("TypeError")  # it was called at all


@pytest.mark.parametrize(
    "words",
    [
        ["papers"],
        ["paper", "xattention"],
        ["evidence", "list"],
        pytest.param(
            ["verify", "fp8_vs_int8/int8-not-worse-ptq", "--scale", "smoke"], marks=pytest.mark.slow
        ),  # one point: one child
    ],
    ids=" ".join,
)
def test_light_commands(hostile, words):
    done = command(hostile, *words)
    assert done.returncode == 0, done.stderr
    assert marks(hostile) == []


def test_python_m_assay(tmp_path):
    """`python -m` itself imports a few modules from the current folder, before anything of ours; from there on none is."""
    (tmp_path / "pythons_own").mkdir()
    trivial = "import sys; [print(name) for name in sys.modules]"
    (tmp_path / "pythons_own" / "trivial.py").write_text(trivial)
    own = subprocess.run(
        [sys.executable, "-m", "trivial"], cwd=tmp_path / "pythons_own", capture_output=True, text=True, check=True
    ).stdout.split()
    (tmp_path / "hostile").mkdir()
    folder = fill(tmp_path / "hostile", without=(*(name.split(".")[0] for name in own), "assay"))
    done = subprocess.run(
        [sys.executable, "-m", "assay", "paper", "xattention", "--json"],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["slug"] == "xattention"
    assert marks(folder) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["search", "long prompts"],
        ["doctor"],
        ["profile", "model", "--prompt-tokens", "16", "--new-tokens", "2", "--html", "page.html"],
        ["verify", "based/recall-gain", "attention_io", "prepacking", "--scale", "smoke"],
        ["verify", "functional_hashing/evaluations-saved", "--scale", "smoke", "--ray", "local"],
        ["tune", "model", "--goal", "ttft", "--prompt-tokens", "64", "--minutes", "1", "-o", "out"],
    ],
    ids=lambda words: " ".join(words[:2] + words[-2:]),
)
def test_every_command(hostile, words):
    write_tiny_llama(hostile / "model")
    done = command(hostile, *words, timeout=1200)
    assert done.returncode == 0, done.stderr
    assert "%|" not in done.stdout + done.stderr  # in a log no library shows its own progress bars
    assert marks(hostile) == []
    if words[0] == "tune":
        again = command(hostile, "apply", "model", "--recipe", "out/recipe.toml", "-o", "out2", timeout=600)
        assert again.returncode == 0, again.stderr
        assert marks(hostile) == []


@pytest.mark.slow
def test_the_server(hostile):
    write_tiny_llama(hostile / "model")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [str(COMMAND), "serve", "model", "--port", str(port)],
        cwd=hostile,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stderr is not None
        line = next((line for line in server.stderr if str(port) in line), "")
        assert "serving" in line
        time.sleep(5)
        assert server.poll() is None
    finally:
        server.send_signal(signal.SIGKILL)
        server.wait(30)
    assert marks(hostile) == []

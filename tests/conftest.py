"""Fixtures shared by all tests. Caches of the suite live where the user's do, so that the model is converted once."""

from __future__ import annotations

import copy
import os
import time
import zlib
from collections import Counter

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers share two cores, and tiny models run fastest on one thread

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def smollm2():
    """The bundled SmolLM2-135M in float32, for tests that are about the whole model. Take a `copy.deepcopy` before changing it."""
    from assay.workloads.models import load_model

    return load_model("smollm2-135m")


@pytest.fixture(scope="session")
def smollm2_slice(smollm2):
    """The first two layers of SmolLM2 with its embeddings, norm and tokenizer: real weights at a fifteenth of the time.

    Its text is poor but its tensors are real. Take a `copy.deepcopy` before changing it.
    """
    loaded = copy.copy(smollm2)
    model = copy.copy(smollm2.model)  # the whole model's own layers are shared, not copied
    model._modules = dict(model._modules)
    model.config = copy.deepcopy(model.config)
    model.config.num_hidden_layers = 2
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:2]
    model.model = copy.copy(model.model)
    model.model._modules = dict(model.model._modules)
    model.model.config = model.config
    model.model.layers = model.model.layers[:2]
    loaded.model = copy.deepcopy(model)
    for module in loaded.model.modules():  # attention reads its settings from its layer's config
        if hasattr(module, "config"):
            module.config = loaded.model.config
    return loaded


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny models run fastest on one thread; a test that needs more asks for them, and the next one has one again."""
    import torch

    torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Random numbers are the same whatever ran before: a test that draws without a seed of its own fails always or never."""
    import random

    import numpy as np
    import torch

    seed = zlib.crc32(item.nodeid.encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture(autouse=True)
def _own_data(tmp_path, monkeypatch):
    """No test writes into the user's evidence store."""
    monkeypatch.setenv("ASSAY_DATA_DIR", str(tmp_path / "assay-data"))
    monkeypatch.delenv("ASSAY_DATABASE_URL", raising=False)


# Proofs that have passed on the same sources are left out where that is asked for, and written down by `make test-proofs`: tests/proofs.py.

_left_out: set[str] = set()
_outcomes: dict[str, set[str]] = {}


def pytest_configure(config):
    worker = getattr(config, "workerinput", None)
    if worker is not None:  # of pytest-xdist: it leaves out what its head does
        _left_out.update(worker["proofs"])
        if int(worker["workerid"].removeprefix("gw")) % 2:
            _collect_backwards(config)
    elif config.getoption("--changed-proofs"):
        from tests import proofs

        _left_out.update(proofs.unchanged())


def _collect_backwards(config):
    """Let a worker import the test files from the last to the first, so that two meet in the middle: each takes from the cache what the
    other has compiled with its rewritten assertions, which is most of the time of collecting."""
    root = config.rootpath / "tests"
    if [config.invocation_params.dir / name for name in config.args] == [root]:
        files = sorted(root.rglob("test_*.py"), reverse=True)
        config.args = [str(file) for file in files if file.relative_to(config.rootpath).as_posix() not in _left_out]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.parts)  # pytest's own order, whichever way they were collected


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    node.workerinput["proofs"] = sorted(_left_out)


def pytest_ignore_collect(collection_path, config):
    if not collection_path.is_relative_to(config.rootpath):
        return None
    return collection_path.relative_to(config.rootpath).as_posix() in _left_out or None  # None: let others say


def pytest_report_header(config):
    return (
        f"{len(_left_out)} proofs have passed on these sources and are left out; `make test-proofs` tries them all"
        if _left_out
        else None
    )


def pytest_runtest_logreport(report):
    _outcomes.setdefault(report.nodeid.split("::", 1)[0], set()).add(report.outcome)


def _keep_proofs():
    from tests import proofs

    done = {name: seen for name, seen in _outcomes.items() if name.endswith("_proof.py")}
    failed = {name for name, seen in done.items() if seen != {"passed"}}  # what was skipped has shown nothing
    proofs.keep(done.keys() - failed, failed)


# What each room costs: processor seconds of its tests, their children included. `make test-times` prints them.

_seconds: Counter[str] = Counter()


def pytest_addoption(parser):
    parser.addoption("--room-times", action="store_true", help="print the processor seconds of test files and tests")
    parser.addoption(
        "--changed-proofs", action="store_true", help="leave out proofs that have passed on the same sources"
    )
    parser.addoption(
        "--keep-proofs", action="store_true", help="write down which proofs have passed, in tests/proofs.json"
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    before = _cpu()
    try:
        return (yield)
    finally:
        _seconds[item.nodeid] += _cpu() - before  # a shared fixture is booked where it is first asked for


def _cpu() -> float:
    used = os.times()
    return time.process_time() + used.children_user + used.children_system


def pytest_sessionfinish(session, exitstatus):
    output = getattr(session.config, "workeroutput", None)
    if output is not None:  # this is a worker of pytest-xdist
        output["seconds"] = dict(_seconds)
    elif session.config.getoption("--keep-proofs") and exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        _keep_proofs()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    _seconds.update(getattr(node, "workeroutput", {}).get("seconds", {}))


def pytest_terminal_summary(terminalreporter, config):
    if not config.getoption("--room-times"):
        return
    files: Counter[str] = Counter()
    for test, seconds in _seconds.items():
        files[test.split("::", 1)[0]] += seconds
    for title, counted in (
        ("processor seconds: costliest tests", _seconds.most_common(20)),
        ("processor seconds", files.most_common()),
    ):
        terminalreporter.section(title)
        for name, seconds in counted:
            terminalreporter.write_line(f"{seconds:8.1f}  {name}")
    terminalreporter.write_line(f"{sum(files.values()):8.1f}  in all; a room aims at 5")

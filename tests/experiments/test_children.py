"""What a living child computes is of this measurement."""

from __future__ import annotations

import subprocess
import sys

from assay.experiments import children
from assay.measure import clock
from assay.measure.clock import OthersWatch


def test_children_are_not_others():
    code = "import sys\nfor line in sys.stdin:\n    sum(range(10**7))\n    print(1, flush=True)"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    watches = (OthersWatch, children.ChildrenWatch)
    try:
        before = [watch._now()[2] for watch in watches]
        child.stdin.write("go\n")
        child.stdin.flush()
        child.stdout.readline()
        plain, ours = (watch._now()[2] - then for watch, then in zip(watches, before, strict=True))
    finally:
        child.kill()
        child.communicate()
    assert ours > plain + 0.02
    assert isinstance(children.ChildrenWatch().stop()[0], float)


def test_the_clock_is_told(monkeypatch):
    monkeypatch.setattr(clock, "OthersWatch", OthersWatch)  # put back afterwards
    children.count_children_as_ours()
    assert clock.OthersWatch is children.ChildrenWatch

"""The checked-in page of verdicts says what the checked-in evidence says."""

from __future__ import annotations

import json

from benchmarks.verdicts import FOLDER, page


def test_the_page_is_up_to_date():
    lines = (FOLDER / "claims.jsonl").read_text(encoding="utf-8").splitlines()
    assert (FOLDER / "README.md").read_text(encoding="utf-8") == page(lines)


def test_the_page_follows_the_figures():
    lines = (FOLDER / "claims.jsonl").read_text(encoding="utf-8").splitlines()
    speed = [line for line in lines if json.loads(line)["claim"] == "prepacking/prefill-speedup-padded"]
    slower = [json.loads(line) | {"measured": {"median": 0.5, "low": 0.4, "high": 0.6}} for line in speed]
    for line in slower:
        del line["id"], line["verdict"], line["reason"]  # they follow from the rest
    assert "| reproduced |" in page(speed)
    found = page([json.dumps(line) for line in slower])
    assert "| 0.5x (0.4 to 0.6) |" in found
    assert "| refuted here |" in found
    assert "reproduced |" not in found

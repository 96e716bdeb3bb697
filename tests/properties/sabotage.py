"""Does an experiment notice when its method is broken? Its verdict, the times granted.

`verdict_of` runs an experiment at one point in this process without timing anything: every arm counts as a thousand times slower
than the candidate, so that only quality, controls and training can stand in the way. A test breaks the method on purpose (a random
choice of equal shape and cost, through monkeypatch) and asserts that the verdict changes:

    honest = verdict_of("xattention/attention-speedup", POINT)
    monkeypatch.setattr(room, "select", random_blocks)
    assert verdict_of("xattention/attention-speedup", POINT) not in PAYS and honest in PAYS
"""

from __future__ import annotations

from typing import Any

import torch

from assay import catalogue
from assay.evidence import hashes
from assay.evidence.jobs import Job, Outcome
from assay.evidence.place import here
from assay.evidence.point import _figure, _judged
from assay.evidence.record import Evidence
from assay.evidence.runner import _evidence
from assay.evidence.types import AGAIN, Verdict
from assay.evidence.verdict import PAYS, judge
from assay.experiments import Trial, experiments_of

__all__ = ["PAYS", "record_of", "verdict_of"]


def record_of(claim: str, point: dict[str, Any], *, seed: int = 0) -> Evidence:
    """The record of one point, its times granted."""
    slug = claim.split("/")[0]
    found = next(found for found in experiments_of(slug) if found.claim == claim)
    torch.manual_seed(seed)
    made = found.run(**point)
    if isinstance(made, Trial):
        arms = ["baseline", AGAIN, *(arm for arm in ("free", "exact") if getattr(made, arm) is not None), *made.arms]
        granted = {arm: {"median": 1e3, "low": 1e3, "high": 1e3} for arm in arms} | {
            AGAIN: {"median": 1.0, "low": 0.99, "high": 1.01}
        }
        seen = {"kind": "trial", "ratios": granted, **_judged(made, found)}
    else:
        seen = _figure(made, found)
    seen["hashes"] = hashes.versions()
    module = found.run.__module__
    job = Job(claim, module, point, 0, "small", seed, (), 1.0, 1, decides=True)
    record = _evidence(job, catalogue.get_claim(claim), found, Outcome(here(), "ok", "", seen), "")
    assert record.status == "ok", record.error
    return record


def verdict_of(claim: str, point: dict[str, Any], *, seed: int = 0) -> Verdict:
    """The verdict on one point, its times granted."""
    return judge(record_of(claim, point, seed=seed)).verdict

"""Records for tests, with everything filled in that does not matter."""

from datetime import UTC, datetime, timedelta

from assay.evidence import hashes
from assay.evidence.record import Evidence
from assay.evidence.types import Estimate

START = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


def estimate(low, median=None, high=None):
    """A (low, median, high) estimate, exact when one number is given."""
    return Estimate(median=low if median is None else median, low=low, high=low if high is None else high)


QUALITY = {
    "metric": "top-1", "baseline": 0.9, "candidate": 0.9, "low": 0.899, "high": 0.901, "higher_is_better": True, "margin": 0.01,
    "controls": {"deleted": 0.5, "random": 0.6, "rival": 0.85},
}  # fmt: skip

OLD = {  # as assay 0.1 wrote it
    "schema_version": 1, "id": "0" * 32, "claim": "toy/speedup", "slug": "toy", "point": {"n": 1}, "index": 0, "scale": "small",
    "status": "ok", "error": "", "kind": "trial", "metric": "speed-up", "paper_value": 2.0, "paper_unit": "x", "higher_is_better": True,
    "unit": "x", "measured": {"median": 2.0, "low": 1.9, "high": 2.1}, "vs_free": {"median": 1.2, "low": 1.1, "high": 1.3},
    "free_label": "SDPA", "baseline": 2.0, "candidate": 1.0, "free": 1.2,
    "quality": {"metric": "top-1", "baseline": 0.9, "candidate": 0.9, "low": None, "high": None, "higher_is_better": True},
    "details": {}, "needs": [], "verdict": "reproduced", "reason": "so it was", "fingerprint": "f00d", "machine": {"cpu": "Old CPU"},
    "assay_version": "0.1.0", "commit": "", "seed": 0, "command": "assay verify toy", "load_before": 0.1, "load_after": 0.1,
    "noisy": False, "seconds": 1.0, "created": "2026-01-02T03:04:05Z",
}  # fmt: skip


def make(*, minutes=0, **changes):
    """An ok, fresh trial record that decides and pays, unless told otherwise. `vs_free` and `vs_exact` are ratios."""
    fields = {
        "claim": "toy/speedup",
        "point": {"n": 1},
        "decides": True,
        "scale": "small",
        "status": "ok",
        "metric": "speed-up",
        "paper_value": 2.0,
        "paper_unit": "x",
        "unit": "x",
        "measured": estimate(1.9, 2.0, 2.1),
        "quality": QUALITY,
        "fingerprint": "f00d",
        "machine": {"cpu": "Test CPU", "cores": 2, "threads": 2},
        "hashes": hashes.versions(),
        "assay_version": "0.1.0",
        "seed": 0,
        "command": "assay verify toy --scale small",
        "seconds": 1.5,
        "created": START + timedelta(minutes=minutes),
    } | changes
    fields.setdefault("slug", fields["claim"].split("/")[0])
    ratios = {arm: fields.pop(f"vs_{arm}") for arm in ("free", "exact") if f"vs_{arm}" in fields}
    if ratios:
        fields["ratios"] = ratios
    if fields["status"] != "ok":
        fields["measured"] = None
    return Evidence(**fields)

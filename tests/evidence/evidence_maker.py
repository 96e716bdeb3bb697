"""Records for tests, with everything filled in that does not matter."""

from datetime import UTC, datetime, timedelta

from assay.evidence.record import Evidence, changed
from assay.evidence.types import Estimate
from assay.evidence.verdict import judge

START = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


def estimate(low, median=None, high=None):
    """A (low, median, high) estimate, exact when one number is given."""
    return Estimate(median=low if median is None else median, low=low, high=low if high is None else high)


def make(*, judged=True, minutes=0, **changes):
    """An ok trial record unless told otherwise; judged by the rule when it can be."""
    fields = {
        "claim": "toy/speedup",
        "point": {"n": 1},
        "scale": "small",
        "status": "ok",
        "metric": "speed-up",
        "paper_value": 2.0,
        "paper_unit": "x",
        "unit": "x",
        "measured": estimate(1.9, 2.0, 2.1),
        "fingerprint": "f00d",
        "machine": {"cpu": "Test CPU", "cores": 2, "threads": 2},
        "assay_version": "0.1.0",
        "seed": 0,
        "command": "assay verify toy --scale small",
        "seconds": 1.5,
        "created": START + timedelta(minutes=minutes),
    } | changes
    fields.setdefault("slug", fields["claim"].split("/")[0])
    if fields["status"] != "ok":
        fields["measured"] = None
    record = Evidence(**fields)
    if judged and record.status == "ok" and record.verdict is None:
        judgement = judge(record)
        record = changed(record, verdict=judgement.verdict, reason=judgement.reason)
    return record

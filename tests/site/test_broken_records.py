"""Records from elsewhere may hold anything that the schema allows: pages stay whole, small and well-formed, and say what is wrong."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import HealthCheck, given, settings
from starlette.testclient import TestClient
from tests.evidence.damaged_records import insert, mutated
from tests.evidence.evidence_maker import QUALITY, estimate, make
from tests.site.conftest import CLAIM, HERE

from assay.evidence import shipped
from assay.evidence.reading import Reading
from assay.evidence.store import Store
from assay.evidence.types import Estimate
from assay.site.app import Searcher, create_app
from assay.site.charts import bar
from assay.site.export import export
from assay.site.library import Shelf

PAGES = ("/", "/?machine=like-mine", "/papers/xattention", "/papers/xattention?against=free", "/papers/xattention?against=exact",
         "/compare", "/compare?against=paper", "/compare.csv", "/compare.svg", "/machines", "/api/records", "/api/papers",
         "/api/papers/xattention", "/api/compare?against=paper", "/api/machines", "/compare?older=1",
         "/recipes", "/api/recipes")  # fmt: skip

STRANGE = {
    "cores as text": {"machine": {"cores": "many", "flags": ["avx2"]}},
    "no cores": {"machine": {"cores": None, "flags": ["avx2", "fma"]}},
    "no flags": {"machine": {"flags": None, "versions": []}},
    "flags of flags": {"machine": {"flags": [{}, []]}},
    "huge memory": {"machine": {"ram_bytes": 10**400, "cores": 10**30}},
    "large and alike": {
        "measured": estimate(1e20),
        "form": "bound",
        "paper_value": 1e20,
        "paper_unit": "tokens",
        "unit": "tokens",
    },
    "large and far apart": {"measured": Estimate(low=-1e308, median=0, high=1e308), "form": "bound"},
    "everything saved": {"form": "saved", "measured": estimate(90, 100, 100), "unit": "%"},
    "a level of 1e308": {"form": "level", "baseline": 1e308, "measured": estimate(-1e308)},
    "quality of 1e308": {"quality": {**QUALITY, "baseline": 1e308, "candidate": -1e308, "low": None, "high": None}},
    "quality of nearly nothing": {"quality": {**QUALITY, "baseline": 1e-320, "candidate": 1e308}},
    "thousands of arms": {"kind": "figure", "arms": {f"arm {i}" * 5: 1e9 for i in range(5000)}},
    "a long error": {"status": "failed", "error": "x" * 1_000_000},
    "control characters": {"command": "\x00\x1b[31m\u202eevil", "unit": "\x01x", "free_label": "\u202e</title>\x07"},
    "the first of years": {"created": "0001-01-01T00:00:00Z"},
    "of no paper": {"claim": "nosuch/thing"},
}
REFUSED = {
    "a negative factor": ({"paper_value": -2.0}, "no verdict can be computed"),
    "a negative bound": ({"form": "bound", "paper_value": -2.0}, "no verdict can be computed"),
    "a bound of 1e308": ({"form": "bound", "paper_value": 1e308}, "no verdict can be computed"),
    "a ratio of nothing": ({"ratios": {"x": estimate(0.0)}}, "no verdict can be computed"),
    "a path": ({"fingerprint": "../../../evil"}, "fingerprint must be"),
    "no fingerprint": ({"fingerprint": ""}, "fingerprint must be"),
    "an odd fingerprint": ({"fingerprint": "a b?c#d%2F.e\"'<"}, "fingerprint must be"),
    "a long fingerprint": ({"fingerprint": "f" * 5000}, "fingerprint must be"),
}


def opened(store, changes):
    """The shelf of a record of another machine beside a good one of this machine, and a client that raises what the server does."""
    strange = make(**{"claim": CLAIM, "fingerprint": "bad", **changes})
    store.add([strange, make(claim=CLAIM, fingerprint="mine", machine=HERE)])
    shelf = Shelf(str(store._url), here="mine", machine=HERE)
    client = TestClient(create_app(shelf, searcher=Searcher(start=False)), base_url="http://localhost")
    return strange, shelf, client


@pytest.mark.parametrize("changes", STRANGE.values(), ids=STRANGE)
def test_strange_records_break_no_page(store, changes):
    strange, shelf, client = opened(store, changes)
    for path in (*PAGES, "/machines/bad", f"/records/{strange.id}", f"/api/records/{strange.id}"):
        answer = client.get(path)
        assert answer.status_code == 200, path
        if not path.startswith(("/api", "/records")):
            assert len(answer.content) < 300_000, path
        if path.endswith(".svg"):
            assert "nan" not in answer.text
            ElementTree.fromstring(answer.content)
        if path.startswith("/api"):
            json.loads(answer.content, parse_constant=pytest.fail)
    assert not shelf.library().damaged
    assert "reproduced" in client.get("/").text
    shelf.close()


@pytest.mark.parametrize(("changes", "why"), REFUSED.values(), ids=REFUSED)
def test_records_that_cannot_be_shown_are_named_and_the_others_stay(store, changes, why, tmp_path):
    strange, shelf, client = opened(store, changes)
    for path in PAGES:
        assert client.get(path).status_code == 200, path
    [row] = shelf.library().damaged
    assert why in row.why
    assert len(row.why) < 400
    assert "1 damaged record is left out" in client.get("/").text
    assert client.get(f"/records/{strange.id}").status_code == 404
    assert [seen.summary.fingerprint for seen in shelf.library().of(CLAIM)] == ["mine"]
    shelf.close()


def test_no_record_writes_outside_of_the_export(store, tmp_path):
    _, shelf, _ = opened(store, {"fingerprint": "../../escaped", "machine": {"cores": "x", "flags": None}})
    export(shelf.library(), tmp_path / "deep" / "site")
    assert not list(tmp_path.rglob("escaped*"))
    shelf.close()


def test_pictures_hold_what_xml_allows_and_no_mark_that_turns_text_about():
    drawing = bar(make(unit="\x01\u202ex", form="bound", paper_value=2.0))
    ElementTree.fromstring(drawing)
    assert "\u202e" not in drawing


def test_pages_show_hidden_characters_and_the_record_keeps_them(store):
    strange, shelf, client = opened(store, {"command": "assay\x1b[2J verify \u202elmth.evil"})
    page = client.get(f"/records/{strange.id}").text
    assert "\u202e" not in page
    assert "\x1b" not in page
    assert "assay\ufffd[2J verify \ufffdlmth.evil" in page
    assert client.get(f"/api/records/{strange.id}").json()["command"] == strange.command
    shelf.close()


def test_infinite_gains_are_null_in_json(store):
    _, shelf, client = opened(store, {"form": "saved", "measured": estimate(100), "unit": "%"})
    claim = client.get(f"/api/claims/{CLAIM}").json()
    assert {seen["machine"]: seen["gain"] for seen in claim["seen"]} == {"bad": None, "mine": 2.0}
    shelf.close()


def test_a_claim_that_the_catalogue_lacks_is_no_link_to_nowhere(store):
    strange, shelf, client = opened(store, {"claim": "nosuch/thing"})
    for path in ("/machines/bad", f"/records/{strange.id}"):
        text = client.get(path).text
        assert "nosuch" in text
        assert "/papers/nosuch" not in text
    shelf.close()


def test_a_thousand_runs_are_a_page_of_ordinary_size(store):
    runs = [
        make(claim=CLAIM, fingerprint="mine", machine=HERE, minutes=i, point={"n": i % 500}, index=i)
        for i in range(1000)
    ]
    store.add(runs)
    shelf = Shelf(str(store._url), here="mine", machine=HERE)
    client = TestClient(create_app(shelf, searcher=Searcher(start=False)), base_url="http://localhost")
    answer = client.get("/papers/xattention")
    assert len(answer.content) < 100_000
    assert "are listed here" in answer.text
    shelf.close()


def test_facts_of_a_machine_come_from_the_first_record_that_has_some(store):
    store.add(
        [
            make(claim=CLAIM, fingerprint="new", machine={}),
            make(claim=CLAIM, fingerprint="new", machine=HERE, minutes=1),
        ]
    )
    shelf = Shelf(str(store._url), here="mine", machine=HERE)
    assert shelf.library().machines["new"] == HERE
    shelf.close()


@given(text=mutated())
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
def test_whatever_a_record_holds_every_page_is_whole(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("store")
    with Store(f"sqlite:///{folder / 'e.db'}") as store, pytest.MonkeyPatch.context() as patch:
        patch.setattr(shipped, "read", lambda *_, **__: Reading())
        insert(store, text)
        store.add([make(claim=CLAIM, fingerprint="mine", machine=HERE)])
        shelf = Shelf(str(store._url), here="mine", machine=HERE)
        client = TestClient(create_app(shelf, searcher=Searcher(start=False)), base_url="http://localhost")
        library = shelf.library()
        assert len(library.damaged) + len(library.records) == 2
        for path in (
            "/",
            "/papers/xattention",
            "/compare?against=paper",
            "/machines",
            "/feed.atom",
            "/api/records",
            "/api/papers",
        ):
            assert client.get(path).status_code == 200, path
        for id in library.records:
            assert client.get(f"/records/{id}").status_code == 200
        for name in library.machines:
            assert client.get(f"/machines/{name}").status_code == 200
        shelf.close()

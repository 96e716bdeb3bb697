"""What a stranger tries: every address with every odd value, in every place; nothing breaks, nothing leaks, nothing is set."""

from __future__ import annotations

import re
from urllib.parse import quote

import pytest
from starlette.testclient import TestClient
from tests.evidence.evidence_maker import make
from tests.site.conftest import CLAIM, HERE

from assay.site.app import Searcher, create_app
from assay.site.jobs import Jobs
from assay.site.library import Shelf

TOKEN = "t" * 32
ODD = (
    "../../../../etc/passwd", "..%2f..%2f..%2fetc%2fpasswd", "%2e%2e/%2e%2e/", "/etc/passwd", "\x00", "a\x00b", "\r\nSet-Cookie: a=b",
    "\u202e", "\ud800",
    "%ff%fe", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "'; DROP TABLE assay_evidence; --", "<script>alert(1)</script>", "{{7*7}}", "{%raw%}", "x" * 3000, "-1",
    "9" * 5000, "NaN", "true", "", " ", "*", "?", "#", "&", "=", ";", "javascript:alert(1)", "//evil.example", "\\\\evil\\share",
)  # fmt: skip
PARAMETERS = (
    "q",
    "family",
    "saves",
    "verdict",
    "machine",
    "model",
    "against",
    "limit",
    "offset",
    "claim",
    "paper",
    "token",
    "unknown",
)


EVERY = pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)], ids=["a third", "all"])
"""A third of the values at each place, another third at the next: each place meets many, and each value every kind of place."""


@pytest.fixture
def open_to_all(shelf, tmp_path):
    app = create_app(shelf, searcher=Searcher(start=False), jobs=Jobs(tmp_path / "jobs", tmp_path), token=TOKEN)
    return app, TestClient(app, base_url="http://localhost", follow_redirects=False)


def asked(value):
    """A value as it stands in an address; half of a surrogate pair as its bytes."""
    return quote(value, safe="%", errors="surrogatepass")


def addresses(app):
    """Every path that can be read, with a hole in each of its places at a time."""
    for route in app.routes:
        path, methods = route.path, getattr(route, "methods", None)
        if methods is None or "GET" not in methods:
            continue
        names = re.findall(r"\{(\w+)(?::\w+)?\}", path)
        for hole in names or [None]:
            filled = path
            for name in names:
                good = {"slug": "xattention", "what": "attention-speedup"}.get(name, "mine")
                filled = re.sub(r"\{" + name + r"(?::\w+)?\}", "@" if name == hole else good, filled)
            yield filled


def harmless(answer, path):
    assert answer.status_code < 500, path
    assert "set-cookie" not in answer.headers, path
    assert "root:x:0" not in answer.text, path
    assert "Traceback" not in answer.text, path
    if answer.headers.get("content-type") != "application/json":  # which runs nothing, and nobody may guess otherwise
        assert "<script>alert" not in answer.text, path
    assert answer.status_code == 421 or answer.headers["x-content-type-options"] == "nosniff", path
    assert len(answer.content) < 1_000_000, path
    if answer.status_code != 421:
        assert "default-src 'none'" in answer.headers["content-security-policy"], path
    where = answer.headers.get("location", "/")
    assert where.startswith(("/", "http://localhost/")), path
    assert not where.startswith(("//", "/\\")), path


@EVERY
def test_odd_values_in_every_place_of_every_address(open_to_all, every):
    app, client = open_to_all
    found = sorted(set(addresses(app)))
    assert {
        "/papers/@",
        "/papers/@.bib",
        "/claims/@/attention-speedup",
        "/records/@",
        "/jobs/@/events",
        "/api/records/@",
    } <= set(found)
    for place, path in enumerate(path for path in found if "@" in path):
        for value in ODD[place % every :: every]:
            full = path.replace("@", asked(value))
            harmless(client.get(full), full)


@EVERY
@pytest.mark.parametrize(
    "path", ["/", "/compare", "/compare.csv", "/compare.svg", f"/charts/{CLAIM}.svg", "/papers/xattention", "/api/papers",
             "/api/papers/xattention", "/api/records", "/api/compare", "/api/jobs", "/jobs", "/enter", "/feed.atom", "/audit", "/guide"]
)  # fmt: skip
def test_odd_values_in_every_parameter(open_to_all, path, every):
    app, client = open_to_all
    routes = [
        route for route in app.routes if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", getattr(route, "path", "-")), path)
    ]
    known = {field.name for route in routes if "GET" in route.methods for field in route.dependant.query_params}
    for place, name in enumerate(PARAMETERS, len(path)):
        for value in ODD[place % every :: every] if name in known or path == "/" else ODD[:2]:
            full = f"{path}?{name}={asked(value)}"
            harmless(client.get(full), full)
    for question in (
        "&".join(f"a{i}=1" for i in range(3000)),
        "q=1&q=2&family=&family=x",
        "=",
        "&&&",
        "%",
        "q[]=1",
        "a" * 30_000,
    ):
        harmless(client.get(f"{path}?{question}"), question[:40])


@EVERY
@pytest.mark.parametrize(
    "path", ["/audit", "/jobs", "/jobs/20260101-000000-abcdef/cancel", "/jobs/20260101-000000-abcdef/again"]
)
def test_odd_values_in_every_field(open_to_all, path, every):
    _, client = open_to_all
    client.get(f"/enter?token={TOKEN}")
    word = client.get("/jobs").text.split('name="word" value="')[1].split('"')[0]
    fields = (
        "word",
        "kind",
        "paper",
        "scale",
        "model",
        "goal",
        "minutes",
        "max_drop",
        "samples",
        "before",
        "after",
        "paired",
    )
    good = {"kind": "tune", "model": "m", "goal": "none", "minutes": "1", "max_drop": "0.01", "samples": "a,b\n1,2\n"}
    for kind in ("tune", "verify"):  # neither form is whole: nothing is started
        for name in fields:
            for value in ODD[(fields.index(name) + len(path + kind)) % (3 * every) :: 3 * every]:
                given = {**good, "kind": kind, "word": word, name: value}
                body = "&".join(f"{key}={asked(held)}" for key, held in given.items())
                answer = client.post(
                    path, content=body.encode(), headers={"content-type": "application/x-www-form-urlencoded"}
                )
                harmless(answer, (name, value))
                assert answer.status_code != 303
    assert client.get("/api/jobs").json() == []


@pytest.mark.parametrize(
    "header",
    [
        {"Host": "localhost:99999"}, {"Host": "[::1"}, {"Host": "localhost, evil"}, {"Host": "127.0.0.1@evil.example"}, {"Host": "\xff"},
        {"Cookie": "assay_site=\xff\xfe; =; ;;"}, {"Cookie": "a=b; " * 500}, {"If-None-Match": "\xff"}, {"Last-Event-ID": "\xb2"},
        {"HX-Request": "<script>"}, {"X-Forwarded-Host": "evil.example"}, {"X-Forwarded-Prefix": "//evil.example"},
        {"Accept-Encoding": "\xff"}, {"Range": "bytes=0-"}, {"Content-Length": "5"}, {"Origin": "\xff"},
        {"Sec-Fetch-Site": "\xff"}, {"Referer": "javascript:x"},
    ],
    ids=str,
)  # fmt: skip
def test_odd_headers(open_to_all, header):
    _, client = open_to_all
    encoded = {name: value.encode("latin-1") for name, value in header.items()}
    for path in ("/", "/papers/xattention", f"/claims/{CLAIM}", "/jobs", "/feed.atom", "/api/papers"):
        answer = client.get(path, headers=encoded)
        harmless(answer, path)
        assert "evil.example" not in answer.text


def test_a_token_is_not_found_by_guessing_nor_shown(open_to_all):
    """Nothing that can be read holds it, and what is nearly right is wrong."""
    app, client = open_to_all
    for path in sorted(set(addresses(app))):
        if "@" not in path:
            answer = client.get(path)
            assert TOKEN not in answer.text + str(answer.headers)
            assert 'name="word"' not in answer.text
    for guess in (TOKEN[:-1], TOKEN + "\x00", TOKEN.upper(), f" {TOKEN}", f"{TOKEN}&token={'x' * 32}", "t" * 31 + "ｔ"):
        answer = client.get(f"/enter?token={asked(guess) if '&' not in guess else guess}")
        assert answer.status_code == 403
        assert "set-cookie" not in answer.headers
    from assay.site.job_pages import word_of

    for token in (word_of(TOKEN), "", "x" * 32):
        client.cookies.set("assay_site", token)
        assert (
            client.post(
                "/jobs", data={"kind": "verify", "paper": "xattention", "scale": "smoke", "word": word_of(TOKEN)}
            ).status_code
            == 403
        )


def test_a_claim_of_others_leads_nowhere_else(store):
    """A record's claim, point and machine stand in addresses, titles and the feed."""
    evil = "xattention/../../x?<script>alert(1)</script>\"'&#\r\n//evil.example"
    store.add(
        [
            make(claim=evil, fingerprint="bad", machine={"cpu": evil}, point={evil: evil}),
            make(claim=CLAIM, fingerprint="mine", machine=HERE),
        ]
    )
    shelf = Shelf(str(store._url), here="mine", machine=HERE)
    client = TestClient(
        create_app(shelf, searcher=Searcher(start=False)), base_url="http://localhost", follow_redirects=False
    )
    [id] = [id for id, (record, _) in shelf.library().records.items() if record.fingerprint == "bad"]
    for path in (
        "/",
        "/papers/xattention",
        "/machines",
        "/machines/bad",
        f"/records/{id}",
        "/feed.atom",
        "/compare.csv",
        "/api/records",
    ):
        answer = client.get(path)
        harmless(answer, path)
        assert not re.search(r'href="(https?:)?//evil|href="[^"]*\.\./', answer.text)
    shelf.close()

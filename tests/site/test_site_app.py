"""The web side: addresses, headers, caching, and what may be asked."""

from __future__ import annotations

import re

import pytest
from sqlalchemy import event
from tests.evidence.evidence_maker import estimate, make
from tests.evidence.tuned_maker import run
from tests.site.conftest import CLAIM, HERE

from assay import catalogue
from assay.evidence.types import Verdict
from assay.site.app import Searcher, create_app
from assay.site.comparison import SHOWN
from assay.site.library import Shelf
from assay.site.pages import MEANINGS
from assay.site.views import CHIPS

PAGES = (
    "/", "/?family=attention&verdict=reproduced", "/?q=sparse+attention", "/papers/xattention", "/papers/xattention?against=free",
    "/papers/swin", "/compare", "/compare?against=paper&machine=like-mine", "/recipes", "/machines", "/machines/mine", "/audit", "/guide",
    "/guide/measuring", "/guide/command-verify",
)  # fmt: skip
DATA = ("/api/papers", "/api/papers/xattention", f"/api/claims/{CLAIM}", "/api/records", "/api/machines", "/api/compare", "/compare.csv",
        "/api/recipes",
        "/compare.svg", f"/charts/{CLAIM}.svg", "/papers/xattention.bib", "/api/openapi.json")  # fmt: skip


@pytest.mark.parametrize("path", PAGES + DATA)
def test_answers_are_safe_and_cacheable(standing, path):
    answer = standing.get(path)
    assert answer.status_code == 200
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    if path == "/api/openapi.json":
        return
    tag = answer.headers["etag"]
    again = standing.get(path, headers={"If-None-Match": f'"other", W/{tag}'})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert standing.get(path, headers={"If-None-Match": '"other"'}).status_code == 200


@pytest.mark.parametrize("path", PAGES)
def test_pages_hold_nothing_that_the_policy_forbids(standing, path):
    text = standing.get(path).text
    assert "script-src 'self'" in standing.get(path).headers["content-security-policy"]
    assert not re.search(r"<script(?![^>]*\ssrc=)", text)
    assert not re.search(r"\son[a-z]+\s*=|\sstyle\s*=|javascript:", text)
    assert not re.search(
        r'(?:src|href)="https?://(?!arxiv\.org/abs/|github\.com/)', re.sub(r'(?s)<article class="text">.*', "", text)
    )


def test_what_records_hold_is_escaped(standing):
    page = standing.get("/papers/svg2").text
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "<b>fast</b>" not in standing.get("/machines").text


def test_the_etag_changes_with_the_records(client, store):
    before = client.get("/papers/xattention").headers["etag"]
    store.add([make(claim=CLAIM, fingerprint="mine", machine=HERE, measured=estimate(5, 6, 7), minutes=30)])
    assert client.get("/papers/xattention").headers["etag"] != before


@pytest.mark.parametrize(
    ("path", "status", "says"),
    [
        ("/papers/xatention", 404, "did you mean xattention"),
        ("/papers/xattention?against=me", 400, "against must be one of"),
        ("/claims/xattention/nothing", 404, "no claim is called"),
        ("/records/feed", 404, "no record has the id"),
        ("/machines/nobody", 404, "no machine is called"),
        ("/guide/nothing", 404, "has no page"),
        ("/nothing", 404, "Not Found"),
        ("/?family=x", 400, "family must be one of"),
        ("/compare?machine=x", 400, "machine must be"),
        ("/compare?colour=red", 400, "no parameter"),
        ("/compare?recipe=x", 400, "recipe must be"),
        ("/compare?family=attention&family=mixers", 400, "family may be given once"),
        ("/api/compare?paper=nobody", 400, "paper must be"),
        ("/recipes/nobody", 404, "no run of"),
        ("/recipes/nobody.toml", 404, "no run of"),
        ("/api/recipes/nobody", 404, "no run of"),
        ("/charts/swin/imagenet-top1.svg", 404, "no"),
        ("/api/records?limit=0", 422, "limit"),
        ("/api/records?limit=1001", 422, "limit"),
        ("/api/papers/x%00y", 404, "no paper is called"),
        ("/static/../app.py", 404, "Not Found"),
        ("/static/%2e%2e/app.py", 404, "Not Found"),
    ],
)
def test_what_does_not_exist_is_named(standing, path, status, says):
    answer = standing.get(path)
    assert answer.status_code == status
    text = answer.json()["error"] if path.startswith("/api/") else answer.text
    assert says in text


def test_nothing_can_be_sent(standing):
    for path in ("/", "/papers/xattention", "/api/papers", "/audit"):
        for method in ("POST", "PUT", "DELETE", "PATCH"):
            if (path, method) != ("/audit", "POST"):  # which answers, and changes nothing
                assert standing.request(method, path).status_code == 405


FIGURE = "before,after\n" + "".join(f"{2 + i % 3 / 50},{1 + i % 4 / 70}\n" for i in range(8))


def test_audit_answers_what_was_pasted_and_keeps_nothing(client, shelf):
    before = client.get("/audit").headers["etag"]
    asked = []
    event.listen(shelf._store._engine, "before_cursor_execute", lambda *given: asked.append(given[2]))
    answer = client.post("/audit", data={"samples": FIGURE, "paired": "1"})
    assert answer.status_code == 200
    assert answer.headers["cache-control"] == "no-store"
    assert "script-src 'self'" in answer.headers["content-security-policy"]
    assert '<span class="chip chip-a-difference">a difference</span>' in answer.text
    assert "CSV, two columns, paired" in answer.text
    assert "changing order" not in answer.text  # two columns do not tell
    assert re.search(r'name="paired" value="1" checked', answer.text)
    assert FIGURE.strip() in answer.text
    assert sum(text.lstrip().upper().startswith("SELECT") for text in asked) == 1
    assert not any(text.lstrip().upper().startswith(("INSERT", "UPDATE", "DELETE")) for text in asked)
    assert client.get("/audit").headers["etag"] == before
    doubtful = client.post(
        "/audit", data={"samples": "before,after\n" + "".join(f"{3000 + i},{2 + i}\n" for i in (0, 2, 1, 3))}
    )
    assert (
        '<span class="chip chip-undecided">a difference</span>' in doubtful.text
    )  # no green for what is not to be believed


def test_audit_escapes_all_that_was_pasted(standing):
    evil = "</textarea><script>alert(1)</script>"
    for samples in (
        f"{evil},after\n" + "1,2\n" * 12,
        f"before,after\n1,{evil}\n",
        '{"<script>alert(1)</script>": [1], "x": [0]}',
    ):
        text = standing.post("/audit", data={"samples": samples, "before": evil if "{" not in samples else ""}).text
        assert "<script>alert" not in text
        assert "alert(1)" in text


@pytest.mark.parametrize(
    ("samples", "says"),
    [
        ("", "empty"),
        ("before,after\n1,0\n", "value 1 is 0"),
        ("[" * 50_000, "nested too deeply"),
        ('{"a": [1], "b": [NaN]}', "nan"),
    ],
)
def test_audit_says_what_is_no_samples_beside_the_form(standing, samples, says):
    answer = standing.post("/audit", data={"samples": samples})
    assert answer.status_code == 400
    assert says in re.search(r'<p class="warning" role="alert">(.*?)</p>', answer.text)[1]
    assert 'id="samples"' in answer.text


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Origin": "http://127.0.0.1"}, 200),
        ({"Origin": "null", "Sec-Fetch-Site": "same-origin"}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://127.0.0.1:9999"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Origin": "http://127.0.0.1", "Sec-Fetch-Site": "cross-site"}, 403),
        ({"Origin": "http://[", "Sec-Fetch-Site": ""}, 403),
        ({"Origin": "http://["}, 403),
        ({"Host": "evil.example"}, 421),
    ],
)
def test_audit_takes_forms_of_its_own_pages_only(standing, headers, status):
    assert standing.post("/audit", data={"samples": FIGURE}, headers=headers).status_code == status


def test_audit_takes_one_megabyte_of_a_form_and_nothing_else(standing):
    whole = {"content-type": "application/x-www-form-urlencoded"}
    large = b"samples=" + b"1" * (1 << 20)
    assert standing.post("/audit", content=large, headers=whole).status_code == 413
    assert standing.post("/audit", content=iter([large]), headers=whole).status_code == 413
    assert standing.post("/audit", content=large[: 1 << 20], headers=whole).status_code == 400
    assert standing.post("/audit", content=b"samples=%FF", headers=whole).status_code == 400
    assert standing.post("/audit", content=b"a=1&" * 50, headers=whole).status_code == 400
    assert standing.post("/audit", content=b"\xff\xfe", headers=whole).status_code == 400
    assert standing.post("/audit", content=b"{}", headers={"content-type": "application/json"}).status_code == 415
    assert standing.post("/audit", content=b"").status_code == 415


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "localhost.evil", "10.0.0.1"])
def test_a_name_of_somebody_elses_is_not_served(standing, host):
    assert standing.get("/", headers={"Host": host}).status_code == 421


@pytest.mark.parametrize("host", ["localhost:8080", "127.0.0.1", "[::1]:99", "LOCALHOST", "127.9.9.9:1"])
def test_loopback_is_served_by_all_its_names(standing, host):
    assert standing.get("/health", headers={"Host": host}).status_code == 200


def test_behind_a_proxy_links_begin_with_its_path(shelf):
    from starlette.testclient import TestClient

    app = create_app(shelf, hosts=("assay.example",), root_path="/assay", searcher=Searcher(start=False))
    with TestClient(app, base_url="http://assay.example") as client:
        text = client.get("/assay/papers/xattention").text
        assert client.get("/papers/xattention").text == text  # a proxy may take it off
    links = re.findall(r'(?:href|src)="(/[^"]*)"', text)
    assert links
    assert all(link.startswith("/assay/") for link in links)


def test_claims_have_an_address_that_stays(standing):
    answer = standing.get(f"/claims/{CLAIM}", follow_redirects=False)
    assert answer.headers["location"] == "/papers/xattention#attention-speedup"
    assert 'id="attention-speedup"' in standing.get("/papers/xattention").text


def test_a_run_has_a_page_a_file_and_a_document(client, shelf):
    id = next(iter(shelf.library().tuned))
    page = client.get(f"/recipes/{id}")
    assert page.status_code == 200
    assert "dtype + fp8_vs_int8 + attention_backend" in page.text
    assert f'href="/recipes/{id}.toml"' in page.text
    file = client.get(f"/recipes/{id}.toml")
    assert file.headers["content-type"].startswith("application/toml")
    assert file.headers["content-disposition"] == 'attachment; filename="recipe.toml"'
    found = client.get(f"/api/recipes/{id}").json()
    assert found["toml"] == file.text
    assert [run["run"] for run in client.get("/api/recipes").json()] == list(shelf.library().tuned)
    assert "drawing" not in str(found)


def test_the_comparison_keeps_what_was_chosen_in_its_address(client, shelf):
    mine = next(id for id, one in shelf.library().tuned.items() if one.run.fingerprint == "mine")
    asked = f"against=paper&paper=xattention&recipe={mine}&machine=mine&machine=better"
    text = client.get(f"/compare?{asked}").text
    assert re.search(r'value="xattention" checked', text)
    assert re.search(rf'value="{mine}" checked', text)
    assert len(re.findall(r'name="machine" value="(?:mine|better)" checked', text)) == 2
    links = re.findall(r'href="(/(?:api/)?compare[^"]*\?[^"]*)"', text)
    assert {link.split("?")[0] for link in links} == {"/compare", "/compare.csv", "/compare.svg", "/api/compare"}
    for link in links:
        assert client.get(link.replace("&amp;", "&")).status_code == 200
    wanted = client.get(f"/api/compare?{asked}").json()
    [linked] = [link for link in links if link.startswith("/api/")]
    assert client.get(linked.replace("&amp;", "&")).json() == wanted
    assert [(row["kind"], row["machine"]) for row in wanted["rows"]] == [
        ("recipe", "mine"),
        ("paper", "better"),
        ("paper", "mine"),
    ]


def test_the_filter_is_in_the_address_and_in_the_form(standing):
    text = standing.get("/?family=attention&verdict=reproduced&q=blocks").text
    assert '<option value="attention" selected>' in text
    assert '<option value="reproduced" selected>' in text
    assert 'value="blocks"' in text
    assert re.search(r"1 paper\b", text)


def test_a_part_of_the_page_is_the_list_alone(standing):
    whole, part = standing.get("/?family=mixers"), standing.get("/?family=mixers", headers={"HX-Request": "true"})
    assert part.text.strip() in whole.text
    assert "<html" not in part.text
    assert part.headers["vary"] == "HX-Request"
    assert whole.headers["etag"] != part.headers["etag"]


def test_search_by_words_until_the_model_is_there(standing):
    found = standing.get("/api/papers?q=kolmogorov-arnold").json()
    assert found["found_by"] == "bm25"
    assert found["papers"][0]["slug"] == "kat"
    assert standing.get("/api/papers?q=zzzzqqq").json()["papers"] == []


def test_search_by_meaning_when_it_is_ready(shelf, monkeypatch):
    from starlette.testclient import TestClient

    from assay.catalogue import search as searching

    hits = [
        searching.Hit(catalogue.get("zero"), 0.7, "embedding"),
        searching.Hit(catalogue.get("kat"), 0.5, "embedding"),
    ]
    monkeypatch.setattr(searching, "search", lambda *_, **__: hits)
    searcher = Searcher()
    assert searcher.ready.wait(10)
    client = TestClient(create_app(shelf, searcher=searcher), base_url="http://localhost")
    found = client.get("/api/papers?q=anything").json()
    assert (found["found_by"], [paper["slug"] for paper in found["papers"]]) == ("embedding", ["zero", "kat"])


def test_records_in_pages(standing):
    first = standing.get("/api/records?limit=2").json()
    rest = standing.get("/api/records?limit=2&offset=2").json()
    assert (first["total"], len(first["records"]), len(rest["records"])) == (5, 2, 2)
    ids = [r["id"] for r in first["records"] + rest["records"]]
    assert len(set(ids)) == 4
    whole = standing.get(f"/api/records/{ids[0]}").json()
    assert (whole["id"], whole["by"]) == (ids[0], first["records"][0]["by"])
    assert standing.get(f"/api/records?claim={CLAIM}&machine=mine").json()["total"] == 1


def test_the_json_says_what_the_page_says(standing):
    seen = standing.get("/api/papers/xattention").json()
    claim = next(c for c in seen["claims"] if c["id"] == CLAIM)
    assert [(s["machine"], s["word"], s["origin"]) for s in claim["seen"]] == [
        ("mine", "reproduced", "you"),
        ("other", "refuted here", "others"),
        ("better", "reproduced", "others"),
    ]
    assert claim == standing.get(f"/api/claims/{CLAIM}").json()
    assert "drawing" not in str(seen)


def test_a_page_asks_the_store_once(client, shelf):
    client.get("/")
    asked = []
    event.listen(shelf._store._engine, "before_cursor_execute", lambda *given: asked.append(given[2]))
    for path in (*PAGES, f"/recipes/{next(iter(shelf.library().tuned))}"):
        asked.clear()
        client.get(path)
        assert sum(text.lstrip().upper().startswith("SELECT") for text in asked) == 1, path


def test_ten_thousand_records_of_twenty_machines_stay_small(store):
    """The page's size does not follow the store's; a record that came is added, not all read again."""
    from starlette.testclient import TestClient

    claims = [c.id for p in catalogue.papers() if p.status == "code" for c in p.claims]
    machines = {f"m{i}": {"cpu": f"CPU {i}", "cores": i + 1, "flags": ["avx2"]} for i in range(20)}
    base = make(claim=CLAIM, fingerprint="m0", machine=machines["m0"], vs_free=estimate(1.5, 1.6, 1.7))
    texts = []
    for i in range(10_000):
        claim = claims[i % len(claims)]
        name = f"m{i // len(claims) % 20}"
        texts.append(
            base.model_copy(
                update={
                    "id": f"{i:032x}",
                    "claim": claim,
                    "slug": claim.split("/")[0],
                    "fingerprint": name,
                    "machine": machines[name],
                }
            )
        )
    shelf = Shelf(str(store._url), here="m3", machine=machines["m3"])
    shelf._new = lambda: ((record, "others") for record in texts)
    assert len(shelf.library().records) == 10_000
    del shelf._new
    client = TestClient(create_app(shelf, searcher=Searcher(start=False)), base_url="http://localhost")
    for path in ("/", "/papers/xattention", "/compare", "/compare.svg"):
        answer = client.get(path)
        assert answer.status_code == 200
        assert len(answer.content) < 300_000, path
    rows = client.get("/api/compare").json()["rows"]
    assert len(rows) > SHOWN
    assert client.get("/compare.csv").text.count("\r\n") == len(rows) + 1
    assert client.get("/compare").text.count("<circle") == SHOWN
    shelf.close()


def test_two_hundred_runs_are_pages_of_ordinary_size(store):
    from starlette.testclient import TestClient

    store.add_runs([run(minutes=i) for i in range(210)])
    shelf = Shelf(str(store._url), here="mine", machine=HERE)
    client = TestClient(create_app(shelf, searcher=Searcher(start=False)), base_url="http://localhost")
    for path in ("/compare", "/compare.svg", "/recipes", "/papers/xattention"):
        answer = client.get(path)
        assert answer.status_code == 200
        assert len(answer.content) < 300_000, path
    assert "The newest 200 of 210 runs" in client.get("/recipes").text
    assert "60 of 210 are listed here." in client.get("/papers/xattention").text
    shelf.close()


def test_every_chip_has_a_meaning():
    assert set(CHIPS) == set(MEANINGS)
    assert {v.value for v in Verdict} < set(CHIPS)


@pytest.mark.parametrize(
    "path", ["/", "/papers/xattention", "/api/papers", "/compare.svg", "/static/style.css", "/nothing"]
)
def test_head_is_get_without_the_body(address, path):
    import httpx

    got, headed = httpx.get(address + path), httpx.head(address + path)
    assert (headed.status_code, headed.content) == (got.status_code, b"")
    for name in ("etag", "content-type", "content-length", "content-security-policy"):
        assert headed.headers.get(name) == got.headers.get(name), name


def test_head_and_the_next_question_share_a_connection(address):
    import httpx

    with httpx.Client(base_url=address) as client:
        for _ in range(3):
            assert client.head("/papers/xattention").content == b""
            assert client.get("/health").text == "ok"


def test_behind_a_proxy_the_prefix_alone_is_the_front_page(shelf):
    from starlette.testclient import TestClient

    app = create_app(shelf, root_path="/assay", searcher=Searcher(start=False))
    client = TestClient(app, base_url="http://localhost", follow_redirects=False)
    front = client.get("/assay/")
    assert front.status_code == 200
    assert client.get("/assay").text == front.text
    assert client.get("/assayed").status_code == 404
    assert client.get("/assay/static/style.css").status_code == 200
    assert client.get("/assay/api/papers/nobody").json()["error"]


def test_the_description_of_the_api_has_an_etag(client):
    tag = client.get("/api/openapi.json").headers["etag"]
    assert client.get("/api/openapi.json", headers={"If-None-Match": tag}).status_code == 304


@pytest.mark.parametrize(
    ("given", "status"),
    [
        ("*", 304),
        ("", 200),
        (",", 200),
        ('"', 200),
        ('W/"x", "y"', 200),
        ("x" * 5000, 200),
        ("{tag},", 304),
        ("W/{tag}", 304),
    ],
)
def test_odd_conditions_of_caches(client, given, status):
    tag = client.get("/papers/xattention").headers["etag"]
    asked = given.replace("{tag}", tag)
    assert client.get("/papers/xattention", headers={"If-None-Match": asked}).status_code == status


@pytest.mark.parametrize(
    "path",
    [
        "/papers/xattention%2Fx", "/papers/%ff%fe", "/papers/%00", "/static/%00", "/static/%2e%2e%2f%2e%2e%2fapp.py", "/static//etc/passwd",
        "/machines/%2e%2e%2fmine", "/records/" + "f" * 5000, "/guide/..%2f..%2fREADME", "/guide/" + "x" * 5000, "/charts/a/b.svg",
        "/claims/xattention/%0d%0aX-Evil:1", "/claims/%0d%0a/x", "/papers/.bib", "/static/" + "x" * 5000,
    ],
)  # fmt: skip
def test_odd_paths_are_not_found(client, path):
    answer = client.get(path, follow_redirects=False)
    assert answer.status_code in (400, 404)
    assert "x-evil" not in answer.headers
    assert "default-src 'none'" in answer.headers["content-security-policy"]


@pytest.mark.parametrize(
    "path", ["/?q=" + "x" * 501, "/?q=" + "a+" * 20_000, "/api/papers?q=" + "x" * 501, "/?family=" + "x" * 9000]
)
def test_long_questions_are_refused(client, path):
    answer = client.get(path)
    assert answer.status_code in (400, 422)
    assert len(answer.content) < 10_000


@pytest.mark.parametrize("question", ["%00", "%ed%a0%80", "%ff", "%E2%80%AE", "((((", "\\", "'\"<>", "%F0%9F%98%80"])
def test_odd_questions_are_answered(client, question):
    for path in ("/?q=", "/api/papers?q="):
        assert client.get(path + question).status_code == 200


def test_open_to_others_it_answers_to_every_address_and_the_name_it_was_given(shelf):
    from starlette.testclient import TestClient

    app = create_app(shelf, hosts=("0.0.0.0",), searcher=Searcher(start=False))
    for host, status in (("10.1.2.3:8080", 200), ("[fe80::1]", 200), ("evil.example", 421), ("localhost", 200)):
        client = TestClient(app, base_url="http://localhost")
        assert client.get("/health", headers={"Host": host}).status_code == status

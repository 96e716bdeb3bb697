"""The web server of the pages: read only, every answer to a GET cacheable by its ETag, one question to the store a page."""

from __future__ import annotations

import errno
import hashlib
import ipaddress
import json
import math
import threading
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

from assay import __version__, catalogue
from assay.errors import InputError
from assay.site import comparison, feed, forms, recipes, views
from assay.site.charts import bar, embedded
from assay.site.comparison import Choice
from assay.site.guide import Page
from assay.site.job_pages import add_jobs
from assay.site.jobs import Jobs
from assay.site.library import Shelf
from assay.site.pages import STATIC, Links, Pages
from assay.site.views import Filter

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
PICTURE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'"  # a picture brings its own colours, and can run nothing
)
LIMIT = 1000
MOST_FORM_BYTES = 1 << 20


class Searcher:
    """Search by meaning once the model is loaded, which takes seconds and happens beside the first pages; by words until then."""

    def __init__(self, start: bool = True) -> None:
        self.ready = threading.Event()
        if start:
            threading.Thread(target=self._load, daemon=True).start()

    def _load(self) -> None:
        from assay.catalogue.search import search

        try:
            search("warm up", limit=1)
        except Exception:  # a model that cannot be loaded: words will do
            return
        self.ready.set()

    def __call__(self, question: str, limit: int = 40) -> tuple[list[str], str]:
        """The slugs that fit, best first, and how they were found."""
        from assay.catalogue.search import by_words, search

        hits = search(question, limit=limit) if self.ready.is_set() else by_words(question, limit=limit)
        return [hit.paper.slug for hit in hits if hit.score > 0], hits[0].method if hits else "bm25"


def create_app(
    shelf: Shelf,
    *,
    hosts: tuple[str, ...] = (),
    root_path: str = "",
    searcher: Searcher | None = None,
    commands: tuple[Page, ...] = (),
    jobs: Jobs | None = None,
    token: str = "",
    ending: threading.Event | None = None,
) -> FastAPI:
    """The application. `hosts` are names it answers to besides loopback's (a page elsewhere must not reach it by a name of its own).

    `commands` are the pages of the guide about the command line. With `jobs`, who has `token` can start work and cancel it. Streams
    end when `ending` is set: a server that ends waits for them.
    """
    app = FastAPI(
        title="assay",
        version=__version__,
        summary="What 138 papers on efficient computing promise, and what was measured.",
        openapi_url=None,  # served below, with an ETag as everything is
        docs_url=None,  # they load scripts from elsewhere
        redoc_url=None,
    )
    search = searcher or Searcher()
    links = Links(root_path)

    def pages() -> Pages:
        return Pages(shelf.library(), links, commands, jobs=jobs is not None)

    @app.middleware("http")
    async def guarded(request: Request, go_on: Callable[[Request], Awaitable[Response]]) -> Response:
        if not _is_ours(request.headers.get("host", ""), hosts):
            return Response("this name is not served here", 421, media_type="text/plain")
        path, method = request.scope["path"], request.scope["method"]
        if root_path and f"{path}/".startswith(f"{root_path}/"):  # of a proxy that does not take it off
            request.scope["root_path"] = root_path
            request.scope["path"] = path if path != root_path else f"{path}/"
        if method == "HEAD":  # as GET, without the body
            request.scope["method"] = "GET"
        answer = await go_on(request)
        if method == "HEAD":
            request.scope["method"] = method
            answer = Response(status_code=answer.status_code, headers=dict(answer.headers))
        picture = answer.headers.get("content-type", "").startswith("image/svg")
        answer.headers.setdefault("Content-Security-Policy", PICTURE_POLICY if picture else POLICY)
        answer.headers["X-Content-Type-Options"] = "nosniff"
        # with "no-referrer" browsers say of a form that it comes from nowhere
        answer.headers["Referrer-Policy"] = "same-origin"
        answer.headers["Cross-Origin-Resource-Policy"] = "cross-origin" if picture else "same-origin"
        return answer

    @app.exception_handler(InputError)
    def bad_input(request: Request, error: Exception) -> Response:
        missing = str(error).startswith("no ") or "has no page" in str(error)
        return refused(request, 404 if missing else 400, str(error))

    @app.exception_handler(OSError)
    def no_room(request: Request, error: Exception) -> Response:
        assert isinstance(error, OSError)
        return refused(request, 507 if error.errno == errno.ENOSPC else 500, error.strerror or str(error))

    @app.exception_handler(RequestValidationError)
    def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        return refused(request, 422, f"{first['loc'][-1]}: {first['msg']}")

    @app.exception_handler(HTTPException)
    def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return refused(request, error.status_code, str(error.detail), dict(error.headers or {}))

    def refused(request: Request, status: int, message: str, headers: dict[str, str] | None = None) -> Response:
        if request.url.path.startswith(f"{root_path}/api/") or request.url.path.startswith("/api/"):
            return Response(json.dumps({"error": message}), status, headers, "application/json")
        return Response(pages().error(status, message), status, headers, "text/html")

    def sent(request: Request, text: str, kind: str = "text/html") -> Response:
        """An answer with its ETag; 304 where the client has it."""
        body = text.encode("utf-8", "replace")
        tag = f'"{hashlib.sha256(body).hexdigest()[:20]}"'
        headers = {"ETag": tag, "Cache-Control": "no-cache"}
        asked = [part.strip().removeprefix("W/") for part in request.headers.get("if-none-match", "").split(",")]
        if tag in asked or "*" in asked:
            return Response(status_code=304, headers=headers)
        return Response(body, headers=headers, media_type=kind)

    def as_json(request: Request, document: Any) -> Response:
        return sent(request, json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False), "application/json")

    def listed(request: Request) -> tuple[Pages, Filter, list[str] | None, str]:
        made = pages()
        wanted = Filter.of(dict(request.query_params), made.library)
        ranking, method = search(wanted.q) if wanted.q.strip() else (None, "")
        return made, wanted, ranking, method

    # Pages

    @app.get("/", include_in_schema=False)
    def front_page(request: Request) -> Response:
        made, wanted, ranking, method = listed(request)
        answer = sent(request, made.papers(wanted, ranking, method, part="hx-request" in request.headers))
        answer.headers["Vary"] = "HX-Request"
        return answer

    @app.get("/papers/{slug}.bib", include_in_schema=False)
    def bib(request: Request, slug: str) -> Response:
        return sent(request, views.bibtex(catalogue.get(slug)), "application/x-bibtex")

    @app.get("/papers/{slug}", include_in_schema=False)
    def paper_page(request: Request, slug: str, against: str = "paper") -> Response:
        return sent(request, pages().paper(slug, against))

    @app.get("/claims/{slug}/{what}", include_in_schema=False)
    def claim_page(slug: str, what: str) -> Response:
        catalogue.get_claim(f"{slug}/{what}")
        return Response(status_code=307, headers={"Location": f"{links(f'papers/{slug}')}#{what}"})

    @app.get("/records/{id}", include_in_schema=False)
    def record_page(request: Request, id: str) -> Response:
        return sent(request, pages().record(id))

    def chosen(request: Request) -> tuple[Pages, Choice]:
        made = pages()
        return made, Choice.of(request.query_params.multi_items(), made.library)

    @app.get("/compare", include_in_schema=False)
    def compare_page(request: Request) -> Response:
        made, wanted = chosen(request)
        return sent(request, made.compare(wanted))

    @app.get("/compare.csv", include_in_schema=False)
    def compare_csv(request: Request) -> Response:
        made, wanted = chosen(request)
        rows = comparison.compare(made.library, wanted)["rows"]
        return sent(request, comparison.csv(rows), "text/csv; charset=utf-8")

    @app.get("/compare.svg", include_in_schema=False)
    def compare_svg(request: Request) -> Response:
        made, wanted = chosen(request)
        return sent(request, made.plot(comparison.compare(made.library, wanted), standalone=True), "image/svg+xml")

    @app.get("/recipes", include_in_schema=False)
    def recipes_page(request: Request) -> Response:
        return sent(request, pages().recipes())

    @app.get("/recipes/{id}.toml", include_in_schema=False)
    def recipe_toml(request: Request, id: str) -> Response:
        made = pages()
        if id not in made.library.tuned:
            raise InputError(f"no run of `assay tune` has the id {id[:80]!r}")
        answer = sent(request, recipes.toml(made.library.tuned[id].run), "application/toml")
        answer.headers["Content-Disposition"] = 'attachment; filename="recipe.toml"'
        return answer

    @app.get("/recipes/{id}", include_in_schema=False)
    def recipe_page(request: Request, id: str) -> Response:
        return sent(request, pages().recipe(id))

    @app.get("/charts/{slug}/{what}.svg", include_in_schema=False)
    def claim_svg(request: Request, slug: str, what: str, machine: str = "") -> Response:
        claim = catalogue.get_claim(f"{slug}/{what}")
        found = pages().library.of(claim, machine)
        drawing = bar(found[0].record) if found else ""
        if not drawing:
            raise InputError(f"no picture: nothing that can be drawn was measured of {claim.id}")
        return sent(request, embedded(drawing), "image/svg+xml")

    @app.get("/machines", include_in_schema=False)
    def machines_page(request: Request) -> Response:
        return sent(request, pages().machines())

    @app.get("/machines/{fingerprint}", include_in_schema=False)
    def machine_page(request: Request, fingerprint: str) -> Response:
        return sent(request, pages().machine(fingerprint))

    @app.get("/audit", include_in_schema=False)
    def audit_page(request: Request) -> Response:
        return sent(request, pages().audit())

    @app.post("/audit", include_in_schema=False)
    async def audited(request: Request) -> Response:
        """Judges what was pasted, and keeps nothing."""
        form = await forms.fields(request, MOST_FORM_BYTES, hint=": use assay audit FILE, which takes 10 MB")
        page, status = await run_in_threadpool(lambda: pages().audited(form))
        return Response(page.encode("utf-8", "replace"), status, {"Cache-Control": "no-store"}, "text/html")

    @app.get("/guide", include_in_schema=False)
    def guide_index(request: Request) -> Response:
        return sent(request, pages().contents())

    @app.get("/guide/{name}", include_in_schema=False)
    def guide_page(request: Request, name: str) -> Response:
        return sent(request, pages().guide_page(name))

    @app.get("/feed.atom", include_in_schema=False)
    def feed_of_news(request: Request) -> Response:
        base = f"{request.url.scheme}://{request.headers['host']}{root_path}"
        return sent(request, feed.atom(feed.news(pages().library), base), "application/atom+xml")

    @app.get("/health", include_in_schema=False)
    def health() -> Response:
        return Response("ok", media_type="text/plain")

    # The same as JSON

    @app.get("/api/papers", summary="The papers that fit, with their claims and verdicts")
    def api_papers(
        request: Request,
        q: Annotated[str, Query(description="words, or a question", max_length=500)] = "",
        family: str = "",
        saves: str = "",
        verdict: str = "",
        machine: str = "",
        model: str = "",
    ) -> Response:
        made, wanted, ranking, method = listed(request)
        rows = views.paper_rows(made.library, wanted, ranking)
        return as_json(request, {"found_by": method or None, "papers": [bare(row) for row in rows]})

    @app.get("/api/papers/{slug}", summary="One paper, and all that was seen of its claims")
    def api_paper(request: Request, slug: str, against: str = "paper") -> Response:
        return as_json(request, bare(views.paper_page(pages().library, slug, against)))

    @app.get("/api/claims/{slug}/{what}", summary="One claim, machine by machine")
    def api_claim(request: Request, slug: str, what: str) -> Response:
        claim = catalogue.get_claim(f"{slug}/{what}")
        return as_json(request, bare(views.claim_page(pages().library, catalogue.get(slug), claim, "paper")))

    @app.get("/api/records", summary="Records of a claim, or of all, the newest first")
    def api_records(
        request: Request,
        claim: str = "",
        machine: str = "",
        limit: Annotated[int, Query(ge=1, le=LIMIT)] = 100,
        offset: Annotated[int, Query(ge=0, le=10**9)] = 0,
    ) -> Response:
        if claim:
            catalogue.get_claim(claim)
        found = [
            (record, origin)
            for record, origin in pages().library.records.values()
            if claim in ("", record.claim) and machine in ("", record.fingerprint)
        ]
        found.sort(key=lambda item: item[0].created, reverse=True)
        shown = [{"by": origin, **json.loads(r.to_json(machine=False))} for r, origin in found[offset : offset + limit]]
        return as_json(request, {"total": len(found), "offset": offset, "records": shown})

    @app.get("/api/records/{id}", summary="One record, whole")
    def api_record(request: Request, id: str) -> Response:
        record, origin = pages().found(id)
        return as_json(request, {"by": origin, **json.loads(record.to_json())})

    @app.get("/api/machines", summary="The machines that records come from")
    def api_machines(request: Request) -> Response:
        library = pages().library
        return as_json(request, [views.machine_facts(facts, name) for name, facts in library.machines.items()])

    @app.get("/api/compare", summary="Claims and proven recipes with a gain and a quality")
    def api_compare(
        request: Request,
        against: Annotated[
            str, Query(description="the baseline: free, paper (of a recipe, the model as loaded) or exact")
        ] = "free",
        what: Annotated[str, Query(description="papers or recipes; both if it is empty")] = "",
        family: str = "",
        paper: Annotated[list[str] | None, Query(description="slugs", max_length=comparison.CHOSEN)] = None,
        recipe: Annotated[list[str] | None, Query(description="ids of runs", max_length=comparison.CHOSEN)] = None,
        machine: Annotated[
            list[str] | None, Query(description="fingerprints, or like-mine", max_length=comparison.CHOSEN)
        ] = None,
        older: Annotated[str, Query(description="1: with what stale records and runs say")] = "",
    ) -> Response:
        made, wanted = chosen(request)
        return as_json(request, bare(comparison.compare(made.library, wanted)))

    @app.get("/api/recipes", summary="The runs of assay tune and what they found, the newest first")
    def api_recipes(request: Request) -> Response:
        return as_json(request, recipes.recipe_rows(pages().library))

    @app.get(
        "/api/recipes/{id}",
        summary="One run of assay tune: its recipe, its proof, all that was measured, and the pairs in it",
    )
    def api_recipe(request: Request, id: str) -> Response:
        return as_json(request, bare(recipes.recipe_page(pages().library, id)))

    @app.get("/api/openapi.json", include_in_schema=False)
    def api_description(request: Request) -> Response:
        return as_json(request, app.openapi())

    if jobs is not None:
        add_jobs(app, jobs, token, root_path, pages, sent, as_json, ending or threading.Event())
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    return app


def bare(value: Any) -> Any:
    """A view without its drawings, for JSON; an infinite gain, which JSON cannot hold, is null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: bare(item) for key, item in value.items() if key != "drawing"}
    return [bare(item) for item in value] if isinstance(value, list | tuple) else value


def _is_ours(host: str, more: tuple[str, ...]) -> bool:
    """Whether a Host header names loopback or what the server was bound to: others may have been pointed here by a stranger's DNS."""
    name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
    name = name.strip("[]").lower()
    if name in ("localhost", *more):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback or "0.0.0.0" in more or "::" in more
    except ValueError:
        return False

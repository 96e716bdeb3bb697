"""The pages and addresses by which work is started, watched and cancelled.

Who opens the address that `assay site` prints gets its token as a cookie that no script reads and no other site sends. A form is taken
only with that cookie and with a word made of the token, which pages elsewhere cannot know.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.responses import StreamingResponse

from assay.errors import InputError
from assay.site import forms
from assay.site.jobs import Jobs, as_json, tune_words, verify_words
from assay.site.pages import Pages

COOKIE = "assay_site"
MOST = 20_000  # bytes of a form
EVERY = 0.5  # seconds between two looks at a log
MOST_STREAMS = 64  # pages that watch at once; others are made anew every few seconds
REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox"


def word_of(token: str) -> str:
    """What a form must hold."""
    return hmac.new(token.encode(), b"form", hashlib.sha256).hexdigest()


def add_jobs(
    app: FastAPI,
    jobs: Jobs,
    token: str,
    root: str,
    pages: Callable[[], Pages],
    sent: Callable[..., Response],
    sent_json: Callable[[Request, Any], Response],
    ending: threading.Event,
) -> None:
    """Add the addresses under /jobs to the application. Streams end when `ending` is set."""
    if len(token) < 16:
        raise ValueError("token must have 16 characters at least")

    streams: set[object] = set()

    def cookie(request: Request) -> str:
        """Its name, with the port: a browser sends the cookies of one server to others on the same machine too."""
        return f"{COOKIE}_{request.url.port}" if request.url.port else COOKIE

    def known(request: Request) -> bool:
        given = request.cookies.get(cookie(request), "")
        return hmac.compare_digest(given.encode("utf-8", "replace"), token.encode())

    def secret(request: Request) -> str:
        return word_of(token) if known(request) else ""

    async def form_of(request: Request) -> dict[str, str]:
        """The fields of a form, if whoever sent it may. Raises HTTPException otherwise."""
        if not forms.from_here(request):
            raise HTTPException(403, "this form was sent from a page elsewhere")
        if not known(request):
            raise HTTPException(
                403, "open the address that `assay site` printed when it started: it holds the token that work needs"
            )
        fields = await forms.fields(request, MOST)
        if not hmac.compare_digest(fields.pop("word", "").encode("utf-8", "replace"), word_of(token).encode()):
            raise HTTPException(403, "this form is older than the server: open the page again")
        return fields

    def to(path: str) -> Response:
        return Response(status_code=303, headers={"Location": f"{root}/{path}"})

    @app.get("/enter", include_in_schema=False)
    def enter(request: Request, token: str = "") -> Response:
        if not hmac.compare_digest(token.encode("utf-8", "replace"), _token.encode()):
            raise HTTPException(
                403, "this is not the token of the server that runs now; its address was printed when it started"
            )
        answer = to("jobs")
        answer.set_cookie(cookie(request), token, httponly=True, samesite="strict", path=root or "/")
        return answer

    _token = token

    @app.get("/jobs", include_in_schema=False)
    def job_list(request: Request) -> Response:
        return sent(request, pages().job_list(jobs.all(), secret(request)))

    @app.post("/jobs", include_in_schema=False)
    async def start(request: Request) -> Response:
        fields = await form_of(request)
        if fields.get("kind") == "verify":
            words = verify_words(fields.get("paper", ""), fields.get("scale", ""))
        elif fields.get("kind") == "tune":
            words = tune_words(*(fields.get(name, "") for name in ("model", "goal", "minutes", "max_drop")))
        else:
            raise InputError(f"kind must be verify or tune, got {fields.get('kind', '')[:40]!r}")
        job = await asyncio.to_thread(jobs.start, words)
        return to(f"jobs/{job.id}")

    @app.get("/jobs/{id}", include_in_schema=False)
    def job_page(request: Request, id: str) -> Response:
        return sent(request, pages().job(jobs.get(id), jobs.log(id)[0], secret(request)))

    @app.get("/jobs/{id}/report", include_in_schema=False)
    def report(request: Request, id: str) -> Response:
        answer = sent(request, jobs.report(id))
        answer.headers["Content-Security-Policy"] = REPORT_POLICY
        return answer

    @app.post("/jobs/{id}/cancel", include_in_schema=False)
    async def cancel(request: Request, id: str) -> Response:
        await form_of(request)
        await asyncio.to_thread(jobs.cancel, id)
        return to(f"jobs/{id}")

    @app.post("/jobs/{id}/again", include_in_schema=False)
    async def again(request: Request, id: str) -> Response:
        await form_of(request)
        return to(f"jobs/{(await asyncio.to_thread(jobs.again, id)).id}")

    @app.get("/jobs/{id}/events", include_in_schema=False)
    async def events(request: Request, id: str) -> Response:
        jobs.get(id)
        if len(streams) >= MOST_STREAMS:
            raise HTTPException(503, "too many pages are watching: close some", {"Retry-After": "5"})
        given = request.headers.get("last-event-id", "0")
        start = int(given) if given.isdecimal() and len(given) < 16 else 0
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        said = _events(request, jobs, id, start, ending, streams)
        return StreamingResponse(said, media_type="text/event-stream", headers=headers)

    @app.get("/api/jobs", summary="The work started from the pages")
    def api_jobs(request: Request) -> Response:
        return sent_json(request, [as_json(job) for job in jobs.all()])


async def _events(
    request: Request, jobs: Jobs, id: str, start: int, ending: threading.Event, streams: set[object]
) -> AsyncIterator[str]:
    """What the command says, as it says it, and at the end how it ended (server-sent events)."""
    mine = object()
    streams.add(mine)
    try:
        while not ending.is_set() and not await request.is_disconnected():
            job = await asyncio.to_thread(jobs.get, id)  # before its log: all that was said before it ended is sent
            text, end = await asyncio.to_thread(jobs.log, id, start)
            if end > start:
                lines = "".join(f"data: {line}\n" for line in json.dumps(text).splitlines())
                yield f"id: {end}\nevent: log\n{lines}\n"
                start = end
            if job.state != "running":
                yield f"event: end\ndata: {json.dumps(as_json(job))}\n\n"
                return
            await asyncio.sleep(EVERY)
    except (InputError, OSError):  # its folder has given way to newer jobs
        yield "event: end\ndata: null\n\n"
    finally:
        streams.discard(mine)

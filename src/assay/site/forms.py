"""What a form must be to be taken: sent from a page of this server, as a form, in UTF-8, and of a bearable size."""

from __future__ import annotations

from urllib.parse import parse_qs

from fastapi import Request
from starlette.exceptions import HTTPException

MOST_FIELDS = 20


def from_here(request: Request) -> bool:
    """Whether a form was sent from a page of this server, as far as the browser says; a program that is none says nothing."""
    site = request.headers.get("sec-fetch-site")
    if site is not None:  # it knows what a proxy may hide: the name under which the page was reached
        return site in ("same-origin", "none")
    origin = request.headers.get("origin")
    return origin is None or origin.lower().partition("://")[2] == request.headers.get("host", "").lower()


async def fields(request: Request, most: int, hint: str = "") -> dict[str, str]:
    """The fields of a form of at most `most` bytes; of two of one name the first. `hint` is what to do with a larger one.

    Raises HTTPException: 403 for a form of a page elsewhere, 415, 413, and 400 for what is no form.
    """
    if not from_here(request):
        raise HTTPException(403, "this form was sent from a page elsewhere")
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/x-www-form-urlencoded":
        raise HTTPException(415, "send a form: application/x-www-form-urlencoded")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise HTTPException(413, f"a form may have at most {most:,} bytes{hint}")
    try:
        found = parse_qs(body.decode("utf-8"), keep_blank_values=True, max_num_fields=MOST_FIELDS, errors="strict")
    except ValueError:
        raise HTTPException(400, "this is no form in UTF-8") from None
    return {name: values[0] for name, values in found.items()}

"""Logs a program can read: a JSON object a line, a line a request. Prompts and answers are never logged."""

from __future__ import annotations

import json
import logging
import re
import sys
import traceback
import uuid
from datetime import UTC, datetime
from typing import IO

REQUESTS = logging.getLogger("assay.server.requests")
_ID = re.compile(r"[\x21-\x7e]{1,128}")


class JsonLines(logging.Formatter):
    """A record as a line of JSON: time, level, logger, message, and the fields it was given in `extra={"fields": ...}`.

    Of an exception its kind and place are told, not its text, which may hold a prompt.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[0] is not None:
            line["error"] = record.exc_info[0].__name__
            line["place"] = "".join(traceback.format_tb(record.exc_info[2]))
        return json.dumps(line, default=str)


def configure(stream: IO[str] | None = None, *, requests: bool = True) -> None:
    """Write the server's logs as lines of JSON to `stream` (stderr by default); `requests` False leaves out a line a request."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines())
    for name in ("assay.server", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.WARNING)
    REQUESTS.setLevel(logging.INFO if requests else logging.WARNING)


def request_id(given: str | None) -> str:
    """The id a client gave, if it is up to 128 printable ASCII characters; a fresh one otherwise."""
    return given if given is not None and _ID.fullmatch(given) else uuid.uuid4().hex

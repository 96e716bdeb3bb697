"""The errors a user meets. Each carries the exit code of the command line; its text is one line that says what to do.

Library code (`methods`) raises plain `ValueError` or `TypeError` for bad arguments. The classes here are for what users of the
command line provide: models, files, settings; and for parts that are missing.
"""

from __future__ import annotations


class AssayError(Exception):
    """Anything assay reports without a traceback."""

    exit_code = 2


class InputError(AssayError, ValueError):
    """Bad usage or bad input: names the thing, what was given and what is allowed. Exit code 2."""

    exit_code = 2


class MissingError(AssayError):
    """Something needed is not there; says how to get it. Exit code 3."""

    exit_code = 3


class InterruptedRun(AssayError):
    """Ctrl-C in the middle of a long run; the text says what is kept. Exit code 130."""

    exit_code = 130

"""A change to a library as a unified diff, applied to a copy of its text: what is installed stays as it is."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

HUNK = re.compile(r"^@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")


class PatchError(ValueError):
    """A diff that does not fit the text: it was made for another version of it, or is no diff."""


def applied(text: str, diff: str) -> str:
    """The text with all hunks of a unified diff of one file applied.

    Every line that a hunk keeps or removes must be there. Where it lies elsewhere than the hunk says, because lines were added or
    removed before it, the one place where it fits is taken; a hunk that fits nowhere or in several places is refused, and so is one
    that has no such lines at all. Raises PatchError.

    >>> print(applied("one\\ntwo\\n", "@@ -1,2 +1,2 @@\\n one\\n-two\\n+three\\n"), end="")
    one
    three
    """
    lines = text.splitlines(keepends=True)
    found: list[str] = []
    taken = 0
    for start, before, after in _hunks(diff):
        at = _place(lines, before, max(start - 1, 0), taken)
        found += lines[taken:at] + after
        taken = at + len(before)
    return "".join(found + lines[taken:])


def _hunks(diff: str) -> list[tuple[int, list[str], list[str]]]:
    """Of each hunk the line it begins at, the lines it expects, and those it leaves."""
    starts: list[int] = []
    found: list[tuple[list[str], list[str]]] = []
    missing = [0, 0]
    for line in diff.splitlines(keepends=True):
        head = HUNK.match(line)
        if head and not any(missing):
            first, before, _, after = (None if part is None else int(part) for part in head.groups())
            starts.append(first or 0)
            found.append(([], []))
            missing = [1 if before is None else before, 1 if after is None else after]
        elif any(missing):
            sign, body = line[:1], line[1:]
            if sign not in (" ", "-", "+", "\n"):
                raise PatchError(f"the diff must have lines that begin with ' ', '-' or '+', got {line!r}")
            for which, signs in ((0, " -\n"), (1, " +\n")):
                if sign in signs:
                    found[-1][which].append(body if sign != "\n" else "\n")
                    missing[which] -= 1
            if min(missing) < 0:
                raise PatchError("the diff must have as many lines as its hunks say, got more")
    if not found or any(missing):
        raise PatchError("the diff must have a hunk, and as many lines as its hunks say")
    return [(start, *lines) for start, lines in zip(starts, found, strict=True)]


def _place(lines: list[str], before: list[str], wished: int, least: int) -> int:
    if not before:
        raise PatchError("the diff must name lines that it stands beside, got a hunk that only adds")
    fits = [at for at in range(least, len(lines) - len(before) + 1) if lines[at : at + len(before)] == before]
    if wished in fits:
        return wished
    if len(fits) != 1:
        where = "in several places" if fits else "nowhere"
        raise PatchError(f"the diff does not fit this text: {before[0].strip()!r} and what follows is found {where}")
    return fits[0]


def source_of(module: str) -> str:
    """The text of an installed module in Python, without importing it. Raises PatchError where it has none.

    >>> "def dumps" in source_of("json")
    True
    """
    found = importlib.util.find_spec(module)
    if found is None or not found.origin or not found.origin.endswith(".py"):
        raise PatchError(f"{module} has no text in Python here")
    return Path(found.origin).read_text(encoding="utf-8")

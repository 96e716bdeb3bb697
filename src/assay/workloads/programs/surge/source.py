"""One program whose output is to be predicted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from string import Template
from typing import Literal

Language = Literal["python", "c", "cpp", "node", "sql", "formal"]
Wants = Literal["output", "error", "either"]


@dataclass(frozen=True)
class Source:
    """A program before it is run.

    `files` are its texts by name, the first the one that is started (for SQL "schema.sql" and "query.sql", for a proof "proof.txt").
    `flags` are the compiler's. `given` is what the program works on, as text: its stdin, or the arguments that stand in it. `wants` says
    what is to be predicted: what it prints, the error that it ends with, or whichever of the two happens.
    """

    id: str
    component: str
    family: str
    group: str
    language: Language
    files: Mapping[str, str] = field(hash=False)
    stdin: str = ""
    given: str = ""
    flags: tuple[str, ...] = ()
    wants: Wants = "output"


NAMES = {"python": "main.py", "c": "main.c", "cpp": "main.cpp", "node": "main.js"}


def filled(
    component: str,
    name: str,
    language: Language,
    template: str,
    settings: Iterable[Mapping[str, object]],
    *,
    family: str = "",
) -> list[Source]:
    """One program with several settings in the places of `$name`, a group of its own."""
    found = []
    for number, values in enumerate(settings):
        text = Template(template.lstrip("\n")).substitute(values)
        given = ", ".join(f"{key} = {value}" for key, value in values.items())
        files = {NAMES[language]: text}
        group = f"{component}/{name}"
        found.append(Source(f"{group}/{number}", component, family or name, group, language, files, given=given))
    return found

"""SQLite databases of real data that every installation has: the standard library's syntax trees, scikit-learn's tables, Unicode; and for
judging, of HTTP, media types, encodings, handwritten digits, patients and physical constants.

One more, of the packages that dpkg has installed, is there on Debian's systems only.
"""

from __future__ import annotations

import ast
import sqlite3
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODULES = 36
CHARACTERS = 0x1200
CATEGORIES = {
    "Lu": "uppercase letter",
    "Ll": "lowercase letter",
    "Lo": "other letter",
    "Nd": "decimal digit",
    "Po": "punctuation",
    "Sm": "mathematical symbol",
    "So": "other symbol",
    "Mn": "mark",
}
DPKG = Path("/var/lib/dpkg/status")


@dataclass(frozen=True)
class View:
    """Two tables of a database that questions are asked of: a parent and its children, what they are called, and the children's numbers."""

    database: str
    parent: str
    child: str
    parent_nouns: tuple[str, str]
    child_nouns: tuple[str, str]
    child_name: str
    numbers: dict[str, str]  # column -> what people call it


VIEWS = (
    View("library", "modules", "functions", ("module", "modules"), ("function", "functions"), "name",
         {"argument_count": "number of arguments", "line_count": "number of lines", "doc_length": "docstring length"}),
    View("library", "modules", "classes", ("module", "modules"), ("class", "classes"), "name",
         {"method_count": "number of methods", "line_count": "number of lines", "base_count": "number of bases"}),
    View("science", "species", "flowers", ("species", "species"), ("flower", "flowers"), "code",
         {"sepal_length": "sepal length", "petal_width": "petal width", "petal_length": "petal length"}),
    View("science", "cultivars", "wines", ("cultivar", "cultivars"), ("wine", "wines"), "code",
         {"alcohol": "alcohol", "magnesium": "magnesium", "color_intensity": "colour intensity", "proline": "proline"}),
    View("science", "diagnoses", "tumors", ("diagnosis", "diagnoses"), ("tumor", "tumors"), "code",
         {"radius": "radius", "texture": "texture", "smoothness": "smoothness"}),
    View("unicode", "scripts", "characters", ("script", "scripts"), ("character", "characters"), "name",
         {"name_length": "length of the name", "byte_count": "number of bytes", "code_point": "code point"}),
)  # fmt: skip
JUDGED = (
    View("web", "kinds", "responses", ("kind", "kinds"), ("response", "responses"), "name",
         {"status_code": "status code", "word_count": "number of words", "description_length": "length of the description"}),
    View("web", "families", "extensions", ("family", "families"), ("extension", "extensions"), "name",
         {"letter_count": "number of letters", "type_length": "length of the type"}),
    View("web", "encodings", "spellings", ("encoding", "encodings"), ("spelling", "spellings"), "name",
         {"character_count": "number of characters", "digit_count": "number of digits"}),
    View("measures", "digits", "scans", ("digit", "digits"), ("scan", "scans"), "code",
         {"ink": "ink", "pixel_count": "number of pixels"}),
    View("measures", "sexes", "patients", ("sex", "sexes"), ("patient", "patients"), "code",
         {"age": "age", "body_mass": "body mass", "blood_pressure": "blood pressure", "progression": "progression"}),
    View("measures", "units", "constants", ("unit", "units"), ("constant", "constants"), "name",
         {"name_length": "length of the name", "word_count": "number of words"}),
)  # fmt: skip
"""Tables that no example and no router knows. Their words were chosen before any question was asked of them."""
DEBIAN = View("debian", "sections", "packages", ("section", "sections"), ("package", "packages"), "name",
              {"installed_size": "installed size", "dependency_count": "number of dependencies"})  # fmt: skip


def build(folder: Path) -> dict[str, Path]:
    """Write the databases into `folder`; their files by name. "debian" only where dpkg's status file is."""
    found = {}
    makers = {"library": _library, "science": _science, "unicode": _unicode, "web": _web, "measures": _measures}
    if DPKG.is_file():
        makers["debian"] = _debian
    for name, fill in makers.items():
        path = folder / f"{name}.db"
        made = sqlite3.connect(path)
        try:
            made.execute("PRAGMA synchronous = 0")
            fill(made)
            made.commit()
        finally:
            made.close()
        found[name] = path
    return found


def _table(made: sqlite3.Connection, name: str, columns: str, rows: Iterable[Sequence[Any]]) -> None:
    """A table and its rows; a column is "name TYPE" or "name > parent" for a foreign key."""
    declared = []
    for column in columns.split(", "):
        if " > " in column:
            own, parent = column.split(" > ")
            declared.append(f"{own} INTEGER REFERENCES {parent}")
        else:
            declared.append(column)
    made.execute(f"CREATE TABLE {name} ({', '.join(declared)})")
    listed = [tuple(row) for row in rows]
    made.executemany(f"INSERT INTO {name} VALUES ({', '.join('?' * len(declared))})", listed)


def _library(made: sqlite3.Connection) -> None:
    import sys
    import sysconfig

    sources = Path(sysconfig.get_paths()["stdlib"])
    files = [
        f for f in sorted(sources.glob("*.py")) if f.stem in sys.stdlib_module_names and not f.stem.startswith("_")
    ]
    files = [f for f in files if 3000 < f.stat().st_size < 40_000][:: max(1, len(files) // (2 * MODULES))][:MODULES]
    modules: list[tuple[Any, ...]] = []
    functions: list[tuple[Any, ...]] = []
    classes: list[tuple[Any, ...]] = []
    for number, file in enumerate(files, 1):
        text = file.read_text(encoding="utf-8")
        tree = ast.parse(text)
        modules.append((number, file.stem, text.count("\n"), _doc(tree)))
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                given = node.args
                arguments = len(given.posonlyargs) + len(given.args) + len(given.kwonlyargs)
                functions.append((len(functions) + 1, number, node.name, arguments, _lines(node), _doc(node)))
            elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                methods = sum(isinstance(one, ast.FunctionDef) for one in node.body)
                classes.append((len(classes) + 1, number, node.name, methods, len(node.bases), _lines(node)))
    _table(made, "modules", "module_id INTEGER PRIMARY KEY, name TEXT, line_count INTEGER, doc_length INTEGER", modules)
    _table(
        made,
        "functions",
        "function_id INTEGER PRIMARY KEY, module_id > modules, name TEXT, argument_count INTEGER, line_count INTEGER, doc_length INTEGER",
        functions,
    )
    _table(
        made,
        "classes",
        "class_id INTEGER PRIMARY KEY, module_id > modules, name TEXT, method_count INTEGER, base_count INTEGER, line_count INTEGER",
        classes,
    )


def _lines(node: Any) -> int:
    return int(node.end_lineno - node.lineno + 1)


def _doc(node: Any) -> int:
    return len(ast.get_docstring(node) or "")


def _science(made: sqlite3.Connection) -> None:
    from sklearn import datasets

    for load, parent, key, child, own, columns in (
        (datasets.load_iris, "species", "species", "flowers", "flower",
         {"sepal_length": 0, "sepal_width": 1, "petal_length": 2, "petal_width": 3}),
        (datasets.load_wine, "cultivars", "cultivar", "wines", "wine",
         {"alcohol": 0, "malic_acid": 1, "ash": 2, "magnesium": 4, "color_intensity": 9, "proline": 12}),
        (datasets.load_breast_cancer, "diagnoses", "diagnosis", "tumors", "tumor",
         {"radius": 0, "texture": 1, "perimeter": 2, "area": 3, "smoothness": 4}),
    ):  # fmt: skip
        data = load()
        names = [str(name).replace("class_", "cultivar ") for name in data.target_names]
        _table(made, parent, f"{key}_id INTEGER PRIMARY KEY, name TEXT", enumerate(names, 1))
        declared = ", ".join(f"{name} REAL" for name in columns)
        _table(
            made,
            child,
            f"{own}_id INTEGER PRIMARY KEY, {key}_id > {parent}, code TEXT, {declared}",
            (
                (n + 1, int(kind) + 1, f"{own} {n + 1}", *(float(row[place]) for place in columns.values()))
                for n, (row, kind) in enumerate(zip(data.data, data.target, strict=True))
            ),
        )


def _unicode(made: sqlite3.Connection) -> None:
    scripts: dict[str, int] = {}
    categories = {short: n for n, short in enumerate(CATEGORIES, 1)}
    rows: list[tuple[Any, ...]] = []
    for code in range(0x20, CHARACTERS):
        name, short = unicodedata.name(chr(code), ""), unicodedata.category(chr(code))
        script = name.split(" ")[0]
        if " " not in name or short not in categories or not script.isalpha():
            continue
        number = scripts.setdefault(script.lower(), len(scripts) + 1)
        size = len(chr(code).encode())
        rows.append((len(rows) + 1, number, categories[short], name.lower(), code, size, len(name)))
    _table(made, "scripts", "script_id INTEGER PRIMARY KEY, name TEXT", ((n, name) for name, n in scripts.items()))
    _table(
        made,
        "categories",
        "category_id INTEGER PRIMARY KEY, name TEXT",
        ((n, CATEGORIES[short]) for short, n in categories.items()),
    )
    _table(
        made,
        "characters",
        "character_id INTEGER PRIMARY KEY, script_id > scripts, category_id > categories, name TEXT, code_point INTEGER, "
        "byte_count INTEGER, name_length INTEGER",
        rows,
    )


def _web(made: sqlite3.Connection) -> None:
    from encodings.aliases import aliases
    from http import HTTPStatus
    from mimetypes import MimeTypes

    kinds = ("informational", "successful", "redirection", "client error", "server error")
    _table(made, "kinds", "kind_id INTEGER PRIMARY KEY, name TEXT", enumerate(kinds, 1))
    _table(
        made,
        "responses",
        "response_id INTEGER PRIMARY KEY, kind_id > kinds, name TEXT, status_code INTEGER, word_count INTEGER, description_length INTEGER",
        (
            (n, one.value // 100, one.phrase.lower(), one.value, len(one.phrase.split()), len(one.description))
            for n, one in enumerate(HTTPStatus, 1)
        ),
    )
    known = sorted(MimeTypes().types_map[True].items())  # of the standard library, not of this machine
    families = {name: n for n, name in enumerate(dict.fromkeys(kind.split("/")[0] for _, kind in known), 1)}
    _table(made, "families", "family_id INTEGER PRIMARY KEY, name TEXT", ((n, name) for name, n in families.items()))
    _table(
        made,
        "extensions",
        "extension_id INTEGER PRIMARY KEY, family_id > families, name TEXT, letter_count INTEGER, type_length INTEGER",
        (
            (n, families[kind.split("/")[0]], end, sum(map(str.isalpha, end)), len(kind))
            for n, (end, kind) in enumerate(known, 1)
        ),
    )
    encodings = {name: n for n, name in enumerate(sorted(set(aliases.values())), 1)}
    _table(
        made, "encodings", "encoding_id INTEGER PRIMARY KEY, name TEXT", ((n, name) for name, n in encodings.items())
    )
    _table(
        made,
        "spellings",
        "spelling_id INTEGER PRIMARY KEY, encoding_id > encodings, name TEXT, character_count INTEGER, digit_count INTEGER",
        (
            (n, encodings[meant], spelling, len(spelling), sum(map(str.isdigit, spelling)))
            for n, (spelling, meant) in enumerate(sorted(aliases.items()), 1)
        ),
    )


def _measures(made: sqlite3.Connection) -> None:
    from scipy.constants import physical_constants
    from sklearn import datasets

    scans = datasets.load_digits()
    names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    _table(made, "digits", "digit_id INTEGER PRIMARY KEY, name TEXT", enumerate(names, 1))
    _table(
        made,
        "scans",
        "scan_id INTEGER PRIMARY KEY, digit_id > digits, code TEXT, ink INTEGER, pixel_count INTEGER",
        (
            (n, int(kind) + 1, f"scan {n}", int(row.sum()), int((row > 0).sum()))
            for n, (row, kind) in enumerate(zip(scans.data, scans.target, strict=True), 1)
        ),
    )
    patients = datasets.load_diabetes(scaled=False)
    _table(made, "sexes", "sex_id INTEGER PRIMARY KEY, name TEXT", [(1, "sex 1"), (2, "sex 2")])
    _table(
        made,
        "patients",
        "patient_id INTEGER PRIMARY KEY, sex_id > sexes, code TEXT, age REAL, body_mass REAL, blood_pressure REAL, progression REAL",
        (
            (n, int(row[1]), f"patient {n}", *(float(row[place]) for place in (0, 2, 3)), float(goal))
            for n, (row, goal) in enumerate(zip(patients.data, patients.target, strict=True), 1)
        ),
    )
    constants = sorted((name.lower(), unit or "none") for name, (_, unit, _) in physical_constants.items())
    units = {name: n for n, name in enumerate(sorted({unit for _, unit in constants}), 1)}
    _table(made, "units", "unit_id INTEGER PRIMARY KEY, name TEXT", ((n, name) for name, n in units.items()))
    _table(
        made,
        "constants",
        "constant_id INTEGER PRIMARY KEY, unit_id > units, name TEXT, name_length INTEGER, word_count INTEGER",
        ((n, units[unit], name, len(name), len(name.split())) for n, (name, unit) in enumerate(constants, 1)),
    )


def _debian(made: sqlite3.Connection) -> None:
    sections: dict[str, int] = {}
    rows: list[tuple[Any, ...]] = []
    for paragraph in DPKG.read_text(encoding="utf-8", errors="replace").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in paragraph.splitlines() if ": " in line and line[0] != " ")
        if "Package" not in fields or not fields.get("Installed-Size", "").isdigit():
            continue
        section = sections.setdefault(fields.get("Section", "misc"), len(sections) + 1)
        needs = len([one for one in fields.get("Depends", "").split(",") if one.strip()])
        rows.append((len(rows) + 1, section, fields["Package"], int(fields["Installed-Size"]), needs))
    _table(made, "sections", "section_id INTEGER PRIMARY KEY, name TEXT", ((n, name) for name, n in sections.items()))
    _table(
        made,
        "packages",
        "package_id INTEGER PRIMARY KEY, section_id > sections, name TEXT, installed_size INTEGER, dependency_count INTEGER",
        rows,
    )

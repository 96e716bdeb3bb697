"""The bank of JavaScript tasks: complete, told by formulas, and libraries that are fetched once or asked for in a sentence."""

import json
import math
import re
import stat
import tomllib

import pytest
from tests.tools import needs

from assay.errors import InputError, MissingError
from assay.methods.code.geojseval import OUT_TYPES, compared, mutants
from assay.workloads.programs.geospatial import LIBRARIES, equals, libraries, sphere, tasks
from assay.workloads.programs.geospatial.task import Task, error, number, task


def test_the_bank_has_tasks_of_all_libraries_and_types():
    every = list(tasks().values())
    assert 40 <= len(every) <= 60
    assert {one.library for one in every} == set(LIBRARIES)
    assert {case.out_type for one in every for case in one.cases} == set(OUT_TYPES)
    assert len({one.entry_point for one in every if one.library == "turf"}) == sum(
        one.library == "turf" for one in every
    )
    for one in every:
        assert one.id.startswith(one.library)
        assert one.programs["reference"].startswith(f"{one.header} {{\n")
        assert one.prompt.endswith(f"{one.header} {{")
        assert any(not case.edge for case in one.cases)
        for case in one.cases:
            assert set(case.params) == set(one.parameters), one.id
            assert compared(case.out_type, case.expected, case.expected) == "right", one.id
            assert bool(case.looks) == bool(case.looks and case.out_type == "object")
            json.dumps(case.params)


def test_mutants_that_are_as_right_are_ones_that_are_made():
    for name, reasons in equals().items():
        made = [mutant.why for program in tasks()[name].programs.values() for mutant in mutants(program)]
        assert all(made.count(why) == 1 for why in reasons), name  # and no other is meant by it
        assert all(reason.strip() for reason in reasons.values())


def test_formulas_on_the_sphere():
    assert sphere.distance((0, 0), (90, 0)) == pytest.approx(sphere.EARTH * math.pi / 2)
    assert sphere.distance((10, 50), (10, 50)) == 0
    assert sphere.bearing((0, 0), (0, -5)) == 180
    there = sphere.destination((13, 52), 250_000, 77)
    assert sphere.distance((13, 52), there) == pytest.approx(250_000)
    assert sphere.bearing((13, 52), there) == pytest.approx(77)
    globe = 4 * math.pi * sphere.EARTH**2
    assert sphere.area([(0, 0), (90, 0), (90, 90), (0, 90), (0, 0)]) == pytest.approx(globe / 8)
    assert sphere.along([(0, 0), (0, 1), (0, 2)], sphere.EARTH * math.radians(1.5)) == pytest.approx([0, 1.5])
    assert sphere.along([(0, 0), (0, 1)], 1e9) == [0, 1]


def test_a_header_that_is_none_is_refused():
    with pytest.raises(InputError, match="the header must be"):
        Task("turf/x", "turf", "", "const f = ()", {}, ()).entry_point  # noqa: B018
    made = task(
        "x",
        "turf",
        "function f(a, b)",
        "Do.",
        "return a;",
        number(1, a=1, b=2),
        error("no", a=1, b=1),
        other_way="return b;",
    )
    assert (made.parameters, list(made.programs)) == (("a", "b"), ["reference", "other way"])
    assert made.cases[1].edge


def test_versions_are_pinned_and_the_lock_file_names_no_host():
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in libraries.versions().values())
    text = (libraries.HERE / "package-lock.json").read_text(encoding="utf-8")
    lock = json.loads(text)["packages"]
    assert "resolved" not in text
    assert "://" not in re.sub(r'"(url|funding|homepage)": *"[^"]*"', "", text)
    for name, version in libraries.versions().items():
        assert lock[f"node_modules/{name}"]["version"] == version
    assert all("integrity" in entry for place, entry in lock.items() if place)
    assert tomllib.loads((libraries.HERE.parent / "equals.toml").read_text(encoding="utf-8")) == equals()


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty cache, and a folder that is all there is to find programs in."""
    monkeypatch.setenv("ASSAY_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    libraries.node_modules.cache_clear()
    yield tmp_path
    libraries.node_modules.cache_clear()


def script(folder, name, text):
    path = folder / "bin" / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_what_is_missing_is_told_with_how_to_get_it(elsewhere):
    for name, message in (
        ("", "node is not installed .*apt install nodejs"),
        ("node", "npm is not installed .*apt install npm"),
    ):
        if name:
            script(elsewhere, name, "echo v20.18.1")
        with pytest.raises(MissingError, match=message):
            libraries.node_modules()
    script(elsewhere, "npm", "echo cannot reach it >&2; exit 1")
    with pytest.raises(MissingError, match=r"npm cannot fetch @turf/turf .*needs the network once\): cannot reach it"):
        libraries.node_modules()
    script(elsewhere, "node", "echo v18.20.0")
    with pytest.raises(MissingError, match=r"Node v18.20.0 is too old.* need 20.18"):
        libraries.node_modules()
    assert not any(path.name == "node_modules" for path in elsewhere.rglob("*"))


def test_libraries_are_fetched_once_and_by_the_lock_file(elsewhere):
    script(elsewhere, "node", "echo v22.1.0")
    log = elsewhere / "log"
    script(
        elsewhere,
        "npm",
        f'echo "$@" >> {log}\n/bin/ls -a >> {log}\n/bin/mkdir -p node_modules/jsts/dist\n: > node_modules/jsts/dist/jsts.min.js',
    )
    found = libraries.node_modules()
    assert (found / "assay-globals" / "jsts.min.js").is_file()
    libraries.node_modules.cache_clear()
    assert libraries.node_modules() == found
    assert found.name == "node_modules"
    assert (found / libraries.module_of("leaflet")).is_file()
    told = log.read_text()
    assert told.startswith("ci --ignore-scripts")
    assert told.count("ci ") == 1
    assert "package-lock.json" in told
    script(elsewhere, "npm", "exit 1")
    libraries.node_modules.cache_clear()
    assert libraries.node_modules() == found


def test_globals_are_programs():
    needs("node")
    import subprocess

    for library in LIBRARIES:
        path = libraries.HERE / "globals" / f"{library}.js"
        assert subprocess.run(["node", "--check", str(path)], check=False).returncode == 0

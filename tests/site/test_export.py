"""The pages as files: every link leads to a file, nothing asks a server."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from assay.cli.main import main
from assay.errors import InputError
from assay.site import export as exporting
from assay.site.export import SIGN, export
from assay.tuner.recipe import Recipe


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.ids = [], set()

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.found += [given[name] for name in ("href", "src") if given.get(name)]
        if given.get("id"):
            self.ids.add(given["id"])


def parsed(file):
    parser = Links()
    parser.feed(file.read_text(encoding="utf-8"))
    return parser


def test_every_link_leads_to_a_file_and_its_place(shelf, tmp_path):
    target = tmp_path / "with space" / "site"
    count = export(shelf.library(), target)
    files = [file for file in target.rglob("*") if file.is_file()]
    assert count == len(files) - 1 - len(list((target / "static").iterdir()))
    known = {file: parsed(file) for file in files if file.suffix == ".html"}
    assert {"index.html", "compare.html", "recipes.html", "machines.html", "guide.html"} <= {f.name for f in known}
    assert not (target / "audit.html").exists()  # it has nobody to ask
    assert ">Audit</a>" not in (target / "index.html").read_text(encoding="utf-8")
    for file, page in known.items():
        for link in page.found:
            if re.match(r"https?://|mailto:", link):
                continue
            assert not link.startswith("/"), (file, link)
            path, _, place = link.partition("#")
            to = (file.parent / path).resolve() if path else file
            assert to.is_file(), (file.name, link)
            if place and to.suffix == ".html" and to.name != "index.html":
                assert place in known[to].ids, (file.name, link)


def test_an_export_replaces_an_earlier_one_and_nothing_else(shelf, tmp_path):
    target = tmp_path / "site"
    export(shelf.library(), target)
    (target / "left.txt").write_text("x")
    export(shelf.library(), target)
    assert not (target / "left.txt").exists()
    assert json.loads((target / SIGN).read_text())["mark"] == shelf.library().mark
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.txt").write_text("three years")
    with pytest.raises(InputError, match="no earlier export"):
        export(shelf.library(), other)
    assert (other / "thesis.txt").read_text() == "three years"
    empty = tmp_path / "empty"
    empty.mkdir()
    export(shelf.library(), empty)


def test_the_data_beside_the_pages(shelf, tmp_path):
    export(shelf.library(), tmp_path / "site")
    paper = json.loads((tmp_path / "site/api/papers/xattention.json").read_text())
    assert {s["machine"] for claim in paper["claims"] for s in claim["seen"]} == {"mine", "better", "other"}
    assert (tmp_path / "site/charts/xattention/attention-speedup.svg").read_text().startswith("<svg xmlns=")
    assert len(json.loads((tmp_path / "site/api/papers.json").read_text())) == 138
    for id, found in shelf.library().tuned.items():
        assert json.loads((tmp_path / f"site/api/recipes/{id}.json").read_text())["goal"] == found.run.goal
        assert Recipe.read(tmp_path / f"site/recipes/{id}.toml").goal == found.run.goal
    assert {row["kind"] for row in json.loads((tmp_path / "site/api/compare.json").read_text())["rows"]} == {
        "paper",
        "recipe",
    }


def test_the_command(shelf, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("assay.site.library.Shelf", lambda: shelf)
    assert main(["site", "--export", str(tmp_path / "out"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["records"] == 5
    assert (tmp_path / "out" / "index.html").is_file()
    assert main(["site", "--json"]) == 2
    (tmp_path / "file").write_text("x")
    assert main(["site", "--export", str(tmp_path / "file")]) == 2


def test_an_export_through_a_link_fills_the_folder_it_leads_to(shelf, tmp_path):
    real = tmp_path / "Ümläute und Lücken"
    real.mkdir()
    (tmp_path / "link").symlink_to(real)
    for _ in range(2):
        export(shelf.library(), tmp_path / "link")
        assert (tmp_path / "link").is_symlink()
        assert (real / "index.html").is_file()


def test_an_export_from_a_package_that_is_read_only(shelf, tmp_path, monkeypatch):
    static = tmp_path / "static"
    static.mkdir()
    for file in exporting.STATIC.iterdir():
        (static / file.name).write_bytes(file.read_bytes())
        (static / file.name).chmod(0o444)
    static.chmod(0o555)
    monkeypatch.setattr(exporting, "STATIC", static)
    export(shelf.library(), tmp_path / "site")
    found = tmp_path / "site" / "static"
    assert found.stat().st_mode & 0o200
    assert all(file.stat().st_mode & 0o200 for file in found.iterdir())
    assert {file.name for file in found.iterdir()} == {f.name for f in static.iterdir()} - {"htmx.min.js"}


@pytest.mark.parametrize("place", ["link to nowhere", "a/file/below"])
def test_an_export_into_what_can_be_no_folder(shelf, tmp_path, monkeypatch, capsys, place):
    monkeypatch.setattr("assay.site.library.Shelf", lambda: shelf)
    (tmp_path / "link to nowhere").symlink_to(tmp_path / "gone" / "gone")
    (tmp_path / "a").write_text("x")
    code = main(["site", "--export", str(tmp_path / place)])
    assert code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("assay: --export must name a folder")

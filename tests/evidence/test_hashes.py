"""Staleness: what makes a record older than its code, and what does not."""

import textwrap

import pytest
from evidence_maker import make

from assay.evidence import hashes

SOURCE = '''
"""A module."""
from assay.methods import something
import torch

from assay.experiments.core import experiment

LIMIT = 3  # blocks


def helper(x: int) -> int:
    """Twice."""
    return 2 * x


@experiment("toy/one", points={})
def one():
    """The first."""
    return helper(1)


@experiment("toy/two", points={})
def two():
    return helper(2)
'''


def same(before, after, claim=""):
    return hashes.normalised(before, claim) == hashes.normalised(after, claim)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"""Twice."""', '"""Two times, reworded."""'),
        ("  # blocks", "  # how many blocks at most"),
        ("    return 2 * x", "    return 2*x"),
        ("from assay.methods import something", "from assay.methods.core.moved import something"),
        ('    """Twice."""\n', ""),
    ],
)
def test_rewording_and_moving_make_nothing_stale(old, new):
    assert SOURCE.replace(old, new) != SOURCE
    assert same(SOURCE, SOURCE.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("LIMIT = 3", "LIMIT = 4"),
        ("2 * x", "2 + x"),
        ("import torch", "import numpy"),
        ("x: int) -> int", "x: int, y=1) -> int"),
    ],
)
def test_what_changes_the_result_does(old, new):
    assert not same(SOURCE, SOURCE.replace(old, new))


def test_another_claims_experiment_counts_for_that_claim_alone():
    changed = SOURCE.replace("helper(2)", "helper(3)")
    assert same(SOURCE, changed, "toy/one")
    assert not same(SOURCE, changed, "toy/two")
    assert not same(SOURCE, SOURCE.replace("2 * x", "3 * x"), "toy/one")  # what they share counts for both


def test_native_sources_count_without_comments_and_white_space(tmp_path):
    def of(text):
        file = tmp_path / f"{abs(hash(text))}.cpp"
        file.write_text(textwrap.dedent(text))
        return hashes.of_file(file)

    assert of("int f() { return 1; }") == of("// one\nint f() {\n  return 1; /* it is */\n}\n")
    assert of("int f() { return 1; }") != of("int f() { return 2; }")


def test_a_record_is_stale_when_something_it_ran_has_changed(monkeypatch):
    import assay.experiments.attention.xattention  # noqa: F401
    from assay.methods.core import kernels

    found = hashes.of_this_process("xattention/perplexity")
    assert {"assay.methods.attention.xattention", "assay.experiments.attention.xattention", "package torch"} <= set(
        found
    )
    assert not any(name.startswith(("assay.cli", "assay.evidence", "assay.tuner")) for name in found)
    record = make(claim="xattention/perplexity", hashes=found)
    assert not hashes.is_stale(record)
    for name in ("assay.methods.attention.xattention", "assay.experiments.attention.xattention", "package torch"):
        changed = make(claim="xattention/perplexity", hashes={**found, name: "0" * 10})
        assert hashes.changes(changed) == [name]
    moved = make(hashes={"assay.methods.elsewhere": found["assay.methods.attention.xattention"]})
    assert not hashes.is_stale(moved)  # the file has another place, and does the same
    assert hashes.changes(make(hashes={})) == ["it was made before records held hashes"]
    if kernels.load("w8a8"):
        native = hashes.of_this_process("xattention/perplexity")
        assert any(name.endswith("csrc/w8a8.cpp") for name in native)
        assert any(name.endswith("csrc/panels.h") for name in native)
        assert not hashes.is_stale(make(claim="xattention/perplexity", hashes=native))


def test_programs_of_a_bank_count_though_nothing_imports_them(monkeypatch, tmp_path):
    import assay.workloads.programs.task  # noqa: F401

    folder = hashes.BANKS["assay.workloads.programs.task"]
    found = hashes.of_this_process("enamel/eff-at-1")
    assert f"bank {folder}" in found
    assert not hashes.is_stale(make(claim="enamel/eff-at-1", hashes=found))
    changed = make(claim="enamel/eff-at-1", hashes={**found, f"bank {folder}": "0" * 10})
    assert hashes.changes(changed) == [f"bank {folder}"]
    assert hashes.is_stale(make(claim="enamel/eff-at-1", hashes={"bank ../../../etc": "0" * 10}))
    for name, text in (("000.py", "x = 1"), ("001.py", "x = 2")):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(hashes, "PACKAGE", tmp_path.parent)
    before = hashes._bank.__wrapped__(tmp_path.name)
    (tmp_path / "001.py").rename(tmp_path / "002.py")
    assert hashes._bank.__wrapped__(tmp_path.name) != before


def test_files_of_other_languages_that_are_sent_and_not_imported_count(monkeypatch, tmp_path):
    import assay.methods.code.geojseval.running
    import assay.workloads.programs.mpi  # noqa: F401

    found = hashes.of_this_process("geojseval/warm-speedup")
    for place in hashes.BANKS.values():
        assert (hashes.PACKAGE / place).exists(), place
    for place in (
        "methods/core/programs/node_worker.js",
        "methods/code/geojseval/one_process.js",
        "workloads/programs/mpi/bank",
    ):
        assert f"bank {place}" in found
    monkeypatch.setattr(hashes, "PACKAGE", tmp_path)
    (tmp_path / "worker.js").write_text("const one = 1")
    before = hashes._bank.__wrapped__("worker.js")
    (tmp_path / "worker.js").write_text("const one = 2")
    assert hashes._bank.__wrapped__("worker.js") != before


# ---- hashes that are kept ----


@pytest.fixture
def counted(monkeypatch):
    """How often a source was really hashed."""
    real, calls = hashes.normalised, []
    monkeypatch.setattr(hashes, "normalised", lambda source, claim="": calls.append(claim) or real(source, claim))
    return calls


def test_a_kept_hash_is_that_of_the_same_text_and_claim(tmp_path, counted):
    file = tmp_path / "hashes" / "known.json"
    first = hashes._Known(file)
    wanted = {claim: first.of(SOURCE, claim) for claim in ("", "toy/one", "toy/two")}
    assert len(set(wanted.values())) == 3
    first.write()
    second = hashes._Known(file)
    assert {claim: second.of(SOURCE, claim) for claim in wanted} == wanted
    assert len(counted) == 3
    changed = SOURCE.replace("LIMIT = 3", "LIMIT = 4")
    assert second.of(changed, "") != wanted[""]
    assert len(counted) == 4


@pytest.mark.parametrize("content", ["", "[]", '{"a": ', "null", '{"' + "0" * 20 + '": 3}'])
def test_a_broken_file_costs_time_only(tmp_path, content):
    file = tmp_path / "known.json"
    file.write_text(content)
    known = hashes._Known(file)
    assert known.of(SOURCE, "") == hashes._digest(hashes.normalised(SOURCE))
    known.write()
    assert hashes._Known(file).kept == known.kept


def test_a_value_that_is_no_text_is_made_again(tmp_path, counted):
    known = hashes._Known(tmp_path / "known.json")
    known.of(SOURCE, "")
    known.kept = dict.fromkeys(known.kept, 3)
    assert known.of(SOURCE, "") == hashes._digest(hashes.normalised(SOURCE))


def test_a_folder_that_cannot_be_written_costs_time_only(tmp_path):
    for file in (tmp_path / "away" / "hashes" / "known.json", tmp_path / "a file" / "known.json"):
        (tmp_path / "a file").write_text("")
        known = hashes._Known(file)
        known.of(SOURCE, "")
        known.write()
        assert not file.exists()


def test_what_is_no_longer_used_goes_when_there_is_much_of_it(tmp_path, monkeypatch):
    file = tmp_path / "known.json"
    known = hashes._Known(file)
    for number in range(5):
        known.of(f"x = {number}", "")
    known.write()
    assert len(hashes._Known(file).kept) == 5
    monkeypatch.setattr(hashes, "MOST_KEPT", 5)
    last = hashes._Known(file)
    last.of("x = 0", "")
    last.of("x = 9", "")
    last.write()
    assert len(hashes._Known(file).kept) == 2

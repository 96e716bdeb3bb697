"""A proof is left out only while all that it reads is as it was when it passed."""

from types import SimpleNamespace

import pytest
from tests import conftest, proofs

from assay.evidence import hashes

SVG2 = proofs.ROOT / "tests/experiments/attention/test_svg2_proof.py"
BASED = proofs.ROOT / "tests/experiments/mixers/test_based_proof.py"
SOURCE = proofs.ROOT / "src/assay"


def test_it_reads_the_room_the_judges_and_the_cores_below():
    files, slugs = proofs.reads(SVG2)
    read = {file.relative_to(proofs.ROOT).as_posix() for file in files}
    assert slugs == ["svg2"]
    assert {
        "tests/experiments/attention/test_svg2_proof.py",
        "tests/properties/sabotage.py",
        "src/assay/experiments/attention/svg2.py",
        "src/assay/experiments/core.py",
        "src/assay/evidence/verdict.py",
        "src/assay/measure/stats.py",
        "src/assay/methods/core/attention/plan.py",
    } <= read
    assert any(name.startswith("src/assay/methods/attention/svg2") for name in read)
    assert not any("mixers/based" in name or "assay/site" in name for name in read)


@pytest.mark.parametrize("proof", proofs.proofs(), ids=lambda file: file.stem)
def test_every_proof_reads_experiments_of_the_papers_it_names(proof):
    files, slugs = proofs.reads(proof)
    assert slugs, "no claim is named in it"
    for slug in slugs:
        assert any(slug in file.parts or file.stem == slug for file in files if "experiments" in file.parts), slug


def with_changed(monkeypatch, file):
    """The hashes of both proofs after a change in one file."""
    honest = hashes.of_file
    with monkeypatch.context() as patch:
        patch.setattr(hashes, "of_file", lambda one: "changed" if one == file else honest(one))
        return proofs.hash_of(SVG2), proofs.hash_of(BASED)


def test_what_it_reads_changes_its_hash_and_nothing_else_does(monkeypatch):
    svg2, based = proofs.hash_of(SVG2), proofs.hash_of(BASED)
    changed, same = with_changed(monkeypatch, SOURCE / "experiments/attention/svg2.py")
    assert changed != svg2
    assert same == based
    both = with_changed(monkeypatch, SOURCE / "evidence/verdict.py")
    assert both[0] != svg2
    assert both[1] != based
    assert with_changed(monkeypatch, SOURCE / "cli/main.py") == (svg2, based)


def test_only_what_passed_on_these_sources_is_unchanged(monkeypatch, tmp_path):
    monkeypatch.setattr(proofs, "KNOWN", tmp_path / "proofs.json")
    assert proofs.unchanged() == set()
    svg2, based = proofs.name_of(SVG2), proofs.name_of(BASED)
    proofs.keep({svg2, based, "tests/experiments/attention/test_gone_proof.py"}, set())
    assert proofs.unchanged() == {svg2, based}
    proofs.keep(set(), {based})
    assert proofs.unchanged() == {svg2}
    honest = hashes.of_file
    monkeypatch.setattr(hashes, "of_file", lambda one: "changed" if one == SVG2 else honest(one))
    assert proofs.unchanged() == set()


def test_left_out_are_those_files_and_no_others(monkeypatch):
    config = SimpleNamespace(rootpath=proofs.ROOT)
    monkeypatch.setattr(conftest, "_left_out", {proofs.name_of(SVG2)})
    assert conftest.pytest_ignore_collect(SVG2, config)
    assert not conftest.pytest_ignore_collect(BASED, config)
    assert "1 proofs" in conftest.pytest_report_header(config)


@pytest.mark.parametrize(
    ("outcomes", "kept"), [({"passed"}, True), ({"passed", "failed"}, False), ({"passed", "skipped"}, False)]
)
def test_what_failed_or_was_skipped_is_not_kept(monkeypatch, tmp_path, outcomes, kept):
    monkeypatch.setattr(proofs, "KNOWN", tmp_path / "proofs.json")
    monkeypatch.setattr(conftest, "_outcomes", {proofs.name_of(SVG2): outcomes, "tests/test_pages.py": {"passed"}})
    conftest._keep_proofs()
    assert proofs.unchanged() == ({proofs.name_of(SVG2)} if kept else set())

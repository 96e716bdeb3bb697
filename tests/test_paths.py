"""Whole or not at all."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

import assay
from assay.paths import atomic_dir, atomic_file


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_failed_write_leaves_the_old_folder(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a").write_text("old")
    with pytest.raises(RuntimeError), atomic_dir(folder) as temporary:
        (temporary / "a").write_text("half")
        raise RuntimeError
    assert (folder / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_a_new_folder_replaces_the_old_one_whole(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a").write_text("old")
    with atomic_dir(folder) as temporary:
        (temporary / "b").write_text("new")
    assert {p.name for p in folder.iterdir()} == {"b"}
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_import_assay_is_light():
    code = "import sys, assay; assert 'torch' not in sys.modules; print(assay.__version__)"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == assay.__version__
    assert time.perf_counter() - start < 10  # the light import itself is asserted above; this only catches a hang

"""Whole or not at all."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.properties.apart import python

import assay
from assay import paths
from assay.errors import InputError
from assay.paths import atomic_dir, atomic_file, output_file, scratch_dir


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
    assert python(code) == assay.__version__
    assert time.perf_counter() - start < 10  # the light import itself is asserted above; this only catches a hang


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").write_text("old")
    (tmp_path / "link").symlink_to("real/file")
    with atomic_file(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "file").read_text() == "new"


def test_devices_and_folders_are_not_written_over(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to-device").symlink_to("/dev/null")
    for path, says in [
        (tmp_path / "pipe", "device or a pipe"),
        (tmp_path / "to-device", "device or a pipe"),
        (Path("/dev/full"), "device or a pipe"),
        (tmp_path, "is a folder"),
    ]:
        with pytest.raises(InputError, match=says), atomic_file(path):
            pass
        with pytest.raises(InputError, match=f"--html must name a.*{says}"):
            output_file(path, "--html")


def test_output_files_are_checked_without_leaving_anything(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert output_file("~/new/deep/file", "--html") == tmp_path / "new" / "deep" / "file"
    (tmp_path / "file").write_text("kept")
    assert output_file(tmp_path / "file", "--html") == tmp_path / "file"
    with pytest.raises(InputError, match=r"--html: .*file is not a folder"):
        output_file(tmp_path / "file" / "below", "--html")
    with pytest.raises(InputError, match=r"--html: no home folder is known for ~nosuchuser, got '~nosuchuser/x'"):
        output_file("~nosuchuser/x", "--html")
    monkeypatch.setattr(
        paths.tempfile, "mkdtemp", lambda **_: (_ for _ in ()).throw(OSError(30, "Read-only file system"))
    )
    with pytest.raises(InputError, match="--html: cannot write into .*: Read-only file system"):
        output_file(tmp_path / "file", "--html")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("variable", ["ASSAY_CACHE_DIR", "ASSAY_DATA_DIR"])
def test_folders_that_cannot_be_are_named(tmp_path, monkeypatch, variable):
    find = {"ASSAY_CACHE_DIR": paths.cache_dir, "ASSAY_DATA_DIR": paths.data_dir}[variable]
    monkeypatch.setenv(variable, "~nosuchuser/x")
    with pytest.raises(InputError, match=f"{variable}: no home folder is known for ~nosuchuser"):
        find()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(variable, str(tmp_path / "file"))
    with pytest.raises(InputError, match=f"{variable} must name a folder, got the file"):
        find()


LEAVES = """
import os, signal, sys
from assay.paths import {kind}
with {kind}({path!r}) as temporary:
    (temporary / "part" if temporary.is_dir() else temporary).write_text("half")
    print("ready", flush=True)
    sys.stdin.read()
"""


def unfinished(kind, path):
    """A process in the middle of writing `path`."""
    process = subprocess.Popen(
        [sys.executable, "-c", LEAVES.format(kind=kind, path=str(path))],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(assay.__file__).parents[1])},
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(("kind", "write"), [("atomic_file", atomic_file), ("atomic_dir", atomic_dir)])
def test_what_killed_processes_left_goes_and_what_living_ones_write_stays(tmp_path, kind, write):
    path = tmp_path / "a"
    killed, living = unfinished(kind, path), unfinished(kind, path)
    killed.kill()
    killed.wait()
    other = unfinished(kind, tmp_path / "a.b")  # the same beginning, another output
    other.kill()
    other.wait()
    assert len(list(tmp_path.iterdir())) == 3
    with write(path) as temporary:
        (temporary / "part" if temporary.is_dir() else temporary).write_text("new")
    assert len(list(tmp_path.iterdir())) == 3  # the output, the living one's and that of "a.b"
    assert len(list(tmp_path.glob(".a.b.*"))) == 1
    living.communicate("")  # it ends in peace
    assert living.returncode == 0
    assert (path / "part" if path.is_dir() else path).read_text() == "half"
    assert sorted(p.name[:5] for p in tmp_path.iterdir()) == [".a.b.", "a"]


def test_clearing_up_follows_no_link_and_touches_no_other_users_folder(tmp_path, monkeypatch):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("kept")
    (tmp_path / "x-abcdefgh.tmp").symlink_to("precious")
    (tmp_path / "x-12345678.tmp").write_text("a file")
    (tmp_path / "x-dead____.tmp").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: 12345)
        with scratch_dir(tmp_path, "x-"):
            assert (tmp_path / "x-dead____.tmp").is_dir()
    with scratch_dir(tmp_path, "x-") as folder:
        assert folder.is_dir()
        assert not (tmp_path / "x-dead____.tmp").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["precious", "x-12345678.tmp", "x-abcdefgh.tmp"]
    assert (tmp_path / "precious" / "file").read_text() == "kept"


def test_a_folder_taken_for_a_dead_owners_before_it_is_locked_is_given_up(tmp_path, monkeypatch):
    """Another process clears up between the making of the folder and its lock."""
    real, taken = os.open, []

    def late(path, flags, *rest, **options):
        if str(path).endswith(".tmp") and not taken:
            taken.append(path)
            opened = real(path, flags, *rest, **options)
            os.rmdir(path)
            return opened
        return real(path, flags, *rest, **options)

    monkeypatch.setattr(paths.os, "open", late)
    with scratch_dir(tmp_path, "x-") as folder:
        assert folder.is_dir()
        assert str(folder) != str(taken[0])


def test_a_kill_between_the_two_renames_does_not_lose_the_old_folder(tmp_path):
    left = tmp_path / ".a.abcdefgh.tmp"
    (left / "old").mkdir(parents=True)
    (left / "old" / "file").write_text("old")
    with pytest.raises(RuntimeError), atomic_dir(tmp_path / "a"):
        raise RuntimeError  # the new folder does not come about, and the old one is there again
    assert (tmp_path / "a" / "file").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("together", [True, False])
def test_many_files_are_put_on_disk_by_one_call_where_there_is_one(tmp_path, monkeypatch, together):
    """Each file of a folder of thousands waits for the disk otherwise."""
    alone, at_once = [], []
    real = os.fsync
    monkeypatch.setattr(paths.os, "fsync", lambda descriptor: alone.append(descriptor) or real(descriptor))
    monkeypatch.setattr(paths, "_sync_file_system", lambda folder: at_once.append(folder) or together)
    for count, files in ((1, 5), (2, paths.MANY + 1)):
        alone.clear()
        at_once.clear()
        with atomic_dir(tmp_path / str(count)) as folder:
            (folder / "below").mkdir()
            for number in range(files):
                (folder / "below" / str(number)).write_text("x")
        assert len(list((tmp_path / str(count) / "below").iterdir())) == files
        many = files > paths.MANY
        assert len(at_once) == many
        assert len(alone) == 1 + (0 if many and together else files)  # 1: the folder that holds it


def test_a_disk_that_takes_not_everything_leaves_the_old_folder(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").write_text("old")

    def full(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(paths, "_sync_file_system", full)
    with pytest.raises(OSError, match="No space"), atomic_dir(tmp_path / "a") as folder:
        for number in range(paths.MANY + 1):
            (folder / str(number)).write_text("x")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.skipif(sys.platform != "linux", reason="the call is Linux's")
def test_the_call_for_a_whole_file_system(tmp_path):
    assert paths._sync_file_system(tmp_path) is True
    with pytest.raises(OSError, match="No such file"):
        paths._sync_file_system(tmp_path / "none")

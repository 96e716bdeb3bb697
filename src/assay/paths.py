"""Where assay keeps its files, and how it writes them: completely or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import platformdirs

from assay.errors import InputError

try:
    import fcntl
except ImportError:  # no such locks on this system: what a killed process left is then not cleared away
    fcntl = None  # type: ignore[assignment]


MANY = 100  # files, from which on one call for the whole file system is cheaper than one for each


def cache_dir() -> Path:
    """Files that can be recreated: converted models, compiled kernels, calibrations. `ASSAY_CACHE_DIR` overrides."""
    return _made("ASSAY_CACHE_DIR", platformdirs.user_cache_dir("assay"))


def data_dir() -> Path:
    """Files that cannot be recreated: the evidence store. `ASSAY_DATA_DIR` overrides."""
    return _made("ASSAY_DATA_DIR", platformdirs.user_data_dir("assay"))


def _made(variable: str, default: str) -> Path:
    path = expanded(os.environ.get(variable) or default, variable)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise InputError(f"{variable} must name a folder, got the file {path}") from None
    return path


def expanded(path: Path | str, name: str) -> Path:
    """`path` with a leading `~` or `~user` replaced by that home folder. Raises InputError, naming `name`, for an unknown user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        user = Path(path).parts[0]
        raise InputError(f"{name}: no home folder is known for {user}, got {str(path)!r}") from None


def output_file(path: Path | str, name: str) -> Path:
    """`path`, `~` expanded, as a file that `atomic_file` can write.

    Raises InputError, naming `name`, for anything else, before hours of measuring rather than after them.
    """
    given = expanded(path, name)
    target = _target(given, name)
    folder = target.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise InputError(f"{name}: {folder} is not a folder, so that {path} cannot be written")
    try:
        with scratch_dir(folder, ".assay-check."):
            pass
    except OSError as error:
        raise InputError(f"{name}: cannot write into {folder}: {error.strerror}") from None
    return given


def output_folder(path: Path | str, name: str) -> Path:
    """The folder that will be written into, made if it is not there. Raises InputError, naming the option `name`, when it cannot be."""
    folder = expanded(path, name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{name} must name a folder that can be written into, got {path}: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise InputError(f"{name} must name a folder that can be written into, got {path}")
    return folder


def _target(path: Path | str, name: str) -> Path:
    """Where writing `path` really goes: through links, but never over a folder or a device."""
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise InputError(f"{name} must name a file, {path} is a folder")
    if target.exists() and not target.is_file():
        raise InputError(f"{name} must name a regular file, {path} is a device or a pipe")
    return target


@contextlib.contextmanager
def atomic_file(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path on the file system of `path`; on success it is fsynced and takes the place of `path`.

    On any error `path` is unchanged. A link stays a link; the file it leads to is replaced. Raises InputError for a folder, a
    device or a pipe.
    """
    target = _target(path, "the output")
    target.parent.mkdir(parents=True, exist_ok=True)
    with scratch_dir(target.parent, f".{target.name}.") as scratch:
        temporary = scratch / target.name
        temporary.touch()
        yield temporary
        _fsync(temporary)
        os.replace(temporary, target)
        _fsync(target.parent)


@contextlib.contextmanager
def atomic_dir(path: Path | str) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success every file in it is put on disk and the folder takes `path`'s place."""
    target = Path(os.path.abspath(path))
    target.parent.mkdir(parents=True, exist_ok=True)

    def rescue(left: Path) -> None:
        """A process killed between the two renames below has left nothing at `path`: put the old folder back."""
        if (left / "old").is_dir() and not target.exists():
            os.replace(left / "old", target)

    with scratch_dir(target.parent, f".{target.name}.", before_removal=rescue) as scratch:
        temporary, old = scratch / "new", scratch / "old"
        temporary.mkdir()
        try:
            yield temporary
            _sync_files(temporary)
            if target.exists():
                os.replace(target, old)
            os.replace(temporary, target)
            _fsync(target.parent)
        finally:
            rescue(scratch)


@contextlib.contextmanager
def scratch_dir(
    parent: Path | str, prefix: str, *, before_removal: Callable[[Path], None] | None = None
) -> Iterator[Path]:
    """Yield a new folder in `parent`, named `prefix`, some letters and ".tmp", that is removed in the end.

    Folders that killed processes left in `parent` under that prefix are removed first (`before_removal` is called with each such
    folder). A folder belongs to a living owner as long as the owner holds its lock, which ends with the process however it
    ends. Only folders of this user are touched, and links are not followed.
    """
    parent = Path(parent)
    _clear_left(parent, prefix, before_removal)
    folder, lock = _claimed(parent, prefix)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _claimed(parent: Path, prefix: str) -> tuple[Path, int]:
    """A new folder and its lock. If another process takes the folder for a dead owner's before it is locked, another is made."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, suffix=".tmp", dir=parent))
        try:
            lock = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue
        if fcntl is None:
            return folder, lock
        with contextlib.suppress(OSError):  # a file system without locks: then nobody else gets one either
            fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            return folder, lock
        os.close(lock)


def _clear_left(parent: Path, prefix: str, before_removal: Callable[[Path], None] | None) -> None:
    if fcntl is None:
        return
    try:
        names = os.listdir(parent)
    except OSError:
        return
    ours = re.compile(re.escape(prefix) + r"\w+\.tmp")  # what mkdtemp makes of it; "a" does not clear up for "a.b"
    for name in [os.path.join(parent, name) for name in names if ours.fullmatch(name)]:
        with contextlib.suppress(OSError):  # not a folder, not ours, still in use, or gone meanwhile
            lock = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(lock).st_uid == os.geteuid():
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if before_removal is not None:
                        before_removal(Path(name))
                    shutil.rmtree(name)
            finally:
                os.close(lock)


def _sync_files(folder: Path) -> None:
    """Put every file of a folder on disk: many by one call for the whole file system, where there is such a call (Linux)."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    if len(files) > MANY and _sync_file_system(folder):
        return
    for file in files:
        _fsync(file)


def _sync_file_system(folder: Path) -> bool:
    """Whether the file system that a folder is on could be asked to put everything on disk, and has."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None) if sys.platform == "linux" else None
    if call is None:
        return False
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if call(descriptor) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(folder))
        return True
    finally:
        os.close(descriptor)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

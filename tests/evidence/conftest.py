"""A real PostgreSQL server for the store's tests, where its programs are installed."""

import glob
import os
import shutil
import socket
import subprocess
import tempfile
import time
import uuid
from pathlib import Path

import pytest

SERVER_ACCOUNTS = ("postgres", "nobody")  # PostgreSQL refuses to run as root


def _programs():
    """(initdb, postgres) or None."""
    folders = [*sorted(glob.glob("/usr/lib/postgresql/*/bin"), reverse=True), *os.environ["PATH"].split(":")]
    for folder in folders:
        found = [Path(folder) / name for name in ("initdb", "postgres")]
        if all(os.access(path, os.X_OK) for path in found):
            return [str(path) for path in found]
    return None


def _as_other_user(folder):
    """The words before a command that run it as somebody who is not root; None if that cannot be done."""
    if os.getuid() != 0:
        return []
    setpriv = shutil.which("setpriv")
    for account in SERVER_ACCOUNTS:
        try:
            shutil.chown(folder, account, "nogroup")
        except (LookupError, PermissionError):
            continue
        if setpriv:
            return [setpriv, f"--reuid={account}", "--regid=nogroup", "--clear-groups"]
    return None


@pytest.fixture(scope="session")
def postgres_server():
    """The URL of a server on loopback, without a database name."""
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'assay[postgres]'")
    programs = _programs()
    if programs is None:
        pytest.skip("no PostgreSQL server programs (initdb, postgres) on this machine")
    folder = Path(tempfile.mkdtemp(prefix="assay-pg-"))
    process = None
    try:
        user = _as_other_user(folder)
        if user is None:
            pytest.skip("PostgreSQL does not run as root, and setpriv cannot change the user here")
        initdb, postgres = programs
        data = folder / "data"
        common = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": folder}
        made = subprocess.run(
            [*user, initdb, "-D", data, "-U", "assay", "-A", "trust", "-E", "UTF8", "--no-sync"], **common
        )
        if made.returncode:
            pytest.skip(f"initdb does not work here: {made.stdout.strip().splitlines()[-1]}")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        options = ["-D", data, "-h", "127.0.0.1", "-p", str(port), "-k", folder, "-F"]
        with open(folder.parent / f"{folder.name}.log", "w+") as log:
            process = subprocess.Popen([*user, postgres, *options], stdout=log, stderr=log, cwd=folder)
            _wait(port, process)
            yield f"postgresql://assay@127.0.0.1:{port}"
    finally:
        if process is not None:
            process.terminate()
            process.wait(30)
        shutil.rmtree(folder, ignore_errors=True)
        (folder.parent / f"{folder.name}.log").unlink(missing_ok=True)


def _wait(port, process):
    import psycopg

    for _ in range(300):
        try:
            psycopg.connect(f"host=127.0.0.1 port={port} user=assay dbname=postgres", connect_timeout=2).close()
            return
        except psycopg.OperationalError:
            assert process.poll() is None, "the PostgreSQL server ended by itself"
            time.sleep(0.1)
    raise AssertionError("the PostgreSQL server did not answer within 30 seconds")


@pytest.fixture
def postgres_url(postgres_server):
    """The URL of a fresh database."""
    import psycopg

    name = f"t{uuid.uuid4().hex}"
    with psycopg.connect(f"{postgres_server}/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return f"{postgres_server}/{name}"


@pytest.fixture(params=["sqlite", "postgres"])
def url(request, tmp_path):
    """A store's URL, of either kind."""
    if request.param == "postgres":
        return request.getfixturevalue("postgres_url")
    return f"sqlite:///{tmp_path / 'store' / 'evidence.db'}"

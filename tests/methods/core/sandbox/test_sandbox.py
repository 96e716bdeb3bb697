"""Escape attempts, one after the other: each program says what it got, and none gets anything."""

import json
import os
import socket
import textwrap
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from assay.methods.core import sandbox as room
from assay.methods.core.sandbox import Limits, Sandbox, SandboxMissing, protections, runner

LIMITS = Limits(wall_seconds=20, cpu_seconds=10)


@pytest.fixture(scope="module")
def sandbox():
    if not protections().full:
        assert not os.environ.get("ASSAY_TEST_ALL"), protections().missing
        pytest.skip(protections().missing[0])
    return Sandbox(LIMITS)


def said(sandbox, source, **more):
    """The JSON that a program prints."""
    ran = sandbox.python(textwrap.dedent(source), **more)
    assert ran.ok, (ran.ended, ran.returncode, ran.stderr.decode()[-2000:])
    return json.loads(ran.text)


def left_over(mark):
    """Processes of this machine whose command line holds `mark`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "cmdline").read_bytes():
                found.append(folder.name)
        except OSError:
            continue
    return found


def test_a_program_runs_and_says_what_it_does(sandbox):
    ran = sandbox.python(
        "import sys; print(int(sys.stdin.read()) * 2); print('e', file=sys.stderr); sys.exit(3)", stdin=b"21"
    )
    assert (ran.ended, ran.returncode, ran.text, ran.stderr) == ("exit", 3, "42\n", b"e\n")
    assert not ran.ok
    assert 0 < ran.cpu_seconds < 10
    assert ran.seconds > 0
    assert sandbox.run(["/bin/sh", "-c", "echo $0 $1", "a", "b; echo c"]).text == "a b; echo c\n"
    crashed = sandbox.python("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    assert crashed.ended == "signal" or crashed.returncode == -11


def test_files_go_in_and_come_out(sandbox):
    ran = sandbox.python(
        "open('out/b.txt', 'w').write(open('in/a.txt').read() * 2)",
        files={"in/a.txt": "é", "out/x": b""},
        collect=("out/b.txt", "nothing", "in"),
    )
    assert ran.ok, ran.stderr
    assert ran.files == {"out/b.txt": "éé".encode()}
    for name in ("../x", "/etc/x", "", "a/../../b", "a\0b"):
        with pytest.raises(ValueError, match="relative names"):
            sandbox.run(["true"], files={name: "x"})
        with pytest.raises(ValueError, match="relative names"):
            sandbox.run(["true"], collect=(name,))


def test_it_cannot_write_outside(sandbox, tmp_path):
    target = tmp_path / "mine"
    target.write_text("mine")
    os.chmod(tmp_path, 0o777)
    tried = [
        "/usr/x",
        "/x",
        "/etc/passwd",
        str(target),
        str(Path(room.__file__)),
        "/proc/sys/kernel/hostname",
        "/dev/x",
        "/dev/mem",
    ]
    source = f"""
        import json
        wrote = []
        for path in {tried!r}:
            try:
                open(path, "a").write("x")
                wrote.append(path)
            except OSError:
                pass
        print(json.dumps(wrote))
    """
    assert said(sandbox, source) == []
    assert target.read_text() == "mine"


def test_it_reads_nothing_of_ours(sandbox, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "s3cret")
    (tmp_path / "key").write_text("s3cret")
    found = said(
        sandbox,
        f"""
        import json, os
        seen = dict(os.environ)
        for path in ("/root", "/home", "/etc/shadow", "/var", {str(tmp_path)!r}, "/run", "/proc/1/environ", "/proc/self/environ"):
            try:
                seen[path] = os.listdir(path) if os.path.isdir(path) else open(path, "rb").read().decode("latin1")
            except OSError:
                pass
        print(json.dumps(seen))
        """,
    )
    assert "s3cret" not in json.dumps(found)
    assert "/etc/shadow" not in found
    assert str(tmp_path) not in found
    assert {name for name in found if not name.startswith("/")} <= {*runner._environment(), "LC_CTYPE", "PWD"}


class Answers(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked += 1
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


def test_it_reaches_nobody_and_itself(sandbox):
    """Our own server on loopback is not to be seen; a server inside is."""
    ours = HTTPServer(("127.0.0.1", 0), Answers)
    ours.asked = 0
    thread = threading.Thread(target=ours.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        found = said(
            sandbox,
            f"""
            import json, socket, threading
            got = []
            for address in (("127.0.0.1", {ours.server_address[1]}), ("1.1.1.1", 53), ("8.8.8.8", 53)):
                try:
                    socket.create_connection(address, 1).close()
                    got.append(address)
                except OSError:
                    pass
            try:
                socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
                got.append("raw")
            except OSError:
                pass
            own = socket.create_server(("127.0.0.1", 0))
            threading.Thread(target=lambda: own.accept()[0].sendall(b"hello"), daemon=True).start()
            print(json.dumps([got, socket.create_connection(own.getsockname(), 2).recv(5).decode()]))
            """,
        )
    finally:
        ours.shutdown()
        ours.server_close()
    assert found == [[], "hello"]
    assert ours.asked == 0


def test_it_sees_and_signals_its_own_processes_only(sandbox):
    found = said(
        sandbox,
        f"""
        import ctypes, json, os, signal
        seen = [name for name in os.listdir("/proc") if name.isdigit()]
        got = []
        for pid in ({os.getpid()}, {os.getppid()}):
            try:
                os.kill(pid, signal.SIGKILL)
                got.append(pid)
            except OSError:
                pass
        libc = ctypes.CDLL(None, use_errno=True)
        got += [pid for pid in ({os.getpid()}, {os.getppid()}) if libc.ptrace(16, pid, 0, 0) == 0]
        print(json.dumps([len(seen), got, os.getuid()]))
        """,
    )
    assert found[0] <= 5
    assert found[1] == []
    assert found[2] == 1000
    assert sandbox.python("import os; os.kill(-1, 9)").ended in ("signal", "exit")  # itself, at most
    assert os.getpid()


def test_it_gets_no_rights_and_no_namespaces(sandbox):
    found = said(
        sandbox,
        """
        import ctypes, json, os
        libc = ctypes.CDLL(None, use_errno=True)
        status = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
        got = [name for name, flag in (("user", 0x10000000), ("mount", 0x20000), ("net", 0x40000000)) if libc.unshare(flag) == 0]
        for call in (lambda: os.setuid(0), lambda: os.chroot("/tmp"), lambda: os.mount):
            try:
                call()
                got.append("call")
            except (OSError, AttributeError):
                pass
        if libc.mount(b"none", b"/tmp", b"tmpfs", 0, None) == 0:
            got.append("mounted")
        print(json.dumps([got, status["CapEff"].strip(), status["NoNewPrivs"].strip()]))
        """,
    )
    assert found == [[], "0" * 16, "1"]


def test_links_lead_nowhere(sandbox, tmp_path):
    """What a program leaves behind is read only where it is a file of its own."""
    secret = tmp_path / "secret"
    secret.write_text("s3cret")
    ran = sandbox.python(
        f"""
import os
os.symlink({str(secret)!r}, "link")
os.symlink({str(tmp_path)!r}, "folder")
os.mkfifo("pipe")
try:
    os.link({str(secret)!r}, "hard")
except OSError:
    pass
""",
        collect=("link", "folder/secret", "pipe", "hard"),
    )
    assert ran.files == {}
    assert secret.read_text() == "s3cret"


@pytest.mark.parametrize(
    ("source", "ended", "limits"),
    [
        ("while True: pass", "cpu time", {"cpu_seconds": 0.5}),
        ("import time; time.sleep(60)", "wall time", {"wall_seconds": 0.5}),
        ("x = []\nwhile True: x.append(bytearray(10 ** 7))", "memory", {"memory_mib": 200}),
        ("while True: print('x' * 10 ** 5)", "output", {"output_bytes": 10**6}),
        ("import os\nwhile True: os.write(2, b'x' * 10 ** 5)", "output", {"output_bytes": 10**6}),
        ("f = open('big', 'wb')\nwhile True: f.write(b'x' * 10 ** 6)", "files", {"files_mib": 8}),
        ("import itertools\nfor n in itertools.count(): open(f'f{n}', 'wb').write(b'x' * 10 ** 6)", "files", {"files_mib": 8}),
        ("import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(60,)).start()", "processes", {"processes": 16}),
    ],
)  # fmt: skip
def test_too_much_of_anything_ends_it(sandbox, source, ended, limits):
    began = time.monotonic()
    ran = sandbox.python(source, limits=replace(LIMITS, **limits))
    if ended in ("files", "processes"):  # the system may refuse before we look: it ends by its own error then
        assert ran.ended == ended or (ran.ended == "exit" and ran.returncode == 1), ran
    else:
        assert ran.ended == ended, ran
        assert ran.returncode is None
    assert time.monotonic() - began < 30
    assert len(ran.stdout) + len(ran.stderr) <= 10**6 + 1


@pytest.mark.parametrize("folder", ["/tmp", "/dev/shm"])
def test_what_is_kept_in_memory_is_small(sandbox, folder):
    ran = sandbox.python(f"open('{folder}/x', 'wb').write(b'x' * 10 ** 7)", limits=replace(LIMITS, tmp_mib=4))
    assert ran.returncode == 1
    assert b"No space" in ran.stderr
    assert sandbox.python(f"open('{folder}/x', 'wb').write(b'x' * 10 ** 6)", limits=replace(LIMITS, tmp_mib=4)).ok


def test_a_fork_bomb_ends_and_leaves_nothing(sandbox):
    source = (
        "import os, time\nmark = 'bomb-3141'\nwhile True:\n    try: os.fork()\n    except OSError: time.sleep(0.01)"
    )
    ran = sandbox.run(
        ["/usr/bin/python3" if Path("/usr/bin/python3").exists() else "python3", "-c", source + "  # bomb-3141"],
        limits=replace(LIMITS, processes=20, cpu_seconds=1, wall_seconds=4),
    )
    assert ran.ended in ("processes", "cpu time", "wall time")
    for _ in range(100):
        if not left_over("bomb-3141"):
            break
        time.sleep(0.05)
    assert not left_over("bomb-3141")


def test_what_it_starts_ends_with_it(sandbox):
    """A child in a session of its own, its parent gone."""
    ran = sandbox.python(
        "import os, sys\nif not os.fork():\n    os.setsid()\n"
        "    os.execvp('sleep', ['sleep', '271828'])\nprint('started')"
    )
    assert ran.text == "started\n"
    assert ran.seconds < 15
    assert not left_over("271828")


def test_what_it_poisons_stays_inside(sandbox):
    """A program may change its own modules, comparison and clock; what is judged, and timed, is judged outside."""
    source = """
import builtins, sys, time, types
time.time = time.perf_counter = lambda: 0.0
sys.modules["json"] = types.ModuleType("json")
builtins.print = lambda *_: sys.stdout.write("right\\n")
class Equal(str):
    def __eq__(self, other): return True
    __hash__ = str.__hash__
sys.meta_path.insert(0, type("Hook", (), {"find_spec": staticmethod(lambda *a: None)}))
time.sleep(0.2)
print(Equal("wrong"))
"""
    ran = sandbox.python(source)
    assert ran.text == "right\n"
    assert ran.seconds > 0.2
    assert said(sandbox, "import json; print(json.dumps(1))") == 1


def test_files_beside_it_are_not_imported(sandbox):
    """-I: a json.py that the program was given is not the library's."""
    assert (
        said(sandbox, "import json; print(json.dumps('own'))", files={"json.py": "raise SystemExit('poisoned')"})
        == "own"
    )


def test_many_at_once(sandbox):
    found = {}

    def run(n):
        found[n] = sandbox.python(f"open('x', 'w').write('{n}'); print(open('x').read())").text

    threads = [threading.Thread(target=run, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: f"{n}\n" for n in range(6)}


def test_nothing_is_left_in_the_temporary_folder(sandbox, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert sandbox.python("import os; os.makedirs('a/b'); os.chmod('a', 0)").ended == "exit"
    assert list(tmp_path.iterdir()) == []


def test_without_namespaces_nothing_runs_unless_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(runner.shutil, "which", lambda name: None)
    protections.cache_clear()
    try:
        assert not protections().full
        assert "bubblewrap is not installed" in protections().missing[0]
        with pytest.raises(SandboxMissing, match="apt install bubblewrap"):
            Sandbox()
        weak = Sandbox(replace(LIMITS, cpu_seconds=1), unprotected=True)
        assert weak.python("print(1)").text == "1\n"
        assert weak.python("while True: pass").ended == "cpu time"
        assert "SHELL" not in weak.python("import os; print(sorted(os.environ))").text
    finally:
        monkeypatch.undo()
        protections.cache_clear()


def test_bad_arguments_are_named(sandbox):
    for wrong in (
        {"wall_seconds": 0},
        {"cpu_seconds": float("nan")},
        {"memory_mib": 1.5},
        {"processes": 0},
        {"output_bytes": True},
    ):
        with pytest.raises((ValueError, TypeError), match=next(iter(wrong))):
            Limits(**wrong)
    with pytest.raises(ValueError, match="command"):
        sandbox.run([])
    with pytest.raises(ValueError, match="readable"):
        Sandbox(readable=["/no/such/folder"])
    assert sandbox.run(["/no/such/program"]).returncode not in (0, None)
    assert socket.gethostname()

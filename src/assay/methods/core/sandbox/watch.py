"""What the processes below one take: processor time, memory, their number, and the files in a folder. From /proc, without a library."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

TICK = os.sysconf("SC_CLK_TCK")
FILES_EVERY = 5  # looks


class Watcher:
    """Looks at process `root` and all below it; `look` brings its numbers up to date, `kill` ends them all.

    A process whose parent ended is found again, for it hangs below the first process of its namespace. Outside of a namespace it hangs
    elsewhere: those seen before are remembered and killed too.
    """

    def __init__(self, root: int, folder: Path) -> None:
        self.root, self.folder = root, folder
        self.processes = 0
        self.held_bytes = self.peak_bytes = self.files_bytes = 0
        self._cpu: dict[tuple[int, int], float] = {}  # by process and its start, the most that was seen of it
        self._seen: dict[int, int] = {}  # process -> its start
        self._looks = 0

    @property
    def cpu_seconds(self) -> float:
        """Of all processes that were seen, those that ended too; what one used between the last look and its end is not in it."""
        return sum(self._cpu.values())

    def look(self) -> None:
        """Bring all numbers up to date; files at every fifth look only."""
        tree = self._tree()
        self.processes, self.held_bytes = 0, 0
        for pid in tree:
            try:
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                start, used = int(fields[19]), (int(fields[11]) + int(fields[12])) / TICK
                threads = int(fields[17])
                held = _own_memory(pid)
            except (OSError, ValueError, IndexError):
                continue
            self._seen[pid] = start
            self._cpu[pid, start] = max(used, self._cpu.get((pid, start), 0.0))
            self.processes += threads
            self.held_bytes += held
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)
        if self._looks % FILES_EVERY == 0:
            self.look_at_files()
        self._looks += 1

    def look_at_files(self) -> None:
        """How much lies in the folder; links are not followed."""
        total = 0
        with contextlib.suppress(OSError):
            for root, folders, names in os.walk(self.folder):
                for name in (*folders, *names):
                    with contextlib.suppress(OSError):
                        total += os.lstat(os.path.join(root, name)).st_blocks * 512
        self.files_bytes = total

    def shared_once(self) -> int:
        """The memory of all processes with shared pages divided among those who share them, where that can be read."""
        total = 0
        for pid in self._tree():
            try:
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
                total += sum(
                    int(line.split()[1]) * 1024 for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:"))
                )
            except (OSError, ValueError, IndexError):
                return self.held_bytes
        return total

    def kill(self) -> None:
        """End everything: a namespace ends with its first process."""
        tree = self._tree()
        for pid in sorted(tree, reverse=True):
            _kill(pid)
        for pid, start in self._seen.items():
            if pid not in tree and _start(pid) == start:
                _kill(pid)
        _kill(self.root)

    def _tree(self) -> list[int]:
        found, open_ones = [], [self.root]
        while open_ones:
            pid = open_ones.pop()
            found.append(pid)
            try:
                for task in os.listdir(f"/proc/{pid}/task"):
                    children = Path(f"/proc/{pid}/task/{task}/children").read_text()
                    open_ones += [int(child) for child in children.split()]
            except (OSError, ValueError):
                continue
        return found


def _own_memory(pid: int) -> int:
    """Memory that is not a file's: the process's own and what it shares in memory."""
    total = 0
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(("RssAnon:", "RssShmem:")):
            total += int(line.split()[1]) * 1024
    return total


def _start(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def _kill(pid: int) -> None:
    with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGKILL)

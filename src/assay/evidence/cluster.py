"""Measuring on a Ray cluster: each machine measures one point at a time and is reserved as a whole while it does."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from assay.errors import InputError, MissingError
from assay.evidence.jobs import Job, Outcome, measure
from assay.evidence.place import Place, here
from assay.paths import scratch_dir
from assay.search_path import environment


class RayCluster:
    """The cluster at `address`: "local" starts one on this machine, "auto" finds the running one, else HOST:PORT or ray://...

    Raises MissingError without Ray, and InputError when nothing answers at the address or assay cannot run there.
    """

    def __init__(self, address: str) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError:
            raise MissingError("--ray needs Ray: pip install 'assay[ray]'") from None
        self._ray: Any = ray
        self._folder = contextlib.ExitStack()
        self._ours = not ray.is_initialized()
        if self._ours:
            options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
            try:
                _knock(address)
                with _in_a_folder_of_ours(self._folder):
                    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
            except Exception as error:  # Ray's own kinds of error have no common root
                self._folder.close()
                raise InputError(f"--ray {address}: cannot reach a Ray cluster there: {_first_line(error)}") from error
        try:
            self._nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
            self.places: list[Place] = ray.get([self._task(node, _where).remote() for node in self._nodes])
        except ray.exceptions.RayError as error:
            self.__exit__()
            raise InputError(f"--ray {address}: assay does not run on its machines: {_first_line(error)}") from error
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> RayCluster:
        return self

    def __exit__(self, *_: object) -> None:
        if self._ours:
            self._ray.shutdown()
        self._folder.close()

    def run(self, jobs: list[tuple[int, Job]], started: Callable[[Job], None]) -> Iterator[tuple[int, Job, Outcome]]:
        """Yield each job's outcome as it arrives; if a machine is lost, its point is "failed"."""
        alive = set(range(len(self._nodes)))
        free = list(alive)
        queue = list(jobs)
        running: dict[Any, tuple[int, int, Job]] = {}
        while queue or running:
            for node in list(free):
                if (chosen := self._choose(queue, node, alive)) is None:
                    continue
                number, job = queue.pop(chosen)
                started(job)
                threads = os.environ.get("OMP_NUM_THREADS")
                task = self._task(self._nodes[node], _measure).remote(job, threads)
                running[task] = (node, number, job)
                free.remove(node)
            (done, *_), _ = self._ray.wait(list(running), num_returns=1)
            node, number, job = running.pop(done)
            try:
                outcome = self._ray.get(done)
                free.append(node)
            except self._ray.exceptions.RayError as error:
                outcome = Outcome(
                    self.places[node], "failed", f"the machine or its worker was lost: {_first_line(error)}"
                )
                if self._is_alive(node):
                    free.append(node)
                else:
                    alive.remove(node)
            yield number, job, outcome
            if queue and not alive:
                raise InputError(
                    "all machines of the Ray cluster were lost; what was measured is recorded, see --resume"
                )

    def _task(self, node: dict[str, Any], function: Callable[..., Any]) -> Any:
        """`function` as a task on that machine and no other, with all of its processors and GPUs."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        return self._ray.remote(function).options(
            num_cpus=node["Resources"]["CPU"],
            num_gpus=node["Resources"].get("GPU", 0),
            max_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
        )

    def _choose(self, queue: list[tuple[int, Job]], node: int, alive: set[int]) -> int | None:
        """The queue position of the next job for a machine: jobs that need a GPU wait for one, if the cluster has any."""
        gpus = {other: self._nodes[other]["Resources"].get("GPU", 0) for other in alive}
        for place, (_, job) in enumerate(queue):
            if gpus[node] or "cuda" not in job.needs or not any(gpus.values()):
                return place
        return None

    def _is_alive(self, node: int) -> bool:
        wanted = self._nodes[node]["NodeID"]
        return any(other["NodeID"] == wanted and other["Alive"] for other in self._ray.nodes())


@contextlib.contextmanager
def _in_a_folder_of_ours(kept: contextlib.ExitStack) -> Iterator[None]:
    """Work in an empty folder: Ray starts its processes in the current folder and puts it on its workers' search path.

    The folder lasts as long as `kept`; afterwards this process has its old folder and environment back.
    """
    empty = kept.enter_context(scratch_dir(tempfile.gettempdir(), "assay-ray-"))
    before, given = os.getcwd(), dict(os.environ)
    os.environ.update(environment(given))  # made while relative entries still mean what they did
    os.chdir(empty)
    try:
        yield
    finally:
        os.chdir(before)
        for name in ("PYTHONSAFEPATH", "PYTHONPATH"):
            os.environ.pop(name, None)
        os.environ.update({name: given[name] for name in ("PYTHONSAFEPATH", "PYTHONPATH") if name in given})


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _knock(address: str) -> None:
    """Raise OSError if nothing listens at HOST:PORT; Ray itself would wait for many minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _where() -> Place:
    return here()


def _measure(job: Job, threads: str | None) -> Outcome:
    """`measure` with the caller's thread setting (Ray sets its own)."""
    os.environ.pop("OMP_NUM_THREADS", None)
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = threads
    return measure(job)

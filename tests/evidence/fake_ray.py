"""A stand-in for Ray with machines that are only names, so that the way of points over a cluster is tested in no time.

A task runs when it is waited for, the newest first. A machine in `lost` fails its tasks and is not alive afterwards; one in
`shaken` fails one task and goes on.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace


class RayError(Exception):
    pass


class FakeRay(ModuleType):
    """What `assay.evidence.cluster` uses of Ray. `machines`: how many GPUs each has, by name."""

    def __init__(self, machines: dict[str, int], lost=(), shaken=()):
        super().__init__("ray")
        self.machines, self.lost, self.shaken, self.gone = machines, set(lost), set(shaken), set()
        self.up, self.asked, self.waiting = False, [], []  # asked: (machine, job) in their order
        self.exceptions = SimpleNamespace(RayError=RayError)

    def install(self, monkeypatch):
        strategies = ModuleType("ray.util.scheduling_strategies")
        strategies.NodeAffinitySchedulingStrategy = lambda name, soft: name
        for name, module in {"ray": self, "ray.util": ModuleType("ray.util"), strategies.__name__: strategies}.items():
            monkeypatch.setitem(sys.modules, name, module)
        return self

    def is_initialized(self):
        return self.up

    def init(self, **options):
        self.up = True

    def shutdown(self):
        self.up = False

    def nodes(self):
        return [
            {"NodeID": name, "Alive": name not in self.gone, "Resources": {"CPU": 2, "GPU": gpus}}
            for name, gpus in self.machines.items()
        ]

    def remote(self, function):
        return SimpleNamespace(
            options=lambda **options: SimpleNamespace(remote=lambda *a: self._send(function, a, options))
        )

    def _send(self, function, arguments, options):
        name = options["scheduling_strategy"]
        assert options["num_cpus"] == 2  # a machine is reserved whole
        assert options["num_gpus"] == self.machines[name]
        assert name not in self.gone
        assert name not in [task.machine for task in self.waiting]  # one point at a time
        task = Task(name, function, arguments)
        self.waiting.append(task)
        if arguments:
            self.asked.append((name, arguments[0]))
        return task

    def wait(self, tasks, num_returns):
        assert num_returns == 1
        return [tasks[-1]], tasks[:-1]

    def get(self, task):
        if isinstance(task, list):
            return [self.get(one) for one in task]
        self.waiting.remove(task)
        if task.arguments and task.machine in self.lost | self.shaken:
            self.shaken.discard(task.machine)
            self.gone |= {task.machine} & self.lost
            raise RayError(f"{task.machine} does not answer\nand more")
        return task.function(*task.arguments)


class Task:
    def __init__(self, machine, function, arguments):
        self.machine, self.function, self.arguments = machine, function, arguments

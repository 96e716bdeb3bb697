"""Programs that a model wrote are run here, and nowhere else.

    with Sandbox(Limits(cpu_seconds=5, memory_mib=512)) as sandbox:
        ran = sandbox.python("print(17 * 23)")
    assert (ran.ended, ran.text) == ("exit", "391\\n")

Protection comes from Linux namespaces, through bubblewrap (`bwrap`, Debian's package `bubblewrap`): a program sees its own processes only,
a network of its own with nothing but loopback, a file system of which it can write its scratch folder and /tmp, and an environment that
holds nothing of ours. It has no capabilities and can make no further namespaces. Processor time, memory, processes, files and output are
limited, and wall time is. `protections` says in words what holds on this system and what does not; without namespaces nothing is run unless
`unprotected=True` asks for it.

What it does NOT do: there is no filter of system calls, so that a hole in the kernel is a hole here; caches and disks are shared with
everybody; and a program may read what `readable` names, Python's own folders by default. Judge its output outside: compare, and take
times, in the caller, for a program may change whatever it can reach, its own clock and its own `==` included.
"""

from assay.methods.core.sandbox.runner import (
    Limits,
    Protections,
    Ran,
    Sandbox,
    SandboxMissing,
    protections,
)

__all__ = ["Limits", "Protections", "Ran", "Sandbox", "SandboxMissing", "protections"]

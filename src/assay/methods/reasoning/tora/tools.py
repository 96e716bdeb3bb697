"""The tool: a program is run in a process of its own, and what it printed, or how it failed, is read by the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from assay import checks
from assay.methods.core.sandbox import Limits, Sandbox
from assay.methods.reasoning.tora.text import shortened

WALL_SECONDS = 5.0
"""Of a program, as released."""
SHOWN = 400
"""Characters of an output that the model is shown, as released."""


@dataclass(frozen=True)
class Output:
    """What a program gave: `shown` to the model, `printed` in full (an answer that is graded is never cut), and what it took.

    `failed` says that the program raised, crashed or met a limit.
    """

    shown: str
    printed: str = ""
    failed: bool = False
    seconds: float = 0.0


Tool = Callable[[str], Output]
"""Runs a program. It is called by several threads at once."""


class PythonTool:
    """Python programs in the sandbox: each in a fresh process, with nothing of another's, for five seconds at most.

    A program that prints shows what it printed, stripped and cut to `shown` characters; one that raises shows the last line of its
    traceback alone; one that meets a limit shows which. The released code refuses `input(` and `os.system(` by their names; here the
    sandbox holds whatever a program is called. `seconds` counts the start of the sandbox.

    Raises `SandboxMissing` where programs cannot be run safely, ValueError and TypeError for limits out of range.

    When NOT to use it: for a tool that must keep its state from one program to the next; each begins anew, as released. Where the model
    runs on the same processors, programs wait for them: give a sandbox whose limit is `cpu_seconds`, or sums are stopped too.
    """

    def __init__(self, sandbox: Sandbox | None = None, *, shown: int = SHOWN) -> None:
        self.shown = checks.whole("shown", shown, low=2)
        self.sandbox = sandbox or Sandbox(Limits(wall_seconds=WALL_SECONDS, cpu_seconds=WALL_SECONDS))

    def __call__(self, program: str) -> Output:
        if not isinstance(program, str):
            raise TypeError(f"program must be text, got {checks.shown(program)}")
        ran = self.sandbox.python(program)
        printed = ran.text.strip()
        if ran.ok:
            return Output(shortened(printed, self.shown), printed, False, ran.seconds)
        said = ran.stderr.decode("utf-8", "replace").strip().splitlines()
        by_itself = ran.ended in ("exit", "signal")
        why = (said[-1] if said else f"ended by {ran.ended} {ran.returncode}") if by_itself else f"stopped: {ran.ended}"
        return Output(shortened(why, self.shown), printed, True, ran.seconds)

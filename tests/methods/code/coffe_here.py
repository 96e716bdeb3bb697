"""Runs the texts of these tests in this process: they are ours. Programs of others go to a sandbox."""

from __future__ import annotations

import copy
from types import SimpleNamespace


def run(program, entry_point, cases):
    """A `Run` of assay.methods.code.coffe without a sandbox."""
    found = []
    for args in cases:
        scope = {"__name__": "tested"}
        try:
            exec(compile(program, "program", "exec"), scope)
            value = scope[entry_point](*copy.deepcopy(args))
        except Exception as error:
            found.append(SimpleNamespace(state="raised", value=None, error=repr(error)))
        else:
            found.append(SimpleNamespace(state="returned", value=value, error=""))
    return found

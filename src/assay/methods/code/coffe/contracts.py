"""Contracts: asserts about a program's inputs, each accepted only if the program with it still passes every correctness test.

Whoever writes them, a language model (`ContractsByModel`) or a miner of what tests give (`ObservedContracts`), the same loop judges.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from assay import checks
from assay.methods.code.coffe.programs import Args, Unusable, asserts

TARGET = 4
"""Contracts accepted before the loop ends."""
CALLS = 20
"""Edits asked for at most."""
EXAMPLES = 3
"""Inputs that a writer is shown at most."""


class ContractMiner(Protocol):
    """Writes contracts."""

    def edit(self, code: str, examples: Sequence[Args]) -> str | None:
        """`code` with one more assert about its inputs; None when there is no more to say. Raises Unusable for a text that is none.

        The whole program is given back, so that one protocol serves functions (an assert at the head) and files (asserts anywhere).
        """
        ...


@dataclass(frozen=True)
class Contracts:
    """`code` is the program with all `accepted` asserts; `refused` has what was asked for and not taken, with the reason."""

    code: str
    accepted: tuple[str, ...]
    refused: tuple[tuple[str, str], ...]
    calls: int


def mine(
    miner: ContractMiner,
    program: str,
    passes: Callable[[str], bool],
    *,
    examples: Sequence[Args] = (),
    target: int = TARGET,
    calls: int = CALLS,
) -> Contracts:
    """Ask `miner` for one contract after another until `target` are accepted, `calls` are spent, or it has no more.

    `program` is the right solution (the text, `passes(program)` must hold), `examples` the inputs of the correctness tests, of which the
    miner sees three at most. An edit is accepted when every earlier assert is still in the code, at least one is new, and `passes` says
    that all correctness tests still hold, outputs included: an assert that changes its arguments is none.
    Raises ValueError for a program that does not pass to begin with.
    When NOT to use it: where correctness tests are few or one-sided, contracts that are too strict pass as well. They make stress inputs
    less varied, never invalid.
    """
    target, calls = checks.whole("target", target, low=1), checks.whole("calls", calls, low=1)
    if not passes(program):
        raise ValueError("program must pass its correctness tests before contracts are asked for")
    code, spent = program, 0
    accepted: list[str] = []
    refused: list[tuple[str, str]] = []
    while spent < calls and len(accepted) < target:
        spent += 1
        try:
            edited = miner.edit(code, list(examples)[:EXAMPLES])
            if edited is None:
                break
            before, after = asserts(code), asserts(edited)
        except Unusable as error:
            refused.append(("", str(error)))
            continue
        new = list((after - before).elements())
        text = " and ".join(new)
        if before - after:
            refused.append((text, "an earlier contract is gone"))
        elif not new:
            refused.append((text, "nothing was added"))
        elif not passes(edited):
            refused.append((text, "a correctness test fails"))
        else:
            code = edited
            accepted += new
    return Contracts(code, tuple(accepted), tuple(refused), spent)

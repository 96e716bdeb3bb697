"""Taking lines out of a program, writing them at its end with their places, reading such a text, and putting them back."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from assay import checks
from assay.methods.code.mpirigen.tokens import Call, calls, indented, layout, line_tokens

SEPARATOR = "parallel"
"""The word between the code and the calls."""
_ITEM = re.compile(r"\(([0-9]{1,9}) ([0-9]{1,9}),\s*")
_PIECE = re.compile(r"\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'|[()]|[^()\"']+|.", re.DOTALL)
Pick = Callable[[str], bool]
"""Whether a line is taken out."""


@dataclass(frozen=True)
class Item:
    """A line that was taken out: it stands after line `line` of the code (0: before the first), as the `index`-th of those there."""

    line: int
    index: int
    text: str

    @property
    def calls(self) -> tuple[Call, ...]:
        """Its calls of MPI."""
        return calls(self.text)


@dataclass(frozen=True)
class Stripped:
    """A program without some of its lines, and these."""

    code: tuple[str, ...]
    items: tuple[Item, ...]

    @property
    def calls(self) -> tuple[tuple[int, Call], ...]:
        """Every call that was taken out, with the line it stands after."""
        return tuple((item.line, call) for item in self.items for call in item.calls)


def holds_call(line: str) -> bool:
    """Whether a line holds a call of MPI, a macro that is defined as one too."""
    return bool(calls(line))


def take_out(program: str, pick: Pick = holds_call) -> Stripped:
    """The program laid out one statement a line (`layout`) without the lines that `pick` chooses, by default those with a call of MPI.

    A whole line goes, `t = MPI_Wtime();` and `if (MPI_Test(...))` too: the released data cut the call out of such a line and leave a
    hole, from which the program cannot be made again. Lines are numbered when they are gone, from 1, so that no gap in the numbers says
    where a call stood. The same serves other annotations: `pick=lambda line: line.startswith("#pragma omp")`. Raises ValueError for what
    is no C source, and for a line that could not be read back from a label.

    >>> found = take_out("int main(void) { MPI_Init(0, 0); work(); MPI_Finalize(); }")
    >>> found.code, found.items[1]
    (('int main(void)', '{', 'work();', '}'), Item(line=3, index=1, text='MPI_Finalize();'))
    """
    code: list[str] = []
    items: list[Item] = []
    for line in layout(program):
        if not pick(line):
            code.append(line)
            continue
        index = items[-1].index + 1 if items and items[-1].line == len(code) else 1
        items.append(Item(len(code), index, line))
    if read(write(items)) != items:
        raise ValueError("program must hold lines that can be read back from a label, brackets closed: some cannot")
    return Stripped(tuple(code), tuple(items))


def put_back(code: Sequence[str], items: Iterable[Item]) -> str:
    """The program with the items put back, to read and to compile. Their order does not matter but for equal places.

    Raises ValueError for a place beyond the last line of the code.

    >>> print(put_back(["int x;", "x = 1;"], [Item(1, 1, "MPI_Init(0, 0);")]), end="")
    int x;
    MPI_Init(0, 0);
    x = 1;
    """
    return indented(merged(code, items))


def merged(code: Sequence[str], items: Iterable[Item]) -> list[str]:
    """The lines of `put_back`, not indented."""
    placed: dict[int, list[Item]] = {}
    for item in items:
        if not 0 <= item.line <= len(code):
            raise ValueError(f"items must stand after lines 0 to {len(code)}, got {item}")
        placed.setdefault(item.line, []).append(item)
    found: list[str] = []
    for number, line in enumerate(["", *code]):
        found += [line] if number else []
        found += [item.text for item in sorted(placed.get(number, []), key=lambda item: item.index)]
    return found


def write(items: Iterable[Item]) -> str:
    """Items as a label: `(2 1, MPI_Init(&argc, &argv);) (7 1, MPI_Finalize();)`."""
    return " ".join(f"({item.line} {item.index}, {item.text})" for item in items)


def read(label: str) -> list[Item]:
    """The items of a label, as a model may have written it: what is no item, or was cut off, is left out.

    An item ends where its bracket closes; strings may hold brackets and semicolons.

    >>> read("hm (2 1, f(a, ')');) (3 1, MPI_Send(")
    [Item(line=2, index=1, text="f(a, ')');")]
    """
    found: list[Item] = []
    at = 0
    while (start := _ITEM.search(label, at)) is not None:
        at = start.end()
        depth, end = 1, at
        while depth and (piece := _PIECE.match(label, end)) is not None:
            depth += (piece.group() == "(") - (piece.group() == ")")
            end = piece.end()
        if not depth:
            text = label[at : end - 1].strip()
            at = end
            if _is_c(text):
                found.append(Item(int(start[1]), int(start[2]), text))
    return found


def _is_c(text: str) -> bool:
    try:
        return bool(line_tokens(text))
    except ValueError:
        return False


def numbered(code: Sequence[str]) -> str:
    """The code as a model sees it, a number before each line."""
    return "\n".join(f"{number}: {line}" for number, line in enumerate(code, 1))


def prompt(code: Sequence[str]) -> str:
    """What a model is given: the whole code, then the word after which it writes the calls."""
    return f"{numbered(code)}\n{SEPARATOR} "


def sample(found: Stripped) -> str:
    """What a model is trained on."""
    return prompt(found.code) + write(found.items)


def record(name: str, program: str, pick: Pick = holds_call) -> dict[str, str]:
    """A program as a row of a data set, in the columns of the released one: `program` (its name), `code`, `mpi_labels` and `full`.

    >>> record("one", "int x; MPI_Init(0, 0);")["full"]
    '1: int x;\\nparallel (1 1, MPI_Init(0, 0);)'
    """
    found = take_out(program, pick)
    return {"program": name, "code": numbered(found.code), "mpi_labels": write(found.items), "full": sample(found)}


def masked(text: str, tokenizer: Any, *, most: int = 2048, whole: bool = True) -> dict[str, list[int]] | None:
    """`sample`'s text as `input_ids` and `labels` for a causal model, with the tokenizer's end; None where it is longer than `most` tokens.

    With `whole`, the paper's, the loss covers the code too; without, code and prompt are -100. `tokenizer` is called as those of
    transformers are. Raises ValueError for a text without the separator, or a tokenizer that has no end of text.
    """
    checks.whole("most", most, low=1)
    head, word, tail = text.rpartition(f"\n{SEPARATOR} ")
    if not word:
        raise ValueError(f"text must hold the line that begins with {SEPARATOR!r}, got {checks.shown(text)}")
    if (end := tokenizer.eos_token_id) is None:
        raise ValueError("tokenizer must have an end of text, got none")
    given = list(tokenizer(head + word, add_special_tokens=False)["input_ids"])
    wanted = [*tokenizer(tail, add_special_tokens=False)["input_ids"], end]
    if len(given) + len(wanted) > most:
        return None
    return {"input_ids": given + wanted, "labels": (given if whole else [-100] * len(given)) + wanted}

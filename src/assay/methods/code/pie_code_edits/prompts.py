"""What a model is asked, and what it is trained on: prompts that name the wanted decile of speed, and records for trl and peft."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from assay import checks
from assay.methods.code.pie_code_edits.pairs import TAGS, Pair
from assay.paths import atomic_file

AS_RELEASED = 1500
"""Characters after which the released code cuts a program in a prompt; ours are whole."""


def prompt(
    program: str, *, tag: int | None = TAGS, examples: Sequence[Pair] = (), most_characters: int | None = None
) -> str:
    """The question for a faster form of a program, which the model answers with the program alone.

    `tag` is the decile of speed that is asked for, 10 the best; None asks for a faster one (a model that was trained without tags).
    `examples` are pairs as `Index.nearest` returns them, nearest first: they are shown with the nearest last, next to the question, and
    with their own tags where they have some and `tag` asks for one. `most_characters` cuts programs as the released code does
    (`AS_RELEASED`): the model then optimises torn ones. The wording is ours. Raises ValueError for a tag that is none, an empty program.

    >>> print(prompt("int main() {}", tag=10), end="")
    # Slow program
    int main() {}
    # The same program, optimised: score 10/10
    """
    if not program.strip():
        raise ValueError("program must be a text that is not empty, got one that is")
    if tag is not None:
        checks.whole("tag", tag, low=1, high=TAGS)
    if most_characters is not None:
        checks.whole("most_characters", most_characters, low=1)
    asked = []
    for pair in reversed(examples):
        shown = pair.tag if tag is not None else None
        asked.append(_question(pair.source[:most_characters], shown) + pair.target[:most_characters].rstrip() + "\n\n")
    return "".join(asked) + _question(program[:most_characters], tag)


def _question(program: str, tag: int | None) -> str:
    score = "" if tag is None else f": score {tag}/{TAGS}"
    return f"# Slow program\n{program.rstrip()}\n# The same program, optimised{score}\n"


def training_records(pairs: Iterable[Pair], *, conditioned: bool = True) -> list[dict[str, Any]]:
    """A record a pair with `prompt` and `completion`, as trl's SFTTrainer takes them, and `tag`, `problem` and `speedup` beside them.

    With `conditioned` the prompt names the tag of the pair's own target, so that 10 can be asked for later; such pairs need one (`tagged`).
    The paper trains for one epoch at a rate of 1e-5 in batches of 32, cut at 2000 tokens, with no loss on the prompt (in trl:
    `completion_only_loss`). Raises ValueError for a pair without a tag.
    """
    found = []
    for pair in pairs:
        if conditioned and pair.tag is None:
            raise ValueError(
                f"pairs must have tags (tagged) to be conditioned on them, got one of {pair.problem!r} without"
            )
        found.append(
            {
                "prompt": prompt(pair.source, tag=pair.tag if conditioned else None),
                "completion": pair.target.rstrip() + "\n",
                "tag": pair.tag,
                "problem": pair.problem,
                "speedup": pair.speedup,
            }
        )
    return found


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write records as JSON lines, which `datasets.load_dataset("json", ...)` reads; the file is there whole or not at all."""
    with atomic_file(path) as target, open(target, "w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(dict(record)) + "\n")

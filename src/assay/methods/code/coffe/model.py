"""Contracts and stress inputs by a language model: what it is asked, and how its answer is read. `Chat` is any function text -> text.

The words are ours; what is shown, and how much is asked for, is the paper's. Answers are texts of strangers: nothing here runs them.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Sequence
from typing import Literal

from assay import checks
from assay.methods.code.coffe.programs import NOT_PYTHON, Args, Unusable, asserts, with_contract
from assay.methods.code.coffe.stress import AT_ONCE, SCALE, StressInput

Chat = Callable[[str], str]
Level = Literal["function", "file"]
_FENCE = re.compile(r"```[^\n`]*\n(.*?)```", re.DOTALL)


def code_in(answer: str) -> str:
    """The first fenced block of an answer, else all of it.

    >>> code_in("Sure:\\n```python\\nassert n > 0\\n```\\nIt holds because ...")
    'assert n > 0'
    """
    found = _FENCE.search(answer)
    return (found.group(1) if found else answer).strip()


class ContractsByModel:
    """A `ContractMiner` that asks a model for one assert at a time, seeing the task, the code with the contracts so far and example inputs.

    At "function" level the answer is one assert, put at the function's head; at "file" level it is the whole program with it.
    """

    def __init__(self, chat: Chat, description: str, entry_point: str = "", *, level: Level = "function") -> None:
        self.chat, self.description, self.entry_point = chat, description, entry_point
        self.level = checks.choice("level", level, ("function", "file"))
        if level == "function" and not entry_point:
            raise ValueError("entry_point must name the function, got ''")

    def edit(self, code: str, examples: Sequence[Args]) -> str:
        """The code with one more contract. Raises Unusable for an answer that holds none."""
        answer = code_in(self.chat(self.prompt(code, examples)))
        if self.level == "function":
            return with_contract(code, self.entry_point, answer)
        try:
            asserts(answer)
        except ValueError as error:
            raise Unusable(f"no program: {checks.shown(answer)}") from error
        return answer

    def prompt(self, code: str, examples: Sequence[Args]) -> str:
        """What the model is asked."""
        shown = "\n".join(repr(args) for args in examples)
        wanted = (
            "Answer with that one assert statement about the parameters, and nothing else."
            if self.level == "function"
            else "Answer with the whole program, the assert added behind the place where the input is read, and nothing else changed."
        )
        return (
            f"Task:\n{self.description}\n\nA right solution, with the contracts found so far:\n```python\n{code}\n```\n\n"
            f"Inputs of its tests, one a line:\n{shown}\n\n"
            "Which property must every valid input have that no assert in the code states yet? It must never fail on a valid input, "
            f"and it must not change its arguments. {wanted}"
        )


class InputsByModel:
    """A `StressGenerator` that asks a model for large inputs, seeing the code with its contracts and some valid inputs.

    At "function" level the answer is a JSON object whose values are Python expressions, each the tuple of arguments; at "file" level it is
    a program that defines `generate_input()`, which returns what stdin will hold. `scale` is asked for and, as in the paper, not enforced.
    """

    def __init__(self, chat: Chat, *, level: Level = "function", scale: int = SCALE) -> None:
        self.chat = chat
        self.level = checks.choice("level", level, ("function", "file"))
        self.scale = checks.whole("scale", scale, low=1)

    def inputs(self, code: str, seeds: Sequence[StressInput], number: int = AT_ONCE) -> list[StressInput]:
        """Up to `number` inputs. Raises Unusable for an answer that holds none."""
        answer = code_in(self.chat(self.prompt(code, seeds, number)))
        if self.level == "file":
            try:
                defined = {node.name for node in ast.parse(answer).body if isinstance(node, ast.FunctionDef)}
            except NOT_PYTHON as error:
                raise Unusable(f"no program: {checks.shown(answer)}") from error
            if "generate_input" not in defined:
                raise Unusable("no generate_input() in the program")
            return [StressInput(answer, form="program")]
        try:
            found = json.loads(answer)
        except (ValueError, RecursionError) as error:
            raise Unusable(f"no JSON: {checks.shown(answer)}") from error
        if not isinstance(found, dict):
            raise Unusable(f"no JSON object: {checks.shown(answer)}")
        texts = [text for text in found.values() if isinstance(text, str) and _is_expression(text)]
        if not texts:
            raise Unusable("no value is a Python expression")
        return [StressInput(text.strip()) for text in texts[:number]]

    def prompt(self, code: str, seeds: Sequence[StressInput], number: int) -> str:
        """What the model is asked."""
        shown = "\n".join(one.text for one in seeds)
        wanted = (
            f"Answer with a JSON object of at most {number} entries, whose values are strings: each a Python expression for the tuple "
            "of all arguments, written as code where it is long (range, comprehensions, the module random)."
            if self.level == "function"
            else "Answer with a Python program that defines generate_input(), without parameters, which returns the text for stdin; "
            "use the module random where values are to vary."
        )
        return (
            f"This code states in its asserts what a valid input is:\n```python\n{code}\n```\n\nValid inputs:\n{shown}\n\n"
            "Give valid inputs that take it as long as possible, different from each other, with no size and no number above "
            f"{self.scale}. {wanted}"
        )


def _is_expression(text: str) -> bool:
    try:
        ast.parse(text.strip(), mode="eval")
    except NOT_PYTHON:
        return False
    return True

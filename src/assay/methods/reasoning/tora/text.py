r"""The text of a trajectory: rationale, programs in fences tagged python, what they printed in fences tagged output, an answer in \boxed{}.

A block opens with a line of three backticks and a tag and closes with a line of three backticks. What the model wrote and what the tool
wrote are told apart by the blocks alone, so that a trajectory needs no other form than its text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from assay import checks
from assay.methods.core.reasoning.answers import boxed, canonical, extract

FENCE = "```"
CODE = "```python"
OUTPUT = "```output"
"""The model stops here: what follows is the tool's."""
LIMIT_NOTE = "The limit of tool calls is reached."
_LINE = re.compile(r"^(```)[ \t]*(\w*)[ \t]*$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block: its tag, its content, and where it begins and ends in the text; `closed` where its end is there."""

    tag: str
    content: str
    start: int
    stop: int
    closed: bool


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a text in their order; an open last one reaches to the end.

    >>> [(b.tag, b.content, b.closed) for b in blocks("Add.\\n```python\\nprint(1)\\n```\\n```output\\n1")]
    [('python', 'print(1)\\n', True), ('output', '1', False)]
    """
    found: list[Block] = []
    opened: re.Match[str] | None = None
    for line in _LINE.finditer(text):
        if opened is None:
            opened = line
        elif not line[2]:
            found.append(Block(opened[2], text[opened.end() + 1 : line.start()], opened.start(), line.end(), True))
            opened = None
    if opened is not None:
        found.append(Block(opened[2], text[opened.end() + 1 :], opened.start(), len(text), False))
    return found


def outside(text: str) -> str:
    r"""The text without its blocks: an answer that stands in a comment of a program is none.

    >>> outside("```python\n# \\boxed{3}\n```\nSo it is 4.")
    '\nSo it is 4.'
    """
    parts, end = [], 0
    for block in blocks(text):
        parts.append(text[end : block.start])
        end = block.stop
    return "".join([*parts, text[end:]])


def waiting(text: str) -> str | None:
    """The program that a text waits for: its last block is Python, closed, and nothing but space follows; None without one.

    A boxed answer outside of the blocks means that nothing is waited for.

    >>> waiting("Add them.\\n```python\\nprint(1 + 2)\\n```\\n")
    'print(1 + 2)\\n'
    >>> waiting("```python\\nprint(3)\\n```\\nDone."), waiting("```python\\nprint(3)")
    (None, None)
    """
    found = blocks(text)
    if not found or found[-1].tag != "python" or not found[-1].closed or text[found[-1].stop :].strip():
        return None
    return None if boxed(outside(text)) is not None else found[-1].content


def output_block(text: str, shown: str) -> str:
    r"""What is added behind `text` for an output: a block of its own, on its own line. `text` may end with the opening fence already.

    >>> output_block("```python\nprint(3)\n```", "3"), output_block("...\n```output", "3")
    ('\n```output\n3\n```\n', '\n3\n```\n')
    """
    body = f"\n{shown}\n{FENCE}\n" if shown else f"\n{FENCE}\n"
    if text.endswith(OUTPUT):
        return body
    return ("" if text.endswith("\n") else "\n") + OUTPUT + body


def answer_of(text: str) -> str:
    r"""The answer of a trajectory, canonical, "" for none: the last boxed one outside of its blocks, else what follows the last "answer
    is" there, else the last output, else the last number.

    >>> answer_of("```output\n12\n```\nSo \\boxed{13}."), answer_of("```python\nprint(12)\n```\n```output\n12\n```\n")
    ('13', '12')
    """
    said = outside(text)
    if (inside := boxed(said)) is not None:
        return canonical(inside)
    if re.search(r"answer(?:\s+is|\s*[:=])", said, re.IGNORECASE):
        return extract(said)
    printed = [block.content.strip() for block in blocks(text) if block.tag == "output"]
    if printed and printed[-1]:
        return canonical(printed[-1].splitlines()[-1])
    return extract(said)


def pieces(text: str) -> list[tuple[str, bool]]:
    r"""The text in parts, each with whether the tool wrote it: from behind "```output" to the end of that block's closing line.

    Joined they are the text again. The opening fence is the model's: it writes it to call the tool.

    >>> pieces("```python\nprint(3)\n```\n```output\n3\n```\nSo 3.")
    [('```python\nprint(3)\n```\n```output', False), ('\n3\n```\n', True), ('So 3.', False)]
    """
    parts: list[tuple[str, bool]] = []
    end = 0
    for block in blocks(text):
        if block.tag == "output":
            start = block.start + len(OUTPUT)
            stop = block.stop + text[block.stop : block.stop + 1].count("\n")
            parts += [(text[end:start], False), (text[start:stop], True)]
            end = stop
    return [(part, tool) for part, tool in [*parts, (text[end:], False)] if part]


def cuts(text: str) -> list[str]:
    """What a trajectory can be cut to and written anew from: up to before each program, and up to behind each output; never nothing.

    >>> cuts("Add.\\n```python\\nprint(3)\\n```\\n```output\\n3\\n```\\nSo 4.")
    ['Add.\\n', 'Add.\\n```python\\nprint(3)\\n```\\n```output\\n3\\n```\\n']
    """
    ends, at = [], 0
    for part, tool in pieces(text):
        if not tool:
            ends += [at + block.start for block in blocks(part) if block.tag == "python"]
        at += len(part)
        if tool:
            ends.append(at)
    return [text[:end] for end in dict.fromkeys(ends) if text[:end].strip() and end < len(text)]


def shortened(text: str, most: int = 400) -> str:
    """A text of at most `most` characters as it is; of a longer one its first and last halves with "..." between.

    Raises ValueError for fewer than two characters.

    >>> shortened("0123456789", 4), shortened("0123", 4)
    ('01...89', '0123')
    """
    half = checks.whole("most", most, low=2) // 2
    return text if len(text) <= most else f"{text[:half]}...{text[len(text) - half :]}"

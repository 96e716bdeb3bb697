"""The answer in what a model wrote: after "Output:", in a block, in inline code, or the first paragraph."""

from __future__ import annotations

import re

from assay import checks

MARKER = "Output:"
_MARK = re.compile(r"^[ \t]*(?:\*\*)?Output:(?:\*\*)?", flags=re.MULTILINE)
_BLOCK = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", flags=re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`([^`\n]+)`")
_BOLD = re.compile(r"\*\*(?=\S)([^*\n]+?)(?<=\S)\*\*")
_RELEASED_BOLD = re.compile(r"\*\*.*?\*\*\s*")
_RELEASED_BLOCK = re.compile(r"```\w*\n(.*?)\n```", flags=re.DOTALL)
_RELEASED_INLINE = re.compile(r"`([^`]+)`")
VARIANTS = ("paper", "as_released")


def extract(text: str, *, variant: str = "paper") -> str:
    """The answer that `text` gives, without empty lines around it; "" for none.

    After the last "Output:" that begins a line outside of a block: the first block (whatever language stands on its fence, closed or not),
    else the first inline code, else the first paragraph, bold marks taken off. A text with neither marker nor block is an answer already
    and comes back as it is, which makes it idempotent on every bare answer. `as_released` goes on from the first "Output:", wherever it
    stands, takes bold words out with their marks, wants a block to be closed, and applies every step to every text: an answer that is
    bold, or has several paragraphs, does not survive. Not for answers that quote the marker or a fence: they cannot be told from a reply.

    >>> extract("It adds.\\nOutput:\\n```text\\n4\\n5\\n```\\nDone."), extract("**Output:** **7**"), extract("4\\n\\n5")
    ('4\\n5', '7', '4\\n\\n5')
    """
    if not isinstance(text, str):
        raise TypeError(f"text must be a text, got {checks.shown(text)}")
    checks.choice("variant", variant, VARIANTS)
    if variant == "as_released":
        return _as_released(text)
    blocks = [found.span() for found in _BLOCK.finditer(text)]
    marks = [
        found.end() for found in _MARK.finditer(text) if not any(start <= found.start() < end for start, end in blocks)
    ]
    if not marks and not blocks:
        return bare(text)
    return _read(text[marks[-1] :] if marks else text)


def bare(text: str) -> str:
    """A text without the empty lines around it and the blanks at its end."""
    return re.sub(r"\A(?:[ \t]*\n)+", "", text).rstrip()


def _as_released(text: str) -> str:
    _, marked, after = text.partition(MARKER)
    rest = _RELEASED_BOLD.sub("", (after if marked else text).strip())
    if (found := _RELEASED_BLOCK.search(rest) or _RELEASED_INLINE.search(rest)) is not None:
        return found[1].strip()
    paragraph = rest.partition("\n\n")[0].strip()
    return paragraph.replace("**", "").strip() if paragraph.startswith("**") else paragraph


def _read(rest: str) -> str:
    if (block := _BLOCK.search(rest)) is not None:
        return bare(block[1])
    if (inline := _INLINE.search(rest)) is not None:
        return inline[1].strip()
    paragraph = re.split(r"\n[ \t]*\n", rest.strip(), maxsplit=1)[0]
    return _BOLD.sub(r"\1", paragraph).strip()

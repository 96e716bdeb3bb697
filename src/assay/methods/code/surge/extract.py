"""The answer in what a model wrote: after "Output:", in a block, in inline code, or the first paragraph."""

from __future__ import annotations

import re

from assay import checks

MARKER = "Output:"
_MARK = re.compile(r"^[ \t]*(?:\*\*)?Output:(?:\*\*)?", flags=re.MULTILINE)
_BLOCK = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", flags=re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`([^`\n]+)`")
_BOLD = re.compile(r"\*\*(?=\S)([^*\n]+?)(?<=\S)\*\*")
VARIANTS = ("paper", "as_released")


def extract(text: str, *, variant: str = "paper") -> str:
    """The answer that `text` gives, without empty lines around it; "" for none.

    After the last "Output:" that begins a line outside of a block: the first block (whatever language stands on its fence, closed or not),
    else the first inline code, else the first paragraph, bold marks taken off. A text with neither marker nor block is an answer already
    and comes back as it is, which makes it idempotent on every bare answer; `as_released` applies every step to every text, so that an
    answer of several paragraphs, or one that is made of stars, does not survive. Not for answers that quote the marker or a fence: they
    cannot be told from a reply.

    >>> extract("It adds.\\nOutput:\\n```text\\n4\\n5\\n```\\nDone."), extract("**Output:** **7**"), extract("4\\n\\n5")
    ('4\\n5', '7', '4\\n\\n5')
    """
    if not isinstance(text, str):
        raise TypeError(f"text must be a text, got {checks.shown(text)}")
    checks.choice("variant", variant, VARIANTS)
    if variant == "as_released":
        rest = text.rpartition(MARKER)[2].replace("**", "")
        return _read(rest)
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


def _read(rest: str) -> str:
    if (block := _BLOCK.search(rest)) is not None:
        return bare(block[1])
    if (inline := _INLINE.search(rest)) is not None:
        return inline[1].strip()
    paragraph = re.split(r"\n[ \t]*\n", rest.strip(), maxsplit=1)[0]
    return _BOLD.sub(r"\1", paragraph).strip()

"""FL: proofs for a small checker, right ones and ones with a step that does not follow."""

from __future__ import annotations

from assay.workloads.programs.surge.source import Source

_PROOFS = {
    "modus ponens": ["given p\ngiven p > q\nmp 1 2 q", "given p\ngiven q > p\nmp 1 2 q"],
    "chain": [
        "given p\ngiven p > q\ngiven q > r\nmp 1 2 q\nmp 4 3 r",
        "given p\ngiven p > q\ngiven q > r\nmp 1 3 r",
    ],
    "conjunction": ["given a\ngiven b\nand 1 2 a & b\nleft 3 a", "given a\ngiven b\nand 1 2 b & a\nleft 3 b"],
    "projection": ["given s & t\nright 1 t", "given s & t\nright 1 s"],
    "disjunction": ["given m\nor 1 m | n", "given m\nor 1 k | n"],
    "forward reference": ["given u\ngiven u > v\nmp 1 2 v", "given u\nmp 1 3 v\ngiven u > v"],
    "swap": ["given x & y\nright 1 y\nleft 1 x\nand 2 3 y & x", "given x & y\nright 1 y\nand 2 1 y & x"],
    "unknown rule": ["given h\nor 1 h | j", "given h\nguess 1 j"],
}


def made() -> list[Source]:
    """Eight proofs, each right and wrong."""
    return [
        Source(f"FL/{name}/{n}", "FL", "proof", f"FL/{name}", "formal", {"proof.txt": text + "\n"}, given=text)
        for name, texts in _PROOFS.items()
        for n, text in enumerate(texts)
    ]

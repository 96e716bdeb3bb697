"""Identifiers replaced by names that say nothing, so that misleading ones mislead nobody; and put back."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence

from assay.methods.code.mpirigen.tokens import Token, joined, line_tokens, tokens

_KEYWORDS_TEXT = """
    auto break case char const continue default do double else enum extern float for goto if inline int long register
    restrict return short signed sizeof static struct switch typedef union unsigned void volatile while _Bool bool true
    false
"""
KEYWORDS = frozenset(_KEYWORDS_TEXT.split())
_LIBRARY_TEXT = """
    main argc argv NULL EXIT_SUCCESS EXIT_FAILURE stdin stdout stderr FILE size_t int8_t int16_t int32_t int64_t uint8_t
    uint16_t uint32_t uint64_t intptr_t ptrdiff_t RAND_MAX INT_MAX printf fprintf sprintf snprintf scanf sscanf fscanf
    puts putchar fputs fgets fopen fclose fread fwrite fflush fseek malloc calloc realloc free exit abort atoi atol atof
    strtol strtod rand srand random srandom memset memcpy memmove memcmp strlen strcpy strncpy strcmp strncmp strcat
    strchr strstr sqrt fabs pow sin cos exp log floor ceil abs time clock sleep usleep assert getopt isdigit isspace
    qsort gethostname getpid perror errno
"""
LIBRARY = frozenset(_LIBRARY_TEXT.split())
_FIXED = re.compile(r"P?MPI_?\w*")
_WORD = re.compile(r"\"(?:\\.|[^\"\\])*\"|'(?:\\.|[^'\\])*'|\.?\d[\w.]*|[A-Za-z_$]\w*")
_DIRECTIVE = re.compile(r"#\s*(\w+)\s*(.*)", re.DOTALL)


def stays(name: str) -> bool:
    """Whether a name means the same in every program: a keyword, MPI's, the C library's."""
    return name in KEYWORDS or name in LIBRARY or _FIXED.fullmatch(name) is not None


def naming(code: Sequence[str], more: Sequence[str] = (), *, rng: random.Random | None = None) -> dict[str, str]:
    """New names for the identifiers of `code`, and of the lines `more` that it was stripped of: a bijection.

    `func_1` where the first use is followed by a bracket as in a call, `arr_1` as in an index, `var_1` else, in the order of first use;
    those of the code first, so that its names say nothing of the lines that are gone. With `rng` numbers are dealt out at random, which
    makes many programs of one. Our choice; keywords, names of MPI and of the C library stay.

    >>> naming(["int rank, data[4];", "f(rank);"])
    {'rank': 'var_1', 'data': 'arr_1', 'f': 'func_1'}
    """
    kinds: dict[str, str] = {}
    for line in (*code, *more):
        words = _words(line)
        for at, token in enumerate(words):
            if token.kind == "name" and not stays(token.text):
                mark = words[at + 1].text if at + 1 < len(words) else ""
                kinds.setdefault(token.text, {"(": "func", "[": "arr"}.get(mark, "var"))
    found, counts = {}, {"func": 0, "arr": 0, "var": 0}
    totals = {kind: list(kinds.values()).count(kind) for kind in counts}
    dealt = {kind: list(range(1, total + 1)) for kind, total in totals.items()}
    if rng is not None:
        for numbers in dealt.values():
            rng.shuffle(numbers)
    for name, kind in kinds.items():
        found[name] = f"{kind}_{dealt[kind][counts[kind]]}"
        counts[kind] += 1
    return found


def renamed(line: str, names: Mapping[str, str]) -> str:
    """A line with its identifiers replaced; strings, numbers and included files stay.

    >>> renamed('printf("rank", rank);', {"rank": "var_1"})
    'printf("rank", var_1);'
    """
    directive = _DIRECTIVE.fullmatch(line)
    if directive is None:
        return joined([Token(token.kind, _new(token, names)) for token in line_tokens(line)])
    word, rest = directive[1], directive[2]
    if word in ("include", "error", "pragma") or not rest:
        return line
    # what follows a macro's name at once is its arguments: names are exchanged, and nothing is spaced anew
    return line[: directive.start(2)] + _WORD.sub(lambda word: names.get(word[0], word[0]), rest)


def _new(token: Token, names: Mapping[str, str]) -> str:
    return names.get(token.text, token.text) if token.kind == "name" else token.text


def _words(line: str) -> Sequence[Token]:
    directive = _DIRECTIVE.fullmatch(line)
    if directive is None:
        return line_tokens(line)
    return [] if directive[1] in ("include", "error", "pragma") else tokens(directive[2])

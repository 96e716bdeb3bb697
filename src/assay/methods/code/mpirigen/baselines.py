"""What puts calls into a program without a language model: nothing, chance, a template, the nearest known program."""

from __future__ import annotations

import difflib
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from assay.methods.code.mpirigen.marks import Item, Stripped
from assay.methods.code.mpirigen.names import stays
from assay.methods.code.mpirigen.tokens import line_tokens

Annotator = Callable[[Sequence[str]], list[Item]]
"""From the lines of a program without calls to the calls and their places."""
ANCHORS = ("top of main", "after its declarations", "before its last return", "end of main")
_MAIN = re.compile(r"\bmain ?\(")
_NO_TYPE = frozenset(["return", "break", "continue", "goto", "case", "default"])


def nothing(code: Sequence[str]) -> list[Item]:
    """No calls at all."""
    return []


def numbered_items(found: Sequence[tuple[int, str]]) -> list[Item]:
    """Items from lines and texts, numbered in their order at each line; texts at a line stay in the order given."""
    counts: Counter[int] = Counter()
    items = []
    for line, text in sorted(found, key=lambda each: each[0]):
        counts[line] += 1
        items.append(Item(line, counts[line], text))
    return items


def at_random(known: Sequence[Stripped], *, seed: int = 0) -> Annotator:
    """As many calls as a known program has, drawn from all known calls, at random lines. Raises ValueError for no programs."""
    counts, texts = [len(one.items) for one in _some(known)], [item.text for one in known for item in one.items]

    def annotate(code: Sequence[str]) -> list[Item]:
        rng = random.Random(f"{seed}/{len(code)}/{code[:3]}")
        many = rng.choice(counts)
        return numbered_items([(rng.randint(0, len(code)), rng.choice(texts)) for _ in range(many)])

    return annotate


def usual_arguments(known: Sequence[Stripped]) -> Callable[[str, int, Sequence[str]], tuple[str, ...]]:
    """For a function, a number of arguments and the lines of a program: the most frequent arguments of such calls in known programs.

    Those whose names the program has come first; none where no such call is known.

    >>> items = [Item(1, n, f"MPI_Wait({name}, 0);") for n, name in enumerate("aab", 1)]
    >>> usual = usual_arguments([Stripped(("x;",), tuple(items))])
    >>> usual("MPI_Wait", 2, ["int c;"]), usual("MPI_Wait", 2, ["int b;"]), usual("MPI_Wait", 1, ["int b;"])
    (('a', '0'), ('b', '0'), ())
    """
    seen: dict[tuple[str, int], Counter[tuple[str, ...]]] = {}
    for one in _some(known):
        for _, call in one.calls:
            seen.setdefault((call.function, len(call.arguments)), Counter())[call.arguments] += 1
    usual = {key: [given for given, _ in counts.most_common()] for key, counts in seen.items()}
    names = {given: {name for name in _names(given) if not stays(name)} for each in usual.values() for given in each}

    def arguments(function: str, many: int, code: Sequence[str]) -> tuple[str, ...]:
        choice, held = usual.get((function, many)), _names(code)
        return next((given for given in choice if names[given] <= held), choice[0]) if choice else ()

    return arguments


def _names(lines: Iterable[str]) -> set[str]:
    """The identifiers in lines, but for directives."""
    return {
        token.text for line in lines if not line.startswith("#") for token in line_tokens(line) if token.kind == "name"
    }


def everywhere(known: Sequence[Stripped]) -> Annotator:
    """The most frequent call of each of the eight most frequent functions after every line: what a score of recall alone rewards."""
    functions = Counter(call.function for one in _some(known) for _, call in one.calls)
    texts = []
    for function, _ in functions.most_common(8):
        [(text, _)] = Counter(
            item.text for one in known for item in one.items if [call.function for call in item.calls] == [function]
        ).most_common(1) or [("", 0)]
        texts += [text] if text else []
    return lambda code: numbered_items([(line, text) for line in range(len(code) + 1) for text in texts])


# ------------------------------------------------------------------------------------------------------------------ the template


def anchors(code: Sequence[str]) -> dict[str, int]:
    """The lines after which a template puts calls: after main's brace, after its declarations, before its last return, before its end.

    Empty where there is no main. A declaration is a statement that begins with two words, as far as can be told without types.

    >>> anchors(["int main(void)", "{", "int n;", "n = 1;", "return 0;", "}"])
    {'top of main': 2, 'after its declarations': 3, 'before its last return': 4, 'end of main': 5}
    """
    start = next((at for at, line in enumerate(code) if _MAIN.search(line) and not line.endswith(";")), None)
    if start is None:
        return {}
    depth, opened, end = 0, start, len(code)
    for at in range(start, len(code)):
        depth += (code[at] == "{") - (code[at] in ("}", "};"))
        if code[at] == "{" and opened == start:
            opened = at
        if code[at] in ("}", "};") and depth == 0:
            end = at
            break
    declared = opened + 1
    while declared < end and _declares(code[declared]):
        declared += 1
    returns = [at for at in range(opened, end) if code[at].startswith("return")]
    return {ANCHORS[0]: opened + 1, ANCHORS[1]: declared, ANCHORS[2]: returns[-1] if returns else end, ANCHORS[3]: end}


def _declares(line: str) -> bool:
    words = line_tokens(line)
    first = [word.text for word in words[:2]]
    if line.startswith("#") or len(words) < 3 or words[0].kind != "name" or first[0] in _NO_TYPE:
        return line.startswith("#")
    return words[1].kind == "name" or first[1] == "*" and words[2].kind == "name"


@dataclass(frozen=True)
class _Part:
    """A call that most programs have: its place and text, with the names its variables had most often."""

    function: str
    anchor: str
    text: str
    names: tuple[str, ...]


class Template:
    """The calls that at least `share` of the known programs have, each where it stands most often, with its most frequent text.

    The variable of `&name` is the one of that role's usual names that the program has (rank, myrank, ...), else the most frequent.
    Order among calls at one place: as they are most often. Raises ValueError for no programs.
    """

    def __init__(self, known: Sequence[Stripped], *, share: float = 0.5) -> None:
        self.parts: list[_Part] = []
        with_main = [(one, anchors(one.code)) for one in _some(known)]
        have = Counter(function for one in known for function in {call.function for _, call in one.calls})
        ranks: dict[str, list[float]] = {}
        for one in known:
            for at, (_, call) in enumerate(one.calls):
                ranks.setdefault(call.function, []).append(at / len(one.calls))
        usual = [name for name, count in have.items() if count >= share * len(known)]
        for function in sorted(usual, key=lambda name: (float(np.median(ranks[name])), name)):
            places: Counter[str] = Counter()
            texts: Counter[str] = Counter()
            names: Counter[str] = Counter()
            for one, found in with_main:
                mine = [(item, call) for item in one.items for call in item.calls if call.function == function]
                for item, call in mine:
                    places.update(name for name in ANCHORS if name in found and abs(found[name] - item.line) <= 1)
                    texts[f"{function}({', '.join(call.arguments)});"] += 1
                    names.update(_variable(call.arguments))
            if places:
                [(anchor, _)] = places.most_common(1)
                self.parts.append(
                    _Part(function, anchor, texts.most_common(1)[0][0], tuple(n for n, _ in names.most_common()))
                )

    def __call__(self, code: Sequence[str]) -> list[Item]:
        """The calls for a program without; none where it has no main."""
        found = anchors(code)
        held = _names(code)
        placed = []
        for part in self.parts:
            if part.anchor in found:
                own = [name for name in part.names if name in held] or list(part.names)
                text = re.sub(r"&(\w+)\);$", f"&{own[0]});", part.text) if own else part.text
                placed.append((found[part.anchor], text))
        return numbered_items(placed)


def _variable(arguments: Sequence[str]) -> list[str]:
    """The variable that a call writes to as its last argument, if it is one that programs name."""
    name = arguments[-1].removeprefix("&") if arguments and arguments[-1].startswith("&") else ""
    return [name] if re.fullmatch(r"[A-Za-z_]\w*", name) and not stays(name) else []


# ------------------------------------------------------------------------------------------------------------ the nearest program


class Nearest:
    """The calls of the known program whose code is most alike, at the lines that correspond.

    Likeness is the cosine of counts of words, rare ones weighing more. Lines correspond as `difflib` aligns them, names replaced by the
    order of their use; a call after a line without a counterpart goes where its neighbours do. Raises ValueError for no programs.
    """

    def __init__(self, known: Sequence[Stripped]) -> None:
        self.known = list(_some(known))
        counts = [_words(one.code) for one in self.known]
        seen = Counter(word for each in counts for word in each)
        self._number = {word: at for at, word in enumerate(seen)}
        many = np.array(list(seen.values()), dtype=np.float64)
        self._weight = np.log((1 + len(counts)) / (1 + many)) + 0.1
        self._vectors = np.stack([self._vector(each) for each in counts])

    def _vector(self, counts: Counter[str]) -> NDArray[np.float32]:
        found = np.zeros(len(self._number))
        for word, many in counts.items():
            if (at := self._number.get(word)) is not None:
                found[at] = 1 + np.log(many)
        found *= self._weight
        length = float(np.linalg.norm(found))
        return np.asarray(found / length if length else found, dtype=np.float32)

    def order(self, code: Sequence[str]) -> list[int]:
        """The known programs by likeness, the most alike first."""
        likeness = self._vectors @ self._vector(_words(code))
        return [int(at) for at in np.argsort(-likeness, kind="stable")]

    def __call__(self, code: Sequence[str]) -> list[Item]:
        other = self.known[self.order(code)[0]]
        place = corresponding(other.code, code)
        return numbered_items([(place[item.line], item.text) for item in other.items])


def corresponding(other: Sequence[str], code: Sequence[str]) -> list[int]:
    """For each number of lines of `other`, 0 to all of them, the number of lines of `code` that it corresponds to.

    >>> corresponding(["{", "int n;", "n = 1;", "}"], ["{", "int k;", "int m;", "f(m);", "}"])
    [0, 1, 2, 4, 5]
    """
    blocks = difflib.SequenceMatcher(None, _shapes(other), _shapes(code), autojunk=False).get_matching_blocks()
    known: dict[int, int] = {0: 0, len(other): len(code)}
    for block in blocks:
        known.update((block.a + n + 1, block.b + n + 1) for n in range(block.size))
    at = sorted(known)
    return [round(float(np.interp(line, at, [known[each] for each in at]))) for line in range(len(other) + 1)]


def _shapes(code: Sequence[str]) -> list[str]:
    """Lines with names that differ from program to program left open."""
    return [
        " ".join("_" if token.kind == "name" and not stays(token.text) else token.text for token in line_tokens(line))
        for line in code
    ]


def _words(code: Sequence[str]) -> Counter[str]:
    found: Counter[str] = Counter()
    for line in code:
        words = [token.text for token in line_tokens(line)]
        found.update(words)
        found.update(map(" ".join, zip(words, words[1:], strict=False)))
    return found


def _some(known: Sequence[Stripped]) -> Sequence[Stripped]:
    if not known or not any(one.items for one in known):
        raise ValueError(f"known must be one or more programs with calls, got {len(known)} programs")
    return known

"""A small model that is trained here in seconds: after every line it decides which call of MPI follows, if any.

It stands for the question behind the paper's format, what it is worth to have seen the whole program before the first call is written. One
form sees the whole program, the other the lines so far, as a model does that completes from left to right; both know which calls they have
put. Otherwise they are the same: logistic regression over words, as many examples, steps and weights. It is no language model: arguments
are the usual ones of the function, with names that the program has.
"""

from __future__ import annotations

import random
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from assay.experiments.code import mpirigen_programs as programs
from assay.experiments.rates import chosen, searched
from assay.methods.code import mpirigen as room
from assay.methods.code.mpirigen import Item, Stripped

Form = Literal["whole program", "left to right"]
FORMS: tuple[Form, ...] = ("whole program", "left to right")
SEARCH = "mpirigen/forms"
BUCKETS = 2**16
FUNCTIONS = 24
"""The most frequent functions, which the model knows; others it never puts."""
NEAR = 3
"""Lines before and after a place whose words count by their distance."""
AT_A_PLACE = 6
"""Calls at one place, at most."""
NONE = 0
LEANS = (0.0, 0.7, 1.4, 2.1)
"""What is taken from the score of no call, in nats."""
KEPT = 0.2


@dataclass(frozen=True)
class Size:
    """How long it is trained. Our choice: some seconds."""

    epochs: int = 4
    batch: int = 64


FOUR = ("MPI_Init", "MPI_Comm_rank", "MPI_Comm_size", "MPI_Finalize")


@lru_cache(maxsize=2**18)
def bucket(text: str) -> int:
    """The weight that a word at its place has; the same in every process."""
    return zlib.crc32(text.encode()) % BUCKETS


class Program:
    """What is looked at in a program, once: the words of its lines, and where main's parts are."""

    def __init__(self, code: Sequence[str]) -> None:
        self.lines = [
            [_plain(token.kind, token.text) for token in room.line_tokens(line)] or ["<blank>"] for line in code
        ]
        self.anchors = room.anchors(code)
        self.depths, depth = [0], 0
        for line in code:
            depth += (line == "{") - (line in ("}", "};"))
            self.depths.append(depth)
        self.behind, self.ahead = _growing(self.lines, "behind"), _growing(self.lines[::-1], "ahead")[::-1]

    def features(self, place: int, put: Sequence[str], here: int, form: Form) -> NDArray[np.int64]:
        """Numbers of what is seen at a place: after `place` lines, when the functions `put` stand before, `here` of them at this place."""
        return np.concatenate([self.now(place, put, here, form), self.always(place, form)])

    def always(self, place: int, form: Form) -> NDArray[np.int64]:
        """Those of the code alone."""
        seen = [f"depth {min(self.depths[place], 4)}"]
        for distance in range(NEAR):
            seen += [f"-{distance} {word}" for word in self._before(place, distance)]
        start = self.anchors.get("top of main")
        seen.append(f"since main {min(place - start, 12) if start is not None and place >= start else 'not'}")
        bags = [self.behind[place]]
        if form == "whole program":
            for distance in range(NEAR):
                seen += [f"+{distance} {word}" for word in self._after(place, distance)]
            seen += [f"{name} {max(-6, min(6, line - place))}" for name, line in self.anchors.items()]
            seen.append(f"left {min(len(self.lines) - place, 12)}")
            bags.append(self.ahead[place])
        return np.concatenate([_numbers(seen), *bags])

    def now(self, place: int, put: Sequence[str], here: int, form: Form) -> NDArray[np.int64]:
        """Those that the calls put so far have a part in."""
        last = put[-1] if put else ""
        seen = [f"here {min(here, 4)}", f"last {last} {min(here, 1)}"]
        seen += [f"put {function}" for function in {*put}]
        seen += [f"no {function}" for function in FOUR if function not in put]
        for distance in range(NEAR):
            seen.append(f"-{distance} first {self._before(place, distance)[0]} {last}")
            if form == "whole program":
                seen.append(f"+{distance} first {self._after(place, distance)[0]} {last}")
        return _numbers(seen)

    def _before(self, place: int, distance: int) -> list[str]:
        return self.lines[place - 1 - distance] if place - 1 - distance >= 0 else ["<start>"]

    def _after(self, place: int, distance: int) -> list[str]:
        return self.lines[place + distance] if place + distance < len(self.lines) else ["<end>"]


def _numbers(seen: Iterable[str]) -> NDArray[np.int64]:
    return np.fromiter(map(bucket, seen), np.int64)


def _growing(lines: Sequence[Sequence[str]], tag: str) -> list[NDArray[np.int64]]:
    """Numbers of the words of the first 0, 1, 2, ... lines, each once."""
    known: dict[int, None] = {}
    sizes = [0]
    for line in lines:
        known.update(dict.fromkeys(bucket(f"{tag} {word}") for word in line))
        sizes.append(len(known))
    every = np.array([*known], dtype=np.int64)
    return [every[:size] for size in sizes]


def _plain(kind: str, text: str) -> str:
    return {"string": "<string>", "number": "<number>"}.get(kind, text)


class Model:
    """Functions by number, weights, and the texts of calls."""

    def __init__(self, learned: Sequence[Stripped]) -> None:
        counts = Counter(call.function for one in learned for _, call in one.calls)
        self.functions = ["", *(function for function, _ in counts.most_common(FUNCTIONS))]
        self.weights = nn.EmbeddingBag(BUCKETS, len(self.functions), mode="sum", sparse=True)
        nn.init.zeros_(self.weights.weight)
        self.fill = texts_of(learned)
        self.lean = 0.0

    def examples(self, learned: Sequence[Stripped], form: Form) -> list[tuple[NDArray[np.int64], int]]:
        """Every place with what follows there: its calls one after the other, then none."""
        number = {function: at for at, function in enumerate(self.functions)}
        found = []
        for one in learned:
            looked = Program(one.code)
            at_line: dict[int, list[str]] = {}
            for line, call in one.calls:
                at_line.setdefault(line, []).append(call.function)
            put: list[str] = []
            for place in range(1, len(one.code) + 1):
                for here, function in enumerate([*at_line.get(place, []), ""]):
                    if function in number:
                        found.append((looked.features(place, put, here, form), number[function]))
                    put += [function] if function else []
        return found

    def train(self, learned: Sequence[Stripped], form: Form, size: Size, seed: int, rate: float) -> int:
        """Fit the weights by Adagrad, its rates falling by themselves; the number of examples, which is the same for both forms."""
        examples = self.examples(learned, form)
        rng = random.Random(seed)
        optimizer = torch.optim.Adagrad(self.weights.parameters(), lr=rate)
        for _ in range(size.epochs):
            rng.shuffle(examples)
            for start in range(0, len(examples), size.batch):
                batch = examples[start : start + size.batch]
                loss = nn.functional.cross_entropy(
                    self._logits([seen for seen, _ in batch]), torch.tensor([wanted for _, wanted in batch])
                )
                optimizer.zero_grad()
                loss.backward()
                with torch.sparse.check_sparse_tensor_invariants(False):  # said explicitly, or torch warns
                    optimizer.step()
        return len(examples)

    def _logits(self, seen: Sequence[NDArray[np.int64]]) -> Tensor:
        offsets = np.cumsum([0, *(len(each) for each in seen[:-1])])
        out: Tensor = self.weights(torch.from_numpy(np.concatenate(seen)), torch.from_numpy(offsets))
        return out

    def answer(self, code: Sequence[str], form: Form) -> list[Item]:
        """The calls that the model puts, from the first line to the last, each the likeliest at its place."""
        return self.answers(code, form, [self.lean])[0]

    @torch.no_grad()
    def answers(self, code: Sequence[str], form: Form, leans: Sequence[float]) -> list[list[Item]]:
        """The answer for each lean. What is the same whatever was put is looked at once."""
        if not code:
            return [[] for _ in leans]
        looked, weights = Program(code), self.weights.weight.detach().numpy()
        fixed = self._logits([looked.always(place, form) for place in range(1, len(code) + 1)]).numpy()
        found = []
        for lean in leans:
            put: list[str] = []
            texts: list[tuple[int, str]] = []
            for place in range(1, len(code) + 1):
                for here in range(AT_A_PLACE):
                    scores = fixed[place - 1] + weights[looked.now(place, put, here, form)].sum(0)
                    scores[NONE] -= lean
                    best = int(scores.argmax())
                    if best == NONE:
                        break
                    put.append(self.functions[best])
                    texts.append((place, self.fill(self.functions[best], code)))
            found.append(room.numbered_items(texts))
        return found


def texts_of(learned: Sequence[Stripped]) -> Callable[[str, Sequence[str]], str]:
    """A function's most frequent text among those all of whose names the program has; its most frequent of all where there is none."""
    seen: dict[str, Counter[str]] = {}
    for one in learned:
        for _, call in one.calls:
            seen.setdefault(call.function, Counter())[f"{call.function}({', '.join(call.arguments)});"] += 1
    usual = {function: [text for text, _ in counts.most_common()] for function, counts in seen.items()}
    names = {
        text: {t.text for t in room.line_tokens(text) if t.kind == "name" and not room.stays(t.text)}
        for texts in usual.values()
        for text in texts
    }

    def text_of(function: str, code: Sequence[str]) -> str:
        held = {word for line in code for word in re.findall(r"[A-Za-z_]\w*", line)}
        return next((text for text in usual[function] if names[text] <= held), usual[function][0])

    return text_of


def apart(learned: Sequence[Stripped]) -> tuple[list[Stripped], list[Stripped]]:
    """The programs that a model is fitted to, and a fifth that is kept to choose its lean."""
    return programs.split(learned, KEPT, seed=2)


def trained(
    fitted: Sequence[Stripped], kept: Sequence[Stripped], form: Form, size: Size, seed: int, rate: float
) -> tuple[Model, int]:
    """A model fitted to some programs, and the number of its examples.

    Others choose how far it leans towards a call: where one is likely at each of several places, and surely at none, the likeliest
    everywhere would be none at all.
    """
    model = Model(fitted)
    many = model.train(fitted, form, size, seed, rate)
    marks = np.zeros(len(LEANS))
    for one in kept:
        marks += [room.score(one.calls, room.placed(each)).f1 for each in model.answers(one.code, form, LEANS)]
    model.lean = LEANS[int(marks.argmax())]
    return model, many


def models(learned: Sequence[Stripped], size: Size, seeds: Sequence[int]) -> dict[Form, list[tuple[Model, int]]]:
    """Both forms under each seed, which gives the order of the examples; the rates are those that were searched."""
    fitted, kept = apart(learned)
    return {
        form: [trained(fitted, kept, form, size, seed, chosen(SEARCH, form).rate) for seed in seeds] for form in FORMS
    }


@searched(SEARCH, arms=FORMS, grid=(0.03, 0.1, 0.3, 1.0))
def search(arm: str, rate: float) -> float:
    """One less the mean F1, one to one, on a quarter of the learned programs that is kept for the choice."""
    form: Form = "whole program" if arm == "whole program" else "left to right"
    learned, kept = programs.split(programs.parts("released").learned, 0.25, seed=1)
    model, _ = trained(*apart(learned), form, Size(), 100, rate)
    seen = [room.score(one.calls, room.placed(model.answer(one.code, form))).f1 for one in kept]
    return 1 - float(sum(seen)) / len(seen)

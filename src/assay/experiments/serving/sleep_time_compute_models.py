"""Small decoders that add up lists of digits: over a table and a question with four lengths of thinking, over a table alone, and with
what they wrote about it before.

A table is some lists of digits, a question asks for the sum of one list or of two, modulo the base: with four lists there are ten
questions. The lists have three or four digits, so that a question takes two to seven additions: the problems that the paper begins with
(GSM8K) take two to eight. Everything is words of a small vocabulary, a word being a token:

    table A1=3 A2=5 ... D4=0 w3 AB              -> A1=3 A2=5 A2:2 A3=4 A=0 B1=1 ... B=1 AB=1 .   each cell read and added (budget 3)
    table A1=3 A2=5 ... D4=0 w2 AB              -> A2:2 A=0 B2:3 B=1 AB=1 .                      added without reading it out
    table A1=3 A2=5 ... D4=0 w1 AB              -> A=0 B=1 AB=1 .                                the sum of each list at once
    table A1=3 A2=5 ... D4=0 w0 AB              -> 1 .                                           the answer at once
    table A1=3 A2=5 ... D4=0 sleep              -> A1=3 A2=5 A2:2 A3=4 A=0 B1=1 ... D=2 .
    table A1=3 ... D4=0 memory A=0 B=1 C=5 D=2 w1 AB -> A=0 B=1 AB=1 .                           the sums looked up and added
    table A1=3 ... D4=0 memory A=0 B=1 C=5 D=2 w0 AB -> 1 .                                      the answer at once

A memory has no answer to a question about two lists: whoever sleeps does not know which are asked about. Which of the budgets are enough,
without a memory and behind one, is what the models decide. One model learns all of it at once, as many rows of each kind in every
step, because in the paper too one model sleeps, thinks and answers. What the controls need is learnt beside it in the same way.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.experiments.inference import language
from assay.experiments.rates import chosen, searched
from assay.methods.core.generation.slices import sliced
from assay.methods.serving.sleep_time_compute import FINISH, RETHINK, Call, Message, Reply

SEARCH = "sleep_time_compute/tables"
Recipe = Mapping[str, Any]
RECIPE: dict[str, Any] = {
    "values": [3, 3, 4, 4], "base": 6,  # digits of each list
    "width": 64, "layers": 2, "heads": 2, "steps": 1200, "rows": 6,  # rows of each kind in a step
    "seeds": 4, "contexts": 100,
}  # fmt: skip
FULL: dict[str, Any] = {
    **RECIPE, "width": 256, "layers": 4, "heads": 8, "steps": 6000, "rows": 12, "seeds": 5, "contexts": 400,
}  # fmt: skip
SMOKE: dict[str, Any] = {**RECIPE, "values": [1, 2, 2, 2], "width": 32, "steps": 10, "seeds": 3, "contexts": 5}
LEVELS = 4
SHORT = (0, 1)
"""Budgets without thinking: those that are asked behind a memory. The others would work out again what the memory holds."""
KINDS = (
    *(f"budget {level}" for level in range(LEVELS)),
    "sleep",
    *(f"memory, budget {level}" for level in SHORT),
    "memory of another table",  # the controls, at both short budgets
    "table twice",
    "memory only",
)
TOGETHER = (  # kinds of about the same length run in one batch
    ("budget 0", "budget 1", "budget 2", "memory only"),
    ("budget 3", "memory, budget 0", "memory, budget 1", "memory of another table"),
    ("table twice", "sleep"),
)
ASKED_NOTHING = -100
NAMES = "ABCDEFGH"
Table = Sequence[Sequence[int]]


# ----------------------------------------------------------------------------------------------------------------- the task


def names(recipe: Recipe) -> str:
    """The lists."""
    return NAMES[: len(recipe["values"])]


def questions(recipe: Recipe) -> list[str]:
    """All questions: one list, or two of them. Ten for four lists."""
    pairs = ["".join(pair) for pair in combinations(names(recipe), 2)]
    return [*names(recipe), *pairs]


def additions(question: str, recipe: Recipe) -> int:
    """How many additions a question takes."""
    return sum(recipe["values"][NAMES.index(name)] for name in question) - 1


def vocabulary(recipe: Recipe) -> list[str]:
    """All words."""
    cells = [f"{name}{n + 1}" for name, many in zip(NAMES, recipe["values"], strict=False) for n in range(many)]
    digits = [str(digit) for digit in range(recipe["base"])]
    marks = ["table", "memory", "other", "sleep", ".", *(f"w{level}" for level in range(LEVELS))]
    told = [f"{name}={digit}" for name in [*cells, *questions(recipe)] for digit in digits]
    return [*digits, *told, *(f"{cell}:{digit}" for cell in cells for digit in digits), *questions(recipe), *marks]


def parts_of(word: str) -> dict[str, float]:
    """What a word is made of, with weights whose squares add up to 1: its lists or its cell, its sign and its digit."""
    name, *rest = [part for part in re.split(r"([=:])", word) if part]
    parts = [*(name if name.isupper() and name.isalpha() else [name]), *rest]
    return dict.fromkeys(parts, len(parts) ** -0.5)


def new_table(recipe: Recipe, chance: random.Random) -> list[list[int]]:
    return [[chance.randrange(recipe["base"]) for _ in range(many)] for many in recipe["values"]]


def tables(recipe: Recipe, n: int, *, part: str) -> list[list[list[int]]]:
    """Tables for a purpose ("choice" of budgets, "heldout"), other ones for each."""
    chance = random.Random(f"{part} tables")
    return [new_table(recipe, chance) for _ in range(n)]


def table_text(table: Table) -> str:
    """The table as the context that an agent is given."""
    return " ".join(
        f"{NAMES[row]}{n + 1}={value}" for row, values in enumerate(table) for n, value in enumerate(values)
    )


def answer_of(table: Table, question: str, base: int) -> int:
    return sum(sum(table[NAMES.index(name)]) for name in question) % base


def added(table: Table, name: str, base: int, *, read: bool) -> list[str]:
    """A list added up: each sum from the second digit on, the last of them that of the list; with `read`, each digit read out before."""
    values = table[NAMES.index(name)]
    total, written = 0, []
    for n, value in enumerate(values, 1):
        total = (total + value) % base
        written += [f"{name}{n}={value}"] * read
        if n == len(values):
            written.append(f"{name}={total}")
        elif n > 1:
            written.append(f"{name}{n}:{total}")
    return written


def thought(table: Table, question: str, level: int, base: int) -> list[str]:
    """What is right to write at a budget; the last number is the answer.

    0 the answer; 1 the sum of each list, and of both; 2 each list added up; 3 with every digit read out.
    """
    if level == 0:
        return [str(answer_of(table, question, base)), "."]
    lists = [f"{name}={answer_of(table, name, base)}" for name in question]
    if level > 1:
        lists = [word for name in question for word in added(table, name, base, read=level == 3)]
    both = [f"{question}={answer_of(table, question, base)}"] * (len(question) > 1)
    return [*lists, *both, "."]


def memory_text(table: Table, recipe: Recipe) -> str:
    """The right memory: the sum of every list."""
    return " ".join(f"{name}={answer_of(table, name, recipe['base'])}" for name in names(recipe))


def slept(table: Table, recipe: Recipe) -> list[str]:
    """What is right to write in a sleep: every list added up, each digit read out."""
    return [*(word for name in names(recipe) for word in added(table, name, recipe["base"], read=True)), "."]


class Said:
    """The prompts of an agent for these models (`Prompts`): bare words.

    `form` says how a memory is shown: "memory" behind the table; "other" the same, marked as another table's; "only" without the table.
    """

    version = "words"

    def __init__(self, form: str = "memory") -> None:
        self.form = form

    def sleep(self, context: str) -> list[Message]:
        return [{"role": "user", "content": f"table {context} sleep"}]

    def test(self, context: str, blocks: Sequence[str], question: str, budget: int) -> list[Message]:
        table = [] if self.form == "only" and blocks else ["table", context]
        mark = "other" if self.form == "other" else "memory"
        words = [*table, *(f"{mark} {block}" for block in blocks), f"w{budget}", question]
        return [{"role": "user", "content": " ".join(words).strip()}]


def example(kind: str, recipe: Recipe, chance: random.Random) -> tuple[list[str], list[str]]:
    """A prompt and what is right to say to it."""
    table, base = new_table(recipe, chance), recipe["base"]
    question, context = chance.choice(questions(recipe)), table_text(table)
    if kind == "sleep":
        return Said().sleep(context)[0]["content"].split(), slept(table, recipe)
    level = int(kind[-1]) if kind[-1].isdigit() else chance.choice(SHORT)
    blocks: tuple[str, ...] = ()
    form = "memory"
    if kind == "table twice":
        context = f"{context} table {context}"
    elif kind == "memory of another table":
        blocks, form = (memory_text(new_table(recipe, chance), recipe),), "other"
    elif kind.startswith("memory"):
        blocks, form = (memory_text(table, recipe),), "only" if kind == "memory only" else "memory"
    prompt = Said(form).test(context, blocks, question, level)[0]["content"]
    return prompt.split(), thought(table, question, level, base)


# ------------------------------------------------------------------------------------------------------------------ training


def batches(recipe: Recipe, seed: int | str) -> Iterator[Any]:
    """Endless batches: for each of `TOGETHER`, inputs and targets (rows, words), padded at the end."""
    chance = random.Random(f"tables {seed}")
    numbers = {word: n for n, word in enumerate(vocabulary(recipe))}
    while True:
        made = []
        for kinds in TOGETHER:
            rows = [example(kind, recipe, chance) for kind in kinds for _ in range(recipe["rows"])]
            width = max(len(prompt) + len(answer) for prompt, answer in rows) - 1
            inputs = torch.zeros(len(rows), width, dtype=torch.int64)
            targets = torch.full_like(inputs, ASKED_NOTHING)
            for row, (prompt, answer) in enumerate(rows):
                ids = torch.tensor([numbers[word] for word in (*prompt, *answer)])
                inputs[row, : len(ids) - 1] = ids[:-1]
                targets[row, len(prompt) - 1 : len(ids) - 1] = ids[len(prompt) :]
            made.append((inputs, targets))
        yield tuple(inputs for inputs, _ in made), tuple(targets for _, targets in made)


def loss_of(model: nn.Module, inputs: Any, targets: Any) -> Tensor:
    """Cross-entropy of the words that are to be said, summed over a row and divided by the root of their number, on average over rows.

    Between a mean over words, under which an answer of two words hardly counts beside a sleep of twenty-five, and one over rows.
    """
    losses = []
    for ids, wanted in zip(inputs, targets, strict=True):
        logits = model(ids).logits.transpose(1, 2)
        each = F.cross_entropy(logits, wanted, ignore_index=ASKED_NOTHING, reduction="none").sum(1)
        losses.append(each / (wanted != ASKED_NOTHING).sum(1) ** 0.5)
    return torch.cat(losses).mean()


def new_model(recipe: Recipe, seed: int) -> Any:
    """A new model whose words begin as the sums of their parts, so that a digit is the same wherever it stands; rotary frequencies are
    low, for what is looked up stands near or far.
    """
    words = vocabulary(recipe)
    model = language.small_llama(
        width=recipe["width"], layers=recipe["layers"], heads=recipe["heads"], seed=seed, vocab=len(words),
        rope_parameters={"rope_type": "default", "rope_theta": 1e8},
    )  # fmt: skip
    parts = list(dict.fromkeys(part for word in words for part in parts_of(word)))
    made = torch.zeros(len(words), len(parts))
    for row, word in enumerate(words):
        for part, weight in parts_of(word).items():
            made[row, parts.index(part)] = weight
    generator = torch.Generator().manual_seed(seed)
    vectors = made @ torch.randn(len(parts), recipe["width"], generator=generator)
    model.model.embed_tokens.weight.data = vectors
    model.lm_head.weight.data = vectors * recipe["width"] ** -0.5
    return model


def trained_model(recipe: Recipe, seed: int, rate: float) -> Any:
    """The model of a seed, trained once and kept."""
    sizes = {name: value for name, value in recipe.items() if name not in ("seeds", "contexts")}
    return language.trained(
        {**sizes, "seed": seed},
        lambda: new_model(recipe, seed),
        lambda: batches(recipe, seed),
        steps=recipe["steps"],
        rate=rate,
        loss=loss_of,
        sources=[sys.modules[__name__]],
    )


@searched(SEARCH, arms=("one model of all kinds",), grid=(2e-3, 5e-3, 1.2e-2))
def rate_loss(arm: str, rate: float) -> float:
    """The loss on tables kept for the choice, at the size and for the steps of `small`."""
    torch.set_num_threads(1)
    model = trained_model(RECIPE, 100, rate)
    with torch.inference_mode():
        stream = batches(RECIPE, "validation")
        return float(torch.stack([loss_of(model, *next(stream)) for _ in range(20)]).mean())


# ------------------------------------------------------------------------------------------------------------------- asking


class WordModel:
    """A model of words as a chat function. It is greedy, so that what was asked before is answered from a note (`fill` asks for many).

    What a sleep says is its text; the sums in it ("A=5") are what it calls `rethink_memory` with, before `finish_rethinking_memory`.
    """

    def __init__(self, model: Any, recipe: Recipe) -> None:
        self.model, self.recipe = model, recipe
        self.words = vocabulary(recipe)
        self._numbers = {word: n for n, word in enumerate(self.words)}
        self._known: dict[str, str] = {}
        table = [[0] * many for many in recipe["values"]]
        longest = max(len(thought(table, question, LEVELS - 1, recipe["base"])) for question in questions(recipe))
        self._longest = {True: len(slept(table, recipe)) + 4, False: longest + 4}

    def ids(self, prompts: Sequence[str]) -> Tensor:
        """Prompts of equally many words as numbers: (prompts, words)."""
        return torch.tensor([[self._numbers[word] for word in prompt.split()] for prompt in prompts])

    def fill(self, prompts: Iterable[str], *, batch: int = 500) -> None:
        """Answer many prompts, those of one length at a time."""
        groups: dict[tuple[int, bool], list[str]] = {}
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._known:
                groups.setdefault((len(prompt.split()), prompt.endswith("sleep")), []).append(prompt)
        for (_, sleeps), group in groups.items():
            for start in range(0, len(group), batch):
                part = group[start : start + batch]
                for prompt, said in zip(part, self.complete(self.ids(part), self._longest[sleeps]), strict=True):
                    self._known[prompt] = said

    @torch.inference_mode()
    def complete(self, ids: Tensor, most: int, cache: Any = None) -> list[str]:
        """What the model says to each prompt, up to its first full stop, greedily; behind the tokens of `cache`, if there is one."""
        stop = self._numbers["."]
        kept = {} if cache is None else {"cache": cache}
        out = self.model(ids, use_cache=True, logits_to_keep=1, **kept)
        said = [out.logits[:, -1].argmax(-1)]
        over = said[0] == stop
        while len(said) < most and not bool(over.all()):
            out = self.model(said[-1][:, None], cache=out.cache, use_cache=True)
            said.append(out.logits[:, -1].argmax(-1))
            over |= said[-1] == stop
        rows = torch.stack(said, 1).tolist()
        ends = [row.index(stop) + 1 if stop in row else len(row) for row in rows]
        return [" ".join(self.words[n] for n in row[:end]) for row, end in zip(rows, ends, strict=True)]

    @torch.inference_mode()
    def likelihoods(self, prompts: Sequence[str], answers: Sequence[int], *, batch: int = 500) -> list[float]:
        """How likely the right number is as the first word, of each prompt, at temperature 1."""
        found: list[float] = []
        for start in range(0, len(prompts), batch):
            chances = self.model(self.ids(prompts[start : start + batch]), logits_to_keep=1).logits[:, -1].softmax(-1)
            wanted = torch.tensor([self._numbers[str(answer)] for answer in answers[start : start + batch]])
            found += chances[torch.arange(len(wanted)), wanted].tolist()
        return found

    def __call__(self, messages: Sequence[Message], **settings: Any) -> Reply:
        prompt = str(messages[0]["content"])  # what was said before makes no difference to it
        self.fill([prompt])
        return reply(prompt, self._known[prompt])

    def once(self, prompt: str, kept: str = "", cache: Any = None) -> str:
        """One answer really computed, as whoever is asked does; with `cache`, behind the words `kept` that it holds."""
        rest = prompt.removeprefix(kept).strip()
        behind = None if cache is None else sliced(cache, 0, len(kept.split()))
        return self.complete(self.ids([rest]), self._longest[prompt.endswith("sleep")], behind)[0]

    @torch.inference_mode()
    def read(self, prefix: str) -> Any:
        """The cache of a prefix: what a server that keeps prefixes has of it."""
        return self.model(self.ids([prefix]), use_cache=True, logits_to_keep=1).cache


def reply(prompt: str, said: str) -> Reply:
    """What was said as a Reply: words are tokens, and of a sleep the sums of lists are a memory that is kept, each name once.

    Without any sum nothing is called.
    """
    words, read = said.split(), len(prompt.split())
    sums: dict[str, str] = {}
    for word in words:
        name, sign, _ = word.partition("=")
        if sign and name.isalpha():
            sums.setdefault(name, word)
    if not (prompt.endswith("sleep") and sums):
        return Reply(said, len(words), read)
    arguments = json.dumps({"new_memory": " ".join(sums.values())})
    return Reply(said, len(words), read, calls=(Call(RETHINK, arguments, "1"), Call(FINISH, "{}", "2")))


def word_model(recipe: Recipe, seed: int) -> WordModel:
    """The trained model of a seed, ready to be asked."""
    return WordModel(trained_model(recipe, seed, chosen(SEARCH, "one model of all kinds").rate), recipe)

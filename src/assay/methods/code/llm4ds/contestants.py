"""Who may write programs for data-science tasks without a network: whoever looks up the most similar solution, follows rules, or is
a small model.

A contestant is a function from a task to a program, with a name. `prompt_of` is the paper's way of asking: one template for each
kind of task.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from assay.methods.code.llm4ds.judging import Question

TEMPLATES = {
    "analytical": "Write a Python function that answers this question about data.\n\n{prompt}\n"
    "Allowed libraries: numpy, pandas. Return the answer and print nothing. Give the code of the whole function only.",
    "algorithm": "Write a Python function that implements this algorithm.\n\n{prompt}\n"
    "Allowed library: numpy. Return the result and print nothing. Give the code of the whole function only.",
    "visualization": "Write a Python function that draws this plot.\n\n{prompt}\n"
    "Allowed libraries: numpy, matplotlib. Return the figure and do not show it. Give the code of the whole function only.",
}
"""After the paper's outline (what is asked, libraries, what to return, nothing else); the words are our choice."""


def prompt_of(task: Question) -> str:
    """What a model is asked: the template of the task's kind, with the function's header and its docstring.

    >>> from types import SimpleNamespace
    >>> prompt_of(SimpleNamespace(kind="algorithm", prompt="def f(x):\\n")).splitlines()[2]
    'def f(x):'
    """
    return TEMPLATES[task.kind].replace("{prompt}", task.prompt)


def program_of(reply: str) -> str:
    """The program in a reply: what stands between its first fences, which may not have been closed, or all of it.

    >>> program_of("Sure:\\n```python\\nx = 1\\n```\\nThat is all."), program_of("x = 1")
    ('x = 1\\n', 'x = 1\\n')
    """
    found = re.search(r"```[a-zA-Z]*\n(.*?)(?:\n```|\Z)", reply, re.DOTALL)
    return (found[1] if found else reply).rstrip() + "\n"


# ------------------------------------------------------------------------------------------------------------------- retrieval


@dataclass(frozen=True)
class Retrieval:
    """The solution of the task whose text is most similar, never of the same task (leave one out): cosine of words, weighted by rarity.

    `known` are tasks with solutions. The function found gets the name that was asked for. When NOT to use it: as a measure of a bank's
    difficulty; it says how much one task's solution is another's.
    """

    known: Sequence[Question]
    name: str = "nearest solution"

    def nearest(self, task: Question) -> Question:
        """The most similar other task; of equally similar ones the first. Raises ValueError where there is no other."""
        others = [other for other in self.known if other.id != task.id]
        if not others:
            raise ValueError(f"known must hold another task than {task.id!r}")
        counts = [_words(other.prompt) for other in others]
        holding = Counter(word for own in counts for word in own)
        asked = self._weighted(_words(task.prompt), holding, len(others))
        near = [_cosine(asked, self._weighted(own, holding, len(others))) for own in counts]
        return others[near.index(max(near))]

    def __call__(self, task: Question) -> str:
        """Its program, under the name that was asked for."""
        found = self.nearest(task)
        return f"{found.solution}\n\n{task.entry_point} = {found.entry_point}\n"

    @staticmethod
    def _weighted(counts: Counter[str], holding: Counter[str], n: int) -> dict[str, float]:
        return {word: count * math.log((1 + n) / (1 + holding[word])) for word, count in counts.items()}


def _words(text: str) -> Counter[str]:
    return Counter(re.findall(r"[a-z]+", text.lower()))


def _cosine(a: dict[str, float], b: dict[str, float]) -> float:
    size = math.sqrt(sum(x * x for x in a.values()) * sum(x * x for x in b.values()))
    return sum(x * b.get(word, 0.0) for word, x in a.items()) / size if size else 0.0


# ----------------------------------------------------------------------------------------------------------------------- rules


@dataclass(frozen=True)
class TableRules:
    """Programs for questions about one table, put together by rules from the words of the question; "" for what no rule fits.

    A rule takes what to compute (mean, median, total, number, share, largest, smallest, correlation, the names at the top), of which
    column or product of columns, of which rows (whose column is missing, or above or below the mean, the median or a number) and for each
    of which column. It knows the wording of the bank, whose author wrote it: it is a baseline, and no measure of such rules elsewhere.
    """

    name: str = "table rules"

    def __call__(self, task: Question) -> str:
        """A program, or "" where no rule fits."""
        text = " ".join(task.prompt.partition('"""')[2].partition('"""')[0].split())
        table = re.search(r"\((rows|df)\)", task.prompt)
        listed = re.search(r"(?:keys|columns) (?:are )?([a-z0-9_ ,]+?(?: and [a-z0-9_]+)?)[.;]", text)
        if task.kind != "analytical" or table is None or listed is None:
            return ""
        columns = re.split(r", | and ", listed[1])
        asked = text[listed.end() :].partition("Return")[2].strip()
        body = _body(asked, columns)
        if not body:
            return ""
        rows = 'df.to_dict("records")' if table[1] == "df" else "rows"
        lines = [f"def {task.entry_point}({table[1]}):", f"    table = {rows}", *body]
        return "import statistics\n\nimport numpy as np\n\n\n" + "\n".join(lines) + "\n"


_STATISTICS = (
    (r"\bmedian\b", "statistics.median"),
    (r"\b(mean|average)\b", "statistics.fmean"),
    (r"\b(total|sum)\b", "sum"),
    (r"\b(largest|highest|maximum)\b", "max"),
    (r"\b(smallest|lowest|minimum)\b", "min"),
)


def _body(asked: str, columns: Sequence[str]) -> list[str]:
    """The lines of the function, "table" being the list of rows."""
    one = "|".join(map(re.escape, columns))
    if found := re.search(rf"correlation of ({one}) and ({one})", asked):
        pair = ", ".join(f'[row["{name}"] for row in table]' for name in found.groups())
        return [f"    return float(np.corrcoef({pair})[0, 1])"]
    if found := re.search(rf"list of the (\w+?)s of the (\w+) with the (highest|lowest) ({one})", asked):
        many = {"two": 2, "three": 3, "five": 5, "ten": 10}.get(found[2])
        if many is None or found[1] not in columns:
            return []
        sign = "-" if found[3] == "highest" else ""
        key = f'lambda row: ({sign}row["{found[4]}"], row["{found[1]}"])'
        return [f'    return [row["{found[1]}"] for row in sorted(table, key={key})[:{many}]]']
    condition = _condition(asked, one)
    share = re.search(r"\bshare of (the )?rows\b", asked)
    if share:
        return (
            [*condition[0], f"    return sum(bool({condition[1]}) for row in table) / len(table)"] if condition else []
        )
    group = re.search(rf"for each ({one})\b", asked)
    what = _what(asked, one)
    if not what:
        return []
    statistic, value = what
    chosen = f"[{value} for row in {{}} if {condition[1] if condition else 'True'}]"
    before = condition[0] if condition else []
    if group:
        return [
            *before,
            "    groups = {}",
            "    for row in table:",
            f'        groups.setdefault(row["{group[1]}"], []).append(row)',
            f"    return {{name: {statistic}({chosen.format('own')}) for name, own in groups.items()}}",
        ]
    return [*before, f"    return {statistic}({chosen.format('table')})"]


def _what(asked: str, one: str) -> tuple[str, str] | None:
    """The statistic, and of what."""
    head = re.split(r"\bof the \w+ whose\b|\bfor each\b", asked)[0]
    if re.search(r"\bnumber of (orders|rows)\b", head):
        return "len", "1"
    statistic = next((name for pattern, name in _STATISTICS if re.search(pattern, head)), None)
    product = re.search(rf"\b({one}) times ({one})\b", head)
    column = re.search(rf"\b({one})\b", head)
    if statistic is None or column is None:
        return None
    value = f'row["{product[1]}"] * row["{product[2]}"]' if product else f'row["{column[1]}"]'
    return statistic, value


def _condition(asked: str, one: str) -> tuple[list[str], str] | None:
    """Lines that come before, and a test of a row."""
    if found := re.search(rf"whose ({one}) is missing", asked):
        return [], f'row["{found[1]}"] is None'
    if found := re.search(rf"whose ({one}) is (above|below) (?:the (mean|median) \w+|(-?\d+(?:\.\d+)?))", asked):
        sign = ">" if found[2] == "above" else "<"
        if found[4]:
            return [], f'row["{found[1]}"] {sign} {found[4]}'
        statistic = {"mean": "fmean", "median": "median"}[found[3]]
        return [
            f'    limit = statistics.{statistic}(row["{found[1]}"] for row in table)'
        ], f'row["{found[1]}"] {sign} limit'
    return None


# ----------------------------------------------------------------------------------------------------------------------- models


@dataclass(frozen=True)
class Writer:
    """A language model: `reply` gets what is asked of all tasks and answers each."""

    reply: Callable[[Sequence[str]], Sequence[str]]
    name: str

    def programs(self, tasks: Sequence[Question]) -> dict[str, str]:
        """A program for every task."""
        said = self.reply([prompt_of(task) for task in tasks])
        return {task.id: program_of(text) for task, text in zip(tasks, said, strict=True)}


Contestant = Retrieval | TableRules | Writer


def programs_of(contestant: Contestant, tasks: Sequence[Question]) -> dict[str, str]:
    """A contestant's program for every task, by task id; "" where it has none."""
    if isinstance(contestant, Writer):
        return contestant.programs(tasks)
    return {task.id: contestant(task) for task in tasks}

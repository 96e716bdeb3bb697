"""RL: programs of several files, as repositories have them, in Python and C++."""

from __future__ import annotations

from string import Template

from assay.workloads.programs.surge.source import Language, Source

Files = dict[str, str]
_CALCULATOR: Files = {
    "main.py": """from machine import run
from parser import parse

print(run(parse("$text")))
""",
    "parser.py": """def parse(text):
    output, waiting = [], []
    strength = {"+": 1, "-": 1, "*": 2}
    for token in text.split():
        if token in strength:
            while waiting and strength[waiting[-1]] >= strength[token]:
                output.append(waiting.pop())
            waiting.append(token)
        else:
            output.append(int(token))
    return output + waiting[::-1]
""",
    "machine.py": """def run(program):
    stack = []
    for step in program:
        if isinstance(step, int):
            stack.append(step)
            continue
        b, a = stack.pop(), stack.pop()
        stack.append(a + b if step == "+" else a - b if step == "-" else a * b)
    return stack[0]
""",
}
_SHOP: Files = {
    "main.py": """from cart import Cart
from prices import PRICES

cart = Cart(PRICES)
for name in "$names".split():
    cart.add(name)
print(cart.receipt())
""",
    "cart.py": """class Cart:
    def __init__(self, prices):
        self.prices, self.items = prices, {}

    def add(self, name):
        self.items[name] = self.items.get(name, 0) + 1

    def receipt(self):
        lines = [f"{name} x{count}: {count * self.prices[name]}" for name, count in sorted(self.items.items())]
        total = sum(count * self.prices[name] for name, count in self.items.items())
        return "\\n".join([*lines, f"total: {total}"])
""",
    "prices.py": """PRICES = {"apple": 3, "bread": 5, "cheese": 9}
""",
}
_TWENTY_FOUR: Files = {
    "main.py": """from search import solve

print(solve($numbers) or "no way")
""",
    "search.py": """from steps import steps


def solve(numbers):
    state = [(float(n), str(n)) for n in numbers]
    return _search(state)


def _search(state):
    if len(state) == 1:
        return state[0][1] if abs(state[0][0] - 24) < 1e-9 else None
    for i in range(len(state)):
        for j in range(len(state)):
            if i != j:
                rest = [state[k] for k in range(len(state)) if k not in (i, j)]
                for result in steps(state[i], state[j]):
                    found = _search([*rest, result])
                    if found:
                        return found
    return None
""",
    "steps.py": """def steps(a, b):
    yield a[0] + b[0], f"({a[1]} + {b[1]})"
    yield a[0] - b[0], f"({a[1]} - {b[1]})"
    yield a[0] * b[0], f"({a[1]} * {b[1]})"
    if b[0]:
        yield a[0] / b[0], f"({a[1]} / {b[1]})"
""",
}
_SUDOKU: Files = {
    "main.py": """from grid import show
from solver import solve

print(show(solve("$cells")))
""",
    "solver.py": """from grid import fits


def solve(cells):
    if "." not in cells:
        return cells
    at = cells.index(".")
    for digit in "1234":
        if fits(cells, at, digit):
            found = solve(cells[:at] + digit + cells[at + 1 :])
            if found:
                return found
    return None
""",
    "grid.py": """def fits(cells, at, digit):
    row, column = divmod(at, 4)
    for other, value in enumerate(cells):
        r, c = divmod(other, 4)
        if value == digit and (r == row or c == column or (r // 2 == row // 2 and c // 2 == column // 2)):
            return False
    return True


def show(cells):
    return "\\n".join(" ".join(cells[4 * row : 4 * row + 4]) for row in range(4))
""",
}
_BANK: Files = {
    "main.cpp": """#include <cstdio>
#include "account.h"

int main() {
    Account account($start);
    const int amounts[] = {$amounts};
    for (int amount : amounts)
        if (!account.move(amount)) std::printf("refused %d\\n", amount);
    std::printf("%d\\n", account.balance());
}
""",
    "account.h": """#pragma once

class Account {
public:
    explicit Account(int start);
    bool move(int amount);
    int balance() const;

private:
    int held;
};
""",
    "account.cpp": """#include "account.h"

Account::Account(int start) : held(start) {}

bool Account::move(int amount) {
    if (held + amount < 0) return false;
    held += amount;
    return true;
}

int Account::balance() const { return held; }
""",
}
_QUEUE: Files = {
    "main.cpp": """#include <cstdio>
#include "ring.h"

int main() {
    Ring ring;
    const int values[] = {$values};
    for (int value : values) ring.push(value);
    std::printf("%d %d\\n", ring.sum(), ring.oldest());
}
""",
    "ring.h": """#pragma once

class Ring {
public:
    void push(int value);
    int sum() const;
    int oldest() const;

private:
    int held[3] = {0, 0, 0};
    int next = 0;
};
""",
    "ring.cpp": """#include "ring.h"

void Ring::push(int value) {
    held[next] = value;
    next = (next + 1) % 3;
}

int Ring::sum() const { return held[0] + held[1] + held[2]; }

int Ring::oldest() const { return held[next]; }
""",
}
_PROJECTS: dict[str, tuple[Language, str, Files, list[dict[str, str]]]] = {
    "calculator": ("python", "python", _CALCULATOR, [{"text": "2 + 3 * 4 - 5"}, {"text": "7 * 2 - 3 * 3"}]),
    "shop": ("python", "python", _SHOP, [{"names": "bread apple bread"}, {"names": "cheese apple apple apple"}]),
    "24-game": ("python", "24-game", _TWENTY_FOUR, [{"numbers": "[4, 6, 1, 1]"}, {"numbers": "[3, 3, 8, 8]"}]),
    "sudoku": ("python", "sudoku", _SUDOKU, [{"cells": "1..4..1..1..4..1"}, {"cells": "3..4.4..2...41.."}]),
    "account": ("cpp", "c++", _BANK, [
        {"start": "10", "amounts": "5, -20, -3"}, {"start": "0", "amounts": "-1, 8, -8"},
    ]),
    "ring": ("cpp", "c++", _QUEUE, [{"values": "1, 2, 3, 4"}, {"values": "9, 5"}]),
}  # fmt: skip


def made() -> list[Source]:
    """Six small projects, each with two inputs."""
    found = []
    for name, (language, family, files, settings) in _PROJECTS.items():
        for number, values in enumerate(settings):
            texts = {path: Template(text).substitute(values) for path, text in files.items()}
            given = ", ".join(values.values())
            found.append(Source(f"RL/{name}/{number}", "RL", family, f"RL/{name}", language, texts, given=given))
    return found

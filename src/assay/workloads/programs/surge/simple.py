"""ML: simple programs in five languages, those of the bank of HumanEval tasks among them."""

from __future__ import annotations

from assay.workloads.programs.surge.source import Language, Source, filled
from assay.workloads.programs.task import bank

TASKS = ("HumanEval/9", "HumanEval/18", "HumanEval/34", "HumanEval/40", "HumanEval/43", "HumanEval/58", "HumanEval/70")
"""Of the bank: those with short answers."""

_OWN: dict[str, tuple[Language, str, list[dict[str, object]]]] = {
    "digits": ("c", r"""
#include <stdio.h>

int main(void) {
    int n = $n, sum = 0;
    while (n > 0) {
        sum += n % 10;
        n /= 10;
    }
    printf("%d\n", sum);
    return 0;
}
""", [{"n": 4071}, {"n": 98}]),
    "gcd": ("c", r"""
#include <stdio.h>

int gcd(int a, int b) { return b == 0 ? a : gcd(b, a % b); }

int main(void) {
    printf("%d\n", gcd($a, $b));
    return 0;
}
""", [{"a": 84, "b": 36}, {"a": 17, "b": 51}]),
    "bits": ("c", r"""
#include <stdio.h>

int main(void) {
    unsigned x = $x;
    int ones = 0;
    for (; x; x &= x - 1) ones++;
    printf("%d\n", ones);
    return 0;
}
""", [{"x": 255}, {"x": 37}]),
    "vowels": ("cpp", r"""
#include <iostream>
#include <string>

int main() {
    std::string text = "$text";
    int found = 0;
    for (char c : text)
        if (std::string("aeiou").find(c) != std::string::npos) found++;
    std::cout << found << std::endl;
}
""", [{"text": "a plain sentence"}, {"text": "rhythm and blues"}]),
    "backwards": ("cpp", r"""
#include <algorithm>
#include <iostream>
#include <string>

int main() {
    std::string text = "$text";
    std::reverse(text.begin(), text.end());
    std::cout << text << std::endl;
}
""", [{"text": "lantern"}, {"text": "drawer"}]),
    "squares": ("node", r"""
const limit = $limit;
let total = 0;
for (let i = 1; i <= limit; i++) {
    if (i % 2 === 0) total += i * i;
}
console.log(total);
""", [{"limit": 6}, {"limit": 9}]),
    "joined": ("node", r"""
const words = [$words];
console.log(words.filter((word) => word.length > 3).map((word) => word.toUpperCase()).join("-"));
""", [{"words": '"oak", "maple", "ash", "birch"'}, {"words": '"sun", "moon", "star"'}]),
    "sorting as text": ("node", r"""
const numbers = [$numbers];
numbers.sort();
console.log(numbers.join(" "));
""", [{"numbers": "10, 9, 2, 33"}, {"numbers": "5, 40, 300, 1"}]),
}  # fmt: skip

_SCHEMA = """create table sales(city text, item text, amount integer);
insert into sales values ('Bern', 'tea', 4), ('Bern', 'rice', 7), ('Lyon', 'tea', 9), ('Lyon', 'salt', 1), ('Porto', 'rice', 5);
"""
_QUERIES = {
    "by city": [
        "select city, sum(amount) from sales group by city order by city;",
        "select city, count(*) from sales group by city order by city;",
    ],
    "largest": [
        "select item from sales order by amount desc limit 1;",
        "select item from sales order by amount limit 1;",
    ],
    "without tea": [
        "select count(*) from sales where item <> 'tea';",
        "select sum(amount) from sales where item <> 'tea';",
    ],
    "running": ["select item, sum(amount) over (order by amount) from sales order by amount limit 3;"],
}


def made() -> list[Source]:
    """Python, C, C++, JavaScript and SQL."""
    tasks = bank()
    found = []
    for name in TASKS:
        task = tasks[name]
        for number in range(2):
            arguments = task.arguments(0, number + 1)
            given = ", ".join(map(repr, arguments))
            text = f"{task.programs['expert']}\n\nprint({task.entry_point}({given}))\n"
            files = {"main.py": text}
            found.append(Source(f"ML/{name}/{number}", "ML", "python", name, "python", files, given=given))
    for name, (language, template, settings) in _OWN.items():
        found += filled("ML", name, language, template, settings, family=language)
    for name, queries in _QUERIES.items():
        for number, query in enumerate(queries):
            files = {"query.sql": query + "\n", "schema.sql": _SCHEMA}
            found.append(Source(f"ML/{name}/{number}", "ML", "sql", f"ML/{name}", "sql", files))
    return found

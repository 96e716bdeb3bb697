"""What stands for a trained model: rules for C++, the edits of similar pairs, and random changes as the control.

The rules are what somebody who reads a slow program for a competition changes before thinking about it. They work on text, know no C++,
and may break a program: samples are compiled and tested like a model's. They were written beside the bank of problems by the same
hand, before any of their samples was measured.
"""

from __future__ import annotations

import difflib
import random
import re
from collections.abc import Callable, Sequence

from assay.methods.code.pie_code_edits import Pair

Rule = Callable[[str], str]
MAIN = re.compile(r"^int main\(.*\) *\{\n", re.MULTILINE)
CONTAINER = r"(?:std::)?(?:vector|string|map|set|multiset|list|deque|pair)\b(?:<[^()&]*>)?"
FUNCTION = re.compile(r"^(?!.*\bmain\()[\w:<>, ]+ \w+\((.*)\) *\{", re.MULTILINE)


def untied_streams(program: str) -> str:
    """Streams of C++ need not keep pace with C's, where only the former are used."""
    if not re.search(r"\b(cin|cout)\b", program) or "sync_with_stdio" in program:
        return program
    if re.search(r"\b(printf|scanf|puts|putchar|getchar|fread|fwrite|gets)", program):
        return program
    start = "    std::ios::sync_with_stdio(false);\n    std::cin.tie(nullptr);\n"
    return MAIN.sub(lambda found: found.group() + start, program, count=1)


def plain_newlines(program: str) -> str:
    """A line is not sent off by itself."""
    return re.sub(r"<<\s*(?:std::)?endl\b", r"<< '\\n'", program)


def references(program: str) -> str:
    """Containers go to functions and through loops as references to constants."""

    def header(found: re.Match[str]) -> str:
        changed = re.sub(rf"(^|, )({CONTAINER}) (\w+)(?= *(?:,|$))", r"\1const \2& \3", found.group(1))
        return found.group().replace(f"({found.group(1)})", f"({changed})", 1)

    program = FUNCTION.sub(header, program)
    return re.sub(rf"\bfor \((auto|{CONTAINER}) (\w+) :", r"for (const \1& \2 :", program)


def lengths_once(program: str) -> str:
    """strlen of a condition is taken before the loop."""
    lines: list[str] = []
    for line in program.split("\n"):
        found = re.match(r"( *)(?:for|while) \(", line)
        if found:
            for number, name in enumerate(dict.fromkeys(re.findall(r"strlen\((\w+)\)", line))):
                lines.append(f"{found.group(1)}const int {name}_length_{len(lines)}_{number} = strlen({name});")
                line = line.replace(f"strlen({name})", f"{name}_length_{len(lines) - 1}_{number}")
        lines.append(line)
    return "\n".join(lines)


def squares(program: str) -> str:
    """A square is a product."""
    return re.sub(r"\bpow\(([^(),]+), 2\)", r"((\1) * (\1))", program)


def whole_roots(program: str) -> str:
    """Up to the root without a root."""
    return re.sub(r"\b(\w+) <= sqrt\((\w+)\)", r"\1 * \1 <= \2", program)


def trial_division(program: str) -> str:
    """Divisors are looked for up to the root: right where only their being there is asked for."""
    return re.sub(r"(for \(int (\w+) = 2; \2) <= (\w+)(?: / 2)?;(?=[^\n]*\n[^\n]*% *\2\b)", r"\1 * \2 <= \3;", program)


def remembered(program: str) -> str:
    """A function of whole numbers that calls itself twice keeps what it has found."""
    for found in re.finditer(r"^(int|long long) (\w+)\(([^()]*)\) \{\n", program, re.MULTILINE):
        kind, name, given = found.groups()
        given_names = [part.rpartition(" ") for part in given.split(", ")]
        end = program.find("\n}\n", found.end())
        body = program[found.end() : end]
        if name == "main" or end < 0 or any(part[0] not in ("int", "long long") for part in given_names):
            continue
        if len(re.findall(rf"\b{name}\(", body)) < 2 or "known" in body:
            continue
        names = ", ".join(part[2] for part in given_names)
        kinds = ", ".join(part[0] for part in given_names)
        keeper = (
            f"{kind} {name}({given});\n\n{kind} {name}_itself({given}) {{\n{body}\n}}\n\n"
            f"{kind} {name}({given}) {{\n    static std::map<std::tuple<{kinds}>, {kind}> known;\n"
            f"    auto at = known.find({{{names}}});\n    if (at != known.end()) return at->second;\n"
            f"    return known[{{{names}}}] = {name}_itself({names});\n}}\n"
        )
        return "#include <map>\n#include <tuple>\n" + program[: found.start()] + keeper + program[end + 3 :]
    return program


def hashed(program: str) -> str:
    """Maps and sets without an order."""
    changed = re.sub(r"(?<![\w<])(map|set)<(int|long long|string|char)\b", r"unordered_\1<\2", program)
    if changed == program:
        return program
    return "#include <unordered_map>\n#include <unordered_set>\n" + changed


def bolder_compiler(program: str) -> str:
    """What the compiler may do more than -O3 lets it."""
    return '#pragma GCC optimize("Ofast,unroll-loops")\n#pragma GCC target("avx2,bmi,popcnt")\n' + program


SAFE: tuple[Rule, ...] = (
    untied_streams, plain_newlines, references, lengths_once, squares, whole_roots,
)  # fmt: skip
BOLD: tuple[Rule, ...] = (remembered, trial_division, hashed, bolder_compiler)


def applied(program: str, rules: Sequence[Rule]) -> str:
    """One rule after the other."""
    for rule in rules:
        program = rule(program)
    return program


def by_rules(program: str) -> list[str]:
    """Samples: the safe rules, each bold one with them, all, and each alone, as far as they differ from one another and the program."""
    sets = [SAFE, *((*SAFE, bold) for bold in BOLD), (*SAFE, *BOLD), *((rule,) for rule in (*SAFE, *BOLD))]
    return [text for text in dict.fromkeys(applied(program, rules) for rules in sets) if text != program]


def transplanted(program: str, pair: Pair) -> str:
    """What was changed from a pair's source to its target, wherever the same lines stand in the program; itself where none do."""
    before, after = pair.source.splitlines(), pair.target.splitlines()
    lines = program.splitlines()
    for tag, a, b, c, d in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        old = [line.strip() for line in before[a:b]]
        if tag not in ("replace", "delete") or not any(len(line) > 1 for line in old):
            continue
        for at in range(len(lines) - len(old) + 1):
            if [line.strip() for line in lines[at : at + len(old)]] == old:
                lines[at : at + len(old)] = after[c:d]
                break
    changed = "\n".join(lines) + "\n"
    if changed.split() == program.split():
        return program
    needed = [line for line in after if line.startswith("#include") and line not in lines]
    return "\n".join([*needed, changed])


def by_retrieval(program: str, nearest: Sequence[Pair]) -> list[str]:
    """Samples: the edits of each of the nearest pairs, nearest first, that find their place."""
    return [text for text in dict.fromkeys(transplanted(program, pair) for pair in nearest) if text != program]


def at_random(program: str, k: int, seed: str) -> list[str]:
    """Samples with one random change of a line that is no #include: left out, twice, before the one above it, or a number in it changed."""
    rng = random.Random(seed)
    found = []
    for _ in range(k):
        lines = program.splitlines()
        at = rng.choice([n for n, line in enumerate(lines) if line.strip() and not line.startswith("#")])
        kind = rng.choice(("out", "twice", "up", "number"))
        if kind == "out":
            del lines[at]
        elif kind == "twice":
            lines.insert(at, lines[at])
        elif kind == "up" and at:
            lines[at - 1], lines[at] = lines[at], lines[at - 1]
        else:
            lines[at] = re.sub(r"\b\d+\b", lambda number: str(int(number.group()) + rng.choice((-1, 1))), lines[at])
        found.append("\n".join(lines) + "\n")
    return found

"""HumanEval/119 match_parens: can two strings of parentheses be put together to a good one?"""

# %% task
SIZES = (6, 600, 4_000, 20_000)  # parentheses in both strings, about
COMPARE = "same"


def generate(size, rng):
    """Deep nests and pairs, good but for their ends: nobody sees before the end of the first string that an order does not do."""
    if size < 20 and rng.random() < 0.25:
        return (["".join(rng.choices("()", k=rng.randint(1, size))) for _ in range(2)],)

    def good():
        depth, parts = max(1, size // 16), []
        for _ in range(3):
            parts.append("()" * rng.randrange(depth) + "(" * depth + ")" * depth)
        return "".join(parts)

    first, second = rng.choice(
        (
            (good() + ")", "(" + good()),  # the other order does
            ("(" + good(), good() + ")"),  # this one does
            (good() + "(", good() + "("),  # too many
            (good() + ")(", good() + ")("),  # as many of both, and neither order does
        )
    )
    return ([first, second],)


def contract(lst):
    assert isinstance(lst, list)
    assert len(lst) == 2
    assert all(isinstance(text, str) for text in lst)
    assert set("".join(lst)) <= set("()")


# %% expert: neighbouring pairs struck out once, then run by run, O(n)
import re


def match_parens(lst):
    if lst[0].count("(") + lst[1].count("(") != lst[0].count(")") + lst[1].count(")"):
        return "No"

    def balance(text):
        """The lowest balance on the way, and the one at the end."""
        depth = lowest = 0
        for run in re.findall(r"\(+|\)+", text.replace("()", "")):
            if run[0] == "(":
                depth += len(run)
            else:
                depth -= len(run)
                lowest = min(lowest, depth)
        return lowest, depth

    (lowest1, end1), (lowest2, end2) = map(balance, lst)
    forwards = lowest1 >= 0 and end1 + lowest2 >= 0
    return "Yes" if forwards or lowest2 >= 0 and end2 + lowest1 >= 0 else "No"


# %% balance in a loop, both orders, O(n)
def match_parens(lst):
    def good(text):
        depth = 0
        for char in text:
            depth += 1 if char == "(" else -1
            if depth < 0:
                return False
        return depth == 0

    a, b = lst
    return "Yes" if good(a + b) or good(b + a) else "No"


# %% stack of open parentheses, O(n)
def match_parens(lst):
    def good(text):
        stack = []
        for char in text:
            if char == "(":
                stack.append(char)
            elif not stack:
                return False
            else:
                stack.pop()
        return not stack

    return "Yes" if any(good(text) for text in (lst[0] + lst[1], lst[1] + lst[0])) else "No"


# %% pairs struck out until none is left, quadratic in the depth
def match_parens(lst):
    def good(text):
        while "()" in text:
            text = text.replace("()", "")
        return text == ""

    if good("".join(lst)) or good("".join(reversed(lst))):
        return "Yes"
    return "No"


# %% pairs struck out by a regular expression, quadratic in the depth
import re


def match_parens(lst):
    def good(text):
        count = 1
        while count:
            text, count = re.subn(r"(?:\(\))+", "", text)
        return not text

    return "Yes" if good(lst[0] + lst[1]) or good(lst[1] + lst[0]) else "No"


# %% each string reduced to what it closes and opens, O(n)
def match_parens(lst):
    def reduced(text):
        closes = opens = 0
        for char in text:
            if char == "(":
                opens += 1
            elif opens:
                opens -= 1
            else:
                closes += 1
        return closes, opens

    (closes1, opens1), (closes2, opens2) = map(reduced, lst)
    forwards = closes1 == 0 and opens2 == 0 and opens1 == closes2
    backwards = closes2 == 0 and opens1 == 0 and opens2 == closes1
    return "Yes" if forwards or backwards else "No"


# %% each string struck out by itself first, then put together, quadratic in the depth
def match_parens(lst):
    def strike(text):
        shorter = text.replace("()", "")
        while len(shorter) < len(text):
            text, shorter = shorter, shorter.replace("()", "")
        return text

    first, second = strike(lst[0]), strike(lst[1])
    return "Yes" if strike(first + second) == "" or strike(second + first) == "" else "No"


# %% accumulated balances of both orders, O(n)
from itertools import accumulate

WORTH = {"(": 1, ")": -1}


def match_parens(lst):
    for order in (lst, lst[::-1]):
        balances = list(accumulate(WORTH[char] for char in "".join(order)))
        if not balances or balances[-1] == 0 and min(balances) >= 0:
            return "Yes"
    return "No"


# %% counts of every beginning compared, quadratic
def match_parens(lst):
    def good(text):
        places = [place for place, char in enumerate(text, 1) if char == ")" and text[place : place + 1] != ")"]
        return text.count("(") == text.count(")") and all(
            text.count("(", 0, place) >= text.count(")", 0, place) for place in places
        )

    return "Yes" if good(lst[0] + lst[1]) or good(lst[1] + lst[0]) else "No"


# %% wrong: only counts
def match_parens(lst):
    text = lst[0] + lst[1]
    return "Yes" if text.count("(") == text.count(")") else "No"


# %% wrong: only the given order
def match_parens(lst):
    depth = 0
    for char in lst[0] + lst[1]:
        depth += 1 if char == "(" else -1
        if depth < 0:
            return "No"
    return "Yes" if depth == 0 else "No"

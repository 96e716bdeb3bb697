"""HumanEval/1 separate_paren_groups: the balanced groups of a string of parentheses."""

# %% task
SIZES = (14, 4000, 20000, 60000)  # characters, about
COMPARE = "same"


def generate(size, rng):
    parts = []
    length = 0
    while length < size:  # many small groups, blanks between and within them
        pairs = rng.randint(1, 3 if size <= 14 else 12)
        opened = depth = 0
        while opened < pairs or depth:
            if opened < pairs and (depth == 0 or rng.random() < 0.5):
                parts.append("(")
                opened, depth = opened + 1, depth + 1
            else:
                parts.append(")")
                depth -= 1
            if rng.random() < 0.2:
                parts.append(" ")
        length += 2 * pairs
    return ("".join(parts),)


def contract(paren_string):
    assert isinstance(paren_string, str) and set(paren_string) <= set("() ")
    depth = 0
    for c in paren_string:
        depth += (c == "(") - (c == ")")
        assert depth >= 0
    assert depth == 0


# %% expert: running depths in C, cut where they are 0, O(n)
from itertools import accumulate

STEP = [0] * 128
STEP[ord("(")], STEP[ord(")")] = 1, -1


def separate_paren_groups(paren_string):
    text = paren_string.replace(" ", "")
    depths = accumulate(map(STEP.__getitem__, text.encode()))
    ends = [end for end, depth in enumerate(depths, 1) if not depth]
    return [text[start:end] for start, end in zip([0, *ends], ends)]


# %% a string that grows, and its depth
def separate_paren_groups(paren_string):
    groups = []
    group = ""
    depth = 0
    for c in paren_string:
        if c == " ":
            continue
        group += c
        depth += 1 if c == "(" else -1
        if depth == 0:
            groups.append(group)
            group = ""
    return groups


# %% a stack of the open ones
def separate_paren_groups(paren_string):
    text = "".join(paren_string.split())
    stack = []
    groups = []
    for at, c in enumerate(text):
        if c == "(":
            stack.append(at)
        else:
            start = stack.pop()
            if not stack:
                groups.append(text[start : at + 1])
    return groups


# %% a parser by recursive descent
def separate_paren_groups(paren_string):
    text = paren_string.replace(" ", "")

    def after(at):
        at += 1
        while text[at] == "(":
            at = after(at)
        return at + 1

    groups = []
    at = 0
    while at < len(text):
        end = after(at)
        groups.append(text[at:end])
        at = end
    return groups


# %% counts of both kinds after every character, O(n * length of a group)
def separate_paren_groups(paren_string):
    groups = []
    group = []
    for c in paren_string:
        if c != " ":
            group.append(c)
            if group.count("(") == group.count(")"):
                groups.append("".join(group))
                group = []
    return groups


# %% the first group is cut off until nothing is left, O(n * groups)
def separate_paren_groups(paren_string):
    rest = paren_string.replace(" ", "")
    groups = []
    while rest:
        depth, end = 1, 1
        while depth:
            depth += 1 if rest[end] == "(" else -1
            end += 1
        groups.append(rest[:end])
        rest = rest[end:]
    return groups


# %% the next closing one by find, until as many were opened
def separate_paren_groups(paren_string):
    text = paren_string.replace(" ", "")
    groups = []
    start = 0
    while start < len(text):
        end, closed = start, 0
        while True:
            end = text.find(")", end) + 1
            closed += 1
            if end - start == 2 * closed:
                break
        groups.append(text[start:end])
        start = end
    return groups


# %% wrong: blanks taken for the borders
def separate_paren_groups(paren_string):
    return paren_string.split()


# %% wrong: a border wherever one closes and the next opens
def separate_paren_groups(paren_string):
    return paren_string.replace(" ", "").replace(")(", ") (").split()

"""HumanEval/18 how_many_times: how often a string holds another, overlapping places counted."""

# %% task
SIZES = (10, 2000, 8000, 24000)
COMPARE = "same"


def generate(size, rng):
    if size <= 10:
        string = "".join(rng.choices("ab", k=rng.randint(0, size)))
        return string, "".join(rng.choices("ab", k=rng.randint(1, 3)))
    letter = rng.choice("abcdefgh")
    length = size // 24 + rng.randint(0, size // 200)
    return letter * size, letter * length  # a match at every place


def contract(string, substring):
    assert isinstance(string, str)
    assert isinstance(substring, str) and substring


# %% expert: the failure function of the substring (Knuth, Morris, Pratt), O(n + m)
def how_many_times(string, substring):
    size = len(substring)
    borders = [0]
    length = 0
    for c in substring[1:]:
        while length and substring[length] != c:
            length = borders[length - 1]
        if substring[length] == c:
            length += 1
        borders.append(length)
    again = borders[-1]
    times = length = 0
    for c in string:
        while length and substring[length] != c:
            length = borders[length - 1]
        if substring[length] == c:
            length += 1
            if length == size:
                times += 1
                length = again
    return times


# %% find from the place after the last one
def how_many_times(string, substring):
    times = 0
    at = string.find(substring)
    while at != -1:
        times += 1
        at = string.find(substring, at + 1)
    return times


# %% startswith at every place
def how_many_times(string, substring):
    return sum(string.startswith(substring, i) for i in range(len(string)))


# %% a regular expression that looks ahead
import re


def how_many_times(string, substring):
    return len(re.findall(f"(?={re.escape(substring)})", string))


# %% a rolling hash, hits compared
def how_many_times(string, substring):
    size = len(substring)
    if size > len(string):
        return 0
    prime, base = (1 << 61) - 1, 1000003
    top = pow(base, size - 1, prime)
    wanted = here = 0
    for a, b in zip(substring, string):
        wanted = (wanted * base + ord(a)) % prime
        here = (here * base + ord(b)) % prime
    times = 0
    for i in range(len(string) - size + 1):
        if here == wanted and string[i : i + size] == substring:
            times += 1
        if i + size < len(string):
            here = ((here - ord(string[i]) * top) * base + ord(string[i + size])) % prime
    return times


# %% lengths of common prefixes (Z function), O(n + m)
def how_many_times(string, substring):
    text = substring + "\0" + string
    size = len(text)
    z = [0] * size
    left = right = times = 0
    for i in range(1, size):
        length = min(right - i, z[i - left]) if i < right else 0
        while i + length < size and text[length] == text[i + length]:
            length += 1
        z[i] = length
        if i + length > right:
            left, right = i, i + length
        times += length == len(substring) and i > len(substring)
    return times


# %% character by character at every place, O(n m)
def how_many_times(string, substring):
    times = 0
    for i in range(len(string) - len(substring) + 1):
        for j in range(len(substring)):
            if string[i + j] != substring[j]:
                break
        else:
            times += 1
    return times


# %% wrong: places that overlap are not counted
def how_many_times(string, substring):
    return string.count(substring)


# %% wrong: the last place is forgotten
def how_many_times(string, substring):
    return sum(string.startswith(substring, i) for i in range(len(string) - len(substring)))

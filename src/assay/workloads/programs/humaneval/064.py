"""HumanEval/64 vowels_count: the vowels of a word, a y at its end among them."""

# %% task
SIZES = (8, 50_000, 250_000, 1_000_000)
COMPARE = "same"


def generate(size, rng):
    letters = "abcdefghijklmnopqrstuvwxyz"
    if size <= 8:
        letters = "aeiouybcd"
    word = "".join(rng.choices(letters + letters.upper(), k=size if size > 8 else rng.randint(1, size)))
    return (word[:-1] + rng.choice("yYea") if rng.random() < 0.5 else word,)


def contract(s):
    assert isinstance(s, str)
    assert s.isascii() and s.isalpha()


# %% expert: what is left of the bytes without vowels, O(n) in C
def vowels_count(s):
    word = s.encode()
    return len(word) - len(word.translate(None, b"aeiouAEIOU")) + word.endswith((b"y", b"Y"))


# %% count for each vowel
def vowels_count(s):
    return sum(map(s.count, "aeiouAEIOU")) + (s[-1] in "yY")


# %% a sum over the characters of the lower-case word
def vowels_count(s):
    s = s.lower()
    return sum(1 for c in s if c in "aeiou") + (1 if s.endswith("y") else 0)


# %% a loop with a list of vowels
def vowels_count(s):
    vowels = ["a", "e", "i", "o", "u"]
    count = 0
    for i in range(len(s)):
        if s[i].lower() in vowels:
            count += 1
        elif s[i].lower() == "y" and i == len(s) - 1:
            count += 1
    return count


# %% a regular expression
import re


def vowels_count(s):
    return len(re.findall(r"[aeiou]|y$", s, re.IGNORECASE))


# %% letters counted first
from collections import Counter


def vowels_count(s):
    counts = Counter(s.lower())
    return sum(counts[c] for c in "aeiou") + (s[-1] in "yY")


# %% filter with a set
def vowels_count(s):
    vowels = set("aeiouAEIOU")
    return len(list(filter(vowels.__contains__, s))) + s.endswith(("y", "Y"))


# %% split at the vowels
import re


def vowels_count(s):
    return len(re.split("[aeiouAEIOU]", s)) - 1 + (s[-1:] in ("y", "Y"))


# %% wrong: every y counts
def vowels_count(s):
    return sum(map(s.lower().count, "aeiouy"))


# %% wrong: lower-case letters only
def vowels_count(s):
    return sum(map(s.count, "aeiou")) + s.endswith("y")

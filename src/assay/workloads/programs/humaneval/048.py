"""HumanEval/48 is_palindrome: does a string read the same backwards?"""

# %% task
SIZES = (9, 30_000, 200_000, 1_000_000)
COMPARE = "same"


def generate(size, rng):
    if size <= 9:
        text = "".join(rng.choices("ab", k=rng.randint(0, size)))
        return (text + text[::-1][rng.randint(0, 1) :] if rng.random() < 0.5 else text,)
    half = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=size // 2))
    return (half + half[::-1],)


def contract(text):
    assert isinstance(text, str)


# %% expert: one half against the other reversed, O(n) in C
def is_palindrome(text):
    half = len(text) // 2
    return text[:half] == text[: -half - 1 : -1]


# %% the whole string reversed
def is_palindrome(text):
    return text == text[::-1]


# %% reversed and joined again
def is_palindrome(text):
    return "".join(reversed(text)) == text


# %% two pointers
def is_palindrome(text):
    left, right = 0, len(text) - 1
    while left < right:
        if text[left] != text[right]:
            return False
        left += 1
        right -= 1
    return True


# %% all pairs of places from both ends
def is_palindrome(text):
    return all(text[i] == text[-i - 1] for i in range(len(text) // 2))


# %% both ends taken from a deque
from collections import deque


def is_palindrome(text):
    left = deque(text)
    while len(left) > 1:
        if left.popleft() != left.pop():
            return False
    return True


# %% a stack of the first half
def is_palindrome(text):
    stack = []
    for c in text[: len(text) // 2]:
        stack.append(c)
    for c in text[(len(text) + 1) // 2 :]:
        if stack.pop() != c:
            return False
    return True


# %% halves of halves, mirrored places compared
def is_palindrome(text):
    def mirrored(left, right):
        if len(left) <= 64:
            return left == right[::-1]
        middle = len(left) // 2
        end = len(right) - middle
        return mirrored(left[:middle], right[end:]) and mirrored(left[middle:], right[:end])

    half = len(text) // 2
    return mirrored(text[:half], text[len(text) - half :])


# %% wrong: the ends only
def is_palindrome(text):
    return text[:1] == text[-1:]


# %% wrong: could be made one by another order
from collections import Counter


def is_palindrome(text):
    return sum(many % 2 for many in Counter(text).values()) <= 1

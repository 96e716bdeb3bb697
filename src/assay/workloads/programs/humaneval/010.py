"""HumanEval/10 make_palindrome: the shortest palindrome that begins with a string."""

# %% task
SIZES = (7, 1000, 4000, 12000)
COMPARE = "same"


def generate(size, rng):
    if size <= 7:
        return ("".join(rng.choices("ab", k=rng.randint(0, size))),)
    one, other = rng.sample("abcdefgh", 2)
    before = round(size * rng.uniform(0.32, 0.36))
    return (one * before + other + one * (size - before - 1),)  # suffixes that look like palindromes for long


def contract(string):
    assert isinstance(string, str)


# %% expert: the failure function of the reversed string, read along the string, O(n)
def make_palindrome(string):
    mirrored = string[::-1]
    borders = [0]
    length = 0
    for c in mirrored[1:]:
        while length and mirrored[length] != c:
            length = borders[length - 1]
        if mirrored[length] == c:
            length += 1
        borders.append(length)
    length = 0
    for c in string:
        while length and mirrored[length] != c:
            length = borders[length - 1]
        if mirrored[length] == c:
            length += 1
    return string + mirrored[length:]


# %% the reversed string begins with the suffix, O(n^2) in C
def make_palindrome(string):
    mirrored = string[::-1]
    for i in range(len(string) + 1):
        if mirrored.startswith(string[i:]):
            return string + mirrored[len(string) - i :]
    return string


# %% hashes of every suffix read both ways, the longest equal one compared, O(n)
def make_palindrome(string):
    prime, base = (1 << 61) - 1, 911382323
    forward = backward = 0
    power = 1
    hits = []
    for length, c in enumerate(reversed(string), 1):
        forward = (forward * base + ord(c)) % prime
        backward = (backward + ord(c) * power) % prime
        power = power * base % prime
        if forward == backward:
            hits.append(length)
    while hits:
        start = len(string) - hits.pop()
        if string[start:] == string[start:][::-1]:
            return string + string[:start][::-1]
    return string


# %% palindromes around every centre (Manacher), O(n)
def make_palindrome(string):
    text = "|" + "|".join(string) + "|"
    radius = [0] * len(text)
    centre = right = 0
    for i in range(len(text)):
        reach = min(right - i, radius[2 * centre - i]) if i < right else 0
        while i - reach - 1 >= 0 and i + reach + 1 < len(text) and text[i - reach - 1] == text[i + reach + 1]:
            reach += 1
        radius[i] = reach
        if i + reach > right:
            centre, right = i, i + reach
        if i + reach == len(text) - 1:
            return string + string[: len(string) - reach][::-1]
    return string


# %% longer and longer ends are tried on, O(n^2)
def make_palindrome(string):
    for extra in range(len(string) + 1):
        found = string + string[:extra][::-1]
        if found == found[::-1]:
            return found
    return string


# %% every suffix by two pointers, O(n^2)
def make_palindrome(string):
    start = 0
    while start < len(string):
        i, j = start, len(string) - 1
        while i < j and string[i] == string[j]:
            i += 1
            j -= 1
        if i >= j:
            break
        start += 1
    return string + string[:start][::-1]


# %% lengths of common prefixes (Z function) of the reversed string before the string, O(n)
def make_palindrome(string):
    text = string[::-1] + "\0" + string
    size = len(text)
    z = [0] * size
    left = right = 0
    for i in range(1, size):
        length = min(right - i, z[i - left]) if i < right else 0
        while i + length < size and text[length] == text[i + length]:
            length += 1
        z[i] = length
        if i + length > right:
            left, right = i, i + length
        if i > len(string) and i + length == size:
            return string + text[length : len(string)]
    return string + text[: len(string)] if string else ""


# %% wrong: all but the last character is mirrored
def make_palindrome(string):
    return string + string[:-1][::-1]


# %% wrong: the longest palindrome at the beginning
def make_palindrome(string):
    for end in range(len(string), 0, -1):
        if string[:end] == string[:end][::-1]:
            return string + string[end:][::-1]
    return string

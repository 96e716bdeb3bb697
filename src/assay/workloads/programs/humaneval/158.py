"""HumanEval/158 find_max: the word with the most distinct letters."""

# %% task
SIZES = (6, 150, 800, 3_000)  # words
COMPARE = "same"


def generate(size, rng):
    """Words of 20 to 40 letters; the words with the most distinct ones come late, several of them, and not in order."""
    if size < 20:
        return (["".join(rng.choices("abcd", k=rng.randint(2, 5))) for _ in range(rng.randint(1, size))],)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = []
    for place in range(size):
        few = 8 + 12 * place // size
        some = rng.sample(letters, few)
        words.append("".join(some) + "".join(rng.choices(some, k=rng.randint(20, 40) - few)))
    rng.shuffle(words[-(size // 20) :])
    return (words,)


def contract(words):
    assert isinstance(words, list)
    assert len(words) > 0
    assert all(isinstance(word, str) for word in words)


# %% expert: numbers of distinct letters, then the least of the words that have most
def find_max(words):
    counts = [len(set(word)) for word in words]
    most = max(counts)
    return min(word for word, count in zip(words, counts) if count == most)


# %% one pass, the best so far
def find_max(words):
    best, most = "", -1
    for word in words:
        distinct = len(set(word))
        if distinct > most or distinct == most and word < best:
            best, most = word, distinct
    return best


# %% sorted by letter, then max takes the first of several
def find_max(words):
    return max(sorted(words), key=lambda word: len(set(word)))


# %% letters seen kept in a string
def find_max(words):
    def distinct(word):
        seen = ""
        for letter in word:
            if letter not in seen:
                seen += letter
        return len(seen)

    best = words[0]
    for word in words[1:]:
        if (-distinct(word), word) < (-distinct(best), best):
            best = word
    return best


# %% letters counted with dict.fromkeys, least of pairs
def find_max(words):
    return min((-len(dict.fromkeys(word)), word) for word in words)[1]


# %% a bit for every letter
def find_max(words):
    found, most = None, 0
    for word in words:
        bits = 0
        for letter in word:
            bits |= 1 << ord(letter)
        count = bits.bit_count()
        if found is None or count > most:
            found, most = word, count
        elif count == most:
            found = min(found, word)
    return found


# %% words by number of letters in a dictionary
from collections import defaultdict


def find_max(words):
    groups = defaultdict(list)
    for word in words:
        groups[sum(word.index(letter) == place for place, letter in enumerate(word))].append(word)
    return sorted(groups[max(groups)])[0]


# %% the better of two neighbours handed on
def find_max(words):
    row = list(words)
    for i in range(len(row) - 1):
        left, right = row[i], row[i + 1]
        more = len(set(left)) - len(set(right))
        if more > 0 or more == 0 and left < right:
            row[i], row[i + 1] = right, left
    return row[-1]


# %% each word against all others, quadratic
def find_max(words):
    counts = {word: len(set(word)) for word in words}
    for word, count in counts.items():
        if all(count > other or count == other and word <= text for text, other in counts.items()):
            return word


# %% wrong: the first in the list, not in the order of letters
def find_max(words):
    return max(words, key=lambda word: len(set(word)))


# %% wrong: the longest word
def find_max(words):
    return min(words, key=lambda word: (-len(word), word))

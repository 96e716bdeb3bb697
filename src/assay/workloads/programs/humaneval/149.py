"""HumanEval/149 sorted_list_sum: strings of even length, by length and then by letter."""

# %% task
SIZES = (8, 300, 1_200, 4_000)  # strings
COMPARE = "same"


def generate(size, rng):
    """Words of 1 to 12 letters in no order, some twice, many with the same beginning."""
    stems = ["", "as", "ass", "assay", "Assay"]
    words = []
    while len(words) < size:
        stem = rng.choice(stems)
        words.append(stem + "".join(rng.choices("abAB", k=rng.randint(1, 12 - len(stem)))))
        if rng.random() < 0.1:
            words.append(rng.choice(words))
    words = words[:size]
    rng.shuffle(words)
    return (words,)


def contract(lst):
    assert isinstance(lst, list)
    assert all(isinstance(word, str) for word in lst)


# %% expert: filter, sort by letter, then stably by length
def sorted_list_sum(lst):
    words = [word for word in lst if not len(word) & 1]
    words.sort()
    words.sort(key=len)
    return words


# %% one sort by pairs
def sorted_list_sum(lst):
    return sorted((word for word in lst if len(word) % 2 == 0), key=lambda word: (len(word), word))


# %% a list for each length
def sorted_list_sum(lst):
    by_length = {}
    for word in lst:
        if len(word) % 2 == 0:
            by_length.setdefault(len(word), []).append(word)
    result = []
    for length in sorted(by_length):
        result += sorted(by_length[length])
    return result


# %% heap of pairs
import heapq


def sorted_list_sum(lst):
    heap = []
    for word in lst:
        if len(word) % 2 == 0:
            heapq.heappush(heap, (len(word), word))
    return [heapq.heappop(heap)[1] for _ in range(len(heap))]


# %% comparison function
from functools import cmp_to_key


def sorted_list_sum(lst):
    def compared(a, b):
        if len(a) != len(b):
            return len(a) - len(b)
        if a == b:
            return 0
        return -1 if a < b else 1

    even = list(filter(lambda word: len(word) % 2 == 0, lst))
    return sorted(even, key=cmp_to_key(compared))


# %% merge sort of the words that are left
def sorted_list_sum(lst):
    def before(a, b):
        return len(a) < len(b) or len(a) == len(b) and a <= b

    def ordered(words):
        if len(words) < 2:
            return words
        left, right = ordered(words[: len(words) // 2]), ordered(words[len(words) // 2 :])
        merged, i, j = [], 0, 0
        while i < len(left) or j < len(right):
            if j == len(right) or i < len(left) and before(left[i], right[j]):
                merged.append(left[i])
                i += 1
            else:
                merged.append(right[j])
                j += 1
        return merged

    return ordered([word for word in lst if len(word) % 2 == 0])


# %% insertion at the place that bisection finds
from bisect import insort


def sorted_list_sum(lst):
    result = []
    for word in lst:
        if len(word) % 2:
            continue
        insort(result, word, key=lambda other: (len(other), other))
    return result


# %% the least taken out each time, quadratic
def sorted_list_sum(lst):
    left = [word for word in lst if len(word) % 2 == 0]
    result = []
    while left:
        shortest = min(map(len, left))
        least = min(word for word in left if len(word) == shortest)
        left.remove(least)
        result.append(least)
    return result


# %% padded to one length, so that letters alone decide
def sorted_list_sum(lst):
    even = [word for word in lst if len(word) % 2 == 0]
    width = len(str(max(map(len, even), default=0)))
    tagged = sorted(f"{len(word):0{width}d}{word}" for word in even)
    return [tag[width:] for tag in tagged]


# %% wrong: words of one length stay in the order of the list
def sorted_list_sum(lst):
    return sorted((word for word in lst if len(word) % 2 == 0), key=len)


# %% wrong: words that occur twice are kept once
def sorted_list_sum(lst):
    return sorted({word for word in lst if len(word) % 2 == 0}, key=lambda word: (len(word), word))

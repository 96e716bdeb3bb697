"""HumanEval/154 cycpattern_check: does a word hold a rotation of another?"""

# %% task
SIZES = (8, 300, 1_000, 3_000)  # letters of the first word; the second has a tenth as many
COMPARE = "same"


def generate(size, rng):
    """Nearly a rotation everywhere, and one at the very end or none: long comparisons, and no early luck."""
    if size < 20:
        second = "".join(rng.choices("abc", k=rng.randint(1, 5)))
        cut = rng.randrange(len(second))
        hidden = rng.choice((second[cut:] + second[:cut], "".join(rng.sample(second, len(second)))))
        return "".join(rng.choices("abc", k=rng.randint(0, 3))) + hidden, second
    length = size // 10
    second = "a" * (length - 2) + "bb"
    parts, first = [], 0
    while first < size - length:
        parts.append("a" * rng.randint(length, 2 * length) + "b")
        first += len(parts[-1])
    text = "".join(parts)[: size - length]
    if rng.random() < 0.5:
        cut = rng.randrange(length)
        return text + second[cut:] + second[:cut], second
    return text + "a" * length, second


def contract(a, b):
    assert isinstance(a, str)
    assert isinstance(b, str)
    assert a.isalpha()
    assert b.isalpha()


# %% expert: one look-up a window in the set of the rotations, O(n m) letters hashed by the built-ins
def cycpattern_check(a, b):
    length = len(b)
    twice = b + b
    rotations = {twice[i : i + length] for i in range(length)}
    return not rotations.isdisjoint([a[i : i + length] for i in range(len(a) - length + 1)])


# %% each rotation searched in turn
def cycpattern_check(a, b):
    for i in range(len(b)):
        if b[i:] + b[:i] in a:
            return True
    return False


# %% each rotation searched, turned letter by letter
def cycpattern_check(a, b):
    rotation = b
    while True:
        if a.find(rotation) >= 0:
            return True
        rotation = rotation[1:] + rotation[0]
        if rotation == b:
            return False


# %% each window searched in the word written twice
def cycpattern_check(a, b):
    twice = b * 2
    return any(a[i : i + len(b)] in twice for i in range(len(a) - len(b) + 1))


# %% longest end that the word written twice holds, by its suffix automaton, O(n + m)
def cycpattern_check(a, b):
    following, link, length = [{}], [-1], [0]
    last = 0
    for char in b + b:
        state = len(length)
        following.append({})
        link.append(0)
        length.append(length[last] + 1)
        p = last
        while p != -1 and char not in following[p]:
            following[p][char] = state
            p = link[p]
        if p != -1:
            q = following[p][char]
            if length[q] == length[p] + 1:
                link[state] = q
            else:
                clone = len(length)
                following.append(dict(following[q]))
                link.append(link[q])
                length.append(length[p] + 1)
                while p != -1 and following[p].get(char) == q:
                    following[p][char] = clone
                    p = link[p]
                link[q] = link[state] = clone
        last = state
    state = matched = 0
    for char in a:
        while state and char not in following[state]:
            state = link[state]
            matched = length[state]
        if char in following[state]:
            state = following[state][char]
            matched += 1
        if matched >= len(b):
            return True
    return False


# %% rolling sums of powers, equal ones compared, O(n + m) as a rule
def cycpattern_check(a, b):
    length, base, modulus = len(b), 257, (1 << 61) - 1
    if length > len(a):
        return False
    top = pow(base, length - 1, modulus)

    def windows(text):
        value = 0
        for char in text[:length]:
            value = (value * base + ord(char)) % modulus
        yield 0, value
        for i in range(length, len(text)):
            value = ((value - ord(text[i - length]) * top) * base + ord(text[i])) % modulus
            yield i - length + 1, value

    twice = b + b
    wanted = {value: start for start, value in windows(twice[:-1])}
    for start, value in windows(a):
        if value in wanted and a[start : start + length] == twice[wanted[value] : wanted[value] + length]:
            return True
    return False


# %% windows in a set, each rotation looked up
def cycpattern_check(a, b):
    size = len(b)
    windows = set()
    for start in range(len(a) - size + 1):
        windows.add(a[start : start + size])
    return any(b[cut:] + b[:cut] in windows for cut in range(size))


# %% every window against every rotation by startswith
def cycpattern_check(a, b):
    rotations = tuple(b[i:] + b[:i] for i in range(len(b)))
    for start in range(len(a) - len(b) + 1):
        if a.startswith(rotations, start):
            return True
    return False


# %% the window as two halves: an end of the word, then its beginning
def cycpattern_check(a, b):
    size = len(b)
    for start in range(len(a) - size + 1):
        for cut in range(size):
            head = size - cut
            if a.startswith(b[cut:], start) and a.startswith(b[:cut], start + head):
                return True
    return False


# %% wrong: any order of the letters will do
def cycpattern_check(a, b):
    wanted = sorted(b)
    return any(sorted(a[i : i + len(b)]) == wanted for i in range(len(a) - len(b) + 1))


# %% wrong: only the word itself and the word turned round
def cycpattern_check(a, b):
    return b in a or b[::-1] in a

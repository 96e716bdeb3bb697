"""HumanEval/110 exchange: are there even numbers enough in two lists to fill the first?"""

# %% task
SIZES = (4, 300, 1_200, 4_000)  # numbers in each list
COMPARE = "same"


def generate(size, rng):
    """As many even numbers as are needed, or one less: nobody knows before the end."""
    odd = rng.randint(0, size) if size < 20 else size // 2 + rng.randrange(size // 20)
    even = max(0, min(size, odd - rng.randrange(2)))
    first = [2 * rng.randrange(1, 4 * size) - (place < odd) for place in range(size)]
    second = [2 * rng.randrange(1, 4 * size) - (place >= even) for place in range(size)]
    rng.shuffle(first)
    rng.shuffle(second)
    return first, second


def contract(lst1, lst2):
    assert isinstance(lst1, list)
    assert isinstance(lst2, list)
    assert len(lst1) > 0
    assert len(lst2) > 0
    assert all(type(number) is int for number in lst1 + lst2)


# %% expert: last bits summed, O(n)
def exchange(lst1, lst2):
    odd = sum([number & 1 for number in lst1]) + sum([number & 1 for number in lst2])
    return "YES" if odd <= len(lst2) else "NO"


# %% even numbers of both lists counted in a loop, O(n)
def exchange(lst1, lst2):
    even = 0
    for number in lst1 + lst2:
        if number % 2 == 0:
            even += 1
    return "YES" if even >= len(lst1) else "NO"


# %% two sums over generators, O(n)
def exchange(lst1, lst2):
    needed = sum(1 for number in lst1 if number % 2)
    offered = sum(1 for number in lst2 if not number % 2)
    if offered < needed:
        return "NO"
    return "YES"


# %% lists filtered and measured, O(n)
def exchange(lst1, lst2):
    needed = list(filter(lambda number: number % 2 != 0, lst1))
    offered = list(filter(lambda number: number % 2 == 0, lst2))
    return "YES" if len(offered) >= len(needed) else "NO"


# %% the exchange carried out, quadratic
def exchange(lst1, lst2):
    mine, yours = list(lst1), list(lst2)
    for i in range(len(mine)):
        if mine[i] % 2 == 1:
            for j in range(len(yours)):
                if yours[j] % 2 == 0:
                    mine[i], yours[j] = yours[j], mine[i]
                    break
            else:
                return "NO"
    return "YES"


# %% pairs struck out of a list of offers, quadratic in moves
def exchange(lst1, lst2):
    offers = [number for number in lst2 if number % 2 == 0]
    for number in lst1:
        if number % 2 == 1:
            if not offers:
                return "NO"
            offers.pop(0)
    return "YES"


# %% everything sorted by parity, the first numbers looked at, O(n log n)
def exchange(lst1, lst2):
    together = sorted(lst1 + lst2, key=lambda number: number % 2)
    return "YES" if together[len(lst1) - 1] % 2 == 0 else "NO"


# %% balance, parity by the last digit
def exchange(lst1, lst2):
    def is_even(number):
        return str(abs(number))[-1] in "02468"

    balance = 0
    for number in lst2:
        if is_even(number):
            balance += 1
    for number in lst1:
        if not is_even(number):
            balance -= 1
    return "YES" if balance >= 0 else "NO"


# %% Counter of remainders, O(n)
from collections import Counter


def exchange(lst1, lst2):
    mine = Counter(number % 2 for number in lst1)
    yours = Counter(number % 2 for number in lst2)
    return "YES" if yours[0] >= mine[1] else "NO"


# %% wrong: place by place only
def exchange(lst1, lst2):
    return "YES" if all(a % 2 == 0 or b % 2 == 0 for a, b in zip(lst1, lst2)) else "NO"


# %% wrong: a spare even number is asked for
def exchange(lst1, lst2):
    odd = sum(number % 2 for number in lst1)
    even = sum(number % 2 == 0 for number in lst2)
    return "YES" if even > odd else "NO"

"""HumanEval/106 f: factorials at even places, sums at odd ones."""

# %% task
SIZES = (6, 150, 500, 1_400)  # the number, about; 1,400! has 3,790 digits
COMPARE = "same"


def generate(size, rng):
    """A number near the size; at small sizes any up to it."""
    if size < 20:
        return (rng.randint(1, size),)
    return (size - rng.randrange(size // 20 + 1),)


def contract(n):
    assert type(n) is int
    assert n >= 1


# %% expert: product and sum carried along, O(n) products
def f(n):
    result, product = [1], 1
    for even in range(2, n, 2):
        product *= even * (even - 1)
        result += product, (even + 1) * (even + 2) // 2
    if n % 2 == 0:
        result.append(product * n * (n - 1))
    return result


# %% one loop, both carried along
def f(n):
    result = []
    factorial = total = 1
    for i in range(1, n + 1):
        if i > 1:
            factorial *= i
            total += i
        result.append(factorial if i % 2 == 0 else total)
    return result


# %% math.factorial for every even place, sum of a range for every odd one
from math import factorial


def f(n):
    return [factorial(i) if i % 2 == 0 else sum(range(1, i + 1)) for i in range(1, n + 1)]


# %% math.factorial and the formula of the sum
import math


def f(n):
    result = []
    for i in range(1, n + 1):
        if i % 2:
            result.append(i * (i + 1) // 2)
        else:
            result.append(math.factorial(i))
    return result


# %% accumulate over the numbers twice
from itertools import accumulate
from operator import mul


def f(n):
    factorials = accumulate(range(1, n + 1), mul)
    sums = accumulate(range(1, n + 1))
    return [sums_to if i % 2 else product for i, product, sums_to in zip(range(1, n + 1), factorials, sums)]


# %% table of all factorials, filled before
def f(n):
    factorials = {0: 1}
    for i in range(1, n + 1):
        factorials[i] = i * factorials[i - 1]
    values = []
    for i in range(1, n + 1):
        if i % 2 == 0:
            values.append(factorials[i])
        else:
            total = 0
            for j in range(i + 1):
                total += j
            values.append(total)
    return values


# %% every factorial anew with reduce
from functools import reduce


def f(n):
    def value(i):
        if i % 2 == 0:
            return reduce(lambda product, factor: product * factor, range(1, i + 1))
        return reduce(lambda total, summand: total + summand, range(1, i + 1))

    return list(map(value, range(1, n + 1)))


# %% factorial as a product of halves, anew at each even place
def f(n):
    def product(low, high):
        if high - low < 8:
            result = low
            for factor in range(low + 1, high + 1):
                result *= factor
            return result
        middle = (low + high) // 2
        return product(low, middle) * product(middle + 1, high)

    return [product(1, i) if i % 2 == 0 else i * (i + 1) // 2 for i in range(1, n + 1)]


# %% factorial counted down in a while loop, anew at each even place
def f(n):
    result, i = [], 1
    while i <= n:
        left = i
        if i % 2 == 0:
            value = 1
            while left > 1:
                value *= left
                left -= 1
        else:
            value = 0
            while left > 0:
                value += left
                left -= 1
        result.append(value)
        i += 1
    return result


# %% wrong: places counted from 0
def f(n):
    result, product = [], 1
    for i in range(n):
        product *= max(i, 1)
        result.append(product if i % 2 == 0 else i * (i + 1) // 2)
    return result


# %% wrong: only the even numbers are multiplied
def f(n):
    result, product = [], 1
    for i in range(1, n + 1):
        if i % 2 == 0:
            product *= i
            result.append(product)
        else:
            result.append(i * (i + 1) // 2)
    return result

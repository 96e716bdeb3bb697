"""HumanEval/139 special_factorial: the product of all factorials up to a number's own."""

# %% task
SIZES = (6, 60, 180, 360)  # the number, about; the answer for 360 has 123,000 digits
COMPARE = "same"


def generate(size, rng):
    """A number near the size; at small sizes any up to it."""
    if size < 20:
        return (rng.randint(1, size),)
    return (size - rng.randrange(size // 20 + 1),)


def contract(n):
    assert type(n) is int
    assert n > 0


# %% expert: powers of the primes, multiplied in halves
from functools import reduce
from operator import mul


def special_factorial(n):
    factors = []
    composite = bytearray(n + 1)
    for p in range(2, n + 1):
        if not composite[p]:
            composite[p * p :: p] = b"\1" * len(range(p * p, n + 1, p))
            exponent, power = 0, p
            while power <= n:  # multiples of p, p * p, ... and how many factorials hold each
                multiples = n // power
                exponent += multiples * (n + 1) - power * multiples * (multiples + 1) // 2
                power *= p
            factors.append(p**exponent)
    while len(factors) > 1:
        factors = [reduce(mul, factors[i : i + 2]) for i in range(0, len(factors), 2)]
    return factors[0] if factors else 1


# %% factorial and product carried along
def special_factorial(n):
    result = factorial = 1
    for i in range(2, n + 1):
        factorial *= i
        result *= factorial
    return result


# %% every factorial anew
from math import factorial


def special_factorial(n):
    result = 1
    for i in range(1, n + 1):
        result = result * factorial(i)
    return result


# %% products of products with accumulate
from itertools import accumulate
from math import prod
from operator import mul


def special_factorial(n):
    return prod(accumulate(range(1, n + 1), mul))


# %% each number to the power of how often it occurs
def special_factorial(n):
    result = 1
    for i in range(2, n + 1):
        result *= i ** (n - i + 1)
    return result


# %% factorials multiplied in halves
from math import factorial


def special_factorial(n):
    def product(low, high):
        if low == high:
            return factorial(low)
        middle = (low + high) // 2
        return product(low, middle) * product(middle + 1, high)

    return product(1, n)


# %% list of factorials, then reduce
from functools import reduce


def special_factorial(n):
    factorials = [1]
    for i in range(1, n + 1):
        factorials.append(factorials[-1] * i)
    return reduce(lambda product, factor: product * factor, factorials)


# %% counted down, one power at a time
def special_factorial(n):
    result, times = 1, 1
    while n > 1:
        for _ in range(times):
            result *= n
        n -= 1
        times += 1
    return result


# %% products of the numbers from both ends, then multiplied in halves
def special_factorial(n):
    left = [i ** (n - i + 1) for i in range(1, n + 1)]
    while len(left) > 1:
        left.sort()
        left = [left[i] * left[-1 - i] for i in range(len(left) // 2)] + left[len(left) // 2 : (len(left) + 1) // 2]
    return left[0]


# %% wrong: the factorial alone
def special_factorial(n):
    result = 1
    for i in range(2, n + 1):
        result *= i
    return result


# %% wrong: the number's own factorial left out
def special_factorial(n):
    result = factorial = 1
    for i in range(1, n):
        factorial *= i
        result *= factorial
    return result

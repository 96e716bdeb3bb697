"""HumanEval/96 count_up_to: all primes below a number."""

# %% task
SIZES = (200, 1_200, 5_000, 15_000)  # the number, about
COMPARE = "same"


def generate(size, rng):
    """A number near the size; at small sizes also the primes themselves and the edges 0, 1 and 2."""
    if size <= 200 and rng.random() < 0.4:
        return (rng.choice((0, 1, 2, 3, 5, 49, 121, 127)),)
    return (size - rng.randrange(size // 10 + 1),)


def contract(n):
    assert type(n) is int
    assert n >= 0


# %% expert: sieve of odd numbers in a bytearray, O(n log log n)
from itertools import compress
from math import isqrt


def count_up_to(n):
    if n < 3:
        return []
    half = n // 2  # place i stands for 2 i + 1
    sieve = bytearray([1]) * half
    for i in range(1, (isqrt(n - 1) + 1) // 2):
        if sieve[i]:
            start = 2 * i * (i + 1)
            sieve[start :: 2 * i + 1] = bytes(len(range(start, half, 2 * i + 1)))
    sieve[0] = 0
    return [2, *compress(range(1, n, 2), sieve)]


# %% sieve in a list of flags, O(n log log n)
def count_up_to(n):
    prime = [True] * n
    prime[0:2] = [False] * len(prime[0:2])
    p = 2
    while p * p < n:
        if prime[p]:
            for multiple in range(p * p, n, p):
                prime[multiple] = False
        p += 1
    return [number for number in range(n) if prime[number]]


# %% division by the primes to the root
def count_up_to(n):
    primes = []
    for number in range(2, n):
        for prime in primes:
            if prime * prime > number:
                primes.append(number)
                break
            if number % prime == 0:
                break
        else:
            primes.append(number)
    return primes


# %% all() over every divisor to the root
def count_up_to(n):
    return [number for number in range(2, n) if all(number % d for d in range(2, int(number**0.5) + 1))]


# %% divisors beside the multiples of six
def count_up_to(n):
    def is_prime(number):
        if number < 4:
            return number > 1
        if number % 2 == 0 or number % 3 == 0:
            return False
        d = 5
        while d * d <= number:
            if number % d == 0 or number % (d + 2) == 0:
                return False
            d += 6
        return True

    result = []
    for number in range(n):
        if is_prime(number):
            result.append(number)
    return result


# %% division by all smaller primes, without a bound
def count_up_to(n):
    primes = []
    for number in range(2, n):
        composite = False
        for prime in primes:
            if number % prime == 0:
                composite = True
                break
        if not composite:
            primes.append(number)
    return primes


# %% set of numbers less the multiples, sorted
def count_up_to(n):
    left = set(range(2, n))
    for number in range(2, n):
        if number * number >= n:
            break
        if number in left:
            left -= set(range(number * number, n, number))
    return sorted(left)


# %% linear sieve by smallest factors, O(n)
def count_up_to(n):
    smallest = [0] * (n + 1)
    primes = []
    for number in range(2, n):
        if smallest[number] == 0:
            smallest[number] = number
            primes.append(number)
        for prime in primes:
            if prime > smallest[number] or prime * number >= n:
                break
            smallest[prime * number] = prime
    return primes


# %% dictionary of the next multiples, O(n log log n)
def count_up_to(n):
    def all_primes():
        factors = {}
        number = 2
        while True:
            if number not in factors:
                yield number
                factors[number * number] = [number]
            else:
                for factor in factors.pop(number):
                    factors.setdefault(number + factor, []).append(factor)
            number += 1

    result = []
    for prime in all_primes():
        if prime >= n:
            return result
        result.append(prime)


# %% wrong: the number itself counts too
def count_up_to(n):
    sieve = bytearray([1]) * (n + 1)
    for p in range(2, int(n**0.5) + 1):
        if sieve[p]:
            sieve[p * p :: p] = bytes(len(range(p * p, n + 1, p)))
    return [number for number in range(2, n + 1) if sieve[number]]


# %% wrong: only the divisors 2, 3, 5 and 7 are tried
def count_up_to(n):
    return [m for m in range(2, n) if m in (2, 3, 5, 7) or m % 2 and m % 3 and m % 5 and m % 7]

"""HumanEval/94 skjkasdkd: the sum of the digits of the largest prime in a list."""

# %% task
SIZES = (10, 60, 300, 900)  # numbers
COMPARE = "same"


def generate(size, rng):
    """Squares of primes and products of two near ones, with a few smaller primes: no divisor is found early, and no guess is lucky.

    Some products p * (2p - 1) satisfy Fermat's little theorem to the base 2, prime or not.
    """
    least, most = (3, 100) if size < 20 else (7_000, 10_000)
    primes = [n for n in range(least, 2 * most) if all(n % d for d in range(2, int(n**0.5) + 1))]
    factors = [p for p in primes if p < most]
    known = set(primes)
    pseudo = [p * (2 * p - 1) for p in factors if p % 4 == 1 and 2 * p - 1 in known]
    few = max(1, size // 100)
    numbers = [rng.choice(factors) for _ in range(few)] + [rng.choice(pseudo) for _ in range(few)]
    while len(numbers) < size:
        p = rng.choice(factors)
        numbers.append(p * rng.choice((p, rng.choice(factors))))
    rng.shuffle(numbers)
    return (numbers,)


def contract(lst):
    assert isinstance(lst, list)
    assert all(type(number) is int for number in lst)
    assert min(lst) >= 0
    assert any(n > 1 and all(n % d for d in range(2, int(n**0.5) + 1)) for n in sorted(lst))


# %% expert: largest first, Fermat's theorem rejects, Miller and Rabin's test confirms
def skjkasdkd(lst):
    def is_prime(n):
        if n < 4:
            return n > 1
        if n % 2 == 0 or pow(2, n - 1, n) != 1:
            return False
        odd, twos = n - 1, 0
        while odd % 2 == 0:
            odd //= 2
            twos += 1
        # enough bases for every number below 3.3e24
        for base in (2, 3, 5, 7) if n < 3_215_031_751 else (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41):
            power = pow(base % n, odd, n)
            if power in (0, 1, n - 1):
                continue
            for _ in range(twos - 1):
                power = power * power % n
                if power == n - 1:
                    break
            else:
                return False
        return True

    for number in sorted(set(lst), reverse=True):
        if is_prime(number):
            return sum(map(int, str(number)))
    return 0


# %% only numbers above the best so far, odd divisors to the root
def skjkasdkd(lst):
    def is_prime(n):
        if n < 4:
            return n > 1
        if n % 2 == 0:
            return False
        d = 3
        while d * d <= n:
            if n % d == 0:
                return False
            d += 2
        return True

    best = 0
    for number in lst:
        if number > best and is_prime(number):
            best = number
    return sum(int(digit) for digit in str(best))


# %% largest first, divisors beside the multiples of six
def skjkasdkd(lst):
    def is_prime(n):
        if n <= 3:
            return n >= 2
        if n % 2 == 0 or n % 3 == 0:
            return False
        d = 5
        while d * d <= n:
            if n % d == 0 or n % (d + 2) == 0:
                return False
            d += 6
        return True

    for number in sorted(lst, reverse=True):
        if is_prime(number):
            total = 0
            while number:
                number, digit = divmod(number, 10)
                total += digit
            return total
    return 0


# %% primes to the root found once, division by them only
def skjkasdkd(lst):
    root = int(max(lst) ** 0.5) + 1
    crossed, primes = set(), []
    for n in range(2, root + 1):
        if n not in crossed:
            primes.append(n)
            crossed.update(range(n * n, root + 1, n))

    largest = 0
    for number in lst:
        if number < 2 or number < largest:
            continue
        for prime in primes:
            if prime * prime > number:
                largest = number
                break
            if number % prime == 0:
                break
        else:
            largest = number
    return sum(int(digit) for digit in str(largest))


# %% largest first, one gcd with the product of all primes to the root
from itertools import compress
from math import gcd, isqrt, prod


def skjkasdkd(lst):
    root = isqrt(max(lst))
    sieve = bytearray([1]) * (root + 1)
    sieve[:2] = bytes(min(2, root + 1))
    for n in range(2, isqrt(root) + 1):
        if sieve[n]:
            sieve[n * n :: n] = bytes(len(range(n * n, root + 1, n)))
    product = prod(compress(range(root + 1), sieve))
    for number in sorted(set(lst), reverse=True):
        if gcd(product, number) == 1 if number > root else sieve[number]:
            return sum(map(int, str(number)))
    return 0


# %% every number tested with all divisors to its root, then the maximum
from math import isqrt


def skjkasdkd(lst):
    primes = [n for n in lst if n > 1 and all(n % d for d in range(2, isqrt(n) + 1))]
    return sum(map(int, str(max(primes, default=0))))


# %% answers remembered, odd divisors in a for loop
from functools import cache


@cache
def is_prime(n):
    if n < 2 or n > 2 and n % 2 == 0:
        return False
    for divisor in range(3, int(n**0.5) + 1, 2):
        if n % divisor == 0:
            return False
    return True


def skjkasdkd(lst):
    largest = 0
    for n in lst:
        if is_prime(n):
            largest = max(largest, n)
    total = 0
    for digit in str(largest):
        total += ord(digit) - ord("0")
    return total


# %% divisors are primes found as they are needed
def skjkasdkd(lst):
    primes = [2, 3]

    def grow():
        candidate = primes[-1] + 2
        while not is_prime(candidate):
            candidate += 2
        primes.append(candidate)

    def is_prime(n):
        if n < 2:
            return False
        place = 0
        while primes[place] ** 2 <= n:
            if n % primes[place] == 0:
                return False
            place += 1
            if place == len(primes):
                grow()
        return True

    for number in sorted(set(lst), reverse=True):
        if is_prime(number):
            return sum(map(int, str(number)))
    return 0


# %% smallest factor stripped off, prime if nothing else is left
def skjkasdkd(lst):
    def smallest_factor(n):
        factor = 2
        while factor * factor <= n:
            if n % factor == 0:
                return factor
            factor += 1
        return n

    prime_numbers = []
    for n in lst:
        if n >= 2 and smallest_factor(n) == n:
            prime_numbers.append(n)
    prime_numbers.sort()
    return sum(int(digit) for digit in str(prime_numbers[-1]))


# %% wrong: the root itself is not tried
def skjkasdkd(lst):
    def is_prime(n):
        return n > 1 and all(n % d for d in range(2, int(n**0.5)))

    for number in sorted(lst, reverse=True):
        if is_prime(number):
            return sum(int(digit) for digit in str(number))
    return 0


# %% wrong: Fermat's little theorem to the base 2
def skjkasdkd(lst):
    for number in sorted(lst, reverse=True):
        if number == 2 or number > 2 and pow(2, number - 1, number) == 1:
            return sum(int(digit) for digit in str(number))
    return 0

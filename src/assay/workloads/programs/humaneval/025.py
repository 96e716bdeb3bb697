"""HumanEval/25 factorize: the prime factors of a number, from small to large, as often as they occur."""

# %% task
SIZES = (13, 30_000, 300_000, 3_000_000)  # no prime factor is larger
COMPARE = "same"


def generate(size, rng):
    if size <= 13:
        number = 1
        for _ in range(rng.randint(1, 4)):
            number *= rng.choice((2, 3, 5, 7, 11, 13))
        return (number,)

    def prime(low, high):
        while True:
            found = rng.randrange(low, high) | 1
            if all(found % d for d in range(3, int(found**0.5) + 1, 2)):
                return found

    # two large primes, the smaller of much the same size in every case
    return (prime(round(0.85 * size), round(0.9 * size)) * prime(round(0.95 * size), size),)


def contract(n):
    assert isinstance(n, int) and n >= 1


# %% expert: small primes by division, the rest by Pollard's rho (Brent's cycles) and a primality test
from math import gcd

BASES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)


def is_prime(n):
    odd, twos = n - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in BASES if n >= 3_215_031_751 else BASES[:4]:
        x = pow(base, odd, n)
        if x in (1, n - 1):
            continue
        for _ in range(twos - 1):
            x = x * x % n
            if x == n - 1:
                break
        else:
            return False
    return True


def divisor(n):
    for c in range(1, n):
        y, steps, found = 2, 1, 1
        while found == 1:
            x = y
            for _ in range(steps):
                y = (y * y + c) % n
            done = 0
            while done < steps and found == 1:
                kept, product = y, 1
                for _ in range(min(100, steps - done)):
                    y = (y * y + c) % n
                    product = product * (x - y) % n
                found = gcd(product, n)
                done += 100
            steps *= 2
        if found == n:
            found = 1
            while found == 1:
                kept = (kept * kept + c) % n
                found = gcd(x - kept, n)
        if found != n:
            return found


def factorize(n):
    factors = []
    for p in BASES:
        while n % p == 0:
            factors.append(p)
            n //= p
    left = [n] if n > 1 else []
    while left:
        m = left.pop()
        if m < 1681 or is_prime(m):
            factors.append(m)
        else:
            d = divisor(m)
            left += [d, m // d]
    return sorted(factors)


# %% trial division by 2 and odd numbers, O(sqrt n)
def factorize(n):
    factors = []
    while n % 2 == 0:
        factors.append(2)
        n //= 2
    d = 3
    while d * d <= n:
        while n % d == 0:
            factors.append(d)
            n //= d
        d += 2
    if n > 1:
        factors.append(n)
    return factors


# %% trial division by 6k - 1 and 6k + 1, O(sqrt n)
def factorize(n):
    factors = []

    def divide(d):
        nonlocal n
        while n % d == 0:
            factors.append(d)
            n //= d

    divide(2)
    divide(3)
    d = 5
    while d * d <= n:
        if n % d == 0:
            divide(d)
        if n % (d + 2) == 0:
            divide(d + 2)
        d += 6
    return factors + [n] * (n > 1)


# %% division by the primes of a sieve, O(sqrt n)
from math import isqrt


def factorize(n):
    limit = isqrt(n)
    sieve = bytearray([1]) * (limit + 1)
    factors = []
    for p in range(2, limit + 1):
        if not sieve[p]:
            continue
        if p * p <= limit:
            sieve[p * p :: p] = bytes(len(range(p * p, limit + 1, p)))
        while n % p == 0:
            factors.append(p)
            n //= p
    if n > 1:
        factors.append(n)
    return factors


# %% the smallest divisor, then the quotient the same way
from math import isqrt


def factorize(n):
    if n == 1:
        return []
    smallest = next((d for d in range(2, isqrt(n) + 1) if n % d == 0), n)
    return [smallest, *factorize(n // smallest)]


# %% differences of squares (Fermat), even factors first
from math import isqrt


def factorize(n):
    if n == 1:
        return []
    if n % 2 == 0:
        return [2, *factorize(n // 2)]
    a = isqrt(n)
    if a * a < n:
        a += 1
    while True:
        square = a * a - n
        b = isqrt(square)
        if b * b == square:
            break
        a += 1
    if a - b == 1:
        return [n]
    return sorted(factorize(a - b) + factorize(a + b))


# %% trial division by every number, the root taken anew after every hit
from math import isqrt


def factorize(n):
    factors = []
    d, root = 2, isqrt(n)
    while d <= root:
        quotient, rest = divmod(n, d)
        if rest:
            d += 1
        else:
            factors.append(d)
            n, root = quotient, isqrt(quotient)
    return factors + ([n] if n > 1 else [])


# %% wrong: every prime once
def factorize(n):
    factors = []
    d = 2
    while d * d <= n:
        if n % d == 0:
            factors.append(d)
            while n % d == 0:
                n //= d
        d += 1
    return factors + ([n] if n > 1 else [])


# %% wrong: squares of primes are left as they are
def factorize(n):
    factors = []
    d = 2
    while d * d < n:
        while n % d == 0:
            factors.append(d)
            n //= d
        d += 1
    return factors + ([n] if n > 1 else [])

"""HumanEval/46 fib4: a sequence whose next number is the sum of the last four."""

# %% task
SIZES = (12, 3000, 9000, 20000)
COMPARE = "same"


def generate(size, rng):
    if size <= 12:
        return (rng.randint(0, size),)
    return (size - rng.randint(0, size // 50),)


def contract(n):
    assert isinstance(n, int) and n >= 0


# %% expert: powers of x modulo x^4 - x^3 - x^2 - x - 1 by squaring, O(log n) products
def fib4(n):
    a, b, c, d = 1, 0, 0, 0  # a + b x + c x^2 + d x^3 is x to the leading bits of n
    for bit in bin(n)[2:]:
        x6 = d * d
        x5 = 2 * c * d + x6  # x^6 = x^5 + x^4 + x^3 + x^2, and so on down to x^4
        x4 = 2 * b * d + c * c + x6 + x5
        x3 = 2 * (a * d + b * c) + x6 + x5 + x4
        x2 = 2 * a * c + b * b + x6 + x5 + x4
        a, b, c, d = a * a + x4, 2 * a * b + x5 + x4, x2, x3
        if bit == "1":
            a, b, c, d = d, a + d, b + d, c + d
    return 2 * c


# %% four variables that move on
def fib4(n):
    a, b, c, d = 0, 0, 2, 0
    for _ in range(n):
        a, b, c, d = b, c, d, a + b + c + d
    return a


# %% twice the last number less the one that falls out, O(n)
def fib4(n):
    a, b, c, d, e = 0, 0, 2, 0, 2
    for _ in range(n):
        a, b, c, d, e = b, c, d, e, 2 * e - a
    return a


# %% a list of all of them
def fib4(n):
    numbers = [0, 0, 2, 0]
    while len(numbers) <= n:
        numbers.append(sum(numbers[-4:]))
    return numbers[n]


# %% a deque of the last four
from collections import deque


def fib4(n):
    window = deque([0, 0, 2, 0], maxlen=4)
    for _ in range(n):
        window.append(sum(window))
    return window[0]


# %% a ring of four places
def fib4(n):
    ring = [0, 0, 2, 0]
    for i in range(4, n + 1):
        ring[i % 4] = sum(ring)
    return ring[n % 4]


# %% powers of a matrix, O(log n) products
def fib4(n):
    def times(p, q):
        columns = list(zip(*q))
        return [[sum(x * y for x, y in zip(row, column)) for column in columns] for row in p]

    power = [[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [1, 1, 1, 1]]
    state = [[0], [0], [2], [0]]
    while n:
        if n % 2:
            state = times(power, state)
        power = times(power, power)
        n //= 2
    return state[0][0]


# %% wrong: one step too few
def fib4(n):
    a, b, c, d = 0, 0, 2, 0
    for _ in range(4, n):
        a, b, c, d = b, c, d, a + b + c + d
    return d if n > 3 else (a, b, c, d)[n]


# %% wrong: the sum of the last three
def fib4(n):
    numbers = [0, 0, 2, 0]
    while len(numbers) <= n:
        numbers.append(sum(numbers[-3:]))
    return numbers[n]

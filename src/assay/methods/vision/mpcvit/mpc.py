"""Two semi-honest parties that compute on additive shares: a simulator that really evaluates, and counts rounds and bytes.

A number x is the integer round(x 2^f) modulo 2^64, and each party has one of two shares that add up to it. What is linear each party does
alone. Everything else uses up correlated randomness that a dealer has given out beforehand (as CrypTen and the dealer mode of SEMI-2K do),
and opens masked values: one message from each party to the other at the same time, a round.

    product, matrix product     Beaver's triples: open x - a and y - b                                1 round
    x < 0                       bits of both shares added by a tree of carries, its last bit opened    8 rounds
    exp x                       (1 + x / 2^8)^(2^8), by squaring                                       8 rounds
    1 / x, 1 / sqrt x           Newton's iteration from an exponential                                 28, 17 rounds
    gelu x                      relu x - h(|x|), h a polynomial of degree 4 below 3, 0 beyond          12 rounds

The two parties live in one process, in one tensor (2, ...), and nothing of one half reaches the other except through `_open`.
Products are cut back to f bits by each party alone, which is wrong by a unit in the last place, and, with probability 2^(b - 63) for a
product of b bits, altogether. This counts what a protocol sends. It hides nothing: use it on nothing secret.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from assay import checks

BITS, WORD = 64, 8  # of the ring; bytes
LOW, HIGH = -(2**63), 2**63 - 1
CARRIES = BITS - 1  # places that carry into the sign
GELU_EDGE = 3.0
GELU_BUMP = (-0.004097, 0.553820, -0.565801, 0.197171, -0.023285)
"""h(t) = t Phi(-t) on [0, 3] by powers of t, a fit at Chebyshev's points; wrong by 0.0042 at most, and so is 0 beyond 3."""


@dataclass(frozen=True)
class Protocol:
    """The numbers that decide how exact, and how dear, a computation on shares is: those of CrypTen unless told otherwise.

    `fraction`: bits after the point. Steps: squarings of the exponential, Newton's iterations.
    """

    fraction: int = 16
    exp_steps: int = 8
    reciprocal_steps: int = 10
    rsqrt_steps: int = 3

    def __post_init__(self) -> None:
        checks.whole("fraction", self.fraction, low=4, high=24)
        for name in ("exp_steps", "reciprocal_steps", "rsqrt_steps"):
            checks.whole(name, getattr(self, name), low=1, high=32)


@dataclass
class Traffic:
    """Rounds, and the bytes that each of the two parties sends in them. Sums of traffic are traffic one after the other."""

    rounds: int = 0
    bytes: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.rounds + other.rounds, self.bytes + other.bytes)


@dataclass
class Transcript:
    """What was sent: in all, and under each name given by `TwoParties.during`. `dealt`: bytes of randomness given to each party before."""

    total: Traffic = field(default_factory=Traffic)
    during: dict[str, Traffic] = field(default_factory=dict)
    dealt: int = 0


@dataclass(frozen=True)
class Shared:
    """Two shares of a tensor, int64 (2, ...)."""

    parts: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.parts.shape[1:]

    def map(self, function: Callable[[Tensor], Tensor]) -> Shared:
        """What each party does to its share alone: slices, transposes, sums."""
        return Shared(torch.stack([function(part) for part in self.parts]))

    def __add__(self, other: Shared) -> Shared:
        return Shared(self.parts + other.parts) if self.shape == other.shape else _both(torch.add, self, other)

    def __sub__(self, other: Shared) -> Shared:
        return Shared(self.parts - other.parts) if self.shape == other.shape else _both(torch.sub, self, other)

    def __neg__(self) -> Shared:
        return Shared(-self.parts)


def _both(function: Callable[[Tensor, Tensor], Tensor], x: Shared, y: Shared) -> Shared:
    return Shared(torch.stack([function(a, b) for a, b in zip(x.parts, y.parts, strict=True)]))


class TwoParties:
    """The two parties, their dealer, and the transcript of what they sent.

    >>> parties = TwoParties()
    >>> x = parties.share(torch.tensor([1.5, -2.0]))
    >>> parties.reveal(parties.multiply(x, x)).tolist()
    [2.25, 4.0]
    >>> parties.transcript.total
    Traffic(rounds=2, bytes=48)
    """

    def __init__(self, protocol: Protocol | None = None, *, seed: int = 0, keep_messages: bool = False) -> None:
        self.protocol = protocol or Protocol()
        self.generator = torch.Generator().manual_seed(checks.whole("seed", seed))
        self.transcript = Transcript()
        self.messages: list[Tensor] | None = [] if keep_messages else None
        self._names: list[str] = []

    # ------------------------------------------------------------------------------------------------- in, out, messages

    def share(self, x: Tensor) -> Shared:
        """Shares of a tensor, rounded to the fixed point. Dealing inputs and weights out is not counted.

        Raises ValueError for what is not finite or too large for the ring.
        """
        checks.tensor("x", x, finite=True)
        scaled = (x.detach().double() * 2**self.protocol.fraction).round()
        if float(scaled.abs().max()) >= 2.0**62:
            raise ValueError(f"x must be below 2^{62 - self.protocol.fraction} in size, got {float(x.abs().max()):g}")
        return self._split(scaled.long())

    def reveal(self, x: Shared) -> Tensor:
        """The tensor itself, float32, opened to both: 1 round."""
        (opened,) = self._open(x.parts)
        return (opened.double() / 2**self.protocol.fraction).float()

    @contextmanager
    def during(self, name: str) -> Iterator[None]:
        """Count what is sent meanwhile under a name too."""
        self._names.append(name)
        try:
            yield
        finally:
            self._names.pop()

    def _open(self, *masked: Tensor) -> tuple[Tensor, ...]:
        """One round: both parties send their halves of all these tensors; their sums (bool tensors: exclusive or)."""
        self._send(*masked)
        return tuple(t[0] ^ t[1] if t.dtype == torch.bool else t[0] + t[1] for t in masked)

    def _send(self, *messages: Tensor) -> None:
        """Count one round in which the first party sends the first half of each tensor (2, ...), and the second the second."""
        bits = sum(t[0].numel() * (1 if t.dtype == torch.bool else BITS) for t in messages)
        here = [self.transcript.during.setdefault(name, Traffic()) for name in dict.fromkeys(self._names)]
        for traffic in (self.transcript.total, *here):
            traffic.rounds += 1
            traffic.bytes += -(-bits // 8)
        if self.messages is not None:
            self.messages += [t.clone() for t in messages]

    def _split(self, values: Tensor) -> Shared:
        first = self._random(values.shape)
        return Shared(torch.stack([first, values - first]))

    def _random(self, shape: Sequence[int]) -> Tensor:
        return torch.randint(LOW, HIGH, tuple(shape), dtype=torch.int64, generator=self.generator)

    def _random_bits(self, shape: Sequence[int]) -> Tensor:
        return torch.randint(0, 2, tuple(shape), dtype=torch.uint8, generator=self.generator).bool()

    def _deal(self, *values: Tensor) -> tuple[Tensor, ...]:
        """The dealer's: shares of each tensor, bool ones by exclusive or."""
        found = []
        for value in values:
            bits = value.dtype == torch.bool
            first = self._random_bits(value.shape) if bits else self._random(value.shape)
            found.append(torch.stack([first, value ^ first if bits else value - first]))
            self.transcript.dealt += -(-value.numel() // 8) if bits else WORD * value.numel()
        return tuple(found)

    # ----------------------------------------------------------------------------------------------- linear, by each alone

    def add(self, x: Shared, value: float) -> Shared:
        """x plus a public number: the first party adds it."""
        parts = x.parts.clone()
        parts[0] += round(value * 2**self.protocol.fraction)
        return Shared(parts)

    def scale(self, x: Shared, value: float) -> Shared:
        """x times a public number, which is given as many bits after the point as leave it at least `fraction` significant ones."""
        if value == 0:
            return Shared(torch.zeros_like(x.parts))
        extra = max(0, -math.floor(math.log2(abs(value))) - 1)
        shift = min(self.protocol.fraction + extra, 40)
        return self._cut(Shared(x.parts * round(value * 2**shift)), shift)

    def _cut(self, x: Shared, bits: int | None = None) -> Shared:
        """Drop the last bits, each party alone: the first rounds its share down, the second its up, wrong by one unit at most."""
        bits = self.protocol.fraction if bits is None else bits
        return Shared(torch.stack([x.parts[0] >> bits, -((-x.parts[1]) >> bits)]))

    # ----------------------------------------------------------------------------------------------------------- products

    def _beaver(self, x: Shared, y: Shared, product: Callable[[Tensor, Tensor], Tensor]) -> Shared:
        a, b = self._random(x.shape), self._random(y.shape)
        a_parts, b_parts, c_parts = self._deal(a, b, product(a, b))
        e, f = self._open(x.parts - a_parts, y.parts - b_parts)
        ef = product(e, f)
        return Shared(
            torch.stack(
                [c_parts[i] + product(e, b_parts[i]) + product(a_parts[i], f) + (ef if i == 0 else 0) for i in (0, 1)]
            )
        )

    def multiply(self, x: Shared, y: Shared, *, whole: bool = False) -> Shared:
        """x y, element by element with broadcasting: 1 round, a word for each element of x and of y. `whole`: y holds whole numbers."""
        found = self._beaver(x, y, torch.mul)
        return found if whole else self._cut(found)

    def matmul(self, x: Shared, y: Shared) -> Shared:
        """x @ y, batched: 1 round, a word for each element of x and of y."""
        return self._cut(self._beaver(x, y, torch.matmul))

    def square(self, x: Shared) -> Shared:
        """x x: 1 round, a word for each element."""
        a = self._random(x.shape)
        a_parts, c_parts = self._deal(a, a * a)
        (e,) = self._open(x.parts - a_parts)
        return self._cut(
            Shared(torch.stack([c_parts[i] + 2 * e * a_parts[i] + (e * e if i == 0 else 0) for i in (0, 1)]))
        )

    # -------------------------------------------------------------------------------------------------------- comparisons

    def negative(self, x: Shared) -> Shared:
        """1 where x < 0, else 0, as whole numbers: 8 rounds, 250 bits an element.

        Each party has the bits of its share. The carry into bit 63 of their sum is found by a tree over (generate, propagate); that and the
        two bits there are the sign, which one opened bit turns from a share by exclusive or into one by addition.
        """
        places = torch.arange(BITS)
        bits = ((x.parts.unsqueeze(-1) >> places) & 1).bool()
        carry, propagate = self._and_private(bits[0, ..., :CARRIES], bits[1, ..., :CARRIES]), bits[..., :CARRIES]
        while carry.shape[-1] > 1:
            carry, propagate = self._carry_level(carry, propagate)
        sign = carry[..., 0] ^ bits[..., CARRIES]
        return self._to_ring(sign)

    def _and_private(self, mine: Tensor, yours: Tensor) -> Tensor:
        """Shares of mine & yours, of which each party has one: 1 round, a bit each."""
        a, b = self._random_bits(mine.shape), self._random_bits(yours.shape)
        (c,) = self._deal(a & b)
        self.transcript.dealt += -(-a.numel() // 8)
        u, v = mine ^ a, yours ^ b
        self._send(torch.stack([u, v]))
        return torch.stack([(u & v) ^ (a & v) ^ c[0], (u & b) ^ c[1]])

    def _carry_level(self, carry: Tensor, propagate: Tensor) -> tuple[Tensor, Tensor]:
        """Neighbouring places joined: g = g_high ^ (p_high & g_low), p = p_high & p_low. 1 round, 3 bits a pair."""
        pairs = carry.shape[-1] // 2
        g_low, g_high = carry[..., 0 : 2 * pairs : 2], carry[..., 1 : 2 * pairs : 2]
        p_low, p_high = propagate[..., 0 : 2 * pairs : 2], propagate[..., 1 : 2 * pairs : 2]
        a, b, c = (self._random_bits(p_high.shape[1:]) for _ in range(3))
        a_parts, b_parts, c_parts, ab, ac = self._deal(a, b, c, a & b, a & c)
        d, e, f = self._open(p_high ^ a_parts, g_low ^ b_parts, p_low ^ c_parts)

        def joined(other: Tensor, own: Tensor, product: Tensor) -> Tensor:
            both = product ^ (d & own) ^ (a_parts & other)
            return torch.stack([both[0] ^ (d & other), both[1]])

        left = slice(2 * pairs, None)  # the place without a partner, the highest
        return (
            torch.cat([g_high ^ joined(e, b_parts, ab), carry[..., left]], -1),
            torch.cat([joined(f, c_parts, ac), propagate[..., left]], -1),
        )

    def _to_ring(self, bit: Tensor) -> Shared:
        """A bit shared by exclusive or as a whole number shared by addition: 1 round, a bit each."""
        r = self._random_bits(bit.shape[1:])
        r_bits, r_words = self._deal(r, r.long())
        (opened,) = self._open(bit ^ r_bits)
        parts = r_words * (1 - 2 * opened.long())
        parts[0] += opened.long()
        return Shared(parts)

    def relu(self, x: Shared) -> Shared:
        """max(x, 0): 9 rounds."""
        return x - self.multiply(x, self.negative(x), whole=True)

    def maximum(self, x: Shared) -> Shared:
        """The largest along the last dimension, which stays with length 1: a tree of `relu` of differences, 9 rounds a level."""
        while x.shape[-1] > 1:
            pairs = x.shape[-1] // 2
            first, second = (Shared(x.parts[..., start : 2 * pairs : 2]) for start in (0, 1))
            largest = first + self.relu(second - first)
            x = Shared(torch.cat([largest.parts, x.parts[..., 2 * pairs :]], -1))
        return x

    # ---------------------------------------------------------------------------------------------------------- functions

    def exp(self, x: Shared) -> Shared:
        """exp x for x in (-500, 8): 8 rounds. (1 + x / 256)^256 is below exp x by x^2 / 512 of it."""
        steps = self.protocol.exp_steps
        y = self.add(self.scale(x, 2.0**-steps), 1.0)
        for _ in range(steps):
            y = self.square(y)
        return y

    def reciprocal(self, x: Shared) -> Shared:
        """1 / x for x in (0.01, 500), from 3 exp(0.5 - x) + 0.003 by y (2 - x y): 28 rounds."""
        y = self.add(self.scale(self.exp(self.add(-x, 0.5)), 3.0), 0.003)
        for _ in range(self.protocol.reciprocal_steps):
            y = self.multiply(y, self.add(-self.multiply(x, y), 2.0))
        return y

    def rsqrt(self, x: Shared) -> Shared:
        """1 / sqrt x for x in (0.05, 200), from 2.2 exp(-x / 2 - 0.2) + 0.2 - x / 1024 by y (3 - x y^2) / 2: 17 rounds."""
        y = self.scale(self.exp(self.add(self.scale(x, -0.5), -0.2)), 2.2)
        y = self.add(y - self.scale(x, 2.0**-10), 0.2)
        for _ in range(self.protocol.rsqrt_steps):
            y = self.scale(self.multiply(y, self.add(-self.multiply(x, self.square(y)), 3.0)), 0.5)
        return y

    def gelu(self, x: Shared) -> Shared:
        """x Phi(x), wrong by 0.0042 at most: 12 rounds. Three comparisons at once: with 0, -3 and 3."""
        edge = GELU_EDGE
        three = Shared(torch.stack([x.parts, self.add(x, edge).parts, self.add(-x, edge).parts], 1))
        below, far_left, far_right = self.negative(three).parts.unbind(1)
        relu = x - self.multiply(x, Shared(below), whole=True)
        t = relu + relu - x
        t2 = self.square(t)
        c0, c1, c2, c3, c4 = GELU_BUMP
        quartic = self.multiply(t2, self.add(self.scale(t, c3) + self.scale(t2, c4), c2))
        bump = self.add(quartic + self.scale(t, c1), c0)
        outside = Shared(far_left + far_right)
        return relu - bump + self.multiply(bump, outside, whole=True)

    def layer_norm(self, x: Shared, weight: Shared, bias: Shared, eps: float) -> Shared:
        """Layer norm over the last dimension with shared weights: 20 rounds. The variance has to lie where `rsqrt` holds."""
        width = x.shape[-1]
        centred = x - self.scale(x.map(lambda t: t.sum(-1, keepdim=True)), 1 / width)
        variance = self.add(self.scale(self.square(centred).map(lambda t: t.sum(-1, keepdim=True)), 1 / width), eps)
        return self.multiply(self.multiply(centred, self.rsqrt(variance)), weight) + bias

"""Who is slowed down when: ladders of thresholds, and a power limit on everybody."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from assay import checks

LOW, HIGH = 0, 1  # priorities, as `core.fleet.traces.Request` has them: the higher goes first

T1, T2, MARGIN = 0.80, 0.89, 0.05  # shares of the budget; recalled
F1, F2, F3 = 1275.0, 1110.0, 1305.0  # MHz; recalled, of accelerators with 1,410
BRAKE = 288.0  # MHz; recalled


@dataclass(frozen=True)
class Setting:
    """What a server is told: a clock of at most `mhz`, or to draw at most `watts` an accelerator; neither: its full clock."""

    mhz: float | None = None
    watts: float | None = None

    def __post_init__(self) -> None:
        for name in ("mhz", "watts"):
            if getattr(self, name) is not None:
                checks.number(name, getattr(self, name), above=0)
        if self.mhz is not None and self.watts is not None:
            raise ValueError("mhz and watts must not both be given")


FULL = Setting()


class Policy(Protocol):
    """What a controller asks. Own policies need these two methods."""

    def level(self, now: float, share: float, acting: int, asked: int) -> int:
        """The level to be asked for at `now`, 0 being no capping.

        `share` of the budget was drawn since the last look, `acting` is the level in effect, `asked` the last one asked for; they differ
        while a command is under way.
        """
        ...

    def setting(self, level: int, group: int) -> Setting:
        """What servers of a group (`LOW`, `HIGH`) are told at a level."""
        ...


@dataclass(frozen=True)
class Step:
    """A rung of a ladder: above `threshold` (a share of the budget) each group is capped to the clock that `caps` gives it, in MHz."""

    threshold: float
    caps: Mapping[int, float]

    def __post_init__(self) -> None:
        checks.number("threshold", self.threshold, above=0)
        for mhz in self.caps.values():
            checks.number("caps", mhz, above=0)


@dataclass(frozen=True)
class Ladder:
    """Steps from the mildest to the harshest, climbed when the row draws more than their thresholds.

    A step with the threshold of the one before it is climbed only when that one acts and does not suffice. A step is left, one at a time,
    when the draw is `margin` below its threshold and no command is under way: between the two nothing changes. Thresholds must not descend.

    >>> ladder = two_thresholds()
    >>> [ladder.level(0, share, acting=0, asked=0) for share in (0.7, 0.85, 0.95)]
    [0, 1, 2]
    >>> ladder.level(0, 0.95, acting=2, asked=2), ladder.level(0, 0.85, acting=2, asked=2), ladder.level(0, 0.83, acting=2, asked=2)
    (3, 2, 1)
    """

    steps: Sequence[Step] = ()
    margin: float = MARGIN

    def __post_init__(self) -> None:
        checks.number("margin", self.margin, low=0)
        thresholds = [step.threshold for step in self.steps]
        if thresholds != sorted(thresholds):
            raise ValueError(f"thresholds of steps must not descend, got {thresholds}")

    def level(self, now: float, share: float, acting: int, asked: int) -> int:
        """See `Policy`."""
        up = asked
        while up < len(self.steps) and share > self.steps[up].threshold:
            again = up > 0 and self.steps[up].threshold == self.steps[up - 1].threshold
            if again and not (acting >= up and asked >= up):
                break
            up += 1
        if up > asked:
            return up
        if acting == asked > 0 and share < self.steps[asked - 1].threshold - self.margin:
            return asked - 1
        return asked

    def setting(self, level: int, group: int) -> Setting:
        """See `Policy`."""
        caps = self.steps[level - 1].caps if level else {}
        return Setting(mhz=caps[group]) if group in caps else FULL


def two_thresholds(
    t1: float = T1, t2: float = T2, *, f1: float = F1, f2: float = F2, f3: float = F3, margin: float = MARGIN
) -> Ladder:
    """The paper's policy: above `t1` of the budget low priority runs at `f1` MHz, above `t2` at `f2`; if that does not suffice, high
    priority runs at `f3`. The defaults are recalled. Raises ValueError unless t1 <= t2."""
    return Ladder([Step(t1, {LOW: f1}), Step(t2, {LOW: f2}), Step(t2, {LOW: f2, HIGH: f3})], margin)


def one_threshold(threshold: float = T2, *, low: float = F2, high: float | None = F2, margin: float = MARGIN) -> Ladder:
    """Above `threshold` everybody is capped at once (`high` None: low priority only)."""
    return Ladder([Step(threshold, {LOW: low} if high is None else {LOW: low, HIGH: high})], margin)


def no_capping() -> Ladder:
    """No threshold: nothing stands between the row and its brake."""
    return Ladder()


@dataclass(frozen=True)
class PowerLimit:
    """Every accelerator draws `watts` at most, at all times: the device lowers its clock by itself, in the phases that would draw more.

    Nothing is watched and nothing is sent. The device reacts late, so that the row still sees the beginning of each prompt at its full draw
    (`RowSpec.limit_delay`).
    """

    watts: float

    def __post_init__(self) -> None:
        checks.number("watts", self.watts, above=0)

    def level(self, now: float, share: float, acting: int, asked: int) -> int:
        """Always 0."""
        return 0

    def setting(self, level: int, group: int) -> Setting:
        """The limit, for everybody."""
        return Setting(watts=self.watts)


@dataclass(frozen=True)
class Replay:
    """The levels of `ladder` at fixed times, (seconds, level) ascending, whatever is drawn. A control: it caps as much, blindly."""

    schedule: Sequence[tuple[float, int]]
    ladder: Ladder = field(default_factory=two_thresholds)

    def level(self, now: float, share: float, acting: int, asked: int) -> int:
        """The last level whose time has come."""
        found = 0
        for at, level in self.schedule:
            if at > now:
                break
            found = level
        return found

    def setting(self, level: int, group: int) -> Setting:
        """The ladder's."""
        return self.ladder.setting(level, group)

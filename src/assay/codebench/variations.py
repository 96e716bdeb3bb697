"""Inputs that nobody has seen, made of those that tests give: varied in what they hold, and grown. Types stay as they were seen."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from typing import Any

from assay.codebench.behaviour import Call
from assay.methods.code.coffe import MANNERS, Doubling, value_here

LARGEST = 30_000
"""Elements that a grown input has at most."""
ODD_FLOATS = (float("nan"), float("inf"), -0.0, 0.0)


def rows(calls: Sequence[Call]) -> dict[tuple[str, int, str], list[Call]]:
    """Calls that can be mixed: of one function, with as many arguments, and the same ones by name."""
    found: dict[tuple[str, int, str], list[Call]] = {}
    for call in calls:
        found.setdefault((call.function, len(call.args), repr(sorted(call.kwargs.items()))), []).append(call)
    return found


def varied(calls: Sequence[Call], count: int, seed: int = 0) -> list[Call]:
    """`count` calls at most like these, none of which is one of them.

    Each has one or more arguments changed a little: elements left out, doubled, put in another order, taken from other calls; numbers near
    by, zero, the other sign; empty containers; NaN where there are floats; and one object for two arguments of one type.
    """
    chance = random.Random(seed)
    groups = [group for group in rows(calls).values() if group[0].args]
    known = {text(call) for call in calls}
    found: list[Call] = []
    for number in range(count * 6 if groups else 0):
        group = groups[number % len(groups)]
        chosen = chance.choice(group)
        columns = list(zip(*(call.args for call in group), strict=True))
        args = list(copy.deepcopy(chosen.args))
        for place in chance.sample(range(len(args)), chance.randint(1, len(args))):
            for _ in range(chance.choice((1, 1, 2, 3))):
                args[place] = _changed(args[place], columns[place], chance)
        twins = [
            (n, m)
            for n in range(len(args))
            for m in range(n)
            if type(args[n]) is type(args[m]) and isinstance(args[n], (list, dict, set))
        ]
        if twins and chance.random() < 0.1:
            one, other = chance.choice(twins)
            args[one] = args[other]
        if number % 6 == 0:
            args = [_odd(value, chance) for value in args]
        new = Call(
            chosen.function, copy.deepcopy(tuple(args)), copy.deepcopy(chosen.kwargs)
        )  # nothing shared with another call
        if text(new) not in known:
            known.add(text(new))
            found.append(new)
        if len(found) == count:
            break
    return found


def grown(calls: Sequence[Call], doublings: int, count: int, seed: int = 0) -> dict[str, list[Call]]:
    """Calls like these with what they hold doubled so often, up to `count` of each function."""
    found: dict[str, list[Call]] = {}
    for group in rows(calls).values():
        if not group[0].args:
            continue
        generator = Doubling([call.args for call in group], scale=LARGEST, seed=seed + doublings)
        for number in range(count):
            chosen = group[(number * 7 + seed) % len(group)]
            manner = MANNERS[(number + doublings) % len(MANNERS)] if number else "random"
            try:
                args = value_here(generator.grown(chosen.args, doublings=doublings, manner=manner))
            except (ValueError, TypeError, IndexError, OverflowError, MemoryError):
                continue
            if size(args) <= LARGEST:
                found.setdefault(chosen.function, []).append(Call(chosen.function, args, chosen.kwargs))
    return found


def size(value: Any) -> int:
    """How many elements a value holds in all."""
    if isinstance(value, (str, bytes)):
        return len(value)
    if isinstance(value, Mapping):
        return len(value) + sum(map(size, value.values()))
    if isinstance(value, (list, tuple, set, frozenset)):
        if all(type(one) in (int, float, bool) for one in value):
            return len(value)
        return max(len(value), sum(map(size, value)))
    return 0


def shape(value: Any) -> str:
    """A type for people: list of int, dict of str to int."""
    if isinstance(value, (list, set, frozenset, tuple)):
        held = sorted({shape(one) for one in list(value)[:50]})
        return type(value).__name__ + (f" of {' or '.join(held)}" if held else "")
    if isinstance(value, dict):
        keys, held = sorted({shape(one) for one in value}), sorted({shape(one) for one in value.values()})
        return f"dict of {' or '.join(keys)} to {' or '.join(held)}" if held else "dict"
    return "None" if value is None else type(value).__name__


def text(call: Call) -> str:
    """What tells a call from others."""
    return f"{call.function}{call.args!r}{sorted(call.kwargs.items())!r}"


def _changed(value: Any, column: Sequence[Any], chance: random.Random) -> Any:
    kind = type(value)
    alike = [one for one in column if type(one) is kind]
    if chance.random() < 0.15 and alike:
        return copy.deepcopy(chance.choice(alike))
    if kind is bool:
        return not value
    if kind is int:
        near = [
            value - 1,
            value + 1,
            0,
            1,
            2 * value,
            value // 2,
            chance.randint(min(alike), max(alike) + 1) if alike else value + 2,
        ]
        near += [-value] if any(one < 0 for one in alike) or chance.random() < 0.2 else []
        return chance.choice([one for one in near if abs(one) < 10**7] or [0])
    if kind is float:
        near = [
            value + 1.0,
            value / 2,
            value * (1 + chance.random()),
            -value,
            float(round(value)) if abs(value) < 1e15 else 0.0,
        ]
        return chance.choice(ODD_FLOATS) if chance.random() < 0.15 else chance.choice(near)
    if kind is str:
        letters = "".join(sorted({letter for one in alike for letter in one})) or "a"
        return "".join(_list_changed(list(value), list(letters), chance))
    if kind is bytes:
        return bytes(_list_changed(list(value), [one for row in alike for one in row] or [0], chance))
    if kind is list:
        return _list_changed(value, [one for row in alike for one in row], chance)
    if kind is tuple and value:
        place = chance.randrange(len(value))
        same_place = [row[place] for row in alike if place < len(row)]
        return (*value[:place], _changed(value[place], same_place, chance), *value[place + 1 :])
    if kind in (set, frozenset):
        return kind(
            _list_changed(sorted(value, key=repr), sorted((one for row in alike for one in row), key=repr), chance)
        )
    if kind is dict and value:
        key = chance.choice(list(value))
        if chance.random() < 0.3:
            return {one: held for one, held in value.items() if one != key}
        held = [one for row in alike for one in row.values()]
        return {one: _changed(value[one], held, chance) if one == key else value[one] for one in value}
    return copy.deepcopy(chance.choice(column)) if column else value


def _odd(value: Any, chance: random.Random) -> Any:
    """A value with one of its floats, if it has any, become one that programs seldom think of."""
    if type(value) is float:
        return chance.choice(ODD_FLOATS)
    if type(value) in (list, tuple) and value:
        place = chance.randrange(len(value))
        return type(value)([*value[:place], _odd(value[place], chance), *value[place + 1 :]])
    return value


def _list_changed(items: list[Any], pool: list[Any], chance: random.Random) -> list[Any]:
    """Some elements of a list changed; a row of a table becomes no longer than those that were seen."""
    found = list(items)
    how = chance.randrange(9)
    if how == 0 or not found:
        return [] if how == 0 else [copy.deepcopy(chance.choice(pool))] if pool else []
    if how == 1:
        del found[chance.randrange(len(found))]
    elif how == 2:
        found.insert(chance.randrange(len(found) + 1), copy.deepcopy(chance.choice(found)))
    elif how == 3:
        chance.shuffle(found)
    elif how == 4:
        found.reverse()
    elif how == 5:
        found += copy.deepcopy(found)
    elif how == 6 and pool:
        found.insert(chance.randrange(len(found) + 1), copy.deepcopy(chance.choice(pool)))
    elif how == 7:
        found = [found[0]] * len(found) if isinstance(found[0], (int, str, float, tuple)) else found[:1]
    else:
        place = chance.randrange(len(found))
        found[place] = (
            chance.choice(pool) if isinstance(found[place], str) and pool else _changed(found[place], pool, chance)
        )
    return found

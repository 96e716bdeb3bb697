"""What can be set: typed parameters, conditions, constraints, and a memory floor."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from assay import checks

Params = dict[str, Any]


@dataclass(frozen=True)
class Categorical:
    """One of `choices`. `when` names earlier parameters and the values at which this one exists at all."""

    name: str
    choices: tuple[Any, ...]
    default: Any
    when: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    more_memory = False

    def values(self, levels: int) -> list[Any]:
        return list(self.choices)

    def sample(self, rng: random.Random) -> Any:
        return rng.choice(self.choices)

    def near(self, value: Any) -> list[Any]:
        return [choice for choice in self.choices if choice != value]

    def holds(self, value: Any) -> bool:
        return value in self.choices


@dataclass(frozen=True)
class Int:
    """A whole number from `low` to `high`. `grid` are the values of a grid search, else a few spread ones.

    `more_memory` says that a larger value never needs less memory: a failure then rules out all larger ones.
    """

    name: str
    low: int
    high: int
    default: int
    log: bool = False
    grid: tuple[int, ...] = ()
    more_memory: bool = False
    when: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _plain_numbers(self, checks.whole)

    def values(self, levels: int) -> list[int]:
        if self.grid or self.high - self.low < levels:
            return list(self.grid or range(self.low, self.high + 1))
        return sorted({round(value) for value in _spread(self.low, self.high, levels, self.log)})

    def sample(self, rng: random.Random) -> int:
        if self.log:
            value = math.exp(rng.uniform(math.log(self.low), math.log(self.high + 1)))
            return min(int(value), self.high)
        return rng.randint(self.low, self.high)

    def near(self, value: int) -> list[int]:
        return sorted({round(v) for v in _steps(self.low, self.high, value, self.log)} - {value})

    def holds(self, value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and self.low <= value <= self.high


@dataclass(frozen=True)
class Float:
    """A number from `low` to `high`, see `Int`."""

    name: str
    low: float
    high: float
    default: float
    log: bool = False
    grid: tuple[float, ...] = ()
    more_memory: bool = False
    when: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _plain_numbers(self, checks.number)

    def values(self, levels: int) -> list[float]:
        return list(self.grid) or _spread(self.low, self.high, levels, self.log)

    def sample(self, rng: random.Random) -> float:
        if self.log:
            return math.exp(rng.uniform(math.log(self.low), math.log(self.high)))
        return rng.uniform(self.low, self.high)

    def near(self, value: float) -> list[float]:
        return sorted(set(_steps(self.low, self.high, value, self.log)) - {value})

    def holds(self, value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and self.low <= value <= self.high


Parameter = Categorical | Int | Float


def _plain_numbers(parameter: Any, check: Callable[[str, Any], Any]) -> None:
    """NumPy's numbers as Python's, which a journal can hold. Raises TypeError and ValueError for what is none, or not finite."""
    for name in ("low", "high", "default"):
        object.__setattr__(parameter, name, check(f"{name} of {parameter.name}", getattr(parameter, name)))
    object.__setattr__(parameter, "grid", tuple(check(f"grid of {parameter.name}", v) for v in parameter.grid))
    for name in ("log", "more_memory"):
        checks.flag(f"{name} of {parameter.name}", getattr(parameter, name))


def _spread(low: float, high: float, levels: int, log: bool) -> list[float]:
    values = np.geomspace(low, high, levels) if log else np.linspace(low, high, levels)
    return [low, *values[1:-1].tolist(), high]  # the ends exactly


def _steps(low: float, high: float, value: float, log: bool) -> list[float]:
    """A fifteenth and a fifth of the range to either side, as far as it goes."""
    if log:
        steps = _steps(math.log(low), math.log(high), math.log(value), False)
        return [min(max(math.exp(step), low), high) for step in steps]  # rounding must not leave the range
    width = high - low
    return [value + share * width for share in (-1 / 5, -1 / 15, 1 / 15, 1 / 5) if low <= value + share * width <= high]


@dataclass(frozen=True)
class Constraint:
    """A rule every setting must keep; `holds(params)` is False where it is broken."""

    reason: str
    holds: Callable[[Params], bool]


class Space:
    """Parameters in order, and constraints.

    Raises ValueError for names given twice, choices that are equal, unknown conditions, or a default outside.

    >>> space = Space([Int("batch_size", 1, 8, default=1, grid=(1, 4, 8)), Categorical("sort", (False, True), default=False)])
    >>> space.default(), len(list(space.grid()))
    ({'batch_size': 1, 'sort': False}, 6)
    """

    def __init__(self, parameters: Sequence[Parameter], constraints: Sequence[Constraint] = ()):
        self.parameters, self.constraints = tuple(parameters), tuple(constraints)
        seen: set[str] = set()
        for parameter in parameters:
            if parameter.name in seen:
                raise ValueError(f"parameters must have different names, {parameter.name!r} comes twice")
            if unknown := set(parameter.when) - seen:
                raise ValueError(f"{parameter.name!r} depends on {sorted(unknown)}, which do not come before it")
            if not isinstance(parameter, Categorical):
                if not parameter.low <= parameter.high or (parameter.log and parameter.low <= 0):
                    raise ValueError(f"{parameter.name!r} needs low <= high, and low > 0 if log; got {parameter}")
            elif not parameter.choices:
                raise ValueError(f"{parameter.name!r} needs at least one choice")
            elif any(a != a or a in parameter.choices[:i] for i, a in enumerate(parameter.choices)):
                raise ValueError(
                    f"{parameter.name!r} needs choices that differ (1 equals True), got {parameter.choices}"
                )
            for value in (parameter.default, *getattr(parameter, "grid", ())):
                if not parameter.holds(value):
                    raise ValueError(f"{parameter.name!r} does not allow {value!r}, its default or a grid value")
            seen.add(parameter.name)
        if reason := self.infeasible(self.default()):
            raise ValueError(f"the default setting is not allowed: {reason}")

    @classmethod
    def from_dict(cls, description: Mapping[str, Mapping[str, Any]], constraints: Sequence[Constraint] = ()) -> Space:
        """From plain data, as a YAML or JSON file holds it: {name: {type: int, low: 1, high: 64, log: true, default: 1}}.

        Raises ValueError for an unknown type or a field that the type does not have.
        """
        kinds: dict[str, type] = {"categorical": Categorical, "int": Int, "float": Float}
        parameters = []
        for name, fields in description.items():
            rest = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
            kind = rest.pop("type", None)
            if kind not in kinds:
                raise ValueError(f"type of {name!r} must be one of {', '.join(kinds)}, got {kind!r}")
            try:
                parameters.append(kinds[kind](name=name, **rest))
            except TypeError as error:
                raise ValueError(f"{name!r} of type {kind!r} is not described rightly: {error}") from error
        return cls(parameters, constraints)

    def active(self, parameter: Parameter, params: Params) -> bool:
        """Whether `parameter` exists, given the earlier ones in `params`."""
        return all(name in params and params[name] in allowed for name, allowed in parameter.when.items())

    def build(self, value_of: Callable[[Parameter], Any]) -> Params:
        """A setting, parameter by parameter, asking `value_of` for those that exist."""
        params: Params = {}
        for parameter in self.parameters:
            if self.active(parameter, params):
                params[parameter.name] = value_of(parameter)
        return params

    def default(self) -> Params:
        """The setting a user gets without asking."""
        return self.build(lambda parameter: parameter.default)

    def sample(self, rng: random.Random) -> Params:
        """A random setting; it may break a constraint."""
        return self.build(lambda parameter: parameter.sample(rng))

    def grid(self, levels: int = 5) -> Iterator[Params]:
        """The whole product, conditions applied; infeasible settings included."""

        def extend(position: int, params: Params) -> Iterator[Params]:
            if position == len(self.parameters):
                yield params
                return
            parameter = self.parameters[position]
            if not self.active(parameter, params):
                yield from extend(position + 1, params)
                return
            for value in parameter.values(levels):
                yield from extend(position + 1, {**params, parameter.name: value})

        return extend(0, {})

    def neighbours(self, params: Params) -> list[Params]:
        """Settings that differ from `params` in one parameter, by a step of it; those that depend on it take their defaults."""

        def completed(changed: Params) -> Params:
            return self.build(lambda parameter: changed.get(parameter.name, parameter.default))

        return [
            completed({**params, parameter.name: value})
            for parameter in self.parameters
            if parameter.name in params
            for value in parameter.near(params[parameter.name])
        ]

    def infeasible(self, params: Params) -> str:
        """Which constraint `params` breaks, in words; "" if none."""
        return next((rule.reason for rule in self.constraints if not rule.holds(params)), "")

    def check(self, params: Params) -> Params:
        """Return `params`. Raises ValueError for a parameter missing, unknown, inactive or out of range, and for a broken constraint."""
        wanted = {p.name: p for p in self.parameters if self.active(p, params)}
        if set(params) != set(wanted):
            raise ValueError(f"params must hold {', '.join(wanted)}, got {', '.join(params) or 'nothing'}")
        for name, value in params.items():
            if not wanted[name].holds(value):
                raise ValueError(f"{name} does not allow {value!r}")
        if reason := self.infeasible(params):
            raise ValueError(f"params are not allowed: {reason}")
        return params


def key_of(params: Mapping[str, Any]) -> str:
    """A setting as text: equal for equal settings, whatever the order of their names."""
    return json.dumps(dict(sorted(params.items())))


def divides(name: str, total: int) -> Constraint:
    """`name` must divide `total`: heads by the tensor parallel size, for instance."""
    return Constraint(f"{name} must divide {total}", lambda params: total % params.get(name, 1) == 0)


def hugging_face_space(
    *, max_batch: int = 64, threads: Sequence[int] = (1,), dtypes: Sequence[str] = ("float32", "bfloat16")
) -> Space:
    """What a user of transformers can choose, with the defaults of its text-generation pipeline. Padding is always on the left."""
    if not threads or not dtypes:
        raise ValueError(f"threads and dtypes must hold at least one choice, got {threads} and {dtypes}")
    more = tuple(range(2, max_batch + 1))
    return Space(
        [
            Int("batch_size", 1, max_batch, default=1, log=True, more_memory=True),
            Categorical("sort_by_length", (False, True), default=False, when={"batch_size": more}),
            Categorical("dtype", tuple(dtypes), default=dtypes[0]),
            Categorical("attn_implementation", ("sdpa", "eager"), default="sdpa"),
            Categorical("threads", tuple(threads), default=threads[-1]),
            Categorical("static_cache", (False, True), default=False),
        ]
    )


def serving_engine_space(*, attention_heads: int, devices: int, quantisations: Sequence[str] = ("none",)) -> Space:
    """The settings of a vLLM-like engine; the objective, which starts the engine with a setting and measures it, is up to you."""
    sizes = tuple(2**i for i in range(devices.bit_length()) if 2**i <= devices)
    return Space(
        [
            Int("max_num_seqs", 1, 512, default=256, log=True, more_memory=True),
            Float("gpu_memory_utilization", 0.5, 0.98, default=0.9),
            Categorical("tensor_parallel_size", sizes, default=1),
            Categorical("enable_chunked_prefill", (False, True), default=True),
            Int("max_num_batched_tokens", 256, 16384, default=2048, log=True, when={"enable_chunked_prefill": (True,)}),
            Categorical("block_size", (8, 16, 32), default=16),
            Categorical("quantization", tuple(quantisations), default=quantisations[0]),
            Categorical("kv_cache_dtype", ("auto", "fp8"), default="auto"),
        ],
        [
            divides("tensor_parallel_size", attention_heads),
            Constraint(
                "max_num_batched_tokens must be at least max_num_seqs",
                lambda params: params.get("max_num_batched_tokens", math.inf) >= params["max_num_seqs"],
            ),
        ],
    )


def memory_floor(
    *, parameters: int, config: Any, batch_size: int, tokens: int, dtype_bytes: int, last_logits: bool = True
) -> int:
    """The least bytes generation needs: weights, the key-value cache of `batch_size` rows of `tokens`, one row of logits each.

    A lower bound without activations and workspace, so that nothing that fits is ruled out. Dense attention in every layer is
    assumed: not for models with sliding windows, shared or compressed caches.
    Raises ValueError for sizes below 1, TypeError for ones that are not whole.
    """
    parameters = checks.whole("parameters", parameters, low=1)
    batch_size, tokens = checks.whole("batch_size", batch_size, low=1), checks.whole("tokens", tokens, low=1)
    dtype_bytes = checks.whole("dtype_bytes", dtype_bytes, low=1)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * batch_size * heads * tokens * head
    logits = batch_size * config.vocab_size if last_logits else 0
    return int(dtype_bytes * (parameters + cache + logits))


def fits_memory(available_bytes: int, *, parameters: int, config: Any, tokens: int) -> Constraint:
    """Rules out settings (`batch_size`, `dtype`) whose `memory_floor` exceeds what there is. Raises as that does, for bytes too."""
    available_bytes = checks.whole("available_bytes", available_bytes, low=0)

    def holds(params: Params) -> bool:
        size = getattr(torch, params.get("dtype", "float32")).itemsize
        batch = params.get("batch_size", 1)
        return available_bytes >= memory_floor(
            parameters=parameters, config=config, batch_size=batch, tokens=tokens, dtype_bytes=size
        )

    return Constraint(f"needs more than the {available_bytes / 2**20:.0f} MiB there are", holds)

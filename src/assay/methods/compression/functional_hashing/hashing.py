"""The functional hash: run a candidate on fixed inputs, round the outputs, and mix them into one key."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import random
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from assay import checks

_PROBE_LOCK = threading.RLock()  # the global random states belong to one probe at a time


@dataclass(frozen=True)
class Training:
    """How a probe trains a candidate: about ten examples to learn from and ten to be judged on are enough.

    `targets` holds one target per input. `validation` are the inputs predicted after training; empty: the inputs themselves.
    For a torch module `loss(output, target)` is needed, and `steps` steps of plain gradient descent (default: one per input)
    go over the inputs in turn. Objects with `fit`/`predict` or `learn`/`predict` bring their own training.
    Raises ValueError for fewer than no steps or a negative learning rate, TypeError for steps that are not whole.
    """

    targets: Sequence[Any]
    validation: Sequence[Any] = ()
    loss: Callable[[Any, Any], Tensor] | None = None
    steps: int | None = None
    learning_rate: float = 0.1

    def __post_init__(self) -> None:
        if self.steps is not None:
            checks.whole("steps", self.steps, low=0)
        checks.number("learning_rate", self.learning_rate, low=0)


@dataclass(frozen=True)
class _Failure:
    """What stands in the behaviour where the candidate raised: the exception's class, not its message."""

    kind: str

    @classmethod
    def of(cls, error: Exception) -> _Failure:
        return cls(f"{type(error).__module__}.{type(error).__qualname__}")


def functional_hash(
    candidate: Any,
    inputs: Sequence[Any],
    *,
    training: Training | None = None,
    modes: Sequence[str] = ("eval",),
    read: Callable[[Any], Any] | None = None,
    digits: int = 6,
    dtype: torch.dtype | None = None,
    task: int | str = 0,
    seed: int = 42,
) -> str:
    """The key (32 hexadecimal digits, 128 bits) of what `candidate` computes on `inputs`.

    The candidate is a torch module, any callable, or a learning algorithm: an object with `fit(inputs, targets)` and
    `predict(inputs)`, or with `learn(x, y)` and `predict(x)` (and, if it likes, `setup()`); a learning algorithm needs `training`.
    Each input is one call: a tuple is its positional arguments, a dict its keyword arguments, anything else its one argument.
    The candidate is left as it was (a copy of it runs: modules and callable objects may keep counts or buffers), and so are the
    random states of Python, numpy and torch. What a plain function keeps in its closure is its own affair.

    Equal keys: same values, in the same order, once every number has `digits` significant digits. NaN and the infinities are
    values of their own; a call that raises counts as its exception's class. More inputs only split keys, they never merge them.

    `modes`: for a module, any of "eval" and "train" (BatchNorm and dropout differ there). `training` is the finer probe: two
    nets equal at the start may train differently. `read(output)` picks what to hash of an output; by default its `logits`
    if it has them, else all of it. `dtype=torch.float64` probes a copy of a module in double precision: then rounding swallows
    what thread counts and reordered sums change. A float32 module is hashed as it is, which is stable only on the same
    machine with the same thread count, since some of many numbers always lies at a rounding edge.
    `task` separates searches over different data. Inputs should have both signs and several magnitudes: `canonical_inputs`.

    Raises TypeError for a candidate that cannot be run, or an output of a type that has no defined value; ValueError for bad
    arguments. Running out of memory is the machine's failure, not the candidate's, and is raised.

    >>> inputs = canonical_inputs(4, (3,))
    >>> functional_hash(lambda x: x + x, inputs) == functional_hash(lambda x: 2 * x, inputs)
    True
    """
    if len(inputs) == 0:
        raise ValueError("inputs must hold at least one example, got none")
    digits = checks.whole("digits", digits, low=1, high=15)
    seed = checks.whole("seed", seed, low=-(2**63), high=2**64 - 1)
    if not (dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point)):
        raise TypeError(f"dtype must be a floating-point torch.dtype or None, got {checks.shown(dtype)}")
    if not (training is None or isinstance(training, Training)):
        raise TypeError(f"training must be a Training or None, got {checks.shown(training)}")
    if not modes or not set(modes) <= {"eval", "train"}:
        raise ValueError(f"modes must name 'eval', 'train' or both, got {tuple(modes)}")
    if training is not None and len(training.targets) != len(inputs):
        raise ValueError(
            f"training.targets must pair with inputs: {len(training.targets)} targets, {len(inputs)} inputs"
        )

    hasher = hashlib.blake2b(digest_size=16)
    _mix(hasher, ("functional hash", seed, digits), digits)
    values = _behaviour(candidate, inputs, training, modes, dtype, seed)
    with _PROBE_LOCK, _random_states_kept(), contextlib.closing(values):
        for value in values:
            _mix(hasher, value if isinstance(value, _Failure) else _read(value, read), digits)
    _mix(hasher, (task, len(inputs)), digits)
    return hasher.hexdigest()


def canonical_inputs(n: int, *shapes: tuple[int, ...], seed: int = 42) -> list[Any]:
    """`n` fixed float64 inputs of both signs and of magnitudes from 0.1 to 10, to tell apart what differs in sign or scale.

    One shape gives one tensor an input, several give tuples of tensors (positional arguments), no shape a Python float.
    Every element walks evenly through signs and magnitudes from input to input (an additive recurrence), so that ten inputs
    already have small and large numbers of either sign. The first k of n are those of k: adding probes refines the keys.
    Raises ValueError when `n` is not positive.
    """
    checks.whole("n", n, low=1)
    arguments = shapes or ((),)
    ratio = 2.0
    for _ in range(60):  # the root of r^(d + 1) = r + 1 for d arguments: powers of 1/r are jointly even steps
        ratio = (1 + ratio) ** (1 / (len(arguments) + 1))
    starts = [np.random.default_rng([seed, number]).random(shape) for number, shape in enumerate(arguments)]
    inputs: list[Any] = []
    for example in range(n):
        walks = [2 * ((start + example * ratio ** -(1 + number)) % 1) - 1 for number, start in enumerate(starts)]
        tensors = tuple(torch.as_tensor(np.sign(walk) * 10 ** (2 * np.abs(walk) - 1)) for walk in walks)
        inputs.append(float(tensors[0]) if not shapes else tensors[0] if len(tensors) == 1 else tensors)
    return inputs


# What a candidate does


def _behaviour(
    candidate: Any,
    inputs: Sequence[Any],
    training: Training | None,
    modes: Sequence[str],
    dtype: torch.dtype | None,
    seed: int,
) -> Generator[Any, None, None]:
    """Every value the probe sees, in order."""
    if isinstance(candidate, nn.Module):
        yield from _module_behaviour(candidate, inputs, training, modes, dtype, seed)
    elif callable(getattr(candidate, "predict", None)) and hasattr(candidate, "fit"):
        yield from _estimator_behaviour(candidate, inputs, _needed(training, candidate), seed)
    elif callable(getattr(candidate, "predict", None)) and hasattr(candidate, "learn"):
        yield from _learner_behaviour(candidate, inputs, _needed(training, candidate), seed)
    elif callable(candidate):
        candidate = _copy(candidate)
        if training is not None:
            raise TypeError(f"training was given, but {type(candidate).__name__} is a plain callable and cannot learn")
        _seed_all(seed)
        for example in inputs:
            yield _called(candidate, example)
    else:
        raise TypeError(
            f"candidate must be a torch module, a callable or a learning algorithm, got {type(candidate).__name__}"
        )


def _module_behaviour(
    model: nn.Module,
    inputs: Sequence[Any],
    training: Training | None,
    modes: Sequence[str],
    dtype: torch.dtype | None,
    seed: int,
) -> Iterator[Any]:
    inputs = [_cast(example, dtype) for example in inputs]
    for mode in modes:
        probe = _cast(_copy(model), dtype)  # a forward pass may count or keep what it sees, in eval mode too
        with _in_mode(probe, mode == "train"), torch.no_grad():
            _seed_all(seed)
            for example in inputs:
                yield _called(probe, example)
    if training is not None:
        yield from _trained_behaviour(_cast(_copy(model), dtype), inputs, training, dtype, seed)


def _trained_behaviour(
    model: nn.Module, inputs: Sequence[Any], training: Training, dtype: torch.dtype | None, seed: int
) -> Iterator[Any]:
    """The losses of a few steps of gradient descent, then what the trained module puts out."""
    if training.loss is None:
        raise ValueError("training.loss must be given to train a torch module")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.train()
    _seed_all(seed)
    for step in range(len(inputs) if training.steps is None else training.steps):
        number = step % len(inputs)
        try:
            with torch.enable_grad():
                loss = training.loss(
                    _call(model, inputs[number]), _cast(copy.deepcopy(training.targets[number]), dtype)
                )
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True) if loss.requires_grad else ()
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            yield _Failure.of(error)
            return
        yield loss.detach()
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=False):
                if gradient is not None:
                    parameter.sub_(gradient, alpha=training.learning_rate)
    model.eval()
    with torch.no_grad():
        for example in [_cast(example, dtype) for example in training.validation] or inputs:
            yield _called(model, example)


def _estimator_behaviour(candidate: Any, inputs: Sequence[Any], training: Training, seed: int) -> Iterator[Any]:
    learner = _copy(candidate)
    validation = training.validation if len(training.validation) else inputs

    def trained(examples: Any, targets: Any) -> Any:
        learner.fit(examples, targets)
        return learner.predict(examples)

    _seed_all(seed)
    yield _called(trained, (inputs, training.targets))
    yield _called(learner.predict, (validation,))


def _learner_behaviour(candidate: Any, inputs: Sequence[Any], training: Training, seed: int) -> Iterator[Any]:
    """Prediction before each example is learned, then predictions on the held-out inputs.

    The paper collects errors; with the targets fixed a prediction says the same and rounds better. Our choice.
    """
    learner = _copy(candidate)
    steps: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
    if hasattr(learner, "setup"):
        steps.append((learner.setup, ()))
    for example, target in zip(inputs, training.targets, strict=True):
        steps += [(learner.predict, (example,)), (learner.learn, (example, target))]
    steps += [(learner.predict, (x,)) for x in (training.validation if len(training.validation) else inputs)]
    _seed_all(seed)
    for step, arguments in steps:
        result = _called(step, arguments)
        if step == learner.predict or isinstance(result, _Failure):
            yield result


def _copy(candidate: Any) -> Any:
    try:
        return copy.deepcopy(candidate)
    except Exception as error:
        kind = type(candidate).__name__
        raise TypeError(f"candidate must be one that can be copied, got a {kind}: {error}") from error


def _needed(training: Training | None, candidate: Any) -> Training:
    if training is None:
        raise TypeError(f"{type(candidate).__name__} is a learning algorithm: training must be given")
    return training


def _called(function: Callable[..., Any], example: Any) -> Any:
    """The value of one call, or its failure."""
    try:
        return _call(function, example)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        return _Failure.of(error)


def _call(function: Callable[..., Any], example: Any) -> Any:
    example = copy.deepcopy(example)  # a candidate that works in place must not spoil the probe for the next one
    if isinstance(example, tuple):
        return function(*example)
    if isinstance(example, Mapping):
        return function(**example)
    return function(example)


def _read(output: Any, read: Callable[[Any], Any] | None) -> Any:
    if read is not None:
        return read(output)
    return output.logits if isinstance(getattr(output, "logits", None), Tensor) else output


def _cast(value: Any, dtype: torch.dtype | None) -> Any:
    """Floating tensors and modules in `dtype`; everything else, and everything for None, as it is."""
    if dtype is None:
        return value
    if isinstance(value, nn.Module):
        return value.to(dtype)
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(_cast(item, dtype) for item in value)
    if isinstance(value, Mapping):
        return {key: _cast(item, dtype) for key, item in value.items()}
    return value


@contextlib.contextmanager
def _in_mode(model: nn.Module, train: bool) -> Iterator[None]:
    flags = [(module, module.training) for module in model.modules()]
    model.train(train)
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextlib.contextmanager
def _random_states_kept() -> Iterator[None]:
    python, numpy_state = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count()))
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)


def _seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed takes 100 us, half of a small key
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


# Mixing: in order, each value with its kind and its length, so that neither order nor duplicates nor nesting is lost


def _mix(hasher: Any, value: Any, digits: int) -> None:
    if isinstance(value, _Failure):
        _put(hasher, b"failure", value.kind.encode())
    elif value is None:
        _put(hasher, b"none", b"")
    elif isinstance(value, bool | int | np.integer | np.bool_):
        _put(hasher, b"integer", str(int(value)).encode())
    elif isinstance(value, float | np.floating):
        _put(hasher, b"number", _rounded_text(float(value), digits))
    elif isinstance(value, complex | np.complexfloating):
        parts = (_rounded_text(float(part), digits) for part in (value.real, value.imag))
        _put(hasher, b"complex", b",".join(parts))
    elif isinstance(value, str):
        _put(hasher, b"text", value.encode("utf-8", "surrogatepass"))
    elif isinstance(value, bytes):
        _put(hasher, b"bytes", value)
    elif isinstance(value, Tensor):
        tensor = value.detach().cpu()
        tensor = tensor.to_dense() if tensor.layout != torch.strided else tensor
        _mix(hasher, (tensor.double() if tensor.is_floating_point() else tensor.resolve_conj()).numpy(), digits)
    elif isinstance(value, np.ndarray) and value.dtype != object:
        _mix_array(hasher, value, digits)
    elif isinstance(value, Mapping):
        entries = sorted(((_digest(key, digits), item) for key, item in value.items()), key=lambda entry: entry[0])
        _put(hasher, b"mapping", str(len(entries)).encode())
        for key, item in entries:
            _put(hasher, b"key", key)
            _mix(hasher, item, digits)
    elif isinstance(value, set | frozenset):
        _put(hasher, b"set", b"".join(sorted(_digest(item, digits) for item in value)))
    elif isinstance(value, list | tuple | np.ndarray):
        _put(hasher, b"sequence", str(len(value)).encode())
        for item in value:
            _mix(hasher, item, digits)
    else:
        raise TypeError(f"an output of type {type(value).__name__} has no defined value to hash; pick one with read=")


def _digest(value: Any, digits: int) -> bytes:
    hasher = hashlib.blake2b(digest_size=16)
    _mix(hasher, value, digits)
    return hasher.digest()


def _put(hasher: Any, kind: bytes, content: bytes) -> None:
    hasher.update(b"%s %d:" % (kind, len(content)))
    hasher.update(content)


def _rounded_text(number: float, digits: int) -> bytes:
    """`digits` significant digits; "nan", "inf" and "-inf" are sentinels of their own; both zeros are one."""
    return b"0" if number == 0 else f"{number:.{digits - 1}e}".encode()


def _mix_array(hasher: Any, array: np.ndarray, digits: int) -> None:
    _put(hasher, b"array", ",".join(map(str, array.shape)).encode())
    if array.dtype.kind == "u" and array.size and int(array.max()) >= 2**63:  # as signed ones they would be negative
        _put(hasher, b"large integers", np.ascontiguousarray(array, dtype="<u8").tobytes())
    elif array.dtype.kind in "bui":
        _put(hasher, b"integers", np.ascontiguousarray(array, dtype="<i8").tobytes())
    elif array.dtype.kind == "f":
        for part in _significant(np.asarray(array, dtype=np.float64), digits):
            _put(hasher, b"numbers", part.tobytes())
    elif array.dtype.kind == "c":
        for half in (array.real, array.imag):
            for part in _significant(np.asarray(half, dtype=np.float64), digits):
                _put(hasher, b"numbers", part.tobytes())
    else:
        for item in array.ravel().tolist():
            _put(hasher, b"text", str(item).encode("utf-8", "surrogatepass"))


def _significant(values: np.ndarray, digits: int) -> tuple[np.ndarray, np.ndarray]:
    """Integer mantissas of `digits` digits and decimal exponents; NaN and the infinities get an exponent nothing else has."""
    flat = values.ravel()
    plain = np.isfinite(flat) & (flat != 0)
    exponent = np.zeros(flat.shape, dtype=np.int64)
    exponent[plain] = np.floor(np.log10(np.abs(flat[plain])))
    shift = digits - 1 - exponent[plain]
    half = shift // 2  # two factors, because a single one would overflow for the smallest numbers
    mantissa = np.zeros(flat.shape, dtype=np.int64)
    mantissa[plain] = np.rint(flat[plain] * 10.0**half * 10.0 ** (shift - half))
    carried = np.abs(mantissa) >= 10**digits
    mantissa[carried] //= 10
    exponent[carried] += 1
    mantissa[np.isnan(flat)], mantissa[flat == np.inf], mantissa[flat == -np.inf] = 0, 1, -1
    exponent[~np.isfinite(flat)] = 32767
    return mantissa.astype("<i8"), exponent.astype("<i2")


# Parameters that do not depend on names


def parameter_seed(shape: Sequence[int], order: int, *, seed: int = 42) -> int:
    """The seed of the `order`-th tensor of this shape that a computation needs: a function of nothing else. Our choice."""
    text = f"{seed}:{','.join(map(str, shape))}:{order}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") % 2**63


def first_use_order(outputs: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """The leaf tensors behind `outputs`, in the order in which computing the outputs first asks for them.

    Follows the autograd graph from the outputs down, arguments from left to right; the terms of sums and products are put in
    an order of their own (by the operations and shapes below them), so that commuted terms give one order. Names, the order
    of registration and branches that reach no output play no part. Only what autograd records is seen.
    """
    tensors = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    roots = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    digests = _graph_digests(roots)
    found: list[Tensor] = []
    seen = set()
    waiting = roots[::-1]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        waiting += _ordered_children(node, digests)[::-1]
    return found


def _graph_digests(roots: Sequence[Any]) -> dict[Any, bytes]:
    """A digest of the operations and leaf shapes at and below each node of the autograd graph."""
    digests: dict[Any, bytes] = {}
    waiting = list(roots)
    while waiting:
        node = waiting[-1]
        if node in digests:
            waiting.pop()
            continue
        missing = [child for child, _ in node.next_functions if child is not None and child not in digests]
        if missing:
            waiting += missing
            continue
        waiting.pop()
        shape = tuple(node.variable.shape) if hasattr(node, "variable") else ()
        below = b"".join(digests[child] for child in _ordered_children(node, digests))
        digests[node] = hashlib.blake2b(f"{node.name()}{shape}".encode() + below, digest_size=16).digest()
    return digests


def _ordered_children(node: Any, digests: Mapping[Any, bytes]) -> list[Any]:
    children = [child for child, _ in node.next_functions if child is not None]
    if node.name().startswith(("AddBackward", "MulBackward")):
        children.sort(key=lambda child: digests[child])  # stable: equal terms keep their order
    return children


def initialise(model: nn.Module, example: Any, *, seed: int = 42) -> nn.Module:
    """Draw the parameters of `model` anew, in place, so that equal nets under other names get equal weights. Returns it.

    Each parameter is seeded by its shape and its rank among the parameters of that shape in `first_use_order` of one run
    on `example`. Tensors of two or more dimensions are normal with standard deviation 1/sqrt(fan-in); a vector is uniform within
    1/sqrt(length), except that a constant one (scale of a norm, zero bias) stays. Our choice: the paper names no scheme.
    Parameters that reach no output come last, in the order of registration. Raises what running the model raises.
    """
    parameters = list(model.parameters())
    flags = [parameter.requires_grad for parameter in parameters]
    with _PROBE_LOCK, _random_states_kept(), _in_mode(model, False), torch.enable_grad():
        try:
            for parameter in parameters:
                parameter.requires_grad_(parameter.is_floating_point())
            _seed_all(seed)
            used = first_use_order(_tensors(_read(_call(model, example), None)))
        finally:
            for parameter, flag in zip(parameters, flags, strict=True):
                parameter.requires_grad_(flag)
    order = {id(tensor): rank for rank, tensor in enumerate(used)}
    counts: dict[tuple[int, ...], int] = {}
    for parameter in sorted(parameters, key=lambda tensor: order.get(id(tensor), len(order))):
        shape = tuple(parameter.shape)
        rank = counts[shape] = counts.get(shape, -1) + 1
        _draw(parameter, parameter_seed(shape, rank, seed=seed))
    return model


def _draw(parameter: Tensor, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        if parameter.ndim >= 2:
            fan_in = parameter[0].numel()
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / fan_in**0.5)
        elif not _is_constant(parameter):
            bound = parameter.numel() ** -0.5
            draw = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_((2 * draw - 1) * bound)


def _is_constant(vector: Tensor) -> bool:
    """All alike, as the scale of a norm; a single number counts only if it is 0 or 1, since any number is like itself."""
    flat = vector.flatten()
    return bool((flat == flat[:1]).all()) and (flat.numel() > 1 or flat.tolist() in ([], [0.0], [1.0]))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, list | tuple) else []

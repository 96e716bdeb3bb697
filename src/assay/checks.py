"""The shared argument checker: every message names the argument, what is allowed and what was given.

    stride = checks.whole("stride", stride, low=1)
    tau = checks.number("tau", tau, above=0, high=1)
    checks.tensor("q", q, shape=("batch", "heads", "queries", "dim"), dtype="floating")

A wrong type raises TypeError, a wrong value ValueError. NumPy and torch scalars are accepted; the checked values come back as
plain Python numbers. NaN and infinity are never in range, a bool is never a number, and nothing is rounded, clipped or cast.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
Kind = Literal["floating", "integer", "bool", "complex", "any"]


def shown(value: Any) -> str:
    """`value` for a message: its text, cut short."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def number(
    name: str,
    value: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> float:
    """`value` as a float: a finite real number in low <= value <= high and above < value < below.

    Raises TypeError for anything that is no real number (bool, text and complex too), ValueError outside the range.

    >>> number("tau", 0.9, above=0, high=1)
    0.9
    """
    allowed = _range("a finite number", low, high, above, below)
    if not isinstance(value, bool) and not isinstance(value, numbers.Real) and _is_scalar(value):
        value = value.item()  # NumPy's and torch's
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be {allowed}, got {shown(value)}")
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not math.isfinite(found) or not _within(found, low, high, above, below):
        raise ValueError(f"{name} must be {allowed}, got {shown(value)}")
    return found


def whole(name: str, value: Any, *, low: int | None = None, high: int | None = None) -> int:
    """`value` as an int in low <= value <= high. Raises TypeError for 3.0, True and text, ValueError outside the range.

    >>> whole("stride", 8, low=1)
    8
    """
    allowed = _range("a whole number", low, high, None, None)
    found = value
    if not isinstance(value, bool) and not isinstance(value, int) and _is_scalar(value):
        found = value.item()
    if isinstance(found, bool):
        raise TypeError(f"{name} must be {allowed}, got {shown(value)}")
    try:
        found = operator.index(found)
    except TypeError:
        raise TypeError(f"{name} must be {allowed}, got {shown(value)}") from None
    if not _within(found, low, high, None, None):
        raise ValueError(f"{name} must be {allowed}, got {shown(value)}")
    return int(found)


def flag(name: str, value: Any) -> bool:
    """`value` itself if it is True or False; raises TypeError for anything else (0, 1, "no")."""
    if isinstance(value, bool):
        return value
    if type(value).__name__ in ("bool_", "bool") and _is_scalar(value):  # NumPy's
        return bool(value)
    raise TypeError(f"{name} must be True or False, got {shown(value)}")


def choice(name: str, value: T, allowed: Collection[Any]) -> T:
    """`value` itself if it is one of `allowed`; raises ValueError (TypeError for another type than they have) listing them."""
    known = list(allowed)
    if not any(type(item) is type(value) and item == value for item in known):
        listed = ", ".join(repr(item) for item in known)
        wrong = not any(isinstance(value, type(item)) for item in known)
        raise (TypeError if wrong else ValueError)(f"{name} must be one of {listed}, got {shown(value)}")
    return value


def tensor(
    name: str,
    value: Any,
    *,
    shape: Sequence[int | str] | None = None,
    ndim: int | None = None,
    dtype: Kind | torch.dtype | Collection[torch.dtype] = "floating",
    device: torch.device | None = None,
    finite: bool = False,
    empty: bool = False,
) -> torch.Tensor:
    """`value` itself if it is a tensor as described.

    `shape` has one entry a dimension: a number that must match, or a name that may be any length ("..." first stands for any
    leading dimensions). `dtype` is a kind ("floating", "integer", "bool", "complex", "any") or the dtypes allowed. `finite`
    refuses NaN and infinity, which reads the whole tensor. An empty tensor is refused unless `empty`.
    Raises TypeError for another type or dtype, ValueError for another shape, device or value.
    """
    import torch

    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__} {shown(value)}")
    if not _dtype_fits(value.dtype, dtype):
        raise TypeError(f"{name} must hold {_dtypes(dtype)}, got {value.dtype}")
    given = tuple(value.shape)
    if ndim is not None and value.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, got shape {given}")
    if shape is not None and not _shape_fits(given, shape):
        raise ValueError(f"{name} must have shape ({', '.join(map(str, shape))}), got {given}")
    if not empty and value.numel() == 0:
        raise ValueError(f"{name} must not be empty, got shape {given}")
    if device is not None and value.device != torch.device(device):
        raise ValueError(f"{name} must lie on {device}, got {value.device}")
    if finite and not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name} must be finite, got NaN or infinity in it")
    return value


def together(**tensors: torch.Tensor) -> None:
    """Raise ValueError unless all tensors lie on one device and TypeError unless they have one dtype.

    >>> import torch
    >>> together(q=torch.zeros(2), k=torch.zeros(3))
    """
    (first, reference), *rest = tensors.items()
    for name, other in rest:
        if other.dtype != reference.dtype:
            raise TypeError(f"{name} must have the dtype of {first}, {reference.dtype}, got {other.dtype}")
        if other.device != reference.device:
            raise ValueError(f"{name} must lie on the device of {first}, {reference.device}, got {other.device}")


def _is_scalar(value: Any) -> bool:
    """A NumPy or torch number, or an array of a single one without dimensions."""
    return hasattr(value, "item") and getattr(value, "shape", None) == ()


def _within(value: float, low: float | None, high: float | None, above: float | None, below: float | None) -> bool:
    return (
        (low is None or value >= low)
        and (high is None or value <= high)
        and (above is None or value > above)
        and (below is None or value < below)
    )


def _range(kind: str, low: float | None, high: float | None, above: float | None, below: float | None) -> str:
    bounds = []
    if low is not None:
        bounds.append(f"at least {low}")
    if above is not None:
        bounds.append(f"above {above}")
    if high is not None:
        bounds.append(f"at most {high}")
    if below is not None:
        bounds.append(f"below {below}")
    return f"{kind} {' and '.join(bounds)}".rstrip()


def _dtype_fits(given: torch.dtype, allowed: Any) -> bool:
    import torch

    if isinstance(allowed, torch.dtype):
        return given == allowed
    if not isinstance(allowed, str):
        return given in allowed
    if allowed == "any":
        return True
    if allowed == "floating":
        return given.is_floating_point
    if allowed == "complex":
        return given.is_complex
    if allowed == "bool":
        return given == torch.bool
    return not (given.is_floating_point or given.is_complex or given == torch.bool)


def _dtypes(allowed: Any) -> str:
    if isinstance(allowed, str):
        kinds = {
            "floating": "floating-point numbers",
            "integer": "whole numbers",
            "bool": "bools",
            "complex": "complex numbers",
        }
        return kinds.get(allowed, "anything")
    known = [allowed] if not isinstance(allowed, Collection) else list(allowed)
    return " or ".join(str(dtype) for dtype in known)


def _shape_fits(given: tuple[int, ...], wanted: Sequence[int | str]) -> bool:
    if wanted and wanted[0] == "...":
        wanted = wanted[1:]
        given = given[len(given) - len(wanted) :] if len(given) >= len(wanted) else ()
        if not given and wanted:
            return False
    if len(given) != len(wanted):
        return False
    return all(isinstance(want, str) or want == have for want, have in zip(wanted, given, strict=True))

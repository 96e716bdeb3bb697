"""The Open Inference Protocol, version 2 (KServe, Triton): requests and answers as JSON, and with the extension for binary tensors.

With the extension the body is the JSON, whose length is in the header `Inference-Header-Content-Length`, and behind it the tensors'
bytes in order, each as long as its `parameters.binary_data_size` says. An element of a BYTES tensor is a little-endian uint32 length and so
many bytes; in plain JSON, which cannot hold bytes, it is base64 here (our choice: the protocol says text).
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

HEADER = "Inference-Header-Content-Length"
DTYPES = {
    "BOOL": "bool", "UINT8": "uint8", "UINT16": "uint16", "UINT32": "uint32", "UINT64": "uint64", "INT8": "int8", "INT16": "int16",
    "INT32": "int32", "INT64": "int64", "FP16": "float16", "FP32": "float32", "FP64": "float64",
}  # fmt: skip
NAMES = {name: kind for kind, name in DTYPES.items()}
MOST = 1 << 26  # bytes of a body
MOST_NUMBERS = 1 << 26  # of a tensor

Tensor = np.ndarray | list[bytes]
"""A tensor of numbers, or of bytes (flat)."""


class Malformed(ValueError):
    """What the other side sent is not of the protocol."""


@dataclass
class Call:
    """An inference request, or its answer: tensors by name. `binary` says whether a request wants its answer's tensors as bytes."""

    tensors: dict[str, Tensor]
    id: str = ""
    binary: bool = False
    names: dict[str, str] = field(default_factory=dict)  # model_name and model_version of an answer


def written(call: Call, *, binary: bool, answer: bool = False) -> tuple[bytes, dict[str, str]]:
    """A request, or with `answer` an answer, as a body and the headers that go with it.

    >>> body, headers = written(Call({"x": np.ones(2, np.float32)}, "7"), binary=True)
    >>> read(body, headers).tensors["x"].tolist()
    [1.0, 1.0]
    """
    described, parts = [], []
    for name, tensor in call.tensors.items():
        entry, data = _described(name, tensor)
        if binary:
            entry["parameters"] = {"binary_data_size": len(data)}
            parts.append(data)
        elif isinstance(tensor, np.ndarray):
            entry["data"] = tensor.ravel().tolist()
        else:
            entry["data"] = [base64.b64encode(one).decode() for one in tensor]
        described.append(entry)
    document: dict[str, Any] = {**({"id": call.id} if call.id else {}), **call.names}
    document["outputs" if answer else "inputs"] = described
    if call.binary and not answer:
        document["parameters"] = {"binary_data_output": True}
    try:
        head = json.dumps(document, allow_nan=False).encode()
    except ValueError:
        raise ValueError("tensors must be finite where they are sent as JSON: send them as bytes") from None
    if not binary:
        return head, {"Content-Type": "application/json"}
    return b"".join([head, *parts]), {"Content-Type": "application/octet-stream", HEADER: str(len(head))}


def _described(name: str, tensor: Tensor) -> tuple[dict[str, Any], bytes]:
    if isinstance(tensor, np.ndarray):
        if tensor.dtype.name not in NAMES:
            raise TypeError(f"tensor {name!r} must hold {', '.join(NAMES)}, got {tensor.dtype}")
        data = np.ascontiguousarray(tensor).astype(tensor.dtype.newbyteorder("<"), copy=False).tobytes()
        return {"name": name, "shape": list(tensor.shape), "datatype": NAMES[tensor.dtype.name]}, data
    data = b"".join(struct.pack("<I", len(one)) + one for one in tensor)
    return {"name": name, "shape": [len(tensor)], "datatype": "BYTES"}, data


def read(body: bytes, headers: Mapping[str, str], *, answer: bool = False) -> Call:
    """The request, or the answer, in a body. `headers` are looked up without regard to case. Raises Malformed for anything else."""
    length = {name.lower(): value for name, value in headers.items()}.get(HEADER.lower())
    head, rest = body, b""
    if length is not None:
        if not length.isascii() or not length.isdigit() or len(length) > 12 or int(length) > len(body):
            raise Malformed(f"{HEADER} must be at most the body's length, {len(body)}, got {length[:40]!r}")
        head, rest = body[: int(length)], body[int(length) :]
    try:
        document = json.loads(head)
    except (ValueError, RecursionError):
        raise Malformed("the body must be JSON") from None
    kind = "outputs" if answer else "inputs"
    if not isinstance(document, dict) or not isinstance(document.get(kind), list) or not document[kind]:
        raise Malformed(f"the body must be a JSON object with {kind}")
    tensors: dict[str, Tensor] = {}
    for entry in document[kind]:
        name, tensor, rest = _tensor(entry, rest)
        if name in tensors:
            raise Malformed(f"there must be one tensor {name!r}, got two")
        tensors[name] = tensor
    if rest:
        raise Malformed(f"{len(rest)} bytes follow the tensors")
    given = document.get("id", "")
    if not isinstance(given, str):
        raise Malformed("id must be a text")
    parameters = document.get("parameters") or {}
    wants = isinstance(parameters, dict) and parameters.get("binary_data_output") is True
    names = {key: str(document[key]) for key in ("model_name", "model_version") if key in document}
    return Call(tensors, given, wants, names)


def _tensor(entry: Any, rest: bytes) -> tuple[str, Tensor, bytes]:
    """A tensor's name, the tensor, and the bytes behind it."""
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise Malformed("a tensor must be an object with a name")
    name, shape, kind = entry["name"], entry.get("shape"), entry.get("datatype")
    if not isinstance(shape, list) or not all(type(side) is int and 0 <= side <= MOST_NUMBERS for side in shape):
        raise Malformed(f"shape of {name!r} must be a list of whole numbers")
    count = math.prod(shape)
    if count > MOST_NUMBERS:
        raise Malformed(f"{name!r} must have at most {MOST_NUMBERS} elements, got {count}")
    if kind != "BYTES" and kind not in DTYPES:
        raise Malformed(f"datatype of {name!r} must be BYTES or one of {', '.join(DTYPES)}")
    parameters = entry.get("parameters") or {}
    size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
    if size is None:
        return name, _from_json(name, entry.get("data"), shape, count, kind), rest
    if type(size) is not int or not 0 <= size <= len(rest):
        raise Malformed(
            f"binary_data_size of {name!r} must be at most the {len(rest)} bytes that are left, got {size!r}"
        )
    data, rest = rest[:size], rest[size:]
    if kind == "BYTES":
        return name, _elements(name, data, count), rest
    dtype = np.dtype(DTYPES[kind]).newbyteorder("<")
    if size != count * dtype.itemsize:
        raise Malformed(f"{name!r} of shape {shape} must have {count * dtype.itemsize} bytes, got {size}")
    return name, np.frombuffer(data, dtype).reshape(shape), rest


def _elements(name: str, data: bytes, count: int) -> list[bytes]:
    found, place = [], 0
    while place < len(data):
        if place + 4 > len(data):
            raise Malformed(f"an element of {name!r} is cut off")
        (size,) = struct.unpack_from("<I", data, place)
        place += 4 + size
        if place > len(data):
            raise Malformed(f"an element of {name!r} is cut off")
        found.append(data[place - size : place])
    if len(found) != count:
        raise Malformed(f"{name!r} must have {count} elements, got {len(found)}")
    return found


def _from_json(name: str, data: Any, shape: Sequence[int], count: int, kind: str) -> Tensor:
    if not isinstance(data, list):
        raise Malformed(f"data of {name!r} must be a list")
    try:
        if kind == "BYTES":
            if len(data) != count:
                raise Malformed(f"{name!r} must have {count} elements, got {len(data)}")
            return [base64.b64decode(one, validate=True) for one in data]
        wanted = np.dtype(DTYPES[kind])
        given = np.array(data)
        if given.dtype.kind not in ("b" if wanted.kind == "b" else "iu" if wanted.kind in "iu" else "fiu"):
            raise Malformed(f"data of {name!r} must be numbers of {kind}")
        with np.errstate(over="ignore"):
            made = given.astype(wanted)
        if not np.isfinite(made).all() or wanted.kind in "iu" and not np.array_equal(made, given):
            raise Malformed(f"data of {name!r} must be numbers of {kind}, some lie outside")
        return made.reshape(shape)
    except Malformed:
        raise
    except (ValueError, TypeError, OverflowError, binascii.Error, RecursionError):
        raise Malformed(f"data of {name!r} must be {count} elements of {kind}") from None

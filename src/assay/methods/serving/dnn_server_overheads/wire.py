"""Messages as bytes that say themselves what they are: a header, a small JSON object, and an array or plain bytes.

Nothing is unpickled, whatever a peer sends: numbers have one of a few types, sizes are bounded, and two checksums find what was cut or
turned. The layout: 4 bytes magic, version, dtype code, dimensions, 0; uint32 length of the JSON, uint64 length of the data, uint32
CRC-32 of all that follows the head, uint32 CRC-32 of the head up to here, so that a turned length is not taken for a message that was
cut off; the shape as uint32 each; the JSON; the data. Little endian.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

FIELDS, CHECK = struct.Struct("<4sBBBBIQI"), struct.Struct("<I")
HEAD_SIZE = FIELDS.size + CHECK.size
MAGIC, VERSION = b"asof", 1
BYTES = 0  # the code of data that is no array
DTYPES = {1: "uint8", 2: "float16", 3: "float32", 4: "int64", 5: "float64"}
CODES = {name: code for code, name in DTYPES.items()}
MOST_JSON, MOST_DATA, MOST_DIMENSIONS, MOST_SIDE = 1 << 16, 1 << 30, 8, (1 << 32) - 1


GUARD = 'a script that starts processes needs the guard if __name__ == "__main__":'


class Broken(ValueError):
    """Bytes that are no message, or not a whole one."""


class CutOff(Broken):
    """The beginning of a message, whose end is not there."""


@dataclass
class Message:
    """A small JSON object, and an array or bytes."""

    meta: dict[str, Any] = field(default_factory=dict)
    data: np.ndarray | bytes = b""


def packed(message: Message) -> bytes:
    """A message as bytes. Raises TypeError for another type or dtype than those of `DTYPES`, ValueError for what is too large.

    >>> unpacked(packed(Message({"id": 3}, np.arange(4, dtype=np.uint8)))).data.tolist()
    [0, 1, 2, 3]
    """
    data, shape, code = message.data, (), BYTES
    if not isinstance(message.meta, dict):
        raise TypeError(f"meta must be a dictionary, got {type(message.meta).__name__}")
    if isinstance(data, np.ndarray):
        if data.dtype.name not in CODES:
            raise TypeError(f"data must hold {', '.join(CODES)}, got {data.dtype}")
        shape, code = data.shape, CODES[data.dtype.name]
        data = np.ascontiguousarray(data).astype(data.dtype.newbyteorder("<"), copy=False).tobytes()
    elif isinstance(data, bytes | bytearray | memoryview):
        data = bytes(data)
    else:
        raise TypeError(f"data must be an array or bytes, got {type(data).__name__}")
    meta = json.dumps(message.meta, allow_nan=False).encode()
    if (
        len(meta) > MOST_JSON
        or len(data) > MOST_DATA
        or len(shape) > MOST_DIMENSIONS
        or max(shape, default=0) > MOST_SIDE
    ):
        raise ValueError(
            f"a message must have at most {MOST_JSON} bytes of JSON, {MOST_DATA} of data, {MOST_DIMENSIONS} dimensions"
        )
    rest = struct.pack(f"<{len(shape)}I", *shape) + meta + data
    head = FIELDS.pack(MAGIC, VERSION, code, len(shape), 0, len(meta), len(data), zlib.crc32(rest))
    return head + CHECK.pack(zlib.crc32(head)) + rest


def read(take: Callable[[int], bytes]) -> Message:
    """The next message of a stream; `take(n)` gives exactly n bytes of it. Raises Broken for what is none, and what `take` raises."""
    head = take(HEAD_SIZE)
    if len(head) < HEAD_SIZE:
        raise CutOff("a message is cut off")
    magic, version, code, dimensions, zero, meta_size, size, crc = FIELDS.unpack_from(head)
    if magic != MAGIC or version != VERSION or zero or (code != BYTES and code not in DTYPES):
        raise Broken("the bytes are no message")
    if zlib.crc32(head[: FIELDS.size]) != CHECK.unpack_from(head, FIELDS.size)[0]:
        raise Broken("a message's head was damaged: its checksum is wrong")
    if meta_size > MOST_JSON or size > MOST_DATA or dimensions > MOST_DIMENSIONS:
        raise Broken("a message is too large")
    rest = take(4 * dimensions + meta_size + size)
    if len(rest) < 4 * dimensions + meta_size + size:
        raise CutOff("a message is cut off")
    if zlib.crc32(rest) != crc:
        raise Broken("a message was damaged: its checksum is wrong")
    shape = struct.unpack_from(f"<{dimensions}I", rest)
    try:
        meta = json.loads(rest[4 * dimensions : 4 * dimensions + meta_size])
    except (ValueError, RecursionError):
        raise Broken("a message's JSON cannot be read") from None
    if not isinstance(meta, dict):
        raise Broken("a message's JSON is no object")
    data = rest[4 * dimensions + meta_size :]
    if code == BYTES:
        return Message(meta, data)
    dtype = np.dtype(DTYPES[code]).newbyteorder("<")
    if math.prod(shape) * dtype.itemsize != size:
        raise Broken(f"a message of shape {shape} has {size} bytes")
    return Message(meta, np.frombuffer(data, dtype).reshape(shape))


def unpacked(data: bytes) -> Message:
    """The message in these bytes and nothing else. Raises Broken for anything else."""
    place = 0

    def take(count: int) -> bytes:
        nonlocal place
        place += count
        return data[place - count : place]

    message = read(take)
    if place != len(data):
        raise Broken(f"{len(data) - place} bytes follow the message")
    return message


def size_of(data: np.ndarray | bytes) -> int:
    """Bytes of a message's data."""
    return data.nbytes if isinstance(data, np.ndarray) else len(data)

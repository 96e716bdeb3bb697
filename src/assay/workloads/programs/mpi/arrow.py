"""Columns of text from a file as `datasets` writes it (Arrow's stream format), without a library for it."""

from __future__ import annotations

import struct
from typing import Any

RECORD_BATCH = 3


def text_columns(data: bytes) -> list[list[str]]:
    """The columns of a stream of record batches in which every column is text (utf8, no compression), in order.

    Raises ValueError for data that is cut off or holds anything else. Not for anything but this: pyarrow reads the rest.
    """
    at = 0
    columns: list[list[str]] = []
    while at + 8 <= len(data):
        mark, size = struct.unpack_from("<Ii", data, at)
        if mark != 0xFFFFFFFF:
            raise ValueError(f"data must be a stream of Arrow, got {data[at : at + 8]!r} at byte {at}")
        if size == 0:
            break
        message = _Table(data[at + 8 : at + 8 + size])
        at += 8 + size
        if message.number(1, "B") == RECORD_BATCH:
            new = _texts(message.table(2), data, at)
            columns = [have + more for have, more in zip(columns, new, strict=True)] if columns else new
        at += message.number(3, "q")
    if at > len(data) or not columns:
        raise ValueError("data must hold record batches, and is cut off")
    return columns


class _Table:
    """A table of FlatBuffers: fields are found through a list of offsets that it points back to."""

    def __init__(self, data: bytes, at: int | None = None) -> None:
        self.data = data
        self.at = struct.unpack_from("<I", data)[0] if at is None else at

    def _field(self, number: int) -> int:
        fields = self.at - int(struct.unpack_from("<i", self.data, self.at)[0])
        place = 4 + 2 * number
        if place >= struct.unpack_from("<H", self.data, fields)[0]:
            return 0
        offset = int(struct.unpack_from("<H", self.data, fields + place)[0])
        return self.at + offset if offset else 0

    def number(self, field: int, form: str) -> int:
        """A number, 0 where it is not there."""
        return int(struct.unpack_from(f"<{form}", self.data, at)[0]) if (at := self._field(field)) else 0

    def target(self, field: int) -> int:
        """Where a field points to."""
        at = self._field(field)
        return at + int(struct.unpack_from("<I", self.data, at)[0])

    def table(self, field: int) -> _Table:
        return _Table(self.data, self.target(field))


def _texts(batch: _Table, data: bytes, body: int) -> list[list[str]]:
    """The columns of a batch: three buffers each, of which the second has offsets and the third the text."""
    rows, at = batch.number(0, "q"), batch.target(2)
    many = struct.unpack_from("<I", batch.data, at)[0]
    buffers: list[Any] = [struct.unpack_from("<qq", batch.data, at + 4 + 16 * n) for n in range(many)]
    if many % 3:
        raise ValueError(f"data must hold columns of text only, got {many} buffers in a batch")
    columns = []
    for (_, _), (offsets, _), (text, _) in zip(*[iter(buffers)] * 3, strict=True):
        ends = struct.unpack_from(f"<{rows + 1}i", data, body + offsets)
        start = body + text
        columns.append(
            [data[start + a : start + b].decode("utf-8", "replace") for a, b in zip(ends, ends[1:], strict=False)]
        )
    return columns

"""Constraints with the interface of `assay.methods.inference.awrs`, for tests of the server: each allows one text only.

`json_schema` allows the smallest text its schema describes; `json_object` allows `{}`.
"""

from __future__ import annotations

import json
from typing import Any

from torch import Tensor


class One:
    """Allows one text."""

    def __init__(self, text: str) -> None:
        self.text = text.encode()

    def prefix(self, text: bytes) -> bool:
        return self.text.startswith(text)

    def complete(self, text: bytes) -> bool:
        return self.text == text


def json_object() -> One:
    return One("{}")


def json_schema(schema: Any) -> One:
    return One(json.dumps(_least(schema)))


def _least(schema: Any) -> Any:
    if "enum" in schema:
        return schema["enum"][0]
    if "anyOf" in schema:
        return _least(schema["anyOf"][0])
    kind = schema.get("type")
    if kind == "object":
        return {name: _least(one) for name, one in schema.get("properties", {}).items()}
    least = {"boolean": True, "integer": 0, "number": 0, "string": "", "array": [], "null": None}
    if kind not in least:
        raise ValueError(f"type must be one of {', '.join(least)}, got {kind!r}")
    return least[kind]


class TokenBytes:
    """The bytes of the tokens of a byte-level tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in plain]
        letters = {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}
        special = set(tokenizer.all_special_ids)
        self._bytes = [
            token.encode() if number in special else bytes(letters[letter] for letter in token)
            for number, token in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
        ]

    def __len__(self) -> int:
        return len(self._bytes)

    def of(self, token: int) -> bytes:
        return self._bytes[token]


class Chooser:
    """The best token that keeps the constraint, and an end once the text is complete."""

    def __init__(self, constraint: Any, token_bytes: TokenBytes, ends: Any, **options: Any) -> None:
        self.constraint, self.token_bytes, self.ends = constraint, token_bytes, ends

    def __call__(self, logits: Tensor, made: list[int]) -> int:
        text = b"".join(map(self.token_bytes.of, made))
        if self.constraint.complete(text):
            return min(self.ends)
        for token in logits.argsort(descending=True).tolist():
            if token not in self.ends and token < len(self.token_bytes):
                data = self.token_bytes.of(token)
                if data and self.constraint.prefix(text + data):
                    return int(token)
        raise ValueError("no token goes on")

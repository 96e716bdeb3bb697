"""The work a model is tuned for: the bundled text, or the user's own prompts from a JSON-lines file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from assay import checks
from assay.errors import InputError
from assay.workloads.text import heldout_windows, long_prompt, start_tokens, with_start

NEW_TOKENS = 64  # generated per prompt where the user does not say; our choice
_MAX_LINE = 16 << 20  # bytes
_MAX_SHOWN = 20  # bad lines named in one message
_FEWEST_WINDOWS = 4  # below this an interval says nothing; our choice


@dataclass(frozen=True)
class TextWorkload:
    """Prompts as token lists, each with its expected completion (token list, empty where there is none), in order of arrival.

    A prompt starts with the tokens its tokenizer puts before a text; a completion has none. Joined, they are what the model reads.
    `new_tokens` are generated per prompt; `bundled` tells assay's own text from the user's.
    """

    name: str
    prompts: list[list[int]]
    completions: list[list[int]]
    new_tokens: int
    bundled: bool = False


@dataclass(frozen=True)
class QualityText:
    """Windows to measure quality on, int64 (n, window), and one line that says where they come from."""

    windows: torch.Tensor
    source: str


def bundled_workload(
    tokenizer: Any, prompt_tokens: int, *, new_tokens: int = NEW_TOKENS, n: int = 8, seed: int = 0
) -> TextWorkload:
    """`n` prompts of exactly `prompt_tokens` tokens of real text, code and English in turn.

    Raises ValueError for counts below 1 and more tokens than the text has, TypeError for counts that are not whole numbers.
    """
    new_tokens, n, seed = _count("new_tokens", new_tokens), _count("n", n), checks.whole("seed", seed)
    prompts = [
        long_prompt(tokenizer, prompt_tokens, kind="english" if i % 2 else "code", seed=seed + i)[0].tolist()
        for i in range(n)
    ]
    return TextWorkload(
        f"bundled text, {prompt_tokens} tokens", prompts, [[] for _ in prompts], new_tokens, bundled=True
    )


def read_workload(path: Path | str, tokenizer: Any, *, context: int, new_tokens: int = NEW_TOKENS) -> TextWorkload:
    """Read a JSON-lines file of {"prompt": str, "completion": str (optional)}, one object a line; blank lines are skipped.

    A prompt and what follows it (its completion or `new_tokens`, whichever is longer) must fit into the model's `context`
    tokens. Raises InputError that names every bad line (at most 20) by its number and what is wrong with it; also for a file
    that is missing or has no prompts. The whole file is refused when one line is bad. ValueError and TypeError for bad counts.
    """
    context, new_tokens = _count("context", context), _count("new_tokens", new_tokens)
    start = start_tokens(tokenizer)
    prompts, completions, bad = [], [], []
    for number, line in _lines(Path(path)):
        try:
            prompt, completion = _parse(line)
            tokens, after = _tokens(tokenizer, prompt, completion)
            if not tokens:
                raise _BadLine("prompt gives no tokens")
            tokens = with_start(start, tokens)
            room = context - len(tokens)
            if room < max(len(after), new_tokens):
                follows = f"a completion of {len(after)}" if len(after) > new_tokens else f"{new_tokens} new tokens"
                raise _BadLine(
                    f"too long: a prompt of {len(tokens)} tokens and {follows}, but the model's context is {context}"
                )
            prompts.append(tokens)
            completions.append(after)
        except _BadLine as error:
            bad.append(f"line {number}: {error}")
    if bad:
        more = [f"and {len(bad) - _MAX_SHOWN} more"] if len(bad) > _MAX_SHOWN else []
        raise InputError(f"{path}: " + "\n  ".join([*bad[:_MAX_SHOWN], *more]))
    if not prompts:
        raise InputError(f'{path}: empty; expected one {{"prompt": "..."}} a line')
    return TextWorkload(Path(path).name, prompts, completions, new_tokens)


def quality_windows(workload: TextWorkload, tokenizer: Any, *, window: int = 1024, n: int = 8) -> QualityText:
    """Windows of the user's own prompts and completions when these fill at least four; else bundled held-out text.

    Each window begins with what the tokenizer puts before a text; within, the documents follow each other with its end of
    sequence between them. The prompts of a bundled workload are not used: held-out text is. Raises ValueError for `n` < 1 or
    `window` < 2, TypeError for anything but a whole number.
    """
    start, end = start_tokens(tokenizer), tokenizer.eos_token_id
    n, window = _count("n", n), checks.whole("window", window, low=max(2, len(start) + 1))
    if workload.bundled:
        return QualityText(heldout_windows(tokenizer, window=window, n=n), "bundled held-out text")
    fresh = window - len(start)
    stream: list[int] = []
    for prompt, completion in zip(workload.prompts, workload.completions, strict=True):
        document = [*(prompt[len(start) :] if prompt[: len(start)] == start else prompt), *completion]
        stream += document if end is None or document[-1:] == [end] else [*document, end]
    count, fewest = min(n, len(stream) // fresh), min(n, _FEWEST_WINDOWS)
    if count < fewest:
        reason = f"{workload.name} has {len(stream)} tokens, {fewest} windows of {window} need {fewest * fresh}"
        return QualityText(heldout_windows(tokenizer, window=window, n=n), f"bundled held-out text: {reason}")
    step = len(stream) // count
    places = [i * step for i in range(count)]
    if start:  # where the user's own text has it a window begins one token sooner, so that it is not there twice
        places = [place - (place > 0 and stream[place : place + len(start)] == start) for place in places]
    rows = [start + stream[place : place + fresh] for place in places]
    return QualityText(torch.tensor(rows), f"{count} windows of {window} tokens of {workload.name}")


class _BadLine(Exception):
    pass


def _count(name: str, value: Any) -> int:
    return checks.whole(name, value, low=1)


def _tokens(tokenizer: Any, prompt: str, completion: str) -> tuple[list[int], list[int]]:
    """Bare tokens of a prompt and of what follows it.

    The completion is tokenised together with its prompt, unless a token then crosses their border; on its own it would start with
    the space that sentencepiece puts before every text.
    """
    texts = [prompt, prompt + completion, completion] if completion else [prompt]
    before, *rest = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    if not rest:
        return before, []
    whole, alone = rest
    return before, whole[len(before) :] if whole[: len(before)] == before else alone


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines that are not blank; lines over the limit are cut, so that no file can fill the memory."""
    try:
        with open(path, "rb") as file:
            number = 0
            while line := file.readline(_MAX_LINE + 1):
                number += 1
                whole = len(line) <= _MAX_LINE
                while not whole and not line.endswith(b"\n") and (rest := file.readline(_MAX_LINE)):
                    whole = rest.endswith(b"\n")
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield number, line
    except FileNotFoundError:
        raise InputError(f"{path}: no such workload file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise InputError(f"{path}: cannot be read ({error})") from None


def _parse(raw: bytes) -> tuple[str, str]:
    """Prompt and completion ("" if none) of one line."""
    if len(raw) > _MAX_LINE:
        raise _BadLine(f"longer than {_MAX_LINE >> 20} MiB")
    try:
        record = json.loads(raw.decode("utf-8"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise _BadLine(f"not UTF-8 (byte {error.start + 1})") from None
    except RecursionError:
        raise _BadLine("not JSON that can be read: nested too deeply") from None
    except json.JSONDecodeError as error:
        raise _BadLine(f"not JSON ({error.msg}, character {error.pos + 1})") from None
    except ValueError:
        raise _BadLine("not JSON that can be read: a number is too long") from None
    if not isinstance(record, dict):
        raise _BadLine(f'not an object but {_kind(record)}; expected {{"prompt": "..."}}')
    if unknown := sorted(set(record) - {"prompt", "completion"}):
        raise _BadLine(f"unknown key {unknown[0][:40]!r}; allowed: prompt, completion")
    if "prompt" not in record:
        raise _BadLine("prompt is missing")
    for key, value in record.items():
        if not isinstance(value, str):
            raise _BadLine(f"{key} must be a string, not {_kind(value)}")
        if not value.isprintable() and any("\ud800" <= character <= "\udfff" for character in value):
            raise _BadLine(f"{key} holds half of a surrogate pair, which no text has")
    if not record["prompt"].strip():
        raise _BadLine("prompt is empty")
    return record["prompt"], record.get("completion", "")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise _BadLine("a key is given twice")
    return record


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")

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
from assay.workloads.text import HALVES, Half, document_windows, long_prompt, start_tokens, with_start

NEW_TOKENS = 64  # generated per prompt where the user does not say; our choice
_MAX_LINE = 16 << 20  # bytes
_MAX_SHOWN = 20  # bad lines named in one message
_FEWEST: dict[Half, int] = {"search": 4, "proof": 8}  # windows, below which an interval says nothing; our choice


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
    for number, line in numbered_lines(Path(path), "workload"):
        try:
            prompt, completion = _parse(line)
            tokens, after = _tokens(tokenizer, prompt, completion)
            if not tokens:
                raise BadLine("prompt gives no tokens")
            tokens = with_start(start, tokens)
            room = context - len(tokens)
            if room < max(len(after), new_tokens):
                follows = f"a completion of {len(after)}" if len(after) > new_tokens else f"{new_tokens} new tokens"
                raise BadLine(
                    f"too long: a prompt of {len(tokens)} tokens and {follows}, but the model's context is {context}"
                )
            prompts.append(tokens)
            completions.append(after)
        except BadLine as error:
            bad.append(f"line {number}: {error}")
    refuse(path, bad)
    if not prompts:
        raise InputError(f'{path}: empty; expected one {{"prompt": "..."}} a line')
    return TextWorkload(Path(path).name, prompts, completions, new_tokens)


def quality_windows(
    workload: TextWorkload, tokenizer: Any, half: Half = "search", *, window: int = 1024, n: int = 8
) -> QualityText:
    """Windows of the user's own prompts and completions when these fill enough of them; else bundled held-out text.

    A prompt with its completion is a document. Of the distinct ones, in the file's order, those in odd places are the search's and
    the others the proof's. No two windows share a document: a long one gives one window, short ones follow each other with the
    end of sequence between them. Each window begins with what the tokenizer puts before a text. Enough are `n` or four for the
    search, `n` or eight for the proof. The prompts of a bundled workload are not used: `document_windows` is.
    Raises ValueError for `n` < 1, `window` < 2 or another half, TypeError for anything but a whole number.
    """
    start, end = start_tokens(tokenizer), tokenizer.eos_token_id
    n, window = _count("n", n), checks.whole("window", window, low=max(2, len(start) + 1))
    checks.choice("half", half, HALVES)
    if workload.bundled:
        return QualityText(
            document_windows(tokenizer, half, window=window, n=n), f"bundled held-out text of the {half}"
        )
    fresh = window - len(start)
    documents: dict[tuple[int, ...], None] = {}  # a set that keeps its order
    for prompt, completion in zip(workload.prompts, workload.completions, strict=True):
        document = [*(prompt[len(start) :] if prompt[: len(start)] == start else prompt), *completion]
        documents[tuple(document if end is None or document[-1:] == [end] else [*document, end])] = None
    own = list(documents)[HALVES.index(half) :: 2]
    rows, row = [], list[int]()
    for tokens in own:
        row += tokens
        if len(row) >= fresh:
            rows.append(start + row[:fresh])
            row = []
    fewest = min(n, _FEWEST[half])
    if len(rows) < fewest:
        reason = (
            f"the {half}'s half of {workload.name} has {sum(map(len, own))} tokens in {len(own)} prompts, "
            f"which fill {len(rows)} windows of {window} of their own, not {fewest}"
        )
        bundled = document_windows(tokenizer, half, window=window, n=n)
        return QualityText(bundled, f"bundled held-out text of the {half}: {reason}")
    rows = rows[:n]
    return QualityText(
        torch.tensor(rows), f"{len(rows)} windows of {window} tokens of {workload.name}, the {half}'s half"
    )


class BadLine(Exception):
    """What is wrong with one line of a user's file."""


def refuse(path: Path | str, bad: list[str]) -> None:
    """Raise InputError that lists the bad lines, at most 20 of them, if there are any."""
    if bad:
        more = [f"and {len(bad) - _MAX_SHOWN} more"] if len(bad) > _MAX_SHOWN else []
        raise InputError(f"{path}: " + "\n  ".join([*bad[:_MAX_SHOWN], *more]))


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


def numbered_lines(path: Path, kind: str) -> Iterator[tuple[int, bytes]]:
    """Numbered lines that are not blank; lines over the limit are cut, so that no file can fill the memory.

    Raises InputError for a file that cannot be read; `kind` says what it should have been.
    """
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
        raise InputError(f"{path}: no such {kind} file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise InputError(f"{path}: cannot be read ({error})") from None


def _parse(raw: bytes) -> tuple[str, str]:
    """Prompt and completion ("" if none) of one line."""
    record = read_object(raw, ("prompt", "completion"))
    if "prompt" not in record:
        raise BadLine("prompt is missing")
    found = {key: text_of(key, value) for key, value in record.items()}
    if not found["prompt"].strip():
        raise BadLine("prompt is empty")
    return found["prompt"], found.get("completion", "")


def read_object(raw: bytes, allowed: tuple[str, ...]) -> dict[str, Any]:
    """The JSON object of one line. Raises BadLine for anything else, and for keys that are not `allowed` or given twice."""
    if len(raw) > _MAX_LINE:
        raise BadLine(f"longer than {_MAX_LINE >> 20} MiB")
    try:
        record = json.loads(raw.decode("utf-8"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise BadLine(f"not UTF-8 (byte {error.start + 1})") from None
    except RecursionError:
        raise BadLine("not JSON that can be read: nested too deeply") from None
    except json.JSONDecodeError as error:
        raise BadLine(f"not JSON ({error.msg}, character {error.pos + 1})") from None
    except ValueError:
        raise BadLine("not JSON that can be read: a number is too long") from None
    if not isinstance(record, dict):
        raise BadLine(f'not an object but {_kind(record)}; expected {{"prompt": "..."}}')
    if unknown := sorted(set(record) - set(allowed)):
        raise BadLine(f"unknown key {unknown[0][:40]!r}; allowed: {', '.join(allowed)}")
    return record


def text_of(key: str, value: Any) -> str:
    """`value` if it is a string that can be text; raises BadLine naming the key."""
    if not isinstance(value, str):
        raise BadLine(f"{key} must be a string, not {_kind(value)}")
    if not value.isprintable() and any("\ud800" <= character <= "\udfff" for character in value):
        raise BadLine(f"{key} holds half of a surrogate pair, which no text has")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise BadLine("a key is given twice")
    return record


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")

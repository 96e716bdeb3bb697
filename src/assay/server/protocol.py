"""The wire format: a request's JSON checked into an `Ask`, and the shapes of answers, chunks and errors.

A field that would change the answer but is not supported is refused, never ignored; null means that the field was not given.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from assay import checks

T = TypeVar("T")

MOST_STOPS = 4
STOP_CHARACTERS = 1_000
MOST_PROMPTS = 32
GREEDY_BELOW = 1e-5  # a temperature under which sampling is the most probable token, and dividing by it may overflow

# fields that change nothing in the answer
IGNORED = {
    "metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier",
    "store", "user",
}  # fmt: skip

# fields that are not done, with the values that ask for nothing
NOT_DONE: dict[str, list[Any]] = {
    "audio": [],
    "best_of": [1],
    "echo": [False],
    "frequency_penalty": [0, 0.0],
    "function_call": ["none", "auto"],
    "functions": [[]],
    "logit_bias": [{}],
    "logprobs": [False],
    "min_p": [0, 0.0],
    "modalities": [["text"]],
    "n": [1],
    "prediction": [],
    "presence_penalty": [0, 0.0],
    "reasoning_effort": [],
    "repetition_penalty": [1, 1.0],
    "response_format": [{"type": "text"}],
    "suffix": [""],
    "tool_choice": ["none", "auto"],
    "tools": [[]],
    "top_k": [0, -1],
    "top_logprobs": [0],
    "verbosity": [],
    "web_search_options": [],
}

ROLES = ("system", "developer", "user", "assistant")


class ApiError(Exception):
    """An error in the form of OpenAI's API: a status, a message, the field it is about, and a code for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers or {}

    def body(self) -> dict[str, Any]:
        """The JSON of the error."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Ask:
    """A checked request: what to continue, how tokens are chosen, when to stop, and how to answer.

    `prompts` holds text or token ids, one answer each; in a chat there are `messages` instead. `new_tokens` is None if the
    request leaves it open. Greedy when `temperature` is 0.
    """

    chat: bool
    prompts: list[str | list[int]] = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)
    new_tokens: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stops: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False


# ---- reading a request ----------------------------------------------------------------------------------------------------


def read(body: bytes, *, chat: bool, served: str) -> Ask:
    """The request in `body`, for the model named `served`. Raises ApiError, which names the field, for anything else."""
    try:
        return _ask(_document(body), chat, served)
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None


def _document(body: bytes) -> dict[str, Any]:
    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for name, value in pairs:
            if name in made:
                raise ValueError(f"{checks.shown(name)} is given twice")
            made[name] = value
        return made

    try:
        document = json.loads(body.decode(), parse_constant=no_constant, object_pairs_hook=no_duplicates)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise ApiError(400, f"the body must be a JSON object, got {checks.shown(document)}")
    return document


def _ask(document: dict[str, Any], chat: bool, served: str) -> Ask:
    given = {name: value for name, value in document.items() if value is not None}

    def take(name: str, check: Callable[..., T], default: Any, **limits: Any) -> Any:
        return checked(name, check, given.pop(name), **limits) if name in given else default

    model = take("model", _text, "")
    if model not in ("", served):
        message = f"no model {checks.shown(model)} here; this server has {served!r}"
        raise ApiError(404, message, param="model", code="model_not_found")
    new_tokens = take("max_tokens", checks.whole, None, low=1)
    if chat and "max_completion_tokens" in given:
        if new_tokens is not None:
            raise ApiError(400, "give max_tokens or max_completion_tokens, not both", param="max_completion_tokens")
        new_tokens = take("max_completion_tokens", checks.whole, None, low=1)
    stream = take("stream", checks.flag, False)
    temperature = take("temperature", checks.number, 0.0, low=0, high=2)
    top_p = take("top_p", checks.number, 1.0, low=0, high=1)
    ask = Ask(
        chat=chat,
        prompts=[] if chat else checked("prompt", _prompts, given.pop("prompt", None)),
        messages=_messages(given.pop("messages", None)) if chat else [],
        new_tokens=new_tokens,
        min_tokens=take("min_tokens", checks.whole, 0, low=0),
        ignore_eos=take("ignore_eos", checks.flag, False),
        temperature=0.0 if temperature < GREEDY_BELOW or top_p == 0 else temperature,
        top_p=top_p,
        seed=take("seed", checks.whole, None, low=-(2**63), high=2**64 - 1),
        stops=take("stop", _stops, ()),
        stream=stream,
        include_usage=_include_usage(given.pop("stream_options", None), stream),
    )
    for name, value in given.items():
        if name in IGNORED or any(type(value) is type(none) and value == none for none in NOT_DONE.get(name, ())):
            continue
        known = "is not supported here" if name in NOT_DONE else "is not a parameter of this endpoint"
        raise ApiError(400, f"{checks.shown(name)} {known}", param=_printable(name), code="unsupported_parameter")
    return ask


def checked(name: str, check: Callable[..., T], value: Any, **limits: Any) -> T:
    """`check(name, value, **limits)`, its TypeError or ValueError as a 400 that names the field."""
    try:
        return check(name, value, **limits)
    except (TypeError, ValueError) as error:
        raise ApiError(400, str(error), param=name) from None


def _printable(text: str) -> str:
    return text[:100].encode("ascii", "backslashreplace").decode()


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {checks.shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} holds half a surrogate pair at character {error.start}") from None
    return value


def _stops(name: str, value: Any) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) else value
    allowed = f"a string or a list of up to {MOST_STOPS}, each of 1 to {STOP_CHARACTERS} characters"
    if not isinstance(values, list):
        raise TypeError(f"{name} must be {allowed}, got {checks.shown(value)}")
    if len(values) > MOST_STOPS:
        raise ValueError(f"{name} must be {allowed}, got {len(values)}")
    for stop in values:
        if not 1 <= len(_text(name, stop)) <= STOP_CHARACTERS:
            raise ValueError(f"{name} must be {allowed}, got one of {len(stop)}")
    return tuple(values)


def _prompts(name: str, value: Any) -> list[str | list[int]]:
    """The four forms of OpenAI's `prompt`: text, token ids, or a list of either."""
    allowed = f"a string, a list of token ids, or a list of up to {MOST_PROMPTS} of these"
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise TypeError(f"{name} must be {allowed}, got {checks.shown(value)}")
    if value and all(type(item) is int for item in value):
        value = [value]
    if not 1 <= len(value) <= MOST_PROMPTS:
        raise ValueError(f"{name} must be {allowed}, got {len(value)}")
    for item in value:
        if isinstance(item, list):
            if not all(type(token) is int for token in item):
                raise TypeError(f"{name} must be {allowed}, got {checks.shown(item)}")
        elif not isinstance(item, str):
            raise TypeError(f"{name} must be {allowed}, got {checks.shown(item)}")
        elif not _text(name, item):
            raise ValueError(f"{name} must not be empty")
    return list(value)


def _messages(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise ApiError(
            400, f"messages must be a list of at least one message, got {checks.shown(value)}", param="messages"
        )
    return [_message(f"messages[{i}]", message) for i, message in enumerate(value)]


def _message(where: str, value: Any) -> dict[str, Any]:
    """A turn as chat templates take it: role, content as one string, and a name if there is one. A developer is the system."""
    if not isinstance(value, dict):
        raise ApiError(400, f"{where} must be an object, got {checks.shown(value)}", param=where)
    role = checked(f"{where}.role", checks.choice, value.get("role"), allowed=ROLES)
    turn = {"role": "system" if role == "developer" else role}
    turn["content"] = _content(f"{where}.content", value.get("content"))
    if value.get("name") is not None:
        turn["name"] = checked(f"{where}.name", _text, value["name"])
    for name, extra in value.items():
        if name not in ("role", "content", "name") and extra not in (None, []):
            raise ApiError(
                400, f"{where}: {checks.shown(name)} is not supported here", param=f"{where}.{_printable(name)}"
            )
    return turn


def _content(where: str, value: Any) -> str:
    """Text, or a list of text parts, each on its own line."""
    if not isinstance(value, list):
        return checked(where, _text, value)
    if not value:
        raise ApiError(400, f"{where} must not be an empty list", param=where)
    texts = []
    for i, part in enumerate(value):
        place = f"{where}[{i}]"
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else part
            raise ApiError(400, f"{place} must be a part of type 'text', got {checks.shown(kind)}", param=place)
        texts.append(checked(f"{place}.text", _text, part.get("text")))
    return "\n".join(texts)


def _include_usage(value: Any, stream: bool) -> bool:
    if value is None:
        return False
    if not stream:
        raise ApiError(400, "stream_options goes with stream: true only", param="stream_options")
    if not isinstance(value, dict) or set(value) - {"include_usage", "include_obfuscation"}:
        message = f"stream_options must be an object with include_usage, got {checks.shown(value)}"
        raise ApiError(400, message, param="stream_options")
    wanted = value.get("include_usage")
    return wanted is not None and checked("stream_options.include_usage", checks.flag, wanted)


# ---- writing an answer ----------------------------------------------------------------------------------------------------


def dumps(document: Any) -> bytes:
    """JSON in plain ASCII, so that anything a client sent can be returned to it."""
    return json.dumps(document, allow_nan=False).encode()


def event(document: Any) -> bytes:
    """A server-sent event with a JSON document."""
    return b"data: " + dumps(document) + b"\n\n"


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Tokens read and generated, including the end token."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def choice(
    chat: bool, index: int, text: str, finish: str | None, *, delta: Literal["first", "next", "last", ""] = ""
) -> dict[str, Any]:
    """One answer, or with `delta` a piece of it: the first carries the role, the last the reason why the answer ended."""
    made: dict[str, Any] = {"index": index, "finish_reason": finish, "logprobs": None}
    if not chat:
        return made | {"text": text}
    if not delta:
        return made | {"message": {"role": "assistant", "content": text}}
    turn = {"role": "assistant", "content": ""} if delta == "first" else {"content": text} if delta == "next" else {}
    return made | {"delta": turn}

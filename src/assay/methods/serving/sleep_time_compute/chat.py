"""The seam to a language model: a plain function from messages to a Reply, and one that asks an OpenAI-compatible server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urlsplit

from assay import checks

Message = dict[str, Any]
"""A message as OpenAI's API takes it: role, content, and for tools `tool_calls` or `tool_call_id`."""


@dataclass(frozen=True)
class Call:
    """A tool that the model calls, with its arguments as the JSON text that it wrote. Raises TypeError for anything but texts."""

    name: str
    arguments: str
    id: str = ""

    def __post_init__(self) -> None:
        for field in ("name", "arguments", "id"):
            _text(field, getattr(self, field))


@dataclass(frozen=True)
class Reply:
    """One answer of a model, and what it took: tokens read (of them `cached_tokens` from a kept prefix) and tokens generated.

    Raises ValueError and TypeError for counts that are none, and for more cached tokens than were read; TypeError for a text that is none.
    """

    text: str
    completion_tokens: int
    prompt_tokens: int = 0
    cached_tokens: int = 0
    calls: tuple[Call, ...] = ()

    def __post_init__(self) -> None:
        _text("text", self.text)
        checks.whole("completion_tokens", self.completion_tokens, low=0)
        prompt = checks.whole("prompt_tokens", self.prompt_tokens, low=0)
        checks.whole("cached_tokens", self.cached_tokens, low=0, high=prompt)


def _text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be text, got {checks.shown(value)}")


class Chat(Protocol):
    """What answers. A function that returns `(text, generated tokens)` will do: it calls no tools, and what it reads costs nothing."""

    def __call__(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        temperature: float = 0.0,
        seed: int = 0,
        max_tokens: int | None = None,
    ) -> Reply | tuple[str, int]: ...


def reply_of(answer: Any) -> Reply:
    """What a chat function returned as a Reply. Raises TypeError for anything but a Reply and `(text, tokens)`.

    >>> reply_of(("four", 1)).completion_tokens
    1
    """
    if isinstance(answer, Reply):
        return answer
    if isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[0], str):
        return Reply(answer[0], checks.whole("tokens", answer[1], low=0))
    raise TypeError(f"chat must return a Reply or (text, tokens), got {checks.shown(answer)}")


class HttpChat:
    """A chat function over an OpenAI-compatible server at `base_url` (".../v1"). `close` it, or use it in a `with`.

    It may be called by several threads. Raises ConnectionError when the server cannot be reached or refuses (with what it said), and
    ValueError for an answer that is not of that API's form; an answer without counts of tokens is refused, for then nothing could be
    charged. Also ValueError for an address that is none.
    """

    def __init__(self, base_url: str, model: str, *, api_key: str | None = None, timeout: float = 120.0) -> None:
        import httpx

        timeout = checks.number("timeout", timeout, above=0)
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.model, self.base_url = model, address(base_url)
        self._client = httpx.Client(base_url=self.base_url + "/", headers=headers, timeout=timeout)

    def __enter__(self) -> HttpChat:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close its connections."""
        self._client.close()

    def __call__(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        temperature: float = 0.0,
        seed: int = 0,
        max_tokens: int | None = None,
    ) -> Reply:
        import httpx

        body: dict[str, Any] = {
            "model": self.model, "messages": list(messages), "temperature": temperature, "seed": seed,
        }  # fmt: skip
        if tools:
            body["tools"] = list(tools)
        if max_tokens is not None:
            body["max_tokens"] = max_tokens
        try:
            response = self._client.post("chat/completions", json=body)
        except httpx.HTTPError as error:
            raise ConnectionError(f"{self.base_url} cannot be reached: {error or type(error).__name__}") from error
        if response.status_code != 200:
            raise ConnectionError(f"{self.base_url} answered {response.status_code}: {response.text[:300]}")
        try:
            return _reply(response.json())
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{self.base_url} gave no chat completion: {response.text[:300]}") from error


def address(base_url: str) -> str:
    """The address of a server, without a slash at its end. Raises TypeError and ValueError for what is none."""
    _text("base_url", base_url)
    try:
        parts = urlsplit(base_url)
        fine = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets that do not close, a port that is no number
        fine = False
    if not fine:
        raise ValueError(f"base_url must begin with http:// or https:// and name a host, got {checks.shown(base_url)}")
    return base_url.rstrip("/")


def _reply(document: Any) -> Reply:
    message, usage = document["choices"][0]["message"], document["usage"]
    details = usage.get("prompt_tokens_details") or {}
    calls = tuple(
        Call(call["function"]["name"], call["function"]["arguments"], call.get("id") or "")
        for call in message.get("tool_calls") or ()
    )
    text = message.get("content") or ""
    text.encode()  # what cannot be encoded could not be sent back
    return Reply(
        text,
        usage["completion_tokens"],
        usage["prompt_tokens"],
        details.get("cached_tokens") or 0,
        calls,
    )

"""Answers on the wire: the shapes of /v1/completions, /v1/chat/completions and /v1/responses, whole and as streams of events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from assay.server.engine import Engine, Job, Piece, Scored
from assay.server.errors import ApiError
from assay.server.rows import TokenInfo

LEAST_LOGPROB = -9999.0  # stands for minus infinity, which JSON has not


def dumps(document: Any) -> bytes:
    """JSON in plain ASCII, so that anything a client sent can be returned to it."""
    return json.dumps(document, allow_nan=False).encode()


def event(document: Any, kind: str = "") -> bytes:
    """A server-sent event with a JSON document, of a `kind` if it has one."""
    named = f"event: {kind}\n".encode() if kind else b""
    return named + b"data: " + dumps(document) + b"\n\n"


@dataclass
class Tally:
    """What a request cost so far: tokens of its prompts, tokens made, and tokens of prompts that were not computed again.

    Of several answers to one prompt only the first says what was cached: the prompt is counted once.
    """

    job: Job
    made: int = 0
    cached: int = 0
    finishes: list[str] = field(default_factory=list)

    def add(self, pieces: Iterable[Piece]) -> None:
        """Count what has come."""
        for piece in pieces:
            if piece.finish:
                self.made += piece.tokens
                self.cached += piece.cached if piece.index % self.job.ask.best_of == 0 else 0
                self.finishes.append(piece.finish)

    def usage(self) -> dict[str, Any]:
        """Tokens read and generated, including end tokens; where a router chose the model, its own are in the total."""
        read, choice = self.job.prompt_tokens(), self.job.choice
        usage = {
            "prompt_tokens": read,
            "completion_tokens": self.made,
            "total_tokens": read + self.made + (choice.tokens if choice else 0),
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }
        return usage | ({"router_tokens": choice.tokens} if choice else {})


class _Form:
    """What the forms have in common. `whole` makes one document of all answers; the others make the events of a stream."""

    kind, streamed_kind, prefix = "", "", ""

    def __init__(self, engine: Engine, job: Job) -> None:
        self.engine, self.job, self.ask = engine, job, job.ask
        self.head: dict[str, Any] = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "object": self.kind,
            "created": int(time.time()),
            "model": engine.name,
            "system_fingerprint": engine.fingerprint,
        }

    def whole(self, answers: list[Piece], tally: Tally) -> dict[str, Any]:
        """The answer in one document, from all pieces of each joined."""
        choices = [self.choice(number, answer) for number, answer in enumerate(self.best(answers))]
        return self.head | {"choices": choices, "usage": tally.usage()}

    def best(self, answers: list[Piece]) -> list[Piece]:
        """The n answers of each prompt with the highest mean log-probability, best first; all of them, as they are, if n were made."""
        n, made = self.ask.n, self.ask.best_of
        if n == made:
            return answers
        groups = [answers[first : first + made] for first in range(0, len(answers), made)]
        return [one for group in groups for one in sorted(group, key=lambda answer: -answer.logprob)[:n]]

    def choice(self, number: int, answer: Piece) -> dict[str, Any]:
        """One answer of `whole`."""
        raise NotImplementedError

    def begin(self) -> bytes:
        """The events before the first token."""
        return b""

    def pieces(self, pieces: list[Piece]) -> bytes:
        """The events of some pieces."""
        raise NotImplementedError

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        """An event with some choices in it."""
        usage = {"usage": None} if self.ask.include_usage else {}
        return event(self.head | {"object": self.streamed_kind, "choices": choices} | usage | more)

    def end(self, tally: Tally) -> bytes:
        """The events after the last piece."""
        usage = self.chunk([], usage=tally.usage()) if self.ask.include_usage else b""
        return usage + b"data: [DONE]\n\n"

    def failed(self, error: ApiError) -> bytes:
        """The last event of a stream that cannot go on: its status has been sent already."""
        return event(error.body())

    def best_tokens(self, info: TokenInfo) -> list[tuple[str, bytes, float]]:
        """The tokens told beside a chosen one."""
        return [(*self.engine.shown(token), _finite(logprob)) for token, logprob in info.top]


class Completions(_Form):
    """The form of /v1/completions."""

    kind, streamed_kind, prefix = "text_completion", "text_completion", "cmpl"

    def choice(self, number: int, answer: Piece) -> dict[str, Any]:
        """One answer, or a piece of it."""
        text = (answer.echo.text if answer.echo else "") + answer.text
        logprobs = self._logprobs(answer) if self.ask.logprobs is not None else None
        return {"index": number, "text": text, "logprobs": logprobs, "finish_reason": answer.finish}

    def pieces(self, pieces: list[Piece]) -> bytes:
        """An event for each piece."""
        return b"".join(self.chunk([self.choice(piece.index, piece)]) for piece in pieces)

    def _logprobs(self, answer: Piece) -> dict[str, Any]:
        number = self.job.prompt_of(answer.index)
        told: list[tuple[int, int, TokenInfo | None]] = []
        if answer.echo:
            ids = self.job.prompts[number]
            infos = answer.prompt or (None,) * len(ids)
            told += list(zip(ids, answer.echo.starts, infos, strict=True))
        before = len(self.job.echoes[number].text) if self.job.echoes else 0
        told += [(scored.info.token, before + scored.at, scored.info) for scored in answer.scored]
        tops = [None if info is None else self._top(token, info) for token, _, info in told]
        return {
            "tokens": [self.engine.shown(token)[0] for token, _, _ in told],
            "token_logprobs": [None if info is None else _finite(info.logprob) for _, _, info in told],
            "top_logprobs": tops if self.ask.logprobs else None,
            "text_offset": [at for _, at, _ in told],
        }

    def _top(self, token: int, info: TokenInfo) -> dict[str, float]:
        return {text: logprob for text, _, logprob in self.best_tokens(info)} | {
            self.engine.shown(token)[0]: _finite(info.logprob)
        }


class Chat(_Form):
    """The form of /v1/chat/completions."""

    kind, streamed_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def choice(self, number: int, answer: Piece) -> dict[str, Any]:
        """One answer."""
        message: dict[str, Any] = {"role": "assistant", "content": answer.text}
        if answer.calls:
            message["content"] = answer.text if answer.text.strip() else None
            message["tool_calls"] = [_called(call) for call in answer.calls]
        return self._part(number, answer, {"message": message}, answer.finish)

    def begin(self) -> bytes:
        """The role of each answer."""
        turn = {"delta": {"role": "assistant", "content": ""}}
        return b"".join(self.chunk([self._part(number, None, turn, None)]) for number in range(self.ask.n))

    def pieces(self, pieces: list[Piece]) -> bytes:
        """Events with text, with calls of tools, and with the reason why an answer ended."""
        return b"".join(self.chunk([part]) for piece in pieces for part in self._parts(piece))

    def _parts(self, piece: Piece) -> Iterable[dict[str, Any]]:
        if piece.text or piece.scored:
            yield self._part(piece.index, piece, {"delta": {"content": piece.text}}, None)
        if piece.calls:
            first = piece.calls_before
            calls = [{"index": first + i, **_called(call)} for i, call in enumerate(piece.calls)]
            yield self._part(piece.index, None, {"delta": {"tool_calls": calls}}, None)
        if piece.finish:
            yield self._part(piece.index, None, {"delta": {}}, piece.finish)

    def _part(self, number: int, answer: Piece | None, what: Mapping[str, Any], finish: str | None) -> dict[str, Any]:
        told = answer is not None and self.ask.logprobs is not None
        logprobs = (
            {"content": [self._token(one) for one in answer.scored], "refusal": None} if told and answer else None
        )
        return {"index": number, "finish_reason": finish, "logprobs": logprobs, **what}

    def _token(self, scored: Scored) -> dict[str, Any]:
        text, data = self.engine.shown(scored.info.token)
        top = [
            {"token": other, "bytes": list(raw), "logprob": logprob}
            for other, raw, logprob in self.best_tokens(scored.info)
        ]
        logprob = _finite(scored.info.logprob)
        return {"token": text, "bytes": list(data), "logprob": logprob, "top_logprobs": top}


class Responses(_Form):
    """The form of /v1/responses: an answer is one message with one part of text."""

    kind, streamed_kind, prefix = "response", "response", "resp"

    def __init__(self, engine: Engine, job: Job) -> None:
        super().__init__(engine, job)
        self._number = 0
        self._text = ""
        self._item = f"msg_{uuid.uuid4().hex}"
        told = job.ask.told
        form = job.ask.format
        self._base: dict[str, Any] = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "error": None,
            "incomplete_details": None,
            "instructions": told["instructions"],
            "max_output_tokens": told["max_output_tokens"],
            "metadata": told["metadata"],
            "model": engine.name,
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": told["temperature"],
            "text": {"format": {"type": "text"} if form is None else dict(form.given)},
            "tool_choice": "auto",
            "tools": [],
            "top_p": told["top_p"],
            "truncation": "disabled",
            "usage": None,
            "user": None,
        }

    def whole(self, answers: list[Piece], tally: Tally) -> dict[str, Any]:
        """The response in one document."""
        self._text = answers[0].text
        return self._over(answers[0].finish, tally)

    def begin(self) -> bytes:
        """The events before the first token."""
        document = self._base | {"status": "in_progress", "output": []}
        return (
            self._event("response.created", response=document)
            + self._event("response.in_progress", response=document)
            + self._event("response.output_item.added", output_index=0, item=self._message("in_progress"))
            + self._part_event("response.content_part.added", part=self._part())
        )

    def pieces(self, pieces: list[Piece]) -> bytes:
        """An event for each piece with text."""
        made = b""
        for piece in pieces:
            self._text += piece.text
            if piece.text:
                made += self._part_event("response.output_text.delta", delta=piece.text, logprobs=[])
        return made

    def end(self, tally: Tally) -> bytes:
        """The events after the last token."""
        finish = tally.finishes[0]
        document = self._over(finish, tally)
        message = document["output"][0]
        last = "response.incomplete" if finish == "length" else "response.completed"
        return (
            self._part_event("response.output_text.done", text=self._text, logprobs=[])
            + self._part_event("response.content_part.done", part=self._part())
            + self._event("response.output_item.done", output_index=0, item=message)
            + self._event(last, response=document)
        )

    def failed(self, error: ApiError) -> bytes:
        """The event of a response that failed on its way."""
        told = {"code": "server_error" if error.status >= 500 else "invalid_prompt", "message": error.message}
        document = self._base | {"status": "failed", "error": told, "output": []}
        return self._event("response.failed", response=document)

    def _over(self, finish: str | None, tally: Tally) -> dict[str, Any]:
        status = "incomplete" if finish == "length" else "completed"
        usage = tally.usage()
        return self._base | {
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if finish == "length" else None,
            "output": [self._message(status, self._part())],
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": usage["prompt_tokens_details"],
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
                **{name: usage[name] for name in ("router_tokens",) if name in usage},
            },
        }

    def _message(self, status: str, *parts: dict[str, Any]) -> dict[str, Any]:
        return {"id": self._item, "type": "message", "role": "assistant", "status": status, "content": list(parts)}

    def _part(self) -> dict[str, Any]:
        return {"type": "output_text", "text": self._text, "annotations": [], "logprobs": []}

    def _part_event(self, kind: str, **more: Any) -> bytes:
        return self._event(kind, item_id=self._item, output_index=0, content_index=0, **more)

    def _event(self, kind: str, **more: Any) -> bytes:
        self._number += 1
        return event({"type": kind, "sequence_number": self._number - 1, **more}, kind)


FORMS: dict[str, type[Completions] | type[Chat] | type[Responses]] = {
    "completions": Completions,
    "chat/completions": Chat,
    "responses": Responses,
}


def joined(pieces: Iterable[Piece], answers: int) -> list[Piece]:
    """All pieces of each answer as one, in the order of the answers."""
    whole = [Piece(number) for number in range(answers)]
    for piece in pieces:
        one = whole[piece.index]
        one.text += piece.text
        one.scored += piece.scored
        one.calls += piece.calls
        one.echo, one.prompt = piece.echo or one.echo, piece.prompt or one.prompt
        if piece.finish:
            one.finish, one.tokens, one.cached, one.logprob = piece.finish, piece.tokens, piece.cached, piece.logprob
    return whole


def _called(call: Any) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _finite(logprob: float) -> float:
    return logprob if logprob > LEAST_LOGPROB else LEAST_LOGPROB

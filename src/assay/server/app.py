"""The server: /v1/models, /v1/completions and /v1/chat/completions, streamed or whole, one request at a time.

Greedy unless a temperature is asked for. It binds to loopback unless told otherwise, and to anything else only with a key.
"""

from __future__ import annotations

import hmac
import json
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from fastapi import Depends, FastAPI, Header, HTTPException, Request
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator

LOOPBACK = ("127.0.0.1", "::1", "localhost")

# fields of the OpenAI API that would change the answer and are not implemented
UNSUPPORTED = (
    "best_of", "echo", "frequency_penalty", "functions", "logit_bias", "logprobs", "presence_penalty", "response_format",
    "suffix", "tools", "top_logprobs",
)  # fmt: skip


class _Request(BaseModel):
    model_config = ConfigDict(extra="allow")

    model: str = ""
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=0.0, ge=0.0, le=2.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    seed: int | None = None
    stream: bool = False
    n: Literal[1] = 1
    stop: str | list[str] | None = None

    @model_validator(mode="after")
    def _only_what_is_done(self) -> Self:
        extra = self.model_extra or {}
        if asked := [name for name in UNSUPPORTED if extra.get(name)]:
            raise ValueError(f"not supported here: {', '.join(asked)}")
        if not all(self.stops()) or len(self.stops()) > 4:
            raise ValueError(f"stop must be up to 4 strings that are not empty, got {self.stop!r}")
        return self

    def stops(self) -> list[str]:
        """The strings that end the answer; they are not part of it."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])


class CompletionRequest(_Request):
    """Body of /v1/completions."""

    prompt: str = Field(min_length=1)


class Message(BaseModel):
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str


class ChatRequest(_Request):
    """Body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)


@dataclass
class Piece:
    """A piece of generated text; the last one says why generation stopped."""

    text: str
    tokens: int
    finish: str | None = None


class Engine:
    """A model and its tokenizer behind a lock: one request runs at a time, in the order they get the lock."""

    def __init__(self, model: Any, tokenizer: Any, name: str):
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.limit = getattr(model.config, "max_position_embeddings", 2048)
        self.lock = threading.Lock()

    def encode(self, request: CompletionRequest | ChatRequest) -> list[int]:
        """Token ids of a request; a chat goes through the model's own template."""
        if isinstance(request, CompletionRequest):
            return list(self.tokenizer(request.prompt)["input_ids"])
        if not self.tokenizer.chat_template:
            raise HTTPException(400, "this model has no chat template; use /v1/completions")
        turns = [turn.model_dump() for turn in request.messages]
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def length(self, request: CompletionRequest | ChatRequest, ids: list[int]) -> int:
        """Tokens to generate: what was asked for (default 256), refused when the context cannot hold it."""
        asked = request.max_tokens or getattr(request, "max_completion_tokens", None)
        room = self.limit - len(ids)
        if room < 1 or (asked or 1) > room:
            text = f"the prompt has {len(ids)} tokens and {asked or 1} are asked for; the context holds {self.limit}"
            raise HTTPException(400, text)
        return asked or min(256, room)

    def pieces(self, request: CompletionRequest | ChatRequest, ids: list[int], new: int) -> Iterator[Piece]:
        """Generate, giving text as soon as it is there."""
        from transformers import TextIteratorStreamer

        streamer: Any = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=600)
        box: dict[str, Any] = {}
        inputs = torch.tensor([ids])
        options: dict[str, Any] = {"do_sample": request.temperature > 0}
        if request.temperature > 0:
            options |= {"temperature": request.temperature, "top_p": request.top_p}
        if stops := request.stops():
            options |= {"stop_strings": stops, "tokenizer": self.tokenizer}

        def run() -> None:
            try:
                with self.lock, torch.inference_mode():
                    if request.seed is not None:
                        torch.manual_seed(request.seed)
                    box["ids"] = self.model.generate(
                        input_ids=inputs,
                        attention_mask=torch.ones_like(inputs),
                        max_new_tokens=new,
                        pad_token_id=self.tokenizer.pad_token_id or 0,
                        streamer=streamer,
                        **options,
                    )
            except Exception as error:  # told to the client below; the server lives on
                box["error"] = error
            finally:
                streamer.end()

        worker = threading.Thread(target=run, daemon=True)
        worker.start()
        ended = False
        for text, met in until_stop(streamer, stops):
            ended = ended or met
            if text:
                yield Piece(text, 0)
        worker.join()
        if "error" in box:
            raise RuntimeError(f"generation failed: {box['error']}") from box["error"]
        made = box["ids"].shape[1] - len(ids)
        yield Piece("", made, "length" if made >= new and not ended else "stop")


def until_stop(texts: Iterable[str], stops: list[str]) -> Iterator[tuple[str, bool]]:
    """The text up to the first of `stops`, each piece with whether one was met.

    What may be the beginning of a stop is held back until it is clear. All of `texts` is consumed: whoever makes it may wait for that.
    """
    held, met = "", False
    for text in texts:
        if met:
            continue
        held += text
        found = [at for stop in stops if (at := held.find(stop)) >= 0]
        if found:
            met = True
            yield held[: min(found)], True
            continue
        keep = max((n for stop in stops for n in range(1, len(stop)) if held.endswith(stop[:n])), default=0)
        yield held[: len(held) - keep], False
        held = held[len(held) - keep :]
    if not met:
        yield held, False


def create_app(model: Any, tokenizer: Any, *, name: str, api_key: str | None = None) -> FastAPI:
    """The ASGI application over a model."""
    engine = Engine(model, tokenizer, name)
    app = FastAPI(title="assay", docs_url=None, redoc_url=None)
    born = int(time.time())

    def authorised(authorization: str = Header(default="")) -> None:
        if api_key is not None and not hmac.compare_digest(authorization.encode(), f"Bearer {api_key}".encode()):
            raise HTTPException(401, "wrong or missing API key")

    @app.exception_handler(HTTPException)
    async def openai_error(request: Request, error: HTTPException) -> JSONResponse:
        body = {"error": {"message": error.detail, "type": "invalid_request_error", "code": error.status_code}}
        return JSONResponse(body, status_code=error.status_code)

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models", dependencies=[Depends(authorised)])
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model", "created": born, "owned_by": "assay"}]}

    @app.post("/v1/completions", dependencies=[Depends(authorised)], response_model=None)
    def completions(request: CompletionRequest) -> Any:
        return _answer(engine, request, "text_completion", "cmpl")

    @app.post("/v1/chat/completions", dependencies=[Depends(authorised)], response_model=None)
    def chat(request: ChatRequest) -> Any:
        return _answer(engine, request, "chat.completion", "chatcmpl")

    return app


def _answer(engine: Engine, request: CompletionRequest | ChatRequest, kind: str, prefix: str) -> Any:
    ids = engine.encode(request)
    new = engine.length(request, ids)
    head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": engine.name}
    if request.stream:
        stream = _stream(engine, request, ids, new, head, kind)
        return StreamingResponse(stream, media_type="text/event-stream")
    text, made, finish = "", 0, "stop"
    for piece in engine.pieces(request, ids, new):
        text, made, finish = text + piece.text, piece.tokens, piece.finish or finish
    chat = kind == "chat.completion"
    choice: dict[str, Any] = {"index": 0, "finish_reason": finish, "logprobs": None}
    choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    usage = {"prompt_tokens": len(ids), "completion_tokens": made, "total_tokens": len(ids) + made}
    return {**head, "object": kind, "choices": [choice], "usage": usage}


def _stream(
    engine: Engine, request: CompletionRequest | ChatRequest, ids: list[int], new: int, head: dict[str, Any], kind: str
) -> Iterator[str]:
    chat = kind == "chat.completion"
    try:
        for piece in engine.pieces(request, ids, new):
            choice: dict[str, Any] = {"index": 0, "finish_reason": piece.finish, "logprobs": None}
            choice |= {"delta": {"role": "assistant", "content": piece.text}} if chat else {"text": piece.text}
            event = {**head, "object": "chat.completion.chunk" if chat else kind, "choices": [choice]}
            yield f"data: {json.dumps(event)}\n\n"
    except RuntimeError as error:
        yield f"data: {json.dumps({'error': {'message': str(error), 'type': 'server_error'}})}\n\n"
    yield "data: [DONE]\n\n"

"""The engine: a model, its tokenizer, and one thread that generates, first come, first served.

A client gets text piece by piece as it is made, and may leave at any time. `Job.left` is checked between two layers of the
prompt's forward pass and after every token, whichever loop generates (transformers' own or `methods.builtin.decode_loop`),
because the streamer and the layers do the checking. Stop strings are searched for in the generated text only, and here rather
than in transformers.

Sampling does exactly what was asked for: of the model's `generation_config` only the end tokens are used. Every request draws
from its own generator, seeded with the request's `seed` or a fresh one. The same request with the same seed therefore gets the
same answer, whatever ran before it, on the same machine with the same versions.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from assay.server.protocol import ApiError, Ask, read
from assay.workloads.context import context_length

MOST_ASKING = 64  # requests that are read, wait or run at a time; further ones are sent away
DEFAULT_NEW_TOKENS = 256
UNKNOWN_CONTEXT = 2048  # for models that name no context, our choice
UNFINISHED = "\ufffd"  # what a decoder puts for bytes that are no character (yet)


@dataclass
class Job:
    """A request ready to run: token ids of its prompts, how many tokens each answer may have, and whether its client has left."""

    ask: Ask
    prompts: list[list[int]]
    new_tokens: list[int]
    left: bool = False

    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(len(ids) for ids in self.prompts)


@dataclass(frozen=True)
class Piece:
    """A piece of an answer; the last one of each answer says why it ended and how many tokens it took."""

    index: int
    text: str
    finish: str | None = None
    tokens: int = 0


class Cancelled(Exception):
    """Nobody is waiting for this answer any more."""


class _Met(Exception):
    """The answer contains a stop string."""


class Engine:
    """A model and its tokenizer under a name. One request runs at a time; the others wait in order of arrival."""

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.context = context_of(model, tokenizer)
        self.vocabulary = model.get_input_embeddings().num_embeddings
        self.ends = _ends(model, tokenizer)
        self.asking = 0
        self.stopping = False
        self._longest = max(map(len, tokenizer.get_vocab()))
        # a fast tokenizer must not be used by two threads at a time
        self._reader, self._reads_with = ThreadPoolExecutor(1, "assay-reader"), copy.deepcopy(tokenizer)
        self._worker = ThreadPoolExecutor(1, "assay-generator")

    def stop(self) -> None:
        """Start nothing more and end what is running; its clients are told. May be called from a signal handler."""
        self.stopping = True

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """A place in the queue. Raises ApiError 503, saying when to retry, when all are taken."""
        if self.stopping:
            raise _going_down()
        if self.asking >= MOST_ASKING:
            message = f"{self.asking} requests are waiting already; try again later"
            raise ApiError(503, message, code="overloaded", headers={"Retry-After": "2"})
        self.asking += 1
        try:
            yield
        finally:
            self.asking -= 1

    async def read(self, body: bytes, *, chat: bool) -> Job:
        """Check and tokenise a request, in a thread, so that a long one delays only other requests that are being read."""
        return await asyncio.get_running_loop().run_in_executor(self._reader, self.prepare, body, chat)

    def prepare(self, body: bytes, chat: bool) -> Job:
        """The job in a request's body. Raises ApiError for what is malformed, unknown to the model, or over its context."""
        ask = read(body, chat=chat, served=self.name)
        if chat:
            prompts = [self._chat_ids(ask.messages)]
        else:
            prompts = [self._ids(prompt) if isinstance(prompt, str) else prompt for prompt in ask.prompts]
        return Job(ask, prompts, [self._new_tokens(ask, ids) for ids in prompts])

    def _ids(self, text: str, **options: Any) -> list[int]:
        most = self.context * self._longest
        if len(text) > most:
            message = f"the prompt has {len(text)} characters; {self.context} tokens, the context, hold at most {most}"
            raise ApiError(400, message, param="prompt", code="context_length_exceeded")
        return list(self._reads_with(text, **options)["input_ids"])

    def _chat_ids(self, turns: list[dict[str, Any]]) -> list[int]:
        from jinja2 import TemplateError

        if not self._reads_with.chat_template:
            raise ApiError(400, "this model has no chat template; use /v1/completions", param="messages")
        try:
            text = self._reads_with.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise ApiError(400, f"the model's chat template refuses this: {error.message}", param="messages") from None
        except Exception as error:  # a template is a program of the model's author
            message = f"the model's chat template fails on this: {type(error).__name__}"
            raise ApiError(400, message, param="messages") from error
        return self._ids(text, add_special_tokens=False)

    def _new_tokens(self, ask: Ask, ids: list[int]) -> int:
        param = "messages" if ask.chat else "prompt"
        if not ids:
            raise ApiError(400, "the prompt has no tokens", param=param)
        if bad := next((token for token in ids if not 0 <= token < self.vocabulary), None):
            message = f"token ids must lie in 0..{self.vocabulary - 1}, what the model knows, got {bad}"
            raise ApiError(400, message, param=param)
        room, least = self.context - len(ids), ask.new_tokens or 1
        if room < least:
            message = f"the prompt has {len(ids)} tokens and {least} are asked for; the context holds {self.context}"
            raise ApiError(400, message, param=param, code="context_length_exceeded")
        new = ask.new_tokens or min(DEFAULT_NEW_TOKENS, room)
        if ask.min_tokens > new:
            raise ApiError(400, f"min_tokens must be at most {new}, got {ask.min_tokens}", param="min_tokens")
        return new

    async def pieces(self, job: Job) -> AsyncIterator[Piece]:
        """The answers of a job, piece by piece, once its turn has come. Closing the iterator ends the work.

        Raises ApiError 503 when the server stops; what goes wrong in the model is raised as it is.
        """
        loop, made = asyncio.get_running_loop(), asyncio.Queue[Piece | None]()

        def emit(piece: Piece) -> None:
            loop.call_soon_threadsafe(made.put_nowait, piece)

        def over(done: asyncio.Future[None]) -> None:
            if not done.cancelled():
                done.exception()  # retrieved, since asyncio would log it if nobody did
            made.put_nowait(None)

        work = loop.run_in_executor(self._worker, self._run, job, emit)
        work.add_done_callback(over)
        try:
            while (piece := await made.get()) is not None:
                yield piece
            await work
        finally:
            job.left = True
            work.cancel()  # what has not begun never will

    # ---- in the thread that generates

    def _run(self, job: Job, emit: Callable[[Piece], Any]) -> None:
        seed = secrets.randbits(64) if job.ask.seed is None else job.ask.seed
        with torch.inference_mode(), torch.random.fork_rng(devices=[]), self._interruptible(job):
            torch.manual_seed(seed)
            for index, (ids, new) in enumerate(zip(job.prompts, job.new_tokens, strict=True)):
                self._check(job)
                listener = _Listener(self, job, ids, lambda text, index=index: emit(Piece(index, text)))  # type: ignore[misc]
                with contextlib.suppress(_Met):
                    self._generate(job.ask, ids, new, listener)
                    listener.finish()
                emit(Piece(index, "", "stop" if listener.ended() else "length", len(listener.tokens)))

    def _check(self, job: Job) -> None:
        if self.stopping:
            raise _going_down()
        if job.left:
            raise Cancelled

    @contextlib.contextmanager
    def _interruptible(self, job: Job) -> Iterator[None]:
        """Check before every layer whether the client is still there, because a long prompt is one long call."""
        handles = [layer.register_forward_pre_hook(lambda *_: self._check(job)) for layer in _layers(self.model)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _generate(self, ask: Ask, ids: list[int], new: int, listener: _Listener) -> None:
        from transformers import GenerationConfig

        ends = listener.ends
        sampling = {"do_sample": True, "temperature": ask.temperature, "top_p": ask.top_p, "top_k": 0}
        config = GenerationConfig(
            max_new_tokens=new,
            min_new_tokens=ask.min_tokens or None,
            eos_token_id=sorted(ends) or None,
            pad_token_id=min(ends, default=0),
            **(sampling if ask.temperature > 0 else {"do_sample": False}),
        )
        inputs = torch.tensor([ids], device=self.model.device)
        own, self.model.generation_config = self.model.generation_config, GenerationConfig()
        try:
            self.model.generate(
                input_ids=inputs, attention_mask=torch.ones_like(inputs), generation_config=config, streamer=listener
            )
        finally:
            self.model.generation_config = own


class _Listener:
    """The streamer passed to `generate`: counts tokens, turns them into text, looks for stop strings, and ends abandoned answers."""

    def __init__(self, engine: Engine, job: Job, ids: list[int], emit: Callable[[str], Any]) -> None:
        self.engine, self.job, self.emit = engine, job, emit
        self.tokens: list[int] = []
        self.stops = Stops(job.ask.stops)
        self.text = Text(engine.tokenizer, ids)
        # a stop that is one special token never shows in the text
        vocabulary = engine.tokenizer.get_added_vocab()
        self.ends = {vocabulary[stop] for stop in job.ask.stops if stop in vocabulary}
        if not job.ask.ignore_eos:
            self.ends |= engine.ends
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """Called by generate: first with the prompt, then with each token."""
        if self._prompt_seen:
            self.engine._check(self.job)
            token = int(value)
            self.tokens.append(token)
            self._say(self.text.add(token))
        self._prompt_seen = True

    def end(self) -> None:
        """Called by generate when it is done."""

    def finish(self) -> None:
        """Send what was held back."""
        self._say(self.text.rest())
        if rest := self.stops.rest():
            self.emit(rest)

    def ended(self) -> bool:
        """Whether the answer is over by a stop string or an end token, even on the last token allowed."""
        return self.stops.met or bool(self.tokens and self.tokens[-1] in self.ends)

    def _say(self, text: str) -> None:
        if sure := self.stops.add(text):
            self.emit(sure)
        if self.stops.met:
            raise _Met


class Stops:
    """Finds the string that is whole first in a text that comes in pieces, holding back what may be the beginning of one.

    Of two that are whole at once, it is the longer; so the answer does not depend on how the text is cut into pieces.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.stops, self.held, self.met = stops, "", False

    def add(self, text: str) -> str:
        """What is certain to be part of the answer; after `met`, nothing."""
        if self.met:
            return ""
        self.held += text
        found = [(at + len(stop), at) for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if found:
            self.met, keep = True, len(self.held) - min(found)[1]
        else:
            beginnings = (n for stop in self.stops for n in range(1, len(stop)) if self.held.endswith(stop[:n]))
            keep = max(beginnings, default=0)
        sure, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return sure

    def rest(self) -> str:
        """What was held back, when no more text comes."""
        return "" if self.met else self.held


class Text:
    """Text of tokens that arrive one by one after a prompt. Pieces already returned never change; joined, they are the whole text.

    Some tokens before the new ones are decoded with them, since decoders treat the beginning of a text in their own ways (a
    leading space), and bytes that do not make a character yet wait for the next token. Tokens without text, special ones, are
    passed over, so that it is never they alone that are decoded before the next.
    """

    def __init__(self, tokenizer: Any, prompt: list[int]) -> None:
        self.tokenizer = tokenizer
        self.silent = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        self.window = prompt[-4:]
        self.clean = 0  # a place in the window where a character begins
        self.given = len(self.window)  # tokens whose text was given
        self.shown = len(self._decode())  # characters of the window's text that were given

    def add(self, token: int) -> str:
        """The text that this token makes certain."""
        if token in self.silent:
            return ""
        self.window.append(token)
        text = self._decode()
        # a character has four bytes, so what stays broken for long is no character and is given as it is
        if text.endswith(UNFINISHED) and len(self.window) < self.given + 16:
            return ""
        new, self.shown = text[self.shown :], max(self.shown, len(text))
        if len(self.window) >= self.clean + 8:
            self.window = self.window[self.clean :]
            self.clean, self.shown = len(self.window), len(self._decode())
        self.given = len(self.window)
        return new

    def rest(self) -> str:
        """What waited, when no more tokens come."""
        return self._decode()[self.shown :]

    def _decode(self) -> str:
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return str(self.tokenizer.decode(self.window, **options))


def context_of(model: Any, tokenizer: Any) -> int:
    """The most tokens a prompt and its answer may have together: the model's limit, else the tokenizer's, else 2,048."""
    limit = context_length(model)
    usual = getattr(tokenizer, "model_max_length", 0)
    return limit if limit is not None else int(usual) if 0 < usual < 10**7 else UNKNOWN_CONTEXT


def _ends(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end an answer."""
    for owner in (model.generation_config, model.config.get_text_config(decoder=True), tokenizer):
        given = getattr(owner, "eos_token_id", None)
        if given is not None:
            return set(given) if isinstance(given, list | tuple) else {int(given)}
    return set()


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """The members of the outermost lists of modules, except those inside what torch.compile has compiled as one piece."""
    for child in module.children() if module._compiled_call_impl is None else ():
        if not isinstance(child, nn.ModuleList):
            yield from _layers(child)
            continue
        yield from (layer for layer in child if layer._compiled_call_impl is None)


def _going_down() -> ApiError:
    return ApiError(503, "the server is stopping", code="stopping", headers={"Retry-After": "10"})

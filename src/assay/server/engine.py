"""The engine: a model, its tokenizer and its scheduler under one name; requests in, pieces of text out.

The scheduler makes tokens in a thread of its own, for many requests at a time. Here requests become token ids and settings, in
the reading thread, and tokens become text, in the event loop. Nothing here makes the scheduler wait: what it hands over is kept
until the client takes it, and a client that leaves takes its rows with it.

Sampling does exactly what was asked for: of the model's `generation_config` only the end tokens are used. Every answer draws
from its own generator, seeded with the request's `seed` (for the first answer) or a number made of it, or a fresh one.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import hashlib
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from assay.server import request
from assay.server.embeddings import why_alike, why_no_embeddings
from assay.server.errors import ApiError, going_down, overloaded
from assay.server.metrics import Latencies
from assay.server.request import Ask, EmbeddingAsk
from assay.server.rows import Event, Settings, TokenInfo
from assay.server.scheduler import Scheduler, Stopped
from assay.server.text import Stops, Text, silent_tokens
from assay.server.tools import Call, ToolReader, call_schema, names_calls, names_tools
from assay.workloads.context import context_length

DEFAULT_NEW_TOKENS = 256
UNKNOWN_CONTEXT = 2048  # for models that name no context, our choice
REJECTIONS_BEFORE_MASK = 64  # tokens that a constraint refuses one by one before it looks at all of them


@dataclass(frozen=True)
class Scored:
    """A token's log-probabilities, and where its text begins in the text it is part of."""

    info: TokenInfo
    at: int


@dataclass(frozen=True)
class Echo:
    """A prompt as it is repeated before its answers: its text, and where each of its tokens begins in it."""

    text: str
    starts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Choice:
    """What a router chose for a request, and what choosing took: tokens that it read or made, and seconds."""

    model: str
    tokens: int
    seconds: float


@dataclass
class Job:
    """A request ready to run: token ids of its prompts, and the settings of each answer, prompt by prompt."""

    ask: Ask
    prompts: list[list[int]]
    settings: list[Settings]
    echoes: list[Echo] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    choice: Choice | None = None  # where a router chose the model

    def prompt_of(self, answer: int) -> int:
        """The number of the prompt that an answer belongs to."""
        return answer // self.ask.best_of

    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(len(ids) for ids in self.prompts)


@dataclass
class Piece:
    """A piece of an answer; the last one of each says why it ended, how many tokens it took, and how many of the prompt were cached.

    `echo` comes in the first piece, if the prompt is repeated; `prompt` then holds its tokens' log-probabilities.
    """

    index: int
    text: str = ""
    scored: list[Scored] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    calls_before: int = 0  # in earlier pieces
    echo: Echo | None = None
    prompt: tuple[TokenInfo | None, ...] = ()
    finish: str | None = None
    tokens: int = 0
    cached: int = 0
    logprob: float = 0.0  # the mean of its tokens', where they were asked for


class Engine:
    """A model, its tokenizer and its scheduler under a name."""

    def __init__(self, model: Any, tokenizer: Any, scheduler: Scheduler, name: str, *, recipe: str = "") -> None:
        self.model, self.tokenizer, self.scheduler, self.name = model, tokenizer, scheduler, name
        self.created = int(time.time())
        self.context = context_of(model, tokenizer)
        self.vocabulary = model.get_input_embeddings().num_embeddings
        self.ends = {token for token in _ends(model, tokenizer) if 0 <= token < self.vocabulary}
        self.fingerprint = fingerprint(model, recipe)
        self.backend = self.backend_reason = ""  # what runs the model, and why not something faster
        self.latencies = Latencies()
        self.no_embeddings = why_no_embeddings(model)
        self.silent = silent_tokens(tokenizer)
        self._longest = max(map(len, tokenizer.get_vocab()))
        self._reads_with = copy.deepcopy(tokenizer)  # a fast tokenizer must not be used by two threads at a time
        self.inboxes: set[Inbox] = set()

    # ---- in the thread that reads requests

    def prepare(self, path: str, document: Mapping[str, Any], most: int | None = None) -> Job:
        """The job in a request to one of the endpoints that generate; `most` bounds the tokens of a prompt.

        Raises ApiError for what is malformed, unknown to the model, or over its context.
        """
        ask = READERS[path](document)
        if ask.chat:
            param, prompts = ("input" if path == "responses" else "messages"), [self._chat_ids(ask, path)]
        else:
            param, prompts = "prompt", [self._ids(one, "prompt") for one in ask.prompts]
        settings, constraint = [], self._constraint(ask)
        for number, ids in enumerate(prompts):
            self._check_ids(ids, param, most)
            new = self._new_tokens(ask, ids, param)
            for one in range(ask.best_of):
                settings.append(self._settings(ask, new, number * ask.best_of + one, constraint))
        echoes = [self._echo(ask, *pair) for pair in zip(ask.prompts, prompts, strict=True)] if ask.echo else []
        return Job(ask, prompts, settings, echoes)

    def prepare_embeddings(
        self, document: Mapping[str, Any], most: int | None = None
    ) -> tuple[EmbeddingAsk, list[list[int]]]:
        """What a request to /v1/embeddings asks, and the token ids of its texts."""
        ask = request.embedding(document)
        if self.no_embeddings:
            raise ApiError(400, f"this model gives no embeddings: {self.no_embeddings}", param="model")
        inputs = [self._ids(one, "input") for one in ask.inputs]
        for ids in inputs:
            self._check_ids(ids, "input", most)
            if len(ids) > self.context:
                raise _too_long(f"the text has {len(ids)} tokens; the context holds {self.context}", "input")
        return ask, inputs

    def _ids(self, prompt: str | list[int], param: str, **options: Any) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        most = self.context * self._longest
        if len(prompt) > most:
            message = (
                f"the prompt has {len(prompt)} characters; {self.context} tokens, the context, hold at most {most}"
            )
            raise _too_long(message, param)
        return list(self._reads_with(prompt, **options)["input_ids"])

    def _check_ids(self, ids: list[int], param: str, most: int | None) -> None:
        if not ids:
            raise ApiError(400, "the prompt has no tokens", param=param)
        if bad := next((token for token in ids if not 0 <= token < self.vocabulary), None):
            message = f"token ids must lie in 0..{self.vocabulary - 1}, what the model knows, got {bad}"
            raise ApiError(400, message, param=param)
        if most is not None and len(ids) > most:
            raise _too_long(f"the prompt has {len(ids)} tokens; this server takes {most}", param)

    def _chat_ids(self, ask: Ask, path: str) -> list[int]:
        from jinja2 import TemplateError

        param = "input" if path == "responses" else "messages"
        if not self._reads_with.chat_template:
            raise ApiError(400, "this model has no chat template; use /v1/completions", param=param)
        given = [dict(tool.given) for tool in ask.tools] or None
        try:
            template = self._reads_with.get_chat_template(tools=given)
        except ValueError as error:  # of several templates none is the default
            raise ApiError(400, f"the model's chat templates: {error}", param=param) from None
        if ask.tools and not names_tools(template):
            message = "tools are not supported by this model: its chat template does not name them"
            raise ApiError(400, message, param="tools", code="unsupported_parameter")
        used = next((i for i, turn in enumerate(ask.turns) if turn["role"] == "tool" or "tool_calls" in turn), None)
        if used is not None and not names_calls(template):
            message = "calls of tools are not supported by this model: its chat template does not name them"
            raise ApiError(400, message, param=f"messages[{used}]", code="unsupported_parameter")
        try:
            text = self._reads_with.apply_chat_template(
                ask.turns, tools=given, tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise ApiError(400, f"the model's chat template refuses this: {error.message}", param=param) from None
        except Exception as error:  # a template is a program of the model's author
            message = f"the model's chat template fails on this: {type(error).__name__}"
            raise ApiError(400, message, param=param) from error
        try:
            text.encode()
        except UnicodeEncodeError:  # in what was not looked at word by word, such as the parameters of a tool
            raise ApiError(400, f"{param} or tools hold half a surrogate pair", param=param) from None
        return self._ids(text, param, add_special_tokens=False)

    def _new_tokens(self, ask: Ask, ids: list[int], param: str) -> int:
        room, least = self.context - len(ids), 1 if ask.new_tokens is None else ask.new_tokens
        if room < least:
            raise _too_long(
                f"the prompt has {len(ids)} tokens and {least} are asked for; the context holds {self.context}", param
            )
        new = min(DEFAULT_NEW_TOKENS, room) if ask.new_tokens is None else ask.new_tokens
        if ask.min_tokens > new:
            raise ApiError(400, f"min_tokens must be at most {new}, got {ask.min_tokens}", param="min_tokens")
        return new

    def _settings(self, ask: Ask, new: int, answer: int, constraint: Any) -> Settings:
        if bad := next((token for token in ask.logit_bias if token >= self.vocabulary), None):
            message = f"logit_bias names token {bad}; the model knows 0..{self.vocabulary - 1}"
            raise ApiError(400, message, param="logit_bias")
        # a stop that is one special token never shows in the text
        vocabulary = self._reads_with.get_added_vocab()
        ends = {token for stop in ask.stops if (token := vocabulary.get(stop, -1)) in range(self.vocabulary)}
        if not ask.ignore_eos:
            ends |= self.ends
        logprobs = ask.logprobs
        if logprobs is None and ask.best_of > ask.n:
            logprobs = 0  # the best are chosen by them
        elif logprobs is not None:
            _ = self.token_bytes  # made here, not in the event loop
        made = Settings(
            max_tokens=new,
            min_tokens=ask.min_tokens,
            ends=frozenset(ends),
            temperature=ask.temperature,
            top_p=ask.top_p if ask.temperature > 0 else 1.0,  # 0 asks for greedy
            top_k=ask.top_k,
            seed=seed_of(ask.seed, answer),
            logit_bias=dict(ask.logit_bias),
            presence_penalty=ask.presence_penalty,
            frequency_penalty=ask.frequency_penalty,
            logprobs=logprobs,
            prompt_logprobs=ask.echo and ask.logprobs is not None,
        )
        return made if constraint is None else replace(made, choose=self._chooser(ask, made, constraint))

    def _constraint(self, ask: Ask) -> Any:
        """What an answer must be, None for anything. Raises ApiError for a schema that cannot be held to."""
        if ask.format is None and not ask.forced:
            return None
        from assay.methods.inference import awrs

        if not self.ends:
            raise ApiError(400, "this model has no end token, so no answer in a form would end", param=_form(ask))
        wanted = call_schema(ask.forced) if ask.forced else None if ask.format is None else ask.format.schema
        try:
            return awrs.json_object() if wanted is None else awrs.json_schema(wanted)
        except Exception as error:  # the schema is the client's
            message = f"this JSON schema cannot be held to: {str(error)[:300]}"
            raise ApiError(400, message, param=_form(ask)) from None

    def _chooser(self, ask: Ask, settings: Settings, constraint: Any) -> Callable[[Tensor, list[int]], int]:
        from assay.methods.inference import awrs

        chooser = awrs.Chooser(
            constraint,
            self.token_bytes,
            settings.ends,
            temperature=ask.temperature,
            top_p=settings.top_p,
            seed=settings.seed % (1 << 64),  # it may be negative
            rejections_before_mask=REJECTIONS_BEFORE_MASK,
        )

        def choose(logits: Tensor, made: list[int]) -> int:
            try:
                return int(chooser(logits, made))
            except Exception as error:
                message = f"no token goes on with the answer in the form that was asked for ({type(error).__name__})"
                raise ApiError(400, message, param=_form(ask), code="form_not_met") from error

        return choose

    @functools.cached_property
    def token_bytes(self) -> Any:
        """The bytes of every token. Raises ApiError where the tokenizer does not show them."""
        from assay.methods.inference.awrs import TokenBytes

        try:
            return TokenBytes(self._reads_with)
        except (TypeError, ValueError) as error:
            raise ApiError(400, f"not supported by this model, whose tokenizer hides its bytes: {error}") from None

    @functools.cached_property
    def why_alike(self) -> str:
        """Why texts of different lengths are not embedded in one pass; found when it is first asked for, by running the model."""
        return why_alike(self.model)

    def _echo(self, ask: Ask, prompt: str | list[int], ids: list[int]) -> Echo:
        if ask.logprobs is None:
            return Echo(prompt if isinstance(prompt, str) else str(self._reads_with.decode(ids)))
        text, starts, so_far = Text(self._reads_with, [], self.silent), [], 0
        for token in ids:
            starts.append(so_far)
            so_far += len(text.add(token))
        shown = prompt if isinstance(prompt, str) else str(self._reads_with.decode(ids))
        return Echo(shown, tuple(starts))

    # ---- in the event loop

    def start(self, job: Job) -> Running:
        """Hand a job to the scheduler. Raises ApiError for what it cannot take."""
        return Running(self, job)

    def shown(self, token: int) -> tuple[str, bytes]:
        """A token as log-probabilities name it, and its bytes: its text, or `bytes:` and escapes where it is no whole character."""
        try:
            data = bytes(self.token_bytes.of(token))
        except (LookupError, ValueError):
            data = b""
        if not data:
            text = self.tokenizer.convert_ids_to_tokens(token)
            data = text.encode() if isinstance(text, str) else b""
        try:
            return data.decode(), data
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data), data

    def stop(self) -> None:
        """End what is running at once; its clients are told. May be called from any thread."""
        for inbox in list(self.inboxes):
            inbox.put(0, going_down())

    def close(self, drain_s: float = 0.0) -> None:
        """End the scheduler, once what runs has had `drain_s` seconds. Blocks."""
        self.scheduler.stop(drain_s=drain_s)


class Running:
    """The answers of a job on their way. Whoever starts one cancels it in the end: that frees what still runs."""

    def __init__(self, engine: Engine, job: Job) -> None:
        self._engine, self._inbox = engine, Inbox(asyncio.get_running_loop())
        self._answers = [Answer(engine, job, number) for number in range(len(job.settings))]
        self._tickets: list[Any] = []
        engine.inboxes.add(self._inbox)
        try:
            for number, settings in enumerate(job.settings):
                tell = functools.partial(self._inbox.put, number)
                self._tickets.append(engine.scheduler.submit(job.prompts[job.prompt_of(number)], settings, tell))
        except BaseException as error:
            self.cancel()
            raise _not_taken(error) from None

    async def take(self) -> list[Piece]:
        """The pieces that came since the last call, at least one; an empty list when all answers are over.

        Raises ApiError 503 when the server stops or has no memory, and 500 where the model's numbers are not finite; what else goes
        wrong in the scheduler is raised as it is.
        """
        while not all(answer.over for answer in self._answers):
            made: dict[int, list[Event]] = {}
            for number, event, when in await self._inbox.take():
                if isinstance(event, Exception):
                    raise event
                answer = self._answers[number]
                self._engine.latencies.observe(answer.began, answer.last, when, len(event.tokens))
                answer.last = when if event.tokens else answer.last
                made.setdefault(number, []).append(event)
            pieces = [piece for number, events in made.items() if (piece := self._answers[number].take(events))]
            for piece in pieces:
                if piece.finish:  # a stop string ends what the scheduler would go on with
                    self._tickets[piece.index].cancel()
            if pieces:
                return pieces
        return []

    def cancel(self) -> None:
        """Nobody waits for these answers any more."""
        self._engine.inboxes.discard(self._inbox)
        for ticket in self._tickets:
            ticket.cancel()


class Inbox:
    """What the scheduler's thread hands to the event loop: one call wakes it for all that came since the last."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop, self._there, self._rung = loop, asyncio.Event(), False
        self._waiting: deque[tuple[int, Event | Exception, float]] = deque()

    def put(self, number: int, event: Event | Exception) -> None:
        """Called in the scheduler's thread: never blocks and never fails."""
        self._waiting.append((number, event, time.monotonic()))
        if not self._rung:
            self._rung = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                self._loop.call_soon_threadsafe(self._there.set)

    async def take(self) -> Iterable[tuple[int, Event | Exception, float]]:
        """All that has come, at least the wake-up; once taken it is gone."""
        await self._there.wait()
        self._there.clear()
        self._rung = False  # before what is there is taken: what comes from now on rings again
        taken = []
        while self._waiting:
            taken.append(self._waiting.popleft())
        return taken


class Answer:
    """One answer on its way from tokens to text: stops, calls of tools, and log-probabilities in step with the text."""

    def __init__(self, engine: Engine, job: Job, index: int) -> None:
        ask = job.ask
        self.index, self.settings, self.began, self.last = index, job.settings[index], job.began, 0.0
        self.over = False
        self._text = Text(engine.tokenizer, job.prompts[job.prompt_of(index)], engine.silent)
        self._stops = Stops(ask.stops)
        self._tools = ToolReader({tool.name for tool in ask.tools}) if ask.tools else None
        self._one_call, self._told = ask.one_call, 0
        self._echo = job.echoes[job.prompt_of(index)] if job.echoes else None
        self._infos = ask.logprobs is not None
        self._waits_for_prompt = self.settings.prompt_logprobs
        self._scored: list[Scored] = []
        self._tokens, self._cached, self._made, self._said = 0, 0, 0, 0
        self._logprob, self._newest = 0.0, -1

    def take(self, events: list[Event]) -> Piece | None:
        """The piece that new events make certain; None if they make none. Raises an event's error."""
        if self.over:
            return None
        piece = Piece(self.index)
        for event in events:
            if event.error is not None:
                raise _told(event.error)
            self._cached = max(self._cached, event.cached_tokens)
            if event.prompt_infos is not None:
                piece.prompt, self._waits_for_prompt = tuple(event.prompt_infos), False
            for at, token in enumerate(event.tokens):
                piece.text += self._token(token, event.infos[at] if event.infos else None)
                if self._stops.met:
                    piece.finish = "stop"
                    break
            if event.finish and not piece.finish:
                piece.text += self._stops.add(self._text.rest())
                piece.text += self._stops.rest()
                ended = self._stops.met or self._newest in self.settings.ends
                piece.finish = "stop" if ended else event.finish
            if piece.finish:
                break
        return self._whole(piece)

    def _token(self, token: int, info: TokenInfo | None) -> str:
        """The text that a token makes certain."""
        self._tokens, self._newest = self._tokens + 1, token
        if info is not None:
            self._logprob += info.logprob
        if token in self.settings.ends:
            return ""
        if info is not None and self._infos:
            self._scored.append(Scored(info, self._made))
        new = self._text.add(token)
        self._made += len(new)
        return self._stops.add(new)

    def _whole(self, piece: Piece) -> Piece | None:
        """`piece` with all that goes with its text; None if nothing is in it."""
        self._said += len(piece.text)
        cut = piece.finish is not None and not self._stops.met
        while self._scored and (cut or self._scored[0].at < self._said):
            piece.scored.append(self._scored.pop(0))
        if self._tools is not None:
            piece.text = self._tools.add(piece.text) + (self._tools.rest() if piece.finish else "")
            allowed = self._tools.calls[:1] if self._one_call else self._tools.calls
            piece.calls, piece.calls_before, self._told = allowed[self._told :], self._told, len(allowed)
            if piece.finish and allowed:
                piece.finish = "tool_calls"
        if self._echo is not None and (piece.finish or not self._waits_for_prompt):
            piece.echo, self._echo = self._echo, None
        if piece.finish:
            self.over = True
            piece.tokens, piece.cached = self._tokens, self._cached
            piece.logprob = self._logprob / max(1, self._tokens)
        return piece if piece.text or piece.finish or piece.calls or piece.echo or piece.scored else None


READERS: dict[str, Callable[[Mapping[str, Any]], Ask]] = {
    "completions": request.completion,
    "chat/completions": request.chat,
    "responses": request.response,
}


def seed_of(seed: int | None, answer: int) -> int:
    """The seed of an answer: the request's own for the first, numbers made of it for the others, fresh ones without it."""
    if seed is None:
        return secrets.randbits(63)
    if answer == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed} {answer}".encode()).digest()[:8], "big") >> 1


def context_of(model: Any, tokenizer: Any) -> int:
    """The most tokens a prompt and its answer may have together: the model's limit, else the tokenizer's, else 2,048."""
    limit = context_length(model)
    usual = getattr(tokenizer, "model_max_length", 0)
    return limit if limit is not None else int(usual) if 0 < usual < 10**7 else UNKNOWN_CONTEXT


def fingerprint(model: nn.Module, recipe: str = "") -> str:
    """A name for a model and its recipe that is the same in every process: a hash of what it consists of.

    It covers the names, shapes and types of all weights, some numbers of each, the settings that assay's transforms left on the
    model, the recipe's text, and the version of torch.
    """
    settings = {name: getattr(value, "__name__", value) for name, value in getattr(model, "assay_settings", {}).items()}
    found = hashlib.sha256(f"{torch.__version__} {recipe} {settings}".encode())
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            continue
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.numel() and tensor.device.type != "meta" and tensor.is_contiguous():
            some = tensor.detach().reshape(-1)[:: max(1, tensor.numel() // 16)]
            found.update(repr(some.double().tolist()).encode())
    return f"fp_{found.hexdigest()[:12]}"


def _ends(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end an answer."""
    for owner in (model.generation_config, model.config.get_text_config(decoder=True), tokenizer):
        given = getattr(owner, "eos_token_id", None)
        if given is not None:
            return set(given) if isinstance(given, list | tuple) else {int(given)}
    return set()


def _form(ask: Ask) -> str:
    """The field of the request that asks for an answer in a form."""
    return "tool_choice" if ask.forced else "text.format" if ask.told else "response_format"


def _too_long(message: str, param: str) -> ApiError:
    return ApiError(400, message, param=param, code="context_length_exceeded")


def _not_taken(error: BaseException) -> BaseException:
    """What a client is told when the scheduler does not take its prompt."""
    if isinstance(error, ValueError | TypeError):
        return ApiError(400, str(error), param="prompt", code="context_length_exceeded")
    return _told(error)


def _told(error: BaseException) -> BaseException:
    """What a client is told of an error of the scheduler; itself where nothing is known of it, which is a failure of the server."""
    if isinstance(error, Stopped):
        return going_down()
    if isinstance(error, MemoryError):
        return overloaded(f"there is no memory for this prompt ({type(error).__name__})")
    if isinstance(error, FloatingPointError):
        message = "the model gives no finite numbers for this answer: its weights or what it makes of the prompt hold NaN or infinity"
        return ApiError(500, message, code="not_finite")
    return error

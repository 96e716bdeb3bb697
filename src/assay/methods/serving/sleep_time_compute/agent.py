"""The agent: it sleeps over a context before anybody asks, and answers with what it kept."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from assay import checks
from assay.methods.serving.sleep_time_compute.chat import Chat, Message, Reply, reply_of
from assay.methods.serving.sleep_time_compute.ledger import Ledger, Phase
from assay.methods.serving.sleep_time_compute.prompts import FINISH, MEMORY_LIMIT, RETHINK, TOOLS, Prompts, Words
from assay.methods.serving.sleep_time_compute.store import Memory, Store, memory_key


class SleepError(RuntimeError):
    """A sleep that ended without a memory. Its tokens are in the ledger all the same."""


@dataclass(frozen=True)
class Answer:
    """An answer, the tokens generated for it, and whether there was a memory to answer from."""

    text: str
    completion_tokens: int
    slept: bool


class SleepTimeAgent:
    """Works a context out ahead of the questions about it, and answers them with few tokens.

        agent = SleepTimeAgent(Store(), HttpChat("http://127.0.0.1:8000/v1", "my-model"), budget=0)
        agent.prepare(context)                       # in idle time
        agent.answer("How many in all?").text        # when somebody asks

    - `chat` is any function of that form (`chat.Chat`), `model` its name for the store, `sleeper` the one that sleeps, if another.
    - `budget` is how long answers may be, 0 to 4; `answer` takes another for one question.
    - `sleeps` independent sleeps make as many blocks of memory, at the same time: at temperature 0 they would all say the same, so that
      more than one needs a `temperature` above it. Answers are asked for at temperature 0.
    - `turns` calls of `max_tokens` tokens is what one sleep takes at most, `answer_tokens` what an answer does (None: as the chat decides).

    A sleep calls `rethink_memory`, which replaces its block, until `finish_rethinking_memory`. A memory of more than 5,000 characters
    is refused and the model told so; nothing is cut off. A model that calls no tool keeps its first text (our choice: small models
    cannot call tools); `tools=False` offers none, for servers that refuse them (`Words(sleeper=PLAIN_SLEEPER)` does not speak of them).
    Of several sleeps those count that came to a memory. Sleepers are never shown a question. Two threads that prepare one context
    sleep over it once.
    Raises TypeError and ValueError for arguments out of range.

    When NOT to use it: where a context is asked about once and nobody is idle, where questions cannot be foreseen (see `Gate`), or where a
    wrong memory is worse than a late answer: what is wrong in it is believed.

    >>> def chat(messages, **settings):
    ...     return ("7", 1) if "Question" in messages[-1]["content"] else ("3 + 4 = 7", 5)
    >>> agent = SleepTimeAgent(Store(), chat)
    >>> agent.prepare("Ann has 3 pears and Bob has 4.").blocks
    ('3 + 4 = 7',)
    >>> agent.answer("How many in all?").text, agent.ledger.total("sleep").completion, agent.ledger.total("test").completion
    ('7', 5, 1)
    """

    def __init__(
        self,
        store: Store,
        chat: Chat | Callable[..., tuple[str, int]],
        budget: int = 0,
        *,
        model: str = "",
        sleeper: Chat | Callable[..., tuple[str, int]] | None = None,
        prompts: Prompts | None = None,
        ledger: Ledger | None = None,
        sleeps: int = 1,
        temperature: float = 0.0,
        seed: int = 0,
        tools: bool = True,
        turns: int = 20,
        max_tokens: int | None = None,
        answer_tokens: int | None = None,
    ) -> None:
        if not isinstance(store, Store):
            raise TypeError(f"store must be a Store, got {checks.shown(store)}")
        for name, function in (("chat", chat), ("sleeper", sleeper)):
            if function is not None and not callable(function):
                raise TypeError(f"{name} must be a function, got {checks.shown(function)}")
        self.store, self.chat, self.sleeper = store, chat, chat if sleeper is None else sleeper
        self.model = model
        self.budget = checks.whole("budget", budget, low=0)
        self.prompts: Prompts = Words() if prompts is None else prompts
        self.ledger = Ledger() if ledger is None else ledger
        self.sleeps = checks.whole("sleeps", sleeps, low=1)
        self.temperature = checks.number("temperature", temperature, low=0)
        if self.sleeps > 1 and self.temperature == 0:
            raise ValueError(f"temperature must be above 0 for {self.sleeps} sleeps to differ, got 0")
        self.seed = checks.whole("seed", seed)
        self.tools = TOOLS if checks.flag("tools", tools) else ()
        self.turns = checks.whole("turns", turns, low=1)
        self.max_tokens = None if max_tokens is None else checks.whole("max_tokens", max_tokens, low=1)
        self.answer_tokens = None if answer_tokens is None else checks.whole("answer_tokens", answer_tokens, low=1)
        self._last: str | None = None
        self._at_work: dict[str, _Door] = {}
        self._lock = threading.Lock()

    def key(self, context: str) -> str:
        """The name of a context's memory: it changes with the context, the model, the prompts and how often it is slept on."""
        version = f"{self.prompts.version} {self.sleeps} {self.temperature} {self.seed}"
        return memory_key(context, self.model, version)

    def prepare(self, context: str) -> Memory:
        """Sleep over a context, unless its memory is there. Raises SleepError where no memory came of it, and what `chat` raises."""
        key = self.key(_text("context", context))
        with self._alone(key):
            memory = self.store.get(key)
            if memory is None:
                memory = self._slept(context, key)
                self.store.put(key, memory)
        self._last = context
        return memory

    def answer(
        self, question: str, context: str | None = None, *, budget: int | None = None, memory: bool = True
    ) -> Answer:
        """Answer a question about a context (None: the one prepared last), with its memory if there is one and `memory` allows it.

        Without a memory this is the baseline: the same messages without the memory, all thinking left to `budget`. Nothing sleeps
        here. Raises ValueError when no context was given or prepared, and for a budget that the prompts do not have.
        """
        context = self._last if context is None else _text("context", context)
        if context is None:
            raise ValueError("context must be given, or prepared before")
        key = self.key(context)
        kept = self.store.get(key) if checks.flag("memory", memory) else None
        level = self.budget if budget is None else checks.whole("budget", budget, low=0)
        messages = self.prompts.test(context, () if kept is None else kept.blocks, _text("question", question), level)
        reply = self._ask("test", self.chat, messages, key, max_tokens=self.answer_tokens)
        return Answer(reply.text, reply.completion_tokens, kept is not None)

    def warm(self, context: str | None = None, *, budget: int | None = None) -> None:
        """Have the server read what all questions about a context begin with, so that it keeps the prefix: one token, in idle time.

        Of use with a server that keeps prefixes; the tokens are booked as "warm". Raises as `answer`.
        """
        context = self._last if context is None else _text("context", context)
        if context is None:
            raise ValueError("context must be given, or prepared before")
        key = self.key(context)
        kept = self.store.get(key)
        level = self.budget if budget is None else checks.whole("budget", budget, low=0)
        messages = self.prompts.test(context, () if kept is None else kept.blocks, "", level)
        self._ask("warm", self.chat, messages, key, max_tokens=1)

    # ---- sleeping

    def _slept(self, context: str, key: str) -> Memory:
        if self.sleeps == 1:
            made = [self._sleep(context, key, self.seed)]
        else:
            with ThreadPoolExecutor(self.sleeps) as pool:
                made = list(pool.map(lambda n: self._sleep(context, key, self.seed + n), range(self.sleeps)))
        blocks = tuple(block for block, _ in made if block)
        if not blocks:
            raise SleepError(f"no memory after {self.turns} turns of sleep")
        return Memory(blocks, self.store.now(), sum(tokens for _, tokens in made))

    def _sleep(self, context: str, key: str, seed: int) -> tuple[str, int]:
        """One sleep: its block of memory, empty if it came to none, and the tokens it generated."""
        messages, block, tokens = self.prompts.sleep(context), "", 0
        for _ in range(self.turns):
            reply = self._ask(
                "sleep", self.sleeper, messages, key, tools=self.tools, temperature=self.temperature, seed=seed,
                max_tokens=self.max_tokens,
            )  # fmt: skip
            tokens += reply.completion_tokens
            if not reply.calls:
                text = reply.text.strip()
                if block or (text and len(text) <= MEMORY_LIMIT):
                    return block or text, tokens
                said = f"It must have 1 to {MEMORY_LIMIT} characters, and has {len(text)}: write the memory again."
                messages = [*messages, {"role": "assistant", "content": reply.text}, {"role": "user", "content": said}]
                continue
            block, finished, results = _called(reply, block)
            if finished:
                return block, tokens
            messages = [*messages, _spoken(reply), *results]
        return block, tokens

    def _ask(self, phase: Phase, chat: Any, messages: Sequence[Message], key: str, **settings: Any) -> Reply:
        """The one place where a model is called, and where the call is booked."""
        start = time.perf_counter()
        reply = reply_of(chat(messages, **settings))
        self.ledger.book(phase, reply, context=key, seconds=time.perf_counter() - start)
        return reply

    @contextmanager
    def _alone(self, key: str) -> Iterator[None]:
        """One thread at a time for each key; what is held for a key goes when nobody is at it."""
        with self._lock:
            door = self._at_work.setdefault(key, _Door())
            door.waiting += 1
        try:
            with door.lock:
                yield
        finally:
            with self._lock:
                door.waiting -= 1
                if not door.waiting:
                    del self._at_work[key]


class _Door:
    def __init__(self) -> None:
        self.lock, self.waiting = threading.Lock(), 0


def _called(reply: Reply, block: str) -> tuple[str, bool, list[Message]]:
    """The block after a reply's calls, whether the sleep is over, and what the tools say to each call."""
    results, finished = [], False
    for call in reply.calls:
        if call.name == RETHINK:
            said, block = _rethought(call.arguments, block)
        elif call.name == FINISH:
            finished = bool(block)
            said = "done" if finished else f"there is no memory yet: call {RETHINK} first"
        else:
            said = f"there is no tool {call.name[:100]!r}"
        results.append({"role": "tool", "tool_call_id": call.id, "content": said})
    return block, finished, results


def _rethought(arguments: str, block: str) -> tuple[str, str]:
    """What the tool says, and the block after it: the new one, or the old one where the new one cannot be."""
    try:
        given = json.loads(arguments)
        text = given["new_memory"] if isinstance(given, Mapping) else None
    except (ValueError, KeyError, RecursionError):
        text = None
    if not isinstance(text, str) or not text.strip():
        return "new_memory must be a text that is not empty", block
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a pair of surrogates: no question could be sent with it
        return "new_memory must be Unicode text, got a lone surrogate: nothing was changed", block
    if len(text) > MEMORY_LIMIT:
        return f"new_memory must have at most {MEMORY_LIMIT} characters, got {len(text)}: nothing was changed", block
    return "kept", text


def _spoken(reply: Reply) -> Message:
    """A reply with calls as the message that stands before their results."""
    calls = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in reply.calls
    ]
    return {"role": "assistant", "content": reply.text, "tool_calls": calls}


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be text, got {checks.shown(value)}")
    if not value.strip():
        raise ValueError(f"{name} must not be empty")
    return value

"""The ways to produce one text, each in the leanest loop there is for it, on a model so wide that its arithmetic takes the time.

The models that were trained here are so small that a step's cost is Python's. So the groups that the trained one made on unseen text are
replayed by a wider model of as many layers with new weights: what it computes is noise, how long it takes is not.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList

from assay.experiments.inference.hamburger.arms import CONFIDENCE, HEAD, Task, trained_on
from assay.experiments.inference.hamburger.losses import PROMPT, SEEDS, decoded, windows
from assay.experiments.inference.language import small_llama
from assay.methods.builtin.decode_loop import Decoder
from assay.methods.builtin.speculation import Lookup, PagedEngine, speculate
from assay.methods.core.models.decoder import Parts
from assay.methods.inference.hamburger import Decoded, HamburgerForCausalLM, decode

DRAFT = 8  # bytes to a draft of speculative decoding at most
CHOSEN = 1e9  # the score of a byte that has to be chosen


class Told(LogitsProcessor):
    """Makes any loop of transformers choose the bytes of a given text: the scores of one row favour its next byte."""

    def __init__(self, text: list[int]) -> None:
        self.text = text

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        place = input_ids.shape[1]
        if place < len(self.text):
            scores = scores.clone()
            scores[:, self.text[place]] = CHOSEN
        return scores


class ToldEngine:
    """An engine of speculative decoding whose model chooses the bytes of a given text."""

    def __init__(self, engine: PagedEngine, text: list[int]) -> None:
        self.engine, self.text, self.more = engine, text, engine.more

    @property
    def length(self) -> int:
        return self.engine.length

    def extend(self, tokens: list[int]) -> Tensor:
        start = self.engine.length
        scores = self.engine.extend(tokens)
        for row in range(len(tokens)):
            if start + row + 1 < len(self.text):
                scores[row, self.text[start + row + 1]] = CHOSEN
        return scores

    def crop(self, length: int) -> None:
        self.engine.crop(length)


class Replaying(HamburgerForCausalLM):
    """Ends its groups where `ends` says so, by the place of each token in its text; its stop head runs, and is not listened to."""

    ends: list[bool]

    def decide(self, cache: Any, rows: list[int], vectors: Tensor) -> None:
        super().decide(cache, rows, vectors)
        for row in rows:
            if cache.position[row] < len(self.ends):
                cache.closes[row] = self.ends[cache.position[row]]


class Preallocated(Cache):
    """Keys and values of one row in memory that is taken once."""

    def __init__(self, config: Any, tokens: int) -> None:
        super().__init__(layers=[])
        shape = (config.num_hidden_layers, 1, config.num_key_value_heads, tokens, config.head_dim)
        self.keys, self.values, self.length = torch.empty(shape), torch.empty(shape), 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        end = self.length + key_states.shape[2]
        seen = []
        for held, new in ((self.keys[layer_idx], key_states), (self.values[layer_idx], value_states)):
            held[:, :, self.length : end] = new
            seen.append(held[:, :, :end])
        return seen[0], seen[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length


@torch.no_grad()
def token_by_token(parts: Parts, ids: Tensor) -> list[int]:
    """The base's layers in a loop over memory taken once, a pass a byte: the bytes behind the prompt."""
    cache = Preallocated(parts.config, ids.shape[1])
    masks = dict.fromkeys(parts.kinds)  # none is needed: a prompt is causal by itself, a single byte sees all
    told, made = ids[:, :PROMPT], list[int]()
    while True:
        run = parts.begin(told, masks, cache=cache)
        x = run.hidden
        for index in range(len(parts.layers)):
            x = parts.layer(index, x, run)
        cache.length += told.shape[1]
        logits = parts.logits(parts.norm(x[:, -1:]))[0, 0]
        logits[ids[0, cache.length]] = CHOSEN
        made.append(int(logits.argmax()))
        if cache.length + 1 == ids.shape[1]:
            return made
        told = torch.tensor([[made[-1]]])


def in_groups(model: Any, ids: Tensor) -> Decoded:
    """HAMburger's own loop over one row."""
    text = ids[0].tolist()

    def choose(logits: Tensor, rows: list[int], places: list[int]) -> Tensor:
        for row, place in enumerate(places):
            logits[row, text[PROMPT + place]] = CHOSEN
        return logits.argmax(-1)

    return decode(model, ids[:, :PROMPT], max_new_tokens=ids.shape[1] - PROMPT, choose=choose, eos_token_id=[])


def looked_up(model: Any, ids: Tensor) -> list[int]:
    """transformers' own speculative decoding with drafts from the text so far."""
    made = model.generate(
        ids[:, :PROMPT],
        attention_mask=torch.ones(1, PROMPT, dtype=torch.int64),
        max_new_tokens=ids.shape[1] - PROMPT,
        do_sample=False,
        prompt_lookup_num_tokens=DRAFT,
        logits_processor=LogitsProcessorList([Told(ids[0].tolist())]),
    )
    found: list[int] = made[0, PROMPT:].tolist()
    return found


@torch.no_grad()
def begun(model: Any, decoder: Any, ids: Tensor) -> tuple[ToldEngine, Tensor]:
    """assay's compiled loop behind the prompt, and the scores (vocabulary,) of the first byte."""
    text, kept = ids[0].tolist(), DynamicCache(config=model.config)
    scores: Tensor = model(input_ids=ids[:, :PROMPT], cache=kept, use_cache=True, logits_to_keep=1).logits[0, -1]
    scores[text[PROMPT]] = CHOSEN
    return ToldEngine(PagedEngine.of_cache(decoder, kept, len(text) - PROMPT + DRAFT + 1), text), scores


@torch.no_grad()
def compiled(model: Any, decoder: Any, ids: Tensor) -> list[int]:
    """Speculative decoding with drafts from the text so far in assay's compiled loop."""
    engine, scores = begun(model, decoder, ids)
    return speculate(engine, scores, Lookup(ids[0, :PROMPT].tolist()), ids.shape[1] - PROMPT, most=DRAFT)


@torch.no_grad()
def one_at_a_time(model: Any, decoder: Any, ids: Tensor) -> list[int]:
    """assay's compiled loop, a pass a byte."""
    engine, scores = begun(model, decoder, ids)
    made = [int(scores.argmax())]
    while PROMPT + len(made) < ids.shape[1]:
        made.append(int(engine.extend(made[-1:])[-1].argmax()))
    return made


def typical(groups: Tensor, n: int) -> Tensor:
    """`n` of (rows, tokens) group numbers that stand for all by how many groups they have, in that order: (n,) int64.

    Rows are put in order and cut into `n` parts of one size, of which the middle ones are taken.
    """
    order = groups.amax(1).argsort(stable=True)
    return order[(torch.arange(n) * 2 + 1) * len(order) // (2 * n)]


class Decoding:
    """The ways to produce `replays` rows of held-out records by a base of `width` and by HAMburger on it, in the trained one's groups."""

    def __init__(self, task: Task, replays: int, width: int) -> None:
        ids = windows(task)
        groups = decoded(trained_on("hamburger", task, SEEDS[0]), ids)[1]
        rows = typical(groups, replays)
        ids, groups = ids[rows], groups[rows]
        ends = torch.ones_like(groups, dtype=torch.bool)
        ends[:, :-1] = groups[:, 1:] != groups[:, :-1]
        self.rows, self.ends = ids.split(1), ends.tolist()
        layers = task["layers"]
        vocab = 3 * width * layers  # of 12 width**2 weights a layer, the head has a quarter as many as all of them
        self.base = small_llama(width=width, layers=layers, heads=max(2, width // 64), vocab=vocab).eval()
        self.parts = Parts(self.base)
        self.model = Replaying.from_base(
            self.base,
            micro_layers=task["micro_layers"],
            max_steps=task["max_steps"],
            merger_heads=max(2, width // HEAD),
            confidence=CONFIDENCE,
        ).eval()
        self.decoder = Decoder(self.base, weights="fp32", cache="float32")
        self.narrow = Decoder(self.base, weights="int8", cache="float32")
        self.tokens = sum(row.shape[1] - PROMPT for row in self.rows)

    def plain(self) -> list[Any]:
        return [token_by_token(self.parts, row) for row in self.rows]

    def groups(self) -> list[Any]:
        return self._in_groups(CONFIDENCE, self.ends)

    def groups_of_one(self) -> list[Any]:
        return self._in_groups(2.0, [[True] * len(ends) for ends in self.ends])

    def _in_groups(self, confidence: float, ends: list[list[bool]]) -> list[Any]:
        config: Any = self.model.config
        config.confidence, made = confidence, []
        for row, own in zip(self.rows, ends, strict=True):
            self.model.ends = own
            made.append(in_groups(self.model, row))
        return made

    def free(self) -> list[Any]:
        return [looked_up(self.base, row) for row in self.rows]

    def exact(self) -> list[Any]:
        return [compiled(self.base, self.decoder, row) for row in self.rows]

    def plain_compiled(self) -> list[Any]:
        return [one_at_a_time(self.base, self.decoder, row) for row in self.rows]

    def in_8_bits(self) -> list[Any]:
        return [compiled(self.base, self.narrow, row) for row in self.rows]

    def counted(self) -> dict[str, Any]:
        """Entries, passes and bytes a second of HAMburger and of the base side by side: an entry and a pass of the base a byte."""
        made = self.groups()
        config = self.base.config
        return {
            "tokens": self.tokens,
            "bytes an entry": self.tokens / sum(len(one.groups[0]) for one in made),
            "kv_entries": {
                "hamburger": sum(one.kv_entries[0] for one in made),
                "base": self.tokens + len(self.rows) * (PROMPT - 1),
                "prompts": len(self.rows) * PROMPT,
            },
            "tokens_a_second": self.tokens_a_second(),
            "kv_bytes_an_entry": 8 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim,
            "passes of the base": {"hamburger": sum(one.macro_steps + 1 for one in made), "base": self.tokens},
            "micro_steps": sum(one.micro_steps for one in made),
            "group_sizes": [one.groups[0] for one in made],
        }

    def tokens_a_second(self) -> dict[str, float]:
        """Bytes a second of each way, of one run after another: to stand beside the entries; the trial is the measurement."""

        def seconds(run: Callable[[], Any]) -> float:
            run()
            start = time.perf_counter()
            run()
            return time.perf_counter() - start

        ways = {
            "hamburger": self.groups,
            "base": self.plain,
            "base, compiled": self.plain_compiled,
            "transformers' look-up": self.free,
            "compiled look-up": self.exact,
            "compiled look-up, weights of 8 bits": self.in_8_bits,
        }
        return {name: self.tokens / seconds(run) for name, run in ways.items()}

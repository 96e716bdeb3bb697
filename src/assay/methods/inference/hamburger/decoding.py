"""Generation in rounds: a macro step of all rows together, then micro steps of those whose groups go on.

`model.generate` works too, and does whatever transformers' loop does, token by token for all rows: rows then close their groups at
different steps, so that nearly every step runs the base for a few of them. In rounds the base runs for all rows at once, and rows that
are done are not run at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from assay import checks
from assay.methods.core.generation.cache import position_ids

Choose = Callable[[Tensor, list[int], list[int]], Tensor]


@dataclass
class Decoded:
    """What `decode` made: of each row the new `tokens` (up to and with an end), the sizes of their `groups`, and its `kv_entries`.

    `kv_entries` are those held when the row ended, its prompt's included; the last group is never put in, since nothing follows it.
    `macro_steps` and `micro_steps` are passes after the prompt, for all rows together; `macro_rows` and `micro_rows` count rows in them.
    """

    tokens: list[list[int]]
    groups: list[list[int]]
    kv_entries: list[int]
    macro_steps: int = 0
    micro_steps: int = 0
    macro_rows: int = 0
    micro_rows: int = 0


@torch.no_grad()
def decode(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    choose: Choose | None = None,
) -> Decoded:
    """Continue left-padded prompts (batch, tokens) by a `HamburgerForCausalLM`, greedily or, with `do_sample`, by sampling.

    `temperature`, `top_k` (0: off) and `top_p` (1: off) as in transformers; random numbers are torch's. An end token (default: the
    model's) ends its row, inside a group too. `choose(logits, rows, places)` takes the choice over: logits (rows, vocabulary) float32,
    which rows they are of, and the number of the token to be chosen in each. Greedily a row's tokens are those of `model.generate`.
    Raises ValueError or TypeError for settings out of range, and what the model raises.
    """
    limit = checks.whole("max_new_tokens", max_new_tokens, low=1)
    if eos_token_id is None:
        eos_token_id = getattr(model.generation_config, "eos_token_id", None)
    ends = set() if eos_token_id is None else {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id)
    pick = choose or _chooser(do_sample, temperature, top_k, top_p)
    more: dict[str, Any] = {}
    if attention_mask is not None and not bool(attention_mask.all()):
        more = {"attention_mask": attention_mask, "position_ids": position_ids(attention_mask)}
    out = model(input_ids, use_cache=True, logits_to_keep=1, prompt=True, **more)
    cache, logits = out.cache, out.logits[:, -1].float()
    count = len(input_ids)
    made: list[list[int]] = [[] for _ in range(count)]
    done = Decoded(made, [[] for _ in range(count)], [0] * count)
    names = list(range(count))  # of the cache's rows
    heads = [len(cache.groups(row)) for row in range(count)]  # entries of the prompts
    while names:
        going = list(range(len(names)))
        waiting: dict[int, int] = {}
        while going:
            tokens = pick(logits, [names[row] for row in going], [len(made[names[row]]) for row in going]).tolist()
            further: dict[int, int] = {}
            for row, token in zip(going, tokens, strict=True):
                mine = made[names[row]]
                mine.append(token)
                if token in ends or len(mine) == limit:
                    sizes = cache.groups(row)[heads[row] :]
                    if cache.open[row]:  # the last token is not told to the model: nothing follows
                        sizes[-1] += 1
                    else:
                        sizes.append(1)
                    done.groups[names[row]], done.kv_entries[names[row]] = sizes, cache.kv_entries[row]
                elif cache.closes[row]:
                    waiting[row] = token
                else:
                    further[row] = token
            going = list(further)
            if going:
                logits = _fed(model, cache, going, list(further.values()))
                done.micro_steps, done.micro_rows = done.micro_steps + 1, done.micro_rows + len(going)
        alive = sorted(waiting)
        if alive and len(alive) < len(names):
            cache.batch_select_indices(torch.tensor(alive))
            names, heads = [names[row] for row in alive], [heads[row] for row in alive]
        elif not alive:
            break
        logits = _fed(model, cache, list(range(len(names))), [waiting[row] for row in alive])
        done.macro_steps, done.macro_rows = done.macro_steps + 1, done.macro_rows + len(names)
    return done


def _fed(model: Any, cache: Any, rows: list[int], tokens: list[int]) -> Tensor:
    vectors = model.advance(cache, rows, torch.tensor(tokens, device=cache.pending.device))
    found: Tensor = model.parts.logits(vectors[:, None])[:, 0].float()
    return found


def _chooser(do_sample: bool, temperature: float, top_k: int, top_p: float) -> Choose:
    """Greedy, or sampling by transformers' own processors."""
    if not checks.flag("do_sample", do_sample):
        return lambda logits, rows, places: logits.argmax(-1)
    warpers = LogitsProcessorList()
    if (temperature := checks.number("temperature", temperature, above=0)) != 1:
        warpers.append(TemperatureLogitsWarper(temperature))
    if top_k := checks.whole("top_k", top_k, low=0):
        warpers.append(TopKLogitsWarper(top_k))
    if (top_p := checks.number("top_p", top_p, above=0, high=1)) < 1:
        warpers.append(TopPLogitsWarper(top_p))

    def sample(logits: Tensor, rows: list[int], places: list[int]) -> Tensor:
        nothing: Any = torch.empty(len(logits), 0, dtype=torch.int64, device=logits.device)
        scores: Any = warpers(nothing, logits)
        return torch.multinomial(scores.softmax(-1), 1)[:, 0]

    return sample


class GroupDrafter:
    """Drafts for speculative decoding: the tokens that HAMburger would emit after one macro step, for the base to verify.

    It has what a drafter of `assay.methods.builtin.speculation` needs (`cost`, `add`, `draft`): pass it to its `speculate`. What was
    verified goes in as the paper's release puts it in: all new tokens but the last merged (in groups of `max_steps` at most), the last by
    itself. What was only guessed never goes in, so nothing has to be taken back. `cost` is that of a drafted token as a share of a
    pass of the verifying model.
    """

    def __init__(self, model: Any, tokens: Sequence[int] = (), *, cost: float = 1.0) -> None:
        self.model, self.cost = model, checks.number("cost", cost, low=0)
        self.tokens = list(tokens)
        self._cache = model.new_cache(1)
        self._told = 0
        self._logits: Tensor | None = None

    def add(self, tokens: Sequence[int]) -> None:
        """Take in the next tokens of the sequence."""
        self.tokens.extend(tokens)

    @torch.no_grad()
    def draft(self, count: int, sampling: Any = None) -> tuple[list[int], None]:
        """Up to `count` next tokens, chosen greedily, also where the verifying model samples: a group, which may be shorter."""
        if count < 1 or not self.tokens:
            return [], None
        model, cache = self.model, self._cache
        if self._told < len(self.tokens):
            self._logits = self._tell(self.tokens[self._told :])
            self._told = len(self.tokens)
        assert self._logits is not None
        closes, logits, made = cache.closes[0], self._logits, list[int]()
        while True:
            made.append(int(logits.argmax(-1)))
            if len(made) == count or cache.closes[0]:
                break
            logits = _fed(model, cache, [0], made[-1:])
        cache.position[0] -= cache.open[0]
        cache.open[0], cache.closes[0] = 0, closes
        return made, None

    def _tell(self, fresh: list[int]) -> Tensor:
        """Put verified tokens in: the logits (1, vocabulary) after them."""
        model, cache = self.model, self._cache
        ids = torch.tensor([fresh], device=cache.pending.device)
        if not self._told:
            found: Tensor = model(ids, cache=cache, use_cache=True, logits_to_keep=1, prompt=True).logits[:, -1]
            return found
        most, merged = cache.max_steps, len(fresh) - 1
        sizes = [most] * (merged // most) + [merged % most] * (merged % most > 0) + [1]
        counts = torch.tensor(sizes, device=ids.device)
        pieces = [F.pad(piece, (0, max(sizes) - len(piece))) for piece in ids[0].split(sizes)]
        embeds = model.embedder(model.parts.embed(torch.stack(pieces)), counts)
        positions = cache.position[0] - 1 + counts.cumsum(0)
        hidden = model.entries(cache, [0], embeds[None], counts[None], positions[None])
        cache.seen += len(fresh)
        model.decide(cache, [0], hidden[:, -1])
        logits: Tensor = model.parts.logits(hidden[:, -1:])[:, -1]
        return logits

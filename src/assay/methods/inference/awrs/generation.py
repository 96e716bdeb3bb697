"""Constrained generation with a transformers model: a chooser of tokens, a decoding loop that takes any, and particles with caches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from assay import checks
from assay.methods.core.generation.loop import checked_prompts, prefill, why_not
from assay.methods.inference.awrs.constraints import Constraint
from assay.methods.inference.awrs.sampling import Floats, Variant, descending, gumbel_keys, log_sum, vector
from assay.methods.inference.awrs.smc import Particles, Resampling, smc
from assay.methods.inference.awrs.tokens import Position, Rules, TokenBytes


class DeadEnd(RuntimeError):
    """No token of the vocabulary may follow: the constraint has accepted a text that it cannot complete."""


class Chooser:
    """Chooses tokens under a constraint, one sequence at a time: called with the logits (vocab,) and the tokens made so far.

    Tokens are tried in the order of adaptive rejection, the first allowed one is taken: it has the model's distribution (at
    `temperature`, in the nucleus `top_p`) over the allowed tokens; at temperature 0 it is the most probable allowed one. After
    `rejections_before_mask` refusals in a row a mask over the vocabulary is made, and kept for the state: that changes nothing but the
    time. Where the nucleus holds no allowed token, the most probable allowed one is taken. A token of `ends` is chosen only where the
    text is complete; `complete` says so of the last call's text, and a sequence cut off at a length limit may be incomplete.

    `made` may be anything the constraint allows; the usual next call, with one more token, costs only that token.
    Raises, when called, DeadEnd where no token may follow, and ValueError for logits that are no vector or hold NaN or +inf and for
    `made` that the constraint does not allow.

    When NOT to use it: where every state's mask is already compiled, or where the distribution over whole texts matters, which
    choosing token by token distorts (`generate_constrained`).

    >>> from assay.methods.inference.awrs.regular import regex
    >>> letters = TokenBytes.from_pieces([b"a", b"b", b""], special=[2])
    >>> choose = Chooser(regex("ab*"), letters, [2], temperature=0.0)
    >>> choose(torch.tensor([0.0, 5.0, 9.0]), []), choose(torch.tensor([0.0, 5.0, 9.0]), [0])
    (0, 2)
    """

    def __init__(
        self,
        constraint: Constraint,
        token_bytes: TokenBytes,
        ends: Iterable[int],
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
        rejections_before_mask: int = 64,
    ) -> None:
        self.rules = Rules(constraint, token_bytes, ends)
        self.temperature = checks.number("temperature", temperature, low=0)
        self.top_p = checks.number("top_p", top_p, above=0, high=1)
        self.rejections_before_mask = checks.whole("rejections_before_mask", rejections_before_mask, low=0)
        self._rng = np.random.default_rng(checks.whole("seed", seed, low=0))
        self._made: list[int] = []
        self._position = self.rules.start()
        self._calls = 0

    @property
    def calls(self) -> int:
        """Evaluations of the constraint so far, those for masks not counted (`rules.mask_calls`)."""
        return self._calls + self._position.calls

    @property
    def complete(self) -> bool:
        """Whether the text of the last call may end where it does."""
        return self._position.complete

    def __call__(self, logits: Tensor, made: Sequence[int]) -> int:
        position = self._follow(made)
        scores = vector("logits", logits)
        scores[self.rules.barred(len(scores))] = -np.inf
        keys, rest = self._keys(scores)
        token = self._first(keys, position)
        if token is None and rest is not None:
            token = self._first(rest, position)
        if token is None:
            text = self.rules.token_bytes.text(made)
            raise DeadEnd(f"no token of the vocabulary may follow the text {checks.shown(text[-80:])}")
        return token

    def _keys(self, scores: Floats) -> tuple[Floats, Floats | None]:
        """In which order tokens are tried, and in which those outside the nucleus."""
        if self.temperature == 0 or scores.max() == -np.inf:
            return scores, None
        log_p = (scores - scores.max()) / self.temperature
        log_p -= log_sum(log_p)
        keys = gumbel_keys(log_p, self._rng)
        if self.top_p == 1:
            return keys, None
        inside = nucleus(np.exp(log_p), self.top_p)
        outside = log_p.copy()
        outside[inside] = -np.inf
        within = np.full(len(keys), -np.inf)
        within[inside] = keys[inside]
        return within, outside

    def _first(self, keys: Floats, position: Position) -> int | None:
        for refused, token in enumerate(descending(keys)):
            if refused == self.rejections_before_mask:
                allowed = np.where(self.rules.mask(position.state, len(keys)), keys, -np.inf)
                best = int(allowed.argmax())
                return best if allowed[best] > -np.inf else None
            if position.allows(token):
                return token
        return None

    def _follow(self, made: Sequence[int]) -> Position:
        made = list(made)
        if made[: len(self._made)] != self._made:
            self._made, start = [], self.rules.start()
            self._step_to(start)
        for token in made[len(self._made) :]:
            self._step_to(self._position.behind(token))
            self._made.append(token)
        return self._position

    def _step_to(self, position: Position) -> None:
        self._calls += self._position.calls
        self._position = position


def nucleus(probabilities: Floats, top_p: float) -> Any:
    """The fewest most probable tokens that have `top_p` in all, the most probable first."""
    # all below this share of the rest have less than the rest together
    likely = np.flatnonzero(probabilities * len(probabilities) >= 1 - top_p)
    order = likely[np.argsort(-probabilities[likely], kind="stable")]
    reached = np.searchsorted(np.cumsum(probabilities[order]), top_p)
    return order[: int(reached) + 1]


@dataclass(frozen=True)
class Decoded:
    """New tokens, the end token left out, and why they end: at an end token ("stop") or at the limit ("length")."""

    tokens: list[int]
    finish: Literal["stop", "length"]


@torch.no_grad()
def decode(
    model: nn.Module,
    ids: Sequence[int],
    choose: Callable[[Tensor, list[int]], int],
    *,
    max_new_tokens: int,
    ends: Iterable[int],
) -> Decoded:
    """Continue a prompt of token ids, each new token being what `choose(logits, tokens made so far)` says; logits are (vocab,).

    Raises ValueError for an empty prompt, a limit below 1 and a model that does not continue prompts, and what `choose` raises.
    """
    max_new_tokens = checks.whole("max_new_tokens", max_new_tokens, low=1)
    stops = frozenset(ends)
    rows = ModelRows(model, ids)
    made: list[int] = []
    while True:
        token = choose(rows.logits[0], made)
        if token in stops:
            return Decoded(made, "stop")
        made.append(token)
        if len(made) == max_new_tokens:
            return Decoded(made, "length")
        rows.advance([0], [token])


class ModelRows:
    """Sequences behind one prompt in one batch, with a cache of their own each: `Rows` of a transformers model.

    The prompt is run once; a row is copied where two sequences part, and dropped where none goes on.
    """

    def __init__(self, model: nn.Module, ids: Sequence[int]) -> None:
        if reason := why_not(model):
            raise ValueError(f"model must continue prompts: {reason}")
        module: Any = model
        prompt = torch.tensor(checked_prompts([ids]), device=module.device)
        with torch.no_grad():
            filled = prefill(model, prompt)
        assert filled.logits is not None
        self._model, self._cache = module, filled.cache
        self.logits: Tensor = filled.logits

    @torch.no_grad()
    def advance(self, parents: list[int], tokens: list[int]) -> None:
        device = self._model.device
        if parents != list(range(len(self.logits))):
            self._cache.reorder_cache(torch.tensor(parents, device=device))
        out = self._model(
            input_ids=torch.tensor(tokens, device=device)[:, None], cache=self._cache, use_cache=True, logits_to_keep=1
        )
        self._cache, self.logits = out.cache, out.logits[:, -1]


def generate_constrained(
    model: nn.Module,
    tokenizer: Any,
    prompt: str | Sequence[int],
    constraint: Constraint,
    *,
    max_new_tokens: int,
    particles: int = 5,
    variant: Variant = "paper",
    accepts: int = 2,
    max_rejections: int | None = None,
    ess_threshold: float = 0.5,
    resampling: Resampling = "multinomial",
    temperature: float = 1.0,
    seed: int = 0,
    token_bytes: TokenBytes | None = None,
    ends: Iterable[int] | None = None,
    critic: Callable[[bytes], float] | None = None,
) -> Particles:
    """Weighted samples of what `model` writes behind `prompt` under `constraint`: adaptive weighted rejection in a particle filter.

    `prompt` is text (tokenised as it is) or token ids. `token_bytes` saves a tenth of a second where there are many calls. `ends` are
    the tokens that end a sequence, by default those of the model's generation config and of the tokenizer. The paper's settings are
    five particles, resampled below half; one particle is a single weighted sample. For the rest see `smc` and `draw`.

    Raises ValueError for an empty prompt, a model that does not continue prompts and one without end tokens, and TypeError or
    ValueError naming any other argument.

    When NOT to use it: for the most probable answer alone, or where a served answer must be one sample with no weight: `decode` with a
    `Chooser` needs one sequence and half the evaluations.
    """
    rules = Rules(
        constraint,
        TokenBytes(tokenizer) if token_bytes is None else token_bytes,
        end_tokens(model, tokenizer) if ends is None else ends,
    )
    ids = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
    return smc(
        ModelRows(model, ids),
        rules,
        np.random.default_rng(checks.whole("seed", seed, low=0)),
        particles=particles,
        max_new_tokens=max_new_tokens,
        variant=variant,
        accepts=accepts,
        max_rejections=max_rejections,
        ess_threshold=ess_threshold,
        resampling=resampling,
        temperature=temperature,
        critic=critic,
    )


def end_tokens(model: nn.Module, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a sequence, by the model's generation config and the tokenizer. Raises ValueError where there are none."""
    config = getattr(model, "generation_config", None)
    named = getattr(config, "eos_token_id", None)
    listed = [*(named if isinstance(named, (list, tuple)) else [named]), getattr(tokenizer, "eos_token_id", None)]
    found = frozenset(int(token) for token in listed if token is not None)
    if not found:
        raise ValueError("ends must be given: neither the model nor the tokenizer names a token that ends a sequence")
    return found

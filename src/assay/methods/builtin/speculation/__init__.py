"""Speculative decoding: several tokens are guessed, one pass of the model decides about all of them. Nothing is lost.

Decoding reads all weights for every token. A pass over a few tokens reads them once, so guessing the next tokens pays where guesses
are often right and a pass over k tokens costs much less than k passes. Guesses (drafts) come from the text itself, what followed
the last two or three tokens when they stood there before (`Lookup`; good for answers that quote their prompt: summaries, edits of
code, extraction), or from a small model with the same vocabulary (`DraftModel`).

Exact: greedy decoding gives the tokens of plain greedy decoding, sampling the distribution of plain sampling (`verification`).
With look-up, even sampled tokens are those that plain decoding draws with the same random numbers. One limit is not ours:
on the torch path, a pass over several tokens may sum in another order than passes over one, so two tokens whose logits lie
closer than rounding may change places, as they do in transformers' own assisted decoding. The compiled decoder gives the same bits
either way.

`apply` returns a transformers model. Its `generate` speculates for one sequence: greedy and sampling with temperature, top-k and top-p,
end tokens, minimal lengths, streamers and stopping criteria, which see the tokens one by one, and a `DynamicCache` that is passed
in. Passed to the loop beneath, with the reason logged at level INFO by `assay.methods.builtin.speculation.generate`: several
rows, masks that leave tokens out, other logits processors, caches from which tokens cannot be taken back (recurrent states,
static and quantised ones), `return_dict_in_generate`, beams, further inputs. It refuses models with a recurrent state, and
attention that treats several tokens otherwise than one (sparse and quantised prefills), for which verifying would not be exact.
Applied to a model with the compiled loop (`decode_loop`, which comes before it in a recipe), it verifies in that decoder's pages;
applied before it, it does nothing.

transformers has prompt look-up of its own (`prompt_lookup_num_tokens`), and assisted decoding. Reasons for a loop of ours, where
that one would do for plain greedy answers: it always drafts, also where that loses; it searches the whole text for every
draft and runs the logits processors on the guesses; stopping criteria see several tokens at once and stop too late; a seed gives
other tokens than without drafts; and it runs over models, not over the compiled decoder, which needs such a loop in any case.

How long drafts are follows from how many were accepted (`DraftLength`), down to none where they do not pay.

For a server, row by row, with pages and uniforms of its own:

    lookup = Lookup(prompt_ids)                                  # per row; lookup.add(tokens) after every step
    draft = lookup.propose(n)                                    # or propose(tokens, n), without an index
    logits = decoder.extend(pool, [(sequence, [last, *draft])], logits="all")
    made = verify(logits, draft, None, sampling, uniforms)       # sampling None: greedy
    sequence.length = length_before + len(made)                  # what was rejected is forgotten; made[-1] is fed next

When NOT to use it: batches (the weights are read once for all rows anyway), free text without a small draft model, and processors where
a pass over five tokens costs nearly five times one over one; `benchmarks/speculation.py` measures that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from assay import checks
from assay.methods.builtin.speculation.drafts import (
    MOST_NGRAM,
    NGRAM,
    Drafter,
    DraftModel,
    Lookup,
    propose,
    same_vocabulary,
)
from assay.methods.builtin.speculation.engines import Engine, ModelEngine, PagedEngine
from assay.methods.builtin.speculation.generate import (
    DRAFT,
    Speculation,
    SpeculationMixin,
    why_not,
    with_speculation,
)
from assay.methods.builtin.speculation.loop import Counts, DraftLength, speculate
from assay.methods.builtin.speculation.verification import probabilities, verify
from assay.methods.transform import Effect, Fit, TuneContext, only

__all__ = [
    "Counts",
    "DraftLength",
    "DraftModel",
    "Drafter",
    "Engine",
    "Lookup",
    "ModelEngine",
    "PagedEngine",
    "Speculation",
    "SpeculationMixin",
    "SpeculativeDecoding",
    "attach",
    "probabilities",
    "propose",
    "same_vocabulary",
    "speculate",
    "transform",
    "verify",
    "why_not",
]

MOST_DRAFT = 64


def attach(
    model: nn.Module,
    *,
    ngram: int = NGRAM,
    draft: int = DRAFT,
    draft_model: nn.Module | None = None,
    tokenizer: Any = None,
    draft_tokenizer: Any = None,
) -> nn.Module:
    """Make `model.generate` speculate, with drafts of up to `draft` tokens by look-up of `ngram` tokens, or by `draft_model`.

    A draft model is any causal model of transformers that knows the same tokens, on the same device; with the two tokenizers given,
    they are compared too. It is loaded by the caller, so it is for library use: a recipe has no draft model.
    Raises ValueError or TypeError, before anything is changed, for settings out of range (`ngram` 1 to 16, `draft` 1 to 64) and for
    models that do not fit.
    """
    ngram = checks.whole("ngram", ngram, low=1, high=MOST_NGRAM)
    draft = checks.whole("draft", draft, low=1, high=MOST_DRAFT)
    if reason := why_not(model):
        raise ValueError(f"speculation does not fit this model: {reason}")
    if draft_model is not None:
        if reason := why_not(draft_model):
            raise ValueError(f"draft_model must be one from which tokens can be taken back: {reason}")
        same_vocabulary(model, draft_model, tokenizer, draft_tokenizer)
        places = [next(each.parameters()).device for each in (model, draft_model)]
        if places[0] != places[1]:
            raise ValueError(f"draft_model must lie on the model's device, {places[0]}, got {places[1]}")
    if not isinstance(model, SpeculationMixin):
        model.__class__ = with_speculation(type(model))  # type: ignore[arg-type]
    object.__setattr__(model, "speculation", Speculation(ngram, draft, draft_model))
    return model


class SpeculativeDecoding:
    """Gives a causal model prompt look-up decoding, over its compiled loop if it has one.

    Configuration: `ngram` (default 3), tokens that must match; `draft` (default 8), tokens of a draft at most.
    Its slot is "batching", our choice: it says how many tokens go through the model in a pass, it must come after the loop
    it runs over (slot "decode"), and what else there is in that slot serves several prompts, which speculation does not.
    """

    name = "speculation"
    slot = "batching"
    goals = frozenset({"decode"})
    exact = True

    def applies_to(self, model: nn.Module, context: TuneContext) -> Fit:
        if reason := why_not(model):
            return Fit(False, reason)
        # Our guess: of five tokens, one comes for nothing.
        return Fit(
            True, effects=(Effect("linear", bytes=0.8), Effect("attention", bytes=0.8), Effect("other", bytes=0.8))
        )

    def configs(self, model: nn.Module, context: TuneContext) -> list[dict[str, Any]]:
        return [{"ngram": ngram, "draft": draft} for ngram in (3, 2) for draft in (8, 4)]

    def check(self, config: Mapping[str, Any]) -> None:
        """Raises ValueError or TypeError naming the setting that is wrong."""
        only(config, ("ngram", "draft"))
        checks.whole("ngram", config.get("ngram", NGRAM), low=1, high=MOST_NGRAM)
        checks.whole("draft", config.get("draft", DRAFT), low=1, high=MOST_DRAFT)

    def apply(self, model: nn.Module, config: Mapping[str, Any], context: TuneContext) -> nn.Module:
        """Raises TypeError or ValueError, before anything is changed, for a configuration or a model it does not fit."""
        self.check(config)
        return attach(model, **config)

    def describe(self, config: Mapping[str, Any]) -> str:
        ngram, draft = config.get("ngram", NGRAM), config.get("draft", DRAFT)
        return f"speculative decoding, up to {draft} tokens looked up by the last {ngram}"


transform = SpeculativeDecoding()

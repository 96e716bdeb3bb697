"""HAMburger: tokens that are nearly certain are emitted by a small decoder and share one key-value entry (arXiv 2505.20438).

Ordinary decoding takes a pass of the whole model, and an entry of its cache, for every token. Here a *macro step* of the base model is
followed by *micro steps* of a small decoder, which emits up to `max_steps` tokens from the base's hidden states; the tokens of such a
group are merged into one embedding, which is the input of the next macro step. So n tokens in g groups cost g passes of the base and g
entries. A stop head says where a group ends. Prompts are read token by token, as ever.

    model = HamburgerForCausalLM.from_base(base, max_steps=4)       # the base's weights, used and not copied; new modules untrained
    batch = lesson(teacher, input_ids)                              # groups by the uncertainty of the base as it was
    training_loss(model, batch).backward()                          # or transformers' Trainer with a GroupCollator
    found = model.generate(prompt_ids)                              # greedy, sampling, beam search; or `decode`, faster for several rows
    made = decode(model, prompt_ids, max_new_tokens=64)             # made.groups, made.kv_entries

- Positions are those of training: a merged entry stands at its last token's place (the released Hugging Face path is one off there).
- The stop head reads the vector that gives a token, before the token is chosen, so sampling changes tokens and not the rule. Each
  state of generation follows from the tokens so far, so beams may be reordered.
- With `confidence` above 1 each group is of one token, and the model computes what the base does.
- Base models are those whose parts are understood (`core.models.decoder`); layers with a sliding window keep all entries, and the window
  counts tokens, not entries. With other attention than "sdpa" and "eager", rows of different lengths are refused.
- `GroupDrafter` gives its groups to speculative decoding as drafts, which loses nothing.
- "Our choice" are the feature layers of a base of other than 16 layers (the quarters, rounded down) and, where 64 does not divide the
  width, the base's number of heads in the embedder.

When NOT to use it: without training (an untrained decoder emits noise); where the answer must be the base's own (it is not lossless:
speculative decoding is); for text that is hard to guess, whose groups are of one token and only pay for the stop head.
"""

from __future__ import annotations

from assay.methods.inference.hamburger.cache import HamburgerCache
from assay.methods.inference.hamburger.decoding import Decoded, GroupDrafter, decode
from assay.methods.inference.hamburger.model import HamburgerConfig, HamburgerForCausalLM, HamburgerOutput
from assay.methods.inference.hamburger.modules import CompositionalEmbedder, MicroStepDecoder
from assay.methods.inference.hamburger.segments import (
    STRATEGIES,
    entropy_of_confidence,
    group_ids,
    grouped,
    segment,
    token_entropies,
)
from assay.methods.inference.hamburger.teaching import grouping_loss
from assay.methods.inference.hamburger.training import (
    GroupCollator,
    lesson,
    merge_lora,
    parameter_groups,
    train_only,
    training_loss,
)

__all__ = [
    "STRATEGIES",
    "CompositionalEmbedder",
    "Decoded",
    "GroupCollator",
    "GroupDrafter",
    "HamburgerCache",
    "HamburgerConfig",
    "HamburgerForCausalLM",
    "HamburgerOutput",
    "MicroStepDecoder",
    "decode",
    "entropy_of_confidence",
    "group_ids",
    "grouped",
    "grouping_loss",
    "lesson",
    "merge_lora",
    "parameter_groups",
    "segment",
    "token_entropies",
    "train_only",
    "training_loss",
]

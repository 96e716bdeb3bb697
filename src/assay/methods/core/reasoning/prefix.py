"""A generator for prompts that begin alike, as those with the same examples do: what they share is read once a call."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from assay.methods.core.generation.cache import left_pad
from assay.methods.core.generation.loop import padding_token
from assay.methods.core.reasoning.generator import TransformersGenerator

LEAST = 8  # tokens in common from which it pays to read them apart; our choice


def shared_tokens(encoded: list[list[int]]) -> int:
    """How many tokens all prompts begin with alike, at least one of each left over.

    >>> shared_tokens([[1, 2, 3, 4], [1, 2, 5]]), shared_tokens([[1, 2], [1, 2]]), shared_tokens([[1], [2]])
    (2, 1, 0)
    """
    return min(len(os.path.commonprefix(encoded)), min(map(len, encoded)) - 1)


class PrefixGenerator(TransformersGenerator):
    """A `TransformersGenerator` that reads what the prompts of a batch have in common once, and then each prompt's
    rest.

    Samples are the same but for rounding, and cost the same in tokens (`Spent.prompt` is the whole prompt: what a kept
    beginning is worth is the caller's matter); seconds are fewer. Several prompts of one call should begin alike: with
    examples in front, say.

    When NOT to use it: for prompts that differ from the start, which it reads as they are, or a model whose settings
    ask for a prefill of their own.
    """

    def _read(self, encoded: list[list[int]]) -> tuple[Any, Tensor, Tensor]:
        shared = shared_tokens(encoded)
        if len(encoded) == 1 or shared < LEAST:
            return super()._read(encoded)
        device = self.model.device
        cache = DynamicCache(config=self.model.config)
        begin = torch.tensor([encoded[0][:shared]], device=device)
        self.model(input_ids=begin, cache=cache, use_cache=True, logits_to_keep=1)
        cache.batch_repeat_interleave(len(encoded))
        ids, rest = left_pad([own[shared:] for own in encoded], padding_token(self.model), device)
        mask = torch.cat([rest.new_ones(len(encoded), shared), rest], 1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, shared:]
        out = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, cache=cache, use_cache=True, logits_to_keep=1
        )
        return out.cache, out.logits[:, -1], mask

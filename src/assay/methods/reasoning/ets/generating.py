"""A generator that keeps the tree: texts it continued before are not read again, and what they share is held once."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from assay import checks
from assay.methods.core.attention.integration import can_register, has_sinks, set_attention, windows
from assay.methods.core.generation.slices import selected
from assay.methods.core.reasoning.budget import Spent
from assay.methods.core.reasoning.generator import (
    Growing,
    Sample,
    Sampling,
    TransformersGenerator,
    choose,
    end_tokens,
    seed_of,
)
from assay.methods.reasoning.ets.trie import KeyValueTrie, Reading, attend

NAME = "assay_tree"


class TreeGenerator(TransformersGenerator):
    """Samples of a causal model of transformers, the keys and values of all its texts kept in one trie (`trie`).

    A prompt that goes on from an earlier one and its sample is read from where they end. All rows of a call run together, whatever their
    number of samples; `keep` gives up what no later call continues. Samples are those of `TransformersGenerator` up to rounding, and cost
    the same but for `Spent.cached`, the tokens of the prompt that were held. Between calls the model's own attention is in place.

    Raises ValueError for a model whose attention cannot be replaced, or has windows or sinks.

    When NOT to use it: for texts that share little, where padding prompts side by side is as good, and for models that are served, whose
    server shares prefixes already.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, *, batch: int = 64, name: str = "", special: bool = True
    ) -> None:
        super().__init__(model, tokenizer, batch=batch, name=name, special=special)
        if reason := can_register(model):
            raise ValueError(f"model must let its attention be replaced: {reason}")
        if any(windows(model)) or has_sinks(model):
            raise ValueError(
                f"model must attend to all that comes before, got a {type(model).__name__} with windows or sinks"
            )
        self.trie = KeyValueTrie()

    def keep(self, prompts: Sequence[str]) -> None:
        """Give up the keys and values of all tokens but those of these texts."""
        self.trie.keep([self._ids(prompt) for prompt in prompts])

    def __call__(
        self, prompts: Sequence[str], sampling: Sampling, *, n: int = 1, first: int = 0, seed: int = 0
    ) -> list[list[Sample]]:
        """As `Generator` has it."""
        n, first = checks.whole("n", n, low=1), checks.whole("first", first, low=0)
        return self.uneven(prompts, sampling, [n] * len(prompts), [first] * len(prompts), seed=seed)

    @torch.no_grad()
    def uneven(
        self, prompts: Sequence[str], sampling: Sampling, counts: Sequence[int], firsts: Sequence[int], *, seed: int = 0
    ) -> list[list[Sample]]:
        """`counts[i]` samples of prompt i, those from number `firsts[i]` on, in one batch. Raises ValueError for other numbers of them."""
        if not len(prompts) == len(counts) == len(firsts):
            raise ValueError(
                f"counts and firsts must be as many as prompts, {len(prompts)}, got {len(counts)} and {len(firsts)}"
            )
        encoded = [self._encode(prompt, sampling) for prompt in prompts]
        found: list[list[Sample]] = [[] for _ in prompts]
        if not prompts:
            return found
        began = time.perf_counter()
        with self._attention():
            logits, held = self._into_trie(encoded)
            rows = [
                (i, number)
                for i, (n, low) in enumerate(zip(counts, firsts, strict=True))
                for number in range(low, low + n)
            ]
            paths = [self.trie.match(ids) for ids in encoded]
            order = sorted(range(len(rows)), key=lambda k: (paths[rows[k][0]], rows[k][1]))
            texts: list[Growing] = [Growing(self.tokenizer, sampling.stop) for _ in rows]
            for start in range(0, len(order), self.batch):
                members = order[start : start + self.batch]
                streams = [
                    torch.Generator().manual_seed(seed_of(seed, prompts[rows[k][0]], rows[k][1])) for k in members
                ]
                of = [rows[k][0] for k in members]
                self._draw_rows(
                    [encoded[i] for i in of],
                    [paths[i] for i in of],
                    logits[of],
                    [texts[k] for k in members],
                    streams,
                    sampling,
                )
        seconds = (time.perf_counter() - began) / max(len(rows), 1)
        for (i, _), text in zip(rows, texts, strict=True):
            sample = text.sample(0, seconds)
            if not found[i]:  # the prompt is charged once
                spent = Spent(len(encoded[i]), sample.spent.completion, held[i], 1, seconds)
                sample = Sample(sample.text, sample.tokens, sample.logprobs, sample.ended, spent, sample.matched)
            found[i].append(sample)
        return found

    def _ids(self, prompt: str) -> list[int]:
        ids: list[int] = self.tokenizer(prompt, add_special_tokens=self.special)["input_ids"]
        return ids

    @contextlib.contextmanager
    def _attention(self) -> Iterator[None]:
        """The model attends through the trie within, and as before afterwards."""
        from transformers.masking_utils import AttentionMaskInterface
        from transformers.modeling_utils import AttentionInterface

        before = self.model.config.get_text_config()._attn_implementation
        AttentionInterface.register(NAME, _attend)
        AttentionMaskInterface.register(NAME, _no_mask)
        set_attention(self.model, NAME)
        try:
            yield
        finally:
            set_attention(self.model, before)

    def _into_trie(self, encoded: Sequence[list[int]]) -> tuple[Tensor, list[int]]:
        """Logits behind each prompt, (prompts, vocabulary), and how many of its tokens were held; afterwards all of it is."""
        held = [len(self.trie.match(ids[:-1])) for ids in encoded]  # the last one is run again: its logits are not kept
        logits: dict[tuple[int, ...], Tensor] = {}
        distinct = {tuple(ids): len(ids) - start for ids, start in zip(encoded, held, strict=True)}
        for length in sorted(set(distinct.values())):
            group = [list(ids) for ids, left in distinct.items() if left == length]
            paths = {tuple(ids): self.trie.match(ids)[: len(ids) - length] for ids in group}
            group.sort(key=lambda ids: paths[tuple(ids)])
            for start in range(0, len(group), self.batch):
                members = group[start : start + self.batch]
                own = DynamicCache()
                reading = Reading(self.trie, [paths[tuple(ids)] for ids in members])
                last = self._run(
                    torch.tensor([ids[-length:] for ids in members]),
                    [len(ids) - length for ids in members],
                    own,
                    reading,
                )
                self.trie.add(members, own)
                logits.update({tuple(ids): row for ids, row in zip(members, last, strict=True)})
        return torch.stack([logits[tuple(ids)] for ids in encoded]), held

    def _run(self, tokens: Tensor, starts: Sequence[int], own: DynamicCache, reading: Reading) -> Tensor:
        """Logits of the last of `tokens` (rows, new), which stand from `starts` on."""
        places = torch.tensor(starts)[:, None] + torch.arange(tokens.shape[1])
        device = self.model.device
        out = self.model(
            input_ids=tokens.to(device),
            position_ids=places.to(device),
            cache=own,
            use_cache=True,
            logits_to_keep=1,
            branches=reading,
        )
        last: Tensor = out.logits[:, -1].float()
        return last

    def _draw_rows(
        self,
        encoded: Sequence[list[int]],
        paths: Sequence[list[int]],
        logits: Tensor,
        texts: Sequence[Growing],
        streams: Sequence[torch.Generator],
        sampling: Sampling,
    ) -> None:
        """Let every row's text grow to its end; what it adds to the tree is kept there."""
        ends, alive, own = end_tokens(self.model), list(range(len(texts))), DynamicCache()
        reading = Reading(self.trie, paths)
        while True:
            tokens = choose(logits, sampling, [streams[i] for i in alive])
            scored = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0].tolist()
            for i, token, value in zip(alive, tokens.tolist(), scored, strict=True):
                texts[i].add(token, value, ends, sampling.max_new_tokens)
            kept = [place for place, i in enumerate(alive) if not texts[i].ended]
            if len(kept) < len(alive):
                ended = [place for place, i in enumerate(alive) if texts[i].ended]
                if len(texts[alive[0]].tokens) > 1:  # the last token was not run
                    self.trie.add(
                        [encoded[i] + texts[i].tokens[:-1] for i in (alive[place] for place in ended)], own, ended
                    )
                if not kept:
                    return
                if len(texts[alive[0]].tokens) > 1:
                    own = selected(own, kept)
                alive, tokens = [alive[place] for place in kept], tokens[kept]
                reading = Reading(self.trie, [paths[i] for i in alive])
            starts = [len(encoded[i]) + len(texts[i].tokens) - 1 for i in alive]
            logits = self._run(tokens[:, None], starts, own, reading)


def _no_mask(*_: Any, **__: Any) -> None:
    """Who sees what stands in the reading."""


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    branches: Reading | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if branches is None:
        raise ValueError(f"model must pass keyword arguments on to its attention, {type(module).__name__} did not")
    layer = module.layer_idx
    assert isinstance(layer, int)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(query, key, value, branches, layer, scale).transpose(1, 2).contiguous(), None

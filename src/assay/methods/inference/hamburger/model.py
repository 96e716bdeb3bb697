"""The model: a decoder-only base between a compositional embedder and a micro-step decoder, as a transformers model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from assay import checks
from assay.methods.core.models.wrapped import WrappedConfig, WrappedForCausalLM
from assay.methods.inference.hamburger.cache import HamburgerCache, Writer
from assay.methods.inference.hamburger.modules import CompositionalEmbedder, MicroStepDecoder
from assay.methods.inference.hamburger.segments import MAX_STEPS
from assay.methods.inference.hamburger.teaching import Rows, grouping_loss

RELEASED_HEADS = 64
MOST_STEPS = 64


class HamburgerConfig(WrappedConfig):
    """The base's configuration (`base`) and the mechanism's; defaults are those of the released Llama-3.2-1B model.

    - `max_steps` (4): tokens to a group at most.
    - `feature_layers`: the layers whose outputs the micro-step decoder reads, counted from 1; the last must be the base's last, whose
      output is taken behind the norm. Default: at the quarters, rounded down (4, 8, 12 and 16 of 16; 7, 15, 22 and 30 of 30).
    - `micro_layers` (4): decoder layers of a micro step.
    - `merger_heads`: heads of the embedder's attention. Default: 64, as released, where they divide the width, else the base's.
    - `confidence` (0.9): a group goes on while the probability that it does is at least this. Above 1 every group is of one token, and
      the model computes what its base does. None: while it is at least a half.
    - `stop_weight` (0.5): of the stop head's loss.

    Raises ValueError or TypeError for values out of range.

    >>> config = HamburgerConfig({"model_type": "llama", "hidden_size": 96, "num_hidden_layers": 30, "num_attention_heads": 4})
    >>> config.feature_layers, config.merger_heads
    ([7, 15, 22, 30], 4)
    """

    model_type = "assay_hamburger"

    def __init__(
        self,
        base: Any = None,
        max_steps: int = MAX_STEPS,
        feature_layers: Sequence[int] | None = None,
        micro_layers: int = 4,
        merger_heads: int | None = None,
        confidence: float | None = 0.9,
        stop_weight: float = 0.5,
        **kwargs: Any,
    ):
        super().__init__(base, **kwargs)
        inner = self.get_text_config()
        layers, width = int(inner.num_hidden_layers), int(inner.hidden_size)
        self.max_steps = checks.whole("max_steps", max_steps, low=1, high=MOST_STEPS)
        if feature_layers is None:
            feature_layers = sorted({max(1, layers * quarter // 4) for quarter in (1, 2, 3, 4)})
        chosen = [checks.whole("feature_layers", layer, low=1, high=layers) for layer in feature_layers]
        if not chosen or chosen[-1] != layers or chosen != sorted(set(chosen)):
            raise ValueError(f"feature_layers must rise and end with the base's last, {layers}, got {list(chosen)}")
        self.feature_layers = chosen
        self.micro_layers = checks.whole("micro_layers", micro_layers, low=1)
        if merger_heads is None:
            merger_heads = RELEASED_HEADS if width % RELEASED_HEADS == 0 else int(inner.num_attention_heads)
        self.merger_heads = checks.whole("merger_heads", merger_heads, low=1)
        if width % self.merger_heads:
            raise ValueError(f"merger_heads must divide the width, {width}, got {self.merger_heads}")
        self.confidence = None if confidence is None else checks.number("confidence", confidence, low=0)
        self.stop_weight = checks.number("stop_weight", stop_weight, low=0)


@dataclass
class HamburgerOutput(CausalLMOutputWithPast):
    """As transformers' output; with groups, `stop_logits` (batch, tokens) beside: that the token which is predicted ends its group."""

    stop_logits: Tensor | None = None


class HamburgerForCausalLM(WrappedForCausalLM):
    """The model; see the package. Made by `HamburgerForCausalLM.from_base(model, **settings)` or loaded."""

    config_class = HamburgerConfig
    not_given = {**WrappedForCausalLM.not_given, "inputs_embeds": "the model reads token ids, and makes groups of them"}
    _is_stateful = True  # no rolling back: assisted decoding is refused

    def __init__(self, config: HamburgerConfig, base: Any = None):
        super().__init__(config, base)
        inner = config.get_text_config()
        self.embedder = CompositionalEmbedder(int(inner.hidden_size), config.merger_heads, config.max_steps)
        self.micro = MicroStepDecoder(inner, config.micro_layers)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *args: Any,
        is_first_iteration: bool | None = False,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As transformers', and says what is a prompt. Raises ValueError for `use_cache=False`: the cache knows the groups."""
        if use_cache is False:
            raise ValueError("use_cache must be True: which tokens make a group is known to the cache alone")
        prepared: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids, *args, is_first_iteration=is_first_iteration, use_cache=use_cache, **kwargs
        )
        return {**prepared, "prompt": True} if is_first_iteration else prepared

    def new_cache(self, rows: int) -> HamburgerCache:
        """An empty cache for `rows` sequences."""
        config: Any = self.config
        return HamburgerCache(
            checks.whole("rows", rows, low=1),
            layers=len(self.parts.layers),
            micro_layers=config.micro_layers,
            max_steps=config.max_steps,
            features=len(config.feature_layers),
            device=self.parts.embed.weight.device,
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: HamburgerCache | None = None,
        labels: Tensor | None = None,
        groups: Tensor | None = None,
        documents: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        prompt: bool | None = None,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> HamburgerOutput:
        """Logits (batch, tokens, vocabulary) of the tokens after `input_ids` (batch, tokens), and the loss if there are `labels`.

        Three ways:

        - With `groups` (batch, tokens), the number of each token's group, -1 on padding (see `segments.grouped`): teacher forcing, all
          groups at once, as in training. The loss is the cross-entropy plus `stop_weight` times that of the stop head.
          `documents` (batch, tokens) numbers the texts that share a row; none sees another, and positions begin anew in each.
        - With `use_cache` or `cache`: generation. A prompt's tokens are entries of their own. A single token then goes on with the answer:
          it joins the open group, which takes a micro step, or closes it, which takes a macro step of the base. The
          stop head decides which from the vector that gave the token. Several tokens at once behind an answer are a prompt again, and
          so is a single one with `prompt=True`: the open group is closed, and they enter unmerged.
        - With neither: the base, every token an entry of its own.

        Raises ValueError for groups that are none, a cache of another batch, padding that does not stand on the left of a prompt, positions
        that do not go on from the cache's, TypeError for another cache.
        """
        self.refuse(kwargs)
        input_ids = checks.tensor("input_ids", input_ids, shape=("batch", "tokens"), dtype="integer")
        if groups is not None:
            for name, given in (("cache", cache), ("position_ids", position_ids), ("use_cache", use_cache or None)):
                if given is not None:
                    raise ValueError(f"{name} must be left out where groups are given: they are computed all at once")
            if attention_mask is not None and not torch.equal(attention_mask.bool(), groups >= 0):
                raise ValueError("attention_mask must be 1 where groups has a number and 0 elsewhere, or be left out")
            return self._grouped(input_ids, groups, documents, labels, logits_to_keep, num_items_in_batch)
        if documents is not None:
            raise ValueError("documents must be left out where no groups are given")
        if cache is None and not use_cache:
            run = self.parts.begin(input_ids, attention_mask, position_ids)
            hidden = self._layers(run)[-1]
        elif cache is not None and not isinstance(cache, HamburgerCache):
            raise TypeError(f"cache must be a HamburgerCache (`new_cache`), got {type(cache).__name__}")
        else:
            cache = self.new_cache(len(input_ids)) if cache is None else cache
            hidden = self._cached(cache, input_ids, attention_mask, position_ids, prompt)
        out = self.output(
            hidden, cache=cache, labels=labels, logits_to_keep=logits_to_keep, num_items_in_batch=num_items_in_batch
        )
        return HamburgerOutput(loss=out.loss, logits=out.logits, cache=cache)

    # ---- the base

    def _layers(self, run: Any) -> list[Tensor]:
        """The outputs of the feature layers, the last of them behind the norm: (batch, tokens, width) each."""
        config: Any = self.config
        x, kept = run.hidden, []
        for index in range(len(self.parts.layers)):
            x = self.parts.layer(index, x, run)
            if index + 1 in config.feature_layers[:-1]:
                kept.append(x)
        return [*kept, self.parts.norm(x)]

    def _masks(self, allowed: Any) -> dict[str, Any]:
        """The mask of each kind of layer as the base's attention takes it; `allowed(window)` says what may be seen."""
        inner: Any = self.parts.config
        made = {}
        for kind in dict.fromkeys(self.parts.kinds):
            seen = allowed(inner.sliding_window if kind == "sliding_attention" else None)
            if seen is not None and inner._attn_implementation != "sdpa":
                if inner._attn_implementation != "eager":
                    raise ValueError(
                        f"the base's attention must be 'sdpa' or 'eager', got {inner._attn_implementation!r}: "
                        "it cannot be told what rows of different lengths may see"
                    )
                dtype = self.parts.embed.weight.dtype
                seen = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(
                    ~seen, torch.finfo(dtype).min
                )
            made[kind] = seen
        return made

    # ---- teacher forcing

    def _grouped(
        self,
        input_ids: Tensor,
        groups: Tensor,
        documents: Tensor | None,
        labels: Tensor | None,
        logits_to_keep: int | Tensor,
        num_items_in_batch: Any,
    ) -> HamburgerOutput:
        config: Any = self.config
        rows = Rows(groups, config.max_steps, tuple(input_ids.shape), documents)
        embeds = self.parts.embed(input_ids)
        entries = rows.first_of(embeds)
        if len(rows.several):
            merged = self.embedder.merge(rows.members_of(embeds), rows.several_sizes)
            entries = entries.index_put(rows.several_places, merged.to(entries.dtype))
        masks: Any = rows.padding()  # all ones: positions that jump are not to be taken for packed sequences
        if documents is not None or ("sliding_attention" in self.parts.kinds and len(rows.several)):
            masks = self._masks(rows.allowed)
        kept = self._layers(self.parts.begin(inputs_embeds=entries, attention_mask=masks, position_ids=rows.positions))
        hidden = rows.spread(kept[-1])
        if len(rows.several):
            features = torch.stack([rows.before(each) for each in kept], 1)
            emitted = self.micro.sequence(features, rows.members_of(embeds)[:, :-1])
            hidden = hidden.index_put(rows.inner_places, emitted[rows.inner].to(hidden.dtype))
        stops = self.micro.stop_head(hidden)[..., 0]
        logits: Any = self.output(hidden, logits_to_keep=logits_to_keep).logits
        loss = None
        if labels is not None:
            if not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
                raise ValueError("logits_to_keep must be 0 where labels are given: the loss needs all logits")
            loss = grouping_loss(logits, stops, labels, groups, config.stop_weight, num_items_in_batch)
        return HamburgerOutput(loss=loss, logits=logits, stop_logits=stops)

    # ---- generation

    def _cached(
        self,
        cache: HamburgerCache,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        prompt: bool | None,
    ) -> Tensor:
        """The vectors (batch, tokens, width) that the head reads, after the next tokens of all rows."""
        rows, tokens = input_ids.shape
        if rows != cache.batch_size:
            raise ValueError(f"cache must hold {rows} sequences, as input_ids, got {cache.batch_size}")
        if attention_mask is not None:
            checks.tensor("attention_mask", attention_mask, shape=(rows, cache.seen + tokens), dtype="any")
        if cache.seen:
            if attention_mask is not None and not bool(attention_mask[:, -tokens:].all()):
                raise ValueError("attention_mask must be 1 on tokens behind the prompt: pad on its left only")
            steps = torch.arange(tokens, device=input_ids.device)
            own = torch.tensor(cache.position, device=input_ids.device)[:, None] + steps
            if position_ids is not None and not torch.equal(position_ids.expand(rows, -1), own):
                raise ValueError("position_ids must go on from those in the cache; leave them out")
        prompt = (tokens > 1 or not cache.seen) if prompt is None else checks.flag("prompt", prompt)
        if not prompt and tokens > 1:
            raise ValueError(f"prompt must be True for several tokens at once, got False and {tokens} tokens")
        everyone = list(range(rows))
        if not prompt and cache.seen:
            hidden = self.advance(cache, everyone, input_ids[:, 0])[:, None]
        else:
            if cache.seen:
                hidden = self._append(cache, input_ids, own)
            else:
                hidden = self._read(cache, input_ids, attention_mask, position_ids)
            self.decide(cache, everyone, hidden[:, -1])
        cache.seen += tokens
        return hidden

    def _read(
        self, cache: HamburgerCache, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> Tensor:
        """A prompt into an empty cache, by the masks that the base makes."""
        rows, tokens = input_ids.shape
        sizes = torch.ones_like(input_ids)
        if attention_mask is not None:
            there = attention_mask.bool()
            if not bool(there[:, -1].all()) or bool((there[:, :-1] & ~there[:, 1:]).any()):
                raise ValueError("attention_mask must be 0 on the left only: pad on the left")
            sizes = there.to(sizes.dtype)
        if position_ids is None:
            position_ids = torch.arange(tokens, device=input_ids.device)[None]
        places = position_ids.expand(rows, -1)
        writer = cache.admit(range(rows), sizes, places)
        run = self.parts.begin(input_ids, attention_mask, position_ids, cache=writer)
        return self._macro_done(cache, list(range(rows)), places, self._layers(run))

    def _append(self, cache: HamburgerCache, input_ids: Tensor, positions: Tensor) -> Tensor:
        """More of a prompt: what is open is closed first."""
        rows = list(range(len(input_ids)))
        if unfinished := [row for row in rows if cache.open[row]]:
            self._macro(cache, unfinished)
        return self.entries(cache, rows, self.parts.embed(input_ids), torch.ones_like(input_ids), positions)

    def advance(self, cache: HamburgerCache, rows: list[int], tokens: Tensor) -> Tensor:
        """The next token (some rows,) int64 of some rows, named in rising order: the vectors (rows, width) that the head reads next.

        Rows whose group it closes (`cache.closes`) take a macro step, the others a micro step; neither is computed for rows that do
        not need it.
        """
        index = torch.tensor(rows, device=tokens.device)
        cache.pending[index, torch.tensor([cache.open[row] for row in rows], device=tokens.device)] = tokens.long()
        for row in rows:
            cache.open[row] += 1
            cache.position[row] += 1
        closing = [cache.closes[row] for row in rows]
        if all(closing):
            vectors = self._macro(cache, rows)
        elif not any(closing):
            vectors = self._micro(cache, rows)
        else:
            mask = torch.tensor(closing, device=tokens.device)
            macro = self._macro(cache, [row for row, closes in zip(rows, closing, strict=True) if closes])
            micro = self._micro(cache, [row for row, closes in zip(rows, closing, strict=True) if not closes])
            vectors = macro.new_empty(len(rows), macro.shape[1])
            vectors[mask], vectors[~mask] = macro, micro
        self.decide(cache, rows, vectors)
        return vectors

    def _macro(self, cache: HamburgerCache, rows: list[int]) -> Tensor:
        """Merge the open groups of some rows, and run the base on them: its last hidden states (rows, width)."""
        counts = [cache.open[row] for row in rows]
        index = torch.tensor(rows, device=cache.pending.device)
        sizes = torch.tensor(counts, device=cache.pending.device)
        merged = self.embedder(self.parts.embed(cache.pending[index, : max(counts)]), sizes)
        positions = torch.tensor([[cache.position[row] - 1] for row in rows], device=sizes.device)
        return self.entries(cache, rows, merged[:, None], sizes[:, None], positions)[:, -1]

    def entries(
        self, cache: HamburgerCache, rows: list[int], embeds: Tensor, sizes: Tensor, positions: Tensor
    ) -> Tensor:
        """Run the base on new entries of some rows, (rows, entries, width): its last hidden states."""
        writer = cache.admit(rows, sizes, positions)
        masks = self._masks(lambda window: cache.allowed(writer, window))
        run = self.parts.begin(inputs_embeds=embeds, attention_mask=masks, position_ids=positions, cache=writer)
        return self._macro_done(cache, rows, positions, self._layers(run))

    def _macro_done(self, cache: HamburgerCache, rows: list[int], positions: Tensor, kept: list[Tensor]) -> Tensor:
        """Note what a macro step leaves: the features, and that nothing is open."""
        features = torch.stack([each[:, -1] for each in kept], 1)
        if len(rows) == cache.batch_size or cache.features is None:
            cache.features = features
        else:
            cache.features[torch.tensor(rows, device=features.device)] = features
        for row, last in zip(rows, positions[:, -1].tolist(), strict=True):
            cache.open[row], cache.position[row] = 0, last + 1
        return kept[-1]

    def _micro(self, cache: HamburgerCache, rows: list[int]) -> Tensor:
        """A micro step of some rows after the last of their open tokens: what comes out behind it, (rows, width)."""
        assert cache.features is not None
        device, count = cache.pending.device, cache.feature_count
        vectors = cache.features.new_empty(len(rows), cache.features.shape[2])
        for starting in (True, False):
            chosen = [place for place, row in enumerate(rows) if (cache.open[row] == 1) == starting]
            if not chosen:
                continue
            some = [rows[place] for place in chosen]
            index = torch.tensor(some, device=device)
            last = [cache.open[row] - 1 for row in some]
            x = self.parts.embed(cache.pending[index, torch.tensor(last, device=device)])[:, None]
            mask = None
            if starting:
                x = torch.cat([cache.features[index], x], 1)
                places = [list(range(count + 1))] * len(some)
            else:
                places = [[count + place] for place in last]
            writer = Writer(cache.micro, some, places, device)
            if len(set(last)) > 1:  # groups of different length in one step
                mask = (torch.arange(writer.width, device=device) <= writer.places[..., None])[:, None]
            vectors[torch.tensor(chosen, device=device)] = self.micro(x, writer.places, writer, mask)[:, -1]
        return vectors

    def decide(self, cache: HamburgerCache, rows: list[int], vectors: Tensor) -> None:
        """Whether the next token of each of some rows is the last of its group, by the stop head on the vector that gives it."""
        config: Any = self.config
        full = [cache.open[row] + 1 >= config.max_steps for row in rows]
        sure = config.confidence is not None and config.confidence > 1
        if sure or all(full):
            ends = [True] * len(rows)
        else:
            stop = torch.sigmoid(self.micro.stop_head(vectors)[:, 0].float())
            # written so that a NaN ends the group
            goes_on = stop <= 0.5 if config.confidence is None else 1 - stop >= config.confidence
            ends = [not on for on in goes_on.tolist()]
        for row, end, no_more in zip(rows, ends, full, strict=True):
            cache.closes[row] = end or no_more


AutoConfig.register("assay_hamburger", HamburgerConfig, exist_ok=True)
AutoModelForCausalLM.register(HamburgerConfig, HamburgerForCausalLM, exist_ok=True)

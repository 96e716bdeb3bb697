"""The ladder transformer as a model of transformers: `to_ladder(model, layers=...)`.

Number the modules of a transformer (attention, MLP, attention, ...) h_1, h_2, ... A standard one computes x_{i+1} = x_i + h_{i+1}(x_i), a
ladder x_{i+1} = x_i + h_{i+1}(x_{i-1}): each module reads the stream without the output of the module just before it. The stream itself
loses nothing. On one device that is two streams, before and after the newest MLP; on several, the sum of a module's output over the ranks
may be under way while the next one computes (`tensor_parallel`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from assay import checks
from assay.methods.core import kernels
from assay.methods.core.models.decoder import Parts, Pass, kinds_of, parts_of
from assay.methods.core.models.wrapped import WrappedConfig, WrappedForCausalLM
from assay.methods.inference.ladder_residual import pending
from assay.methods.inference.ladder_residual.links import Link
from assay.methods.inference.ladder_residual.orders import BLOCKS, Block, Step, schedule
from assay.methods.inference.ladder_residual.sharding import shard
from assay.methods.inference.ladder_residual.timeline import Timeline

Carry = tuple[Tensor, ...]


class LadderConfig(WrappedConfig):
    """Which layers of the base are ladder layers: `ladder_layers` is a list of layers, a number (so many of the last), or None (all).

    `block` is "ladder", the paper's, or one of its rivals, in those layers: "parallel" (attention and MLP on the same stream, one sum over
    the ranks for both), or "desync" in all of them: `ranks` streams, each with its share of the heads and MLP units, of which only every
    `reduce_every`-th module (2: the MLPs) and the last is summed over all. `ranks` and `reduce_every` are for desync alone.

    Raises ValueError or TypeError for layers that do not exist or stand there twice, for `ladder_layers` given to desync, and for desync
    where a layer does not see the whole text.

    >>> from transformers import LlamaConfig
    >>> LadderConfig(LlamaConfig(num_hidden_layers=6), ladder_layers=2).ladder_layers
    [4, 5]
    """

    model_type = "assay_ladder_residual"

    def __init__(
        self,
        base: Any = None,
        ladder_layers: int | Sequence[int] | None = None,
        block: Block = "ladder",
        ranks: int = 2,
        reduce_every: int = 2,
        **kwargs: Any,
    ):
        super().__init__(base, **kwargs)
        self.block = checks.choice("block", block, BLOCKS)
        self.ladder_layers = layer_list(ladder_layers, self.num_hidden_layers)
        self.ranks = checks.whole("ranks", ranks, low=1)
        self.reduce_every = checks.whole("reduce_every", reduce_every, low=1)
        if block == "desync":
            if len(self.ladder_layers) < self.num_hidden_layers:
                raise ValueError("ladder_layers must be left out for block 'desync', which is about all layers")
            if odd := set(kinds_of(self.base)) - {"full_attention"}:
                raise ValueError(f"block 'desync' must have full attention in every layer, got {sorted(odd)[0]}")


def layer_list(layers: int | Sequence[int] | None, count: int) -> list[int]:
    """The layers meant, ascending: None for all of `count`, a number for so many of the last. Raises as `LadderConfig`."""
    if layers is None:
        return list(range(count))
    if not isinstance(layers, list | tuple | range):
        return list(range(count - checks.whole("ladder_layers", layers, low=0, high=count), count))
    found = [checks.whole("ladder_layers", layer, low=0, high=count - 1) for layer in layers]
    if len(set(found)) < len(found):
        raise ValueError(f"ladder_layers must hold a layer once, got {checks.shown(list(layers))}")
    return sorted(found)


class LadderForCausalLM(WrappedForCausalLM):
    """A causal language model with ladder layers around `base`, whose weights it uses as they are; see the module.

    It is a transformers model: `generate`, left padding, beam search, `save_pretrained`, `Trainer` and gradient checkpointing work, and
    the cache is the base's own `DynamicCache` (desync on one device keeps one of `ranks` times as many layers). Parameters, operations
    and keys are those of the base; what changes is which stream a module reads. So a converted model has to be trained on (`train_only`;
    the paper: about 3 billion tokens, learning rate 5e-6, 200 steps of warm-up), and conversion hurts least in the upper layers.

    `link` and `timeline` are set on the ranks of a tensor-parallel model, see `tensor_parallel`.

    When NOT to use it: on one device, where nothing is gained; where messages cost less than a few per cent of the time.
    """

    config_class = LadderConfig
    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., Any]

    def __init__(self, config: LadderConfig, base: nn.Module | None = None):
        super().__init__(config, base)
        self.link: Link | None = None
        self.timeline: Timeline | None = None
        self._shared: tuple[list[nn.Module], list[Parts]] = ([], [])  # the base's modules, and the shares made of them
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (batch, tokens, vocabulary), and the loss where `labels` are given; arguments as those of transformers' Llama.

        Keys and values are cached where `cache` is given or `use_cache` asks for it, by default as the base does outside training.
        Raises TypeError for `past_key_values`, the cache's former name; ValueError for hidden states and attention weights, which it does
        not give, and for a cache under gradient checkpointing, which would be filled twice.
        """
        self.refuse(kwargs)
        twice = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        if twice and cache is not None:
            raise ValueError("cache must be left out under gradient checkpointing: layers run twice")
        if use_cache is None:
            use_cache = not self.training and bool(getattr(self.config.base, "use_cache", True))
        if cache is None and use_cache and not twice:
            cache = DynamicCache(config=self.config.get_text_config())
        over = self.parts.begin(input_ids, attention_mask, position_ids, cache, inputs_embeds)
        if self.link is not None:
            kernels.ran("ladder_residual", "pending outputs")
            stream = pending.run(self.parts, over, self.steps, self.link, self.timeline)
        else:
            kernels.ran("ladder_residual", "streams of one device")
            stream = self._streams(over)
        return self.output(
            self.parts.norm(stream),
            cache=cache,
            labels=labels,
            logits_to_keep=logits_to_keep,
            num_items_in_batch=num_items_in_batch,
        )

    @property
    def steps(self) -> list[Step]:
        """What runs when on the ranks (`orders.schedule`)."""
        config: Any = self.config
        chosen = None if config.block == "desync" else config.ladder_layers
        return schedule(config.num_hidden_layers, config.block, chosen, reduce_every=config.reduce_every)

    def train_only(self, which: Literal["all", "ladder"] = "all") -> int:
        """Let "all" parameters train, as the paper's retraining does, or only the "ladder" layers and the last norm; how many there are.

        With "ladder" and only upper layers converted, nothing below them needs gradients, nor keeps activations for them.
        """
        checks.choice("which", which, ("all", "ladder"))
        self.requires_grad_(which == "all")
        if which == "ladder":
            chosen: Any = self.config
            for index in chosen.ladder_layers:
                self.parts.layers[index].requires_grad_(True)
            self.parts.norm.requires_grad_(True)
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As transformers' models. Raises ValueError for a rank's share, which is no model without the others."""
        if self.link is not None and self.link.world > 1:
            raise ValueError("a rank holds its share of the weights only: store the model it was made from")
        super().save_pretrained(*args, **kwargs)

    # ------------------------------------------------------------------------------------------------- streams of one device

    def _streams(self, over: Pass) -> Tensor:
        """The stream after the last layer."""
        config: Any = self.config
        desync = config.block == "desync"
        if desync:
            for share in self._shares():  # the base may have changed its mode and its attention since they were made
                share.model.train(self.base.training)
                share.config._attn_implementation = self.base.config._attn_implementation
            if over.cache is not None:
                _make_room(over.cache, config.num_hidden_layers * config.ranks)
        carry: Carry = (over.hidden,) * (config.ranks if desync else 2)
        twice = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        for index in range(config.num_hidden_layers):
            if twice:
                carry = self._gradient_checkpointing_func(self._layer, index, over, *carry)
            else:
                carry = self._layer(index, over, *carry)
        return carry[-1]

    def _layer(self, index: int, over: Pass, *carry: Tensor) -> Carry:
        """What is carried from layer to layer, after layer `index`: the stream without and with its MLP's output, or desync's streams."""
        config: Any = self.config
        if config.block == "desync":
            return self._desync_layer(index, over, carry)
        return advance(self.parts, over, carry, index, config.block if index in config.ladder_layers else "standard")

    def _desync_layer(self, index: int, over: Pass, streams: Carry) -> Carry:
        ranks, stored = len(streams), self._shared[1]
        for step in self.steps[2 * index : 2 * index + 2]:
            made = [
                pending.outputs(parts, over, step, stream, slot=index * ranks + rank)
                for rank, (parts, stream) in enumerate(zip(stored, streams, strict=True))
            ]
            if step.reduced:
                total = sum(
                    (output + stream / ranks for output, stream in zip(made[1:], streams[1:], strict=True)),
                    made[0] + streams[0] / ranks,
                )
                streams = (total,) * ranks
            else:
                streams = tuple(stream + output for output, stream in zip(made, streams, strict=True))
        return streams

    def _shares(self) -> list[Parts]:
        """The ranks' shares of the base, as views of its weights: made when they are first needed, and again once adapters, quantisers or
        others have exchanged modules of the base, of which the old ones know nothing. Raises what `shard` raises.
        """
        modules = list(self.base.modules())
        known = self._shared[0]
        if len(known) != len(modules) or any(one is not other for one, other in zip(known, modules, strict=True)):
            ranks = self.config.ranks
            self._shared = modules, [parts_of(shard(self.base, rank, ranks, views=True)) for rank in range(ranks)]
        return self._shared[1]


def advance(
    parts: Parts, over: Pass, carry: Carry, index: int, block: Literal["standard", "ladder", "parallel"] = "ladder"
) -> Carry:
    """One layer on one device: (stream without, stream with) the newest MLP's output, before and after layer `index`.

    Both are the embeddings in the beginning, and the last norm takes the second. Those two tensors are all that a stage of a pipeline
    hands to the next. A standard layer leaves the pair behind too, which is what a ladder layer above it reads.
    """
    early, late = carry
    after = late + parts.attention(index, early if block == "ladder" else late, over)
    return after, after + parts.feed_forward(index, after if block == "standard" else late)


def _make_room(cache: Any, places: int) -> None:
    """A cache made for the base's layers, still empty behind them, gets as many as desync's streams need."""
    if not isinstance(cache, DynamicCache):
        raise ValueError(f"cache must be a DynamicCache for block 'desync', got {type(cache).__name__}")
    while len(cache.layers) < places:
        cache.layers.append(DynamicLayer())


def to_ladder(model: nn.Module, layers: int | Sequence[int] | None = None, **settings: Any) -> LadderForCausalLM:
    """`model`, a decoder-only model of transformers, with ladder layers: all of them, the last so many, or those listed.

    Its weights are used, not copied. With `layers=[]` it computes what `model` computes, bit for bit. `settings` are those of
    `LadderConfig`. Raises ValueError, before anything is changed, for a model whose parts are not understood (`decoder.why_not`), and what
    `LadderConfig` raises; for block "desync" also what `shard` raises; TypeError for `ladder_layers`, which is called `layers` here.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> base = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=4,
    ...                                     num_attention_heads=2))
    >>> ladder = to_ladder(base, layers=2)
    >>> ladder.config.ladder_layers, ladder.num_parameters() == base.num_parameters()
    ([2, 3], True)
    """
    if "ladder_layers" in settings:
        raise TypeError(f"ladder_layers is called layers here, got {checks.shown(settings['ladder_layers'])}")
    parts, settings = parts_of(model), {**settings, "ladder_layers": layers}
    config = LadderConfig(parts.config, **settings)
    if config.block == "desync":
        for rank in range(config.ranks):
            shard(model, rank, config.ranks, views=True)
    return LadderForCausalLM.from_base(model, **settings)


def tensor_parallel(model: nn.Module, link: Link) -> LadderForCausalLM:
    """This rank's share of `model` over `link`: every rank calls it with the same model, and then runs the same calls.

    `model` is a `LadderForCausalLM`, or any model that `shard` takes, which then runs as a standard transformer does, each sum awaited at
    once. What comes back is a `LadderForCausalLM` of the share, in eval mode, whose passes run in the pending-output form: `generate`
    (greedy and beam search; sampling with equal seeds), left padding and the cache work as on one device, with `1 / world` of the keys.
    It is for inference: sums over ranks have no gradient. Set `.timeline` to a `Timeline` to see when what ran.

    Raises ValueError for a model that is a rank's share already, for desync with other than `link.world` ranks, and what `shard` raises.
    """
    if isinstance(model, LadderForCausalLM):
        if model.link is not None:
            raise ValueError("model must be whole, got a rank's share")
        config: Any = model.config
        base, settings = model.base, {name: getattr(config, name) for name in ("block", "ranks", "reduce_every")}
        if config.block == "desync" and config.ranks != link.world:
            raise ValueError(
                f"link must have the {config.ranks} ranks that the model was trained for, got {link.world}"
            )
        settings["ladder_layers"] = config.ladder_layers
    else:
        base, settings = model, {"ladder_layers": []}
    made = LadderForCausalLM.from_base(shard(base, link.rank, link.world), **settings)
    made.link = link
    return made.eval()


AutoConfig.register(LadderConfig.model_type, LadderConfig, exist_ok=True)
AutoModelForCausalLM.register(LadderConfig, LadderForCausalLM, exist_ok=True)

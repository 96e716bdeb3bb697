"""The decode loop of causal language models as one compiled call: many tokens at a time, on packed weights and paged memory.

In an ordinary generation loop on a CPU, a token costs more than reading the weights: it also runs hundreds of small operators,
each with its own dispatch and its own thread synchronisation. Here the loop itself is compiled. One call runs many steps for a
batch of sequences of different lengths, on weights packed in the order in which they are read (`quantize.formats`) and on keys and
values in pages of 16 positions (`core.generation.paged`), which are written in place and which sequences may share.

It knows Llama (SmolLM too), Mistral, Qwen2, Qwen3, Phi-3 and Gemma 3 (text), with sliding windows (of which it reads no more than
it must), biases of q, k and v, normalised queries and keys, and the rotary embeddings that do not change with the length. Other
models, mixtures of experts and soft caps among them, are refused, and `why_not` says why.

`apply` returns a transformers model. `model.generate(...)` prefills through the model's own forward pass (with whatever transforms
it carries), copies keys and values once into the pages, and runs the loop. The compiled loop covers greedy search and sampling
with temperature, top-k and top-p, end-of-sequence tokens, streamers, left padding, and a `DynamicCache` passed in. With other
logits processors or stopping criteria, the steps are compiled and transformers itself chooses each token. Passed to the
original loop: beam search and assisted decoding, `return_dict_in_generate`, `use_cache=False`, other cache classes, embeddings as
input, several devices, position ids, and masks that are not left padding. `assay.methods.builtin.decode_loop.generate` logs the
reason at level INFO.

Weights: "fp32" and "bf16" compute with unrounded inputs, so their tokens are those of greedy search in float32 with these weights,
up to ties; "int8" and "int4" also round inputs to int8, with one scale per 32 values. For all weights, the residual stream, the norms
and the attention are float32. With "int4", the head (the projection onto the vocabulary) is int8. Sampling draws from torch's
generator, so `torch.manual_seed` makes it repeatable, but the random numbers differ from those of transformers' own loop.

`Decoder` is the same without `generate`: `run` continues a batch of sequences, each greedily or with its own sampling, and `extend`
feeds several tokens to each (a drafted continuation, a suffix after a shared beginning). A sequence's answer is the same to the
last bit alone and in any batch, with any number of threads, by `run` and by `extend`.

Memory: the packed weights come on top of the model's own, which the prefill uses. With `keep_prefill_weights=False` (int8, int4) the
linear layers are replaced by `WeightOnlyLinear` layers on the same storage, so that the prefill uses the packed weights too;
layers that are already `WeightOnlyLinear` are shared in any case. The packed weights are a copy: `generate` raises ValueError if the
model's weights have changed since (it compares a few numbers of each tensor); apply the transform again after changing them.

When NOT to use it: models on a GPU, processors without AVX-512 VNNI (the portable loops are right but slow), training.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from assay import checks
from assay.methods.builtin.decode_loop.choosing import Sampling, draw, draw_in_torch
from assay.methods.builtin.decode_loop.decoder import CACHE_DTYPES, Decoder, sample
from assay.methods.builtin.decode_loop.fit import FAMILIES, joined, layers_of, why_not, why_not_shared
from assay.methods.builtin.decode_loop.generate import DecodeLoopMixin, length_groups, with_loop
from assay.methods.builtin.weight_only import WeightOnlyLinear
from assay.methods.core import kernels
from assay.methods.core.layers.surgery import refuse_saving
from assay.methods.core.quantize.formats import PANEL_FORMATS
from assay.methods.core.quantize.int8_linear import Int8Linear
from assay.methods.transform import Effect, Fit, TuneContext, only

__all__ = [
    "DecodeLoop",
    "DecodeLoopMixin",
    "Decoder",
    "Sampling",
    "draw",
    "draw_in_torch",
    "length_groups",
    "transform",
    "why_not",
]


class DecodeLoop:
    """Gives a transformers model of the families it knows (see the module docstring) the compiled loop.

    Configuration: `weights` "fp32", "bf16", "int8" or "int4"; `cache` "bfloat16" or "float32"; `keep_prefill_weights` (default
    true; false shares the packed weights with the prefill, for int8 and int4).
    """

    name = "decode_loop"
    slot = "decode"
    goals = frozenset({"decode", "throughput"})
    exact = False

    def applies_to(self, model: nn.Module, context: TuneContext) -> Fit:
        if reason := why_not(model):
            return Fit(False, reason)
        if not kernels.load("decode"):
            return Fit(False, "the compiled loop needs a C++ compiler (g++) on x86-64")
        size = next(model.parameters()).element_size()
        return Fit(True, effects=(Effect("linear", bytes=0.625 / size, dtype="int8"), Effect("other", bytes=0.1)))

    def configs(self, model: nn.Module, context: TuneContext) -> list[dict[str, Any]]:
        return [
            {"weights": kind, "cache": "bfloat16", "keep_prefill_weights": True} for kind in ("int4", "int8", "bf16")
        ]

    def check(self, config: Mapping[str, Any]) -> None:
        """Raises ValueError or TypeError naming the setting that is wrong."""
        only(config, ("weights", "cache", "keep_prefill_weights"))
        weights = checks.choice("weights", config.get("weights", "int4"), PANEL_FORMATS)
        checks.choice("cache", config.get("cache", "bfloat16"), tuple(CACHE_DTYPES))
        keep = checks.flag("keep_prefill_weights", config.get("keep_prefill_weights", True))
        if not keep and weights not in ("int8", "int4"):
            raise ValueError(f"keep_prefill_weights=False needs weights int8 or int4, got {weights!r}")

    def apply(self, model: nn.Module, config: Mapping[str, Any], context: TuneContext) -> nn.Module:
        """Raises TypeError or ValueError, before anything is changed, for a configuration or a model it does not fit."""
        self.check(config)
        weights, cache = config.get("weights", "int4"), config.get("cache", "bfloat16")
        keep = config.get("keep_prefill_weights", True)
        if not keep and any(isinstance(module, Int8Linear) for module in model.modules()):
            raise ValueError(
                "keep_prefill_weights=False needs ordinary linear layers; those of this model are int8 for the prefill"
            )
        if not keep and (reason := why_not_shared(model)):
            raise ValueError(f"keep_prefill_weights=False does not fit this model: {reason}")
        decoder = Decoder(model, weights=weights, cache=cache)
        if not keep:
            _share(model, decoder)
            decoder.seen = sample(model)
            refuse_saving(model)
        if not isinstance(model, DecodeLoopMixin):
            model.__class__ = with_loop(type(model))  # type: ignore[arg-type]
        model.decode_loop = decoder  # type: ignore[assignment]
        return model

    def describe(self, config: Mapping[str, Any]) -> str:
        names = {"fp32": "float32", "bf16": "bfloat16", "int8": "8-bit", "int4": "4-bit"}
        weights, cache = config.get("weights", "int4"), config.get("cache", "bfloat16")
        return f"compiled decoding loop with {names.get(weights, weights)} weights and {cache} cache"


def _share(model: Any, decoder: Decoder) -> None:
    """Let the model's linear layers use the decoder's packed weights."""
    packed = iter(decoder.weights)

    def swap(parent: Any, name: str, count: int) -> None:
        linear, bits = getattr(parent, name), 8 if parent is model else int(decoder.kind[3:])
        views = [next(packed) for _ in range(count)]
        layer = WeightOnlyLinear.from_packed(joined(views), linear.in_features, linear.out_features, bits)
        layer.bias = linear.bias
        setattr(parent, name, layer.train(linear.training))

    for layer in layers_of(model):
        for parent, name, count in FAMILIES[model.config.model_type].projections:
            swap(layer.get_submodule(parent), name, count)
    swap(model, "lm_head", 1)


transform = DecodeLoop()

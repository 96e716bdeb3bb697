"""The decode loop of llama-family models as one compiled call: many tokens at a time, on packed weights and a static cache.

What a token costs in an ordinary generation loop on a CPU is, beside reading the weights, hundreds of small operators, each with
its own dispatch and its own meeting of threads. Here the loop itself is compiled: one call runs many steps for a batch of
sequences of different lengths, on weights packed in the order in which they are read (`weight_only.pack`) and on a cache that is
written in place.

`apply` leaves a transformers model: `model.generate(...)` prefills through the model's own forward pass (whatever transforms that
carries), copies keys and values once into the static cache and runs the loop. The compiled loop covers greedy search and sampling
with temperature, top-k and top-p, end-of-sequence tokens, streamers, left padding, and a `DynamicCache` passed in. With other
logits processors or stopping criteria the steps are compiled and the choice of the token is transformers' own. Handed to the
original loop: beam search and assisted decoding, `return_dict_in_generate`, `use_cache=False`, other cache classes, embeddings as
input, several devices, position ids or masks that are not left padding. `assay.methods.builtin.decode_loop` logs the reason
at level INFO.

Weights: "fp32" and "bf16" compute with unrounded inputs, so their tokens are those of greedy search in float32 with these weights,
up to ties; "int8" and "int4" also round inputs to int8, 32 values to a scale. Whatever the weights, the residual stream, the norms
and the attention are float32, and the head (the projection onto the vocabulary) is int8 for "int4". Sampling draws from torch's
generator, so `torch.manual_seed` repeats it, but it takes other random numbers than transformers' own loop.

Memory: the packed weights come on top of the model's, which the prefill uses. With `keep_prefill_weights=False` (int8, int4) the
linear layers are replaced by `WeightOnlyLinear` layers on the same storage, so that the prefill uses the packed weights as well;
layers that are `WeightOnlyLinear` already are shared in any case. The packed weights are a copy: apply again after changing them.

When NOT to use it: models on a GPU, processors without AVX-512 VNNI (the portable loops are right but slow), training.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.methods.builtin.weight_only import (
    GROUP,
    KINDS,
    WeightOnlyLinear,
    pack,
    packed_bytes,
    quantize_inputs,
    unpack,
)
from assay.methods.core import kernels
from assay.methods.core.quantize.int8_linear import Int8GatedMLP, Int8Linear, rotate
from assay.methods.transform import Effect, Fit, TuneContext

logger = logging.getLogger(__name__)

BLOCK = 16  # positions to a block of the cache
CALL = 32  # steps to a compiled call: between two calls Ctrl-C is heard
PREFILL_TOKENS = 64  # what a forward pass costs beside its tokens, in tokens; our choice
CACHE_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
FAMILIES = {"llama", "mistral", "qwen2"}
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn: temperature first, then top-k (0: off), then top-p (1: off)."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


@dataclass
class KVCache:
    """Keys and values of `slots` sequences, each with a length of its own; as the kernel reads them.

    `keys` (layers, slots, kv heads, blocks, head, 16), `values` (layers, slots, kv heads, blocks * 16, head), `lengths` (slots,).
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor

    @property
    def capacity(self) -> int:
        """Positions per sequence."""
        return self.values.shape[3]

    def fill(self, slot: int, keys: Tensor, values: Tensor) -> None:
        """Put a prefilled sequence into a slot: keys (after RoPE) and values (layers, kv heads, tokens, head)."""
        tokens = keys.shape[2]
        if tokens > self.capacity:
            raise ValueError(f"keys must have at most {self.capacity} tokens (the capacity of the cache), got {tokens}")
        blocks = -(-tokens // BLOCK)
        padded = F.pad(keys, (0, 0, 0, blocks * BLOCK - tokens))
        self.keys[:, slot, :, :blocks] = padded.view(*keys.shape[:2], blocks, BLOCK, -1).transpose(-1, -2)
        self.values[:, slot, :, :tokens] = values
        self.lengths[slot] = tokens

    def read(self, slot: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values (layers, kv heads, stop - start, head) of a slot's positions."""
        first, last = start // BLOCK, -(-stop // BLOCK)
        keys = self.keys[:, slot, :, first:last].transpose(-1, -2).flatten(2, 3)
        return keys[:, :, start - first * BLOCK : stop - first * BLOCK], self.values[:, slot, :, start:stop]


class Decoder:
    """The packed weights of a llama-family model and the loop over them. The library behind the transform.

    `weights` is fp32, bf16, int8 or int4; `cache` the element type of the caches it makes, "bfloat16" or "float32".
    Raises ValueError when the model does not fit (see `why_not`) or an argument is not one of these.
    """

    def __init__(self, model: nn.Module, *, weights: str = "int4", cache: str = "bfloat16") -> None:
        if weights not in KINDS:
            raise ValueError(f"weights must be one of {', '.join(KINDS)}, got {weights!r}")
        if cache not in CACHE_DTYPES:
            raise ValueError(f"cache must be one of {', '.join(CACHE_DTYPES)}, got {cache!r}")
        if reason := why_not(model, weights):
            raise ValueError(f"model does not fit the decode loop: {reason}")
        config: Any = model.config
        inner: Any = model.model
        self.kind = weights
        self.head_kind = "int8" if weights == "int4" else weights
        self.cache_dtype = CACHE_DTYPES[cache]
        self.layers = len(inner.layers)
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.head_size = inner.layers[0].self_attn.head_dim
        self.hidden, self.inner, self.vocab = config.hidden_size, config.intermediate_size, config.vocab_size
        self.eps = config.rms_norm_eps
        self.max_positions = config.max_position_embeddings
        self.embedding = inner.embed_tokens.weight
        self.frequencies = inner.rotary_emb.inv_freq.float().clone()
        self.rope_scale = float(inner.rotary_emb.attention_scaling)
        with torch.no_grad():
            blocks = [_block(layer) for layer in inner.layers]
            self.norms = torch.stack([*(gain for block in blocks for gain in block.gains), inner.norm.weight]).float()
            biases = [block.bias for block in blocks if block.bias is not None]
            self.bias = torch.stack(biases).float() if biases else torch.empty(0)
            matrices = [(matrix, weights) for block in blocks for matrix in block.matrices]
            self.weights = _packed_together([*matrices, (_module_matrix(model.lm_head), self.head_kind)])
        self._dense: list[Tensor] | None = None

    def weight_bytes(self) -> int:
        """Bytes of packed weights that a step reads."""
        return sum(weight.numel() for weight in self.weights)

    def new_cache(self, slots: int, capacity: int) -> KVCache:
        """An empty cache for `slots` sequences of up to `capacity` tokens (rounded up to a multiple of 16)."""
        if slots < 1 or capacity < 1:
            raise ValueError(f"slots and capacity must be positive, got {slots} and {capacity}")
        if capacity > self.max_positions:
            raise ValueError(f"capacity must be at most {self.max_positions} (max_position_embeddings), got {capacity}")
        blocks = -(-capacity // BLOCK)
        shape = (self.layers, slots, self.kv_heads, blocks)
        return KVCache(
            torch.empty(*shape, self.head_size, BLOCK, dtype=self.cache_dtype),
            torch.empty(*shape[:3], blocks * BLOCK, self.head_size, dtype=self.cache_dtype),
            torch.zeros(slots, dtype=torch.int64),
        )

    def run(
        self,
        cache: KVCache,
        rows: Sequence[int],
        tokens: Sequence[int],
        steps: int,
        *,
        eos: Sequence[int] = (),
        no_end: int = 0,
        sampling: Sampling | None = None,
        want_logits: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Feed `tokens[i]` to the sequence in slot `rows[i]`, and go on with what it answers, `steps` times.

        A row that answers with a token of `eos` stops there; in the first `no_end` steps these tokens are not chosen. Returns the
        answers (rows, steps) int64, -1 after a row's end, and with `want_logits` the logits (rows, vocabulary) float32 of the last
        step each row took part in, else an empty tensor. Greedy without `sampling`. Lengths in the cache grow by the steps a row
        took part in.
        Raises ValueError when a slot has no room for `steps` more positions, and for rows, tokens or steps out of range.
        """
        sampled = sampling is not None
        choice = sampling or Sampling()
        uniforms = (
            torch.rand(len(rows), steps, dtype=torch.float64) if sampled else torch.empty(0, 0, dtype=torch.float64)
        )
        if not kernels.load("llama_decode"):
            return self._run_in_torch(cache, rows, tokens, steps, eos, no_end, sampling, uniforms, want_logits)
        made: tuple[Tensor, Tensor] = torch.ops.assay.llama_decode(
            self.weights,
            KINDS[self.kind],
            KINDS[self.head_kind],
            self.norms,
            self.bias,
            self.embedding.detach(),
            self.frequencies,
            self.rope_scale,
            self.heads,
            self.inner,
            self.eps,
            cache.keys,
            cache.values,
            cache.lengths,
            torch.tensor(rows, dtype=torch.int64),
            torch.tensor(tokens, dtype=torch.int64),
            steps,
            list(eos),
            no_end,
            want_logits,
            sampled,
            choice.temperature,
            choice.top_k,
            choice.top_p,
            uniforms,
        )
        return made

    # -- the same in torch: the oracle of the tests, and what serves where nothing can be compiled

    def _run_in_torch(
        self,
        cache: KVCache,
        rows: Sequence[int],
        tokens: Sequence[int],
        steps: int,
        eos: Sequence[int],
        no_end: int,
        sampling: Sampling | None,
        uniforms: Tensor,
        want_logits: bool,
    ) -> tuple[Tensor, Tensor]:
        if steps < 1 or not rows or len(rows) != len(tokens):
            raise ValueError(
                f"steps must be positive and tokens one per row, got {steps} steps, {len(rows)} rows, {len(tokens)} tokens"
            )
        if len(set(rows)) != len(rows) or not all(0 <= row < len(cache.lengths) for row in rows):
            raise ValueError(f"rows must name different slots of the cache, got {list(rows)}")
        if not all(0 <= token < self.vocab for token in tokens):
            raise ValueError(f"tokens must lie in 0..{self.vocab - 1}, got {list(tokens)}")
        longest = max(int(cache.lengths[row]) for row in rows) + steps
        if longest > cache.capacity:
            raise ValueError(f"the cache holds {cache.capacity} positions, not {longest}")
        out = torch.full((len(rows), steps), -1, dtype=torch.int64)
        logits = torch.empty(len(rows) if want_logits else 0, self.vocab)
        for i, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            for step in range(steps):
                scores = self.step_in_torch(cache, row, token)
                if step < no_end:
                    scores[list(eos)] = -torch.inf
                if sampling is None:
                    token = int(scores.argmax())
                else:
                    token = int(draw_in_torch(scores[None], sampling, uniforms[i, step : step + 1]))
                out[i, step] = token
                if want_logits:
                    logits[i] = scores
                if token in eos:
                    break
        return out, logits

    @torch.no_grad()
    def step_in_torch(self, cache: KVCache, row: int, token: int) -> Tensor:
        """Logits (vocabulary,) after feeding one token to a slot: plain torch on expanded weights, for checking the kernel."""
        if self._dense is None:
            shapes = [
                (w, self.kind, n, k) for w, (n, k) in zip(self.weights[:-1], self._shapes() * self.layers, strict=True)
            ]
            shapes.append((self.weights[-1], self.head_kind, self.vocab, self.hidden))
            self._dense = [unpack(*shape) for shape in shapes]
        dense, position, half = self._dense, int(cache.lengths[row]), self.head_size // 2
        angles = (position * self.frequencies).double()
        cos, sin = angles.cos().float() * self.rope_scale, angles.sin().float() * self.rope_scale

        def product(x: Tensor, weight: Tensor, kind: str) -> Tensor:
            return weight @ (quantize_inputs(x) if kind in ("int8", "int4") else x)

        def norm(x: Tensor, gain: Tensor) -> Tensor:
            return x * torch.rsqrt(x.square().mean() + self.eps) * gain

        def rotated(x: Tensor) -> Tensor:
            a, b = x[:, :half], x[:, half:]
            return torch.cat([a * cos - b * sin, b * cos + a * sin], 1)

        x = self.embedding[token].float()
        for layer in range(self.layers):
            q_proj, k_proj, v_proj, o_proj, gate, up, down = dense[7 * layer : 7 * layer + 7]
            inputs = norm(x, self.norms[2 * layer])
            qkv = torch.cat([product(inputs, w, self.kind) for w in (q_proj, k_proj, v_proj)])
            if self.bias.numel():
                qkv = qkv + self.bias[layer]
            q, k, v = torch.split(qkv.view(-1, self.head_size), [self.heads, self.kv_heads, self.kv_heads])
            cache.keys[layer, row, :, position // BLOCK, :, position % BLOCK] = rotated(k)
            cache.values[layer, row, :, position] = v
            keys, values = (t[layer].float() for t in cache.read(row, 0, position + 1))
            scores = rotated(q).view(self.kv_heads, -1, self.head_size) @ keys.transpose(1, 2) * self.head_size**-0.5
            attended = (scores.softmax(-1) @ values).flatten()
            x = x + product(attended, o_proj, self.kind)
            inputs = norm(x, self.norms[2 * layer + 1])
            x = x + product(F.silu(product(inputs, gate, self.kind)) * product(inputs, up, self.kind), down, self.kind)
        cache.lengths[row] += 1
        return product(norm(x, self.norms[-1]), dense[-1], self.head_kind)

    def _shapes(self) -> list[tuple[int, int]]:
        """(out, in) of the seven matrices of a layer."""
        q, kv = self.heads * self.head_size, self.kv_heads * self.head_size
        wide, narrow = (self.inner, self.hidden), (self.hidden, self.inner)
        return [(q, self.hidden), (kv, self.hidden), (kv, self.hidden), (self.hidden, q), wide, wide, narrow]


def draw(logits: Tensor, sampling: Sampling) -> Tensor:
    """One token (rows,) int64 per row of float32 logits (rows, vocabulary), with random numbers from torch's generator."""
    uniforms = torch.rand(len(logits), dtype=torch.float64)
    if not kernels.load("llama_decode"):
        return draw_in_torch(logits, sampling, uniforms)
    settings = (sampling.temperature, sampling.top_k, sampling.top_p)
    drawn: Tensor = torch.ops.assay.draw_tokens(logits.contiguous(), *settings, uniforms)
    return drawn


def draw_in_torch(logits: Tensor, sampling: Sampling, uniforms: Tensor) -> Tensor:
    """The same in torch, from given `uniforms` (rows,) in [0, 1): where the cumulative probability passes them."""
    scores = logits.double() / sampling.temperature
    if 0 < sampling.top_k < scores.shape[1]:
        scores = scores.masked_fill(scores < scores.topk(sampling.top_k).values[:, -1:], -torch.inf)
    probability = scores.softmax(1)
    if sampling.top_p < 1:
        ordered = probability.sort(1, descending=True).values
        kept = ((ordered.cumsum(1) - ordered) < sampling.top_p).sum(1, keepdim=True).clamp_min(1)
        probability = probability.masked_fill(probability < ordered.gather(1, kept - 1), 0)
    cumulative = probability.cumsum(1)
    chosen = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)[:, 0]
    return chosen.clamp_max(logits.shape[1] - 1)


def why_not(model: nn.Module, weights: str = "int4") -> str:
    """Why the decode loop cannot run this model, or an empty string."""
    config: Any = getattr(model, "config", None)
    family = getattr(config, "model_type", None)
    if family not in FAMILIES or not hasattr(model, "lm_head"):
        return f"the loop knows causal language models of the families {', '.join(sorted(FAMILIES))}, not {family or type(model).__name__}"
    inner: Any = model.model
    if any(tensor.device.type != "cpu" for tensor in model.parameters()):
        return "the loop runs on the CPU only"
    if inner.embed_tokens.weight.dtype not in (torch.float32, torch.bfloat16):
        return f"the embedding must be float32 or bfloat16, not {inner.embed_tokens.weight.dtype}"
    if config.hidden_act not in ("silu", "swish"):
        return f"the activation must be silu, not {config.hidden_act}"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in ("default", "linear", "llama3", "yarn"):
        return f"rope of type {rope!r} changes with the length"
    layer_types = getattr(config, "layer_types", None) or ["full_attention"]
    if set(layer_types) != {"full_attention"} or (family == "mistral" and config.sliding_window is not None):
        return "sliding-window attention is not supported"
    head_size = inner.layers[0].self_attn.head_dim
    if head_size % 16 or 2 * inner.rotary_emb.inv_freq.numel() != head_size:
        return f"the head size must be a multiple of 16, all of it rotated; it is {head_size}"
    if weights in ("int8", "int4") and any(n % GROUP for n in (config.hidden_size, config.intermediate_size)):
        return f"{weights} needs a hidden and an inner size that are multiples of {GROUP}"
    if weights == "bf16" and any(n % 2 for n in (config.hidden_size, config.intermediate_size)):
        return "bf16 needs an even hidden and inner size"
    for number, layer in enumerate(inner.layers):
        try:
            block = _block(layer)
        except (AttributeError, TypeError) as error:
            return f"layers.{number} is not a plain llama layer: {error}"
        if (block.bias is None) != (_block(inner.layers[0]).bias is None):
            return f"layers.{number}: the layers must agree on having biases"
    try:
        _module_matrix(model.lm_head)
    except TypeError as error:
        return f"lm_head: {error}"
    return ""


@dataclass
class _Matrix:
    """A weight matrix wherever it comes from: how to get it dense, and the layer that holds it packed, if one does."""

    out_features: int
    in_features: int
    dense: Callable[[], Tensor]
    packed: WeightOnlyLinear | None = None


@dataclass
class _Block:
    """What the loop needs of a decoder layer: the gains of its two norms, its seven matrices, the bias of q, k and v."""

    gains: tuple[Tensor, Tensor]
    matrices: list[_Matrix]
    bias: Tensor | None


def _block(layer: Any) -> _Block:
    """Raises AttributeError or TypeError, saying why, for a layer that is not a plain llama layer."""
    attention, mlp = layer.self_attn, layer.mlp
    if hasattr(attention, "q_norm"):
        raise TypeError("its queries are normalised")
    if hasattr(attention, "qkv_proj"):
        return _fused_int8_block(attention, mlp)
    projections = [getattr(attention, name) for name in MATRICES[:3]]
    biases = [projection.bias for projection in projections]
    if len({bias is None for bias in biases}) > 1:
        raise TypeError("q, k and v must all have a bias or none")
    matrices = [_module_matrix(projection, may_have_bias=True) for projection in projections]
    matrices += [_module_matrix(module) for module in (attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
    gains = (layer.input_layernorm.weight, layer.post_attention_layernorm.weight)
    return _Block(gains, matrices, None if biases[0] is None else torch.cat(biases))


def _module_matrix(module: Any, may_have_bias: bool = False) -> _Matrix:
    if module.bias is not None and not may_have_bias:
        raise TypeError("the loop knows biases of q, k and v only")
    if type(module) is nn.Linear:
        return _Matrix(module.out_features, module.in_features, lambda: module.weight)
    if isinstance(module, WeightOnlyLinear):
        return _Matrix(module.out_features, module.in_features, module.dequantize, module)
    if isinstance(module, Int8Linear) and module.norm_eps is None:
        return _Matrix(module.out_features, module.in_features, lambda: _rows(module, 0, module.out_features, True))
    raise TypeError(f"the loop knows nn.Linear, WeightOnlyLinear and Int8Linear, not {type(module).__name__}")


def _fused_int8_block(attention: Any, mlp: Any) -> _Block:
    """A block that `int8_linear.fuse_block` made: q/k/v and gate/up in one weight each, the norm's gain in its multiplier."""
    qkv, head, inner = attention.qkv_proj, attention.head_dim, mlp.down.in_features
    if not isinstance(qkv, Int8Linear) or not isinstance(mlp, Int8GatedMLP):
        raise TypeError("its q, k and v are one layer")
    kv = attention.num_kv_heads * head
    q, second = qkv.out_features - 2 * kv, mlp.gate_up.out_features // 2
    parts = [(qkv, 0, q), (qkv, q, kv), (qkv, q + kv, kv), (mlp.gate_up, 0, inner), (mlp.gate_up, second, inner)]
    if mlp.gate_up.bias is not None or mlp.down.bias is not None or attention.o_proj.bias is not None:
        raise TypeError("the loop knows biases of q, k and v only")
    matrices = [
        _Matrix(n, module.in_features, functools.partial(_rows, module, first, n, False)) for module, first, n in parts
    ]
    matrices.insert(3, _module_matrix(attention.o_proj))
    matrices.append(_module_matrix(mlp.down))
    bias = None if qkv.bias is None else qkv.bias[: qkv.out_features]
    return _Block((qkv.multiplier, mlp.gate_up.multiplier), matrices, bias)


def _rows(module: Int8Linear, first: int, count: int, scale_inputs: bool) -> Tensor:
    """Some rows of the weight an Int8Linear stands for, float32; with the multiplier of its inputs if wanted."""
    rows = module.codes()[first : first + count].float() * module.scale[first : first + count, None]
    rows = rotate(rows, module.rotation)
    return rows * module.multiplier if scale_inputs else rows


def _packed_together(matrices: list[tuple[_Matrix, str]]) -> list[Tensor]:
    """The packed matrices in one piece of memory; those of layers that hold them in that form already are moved there."""
    sizes = [packed_bytes(kind, matrix.out_features, matrix.in_features) for matrix, kind in matrices]
    if kernels.load("llama_decode"):
        whole = torch.ops.assay.weight_memory(sum(sizes))
    else:
        whole = torch.empty(sum(sizes), dtype=torch.uint8)
    views = []
    for (matrix, kind), view in zip(matrices, whole.split(sizes), strict=True):
        owner = matrix.packed if matrix.packed is not None and matrix.packed.kind == kind else None
        packed = pack(matrix.dense(), kind) if owner is None else owner.packed
        view = view.view(packed.shape).copy_(packed)
        if owner is not None:
            owner.packed = view
        views.append(view)
    return views


# ---- inside transformers' generate -------------------------------------------------------------------------------------------


class DecodeLoopMixin:
    """Put before a transformers model class: its sampling and greedy loop becomes the compiled one (see the module docstring)."""

    decode_loop: Decoder

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (type(self).__mro__[2],), self.__dict__

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        return super().generate(*args, **kwargs)  # type: ignore[misc]

    generate.calls_prefill = True  # type: ignore[attr-defined]  # says that the settings of inference.loop are heeded

    def _sample(
        self: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        decoder: Decoder = self.decode_loop
        mask = model_kwargs.get("attention_mask")
        if reason := _why_original(decoder, input_ids, generation_config, synced_gpus, model_kwargs):
            logger.info("generate takes the original loop: %s", reason)
            return super()._sample(  # type: ignore[misc]
                input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, **model_kwargs
            )
        past = model_kwargs["cache"]
        columns = input_ids.shape[1] if mask is None else mask.shape[1]
        if mask is None and past.get_seq_length():  # only the new tokens may have been passed
            columns = max(columns, getattr(generation_config, "_mask_length", columns))
        lengths = [columns] * len(input_ids) if mask is None else mask.sum(1).tolist()
        new_tokens = stopping_criteria.max_length - input_ids.shape[1] if stopping_criteria.max_length else None
        if new_tokens is None:
            raise ValueError("max_new_tokens (or max_length) must be given")
        if max(lengths) + new_tokens > decoder.max_positions:
            raise ValueError(
                f"max_new_tokens {new_tokens} after a prompt of {max(lengths)} tokens passes the model's "
                f"{decoder.max_positions} positions (max_position_embeddings)"
            )
        cache = decoder.new_cache(len(input_ids), max(lengths) + new_tokens)
        logits = _prefill(self, cache, input_ids, lengths, generation_config, model_kwargs)
        eos, pad = _eos(stopping_criteria), generation_config._pad_token_tensor
        choice = _plain_choice(logits_processor, generation_config, input_ids.shape[1], eos)
        ends = _Ends(eos, 0 if pad is None else int(pad), streamer)
        if choice is not None and _plain_stopping(stopping_criteria):
            sequences = _compiled_loop(decoder, cache, input_ids, logits, new_tokens, choice, ends)
        else:
            do_sample = generation_config.do_sample
            sequences = _stepwise_loop(
                decoder, cache, input_ids, logits, logits_processor, stopping_criteria, do_sample, ends
            )
        if getattr(past, "_is_user_defined", False):
            _give_back(cache, past, lengths, columns + sequences.shape[1] - input_ids.shape[1] - 1)
        if streamer is not None:
            streamer.end()
        return sequences


@functools.cache
def _with_loop(base: type) -> type:
    return type(
        base.__name__, (DecodeLoopMixin, base), {"__module__": base.__module__, "__qualname__": base.__qualname__}
    )


def _rebuild(base: type) -> Any:
    return object.__new__(_with_loop(base))


def _why_original(
    decoder: Decoder, input_ids: Tensor, config: Any, synced_gpus: bool, kwargs: Mapping[str, Any]
) -> str:
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    if config.return_dict_in_generate:
        return "return_dict_in_generate"
    if synced_gpus or config.is_assistant:
        return "several devices or an assistant"
    past: Any = kwargs.get("cache")
    if not kwargs.get("use_cache") or type(past) is not DynamicCache:
        return f"cache is {type(past).__name__}"
    if past.offloading or any(type(layer) is not DynamicLayer for layer in past.layers):
        return "cache is offloaded or of another kind"
    known = {"attention_mask", "position_ids", "cache", "use_cache", "logits_to_keep"}
    if extra := {name for name, value in kwargs.items() if name not in known and value is not None}:
        return f"further inputs {sorted(extra)}"
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    columns = input_ids.shape[1]
    if mask is not None:
        columns = mask.shape[1]
        if mask.dim() != 2 or not bool((mask.diff(dim=1) >= 0).all()) or not bool((mask[:, -1] == 1).all()):
            return "attention_mask is not left padding"
    if past.get_seq_length() and columns <= past.get_seq_length() and mask is not None:
        return "attention_mask does not cover the cache"
    if positions is not None and mask is not None:
        expected = mask.sum(1) - 1
        if positions.shape[0] not in (1, len(input_ids)) or not bool((positions[:, -1] == expected).all()):
            return "position_ids do not follow the attention mask"
    return ""


@dataclass(frozen=True)
class _Choice:
    """What the compiled loop can do by itself: greedy (no sampling) or sampling, without an end in the first tokens."""

    sampling: Sampling | None
    min_new_tokens: int = 0


@dataclass(frozen=True)
class _Ends:
    """Tokens that end a sequence, what follows them, and who listens."""

    eos: list[int]
    pad: int
    streamer: Any


def _plain_choice(processors: Any, config: Any, prompt_tokens: int, eos: list[int]) -> _Choice | None:
    """How the compiled loop chooses tokens for these processors, or None if it cannot."""
    from transformers.generation import logits_process as lp

    values: dict[str, Any] = {}
    least = 0
    order: list[type] = (
        [lp.TemperatureLogitsWarper, lp.TopKLogitsWarper, lp.TopPLogitsWarper] if config.do_sample else []
    )
    for processor in processors:
        if type(processor) in (lp.MinLengthLogitsProcessor, lp.MinNewTokensLengthLogitsProcessor) and not values:
            if set(processor.eos_token_id.tolist()) != set(eos):
                return None
            new = getattr(processor, "min_new_tokens", None)
            least = max(least, processor.min_length - prompt_tokens if new is None else new)
            continue
        if type(processor) not in order:
            return None
        order = order[order.index(type(processor)) + 1 :]
        if (
            getattr(processor, "min_tokens_to_keep", 1) != 1
            or getattr(processor, "filter_value", -torch.inf) != -torch.inf
        ):
            return None
        values |= {
            name: getattr(processor, name) for name in ("temperature", "top_k", "top_p") if hasattr(processor, name)
        }
    return _Choice(Sampling(**values) if config.do_sample else None, least)


def _plain_stopping(criteria: Any) -> bool:
    from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

    return all(type(criterion) in (EosTokenCriteria, MaxLengthCriteria) for criterion in criteria)


def _eos(criteria: Any) -> list[int]:
    return [
        token
        for criterion in criteria
        if hasattr(criterion, "eos_token_id")
        for token in criterion.eos_token_id.tolist()
    ]


def _prefill(
    model: Any, cache: KVCache, input_ids: Tensor, lengths: list[int], config: Any, kwargs: dict[str, Any]
) -> Tensor:
    """Run the prompts through the model, fill the cache, return the logits (rows, vocabulary) float32 after each prompt.

    Prompts of different lengths are packed if the model's settings say so, else they go in groups of similar length.
    """
    from assay.methods.core.generation import loop

    rows, past, mask = list(range(len(lengths))), kwargs["cache"], kwargs.get("attention_mask")
    untouched = (
        not past.get_seq_length() and not getattr(past, "_is_user_defined", False) and config.prefill_chunk_size is None
    )
    groups = length_groups(lengths) if untouched else []
    packs = loop.settings(model)["prefill"] is not None and mask is not None
    if not untouched or (len(groups) == 1 and not packs):
        outputs = model._prefill(input_ids, config, kwargs)
        _fill(cache, outputs.cache, rows, lengths)
        first: Tensor = outputs.logits[:, -1].to(torch.float32, copy=True)
        return first
    if packs:
        groups = [rows]
    logits = torch.empty(len(lengths), model.config.vocab_size)
    for group in groups:
        longest = max(lengths[row] for row in group)
        part = None if mask is None or min(lengths[row] for row in group) == longest else mask[group, -longest:]
        done = loop.prefill(model, input_ids[group, -longest:], part)
        assert done.logits is not None
        _fill(cache, done.cache, group, lengths)
        logits[group] = done.logits.float()
    return logits


def length_groups(lengths: Sequence[int], overhead: int = PREFILL_TOKENS) -> list[list[int]]:
    """Rows in groups of similar length, such that padded tokens plus `overhead` tokens a group are the fewest possible."""
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    best = [0.0] + [float("inf")] * len(order)  # of the first n rows
    cut = [0] * (len(order) + 1)
    for end in range(1, len(order) + 1):
        for start in range(end):
            cost = best[start] + overhead + (end - start) * lengths[order[end - 1]]
            if cost < best[end]:
                best[end], cut[end] = cost, start
    groups, end = [], len(order)
    while end:
        groups.append(order[cut[end] : end])
        end = cut[end]
    return groups[::-1]


def _fill(cache: KVCache, past: Any, rows: list[int], lengths: list[int]) -> None:
    keys = torch.stack([layer.keys for layer in past.layers]).to(cache.keys.dtype)
    values = torch.stack([layer.values for layer in past.layers]).to(cache.values.dtype)
    for i, row in enumerate(rows):
        first = keys.shape[3] - lengths[row]
        cache.fill(row, keys[:, i, :, first:], values[:, i, :, first:])


def _give_back(cache: KVCache, past: Any, lengths: list[int], columns: int) -> None:
    """Append to a cache the caller passed in what was decoded, up to `columns`; a row that ended early is filled with zeros."""
    missing = columns - past.get_seq_length()
    if missing < 1:
        return
    pieces = []
    for row, length in enumerate(lengths):
        stop = int(cache.lengths[row])
        pieces.append([F.pad(t, (0, 0, 0, missing - (stop - length))) for t in cache.read(row, length, stop)])
    keys, values = (torch.stack(column, 1) for column in zip(*pieces, strict=True))
    for number, layer in enumerate(past.layers):
        layer.update(keys[number].to(layer.keys.dtype), values[number].to(layer.values.dtype))


def _compiled_loop(
    decoder: Decoder, cache: KVCache, input_ids: Tensor, logits: Tensor, new_tokens: int, choice: _Choice, ends: _Ends
) -> Tensor:
    out = torch.full((len(input_ids), new_tokens), ends.pad, dtype=torch.int64)
    if choice.min_new_tokens > 0:
        logits[:, ends.eos] = -torch.inf
    out[:, 0] = logits.argmax(-1) if choice.sampling is None else draw(logits, choice.sampling)
    if ends.streamer is not None:
        ends.streamer.put(out[:, 0].clone())
    done, going = 1, [row for row in range(len(out)) if int(out[row, 0]) not in ends.eos]
    while going and done < new_tokens:
        steps = 1 if ends.streamer is not None else min(CALL, new_tokens - done)
        no_end = max(0, min(steps, choice.min_new_tokens - done))
        fed = out[going, done - 1].tolist()
        tokens, _ = decoder.run(cache, going, fed, steps, eos=ends.eos, no_end=no_end, sampling=choice.sampling)
        out[going, done : done + steps] = torch.where(tokens < 0, ends.pad, tokens)
        going = [
            row for row, last in zip(going, tokens[:, -1].tolist(), strict=True) if last >= 0 and last not in ends.eos
        ]
        # all rows may have ended before the last step of the call
        done += steps if going else int((tokens >= 0).sum(1).max())
        if ends.streamer is not None:
            ends.streamer.put(out[:, done - 1].clone())
    return torch.cat([input_ids, out[:, :done].to(input_ids.dtype)], 1)


def _stepwise_loop(
    decoder: Decoder,
    cache: KVCache,
    input_ids: Tensor,
    logits: Tensor,
    processors: Any,
    criteria: Any,
    do_sample: bool,
    ends: _Ends,
) -> Tensor:
    """Compiled steps, but transformers' own processors, choice and stopping: one step at a time."""
    unfinished = torch.ones(len(input_ids), dtype=torch.bool)
    while True:
        scores = processors(input_ids, logits.clone())
        chosen = torch.multinomial(scores.softmax(-1), 1).squeeze(1) if do_sample else scores.argmax(-1)
        if ends.eos:
            chosen = torch.where(unfinished, chosen, ends.pad)
        input_ids = torch.cat([input_ids, chosen[:, None].to(input_ids.dtype)], 1)
        if ends.streamer is not None:
            ends.streamer.put(chosen)
        unfinished &= ~criteria(input_ids, None)
        if not bool(unfinished.any()):
            return input_ids
        going = unfinished.nonzero().flatten().tolist() if ends.eos else list(range(len(input_ids)))
        _, logits[going] = decoder.run(cache, going, chosen[going].tolist(), 1, want_logits=True)


# ---- the transform ---------------------------------------------------------------------------------------------------------------


class DecodeLoop:
    """Gives a llama-family transformers model the compiled loop.

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
        if not kernels.load("llama_decode"):
            return Fit(False, "the compiled loop needs a C++ compiler (g++) on x86-64")
        size = next(model.parameters()).element_size()
        return Fit(True, effects=(Effect("linear", bytes=0.625 / size, dtype="int8"), Effect("other", bytes=0.1)))

    def configs(self, model: nn.Module, context: TuneContext) -> list[dict[str, Any]]:
        return [
            {"weights": kind, "cache": "bfloat16", "keep_prefill_weights": True} for kind in ("int4", "int8", "bf16")
        ]

    def apply(self, model: nn.Module, config: Mapping[str, Any], context: TuneContext) -> nn.Module:
        if unknown := set(config) - {"weights", "cache", "keep_prefill_weights"}:
            raise ValueError(f"unknown configuration {sorted(unknown)}; allowed: weights, cache, keep_prefill_weights")
        weights, keep = config.get("weights", "int4"), config.get("keep_prefill_weights", True)
        if not keep and weights not in ("int8", "int4"):
            raise ValueError(f"keep_prefill_weights=False needs weights int8 or int4, got {weights!r}")
        decoder = Decoder(model, weights=weights, cache=config.get("cache", "bfloat16"))
        if not keep and any(isinstance(module, Int8Linear) for module in model.modules()):
            raise ValueError(
                "keep_prefill_weights=False needs ordinary linear layers; those of this model are int8 for the prefill"
            )
        if not keep:
            _share(model, decoder)
        if not isinstance(model, DecodeLoopMixin):
            model.__class__ = _with_loop(type(model))  # type: ignore[arg-type]
        model.decode_loop = decoder  # type: ignore[assignment]
        return model


def _share(model: Any, decoder: Decoder) -> None:
    """Let the model's linear layers use the decoder's packed weights."""
    packed = iter(decoder.weights)

    def swap(parent: Any, name: str) -> None:
        linear, bits = getattr(parent, name), 8 if parent is model else int(decoder.kind[3:])
        layer = WeightOnlyLinear.from_packed(next(packed), linear.in_features, linear.out_features, bits)
        layer.bias = linear.bias
        setattr(parent, name, layer.train(linear.training))

    for layer in model.model.layers:
        for name in MATRICES:
            swap(layer.self_attn if name in MATRICES[:4] else layer.mlp, name)
    swap(model, "lm_head")


transform = DecodeLoop()

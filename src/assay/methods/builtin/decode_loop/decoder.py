"""The packed weights of a llama-family model, the cache, and the loop over them, with a torch version of the kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks
from assay.methods.builtin.decode_loop.fit import FAMILIES, block_of, matrix_of, packed_together, why_not
from assay.methods.core import kernels
from assay.methods.core.quantize.formats import FORMATS, PANEL_FORMATS
from assay.methods.core.quantize.groups import quantize_inputs

BLOCK = 16  # positions to a block of the cache
CACHE_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
SAMPLE = 64  # numbers of each tensor that are looked at to see whether weights have changed


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn: temperature first, then top-k (0: off), then top-p (1: off)."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


@dataclass
class KVCache:
    """Keys and values of `slots` sequences, each with its own length, in the kernel's layout.

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
    """The packed weights of a llama-family model and the loop over them: the library behind the transform.

    `weights` is fp32, bf16, int8 or int4; `cache` the element type of the caches it makes, "bfloat16" or "float32".
    Raises ValueError when the model does not fit (see `why_not`) or an argument is not one of these.
    """

    def __init__(self, model: nn.Module, *, weights: str = "int4", cache: str = "bfloat16") -> None:
        checks.choice("weights", weights, PANEL_FORMATS)
        checks.choice("cache", cache, tuple(CACHE_DTYPES))
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
            prefix = FAMILIES[config.model_type]
            blocks = [block_of(layer, prefix, self.eps) for layer in inner.layers]
            self.norms = torch.stack([*(gain for block in blocks for gain in block.gains), inner.norm.weight]).float()
            biases = [block.bias for block in blocks if block.bias is not None]
            self.bias = torch.stack(biases).float() if biases else torch.empty(0)
            matrices = [(matrix, weights) for block in blocks for matrix in block.matrices]
            self.weights = packed_together([*matrices, (matrix_of(model.lm_head), self.head_kind)])
        self.seen = sample(model)

    def weight_bytes(self) -> int:
        """Bytes of packed weights that a step reads."""
        return sum(weight.numel() for weight in self.weights)

    def new_cache(self, slots: int, capacity: int) -> KVCache:
        """An empty cache for `slots` sequences of up to `capacity` tokens (rounded up to a multiple of 16)."""
        slots, capacity = checks.whole("slots", slots, low=1), checks.whole("capacity", capacity, low=1)
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
        """Feed `tokens[i]` to the sequence in slot `rows[i]` and continue with its answer, `steps` times.

        A row that answers with a token in `eos` stops there; in the first `no_end` steps these tokens are never chosen. Returns the
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
            kernels.ran("decode loop", "torch")
            return self._run_in_torch(cache, rows, tokens, steps, eos, no_end, sampling, uniforms, want_logits)
        kernels.ran("decode loop", "kernel")
        made: tuple[Tensor, Tensor] = torch.ops.assay.llama_decode(
            self.weights,
            FORMATS[self.kind].id,
            FORMATS[self.head_kind].id,
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
        dense = self.dense()
        for i, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            for step in range(steps):
                scores = self.step_in_torch(cache, row, token, dense)
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

    def dense(self) -> list[Tensor]:
        """The float32 matrices that the packed weights stand for, seven a layer and the head."""
        shapes = [(self.kind, *shape) for shape in self._shapes() * self.layers] + [
            (self.head_kind, self.vocab, self.hidden)
        ]
        parts = zip(self.weights, shapes, strict=True)
        return [FORMATS[kind].unpack({"packed": weight}, n, k) for weight, (kind, n, k) in parts]

    @torch.no_grad()
    def step_in_torch(self, cache: KVCache, row: int, token: int, dense: list[Tensor] | None = None) -> Tensor:
        """Logits (vocabulary,) after feeding one token to a slot: plain torch on expanded weights, for checking the kernel."""
        dense = self.dense() if dense is None else dense
        position, half = int(cache.lengths[row]), self.head_size // 2
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


def sample(model: nn.Module) -> Tensor:
    """A few numbers of every parameter and buffer, float64: a training step, a merge or a cast would change them."""
    taken = []
    for tensor in [*model.parameters(), *model.buffers()]:
        flat = tensor.detach().reshape(-1) if tensor.is_contiguous() else tensor.detach()[0].reshape(-1)
        taken.append(flat[:: max(1, len(flat) // SAMPLE)][:SAMPLE].double())
    return torch.cat(taken)

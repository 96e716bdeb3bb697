"""The packed weights of a model and the loop over them, on keys and values in pages, with a torch version of the kernel."""

from __future__ import annotations

import array
from collections.abc import Sequence as Listed
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks
from assay.methods.builtin.decode_loop.choosing import Choices, Sampling, checked_uniforms, choose, per_row, table
from assay.methods.builtin.decode_loop.fit import (
    FAMILIES,
    GELU,
    activation_of,
    block_of,
    gain_of,
    layers_of,
    matrix_of,
    packed_together,
    ropes_of,
    why_not,
    window_of,
)
from assay.methods.core import kernels
from assay.methods.core.generation.paged import PAGE, PagePool, Sequence, pages_for
from assay.methods.core.quantize.formats import FORMATS, PANEL_FORMATS
from assay.methods.core.quantize.groups import quantize_inputs

CACHE_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
SAMPLE = 64  # numbers of each tensor that are looked at to see whether weights have changed
PASS = 64  # tokens that `extend` takes through the layers at once: what it needs beside the pages is bounded


class Decoder:
    """The packed weights of a causal language model and the loop over them: the library behind the transform.

    `weights` is fp32, bf16, int8 or int4; `cache` the element type of the pools it makes, "bfloat16" or "float32".
    With the compiled kernel, what comes out for a sequence is the same to the last bit whatever other sequences run beside it,
    however many threads there are, and whether its tokens came by `run` or by `extend`.
    Raises ValueError when the model does not fit (see `why_not`) or an argument is not one of these.
    """

    def __init__(self, model: nn.Module, *, weights: str = "int4", cache: str = "bfloat16") -> None:
        checks.choice("weights", weights, PANEL_FORMATS)
        checks.choice("cache", cache, tuple(CACHE_DTYPES))
        if reason := why_not(model, weights):
            raise ValueError(f"model does not fit the decode loop: {reason}")
        config: Any = model.config
        inner: Any = model.model
        family, layers = FAMILIES[config.model_type], layers_of(model)
        self.kind = weights
        self.head_kind = "int8" if weights == "int4" else weights
        self.cache_dtype = CACHE_DTYPES[cache]
        self.layers = len(layers)
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.head_size = layers[0].self_attn.head_dim
        self.hidden, self.inner, self.vocab = config.hidden_size, config.intermediate_size, config.vocab_size
        self.eps = config.rms_norm_eps
        self.max_positions = config.max_position_embeddings
        self.gelu = activation_of(config) in GELU
        self.attention_scale = float(layers[0].self_attn.scaling)
        self.embedding = inner.embed_tokens.weight
        scale = inner.embed_tokens.embed_scale.to(self.embedding.dtype) if family.gemma else 1.0
        self.embedding_scale = float(scale)
        ropes = ropes_of(inner.rotary_emb, family, config)
        self.frequencies = torch.stack([rope.frequencies.detach().float() for rope in ropes])
        self.rope_scales = torch.tensor([rope.scale for rope in ropes], dtype=torch.float32)
        kinds = sorted(set(config.layer_types)) if family.gemma else []
        which = [kinds.index(config.layer_types[number]) if kinds else 0 for number in range(self.layers)]
        windows = [window_of(config, family, number) or 0 for number in range(self.layers)]
        self.layout = torch.tensor([windows, which], dtype=torch.int64).T.contiguous()
        with torch.no_grad():
            blocks = [block_of(layer, family, config) for layer in layers]
            self.norms = torch.stack([torch.stack([gain.float() for gain in block.gains]) for block in blocks])
            self.last_norm = gain_of(inner.norm, family, self.eps).clone()
            biases = [block.bias for block in blocks if block.bias is not None]
            self.bias = torch.stack(biases).float() if biases else torch.empty(0)
            heads = [torch.stack(block.head_gains) for block in blocks if block.head_gains]
            self.head_norms = torch.stack(heads) if heads else torch.empty(0)
            matrices = [(matrix, weights) for block in blocks for matrix in block.matrices]
            self.weights = packed_together([*matrices, (matrix_of(model.lm_head), self.head_kind)])
        self.seen = sample(model)

    def weight_bytes(self) -> int:
        """Bytes of packed weights that a step reads."""
        return sum(weight.numel() for weight in self.weights)

    @property
    def page_bytes(self) -> int:
        """Bytes of keys and values of a page of its pools."""
        return 2 * self.layers * self.kv_heads * self.head_size * PAGE * self.cache_dtype.itemsize

    def new_pool(self, pages: int) -> PagePool:
        """Memory for the keys and values of `pages` pages of 16 positions."""
        return PagePool(
            layers=self.layers,
            kv_heads=self.kv_heads,
            head_size=self.head_size,
            pages=pages,
            dtype=self.cache_dtype,
        )

    def run(
        self,
        pool: PagePool,
        sequences: Listed[Sequence],
        tokens: Listed[int],
        steps: int,
        *,
        eos: Listed[int] = (),
        no_end: int = 0,
        sampling: Choices = None,
        uniforms: Tensor | None = None,
        want_logits: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Feed `tokens[i]` to `sequences[i]` and continue with its answer, `steps` times.

        A row that answers with a token in `eos` stops there; in the first `no_end` steps these tokens are never chosen. `sampling` is
        for all rows or one entry a row (None: greedy); `uniforms` (rows, steps) float64 in [0, 1) are its random numbers, without
        them torch's generator gives them. Returns the answers (rows, steps) int64, -1 after a row's end, and with `want_logits` the
        logits (rows, vocabulary) float32 of the last step each row took part in, else an empty tensor. Lengths grow by the steps a
        row took part in.
        Raises ValueError when the pages of a sequence have no room for `steps` more positions, when one that would be written to is
        shared, free or another's too, when the model has no such positions, for tokens outside the vocabulary, and when the
        logits are not finite.
        """
        steps, no_end = checks.whole("steps", steps, low=1), checks.whole("no_end", no_end, low=0)
        tokens, choices = list(tokens), per_row(sampling, len(sequences))
        if len(tokens) != len(sequences):
            raise ValueError(f"tokens must be one per sequence, got {len(tokens)} for {len(sequences)}")
        self._check(pool, [(sequence, [token]) for sequence, token in zip(sequences, tokens, strict=True)], steps)
        ends = [token for token in eos if 0 <= token < self.vocab]
        shape = (len(sequences), steps)
        if not any(choices):
            uniforms = torch.empty(0, 0, dtype=torch.float64)
        elif uniforms is None:
            uniforms = torch.rand(*shape, dtype=torch.float64)
        else:
            uniforms = checked_uniforms(uniforms, shape)
        if not kernels.load("decode"):
            kernels.ran("decode loop", "torch")
            return self._run_in_torch(pool, sequences, tokens, steps, ends, no_end, choices, uniforms, want_logits)
        kernels.ran("decode loop", "kernel")
        made: tuple[Tensor, Tensor] = torch.ops.assay.decode_steps(
            *self._model(),
            pool.keys,
            pool.values,
            _tables([(sequence, sequence.length + steps) for sequence in sequences]),
            torch.tensor([sequence.length for sequence in sequences], dtype=torch.int64),
            torch.tensor(tokens, dtype=torch.int64),
            steps,
            ends,
            no_end,
            want_logits,
            table(choices),
            uniforms,
        )
        for sequence, count in zip(sequences, (made[0] >= 0).sum(1).tolist(), strict=True):
            sequence.length += count
        return made

    def extend(
        self,
        pool: PagePool,
        feeds: Listed[tuple[Sequence, Listed[int]]],
        *,
        logits: Literal["last", "all", "none"],
    ) -> Tensor:
        """Feed several tokens to each sequence; every token sees what lies before it. Lengths grow by the tokens fed.

        Returns float32 logits: with "all" (tokens of all feeds, vocabulary), with "last" (feeds, vocabulary) those after each
        feed's last token, with "none" (0, vocabulary). At most 64 tokens go through the layers at once, so the memory that is needed
        beside the logits is bounded.
        Raises as `run` does, and for a feed without tokens; lengths are then as they were.
        """
        checks.choice("logits", logits, ("last", "all", "none"))
        fed = [(sequence, list(tokens)) for sequence, tokens in feeds]
        if any(not tokens for _, tokens in fed):
            raise ValueError("feeds must hold at least one token each, got a feed without")
        self._check(pool, fed, 0)
        rows = [
            (number, sequence.length + i, token, logits == "all" or (logits == "last" and i == len(tokens) - 1))
            for number, (sequence, tokens) in enumerate(fed)
            for i, token in enumerate(tokens)
        ]
        compiled = kernels.load("decode")
        kernels.ran("decode loop", "kernel" if compiled else "torch")
        if not compiled:
            return self._extend_in_torch(pool, fed, [wanted for *_, wanted in rows])
        parts = []
        for first in range(0, len(rows), PASS):
            numbers, positions, ids, wanted = zip(*rows[first : first + PASS], strict=True)
            present = sorted(set(numbers))
            slots = torch.tensor(wanted, dtype=torch.int64)
            part: Tensor = torch.ops.assay.decode_extend(
                *self._model(),
                pool.keys,
                pool.values,
                _tables([(fed[number][0], fed[number][0].length + len(fed[number][1])) for number in present]),
                torch.tensor([present.index(number) for number in numbers], dtype=torch.int64),
                torch.tensor(positions, dtype=torch.int64),
                torch.tensor(ids, dtype=torch.int64),
                torch.where(slots > 0, slots.cumsum(0) - 1, -1),
            )
            parts.append(part)
        for sequence, tokens in fed:
            sequence.length += len(tokens)
        return torch.cat(parts)

    def _model(self) -> tuple[list[Tensor], list[Tensor], list[int], list[float]]:
        """What the kernel takes of the model, the same in every call."""
        parts = [
            self.norms,
            self.last_norm,
            self.bias,
            self.head_norms,
            self.embedding.detach(),
            self.frequencies,
            self.rope_scales,
            self.layout,
        ]
        kinds = [cast(int, FORMATS[kind].id) for kind in (self.kind, self.head_kind)]
        sizes = [*kinds, self.heads, self.inner, self.vocab, int(self.gelu)]
        return self.weights, parts, sizes, [self.eps, self.attention_scale, self.embedding_scale]

    def _check(self, pool: PagePool, feeds: Listed[tuple[Sequence, list[int]]], steps: int) -> None:
        """`steps` 0: each feed takes as many positions as it has tokens."""
        layers, _, kv_heads, head_size, _ = pool.keys.shape
        if (layers, kv_heads, head_size) != (self.layers, self.kv_heads, self.head_size):
            raise ValueError(
                f"pool must be of {self.layers} layers with {self.kv_heads} heads of {self.head_size}, "
                f"got {layers} with {kv_heads} of {head_size}"
            )
        if not feeds:
            raise ValueError("at least one sequence must be given, got none")
        written: set[int] = set()
        for sequence, tokens in feeds:
            for token in tokens:
                if not 0 <= token < self.vocab:
                    raise ValueError(f"tokens must lie in 0..{self.vocab - 1}, got {token}")
            stop = sequence.length + (steps or len(tokens))
            if stop > sequence.room:
                raise ValueError(f"the pages of a sequence hold {sequence.room} positions, not {stop}")
            if stop > self.max_positions:
                raise ValueError(f"the model has {self.max_positions} positions (max_position_embeddings), not {stop}")
            pages = sequence.pages[sequence.length // PAGE : pages_for(stop)]
            pool.check_writable(pages)
            if not written.isdisjoint(pages):
                raise ValueError(
                    f"sequences must not write to the same pages, got {sorted(written.intersection(pages))}"
                )
            written.update(pages)

    # -- the same in torch: the oracle of the tests, and what serves where nothing can be compiled

    def _run_in_torch(
        self,
        pool: PagePool,
        sequences: Listed[Sequence],
        tokens: list[int],
        steps: int,
        eos: list[int],
        no_end: int,
        choices: list[Sampling | None],
        uniforms: Tensor,
        want_logits: bool,
    ) -> tuple[Tensor, Tensor]:
        out = torch.full((len(sequences), steps), -1, dtype=torch.int64)
        logits = torch.empty(len(sequences) if want_logits else 0, self.vocab)
        dense, none = self.dense(), torch.zeros((), dtype=torch.float64)
        for i, (sequence, token) in enumerate(zip(sequences, tokens, strict=True)):
            at = Sequence(sequence.pages, sequence.length)
            for step in range(steps):
                scores = self.step_in_torch(pool, at, token, dense)
                if step < no_end:
                    scores[eos] = -torch.inf
                _check_finite(scores)
                token = int(choose(scores, choices[i], uniforms[i, step] if choices[i] else none))
                out[i, step] = token
                if want_logits:
                    logits[i] = scores
                if token in eos:
                    break
        for sequence, count in zip(sequences, (out >= 0).sum(1).tolist(), strict=True):
            sequence.length += count
        return out, logits

    def _extend_in_torch(self, pool: PagePool, feeds: list[tuple[Sequence, list[int]]], wanted: list[bool]) -> Tensor:
        made, dense = [], self.dense()
        for sequence, tokens in feeds:
            at = Sequence(sequence.pages, sequence.length)
            made += [self.step_in_torch(pool, at, token, dense) for token in tokens]
        kept = [logits for logits, keep in zip(made, wanted, strict=True) if keep]
        for logits in kept:
            _check_finite(logits)
        for sequence, tokens in feeds:
            sequence.length += len(tokens)
        return torch.stack(kept) if kept else torch.empty(0, self.vocab)

    def dense(self) -> list[Tensor]:
        """The float32 matrices that the packed weights stand for, seven a layer and the head."""
        shapes = [(self.kind, *shape) for shape in self._shapes() * self.layers] + [
            (self.head_kind, self.vocab, self.hidden)
        ]
        parts = zip(self.weights, shapes, strict=True)
        return [FORMATS[kind].unpack({"packed": weight}, n, k) for weight, (kind, n, k) in parts]

    @torch.no_grad()
    def step_in_torch(
        self, pool: PagePool, sequence: Sequence, token: int, dense: list[Tensor] | None = None
    ) -> Tensor:
        """Logits (vocabulary,) after feeding one token to a sequence: plain torch on expanded weights, for checking the kernel."""
        dense = self.dense() if dense is None else dense
        position, half = sequence.length, self.frequencies.shape[1]
        page, place = sequence.pages[position // PAGE], position % PAGE
        angles = (position * self.frequencies).double()
        scales = self.rope_scales[:, None]
        cosines, sines = angles.cos().float() * scales, angles.sin().float() * scales

        def product(x: Tensor, weight: Tensor, kind: str) -> Tensor:
            return weight @ (quantize_inputs(x) if kind in ("int8", "int4") else x)

        def norm(x: Tensor, gain: Tensor) -> Tensor:
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * gain

        def turned(x: Tensor, rope: int) -> Tensor:
            a, b, rest = x[:, :half], x[:, half : 2 * half], x[:, 2 * half :]
            cos, sin = cosines[rope], sines[rope]
            return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], 1)

        x = self.embedding[token].float() * self.embedding_scale
        for layer in range(self.layers):
            q_proj, k_proj, v_proj, o_proj, gate, up, down = dense[7 * layer : 7 * layer + 7]
            gains = list(self.norms[layer])
            window, rope = self.layout[layer].tolist()
            inputs = norm(x, gains[0])
            qkv = torch.cat([product(inputs, w, self.kind) for w in (q_proj, k_proj, v_proj)])
            if self.bias.numel():
                qkv = qkv + self.bias[layer]
            q, k, v = torch.split(qkv.view(-1, self.head_size), [self.heads, self.kv_heads, self.kv_heads])
            if self.head_norms.numel():
                q, k = norm(q, self.head_norms[layer, 0]), norm(k, self.head_norms[layer, 1])
            pool.keys[layer, page, :, :, place] = turned(k, rope)
            pool.values[layer, page, :, place] = v
            first = max(0, position + 1 - window) if window else 0
            keys, values = _seen(pool, layer, sequence.pages, first, position + 1)
            scores = turned(q, rope).view(self.kv_heads, -1, self.head_size) @ keys.transpose(1, 2)
            attended = ((scores * self.attention_scale).softmax(-1) @ values).flatten()
            y = product(attended, o_proj, self.kind)
            x = x + (norm(y, gains[1]) if len(gains) == 4 else y)
            inputs = norm(x, gains[len(gains) // 2])
            gated = product(inputs, gate, self.kind)
            gated = F.gelu(gated, approximate="tanh") if self.gelu else F.silu(gated)
            y = product(gated * product(inputs, up, self.kind), down, self.kind)
            x = x + (norm(y, gains[3]) if len(gains) == 4 else y)
        sequence.length += 1
        return product(norm(x, self.last_norm), dense[-1], self.head_kind)

    def _shapes(self) -> list[tuple[int, int]]:
        """(out, in) of the seven matrices of a layer."""
        q, kv = self.heads * self.head_size, self.kv_heads * self.head_size
        wide, narrow = (self.inner, self.hidden), (self.hidden, self.inner)
        return [(q, self.hidden), (kv, self.hidden), (kv, self.hidden), (self.hidden, q), wide, wide, narrow]


def _tables(reaches: Listed[tuple[Sequence, int]]) -> Tensor:
    """The page numbers of sequences as far as these positions: int32 (sequences, most pages), filled up with zeros."""
    width = max(pages_for(stop) for _, stop in reaches)
    numbers = array.array("i")
    for sequence, stop in reaches:
        pages = sequence.pages[: pages_for(stop)]
        numbers.extend(pages)
        numbers.extend([0] * (width - len(pages)))
    return torch.frombuffer(numbers, dtype=torch.int32).view(len(reaches), width)


def _seen(pool: PagePool, layer: int, pages: Listed[int], start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Keys and values (kv heads, stop - start, head) of one layer, float32."""
    index = torch.tensor(pages[start // PAGE : pages_for(stop)])
    part = slice(start % PAGE, start % PAGE + stop - start)
    keys = pool.keys[layer, index].permute(1, 0, 3, 2).flatten(1, 2)[:, part].float()
    return keys, pool.values[layer, index].transpose(0, 1).flatten(1, 2)[:, part].float()


def _check_finite(logits: Tensor) -> None:
    if not bool(logits.max().isfinite()):
        raise ValueError("the logits are not finite: the weights or the keys and values hold NaN or infinity")


def sample(model: nn.Module) -> Tensor:
    """A few numbers of every parameter and buffer, float64: a training step, a merge or a cast would change them."""
    taken = []
    for tensor in [*model.parameters(), *model.buffers()]:
        flat = tensor.detach().reshape(-1) if tensor.is_contiguous() else tensor.detach()[0].reshape(-1)
        taken.append(flat[:: max(1, len(flat) // SAMPLE)][:SAMPLE].double())
    return torch.cat(taken)

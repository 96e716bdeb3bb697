"""What the scheduler runs rows on: the compiled decode loop over paged memory, or any transformers model in torch.

A backend knows the model and its memory, nothing of requests. The scheduler gives it sequences: a prompt goes in by `prefill`, all at
once or in pieces, tokens that a row had made before it was preempted by `extend`, and `run` takes one step or a few of all rows.
`backend_for` chooses, and `reason` says why it was this one and how prompts run on it.
"""

from __future__ import annotations

from collections.abc import Sequence as Listed
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from assay import checks
from assay.errors import InputError
from assay.methods.builtin.attention_backend import NAME as DENSE_KERNEL
from assay.methods.builtin.decode_loop import Decoder, Sampling
from assay.methods.builtin.speculation import Speculation, SpeculationMixin
from assay.methods.core import kernels
from assay.methods.core.attention.integration import windows
from assay.methods.core.generation import loop
from assay.methods.core.generation.cache import Span, cut, keys_and_values, left_padded_mask
from assay.methods.core.generation.paged import PAGE, OutOfPages, Sequence
from assay.server.choosing import chosen, not_finite
from assay.workloads.context import context_length

GIB = 1 << 30
MOST_KV = (
    4 * GIB
)  # for keys and values where nobody says how much: a quarter of the memory that is free, this at most; our choice
MOST_SEQUENCES = 64  # nobody gains from room for more sequences of full length than run at once
UNBOUNDED = 1 << 20  # tokens of budget for a model whose state does not grow
# Two logits closer than this may change places when a model of this dtype computes a row in another batch; our choice, held by a test.
CLOSE = {torch.float64: 2.0**-20, torch.float32: 2.0**-10, torch.float16: 2.0**-4, torch.bfloat16: 2.0**-2}

NOT_FINITE = "the logits are not finite"  # what the loop says of a call with such a row

Wanted = Literal["none", "last", "all"]


class Backend(Protocol):
    """What the scheduler needs. One thread calls it; logits are float32 on the CPU."""

    name: str
    reason: str
    vocab: int  # logits
    positions: int | None  # the most tokens of a prompt and its answer together
    pool: Any  # the budget in pages of PAGE tokens: pages, free, take, release; where prompts are shared also hold, holders, copy
    rows: int | None  # the most rows at a time; None for any number
    pieces: bool  # whether a prompt may be run in pieces
    shares: bool  # whether equal beginnings of prompts may share pages; needs pieces
    threads: int | None  # intra-op threads the model was tuned for
    speculation: Speculation | None  # how a row that runs alone is guessed for; needs verify
    close_choices: int  # greedy choices so far that another batch might have made otherwise

    def begin(self, pages: list[int], length: int = 0) -> Sequence:
        """A sequence on these pages, whose first `length` tokens are in them already."""

    def end(self, sequence: Sequence) -> None:
        """Forget a sequence. Its pages are given back by who took them."""

    def prefill(self, sequence: Sequence, ids: Listed[int], wanted: Wanted) -> Tensor:
        """Append the next tokens of a prompt; the logits (0, 1 or len(ids), vocab) after none, the last, or all of them."""

    def extend(self, sequence: Sequence, tokens: Listed[int]) -> None:
        """Append tokens that `run` made before, as if it made them again."""

    def verify(self, sequence: Sequence, tokens: Listed[int]) -> Tensor:
        """Append tokens in one pass; the logits (len(tokens), vocab) after each, to the bit those of `run`."""

    def run(
        self,
        sequences: list[Sequence],
        tokens: list[int],
        steps: int,
        *,
        sampling: list[Sampling | None] | None,
        uniforms: Tensor | None,
        want_logits: bool,
    ) -> tuple[Tensor, Tensor]:
        """Feed a token to each sequence and continue, `steps` times: the answers (rows, steps) int64, and the logits of the last step
        (rows, vocab) if wanted. Greedy where a row has no sampling; `uniforms` (rows, steps) float64 decide the others. A row whose
        logits are not finite answers -1, and the others as ever.
        """


class CompiledBackend:
    """The compiled decode loop over paged memory; prompts go through the model's own forward pass, which carries the recipe.

    A prompt is run alone, in pieces at fixed places, each over the keys and values of those before it as the pool keeps them. So the
    same prompt gives the same bits whatever runs beside it and whether its beginning was computed now or found, and since the loop
    does not mix rows either, neither do answers depend on other rows. What was made before a row was preempted is put back by
    the loop itself. With a prefill of the recipe's own, or an attention that looks at the prompt as a whole, prompts are run
    whole and nothing is shared; `reason` says so.

    `decoder` is a `decode_loop.Decoder` of the same model, `pages` the budget. Raises what `decoder.new_pool` raises.
    """

    name = "compiled"
    rows: int | None = None
    close_choices = 0

    def __init__(self, model: nn.Module, decoder: Any, *, pages: int, reason: str = "the model fits the loop") -> None:
        self.model: Any = model
        self.decoder = decoder
        self.pool = decoder.new_pool(checks.whole("pages", pages, low=1))
        self.vocab: int = decoder.vocab
        self.positions: int | None = decoder.max_positions
        self.threads: int | None = loop.settings(model)["threads"]
        whole = why_whole(model)
        self.pieces = self.shares = not whole
        how = (
            f"prompts run whole and share nothing: {whole}"
            if whole
            else "prompts run in pieces and share their beginnings"
        )
        self.reason = f"compiled decode loop: {reason}; {how}"
        self.speculation = speculation_of(model)
        if self.speculation is not None:
            self.reason += f"; a row alone is guessed for, {self.speculation.draft} tokens at most"
        self._own_prefill = own_prefill(model)
        self._past: tuple[Sequence, DynamicCache] | None = None  # of the prompt that is being run

    def begin(self, pages: list[int], length: int = 0) -> Sequence:
        return Sequence(pages, length)

    def end(self, sequence: Sequence) -> None:
        if self._past is not None and self._past[0] is sequence:
            self._past = None

    @torch.inference_mode()
    def prefill(self, sequence: Sequence, ids: Listed[int], wanted: Wanted) -> Tensor:
        start, stop = sequence.length, sequence.length + len(ids)
        if self._own_prefill is not None and wanted != "all":  # it gives the logits of the last token only
            done = self._own_prefill(self.model)([list(ids)])
            cache: Any = done.cache
            assert done.logits is not None
            logits = done.logits
        else:
            cache = self._behind(sequence)
            out = self.model(
                input_ids=torch.tensor([ids]),
                position_ids=torch.arange(start, stop)[None],
                cache=cache,
                use_cache=True,
                logits_to_keep=0 if wanted == "all" else 1,
            )
            logits = out.logits[0]
        made = [(keys[0, :, start:], values[0, :, start:]) for keys, values in keys_and_values(cache)]
        keys, values = (torch.stack(part).to(self.pool.keys.dtype) for part in zip(*made, strict=True))
        self.pool.write(sequence.pages, start, keys, values)
        sequence.length = stop
        self._past = None
        if self.pieces and wanted != "last":
            if self.pool.keys.dtype != cache.layers[0].keys.dtype:  # the next piece sees what all later steps see
                for layer, keys, values in zip(cache.layers, *self.pool.read(sequence.pages, start, stop), strict=True):
                    layer.keys[0, :, start:], layer.values[0, :, start:] = keys, values
            self._past = sequence, cache
        return logits[:0].float() if wanted == "none" else logits.float()

    def _behind(self, sequence: Sequence) -> DynamicCache:
        """The sequence so far, in transformers' form."""
        if self._past is not None and self._past[0] is sequence and self._past[1].get_seq_length() == sequence.length:
            return self._past[1]
        cache = DynamicCache()
        if sequence.length:
            dtype = _dtype(self.model)
            for layer, (keys, values) in enumerate(
                zip(*self.pool.read(sequence.pages, 0, sequence.length), strict=True)
            ):
                cache.update(keys[None].to(dtype), values[None].to(dtype), layer)
        return cache

    def extend(self, sequence: Sequence, tokens: Listed[int]) -> None:
        self._extended(sequence, tokens, "none")

    def verify(self, sequence: Sequence, tokens: Listed[int]) -> Tensor:
        return self._extended(sequence, tokens, "all")

    @torch.inference_mode()
    def _extended(self, sequence: Sequence, tokens: Listed[int], wanted: Wanted) -> Tensor:
        try:
            logits: Tensor = self.decoder.extend(self.pool, [(sequence, list(tokens))], logits=wanted)
        except ValueError as error:
            raise not_finite() if NOT_FINITE in str(error) else error from None
        return logits

    @torch.inference_mode()
    def run(
        self,
        sequences: list[Sequence],
        tokens: list[int],
        steps: int,
        *,
        sampling: list[Sampling | None] | None,
        uniforms: Tensor | None,
        want_logits: bool,
    ) -> tuple[Tensor, Tensor]:
        try:
            how = {"sampling": sampling, "uniforms": uniforms, "want_logits": want_logits}
            made: tuple[Tensor, Tensor] = self.decoder.run(self.pool, sequences, tokens, steps, **how)
        except ValueError as error:
            if NOT_FINITE not in str(error):
                raise
        else:
            return made
        if len(sequences) == 1:
            return torch.full((1, steps), -1), torch.full((int(want_logits), self.vocab), torch.nan)
        # no length has changed: each row alone gives the same bits, and shows which it was
        alone = [
            self.run(
                [sequence],
                [token],
                steps,
                sampling=None if sampling is None else sampling[i : i + 1],
                uniforms=None if uniforms is None else uniforms[i : i + 1],
                want_logits=want_logits,
            )
            for i, (sequence, token) in enumerate(zip(sequences, tokens, strict=True))
        ]
        answers, logits = (torch.cat(part) for part in zip(*alone, strict=True))
        return answers, logits


class Budget:
    """Pages that are only counted, for backends whose keys and values lie in transformers' caches."""

    def __init__(self, pages: int) -> None:
        self.pages = self.free = pages

    def take(self, count: int) -> list[int]:
        """Raises OutOfPages, and takes nothing, when there are fewer."""
        if count > self.free:
            raise OutOfPages(f"{count} pages are wanted and {self.free} of {self.pages} are free")
        self.free -= count
        return [0] * count

    def release(self, pages: Listed[int]) -> None:
        self.free += len(pages)


@dataclass(eq=False)
class _Row(Sequence):
    """A sequence with its own cache until it joins the batch."""

    cache: Any = None
    ended: bool = False


class TorchBackend:
    """Any causal language model of transformers: rows are steps of one left-padded batch over a `DynamicCache`.

    A prompt is run alone, in pieces where its attention allows, and joins the batch when its answer begins. Joining and leaving copy
    the keys and values of the batch once, which is what transformers' cache does at every step anyway: it grows by concatenation. The
    memory is that of the rows padded to the longest, twice while they are copied, and windowed layers keep everything.
    Models that keep another cache (Mamba and other recurrent states) run one row at a time, and `reason` says so.

    Greedy answers are those of the row alone, except where the two best logits are closer than `bound`: a batch sums in another
    order. `close_choices` counts such choices.

    transformers' own ContinuousBatchingManager is not used. On a CPU it packs all rows into one and attends under a dense mask over the
    cached tokens of all of them, copied out of its pool in every layer, so that the attention of a step grows with the square of the
    rows; it takes SDPA, eager and flash attention only, draws all requests from one random stream, lets a request choose temperature,
    top-k and top-p and nothing else, and one exception ends it for all. Side by side on two cores, 16 prompts of SmolLM2-135M in bfloat16
    with 32 tokens each: it makes 76 tokens a second, this backend 1.22 times as many (1.07 to 1.50), the compiled one 2.09 times (1.81 to
    2.60) (`python benchmarks/continuous.py --tokens 32 --rounds 3 --out evidence/continuous.jsonl`).

    Raises ValueError for models that do not continue prompts of token ids or keep no cache.
    """

    name = "torch"
    shares = False
    speculation: Speculation | None = None

    def __init__(
        self, model: nn.Module, *, kv_gib: float | None = None, positions: int | None = None, reason: str = ""
    ) -> None:
        if why := loop.why_not(model):
            raise ValueError(f"model must continue prompts of token ids: {why}")
        self.model: Any = model
        self.positions = positions
        self.threads: int | None = loop.settings(model)["threads"]
        self.bound = CLOSE.get(_dtype(model), max(CLOSE.values()))
        self.close_choices = 0
        self.vocab, odd, token_bytes = _probe(self.model)
        odd = odd or why_changing(model)
        self._batches = not odd
        self.rows: int | None = 1 if odd else None
        whole = why_whole(model) or odd
        self.pieces = not whole
        self._own_prefill = own_prefill(model) if self._batches else None
        if odd:
            pages, how = -(-(positions or UNBOUNDED) // PAGE), f"rows run one at a time: {odd}"
        else:
            pages = kv_pages(token_bytes * PAGE, positions, kv_gib)
            how = "rows run as a left-padded batch" + (f", prompts whole: {whole}" if whole else "")
        self.pool = Budget(pages)
        self.reason = f"torch: {reason}; {how}" if reason else f"torch: {how}"
        self._members: list[_Row] = []  # the rows of the batch, those that ended included until it is rebuilt
        self._batch: Any = None

    def begin(self, pages: list[int], length: int = 0) -> Sequence:
        return _Row(pages, length)

    def end(self, sequence: Any) -> None:
        sequence.cache, sequence.ended = None, True
        if all(member.ended for member in self._members):
            self._members, self._batch = [], None

    @torch.inference_mode()
    def prefill(self, sequence: Any, ids: Listed[int], wanted: Wanted) -> Tensor:
        if self._own_prefill is not None and wanted != "all":
            done = self._own_prefill(self.model)([list(ids)])
            assert done.logits is not None
            sequence.cache, logits = done.cache, done.logits
        else:
            logits = self._alone(sequence, ids, keep=0 if wanted == "all" else 1)
        sequence.length += len(ids)
        logits = logits.float().cpu()
        return logits[:0] if wanted == "none" else logits

    @torch.inference_mode()
    def extend(self, sequence: Any, tokens: Listed[int]) -> None:
        for piece in [tokens] if self._batches else [[token] for token in tokens]:  # a state may know single steps only
            self._alone(sequence, piece, keep=1)
            sequence.length += len(piece)

    def _alone(self, sequence: Any, ids: Listed[int], keep: int) -> Tensor:
        """The logits (keep or all, vocab) after tokens of one sequence, whose own cache grows."""
        more: dict[str, Any] = {}
        if self._batches:
            if sequence.cache is None:
                sequence.cache = DynamicCache()
            start = sequence.length
            more["position_ids"] = torch.arange(start, start + len(ids), device=self.model.device)[None]
        if sequence.cache is not None:
            more["cache"] = sequence.cache
        given = torch.tensor([ids], device=self.model.device)
        out = self.model(input_ids=given, use_cache=True, logits_to_keep=keep, **more)
        sequence.cache = out.cache
        logits: Tensor = out.logits[0]
        return logits

    def verify(self, sequence: Any, tokens: Listed[int]) -> Tensor:
        raise NotImplementedError(
            "a pass over several tokens may sum otherwise than one over each: nothing is guessed here"
        )

    @torch.inference_mode()
    def run(
        self,
        sequences: list[Any],
        tokens: list[int],
        steps: int,
        *,
        sampling: list[Sampling | None] | None,
        uniforms: Tensor | None,
        want_logits: bool,
    ) -> tuple[Tensor, Tensor]:
        if self._batches:
            self._assemble(sequences)
        greedy = torch.tensor([how is None for how in sampling or [None] * len(sequences)])
        answers = torch.empty(len(sequences), steps, dtype=torch.int64)
        for step in range(steps):
            if self._batches:
                logits = self._together(sequences, tokens)
            else:
                logits = self._alone(sequences[0], tokens, keep=1).float().cpu()
            for sequence in sequences:
                sequence.length += 1
            best = logits.topk(2).values
            self.close_choices += int(((best[:, 0] - best[:, 1] < self.bound) & greedy).sum())
            made = chosen(logits, sampling, None if uniforms is None else uniforms[:, step])
            answers[:, step] = made.where(torch.isfinite(logits.amax(1)), -1)
            tokens = made.tolist()
        return answers, logits if want_logits else logits[:0]

    def _together(self, sequences: list[Any], tokens: list[int]) -> Tensor:
        """One step of the batch: float32 logits (rows, vocab)."""
        device, lengths = self.model.device, [sequence.length for sequence in sequences]
        mask = None if len(set(lengths)) == 1 else left_padded_mask([length + 1 for length in lengths], device)
        out = self.model(
            input_ids=torch.tensor(tokens, device=device)[:, None],
            attention_mask=mask,
            position_ids=torch.tensor(lengths, device=device)[:, None],
            cache=self._batch,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = out.logits[:, -1].float().cpu()
        return logits

    def _assemble(self, sequences: list[Any]) -> None:
        """Make the batch one of exactly these rows, in this order."""
        here = {id(member): row for row, member in enumerate(self._members)}
        if [here.get(id(sequence)) for sequence in sequences] == list(range(len(self._members))):
            return
        width = 0 if self._batch is None else self._batch.get_seq_length()
        parts = []
        for sequence in sequences:
            row = here.get(id(sequence))
            if row is None:
                parts.append((sequence.cache, Span(0, 0, sequence.length)))
            else:
                parts.append((self._batch, Span(row, width - sequence.length, width)))
        self._batch, self._members = stacked(parts), list(sequences)
        for sequence in sequences:
            sequence.cache = None


def stacked(parts: list[tuple[Any, Span]]) -> DynamicCache:
    """A left-padded cache of one row a span, from several caches that hold all positions in every layer; padding is zero."""
    alone, whole = parts[0]
    if len(parts) == 1 and whole.start == 0 and all(layer.keys.shape[::2] == (1, whole.stop) for layer in alone.layers):
        return alone
    width = max(span.length for _, span in parts)
    pieces = [cut(cache, span) for cache, span in parts]
    joined = DynamicCache()
    for layers in zip(*pieces, strict=True):
        keys, values = (
            torch.cat([F.pad(tensor, (0, 0, width - tensor.shape[2], 0)) for tensor in part])
            for part in zip(*layers, strict=True)
        )
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values  # `update` would copy them
        joined.layers.append(layer)
    return joined


# ------------------------------------------------------------------------------------------------------- what a model has


def speculation_of(model: nn.Module) -> Speculation | None:
    """How the model's recipe speculates, if it does."""
    return model.speculation if isinstance(model, SpeculationMixin) else None


def why_changing(model: nn.Module) -> str:
    """Why rows of other lengths change a row's answer, and pieces that of a prompt; empty where they do not.

    transformers turns all rows of a pass by the frequencies for the longest of them, where these change with the length.
    """
    for module in model.modules():
        kind = getattr(module, "rope_type", "")
        kinds = kind.values() if isinstance(kind, dict) else [kind]
        if changing := sorted({str(one) for one in kinds if "dynamic" in str(one) or one == "longrope"}):
            return f"its rotary embedding of type {changing[0]!r} changes with the length"
    return ""


def own_prefill(model: nn.Module) -> loop.PrefillFactory | None:
    """The prefill in the model's settings, except for models with windows: it fills caches that forget, and no page may be missing."""
    make: loop.PrefillFactory | None = loop.settings(model)["prefill"]
    return None if make is None or any(windows(model)) else make


def why_whole(model: nn.Module) -> str:
    """Why a prompt may not be run in pieces; empty when it may."""
    if own_prefill(model) is not None:
        return "the model's settings have a prefill of their own"
    if own := getattr(
        model, "whole_prompts", ""
    ):  # said by a model that reads a prompt otherwise than what comes behind it
        return str(own)
    return why_whole_attention(model)


def why_whole_attention(model: nn.Module) -> str:
    """Why what a token attends to may depend on the tokens behind it; empty when it does not."""
    config: Any = getattr(model, "config", None)
    name = str(getattr(config.get_text_config(), "_attn_implementation", None)) if config is not None else ""
    if name.startswith("assay_") and name != DENSE_KERNEL:
        return f"the attention {name} looks at the prompt as a whole"
    return ""


def _dtype(model: Any) -> torch.dtype:
    """The dtype of the embedding, which is that of keys and values."""
    dtype: torch.dtype = model.get_input_embeddings().weight.dtype
    return dtype


@torch.inference_mode()
def _probe(model: Any) -> tuple[int, str, int]:
    """What a pass over two tokens shows: the width of the logits, why rows cannot be batched (empty if they can), cache bytes a token.

    Rows are batched if every layer keeps keys and values alone, and the model computes the same over a cache that forgets nothing.
    """
    ids = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
    out = model(input_ids=ids, use_cache=True)
    cache, vocab = out.get("cache"), out.logits.shape[-1]
    if cache is None:
        raise ValueError(f"model must keep a cache: {type(model).__name__} returned none")
    if type(cache) is not DynamicCache:
        return vocab, f"{type(model).__name__} keeps a {type(cache).__name__}", 0
    others = sorted(
        {type(layer).__name__ for layer in cache.layers if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer)}
    )
    if others:
        return vocab, f"{type(model).__name__} keeps a state ({', '.join(others)})", 0
    plain = DynamicCache()
    try:
        again = model(
            input_ids=ids, position_ids=torch.arange(2, device=model.device)[None], cache=plain, use_cache=True
        )
        same = torch.allclose(out.logits, again.logits, atol=1e-3, rtol=1e-3)
    except Exception:  # whatever another cache makes of it
        same = False
    if not same:
        return vocab, f"{type(model).__name__} computes otherwise over a plain DynamicCache", 0
    return vocab, "", sum(keys.nbytes + values.nbytes for keys, values in keys_and_values(plain)) // 2


def kv_pages(page_bytes: int, positions: int | None, kv_gib: float | None) -> int:
    """How many pages of `page_bytes` the budget allows: `kv_gib`, else a quarter of the free memory, 4 GiB at most.

    Never more than 64 sequences of `positions` tokens can use. Raises InputError for a budget of less than one page.
    """
    if kv_gib is None:
        budget = min(psutil.virtual_memory().available // 4, MOST_KV)
    else:
        budget = int(checks.number("kv_gib", kv_gib, above=0) * GIB)
    pages = budget // page_bytes
    if pages < 1:
        raise InputError(
            f"kv_gib must hold one page of {PAGE} tokens, {page_bytes / GIB:.6f} GiB, got {budget / GIB:.6f}"
        )
    return pages if positions is None else min(pages, MOST_SEQUENCES * -(-positions // PAGE))


def backend_for(model: nn.Module, tokenizer: Any = None, *, kv_gib: float | None = None) -> Backend:
    """The backend that serves a model best: the compiled loop where the model fits it, else torch.

    A recipe's own loop is used as it is; a model without one gets its own weights, unrounded ("fp32" or "bf16", a copy of them in the
    loop's order). `kv_gib` bounds the memory of keys and values, by default a quarter of what is free, at most 4 GiB. The tokenizer's
    limit counts where the model names none. Raises InputError for a model that does not continue prompts or a budget below one page.
    """
    if why := loop.why_not(model):
        raise InputError(f"model cannot be served: {why}")
    decoder: Any = getattr(model, "decode_loop", None)
    reason = "the recipe's own loop"
    if not kernels.load("decode"):
        decoder, reason = None, "the compiled loop needs a C++ compiler (g++) on x86-64"
    elif decoder is None:
        exact = {torch.float32: ("fp32", "float32"), torch.bfloat16: ("bf16", "bfloat16")}
        weights, cache = exact.get(_dtype(model), ("fp32", "float32"))
        try:
            decoder, reason = Decoder(model, weights=weights, cache=cache), f"the model's own weights ({weights})"
        except ValueError as error:
            reason = str(error)
    usual = getattr(tokenizer, "model_max_length", 0)
    positions = context_length(model) or (int(usual) if 0 < usual < 10**7 else None)
    if decoder is None:
        return TorchBackend(model, kv_gib=kv_gib, positions=positions, reason=reason)
    pages = kv_pages(decoder.page_bytes, decoder.max_positions, kv_gib)
    return CompiledBackend(model, decoder, pages=pages, reason=reason)

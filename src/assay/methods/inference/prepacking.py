"""Prepacking: run the prompts of a batch end to end in a few rows instead of padding each to the longest (arXiv 2404.09529).

Batched prefill pads every prompt to the longest one and computes the padding too. Here the prompts are packed into rows (bin
packing), run with positions that start at 0 for each prompt and attention that stays within it, and their keys and values are
then cut out and stacked into the left-padded cache that `generate` continues from. Nothing is lost.

The paper computes attention over whole rows under a block-diagonal mask (`backend="mask"`, or "flex" with a block mask).
`backend="varlen"` (our choice, the default) puts all prompts in one row without any padding and runs the model's own attention
function on each prompt alone: linear layers cost sum(l), attention sum(l**2), and no mask is ever made.

When NOT to use it: one prompt, or prompts of equal length (nothing to gain; the plain batch runs then), prefill-free work,
engines that already run flattened tokens (vLLM and the like), and prompts of which each fills the processor by itself (hundreds
of tokens on a CPU): a forward pass for each has no padding either.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from assay import checks
from assay.methods.core.attention.integration import has_sinks
from assay.methods.core.generation.cache import Prefilled, Span, left_pad, unpack
from assay.methods.core.generation.loop import (
    check_settings,
    checked_prompts,
    padded_prefill,
    padding_token,
    set_settings,
)
from assay.methods.transform import Effect, Fit, TuneContext, only

Backend = Literal["varlen", "mask", "flex"]
PackingMethod = Literal["best_fit", "exact"]


# ---------------------------------------------------------------------------------------------------------- bin packing


@dataclass(frozen=True)
class Packing:
    """Which prompts share a row. `bins[r]` are prompt numbers; `optimal` says that no packing has fewer bins (proven)."""

    bins: tuple[tuple[int, ...], ...]
    lengths: tuple[int, ...]
    capacity: int
    optimal: bool

    @property
    def loads(self) -> list[int]:
        """Tokens in each row."""
        return [sum(self.lengths[i] for i in row) for row in self.bins]

    @property
    def area(self) -> int:
        """Token slots that are computed: rows x the longest row."""
        return len(self.bins) * max(self.loads)

    @property
    def padded_area(self) -> int:
        """Token slots of the plain padded batch: prompts x the longest prompt."""
        return len(self.lengths) * max(self.lengths)


def pack_prompts(
    lengths: Sequence[int],
    capacity: int | None = None,
    *,
    method: PackingMethod = "best_fit",
    max_nodes: int = 200_000,
) -> Packing:
    """Pack items of `lengths` tokens into as few rows of `capacity` tokens as possible (default: the longest item).

    "best_fit": longest first, each into the fullest row that still has room, else a new one (the paper's greedy packing;
    at most about 11/9 of the optimum). "exact": fewest rows by branch and bound, the paper's integer program; it stops after
    `max_nodes` steps with the best packing found, and `optimal` of the result says whether that one is proven.
    Raises ValueError for no lengths, a length below 1 or above the capacity, or an unknown method.

    >>> pack_prompts([5, 3, 2, 4]).bins
    ((0,), (3,), (1, 2))
    """
    sizes = tuple(checks.whole("lengths", length, low=1) for length in lengths)
    if not sizes:
        raise ValueError("lengths must hold at least one item, got none")
    capacity = max(sizes) if capacity is None else checks.whole("capacity", capacity, low=1)
    max_nodes = checks.whole("max_nodes", max_nodes, low=0)
    if max(sizes) > capacity:
        raise ValueError(f"lengths must lie in 1..capacity ({capacity}), got {min(sizes)}..{max(sizes)}")
    checks.choice("method", method, ("best_fit", "exact"))
    bins = _best_fit_decreasing(sizes, capacity)
    bound = _lower_bound(sizes, capacity)
    optimal = len(bins) == bound
    if method == "exact" and not optimal:
        bins, optimal = _branch_and_bound(sizes, capacity, bins, bound, max_nodes)
    return Packing(tuple(tuple(row) for row in bins), sizes, capacity, optimal)


def _best_fit_decreasing(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    bins: list[list[int]] = []
    room: list[
        tuple[int, int]
    ] = []  # (free tokens, bin), sorted: the first that is large enough is the fullest that fits
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        place = bisect.bisect_left(room, (sizes[item], -1))
        if place < len(room):
            free, row = room.pop(place)
        else:
            free, row = capacity, len(bins)
            bins.append([])
        bins[row].append(item)
        bisect.insort(room, (free - sizes[item], row))
    return bins


def _lower_bound(sizes: Sequence[int], capacity: int) -> int:
    """Martello and Toth's L2: for each k, items above capacity - k sit alone, items of more than half cannot share a row."""
    best = -(-sum(sizes) // capacity)
    for k in {size for size in sizes if 2 * size <= capacity}:
        alone = sum(1 for size in sizes if size > capacity - k)
        large = [size for size in sizes if capacity - k >= size and 2 * size > capacity]
        small = sum(size for size in sizes if k <= size and 2 * size <= capacity)
        spill = small - (len(large) * capacity - sum(large))
        best = max(best, alone + len(large) + max(0, -(-spill // capacity)))
    return max(best, sum(1 for size in sizes if 2 * size > capacity))


def _branch_and_bound(
    sizes: Sequence[int], capacity: int, greedy: list[list[int]], bound: int, max_nodes: int
) -> tuple[list[list[int]], bool]:
    """Look for a packing into `bound`, `bound` + 1, ... rows, depth first with the largest items first."""
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    left = [0] * (len(order) + 1)  # tokens still to be placed from this item on
    for depth in reversed(range(len(order))):
        left[depth] = left[depth + 1] + sizes[order[depth]]
    smallest = min(sizes)
    nodes = 0

    def place(depth: int, rows: list[list[int]], free: list[int], failed: set[tuple[int, tuple[int, ...]]]) -> bool:
        nonlocal nodes
        if depth == len(order):
            return True
        state = (depth, tuple(sorted(free)))
        if state in failed or sum(f for f in free if f >= smallest) < left[depth]:
            return False
        nodes += 1
        if nodes > max_nodes:
            raise TimeoutError
        size = sizes[order[depth]]
        candidates = {f: row for row, f in enumerate(free) if f >= size}  # rows with equal room are the same choice
        fits = [size] if size in candidates else sorted(candidates)  # an exact fit is never worse than another
        for f in fits:
            row = candidates[f]
            rows[row].append(order[depth])
            free[row] -= size
            if place(depth + 1, rows, free, failed):
                return True
            rows[row].pop()
            free[row] += size
        failed.add(state)
        return False

    for count in range(bound, len(greedy)):
        rows: list[list[int]] = [[] for _ in range(count)]
        try:
            if place(0, rows, [capacity] * count, set()):
                return rows, True
        except TimeoutError:
            return greedy, False
    return greedy, True


# ------------------------------------------------------------------------------------------------------------------ rows


@dataclass(frozen=True)
class PackedRows:
    """Prompts laid out in rows. All tensors are (rows, longest row) int64; `segments` is the prompt number, -1 on padding.

    `spans` say where each prompt lies, in the order of the prompts.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: Tensor
    spans: tuple[Span, ...]


def pack_rows(
    prompts: Sequence[Sequence[int]], bins: Sequence[Sequence[int]], pad_token_id: int = 0, device: Any = None
) -> PackedRows:
    """Lay `prompts` out in the rows of `bins`, one after the other, positions starting at 0 for each.

    Raises ValueError unless every prompt stands in exactly one bin.
    """
    if sorted(i for row in bins for i in row) != list(range(len(prompts))):
        raise ValueError(
            f"bins must hold each of the {len(prompts)} prompts exactly once, got {[list(r) for r in bins]}"
        )
    width = max(sum(len(prompts[i]) for i in row) for row in bins)
    ids, positions, segments = [], [], []
    spans: list[Span] = [Span(0, 0, 0)] * len(prompts)
    for row, members in enumerate(bins):
        tokens: list[int] = []
        places: list[int] = []
        owners: list[int] = []
        for i in members:
            spans[i] = Span(row, len(tokens), len(tokens) + len(prompts[i]))
            tokens += prompts[i]
            places += range(len(prompts[i]))
            owners += [i] * len(prompts[i])
        padding = width - len(tokens)
        ids.append(tokens + [pad_token_id] * padding)
        positions.append(places + [0] * padding)  # one that every model has
        segments.append(owners + [-1] * padding)
    tensors = [torch.tensor(rows, dtype=torch.int64, device=device) for rows in (ids, positions, segments)]
    return PackedRows(tensors[0], tensors[1], tensors[2], tuple(spans))


def packed_mask(segments: Tensor, window: int | None = None) -> Tensor:
    """(rows, W) segments -> (rows, 1, W, W) bool, True where a token may attend: earlier tokens of its own prompt.

    `window` keeps the last `window` of them (sliding-window layers; positions count within the prompt). Padding attends to
    padding, so that no row of the mask is empty.
    """
    place = torch.arange(segments.shape[1], device=segments.device)
    distance = place[:, None] - place[None, :]
    allowed = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    return (allowed & (segments[:, :, None] == segments[:, None, :]))[:, None]


# --------------------------------------------------------------------------------------------------------------- prefill


class PrepackedPrefill:
    """Prefill many prompts without computing padding; the result continues in `model.generate`.

        prefill = PrepackedPrefill(model)
        done = prefill(prompts)                                      # prompts: lists of token ids
        model.generate(**done.generate_inputs(done.logits.argmax(-1)), max_new_tokens=99)

    `last_token=True` (our choice) runs all tokens and returns the logits of each prompt's last one; False is the official
    code's way: the last token is left to the first step of generation, which then samples every new token itself.
    `packing` and `capacity` (tokens a row; default the longest prompt) shape the rows of the "mask" and "flex" backends and,
    for all backends, the batches of `dataset`. Other attention functions registered with transformers keep working: "varlen"
    calls whichever one the model is set to, once a prompt. Not safe when two threads run the same model at once ("varlen" and
    "flex" set the model's attention function for the time of the call).

    Raises ValueError for a model that cannot be packed (encoder-decoder, state-space or chunked layers, an attention that does
    not go through transformers' interface, positions that begin behind the padding token's, as RoBERTa's), an unknown backend or
    packing, a capacity below 1, or a padding token that the model does not know; a call does for a prompt longer than the capacity.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        backend: Backend = "varlen",
        packing: PackingMethod = "best_fit",
        capacity: int | None = None,
        last_token: bool = True,
        pad_token_id: int | None = None,
    ) -> None:
        checks.choice("backend", backend, ("varlen", "mask", "flex"))
        checks.choice("packing", packing, ("best_fit", "exact"))
        capacity = None if capacity is None else checks.whole("capacity", capacity, low=1)
        checks.flag("last_token", last_token)
        if reason := why_not(model):
            raise ValueError(f"model cannot be prepacked: {reason}")
        if backend == "flex" and has_sinks(model) and next(model.parameters()).device.type == "cpu":
            raise ValueError("backend must be 'varlen' or 'mask' for this model: flex attention has no sinks on a CPU")
        self.model: Any = model
        self.backend = backend
        self.packing: PackingMethod = packing
        self.capacity = capacity
        self.last_token = last_token
        self.pad_token_id = padding_token(model, pad_token_id)

    def __call__(self, prompts: Sequence[Sequence[int]]) -> Prefilled:
        """The cache of `prompts`, in their order. Raises ValueError for no prompts or an empty one."""
        prompts = checked_prompts(prompts)
        pieces = prompts if self.last_token else [prompt[:-1] for prompt in prompts]
        return self._run(prompts, self._bins([len(piece) for piece in pieces]))

    def dataset(self, prompts: Sequence[Sequence[int]], rows: int) -> Iterator[tuple[list[int], Prefilled]]:
        """Pack all prompts first, then prefill `rows` rows at a time (the paper's dataset-level mode).

        Yields (numbers of the prompts in this batch, their prefill in that order); every prompt comes once.
        Raises ValueError for rows < 1.
        """
        rows = checks.whole("rows", rows, low=1)
        prompts = checked_prompts(prompts)
        bins = pack_prompts([len(prompt) for prompt in prompts], self.capacity, method=self.packing).bins
        for first in range(0, len(bins), rows):
            members = sorted(i for row in bins[first : first + rows] for i in row)
            place = {i: k for k, i in enumerate(members)}
            own_bins = [[place[i] for i in row] for row in bins[first : first + rows]]
            yield members, self._run([prompts[i] for i in members], own_bins)

    def _bins(self, lengths: Sequence[int]) -> list[list[int]]:
        """Rows for the pieces; those of no tokens (a prompt of one token without its last) take no part in the packing."""
        filled = [i for i, length in enumerate(lengths) if length]
        if not filled:
            return [list(range(len(lengths)))]
        packing = pack_prompts([lengths[i] for i in filled], self.capacity, method=self.packing)
        bins = [[filled[i] for i in row] for row in packing.bins]
        bins[0] += [i for i, length in enumerate(lengths) if not length]
        return bins

    @torch.no_grad()
    def _run(self, prompts: list[list[int]], bins: list[list[int]]) -> Prefilled:
        device = self.model.device
        lengths = [len(prompt) for prompt in prompts]
        ids, mask = left_pad(prompts, self.pad_token_id, device)
        pieces = prompts if self.last_token else [prompt[:-1] for prompt in prompts]
        if not any(pieces):
            return Prefilled(DynamicCache(config=self.model.config), ids, mask, lengths)
        if len(set(lengths)) == 1:  # nothing to pack
            return padded_prefill(self.model, ids, mask, last_token=self.last_token)
        if self.backend == "varlen":
            bins = [[i for row in bins for i in row]]
        rows = pack_rows(pieces, bins, self.pad_token_id, device)
        cache, logits = self._forward(rows)
        return Prefilled(unpack(cache, rows.spans, config=self.model.config), ids, mask, lengths, logits)

    def _forward(self, rows: PackedRows) -> tuple[DynamicCache, Tensor | None]:
        cache = DynamicCache()  # without the config: a sliding-window layer would drop the first prompts of a row
        last = torch.tensor([span.stop - 1 for span in rows.spans], device=rows.input_ids.device)
        columns: Tensor = torch.unique(last)
        inputs: dict[str, Any] = {"input_ids": rows.input_ids, "position_ids": rows.position_ids}
        with contextlib.ExitStack() as stack:
            if self.backend == "varlen":
                lengths = sorted((span.start, span.length) for span in rows.spans if span.length)
                bounds = torch.tensor([0, *(start + length for start, length in lengths)], dtype=torch.int32)
                inputs.update(self._varlen_inputs(bounds))
                stack.enter_context(_attention(self.model, _per_prompt))
            elif self.backend == "flex":
                inputs["attention_mask"] = _per_layer_type(self.model, lambda w: _flex_mask(rows.segments, w))
                stack.enter_context(_attention(self.model, lambda base: "flex_attention"))
            else:
                inputs["attention_mask"] = _per_layer_type(self.model, lambda w: self._dense_mask(rows.segments, w))
            out = self.model(**inputs, cache=cache, use_cache=True, logits_to_keep=columns if self.last_token else 1)
        if not self.last_token:
            return cache, None
        row = torch.tensor([span.row for span in rows.spans], device=last.device)
        return cache, out.logits[row, torch.searchsorted(columns, last)]

    def _varlen_inputs(self, bounds: Tensor) -> dict[str, Any]:
        """transformers' own words for packed sequences; variable-length flash kernels take them as they are."""
        longest = int(bounds.diff().max())
        if _is_flash(self.model.config.get_text_config()._attn_implementation):
            bounds = bounds.to(self.model.device)
        return {
            "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": bounds,
            "max_length_q": longest,
            "max_length_k": longest,
        }

    def _dense_mask(self, segments: Tensor, window: int | None) -> Tensor:
        mask = packed_mask(segments, window)
        if self.model.config.get_text_config()._attn_implementation != "eager":
            return mask
        return _additive(mask, self.model.dtype)


def why_not(model: nn.Module) -> str:
    """Why this model cannot be prepacked; empty when it can."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "generate"):
        return f"{type(model).__name__} is not a transformers language model"
    if config.is_encoder_decoder:
        return "it is an encoder-decoder"
    text = config.get_text_config()
    if foreign := set(_layer_types(text)) - {"full_attention", "sliding_attention"}:
        return f"its {', '.join(sorted(foreign))} layers carry state from one prompt to the next"
    if not getattr(model, "_supports_attention_backend", False):
        return f"the attention of {type(model).__name__} does not go through transformers' attention interface"
    tables = (module for name, module in model.named_modules() if "position" in name.rpartition(".")[2])
    if any(getattr(table, "padding_idx", None) is not None for table in tables):
        return "its positions do not begin at 0 but behind the padding token's"
    return ""


# ------------------------------------------------------------------------------------------------- attention on packed rows


def prompt_by_prompt(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    base: str,
    cu_seq_lens_q: Tensor,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function for transformers that runs `base` (the name of another one) on each packed prompt alone.

    query (1, heads, N, d), key and value (1, key-value heads, N, d); `cu_seq_lens_q` (prompts + 1,) are the bounds of the
    prompts in N. Returns (1, N, heads, d). Each call is plain causal attention, the case for which `base` needs no mask;
    one is made only for eager attention and for prompts longer than a sliding window.
    """
    default: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(base, default)
    for name in ("cu_seq_lens_k", "max_length_q", "max_length_k"):
        kwargs.pop(name, None)
    outputs = []
    for start, stop in pairwise(cu_seq_lens_q.tolist()):
        mask = None
        if base == "eager" or (sliding_window is not None and stop - start > sliding_window):
            mask = packed_mask(torch.zeros(1, stop - start, device=query.device), sliding_window)
            mask = _additive(mask, query.dtype) if base == "eager" else mask
        piece = (tensor[:, :, start:stop] for tensor in (query, key, value))
        outputs.append(attend(module, *piece, mask, sliding_window=sliding_window, **kwargs)[0])
    return torch.cat(outputs, dim=1), None


def _per_prompt(base: str) -> str:
    """The registered name of `prompt_by_prompt` over `base`; flash attention takes packed rows itself."""
    if _is_flash(base):
        return base
    name = f"assay_prompt_by_prompt_{base}"
    if name not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(name, functools.partial(prompt_by_prompt, base=base))
    return name


def _is_flash(implementation: str | None) -> bool:
    return implementation is not None and "flash_attention" in implementation


@contextlib.contextmanager
def _attention(model: nn.Module, replacement: Callable[[str], str]) -> Iterator[None]:
    """Run every config of the model under `replacement(its attention function)`, and put the old ones back."""
    configs: dict[int, Any] = {}
    for module in model.modules():
        if hasattr(config := getattr(module, "config", None), "_attn_implementation"):
            configs.setdefault(id(config), config)
    before = [(config, config._attn_implementation) for config in configs.values()]
    try:
        for config, base in before:
            config._attn_implementation = replacement(base or "eager")
        yield
    finally:
        for config, base in before:
            config._attn_implementation = base


def _layer_types(text_config: Any) -> list[str]:
    return list(getattr(text_config, "layer_types", None) or ["full_attention"])


def _per_layer_type(model: Any, make: Callable[[int | None], Any]) -> Any:
    """A mask for the model's kind of layers, or a dict of them where it mixes two kinds (as transformers' models take it)."""
    text = model.config.get_text_config()
    types = sorted(set(_layer_types(text)))
    window = getattr(text, "sliding_window", None)
    # a configuration may name a window that the model's own masks do not have (Moshi's)
    sources = {type(module).__module__ for module in model.modules()}
    if not any(hasattr(sys.modules[source], "create_sliding_window_causal_mask") for source in sources):
        window = None
    if types == ["full_attention"] and getattr(text, "layer_types", None):
        return make(None)
    if len(types) == 1:
        return make(window)
    return {kind: make(window if kind == "sliding_attention" else None) for kind in types}


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def _flex_mask(segments: Tensor, window: int | None) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def allowed(row: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        same = (segments[row, q] == segments[row, k]) & (q >= k)
        return same if window is None else same & (q - k < window)

    rows, width = segments.shape
    mask: Any = create_block_mask(allowed, rows, None, width, width, device=segments.device)
    mask.ndim = 4  # GPT-2 asks before it lets a mask through
    return mask


# ------------------------------------------------------------------------------------------------------------- transform


@dataclass(frozen=True)
class Prepacking:
    """The tuner's handle: batches are prefilled packed. Sets `model.assay_settings`, which `generate_batch` reads."""

    name: str = "prepacking"
    slot: Literal["batching"] = "batching"
    goals: frozenset[str] = frozenset({"throughput"})
    exact: bool = True

    def applies_to(self, model: nn.Module, context: TuneContext) -> Fit:
        if reason := why_not(model):
            return Fit(False, reason)
        # Our guess for prompts of mixed length: half of an arrival-order batch is padding.
        return Fit(True, effects=(Effect("linear", macs=0.5), Effect("attention", macs=0.5)))

    def configs(self, model: nn.Module, context: TuneContext) -> list[dict[str, Any]]:
        sizes = dict.fromkeys([32, max(context.batch_size, 8)])
        return [{"batch_size": size, "sort_by_length": order} for size in sizes for order in (True, False)]

    def check(self, config: Mapping[str, Any]) -> None:
        """Raises ValueError or TypeError naming the setting that is wrong."""
        check_settings(only(config, ("batch_size", "sort_by_length")))

    def apply(self, model: nn.Module, config: Mapping[str, Any], context: TuneContext) -> nn.Module:
        """Raises TypeError or ValueError, before anything is changed, for a configuration or a model it does not fit."""
        self.check(config)
        if reason := why_not(model):
            raise ValueError(f"model cannot be prepacked: {reason}")
        set_settings(model, prefill=PrepackedPrefill, **config)
        return model

    def describe(self, config: Mapping[str, Any]) -> str:
        order = "sorted " if config.get("sort_by_length") else ""
        size = f" of {config['batch_size']}" if "batch_size" in config else ""
        return f"{order}batches{size} with packed prefill"


transform = Prepacking()

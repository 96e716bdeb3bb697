"""PIE: after an edit in the middle of a context, repair the key-value cache instead of computing it again (arXiv 2407.03157).

Keys are cached after the rotary embedding. When an edit moves what stands behind it by delta tokens, the cached keys there need
one constant rotation more, R(delta), because R(p + delta) = R(delta) R(p); values need nothing. Only the new tokens are run
through the model, with what stands before them as their past. Positions are then exact. Content is not: the suffix was computed
with the old text in view, which only the first layer does not notice.

The paper has no released code; the update rule follows its equations. `our choice`: the layout of the rotation is not assumed but
checked on the model itself; models below float32 keep the keys as they were first computed and rotate from those, so that many
edits do not add up rounding errors; `recompute` runs the first tokens behind the edit again; `staleness` says how much of the
context was computed with an older text in view.

When NOT to use it: edits whose meaning reaches far (a renamed variable: the suffix still speaks of the old name), edits near
the end of the context (running the model from the edit on is exact and costs little more), and models whose rotary frequencies
change with the length or whose attention slides.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from assay.methods.inference.cache import keys_and_values

Layers = list[tuple[Tensor, Tensor]]  # (keys, values) of each layer, (batch, key heads, tokens, head dim)


def rotate_keys(keys: Tensor, delta: Tensor | int, inv_freq: Tensor, *, interleaved: bool = False) -> Tensor:
    """R(delta) applied to keys (..., tokens, dim): as if they had been computed `delta` positions further on.

    `delta` is one number or one for each token (tokens,); `inv_freq` (r,) are the model's angles per position. The first 2 r
    dimensions rotate, the others stay. `interleaved` pairs neighbouring dimensions (GPT-J), else dimension i with i + r.
    Computed in float32 at least; same dtype back. A delta of zero returns the keys themselves.
    """
    if not isinstance(delta, Tensor):
        if delta == 0:
            return keys
        delta = torch.tensor([delta], device=keys.device)
    wide = torch.float64 if keys.dtype == torch.float64 else torch.float32
    angle = delta.double()[:, None] * inv_freq.double().to(keys.device)  # (tokens or 1, r)
    cos, sin = angle.cos().to(wide), angle.sin().to(wide)
    size = 2 * inv_freq.numel()
    part = keys[..., :size].to(wide)
    if interleaved:
        a, b = part[..., 0::2], part[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    else:
        a, b = part.chunk(2, -1)
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    return torch.cat([turned.to(keys.dtype), keys[..., size:]], -1)


def edit_cache(
    cache: DynamicCache,
    start: int,
    old_len: int,
    new_kv: Layers,
    inv_freq: Tensor | None,
    *,
    interleaved: bool = False,
) -> DynamicCache:
    """Replace the tokens [start, start + old_len) of `cache` by `new_kv`, and turn the keys behind them; in place, and returned.

    `new_kv` are the keys (already rotated for positions from `start` on) and values of the new tokens, one pair a layer, tokens
    possibly none. `inv_freq` None turns nothing: for models whose keys carry no positions (ALiBi).
    Raises ValueError for a span outside the cache or another number of layers, TypeError as `keys_and_values`.
    """
    layers = keys_and_values(cache)
    tokens = layers[0][0].shape[2]
    if not 0 <= start <= start + old_len <= tokens:
        raise ValueError(f"start and old_len must lie within the cache's {tokens} tokens, got {start} and {old_len}")
    if len(new_kv) != len(layers):
        raise ValueError(f"new_kv must have {len(layers)} layers, got {len(new_kv)}")
    delta = new_kv[0][0].shape[2] - old_len
    for layer, (keys, values), (new_keys, new_values) in zip(cache.layers, layers, new_kv, strict=True):
        after = keys[:, :, start + old_len :]
        if inv_freq is not None:
            after = rotate_keys(after, delta, inv_freq, interleaved=interleaved)
        target: Any = layer
        target.keys = torch.cat([keys[:, :, :start], new_keys, after], 2)
        target.values = torch.cat([values[:, :, :start], new_values, values[:, :, start + old_len :]], 2)
    return cache


def cache_of(layers: Layers) -> DynamicCache:
    """A cache that holds these keys and values as they are, without a copy."""
    cache = DynamicCache()
    for keys, values in layers:
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


# ---------------------------------------------------------------------------------------------------- the model's rotation


def rotation_of(model: nn.Module) -> tuple[Tensor, bool]:
    """(inv_freq, interleaved) of a model's rotary embedding, checked by running one token at different positions.

    The keys of the first layer depend on the token and its position alone, so R(delta) can be seen.
    Raises ValueError for a model without rotary positions, with frequencies that change with the length, with a sliding
    window, or whose keys do not turn the way either layout says.
    """
    root: Any = model
    config = root.config.get_text_config()
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = scaling.get("rope_type", "default") if isinstance(scaling, dict) else "default"
    if kind in ("dynamic", "longrope"):
        raise ValueError(
            f"the model's rotary frequencies change with the length (rope_type {kind!r}): no constant rotation"
        )
    if any("sliding" in str(name) for name in getattr(config, "layer_types", None) or ()):
        raise ValueError("the model has sliding-window layers, whose caches cannot be repaired by a rotation")
    found = [module.inv_freq for module in model.modules() if isinstance(getattr(module, "inv_freq", None), Tensor)]
    if not found:
        raise ValueError(f"{type(model).__name__} has no rotary embedding (no inv_freq)")
    inv_freq: Tensor = found[0]  # type: ignore[assignment]

    def first_keys(position: int) -> Tensor:
        cache = DynamicCache()
        device = next(model.parameters()).device
        ids = torch.ones(1, 1, dtype=torch.int64, device=device)
        with torch.no_grad():
            model(input_ids=ids, position_ids=ids * 0 + position, cache=cache, use_cache=True)
        return keys_and_values(cache)[0][0].double()

    origin = first_keys(0)
    for interleaved in (False, True):
        turned = [rotate_keys(origin, delta, inv_freq, interleaved=interleaved) for delta in (5, 300)]
        expected = [first_keys(delta) for delta in (5, 300)]
        off = max(float((a - b).norm() / b.norm()) for a, b in zip(turned, expected, strict=True))
        if off < (1e-3 if next(model.parameters()).dtype == torch.float32 else 2e-2):
            return inv_freq, interleaved
    raise ValueError(f"the keys of {type(model).__name__} do not turn with their position as a rotary embedding's")


# ----------------------------------------------------------------------------------------------------------- an editor's context


class EditableContext:
    """A text an editor works on, with its key-value cache: `edit` repairs the cache, `complete` continues from its end.

    model: a causal transformers model with rotary positions (see `rotation_of`); input_ids: int64 (tokens,) or (1, tokens).
    """

    def __init__(self, model: nn.Module, input_ids: Tensor):
        self.model: Any = model
        self.inv_freq, self.interleaved = rotation_of(model)
        self.ids = _row(input_ids, "input_ids")
        if not len(self.ids):
            raise ValueError("input_ids must hold at least one token, got none")
        self.refresh()

    def refresh(self) -> None:
        """Compute the whole cache anew: exact, and as slow as a prefill."""
        self._set(self._run(self.ids, []))
        self._stale = torch.zeros(len(self.ids), dtype=torch.bool)

    def _set(self, layers: Layers) -> None:
        self.layers = layers
        # low precision: keys as first computed, and how far each token was moved since
        low = layers[0][0].dtype.itemsize < 4
        self._origin = [k for k, _ in layers] if low else None
        self._moved = torch.zeros(len(self.ids), dtype=torch.int64)

    def _run(self, ids: Tensor, past: Layers) -> Layers:
        """Keys and values of `ids` behind `past`."""
        cache = cache_of(past) if past else DynamicCache()
        before = past[0][0].shape[2] if past else 0
        with torch.no_grad():
            self.model(input_ids=ids[None].to(self.model.device), cache=cache, use_cache=True, logits_to_keep=1)
        return [(k[:, :, before:], v[:, :, before:]) for k, v in keys_and_values(cache)]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def staleness(self) -> float:
        """Share of the tokens whose keys and values were computed with an older text before them."""
        return float(self._stale.float().mean())

    def edit(
        self, start: int, stop: int, new_ids: Tensor | Sequence[int], *, recompute: int = 0, rotate: bool = True
    ) -> None:
        """Replace the tokens [start, stop) by `new_ids` (any number, also none) and repair the cache.

        `recompute` tokens behind the edit are run again too. `rotate=False` leaves the suffix at its old positions: the
        "conflict" encoding that the paper compares with, wrong on purpose.
        Raises ValueError for a span outside the context, or an edit that leaves nothing.
        """
        new = _row(new_ids, "new_ids")
        if not 0 <= start <= stop <= len(self.ids):
            raise ValueError(f"start and stop must lie within {len(self.ids)} tokens in order, got {start} and {stop}")
        if recompute < 0:
            raise ValueError(f"recompute must be at least 0, got {recompute}")
        stop_run = min(stop + recompute, len(self.ids))
        run = torch.cat([new, self.ids[stop:stop_run]])
        if start + len(run) + len(self.ids) - stop_run == 0:
            raise ValueError("an edit must leave at least one token")
        moved = len(run) - (stop_run - start) if rotate else 0
        prefix = [(k[:, :, :start], v[:, :, :start]) for k, v in self.layers]
        middle = self._run(run, prefix) if len(run) else [(k[:, :, :0], v[:, :, :0]) for k, v in self.layers]
        shift = torch.cat(
            [self._moved[:start], torch.zeros(len(run), dtype=torch.int64), self._moved[stop_run:] + moved]
        )
        behind = start + len(run)
        layers: Layers = []
        origin: list[Tensor] = []
        for index, ((k, v), (new_k, new_v)) in enumerate(zip(self.layers, middle, strict=True)):
            if self._origin is None:
                after = rotate_keys(k[:, :, stop_run:], moved, self.inv_freq, interleaved=self.interleaved)
            else:
                first = self._origin[index]
                origin.append(torch.cat([first[:, :, :start], new_k, first[:, :, stop_run:]], 2))
                after = k[:, :, stop_run:]
                if moved:
                    after = rotate_keys(
                        origin[-1][:, :, behind:], shift[behind:], self.inv_freq, interleaved=self.interleaved
                    )
            layers.append(
                (
                    torch.cat([k[:, :, :start], new_k, after], 2),
                    torch.cat([v[:, :, :start], new_v, v[:, :, stop_run:]], 2),
                )
            )
        fresh = torch.zeros(len(run), dtype=torch.bool)
        self._stale = torch.cat([self._stale[:start], fresh, torch.ones(len(self.ids) - stop_run, dtype=torch.bool)])
        self.ids = torch.cat([self.ids[:start], run, self.ids[stop_run:]])
        self.layers, self._moved = layers, shift
        self._origin = origin if self._origin is not None else None

    def edits(self, changes: Sequence[tuple[int, int, Tensor | Sequence[int]]], **options: Any) -> None:
        """Several disjoint edits (start, stop, new ids) in positions of the context as it is now.

        Raises ValueError when they overlap.
        """
        ordered = sorted(changes, key=lambda change: (change[0], change[1]))
        for (_, stop, _), (start, _, _) in zip(ordered, ordered[1:], strict=False):
            if start < stop:
                raise ValueError(f"edits must not overlap, got one up to {stop} and one from {start}")
        moved = 0
        for start, stop, new in ordered:
            new = _row(new, "new ids")
            self.edit(start + moved, stop + moved, new, **options)
            moved += len(new) - (stop - start)

    def update(self, input_ids: Tensor | Sequence[int], **options: Any) -> int:
        """Make the context `input_ids`, by the edits that lead there; returns how many tokens were new.

        Give the tokens of the whole new text: a tokenizer cuts differently around an edit, which the difference then contains.
        """
        new = _row(input_ids, "input_ids")
        changes = token_changes(self.ids.tolist(), new.tolist())
        self.edits(changes, **options)
        return sum(len(tokens) for _, _, tokens in changes)

    def cache(self) -> DynamicCache:
        """The cache of all tokens but the last, which is to be run next: what `generate` and the model go on from."""
        return cache_of([(k[:, :, :-1], v[:, :, :-1]) for k, v in self.layers])

    def complete(self, max_new_tokens: int, **options: Any) -> Tensor:
        """Continue greedily (or as `options` of `generate` say) from the end: the new tokens, int64 (n,)."""
        ids = self.ids[None].to(self.model.device)
        settings = {"max_new_tokens": max_new_tokens, "do_sample": False, "pad_token_id": 0, **options}
        out = self.model.generate(ids, attention_mask=torch.ones_like(ids), cache=self.cache(), **settings)
        return out[0, len(self.ids) :].cpu()

    def fork(self) -> EditableContext:
        """A copy to edit independently; tensors are shared, since edits make new ones."""
        twin = copy.copy(self)
        twin.layers = list(self.layers)
        return twin


def token_changes(old: Sequence[int], new: Sequence[int]) -> list[tuple[int, int, list[int]]]:
    """The edits (start, stop, new tokens) that turn `old` into `new`: common ends aside, by difflib's matching blocks."""
    first = 0
    while first < min(len(old), len(new)) and old[first] == new[first]:
        first += 1
    last = 0
    while last < min(len(old), len(new)) - first and old[-1 - last] == new[-1 - last]:
        last += 1
    a, b = old[first : len(old) - last], new[first : len(new) - last]
    matcher = difflib.SequenceMatcher(None, a, b, autojunk=False)
    return [(first + i1, first + i2, list(b[j1:j2])) for tag, i1, i2, j1, j2 in matcher.get_opcodes() if tag != "equal"]


def _row(ids: Tensor | Sequence[int], name: str) -> Tensor:
    found = torch.as_tensor(ids if isinstance(ids, Tensor) else list(ids), dtype=torch.int64).cpu()
    if found.ndim == 2 and len(found) == 1:
        found = found[0]
    if found.ndim != 1:
        raise ValueError(f"{name} must be (tokens,) or (1, tokens), got {tuple(found.shape)}")
    return found

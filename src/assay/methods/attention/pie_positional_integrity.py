"""PIE: after an edit in the middle of a context, repair the key-value cache instead of computing it again (arXiv 2407.03157).

Keys are cached after the rotary embedding. When an edit moves the text after it by delta tokens, the cached keys there need one
more constant rotation, R(delta), because R(p + delta) = R(delta) R(p); values need nothing. Only the new tokens are run through the
model, with everything before them as their past. Positions are then exact. Content is not: the suffix was computed with the old
text in view, and only the first layer is unaffected by that.

The paper has no released code; the update rule follows its equations. `our choice`: how the keys of each layer rotate is not assumed
but checked on the model itself; models below float32 keep the keys as first computed and rotate from those, so that many edits do
not accumulate rounding errors; `recompute` runs the first tokens after the edit again; `staleness` says how much of the context was
computed with an older text in view. Layers with a sliding window keep all their tokens here, since an edit can bring old ones back
into the window.

When NOT to use it: edits whose meaning reaches far (a renamed variable: the suffix still refers to the old name), edits near the
end of the context (running the model from the edit on is exact and costs little more), and models whose rotary frequencies
change with the length.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from assay import checks
from assay.methods.core.generation.cache import keys_and_values

Layers = list[tuple[Tensor, Tensor]]  # (keys, values) of each layer, (batch, key heads, tokens, head dim)


def rotate_keys(keys: Tensor, delta: Tensor | int, inv_freq: Tensor, *, interleaved: bool = False) -> Tensor:
    """R(delta) applied to keys (..., tokens, dim): as if they had been computed `delta` positions further on.

    `delta` is one number or one for each token (tokens,); `inv_freq` (r,) are the model's angles per position. The first 2 r
    dimensions rotate, the others stay. `interleaved` pairs neighbouring dimensions (GPT-J), else dimension i with i + r.
    Computed in float32 at least; same dtype back. A delta of zero returns the keys themselves.
    Raises TypeError for deltas that are no whole numbers and keys that are no floating-point ones, ValueError for other shapes.

    >>> keys, inv_freq = torch.randn(1, 2, 5, 8), 1e4 ** -(torch.arange(4) / 4)
    >>> there_and_back = rotate_keys(rotate_keys(keys, 3, inv_freq), -3, inv_freq)
    >>> bool((there_and_back - keys).abs().max() < 1e-5)
    True
    """
    checks.tensor("keys", keys, shape=("...", "tokens", "dim"), empty=True)
    checks.tensor("inv_freq", inv_freq, ndim=1)
    checks.flag("interleaved", interleaved)
    if isinstance(delta, Tensor):
        checks.tensor("delta", delta, shape=(keys.shape[-2],), dtype="integer", empty=True)
    elif checks.whole("delta", delta) == 0:
        return keys
    else:
        delta = torch.tensor([delta])
    if 2 * inv_freq.numel() > keys.shape[-1]:
        raise ValueError(
            f"inv_freq must have at most half as many values as keys have dimensions ({keys.shape[-1]}), got {inv_freq.numel()}"
        )
    wide = torch.float64 if keys.dtype == torch.float64 else torch.float32
    angle = delta.to(keys.device).double()[:, None] * inv_freq.to(keys.device).double()  # (tokens or 1, r)
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
    inv_freq: Tensor | Sequence[Tensor | None] | None,
    *,
    interleaved: bool = False,
) -> DynamicCache:
    """Replace the tokens [start, start + old_len) of `cache` by `new_kv` and rotate the keys after them; changes and returns `cache`.

    `new_kv` are the keys (already rotated for positions from `start` on) and values of the new tokens, one pair per layer, tokens
    possibly none; all rows of a batch are edited in the same place. `inv_freq` is one for all layers or one for each, as
    `rotation_of` finds them; None rotates nothing: for keys that carry no positions (ALiBi, layers without rotary embedding).
    Raises ValueError for a span outside the cache or new keys and values that do not fit it, TypeError as `keys_and_values`,
    for new ones of another dtype and for layers that do not keep all tokens as they came (sliding, quantised, static). The cache
    is then unchanged.
    """
    layers = _whole_layers(cache)
    tokens = layers[0][0].shape[2]
    if not 0 <= checks.whole("start", start) <= start + checks.whole("old_len", old_len) <= tokens or old_len < 0:
        raise ValueError(f"start and old_len must lie within the cache's {tokens} tokens, got {start} and {old_len}")
    if len(new_kv) != len(layers):
        raise ValueError(f"new_kv must have {len(layers)} layers, got {len(new_kv)}")
    for pair, held in zip(new_kv, layers, strict=True):
        for found, own in zip(pair, held, strict=True):
            checks.tensor("new_kv", found, ndim=4, dtype=own.dtype, device=own.device, empty=True)
    new = new_kv[0][0].shape[2]
    for index, (old, given) in enumerate(zip(layers, new_kv, strict=True)):
        wanted = [(*x.shape[:2], new, x.shape[3]) for x in old]
        if [tuple(x.shape) for x in given] != wanted:
            shapes = [tuple(x.shape) for x in given]
            raise ValueError(f"new_kv must have shapes {wanted} in layer {index}, got {shapes}")
    each = [inv_freq] * len(layers) if inv_freq is None or isinstance(inv_freq, Tensor) else list(inv_freq)
    if len(each) != len(layers):
        raise ValueError(f"inv_freq must be one tensor or {len(layers)}, one for each layer, got {len(each)}")
    stop = start + old_len
    edited = [
        (
            torch.cat([k[:, :, :start], new_k, _turned(k[:, :, stop:], new - old_len, f, interleaved)], 2),
            torch.cat([v[:, :, :start], new_v, v[:, :, stop:]], 2),
        )
        for (k, v), (new_k, new_v), f in zip(layers, new_kv, each, strict=True)
    ]
    for layer, (keys, values) in zip(cache.layers, edited, strict=True):
        target: Any = layer
        target.keys, target.values = keys, values
    return cache


def _turned(keys: Tensor, delta: Tensor | int, inv_freq: Tensor | None, interleaved: bool) -> Tensor:
    return keys if inv_freq is None else rotate_keys(keys, delta, inv_freq, interleaved=interleaved)


def _whole_layers(cache: Cache) -> Layers:
    """The cache's keys and values, after checking that each layer holds all tokens as they were computed."""
    for index, layer in enumerate(cache.layers):
        if type(layer) is not DynamicLayer:
            raise TypeError(
                f"cache must be a DynamicCache of layers that keep every token, "
                f"layer {index} is a {type(layer).__name__}: fill a plain DynamicCache() instead"
            )
    if not cache.layers:
        raise ValueError("cache must hold tokens, this one is empty")
    return keys_and_values(cache)


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


def rotation_of(model: nn.Module) -> tuple[list[Tensor | None], bool]:
    """(inv_freq of each layer, interleaved): how a model's keys rotate with their position, measured on the model itself.

    A single token attends to nothing but itself, so its keys differ between positions by R(delta) alone, in every layer: layers
    with frequencies of their own and layers that do not turn (None) are told apart. Models without rotary embedding pass when
    their keys carry no position at all (ALiBi). Raises ValueError for frequencies that change with the length, for learned
    positions, and for keys that rotate in an unknown way.
    """
    root: Any = model
    config = root.config.get_text_config()
    if kinds := {"dynamic", "longrope"} & _rope_types(config):
        raise ValueError(
            f"the model's rotary frequencies change with the length (rope_type {kinds.pop()!r}): no constant rotation"
        )
    name = type(model).__name__
    known = _frequencies(model, config)
    if known:
        deltas = [min(n, getattr(config, "max_position_embeddings", 300) - 1) for n in (5, 300)]
        origin, *moved = (_keys(model, [1], position) for position in (0, *deltas))
    else:  # equal tokens, for models that take no positions: attention mixes equal values
        deltas = [5, 8]
        origin, *moved = ([k[:, :, n : n + 1] for k in _keys(model, [1] * 9)] for n in (0, *deltas))
    tolerance = 1e-3 if origin[0].dtype.itemsize >= 4 else 2e-2

    def fits(layer: int, inv_freq: Tensor | None, interleaved: bool) -> bool:
        if inv_freq is not None and 2 * inv_freq.numel() > origin[layer].shape[-1]:
            return False  # another part's, an image encoder's say
        for delta, keys in zip(deltas, moved, strict=True):
            wanted = keys[layer].double()
            off = _turned(origin[layer].double(), delta, inv_freq, interleaved) - wanted
            if not float(off.norm()) < tolerance * float(wanted.norm()):
                return False
        return True

    for interleaved in (False, True):
        found = [[f for f in (None, *known) if fits(layer, f, interleaved)] for layer in range(len(origin))]
        if all(found):
            return [fitting[0] for fitting in found], interleaved
    if not known:
        raise ValueError(f"{name} has no rotary embedding, but its keys depend on their position")
    raise ValueError(f"the keys of {name} do not turn with their position as a rotary embedding's")


def _rope_types(config: Any) -> set[str]:
    """The kinds of rotary scaling a configuration names, for all layers or for kinds of layers."""
    scaling = getattr(config, "rope_parameters", None) or {}
    return {str(part.get("rope_type")) for part in (scaling, *scaling.values()) if isinstance(part, dict)}


def _frequencies(model: nn.Module, config: Any) -> list[Tensor]:
    """Every different set of angles per position that the model holds."""
    found: list[Tensor] = []
    held = [buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq")]
    if size := getattr(config, "rotary_dim", None):  # GPT-J and CodeGen keep a table of sines instead
        held.append(10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size))
    for buffer in held:
        if not any(torch.equal(buffer.cpu().double(), other.cpu().double()) for other in found):
            found.append(buffer)
    return found


@torch.no_grad()
def _keys(model: Any, tokens: list[int], position: int | None = None) -> list[Tensor]:
    """The keys of each layer for tokens, the first of them at `position` (None: where the model puts it)."""
    cache = DynamicCache()
    ids = torch.tensor([tokens], device=model.device)
    options = {} if position is None else {"position_ids": torch.full_like(ids, position)}
    model(input_ids=ids, cache=cache, use_cache=True, **options)
    return [keys for keys, _ in keys_and_values(cache)]


# ----------------------------------------------------------------------------------------------------------- an editor's context


class EditableContext:
    """A text an editor works on, with its key-value cache: `edit` repairs the cache, `complete` continues from its end.

    model: a causal transformers model (see `rotation_of`); input_ids: int64 (tokens,) or (1, tokens). `cache`: a DynamicCache that
    holds the first of these tokens, as `generate` leaves it behind; only the others are then run. It is not changed.
    Raises ValueError for a model or a cache that does not fit, TypeError for a cache that does not keep every token.
    """

    def __init__(self, model: nn.Module, input_ids: Tensor | Sequence[int], cache: DynamicCache | None = None):
        self.model: Any = model
        self.inv_freq, self.interleaved = rotation_of(model)
        self.ids = self._row(input_ids, "input_ids")
        if not len(self.ids):
            raise ValueError("input_ids must hold at least one token, got none")
        past = [] if cache is None else _whole_layers(cache)
        if past and not (len(past[0][0]) == 1 and past[0][0].shape[2] <= len(self.ids)):
            raise ValueError(
                f"cache must hold one row of at most {len(self.ids)} tokens, got {len(past[0][0])} of {past[0][0].shape[2]}"
            )
        self._begin(past)

    def refresh(self) -> None:
        """Recompute the whole cache: exact, and as slow as a prefill."""
        self._begin([])

    def _begin(self, past: Layers) -> None:
        self.layers = self._behind(past, self.ids[past[0][0].shape[2] if past else 0 :])
        # low precision: keys as first computed, and how far each token was moved since
        low = self.layers[0][0].dtype.itemsize < 4
        self._origin = [k for k, _ in self.layers] if low else None
        self._moved = torch.zeros(len(self.ids), dtype=torch.int64)
        self._stale = torch.zeros(len(self.ids), dtype=torch.bool)

    def _behind(self, past: Layers, ids: Tensor) -> Layers:
        """Keys and values of `past` and of the `ids` after it, which are computed."""
        if not len(ids):
            return past
        cache = cache_of(past) if past else DynamicCache()
        with torch.no_grad():
            self.model(input_ids=ids[None].to(self.model.device), cache=cache, use_cache=True, logits_to_keep=1)
        return keys_and_values(cache)

    def _row(self, ids: Tensor | Sequence[int], name: str) -> Tensor:
        """`ids` as int64 (tokens,) on the CPU."""
        found = ids if isinstance(ids, Tensor) else torch.tensor(list(ids), dtype=None if len(ids) else torch.int64)
        if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
            raise TypeError(f"{name} must be integers, got {found.dtype}")
        if found.ndim == 2 and len(found) == 1:
            found = found[0]
        if found.ndim != 1:
            raise ValueError(f"{name} must be (tokens,) or (1, tokens), got {tuple(found.shape)}")
        found = found.cpu().long()
        size = self.model.get_input_embeddings().num_embeddings
        if len(found) and not 0 <= int(found.min()) <= int(found.max()) < size:
            raise ValueError(f"{name} must lie in [0, {size}), got {int(found.min())} to {int(found.max())}")
        return found

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def staleness(self) -> float:
        """Share of the tokens whose keys and values were computed with an older text before them."""
        return float(self._stale.float().mean())

    def edit(
        self, start: int, stop: int, new_ids: Tensor | Sequence[int], *, recompute: int = 0, rotate: bool = True
    ) -> None:
        """Replace the tokens [start, stop) by `new_ids` (any number, even none) and repair the cache.

        `recompute` tokens after the edit are run again too. `rotate=False` leaves the suffix at its old positions: the
        "conflict" encoding that the paper compares with, wrong on purpose.
        Raises ValueError for a span outside the context, ids outside the vocabulary, or an edit that leaves nothing.
        """
        self.edits([(start, stop, new_ids)], recompute=recompute, rotate=rotate)

    def edits(
        self,
        changes: Sequence[tuple[int, int, Tensor | Sequence[int]]],
        *,
        recompute: int = 0,
        rotate: bool = True,
    ) -> None:
        """Make several disjoint edits (start, stop, new ids), in positions of the current context; options as for `edit`.

        Raises ValueError as `edit`, and when they overlap; nothing is edited then.
        """
        checks.whole("recompute", recompute, low=0)
        checks.flag("rotate", rotate)
        ordered = [
            (start, stop, self._row(new, "new_ids")) for start, stop, new in sorted(changes, key=lambda c: c[:2])
        ]
        for start, stop, _ in ordered:
            if not 0 <= checks.whole("start", start) <= checks.whole("stop", stop) <= len(self.ids):
                raise ValueError(
                    f"start and stop must lie within {len(self.ids)} tokens in order, got {start} and {stop}"
                )
        for (_, stop, _), (start, _, _) in zip(ordered, ordered[1:], strict=False):
            if start < stop:
                raise ValueError(f"edits must not overlap, got one up to {stop} and one from {start}")
        if len(self.ids) + sum(len(new) - (stop - start) for start, stop, new in ordered) == 0:
            raise ValueError("an edit must leave at least one token")
        moved = 0
        for start, stop, new in ordered:
            self._replace(start + moved, stop + moved, new, recompute, rotate)
            moved += len(new) - (stop - start)

    def _replace(self, start: int, stop: int, new: Tensor, recompute: int, rotate: bool) -> None:
        delta = len(new) - (stop - start) if rotate else 0
        rest = min(stop + recompute, len(self.ids))  # the part that is kept starts here
        run = torch.cat([new, self.ids[stop:rest]])
        front = self._behind([(k[:, :, :start], v[:, :, :start]) for k, v in self.layers], run)
        shift = self._moved[rest:] + delta
        layers: Layers = []
        origin: list[Tensor] = []
        for index, ((k, v), (front_k, front_v), f) in enumerate(zip(self.layers, front, self.inv_freq, strict=True)):
            after = k[:, :, rest:]
            if self._origin is None:
                after = _turned(after, delta, f, self.interleaved)
            else:
                first = self._origin[index]
                origin.append(torch.cat([first[:, :, :start], front_k[:, :, start:], first[:, :, rest:]], 2))
                if delta:
                    after = _turned(first[:, :, rest:], shift, f, self.interleaved)
            layers.append((torch.cat([front_k, after], 2), torch.cat([front_v, v[:, :, rest:]], 2)))
        ran, kept = torch.zeros(len(run), dtype=torch.int64), len(self.ids) - rest
        self._moved = torch.cat([self._moved[:start], ran, shift])
        self._stale = torch.cat([self._stale[:start], ran.bool(), torch.ones(kept, dtype=torch.bool)])
        self.ids = torch.cat([self.ids[:start], run, self.ids[rest:]])
        self.layers = layers
        self._origin = origin if self._origin is not None else None

    def update(self, input_ids: Tensor | Sequence[int], **options: Any) -> int:
        """Turn the context into `input_ids` by the necessary edits; returns how many tokens were new.

        Pass the tokens of the whole new text: a tokenizer splits text differently around an edit, and the difference then includes that.
        """
        new = self._row(input_ids, "input_ids")
        changes = token_changes(self.ids.tolist(), new.tolist())
        self.edits(changes, **options)
        return sum(len(tokens) for _, _, tokens in changes)

    def cache(self) -> DynamicCache:
        """The cache of all tokens but the last, which is run next: the state from which `generate` and the model continue."""
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
    """The edits (start, stop, new tokens) that turn `old` into `new`: common ends aside, by difflib's matching blocks.

    >>> token_changes([1, 2, 3, 4], [1, 9, 9, 3, 4])
    [(1, 2, [9, 9])]
    """
    first = 0
    while first < min(len(old), len(new)) and old[first] == new[first]:
        first += 1
    last = 0
    while last < min(len(old), len(new)) - first and old[-1 - last] == new[-1 - last]:
        last += 1
    a, b = old[first : len(old) - last], new[first : len(new) - last]
    matcher = difflib.SequenceMatcher(None, a, b, autojunk=False)
    return [(first + i1, first + i2, list(b[j1:j2])) for tag, i1, i2, j1, j2 in matcher.get_opcodes() if tag != "equal"]

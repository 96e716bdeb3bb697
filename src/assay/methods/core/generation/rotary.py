"""Keys at other positions: undoing the rotary embedding (RoPE) of cached keys, and turning them to where they shall be.

A cache holds keys as they were turned for their position p: k = R(p) u. `Rotary.unrotate` gives u back, `Rotary.rotate` turns it to any
position, `Rotary.moved` does both with one rounding. `rotaries_of(model)` finds how each layer of a model turns and checks it on the
model itself; `repositioned` and `moved` do it for a whole cache.

The angles, sines and cosines are those that the model computes: angles in float32, then rounded to the keys' dtype, times
the model's `attention_scaling`. The inverse divides by cos^2 + sin^2 as rounded. So a moved key is what the model computes
at the new place up to the rounding of the key itself, far out too, where the angle alone is off by 1e-4 and more.
Covered are rotations whose frequencies do not depend on the length (default, linear, llama3, yarn, proportional), of all or of the first
dimensions of a head, in halves (Llama, GPT-NeoX) or neighbours (GPT-J, Cohere), and layers that do not turn at all among them.

When NOT to use it: for frequencies that change with the length (dynamic, longrope), for learned positions, and where the keys are
normalised or mixed after the rotation; `rotaries_of` refuses these. Moving keys does not change what they say: keys and values
of all layers but the first were computed with the text that stood before them then.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from assay import checks
from assay.methods.core.generation.slices import PLAIN, AnyCache, layers_of, rebuilt, tensors_of, with_layers

FAR = 300  # a position that shows how a model turns, if its context reaches there


@dataclass(frozen=True, eq=False)
class Rotary:
    """How the keys of a layer turn: by position * inv_freq, (r,) angles of the first 2 r dimensions of a head; the others stay.

    Pairs that turn together are dimension i and i + r, or neighbours if `interleaved`. `scaling` is what sine and cosine are
    multiplied by (YaRN's attention factor). Keys are (rows, heads, tokens, head dim), positions int64 (tokens,), (rows, tokens) or (rows,
    heads, tokens). Results have the dtype of the keys; float32 is computed with at least. Gradients pass to the keys.
    Each method raises TypeError for keys that are no floating-point numbers and positions that are not whole ones, ValueError for
    shapes that do not fit.

    >>> rotary = Rotary(1e4 ** -(torch.arange(4) / 4))
    >>> keys, places = torch.randn(1, 2, 5, 8, dtype=torch.float64), torch.arange(5)
    >>> bool((rotary.rotate(rotary.unrotate(keys, places), places) - keys).abs().max() < 1e-12)
    True
    """

    inv_freq: Tensor
    scaling: float = 1.0
    interleaved: bool = False

    def __post_init__(self) -> None:
        checks.tensor("inv_freq", self.inv_freq, ndim=1)
        checks.number("scaling", self.scaling, above=0)
        checks.flag("interleaved", self.interleaved)

    def rotate(self, keys: Tensor, positions: Tensor) -> Tensor:
        """Keys without positions as the model keeps them at `positions`."""
        return self._turned(keys, to=positions)

    def unrotate(self, keys: Tensor, positions: Tensor) -> Tensor:
        """Keys kept at `positions` as the model had them before it turned (and scaled) them: the inverse of `rotate`."""
        return self._turned(keys, back=positions)

    def moved(self, keys: Tensor, old: Tensor, new: Tensor) -> Tensor:
        """Keys kept at positions `old` as the model keeps them at `new`."""
        return self._turned(keys, back=old, to=new)

    def _turned(self, keys: Tensor, *, back: Tensor | None = None, to: Tensor | None = None) -> Tensor:
        checks.tensor("keys", keys, ndim=4, empty=True)
        size = 2 * len(self.inv_freq)
        if size > keys.shape[-1]:
            raise ValueError(f"keys must have at least {size} dimensions a head, which turn, got {keys.shape[-1]}")
        part = keys[..., :size].to(torch.promote_types(keys.dtype, torch.float32))
        a, b = (part[..., 0::2], part[..., 1::2]) if self.interleaved else part.chunk(2, -1)
        if back is not None:
            cos, sin = self._tables(keys, back)
            norm = cos.square() + sin.square()
            a, b = (a * cos + b * sin) / norm, (b * cos - a * sin) / norm
        if to is not None:
            cos, sin = self._tables(keys, to)
            a, b = a * cos - b * sin, b * cos + a * sin
        turned = torch.stack([a, b], -1).flatten(-2) if self.interleaved else torch.cat([a, b], -1)
        return torch.cat([turned.to(keys.dtype), keys[..., size:]], -1)

    def _tables(self, keys: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of every token, (tokens, r) or with rows and heads in front, as the model rounds them."""
        checks.tensor("positions", positions, dtype="integer", empty=True)
        rows, heads, tokens, _ = keys.shape
        if tuple(positions.shape) not in ((tokens,), (rows, tokens), (rows, heads, tokens)):
            raise ValueError(
                f"positions must have shape ({tokens},), ({rows}, {tokens}) or ({rows}, {heads}, {tokens}) for these keys, "
                f"got {tuple(positions.shape)}"
            )
        if positions.ndim == 2:
            positions = positions[:, None]
        angles = positions.to(keys.device)[..., None].float() * self.inv_freq.to(keys.device).float()
        wide = torch.promote_types(keys.dtype, torch.float32)
        cos, sin = ((x * self.scaling).to(keys.dtype).to(wide) for x in (angles.cos(), angles.sin()))
        return cos, sin


# ------------------------------------------------------------------------------------------------------------ of a model


def rotaries_of(model: nn.Module) -> list[Rotary | None]:
    """How the keys of each layer of a causal transformers model turn; None for a layer whose keys know no position.

    Measured, not assumed: a single token attends to nothing but itself, so that its keys at two positions differ by the rotation
    alone, in every layer. It takes three passes of one token. Raises ValueError for a model without rotary embedding, with
    frequencies that change with the length, or whose keys turn in another way; TypeError for recurrent layers.
    """
    name, module = type(model).__name__, _runnable(model)
    kinds = {kind for part in model.modules() if hasattr(part, "rope_type") for kind in _kinds(part.rope_type)}
    if changing := sorted(kind for kind in kinds if "dynamic" in kind or kind == "longrope"):
        raise ValueError(f"the rotary frequencies of {name} change with the length (rope_type {changing[0]!r})")
    known = _known(model)
    if not known:
        raise ValueError(f"{name} has no rotary embedding")
    config = module.config.get_text_config()
    places = sorted({5, min(FAR, getattr(config, "max_position_embeddings", FAR + 1) - 1)})
    origin = _keys_at(module, 0)
    there = {place: _keys_at(module, place) for place in places}

    def fits(rotary: Rotary | None, index: int) -> bool:
        keys = origin[index]
        if rotary is not None and 2 * len(rotary.inv_freq) > keys.shape[-1]:
            return False  # another part's, an image encoder's say
        tolerance = 1e-4 if keys.dtype.itemsize >= 4 else 2e-2
        for place in places:
            turned = keys if rotary is None else rotary.moved(keys, torch.tensor([0]), torch.tensor([place]))
            wanted = there[place][index].double()
            if not float((turned.double() - wanted).norm()) < tolerance * float(wanted.norm()):
                return False
        return True

    found: list[Rotary | None] = []
    for index in range(len(origin)):
        fitting = [rotary for rotary in (None, *known) if not origin[index].numel() or fits(rotary, index)]
        if not fitting:
            raise ValueError(f"the keys of layer {index} of {name} do not turn as those of a rotary embedding")
        found.append(fitting[0])
    return found


def _runnable(model: nn.Module) -> Any:
    module: Any = model
    given = inspect.signature(module.forward).parameters
    if not hasattr(module, "config") or not {"position_ids", "cache"} <= set(given):
        raise ValueError(f"model must take position_ids and a cache, as decoders do, got {type(model).__name__}")
    return module


def _kinds(rope_type: Any) -> list[str]:
    """The kinds of rotary embedding that a module names: one, or one for each kind of layer."""
    return [str(kind) for kind in (rope_type.values() if isinstance(rope_type, dict) else [rope_type])]


def _known(model: nn.Module) -> list[Rotary]:
    """Every way of turning that the model's modules could mean, in halves first."""
    found: list[tuple[Tensor, float]] = []
    for part in model.modules():
        for name, buffer in part.named_buffers(recurse=False):
            if name.endswith("inv_freq") and "original" not in name and buffer.ndim == 1:
                scaling = getattr(part, f"{name.removesuffix('inv_freq')}attention_scaling", 1.0)
                found.append((buffer.detach(), float(scaling)))
        if (size := getattr(part, "pos_embd_dim", None)) and hasattr(part, "embed_positions"):
            # GPT-J and CodeGen keep a table of sines instead, always to this base
            found.append((1.0 / (10000 ** (torch.arange(0, size, 2) / size)), 1.0))
    distinct: list[tuple[Tensor, float]] = []
    for inv_freq, scaling in found:
        if not any(
            scaling == other and torch.equal(inv_freq.cpu().float(), seen.cpu().float()) for seen, other in distinct
        ):
            distinct.append((inv_freq, scaling))
    return [Rotary(*one, interleaved=interleaved) for interleaved in (False, True) for one in distinct]


@torch.no_grad()
def _keys_at(module: Any, position: int) -> list[Tensor]:
    """The keys of each layer for one token at that position; empty for a layer that keeps none."""
    cache = DynamicCache(config=module.config)
    token = 2 if module.config.get_text_config().pad_token_id == 1 else 1  # the embedding of padding may be zero
    ids = torch.full((1, 1), token, device=module.device)
    module(input_ids=ids, position_ids=torch.full_like(ids, position), cache=cache, use_cache=True)
    nothing = torch.empty(1, 0, 1, 0)
    return [tensors_of(layer, index).get("keys", nothing) for index, layer in enumerate(layers_of(cache))]


# ------------------------------------------------------------------------------------------------------------ of a cache


def repositioned(
    cache: AnyCache,
    model: nn.Module | Sequence[Rotary | None],
    old: Tensor | Sequence[Tensor],
    new: Tensor | Sequence[Tensor],
) -> AnyCache:
    """The cache as if the keys at positions `old` had been kept at `new`; values are shared with `cache`, which does not change.

    `model` is the model, or what `rotaries_of` found on it, which saves looking again. Positions are as in `Rotary`, for all layers or
    one tensor for each; of more positions than a layer holds tokens (a sliding one), the last count.
    Raises ValueError for positions that do not fit and as `rotaries_of`, TypeError as `slices.tensors_of` and for layers that keep
    their keys in another form (8 bits: move them before they are rounded).
    """
    rotaries = rotaries_of(model) if isinstance(model, nn.Module) else list(model)
    layers = layers_of(cache)
    if len(rotaries) != len(layers):
        raise ValueError(f"model must have as many layers as the cache, {len(layers)}, got {len(rotaries)}")
    was, will = (_each(name, given, len(layers)) for name, given in (("old", old), ("new", new)))
    turned = []
    for index, (layer, rotary) in enumerate(zip(layers, rotaries, strict=True)):
        tensors = tensors_of(layer, index)
        if tensors and type(layer) not in PLAIN:
            raise TypeError(f"cache must hold keys as computed, layer {index} is a {type(layer).__name__}")
        if not tensors or rotary is None:
            turned.append(copy.copy(layer))
            continue
        count = tensors["keys"].shape[2]
        back, to = (_last(name, x, count, index) for name, x in (("old", was[index]), ("new", will[index])))
        keys = rotary.moved(tensors["keys"], back, to)
        turned.append(rebuilt(layer, {**tensors, "keys": keys}, layer.get_seq_length()))
    return with_layers(cache, turned)


def moved(
    cache: AnyCache,
    model: nn.Module | Sequence[Rotary | None],
    offset: int | Tensor,
    *,
    positions: Tensor | Sequence[Tensor] | None = None,
) -> AnyCache:
    """The cache as if its tokens stood `offset` places further on: one number, or int64 (rows,), one for each row.

    `positions` are where the tokens stand now, as in `repositioned`; None counts from 0. Left-padded rows turn by the same angle
    either way, but with `cache.position_ids(mask)` they are rounded as the model rounds them. Raises as `repositioned`, and TypeError for
    offsets that are no whole numbers.
    """
    layers = layers_of(cache)
    old: list[Tensor] = (
        [torch.arange(layer.get_seq_length() if tensors_of(layer, i) else 0) for i, layer in enumerate(layers)]
        if positions is None
        else _each("positions", positions, len(layers))
    )
    if isinstance(offset, Tensor):
        checks.tensor("offset", offset, ndim=1, dtype="integer")
        steps = [offset.to(x.device).view(-1, *[1] * max(1, x.ndim - 1)) for x in old]
    else:
        steps = [torch.tensor(checks.whole("offset", offset), device=x.device) for x in old]
    new = [x + step for x, step in zip(old, steps, strict=True)]
    return repositioned(cache, model, old, new)


def _each(name: str, given: Tensor | Sequence[Tensor], layers: int) -> list[Tensor]:
    each = [given] * layers if isinstance(given, Tensor) else list(given)
    if len(each) != layers:
        raise ValueError(f"{name} must be one tensor or one for each of {layers} layers, got {len(each)}")
    return each


def _last(name: str, positions: Tensor, count: int, index: int) -> Tensor:
    """The positions of the tokens that a layer holds."""
    checks.tensor(name, positions, dtype="integer", empty=True)
    if positions.ndim == 0 or positions.shape[-1] < count:
        raise ValueError(f"{name} must have the {count} tokens of layer {index}, got shape {tuple(positions.shape)}")
    return positions[..., positions.shape[-1] - count :]

"""Raw keys and values of a decoder's layers, before the key norm and the rotary embedding: read, replaced, and as a cache holds them."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from assay.methods.core.generation.cache import keys_and_values
from assay.methods.core.models import decoder
from assay.methods.core.models.decoder import Parts

Pair = tuple[Tensor, Tensor]  # keys and values
PROBE = 3  # tokens


@dataclass(frozen=True, eq=False)
class Site:
    """Where a layer makes its keys and values: in `k_proj` and `v_proj`, or behind the queries in a fused `qkv_proj`.

    `queries`, `keys` and `values` are widths, heads merged; `dim` is that of a head.
    """

    attention: Any
    dim: int
    queries: int
    keys: int
    values: int

    @property
    def fused(self) -> bool:
        return hasattr(self.attention, "qkv_proj")

    def make(self, x: Tensor) -> list[Tensor]:
        """Raw keys and values of normed hidden states (batch, tokens, hidden)."""
        if self.fused:
            return list(self.attention.qkv_proj(x)[..., self.queries :].split([self.keys, self.values], -1))
        return [self.attention.k_proj(x), self.attention.v_proj(x)]


def site_of(attention: Any) -> Site:
    """The site of a layer's attention. Raises ValueError for one without such projections."""
    name = type(attention).__name__
    dim = getattr(attention, "head_dim", None)
    if not isinstance(dim, int) or not (hasattr(attention, "qkv_proj") or hasattr(attention, "k_proj")):
        raise ValueError(f"{name} has no k_proj and v_proj, nor a qkv_proj, of heads of one size")
    if hasattr(attention, "qkv_proj"):
        width = attention.config.num_key_value_heads * dim
        return Site(attention, dim, attention.config.num_attention_heads * dim, width, width)
    widths = [getattr(attention, part).out_features for part in ("q_proj", "k_proj", "v_proj")]
    return Site(attention, dim, *widths)


@contextlib.contextmanager
def recorded(sites: Sequence[Site]) -> Iterator[list[list[Tensor]]]:
    """The raw keys and values (batch, tokens, width) of every layer that runs in the block, a list [keys, values] a layer."""
    found: list[list[Any]] = [[None, None] for _ in sites]

    def keep(index: int, part: int, _module: nn.Module, _inputs: Any, out: Tensor) -> None:
        found[index][part] = out

    def keep_both(index: int, start: int, width: int, _module: nn.Module, _inputs: Any, out: Tensor) -> None:
        found[index][:] = out[..., start : start + width], out[..., start + width :]

    with contextlib.ExitStack() as stack:
        for index, site in enumerate(sites):
            if site.fused:
                hooks = [(site.attention.qkv_proj, functools.partial(keep_both, index, site.queries, site.keys))]
            else:
                ways = (site.attention.k_proj, site.attention.v_proj)
                hooks = [(way, functools.partial(keep, index, part)) for part, way in enumerate(ways)]
            for module, hook in hooks:
                stack.callback(module.register_forward_hook(hook).remove)
        yield found


@contextlib.contextmanager
def given(sites: Sequence[Site], pairs: Sequence[Pair]) -> Iterator[None]:
    """In the block the layers take these raw keys and values for their own, which are not computed (unless fused with the queries)."""
    with contextlib.ExitStack() as stack:
        for site, (keys, values) in zip(sites, pairs, strict=True):
            if site.fused:
                way = site.attention.qkv_proj
                stack.enter_context(_instead(way, functools.partial(_behind, way.forward, site.queries, keys, values)))
            else:
                stack.enter_context(_instead(site.attention.k_proj, functools.partial(_constant, keys)))
                stack.enter_context(_instead(site.attention.v_proj, functools.partial(_constant, values)))
        yield


@contextlib.contextmanager
def _instead(module: Any, forward: Any) -> Iterator[None]:
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def _constant(value: Tensor, *_inputs: Any) -> Tensor:
    return value


def _behind(own: Any, queries: int, keys: Tensor, values: Tensor, x: Tensor) -> Tensor:
    return torch.cat([own(x)[..., :queries], keys, values], -1)


def read(
    parts: Parts,
    sites: Sequence[Site],
    input_ids: Tensor,
    attention_mask: Any = None,
    position_ids: Tensor | None = None,
) -> list[list[Tensor]]:
    """The raw keys and values of the layers of `sites`, the model's first ones; of the last one nothing else is computed."""
    run = parts.begin(input_ids, attention_mask, position_ids)
    x, last = run.hidden, len(sites) - 1
    with recorded(sites[:last]) as found:
        for index in range(last):
            x = parts.layer(index, x, run)
    norm = getattr(parts.layers[last], "input_layernorm", None)  # OLMo 2 has none before its attention
    return [*found, sites[last].make(x if norm is None else norm(x))]


def normed(site: Site, keys: Tensor) -> Tensor:
    """Raw keys (batch, tokens, width) after the layer's own key norm, of each head or of all together; as they are without one."""
    norm = getattr(site.attention, "k_norm", None)
    if norm is None:
        return keys
    if norm.weight.numel() == site.keys:
        whole: Tensor = norm(keys)
        return whole
    each: Tensor = norm(keys.unflatten(-1, (-1, site.dim)))
    return each.flatten(-2)


def placed(site: Site, keys: Tensor, values: Tensor, rotary: Pair) -> Pair:
    """Normed keys and values (batch, tokens, width) as the layer's cache has them: heads apart, keys turned to their places."""
    keys, values = (x.unflatten(-1, (-1, site.dim)).transpose(1, 2) for x in (keys, values))
    if getattr(site.attention, "use_rope", True):  # SmolLM3 has layers that do not turn
        turn = vars(sys.modules[type(site.attention).__module__])["apply_rotary_pos_emb"]
        keys = turn(keys[:, :0], keys, *rotary)[1]
    return keys, values


def why_not(model: nn.Module) -> str:
    """Why a model's cache cannot be predicted, or be predicted from; empty if it can.

    Its parts must be understood (`core.models.decoder`), and what its cache holds must be its raw keys and values after its own key
    norm and rotary embedding, which a few tokens show.
    """
    if why := decoder.why_not(model):
        return why
    name, parts = type(model).__name__, Parts(model)
    try:
        sites = [site_of(layer.self_attn) for layer in parts.layers]
        same = any(p.device.type == "meta" for p in model.parameters()) or _same_cache(model, parts, sites)
    except Exception as error:  # whatever attention that only looks familiar makes of it
        return f"{name} makes its keys in a way of its own ({type(error).__name__}: {str(error)[:100]})"
    return "" if same else f"{name}'s cache holds something else than its keys and values, normed and turned"


@torch.no_grad()
def _same_cache(model: Any, parts: Parts, sites: Sequence[Site]) -> bool:
    ids = torch.arange(PROBE, device=parts.embed.weight.device)[None] % parts.embed.num_embeddings
    cache, training = DynamicCache(config=parts.config), model.training
    model.eval()
    try:
        with recorded(sites) as raw:
            model(input_ids=ids, cache=cache, use_cache=True)
        run, kept = parts.begin(ids), keys_and_values(cache)
        for index, (site, (keys, values)) in enumerate(zip(sites, raw, strict=True)):
            made = placed(site, normed(site, keys), values, run.rotary[parts.kinds[index]])
            for ours, own in zip(made, kept[index], strict=True):
                wanted = ours[:, :, ours.shape[2] - own.shape[2] :]  # a window may be shorter than the probe
                if own.shape != wanted.shape or not torch.allclose(own, wanted, rtol=1e-3, atol=1e-5):
                    return False
    finally:
        model.train(training)
    return True

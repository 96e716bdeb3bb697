"""Cross-attention of mask queries to one pixel a head, its prototype; and Mask2Former's masked cross-attention, which it replaces."""

from __future__ import annotations

import contextlib
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks
from assay.methods.core import kernels

Variant = Literal["paper", "as_released"]
NormAxis = Literal["queries", "channels"]
TILE = {"cpu": 2**19, "cuda": 2**26}
"""Similarities that are in memory at a time, by device: on a processor what its cache holds. Our choice."""


def nearest_pixels(queries: Tensor, pixels: Tensor, *, seen: Tensor | None = None, chunk: int | None = None) -> Tensor:
    """The index of the pixel most like each query, by dot product: int64 (B, heads, Q), the first one of several.

    queries (B, heads, Q, c), pixels (B, heads, N, c), `seen` bool (B, Q, N): where a query may look; None: everywhere. A query that may
    look nowhere gets 0. Similarities are taken `chunk` pixels at a time (None: `TILE` of them) with a running maximum, so that
    they are never all in memory, and in float32 where the inputs have fewer bits, under autocast too: rounded to eight bits many would
    be equal. The choice has no gradient.

    Raises TypeError and ValueError for tensors that do not fit together, and for a chunk below 1.

    >>> pixels = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])[None, None]
    >>> nearest_pixels(torch.tensor([[[[0.1, 0.9], [2.0, 0.0]]]]), pixels).tolist()
    [[[0, 1]]]
    """
    checks.tensor("queries", queries, ndim=4)
    batch, heads, count, width = queries.shape
    checks.tensor("pixels", pixels, shape=(batch, heads, "N", width))
    checks.together(queries=queries, pixels=pixels)
    total = pixels.shape[2]
    if seen is not None:
        checks.tensor("seen", seen, shape=(batch, count, total), dtype="bool", device=queries.device)
    if chunk is None:
        chunk = max(1, TILE.get(queries.device.type, TILE["cuda"]) // (batch * heads * count))
    chunk = checks.whole("chunk", chunk, low=1)
    kernels.ran("nearest pixels", "chunks" if chunk < total else "all at once")
    with torch.no_grad(), without_autocast(queries.device.type):
        wide = torch.promote_types(queries.dtype, torch.float32)
        asked = queries.to(wide)
        best, where = None, None
        for start in range(0, total, chunk):
            scores = asked @ pixels[:, :, start : start + chunk].to(wide).mT
            if seen is not None:
                scores.masked_fill_(~seen[:, None, :, start : start + chunk], float("-inf"))
            top, place = scores.max(-1)
            if best is None or where is None:
                best, where = top, place
                continue
            better = top > best  # an equal one further on is none
            best, where = torch.where(better, top, best), torch.where(better, place + start, where)
    assert where is not None
    return where


def nearest_pixels_reference(queries: Tensor, pixels: Tensor, *, seen: Tensor | None = None) -> Tensor:
    """The same from all similarities at once, (B, heads, Q, N)."""
    wide = torch.promote_types(queries.dtype, torch.float32)
    scores = queries.to(wide) @ pixels.to(wide).mT
    if seen is not None:
        scores = scores.masked_fill(~seen[:, None], float("-inf"))
    return scores.argmax(-1)


def without_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """In which nothing on `device` is cast to fewer bits; where the device knows no autocast, nothing is done."""
    known = torch.amp.is_autocast_available(device)  # not on the meta device
    return torch.autocast(device, enabled=False) if known else contextlib.nullcontext()


def by_heads(x: Tensor, heads: int) -> Tensor:
    """(B, n, d) to (B, heads, n, d / heads): a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class PrototypeCrossAttention(nn.Module):
    """PEM-CA: every query takes, for each head, the one pixel most like it, and works on that alone. (B, Q, width) to the same.

        m = normalise(W_m dwconv3x3(BN(x + position)))         pixels, (B, N, width)
        t = normalise(W_t LN(q + query position))              queries, (B, Q, width)
        p = the head's slice of m at argmax_n <m_n, t>         prototypes, (B, Q, width), where the query's mask is
        q + W_o (alpha * normalise(W_u (p * t)) + p)

    Vectors are normalised over all of `width` before the heads are cut. There is no softmax and no value: one projection of the N
    pixels where masked attention has two, and N Q width multiply-accumulates where it has 2 N Q width (`macs`). The choice has no
    gradient; it reaches the pixels through the prototypes, and the queries through the product.

    `norm_axis`: what W_u (p * t) is normalised over. "queries", as released, makes the outputs of an image's queries depend on one another;
    "channels" is the other reading. `variant`: a query whose mask is empty looks everywhere, as in Mask2Former ("paper", our choice,
    for the text does not say), or ("as_released") only where all queries' masks are empty, and takes pixel 0 where they are not.
    `chunk`: pixels that are compared at a time, see `nearest_pixels`.

    When not to use it: with weights of masked attention, which do not fit; it is trained anew. And for speed on maps of few pixels: beside
    the products over N there are three of Q, and a 3 x 3 convolution.

    Raises ValueError for heads that do not divide the width.

    >>> layer = PrototypeCrossAttention(16, 4).eval()
    >>> layer(torch.randn(2, 5, 16), torch.randn(2, 16, 6, 7)).shape
    torch.Size([2, 5, 16])
    """

    def __init__(
        self,
        width: int = 256,
        heads: int = 8,
        *,
        norm_axis: NormAxis = "queries",
        variant: Variant = "paper",
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        self.width, self.heads = checked_heads(width, heads)
        self.norm_axis = checks.choice("norm_axis", norm_axis, get_args(NormAxis))
        self.variant = checks.choice("variant", variant, get_args(Variant))
        self.chunk = chunk
        self.norm = nn.BatchNorm2d(width)
        self.local = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.memory_proj = nn.Linear(width, width)
        self.query_norm = nn.LayerNorm(width)
        self.query_proj = nn.Linear(width, width)
        self.mix = nn.Linear(width, width)
        self.alpha = nn.Parameter(torch.ones(width))
        self.out = nn.Linear(width, width)

    def forward(
        self,
        queries: Tensor,
        x: Tensor,
        *,
        seen: Tensor | None = None,
        position: Tensor | None = None,
        query_position: Tensor | None = None,
    ) -> Tensor:
        """queries (B, Q, width), map x (B, width, H, W); `seen` bool (B, Q, H, W), where a query may look (None: everywhere); `position`
        and `query_position` are added to x and to the queries."""
        check_inputs(queries, x, seen, self.width)
        return queries + self.update(
            queries if query_position is None else queries + query_position,
            x if position is None else x + position,
            None if seen is None else seen.flatten(2),
        )

    def update(self, queries: Tensor, x: Tensor, seen: Tensor | None) -> Tensor:
        """What is added to the queries, of queries and pixels that know their positions; `seen` bool (B, Q, H W)."""
        pixels = F.normalize(self.memory_proj(self.local(self.norm(x)).flatten(2).transpose(1, 2)), dim=-1)
        asked = F.normalize(self.query_proj(self.query_norm(queries)), dim=-1)
        found = self.prototypes(asked, pixels, self.looking(seen))
        mixed = F.normalize(self.mix(found * asked), dim=1 if self.norm_axis == "queries" else 2)
        out: Tensor = self.out(mixed * self.alpha + found)
        return out

    def prototypes(self, queries: Tensor, pixels: Tensor, seen: Tensor | None) -> Tensor:
        """(B, Q, width): for each head the slice of the pixel most like the query's, of pixels (B, N, width)."""
        sliced = by_heads(pixels, self.heads)
        where = nearest_pixels(by_heads(queries, self.heads), sliced, seen=seen, chunk=self.chunk)
        found = sliced.gather(2, where[..., None].expand(-1, -1, -1, sliced.shape[-1]))
        return found.transpose(1, 2).flatten(2)

    def looking(self, seen: Tensor | None) -> Tensor | None:
        """`seen` with what becomes of empty masks."""
        if seen is None:
            return None
        some = seen.any(-1, keepdim=True)
        return seen | ~(some if self.variant == "paper" else some.any(1, keepdim=True))

    @staticmethod
    def macs(pixels: int, queries: int, width: int) -> int:
        """Multiply-accumulates of an image: 9 N d + N d^2 + N Q d + 3 Q d^2.

        >>> round(MaskedCrossAttention.macs(8192, 100, 256) / PrototypeCrossAttention.macs(8192, 100, 256), 2)
        1.92
        """
        return pixels * width * (9 + width + queries) + 3 * queries * width**2

    def extra_repr(self) -> str:
        return f"{self.width}, heads={self.heads}, norm_axis={self.norm_axis}, variant={self.variant}"


class MaskedCrossAttention(nn.Module):
    """Mask2Former's masked cross-attention before its norm: softmax over all pixels of a query's mask, by torch's fused attention.

        q + W_o softmax((W_q (LN(q) + query position)) (W_k (x + position))^T / sqrt(c)) (W_v x)

    The baseline of `PrototypeCrossAttention`, with the same inputs; a query whose mask is empty looks everywhere.

    >>> MaskedCrossAttention(16, 4)(torch.randn(2, 5, 16), torch.randn(2, 16, 6, 7)).shape
    torch.Size([2, 5, 16])
    """

    def __init__(self, width: int = 256, heads: int = 8) -> None:
        super().__init__()
        self.width, self.heads = checked_heads(width, heads)
        self.query_norm = nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(
        self,
        queries: Tensor,
        x: Tensor,
        *,
        seen: Tensor | None = None,
        position: Tensor | None = None,
        query_position: Tensor | None = None,
    ) -> Tensor:
        """Everything as in `PrototypeCrossAttention.forward`."""
        check_inputs(queries, x, seen, self.width)
        normed = self.query_norm(queries)
        pixels = x.flatten(2).transpose(1, 2)
        placed = pixels if position is None else pixels + position.flatten(2).transpose(1, 2)
        mask = None
        if seen is not None:
            mask = seen.flatten(2)
            mask = (mask | ~mask.any(-1, keepdim=True))[:, None]
        found = F.scaled_dot_product_attention(
            by_heads(self.q(normed if query_position is None else normed + query_position), self.heads),
            by_heads(self.k(placed), self.heads),
            by_heads(self.v(pixels), self.heads),
            attn_mask=mask,
        )
        out: Tensor = queries + self.out(found.transpose(1, 2).flatten(2))
        return out

    @staticmethod
    def macs(pixels: int, queries: int, width: int) -> int:
        """Multiply-accumulates of an image: 2 N d^2 + 2 N Q d + 2 Q d^2."""
        return 2 * (pixels * width * (width + queries) + queries * width**2)


def checked_heads(width: int, heads: int) -> tuple[int, int]:
    """Both, or ValueError."""
    width, heads = checks.whole("width", width, low=1), checks.whole("heads", heads, low=1)
    if width % heads:
        raise ValueError(f"width must be divisible by heads={heads}, got {width}")
    return width, heads


def check_inputs(queries: Any, x: Any, seen: Any, width: int) -> None:
    """Raises TypeError and ValueError for queries, a map and masks that do not fit together."""
    checks.tensor("queries", queries, shape=("batch", "queries", width))
    checks.tensor("x", x, shape=(len(queries), width, "height", "width"))
    checks.together(queries=queries, x=x)
    if seen is not None:
        checks.tensor("seen", seen, shape=(*queries.shape[:2], *x.shape[2:]), dtype="bool", device=x.device)

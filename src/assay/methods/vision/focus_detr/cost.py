"""What the encoder costs on paper, dense and sparse: multiply-accumulates of its projections, counted as `assay.measure.cost` does."""

from __future__ import annotations

from collections.abc import Sequence

from assay import checks


def encoder_macs(
    tokens: int,
    kept: Sequence[int],
    *,
    width: int = 256,
    ffn: int = 2048,
    heads: int = 8,
    levels: int = 4,
    points: int = 4,
    objects: int = 0,
    classes: int = 0,
    scored: bool = False,
) -> dict[str, int]:
    """Multiply-accumulates of an encoder on one image, by part. `kept`: the tokens that each layer updates, of `tokens` in all.

    "queries": offsets, weights and output of deformable attention and the feed-forward network, of what is kept. "values": their
    projection, of every token in every layer. "objects": attention among the best `objects` of a layer (0: none) and the class head
    of `classes` that ranks them. "scores": the foreground score (only where `scored`), with its embedding. Sampling has none: it
    interpolates and adds up a fixed few values.

    >>> dense = encoder_macs(22_223, [22_223] * 6)
    >>> round(sum(dense.values()) / 1e9, 1)
    170.4
    """
    checks.whole("tokens", tokens, low=1)
    counts = [checks.whole("kept", count, low=0, high=tokens) for count in kept]
    sampled = heads * levels * points
    query = width * (3 * sampled + width) + 2 * width * ffn
    ranked = [min(objects, count) for count in counts]
    attended = sum(4 * width**2 * count + 2 * width * count**2 for count in ranked)
    score = 2 * width**2 + width * (width // 2) + (width // 2) * (width // 4) + width // 4
    return {
        "queries": query * sum(counts),
        "values": width**2 * tokens * len(counts),
        "objects": attended + (width * classes * sum(counts) if objects else 0),
        "scores": score * tokens if scored else 0,
    }

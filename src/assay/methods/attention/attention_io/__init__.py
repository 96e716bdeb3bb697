"""How many words exact attention must move between a small fast memory and a large slow one (arXiv 2402.07443).

The model: a cache of M words, with Q, K, V in R^{N x d} and the output in slow memory; the cost is the number of words moved. The
paper proves that FlashAttention's N^2 d^2 / M is optimal up to a constant for every M >= d^2, with or without fast matrix products,
and that N^2 d / sqrt(M) is reached, and optimal, below d^2. This room has both bounds, exact word counters, simulators that run the
tiled algorithms on real tensors and count every word, a tile chooser, the choice of the algorithm by the d^2 rule, and a roofline on
typed device sheets.

The paper gives bounds and no code; the algorithms are reconstructed from them. `our choice`: tiles of any size, ragged at the end;
data that is masked for a whole tile is never moved (causal); a tile that is the only one of its kind stays in fast memory; depth-1
products in the small-cache algorithm, which make its score tile nearly sqrt(M) wide. A few registers (one row's rescaling factor)
are not counted.

M is in words: divide bytes by the element size. The bounds are asymptotic and carry no constants: never read "per cent of the
optimum" from them, compare exact counts. Backward passes, keys shared by heads (GQA) and approximate attention are not covered.

When NOT to use it: as a prediction of seconds (it knows no latency, no cache lines, no overlap), or for decoding, which reads the
cache once in any case.
"""

from __future__ import annotations

from assay.methods.attention.attention_io.counts import (
    LEADING_CONSTANT,
    Algorithm,
    Bound,
    Choice,
    Tile,
    Traffic,
    attention_io_bound,
    best_tile,
    choose,
    count,
    table,
    working_set,
)
from assay.methods.attention.attention_io.roofline import (
    A100,
    DEVICES,
    H100,
    Advice,
    DeviceSheet,
    advise,
    advise_model,
    this_machine,
)
from assay.methods.attention.attention_io.simulator import LRUCache, Scratchpad, simulate, tiled_attention

__all__ = [
    "A100",
    "DEVICES",
    "H100",
    "LEADING_CONSTANT",
    "Advice",
    "Algorithm",
    "Bound",
    "Choice",
    "DeviceSheet",
    "LRUCache",
    "Scratchpad",
    "Tile",
    "Traffic",
    "advise",
    "advise_model",
    "attention_io_bound",
    "best_tile",
    "choose",
    "count",
    "simulate",
    "table",
    "this_machine",
    "tiled_attention",
    "working_set",
]

"""Attention offloading: linear layers on compute-strong devices, keys, values and attention on memory-strong ones (arXiv 2405.01814).

What runs: `SplitDecoder` cuts a transformers model at every attention and decodes with keys and values in a pool, of real processes
(`AttentionWorkers`) or of none (`LocalPool`); attention to the earlier tokens begins while the newest key and value are still being
made, and is put together exactly; several batches take turns, so that neither side waits. `offloaded` does the same inside
`model.generate`, without the overlap. `Meter` counts what crosses, `Timeline` shows what lay beside what.

What is computed: the bytes of a step (`bytes_a_step`), the bandwidth they need, the times of one kind of device and of two (`Whole`,
`Split`), the rotational staggered pipeline (`staggered`), and the cheapest system of a price table (`plan`, and `simulated` for real
traces).

    with AttentionWorkers(2) as pool:
        decoder = SplitDecoder(model, pool)
        batches = [decoder.open(ids) for ids in (first, second)]
        tokens = decoder.generate(batches, 32)

The paper has two versions with different claims: 1.48 to 12.1 times the throughput per dollar is an estimate of the first, 16.1 to
90.1 % more throughput at similar cost a measurement of the second. Its code was not published. Where the paper is silent, ours is
marked `our choice`.

When NOT to use it: on one machine, where both sides share the memory that was to be saved on; with short contexts or small batches,
where the cache is not what fills the memory; over slow links, whose latency is paid in every layer.
"""

from assay.methods.serving.attention_offloading.costs import (
    DEVICES,
    H20,
    H100,
    IDEAL,
    LLAMA3_70B,
    LLAMA_33B,
    LLAMA_65B,
    NETWORK,
    PRICES_OF,
    USUAL_NETWORK,
    DecodingTimes,
    Reached,
    Setup,
    Split,
    Step,
    Whole,
    attention_seconds,
    model_seconds,
    server,
)
from assay.methods.serving.attention_offloading.decoder import Batch, SplitDecoder, why_not
from assay.methods.serving.attention_offloading.holder import Holder
from assay.methods.serving.attention_offloading.planner import (
    Plan,
    at_best,
    best_split,
    best_whole,
    plan,
    simulated,
    systems,
)
from assay.methods.serving.attention_offloading.plug import offloaded
from assay.methods.serving.attention_offloading.pool import LocalPool, Pool, shares
from assay.methods.serving.attention_offloading.slicing import Slice, Sliced, sliced, trace
from assay.methods.serving.attention_offloading.staggered import Staggered, replica_of, staggered
from assay.methods.serving.attention_offloading.timeline import Event, Timeline
from assay.methods.serving.attention_offloading.traffic import (
    LatentShape,
    Meter,
    Sent,
    Shape,
    bytes_a_step,
    required_bandwidth,
    shape_of,
)
from assay.methods.serving.attention_offloading.workers import AttentionWorkers, WorkerLost

__all__ = [
    "DEVICES",
    "H100",
    "H20",
    "IDEAL",
    "LLAMA3_70B",
    "LLAMA_33B",
    "LLAMA_65B",
    "NETWORK",
    "PRICES_OF",
    "USUAL_NETWORK",
    "AttentionWorkers",
    "Batch",
    "DecodingTimes",
    "Event",
    "Holder",
    "LatentShape",
    "LocalPool",
    "Meter",
    "Plan",
    "Pool",
    "Reached",
    "Sent",
    "Setup",
    "Shape",
    "Slice",
    "Sliced",
    "Split",
    "SplitDecoder",
    "Staggered",
    "Step",
    "Timeline",
    "Whole",
    "WorkerLost",
    "at_best",
    "attention_seconds",
    "best_split",
    "best_whole",
    "bytes_a_step",
    "model_seconds",
    "offloaded",
    "plan",
    "replica_of",
    "required_bandwidth",
    "server",
    "shape_of",
    "shares",
    "simulated",
    "sliced",
    "staggered",
    "systems",
    "trace",
    "why_not",
]

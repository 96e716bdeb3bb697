"""BlockLLM: many fine-tuned variants of one model served from one zoo of blocks (arXiv 2404.18322).

What runs: `Zoo` keeps each distinct block of its models once, on disk too, and takes LoRA adapters as PEFT saves them (`read_adapter`).
`SharedModel` is one transformers model that computes every row with its own chain of blocks, `Engine` makes answers of several models in
one batch, and `assay serve --share-blocks` does so behind the OpenAI API, where the field `model` picks the chain. `scores` and
`substituted` find and share blocks that behave alike, which is no longer exact.

What is simulated: `simulate_blocks` sends requests through chains of blocks on several devices, with the paper's rule for who runs a
block next (`cheapest`: wait, transfer, and the cache moved or made again unless its owner runs the block) and a greedy placement (`place`).

    zoo = Zoo()
    zoo.add("base", model)
    zoo.add_adapter("sql", "base", read_adapter("sql-lora"))
    Engine(SharedModel(zoo)).generate([("base", ids), ("sql", ids)], new_tokens=16)

Only the paper's abstract was read; what is not in it follows third-party summaries or is ours, and is marked. Left out: speculation on
a surrogate block (under the rule "keep it if the next token is the same" the keys and values behind the surrogate are still approximate,
so that later tokens may change; with those made again it saves nothing on one machine), stitching between models of different width,
and blocks finer than a layer.

When NOT to use it: for one model alone; for tenants that seldom meet (a batch of one gains nothing); where every variant is fully
fine-tuned, since then no two blocks are equal.
"""

from assay.methods.serving.blockllm.adapters import Adapter, Factors, LowRank, attach, read_adapter, write_adapter
from assay.methods.serving.blockllm.engine import Answer, Batch, Engine, Pass
from assay.methods.serving.blockllm.equivalence import THRESHOLD, classes, distinct_bytes, scores, substituted
from assay.methods.serving.blockllm.fleet import (
    LOCAL,
    REMOTE,
    BlockRun,
    BlockTimes,
    Model,
    Node,
    Option,
    Visit,
    apart,
    cheapest,
    cluster,
    fitted,
    idle_seconds,
    place,
    simulate_blocks,
)
from assay.methods.serving.blockllm.shared import Shared, SharedLinear, SharedModel
from assay.methods.serving.blockllm.zoo import Block, Chain, Zoo, digest_of, layer, places_of

__all__ = [
    "LOCAL",
    "REMOTE",
    "THRESHOLD",
    "Adapter",
    "Answer",
    "Batch",
    "Block",
    "BlockRun",
    "BlockTimes",
    "Chain",
    "Engine",
    "Factors",
    "LowRank",
    "Model",
    "Node",
    "Option",
    "Pass",
    "Shared",
    "SharedLinear",
    "SharedModel",
    "Visit",
    "Zoo",
    "apart",
    "attach",
    "cheapest",
    "classes",
    "cluster",
    "digest_of",
    "distinct_bytes",
    "fitted",
    "idle_seconds",
    "layer",
    "place",
    "places_of",
    "read_adapter",
    "scores",
    "simulate_blocks",
    "substituted",
    "write_adapter",
]

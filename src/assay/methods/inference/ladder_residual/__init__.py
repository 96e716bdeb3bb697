"""Ladder Residual: each block reads the residual stream of one block earlier, so that all-reduces hide behind computing (arXiv 2501.06589).

`to_ladder(model, layers=...)` gives a transformers model with ladder layers, all of them or some; `tensor_parallel(model, link)` is a
rank's share of it, whose sums over the ranks are under way while the next module computes. `Ranks` starts real processes, `GroupLink`
imitates a slower link, `Timeline` shows what overlapped, `step_cost` says beforehand what there is to gain. Its rivals are blocks of the
same model: "parallel" attention and MLP, "desync".

The mechanism is that of the paper and of the released code (mayank31398/ladder-residual-inference), including partial conversion, where the
first ladder layer reads the stream before the MLP of the standard layer below it. Where `layers` is left out all layers are converted, the
paper's main form (the released configuration has to be told).

    ladder = to_ladder(model, layers=16)            # the last 16 layers; train it on before use
    with Ranks(2) as ranks:
        ...                                         # on each: tensor_parallel(ladder, GroupLink()).generate(...)

When NOT to use it: without tensor parallelism, where it costs quality and gains nothing; on a model that cannot be trained on after the
conversion; where messages already are a small share of the time (`step_cost`).
"""

from assay.methods.inference.ladder_residual.latency import (
    Device,
    ModuleCost,
    StepCost,
    Wire,
    all_reduce_seconds,
    module_costs,
    step_cost,
)
from assay.methods.inference.ladder_residual.links import Alone, GroupLink, Link, Silent
from assay.methods.inference.ladder_residual.model import (
    LadderConfig,
    LadderForCausalLM,
    advance,
    tensor_parallel,
    to_ladder,
)
from assay.methods.inference.ladder_residual.orders import Step, schedule, simulate
from assay.methods.inference.ladder_residual.ranks import Rank, Ranks
from assay.methods.inference.ladder_residual.sharding import shard
from assay.methods.inference.ladder_residual.timeline import Event, Timeline

__all__ = [
    "Alone",
    "Device",
    "Event",
    "GroupLink",
    "LadderConfig",
    "LadderForCausalLM",
    "Link",
    "ModuleCost",
    "Rank",
    "Ranks",
    "Silent",
    "Step",
    "StepCost",
    "Timeline",
    "Wire",
    "advance",
    "all_reduce_seconds",
    "module_costs",
    "schedule",
    "shard",
    "simulate",
    "step_cost",
    "tensor_parallel",
    "to_ladder",
]

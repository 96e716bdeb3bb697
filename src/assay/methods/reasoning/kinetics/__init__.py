"""Kinetics: what test-time compute costs when the reading of keys and values counts too, and attention that reads fewer
of them.

Three parts, which stand alone:

- `cost`: equivalent FLOPs of a model's shape, a prompt, so many trials of so many tokens, dense or sparse; `fitted`
  holds them against measured times.
- `frontier`: which configuration is the best within a cost, and how much a wrong idea of cost loses.
- `use_block_topk` and `BlockCache`: decoding in any transformers model that reads the best blocks of the cache alone.

Source: arXiv 2506.05333, cost model and section on sparse attention; released code Infini-AI-Lab/Kinetics. The cost
assumes a large batch and a perfect verifier; measured seconds belong beside it.
"""

from assay.methods.reasoning.kinetics.attention import NAME, use_block_topk, why_not
from assay.methods.reasoning.kinetics.cache import BlockCache
from assay.methods.reasoning.kinetics.cost import (
    HARDWARE,
    Cost,
    Fitted,
    Hardware,
    Shape,
    Work,
    area,
    cost,
    fitted,
    mean_cost,
    shape_of,
)
from assay.methods.reasoning.kinetics.frontier import Option, cheapest, extra_cost, frontier
from assay.methods.reasoning.kinetics.selection import (
    BlockTopK,
    block_scores,
    block_sums,
    choose,
    sparse_attention,
)

__all__ = [
    "HARDWARE",
    "NAME",
    "BlockCache",
    "BlockTopK",
    "Cost",
    "Fitted",
    "Hardware",
    "Option",
    "Shape",
    "Work",
    "area",
    "block_scores",
    "block_sums",
    "cheapest",
    "choose",
    "cost",
    "extra_cost",
    "fitted",
    "frontier",
    "mean_cost",
    "shape_of",
    "sparse_attention",
    "use_block_topk",
    "why_not",
]

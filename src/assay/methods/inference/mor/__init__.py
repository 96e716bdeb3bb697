"""Mixture-of-Recursions: one stack of layers, run several times, each token as often as it needs (arXiv 2507.10524).

The layers between the first and the last are stored once and run N_r times ("middle-cycle"). A router before each recursion takes the
tokens that go on: under expert-choice the best (N_r - r + 1) / N_r of all, nested, so that deeper recursions are shorter; under
token-choice each token chooses its depth at the start. In recursion r a selected token becomes x + g * block(x), attention sees only
the tokens that are there, at their own positions, and keys and values are kept of these alone. Training is top-k; inference asks of each
token whether the sigmoid of its score is above 1/2, which needs no later tokens (`inference="top_k"` is what the released code does).

    model = convert(LlamaForCausalLM.from_pretrained(...), recursions=2)     # then train it
    model = MoRForCausalLM.from_base(LlamaForCausalLM(config), recursions=2)  # the config's layers are the stored ones
    generate_depthwise(model, prompts, 64, lanes=32)                          # rows of different depth in one batch

When NOT to use it: without training (a converted model has lost what it knew), for models as small as 135M (the paper's loses there),
and to make an existing model faster as it is.
"""

from assay.methods.inference.mor.cache import MoRCache
from assay.methods.inference.mor.convert import convert, sources
from assay.methods.inference.mor.depthwise import Generated, generate_depthwise
from assay.methods.inference.mor.model import MoRConfig, MoRForCausalLM, MoROutput
from assay.methods.inference.mor.plan import Plan, forward_macs, hierarchical, layer_plan

__all__ = [
    "Generated",
    "MoRCache",
    "MoRConfig",
    "MoRForCausalLM",
    "MoROutput",
    "Plan",
    "convert",
    "forward_macs",
    "generate_depthwise",
    "hierarchical",
    "layer_plan",
    "sources",
]

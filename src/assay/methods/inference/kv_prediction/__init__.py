"""KV Prediction: a small model reads the prompt, and linear maps make the large model's cache of what the small one keeps.

The base model is frozen. The auxiliary model reads all tokens of a prompt but the last; its raw keys and values (before key norms,
before the rotary embedding) go through one linear map with bias for each layer of the base, heads merged; the base's own key norm and
rotary embedding follow. Then the base takes one step, on the last token, and goes on alone. The cache is transformers' own.

    model = KVPredictor.from_base(base, auxiliary=0.5)        # KVP-LP: every second layer of the base, a copy to be trained
    model = KVPredictor.from_base(base, auxiliary=sibling)    # KVP-C: a smaller model with the same tokenizer
    Trainer(model, ...).train()                               # the auxiliary and the maps; the base stays as it is
    model.generate(**tokenizer(prompt, return_tensors="pt"))

- `layers`: which layer of the auxiliary serves which of the base, and auxiliaries that are the base without some of its layers.
- `sites`: raw keys and values of a decoder, read where they are made, put in their place, and turned into what a cache holds.
- `predictor`: the maps.
- `objectives`: the terms of the loss.
- `model`: `KVPredictor`, a model of transformers, and its configuration.
- `cost`: MACs from a prompt to its first token.

What is read behind a cache (a later turn of a conversation, tokens put back after a pause) goes through the base alone. That is our
choice: its entries are exact then, and the auxiliary's cache need not be kept. So prompts must come whole: prefill in chunks is
refused, and `whole_prompts` tells assay's server. Assisted decoding is refused because it verifies its first draft in the pass that
reads the prompt.

Source: "KV Prediction for Improved Time to First Token" (arXiv 2410.08391).

When NOT to use it: untrained, since the maps begin at random; where no quality may be lost; where a prompt is longer than the
auxiliary's context; for long answers, since decoding costs what it did and the auxiliary's weights come on top.
"""

from assay.methods.inference.kv_prediction.cost import PromptCost, parameter_ratio, prompt_cost
from assay.methods.inference.kv_prediction.layers import kept_layers, layer_map, pruned, pruned_map
from assay.methods.inference.kv_prediction.model import KVPredictionConfig, KVPredictor
from assay.methods.inference.kv_prediction.predictor import Predictor
from assay.methods.inference.kv_prediction.sites import why_not

__all__ = [
    "KVPredictionConfig",
    "KVPredictor",
    "Predictor",
    "PromptCost",
    "kept_layers",
    "layer_map",
    "parameter_ratio",
    "prompt_cost",
    "pruned",
    "pruned_map",
    "why_not",
]

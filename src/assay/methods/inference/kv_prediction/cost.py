"""What a prompt costs up to its first token: MACs, by the shapes of the layers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from assay import checks
from assay.methods.inference.kv_prediction.model import KVPredictor
from assay.methods.inference.kv_prediction.sites import Site


@dataclass(frozen=True)
class PromptCost:
    """MACs from a prompt to the logits of its last token (1 MAC = 2 FLOPs): by the base alone, and in the three parts of a prediction."""

    base: int
    auxiliary: int
    predictor: int
    step: int  # of the base, on the last token

    @property
    def reduction(self) -> float:
        """How many times fewer MACs the prediction takes."""
        return self.base / (self.auxiliary + self.predictor + self.step)


def prompt_cost(model: KVPredictor, tokens: int, batch: int = 1) -> PromptCost:
    """What prompts of `tokens` tokens cost, counted from the shapes of the layers, attention and head included.

    The paper's estimate (section 4.4, `parameter_ratio`) leaves attention and the step out. Attention over a whole prompt counts as half of
    all pairs, windows as all of them. Raises ValueError for fewer than two tokens, and for layers with weights outside linear layers
    (mixtures of experts).
    """
    tokens, batch = checks.whole("tokens", tokens, low=2), checks.whole("batch", batch, low=1)
    read_by, sites = tokens - 1, model.auxiliary_sites
    last = model.config.layer_map[-1]
    layers = model.auxiliary_parts.layers
    auxiliary = sum(
        _layer_macs(layer, site, read_by, read_by) for layer, site in zip(layers[:last], sites, strict=False)
    )
    attention = sites[last].attention
    ways = [attention.qkv_proj] if sites[last].fused else [attention.k_proj, attention.v_proj]
    auxiliary += read_by * sum(map(_linear_macs, ways))
    head = _linear_macs(model.parts.head)
    whole, step = (
        sum(
            _layer_macs(layer, site, queries, tokens)
            for layer, site in zip(model.parts.layers, model.sites, strict=True)
        )
        + head
        for queries in (tokens, 1)
    )
    return PromptCost(batch * whole, batch * auxiliary, batch * read_by * _linear_macs(model.predictor), batch * step)


def parameter_ratio(model: KVPredictor) -> float:
    """The paper's estimate of the reduction: parameters of the base over those of the auxiliary, embeddings included."""
    base, small = (sum(p.numel() for p in part.parameters()) for part in (model.base, model.auxiliary))
    return base / small


def _linear_macs(module: nn.Module) -> int:
    """MACs a token of all linear layers in there."""
    linears = [part for part in module.modules() if isinstance(part, nn.Linear)]
    held = sum(p.numel() for p in module.parameters() if p.ndim > 1)
    found = sum(linear.in_features * linear.out_features for linear in linears)
    if held != found:
        raise ValueError(f"model must have its weights in linear layers, {type(module).__name__} has others")
    return found


def _layer_macs(layer: nn.Module, site: Site, queries: int, keys: int) -> int:
    pairs = queries * keys * site.queries * 2
    return queries * _linear_macs(layer) + (pairs // 2 if queries > 1 else pairs)

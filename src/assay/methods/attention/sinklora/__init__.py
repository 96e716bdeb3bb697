"""SinkLoRA: cheap long-context fine-tuning with group-wise attention and sinks, then a cache of heavy hitters (arXiv 2406.05678).

Fine-tuning for a longer context attends in groups of G = S/4 tokens. LongLoRA's S2-Attn shifts half of the heads by half a group, so
that information crosses group borders. SF-Attn shifts only part of that half back into place ("segmentation and reassembly") and
lets every token see the first g tokens, the sinks. LoRA on q, k, v, o trains along with norms and embeddings, positions are
interpolated, and the tuned model uses full attention. When decoding, H2O keeps a budget of entries: half of them recent, half those
with the most attention so far.

The official code contains LongLoRA's attention unchanged, so SF-Attn follows the paper's text. `our choice`: half of the shifted half
stays shifted (`shift_fraction` 1 is S2-Attn, 0 plain groups); masks use original positions; sinks start where a padded row
does; a length that the group does not divide is padded; one entry is evicted before a token enters, so the budget is never exceeded.
`variant="as_released"` is LongLoRA's S2-Attn as released: no sinks, and a lower triangle over the rolled sequence, so that the
first G/2 tokens of shifted heads see the end of the text, the future. That leak trains for something generation does not have.

When NOT to use it: for training from scratch or on short texts (nothing to save), packed sequences, attention dropout. Not H2O if an
answer may depend on a token that nothing attended to before (pass keys), or if prompts are short.
"""

from __future__ import annotations

from assay.methods.attention.sinklora.eviction import EvictionCache, EvictionLayer, scored_attention, use_eviction
from assay.methods.attention.sinklora.groups import (
    allowed_pairs,
    group_of,
    s2_attention,
    scores_computed,
    sf_attention,
    shifted_heads,
)
from assay.methods.attention.sinklora.tuning import interpolate_positions, lora_config, use_sf_attention

__all__ = [
    "EvictionCache",
    "EvictionLayer",
    "allowed_pairs",
    "group_of",
    "interpolate_positions",
    "lora_config",
    "s2_attention",
    "scored_attention",
    "scores_computed",
    "sf_attention",
    "shifted_heads",
    "use_eviction",
    "use_sf_attention",
]

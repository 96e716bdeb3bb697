"""Focus-DETR: a detector's encoder that updates the tokens of the foreground only, with dense attention among the most object-like.

    model = DeformableDetrForObjectDetection.from_pretrained(...)       # transformers; two-stage models have a class head to rank with
    apply_focus(model, rho=0.5, betas=(1.0, 0.8, 0.6, 0.6, 0.4, 0.2))   # then train it: model(pixels, labels=...).loss has the new term
    remove_focus(model)                                                 # the dense encoder again, with what its layers learned

Encoders with deformable attention spend most of a detector's work on updating every token of four feature maps, most of which are
background. Here

1. a score says of each token whether it is foreground, trained with boxes (`foreground`);
2. half of the tokens (`rho`) are kept, and each layer updates only the best of them, in nested sets (`betas`);
3. in each layer the 300 that are most object-like (`topk`: class score times foreground score) attend to each other before the
   deformable attention, which is too local to compare distant objects;
4. keys and values stay the backbone's feature maps in all layers, and tokens never kept leave as they came.

Zheng et al., "Less is More: Focus Attention for Efficient DETR" (ICCV 2023), and its released code. Files: `foreground` (the score,
its targets and its loss), `encoder` (budgets, attention among objects), `detector` (transformers), `cost` (multiply-accumulates).

When not to use it: without training, for a dense encoder's weights expect values that every layer refreshes; where most of a picture
is foreground; and where the backbone costs more than the encoder, as with small images.
"""

from __future__ import annotations

from assay.methods.vision.focus_detr.cost import encoder_macs
from assay.methods.vision.focus_detr.detector import FocusLoss, apply_focus, proposal_loss, remove_focus
from assay.methods.vision.focus_detr.encoder import BETAS, Focused, FocusEncoder, ObjectAttention, token_budgets
from assay.methods.vision.focus_detr.foreground import (
    WEIGHT,
    ForegroundPredictor,
    ForegroundScorer,
    Variant,
    foreground_loss,
    foreground_targets,
    level_ranges,
)

__all__ = [
    "BETAS",
    "WEIGHT",
    "FocusEncoder",
    "FocusLoss",
    "Focused",
    "ForegroundPredictor",
    "ForegroundScorer",
    "ObjectAttention",
    "Variant",
    "apply_focus",
    "encoder_macs",
    "foreground_loss",
    "foreground_targets",
    "level_ranges",
    "proposal_loss",
    "remove_focus",
    "token_budgets",
]

"""Which heads need ReLU softmax: a mixture with one weight a head, trained with the network; then the best heads, and training again.

    out_h = alpha_h ReLUSoftmax(A_h) V_h + (1 - alpha_h) A_h V_h / n          loss + lambda sum_h |alpha_h|

Of all heads of the network the share mu with the largest alpha become ReLU softmax, the others scaling attention, and the network is
trained from the start with the softmax network as its teacher. Otherwise than in the released code, alpha is held in [0, 1] (`clamp`, after
each step), and layers are found by their place: there a number within a name is looked for, which takes layer 1 for 10 and 11 too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks
from assay.methods.vision.mpcvit.attention import KINDS, Kind, attend

LAMBDA = 1e-5  # the released code's
MIXED: tuple[Kind, Kind] = ("relu_softmax", "scaling")


class HeadMixture(nn.Module):
    """Attention whose heads differ: a mixture while it is searched (`kinds` is None), one kind a head afterwards.

    `forward(q, k, v)` takes what `attend` takes, and gives (batch, heads, queries, dim). `alpha` (heads,) begins at 1, ReLU softmax.
    Once `kinds` is set, heads of a kind are computed together and no work is done for another kind. `dropout` acts on P in training.
    Raises ValueError unless there is one kind a head.
    """

    alpha: nn.Parameter | None

    def __init__(self, heads: int, *, kinds: Sequence[Kind] | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = checks.whole("heads", heads, low=1)
        self.dropout = checks.number("dropout", dropout, low=0, below=1)
        self.kinds: tuple[Kind, ...] | None = None
        self.alpha = nn.Parameter(torch.ones(heads))
        if kinds is not None:
            self.set_kinds(kinds)

    def set_kinds(self, kinds: Sequence[Kind]) -> None:
        """One kind a head from now on; alpha becomes 0 and 1 and is trained no more (it goes where kinds are not those of the mixture)."""
        for kind in kinds:
            checks.choice("kinds", kind, KINDS)
        if len(kinds) != self.heads:
            raise ValueError(f"kinds must name one kind a head ({self.heads}), got {len(kinds)}")
        self.kinds = tuple(kinds)
        if set(kinds) <= set(MIXED):
            values = torch.tensor([float(kind == MIXED[0]) for kind in kinds])
            like = self.alpha if self.alpha is not None else values
            self.alpha = nn.Parameter(values.to(like), requires_grad=False)
        else:
            self.alpha = None

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        mask: Tensor | None = None,
        causal: bool = False,
    ) -> Tensor:
        if mask is not None and mask.ndim == 3:
            mask = mask[None]  # heads are picked from it below
        if q.shape[1] != self.heads:
            raise ValueError(f"q must have {self.heads} heads, got {q.shape[1]}")
        if k.shape[1] != self.heads:  # one key head for several: the mixture goes by query heads
            k, v = (t.repeat_interleave(self.heads // k.shape[1], 1) for t in (k, v))
        dropout = self.dropout if self.training else 0.0

        def of(kind: Kind, heads: list[int] | None = None) -> Tensor:
            some = mask if mask is None or mask.ndim < 4 or mask.shape[1] == 1 or heads is None else mask[:, heads]
            a, b, c = (q, k, v) if heads is None else (q[:, heads], k[:, heads], v[:, heads])
            return attend(kind, a, b, c, scale=scale, mask=some, causal=causal, dropout=dropout)

        if self.kinds is None:
            assert self.alpha is not None
            alpha = self.alpha[:, None, None].to(q.dtype)
            return alpha * of(MIXED[0]) + (1 - alpha) * of(MIXED[1])
        if len(set(self.kinds)) == 1:
            return of(self.kinds[0])
        order: list[int] = []
        parts = []
        for kind in KINDS:
            heads = [head for head, its in enumerate(self.kinds) if its == kind]
            if heads:
                order += heads
                parts.append(of(kind, heads))
        return torch.cat(parts, 1)[:, sorted(range(self.heads), key=order.__getitem__)]

    def extra_repr(self) -> str:
        return f"heads={self.heads}, kinds={'searched' if self.kinds is None else list(self.kinds)}"


def mixtures(model: nn.Module) -> list[HeadMixture]:
    """The mixtures of a model, in the order of its layers."""
    return [module for module in model.modules() if isinstance(module, HeadMixture)]


def penalty(model: nn.Module) -> Tensor:
    """sum |alpha| over all heads that are searched; times `LAMBDA`, it is added to the loss. Raises ValueError where none are."""
    found = [module.alpha for module in mixtures(model) if module.alpha is not None and module.kinds is None]
    if not found:
        raise ValueError("model must have heads that are searched, got none")
    return torch.stack([alpha.abs().sum() for alpha in found]).sum()


@torch.no_grad()
def clamp(model: nn.Module) -> None:
    """Bring every alpha that is searched back into [0, 1]; to be called after each step of the optimiser. Our choice, see above."""
    for module in mixtures(model):
        if module.alpha is not None and module.kinds is None:
            module.alpha.clamp_(0, 1)


def kept_count(total: int, share: float) -> int:
    """How many of `total` stay: total - floor((1 - share) total). The product is rounded to nine places first, so that 0.1 of 10 is 1.

    >>> kept_count(28, 0.7), kept_count(108, 0.1), kept_count(10, 0.9)
    (20, 11, 9)
    """
    checks.whole("total", total, low=1)
    share = checks.number("share", share, low=0, high=1)
    return total - math.floor(round((1 - share) * total, 9))


def select(scores: Sequence[Tensor], share: float) -> list[Tensor]:
    """Where the share of all scores together that is largest lies: bool tensors like the scores. Of equal ones the later stay.

    Raises ValueError for scores that are not finite. `share` is mu of the paper.

    >>> select([torch.tensor([0.9, 0.1]), torch.tensor([0.5, 0.7])], 0.5)
    [tensor([ True, False]), tensor([False,  True])]
    """
    for values in scores:
        checks.tensor("scores", values, ndim=1, finite=True)
    flat = torch.cat([values.detach().float() for values in scores])
    kept = flat.argsort(stable=True)[len(flat) - kept_count(len(flat), share) :]
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[kept] = True
    return list(chosen.split([len(values) for values in scores]))


def harden(model: nn.Module, chosen: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Give every head its kind: ReLU softmax where `chosen` (a bool tensor (heads,) a layer, as `select` makes them) is True, else scaling.

    Without `chosen` the alphas say it, which must all be 0 or 1: for weights that were saved after hardening. Returns what was chosen.
    Raises ValueError, before anything is changed, for what does not fit.

    >>> layer = HeadMixture(4)
    >>> _ = harden(layer, [torch.tensor([True, False, False, True])])
    >>> layer.kinds
    ('relu_softmax', 'scaling', 'scaling', 'relu_softmax')
    """
    found = mixtures(model)
    if not found:
        raise ValueError("model must have a HeadMixture, got none")
    if chosen is None:
        alphas = [module.alpha for module in found]
        if any(alpha is None or not bool(((alpha == 0) | (alpha == 1)).all()) for alpha in alphas):
            raise ValueError("chosen must be given unless every alpha is 0 or 1")
        chosen = [alpha.detach() == 1 for alpha in alphas if alpha is not None]
    if len(chosen) != len(found):
        raise ValueError(f"chosen must have one tensor a layer ({len(found)}), got {len(chosen)}")
    for module, some in zip(found, chosen, strict=True):
        checks.tensor("chosen", some, shape=(module.heads,), dtype="bool")
    for module, some in zip(found, chosen, strict=True):
        module.set_kinds([MIXED[0] if relu else MIXED[1] for relu in some.tolist()])
    return list(chosen)


def distillation_loss(
    logits: Tensor,
    tokens: Tensor,
    teacher_logits: Tensor,
    teacher_tokens: Tensor,
    targets: Tensor | None = None,
    *,
    weight: float = 1.0,
) -> Tensor:
    """CE(logits, softmax of the teacher's) + weight MSE(tokens) + CE(logits, targets), as in the released code; no temperature.

    Logits are (batch, classes), tokens (batch, tokens, width) after the last norm, targets int64 (batch,) or shares (batch, classes);
    without targets the last term is left out. The teacher gets no gradient. Raises ValueError for shapes that differ.
    """
    checks.tensor("logits", logits, ndim=2)
    checks.tensor("teacher_logits", teacher_logits, shape=tuple(logits.shape))
    checks.tensor("teacher_tokens", teacher_tokens, shape=tuple(checks.tensor("tokens", tokens, ndim=3).shape))
    weight = checks.number("weight", weight, low=0)
    loss = F.cross_entropy(logits, teacher_logits.detach().softmax(-1))
    loss = loss + weight * F.mse_loss(tokens, teacher_tokens.detach())
    return loss if targets is None else loss + F.cross_entropy(logits, targets)

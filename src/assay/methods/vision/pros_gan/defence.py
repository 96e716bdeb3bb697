"""A defence: train the hashing model on attacked samples too. And DPSH's loss, by which a model learns its codes in the first place."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from assay import checks
from assay.methods.vision.pros_gan.attacks import BOUND, pull
from assay.methods.vision.pros_gan.retrieval import (
    NORMS,
    Norm,
    Victim,
    bits_of,
    check_images,
    check_labels,
    share_class,
)
from assay.methods.vision.pros_gan.training import pairwise_loss


def dpsh_loss(codes: Tensor, labels: Tensor, *, quantisation: float = 0.1) -> Tensor:
    """Pairwise likelihood among a batch's relaxed codes (B, bits), and `quantisation` times their squared distance from the nearest bits.

    After Li et al., "Feature Learning based Deep Supervised Hashing with Pairwise Labels" (2016). The release compares a batch with all
    training images, whose codes it remembers, at a weight of 50 over their number; batches alone are our choice.
    """
    undecided = (bits_of(codes.detach()) - codes).square().mean()
    return pairwise_loss(codes, codes, share_class(labels, labels)) + quantisation * undecided


def train_on_attacked(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    steps: int,
    rate: float,
    attack_steps: int = 7,
    bound: float = BOUND,
    norm: Norm = "linf",
    batch: int = 64,
    quantisation: float = 0.1,
    ends_in_tanh: bool = False,
    seed: int = 0,
) -> nn.Module:
    """A copy of `model` trained further by `dpsh_loss`, on each batch as it is and as it is attacked; in evaluation mode.

    Each image is pulled by `attack_steps` steps, two and a half bounds long in all, towards the code that another image of the batch has
    now, within `bound`, and must keep its own label: the two losses count alike. With `attack_steps=0` nothing is attacked, which is plain
    training (our choice throughout: the paper trains no defence). `images` (N, channels, H, W) in [0, 1], `labels` (N, classes) of 0 and 1.
    Raises ValueError for another argument or a loss that is no longer finite.
    When not to use it: where accuracy on clean images may not fall. It does, and each step costs `attack_steps` passes more.
    """
    check_images("images", images)
    check_labels("labels", labels, len(images))
    steps, batch = checks.whole("steps", steps, low=1), checks.whole("batch", batch, low=2)
    attack_steps, seed = checks.whole("attack_steps", attack_steps, low=0), checks.whole("seed", seed, low=0)
    bound, norm = checks.number("bound", bound, above=0), checks.choice("norm", norm, NORMS)
    trained = copy.deepcopy(model).train()
    victim = Victim(trained, ends_in_tanh=ends_in_tanh)
    optimizer = torch.optim.Adam(trained.parameters(), checks.number("rate", rate, above=0))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    random, order = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < 2:
            order = torch.randperm(len(images), generator=random)
        rows, order = order[:batch].to(images.device), order[batch:]
        real, own = images[rows], labels[rows]
        loss = dpsh_loss(victim.relaxed(real), own, quantisation=quantisation)
        if attack_steps:
            codes = victim.bits(real).roll(1, 0)
            attacked = pull(
                victim, real, codes, steps=attack_steps, step=2.5 * bound / attack_steps, bound=bound, norm=norm,
                direction="sign" if norm == "linf" else "unit",
            )  # fmt: skip
            loss = (loss + dpsh_loss(victim.relaxed(attacked), own, quantisation=quantisation)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    if not bool(torch.isfinite(loss)):
        raise ValueError("the loss is no longer finite: a smaller rate")
    return trained.eval()

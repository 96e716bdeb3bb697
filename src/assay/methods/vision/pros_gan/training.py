"""ProS-GAN itself: the prototypes' training, then the generator's against the discriminator, then one forward pass an image.

    L_G = w_rec MSE(x', x) + 5 (1 - mean_k F(x')_k p_k) + MSE(D(x'), [target label, 0])       w_rec = 100 (FLICKR-25K) or 50
    L_D = (MSE(D(x), [label, 0]) + MSE(D(x'), [target label, 1])) / 2                          every third batch

Weights, optimizers and schedules are the released code's.
"""

from __future__ import annotations

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from assay import checks
from assay.methods.vision.pros_gan.attacks import Attack, limits_of
from assay.methods.vision.pros_gan.networks import Discriminator, Generator, PrototypeNet, Prototypes
from assay.methods.vision.pros_gan.retrieval import (
    CHUNK,
    NORMS,
    Database,
    Norm,
    Victim,
    bits_of,
    evaluating,
    share_class,
    within,
)

BETAS = (0.5, 0.999)
HASH_WEIGHT, DISCRIMINATOR_EVERY, PROTOTYPE_BATCH, QUANTISATION = 5.0, 3, 64, 1e-4


# ----------------------------------------------------------------------------------------------------------------------- losses


def pairwise_loss(codes: Tensor, others: Tensor, similar: Tensor) -> Tensor:
    """Negative log-likelihood of which pairs are similar: mean of softplus(theta) - S theta, theta = <a, b> / 2: DPSH's likelihood.

    `codes` (A, bits) and `others` (B, bits) are real, `similar` bool (A, B).
    """
    theta = codes @ others.T / 2
    return (F.softplus(theta) - similar * theta).mean()


def prototype_loss(found: Prototypes, labels: Tensor, codes: Tensor, similar: Tensor) -> Tensor:
    """Of `PrototypeNet` for labels (B, classes), against the codes (N, bits) of images, `similar` (B, N) to them."""
    undecided = (bits_of(found.code.detach()) - found.code).square().sum(1).mean()
    return pairwise_loss(found.code, codes, similar) + QUANTISATION * undecided + F.mse_loss(found.label, labels)


def code_loss(relaxed: Tensor, codes: Tensor) -> Tensor:
    """1 - mean_k F_k p_k: twice the share of bits that differ, once F is saturated.

    >>> code_loss(torch.tensor([[1.0, 1, 1, -1]]), torch.tensor([[1.0, 1, 1, 1]]))
    tensor(0.5000)
    """
    return 1 - (relaxed * codes).mean()


def adversarial_loss(judged: Tensor, labels: Tensor, *, made: bool) -> Tensor:
    """Squared distance of the discriminator's (B, classes + 1) from the label and 0 for a real image, 1 for a made one."""
    return F.mse_loss(judged, torch.cat([labels, labels.new_full((len(labels), 1), float(made))], 1))


# ----------------------------------------------------------------------------------------------------------------------- training


def fit_prototypes(
    net: PrototypeNet, database: Database, *, steps: int = 30_000, rate: float = 1e-4, seed: int = 0
) -> PrototypeNet:
    """Train on batches of 64 label vectors against all codes of the database; the rate falls tenfold at half and at three quarters.

    Raises ValueError when the loss is no longer finite.
    """
    steps = checks.whole("steps", steps, low=1)
    candidates, generator = database.label_vectors(), torch.Generator().manual_seed(seed)
    similar = share_class(candidates, database.labels)
    optimizer = torch.optim.Adam(net.parameters(), rate, BETAS)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [steps // 2, steps * 3 // 4], 0.1)
    net.train()
    for _ in range(steps):
        picks = torch.randint(len(candidates), (PROTOTYPE_BATCH,), generator=generator).to(candidates.device)
        optimizer.zero_grad()
        loss = prototype_loss(net(candidates[picks]), candidates[picks], database.codes, similar[picks])
        loss.backward()
        optimizer.step()
        schedule.step()
    _must_be_finite(loss, "the prototypes'")
    return net.eval()


def rate_share(epoch: int, epochs: int) -> float:
    """The share of the rate in an epoch, from 0: whole in the first half, then down to nothing in equal steps."""
    falling = epochs // 2
    return 1 - max(0, epoch + 1 - (epochs - falling)) / (falling + 1)


class ProSGAN(Attack):
    """One network that attacks any image towards any label in a forward pass (Wang et al., CVPR 2021).

    `fit` trains it on the database's images, which must be there, without changing the model. The defaults are the paper's: 100 epochs of
    batches of 24 and 30 000 steps for the prototypes. `rec_weight` fixes how visible the change is; nothing bounds it, unless `bound` is
    given (our choice): then the output is brought within it (`norm`: every pixel, or the image's root mean square), in training too.
    `width` and `label_width` are the generator's, `discriminator_width` and `depth` the discriminator's.

    Afterwards `prototypes`, `generator` and `discriminator` are the networks. Images are square, a multiple of 16 pixels a side.
    Raises ValueError for images that are not, for a database without images, and for a loss that is no longer finite.
    When not to use it: for a few hundred images. Training costs hours where `DHTA` would need minutes; the pass pays once it is amortised.
    """

    prototypes: PrototypeNet
    generator: Generator
    discriminator: Discriminator

    def __init__(
        self, *, epochs: int = 100, batch: int = 24, rate: float = 1e-4, rec_weight: float = 50.0, prototype_steps: int = 30_000,
        prototype_rate: float = 1e-4, hidden: int = 4096, width: int = 64, label_width: int = 128, discriminator_width: int = 64,
        depth: int = 5, bound: float | None = None, norm: Norm = "linf", seed: int = 0, name: str = "pros_gan",
    ) -> None:  # fmt: skip
        self.epochs, self.batch = checks.whole("epochs", epochs, low=1), checks.whole("batch", batch, low=1)
        self.rate = checks.number("rate", rate, above=0)
        self.rec_weight = checks.number("rec_weight", rec_weight, low=0)
        self.prototype_steps = checks.whole("prototype_steps", prototype_steps, low=1)
        self.prototype_rate = checks.number("prototype_rate", prototype_rate, above=0)
        self.hidden, self.width, self.label_width = hidden, width, label_width
        self.discriminator_width, self.depth = discriminator_width, depth
        self.bound = None if bound is None else checks.number("bound", bound, above=0)
        self.norm = checks.choice("norm", norm, NORMS)
        self.seed, self.name = checks.whole("seed", seed, low=0), name

    def fit(self, victim: Victim, database: Database) -> Self:
        if database.images is None:
            raise ValueError(f"{self.name} learns from images: the database must have them (Database.of)")
        images, classes, bits = database.images, database.labels.shape[1], database.codes.shape[1]
        size, channels = images.shape[-1], images.shape[1]
        if images.shape[2] != size:
            raise ValueError(f"images must be square, got {tuple(images.shape[2:])}")
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            self.prototypes = PrototypeNet(classes, bits, hidden=self.hidden).to(images.device)
            self.generator = Generator(
                width=self.width, label_width=self.label_width, image_size=size, in_chans=channels
            ).to(images.device)
            self.discriminator = Discriminator(
                classes, width=self.discriminator_width, depth=self.depth, image_size=size, in_chans=channels
            ).to(images.device)
        super().fit(victim, database)
        fit_prototypes(self.prototypes, database, steps=self.prototype_steps, rate=self.prototype_rate, seed=self.seed)
        self._fit_generator(victim, images, database)
        return self

    def _fit_generator(self, victim: Victim, images: Tensor, database: Database) -> None:
        candidates, random = database.label_vectors(), torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            known = self.prototypes(candidates)
        made, judge = self.generator.train(), self.discriminator.train()
        adams = [torch.optim.Adam(net.parameters(), self.rate, BETAS) for net in (made, judge)]
        falls = [
            torch.optim.lr_scheduler.LambdaLR(adam, lambda epoch: rate_share(epoch, self.epochs)) for adam in adams
        ]
        with evaluating(victim.model):
            for _ in range(self.epochs):
                order = torch.randperm(len(images), generator=random).to(images.device)
                for number, rows in enumerate(order.split(self.batch)):
                    picks = torch.randint(len(candidates), (len(rows),), generator=random).to(images.device)
                    real, wanted = images[rows], candidates[picks]
                    fake = self._attacked(real, known.feature[picks], self.bound)
                    if number % DISCRIMINATOR_EVERY == 0:
                        adams[1].zero_grad()
                        of_real = adversarial_loss(judge(2 * real - 1), database.labels[rows], made=False)
                        of_fake = adversarial_loss(judge(2 * fake.detach() - 1), wanted, made=True)
                        ((of_real + of_fake) / 2).backward()
                        adams[1].step()
                    codes = bits_of(known.code[picks])
                    loss = (
                        self.rec_weight * F.mse_loss(2 * fake - 1, 2 * real - 1)
                        + HASH_WEIGHT * code_loss(victim.relaxed(fake), codes)
                        + adversarial_loss(judge(2 * fake - 1), wanted, made=False)
                    )
                    parameters = list(made.parameters())
                    for value, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                        value.grad = (
                            gradient  # of the generator alone: the model's and the judge's own stay as they are
                        )
                    adams[0].step()
                _must_be_finite(loss, "the generator's")
                for fall in falls:
                    fall.step()
        made.eval()
        judge.eval()

    def _attacked(self, images: Tensor, feature: Tensor, bound: float | Tensor | None) -> Tensor:
        """The generator's images in [0, 1]."""
        made: Tensor = (self.generator(2 * images - 1, feature) + 1) / 2
        return made if bound is None else within(made, images, bound, self.norm)

    @torch.no_grad()
    def target_codes(self, targets: Tensor) -> Tensor:
        """The prototypes of +-1 (B, bits)."""
        if self.victim is None:
            raise ValueError(f"{self.name} must be fitted first: fit(victim, database)")
        return bits_of(self.prototypes(targets).code)

    @torch.no_grad()
    def __call__(self, images: Tensor, targets: Tensor, *, bound: float | Tensor | None = None) -> Tensor:
        self.ready(images, targets)
        bound = self.bound if bound is None else bound
        limits = None if bound is None else limits_of(bound, len(images), images)
        found = []
        for rows in torch.arange(len(images), device=images.device).split(CHUNK):
            feature = self.prototypes(targets[rows]).feature
            found.append(self._attacked(images[rows], feature, None if limits is None else limits[rows]))
        return torch.cat(found)


def _must_be_finite(loss: Tensor, whose: str) -> None:
    if not bool(torch.isfinite(loss)):
        raise ValueError(f"{whose} loss is no longer finite: a smaller rate")

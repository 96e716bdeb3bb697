"""ProS-GAN: how robust is a model that searches images by binary codes? One trained network attacks any image in a forward pass.

Wang et al., "Prototype-supervised Adversarial Network for Targeted Attack of Deep Hashing" (CVPR 2021). An attack changes a query a little,
so that its code retrieves items of a label somebody chose. Iterative attacks take up to 2000 gradient steps through the model for every
image. Here a small network learns one code for each label (its prototype), and a generator, trained once against the model under test and
a discriminator, makes the attacked image from the image and the label. The use of it is to test one's own model, and to harden it:

    database = Database.of(model, images, labels)                    # or Database(unpack(rows of an index), labels)
    attacks = [DHTA(steps=200), DHTA(steps=20, direction="unit", step=0.003, name="quick"), ProSGAN(epochs=20)]
    print(HashRobustness(model, database, attacks).report(queries, query_labels).table())
    hardened = train_on_attacked(model, images, labels, steps=2000, rate=1e-4)

Files: `networks` (the three networks), `training` (their losses and training, `ProSGAN`), `attacks` (P2P, DHTA, noise), `retrieval` (codes,
average precision over ties, databases), `robustness` (the report), `defence`.
"""

from __future__ import annotations

from assay.methods.vision.pros_gan.attacks import DHTA, P2P, Attack, Noise, anchor_code, pull, slope_at
from assay.methods.vision.pros_gan.defence import dpsh_loss, train_on_attacked
from assay.methods.vision.pros_gan.networks import (
    Discriminator,
    Generator,
    PrototypeNet,
    Prototypes,
    generator_from_official,
    prototypes_from_official,
)
from assay.methods.vision.pros_gan.retrieval import (
    Database,
    Victim,
    average_precision,
    bits_of,
    change,
    hamming,
    pack,
    perceptibility,
    share_class,
    targets_for,
    unpack,
    within,
)
from assay.methods.vision.pros_gan.robustness import HashRobustness, Report, Row
from assay.methods.vision.pros_gan.training import (
    ProSGAN,
    adversarial_loss,
    code_loss,
    fit_prototypes,
    pairwise_loss,
    prototype_loss,
)

__all__ = [
    "Attack",
    "DHTA",
    "Database",
    "Discriminator",
    "Generator",
    "HashRobustness",
    "Noise",
    "P2P",
    "ProSGAN",
    "PrototypeNet",
    "Prototypes",
    "Report",
    "Row",
    "Victim",
    "adversarial_loss",
    "anchor_code",
    "average_precision",
    "bits_of",
    "change",
    "code_loss",
    "dpsh_loss",
    "fit_prototypes",
    "generator_from_official",
    "hamming",
    "pack",
    "pairwise_loss",
    "perceptibility",
    "prototype_loss",
    "prototypes_from_official",
    "pull",
    "share_class",
    "slope_at",
    "targets_for",
    "train_on_attacked",
    "unpack",
    "within",
]

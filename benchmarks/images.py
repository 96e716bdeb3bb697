"""`assay tune` on image models that are trained here first: a residual net and a vision transformer, on crops of twelve photographs.

    python benchmarks/images.py [--steps N] [--minutes M] [--goal latency] [--out FOLDER]

Both are classes of transformers. They are trained on the left halves of the photographs (`assay.workloads.pictures`), must tell more than
half of the crops of the next fifth (chance: 8.3 %), and are then tuned on the crops of the rest, which `assay tune` takes by itself. The
answers are printed as JSON lines.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from assay.paths import atomic_dir
from assay.tuner.images.tune import tune_images
from assay.tuner.images.work import Settings
from assay.workloads.pictures import LARGEST, PARTS, PICTURES, bundled_pictures, picture

SIZE, BATCH, FLOOR = 64, 48, 0.5
MEAN, STD = 0.5, 0.25
LABELS = {"id2label": dict(enumerate(PICTURES)), "label2id": {name: number for number, name in enumerate(PICTURES)}}


def residual() -> nn.Module:
    config = ResNetConfig(
        embedding_size=32, hidden_sizes=[32, 64, 128, 256], depths=[2, 2, 2, 2], layer_type="basic", **LABELS
    )
    return ResNetForImageClassification(config)


def transformer() -> nn.Module:
    config = ViTConfig(
        image_size=SIZE,
        patch_size=8,
        hidden_size=192,
        num_hidden_layers=8,
        num_attention_heads=3,
        intermediate_size=768,
        **LABELS,
    )
    return ViTForImageClassification(config)


MODELS = {"residual": (residual, 1e-3), "transformer": (transformer, 5e-4)}


def crops(part: str, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Colour crops (n, 3, SIZE, SIZE) as the processor makes them, and the photograph each is from."""
    labels = torch.randint(len(PICTURES), (n,), generator=generator)
    found = []
    for label in labels.tolist():
        whole = picture(PICTURES[label])
        left, right = (int(share * whole.shape[2]) for share in PARTS[part])
        y = int(torch.randint(whole.shape[1] - LARGEST + 1, (), generator=generator))
        x = int(torch.randint(left, right - LARGEST + 1, (), generator=generator))
        found.append(whole[:, y : y + LARGEST, x : x + LARGEST])
    pixels = F.interpolate(torch.stack(found), size=(SIZE, SIZE), mode="bilinear", antialias=True)
    return (pixels - MEAN) / STD, labels


def trained(make: Any, rate: float, steps: int) -> tuple[nn.Module, float]:
    """The model, and its accuracy on crops of the part for choices."""
    torch.manual_seed(0)
    model, generator = make().train(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for step in range(steps):
        pixels, labels = crops("train", BATCH, generator)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(pixels).logits, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.2f}", file=sys.stderr)
    model.eval()
    with torch.inference_mode():
        pixels, labels = crops("choose", 480, torch.Generator().manual_seed(1))
        guesses = torch.cat([model(some).logits.argmax(-1) for some in pixels.split(BATCH)])
    return model, float((guesses == labels).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--goal", default="latency")
    parser.add_argument("--out", type=Path, default=Path("out/images"))
    options = parser.parse_args()
    for name, (make, rate) in MODELS.items():
        folder = options.out / name
        if not (folder / "config.json").is_file():
            model, accuracy = trained(make, rate, options.steps)
            print(f"{name}: {100 * accuracy:.1f} % of the crops for choices", file=sys.stderr)
            if accuracy < FLOOR:
                sys.exit(
                    f"{name} tells {100 * accuracy:.1f} % of the crops, which is under the floor of {100 * FLOOR:g} %: more --steps"
                )
            processor = ViTImageProcessorPil(
                size={"height": SIZE, "width": SIZE}, image_mean=[MEAN] * 3, image_std=[STD] * 3
            )
            with atomic_dir(folder) as temporary:
                model.save_pretrained(temporary)
                processor.save_pretrained(temporary)
        settings = Settings(str(folder), options.goal, str(bundled_pictures()))
        found = tune_images(
            settings,
            options.out / f"{name}-{options.goal}",
            minutes=options.minutes,
            say=lambda text: print(text, file=sys.stderr),
        )
        print(json.dumps(found))


if __name__ == "__main__":
    main()

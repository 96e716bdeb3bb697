"""ConvFirst: is a fused block faster than a compiled ConvNeXt block, and does the roofline bound every layer from below?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from assay.experiments.core import Figure, Guard, Operator, Quality, Trial, experiment


def photograph(height: int, width: int) -> Tensor:
    """A real photograph (the portrait that comes with matplotlib), (1, 3, height, width) in [0, 1]."""
    import numpy as np
    from matplotlib import get_data_path
    from PIL import Image

    with Image.open(f"{get_data_path()}/sample_data/grace_hopper.jpg") as picture:
        pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None].float() / 255
    return nn.functional.interpolate(pixels, size=(height, width), mode="bilinear", antialias=True)


def features(channels: int, size: int, batch: int = 1) -> Tensor:
    """A block's input: the photograph after a random 3 x 3 convolution, normalised, (batch, channels, size, size).

    The pictures of a batch are the photograph, mirrored and shifted.
    """
    torch.manual_seed(0)
    picture = photograph(size, size)
    pictures = torch.cat([picture.flip(3) if i % 2 else picture.roll(7 * i, 3) for i in range(batch)])
    out = nn.functional.conv2d(pictures, torch.randn(channels, 3, 3, 3), padding=1)
    out = (out - out.mean()) / out.std()
    return out.contiguous(memory_format=torch.channels_last)


@experiment(
    "convfirst/block-fusion-speedup",
    points={
        "smoke": [{"channels": 64, "size": 64, "batch": 2}],
        "small": [
            {"channels": 64, "size": 128, "batch": 1},
            {"channels": 64, "size": 128, "batch": 8},
            {"channels": 64, "size": 64, "batch": 32},
        ],
        "full": [
            {"channels": c, "size": s, "batch": b} for c in (64, 128, 256) for s in (64, 128, 256) for b in (1, 8, 32)
        ],
    },
    decides={
        "small": {"channels": 64, "size": 128, "batch": 8},
        "full": {"channels": 64, "size": 128, "batch": 8},
    },
    operator=Operator("a convolutional block", free="the same block, layer by layer, compiled with Inductor"),
    paper={"what": "whole networks at equal ImageNet-1K accuracy", "device": "a GPU, half precision", "group_width": 8},
    departures={
        "what": "one stage's block at equal operations: no ImageNet here, so equal accuracy is the paper's word",
        "device": "this machine's processor, float32",
    },
    guard=Guard(
        "largest error against layer by layer, relative",
        1e-4,
        relative=False,
        without={"rival": "layer by layer, compiled or not, computes the same: it is the free baseline"},
    ),
    refuted_if="the fused block is slower than a compiled ConvNeXt block of as many operations",
    minutes=15,
)
def block_fusion_speedup(channels: int, size: int, batch: int) -> Trial:
    """A fused ConvFirst block against a ConvNeXt block compiled with Inductor, at (nearly) equal MACs: expand 4 for both.

    The paper's four times are whole networks at equal ImageNet accuracy on a GPU; here one stage's block, on this machine's
    processor. The free alternative for a user: the same ConvFirst block compiled, layer by layer.
    """
    from assay.methods.vision.convfirst import ConvFirst, ConvNeXt, fuse_blocks

    x = features(channels, size, batch)
    torch.manual_seed(1)
    plain, other = ConvFirst(channels, 4).eval(), ConvNeXt(channels, 4).eval()
    fused = fuse_blocks(plain)
    compiled, baseline = torch.compile(plain), torch.compile(other)

    def run(model: Any, given: Tensor = x) -> Tensor:
        with torch.inference_mode():
            out: Tensor = model(given)
        return out

    def error() -> Quality:
        """Deleted: tiles without the halo of their neighbours' pixels. Random: the right tiles in a random order."""
        expected = run(plain)

        def against(out: Tensor) -> float:
            return float((out - expected).abs().max() / expected.abs().max())

        def tiles(whole: Tensor) -> list[Tensor]:
            return [part for band in whole.chunk(4, 2) for part in band.chunk(4, 3)]

        def joined(parts: list[Tensor]) -> Tensor:
            return torch.cat([torch.cat(parts[i : i + 4], 3) for i in range(0, 16, 4)], 2)

        order = torch.randperm(16, generator=torch.Generator().manual_seed(0)).tolist()
        shuffled = joined([tiles(expected)[i] for i in order])
        no_halo = joined([run(plain, part.contiguous()) for part in tiles(x)])
        return Quality(against(run(fused)), 0.0, controls={"deleted": against(no_halo), "random": against(shuffled)})

    def details() -> dict[str, Any]:
        from assay.measure.cost import count_cost
        from assay.measure.memory import peak_memory
        from assay.methods.vision.convfirst import block_intensity

        memory = {name: peak_memory(lambda m=m: run(m)) for name, m in (("plain", plain), ("fused", fused))}  # type: ignore[misc]
        return {
            "tile": fused.tile,
            "macs": {"convfirst": count_cost(plain, x).macs, "convnext": count_cost(other, x).macs},
            "intensity": {
                "layer by layer": block_intensity(channels, 4, fused=False, element_bytes=4),
                "fused": block_intensity(channels, 4, fused=True, element_bytes=4),
            },
            "extra_bytes": {name: found.extra_bytes if found else None for name, found in memory.items()},
        }

    return Trial(
        baseline=lambda: run(baseline),
        candidate=lambda: run(fused),
        free=lambda: run(compiled),
        arms={"the same block, not compiled": lambda: run(plain)},
        quality=error,
        details=details,
    )


@experiment(
    "convfirst/roofline-lower-bound",
    points={
        "smoke": [{"net": "convfirst", "size": 128}],
        "small": [{"net": net, "size": 256} for net in ("convfirst", "convnext", "mbconv")]
        + [{"net": "smollm2-135m", "size": 256}],
        "full": [
            {"net": net, "size": size}
            for net in ("convfirst", "convnext", "mbconv", "smollm2-135m")
            for size in (256, 512, 1024)
        ],
    },
    decides={"small": {"net": "convfirst", "size": 256}, "full": {"net": "convfirst", "size": 512}},
    operator=Operator("the time of a layer", free="the roofline of main memory alone"),
    paper={"net": "convfirst", "device": "a GPU"},
    departures={"device": "this machine's processor, whose caches the bound takes into account"},
    refuted_if="some layer runs faster than the machine's calibrated peak and bandwidth allow",
)
def roofline_lower_bound(net: str, size: int) -> Figure:
    """Share of a network's modules whose fastest run took less time than the bound: 0 means it was never beaten.

    `size`: pixels a side, for the language model prompt tokens. "beaten_plain_roofline" is the same share for the paper's DRAM
    roofline, which takes every byte from main memory and so is beaten by work that stays in a cache. It is a detail and no
    baseline: where nothing beats it either, there is nothing to gain over it, and the claim (a share of 0) is met all the same.
    """
    from assay.measure.profile import profile_model
    from assay.measure.roofline import attainable_seconds, device_of

    model, inputs = _network(net, size)
    profile = profile_model(model, inputs, repeats=5)
    rows = [row for row in profile.rows if row.bytes and row.seconds > 0]
    beaten = [row.name for row in rows if row.fastest < row.attainable_seconds]
    plain = [
        row.fastest < attainable_seconds(2 * row.macs, row.bytes, device_of(profile.calibration, row.dtype))
        for row in rows
    ]
    return Figure(
        value=len(beaten) / len(rows),
        unit="share",
        arms={"the roofline of main memory alone": sum(plain) / len(plain)},
        details={
            "modules": len(rows),
            "beaten_plain_roofline": sum(plain) / len(plain),
            "nearest": min(row.fastest / row.attainable_seconds for row in rows),
            "beaten": beaten,
            "roofline_share": profile.roofline_share,
            "calibration_noisy": profile.calibration.noisy,
        },
    )


def _network(net: str, size: int) -> tuple[nn.Module, Tensor]:
    from assay.methods.vision.convfirst import ConvFirst, ConvNet, ConvNeXt, MBConv

    if net == "smollm2-135m":
        from assay.workloads.models import load_model
        from assay.workloads.text import long_prompt

        loaded = load_model(net)
        return loaded.model, long_prompt(loaded.tokenizer, size)
    blocks = {"convfirst": ConvFirst, "convnext": ConvNeXt, "mbconv": MBConv}
    if net not in blocks:
        raise ValueError(f"net must be one of {', '.join(blocks)}, smollm2-135m, got {net!r}")
    torch.manual_seed(0)
    model = ConvNet(lambda c: blocks[net](c, 4), channels=(64, 128, 256), depths=(2, 2, 2)).eval()
    return model, photograph(size, size)

"""Query-key pairs, multiply-accumulates and parameters of a FIT, computed from its sizes."""

from __future__ import annotations

from dataclasses import dataclass

from assay import checks
from assay.methods.attention.fit.model import Positions, parse_layers


@dataclass(frozen=True)
class FITSize:
    """The sizes of a `FIT` without context and cross MLPs, and what follows from them. All counts are of one sequence.

    Raises ValueError for sizes below 1 and malformed layer strings.

    >>> size = FITSize("(1)1(1)", inputs=12, groups=16, group_size=64, latents=4, dim=64, latent_dim=64)
    >>> full = (16 * 64) ** 2 * 3  # three layers of full attention
    >>> sum(size.pairs().values()) < full / 10
    True
    """

    layers: str
    inputs: int
    groups: int
    group_size: int
    latents: int
    dim: int
    latent_dim: int
    ratio: int = 4

    def __post_init__(self) -> None:
        parse_layers(self.layers)
        for name in ("inputs", "groups", "group_size", "latents", "dim", "latent_dim", "ratio"):
            checks.whole(name, getattr(self, name), low=1)

    def _counts(self) -> tuple[int, int, int, int]:
        """How many local layers, reads, global layers and writes there are."""
        stages = parse_layers(self.layers)
        return sum(a for a, _ in stages), sum(b > 0 for _, b in stages), sum(b for _, b in stages), len(stages) - 1

    def pairs(self) -> dict[str, int]:
        """Query-key pairs of all layers: local L n each, read and write L m, global (t m)^2."""
        local, reads, glob, writes = self._counts()
        t, n, m = self.groups, self.group_size, self.latents
        return {"local": local * t * n * n, "read": reads * t * m * n, "global": glob * (t * m) ** 2,
                "write": writes * t * n * m}  # fmt: skip

    def macs(self) -> dict[str, int]:
        """Multiply-accumulates (1 MAC = 2 FLOPs) of linear layers and of attention, by part."""
        local, reads, glob, writes = self._counts()
        tokens, slots, inner = self.groups * self.group_size, self.groups * self.latents, min(self.dim, self.latent_dim)
        layer, pairs = 4 + 2 * self.ratio, self.pairs()
        # q and o on one side, k and v on the other
        crossing = 2 * inner * (tokens * self.dim + slots * self.latent_dim)
        return {
            "stem": tokens * self.inputs * self.dim,
            "local": local * tokens * layer * self.dim**2 + 2 * pairs["local"] * self.dim,
            "read": reads * crossing + 2 * pairs["read"] * inner,
            "global": glob * slots * layer * self.latent_dim**2 + 2 * pairs["global"] * self.latent_dim,
            "write": writes * crossing + 2 * pairs["write"] * inner,
        }

    def parameters(self, positions: Positions = "learned") -> int:
        """Parameters, from the widths and the tables of positions (n rows) and latents (t m rows)."""
        local, reads, glob, writes = self._counts()
        x, z, r = self.dim, self.latent_dim, self.ratio
        inner = min(x, z)

        def layer(d: int) -> int:
            return 4 * d * (d + 1) + 2 * r * d * d + (r + 1) * d + 4 * d

        def cross(d: int, e: int) -> int:
            return (d + 1) * inner + 2 * (e + 1) * inner + (inner + 1) * d + 2 * d + 2 * e

        tables = self.groups * self.latents * z + (self.group_size * x if positions == "learned" else 0)
        body = local * layer(x) + glob * layer(z) + reads * cross(z, x) + writes * cross(x, z) + 2 * x + 2 * z
        return tables + body + (self.inputs + 1) * x + 2 * x

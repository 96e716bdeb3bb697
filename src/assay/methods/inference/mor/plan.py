"""Which stored layer runs where, how many tokens each recursion may take, and what a forward pass costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from assay import checks

SHARINGS = ("middle_cycle", "cycle", "sequence", "middle_sequence")


@dataclass(frozen=True)
class Plan:
    """Numbers of stored layers in the order they run: `first` and `last` once, `groups[r]` in recursion r.

    All groups have as many layers. `unrolled` is the whole order.
    """

    first: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]
    last: tuple[int, ...]

    @property
    def unrolled(self) -> tuple[int, ...]:
        return (*self.first, *(index for group in self.groups for index in group), *self.last)


def layer_plan(stored: int, recursions: int, sharing: str) -> Plan:
    """The plan of `stored` layers of which all, or all but the first and the last ("middle_..."), are run `recursions` times.

    "cycle": the layers in their order, then again from the first. "sequence": each layer `recursions` times in its place; the unrolled
    layers are cut into recursions of equal length (the paper routes cycles only: our choice). Raises ValueError for fewer layers than that
    takes and for another sharing.

    >>> layer_plan(4, 2, "middle_cycle").unrolled, layer_plan(3, 2, "sequence").groups
    ((0, 1, 2, 1, 2, 3), ((0, 0, 1), (1, 2, 2)))
    """
    stored, recursions = checks.whole("stored", stored, low=1), checks.whole("recursions", recursions, low=1)
    checks.choice("sharing", sharing, SHARINGS)
    ends = 1 if sharing.startswith("middle") else 0
    block = range(ends, stored - ends)
    if not block:
        raise ValueError(f"sharing {sharing!r} needs at least {2 * ends + 1} layers, got {stored}")
    order = (
        list(block) * recursions if sharing.endswith("cycle") else [index for index in block for _ in range(recursions)]
    )
    size = len(block)
    groups = tuple(tuple(order[start : start + size]) for start in range(0, len(order), size))
    return Plan(tuple(range(ends)), groups, tuple(range(stored - ends, stored)))


def hierarchical(recursions: int) -> list[float]:
    """The paper's capacities: recursion r of N_r takes (N_r - r + 1) / N_r of the tokens.

    >>> hierarchical(4)
    [1.0, 0.75, 0.5, 0.25]
    """
    return [(recursions - r) / recursions for r in range(checks.whole("recursions", recursions, low=1))]


def checked_capacities(capacities: Sequence[float] | None, recursions: int) -> list[float]:
    """`capacities`, or the paper's for None. Raises ValueError unless there is one a recursion, the first 1 and none above the one
    before, TypeError for what is no list of numbers."""
    if capacities is None:
        return hierarchical(recursions)
    if not isinstance(capacities, list | tuple):
        raise TypeError(f"capacities must be a list of shares, got {checks.shown(capacities)}")
    shares = [checks.number("capacities", share, above=0, high=1) for share in capacities]
    if len(shares) != recursions:
        raise ValueError(f"capacities must be one a recursion, {recursions}, got {len(shares)}")
    if shares[0] != 1 or any(later > before for before, later in zip(shares, shares[1:], strict=False)):
        raise ValueError(f"capacities must begin with 1 and never rise, got {shares}")
    return shares


def tokens_of(share: float, tokens: int) -> int:
    """How many of `tokens` tokens a capacity is, as released: rounded down, one at least."""
    return max(1, int(share * tokens))


def forward_macs(config: Any, tokens: int) -> int:
    """MACs of a forward pass over one row of `tokens` tokens under top-k routing, without a cache: all layers, routers and the head.

    `config` is a `MoRConfig` with router "expert" or "none" around a Llama-type base: separate projections and a gated MLP. Linear layers
    cost in proportion to the tokens of their recursion, attention to the square (half of it, as causal kernels do), or, with shared keys
    and values, to queries times all tokens. 1 MAC = 2 operations.
    Raises ValueError for token-choice, whose tokens depend on the data, and for no tokens.
    """
    if config.router == "token":
        raise ValueError("config must have router 'expert' or 'none': how deep token-choice goes depends on the data")
    tokens, base = checks.whole("tokens", tokens, low=1), config.base
    width, heads = base.hidden_size, base.num_attention_heads
    size = getattr(base, "head_dim", None) or width // heads
    queries, keys = width * heads * size, width * base.num_key_value_heads * size
    plan = layer_plan(base.num_hidden_layers, config.recursions, config.sharing)
    shared = config.kv == "share"

    def layer(taken: int, deep: bool) -> int:
        linear = 2 * queries + 3 * width * base.intermediate_size + (0 if deep and shared else 2 * keys)
        if deep and config.kv != "recursion" and taken < tokens:  # under a mask, which is computed in full
            scores = 2 * heads * size * taken * tokens
        else:
            scores = 2 * heads * size * taken * taken // (1 if taken == 1 else 2)
        return taken * linear + scores

    total = (len(plan.first) + len(plan.last)) * layer(tokens, False)
    for r, group in enumerate(plan.groups):
        taken = tokens_of(config.shares[r], tokens) if config.router == "expert" else tokens
        total += len(group) * layer(taken, r > 0)
        if config.router == "expert":
            total += width * tokens * (2 if config.causality == "aux_router" else 1)
    return int(total + tokens * width * base.vocab_size)

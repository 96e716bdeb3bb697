"""One model whose layers compute every row with the block of the row's own chain.

`SharedModel.model` is the transformers model of the zoo, its own forward pass untouched: masks, positions, attention and cache are
common to all rows, because attention has no weights. Its linear layers, norms and embeddings are exchanged for `Shared` ones, which
know whose row is whose. Where the rows of a pass have one block at a place, that place runs once over all of them; where they have
several, once a block, over the rows of it. Adapters are added by a grouped low-rank product: two batched products, however many adapters
there are.

A pass whose rows are all of one model gives the bits of that model (of PEFT's model, for an adapter). In a pass of several, products are
over other numbers of rows, and sums may be rounded in another order.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks
from assay.methods.core import kernels
from assay.methods.serving.blockllm.adapters import Factors, put
from assay.methods.serving.blockllm.zoo import Chain, Zoo, fill

Index = slice | Tensor


@dataclass(frozen=True)
class Group:
    """Rows of a pass that have one block (or none, -1) at a place."""

    variant: int
    rows: Index


class Switch:
    """Whose rows the next pass has: the number of a chain for each row."""

    def __init__(self) -> None:
        self.rows: tuple[int, ...] = ()
        self._groups: dict[tuple[int, ...], list[Group]] = {}
        self.kept: dict[int, Any] = {}  # what layers gathered for these rows

    def set(self, rows: Sequence[int]) -> None:
        if tuple(rows) != self.rows:
            self.rows = tuple(rows)
            self._groups.clear()
            self.kept.clear()

    def groups(self, of_chain: tuple[int, ...]) -> list[Group]:
        """The rows by what `of_chain` says of their chains, in the order of their first rows."""
        found = self._groups.get(of_chain)
        if found is None:
            by: dict[int, list[int]] = {}
            for row, chain in enumerate(self.rows):
                by.setdefault(of_chain[chain], []).append(row)
            found = self._groups[of_chain] = [Group(variant, _index(rows)) for variant, rows in by.items()]
        return found


def _index(rows: list[int]) -> Index:
    if rows == list(range(rows[0], rows[-1] + 1)):
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows)


class Shared(nn.Module):
    """The variants of a layer, of which each row gets its own. Everything else is looked up in the first."""

    def __init__(self, switch: Switch, variants: Sequence[nn.Module], of_chain: tuple[int, ...]) -> None:
        super().__init__()
        self.switch, self.of_chain = switch, of_chain
        self.variants = nn.ModuleList(variants)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            variants: Any = super().__getattr__("variants")
            return getattr(variants[0], name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        groups = self.switch.groups(self.of_chain)
        if len(groups) == 1:  # what comes once for all rows, such as positions, stays so
            whole: Tensor = self.variants[groups[0].variant](x, *args, **kwargs)
            return whole
        if len(x) == 1:
            x = x.expand(len(self.switch.rows), *x.shape[1:])
        self._require_rows(x)
        y: Tensor | None = None
        for group in groups:
            part = self.variants[group.variant](x[group.rows], *args, **kwargs)
            if y is None:
                y = part.new_empty(len(x), *part.shape[1:])
            y[group.rows] = part
        assert y is not None
        return y

    def _require_rows(self, x: Tensor) -> None:
        if len(x) != len(self.switch.rows):
            raise ValueError(
                f"a pass must have the rows it was announced with, {len(self.switch.rows)}, got {len(x)} in "
                f"{type(self.variants[0]).__name__}"
            )


class SharedLinear(Shared):
    """Linear layers with adapters of some chains beside them: `factors[slots[chain]]` for a chain's rows, none where that is -1."""

    def __init__(
        self,
        switch: Switch,
        variants: Sequence[nn.Module],
        of_chain: tuple[int, ...],
        factors: Sequence[Factors],
        slots: tuple[int, ...],
    ) -> None:
        super().__init__(switch, variants, of_chain)
        self.factors, self.slots = list(factors), slots
        rank = max(len(one.down) for one in factors)
        self.down = torch.stack([F.pad(one.down.T, (0, rank - len(one.down))) for one in factors])  # (slots, in, rank)
        self.up = torch.stack(
            [F.pad(one.up.T * one.scale, (0, 0, 0, rank - len(one.down))) for one in factors]
        )  # (slots, rank, out), scaled

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = super().forward(x, *args, **kwargs)
        groups = [group for group in self.switch.groups(self.slots) if group.variant >= 0]
        if not groups:
            return y
        self._require_rows(x)
        if len(groups) == 1:
            kernels.ran("adapters", "one")
            one, rows = self.factors[groups[0].variant], groups[0].rows
            added = F.linear(F.linear(x[rows], one.down), one.up) * one.scale
        else:
            kernels.ran("adapters", "grouped")
            rows, down, up = self._gathered()
            added = torch.bmm(torch.bmm(x[rows], down), up)
        if isinstance(rows, slice) and rows == slice(0, len(x)):
            return y + added
        y[rows] += added
        return y

    def _gathered(self) -> tuple[Index, Tensor, Tensor]:
        """The rows with an adapter, and the factors of each, kept as long as the rows stay the same."""
        kept = self.switch.kept.get(id(self))
        if kept is None:
            which = [self.slots[chain] for chain in self.switch.rows]
            index = torch.tensor([slot for slot in which if slot >= 0])
            rows = _index([row for row, slot in enumerate(which) if slot >= 0])
            kept = self.switch.kept[id(self)] = (rows, self.down[index], self.up[index])
        found: tuple[Index, Tensor, Tensor] = kept
        return found


class SharedModel:
    """All models of a zoo, or those of `chains`, as one transformers model; see the module.

    `use(names)` says whose the rows of the passes to come are; `model` is then called like any other. Adapters of different rank are
    padded with zeros where they meet. It is a view of the zoo as it was: models added later need a new one.
    Raises ValueError for no models, and for a model of which a leaf's parameters are not all in one block.
    """

    def __init__(self, zoo: Zoo, chains: Mapping[str, Chain] | None = None) -> None:
        self.chains = dict(zoo.chains if chains is None else chains)
        if not self.chains:
            raise ValueError("zoo must have at least one model, got none")
        self.names = tuple(self.chains)
        self._number = {name: number for number, name in enumerate(self.names)}
        self.switch = Switch()
        self.model: Any = zoo.shell()
        place_of = {full: (place, local) for place, names in zoo.names.items() for local, full in names.items()}
        for path, module in list(self.model.named_modules()):
            stored = [
                full
                for name in (*module._parameters, *module._buffers)
                if (full := f"{path}.{name}" if path else name) in place_of
            ]
            if not stored:
                continue
            if len(places := {place_of[full][0] for full in stored}) > 1:
                raise ValueError(f"model must have every layer in one block, got {path} in {sorted(places)}")
            (place,) = places
            put(self.model, path, self._shared(zoo, module, path, place, {f: place_of[f][1] for f in stored}))
        self.model.eval().requires_grad_(False)

    def _shared(self, zoo: Zoo, module: nn.Module, path: str, place: str, stored: Mapping[str, str]) -> Shared:
        digests = list(dict.fromkeys(one.blocks[place] for one in self.chains.values()))
        variants = []
        for digest in digests:
            variant = copy.deepcopy(module)  # its weights are on "meta"
            for full, local in stored.items():
                fill(variant, full.rpartition(".")[2], zoo.blocks[digest].tensors[local])
            variants.append(variant)
        of_chain = tuple(digests.index(one.blocks[place]) for one in self.chains.values())
        inside = next(iter(stored.values())).rpartition(".")[0]
        adapters = list(dict.fromkeys(one.adapters[place] for one in self.chains.values() if place in one.adapters))
        known = {digest: zoo.factors(digest) for digest in adapters}
        with_factors = [digest for digest in adapters if inside in known[digest]]
        if not (with_factors and isinstance(module, nn.Linear)):
            return Shared(self.switch, variants, of_chain)
        slots = tuple(
            with_factors.index(digest) if (digest := one.adapters.get(place, "")) in with_factors else -1
            for one in self.chains.values()
        )
        factors = [known[digest][inside] for digest in with_factors]
        return SharedLinear(self.switch, variants, of_chain, factors, slots)

    def number(self, name: str) -> int:
        """Of a model's chain. Raises ValueError for one that is not here."""
        if name not in self._number:
            raise ValueError(f"name must be one of {', '.join(self.names)}, got {checks.shown(name)}")
        return self._number[name]

    def use(self, names: Sequence[str]) -> None:
        """The rows of the passes to come are of these models, in this order. Raises ValueError for one that is not here."""
        self.switch.set([self.number(name) for name in names])

    def order(self, name: str) -> int:
        """Where a row of this model stands in a batch, so that rows of one chain lie side by side."""
        return self.number(name)

    def blocks_of_pass(self, names: Sequence[str]) -> list[str]:
        """The blocks that a pass over rows of these models runs, those of adapters among them, each once a place."""
        found: list[str] = []
        chains = [self.chains[name] for name in dict.fromkeys(names)]
        for place in chains[0].blocks:
            found += dict.fromkeys(one.blocks[place] for one in chains)
            found += dict.fromkeys(one.adapters[place] for one in chains if place in one.adapters)
        return found

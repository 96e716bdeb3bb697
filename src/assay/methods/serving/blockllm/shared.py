"""One model whose layers compute every row with the block of the row's own chain.

`SharedModel.model` is the transformers model of the zoo, its own forward pass untouched: masks, positions, attention and cache are
common to all rows, because attention has no weights. Its linear layers, norms and embeddings are exchanged for `Shared` ones, which
know whose row is whose. Where the rows of a pass have one block at a place, that place runs once over all of them; where they have
several, once a block, over the rows of it. Adapters are added by a grouped low-rank product: two batched products, however many adapters
there are, each over as many rows as the adapter with most of them has.

A pass whose rows are all of one model gives the bits of that model (for an adapter those of PEFT's model, where PEFT keeps the factors in
the model's dtype). In a pass of several, products are over other numbers of rows, and sums may be rounded in another order.

Each thread announces its own rows, so that passes of several threads do not meet.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Iterator, Mapping, Sequence
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


@dataclass(frozen=True, eq=False)
class ByAdapter:
    """The rows of a pass that have an adapter, adapter by adapter."""

    slots: tuple[int, ...]  # the adapters, each once
    taken: Tensor  # (adapters, most rows of one) rows of the pass; who has fewer has its first once more
    rows: Index  # of the pass, those with an adapter
    back: Tensor  # where each of `rows` lies in `taken`, flattened


class Switch(threading.local):
    """Whose rows the next pass of this thread has: the number of a chain for each row."""

    def __init__(self) -> None:
        self.rows: tuple[int, ...] = ()
        self.probing = False
        self._groups: dict[tuple[int, ...], list[Group]] = {}
        self._by_adapter: dict[tuple[int, ...], ByAdapter] = {}

    def set(self, rows: Sequence[int]) -> None:
        if tuple(rows) != self.rows:
            self.rows = tuple(rows)
            self._groups.clear()
            self._by_adapter.clear()

    def groups(self, of_chain: tuple[int, ...]) -> list[Group]:
        """The rows by what `of_chain` says of their chains, in the order of their first rows."""
        found = self._groups.get(of_chain)
        if found is None:
            by: dict[int, list[int]] = {}
            for row, chain in enumerate(self.rows):
                by.setdefault(of_chain[chain], []).append(row)
            found = self._groups[of_chain] = [Group(variant, _index(rows)) for variant, rows in by.items()]
        return found

    def by_adapter(self, slots: tuple[int, ...]) -> ByAdapter:
        """The rows by their adapters, `slots[chain]`, where that is not -1."""
        found = self._by_adapter.get(slots)
        if found is None:
            by: dict[int, list[int]] = {}
            for row, chain in enumerate(self.rows):
                if slots[chain] >= 0:
                    by.setdefault(slots[chain], []).append(row)
            by = dict(sorted(by.items()))  # the same adapters in the same order, whatever the rows'
            most = max(map(len, by.values()))
            taken = torch.tensor([rows + rows[:1] * (most - len(rows)) for rows in by.values()])
            place = {row: i * most + j for i, rows in enumerate(by.values()) for j, row in enumerate(rows)}
            ordered = sorted(place)
            back = torch.tensor([place[row] for row in ordered])
            found = self._by_adapter[slots] = ByAdapter(tuple(by), taken, _index(ordered), back)
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
            found = getattr(variants[0], name)
            if isinstance(found, Tensor) and len(variants) > 1 and self.switch.probing:
                raise ValueError(f"the {name} of a {type(variants[0]).__name__} is used from outside it") from None
            return found

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        groups = self.switch.groups(self.of_chain)
        if len(groups) == 1:  # what comes once for all rows, such as positions, stays so
            return self.variants[groups[0].variant](x, *args, **kwargs)
        count = len(self.switch.rows)
        if len(x) == 1 and count:
            x = x.expand(count, *x.shape[1:])
        self._require_rows(x)
        parts = []
        for group in groups:
            mine = [_rows_of(value, group.rows, count) for value in (x, *args)]
            named = {name: _rows_of(value, group.rows, count) for name, value in kwargs.items()}
            parts.append((group.rows, self.variants[group.variant](*mine, **named)))
        return _joined(parts, count)

    def _require_rows(self, x: Tensor) -> None:
        if len(x) != len(self.switch.rows):
            raise ValueError(
                f"a pass must have the rows it was announced with, {len(self.switch.rows)}, got {len(x)} in "
                f"{type(self.variants[0]).__name__}"
            )


def _rows_of(value: Any, rows: Index, count: int) -> Any:
    return value[rows] if isinstance(value, Tensor) and value.ndim and len(value) == count else value


def _joined(parts: Sequence[tuple[Index, Any]], count: int) -> Any:
    """What a layer gave for groups of rows as it would be for all: a tensor, or several."""
    first = parts[0][1]
    if isinstance(first, tuple):
        return tuple(_joined([(rows, part[i]) for rows, part in parts], count) for i in range(len(first)))
    y = first.new_empty(count, *first.shape[1:])
    for rows, part in parts:
        y[rows] = part
    return y


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
        self.together: tuple[tuple[int, ...], tuple[Tensor, Tensor, Tensor]] | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = super().forward(x, *args, **kwargs)
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
            by = self.switch.by_adapter(self.slots)
            down, up, scale = self.stacked(by.slots)
            grouped = torch.bmm(torch.bmm(x[by.taken].flatten(1, -2), down), up) * scale
            rows, added = by.rows, grouped.to(y.dtype).reshape(-1, *y.shape[1:])[by.back]
        if isinstance(rows, slice) and rows == slice(0, len(x)):
            return y + added
        y[rows] += added
        return y

    def stacked(self, slots: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """The factors of these adapters side by side, padded with zeros to the largest rank among them: down (adapters, in, rank), up
        (adapters, rank, out) and scale (adapters, 1, 1). The last ones asked for are kept."""
        kept = self.together
        if kept is None or kept[0] != slots:
            chosen = [self.factors[slot] for slot in slots]
            rank = max(len(one.down) for one in chosen)
            down = torch.stack([F.pad(one.down.T, (0, rank - len(one.down))) for one in chosen])
            up = torch.stack([F.pad(one.up.T, (0, 0, 0, rank - len(one.down))) for one in chosen])
            wide = torch.promote_types(up.dtype, torch.float32)
            scale = torch.tensor([one.scale for one in chosen], dtype=wide)[:, None, None]
            kept = self.together = slots, (down, up, scale)
        return kept[1]


class SharedModel:
    """All models of a zoo, or those of `chains`, as one transformers model; see the module.

    `use(names)` says whose the rows of this thread's passes to come are; `model` is then called like any other, with as many rows. It is a
    view of the zoo as it was: models added later need a new one.
    Raises ValueError for no models, for a model of which a leaf's parameters are not all in one block, and for one whose layers do not
    work row by row, which one step of several rows finds out.
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
        self.model.register_forward_pre_hook(functools.partial(_require_announced, self.switch), with_kwargs=True)
        self._probe()

    @torch.inference_mode()
    def _probe(self) -> None:
        """Run a step of rows that differ wherever the chains do. Raises ValueError where a layer does not take them apart."""
        rows = [0]
        shared = [module for module in self.model.modules() if isinstance(module, Shared)]
        for kinds in {one.of_chain for one in shared} | {one.slots for one in shared if isinstance(one, SharedLinear)}:
            if len({kinds[row] for row in rows}) < min(len(set(kinds)), 2):
                rows.append(next(i for i, kind in enumerate(kinds) if kind != kinds[0]))
        if len(rows) == 1:
            return
        self.switch.set(rows)
        self.switch.probing = True
        try:
            self.model(input_ids=torch.zeros(len(rows), 1, dtype=torch.int64), use_cache=False)
        except Exception as error:
            why = f"{type(error).__name__}: {str(error)[:200]}"
            raise ValueError(
                f"model must compute row by row to share blocks, which {type(self.model).__name__} does not ({why})"
            ) from None
        finally:
            self.switch.probing = False
            self.switch.set(())

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

    def tensors(self) -> Iterator[Tensor]:
        """All that is in memory for it: parameters, buffers, factors, and those of the adapters that met last, side by side."""
        yield from (*self.model.parameters(), *self.model.buffers())
        for module in self.model.modules():
            if isinstance(module, SharedLinear):
                for one in module.factors:
                    yield from (one.down, one.up)
                yield from () if module.together is None else module.together[1]

    def number(self, name: str) -> int:
        """Of a model's chain. Raises ValueError for one that is not here."""
        if name not in self._number:
            raise ValueError(f"name must be one of {', '.join(self.names)}, got {checks.shown(name)}")
        return self._number[name]

    def use(self, names: Sequence[str]) -> None:
        """The rows of the passes to come are of these models, in this order. Raises ValueError for one that is not here."""
        self.switch.set([self.number(name) for name in names])


def _require_announced(switch: Switch, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse a pass of other rows than were announced."""
    given = next((x for x in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None), None)
    if given is not None and len(given) != len(switch.rows):
        raise ValueError(
            f"a pass must have the rows it was announced with, {len(switch.rows)}, got {len(given)} in {type(model).__name__}"
        )

"""A model's decoding step, cut at every attention: slices that run one after the other, with the queries ready as early as can be.

`trace(model, rows)` records one step as a graph in which each attention is a single node. `sliced(graph)` cuts it before each of them:
n attentions make n + 1 slices. What has to be carried over a cut besides the attention's output (the residual stream, mostly) is a minimum
cut, in bytes. Within a slice all that the query needs comes first, then what key and value need, then the rest, which can be done
while the attention is under way. The numbers are those of the model itself: the same operators in another order.

When NOT to use it: for models whose Python code looks at values (a loop over the experts that a router chose), which `trace` refuses, and
outside of decoding: a graph is one of so many rows and one token each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

TRACED = "assay_attention_offloading_traced"
SOURCE, SINK = "source", "sink"


@torch.library.custom_op("assay_offloading::attend", mutates_args=())
def _attend(query: Tensor, key: Tensor, value: Tensor, layer: int, scale: float) -> Tensor:
    """The mark of an attention in a graph. By itself it attends to the newest token only: a token without a past."""
    return value.repeat_interleave(query.shape[1] // value.shape[1], 1).clone()


def _entry(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    refuse_odd(module, attention_mask, dropout, kwargs)
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    return _attend(query, key, value, module.layer_idx, float(scale)).transpose(1, 2), None


def refuse_odd(module: nn.Module, mask: Any, dropout: float, kwargs: dict[str, Any]) -> None:
    """Raise ValueError for an attention that is more than a softmax over scores."""
    name = type(module).__name__
    if mask is not None:
        raise ValueError(f"{name} masks its attention in a way of its own, which does not travel")
    for word in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(word) is not None:
            raise ValueError(f"the attention of {name} has {word}, which is not offloaded")
    if dropout:
        raise ValueError(f"dropout of {name} must be 0, got {dropout}: use eval mode")


@contextmanager
def attention_named(model: nn.Module, name: str) -> Iterator[None]:
    """The model with another `attn_implementation` for a while. Raises ValueError if it does not take it."""
    # here: workers import this package, and need none of it
    from assay.methods.core.attention.integration import set_attention

    found: Any = model
    before = found.config.get_text_config()._attn_implementation
    set_attention(model, name)
    try:
        yield
    finally:
        found.set_attn_implementation(before)


def trace(model: nn.Module, rows: int) -> fx.GraphModule:
    """One decoding step of `rows` rows as a graph of `input_ids` and `position_ids`, int64 (rows, 1): logits (rows, 1, vocabulary).

    Weights are the model's own tensors. Raises ValueError for a model that cannot be traced, saying why.
    """
    from torch._guards import TracingContext, tracing
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(TRACED, _entry)  # and no mask of that name: models then make none
    found: Any = model
    device = next(model.parameters()).device

    def step(input_ids: Tensor, position_ids: Tensor) -> Tensor:
        logits: Tensor = found(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
        return logits

    ids = torch.zeros(rows, 1, dtype=torch.int64, device=device)
    sizes = TracingContext(FakeTensorMode(allow_fallback_kernels=True))  # one for all nodes' sizes, not one for each
    try:
        with attention_named(model, TRACED), torch.no_grad(), tracing(sizes):
            graph: fx.GraphModule = make_fx(step)(ids, ids + 1)
    except Exception as error:  # whatever a model's own code makes of tensors whose values nobody knows
        raise ValueError(
            f"a step of {type(model).__name__} cannot be traced ({type(error).__name__}: {str(error)[:200]})"
        ) from None
    graph.graph.eliminate_dead_code()
    return graph


@dataclass
class Part:
    """Some operators of a slice: `module(*inputs)` gives `outputs`, both by the names of the graph's nodes."""

    module: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def run(self, values: dict[str, Tensor]) -> None:
        """Take the inputs from `values` and put the outputs there."""
        found = self.module.forward(*[values[name] for name in self.inputs])
        values.update(zip(self.outputs, found, strict=True))


@dataclass
class Slice:
    """What runs before one attention: `ask` makes the query, `give` key and value, `rest` whatever else is due; `carried` crosses the cut.

    The last slice has no attention: `ask` and `give` are empty and `rest` makes the logits.
    """

    ask: Part | None
    give: Part | None
    rest: Part | None
    query: str
    key: str
    value: str
    output: str  # of the attention
    layer: int
    scale: float
    carried: tuple[str, ...]
    carried_bytes: int
    done: tuple[str, ...]  # values that nobody needs after this slice

    @property
    def parts(self) -> list[Part]:
        return [part for part in (self.ask, self.give, self.rest) if part is not None]


@dataclass
class Sliced:
    """All slices of a step, the names of its inputs and of its logits."""

    slices: list[Slice]
    inputs: tuple[str, str]
    logits: str
    rows: int


def sliced(graph: fx.GraphModule, rows: int) -> Sliced:
    """Cut a graph of `trace` at its attentions; see the module.

    Raises ValueError for a graph without attention, and for attentions of which one does not follow from the other.
    """
    nodes = [node for node in graph.graph.nodes if node.op != "output"]
    (result,) = (node for node in graph.graph.nodes if node.op == "output")
    logits = result.args[0]
    inputs = [node for node in nodes if node.op == "placeholder"]
    attends = [node for node in nodes if node.target is torch.ops.assay_offloading.attend.default]
    if not attends:
        raise ValueError("the model has no attention that goes through transformers' AttentionInterface")
    fixed = _fixed(nodes)
    before, after = _ancestors(nodes, fixed), _descendants(nodes, fixed)
    for earlier, later in zip(attends, attends[1:], strict=False):
        if earlier not in before[later]:
            raise ValueError("attentions must follow from one another: the model has some side by side")
    done: set[fx.Node] = set()
    cuts: list[tuple[list[fx.Node], list[fx.Node]]] = []
    for node in attends:
        head, carried = cut(nodes, before[node] | done, after[node], fixed, node)
        piece = [other for other in nodes if other in head and other not in done and other not in attends]
        cuts.append((piece, carried))
        done = head | {node}
    cuts.append(([node for node in nodes if node not in done and node not in fixed], []))
    made = []
    for number, (piece, carried) in enumerate(cuts):
        attend = attends[number] if number < len(attends) else None
        later = {name for other, _ in cuts[number + 1 :] for node in other for name in _names(node, fixed)}
        later |= {name for node in attends[number + 1 :] for name in _names(node, fixed)} | {logits.name}
        made.append(_slice(graph, piece, attend, carried, later, fixed))
    alive: set[str] = {logits.name}
    for one in reversed(made):
        needed = {name for part in one.parts for name in part.inputs} | {one.query, one.key, one.value} - {""}
        own = {name for part in one.parts for name in part.outputs}
        one.done = tuple(sorted((needed | own) - alive))
        alive = (alive | needed) - own
    return Sliced(made, (inputs[0].name, inputs[1].name), logits.name, rows)


def _fixed(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Nodes that depend on no input: weights and views of them. They are where they are needed, and nothing carries them."""
    found: set[fx.Node] = set()
    for node in nodes:
        if node.op != "placeholder" and all(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _ancestors(nodes: Sequence[fx.Node], fixed: set[fx.Node]) -> dict[fx.Node, set[fx.Node]]:
    found: dict[fx.Node, set[fx.Node]] = {}
    wanted = [node for node in nodes if node not in fixed]
    masks: dict[fx.Node, int] = {}
    place = {node: i for i, node in enumerate(wanted)}
    for node in wanted:
        mask = 0
        for source in node.all_input_nodes:
            if source in place:
                mask |= masks[source] | 1 << place[source]
        masks[node] = mask
    for node in wanted:
        if node.target is torch.ops.assay_offloading.attend.default:
            found[node] = _of_mask(masks[node], wanted)
    return found


def _descendants(nodes: Sequence[fx.Node], fixed: set[fx.Node]) -> dict[fx.Node, set[fx.Node]]:
    found: dict[fx.Node, set[fx.Node]] = {}
    wanted = [node for node in nodes if node not in fixed]
    masks: dict[fx.Node, int] = {}
    place = {node: i for i, node in enumerate(wanted)}
    for node in reversed(wanted):
        mask = 0
        for user in node.users:
            if user in place:
                mask |= masks[user] | 1 << place[user]
        masks[node] = mask
        if node.target is torch.ops.assay_offloading.attend.default:
            found[node] = _of_mask(mask, wanted)
    return found


def _of_mask(mask: int, nodes: Sequence[fx.Node]) -> set[fx.Node]:
    return {node for i, node in enumerate(nodes) if mask >> i & 1}


def cut(
    nodes: Iterable[fx.Node], before: set[fx.Node], after: set[fx.Node], fixed: set[fx.Node], attend: fx.Node
) -> tuple[set[fx.Node], list[fx.Node]]:
    """The nodes that run before an attention, and those of them whose values are carried over it, the fewest bytes that can be.

    `before` must run earlier and `after` later; the others may do either, where they follow from what runs earlier. A value that several
    need is carried once; what only the attention needs goes to the memory devices and is not carried.
    """
    wanted = [node for node in nodes if node not in fixed and node is not attend]
    free = [node for node in wanted if node not in before and node not in after]
    if free:
        before = before | _cheapest(free, before, after)
    needed = {source for node in wanted if node not in before for source in node.all_input_nodes}
    return before, [node for node in wanted if node in before and node in needed]


def _cheapest(free: list[fx.Node], before: set[fx.Node], after: set[fx.Node]) -> set[fx.Node]:
    """Which of the free nodes run before the cut: a minimum cut between what must and what must not."""
    import networkx

    net, undecided = networkx.DiGraph(), set(free)
    net.add_nodes_from((SOURCE, SINK))
    for node in [*before, *free]:
        users = [user for user in node.users if user in undecided or user in after]
        if not users and node not in undecided:
            continue
        start, end = (node.name, "in"), (node.name, "out")
        net.add_edge(start, end, capacity=_size(node.meta.get("val")))
        if node not in undecided:
            net.add_edge(SOURCE, start)  # no capacity: as much as there is
        for user in users:
            net.add_edge(end, SINK if user in after else (user.name, "in"))
        for source in node.all_input_nodes if node in undecided else ():
            if source in undecided:
                net.add_edge(start, (source.name, "in"))  # what runs before has its inputs before
    _, (early, _) = networkx.minimum_cut(net, SOURCE, SINK)
    return {node for node in free if (node.name, "in") in early}


def _size(value: Any) -> int:
    """Bytes of a node's value; of all of them where there are several."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(_size, value)) if isinstance(value, tuple | list) else 0


def _names(node: fx.Node, fixed: set[fx.Node]) -> list[str]:
    return [source.name for source in node.all_input_nodes if source not in fixed]


def _slice(
    graph: fx.GraphModule,
    piece: list[fx.Node],
    attend: fx.Node | None,
    carried: list[fx.Node],
    later: set[str],
    fixed: set[fx.Node],
) -> Slice:
    """A slice of these nodes; `later` are the names that slices behind it need."""
    own = set(piece)
    if attend is None:
        rest = _part(graph, piece, later, fixed)
        return Slice(None, None, rest, "", "", "", "", -1, 1.0, (), 0, ())
    query, key, value, layer, scale = attend.args
    assert isinstance(query, fx.Node)
    assert isinstance(key, fx.Node)
    assert isinstance(value, fx.Node)
    first = _needed([query], own)
    second = _needed([key, value], own) - first
    groups = [[node for node in piece if node in chosen] for chosen in (first, second, own - first - second)]
    sent = ({query.name}, {key.name, value.name}, set[str]())
    parts = []
    for number, group in enumerate(groups):
        wanted = (
            later | sent[number] | {name for other in groups[number + 1 :] for n in other for name in _names(n, fixed)}
        )
        wanted |= set().union(*sent[number + 1 :])
        parts.append(_part(graph, group, wanted, fixed))
    names = tuple(node.name for node in carried)
    size = sum(_size(node.meta.get("val")) for node in carried)
    assert isinstance(layer, int)
    assert isinstance(scale, float)
    ask, give, rest = parts
    return Slice(ask, give, rest, query.name, key.name, value.name, attend.name, layer, scale, names, size, ())


def _needed(wanted: Sequence[fx.Node], own: set[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    todo = [node for node in wanted if node in own]
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += [source for source in node.all_input_nodes if source in own]
    return found


def _part(graph: fx.GraphModule, nodes: list[fx.Node], wanted: set[str], fixed: set[fx.Node]) -> Part | None:
    """The nodes as a module of their own; None for none. Placeholders of the whole graph are nobody's work."""
    nodes = [node for node in nodes if node.op != "placeholder"]
    if not nodes:
        return None
    own, made, copies = set(nodes), fx.Graph(), dict[fx.Node, fx.Node]()
    given = list(dict.fromkeys(s for node in nodes for s in node.all_input_nodes if s not in own and s not in fixed))
    for source in given:
        copies[source] = made.placeholder(source.name)

    def copied(source: fx.Node) -> fx.Node:
        if source not in copies:
            assert source in fixed
            copies[source] = made.node_copy(source, copied)
        return copies[source]

    for node in nodes:
        copies[node] = made.node_copy(node, copied)
    outputs = [node for node in nodes if node.name in wanted]
    made.output(tuple(copies[node] for node in outputs))
    module = fx.GraphModule(graph, made)
    return Part(module, tuple(node.name for node in given), tuple(node.name for node in outputs))

"""What a computation costs on paper: parameters, multiply-accumulates (MACs) and bytes, module by module.

The computation is run once and every operator torch dispatches is counted, so this works for any model and any function. All
figures here are modelled, not measured. 1 MAC = 2 FLOPs. Bytes: each operator reads every input tensor and writes every output
tensor once; views cost nothing, and look-ups (embedding, indexing) read only what they fetch. This is the traffic without caches
and without fusion: a compiled or tiled execution moves less.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from assay.measure.modules import module_names, watch_modules

Kind = Literal["linear", "attention", "other"]
KINDS: tuple[Kind, ...] = ("linear", "attention", "other")
FUNCTION = "(function)"  # the name of work done outside any module


@dataclass
class ModuleCost:
    """What a module did itself, excluding the modules inside it, over all its calls.

    `kind`: "attention" for attention kernels and for a module's own work if its name says attention, "linear" for matrix products
    and convolutions, "other" for the rest. `params` counts a shared tensor once, at its first module; `weight_bytes` are its own
    parameters and buffers, likewise counted once. `dtype` is what most of its MACs are done in (without MACs: what it writes), or
    "" if it did nothing.
    """

    name: str
    kind: Kind = "other"
    calls: int = 0
    params: int = 0
    macs: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    weight_bytes: int = 0
    dtype: str = ""

    @property
    def bytes(self) -> int:
        """Bytes read and written."""
        return self.bytes_read + self.bytes_written

    @property
    def flops(self) -> int:
        """Floating point operations of the MACs: two each."""
        return 2 * self.macs


@dataclass
class Cost:
    """The cost of one run. `uncounted` names operators outside torch whose MACs nobody registered (see `register_macs`)."""

    modules: list[ModuleCost]
    uncounted: list[str] = field(default_factory=list)

    def total(self, kind: Kind | None = None) -> ModuleCost:
        """The sum over all modules, or over those of one kind."""
        found = ModuleCost(kind or "total", kind or "other")
        for module in self.modules:
            if kind in (None, module.kind):
                for name in ("calls", "params", "macs", "bytes_read", "bytes_written", "weight_bytes"):
                    setattr(found, name, getattr(found, name) + getattr(module, name))
        return found

    @property
    def params(self) -> int:
        """Parameters of the model, each counted once."""
        return self.total().params

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the run."""
        return self.total().macs

    @property
    def flops(self) -> int:
        """Two per MAC."""
        return self.total().flops

    @property
    def bytes(self) -> int:
        """Bytes read and written."""
        return self.total().bytes

    @property
    def weight_bytes(self) -> int:
        """Bytes of parameters and buffers."""
        return self.total().weight_bytes


Macs = Callable[..., int]
_MACS: dict[str, tuple[Macs, Kind, str]] = {}


def register_macs(op_name: str, function: Macs, kind: Kind = "linear", dtype: str = "") -> None:
    """Tell the counter what a custom operator ("namespace::name") does.

    `function` gets the operator's own arguments and its result as `out=`, and returns MACs. `dtype` names the arithmetic it does
    ("int8"); "" means that of its first tensor. Registering again replaces the entry.
    Raises ValueError for a name without "::" or an unknown kind.
    """
    if op_name.count("::") != 1:
        raise ValueError(f"op_name must look like 'namespace::name', got {op_name!r}")
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    _MACS[op_name] = (function, kind, dtype)


def count_cost(model_or_callable: nn.Module | Callable[..., Any], *args: Any, **kwargs: Any) -> Cost:
    """Run a model (without gradients) or a function once and count its parameters, MACs and bytes by module.

    A module that runs twice counts twice in MACs and bytes and once in parameters; one that does not run is listed with
    calls = 0 if it has parameters. Modules are named by their path in the model; those that a plain function calls, by their class.
    Attention with `is_causal` counts half of the full score matrix; with a mask tensor it counts all of it, as the kernels do.
    Compiled functions run uncompiled here. Of a custom operator, only its registered MACs, its inputs and its outputs count.

    Returns a `Cost`. Errors of the model pass through. Does not measure time or peak memory.

    >>> import torch
    >>> found = count_cost(torch.nn.Linear(64, 32), torch.zeros(10, 64))
    >>> found.macs, found.params  # 10 tokens, 64 x 32 weights and 32 biases
    (20480, 2080)
    """
    run = getattr(model_or_callable, "_orig_mod", model_or_callable)  # what torch.compile wrapped
    root = run if isinstance(run, nn.Module) else None
    with torch.no_grad() if root is not None else contextlib.nullcontext(), counting(root) as counter:
        run(*args, **kwargs)
    return counter.cost()


@contextlib.contextmanager
def counting(root: nn.Module | None = None) -> Iterator[Counter]:
    """Count what runs inside the `with` block; `counter.cost()` gives the result. Modules are named by their path in `root`."""
    counter = Counter(root)
    with contextlib.ExitStack() as stack:
        stack.enter_context(uncompiled())
        stack.enter_context(_plain_attention_modules())
        stack.enter_context(watch_modules(counter.enter, counter.leave))
        stack.enter_context(counter)
        yield counter


def uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Run compiled functions as they were written, so that their modules and operators are visible."""
    if "torch._dynamo" in sys.modules:  # else nothing can be compiled, and importing it takes seconds
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()


@contextlib.contextmanager
def _plain_attention_modules() -> Iterator[None]:
    """Run nn.MultiheadAttention and nn.TransformerEncoderLayer as ordinary operators instead of one fused operator."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class Counter(TorchDispatchMode):
    """Sees every operator and books it on the innermost running module; made by `counting`."""

    def __init__(self, root: nn.Module | None) -> None:
        super().__init__()
        self._names = module_names(root)
        self._root = root
        self._rows: dict[Any, ModuleCost] = {}
        self._stack: list[ModuleCost] = []
        self._seen: set[int] = set()  # parameters and buffers already counted
        self._uncounted: set[str] = set()
        self._most: dict[int, int] = {}  # of each row: the MACs of its largest operator

    def enter(self, module: nn.Module) -> None:
        """A module's forward starts."""
        row = self._row(module)
        row.calls += 1
        self._stack.append(row)

    def leave(self, module: nn.Module) -> None:
        """A module's forward has ended."""
        self._stack.pop()

    def cost(self) -> Cost:
        """What was counted so far."""
        if self._root is not None:  # what did not run still has its parameters
            for module in self._root.modules():
                if any(True for _ in module.parameters(recurse=False)):
                    self._row(module)
        rows = [row for row in self._rows.values() if row.calls or row.params]
        return Cost(rows, sorted(self._uncounted))

    def _row(self, module: nn.Module | None) -> ModuleCost:
        if module is None:
            return self._rows.setdefault(None, ModuleCost(FUNCTION, calls=1))
        row = self._rows.get(id(module))
        if row is None:
            name = self._names.get(id(module), type(module).__name__)
            row = self._rows[id(module)] = ModuleCost(name, "attention" if _is_attention(module) else "other")
            for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
                if id(tensor) not in self._seen:
                    self._seen.add(id(tensor))
                    row.weight_bytes += _bytes(tensor)
                    row.params += tensor.numel() if isinstance(tensor, nn.Parameter) else 0
        return row

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name not in _MACS:
            # composite operators arrive whole in inference mode: look inside, as without it
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        row = self._stack[-1] if self._stack else self._row(None)
        read, written = _traffic(func, args, kwargs, out)
        row.bytes_read += read
        row.bytes_written += written
        macs, kind, dtype = self._macs(func, args, kwargs, out)
        row.macs += macs
        if macs > self._most.get(id(row), -1) and written:
            self._most[id(row)] = macs
            row.dtype = dtype or _dtype_name((args, kwargs) if macs else out)
        if kind == "attention" or (kind == "linear" and row.kind == "other"):
            row.kind = kind
        return out

    def _macs(self, func: Any, args: Any, kwargs: Any, out: Any) -> tuple[int, Kind, str]:
        name = func._schema.name
        if name in _MACS:
            function, kind, dtype = _MACS[name]
            return int(function(*args, **kwargs, out=out)), kind, dtype
        if func._overloadpacket in flop_registry:
            macs = flop_registry[func._overloadpacket](*args, **kwargs, out_val=out) // 2
            if "attention" not in name:
                return macs, "linear", ""
            causal = _arguments(func, args, kwargs).get("is_causal", False)
            return macs // 2 if causal else macs, "attention", ""
        if func.namespace not in ("aten", "prim", "prims"):
            self._uncounted.add(name)
        return 0, "other", ""


def _is_attention(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return "attention" in name or name.endswith("attn")


def _dtype_name(values: Any) -> str:
    """Of the first tensor in there."""
    return next((str(t.dtype).removeprefix("torch.") for t in tree_iter(values) if isinstance(t, torch.Tensor)), "")


def _linear(x: torch.Tensor, *args: Any, out: torch.Tensor, **kwargs: Any) -> int:
    """x (..., k) times a matrix to out (..., n): every element of x is multiplied with n columns, however the matrix is packed."""
    return x.numel() * out.shape[-1]


def _added(bias: torch.Tensor, x: torch.Tensor, *args: Any, out: torch.Tensor, **kwargs: Any) -> int:
    return x.numel() * out.shape[-1]


def _elements(x: torch.Tensor, *args: Any, out: torch.Tensor, **kwargs: Any) -> int:
    return x.numel()


def _added_elements(bias: torch.Tensor, x: torch.Tensor, *args: Any, out: torch.Tensor, **kwargs: Any) -> int:
    return x.numel()


def attention_macs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool = False) -> int:
    """MACs of q (..., N, d) against k (..., M, d), and of the weights against v (..., M, e): heads N M (d + e), half if causal.

    The heads are those of q: grouped-query attention shares keys, not arithmetic.
    """
    heads = q.numel() // (q.shape[-2] * q.shape[-1])
    macs = heads * q.shape[-2] * k.shape[-2] * (q.shape[-1] + v.shape[-1])
    return macs // 2 if causal else macs


def _cpu_flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout_p: float = 0.0, is_causal: bool = False, **rest: Any
) -> int:
    return attention_macs(q, k, v, causal=is_causal)


for _name in (
    "aten::_int_mm",
    "aten::_weight_int8pack_mm",
    "aten::_weight_int4pack_mm",
    "aten::_weight_int4pack_mm_for_cpu",
    "aten::_dyn_quant_matmul_4bit",
    "aten::mkldnn_linear",
    "mkldnn::_linear_pointwise",
    "onednn::qlinear_pointwise",
    "quantized::linear",
    "quantized::linear_dynamic",
    "quantized::linear_relu",
    "quantized::linear_relu_dynamic",
):
    register_macs(_name, _linear)
register_macs("aten::_grouped_mm", _linear)
register_macs("aten::mv", _elements)
register_macs("aten::dot", _elements)
register_macs("aten::addmv", _added_elements)
register_macs("aten::addbmm", _added)
register_macs("aten::_scaled_dot_product_flash_attention_for_cpu", _cpu_flash, "attention")

# read only what they fetch: everything but the table (first argument), and as much of the table as they give out
_LOOKUPS = {"aten::embedding", "aten::index_select", "aten::index", "aten::gather", "aten::take"}
# write into their first argument without reading it: a copy of as much as they are given
_PLACES = {"aten::copy_", "aten::index_copy_", "aten::index_put_", "aten::scatter_", "aten::masked_scatter_"}
_FILLS = {"aten::fill_", "aten::zero_", "aten::uniform_", "aten::normal_"}
_NOTHING = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"}


def _traffic(func: Any, args: Any, kwargs: Any, out: Any) -> tuple[int, int]:
    """(bytes read, bytes written) of one operator."""
    name = func._schema.name
    inputs = list({id(t): t for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}.values())
    outputs = list({id(t): t for t in tree_iter(out) if isinstance(t, torch.Tensor)}.values())
    if name in _NOTHING or func.is_view:
        return 0, 0
    if name in _LOOKUPS:
        fetched = sum(map(_bytes, outputs))
        return fetched + sum(map(_bytes, inputs[1:])), fetched
    if name in _PLACES:
        given = inputs[1:]
        return sum(map(_bytes, given)), min(max(map(_bytes, given), default=0), _bytes(inputs[0]))
    if name in _FILLS:
        return 0, _bytes(inputs[0])
    if not func._schema.is_mutable:
        known = {_storage(t) for t in inputs}
        if outputs and all(_storage(t) in known for t in outputs):
            return 0, 0  # a view by another name
    return sum(map(_bytes, inputs)), sum(map(_bytes, outputs))


def _bytes(tensor: torch.Tensor) -> int:
    """Bytes of the elements; an expanded tensor counts only those of its storage."""
    size = tensor.numel() * tensor.element_size()
    try:
        return min(size, tensor.untyped_storage().nbytes())
    except (RuntimeError, NotImplementedError):  # sparse and other tensors without plain storage
        return size


def _storage(tensor: torch.Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):
        return id(tensor)


def _arguments(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments by name."""
    names = [argument.name for argument in func._schema.arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}

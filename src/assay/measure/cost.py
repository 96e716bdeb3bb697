"""What a computation costs on paper: parameters, multiply-accumulates (MACs) and bytes, module by module.

The computation is run once and every operator torch dispatches is counted, so this works for any model and any function. All
figures here are modelled, not measured. 1 MAC = 2 FLOPs. Bytes: each operator reads every input tensor and writes every output
tensor once; views cost nothing, and look-ups (embedding, indexing) read only what they fetch. This is the traffic without caches
and without fusion: a compiled or tiled execution moves less.

What counts as a MAC, and what is said of the rest:

- A product that is added to others (or to what was there) is one, in whatever operator: matrix products, convolutions, attention,
  recurrent layers, bilinear forms, distances. A complex one is four. With a sparse operand those of its stored values alone.
- An outer product is a matrix product over one term and counts as such, also where it is written as the multiplication of a column
  by a row.
- Other element-wise work, reductions, norms, softmax, pooling, resampling and copies have none: they do a fixed few operations an
  element, and memory is what they take.
- Whatever else computes with floating-point numbers and has no rule here (Fourier transforms, decompositions, the product of two
  sparse matrices, custom operators nobody registered) is listed in `Cost.uncounted`: the MACs of its module are too low.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections import Counter as Tally
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
    """The cost of one run. `uncounted` has the calls of each operator whose MACs are not in it (see the module and `register_macs`)."""

    modules: list[ModuleCost]
    uncounted: dict[str, int] = field(default_factory=dict)

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
    Compiled functions run uncompiled here. Of a custom operator, only its registered MACs, its inputs and its outputs count. Operators
    whose MACs are unknown are in `uncounted`, with their calls.

    Returns a `Cost`. Errors of the model pass through. Does not measure time or peak memory.

    >>> import torch
    >>> found = count_cost(torch.nn.Linear(64, 32), torch.zeros(10, 64))
    >>> found.macs, found.params  # 10 tokens, 64 x 32 weights and 32 biases
    (20480, 2080)
    >>> count_cost(torch.fft.rfft, torch.zeros(64)).uncounted
    {'aten::_fft_r2c': 1}
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
        self._uncounted: Tally[str] = Tally()
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
        return Cost(rows, dict(sorted(self._uncounted.items())))

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
        name, found = _in_place_alike(func), None
        kind: Kind = "linear"
        dtype = ""
        sparse = [t for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor) and t.layout in _SPARSE]
        if sparse and func.namespace == "aten":
            found = _sparse_macs(name, args)
        elif name in _MACS:
            function, kind, dtype = _MACS[name]
            found = int(function(*args, **kwargs, out=out))
        elif (packet := getattr(getattr(torch.ops, func.namespace), name.split("::")[1], None)) in flop_registry:
            found = flop_registry[packet](*args, **kwargs, out_val=out) // 2
            if "attention" in name:
                kind = "attention"
                found = found // 2 if _arguments(func, args, kwargs).get("is_causal", False) else found
        elif name == "aten::mul" and len(args) == 2 and _is_outer(args[0], args[1], out):
            return out.numel() * (4 if out.is_complex() else 1), "other", ""
        if found is None:
            if _multiplies(func, args, kwargs, out):
                self._uncounted[name] += 1
            return 0, "other", ""
        if func.namespace == "aten" and any(isinstance(t, torch.Tensor) and t.is_complex() for t in tree_iter(out)):
            found *= 4
        return found, kind, dtype


def _in_place_alike(func: Any) -> str:
    """The operator's name; that of `addmm_` is `addmm`, which does the same."""
    name = str(func._schema.name)
    return name.removesuffix("_") if func.namespace == "aten" and not name.endswith("__") else name


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


def _cpu_flash_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, out: Any, **rest: Any
) -> int:
    """Five products: the scores again, and the gradients of weights, values, queries and keys. `args`: out, logsumexp, dropout, causal."""
    rows = q.numel() // q.shape[-1]
    macs = rows * k.shape[-2] * (3 * q.shape[-1] + 2 * v.shape[-1])
    return macs // 2 if args[3] else macs


def _mkldnn_rnn(
    x: torch.Tensor, w_input: torch.Tensor, w_hidden: torch.Tensor, *args: Any, out: Any, **kwargs: Any
) -> int:
    """One layer and direction over x (steps, batch, inputs): every token goes through both matrices."""
    return x.numel() // x.shape[-1] * (w_input.numel() + w_hidden.numel())


def _cudnn_rnn(x: torch.Tensor, weights: list[torch.Tensor], *args: Any, out: Any, **kwargs: Any) -> int:
    """All layers and directions; biases are vectors."""
    return x.numel() // x.shape[-1] * sum(w.numel() for w in weights if w.dim() == 2)


def _trilinear(
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    expand_a: list[int],
    expand_b: list[int],
    expand_c: list[int],
    *args: Any,
    **kw: Any,
) -> int:
    """sum over a b c, each with dimensions put in: for a bilinear layer N x outputs x inputs x inputs, one MAC a weight."""
    wide = []
    for tensor, places in ((a, expand_a), (b, expand_b), (c, expand_c)):
        for place in sorted(places):
            tensor = tensor.unsqueeze(place)
        wide.append(tensor.shape)
    return torch.broadcast_shapes(*wide).numel()


def _distances(x: torch.Tensor, *args: Any, out: torch.Tensor, **kwargs: Any) -> int:
    """One for each difference of two coordinates that is added up, whatever the norm."""
    return out.numel() * x.shape[-1]


def _conv_tbc(x: torch.Tensor, weight: torch.Tensor, *args: Any, out: torch.Tensor, **kwargs: Any) -> int:
    return out.numel() * weight.shape[0] * weight.shape[1]


def _outer(*args: Any, out: torch.Tensor, **kwargs: Any) -> int:
    return out.numel()


def _embedding_bag(
    table: torch.Tensor,
    indices: torch.Tensor,
    offsets: torch.Tensor,
    scale_grad: bool = False,
    mode: int = 0,
    sparse: bool = False,
    weights: torch.Tensor | None = None,
    *args: Any,
    out: Any,
    per_sample_weights: torch.Tensor | None = None,
    **kwargs: Any,
) -> int:
    """Rows that are only added up are a reduction; rows with weights are multiplied by them."""
    return indices.numel() * table.shape[1] if weights is not None or per_sample_weights is not None else 0


for _name in (
    "aten::_int_mm",
    "aten::_weight_int8pack_mm",
    "aten::_weight_int4pack_mm",
    "aten::_weight_int4pack_mm_for_cpu",
    "aten::_weight_int4pack_mm_with_scales_and_zeros",
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
for _name in ("_grouped_mm", "_scaled_grouped_mm", "_scaled_grouped_mm_v2", "_scaled_mm_v2", "_mixed_dtypes_linear"):
    register_macs(f"aten::{_name}", _linear)
register_macs("aten::_addmm_activation", _added)
register_macs("aten::mv", _elements)
register_macs("aten::dot", _elements)
register_macs("aten::addmv", _added_elements)
register_macs("aten::addbmm", _added)
register_macs("aten::vdot", _elements)
register_macs("aten::addr", _outer)
register_macs("aten::_trilinear", _trilinear)
register_macs("aten::conv_tbc", _conv_tbc)
for _name in ("_cdist_forward", "_euclidean_dist", "_pdist_forward"):
    register_macs(f"aten::{_name}", _distances)
for _name in ("_embedding_bag", "_embedding_bag_forward_only"):
    register_macs(f"aten::{_name}", _embedding_bag, "other")
register_macs("aten::mkldnn_rnn_layer", _mkldnn_rnn)
for _name in ("_cudnn_rnn", "miopen_rnn"):
    register_macs(f"aten::{_name}", _cudnn_rnn)
register_macs("aten::_scaled_dot_product_flash_attention_for_cpu", _cpu_flash, "attention")
register_macs("aten::_scaled_dot_product_flash_attention_for_cpu_backward", _cpu_flash_backward, "attention")

_SPARSE = {torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc}
_FACTORS = {  # the places of the two factors of each product that takes sparse matrices
    "aten::mm": (0, 1),
    "aten::bmm": (0, 1),
    "aten::mv": (0, 1),
    "aten::_sparse_mm": (0, 1),
    "aten::addmm": (1, 2),
    "aten::addmv": (1, 2),
    "aten::baddbmm": (1, 2),
    "aten::_sparse_addmm": (1, 2),
}


def _sparse_macs(name: str, args: Any) -> int | None:
    """Stored values x what each is multiplied with; None if that depends on where the values lie, or for no product at all."""
    if name == "aten::sparse_sampled_addmm":  # the entries of a dense product where the first argument has any
        return _values(args[0]).numel() * int(args[1].shape[-1])
    if name not in _FACTORS:
        return None
    one, other = (args[place] for place in _FACTORS[name])
    if one.layout in _SPARSE and other.layout in _SPARSE:
        return None
    if one.layout in _SPARSE:
        return _values(one).numel() * (1 if other.dim() == 1 else int(other.shape[-1]))
    if other.layout in _SPARSE:
        return _values(other).numel() * int(one.shape[-2])
    return None


def _values(tensor: torch.Tensor) -> torch.Tensor:
    """What a sparse tensor stores."""
    return tensor._values() if tensor.layout == torch.sparse_coo else tensor.values()


def _is_outer(one: Any, other: Any, out: torch.Tensor) -> bool:
    """Whether columns (..., n, 1) are multiplied by rows (..., 1, m)."""
    if not (isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and _numbers(out) and out.dim() > 1):
        return False
    (n, a), (b, m) = ((1, 1, *t.shape)[-2:] for t in (one, other))
    return (a == 1 < m and b == 1 < n) or (n == 1 < b and m == 1 < a)


# operators without products that are added up, as far as torch's own tags do not say so; without leading underscores
_PLAIN = re.compile(
    # moving, making and converting
    r"as_strided|block_diag|cat$|channel_shuffle|chunk|clone|coalesce|col2im|complex$|conj|constant_pad|copy|dense_dim|detach|diag"
    r"|embedding(?!_bag)|empty|expand|fill|flip|full|gather|im2col|index|jagged_|lazy_clone|lift|linspace|logspace|masked_(?!softmax)"
    r"|mkldnn_(reshape|transpose|reorder)|nested_|new_|ones|pack_padded|pad_|padded_|pin_memory|pixel_|polar|put$|rand|real$"
    r"|reflection_pad|repeat|replication_pad|reshape|resize|resolve_|roll$|rot90|scalar_tensor|scatter|select|set$|slice"
    r"|sparse_(compressed|coo|csr|csc|bsr|bsc)_tensor|sparse_(mask|resize|dim)|split|squeeze|stack|t$|take|to_|transpose$|tril$|triu$"
    r"|unbind|unfold|unsafe_|unsqueeze|view|where|zero"
    # random numbers and quantization
    r"|bernoulli|binomial|cauchy|convert_|cudnn_rnn_flatten|dequantize|dirichlet|dyn_quant_pack|exponential|fake_quantize|fused_dropout|fused_moving_avg|geometric|int_repr|lu_unpack"
    r"|log_normal|make_per_|multinomial|native_dropout|normal|philox|poisson|q_|quantize_per|rrelu|sample_dirichlet|standard_gamma|uniform"
    # reductions, scans, sorting and searching
    r"|all$|allclose|aminmax|any$|assert|bincount|bucketize|cum(max|min|prod|sum)|dist$|equal|functional_|hash_tensor|hist|is_|item|kthvalue"
    r"|linalg_check_errors|local_scalar|logcumsum|max|median|min|mode$|nanmedian|nnz|nonzero|norm$|searchsorted|segment_reduce|sort"
    r"|sparse_(csr_)?(sum|prod)|sum|topk|trace|unique"
    # norms, activations, losses, pooling and resampling
    r"|(cudnn_|fused_|miopen_|native_|quantized_)?(batch|group|layer|rms|weight)_norm|native_norm|renorm"
    r"|(masked_|safe_|sparse_)?(log_)?softmax|(add_|leaky_)?[a-z]*elu|glu|hard|log_sigmoid|mish|softplus|softshrink|threshold"
    r"|(cudnn_|miopen_|use_)*ctc_loss|binary_cross|huber|mse|multi_margin|multilabel|nll|smooth_l1|soft_margin"
    r"|(adaptive_|fractional_|mkldnn_|quantized_)*(avg|max)_(un)?pool|(cudnn_)?affine_grid|(cudnn_)?grid_sampler|upsample"
    # a cross product has two products an element; optimizers; the gates of recurrent cells
    r"|linalg_cross|amp_|foreach_(?!mm)|fused_(ada|sgd)|thnn_fused"
    # element-wise work that torch does not tag, mostly because it is done in place
    r"|(abs|eq|floor_divide|gcd|ge|gt|heaviside|isin|lcm|le|lt|ne|range|rsub|xlogy)$|transform_bias"
)


def _multiplies(func: Any, args: Any, kwargs: Any, out: Any) -> bool:
    """Whether an operator without a rule may do MACs: floating-point in and out, and nothing says that it does none.

    It does none if torch tags it as element-wise, as a reduction or as a copy of a view, or if it is one of `_PLAIN`. Outside torch
    every operator may do them.
    """
    if func.namespace not in ("aten", "prim", "prims"):
        return True
    if func.is_view or func.namespace != "aten" or not (_numbers((args, kwargs)) and _numbers(out)):
        return False
    if {torch.Tag.pointwise, torch.Tag.reduction, torch.Tag.view_copy} & set(func.tags):
        return False
    return _PLAIN.match(func._schema.name.removeprefix("aten::").strip("_")) is None


def _numbers(values: Any) -> bool:
    return any(isinstance(t, torch.Tensor) and (t.is_floating_point() or t.is_complex()) for t in tree_iter(values))


# read only what they fetch: everything but the table (first argument), and as much of the table as they give out
_LOOKUPS = {"aten::embedding", "aten::index_select", "aten::index", "aten::gather", "aten::take"}
_BAGS = {"aten::_embedding_bag", "aten::_embedding_bag_forward_only"}
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
    if name in _BAGS:  # (rows, what is kept for the gradient): fetches a row for each index
        fetched = args[1].numel() * args[0].shape[1] * args[0].element_size()
        return fetched + sum(map(_bytes, inputs[1:])), sum(map(_bytes, outputs))
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
    """Bytes of the elements; an expanded tensor counts only those of its storage, a sparse one its values and where they lie."""
    if tensor.layout in _SPARSE:
        return sum(map(_bytes, _parts(tensor)))
    size = tensor.numel() * tensor.element_size()
    try:
        return min(size, tensor.untyped_storage().nbytes())
    except (RuntimeError, NotImplementedError):  # tensors without plain storage
        return size


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors a sparse tensor is stored as."""
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]


def _storage(tensor: torch.Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):
        return id(tensor)


def _arguments(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments by name."""
    names = [argument.name for argument in func._schema.arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}

"""Taking a model apart: find layers by name, replace them, merge them back, and say exactly what each costs.

A layer is a module whose exact type is listed: subclasses often bypass their own forward (`nn.MultiheadAttention` reads the
weights of its output layer), so they are left alone, and so is what a model reads instead of calling it (`bypassed`).
Cost is parameters (a tensor shared by several layers counts once) and
MACs per token (1 MAC = 2 FLOPs; per output position for convolutions) of linear layers and convolutions.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

MADV_PAGEOUT = 21  # Linux 5.4 and newer; refused, and then without effect, on older ones
CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class LayerCost:
    """Parameters, and MACs per token."""

    params: int
    macs: int


def linear_kinds() -> tuple[type[nn.Module], ...]:
    """The layers that multiply by a matrix: `nn.Linear` and transformers' transposed `Conv1D` (GPT-2)."""
    from transformers.pytorch_utils import Conv1D

    return (nn.Linear, Conv1D)


def bypassed(model: nn.Module) -> set[nn.Module]:
    """Layers whose weight the model multiplies by itself, never calling them: `dt_proj` of Mamba and its relatives."""
    mixers = (module for module in model.modules() if type(module).__name__.endswith("MambaMixer"))
    return {child for mixer in mixers for name, child in mixer.named_children() if name == "dt_proj"}


def takes_token_ids(model: nn.Module) -> bool:
    """Whether a forward pass takes token ids and needs nothing beside them, as calibration wants it.

    False for transformers' models of pictures and sounds, and for encoder-decoders; True for what is none of transformers'.
    """
    decoder_too = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return getattr(model, "main_input_name", "input_ids") == "input_ids" and not decoder_too


def find(
    model: nn.Module,
    kinds: Sequence[type[nn.Module]],
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    closed: Sequence[type[nn.Module]] = (),
) -> dict[str, nn.Module]:
    """Layers whose exact type is in `kinds`, by name; a layer registered under several names is listed once, under the first.

    `include` and `exclude` are patterns over the full dotted name with * and ? ("*.mlp.*"). Modules of a type in `closed` are
    not searched. The model itself is never among the results, nor is what is `bypassed`.
    Raises ValueError for a pattern in `include` that matches no module at all, most likely a typing error.
    """
    names = [name for name, _ in model.named_modules() if name]
    for pattern in include:
        if pattern != "*" and not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"include has {pattern!r}, which matches no module of {type(model).__name__}")
    found: dict[str, nn.Module] = {}
    shut: list[str] = []
    read = bypassed(model)
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in shut):
            continue
        if type(module) in closed:
            shut.append(f"{name}." if name else "")
        wanted = any(fnmatchcase(name, p) for p in include) and not any(fnmatchcase(name, p) for p in exclude)
        if name and wanted and type(module) in kinds and module not in read:
            found[name] = module
    return found


def swap(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Put each of `modules` in the place its name says and return the old ones; swapping those back undoes it.

    A layer registered under several names is replaced under all of them. Training mode is carried over.
    Raises ValueError for a name that is not in the model, before anything is changed.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    >>> old = swap(model, {"1": nn.GELU()})
    >>> model[1], old
    (GELU(approximate='none'), {'1': ReLU()})
    """
    known = dict(model.named_modules(remove_duplicate=False))
    if missing := [name for name in modules if not name or name not in known]:
        raise ValueError(f"model has no layer named {missing[0]!r} that could be replaced")
    old = {name: known[name] for name in modules}
    by_identity = {id(old[name]): new for name, new in modules.items()}
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is not None and id(child) in by_identity:
                parent._modules[key] = by_identity[id(child)].train(child.training)
    return old


def merge(model: nn.Module) -> dict[str, nn.Module]:
    """Replace every layer that has a `merged()` method by the plain layer it returns; gives back what was there (see `swap`)."""
    units: dict[str, Any] = {
        name: module for name, module in model.named_modules() if name and hasattr(module, "merged")
    }
    return swap(model, {name: module.merged() for name, module in units.items()})


def tied_names(model: nn.Module, parameter: Tensor) -> list[str]:
    """Every name under which this very parameter is registered; more than one means that weights are tied."""
    return [name for name, other in model.named_parameters(remove_duplicate=False) if other is parameter]


def output_layer(model: nn.Module) -> nn.Module | None:
    """The layer that projects onto the vocabulary: `get_output_embeddings()`, or "lm_head" if a model has no such method, or None."""
    getter = getattr(model, "get_output_embeddings", None)
    found = getattr(model, "lm_head", None) if getter is None else getter()
    return found if isinstance(found, nn.Module) else None


def output_name(model: nn.Module) -> str | None:
    """The first name of the `output_layer`, or None."""
    layer = output_layer(model)
    return (
        next((name for name, module in model.named_modules() if module is layer), None) if layer is not None else None
    )


def untie(model: nn.Module) -> None:
    """Update a transformers model's list of tied weights, so that weights that were taken apart are not tied again.

    Ties that still hold are kept, and ties among the tensors of the new layers are added, which lets
    `save_pretrained` write such tensors once. Does nothing for models that do not know tying.
    """
    root: Any = model
    ties = getattr(model, "all_tied_weights_keys", None)
    if not hasattr(model, "config") or not isinstance(ties, dict):
        return
    first: dict[int, str] = {}
    same: dict[str, str] = {}
    tensors = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in tensors.items():
        if (kept := first.setdefault(id(tensor), name)) != name:
            same[name] = kept
    root.all_tied_weights_keys = same
    table, head = getattr(model, "get_input_embeddings", lambda: None)(), output_layer(model)
    if head is not None and getattr(table, "weight", None) is not getattr(head, "weight", table):
        root.config.tie_word_embeddings = False


def layer_macs(module: nn.Module) -> int:
    """MACs per token of this one layer: matrix entries for linear layers, kernel entries for convolutions, else 0."""
    if type(module) in linear_kinds() or isinstance(module, nn.Linear) or type(module) in CONVOLUTIONS:
        return math.prod(module.weight.shape)  # type: ignore[arg-type]
    return 0


def cost(module: nn.Module) -> LayerCost:
    """Parameters (shared tensors once) and MACs per token of a layer or a whole model, including everything below it.

    >>> cost(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)))
    LayerCost(params=46, macs=40)
    """
    params = sum(parameter.numel() for parameter in module.parameters())
    return LayerCost(params, sum(layer_macs(layer) for layer in module.modules()))


def refuse_saving(model: nn.Module) -> nn.Module:
    """Make the model's `save_pretrained` raise ValueError: its layers are packed, and `from_pretrained` knows no packed weights.

    It would find no place for them and draw new ones, with no more than a warning. Models without `save_pretrained` stay as they are.
    """
    if hasattr(model, "save_pretrained"):
        object.__setattr__(model, "save_pretrained", _refuse_saving)
    return model


def _refuse_saving(*_: Any, **__: Any) -> None:
    raise ValueError(
        "model must not be saved with packed layers, which from_pretrained would replace by random ones: save it before, and "
        "apply the method again after loading, as an artefact of `assay tune` does"
    )


def page_out(weight: Tensor) -> None:
    """Tell Linux that a CPU weight will not be read again soon, usually because a packed form replaced it.

    Weights loaded from safetensors are pages of the file; once read, they count as the process's memory until somebody else needs
    the room. This evicts them at once. The numbers stay readable (from the file, more slowly).
    Private memory of the process goes to swap, if there is some. Does nothing on other systems and devices.
    """
    if sys.platform != "linux" or weight.device.type != "cpu" or weight.numel() == 0:
        return
    last = sum((size - 1) * stride for size, stride in zip(weight.shape, weight.stride(), strict=True))
    end = weight.data_ptr() + (last + 1) * weight.element_size()
    start = (
        -(-weight.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    )  # whole pages inside the weight: it may be one of many in a storage
    size = end // mmap.PAGESIZE * mmap.PAGESIZE - start
    if size > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), MADV_PAGEOUT)

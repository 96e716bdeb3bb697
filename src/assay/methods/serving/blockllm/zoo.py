"""The block zoo: fine-tuned variants of one model, cut into blocks, each distinct block kept once.

A block is the embedding, a decoder layer, the head, what is left (the last norm), or the adapter of such a place. Blocks are known by a
digest of their tensors' names, types, shapes and bytes: what two models have in common is there once, whoever made it.

    zoo = Zoo()
    zoo.add("base", model)
    zoo.add("german", partly_tuned_model)                       # its own layers are kept, the others are the base's
    zoo.add_adapter("sql", "base", read_adapter("sql-lora"))
    zoo.bytes, zoo.separate_bytes

When NOT to use it: for models of different shapes (one zoo holds one shape; stitching is left out), and where every variant is fully
fine-tuned: then nothing is equal and nothing is saved.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain as chained
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from assay import checks
from assay.errors import InputError
from assay.methods.core.generation import loop
from assay.methods.serving.blockllm.adapters import Adapter, Factors, LowRank, put
from assay.paths import atomic_file

EMBED, HEAD, REST = "embed", "head", "rest"
INDEX = "zoo.json"
FORMAT = 1
LARGEST_INDEX = 1 << 26  # bytes
MOST_LAYERS = 4096  # of a zoo on disk: a configuration is obeyed, so it is looked at first
_DIGEST = re.compile(r"[0-9a-f]{64}")
_SAID_BY_FILES = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}


@dataclass(frozen=True, eq=False)
class Block:
    """A group of tensors by their names inside the block, and the digest of all of it."""

    digest: str
    tensors: Mapping[str, Tensor]

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True)
class Chain:
    """The blocks of one model by place, in the order they run, and the adapters beside them, both by digest."""

    blocks: Mapping[str, str]
    adapters: Mapping[str, str] = field(default_factory=dict)

    def digests(self) -> set[str]:
        return {*self.blocks.values(), *self.adapters.values()}


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes, in the order of the names.

    >>> digest_of({"a": torch.zeros(2)}) == digest_of({"a": torch.zeros(2)}) != digest_of({"a": torch.zeros(2, dtype=torch.int32)})
    True
    """
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        head = json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode()
        found.update(len(head).to_bytes(8, "big") + head)
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def layer(index: int) -> str:
    """The name of a decoder layer's place."""
    return f"layer {index}"


class Zoo:
    """Models of one shape and dtype by name, and their blocks by digest. What is added is copied, where it is new."""

    def __init__(self) -> None:
        self.blocks: dict[str, Block] = {}
        self.chains: dict[str, Chain] = {}
        self._shell: Any = None  # the model without its weights, on "meta" but for what is no weight
        self._names: dict[str, dict[str, str]] = {}  # by place: names in the model by those in the block

    # ---- what is in it

    @property
    def bytes(self) -> int:
        """Bytes of all distinct blocks."""
        return sum(block.bytes for block in self.blocks.values())

    @property
    def separate_bytes(self) -> int:
        """What copies of their own would take for every model: a tied head counted once, adapters beside."""
        return sum(self.bytes_of(name) for name in self.chains)

    def bytes_of(self, name: str) -> int:
        """Bytes of one model's blocks, its adapters among them."""
        return sum(self.blocks[digest].bytes for digest in self.chain(name).digests())

    def chain(self, name: str) -> Chain:
        """Raises ValueError for a model that is not here."""
        if name not in self.chains:
            raise ValueError(
                f"name must be one of {', '.join(self.chains) or 'no models yet'}, got {checks.shown(name)}"
            )
        return self.chains[name]

    @property
    def places(self) -> list[str]:
        """The places of a chain, in order."""
        return list(self._names)

    @property
    def names(self) -> Mapping[str, Mapping[str, str]]:
        """By place, the names in the model by those in the block."""
        return self._names

    # ---- adding and taking away

    def add(self, name: str, model: nn.Module) -> Chain:
        """Add a causal language model of transformers on the CPU: its chain. Blocks that are here already cost nothing.

        Raises ValueError for a name that is taken, a model that continues no prompts, of another configuration or dtype than the first,
        or one whose parameters do not lie in layers of their own; TypeError for what is no model. The zoo is then as it was.
        """
        self._require_free(name)
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a causal language model of transformers, got {checks.shown(model)}")
        if why := loop.why_not(model):
            raise ValueError(f"model must continue prompts: {why}")
        state: dict[str, Tensor] = model.state_dict()
        if odd := next((key for key, tensor in state.items() if tensor.device.type != "cpu"), None):
            raise ValueError(f"model must lie on the CPU, got {odd} on {state[odd].device}")
        if self._shell is None:
            self._adopt(model)
        else:
            self._require_alike(model, state)
        found = {place: {local: state[full] for local, full in names.items()} for place, names in self._names.items()}
        self.chains[name] = Chain({place: self._keep(tensors) for place, tensors in found.items()})
        return self.chains[name]

    def add_adapter(self, name: str, base: str, adapter: Adapter) -> Chain:
        """Add a model that is `base` with a LoRA adapter beside its linear layers; only the factors are new.

        Raises ValueError for a name that is taken, a base that is not here or has an adapter itself, and for factors that have no
        `nn.Linear` of their shape there. The factors are kept in the models' dtype, and refused where they are too large for it.
        """
        self._require_free(name)
        under = self.chain(base)
        if under.adapters:
            raise ValueError(f"base must be a model without an adapter, got {base!r}")
        groups: dict[str, dict[str, Tensor]] = {}
        where = {full: (place, local) for place, names in self._names.items() for local, full in names.items()}
        for target, factors in adapter.items():
            module = dict(self._shell.named_modules()).get(target)
            if not isinstance(module, nn.Linear):
                raise ValueError(f"adapter must change linear layers of the model, got {target[:120]!r}")
            shape = (module.out_features, module.in_features)
            if (factors.up.shape[0], factors.down.shape[1]) != shape:
                raise ValueError(
                    f"adapter must fit {target!r}, (out, in) {shape}, got {tuple(factors.up.shape)} and {tuple(factors.down.shape)}"
                )
            place, local = where[f"{target}.weight"]
            stem = local.removesuffix("weight")
            down, up = (tensor.detach().to("cpu", self.dtype) for tensor in (factors.down, factors.up))
            if not bool(torch.isfinite(down).all() and torch.isfinite(up * factors.scale).all()):
                raise ValueError(f"adapter must be finite in {self.dtype}, got NaN or infinity in {target!r}")
            groups.setdefault(place, {}).update(
                {
                    f"{stem}down": down,
                    f"{stem}up": up,
                    f"{stem}scale": torch.tensor(float(factors.scale), dtype=torch.float64),
                }
            )
        if not groups:
            raise ValueError("adapter must change at least one layer, got none")
        kept = {place: self._keep(groups[place]) for place in self._names if place in groups}
        self.chains[name] = Chain(dict(under.blocks), kept)
        return self.chains[name]

    def remove(self, name: str) -> None:
        """Forget a model, and the blocks that no other has. Raises ValueError for one that is not here.

        Models made of the zoo keep what they use. An empty zoo takes models of any shape again.
        """
        self.chain(name)
        del self.chains[name]
        if not self.chains:
            self._shell, self._names = None, {}
        used = set(chained.from_iterable(one.digests() for one in self.chains.values()))
        self.blocks = {digest: block for digest, block in self.blocks.items() if digest in used}

    # ---- models of it

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights. Raises ValueError for a zoo without models."""
        self._require_models()
        found: torch.dtype = self._shell.get_input_embeddings().weight.dtype
        return found

    def shell(self) -> Any:
        """The model without its weights, a copy. Raises ValueError for a zoo without models."""
        self._require_models()
        return copy.deepcopy(self._shell)

    def factors(self, digest: str) -> dict[str, Factors]:
        """The factors of an adapter's block, by the name of the linear layer inside the place ("" where the place is the layer)."""
        tensors = self.blocks[digest].tensors
        stems = [key.removesuffix("down") for key in tensors if key.rpartition(".")[2] == "down"]
        return {
            stem.removesuffix("."): Factors(
                tensors[f"{stem}down"], tensors[f"{stem}up"], float(tensors[f"{stem}scale"])
            )
            for stem in stems
        }

    def monolith(self, name: str, *, merge: bool = False, own: bool = False) -> Any:
        """One model as transformers runs it, on the zoo's own tensors; its adapter beside the layers, or merged into new weights.

        With `own` nothing is shared: every tensor is a copy, tied ones copied together. Raises ValueError for a model that is not here.
        """
        one, model = self.chain(name), self.shell()
        copies: dict[int, Tensor] = {}
        for place, digest in one.blocks.items():
            for local, full in self._names[place].items():
                tensor = self.blocks[digest].tensors[local]
                if own:
                    tensor = copies.setdefault(id(tensor), tensor.clone())
                fill(model, full, tensor)
        if model.config.get_text_config().tie_word_embeddings and self._tied(one):
            model.get_output_embeddings().weight = model.get_input_embeddings().weight
        for place, digest in one.adapters.items():
            for inside, factors in self.factors(digest).items():
                target = self._names[place][f"{inside}.weight" if inside else "weight"].removesuffix(".weight")
                linear = model.get_submodule(target)
                if merge:
                    linear.weight = nn.Parameter(_merged(linear.weight, factors), requires_grad=False)
                else:
                    put(model, target, LowRank(linear, factors).requires_grad_(False))
        return model

    def _tied(self, one: Chain) -> bool:
        return one.blocks.get(HEAD) == one.blocks.get(EMBED)

    # ---- on disk

    def save(self, folder: Path | str) -> None:
        """Write the blocks to `folder`/blocks/<digest>.safetensors, those that are there already not again, then the index.

        Only the names and sizes are compared with what is there; `Zoo.open` checks digests. Blocks that no model has any more stay.
        Raises ValueError for a zoo without models.
        """
        from safetensors.torch import save_file

        self._require_models()
        where = Path(folder).expanduser()
        (where / "blocks").mkdir(parents=True, exist_ok=True)
        for digest, block in self.blocks.items():
            file = where / "blocks" / f"{digest}.safetensors"
            if not file.is_file() or file.stat().st_size < block.bytes:
                with atomic_file(file) as temporary:
                    save_file({name: tensor.contiguous() for name, tensor in block.tensors.items()}, temporary)
        index = {
            "format": FORMAT,
            "dtype": str(self.dtype).removeprefix("torch."),
            "config": self._shell.config.to_dict(),
            "models": {
                name: {"blocks": dict(one.blocks), "adapters": dict(one.adapters)} for name, one in self.chains.items()
            },
        }
        with atomic_file(where / INDEX) as temporary:
            temporary.write_text(json.dumps(index, indent=1, default=str), encoding="utf-8")

    @classmethod
    def open(cls, folder: Path | str) -> Zoo:
        """The zoo in a folder. Every block is hashed again: raises InputError for one that is not what its name says, for an index that is
        damaged or has no models, and for blocks that do not fit the configuration, before a model of that configuration is made. Nothing
        is imported from the folder, and nothing is unpickled.
        """
        where = Path(folder).expanduser()
        try:
            if (where / INDEX).stat().st_size > LARGEST_INDEX:
                raise InputError(f"{where / INDEX} is larger than {LARGEST_INDEX} bytes")
            index = json.loads((where / INDEX).read_text(encoding="utf-8"))
            if index["format"] != FORMAT:
                raise ValueError(f"format must be {FORMAT}, got {checks.shown(index['format'])}")
            zoo, models = cls(), index["models"]
            if not models:
                raise ValueError("models must be at least one, got none")
            layers = max(sum(place.startswith("layer ") for place in one["blocks"]) for one in models.values())
            with torch.device("meta"):  # what its models look like, before any memory is taken for them
                zoo._adopt(_built(index["config"], index["dtype"], layers))
            for name, one in models.items():
                chain = Chain(dict(one["blocks"]), dict(one["adapters"]))
                zoo._require_free(name)
                if list(chain.blocks) != zoo.places or not set(chain.adapters) <= set(zoo.places):
                    raise ValueError(f"{name[:80]!r} must have a block at each of {len(zoo.places)} places")
                for digest in chain.digests() - set(zoo.blocks):
                    zoo.blocks[digest] = _read_block(where, digest)
                zoo._require_fit(chain)
                zoo.chains[name] = chain
            zoo._adopt(_built(index["config"], index["dtype"], layers))
        except (OSError, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise InputError(f"{where}: no zoo that can be read ({type(error).__name__}: {str(error)[:200]})") from None
        return zoo

    # ---- inside

    def _keep(self, tensors: Mapping[str, Tensor]) -> str:
        digest = digest_of(tensors)
        if digest not in self.blocks:
            self.blocks[digest] = Block(digest, {name: tensor.detach().clone() for name, tensor in tensors.items()})
        return digest

    def _adopt(self, model: Any) -> None:
        """Take the first model's shape."""
        names = places_of(model)
        tensors = {id(tensor): tensor for tensor in chained(model.parameters(), _stored_buffers(model))}
        shell = copy.deepcopy(model, dict(tensors)).eval()  # shares what it is about to lose
        for full in model.state_dict():
            fill(shell, full, _attribute(model, full).detach().to("meta"))
        owners = {full.rpartition(".")[0] for full in model.state_dict()}
        for path in sorted(owners):
            if inside := next(
                (one for one in owners if one != path and (one.startswith(f"{path}.") or not path)), None
            ):
                raise ValueError(
                    f"model must have its parameters in layers of their own, got {path or 'the model'} with some beside those of {inside}"
                )
        self._shell, self._names = shell, names

    def _require_alike(self, model: Any, state: Mapping[str, Tensor]) -> None:
        ours, theirs = (_comparable(one.config) for one in (self._shell, model))
        if odd := sorted(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key)):
            raise ValueError(
                f"model must have the configuration of the zoo's, got another {odd[0]}: {checks.shown(theirs.get(odd[0]))}, not "
                f"{checks.shown(ours.get(odd[0]))}"
            )
        known = self._shell.state_dict()
        if odd := sorted({*known} ^ {*state}):
            raise ValueError(f"model must have the tensors of the zoo's models, got a difference at {odd[0]}")
        for name, tensor in state.items():
            if (tensor.shape, tensor.dtype) != (known[name].shape, known[name].dtype):
                raise ValueError(
                    f"model must have {name} of {known[name].dtype} {tuple(known[name].shape)}, got {tensor.dtype} {tuple(tensor.shape)}"
                )

    def _require_fit(self, one: Chain) -> None:
        known = self._shell.state_dict()
        for place, digest in one.blocks.items():
            tensors, names = self.blocks[digest].tensors, self._names[place]
            fits = tensors.keys() == names.keys() and all(
                tensors[local].shape == known[full].shape and tensors[local].dtype == known[full].dtype
                for local, full in names.items()
            )
            if not fits:
                raise ValueError(f"block {digest[:12]} does not fit {place}")
        for place, digest in one.adapters.items():
            for inside, factors in self.factors(digest).items():
                full = self._names[place].get(f"{inside}.weight" if inside else "weight", "")
                if not full or (factors.up.shape[0], factors.down.shape[1]) != tuple(known[full].shape):
                    raise ValueError(f"adapter {digest[:12]} does not fit {place}")

    def _require_models(self) -> None:
        if self._shell is None:
            raise ValueError("the zoo has no model yet")

    def _require_free(self, name: str) -> None:
        if not isinstance(name, str) or not name:
            raise TypeError(f"name must be a text, got {checks.shown(name)}")
        if name in self.chains:
            raise ValueError(f"name must be new, got {name!r}")


def places_of(model: Any) -> dict[str, dict[str, str]]:
    """The tensors of a causal language model by place: {place: {name in the block: name in the model}}, in the order they run.

    The layers are the outermost `nn.ModuleList` that is as long as the configuration says. Raises ValueError for a model without one.
    """
    count = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    lists = [
        path for path, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == count > 0
    ]
    if not lists:
        raise ValueError(f"model must have a list of {count} layers, got {type(model).__name__}")
    layers = min(lists, key=lambda path: path.count("."))
    paths = {id(module): path for path, module in model.named_modules()}
    embed = paths[id(model.get_input_embeddings())]
    head_module = model.get_output_embeddings()
    head = paths[id(head_module)] if head_module is not None else ""
    found: dict[str, dict[str, str]] = {EMBED: {}}
    rest: dict[str, str] = {}
    heads: dict[str, str] = {}
    for full in model.state_dict():
        if full.startswith(f"{layers}."):
            number, _, local = full.removeprefix(f"{layers}.").partition(".")
            found.setdefault(layer(int(number)), {})[local] = full
        elif full.startswith(f"{embed}."):
            found[EMBED][full.removeprefix(f"{embed}.")] = full
        elif head and full.startswith(f"{head}."):
            heads[full.removeprefix(f"{head}.")] = full
        else:
            rest[full] = full
    found |= {REST: rest} if rest else {}
    return found | ({HEAD: heads} if heads else {})


def fill(model: nn.Module, full: str, tensor: Tensor) -> None:
    """Put a tensor where a model has a parameter or buffer of that name."""
    path, _, name = full.rpartition(".")
    module = model.get_submodule(path)
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[name] = tensor


def _attribute(model: nn.Module, full: str) -> Tensor:
    path, _, name = full.rpartition(".")
    found: Tensor = getattr(model.get_submodule(path), name)
    return found


def _stored_buffers(model: nn.Module) -> list[Tensor]:
    state = model.state_dict()
    return [tensor for name, tensor in model.named_buffers() if name in state]


def _merged(weight: Tensor, factors: Factors) -> Tensor:
    return (weight.detach().float() + factors.delta()).to(weight.dtype)


def _comparable(config: Any) -> dict[str, Any]:
    """What of a configuration must agree; the attention in use is left out, it belongs to who runs the model."""
    found = {name: value for name, value in config.to_dict().items() if name not in _SAID_BY_FILES}
    plain: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return plain


def _built(config: Mapping[str, Any], dtype: str, layers: int) -> Any:
    """A model of a stored configuration, of transformers' own classes, weights at random. It has as many layers as the index."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = config["model_type"]
    checks.choice("dtype", dtype, ("float32", "bfloat16", "float16", "float64"))
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"model_type must be one that transformers knows, got {checks.shown(kind)}")
    plain = {name: value for name, value in config.items() if name not in ("auto_map", "model_type")}
    made = CONFIG_MAPPING[kind](**plain)
    if not made.get_text_config().num_hidden_layers == layers <= MOST_LAYERS:
        raise ValueError(f"config must have the {layers} layers of the models, {MOST_LAYERS} at most")
    return AutoModelForCausalLM.from_config(made, dtype=getattr(torch, dtype)).eval()


def _read_block(folder: Path, digest: str) -> Block:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise ValueError(f"a block must be named by its digest, got {checks.shown(digest)}")
    try:
        tensors = load_file(folder / "blocks" / f"{digest}.safetensors")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"block {digest[:12]} cannot be read ({error})") from None
    if digest_of(tensors) != digest:
        raise ValueError(f"block {digest[:12]} is not what its name says")
    return Block(digest, tensors)

"""What a model weighs in each format, from its files' headers: nothing is loaded."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from assay import checks
from assay.methods.core.fleet.hardware import ModelShape

MADE = ("fp32", "bf16", "int8", "int4")  # of a folder's weights when it is loaded
STORED = {"F32": "fp32", "BF16": "bf16"}


@dataclass(frozen=True)
class Sizes:
    """A model in a format. `shape.parameters` are those that a new token is multiplied by, the projection onto the vocabulary (`head` of
    them, which take `head_bytes`) included; `shape.weight_bytes` is what one takes on average, `resident` all that an engine must hold."""

    shape: ModelShape
    head: int
    head_bytes: float
    resident: float
    format: str

    @property
    def parameters(self) -> int:
        """Those that a token is multiplied by."""
        return self.shape.parameters

    @property
    def step_bytes(self) -> float:
        """Bytes of weights that a token reads."""
        return self.shape.parameters * self.shape.weight_bytes

    def prefill_flops(self, tokens: int) -> float:
        """Operations of a prompt (two a multiply-add) of which only the last token is projected onto the vocabulary, and no token looks
        further back than the window, if there is one."""
        shape = self.shape
        beyond = max(tokens - shape.window, 0) if shape.window else 0
        unseen = 4.0 * shape.layers * shape.heads * shape.head_dim * beyond * (beyond + 1) / 2
        return shape.prefill_flops(tokens) - 2.0 * self.head * (tokens - 1) - unseen


def sizes_of(folder: str | Path, format: str = "as stored", *, gguf: str | Path | None = None) -> Sizes:
    """The sizes of a decoder in a folder of safetensors, in one of the formats that engines here make of it.

    "fp32" and "bf16" hold all weights so; "int8" and "int4" hold the linear layers packed (a scale for 32 weights, for "int4" a minimum
    too), the projection onto the vocabulary in 8 bits, and the embedding, which a token is looked up in, in float32. "as stored" is the
    one of the first two that the files have; "gguf" are the tensors of the file `gguf` as they lie there. Where some layers see a window
    only, all are taken to: what follows from the sizes is a lower bound. Raises ValueError for a format it does not know, for a folder
    that lacks what it needs, and for a mixture of experts, of whose weights a token reads a part.
    """
    from assay.methods.core.quantize.formats import FORMATS  # torch: not in a process that only asks

    checks.choice("format", format, (*MADE, "as stored", "gguf"))
    config = _config(Path(folder))
    shapes, types = _tensors(Path(folder))
    if format == "as stored":
        most = max(types, key=lambda name: types[name])
        if most not in STORED:
            raise ValueError(f"format must be named for weights that are stored as {most}")
        format = STORED[most]
    if experts := next((name for name in shapes if ".experts." in name), None):
        raise ValueError(f"{folder} holds a mixture of experts ({experts}), of whose weights a token reads a part")
    tables = [shape for name, shape in shapes.items() if "embed" in name and len(shape) == 2]
    if not tables:
        raise ValueError(f"{folder} has no embedding of tokens among its tensors")
    embedding = max(tables)  # there are fewer positions than tokens
    head = shapes.get("lm_head.weight")
    tied = head is None or bool(config.get("tie_word_embeddings", False))
    projected = embedding if head is None else head
    linears = [s for n, s in shapes.items() if len(s) == 2 and "embed" not in n and n != "lm_head.weight"]
    small = sum(math.prod(shape) for shape in shapes.values() if len(shape) != 2)
    parameters = sum(n * k for n, k in linears) + projected[0] * projected[1]
    if format == "gguf":
        if gguf is None:
            raise ValueError("gguf must name the file whose format is asked for, got None")
        by_tensor = gguf_bytes(gguf)
        resident = float(sum(by_tensor.values()))
        looked_up = 0 if tied else by_tensor.get("token_embd.weight", 0)
        step = resident - looked_up
        of_head = float(by_tensor["token_embd.weight" if tied else "output.weight"])
        kv = 2.0
    else:
        packed = format in ("int8", "int4")
        of_head = float(FORMATS["int8" if packed else format].bytes(*projected))
        step = float(sum(FORMATS[format].bytes(n, k) for n, k in linears) + of_head)
        table = math.prod(embedding) * (4 if packed or format == "fp32" else 2)
        resident = step + small * 2.0 + (0 if tied and not packed else table)
        kv = 4.0 if format == "fp32" else 2.0
    shape = ModelShape(
        layers=config["num_hidden_layers"],
        width=config["hidden_size"],
        heads=config["num_attention_heads"],
        kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        parameters=parameters,
        weight_bytes=step / parameters,
        kv_bytes=kv,
        window=_window(config),
    )
    return Sizes(shape, projected[0] * projected[1], of_head, resident, format)


def grown(sizes: Sizes, parameters: float) -> Sizes:
    """A model of the same format with so many parameters, its layers' widths and number grown by the same factor (our choice), its
    vocabulary kept, and the width of its heads and the number of those of keys and values. What is twice as wide and twice as deep has
    eight times the parameters in its layers. Raises ValueError for fewer parameters than it has.
    """
    parameters = checks.number("parameters", parameters, low=sizes.parameters)
    shape, inner = sizes.shape, sizes.parameters - sizes.head
    low, high = 1.0, (parameters / inner) ** (1 / 3) + 1

    def total(factor: float) -> float:
        return factor**3 * inner + factor * sizes.head

    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if total(middle) < parameters else (low, middle)
    width = round(shape.width * low)
    heads = max(shape.heads, round(width / shape.head_dim / shape.kv_heads) * shape.kv_heads)
    inner_bytes, rest = sizes.step_bytes - sizes.head_bytes, sizes.resident - sizes.step_bytes
    head, head_bytes, count = round(sizes.head * low), sizes.head_bytes * low, round(parameters)
    step = inner_bytes * (count - head) / inner + head_bytes
    made = ModelShape(
        max(shape.layers, round(shape.layers * low)), width, heads, shape.kv_heads, shape.head_dim, count, step / count, shape.kv_bytes,
        shape.window,
    )  # fmt: skip
    return Sizes(made, head, head_bytes, step + rest * low, sizes.format)  # the rest: an embedding that is held besides


def gguf_bytes(file: str | Path) -> dict[str, int]:
    """Bytes of each tensor of a GGUF file by the exact size of its blocks: a whole number of them a row.

    Raises ValueError for a tensor whose rows are no whole number of blocks.
    """
    import gguf

    found: dict[str, int] = {}
    for tensor in gguf.GGUFReader(file).tensors:
        block, size = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
        row, *others = (int(length) for length in tensor.shape)
        if row % block:
            raise ValueError(f"{tensor.name} has rows of {row} numbers, which are no whole blocks of {block}")
        found[tensor.name] = row // block * size * math.prod(others)
    return found


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = config.get("text_config") or config
        for name in ("num_hidden_layers", "hidden_size", "num_attention_heads"):
            checks.whole(name, config.get(name), low=1)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder} has no config.json of a decoder: {error}") from None
    found: dict[str, Any] = config
    return found


def _window(config: dict[str, Any]) -> int:
    """Positions that a layer sees at most; 0 where all see everything."""
    kinds = config.get("layer_types") or ["sliding_attention"]
    if config.get("use_sliding_window") is False or "sliding_attention" not in kinds:
        return 0
    return int(config.get("sliding_window") or 0)


def _tensors(folder: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    """Shapes by name, and how many numbers have which stored type."""
    from safetensors import safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    types: dict[str, int] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="np") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (no mapping)
                part = tensors.get_slice(name)
                shapes[name] = tuple(part.get_shape())
                types[part.get_dtype()] = types.get(part.get_dtype(), 0) + math.prod(shapes[name])
    if not shapes:
        raise ValueError(f"{folder} holds no *.safetensors")
    return shapes, types

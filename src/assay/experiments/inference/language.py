"""Small language models over the bytes of the bundled text, for experiments that train: made once, kept on disk.

Training text is the part "prompts" of the bundled code, learning rates are chosen on "calibration", and figures are of "heldout": three
parts of different documents.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from assay.experiments.mixers import training
from assay.methods.core import models
from assay.paths import atomic_file, cache_dir
from assay.workloads import sequences, text
from assay.workloads.sequences import byte_windows, text_bytes

BYTES = 256


def small_llama(
    *,
    width: int = 128,
    layers: int = 6,
    heads: int = 4,
    kv_heads: int | None = None,
    seed: int = 0,
    vocab: int = BYTES,
    **settings: Any,
) -> Any:
    """A Llama of transformers with new weights: SwiGLU of 8 / 3 the width, context 2048, in train mode.

    Weights are as wide as their fan-in asks (`width` ** -0.5; the 0.02 of large models learns nothing in a few hundred steps), the two
    matrices of a layer that write to the residual stream narrower by (2 `layers`) ** -0.5, so that depth does not drown the tokens in
    the noise of untrained layers; embeddings are standard normal. `settings` go into its configuration; with `tie_word_embeddings`,
    which is off, embeddings are as wide as the head asks.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **{
            "vocab_size": vocab,
            "hidden_size": width,
            "intermediate_size": -(-width * 8 // 3 // 16) * 16,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads or heads,
            "max_position_embeddings": 2048,
            "initializer_range": width**-0.5,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": None,
            **settings,
        }
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = LlamaForCausalLM(config).train()
        for layer in model.model.layers:
            for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
                writer.weight.data *= (2 * layers) ** -0.5
        if not config.tie_word_embeddings:
            nn.init.normal_(model.model.embed_tokens.weight)
    return model


def trained(
    key: dict[str, Any],
    build: Callable[[], nn.Module],
    batches: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    *,
    steps: int,
    rate: float,
    sources: Sequence[ModuleType],
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None,
    **options: Any,
) -> Any:
    """`build()`, trained with `training.train` for `steps` steps at the learning rate `rate`, in eval mode.

    The weights are kept in the cache folder and found again by whoever asks for the same: `key` (JSON-able; what build, batches and loss
    depend on), steps, rate, options, the versions of torch and transformers, the bundled text, and the source of the modules `sources`
    (the method and the experiment), of the trainer, `core.models` and this one. Runs on one thread; `training.in_parallel` runs several
    at once.
    """
    described = {
        "key": key,
        "steps": steps,
        "rate": rate,
        "options": {name: value if isinstance(value, str | int | float | bool) else repr(value) for name, value in options.items()},
        "versions": [importlib.metadata.version(name) for name in ("torch", "transformers")],
        "text": text.text_hash(),
        "sources": [_digest(module) for module in (*sources, training, sequences, models, _here())],
    }  # fmt: skip
    name = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:32]
    file = cache_dir() / "trained" / f"{name}.safetensors"
    model: Any = build()
    if file.is_file():
        try:
            kept = load_file(file)
            if kept.keys() == _own_tensors(model).keys():
                model.load_state_dict(kept, strict=False)  # what is tied is not stored twice
                return model.eval()
        except (SafetensorError, RuntimeError, OSError):  # cut off, or of another layout: train it again
            model = build()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        training.train(model, batches(), steps=steps, lr=rate, loss=loss, **options)
    finally:
        torch.set_num_threads(threads)
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as temporary:
        save_file(_own_tensors(model), temporary)
    return model.eval()


def heldout(length: int, n: int) -> tuple[Tensor, Tensor]:
    """`n` windows (inputs, targets) of `length` bytes, spread over documents that nothing was trained or chosen on."""
    return byte_windows(length, n, part="heldout")


def validation(length: int, n: int) -> tuple[Tensor, Tensor]:
    """The same of documents by which learning rates are chosen."""
    return byte_windows(length, n, part="calibration")


def nll(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood of each window, nats a byte: (n,) float64."""
    return training.evaluate(model, inputs, targets)["nll"]


def bigram_floor(inputs: Tensor, targets: Tensor) -> float:
    """Nats a byte of a table of pairs of bytes counted on the training text, which is shown the byte before: what is trivial here."""
    return float(-_bigrams()[inputs, targets].mean())


@cache
def _bigrams() -> Tensor:
    return bigram_table(text_bytes("code", "prompts"), BYTES)


def bigram_table(ids: Tensor, vocabulary: int) -> Tensor:
    """Log-probabilities (token before, token) of the pairs in a text (tokens,) int64, unseen ones by the frequency of the second token:
    (vocabulary, vocabulary) float64, each row a distribution."""
    counts = torch.bincount(vocabulary * ids[:-1] + ids[1:], minlength=vocabulary**2)
    table = counts.view(vocabulary, vocabulary).double()
    alone = (table.sum(0) + 1) / (table.sum() + vocabulary)
    return ((table + alone) / (table.sum(1, keepdim=True) + 1)).log()


def _own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with tensors that share their memory stored once: a model built anew ties them again."""
    seen: set[int] = set()
    own = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen or not tensor.numel():
            seen.add(tensor.data_ptr())
            own[name] = tensor.detach().contiguous()
    return own


def _digest(module: ModuleType) -> str:
    """Of the module's source, and of all modules of a package."""
    file = Path(str(module.__file__))
    files = sorted(file.parent.rglob("*.py")) if file.name == "__init__.py" else [file]
    return hashlib.sha256(b"".join(one.read_bytes() for one in files)).hexdigest()


def _here() -> ModuleType:
    import sys

    return sys.modules[__name__]

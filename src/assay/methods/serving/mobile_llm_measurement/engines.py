"""Engines that answer prompts: those that are always there, and peers where their packages are installed.

An engine is something with `generate` (below), made by a function that a cell names as "module:function" and that is called in the
cell's own process with `folder` (of the model), `gguf` (its file, or None), `format` and `threads`; or it is a server of its own, started
by a command.
Answers are greedy and exactly as long as asked for: end tokens are ignored, so that times of engines can be compared.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from assay import checks

OnText = Callable[[str], None]


class Engine(Protocol):
    """What a cell runs. `generate` calls `on_text` as each token comes, with the text that it adds (which may be empty), and returns the
    numbers of tokens of the prompt and of the answer."""

    def generate(self, prompt: str, new_tokens: int, on_text: OnText) -> tuple[int, int]: ...


@dataclass(frozen=True)
class EngineKind:
    """An engine as a cell names it.

    `opener` ("module:function") makes it in the cell's process; `command` starts a server of its own that speaks /v1/completions, with
    {python}, {folder}, {gguf}, {port} and {threads} replaced. `formats` are those it has, `needs` the modules without which it is a gap
    in the table, `wants_gguf` says that it reads a GGUF file. `extra` are further fields of a request to the server. `precision` says, for
    each format, in what numbers it holds weights and cache and computes.
    """

    name: str
    formats: tuple[str, ...]
    opener: str = ""
    command: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    wants_gguf: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)
    precision: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if bool(self.opener) == bool(self.command):
            raise ValueError(f"an engine must have either an opener or a command, {self.name!r} has not one of them")
        if self.opener and (self.opener.count(":") != 1 or not all(self.opener.split(":"))):
            raise ValueError(f"opener must look like 'module:function', got {checks.shown(self.opener)}")
        if not self.formats:
            raise ValueError(f"formats of {self.name!r} must name at least one")

    def missing(self, gguf: str | None) -> str:
        """Why it cannot run here; "" if it can."""
        absent = [name for name in self.needs if importlib.util.find_spec(name) is None]
        if absent:
            return f"{absent[0]} is not installed"
        if self.wants_gguf and gguf is None:
            return "it reads GGUF files, and the model has none"
        return ""


def opened(kind: EngineKind, *, folder: str, gguf: str | None, format: str, threads: int) -> Engine:
    """The engine itself, in this process."""
    module, name = kind.opener.split(":")
    made: Engine = getattr(importlib.import_module(module), name)(
        folder=folder, gguf=gguf, format=format, threads=threads, **kind.options
    )
    return made


# ------------------------------------------------------------------------------------------------- transformers, and assay's own loop

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "int8": "float32", "int4": "float32"}
"""What a model is loaded as. The 4- and 8-bit forms are made of its linear layers in float32 when it is loaded: on a phone a file would
hold them."""
WEIGHT_ONLY = "assay.methods.builtin.weight_only"
DECODE_LOOP = "assay.methods.builtin.decode_loop"


class TransformersEngine:
    """A transformers model with its own `generate`."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    def generate(self, prompt: str, new_tokens: int, on_text: OnText) -> tuple[int, int]:
        import torch

        given = self.tokenizer(prompt, return_tensors="pt")["input_ids"]
        told = _Told(self.tokenizer, on_text)
        with torch.inference_mode():
            made = self.model.generate(
                given,
                attention_mask=torch.ones_like(given),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                num_beams=1,
                streamer=told,
                pad_token_id=self._pad(),
            )
        return int(given.shape[1]), int(made.shape[1] - given.shape[1])

    def _pad(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else self.tokenizer.eos_token_id or 0)


class _Told:
    """A streamer of transformers: makes text of tokens as they come. What ends within a character waits for the rest of it."""

    def __init__(self, tokenizer: Any, on_text: OnText) -> None:
        self.tokenizer, self.on_text = tokenizer, on_text
        self.ids: list[int] = []
        self.told, self.prompt = 0, True

    def put(self, value: Any) -> None:
        if self.prompt:  # generate hands over the prompt first
            self.prompt = False
            return
        self.ids += value.reshape(-1).tolist()
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        whole = text.rstrip("\ufffd")
        new, self.told = whole[self.told :], max(self.told, len(whole))
        self.on_text(new)

    def end(self) -> None:
        pass


def open_transformers(
    *, folder: str, gguf: str | None, format: str, threads: int, loop: bool = False
) -> TransformersEngine:
    """A model folder through transformers (safetensors only, no remote code), on `threads` threads.

    "fp32" and "bf16" are dtypes; "int8" and "int4" replace linear layers by packed ones (assay's `weight_only`). With `loop`, decoding is
    assay's compiled loop on weights of that format (`decode_loop`), and prompts of the 4- and 8-bit forms run on the same packed weights.
    Raises ValueError for another format, or a model that the transform refuses.
    """
    import torch

    from assay.methods.transform import TuneContext

    checks.choice("format", format, tuple(DTYPES))
    torch.set_num_threads(checks.whole("threads", threads, low=1))
    model, tokenizer = _loaded(folder, getattr(torch, DTYPES[format]))
    context = TuneContext(goal="decode", prompt_tokens=128, new_tokens=32)
    packed = format in ("int8", "int4")
    if packed:
        _owned(model)
    if loop:
        settings = {"weights": format, "keep_prefill_weights": not packed}
        settings |= {"cache": "float32" if format == "fp32" else "bfloat16"}
        model = importlib.import_module(DECODE_LOOP).transform.apply(model, settings, context)
    elif packed:
        settings = {"bits": 8 if format == "int8" else 4, "head_bits": 8}
        model = importlib.import_module(WEIGHT_ONLY).transform.apply(model, settings, context)
    return TransformersEngine(model, tokenizer)


def _owned(model: Any) -> None:
    """Copy what will not be packed, embedding and norms: as views of the loaded file they would keep all of it in memory."""
    from torch import nn

    for module in model.modules():
        if not isinstance(module, nn.Linear):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.clone()


def _loaded(folder: str, dtype: Any) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as library

    bars = library.is_progress_bar_enabled()
    library.disable_progress_bar()
    logging.getLogger("transformers.generation").setLevel(
        logging.ERROR
    )  # it remarks on settings that greedy search ignores
    try:
        safe = {"local_files_only": True, "trust_remote_code": False}
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True, **safe)
        return model.eval(), AutoTokenizer.from_pretrained(folder, **safe)
    finally:
        if bars:
            library.enable_progress_bar()


# ------------------------------------------------------------------------------------------------------------------------- peers


class OpenVinoEngine:
    """OpenVINO GenAI's batching pipeline over a GGUF file, one answer at a time, its prefix cache off."""

    def __init__(self, gguf: str, folder: str, threads: int, cache_gb: int = 1) -> None:
        import openvino_genai as genai
        from tokenizers import Tokenizer

        scheduler = genai.SchedulerConfig()
        scheduler.cache_size, scheduler.enable_prefix_caching = cache_gb, False
        properties = {"INFERENCE_NUM_THREADS": threads}
        self.genai = genai
        self.pipeline = genai.ContinuousBatchingPipeline(
            gguf, scheduler_config=scheduler, device="CPU", properties=properties
        )
        self.tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
        self.asked = 0

    def generate(self, prompt: str, new_tokens: int, on_text: OnText) -> tuple[int, int]:
        import numpy as np
        import openvino
        from tokenizers.decoders import DecodeStream

        ids = self.tokenizer.encode(prompt).ids
        config = self.genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = new_tokens, True, False
        self.asked += 1
        handle = self.pipeline.add_request(self.asked, openvino.Tensor(np.array([ids], dtype=np.int64)), config)
        decoder, made = DecodeStream(skip_special_tokens=True), 0
        while made < new_tokens:
            self.pipeline.step()
            came = (
                [token for output in handle.read().values() for token in output.generated_ids]
                if handle.can_read()
                else []
            )
            for token in came:
                on_text(decoder.step(self.tokenizer, token) or "")
            made += len(came)
            if not came and handle.get_status() != self.genai.GenerationStatus.RUNNING:
                break
        return len(ids), made


def open_openvino(*, folder: str, gguf: str | None, format: str, threads: int) -> OpenVinoEngine:
    """OpenVINO GenAI over the model's GGUF file, in whatever types the file has and the runtime chooses."""
    if gguf is None:
        raise ValueError("gguf must name a file for this engine, got None")
    return OpenVinoEngine(gguf, folder, threads)


LLAMA_SERVER = """
import sys, time, xllamacpp
file, port, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
params = xllamacpp.CommonParams()
params.model.path, params.port, params.n_parallel, params.n_ctx = file, port, 1, 2048
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
params.cache_prompt, params.cache_ram_mib = False, 0
server = xllamacpp.Server(params)
while True:
    time.sleep(3600)
"""

PACKED = {
    "int8": "linear layers and the projection onto the vocabulary in 8 bits, inputs rounded to 8 bits, all else in float32",
    "int4": "linear layers in 4 bits, the projection onto the vocabulary in 8, inputs rounded to 8 bits, all else in float32",
}
TRANSFORMERS = EngineKind(
    "transformers",
    ("fp32", "bf16", "int8", "int4"),
    opener=f"{__name__}:open_transformers",
    precision={
        "fp32": "all in float32",
        "bf16": "all in bfloat16",
        **{format: f"{words}, the cache too" for format, words in PACKED.items()},
    },
)
LOOP = EngineKind(
    "decode loop",
    ("fp32", "bf16", "int8", "int4"),
    opener=f"{__name__}:open_transformers",
    options={"loop": True},
    precision={
        "fp32": "all in float32",
        "bf16": "weights and cache in bfloat16; prompts are computed in it, tokens in float32",
        **{format: f"{words}, but the cache in bfloat16" for format, words in PACKED.items()},
    },
)
ASSAY_SERVE = EngineKind(
    "assay serve",
    ("as stored",),
    command=(
        "{python}",
        "-P",
        "-m",
        "assay",
        "serve",
        "{folder}",
        "--port",
        "{port}",
        "--max-running",
        "4",
        "--kv-gib",
        "0.25",
    ),
    needs=("fastapi", "uvicorn"),
    extra={"ignore_eos": True},
    precision={"as stored": "weights as the files hold them, unrounded, in our compiled loop"},
)
LLAMA_CPP = EngineKind(
    "llama.cpp",
    ("gguf",),
    command=("{python}", "-P", "-c", LLAMA_SERVER, "{gguf}", "{port}", "{threads}"),
    needs=("xllamacpp",),
    wants_gguf=True,
    extra={"ignore_eos": True, "cache_prompt": False},
    precision={"gguf": "weights in the file's own blocks, inputs rounded to 8 bits"},
)
OPENVINO = EngineKind(
    "openvino-genai",
    ("gguf",),
    opener=f"{__name__}:open_openvino",
    needs=("openvino_genai",),
    wants_gguf=True,
    precision={"gguf": "weights as the runtime makes them of the file's blocks"},
)
ALWAYS = (TRANSFORMERS, LOOP, ASSAY_SERVE)
PEERS = (LLAMA_CPP, OPENVINO)


def command_of(kind: EngineKind, *, folder: str, gguf: str | None, port: int, threads: int) -> list[str]:
    """What starts a server of its own."""
    known = {"{python}": sys.executable, "{folder}": folder, "{gguf}": gguf or "", "{port}": str(port)}
    known["{threads}"] = str(threads)
    return [known.get(word, word) for word in kind.command]

"""The models of a server by name: loaded at the start or while it runs, as they are or with a LoRA adapter."""

from __future__ import annotations

import re
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from assay.errors import InputError
from assay.server import adapters
from assay.server.backends import backend_for
from assay.server.embeddings import POOLING
from assay.server.engine import Choice, Engine
from assay.server.errors import ApiError, no_model
from assay.server.scheduler import MOST_STEPS, Scheduler
from assay.workloads.context import context_length

AUTO = "auto"  # the name that stands for whatever the router chooses

Router = Callable[[Mapping[str, Any]], str | tuple[str, int]]
"""From a request's JSON object, not yet checked, to a model's name; or to the name and the tokens that choosing it took."""


class Models:
    """Engines by name, in the order they came. The first is the one that clients get who name none.

    `router` chooses the model for a request whose `model` is "auto". By default that is the first model. It runs in the thread that
    reads requests, so that the time it takes is in every answer's, and its tokens are in the answer's usage.
    """

    def __init__(
        self,
        *,
        router: Router | None = None,
        max_running: int = 64,
        prefill_chunk: int = 256,
        kv_gib: float | None = None,
        allow_download: bool = False,
    ) -> None:
        self.router, self.kv_gib, self.allow_download = router, kv_gib, allow_download
        self.max_running, self.prefill_chunk = max_running, prefill_chunk
        self.loading = False
        self._engines: dict[str, Engine] = {}
        self._sources: dict[str, str] = {}  # where a model came from, for its adapters
        self._parents: dict[str, str] = {}
        self._leaving: weakref.WeakSet[Engine] = weakref.WeakSet()  # unloaded; some answers may still be made
        self._changing = threading.Lock()

    def __len__(self) -> int:
        return len(self._engines)

    def engines(self) -> list[Engine]:
        """All of them."""
        return list(self._engines.values())

    def add(self, name: str, model: Any, tokenizer: Any, *, scheduler: Any = None, recipe: str = "") -> Engine:
        """Serve a model under a name. Raises InputError for a name that is taken or that no client can ask for."""
        self._require_free(name)
        if scheduler is None:
            limit = {} if self.kv_gib is None else {"kv_gib": self.kv_gib}
            backend: Any = backend_for(model, tokenizer, **limit)
            scheduler = Scheduler(
                backend, max_running=self.max_running, prefill_chunk=self.prefill_chunk, steps=MOST_STEPS
            )
        else:
            backend = getattr(scheduler, "backend", None)
        engine = Engine(model, tokenizer, scheduler, name, recipe=recipe)
        engine.backend, engine.backend_reason = getattr(backend, "name", ""), getattr(backend, "reason", "")
        self._engines[name] = engine
        return engine

    def load(self, name: str, source: str) -> Engine:
        """Load MODEL_OR_DIR and serve it. Raises what `load_tuned` raises, and InputError for a bad name."""
        from assay.tuner.artefact import RECIPE, load_tuned

        with self._changing:
            self._require_free(name)
            loaded = load_tuned(source, allow_download=self.allow_download)
            recipe = loaded.folder / RECIPE
            text = recipe.read_text(encoding="utf-8") if recipe.is_file() else ""
            engine = self.add(name, loaded.model, loaded.tokenizer, recipe=text)
            self._sources[name] = str(source)
            return engine

    def load_adapter(self, name: str, folder: str, base: str | None = None) -> Engine:
        """Serve a model with a LoRA adapter, beside the model without it; `base` names that (None: the first).

        Where the base is served as it is stored, the two share all weights but those that the adapter changes. Where a recipe was
        applied to it, its weights are loaded once more, changed, and the recipe applied to them.
        Raises InputError for a bad name, a base that is not here, or an adapter that is damaged, not understood or does not fit.
        """
        from assay.paths import expanded
        from assay.tuner.artefact import load_tuned

        with self._changing:
            self._require_free(name)
            base = self._first() if base is None else base
            if base not in self._engines or base not in self._sources:
                raise InputError(f"adapter {name!r}: there is no loaded model {base!r} here to add it to")
            path = expanded(folder, "the adapter")
            if not path.is_dir():
                raise InputError(f"{path}: no such folder")
            parent, text = self._engines[base], f"adapter {_identity(path)}"
            stored = find_recipe(self._sources[base])
            if stored is None:
                model, tokenizer = adapters.shared_copy(parent.model), parent.tokenizer
                adapters.merge(model, path)
            else:
                loaded = load_tuned(self._sources[base], before_recipe=lambda plain: adapters.merge(plain, path))
                model, tokenizer, text = loaded.model, loaded.tokenizer, stored + text
            engine = self.add(name, model, tokenizer, recipe=text)
            self._parents[name] = base
            return engine

    def load_shared(
        self, models: Sequence[tuple[str, str]], adapted: Sequence[tuple[str, str, str]] = ()
    ) -> list[Engine]:
        """Load fine-tuned variants of one model, and LoRA adapters (name, folder, base) of them, as one zoo of blocks (paper blockllm).

        What they have in common is in memory once, and their requests share batches, each under its own name. Raises as `load`, and
        InputError for models of other shapes or with a recipe, and for adapters that do not fit; nothing is served then.
        """
        from assay.methods.serving.blockllm import SharedModel, Zoo, read_adapter
        from assay.server.zoo import Door, ZooBackend
        from assay.tuner.artefact import load_tuned

        ends: dict[str, Any]
        with self._changing:
            zoo, tokenizers, ends = Zoo(), {}, {}
            for name, source in models:
                self._require_free(name)
                if find_recipe(source) is not None:
                    raise InputError(
                        f"{source}: blocks are shared between models as they are stored, and this one has a recipe"
                    )
                loaded = load_tuned(source, allow_download=self.allow_download)
                tokenizers[name], ends[name] = loaded.tokenizer, loaded.model.generation_config
                try:
                    zoo.add(name, loaded.model)
                except ValueError as error:
                    raise InputError(f"{source}: {error}") from None
                del loaded  # what was new is in the zoo
            for name, folder, base in adapted:
                self._require_free(name)
                try:
                    zoo.add_adapter(name, base, read_adapter(folder))
                except ValueError as error:
                    raise InputError(f"{folder}: {error}") from None
                tokenizers[name], ends[name] = tokenizers[base], ends[base]
            first = zoo.monolith(next(iter(zoo.chains)))
            usual = getattr(tokenizers[next(iter(zoo.chains))], "model_max_length", 0)
            positions = context_length(first) or (int(usual) if 0 < usual < 10**7 else None)
            backend = ZooBackend(SharedModel(zoo), kv_gib=self.kv_gib, positions=positions)
            scheduler = Scheduler(
                backend, max_running=self.max_running, prefill_chunk=self.prefill_chunk, steps=MOST_STEPS
            )
            doors: set[Door] = set()
            engines = []
            for name, one in zoo.chains.items():
                door, text = Door(scheduler, name, doors), " ".join((*one.blocks.values(), *one.adapters.values()))
                model = zoo.monolith(name)
                model.generation_config = ends[name]  # where the end tokens stand
                engines.append(self.add(name, model, tokenizers[name], scheduler=door, recipe=text))
            self._sources |= dict(models)
            self._parents |= {name: base for name, _, base in adapted}
            return engines

    def unload(self, name: str) -> Engine:
        """Take a model away from clients. What runs on it goes on: the caller closes the engine. Raises ApiError 404 without one."""
        with self._changing:
            if name not in self._engines:
                raise no_model(f"no model {name[:200]!r} here")
            if children := [child for child, parent in self._parents.items() if parent == name]:
                raise ApiError(
                    409, f"the adapters {', '.join(children)} need this model; unload them first", param="model"
                )
            self._sources.pop(name, None)
            self._parents.pop(name, None)
            engine = self._engines.pop(name)
            self._leaving.add(engine)
            return engine

    def of(self, document: Mapping[str, Any]) -> Engine:
        """The engine a request is for. Raises ApiError 404 for a model that is not here, 503 while there is none."""
        return self.routed(document)[0]

    def routed(self, document: Mapping[str, Any]) -> tuple[Engine, Choice | None]:
        """The engine a request is for, and what the router did, if it was asked. Raises what `of` raises."""
        from assay.server.fields import checked, text

        wanted = document.get("model")
        name = "" if wanted is None else checked("model", text, wanted)
        engines = dict(self._engines)  # as they are now: others may be loaded or unloaded meanwhile
        if not engines:
            what = "the model is still loading" if self.loading else "no model is loaded"
            raise ApiError(503, what, code="loading" if self.loading else "no_model", headers={"Retry-After": "5"})
        choice = None
        if name == AUTO and self.router is not None:
            start = time.monotonic()
            chosen = self.router(document)
            name, tokens = chosen if isinstance(chosen, tuple) else (chosen, 0)
            choice = Choice(name, tokens, time.monotonic() - start)
        if name in ("", AUTO):
            return next(iter(engines.values())), choice
        if name not in engines:
            known = ", ".join(map(repr, [*engines][:20]))
            raise no_model(f"no model {name[:100]!r} here; this server has {known}")
        return engines[name], choice

    def card(self, name: str) -> dict[str, Any]:
        """What /v1/models says of a model. Raises ApiError 404 if it is not here."""
        engine = self._engines.get(name)
        if engine is None:
            raise no_model(f"no such model here; this server has {', '.join(map(repr, [*self._engines][:20]))}")
        return {
            "id": name,
            "object": "model",
            "created": engine.created,
            "owned_by": "assay",
            "context_length": engine.context,
            "parent": self._parents.get(name),
            "backend": engine.backend,
            "backend_reason": engine.backend_reason,
            "embeddings": engine.no_embeddings or POOLING,
            "system_fingerprint": engine.fingerprint,
        }

    def names(self) -> list[str]:
        """The names of all models."""
        return list(self._engines)

    def stop(self) -> None:
        """End all that runs at once; its clients are told. May be called from any thread."""
        for engine in [*self.engines(), *self._leaving]:
            engine.stop()

    def close(self) -> None:
        """End the schedulers. Blocks."""
        for engine in self.engines():
            engine.close()

    def _first(self) -> str:
        return next(iter(self._engines), "")

    def _require_free(self, name: str) -> None:
        if (
            not isinstance(name, str)
            or not re.fullmatch(r"[^\s\x00-\x1f\x7f](?s:.)*", name)
            or not name.strip()
            or name == AUTO
        ):
            raise InputError(f"a model's name must be a word other than {AUTO!r}, got {str(name)[:100]!r}")
        if name in self._engines:
            raise InputError(f"there is a model {name[:100]!r} already; give each a name of its own")


def find_recipe(source: str) -> str | None:
    """The text of the recipe in a model's folder; None where there is none."""
    from assay.tuner.artefact import RECIPE
    from assay.workloads.models import find_model

    found = find_model(source)
    file = found / RECIPE
    return file.read_text(encoding="utf-8") if found.is_dir() and file.is_file() else None


def _identity(folder: Path) -> str:
    """What an adapter is known by in the fingerprint: a hash of its files."""
    import hashlib

    found = hashlib.sha256()
    for name in (adapters.CONFIG, adapters.WEIGHTS):
        file = folder / name
        if file.is_file():
            with open(file, "rb") as opened:
                found.update(hashlib.file_digest(opened, "sha256").digest())
    return found.hexdigest()

"""The models of a server by name: loaded at the start or while it runs, as they are or with a LoRA adapter."""

from __future__ import annotations

import functools
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
from assay.server.scheduler import MOST_STEPS, Scheduler, Stopped
from assay.workloads.context import context_length

AUTO = "auto"  # the name that stands for whatever the router chooses

Router = Callable[[Mapping[str, Any]], str | tuple[str, int]]
"""From a request's JSON object, not yet checked, to a model's name; or to the name and the tokens that choosing it took."""


class Models:
    """Engines by name, in the order they came. The first is the one that clients get who name none.

    `router` chooses the model for a request whose `model` is "auto". By default that is the first model. It runs in the thread that
    reads requests, so that the time it takes is in every answer's, and its tokens are in the answer's usage. It is not asked for
    embeddings, which can be compared only if they come from one model: there "auto" is always the first.
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
        self._variants: Any = None  # those that share their blocks, if any do (`zoo.Variants`)
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
        """Load MODEL_OR_DIR and serve it. Raises what `load_tuned` raises, and InputError for a bad name.

        Where models share their blocks, this one joins them, and InputError is also raised for one that cannot.
        """
        from assay.tuner.artefact import load_tuned
        from assay.tuner.names import RECIPE

        with self._changing:
            self._require_free(name)
            if self._variants is not None:
                return self._join(name, source)
            loaded = load_tuned(source, allow_download=self.allow_download)
            recipe = loaded.folder / RECIPE
            text = recipe.read_text(encoding="utf-8") if recipe.is_file() else ""
            engine = self.add(name, loaded.model, loaded.tokenizer, recipe=text)
            self._sources[name] = str(source)
            return engine

    def load_adapter(self, name: str, folder: str, base: str | None = None) -> Engine:
        """Serve a model with a LoRA adapter, beside the model without it; `base` names that (None: the first).

        Where the base is served as it is stored, the two share all weights but those that the adapter changes. Where a recipe was
        applied to it, its weights are loaded once more, changed, and the recipe applied to them. Where models share their blocks, the
        adapter joins them: only its factors are new.
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
            if self._variants is not None:
                return self._join_adapter(name, path, base)
            parent, text = self._engines[base], f"adapter {adapters.identity(path)}"
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

        What they have in common is in memory once, and their requests share batches, each under its own name; what is loaded later joins
        them. Raises as `load`, and InputError for no models, a name that is given twice, models of other shapes or with a recipe, adapters
        that do not fit, and where models share their blocks already; nothing is served then.
        """
        from assay.methods.serving.blockllm import Zoo
        from assay.server.zoo import Variants

        with self._changing:
            if not models or self._variants is not None:
                raise InputError("name at least one model" if not models else "models share their blocks here already")
            for name in [*(name for name, _ in models), *(name for name, *_ in adapted)]:
                self._require_free(name)
            zoo, told = Zoo(), dict[str, tuple[Any, Any]]()  # their tokenizers and generation configurations
            for name, source in models:
                loaded = self._stored(source)
                told[name] = loaded.tokenizer, loaded.model.generation_config
                _into(source, zoo.add, name, loaded.model)
                del loaded  # what was new is in the zoo
            for name, folder, base in adapted:
                factors = adapters.read(Path(folder).expanduser())
                _into(folder, zoo.add_adapter, name, base, factors)
                told[name] = told[base]
            name = next(iter(zoo.chains))
            first, usual = zoo.monolith(name), getattr(told[name][0], "model_max_length", 0)
            positions = context_length(first) or (int(usual) if 0 < usual < 10**7 else None)
            options = {"max_running": self.max_running, "prefill_chunk": self.prefill_chunk, "steps": MOST_STEPS}
            making = functools.partial(Variants, zoo, kv_gib=self.kv_gib, positions=positions, **options)
            self._variants = _into("--share-blocks", making)
            self._sources |= dict(models)
            self._parents |= {name: base for name, _, base in adapted}
            return [self._behind(door, *told[name]) for name, door in self._variants.doors().items()]

    def _stored(self, source: str) -> Any:
        """A model as it is stored. Raises InputError for one with a recipe."""
        from assay.tuner.artefact import load_tuned

        if find_recipe(source) is not None:
            raise InputError(
                f"{source}: blocks are shared between models as they are stored, and this one has a recipe"
            )
        return load_tuned(source, allow_download=self.allow_download)

    def _behind(self, door: Any, tokenizer: Any, generation: Any) -> Engine:
        """The engine of a model that shares its blocks; `generation` is the configuration in which its end tokens stand."""
        zoo = self._variants.zoo
        one, model = zoo.chain(door.tenant), zoo.monolith(door.tenant)
        model.generation_config = generation
        text = " ".join((*one.blocks.values(), *one.adapters.values()))
        return self.add(door.tenant, model, tokenizer, scheduler=door, recipe=text)

    def _join(self, name: str, source: str) -> Engine:
        loaded = self._stored(source)
        door = _into(source, self._variants.join, name, lambda zoo: zoo.add(name, loaded.model))
        self._sources[name] = str(source)
        return self._behind(door, loaded.tokenizer, loaded.model.generation_config)

    def _join_adapter(self, name: str, folder: Path, base: str) -> Engine:
        factors, parent = adapters.read(folder), self._engines[base]
        door = _into(folder, self._variants.join, name, lambda zoo: zoo.add_adapter(name, base, factors))
        self._parents[name] = base
        return self._behind(door, parent.tokenizer, parent.model.generation_config)

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
            if not any(hasattr(one.scheduler, "variants") for one in self._engines.values()):
                self._variants = None  # their scheduler ends with the last of them
            return engine

    def of(self, document: Mapping[str, Any]) -> Engine:
        """The engine a request is for, the router not asked. Raises ApiError 404 for a model that is not here, 503 while there is none."""
        return self._found(document, None)[0]

    def routed(self, document: Mapping[str, Any]) -> tuple[Engine, Choice | None]:
        """The engine a request is for, and what the router did, if it was asked. Raises what `of` raises."""
        return self._found(document, self.router)

    def _found(self, document: Mapping[str, Any], router: Router | None) -> tuple[Engine, Choice | None]:
        from assay.server.fields import checked, text

        wanted = document.get("model")
        name = "" if wanted is None else checked("model", text, wanted)
        engines = dict(self._engines)  # as they are now: others may be loaded or unloaded meanwhile
        if not engines:
            what = "the model is still loading" if self.loading else "no model is loaded"
            raise ApiError(503, what, code="loading" if self.loading else "no_model", headers={"Retry-After": "5"})
        choice = None
        if name == AUTO and router is not None:
            start = time.monotonic()
            chosen = router(document)
            name, tokens = chosen if isinstance(chosen, tuple) else (chosen, 0)
            choice = Choice(name, tokens, time.monotonic() - start)
        if name in ("", AUTO):
            return next(iter(engines.values())), choice
        if name not in engines and choice is not None:  # not its client's mistake
            state = "is still loading" if self.loading else "is not loaded"
            raise ApiError(
                503,
                f"the router chose {name[:100]!r}, which {state}",
                code="loading" if self.loading else "no_model",
                headers={"Retry-After": "5"},
            )
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
            "backend_reason": getattr(getattr(engine.scheduler, "backend", None), "reason", engine.backend_reason),
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
    from assay.tuner.names import RECIPE
    from assay.workloads.models import find_model

    found = find_model(source)
    file = found / RECIPE
    return file.read_text(encoding="utf-8") if found.is_dir() and file.is_file() else None


def _into(source: object, add: Callable[..., Any], *given: Any) -> Any:
    """What `add` returns, with what it refuses said as an InputError."""
    try:
        return add(*given)
    except (ValueError, Stopped) as error:
        raise InputError(f"{source}: {error}") from None

"""What runs a draft: a model over its own growing cache, or the compiled decoder over pages. Both can take tokens back.

An engine holds one sequence. `extend` runs several tokens in one pass, each of which sees all before it; `crop` forgets the last ones.
"""

from __future__ import annotations

import inspect
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from assay.methods.core.generation.paged import PAGE, Sequence

CROPPED = (DynamicLayer, DynamicSlidingWindowLayer)  # layers of a cache from which the last tokens can be taken


class Engine(Protocol):
    """A sequence that can be extended and cropped.

    `more` is what each further token of a pass costs, as a share of a pass over one token. It decides how long drafts are, not what
    tokens come out.
    """

    more: float

    @property
    def length(self) -> int:
        """Tokens that it holds."""
        ...

    def extend(self, tokens: list[int]) -> Tensor:
        """Run the next tokens; their logits (len(tokens), vocabulary) float32, a tensor that the caller may write to."""
        ...

    def crop(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        ...


class ModelEngine:
    """Any causal model of transformers over a `DynamicCache`, a new one by default; `limit` is the most positions it has, if it says.

    Layers with a sliding window keep what they would drop until it is known which tokens stand.
    Raises ValueError for a cache of which tokens cannot be taken back.
    """

    more = 0.1  # our choice: on two cores a pass of a small model costs a little more with each token

    def __init__(self, model: Any, cache: DynamicCache | None = None) -> None:
        self.model = model
        config = self.model.config.get_text_config(decoder=True)
        self.cache = DynamicCache(config=config) if cache is None else cache
        if reason := cannot_crop(self.cache):
            raise ValueError(f"cache must be one of which tokens can be taken back: {reason}")
        self.cache.activate_past_recording()
        self.limit: int | None = getattr(config, "max_position_embeddings", None)
        taken = inspect.signature(self.model.forward).parameters
        self._positions, self._keeps = "position_ids" in taken, "logits_to_keep" in taken

    @property
    def length(self) -> int:
        return int(self.cache.get_seq_length())

    @torch.no_grad()
    def extend(self, tokens: list[int], *, last: bool = False) -> Tensor:
        """See `Engine`; with `last`, of the last token only (1, vocabulary)."""
        ids = torch.tensor([tokens], device=self.model.device)
        options: dict[str, Any] = {"cache": self.cache, "use_cache": True}
        if self._positions:
            start = self.length
            options["position_ids"] = torch.arange(start, start + len(tokens), device=ids.device)[None]
        if last and self._keeps:
            options["logits_to_keep"] = 1
        logits: Tensor = self.model(**self.model.prepare_inputs_for_generation(ids, **options)).logits[0]
        return (logits[-1:] if last else logits).float()

    def crop(self, length: int) -> None:
        if self.length:  # even if nothing is taken back: layers with a window then drop what they no longer need
            self.cache.crop(length - self.length)


def cannot_crop(cache: Any) -> str:
    """Why tokens cannot be taken back from a cache, or an empty string: a recurrent state has forgotten how it was before them."""
    if type(cache) is not DynamicCache:
        return f"it is a {type(cache).__name__}, not a DynamicCache"
    if cache.offloading:
        return "it is offloaded"
    other = next((layer for layer in cache.layers if type(layer) not in CROPPED), None)
    return "" if other is None else f"a layer of it is a {type(other).__name__}"


def forget_past(cache: Cache) -> None:
    """Let layers with a window drop tokens at once again, for a cache that goes back to its owner."""
    cache.crop(0)
    for layer in cache.layers:
        if hasattr(layer, "record_past"):
            layer.record_past = False


class PagedDecoder(Protocol):
    """What is needed of `decode_loop.Decoder`."""

    def new_pool(self, pages: int) -> Any: ...
    def extend(self, pool: Any, feeds: list[tuple[Any, list[int]]], *, logits: str) -> Tensor: ...


class PagedEngine:
    """A sequence in pages, run by the compiled decoder. Its pages must cover all that is fed; taking tokens back is a shorter length."""

    more = 0.25  # our choice: the packed weights are read once a pass, the multiplications are done for each token

    def __init__(self, decoder: PagedDecoder, pool: Any, sequence: Any) -> None:
        self.decoder, self.pool, self.sequence = decoder, pool, sequence

    @classmethod
    def of_cache(cls, decoder: PagedDecoder, cache: DynamicCache, room: int) -> PagedEngine:
        """The sequence that a prefill has left in a cache of transformers, copied into pages with room for `room` more tokens."""
        length = int(cache.get_seq_length())
        pool = decoder.new_pool(-(-(length + room) // PAGE))
        pages = pool.take(pool.pages)
        layers: list[Any] = cache.layers
        keys, values = (torch.stack([getattr(layer, name)[0] for layer in layers]) for name in ("keys", "values"))
        pool.write(pages, 0, keys.to(pool.keys.dtype), values.to(pool.values.dtype))
        return cls(decoder, pool, Sequence(pages, length))

    @property
    def length(self) -> int:
        return int(self.sequence.length)

    def extend(self, tokens: list[int]) -> Tensor:
        return self.decoder.extend(self.pool, [(self.sequence, tokens)], logits="all")

    def crop(self, length: int) -> None:
        self.sequence.length = length

    def give_back(self, cache: DynamicCache) -> None:
        """Append what was decoded to the cache the prefill left."""
        start = int(cache.get_seq_length())
        if self.length > start:
            keys, values = self.pool.read(self.sequence.pages, start, self.length)
            for layer, own_keys, own_values in zip(cache.layers, keys, values, strict=True):
                found: Any = layer
                found.update(own_keys[None].to(found.keys.dtype), own_values[None].to(found.values.dtype))

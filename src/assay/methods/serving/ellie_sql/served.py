"""The router behind `model="auto"` of a server: which of its models answers a request, by what the request asks.

    router = ModelRouter.trained(["small", "large"], texts, results, costs, most_lost=0.02)
    router.save("router.json")                       # then: assay serve small large --router router.json
    router({"messages": [{"role": "user", "content": "..."}]})      # ("small", 0): the model, and the tokens that choosing took

`texts` are requests of the past, `results` how well each model answered them, `costs` what that took. The features are hashed words, which
take no tokens and microseconds; the file is JSON and holds numbers only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from assay import checks
from assay.errors import InputError
from assay.methods.serving.ellie_sql.routing import HOW, TierRouter, hashed_words, tuned_threshold
from assay.methods.serving.ellie_sql.schema import words
from assay.paths import atomic_file

FORMAT = 1
WIDTH = 256
MOST_WORDS = 2000  # of a request that are looked at, the last ones


def request_text(document: Mapping[str, Any]) -> str:
    """What a request to one of OpenAI's endpoints asks: its prompt, its input, or its last message of a user; "" for token ids.

    Malformed requests give what text they have: the server refuses them after routing.

    >>> request_text({"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]})
    'Why?'
    """
    if "messages" not in document:
        asked = document.get("prompt", document.get("input"))
        if isinstance(asked, list) and any(isinstance(one, dict) and "role" in one for one in asked):
            return _last(asked)
        return _text(asked)
    return _last(document["messages"])


def _last(messages: Any) -> str:
    """The last message of a user, else the last."""
    given = [one for one in messages if isinstance(one, dict)] if isinstance(messages, list) else []
    users = [one for one in given if one.get("role") == "user"] or given
    return _text(users[-1].get("content")) if users else ""


def _text(asked: Any) -> str:
    if isinstance(asked, str):
        return asked
    if isinstance(asked, dict):
        return _text(asked.get("text"))
    if isinstance(asked, list):
        return " ".join(filter(None, map(_text, asked)))
    return ""


def request_features(texts: Sequence[str], *, width: int = WIDTH) -> np.ndarray:
    """Hashed words of any script, and the logarithm of how many there are, (n, width + 1)."""
    read = [words(text)[-MOST_WORDS:] for text in texts]
    lengths = np.log1p([[len(one)] for one in read]) / 5 if read else np.zeros((0, 1))
    return np.hstack([hashed_words(read, width=width), lengths])


class ModelRouter:
    """A fitted `TierRouter` over the models of a server, cheapest first; see the module's text.

    Calling it with a request's JSON object gives (name, tokens that choosing took: 0). It raises nothing for what a request holds, but
    RecursionError for a thousand lists in one another.
    """

    def __init__(self, names: Sequence[str], router: TierRouter, *, width: int = WIDTH) -> None:
        self.names, self.router, self.width = list(names), router, checks.whole("width", width, low=1)
        if len(set(self.names)) != len(self.names) or len(self.names) != router.tiers_:
            raise ValueError(f"names must be {router.tiers_} different models, got {self.names}")

    def __call__(self, document: Mapping[str, Any]) -> tuple[str, int]:
        features = request_features([request_text(document)], width=self.width)
        return self.names[int(self.router.predict(features)[0])], 0

    @classmethod
    def trained(
        cls,
        names: Sequence[str],
        texts: Sequence[str],
        results: Any,
        costs: Any,
        *,
        most_lost: float = 0.01,
        strength: float = 1.0,
        width: int = WIDTH,
    ) -> ModelRouter:
        """A cascade of logistic regressions, its threshold tuned on requests it had not learnt from: the cheapest that loses at most
        `most_lost` accuracy of always taking the last model. `strength` is the regressions' C.

        Raises ValueError for what does not fit together, or fewer than five texts.
        """
        from sklearn.linear_model import LogisticRegression

        features = request_features(texts, width=width)
        plain = TierRouter(
            LogisticRegression(C=checks.number("strength", strength, above=0), max_iter=1000), how="cascade"
        )
        threshold, _ = tuned_threshold(plain, features, results, costs, most_lost=most_lost)
        return cls(names, plain.set_params(threshold=threshold).fit(features, results), width=width)

    def save(self, path: str | Path) -> None:
        """Write it as JSON, whole or not at all. Raises ValueError for classifiers that are not linear."""
        router = self.router
        document = {
            "format": FORMAT,
            "models": self.names,
            "width": self.width,
            "how": router.how,
            "threshold": float(router.threshold),
            "prices": router.prices_.tolist() if router.how == "cost" else None,
            "classifiers": [_stored(one) for one in router.classifiers_],
        }
        with atomic_file(Path(path)) as temporary:
            temporary.write_text(json.dumps(document), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> ModelRouter:
        """Read what `save` wrote. Raises InputError, naming the file, for anything else: every number is checked."""
        try:
            return cls._read(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise InputError(
                f"{path}: no router that assay wrote ({type(error).__name__}: {str(error)[:200]})"
            ) from None

    @classmethod
    def _read(cls, document: Any) -> ModelRouter:
        if document["format"] != FORMAT:
            raise ValueError(f"format must be {FORMAT}, got {document['format']!r}")
        names = list(document["models"])
        if not all(isinstance(name, str) for name in names):
            raise TypeError(f"models must be names, got {checks.shown(names)}")
        width = checks.whole("width", document["width"], low=1, high=1 << 16)
        router = TierRouter(
            how=checks.choice("how", document["how"], HOW), threshold=checks.number("threshold", document["threshold"])
        )
        router.tiers_, router.n_features_in_ = len(names), width + 1
        classes = len(names) if router.how == "label" else 2
        router.classifiers_ = [_restored(one, classes, width + 1) for one in document["classifiers"]]
        wanted = {"label": 1, "cascade": len(names) - 1, "cost": len(names)}[router.how]
        if len(names) < 2 or len(router.classifiers_) != wanted:
            raise ValueError(f"{len(names)} models and {len(router.classifiers_)} classifiers do not fit")
        if router.how == "cost":
            router.prices_ = np.array([checks.number("prices", one, low=0, high=1) for one in document["prices"]])
            if len(router.prices_) != len(names):
                raise ValueError(f"prices must be {len(names)}, got {len(router.prices_)}")
        return cls(names, router, width=width)


class _Linear:
    """A fitted logistic regression as it was stored: `classes_`, and `predict_proba` as scikit-learn has it."""

    def __init__(self, classes: list[int], weights: np.ndarray, bias: np.ndarray) -> None:
        self.classes_, self.coef_, self.intercept_ = np.array(classes), weights, bias

    def predict_proba(self, X: np.ndarray) -> np.ndarray:
        """Probabilities, (n, classes)."""
        scores = X @ self.coef_.T + self.intercept_
        if scores.shape[1] == 1:
            scores = np.hstack([np.zeros_like(scores), scores])
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def _stored(classifier: Any) -> Any:
    if isinstance(classifier, int):
        return classifier
    if not hasattr(classifier, "coef_") or not hasattr(classifier, "intercept_"):
        raise ValueError(f"a router of {type(classifier).__name__} cannot be saved: it is not linear")
    return {
        "classes": [int(one) for one in classifier.classes_],
        "weights": np.asarray(classifier.coef_, dtype=np.float64).tolist(),
        "bias": np.asarray(classifier.intercept_, dtype=np.float64).tolist(),
    }


def _restored(stored: Any, classes: int, width: int) -> Any:
    if isinstance(stored, int):
        return checks.whole("classifiers", stored, low=0, high=classes - 1)
    known = [checks.whole("classes", one, low=0, high=classes - 1) for one in stored["classes"]]
    weights, bias = np.array(stored["weights"], dtype=np.float64), np.array(stored["bias"], dtype=np.float64)
    rows = 1 if len(known) == 2 else len(known)
    if len(set(known)) < 2 or len(set(known)) != len(known) or weights.shape != (rows, width) or bias.shape != (rows,):
        raise ValueError(f"classes {known}, weights of shape {weights.shape} and bias of shape {bias.shape} do not fit")
    if not (np.isfinite(weights).all() and np.isfinite(bias).all()):
        raise ValueError("weights must be finite, got NaN or infinity")
    return _Linear(known, weights, bias)

"""What a tuning run found, in sentences: the same ones in the terminal and in the report."""

from __future__ import annotations

from typing import Any


def quality_words(quality: dict[str, Any], limit: float) -> str:
    """The loss and the interval that decides, against the limit, as a sentence.

    >>> found = {"drop": 0.004, "low": 0.002, "high": 0.006, "level": 0.98, "documents": 15, "verdict": "holds", "judged": True}
    >>> for end in quality_words(found, 0.01).split("; "):
    ...     print(end)
    Perplexity rises by 0.40 %
    over 15 documents, with 98 % certainty, by 0.20 % to 0.60 %, all of it within the 1 % allowed.
    >>> quality_words({**found, "high": 0.012, "verdict": "undecided"}, 0.01).split("documents, ")[1]
    'with 98 % certainty, by 0.20 % to 1.20 %, so it may be more than the 1 % allowed.'
    """
    drop, low, high = (quality[name] for name in ("drop", "low", "high"))
    allowed = f"the {100 * limit:g} % allowed"
    if drop is None or not abs(drop) < float("inf"):
        return f"Quality lost: the likelihoods are not finite. It counts as more than {allowed}."
    if quality["judged"] and not quality.get("looks", True):
        return "It is the model as loaded: nothing is lost."
    if drop == low == high == 0 and quality["judged"]:
        return f"Perplexity is the same on every document; {100 * limit:g} % more would be allowed."
    moves, sign = ("rises", 1) if drop >= 0 else ("falls", -1)
    words = f"erplexity {moves} by {100 * abs(drop):.2f} %"
    if low is not None and high is not None:
        ends = (low, high) if sign > 0 else (-high, -low)
        words += f"; over {quality['documents']} documents, with {100 * quality['level']:g} % certainty, by "
        words += f"{100 * ends[0]:.2f} % to {100 * ends[1]:.2f} %"
    if not quality["judged"]:
        return (
            f"P{words}. That is what the search saw, by which it was chosen; it decides nothing: {quality['reason']}."
        )
    if quality["verdict"] == "holds":
        return f"P{words}, all of it within {allowed}."
    if quality["verdict"] == "lost":
        return f"Quality lost: p{words}, all of it more than {allowed}."
    return f"Quality undecided: p{words}, so it may be more than {allowed}."


def close_words(quality: dict[str, Any]) -> str:
    """How closely the saved model follows the one as loaded; empty where that was not measured.

    >>> kl, top1 = {"mean": 0.00123, "low": 0.001, "high": 0.0015}, {"mean": 0.987, "low": 0.98, "high": 0.99}
    >>> for part in close_words({"kl": kl, "top1": top1}).split("; "):
    ...     print(part)
    KL from the model as loaded: 0.0012 nats a token (0.0010 to 0.0015)
    the most likely token is the same at 98.7 % of places (98.0 to 99.0).
    """
    kl, top1 = quality["kl"], quality["top1"]
    if not quality.get("looks", True) or not kl or not top1 or kl["mean"] is None or top1["mean"] is None:
        return ""
    return (
        f"KL from the model as loaded: {kl['mean']:.4f} nats a token{_spread(kl, 1, 4)}; the most likely token is the same at "
        f"{100 * top1['mean']:.1f} % of places{_spread(top1, 100, 1)}."
    )


def eval_words(scores: dict[str, Any] | None, limit: float) -> str:
    """Both models' scores on the user's evaluation, as a sentence; empty where there is none."""
    if not scores:
        return ""
    words = (
        f"{scores['name']} ({scores['metric']}, {scores['prompts']} prompts): {scores['baseline']:.3f} as loaded, "
        f"{scores['candidate']:.3f} tuned; {100 * scores['lost']:.1f} points lost, with {100 * scores['level']:g} % certainty "
        f"{100 * scores['low']:.1f} to {100 * scores['high']:.1f}, where {100 * limit:g} are allowed"
    )
    verdict = {"holds": "it holds", "lost": "quality lost", "undecided": "quality undecided"}[scores["verdict"]]
    return f"{words}: {verdict}{', for ' + scores['reason'] if scores['reason'] else ''}."


def papers_words(papers: dict[str, Any]) -> str:
    """What of the result is the papers', as a sentence.

    >>> papers_words({"methods": [], "own": ["weight_only"], "speedup": None, "share": None, "over": "", "exact": False})
    "No paper's method is in the recipe: beyond the free baseline it is assay's own weight_only."
    """
    methods, own = ", ".join(papers["methods"]), ", ".join(papers["own"])
    if not papers["methods"]:
        rest = (
            f"beyond the free baseline it is assay's own {own}" if own else "it is what is free, or the model as loaded"
        )
        return f"No paper's method is in the recipe: {rest}."
    if papers["speedup"] is None:
        besides = f" besides assay's own {own}" if own else ""
        return f"The papers' methods in it are {methods}{besides}; what they add by themselves was not measured."
    ratio = papers["speedup"]
    share = papers["share"]
    part = "" if share is None else f", {100 * share:.0f} % of the ratio over free by logarithms"
    kind = "exact" if papers["exact"] else "not exact"
    rest = f"; the rest is assay's own {own} ({kind})" if own else ""
    return f"The papers' part is {ratio['median']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f}) of {methods}{part}{rest}."


def saved_words(document: dict[str, Any]) -> str:
    """Why what is saved is no candidate; empty if it is one."""
    if document["helped"]:
        return ""
    limit = document["max_drop"]
    if not document["judged"]:
        why = "No method was assessed in the time there was (see --minutes)."
    elif not document["tried"]:
        why = "No method beat the free baseline in the search within the allowed loss."
    else:
        why = " ".join(tried_words(one, limit) for one in document["tried"])
    what = (
        "The free baseline"
        if document["best"]["label"] == document["free_baseline"]["label"]
        else "The model as loaded"
    )
    return f"{why} {what} was saved."


def tried_words(one: dict[str, Any], limit: float) -> str:
    """What was decided about a candidate, as a sentence or two."""
    look = one["looks"][-1] if one["looks"] else None
    if one["verdict"] == "holds":
        return f"{one['label']} keeps the quality, but did not beat the free baseline for certain."
    if look is None:
        return f"{one['label']}: quality undecided, for {one['reason']}."
    if one.get("eval") and one["eval"]["verdict"] != "holds":
        return f"{one['label']}: {eval_words(one['eval'], limit)}"
    return f"{one['label']}: {_lower(quality_words({**look, 'judged': True, 'reason': ''}, limit))}"


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _spread(found: dict[str, Any], scale: float, digits: int) -> str:
    if found["low"] is None or found["high"] is None:
        return ""
    return f" ({scale * found['low']:.{digits}f} to {scale * found['high']:.{digits}f})"

"""The ways that draw whole answers: one, the best of N, majority, weighted majority, and self-refinement."""

from __future__ import annotations

from collections.abc import Callable

from assay import checks
from assay.methods.core.reasoning import selectors
from assay.methods.core.reasoning.generator import seed_of
from assay.methods.reasoning.bag_of_tricks_ttc.asking import Asking, Outcome


def one(asking: Asking, n: int = 1) -> Outcome:
    """A single sample: the naive baseline, and with temperature 0 greedy decoding. `n` must be 1."""
    checks.whole("n", n, low=1, high=1)
    (sample,) = asking.samples(1)
    return Outcome(sample.text, asking.answer_of(sample.text))


def best_of_n(asking: Asking, n: int = 32) -> Outcome:
    """The sample of N that the verifier scores highest, the first of equal ones.

    When NOT to use it: with a verifier that knows little; the more samples, the surer it picks what deceives it.
    """
    samples = asking.samples(n)
    chosen = samples[selectors.best_of_n(asking.scores(samples))]
    return Outcome(chosen.text, asking.answer_of(chosen.text))


def majority(asking: Asking, n: int = 32, *, tries: int = 5) -> Outcome:
    """The most frequent answer of N samples (self-consistency); where none holds an answer, N are drawn again, `tries` times in all.

    Gives the first sample with that answer. What was drawn in vain is booked like the rest.
    """
    for round_ in range(checks.whole("tries", tries, low=1)):
        samples = asking.samples(n, seed=seed_of("again", asking.seed, round_) if round_ else asking.seed)
        answers = [asking.answer_of(sample.text) for sample in samples]
        if any(answers) or asking.budget.over:
            break
    answer = selectors.majority(answers)
    return Outcome(samples[answers.index(answer)].text, answer)


def weighted_majority(asking: Asking, n: int = 32) -> Outcome:
    """The answer of N samples whose scores weigh most together, scores stretched to [0, 1] first; of its samples the best-scored one.

    The stretching makes it blind to the scale and the origin of scores, and gives the worst sample no say: with two samples the winner
    takes all. Equal scores make it the majority.
    """
    samples = asking.samples(n)
    answers = [asking.answer_of(sample.text) for sample in samples]
    scores = asking.scores(samples)
    answer = selectors.weighted(answers, selectors.min_max(scores))
    members = [i for i, own in enumerate(answers) if own == answer]
    chosen = members[selectors.best_of_n([scores[i] for i in members])]
    return Outcome(samples[chosen].text, answer)


Feedback = Callable[[str, str], str]
"""The prompt that asks for feedback: of (prompt, text so far)."""
Revision = Callable[[str, str, str], str]
"""The prompt that asks for a revision: of (prompt, text so far, feedback)."""


def asks_for_feedback(prompt: str, text: str) -> str:
    """A plain prompt for feedback."""
    return f"{prompt}{text}\n\nIs there an error in this answer? Say where, or say: no error.\nFeedback:"


def asks_for_revision(prompt: str, text: str, feedback: str) -> str:
    """A plain prompt for a revision: the draft, what was said of it, and the question again."""
    return f"{prompt}{text}\n\nFeedback: {feedback.strip()}\n\nThe answer, corrected:\n{prompt}"


def self_refine(
    asking: Asking,
    n: int = 3,
    *,
    feedback: Feedback = asks_for_feedback,
    revision: Revision = asks_for_revision,
    content: str = "no error",
) -> Outcome:
    """One answer, then `n` rounds of feedback and revision by the same model, until the feedback holds `content` (letters of any case).

    Feedback is booked as "verify". The prompts are our choice; give `feedback` and `revision` in the form that your model knows.

    When NOT to use it: with a model that cannot tell a right answer from a wrong one.
    """
    n, content = checks.whole("n", n, low=0), content.lower()
    (draft,) = asking.samples(1)
    text = draft.text
    for number in range(n):
        if asking.budget.over:
            break
        said = asking.once(feedback(asking.prompt, text), "verify", number).text
        if content in said.lower() or asking.budget.over:
            break
        text = asking.once(revision(asking.prompt, text, said), "solve", number).text
    return Outcome(text, asking.answer_of(text))

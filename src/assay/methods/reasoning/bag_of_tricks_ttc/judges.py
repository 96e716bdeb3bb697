"""Verifiers of this comparison besides the shared ones: a model that judges itself, and one that remembers what it said."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from assay import checks
from assay.methods.core.reasoning.budget import Spent
from assay.methods.core.reasoning.generator import Generator, Sampling, seed_of
from assay.methods.core.reasoning.trace import Trace
from assay.methods.core.reasoning.verifier import Scores, Verifier, texts_of


def says_yes(text: str) -> bool:
    """Whether a judgement begins with yes.

    >>> says_yes(" Yes, it is."), says_yes("no")
    (True, False)
    """
    return text.strip().lower().startswith("yes")


class SelfEvaluation:
    """A model's own judgement: the share of `votes` samples that call a text right, asked by `question(prompt, text so far)`.

    Show it all steps and it judges the process; show it the bare answer and it judges the result. `votes` is 3 in the paper. Every vote
    is charged. With temperature 0 all votes are one: draw one.

    When NOT to use it: where nothing shows that the model can judge. The paper finds it a weak selector, and small models say one thing to
    everything.
    """

    def __init__(
        self,
        generator: Generator,
        question: Callable[[str, str], str],
        sampling: Sampling,
        *,
        votes: int = 3,
        right: Callable[[str], bool] = says_yes,
        seed: int = 0,
    ) -> None:
        self.generator, self.question, self.sampling, self.right = generator, question, sampling, right
        self.votes = checks.whole("votes", votes, low=1)
        self.seed = seed_of("judge", checks.whole("seed", seed)) >> 1  # not the samples that it judges

    def score(self, traces: Sequence[Trace]) -> Scores:
        """The share of votes for every step; a text that stands several times is asked about once."""
        asked = {
            (trace.prompt, text): self.question(trace.prompt, text) for trace in traces for text in texts_of(trace)
        }
        prompts = list(dict.fromkeys(asked.values()))
        drawn = self.generator(prompts, self.sampling, n=self.votes, seed=self.seed) if prompts else []
        share = {
            prompt: sum(self.right(sample.text) for sample in samples) / self.votes
            for prompt, samples in zip(prompts, drawn, strict=True)
        }
        spent = sum((sample.spent for samples in drawn for sample in samples), Spent())
        return [[share[asked[trace.prompt, text]] for text in texts_of(trace)] for trace in traces], spent


class Remembered:
    """A verifier that is asked about each text once: a step scored before costs nothing and gets the score it had.

    Only for verifiers that look at nothing but prompt and text (`LogProbability` looks at samples).
    """

    def __init__(self, verifier: Verifier) -> None:
        self.verifier = verifier
        self._known: dict[tuple[str, str], float] = {}

    def score(self, traces: Sequence[Trace]) -> Scores:
        """As the verifier has it."""
        asked = dict.fromkeys((trace.prompt, text) for trace in traces for text in texts_of(trace))
        unknown = [one for one in asked if one not in self._known]
        # each text as a trace of one step: a verifier scores all steps that it is given
        each = [Trace(prompt, (text,)) for prompt, text in unknown]
        found, spent = self.verifier.score(each) if each else ([], Spent())
        self._known.update((one, score) for one, (score,) in zip(unknown, found, strict=True))
        return [[self._known[trace.prompt, text] for text in texts_of(trace)] for trace in traces], spent

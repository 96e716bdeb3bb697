"""Answering from documents: in one call with demonstrations (DRAG), or in rounds with follow-up questions (IterDRAG).

A prompt holds demonstrations, each with documents retrieved for its own question, then the documents of the question
that is asked, and the question. Documents stand in reversed order of rank: the best next to the question. Without
demonstrations this is standard RAG, without documents many-shot prompting, without both the bare question.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from assay import checks
from assay.methods.core.reasoning.budget import Budget
from assay.methods.core.reasoning.generator import Generator, Sample, Sampling
from assay.methods.reasoning.rag_inference_scaling.allocation import Allocation
from assay.methods.reasoning.rag_inference_scaling.retrieval import Retriever, merged

FOLLOW, INTERMEDIATE, FINAL = "Follow up:", "Intermediate answer:", "So the final answer is:"
MOST_ROUNDS = 5  # the paper's limit
FollowUp = Callable[[str, Sequence[str]], str]
"""The next follow-up to a question behind the answers so far, "" for none."""


@dataclass(frozen=True)
class Example:
    """A question with its answer, for demonstrations; `steps` are the follow-up questions that lead to it and their
    answers.
    """

    question: str
    answer: str
    steps: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Prompts:
    """How a document, a question and an answer are introduced, and what stands in front of all."""

    document: str = "Document: "
    question: str = "Question: "
    answer: str = "Answer:"
    task: str = ""


@dataclass(frozen=True)
class Reader:
    """What answers: documents, who finds them, who writes, and the examples that demonstrations are made of (the first
    ones are used).

    Each document is cut after `cut` words (the paper: 1,024 tokens). `count` says how many tokens a prompt has, which
    only a limit on the context needs. Samples are greedy, of at most `new_tokens` each.
    """

    texts: Sequence[str]
    retriever: Retriever
    generator: Generator
    examples: Sequence[Example] = ()
    prompts: Prompts = Prompts()
    cut: int = 1024
    new_tokens: int = 48
    count: Callable[[str], int] | None = None


@dataclass(frozen=True)
class Answered:
    """What was answered, the follow-ups on the way with their answers, the numbers of the documents that were read
    (best first), and the samples, one a call.
    """

    question: str
    text: str
    steps: tuple[tuple[str, str], ...]
    documents: tuple[int, ...]
    samples: tuple[Sample, ...]

    @property
    def length(self) -> int:
        """The effective context length: tokens read, summed over all calls."""
        return sum(sample.spent.prompt for sample in self.samples)

    @property
    def tokens(self) -> int:
        """All tokens, read and written."""
        return sum(sample.spent.prompt + sample.spent.completion for sample in self.samples)


def effective_length(answered: Sequence[Answered]) -> float:
    """The mean effective context length of an answer, L(theta)."""
    if not answered:
        raise ValueError("answered must hold at least one answer, got none")
    return sum(one.length for one in answered) / len(answered)


def drag(
    reader: Reader,
    questions: Sequence[str],
    allocation: Allocation,
    *,
    limit: int | None = None,
    bare: bool = False,
    budget: Budget | None = None,
) -> list[Answered]:
    """One answer a question, from one call: `allocation.documents` documents for each example and question,
    `allocation.shots` examples.

    With `bare` the demonstrations have no documents: they show the form of answers only (an ablation, not the paper's).

    With a `limit` on the prompt's tokens documents are dropped whole, from the lowest rank, first in front of the
    question and then in the demonstrations alike, until it fits. Source: section 3.2 of the paper. Raises ValueError
    for more shots than there are examples, more than one iteration, a limit without `Reader.count`, and a limit that
    the prompt does not fit into without any document.

    When NOT to use it: with a weak reader more documents may be worse, and questions that need a fact which they do not
    name want `iter_drag`.
    """
    if allocation.iterations != 1:
        raise ValueError(f"allocation must have 1 iteration (iter_drag takes more), got {allocation.iterations}")
    shown = _demonstrations(reader, replace(allocation, documents=0) if bare else allocation, in_rounds=False)
    found = reader.retriever(questions, allocation.documents)
    prompts, kept = [], []
    for question, ranked in zip(questions, found, strict=True):
        prompt, used = _fitted(reader, allocation, shown, question, ranked, limit, bare)
        prompts.append(prompt)
        kept.append(used)
    samples = _asked(reader, prompts, ("\n",), budget)
    return [
        Answered(question, _final(sample.text), (), tuple(used), (sample,))
        for question, used, sample in zip(questions, kept, samples, strict=True)
    ]


def iter_drag(
    reader: Reader,
    questions: Sequence[str],
    allocation: Allocation,
    *,
    follow_up: FollowUp | None = None,
    budget: Budget | None = None,
) -> list[Answered]:
    """One answer a question, in at most `allocation.iterations` calls: the model asks a follow-up, for which documents
    are retrieved and appended, or gives the final answer; at the last call it is forced to.

    With `follow_up` a rule asks in the model's stead, for models too small to (our choice): a call then answers one
    follow-up, and the last of them the question. Demonstrations show the same form, with the documents of their own
    follow-ups. Documents that stand in the prompt already are not repeated. Where the model answers at once, only one
    call is allowed or the rule asks nothing, this is `drag` with demonstrations of this form, in the last two cases
    with the final answer forced where those show follow-ups. Source: section 3.3 of the paper, which holds the model to
    the form by constrained decoding; here (our choice, so that any server will do) what is in neither form counts as
    the final answer. Prompts have no limit: what an allocation reads is measured, and `feasible` says which ones a
    budget allows. Raises ValueError for more shots than there are examples and more than 5 iterations.

    When NOT to use it: without demonstrations, for a model that does not know the form; or where one document answers.
    """
    checks.whole("allocation.iterations", allocation.iterations, low=1, high=MOST_ROUNDS)
    shown = _demonstrations(reader, allocation, in_rounds=True)
    found = reader.retriever(questions, allocation.documents)
    chains = [
        _Chain(question, shown + _documents(reader, ranked) + _question(reader, question), [list(ranked)])
        for question, ranked in zip(questions, found, strict=True)
    ]
    before_documents = reader.prompts.document.strip()  # without a mark for them every new line would be one
    going_on = (f"\n{INTERMEDIATE}", *([f"\n{before_documents}"] if before_documents else []), "\n\n")
    chained = any(len(example.steps) > 1 for example in reader.examples[: allocation.shots])
    asked = chains
    if follow_up is not None and allocation.iterations > 1:
        _go_on(reader, allocation, [(chain, follow_up(chain.question, [])) for chain in chains], True)
    for left in reversed(range(allocation.iterations)):
        forced = not left and follow_up is None  # to give the final answer, without one to its follow-up
        for chain in asked:
            if chain.steps:
                chain.prompt += FINAL if forced else ""
            elif chained and (forced or follow_up is not None):  # examples invite a follow-up that nobody would answer
                chain.prompt += f" {FINAL}"
        stop = going_on if follow_up is None and left else ("\n",)
        more = []
        for chain, sample in zip(asked, _asked(reader, [chain.prompt for chain in asked], stop, budget), strict=True):
            chain.samples.append(sample)
            if forced:
                chain.text = _final(sample.text)
                continue
            before, next_one, chain.text = _parsed(sample.text, bool(chain.steps))
            if chain.steps:
                chain.steps[-1] = (chain.steps[-1][0], before)
            if follow_up is not None:
                next_one = follow_up(chain.question, [answer for _, answer in chain.steps]) if chain.steps else ""
                chain.text = chain.text or before
            if next_one and left:
                chain.prompt += f" {before}\n" if before else ""
                more.append((chain, next_one))
        asked = _go_on(reader, allocation, more, left > 1 or follow_up is not None)
    return [
        Answered(chain.question, chain.text, tuple(chain.steps), tuple(merged(chain.rankings)), tuple(chain.samples))
        for chain in chains
    ]


@dataclass
class _Chain:
    """A question on its way: the prompt of its next call, and what was retrieved, asked and said."""

    question: str
    prompt: str
    rankings: list[list[int]]
    steps: list[tuple[str, str]] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    text: str = ""


def _go_on(
    reader: Reader, allocation: Allocation, asked: Sequence[tuple[_Chain, str]], to_answer: bool
) -> list[_Chain]:
    """Append to each chain its follow-up and the new documents for it; the chains that got one."""
    going = [(chain, question) for chain, question in asked if question]
    found = reader.retriever([question for _, question in going], allocation.documents) if going else []
    for (chain, question), ranked in zip(going, found, strict=True):
        new = [document for document in ranked if document not in merged(chain.rankings)]
        chain.rankings.append(list(ranked))
        chain.prompt += f"{'' if chain.steps else ' '}{FOLLOW} {question}\n" + _documents(reader, new)
        chain.prompt += INTERMEDIATE if to_answer else ""
        chain.steps.append((question, ""))
    return [chain for chain, _ in going]


# -------------------------------------------------------------------------------------------------------------- prompts


def _asked(reader: Reader, prompts: Sequence[str], stop: tuple[str, ...], budget: Budget | None) -> list[Sample]:
    sampling = Sampling(0.0, 1.0, reader.new_tokens, stop)
    found = [samples[0] for samples in reader.generator(prompts, sampling)] if prompts else []
    for sample in found:
        if budget is not None:
            budget.book("solve", sample.spent)
    return found


def _parsed(text: str, answering: bool) -> tuple[str, str, str]:
    """What a continuation gives: the answer to the follow-up before it, the next follow-up, and the final answer, each
    "" for none.
    """
    lines = [line.strip() for line in text.strip("\n").split("\n")]
    before = lines.pop(0) if answering and lines else ""
    for line in lines:
        if line.startswith(FOLLOW):
            return before, line.removeprefix(FOLLOW).strip(), ""
        if line.startswith(FINAL):
            return before, "", line.removeprefix(FINAL).strip()
    return before, "", _final(lines[0] if lines and lines[0] else before)


def _final(text: str) -> str:
    first = text.strip("\n").split("\n")[0].strip()
    return first.removeprefix(FINAL).strip()


def _documents(reader: Reader, ranked: Sequence[int]) -> str:
    """Documents in reversed order of rank, a line each."""
    cut = [" ".join(reader.texts[i].split()[: reader.cut]) for i in reversed(ranked)]
    return "".join(f"{reader.prompts.document}{text}\n" for text in cut)


def _question(reader: Reader, question: str) -> str:
    return f"{reader.prompts.question}{question}\n{reader.prompts.answer}"


def _fitted(
    reader: Reader, allocation: Allocation, shown: str, question: str, ranked: list[int], limit: int | None, bare: bool
) -> tuple[str, list[int]]:
    """The prompt with as many documents as fit, and which they are."""
    if limit is None:
        return shown + _documents(reader, ranked) + _question(reader, question), ranked
    if reader.count is None:
        raise ValueError("reader must have count where a limit is given, got None")
    limit = checks.whole("limit", limit, low=1)
    fewer = [(allocation.documents, k) for k in range(len(ranked), -1, -1)]
    fewer += [(k, 0) for k in range(allocation.documents - 1, -1, -1)] if not bare else []
    for in_examples, here in fewer:
        if in_examples < allocation.documents:
            shown = _demonstrations(reader, replace(allocation, documents=in_examples), in_rounds=False)
        prompt = shown + _documents(reader, ranked[:here]) + _question(reader, question)
        if reader.count(prompt) <= limit:
            return prompt, ranked[:here]
    raise ValueError(f"limit must be at least {reader.count(prompt)} for {allocation.shots} shots, got {limit}")


def _demonstrations(reader: Reader, allocation: Allocation, *, in_rounds: bool) -> str:
    shots = checks.whole("allocation.shots", allocation.shots, low=0, high=len(reader.examples))
    examples = list(reader.examples[:shots])
    if not examples:
        return reader.prompts.task
    found = reader.retriever([example.question for example in examples], allocation.documents)
    blocks = [reader.prompts.task]
    for example, ranked in zip(examples, found, strict=True):
        text = _documents(reader, ranked) + _question(reader, example.question)
        if in_rounds and len(example.steps) > 1:
            text += _chain(reader, example, ranked, allocation.documents)
        else:
            text += f" {example.answer}"
        blocks.append(f"{text}\n\n")
    return "".join(blocks)


def _chain(reader: Reader, example: Example, ranked: Sequence[int], k: int) -> str:
    """The follow-ups of an example with their documents and answers, and its final answer."""
    seen, text = set(ranked), ""
    for found, (question, answer) in zip(
        reader.retriever([q for q, _ in example.steps], k), example.steps, strict=True
    ):
        new = [document for document in found if document not in seen]
        seen.update(new)
        lead = "\n" if text else " "
        text += f"{lead}{FOLLOW} {question}\n{_documents(reader, new)}{INTERMEDIATE} {answer}"
    return f"{text}\n{FINAL} {example.answer}"

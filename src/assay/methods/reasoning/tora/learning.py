"""Learning from trajectories: which tokens are in the loss, and which trajectories are learnt from (output space shaping).

    examples = [example(tokenizer, prompt, trajectory.text) for ...]
    model(**batch_of(examples, tokenizer.pad_token_id)).loss.backward()       # any causal model of transformers, or one with LoRA

The paper's own numbers, as recalled: 16k trajectories, 64 samples a question, of the valid and of the corrected ones four
each; three epochs at 2e-5, in batches of 128.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from assay import checks
from assay.methods.reasoning.tora.text import cuts, pieces

IGNORED = -100
"""The label of a token that is not in the loss, as transformers has it."""
Loss = Literal["paper", "as_released"]
KEPT = 4
"""Valid and corrected trajectories a question, each, at most."""


@dataclass(frozen=True)
class Example:
    """Token ids and the label of each: itself, or `IGNORED`."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def learnt(self) -> int:
        """Tokens in the loss."""
        return sum(label != IGNORED for label in self.labels)


def example(tokenizer: Any, prompt: str, text: str, *, variant: Loss = "paper", end: bool = True) -> Example:
    """A prompt and a trajectory's text as what a model is trained on. The prompt is never in the loss; with `end` the end token is.

    `variant` "paper" leaves out what the tool wrote too, as the paper's objective does: nobody has to predict an output. "as_released" has
    it in the loss, as the released training does, which masks the prompt alone. Each part is encoded by itself, as `ToolLoop` appends
    it, so that the mask lies exactly on an output's tokens.

    Raises ValueError for a prompt or a text without tokens, an unknown variant, and a tokenizer without an end token where `end` is True.
    """
    variant, end = checks.choice("variant", variant, get_args(Loss)), checks.flag("end", end)
    ids: list[int] = list(tokenizer(prompt)["input_ids"])
    if not ids or not text:
        raise ValueError(f"prompt and text must hold something, got {checks.shown(prompt)} and {checks.shown(text)}")
    labels = [IGNORED] * len(ids)
    for part, tool in pieces(text):
        own = list(tokenizer(part, add_special_tokens=False)["input_ids"])
        ids += own
        labels += [IGNORED] * len(own) if tool and variant == "paper" else own
    if end:
        if (last := getattr(tokenizer, "eos_token_id", None)) is None:
            raise ValueError("tokenizer must have an end token, or end=False leave it out, got none")
        ids, labels = [*ids, last], [*labels, last]
    return Example(tuple(ids), tuple(labels))


def batch_of(examples: Sequence[Example], pad_token_id: int, device: Any = None) -> dict[str, Tensor]:
    """Examples as `input_ids`, `attention_mask` and `labels`, (B, S) int64 each, padded on the right. Raises ValueError for none."""
    if not len(examples):
        raise ValueError("examples must hold at least one, got none")
    pad, width = checks.whole("pad_token_id", pad_token_id, low=0), max(len(one.input_ids) for one in examples)

    def rows(values: Sequence[Sequence[int]], filler: int) -> Tensor:
        return torch.tensor([[*own, *[filler] * (width - len(own))] for own in values], device=device)

    return {
        "input_ids": rows([one.input_ids for one in examples], pad),
        "attention_mask": rows([[1] * len(one.input_ids) for one in examples], 0),
        "labels": rows([one.labels for one in examples], IGNORED),
    }


@dataclass(frozen=True)
class Shaped:
    """What a question's samples give to learn from: texts that were right as drawn, and wrong ones that a teacher took to the end."""

    valid: tuple[str, ...]
    corrected: tuple[str, ...]
    asked: int = 0  # cuts that the teacher was given


Teacher = Callable[[str, str], str]
"""Continues a prompt behind the beginning of a trajectory: `teacher(prompt, beginning)` gives what follows, outputs included."""


def shaped(
    drawn: Mapping[str, Sequence[str]],
    right: Callable[[str, str], bool],
    teacher: Teacher | None = None,
    *,
    keep: int = KEPT,
) -> dict[str, Shaped]:
    """Output space shaping: of each prompt's drawn texts, those that are right (`right(prompt, text)`) and distinct, and corrections of
    the wrong ones.

    A wrong text is cut at each of its steps (`cuts`), the latest first, and a teacher writes on from there; what then is right, and is
    not there yet, is a correction: one a wrong text, and at most `keep` a question, as of the valid ones. The first that were drawn are
    taken. Without a teacher nothing is corrected. That the latest cut comes first is our choice: it keeps most of what the model wrote.

    Raises ValueError for `keep` below 1.

    When NOT to use it: where what is right cannot be told by itself; a wrong chain with a right answer is kept as valid.
    """
    keep = checks.whole("keep", keep, low=1)
    found = {}
    for prompt, texts in drawn.items():
        different = list(dict.fromkeys(texts))
        marks = [right(prompt, text) for text in different]
        valid = [text for text, ok in zip(different, marks, strict=True) if ok]
        corrected: list[str] = []
        asked = 0
        for text in [text for text, ok in zip(different, marks, strict=True) if not ok]:
            if teacher is None or len(corrected) == keep:
                break
            for beginning in reversed(cuts(text)):
                asked += 1
                whole = beginning + teacher(prompt, beginning)
                if whole not in valid and whole not in corrected and right(prompt, whole):
                    corrected.append(whole)
                    break
        found[prompt] = Shaped(tuple(valid[:keep]), tuple(corrected), asked)
    return found

"""What an adapted encoder-decoder is trained on: prefixes and suffixes, UL2's denoisers, a teacher's distribution; and the warm-up.

The collators take token sequences and give what both classes of encoder-decoders take: `input_ids` and `attention_mask` (B, m), padded on
the right, and `labels` (B, n), -100 where nothing is asked. Positions count from 0 on either side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import TrainerCallback

from assay import checks
from assay.methods.core.generation.cache import left_pad, position_ids


class PrefixLMCollator:
    """Sequences cut in two: the encoder reads the prefix, the decoder is asked for the suffix.

    The cut is drawn evenly over all places that leave both sides a token, or lies behind `share` of the tokens where that is given. With
    an `eos_token_id`, suffixes end with it. `generator` decides the cuts, by default torch's global one. Raises ValueError for a
    sequence of less than two tokens.

    >>> batch = PrefixLMCollator(0, share=0.5)([[5, 6, 7, 8], [9, 10]])
    >>> batch["input_ids"].tolist(), batch["labels"].tolist()
    ([[5, 6], [9, 0]], [[7, 8], [10, -100]])
    """

    def __init__(
        self,
        pad_token_id: int,
        *,
        share: float | None = None,
        eos_token_id: int | None = None,
        generator: torch.Generator | None = None,
    ):
        self.pad = checks.whole("pad_token_id", pad_token_id, low=0)
        self.share = None if share is None else checks.number("share", share, above=0, below=1)
        self.end = [] if eos_token_id is None else [checks.whole("eos_token_id", eos_token_id, low=0)]
        self.generator = generator

    def __call__(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        pairs = []
        for ids in _sequences(examples):
            if self.share is None:
                cut = _draw(len(ids) - 1, self.generator) + 1
            else:
                cut = min(max(round(self.share * len(ids)), 1), len(ids) - 1)
            pairs.append((ids[:cut], ids[cut:] + self.end))
        return _batch(pairs, self.pad)


@dataclass(frozen=True)
class Denoiser:
    """One of UL2's tasks: `rate` of the tokens hidden in spans of `span` on average; `span` None: the last tokens, in one piece."""

    mode: str
    rate: float
    span: float | None = None

    def __post_init__(self) -> None:
        checks.number("rate", self.rate, above=0, below=1)
        if self.span is not None:
            checks.number("span", self.span, low=1)


UL2 = (  # the seven of UL2 (arXiv 2205.05131, table 2)
    Denoiser("R", 0.15, 3), Denoiser("R", 0.15, 8),
    Denoiser("X", 0.5, 3), Denoiser("X", 0.5, 8), Denoiser("X", 0.15, 64), Denoiser("X", 0.5, 64),
    Denoiser("S", 0.25),
)  # fmt: skip


class UL2Collator:
    """Sequences with spans hidden: the encoder reads a sentinel for each, the decoder is asked for the spans behind theirs.

    Every sequence draws one of `denoisers`: regular spans ("R"), extreme ones ("X"), or the sequential task ("S"), which hides the last
    tokens and has no sentinel. `sentinels` are token ids kept for this, in order; `modes` gives a token for a denoiser's name to stand
    first in what the encoder reads. Raises ValueError for a sentinel that is given twice, for a mode that no denoiser has, for a sequence
    of less than two tokens, and for one that asks for more spans than there are sentinels.
    """

    def __init__(
        self,
        pad_token_id: int,
        sentinels: Sequence[int],
        *,
        denoisers: Sequence[Denoiser] = UL2,
        modes: Mapping[str, int] | None = None,
        eos_token_id: int | None = None,
        generator: torch.Generator | None = None,
    ):
        self.pad = checks.whole("pad_token_id", pad_token_id, low=0)
        self.sentinels = [checks.whole("sentinels", token, low=0) for token in sentinels]
        if len(set(self.sentinels)) < len(self.sentinels):
            twice = next(token for token in self.sentinels if self.sentinels.count(token) > 1)
            raise ValueError(f"sentinels must differ, or spans could not be told apart, got {twice} more than once")
        if not denoisers:
            raise ValueError("denoisers must hold at least one, got none")
        self.denoisers = tuple(denoisers)
        self.modes = {name: checks.whole("modes", token, low=0) for name, token in (modes or {}).items()}
        known = list(dict.fromkeys(task.mode for task in self.denoisers))
        for name in self.modes:
            checks.choice("modes", name, known)
        self.end = [] if eos_token_id is None else [checks.whole("eos_token_id", eos_token_id, low=0)]
        self.generator = generator

    def __call__(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        pairs = []
        for ids in _sequences(examples):
            task = self.denoisers[_draw(len(self.denoisers), self.generator)]
            inputs, answer = self.hidden(ids, task)
            mode = [self.modes[task.mode]] if task.mode in self.modes else []
            pairs.append((mode + inputs, answer + self.end))
        return _batch(pairs, self.pad)

    def hidden(self, ids: list[int], task: Denoiser) -> tuple[list[int], list[int]]:
        """What the encoder reads of a sequence, and what the decoder is asked for. Raises as the class says."""
        count = min(max(round(task.rate * len(ids)), 1), len(ids) - 1)
        if task.span is None:
            return ids[:-count], ids[-count:]
        spans = max(1, min(round(count / task.span), count, len(ids) - count))
        if spans > len(self.sentinels):
            raise ValueError(
                f"sentinels must be at least {spans} for a sequence of {len(ids)} tokens, got {len(self.sentinels)}"
            )
        seen, asked = (_parts(total, spans, self.generator) for total in (len(ids) - count, count))
        inputs: list[int] = []
        answer: list[int] = []
        place = 0
        for sentinel, kept, gone in zip(self.sentinels, seen, asked, strict=False):
            inputs += [*ids[place : place + kept], sentinel]
            answer += [sentinel, *ids[place + kept : place + kept + gone]]
            place += kept + gone
        return inputs, answer


def _parts(total: int, pieces: int, generator: torch.Generator | None) -> list[int]:
    """`total` as `pieces` whole numbers above 0, all ways equally likely."""
    cuts = (torch.randperm(total - 1, generator=generator)[: pieces - 1] + 1).sort().values.tolist()
    return [stop - start for start, stop in zip([0, *cuts], [*cuts, total], strict=True)]


def _draw(count: int, generator: torch.Generator | None) -> int:
    return int(torch.randint(count, (1,), generator=generator))


def _sequences(examples: Sequence[Any]) -> list[list[int]]:
    """Token ids of the examples: lists, tensors, or what a dataset holds under "input_ids"."""
    found = []
    for example in examples:
        ids = example["input_ids"] if isinstance(example, Mapping) else example
        ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        if len(ids) < 2:
            raise ValueError(f"sequences must have at least two tokens, got {len(ids)}")
        found.append(ids)
    if not found:
        raise ValueError("examples must hold at least one sequence, got none")
    return found


def _batch(pairs: list[tuple[list[int], list[int]]], pad: int) -> dict[str, Tensor]:
    def padded(rows: list[list[int]], fill: int) -> Tensor:
        width = max(map(len, rows))
        return torch.tensor([row + [fill] * (width - len(row)) for row in rows])

    inputs, answers = [list(rows) for rows in zip(*pairs, strict=True)]
    return {
        "input_ids": padded(inputs, pad),
        "attention_mask": padded([[1] * len(row) for row in inputs], 0),
        "labels": padded(answers, -100),
    }


# -------------------------------------------------------------------------------------------------------------------- distillation


@torch.no_grad()
def teacher_logits(teacher: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor) -> Tensor:
    """What a decoder-only teacher predicts at the places of `labels` (B, n), having read prefix and suffix causally: (B, n, vocabulary).

    The teacher has the students' tokens. Its head is run on suffixes alone. Places that ask nothing (-100) have zeros; what asks something
    stands first in its row. Raises ValueError for labels of which a row asks something behind a place that asks nothing, and for a row that
    asks something and has no prefix.
    """
    checks.tensor("labels", labels, shape=(len(input_ids), "tokens"), dtype=torch.int64)
    asked = labels != -100
    if (asked[:, 1:] & ~asked[:, :-1]).any():
        raise ValueError("labels must ask for the first tokens of each row: a suffix without gaps")
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if (asked.any(1) & ~mask.any(1)).any():
        raise ValueError("input_ids must have a token in each row that asks something: nothing predicts the first one")
    rows = [
        prefix[seen.bool()].tolist() + suffix[wanted].tolist()
        for prefix, seen, suffix, wanted in zip(input_ids, mask, labels, asked, strict=True)
    ]
    ids, both = left_pad(rows, 0, input_ids.device)
    most = int(asked.sum(1).max())
    logits = teacher(
        input_ids=ids, attention_mask=both, position_ids=position_ids(both), use_cache=False, logits_to_keep=most + 1
    ).logits[:, :-1]
    found = logits.new_zeros(*labels.shape, logits.shape[-1])
    # rows end together, so the last of a row's places stands last
    found[asked] = logits[asked[:, :most].flip(1)]
    return found


def distillation(logits: Tensor, labels: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Mean KL divergence from the teacher's distribution to the student's at the labels that are not -100, times `temperature` squared.

    `logits` and `teacher` are (B, n, vocabulary), `labels` (B, n).
    """
    temperature = checks.number("temperature", temperature, above=0)
    checks.tensor("teacher", teacher, shape=tuple(logits.shape))
    checks.tensor("labels", labels, shape=tuple(logits.shape[:2]), dtype=torch.int64)
    asked = labels != -100
    ours, theirs = ((x[asked].float() / temperature).log_softmax(-1) for x in (logits, teacher))
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * temperature**2


def distilled_loss(
    model: nn.Module, batch: Mapping[str, Tensor], teacher: nn.Module, *, weight: float = 1.0, temperature: float = 1.0
) -> Tensor:
    """The loss of a collator's batch: `weight` of `distillation`, the rest of cross-entropy.

    The teacher is the decoder-only model (in eval mode), which reads prefix and suffix causally; only suffixes count.
    """
    weight = checks.number("weight", weight, low=0, high=1)
    labels = batch["labels"]
    out: Any = model(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask"), labels=labels)
    if not weight:
        plain: Tensor = out.loss
        return plain
    theirs = teacher_logits(teacher, batch["input_ids"], batch.get("attention_mask"), labels)
    loss: Tensor = weight * distillation(out.logits, labels, theirs, temperature=temperature)
    return loss if weight == 1 else loss + (1 - weight) * out.loss


# ------------------------------------------------------------------------------------------------------------------------- warm-up


def cross_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of cross-attention and of its norms, of T5Gemma or ours. Raises ValueError for a model without any."""
    found = {name: value for name, value in model.named_parameters() if "cross_attn" in name}
    if not found:
        raise ValueError(f"model must have cross-attention, {type(model).__name__} has none")
    return found


def freeze_but_cross(model: nn.Module) -> list[nn.Parameter]:
    """Let nothing but cross-attention and its norms (`our choice`) have gradients; what was frozen by this call, to be given back."""
    kept = {id(parameter) for parameter in cross_parameters(model).values()}
    frozen = [found for found in model.parameters() if found.requires_grad and id(found) not in kept]
    for parameter in frozen:
        parameter.requires_grad_(False)
        parameter.grad = None
    return frozen


class CrossAttentionWarmup(TrainerCallback):
    """For `Trainer`: the first `steps` steps train cross-attention alone, then everything that had gradients before.

    For cross-attention that was drawn at random (encoder and decoder of different sizes); the paper's 1,000 steps by default. All
    parameters are in the optimizer from the start: those without gradients stay as they are.
    """

    def __init__(self, steps: int = 1000):
        self.steps = checks.whole("steps", steps, low=1)
        self._frozen: list[nn.Parameter] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step < self.steps:
            self._frozen = freeze_but_cross(model)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= self.steps:
            self._give_back()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._give_back()

    def _give_back(self) -> None:
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen = []

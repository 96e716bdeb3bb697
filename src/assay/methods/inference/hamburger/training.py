"""Training: text into groups, batches with explicit group numbers, the loss, and which parameters learn.

The paper's recipe: one epoch of instruction data, everything trained with AdamW, the base at 5e-5 and the grafted modules at 1e-4, both
falling to 1e-5 along a cosine, gradients clipped at 1, bfloat16, 8 x 2 texts a step on each of eight GPUs.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks
from assay.errors import MissingError
from assay.methods.inference.hamburger.segments import PADDING, group_ids, grouped, token_entropies
from assay.methods.inference.hamburger.teaching import UNASKED

BASE_RATE, GRAFTED_RATE = 5e-5, 1e-4
PARTS = ("all", "grafted", "lora")


def lesson(
    teacher: nn.Module,
    input_ids: Tensor,
    prompt_tokens: int | Sequence[int] = 1,
    attention_mask: Tensor | None = None,
    **how: Any,
) -> dict[str, Tensor]:
    """What `HamburgerForCausalLM.forward` takes to learn from whole rows of text: `input_ids`, `groups` and `labels`.

    `teacher` is the base model as it was before training, whose uncertainty cuts the rows (`segments.segment(..., **how)`). The first
    `prompt_tokens` of each row are neither merged nor asked for. Raises what `segments.grouped` and the teacher raise.
    """
    entropies = token_entropies(teacher, input_ids, attention_mask)
    groups = grouped(entropies, prompt_tokens, attention_mask, **how)
    heads = torch.as_tensor(prompt_tokens, device=groups.device).expand(len(groups))
    place = (groups >= 0).cumsum(1)  # counted from 1
    labels = input_ids.masked_fill((groups < 0) | (place <= heads[:, None]), UNASKED)
    return {"input_ids": input_ids, "groups": groups, "labels": labels}


@dataclass(frozen=True)
class GroupCollator:
    """Batches of examples: dicts of `input_ids` and the `sizes` of their groups (or `groups`, their numbers), and `prompt_tokens` (1).

    `labels` may be given instead of `prompt_tokens`. transformers' Trainer hides what `forward` does not take: give it `groups` and
    `labels`, or `remove_unused_columns=False`.
    Padded to the longest on `side` ("right" or "left"), or with `pack` all in one row, as the released training does, with `documents` that
    say which token is whose: a merged entry's position jumps, so positions cannot. The result is what
    `HamburgerForCausalLM.forward` takes; a prompt's tokens, padding and, packed, first tokens have no label. Raises ValueError for
    sizes that do not add up to the tokens, a wrong side, and no examples.

    >>> made = GroupCollator()([{"input_ids": [5, 6, 7], "sizes": [1, 2]}, {"input_ids": [8], "sizes": [1]}])
    >>> made["groups"].tolist(), made["labels"].tolist()
    ([[0, 1, 1], [0, -1, -1]], [[-100, 6, 7], [-100, -100, -100]])
    """

    pad_token_id: int = 0
    side: str = "right"
    pack: bool = False

    def __call__(self, examples: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
        checks.choice("side", self.side, ("right", "left"))
        rows = [self._row(example) for example in examples]
        if not rows:
            raise ValueError("examples must hold at least one, got none")
        if self.pack:
            return _packed(rows)
        width = max(len(ids) for ids, _, _ in rows)
        fills = {"input_ids": self.pad_token_id, "groups": PADDING, "labels": UNASKED}
        made = {name: torch.full((len(rows), width), fill) for name, fill in fills.items()}
        for number, parts in enumerate(rows):
            count = len(parts[0])
            place = slice(0, count) if self.side == "right" else slice(width - count, width)
            for tensor, part in zip(made.values(), parts, strict=True):
                tensor[number, place] = part
        return made

    @staticmethod
    def _row(example: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        ids = torch.as_tensor(example["input_ids"]).long()
        groups = torch.as_tensor(example["groups"]).long() if "groups" in example else group_ids(example["sizes"])
        if len(groups) != len(ids):
            raise ValueError(f"sizes must add up to the {len(ids)} tokens of their example, got {len(groups)}")
        if "labels" in example:
            labels = torch.as_tensor(example["labels"]).long()
            if labels.shape != ids.shape or int(labels[0]) != UNASKED:
                raise ValueError(
                    "labels must be one for each token of their example, the first -100: nothing predicts it"
                )
            return ids, groups, labels
        head = checks.whole("prompt_tokens", example.get("prompt_tokens", 1), low=1)
        return ids, groups, ids.masked_fill(torch.arange(len(ids)) < head, UNASKED)


def _packed(rows: list[tuple[Tensor, Tensor, Tensor]]) -> dict[str, Tensor]:
    groups, counted = [], 0
    for _, own, _ in rows:
        groups.append(own + counted)
        counted += int(own[-1]) + 1
    return {
        "input_ids": torch.cat([ids for ids, _, _ in rows])[None],
        "groups": torch.cat(groups)[None],
        "labels": torch.cat([labels for _, _, labels in rows])[None],
        "documents": torch.cat([torch.full_like(ids, number) for number, (ids, _, _) in enumerate(rows)])[None],
    }


def training_loss(
    model: nn.Module, batch: Mapping[str, Tensor], *, teacher: nn.Module | None = None, kl_weight: float = 0.0
) -> Tensor:
    """The loss of a batch (`lesson`, `GroupCollator`): the model's own and, with `kl_weight`, the distance to `teacher`, the base.

    The distance is KL(teacher || model) in nats, the mean over the tokens that are asked for. Raises ValueError for a weight without a
    teacher and for packed rows with one, which would see its neighbours.
    """
    kl_weight = checks.number("kl_weight", kl_weight, low=0)
    out: Any = model(**batch)
    loss: Tensor = out.loss
    if kl_weight == 0:
        return loss
    if teacher is None:
        raise ValueError("teacher must be given where kl_weight is above 0")
    if batch.get("documents") is not None:
        raise ValueError("kl_weight must be 0 for packed rows: the teacher cannot tell their documents apart")
    mask = (batch["groups"] >= 0).long()
    with torch.no_grad():
        wanted = teacher(
            input_ids=batch["input_ids"],
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp_min(0),
            use_cache=False,
        ).logits
    asked = batch["labels"][:, 1:] != UNASKED
    ours = out.logits[:, :-1][asked].float().log_softmax(-1)
    theirs = wanted[:, :-1][asked].float().log_softmax(-1)
    distance = F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
    return loss + kl_weight * distance


def train_only(model: Any, parts: str = "all", *, rank: int = 8, targets: str = r".*\.(q|k|v|o)_proj") -> Any:
    """Say which parameters of a `HamburgerForCausalLM` learn; returns the model.

    "all" is the paper's recipe. "grafted" trains the embedder and the micro-step decoder alone, so that the base stays what it is. "lora"
    trains these, and low-rank updates of `rank` on the base's linear layers whose names match `targets` (a regular expression);
    merge them with `merge_lora` before the model is stored. It needs peft: raises MissingError without it, ValueError for unknown parts.
    """
    checks.choice("parts", parts, PARTS)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parts == "all" or not name.startswith("base."))
    if parts == "lora":
        peft = _peft()
        config = peft.LoraConfig(r=checks.whole("rank", rank, low=1), lora_alpha=2 * rank, target_modules=targets)
        peft.inject_adapter_in_model(config, model.base)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name or not name.startswith("base."))
    return model


def merge_lora(model: Any) -> Any:
    """Put the low-rank updates of `train_only(model, "lora")` into the base's weights and take peft's layers out; returns the model."""
    for owner in list(model.base.modules()):
        for name, child in list(owner.named_children()):
            if hasattr(child, "lora_A") and hasattr(child, "get_base_layer"):
                child.merge()
                setattr(owner, name, child.get_base_layer())
    model.requires_grad_(True)
    return model


def _peft() -> Any:
    try:
        return importlib.import_module("peft")
    except ModuleNotFoundError:
        raise MissingError("low-rank updates need peft: pip install peft") from None


def parameter_groups(
    model: nn.Module, *, base_rate: float = BASE_RATE, grafted_rate: float = GRAFTED_RATE
) -> list[dict[str, Any]]:
    """The parameters that learn, for a torch optimiser: those of the base at one rate, the grafted ones at another."""
    rates = {
        "base": checks.number("base_rate", base_rate, above=0),
        "grafted": checks.number("grafted_rate", grafted_rate, above=0),
    }
    groups: dict[str, list[nn.Parameter]] = {"base": [], "grafted": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups["base" if name.startswith("base.") else "grafted"].append(parameter)
    return [{"params": found, "lr": rates[name]} for name, found in groups.items() if found]

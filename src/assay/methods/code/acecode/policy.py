"""What is asked of a policy: to write completions, and how likely it is to write given ones.

A policy is a causal model that gives logits (n, length, words), or an output with such `logits`, for ids (n, length): any of
transformers, or one's own. Rows are padded on the right, and prompts of different lengths are written apart, so that no mask is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from assay import checks

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn


@dataclass(frozen=True)
class Rollouts:
    """Prompts and what was written behind them: ids (n, length), padded with the end token; `mask` (n, length - 1) is True where
    ids[:, 1:] is a token that was written, the first end token included."""

    ids: Tensor
    mask: Tensor

    def completions(self, end: int) -> list[list[int]]:
        """The tokens written, without the end token."""
        written = [row[keep].tolist() for row, keep in zip(self.ids[:, 1:], self.mask, strict=True)]
        return [row[:-1] if row[-1:] == [end] else row for row in written]


def logits_of(policy: nn.Module, ids: Tensor) -> Tensor:
    """Logits (n, length, vocabulary) of tokens (n, length), of a model of transformers or a module that gives them as they are."""
    out = policy(ids)
    logits: Tensor = out.logits if hasattr(out, "logits") else out
    return logits


def token_logprobs(policy: nn.Module, ids: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probability of each token of ids[:, 1:] and the entropy of its distribution, both (n, length - 1) in nats.

    With the temperature that the tokens were written with, so that a ratio of two policies is one of what is sampled.
    """
    logits = logits_of(policy, ids[:, :-1]) / checks.number("temperature", temperature, above=0)
    every = (logits if logits.dtype.itemsize >= 4 else logits.float()).log_softmax(-1)
    return every.gather(-1, ids[:, 1:, None])[..., 0], -(every.exp() * every).sum(-1)


def write(
    policy: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    end: int,
    longest: int = 512,
    temperature: float = 0.8,
    seed: int = 0,
) -> Rollouts:
    """One completion for each prompt, at most `longest` tokens, sampled; rows in the order of the prompts.

    Models of transformers keep keys and values; others are run over the whole text at each step. Raises ValueError for no prompts and
    empty ones.
    """
    import torch

    checks.whole("longest", longest, low=1)
    checks.number("temperature", temperature, above=0)
    if not prompts or not all(prompts):
        raise ValueError(f"prompts must be one or more, none of them empty, got {checks.shown(prompts)}")
    device = next(policy.parameters()).device
    chance = torch.Generator(device).manual_seed(checks.whole("seed", seed, low=0))
    was = policy.training
    policy.eval()
    rows: dict[int, list[int]] = {}
    for length in sorted({len(prompt) for prompt in prompts}):
        group = [n for n, prompt in enumerate(prompts) if len(prompt) == length]
        ids = torch.tensor([list(prompts[n]) for n in group], device=device)
        with torch.no_grad():
            new = torch.stack(list(_written(policy, ids, end, longest, temperature, chance)), 1)
        for n, row in zip(group, new.tolist(), strict=True):
            rows[n] = row[: row.index(end) + 1] if end in row else row
    policy.train(was)
    lengths = [len(prompt) + len(rows[n]) for n, prompt in enumerate(prompts)]
    ids = torch.full((len(prompts), max(lengths)), end, device=device)
    mask = torch.zeros((len(prompts), max(lengths) - 1), dtype=torch.bool, device=device)
    for n, prompt in enumerate(prompts):
        ids[n, : lengths[n]] = torch.tensor([*prompt, *rows[n]], device=device)
        mask[n, len(prompt) - 1 : lengths[n] - 1] = True
    return Rollouts(ids, mask)


def _written(
    policy: nn.Module, ids: Tensor, end: int, longest: int, temperature: float, chance: Generator
) -> Iterator[Tensor]:
    """One column of tokens after the other, until every row has ended."""
    import torch

    cached = hasattr(policy, "config") and hasattr(policy, "generate")
    kept, shown = None, ids
    ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    for _ in range(longest):
        if cached:
            out = policy(shown, cache=kept, use_cache=True, logits_to_keep=1)
            kept, logits = out.cache, out.logits[:, -1]
        else:
            logits = logits_of(policy, shown)[:, -1]
        new = torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=chance)
        shown = new if cached else torch.cat([shown, new], 1)
        yield new[:, 0]
        ended |= new[:, 0] == end
        if bool(ended.all()):
            return

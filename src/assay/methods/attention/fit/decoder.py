"""FIT as a language model: all groups at once, or token by token behind a state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.methods.attention.fit.grouping import group_sequence, ungroup_sequence
from assay.methods.attention.fit.model import Interleaved

State = dict[str, Tensor]
START = 0.3  # about what a layer adds at the start, which is 0.2 whatever its width


def _step(block: Any, name: str, x: Tensor, state: State, causal: bool) -> Tensor:
    """A layer on x behind the keys and values that `state` holds under `name`, which grow by those of x."""
    y: Tensor
    y, state[f"{name}.k"], state[f"{name}.v"] = block.behind(x, state[f"{name}.k"], state[f"{name}.v"], causal)
    return y


@dataclass
class DecoderOutput:
    """Logits (batch, tokens, vocabulary), and the mean loss (nats) where labels were given."""

    logits: Tensor
    loss: Tensor | None = None


class FITDecoder(nn.Module):
    """FIT as a language model: groups of `group_size` tokens, at most `groups` of them; options as `FIT` takes them.

    Training computes all groups in parallel. Generation costs a token its local layers over the group so far and reads of m latents;
    the latents are computed once a group. Embeddings, positions and latents start with a standard deviation of 0.3 (`our choice`;
    0.02, the official code's, drowns under what the first layer adds: a token is then hardly told from those before it, and not
    even two pairs are recalled after a thousand steps). Raises ValueError beyond groups * group_size tokens.
    """

    def __init__(
        self,
        layers: str = "(2)2(2)",
        *,
        vocab_size: int,
        groups: int,
        group_size: int,
        latents: int = 4,
        dim: int = 256,
        latent_dim: int = 256,
        heads: int = 4,
        latent_heads: int = 4,
        **options: Any,
    ):
        super().__init__()
        if min(vocab_size, groups, group_size, latents) < 1:
            raise ValueError(
                "vocab_size, groups, group_size and latents must be at least 1, "
                f"got {vocab_size}, {groups}, {group_size} and {latents}"
            )
        self.groups, self.group_size, self.latents = groups, group_size, latents
        self.embed, self.head = nn.Embedding(vocab_size, dim), nn.Linear(dim, vocab_size, bias=False)
        nn.init.normal_(self.embed.weight, std=START)
        self.positions = nn.Parameter(START * torch.randn(group_size, dim))
        self.table = nn.Parameter(START * torch.randn(groups * latents, latent_dim))
        self.body = Interleaved(
            layers,
            dim=dim,
            latent_dim=latent_dim,
            heads=heads,
            latent_heads=latent_heads,
            causal="decoder",
            **options,
        )

    def _check(self, input_ids: Tensor, before: int = 0) -> None:
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids must be (batch, tokens), got {tuple(input_ids.shape)}")
        tokens = before + input_ids.shape[1]
        if tokens > self.groups * self.group_size:
            raise ValueError(f"tokens must be at most {self.groups * self.group_size}, got {tokens}")

    def _rows(self, first: int, groups: int) -> Tensor:
        rows = self.table[first * self.latents : (first + groups) * self.latents]
        return rows.unflatten(0, (-1, self.latents))

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> DecoderOutput:
        """`input_ids` (batch, tokens); logits at a token depend on it and those before it.

        Rows that end early may be padded on the right with anything. `labels` as `input_ids`, -100 where nothing is asked.
        """
        self._check(input_ids)
        length = input_ids.shape[1]
        x, _ = group_sequence(self.embed(input_ids), self.group_size)
        z = self._rows(0, x.shape[1]).expand(len(x), -1, -1, -1)
        logits = self.head(ungroup_sequence(self.body(x + self.positions, z)[0], length))
        if labels is None:
            return DecoderOutput(logits)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
        return DecoderOutput(logits, loss)

    def init_state(self, batch: int) -> State:
        """Before the first token. Keys and values of the current group by local layer, of all latents by global layer; by stage that
        writes the current group's tokens, which its latents will read, and keys and values of the latents that the group reads.

        The global layers of the last stage, which are read by no token, have none.
        """
        state = {"seen": torch.zeros(batch, dtype=torch.int64, device=self.table.device)}

        def empty(name: str, block: Any) -> None:
            heads, inner = block.attention.heads, block.attention.q_proj.out_features
            for part in "kv":
                state[f"{name}.{part}"] = self.table.new_zeros(batch, heads, 0, inner // heads)

        for i, stage in enumerate(self.body.stages):
            for j, block in enumerate(stage.local_layers):  # type: ignore[arg-type]
                empty(f"local.{i}.{j}", block)
            if not hasattr(stage, "write"):
                continue
            for j, block in enumerate(stage.global_layers):  # type: ignore[arg-type]
                empty(f"global.{i}.{j}", block)
            state[f"tokens.{i}"] = self.table.new_zeros(batch, 0, self.body.dim)
            none = self.table.new_zeros(batch, self.latents, self.body.latent_dim)
            state[f"write.{i}.k"], state[f"write.{i}.v"] = stage.write.keys(none)  # type: ignore[union-attr,operator]
        return state

    def state_bytes(self, tokens: int, batch: int = 1) -> int:
        """Bytes of the state after `tokens` tokens: the current group's part is empty again at the end of every group."""
        here, latents = tokens % self.group_size, tokens // self.group_size * self.latents
        stages, writes = self.body.layers, len(self.body.layers) - 1
        local, glob = sum(a for a, _ in stages), sum(b for _, b in stages[:-1])
        dim, latent_dim = self.body.dim, self.body.latent_dim
        entries = (2 * local + writes) * here * dim + 2 * glob * latents * latent_dim
        entries += 2 * writes * self.latents * min(dim, latent_dim)
        return batch * (entries * self.table.element_size() + torch.int64.itemsize)

    def advance(self, input_ids: Tensor, state: State) -> tuple[Tensor, State]:
        """The next tokens (batch, tokens) behind `state`: their logits, and the state after them. `state` itself stays as it is."""
        seen = int(state["seen"][0])
        self._check(input_ids, seen)
        state, logits = dict(state), []
        for part in input_ids.tensor_split(
            list(range(self.group_size - seen % self.group_size, input_ids.shape[1], self.group_size)), 1
        ):
            logits.append(self._in_group(part, seen % self.group_size, state))
            seen += part.shape[1]
            if seen % self.group_size == 0 and part.shape[1]:
                self._end_group(seen // self.group_size - 1, state)
        state["seen"] = state["seen"] + input_ids.shape[1]
        return torch.cat(logits, 1), state

    def _in_group(self, ids: Tensor, before: int, state: State) -> Tensor:
        """Tokens of one group, of which `before` have been; changes the dictionary `state`."""
        x = self.embed(ids) + self.positions[before : before + ids.shape[1]]
        for i, stage in enumerate(self.body.stages):
            for j, block in enumerate(stage.local_layers):  # type: ignore[arg-type]
                x = _step(block, f"local.{i}.{j}", x, state, causal=True)
            if hasattr(stage, "write"):
                state[f"tokens.{i}"] = torch.cat([state[f"tokens.{i}"], x], 1)
                x = stage.write.over(x, state[f"write.{i}.k"], state[f"write.{i}.v"])  # type: ignore[union-attr,operator]
        out: Tensor = self.head(self.body.norm(x))
        return out

    def _end_group(self, group: int, state: State) -> None:
        """The latents of a group that is complete, and an empty next group."""
        z = self._rows(group, 1).expand(len(state["seen"]), -1, -1, -1)[:, 0]
        for name in state:
            if name.startswith("local"):
                state[name] = state[name][:, :, :0]
        for i, stage in enumerate(self.body.stages):
            if not hasattr(stage, "write"):
                continue
            z = stage.read(z, state[f"tokens.{i}"])  # type: ignore[operator]
            for j, block in enumerate(stage.global_layers):  # type: ignore[arg-type]
                z = _step(block, f"global.{i}.{j}", z, state, causal=False)
            state[f"tokens.{i}"] = state[f"tokens.{i}"][:, :0]
            state[f"write.{i}.k"], state[f"write.{i}.v"] = stage.write.keys(z)  # type: ignore[union-attr,operator]

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
        eos_token_id: int | None = None,
    ) -> Tensor:
        """`input_ids` (batch, tokens) and what follows: the likeliest tokens, or samples at a `temperature` above 0.

        All prompts have the same length. A row that met `eos_token_id` repeats it; generation stops when all have.
        """
        if max_new_tokens < 0 or temperature < 0 or input_ids.numel() == 0:
            raise ValueError(
                "max_new_tokens and temperature must not be negative and input_ids not empty, "
                f"got {max_new_tokens}, {temperature} and {tuple(input_ids.shape)}"
            )
        self._check(input_ids, max_new_tokens)
        state, ids, new = self.init_state(len(input_ids)), input_ids, input_ids
        ended = torch.zeros(len(ids), 1, dtype=torch.bool, device=ids.device)
        for _ in range(max_new_tokens):
            logits, state = self.advance(new, state)
            if temperature:
                chances = torch.softmax(logits[:, -1].float() / temperature, -1)
                new = torch.multinomial(chances, 1, generator=generator)
            else:
                new = logits[:, -1:].argmax(-1)
            if eos_token_id is not None:
                new = new.masked_fill(ended, eos_token_id)
                ended = ended | (new == eos_token_id)
            ids = torch.cat([ids, new], 1)
            if ended.all():
                break
        return ids

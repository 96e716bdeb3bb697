"""FIT as a language model: all groups at once, or token by token from a state. A transformers model, saved and loaded as such."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from assay import checks
from assay.methods.attention.fit.grouping import group_sequence, ungroup_sequence
from assay.methods.attention.fit.model import Interleaved

State = dict[str, Tensor]
START = 0.3  # about what a layer adds at the start, which is 0.2 whatever its width


def _step(block: Any, name: str, x: Tensor, state: State, causal: bool) -> Tensor:
    """Apply a layer to x after the keys and values that `state` holds under `name`; those of x are appended."""
    y: Tensor
    y, state[f"{name}.k"], state[f"{name}.v"] = block.behind(x, state[f"{name}.k"], state[f"{name}.v"], causal)
    return y


class FITConfig(PretrainedConfig):
    """The sizes of a `FITDecoder`: groups of `group_size` tokens, at most `groups` of them; the others as in `FIT`."""

    model_type = "assay_fit"

    def __init__(
        self,
        layers: str = "(2)2(2)",
        *,
        vocab_size: int = 256,
        groups: int = 4,
        group_size: int = 64,
        latents: int = 4,
        dim: int = 256,
        latent_dim: int = 256,
        heads: int = 4,
        latent_heads: int = 4,
        ratio: int = 4,
        cross_ratio: int = 0,
        **kwargs: Any,
    ):
        self.layers, self.vocab_size, self.groups, self.group_size = layers, vocab_size, groups, group_size
        self.latents, self.dim, self.latent_dim, self.heads, self.latent_heads = (
            latents,
            dim,
            latent_dim,
            heads,
            latent_heads,
        )
        self.ratio, self.cross_ratio = ratio, cross_ratio
        self.hidden_size = dim
        super().__init__(**{"tie_word_embeddings": False, **kwargs})


class FITDecoder(PreTrainedModel):
    """FIT as a language model, for up to groups * group_size tokens.

    Training computes all groups in parallel. In generation, a token costs its local layers over the group so far and reads of m latents;
    the latents are computed once a group. Embeddings, positions and latents start with a standard deviation of 0.3 (`our choice`;
    with the official code's 0.02 they drown in what the first layer adds: a token can then hardly be told from those before it, and not
    even two pairs are recalled after a thousand steps). `generate` is its own (greedy or sampled; no beams).
    Raises TypeError and ValueError for invalid sizes, and ValueError beyond groups * group_size tokens.
    """

    config_class = FITConfig
    base_model_prefix = "body"
    main_input_name = "input_ids"
    _no_split_modules = ["Stage"]

    def __init__(self, config: FITConfig):
        super().__init__(config)
        for name in ("vocab_size", "groups", "group_size", "latents"):
            checks.whole(name, getattr(config, name), low=1)
        dim, latent_dim = config.dim, config.latent_dim
        self.groups, self.group_size, self.latents = config.groups, config.group_size, config.latents
        self.embed, self.head = nn.Embedding(config.vocab_size, dim), nn.Linear(dim, config.vocab_size, bias=False)
        self.positions = nn.Parameter(torch.empty(config.group_size, dim))
        self.table = nn.Parameter(torch.empty(config.groups * config.latents, latent_dim))
        self.body = Interleaved(
            config.layers,
            dim=dim,
            latent_dim=latent_dim,
            heads=config.heads,
            latent_heads=config.latent_heads,
            ratio=config.ratio,
            cross_ratio=config.cross_ratio,
            causal="decoder",
        )
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module is self:
            nn.init.normal_(self.positions, std=START)
            nn.init.normal_(self.table, std=START)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=START)
        elif isinstance(module, nn.Linear | nn.LayerNorm):
            module.reset_parameters()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed = value  # type: ignore[assignment]

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def _check(self, input_ids: Tensor, before: int = 0) -> None:
        checks.tensor("input_ids", input_ids, shape=("batch", "tokens"), dtype="integer", empty=True)
        tokens = before + input_ids.shape[1]
        if tokens > self.groups * self.group_size:
            raise ValueError(f"tokens must be at most {self.groups * self.group_size}, got {tokens}")

    @staticmethod
    def _there(attention_mask: Tensor | None, input_ids: Tensor) -> Tensor | None:
        """bool (batch, tokens), where tokens are; None: all. Each row's tokens must be one run."""
        if attention_mask is None:
            return None
        checks.tensor("attention_mask", attention_mask, shape=tuple(input_ids.shape), dtype="any")
        there = attention_mask.bool()
        if (there[:, 1:] & ~there[:, :-1]).sum(1).add(there[:, 0]).gt(1).any():
            raise ValueError("attention_mask must be 1 on one run of tokens in each row, padding on either side of it")
        return None if bool(there.all()) else there

    def _rows(self, first: int, groups: int) -> Tensor:
        rows = self.table[first * self.latents : (first + groups) * self.latents]
        return rows.unflatten(0, (-1, self.latents))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """`input_ids` (batch, tokens); logits (batch, tokens, vocabulary) at a token depend on it and those before it.

        `attention_mask` as `input_ids`, 0 on padding: a row counts from its first token, so that it does not depend on its padding,
        whose logits are zeros. Rows that end early may be padded on the right with anything. `labels` as `input_ids`, -100 where
        nothing is asked; the loss (nats) is a mean. Raises ValueError for a mask with gaps.
        """
        if unknown := sorted(
            name for name, value in kwargs.items() if value is not None and name in ("cache", "inputs_embeds")
        ):
            raise TypeError(f"{unknown[0]} is no argument of a FITDecoder: its own state is that of `advance`")
        self._check(input_ids)
        length, there = input_ids.shape[1], self._there(attention_mask, input_ids)
        ids = input_ids
        if there is not None:  # each row from its first token on
            places = torch.arange(length, device=ids.device) + there.int().argmax(1)[:, None]
            ids = ids.gather(1, places.clamp(max=length - 1))
        x, _ = group_sequence(self.embed(ids), self.group_size)
        z = self._rows(0, x.shape[1]).expand(len(x), -1, -1, -1)
        logits = self.head(ungroup_sequence(self.body(x + self.positions, z)[0], length))
        if there is not None:
            back = (2 * torch.arange(length, device=ids.device) - places).clamp(min=0)
            logits = logits.gather(1, back[..., None].expand_as(logits)).masked_fill(~there[..., None], 0.0)
        if labels is None:
            return CausalLMOutput(logits=logits)
        targets = labels[:, 1:]
        if there is not None:
            targets = targets.masked_fill(~(there[:, 1:] & there[:, :-1]), -100)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten(), ignore_index=-100)
        return CausalLMOutput(loss=loss, logits=logits)

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
        """The next tokens (batch, tokens) after `state`: their logits, and the new state. `state` itself is not changed."""
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
        """Tokens of one group, after `before` earlier ones; changes the dictionary `state`."""
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
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
        eos_token_id: int | None = None,
    ) -> Tensor:
        """`input_ids` (batch, tokens) and their continuation: the likeliest tokens, or samples if `temperature` is above 0.

        Prompts of different lengths are padded on the left, with an `attention_mask` that is 0 there. A row that has reached `eos_token_id`
        repeats it; generation stops when all have. Raises TypeError and ValueError for arguments out of their range.
        """
        checks.whole("max_new_tokens", max_new_tokens, low=0)
        checks.number("temperature", temperature, low=0)
        if eos_token_id is not None:
            checks.whole("eos_token_id", eos_token_id, low=0)
        checks.tensor("input_ids", input_ids, shape=("batch", "tokens"), dtype="integer")
        there = self._there(attention_mask, input_ids)
        options: dict[str, Any] = {"temperature": temperature, "generator": generator, "eos_token_id": eos_token_id}
        if there is None:
            new = self._continue(input_ids, max_new_tokens, **options)
        else:
            lengths = there.sum(1)
            if not (there[:, -1] & (lengths > 0)).all():
                raise ValueError("attention_mask must be 1 on the last token of every row: pad on the left")
            new = input_ids.new_full((len(input_ids), max_new_tokens), 0 if eos_token_id is None else eos_token_id)
            longest = 0
            for length in sorted(set(lengths.tolist())):  # prompts of one length run together: their groups align
                rows = (lengths == length).nonzero()[:, 0]
                found = self._continue(input_ids[rows, -length:], max_new_tokens, **options)
                new[rows, : found.shape[1]], longest = found, max(longest, found.shape[1])
            new = new[:, :longest]
        return torch.cat([input_ids, new], 1)

    def _continue(
        self,
        ids: Tensor,
        max_new_tokens: int,
        *,
        temperature: float,
        generator: torch.Generator | None,
        eos_token_id: int | None,
    ) -> Tensor:
        """The new tokens after prompts of one length."""
        self._check(ids, max_new_tokens)
        state, new, found = self.init_state(len(ids)), ids, ids[:, :0]
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
            found = torch.cat([found, new], 1)
            if ended.all():
                break
        return found


AutoConfig.register("assay_fit", FITConfig, exist_ok=True)
AutoModelForCausalLM.register(FITConfig, FITDecoder, exist_ok=True)

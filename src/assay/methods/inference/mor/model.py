"""`MoRConfig` and `MoRForCausalLM`: a Llama-type model whose layers are shared by recursions; each token takes as many as it needs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from assay import checks
from assay.methods.core.models.decoder import Pass
from assay.methods.core.models.wrapped import WrappedConfig, WrappedForCausalLM
from assay.methods.inference.mor import routing
from assay.methods.inference.mor.cache import ALL, MoRCache, Place, Rows, Shared
from assay.methods.inference.mor.plan import Plan, checked_capacities, layer_plan, tokens_of
from assay.methods.inference.mor.tokens import Tokens, mask_for

ROUTERS = ("expert", "token", "none")
ATTENTIONS = ("sdpa", "eager")  # those whose masks can be cut: the others take packed or compiled ones
RELEASED: dict[str, dict[str, Any]] = {
    "expert": {"alpha": 0.1, "aux_weight": 0.001, "z_weight": 0.0},
    "token": {"alpha": 1.0, "aux_weight": 0.1, "z_weight": 1e-5},
    "none": {"alpha": 1.0, "aux_weight": 0.0, "z_weight": 0.0},
}


class MoRConfig(WrappedConfig):
    """Around `base`, whose `num_hidden_layers` are the layers that are stored; with the settings of the paper's best models as defaults.

    - `recursions`: how often the shared layers run at most (N_r); `sharing`: "middle_cycle" (the first and the last layer stand alone,
      those between are run in their order, again and again), "cycle" (no layer stands alone), "sequence" and "middle_sequence" (each
      layer `recursions` times in its place).
    - `router`: "expert" (a recursion takes the tokens that score best among those of the recursion before), "token" (each token chooses its
      depth at the start), or "none" (all tokens take all recursions: the recursive transformer).
    - `capacities`: the share of all tokens that each recursion takes under "expert"; None for the paper's (N_r - r + 1) / N_r. Over the
      first `capacity_warmup` forward passes of training they fall from 1 along a cosine.
    - `gating`: "weighted" (x + g * block(x), as released: the block's output holds its own residual) or "additive" (x + block(x));
      `alpha` scales the gate: None for the released 0.1 ("expert") and 1 ("token").
    - `causality`: how "expert" learns to choose without seeing later tokens: "aux_loss" (its own scores also predict the choice) or
      "aux_router" (a second router on detached input does).
    - `inference`: "threshold" (a token goes on where the sigmoid of its score is above 1/2; causal) or "top_k" (as released: the best of
      all tokens of the call, later ones included; with a cache every new token, being alone, takes all recursions). Training is top-k.
    - `balancing` of "token": "loss" or "loss_free" (a bias that moves by `bias_rate` against the load at every forward pass in training).
    - `aux_weight` and `z_weight`: coefficients of the membership loss ("expert") or the balancing loss ("token"), and of the router z-loss;
      None for the released 0.001 and 0, 0.1 and 1e-5.
    - `kv`: what a later recursion attends to: "recursion" (keys and values of the tokens that are in it), "share" (those of the first
      recursion, of all tokens; only queries are computed) or "update" (the same, where tokens of a recursion put in their new ones).

    Raises ValueError or TypeError for values out of range, for fewer layers than the sharing needs, and for shared keys and values under
    a "sequence", whose recursions have different layers.

    >>> from transformers import LlamaConfig
    >>> MoRConfig(LlamaConfig(num_hidden_layers=5), recursions=3).plan.unrolled
    (0, 1, 2, 3, 1, 2, 3, 1, 2, 3, 4)
    """

    model_type = "assay_mor"
    keys_to_ignore_at_inference = ["cache", "depths", "aux_loss"]

    def __init__(
        self,
        base: PretrainedConfig | Mapping[str, Any] | None = None,
        recursions: int = 2,
        sharing: str = "middle_cycle",
        router: str = "expert",
        capacities: Sequence[float] | None = None,
        capacity_warmup: int = 0,
        gating: str = "weighted",
        alpha: float | None = None,
        causality: str = "aux_loss",
        inference: str = "threshold",
        balancing: str = "loss",
        bias_rate: float = 0.001,
        aux_weight: float | None = None,
        z_weight: float | None = None,
        kv: str = "recursion",
        **kwargs: Any,
    ):
        self.recursions = checks.whole("recursions", recursions, low=1)
        self.sharing = sharing
        self.router = checks.choice("router", router, ROUTERS)
        self.capacities = None if capacities is None else checked_capacities(capacities, self.recursions)
        self.capacity_warmup = checks.whole("capacity_warmup", capacity_warmup, low=0)
        self.gating = checks.choice("gating", gating, ("weighted", "additive"))
        self.causality = checks.choice("causality", causality, ("aux_loss", "aux_router"))
        self.inference = checks.choice("inference", inference, ("threshold", "top_k"))
        self.balancing = checks.choice("balancing", balancing, ("loss", "loss_free"))
        self.bias_rate = checks.number("bias_rate", bias_rate, low=0)
        released = RELEASED[router]
        self.alpha = checks.number("alpha", released["alpha"] if alpha is None else alpha, above=0)
        self.aux_weight = checks.number(
            "aux_weight", released["aux_weight"] if aux_weight is None else aux_weight, low=0
        )
        self.z_weight = checks.number("z_weight", released["z_weight"] if z_weight is None else z_weight, low=0)
        self.kv = checks.choice("kv", kv, ("recursion", "share", "update"))
        super().__init__(base, **kwargs)
        layer_plan(self.num_hidden_layers, self.recursions, self.sharing)
        if self.kv != "recursion" and not self.sharing.endswith("cycle"):
            raise ValueError(
                f"kv {self.kv!r} needs a sharing whose recursions have the same layers, not {self.sharing!r}"
            )

    @property
    def shares(self) -> list[float]:
        """The capacities, the paper's where none are given."""
        return checked_capacities(self.capacities, self.recursions)

    @property
    def plan(self) -> Plan:
        """Which stored layer runs where."""
        return layer_plan(self.num_hidden_layers, self.recursions, self.sharing)


@dataclass
class MoROutput(CausalLMOutputWithPast):
    """Also `depths` (batch, tokens): how many recursions each token took, 0 on padding; and in training `aux_loss`, which is in `loss`."""

    aux_loss: Tensor | None = None
    depths: Tensor | None = None


class MoRForCausalLM(WrappedForCausalLM):
    """Mixture-of-Recursions over a decoder-only model of transformers; see `MoRConfig`.

    `from_base(model, recursions=2)` makes the layers of a model the shared ones, so that it runs deeper than it was; `convert` makes a
    model of fewer stored layers that runs as deep. What is shared is stored once: `save_pretrained` writes the stored layers and the
    routers. The decision of a token depends on itself alone (threshold, token-choice), so that a cache, padding and other rows
    change nothing; "top_k" inference, as released, is another matter. Tokens that are not in a recursion are not computed there: rows
    without one are left out, and the others are cut to their tokens, as long as the longest of them.

    When NOT to use it: a small model (the paper's loses at 135M), single rows on an accelerator whose time does not depend on a few tokens
    more, and attention implementations other than sdpa and eager, which are refused. Under kv "share" one thread at a time may use the
    model: while a later recursion runs, its layers lack their key and value projections.
    """

    config_class = MoRConfig
    config: MoRConfig
    _supports_flash_attn = False
    _supports_flex_attn = False

    def __init__(self, config: MoRConfig, base: nn.Module | None = None):
        super().__init__(config, base)
        if why := why_not(config, self.base):
            raise ValueError(f"base cannot be run in recursions: {why}")
        if config.router != "none":
            auxiliary = config.router == "expert" and config.causality == "aux_router"
            self.routers = routing.Routers(config.hidden_size, config.recursions, config.router, auxiliary=auxiliary)
        self.post_init()

    @classmethod
    def from_base(cls, model: nn.Module, **settings: Any) -> Self:
        """Run the layers of `model` in recursions, with the fields of `MoRConfig` as `settings`; nothing is copied, the model's layers are
        the stored ones. Raises ValueError for a model whose parts are not understood, and for what the configuration refuses, before
        anything is changed.
        """
        return super().from_base(model, **settings)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> Any:
        """A cache of ours before the first token, which drafts and prompts in chunks ask for."""
        if model_kwargs.get("cache") is None and generation_config.use_cache is not False:
            model_kwargs["cache"] = MoRCache(device=self.parts.embed.weight.device)
            return None
        generation: Any = super()
        return generation._prepare_cache_for_generation(generation_config, model_kwargs, *args)

    @cached_property
    def plan(self) -> Plan:
        """Which stored layer runs where."""
        return self.config.plan

    def unrolled(self) -> list[nn.Module]:
        """The layers in the order they run at full depth; those that are shared stand there several times."""
        return [self.parts.layers[index] for index in self.plan.unrolled]

    def new_cache(self, batch: int) -> MoRCache:
        """An empty cache of `batch` rows."""
        return MoRCache(batch, self.parts.embed.weight.device)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: MoRCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> MoROutput:
        """`input_ids` (batch, tokens) or `inputs_embeds`; `attention_mask` (batch, columns so far) is 1 on tokens and 0 on padding.

        `labels` as in transformers; `loss` is theirs and the auxiliary one. With `use_cache` or `cache` keys and values are kept.
        Raises ValueError for a mask of other numbers or another width, a cache of another number of rows, gradient checkpointing together
        with shared keys and values, an attention implementation other than sdpa and eager, and what the model does not have (hidden states,
        attention weights); TypeError for a cache that is none of this model's and for `past_key_values`, the former name of `cache`.
        """
        self._refuse(kwargs, cache)
        run, valid, store = self._begin(input_ids, attention_mask, position_ids, cache, inputs_embeds, use_cache)
        x = self._dense(self.plan.first, run.hidden, run, store, "first")
        x, depths, aux = self._recursions(x, run, store, valid)
        x = self._dense(self.plan.last, x, run, store, "last")
        kept = cache if cache is not None else store if use_cache and not self.training else None
        if kept is not None:
            kept.seen += x.shape[1]
        out = self.output(
            self.parts.norm(x), cache=kept, labels=labels, logits_to_keep=logits_to_keep, num_items_in_batch=num_items_in_batch
        )  # fmt: skip
        loss = out.loss
        if loss is not None and aux is not None and labels is not None:
            # where the Trainer accumulates, each part has its share of the mean: of what is predicted, so not the first tokens
            share = 1.0 if num_items_in_batch is None else labels[:, 1:].ne(-100).sum() / num_items_in_batch
            loss = loss + share * aux
        made: Any = MoROutput(loss=cast(Any, loss), logits=out.logits, cache=kept, aux_loss=aux, depths=depths)
        return cast(MoROutput, made)

    # ---- before the layers

    def _refuse(self, kwargs: Mapping[str, Any], cache: Any) -> None:
        self.refuse(kwargs)
        if cache is not None and not isinstance(cache, MoRCache):
            raise TypeError(f"cache must be a MoRCache, which the model makes by itself, got {type(cache).__name__}")
        if why := why_not_attention(self.base.config):
            raise ValueError(f"base cannot be run in recursions: {why}")
        if self.config.kv != "recursion" and self.training and getattr(self.base, "is_activation_checkpointing", False):
            raise ValueError(
                f"kv must be 'recursion' with gradient checkpointing, which keeps no keys and values, got {self.config.kv!r}"
            )

    def _begin(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: MoRCache | None,
        inputs_embeds: Tensor | None,
        use_cache: bool | None,
    ) -> tuple[Pass, Tensor | None, MoRCache | None]:
        """The pass, which of its tokens are none of padding (None: all), and where keys and values go."""
        given = input_ids if inputs_embeds is None else inputs_embeds
        if input_ids is not None:
            checks.tensor("input_ids", input_ids, shape=("batch", "tokens"), dtype="integer")
        if given is None:
            raise ValueError("input_ids or inputs_embeds must be given, and not both")
        batch, tokens = given.shape[:2]
        if cache is not None:
            cache.rows = batch if cache.rows is None else cache.rows
            cache.device = given.device if cache.device is None else cache.device
            if cache.rows != batch:
                raise ValueError(f"cache must hold {batch} rows, as the tokens do, got {cache.rows}")
        seen = 0 if cache is None else cache.seen
        if attention_mask is not None:
            checks.tensor("attention_mask", attention_mask, shape=(batch, seen + tokens), dtype="any")
            if ((attention_mask != 0) & (attention_mask != 1)).any():
                raise ValueError("attention_mask must hold 0 and 1 only")
        if cache is None and use_cache and not self.training:
            cache = self.new_cache(batch)
        run = self.parts.begin(input_ids, attention_mask, position_ids, cache, inputs_embeds)
        valid = None if attention_mask is None or attention_mask.all() else attention_mask[:, seen:].bool()
        if cache is None and self.config.kv != "recursion":
            cache = self.new_cache(batch)  # for this pass only
        return run, valid, cache

    # ---- layers

    def _dense(self, layers: Sequence[int], x: Tensor, run: Pass, store: MoRCache | None, stage: str | int) -> Tensor:
        """All tokens through some layers, as the base runs them."""
        if not layers:
            return x
        place: Any = None
        if store is not None:
            columns = torch.arange(store.seen, store.seen + x.shape[1], device=x.device).expand(len(x), -1)
            if self._shares(stage):
                entries = store.seen + x.shape[1]
                place = Shared(store.stage(0), ALL, entries, self._updates(store, stage, columns, ALL, None))
            else:
                place = store.stage(stage).reserve(columns)
        return self._layers(layers, x, replace(run, cache=place))

    def _sparse(
        self, layers: Sequence[int], x: Tensor, run: Pass, store: MoRCache | None, stage: int, tokens: Tokens
    ) -> Tensor:
        """`tokens` of `x` through some layers: (A, K, D). No other token is computed."""
        seen = 0 if store is None else store.seen
        rows = ALL if len(tokens.rows) == len(x) else tokens.rows
        columns = tokens.columns + seen
        place: Any = None
        key_columns, key_valid, alone = (
            columns,
            tokens.valid,
            True,
        )  # what is attended to; whether by these tokens among themselves
        if store is not None and self._shares(stage):
            entries = seen + x.shape[1]
            place = Shared(store.stage(0), rows, entries, self._updates(store, stage, columns, rows, tokens.counts))
            key_columns = torch.arange(entries, device=x.device).expand(len(columns), -1)
            key_valid, alone = None, False
        elif store is not None:
            place = store.stage(stage).reserve(columns, rows, tokens.counts)
            key_columns, key_valid, alone = place.columns, place.valid, place.seen == columns.shape[1]
        masks = {}
        for kind, mask in run.masks.items():
            every = x.shape[1] == 1 and key_valid is None  # one new token a row, which sees all that there is
            plain = mask is None and tokens.valid is None and (alone or every)
            masks[kind] = None if plain else mask_for(mask, tokens, seen, key_columns, key_valid, x.dtype)
        rotary = {kind: (tokens.take(cos), tokens.take(sin)) for kind, (cos, sin) in run.rotary.items()}
        part = Pass(run.hidden, tokens.take(run.position_ids), masks, rotary, place)
        return self._layers(layers, tokens.take(x), part)

    def _layers(self, layers: Sequence[int], x: Tensor, run: Pass) -> Tensor:
        shared = isinstance(run.cache, Shared) and run.cache.places is None
        for slot, index in enumerate(layers):
            with without_keys(self.parts.layers[index]) if shared else contextlib.nullcontext():
                x = self.parts.layer(index, x, run, slot=slot)
        return x

    def _shares(self, stage: str | int) -> bool:
        """Whether a stage looks at the first recursion's keys and values."""
        return self.config.kv != "recursion" and isinstance(stage, int) and stage > 0

    def _updates(
        self, store: MoRCache, stage: str | int, columns: Tensor, rows: Rows, counts: Tensor | None
    ) -> list[Place] | None:
        """With "update": what the recursions after the first hold of these rows, room for the new tokens in the last."""
        if self.config.kv != "update":
            return None
        assert isinstance(stage, int)
        own = store.stage(stage).reserve(columns, rows, counts)
        return [*(store.stage(r).look(rows) for r in range(1, stage)), own]

    # ---- recursions

    def _recursions(
        self, x: Tensor, run: Pass, store: MoRCache | None, valid: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The stream behind the recursions, the depth of each token, and the auxiliary loss of training."""
        alive = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if valid is None else valid
        if self.config.router == "expert":
            return self._expert(x, run, store, alive)
        if self.config.router == "token":
            return self._token(x, run, store, alive)
        for r, group in enumerate(self.plan.groups):
            x = self._dense(group, x, run, store, r)
        return x, alive * self.config.recursions, None

    def _expert(
        self, x: Tensor, run: Pass, store: MoRCache | None, alive: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        config, losses = self.config, []
        lengths, depths, everyone = alive.sum(1), torch.zeros_like(alive, dtype=torch.int64), True
        for r, (group, share) in enumerate(zip(self.plan.groups, self._shares_now(), strict=True)):
            scores = self.routers.scores(x, r)
            predicted = self.routers.predicted(x, r) if self.routers.auxiliary else scores
            if everyone and share >= 1:
                chosen = alive
            else:
                chosen, everyone = self.choose(r, share, scores, predicted, alive, lengths), False
            if self.training:
                losses.append(config.aux_weight * routing.membership_loss(predicted, chosen, alive))
                if config.z_weight:
                    losses.append(config.z_weight * routing.z_loss(scores[alive][:, None]))
            tokens = None if everyone else Tokens.of(chosen)
            if not everyone and tokens is None:
                break
            gate = self._gate(scores.sigmoid(), x)
            if tokens is None:
                x = x + gate * self._dense(group, x, run, store, r)
            else:
                done = self._sparse(group, x, run, store, r, tokens)
                x = tokens.put(x, tokens.take(x) + tokens.take(gate) * done)
            alive = chosen
            depths = depths + chosen
        return x, depths, sum(losses, start=x.new_zeros((), dtype=torch.float32)) if losses else None

    def choose(
        self, recursion: int, share: float, scores: Tensor, predicted: Tensor, alive: Tensor, lengths: Tensor
    ) -> Tensor:
        """(B, S) bool: which of the `alive` tokens go into a recursion (from 0) under expert-choice.

        In training, and under "top_k", those of the best `scores`, a `share` of the `lengths` (B,) that rows have without padding; else all
        whose `predicted` score is above the threshold.
        """
        if self.training or self.config.inference == "top_k":
            counts = torch.tensor([tokens_of(share, n) for n in lengths.tolist()], device=scores.device)
            return routing.best(scores, alive, counts)
        return alive & self.goes_on(recursion, predicted)

    def goes_on(self, recursion: int, predicted: Tensor) -> Tensor:
        """(...) bool: which of the tokens that may go into a recursion (from 0) do so under the threshold, by `predicted` (...)."""
        return predicted > 0

    def _token(
        self, x: Tensor, run: Pass, store: MoRCache | None, alive: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        config, entry = self.config, x
        scores = self.routers.scores(x)
        probabilities, choices = self.chosen_depths(scores)
        aux = None
        if self.training:
            seen, taken = probabilities[alive], choices[alive]
            aux = config.z_weight * routing.z_loss(scores[alive])
            if config.balancing == "loss":
                aux = aux + config.aux_weight * routing.balancing_loss(seen, taken)
            else:
                self._rebalance(taken)
        depths = (choices + 1) * alive
        for r, group in enumerate(self.plan.groups):
            tokens = Tokens.of(depths > r) if r else None
            if r and tokens is None:
                break
            if tokens is None:
                x = self._dense(group, x, run, store, r)
            else:
                x = tokens.put(x, self._sparse(group, x, run, store, r, tokens))
        weight = probabilities.gather(-1, choices[..., None])[..., 0]
        return entry + self._gate(weight, x) * x, depths, aux

    def chosen_depths(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Token-choice: probabilities (..., N_r) and the chosen depth less one (...), of equally good ones the least."""
        probabilities = scores.softmax(-1)
        preferred = probabilities
        if self.config.balancing == "loss_free":
            preferred = probabilities + self.config.bias_rate * self.routers.balance
        return probabilities, routing.first_best(preferred)

    @torch.no_grad()
    def _rebalance(self, choices: Tensor) -> None:
        """Loss-free balancing: one step towards what was chosen less often than it should be, away from what was chosen more often."""
        load = routing.loads(choices, self.config.recursions)
        self.routers.balance += torch.sign(1 / self.config.recursions - load).to(torch.int64)

    def _gate(self, weight: Tensor, x: Tensor) -> Tensor:
        """(..., 1) by which a block's output is added, in the dtype of `x`."""
        found = self.config.alpha * weight if self.config.gating == "weighted" else torch.ones_like(weight)
        return found[..., None].to(x.dtype)

    def _shares_now(self) -> list[float]:
        """The capacities, of the warm-up in training."""
        shares, steps = self.config.shares, self.config.capacity_warmup
        if not (self.training and steps):
            return shares
        self.routers.steps += 1
        step = int(self.routers.steps)
        return [routing.warmed(share, step, steps) for share in shares]


# ---------------------------------------------------------------------------------------------------------------- what a base must have


def why_not(config: MoRConfig, base: Any) -> str:
    """Why a model cannot be run under this configuration; empty if it can."""
    if why := why_not_attention(base.config):
        return why
    if config.kv == "share":
        for layer in base.model.layers:
            if not all(isinstance(getattr(layer.self_attn, name, None), nn.Linear) for name in ("k_proj", "v_proj")):
                return (
                    f"kv 'share' leaves key and value projections out, which {type(base).__name__} does not have apart"
                )
    return ""


def why_not_attention(base: Any) -> str:
    """Why the attention implementation of a configuration cannot run some of the tokens; empty if it can."""
    found = getattr(base, "_attn_implementation", None)
    return (
        ""
        if found in (*ATTENTIONS, None)
        else f"its attention is {found!r}, which takes no mask of some tokens; use sdpa or eager"
    )


class _Unneeded(nn.Module):
    """In place of a projection whose result nobody looks at: zeros of its shape that take no memory."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(()).expand(*x.shape[:-1], self.width)


@contextlib.contextmanager
def without_keys(layer: Any) -> Iterator[None]:
    """Inside, the layer's key and value projections are not computed."""
    attention = layer.self_attn
    kept = {name: getattr(attention, name) for name in ("k_proj", "v_proj")}
    try:
        for name, module in kept.items():
            attention._modules[name] = _Unneeded(module.out_features)
        yield
    finally:
        attention._modules.update(kept)


AutoConfig.register("assay_mor", MoRConfig, exist_ok=True)
AutoModelForCausalLM.register(MoRConfig, MoRForCausalLM, exist_ok=True)

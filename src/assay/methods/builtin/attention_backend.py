"""Dense attention by another implementation: the same numbers up to rounding, sooner.

"kernel" is assay's own CPU kernel as `attn_implementation="assay_dense"`. It does not expand grouped keys and values, multiplies
bfloat16 in bfloat16, reads the cache once per key head when decoding, and skips what a sliding window excludes; torch's
SDPA does none of this on the CPU. It supports sinks (gpt_oss), which SDPA does not. "sdpa" and "eager" are transformers' own.

When NOT to use it: on a GPU, where SDPA is the better kernel; in training, which falls back to SDPA.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from assay import checks
from assay.methods.core.attention.integration import can_register, has_sinks, register_attention, set_attention
from assay.methods.core.attention.plan import AttentionPlan, kernel_time, load_kernel
from assay.methods.transform import Effect, Fit, TuneContext, only

NAME = "assay_dense"  # as attn_implementation
BACKENDS = {"kernel": NAME, "sdpa": "sdpa", "eager": "eager"}


def register() -> None:
    """Register `attn_implementation="assay_dense"` with transformers (which this imports); may be called repeatedly."""
    register_attention(NAME, _dense_plan)


def _dense_plan(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    *,
    causal: bool,
    scale: float | None,
    key_start: Tensor | None,
    window: int | None,
) -> tuple[AttentionPlan, Mapping[str, Any]]:
    return AttentionPlan(q.shape[2], k.shape[2], causal=causal, key_start=key_start, window=window), {}


class AttentionBackend:
    """Sets the attention implementation. Configuration: `backend`, "kernel" (default), "sdpa" or "eager"."""

    name = "attention_backend"
    slot = "attention"
    goals: frozenset[str] = frozenset({"ttft", "decode", "throughput"})
    exact = True

    def applies_to(self, model: nn.Module, context: TuneContext) -> Fit:
        if reason := can_register(model):
            return Fit(False, reason)
        if not self.configs(model, context):
            return Fit(False, f"attention is {_now(model)!r} already, and nothing better is there")
        # The kernel does the same operations in less time; the roofline, which counts operations, is told so as fewer.
        gain = kernel_time() if _kernel_fits(model) else 1.0
        return Fit(True, effects=(Effect("attention", macs=gain, bytes=_cache_share(model)),))

    def configs(self, model: nn.Module, context: TuneContext) -> list[dict[str, Any]]:
        choices = (["kernel"] if _kernel_fits(model) else []) + ([] if has_sinks(model) else ["sdpa"])
        return [{"backend": choice} for choice in choices if BACKENDS[choice] != _now(model)]

    def check(self, config: Mapping[str, Any]) -> None:
        """Raises ValueError or TypeError naming the setting that is wrong."""
        checks.choice("backend", only(config, ("backend",)).get("backend", "kernel"), BACKENDS)

    def apply(self, model: nn.Module, config: Mapping[str, Any], context: TuneContext) -> nn.Module:
        """Raises TypeError or ValueError, before anything is changed, for a configuration or a model it does not fit."""
        self.check(config)
        backend = config.get("backend", "kernel")
        if reason := can_register(model):
            raise ValueError(f"attention_backend does not fit this model: {reason}")
        if backend == "sdpa" and has_sinks(model):
            raise ValueError("backend must be 'kernel' or 'eager' for this model: torch's SDPA has no sinks")
        register()
        return set_attention(model, BACKENDS[backend])

    def describe(self, config: Mapping[str, Any]) -> str:
        names = {"kernel": "dense attention by assay's kernel", "sdpa": "SDPA attention", "eager": "eager attention"}
        return names.get(config.get("backend", "kernel"), "dense attention")


def _now(model: nn.Module) -> str:
    return str(cast(Any, model).config.get_text_config()._attn_implementation)


def _kernel_fits(model: nn.Module) -> bool:
    config = cast(Any, model).config.get_text_config()
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    return on_cpu and dim % 16 == 0 and dim <= 1024 and load_kernel()


def _cache_share(model: nn.Module) -> float:
    """Key heads per query head: the share of the cache that is read if its heads are not expanded."""
    config = cast(Any, model).config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return float(heads / config.num_attention_heads)


transform = AttentionBackend()

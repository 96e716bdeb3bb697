"""MACs of our compiled operators, for `assay.measure.cost`; registered when a kernel is loaded.

`llama_decode` is left out: one call runs many steps of a whole model, so a profile lists it as uncounted instead of guessing.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from assay.measure.cost import register_macs


def _linear(x: Tensor, *rest: Any, out: Tensor) -> int:
    return x.numel() * out.shape[-1]


def _gated_mlp(x: Tensor, *rest: Any, out: Tensor) -> int:
    hidden: int = rest[-2]
    return x.numel() * 2 * hidden + out.numel() * hidden


def _qkv(x: Tensor, *rest: Any, out: tuple[Tensor, Tensor, Tensor]) -> int:
    return x.shape[-1] * sum(part.numel() for part in out)


def _block_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *rest: Any, out: Tensor) -> int:
    from assay.methods.attention.plan import AttentionPlan

    key_start, block, causal, *_ = rest
    plan = AttentionPlan(q.shape[2], k.shape[2], block, causal, mask, key_start)
    return plan.macs(head_dim=q.shape[3], value_dim=v.shape[3], batch=q.shape[0], heads=q.shape[1])


def _decode_attention(q: Tensor, k: Tensor, *rest: Any, out: Tensor) -> int:
    return 2 * q.numel() * k.shape[-2]


def _scores(
    q: Tensor, k: Tensor, key_start: Tensor | None, stride: int, block: int, causal: bool, *rest: Any, out: Tensor
) -> int:
    return int(q.numel() * k.shape[-2] // stride // (2 if causal else 1))


def _memory_look_up(x: Tensor, tables: list[Tensor], biases: Any, bits: int, *rest: Any, out: list[Tensor]) -> int:
    return x.shape[-1] // bits * sum(part.numel() for part in out)


register_macs("assay::w8a8_linear", _linear, "linear", "int8")
register_macs("assay::w8a8_mlp", _gated_mlp, "linear", "int8")
register_macs("assay::w8a8_qkv_rope", _qkv, "linear", "int8")
register_macs("assay::weight_only_linear", _linear, "linear")
register_macs("assay::block_attention", _block_attention, "attention")
register_macs("assay::decode_attention", _decode_attention, "attention")
register_macs("assay::antidiagonal_scores", _scores, "attention")
register_macs("assay::memory_look_up", _memory_look_up, "linear")

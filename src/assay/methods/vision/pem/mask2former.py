"""Prototypes in transformers' Mask2Former: its decoder's masked cross-attention is replaced, and can be put back."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from assay.methods.vision.pem.attention import NormAxis, PrototypeCrossAttention, Variant

DECODER, LAYER = "Mask2FormerMaskedAttentionDecoder", "Mask2FormerMaskedAttentionDecoderLayer"


class Mask2FormerPrototypes(nn.Module):
    """In the place of a layer's `cross_attn`: called as it is, with sequences first and a mask that is True where nothing is seen.

    The layer adds the queries itself. `replaced` is what stood there before; it is no part of this module's parameters.
    """

    def __init__(self, inner: PrototypeCrossAttention, replaced: tuple[nn.Module, nn.Module]) -> None:
        super().__init__()
        self.inner = inner
        self.replaced = replaced
        self.sizes: dict[int, tuple[int, int]] = {}

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **ignored: Any
    ) -> tuple[Tensor, None]:
        """query (Q, B, width), key (N, B, width), both with their positions; attn_mask bool (B heads, Q, N), equal for all heads."""
        if len(key) not in self.sizes:
            raise ValueError(
                f"key must have as many pixels as a map of the decoder, {list(self.sizes)}, got {len(key)}"
            )
        x = key.permute(1, 2, 0).unflatten(2, self.sizes[len(key)])
        seen = None if attn_mask is None else ~attn_mask.unflatten(0, (query.shape[1], -1))[:, 0]
        return self.inner.update(query.transpose(0, 1), x, seen).transpose(0, 1), None


def apply_pem(model: nn.Module, *, norm_axis: NormAxis = "queries", variant: Variant = "paper") -> nn.Module:
    """Replace every masked cross-attention of a transformers Mask2Former (in place) by prototypes; the same model comes back.

    Inputs and outputs stay as they were; `output_attentions` has no cross-attention to give. The new weights are random: train the model.
    Its pixel decoder stays; `PixelDecoder` is PEM's own. A layer with its norms before (`pre_norm`) becomes a layer of PEM: what norms
    the queries is inside of the new module. One with its norms after, as in the published Mask2Former, keeps the norm after the sum.
    `norm_axis` and `variant` as in `PrototypeCrossAttention`; an empty mask is already one of all pixels when it comes from transformers.
    `remove_pem` puts back what was there.

    When not to use it: without training.

    Raises ValueError for a model without such layers, and for one that has prototypes already.
    """
    layers = _layers(model)
    if any(isinstance(layer.cross_attn, Mask2FormerPrototypes) for layer in layers):
        raise ValueError("model must not have prototypes already: remove_pem(model) first")
    new = []
    for layer in layers:
        old = layer.cross_attn
        inner = PrototypeCrossAttention(layer.embed_dim, old.num_heads, norm_axis=norm_axis, variant=variant)
        like = old.out_proj.weight
        inner.to(device=like.device, dtype=like.dtype).train(layer.training)
        new.append(Mask2FormerPrototypes(inner, (old, layer.cross_attn_layer_norm)))
    for layer, module in zip(layers, new, strict=True):
        layer.cross_attn = module.train(layer.training)
        if layer.pre_norm:
            layer.cross_attn_layer_norm = nn.Identity()
    for decoder in _decoders(model):
        decoder.register_forward_pre_hook(_tell_sizes, with_kwargs=True)
    return model


def remove_pem(model: nn.Module) -> nn.Module:
    """Put back what `apply_pem` replaced, with its old weights, in place; the same model comes back. ValueError where there is nothing."""
    layers = [layer for layer in _layers(model) if isinstance(layer.cross_attn, Mask2FormerPrototypes)]
    if not layers:
        raise ValueError("model must have prototypes: apply_pem(model) puts them there")
    for layer in layers:
        like = layer.cross_attn.inner.alpha  # the model may have been moved since
        layer.cross_attn, layer.cross_attn_layer_norm = (
            old.to(device=like.device, dtype=like.dtype).train(layer.training) for old in layer.cross_attn.replaced
        )
    for decoder in _decoders(model):
        hooks = decoder._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is _tell_sizes]:
            del hooks[key]
            decoder._forward_pre_hooks_with_kwargs.pop(key, None)
    return model


def _tell_sizes(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Tells the layers how high and wide the maps are, of which they get sequences of pixels."""
    sizes = {int(height) * int(width): (int(height), int(width)) for height, width in kwargs["feature_size_list"]}
    for layer in decoder.layers:  # type: ignore[union-attr]
        layer.cross_attn.sizes = sizes


def _layers(model: nn.Module) -> list[Any]:
    found = [module for module in model.modules() if type(module).__name__ == LAYER]
    if not found:
        raise ValueError(f"model must be a Mask2Former of transformers (have a {LAYER}), got {type(model).__name__}")
    return found


def _decoders(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__ == DECODER]

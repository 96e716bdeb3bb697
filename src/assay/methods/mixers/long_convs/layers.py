"""The layers: a long convolution with its output projection, a classifier of them, and two causal mixers of language models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks
from assay.methods.core.mixers.protocol import Mixer, State, check_positive, check_sequence, mixer
from assay.methods.mixers.long_convs.butterfly import ButterflyDFT
from assay.methods.mixers.long_convs.convolution import around, fft_conv
from assay.methods.mixers.long_convs.kernel import LongKernel


class LongConv(nn.Module):
    """The paper's layer on (batch, tokens, dim): convolution, GELU, dropout, Linear to 2 dim, GLU.

    `length`: the most tokens it takes; fewer use the first taps. `channels` kernels an input (they multiply the output
    projection), `bidirectional` a second set of kernels that looks ahead. `learned_dft`, options of `ButterflyDFT` (may be
    empty): learned transforms of input and kernels, the inverse stays exact; such a layer is not causal once trained.
    `dropout` of what the output projection takes, `kernel_dropout` of taps, `kernel` options as `LongKernel` takes them. Channels,
    threshold and dropout of taps are by default those of the released configuration. Empty inputs are their own outputs.
    Raises ValueError for more than `length` tokens.

    >>> layer = LongConv(8, length=64).eval()
    >>> layer(torch.zeros(2, 50, 8)).shape
    torch.Size([2, 50, 8])
    """

    def __init__(
        self,
        dim: int,
        length: int,
        *,
        channels: int = 2,
        bidirectional: bool = False,
        dropout: float = 0.0,
        kernel_dropout: float = 0.2,
        learned_dft: dict[str, Any] | None = None,
        **kernel: Any,
    ):
        super().__init__()
        check_positive(dim=dim, length=length, channels=channels)
        both = 2 if checks.flag("bidirectional", bidirectional) else 1
        self.dim, self.length, self.channels, self.bidirectional = dim, length, channels, bidirectional
        self.kernel = LongKernel(channels * both, dim, length, skips=channels, dropout=kernel_dropout, **kernel)
        self.dropout = nn.Dropout(checks.number("dropout", dropout, low=0, below=1))
        self.out_proj = nn.Linear(channels * dim, 2 * dim)
        if learned_dft is not None:
            self.dft_u, self.dft_k = ButterflyDFT(**learned_dft), ButterflyDFT(**learned_dft)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`mask` (batch, tokens) bool, False on padding, which is taken as zeros."""
        check_sequence(x, self.dim, mask)
        tokens = x.shape[1]
        check_length(tokens, self.length)
        if not x.numel():
            return x
        u = (x if mask is None else x * mask[..., None]).transpose(1, 2)
        kernels = self.kernel(tokens).split(self.channels)
        back = kernels[1] if self.bidirectional else None
        if hasattr(self, "dft_u"):
            n = 1 << (2 * tokens - 1).bit_length()
            spectrum = self.dft_u(u, n)[:, None] * self.dft_k(around(kernels[0], back, n), n)
            y = torch.fft.ifft(spectrum).real[..., :tokens].to(u.dtype) + u[:, None] * self.kernel.D[..., None]
        else:
            y = fft_conv(u, kernels[0], self.kernel.D, k_back=back)
        return self.mixed(y)

    def mixed(self, y: Tensor) -> Tensor:
        """What follows the convolution: (batch, channels, dim, tokens) to (batch, tokens, dim)."""
        y = self.dropout(F.gelu(y.flatten(1, 2).transpose(1, 2)))
        return F.glu(self.out_proj(y), -1)


def check_length(tokens: int, length: int) -> None:
    """Raises ValueError for more tokens than a kernel has taps."""
    if tokens > length:
        raise ValueError(f"tokens must be at most the kernel's length ({length}), got {tokens}")


class LongConvClassifier(nn.Module):
    """Sequences (batch, length, inputs) to class logits: Linear, `depth` residual blocks, mean over the tokens, Linear.

    A block is x + dropout(layer(x)) with BatchNorm ("batch") or LayerNorm ("layer") before the layer (`prenorm`) or after the sum;
    dropout takes whole channels. `layer` builds the sequence layer, by default `LongConv` with the remaining options, which
    cannot be given beside it. Raises ValueError for them, for an unknown norm, and for sequences without tokens.
    """

    def __init__(
        self,
        inputs: int,
        classes: int,
        length: int,
        *,
        dim: int = 128,
        depth: int = 6,
        norm: Literal["batch", "layer"] = "batch",
        prenorm: bool = False,
        dropout: float = 0.0,
        layer: Callable[[], nn.Module] | None = None,
        **options: Any,
    ):
        super().__init__()
        check_positive(inputs=inputs, classes=classes, length=length, dim=dim, depth=depth)
        checks.choice("norm", norm, ("batch", "layer"))
        checks.number("dropout", dropout, low=0, below=1)
        if layer is not None and options:
            raise ValueError(f"options of LongConv cannot be given beside layer, got {', '.join(sorted(options))}")
        make = layer or (lambda: LongConv(dim, length, dropout=dropout, **options))
        self.prenorm, self.norm = checks.flag("prenorm", prenorm), norm
        self.encoder, self.head = nn.Linear(inputs, dim), nn.Linear(dim, classes)
        self.layers = nn.ModuleList(make() for _ in range(depth))
        self.norms = nn.ModuleList(nn.BatchNorm1d(dim) if norm == "batch" else nn.LayerNorm(dim) for _ in range(depth))
        self.dropout = nn.Dropout1d(dropout)

    def forward(self, x: Tensor) -> Tensor:
        checks.tensor("x", x, shape=("batch", "tokens", self.encoder.in_features), empty=True)
        if not x.shape[1]:
            raise ValueError(f"x must have at least one token, got shape {tuple(x.shape)}")
        x = self.encoder(x)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            y = layer(self._normed(norm, x) if self.prenorm else x)
            x = x + self.dropout(y.transpose(1, 2)).transpose(1, 2)
            x = x if self.prenorm else self._normed(norm, x)
        out: Tensor = self.head(x.mean(1))
        return out

    def _normed(self, norm: nn.Module, x: Tensor) -> Tensor:
        out: Tensor = norm(x.transpose(1, 2)).transpose(1, 2) if self.norm == "batch" else norm(x)
        return out


@mixer("long_conv")
class CausalLongConv(Mixer):
    """`LongConv`, causal, as a mixer of language models. `length` is the most tokens a sequence may have, padding included.

    The state is the inputs so far. Options are those of `LongConv`, except for the ones that look ahead.
    Raises ValueError beyond `length` tokens.
    """

    def __init__(self, dim: int, *, length: int, layer: int = 0, layers: int = 1, **options: Any):
        super().__init__()
        if refused := {"bidirectional", "learned_dft"} & set(options):
            raise ValueError(f"a causal mixer cannot take {', '.join(sorted(refused))}: it would look ahead")
        self.dim, self.length = dim, length
        self.conv = LongConv(dim, length, **options)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        out: Tensor = self.conv(x, mask)
        return out

    def init_state(self, batch: int, *, device: Any = None, dtype: torch.dtype | None = None) -> State:
        return _no_inputs(self.conv.kernel, ("u",), batch, device, dtype)

    def advance(self, x: Tensor, state: State, mask: Tensor | None = None) -> tuple[Tensor, State]:
        u = (x if mask is None else x * mask[..., None]).transpose(1, 2)
        before = int(state["seen"][0])
        check_length(before + x.shape[1], self.length)
        inputs = {"u": appended(state["u"], u, before, self.length)}
        seen = before + x.shape[1]
        y = self.conv.kernel.continued(inputs["u"][..., :seen], x.shape[1])
        return self.conv.mixed(y), {**inputs, "seen": state["seen"] + x.shape[1]}

    def state_bytes(self, tokens: int, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """The inputs of the tokens seen."""
        return batch * self.dim * tokens * (self.conv.kernel.D.dtype if dtype is None else dtype).itemsize


@mixer("long_conv_h3")
class H3LongConv(Mixer):
    """The H3 block with long convolutions for both of its state spaces: out(q * conv(conv'(k) * v)).

    `length` as in `CausalLongConv`; `kernel` options as `LongKernel` takes them, `kernel_dropout` its dropout. All projections have
    biases and heads have one channel, as released. The state is all k and conv'(k) * v so far.
    """

    def __init__(
        self, dim: int, *, length: int, kernel_dropout: float = 0.2, layer: int = 0, layers: int = 1, **kernel: Any
    ):
        super().__init__()
        check_positive(dim=dim, length=length)
        self.dim, self.length = dim, length
        self.qkv_proj, self.out_proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.shift, self.long = (LongKernel(1, dim, length, dropout=kernel_dropout, **kernel) for _ in range(2))

    def _qkv(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
        q, k, v = self.qkv_proj(x).transpose(1, 2).chunk(3, 1)
        if mask is not None:  # after the biases, so that the convolutions see zeros before a sequence
            k, v = k * mask[:, None], v * mask[:, None]
        return q, k, v

    def _out(self, y: Tensor) -> Tensor:
        out: Tensor = self.out_proj(y.transpose(1, 2))
        return out

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        tokens = x.shape[1]
        check_length(tokens, self.length)
        q, k, v = self._qkv(x, mask)
        kv = fft_conv(k, self.shift(tokens)[0], self.shift.D[0]) * v
        return self._out(q * fft_conv(kv, self.long(tokens)[0], self.long.D[0]))

    def init_state(self, batch: int, *, device: Any = None, dtype: torch.dtype | None = None) -> State:
        return _no_inputs(self.long, ("k", "kv"), batch, device, dtype)

    def advance(self, x: Tensor, state: State, mask: Tensor | None = None) -> tuple[Tensor, State]:
        before, tokens = int(state["seen"][0]), x.shape[1]
        seen = before + tokens
        check_length(seen, self.length)
        q, k, v = self._qkv(x, mask)
        ks = appended(state["k"], k, before, self.length)
        kv = self.shift.continued(ks[..., :seen], tokens)[:, 0] * v
        kvs = appended(state["kv"], kv, before, self.length)
        y = self.long.continued(kvs[..., :seen], tokens)[:, 0]
        return self._out(q * y), {"k": ks, "kv": kvs, "seen": state["seen"] + tokens}

    def state_bytes(self, tokens: int, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """Both inputs of the tokens seen."""
        return 2 * batch * self.dim * tokens * (self.long.D.dtype if dtype is None else dtype).itemsize


def _no_inputs(like: LongKernel, names: Sequence[str], batch: int, device: Any, dtype: torch.dtype | None) -> State:
    """Empty (batch, dim, 0) buffers, and how many tokens are in them."""
    weight = like.D
    dtype, device = weight.dtype if dtype is None else dtype, weight.device if device is None else device
    state = {name: torch.zeros(batch, weight.shape[1], 0, device=device, dtype=dtype) for name in names}
    return {**state, "seen": torch.zeros(batch, dtype=torch.int64, device=device)}


def appended(buffer: Tensor, new: Tensor, used: int, most: int) -> Tensor:
    """`buffer` (batch, dim, room), of which `used` tokens count, with `new` behind them; room doubles when it ends, up to `most`."""
    if torch.is_grad_enabled():  # the backward pass may need the buffer as it is, for weights even if not for inputs
        return torch.cat([buffer[..., :used], new], -1)
    needed = used + new.shape[-1]
    if needed > buffer.shape[-1]:
        grown = buffer.new_empty(*buffer.shape[:2], min(most, max(needed, 2 * used)))
        grown[..., :used] = buffer[..., :used]
        buffer = grown
    buffer[..., used:needed] = new
    return buffer

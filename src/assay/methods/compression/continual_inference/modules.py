"""Networks that take a clip or one frame after the other, with the same weights.

Inputs are (batch, channels, time, ...), as torch's convolutions have them. Every module here has two ways to run:

    y = net(clip)                               the whole clip; without padding in time, so `delay` frames shorter
    y, state = net.advance(frames, state)       the next frames of a stream, one or more; y is None where no output is due

Both give the same numbers, rounding aside, however the stream is cut: the output that `advance` gives with frame t is the one
that `net(clip)` has at place (t - delay) / stride. Source: L. Hedegaard, "Efficient Online Processing with Deep Neural Networks"
(2023), and arXiv 2106.00050 for the convolutions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks
from assay.methods.compression.continual_inference.state import EMPTY, StreamState, matching
from assay.methods.core import kernels

Keep = Literal["sums", "inputs"]
KEEPS: tuple[Keep, ...] = get_args(Keep)
Align = Literal["oldest", "centre", "newest"]
ALIGNS: tuple[Align, ...] = get_args(Align)
Reduce = Literal["sum", "mul", "cat"]
REDUCES: tuple[Reduce, ...] = get_args(Reduce)

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
_CONVOLVE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_OF_A_MODE = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)  # what they compute depends on training


class Streaming(nn.Module):
    """A network or layer that can also be fed frame by frame.

    An output looks at `receptive_field` frames, and there is one every `stride` frames. `advance` never changes a state in place, and
    gradients flow through it.
    """

    def __init__(self, receptive_field: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.receptive_field = checks.whole("receptive_field", receptive_field, low=1)
        self.stride = checks.whole("stride", stride, low=1)

    @property
    def delay(self) -> int:
        """How many frames pass before the first output."""
        return self.receptive_field - 1

    def advance(self, x: Tensor, state: StreamState = EMPTY) -> tuple[Tensor | None, StreamState]:
        """Take the next frames (batch, channels, time, ...), at least one: the outputs that are now due, or None, and the new state.

        Raises ValueError for the state of another number of streams than the frames'.
        """
        raise NotImplementedError

    def _later(self, seen: int, frames: int) -> int:
        """The count after more frames: once the first output is out, only the place between two outputs matters."""
        total, reach = seen + frames, self.receptive_field - 1
        return total if total <= reach else reach + (total - reach) % self.stride

    def _windows(self, x: Tensor, state: StreamState) -> tuple[Tensor | None, StreamState]:
        """The frames that the outputs now due look at, in one piece, or None; and the state that keeps the last frames."""
        matching(state, x)
        reach, seen = self.receptive_field - 1, state.seen
        whole = torch.cat([state.buffers[0], x], 2) if state.buffers else x.clone()  # the caller may write over x
        first, last = max(seen, reach), seen + x.shape[2] - 1
        first += (reach - first) % self.stride
        due = whole[:, :, whole.shape[2] - 1 - (last - first) - reach :] if first <= last else None
        kept = whole[:, :, max(whole.shape[2] - reach, 0) :]
        if x.shape[2] > 1:
            kept = kept.clone()  # a view would keep all the frames alive
        return due, StreamState(self._later(seen, x.shape[2]), (kept,))


class PerFrame(Streaming):
    """A module that treats every frame by itself: norms with running statistics, activations, kernels of one frame.

    In training mode those among them that depend on it raise RuntimeError in `advance`.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self._moody = any(isinstance(part, _OF_A_MODE) for part in module.modules())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.module(x)
        return out

    def advance(self, x: Tensor, state: StreamState = EMPTY) -> tuple[Tensor | None, StreamState]:
        if self._moody and self.training:
            raise RuntimeError(f"a stream needs the evaluation mode: {type(self.module).__name__} is in training mode")
        return self.module(x), state


class Conv(Streaming):
    """A convolution whose first kernel dimension is time, of any dilation, stride and groups, without padding in time.

    `keep="sums"` (the paper's): all taps of a kernel are applied to a frame when it comes; what belongs to later outputs waits in
    `receptive_field - 1` partial sums, and the output that has become complete leaves. Of a strided convolution only the taps are
    computed that an output will need. `keep="inputs"` (what everybody else does): the last `receptive_field - 1` frames wait, and the
    convolution runs over them and the new one. Both do the same multiplications.

    The weight is a copy of the same shape, for sums laid out so that a step reads it as it lies: safetensors wants it `.contiguous()`.
    What `conv` pads in time is left out. Raises TypeError for other layers, ValueError for padding with other than zeros.
    """

    def __init__(self, conv: Convolution, keep: Keep = "sums") -> None:
        if not isinstance(conv, Convolution):
            raise TypeError(f"conv must be an nn.Conv1d, nn.Conv2d or nn.Conv3d, got {type(conv).__name__}")
        if conv.padding_mode != "zeros" and any(padding_of(conv)):
            raise ValueError(f"conv must pad with zeros, got padding_mode={conv.padding_mode!r}")
        taps, dilation = conv.kernel_size[0], conv.dilation[0]
        super().__init__((taps - 1) * dilation + 1, conv.stride[0])
        self.keep = checks.choice("keep", keep, KEEPS)
        self.taps, self.dilation, self.groups = taps, dilation, conv.groups
        self.rank = conv.weight.dim() - 2
        self.stride_of_space: tuple[int, ...] = tuple(conv.stride[1:])
        self.padding_of_space: tuple[int, ...] = padding_of(conv)[1:]
        self.dilation_of_space: tuple[int, ...] = tuple(conv.dilation[1:])
        weight = conv.weight.detach().clone(memory_format=torch.contiguous_format)
        if keep == "sums":
            weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
        self.weight = nn.Parameter(weight, conv.weight.requires_grad)
        self.bias = None if conv.bias is None else nn.Parameter(conv.bias.detach().clone(), conv.bias.requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        return _CONVOLVE[self.rank](
            x, self.weight, self.bias, (self.stride, *self.stride_of_space), (0, *self.padding_of_space),
            (self.dilation, *self.dilation_of_space), self.groups,
        )  # fmt: skip

    def advance(self, x: Tensor, state: StreamState = EMPTY) -> tuple[Tensor | None, StreamState]:
        kernels.ran("continual convolution", f"last {self.keep}")
        matching(state, x)
        channels = self.weight.shape[1] * self.groups
        if x.dim() != self.rank + 2 or x.shape[1] != channels:
            raise ValueError(
                f"frames must have {self.rank + 2} dimensions and {channels} channels, got shape {tuple(x.shape)}"
            )
        if self.keep == "inputs":
            due, state = self._windows(x, state)
            return None if due is None else self._over(due), state
        if x.shape[2] == 1:
            return self._step(x, state)
        if self.stride == 1:
            return self._chunk(x, state)
        outs = []
        for frame in x.split(1, 2):
            out, state = self._step(frame, state)
            if out is not None:
                outs.append(out)
        return torch.cat(outs, 2) if outs else None, state

    def _over(self, due: Tensor) -> Tensor:
        """The convolution over kept frames; one output of a plain one is a product of a matrix and a vector."""
        if self.rank > 1 or self.groups > 1 or due.shape[2] > self.receptive_field:
            out: Tensor = self(due)
            return out
        return F.linear(due[:, :, :: self.dilation].flatten(1), self.weight.flatten(1), self.bias)[:, :, None]

    def _step(self, x: Tensor, state: StreamState) -> tuple[Tensor | None, StreamState]:
        """One frame. Place i of the sums belongs to the output that is complete `receptive_field - 1 - i` frames from now."""
        reach, seen = self.receptive_field - 1, state.seen
        waiting = state.buffers[0] if state.buffers else None
        taps = range(self.taps) if waiting is None else self._needed(seen)
        added = self._products(x[:, :, 0], taps) if len(taps) else None
        if added is not None and len(taps) == self.taps and (self.dilation == 1 or self.taps == 1):
            sums = added
            if waiting is not None:
                sums[:, :, 1:].add_(waiting)
        else:
            like = waiting if added is None else added
            assert like is not None  # the first frame has all taps
            fresh = added is not None and taps[0] == 0  # the newest output begins with tap 0's product
            first = like[:, :, :1] if fresh else torch.zeros_like(like[:, :, :1])
            rest = first.new_zeros(*first.shape[:2], reach, *first.shape[3:]) if waiting is None else waiting
            sums = torch.cat([first, rest], 2)
            if added is not None:
                for place, tap in enumerate(taps):
                    if tap:
                        sums[:, :, tap * self.dilation].add_(added[:, :, place])
        due = seen >= reach and (seen - reach) % self.stride == 0
        out = self._with_bias(sums[:, :, reach:]) if due else None
        return out, StreamState(self._later(seen, 1), (sums[:, :, :reach],))

    def _chunk(self, x: Tensor, state: StreamState) -> tuple[Tensor | None, StreamState]:
        """Several frames of an unstrided convolution. Place i of the sums belongs to the output that frame i of these completes."""
        reach, seen, frames = self.receptive_field - 1, state.seen, x.shape[2]
        added = self._products(x.transpose(1, 2).flatten(0, 1), range(self.taps))
        added = added.unflatten(0, (x.shape[0], frames)).transpose(1, 2)  # (batch, out, time, taps, ...)
        sums = added.new_zeros(*added.shape[:2], frames + reach, *added.shape[4:])
        if state.buffers:
            sums[:, :, :reach].add_(state.buffers[0].flip(2))
        for tap in range(self.taps):
            begin = (self.taps - 1 - tap) * self.dilation
            sums[:, :, begin : begin + frames].add_(added[:, :, :, tap])
        ready = max(reach - seen, 0)  # what earlier frames complete would have needed frames before the first
        out = self._with_bias(sums[:, :, ready:frames]) if ready < frames else None
        return out, StreamState(self._later(seen, frames), (sums[:, :, frames:].flip(2),))

    def _needed(self, seen: int) -> Sequence[int]:
        """The taps of frame number `seen` that lead to an output."""
        if self.stride == 1:
            return range(self.taps)
        reach = self.receptive_field - 1
        return [
            tap for tap in range(self.taps) if ((self.taps - 1 - tap) * self.dilation + seen - reach) % self.stride == 0
        ]

    def _products(self, frames: Tensor, taps: Sequence[int]) -> Tensor:
        """(n, in, ...) to (n, out, taps, ...): what each of these taps makes of the frames."""
        weight = self.weight.transpose(1, 2)
        if len(taps) < self.taps:
            weight = weight[:, list(taps)]
        flat = weight.reshape(-1, *weight.shape[2:])
        if self.rank == 1 and self.groups == 1:
            out = F.linear(frames, flat)
        elif self.rank == 1:
            out = F.conv1d(frames[..., None], flat[..., None], groups=self.groups)[..., 0]
        else:
            out = _CONVOLVE[self.rank - 1](
                frames, flat, None, self.stride_of_space, self.padding_of_space, self.dilation_of_space, self.groups
            )
        return out.unflatten(1, (-1, len(taps)))

    def _with_bias(self, out: Tensor) -> Tensor:
        return out if self.bias is None else out + self.bias.view(-1, *[1] * (out.dim() - 2))

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, dilation={self.dilation}, stride={self.stride}, keep={self.keep}"


class WindowPool(Streaming):
    """The mean or the largest of `taps` frames, after a pooling of each frame; the pooled frames are kept.

    The mean is taken over the frames anew for every output: a running sum would drift (`our choice`).
    """

    def __init__(
        self, taps: int, kind: Literal["mean", "max"], space: nn.Module, *, stride: int = 1, dilation: int = 1
    ) -> None:
        super().__init__(
            (checks.whole("taps", taps, low=1) - 1) * checks.whole("dilation", dilation, low=1) + 1, stride
        )
        self.kind = checks.choice("kind", kind, ("mean", "max"))
        self.space, self.dilation = space, dilation

    def forward(self, x: Tensor) -> Tensor:
        return self._over_time(self._over_space(x))

    def advance(self, x: Tensor, state: StreamState = EMPTY) -> tuple[Tensor | None, StreamState]:
        due, state = self._windows(self._over_space(x), state)
        return None if due is None else self._over_time(due), state

    def _over_space(self, x: Tensor) -> Tensor:
        pooled: Tensor = self.space(x.transpose(1, 2).flatten(0, 1))
        return pooled.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)

    def _over_time(self, x: Tensor) -> Tensor:
        windows = x.unfold(2, self.receptive_field, self.stride)[..., :: self.dilation]
        return windows.mean(-1) if self.kind == "mean" else windows.amax(-1)


class Chain(Streaming):
    """One module after the other."""

    def __init__(self, *parts: Streaming) -> None:
        field, stride = 1, 1
        for part in parts:
            field += (part.receptive_field - 1) * stride
            stride *= part.stride
        super().__init__(field, stride)
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x

    def advance(self, x: Tensor, state: StreamState = EMPTY) -> tuple[Tensor | None, StreamState]:
        parts = streams(self.parts)
        states = list(state.parts) or [EMPTY] * len(parts)
        out: Tensor | None = x
        for i, part in enumerate(parts):
            if out is None:
                break
            out, states[i] = part.advance(out, states[i])
        return out, StreamState(0, (), tuple(states))


class Parallel(Streaming):
    """Several modules on the same input, their outputs joined; the faster ones wait for the slowest.

    The faster ones' outputs are held back so that they meet the slowest one's as `align` says (see `Branches`).
    Raises ValueError where strides differ, or where an output would have to wait for a share of a frame or of a stride.
    """

    def __init__(self, *branches: Streaming, reduce: Reduce = "sum", align: Align = "oldest") -> None:
        strides, fields = {b.stride for b in branches}, [b.receptive_field for b in branches]
        if len(strides) != 1:
            raise ValueError(f"branches must have one stride, got {sorted(strides)}")
        super().__init__(max(fields), strides.pop())
        self.reduce, self.align = checks.choice("reduce", reduce, REDUCES), checks.choice("align", align, ALIGNS)
        self.branches = nn.ModuleList(branches)
        self.slowest = fields.index(max(fields))
        self.waits: list[int] = []
        for field in fields:
            extra = self.receptive_field - field
            wait = {"oldest": extra, "centre": extra // 2, "newest": 0}[align]
            if extra % self.stride or wait % self.stride or (align == "centre" and extra % 2):
                raise ValueError(
                    f"branches must differ by a whole number of {'two ' * (align == 'centre')}strides of {self.stride} for "
                    f"align={align!r}, got receptive fields {fields}"
                )
            self.waits.append(wait // self.stride)

    def forward(self, x: Tensor) -> Tensor:
        return joined([branch(x) for branch in self.branches], self.reduce, self.align)

    def advance(self, x: Tensor, state: StreamState = EMPTY) -> tuple[Tensor | None, StreamState]:
        branches = streams(self.branches)
        count = len(branches)
        states = list(state.parts) or [EMPTY] * (2 * count)  # of the branches, then what waits of their outputs
        outs: list[Tensor | None] = []
        for i, branch in enumerate(branches):
            out, states[i] = branch.advance(x, states[i])
            outs.append(out)
        slow = outs[self.slowest]
        ready = 0 if slow is None else slow.shape[2]
        chosen: list[Tensor] = []
        for i, (out, wait) in enumerate(zip(outs, self.waits, strict=True)):
            whole = _appended(states[count + i], out)
            if whole is None:
                continue
            end = whole.shape[2] - wait
            if ready:
                chosen.append(whole[:, :, end - ready : end])
            if wait:
                waiting = whole[:, :, max(end, 0) :]
                # a copy unless it is neither the caller's memory nor a view that keeps many frames alive
                alone = whole is not out and x.shape[2] == 1
                states[count + i] = StreamState(0, (waiting if alone else waiting.clone(),))
        return joined(chosen, self.reduce, self.align) if ready else None, StreamState(0, (), tuple(states))


class Branches(nn.Module):
    """The plain module that `Parallel` is made of: modules on the same input, joined by "sum", "mul", or "cat" over channels.

    A skip connection is `Branches(nn.Identity(), f)`. Where the outputs have different lengths in time, the longer ones are cut:
    - "oldest": their first frames stay, so the input joins the output whose window begins with it. In a stream it waits for f's
      whole delay, y_t = f(x)_t + x_(t - delay): the paper's form.
    - "centre": their middle stays, which is what the padding of an odd kernel gives; waits half the delay.
    - "newest": their last frames stay, as in causal networks; waits for nothing.
    """

    def __init__(self, *branches: nn.Module, reduce: Reduce = "sum", align: Align = "oldest") -> None:
        super().__init__()
        if len(branches) < 2:
            raise ValueError(f"branches must be at least two, got {len(branches)}")
        self.reduce, self.align = checks.choice("reduce", reduce, REDUCES), checks.choice("align", align, ALIGNS)
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return joined([branch(x) for branch in self.branches], self.reduce, self.align)


class Tokens(nn.Embedding):
    """An embedding whose channels come second: ids (batch, time) to (batch, channels, time)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).transpose(1, 2)


def joined(outs: Sequence[Tensor], reduce: Reduce, align: Align) -> Tensor:
    """Outputs (batch, channels, time, ...), cut in time to the shortest and joined."""
    shortest = min(out.shape[2] for out in outs)
    cut = []
    for out in outs:
        extra = out.shape[2] - shortest
        cut.append(out.narrow(2, {"oldest": 0, "centre": extra // 2, "newest": extra}[align], shortest))
    if reduce == "cat":
        return torch.cat(cut, 1)
    total = cut[0]
    for other in cut[1:]:
        total = total + other if reduce == "sum" else total * other
    return total


def in_evaluation(name: str, model: nn.Module) -> None:
    """Raise ValueError where a model, or a part of it, is in training mode."""
    for path, part in model.named_modules():
        if part.training:
            where = f" at {path}" if path else ""
            raise ValueError(
                f"{name} must be in evaluation mode, got {type(part).__name__}{where} in training mode: "
                "batch statistics and dropout cannot be streamed"
            )


def hookless(name: str, module: nn.Module) -> None:
    """Raise ValueError for a module with forward hooks: they would not run."""
    if module._forward_hooks or module._forward_pre_hooks:
        raise ValueError(f"{name} must have no forward hooks, got some on {type(module).__name__}")


def padding_of(conv: Convolution) -> tuple[int, ...]:
    """The padding of a convolution in whole numbers. Raises ValueError for "same" where it is not the same on both sides."""
    if not isinstance(conv.padding, str):
        return tuple(conv.padding)
    if conv.padding == "valid":
        return (0,) * len(conv.kernel_size)
    totals = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    if any(total % 2 for total in totals):
        raise ValueError(f"padding must be the same on both sides, got 'same' for a kernel of {conv.kernel_size}")
    return tuple(total // 2 for total in totals)


def streams(modules: Any) -> list[Streaming]:
    """The modules of a list, for the type checker."""
    return cast("list[Streaming]", list(modules))


def _appended(waiting: StreamState, out: Tensor | None) -> Tensor | None:
    if not waiting.buffers:
        return out
    return waiting.buffers[0] if out is None else torch.cat([waiting.buffers[0], out], 2)

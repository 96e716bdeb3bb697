"""From a network that takes clips to one that takes frames: a maker for every type of module, and a stream with its state.

    net = to_continual(model)                    weights are copied, the model stays as it is
    stream = Stream(net)                         the calls of the package continual-inference
    stream.forward_step(frame)                   None until `stream.delay` frames have passed

`register` adds a maker for a type of your own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

from torch import Tensor, nn

from assay import checks
from assay.methods.compression.continual_inference.modules import (
    KEEPS,
    Branches,
    Chain,
    Conv,
    Keep,
    Parallel,
    PerFrame,
    Streaming,
    Tokens,
    WindowPool,
    hookless,
    in_evaluation,
    padding_of,
)
from assay.methods.compression.continual_inference.state import EMPTY, StreamState

Padding = Literal["refuse", "remove"]
PADDINGS: tuple[Padding, ...] = get_args(Padding)
POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)


@dataclass(frozen=True)
class Settings:
    """How a model is converted; `convert` is what makers of modules with modules inside call."""

    keep: Keep
    padding: Padding
    window: int | None

    def convert(self, module: nn.Module) -> Streaming:
        """The streaming form of a module. Raises ValueError for a type that nobody registered, and for hooks, which would not run."""
        hookless("model", module)
        if isinstance(module, Streaming):
            return copy.deepcopy(module)
        make = _MAKERS.get(type(module))
        if make is None:
            raise ValueError(
                f"model must be made of known modules, got {type(module).__name__}: `register` tells how it becomes a stream"
            )
        return make(module, self)


Maker = Callable[[Any, Settings], Streaming]
M = TypeVar("M", bound=Maker)
_MAKERS: dict[type[nn.Module], Maker] = {}


def register(*kinds: type[nn.Module]) -> Callable[[M], M]:
    """Say how modules of exactly these types become streams: `make(module, settings) -> Streaming`, with copies of the weights.

    >>> class Doubled(nn.Module):
    ...     def forward(self, x):
    ...         return 2 * x
    >>> @register(Doubled)
    ... def doubled(module, settings):
    ...     return PerFrame(copy.deepcopy(module))
    >>> to_continual(nn.Sequential(Doubled()).eval()).delay
    0
    """

    def add(make: M) -> M:
        for kind in kinds:
            _MAKERS[kind] = make
        return make

    return add


def to_continual(
    model: nn.Module, *, keep: Keep = "sums", padding: Padding = "refuse", window: int | None = None
) -> Streaming:
    """A network of convolutions, pools, norms and activations as one that can be fed frame by frame, in evaluation mode.

    Inputs are (batch, channels, time, ...). Known are nn.Sequential, `Branches`, Conv1d to Conv3d, average, largest and adaptive average
    pools, batch norms, dropouts, the usual activations, `Tokens`, and what `register` adds; other types are refused. `keep`
    chooses between the paper's partial sums and kept inputs (see `Conv`). Padding in time cannot be streamed: "remove" leaves it out,
    and outputs whose window reached over an end of the clip are then gone. With strides in time the windows of the rest begin at
    whole strides from the first frame, where those of the padded clip may have begun between. `window` is the number of steps over
    which a pool of the whole clip takes its mean. Weights are copied: convert again after training.

    Raises ValueError for a model with a part in training mode, modules or settings that cannot be streamed, and a window that is
    missing; also where padding is removed within `Branches` that are not aligned at the centre, since they would join other frames.

    >>> import torch
    >>> model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.ReLU(), nn.Conv1d(3, 1, 2)).eval()
    >>> net, clip, state = to_continual(model), torch.randn(1, 2, 8), EMPTY
    >>> for frame in clip.split(1, 2):
    ...     out, state = net.advance(frame, state)
    >>> torch.allclose(out, model(clip)[:, :, -1:], atol=1e-6), net.delay
    (True, 3)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got {type(model).__name__}")
    in_evaluation("model", model)
    checks.choice("keep", keep, KEEPS)
    checks.choice("padding", padding, PADDINGS)
    steps = None if window is None else checks.whole("window", window, low=1)
    return Settings(keep, padding, steps).convert(model).eval()


class Stream:
    """One batch of streams through a network, with the calls of the package continual-inference.

    `state` may be read, kept, saved (`StreamState.tensors`) and put back at any time, also one of another number of streams
    (`join`, `StreamState.select`); several streams may share one network. A call that fails leaves it as it was. A step without an
    output returns None. A frame is (batch, channels, ...), of ids (batch,). Gradients reach back to the beginning of a call:
    the state is kept without its history, which would grow with the stream (`Streaming.advance` keeps it).

    >>> import torch
    >>> stream = Stream(to_continual(nn.Sequential(nn.Conv1d(1, 1, 3)).eval()))
    >>> [stream.forward_step(torch.zeros(1, 1)) is None for _ in range(3)]
    [True, True, False]
    """

    def __init__(self, net: Streaming) -> None:
        if not isinstance(net, Streaming):
            raise TypeError(f"net must be a streaming network (`to_continual`), got {type(net).__name__}")
        self.net = net
        self._state = EMPTY
        self._like: tuple[Any, ...] | None = None  # the frames' shape, dtype and device

    @property
    def state(self) -> StreamState:
        """What the stream remembers. Setting it lets the next frames have another shape; raises TypeError for other than a StreamState."""
        return self._state

    @state.setter
    def state(self, state: StreamState) -> None:
        if not isinstance(state, StreamState):
            raise TypeError(f"state must be a StreamState, got {type(state).__name__}")
        self._state, self._like = state, None

    @property
    def receptive_field(self) -> int:
        return self.net.receptive_field

    @property
    def delay(self) -> int:
        return self.net.delay

    @property
    def stride(self) -> int:
        return self.net.stride

    def forward(self, clip: Tensor) -> Tensor:
        """The network over a whole clip, apart from the stream. Raises ValueError for a clip shorter than the receptive field."""
        self._check(clip)
        if clip.shape[self._time(clip)] < self.receptive_field:
            raise ValueError(
                f"clip must have at least {self.receptive_field} frames, got {clip.shape[self._time(clip)]}"
            )
        out: Tensor = self.net(clip)
        return out

    __call__ = forward

    def forward_step(self, frame: Tensor, update_state: bool = True) -> Tensor | None:
        """The next frame: the output that is now due, (batch, channels, ...), or None. `update_state=False` only looks ahead."""
        checks.tensor("frame", frame, dtype="any")
        out = self.forward_steps(frame.unsqueeze(1 if frame.dim() == 1 else 2), update_state=update_state)
        return None if out is None else out.squeeze(2)

    def forward_steps(self, frames: Tensor, pad_end: bool = False, update_state: bool = True) -> Tensor | None:
        """The next frames (batch, channels, time, ...): all outputs that are now due, or None.

        Raises ValueError for `pad_end`, since there is no padding in time, for frames of another shape, dtype or device than the
        stream's others, and for NaN or infinity, which would stay in the state; TypeError for anything but a tensor.
        """
        if checks.flag("pad_end", pad_end):
            raise ValueError("pad_end must be False: a converted network has no padding in time")
        update = checks.flag("update_state", update_state)
        self._check(frames)
        time = self._time(frames)
        like = ((*frames.shape[:time], *frames.shape[time + 1 :]), frames.dtype, frames.device)
        if self._like is not None:
            for what, known, given in zip(("shape", "dtype", "device"), self._like, like, strict=True):
                if known != given:
                    raise ValueError(f"frames must have the {what} of the stream's others, {known}, got {given}")
        out, state = self.net.advance(frames, self._state)
        if update:
            self._state, self._like = state.detach(), like
        return out

    def clean_state(self) -> None:
        """Begin anew: forget all frames."""
        self._state, self._like = EMPTY, None

    @staticmethod
    def _time(x: Tensor) -> int:
        return 1 if x.dim() == 2 else 2

    @staticmethod
    def _check(x: Tensor) -> None:
        checks.tensor("frames", x, dtype="any", finite=True)
        if x.dim() < 2 or x.dim() == 2 and (x.is_floating_point() or x.is_complex()):
            raise ValueError(
                f"frames must be (batch, channels, time, ...) or ids (batch, time), got {x.dtype} of shape {tuple(x.shape)}"
            )


def _each(value: Any, count: int) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,) * count


def _pads_time(module: nn.Module) -> bool:
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return padding_of(module)[0] > 0
    return bool(_each(getattr(module, "padding", 0), 1)[0]) if isinstance(module, POOLS) else False


def _no_time_padding(padding: int, settings: Settings) -> None:
    if padding and settings.padding == "refuse":
        raise ValueError(f"model must not pad time, got a padding of {padding}: padding='remove' leaves it out")


@register(nn.Sequential)
def _sequential(module: nn.Sequential, settings: Settings) -> Streaming:
    return Chain(*(settings.convert(part) for part in module))


@register(Branches)
def _branches(module: Branches, settings: Settings) -> Streaming:
    if settings.padding == "remove" and module.align != "centre" and any(map(_pads_time, module.modules())):
        raise ValueError(
            f"model's branches must have align='centre' where padding is removed within, got {module.align!r}: "
            "only then do they join the frames that they joined"
        )
    parts = [settings.convert(branch) for branch in module.branches]
    return Parallel(*parts, reduce=module.reduce, align=module.align)


@register(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def _convolution(module: Any, settings: Settings) -> Streaming:
    padding = padding_of(module)
    _no_time_padding(padding[0], settings)
    if module.kernel_size[0] == module.stride[0] == 1 and not padding[0]:
        return PerFrame(copy.deepcopy(module))
    return Conv(module, settings.keep)


@register(*POOLS)
def _pool(module: Any, settings: Settings) -> Streaming:
    kind: Literal["mean", "max"] = "mean" if isinstance(module, (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)) else "max"
    rank = int(type(module).__name__[-2])
    kernel, stride, padding, dilation = (
        _each(getattr(module, name, 1), rank) for name in ("kernel_size", "stride", "padding", "dilation")
    )
    if module.ceil_mode or getattr(module, "divisor_override", None) or getattr(module, "return_indices", False):
        raise ValueError("model's pools must have no ceil_mode, divisor_override or return_indices")
    _no_time_padding(padding[0], settings)
    space: nn.Module = nn.Identity()
    if rank > 1 and kind == "mean":
        made: Any = (nn.AvgPool1d, nn.AvgPool2d)[rank - 2]
        space = made(kernel[1:], stride[1:], padding[1:], count_include_pad=module.count_include_pad)
    elif rank > 1:
        made = (nn.MaxPool1d, nn.MaxPool2d)[rank - 2]
        space = made(kernel[1:], stride[1:], padding[1:], dilation[1:])
    return WindowPool(kernel[0], kind, space, stride=stride[0], dilation=dilation[0])


@register(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
def _adaptive(module: Any, settings: Settings) -> Streaming:
    rank = int(type(module).__name__[-2])
    time, *rest = _each(module.output_size, rank)
    if time is None:
        return PerFrame(copy.deepcopy(module))
    if time != 1:
        raise ValueError(f"model's adaptive pools must leave one step in time or all, got {time}")
    if settings.window is None:
        raise ValueError("window must say over how many steps the pool of the whole clip takes its mean, got None")
    space: nn.Module = nn.Identity()
    if rank > 1:
        made: Any = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)[rank - 2]
        space = made(tuple(rest) if rank > 2 else rest[0])
    return WindowPool(settings.window, "mean", space)


@register(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
def _batch_norm(module: Any, settings: Settings) -> Streaming:
    if module.running_mean is None:
        raise ValueError("model's batch norms must have running statistics: those of a batch cannot be streamed")
    return PerFrame(copy.deepcopy(module))


@register(
    nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh, nn.Hardswish,
    nn.Hardsigmoid, nn.Softplus, nn.PReLU, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, Tokens,
)  # fmt: skip
def _per_frame(module: nn.Module, settings: Settings) -> Streaming:
    return PerFrame(copy.deepcopy(module))

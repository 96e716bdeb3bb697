"""Continual inference: what a frame of a stream costs when nothing is computed twice; the adapters are in a module of their own.

Times are taken on a real moving picture, bytes of real text, and the queries, keys and values of a real language model. The weights of
the two convolutional networks are random: neither their time nor the equality of their outputs depends on them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.experiments.compression.continual_inference_adapters import splora_accuracy, splora_parameters
from assay.experiments.compression.continual_inference_nets import (
    STAGES,
    byte_net,
    moving_picture,
    picture_net,
    played,
    st_gcn,
    x3d,
)
from assay.experiments.core import Figure, Guard, Operator, Quality, Trial, experiment
from assay.measure.cost import count_cost
from assay.methods.compression.continual_inference import (
    EMPTY,
    ContinualEncoder,
    Streaming,
    attention_over,
    retroactive_step,
    to_continual,
)
from assay.workloads.attention import captured_qkv
from assay.workloads.models import load_model
from assay.workloads.sequences import text_bytes
from assay.workloads.text import long_prompt

__all__ = ["splora_accuracy", "splora_parameters"]  # experiments of this paper too

# ---- operations ------------------------------------------------------------------------------------------------------------------

OPERATIONS = Operator(
    "the operations of an answer for every frame", free="an answer for one frame of every clip, held until the next"
)


@experiment(
    "continual_inference/cox3d-flops",
    points={
        "smoke": [{"depth": 1, "frames": 16, "size": 64}],
        "small": [{"depth": 5, "frames": 16, "size": 312}],
        "full": [{"depth": 5, "frames": 16, "size": 312}],
    },
    operator=OPERATIONS,
    paper={"depth": 5, "frames": 16, "size": 312, "pool": "64 steps", "gates": "over the clip"},
    departures={
        "pool": "16 steps, as many as the clip has; a longer pool costs no multiplications",
        "gates": "squeeze and excitation looks at one frame, not at the pooled clip: nearly the same multiplications",
    },
    refuted_if="a step of the converted network does as much as its clip",
    computed="the operations of both follow from the network's sizes; they are counted, not timed",
)
def cox3d_flops(depth: int, frames: int, size: int) -> Figure:
    """Multiplications of X3D on a clip of `frames` (padded in time, as in the paper) over those of a step of the converted network.

    Counted operator by operator, on shapes alone. An answer held for a whole clip costs as little; it is the arm.
    """
    with torch.device("meta"), torch.no_grad():
        net = x3d(tuple((width, blocks * depth) for width, blocks in STAGES), pad_time=True)
        stream = to_continual(net, padding="remove", window=frames)
        clip = torch.empty(1, 3, frames, size, size)
        _, state = stream.advance(torch.empty(1, 3, stream.receptive_field, size, size))
        window = count_cost(lambda: net(clip)).macs
        step = count_cost(lambda: stream.advance(clip[:, :, :1], state)).macs
    return Figure(
        window / step,
        "x",
        arms={"the clip's answer held for a clip": float(frames)},
        details={
            "macs": {"clip": window, "step": step},
            "receptive_field": stream.receptive_field,
            "state_bytes": state.nbytes,
        },
    )


@experiment(
    "continual_inference/cost-gcn-flops",
    points={
        "smoke": [{"frames": 60, "joints": 5}],
        "small": [{"frames": 300, "joints": 25}],
        "full": [{"frames": 300, "joints": 25}],
    },
    operator=OPERATIONS,
    paper={"frames": 300, "joints": 25},
    refuted_if="a step of the converted network does as much as its clip",
    computed="the operations of both follow from the network's sizes; they are counted, not timed",
)
def cost_gcn_flops(frames: int, joints: int) -> Figure:
    """Multiplications of ST-GCN on a clip over those of a step of its continual form, which answers for every frame.

    As in the paper the clip network leaves out frames (strides) and the continual one does not, so they are not the same function.
    """
    with torch.device("meta"), torch.no_grad():
        net = st_gcn(joints, strided=True)
        stream = to_continual(st_gcn(joints, strided=False), padding="remove", window=frames // 4)
        clip = torch.empty(1, 3, frames, joints)
        _, state = stream.advance(torch.empty(1, 3, stream.receptive_field, joints))
        window = count_cost(lambda: net(clip)).macs
        step = count_cost(lambda: stream.advance(clip[:, :, :1], state)).macs
    return Figure(
        window / step,
        "x",
        arms={"the clip's answer held for a clip": float(frames)},
        details={
            "macs": {"clip": window, "step": step},
            "receptive_field": stream.receptive_field,
            "state_bytes": state.nbytes,
        },
    )


@experiment(
    "continual_inference/cotransformer-flops",
    points={
        "smoke": [{"window": 16, "dim": 64, "layers": 1}],
        "small": [{"window": 64, "dim": 1024, "layers": 1}, {"window": 64, "dim": 1024, "layers": 2}],
        "full": [{"window": 64, "dim": 1024, "layers": 1}, {"window": 64, "dim": 1024, "layers": 2}],
    },
    decides={
        "small": {"window": 64, "dim": 1024, "layers": 1},
        "full": {"window": 64, "dim": 1024, "layers": 1},
    },
    operator=OPERATIONS,
    paper={"window": 64, "layers": 1},
    refuted_if="a step of the one-layer encoder does as much as the encoder over the window",
    computed="the operations of both follow from the encoder's sizes; they are counted, not timed",
)
def cotransformer_flops(window: int, dim: int, layers: int) -> Figure:
    """Multiplications of a transformer encoder over the window over those of a step; two layers, a fact beside it, save much less."""
    layer = nn.TransformerEncoderLayer(dim, max(1, dim // 64), dim, batch_first=True)
    encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).eval()
    stream, clip = ContinualEncoder(encoder, window), torch.randn(1, dim, window)
    with torch.no_grad():
        _, state = stream.advance(clip)
        whole = count_cost(lambda: encoder(clip.transpose(1, 2))).macs
        step = count_cost(lambda: stream.advance(clip[:, :, :1], state)).macs
    return Figure(
        whole / step,
        "x",
        arms={"the window's answer held for a window": float(window)},
        details={"macs": {"window": whole, "step": step}, "state_bytes": state.nbytes},
    )


# ---- a frame of a stream ---------------------------------------------------------------------------------------------------------

STREAM = Operator(
    "an answer of a convolutional network for every frame",
    free="the sliding window, compiled with Inductor",
    exact="the last inputs of every layer kept, and its own convolution over them",
)
# relative to how much answers move: those of a long pool hardly do, and one held would pass for right beside their size
EQUAL = Guard(
    "largest difference from the sliding window's answers, of the most that one of them moves", 1e-2, relative=False
)
CHECKED = 16  # frames whose answers are compared


def stream_trial(
    source: nn.Module, frames: Tensor, window: int, run: int, steps: int | None = None, *, compiled: bool = True
) -> Trial:
    """The sliding window over a stream against the converted network, `run` frames a run.

    `frames` is (1, channels, time, ...) or ids (1, time), long enough to be looked at over and over. The exact rival keeps inputs
    instead of partial sums, which is what is written by hand for causal networks; the paper's claim pays only where its sums beat that.
    Controls: "deleted" answers from the newest frame alone, repeated for the whole window; "random" are the right answers in a random
    order; the rival runs the window for one frame of 16 and holds its answer, more work a frame than a step where the window is longer.
    Without `compiled` (smoke) the free rival is the sliding window as it is.
    """
    time = 1 if frames.dim() == 2 else 2
    sums = to_continual(source, keep="sums", window=steps)
    inputs = to_continual(source, keep="inputs", window=steps)
    if sums.receptive_field != window:
        raise ValueError(f"window must be the network's receptive field, {sums.receptive_field}, got {window}")
    length = frames.shape[time]
    if length < window + max(run, CHECKED):
        raise ValueError(f"frames must be at least {window + max(run, CHECKED)}, got {length}")

    def seen(last: int, count: int) -> Tensor:
        """The `count` frames that end with number `last`."""
        return frames.narrow(time, last - count + 1, count)

    def each(answer: Callable[[int], Tensor | None]) -> Callable[[], Tensor | None]:
        """A run: the answers for the next frames of the stream, which begins again when the picture ends."""
        place = window

        def run_frames() -> Tensor | None:
            nonlocal place
            out: Tensor | None = None
            with torch.inference_mode():
                for _ in range(run):
                    out = answer(place)
                    place = place + 1 if place + 1 < length else window
            return out

        return run_frames

    def slid(model: Callable[[Tensor], Tensor]) -> Callable[[], Tensor | None]:
        return each(lambda place: model(seen(place, window)))

    def streamed(net: Streaming) -> Callable[[], Tensor | None]:
        with torch.inference_mode():
            state = net.advance(seen(window - 1, window))[1]

        def answer(place: int) -> Tensor | None:
            nonlocal state
            out, state = net.advance(seen(place, 1), state)
            return out

        return each(answer)

    def stream_answers(net: Streaming) -> Tensor:
        state, outs = EMPTY, list[Tensor]()
        for place in range(window - 1 + CHECKED):
            out, state = net.advance(seen(place, 1), state)
            if out is not None:
                outs.append(out)
        return torch.stack(outs)

    def quality() -> Quality:
        with torch.inference_mode():
            places = range(window - 1, window - 1 + CHECKED)
            expected = torch.stack([source(seen(place, window)) for place in places])
            alone = torch.stack([source(torch.cat([seen(place, 1)] * window, time)) for place in places])
            moved = (expected.amax(0) - expected.amin(0)).max()

            def off(answers: Tensor) -> float:
                return float((answers - expected).abs().max() / moved)

            order = torch.randperm(CHECKED, generator=torch.Generator().manual_seed(0))
            controls = {
                "deleted": off(alone),
                "random": off(expected[order]),
                "rival": off(expected[:1].expand_as(expected)),
                "last inputs kept": off(stream_answers(inputs)),
            }
            rival = f"an answer held for {CHECKED} frames"
            return Quality(off(stream_answers(sums)), 0.0, controls=controls, rival=rival)

    def details() -> dict[str, Any]:
        with torch.no_grad():
            macs = count_cost(lambda: source(seen(window, window))).macs
            found: dict[str, Any] = {"frames_a_run": run, "window_macs": macs}
            for name, net in (("sums", sums), ("inputs", inputs)):
                _, state = net.advance(seen(window - 1, window))
                macs = count_cost(lambda: net.advance(seen(window, 1), state)).macs  # noqa: B023
                found[name] = {"step_macs": macs, "state_bytes": state.nbytes}
        return found

    return Trial(
        baseline=slid(source),
        candidate=streamed(sums),
        free=slid(torch.compile(source, dynamic=False) if compiled else source),
        exact=streamed(inputs),
        quality=quality,
        details=details,
    )


@experiment(
    "continual_inference/picture-frame-time",
    points={
        "smoke": [{"window": 16, "size": 16, "blocks": 2, "width": 8, "run": 2, "compiled": False}],
        "small": [{"window": 64, "size": 32, "blocks": 8, "width": 24, "run": 4}],
        "full": [{"window": 64, "size": size, "blocks": 8, "width": 24, "run": 4} for size in (32, 112, 224)],
    },
    decides={"full": {"window": 64, "size": 32, "blocks": 8, "width": 24, "run": 4}},
    operator=STREAM,
    paper={"net": "X3D", "window": 64, "weights": "Kinetics-400", "device": "a GPU, and small boards"},
    departures={
        "net": "eight blocks of X3D in two stages, whose receptive field with the pool's is the window: a whole X3D looks at more",
        "weights": "random: none are to be had offline, and neither time nor equality depends on them",
        "device": "this machine's processor, float32",
    },
    guard=EQUAL,
    refuted_if="a step of the converted network takes longer than the sliding window of 64 frames",
    minutes=15,
)
def picture_frame_time(window: int, size: int, blocks: int, width: int, run: int, compiled: bool = True) -> Trial:
    """Frames of a real animation through a 3D convolutional network: the sliding window's time a frame over a step's."""
    net, steps = picture_net(window, blocks, width)
    frames = played(moving_picture(size), window + max(48, CHECKED, run))
    return stream_trial(net, frames, window, run, steps, compiled=compiled)


@experiment(
    "continual_inference/byte-time",
    points={
        "smoke": [{"window": 16, "width": 16, "run": 4, "compiled": False}],
        "small": [{"window": 64, "width": 256, "run": 16}],
        "full": [{"window": window, "width": 256, "run": 16} for window in (64, 256)],
    },
    decides={"full": {"window": 64, "width": 256, "run": 16}},
    operator=STREAM,
    paper={"net": "a temporal convolutional network", "window": 64, "device": "a GPU, and small boards"},
    departures={
        "net": "six causal layers of two taps, dilated 1 to 32, on bytes of Python sources: skeletons and videos are not to be had offline",
        "device": "this machine's processor, float32",
    },
    guard=EQUAL,
    refuted_if="a step of the converted network takes longer than the sliding window of 64 bytes",
    minutes=15,
)
def byte_time(window: int, width: int, run: int, compiled: bool = True) -> Trial:
    """Bytes of real source text through a dilated causal network: the sliding window's time a byte over a step's."""
    ids = text_bytes("code", "heldout")[: window + 256][None]
    return stream_trial(byte_net(window, width), ids, window, run, compiled=compiled)


# ---- attention -------------------------------------------------------------------------------------------------------------------

ATTENTION = Operator(
    "attention of all tokens of the window, after each token",
    free="torch's SDPA over the window's kept queries, keys and values",
)
LAYER = 9  # of SmolLM2; our choice


@functools.cache
def captured_tokens(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (1, heads, count, 64) of one layer of SmolLM2-135M on source text, key heads repeated."""
    loaded = load_model("smollm2-135m")
    q, k, v = captured_qkv(loaded.model, long_prompt(loaded.tokenizer, count), layers=[LAYER])[0]
    shared = q.shape[1] // k.shape[1]
    return q.float(), k.float().repeat_interleave(shared, 1), v.float().repeat_interleave(shared, 1)


@experiment(
    "continual_inference/retroactive-attention-time",
    points={
        "smoke": [{"window": 16, "run": 4}],
        "small": [{"window": 64, "run": 16}, {"window": 256, "run": 16}],
        "full": [{"window": window, "run": 16} for window in (64, 128, 256, 512, 1024)],
    },
    decides={"small": {"window": 64, "run": 16}, "full": {"window": 64, "run": 16}},
    operator=ATTENTION,
    paper={"window": 64, "width": 1024, "inputs": "features of videos", "device": "a GPU"},
    departures={
        "width": "nine heads of 64, those of SmolLM2-135M, whose inputs are real",
        "inputs": "a language model's layer on source text, without its causal mask: video features are not to be had offline",
        "device": "this machine's processor, float32",
    },
    guard=Guard(
        "largest difference from attention over the window in float64, relative to the largest output",
        1e-3,
        relative=False,
        without={"random": "every row is brought up to date; nothing is chosen"},
    ),
    refuted_if="a step of retroactive attention takes longer than softmax attention over the window",
)
def retroactive_attention_time(window: int, run: int) -> Trial:
    """Softmax attention over the window, written out, against bringing their outputs up to date; projections count for neither.

    Rows whose sums would cancel are summed up anew within the candidate's time. Controls: "deleted" never takes the oldest key out; the
    rival leaves every row as it was when its query came, which costs one query a step.
    """
    q, k, v = captured_tokens(2 * window + max(128, run))
    length = q.shape[2]

    def over(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], Tensor]:
        place = window

        def run_tokens() -> Tensor:
            nonlocal place
            out = q
            with torch.inference_mode():
                for _ in range(run):
                    part = slice(place - window + 1, place + 1)
                    out = attend(q[:, :, part], k[:, :, part], v[:, :, part])
                    place = place + 1 if place + 1 < length else window
            return out

        return run_tokens

    def retroactive() -> Callable[[], Tensor | None]:
        place, state = 0, EMPTY
        with torch.inference_mode():
            for place in range(window):
                state = retroactive_step(q[:, :, place], k[:, :, place], v[:, :, place], state, window=window)[1]
        place = window

        def run_tokens() -> Tensor | None:
            nonlocal place, state
            out: Tensor | None = None
            with torch.inference_mode():
                for _ in range(run):
                    out, state = retroactive_step(q[:, :, place], k[:, :, place], v[:, :, place], state, window=window)
                    place = place + 1 if place + 1 < length else window
            return out

        return run_tokens

    def quality() -> Quality:
        state, outs, entered = EMPTY, list[Tensor](), list[Tensor]()
        wide = [x.double() for x in (q, k, v)]
        last = range(2 * window - 1, 2 * window + CHECKED - 1)

        def reference(first: int, stop: int, rows: slice) -> Tensor:
            keys, values = wide[1][:, :, first:stop], wide[2][:, :, first:stop]
            return attention_over(wide[0][:, :, rows], keys, values)

        with torch.inference_mode():
            for place in range(last.stop):
                out, state = retroactive_step(q[:, :, place], k[:, :, place], v[:, :, place], state, window=window)
                own = slice(place, place + 1)
                entered.append(reference(max(place - window + 1, 0), place + 1, own))
                if place in last:
                    assert out is not None
                    outs.append(out.double())
            found = torch.stack(outs)
            rows = [slice(place - window + 1, place + 1) for place in last]
            expected = torch.stack([reference(part.start, part.stop, part) for part in rows])
            never_out = torch.stack([reference(0, part.stop, part) for part in rows])
            stale = torch.stack([torch.cat(entered[part], 2) for part in rows])

            def off(outputs: Tensor) -> float:
                return float((outputs - expected).abs().max() / expected.abs().max())

            kernel = torch.stack(
                [F.scaled_dot_product_attention(q[:, :, part], k[:, :, part], v[:, :, part]) for part in rows]
            )
            controls = {"deleted": off(never_out), "rival": off(stale), "SDPA in float32": off(kernel.double())}
        return Quality(off(found), 0.0, controls=controls, rival="rows as they were when their query came")

    def details() -> dict[str, Any]:
        _, state = retroactive_step(q[:, :, 0], k[:, :, 0], v[:, :, 0], window=window)
        for place in range(1, window):
            _, state = retroactive_step(q[:, :, place], k[:, :, place], v[:, :, place], state, window=window)

        def step() -> Any:
            return retroactive_step(q[:, :, window], k[:, :, window], v[:, :, window], state, window=window)

        part = slice(1, window + 1)
        return {
            "tokens_a_run": run,
            "state_bytes": state.nbytes,
            "macs": {
                "step": count_cost(step).macs,
                "window": count_cost(attention_over, q[:, :, part], k[:, :, part], v[:, :, part]).macs,
            },
        }

    return Trial(
        baseline=over(attention_over),
        candidate=retroactive(),
        free=over(F.scaled_dot_product_attention),
        quality=quality,
        details=details,
    )

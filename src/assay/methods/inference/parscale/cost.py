"""What a decoder costs to run, from its sizes: bytes held and seconds by a roofline, for a number of parallel streams.

    shape = Shape(width=1536, intermediate=8320, layers=36, heads=16, kv_heads=2, vocab=151936, bias=True)
    cost(shape, streams=8).memory - cost(shape).memory

Held are the weights, those of prefixes and aggregator included, keys and values of all streams (prefixes too), and the largest
activations. Each kind of work takes its operations over the attainable rate or its bytes over the attainable bandwidth,
whichever is longer. Embedding and head do their work once, however many streams there are. After the paper's cost script, which uses a
general calculator; the sums here are our own, and what follows from them is a model's figure and no measurement.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from assay import checks
from assay.methods.inference.parscale.model import head_sizes


@dataclass(frozen=True)
class Machine:
    """Operations (1 MAC is 2) and bytes a second that can be attained."""

    operations: float
    bandwidth: float


A100 = Machine(0.7 * 312e12, 0.9 * 2039e9)
"""An A100 of 80 GB in half precision: 70 % of its rate and 90 % of its bandwidth, the shares that the paper's script assumes."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder with SwiGLU. Widths may be fractions (`grown`).

    Biases: `bias` in queries, keys and values (Qwen2), `output_bias` in what attention writes, `mlp_bias` in all three of the MLP.
    """

    width: float
    intermediate: float
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    head_dim: float = 0.0  # 0: width / heads
    tied: bool = True
    bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False

    @classmethod
    def of(cls, config: Any) -> Shape:
        """The sizes in a configuration of transformers' Llama, Qwen2 and the like."""
        kv_heads, head_dim = head_sizes(config)
        asked = bool(getattr(config, "attention_bias", False))
        return cls(
            config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.num_attention_heads, kv_heads,
            config.vocab_size, head_dim, bool(config.tie_word_embeddings),
            config.model_type == "qwen2" or asked, asked, bool(getattr(config, "mlp_bias", False)),
        )  # fmt: skip

    @property
    def head(self) -> float:
        """The width of a head."""
        return self.head_dim or self.width / self.heads

    @property
    def body(self) -> float:
        """Parameters without embedding and head."""
        queries, keys = self.heads * self.head, 2 * self.kv_heads * self.head
        attention = self.width * (2 * queries + keys) + self.bias * (queries + keys) + self.output_bias * self.width
        mlp = 3 * self.width * self.intermediate + self.mlp_bias * (2 * self.intermediate + self.width)
        return self.layers * (attention + mlp + 2 * self.width) + self.width

    @property
    def embedding(self) -> float:
        """Parameters of embedding and head."""
        return (1 if self.tied else 2) * self.vocab * self.width

    def grown(self, times: float) -> Shape:
        """The shape with `times` the parameters of `body`: all widths larger by one factor, layers and heads as they are."""
        times = checks.number("times", times, above=0)
        low, high = 0.0, max(2.0, 2 * times)
        for _ in range(100):
            middle = (low + high) / 2
            if self._wider(middle).body < times * self.body:
                low = middle
            else:
                high = middle
        return self._wider(high)

    def _wider(self, factor: float) -> Shape:
        return replace(
            self, width=factor * self.width, intermediate=factor * self.intermediate, head_dim=factor * self.head
        )


def added_parameters(shape: Shape, streams: int, prefix: int = 48) -> float:
    """Parameters of the prefixes and the aggregator: 2 L P h n d + (P D D + D) + (D P + P); none for one stream.

    >>> added_parameters(Shape(1536, 8320, 36, 16, 2, 151936, bias=True), 2)
    6050306.0
    """
    streams, prefix = checks.whole("streams", streams, low=1), checks.whole("prefix", prefix, low=0)
    if streams == 1:
        return 0.0
    width = shape.width
    prefixes = 2 * shape.layers * streams * shape.kv_heads * prefix * shape.head
    return float(prefixes + streams * width * width + width + width * streams + streams)


@dataclass(frozen=True)
class Cost:
    """Bytes and seconds, by what they are for."""

    weights: float
    cache: float
    added: float  # weights of prefixes and aggregator
    activations: float
    prefill: float  # seconds
    decoding: float

    @property
    def memory(self) -> float:
        return self.weights + self.cache + self.added + self.activations

    @property
    def latency(self) -> float:
        return self.prefill + self.decoding


def cost(
    shape: Shape,
    *,
    streams: int = 1,
    prefix: int = 48,
    batch: int = 1,
    prompt: int = 64,
    new: int = 64,
    bytes_each: float = 2,
    machine: Machine = A100,
) -> Cost:
    """What answering `batch` prompts of `prompt` tokens with `new` tokens costs.

    The prompt gives the first of them, each step another; the last one is not read. `prefix` tokens count for more than one stream only.
    Raises ValueError and TypeError for counts out of range.
    """
    streams, batch = checks.whole("streams", streams, low=1), checks.whole("batch", batch, low=1)
    prompt, new = checks.whole("prompt", prompt, low=1), checks.whole("new", new, low=0)
    prefix = checks.whole("prefix", prefix, low=0) if streams > 1 else 0
    rows = streams * batch
    each = 2 * shape.layers * shape.kv_heads * shape.head * bytes_each  # keys and values of a token
    added = added_parameters(shape, streams, prefix) * bytes_each
    layer = rows * prompt * (2 * shape.width + 2 * shape.intermediate) * bytes_each  # stream, its norm, gate and up
    logits = batch * shape.vocab * bytes_each  # of the last token
    read = max(new - 1, 0)  # of the answer
    steps = [_seconds(shape, rows, batch, streams, prefix + prompt + i, 1, bytes_each, machine) for i in range(read)]
    return Cost(
        weights=(shape.body + shape.embedding) * bytes_each,
        cache=rows * (prompt + read + prefix) * each,
        added=added,
        activations=max(layer, logits),
        prefill=_seconds(shape, rows, batch, streams, prefix, prompt, bytes_each, machine),
        decoding=sum(steps),
    )


def _seconds(
    shape: Shape, rows: int, batch: int, streams: int, before: int, tokens: int, each: float, machine: Machine
) -> float:
    """One pass over `tokens` tokens a row behind `before` cached ones."""

    def longer(operations: float, read: float) -> float:
        return max(operations / machine.operations, read / machine.bandwidth)

    seen = before + (tokens + 1) / 2  # keys a query sees, on average
    scores = 4 * shape.layers * shape.heads * shape.head * rows * tokens * seen
    cached = 2 * shape.layers * shape.kv_heads * shape.head * rows * (before + tokens) * each
    head = shape.vocab * shape.width
    mixing = streams * shape.width * (shape.width + 1) + shape.width if streams > 1 else 0.0
    return (
        longer(2 * shape.body * rows * tokens, shape.body * each)
        + longer(scores, cached)
        + longer(2 * head * batch, head * each)
        + longer(2 * mixing * batch, mixing * each)
    )


def increases(shape: Shape, times: float, *, streams: int, **options: Any) -> dict[str, float]:
    """What parallel scaling adds against what `times` the parameters add, which reach the same loss by the law.

    "memory" and "latency" are how many times smaller the increase is; beside them the increases themselves. `options` as in `cost`.
    """
    one, many = cost(shape, **options), cost(shape, streams=streams, **options)
    larger = cost(shape.grown(times), **options)
    found = {
        "memory_streams": many.memory - one.memory,
        "memory_parameters": larger.memory - one.memory,
        "latency_streams": many.latency - one.latency,
        "latency_parameters": larger.latency - one.latency,
    }
    return {
        "memory": found["memory_parameters"] / found["memory_streams"],
        "latency": found["latency_parameters"] / found["latency_streams"],
        **found,
    }

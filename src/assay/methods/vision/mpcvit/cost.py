"""What private inference costs, without running it: rounds and bytes of every operation, and the seconds a network takes for them.

    seconds = rounds rtt / 2 + bytes / bandwidth

A round is a message from each party to the other at the same time, so it takes half a round trip; `bytes` are those of one direction. What
the parties compute meanwhile, and the randomness dealt to them beforehand, are not in it. The counts are those of `mpc.TwoParties`,
exactly: its transcript is what they are tested against. Heads of one kind in a layer go together, as do all tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from assay import checks
from assay.methods.vision.mpcvit.attention import KINDS, Kind
from assay.methods.vision.mpcvit.mlp import FusedMlp
from assay.methods.vision.mpcvit.model import Block, MPCViT
from assay.methods.vision.mpcvit.mpc import CARRIES, WORD, Protocol, Traffic


@dataclass(frozen=True)
class MPCCostModel:
    """A protocol and a network: `rtt` in seconds, `bandwidth` in bytes a second and direction.

    >>> model = MPCCostModel(Protocol(), rtt=0.04, bandwidth=44e6)
    >>> model.table()["relu"]
    Traffic(rounds=9, bytes=50)
    >>> round(model.seconds(model.relu(1_000_000)), 3)
    1.254
    """

    protocol: Protocol = field(default_factory=Protocol)
    rtt: float = 0.04
    bandwidth: float = 44e6

    def __post_init__(self) -> None:
        checks.number("rtt", self.rtt, low=0)
        checks.number("bandwidth", self.bandwidth, above=0)

    def seconds(self, traffic: Traffic) -> float:
        """How long this traffic takes on the network."""
        return traffic.rounds * self.rtt / 2 + traffic.bytes / self.bandwidth

    # ---------------------------------------------------------------------------------------------- of a number of elements

    def multiply(self, *numels: int) -> Traffic:
        """A product, element by element or of matrices, of operands of these sizes."""
        return Traffic(1, WORD * sum(numels))

    def square(self, n: int) -> Traffic:
        return Traffic(1, WORD * n)

    def negative(self, n: int) -> Traffic:
        """A comparison with 0."""
        bits, places = [CARRIES * n], CARRIES
        while places > 1:
            bits.append(3 * (places // 2) * n)
            places -= places // 2
        return Traffic(len(bits) + 1, sum(-(-each // 8) for each in (*bits, n)))

    def relu(self, n: int) -> Traffic:
        return self.negative(n) + self.multiply(n, n)

    def maximum(self, rows: int, n: int) -> Traffic:
        """The largest of each of `rows` rows of n."""
        found = Traffic()
        while n > 1:
            found += self.relu(rows * (n // 2))
            n -= n // 2
        return found

    def exp(self, n: int) -> Traffic:
        return _times(self.protocol.exp_steps, self.square(n))

    def reciprocal(self, n: int) -> Traffic:
        return self.exp(n) + _times(2 * self.protocol.reciprocal_steps, self.multiply(n, n))

    def rsqrt(self, n: int) -> Traffic:
        step = self.square(n) + self.multiply(n, n) + self.multiply(n, n)
        return self.exp(n) + _times(self.protocol.rsqrt_steps, step)

    def gelu(self, n: int) -> Traffic:
        return self.negative(3 * n) + self.square(n) + _times(3, self.multiply(n, n))

    def table(self) -> dict[str, Traffic]:
        """Every operation on one element (maximum: of 64)."""
        return {
            "multiply": self.multiply(1, 1),
            "square": self.square(1),
            "negative": self.negative(1),
            "relu": self.relu(1),
            "maximum of 64": self.maximum(1, 64),
            "exp": self.exp(1),
            "reciprocal": self.reciprocal(1),
            "rsqrt": self.rsqrt(1),
            "gelu": self.gelu(1),
        }

    # ------------------------------------------------------------------------------------------------------------ of layers

    def linear(self, rows: int, layer: nn.Linear) -> Traffic:
        """A linear layer on `rows` rows, the weights being secret too."""
        return self.multiply(rows * layer.in_features, layer.in_features * layer.out_features)

    def layer_norm(self, rows: int, width: int) -> Traffic:
        n = rows * width
        return self.square(n) + self.rsqrt(rows) + self.multiply(n, rows) + self.multiply(n, width)

    def attention(self, kind: Kind, heads: int, tokens: int, dim: int) -> Traffic:
        """Heads of one kind, together; `heads` times the batch."""
        checks.choice("kind", kind, KINDS)
        n, scores, rows = heads * tokens * dim, heads * tokens * tokens, heads * tokens
        if kind == "scaling":
            return self.multiply(n, n) + self.multiply(n, heads * dim * dim)
        raw = {
            "softmax": self.maximum(rows, tokens) + self.exp(scores),
            "relu_softmax": self.relu(scores),
            "two_quad": self.square(scores),
        }[kind]
        return self.multiply(n, n) + raw + self.multiply(scores, n) + self.reciprocal(rows) + self.multiply(n, rows)

    def network(
        self, model: MPCViT, *, batch: int = 1, heads: Iterable[tuple[Kind, ...]] | None = None
    ) -> dict[str, Traffic]:
        """The traffic of a whole network, as `private_forward` names it: "linear", "norm", "gelu", "attention", "reveal".

        `heads`: kinds, layer by layer, in place of the model's own. Works on the meta device too. Raises ValueError for a model that is
        searched still, unless `heads` says what it would be.
        """
        tokens, width = batch * (1 + model.grid**2), model.num_features
        found = {name: Traffic() for name in ("linear", "norm", "gelu", "attention")}
        pixels = model.in_chans * model.patch_size**2
        found["linear"] += self.multiply((tokens - batch) * pixels, pixels * width)
        blocks = [block for block in model.blocks if isinstance(block, Block)]
        kinds = [block.self_attn.mix.kinds for block in blocks] if heads is None else list(heads)
        if len(kinds) != len(blocks):
            raise ValueError(f"heads must name kinds for {len(blocks)} layers, got {len(kinds)}")
        for block, its in zip(blocks, kinds, strict=True):
            if its is None:
                raise ValueError(
                    "model must have heads of fixed kinds, but its heads are searched: harden it, or give heads"
                )
            attention = block.self_attn
            if len(its) != attention.heads:
                raise ValueError(f"heads must name kinds for {attention.heads} heads a layer, got {len(its)}")
            for kind in its:
                checks.choice("heads", kind, KINDS)
            for kind, count in sorted(Counter(its).items(), key=lambda item: KINDS.index(item[0])):
                found["attention"] += self.attention(kind, batch * count, tokens // batch, width // attention.heads)
            found["linear"] += self.linear(tokens, attention.qkv) + self.linear(tokens, attention.proj)
            found["norm"] += _times(2, self.layer_norm(tokens, width))
            self._mlp(block, tokens, batch, found)
        found["norm"] += self.layer_norm(batch, width)
        if isinstance(model.fc, nn.Linear):
            found["linear"] += self.linear(batch, model.fc)
            found["reveal"] = self.square(batch * model.fc.out_features)
        else:
            found["reveal"] = self.square(batch * width)
        return found

    def _mlp(self, block: Block, tokens: int, batch: int, found: dict[str, Traffic]) -> None:
        mlp = block.mlp
        if mlp.gelu_tokens is None and mlp.tokens is not None:
            raise ValueError("model must have tokens of fixed kinds, but its betas are searched: harden them first")
        gelu = tokens if mlp.gelu_tokens is None else batch * len(mlp.gelu_tokens)
        rest = tokens - gelu
        if gelu:
            assert mlp.fc1 is not None
            assert mlp.fc2 is not None
            found["linear"] += self.linear(gelu, mlp.fc1) + self.linear(gelu, mlp.fc2)
            found["gelu"] += self.gelu(gelu * mlp.fc1.out_features)
        if rest:
            layers = [mlp.fused] if isinstance(mlp, FusedMlp) else [mlp.fc1, mlp.fc2]
            for layer in layers:
                found["linear"] += self.linear(rest, layer)
            if mlp.relu_after:
                found["gelu"] += self.relu(rest * layers[-1].out_features)

    def latency(self, model: MPCViT, *, batch: int = 1, heads: Iterable[tuple[Kind, ...]] | None = None) -> float:
        """Seconds of the network's whole traffic; see `network`."""
        return self.seconds(sum(self.network(model, batch=batch, heads=heads).values(), Traffic()))


def _times(count: int, traffic: Traffic) -> Traffic:
    return Traffic(count * traffic.rounds, count * traffic.bytes)


WAN = MPCCostModel(rtt=0.04, bandwidth=44e6)
"""A wide-area network: 40 ms and 44 MB/s, as Cheetah (Huang et al., 2022) was measured on. Our choice."""
LAN = MPCCostModel(rtt=0.0003, bandwidth=384e6)
"""A local network: 0.3 ms and 384 MB/s, from the same paper. Our choice."""

"""DNAS: operators chosen by gradients. One super-net holds all candidates, and what they cost is part of its loss.

Wu et al., "FBNet" (arXiv 1812.03443), a chapter of the thesis. Layer l puts out sum_k m_k o_k(x), where the weights m are drawn by
Gumbel-softmax from the layer's parameters theta, so that the expected cost sum_l sum_k m_k table[l][k] has a gradient. Weights are
trained on one part of the data, theta on another. The networks found are drawn from softmax(theta), and trained from scratch.

All candidates of all layers live at once: memory grows with their number, unless `SuperNet(space, checkpoint=True)` computes their
insides again for the gradient. Weight sharing favours operators that learn fast (a skip most of all), so train several draws before
believing one. And try as many random networks for the same cost beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from assay import checks
from assay.methods.compression.efficient_dnns.tables import Architecture, CostTable, Space

ALPHA, BETA = 0.2, 0.6  # of the loss
TAU, DECAY = 5.0, 0.045  # the temperature at first, and its decay an epoch
EPOCHS, WARMUP = 90, 10  # of the paper

Data = tuple[Tensor, Tensor]
"""Images and labels."""
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logits, labels, expected cost) -> the loss that theta is trained on."""


def gumbel_weights(theta: Tensor, tau: float, *, generator: torch.Generator | None = None) -> Tensor:
    """Weights on the simplex: softmax((log_softmax(theta) + Gumbel noise) / tau), with gradients to theta.

    `theta` is (operators,). As tau falls the weights become one-hot, operator k with probability softmax(theta)[k].
    Raises ValueError for a tau that is not above 0.
    """
    tau = checks.number("tau", tau, above=0)
    noise = torch.empty(theta.shape, dtype=theta.dtype).exponential_(generator=generator).log().neg()
    return torch.softmax((torch.log_softmax(theta, -1) + noise.to(theta.device)) / tau, -1)


def fbnet_loss(logits: Tensor, labels: Tensor, cost: Tensor, *, alpha: float = ALPHA, beta: float = BETA) -> Tensor:
    """Cross entropy times alpha * log(cost)^beta. Raises ValueError unless the cost is above 1 in its unit: its logarithm must be."""
    if not bool(cost > 1):
        raise ValueError(f"cost must be above 1 in its unit, got {float(cost):.4g}: take a smaller unit")
    return F.cross_entropy(logits, labels) * alpha * torch.log(cost) ** beta


def anneal(epoch: int, epochs: int = EPOCHS) -> float:
    """The temperature of an epoch: 5 exp(-0.045 epoch) over the paper's 90 epochs; over fewer it falls to the same end (our choice)."""
    return TAU * math.exp(-DECAY * epoch * EPOCHS / checks.whole("epochs", epochs, low=1))


class Mixed(nn.Module):
    """One layer of a super-net: all its operators, and theta, which starts at 0 (all equally likely)."""

    def __init__(self, operators: dict[str, nn.Module], checkpoint: bool = False) -> None:
        super().__init__()
        self.checkpoint = checkpoint
        self.names = tuple(operators)
        self.operators = nn.ModuleList(operators.values())
        self.theta = nn.Parameter(torch.zeros(len(self.names)))

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        outputs = [weight * self._run(operator, x) for weight, operator in zip(weights, self.operators, strict=True)]
        return torch.stack(outputs).sum(0)

    def _run(self, operator: nn.Module, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(operator, x, use_reentrant=False) if self.checkpoint else operator(x)
        return out


class SuperNet(nn.Module):
    """All networks of a space in one: stem, mixed layers, head. `forward(x, weights)` with one tensor of weights a layer.

    With `checkpoint` an operator keeps its input alone for the gradient and runs twice in training (batch norms then count a batch
    twice in their running statistics, which no search reads).
    """

    def __init__(self, space: Space, *, checkpoint: bool = False) -> None:
        super().__init__()
        checks.flag("checkpoint", checkpoint)
        self.stem, self.head = space.stem(), space.head()
        self.layers = nn.ModuleList(
            Mixed({name: make() for name, make in layer.items()}, checkpoint) for layer in space.layers
        )

    def mixed(self) -> Iterator[Mixed]:
        """The layers, as what they are."""
        for layer in self.layers:
            assert isinstance(layer, Mixed)
            yield layer

    def thetas(self) -> list[nn.Parameter]:
        """The parameters of the choice, one (operators,) a layer."""
        return [layer.theta for layer in self.mixed()]

    def weights(self) -> list[nn.Parameter]:
        """All other parameters."""
        chosen = {id(theta) for theta in self.thetas()}
        return [parameter for parameter in self.parameters() if id(parameter) not in chosen]

    def draw(self, tau: float, *, generator: torch.Generator | None = None) -> list[Tensor]:
        """Gumbel-softmax weights of every layer."""
        return [gumbel_weights(theta, tau, generator=generator) for theta in self.thetas()]

    def forward(self, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        x = self.stem(x)
        for layer, weight in zip(self.layers, weights, strict=True):
            x = layer(x, weight)
        out: Tensor = self.head(x)
        return out

    def sample(self, generator: torch.Generator | None = None) -> Architecture:
        """An architecture drawn from softmax(theta)."""
        picks = [
            int(torch.multinomial(layer.theta.detach().softmax(-1).cpu(), 1, generator=generator))
            for layer in self.mixed()
        ]
        return tuple(layer.names[pick] for layer, pick in zip(self.mixed(), picks, strict=True))


@dataclass(frozen=True)
class Found:
    """What a search leaves: the probabilities of every layer's operators, and how many images were passed forward and back."""

    probabilities: tuple[dict[str, float], ...]
    images: int
    losses: tuple[float, ...]  # the mean loss of theta in each epoch that trained it

    @property
    def best(self) -> Architecture:
        """The most likely operator of every layer."""
        return tuple(max(layer, key=lambda name: layer[name]) for layer in self.probabilities)


def search(
    net: SuperNet,
    table: CostTable,
    weight_data: Data,
    theta_data: Data,
    *,
    epochs: int = EPOCHS,
    warmup: int = WARMUP,
    batch: int = 64,
    rate: float = 0.1,
    theta_rate: float = 0.01,
    theta_decay: float = 5e-4,
    loss: Loss = fbnet_loss,
    seed: int = 0,
) -> Found:
    """Train the super-net's weights and theta in turn: SGD on `weight_data`, and after `warmup` epochs Adam on `theta_data`.

    Images (n, C, H, W) and labels (n,) of the two must be different ones. The rate of SGD (momentum 0.9) falls to 0 on half a cosine;
    weights are trained on the cross entropy alone, which the factor of the cost only scales (our choice). An epoch passes over both
    parts once. Weights and data lie on one device.

    Raises ValueError where the table has other operators than the net, where the cheapest network costs 1 or less in the table's unit
    (log(cost) must be above 0: take smaller units), unless warmup < epochs, and for a loss that is not finite.
    """
    names, known = [layer.names for layer in net.mixed()], [tuple(layer) for layer in table.layers]
    if names != known:
        raise ValueError(f"table must have the operators of the net, {names}, got {known}")
    if not table.cost(table.cheapest()) > 1:
        raise ValueError(f"table must cost more than 1 {table.unit} for every network: take a smaller unit")
    epochs, batch = checks.whole("epochs", epochs, low=1), checks.whole("batch", batch, low=2)
    warmup = checks.whole("warmup", warmup, low=0, high=epochs - 1)
    for name, (images, labels) in (("weight_data", weight_data), ("theta_data", theta_data)):
        checks.tensor(name, images, ndim=4)
        checks.tensor(f"the labels of {name}", labels, shape=(len(images),), dtype=torch.int64)
    generator = torch.Generator().manual_seed(checks.whole("seed", seed))
    sgd = torch.optim.SGD(net.weights(), checks.number("rate", rate, above=0), momentum=0.9, weight_decay=1e-4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, epochs)
    theta_rate = checks.number("theta_rate", theta_rate, above=0)
    adam = torch.optim.Adam(net.thetas(), theta_rate, weight_decay=checks.number("theta_decay", theta_decay, low=0))
    seen = 0
    losses: list[float] = []
    net.train()
    for epoch in range(epochs):
        tau = anneal(epoch, epochs)
        for images, labels in _batches(weight_data, batch, generator):
            weights = [weight.detach() for weight in net.draw(tau, generator=generator)]
            _step(sgd, F.cross_entropy(net(images, weights), labels))
            seen += len(images)
        cosine.step()
        if epoch < warmup:
            continue
        total, steps = 0.0, 0
        for images, labels in _batches(theta_data, batch, generator):
            weights = net.draw(tau, generator=generator)
            total += _step(adam, loss(net(images, weights), labels, table.expected(weights)))
            steps, seen = steps + 1, seen + len(images)
        losses.append(total / steps)
    probabilities = tuple(
        dict(zip(layer.names, layer.theta.detach().softmax(-1).tolist(), strict=True)) for layer in net.mixed()
    )
    return Found(probabilities, seen, tuple(losses))


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> float:
    value = float(loss.detach())
    if not math.isfinite(value):
        raise ValueError(f"the loss must be finite, got {value}: take a smaller rate")
    moved = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    optimizer.zero_grad()
    torch.autograd.backward([loss], inputs=moved)  # weights get no gradient where only theta moves
    optimizer.step()
    return value


def _batches(data: Data, batch: int, generator: torch.Generator) -> Iterator[Data]:
    images, labels = data
    for picks in torch.randperm(len(images), generator=generator).split(batch):
        if len(picks) > 1 or len(images) == 1:  # a batch norm cannot train on a single image
            yield images[picks], labels[picks]

"""Efficient deep networks: does a differentiable search cost less than one by reinforcement, do the latencies of a table add up, and
what does it save to replace depthwise convolutions by shifts?

All on scikit-learn's handwritten digits, and on this machine's own latencies. That annotating with one click is 6.2 times faster was
measured with people; no experiment here stands for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from assay.experiments.core import Figure, Guard, Operator, Quality, Trained, Trial, experiment
from assay.experiments.rates import chosen, searched
from assay.experiments.seeds import paired
from assay.measure.clock import compare_many
from assay.measure.stats import student_interval
from assay.methods.compression.efficient_dnns import (
    CostTable,
    Net,
    Space,
    SuperNet,
    counted_table,
    dirac_net,
    fbnet_loss,
    fbnet_space,
    measured_table,
    resnet,
    search,
    shiftresnet,
    squeezenext_23,
    with_bits,
)
from assay.workloads.images import digits_split, photograph

Data = tuple[Tensor, Tensor]
Architecture = tuple[str, ...]

PARTS = {"weights": slice(0, 800), "theta": slice(800, 1000), "choose": slice(1000, None)}
"""Of the digits for training: for weights and theta 80 and 20 %, as in the paper, and the rest for choosing learning rates."""


@cache
def digits_of(part: str) -> Data:
    """The digits of a part of `PARTS`, or of "test": images (n, 1, 8, 8), labels (n,)."""
    images, labels, test_images, test_labels = digits_split(seed=0)
    if part == "test":
        return test_images, test_labels
    return images[PARTS[part]], labels[PARTS[part]]


def batches(data: Data, batch: int, generator: torch.Generator) -> Iterator[Data]:
    """One pass over the data in a random order, without a last batch that is smaller."""
    images, labels = data
    order = torch.randperm(len(images), generator=generator)
    for picks in order[: len(order) // batch * batch].split(batch):
        yield images[picks], labels[picks]


def train(net: nn.Module, data: Data, rate: float, epochs: int, seed: int, batch: int = 64) -> int:
    """SGD with momentum 0.9, the rate falling to 0 on half a cosine; returns the number of images passed.

    Raises ValueError for a loss that is not finite.
    """
    optimizer = torch.optim.SGD(net.parameters(), rate, momentum=0.9, weight_decay=1e-4)
    steps = epochs * (len(data[0]) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    generator = torch.Generator().manual_seed(seed)
    net.train()
    for _ in range(epochs):
        for images, labels in batches(data, batch, generator):
            loss = F.cross_entropy(net(images), labels)
            if not math.isfinite(float(loss.detach())):
                raise ValueError(f"the loss is not finite at rate {rate:g}")
            optimizer.zero_grad()
            torch.autograd.backward([loss])
            optimizer.step()
            schedule.step()
    return steps * batch


@torch.no_grad()
def logits_of(net: nn.Module, images: Tensor) -> Tensor:
    """What the network says in inference, (n, classes)."""
    net.eval()
    return torch.cat([net(part) for part in images.split(256)])


def forward(net: Any, images: Tensor) -> Tensor:
    """One pass in inference: what is timed."""
    with torch.inference_mode():
        out: Tensor = net(images)
    return out


def accuracy(net: nn.Module, data: Data) -> float:
    """The share of the images that are told right."""
    return float((logits_of(net, data[0]).argmax(1) == data[1]).double().mean())


def nearest_mean(data: Data, test: Data) -> float:
    """The accuracy of the trivial rule: the class whose average image is the nearest."""
    (images, labels), (unseen, wanted) = data, test
    means = torch.stack([images[labels == label].flatten(1).mean(0) for label in labels.unique()])
    found = labels.unique()[torch.cdist(unseen.flatten(1), means).argmin(1)]
    return float((found == wanted).double().mean())


# ----------------------------------------------------------------------------------- the search: how much it costs, what it finds

SEARCH = "efficient_dnns/search"
OPERATORS = ("k3_e1", "k3_e3", "k5_e3", "k3_e6", "skip")
BATCH = 64  # images of the tabled latency: on a single 8-pixel image all operators wait for the interpreter alike
SEARCHING = Operator(
    "architecture search",
    free="random search: networks drawn at random, trained alike until one is as good",
)


def space_of_digits() -> Space:
    """Six layers of inverted bottlenecks over 8 x 8 digits, of five operators each (four where width and size change)."""
    return fbnet_space(
        [(16, 3, 1), (32, 3, 2)], stem=16, stem_stride=1, operators=OPERATORS, num_classes=10, in_chans=1
    )


def table_of_digits(space: Space) -> CostTable:
    """Microseconds of every operator on a batch of digits, on this machine."""
    return measured_table(space, digits_of("weights")[0][:BATCH], rounds=10)


@dataclass(frozen=True)
class Tried:
    """A network that was trained: FBNet's loss on the part kept for choosing, and on the test digits; accuracy; MACs of its training."""

    architecture: Architecture
    chosen_by: float
    loss: float
    accuracy: float
    macs: float


@dataclass(frozen=True)
class Task:
    """One seed of the search: the space, its two tables, and how candidates are trained."""

    space: Space
    latency: CostTable
    macs: CostTable  # of one image
    epochs: int  # of a candidate
    rate: float
    seed: int
    known: dict[tuple[Architecture, float], Tried] = field(default_factory=dict)

    def tried(self, architecture: Architecture, rate: float | None = None) -> Tried:
        """Train that network from scratch on the weights' part; a second time it would come out the same, and is looked up."""
        key = (architecture, rate or self.rate)
        if key in self.known:
            return self.known[key]
        torch.manual_seed(self.seed)
        net = self.space.network(architecture)
        images = train(net, digits_of("weights"), key[1], self.epochs, self.seed)
        cost = torch.tensor(self.latency.cost(architecture))
        losses = [
            float(fbnet_loss(logits_of(net, part[0]), part[1], cost)) for part in map(digits_of, ("theta", "test"))
        ]
        macs = 3.0 * images * self.macs.cost(architecture)  # forward, and twice as much back
        self.known[key] = Tried(architecture, losses[0], losses[1], accuracy(net, digits_of("test")), macs)
        return self.known[key]

    def largest(self) -> Architecture:
        """The operator of most MACs at every layer: the network that nobody searched."""
        return tuple(max(layer, key=lambda name: layer[name]) for layer in self.macs.layers)


def best_of(tried: Sequence[Tried]) -> Tried:
    """The one that the part kept for choosing prefers."""
    return min(tried, key=lambda one: one.chosen_by)


def typical(tried: Sequence[Tried]) -> float:
    """The geometric mean of their losses on test digits: the guard's margin is a share, and losses differ by factors."""
    return math.exp(float(np.mean([math.log(one.loss) for one in tried])))


def by_gradients(task: Task, epochs: int, draws: int, rate: float) -> tuple[Tried, float]:
    """DNAS: search, train the most likely network and some that are drawn, keep the best; and the MACs of all that."""
    torch.manual_seed(task.seed)
    net = SuperNet(task.space)
    found = search(
        net, task.latency, digits_of("weights"), digits_of("theta"), epochs=epochs, warmup=max(1, epochs // 9),
        batch=32, rate=rate, theta_rate=0.1, seed=task.seed,
    )  # fmt: skip
    everything = task.macs.fixed + sum(sum(layer.values()) for layer in task.macs.layers)
    macs = 3.0 * found.images * everything  # as for a candidate, though a step of theta needs no gradients of weights
    generator = torch.Generator().manual_seed(task.seed)
    wanted = dict.fromkeys([found.best, *(net.sample(generator) for _ in range(draws))])
    tried = [task.tried(architecture) for architecture in wanted]
    return best_of(tried), macs + sum(one.macs for one in tried)


def by_reinforcement(task: Task, candidates: int, rate: float = 0.3) -> list[Tried]:
    """The paper's rival: a policy, one distribution a layer, that is rewarded for less of FBNet's loss (REINFORCE).

    The advantage is the reward less its mean so far, over its spread. MnasNet's policy is a recurrent network; over so few layers a
    table does (our choice). Every candidate is trained from scratch; one that comes again is looked up, and costs nothing again.
    """
    torch.manual_seed(task.seed)
    policy = [torch.zeros(len(layer), requires_grad=True) for layer in task.space.layers]
    optimizer = torch.optim.Adam(policy, rate)
    generator = torch.Generator().manual_seed(1000 + task.seed)
    tried: list[Tried] = []
    for _ in range(candidates):
        picks = [int(torch.multinomial(row.detach().softmax(0), 1, generator=generator)) for row in policy]
        names = tuple(list(layer)[pick] for layer, pick in zip(task.space.layers, picks, strict=True))
        tried.append(task.tried(names))
        rewards = np.array([-one.chosen_by for one in tried])
        if len(tried) < 3:
            continue
        advantage = float((rewards[-1] - rewards.mean()) / (rewards.std() + 1e-9))
        likely = torch.stack([row.log_softmax(0)[pick] for row, pick in zip(policy, picks, strict=True)]).sum()
        optimizer.zero_grad()
        torch.autograd.backward([-advantage * likely])
        optimizer.step()
    return tried


def at_random(task: Task, candidates: int) -> list[Tried]:
    """Different networks drawn at random, each trained as all are; the whole space where it has no more."""
    generator = torch.Generator().manual_seed(2000 + task.seed)
    wanted: dict[Architecture, None] = {}
    while len(wanted) < min(candidates, math.prod(len(layer) for layer in task.space.layers)):
        wanted[task.space.random(generator)] = None
    return [task.tried(architecture) for architecture in wanted]


def cost_in_order(tried: Sequence[Tried], goal: float) -> float:
    """MACs until a network is as good as `goal` on the part kept for choosing; of all of them where none is. Each is paid for once."""
    paid: dict[Architecture, float] = {}
    for one in tried:
        paid[one.architecture] = one.macs
        if one.chosen_by <= goal:
            break
    return sum(paid.values())


def cost_in_any_order(tried: Sequence[Tried], goal: float) -> float:
    """The mean of that over all orders: of n networks of which m are good enough, (n + 1) / (m + 1) are tried, at most n."""
    good = sum(one.chosen_by <= goal for one in tried)
    number = min(len(tried), (len(tried) + 1) / (good + 1))
    return number * sum(one.macs for one in tried) / len(tried)


@searched(SEARCH, arms=("super-net", "network", "largest"), grid=(0.01, 0.03, 0.1, 0.3, 1.0))
def search_rate(arm: str, rate: float) -> float:
    """The cross entropy on the digits kept for the choice of rates, after a training as long as that of `small`.

    Of the super-net: with the likeliest operators alone. Of "network": the mean over three random ones.
    """
    space = space_of_digits()
    weights, held = digits_of("weights"), digits_of("choose")
    macs = counted_table(space, weights[0][:1], "macs")
    task = Task(space, macs, macs, 8, rate, 100)
    if arm == "super-net":
        torch.manual_seed(task.seed)
        whole = SuperNet(space)
        search(
            whole, macs, weights, digits_of("theta"), epochs=6, warmup=1, batch=32, rate=rate, theta_rate=0.1,
            seed=task.seed,
        )  # fmt: skip
        hot = [F.one_hot(theta.argmax(), len(theta)).float() for theta in whole.thetas()]
        with torch.no_grad():  # statistics of batch norms are those of mixtures: take the batch's own
            whole.train()
            return float(F.cross_entropy(whole(held[0], hot), held[1]))
    generator = torch.Generator().manual_seed(task.seed)
    networks = [task.largest()] if arm == "largest" else [space.random(generator) for _ in range(3)]
    losses = []
    for architecture in networks:
        torch.manual_seed(task.seed)
        net = space.network(architecture)
        train(net, weights, rate, task.epochs, task.seed)
        losses.append(float(F.cross_entropy(logits_of(net, held[0]), held[1])))
    return sum(losses) / len(losses)


@experiment(
    "efficient_dnns/search-cost",
    points={
        "smoke": [{"epochs": 2, "candidates": 2, "train_epochs": 1, "draws": 1, "seeds": 3}],
        "small": [{"epochs": 6, "candidates": 20, "train_epochs": 8, "draws": 1, "seeds": 3}],
        "full": [{"epochs": 90, "candidates": 1000, "train_epochs": 30, "draws": 6, "seeds": 5}],
    },
    operator=SEARCHING,
    paper={
        "data": "a tenth of the classes of ImageNet",
        "layers": 22,
        "operators": 9,
        "epochs": 90,
        "theta_rate": 0.01,
        "rival": "MnasNet's search by reinforcement",
        "device": "a Samsung Galaxy S8, one image",
    },
    departures={
        "data": "scikit-learn's digits, 8 x 8 pixels: neither ImageNet nor anything of its size comes with a package",
        "layers": "6, for networks that train in a second",
        "operators": "5, of the paper's 9, for the same reason",
        "epochs": "6 at small, annealed to the paper's last temperature; 90 at full",
        "theta_rate": "0.1, since theta takes tens of steps here and thousands in the paper",
        "rival": "a policy that is a table, over as many networks as the point says, each trained as all are here",
        "device": "this machine's processor, a batch of 64",
    },
    guard=Guard("FBNet's loss of the network found, on test digits (cross entropy x 0.2 log(us)^0.6)", 0.2),
    refuted_if="search by reinforcement reaches a network as good as DNAS's for less training than DNAS cost",
    measured_here="MACs of training until a network is as good, digits; where reinforcement never gets there, of all it tried",
    minutes=240,
)
def search_cost(epochs: int, candidates: int, train_epochs: int, draws: int, seeds: int) -> Figure:
    """Training that search by reinforcement needs for a network as good as DNAS's, over what DNAS needed.

    As good: FBNet's loss on the part kept for choosing, every candidate trained from scratch alike. DNAS pays for its super-net, all
    operators of which run in every step, and for the networks that it draws; the rivals for each network they try, once. The latency
    table is measured once for all and charged to none. Where reinforcement never gets there it pays for all it tried: the figure is then a
    lower bound, and `details` says how often. At `small` DNAS costs about as much as six candidates, so that the twenty allow a figure of
    about three; 421 is out of reach there.
    Free is random search over another set of networks: its cost is the mean over their orders.

    Interval: Student's t over the logarithms of the seeds' ratios. Quality: the loss of what each search chose, on digits that no search
    saw, as geometric means. Deleted: the network of the largest operators, which nobody searched, its own rate searched. Random: the
    mean over random networks. Rival: the best of as many random networks as DNAS's training would have paid for. The margin, 20 %, is
    about what cross entropy on 450 digits varies by between trainings of one network (our choice).
    """
    space = space_of_digits()
    table = table_of_digits(space)
    macs = counted_table(space, digits_of("weights")[0][:1], "macs")
    rates = {arm: chosen(SEARCH, arm) for arm in ("super-net", "network", "largest")}
    ours: list[Tried] = []
    theirs: list[Tried] = []
    largest: list[Tried] = []
    fastest: list[Tried] = []
    rival: list[Tried] = []
    random: list[Tried] = []
    gains: list[float] = []
    free: list[float] = []
    spent: list[float] = []
    reached: list[bool] = []
    for seed in range(seeds):
        task = Task(space, table, macs, train_epochs, rates["network"].rate, seed)
        found, cost = by_gradients(task, epochs, draws, rates["super-net"].rate)
        policy, drawn = by_reinforcement(task, candidates), at_random(task, candidates)
        paid = cost_in_order(policy, found.chosen_by)
        gains.append(math.log(paid / cost))
        free.append(math.log(paid / cost_in_any_order(drawn, found.chosen_by)))
        reached.append(best_of(policy).chosen_by <= found.chosen_by)
        each = sum(one.macs for one in drawn) / len(drawn)
        spent.append(cost / each)
        rival.append(best_of(drawn[: max(1, int(cost / each))]))
        random += drawn
        ours.append(found)
        theirs.append(best_of(policy))
        largest.append(task.tried(task.largest(), rates["largest"].rate))
        fastest.append(task.tried(table.cheapest()))
    gain = student_interval(gains)
    base = typical(theirs)
    share = paired([math.log(one.loss) for one in ours], [math.log(one.loss) for one in theirs])
    floor = nearest_mean(digits_of("weights"), digits_of("test"))

    def trained(tried: Sequence[Tried], arm: str) -> Trained:
        scores = [one.accuracy for one in tried]
        rate = rates[arm]
        return Trained(scores, floor, "the nearest class mean", rate.rate, rate.rates, higher_is_better=True)

    return Figure(
        math.exp(gain.median),
        "x",
        math.exp(gain.low),
        math.exp(gain.high),
        baseline=1.0,
        free=math.exp(float(np.mean(free))),
        quality=Quality(
            typical(ours),
            base,
            base * math.exp(share.low),
            base * math.exp(share.high),
            controls={
                "deleted": typical(largest),
                "random": typical(random),
                "rival": typical(rival),
                "the fastest network": typical(fastest),
            },
            rival="the best of as many random networks as DNAS's training would have paid for, at most of those tried",
        ),
        trained={
            "DNAS": trained(ours, "network"),
            "reinforcement": trained(theirs, "network"),
            "random": trained(rival, "network"),
            "largest": trained(largest, "largest"),
        },
        details={
            "networks that the search's training would have paid for": spent,
            "reinforcement got there": reached,
            "found": [list(one.architecture) for one in ours],
            "by reinforcement": [list(one.architecture) for one in theirs],
            "test loss": {"DNAS": [one.loss for one in ours], "reinforcement": [one.loss for one in theirs]},
            "latency us": {
                "DNAS": [table.cost(one.architecture) for one in ours],
                "reinforcement": [table.cost(one.architecture) for one in theirs],
                "largest": table.cost(largest[0].architecture),
                "fastest": table.cost(table.cheapest()),
            },
            "table us": [dict(layer) for layer in table.layers],
        },
    )


# --------------------------------------------------------------------------------------------------- the table: does it add up?


@experiment(
    "efficient_dnns/table-error",
    points={
        "smoke": [{"networks": 4, "rounds": 4}],
        "small": [{"networks": 16, "rounds": 12}],
        "full": [{"networks": 100, "rounds": 30}],
    },
    operator=Operator(
        "predicting a network's latency",
        free="a line over MACs, fitted to the measured latencies of the other networks",
    ),
    paper={"device": "a Samsung Galaxy S8", "batch": 1, "layers": 22},
    departures={
        "device": "this machine's processor",
        "batch": "64 digits of 8 x 8 pixels: a single one leaves the operators nothing to differ in",
        "layers": "6, as in the search that uses the table",
    },
    tolerance=15.0,
    measured_here="networks drawn at random from the space of the search over digits",
    refuted_if="the whole interval lies above 15 %, or a line over MACs predicts certainly better",
    refutes=lambda record: record["measured"]["low"] > 15 or record["controls"]["rival"] < record["measured"]["low"],
    minutes=30,
)
def table_error(networks: int, rounds: int) -> Figure:
    """Per cent by which the table's sum misses the measured latency of a network: the mean of the absolute errors over random networks.

    The table is measured first; then all networks are timed in turn, and the median counts. The interval is Student's t over the
    networks, which are all there is to sample. Deleted: one latency for all, the mean of the predictions. Random: the table with the
    latencies of each layer dealt to other operators. Rival: a line over MACs, fitted to the latencies of all networks but the one that
    it predicts: an expert's way without a table, which needs whole networks to be measured.
    """
    space = space_of_digits()
    images = digits_of("weights")[0][:BATCH]
    table = table_of_digits(space)
    macs = counted_table(space, images, "macs")
    generator = torch.Generator().manual_seed(0)
    drawn = list(dict.fromkeys(space.random(generator) for _ in range(networks)))
    built = [space.network(architecture).eval() for architecture in drawn]

    timings = compare_many({str(i): partial(forward, net, images) for i, net in enumerate(built)}, rounds=rounds)
    measured = np.array([1e6 * float(np.median(timings.seconds[str(i)])) for i in range(len(built))])
    predicted = np.array([table.cost(architecture) for architecture in drawn])
    count = np.array([macs.cost(architecture) for architecture in drawn])

    def errors(latencies: np.ndarray) -> np.ndarray:
        return 100 * np.abs(latencies - measured) / measured

    dealt = CostTable(table.unit, tuple(turned(layer) for layer in table.layers), table.fixed)
    found = student_interval(errors(predicted))
    controls = {
        "deleted": np.full_like(predicted, predicted.mean()),
        "random": np.array([dealt.cost(architecture) for architecture in drawn]),
        "rival": line_of_the_others(count, measured),
    }
    means = {name: float(errors(values).mean()) for name, values in controls.items()}
    return Figure(
        found.median,
        "%",
        max(0.0, found.low),
        found.high,
        baseline=0.0,
        free=means["rival"],
        controls=means,
        details={
            "networks": len(drawn),
            "measured us": measured.tolist(),
            "predicted us": predicted.tolist(),
            "bias": float((predicted / measured).mean() - 1),
            "correlation of the ranks": rank_correlation(predicted, measured),
            "correlation of the ranks of MACs": rank_correlation(count, measured),
            "noisy": timings.noisy,
        },
    )


def line_of_the_others(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Each y by a line over x through all others, by least squares of the relative errors."""
    design = np.stack([np.ones_like(x), x], 1)
    found = np.empty_like(y)
    for i in range(len(y)):
        others = np.arange(len(y)) != i
        line = np.linalg.lstsq(design[others] / y[others, None], np.ones(others.sum()), rcond=None)[0]
        found[i] = design[i] @ line
    return found


def turned(layer: Mapping[str, float]) -> dict[str, float]:
    """The layer's costs, each given to the next operator."""
    values = list(layer.values())
    return dict(zip(layer, values[-1:] + values[:-1], strict=True))


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's, for numbers without ties; 0 where one side does not vary."""
    x, y = (np.argsort(np.argsort(values)).astype(np.float64) for values in (a, b))
    return float(np.corrcoef(x, y)[0, 1]) if len(a) > 1 and np.ptp(a) and np.ptp(b) else 0.0


# -------------------------------------------------------------------------------------------------- co-design: shifts for kernels

CODESIGN = "efficient_dnns/codesign"
CANVAS, DIGIT = 16, 12  # pixels a side: of the image, and of the digit on it
ARMS = ("before", "shift", "none", "average", "few bits", "resnet", "shiftresnet")
COMPILED = ("before", "shift", "average")
TIMED = (*COMPILED, "resnet", "shiftresnet")
BUILT = Operator(
    "a small network for images",
    free="the network before the co-design (ShuffleNetV2's units with depthwise convolutions), compiled with Inductor",
)


def codesigned(arm: str) -> Net:
    """The network of an arm. All but the residual ones are one network that mixes neighbours in another way."""
    if arm == "resnet":
        return resnet(depths=(1, 1, 1), widths=(8, 16, 32), in_chans=1)
    if arm == "shiftresnet":
        return shiftresnet((1, 1, 1), (8, 16, 32), expansion=9, in_chans=1)
    sizes: dict[str, Any] = {"last": 96, "pool_stem": False, "num_classes": 10, "in_chans": 1}
    mix: Any = {"before": "depthwise", "few bits": "shift"}.get(arm, arm)
    net = dirac_net((2, 2), (24, 48, 96), mix=mix, **sizes)
    if arm == "few bits":
        with_bits(net, weights=1, activations=4)
    return net


@cache
def drawn_digits(part: str, n: int, seed: int) -> Data:
    """`n` of a part's digits, enlarged to 12 pixels a side, each at a random place of a canvas of 16: (n, 1, 16, 16) in [-1, 1].

    "train" is the part for weights and that for theta.
    """
    parts = ("weights", "theta") if part == "train" else (part,)
    images, labels = (torch.cat(tensors) for tensors in zip(*map(digits_of, parts), strict=True))
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(images), (n,), generator=generator)
    places = torch.randint(CANVAS - DIGIT + 1, (n, 2), generator=generator).tolist()
    large = F.interpolate(images, (DIGIT, DIGIT), mode="bilinear")[picks, 0]
    canvas = torch.zeros(n, 1, CANVAS, CANVAS)
    for image, digit, (top, left) in zip(canvas, large, places, strict=True):
        image[0, top : top + DIGIT, left : left + DIGIT] = digit
    return 2 * canvas - 1, labels[picks]


def fresh(arm: str) -> Any:
    """The arm's network with its first weights, as it is timed: in inference, batch norms folded into convolutions, channels last."""
    torch.manual_seed(0)
    net: Any = codesigned(arm).eval()
    for unit in [m for m in net.modules() if isinstance(m, nn.Sequential) and len(m) > 1]:
        if isinstance(unit[0], nn.Conv2d) and isinstance(unit[1], nn.BatchNorm2d):
            unit[0], unit[1] = fuse_conv_bn_eval(unit[0], unit[1]), nn.Identity()
    return net.to(memory_format=torch.channels_last)


def trained_net(arm: str, n: int, epochs: int, rate: float, seed: int) -> Net:
    """The arm's network after its training; all arms of a seed see the same images in the same order."""
    torch.manual_seed(seed)
    net = codesigned(arm)
    train(net, drawn_digits("train", n, seed), rate, epochs, seed, batch=64)
    return net


@searched(CODESIGN, arms=ARMS, grid=(0.01, 0.03, 0.1, 0.3, 1.0, 3.0))
def codesign_rate(arm: str, rate: float) -> float:
    """The cross entropy on digits kept for the choice."""
    net = trained_net(arm, 1024, 6, rate, 100)
    images, labels = drawn_digits("choose", 1000, 1_000_000)
    return float(F.cross_entropy(logits_of(net, images), labels))


def whole_networks() -> dict[str, dict[str, float]]:
    """Parameters, MACs and milliseconds of the papers' networks for large images, on one photograph, with first weights, not compiled."""
    from assay.measure.cost import count_cost

    built = {
        "SqueezeNext-23": (squeezenext_23(), 227),
        "ShuffleNetV2's units": (dirac_net(mix="depthwise"), 224),
        "DiracDeltaNet": (dirac_net(), 224),
        "DiracDeltaNet without shifts": (dirac_net(mix="none"), 224),
    }
    picture = photograph("china")[None]
    inputs = {name: F.interpolate(picture, (side, side), mode="bilinear") for name, (_, side) in built.items()}
    runs = {name: partial(forward, net.eval(), inputs[name]) for name, (net, _) in built.items()}
    timings = compare_many(runs, rounds=6, max_seconds=10.0)
    found = {}
    for name, (net, _) in built.items():
        cost = count_cost(net, inputs[name])
        milliseconds = 1e3 * float(np.median(timings.seconds[name]))
        found[name] = {"parameters": cost.params, "macs": cost.macs, "bytes": cost.bytes, "milliseconds": milliseconds}
    return found


def refutes(record: Mapping[str, Any]) -> bool:
    """Slower than before the co-design, or averages in the place of shifts are certainly faster and told as many digits right."""
    before = record["ratios"]["baseline"]["high"] < 1
    rival = record["ratios"].get("averages in the place of shifts", {"high": math.inf})["high"] < 1
    quality = record["quality"]
    return bool(before or (rival and quality["controls"]["rival"] >= quality["candidate"]))


@experiment(
    "efficient_dnns/codesign-speedup",
    points={
        "smoke": [{"batch": 64, "train": 384, "epochs": 1, "seeds": 3, "compiled": False}],
        "small": [{"batch": 64, "train": 1024, "epochs": 6, "seeds": 4, "compiled": True}],
        "full": [{"batch": 256, "train": 20000, "epochs": 30, "seeds": 5, "compiled": True}],
    },
    operator=BUILT,
    paper={
        "data": "ImageNet, 224 pixels",
        "device": "an FPGA, whose units are made for the network",
        "bits": "1 for weights, 4 for activations",
        "before": "others' accelerators at the same accuracy",
        "batch": 1,
    },
    departures={
        "data": "scikit-learn's digits, enlarged to 12 pixels at random places of 16 x 16: ImageNet comes with no package",
        "device": "this machine's processor",
        "bits": "float32 is timed, since a processor gains no time by few bits; what they cost in accuracy stands beside it",
        "before": "the very network whose depthwise convolutions were replaced: the step for which the network was designed anew",
        "batch": "64 or more images: single ones of 16 pixels time the interpreter",
    },
    guard=Guard(
        "accuracy on test digits at random places",
        0.03,
        higher_is_better=True,
        relative=False,
        without={"random": "which channel moves where is arbitrary in the paper too: a random deal is the method"},
    ),
    refuted_if="shifts are slower than what was before, or averages in their place are faster and tell as many digits right",
    refutes=refutes,
    measured_here="a forward pass over a batch of digits, on a processor",
    minutes=60,
)
def codesign_speedup(batch: int, train: int, epochs: int, seeds: int, compiled: bool) -> Trial:
    """A network of 1x1 convolutions, shifts and pooling against the same with depthwise 3x3 convolutions (ShuffleNetV2's units).

    Both in inference, float32, channels last, batch norms folded, with first weights, which time does not depend on. Candidate, baseline
    and rival are compiled (but for `smoke`): the baseline is what an expert would run, `free`. The margin is three points: without any
    mixing, neighbours meet in the maxima of pooling alone. The rival, a mean over 3x3 pixels, has no parameters either. Beside it stand
    both networks not compiled and, as in the shift paper, a residual network of 3x3 convolutions and the Shift-ResNet of as many
    parameters, to be held against each other. One-bit weights and four-bit activations are trained too. Details have the counts and
    the times of the papers' whole networks on a photograph.
    """
    images = drawn_digits("test", batch, 7)[0].contiguous(memory_format=torch.channels_last)
    rates = {arm: chosen(CODESIGN, arm) for arm in ARMS}
    plain: dict[str, Any] = {arm: fresh(arm) for arm in TIMED}
    fast = {arm: torch.compile(plain[arm]) if compiled else plain[arm] for arm in COMPILED}
    found: dict[str, list[float]] = {}

    def measured() -> dict[str, list[float]]:
        if not found:
            test = drawn_digits("test", 2000, 1_000_001)
            for arm in ARMS:
                found[arm] = [
                    accuracy(trained_net(arm, train, epochs, rates[arm].rate, seed), test) for seed in range(seeds)
                ]
        return found

    def quality() -> Quality:
        mean = {arm: float(np.mean(values)) for arm, values in measured().items()}
        gain = paired(found["shift"], found["before"])
        return Quality(
            mean["shift"],
            mean["before"],
            mean["before"] + gain.low,
            mean["before"] + gain.high,
            controls={
                "deleted": mean["none"],
                "rival": mean["average"],
                "one-bit weights and four-bit activations": mean["few bits"],
            },
            rival="averages over 3 x 3 pixels",
        )

    def trained() -> dict[str, Trained]:
        test = drawn_digits("test", 2000, 1_000_001)
        floor = nearest_mean(drawn_digits("train", train, 0), test)
        return {
            arm: Trained(measured()[arm], floor, "the nearest class mean", rate.rate, rate.rates, higher_is_better=True)
            for arm, rate in rates.items()
            if arm not in ("none", "average")  # these may well fail: they are what the method is held against
        }

    def details() -> dict[str, Any]:
        from assay.measure.cost import count_cost

        one = images[:1]
        counts = {arm: count_cost(net, one) for arm, net in plain.items()}
        return {
            "accuracy": measured(),
            "macs an image": {arm: cost.macs for arm, cost in counts.items()},
            "parameters": {arm: cost.params for arm, cost in counts.items()},
            "bytes moved an image": {arm: cost.bytes for arm, cost in counts.items()},
            **({"whole networks": whole_networks()} if compiled else {}),
        }

    return Trial(
        baseline=partial(forward, fast["before"], images),
        candidate=partial(forward, fast["shift"], images),
        arms={
            "before, not compiled": partial(forward, plain["before"], images),
            "shifts, not compiled": partial(forward, plain["shift"], images),
            "averages in the place of shifts": partial(forward, fast["average"], images),
            "ResNet of 3 x 3 convolutions, not compiled": partial(forward, plain["resnet"], images),
            "Shift-ResNet of as many parameters, not compiled": partial(forward, plain["shiftresnet"], images),
        },
        quality=quality,
        trained=trained,
        details=details,
    )

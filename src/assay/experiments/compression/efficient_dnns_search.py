"""Searches for a network over digits: by gradients (DNAS), by reinforcement, at random; what each costs, and how good what it finds is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from assay.experiments.compression.efficient_dnns_digits import accuracy, digits_of, logits_of, train
from assay.experiments.rates import searched
from assay.methods.compression.efficient_dnns import (
    CostTable,
    Space,
    SuperNet,
    counted_table,
    fbnet_loss,
    fbnet_space,
    measured_table,
    search,
)

Architecture = tuple[str, ...]

SEARCH = "efficient_dnns/search"
OPERATORS = ("k3_e1", "k3_e3", "k5_e3", "k3_e6", "skip")
BATCH = 64  # images of the tabled latency: on a single 8-pixel image all operators wait for the interpreter alike


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


@dataclass(frozen=True)
class Found:
    """What the searches of one seed found, and what they cost."""

    ours: Tried
    theirs: Tried
    largest: Tried
    fastest: Tried
    random: list[Tried]
    rival: Tried  # the best of as many random networks as DNAS's training would have paid for
    gain: float  # the logarithm of reinforcement's cost over DNAS's
    free: float  # the same over random search's
    spent: float  # DNAS's cost in random networks
    reached: bool  # reinforcement found a network as good


def of_seed(
    seed: int, table: CostTable, macs: CostTable, rates: dict[str, float], epochs: int, candidates: int,
    train_epochs: int, draws: int,
) -> Found:  # fmt: skip
    """All searches of one seed, whose networks are trained once each."""
    task = Task(space_of_digits(), table, macs, train_epochs, rates["network"], seed)
    ours, cost = by_gradients(task, epochs, draws, rates["super-net"])
    policy, drawn = by_reinforcement(task, candidates), at_random(task, candidates)
    paid = cost_in_order(policy, ours.chosen_by)
    each = sum(one.macs for one in drawn) / len(drawn)
    return Found(
        ours,
        best_of(policy),
        task.tried(task.largest(), rates["largest"]),
        task.tried(table.cheapest()),
        drawn,
        best_of(drawn[: max(1, int(cost / each))]),
        math.log(paid / cost),
        math.log(paid / cost_in_any_order(drawn, ours.chosen_by)),
        cost / each,
        best_of(policy).chosen_by <= ours.chosen_by,
    )


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

"""The ways that go step by step: the best step each time, beams, Monte Carlo tree search, and depth-first search with pruning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from assay import checks
from assay.methods.core.reasoning.trace import Trace
from assay.methods.reasoning.bag_of_tricks_ttc.asking import Asking, Outcome

PathScore = Literal["last", "max"]
PATH_SCORES: tuple[PathScore, ...] = ("last", "max")


def _outcome(asking: Asking, trace: Trace) -> Outcome:
    return Outcome(trace.text, asking.answer_of(trace.text))


def step_greedy(asking: Asking, n: int = 4, *, rounds: int = 20) -> Outcome:
    """Step-level best of N: of `n` next steps the best-scored is kept, until it finishes or `rounds` steps were taken."""
    return beam(asking, n, width=1, depth=rounds)


def beam(asking: Asking, n: int = 4, *, width: int = 2, depth: int = 8, path: PathScore = "last") -> Outcome:
    """Beam search: each of `width` beams is continued by `n` steps, the best `width` of all are kept, `depth` times.

    Finished beams are set aside and take up no room any more; the best of them is the answer, or the best unfinished one where there is
    none. A beam counts as much as its last step, or as its best one (`path` "max"; the released code intends both and compares by "max" in
    either case). Continuations that say the same are looked at once: the released code means to, and lets them pass.
    Raises ValueError for sizes below 1.
    """
    n, width = checks.whole("n", n, low=1), checks.whole("width", width, low=1)
    depth, path = checks.whole("depth", depth, low=1), checks.choice("path", path, PATH_SCORES)
    beams, done = [Trace(asking.prompt)], list[Trace]()
    kept = beams
    for _ in range(depth):
        found = [trace for own in asking.grown(beams, [n] * len(beams)) for trace in own]
        kept = sorted(found, key=lambda trace: -_worth(trace, path))[:width]
        done += [trace for trace in kept if trace.finished]
        beams = [trace for trace in kept if not trace.finished]
        if not beams or asking.budget.over:
            break
    return _outcome(asking, max(done or kept, key=lambda trace: _worth(trace, path)))


def _worth(trace: Trace, path: PathScore) -> float:
    return trace.score if path == "last" else max(trace.scores)


def depth_first(asking: Asking, n: int = 4, *, depth: int = 8, pruned: float = 0.4, paths: int = 3) -> Outcome:
    """Tree of thoughts, depth first: of `n` next steps the best share (1 - `pruned`, at least one) is visited, the best first.

    Stops with `paths` finished paths; no path is longer than `depth` steps. The path whose steps score most on average is the answer; where
    none finished, the best of the unfinished ones that went deepest. (The released code keeps one child more than it says, and visits
    the worst of them first.) Raises ValueError for sizes below 1 and a share outside [0, 1).
    """
    n, depth = checks.whole("n", n, low=1), checks.whole("depth", depth, low=1)
    pruned, paths = checks.number("pruned", pruned, low=0, below=1), checks.whole("paths", paths, low=1)
    stack, done, left = [Trace(asking.prompt)], list[Trace](), list[Trace]()
    while stack and len(done) < paths:
        trace = stack.pop()
        if trace.finished:
            done.append(trace)
        elif len(trace.steps) >= depth or (trace.steps and asking.budget.over):
            left.append(trace)
        else:
            (children,) = asking.grown([trace], [n])
            children.sort(key=lambda child: -child.score)
            keep = max(1, int((1 - pruned) * len(children) + 1e-9))
            stack += children[:keep][::-1]
    return _outcome(asking, max(done or left, key=lambda trace: (len(trace.steps) if not done else 0, _mean(trace))))


def _mean(trace: Trace) -> float:
    return sum(trace.scores) / len(trace.scores)


@dataclass
class Node:
    """A place in the tree: its trace, its children, and what went through it."""

    trace: Trace
    children: list[Node] = field(default_factory=list)
    visits: int = 0
    total: float = 0.0

    @property
    def value(self) -> float:
        """The mean of the scores that were handed up through it; before the first its own."""
        return self.total / self.visits if self.visits else self.trace.score


def mcts(
    asking: Asking,
    n: int = 4,
    *,
    simulations: int = 5,
    depth: int = 8,
    c_init: float = 1.25,
    c_base: float = 19652.0,
) -> Outcome:
    """Monte Carlo tree search whose values are the verifier's scores: no rollouts, and no priors.

    Before each move `simulations` walks go down by value + u, u = (c_init + ln((N + c_base + 1) / c_base)) sqrt(N) / (1 + n) for a child
    with n visits of a parent with N (c_init 0: no exploration), to a node that was not visited; its score is handed up to the node that
    is moved from, and then it is expanded by `n` next steps. The move goes to the most visited child, the higher value of equal ones; the
    tree below it is kept. Ends at a finished trace, at `depth`, or with the budget; an unfinished end is continued by the best children
    that are known already.

    So the visits of a node's children sum to one less than its own. A child that was not visited counts with its own score, which is
    known (our choice; 0 in the released code, which also hands up a random child's score, and none where a walk ends at a node that
    was visited). Raises ValueError for sizes below 1.
    """
    n, simulations = checks.whole("n", n, low=1), checks.whole("simulations", simulations, low=1)
    depth = checks.whole("depth", depth, low=1)
    c_init, c_base = checks.number("c_init", c_init, low=0), checks.number("c_base", c_base, above=0)
    at = Node(Trace(asking.prompt))
    visit([at])
    while not _ends(at, depth):
        for _ in range(simulations):
            if at.children and asking.budget.over:
                break
            simulate(asking, at, n, depth, c_init, c_base)
        at = max(at.children, key=lambda child: (child.visits, child.value, child.trace.score))
        if asking.budget.over:
            while at.children:
                at = max(at.children, key=lambda child: child.trace.score)
            break
    return _outcome(asking, at.trace)


def _ends(node: Node, depth: int) -> bool:
    return node.trace.finished or len(node.trace.steps) >= depth


def simulate(asking: Asking, root: Node, n: int, depth: int, c_init: float, c_base: float) -> list[Node]:
    """One walk from `root` to a node that was not visited or cannot be expanded; gives the nodes that it went through.

    A root without children is expanded first.
    """
    path = [root]
    if not root.children:
        _expand(asking, root, n)
    while path[-1].children:
        parent = path[-1]
        path.append(max(parent.children, key=lambda child: child.value + bonus(parent, child, c_init, c_base)))
        if not path[-1].visits:
            break
    new = not path[-1].visits
    visit(path)
    if new and not _ends(path[-1], depth) and not asking.budget.over:
        _expand(asking, path[-1], n)
    return path


def bonus(parent: Node, child: Node, c_init: float, c_base: float) -> float:
    """What exploring adds to a child's value; 0 where `c_init` is 0."""
    if not c_init:
        return 0.0
    return (c_init + math.log((parent.visits + c_base + 1) / c_base)) * math.sqrt(parent.visits) / (1 + child.visits)


def visit(path: Sequence[Node]) -> None:
    """Count a visit of every node of a path, and hand the score of its last one up."""
    for node in path:
        node.visits += 1
        node.total += path[-1].trace.score


def _expand(asking: Asking, node: Node, n: int) -> None:
    (found,) = asking.grown([node.trace], [n])
    node.children = [Node(trace) for trace in found]

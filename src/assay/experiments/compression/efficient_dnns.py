"""Efficient deep networks: does a differentiable search cost less than one by reinforcement, do the latencies of a table add up, and
what does it save to replace depthwise convolutions by shifts?

All on scikit-learn's handwritten digits, and on this machine's own latencies. That annotating with one click is 6.2 times faster was
measured with people; no experiment here stands for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from assay.experiments.compression.efficient_dnns_codesign import (
    ARMS,
    CODESIGN,
    COMPILED,
    TIMED,
    drawn_digits,
    fresh,
    judged,
    whole_networks,
)
from assay.experiments.compression.efficient_dnns_digits import digits_of, forward, nearest_mean
from assay.experiments.compression.efficient_dnns_search import (
    BATCH,
    SEARCH,
    Found,
    Tried,
    of_seed,
    space_of_digits,
    table_of_digits,
    typical,
)
from assay.experiments.core import Figure, Guard, Operator, Quality, Trained, Trial, experiment
from assay.experiments.mixers.training import in_parallel
from assay.experiments.rates import chosen
from assay.experiments.seeds import paired
from assay.measure.clock import compare_many
from assay.measure.stats import student_interval
from assay.methods.compression.efficient_dnns import CostTable, counted_table

# ----------------------------------------------------------------------------------- the search: how much it costs, what it finds

SEARCHING = Operator(
    "architecture search",
    free="random search: networks drawn at random, trained alike until one is as good",
)


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
    each = {arm: rate.rate for arm, rate in rates.items()}
    runs = [(seed, table, macs, each, epochs, candidates, train_epochs, draws) for seed in range(seeds)]
    found: list[Found] = in_parallel(of_seed, runs)
    ours, theirs = [one.ours for one in found], [one.theirs for one in found]
    largest, random = [one.largest for one in found], [tried for one in found for tried in one.random]
    gain = student_interval([one.gain for one in found])
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
        free=math.exp(float(np.mean([one.free for one in found]))),
        quality=Quality(
            typical(ours),
            base,
            base * math.exp(share.low),
            base * math.exp(share.high),
            controls={
                "deleted": typical(largest),
                "random": typical(random),
                "rival": typical([one.rival for one in found]),
                "the fastest network": typical([one.fastest for one in found]),
            },
            rival="the best of as many random networks as DNAS's training would have paid for, at most of those tried",
        ),
        trained={
            "DNAS": trained(ours, "network"),
            "reinforcement": trained(theirs, "network"),
            "random": trained([one.rival for one in found], "network"),
            "largest": trained(largest, "largest"),
        },
        details={
            "networks that the search's training would have paid for": [one.spent for one in found],
            "reinforcement got there": [one.reached for one in found],
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

BUILT = Operator(
    "a small network for images",
    free="the network before the co-design (ShuffleNetV2's units with depthwise convolutions), compiled with Inductor",
)


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
            runs = [(arm, train, epochs, rates[arm].rate, seed) for arm in ARMS for seed in range(seeds)]
            for (arm, *_), share in zip(runs, in_parallel(judged, runs), strict=True):
                found.setdefault(arm, []).append(share)
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

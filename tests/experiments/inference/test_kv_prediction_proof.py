"""The experiments of KV Prediction: what is judged, that rivals cost no more, and that a broken predictor is noticed."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from tests.properties.sabotage import PAYS, record_of, verdict_of

from assay.evidence.types import Verdict
from assay.evidence.verdict import judge, remarks
from assay.experiments import experiments_of, rates
from assay.experiments.core import CONTROLS
from assay.experiments.inference import kv_prediction as room
from assay.experiments.inference import language
from assay.experiments.inference.kv_prediction import arms, far
from assay.experiments.mixers import training
from assay.experiments.rates import Rate
from assay.methods.inference.kv_prediction import KVPredictor, prompt_cost

CLAIMS = {"lp": "kv_prediction/ttft-lp050", "c": "kv_prediction/ttft-c270"}
MARGINS = {found.claim: found.guard.margin for found in experiments_of("kv_prediction")}


@pytest.fixture
def at_once(monkeypatch, tmp_path):
    """Three seeds in this process, rates as if searched, weights kept nowhere else."""
    monkeypatch.setattr(arms, "chosen", lambda name, arm: Rate(1e-2, (3e-3, 1e-2, 3e-2)))
    monkeypatch.setattr(arms, "in_parallel", lambda function, runs: [function(*run) for run in runs])
    monkeypatch.setattr(arms, "SEEDS", (0, 1, 2))
    monkeypatch.setenv("ASSAY_CACHE_DIR", str(tmp_path))


def point(task):
    return {"model": room.WORDS, "batch": 2, "tokens": 16, "task": task}


def test_experiments_load():
    assert set(MARGINS) == set(CLAIMS.values())


# ----------------------------------------------------------------------------------------------------------- what is judged


def test_the_beginning_comes_again_and_then_the_code_goes_on():
    task = {**room.TASK, "apart": 6, "again": 4, "cue": 1, "fresh": 3}
    found, ids = far.windows("heldout", task, 3), far.ids_of("heldout")
    assert (found.prompts.shape, found.texts.shape, found.copied) == ((3, 7), (3, 6), 3)
    for row, text in zip(found.prompts, found.texts, strict=True):
        whole = torch.cat([row, text])
        assert whole[6:10].tolist() == whole[:4].tolist()
        code = torch.cat([whole[:6], whole[10:]])
        assert (ids.unfold(0, 9, 1) == code).all(1).any()
    inputs, targets = next(far.batches(task, 0))
    assert inputs.shape == (task["batch"], 12)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal(inputs[:, 6:10], inputs[:, :4])
    with pytest.raises(ValueError, match="n must be at most"):
        far.windows("heldout", task, 10**6)


def seen_in(text, rows):
    """Which of (n, words) rows stand somewhere in a text (words,): by a hash of all places, which finds no fewer."""
    n = rows.shape[1]
    weights = torch.randint(-(2**62), 2**62, (n,), generator=torch.Generator().manual_seed(0))
    places = sum(text[word : len(text) - n + 1 + word] * weight for word, weight in enumerate(weights.tolist()))
    return torch.isin((rows * weights).sum(1), places)


def test_text_that_is_judged_was_not_trained_on():
    """No window's words of the code, all together, stand anywhere in the other two parts, at any place."""
    length = room.TASK["apart"] + room.TASK["fresh"]
    text = far.ids_of("heldout")
    there = text.unfold(0, length, 1)[[0, 7, 1001]]
    assert seen_in(text, there).all()
    assert not seen_in(text, there.flip(1)).any()
    judged = arms.heldout(room.TASK)
    code = torch.cat([judged.prompts[:, : room.TASK["apart"]], judged.texts[:, judged.copied :]], 1)
    assert code.shape == (len(arms.SEEDS) * room.TASK["windows"], length)
    assert seen_in(text, code).all()
    for part in ("prompts", "calibration"):
        assert seen_in(far.ids_of(part), code).double().mean() < 0.01


def test_each_seed_is_judged_by_windows_of_its_own():
    rows = [arms.judged_by(seed, room.TASK) for seed in arms.SEEDS]
    assert {len(found) for found in rows} == {room.TASK["windows"]}
    seen = torch.cat([torch.cat([found.prompts, found.texts], 1) for found in rows])
    assert len(seen.unique(dim=0)) == len(seen)


@torch.no_grad()
def test_judged_words_cost_what_the_model_itself_says():
    base, judged = arms.large(room.SMOKE, 0).eval(), far.windows("heldout", room.SMOKE, 5)
    ids, tokens = torch.cat([judged.prompts, judged.texts], 1), judged.prompts.shape[1]
    kept = [2, 5, 7, tokens - 1]
    seen = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    for shown, hidden in (
        (None, []),
        (torch.tensor([kept]).expand(5, -1), [p for p in range(tokens) if p not in kept]),
    ):
        mask = seen.clone()
        mask[:, hidden] = False
        mask |= torch.eye(len(mask), dtype=torch.bool)
        logits = base(input_ids=ids, attention_mask=mask.expand(5, 1, -1, -1), use_cache=False).logits
        expected = F.cross_entropy(logits[:, tokens - 1 : -1].transpose(1, 2), judged.texts, reduction="none").mean(0)
        torch.testing.assert_close(arms.after(base, judged, shown, batch=2).float(), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_tokens_attended_to_least_are_hidden_from_later_layers(monkeypatch):
    base, judged = arms.large(room.SMOKE, 0).eval(), far.windows("heldout", room.SMOKE, 5)
    tokens, whole = judged.prompts.shape[1], arms.after(base, judged)
    torch.testing.assert_close(arms.lazily(base, judged, tokens, 1, batch=2), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(arms.lazily(base, judged, 3, 4, batch=2), whole, rtol=1e-4, atol=1e-4)
    seen = arms._attended(base, judged.prompts, 0)
    torch.testing.assert_close(seen.sum(1), torch.ones(5), rtol=1e-4, atol=1e-4)
    assert base.config._attn_implementation == "sdpa"
    top = torch.cat([seen[:, :-1].topk(4).indices.sort().values, torch.full((5, 1), tokens - 1)], 1)
    monkeypatch.setattr(arms, "_attended", lambda base, prompts, layer: seen.clone())
    expected = arms.after(base, judged, top)
    torch.testing.assert_close(arms.lazily(base, judged, 5, 0), expected, rtol=1e-4, atol=1e-4)
    assert (expected - whole).abs().max() > 1e-3


# ------------------------------------------------------------------------------------------------------- what it costs


@pytest.mark.parametrize("kind", arms.KINDS)
def test_pruned_prompts_cost_no_more_than_a_prediction(kind):
    predictor, _ = room.timed(kind, room.WORDS)
    whole = prompt_cost(predictor, 64)
    n = arms.affordable(predictor, 64)
    budget = whole.auxiliary + whole.predictor + whole.step
    assert prompt_cost(predictor, n).base <= budget < prompt_cost(predictor, n + 1).base
    few, head = arms.lazily_affordable(predictor, 64, 1), far.VOCABULARY * predictor.config.hidden_size

    def cost(m):
        return (whole.base - head) / 4 + (prompt_cost(predictor, m).base - head) * 3 / 4 + head

    assert budget < cost(few + 1)
    assert few == 1 or cost(few) <= budget  # 1: the first layer's reading alone costs about as much


def test_the_auxiliaries_of_both_kinds_are_what_the_paper_makes_of_the_base():
    def body(model):
        return sum(p.numel() for p in model.model.layers.parameters())

    assert body(arms.large(room.TASK, 0)) / body(arms.small(room.TASK, 0)) == pytest.approx(4.4, abs=0.1)
    assert body(arms.large(room.LARGE, 0)) / body(arms.small(room.LARGE, 0)) == pytest.approx(4.4, abs=0.1)
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3
    )
    with torch.device("meta"):
        smollm2 = body(LlamaForCausalLM(shape))
    sibling = body(room.small_llama(**room.SIBLING))
    assert smollm2 / sibling == pytest.approx(4.4, abs=0.15)
    lp, _ = room.timed("lp", room.WORDS)
    assert body(lp.base) == 2 * body(lp.auxiliary)


# --------------------------------------------------------------------------------------------------- what would refute


LOSSES = {
    "base on": 4.0,
    "predicted": 4.1,
    "constant": 6.0,
    "no prompt": 5.8,
    "random": 7.0,
    "alone": 4.2,
    "last tokens": 5.0,
    "random tokens": 5.0,
    "attended tokens": 5.0,
}


def record(unsure="", **changed):
    """What `refutes` reads of a record, of three seeds that agree but about the arm that is `unsure`."""
    losses = {**LOSSES, **changed}
    nats = {arm: {"all": [value - 0.01, value, value + 0.01]} for arm, value in losses.items()}
    if unsure:
        nats[unsure]["all"] = [losses[unsure] - 1, losses[unsure], losses[unsure] + 1]
    found = arms.quality_of(arms.losses_of(nats))
    return {"quality": {"baseline": found.baseline, "low": found.low, "margin": 0.05}, "details": {"nats": nats}}


def test_a_rival_that_does_as_well_refutes_unless_quality_is_lost_anyway():
    assert not arms.refutes(record())
    for name in arms.RIVALS:
        assert arms.refutes(record(**{name: 3.9}))
        assert arms.refutes(record(**{name: 4.1}))
        assert not arms.refutes(record(unsure=name, **{name: 3.9}))
        assert not arms.refutes(record(**{name: 3.9}, predicted=4.4))


@pytest.mark.parametrize("name", arms.UNKNOWING)
def test_knowing_nothing_of_the_prompt_refutes(name):
    least = min(LOSSES[arm] for arm in arms.UNKNOWING)
    assert not arms.refutes(record(predicted=least - 0.1))
    assert arms.refutes(record(**{name: 5.5}, predicted=5.6))
    assert not arms.refutes(record(unsure=name, **{name: 5.5}, predicted=5.6))


def test_the_search_shows_that_what_is_judged_depends_on_the_prompt():
    """The losses of the search, where nothing was resampled: keys and values learnt without the prompt lose more than may be lost, and so
    does the loss of the caches left out."""
    known = json.loads(rates.FILE.read_text(encoding="utf-8"))
    best = {}
    for name in (arms.BASES, arms.LP, arms.C, arms.CONSTANT):
        grid = known[name]["grid"]
        for arm, found in known[name]["arms"].items():
            assert grid[0] < found["rate"] < grid[-1], f"the best rate of {arm} is at the edge"
            best[arm] = found["losses"][f"{found['rate']:g}"]
    for margin in MARGINS.values():
        assert best["constant"] - best["base on"] > margin * best["base on"]
    for kind in arms.KINDS:
        assert best["constant"] - best[f"predicted {kind}"] > MARGINS[CLAIMS[kind]] * best["base on"]
    assert best["no consistency lp"] > best["predicted lp"]


# ------------------------------------------------------------------------------------------------------------- sabotage


def test_every_arm_is_judged_and_the_rivals_are_named(at_once):
    """All arms, trained for a moment: the record has each, and nothing pays that was hardly trained."""
    record = record_of(CLAIMS["lp"], point({**room.SMOKE, "base_steps": 3, "steps": 2, "windows": 6}))
    assert set(record.quality.controls) == {
        "deleted", "random", "rival", *arms.RIVALS[1:], "no prompt", "no consistency", "shuffled layers",
    }  # fmt: skip
    assert set(record.trained) == {"base", "base on", "predicted", "alone"}
    assert record.details["reduction"]["macs"] > 1
    assert set(record.details["nats fewer than what costs no more"]) == set(arms.RIVALS)
    assert len(record.details["nats"]["predicted, 4 times the steps"]["all"]) == 3
    assert judge(record).verdict not in PAYS
    named = {"rival": record.quality.rival}
    controls = {named.get(arm, arm): nats for arm, nats in record.quality.controls.items() if arm not in CONTROLS[:2]}
    better = {arm for arm, nats in controls.items() if nats <= record.quality.candidate}
    assert better
    assert {arm for arm in controls if any(text.startswith(f"{arm} keeps") for text in remarks(record))} == better


KEYS, EACH, PAIRS = 8, 4, 8
SYMBOL = KEYS  # words below are keys, those from here on symbols, four of each key


def pairs(rows, seed):
    """Rows of words: a symbol for each of eight keys, then keys by chance, each with its symbol."""
    draw = torch.Generator().manual_seed(seed)
    head = SYMBOL + EACH * torch.arange(KEYS) + torch.randint(EACH, (rows, KEYS), generator=draw)
    keys = torch.randint(KEYS, (rows, PAIRS), generator=draw)
    return torch.cat([head, torch.stack([keys, head.gather(1, keys)], 2).flatten(1)], 1)


def toy_windows(part, task, n):
    """Prompts that end with the first key, whose symbol stands in them as those of all further keys do."""
    rows = pairs(n, 10**6)
    return far.Windows(rows[:, : KEYS + 1], rows[:, KEYS + 1 :], 1)


def toy_batches(task, seed):
    while True:
        seed += 1
        rows = pairs(task["batch"], seed)
        yield rows[:, :-1], rows[:, 1:]


@pytest.fixture(scope="module")
def looking_up():
    """A base of two layers that has learnt to look up symbols."""
    model = arms.language_model(32, 2, 0)
    training.train(model, toy_batches({"batch": 32}, 0), steps=200, lr=1e-2)
    return model.eval()


@pytest.fixture
def toy(at_once, monkeypatch, looking_up):
    """The experiment on that base: the prediction is by the base itself, so nothing is lost, and what costs no more is a base
    that is less sure, and prompts of a few words."""

    def alone(kind, task, seed):
        model = copy.deepcopy(looking_up)
        with torch.no_grad():
            model.model.norm.weight.mul_(0.85)
        return model

    def predicted(kind, task, seed, rate=None, *, consistency=1.0):
        model = KVPredictor.from_base(copy.deepcopy(looking_up), auxiliary=copy.deepcopy(looking_up))
        model.predictor.identity_()
        return model.eval()

    def floor(judged):
        table = language.bigram_table(pairs(2000, 1).flatten(), far.VOCABULARY)
        before = torch.cat([judged.prompts[:, -1:], judged.texts[:, :-1]], 1)
        return float(-table[before, judged.texts].mean())

    lazily = arms.lazily
    for name, value in {
        "base_of": lambda task, seed, rate=None: copy.deepcopy(looking_up),
        "base_on": lambda task, seed, rate=None: looking_up,
        "alone_of": alone,
        "predictor_of": predicted,
        "affordable": lambda model, tokens: 3,
        "lazily_affordable": lambda model, tokens, full: 3,
        "lazily": lambda base, judged, kept, full: lazily(base, judged, kept, 0),
    }.items():
        monkeypatch.setattr(arms, name, value)
    for name, value in {"windows": toy_windows, "batches": toy_batches, "bigram_floor": floor}.items():
        monkeypatch.setattr(far, name, value)


TOY = point({**room.SMOKE, "layers": 2, "steps": 4, "windows": 32})


def is_constant(kind, task, seed, rate=None, *, consistency=1.0):
    return arms.constant_of(task, seed)


def random_maps(model):
    model.predictor.reset_parameters()
    return model


@pytest.mark.parametrize("kind", arms.KINDS)
def test_a_prediction_that_loses_nothing_pays(toy, kind):
    record = record_of(CLAIMS[kind], TOY)
    assert judge(record).verdict in PAYS, judge(record).reason


@pytest.mark.parametrize("broken", ["constant", "for other layers", "random maps"])
def test_a_broken_prediction_is_noticed(toy, monkeypatch, broken):
    own = arms.predictor_of
    change = {"for other layers": arms.shuffled, "random maps": random_maps}.get(broken)
    monkeypatch.setattr(
        arms, "predictor_of", is_constant if change is None else lambda *args, **how: change(own(*args, **how))
    )
    record = record_of(CLAIMS["lp"], TOY)
    assert judge(record).verdict not in PAYS
    assert record.refuted or arms.certainly_lost(record.quality.model_dump())


@torch.no_grad()
def test_the_prediction_may_be_compiled_too(monkeypatch):
    """The same parts of both models as of the base that it is timed against, in a copy."""
    compiled = []

    def noted(forward, *, dynamic):
        compiled.append(forward.__self__)
        return forward

    predictor, _ = room.timed("c", room.WORDS)
    monkeypatch.setattr(torch, "compile", noted)
    monkeypatch.setattr(room, "timed", lambda kind, model: (predictor, "a tokenizer"))
    monkeypatch.setattr(room, "prompts_of", lambda tokenizer, batch, tokens: far.ids_of("heldout")[:32].view(2, 16))
    trial = room.trial("c", "a model", 2, 16, room.SMOKE)
    theirs = {id(module) for module in predictor.modules()}
    layers = len(predictor.base.model.layers) + len(predictor.auxiliary.model.layers)
    assert len(compiled) == 3 * layers
    assert not theirs & {id(module) for module in compiled}
    assert torch.equal(trial.arms["the prediction, its MLPs and norms compiled"](), trial.candidate())
    assert torch.equal(trial.free(), trial.baseline())


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", arms.KINDS)
def test_a_predictor_that_predicts_nothing_or_for_other_layers_is_noticed(monkeypatch, kind):
    """All arms as at `small`, trained or found on disk; then the learnt mean, or what is for other layers, stands for the prediction."""
    monkeypatch.setattr(arms, "in_parallel", lambda function, runs: [function(*run) for run in runs])
    own = arms.predictor_of
    honest = verdict_of(CLAIMS[kind], point(room.TASK))
    assert honest in (*PAYS, Verdict.DOES_NOT_PAY)

    def shuffled(*args, **settings):
        return arms.shuffled(own(*args, **settings))

    for broken in (is_constant, shuffled):
        monkeypatch.setattr(arms, "predictor_of", broken)
        assert verdict_of(CLAIMS[kind], point(room.TASK)) not in (*PAYS, honest), broken.__name__

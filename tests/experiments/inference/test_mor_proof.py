"""The experiments of Mixture-of-Recursions notice when its tokens are mixed up, when nothing is saved, and when a control does as well."""

from __future__ import annotations

import pytest
import torch
from tests.properties.sabotage import PAYS, record_of, verdict_of

from assay.evidence.types import Verdict
from assay.experiments import experiments_of
from assay.experiments.inference import mor as room
from assay.experiments.rates import Rate
from assay.methods.inference import mor as method
from assay.methods.inference.mor.tokens import Tokens

TINY = {"width": 32, "layers": 4, "recursions": 2, "steps": 120, "length": 64, "batch": 8}
FLOPS = {"recipe": TINY}
MEMORY = {"width": 32, "layers": 4, "batch": 2, "length": 32, "repeats": 2, "recipe": TINY}
SPEED = {"lanes": 3, "requests": 6, "prompt": 4, "tokens": 3, "recipe": TINY}
WORSE = {
    "one recursion": 1.05,
    "random routing": 1.04,
    "shallow": 1.01,
}  # the other arms' losses over the honest one, given


@pytest.fixture(scope="module", autouse=True)
def _rates():
    """A rate and a floor of this size, given: the searched ones are of another, and models so small do not beat a bigram table."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "chosen", lambda name, arm: Rate(2e-2, (1e-2, 2e-2, 4e-2)))
        patch.setattr(room.language, "bigram_floor", lambda inputs, targets: 3.6)
        yield


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """A model that was really trained, once, and judged: three seeds stand for it, a little apart."""
    torch.set_num_threads(1)
    return [room.evaluated(room.model_of("mor", 0, TINY), TINY)] * len(room.SEEDS)


@pytest.fixture(scope="module")
def broken(honest):
    """The same model, where what a recursion made of its tokens goes to their neighbours."""
    put = Tokens.put
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tokens, "put", lambda self, x, new: put(self, x, new.roll(1, 1)))
        return [room.evaluated(room.model_of("mor", 0, TINY), TINY)] * len(room.SEEDS)


def given(monkeypatch, honest, found, **changes):
    """Scores in which Mixture-of-Recursions's are `found`, and the others' follow from the honest ones."""
    base = honest[0]["nll"]
    losses = {arm: base * {**WORSE, **changes}.get(arm, 1.002) for arm in room.ARMS}
    table = {arm: [{"nll": loss + d, "steps": 1.0} for d in (0, 1e-3, 2e-3)] for arm, loss in losses.items()}
    table["mor"] = [{**score, "nll": score["nll"] + d} for score, d in zip(found, (0, 1.1e-3, 2e-3), strict=True)]
    monkeypatch.setattr(room, "scores", lambda arms, recipe: {arm: table[arm] for arm in arms})


def memory(monkeypatch, share):
    """Peaks of processes, given: a share of the vanilla model's; recomputing saves less here."""
    parts = {"vanilla": 1.0, "mor": share, "recomputed": 0.95, "recursive": share, "shallow": 0.9}
    monkeypatch.setattr(room, "peak_of", lambda way, sizes: int(1e9 * parts[way]))


def test_experiments_load():
    found = {e.claim: e for e in experiments_of("mor")}
    assert set(found) == {"mor/inference-throughput", "mor/training-flops", "mor/peak-memory"}
    assert all(e.decides["small"] == e.points["small"][0] for e in found.values())


def test_operations_saved_by_a_model_that_mixes_up_its_tokens_are_noticed(monkeypatch, honest, broken):
    given(monkeypatch, honest, honest)
    assert verdict_of("mor/training-flops", FLOPS) in PAYS
    given(monkeypatch, honest, broken)
    assert verdict_of("mor/training-flops", FLOPS) is Verdict.DOES_NOT_PAY


def test_operations_that_are_not_saved_are_noticed(monkeypatch, honest):
    """All tokens in all recursions: the counter sees it."""
    given(monkeypatch, honest, honest)
    room._training_macs.cache_clear()
    monkeypatch.setattr(method.MoRConfig, "shares", property(lambda self: [1.0] * self.recursions))
    found = record_of("mor/training-flops", FLOPS)
    room._training_macs.cache_clear()
    assert found.measured.median <= 0
    assert verdict_of("mor/training-flops", FLOPS) not in PAYS
    room._training_macs.cache_clear()


def test_random_routing_that_does_as_well_is_noticed(monkeypatch, honest):
    given(monkeypatch, honest, honest, **{"random routing": 1.003})
    assert verdict_of("mor/training-flops", FLOPS) is Verdict.QUALITY_NOT_SHOWN


def test_an_arm_at_its_floor_voids_the_comparison(monkeypatch, honest):
    given(monkeypatch, honest, honest, shallow=1.5)
    assert verdict_of("mor/training-flops", FLOPS) is Verdict.UNDECIDED


def test_memory_saved_by_a_model_that_mixes_up_its_tokens_is_noticed(monkeypatch, honest, broken):
    memory(monkeypatch, 0.75)
    given(monkeypatch, honest, honest)
    assert verdict_of("mor/peak-memory", MEMORY) in PAYS
    given(monkeypatch, honest, broken)
    assert verdict_of("mor/peak-memory", MEMORY) is Verdict.DOES_NOT_PAY


def test_memory_that_recomputing_saves_too_is_noticed(monkeypatch, honest):
    given(monkeypatch, honest, honest)
    memory(monkeypatch, 0.96)
    assert verdict_of("mor/peak-memory", MEMORY) is Verdict.DOES_NOT_PAY


def test_fast_generation_that_mixes_up_its_tokens_is_noticed(monkeypatch, honest, broken):
    given(monkeypatch, honest, honest)
    assert verdict_of("mor/inference-throughput", SPEED) in PAYS
    given(monkeypatch, honest, broken)
    assert verdict_of("mor/inference-throughput", SPEED) is Verdict.DOES_NOT_PAY


@torch.no_grad()
def test_all_arms_of_generation_answer_the_same_requests():
    """The vanilla model in lanes and in the compiled loop; Mixture-of-Recursions with and without depth-wise batching."""
    vanilla, ours = (room.language_model(kind, TINY, 0).eval() for kind in ("vanilla", "mor"))
    for model in (vanilla, ours):  # wide enough for greedy choices without ties
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    plain = method.MoRForCausalLM.from_base(vanilla, recursions=1, router="none")
    asked = room.prompts_of(5, 4)
    decoder = room.Decoder(vanilla, weights="fp32", cache="float32")
    assert method.generate_depthwise(plain, asked, 4, lanes=2).tokens == room.by_loop(decoder, asked, 4, 2)
    assert method.generate_depthwise(ours, asked, 4, lanes=2).tokens == room.step_by_step(ours, asked, 4, 2)


def test_random_scores_keep_their_share():
    scores = room.RandomScores(0.7)(torch.zeros(1, 20000, 3))
    assert scores.shape == (1, 20000, 1)
    assert float((scores > 0).float().mean()) == pytest.approx(0.7, abs=0.02)


def test_saving_of_the_papers_model_by_the_formula():
    assert 20 < room.saved_at_360m() < 25

"""The experiments of Mixture-of-Recursions notice when its tokens are mixed up, when nothing is saved, and when a control does as well.

Losses are real: of a model trained here, or those that the search of learning rates saw at the size of `small`, where each arm was trained
once; that loss stands for all three seeds.
"""

from __future__ import annotations

import json

import pytest
import torch
from tests.properties.sabotage import PAYS, record_of, verdict_of

from assay.evidence.types import Verdict
from assay.evidence.verdict import judge, remarks
from assay.experiments import experiments_of
from assay.experiments.inference import mor as room
from assay.experiments.rates import FILE, Rate, chosen
from assay.methods.inference import mor as method
from assay.methods.inference.mor.tokens import Tokens

TINY = {**room.SMOKE, "steps": 120}
MEMORY = {"width": 32, "layers": 4, "batch": 2, "length": 32, "repeats": 2, "recipe": TINY}
SPEED = {"lanes": 3, "requests": 6, "prompt": 4, "tokens": 3, "recipe": TINY}


def searched() -> dict[str, float]:
    """The loss of each arm at its chosen rate."""
    arms = json.loads(FILE.read_text(encoding="utf-8"))[room.SEARCH]["arms"]
    return {arm: min(value for value in found["losses"].values() if value) for arm, found in arms.items()}


def given(monkeypatch, **others):
    """The search's losses as scores, where an arm may have those of another."""
    losses = searched()
    table = {arm: [{"nll": losses[others.get(arm.replace(" ", "_"), arm)]}] * 3 for arm in room.ARMS}
    monkeypatch.setattr(room, "scores", lambda recipe: table)


@pytest.fixture
def granted(monkeypatch):
    """What is not quality: half of the memory is saved, and models need no training to be timed."""
    grant_memory(monkeypatch, recomputed=0.9)
    monkeypatch.setattr(room, "model_of", lambda arm, seed, recipe: room.language_model(arm, recipe, seed).eval())


def grant_memory(monkeypatch, recomputed):
    shares = {"vanilla": 1.0, "mor": 0.5, "vanilla, recomputed": recomputed}
    monkeypatch.setattr(room, "peak_of", lambda way, sizes: int(1e9 * shares[way]))


def test_experiments_load():
    found = {e.claim: e for e in experiments_of("mor")}
    assert set(found) == {"mor/inference-throughput", "mor/training-flops", "mor/peak-memory"}
    assert all(e.decides["small"] == e.points["small"][0] for e in found.values())
    assert found["mor/training-flops"].computed


def test_every_arm_was_searched_inside_its_grid():
    for arm in room.ARMS:
        found = chosen(room.SEARCH, arm)
        assert found.rates[0] < found.rate < found.rates[-1], arm


@pytest.mark.parametrize("recipe", [room.SMOKE, room.RECIPE])
def test_the_shallow_model_does_as_many_operations(recipe):
    """With fewer layers than the vanilla model."""
    ours, shallow = (room.training_macs(arm, recipe) for arm in ("mor", "shallow"))
    assert shallow == pytest.approx(ours, rel=0.03)
    assert room.language_model("shallow", recipe, 0).config.num_hidden_layers < recipe["layers"]


# ---- operations


def test_a_counted_training_step_saves_what_the_formula_says(monkeypatch):
    """On the vanilla model and on Mixture-of-Recursions, forward and backward; where all tokens take all recursions, nothing is saved."""
    room._training_macs.cache_clear()

    def counted():
        return 1 - room.training_macs("mor", TINY) / room.training_macs("vanilla", TINY)

    def formula():
        macs = []
        for arm in ("mor", "vanilla"):
            model = room.language_model(arm, TINY, 0)
            if arm == "vanilla":
                model = method.MoRForCausalLM.from_base(model, recursions=1, router="none")
            macs.append(method.forward_macs(model.config, TINY["length"]))
        return 1 - macs[0] / macs[1]

    assert counted() == pytest.approx(formula(), abs=0.01)
    assert counted() > 0.1
    assert 20 < room.saved_at_360m("mor") < 25
    monkeypatch.setattr(method.MoRConfig, "shares", property(lambda self: [1.0] * self.recursions))
    room._training_macs.cache_clear()
    assert counted() == pytest.approx(formula(), abs=0.01)
    assert counted() <= 0
    assert room.saved_at_360m("mor") <= 0
    room._training_macs.cache_clear()


def test_the_figure_of_operations_is_computed(monkeypatch):
    given(monkeypatch)
    found = record_of("mor/training-flops", {"recipe": TINY})
    assert judge(found).verdict is Verdict.COMPUTED
    assert found.measured.median == room.saved_at_360m("mor")
    assert found.details["counted_saving_percent"]["mor"] > 10
    assert {"deleted", "random", "rival"} <= set(found.quality.controls)


# ---- quality


def test_the_search_tells_the_controls_from_the_vanilla_model():
    """All lose more than may be lost."""
    losses = searched()
    least = losses["vanilla"] * (1 + room.GUARD.margin)
    for name, arm in room.CONTROLS.items():
        assert losses[arm] > least, name


def test_the_search_does_not_tell_the_router_from_a_draw():
    """What routers learn to choose is worth less than the margin here, and the stored layers, run once, do better than with them."""
    losses = searched()
    assert abs(losses["random routing"] - losses["mor"]) < room.GUARD.margin * losses["mor"]
    assert losses["one recursion"] < losses["mor"]


def test_the_deletion_that_does_better_stands_in_every_row(monkeypatch, granted):
    """With the search's losses: the stored layers run once save more than Mixture-of-Recursions does, and lose less."""
    given(monkeypatch)
    monkeypatch.setattr(room, "peak_of", lambda way, sizes: int(1e9 * {"vanilla": 1.0, "mor": 0.8}.get(way, 0.6)))
    operations = record_of("mor/training-flops", {"recipe": TINY})
    memory = record_of("mor/peak-memory", {**MEMORY, "repeats": 3})
    speed = record_of("mor/inference-throughput", SPEED)
    for record in (operations, memory, speed):
        assert any(remark.startswith("the method deleted keeps as much quality") for remark in remarks(record))
    assert any(remark.startswith("one recursion does better (41.") for remark in remarks(operations))
    assert "one recursion does better (40%)" in remarks(memory)
    assert {"one recursion", "random routing"} <= set(speed.ratios)


def test_arms_of_fewer_seeds_are_held_against_the_vanilla_model_under_the_same_ones():
    found = {arm: [{"nll": loss} for loss in (2.0, 2.0, 2.0)] for arm in room.ARMS}
    for arm in ("vanilla", *room.CONTROLS.values()):
        found[arm] = [{"nll": loss} for loss in (2.0, 2.0, 2.0, 4.0, 4.0)]
    found["mor"] = [{"nll": loss + 0.1} for loss in (2.0, 2.0, 2.0, 4.0, 4.0)]
    seen = room.quality_of(found)
    assert seen.baseline == pytest.approx(2.8)
    assert seen.candidate == pytest.approx(2.9)
    assert seen.controls == {name: pytest.approx(2.8) for name in seen.controls}
    assert {"recursive", "gate only", "fewer steps", "deleted", "random", "rival"} == set(seen.controls)


@pytest.mark.parametrize(("claim", "point"), [("mor/peak-memory", MEMORY), ("mor/inference-throughput", SPEED)])
def test_the_verdict_follows_the_quality(monkeypatch, granted, claim, point):
    """It would pay if it were as good as the vanilla model; it does not as it is, nor deleted, nor with a random choice."""
    given(monkeypatch, mor="vanilla")
    assert verdict_of(claim, point) in PAYS
    for ours in ("mor", "one recursion", "random routing"):
        given(monkeypatch, mor=ours)
        assert verdict_of(claim, point) is Verdict.DOES_NOT_PAY
    given(monkeypatch, mor="vanilla", one_recursion="vanilla")
    assert verdict_of(claim, point) is Verdict.QUALITY_NOT_SHOWN
    given(monkeypatch, mor="vanilla", random_routing="vanilla")
    assert verdict_of(claim, point) is Verdict.QUALITY_NOT_SHOWN


@pytest.fixture(scope="module")
def trained():
    """Mixture-of-Recursions, really trained, small."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "chosen", lambda name, arm: Rate(1e-2, (3e-3, 1e-2, 3e-2)))
        return room.model_of("mor", 0, TINY)


def test_tokens_that_are_mixed_up_cost_more_than_the_margin(monkeypatch, trained):
    honest = room.evaluated(trained, TINY)
    put = Tokens.put
    monkeypatch.setattr(Tokens, "put", lambda self, x, new: put(self, x, new.roll(1, 1)))
    broken = room.evaluated(trained, TINY)
    assert broken["nll"] > honest["nll"] * (1 + 2 * room.GUARD.margin)


# ---- memory


def test_memory_that_recomputing_saves_too_is_noticed(monkeypatch, granted):
    given(monkeypatch, mor="vanilla")
    grant_memory(monkeypatch, recomputed=0.4)
    assert verdict_of("mor/peak-memory", MEMORY) is Verdict.DOES_NOT_PAY


@pytest.mark.slow  # a process imports torch for every figure
def test_memory_that_is_not_saved_is_noticed(monkeypatch):
    """Really measured; then a vanilla model takes the place of Mixture-of-Recursions."""
    given(monkeypatch, mor="vanilla")
    point = {**MEMORY, "width": 256, "layers": 10, "batch": 2, "length": 64}
    honest = record_of("mor/peak-memory", point)
    assert honest.measured.low > 10
    measure = room.peak_of
    monkeypatch.setattr(room, "peak_of", lambda way, sizes: measure("vanilla" if way == "mor" else way, sizes))
    broken = record_of("mor/peak-memory", point)
    assert broken.measured.median < 5
    assert judge(broken).verdict not in PAYS


# ---- random routing


def test_random_routing_keeps_the_gates_and_draws_who_goes_on(monkeypatch):
    """As many tokens in training, as many on average after it; what a token that is taken becomes is what it always becomes."""
    recipe = {**TINY, "length": 16}
    torch.manual_seed(0)
    ids = torch.randint(256, (64, 16))
    ours, random = (room.language_model(arm, recipe, 0) for arm in ("mor", "random routing"))
    random.load_state_dict(ours.state_dict())
    assert ((random(ids).depths == 2).sum(1) == 8).all()
    assert not torch.equal(random(ids).depths, random(ids).depths)
    with torch.no_grad():
        assert float((random.eval()(ids).depths == 2).float().mean()) == pytest.approx(0.5, abs=0.06)
    monkeypatch.setattr(torch, "rand_like", lambda scores: scores)  # drawn as the router would choose: the same model
    torch.testing.assert_close(random.train()(ids).logits, ours(ids).logits)
    random(ids).logits.square().mean().backward()
    assert all(router.weight.grad.abs().sum() > 0 for router in random.routers.main), "the gate must be learned"


def test_random_routing_draws_under_depth_wise_batching_too():
    model = room.language_model("random routing", TINY, 0).eval()
    torch.manual_seed(0)
    one, two = (method.generate_depthwise(model, room.prompts_of(16, 4), 16, lanes=16) for _ in range(2))
    assert (one.tokens, one.depths) != (two.tokens, two.depths)
    assert (one.depths[1] + two.depths[1]) / 512 == pytest.approx(0.5, abs=0.1)


def test_gates_alone_send_every_token_through_all_recursions():
    model = room.language_model("gate only", TINY, 0)
    out = model(torch.randint(256, (2, 16)))
    assert (out.depths == 2).all()
    out.logits.square().mean().backward()
    assert all(router.weight.grad.abs().sum() > 0 for router in model.routers.main)


# ---- generation


@torch.no_grad()
def test_all_arms_of_generation_answer_the_same_requests():
    """The vanilla model token by token and in the compiled loop; Mixture-of-Recursions with and without depth-wise batching."""
    vanilla, ours = (room.language_model(arm, TINY, 0).eval() for arm in ("vanilla", "mor"))
    for model in (vanilla, ours):  # wide enough for greedy choices without ties
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    asked = room.prompts_of(5, 4)
    decoder = room.Decoder(vanilla, weights="fp32", cache="float32")
    assert room.step_by_step(vanilla, asked, 4, 2) == room.by_loop(decoder, asked, 4, 2)
    assert method.generate_depthwise(ours, asked, 4, lanes=2).tokens == room.step_by_step(ours, asked, 4, 2)

"""HAMburger's experiments notice groups that end at random, that never end, and that always end; and all ways produce the same text.

The models are trained in seconds on a text of few words, whose first letters alone are uncertain: real code is not predictable to a model
so small, and without groups there is nothing to break.
"""

from __future__ import annotations

import pytest
import torch
from tests.properties.sabotage import PAYS, verdict_of

from assay.experiments import experiments_of
from assay.experiments.inference import hamburger as room
from assay.methods.inference.hamburger import HamburgerForCausalLM

TINY = {
    "width": 48,
    "layers": 2,
    "micro_layers": 1,
    "max_steps": 4,
    "length": 40,
    "steps": 100,
    "grafting": 150,
    "windows": 32,
    "toy": 2,
}
SPEED = {**TINY, "replays": 1}
WORDS = torch.randint(97, 123, (20, 3), generator=torch.Generator().manual_seed(0))
WORDS[:, 0] = torch.arange(20) + 97


def toy_rows(rows, length, seed):
    """Rows of bytes: words one after another, drawn evenly."""
    generator = torch.Generator().manual_seed(seed)
    return WORDS[torch.randint(len(WORDS), (rows, length // 3 + 2), generator=generator)].flatten(1)[:, : length + 1]


def toy_batches(length, batch, *, seed):
    while True:
        seed += 1
        ids = toy_rows(batch, length, seed)
        yield ids[:, :-1], ids[:, 1:]


def ends_at_random(self, cache, rows, vectors):
    """Groups end by chance, about as often as those of the trained model."""
    drawn = torch.rand(len(rows), generator=torch.Generator().manual_seed(sum(cache.position))).tolist()
    for row, number in zip(rows, drawn, strict=True):
        cache.closes[row] = cache.open[row] + 1 >= cache.max_steps or number < 0.3


def never_ends(self, cache, rows, vectors):
    for row in rows:
        cache.closes[row] = cache.open[row] + 1 >= cache.max_steps


def always_ends(self, cache, rows, vectors):
    for row in rows:
        cache.closes[row] = True


@pytest.fixture(autouse=True, scope="module")
def toy_text():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "byte_batches", toy_batches)
        patch.setattr(room, "CONFIDENCE", 0.5)  # seconds of training make no stop head that is surer
        patch.setattr(room, "FRONT", ())
        patch.setattr(room, "windows", lambda task, source=None: toy_rows(task["windows"], task["length"], 10**6))
        yield


def score(arm):
    """An arm's real scores: one trained model on three texts, which stand for the experiment's three seeds."""
    found = []
    for seed in (1, 2, 3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                room, "windows", lambda task, seed=seed: toy_rows(task["windows"], task["length"], seed * 10**6)
            )
            found.append(room.arm_score(arm, 0, TINY))
    return found


@pytest.fixture(scope="module")
def scored(toy_text):
    """The real scores of HAMburger, and of HAMburger with a broken stop head by its name."""
    found = {"hamburger": score("hamburger")}
    for name, broken in (("random", ends_at_random), ("never", never_ends), ("always", always_ends)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(HamburgerForCausalLM, "decide", broken)
            found[name] = score("hamburger")
    return found


@pytest.fixture
def given(monkeypatch, scored):
    """The other arms are given: a base as good as the unbroken HAMburger, which seconds of training do not reach, and a worse rival."""

    def give(name):
        base, rival = (
            [{"nll": much * one["nll"], "per_entry": 1.0} for one in scored["hamburger"]] for much in (1.0, 1.2)
        )
        found = {"base": base, "hamburger": scored[name], "random groups": rival}
        monkeypatch.setattr(room, "scores", lambda task: found)

    return give


def test_experiments_load():
    assert {e.claim for e in experiments_of("hamburger")} == {"hamburger/kv-entries", "hamburger/decode-speedup"}


@pytest.mark.parametrize(("claim", "point"), [("hamburger/kv-entries", TINY), ("hamburger/decode-speedup", SPEED)])
@pytest.mark.parametrize("broken", ["random", "never"])
def test_a_stop_head_that_knows_nothing_is_noticed(given, claim, point, broken):
    given("hamburger")
    assert verdict_of(claim, point) in PAYS
    given(broken)
    assert verdict_of(claim, point) not in PAYS


def test_groups_of_one_save_no_entries(given):
    given("always")
    assert verdict_of("hamburger/kv-entries", TINY) not in PAYS


def test_every_way_produces_the_text():
    decoding = room.Decoding(TINY, 2)
    expected = [row[0, room.PROMPT :].tolist() for row in decoding.rows]
    assert decoding.plain() == expected
    assert decoding.free() == expected
    assert decoding.exact() == expected
    made = decoding.groups()
    assert [one.tokens[0] for one in made] == expected
    assert [set(one.groups[0]) for one in decoding.groups_of_one()] == [{1}, {1}]
    counted = decoding.counted()
    assert counted["kv_entries"]["hamburger"] == sum(room.PROMPT + len(one.groups[0]) - 1 for one in made)
    assert counted["kv_entries"]["base"] == counted["tokens"] + 2 * (room.PROMPT - 1)
    assert counted["kv_entries"]["hamburger"] < counted["kv_entries"]["base"]
    assert counted["passes of the base"]["hamburger"] == sum(len(one.groups[0]) for one in made)


def test_groups_and_their_controls():
    ids = room.windows(TINY)
    groups = room.Cutter("hamburger", room.base_model(TINY, 0), 4, 0)(ids, room.PROMPT)
    random = room.shuffled(groups, room.PROMPT, torch.Generator().manual_seed(0))
    assert not torch.equal(groups, random)
    assert [torch.bincount(row).sort().values.tolist() for row in groups] == [
        torch.bincount(row).sort().values.tolist() for row in random
    ]
    assert room.per_entry(groups) == room.per_entry(random) > 1.05
    assert room.blocks(ids[:, :7], 2, 2).tolist()[0] == [0, 1, 2, 2, 3, 3, 4]


def test_decoding_step_by_step_is_teacher_forcing_in_its_own_groups():
    model, ids = room.trained_on("hamburger", TINY, 0), room.windows(TINY)[:6]
    found, groups = room.decoded(model, ids)
    assert torch.allclose(found, room.told_nll(model, ids, groups), atol=1e-4)

"""HAMburger's experiments notice a broken stop head, merger and micro decoder; all ways produce the same text; controls are what they say.

The models are trained in seconds, on a text that is what the method hopes for: each word is a key, the symbol that the row's head has for
it, and two bytes that follow from that. The symbol has to be looked up in the head by the key, so groups that hold both lose it, and
the next key follows from the symbol, so mergers that forget it do too. The head stands behind the prompt, so that a cache of the prompt
and the last bytes loses it as well.
"""

from __future__ import annotations

import json

import pytest
import torch
from tests.properties.sabotage import PAYS, record_of, verdict_of
from transformers import DynamicCache

from assay.evidence.types import Verdict
from assay.evidence.verdict import judge
from assay.experiments import experiments_of
from assay.experiments.inference import hamburger as room
from assay.experiments.inference.hamburger import arms, decoding, losses
from assay.experiments.inference.language import small_llama
from assay.experiments.rates import FILE, Rate
from assay.methods.core.generation.eviction import evicted, kept, recency
from assay.methods.inference.hamburger import CompositionalEmbedder, HamburgerForCausalLM, MicroStepDecoder, group_ids

PROMPT = losses.PROMPT
TINY = {
    "width": 32, "layers": 1, "micro_layers": 1, "max_steps": 4, "length": 71, "batch": 12, "steps": 250, "grafting": 110,
    "windows": 64, "toy": 2,
}  # fmt: skip
POINT = {**TINY, "replays": 1, "timed_width": 128}
CLAIMS = ["hamburger/kv-entries", "hamburger/decode-speedup"]
RATES = {"hamburger/base": Rate(1e-2, (5e-3, 1e-2, 2e-2)), "hamburger/grafting": Rate(7e-3, (3e-3, 7e-3, 1.5e-2))}
KEYS, EACH, SYMBOL, TWIN, CHANCE = 8, 4, 64, 96, 0.3
LEADS, LEAD = 16, 128


def toy_rows(rows, length, seed):
    """Rows of bytes: a prompt of noise, a symbol for each of eight keys, then words (key, its symbol, the symbol's twin, a dot), some
    at random."""
    draw = torch.Generator().manual_seed(seed)
    words = (length + 1 - PROMPT - KEYS) // 4
    lead = LEAD + torch.randint(LEADS, (rows, PROMPT), generator=draw)
    head = EACH * torch.arange(KEYS) + torch.randint(EACH, (rows, KEYS), generator=draw)
    any_key = torch.randint(KEYS, (rows, words), generator=draw)
    any_symbol = torch.randint(KEYS * EACH, (rows, words), generator=draw)
    chance = torch.rand(2, rows, words, generator=draw) < CHANCE
    made, symbol = [lead, head + SYMBOL], any_symbol[:, 0]
    for word in range(words):
        key = torch.where(chance[0, :, word], any_key[:, word], symbol % KEYS)
        symbol = torch.where(chance[1, :, word], any_symbol[:, word], head.gather(1, key[:, None])[:, 0])
        made.append(torch.stack([key + ord("0"), symbol + SYMBOL, symbol + TWIN, torch.full_like(key, ord("."))], 1))
    return torch.cat(made, 1)


def toy_batches(length, batch, *, seed):
    while True:
        seed += 1
        ids = toy_rows(batch, length, seed)
        yield ids[:, :-1], ids[:, 1:]


def toy_windows(text):
    def windows(task, part="heldout"):
        return toy_rows(task["windows"], task["length"], 10**6 * (text + 10 * (part == "calibration")))

    return windows


@pytest.fixture(autouse=True, scope="module")
def toy_text():
    with pytest.MonkeyPatch.context() as patch:
        for module in (arms, losses):
            patch.setattr(module, "chosen", lambda name, arm: RATES[name])
        for module in (losses, decoding):
            patch.setattr(module, "windows", toy_windows(1))
        patch.setattr(arms, "batches", toy_batches)
        patch.setattr(losses, "ARMS", arms.ARMS[:4])
        patch.setattr(losses, "FRONT", ())
        patch.setattr(losses, "WINDOWS", (4, 12))
        yield


def seen():
    """The scores of really trained arms: one model of each on three texts, which stand for the experiment's three seeds."""
    found = []
    for text in (1, 2, 3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(losses, "windows", toy_windows(text))
            found.append(losses.seed_scores(0, TINY))
    return {arm: [one[arm] for one in found] for arm in found[0]}


@pytest.fixture(scope="module")
def honest(toy_text):
    return seen()


def ends_at_random(self, cache, rows, vectors):
    """Groups end by chance, about as often as those of the trained model."""
    drawn = torch.rand(len(rows), generator=torch.Generator().manual_seed(sum(cache.position))).tolist()
    for row, number in zip(rows, drawn, strict=True):
        cache.closes[row] = cache.open[row] + 1 >= cache.max_steps or number < 0.4


def never_ends(self, cache, rows, vectors):
    for row in rows:
        cache.closes[row] = cache.open[row] + 1 >= cache.max_steps


def always_ends(self, cache, rows, vectors):
    for row in rows:
        cache.closes[row] = True


def zeros(self, embeds, sizes):
    return torch.zeros_like(embeds[:, 0])


def noise(self, embeds, sizes):
    return torch.randn(embeds[:, 0].shape, generator=torch.Generator().manual_seed(0))


def constant(self, x, places=None, cache=None, mask=None):
    return torch.ones_like(x)


BROKEN = {
    "ends at random": (HamburgerForCausalLM, "decide", ends_at_random),
    "never ends": (HamburgerForCausalLM, "decide", never_ends),
    "merger of zeros": (CompositionalEmbedder, "merge", zeros),
    "merger of noise": (CompositionalEmbedder, "merge", noise),
    "constant micro decoder": (MicroStepDecoder, "forward", constant),
}


@pytest.fixture
def use(monkeypatch):
    """Make the experiments take scores that were seen."""

    def use(found):
        for module in (room, losses):
            monkeypatch.setattr(module, "scores", lambda task: found)

    return use


def test_experiments_load():
    assert {e.claim for e in experiments_of("hamburger")} == set(CLAIMS)


@pytest.mark.parametrize("claim", CLAIMS)
def test_where_the_text_is_made_for_it_it_pays(use, honest, claim):
    use(honest)
    record = record_of(claim, POINT)
    assert judge(record).verdict in PAYS, judge(record).reason
    assert {"kv_entries", "tokens_a_second"} <= record.details.keys()
    assert record.details["kv_entries"]["hamburger"] < record.details["kv_entries"]["base"]


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_part_is_noticed(use, honest, broken, monkeypatch):
    monkeypatch.setattr(*BROKEN[broken])
    found = seen()
    monkeypatch.undo()
    monkeypatch.setattr(decoding.Decoding, "tokens_a_second", lambda self: {})
    # the controls stay what they are with whole parts: only the method is broken
    mixed = {**honest, "hamburger": found["hamburger"]}
    for claim in CLAIMS:
        use(mixed)
        assert verdict_of(claim, POINT) not in PAYS


def test_groups_of_one_save_no_entries(use, honest, monkeypatch):
    monkeypatch.setattr(HamburgerForCausalLM, "decide", always_ends)
    found = seen()
    monkeypatch.undo()
    use({**honest, "hamburger": found["hamburger"]})
    assert verdict_of("hamburger/kv-entries", POINT) is Verdict.REFUTED


def test_a_cache_of_the_prompt_and_the_last_bytes_that_does_as_well_refutes(use, honest):
    scores = [{**one, "evicted": one["nll"] - 0.01} for one in honest["hamburger"]]
    use({**honest, "hamburger": scores})
    assert verdict_of("hamburger/kv-entries", POINT) is Verdict.REFUTED


@pytest.mark.parametrize(
    ("evicted", "high", "refuted"),
    [
        ([0.7, 0.7, 0.7], 1.5, False),
        ([0.6, 0.6, 0.6], 1.5, True),  # as well as ours
        ([0.5, 0.5, 0.5], 1.5, True),
        ([0.5, 0.9, 0.5], 1.5, False),  # it may be worse
        ([0.7, 0.7, 0.7], 1.0, True),
    ],
)
def test_what_refutes(evicted, high, refuted):
    ours = [{"nll": 0.6, "evicted": loss} for loss in evicted]
    assert losses.refutes({"measured": {"high": high}, "details": {"arms": {"hamburger": ours}}}) is refuted


def test_the_search_tells_the_method_from_its_controls():
    """On the experiment's own text, with as many entries for all: groups by the base's uncertainty, regular ones, random ones."""
    searched = json.loads(FILE.read_text(encoding="utf-8"))["hamburger/grafting"]["arms"]
    assert set(searched) == set(arms.ARMS)
    best = {arm: min(loss for loss in one["losses"].values() if loss is not None) for arm, one in searched.items()}
    margin = room.DECLARED["guard"].margin
    assert best["regular groups"] > (1 + margin) * best["base"]
    assert best["random groups"] > (1 + margin) * best["base"]
    assert best["hamburger"] < min(best["regular groups"], best["random groups"])


# ------------------------------------------------------------------------------------------------------------------- the parts


def small_base(layers=2):
    return small_llama(width=32, layers=layers, heads=2).eval()


def arm_of(arm):
    return arms.grafted(arm, small_base(), TINY, 0, 1e-3).eval()


def rows(n=6):
    return toy_rows(n, TINY["length"], 5)


def test_every_way_produces_the_text():
    ways = decoding.Decoding(TINY, 2, 128)
    expected = [row[0, PROMPT:].tolist() for row in ways.rows]
    for made in (ways.plain(), ways.plain_compiled(), ways.free(), ways.exact(), ways.in_8_bits()):
        assert made == expected
    made = ways.groups()
    assert [one.tokens[0] for one in made] == expected
    groups = losses.decoded(arms.trained_on("hamburger", TINY, 0), torch.cat(ways.rows))[1]
    assert [one.groups[0] for one in made] == [torch.bincount(row)[PROMPT:].tolist() for row in groups]
    assert [set(one.groups[0]) for one in ways.groups_of_one()] == [{1}, {1}]
    counted = ways.counted()
    assert counted["kv_entries"]["hamburger"] == sum(PROMPT + len(one.groups[0]) - 1 for one in made)
    assert counted["kv_entries"]["base"] == counted["tokens"] + 2 * (PROMPT - 1)
    assert counted["kv_entries"]["hamburger"] < counted["kv_entries"]["base"]
    assert counted["passes of the base"]["hamburger"] == sum(len(one.groups[0]) for one in made)
    assert counted["kv_bytes_an_entry"] == 2 * 128 * 4  # keys and values of one layer, float32
    assert counted["bytes an entry"] == pytest.approx(losses.per_entry(groups))


def test_the_rows_that_are_timed_are_typical():
    groups = torch.tensor([[0, 1, 2, 3], [0, 1, 1, 1], [0, 1, 2, 2], [0, 1, 1, 2]])
    groups = torch.cat([groups, torch.arange(4).expand(4, -1)])  # 4, 2, 3, 3, 4, 4, 4, 4 groups
    assert decoding.typical(groups, 1).tolist() == [4]
    assert decoding.typical(groups, 2).tolist() == [3, 6]
    assert decoding.typical(groups, 8).tolist() == [1, 2, 3, 0, 4, 5, 6, 7]


def test_typical_rows_are_timed(monkeypatch):
    ids = losses.windows(TINY)
    groups = torch.stack([group_ids([1] * (8 + row) + [4] * ((64 - row) // 4) + [1] * (-row % 4)) for row in range(64)])
    monkeypatch.setattr(decoding, "decoded", lambda model, ids: (0.0, groups))
    ways = decoding.Decoding(TINY, 2, 128)
    assert torch.equal(torch.cat(ways.rows), ids[[16, 48]])
    assert [sum(ends) for ends in ways.ends] == (groups[[16, 48]].amax(1) + 1).tolist()


def test_the_head_of_the_timed_model_weighs_what_the_papers_does():
    base = decoding.Decoding(TINY, 1, 384).base
    layers = sum(p.numel() for p in base.model.layers.parameters())
    assert base.lm_head.weight.numel() / layers == pytest.approx(0.25, abs=0.02)  # Llama-3.2-1B's has 0.27


def test_all_bases_are_there_before_anything_starts_from_one(monkeypatch):
    batches = []
    monkeypatch.setattr(losses, "in_parallel", lambda function, runs: batches.append({run[0] for run in runs}))
    monkeypatch.setattr(losses, "seed_scores", lambda seed, task: dict.fromkeys(losses.ARMS, {"nll": 0.0}))
    losses._scores.__wrapped__((("width", 1),))
    first, *rest = batches
    assert first == {"base"}
    assert set.union(*rest) == set(losses.ARMS[1:])


def test_the_lean_loop_computes_what_the_base_does():
    base, ids = small_base(), rows(1)
    seen = []
    parts = decoding.Parts(base)
    logits = parts.logits
    parts.logits = lambda hidden: seen.append(logits(hidden).clone()) or logits(hidden)
    decoding.token_by_token(parts, ids)
    with torch.no_grad():
        expected = base(ids).logits[0, PROMPT - 1 : -1]
    assert torch.allclose(torch.cat(seen)[:, 0], expected, atol=1e-4)


def test_controls_have_as_many_groups():
    groups = arms.Cutter("hamburger", arms.base_model(TINY, 0), 4, 0)(rows(), PROMPT)
    random = arms.shuffled(groups, PROMPT, torch.Generator().manual_seed(0))
    regular = arms.regular(groups, PROMPT)
    assert not torch.equal(groups, random)
    for row, other, even in zip(groups, random, regular, strict=True):
        sizes = torch.bincount(even)[PROMPT:]
        assert torch.bincount(row).sort().values.tolist() == torch.bincount(other).sort().values.tolist()
        assert int(even[-1]) == int(row[-1])
        assert int(sizes.max() - sizes.min()) <= 1
        assert even[:PROMPT].tolist() == list(range(PROMPT))
    assert losses.per_entry(groups) == losses.per_entry(random) == losses.per_entry(regular) > 1.5
    assert arms.blocks(rows()[:, :7], 2, 2).tolist()[0] == [0, 1, 2, 2, 3, 3, 4]


@pytest.mark.parametrize("arm", arms.ARMS[1:2] + arms.ARMS[4:])
def test_decoding_step_by_step_is_teacher_forcing_in_its_own_groups(arm):
    model, ids = arm_of(arm), rows()
    model.config.confidence = 0.5
    told, groups = losses.decoded(model, ids)
    assert losses.per_entry(groups) > 1
    assert told == pytest.approx(losses.told_nll(model, ids, groups), abs=1e-4)


@pytest.mark.parametrize(("arm", "changes"), [("hamburger", True), ("no micro decoder", False)])
def test_without_the_micro_decoder_tokens_do_not_see_those_before_them_in_their_group(arm, changes):
    model, ids = arm_of(arm), rows(1)[:, :20]
    groups = arms.blocks(ids, 4, PROMPT)
    other = ids.clone()
    other[0, PROMPT] += 1  # the first of a group of four
    with torch.no_grad():
        one, two = (model(told, groups=groups).logits[0, PROMPT : PROMPT + 3] for told in (ids, other))
    assert torch.allclose(one, two) is not changes


def test_what_stands_in_for_the_merger():
    embeds, sizes = torch.randn(2, 3, 8), torch.tensor([2, 3])
    assert torch.equal(arms.LastMember().merge(embeds, sizes), torch.stack([embeds[0, 1], embeds[1, 2]]))
    expected = torch.stack([embeds[0, :2].mean(0), embeds[1].mean(0)])
    assert torch.allclose(arms.MeanMember().merge(embeds, sizes), expected)
    assert torch.equal(arms.LastMember()(embeds[:, :1], torch.tensor([1, 1])), embeds[:, 0])


def test_new_modules_learn_at_twice_the_rate():
    model = arms.grafted("hamburger", small_base(), TINY, 0, 1e-3)
    rates = model.optimizer_options()
    assert rates.keys() == {name for name, _ in model.named_parameters() if not name.startswith("base.")}
    assert {value["lr"] for value in rates.values()} == {2e-3}


@torch.no_grad()
def test_eviction_by_a_mask_is_eviction():
    base, ids, window = small_base(), rows(3), 5
    cache = DynamicCache(config=base.config)
    made = [base(ids[:, :PROMPT], cache=cache, use_cache=True).logits[:, -1:]]
    for place in range(PROMPT, ids.shape[1] - 1):
        held = cache.get_seq_length()
        if held == PROMPT + window:
            cache = evicted(cache, kept(recency((3, 2, held)), held - 1, sinks=PROMPT)).cache
        made.append(
            base(ids[:, place : place + 1], cache=cache, use_cache=True, position_ids=torch.full((3, 1), place)).logits
        )
    expected = losses.nats(torch.cat(made, 1), ids[:, PROMPT:])
    assert losses.evicted_nll(base, ids, losses.windowed(ids, window)) == pytest.approx(expected, abs=1e-5)
    everything = torch.arange(ids.shape[1] - 1) + 1
    assert losses.evicted_nll(base, ids, everything) == pytest.approx(losses.told_nll(base, ids), abs=1e-5)


def test_the_shortest_window_that_is_no_worse():
    base, ids = small_base(), rows(3)
    answer = ids.shape[1] - PROMPT
    assert losses.enough(base, ids, float("inf")) == losses.WINDOWS[0]
    assert losses.enough(base, ids, 0.0) == answer


def test_8_bits_are_the_nearest_that_a_scale_allows():
    x = torch.cat([torch.randn(50, 16) * torch.logspace(-3, 3, 50)[:, None], torch.zeros(1, 16)])
    found = losses.in_8_bits(x)
    scale = (x.abs().amax(-1, keepdim=True) / 127).bfloat16().float()
    steps = found[:-1] / scale[:-1]
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)
    assert steps.abs().max().round() == 127
    off = (found - x).abs() / x.abs().amax(-1, keepdim=True).clamp_min(1e-9)
    assert 0.25 / 127 < off.max() < 1.0 / 127  # half a step, or what a scale that was rounded down cuts off
    assert not found[-1].any()
    assert losses.in_8_bits(torch.tensor([1.0, torch.nan])).isnan().all()


def test_weights_of_8_bits_cost_little_and_are_of_8_bits():
    base, ids = small_base(), rows(3)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    rounded = losses.narrow(base)
    for name, value in base.state_dict().items():
        assert torch.equal(value, before[name])
        changed = rounded.state_dict()[name]
        if "proj" in name or "lm_head" in name:
            assert not torch.equal(changed, value), name
            torch.testing.assert_close(changed, losses.in_8_bits(value), rtol=0, atol=0)
        else:
            assert torch.equal(changed, value), name
    found, exact = losses.told_nll(rounded, ids), losses.told_nll(base, ids)
    assert found != exact
    assert found == pytest.approx(exact, rel=0.02)


@torch.no_grad()
def test_entries_of_8_bits_are_what_a_cache_of_8_bits_gives_step_by_step():
    base, ids = small_base(), rows(3)
    cache = losses.NarrowCache(config=base.config)
    made = [base(ids[:, :PROMPT], cache=cache, use_cache=True).logits[:, -1:]]
    for place in range(PROMPT, ids.shape[1] - 1):
        made.append(base(ids[:, place : place + 1], cache=cache, use_cache=True).logits)
    expected = losses.nats(torch.cat(made, 1), ids[:, PROMPT:])
    found, exact = losses.narrow_entries_nll(base, ids), losses.told_nll(base, ids)
    assert found == pytest.approx(expected, abs=1e-5)
    assert abs(found - exact) > 1e-7
    assert found == pytest.approx(exact, rel=0.02)
    for layer in cache.layers:
        torch.testing.assert_close(layer.keys, losses.in_8_bits(layer.keys), rtol=1e-5, atol=1e-6)

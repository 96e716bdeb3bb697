"""The scheduler over a toy model in exact arithmetic: answers do not depend on company, and memory and counts add up."""

from __future__ import annotations

import random
import threading
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from assay.methods.builtin.speculation import Speculation
from assay.methods.core.generation.loop import set_settings
from assay.server import scheduler
from assay.server.backends import CompiledBackend
from assay.server.guessing import Guesses
from assay.server.rows import Event, Row, Settings
from assay.server.scheduler import Scheduler, Stopped
from properties.paged_stand_in import Toy, paged, toy_answer, toy_logits

PAGE = paged.PAGE


class Client:
    """Keeps what its row says."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.done = threading.Event()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if event.finish or event.error:
            self.done.set()

    @property
    def tokens(self) -> list[int]:
        return [token for event in self.events for token in event.tokens]

    @property
    def infos(self):
        return [info for event in self.events for info in event.infos]

    @property
    def finish(self):
        return self.events[-1].finish if self.events else None

    @property
    def error(self):
        return self.events[-1].error if self.events else None


def made(pages: int = 64, **options):
    """A scheduler without a thread over a toy, whose `calls` are what the model was asked to do."""
    toy = Toy()
    backend = CompiledBackend(toy, toy.decoder(), pages=pages)
    calls: list[tuple[str, int]] = []
    for name, size in (
        ("prefill", lambda call: len(call[1])),
        ("extend", lambda call: len(call[1])),
        ("run", lambda call: len(call[0])),
    ):
        setattr(backend, name, recorded(getattr(backend, name), name, size, calls))
    scheduler = Scheduler(backend, start=False, **{"prefill_chunk": 32, **options})
    return SimpleNamespace(scheduler=scheduler, toy=toy, backend=backend, pool=backend.pool, calls=calls)


def recorded(function, name, size, calls):
    def call(*arguments, **options):
        calls.append((name, size(arguments)))
        return function(*arguments, **options)

    return call


def prompt(length: int, family: int = 0, seed: int = 0) -> list[int]:
    """A prompt that shares its beginning with others of its family."""
    shared = [(family * 31 + place * 7) % Toy.VOCAB for place in range(40)]
    return (shared + [(seed * 13 + place * 5) % Toy.VOCAB for place in range(length)])[:length]


def run(scheduler: Scheduler, most: int = 2_000) -> None:
    for _ in range(most):
        if not scheduler.turn():
            return
    raise AssertionError("the scheduler does not come to an end")


def settle(scheduler: Scheduler) -> None:
    """Everything has ended: only kept prefixes hold pages, and the counts add up."""
    stats = scheduler.stats()
    assert stats.waiting == stats.running == 0
    assert stats.submitted == stats.finished + stats.cancelled + stats.failed
    assert stats.kv_used == stats.kv_kept
    assert stats.steps == sum(stats.batch_sizes.values())
    scheduler.stop()
    assert scheduler.backend.pool.free == scheduler.backend.pool.pages


# ---- any schedule gives the answers of one at a time

KINDS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.0, 1.0, 2.5]),
        "seed": st.integers(0, 3),
        "top_k": st.sampled_from([0, 5]),
        "top_p": st.sampled_from([1.0, 0.8]),
        "presence_penalty": st.sampled_from([0.0, 0.0, 0.5]),
        "frequency_penalty": st.sampled_from([0.0, 0.0, 2.0]),
        "logprobs": st.sampled_from([None, None, 2]),
        "ends": st.sampled_from([frozenset(), frozenset(), frozenset(range(0, 97, 9))]),
        "prompt_logprobs": st.sampled_from([False, False, False, True]),
    }
)
# small budgets and long answers: a good part of the schedules preempt somebody
LENGTH = st.one_of(st.integers(1, 50), st.integers(16, 40))
SUBMIT = st.tuples(
    st.just("submit"), LENGTH, st.integers(0, 1), st.one_of(st.integers(0, 70), st.integers(40, 60)), KINDS
)
TURNS, CANCEL = st.tuples(st.just("turns"), st.integers(1, 40)), st.tuples(st.just("cancel"), st.integers(0, 9))
STEPS = st.lists(st.one_of(SUBMIT, SUBMIT, SUBMIT, SUBMIT, TURNS, CANCEL), min_size=4, max_size=12)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(STEPS, st.integers(6, 9), st.integers(1, 5), st.sampled_from([16, 32]), st.integers(1, 4))
def test_any_schedule_gives_the_answers_of_one_at_a_time(steps, pages, max_running, chunk, at_once):
    world = made(pages, max_running=max_running, prefill_chunk=chunk, steps=at_once)
    rows = []
    for step in steps:
        if step[0] == "turns":
            for _ in range(step[1]):
                world.scheduler.turn()
        elif step[0] == "cancel" and rows:
            rows[step[1] % len(rows)][3].cancel()
        elif step[0] == "submit":
            _, length, family, most, kind = step
            how = Settings(max_tokens=most, min_tokens=most // 3, **kind)
            ids, client = prompt(length, family, seed=length % 3), Client()
            if -(-(length + max(most - 1, 0)) // PAGE) > pages:
                with pytest.raises(ValueError, match=f"KV budget of {pages} pages"):
                    world.scheduler.submit(ids, how, client)
                continue
            rows.append((ids, how, client, world.scheduler.submit(ids, how, client)))
    run(world.scheduler)
    stats = world.scheduler.stats()
    for ids, how, client, ticket in rows:
        answer = toy_answer(ids, how)
        if ticket._row.left:
            assert client.tokens == answer[: len(client.tokens)]
            continue
        assert client.tokens == answer
        assert client.finish == ("stop" if answer and answer[-1] in how.ends else "length")
        assert [event.finish is None for event in client.events] == [True] * (len(client.events) - 1) + [False]
        assert len(client.infos) == (0 if how.logprobs is None else len(answer))
        told = client.events[0].prompt_infos
        assert (told is None) == (not how.prompt_logprobs)
        assert told is None or len(told) == len(ids)
    if not any(ticket._row.left for *_, ticket in rows):
        assert stats.prompt_tokens == sum(len(ids) for ids, *_ in rows)
    assert stats.generated_tokens == sum(len(client.tokens) for _, _, client, _ in rows)
    assert all(size <= max_running for size in stats.batch_sizes)
    settle(world.scheduler)


def test_a_row_draws_the_same_tokens_in_any_company():
    how = Settings(max_tokens=12, temperature=3.0, seed=-5)
    alone, together, other = Client(), Client(), Client()
    world = made()
    world.scheduler.submit(prompt(20), how, alone)
    run(world.scheduler)
    for client, seed in ((together, -5), (other, 6)):
        world.scheduler.submit(prompt(20), Settings(max_tokens=12, temperature=3.0, seed=seed), client)
    run(world.scheduler)
    assert alone.tokens == together.tokens == toy_answer(prompt(20), how)
    assert other.tokens != alone.tokens


# ---- memory


def test_who_was_let_in_last_is_preempted_and_its_answer_is_unchanged():
    world = made(pages=8)
    how = Settings(max_tokens=60, temperature=2.0, seed=1)
    clients = [Client(), Client(), Client()]
    prompts = [prompt(33, family) for family in range(3)]  # three pages each, and six in the end
    for ids, client in zip(prompts, clients, strict=True):
        world.scheduler.submit(ids, how, client)
    finished = []
    while world.scheduler.turn():
        finished += [i for i, client in enumerate(clients) if client.done.is_set() and i not in finished]
    assert [client.tokens for client in clients] == [toy_answer(ids, how) for ids in prompts]
    stats = world.scheduler.stats()
    assert stats.preemptions >= 1
    assert stats.recomputed_tokens > 0
    assert any(name == "extend" for name, _ in world.calls)  # what it had made is put back by the loop itself
    assert finished == [0, 1]  # who came first was never sent back; the last one ends the loop
    assert stats.generated_tokens == 180
    settle(world.scheduler)


def test_unused_prefixes_are_given_up_before_anybody_is_preempted():
    world = made(pages=8)
    for family in range(3):
        world.scheduler.submit(prompt(33, family), Settings(max_tokens=1), Client())
    run(world.scheduler)
    kept = world.scheduler.stats().kv_kept
    assert kept == 3 * 32
    client = Client()
    world.scheduler.submit(prompt(70, family=5), Settings(max_tokens=50), client)
    run(world.scheduler)
    assert client.tokens == toy_answer(prompt(70, family=5), Settings(max_tokens=50))
    assert world.scheduler.stats().preemptions == 0
    settle(world.scheduler)


def test_a_found_prefix_is_not_computed_again_and_changes_nothing():
    world, how = made(), Settings(max_tokens=8)
    first, second, third = (
        prompt(80, seed=1),
        prompt(90, seed=2),
        prompt(64, seed=1),
    )  # they share 40 tokens, one chunk of them
    clients = [Client(), Client(), Client()]
    for ids, client in zip((first, second, third), clients, strict=True):
        world.scheduler.submit(ids, how, client)
        run(world.scheduler)
    assert [client.tokens for client in clients] == [toy_answer(ids, how) for ids in (first, second, third)]
    assert [client.events[-1].cached_tokens for client in clients] == [0, 32, 32]  # the last token is always computed
    assert [size for name, size in world.calls if name == "prefill"] == [32, 32, 16, 32, 26, 32]
    assert world.scheduler.stats().cached_tokens == 64
    settle(world.scheduler)


@pytest.mark.parametrize("most", [1, 10])
def test_answers_to_one_prompt_share_it(most):
    world, clients = made(pages=12), [Client() for _ in range(4)]
    ids = prompt(37)
    for seed, client in enumerate(clients):
        world.scheduler.submit(ids, Settings(max_tokens=most, temperature=2.0, seed=seed), client)
    world.scheduler.turn()
    if most > 1:
        assert world.pool.pages - world.pool.free == 2 + 4  # two full pages for all, and a last one each
    run(world.scheduler)
    assert [size for name, size in world.calls if name == "prefill"] == [32, 5]
    for seed, client in enumerate(clients):
        assert client.tokens == toy_answer(ids, Settings(max_tokens=most, temperature=2.0, seed=seed))
    assert [client.events[0].cached_tokens for client in clients] == [0, 37, 37, 37]
    settle(world.scheduler)


def test_a_later_row_with_the_prompt_of_a_running_one_shares_it_too():
    world, early, late = made(), Client(), Client()
    world.scheduler.submit(prompt(21), Settings(max_tokens=20), early)
    for _ in range(6):
        world.scheduler.turn()
    world.scheduler.submit(prompt(21), Settings(max_tokens=20, frequency_penalty=2.0), late)
    run(world.scheduler)
    assert [size for name, size in world.calls if name == "prefill"] == [21]
    assert early.tokens == toy_answer(prompt(21), Settings(max_tokens=20))
    assert late.tokens == toy_answer(prompt(21), Settings(max_tokens=20, frequency_penalty=2.0))


def test_nobody_is_let_in_beyond_the_budget_and_the_first_comes_first():
    world = made(pages=8)
    clients = [Client() for _ in range(3)]
    for family, (length, client) in enumerate(zip((60, 60, 5), clients, strict=True)):
        world.scheduler.submit(prompt(length, family), Settings(max_tokens=10), client)
    for _ in range(3):
        world.scheduler.turn()
    assert len(clients[0].tokens) == 4
    assert not clients[1].events  # four pages and a reserve do not fit beside four
    assert not clients[2].events  # and the small one does not overtake
    run(world.scheduler)
    assert all(client.finish == "length" for client in clients)
    assert world.scheduler.stats().preemptions == 0


# ---- pace


def test_running_rows_wait_for_one_piece_of_a_prompt_at_a_time():
    world = made()
    world.scheduler.submit(prompt(4), Settings(max_tokens=40), Client())
    world.scheduler.turn()
    world.calls.clear()
    for family in (1, 2):
        world.scheduler.submit(prompt(80, family), Settings(max_tokens=3), Client())
    run(world.scheduler)
    assert world.calls[:12] == [
        ("prefill", 32), ("run", 1), ("prefill", 32), ("run", 1), ("prefill", 16), ("run", 2),
        ("prefill", 32), ("run", 2), ("prefill", 32), ("run", 1), ("prefill", 16), ("run", 2),
    ]  # fmt: skip


def test_short_prompts_share_the_tokens_of_one_piece():
    world = made()
    world.scheduler.submit(prompt(4), Settings(max_tokens=40), Client())
    world.scheduler.turn()
    world.calls.clear()
    for family in (1, 2, 3):
        world.scheduler.submit(prompt(14, family), Settings(max_tokens=5), Client())
    world.scheduler.turn()
    assert world.calls == [("prefill", 14), ("prefill", 14), ("run", 3)]


def test_prompts_run_without_pause_while_nothing_decodes():
    world = made()
    world.scheduler.submit(prompt(90), Settings(max_tokens=3), Client())
    world.scheduler.turn()
    assert world.calls == [("prefill", 32), ("prefill", 32), ("prefill", 26), ("run", 1)]


def test_several_steps_a_call_where_nobody_waits():
    world, client = made(steps=4), Client()
    how = Settings(max_tokens=11, temperature=2.0, seed=3)
    world.scheduler.submit(prompt(9), how, client)
    run(world.scheduler)
    assert client.tokens == toy_answer(prompt(9), how)
    assert [len(event.tokens) for event in client.events] == [1, 4, 4, 2]
    assert world.scheduler.stats().steps == 10
    world.scheduler.submit(prompt(9), Settings(max_tokens=11, logprobs=0), client)  # these are chosen one by one
    run(world.scheduler)
    assert [len(event.tokens) for event in client.events[4:]] == [1] * 11


def test_a_call_takes_no_more_steps_than_its_time_allows(monkeypatch):
    world, client = made(steps=4), Client()
    monkeypatch.setattr(scheduler, "BURST", 1.0)
    took = iter([0.0, 2.0, 2.0, 2.9, 3.0, 3.0, 3.0, 3.0])  # begin and end of each call: 0.5 s a step, then 0.45, then 0
    monkeypatch.setattr(scheduler.time, "monotonic", lambda: next(took, 4.0))
    world.scheduler.submit(prompt(9), Settings(max_tokens=12), client)
    run(world.scheduler)
    assert [len(event.tokens) for event in client.events] == [1, 4, 2, 2, 3]


# ---- drafts


class Oracle:
    """Drafts as good as a test says: of the right next tokens, each is wrong with some chance."""

    answers: dict = {}
    drafted = 0

    def __init__(self, speculation):
        self.chance, self.most = random.Random(speculation.ngram), speculation.draft

    def next(self, row):
        right = self.answers[tuple(row.ids)][len(row.made) :][: self.chance.randint(0, self.most)]
        most = row.settings.max_tokens - len(row.made) - 1
        draft = [token if self.chance.random() < 0.7 else (token + 1) % Toy.VOCAB for token in right][:most]
        Oracle.drafted += len(draft)
        return draft

    def seen(self, drafted, accepted):
        assert 0 <= accepted <= drafted > 0


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(STEPS, st.integers(6, 9), st.integers(1, 5), st.integers(1, 8), st.integers(0, 99))
def test_drafts_change_no_answer(steps, pages, max_running, most, seed):
    world = made(pages, max_running=max_running)
    world.backend.speculation = Speculation(seed, most)
    rows, before = [], scheduler.Guesses
    scheduler.Guesses, Oracle.answers = Oracle, {}
    try:
        for step in steps:
            if step[0] == "turns":
                for _ in range(step[1]):
                    world.scheduler.turn()
            elif step[0] == "cancel" and rows:
                rows[step[1] % len(rows)][3].cancel()
            elif step[0] == "submit":
                _, length, family, new, kind = step
                how = Settings(max_tokens=new, **kind)
                ids, client = prompt(length, family, seed=length % 3), Client()
                if -(-(length + max(new - 1, 0)) // PAGE) > pages:
                    continue
                plain = Settings(max_tokens=new)
                Oracle.answers[tuple(ids)] = max(Oracle.answers.get(tuple(ids), []), toy_answer(ids, plain), key=len)
                rows.append((ids, how, client, world.scheduler.submit(ids, how, client)))
        run(world.scheduler)
    finally:
        scheduler.Guesses = before
    for ids, how, client, ticket in rows:
        answer = toy_answer(ids, how)
        assert client.tokens == answer[: len(client.tokens)] if ticket._row.left else client.tokens == answer
    stats = world.scheduler.stats()
    assert stats.accepted_tokens <= stats.drafted_tokens
    settle(world.scheduler)


def test_only_a_greedy_row_that_runs_alone_is_guessed_for(monkeypatch):
    monkeypatch.setattr(scheduler, "Guesses", Oracle)
    ids, other = prompt(20), prompt(20, family=1)
    greedy = Settings(max_tokens=30)
    monkeypatch.setattr(Oracle, "answers", {tuple(each): toy_answer(each, greedy) for each in (ids, other)})

    def drafted(*asked):
        world = made()
        world.backend.speculation = Speculation(3, 6)
        clients = [Client() for _ in asked]
        for (each, how), client in zip(asked, clients, strict=True):
            world.scheduler.submit(each, how, client)
        run(world.scheduler)
        assert [client.tokens for client in clients] == [toy_answer(*one) for one in asked]
        stats = world.scheduler.stats()
        assert (stats.drafted_tokens > 0) == ("extend" in [name for name, _ in world.backend.decoder.calls])
        return stats

    stats = drafted((ids, greedy))
    assert 0 < stats.accepted_tokens < stats.drafted_tokens
    assert stats.steps < 29
    stats = drafted((ids, greedy), (other, greedy))
    assert stats.drafted_tokens <= 6  # before the second came
    assert stats.batch_sizes[2] > 20
    for how in (
        Settings(max_tokens=30, temperature=1.0),
        Settings(max_tokens=30, logprobs=0),
        Settings(max_tokens=30, logit_bias={3: 1.0}),
        Settings(max_tokens=30, choose=lambda logits, made: int(logits.argmax())),
    ):
        assert drafted((ids, how)).drafted_tokens == 0
    end = frozenset(toy_answer(ids, greedy)[9:10])
    assert drafted((ids, Settings(max_tokens=30, ends=end))).generated_tokens <= 10


def test_a_draft_without_finite_logits_is_not_the_answers_fault(monkeypatch):
    ids, how = prompt(20), Settings(max_tokens=12)
    answer = toy_answer(ids, how)
    poison = next(token for token in range(Toy.VOCAB) if token not in ids + answer)

    class Bad(Oracle):
        def next(self, row):
            return [poison]

    monkeypatch.setattr(scheduler, "Guesses", Bad)
    world, client = made(), Client()
    world.backend.speculation, world.toy.poison = Speculation(3, 6), poison
    world.scheduler.submit(ids, how, client)
    run(world.scheduler)
    assert client.tokens == answer
    assert world.scheduler.stats().drafted_tokens == 0
    settle(world.scheduler)


def test_guesses_are_looked_up_in_what_the_row_has():
    ids = [5, 6, 7, 8, 9, 5, 6, 7]
    row = Row.of(ids, Settings(max_tokens=6, ends=frozenset({9})), Client())
    guesses = Guesses(Speculation(3, 8))
    assert guesses.next(row) in ([8], [8, 9])
    for _ in range(20):
        guesses.seen(4, 4)  # they pay: as long as they may be
    assert guesses.next(row) == [8, 9]  # and nothing behind an end
    row.made = [8, 8, 5, 6]
    assert guesses.next(row) == [7]  # one token less than may be made
    row.made = [8, 8, 5, 6, 7]
    assert guesses.next(row) == []


# ---- settings


def test_ends_least_lengths_and_nothing_at_all():
    ids = prompt(7)
    free = toy_answer(ids, Settings(max_tokens=20))
    end = frozenset({free[4]})
    for least in (0, 8):
        how, client = Settings(max_tokens=20, min_tokens=least, ends=end), Client()
        world = made()
        world.scheduler.submit(ids, how, client)
        run(world.scheduler)
        assert client.tokens == toy_answer(ids, how)
        assert len(client.tokens) > least
    how, client = Settings(max_tokens=0, prompt_logprobs=True, logprobs=1), Client()
    world.scheduler.submit(ids, how, client)
    run(world.scheduler)
    assert [event.tokens for event in client.events] == [()]
    assert client.finish == "length"
    assert len(client.events[0].prompt_infos) == 7


def test_bias_and_penalties_follow_the_formula():
    ids = prompt(7)
    for how in (
        Settings(max_tokens=15, logit_bias={5: 100.0}),
        Settings(max_tokens=15, presence_penalty=20.0),
        Settings(max_tokens=15, frequency_penalty=-20.0),
        Settings(max_tokens=15, logit_bias={5: 20.0}, presence_penalty=2.0, frequency_penalty=0.5, temperature=1.0),
    ):
        client, world = Client(), made()
        world.scheduler.submit(ids, how, client)
        run(world.scheduler)
        assert client.tokens == toy_answer(ids, how) != toy_answer(ids, Settings(max_tokens=15))


def test_logprobs_are_the_models_own_whatever_is_chosen():
    ids = prompt(40)
    how = Settings(max_tokens=6, logprobs=3, temperature=2.0, seed=1, logit_bias={5: 4.0}, prompt_logprobs=True)
    client, world = Client(), made()
    world.scheduler.submit(ids, how, client)
    run(world.scheduler)
    whole = ids + client.tokens
    told = client.events[0].prompt_infos + tuple(client.infos)
    assert told[0] is None
    for at in range(1, len(whole)):
        expected = torch.tensor(toy_logits(whole[:at])).log_softmax(0)
        info = told[at]
        assert info.token == whole[at]
        assert info.logprob == pytest.approx(float(expected[whole[at]]), abs=1e-5)
        best = expected.topk(3)
        assert [token for token, _ in info.top] == best.indices.tolist()
        assert [value for _, value in info.top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_a_constraint_chooses_from_logits_after_bias():
    seen = []

    def choose(logits, tokens):
        seen.append((logits.clone(), tokens))
        return (int(logits.argmax()) + len(tokens)) % Toy.VOCAB

    ids, how = prompt(9), Settings(max_tokens=5, logit_bias={3: 2.0}, choose=choose)
    client, world = Client(), made()
    world.scheduler.submit(ids, how, client)
    run(world.scheduler)
    asked = list(seen)
    assert client.tokens == toy_answer(ids, how)
    assert [tokens for _, tokens in asked] == [client.tokens[:n] for n in range(5)]
    assert asked[0][0].dtype == torch.float32
    assert float(asked[0][0][3]) == toy_logits(ids)[3] + 2.0


def test_settings_are_checked():
    for wrong, name in (
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 3, "min_tokens": 4}, "min_tokens"),
        ({"max_tokens": 3, "temperature": float("nan")}, "temperature"),
        ({"max_tokens": 3, "temperature": 1e-6}, "temperature"),
        ({"max_tokens": 3, "top_p": 0.0}, "top_p"),
        ({"max_tokens": 3, "top_k": -1}, "top_k"),
        ({"max_tokens": 3, "top_k": 10**400}, "top_k"),
        ({"max_tokens": 3, "seed": 1 << 64}, "seed"),
        ({"max_tokens": 3, "logit_bias": {1: float("inf")}}, "logit_bias"),
        ({"max_tokens": 3, "logit_bias": {-1: 1.0}}, "logit_bias"),
        ({"max_tokens": 3, "presence_penalty": float("nan")}, "presence_penalty"),
        ({"max_tokens": 3, "frequency_penalty": float("inf")}, "frequency_penalty"),
        ({"max_tokens": 3, "logprobs": -1}, "logprobs"),
        ({"max_tokens": 3, "ends": frozenset({-1})}, "ends"),
    ):
        with pytest.raises(ValueError, match=name):
            Settings(**wrong)
    for wrong, name in (
        ({"max_tokens": 3.0}, "max_tokens"),
        ({"max_tokens": 3, "choose": 1}, "choose"),
        ({"max_tokens": 3, "prompt_logprobs": 1}, "prompt"),
    ):
        with pytest.raises(TypeError, match=name):
            Settings(**wrong)


def test_what_can_never_be_done_is_refused_when_it_is_submitted():
    world = made(pages=8)
    submit = world.scheduler.submit
    with pytest.raises(ValueError, match="KV budget of 8 pages of 16 tokens.*need 9 pages"):
        submit(prompt(100), Settings(max_tokens=30), Client())
    submit(prompt(100), Settings(max_tokens=29), Client()).cancel()
    with pytest.raises(ValueError, match="512 positions"):
        made(pages=64).scheduler.submit(prompt(100), Settings(max_tokens=413), Client())
    with pytest.raises(ValueError, match="at least one token"):
        submit([], Settings(max_tokens=1), Client())
    for ids in ([0, 97], [-1]):
        with pytest.raises(ValueError, match=r"ids must lie in 0\.\.96"):
            submit(ids, Settings(max_tokens=1), Client())
    for ids in ([1, True], [1, 2.0], ["a"]):
        with pytest.raises(TypeError, match="ids must be token ids"):
            submit(ids, Settings(max_tokens=1), Client())
    with pytest.raises(ValueError, match="logit_bias"):
        submit([1], Settings(max_tokens=1, logit_bias={97: 1.0}), Client())
    with pytest.raises(ValueError, match="ends"):
        submit([1], Settings(max_tokens=1, ends=frozenset({97})), Client())
    with pytest.raises(ValueError, match="logprobs must be at most 97"):
        submit([1], Settings(max_tokens=1, logprobs=98), Client())
    with pytest.raises(ValueError, match="prefill_chunk must be a multiple of 16"):
        made(prefill_chunk=40)
    with pytest.raises(ValueError, match="steps"):
        made(steps=5)


# ---- who leaves, and what breaks


def test_who_leaves_is_gone_before_the_next_step():
    world = made()
    clients = [Client() for _ in range(3)]
    tickets = [
        world.scheduler.submit(prompt(60, family), Settings(max_tokens=50), client)
        for family, client in enumerate(clients)
    ]
    world.scheduler.turn()  # the first runs; the second's prompt is in pieces; the third waits
    world.scheduler.turn()
    for ticket in tickets:
        ticket.cancel()
    told = [len(client.events) for client in clients]
    world.calls.clear()
    assert not world.scheduler.turn()
    assert world.calls == []
    assert [len(client.events) for client in clients] == told
    assert world.scheduler.stats().cancelled == 3
    settle(world.scheduler)


def test_a_callback_may_cancel_and_one_that_raises_ends_its_row_only():
    world, good = made(), Client()
    tickets = []

    def leaves(event):
        tickets[0].cancel()

    def breaks(event):
        raise RuntimeError("a client's own fault")

    tickets.append(world.scheduler.submit(prompt(5), Settings(max_tokens=50), leaves))
    world.scheduler.submit(prompt(6), Settings(max_tokens=50), breaks)
    world.scheduler.submit(prompt(7), Settings(max_tokens=10), good)
    run(world.scheduler)
    assert good.tokens == toy_answer(prompt(7), Settings(max_tokens=10))
    assert world.scheduler.stats().cancelled == 2
    assert world.scheduler.stats().generated_tokens == 10 + 1 + 1
    settle(world.scheduler)


def test_a_constraint_that_raises_or_answers_nonsense_ends_its_row_only():
    def dead_end(logits, tokens):
        if len(tokens) == 2:
            raise RuntimeError("no token may follow")
        return 1

    world, good = made(), Client()
    bad = [Client(), Client()]
    world.scheduler.submit(prompt(5), Settings(max_tokens=9, choose=dead_end), bad[0])
    world.scheduler.submit(prompt(5), Settings(max_tokens=9, choose=lambda logits, tokens: 97), bad[1])
    world.scheduler.submit(prompt(5), Settings(max_tokens=9, logprobs=1), good)
    run(world.scheduler)
    assert bad[0].tokens == [1, 1]
    assert isinstance(bad[0].error, RuntimeError)
    assert isinstance(bad[1].error, ValueError)
    assert good.tokens == toy_answer(prompt(5), Settings(max_tokens=9))
    assert world.scheduler.stats().failed == 2
    settle(world.scheduler)


def test_logits_that_are_not_finite_end_their_row_only():
    world, broken = made(), Client()
    world.toy.strange = True
    world.scheduler.submit(prompt(5, family=1), Settings(max_tokens=9), broken)  # in a prompt, of plain rows too
    run(world.scheduler)
    assert isinstance(broken.error, FloatingPointError)
    settle(world.scheduler)


@pytest.mark.parametrize("at_once", [1, 4])
@pytest.mark.parametrize("kind", [{}, {"temperature": 1.5, "seed": 3}, {"logprobs": 1}, {"frequency_penalty": 0.5}])
def test_a_row_whose_logits_are_not_finite_ends_alone(kind, at_once):
    """In a step that computes several rows in one call, which can only say that one of them failed."""
    asked = [(prompt(5 + family, family), Settings(max_tokens=12, **kind)) for family in range(4)]
    expected = [toy_answer(ids, how) for ids, how in asked]
    others = {token for i, (ids, _) in enumerate(asked) if i != 2 for token in ids + expected[i]}
    poison = next(token for token in expected[2][3:] if token not in others | set(asked[2][0] + expected[2][:3]))
    world, clients = made(steps=at_once), [Client() for _ in asked]
    world.toy.poison = poison
    for (ids, how), client in zip(asked, clients, strict=True):
        world.scheduler.submit(ids, how, client)
    run(world.scheduler)
    assert [client.tokens for i, client in enumerate(clients) if i != 2] == expected[:2] + expected[3:]
    assert isinstance(clients[2].error, FloatingPointError)
    told = expected[2][: expected[2].index(poison) + 1]
    assert clients[2].tokens == (told if at_once == 1 else told[: len(clients[2].tokens)])
    assert world.scheduler.stats().failed == 1
    settle(world.scheduler)


@pytest.mark.parametrize("error", [RuntimeError("the model broke"), MemoryError("no memory")])
def test_a_broken_step_ends_the_running_rows_and_the_scheduler_goes_on(error):
    world = made(max_running=2)
    running, waiting = [Client(), Client()], Client()
    for family, client in enumerate(running):
        world.scheduler.submit(prompt(5, family), Settings(max_tokens=9), client)
    world.scheduler.submit(prompt(5, 3), Settings(max_tokens=9), waiting)
    world.scheduler.turn()
    world.toy.broken = error
    run(world.scheduler)
    assert [client.error for client in running] == [error, error]
    assert waiting.tokens == toy_answer(prompt(5, 3), Settings(max_tokens=9))
    assert world.scheduler.stats().failed == 2
    settle(world.scheduler)


def test_a_broken_prompt_ends_its_own_row():
    world, good, bad = made(), Client(), Client()
    world.scheduler.submit(prompt(5), Settings(max_tokens=30), good)
    world.scheduler.turn()
    world.toy.broken = RuntimeError("the model broke")
    world.scheduler.submit(prompt(50, 1), Settings(max_tokens=9), bad)
    run(world.scheduler)
    assert str(bad.error) == "the model broke"
    assert good.tokens == toy_answer(prompt(5), Settings(max_tokens=30))
    settle(world.scheduler)


def test_a_fault_outside_the_models_work_leaves_nobody_waiting():
    world, client, next_one = made(), Client(), Client()
    begin, world.backend.begin = world.backend.begin, lambda pages, length=0: 1 / 0
    world.scheduler.submit(prompt(5), Settings(max_tokens=3), client)
    world.scheduler.turn()
    assert isinstance(client.error, ZeroDivisionError)
    world.backend.begin = begin
    world.scheduler.submit(prompt(5), Settings(max_tokens=3), next_one)
    run(world.scheduler)
    assert next_one.finish == "length"
    settle(world.scheduler)


# ---- the thread


def threaded(**options):
    toy = Toy()
    return Scheduler(CompiledBackend(toy, toy.decoder(), pages=32), prefill_chunk=32, **options)


def test_the_thread_serves_many_and_drains():
    scheduler = threaded(max_running=3)
    asked = [(prompt(10 + n, n % 2), Settings(max_tokens=8, temperature=1.5, seed=n), Client()) for n in range(8)]
    threads = [threading.Thread(target=scheduler.submit, args=arguments) for arguments in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    scheduler.stop(drain_s=60)
    for ids, how, client in asked:
        assert client.tokens == toy_answer(ids, how)
    with pytest.raises(Stopped):
        scheduler.submit(prompt(5), Settings(max_tokens=1), Client())
    assert scheduler.stats().finished == 8
    assert scheduler.backend.pool.free == 32


def test_stopping_ends_what_is_not_done():
    scheduler, client = threaded(), Client()
    first = threading.Event()

    def told(event):
        client(event)
        first.set()

    scheduler.submit(prompt(5), Settings(max_tokens=400), told)
    assert first.wait(30)
    scheduler.stop()
    scheduler.stop()  # once more does nothing
    assert isinstance(client.error, Stopped)
    assert client.tokens == toy_answer(prompt(5), Settings(max_tokens=400))[: len(client.tokens)]
    assert scheduler.backend.pool.free == 32


def test_stopping_does_not_wait_for_a_long_prompt():
    toy, pieces, first, go_on = Toy(), [], threading.Event(), threading.Event()
    backend = CompiledBackend(toy, toy.decoder(), pages=32)
    prefill = backend.prefill

    def slow(sequence, ids, wanted):
        pieces.append(len(ids))
        first.set()
        assert go_on.wait(30)
        return prefill(sequence, ids, wanted)

    backend.prefill = slow
    scheduler, client = Scheduler(backend, prefill_chunk=16), Client()
    scheduler.submit(prompt(400), Settings(max_tokens=5), client)
    assert first.wait(30)
    stopping = threading.Thread(target=scheduler.stop)
    stopping.start()
    while not scheduler._stopping:
        pass
    go_on.set()
    stopping.join(30)
    assert len(pieces) == 1  # of 25
    assert isinstance(client.error, Stopped)
    assert backend.pool.free == 32


def test_events_come_in_the_schedulers_thread_and_a_client_may_submit_from_there():
    scheduler, second = threaded(), Client()
    names = set()

    def told(event):
        names.add(threading.current_thread().name)
        if event.finish:
            scheduler.submit(prompt(6), Settings(max_tokens=3), second)

    scheduler.submit(prompt(5), Settings(max_tokens=3), told)
    assert second.done.wait(30)
    assert names == {"assay-scheduler"}
    scheduler.stop()


def test_the_thread_runs_as_the_model_was_tuned():
    toy, found = Toy(), []
    set_settings(toy, threads=3)
    scheduler, client = Scheduler(CompiledBackend(toy, toy.decoder(), pages=4)), Client()

    def choose(logits, tokens):
        found.append((torch.get_num_threads(), torch.is_inference_mode_enabled()))
        return 1

    scheduler.submit([5], Settings(max_tokens=2, choose=choose), client)
    assert client.done.wait(30)
    scheduler.stop()
    assert found == [(3, True)] * 2

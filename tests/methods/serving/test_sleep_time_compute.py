"""Sleep-time compute: the agent, its ledger, store and gate, with a model made of Python that counts every token it makes."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.tiny import tiny_model

from assay.methods.serving.sleep_time_compute import (
    BUDGETS,
    FINISH,
    MEMORY_LIMIT,
    PHASES,
    RETHINK,
    Call,
    Gate,
    IdleSleeper,
    Ledger,
    Memory,
    Prices,
    Problem,
    Reply,
    SleepError,
    SleepTimeAgent,
    Store,
    Tokens,
    Words,
    amortised_cost,
    break_even,
    evaluate,
    grade,
    log_probability,
    memory_key,
    reply_of,
    split,
)

TABLE = "name,pears,plums\nAnn,3,14\nBob,4,1\nCid,9,26\nDee,2,53\n"
OTHER = TABLE.replace("Ann,3", "Ann,5")
QUESTIONS = {"sum of pears?": 18, "sum of plums?": 94, "max of pears?": 9, "count of plums?": 4}


class ToolModel:
    """Knows tables: a program in the place of a model, without noise. A word is a token, and it keeps its own count of all of them.

    Asked about a table it adds up row by row, and answers from a memory in one word. It sleeps as models with tools do.
    """

    def __init__(self, too_long_first=False, wrong=0):
        self.seen, self.counted, self.too_long_first, self.wrong = [], 0, too_long_first, wrong
        self.lock = threading.Lock()

    def __call__(self, messages, *, tools=(), temperature=0.0, seed=0, max_tokens=None):
        with self.lock:
            self.seen.append(([dict(message) for message in messages], temperature, seed))
        text = messages[1]["content"]
        said, calls = self.sleep(messages, text) if tools else (self.answer(text), ())
        words = len(said.split()) + sum(len(call.arguments.split()) for call in calls)
        if max_tokens is not None:
            said, words = " ".join(said.split()[:max_tokens]), min(words, max_tokens)
        read = sum(len(message["content"].split()) for message in messages)
        with self.lock:
            self.counted += words
        return Reply(said, words, read, calls=calls)

    def sleep(self, messages, text):
        told = messages[-1]["content"]
        if len(messages) == 2 and self.too_long_first:
            return "", (Call(RETHINK, json.dumps({"new_memory": "x" * (MEMORY_LIMIT + 1)}), "a"),)
        if told != "kept":
            memory = " ".join(f"{q} {self.work(text, q)[-1] + self.wrong}" for q in QUESTIONS)
            return "all of it", (Call(RETHINK, json.dumps({"new_memory": memory}), "b"),)
        return "", (Call(FINISH, "{}", "c"),)

    def answer(self, text):
        question = text.rpartition("Question:\n")[2]
        if question not in QUESTIONS:
            return "what?"
        known = re.search(re.escape(question) + r" (\d+)", text.rpartition("Question:")[0])
        if known:
            return known[1]
        return " ".join(map(str, self.work(text, question)))

    @staticmethod
    def work(text, question):
        kind, _, column = question.rstrip("?").split()
        table = text[text.index("name,") :].split("\n\n")[0]
        values = [int(row[column]) for row in csv.DictReader(io.StringIO(table))]
        how = {"sum": sum, "max": max, "count": len}[kind]
        return [how(values[: n + 1]) for n in range(len(values))]


def agent_of(model=None, **settings):
    return SleepTimeAgent(Store(), ToolModel() if model is None else model, **settings)


# ------------------------------------------------------------------------------------------------------------ accounting


def test_every_generated_token_is_booked_once_as_sleep_or_test():
    model = ToolModel(too_long_first=True)
    agent = agent_of(model)
    agent.prepare(TABLE)
    for question, answer in QUESTIONS.items():
        assert grade(agent.answer(question).text, str(answer))
        agent.answer(question, memory=False)
    agent.warm()
    by_phase = {phase: agent.ledger.total(phase).completion for phase in PHASES}
    assert all(by_phase.values())
    assert sum(by_phase.values()) == agent.ledger.total().completion == model.counted
    assert agent.ledger.total().calls == len(agent.ledger.entries) == len(model.seen)
    assert by_phase["sleep"] == agent.store.get(agent.key(TABLE)).sleep_tokens


def test_a_sleep_that_comes_to_nothing_is_charged_all_the_same():
    model = ToolModel()
    model.sleep = lambda messages, text: ("hm hm", (Call("unknown", "{}", "a"),))
    agent = agent_of(model, turns=3)
    with pytest.raises(SleepError, match="3 turns"):
        agent.prepare(TABLE)
    assert agent.ledger.total("sleep").completion == model.counted == 3 * 3
    assert agent.store.get(agent.key(TABLE)) is None
    said = [message["content"] for message in model.seen[-1][0] if message["role"] == "tool"]
    assert said == ["there is no tool 'unknown'"] * 2


def test_without_a_sleep_it_is_the_baseline():
    """The same messages, answers and tokens as asking the model itself."""
    asked, plain = ToolModel(), ToolModel()
    agent = agent_of(asked, budget=3)
    for question in QUESTIONS:
        by_itself = plain(Words().test(TABLE, (), question, 3))
        answer = agent.answer(question, TABLE)
        assert (answer.text, answer.completion_tokens, answer.slept) == (
            by_itself.text,
            by_itself.completion_tokens,
            False,
        )
    assert asked.seen == plain.seen
    total = agent.ledger.total()
    assert agent.ledger.total("sleep") == Tokens()
    assert amortised_cost(0, total.completion / 4, 7, t=1) == total.completion / 4
    # and an agent that has slept, told not to use it, is that baseline again
    slept = agent_of(budget=3)
    slept.prepare(TABLE)
    question = next(iter(QUESTIONS))
    slept.answer(question, memory=False)
    assert slept.chat.seen[-1] == plain.seen[0]


def test_sleeping_saves_tokens_and_pays_from_the_break_even_on():
    agent = agent_of()
    agent.prepare(TABLE)
    for question in QUESTIONS:
        agent.answer(question)
    test = agent.ledger.total("test").completion / len(QUESTIONS)
    sleep = agent.ledger.total("sleep").completion
    plain = agent_of()
    for question in QUESTIONS:
        plain.answer(question, TABLE)
    base = plain.ledger.total().completion / len(QUESTIONS)
    assert (test, base) == (1, 4)
    for t in (1.0, 10.0):
        pays = break_even(sleep, base, test, t=t)
        assert pays == pytest.approx(sleep / (t * 3))
        for queries in range(1, 40):
            cheaper = amortised_cost(sleep, test, queries, t=t) < amortised_cost(0, base, queries, t=t)
            assert cheaper == (queries > pays), (queries, pays)


@given(st.floats(0.1, 1e6), st.floats(0, 1e4), st.floats(0.1, 100), st.integers(1, 1000))
def test_the_cost_falls_with_the_questions_towards_t_times_a_test(sleep, test, t, queries):
    here, next_one = (amortised_cost(sleep, test, q, t=t) for q in (queries, queries + 1))
    assert next_one <= here
    assert here - t * test == pytest.approx(sleep / queries, abs=1e-9 * (1 + t * test))
    assert amortised_cost(sleep, test, 10**15, t=t) == pytest.approx(t * test, abs=1e-8)


def test_the_curve_is_the_formula():
    assert amortised_cost(60, 2, 3, t=10) == 60 / 3 + 20
    assert break_even(60, 14, 2) == 60 / 120
    assert break_even(60, 2, 2) == break_even(60, 1, 2) == math.inf
    assert break_even(60, 14, 2, t=0) == math.inf


def test_prices_charge_what_is_read_too():
    ledger = Ledger()
    ledger.book("sleep", Reply("", 100, 40), context="c", seconds=1.5)
    ledger.book("test", Reply("", 2, 60, 50), context="c")
    ledger.book("warm", Reply("", 1, 50), context="d")
    prices = Prices(test=10, read=0.5, cached=0.1)
    assert prices.cost(ledger.total("sleep"), "sleep") == 120
    assert prices.cost(ledger.total("test"), "test") == pytest.approx(10 * (2 + 5 + 5))
    assert prices.cost(ledger.total("warm"), "warm") == 26
    assert Prices().cost(ledger.total("test"), "test") == 20
    assert ledger.total(context="c") == Tokens(2, 102, 100, 50, 1.5)


# --------------------------------------------------------------------------------------------------------------- sleeping


def test_the_sleeper_sees_the_context_and_nothing_of_a_question():
    """Asked before and afterwards, about this context and another: no word of a question goes to a sleep."""
    model = ToolModel(too_long_first=True)
    agent = agent_of(model)
    secret = "how many pears has Zachary-9041 after the flood?"
    agent.answer(secret, TABLE)
    first = len(model.seen)
    agent.prepare(TABLE)
    agent.answer(secret)
    agent.prepare(OTHER)
    sleeps = [messages for messages, _, _ in model.seen[first:] if "Question:" not in messages[1]["content"]]
    assert len(sleeps) == 6  # too long, kept, finished: twice
    told = json.dumps(sleeps)
    words = secret.split()
    for size in (2, 3):  # no two words in a row
        assert not any(" ".join(words[n : n + size]) in told for n in range(len(words) - size + 1))
    assert "Zachary" not in told
    assert all(messages[:2] == Words().sleep(messages[1]["content"][15:]) for messages in sleeps)


def test_a_memory_holds_five_thousand_characters_and_no_more():
    model = ToolModel(too_long_first=True)
    agent = agent_of(model)
    block = agent.prepare(TABLE).blocks[0]
    assert block.startswith("sum of pears? 18")
    refused = [m["content"] for m in model.seen[1][0] if m["role"] == "tool"]
    assert refused == [f"new_memory must have at most 5000 characters, got {MEMORY_LIMIT + 1}: nothing was changed"]

    exact = "y" * MEMORY_LIMIT
    model.sleep = lambda messages, text: ("", (Call(RETHINK, json.dumps({"new_memory": exact})), Call(FINISH, "{}")))
    assert agent.prepare(OTHER).blocks == (exact,)
    plain = SleepTimeAgent(Store(), lambda messages, **_: ("z" * (MEMORY_LIMIT + 1), 3), turns=2)
    with pytest.raises(SleepError):
        plain.prepare(TABLE)
    assert plain.ledger.total("sleep").completion == 6


def test_a_later_memory_replaces_the_earlier_and_finishing_needs_one():
    turns = iter(
        [
            (Call(FINISH, "{}"),),
            (Call(RETHINK, "no JSON"), Call(RETHINK, '{"other": 1}'), Call(RETHINK, '{"new_memory": " "}')),
            (Call(RETHINK, '{"new_memory": "one"}'),),
            (Call(RETHINK, '{"new_memory": "two"}'), Call(FINISH, "{}")),
        ]
    )
    seen = []

    def chat(messages, **_):
        seen.append(messages)
        return Reply("", 1, calls=next(turns))

    assert SleepTimeAgent(Store(), chat).prepare(TABLE).blocks == ("two",)
    tools = [message["content"] for message in seen[-1] if message["role"] == "tool"]
    assert tools == [
        "there is no memory yet: call rethink_memory first",
        *["new_memory must be a text that is not empty"] * 3,
        "kept",
    ]
    spoken = [message for message in seen[-1] if message["role"] == "assistant"]
    assert [len(message["tool_calls"]) for message in spoken] == [1, 3, 1]


def test_a_model_without_tools_keeps_its_text():
    agent = SleepTimeAgent(Store(), lambda messages, **_: (" 3 + 4 = 7 ", 5))
    assert agent.prepare(TABLE) == Memory(("3 + 4 = 7",), agent.store.get(agent.key(TABLE)).made, 5)


def test_several_sleeps_make_as_many_blocks_each_with_its_seed():
    model = ToolModel()
    agent = agent_of(model, sleeps=3, temperature=0.7, seed=5)
    memory = agent.prepare(TABLE)
    assert len(memory.blocks) == 3
    assert {(t, s) for _, t, s in model.seen} == {(0.7, 5), (0.7, 6), (0.7, 7)}
    assert memory.sleep_tokens == model.counted == agent.ledger.total("sleep").completion
    agent.answer("sum of pears?")
    assert model.seen[-1][0][1]["content"].count("Memory:") == 3
    assert model.seen[-1][1] == 0  # answers are greedy
    with pytest.raises(ValueError, match="temperature"):
        agent_of(sleeps=2)


def test_of_several_sleeps_those_count_that_came_to_a_memory():
    model = ToolModel()
    real, lazy = model.__call__, {5, 7}

    def chat(messages, *, tools=(), seed=0, **rest):
        if tools and seed in lazy:
            return Reply("", 4, calls=(Call("unknown", "{}"),))
        return real(messages, tools=tools, seed=seed, **rest)

    agent = SleepTimeAgent(Store(), chat, sleeps=3, temperature=0.7, seed=5, turns=2)
    memory = agent.prepare(TABLE)
    assert len(memory.blocks) == 1
    assert memory.sleep_tokens == agent.ledger.total("sleep").completion == model.counted + 2 * 2 * 4  # all are charged
    lazy.add(6)
    with pytest.raises(SleepError, match="2 turns"):
        agent.prepare(OTHER)
    assert agent.ledger.total("sleep").completion == memory.sleep_tokens + 3 * 2 * 4
    assert agent.store.get(agent.key(OTHER)) is None


def test_what_is_wrong_in_a_memory_is_believed():
    agent = agent_of(ToolModel(wrong=1))
    agent.prepare(TABLE)
    assert agent.answer("sum of pears?").text == "19"
    assert agent.answer("sum of pears?", memory=False).text.endswith("18")


def test_a_memory_that_could_not_be_sent_is_refused():
    texts = iter(["\\ud800", "\\ud83c\\udf50 3"])
    seen = []

    def chat(messages, *, tools=(), **_):
        seen.append(messages)
        arguments = f'{{"new_memory": "{next(texts)}"}}'
        return Reply("", 1, calls=(Call(RETHINK, arguments), Call(FINISH, "{}")))

    assert SleepTimeAgent(Store(), chat).prepare(TABLE).blocks == ("\U0001f350 3",)
    assert "lone surrogate" in next(m["content"] for m in seen[1] if m["role"] == "tool")


def test_an_answer_of_another_form_is_refused_and_its_context_kept_back():
    for bad in (None, 7, "text", Reply):
        agent = SleepTimeAgent(Store(), lambda messages, bad=bad, **_: bad)
        with pytest.raises(TypeError, match="chat must return"):
            agent.prepare(TABLE)
        assert agent._at_work == {}
        assert agent.ledger.entries == ()
    for make in (
        lambda: Reply(None, 1),
        lambda: Reply(["7"], 1),
        lambda: Call("a", {"new_memory": "x"}),
        lambda: Call(None, "{}"),
        lambda: Call("a", "{}", None),
    ):
        with pytest.raises(TypeError, match="must be text"):
            make()


def test_a_context_is_slept_over_once_by_however_many_threads():
    model = ToolModel()
    agent = agent_of(model)
    gate = threading.Barrier(4)

    def work(context):
        gate.wait()
        agent.prepare(context)

    threads = [threading.Thread(target=work, args=(c,)) for c in (TABLE, TABLE, TABLE, OTHER)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(model.seen) == 4  # two sleeps of two turns
    assert agent._at_work == {}
    agent.prepare(TABLE)
    assert len(model.seen) == 4


def test_a_local_model_at_temperature_0_sleeps_and_answers_the_same_twice():
    from transformers import GenerationConfig

    model, alone = tiny_model(), threading.Lock()

    def chat(messages, *, temperature=0.0, seed=0, **_):
        text = "".join(message["content"] for message in messages)
        ids = torch.tensor([[2 + ord(c) % 90 for c in text[-60:]]])
        sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        with alone:  # torch has one stream of chance for all threads
            torch.manual_seed(seed)
            out = model.generate(ids, generation_config=GenerationConfig(max_new_tokens=6, pad_token_id=0, **sampling))
        return " ".join(map(str, out[0, ids.shape[1] :].tolist())), 6

    def run(**settings):
        agent = SleepTimeAgent(Store(), chat, **settings)
        return agent.prepare(TABLE).blocks, agent.answer("how many?").text

    assert run() == run()
    warm = {"sleeps": 2, "temperature": 2.0}
    assert run(**warm, seed=3) == run(**warm, seed=3) != run(**warm, seed=9)


# ------------------------------------------------------------------------------------------------------------------ store


def test_a_memory_belongs_to_its_context_model_and_prompts():
    agent = SleepTimeAgent(Store(), ToolModel(), model="a")
    agent.prepare(TABLE)
    assert agent.answer("sum of pears?", TABLE).slept
    assert not agent.answer("sum of pears?", OTHER).slept
    assert not agent.answer("sum of pears?", TABLE + "\n").slept
    shared = {"store": agent.store, "chat": agent.chat}
    assert SleepTimeAgent(**shared, model="a").answer("sum of pears?", TABLE).slept
    assert not SleepTimeAgent(**shared, model="b").answer("sum of pears?", TABLE).slept
    other = Words(sleeper="Think.")
    assert other.version != Words().version
    assert not SleepTimeAgent(**shared, model="a", prompts=other).answer("sum of pears?", TABLE).slept
    assert not SleepTimeAgent(**shared, model="a", temperature=0.5).answer("sum of pears?", TABLE).slept
    assert memory_key("ab", "c", "") != memory_key("a", "bc", "")


@pytest.mark.parametrize("in_folder", [False, True])
def test_memories_expire_are_forgotten_and_purged(tmp_path, in_folder):
    now = [1000.0]
    store = Store(tmp_path / "kept" if in_folder else None, seconds=60, clock=lambda: now[0])
    agent = SleepTimeAgent(store, ToolModel())
    agent.prepare(TABLE)
    now[0] += 30
    agent.prepare(OTHER)
    slept = len(agent.chat.seen)
    assert store.get(agent.key(TABLE)).made == 1000
    now[0] += 29
    agent.prepare(TABLE)
    assert len(agent.chat.seen) == slept
    now[0] += 1  # 60 s are over for the first
    assert not agent.answer("sum of pears?", TABLE).slept
    agent.prepare(TABLE)
    assert len(agent.chat.seen) > slept + 1
    now[0] += 45
    assert store.purge() == 1  # the other table's
    assert store.get(agent.key(TABLE)) is not None
    store.forget(agent.key(TABLE))
    assert store.get(agent.key(TABLE)) is None
    if in_folder:
        assert list((tmp_path / "kept").iterdir()) == []


def test_other_files_of_a_folder_are_left_alone(tmp_path):
    now = [0.0]
    store = Store(tmp_path, seconds=60, clock=lambda: now[0])
    SleepTimeAgent(store, ToolModel()).prepare(TABLE)
    (tmp_path / "notes.json").write_text("{}")
    (tmp_path / f"{'0' * 64}.json").mkdir()
    now[0] = 61
    assert store.purge() == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == [f"{'0' * 64}.json", "notes.json"]


@pytest.mark.parametrize("in_folder", [False, True])
def test_a_context_of_any_characters_is_kept(tmp_path, in_folder):
    agent = SleepTimeAgent(Store(tmp_path if in_folder else None), lambda messages, **_: ("\U0001f350 = 3", 1))
    for context in ("\U0001f350 ≥ 3\x00", "\ud800", "x" * 1_000_000):
        agent.prepare(context)
        assert agent.answer("?", context).slept


def test_a_memory_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    store = Store(tmp_path)
    agent = SleepTimeAgent(store, ToolModel())

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr("assay.paths._fsync", full)
        with pytest.raises(OSError, match="No space"):
            agent.prepare(TABLE)
    assert list(tmp_path.iterdir()) == []
    assert agent.ledger.total("sleep").completion == agent.chat.counted > 0
    agent.prepare(TABLE)
    assert agent.answer("sum of pears?").text == "18"


def test_a_folder_is_found_again_and_damaged_files_are_not_believed(tmp_path):
    SleepTimeAgent(Store(tmp_path), ToolModel()).prepare(TABLE)
    again = SleepTimeAgent(Store(tmp_path), ToolModel())
    assert again.answer("sum of pears?", TABLE).text == "18"
    (file,) = tmp_path.iterdir()
    whole = file.read_text()
    for damage in (
        "",
        "[]",
        whole[:-9],
        whole.replace('"made"', '"make"'),
        "[" * 100_000,
        '{"blocks": [1], "made": 1, "sleep_tokens": 1}',
    ):
        file.write_text(damage)
        assert not again.answer("sum of pears?", TABLE).slept
    for name in ("../up", "a" * 63, "A" * 64):
        with pytest.raises(ValueError, match="key"):
            Store(tmp_path).get(name)


# ---------------------------------------------------------------------------------------------------------------- prompts


def test_what_does_not_depend_on_the_question_stands_before_it():
    one, two = (Words().test(TABLE, ("m",), q, 0)[1]["content"] for q in ("first?", "second?"))
    same = len(one) - len("first?")
    assert one[:same] == two[:same]
    assert "m" in one[:same]
    assert TABLE in one[:same]
    assert len({Words().test(TABLE, (), "q", level)[0]["content"] for level in range(5)}) == len(BUDGETS) == 5
    warmed = Words().test(TABLE, ("m",), "", 0)
    assert one.startswith(warmed[1]["content"])


def test_the_released_form_has_the_memory_first_and_the_raw_context_too():
    told = Words("as_released").test("c.", ("m",), "q?", 0)
    assert told[1] == {"role": "user", "content": "c.q?"}
    assert told[0]["content"].endswith("Memory:\nm")
    assert Words("as_released").test("c.", (), "q?", 0)[0]["content"].endswith("[empty]")
    assert Words("as_released").version != Words().version


# -------------------------------------------------------------------------------------------------------------- data sets


def test_a_data_set_is_judged_with_all_its_tokens():
    problems = [Problem(table, q, str(a)) for table in (TABLE, OTHER) for q, a in QUESTIONS.items()]
    agent = agent_of()
    found = evaluate(agent, problems)
    assert found.right == (True,) * 4 + (False, True, True, True)  # the other table has another sum of pears
    assert found.test_tokens == 1
    assert (found.contexts, found.failed_sleeps) == (2, 0)
    assert found.sleep_tokens * 2 + 8 == agent.chat.counted
    assert found.cost(t=10) == pytest.approx((2 * found.sleep_tokens + 10 * 8) / 8)
    again = evaluate(agent, problems)
    assert (again.right, again.sleep_tokens) == (found.right, 0)  # it has slept
    plain = evaluate(agent, problems, sleep=False)
    assert (plain.right, plain.test_tokens, plain.cost(t=10)) == (found.right, 4, 40)
    assert evaluate(agent, problems, without_question=True).accuracy == 0
    with pytest.raises(ValueError, match="problems"):
        evaluate(agent, [])


# ------------------------------------------------------------------------------------------------------------------- idle


def test_contexts_are_prepared_only_while_nobody_waits():
    busy = [True]
    agent = agent_of()
    sleeper = IdleSleeper(agent, lambda: not busy[0], warm=True)
    for context in (TABLE, OTHER, TABLE):
        sleeper.add(context)
    assert len(sleeper) == 2
    assert not sleeper.step()
    assert agent.chat.seen == []
    busy[0] = False
    assert sleeper.step()
    assert agent.answer("sum of pears?", TABLE).slept
    assert not agent.answer("sum of pears?", OTHER).slept
    assert agent.ledger.total("warm").completion == 1
    assert sleeper.step()
    assert not sleeper.step()
    assert agent.answer("sum of pears?", OTHER).slept


def test_a_context_that_fails_does_not_stop_the_others():
    model = ToolModel()
    agent = agent_of(model, turns=1)
    real = model.sleep
    model.sleep = lambda messages, text: ("", (Call("odd", "{}"),)) if "Ann,5" in text else real(messages, text)
    sleeper, stop = IdleSleeper(agent, lambda: True), threading.Event()
    sleeper.add(OTHER), sleeper.add(TABLE)
    thread = threading.Thread(target=sleeper.run, args=(stop,), kwargs={"every": 0.001})
    thread.start()
    for _ in range(5000):
        if agent.store.get(agent.key(TABLE)):
            break
        stop.wait(0.002)
    stop.set()
    thread.join(5)
    assert not thread.is_alive()
    assert isinstance(sleeper.failed[OTHER], SleepError)
    assert agent.store.get(agent.key(TABLE)) is not None


def test_no_error_ends_the_sleeping_of_the_others(tmp_path):
    """A full disk, a chat function of another form, a program that is wrong: kept with its context, which may be added again."""
    errors = {"1": OSError(28, "No space left on device"), "2": KeyError("choices"), "3": MemoryError()}

    def chat(messages, **_):
        error = errors.get(messages[-1]["content"][-1])
        if error is not None:
            raise error
        return "7", 1

    agent = SleepTimeAgent(Store(), chat)
    sleeper = IdleSleeper(agent, lambda: True)
    for context in ("c1", "c2", "c3", "c4"):
        sleeper.add(context)
    assert [sleeper.step() for _ in range(5)] == [True] * 4 + [False]
    assert sleeper.failed == {f"c{n}": error for n, error in errors.items()}
    assert agent.store.get(agent.key("c4")) is not None
    errors.clear()
    sleeper.add("c2")
    assert sleeper.step()
    assert set(sleeper.failed) == {"c1", "c3"}


def test_a_context_whose_sleep_is_interrupted_waits_again():
    asked = []

    def chat(messages, **_):
        asked.append(messages[-1]["content"])
        if len(asked) == 1:
            raise KeyboardInterrupt
        return "7", 1

    agent = SleepTimeAgent(Store(), chat)
    sleeper = IdleSleeper(agent, lambda: True)
    sleeper.add("first"), sleeper.add("second")
    with pytest.raises(KeyboardInterrupt):
        sleeper.step()
    assert (len(sleeper), sleeper.failed, agent._at_work) == (2, {}, {})
    assert sleeper.step()
    assert asked[0] == asked[1] != Words().sleep("second")[-1]["content"]


# --------------------------------------------------------------------------------------------------------------- refusals


def test_bad_arguments_are_named():
    store, chat = Store(), ToolModel()
    with pytest.raises(TypeError, match="store"):
        SleepTimeAgent({}, chat)
    with pytest.raises(TypeError, match="chat"):
        SleepTimeAgent(store, "model")
    for name, value in {
        "budget": -1,
        "sleeps": 0,
        "turns": 0,
        "max_tokens": 0,
        "answer_tokens": 0,
        "temperature": float("nan"),
    }.items():
        with pytest.raises(ValueError, match=name):
            SleepTimeAgent(store, chat, **{name: value})
    agent = SleepTimeAgent(store, chat)
    with pytest.raises(ValueError, match="context must be given"):
        agent.answer("q")
    with pytest.raises(ValueError, match="context must be given"):
        agent.warm()
    with pytest.raises(TypeError, match="context"):
        agent.prepare(None)
    with pytest.raises(ValueError, match="context must not be empty"):
        agent.prepare(" ")
    agent.prepare(TABLE)
    with pytest.raises(ValueError, match="question"):
        agent.answer("")
    with pytest.raises(ValueError, match="budget must be .* at most 4"):
        agent.answer("q", budget=5)
    with pytest.raises(TypeError, match="memory"):
        agent.answer("q", memory=1)
    with pytest.raises(TypeError, match="tools"):
        SleepTimeAgent(store, chat, tools=1)
    with pytest.raises(ValueError, match="variant"):
        Words("mine")
    with pytest.raises(ValueError, match="cached_tokens"):
        Reply("", 1, 2, 3)
    with pytest.raises(ValueError, match="completion_tokens"):
        Reply("", -1)
    for bad in ("text", ("text", 1.5), (1, 1), None):
        with pytest.raises(TypeError):
            reply_of(bad)
    with pytest.raises(ValueError, match="phase"):
        Ledger().book("day", Reply("", 1))
    with pytest.raises(ValueError, match="seconds"):
        Store(seconds=0)
    with pytest.raises(ValueError, match="queries"):
        amortised_cost(1, 1, 0)
    with pytest.raises(ValueError, match="read"):
        Prices(read=-1)
    with pytest.raises(ValueError, match="as many"):
        Gate.fitted([1.0], [])
    with pytest.raises(ValueError, match="saved"):
        Gate.fitted([1.0], [float("nan")])
    with pytest.raises(ValueError, match="question_ids"):
        log_probability(tiny_model(), [1], [])
    with pytest.raises(TypeError, match="agent"):
        IdleSleeper(None, lambda: True)
    with pytest.raises(TypeError, match="idle"):
        IdleSleeper(agent, True)
    with pytest.raises(TypeError, match="problem"):
        split(3)

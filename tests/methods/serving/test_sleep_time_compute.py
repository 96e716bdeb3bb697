"""Sleep-time compute: the agent, its ledger, store and gate, with a model made of Python that counts every token it makes."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import threading
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny import tiny_model, token_ids

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
    number_in,
    pass_at_k,
    predictability,
    reply_of,
    split,
    worth_sleeping,
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


def test_what_is_wrong_in_a_memory_is_believed():
    agent = agent_of(ToolModel(wrong=1))
    agent.prepare(TABLE)
    assert agent.answer("sum of pears?").text == "19"
    assert agent.answer("sum of pears?", memory=False).text.endswith("18")


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


# ------------------------------------------------------------------------------------------------------ problems and grades

PROBLEMS = [
    ("A pear costs $1.50. Ann buys 4. How much does she pay?", "How much does she pay?"),
    ("Dr. Lee sees 3 patients at 5 p.m. each day. How many in a week?", "How many in a week?"),
    ("Bob has 2 cats. He says 'I want more!' How many has he?", "How many has he?"),
    ("If Ann has 3 pears and eats one, how many are left?", "how many are left?"),
    ("J. Smith has plan B. How many plans are there?", "How many plans are there?"),
    ("A rod is 3.5 ft. long and is cut in two. Calculate the length of a piece.", "Calculate the length of a piece."),
]


@pytest.mark.parametrize(("problem", "question"), PROBLEMS)
def test_the_question_is_the_last_sentence(problem, question):
    found = split(problem)
    assert found.question == question
    assert found.context
    assert " ".join(found).split() == problem.split()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            ["Ann has $1.50.", "Mr. Poe is 3.", "He left!", "It costs 2,000.5 dollars.", "Is it? ", "Why so..."]
        ),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from([" ", "\n", "  "]),
)
def test_context_and_question_are_the_problem(sentences, space):
    problem = space.join([*sentences, "How many are 3.5 of them?"])
    found = split(problem)
    assert found.question == "How many are 3.5 of them?"
    assert f"{found.context} {found.question}".split() == problem.split()
    numbers = re.findall(r"\d+", problem)
    assert re.findall(r"\d+", " ".join(found)) == numbers  # the answer is the same: no number was touched


def test_the_released_splitter_cuts_numbers_and_leaves_no_context():
    assert split("It costs $1.50. How much are 2?", variant="as_released") == ("It costs $1. 50.", "How much are 2?")
    assert split("How much are 2 of 3?", variant="as_released").context == "."
    assert split("One. Two.", variant="as_released") == ("One.", "Two")
    with pytest.raises(ValueError, match="context before its question"):
        split("How much are 2 of 3?")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It is 7.", 7),
        ("$1,234.50", Fraction(2469, 2)),
        ("so -3", -3),
        ("5 - 3 = 2", 2),
        ("10-4", 4),
        ("a 3/4 share...", Fraction(3, 4)),
        ("50%", 50),
        ("1. 2. 3.", 3),
        ("6 (see A4)", 6),
        ("7 pears or 1/0", 7),
        ("−$2.5", Fraction(-5, 2)),
        ("work 12 #### 1,000", 1000),
        ("0.1 + 0.2 = 0.3", Fraction(3, 10)),
        ("12,34", 34),
        ("none", None),
        ("", None),
    ],
)
def test_numbers_are_read_exactly(text, number):
    assert number_in(text) == number


@given(st.integers(-(10**6), 10**6), st.integers(0, 3))
def test_a_number_is_graded_however_it_is_written(value, zeros):
    decimals = f".{'0' * zeros}" if zeros else ""
    for text in (f"{value}", f"= {value:,}{decimals}.", f"The answer is {value}{decimals}"):
        assert grade(text, f"so it is #### {value}")
    assert not grade(f"{value + 1}", f"{value}")
    assert not grade(f"{value}.0000001", f"{value}")


def test_the_released_grader_compares_texts():
    assert grade("It is $1,200.", "#### 1200", variant="as_released")
    assert not grade("It is 3.0", "#### 3", variant="as_released")
    assert not grade("It is 3 ...", "#### 3", variant="as_released")  # the dots are its last number
    assert grade("It is 3 ...", "#### 3")
    with pytest.raises(ValueError, match="expected"):
        grade("3", "three")


def test_pass_at_k_is_the_chance_of_a_right_one():
    assert pass_at_k(10, 0, 5) == 0
    assert pass_at_k(10, 10, 1) == 1
    assert pass_at_k(10, 3, 1) == pytest.approx(0.3)
    draws = np.random.default_rng(0).permuted(np.tile([1] * 3 + [0] * 7, (20000, 1)), axis=1)[:, :4]
    assert pass_at_k(10, 3, 4) == pytest.approx(draws.any(1).mean(), abs=0.02)
    with pytest.raises(ValueError, match="k must"):
        pass_at_k(3, 1, 4)


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


def test_an_ordinary_problem_is_made_stateful():
    made = Problem.of("Ann has 3 pears. She buys 1.5 more. How many has she?", "#### 4.5")
    assert made == Problem("Ann has 3 pears. She buys 1.5 more.", "How many has she?", "#### 4.5")
    assert Problem.of("A 1.5. B?", "1", variant="as_released").context == "A 1. 5."


# ------------------------------------------------------------------------------------------------------------------- gate


def test_predictability_is_the_sum_of_the_questions_log_probabilities():
    model = tiny_model()
    ids = token_ids(1, 12)[0].tolist()
    context, question = ids[:7], ids[7:]
    by_hand = 0.0
    with torch.no_grad():
        for n, token in enumerate(question):
            by_hand += float(model(torch.tensor([context + question[:n]])).logits[0, -1].log_softmax(-1)[token])
    assert log_probability(model, context, question) == pytest.approx(by_hand, rel=1e-4)
    # what a model says itself is the most predictable
    told = model.generate(torch.tensor([context]), max_new_tokens=3, do_sample=False, pad_token_id=0)[0, 7:].tolist()
    assert log_probability(model, context, told) > log_probability(model, context, [(t + 1) % 97 for t in told])

    def tokenizer(text, add_special_tokens=True):
        return {"input_ids": ([1] if add_special_tokens else []) + [2 + ord(c) % 90 for c in text]}

    assert predictability(model, tokenizer, "abc", "why") == pytest.approx(
        log_probability(model, tokenizer("abc")["input_ids"], tokenizer(" why", False)["input_ids"])
    )


def test_the_gate_learns_that_predictable_questions_save_more():
    rng = np.random.default_rng(0)
    log_p = rng.uniform(-60, 0, 400)
    saved = np.where(log_p > -30, 12.0, 0.0) + rng.normal(0, 2, 400)
    gate = Gate.fitted(log_p.tolist(), saved.tolist())
    assert np.all(np.diff(gate.saved) >= 0)
    assert np.all(np.diff(gate.levels) > 0)
    assert gate.expects(-50) < 2
    assert gate.expects(-10) == pytest.approx(12, abs=1.5)
    assert gate.sleeps(-10, uses=10, sleep_tokens=100)
    assert not gate.sleeps(-50, uses=10, sleep_tokens=200)
    assert not gate.sleeps(-10, uses=0, sleep_tokens=1)
    assert gate.expects(-1000) == gate.saved[0]
    weighted = sum(gate.expects(p) for p in log_p) / 400
    assert weighted == pytest.approx(saved.mean(), abs=1e-6)  # pooling keeps the mean


def test_sleeping_is_worth_it_when_the_uses_outweigh_the_sleep():
    assert worth_sleeping(119, 12, 1)
    assert not worth_sleeping(120, 12, 1)
    assert not worth_sleeping(1, -5, 3)
    assert worth_sleeping(11, 12, 1, t=1)


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

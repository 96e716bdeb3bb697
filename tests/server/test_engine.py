"""The engine: what is made of a request, what fits, what is sampled, and how answers come together."""

from __future__ import annotations

import asyncio
import copy
from types import SimpleNamespace

import pytest
import torch
from tests.properties import scheduler_stand_in as stand_in
from transformers import AutoConfig, GenerationConfig

from assay.server.answer import joined
from assay.server.engine import Inbox, context_of, fingerprint, seed_of
from assay.server.errors import ApiError
from assay.server.scheduler import Stopped

# ---- a job


@pytest.fixture
def engine_of(models_of):
    """Makes the engine of a model."""
    return lambda model, tokenizer: models_of(model, tokenizer).engines()[0]


@pytest.fixture
def engine(engine_of, model, tokenizer):
    return engine_of(model, tokenizer)


def job(engine, *, chat=False, **fields):
    given = {"messages": [{"role": "user", "content": "hi"}]} if chat else {"prompt": "Hello"}
    return engine.prepare("chat/completions" if chat else "completions", given | fields)


def answers(engine, **fields):
    """All answers to a request."""
    ready, pieces = job(engine, **fields), []

    async def take():
        running = engine.start(ready)
        try:
            while batch := await running.take():
                pieces.extend(batch)
        finally:
            running.cancel()

    asyncio.run(asyncio.wait_for(take(), 60))
    return joined(pieces, len(ready.settings))


def run(engine, **fields):
    """The text, why it ended and the number of tokens of an answer."""
    (made,) = answers(engine, **fields)
    return made.text, made.finish, made.tokens


def test_greedy_is_generate(engine, model, tokenizer):
    ids = tokenizer("Hello", return_tensors="pt")["input_ids"]
    whole = model.generate(ids, attention_mask=ids * 0 + 1, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :]
    text, finish, tokens = run(engine, max_tokens=40)
    assert text == tokenizer.decode(whole, skip_special_tokens=True)
    assert (finish, tokens) == ("length", 40)


@pytest.mark.parametrize(
    ("prompt", "said", "stop", "expected"),
    [
        ("x", "Hello world again", ["lo wor"], "Hel"),
        ("END of it END", " and then more", ["END"], " and then more"),
        ("Answer:\n", "\nHello world", ["\n\n"], "\nHello world"),
        ("Q: what\nA: Us", "er: says hello. User: two", ["User:"], "er: says hello. "),
        ("x", "abc def ghi", ["ghi", "def"], "abc "),
        ("x", "abc", ["abc"], ""),
        ("x", "a b c", "<|endoftext|>", "a b c"),
    ],
)
def test_stops_are_looked_for_in_what_is_generated(engine, say, prompt, said, stop, expected):
    steps = say(said)
    text, finish, tokens = run(engine, prompt=prompt, stop=stop, max_tokens=40)
    assert (text, finish) == (expected, "stop")
    assert tokens <= steps
    assert (tokens < steps) == (expected != said)  # what comes after a stop is not computed


def test_a_stop_may_be_a_special_token(engine, model, tokenizer, say):
    say("one two")
    model.script.insert(1, tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    text, finish, tokens = run(engine, stop=["<|endoftext|>"], max_tokens=40)
    assert (finish, tokens) == ("stop", 2)
    assert "one two".startswith(text)


def test_the_end_token_on_the_limit_is_an_end(engine, say):
    steps = say("one two three")
    assert run(engine, max_tokens=steps) == ("one two three", "stop", steps)
    say("one two three")
    assert run(engine, max_tokens=steps - 1) == ("one two three", "length", steps - 1)


def test_ends_may_be_ignored_or_put_off(engine, model, say):
    steps = say("one two")
    assert run(engine, max_tokens=steps + 5, ignore_eos=True)[1:] == ("length", steps + 5)
    say("one two")
    model.script = model.script[-1:]  # nothing but the end
    assert run(engine, max_tokens=9, min_tokens=4)[1:] == ("stop", 5)


# ---- sampling


def first_tokens(engine, count, **fields):
    return {run(engine, max_tokens=1, ignore_eos=True, **fields)[0] for _ in range(count)}


@pytest.fixture
def flat(model):
    """The tiny model, all its tokens about equally likely, with a configuration that asks for something else."""
    flat = copy.deepcopy(model)
    torch.nn.init.normal_(flat.lm_head.weight, std=1e-4)
    flat.generation_config = GenerationConfig(
        do_sample=True,
        top_k=3,
        temperature=0.1,
        repetition_penalty=5.0,
        eos_token_id=2,
        suppress_tokens=[5],
        num_beams=2,
    )
    return flat


def test_sampling_is_from_the_whole_distribution(engine_of, flat, tokenizer):
    made = first_tokens(engine_of(flat, tokenizer), 150, temperature=1.0)
    assert len(made) > 60  # of 512; a top_k of 50 cannot give so many
    assert flat.generation_config.top_k == 3  # the model is left as it was


def test_greedy_is_greedy_whatever_the_configuration_says(engine_of, flat, tokenizer):
    engine = engine_of(flat, tokenizer)
    assert len(first_tokens(engine, 5)) == 1
    assert len(first_tokens(engine, 5, temperature=1e-300)) == 1
    assert len(first_tokens(engine, 5, temperature=2, top_p=0)) == 1
    with torch.inference_mode():
        best = int(flat(torch.tensor([tokenizer("Hello")["input_ids"]])).logits[0, -1].argmax())
    assert first_tokens(engine, 1) == {tokenizer.decode([best])}


def test_top_p_keeps_the_nucleus(engine_of, model, tokenizer):
    engine = engine_of(model, tokenizer)
    with torch.inference_mode():
        logits = model(torch.tensor([tokenizer("Hello")["input_ids"]])).logits[0, -1]
    order = (logits / 2.0).softmax(-1).sort(descending=True)
    count = int((order.values.cumsum(0) < 0.02).sum()) + 1
    nucleus = {tokenizer.decode([int(token)]) for token in order.indices[:count]}
    drawn = first_tokens(engine, 60, temperature=2.0, top_p=0.02)
    assert drawn <= nucleus
    assert 1 < len(drawn) < 30


def test_a_seed_gives_the_same_again_and_no_seed_does_not(engine_of, flat, tokenizer):
    engine = engine_of(flat, tokenizer)
    options = {"temperature": 1.0, "max_tokens": 6, "ignore_eos": True}
    before = torch.get_rng_state()
    seeded = [run(engine, seed=7, **options), run(engine, **options), run(engine, seed=7, **options)]
    assert seeded[0] == seeded[2] != seeded[1]
    assert run(engine, seed=8, **options) != seeded[0]
    assert run(engine, seed=2**64 - 1, **options)
    assert run(engine, seed=-(2**63), **options)  # the least that OpenAI allows
    assert len({run(engine, **options)[0] for _ in range(4)}) == 4
    assert torch.equal(torch.get_rng_state(), before)


# ---- what fits


def refused(engine, **fields):
    with pytest.raises(ApiError) as caught:
        job(engine, **fields)
    assert caught.value.status == 400
    return caught.value


def test_prompt_and_answer_stay_within_the_context(engine, tokenizer):
    assert engine.context == 2048
    assert job(engine, prompt=[5] * 2047).settings[0].max_tokens == 1
    assert job(engine, prompt=[5] * 1900).settings[0].max_tokens == 148
    assert job(engine, prompt=[5]).settings[0].max_tokens == 256
    assert job(engine, prompt=[5] * 2000, max_tokens=48).settings[0].max_tokens == 48
    for fields in ({"prompt": [5] * 2048}, {"prompt": [5] * 2000, "max_tokens": 49}, {"max_tokens": 10**30}):
        error = refused(engine, **fields)
        assert (error.param, error.code) == ("prompt", "context_length_exceeded")
    assert refused(engine, prompt=[[5], [5] * 2048]).param == "prompt"
    whole = job(engine, prompt=[5] * 2048, max_tokens=0, echo=True, logprobs=0)  # a prompt that is only scored fits too
    assert whole.settings[0].max_tokens == 0
    assert "no tokens" in refused(engine, prompt=[[]]).message
    assert refused(engine, min_tokens=5, max_tokens=4).param == "min_tokens"


@pytest.mark.parametrize(
    ("kind", "fields", "expected"),
    [
        ("gpt2", {"n_positions": 128}, 128),
        ("llama", {"max_position_embeddings": 256}, 256),
        ("mpt", {"max_seq_len": 64}, 64),
        ("mamba", {}, 2048),
    ],
)
def test_the_context_of_a_model(kind, fields, expected):
    config = AutoConfig.for_model(kind, **fields)
    assert context_of(config, SimpleNamespace(model_max_length=10**30)) == expected


def test_a_mamba_takes_the_context_of_its_tokenizer():
    assert context_of(AutoConfig.for_model("mamba"), SimpleNamespace(model_max_length=512)) == 512


def test_learned_positions_are_not_passed(engine_of, tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=64)
    engine = engine_of(GPT2LMHeadModel(config).eval(), tokenizer)
    assert run(engine, prompt=[5] * 60, max_tokens=4, ignore_eos=True)[1:] == ("length", 4)
    assert run(engine, prompt=[5] * 60, ignore_eos=True)[1:] == ("length", 4)
    assert refused(engine, prompt=[5] * 60, max_tokens=5)


def test_a_long_prompt_is_refused_before_it_is_tokenised(engine):
    engine._reads_with = None  # whoever calls it fails
    error = refused(engine, prompt="x" * 1_000_000)
    assert error.code == "context_length_exceeded"


def test_token_ids_lie_in_the_models_vocabulary(engine_of, tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    small = LlamaForCausalLM(
        LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    ).eval()
    engine = engine_of(small, tokenizer)
    for ids in ([-1], [300], [5, 10**30]):
        assert refused(engine, prompt=ids).param == "prompt"
    assert (
        "299" in refused(engine, prompt="function statement expression", max_tokens=1).message
    )  # the tokenizer knows 512
    assert run(engine, prompt=[0, 299], max_tokens=2)[2] == 2


def test_ends_lie_in_the_models_vocabulary(engine_of, tokenizer):
    """A tokenizer and a configuration may name tokens that the model has no row for."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    small = LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes)).eval()
    small.generation_config.eos_token_id = [2, 300, 511]
    engine = engine_of(small, tokenizer)
    engine._reads_with.add_tokens(["<|beyond|>"])
    assert engine._reads_with.get_added_vocab()["<|beyond|>"] >= 300
    ends = job(engine, prompt=[5], stop=["<|beyond|>"], max_tokens=2).settings[0].ends
    assert 2 in ends
    assert max(ends) < 300


def test_a_model_may_know_more_tokens_than_its_tokenizer(engine_of, tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    wide = LlamaForCausalLM(
        LlamaConfig(vocab_size=4000, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    ).eval()
    assert run(engine_of(wide, tokenizer), max_tokens=20, temperature=2.0, ignore_eos=True)[1:] == ("length", 20)


# ---- chats


def test_a_chat_goes_through_the_template(engine, tokenizer):
    turns = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
    expected = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert job(engine, chat=True, messages=[{**turns[0], "role": "developer"}, turns[1]]).prompts == [expected]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system here, please') }}", "no system here, please"),
        ("{% for m in messages %}{{ m.missing.more }}{% endfor %}", "no attribute"),
        ("{{ 1 + messages }}", "TypeError"),
        ("{% syntax error", "chat template refuses"),
    ],
)
def test_a_template_may_refuse(engine, template, message):
    engine._reads_with.chat_template = template
    error = refused(engine, chat=True)
    assert (error.param, message in error.message) == ("messages", True)


def test_a_model_without_a_template_has_no_chats(engine):
    engine._reads_with.chat_template = None
    assert "/v1/completions" in refused(engine, chat=True).message


TOOL_TEMPLATE = (
    "{% for tool in tools or [] %}{{ 'may call ' + (tool | tojson) + '\n' }}{% endfor %}"
    "{% for m in messages %}{{ m.role + ': ' + m.content }}"
    "{% for call in m.tool_calls or [] %}{{ 'calls ' + (call.function | tojson) }}{% endfor %}{{ '\n' }}{% endfor %}"
)
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]


def test_tools_go_through_the_template(engine, tokenizer):
    engine._reads_with.chat_template = TOOL_TEMPLATE
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "2"},
    ]
    (ids,) = job(engine, chat=True, tools=TOOLS, messages=turns).prompts
    text = tokenizer.decode(ids)
    assert text.startswith('may call {"type": "function", "function": {"name": "add"')
    assert 'calls {"name": "add", "arguments": {"a": 1}}' in text  # an object, not a string of one
    assert text.endswith("tool: 2\n")
    (ids,) = job(engine, chat=True, tools=TOOLS, tool_choice="none").prompts
    assert tokenizer.decode(ids) == "user: hi\n"


def test_a_template_without_tools_refuses_them_by_name(engine):
    error = refused(engine, chat=True, tools=TOOLS)
    assert (error.param, error.code) == ("tools", "unsupported_parameter")
    answered = [{"role": "user", "content": "hi"}, {"role": "tool", "tool_call_id": "c", "content": "2"}]
    error = refused(engine, chat=True, messages=answered)
    assert (error.param, error.code) == ("messages[1]", "unsupported_parameter")
    assert job(engine, chat=True, tools=TOOLS, tool_choice="none")


def test_a_prompt_may_be_bounded_below_the_context(engine):
    body = {"prompt": [5] * 11}
    assert engine.prepare("completions", body, 11)
    with pytest.raises(ApiError) as caught:
        engine.prepare("completions", body, 10)
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**64 - 1])
def test_a_seed_of_an_answer_in_a_form_may_be_negative(engine, seed):
    """OpenAI's seeds are whole numbers of 64 bits with a sign."""
    form = {"type": "json_schema", "json_schema": {"name": "c", "schema": {"enum": ["red", "green", "blue"]}}}
    asked = {"messages": [{"role": "user", "content": "hi"}], "response_format": form, "seed": seed, "temperature": 1.0}
    made = [engine.prepare("chat/completions", asked).settings[0] for _ in range(2)]
    flat = torch.zeros(engine.vocabulary)
    assert made[0].choose(flat, []) == made[1].choose(flat, [])


def test_an_answer_in_a_form_takes_the_most_probable_token_at_a_top_p_of_zero(engine):
    form = {"type": "json_schema", "json_schema": {"name": "c", "schema": {"enum": ["red", "green", "blue"]}}}
    asked = {"messages": [{"role": "user", "content": "hi"}], "response_format": form, "temperature": 2.0, "top_p": 0}
    made = engine.prepare("chat/completions", asked).settings[0]
    scores = torch.randn(engine.vocabulary, generator=torch.Generator().manual_seed(0))
    assert len({made.choose(scores, []) for _ in range(9)}) == 1


def test_a_model_without_an_end_has_no_answers_in_a_form(engine):
    engine.ends = set()
    form = {"type": "json_object"}
    error = refused(engine, chat=True, response_format=form)
    assert (error.param, "end" in error.message) == ("response_format", True)
    given = {"input": "hi", "text": {"format": form}}
    with pytest.raises(ApiError) as caught:
        engine.prepare("responses", given)
    assert caught.value.param == "text.format"


@pytest.mark.parametrize("parameters", [{"title": "\ud800"}, {"properties": {"\udfff": {}}}])
def test_half_a_character_in_a_tool_is_refused(engine, parameters):
    engine._reads_with.chat_template = "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", **parameters}}}
    error = refused(engine, chat=True, tools=[tool])
    assert (error.param, "surrogate" in error.message) == ("messages", True)


# ---- several answers


def test_answers_to_one_prompt_draw_from_seeds_of_their_own(engine):
    made = answers(engine, n=4, temperature=1.5, seed=7, max_tokens=8, ignore_eos=True)
    texts = [one.text for one in made]
    assert len(set(texts)) == 4
    assert texts == [one.text for one in answers(engine, n=4, temperature=1.5, seed=7, max_tokens=8, ignore_eos=True)]
    assert texts[0] == run(engine, temperature=1.5, seed=7, max_tokens=8, ignore_eos=True)[0]


def test_seeds():
    assert seed_of(7, 0) == 7
    assert seed_of(2**64 - 1, 0) == 2**64 - 1
    assert len({seed_of(seed, answer) for seed in (7, 8) for answer in range(50)}) == 99 + 1
    assert seed_of(7, 3) == seed_of(7, 3)
    assert all(0 <= seed_of(given, answer) < 2**63 for given in (None, 5, -(2**63)) for answer in (1, 2))
    assert seed_of(None, 0) != seed_of(None, 0)


def test_log_probabilities_are_in_step_with_the_text(engine, say):
    """A piece says of its tokens what it says as text; those after a stop are never told."""
    say("one two three four")
    (made,) = answers(engine, logprobs=2, max_tokens=40, stop=["three"])
    assert made.text == "one two "
    shown = [engine.shown(one.info.token)[0] for one in made.scored]
    assert "".join(shown).startswith("one two")
    assert [made.text[: one.at] for one in made.scored] == ["".join(shown[:i]) for i in range(len(shown))]
    assert all(len(one.info.top) == 2 for one in made.scored)


def test_a_token_of_half_a_character_has_bytes(engine, tokenizer):
    lone = tokenizer.convert_tokens_to_ids("Ł")
    assert engine.shown(lone) == ("bytes:\\x9f", b"\x9f")
    assert engine.shown(tokenizer.eos_token_id)[0] == "<|im_end|>"


# ---- between the threads


def test_an_inbox_wakes_once_for_all_that_came():
    calls = []

    async def take():
        loop = asyncio.get_running_loop()
        told = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda *given: (calls.append(given), told(*given))
        inbox = Inbox(loop)
        for number in range(5):
            inbox.put(number, stand_in.Event())
        first = [number for number, _, _ in await inbox.take()]
        await asyncio.to_thread(inbox.put, 9, stand_in.Event())
        return first, [number for number, _, _ in await inbox.take()], inbox

    first, second, inbox = asyncio.run(take())
    assert (first, second) == ([0, 1, 2, 3, 4], [9])
    inbox.put(1, stand_in.Event())  # its loop has closed: nobody is there, and nothing fails


def test_what_the_scheduler_does_not_take_is_told(engine, monkeypatch):
    raised = []

    def submit(*given):
        raise raised[-1]

    monkeypatch.setattr(engine.scheduler, "submit", submit)
    for error, status, code in (
        (ValueError("too long for 10 pages"), 400, "context_length_exceeded"),
        (Stopped("stopping"), 503, "stopping"),
        (MemoryError(), 503, "overloaded"),
    ):
        raised.append(error)
        with pytest.raises(ApiError) as caught:
            answers(engine)
        assert (caught.value.status, caught.value.code) == (status, code)
    raised.append(RuntimeError("a fault of the server"))  # torch's own, say
    with pytest.raises(RuntimeError, match="a fault of the server"):
        answers(engine)
    assert not engine.inboxes


def test_what_ends_an_answer_on_its_way_is_told(engine, monkeypatch):
    raised = []

    def broken(*given):
        raise raised[-1]

    monkeypatch.setattr(type(engine.scheduler), "_next", broken)
    for error, status, code in (
        (Stopped("stopping"), 503, "stopping"),
        (MemoryError(), 503, "overloaded"),
        (FloatingPointError("the model's logits are not finite"), 500, "not_finite"),
    ):
        raised.append(error)
        with pytest.raises(ApiError) as caught:
            answers(engine)
        assert (caught.value.status, caught.value.code) == (status, code)
        assert not caught.value.message.startswith("the server failed")
    assert not engine.inboxes


def test_what_goes_wrong_leaves_the_engine_usable(engine, model, monkeypatch):
    monkeypatch.setattr(type(model), "forward", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(engine)
    monkeypatch.undo()
    assert run(engine, max_tokens=2)[1:] == ("length", 2)


# ---- what it is


def test_the_fingerprint_is_that_of_the_weights_and_the_recipe(model):
    known = fingerprint(model)
    assert known == fingerprint(copy.deepcopy(model))
    assert known != fingerprint(model, "a recipe")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.add_(1)
    assert fingerprint(other) != known
    assert fingerprint(other.bfloat16()) != known

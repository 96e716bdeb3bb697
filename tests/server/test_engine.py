"""The engine: text and stops piece by piece, what is sampled, what fits, and that nobody computes for a client who has left."""

from __future__ import annotations

import copy
import json
import random
from types import SimpleNamespace

import pytest
import torch
from clients import eventually
from tests.properties.architectures import CAUSAL, build
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerFast

from assay.server.engine import Cancelled, Engine, Stops, Text, _layers, context_of
from assay.server.protocol import STOP_CHARACTERS, ApiError

# ---- text


def byte_fallback_tokenizer():
    """A SentencePiece-like tokenizer: a few words, and bytes for everything else."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    words = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdeHloW", "▁a", "▁b"]
    backend = Tokenizer(
        models.BPE(
            {word: i for i, word in enumerate(words)},
            [("▁", "a"), ("▁", "b")],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


WORDS = "Hello, wörld! 你好 こんにちは 👩‍👩‍👧 é  two  spaces\n\n\tab a b 🙂🙂 end ab" + "🙂" * 40


@pytest.mark.parametrize("fallback", [False, True])
def test_pieces_of_text_are_the_whole_text(tokenizer, fallback):
    tokenizer = byte_fallback_tokenizer() if fallback else tokenizer
    ids = tokenizer(WORDS, add_special_tokens=False)["input_ids"]
    assert len(ids) > 100
    for start in (0, 1, 5):
        text = Text(tokenizer, ids[:start])
        pieces = [text.add(token) for token in ids[start:]]
        before = tokenizer.decode(ids[:start], skip_special_tokens=True)
        assert before + "".join(pieces) + text.rest() == tokenizer.decode(ids)
        assert not any("\ufffd" in piece for piece in pieces)
        assert len(text.window) < 40


def test_a_space_after_the_prompt_is_kept():
    tokenizer = byte_fallback_tokenizer()
    text = Text(tokenizer, tokenizer("a", add_special_tokens=False)["input_ids"])
    assert text.add(tokenizer.convert_tokens_to_ids("▁b")) == " b"


def test_broken_bytes_are_given_and_cost_no_more_with_length(tokenizer):
    rng = random.Random(0)
    ids = [rng.randrange(3, len(tokenizer)) for _ in range(400)]
    text = Text(tokenizer, [])
    assert "".join(map(text.add, ids)) + text.rest() == tokenizer.decode(ids)
    lone = tokenizer.convert_tokens_to_ids("Ł")  # the byte 0x81: never a character by itself
    text = Text(tokenizer, [])
    longest, given = 0, 0
    for _ in range(500):
        given += len(text.add(lone))
        longest = max(longest, len(text.window))
    assert (given + len(text.rest()), longest < 40) == (500, True)


@pytest.mark.parametrize("silent", [1, 12])
def test_tokens_without_text_take_no_space_from_the_next(silent):
    """As a model says that is asked to ignore its end token."""
    fallback = byte_fallback_tokenizer()
    word, space = fallback.convert_tokens_to_ids(["b", "▁b"])
    text = Text(fallback, [word])
    said = [text.add(token) for token in [space, *[fallback.eos_token_id] * silent, space, *[word] * 9, space]]
    assert "".join(said) + text.rest() == " b bbbbbbbbbb b"
    assert len(text.window) < 40


# ---- stops


def cut(text, cuts, stops):
    found, ends = Stops(stops), (0, *cuts, len(text))
    said = "".join(found.add(text[a:b]) for a, b in zip(ends, ends[1:], strict=False))
    return said + found.rest(), found.met


@pytest.mark.parametrize("cuts", [(), (1,), (2, 3), (1, 2, 3, 4, 5)])
@pytest.mark.parametrize(
    ("stops", "expected", "met"),
    [
        ((), "abcabd", False),
        (("abd",), "abc", True),
        (("bd", "c"), "ab", True),
        (("x",), "abcabd", False),
        (("bdx",), "abcabd", False),
        (("abdx", "d"), "abcab", True),
        (("abca", "bc"), "a", True),  # the one that is whole first, though the other begins before it
        (("c", "bc"), "a", True),  # whole at once: the longer
        (("abcab", "b"), "a", True),
    ],
)
def test_stops_are_found_however_the_text_is_cut(cuts, stops, expected, met):
    assert cut("abcabd", cuts, stops) == (expected, met)


def test_a_stop_holds_back_no_more_than_itself():
    stops = Stops(("a" * STOP_CHARACTERS,))
    said = "".join(stops.add("a" * 7) for _ in range(100)) + stops.add("b")
    assert said == "a" * 700 + "b"
    assert stops.held == ""


# ---- a job


@pytest.fixture
def engine(model, tokenizer):
    return Engine(model, tokenizer, "tiny")


def job(engine, *, chat=False, **fields):
    given = {"messages": [{"role": "user", "content": "hi"}]} if chat else {"prompt": "Hello"}
    return engine.prepare(json.dumps(given | fields).encode(), chat)


def run(engine, **fields):
    """The text, why it ended and the number of tokens of an answer."""
    pieces = []
    engine._run(job(engine, **fields), pieces.append)
    return "".join(piece.text for piece in pieces), pieces[-1].finish, pieces[-1].tokens


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


def test_sampling_is_from_the_whole_distribution(flat, tokenizer):
    made = first_tokens(Engine(flat, tokenizer, "flat"), 150, temperature=1.0)
    assert len(made) > 60  # of 512; a top_k of 50 cannot give so many
    assert flat.generation_config.top_k == 3  # the model is left as it was


def test_greedy_is_greedy_whatever_the_configuration_says(flat, tokenizer):
    engine = Engine(flat, tokenizer, "flat")
    assert len(first_tokens(engine, 5)) == 1
    assert len(first_tokens(engine, 5, temperature=1e-300)) == 1
    assert len(first_tokens(engine, 5, temperature=2, top_p=0)) == 1
    with torch.inference_mode():
        best = int(flat(torch.tensor([tokenizer("Hello")["input_ids"]])).logits[0, -1].argmax())
    assert first_tokens(engine, 1) == {tokenizer.decode([best])}


def test_top_p_keeps_the_nucleus(model, tokenizer):
    engine = Engine(model, tokenizer, "tiny")
    with torch.inference_mode():
        logits = model(torch.tensor([tokenizer("Hello")["input_ids"]])).logits[0, -1]
    order = (logits / 2.0).softmax(-1).sort(descending=True)
    count = int((order.values.cumsum(0) < 0.02).sum()) + 1
    nucleus = {tokenizer.decode([int(token)]) for token in order.indices[:count]}
    drawn = first_tokens(engine, 60, temperature=2.0, top_p=0.02)
    assert drawn <= nucleus
    assert 1 < len(drawn) < 30


def test_a_seed_gives_the_same_again_and_no_seed_does_not(flat, tokenizer):
    engine = Engine(flat, tokenizer, "flat")
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
    assert job(engine, prompt=[5] * 2047).new_tokens == [1]
    assert job(engine, prompt=[5] * 1900).new_tokens == [148]
    assert job(engine, prompt=[5]).new_tokens == [256]
    assert job(engine, prompt=[5] * 2000, max_tokens=48).new_tokens == [48]
    for fields in ({"prompt": [5] * 2048}, {"prompt": [5] * 2000, "max_tokens": 49}, {"max_tokens": 10**30}):
        error = refused(engine, **fields)
        assert (error.param, error.code) == ("prompt", "context_length_exceeded")
    assert refused(engine, prompt=[[5], [5] * 2048]).param == "prompt"
    assert refused(engine, prompt=[[]]).message == "the prompt has no tokens"
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


def test_learned_positions_are_not_passed(tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=64)
    engine = Engine(GPT2LMHeadModel(config).eval(), tokenizer, "gpt2")
    assert run(engine, prompt=[5] * 60, max_tokens=4, ignore_eos=True)[1:] == ("length", 4)
    assert run(engine, prompt=[5] * 60, ignore_eos=True)[1:] == ("length", 4)
    assert refused(engine, prompt=[5] * 60, max_tokens=5)


def test_a_long_prompt_is_refused_before_it_is_tokenised(engine):
    engine._reads_with = None  # whoever calls it fails
    error = refused(engine, prompt="x" * 1_000_000)
    assert error.code == "context_length_exceeded"


def test_token_ids_lie_in_the_models_vocabulary(tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    small = LlamaForCausalLM(
        LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    ).eval()
    engine = Engine(small, tokenizer, "small")
    for ids in ([-1], [300], [5, 10**30]):
        assert refused(engine, prompt=ids).param == "prompt"
    assert (
        "299" in refused(engine, prompt="function statement expression", max_tokens=1).message
    )  # the tokenizer knows 512
    assert run(engine, prompt=[0, 299], max_tokens=2)[2] == 2


def test_a_model_may_know_more_tokens_than_its_tokenizer(tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    wide = LlamaForCausalLM(
        LlamaConfig(vocab_size=4000, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    ).eval()
    assert run(Engine(wide, tokenizer, "wide"), max_tokens=20, temperature=2.0, ignore_eos=True)[1:] == ("length", 20)


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


# ---- leaving


def leaving_after(engine, made, tokens):
    """A job whose client leaves after so many pieces; how often the model was called."""
    going = job(engine, max_tokens=1000, ignore_eos=True)

    def emit(piece):
        made.append(piece)
        going.left = len(made) >= tokens

    with pytest.raises(Cancelled):
        engine._run(going, emit)


def test_generation_ends_with_the_next_token(engine, model):
    made = []
    leaving_after(engine, made, 3)
    assert len(made) == 3
    assert model.forwards < 20  # some tokens are no whole character


def test_a_long_prompt_is_left_between_two_layers(engine, model):
    going = job(engine)
    seen = []
    layers = model.model.layers
    handles = [layer.register_forward_hook(lambda *_, i=i: seen.append(i)) for i, layer in enumerate(layers)]
    handles.append(layers[0].register_forward_hook(lambda *_: setattr(going, "left", True)))
    try:
        with pytest.raises(Cancelled):
            engine._run(going, lambda piece: None)
    finally:
        for handle in handles:
            handle.remove()
    assert seen == [0]
    assert not any(layer._forward_pre_hooks for layer in layers)


@pytest.mark.parametrize("name", CAUSAL)
def test_every_architecture_is_served_to_its_last_position_and_left_amid_a_prompt(name, tokenizer):
    served = build(name).eval()
    engine, ran = Engine(served, tokenizer, name), []
    assert engine.vocabulary == 160
    long = [5] * (engine.context - 2)
    assert run(engine, prompt=long, max_tokens=2, ignore_eos=True, temperature=1)[1:] == ("length", 2)
    assert refused(engine, prompt=long, max_tokens=3)
    going = job(engine, prompt=[5] * 9)
    for layer in _layers(served):
        layer.register_forward_hook(lambda *_: (ran.append(0), setattr(going, "left", True))[0])
    with pytest.raises(Cancelled):
        engine._run(going, print)
    assert len(ran) == 1


def test_what_is_compiled_is_not_watched_from_within(model):
    layers = list(model.model.layers)
    assert list(_layers(model)) == layers
    parts = copy.deepcopy(model)
    parts.model.layers[0].mlp.compile(backend="eager")
    assert len(list(_layers(parts))) == len(layers)
    parts.model.layers[1].compile(backend="eager")
    assert list(_layers(parts)) == [parts.model.layers[0]]
    parts.compile(backend="eager")
    assert list(_layers(parts)) == []


@pytest.fixture
def looped(model):
    """The tiny model with the compiled decode loop."""
    from transformers import LlamaForCausalLM

    from assay.methods.builtin.decode_loop import transform
    from assay.methods.transform import TuneContext

    plain = LlamaForCausalLM(model.config).eval()
    plain.load_state_dict(model.state_dict())
    context = TuneContext(goal="decode", prompt_tokens=8, new_tokens=8)
    return transform.apply(plain, {"weights": "fp32", "cache": "float32"}, context)


def counted(looped, monkeypatch):
    """The steps that the compiled loop is asked for, and whether transformers' own loop ran."""
    steps, decoder = [], looped.decode_loop
    original = decoder.run
    monkeypatch.setattr(decoder, "run", lambda *args, **kw: (steps.append(args[3]), original(*args, **kw))[1])
    return steps


def test_the_compiled_loop_serves_the_same_and_can_be_left(looped, model, tokenizer, monkeypatch):
    engine, steps = Engine(looped, tokenizer, "looped"), counted(looped, monkeypatch)
    assert run(engine, max_tokens=20, ignore_eos=True) == run(
        Engine(model, tokenizer, "x"), max_tokens=20, ignore_eos=True
    )
    assert sum(steps) == 19
    steps.clear()
    leaving_after(engine, [], 3)
    assert 0 < sum(steps) < 20


def test_the_compiled_loop_stops_samples_and_repeats(looped, tokenizer, monkeypatch):
    engine, steps = Engine(looped, tokenizer, "looped"), counted(looped, monkeypatch)
    whole = run(engine, max_tokens=60, ignore_eos=True)[0]
    stop = whole[len(whole) // 2 :][:2]
    steps.clear()
    text, finish, tokens = run(engine, max_tokens=60, ignore_eos=True, stop=stop)
    assert (text, finish) == (whole[: whole.find(stop)], "stop")
    assert sum(steps) + 1 == tokens < 60
    options = {"temperature": 1.5, "max_tokens": 12, "ignore_eos": True}
    assert run(engine, seed=3, **options) == run(engine, seed=3, **options) != run(engine, seed=4, **options)


def test_what_goes_wrong_leaves_the_engine_usable(engine, model, monkeypatch):
    monkeypatch.setattr(type(model), "generate", lambda *a, **k: 1 / 0)
    own = model.generation_config
    with pytest.raises(ZeroDivisionError):
        engine._run(job(engine), print)
    monkeypatch.undo()
    assert model.generation_config is own
    assert run(engine, max_tokens=2)[1:] == ("length", 2)
    assert eventually(lambda: not any(layer._forward_pre_hooks for layer in model.model.layers))

"""HAMburger as a transformers model: generation in all its forms, the cache, storing, serving, and what is really saved."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.properties import architectures
from tests.tiny import tiny_model, token_ids
from transformers import AutoModelForCausalLM, DynamicCache

from assay.methods.builtin.speculation import Counts, ModelEngine, speculate
from assay.methods.core.generation.cache import position_ids
from assay.methods.inference.hamburger import GroupDrafter, HamburgerCache, HamburgerForCausalLM, decode, group_ids
from assay.server.backends import backend_for


def grafted(base=None, *, seed=1, **settings):
    base = tiny_model() if base is None else base
    torch.manual_seed(seed)
    chosen = {"micro_layers": 2, "merger_heads": 4, "confidence": None, **settings}
    return HamburgerForCausalLM.from_base(base, **chosen)


def balanced(model, ids=None):
    """The stop head moved and scaled so that groups of every size occur: an untrained one may say the same everywhere, for certain."""
    ids = token_ids(2, 24, seed=9) if ids is None else ids
    with torch.no_grad():
        stops = model(ids, groups=group_ids([1] * 8 + [2, 3, 2, 3, 3, 3]).expand(len(ids), -1)).stop_logits
        last, spread = model.micro.stop_head[-1], stops[:, 8:].std() / 1.5
        last.bias.sub_(stops[:, 8:].quantile(0.4)).div_(spread)
        last.weight.div_(spread)
    return model


def stepped(model, ids, prompt, attention_mask=None):
    """The logits behind each token of the rows, one token at a time behind the prompt; and the cache."""
    more = {}
    if attention_mask is not None:
        more = {"attention_mask": attention_mask[:, :prompt], "position_ids": position_ids(attention_mask)[:, :prompt]}
    out = model(ids[:, :prompt], use_cache=True, **more)
    made = [out.logits]
    for place in range(prompt, ids.shape[1]):
        out = model(ids[:, place : place + 1], cache=out.cache)
        made.append(out.logits)
    return torch.cat(made, 1), out.cache


def apart(found, expected):
    """The largest difference, relative to the largest number: what micro steps give has no norm, and may be large."""
    return float((found - expected).abs().max() / expected.abs().max())


def padded(lengths, seed=0):
    """Left-padded prompts and their mask."""
    width = max(lengths)
    ids = token_ids(len(lengths), width, seed=seed)
    mask = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()
    return ids.masked_fill(mask == 0, 0), mask


# ------------------------------------------------------------------------------------------------- steps equal teacher forcing


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "gemma3", "qwen2", "phi3"])
@torch.no_grad()
def test_steps_are_teacher_forcing(kind):
    """Row by row, in the groups that the stop head made; with windows shorter than the text, which count tokens."""
    base = architectures.build(kind)
    ids = architectures.inputs(kind, batch=3, tokens=40)["input_ids"]
    model = grafted(base, merger_heads=4)
    for parameter in model.micro.stop_head.parameters():
        parameter.mul_(4)
    balanced(model, ids[:, :24])
    logits, cache = stepped(model, ids, 6)
    sizes = [cache.groups(row) for row in range(3)]
    assert len({tuple(s) for s in sizes}) > 1
    assert {size for s in sizes for size in s} >= {1, 2}
    forced = model(ids, groups=torch.stack([group_ids(s) for s in sizes])).logits
    assert apart(logits[:, :-1], forced[:, :-1]) < 1e-4  # the last group may be open yet


@torch.no_grad()
def test_steps_are_teacher_forcing_in_double():
    model = balanced(grafted(tiny_model(num_hidden_layers=3).double(), confidence=0.3))
    ids = token_ids(8, 40, seed=6)
    logits, cache = stepped(model, ids, 5)
    groups = torch.stack([group_ids(cache.groups(row)) for row in range(8)])
    sizes = {size for row in range(8) for size in cache.groups(row)}
    assert sizes == {1, 2, 3, 4}
    assert apart(logits[:, :-1], model(ids, groups=groups).logits[:, :-1]) < 1e-6


@torch.no_grad()
def test_padded_rows_are_rows_alone():
    model = balanced(grafted(tiny_model().double()))
    ids, mask = padded([9, 4, 7])
    more = token_ids(3, 14, seed=8)
    whole = torch.cat([ids, more], 1)
    logits, cache = stepped(model, whole, 9, torch.cat([mask, torch.ones_like(more)], 1))
    for row, length in enumerate([9, 4, 7]):
        alone, own = stepped(model, whole[row : row + 1, 9 - length :], length)
        assert apart(logits[row, 9 - length :], alone[0]) < 1e-6
        assert cache.groups(row) == own.groups(0)
        assert cache.kv_entries[row] == own.kv_entries[0]


# ------------------------------------------------------------------------------------------------------ the degenerate setting


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_groups_of_one_are_smollm2(smollm2_slice, dtype):
    """Bit for bit on real weights: a prompt, cached decoding, and a left-padded batch; entries are tokens."""
    base = copy.deepcopy(smollm2_slice.model).to(dtype)
    model = HamburgerForCausalLM.from_base(base, micro_layers=1, confidence=1.5).eval()
    ids = token_ids(2, 12, vocab=49000, seed=3)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    for attention_mask in (None, mask):
        theirs = DynamicCache(config=base.config)
        more = (
            {}
            if attention_mask is None
            else {"attention_mask": attention_mask, "position_ids": position_ids(attention_mask)}
        )
        expected = base(ids, cache=theirs, use_cache=True, **more)
        found = model(ids, use_cache=True, **more)
        assert torch.equal(found.logits, expected.logits)
        for step in range(4):
            token = expected.logits[:, -1:].argmax(-1)
            if attention_mask is not None:
                attention_mask = torch.cat([attention_mask, torch.ones(2, 1, dtype=torch.int64)], 1)
                more = {"attention_mask": attention_mask, "position_ids": position_ids(attention_mask)[:, -1:]}
            expected = base(token, cache=theirs, use_cache=True, **more)
            found = model(token, cache=found.cache, use_cache=True, **more)
            assert torch.equal(found.logits, expected.logits), step
        lengths = [16, 16 if attention_mask is None else 11]
        assert found.cache.kv_entries == lengths
        assert found.cache.bytes() == sum(lengths) * 2 * 2 * 3 * 64 * dtype.itemsize
    made = decode(model, ids[:1], max_new_tokens=6, eos_token_id=[])
    plain = base.generate(
        ids[:1], attention_mask=torch.ones_like(ids[:1]), max_new_tokens=6, do_sample=False, eos_token_id=None
    )
    assert made.tokens[0] == plain[0, 12:].tolist()
    assert (made.groups[0], made.kv_entries, made.micro_steps) == ([1] * 6, [17], 0)


@pytest.mark.slow
@torch.no_grad()
def test_groups_of_one_are_the_whole_smollm2(smollm2):
    base = copy.deepcopy(smollm2.model)
    model = HamburgerForCausalLM.from_base(base, micro_layers=1, confidence=1.5).eval()
    assert model.config.feature_layers == [7, 15, 22, 30]
    ids = smollm2.tokenizer(["def main():\n    import"], return_tensors="pt")["input_ids"]
    how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 24, "do_sample": False}
    assert torch.equal(model.generate(ids, **how), base.generate(ids, **how))
    assert torch.equal(model(ids).logits, base(ids).logits)


# --------------------------------------------------------------------------------------------------------------- generate


@torch.no_grad()
def test_entries_are_the_prompt_and_the_closed_groups():
    model, ids = balanced(grafted()), token_ids(1, 7, seed=4)
    out = model.generate(ids, max_new_tokens=40, do_sample=False, return_dict_in_generate=True)
    cache = out.cache
    sizes = cache.groups(0)
    assert sizes[:7] == [1] * 7
    assert sum(sizes) == 7 + 39  # the last token was not told
    assert max(sizes) <= 4 < len(sizes)
    assert max(sizes[7:]) > 1
    assert cache.kv_entries == [len(sizes) - bool(cache.open[0])]
    assert cache.get_seq_length() == 46
    closed = 7 + sum(sizes[7 : cache.kv_entries[0]])
    assert (
        cache.positions[0][cache.sizes[0] > 0].tolist()
        == (torch.tensor(sizes).cumsum(0) - 1)[: cache.kv_entries[0]].tolist()
    )
    assert closed == 46 - cache.open[0]


@torch.no_grad()
def test_rounds_make_what_generate_makes():
    model = balanced(grafted())
    ids, mask = padded([8, 3, 6, 8, 5, 7, 4, 8])
    whole = model.generate(ids, attention_mask=mask, max_new_tokens=25, do_sample=False)
    made = decode(model, ids, mask, max_new_tokens=25)
    assert made.tokens == whole[:, 8:].tolist()
    assert [sum(sizes) for sizes in made.groups] == [25] * 8
    assert made.macro_rows == sum(len(sizes) - 1 for sizes in made.groups)
    assert made.micro_rows == sum(size - 1 for sizes in made.groups for size in sizes)
    assert made.macro_steps < made.macro_rows
    for row, length in enumerate([8, 3, 6, 8, 5, 7, 4, 8]):
        alone = decode(model, ids[row : row + 1, 8 - length :], max_new_tokens=25)
        assert alone.tokens[0] == made.tokens[row]
        assert alone.groups[0] == made.groups[row]
        assert made.kv_entries[row] == alone.kv_entries[0] == length + len(alone.groups[0]) - 1


@torch.no_grad()
def test_an_end_inside_a_group_ends_the_row():
    model, ids = balanced(grafted()), token_ids(2, 6, seed=2)
    free = decode(model, ids, max_new_tokens=24, eos_token_id=[])
    inside = next(
        sum(sizes[:number]) + 1
        for row, sizes in enumerate(free.groups[:1])
        for number, size in enumerate(sizes)
        if size > 2 and free.tokens[row][sum(sizes[:number]) + 1] not in free.tokens[row][: sum(sizes[:number]) + 1]
    )
    end = free.tokens[0][inside]
    made = decode(model, ids, max_new_tokens=24, eos_token_id=end)
    assert made.tokens[0] == free.tokens[0][: inside + 1]
    assert sum(made.groups[0]) == inside + 1
    assert made.groups[0][-1] < free.groups[0][len(made.groups[0]) - 1]
    stop = free.tokens[1].index(end) + 1 if end in free.tokens[1] else 24
    assert made.tokens[1] == free.tokens[1][:stop]
    whole = model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=end, pad_token_id=0)
    assert whole[0, 6 : 6 + inside + 1].tolist() == made.tokens[0]
    assert not whole[0, 6 + inside + 1 :].any()


@torch.no_grad()
def test_sampling_draws_what_generate_draws():
    model, ids = balanced(grafted()), token_ids(1, 6, seed=2)
    how = {"max_new_tokens": 20, "do_sample": True, "temperature": 1.7, "top_k": 20, "top_p": 0.9}
    torch.manual_seed(5)
    whole = model.generate(ids, **how)
    torch.manual_seed(5)
    assert decode(model, ids, **how).tokens[0] == whole[0, 6:].tolist()
    torch.manual_seed(6)
    assert decode(model, ids, **how).tokens[0] != whole[0, 6:].tolist()


@torch.no_grad()
def test_beams_have_the_score_that_teacher_forcing_gives_them():
    model = balanced(grafted(tiny_model().double()))
    ids, mask = padded([6, 4])
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=9, num_beams=4, num_return_sequences=4, do_sample=False,
        return_dict_in_generate=True, output_scores=True, length_penalty=0.0,
    )  # fmt: skip
    greedy = model.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False)

    def score(row, text):
        own = text[None, 6 - [6, 4][row] :]
        logits, _ = stepped(model, own[:, :-1], [6, 4][row])
        logs = logits[0, -9:].log_softmax(-1)
        return float(logs.gather(1, own[0, -9:, None]).sum())

    for number, text in enumerate(out.sequences):
        assert score(number // 4, text) == pytest.approx(float(out.sequences_scores[number]), abs=1e-4)
    for row in range(2):
        assert out.sequences_scores[4 * row] >= score(row, greedy[row]) - 1e-6


@torch.no_grad()
def test_a_prompt_in_pieces_and_a_second_turn():
    model, ids = balanced(grafted()), token_ids(2, 13, seed=7)
    whole = model.generate(ids, max_new_tokens=12, do_sample=False)
    chunks = {"prefill_chunk_size": 4, "cache": model.new_cache(2)}  # the last piece is one token
    pieces = model.generate(ids, max_new_tokens=12, do_sample=False, **chunks)
    assert torch.equal(whole, pieces)
    kept = model.new_cache(2)
    first = model.generate(ids, max_new_tokens=5, do_sample=False, cache=kept)
    assert torch.equal(first, whole[:, :18])
    turn = torch.cat([first, token_ids(2, 4, seed=1)], 1)
    told = kept.groups(0)
    assert sum(told) == 17
    second = model.generate(turn, max_new_tokens=3, do_sample=False, cache=kept)
    sizes = kept.groups(0)
    assert sizes[: len(told)] == told
    assert sizes[len(told) : len(told) + 5] == [1] * 5  # the last token of the answer, and the turn: not merged
    groups = torch.stack([group_ids([*kept.groups(row)]) for row in range(2)])
    forced = model(second[:, :-1], groups=groups).logits
    assert torch.equal(forced[:, -3:-1].argmax(-1), second[:, -3:-1])  # the last group may be open yet


@torch.no_grad()
def test_confidence_decides_how_long_groups_are():
    model, ids = balanced(grafted()), token_ids(1, 6, seed=2)
    longest = {}
    for confidence in (0.0, 0.1, None, 1.01):
        model.config.confidence = confidence
        made = decode(model, ids, max_new_tokens=40, eos_token_id=[])
        longest[confidence] = len(made.groups[0])
    assert longest[0.0] == 10  # never ends but at four
    assert longest[1.01] == 40
    assert 10 < longest[0.1] < longest[None] < 40
    model.config.confidence = 0.5
    assert len(decode(model, ids, max_new_tokens=40, eos_token_id=[]).groups[0]) == longest[None]


@torch.no_grad()
def test_a_broken_stop_head_ends_groups():
    model, ids = grafted(), token_ids(1, 6)
    model.micro.stop_head[-1].bias.fill_(torch.nan)
    for confidence in (None, 0.5):
        model.config.confidence = confidence
        assert decode(model, ids, max_new_tokens=5, eos_token_id=[]).groups[0] == [1] * 5


# ------------------------------------------------------------------------------------------------------------ what is saved


@torch.no_grad()
def test_the_base_runs_once_a_group_and_the_small_decoder_only_where_it_is_needed():
    model = balanced(grafted())
    ids, mask = padded([6, 4, 5])
    rows = {"base": 0, "micro": 0}

    def counted(name):
        return lambda module, args, out: rows.__setitem__(name, rows[name] + len(out))

    model.base.model.layers[0].mlp.register_forward_hook(counted("base"))
    model.micro.layers[0].mlp.register_forward_hook(counted("micro"))
    made = decode(model, ids, mask, max_new_tokens=30)
    groups = [len(sizes) for sizes in made.groups]
    assert max(groups) < 30
    assert rows["base"] == 3 + sum(groups) - 3  # the prompts; the last groups are never put in
    assert rows["micro"] == sum(size - 1 for sizes in made.groups for size in sizes)
    rows.update(base=0, micro=0)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=30, do_sample=False, return_dict_in_generate=True)
    entries = sum(out.cache.kv_entries)
    assert rows["base"] == 3 + entries - 15
    assert rows["base"] + rows["micro"] == 3 + 3 * 29


@torch.no_grad()
def test_memory_holds_entries_and_not_tokens():
    model, ids = grafted(), token_ids(1, 4)
    model.config.confidence = 0.0  # groups of four
    out = model.generate(ids, max_new_tokens=250, do_sample=False, return_dict_in_generate=True)
    cache = out.cache
    assert cache.kv_entries == [4 + 62]
    assert cache.bytes() == 66 * 2 * 2 * 2 * 16 * 4
    assert cache.entries.keys[0].shape[2] <= 128  # of 253 tokens


# ------------------------------------------------------------------------------------------------------------------ the cache


@torch.no_grad()
def test_rows_of_a_cache_move_as_a_whole():
    model, ids = balanced(grafted()), token_ids(3, 12, seed=3)
    _, cache = stepped(model, ids, 5)
    order = torch.tensor([2, 0, 2, 1])
    moved = copy.deepcopy(cache)
    moved.reorder_cache(order)
    token = token_ids(3, 6, seed=5)
    for place in range(6):
        expected = model(token[:, place : place + 1], cache=cache).logits
        found = model(token[order, place : place + 1], cache=moved).logits
        assert apart(found, expected[order]) < 1e-5
    assert [moved.groups(row) for row in range(4)] == [cache.groups(row) for row in order.tolist()]
    moved.batch_repeat_interleave(2)
    assert moved.batch_size == 8
    assert [moved.groups(row) for row in range(8)] == [cache.groups(row) for row in order.repeat_interleave(2).tolist()]
    moved.batch_select_indices(torch.tensor([True] + [False] * 7))
    assert moved.batch_size == 1
    moved.reset()
    assert (moved.kv_entries, moved.get_seq_length(), moved.batch_size) == ([0], 0, 1)
    assert torch.equal(model(ids[:1], cache=moved).logits, model(ids[:1], use_cache=True).logits)
    with pytest.raises(ValueError, match="cannot be cut back"):
        moved.crop(-1)


def test_what_the_forward_pass_refuses():
    model, ids = grafted(), token_ids(2, 6)
    cache = model(ids, use_cache=True).cache
    for error, words, call in [
        (TypeError, "HamburgerCache", lambda: model(ids, cache=DynamicCache())),
        (TypeError, "past_key_values", lambda: model(ids, past_key_values=cache)),
        (ValueError, "cache must hold 1", lambda: model(ids[:1], cache=cache)),
        (
            ValueError,
            "position_ids must go on",
            lambda: model(ids[:, :1], cache=cache, position_ids=torch.tensor([[3]])),
        ),
        (
            ValueError,
            "attention_mask must have shape",
            lambda: model(ids[:, :1], cache=cache, attention_mask=torch.ones(2, 6)),
        ),
        (ValueError, "on its left only", lambda: model(ids[:, :1], cache=cache, attention_mask=1 - torch.eye(7)[5:])),
        (ValueError, "on the left only", lambda: model(ids, use_cache=True, attention_mask=1 - torch.eye(6)[4:])),
        (ValueError, "prompt must be True", lambda: model(ids, cache=cache, prompt=False)),
        (ValueError, "cache must be left out", lambda: model(ids, cache=cache, groups=torch.arange(6).expand(2, -1))),
        (ValueError, "documents must be left out", lambda: model(ids, documents=ids)),
        (ValueError, "output_hidden_states", lambda: model(ids, output_hidden_states=True)),
        (ValueError, "return_dict", lambda: model(ids, return_dict=False)),
        (ValueError, "inputs_embeds", lambda: model(inputs_embeds=torch.zeros(2, 6, 64))),
        (TypeError, "input_ids", lambda: model(ids.float())),
        (ValueError, "use_cache must be True", lambda: model.generate(ids, use_cache=False, max_new_tokens=2)),
        (ValueError, "stateful", lambda: model.generate(ids[:1], assistant_model=tiny_model(), max_new_tokens=4)),
    ]:
        with pytest.raises(error, match=words):
            call()
    assert cache.get_seq_length() == 6
    assert cache.kv_entries == [6, 6]


@torch.no_grad()
def test_attention_that_cannot_be_told_what_to_see_is_refused():
    model = balanced(grafted())
    eager = copy.deepcopy(model)
    eager.base.set_attn_implementation("eager")
    ids, mask = padded([6, 3])
    assert decode(eager, ids, mask, max_new_tokens=12).tokens == decode(model, ids, mask, max_new_tokens=12).tokens
    eager.base.config._attn_implementation = "flex_attention"
    cache = model(ids, use_cache=True, attention_mask=mask, position_ids=position_ids(mask)).cache
    with pytest.raises(ValueError, match="'sdpa' or 'eager'"):
        eager(ids[:, -1:], cache=cache, prompt=True)


# ------------------------------------------------------------------------------------------------------------ the ecosystem


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_stored_and_loaded(tmp_path, tied):
    model = balanced(grafted(tiny_model(tie_word_embeddings=tied), confidence=0.6, max_steps=3))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is HamburgerForCausalLM
    assert (loaded.config.confidence, loaded.config.max_steps, loaded.config.feature_layers) == (0.6, 3, [1, 2])
    assert {k: v.shape for k, v in loaded.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert (loaded.base.lm_head.weight is loaded.base.model.embed_tokens.weight) == tied
    ids = token_ids(2, 9)
    assert decode(loaded, ids, max_new_tokens=15).groups == decode(model, ids, max_new_tokens=15).groups
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.generate(ids, max_new_tokens=12, do_sample=False).shape == (2, 21)
    groups = group_ids([1, 1, 3, 2, 2]).expand(2, -1)
    assert half(ids, groups=groups).logits.dtype == torch.bfloat16


def test_wrapping_uses_the_weights_and_changes_nothing():
    base = tiny_model().bfloat16()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    model = grafted(base)
    assert model.base is base
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert not model.training
    assert bool(model.embedder.places.any())


@torch.no_grad()
def test_served_as_generated():
    model, ids = balanced(grafted()), token_ids(1, 8, seed=3)
    backend = backend_for(model)
    assert backend.rows == 1
    assert "HamburgerCache" in backend.reason
    expected = model.generate(ids, max_new_tokens=16, do_sample=False)[0, 8:].tolist()
    for told in (0, 7):  # all at once, and after the row was preempted behind its first seven tokens
        sequence = backend.begin(backend.pool.take(1))
        logits = backend.prefill(sequence, ids[0].tolist(), "last")
        first = int(logits[-1].argmax())
        assert first == expected[0]
        if told:
            backend.extend(sequence, expected[: told - 1])
        answers, _ = backend.run(
            [sequence],
            [expected[max(told - 1, 0)]],
            15 - max(told - 1, 0),
            sampling=None,
            uniforms=None,
            want_logits=False,
        )
        assert answers[0].tolist() == expected[max(told - 1, 0) + 1 :]
        assert isinstance(sequence.cache, HamburgerCache)
        backend.end(sequence)


def test_sampling_settings_are_checked():
    model, ids = grafted(), token_ids(1, 4)
    for name, value in [("max_new_tokens", 0), ("temperature", 0.0), ("top_p", 0.0), ("top_k", -1), ("do_sample", 1)]:
        with pytest.raises((ValueError, TypeError), match=name):
            decode(model, ids, **{"max_new_tokens": 2, "do_sample": True, name: value})


@pytest.mark.parametrize("confidence", [None, 2.0])
@torch.no_grad()
def test_groups_as_drafts_lose_nothing(confidence):
    """The base verifies: its own greedy tokens come out. Groups of one are its own next token, and always stand."""
    model, ids = balanced(grafted()), token_ids(1, 9, seed=3)
    model.config.confidence = confidence
    counts, engine = Counts(), ModelEngine(model.base)
    logits = engine.extend(ids[0].tolist(), last=True)[0]
    made = speculate(engine, logits, GroupDrafter(model, ids[0].tolist(), cost=0.0), 30, most=4, counts=counts)
    plain = model.base.generate(ids, max_new_tokens=30, do_sample=False)
    assert made == plain[0, 9:].tolist()
    assert counts.drafted > 5
    if confidence == 2.0:
        assert counts.accepted == counts.drafted
    drafter = GroupDrafter(model, ids[0].tolist())
    first, _ = drafter.draft(4)
    assert drafter.draft(4)[0] == first  # what was guessed has left no trace
    assert drafter.draft(0) == ([], None)
    assert first == decode(model, ids, max_new_tokens=4, eos_token_id=[]).tokens[0][: len(first)]

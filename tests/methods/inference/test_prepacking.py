"""Prepacking: what the paper promises, against each prompt run alone."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.properties.packing_models import PROMPTS, alone, prompts_of, tiny
from transformers import (
    BertConfig,
    BertModel,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from assay.methods.core.generation.cache import keys_and_values, left_pad
from assay.methods.core.generation.loop import padded_prefill
from assay.methods.inference.prepacking import (
    PrepackedPrefill,
    pack_prompts,
    pack_rows,
    packed_mask,
    transform,
)
from assay.methods.transform import Transform, TuneContext

# ------------------------------------------------------------------------------------------------------------ exactness


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("backend", ["varlen", "mask"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral", "gemma3"])
def test_keys_values_and_logits_equal_those_of_the_prompt_alone(kind, backend, attention):
    model = tiny(kind, attention)
    done = PrepackedPrefill(model, backend=backend)(PROMPTS)
    assert model.config._attn_implementation == attention
    assert done.lengths == [len(prompt) for prompt in PROMPTS]
    for i, prompt in enumerate(PROMPTS):
        reference, logits = alone(model, prompt)
        torch.testing.assert_close(done.logits[i], logits, atol=2e-5, rtol=1e-4)
        for (keys, values), (k, v) in zip(keys_and_values(done.cache), reference, strict=True):
            kept = min(len(prompt), keys.shape[2])  # a sliding layer keeps its window
            torch.testing.assert_close(keys[i, :, keys.shape[2] - kept :], k[0, :, -kept:], atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(values[i, :, values.shape[2] - kept :], v[0, :, -kept:], atol=2e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2"])
def test_flex_block_mask_agrees(kind):  # GPT-2 asks its mask for the number of dimensions
    model = tiny(kind)
    done = PrepackedPrefill(model, backend="flex")(PROMPTS)
    expected = PrepackedPrefill(model, backend="mask")(PROMPTS)
    torch.testing.assert_close(done.logits, expected.logits, atol=2e-5, rtol=1e-4)


@pytest.mark.model
@pytest.mark.parametrize("backend", ["varlen", "mask"])
def test_a_real_model_on_real_prompts(smollm2, backend):
    texts = [
        "Return the sum.",
        "def add(a, b):\n    return a + b\n" * 3,
        "Why?",
        "The quick brown fox jumps over the dog.",
    ]
    prompts = [smollm2.tokenizer(text).input_ids for text in texts]
    done = PrepackedPrefill(smollm2.model, backend=backend)(prompts)
    for i, prompt in enumerate(prompts):
        _, logits = alone(smollm2.model, prompt)
        torch.testing.assert_close(done.logits[i], logits, atol=2e-3, rtol=1e-3)


# ------------------------------------------------------------------------------------------------------------ generation


@pytest.mark.parametrize("last_token", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral", "gemma3"])
def test_generation_continues_from_the_packed_cache(kind, last_token):
    model = tiny(kind)
    ids, mask = left_pad(PROMPTS, 0)
    expected = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    done = PrepackedPrefill(model, last_token=last_token)(PROMPTS)
    if last_token:
        allowed = done.logits.clone()
        allowed[:, 1] = -torch.inf  # min_new_tokens forbids the end token
        inputs, left = done.generate_inputs(allowed.argmax(-1)), 5
    else:
        assert done.logits is None
        inputs, left = done.generate_inputs(), 6
    out = model.generate(**inputs, max_new_tokens=left, min_new_tokens=left, do_sample=False)
    assert torch.equal(out, expected)


def test_without_the_last_token_it_is_not_run():
    seen = []
    model = tiny()
    hook = model.model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    done = PrepackedPrefill(model, last_token=False)(PROMPTS)
    hook.remove()
    assert seen == [sum(len(prompt) - 1 for prompt in PROMPTS)]
    assert done.cache.get_seq_length() == max(len(prompt) for prompt in PROMPTS) - 1


def test_prompts_of_one_token_without_their_last():
    model = tiny()
    prompts = prompts_of(1, 1)
    done = PrepackedPrefill(model, last_token=False)(prompts)
    assert done.cache.get_seq_length() == 0
    out = model.generate(**done.generate_inputs(), max_new_tokens=3, do_sample=False)
    ids, mask = left_pad(prompts, 0)
    assert torch.equal(out, model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3, do_sample=False))


def test_next_tokens_go_with_logits():
    done = PrepackedPrefill(tiny())(PROMPTS)
    with pytest.raises(ValueError, match="next_tokens"):
        done.generate_inputs()
    with pytest.raises(ValueError, match="next_tokens"):
        PrepackedPrefill(tiny(), last_token=False)(PROMPTS).generate_inputs(torch.zeros(7, dtype=torch.long))


# ----------------------------------------------------------------------------------------------------- degenerate, isolation


@pytest.mark.parametrize("backend", ["varlen", "mask"])
@pytest.mark.parametrize("prompts", [prompts_of(9), prompts_of(9, 9, 9)], ids=["batch 1", "equal lengths"])
def test_degenerates_to_the_padded_batch_bit_for_bit(backend, prompts):
    model = tiny()
    done = PrepackedPrefill(model, backend=backend)(prompts)
    plain = padded_prefill(model, *left_pad(prompts, 0))
    assert torch.equal(done.logits, plain.logits)
    for packed, padded in zip(keys_and_values(done.cache), keys_and_values(plain.cache), strict=True):
        assert torch.equal(packed[0], padded[0])
        assert torch.equal(packed[1], padded[1])


@pytest.mark.parametrize("backend", ["varlen", "mask"])
def test_no_information_crosses_prompts(backend):
    model = tiny()
    changed = list(PROMPTS)
    changed[1] = prompts_of(len(PROMPTS[1]), seed=7)[0]
    before = PrepackedPrefill(model, backend=backend)(PROMPTS)
    after = PrepackedPrefill(model, backend=backend)(changed)
    assert not torch.equal(before.logits[1], after.logits[1])
    others = [i for i in range(len(PROMPTS)) if i != 1]
    assert torch.equal(before.logits[others], after.logits[others])
    for old, new in zip(keys_and_values(before.cache), keys_and_values(after.cache), strict=True):
        assert torch.equal(old[0][others], new[0][others])
        assert torch.equal(old[1][others], new[1][others])


@pytest.mark.parametrize("backend", ["varlen", "mask"])
def test_permuting_the_prompts_permutes_the_output(backend):
    model = tiny()
    order = [3, 0, 6, 2, 5, 1, 4]
    straight = PrepackedPrefill(model, backend=backend)(PROMPTS)
    permuted = PrepackedPrefill(model, backend=backend)([PROMPTS[i] for i in order])
    torch.testing.assert_close(permuted.logits, straight.logits[order], atol=2e-5, rtol=1e-4)
    for old, new in zip(keys_and_values(straight.cache), keys_and_values(permuted.cache), strict=True):
        torch.testing.assert_close(new[0], old[0][order], atol=2e-5, rtol=1e-4)


def test_the_saved_work_is_really_not_done():
    """varlen: linear layers see sum(l) tokens, attention sum(l**2) pairs."""
    model, tokens, pairs = tiny(), [], []
    original = torch.nn.functional.scaled_dot_product_attention

    def counting(query, key, *args, **kwargs):
        pairs.append(query.shape[2] * key.shape[2])
        return original(query, key, *args, **kwargs)

    hook = model.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: tokens.append(args[0].shape[:2]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", counting)
        PrepackedPrefill(model)(PROMPTS)
    hook.remove()
    assert tokens == [(1, sum(len(prompt) for prompt in PROMPTS))]
    assert sum(pairs) == model.config.num_hidden_layers * sum(len(prompt) ** 2 for prompt in PROMPTS)


def test_mask_backend_runs_the_packed_area():
    model, shapes = tiny(), []
    hook = model.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape[:2]))
    PrepackedPrefill(model, backend="mask")(PROMPTS)
    hook.remove()
    packing = pack_prompts([len(prompt) for prompt in PROMPTS])
    assert shapes == [(len(packing.bins), max(packing.loads))]
    assert packing.area < packing.padded_area


def test_calls_whichever_attention_the_model_is_set_to():
    calls = []

    def noted(module, query, key, value, attention_mask, **kwargs):
        calls.append(query.shape[2])
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("assay_test_noted", noted)
    model = tiny()
    expected = PrepackedPrefill(model)(PROMPTS).logits
    model.set_attn_implementation("assay_test_noted")
    done = PrepackedPrefill(model)(PROMPTS)
    assert sorted(calls) == sorted([len(prompt) for prompt in PROMPTS] * 2)
    assert torch.equal(done.logits, expected)
    assert model.config._attn_implementation == "assay_test_noted"


def test_the_attention_is_put_back_after_an_error():
    model = tiny()
    with pytest.raises(IndexError):
        PrepackedPrefill(model)([[5, 9999], [3]])
    assert model.config._attn_implementation == "sdpa"


# ---------------------------------------------------------------------------------------------------------- dataset level


@pytest.mark.parametrize("backend", ["varlen", "mask"])
def test_dataset_level_brings_every_prompt_once(backend):
    model = tiny()
    prompts = prompts_of(*[3, 9, 20, 1, 7, 7, 15, 4, 11, 20, 2, 6])
    seen = []
    for members, done in PrepackedPrefill(model, backend=backend).dataset(prompts, rows=2):
        seen += members
        for i, logits in zip(members, done.logits, strict=True):
            torch.testing.assert_close(logits, alone(model, prompts[i])[1], atol=2e-5, rtol=1e-4)
    assert sorted(seen) == list(range(len(prompts)))


# ------------------------------------------------------------------------------------------------------------ bin packing

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=30)


@given(LENGTHS, st.integers(0, 40))
def test_best_fit_decreasing_is_a_packing(lengths, spare):
    capacity = max(lengths) + spare
    packing = pack_prompts(lengths, capacity)
    assert sorted(i for row in packing.bins for i in row) == list(range(len(lengths)))
    assert all(0 < load <= capacity for load in packing.loads)
    assert -(-sum(lengths) // capacity) <= len(packing.bins) <= len(lengths)


@given(LENGTHS)
def test_packed_area_never_exceeds_the_padded_area(lengths):
    packing = pack_prompts(lengths)
    assert packing.area <= packing.padded_area


def milp_bins(lengths, capacity) -> int:
    """The integer program of the paper, solved by scipy: the fewest bins."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    n = len(lengths)
    cost = np.concatenate([np.zeros(n * n), np.ones(n)])  # x[i, j]: item i in bin j; y[j]: bin j used
    once = np.zeros((n, n * n + n))
    room = np.zeros((n, n * n + n))
    for i in range(n):
        once[i, i * n : (i + 1) * n] = 1
        for j in range(n):
            room[j, i * n + j] = lengths[i]
        room[i, n * n + i] = -capacity
    constraints = [LinearConstraint(once, 1, 1), LinearConstraint(room, -np.inf, 0)]
    return round(milp(cost, constraints=constraints, bounds=Bounds(0, 1), integrality=np.ones(n * n + n)).fun)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=7), st.integers(0, 12))
def test_exact_packing_equals_the_integer_program(lengths, spare):
    capacity = max(lengths) + spare
    packing = pack_prompts(lengths, capacity, method="exact")
    assert packing.optimal
    assert len(packing.bins) == milp_bins(lengths, capacity)
    assert sorted(i for row in packing.bins for i in row) == list(range(len(lengths)))
    assert max(packing.loads) <= capacity


@pytest.mark.parametrize("method", ["best_fit", "exact"])
def test_a_prompt_that_fills_its_row_exactly_fits(method):
    assert pack_prompts([7, 3], 10, method=method).bins == ((0, 1),)
    assert pack_prompts([8, 5, 3, 2, 2], 10, method=method).loads == [10, 10]
    assert pack_prompts([10], 10, method=method).bins == ((0,),)
    tight = pack_prompts([6, 5, 5, 4], 10, method=method)
    assert (tight.bins, tight.optimal) == (((0, 3), (1, 2)), True)


def test_the_exact_search_fills_rows_exactly():
    lengths, capacity = [44, 24, 24, 22, 21, 17, 8, 8, 6, 6], 60  # 180 tokens: three rows without a free token
    packing = pack_prompts(lengths, capacity, method="exact")
    assert packing.loads == [60, 60, 60]


def test_exact_beats_greedy_where_greedy_fails():
    lengths, capacity = [4, 4, 5, 5, 2, 2, 2, 6], 10  # 30 tokens fill three rows
    assert len(pack_prompts(lengths, capacity, method="exact").bins) == 3
    lengths, capacity = [44, 24, 24, 22, 21, 17, 8, 8, 6, 6], 60
    greedy, exact = pack_prompts(lengths, capacity), pack_prompts(lengths, capacity, method="exact")
    assert (len(greedy.bins), greedy.optimal) == (4, False)
    assert (len(exact.bins), exact.optimal) == (3, True)


def test_exact_says_so_when_it_ran_out_of_steps():
    lengths, capacity = [44, 24, 24, 22, 21, 17, 8, 8, 6, 6], 60
    packing = pack_prompts(lengths, capacity, method="exact", max_nodes=2)
    assert not packing.optimal
    assert len(packing.bins) == 4


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_best_fit_decreasing_stays_within_eleven_ninths_of_the_optimum(seed):
    rng = random.Random(seed)
    bins, capacity = 60, 100
    lengths = []
    for _ in range(bins):  # full bins cut in pieces, so that the optimum is known
        cuts = sorted(rng.sample(range(1, capacity), rng.randint(1, 4)))
        lengths += [b - a for a, b in zip([0, *cuts], [*cuts, capacity], strict=True)]
    assert len(pack_prompts(lengths, capacity).bins) <= 11 / 9 * bins + 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "lengths must hold at least one"),
        (([3, 0],), "lengths must be a whole number at least 1, got 0"),
        (([3, 9], 5), r"lengths must lie in 1..capacity \(5\), got 3..9"),
    ],
)
def test_packing_names_bad_lengths(arguments, message):
    with pytest.raises(ValueError, match=message):
        pack_prompts(*arguments)


def test_packing_names_a_bad_method():
    with pytest.raises(ValueError, match="method must be one of 'best_fit', 'exact', got 'magic'"):
        pack_prompts([1], method="magic")


# ------------------------------------------------------------------------------------------------------------------- rows


def test_rows_restart_positions_and_keep_spans_in_prompt_order():
    rows = pack_rows([[7, 8], [9], [4, 5, 6]], [[2], [0, 1]], pad_token_id=0)
    assert rows.input_ids.tolist() == [[4, 5, 6], [7, 8, 9]]
    assert rows.position_ids.tolist() == [[0, 1, 2], [0, 1, 0]]
    assert rows.segments.tolist() == [[2, 2, 2], [0, 0, 1]]
    assert [tuple(span) for span in rows.spans] == [(1, 0, 2), (1, 2, 3), (0, 0, 3)]


def test_rows_refuse_bins_that_miss_a_prompt():
    with pytest.raises(ValueError, match="exactly once"):
        pack_rows([[1], [2]], [[0]])


def test_the_mask_is_a_block_diagonal_of_triangles():
    mask = packed_mask(torch.tensor([[0, 0, 0, 1, -1, -1]]))[0, 0]
    expected = torch.block_diag(torch.ones(3, 3).tril(), torch.ones(1, 1), torch.ones(2, 2).tril()).bool()
    assert torch.equal(mask, expected)
    assert mask.any(-1).all()
    assert packed_mask(torch.tensor([[0, 0, 0]]), window=2)[0, 0].tolist() == [
        [True, False, False],
        [True, True, False],
        [False, True, True],
    ]


# -------------------------------------------------------------------------------------------------- refusals and transform


def test_refuses_models_it_would_break():
    with pytest.raises(ValueError, match="encoder-decoder"):
        PrepackedPrefill(
            T5ForConditionalGeneration(T5Config(d_model=8, d_ff=8, num_layers=1, num_heads=1, vocab_size=9))
        )
    with pytest.raises(ValueError, match="cannot be prepacked"):
        PrepackedPrefill(MambaForCausalLM(MambaConfig(hidden_size=8, num_hidden_layers=1, vocab_size=9, state_size=4)))
    with pytest.raises(ValueError, match="not a transformers language model"):
        PrepackedPrefill(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="backend must be one of 'varlen', 'mask', 'flex', got 'cuda'"):
        PrepackedPrefill(tiny(), backend="cuda")
    with pytest.raises(ValueError, match="packing must be one of 'best_fit', 'exact', got 'tight'"):
        PrepackedPrefill(tiny(), packing="tight")
    with pytest.raises(ValueError, match="capacity must be a whole number at least 1, got 0"):
        PrepackedPrefill(tiny(), capacity=0)
    for bad, error in ((-1, ValueError), (97, ValueError), (True, TypeError), (1.0, TypeError)):
        with pytest.raises(error, match="pad_token_id must be a whole number at least 0 and at most 96"):
            PrepackedPrefill(tiny(), pad_token_id=bad)


@pytest.mark.parametrize("kind", ["Roberta", "XLMRoberta"])
def test_refuses_positions_that_begin_behind_the_padding_token(kind):
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, is_decoder=True
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with pytest.raises(ValueError, match="positions do not begin at 0"):
        PrepackedPrefill(model)


@pytest.mark.parametrize("backend", ["varlen", "mask"])
def test_a_window_that_only_the_configuration_has(backend):
    from transformers import MoshiConfig, MoshiForCausalLM

    config = MoshiConfig(
        vocab_size=97,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        sliding_window=8,
    )
    torch.manual_seed(0)
    model = MoshiForCausalLM(config).eval()
    done = PrepackedPrefill(model, backend=backend, pad_token_id=0)(PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(done.logits[i], alone(model, prompt)[1], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", ["varlen", "mask"])
def test_a_row_may_be_longer_than_the_context(backend):
    """Positions count within a prompt, and those of the padding are there in every model."""
    model = tiny("gpt2")  # 128 learned positions
    prompts = prompts_of(120, 128, 60, 100, 3)
    done = PrepackedPrefill(model, backend=backend, capacity=400)(prompts)
    for i, prompt in enumerate(prompts):
        torch.testing.assert_close(done.logits[i], alone(model, prompt)[1], atol=2e-5, rtol=1e-4)


def test_refuses_bad_prompts():
    prefill = PrepackedPrefill(tiny())
    with pytest.raises(ValueError, match="at least one prompt"):
        prefill([])
    with pytest.raises(ValueError, match="empty prompt at 1"):
        prefill([[1], []])
    with pytest.raises(TypeError, match="token ids, which are whole numbers: 'float'"):
        prefill([[1, 2.5]])
    with pytest.raises(TypeError, match="True is a truth value"):
        prefill([[1, True]])
    with pytest.raises(ValueError, match="rows must be a whole number at least 1, got 0"):
        next(prefill.dataset([[1]], rows=0))


def test_transform_sets_the_batching():
    context = TuneContext(goal="throughput", prompt_tokens=100, new_tokens=8, batch_size=4)
    model = tiny()
    assert isinstance(transform, Transform)
    assert (transform.slot, transform.exact, transform.goals) == ("batching", True, {"throughput"})
    assert transform.applies_to(model, context).applies
    assert not transform.applies_to(
        BertModel(BertConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=1)), context
    ).applies
    config = transform.configs(model, context)[0]
    assert transform.apply(model, config, context) is model
    assert model.assay_settings == {"prefill": PrepackedPrefill, **config}
    with pytest.raises(ValueError, match="allowed: batch_size, sort_by_length"):
        transform.apply(model, {"colour": 1}, context)


# -------------------------------------------------------------------------------------------------------- the experiments


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3"])
def test_the_free_baseline_leaves_what_the_other_arms_leave(kind):
    from assay.experiments.inference.prepacking import alone_prefill

    model = tiny(kind)
    found, packed = alone_prefill(model, PROMPTS), PrepackedPrefill(model)(PROMPTS)
    assert found.lengths == packed.lengths
    assert torch.equal(found.attention_mask, packed.attention_mask)
    torch.testing.assert_close(found.logits, packed.logits, atol=2e-5, rtol=1e-4)
    for own, other in zip(keys_and_values(found.cache), keys_and_values(packed.cache), strict=True):
        torch.testing.assert_close(own, other, atol=2e-5, rtol=1e-4)


def test_memory_is_held_against_what_is_free(monkeypatch):
    import assay.experiments.inference.prepacking as room
    from assay.measure.memory import PeakMemory

    peaks = {"padded": 1200, "sorted": 1100, "alone": 600, "varlen": 500, "mask": 800}
    monkeypatch.setattr(room, "peak_memory_of_child", lambda _, call: PeakMemory(10, 10 + peaks[call["arm"]]))
    monkeypatch.setattr(room, "in_every_arm", lambda *_: {"weights": 300, "cache": 100})
    loaded = SimpleNamespace(model=tiny("llama"), tokenizer=None)
    monkeypatch.setattr(room, "load_model", lambda name: loaded)
    monkeypatch.setattr(room, "mixed_prompts", lambda tokenizer, n, longest: PROMPTS[:n])
    figure = room.prefill_peak_memory(4, 4, 99, 2)
    assert (figure.value, figure.low, figure.high, figure.free) == (1.5, 1.5, 1.5, 2.0)
    assert figure.arms["one flat row without a mask"] == 2.4
    assert figure.quality.candidate < 1e-4 < 1e-2 < min(figure.quality.controls.values())


@pytest.mark.parametrize("bad", [3.7, True, "3", float("nan")])
def test_lengths_and_capacities_are_whole(bad):
    """3.7 tokens are not packed as 3."""
    with pytest.raises(TypeError, match="lengths must be a whole number"):
        pack_prompts([bad, 4])
    with pytest.raises(TypeError, match="capacity must be a whole number"):
        pack_prompts([3, 4], bad)
    assert pack_prompts([np.int64(3), torch.tensor(4)], np.int32(8)).bins == ((1, 0),)


def test_flex_is_refused_where_it_has_no_sinks():
    from tests.properties.architectures import build

    with pytest.raises(
        ValueError, match="backend must be 'varlen' or 'mask' for this model: flex attention has no sinks"
    ):
        PrepackedPrefill(build("gpt_oss"), backend="flex")

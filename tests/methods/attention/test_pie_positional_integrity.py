from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)

from assay.methods.attention.pie_positional_integrity import (
    EditableContext,
    cache_of,
    edit_cache,
    rotate_keys,
    rotation_of,
    token_changes,
)
from assay.methods.core.generation.cache import keys_and_values


def llama(layers, *, dtype=torch.float64, heads=9, kv_heads=3, **options):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=8 * heads,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
        **options,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def ids(n, seed=0):
    return torch.randint(1, 97, (n,), generator=torch.Generator().manual_seed(seed))


def full(model, tokens):
    return EditableContext(model, tokens)


def close(context, other, tolerance=1e-5):  # transformers computes the angles in float32
    for (k, v), (wanted_k, wanted_v) in zip(context.layers, other.layers, strict=True):
        torch.testing.assert_close(k, wanted_k, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(v, wanted_v, atol=tolerance, rtol=tolerance)


FREQUENCY = 10000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotations_add_up_and_keep_the_norm(interleaved):
    keys = torch.randn(2, 3, 7, 12, dtype=torch.float64)  # 8 of 12 dimensions turn

    def turn(x, delta):
        return rotate_keys(x, delta, FREQUENCY, interleaved=interleaved)

    torch.testing.assert_close(turn(turn(keys, 5), 12), turn(keys, 17))
    torch.testing.assert_close(turn(turn(keys, 9), -9), keys)
    torch.testing.assert_close(turn(keys, 1234).norm(dim=-1), keys.norm(dim=-1))
    assert torch.equal(turn(keys, 40)[..., 8:], keys[..., 8:])
    assert not torch.allclose(turn(keys, 1)[..., :8], keys[..., :8])
    assert turn(keys, 0) is keys
    each = torch.arange(7)
    torch.testing.assert_close(turn(keys, each)[:, :, 3], turn(keys, 3)[:, :, 3])


@pytest.mark.parametrize(
    ("start", "stop", "m"),
    [(10, 10, 6), (10, 25, 6), (10, 25, 0), (0, 4, 9), (0, 4, 0), (0, 0, 5), (0, 40, 7), (38, 40, 5), (40, 40, 3)],
)
def test_one_layer_equals_full_recomputation(start, stop, m):
    model, old = llama(1), ids(40)
    context = full(model, old)
    context.edit(start, stop, ids(m, seed=1))
    fresh = full(model, torch.cat([old[:start], ids(m, seed=1), old[stop:]]))
    assert torch.equal(context.ids, fresh.ids)
    close(context, fresh)


def test_deep_models_keep_the_first_layer_exact_and_the_rest_close_but_not_equal():
    model, old = llama(4), ids(40)
    context = full(model, old)
    context.edit(10, 12, ids(5, seed=1))
    fresh = full(model, context.ids)
    for part in (0, 1):
        torch.testing.assert_close(context.layers[0][part], fresh.layers[0][part])
        torch.testing.assert_close(context.layers[3][part][:, :, :15], fresh.layers[3][part][:, :, :15])
        assert not torch.allclose(context.layers[3][part][:, :, 15:], fresh.layers[3][part][:, :, 15:])


@pytest.mark.parametrize(("start", "stop", "m"), [(40, 40, 8), (30, 40, 8), (30, 40, 0), (40, 40, 0), (0, 40, 8)])
def test_an_edit_at_the_end_or_of_everything_is_exact_at_any_depth(start, stop, m):
    model, old = llama(4), ids(40)
    context = full(model, old)
    context.edit(start, stop, ids(m, seed=1))
    close(context, full(model, context.ids))
    assert context.staleness == 0


def test_an_edit_without_change_is_the_identity_and_values_stay_where_they_are():
    model, old = llama(3), ids(40)
    context = full(model, old)
    before = context.layers
    context.edit(7, 7, [])
    for (k, v), (k0, v0) in zip(context.layers, before, strict=True):
        assert torch.equal(k, k0)
        assert torch.equal(v, v0)
    context.edit(7, 9, old[7:9])
    close(context, full(model, old))


def test_two_edits_are_one_with_the_sum_and_an_edit_and_its_inverse_are_none():
    model, old = llama(3), ids(40)
    one, two = full(model, old), full(model, old)
    one.edit(10, 10, ids(7, seed=1))
    two.edit(10, 10, ids(7, seed=1)[:3])
    two.edit(13, 13, ids(7, seed=1)[3:])
    close(one, two)
    one.edit(10, 17, [])
    close(one, full(model, old))


def test_length_and_next_position_follow_the_edit():
    model, old = llama(1), ids(30)
    context = full(model, old)
    context.edit(5, 9, ids(10, seed=1))
    assert len(context) == 36
    assert context.cache().get_seq_length() == 35
    ahead = model(input_ids=context.ids[None, -1:], cache=context.cache(), use_cache=True).logits[0, -1]
    torch.testing.assert_close(ahead, model(input_ids=context.ids[None]).logits[0, -1])
    wanted = model.generate(context.ids[None], max_new_tokens=6, do_sample=False, pad_token_id=0)[0, 36:]
    assert torch.equal(context.complete(6), wanted)
    assert len(context) == 36, "completing must not change the context"


def test_several_edits_at_once_and_a_new_text():
    model, old = llama(1), ids(60)
    context = full(model, old)
    context.edits([(40, 45, ids(2, seed=1)), (3, 3, ids(4, seed=2)), (20, 30, [])])
    fresh = torch.cat([old[:3], ids(4, seed=2), old[3:20], old[30:40], ids(2, seed=1), old[45:]])
    assert torch.equal(context.ids, fresh)
    close(context, full(model, fresh))
    new = torch.cat([ids(3, seed=5), fresh[:30], fresh[33:]])
    assert context.update(new) <= 6
    assert torch.equal(context.ids, new)
    close(context, full(model, new))
    assert context.update(new) == 0
    for bad, message in (([(3, 8, []), (7, 9, [])], "overlap"), ([(3, 8, []), (60, 90, [])], "start and stop")):
        with pytest.raises(ValueError, match=message):
            context.edits(bad)
        assert torch.equal(context.ids, new), "one bad edit, and none is made"
    context.edits([(0, len(new), []), (len(new), len(new), old[:9]), (len(new), len(new), old[9:20])])
    assert torch.equal(context.ids, old[:20]), "in between nothing was left"
    close(context, full(model, old[:20]))


def test_token_changes_lead_from_one_to_the_other():
    generator = torch.Generator().manual_seed(3)
    for _ in range(50):
        a = torch.randint(0, 4, (int(torch.randint(0, 20, (), generator=generator)),), generator=generator).tolist()
        b = torch.randint(0, 4, (int(torch.randint(0, 20, (), generator=generator)),), generator=generator).tolist()
        built, at = [], 0
        for start, stop, tokens in token_changes(a, b):
            built += a[at:start] + tokens
            at = stop
        assert built + a[at:] == b


def test_conflict_encoding_leaves_old_positions_and_recompute_brings_it_closer():
    model, old = llama(3), ids(60)
    new = ids(9, seed=1)
    fresh = full(model, torch.cat([old[:20], new, old[20:]]))

    def off(**options):
        context = full(model, old)
        context.edit(20, 20, new, **options)
        return sum(float((k - w).norm()) for (k, _), (w, _) in zip(context.layers, fresh.layers, strict=True))

    assert off() < off(rotate=False) / 2
    assert off(recompute=20) < off()
    assert off(recompute=40) < 1e-5


def test_staleness_counts_what_was_computed_with_the_old_text():
    context = full(llama(2), ids(40))
    assert context.staleness == 0
    context.edit(10, 10, ids(10, seed=1))
    assert context.staleness == pytest.approx(30 / 50)
    context.refresh()
    assert context.staleness == 0


def test_many_edits_in_bfloat16_do_not_drift():
    model, old = llama(1, dtype=torch.bfloat16), ids(50)
    context = full(model, old)
    for _ in range(40):
        context.edit(5, 5, ids(3, seed=1))
        context.edit(5, 8, [])
    close(context, full(model, old), tolerance=1e-2)
    naive = cache_of([(k.clone(), v) for k, v in full(model, old).layers])
    empty = [(k[:, :, :0], v[:, :, :0]) for k, v in keys_and_values(naive)]
    inv_freq, _ = rotation_of(model)
    some = [(k[:, :, :3], v[:, :, :3]) for k, v in keys_and_values(naive)]
    for _ in range(40):
        edit_cache(naive, 5, 0, some, inv_freq)
        edit_cache(naive, 5, 3, empty, inv_freq)
    kept = full(model, old).layers[0][0].float()
    assert (context.layers[0][0].float() - kept).norm() < (keys_and_values(naive)[0][0].float() - kept).norm()


def test_edit_cache_on_transformers_own_cache_of_a_batch():
    model, old, other = llama(1), ids(30), ids(30, seed=7)
    cache = DynamicCache()
    model(input_ids=torch.stack([old, other]), cache=cache, use_cache=True)
    fresh = [full(model, torch.cat([row[:10], ids(4, seed=1), row[12:]])) for row in (old, other)]
    inv_freq, interleaved = rotation_of(model)
    both = [[torch.cat(pair) for pair in zip(*kv, strict=True)] for kv in zip(*(c.layers for c in fresh), strict=True)]
    inserted = [(k[:, :, 10:14], v[:, :, 10:14]) for k, v in both]
    assert edit_cache(cache, 10, 2, inserted, inv_freq, interleaved=interleaved) is cache
    assert cache.get_seq_length() == 32
    for (k, v), (wanted_k, wanted_v) in zip(keys_and_values(cache), both, strict=True):
        torch.testing.assert_close(k, wanted_k, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(v, wanted_v, atol=1e-5, rtol=1e-5)
    kept = keys_and_values(cache)
    for call, message in (
        (lambda: edit_cache(cache, 30, 5, inserted, inv_freq), "start"),
        (lambda: edit_cache(cache, 3, 0, [], inv_freq), "1 layers"),
        (lambda: edit_cache(cache, 3, 0, [(k[:1], v) for k, v in inserted], inv_freq), "new_kv must have shapes"),
        (lambda: edit_cache(cache, 3, 0, [(k, v[:, :, :2]) for k, v in inserted], inv_freq), "new_kv must have shapes"),
        (lambda: edit_cache(cache, 3, 0, inserted, [*inv_freq, None]), "inv_freq must be one tensor or 1"),
        (lambda: edit_cache(cache, 3, 0, inserted, torch.ones(9)), "inv_freq must have at most"),
        (lambda: edit_cache(DynamicCache(), 0, 0, inserted, inv_freq), "empty"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    for (k, v), (k0, v0) in zip(keys_and_values(cache), kept, strict=True):
        assert k is k0
        assert v is v0


def test_a_cache_that_generate_left_behind():
    model, prompt = llama(3), ids(20)
    out = model.generate(prompt[None], max_new_tokens=10, do_sample=False, pad_token_id=0, return_dict_in_generate=True)
    text = out.sequences[0]
    before = [(k.clone(), v.clone()) for k, v in keys_and_values(out.cache)]
    ran = []
    hook = model.register_forward_pre_hook(
        lambda m, a, options: ran.append(options["input_ids"].shape[1]), with_kwargs=True
    )
    context = EditableContext(model, text, cache=out.cache)
    hook.remove()
    assert set(ran) == {1}, "what the cache holds is not computed again"
    close(context, full(model, text))
    context.edit(25, 27, ids(6, seed=1))
    other = full(model, text)
    other.edit(25, 27, ids(6, seed=1))
    close(context, other)
    for (k, v), (k0, v0) in zip(keys_and_values(out.cache), before, strict=True):
        assert torch.equal(k, k0)
        assert torch.equal(v, v0)
    with pytest.raises(ValueError, match="one row of at most 5 tokens, got 1 of 29"):
        EditableContext(model, text[:5], cache=out.cache)
    two = DynamicCache()
    model(input_ids=torch.stack([prompt, prompt]), cache=two)
    with pytest.raises(ValueError, match="got 2 of 20"):
        EditableContext(model, prompt, cache=two)
    with pytest.raises(ValueError, match="empty"):
        EditableContext(model, prompt, cache=DynamicCache())
    static = StaticCache(config=model.config, max_cache_len=64)
    model(input_ids=prompt[None], cache=static)
    with pytest.raises(TypeError, match="StaticLayer"):
        EditableContext(model, prompt, cache=static)
    sliding = small("mistral", sliding_window=8)
    window = DynamicCache(config=sliding.config)
    sliding(input_ids=prompt[None], cache=window)
    with pytest.raises(TypeError, match="DynamicSlidingWindowLayer"):
        EditableContext(sliding, prompt, cache=window)


def small(kind, layers=1, **options):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "head_dim": 16,
        "max_position_embeddings": 512,
    }
    config = AutoConfig.for_model(
        kind, **{"vocab_size": 97, "pad_token_id": 0, "eos_token_id": None, **sizes, **options}
    )
    return AutoModelForCausalLM.from_config(config).double().eval()


def scaling(kind, **options):
    return {"rope_parameters": {"rope_type": kind, "factor": 4.0, "rope_theta": 10000.0, **options}}


llama3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
two_ropes = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
gptj = {"n_embd": 48, "n_layer": 1, "n_head": 3, "n_positions": 512, "rotary_dim": 8, "hidden_size": 48}


@pytest.mark.parametrize(
    ("kind", "options", "interleaved", "turning"),
    [
        ("llama", scaling("linear"), False, 16),
        ("llama", scaling("llama3", **llama3), False, 16),
        ("llama", scaling("yarn", original_max_position_embeddings=32), False, 16),
        ("qwen3", {}, False, 16),  # norms before the rotation
        ("gpt_neox", scaling("default", partial_rotary_factor=0.25), False, 4),
        ("cohere", {}, True, 16),
        ("glm", scaling("default", partial_rotary_factor=0.5), True, 8),
        ("gptj", gptj, True, 8),  # a table of sines
        ("codegen", gptj | {"n_head": 4}, True, 8),
        ("mistral", {"sliding_window": 8}, False, 16),
        (
            "gemma3_text",
            {"layer_types": ["sliding_attention"], "sliding_window": 8, "rope_parameters": two_ropes},
            False,
            16,
        ),
        ("gemma3_text", {"layer_types": ["full_attention"], "rope_parameters": two_ropes}, False, 16),
        ("smollm3", {"no_rope_layers": [0]}, False, 0),
        ("bloom", {"n_layer": 1, "n_head": 3}, False, 0),  # ALiBi
    ],
)
def test_every_kind_of_rotation_is_found_on_the_model_and_repaired(kind, options, interleaved, turning):
    model, old = small(kind, **options), ids(30)
    (inv_freq,), found = rotation_of(model)
    assert found is interleaved
    assert (0 if inv_freq is None else 2 * inv_freq.numel()) == turning
    context = full(model, old)
    context.edits([(0, 2, []), (4, 6, ids(9, seed=1)), (20, 20, ids(3, seed=2))])
    fresh = full(model, context.ids)
    close(context, fresh)
    conflict = full(model, old)
    conflict.edit(4, 6, ids(9, seed=1), rotate=False)
    moved = (conflict.layers[0][0] - full(model, conflict.ids).layers[0][0]).abs().max()
    assert (moved > 0.01) == (turning > 0)
    wanted = model.generate(context.ids[None], max_new_tokens=8, do_sample=False)[0, len(context) :]
    assert torch.equal(context.complete(8), wanted)


def test_layers_that_turn_differently_are_told_apart():
    mixed, interleaved = rotation_of(small("smollm3", layers=4, no_rope_layers=[1, 0, 1, 0]))
    assert [f is None for f in mixed] == [False, True, False, True]
    assert interleaved is False
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    model = small("gemma3_text", layers=3, layer_types=kinds, sliding_window=8, rope_parameters=two_ropes)
    near, far, again = rotation_of(model)[0]
    assert torch.equal(near, model.model.rotary_emb.sliding_attention_inv_freq)
    assert torch.equal(far, model.model.rotary_emb.full_attention_inv_freq)
    assert torch.equal(again, near)
    assert not torch.equal(near, far)


def test_models_it_does_not_fit():
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=16, n_layer=1, n_head=2)).eval()
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no rotary embedding, but its keys depend"):
        EditableContext(gpt2, ids(5))
    dynamic = llama(1, **scaling("dynamic"))
    with pytest.raises(ValueError, match="change with the length .*dynamic"):
        EditableContext(dynamic, ids(5))
    changing = two_ropes | {"full_attention": scaling("dynamic")["rope_parameters"]}
    with pytest.raises(ValueError, match="change with the length .*dynamic"):
        EditableContext(small("gemma3_text", layer_types=["sliding_attention"], rope_parameters=changing), ids(5))
    odd = llama(1)
    odd.model.rotary_emb.register_buffer("inv_freq", odd.model.rotary_emb.inv_freq.clone())
    real = odd.model.rotary_emb.forward
    odd.model.rotary_emb.forward = lambda x, position_ids: real(x, position_ids**2)
    with pytest.raises(ValueError, match="do not turn with their position"):
        EditableContext(odd, ids(5))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.edit(5, 3, []), "start and stop"),
        (lambda c: c.edit(0, 99, []), "start and stop"),
        (lambda c: c.edit(0, 10, []), "at least one token"),
        (lambda c: c.edit(0, 1, [1], recompute=-1), "recompute"),
        (lambda c: c.edit(0, 1, torch.ones(2, 2, dtype=torch.int64)), "new_ids must be"),
        (lambda c: c.edit(0, 1, [3, 97]), r"new_ids must lie in \[0, 97\), got 3 to 97"),
        (lambda c: c.edit(0, 1, [1.5]), "new_ids must be integers"),
        (lambda c: c.update([]), "at least one token"),
        (lambda c: EditableContext(c.model, []), "input_ids must hold"),
    ],
)
def test_bad_edits_are_named_and_change_nothing(call, message):
    context = full(llama(1), ids(10))
    with pytest.raises(TypeError if "integers" in message else ValueError, match=message):
        call(context)
    assert torch.equal(context.ids, ids(10))


def test_a_context_of_one_token_completes_too():
    model = llama(2)
    wanted = model.generate(ids(1)[None], max_new_tokens=4, do_sample=False, pad_token_id=0)[0, 1:]
    assert torch.equal(full(model, ids(1)).complete(4), wanted)


@pytest.mark.model
def test_smollm2_after_an_edit_is_closer_to_the_truth_than_conflict_and_stale(smollm2):
    from assay.workloads.text import long_prompt

    text = long_prompt(smollm2.tokenizer, 330)[0]
    new, ahead = text[:300], text[300:]
    old = torch.cat([new[:200], new[240:]])

    def nll(context):
        cache, rest = context.cache(), torch.cat([context.ids[-1:], ahead])
        with torch.no_grad():
            logits = smollm2.model(input_ids=rest[None, :-1], cache=cache, use_cache=True).logits[0]
        return logits.log_softmax(-1)

    truth = nll(EditableContext(smollm2.model, new))

    def kl(context):
        return float((truth.exp() * (truth - nll(context))).sum(-1).mean())

    stale = EditableContext(smollm2.model, old)
    pie, conflict = stale.fork(), stale.fork()
    pie.edit(200, 200, new[200:240])
    conflict.edit(200, 200, new[200:240], rotate=False)
    assert kl(pie) < kl(stale)
    assert kl(pie) < kl(conflict)


def test_rotations_and_new_keys_are_checked():
    keys, angles = torch.randn(1, 2, 5, 4), torch.tensor([1.0, 0.1])
    for delta in (torch.full((5,), 1.5), torch.full((5,), torch.nan), True):
        with pytest.raises(TypeError, match="delta must"):
            rotate_keys(keys, delta, angles)
    for delta in (torch.arange(3), torch.tensor(3), torch.zeros(2, 5, dtype=torch.int64)):
        with pytest.raises(ValueError, match="delta must have shape"):
            rotate_keys(keys, delta, angles)
    with pytest.raises(TypeError, match="keys must hold"):
        rotate_keys(keys.long(), 0, angles)
    with pytest.raises(TypeError, match="interleaved"):
        rotate_keys(keys, 1, angles, interleaved="no")
    cache = cache_of([(keys, keys.clone())])
    for wrong in ([(keys[:, :, :1].half(), keys[:, :, :1])], [(1, 2)]):
        with pytest.raises(TypeError, match="new_kv must"):
            edit_cache(cache, 1, 1, wrong, None)
    assert cache.layers[0].keys is keys

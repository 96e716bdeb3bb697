"""generate_batch and prefill against transformers' own generate."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
import torch
from tests.properties.packing_models import PROMPTS, alone, tiny

from assay.methods.core.generation import loop
from assay.methods.core.generation.cache import keys_and_values, left_pad
from assay.methods.core.generation.loop import generate_batch, padded_prefill, prefill, set_settings
from assay.methods.inference.prepacking import PrepackedPrefill


@functools.cache
def one_by_one(new_tokens):
    """The oracle: each prompt generated alone, the end token forbidden."""
    model, results = tiny(), []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False
        )
        results.append(out[0, ids.shape[1] :].tolist())
    return results


@pytest.mark.parametrize("prepack", [False, True])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_every_batching_returns_what_the_prompt_alone_would(batch_size, ordered, prepack):
    model = tiny()
    set_settings(model, prefill=PrepackedPrefill if prepack else None)
    out = generate_batch(model, PROMPTS, new_tokens=5, batch_size=batch_size, sort_by_length=ordered)
    assert out == one_by_one(5)


def test_settings_are_the_defaults_and_arguments_win():
    model, sizes = tiny(), []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    set_settings(model, batch_size=4, sort_by_length=True)
    generate_batch(model, PROMPTS, new_tokens=1)
    assert sizes == [(4, 23), (3, 5)]
    sizes.clear()
    generate_batch(model, PROMPTS, new_tokens=1, batch_size=7, sort_by_length=False)
    assert sizes == [(7, 23)]
    hook.remove()


def test_prepack_setting_runs_packed_rows():
    model, sizes = tiny(), []
    set_settings(model, prefill=PrepackedPrefill)
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    generate_batch(model, PROMPTS, new_tokens=2, batch_size=7)
    assert sizes == [(1, sum(len(prompt) - 1 for prompt in PROMPTS)), (7, 1), (7, 1)]


def test_end_token_ends_a_prompt_when_asked():
    model = tiny()
    free = one_by_one(6)
    model.generation_config.eos_token_id = free[0][2]  # make a token that comes up the end token
    out = generate_batch(model, PROMPTS, new_tokens=6, ignore_eos=False, batch_size=7)
    end = free[0][2]
    assert out == [tokens[: tokens.index(end) + 1] if end in tokens else tokens for tokens in free]
    assert out[0][-1] == end
    assert all(len(tokens) == 6 for tokens in generate_batch(model, PROMPTS, new_tokens=6, batch_size=7))


@pytest.mark.parametrize("prepack", [False, True])
def test_prefill_is_the_seam(prepack):
    model = tiny()
    set_settings(model, prefill=PrepackedPrefill if prepack else None)
    done = prefill(model, *left_pad(PROMPTS, 0))
    assert done.lengths == [len(prompt) for prompt in PROMPTS]
    for i, prompt in enumerate(PROMPTS):
        reference, logits = alone(model, prompt)
        torch.testing.assert_close(done.logits[i], logits, atol=2e-5, rtol=1e-4)
        keys, _ = keys_and_values(done.cache)[0]
        torch.testing.assert_close(keys[i, :, -len(prompt) :], reference[0][0][0], atol=2e-5, rtol=1e-4)


def test_prefill_without_padding_is_the_plain_forward():
    model = tiny()
    set_settings(model, prefill=PrepackedPrefill)
    ids = torch.tensor([PROMPTS[1], PROMPTS[1][::-1]])
    assert torch.equal(prefill(model, ids).logits, padded_prefill(model, ids).logits)
    assert torch.equal(prefill(model, ids, torch.ones_like(ids)).logits, padded_prefill(model, ids).logits)


def test_a_generate_that_calls_prefill_itself_is_left_to_do_so():
    model, seen = tiny(), {}

    def own(**inputs):
        seen.update(inputs)
        return torch.cat(
            [
                inputs["input_ids"],
                prefill(model, inputs["input_ids"], inputs["attention_mask"]).logits.argmax(-1)[:, None],
            ],
            1,
        )

    own.calls_prefill = True
    set_settings(model, prefill=PrepackedPrefill)
    expected = generate_batch(model, PROMPTS, new_tokens=1, batch_size=7, ignore_eos=False)
    model.generate = own
    assert generate_batch(model, PROMPTS, new_tokens=1, batch_size=7, ignore_eos=False) == expected
    assert "cache" not in seen


def test_settings_travel_with_a_copy_and_threads_are_put_back():
    model, seen = tiny(), []
    set_settings(model, threads=1, batch_size=2)
    set_settings(model, sort_by_length=True)
    model = copy.deepcopy(model)
    assert model.assay_settings == {"threads": 1, "batch_size": 2, "sort_by_length": True}
    model.model.register_forward_pre_hook(lambda module, args: seen.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        generate_batch(model, PROMPTS[:2], new_tokens=1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {1}


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size must be a whole number at least 1, got 0"),
        ({"batch_size": float("nan")}, TypeError, "batch_size must be a whole number"),
        ({"batch_size": None}, TypeError, "batch_size must be a whole number"),
        ({"threads": True}, TypeError, "threads must be a whole number"),
        ({"sort_by_length": 1}, TypeError, "sort_by_length must be True or False, got 1"),
        ({"prefill": 1}, TypeError, "prefill must be a prefill's class or None, got 1"),
        ({"speed": 1}, ValueError, "settings must be among batch_size, sort_by_length, prefill, threads, got speed"),
        ({"threads": 10**9}, ValueError, "threads must be a whole number at least 1 and at most 1024"),
    ],
)
def test_bad_settings_are_named(values, error, message):
    model = tiny()
    with pytest.raises(error, match=message):
        set_settings(model, **values)
    assert loop.settings(model) == loop.DEFAULTS


def test_numpys_numbers_are_numbers():
    model = tiny()
    set_settings(model, batch_size=np.int64(2), threads=np.int32(1), sort_by_length=np.bool_(True))
    assert repr(model.assay_settings) == "{'batch_size': 2, 'threads': 1, 'sort_by_length': True}"
    prompts = [np.array([5, 6, 7]), torch.tensor([8, 9])]
    made = generate_batch(model, prompts, new_tokens=np.int64(2), batch_size=np.int64(1))
    assert made == generate_batch(tiny(), [[5, 6, 7], [8, 9]], new_tokens=2)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"new_tokens": 0}, ValueError, "new_tokens must be a whole number at least 1, got 0"),
        ({"new_tokens": float("nan")}, TypeError, "new_tokens must be a whole number"),  # would go on for ever
        ({"new_tokens": True}, TypeError, "new_tokens must be a whole number"),
        ({"batch_size": 0}, ValueError, "batch_size must be a whole number at least 1, got 0"),
        ({"batch_size": 1.5}, TypeError, "batch_size must be a whole number"),
        ({"sort_by_length": "no"}, TypeError, "sort_by_length must be True or False"),
        ({"ignore_eos": 0}, TypeError, "ignore_eos must be True or False"),
        ({"pad_token_id": 97}, ValueError, "pad_token_id must be a whole number at least 0 and at most 96, got 97"),
        ({"pad_token_id": -1}, ValueError, "pad_token_id must be a whole number"),
        ({"prompts": []}, ValueError, "at least one prompt"),
        ({"prompts": [[5], [True]]}, TypeError, "token ids, which are whole numbers: True is a truth value"),
    ],
)
def test_bad_arguments_are_named(values, error, message):
    given = {"prompts": [[5], [6, 7]], "new_tokens": 1} | values
    with pytest.raises(error, match=message):
        generate_batch(tiny(), given.pop("prompts"), **given)


def test_models_that_do_not_continue_prompts_are_refused():
    """An encoder-decoder answers from an empty beginning: what follows the prompt's length would be cut out of that."""
    from tests.properties.architectures import build

    for name in ("t5", "whisper", "vit"):
        with pytest.raises(ValueError, match="model must continue prompts: "):
            generate_batch(build(name), [[5, 6]], new_tokens=1)

"""KV Prediction: the mechanism against a plain float64 reference, the degenerate case that is the base model, the loss, and the cost."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tests.properties.architectures import CAUSAL, build, inputs
from tests.tiny import tiny_model, token_ids
from transformers.cache_utils import DynamicCache

from assay.measure.cost import count_cost
from assay.methods.core.generation.cache import keys_and_values
from assay.methods.inference.kv_prediction import (
    KVPredictionConfig,
    KVPredictor,
    Predictor,
    kept_layers,
    layer_map,
    parameter_ratio,
    prompt_cost,
    pruned,
    pruned_map,
)
from assay.methods.inference.kv_prediction import model as room

IDS = token_ids(2, 12)


def predictor(base=None, **settings):
    """A base of five layers and a narrower auxiliary of two."""
    base = tiny_model(num_hidden_layers=5) if base is None else base
    small = tiny_model(
        num_hidden_layers=2, hidden_size=48, num_attention_heads=2, num_key_value_heads=1, head_dim=24, seed=1
    )
    torch.manual_seed(2)
    return KVPredictor.from_base(base, auxiliary=small.to(base.dtype), **settings).eval()


def itself(base):
    """A predictor whose auxiliary is the base and whose maps change nothing."""
    made = KVPredictor.from_base(base, auxiliary=copy.deepcopy(base))
    made.predictor.identity_()
    return made.eval()


# --------------------------------------------------------------------------------------------------------- layer maps


def test_layer_maps_are_those_of_the_papers_table():
    doubled = [layer for layer in range(8) for _ in range(2)]
    assert layer_map(28, 20) == doubled + list(range(8, 20))
    assert layer_map(28, 16) == [layer for layer in range(12) for _ in range(2)] + [12, 13, 14, 15]
    assert layer_map(36, 16) == [layer for layer in range(4) for _ in range(3)] + [
        layer for layer in range(4, 16) for _ in range(2)
    ]
    assert layer_map(28, 14) == [layer // 2 for layer in range(28)]
    assert layer_map(3, 3) == [0, 1, 2]


def test_kept_layers_are_those_of_the_papers_table():
    assert kept_layers(28, 0.75) == [0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, 16, 17, 18, 20, 21, 22, 24, 25, 26]
    assert kept_layers(28, 0.5) == list(range(0, 28, 2))
    assert kept_layers(28, 0.25) == list(range(0, 28, 4))
    assert kept_layers(30, 0.25) == list(range(0, 30, 4))
    assert kept_layers(5, 1) == [0, 1, 2, 3, 4]
    for share in (1e-12, 4e-4, 1e-3):
        assert kept_layers(30, share) == [0]


def test_a_removed_layer_is_served_by_the_kept_one_before_it():
    table = "0 1 2 2 3 4 5 5 6 7 8 8 9 10 11 11 12 13 14 14 15 16 17 17 18 19 20 20"
    assert pruned_map(kept_layers(28, 0.75), 28) == [int(layer) for layer in table.split()]
    assert pruned_map(kept_layers(28, 0.5), 28) == [layer // 2 for layer in range(28)]
    assert pruned_map(kept_layers(36, 0.25), 36) == [layer // 4 for layer in range(36)]


@pytest.mark.parametrize("kept", [[], [1, 2], [0, 2, 1], [0, 0], [0, 9]])
def test_kept_layers_that_make_no_map_are_refused(kept):
    with pytest.raises(ValueError, match="kept must be"):
        pruned_map(kept, 8)


def test_layers_out_of_range_are_refused():
    with pytest.raises(ValueError, match="auxiliary_layers"):
        layer_map(3, 4)
    with pytest.raises(ValueError, match="share"):
        kept_layers(4, 0)
    with pytest.raises(ValueError, match="share"):
        kept_layers(4, 1.5)


# ----------------------------------------------------------------------------------------------------- plain reference


def plain(model, tokens, first=0, past=None, instead=None):
    """A Llama token by token in float64: logits, and the raw keys and values of each layer, (tokens, width).

    `past`: raw keys and values of the tokens before `first`. `instead`: those that take the place of the model's own.
    """
    weights, config = model.double().state_dict(), model.config
    heads, groups, dim = (
        config.num_attention_heads,
        config.num_key_value_heads,
        model.model.layers[0].self_attn.head_dim,
    )
    count = len(tokens)

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weight

    def turn(x, place):
        half = dim // 2
        angle = place * config.rope_parameters["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half)
        a, b = x[:half], x[half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()])

    x = weights["model.embed_tokens.weight"][tokens]
    raw = []
    for index in range(config.num_hidden_layers):
        own = {n.removeprefix(f"model.layers.{index}."): w for n, w in weights.items() if f"layers.{index}." in n}
        y = norm(x, own["input_layernorm.weight"])
        queries, keys, values = (y @ own[f"self_attn.{part}_proj.weight"].T for part in "qkv")
        raw.append((keys, values))
        if instead is not None:
            keys, values = instead[index]
        if past is not None:
            keys, values = torch.cat([past[index][0], keys]), torch.cat([past[index][1], values])
        mixed = torch.zeros(count, heads, dim, dtype=torch.float64)
        for token in range(count):
            place = first + token
            for head in range(heads):
                shared = slice(head // (heads // groups) * dim, (head // (heads // groups) + 1) * dim)
                query = turn(queries[token, head * dim : (head + 1) * dim], place)
                scores = torch.stack([query @ turn(keys[p, shared], p) for p in range(place + 1)]) / dim**0.5
                mixed[token, head] = scores.softmax(0) @ values[: place + 1, shared]
        x = x + mixed.flatten(1) @ own["self_attn.o_proj.weight"].T
        y = norm(x, own["post_attention_layernorm.weight"])
        gated = F.silu(y @ own["mlp.gate_proj.weight"].T) * (y @ own["mlp.up_proj.weight"].T)
        x = x + gated @ own["mlp.down_proj.weight"].T
    return norm(x, weights["model.norm.weight"]) @ weights["lm_head.weight"].T, raw


def plainly_predicted(model, tokens):
    """The base's raw keys and values from the auxiliary's, by the formula."""
    _, raw = plain(model.auxiliary, tokens)
    found = []
    for layer, keys, values in zip([0, 0, 0, 1, 1], model.predictor.keys, model.predictor.values, strict=True):
        found.append((raw[layer][0] @ keys.weight.T + keys.bias, raw[layer][1] @ values.weight.T + values.bias))
    return found


@torch.no_grad()
def test_training_form_and_prompt_form_are_the_formulas():
    model = predictor().double()
    tokens = IDS[0]
    expected, _ = plain(model.base, tokens, instead=plainly_predicted(model, tokens))
    torch.testing.assert_close(model(input_ids=tokens[None], use_cache=False).logits[0], expected, rtol=1e-5, atol=1e-5)
    past = plainly_predicted(model, tokens[:-1])
    expected, _ = plain(model.base, tokens[-1:], first=len(tokens) - 1, past=past)
    out = model(input_ids=tokens[None], use_cache=True, logits_to_keep=1)
    torch.testing.assert_close(out.logits[0], expected, rtol=1e-5, atol=1e-5)  # rotary tables are float32


# ------------------------------------------------------------------------------------------------ the base model itself


@torch.no_grad()
def check_itself(base, ids, mask=None):
    """Training form, prompt form and steps equal the base's own, bit for bit where its work is cut as the prediction cuts it."""
    model, places = itself(base), None
    if mask is not None:
        places = (mask.cumsum(-1) - 1).clamp(min=0)
    whole = {"attention_mask": mask, "position_ids": places}
    own = base(input_ids=ids, use_cache=False, **whole).logits
    there = slice(None) if mask is None else mask.bool()
    assert torch.equal(model(input_ids=ids, use_cache=False, **whole).logits[there], own[there])
    head = {name: None if x is None else x[:, :-1] for name, x in whole.items()}
    last = {"attention_mask": mask, "position_ids": None if places is None else places[:, -1:]}
    cache = base(input_ids=ids[:, :-1], use_cache=True, **head).cache
    expected = base(input_ids=ids[:, -1:], cache=cache, use_cache=True, **last)
    found = model(input_ids=ids, use_cache=True, logits_to_keep=1, **whole)
    for step in range(3):
        assert torch.equal(found.logits[:, -1], expected.logits[:, -1]), step
        token = expected.logits[:, -1:].argmax(-1)
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            places = mask.sum(-1, keepdim=True) - 1
            last = {"attention_mask": mask, "position_ids": places}
        expected = base(input_ids=token, cache=expected.cache, use_cache=True, **last)
        found = model(input_ids=token, cache=found.cache, use_cache=True, **last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identity_is_the_base_on_real_weights(smollm2_slice, dtype):
    base = copy.deepcopy(smollm2_slice.model).to(dtype)
    ids = smollm2_slice.tokenizer("def area(self):\n    return self.width * self.height", return_tensors="pt").input_ids
    check_itself(base, ids)
    padded = torch.cat([torch.zeros_like(ids[:, :4]), ids[:, :-4]], 1)
    mask = torch.ones(2, ids.shape[1], dtype=torch.long)
    mask[1, :4] = 0
    check_itself(base, torch.cat([ids, padded]), mask)


@pytest.mark.slow
def test_identity_is_the_base_on_the_whole_model(smollm2):
    ids = smollm2.tokenizer("The capital of France is", return_tensors="pt").input_ids
    check_itself(copy.deepcopy(smollm2.model), ids)


def test_a_prompt_of_one_token_is_the_bases():
    model = predictor()
    ids = IDS[:, :1]
    assert torch.equal(
        model(input_ids=ids, use_cache=True).logits, model.base(input_ids=ids, use_cache=True).logits
    )  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", CAUSAL)
def test_architectures_work_or_are_refused_before_anything_changes(name):
    base = build(name)
    before = {key: value.clone() for key, value in base.state_dict().items()}
    if name in ("gpt2", "opt", "biogpt", "mamba", "gpt_oss"):
        with pytest.raises(ValueError, match=type(base).__name__):
            KVPredictor.from_base(base, auxiliary=0.5)
        assert all(parameter.requires_grad for parameter in base.parameters())
    else:
        model, given = itself(base), inputs(name)
        own = base(**given, use_cache=False).logits
        torch.testing.assert_close(model(**given, use_cache=False).logits, own, rtol=1e-4, atol=1e-4)
        prompt = given["input_ids"]
        expected = base.generate(prompt, max_new_tokens=4, do_sample=False)
        assert torch.equal(model.generate(prompt, max_new_tokens=4, do_sample=False), expected)
        assert KVPredictor.from_base(base, auxiliary=0.5)(**given).logits.isfinite().all()
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("kind", ["Qwen3", "SmolLM3", "Olmo2", "Gemma"])
def test_key_norms_and_layers_that_do_not_turn(kind):
    """Norms of heads and of all keys together, layers without rotary embedding."""
    more = {"head_dim": 16} if kind == "Gemma" else {}
    if kind == "SmolLM3":
        more = {"no_rope_layers": [1, 0], "pad_token_id": 0}
    base = tiny_model(kind, **more)
    for name, parameter in base.named_parameters():
        if "k_norm" in name:
            parameter.copy_(torch.rand_like(parameter) + 0.5)
    check_itself(base, IDS)
    model = KVPredictor.from_base(base, auxiliary=0.5)
    assert model.generate(IDS, max_new_tokens=3, do_sample=False).shape == (2, 15)


@pytest.mark.parametrize("name", ["mistral", "gemma3", "gemma2"])
@torch.no_grad()
def test_windows_hold_what_the_whole_cache_shows(name):
    """A prompt longer than the window: layers that forget and layers that do not give the same logits."""
    torch.manual_seed(0)
    model = KVPredictor.from_base(build(name, num_hidden_layers=2), auxiliary=0.5)
    ids = inputs(name, tokens=40)["input_ids"]
    forgets, keeps = DynamicCache(config=model.config.get_text_config()), DynamicCache()
    for tokens in (ids[:, :36], ids[:, 36:37], ids[:, 37:]):
        found = [model(input_ids=tokens, cache=cache, use_cache=True, logits_to_keep=1) for cache in (forgets, keeps)]
        torch.testing.assert_close(found[0].logits, found[1].logits, rtol=1e-4, atol=1e-4)
    assert min(layer.keys.shape[2] for layer in forgets.layers) < 16 <= keeps.layers[0].keys.shape[2]


# --------------------------------------------------------------------------------------------------------- the cache


@torch.no_grad()
def test_the_cache_is_plain_and_shaped_like_the_bases():
    model = predictor()
    out = model(input_ids=IDS, use_cache=True, logits_to_keep=1)
    own = model.base(input_ids=IDS, use_cache=True).cache
    assert type(out.cache) is DynamicCache
    assert out.cache.get_seq_length() == IDS.shape[1]
    for ours, theirs in zip(keys_and_values(out.cache), keys_and_values(own), strict=True):
        assert [x.shape for x in ours] == [x.shape for x in theirs]


@torch.no_grad()
def test_prompt_and_training_form_differ_by_the_last_tokens_own_keys_alone():
    model = predictor()
    trained_for = model(input_ids=IDS, use_cache=False).logits[:, -1]
    at_inference = model(input_ids=IDS, use_cache=True, logits_to_keep=1)
    assert (trained_for - at_inference.logits[:, -1]).abs().max() > 1e-3
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(keys_and_values(at_inference.cache)):
        cache.update(keys[:, :, :-1], values[:, :, :-1], layer)
    last = [(keys[:, -1:], values[:, -1:]) for keys, values in model.predict(IDS)]
    with room.given(model.sites, last):
        out = model.base(input_ids=IDS[:, -1:], cache=cache, use_cache=True)
    torch.testing.assert_close(out.logits[:, -1], trained_for, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_earlier_logits_are_those_of_the_training_form():
    model = predictor()
    whole = model(input_ids=IDS, use_cache=True)
    assert whole.logits.shape[:2] == IDS.shape
    training = model(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(whole.logits[:, :-1], training[:, :-1], rtol=1e-4, atol=1e-4)
    for keep, expected in ((3, whole.logits[:, -3:]), (torch.tensor([0, 11]), whole.logits[:, [0, 11]])):
        found = model(input_ids=IDS, use_cache=True, logits_to_keep=keep)
        assert torch.equal(found.logits, expected)
        for ours, theirs in zip(keys_and_values(found.cache), keys_and_values(whole.cache), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@torch.no_grad()
def test_a_later_turn_is_read_by_the_base():
    model = predictor()
    out = model(input_ids=IDS[:, :6], use_cache=True, logits_to_keep=1)
    asked = []
    model.auxiliary.model.layers[0].register_forward_hook(lambda *_: asked.append(1))
    kept = copy.deepcopy(out.cache)
    found = model(input_ids=IDS[:, 6:], cache=out.cache, use_cache=True).logits
    assert torch.equal(found, model.base(input_ids=IDS[:, 6:], cache=kept, use_cache=True).logits)
    assert not asked


@torch.no_grad()
def test_what_is_saved_is_not_computed():
    """The base sees one token, makes keys of one token, and the auxiliary's head and last attention are left out."""
    model, seen = predictor(), []
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "k_proj", "v_proj", "o_proj", "mlp", "lm_head")):
            module.register_forward_hook(
                lambda module, given, out, name=name: seen.append((name, given[0].shape[1]))
            )  # fmt: skip
    model(input_ids=IDS, use_cache=True, logits_to_keep=1)
    assert {tokens for name, tokens in seen if name.startswith("base")} == {1}
    small = {name for name, _ in seen if name.startswith("auxiliary")}
    last = "auxiliary.model.layers.1"
    assert {f"{last}.self_attn.k_proj", f"{last}.self_attn.v_proj"} <= small
    assert not {"auxiliary.lm_head", f"{last}.self_attn.q_proj", f"{last}.self_attn.o_proj", f"{last}.mlp"} & small
    counted = count_cost(model, input_ids=IDS, use_cache=False).modules
    made = {m.name.split(".")[0]: 0 for m in counted}
    for m in counted:
        if m.name.endswith(("k_proj", "v_proj")):
            made[m.name.split(".")[0]] += m.macs
    assert made["base"] == 0 < made["auxiliary"]


def test_layers_behind_the_last_that_serves_are_not_run():
    model = predictor(layer_map=[0, 0, 0, 0, 0])
    seen = []
    model.auxiliary.model.layers[1].register_forward_hook(lambda *_: seen.append(1))
    model(input_ids=IDS, use_cache=True, logits_to_keep=1)
    assert not seen


# ------------------------------------------------------------------------------------------------------------ training


def test_the_base_stays_and_gradients_reach_the_auxiliary_through_predicted_keys():
    model = predictor(auxiliary_weight=0.0, consistency=0.0).train()
    assert not model.base.training
    assert model.auxiliary.training
    before = {name: value.clone() for name, value in model.base.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is None for parameter in model.base.parameters())
    for name in (
        "model.embed_tokens.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.1.self_attn.k_proj.weight",
    ):
        assert model.auxiliary.get_parameter(name).grad.abs().max() > 0, name
    assert all(
        parameter.grad.abs().max() > 0 for name, parameter in model.predictor.named_parameters() if "bias" not in name
    )
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.base.state_dict().items())


def test_the_loss_is_its_formula():
    model = predictor(auxiliary_weight=0.5, consistency=0.25, z_loss=0.01).double()
    labels = IDS.clone()
    labels[0, :4] = -100
    with torch.no_grad():
        logits = model(input_ids=IDS, use_cache=False).logits
        small = model.auxiliary(input_ids=IDS).logits
        out = model(input_ids=IDS, labels=labels)
        predicted = model.predict(IDS)
        _, true = plain(model.base, IDS[0])
    assert torch.equal(out.logits, logits)
    wanted, asked = labels[:, 1:], labels[:, 1:] != -100

    def terms(x):
        x = x[:, :-1][asked].float()
        chosen = x.log_softmax(-1).gather(1, wanted[asked][:, None])
        return -chosen.mean() + 0.01 * x.exp().sum(-1).log().square().mean()

    found = model.losses(IDS, labels)
    rows = [torch.stack([(a - b).abs().mean() for a, b in zip(pair, own, strict=True)]).sum() for pair, own in zip(
        [(keys[0], values[0]) for keys, values in predicted], true, strict=True)]  # fmt: skip
    alone = model.losses(IDS[:1], labels[:1])["consistency"]
    torch.testing.assert_close(alone.double(), torch.stack(rows).mean(), rtol=1e-4, atol=1e-4)
    expected = terms(logits) + 0.5 * terms(small) + 0.25 * found["consistency"]
    torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=1e-5)


def test_the_released_loss_sums_over_layers():
    base = tiny_model(num_hidden_layers=5)
    paper, released = (predictor(base, variant=variant).losses(IDS, IDS)["consistency"] for variant in room.VARIANTS)
    torch.testing.assert_close(released, 5 * paper)
    # the released configuration, field by field: auxiliary_loss 1, kv_loss 1 on sums, z_loss_eps 1e-4
    config = KVPredictionConfig(variant="as_released")
    assert (config.auxiliary_weight, config.consistency, config.z_loss) == (1.0, 1.0, 1e-4)


def test_caches_that_match_have_no_consistency_loss_and_padding_does_not_count():
    model = itself(tiny_model())
    assert model.losses(IDS, IDS)["consistency"] == 0
    with torch.no_grad():
        model.predictor.values[1].bias[0] += 1.0
    off = model.losses(IDS, IDS)["consistency"].item()
    assert off == pytest.approx(1 / 32 / 2, rel=1e-4)  # one of 32 values, one of two layers
    model = predictor()
    padded = torch.cat([torch.zeros_like(IDS[:, :3]), IDS], 1)
    mask = (torch.arange(15) >= 3).long().expand(2, -1)
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    labels = torch.where(mask.bool(), padded, -100)
    labels[:, 3] = -100  # padding is not asked for the first token
    alone = model.losses(IDS, IDS)
    found = model.losses(padded, labels, mask, places)
    for name, value in alone.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)


def test_key_norms_come_before_the_comparison():
    base = tiny_model("Qwen3")
    model = itself(base)
    with torch.no_grad():
        for linear in model.predictor.keys:
            linear.weight.mul_(2.0)  # the norm takes the factor out again
    assert model.losses(IDS, IDS)["consistency"] < 1e-3


def test_sums_over_items_add_up_over_parts_of_a_batch():
    model = predictor()
    parts = [model(input_ids=row[None], labels=row[None], num_items_in_batch=22).loss for row in IDS]
    whole = model(input_ids=IDS, labels=IDS, num_items_in_batch=22).loss
    torch.testing.assert_close(sum(parts), whole)


def test_a_weight_of_zero_saves_the_pass_for_true_keys(monkeypatch):
    model = predictor(consistency=0.0)
    monkeypatch.setattr(room, "read", None)
    assert "consistency" not in model.losses(IDS, IDS)


# ---------------------------------------------------------------------------------------------------------------- cost


@pytest.mark.parametrize("tokens", [2, 10])
@pytest.mark.parametrize("kind", ["Llama", "Phi3", "Qwen3"])
def test_the_cost_is_what_is_counted(kind, tokens):
    base = tiny_model(kind, num_hidden_layers=4)
    model = KVPredictor.from_base(base, auxiliary=0.5)
    ids = token_ids(3, tokens)
    found = prompt_cost(model, tokens, batch=3)
    counted = count_cost(model, input_ids=ids, use_cache=True, logits_to_keep=1)
    assert not counted.uncounted
    macs = {
        m.name: m.macs for m in counted.modules if "rotary" not in m.name
    }  # its angles are a product too, in transformers
    by_part = {
        part: sum(value for name, value in macs.items() if name.startswith(part))
        for part in ("auxiliary", "predictor", "base")
    }
    assert by_part == {"auxiliary": found.auxiliary, "predictor": found.predictor, "base": found.step}
    whole = count_cost(base, input_ids=ids, use_cache=True, logits_to_keep=1)
    assert sum(m.macs for m in whole.modules if "rotary" not in m.name) == found.base
    assert found.reduction == pytest.approx(found.base / sum(macs.values()), rel=0.01)


def test_parameters_are_those_of_the_formula():
    model = predictor()
    widths = {"auxiliary": 24, "base": 32}
    expected = sum(2 * (widths["auxiliary"] * widths["base"] + widths["base"]) for _ in range(5))
    assert sum(p.numel() for p in model.predictor.parameters()) == expected
    assert parameter_ratio(itself(tiny_model())) == 1.0


def test_the_cost_of_experts_is_refused():
    with pytest.raises(ValueError, match="linear layers"):
        prompt_cost(KVPredictor.from_base(build("mixtral"), auxiliary=0.5), 8)
    with pytest.raises(ValueError, match="tokens"):
        prompt_cost(predictor(), 1)


# ------------------------------------------------------------------------------------------------------- pruning, refusals


@torch.no_grad()
def test_a_pruned_copy_is_the_base_without_its_layers():
    base = tiny_model(num_hidden_layers=4)
    small = pruned(base, 0.5)
    for place, index in enumerate((0, 2)):
        ours, theirs = small.model.layers[place].state_dict(), base.model.layers[index].state_dict()
        assert all(torch.equal(ours[name], value) for name, value in theirs.items())
        assert small.model.layers[place].self_attn.layer_idx == place
    assert base.config.num_hidden_layers == len(base.model.layers) == 4
    small.model.layers[0].mlp.up_proj.weight.zero_()
    assert base.model.layers[0].mlp.up_proj.weight.abs().max() > 0
    model = KVPredictor.from_base(base, auxiliary=0.5)
    assert model.config.layer_map == [0, 0, 1, 1]
    assert all(parameter.requires_grad for parameter in model.auxiliary.parameters())


def test_a_pruned_copy_keeps_the_kinds_of_its_layers():
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "full_attention"]
    small = pruned(build("gemma3", num_hidden_layers=4, layer_types=kinds), 0.5)
    assert small.config.layer_types == ["sliding_attention", "full_attention"]
    again = type(small)(small.config)
    again.load_state_dict(small.state_dict())
    ids = inputs("gemma3")["input_ids"]
    assert torch.equal(again.eval()(ids).logits, small(ids).logits)


def test_widths_may_differ_from_layer_to_layer():
    torch.manual_seed(0)
    found = Predictor([0, 1], [(3, 5), (4, 6)], [(7, 8), (9, 10)])(
        [[torch.randn(1, 2, 3), torch.randn(1, 2, 5)], [torch.randn(1, 2, 4), torch.randn(1, 2, 6)]]
    )
    assert [[x.shape[-1] for x in pair] for pair in found] == [[7, 8], [9, 10]]
    with pytest.raises(ValueError, match="equal widths"):
        Predictor([0], [(3, 5)], [(3, 6)]).identity_()


def test_models_that_do_not_go_together_are_refused():
    base = tiny_model()
    for other, error, words in (
        (tiny_model(vocab_size=50), ValueError, "vocabulary"),
        (tiny_model().bfloat16(), TypeError, "dtype"),
        (base, ValueError, "share no weights"),
        (build("gpt2"), ValueError, "GPT2"),
        ("small", TypeError, "share"),
        (True, TypeError, "share"),
        (0.0, ValueError, "share"),
        (tiny_model(num_hidden_layers=3), ValueError, "layer_map"),
    ):
        with pytest.raises(error, match=words):
            KVPredictor.from_base(base, auxiliary=other)
    assert all(parameter.requires_grad for parameter in base.parameters())


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"layer_map": [0]}, ValueError, "layer_map"),
        ({"layer_map": [0, 1, 0, 1, 1]}, ValueError, "never fall"),
        ({"layer_map": [0, 0, 0, 0, 2]}, ValueError, "layer_map"),
        ({"layer_map": 3}, TypeError, "layer_map"),
        ({"consistency": float("nan")}, ValueError, "consistency"),
        ({"auxiliary_weight": -1}, ValueError, "auxiliary_weight"),
        ({"z_loss": "much"}, TypeError, "z_loss"),
        ({"variant": "released"}, ValueError, "variant"),
    ],
)
def test_bad_settings_are_refused(settings, error, words):
    with pytest.raises(error, match=words):
        predictor(**settings)


def test_a_configuration_that_is_none_is_refused():
    with pytest.raises(TypeError, match="auxiliary must be"):
        KVPredictionConfig(auxiliary=3)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"input_ids": torch.ones(1, 3)}, TypeError, "input_ids"),
        ({"input_ids": IDS[:, :0]}, ValueError, "input_ids"),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 1, 12, 12)}, ValueError, "attention_mask"),
        ({"input_ids": IDS, "labels": IDS[:, 1:]}, ValueError, "labels"),
        ({"input_ids": IDS, "labels": IDS, "logits_to_keep": 1}, ValueError, "logits_to_keep"),
        ({"input_ids": IDS, "output_hidden_states": True}, ValueError, "output_hidden_states"),
        ({"input_ids": IDS, "return_dict": False}, ValueError, "return_dict"),
        ({"inputs_embeds": torch.zeros(1, 3, 64)}, ValueError, "inputs_embeds"),
        ({"input_ids": IDS, "past_key_values": DynamicCache()}, TypeError, "cache"),
    ],
)
def test_bad_input_is_refused(given, error, words):
    with pytest.raises(error, match=words):
        predictor()(**given)


def test_a_vocabulary_of_one_of_the_two_cannot_be_changed():
    model = predictor()
    with pytest.raises(NotImplementedError, match="before they are wrapped"):
        model.resize_token_embeddings(120)
    assert model.get_input_embeddings().num_embeddings == model.auxiliary.get_input_embeddings().num_embeddings == 97


def test_labels_behind_a_cache_are_refused():
    model = predictor()
    cache = model(input_ids=IDS, use_cache=True).cache
    with pytest.raises(ValueError, match="labels"):
        model(input_ids=IDS, cache=cache, labels=IDS)


def test_hooks_and_own_projections_are_gone_afterwards():
    model = predictor()
    model(input_ids=IDS, use_cache=False)
    model(input_ids=IDS, use_cache=True)
    with pytest.raises(RuntimeError), room.given(model.sites, model.predict(IDS)):
        raise RuntimeError
    for module in model.modules():
        assert "forward" not in module.__dict__
        assert not module._forward_hooks

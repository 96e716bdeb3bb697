"""HAMburger's parts and its teacher-forced pass: what must hold, against references written from the formulas."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from tests.properties import architectures
from tests.tiny import tiny_model, token_ids
from transformers import LlamaConfig

from assay.methods.inference import hamburger as room
from assay.methods.inference.hamburger import (
    CompositionalEmbedder,
    HamburgerConfig,
    HamburgerForCausalLM,
    entropy_of_confidence,
    group_ids,
    grouped,
    segment,
    token_entropies,
)
from assay.methods.inference.hamburger.modules import micro_config

SIZES = [1, 1, 1, 3, 1, 2, 4, 1, 2, 2]  # of a row of 18 tokens
GROUPS = group_ids(SIZES)


def grafted(base=None, *, seed=1, **settings):
    """A tiny model whose stop head is as wide as its other layers, so that groups of every size occur."""
    base = tiny_model() if base is None else base
    torch.manual_seed(seed)
    chosen = {"micro_layers": 2, "merger_heads": 4, "confidence": None, **settings}
    return HamburgerForCausalLM.from_base(base, **chosen)


def apart(found, expected):
    """The largest difference, relative to the largest number: what micro steps give has no norm, and may be large."""
    return float((found - expected).abs().max() / expected.abs().max())


# ------------------------------------------------------------------------------------------------------------- segmentation


def test_released_strategy_by_hand():
    # 2.0 begins; 0.5 < 0.3 * 2; 0.59 < 0.6; 0.7 is not; 0.04 < 0.05; 0.3 > 0.21; 0.01, 0.01, 0.01 join, and then four are full
    found = segment([2.0, 0.5, 0.59, 0.7, 0.04, 0.3, 0.01, 0.01, 0.01, 0.01])
    assert found == [3, 2, 4, 1]


def test_a_small_first_entropy_begins_the_first_group():
    assert segment([0.01, 0.02, 2.0, 0.1]) == [2, 2]


def test_a_group_of_certain_tokens_takes_its_largest_as_the_measure():
    assert segment([0.01, 0.04, 0.011, 0.3], threshold=0.05) == [3, 1]
    assert segment([0.0, 0.2, 0.05, 0.07], threshold=0.05) == [1, 2, 1]  # 0.05 < 0.3 * 0.2, 0.07 is not


@pytest.mark.parametrize("strategy", sorted(room.STRATEGIES))
@pytest.mark.parametrize("most", [1, 2, 4, 7])
def test_sizes_add_up_and_stay_within_bounds(strategy, most):
    values = torch.distributions.Exponential(1.0).sample((200,)) * torch.tensor([0.02, 2.0]).repeat(100)
    found = segment(values, strategy=strategy, max_steps=most, vocabulary=256)
    assert sum(found) == 200
    assert set(found) <= set(range(1, most + 1))
    assert found == segment(values.tolist(), strategy=strategy, max_steps=most, vocabulary=256)
    assert (max(found) == 1) == (most == 1)


def test_thresholds_at_their_ends():
    values = torch.rand(30).tolist()
    assert segment(values, threshold=0.0, ratio=0.0) == [1] * 30
    assert segment(values, threshold=math.inf) == [4] * 7 + [2]
    assert segment([]) == []


def test_other_strategies_by_hand():
    values = [2.0, 0.6, 0.61, 0.1, 0.2]
    assert segment(values, strategy="decreasing") == [2, 2, 1]  # against the first of the group, and equal joins
    assert segment(values, strategy="sliding", threshold=0.5) == [1, 1, 3]
    assert segment(values, strategy="small_group", threshold=0.5) == [1, 1, 1, 2]
    assert segment([0.1, 2.0, 0.1], strategy="sliding", threshold=0.5) == [1, 2]
    assert segment([0.1, 2.0, 0.1], strategy="small_group", threshold=0.5) == [1, 1, 1]


def test_thresholds_of_a_confidence():
    p = torch.full((256,), 0.3 / 255, dtype=torch.float64)
    p[0] = 0.7
    assert entropy_of_confidence(0.7, 256) == pytest.approx(float(-(p * p.log()).sum()))
    assert segment([1.0, entropy_of_confidence(0.7, 256) - 1e-9], strategy="sliding", vocabulary=256) == [2]
    assert segment([1.0, 1e-9 + entropy_of_confidence(0.7, 256)], strategy="sliding", vocabulary=256) == [1, 1]


def test_entropies_are_those_of_the_prediction_before():
    model, ids = tiny_model(), token_ids(2, 9)
    found = token_entropies(model, ids)
    p = model(ids).logits.double().softmax(-1)
    expected = -(p * p.log()).sum(-1)[:, :-1]
    assert torch.allclose(found[:, 1:].double(), expected, atol=1e-5)
    assert found[:, 0].isinf().all()
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    padded = token_entropies(model, ids, mask)
    alone = token_entropies(model, ids[1:, 3:])
    assert torch.allclose(padded[1, 4:], alone[0, 1:], atol=1e-4)
    assert padded[1, :4].isinf().all()  # the first token stands behind padding, which predicts nothing
    assert padded[0, 1:].isfinite().all()


class Says:
    """A model whose logits are given."""

    def __init__(self, logits):
        self.logits = logits

    def __call__(self, **_):
        return self


def test_a_model_that_says_nan_is_not_certain():
    logits = torch.zeros(1, 4, 8)
    logits[0, 1, 3] = torch.nan
    found = token_entropies(Says(logits), token_ids(1, 4))
    assert found[0, 1:].isnan().tolist() == [False, True, False]
    with pytest.raises(ValueError, match="NaN"):
        grouped(found)


def test_tokens_that_are_ruled_out_add_no_entropy():
    logits = torch.zeros(1, 3, 8)
    logits[..., 4:] = -torch.inf
    found = token_entropies(Says(logits), token_ids(1, 3))
    assert found[0, 1:].tolist() == pytest.approx([math.log(4)] * 2)


def test_prompts_are_not_merged_and_padding_is_no_group():
    entropies = torch.zeros(2, 7)
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, :2] = 0
    assert grouped(entropies, [2, 3], mask).tolist() == [[0, 1, 2, 2, 2, 2, 3], [-1, -1, 0, 1, 2, 3, 3]]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"strategy": "entropy"}, ValueError, "strategy must be one of"),
        ({"max_steps": 0}, ValueError, "max_steps"),
        ({"threshold": -1.0}, ValueError, "threshold"),
        ({"threshold": math.nan}, ValueError, "threshold"),
        ({"ratio": math.nan}, ValueError, "ratio"),
        ({"entropies": [0.1, math.nan]}, ValueError, "entropies"),
    ],
)
def test_bad_segmentations(change, error, words):
    with pytest.raises(error, match=words):
        segment(**{"entropies": [0.1], **change})


# ---------------------------------------------------------------------------------------------------------- the two buns


def merged_by_formula(embedder, embeds):
    """mean + W_o MHA(W_q mean, W_k [e; p], W_v [e; p]), head by head, float64: embeds (s, D)."""
    s, width = embeds.shape
    mean = embeds.mean(0)
    placed = torch.cat([embeds, embedder.places[:s]], 1)
    q, k, v = embedder.q_proj(mean), embedder.k_proj(placed), embedder.v_proj(placed)
    size, parts = width // embedder.heads, []
    for head in range(embedder.heads):
        own = slice(head * size, (head + 1) * size)
        weights = (k[:, own] @ q[own] / math.sqrt(size)).softmax(0)
        parts.append(weights @ v[:, own])
    return mean + embedder.out_proj(torch.cat(parts))


def test_the_embedder_is_its_formula():
    torch.manual_seed(0)
    embedder = CompositionalEmbedder(24, 3, 5).double()
    embeds = torch.randn(6, 5, 24, dtype=torch.float64)
    sizes = torch.tensor([2, 5, 1, 3, 1, 4])
    found = embedder(embeds, sizes)
    for row, size in enumerate(sizes.tolist()):
        expected = embeds[row, 0] if size == 1 else merged_by_formula(embedder, embeds[row, :size])
        assert torch.allclose(found[row], expected, atol=1e-12), size


def test_a_group_of_one_is_its_embedding_bit_for_bit():
    embedder = CompositionalEmbedder(24, 3, 4)
    embeds = torch.randn(5, 4, 24)
    sizes = torch.tensor([1, 3, 1, 1, 2])
    found = embedder(embeds, sizes)
    assert torch.equal(found[sizes == 1], embeds[sizes == 1, 0])
    assert torch.equal(embedder(embeds[:, :1], torch.ones(5)), embeds[:, 0])
    assert not torch.allclose(found[1], embeds[1, :3].mean(0))


def turned(x, theta):
    """Rotary embedding of (tokens, heads, d) at positions 0, 1, ..., by its complex form."""
    tokens, _, d = x.shape
    angles = torch.arange(tokens, dtype=x.dtype)[:, None] * theta ** (-torch.arange(0, d, 2, dtype=x.dtype) / d)
    whole = torch.complex(x[..., : d // 2], x[..., d // 2 :]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([whole.real, whole.imag], -1)


def llama_by_formula(decoder, x, heads, kv_heads):
    """The micro-step decoder over (tokens, D), from its weights."""
    d = decoder.head_dim
    for layer in decoder.layers:
        attention, mlp = layer.self_attn, layer.mlp

        def norm(x, weight):
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight

        y = norm(x, layer.input_layernorm.weight)
        q = turned(attention.q_proj(y).view(len(x), heads, d), decoder.theta)
        k = turned(attention.k_proj(y).view(len(x), kv_heads, d), decoder.theta).repeat_interleave(heads // kv_heads, 1)
        v = attention.v_proj(y).view(len(x), kv_heads, d).repeat_interleave(heads // kv_heads, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(d)
        scores = scores.masked_fill(torch.ones(len(x), len(x), dtype=torch.bool).triu(1), -torch.inf)
        x = x + attention.o_proj(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1))
        y = norm(x, layer.post_attention_layernorm.weight)
        x = x + mlp.down_proj(F.silu(mlp.gate_proj(y)) * mlp.up_proj(y))
    return x


def forced_by_formula(model, ids):
    """Teacher forcing of one row in the groups of `SIZES`, token by token, from the paper: logits and stop logits behind each token.

    The base is transformers' own, over merged embeddings at their last tokens' positions under an explicit causal mask.
    """
    base, embed = model.base, model.base.model.embed_tokens
    starts = torch.tensor([0, *SIZES]).cumsum(0)
    pieces = [embed(ids[a : a + s]) for a, s in zip(starts.tolist(), SIZES, strict=False)]
    entries = torch.stack([p[0] if len(p) == 1 else merged_by_formula(model.embedder, p) for p in pieces])
    count = len(SIZES)
    seen = torch.ones(count, count, dtype=torch.bool).tril()[None, None]
    out = base.model(
        inputs_embeds=entries[None],
        attention_mask=seen,
        position_ids=(starts[1:] - 1)[None],
        output_hidden_states=True,
    )
    features = [out.hidden_states[layer][0] for layer in model.config.feature_layers[:-1]] + [out.last_hidden_state[0]]
    vectors = []
    for number, piece in enumerate(pieces):
        for member in range(len(piece)):
            if member == len(piece) - 1:
                vectors.append(features[-1][number])
            else:
                told = torch.cat([torch.stack([f[number - 1] for f in features]), piece[: member + 1]])
                vectors.append(llama_by_formula(model.micro, told, 4, 2)[-1])
    whole = torch.stack(vectors)
    return base.lm_head(whole), model.micro.stop_head(whole)[:, 0]


@pytest.mark.parametrize("layers", [2, 3])
def test_teacher_forcing_is_the_formula(layers):
    model = grafted(tiny_model(num_hidden_layers=layers).double())
    ids = token_ids(1, len(GROUPS), seed=4)
    out = model(ids, groups=GROUPS[None])
    logits, stops = forced_by_formula(model, ids[0])
    # transformers' norms and rotary tables are float32 whatever the model is
    assert apart(out.logits[0], logits) < 1e-6
    assert apart(out.stop_logits[0], stops) < 1e-6


def test_a_merged_entry_stands_at_its_last_token(monkeypatch):
    model, seen = grafted(), []
    begin = model.parts.begin

    def noted(*args, **kwargs):
        seen.append(kwargs["position_ids"])
        return begin(*args, **kwargs)

    monkeypatch.setattr(model.parts, "begin", noted)
    model(token_ids(1, len(GROUPS)), groups=GROUPS[None])
    assert seen[0].tolist() == [[0, 1, 2, 5, 6, 8, 12, 13, 15, 17]]
    assert seen[0].diff().tolist() == [SIZES[1:]]


def test_groups_of_one_are_the_base():
    model, ids = grafted(), token_ids(3, 12)
    out = model(ids, groups=torch.arange(12).expand(3, -1))
    assert torch.equal(out.logits, model.base(ids).logits)
    assert torch.equal(model(ids).logits, model.base(ids).logits)


def test_nothing_sees_what_comes_later():
    """The logits behind a token stay when later tokens change, those of its own group too."""
    model, ids = grafted(), token_ids(1, len(GROUPS), seed=2)
    kept = model(ids, groups=GROUPS[None]).logits
    for place in range(1, len(GROUPS)):
        changed = ids.clone()
        changed[:, place:] = (changed[:, place:] + 7) % 90 + 2
        found = model(changed, groups=GROUPS[None]).logits
        assert apart(found[:, :place], kept[:, :place]) < 1e-5, place
        assert not torch.allclose(found[:, place], kept[:, place], atol=1e-2)


@pytest.mark.parametrize("left", [False, True])
def test_padding_changes_no_row(left):
    model, ids = grafted(), token_ids(2, len(GROUPS), seed=3)
    short = group_ids([1, 2, 3, 1, 4])
    groups = torch.full((2, len(GROUPS)), -1)
    groups[0] = GROUPS
    place = slice(len(GROUPS) - len(short), None) if left else slice(0, len(short))
    groups[1, place] = short
    whole = model(ids, groups=groups)
    alone = model(ids[1:, place], groups=short[None])
    assert apart(whole.logits[1, place], alone.logits[0]) < 1e-5
    assert apart(whole.stop_logits[1, place], alone.stop_logits[0]) < 1e-5


def test_documents_in_one_row_do_not_see_each_other():
    model, ids = grafted(), token_ids(1, 20, seed=5)
    sizes = ([1, 3, 2, 1, 2], [1, 1, 4, 2, 1, 2])
    documents = torch.tensor([[0] * 9 + [1] * 11])
    packed = model(ids, groups=group_ids([*sizes[0], *sizes[1]])[None], documents=documents)
    for part, own in ((slice(0, 9), sizes[0]), (slice(9, 20), sizes[1])):
        alone = model(ids[:, part], groups=group_ids(own)[None])
        assert apart(packed.logits[:, part], alone.logits) < 1e-5


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ([0, 1, 3], "count up"),
        ([1, 2, 3], "count up"),
        ([0, 1, 0], "count up"),
        ([-1, -1, -1], "a token at least"),
        ([-2, 0, 1], "must be -1"),
        ([0, -1, 1], "one side"),
        ([-1, 0, -1], "one side"),
        ([0, 0, 1], "begin with one of a single token"),
        ([0, 1, 1, 1, 1, 1], "at most max_steps=4"),
    ],
)
def test_what_are_no_groups(groups, words):
    with pytest.raises(ValueError, match=words):
        grafted()(token_ids(1, len(groups)), groups=torch.tensor([groups]))


def test_documents_end_groups_and_begin_with_one_token():
    model, ids = grafted(), token_ids(1, 4)
    with pytest.raises(ValueError, match="end where a document ends"):
        model(ids, groups=torch.tensor([[0, 1, 1, 2]]), documents=torch.tensor([[0, 0, 1, 1]]))
    with pytest.raises(ValueError, match="begin with one of a single token"):
        model(ids, groups=torch.tensor([[0, 1, 2, 2]]), documents=torch.tensor([[0, 0, 1, 1]]))


# ---------------------------------------------------------------------------------------------------------- configuration


def test_defaults_are_the_released_ones():
    """Field by field, for the base of the release."""
    base = LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, head_dim=64,
        vocab_size=128256, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    )  # fmt: skip
    config = HamburgerConfig(base)
    assert (config.max_steps, config.micro_layers, config.merger_heads) == (4, 4, 64)
    assert config.feature_layers == [4, 8, 12, 16]
    assert (config.confidence, config.stop_weight) == (0.9, 0.5)
    micro = micro_config(base, 4)
    for name in (
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
    ):
        assert getattr(micro, name) == getattr(base, name), name
    assert micro.rope_parameters["rope_theta"] == 500000.0
    with torch.device("meta"):
        model = HamburgerForCausalLM(HamburgerConfig(base))
    assert [tuple(p.shape) for p in model.micro.stop_head.parameters()] == [
        (2048, 2048), (2048,), (2048, 2048), (2048,), (1, 2048), (1,),
    ]  # fmt: skip
    shapes = {name: tuple(p.shape) for name, p in model.embedder.named_parameters()}
    assert shapes["places"] == (4, 1024)
    assert shapes["k_proj.weight"] == shapes["v_proj.weight"] == (2048, 3072)
    assert shapes["q_proj.weight"] == shapes["out_proj.weight"] == (2048, 2048)
    assert {name for name in shapes if name.endswith("bias")} == {f"{n}_proj.bias" for n in ("q", "k", "v", "out")}


def test_micro_steps_are_layers_of_the_bases_own_kind():
    """A Llama with biases and another activation has them in its micro steps; another model's fields mean other things there."""
    base = tiny_model(attention_bias=True, attention_dropout=0.25, mlp_bias=True, hidden_act="gelu")
    own, micro = base.model.layers[0], grafted(base).micro.layers[0]
    ours, theirs = ({name: p.shape for name, p in layer.named_parameters()} for layer in (micro, own))
    assert ours == theirs
    assert type(micro.mlp.act_fn) is type(own.mlp.act_fn)
    assert micro.self_attn.attention_dropout == 0.25
    assert not any("bias" in name for name, _ in grafted(tiny_model("Qwen2")).micro.layers[0].named_parameters())


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"max_steps": 0}, ValueError),
        ({"max_steps": 2.0}, TypeError),
        ({"feature_layers": [1]}, ValueError),
        ({"feature_layers": [2, 1, 2]}, ValueError),
        ({"feature_layers": []}, ValueError),
        ({"feature_layers": [0, 2]}, ValueError),
        ({"micro_layers": 0}, ValueError),
        ({"merger_heads": 5}, ValueError),
        ({"confidence": math.nan}, ValueError),
        ({"confidence": -0.1}, ValueError),
        ({"confidence": "0.9"}, TypeError),
        ({"stop_weight": -1}, ValueError),
    ],
)
def test_bad_configurations(change, error):
    (name,) = change
    with pytest.raises(error, match=name):
        HamburgerForCausalLM.from_base(tiny_model(), **change)


@pytest.mark.parametrize("name", architectures.CAUSAL)
def test_architectures_work_or_are_refused_untouched(name):
    base = architectures.build(name)
    before = {key: value.clone() for key, value in base.state_dict().items()}
    expected = architectures.output(base, name)
    if name in ("gpt2", "gpt_oss", "opt", "biogpt", "mamba"):
        with pytest.raises(ValueError, match="parts are understood"):
            HamburgerForCausalLM.from_base(base, micro_layers=1, merger_heads=4)
    else:
        model = HamburgerForCausalLM.from_base(base, micro_layers=1, merger_heads=4, confidence=None).eval()
        ids = architectures.inputs(name)["input_ids"]
        groups = group_ids(([1] * 4 + [3, 1, 4, 2, 2, 4] * 3)[:20])
        assert torch.allclose(model(ids).logits, expected, atol=1e-5)
        forced = model(ids[:, : len(groups)], groups=groups.expand(2, -1)).logits
        assert forced.isfinite().all()
    for key, value in base.state_dict().items():
        assert torch.equal(value, before[key])
    assert torch.equal(architectures.output(base, name), expected)

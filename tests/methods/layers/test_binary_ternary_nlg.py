from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BartConfig, BartForConditionalGeneration, MBartConfig, MBartForConditionalGeneration

from assay.methods.core.layers.packed import PackedLinear, pack, product, resident_bytes
from assay.methods.layers.binary_ternary_nlg import (
    DistillationLoss,
    ElasticQuantizer,
    LowBitEmbedding,
    LowBitLinear,
    PackedLowBitLinear,
    RangeQuantizer,
    calibrate_,
    freeze_,
    load_packed,
    low_bit,
    low_bit_attention,
    make_quantizer,
    pack_,
    packed_size,
    quantize_,
    relative_operations,
    save_packed,
    weight_codes,
)

SIZES = {
    "vocab_size": 40,
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 3,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 40,
    "dropout": 0.0,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}


def bart(**changes):
    torch.manual_seed(0)
    model = BartForConditionalGeneration(BartConfig(**{**SIZES, "init_std": 0.2, **changes})).eval()
    with (
        torch.no_grad()
    ):  # as after training: without biases sums of a few signs are exactly 0, and their sign is noise
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(std=0.1)
    return model


def batch(rows=3, source=9, target=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 40, (rows, source), generator=generator)
    labels = torch.randint(3, 40, (rows, target), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, rows):  # ragged on both sides
        ids[row, source - row :], mask[row, source - row :], labels[row, target - row :] = 1, 0, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def student(weights=2, embeddings=2, activations=8, **changes):
    model = quantize_(bart(**changes), weights=weights, embeddings=embeddings, activations=activations)
    return calibrate_(model, batch())


# ---- weights -------------------------------------------------------------------------------------------------------------


def test_levels_and_row_scales():
    w = torch.randn(50, 200)
    mean = w.abs().mean(1, keepdim=True)
    codes, scale = weight_codes(w, 2)
    torch.testing.assert_close(scale, 4 / 3 * mean)
    assert codes.unique().tolist() == [-1, 0, 1]
    torch.testing.assert_close(low_bit(w, 2), scale * (w / scale).clamp(-1, 1).round())
    codes, scale = weight_codes(w, 1)
    assert torch.equal(scale, mean)
    assert codes.unique().tolist() == [-1, 1]
    for bits, levels in ((2, 3), (1, 2)):
        assert all(len(row.unique()) == levels for row in low_bit(w, bits))
    assert weight_codes(torch.tensor([[0.0, -0.0, -1.0]]), 1)[0].tolist() == [[1, 1, -1]]  # no third level
    assert low_bit(torch.zeros(2, 5), 2).abs().max() == 0


def test_binary_is_idempotent_and_32_bits_are_the_identity():
    w = torch.randn(20, 64)
    once = low_bit(w, 1)
    torch.testing.assert_close(low_bit(once, 1), once, atol=0, rtol=1e-6)
    assert low_bit(w, 32) is w
    assert make_quantizer(32)(w) is w


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("method", ["tbt", "baseline"])
def test_scale_equivariance(bits, method):
    w = torch.randn(9, 31, dtype=torch.float64)
    for c in (0.01, 3.0, 1e4):
        torch.testing.assert_close(low_bit(c * w, bits, method), c * low_bit(w, bits, method))


def test_uniform_weights_fill_the_levels_alike():
    torch.manual_seed(0)
    w = 3 * (2 * torch.rand(1, 300_000, dtype=torch.float64) - 1)
    codes, scale = weight_codes(w, 2)
    for level in (-1, 0, 1):
        assert (codes == level).double().mean() == pytest.approx(1 / 3, abs=0.005)
    assert scale.item() == pytest.approx(2, rel=0.01)  # 2 c / 3, the mean of the outer third


def test_errors_on_a_gaussian():
    torch.manual_seed(0)
    w = torch.randn(1, 400_000, dtype=torch.float64)
    error = {bits: (low_bit(w, bits) - w).square().mean().item() for bits in (1, 2)}
    assert error[1] == pytest.approx(1 - 2 / math.pi, abs=0.005)
    assert error[2] < error[1]


def test_baselines():
    w = torch.tensor([[1.0, -0.5, 0.1, -3.0]])  # mean 1.15, threshold 0.805
    codes, scale = weight_codes(w, 2, "baseline")
    assert codes.tolist() == [[1, 0, 0, -1]]
    assert scale.item() == 2.0
    assert torch.equal(low_bit(w, 1, "baseline"), low_bit(w, 1))


def test_the_gradient_of_weights_is_1_everywhere():
    w = (10 * torch.randn(5, 8)).requires_grad_()
    dy = torch.randn(5, 8)
    for bits in (1, 2):
        assert torch.equal(torch.autograd.grad(low_bit(w, bits), w, dy)[0], dy)


# ---- activations ---------------------------------------------------------------------------------------------------------


def elastic(bits, signed, scale=0.7):
    quantizer = ElasticQuantizer(bits, signed=signed).double()
    quantizer.scale.data.fill_(scale)
    quantizer.calibrated.fill_(True)
    return quantizer


def test_elastic_levels():
    x = torch.linspace(-3, 3, 601, dtype=torch.float64)
    for bits, signed, levels in ((2, True, [-0.7, 0, 0.7]), (1, True, [-0.7, 0.7]), (1, False, [0, 0.7])):
        assert elastic(bits, signed)(x).unique().tolist() == pytest.approx(levels)
    assert elastic(2, False)(x).unique().tolist() == pytest.approx([-3, -2.3, -1.6])  # above the smallest value
    assert elastic(1, True)(torch.zeros(1, dtype=torch.float64)) == 0.7


@pytest.mark.parametrize(("bits", "signed"), [(2, True), (1, True), (2, False), (1, False)])
def test_elastic_gradients_are_those_of_the_surrogate(bits, signed):
    torch.manual_seed(0)
    x = torch.randn(4, 50, dtype=torch.float64).requires_grad_()
    quantizer = elastic(bits, signed)
    dy = torch.randn(4, 50, dtype=torch.float64)
    dx, da = torch.autograd.grad(quantizer(x), (x, quantizer.scale), dy)
    low, high = (-1, 1) if signed else (0, bits)
    shift = x.detach().min() if (bits, signed) == (2, False) else 0.0
    v0 = (x.detach() - shift) / 0.7
    inside = (v0 >= low) & (v0 <= high)
    assert torch.equal(dx, dy * inside)
    assert (dx[~inside] == 0).all()

    def surrogate(a):  # the remainder of rounding and the signs held fixed
        if signed and bits == 1:
            return (dy * a * torch.where(v0 >= 0, 1.0, -1.0)).sum()
        remainder = v0.clamp(low, high).round() - v0.clamp(low, high)
        held = torch.where(inside, v0 * 0.7 + a * remainder, a * v0.clamp(low, high))
        return (dy * held).sum()

    step = 1e-6
    slope = (surrogate(0.7 + step) - surrogate(0.7 - step)) / (2 * step)
    assert da.item() == pytest.approx(slope.item() / math.sqrt(x.numel() * high), rel=1e-5, abs=1e-8)


def test_the_first_scale():
    x = torch.randn(3, 40)
    mean = x.abs().mean().item()
    for bits, signed, factor in (
        (2, True, 2),
        (1, True, 2),
        (2, False, 4 / math.sqrt(3)),
        (1, False, 4),
    ):
        quantizer = ElasticQuantizer(bits, signed=signed)
        with pytest.raises(ValueError, match="calibrate_"):
            quantizer(x)
        quantizer.calibrate(x)
        assert quantizer.scale.item() == pytest.approx(factor * mean)
    quantizer.calibrate(torch.zeros(3))
    assert quantizer.scale.item() == pytest.approx(1e-5)


def test_ranges_of_8_bits():
    x = torch.tensor([-4.0, -1.0, 0.3, 2.0]).requires_grad_()
    signed = RangeQuantizer()
    y = signed(x)
    assert y[0].item() == -2.5
    assert (y[1:] - x[1:]).abs().max() <= 2.5 / 127 / 2 + 1e-6
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == [0, 1, 1, 1]
    shares = torch.rand(5, 100)
    found = RangeQuantizer(signed=False)(shares)
    assert (found - shares).abs().max() <= (shares.max() - shares.min()) / 255 / 2 + 1e-6
    assert found.min() == shares.min()
    assert len(found.unique()) <= 256
    assert RangeQuantizer(clip=None)(torch.tensor([100.0])).item() == pytest.approx(100)
    assert RangeQuantizer(signed=False)(torch.full((4,), 0.5)).tolist() == [0.5] * 4


@pytest.mark.parametrize("bits", [1, 2, 8])
@pytest.mark.parametrize("signed", [True, False])
def test_codes_stand_for_the_quantised_values(bits, signed):
    x = torch.randn(3, 7, 20).transpose(0, 1)
    quantizer = make_quantizer(bits, signed=signed)
    if bits < 8:
        quantizer.calibrate(x)
    codes, step, shift = quantizer.codes(x)
    assert codes.dtype == torch.int8
    torch.testing.assert_close(codes * step + (0 if shift is None else shift), quantizer(x).detach())
    assert quantizer(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("bits", [1, 2, 8])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("weight_bits", [1, 2])
def test_integer_products_equal_fake_quantised_ones(bits, signed, weight_bits):
    torch.manual_seed(0)
    linear = nn.Linear(45, 13)
    x = torch.randn(2, 6, 45)
    quantizer = make_quantizer(bits, signed=signed)
    if bits < 8:
        quantizer.calibrate(x)
    layer = LowBitLinear(linear, weight_bits, quantizer)
    weights, scale = weight_codes(linear.weight.detach(), weight_bits)
    packed = PackedLowBitLinear(
        quantizer,
        PackedLinear.from_codes(weights, scale, "ternary" if weight_bits == 2 else "binary", bias=linear.bias),
    )
    torch.testing.assert_close(packed(x), layer(x).detach(), atol=1e-5, rtol=1e-5)
    codes, step, shift = quantizer.codes(x)
    if shift is not None:  # the shift adds shift * sum(w_q), a term of rank one
        plain = F.linear(codes * step, weights * scale) + shift * (weights * scale).sum(1) + linear.bias
        torch.testing.assert_close(packed(x), plain.detach(), atol=1e-5, rtol=1e-5)
    kind = "ternary" if weight_bits == 2 else "binary"
    integers = product(codes.flatten(0, 1), pack(weights, kind), kind)
    assert torch.equal(integers, (codes.flatten(0, 1).long() @ weights.long().T).int())


# ---- models --------------------------------------------------------------------------------------------------------------


def test_32_bits_compute_what_the_model_computed():
    model = bart()
    inputs = batch()
    expected = model(**inputs).logits
    quantize_(model, weights=32, embeddings=32, activations=32)
    torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("activations", [8, 2, 1])
def test_everything_that_should_be_low_bit_is(activations):
    model = student(1 if activations == 1 else 2, 2, activations)
    layers = [m for m in model.modules() if isinstance(m, LowBitLinear)]
    attentions = [m for m in model.modules() if hasattr(m, "low_bit")]
    assert len(attentions) == 2 + 2 * 2
    assert len(layers) == 4 * 6 + 2 * 4 + 1
    assert not any(type(m) is nn.Linear for m in model.modules())
    unsigned = [name for name, m in model.named_modules() if getattr(m, "signed", True) is False]
    assert sorted(unsigned) == sorted([n for n, _ in model.named_modules() if n.endswith(("low_bit.p", "fc2.inputs"))])
    assert isinstance(model.model.encoder.embed_tokens, LowBitEmbedding)
    assert model.lm_head.weight is model.model.shared.weight is model.model.decoder.embed_tokens.weight
    seen = {}

    def note(name):
        def hook(module, inputs, output):
            seen[name] = len(output.unique())

        return hook

    for name, module in model.named_modules():
        if name.endswith((".inputs", "low_bit.q", "low_bit.k", "low_bit.v", "low_bit.p")):
            module.register_forward_hook(note(name))
    model(**batch())
    assert len(seen) == len(layers) + 4 * len(attentions)
    levels = {8: 256, 2: 3, 1: 2}[activations]
    assert all(count <= (256 if name == "lm_head.inputs" else levels) for name, count in seen.items()), seen


def test_all_parameters_and_scales_learn():
    model = student(2, 2, 2).train()
    model(**batch()).loss.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert missing == []
    scales = [m.scale.grad for m in model.modules() if isinstance(m, ElasticQuantizer)]
    assert len(scales) == 8 * 6 + 2 * 4
    assert all(grad.isfinite() for grad in scales)


def test_masked_rows_and_bfloat16_do_no_harm():
    inputs = batch()
    inputs["attention_mask"][1] = 0
    for activations in (8, 2, 1):
        model = student(2, 2, activations)
        assert model(**inputs).logits.isfinite().all()
        assert model.bfloat16()(**inputs).logits.isfinite().all()


def test_attention_of_identities_is_attention():
    q, k, v = (torch.randn(2, 3, n, 8) for n in (5, 9, 9))
    mask = torch.zeros(2, 1, 5, 9)
    mask[1, :, :, 6:] = -torch.inf
    y, shares = low_bit_attention(nn.Module(), q, k, v, mask)
    torch.testing.assert_close(y, F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2))
    torch.testing.assert_close(shares.sum(-1), torch.ones(2, 3, 5))


@pytest.mark.parametrize(("weights", "activations"), [(2, 8), (2, 2), (1, 8), (1, 1)])
def test_packed_models_agree_round_trip_and_take_the_bytes_of_the_formula(weights, activations, tmp_path):
    size = packed_size(bart(), weights=weights, embeddings=weights)
    model = student(weights, weights, activations)
    inputs = batch(seed=5)
    expected = model(**inputs).logits
    packed = pack_(copy.deepcopy(model))
    found = packed(**inputs).logits
    # the same integers; a value that lies on a half may fall to the other side and move what follows
    assert (found - expected).norm() < (0.02 if activations == 8 else 0.2) * expected.norm()
    state = sum(
        t.numel() * t.element_size()
        for m in packed.modules()
        if isinstance(m, ElasticQuantizer | RangeQuantizer)
        for t in [*m.parameters(recurse=False), *m.buffers(recurse=False)]
    )
    assert resident_bytes(packed) == size + state
    save_packed(packed, tmp_path / "model.safetensors")
    again = load_packed(tmp_path / "model.safetensors")
    assert torch.equal(again(**inputs).logits, found)
    assert resident_bytes(again) == resident_bytes(packed)
    settings = {"max_new_tokens": 6, "do_sample": False}
    one, two = (
        m.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], **settings) for m in (packed, again)
    )
    assert torch.equal(one, two)
    with pytest.raises(ValueError, match="packed"):
        save_packed(model, tmp_path / "other.safetensors")
    bart().save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="save_packed"):
        load_packed(tmp_path / "plain" / "model.safetensors")


def test_generation_step_by_step_is_that_of_the_whole_once_frozen():
    model = freeze_(student(2, 2, 8), [batch(seed=s) for s in range(3)])
    inputs = batch()
    out = model.generate(
        inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=6,
        do_sample=False,
        min_new_tokens=6,
    )
    given = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    for t in range(1, out.shape[1] - 1):
        whole = model(**given, decoder_input_ids=out[:, :t]).logits[:, -1]
        whole[:, 2] = -torch.inf  # min_new_tokens forbids the end
        assert torch.equal(whole.argmax(-1), out[:, t])


@pytest.mark.parametrize("activations", [8, 2])
def test_frozen_models_do_not_mix_the_rows_of_a_batch(activations):
    model = student(2, 2, activations)
    inputs = batch(3, target=5)
    inputs["labels"][:] = inputs["labels"][0]
    alone = {name: x[2:, :7] if name != "labels" else x[2:] for name, x in inputs.items()}
    freeze_(model, [batch(seed=s) for s in range(3)])
    torch.testing.assert_close(model(**inputs).logits[2:], model(**alone).logits, atol=1e-4, rtol=1e-4)
    free = student(2, 2, activations)
    loud = copy.deepcopy(inputs)
    loud["input_ids"][:2] = torch.randint(3, 40, loud["input_ids"][:2].shape)
    assert torch.equal(model(**loud).logits[2], model(**inputs).logits[2])
    if activations == 8:  # ranges of the whole batch
        assert not torch.equal(free(**loud).logits[2], free(**inputs).logits[2])


def test_mbart_and_plain_saving(tmp_path):
    torch.manual_seed(0)
    model = MBartForConditionalGeneration(MBartConfig(**SIZES)).eval()
    quantize_(model, weights=1, embeddings=1, activations=8)
    state = calibrate_(model, batch()).state_dict()
    other = quantize_(MBartForConditionalGeneration(MBartConfig(**SIZES)).eval(), weights=1, embeddings=1)
    other.load_state_dict(state)
    inputs = batch()
    assert torch.equal(other(**inputs).logits, model(**inputs).logits)


def test_sizes_of_bart_base_by_formula():
    with torch.device("meta"):
        model = BartForConditionalGeneration(
            BartConfig(
                vocab_size=50265,
                d_model=768,
                encoder_layers=6,
                decoder_layers=6,
                encoder_ffn_dim=3072,
                decoder_ffn_dim=3072,
            )
        )
    mib = 2**20
    assert sum(p.numel() for p in model.parameters()) * 4 / mib == pytest.approx(532, abs=1)
    # the paper's 39.6 and 23.2 leave out row scales
    rows = 50265 + 6 * (4 * 768 + 3072 + 768) + 6 * (8 * 768 + 3072 + 768)
    for bits, megabytes in ((2, 39.6), (1, 23.2)):
        assert (packed_size(model, weights=bits, embeddings=bits) - 4 * rows) / mib == pytest.approx(
            megabytes, rel=0.02
        )


@pytest.mark.parametrize(
    ("weights", "activations", "share"), [(2, 8, 0.25), (2, 2, 0.0625), (1, 8, 0.125), (1, 1, 0.015625)]
)
def test_counted_operations(weights, activations, share):
    assert relative_operations(weights, activations) == share


# ---- distillation --------------------------------------------------------------------------------------------------------


def outputs(model, inputs):
    return model(**inputs, output_attentions=True, output_hidden_states=True)


def test_distillation_takes_every_map_and_state_and_leaves_padding_out():
    teacher = bart(attn_implementation="eager")
    model = student(2, 2, 8)
    inputs = batch()
    mine, theirs = outputs(model, inputs), outputs(teacher, inputs)
    masks = {"labels": inputs["labels"], "attention_mask": inputs["attention_mask"]}
    loss = DistillationLoss()
    parts = loss.parts(mine, theirs, **masks)
    assert set(parts) == {"task", "logits", "hidden", "attention"}
    torch.testing.assert_close(loss(mine, theirs, **masks), sum(parts.values()))
    torch.testing.assert_close(parts["task"], mine.loss)
    kept, seen = inputs["labels"] != -100, inputs["attention_mask"].bool()
    soft = F.cross_entropy(mine.logits[kept], theirs.logits[kept].softmax(-1))
    torch.testing.assert_close(parts["logits"], soft)
    hidden = sum(
        F.mse_loss(s[mask], t[mask])
        for a, b, mask in (
            (mine.encoder_hidden_states, theirs.encoder_hidden_states, seen),
            (mine.decoder_hidden_states, theirs.decoder_hidden_states, kept),
        )
        for s, t in zip(a, b, strict=True)
    )
    torch.testing.assert_close(parts["hidden"], hidden)
    maps = sum(
        F.mse_loss(s.transpose(1, 2)[mask], t.transpose(1, 2)[mask])
        for a, b, mask in (
            (mine.encoder_attentions, theirs.encoder_attentions, seen),
            (mine.decoder_attentions, theirs.decoder_attentions, kept),
            (mine.cross_attentions, theirs.cross_attentions, kept),
        )
        for s, t in zip(a, b, strict=True)
    )
    torch.testing.assert_close(parts["attention"], maps)
    released = DistillationLoss(variant="as_released").parts(mine, theirs, **masks)
    torch.testing.assert_close(
        released["logits"], F.cross_entropy(mine.logits.flatten(0, 1), theirs.logits.flatten(0, 1).softmax(-1))
    )
    assert released["hidden"] > parts["hidden"]
    loss(mine, theirs, **masks).backward()
    assert all(p.grad is None for p in teacher.parameters())


def test_the_teacher_itself_loses_nothing_but_its_entropy():
    teacher = bart(attn_implementation="eager")
    inputs = batch()
    found = outputs(teacher, inputs)
    parts = DistillationLoss().parts(found, found, inputs["labels"], inputs["attention_mask"])
    assert parts["hidden"] == parts["attention"] == 0
    kept = inputs["labels"] != -100
    torch.testing.assert_close(
        parts["logits"], torch.distributions.Categorical(logits=found.logits).entropy()[kept].mean()
    )
    plain = teacher(**inputs)
    with pytest.raises(ValueError, match="output_hidden_states"):
        DistillationLoss()(plain, plain)
    with pytest.raises(ValueError, match="labels"):
        DistillationLoss()(
            outputs(
                teacher, {k: v for k, v in inputs.items() if k != "labels"} | {"decoder_input_ids": inputs["input_ids"]}
            ),
            found,
        )
    assert set(DistillationLoss(hidden=0, attention=0).parts(plain, plain)) == {"task", "logits"}


def test_a_few_steps_bring_the_student_nearer_its_teacher():
    teacher = bart(attn_implementation="eager")
    inputs = batch(8)
    model = student(2, 2, 2).train()
    optimizer, loss, values = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0), DistillationLoss(), []
    with torch.no_grad():
        theirs = outputs(teacher, inputs)
    for _ in range(15):
        value = loss(outputs(model, inputs), theirs, inputs["labels"], inputs["attention_mask"])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.8 * values[0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: weight_codes(torch.zeros(2, 2), 3), "bits"),
        (lambda: weight_codes(torch.zeros(2, 2), 2, "theirs"), "method"),
        (lambda: make_quantizer(4), "bits"),
        (lambda: RangeQuantizer(clip=0), "clip"),
        (lambda: quantize_(bart(), weights=3), "weights"),
        (lambda: quantize_(bart(), activations=4), "activations"),
        (lambda: quantize_(bart(), method="theirs"), "method"),
        (lambda: quantize_(nn.Sequential(nn.Linear(2, 2))), "BartForConditionalGeneration"),
        (lambda: pack_(bart()), "quantize_"),
        (lambda: pack_(quantize_(bart(), activations=32)), "32"),
        (lambda: packed_size(bart(), weights=8, embeddings=2), "weights"),
        (lambda: freeze_(quantize_(bart()), []), "batches"),
        (lambda: DistillationLoss(variant="theirs"), "variant"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("bits", [1, 2])
def test_small_rows_of_float16_keep_their_levels(bits):
    torch.manual_seed(0)
    weight = torch.rand(4, 64) * 2 - 1
    small = (weight * 1e-5).half()
    codes, scale = weight_codes(small, bits)
    assert torch.equal(codes, weight_codes(small.float(), bits)[0])
    assert (codes != 0).any(1).all()
    rounded = low_bit(small, bits)
    assert rounded.dtype == torch.float16
    assert (rounded.float().abs().amax(1) > 0).all()


@pytest.mark.parametrize("name", ["m2m100", "biogpt", "whisper"])
def test_other_models_of_its_make_pack_save_and_load(name, tmp_path):
    from tests.properties.architectures import build, inputs, output

    model = quantize_(build(name), weights=2, embeddings=2, activations=8)
    freeze_(model, [inputs(name, 4)])
    exact = output(model, name, 4)
    pack_(model)
    packed = output(model, name, 4)
    assert float((packed - exact).norm() / exact.norm()) < 0.02
    save_packed(model, tmp_path / "packed.safetensors")
    loaded = load_packed(tmp_path / "packed.safetensors")
    assert torch.equal(output_of(loaded, name), output_of(model, name))


def output_of(model, name):
    from tests.properties.architectures import inputs

    with torch.no_grad():
        return model(**inputs(name, 4)).logits


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [1, 2, 8])
def test_nan_is_not_rounded_away(bits, signed):
    """Integers have no NaN: the token's step says it, in packed layers as on the fly, with ranges fixed or not."""
    torch.manual_seed(0)
    quantizer = make_quantizer(bits, signed=signed)
    x = torch.rand(3, 7)
    if bits < 8:
        quantizer.calibrate(x)
    quantizer.range = torch.tensor([0.0, 1.0])
    plain = quantizer(x)
    x[1, 2] = torch.nan
    assert quantizer(x)[1, 2].isnan()
    codes, step, shift = quantizer.codes(x)
    found = codes.float() * step + (0 if shift is None else shift)
    assert found[1].isnan().all()
    torch.testing.assert_close(found[[0, 2]], plain[[0, 2]])


def test_numbers_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="x must be finite"):
        make_quantizer(1).calibrate(torch.full((2,), torch.nan))
    with pytest.raises(ValueError, match="weight must not be empty"):
        weight_codes(torch.ones(2, 0), 2)
    with pytest.raises(TypeError, match="weight must hold"):
        weight_codes(torch.ones(2, 3, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match="task must be"):
        DistillationLoss(task=float("nan"))
    with pytest.raises(ValueError, match="weights must be"):
        relative_operations(0, 8)

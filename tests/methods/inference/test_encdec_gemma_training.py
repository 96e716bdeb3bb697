"""The objectives, the warm-up and the costs of the encoder-decoder."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.tiny import tiny_model, token_ids
from torch.utils.flop_counter import FlopCounterMode

from assay.methods.inference.encdec_gemma import (
    UL2,
    CrossAttentionWarmup,
    Denoiser,
    PrefixLMCollator,
    UL2Collator,
    cross_parameters,
    decoder_to_encdec,
    distillation,
    distilled_loss,
    fewer_layers,
    flops,
    freeze_but_cross,
    teacher_logits,
)

# ---------------------------------------------------------------------------------------------------------------- prefix LM


def test_a_prefix_and_its_suffix_are_the_sequence():
    collate = PrefixLMCollator(0, generator=torch.Generator().manual_seed(0))
    rows = [list(range(10, 10 + length)) for length in (2, 5, 30)]
    cuts = set()
    for _ in range(40):
        batch = collate([{"input_ids": torch.tensor(row)} for row in rows])
        for row, ids, mask, labels in zip(
            rows, *(batch[n] for n in ("input_ids", "attention_mask", "labels")), strict=True
        ):
            prefix, suffix = ids[mask.bool()].tolist(), labels[labels != -100].tolist()
            assert prefix + suffix == row
            assert prefix
            assert suffix
            cuts.add((len(row), len(prefix)))
            assert not ids[~mask.bool()].any()
    assert {cut for length, cut in cuts if length == 5} == {1, 2, 3, 4}
    assert len({cut for length, cut in cuts if length == 30}) > 12


def test_a_suffix_ends_with_the_end_token():
    batch = PrefixLMCollator(0, share=0.75, eos_token_id=2)([[5, 6, 7, 8]])
    assert batch["labels"].tolist() == [[8, 2]]


# --------------------------------------------------------------------------------------------------------------------- UL2


def restored(inputs, answer, sentinels):
    """The sequence that was hidden, from what is read and what is asked for."""
    spans, place = {}, None
    for token in answer:
        if token in sentinels:
            place = spans.setdefault(token, [])
        else:
            place.append(token)
    return [piece for token in inputs for piece in (spans[token] if token in sentinels else [token])]


@pytest.mark.parametrize("task", UL2, ids=str)
def test_hidden_spans_are_where_their_sentinels_stand(task):
    sentinels = list(range(1000, 1200))
    collate = UL2Collator(0, sentinels, generator=torch.Generator().manual_seed(1))
    for length in (2, 17, 200):
        ids = list(range(10, 10 + length))
        inputs, answer = collate.hidden(ids, task)
        hidden = [token for token in answer if token < 1000]
        assert len(hidden) == min(max(round(task.rate * length), 1), length - 1)
        if task.span is None:
            assert inputs + answer == ids
            continue
        assert restored(inputs, answer, set(sentinels)) == ids
        spans = len(answer) - len(hidden)
        assert spans == max(1, min(round(len(hidden) / task.span), length - len(hidden)))
        assert [token for token in inputs if token >= 1000] == sentinels[:spans]


def test_all_denoisers_are_drawn_and_named():
    modes = {"R": 2000, "X": 2001, "S": 2002}
    collate = UL2Collator(0, range(1000, 1200), modes=modes, eos_token_id=7, generator=torch.Generator().manual_seed(0))
    batch = collate([list(range(10, 110)) for _ in range(60)])
    assert set(batch["input_ids"][:, 0].tolist()) == {2000, 2001, 2002}
    ends = [row[row != -100][-1] for row in batch["labels"]]
    assert {int(end) for end in ends} == {7}
    lengths = (batch["labels"] != -100).sum(1)
    assert lengths.min() < 25 < lengths.max()


def test_span_lengths_are_drawn():
    collate = UL2Collator(0, range(1000, 1200), generator=torch.Generator().manual_seed(0))
    seen = set()
    for _ in range(30):
        _, answer = collate.hidden(list(range(10, 110)), Denoiser("R", 0.15, 3))
        marks = [place for place, token in enumerate(answer) if token >= 1000] + [len(answer)]
        seen |= {stop - start - 1 for start, stop in zip(marks, marks[1:], strict=False)}
    assert {1, 2, 3, 4, 5} <= seen


def test_collators_say_what_is_wrong():
    with pytest.raises(ValueError, match="at least two tokens, got 1"):
        PrefixLMCollator(0)([[5]])
    with pytest.raises(ValueError, match="at least one sequence"):
        PrefixLMCollator(0)([])
    with pytest.raises(ValueError, match="share must be"):
        PrefixLMCollator(0, share=1.0)
    with pytest.raises(ValueError, match="sentinels must be at least 17"):
        UL2Collator(0, [100], denoisers=[Denoiser("X", 0.5, 3)])([list(range(100))])
    with pytest.raises(ValueError, match="sentinels must differ.* got 100 more than once"):
        UL2Collator(0, [100, 101, 100])
    with pytest.raises(ValueError, match="modes must be one of 'R', 'X', 'S', got 'Q'"):
        UL2Collator(0, [100], modes={"R": 5, "Q": 6})
    with pytest.raises(ValueError, match="denoisers must hold"):
        UL2Collator(0, [100], denoisers=[])
    with pytest.raises(ValueError, match="rate must be"):
        Denoiser("R", float("nan"))


# ------------------------------------------------------------------------------------------------------------- distillation


def test_a_teachers_logits_are_those_of_the_suffix_it_reads():
    teacher = tiny_model()
    rows = [token_ids(length=11, seed=seed)[0].tolist() for seed in range(3)]
    batch = PrefixLMCollator(0, generator=torch.Generator().manual_seed(3))(rows)
    found = teacher_logits(teacher, batch["input_ids"], batch["attention_mask"], batch["labels"])
    for row, logits, mask, labels in zip(rows, found, batch["attention_mask"], batch["labels"], strict=True):
        prefix, suffix = int(mask.sum()), int((labels != -100).sum())
        expected = teacher(torch.tensor([row])).logits[0, prefix - 1 : -1]
        assert torch.allclose(logits[:suffix], expected, atol=1e-5)
        assert not logits[suffix:].any()
    gap = batch["labels"].clone()
    gap[:, 0] = -100
    with pytest.raises(ValueError, match="a suffix without gaps"):
        teacher_logits(teacher, batch["input_ids"], batch["attention_mask"], gap)


def test_labels_may_end_in_columns_that_nobody_asks_for():
    teacher = tiny_model()
    batch = PrefixLMCollator(0, share=0.5)([token_ids(length=length)[0].tolist() for length in (4, 9)])
    ids, mask, labels = (batch[name] for name in ("input_ids", "attention_mask", "labels"))
    found = teacher_logits(teacher, ids, mask, torch.cat([labels, torch.full((2, 20), -100)], 1))
    assert torch.equal(found[:, : labels.shape[1]], teacher_logits(teacher, ids, mask, labels))
    assert not found[:, labels.shape[1] :].any()
    assert not teacher_logits(teacher, ids, mask, torch.full_like(labels, -100)).any()


def test_a_suffix_without_a_prefix_is_refused():
    ids = token_ids(batch=2, length=4)
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])
    with pytest.raises(ValueError, match="input_ids must have a token in each row"):
        teacher_logits(tiny_model(), ids, mask, ids)


def test_distillation_is_the_divergence_at_the_suffix():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(2, 3, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.tensor([[1, 2, 3], [4, -100, -100]])
    p, q = ((x / 2).softmax(-1) for x in (theirs, ours))
    each = (p * (p.log() - q.log())).sum(-1)
    expected = 4 * (each[0].sum() + each[1, 0]) / 4
    assert torch.isclose(distillation(ours, labels, theirs, temperature=2.0), expected.float(), rtol=1e-5)
    assert distillation(theirs, labels, theirs) == 0


def test_distilled_loss_mixes_both_and_moves_the_student_to_its_teacher():
    teacher = tiny_model(initializer_range=0.1)
    torch.manual_seed(0)
    student = decoder_to_encdec(teacher).train()
    batch = PrefixLMCollator(0, share=0.5)([token_ids(length=12, seed=seed)[0].tolist() for seed in range(4)])
    kl, plain = (distilled_loss(student, batch, teacher, weight=w) for w in (1.0, 0.0))
    assert torch.isclose(distilled_loss(student, batch, teacher, weight=0.25), 0.25 * kl + 0.75 * plain)
    assert torch.isclose(plain, student(**batch).loss)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
    for _ in range(10):
        optimizer.zero_grad()
        loss = distilled_loss(student, batch, teacher)
        loss.backward()
        optimizer.step()
    assert loss < kl
    assert all(parameter.grad is None for parameter in teacher.parameters())


# ------------------------------------------------------------------------------------------------------------------ warm-up


@pytest.mark.parametrize("kind", ["Llama", "Gemma2"])
def test_a_warming_up_model_has_gradients_in_cross_attention_alone(kind):
    model = decoder_to_encdec(tiny_model(kind, **({"head_dim": 16} if kind == "Gemma2" else {}))).train()
    frozen = freeze_but_cross(model)
    ids = token_ids(batch=2, length=8)
    model(input_ids=ids, labels=ids).loss.backward()
    found = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert found == set(cross_parameters(model))
    assert any("norm" in name for name in found)
    for parameter in frozen:
        parameter.requires_grad_(True)
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match="model must have cross-attention, LlamaForCausalLM has none"):
        freeze_but_cross(tiny_model())


def test_trainer_warms_up_and_then_trains_everything(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = decoder_to_encdec(tiny_model(hidden_size=96), tiny_model(), cross_init="random")
    data = [{"input_ids": token_ids(length=12, seed=seed)[0]} for seed in range(8)]
    seen = []

    class Trained(Trainer):
        def training_step(self, model, inputs, *args, **kwargs):
            seen.append({name: value.detach().clone() for name, value in model.named_parameters()})
            return super().training_step(model, inputs, *args, **kwargs)

    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[],
        save_strategy="no", disable_tqdm=True, use_cpu=True, remove_unused_columns=False,
    )  # fmt: skip
    collate = PrefixLMCollator(0, generator=torch.Generator().manual_seed(0))
    Trained(
        model=model, args=arguments, train_dataset=data, data_collator=collate, callbacks=[CrossAttentionWarmup(2)]
    ).train()
    last = {name: value.detach().clone() for name, value in model.named_parameters()}
    cross = set(cross_parameters(model))

    def changed(before, after):
        return {name for name in before if not torch.equal(before[name], after[name])}

    assert changed(seen[0], seen[2]) == cross
    assert changed(seen[2], last) == set(last)
    assert all(parameter.requires_grad for parameter in model.parameters())


# --------------------------------------------------------------------------------------------------------------------- costs


def counted(run):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


SIZES = {"attn_implementation": "eager", "eos_token_id": None}


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Gemma2"])
def test_flops_are_those_counted(kind):
    more = {"Mistral": {"sliding_window": 4}, "Gemma2": {"head_dim": 16, "sliding_window": 4}}.get(kind, {})
    base = tiny_model(kind, num_hidden_layers=4, **SIZES, **more)
    model = decoder_to_encdec(base, fewer_layers(base))
    ids, answer = token_ids(length=11), token_ids(length=7, seed=1)
    how = {"max_new_tokens": 7, "do_sample": False}
    found = flops(model, 11, 7)
    assert found.total == counted(lambda: model.generate(input_ids=ids, **how))
    encoder = model.get_encoder() if kind != "Gemma2" else model.model.encoder
    assert found.prompt == counted(lambda: encoder(input_ids=ids))
    assert flops(model, 11, 7, cached=False).total == counted(lambda: model(input_ids=ids, decoder_input_ids=answer))
    assert flops(base, 11, 7).total == counted(lambda: base.generate(ids, **how))
    whole = torch.cat([ids, answer], 1)
    assert flops(base, 11, 7, cached=False).total == counted(lambda: base(whole, logits_to_keep=7))


def test_a_long_prompt_costs_both_alike_and_a_small_decoder_answers_cheaply():
    base = tiny_model(num_hidden_layers=4)
    balanced = decoder_to_encdec(base)
    ratios = [flops(balanced, m, 4).total / flops(base, m, 4).total for m in (4, 400, 40_000)]
    assert ratios[0] > ratios[1] > ratios[2]
    assert 1 < ratios[2] < 1.001 + flops(balanced, 40_000, 4).cross / flops(base, 40_000, 4).total
    small = tiny_model(num_hidden_layers=2)
    mixed = decoder_to_encdec(tiny_model(hidden_size=128, num_hidden_layers=4), small, cross_init="random")
    alone, found = flops(small, 1, 2).answer, flops(mixed, 1, 2).answer - flops(mixed, 1, 1).answer
    reading = sum(
        2 * (sub.cross_attn.q_proj.weight.numel() + sub.cross_attn.o_proj.weight.numel()) + 4 * 64
        for sub in mixed.decoder.cross
    )
    assert found == alone + reading  # a token of a 2B decoder-only model, and what is read


def test_flops_of_what_is_not_linear_are_refused():
    with pytest.raises(ValueError, match="parts are understood"):
        flops(torch.nn.Linear(2, 2), 1, 1)
    with pytest.raises(ValueError, match="answer must be"):
        flops(tiny_model(), 1, 0)
    assert flops(copy.deepcopy(tiny_model()), 3, 1).cross == 0

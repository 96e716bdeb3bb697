"""HAMburger's training: the loss, batches of groups, which parameters learn, transformers' Trainer."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tests.tiny import tiny_model, token_ids

from assay.errors import MissingError
from assay.methods.inference.hamburger import (
    GroupCollator,
    HamburgerForCausalLM,
    group_ids,
    lesson,
    merge_lora,
    parameter_groups,
    train_only,
    training_loss,
)
from assay.methods.inference.hamburger import training as module

SIZES = [1, 1, 3, 2, 1, 4]


def grafted(base=None, **settings):
    torch.manual_seed(1)
    base = tiny_model() if base is None else base
    return HamburgerForCausalLM.from_base(base, micro_layers=2, merger_heads=4, **settings).train()


def test_the_loss_is_cross_entropy_and_half_of_the_stop_heads():
    model, ids = grafted(), token_ids(2, 12, seed=1)
    groups = group_ids(SIZES).expand(2, -1)
    labels = ids.clone()
    labels[:, :3] = -100
    labels[1, 8:] = -100
    out = model(ids, groups=groups, labels=labels)
    wanted, ends = [], []
    for row in range(2):
        for place in range(1, 12):
            if labels[row, place] == -100:
                continue
            wanted.append(-out.logits[row, place - 1].log_softmax(-1)[ids[row, place]])
            last = place == 11 or groups[row, place + 1] != groups[row, place]
            stop = out.stop_logits[row, place - 1].double()
            ends.append(-F.logsigmoid(stop if last else -stop))
    tokens, stops = float(torch.stack(wanted).mean().detach()), float(torch.stack(ends).mean().detach())
    expected = tokens + 0.5 * stops
    assert out.loss.item() == pytest.approx(expected, rel=1e-5)
    summed = model(ids, groups=groups, labels=labels, num_items_in_batch=26).loss
    assert summed.item() == pytest.approx(expected * len(wanted) / 26, rel=1e-5)
    model.config.stop_weight = 0.0
    assert model(ids, groups=groups, labels=labels).loss.item() == pytest.approx(tokens, rel=1e-5)


def test_without_groups_the_loss_is_the_bases():
    model, ids = grafted(), token_ids(2, 12)
    assert float(model(ids, labels=ids).loss) == pytest.approx(float(model.base(ids, labels=ids).loss), rel=1e-6)


def test_a_lesson_cuts_by_the_teacher_and_asks_behind_the_prompt():
    teacher, ids = tiny_model(), token_ids(3, 40, seed=2)
    made = lesson(teacher, ids, [5, 1, 9], ratio=0.9, threshold=2.0)
    assert made["input_ids"] is ids
    for row, head in enumerate([5, 1, 9]):
        assert made["groups"][row, :head].tolist() == list(range(head))
        assert made["labels"][row].tolist() == [-100] * head + ids[row, head:].tolist()
    assert all(1 <= int(torch.bincount(row).max()) <= 4 for row in made["groups"])
    assert len({int(row.max()) for row in made["groups"]}) > 1
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    left = lesson(teacher, ids, 2, mask, ratio=0.9)
    assert left["groups"][0, :6].tolist() == [-1] * 6
    assert left["labels"][0, :8].tolist() == [-100] * 8
    assert left["labels"][0, 8] == ids[0, 8]


def test_everything_learns_and_the_distance_to_the_teacher_counts():
    teacher = tiny_model()
    model = grafted(copy.deepcopy(teacher))
    batch = lesson(teacher, token_ids(2, 30, seed=3), ratio=0.9)
    assert int(torch.bincount(batch["groups"][0]).max()) > 1
    plain = training_loss(model, batch)
    whole = training_loss(model, batch, teacher=teacher, kl_weight=0.5)
    out = model(**batch)
    theirs = teacher(batch["input_ids"]).logits[:, :-1].log_softmax(-1)
    ours = out.logits[:, :-1].log_softmax(-1)
    distance = (theirs.exp() * (theirs - ours)).sum(-1).mean()
    assert float(whole - plain) == pytest.approx(0.5 * float(distance), rel=1e-4)
    whole.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in model.parameters())
    with pytest.raises(ValueError, match="teacher must be given"):
        training_loss(model, batch, kl_weight=1.0)


def test_a_few_steps_lower_the_loss():
    teacher = tiny_model()
    model = grafted(copy.deepcopy(teacher))
    batch = lesson(teacher, token_ids(2, 24, seed=3), ratio=0.9)
    optimiser = torch.optim.AdamW(parameter_groups(model, base_rate=1e-3, grafted_rate=3e-3))
    losses = []
    for _ in range(12):
        loss = training_loss(model, batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_of_examples_are_the_examples(side):
    model = grafted().eval()
    examples = [
        {"input_ids": token_ids(1, 12, seed=1)[0].tolist(), "sizes": SIZES, "prompt_tokens": 2},
        {"input_ids": token_ids(1, 7, seed=2)[0], "groups": group_ids([1, 4, 2])},
    ]
    examples[1]["labels"] = examples[1]["input_ids"].masked_fill(torch.arange(7) < 1, -100)
    losses, counts = [], []
    for example in examples:
        one = GroupCollator(side=side)([example])
        counts.append(int((one["labels"] != -100).sum()))
        losses.append(float(model(**one).loss) * counts[-1])
    assert counts == [10, 6]
    for collator in (GroupCollator(side=side), GroupCollator(pack=True)):
        batch = collator(examples)
        assert batch["input_ids"].shape == ((1, 19) if collator.pack else (2, 12))
        assert float(model(**batch).loss) == pytest.approx(sum(losses) / 16, rel=1e-4)
    with pytest.raises(ValueError, match="packed rows"):
        training_loss(model, batch, teacher=tiny_model(), kl_weight=1.0)


@pytest.mark.parametrize(
    ("examples", "words"),
    [
        ([], "at least one"),
        ([{"input_ids": [1, 2], "sizes": [1]}], "sizes must add up"),
        ([{"input_ids": [1, 2], "sizes": [1, 1], "prompt_tokens": 0}], "prompt_tokens"),
        ([{"input_ids": [1, 2], "sizes": [1, 1], "labels": [1, 2]}], "labels must be"),
    ],
)
def test_bad_examples(examples, words):
    with pytest.raises(ValueError, match=words):
        GroupCollator()(examples)
    with pytest.raises(ValueError, match="side"):
        GroupCollator(side="top")([{"input_ids": [1], "sizes": [1]}])


def test_which_parameters_learn():
    model = grafted()
    every = {name for name, _ in model.named_parameters()}
    assert {name for name, p in train_only(model, "all").named_parameters() if p.requires_grad} == every
    grafts = {name for name, p in train_only(model, "grafted").named_parameters() if p.requires_grad}
    assert grafts == {name for name in every if not name.startswith("base.")}
    batch = lesson(tiny_model(), token_ids(2, 24, seed=3), ratio=0.9)
    training_loss(model, batch).backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == grafts
    rates = {group["lr"]: len(group["params"]) for group in parameter_groups(train_only(model, "all"))}
    assert rates == {5e-5: len(every) - len(grafts), 1e-4: len(grafts)}
    assert len(parameter_groups(train_only(model, "grafted"))) == 1
    with pytest.raises(ValueError, match="parts must be one of"):
        train_only(model, "head")


def test_low_rank_updates_learn_and_are_merged():
    model = train_only(grafted(), "lora", rank=2)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("lora_A" in name and name.startswith("base.") for name in learning)
    assert not any(name.startswith("base.") and "lora_" not in name for name in learning)
    batch = lesson(tiny_model(), token_ids(2, 24, seed=3), ratio=0.9)
    optimiser = torch.optim.AdamW(parameter_groups(model, base_rate=1e-2, grafted_rate=1e-3))
    for _ in range(3):
        optimiser.zero_grad()
        training_loss(model, batch).backward()
        optimiser.step()
    expected = model.eval()(**batch).logits
    names = {name for name, _ in grafted().named_parameters()}
    merged = merge_lora(model)
    assert {name for name, _ in merged.named_parameters()} == names
    assert float((merged(**batch).logits - expected).abs().max() / expected.abs().max()) < 1e-5
    fresh = grafted().base.model.layers[0].self_attn.q_proj.weight
    assert not torch.allclose(merged.base.model.layers[0].self_attn.q_proj.weight, fresh, atol=1e-4)
    assert all(p.requires_grad for p in merged.parameters())


def test_without_peft_low_rank_updates_say_what_is_missing(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(module.importlib, "import_module", missing)
    with pytest.raises(MissingError, match="pip install peft"):
        train_only(grafted(), "lora")


def test_gradient_checkpointing_gives_the_same_gradients():
    model, batch = grafted(), lesson(tiny_model(), token_ids(2, 24, seed=3), ratio=0.9)
    runs = []
    for layer in (*model.base.model.layers, *model.micro.layers):
        layer.mlp.register_forward_pre_hook(lambda module, *_: runs.append(module))
    training_loss(model, batch).backward()
    expected, once = {name: p.grad.clone() for name, p in model.named_parameters()}, len(runs)
    assert once == len(set(runs)) == 4
    model.zero_grad()
    model.activation_checkpointing_enable()
    training_loss(model, batch).backward()
    assert len(runs) == 3 * once  # each layer twice more: it was run again for its gradient
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, expected[name], atol=1e-5), name


def test_the_trainer_takes_a_step(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = grafted()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = [{"input_ids": token_ids(1, 12, seed=s)[0].tolist(), "groups": group_ids(SIZES).tolist()} for s in range(4)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, learning_rate=1e-2, warmup_steps=0, report_to=[],
        use_cpu=True, save_strategy="no", disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    result = Trainer(model=model, args=arguments, train_dataset=data, data_collator=GroupCollator()).train()
    assert result.training_loss > 0
    same = {name for name, value in model.state_dict().items() if torch.equal(value, before[name])}
    assert same == set()


def test_a_mask_that_contradicts_the_groups_is_refused():
    model, ids = grafted(), token_ids(2, 12, seed=1)
    groups = group_ids(SIZES).expand(2, -1)
    mask = torch.ones_like(ids)
    plain = model(ids, groups=groups, attention_mask=mask).logits
    torch.testing.assert_close(plain, model(ids, groups=groups).logits, rtol=0, atol=0)
    mask[0, :2] = 0
    with pytest.raises(ValueError, match="attention_mask must be 1 where groups"):
        model(ids, groups=groups, attention_mask=mask)

"""Judging a chosen candidate: on text of its own, against the model as loaded, over documents planned by time alone."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from assay.errors import InputError, MissingError
from assay.tuner import judging
from assay.tuner.evaluation import check_eval, evaluate, lm_eval_scores
from assay.tuner.judging import differences, documents, judge
from assay.tuner.recipe import Recipe, Step, apply_recipe
from assay.tuner.work import Settings, build_work, decode_agreement, load_for, proof_documents
from assay.workloads.answers import is_accepted, normalised, read_questions
from assay.workloads.quality import agreement, window_nll

BF16 = Recipe(steps=(Step(transform="dtype", config={"dtype": "bfloat16"}),)).model_dump(mode="json")


def judged(settings, recipe=BF16, attempt=0, max_drop=0.01, seconds=600.0):
    return judge(dataclasses.asdict(settings), recipe, attempt, max_drop, seconds)


def test_a_candidate_is_compared_with_the_model_as_loaded_on_the_proofs_text(model):
    settings = Settings(str(model), "ttft", 64, 4)
    found = judged(settings)
    assert found["verdict"] == "holds"
    assert found["planned"] in ([15, 30], [16, 32], [14, 29], [15, 31])
    (look,) = found["looks"]
    assert look["documents"] == found["planned"][0]
    assert look["level"] == pytest.approx(0.98)
    loaded = load_for(settings)
    proof = build_work(loaded, settings, "proof").windows[: look["documents"]]
    figures = found["figures"]["prefill"]
    assert figures["baseline"] == pytest.approx(window_nll(loaded.model, proof).tolist(), rel=1e-6)
    recipe = Recipe.model_validate(BF16)
    changed = apply_recipe(load_for(settings).model, recipe, build_work(loaded, settings).context())
    assert figures["candidate"] == pytest.approx(window_nll(changed, proof).tolist(), rel=1e-6)
    assert 0 < found["kl"]["low"] <= found["kl"]["mean"] <= found["kl"]["high"] < 0.01
    assert 0.9 < found["top1"]["mean"] <= 1
    assert found["eval"] is None
    json.dumps(found, allow_nan=False)


def test_what_is_judged_is_neither_what_was_searched_on_nor_calibration(model, tmp_path):
    own = tmp_path / "mine.jsonl"
    own.write_text("".join(json.dumps({"prompt": f"{i} " * 200}) + "\n" for i in range(100, 140)))
    for settings in (Settings(str(model), "decode", 64, 4), Settings(str(model), "ttft", 64, 4, workload=str(own))):
        loaded = load_for(settings)
        search, proof = build_work(loaded, settings), build_work(loaded, settings, "proof")

        def pieces(*texts):
            return {tuple(row[i : i + 40]) for text in texts for row in text.tolist() for i in range(len(row) - 40)}

        seen = pieces(search.windows, search.forced) | pieces(*search.calibration)
        assert not pieces(proof.windows, proof.forced) & seen
        assert proof.source != search.source
        assert "proof" in proof.source
        assert torch.equal(torch.cat(search.calibration), torch.cat(proof.calibration))
    assert "mine.jsonl" in proof.source
    assert len(proof.windows) >= 8


def test_a_second_look_is_taken_only_where_the_first_leaves_it_undecided(model, monkeypatch):
    settings = Settings(str(model), "ttft", 64, 4)
    verdicts = iter(["undecided", "holds"])
    real = judging.look
    asked = []

    def scripted(found, alpha, limit):
        asked.append((len(found["prefill"]), alpha))
        return dataclasses.replace(real(found, alpha, limit), verdict=next(verdicts))

    monkeypatch.setattr(judging, "look", scripted)
    found = judged(settings, attempt=1)
    assert [count for count, _ in asked] == found["planned"]
    assert [alpha for _, alpha in asked] == [0.0025, 0.0025]
    assert found["verdict"] == "holds"
    assert len(found["figures"]["prefill"]["kl"]) == found["planned"][1]


def test_what_loses_a_lot_is_lost_at_the_first_look(model, monkeypatch):
    monkeypatch.setattr(judging, "apply_recipe", lambda model, recipe, context: overconfident(model))
    found = judged(Settings(str(model), "ttft", 64, 4), max_drop=0.0)
    assert found["verdict"] == "lost"
    assert len(found["looks"]) == 1


def overconfident(model):
    """Logits so far apart that the text becomes unlikely."""
    with torch.no_grad():
        model.model.norm.weight *= 30
    return model


def noisy(model, scale=0.5):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return model


def test_without_time_for_the_least_there_is_no_look_and_more_time_would_allow_one(model):
    found = judged(Settings(str(model), "ttft", 64, 4), seconds=0.0)
    assert found["verdict"] == "undecided"
    assert not found["looks"]
    assert not found["complete"]
    assert "there was time for only 2 documents, 8 are needed" in found["reason"]


def test_a_decoding_loop_of_its_own_is_judged_token_by_token(model, monkeypatch):
    settings = Settings(str(model), "decode", 64, 4)
    loaded, other = load_for(settings), load_for(settings)
    noisy(other.model, 0.1)
    work = build_work(loaded, settings, "proof")
    assert set(documents(loaded.model, other.model, work, 0, 1)) == {"prefill"}
    generate = other.model.generate
    other.model.generate = lambda *arguments, **options: generate(*arguments, **options)
    found = documents(loaded.model, other.model, work, 0, 2)
    assert set(found) == {"prefill", "decode"}
    assert documents(loaded.model, other.model, work, 2, 2) == {}
    rows, prefix = work.forced[:3, :40], 12
    whole = decode_agreement(loaded.model, other.model, rows, prefix)
    monkeypatch.setattr("assay.tuner.work.FORCED_BYTES", 1)  # one row at a time
    one_by_one = decode_agreement(loaded.model, other.model, rows, prefix)
    with torch.no_grad():
        p, q = (m.model(rows).logits[:, prefix - 1 : -1].double().log_softmax(-1) for m in (loaded, other))
    expected = {
        "kl": (p.exp() * (p - q)).sum(-1).mean(1),
        "top1": (p.argmax(-1) == q.argmax(-1)).double().mean(1),
        "reference": -p.gather(2, rows[:, prefix:, None]).mean((1, 2)),
        "candidate": -q.gather(2, rows[:, prefix:, None]).mean((1, 2)),
    }
    for name, values in expected.items():
        for got in (whole, one_by_one):
            torch.testing.assert_close(getattr(got, name), values, atol=1e-4, rtol=1e-4)
    assert differences(found)["decode"][0] == found["decode"]["candidate"][0] - found["decode"]["baseline"][0]


def test_float16_is_judged_in_float32_on_a_cpu(model):
    half = load_for(Settings(str(model), "ttft", 8, 1)).model.half()
    assert judging.computable(half).dtype == torch.float32
    plain = load_for(Settings(str(model), "ttft", 8, 1)).model.bfloat16()
    assert judging.computable(plain) is plain
    assert plain.dtype == torch.bfloat16


def test_long_windows_have_enough_documents_and_short_ones_not_too_many():
    assert [proof_documents(width) for width in (64, 256, 544, 1024, 4128, 8192)] == [32, 32, 30, 16, 16, 16]


# The user's own evaluation ----------------------------------------------------------------------------------------------


def write(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def loaded(model):
    return load_for(Settings(str(model), "ttft", 64, 4))


def test_answers_are_compared_without_case_and_white_space_and_only_the_first_line():
    assert normalised(" The\t Nile \n") == "the nile"
    assert is_accepted("\n \n  PARIS  \nis a city", ["Paris", "Lutetia"])
    assert not is_accepted("Paris is a city", ["Paris"])
    assert not is_accepted("", ["Paris"])


def test_questions_are_read_in_order_with_room_for_the_longest_answer(loaded, tmp_path):
    path = write(
        tmp_path / "q.jsonl",
        {"prompt": "a is", "answers": ["b", "a much longer answer"]},
        "",
        {"prompt": "c is", "answers": ["d"]},
    )
    found = read_questions(path, loaded.tokenizer, context=512)
    assert [question.answers for question in found.questions] == [("b", "a much longer answer"), ("d",)]
    longest = len(loaded.tokenizer("a much longer answer", add_special_tokens=False)["input_ids"])
    assert found.new_tokens == longest + 8


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"prompt": "a"', "not JSON"),
        ('["a"]', "not an object but a list"),
        ({"prompt": "a"}, "answers are missing"),
        ({"answers": ["a"]}, "prompt is missing"),
        ({"prompt": "  ", "answers": ["a"]}, "prompt is empty"),
        ({"prompt": 1, "answers": ["a"]}, "prompt must be a string, not a number"),
        ({"prompt": "a", "answers": []}, "answers must be a list of at least one string"),
        ({"prompt": "a", "answers": "b"}, "answers must be a list of at least one string"),
        ({"prompt": "a", "answers": ["b", 1]}, "answer 2 must be a string, not a number"),
        ({"prompt": "a", "answers": ["b", " "]}, "answer 2 is empty"),
        ({"prompt": "a", "answers": ["b\nc"]}, "answer 1 has several lines"),
        ({"prompt": "a", "answers": ["b"], "answer": "b"}, "unknown key 'answer'; allowed: prompt, answers"),
        ('{"prompt": "a", "prompt": "b", "answers": ["c"]}', "a key is given twice"),
        ('{"prompt": "\\ud800", "answers": ["c"]}', "half of a surrogate pair"),
        ({"prompt": "word " * 400, "answers": ["b"]}, "too long: a prompt of"),
    ],
)
def test_every_bad_line_is_named(loaded, tmp_path, line, says):
    good = {"prompt": "a", "answers": ["b"]}
    path = write(tmp_path / "q.jsonl", good, line, good, line)
    with pytest.raises(InputError) as error:
        read_questions(path, loaded.tokenizer, context=256)
    assert says in str(error.value)
    assert "line 2: " in str(error.value)
    assert "line 4: " in str(error.value)
    assert "line 1" not in str(error.value)


def test_a_file_without_questions_and_one_that_is_not_there(loaded, tmp_path):
    with pytest.raises(InputError, match="empty; expected one"):
        read_questions(write(tmp_path / "q.jsonl", ""), loaded.tokenizer, context=256)
    with pytest.raises(InputError, match="no such eval file"):
        read_questions(tmp_path / "none", loaded.tokenizer, context=256)
    with pytest.raises(InputError, match="--eval .*none: no such file; a task of lm-eval is named lm_eval:TASK"):
        check_eval(str(tmp_path / "none"))


@pytest.mark.parametrize(
    "name", ["lm_eval:", "lm_eval:../task", "lm_eval:/tmp/task.yaml", "lm_eval:task.yaml", "lm_eval:a b"]
)
def test_a_task_is_a_name_and_never_a_file_that_could_name_code(name):
    with pytest.raises(InputError, match="the name of a task is letters"):
        check_eval(name)


def test_without_lm_eval_it_says_how_to_install_it(monkeypatch, loaded):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else real(name, *rest)
    )
    with pytest.raises(MissingError, match=r"needs lm-eval, which is not installed: pip install 'lm_eval\[hf\]'"):
        check_eval("lm_eval:arc_easy")
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(MissingError, match=r"pip install 'lm_eval\[hf\]'"):
        lm_eval_scores(loaded.model, loaded.tokenizer, "arc_easy")


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    lines = [{"prompt": f"what is {i} + {i}?", "answers": [f"{2 * i}.", f"it is {2 * i}"]} for i in range(40)]
    return write(tmp_path_factory.mktemp("eval") / "q.jsonl", *lines)


@pytest.fixture
def knows(monkeypatch, loaded):
    """Lets models say what a function of the question's number says."""
    from assay.tuner import evaluation

    said = {}

    def generate(model, prompts, *, new_tokens, ignore_eos):
        assert not ignore_eos
        numbers = [int(loaded.tokenizer.decode(prompt).split()[2]) for prompt in prompts]
        found = loaded.tokenizer([said[id(model)](i) for i in numbers], add_special_tokens=False)["input_ids"]
        assert max(map(len, found)) <= new_tokens
        return found

    monkeypatch.setattr(evaluation, "generate_batch", generate)
    return lambda model, says: said.__setitem__(id(model), says)


def test_answers_lost_are_counted_by_prompt_with_an_interval(model, loaded, questions, knows):
    settings = Settings(str(model), "ttft", 64, 4, eval=str(questions))
    other = torch.nn.Linear(1, 1)
    knows(loaded.model, lambda i: f"\n It is  {2 * i}\n" if i < 30 else "no idea")
    knows(other, lambda i: f"{2 * i}." if i < 30 else "no")
    same = evaluate(loaded, loaded.model, other, settings, 0.02, 0.01, 600.0)
    assert same["prompts"] == 40
    assert same["baseline"] == same["candidate"] == 0.75
    assert same["lost"] == 0
    assert same["verdict"] == "undecided"  # forty prompts cannot show that no more than one in a hundred is lost
    assert "40 prompts are too few to show that no more than 1 points are lost" in same["reason"]
    assert evaluate(loaded, loaded.model, other, settings, 0.02, 0.2, 600.0)["verdict"] == "holds"
    knows(other, lambda i: f"{2 * i}." if i < 10 else "no")
    worse = evaluate(loaded, loaded.model, other, settings, 0.02, 0.01, 600.0)
    assert worse["candidate"] == 0.25
    assert worse["lost"] == 0.5
    assert 0.25 < worse["low"] < 0.5 < worse["high"] < 0.75
    assert worse["verdict"] == "lost"


def test_prompts_for_which_there_was_no_time_leave_it_undecided(model, loaded, questions, knows):
    settings = Settings(str(model), "ttft", 64, 4, eval=str(questions))
    knows(loaded.model, lambda i: f"{2 * i}.")
    found = evaluate(loaded, loaded.model, loaded.model, settings, 0.02, 0.5, 0.0)
    assert found["prompts"] == 8
    assert found["verdict"] == "undecided"
    assert found["reason"] == "there was time for only 8 of 40 prompts"


def test_what_keeps_the_perplexity_and_loses_the_answers_has_lost(model, questions, monkeypatch):
    settings = Settings(str(model), "ttft", 64, 4, eval=str(questions))
    found = judged(settings, max_drop=0.5)  # a model that knows nothing has nothing to lose
    assert found["eval"]["verdict"] == found["verdict"] == "holds"
    assert (found["eval"]["name"], found["eval"]["prompts"], found["eval"]["baseline"]) == ("q.jsonl", 40, 0.0)
    monkeypatch.setattr(judging, "evaluate", lambda *_: {"verdict": "lost"})
    assert judged(settings, max_drop=0.5)["verdict"] == "lost"


def test_a_local_task_of_lm_eval_gives_a_score_for_every_prompt(loaded):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'lm_eval[hf]'")
    from lm_eval.api.task import ConfigurableTask

    class Rows(list):
        """What lm-eval asks of a split of a data set."""

        features = dict.fromkeys(("question", "answer", "choices"))

    rows = [{"question": f"{i} + {i} =", "answer": str(2 * i), "choices": [str(2 * i), str(i)]} for i in range(6)]
    task = ConfigurableTask(
        config={
            "task": "tiny_sums",
            "custom_dataset": lambda **_: {"test": Rows(rows)},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_target": 0,
            "doc_to_choice": "{{choices}}",
            "metric_list": [{"metric": "acc"}],
        }
    )
    metric, scores = lm_eval_scores(loaded.model, loaded.tokenizer, task)
    assert metric == "acc"
    assert len(scores) == 6
    assert set(scores.values()) <= {0.0, 1.0}
    assert lm_eval_scores(loaded.model, loaded.tokenizer, task, metric="acc")[1] == scores
    with pytest.raises(InputError, match="lm-eval cannot run 'no_such_task_of_anybody'"):
        lm_eval_scores(loaded.model, loaded.tokenizer, "no_such_task_of_anybody")


def test_the_agreement_of_the_proof_is_that_of_the_workloads(model):
    settings = Settings(str(model), "ttft", 64, 4)
    loaded = load_for(settings)
    work = build_work(loaded, settings, "proof")
    changed = load_for(settings).model.bfloat16()
    direct = agreement(loaded.model, changed, work.windows[:2])
    assert documents(loaded.model, changed, work, 0, 2)["prefill"]["kl"] == direct.kl.tolist()

"""Runs of `assay tune` as the store keeps them: read from the lines of an artefact, stale when their code changes, and pairs in them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sqlalchemy as sa
from evidence_maker import make
from tuned_maker import IMAGES_TRIED, MODULES, TRIED, image_line, image_run, lines, row, run

from assay.errors import InputError
from assay.evidence import hashes, shipped, tuned
from assay.evidence.reading import read_file
from assay.evidence.store import Store, merge_jsonl, tuned_table, write_jsonl

GOLDEN = "ed0988bd4d05901a4c47f4d6b9cd0540"  # the id of `run(fresh=False)`


def test_a_run_is_what_its_lines_say():
    found = run()
    assert (found.goal, found.model, found.fingerprint) == ("ttft", "smollm2-135m", "mine")
    assert tuned.label(found.steps) == "dtype(dtype=bfloat16) + fp8_vs_int8(rotation=16) + xattention(tau=0.9)"
    assert (found.over_free.low, found.over_baseline.median, found.over_exact.high) == (3.8, 8.0, 3.1)
    assert [one.cost for one in found.rows] == list(TRIED.values())
    assert (found.machine["cpu"], found.machine["cores"], found.machine["ram_bytes"]) == ("Run CPU", 2, 4 * 2**30)
    assert found.proven
    again = tuned.parse(found.to_json())
    assert again == found
    assert again.id == found.id != run(minutes=1).id


@pytest.mark.parametrize(
    "changes",
    [
        {"helped": False},
        {"quality": {"verdict": "undecided"}},
        {"quality": {"judged": False}},
        {"speedup_vs_free": {"median": 1.1, "low": 0.9, "high": 1.2}},
        {"speedup_vs_free": {"median": 1.1, "low": 1.05, "high": None}},
    ],
)
def test_what_does_not_beat_the_free_for_certain_or_was_not_judged_is_not_proven(changes):
    assert not run(**changes).proven


def test_own_code_that_loses_something_is_no_exact_baseline():
    assert run(papers={"exact": False, "speedup": {"median": 3.0, "low": 2.9, "high": 3.1}}).over_exact is None
    assert run(papers={"exact": True, "speedup": None}).over_exact is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda given: given.clear(), "must begin with the summary"),
        (lambda given: given.pop(0), "must begin with the summary"),
        (lambda given: given.insert(0, 7), "must begin with the summary"),
        (lambda given: given[0].pop("goal"), "KeyError: 'goal'"),
        (lambda given: given[0].update(quality=None), "TypeError"),
        (lambda given: given[0].update(speedup={"median": 3, "low": 4, "high": 5}), "over_baseline"),
        (lambda given: given[2].update(cost=-1.0), "rows.0.cost"),
        (lambda given: given[2].update(cost=float("nan")), "rows.0.cost"),
        (lambda given: given[2].update(row="winner"), "rows.0.row"),
        (lambda given: given[0].update(created="yesterday"), "created"),
        (lambda given: given.extend([given[2]] * 1001), "rows"),
    ],
)
def test_lines_that_are_no_run_are_refused_by_name(change, says):
    given = lines()
    change(given)
    with pytest.raises(InputError, match=says) as caught:
        tuned.of_lines(given, "the file")
    assert str(caught.value).startswith("the file: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, '{"format": 2}', '{"format": 1}', '{"model": NaN}'])
def test_texts_that_are_no_run_are_refused(text):
    with pytest.raises(InputError, match=r"^run 3: "):
        tuned.parse(text, "run 3")


def test_an_id_that_does_not_fit_is_refused():
    document = json.loads(run().to_json()) | {"seconds": 1.0}
    with pytest.raises(InputError, match="does not fit the content"):
        tuned.parse(json.dumps(document))


# Stale ---------------------------------------------------------------------------------------------------------------------


def test_a_run_of_this_code_is_fresh_and_one_without_hashes_is_not():
    assert tuned.changes(run()) == set()
    assert tuned.changes(run(fresh=False)) == set(MODULES) - {"attention_backend"}


def test_only_what_changed_is_stale(monkeypatch):
    found = run()
    now = hashes.of_closure
    monkeypatch.setattr(hashes, "of_closure", lambda name: "other" if name.endswith("xattention") else now(name))
    assert tuned.changes(found) == {"xattention"}
    monkeypatch.setattr(hashes, "versions", lambda: {"package torch": "0"})
    assert tuned.changes(found) == {"dtype", "fp8_vs_int8", "xattention"}


def test_the_hash_of_a_module_follows_what_it_imports(tmp_path, monkeypatch):
    folder = tmp_path / "assay" / "methods"
    (folder / "far").mkdir(parents=True)
    (folder / "near.py").write_text("from assay.methods.far import deep\n")
    (folder / "far" / "__init__.py").write_text("def late():\n    from . import deep\n")
    (folder / "far" / "deep.py").write_text("x = 1\n")
    (folder / "other.py").write_text("y = 1\n")

    def now():
        for cached in (hashes.of_file, hashes.of_closure, hashes._imports):
            cached.cache_clear()
        return hashes.of_closure("assay.methods.near")

    with monkeypatch.context() as patch:
        patch.setattr(hashes, "PACKAGE", tmp_path / "assay")
        first = now()
        (folder / "other.py").write_text("y = 2\n")
        (folder / "far" / "deep.py").write_text("x = 1  # the same\n")
        assert now() == first
        (folder / "far" / "deep.py").write_text("x = 2\n")
        assert now() != first
        for other in ("assay.methods.gone", "assay.methods/../near", "assay.tuner", "os"):
            assert hashes.of_closure(other) is None
    assert now() is None


# Pairs ---------------------------------------------------------------------------------------------------------------------


def test_a_pair_stands_beside_each_alone_over_the_recipe_without_the_two():
    [pair] = tuned.pairs(run())
    assert [step.transform for step in pair.steps] == ["fp8_vs_int8", "xattention"]
    assert [step.transform for step in pair.rest] == ["dtype"]
    assert pair.joint.median == pytest.approx(4.0)
    assert pair.joint.low < 4.0 < pair.joint.high
    assert [one.median for one in pair.alone] == pytest.approx([2.0, 1.6])
    assert pair.expected == pytest.approx(3.2)
    assert (pair.drop, pair.drop_low) == (0.004, 0.003)


def test_what_was_not_measured_in_the_run_is_none():
    [pair] = tuned.pairs(run({("dtype",): 4.0, ("dtype", "fp8_vs_int8", "xattention"): 1.0}))
    assert pair.joint.median == pytest.approx(4.0)
    assert pair.alone == (None, None)
    assert pair.expected is None
    [pair] = tuned.pairs(run({(): 8.0, ("dtype", "fp8_vs_int8", "xattention"): 1.0}))
    assert pair.joint is None
    assert tuned.pairs(run({(): 8.0, ("dtype",): 4.0, ("dtype", "xattention"): 2.5})) == ()


def test_another_setting_is_another_step():
    other = row(("dtype", "xattention"), 2.5)
    other["recipe"][1] = {"transform": "xattention", "config": {"tau": 0.5}}
    tried = {name: cost for name, cost in TRIED.items() if name != ("dtype", "xattention")}
    [pair] = tuned.pairs(run(tried, rows=[other]))
    assert pair.alone[1] is None


def test_failed_recipes_are_in_no_pair():
    failed = row(("dtype", "fp8_vs_int8", "attention_backend"), None, status="failed")
    assert len(tuned.pairs(run(rows=[failed]))) == 1


def test_three_methods_are_three_pairs():
    three = {("dtype",): 4.0, ("dtype", "fp8_vs_int8", "attention_backend", "xattention"): 0.5}
    found = tuned.pairs(run(three))
    assert [tuple(step.transform for step in pair.steps) for pair in found] == [
        ("fp8_vs_int8", "attention_backend"),
        ("fp8_vs_int8", "xattention"),
        ("attention_backend", "xattention"),
    ]
    assert all(pair.joint is None for pair in found)  # of what each leaves, nothing was measured


def test_no_interval_of_few_samples_nor_of_a_cost_that_was_corrected():
    few = row(("dtype", "fp8_vs_int8", "xattention"), 1.0, samples=[1.0])
    corrected = row(("dtype", "fp8_vs_int8", "xattention"), 1.0, samples=[7.0] * 5)
    for last in (few, corrected):
        [pair] = tuned.pairs(run({("dtype",): 4.0}, rows=[last]))
        assert (pair.joint.median, pair.joint.low) == (4.0, None)


# The store -----------------------------------------------------------------------------------------------------------------


def test_the_store_keeps_a_run_once_and_changes_none(url):
    first, second = run(), run(minutes=1)
    with Store(url) as store:
        assert store.add_runs([first, second]).added == 2
        assert (store.add_runs([first]).added, store.add_runs([first]).known) == (0, 1)
        for statement in ("UPDATE assay_tuned SET run = ''", "DELETE FROM assay_tuned"):
            with pytest.raises(sa.exc.DBAPIError, match="append-only"), store._begin(write=True) as connection:
                connection.execute(sa.text(statement))
    with Store(url) as store:
        assert store.runs() == [first, second]


def test_one_question_tells_what_came_of_both_kinds(url):
    with Store(url) as store:
        store.add([make(), make(seed=1)])
        store.add_runs([run(), run(minutes=1)])
        assert [(row.kind, row.seq) for row in store.news()] == [("record", 1), ("record", 2), ("run", 1), ("run", 2)]
        [row] = store.news(after=2, runs_after=1)
        assert (row.kind, row.read_run()) == ("run", run(minutes=1))
        assert store.news(after=2, runs_after=2) == []


def test_the_evidence_of_an_artefact_is_imported_as_its_run(url, tmp_path):
    file = tmp_path / "evidence.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines()))
    with Store(url) as store:
        assert store.import_jsonl(file).added == 1
        assert store.import_jsonl(file, mine=True).known == 1
        assert store.runs() == [run()]
        assert [row.imported for row in store.news()] == [True]
        assert store.count() == 0
        file.write_text(json.dumps({"kind": "summary"}) + "\n")
        with pytest.raises(InputError, match=r"evidence\.jsonl: is no run"):
            store.import_jsonl(file)


def test_a_store_of_the_schema_before_runs_is_brought_up_to_date(tmp_path):
    url = f"sqlite:///{tmp_path / 'e.db'}"
    with Store(url) as store, store._begin(write=True) as connection:
        connection.execute(sa.text("DROP TABLE assay_tuned"))
        connection.execute(sa.text("ALTER TABLE assay_evidence DROP COLUMN imported"))
        connection.execute(sa.text("UPDATE assay_version SET version_num = '0002'"))
    with Store(url) as store:
        store.add_runs([run()])
        assert store.runs() == [run()]


def test_the_authors_runs_can_be_read():
    """Those of earlier code too: what was not judged then is not proven now."""
    found = shipped.runs(Path(__file__).parents[2] / "evidence")
    assert len(found) > 1
    assert not any(one.proven for one in found if not one.verdict)
    assert any(pair.joint is not None and pair.expected is not None for one in found for pair in tuned.pairs(one))


# Image classifiers ---------------------------------------------------------------------------------------------------------


def test_a_run_of_an_image_classifier_is_what_its_line_says(tmp_path):
    found = image_run()
    assert (found.kind, found.format, found.goal, found.architecture) == ("images", 2, "latency", "resnet")
    assert tuned.label(found.steps) == "fold_batch_norm + int8_convolutions + channels_last"
    assert (found.metric, found.drop, found.drop_low, found.drop_high) == ("accuracy", 0.004, -0.002, 0.008)
    assert (found.pictures.total, found.pictures.proof, found.pictures.same) == (670, 400, 0.97)
    assert (found.best.value, found.best.unit, found.over_free.low, found.over_exact) == (
        2.0,
        "ms a picture",
        1.9,
        None,
    )
    assert [row.cost for row in found.rows] == [*IMAGES_TRIED.values(), None]
    assert found.rows[1].ratio.median == 1.5
    assert len(found.rows[-1].error) == 500
    assert (found.fingerprint, found.machine["cpu"], found.machine["cores"]) == ("mine", "Run CPU", 2)
    assert found.proven
    assert (
        tuned.lost_text(found) == "accuracy 79.6 % of 400 pictures, 80.0 % as loaded, lost +0.40 points [-0.20, 0.80]"
    )
    again = tuned.parse(found.to_json())
    assert again == found
    assert again.id == found.id != image_run(minutes=1).id
    assert run().kind == "language"
    file = tmp_path / "evidence.jsonl"
    file.write_text(json.dumps(image_line()) + "\n")
    assert tuned.read(file) == found
    pairs = {tuple(step.transform for step in pair.steps): pair for pair in tuned.pairs(found)}
    assert pairs["int8_convolutions", "channels_last"].joint.median == pytest.approx(3.0)
    assert len(pairs) == 3


def test_a_run_of_a_language_model_is_as_it_was_before_there_were_images():
    """Its line and its id: rows of an older store are found again, and an older assay reads new ones."""
    line = run(fresh=False).to_json()
    assert json.loads(line)["format"] == 1
    assert "pictures" not in line
    assert tuned.parse(line).id == GOLDEN


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda line: line.pop("goal"), "KeyError: 'goal'"),
        (lambda line: line.update(quality=None), "TypeError"),
        (lambda line: line.update(recipe=[]), "TypeError"),
        (lambda line: line["quality"].update(candidate=1.5), "pictures.candidate"),
        (lambda line: line["quality"].update(pictures=0), "pictures.proof"),
        (lambda line: line.update(unfit=["x"]), "pictures.unfit"),
        (lambda line: line["rows"][0].update(cost=-1.0), "rows.0.cost"),
        (lambda line: line["rows"][0].update(kind="winner"), "rows.0.row"),
        (lambda line: line["rows"].extend([line["rows"][0]] * 1001), "rows"),
        (lambda line: line.update(speedup={"median": 3, "low": 4, "high": 5}), "over_baseline"),
        (lambda line: line.update(machine={}), "KeyError: 'fingerprint'"),
    ],
)
def test_a_line_that_is_no_run_of_images_is_refused_by_name(change, says):
    line = image_line()
    change(line)
    with pytest.raises(InputError, match=says) as caught:
        tuned.of_lines([line], "the file")
    assert str(caught.value).startswith("the file: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [{"prompt_tokens": 4, "new_tokens": 4}, {"pictures": None}, {"format": 1}, {"format": 3}],
)
def test_the_two_kinds_do_not_mix(changes):
    document = json.loads(image_run().to_json()) | changes
    del document["id"]
    with pytest.raises(InputError, match="format"):
        tuned.parse(json.dumps(document))


def test_a_language_run_without_its_lengths_is_none():
    document = json.loads(run().to_json())
    del document["id"], document["new_tokens"]
    with pytest.raises(InputError, match="has prompt_tokens and new_tokens"):
        tuned.parse(json.dumps(document))


def test_options_are_stale_when_their_code_changes_and_those_of_torch_with_the_packages(monkeypatch):
    found = image_run()
    assert tuned.changes(found) == set()
    assert tuned.word_of(found, tuned.changes(found)) == "proven"
    assert tuned.changes(image_run(fresh=False)) == {"fold_batch_norm", "int8_convolutions", "channels_last"}
    now = hashes.of_closure
    monkeypatch.setattr(hashes, "of_closure", lambda name: "other" if name.endswith("int8_conv") else now(name))
    assert tuned.changes(found) == {"int8_convolutions"}
    assert tuned.word_of(found, tuned.changes(found)) == "stale"
    monkeypatch.setattr(hashes, "versions", lambda: {"package torch": "0"})
    assert "channels_last" in tuned.changes(found)


def test_the_store_keeps_both_kinds_and_takes_them_from_a_file(url, tmp_path):
    first, second = run(), image_run()
    file = tmp_path / "all.jsonl"
    write_jsonl([make()], file, [first, second])
    with Store(url) as store:
        assert (store.import_jsonl(file).added, store.import_jsonl(file).known) == (3, 3)
        assert store.runs() == [first, second]
        assert store.find(second.id[:6]) == second
        with pytest.raises(InputError, match="and no record"):
            store.get(second.id)
        assert store.read_runs(last=1).runs == (second,)
    merge_jsonl([make(seed=1)], file)
    assert read_file(file).runs == (first, second)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"run": {"format": 3}}', "newer assay"),
        ('{"run": 7}', "must be a JSON object"),
        ('{"run": {}, "more": 1}', "holds nothing else"),
        ('{"run": ', "not JSON"),
        ('{"run": ' + "[" * 9000, "not JSON"),
        ('{"run": {"model": NaN}}', "model"),
    ],
)
def test_a_file_with_a_damaged_run_is_refused_whole(line, says, tmp_path):
    file = tmp_path / "all.jsonl"
    write_jsonl([make()], file, [image_run()])
    file.write_text(file.read_text() + line + "\n")
    assert says in read_file(file).damaged[0].why
    with Store(f"sqlite:///{tmp_path / 'e.db'}") as store:
        with pytest.raises(InputError, match="line 3"):
            store.import_jsonl(file)
        assert (store.count(), store.runs()) == (0, [])


def test_a_damaged_run_of_the_store_stands_in_nobodys_way(tmp_path):
    with Store(f"sqlite:///{tmp_path / 'e.db'}") as store:
        store.add_runs([image_run()])
        with store._begin(write=True) as connection:
            connection.execute(sa.insert(tuned_table).values(id="bad0", fingerprint="x", run='{"format": 2}'))
        assert store.runs() == [image_run()]
        [damaged] = store.read_runs().damaged
        assert damaged.where == "run 2 of the store, id bad0"
        assert store.find("bad") == damaged

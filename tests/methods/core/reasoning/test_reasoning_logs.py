"""Logs and tasks of the LM Evaluation Harness: as its versions write them, and what is refused."""

import gzip
import json

import pytest

from assay.methods.core.reasoning.logs import read_log, read_task, write_task


def line(**more):
    base = {"doc_id": 0, "doc": {"question": "1 + 2 ="}, "target": "3", "arguments": [["1 + 2 =", {"until": ["\n"]}]]}
    return json.dumps({**base, "resps": [["3", " it is 4", "3.0"]], "filtered_resps": ["3"], **more})


def written(tmp_path, *lines, name="samples_x.jsonl"):
    path = tmp_path / name
    data = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


@pytest.mark.parametrize("name", ["samples_x.jsonl", "samples_x.jsonl.gz"])
def test_all_samples_of_an_item_are_read(tmp_path, name):
    (one,) = read_log(written(tmp_path, line(), name=name))
    assert (one.item, one.prompt, one.target) == ("0", "1 + 2 =", "3")
    assert one.texts == ("3", " it is 4", "3.0")
    assert one.answers == ("3", "4", "3")
    assert one.right == (True, False, True)


def test_what_filters_found_counts_where_it_is_there_for_each(tmp_path):
    (one,) = read_log(written(tmp_path, line(filtered_resps=[["3", "4", "7"]])))
    assert one.answers == ("3", "4", "7")
    new = line(
        arguments={"gen_args_0": {"arg_0": "p", "arg_1": {}}},
        target="long #### 3",
        resps=[["#### 3"]],
        filtered_resps=["3"],
    )
    (one,) = read_log(written(tmp_path, new))
    assert (one.prompt, one.right) == ("p", (True,))


def test_the_metric_decides_for_one_sample_and_filters_are_told_apart(tmp_path):
    lines = [
        line(filter="strict", resps=[["The answer: 3"]], filtered_resps=["[invalid]"], exact_match=0.0),
        line(filter="flexible", resps=[["The answer: 3"]], filtered_resps=["3"], exact_match=1.0),
    ]
    assert read_log(written(tmp_path, *lines))[0].right == (False,)
    assert read_log(written(tmp_path, *lines), filter="flexible")[0].right == (True,)
    with pytest.raises(ValueError, match="no samples of the filter 'x'"):
        read_log(written(tmp_path, *lines), filter="x")


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: must be an object"),
        (line(doc_id=1, resps=[[[-1.0, False]]], filtered_resps=[[-1.0, False]]), "line 2: has no texts"),
        (line(doc_id=1, target=None), "line 2: target"),
        (line(doc_id=1, resps={"a": 1}), "line 2: resps must be a list"),
        (line(), "line 2: doc_id 0 stands twice"),
        ("[" * 100_000, "line 2: not JSON"),
    ],
)
def test_what_is_no_log_is_named(tmp_path, bad, said):
    with pytest.raises(ValueError, match=said):
        read_log(written(tmp_path, line(), bad))


def test_an_empty_log_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no samples"):
        read_log(written(tmp_path, ""))


def test_a_task_is_read_as_it_was_written(tmp_path):
    rows = [("1 + 2 =", "3"), ("é\nx =", "yes")]
    path = write_task(
        tmp_path / "tasks", "sums", rows, stop=("\n", "\n\n"), temperature=0.5, max_new_tokens=9, repeats=4
    )
    task = read_task(path)
    assert (task.prompts, task.targets) == (("1 + 2 =", "é\nx ="), ("3", "yes"))
    assert (task.name, task.stop, task.temperature, task.max_new_tokens, task.repeats) == (
        "sums",
        ("\n", "\n\n"),
        0.5,
        9,
        4,
    )
    assert read_task(write_task(tmp_path, "greedy", rows, temperature=0)).temperature == 0
    with pytest.raises(ValueError, match="name"):
        write_task(tmp_path, "../x", rows)
    with pytest.raises(ValueError, match="rows"):
        write_task(tmp_path, "x", [])


GOOD = "task: t\ndataset_path: json\noutput_type: generate_until\ndataset_kwargs: {data_files: {test: d.jsonl}}\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (GOOD + "doc_to_text: !function utils.run\ndoc_to_target: a\n", "without running code"),
        (GOOD + "include: other.yaml\n", "without include"),
        (GOOD.replace("json\n", "gsm8k\n") + "doc_to_text: q\ndoc_to_target: a\n", "dataset_path json"),
        (GOOD + "doc_to_text: '{{q.upper()}}'\ndoc_to_target: a\n", "only plain fields"),
        (GOOD + "doc_to_text: '{% if q %}x{% endif %}'\ndoc_to_target: a\n", "only plain fields"),
        (GOOD + "doc_to_target: a\n", "doc_to_text must be text"),
        (GOOD.replace("{test: d.jsonl}", "{train: d.jsonl}") + "doc_to_text: q\n", "must name a file for test"),
    ],
)
def test_a_task_that_needs_code_is_refused(tmp_path, text, said):
    (tmp_path / "d.jsonl").write_text('{"q": "1 =", "a": "1"}\n')
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(ValueError, match=said):
        read_task(tmp_path / "t.yaml")
    (tmp_path / "t.yaml").write_text(GOOD + "doc_to_text: 'Q: {{ q }}'\ndoc_to_target: a\n")
    assert read_task(tmp_path / "t.yaml").prompts == ("Q: 1 =",)
    assert read_task(tmp_path / "t.yaml").targets == ("1",)

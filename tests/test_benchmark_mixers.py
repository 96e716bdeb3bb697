"""benchmarks/mixers.py at its smallest: what stands in the rows, that the charts are written, and that the arms are what they say."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from benchmarks import mixers

from assay.experiments.mixers.based import prefilled
from assay.measure.clock import Timings


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The script run once with --quick: its folder and its rows."""
    folder = tmp_path_factory.mktemp("mixers")
    patch = pytest.MonkeyPatch()
    patch.setattr(
        sys, "argv", ["mixers.py", "--quick", "--out", str(folder / "rows.jsonl"), "--chart", str(folder / "c.html")]
    )
    patch.setattr(mixers, "print", lambda *text, **options: None, raising=False)
    try:
        mixers.main()
    finally:
        patch.undo()
    return folder, [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def of_panel(rows, panel, arm=None):
    return [row for row in rows if row["panel"] == panel and arm in (None, row["arm"])]


def test_every_arm_has_its_points(quick):
    _, rows = quick
    assert [(row["arm"], row["setting"]) for row in of_panel(rows, "recall")] == mixers.trainings()
    contexts = mixers.QUICK[1].contexts
    assert [(row["context"], row["arm"]) for row in of_panel(rows, "generation")] == [
        (context, arm) for context in contexts for arm in mixers.ARMS
    ]


def test_rows_say_what_was_measured_and_where(quick):
    _, rows = quick
    for row in rows:
        assert {"machine", "commit", "command", "created", "sizes", "parameters"} <= set(row)
        assert row["command"].startswith("python mixers.py --quick")
        assert row["state_bytes"] > 0
    for row in of_panel(rows, "recall"):
        found = row["accuracy"]
        assert 0 <= found["low"] <= found["mean"] <= found["high"] <= 1
        assert found["n"] == mixers.QUICK[0].tests
        assert row["chance"] == 1 / 4
        assert len(row["losses"]) == mixers.QUICK[0].steps
    for row in of_panel(rows, "generation"):
        found = row["tokens_per_second"]
        assert 0 < found["low"] <= found["median"] <= found["high"]
        assert found["n"] >= 2
        assert row["weights"] == "untrained"


def test_state_bytes(quick):
    _, rows = quick
    recall, generation = mixers.QUICK
    for name, arm in mixers.ARMS.items():
        sizes = [row["state_bytes"] for row in of_panel(rows, "recall", name)]
        assert len(sizes) == len(arm.settings)
        assert sizes == sorted(set(sizes))
    fit = of_panel(rows, "generation", "fit")[
        1
    ]  # keys and values of two local layers and the tokens to read, 7 of 8 in the group
    latents = 4 * (64 // 8 - 1)  # of whole groups, behind which the group was that full; 4 more are written from
    assert fit["state_bytes"] == 8 + 4 * generation.width * (7 * (2 * 2 + 1) + 2 * latents + 2 * 4)
    conv = 2 * 2 * recall.width * 4  # a short convolution of three taps and twice the width, float32
    all_heads = of_panel(rows, "recall", "attention")[-1]
    assert all_heads["state_bytes"] == conv + 2 * 2 * recall.length * recall.width * 4
    one_head = of_panel(rows, "recall", "attention")[0]
    assert one_head["state_bytes"] == conv + 2 * 2 * recall.length * recall.width * 4 // mixers.HEADS
    for name in set(mixers.ARMS) - {"fit"}:
        short, long = (row["state_bytes"] - conv for row in of_panel(rows, "generation", name))
        grows = name == "attention" or name.startswith("long convolution") or name == "sliding window"
        # a window of 128 reaches 64 tokens back, the longer of these contexts
        assert long == 2 * short if grows else long == short
    assert generation.width == recall.width


def test_a_window_keeps_no_more_than_its_reach():
    model = mixers.generation_models(mixers.QUICK[1])["sliding window"]
    assert model.state_bytes(32) < model.state_bytes(64)
    assert model.state_bytes(64) == model.state_bytes(16384)


def test_charts_are_written_whole(quick):
    folder, _ = quick
    assert (folder / "c.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    page = (folder / "c.html").read_text()
    assert page.rstrip().endswith("</html>")
    assert "data:image/svg+xml;base64," in page
    assert "http" not in page
    for name in mixers.ARMS:
        assert f"<td>{name}</td>" in page
    assert sorted(path.name for path in folder.iterdir()) == ["c.html", "c.png", "rows.jsonl"]


def test_chart_shows_every_arm_with_its_interval(quick):
    _, rows = quick
    left, right = mixers.chart(rows).axes
    assert (left.get_xscale(), left.get_yscale()) == ("log", "linear")
    assert (right.get_xscale(), right.get_yscale()) == ("log", "log")
    low, high = right.get_ylim()
    assert any(low <= tick <= high for tick in right.get_yticks())
    for axes, panel, key in ((left, "recall", "accuracy"), (right, "generation", "tokens_per_second")):
        drawn = {container.get_label(): container for container in axes.containers}
        assert list(drawn) == list(mixers.ARMS)
        assert len({container[0].get_color() for container in drawn.values()}) == len(mixers.ARMS)
        for name, container in drawn.items():
            line, _, (bars,) = container
            assert len(line.get_xdata()) == len(of_panel(rows, panel, name))
            shown = sorted((float(s[0, 1]), float(s[1, 1])) for s in bars.get_segments())
            expected = sorted((row[key]["low"], row[key]["high"]) for row in of_panel(rows, panel, name))
            torch.testing.assert_close(torch.tensor(shown), torch.tensor(expected))


def test_a_state_of_fit_never_holds_more_than_its_row_says():
    sizes = mixers.QUICK[1]
    model = mixers.generation_models(sizes)["fit"]
    cache, held = model.new_cache(2), []
    with torch.no_grad():
        for _ in range(64):
            model(torch.zeros(2, 1, dtype=torch.int64), cache=cache)
            held.append(cache.bytes())
    for context in (20, 32, 64):
        assert model.state_bytes(context, 2) == max(held[context - sizes.group : context])


def test_fit_is_timed_in_the_middle_and_at_the_end_of_its_group(monkeypatch):
    """Each run of `tokens` tokens is charged its share of the end of a group."""
    sizes, seen = mixers.QUICK[1], {}

    def compare_many(runs, **options):
        for name, run in runs.items():
            seen[name] = run.args[1].states[0]
        return Timings(
            {name: [5.0, 5.0] if name == mixers.END else [1.0, 1.0] for name in runs}, {}, 0.0, 0.0, 0.0, False
        )

    monkeypatch.setattr(mixers, "compare_many", compare_many)
    rows = {row["arm"]: row for row in mixers.generation_rows(replace(sizes, contexts=(32,)))}
    assert list(rows) == list(mixers.ARMS)
    assert int(seen["fit"]["seen"][0]) % sizes.group == sizes.group // 2 + 1
    assert int(seen[mixers.END]["seen"][0]) + sizes.tokens == 32
    tokens, ends = sizes.batch * sizes.tokens, sizes.tokens / sizes.group
    assert rows["attention"]["tokens_per_second"]["median"] == tokens
    assert rows["fit"]["tokens_per_second"]["median"] == pytest.approx(tokens / (1 - ends + 5 * ends))


def test_fit_is_about_as_large_as_attention():
    for sizes, vocab in ((mixers.Recall(), 32), (mixers.Generation(), 256)):
        room = {"width": sizes.width, "vocab": vocab, "length": 32, "window": sizes.window, "group": sizes.group}
        fit, attention = (
            sum(p.numel() for p in mixers.language_model(arm, mixers.ARMS[arm].generating, **room).parameters())
            for arm in ("fit", "attention")
        )
        assert 0.75 < fit / attention < 1.33


@pytest.mark.parametrize("arm", [name for name in mixers.ARMS if name != "fit"])
def test_arms_differ_in_their_mixers_alone(arm):
    sizes = mixers.QUICK[1]
    model, other = (mixers.generation_models(sizes)[name] for name in (arm, "attention"))
    for key in ("hidden_size", "num_hidden_layers", "intermediate_size", "channel_mixer", "vocab_size"):
        assert getattr(model.config, key) == getattr(other.config, key)
    second = "based_window" if arm == "based" else mixers.ARMS[arm].mixer
    assert [name for name, _ in model.config.layers] == ["baseconv", mixers.ARMS[arm].mixer, second]


@pytest.mark.parametrize("arm", mixers.ARMS)
def test_generating_behind_a_prefilled_context_is_the_parallel_model(arm):
    model = mixers.generation_models(mixers.QUICK[1])[arm]
    ids = torch.randint(256, (2, 40), generator=torch.Generator().manual_seed(0))
    cache = prefilled(model, ids, chunk=16)
    with torch.no_grad():
        whole = torch.cat([ids, ids[:, :1], ids[:, 5:6]], 1)
        one = model(whole[:, -1:], cache=cache).logits[:, -1]
        torch.testing.assert_close(one, model(whole).logits[:, -1], atol=1e-5, rtol=1e-4)


def test_runs_behind_a_cache_leave_its_length():
    model = mixers.generation_models(mixers.QUICK[1])["attention"]
    ids = torch.zeros(2, 20, dtype=torch.int64)
    cache = prefilled(model, ids)
    for _ in range(3):
        mixers.generate_behind(model, cache, ids[:, -1:], 4)
    assert cache.states[1]["there"].shape == (2, 21)


@pytest.mark.parametrize(("option", "value"), [("--chart", "picture.svg"), ("--steps", "0")])
def test_wrong_options_are_refused(monkeypatch, capsys, option, value):
    monkeypatch.setattr(sys, "argv", ["mixers.py", option, value])
    with pytest.raises(SystemExit):
        mixers.main()
    assert f"argument {option} must" in capsys.readouterr().err


def test_a_point_measured_again_takes_the_place_of_the_old_one(quick, monkeypatch, tmp_path):
    _, rows = quick
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["mixers.py", "--quick", "--panel", "recall", "--arms", "fit", "--out", str(file)]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(mixers, "print", lambda *text, **options: None, raising=False)
    # in this process: `quick` has seen that they run in others
    monkeypatch.setattr(mixers, "ProcessPoolExecutor", lambda workers, mp_context: ThreadPoolExecutor(1))
    mixers.main()
    found = [json.loads(line) for line in file.read_text().splitlines()]
    points = [[(r["panel"], r.get("context"), r["arm"], r["setting"]) for r in some] for some in (rows, found)]
    assert points[0] == points[1]
    again = [row for row in found if row["command"].endswith(str(file))]
    assert [(row["arm"], row["setting"]) for row in again] == mixers.trainings(["fit"])

"""`assay profile` of an image classifier: the table of its modules, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from tests.tiny import calibration, write_tiny_llama
from transformers import ResNetConfig, ResNetForImageClassification

from assay.cli import profile as command
from assay.cli.main import main
from assay.measure.profile import Row
from assay.tuner.images.models import load_image_model
from assay.tuner.images.profile import grouped
from assay.tuner.images.recipe import ImageRecipe, ImageStep
from assay.tuner.names import CALIBRATION, RECIPE

SIZE = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A residual net of two stages as transformers saves it, with its preprocessing."""
    from transformers import ViTImageProcessorPil

    path = tmp_path_factory.mktemp("models") / "tiny [b]net"
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    ResNetForImageClassification(config).save_pretrained(path)
    ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}).save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def calibrated(monkeypatch):
    known = calibration(noisy=True, peak_flops={"float32": 1e11, "bfloat16": 4e11, "int8": 8e11})
    monkeypatch.setattr("assay.tuner.images.profile.calibrate", lambda *a, **k: known)


def run(capsys, *arguments):
    code = main(["profile", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def test_json_is_one_document_with_every_module(capsys, folder):
    code, out, _ = run(capsys, folder, "--batch", 3, "--json")
    assert code == 0
    found = json.loads(out)
    assert (found["kind"], found["pictures"], found["architecture"]) == ("images", 3, "resnet")
    assert "prompt_tokens" not in found
    assert list(found["phases"]) == list(found["seconds"]) == ["forward"]
    parameters = sum(p.numel() for p in load_image_model(folder).model.parameters())
    assert sum(row["params"] for row in found["modules"]) == parameters
    first = next(row for row in found["modules"] if row["name"] == "resnet.embedder.embedder.convolution")
    assert first["kind"] == "linear"
    assert first["params"] == 8 * 3 * 7 * 7
    assert first["macs"] == 3 * 8 * (SIZE // 2) ** 2 * 3 * 7 * 7
    assert first["seconds"] > 0
    assert first["phase"] == "forward"
    assert found["prepare_seconds"] > 0
    assert found["uncounted"] == {}
    one = json.loads(run(capsys, folder, "--json")[1])
    assert one["pictures"] == 1
    assert 3 * sum(row["macs"] for row in one["modules"]) == sum(row["macs"] for row in found["modules"])


def test_tables_and_page(capsys, folder, tmp_path, monkeypatch):
    page = tmp_path / "p.html"
    monkeypatch.setattr("assay.measure.plots.svg", lambda figure: f"<svg>{figure.axes[0].get_title(loc='left')}</svg>")
    code, out, _ = run(capsys, folder, "--html", page)
    assert code == 0
    for text in ("tiny [b]net, forward", "resnet, 1 picture at a time", "parameters",
                 "stages.1.layers.0.layer.0.convolution", "all linear", "Decoding and preparing",
                 "busy when it was calibrated", "1 MAC = 2 FLOPs", "forward"):  # fmt: skip
        assert text in out, text
    for text in ("prefill", "prompt", "Runtime model", "Words"):
        assert text not in out, text
    html = page.read_text()
    assert html.count("<svg") == 2
    assert "Waterline, forward" in html
    assert "resnet, 1 picture at a time" in html
    assert "Runtime model" not in html


def test_equal_modules_of_equal_layers_are_added_up_and_no_others():
    def row(name, **changes):
        known = {"phase": "forward", "kind": "linear", "dtype": "float32", "calls": 1, "params": 9, "macs": 90, "bytes": 4,
                 "seconds": 0.5, "attainable_seconds": 0.1, "peak": 1e9}  # fmt: skip
        return Row(name=name, **(known | changes))

    rows = [
        row("layer.0.conv"),
        row("layer.1.conv"),
        row("layer.2.conv", params=18),
        row("net.0", kind="other"),
        row("net.1"),
    ]
    found = grouped(rows)
    assert [(one.name, one.modules, one.params, one.macs) for one in found] == [
        ("layer.*.conv", 2, 18, 180),
        ("layer.2.conv", 1, 18, 90),
        ("net.0", 1, 9, 90),
        ("net.1", 1, 9, 90),
    ]
    assert found[0].seconds == 1.0
    assert rows[0].seconds == 0.5  # as they were


def test_an_artefact_is_profiled_with_its_recipe(capsys, folder, tmp_path):
    import shutil

    from safetensors.torch import save_file

    tuned = tmp_path / "tuned"
    shutil.copytree(folder, tuned)
    ImageRecipe(steps=(ImageStep(option="fold_batch_norm"), ImageStep(option="int8_convolutions"))).save(tuned / RECIPE)
    save_file({"batch000": torch.randn(2, 3, SIZE, SIZE)}, tuned / CALIBRATION)
    code, out, _ = run(capsys, tuned, "--json")
    assert code == 0
    found = json.loads(out)
    plain = json.loads(run(capsys, folder, "--json")[1])
    assert found["uncounted"] == {}
    rows = {row["name"]: row for row in found["modules"]}
    for row in plain["modules"]:
        assert rows.get(row["name"], {"macs": 0})["macs"] == row["macs"], row["name"]
    assert rows["resnet.embedder.embedder.convolution"]["dtype"] == "int8"
    assert any("codes" in note for note in found["notes"])


def test_what_is_of_the_other_kind_is_refused(capsys, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("assay.tuner.images.profile.profile_images", lambda *a: pytest.fail("worked"))
    monkeypatch.setattr(command, "examine", lambda *a: pytest.fail("worked"))
    llama = write_tiny_llama(tmp_path / "llama")
    for words, says in {
        (folder, "--prompt-tokens", 8): "--prompt-tokens is for language models",
        (folder, "--new-tokens", 8): "--new-tokens is for language models",
        (folder, "--estimate"): "--estimate is for language models",
        (folder, "--anyway"): "--anyway is for language models",
        (folder, "--batch", 0): "--batch must be",
        (folder, "--batch", 2000): "--batch must be",
        (folder, "--html", tmp_path): "--html",
        (llama, "--batch", 2): "--batch is for image classifiers",
    }.items():
        code, out, err = run(capsys, *words)
        assert (code, out) == (2, ""), words
        assert says in err.splitlines()[-1]

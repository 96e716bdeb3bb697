"""Tuning an image classifier: survey, search, proof and artefact, on tiny models and pictures, all in this process."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

import assay
from assay.cli.main import main
from assay.errors import InputError
from assay.evidence import tuned
from assay.evidence.store import Store
from assay.measure.clock import compare_many
from assay.measure.isolate import ChildResult
from assay.tuner.artefact import remember
from assay.tuner.images import artefact, child, replay, tune
from assay.tuner.images.models import is_image_model, load_image_model, logits, save_backbone
from assay.tuner.images.options import OPTIONS, Option
from assay.tuner.images.recipe import ImageRecipe, ImageStep, apply
from assay.tuner.images.work import Settings, build, scores
from assay.tuner.recipe import Recipe

SIZE = 16
NAMES = ("red", "green", "blue")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Noisy pictures of three colours: anything learns them."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for place, name in enumerate(NAMES):
        (folder / name).mkdir()
        for number in range(40):
            pixels = torch.randint(0, 120, (SIZE, SIZE, 3), generator=generator)
            pixels[..., place] += 100
            Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / name / f"{number}.png")
    return folder


LABELS = {"id2label": dict(enumerate(NAMES)), "label2id": {name: number for number, name in enumerate(NAMES)}}


def residual():
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        downsample_in_first_stage=True,
        **LABELS,
    )
    return ResNetForImageClassification(config)


def transformer():
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=SIZE,
        patch_size=2,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        **LABELS,
    )
    return ViTForImageClassification(config)


@pytest.fixture(scope="module")
def models(tmp_path_factory, pictures):
    """A residual net and a ViT that know the three colours, as folders."""
    processor = ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}, image_mean=[0.5] * 3, image_std=[0.25] * 3)
    found = {}
    for make in (residual, transformer):
        folder = tmp_path_factory.mktemp(make.__name__)
        model = make().train()
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        work = build(Settings(str(folder), "latency", str(pictures)))
        pixels, labels = work.pixels(work.pictures.part("search").read()), torch.tensor(work.right("search"))
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        for _ in range(25):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(pixels).logits, labels).backward()
            optimizer.step()
        model.eval().save_pretrained(folder)
        found[make.__name__] = folder
    return found


@pytest.fixture
def in_process(monkeypatch):
    """Children are called here, and compilation, which takes half a minute, is no option."""
    calls = []

    def run(target, kwargs, **limits):
        name = target.split(":")[1]
        calls.append(name)
        try:
            value = json.loads(json.dumps(getattr(child, name)(**kwargs)))
        except Exception as error:  # what a child's reply would say
            return ChildResult("failed", None, f"{type(error).__name__}: {error}", 0.0, 0, 0.0)
        if name == "survey":  # what is tried must not hang on how busy this machine is
            value["seconds"] = 0.01
        peak = 2**30 - (2**28 if kwargs.get("recipe", {}).get("steps") else 0)
        return ChildResult("ok", value, "", 0.1, peak, 0.0)

    def rounds(functions, **_):
        return compare_many(functions, rounds=6, warmup=1)

    monkeypatch.setattr(tune, "run_isolated", run)
    monkeypatch.setattr("assay.tuner.artefact.remember", lambda *_: None)
    monkeypatch.setattr(child, "compare_many", rounds)
    before = dict(OPTIONS)  # put back whole: their order is that of recipes
    for name in ("compile", "bfloat16"):
        del OPTIONS[name]
    yield calls
    OPTIONS.clear()
    OPTIONS.update(before)


def settings(folder, pictures, goal="latency"):
    return Settings(str(folder), goal, str(pictures))


@pytest.mark.parametrize("kind", ["residual", "transformer"])
def test_a_model_is_tuned_saved_and_loaded(models, pictures, tmp_path, in_process, kind):
    found = tune.tune_images(settings(models[kind], pictures), tmp_path / "out", max_drop=0.1, minutes=10)
    assert found["quality"]["metric"] == "accuracy"
    assert found["quality"]["baseline"] > 0.9  # above chance, which is a third
    assert found["quality"]["pictures"] == 72
    assert {"survey", "assess", "judge", "prove"} <= set(in_process)
    saved = found["recipe"]["steps"]
    again = json.loads((tmp_path / "out" / "evidence.jsonl").read_text())
    assert again["recipe"]["steps"] == saved
    assert "<svg" in (tmp_path / "out" / "report.html").read_text()
    model = assay.load(tmp_path / "out")
    work = build(settings(models[kind], pictures))
    expected = apply(work.loaded.model, ImageRecipe.read(tmp_path / "out" / "recipe.toml"), work.calibration())
    pixels = work.pixels(work.pictures.part("proof").read())
    with torch.inference_mode():
        assert torch.equal(logits(model, pixels), logits(expected, pixels))
    plain = AutoModelForImageClassification.from_pretrained(tmp_path / "out")  # readable without assay, as it was
    with torch.inference_mode():
        told = plain(pixels).logits.argmax(-1).tolist()
    assert sum(a == b for a, b in zip(told, work.right("proof"), strict=True)) > 60


def test_what_loses_too_much_is_not_saved(models, pictures, tmp_path, in_process):
    """An option that is fast and destroys the model is tried, seen to lose, and left out; the proof would not have it either."""

    class Guess(nn.Module):
        def forward(self, x):
            return torch.zeros(len(x), 3)

    wrong = Option("int8_linears", "nothing", False, False, lambda model: "", lambda model, calibration: Guess())
    OPTIONS["int8_linears"] = wrong
    found = tune.tune_images(settings(models["transformer"], pictures), tmp_path / "out", max_drop=0.1, minutes=10)
    rows = {row["label"].split(" + ")[-1]: row for row in found["rows"]}
    tried = next(row for label, row in rows.items() if "int8_linears" in label)
    assert tried["lost"] > 0.4
    assert not tried["kept"]
    assert "int8_linears" not in json.dumps(found["recipe"])


def test_a_candidate_that_fools_the_search_falls_in_the_proof(models, pictures, tmp_path, in_process):
    """Right on the search's pictures, wrong on the proof's: it is judged there and not saved."""
    work = build(settings(models["transformer"], pictures))
    seen = {tuple(row.flatten()[:8].tolist()): label for row, label in zip(
        work.pixels(work.pictures.part("search").read()), work.right("search"), strict=True)}  # fmt: skip

    class Remembers(nn.Module):
        def forward(self, x):
            known = [seen.get(tuple(row.flatten()[:8].tolist()), 0) for row in x]
            return nn.functional.one_hot(torch.tensor(known), 3).float()

    cheat = Option("int8_linears", "memory", False, False, lambda model: "", lambda model, calibration: Remembers())
    OPTIONS["int8_linears"] = cheat
    del OPTIONS["merge_tokens"]
    found = tune.tune_images(settings(models["transformer"], pictures), tmp_path / "out", max_drop=0.1, minutes=10)
    assert found["judged"]["label"].endswith("int8_linears")
    assert found["judged"]["verdict"] == "lost"
    assert not found["helped"]
    assert "int8_linears" not in json.dumps(found["recipe"])
    assert any("is not saved" in note for note in found["notes"])


def test_too_few_pictures_to_show_a_small_loss_leave_out_what_may_lose(models, pictures, tmp_path, in_process):
    found = tune.tune_images(settings(models["transformer"], pictures), tmp_path / "out", max_drop=0.01, minutes=10)
    assert all(row["kind"] != "candidate" for row in found["rows"])
    assert any("72 pictures of the proof cannot show" in note for note in found["notes"])


def test_memory_is_that_of_processes_of_their_own(models, pictures, tmp_path, in_process):
    found = tune.tune_images(
        settings(models["residual"], pictures, "memory"), tmp_path / "out", max_drop=0.1, minutes=10
    )
    assert in_process.count("once") >= 3 * 2
    assert found["baseline"]["value"] == pytest.approx(1024)
    assert found["best"]["value"] == pytest.approx(768)
    assert found["best"]["unit"] == "MiB at peak"


def test_an_interrupted_run_goes_on_from_its_journal(models, pictures, tmp_path, in_process, monkeypatch):
    def dies(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tune, "_proof", dies)
        with pytest.raises(KeyboardInterrupt, match="measurements are kept"):
            tune.tune_images(settings(models["residual"], pictures), tmp_path / "out", max_drop=0.1, minutes=10)
    before = len(in_process)
    told = []
    tune.tune_images(
        settings(models["residual"], pictures), tmp_path / "out", max_drop=0.1, minutes=10, resume=True, say=told.append
    )
    assert any("going on with" in line for line in told)
    assert set(in_process[before:]) <= {"judge", "prove"}
    assert not list(tmp_path.glob(".out.journal*"))


def test_pictures_of_other_classes_are_judged_by_agreement(models, tmp_path, in_process, pictures):
    other = tmp_path / "other"
    other.mkdir()
    for place, file in enumerate(sorted(pictures.glob("*/*.png"))):
        (other / f"{place}.png").write_bytes(file.read_bytes())
    found = tune.tune_images(settings(models["residual"], other), tmp_path / "out", max_drop=0.1, minutes=10)
    assert found["quality"]["metric"] == "agreement with the model as loaded"
    assert found["quality"]["baseline"] == 1.0
    assert any("classes are not known" in note for note in found["notes"])


def test_a_failing_option_is_a_row_and_not_the_end(models, pictures, tmp_path, in_process):
    def breaks(model, calibration):
        raise RuntimeError("no such instruction")

    OPTIONS["channels_last"] = Option("channels_last", "broken", True, True, lambda model: "", breaks)
    found = tune.tune_images(settings(models["residual"], pictures), tmp_path / "out", max_drop=0.1, minutes=10)
    broken = next(row for row in found["rows"] if row["label"].endswith("channels_last"))
    assert broken["status"] == "failed"
    assert "no such instruction" in broken["error"]


def test_a_time_that_is_over_leaves_out_recipes_and_never_the_proof(models, pictures, tmp_path, in_process):
    found = tune.tune_images(settings(models["residual"], pictures), tmp_path / "out", max_drop=0.1, minutes=0.001)
    assert [row["kind"] for row in found["rows"]] == ["baseline"]
    assert {"judge", "prove"} <= set(in_process)
    assert found["best"]["label"] == "as loaded"
    assert any("no time was left to try" in note for note in found["notes"])
    assert (tmp_path / "out" / "report.html").is_file()


def test_not_finite_logits_are_never_right():
    assert scores([0, 1], [-1, 1], None) == ([1.0, 1.0], [0.0, 1.0])
    assert scores([-1], [-1], [0]) == ([0.0], [0.0])


# ------------------------------------------------------------------------------------------------------ the evidence store


def test_the_run_is_in_the_store_as_in_the_artefact(models, pictures, tmp_path, in_process, monkeypatch):
    monkeypatch.setattr("assay.tuner.artefact.remember", remember)
    found = tune.tune_images(settings(models["residual"], pictures), tmp_path / "out", max_drop=0.1, minutes=10)
    with Store() as store:
        [run] = store.runs()
    assert run == tuned.read(tmp_path / "out" / "evidence.jsonl")
    assert (run.kind, run.goal, run.architecture) == ("images", "latency", "resnet")
    assert tuned.label(run.steps) == found["best"]["label"]
    assert (run.pictures.total, run.pictures.proof) == (120, 72)
    assert run.drop == found["quality"]["lost"]
    assert [row.cost for row in run.rows] == [row["cost"] for row in found["rows"]]
    assert all(row.samples for row in run.rows if row.status == "ok")
    assert tuned.changes(run) == set()
    assert set(run.code) == {step.transform for row in run.rows for step in row.steps}
    assert run.machine["cores"] >= 1


def test_a_store_that_takes_nothing_loses_no_artefact(models, pictures, tmp_path, in_process, monkeypatch):
    monkeypatch.setattr("assay.tuner.artefact.remember", remember)
    monkeypatch.setenv("ASSAY_DATABASE_URL", f"sqlite:///{tmp_path / 'text.db'}")
    (tmp_path / "text.db").write_text("this is no database" * 100)
    found = tune.tune_images(settings(models["residual"], pictures), tmp_path / "out", max_drop=0.1, minutes=0.001)
    [note] = [note for note in found["notes"] if "evidence store" in note]
    assert f"assay evidence import {tmp_path / 'out' / 'evidence.jsonl'}" in note
    assert (tmp_path / "out" / "recipe.toml").is_file()


def test_every_option_names_the_module_that_does_its_work():
    for option in OPTIONS.values():
        assert option.module == "" or tuned.code_of({option.name: option.module})["code"][option.name]["hash"], option
    assert {name for name, option in OPTIONS.items() if not option.module} == {"channels_last", "compile"}


# ------------------------------------------------------------------------------------------------------ assay apply


def applied(*words):
    return main(["apply", *map(str, words)])


def test_a_recipe_is_replayed_on_another_classifier(models, pictures, tmp_path, capsys):
    steps = (ImageStep(option="fold_batch_norm"), ImageStep(option="int8_convolutions"))
    recipe = ImageRecipe(goal="throughput", architecture="another", steps=steps)
    recipe.save(tmp_path / "recipe.toml")
    words = (models["residual"], "--recipe", tmp_path / "recipe.toml", "-o", tmp_path / "out", "--workload", pictures)
    assert applied(*words, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["recipe"] == [
        {"option": "fold_batch_norm", "config": {}},
        {"option": "int8_convolutions", "config": {}},
    ]
    work = build(settings(models["residual"], pictures))
    expected = apply(work.loaded.model, recipe, work.calibration())
    pixels = work.pixels(work.pictures.part("proof").read())
    with torch.inference_mode():
        assert torch.equal(logits(assay.load(tmp_path / "out"), pixels), logits(expected, pixels))
    assert not (tmp_path / "out" / "report.html").exists()  # nothing was measured
    assert applied(*words) == 0  # an artefact is replaced
    assert "INT8 convolutions" in capsys.readouterr().out


def test_kinds_that_do_not_match_are_refused_both_ways(models, pictures, tmp_path, capsys):
    from tests.tiny import write_tiny_llama

    llama = write_tiny_llama(tmp_path / "llama")
    ImageRecipe(steps=(ImageStep(option="channels_last"),)).save(tmp_path / "images.toml")
    Recipe.model_validate({"steps": [{"transform": "dtype", "config": {"dtype": "bfloat16"}}]}).save(
        tmp_path / "text.toml"
    )
    (tmp_path / "broken.toml").write_text("kind = ")
    out = ("-o", tmp_path / "out")
    for words, says in {
        (models["residual"], "--recipe", tmp_path / "text.toml", *out): "is for language models, and",
        (llama, "--recipe", tmp_path / "images.toml", *out): "is for image classifiers, and MODEL must be",
        (
            tmp_path / "nothing",
            "--recipe",
            tmp_path / "images.toml",
            *out,
        ): "is for image classifiers, and MODEL must be",
        (llama, "--recipe", tmp_path / "text.toml", *out, "--workload", pictures): "--workload is for image models",
        (models["residual"], "--recipe", tmp_path / "broken.toml", *out): "broken.toml is not a recipe",
        (models["residual"], "--recipe", tmp_path / "none.toml", *out): "none.toml",
        (
            models["residual"],
            "--recipe",
            tmp_path / "images.toml",
            *out,
            "--workload",
            tmp_path / "no",
        ): "no such folder",
        (models["residual"], "--recipe", tmp_path / "images.toml", "-o", pictures): "not an artefact",
    }.items():
        assert applied(*words) == 2
        assert says in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_recipe_that_does_not_fit_or_leaves_nothing_that_runs_is_refused(models, pictures, tmp_path, monkeypatch):
    def replayed(option):
        ImageRecipe(steps=(ImageStep(option=option),)).save(tmp_path / "recipe.toml")
        return replay.apply_to(str(models["residual"]), tmp_path / "recipe.toml", tmp_path / "out", pictures)

    with pytest.raises(InputError, match="merge_tokens cannot be applied"):
        replayed("merge_tokens")
    for made, says in ((nn.Linear(3, 3), "that does not run"), (Nan(), "not finite")):
        broken = Option("channels_last", "x", True, True, lambda model: "", lambda model, calibration, made=made: made)
        monkeypatch.setitem(OPTIONS, "channels_last", broken)
        with pytest.raises(InputError, match=says):
            replayed("channels_last")
    assert not (tmp_path / "out").exists()


class Nan(nn.Module):
    def forward(self, x):
        return torch.full((len(x), 3), float("nan"))


# ------------------------------------------------------------------------------------------------------ models, recipes, files


def test_a_model_of_the_registry_goes_through_its_folder(tmp_path, pictures):
    from assay.methods.core.vision import registry
    from assay.methods.core.vision.backbone import Backbone, classifier

    class Tiny(Backbone):
        strides, channels, num_features = (1,), (4,), 4

        def __init__(self, *, num_classes, in_chans, width):
            super().__init__(num_classes=num_classes, in_chans=in_chans, input_size=SIZE)
            self.conv, self.head = nn.Conv2d(in_chans, width, 3), classifier(width, num_classes)

        def stages(self, x):
            yield 1, self.conv(x)

        def forward_features(self, x):
            return self.conv(x)

        def forward_head(self, x, pre_logits=False):
            return self.head(x.mean((2, 3)))

    registry.backbones({"tiny_of_a_test": {"width": 4}})(Tiny)
    try:
        model = registry.build("tiny_of_a_test", num_classes=3, in_chans=1).eval()
        save_backbone(model, tmp_path / "model", name="tiny_of_a_test", labels=NAMES)
        assert is_image_model(tmp_path / "model")
        loaded = load_image_model(tmp_path / "model")
        work = build(settings(tmp_path / "model", pictures))
        pixels = work.pixels(work.pictures.part("search").read()[:3])
        assert pixels.shape == (3, 1, SIZE, SIZE)
        with torch.inference_mode():
            assert torch.equal(loaded.model(pixels), model(pixels))
        (tmp_path / "model" / "assay_backbone.json").write_text('{"name": "tiny_of_a_test"}')
        with pytest.raises(InputError, match="not a model of assay"):
            load_image_model(tmp_path / "model")
    finally:
        registry._MODELS.pop("tiny_of_a_test")


def test_recipes_are_read_whole_or_refused(tmp_path):
    recipe = ImageRecipe(goal="throughput").with_step(ImageStep(option="compile")).with_step(
        ImageStep(option="merge_tokens", config={"tokens": 8})
    )  # fmt: skip
    assert recipe.label() == "merge_tokens(tokens=8) + compile"
    assert recipe.words() == "8 tokens merged after each block, torch.compile"
    recipe.save(tmp_path / "recipe.toml")
    assert ImageRecipe.read(tmp_path / "recipe.toml") == recipe
    for text, said in {
        'kind = "images"\n[[steps]]\noption = "magic"': "no option is called 'magic'",
        'kind = "images"\n[[steps]]\noption = "compile"\n[[steps]]\noption = "fold_batch_norm"': "each option once, in the order",
        'kind = "images"\n[[steps]]\noption = "merge_tokens"\n[steps.config]\ntokens = 0': "tokens must be",
        'kind = "texts"': "kind",
        "kind = ": "not a recipe for images",
    }.items():
        (tmp_path / "bad.toml").write_text(text)
        with pytest.raises(InputError, match=said):
            ImageRecipe.read(tmp_path / "bad.toml")


def test_a_step_that_does_not_fit_is_refused_before_anything_changes(models):
    loaded = load_image_model(models["residual"])
    before = {key: value.clone() for key, value in loaded.model.state_dict().items()}
    with pytest.raises(InputError, match="merge_tokens cannot be applied to this model: tokens can be merged in"):
        apply(loaded.model, ImageRecipe(steps=(ImageStep(option="merge_tokens"),)), [])
    assert all(torch.equal(before[key], value) for key, value in loaded.model.state_dict().items())


def test_damaged_calibration_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"batch000": torch.full((1, 3, 2, 2), float("nan"))}, tmp_path / "calibration.safetensors")
    with pytest.raises(InputError, match="finite"):
        artefact.read_calibration(tmp_path / "calibration.safetensors")
    save_file({"batch000": torch.ones(3)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="four dimensions"):
        artefact.read_calibration(tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="missing"):
        artefact.read_calibration(tmp_path / "none.safetensors")


def test_a_language_model_is_no_image_model_and_an_image_model_no_language_model(models, tmp_path):
    from tests.tiny import write_tiny_llama

    from assay.tuner.artefact import load_tuned

    assert is_image_model(models["residual"])
    assert not is_image_model(write_tiny_llama(tmp_path / "llama"))
    assert not is_image_model("smollm2-135m")
    with pytest.raises(InputError, match="image classifier, which generates no text"):
        load_tuned(models["residual"])
    with pytest.raises(InputError, match="not an image classifier"):
        load_image_model(tmp_path / "llama")
    with pytest.raises(InputError, match="--goal must be one of latency, throughput, memory"):
        settings(models["residual"], tmp_path, "ttft")

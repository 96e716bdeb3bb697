"""Packed weights on disk: what is read is what was written, to the last bit, and no dense weight is made on the way."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from assay.errors import InputError
from assay.tuner import packed
from assay.tuner.artefact import context_of, load_tuned, write
from assay.tuner.recipe import Recipe, Step, apply_recipe
from properties.architectures import CAUSAL, build, output
from tiny import tiny_tokenizer

W8A8 = Step(transform="fp8_vs_int8", config={"smooth": None, "rotation": 1, "head": True})
ROTATED = Step(transform="fp8_vs_int8", config={"smooth": 0.5, "rotation": 16, "head": False})
FOUR = Step(transform="weight_only", config={"bits": 4, "head_bits": 8})
EIGHT = Step(transform="weight_only", config={"bits": 8, "head_bits": None})
HALF = Step(transform="dtype", config={"dtype": "bfloat16"})
IDS = [torch.randint(3, 160, (1, 48), generator=torch.Generator().manual_seed(i)) for i in range(2)]


def stored(folder, name, *steps, prompt_tokens=512, **changes):
    """An artefact of a tiny model, and the model that the recipe makes in memory."""
    recipe = Recipe(steps=steps, prompt_tokens=prompt_tokens)
    write(folder, build(name, vocab_size=512, **changes), tiny_tokenizer(), recipe, IDS, {})
    return apply_recipe(build(name, vocab_size=512, **changes), recipe, context_of(recipe, IDS))


def same(a, b):
    mine, theirs = dict(packed._tensors(a)), dict(packed._tensors(b))
    assert set(mine) == set(theirs)
    for name, tensor in mine.items():
        assert packed._same(tensor, theirs[name]), name


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize(
    "steps", [(W8A8,), (HALF, ROTATED), (HALF, FOUR), (EIGHT,)], ids=["w8a8", "rotated", "int4", "int8"]
)
def test_what_is_read_is_what_was_written(tmp_path, name, steps):
    made = stored(tmp_path / "out", name, *steps)
    found = load_tuned(tmp_path / "out").model
    same(made, found)
    assert torch.equal(output(found, name), output(made, name))
    assert not found.training


# What others read ------------------------------------------------------------------------------------------------------------


OTHERS = ("llama", "llama-tied", "qwen2", "phi3", "mistral", "gemma3", "gemma2", "opt", "biogpt")


def others(folder):
    """The folder's model as transformers loads it through the compressed-tensors package, and its dense weights by name."""
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model(input_ids=torch.tensor([[5, 6, 7]]))  # the package makes the weights dense at the first call
    return model


def apart(found, wanted):
    """The root mean square of the difference as a share of that of the numbers: the package rounds inputs by another rule."""
    return float((found - wanted).norm() / wanted.norm())


def dense(model):
    """The weight of each packed layer that is written, by the name it has in the file."""
    found = {}
    for one in packed.held(model):
        whole = one.layer.dequantize()
        if one.norm is not None:
            whole = whole / one.layer.multiplier
        found |= {name: whole[first : first + rows] for name, first, rows in one.parts}
    return found


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("step", [W8A8, EIGHT], ids=["w8a8", "w8a16"])
def test_transformers_loads_it_without_assay(tmp_path, name, step):
    made = stored(tmp_path / "out", name, step)
    assert packed.contents_of(tmp_path / "out").why == ""
    found = others(tmp_path / "out")
    weights = dense(made)
    assert weights
    for layer, weight in weights.items():
        torch.testing.assert_close(found.get_submodule(layer).weight, weight, rtol=3e-7, atol=0)
    assert apart(output(found, name), output(made, name)) < 0.05


@pytest.mark.parametrize(
    ("step", "says"),
    [
        (ROTATED, "no rotation of a layer's inputs"),
        (ROTATED, "no smoothing of a layer's inputs"),
        (FOUR, "no minimum of a group that is not a whole number of its steps"),
    ],
)
def test_what_others_would_misread_lies_where_none_of_them_looks(tmp_path, step, says):
    from transformers import AutoModelForCausalLM

    stored(tmp_path / "out", "llama", step)
    assert says in packed.contents_of(tmp_path / "out").why
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    with pytest.raises(OSError, match="model.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "says"), [("gpt2", "Conv1D and of fused"), ("mixtral", "fused experts"), ("mamba", "draws new weights")]
)
def test_layers_that_transformers_keeps_otherwise_are_ours_alone(tmp_path, name, says):
    stored(tmp_path / "out", name, EIGHT)
    assert says in packed.contents_of(tmp_path / "out").why


def test_the_words_are_those_of_the_format(tmp_path):
    """Held against the package's own packing, and against tables made by hand where it is not installed."""
    from assay.methods.core.quantize.stored import pack_words, unpack_words

    codes = torch.arange(16, dtype=torch.uint8)[None]
    assert pack_words(codes, 4).tolist() == [[0x76543210, 0xFEDCBA98 - (1 << 32)]]
    assert pack_words(codes, 8)[0, 0].item() == 0x03020100
    for bits in (4, 8):
        drawn = torch.randint(0, 2**bits, (5, 37), dtype=torch.uint8)
        assert torch.equal(unpack_words(pack_words(drawn, bits), bits, 37), drawn)
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    for bits in (4, 8):
        drawn = torch.randint(0, 2**bits, (6, 64), dtype=torch.uint8)
        signed = (drawn.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
        assert torch.equal(helpers.pack_to_int32(signed, bits), pack_words(drawn, bits))
        turned = helpers.pack_to_int32(signed, bits, packed_dim=0)
        assert torch.equal(turned, pack_words(drawn.T.contiguous(), bits).T)


# Others' checkpoints ---------------------------------------------------------------------------------------------------------


def checkpoint(folder, *, dtype=torch.bfloat16, bits=4, group=64, asymmetric=False, name="llama"):
    """A model stored as the package of the format stores it, written here by hand, and its dense weights in float32."""
    from assay.methods.core.quantize.stored import pack_words

    model = build(name, vocab_size=512, tie_word_embeddings=False).to(dtype)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    tensors = {key: value.clone() for key, value in model.state_dict().items()}
    weights, draw = {}, torch.Generator().manual_seed(1)
    for key in [key for key in tensors if key.endswith("_proj.weight")]:
        weight = tensors.pop(key).float()
        rows, width = weight.shape
        size = width if group == -1 else group
        codes = torch.randint(0, 2**bits, (rows, width), generator=draw).to(torch.uint8)
        scale = (torch.rand(rows, width // size, generator=draw) * 0.02 + 0.001).to(dtype) / 2 ** (bits - 4)
        zero = torch.randint(0, 2**bits, scale.shape, generator=draw).to(torch.uint8)
        middle = zero if asymmetric else torch.full_like(zero, 2 ** (bits - 1))
        grouped = codes.view(rows, -1, size).float() - middle[..., None].float()
        weights[key.removesuffix(".weight")] = (grouped * scale.float()[..., None]).view(rows, width)
        tensors |= {
            f"{key}_packed": pack_words(codes, bits),
            f"{key}_scale": scale,
            f"{key}_shape": torch.tensor([rows, width]),
        }
        if asymmetric:
            tensors[f"{key}_zero_point"] = pack_words(zero.T.contiguous(), bits).T.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    strategy = {"strategy": "channel"} if group == -1 else {"strategy": "group", "group_size": group}
    scheme = {
        "num_bits": bits,
        "type": "int",
        "symmetric": not asymmetric,
        "dynamic": False,
        "actorder": None,
        **strategy,
    }
    settings = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme, "input_activations": None}},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }
    change(folder / "config.json", quantization_config=settings)
    return weights


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, "WeightOnlyLinear"),
        ({"group": 32, "bits": 8}, "WeightOnlyLinear"),
        ({"group": 16}, "GroupedLinear"),  # smaller than the kernels' groups
        ({"asymmetric": True}, "GroupedLinear"),  # zero points whose products are no float16 numbers
        ({"bits": 8, "asymmetric": True}, "GroupedLinear"),
        ({"group": -1}, "WeightOnlyLinear"),  # a scale for each output
        ({"dtype": torch.float32}, "GroupedLinear"),  # scales of float32
    ],
    ids=str,
)
def test_a_checkpoint_of_others_is_read_to_the_last_bit(tmp_path, options, kind):
    weights = checkpoint(tmp_path, **options)
    loaded = load_tuned(tmp_path)
    for name, weight in weights.items():
        layer = loaded.model.get_submodule(name)
        assert type(layer).__name__ == kind
        assert torch.equal(layer.dequantize(), weight), name
    dtype = options.get("dtype", torch.bfloat16)
    plain = build("llama", vocab_size=512, tie_word_embeddings=False).to(dtype)
    for name, weight in weights.items():
        plain.get_submodule(name).weight.data = weight.to(dtype)
    assert apart(output(loaded.model, "llama"), output(plain, "llama")) < 0.05
    write(
        tmp_path / "again", loaded.model, loaded.tokenizer, Recipe(), [], {}
    )  # as `assay tune` stores what it was given
    same(load_tuned(tmp_path).model, load_tuned(tmp_path / "again").model)


@pytest.mark.parametrize("asymmetric", [False, True])
def test_the_package_and_assay_read_the_same_numbers(tmp_path, asymmetric):
    """Layer by layer: the package's way through transformers does not load zero points (0.20 packs none for a model without memory)."""
    compressors = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base")
    schemes = pytest.importorskip("compressed_tensors.quantization")
    weights = checkpoint(tmp_path, asymmetric=asymmetric, dtype=torch.float32)
    groups = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["config_groups"]
    scheme = schemes.QuantizationScheme.model_validate(groups["group_0"])
    tensors = load_file(tmp_path / "model.safetensors")
    for name, weight in weights.items():
        own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        assert torch.equal(compressors.PackedQuantizationCompressor.decompress(own, scheme)["weight"], weight)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"format": "float-quantized"},
            "format 'float-quantized' is not read here; read are int-quantized and pack-quantized",
        ),
        ({"quantization_status": "initialized"}, "quantization_status 'initialized' is not read here"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme is not read here"),
        ({"transform_config": {"config_groups": {"a": {}}}}, "transform_config is not read here"),
        ({"config_groups": {}}, "config_groups must be a table of groups"),
        ({"config_groups": {"a": {"weights": 3}}}, "config_groups.a must be a table with weights"),
        ({"weights": {"actorder": "group"}}, "actorder 'group' is not read here"),
        ({"weights": {"type": "float"}}, "weights of type 'float' is not read here"),
        ({"weights": {"num_bits": 3}}, "they must be of 4 or 8 bits"),
        ({"weights": {"num_bits": 8}}, "codes of 8 bits in int32"),
        ({"group": {"input_activations": {"num_bits": 8}}}, "with input_activations is not read here"),
        ({"group": {"output_activations": {"num_bits": 8}}}, "output_activations is not read here"),
        ({"group": {"format": "int-quantized"}}, "they must be symmetric, of 8 bits, by channel"),
    ],
)
def test_what_a_checkpoint_says_is_checked(tmp_path, settings, says):
    checkpoint(tmp_path)
    found = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    group = found["config_groups"]["group_0"]
    group["weights"] |= settings.pop("weights", {})
    group |= settings.pop("group", {})
    change(tmp_path / "config.json", quantization_config=found | settings)
    with pytest.raises(InputError, match=says) as error:
        load_tuned(tmp_path)
    assert "\n" not in str(error.value)


# Untrusted files, and disks ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    stored(folder / "wide", "llama", ROTATED)
    stored(folder / "four", "qwen2", FOUR)
    return folder


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("which", "name", "value", "says"),
    [
        ("wide", f"{Q}.weight", None, f"lacks the tensor {Q}.weight, which must be I8 of shape .128, 128."),
        (
            "wide",
            f"{Q}.weight",
            torch.zeros(128, 64, dtype=torch.int8),
            f"tensor {Q}.weight must be I8 of shape .128, 128., got I8",
        ),
        ("wide", f"{Q}.weight", torch.zeros(128, 128), "must be I8 of shape .128, 128., got F32 of shape"),
        ("wide", f"{Q}.weight_scale", torch.full((128, 1), float("nan")), f"tensor {Q}.weight_scale must be finite"),
        (
            "wide",
            f"{Q}.weight_scale",
            torch.ones(3, 1),
            "must be F32 or F16 or BF16 of shape .128, 1., got F32 of shape .3, 1.",
        ),
        (
            "wide",
            "model.norm.weight",
            torch.ones(3),
            "tensor model.norm.weight must be .* of shape .128,., got F32 of shape .3,.",
        ),
        ("wide", "model.norm.weight", None, "lacks the tensor model.norm.weight, which must be of shape .128,."),
        (
            "wide",
            "model.layers.0.self_attn.q_proj.weight_g_idx",
            torch.zeros(4),
            "weight_g_idx has no place in a LlamaForCausalLM",
        ),
        ("wide", "model.layers.1.mlp.down_proj.input_multiplier", torch.full((192,), float("inf")), "must be finite"),
        (
            "four",
            f"{Q}.weight_packed",
            torch.zeros(128, 3, dtype=torch.int32),
            "must hold 128 x 128 codes of 4 or 8 bits",
        ),
        ("four", f"{Q}.weight_packed", torch.zeros(128, 16), "must be I32 of shape .128, 16., got F32"),
        ("four", f"{Q}.weight_shape", torch.tensor([128, 64]), "weight_shape must be .128, 128."),
        ("four", f"{Q}.weight_shape", None, "lacks the tensor .*weight_shape"),
        (
            "four",
            f"{Q}.weight_minimum",
            torch.full((128, 4), float("nan"), dtype=torch.float16),
            "weight_minimum must be finite",
        ),
        ("four", f"{Q}.weight_scale", torch.ones(128, 7, dtype=torch.float16), "groups that divide 128 inputs"),
        ("four", f"{Q}.bias", torch.ones(3), f"tensor {Q}.bias must be .* of shape .128,."),
    ],
)
def test_a_damaged_file_is_one_line_that_names_the_tensor(saved, tmp_path, which, name, value, says):
    folder = tmp_path / "copy"
    shutil.copytree(saved / which, folder)
    tensors = load_file(folder / packed.OWN)
    tensors = {key: tensor for key, tensor in tensors.items() if key != name} | ({} if value is None else {name: value})
    save_file(tensors, folder / packed.OWN)
    with pytest.raises(InputError, match=says) as error:
        load_tuned(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"format": 2}, "must have the format 1 of this assay"),
        ({"extra": 2}, "must have the format 1 of this assay"),
        ({"steps": 5}, "the weights hold 5 steps of a recipe that has 1"),
        ({"steps": -1}, "steps must be"),
        ({"opened": 1}, "opened must be"),
        ({"why": 7}, "why must be text"),
        ({"fused": ["model.layers.7"]}, "fused names 'model.layers.7', which is no block of W8A8 layers"),
        ({"fused": [7]}, "fused must be a list of names"),
        ({"rotation": {Q: 3}}, "rotation must be a power of two"),
        ({"rotation": {Q: 256}}, "rotation of .* must divide its 128 inputs"),
        ({"rotation": {"lm_head": 16}}, "rotation names 'lm_head', which is no packed layer"),
    ],
)
def test_a_damaged_description_is_one_line(saved, tmp_path, values, says):
    folder = tmp_path / "copy"
    shutil.copytree(saved / "wide", folder)
    change(folder / packed.PACKED, **values)
    with pytest.raises(InputError, match=says):
        load_tuned(folder)


def test_weights_that_are_not_there_and_a_truncated_file(saved, tmp_path):
    shutil.copytree(saved / "wide", tmp_path / "copy")
    file = tmp_path / "copy" / packed.OWN
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    with pytest.raises(InputError, match="truncated"):
        load_tuned(tmp_path / "copy")
    file.unlink()
    with pytest.raises(InputError, match="no weights; expected packed.safetensors"):
        load_tuned(tmp_path / "copy")


def test_an_adapter_is_not_merged_into_packed_weights(saved):
    with pytest.raises(InputError, match="its weights are packed, and no adapter can be merged into them"):
        load_tuned(saved / "wide", before_recipe=lambda model: None)


@pytest.mark.parametrize("place", ["safetensors.torch.save_file", "pathlib.Path.write_text"])
def test_a_full_disk_leaves_the_former_artefact(saved, tmp_path, monkeypatch, place):
    shutil.copytree(saved / "wide", tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(place, full)
    with pytest.raises(OSError, match="No space left"):
        stored(tmp_path / "out", "llama", W8A8)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_reads_otherwise_than_it_was_is_not_kept(tmp_path, monkeypatch):
    from assay.errors import AssayError

    honest = packed.pack_words
    monkeypatch.setattr(packed, "pack_words", lambda codes, bits: honest(codes ^ 1, bits))
    with pytest.raises(AssayError, match=r"reads otherwise than it was"):
        stored(tmp_path / "out", "llama", FOUR)
    assert list(tmp_path.iterdir()) == []


# Memory ----------------------------------------------------------------------------------------------------------------------


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Remembers the most bytes of any tensor that an operation made."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        made = function(*arguments, **(options or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return made


@pytest.mark.parametrize("step", [ROTATED, FOUR], ids=["w8a8", "int4"])
def test_no_dense_weight_of_a_packed_layer_is_made(tmp_path, step):
    """Neither while loading nor for the first token is there a tensor as large as one of the layers in 16 bits."""
    wide = {"hidden_size": 256, "intermediate_size": 8192, "num_hidden_layers": 1}
    stored(tmp_path, "llama", HALF, step, **wide)
    with Largest() as seen, torch.inference_mode():
        load_tuned(tmp_path).model(input_ids=torch.tensor([[5, 6, 7]]))
    assert 0 < seen.bytes <= 1.1 * (2 if step is ROTATED else 1) * 8192 * 256 < 2 * 2 * 8192 * 256


@pytest.mark.slow
def test_the_peak_until_the_first_token_is_the_packed_size_and_a_fifth(tmp_path):
    from assay.tuner import footprint

    wide = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    for number, step in enumerate((ROTATED, EIGHT)):
        folder = tmp_path / str(number)
        write(folder, build("llama", vocab_size=8192, **wide), tiny_tokenizer(), Recipe(steps=(HALF, step)), IDS, {})
        found = footprint.measure(folder)
        assert found["weights_bytes"] > 60 << 20
        assert found["peak_bytes"] < 1.2 * found["weights_bytes"]


# With a recipe -----------------------------------------------------------------------------------------------------------------


def test_later_steps_are_replayed_on_what_the_weights_hold(tmp_path):
    later = Step(transform="xattention", config={"tau": 0.9})
    made = stored(tmp_path / "out", "llama", HALF, ROTATED, later, prompt_tokens=2048)
    assert packed.contents_of(tmp_path / "out").steps == 2
    found = load_tuned(tmp_path / "out").model
    same(made, found)
    assert found.config._attn_implementation == made.config._attn_implementation != "sdpa"
    assert torch.equal(output(found, "llama"), output(made, "llama"))


def test_a_recipe_that_changes_the_structure_first_is_replayed_as_a_whole(tmp_path):
    made = stored(tmp_path / "out", "llama", Step(transform="greenformers", config={"rank": 32}), EIGHT)
    assert not packed.is_packed(tmp_path / "out")
    same(made, load_tuned(tmp_path / "out").model)


def test_what_was_proven_is_what_is_saved(tmp_path):
    import dataclasses

    from assay.tuner import child
    from assay.tuner.work import Settings, build_work, load_for

    build("llama", vocab_size=512).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    settings = Settings(str(tmp_path / "model"), "ttft", 64, 4)
    recipe = Recipe(goal="ttft", prompt_tokens=64, new_tokens=4, steps=(HALF, ROTATED))
    recipes = {"baseline": Recipe().model_dump(mode="json"), "best": recipe.model_dump(mode="json")}
    proven = child.prove(dataclasses.asdict(settings), recipes, 1, 0.1)["weights"]
    assert set(proven) == {"best"}  # the baseline has no packed weights
    loaded = load_for(settings)
    write(tmp_path / "out", loaded.model, loaded.tokenizer, recipe, build_work(loaded, settings).calibration, {})
    assert packed.digest(load_tuned(tmp_path / "out").model) == proven["best"]
    tensors = load_file(tmp_path / "out" / packed.OWN)
    tensors[f"{Q}.weight"][0, 0] ^= 1
    save_file(tensors, tmp_path / "out" / packed.OWN)
    assert packed.digest(load_tuned(tmp_path / "out").model) != proven["best"]


def test_a_packed_folder_is_tuned_like_any_model(tmp_path):
    from assay.tuner.artefact import apply_to
    from assay.tuner.work import Settings, load_for

    checkpoint(tmp_path / "theirs")
    loaded = load_for(Settings(str(tmp_path / "theirs"), "ttft", 64, 4))
    assert packed.has_packed_layers(loaded.model)
    Recipe(steps=(Step(transform="sorted_batches"),)).save(tmp_path / "recipe.toml")
    apply_to(str(tmp_path / "theirs"), tmp_path / "recipe.toml", tmp_path / "out")
    assert packed.contents_of(tmp_path / "out").steps == 0
    found = load_tuned(tmp_path / "out").model
    assert torch.equal(output(found, "llama"), output(loaded.model, "llama"))
    assert found.assay_settings


def test_it_generates_and_is_not_saved_by_transformers(saved):
    loaded = load_tuned(saved / "wide")
    ids = torch.tensor([[5, 6, 7]])
    made = loaded.model.generate(
        input_ids=ids, attention_mask=ids * 0 + 1, max_new_tokens=3, min_new_tokens=3, do_sample=False
    )
    assert made.shape == (1, 6)
    assert loaded.stored_dtype == torch.float32
    with pytest.raises(ValueError, match="must not be saved with packed layers"):
        loaded.model.save_pretrained(saved / "again")

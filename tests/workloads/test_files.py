from __future__ import annotations

import json
import shutil
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from assay.errors import InputError
from assay.workloads.files import check_config, check_folder, check_gguf, check_safetensors, safetensors_shapes


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write(path, header, data=b"", length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


# safetensors -----------------------------------------------------------------------------------------------------------


def test_a_real_file_passes_and_gives_its_shapes(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {
        "a": torch.zeros(3, 4),
        "b": torch.zeros(5, dtype=torch.bfloat16),
        "c": torch.zeros(()),
        "d": torch.zeros(0, 7),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    assert safetensors_shapes(path) == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    stored = check_safetensors(path)
    assert (stored.tensors, stored.elements, stored.bytes) == (4, 12 + 5 + 1, path.stat().st_size)
    assert stored.types == {"F32": 13, "BF16": 5}


@pytest.mark.parametrize(
    ("header", "data", "length", "wrong"),
    [
        (b"", b"", 1 << 40, "absurd"),
        (b"{}", b"", 5000, "truncated"),
        (b"{} not json", b"", None, "not valid JSON"),
        (b"[]", b"", None, "must be a JSON object"),
        (b"\xff\xfe{}", b"", None, "not valid JSON"),
        (b"[" * 100_000, b"", None, "not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", b"", None, "not valid JSON"),
        (b"{}", b"", None, "no tensors"),
        (b'{"a": {}, "a": {}}', b"", None, "given twice"),
        ({"a": 3}, b"", None, "must have exactly"),
        ({"a": {**entry([1], 0, 4), "more": 1}}, b"0" * 4, None, "must have exactly"),
        ({"__metadata__": {"a": 1}}, b"", None, "__metadata__"),
        ({"a": entry([1], 0, 4, "F31")}, b"0" * 4, None, "unknown dtype"),
        ({"a": entry([1], 0, 4, ["F32"])}, b"0" * 4, None, "unknown dtype"),
        ({"a": entry([-1], 0, 4)}, b"0" * 4, None, "shape"),
        ({"a": entry([True], 0, 4)}, b"0" * 4, None, "shape"),
        ({"a": entry([1.0], 0, 4)}, b"0" * 4, None, "shape"),
        ({"a": entry([1] * 100, 0, 4)}, b"0" * 4, None, "shape"),
        ({"a": entry([1 << 62, 1 << 62], 0, 4)}, b"0" * 4, None, "needs"),
        ({"a": entry([2], 0, 4)}, b"0" * 4, None, "needs 8 bytes"),
        ({"a": entry([1], 4, 0)}, b"0" * 4, None, "needs 4 bytes"),
        ({"a": entry([1], "0", 4)}, b"0" * 4, None, "data_offsets"),
        ({"a": entry([1], 0, 4), "b": entry([1], 4, 8)}, b"0" * 6, None, "ends at byte 8"),
        ({"a": entry([2], 0, 8), "b": entry([1], 4, 8)}, b"0" * 8, None, "overlaps"),
        ({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, b"0" * 12, None, "belong to no tensor"),
        ({"a": entry([1], 0, 4)}, b"0" * 9, None, "5 bytes after the last tensor"),
    ],
)
def test_a_wrong_header_is_named(tmp_path, header, data, length, wrong):
    path = write(tmp_path / "bad.safetensors", header, data, length)
    with pytest.raises(InputError, match=wrong) as caught:
        check_safetensors(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("size", [0, 7])
def test_a_file_too_short_for_a_header(tmp_path, size):
    (tmp_path / "a.safetensors").write_bytes(b"\0" * size)
    with pytest.raises(InputError, match="too few"):
        check_safetensors(tmp_path / "a.safetensors")


# folders ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tiny_model_folder, tmp_path):
    return shutil.copytree(tiny_model_folder, tmp_path / "model")


def change(path, **settings):
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def test_a_whole_folder_passes(tiny_model_folder):
    assert check_folder(tiny_model_folder).tensors == 2 + 2 * 9


def test_a_folder_without_config_or_weights(tmp_path):
    with pytest.raises(InputError, match="no config.json"):
        check_folder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="no weights"):
        check_folder(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_refused(folder, name):
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(InputError, match="only pickled weights.*convert them to safetensors"):
        check_folder(folder)


@pytest.mark.parametrize(
    "settings",
    [
        {"auto_map": {"AutoModelForCausalLM": "modeling.Mine"}},
        {"text_config": {"deep": [{"auto_map": {"AutoConfig": "other/repo--configuration.Mine"}}]}},
        {"trust_remote_code": True},
        {"_attn_implementation": "somebody/kernel"},
        {"attn_implementation": "somebody/kernel:function"},
        {"transformers_weights": "other.safetensors"},
    ],
)
def test_remote_code_is_refused(folder, settings):
    change(folder / "config.json", **settings)
    with pytest.raises(InputError, match="config.json"):
        check_folder(folder)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
def test_remote_code_is_refused_in_the_other_settings_too(folder, name):
    change(folder / name, auto_map={"AutoTokenizer": ["tokenization.Mine", None]})
    with pytest.raises(InputError, match=name):
        check_config(folder)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00", '"a"', "[" * 200_000])
def test_a_config_that_is_no_json_object(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(InputError, match="config.json"):
        check_folder(folder)


def test_an_adapter_is_refused(folder):
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="merge it"):
        check_folder(folder)


def test_weights_under_an_unknown_name(folder):
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    with pytest.raises(InputError, match=r"weights.safetensors but neither model.safetensors"):
        check_folder(folder)


def shard(folder, name="model-00001-of-00001.safetensors", in_index=None):
    (folder / "model.safetensors").rename(folder / name)
    names = safetensors_shapes(folder / name)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, in_index or name)})
    )


def test_an_index_passes(folder):
    shard(folder)
    assert check_folder(folder).tensors == 20


@pytest.mark.parametrize(
    "named", ["../secret.safetensors", "/etc/passwd", "sub/a.safetensors", "..", "a\\b.safetensors", "a\0.safetensors"]
)
def test_an_index_that_points_outside(folder, named):
    shard(folder, in_index=named)
    with pytest.raises(InputError, match="points outside the folder"):
        check_folder(folder)


@pytest.mark.parametrize(
    ("weight_map", "wrong"),
    [
        (None, "non-empty object"),
        ({}, "non-empty object"),
        ([1], "non-empty object"),
        ({"a": 1}, "must be a string"),
        ({"a": "pytorch_model.bin"}, "not a .safetensors"),
        ({"a": "gone.safetensors"}, "missing"),
        ({"a": "model-00001-of-00001.safetensors"}, "'a' is not in"),
    ],
)
def test_a_wrong_index(folder, weight_map, wrong):
    shard(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InputError, match=wrong):
        check_folder(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_link_out_of_the_folder_is_refused(folder, tmp_path, name):
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(InputError, match="link that points outside"):
        check_folder(folder)


def test_links_inside_the_hub_cache_are_fine(folder, tmp_path):
    repository = tmp_path / "models--org--name"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        file.rename(blobs / file.name)
        (snapshot / file.name).symlink_to(blobs / file.name)
    assert check_folder(snapshot).tensors == 20
    (snapshot / "config.json").unlink()
    (tmp_path / "elsewhere.json").write_text("{}")
    (snapshot / "config.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(InputError, match="link that points outside"):
        check_folder(snapshot)


# GGUF ------------------------------------------------------------------------------------------------------------------


def gguf_bytes(*, magic=b"GGUF", version=3, tensors=None, metadata=None, counts=None, data=64):
    """A GGUF file by hand; `tensors`: (name, shape, type, offset), `metadata`: raw bytes of entries."""
    tensors = [("a", [8], 0, 0)] if tensors is None else tensors
    metadata = [text_entry("general.architecture", "llama")] if metadata is None else metadata
    raw = magic + struct.pack("<I", version) + struct.pack("<QQ", *(counts or (len(tensors), len(metadata))))
    raw += b"".join(metadata)
    for name, shape, kind, offset in tensors:
        raw += text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
        raw += struct.pack("<IQ", kind, offset)
    return raw + b"\0" * (-len(raw) % 32) + b"\0" * data


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def text_entry(key, value):
    return text(key) + struct.pack("<I", 8) + text(value)


ARCHITECTURE = text_entry("general.architecture", "llama")
HUGE = (1 << 63) - 1


def test_a_gguf_passes(tmp_path, tiny_gguf):
    (tmp_path / "a.gguf").write_bytes(gguf_bytes())
    header = check_gguf(tmp_path / "a.gguf")
    assert header.metadata == {"general.architecture": "llama"}
    assert (header.stored.tensors, header.stored.elements) == (1, 8)
    assert header.tensors["a"].end - header.tensors["a"].begin == 32
    real = check_gguf(tiny_gguf)
    assert real.stored.tensors == 20
    assert real.tensors["blk.0.ffn_up.weight"].shape == (128, 64)
    assert real.metadata["llama.block_count"] == 2
    assert real.metadata["tokenizer.ggml.pre"] == "smollm"


@pytest.mark.parametrize(
    ("raw", "wrong"),
    [
        (b"GGUF", "too few"),
        (b"", "too few"),
        (gguf_bytes(magic=b"GGML"), "not a GGUF file"),
        (gguf_bytes(version=1), "version 1"),
        (gguf_bytes(version=3 << 24), "version"),
        (gguf_bytes(counts=(HUGE, 1)), "do not fit"),
        (gguf_bytes(counts=(1, HUGE)), "do not fit"),
        (gguf_bytes(metadata=[]), "general.architecture"),
        (gguf_bytes(metadata=[ARCHITECTURE, ARCHITECTURE]), "given twice"),
        (gguf_bytes(metadata=[struct.pack("<Q", HUGE) + b"a" * 20]), "string of"),
        (gguf_bytes(metadata=[text(b"\xff\xff") + struct.pack("<IB", 0, 1)]), "UTF-8"),
        (gguf_bytes(metadata=[text("a") + struct.pack("<I", 99)]), "type 99"),
        (gguf_bytes(metadata=[text("a") + struct.pack("<IIQ", 9, 4, HUGE)]), "array of"),
        (gguf_bytes(metadata=[text("a") + struct.pack("<IIQ", 9, 8, HUGE)]), "array of"),
        (gguf_bytes(metadata=[text("a") + struct.pack("<IIQQ", 9, 8, 2, HUGE)]), "truncated|does not fit"),
        (gguf_bytes(metadata=[text("a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 9]), "too deeply"),
        (gguf_bytes(metadata=[ARCHITECTURE, text("general.alignment") + struct.pack("<II", 4, 0)]), "alignment"),
        (gguf_bytes(metadata=[ARCHITECTURE, text("general.alignment") + struct.pack("<II", 4, 48)]), "alignment"),
        (gguf_bytes(metadata=[ARCHITECTURE, text_entry("general.alignment", "32")]), "alignment"),
        (gguf_bytes(metadata=[ARCHITECTURE, text("llama.block_count") + struct.pack("<IQ", 10, HUGE)]), "absurd"),
        (gguf_bytes(tensors=[]), "no tensors"),
        (gguf_bytes(tensors=[("a", [8], 0, 0), ("a", [8], 0, 32)]), "given twice"),
        (gguf_bytes(tensors=[("a", [8], 999, 0)]), "unknown type"),
        (gguf_bytes(tensors=[("a", [8], 2, 0)]), "blocks of 32"),
        (gguf_bytes(tensors=[("a", [0], 0, 0)]), "shape"),
        (gguf_bytes(tensors=[("a", [], 0, 0)]), "dimensions"),
        (gguf_bytes(tensors=[("a", [1] * 5, 0, 0)]), "dimensions"),
        (gguf_bytes(tensors=[("a", [8], 0, 5)]), "multiple of 32"),
        (gguf_bytes(tensors=[("a", [HUGE, HUGE], 0, 0)]), "ends at byte"),
        (gguf_bytes(tensors=[("a", [8], 0, 1 << 40)]), "ends at byte"),
        (gguf_bytes(tensors=[("a", [17], 0, 0)]), "ends at byte 68"),
        (gguf_bytes(tensors=[("a", [16], 0, 0), ("b", [8], 0, 32)]), "overlaps"),
        (gguf_bytes(data=0)[:-20], "truncated"),
    ],
)
def test_a_wrong_gguf_is_named(tmp_path, raw, wrong):
    path = tmp_path / "bad.gguf"
    path.write_bytes(raw)
    with pytest.raises(InputError, match=wrong) as caught:
        check_gguf(path)
    assert str(path) in str(caught.value)


# fuzzing ---------------------------------------------------------------------------------------------------------------

damage = st.one_of(
    st.tuples(st.just("cut"), st.floats(0, 1)),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6),
)
fuzz = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def refusal(check, path):
    """What `check` says against `path`, None if nothing; any other error than InputError fails the test."""
    try:
        check(path)
    except InputError as error:
        return str(error)
    return None


def damaged(raw: bytes, how, upto: int) -> bytes:
    """`raw` cut short, or with some of its first `upto` bytes changed."""
    if how[0] == "cut":
        return raw[: int(how[1] * len(raw))]
    result = bytearray(raw)
    for place, value in how:
        result[min(int(place * upto), upto - 1)] = value
    return bytes(result)


@fuzz
@given(how=damage)
def test_damaged_safetensors_pass_or_are_refused(tmp_path, how):
    tensors = {"a": torch.zeros(3, 4), "b": torch.zeros(5, dtype=torch.int8), "c": torch.zeros(2, 2, 2)}
    path = tmp_path / "a.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    raw = path.read_bytes()
    path.write_bytes(damaged(raw, how, 8 + struct.unpack("<Q", raw[:8])[0]))
    said = refusal(check_safetensors, path)
    assert said is None or str(path) in said
    if said is None:  # what passes, the library reads
        load_file(path)


@fuzz
@given(how=damage)
def test_damaged_gguf_passes_or_is_refused(tmp_path, how):
    listed = text("list") + struct.pack("<IIQ", 9, 8, 2) + text("one") + text("two")
    numbers = text("numbers") + struct.pack("<IIQ3H", 9, 2, 3, 1, 2, 3)
    flag = text("flag") + struct.pack("<IB", 7, 1)
    tensors = [("a", [8, 2], 0, 0), ("b", [32], 2, 64)]
    raw = gguf_bytes(metadata=[ARCHITECTURE, listed, numbers, flag], tensors=tensors, data=96)
    path = tmp_path / "a.gguf"
    path.write_bytes(damaged(raw, how, len(raw) - 96))
    said = refusal(check_gguf, path)
    assert said is None or str(path) in said

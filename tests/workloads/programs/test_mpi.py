"""The bank of MPI programs, and those that the user fetches."""

import base64
import hashlib
import json

import pytest
from tests.tools import needs, needs_sandbox

from assay.errors import InputError, MissingError
from assay.methods.code.mpirigen import run
from assay.workloads.programs import mpi
from assay.workloads.programs.mpi.arrow import text_columns

STREAM = base64.b64decode(
    "/////5gAAAAQAAAAAAAKAAwABgAFAAgACgAAAAABBAAMAAAACAAIAAAABAAIAAAABAAAAAIAAAA8AAAABAAAANz///8AAAEFEAAA"
    "ABQAAAAEAAAAAAAAAAEAAABiAAAAzP///xAAFAAIAAYABwAMAAAAEAAQAAAAAAABBRAAAAAYAAAABAAAAAAAAAABAAAAYQAAAAQA"
    "BAAEAAAAAAAAAP/////YAAAAFAAAAAAAAAAMABYABgAFAAgADAAMAAAAAAMEABgAAABAAAAAAAAAAAAACgAYAAwABAAIAAoAAAB8"
    "AAAAEAAAAAIAAAAAAAAAAAAAAAYAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAMAAAAAAAAABAAAAAAAAAABAAAAAAAAAAYAAAA"
    "AAAAAAAAAAAAAAAAGAAAAAAAAAAMAAAAAAAAACgAAAAAAAAAFQAAAAAAAAAAAAAAAgAAAAIAAAAAAAAAAAAAAAAAAAACAAAAAAAA"
    "AAAAAAAAAAAAAAAAAAQAAAAEAAAAAAAAAGVpbnMAAAAAAAAAABEAAAAVAAAAAAAAAGdyw7bDn2UKMTogaW50IHg7endlaQAAAP//"
    "///YAAAAFAAAAAAAAAAMABYABgAFAAgADAAMAAAAAAMEABgAAAAwAAAAAAAAAAAACgAYAAwABAAIAAoAAAB8AAAAEAAAAAEAAAAA"
    "AAAAAAAAAAYAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAIAAAAAAAAAAgAAAAAAAAABAAAAAAAAAAQAAAAAAAAAAAAAAAAAAAA"
    "EAAAAAAAAAAIAAAAAAAAABgAAAAAAAAAFgAAAAAAAAAAAAAAAgAAAAEAAAAAAAAAAAAAAAAAAAABAAAAAAAAAAAAAAAAAAAAAAAA"
    "AAQAAABkcmVpAAAAAAAAAAAWAAAAKDIgMSwgTVBJX0luaXQoMCwgMCk7KQAA/////wAAAAA="
)  # written by pyarrow: two batches of two columns


def test_columns_of_text_are_read_as_they_were_written():
    assert text_columns(STREAM) == [["eins", "", "drei"], ["größe\n1: int x;", "zwei", "(2 1, MPI_Init(0, 0);)"]]


def test_what_is_no_stream_is_refused():
    with pytest.raises(ValueError, match="data must be a stream"):
        text_columns(b"ARROW1\0\0" + STREAM)
    with pytest.raises(ValueError, match="data must hold record batches"):
        text_columns(b"")


def test_the_list_of_debians_programs_names_where_they_are_from():
    packages = mpi.listed()
    assert all({"package", "version", "licence", "files"} == set(each) for each in packages)
    hashes = [digest for each in packages for digest in each["files"].values()]
    assert len(hashes) == len(set(hashes)) > 100
    assert all(len(digest) == 64 and path.endswith(".c") for each in packages for path, digest in each["files"].items())


@pytest.fixture
def fetched(tmp_path, monkeypatch):
    """A list of two files, and a folder with them somewhere below."""
    texts = {f"examples/{n}.c": f"int main(void) {{ return {n}; }}\n" for n in range(2)}
    files = {path: hashlib.sha256(text.encode()).hexdigest() for path, text in texts.items()}
    monkeypatch.setattr(mpi, "listed", lambda: [{"package": "toy", "version": "1-1", "licence": "own", "files": files}])
    monkeypatch.setenv(mpi.VARIABLE, str(tmp_path))
    for path, text in texts.items():
        (tmp_path / "toy-1" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "toy-1" / path).write_text(text)
    return tmp_path, texts


def test_fetched_programs_are_found_by_name_and_hash(fetched):
    folder, texts = fetched
    assert mpi.debian() == {f"toy/{path}": text for path, text in texts.items()}
    (folder / "toy-1/examples/1.c").write_text("int main(void) { return 7; }\n")
    with pytest.raises(MissingError, match=r"of 2 programs .* 1 are there; fetch them: .*apt-get source toy=1-1"):
        mpi.debian()


def test_a_folder_that_is_not_there_is_told(fetched, monkeypatch):
    folder, _ = fetched
    monkeypatch.setenv(mpi.VARIABLE, str(folder / "nowhere"))
    with pytest.raises(MissingError, match="0 are there"):
        mpi.debian()
    with pytest.raises(MissingError, match="authors' repository is not below"):
        mpi.released()
    monkeypatch.setenv(mpi.VARIABLE, str(folder / "toy-1/examples/1.c"))
    with pytest.raises(InputError, match="must name a folder"):
        mpi.debian()


def test_answers_belong_to_their_programs(tmp_path, monkeypatch):
    label = "(2 1, MPI_Init(0, 0);)"
    monkeypatch.setattr(mpi, "text_columns", lambda data: [["one", "two"], ["1: x;", "1: y;"], [label, label]])
    table, answers = (tmp_path / name for name in mpi.RELEASED)
    rows = [{"label": f" {label}  <|endoftext|>", "pred": "<|endoftext|>2 1, MPI_Init(0, 0);)"}]
    for path, text in ((table, "table"), (answers, json.dumps(rows[0]))):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(
        mpi, "RELEASED", {name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in mpi.RELEASED}
    )
    first, second = mpi.released(tmp_path)
    assert (first.name, first.answer, second.answer) == ("one", "(2 1, MPI_Init(0, 0);)", "")
    monkeypatch.setattr(mpi, "text_columns", lambda data: [["one"], ["1: x;"], ["(3 1, MPI_Finalize();)"]])
    with pytest.raises(InputError, match="answer 0 is to another program than one"):
        mpi.released(tmp_path)


@pytest.mark.slow
def test_the_banks_programs_print_the_same_on_every_run():
    needs_sandbox()
    needs("mpicc")
    for name, text in mpi.own().items():
        runs = run(text, (1, 2, 2, 4))
        assert [one.how for one in runs] == ["ran"] * 4, (name, runs)
        assert runs[1].same(runs[2]), name
        assert all(one.printed for one in runs), name

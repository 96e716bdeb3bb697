"""Passages of one function each: equally long, true, and of different documents for fitting and for judging."""

from __future__ import annotations

import operator
import struct

import pytest

from assay.errors import MissingError
from assay.workloads import functions


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def __call__(self, text, **_):
        return {"input_ids": list(text.encode())}


@pytest.mark.parametrize("function", ["python", "c++", "english", "arithmetic"])
def test_passages_are_equally_long_and_share_no_document(function):
    fit, held = (functions.passages(Bytes(), function, 30, 64, half) for half in ("fit", "held out"))
    assert len(fit) == len(held) == 30
    assert all(passage.ids.shape == (1, 64) for passage in fit + held)
    assert not {passage.document for passage in fit} & {passage.document for passage in held}
    assert len({tuple(passage.ids[0].tolist()) for passage in fit}) == 30


def worth(text):
    """The value of a sum or product of two, or of "(a + b) * c"."""
    if text.startswith("("):
        inner, last = text[1:].split(") * ")
        return worth(inner) * int(last)
    a, sign, b = text.split()
    return {"+": operator.add, "*": operator.mul, "/": operator.truediv}[sign](int(a), int(b))


def test_sums_are_right():
    for line in functions.documents("arithmetic")[0].splitlines():
        left, right = line.split(" = ")
        assert worth(left) == int(right)


def catalogue(pairs):
    """A compiled catalogue of messages."""
    strings = [*[key for key, _ in pairs], *[value for _, value in pairs]]
    begin, entries, body = 28 + 8 * len(strings), b"", b""
    for text in strings:
        entries += struct.pack("<2I", len(text), begin + len(body))
        body += text + b"\0"
    return struct.pack("<7I", functions.MAGIC, 0, len(pairs), 28, 28 + 8 * len(pairs), 0, 0) + entries + body


def test_translations_are_read_from_a_catalogue():
    data = catalogue(
        [
            (b"", b"Content-Type: text/plain"),
            (b"file", "die gr\u00f6\u00dfte Datei".encode()),
            (b"one\0many", b"eine Datei\0viele Dateien"),
            (b"odd", b"\xff\xfe"),
        ]
    )
    assert list(functions.translations(data)) == ["die gr\u00f6\u00dfte Datei", "eine Datei"]
    assert list(functions.translations(b"no catalogue at all, but long")) == []
    assert list(functions.translations(data[:40])) == []


def test_missing_translations_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(functions, "LOCALES", tmp_path)
    with pytest.raises(MissingError, match="translated catalogues"):
        list(functions._messages())


def test_other_languages_are_read_where_they_are_installed(monkeypatch, tmp_path):
    for language in functions.LANGUAGES:
        folder = tmp_path / language / "LC_MESSAGES"
        folder.mkdir(parents=True)
        for number in range(6):
            pairs = [(b"", b"header")]
            for place in range(90):
                words = f"eine Meldung der Sprache {language} mit der Nummer {number} und {place}"
                pairs.append((b"%03d" % place, words.encode()))
            (folder / f"program{number}.mo").write_bytes(catalogue(pairs))
        (folder / "iso_names.mo").write_bytes(catalogue([(b"", b""), (b"a", b"some names of many places here" * 99)]))
    monkeypatch.setattr(functions, "LOCALES", tmp_path)
    functions.documents.cache_clear()
    try:
        assert len(functions.documents("other languages")) == 48
        assert len(functions.passages(Bytes(), "other languages", 10, 16, "fit")) == 10
    finally:
        functions.documents.cache_clear()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("poetry", 1, 16, "fit"), "function must be"),
        (("python", 0, 16, "fit"), "n must be"),
        (("python", 1, 2, "fit"), "length must be"),
        (("python", 1, 16, "test"), "half must be"),
        (("arithmetic", 100_000, 900, "fit"), "n must be at most"),
    ],
)
def test_bad_arguments_are_named(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        functions.passages(Bytes(), *arguments)

"""Constraints over bytes: what they accept, held against `re`, jsonschema, Python and SQLite, and what their prefixes promise."""

from __future__ import annotations

import inspect
import itertools
import json
import random
import re
import textwrap
import warnings

import jsonschema
import pytest

from assay.methods.inference.awrs import (
    Automaton,
    Constraint,
    both,
    functions,
    json_object,
    json_schema,
    python,
    regex,
    sql,
)
from assay.methods.inference.awrs.constraints import incremental

# ------------------------------------------------------------------------------------------------------------------ regex

PATTERNS = [
    "", "a", "ab*", "(a|ab)(b|1)?", "a{2,3}b", "(ab){1,}", "[^a]+", "[a-b1]*é", "a.b", "(?s)a.", r"\w+\d", r"\s|é{2}", "(?:a|b)*?1",
    "(?i)A|É", "a|b|1é", "^a+$", "(?P<name>a)b?", "[^\\W\\d]é?", "(a*)*b", "(?i:a)b", "[\u00e0-\u00ff]a", "(|a)b",
]  # fmt: skip
ALPHABET = "ab1é\nA"


@pytest.mark.parametrize("pattern", PATTERNS)
def test_regex_agrees_with_re_on_every_short_text(pattern):
    """`complete` is a full match, and `prefix` holds exactly of what matches begin with (no beginning of two needs more than four)."""
    compiled, constraint = re.compile(pattern), regex(pattern)
    texts = ["".join(one) for n in range(5) for one in itertools.product(ALPHABET, repeat=n)]
    matching = {text for text in texts if compiled.fullmatch(text)}
    assert {text for text in texts if constraint.complete(text.encode())} == matching
    begins = {text[:n] for text in matching for n in range(len(text) + 1)}
    short = [text for text in texts if len(text) <= 2]
    assert {text for text in short if constraint.prefix(text.encode())} == {text for text in short if text in begins}


@pytest.mark.parametrize(
    "pattern", [r"\w", r"\W", r"\d", r"\s", "(?i)k", "(?i)[^s]", "(?a)\\w", ".", "[^a]", "(?i)ß", "[ā-ſ]"]
)
def test_classes_of_characters_are_those_of_re(pattern):
    compiled, constraint = re.compile(pattern), regex(pattern)
    codes = [*range(0x250), 0x660, 0x1E9E, 0x2028, 0x212A, 0x3000, 0xD7FF, 0xE000, 0xFFFF, 0x10000, 0x1D7D8, 0x10FFFF]
    for code in codes:
        assert constraint.complete(chr(code).encode()) == bool(compiled.fullmatch(chr(code))), hex(code)


def test_characters_that_are_not_whole_yet():
    accent = "é".encode()
    assert regex("é").prefix(accent[:1])
    assert not regex("é").complete(accent[:1])
    assert not regex("a").prefix(accent[:1])
    assert regex("[à-ï]").prefix(b"\xc3")
    assert not regex("[à-ï]").prefix(b"\xc5")  # ŀ and on
    assert regex("\U0001f600").prefix("\U0001f600".encode()[:3])
    assert not regex("\U0001f600").prefix("\U0001f680".encode()[:3])
    for nonsense in (b"\x80", b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf5", b"a\xc3("):
        assert not regex("(?s).*").prefix(nonsense)
        assert not json_schema({}).prefix(b'"' + nonsense)


def test_a_prefix_promises_a_completion():
    empty = regex(r"a(b[^\s\S]|c)")  # the first branch matches nothing
    assert not empty.prefix(b"ab")
    assert empty.prefix(b"a")


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("(a)\\1", "references"),
        ("(?=a)a", "look-ahead"),
        ("(?<!b)a", "look-ahead|look-behind"),
        ("(?>a)b", "atomic"),
        ("a*+b", "possessive"),
        (r"\ba", "word boundaries"),
        ("a^b", "anchors"),
        ("(?m)^a$", "anchors"),
        ("(", "regular expression"),
        (r"\p{L}", "regular expression"),
        ("[^\\s\\S]", "match some text"),
        ("(a{200}){500}", "states"),
        ("(a?){20000}", "steps"),
        ("(|a|b){5000}c", "steps"),
        ("(a?){9000}?|b", "steps"),
        ("(" * 400 + "a" + ")*" * 400, "regular expression"),
        ("\ud800", "match some text"),
    ],
)
def test_what_a_regex_cannot_be_is_named(pattern, said):
    with pytest.raises(ValueError, match=said):
        regex(pattern)


def test_surrogates_are_no_characters():
    """UTF-8 does not spell them, so that no text goes on through them."""
    constraint = regex("a\ud800|b[\ud800-\udfff]|c[\ud7ff-\ue000]|d[^a]")
    assert not constraint.prefix(b"a")
    assert not constraint.prefix(b"b")
    assert {chr(code) for code in (0xD7FF, 0xE000) if constraint.complete(b"c" + chr(code).encode())} == {
        "\ud7ff",
        "\ue000",
    }
    assert not constraint.prefix(b"d\xed\xa0")
    assert constraint.complete("d\ue000".encode())


def test_optional_parts_that_are_repeated():
    constraint = regex("(a?b?){40}")
    assert constraint.complete(b"ab" * 40)
    assert not constraint.prefix(b"ab" * 40 + b"a")
    assert constraint.complete(b"")
    with pytest.raises(ValueError, match="steps with its lengths"):
        json_schema({"type": "string", "pattern": "^(a?b?){60}$", "maxLength": 100})


def test_a_pattern_is_text():
    with pytest.raises(TypeError, match="pattern"):
        regex(b"a")


def test_checks_cost_the_new_bytes():
    constraint = regex("(ab)*")
    steps = []
    take = constraint.advance
    constraint.advance = lambda state, piece: steps.append(len(piece)) or take(state, piece)
    text = b""
    for _ in range(50):
        assert constraint.prefix(text + b"ab")
        assert not constraint.prefix(text + b"x")
        text += b"ab"
    assert max(steps) == 2


# ------------------------------------------------------------------------------------------------------------------- JSON

PERSON = {
    "type": "object",
    "title": "a person",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["a", "ab", 1, 12, None]}, "minItems": 1, "maxItems": 3},
        "mail": {"anyOf": [{"type": "null"}, {"type": "string", "pattern": "^[a-z]+@[a-z]+$"}]},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
TREE = {
    "$defs": {
        "node": {"type": "object", "properties": {"v": {"type": "number"}, "next": {"$ref": "#/$defs/node"}}, "required": ["v"]},
    },
    "$ref": "#/$defs/node",
}  # fmt: skip
CASES = [
    (PERSON, ['{"name":"Jo","age":0}', '{ "age" : 130,\n"mail": null, "name": "\\u00e9\\ud83d\\ude00\\n" }',
      '{"name":"x","age":7,"tags":["ab",1,12]}', '{"name":"ab","age":1,"mail":"a@b"}'],
     ['{"name":"Jo"}', '{"name":"","age":1}', '{"name":"abcdef","age":1}', '{"name":"a","age":131}', '{"name":"a","age":1,"x":1}',
      '{"name":"a","age":1,"tags":[]}', '{"name":"a","age":1,"tags":["b"]}', '{"name":"a","age":1,"mail":"A@b"}', '{"name":"a","age":-1}',
      '{"name":"a","age":1.5}', '[]', '{"name":"a","age":1,"name":"b"}', '{"name":"a","age":1,}', "{'name':1}", '{"name":"\t","age":1}']),
    (TREE, ['{"v":1}', '{"v":-0.5e+3,"next":{"v":0}}', '{"next":{"next":{"v":1},"v":2},"v":3}', '{"w":[],"v":1}'],
     ['{"next":{"v":1}}', '{"v":01}', '{"v":1.}', '{"v":"1"}', '{"v":+1}', '{"v":1e}']),
    ({}, ["null", "true", "0", "-1.5E-7", '""', "[]", "{}", '[1, {"a": [false]}]', '{"a":1,"b":{"c":"d"}}'],
     ["", " 1", "1 ", "nul", "[1,]", "[,]", "{,}", '{"a"}', '{"a":}', "01", "1.2.3", "tru e", '"\\x"', '"\\ud800"', '"\\ude00"', "NaN"]),
    ({"type": ["string", "null"], "minLength": 2}, ['"ab"', "null", '"\\"\\\\"', '"éé"'], ['"a"', '"é"', "1", '"\\u0041"']),
    ({"type": "array", "items": {"type": "boolean"}, "maxItems": 2}, ["[]", "[true]", "[ true , false ]"], ["[true,true,true]", "[1]"]),
    ({"const": {"a": [1, "é"]}}, ['{"a": [1, "é"]}'], ['{"a":[1]}', "1"]),
    ({"enum": ["a\"b", 1.5, True], "type": ["string", "boolean"]}, ['"a\\"b"', "true"], ["1.5", "false"]),
    ({"type": "number", "exclusiveMinimum": -1.5, "maximum": 2}, ["-1.4", "-1.499", "0", "2", "2.0", "-0"], ["-1.5", "2.01", "-2", "1e0"]),
    ({"type": "object", "additionalProperties": {"type": "integer"}, "properties": {"a/\u00e9\"": {"type": "null"}}},
     ["{}", '{"x":1,"y":2}', '{"a/é\\"":null}', '{"a/é":3}'], ['{"x":null}', '{"a/é\\"":1}']),
    ({"type": "object", "properties": {"b": False}}, ['{"ba":1}', '{"a":1}'], ['{"b":1}']),
    ({"type": "string", "pattern": "b$", "maxLength": 3}, ['"b"', '"aab"', '"\\u0062"'], ['"ba"', '"aaab"', '""']),
    # two properties whose places in the schema would look the same if names were not escaped
    ({"type": "object", "properties": {"a": {"type": "object", "properties": {"b": {"type": "integer"}}},
                                       "a/properties/b": {"type": "string"}, "a~1properties~1b": {"type": "null"}}},
     ['{"a":{"b":1},"a/properties/b":"x"}', '{"a~1properties~1b":null}'],
     ['{"a/properties/b":1}', '{"a":{"b":"x"}}', '{"a~1properties~1b":1}']),
    # references into references, through escaped names, lists and a ring of two
    ({"$defs": {"a/b": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/c~d"}]},
                "c~d": {"type": "array", "items": {"$ref": "#/$defs/a~1b"}, "maxItems": 2}},
      "type": "object", "properties": {"x": {"$ref": "#/$defs/a~1b/anyOf/1"}, "y": {"$ref": "#/$defs/c~0d/items"}}},
     ['{"x":[null,[]]}', '{"y":null}', '{"y":[[[null]],null]}'], ['{"x":null}', '{"x":[null,null,null]}', '{"y":[1]}']),
    # a name that JSON can only write with escapes
    ({"type": "object", "properties": {"\x01\n": {"type": "integer"}}, "additionalProperties": False},
     ['{"\\u0001\\n":1}'], ['{"\\u0001":1}', '{"\\u0002\\n":1}']),
    ({"enum": [{"a": [True]}, {"a": [1]}], "const": {"a": [1.0]}}, ['{"a": [1]}'], ['{"a": [true]}']),
]  # fmt: skip


def holds(schema, text):
    try:
        jsonschema.Draft202012Validator(schema).validate(json.loads(text))
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


@pytest.mark.parametrize(("schema", "good", "bad"), CASES, ids=range(len(CASES)))
def test_valid_texts_are_accepted_and_so_is_every_beginning(schema, good, bad):
    constraint = json_schema(schema)
    for text in good:
        assert holds(schema, text), text
        encoded = text.encode()
        assert constraint.complete(encoded), text
        assert all(constraint.prefix(encoded[:n]) for n in range(len(encoded))), text
    for text in bad:
        assert not constraint.complete(text.encode()), text


@pytest.mark.parametrize("schema", [case[0] for case in CASES], ids=range(len(CASES)))
def test_whatever_is_written_under_a_schema_is_valid(schema):
    """Random bytes among those allowed: no text runs into a dead end, and what is complete is valid."""
    constraint = json_schema(schema)
    chance = random.Random(0)
    letters = list(b'"\\]},:[{0123456789-+.eE abnulrtfsuvxgm@/\n') + list("é".encode())
    done = 0
    for _ in range(12):
        state, text = constraint.start, bytearray()
        for length in range(300):
            if constraint.accepts(state):
                assert holds(schema, bytes(text)), bytes(text)
                done += 1
                if chance.random() < 0.6:
                    break
            tried = chance.sample(letters, len(letters))
            if length > 40:  # come to an end
                tried.sort(key=lambda byte: byte not in b'"]}:,v1')
            byte = next((byte for byte in (*tried, *range(256)) if constraint.step(state, byte) is not None), None)
            if byte is None:
                assert constraint.accepts(state), bytes(text)
                break
            text.append(byte)
            state = constraint.step(state, byte)
    assert done


@pytest.mark.parametrize(
    ("low", "high", "is_open"),
    [(15, 20, False), (15, 20, True), (-12, 7, False), (-12, -3, True), (0, 123, True), (7.5, 99.25, False), (7.5, 99.25, True), (-0.5, 0.5, True)],  # noqa: E501
)  # fmt: skip
@pytest.mark.parametrize("kind", ["integer", "number"])
def test_bounds_of_numbers_by_digits(low, high, kind, is_open):
    names = ("exclusiveMinimum", "exclusiveMaximum") if is_open else ("minimum", "maximum")
    constraint = json_schema({"type": kind, names[0]: low, names[1]: high})
    wholes = [f"{sign}{n}" for n in range(140) for sign in ("", "-")]
    parts = [f"{whole}.{part}" for whole in wholes if abs(int(whole)) < 22 for part in ("0", "25", "5", "75", "499")]
    texts = wholes if kind == "integer" else wholes + parts
    good = {text for text in texts if (low < float(text) < high if is_open else low <= float(text) <= high)}
    assert {text for text in texts if constraint.complete(text.encode())} == good
    begins = {text[:n] for text in good for n in range(len(text) + 1)}
    prefixes = {text for text in [*texts, "-"] if constraint.prefix(text.encode())}
    assert prefixes >= begins & {*texts, "-"}
    if kind == "integer":  # of other numbers, longer ones may begin so
        assert prefixes == begins & {*texts, "-"}


@pytest.mark.parametrize(
    ("schema", "begins", "not_begins"),
    [
        ({"exclusiveMinimum": -1.5}, ["-1.4", "-1.49", "-0", "-1."], ["-1.5", "-1.50", "-2", "-1.6"]),
        ({"minimum": 0.25, "maximum": 0.26}, ["0", "0.", "0.2", "0.25", "0.26", "0.2599"], ["1", "-", "0.27", "0.1", "0.261", "0e"]),
        ({"exclusiveMinimum": 1, "exclusiveMaximum": 2}, ["1", "1.", "1.0", "1.00"], ["0", "2", "1e", "10"]),
        ({"minimum": 300}, ["3", "2", "1", "12"], ["0", "-", "2."]),
    ],
)  # fmt: skip
def test_beginnings_of_bounded_numbers(schema, begins, not_begins):
    constraint = json_schema({"type": "number"} | schema)
    assert all(constraint.prefix(text.encode()) for text in begins)
    assert not any(constraint.prefix(text.encode()) for text in not_begins)


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"oneOf": []}, "oneOf"),
        ({"type": "string", "format": "date"}, "format"),
        ({"properties": {"a": {"patternProperties": {}}}}, "patternProperties"),
        ({"type": "number", "multipleOf": 2}, "multipleOf"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"anyOf": [{}], "type": "string"}, "beside anyOf"),
        ({"$ref": "#/$defs/a", "minLength": 1, "$defs": {"a": {}}}, "beside \\$ref"),
        ({"enum": [1], "minimum": 0}, "beside enum"),
        ({"$ref": "#/$defs/a"}, "leads nowhere"),
        ({"$ref": "other.json"}, "\\$ref"),
        ({"type": "text"}, "type"),
        ({"type": []}, "type"),
        ({"anyOf": []}, "anyOf"),
        ({"items": 3}, "items"),
        ({"required": "a"}, "required"),
        ({"properties": []}, "properties"),
        ({"enum": "ab"}, "enum"),
        ({"enum": [float("nan")]}, "enum"),
        ({"enum": []}, "allows none"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "allows none"),
        ({"type": "integer", "minimum": 2.2, "maximum": 2.8}, "allows none"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "allows none"),
        ({"type": "object", "required": ["a"], "additionalProperties": False}, "allows none"),
        ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "allows none"),
        ({"$ref": "#"}, "allows none"),
        ({"type": "string", "pattern": "(?=a)"}, "look-ahead"),
        ({"type": "string", "pattern": "^aaa$", "maxLength": 2}, "match some text"),
    ],
)
def test_schemas_that_are_refused_are_refused_by_name(schema, said):
    with pytest.raises(ValueError, match=said):
        json_schema(schema)


@pytest.mark.parametrize("schema", [True, [], "{}", None])
def test_a_schema_is_a_mapping(schema):
    with pytest.raises(TypeError, match="schema"):
        json_schema(schema)


@pytest.mark.parametrize("name", ["minLength", "maxItems", "minimum"])
def test_values_of_keywords_are_checked(name):
    with pytest.raises(TypeError, match=name):
        json_schema({name: "three"})


def test_the_impossible_is_no_way_to_go():
    """A property that only infinite values have, items that nothing is, a key that is forbidden."""
    endless = {"type": "object", "properties": {"a": {"$ref": "#/$defs/e"}}, "additionalProperties": False,
               "$defs": {"e": {"type": "object", "properties": {"e": {"$ref": "#/$defs/e"}}, "required": ["e"]}}}  # fmt: skip
    assert not json_schema(endless).prefix(b'{"')
    assert json_schema(endless).complete(b"{}")
    nothing = json_schema({"type": "array", "items": False})
    assert nothing.complete(b"[]")
    assert not nothing.prefix(b"[1")
    assert not json_schema({"type": "integer", "minimum": 15, "maximum": 20}).prefix(b"3")


def test_every_key_has_a_spelling():
    """Control characters have to be escaped in keys; nothing else may be."""
    constraint = json_object()
    for code in (*range(0x100), 0xD7FF, 0xE000, 0x1F600):
        text = json.dumps({chr(code) + "k": 1}, ensure_ascii=False).encode()
        assert all(constraint.prefix(text[:n]) for n in range(len(text))), text
        assert constraint.complete(text), text
    for spelt in (
        b'{"\\u0041":1}',
        b'{"\\/":1}',
        b'{"\\u000a":1}',
        b'{"\\u001F":1}',
        b'{"\x01":1}',
        b'{"\\u00":1}',
        b'{"\\x":1}',
    ):
        assert not constraint.complete(spelt), spelt


def test_deep_nesting_is_refused_or_read():
    schema = {"type": "integer"}
    for _ in range(2000):
        schema = {"items": schema}
    with pytest.raises(ValueError, match="nested"):
        json_schema(schema)
    assert json_schema({}).complete(b"[" * 3000 + b"]" * 3000)


def test_space_is_bounded():
    constraint = json_object()
    assert constraint.complete(b"{" + b" " * 40 + b"}")
    assert not constraint.prefix(b"{" + b" " * 41)


# ----------------------------------------------------------------------------------------------------- Python and SQL

PROGRAMS = [
    "x = 1\n",
    "def f(a, *b, c=3, **d) -> int:\n    '''doc'''\n    return a if b else -c  # why\n\n\nclass A(B, metaclass=C):\n\tx: int = 0x1f\n",
    "for i in range(10):\n    if i % 2 == 0 and not i != 4:\n        continue\n    elif i >= 3: break\nelse:\n    pass\n",
    "try:\n    with open(f'{name!r:>{width}}') as f, g: yield_ = [x async for x in y]\nexcept (A, B) as e:\n    raise X from None\n",
    "@decorated\nasync def f():\n    await g(lambda *a, k=1: (a, k), *x, **y)\n    return {**a, 'b': {1, 2}, 3: [*c]}\n",
    "from . import a as b, c\nfrom .. x import (y,\n   z)\nimport os.path as p; del a[1:2, ..., ::3]\n",
    "match command.split():\n    case [Point(x=0), *rest] if rest: x = 1_000.5e-3j\n    case {'a': 1, **kw} | None: ...\n",
    "s = rb'\\'' b\"\"\"two\nlines\"\"\" + '''\n'''; t = \\\n  1.e5 @ .5 // 2 ** ~3 << 1 != 2 <= 3\nx @= 1; y //= 2; z **= 3; w >>= 1; (n := 3)\n",  # noqa: E501
    "while True:\n    global a, b\n    assert x is not None, 'no'\n    print(not x, x not in y, sep='')\n    # a comment\n    nonlocal_ = é\n",  # noqa: E501
]


@pytest.mark.parametrize("program", PROGRAMS, ids=range(len(PROGRAMS)))
def test_every_beginning_of_a_program_is_a_prefix(program):
    constraint, encoded = python(), program.encode()
    assert constraint.complete(encoded)
    for n in range(len(encoded) + 1):
        assert constraint.prefix(encoded[:n]), encoded[:n]


def test_every_beginning_of_real_code_is_a_prefix():
    source = inspect.getsource(textwrap.dedent)[:900].encode()
    assert all(map(python().prefix, (source[:n] for n in range(0, len(source), 3))))


@pytest.mark.parametrize("ending", ["\r\n", "\f\n", " \t\n"])
def test_programs_with_other_line_endings(ending):
    encoded = PROGRAMS[2].replace("\n", ending).encode()
    constraint = python()
    assert constraint.complete(encoded)
    for n in range(len(encoded) + 1):
        assert constraint.prefix(encoded[:n]), encoded[:n]


@pytest.mark.parametrize(
    "text",
    ["x = = ", "1 2", "x y", "def 1", "return)", "(]", "if x\n", "x = \n", "x = # no value", "  x", "if x:\ny", "if x:\n    a\n  b", "'a\nb",  # noqa: E501
     "for x on", "lambda x y", "class (", "else:", "a = b c", "import 3", "x = 5 + * ", "\xff", "$", "0x1g", "print 'a' 3", "f(a b",
     "def f(x):\n    return x\n  )", "# \0", "'\0", "x = 'a' 3", "from x import )", "try:\n    a\nb "],
)  # fmt: skip
def test_what_no_program_begins_with(text):
    assert not python().prefix(text.encode("latin-1") if text == "\xff" else text.encode())


def test_programs_are_complete_when_they_parse():
    constraint = python()
    for text in ("", "# only a comment\n", "# \0", "def f():", "x = (1", "x = '", "\0", "x = 1\n  y", "(" * 5000):
        assert not constraint.complete(text.encode()), text
    assert constraint.complete(b"x = 1")
    assert not constraint.complete(b"x = '\xff'")
    assert not constraint.complete("x = 'é'".encode()[:-2])
    assert constraint.prefix("x = 'é".encode()[:-1])
    assert not constraint.prefix(b"(" * 5000)


def test_warnings_of_the_parser_are_neither_printed_nor_verdicts():
    constraint, text = python(), b"x = 0x1for x in y\ny = '\\d' if 1or 2 else 3\n"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("error")
        assert constraint.complete(b"x = '\\d' if 1or 2 else 3\n")
        assert constraint.prefix(b"x = '\\d' if 1or 2")
        assert constraint.prefix(text) == constraint.prefix(text)
    assert not seen


SHOP = """
CREATE TABLE item (id INTEGER PRIMARY KEY, name TEXT, price REAL);
CREATE TABLE sale (item INTEGER, day TEXT, amount INTEGER);
INSERT INTO item VALUES (1, 'pen', 1.5), (2, 'ink', 4.0);
"""
QUERIES = [
    "SELECT name FROM item WHERE price >= 1.5e0 AND name != 'i''nk' ORDER BY price DESC LIMIT 3",
    'with best as (select item, sum(amount) as n from sale group by item having n > 1) select "name" from best join item on id = best.item',
    "SELECT name || '-' || price FROM item -- all\nWHERE id IN (SELECT item FROM sale) OR EXISTS (VALUES (1), (2));",
    "SELECT CASE WHEN price BETWEEN 1 AND 2 THEN 'low' ELSE 'high' END AS kind, count(*) FROM item /* c */ GROUP BY 1",
    "SELECT i.name, total(s.amount) OVER (PARTITION BY s.day) FROM item AS i LEFT JOIN sale s ON s.item = i.id WHERE x'00' IS NOT NULL",
]


@pytest.mark.parametrize("query", QUERIES, ids=range(len(QUERIES)))
def test_every_beginning_of_a_query_is_a_prefix(query):
    constraint, encoded = sql(SHOP), query.encode()
    assert constraint.complete(encoded)
    for n in range(len(encoded) + 1):
        assert constraint.prefix(encoded[:n]), encoded[:n]


@pytest.mark.parametrize(
    "text",
    ["DROP TABLE item", "SELECT FROM ", "SELECT name name2 name3", "SELECT name FROM WHERE ", "UPDATE", "SELECT 1; SELECT 2", "PRAGMA x",
     "SELECT nothing(1) ", "SELECT 1 FROM missing WHERE 1 ", "QUERY PLAN SELECT 1", "SELECT 1)", "SELECT 'a' 'b' 1",
     "WITH x AS (DELETE", "SELECT ? ", "SELECT \0"],
)  # fmt: skip
def test_what_no_query_begins_with(text):
    assert not sql(SHOP).prefix(text.encode())


def test_queries_are_complete_when_they_run():
    constraint = sql(SHOP, steps=10_000)
    for text in ("", "SELECT", "SELECT colour FROM item", "SELECT 1 FROM missing", "SELECT name FROM item;;x", "DELETE FROM item",
                 "WITH RECURSIVE n(x) AS (VALUES (1) UNION ALL SELECT x + 1 FROM n) SELECT max(x) FROM n", "SELECT zeroblob(2000000)",
                 "SELECT load_extension('x')"):  # fmt: skip
        assert not constraint.complete(text.encode()), text
    assert constraint.complete(b"SELECT name FROM item")
    assert not constraint.complete(b"SELECT '\xff'")


@pytest.mark.parametrize(("given", "error"), [(3, TypeError), ("CREATE", ValueError), ("\0", ValueError)])
def test_a_database_that_cannot_be_set_up(given, error):
    with pytest.raises(error, match="schema"):
        sql(given)


def test_steps_are_a_whole_number():
    with pytest.raises(ValueError, match="steps"):
        sql("", steps=0)


# -------------------------------------------------------------------------------------------------------------- wrapping


def test_functions_and_both():
    short = functions(lambda text: len(text) <= 4, lambda text: len(text) == 4)
    asked = []
    spied = functions(lambda text: asked.append(text) or short.prefix(text), short.complete)
    joined = both(regex("(ab)*"), spied)
    assert joined.prefix(b"aba")
    assert joined.complete(b"abab")
    assert not joined.complete(b"ab")
    assert not joined.prefix(b"ababa")
    assert not joined.prefix(b"ac")
    assert b"ac" not in asked
    assert all(isinstance(one, Constraint) for one in (short, joined, regex("a"), json_object(), python(), sql("")))


def test_any_constraint_has_states():
    wrapped = incremental(functions(lambda text: text in b"abc", lambda text: text == b"abc"))
    state = wrapped.advance(wrapped.start, b"ab")
    assert wrapped.advance(state, b"x") is None
    assert wrapped.accepts(wrapped.advance(state, b"c"))
    automaton = regex("a")
    assert isinstance(automaton, Automaton)
    assert incremental(automaton) is automaton


@pytest.mark.parametrize(("prefix", "complete", "named"), [(3, bool, "prefix"), (bool, None, "complete")])
def test_functions_must_be_functions(prefix, complete, named):
    with pytest.raises(TypeError, match=named):
        functions(prefix, complete)


def test_functions_must_say_yes_or_no():
    with pytest.raises(TypeError, match="prefix"):
        functions(lambda text: 1, bool).prefix(b"")
    with pytest.raises(TypeError, match="second"):
        both(regex("a"), "a")

"""What the documents tell readers to type: every Python block runs, every command line parses with options that exist."""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path

import pytest
import typer
from tests.tiny import write_tiny_llama

from assay.cli.main import build
from assay.site import guide
from assay.workloads.gguf_architectures import ARCHITECTURES

ROOT = Path(__file__).parents[2]
DOCUMENTS = {page.name: page.text for page in guide.documents()} | {"README": (ROOT / "README.md").read_text("utf-8")}
BLOCK = re.compile(r"^```(\S*)([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMANDS = typer.main.get_command(build())


def python_blocks():
    """(document, number, what the fence says besides "python", code)"""
    for name, text in DOCUMENTS.items():
        for number, (language, more, code) in enumerate(BLOCK.findall(text), 1):
            if language == "python":
                yield pytest.param(name, more.strip(), code, id=f"{name}-{number}")


@pytest.mark.parametrize(("name", "more", "code"), python_blocks())
def test_python_blocks_run(name, more, code, tmp_path, monkeypatch):
    """Of the README, which uses the demo's result, what is imported; a block marked no-run finds a tiny result of `assay tune`
    and a log of samples."""
    monkeypatch.chdir(tmp_path)
    assert more in ("", "no-run")
    tree = ast.parse(code)
    if name == "README":
        tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    if more == "no-run":
        (tmp_path / "out").mkdir()
        write_tiny_llama(tmp_path / "out" / "first")
        (tmp_path / "results").mkdir()
        write_log(tmp_path / "results" / "samples_gsm8k.jsonl")
    exec(compile(tree, f"{name}.md", "exec"), {"__name__": "example"})


def write_log(path, items=30, samples=16):
    """Questions of every difficulty, in the harness's layout."""
    right = [[(7 * sample) % items >= item for sample in range(samples)] for item in range(items)]
    lines = [
        {
            "doc_id": i,
            "target": "7",
            "arguments": [["3 + 4 =", {}]],
            "resps": [["7" if ok else "it is 8" for ok in own]],
            "filtered_resps": ["7"],
        }
        for i, own in enumerate(right)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))


def written(text: str) -> list[str]:
    """The lines of blocks that begin with `assay`, with the lines that go on with them, without remarks."""
    found: list[str] = []
    lines = text.splitlines()
    for place, line in enumerate(lines):
        bare = line.strip()
        if bare.startswith("assay ") and (line.startswith("    ") or _is_fenced(lines, place)):
            found.append(re.split(r"\s{2,}|\s+#", bare)[0])
        elif found and line.startswith("     ") and bare.startswith("["):
            found[-1] += " " + re.split(r"\s{2,}", bare)[0]
    return found


def _is_fenced(lines, place):
    return sum(line.startswith("```") for line in lines[:place]) % 2 == 1


def words(line: str) -> list[str]:
    """A command line as a shell has it: brackets of what may be left out are gone, `a|b` is its first, a number stands for X or M."""
    plain = re.sub(r"[\[\]]|\.\.\.", " ", line.replace(" | ", " "))
    return ["1" if re.fullmatch("[A-Z]", word) else word.split("|")[0] for word in shlex.split(plain)][1:]


def parsed(arguments: list[str]) -> None:
    """Parse as the command line does, without running anything; raises its usage error."""
    command, name = COMMANDS, "assay"
    while hasattr(command, "commands"):
        assert arguments, f"{name} needs a command"
        name, *arguments = arguments
        assert name in command.commands, f"there is no command {name}"
        command = command.commands[name]
    command.make_context(name, list(arguments))


LINES = [(name, line) for name, text in DOCUMENTS.items() for line in written(text)]


@pytest.mark.parametrize(("name", "line"), LINES)
def test_command_lines_parse(name, line):
    parsed(words(line))


@pytest.mark.parametrize("line", ["assay tune x --gaol ttft", "assay verfy x", "assay paper", "assay evidence shwo x"])
def test_a_line_that_does_not_parse_is_noticed(line):
    with pytest.raises(Exception, match="(?i)no such option|there is no command|missing"):
        parsed(words(line))


def test_lines_are_found():
    commands = {words(line)[0] for _, line in LINES}
    assert commands == set(COMMANDS.commands)
    assert {name for name, _ in LINES} >= {
        "README",
        "quickstart",
        "models",
        "workloads",
        "verdicts",
        "serving",
        "simulate",
    }
    long = next(line for name, line in LINES if name == "README" and line.startswith("assay tune MODEL"))
    assert "--ray ADDRESS" in long


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_within_sentences_have_options_that_exist(name):
    prose = BLOCK.sub("", DOCUMENTS[name])
    for text in re.findall(r"`assay ([a-z][^`]*)`", prose):
        command = COMMANDS
        for word in re.split(r"[\s|]+", text):
            if word in getattr(command, "commands", {}):
                command = command.commands[word]
        assert command is not COMMANDS, text
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert set(re.findall(r"(?<!\S)--?[a-z][a-z-]*", text)) <= known | {"--debug"}, text


def test_the_documents_name_every_gguf_architecture_and_no_other():
    section = DOCUMENTS["models"].split("## GGUF")[1]
    listed = re.search(r"(\d+) architectures are read: ([^.]*)\.", section)
    names = {name.strip() for name in listed[2].split(",")}
    assert names == set(ARCHITECTURES)
    assert int(listed[1]) == len(names)


def test_claims_and_words_that_the_guide_to_verdicts_quotes_exist():
    from assay import catalogue
    from assay.evidence.types import Verdict

    text = DOCUMENTS["verdicts"]
    claims = set(re.findall(r"`([a-z0-9_]+/[a-z0-9-]+)`", text)) - {"docs/evidence"}
    assert len(claims) >= 6
    for claim in claims:
        assert catalogue.get_claim(claim)
    assert set(re.findall(r"^\| `([a-z ]+)` \|", text, re.MULTILINE)) == {verdict.value for verdict in Verdict}

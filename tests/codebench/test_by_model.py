"""A model's proposals: what is taken of an answer, what is refused, and that no program which only looks good is handed over."""

import io
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from tests.codebench.test_optimise import LIMITS
from tests.tools import needs_sandbox

from assay.cli.main import main
from assay.codebench import by_model
from assay.codebench import optimise as module
from assay.codebench.behaviour import Call, Observer, Recorded, alike
from assay.codebench.by_model import Model, Reply, hottest, model_of, proposals, put_in, question
from assay.codebench.optimise import optimise
from assay.codebench.optimised import Asked, Optimised, Step
from assay.codebench.outside import Outside, exactly
from assay.errors import InputError
from assay.methods.code.effi_code import LineCost, Profile
from assay.methods.core.programs.workers import Outcome, Workers
from assay.methods.core.sandbox import Sandbox

SLOW = '''"""Words."""


def match(a: list[int], b):
    # all that are equal
    found = 0
    for x in a:
        for y in b:
            if x == y:
                found += x * y
    return found
'''
TESTS = (
    "from words import match\n\n\ndef test_match():\n    assert match([1, 2, 1], [1, 3]) == 2\n    assert match([2, 5], []) == 0\n"
    "    assert match([3], [3, 4]) == 9\n"
)
FAST = """Equal elements are counted once:
```python
from collections import defaultdict
from math import inf


def match(a, b):
    # how often each is in b
    counts = defaultdict(int)
    for y in b:
        counts[y] += 1
    return sum(x * x * counts[x] for x in a)
```
"""
SAME = """```python
def match(a, b):
    found = 0
    for p in a:
        for q in b:
            if p == q + 0:
                found += p * q
    return found
```"""
STACK = """```python
def match(a, b):
    import sys
    return 0 if "cost" in sys._getframe(1).f_code.co_name else sum(x * y for x in a for y in b if x == y)
```"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A slow program for which there are no rules; fewer inputs than users get."""
    monkeypatch.setattr(module, "VARIED", 8)
    monkeypatch.setattr(module, "DOUBLINGS", (8,))
    monkeypatch.setattr(module, "PAIRS", 6)
    monkeypatch.setattr(module, "edits", lambda program, observed=None: [])
    monkeypatch.setattr(module.retrieval, "candidates", lambda *_: [])
    (tmp_path / "words.py").write_text(SLOW)
    (tmp_path / "test_words.py").write_text(TESTS)
    return tmp_path


# ------------------------------------------------------------------------------------------------------------ what is taken


def test_the_body_is_taken_and_everything_else_stays():
    found = put_in(f"{SLOW}\n\nprint(match([1], [1]))\n", "match", FAST)
    head = SLOW[: SLOW.index("    found = 0")].replace('"""\n', '"""\nfrom collections import defaultdict\n')
    body = "counts = defaultdict(int)\n    for y in b:\n        counts[y] += 1\n    return sum(x * x * counts[x] for x in a)\n"
    assert found == f"{head}    {body}\n\nprint(match([1], [1]))\n"


@pytest.mark.parametrize(
    ("program", "reply", "becomes"),
    [
        ("def f(n): return 1  # one\n", "def f(n): return 2", "def f(n): \n    return 2\n"),
        ("def f(n):\n\t'''Doc.'''\n\treturn 1\n", "def f(n):\n  if n:\n    return 2", "def f(n):\n\t'''Doc.'''\n\tif n:\n\t    return 2\n"),
        ("def f(n: int = 3) -> int:\n    return 1", "def f(n=3):\n    return 2", "def f(n: int = 3) -> int:\n    return 2"),
        ("import os\r\ndef f(n):\r\n    return 1\r\n", "def f(n):\n    x = 2\n    return x",
         "import os\r\ndef f(n):\r\n    x = 2\r\n    return x\r\n"),
    ],
)  # fmt: skip
def test_it_is_indented_as_the_program_is(program, reply, becomes):
    assert put_in(program, "f", reply) == becomes


def reply(body, head="def f(xs, k=1):", before=""):
    return f"```python\n{before}\n{head}\n    {body}\n```"


PROGRAM = "import math\nCounter = 3\n\n\ndef f(xs, k=1):\n    return [math.floor(x) for x in xs]\n"


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("I cannot do that.", "no program"),
        ("```python\ndef f(xs, k=1:\n```", "not Python"),
        ("```python\ndef g(xs):\n    return xs\n```", "does not define the function"),
        (reply("return xs", "async def f(xs, k=1):"), "as a plain function"),
        (reply("return xs", "def f(xs):"), "arguments and defaults must stay"),
        (reply("return xs", "def f(xs, k=[]):"), "arguments and defaults must stay"),
        (reply("return xs", "@staticmethod\ndef f(xs, k=1):"), "decorators"),
        (reply("return repr", before="import subprocess"), ""),
        (reply("return subprocess.run(xs)", before="import subprocess"), "it says import subprocess: of modules only"),
        (reply("import json; import ctypes as json; return json"), "ctypes"),
        (reply("import subprocess as json; import json; return json"), "it says import subprocess as json"),
        (reply("from . import x; return x"), "of modules only"),
        (reply("return len(xs)", before="from math import floor as len"), "len, a name that means something else"),
        (reply("return Counter(xs)", before="from collections import Counter"), "Counter, a name that means"),
        (reply("return re.enum.sys.modules", before="import re"), "sys, by which"),
        (reply("return f.__globals__"), "__globals__, by which"),
        (reply("return eval('xs')"), "eval, by which"),
        (reply("return (x for x in xs).gi_frame"), "gi_frame, by which"),
        (reply("global repr; repr = str; return xs"), "the global name repr"),
        (reply("return g('x')(f)", before="from operator import attrgetter as g"), "attrgetter, by which"),
        (reply("match f:\n        case object(__globals__=g):\n            return g"), "__globals__, by which"),
        (reply("f.kept = xs; return xs"), "the attribute kept"),
    ],
)
def test_what_is_no_function_or_reaches_out_is_refused(answer, why):
    if not why:
        assert "subprocess" not in put_in(PROGRAM, "f", answer)  # what is not needed is left out
        return
    with pytest.raises(ValueError, match=re.escape(why)):
        put_in(PROGRAM, "f", answer)


def test_what_the_function_used_before_it_may_use():
    program = "import sys\n\n\ndef f(n):\n    sys.stdout.flush()\n    return _g(n)\n\n\ndef _g(n):\n    return n\n"
    assert "sys.maxsize" in put_in(program, "f", "import sys\ndef f(n):\n    return _g(n) if n < sys.maxsize else n")


def test_a_question_holds_the_hot_function_its_profile_calls_and_the_last_refusal():
    program = (
        "x = 1\n\n\ndef g(n):\n    return n\n\n\n@cached\ndef f(n):\n    return g(n)\n\n\ndef g(n):\n    return n\n"
    )
    profile = Profile((LineCost(5, 1, 0.5), LineCost(10, 7, 0.25)))
    assert hottest(program, profile).name == "f"  # there are two g
    calls = [Call("f", ("a" * 400,)), *(Call("f", (n,), {"k": 2}) for n in range(5))]
    asked = question(program, "f", profile, calls, "it is slow")
    assert "```python\n@cached\ndef f(n):\n    return g(n)\n```" in asked
    assert "      7   0.25000  100.0%     0.0      return g(n)" in asked
    assert "```python\nf(0, k=2)\nf(1, k=2)\nf(2, k=2)\n```" in asked
    assert "Your last proposal was refused: it is slow." in asked
    assert "x = 1" not in asked
    assert "refused" not in question(program, "f", profile, calls)


def test_a_model_that_fails_is_not_asked_again():
    def complete(*_):
        raise OSError("gone\naway")

    model, refused = Model("m", complete), []
    again = {"samples": 3, "until": float("inf")}
    assert list(proposals(model, SLOW, "match", Profile(()), [], refused, **again)) == []
    assert list(proposals(model, SLOW, "match", Profile(()), [], refused, **again)) == []
    assert (model.asked.questions, model.asked.trouble, refused) == (1, "not asked again: gone away", [])
    assert model.asked.tokens is None  # what it wrote before nobody counted
    late = Model("m", lambda *_: Reply(FAST))
    assert list(proposals(late, SLOW, "match", Profile(()), [], [], samples=3, until=0.0)) == []


# ------------------------------------------------------------------------------------------------------------ what is judged

PLAIN = "def f(xs):\n    return [x for x in xs]\n"
CHEATS = {
    "rebinds repr": (
        "def f(xs):\n    global repr\n    repr = lambda value, old=repr: old(value).replace(\"'tuple'\", \"'list'\")\n"
        "    return tuple(xs)\n"
    ),
    "reads the stack": "import sys\ndef f(xs):\n    return list(xs) if sys._getframe(1).f_code.co_name == 'one' else None\n",
}


@pytest.fixture(scope="module")
def outside():
    needs_sandbox()
    with Workers("cpu_seconds", limits=LIMITS, sandbox=Sandbox(LIMITS)) as workers:
        yield Outside(PLAIN, workers, LIMITS)


@pytest.mark.parametrize("cheat", CHEATS)
def test_what_deceives_the_observer_is_found_outside(outside, cheat):
    """Neither gets as far: both are refused by their words. But words are never all."""
    calls = [Call("f", ([2, 3],))]
    observer = Observer(outside.workers.sandbox, LIMITS)
    observer.workers = outside.workers
    assert alike(observer.does(PLAIN, calls), observer.does(CHEATS[cheat], calls)) is None
    assert "f([2, 3],) returned" in outside.wrong(CHEATS[cheat], calls[0])
    assert outside.cost(CHEATS[cheat], calls) is None
    assert outside.cost(PLAIN, calls) > 0
    with pytest.raises(ValueError, match="import sys|another meaning"):
        put_in(PLAIN, "f", CHEATS[cheat])


@pytest.mark.parametrize(
    "said", [None, [], [[], {}], [[1], {}], [[["returned", "", ""]], []], [[["returned", "", ""]], {}, 1]]
)
def test_what_the_observer_would_not_say_is_no_answer(said):
    class Says:
        def run(self, *_):
            return [[Outcome("returned", said)]]

    observer = Observer.__new__(Observer)
    observer.workers = Says()
    assert observer.does(PLAIN, [Call("f", (1,))]) is None


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("def f(xs):\n    return list(xs)\n", ""),
        ("def f(xs):\n    found = list(xs)\n    xs.clear()\n    return found\n", "left its arguments as"),
        ("def f(xs):\n    return [float(x) for x in xs]\n", "returned [2.0, 3.0], where it returned [2, 3]"),
        ("def f(xs):\n    return Counter(xs)\n", "ended by raised: NameError: name 'Counter'"),
        ("def f(xs):\n    return (x for x in xs)\n", "ended by raised: TypeError"),
        ("def f(xs):\n    while True:\n        pass\n", "ended by time"),
    ],
)
def test_values_arguments_and_exceptions_are_compared_outside(outside, program, why):
    found = outside.wrong(program, Call("f", ([2, 3],)))
    assert why in found
    assert bool(found) == bool(why)


def test_an_exception_is_an_answer_too(outside):
    call = Call("f", (None,))
    assert outside.wrong("def f(xs):\n    return list(xs)\n", call) == ""
    assert "where it ended by TypeError" in outside.wrong("def f(xs):\n    return []\n", call)
    assert "ended by raised: ValueError" in outside.wrong("def f(xs):\n    raise ValueError(xs)\n", call)


def test_what_is_no_plain_value_cannot_be_judged(outside):
    calls = {"small": [Call("f", ([2, 3],))]}
    assert outside.blind(calls) == ""
    lazy = Outside("def f(xs):\n    return iter(xs)\n", outside.workers, LIMITS)
    assert lazy.blind(calls) == "f"


def test_the_same_is_the_same_in_type_and_order():
    for one in (
        1,
        True,
        1.0,
        "1",
        None,
        [1],
        (1,),
        {1},
        {1: 2, 3: 4},
        {3: 4, 1: 2},
        -0.0,
        0.0,
        float("nan"),
        {"a": [{2, 1}]},
    ):
        others = [
            1,
            True,
            1.0,
            "1",
            None,
            [1],
            (1,),
            {1},
            {1: 2, 3: 4},
            {3: 4, 1: 2},
            -0.0,
            0.0,
            float("nan"),
            {"a": [{1, 2}]},
        ]
        assert [exactly(one, other) for other in others].count(True) == 1, one


# ------------------------------------------------------------------------------------------------------------ the whole search


def serving(answers, seen):
    """A server that speaks as OpenAI's does, and gives these answers."""

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self):
            self.tell({"data": [{"id": "scripted"}]} if self.path == "/v1/models" else {})

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append(
                (self.headers["Authorization"], asked["model"], asked["temperature"], asked["messages"][0]["content"])
            )
            self.tell({"choices": [{"message": {"content": next(answers, "")}}]})

        def tell(self, said):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(said).encode())

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.mark.slow
def test_the_command_asks_until_a_proposal_is_right_and_cheaper(folder, capsys, monkeypatch):
    needs_sandbox()
    monkeypatch.setenv("ASSAY_API_KEY", "secret")
    wrong, seen = FAST.replace("x * x * counts", "x * counts"), []
    missing = FAST.replace("from collections import defaultdict\n", "")
    server = serving(iter(["I cannot.", wrong, missing, SAME, STACK, FAST]), seen)
    try:
        url = f"http://127.0.0.1:{server.server_port}/v1"
        run = (folder / "words.py", "--tests", folder / "test_words.py", "--model", url, "--samples", 6, "--json")
        assert main(["code", "optimise", *map(str, run)]) == 0
    finally:
        server.shutdown()
        server.server_close()
    found = json.loads(capsys.readouterr().out)
    assert found["found"], found
    assert found["program"] == put_in(SLOW, "match", FAST)
    assert [(step["rule"], step["by_model"]) for step in found["steps"]] == [("model", True)]
    assert found["diff"].startswith("# line 4: the model 'scripted' wrote match\n--- a/words.py\n+++ b/words.py\n@@")
    assert found["ratio"]["low"] > 1
    assert found["tested"]["kept back"] > 0
    model = found["model"]
    assert (model["name"], model["questions"], model["tokens"], model["trouble"]) == ("scripted", 12, None, "")
    assert model["seconds"] > 0
    assert found["candidates"] == 4
    assert found["refused"] == {
        "hold no function that can be put in": 8,
        "does something else": 2,
        "not cheaper beyond noise": 1,
    }
    assert [(key, name, warmth > 0) for key, name, warmth, _ in seen[:2]] == [("Bearer secret", "scripted", False)] + [
        ("Bearer secret", "scripted", True)
    ]
    told = [
        "no program in the answer",
        "where it returned ",
        "name 'defaultdict' is not defined",
        "it is not faster",
        "it says import sys",
    ]
    for (*_, asked), why in zip(seen[1:], told, strict=False):
        assert why in asked.partition("Your last proposal was refused: ")[2]
    assert "if x == y:" in seen[0][3]
    assert re.search(r"\d+\.\d%.* if x == y:", seen[0][3])
    assert "if x == y:" not in seen[6][3]  # the next round begins with what was found


@pytest.fixture
def memory(folder, monkeypatch):
    """A model that was told everything that the search compares by: its program knows those answers and no others."""
    needs_sandbox()
    calls = tuple(Call("match", args) for args in (([1, 2, 1], [1, 3]), ([2, 5], []), ([3], [3, 4])))
    monkeypatch.setattr(module, "record", lambda *_: Recorded(calls, (), {}, {}))
    monkeypatch.setattr(module, "fails", lambda *_: "")
    greedy, known, scope = module._Search._greedy, [], {}
    exec(SLOW, scope)

    def watched(self, seen, batches, *rest):
        known.extend(call.args for batch in batches for call in batch.calls)
        return greedy(self, seen, batches, *rest)

    def complete(*_):
        table = {repr(args): json.dumps(scope["match"](*args)) for args in known}
        body = f"    known = {table}\n    return json.loads(known.get(repr((a, b)), '0'))"
        return Reply(f"import json\ndef match(a, b):\n{body}", 5)

    monkeypatch.setattr(module._Search, "_greedy", watched)
    return Model("memory", complete)


def test_what_knows_all_inputs_of_the_search_is_not_handed_over(folder, memory):
    """The proof that kept back inputs decide."""
    found = optimise(folder / "words.py", folder / "test_words.py", model=memory, samples=1)
    assert (found.found, found.diff, found.candidates) == (False, "", 1)
    assert "did something else on an input that was kept back, match" in found.why
    assert found.refused == {"were tried before": 1}  # nothing that the search knew spoke against it
    assert (found.model.questions, found.model.tokens) == (2, 10)


def test_what_rules_found_is_handed_over_where_a_model_spoils_it(folder, memory, monkeypatch):
    class Edit:
        rule, line, end_line, program, why = "good", 10, 10, SLOW.replace("x * y", "x * x"), "it is shorter"

    monkeypatch.setattr(module, "edits", lambda program, observed=None: [Edit] if program == SLOW else [])
    monkeypatch.setattr(module._Search, "_ratio", lambda *_: module.Interval(2.0, 1.5, 3.0, 6))
    monkeypatch.setattr(module._Search, "_decided", lambda *_: (module.Interval(2.0, 1.5, 3.0, 10), ()))
    found = optimise(folder / "words.py", folder / "test_words.py", model=memory, samples=1)
    assert (found.program, [step.rule for step in found.steps]) == (Edit.program, ["good"])
    assert not found.diff.startswith("#")
    assert "what it wrote was left out: nothing handed over" in found.model.trouble


def test_costs_that_a_program_could_choose_are_refused(folder):
    with pytest.raises(InputError, match="--meter must be cpu_seconds with --model, got 'operations'"):
        optimise(
            folder / "words.py", folder / "test_words.py", meter="operations", model=Model("m", lambda *_: Reply(""))
        )


def test_people_are_told_who_wrote_what(folder, capsys, monkeypatch):
    steps = (
        Step("range-len", 3, "it is shorter", module.Interval(2, 2, 2, 6)),
        Step("model", 4, "the model 'a\\nb' wrote match", module.Interval(2, 1.5, 3, 6), True),
    )
    asked = Asked("m", "abc", 3, 1200, 4.25, "it stopped")
    found = Optimised(
        "words.py", "cpu_seconds", SLOW, "x = 1\n", "", steps, module.Interval(2, 1.5, 3, 10), model=asked
    )
    monkeypatch.setattr(module, "optimise", lambda *_, **__: found)
    assert main(["code", "optimise", str(folder / "words.py"), "--tests", str(folder / "test_words.py")]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("# line 4: the model 'a\\nb' wrote match\n--- a/words.py\n")
    assert "m (abc): 3 questions, 1,200 tokens, 4.25 s; it stopped" in said.err
    assert "line 4     model: the model" in said.err


@pytest.mark.parametrize(
    ("source", "why"),
    [("http://127.0.0.1:9/v1", "lists no model"), ("http://[", "lists no model"), ("pickled", "safetensors")],
)
def test_a_model_that_cannot_be_had_takes_one_line(folder, capsys, monkeypatch, source, why):
    monkeypatch.chdir(folder)
    (folder / "pickled").mkdir()
    (folder / "pickled" / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    (folder / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert main(["code", "optimise", "words.py", "--tests", "test_words.py", "--model", source]) == 2
    error = capsys.readouterr().err
    assert why in error
    assert "Traceback" not in error


def test_a_server_that_still_loads_its_model_is_told_apart(monkeypatch):
    monkeypatch.setattr(by_model.urllib.request, "urlopen", lambda *_, **__: io.BytesIO(b'{"data": []}'))
    with pytest.raises(InputError, match="may still be loading its model"):
        model_of("http://127.0.0.1:9/v1")


def test_a_model_that_is_too_slow_is_told_the_time_it_had():
    def complete(*_):
        raise TimeoutError("timed out")

    model = Model("m", complete)
    assert list(proposals(model, SLOW, "match", Profile(()), [], [], samples=1, until=time.monotonic() + 100)) == []
    assert re.search(r"timed out \(half of the (100|99\.\d) s that were left\)", model.asked.trouble)


def test_loading_is_part_of_the_time_that_an_answer_may_take(monkeypatch):
    given = []
    monkeypatch.setattr(by_model._Loaded, "_load", lambda _: None)
    monkeypatch.setattr(by_model._Loaded, "_answer", lambda *told: given.append(told[3]) or Reply(""))
    by_model._Loaded("m")("?", 0, 60.0)
    assert 0 < given[0] < 60
    with pytest.raises(TimeoutError, match="while it was loaded"):
        by_model._Loaded("m")("?", 0, 0.0)


@pytest.mark.slow
def test_a_folder_is_loaded_and_asked(folder, capsys, monkeypatch):
    needs_sandbox()
    from tests.tiny import write_tiny_llama

    monkeypatch.setattr(by_model, "NEW_TOKENS", 64)
    write_tiny_llama(folder / "tiny", context=4096)
    run = (folder / "words.py", "--tests", folder / "test_words.py", "--model", folder / "tiny", "--samples", 2)
    assert main(["code", "optimise", *map(str, run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    model = found["model"]
    assert (found["found"], model["name"], model["questions"], model["trouble"]) == (False, "tiny", 2, "")
    assert re.fullmatch("[0-9a-f]{12}", model["fingerprint"])
    assert model["tokens"] > 2 * 64
    complete = model_of(str(folder / "tiny")).complete
    texts = [complete("Make it faster.", draw, 60.0).text for draw in (0, 0, 1, 1, 2)]
    assert texts[0] == texts[1] != texts[2] == texts[3] != texts[4]
    with pytest.raises(InputError, match="the model's context holds 4096"):
        complete("word " * 9000, 0, 60.0)

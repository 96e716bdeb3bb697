import pytest
from tests.tools import needs

from assay.methods.core.programs import processes as room
from assay.methods.core.programs.processes import (
    CompileError,
    compiled,
    program_of,
    pytest_suite,
    python_package,
    run_program,
)
from assay.methods.core.programs.sql import run_sql
from assay.methods.core.programs.workers import Workers
from assay.methods.core.sandbox import Limits, Sandbox

SUM = {
    "python": "print(sum(range(int(input()))))",
    "node": "let n = +require('fs').readFileSync(0, 'utf8'), t = 0; for (let i = 0; i < n; i++) t += i; console.log(t)",
    "c": """#include <stdio.h>
int main(void) { long n, t = 0; scanf("%ld", &n); for (volatile long i = 0; i < n; i++) t += i; printf("%ld\\n", t); }""",
    "cpp": """#include <iostream>
int main() { long n, t = 0; std::cin >> n; for (volatile long i = 0; i < n; i = i + 1) t += i; std::cout << t << std::endl; }""",
}
TOOLS = {"python": "python3", "node": "node", "c": "gcc", "cpp": "g++"}


@pytest.fixture(scope="module")
def sandbox():
    return Sandbox(Limits(wall_seconds=120, cpu_seconds=20, memory_mib=1024))


@pytest.mark.parametrize("language", list(SUM))
def test_whole_programs_answer_and_cost_more_for_more(sandbox, language):
    needs(TOOLS[language])
    program = program_of(SUM[language], language)
    few, many = run_program(sandbox, program, [b"10", b"30000000"])
    assert [few[0].value.strip(), many[0].value.strip()] == ["45", str(sum(range(30_000_000)))]
    assert many[0].cost > few[0].cost + 0.005


def test_a_binary_is_compiled_once(sandbox, monkeypatch):
    first = compiled(SUM["c"], "c")
    monkeypatch.setattr(room, "Sandbox", None)  # nothing may be compiled any more
    assert compiled(SUM["c"], "c").files == first.files


def test_programs_that_do_not_work(sandbox):
    with pytest.raises(CompileError, match="error"):
        compiled("int main(void) { return x; }", "c")
    with pytest.raises(CompileError):  # a compiler reads what it is shown, and it is shown nothing of ours
        compiled('#include "/root/.bashrc"\nint main(void) { return 0; }', "c")
    with pytest.raises(ValueError, match="flags must begin"):
        compiled(SUM["c"], "c", flags=["main.c"])
    [[raised]] = run_program(sandbox, program_of("import sys; print('seen'); sys.exit('bad')", "python"), [b""])
    assert (raised.state, raised.cost) == ("raised", None)
    assert "bad" in raised.error
    [[slow]] = run_program(sandbox, program_of("while True: pass", "python"), [b""], limits=Limits(cpu_seconds=0.3))
    assert slow.state == "time"
    with pytest.raises(ValueError, match="language must be one of"):
        program_of("", "cobol")
    with pytest.raises(ValueError, match="meter must be one of"):
        run_program(sandbox, program_of("", "python"), [b""], meter="operations")


def test_work_of_a_process_that_nobody_waits_for_counts(sandbox):
    """The system adds a child's time to its parent's only where that waits for it."""
    hides = """import os, signal
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
read, write = os.pipe()
if not os.fork():
    os.write(write, str(sum(i * i for i in range(3_000_000))).encode())
    os._exit(0)
print(os.read(read, 100).decode())
"""
    [[hidden]] = run_program(sandbox, program_of(hides, "python"), [b""])
    assert hidden.charged
    assert hidden.cost > 0.1


def test_a_package_runs_as_one(sandbox, tmp_path):
    folder = tmp_path / "tool"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "__main__.py").write_text("from tool.inner import answer\nprint(answer())")
    (folder / "inner.py").write_text("def answer(): return 41 + 1")
    [[ran]] = run_program(sandbox, python_package(tmp_path, "tool"), [b""])
    assert ran.value == "42\n", ran.error
    with pytest.raises(ValueError, match="must hold files"):
        python_package(tmp_path / "nothing", "tool")


def test_a_suite_passes_or_says_what_fails(sandbox, tmp_path):
    (tmp_path / "code.py").write_text("")
    (tmp_path / "mine.py").write_text("def f(): return 1")
    (tmp_path / "test_mine.py").write_text("from mine import f\ndef test_f(): assert f() == 1")
    [[ran]] = run_program(sandbox, pytest_suite(tmp_path), [b""])
    assert ran.state == "returned", ran.error
    assert ran.cost > 0
    (tmp_path / "mine.py").write_text("def f(): return 2")
    [[ran]] = run_program(sandbox, pytest_suite(tmp_path), [b""])
    assert ran.state == "raised"
    assert "assert 2 == 1" in ran.error


def test_queries_are_run_on_a_fresh_database():
    script = "create table t(x int); insert into t values (1), (2), (3);"
    with Workers("operations") as workers:
        [one, again] = run_sql(workers, script, "select x from t where x > 1 order by x", repeats=2)
        assert one.value == [(2,), (3,)]
        assert one.cost == again.cost > 5
        [more] = run_sql(workers, script, "select a.x from t a, t b, t c")
        assert more.cost > one.cost
        assert run_sql(workers, script, "insert into t values (4)")[0].state == "raised"
        assert run_sql(workers, script, "select 1; select 2")[0].state == "raised"
        assert run_sql(workers, script, "select 1 union all select 2", most_rows=1)[0].error.startswith("OverflowError")
        endless = "with recursive n(i) as (select 1 union all select i + 1 from n) select count(*) from n"
        assert run_sql(workers, script, endless, limits=Limits(cpu_seconds=0.3))[0].state == "time"


def test_instructions_of_whole_programs_are_counted_out_of_their_reach(sandbox):
    needs("valgrind")
    needs("gcc")
    few, many = run_program(sandbox, program_of(SUM["c"], "c"), [b"1000", b"200000"], meter="instructions")
    assert few[0].state == many[0].state == "returned", (few[0].error, many[0].error)
    assert 300_000 < many[0].cost - few[0].cost < 5_000_000  # some instructions for each number
    lies = (
        SUM["c"]
        .replace("#include <stdio.h>", "#include <stdio.h>\n#include <unistd.h>")
        .replace(
            "long n, t = 0;",
            'const char lie[] = "==1== Collected : -99999999\\n";'
            " for (int p = 3; p < 2000; p++) write(p, lie, sizeof lie - 1); long n, t = 0;",
        )
    )
    [[lying]] = run_program(sandbox, program_of(lies, "c"), [b"200000"], meter="instructions")
    assert lying.cost is None or lying.cost > many[0].cost

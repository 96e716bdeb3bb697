"""What must hold of MPIrigen's format, its scores, and what answers without a model; and the sandbox's two ranks."""

import random
import re
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tools import needs, needs_sandbox

from assay.methods.code import mpirigen as room
from assay.methods.code.mpirigen import Call, Item, Stripped
from assay.methods.core.sandbox import Limits
from assay.workloads.programs import mpi

TRICKY = r"""
/* a comment with MPI_Init(); in it */ #include <mpi.h>  // and here
#include <stdio.h>
#define CHECK(x) \
    if ((x) != MPI_SUCCESS) MPI_Abort(MPI_COMM_WORLD, 1)
#define TEXT "/* no comment; MPI_Send( */"
static const char *names[] = {"MPI_Recv(a)", "it's"};
struct pair { double value; int rank; } best;
int main(int argc, char **argv) {
    int rank, n = 3, a[2][2] = {{1, 2}, {3, 4}}; MPI_Status status; double t0 = - -1.5e-3, t;
    if (MPI_Init(&argc, &argv) != MPI_SUCCESS) { return 1; } else if (argc > 7) puts("MPI_Finalize();"); else n--;
    CHECK(MPI_Comm_rank(MPI_COMM_WORLD, &rank));
    t = MPI_Wtime() - MPI_Wtime();
    for (int i = 0; i < n; i++) if (rank) MPI_Send(&a[i % 2][(i, 1)], 1,
        MPI_INT, (rank + 1) % 2, ';', /* tag */ MPI_COMM_WORLD);
    do { n++; } while (MPI_Iprobe(0, ')', MPI_COMM_WORLD, &n, &status));
    switch (n) { case ';': break; default: ; }
    printf("%d \"MPI_Bcast(\" ; (\n", rank & 1 ? *a[0] : +n);
    MPI_Finalize(); return 0;
}
"""
PROGRAMS = {**mpi.own(), "tricky": TRICKY}
OPENMP = "void f(int n) {\n#pragma omp parallel for\nfor (int i = 0; i < n; i++) g(i);\n}\n"


def test_taking_calls_out_and_putting_them_back_gives_the_same_tokens():
    for name, text in PROGRAMS.items():
        found = room.take_out(text)
        items = room.read(room.write(found.items))
        random.Random(name).shuffle(items)
        assert room.tokens(room.put_back(found.code, items)) == room.tokens(text), name


def test_every_call_is_an_item_and_none_is_left():
    for name, text in PROGRAMS.items():
        found = room.take_out(text)
        plain = room.calls(" ".join(token.text for token in room.tokens(text) if token.kind != "directive"))
        macros = [call for line in room.layout(text) if line.startswith("#") for call in room.calls(line)]
        assert Counter(call for _, call in found.calls) == Counter([*plain, *macros]), name
        assert not any(room.calls(line) for line in found.code), name
    assert "MPI_Status status;" in room.take_out(TRICKY).code  # types stay, as in the released data


def test_one_line_is_one_item_where_each_holds_one_call():
    for text in mpi.own().values():
        found = room.take_out(text)
        assert len(found.items) == len(found.calls) == len(re.findall(r"MPI_[A-Z]\w*[a-z]\w*\(", text))


def test_line_numbers_say_nothing_of_the_calls():
    """The code is what the program looks like that never had calls; numbers are given when they are gone."""
    text = mpi.own()["ring"]
    without = re.sub(r"MPI_\w+\([^;]*\);", "", text)
    found = room.take_out(text)
    assert list(found.code) == room.layout(without)
    assert [int(line.partition(":")[0]) for line in room.numbered(found.code).splitlines()] == list(
        range(1, len(found.code) + 1)
    )


def test_how_a_person_laid_it_out_does_not_matter():
    for text in PROGRAMS.values():
        lines = room.layout(text)
        assert room.layout(room.indented(lines)) == lines
    one, two = "int main(void){if(a)f();else{g();}}", "int main(void)\n{\n  if (a)\n    f();\n  else {\n    g(); }\n}\n"
    assert room.layout(one) == room.layout(two)


def test_items_are_numbered_at_their_line():
    found = room.take_out("int main(void) { MPI_Init(0, 0); MPI_Barrier(c); work(); MPI_Finalize(); }")
    assert room.write(found.items) == "(2 1, MPI_Init(0, 0);) (2 2, MPI_Barrier(c);) (3 1, MPI_Finalize();)"
    assert room.sample(found) == room.prompt(found.code) + room.write(found.items)
    assert room.prompt(found.code).endswith("4: }\nparallel ")


def test_a_label_is_read_as_a_model_may_have_written_it():
    text = '(1 1, f(")", \';\', (a));) noise (2 x, g();) (3 1, h("open);) (4 2, MPI_Send(&a, 1'
    assert room.read(text) == [Item(1, 1, "f(\")\", ';', (a));")]
    assert room.read("") == []
    assert (
        room.read(f"({'9' * 5000} 1, MPI_Init(0, 0);) (1 {'1' * 5000}, f();)") == []
    )  # digits without an end are no place
    many = [Item(3, 10, "MPI_Barrier(c);"), Item(3, 1, "MPI_Barrier(c);")]
    assert room.read(room.write(many)) == many  # index 10 is not index 1


def test_the_same_serves_other_annotations():
    found = room.take_out(OPENMP, pick=lambda line: line.startswith("#pragma omp"))
    assert found.items == (Item(2, 1, "#pragma omp parallel for"),)
    assert room.tokens(room.put_back(found.code, found.items)) == room.tokens(OPENMP)


@pytest.mark.parametrize("text", ["int a = 'x;", 'puts("open);', "/* open", "#define OPEN MPI_Send(a\nint x;"])
def test_what_is_no_program_is_refused(text):
    with pytest.raises(ValueError, match="program must"):
        room.take_out(text)


def test_a_place_beyond_the_code_is_refused():
    with pytest.raises(ValueError, match=r"lines 0 to 1, got Item\(line=2"):
        room.put_back(["x;"], [Item(2, 1, "f();")])


# ----------------------------------------------------------------------------------------------------------------------- identifiers


def test_identifiers_are_replaced_one_to_one_and_back():
    for name, text in PROGRAMS.items():
        found = room.take_out(text)
        lines = room.merged(found.code, found.items)
        for rng in (None, random.Random(3)):
            names = room.naming(found.code, [item.text for item in found.items], rng=rng)
            back = {new: old for old, new in names.items()}
            assert len(back) == len(names), name
            assert not any(room.stays(old) for old in names), name
            new = [room.renamed(line, names) for line in lines]
            assert [room.renamed(line, back) for line in new] == lines, name
            left = {
                t.text
                for line in new
                if line[0] != "#"
                for t in room.tokens(line)
                if t.kind == "name" and not room.stays(t.text)
            }
            assert all(re.fullmatch(r"(var|arr|func)_\d+", each) for each in left), name


def test_names_of_the_code_say_nothing_of_the_calls():
    for text in PROGRAMS.values():
        found = room.take_out(text)
        alone = room.naming(found.code)
        assert alone.items() <= room.naming(found.code, [item.text for item in found.items]).items()


def test_keywords_strings_and_mpi_stay():
    names = room.naming(["for (size_t i = 0; i < n; i++)", 'printf("n", MPI_INT);'])
    assert names == {"i": "var_1", "n": "var_2"}
    assert room.renamed('printf("n", n, MPI_COMM_WORLD);', names) == 'printf("n", var_2, MPI_COMM_WORLD);'
    assert room.renamed("#define TWICE(n) 2 * n", names) == "#define TWICE(var_2) 2 * var_2"
    assert room.renamed("#include <n.h>", names) == "#include <n.h>"


# ---------------------------------------------------------------------------------------------------------------------------- scores

INIT, END, SEND = (
    Call("MPI_Init", ("&argc", "&argv")),
    Call("MPI_Finalize", ()),
    Call("MPI_Send", ("a", "1", "MPI_INT", "1", "0", "c")),
)
TRUE = [(2, INIT), (5, SEND), (9, END)]


def test_the_truth_scores_one_and_nothing_scores_none():
    for text in PROGRAMS.values():
        found = room.take_out(text)
        whole = room.score(found.calls, room.placed(found.items), tolerance=0)
        assert (whole.location, whole.function, whole.arguments, whole.recall, whole.precision, whole.joint) == (1,) * 6
    empty = room.score(TRUE, [])
    assert (empty.location, empty.function, empty.arguments, empty.precision, empty.joint) == (0, None, None, None, 0)


PREDICTED = st.lists(
    st.tuples(st.integers(0, 12), st.sampled_from([INIT, END, SEND, replace(SEND, arguments=("b", "1"))])), max_size=8
)


@settings(max_examples=25, deadline=None)
@given(predicted=PREDICTED, seed=st.integers(0, 99))
def test_scores_grow_with_the_tolerance_and_mind_no_order(predicted, seed):
    rows = [room.score(TRUE, predicted, tolerance=tolerance) for tolerance in range(4)]
    for before, after in zip(rows, rows[1:], strict=False):
        assert before.location <= after.location
        assert before.matched <= after.matched
        assert before.exact <= after.exact
    mixed = random.Random(seed).sample(predicted, len(predicted))
    one, other = room.score(random.Random(seed).sample(TRUE, 3), mixed), room.score(TRUE, predicted)
    assert replace(one, arguments=None) == replace(other, arguments=None)
    assert one.arguments == pytest.approx(other.arguments)  # a mean, summed in another order
    assert rows[2].exact <= rows[2].matched <= min(3, len(predicted))
    assert rows[2].joint <= rows[2].recall <= rows[2].location


def test_calls_too_many_cost_only_precision():
    one = room.score(TRUE, [(2, INIT)])
    many = room.score(TRUE, [(2, INIT), *[(40, SEND)] * 7])
    assert (one.location, one.function, one.arguments, one.matched) == (
        many.location,
        many.function,
        many.arguments,
        many.matched,
    )
    assert (one.precision, many.precision) == (1.0, 1 / 8)


def test_a_prediction_serves_one_call_only_one_to_one():
    true = [(4, SEND), (5, SEND), (6, SEND)]
    found = room.score(true, [(5, SEND)])
    assert (found.location, found.function) == (1.0, 1.0)  # as the paper counts
    assert (found.matched, found.recall, found.f1) == (1, 1 / 3, 0.5)
    # the first that fits is the best choice: 3 takes 4, so that 6 is left for 7
    assert room.score([(4, SEND), (7, SEND)], [(6, SEND), (3, SEND)]).matched == 2


def test_arguments_are_of_the_best_hit_and_function_of_what_is_located():
    near = [
        (5, replace(SEND, arguments=("b", "1", "MPI_INT"))),
        (6, replace(SEND, arguments=("a", "1", "MPI_INT", "1", "1", "c"))),
    ]
    found = room.score(TRUE, [(2, END), *near])
    assert (found.location, found.function) == (2 / 3, 1 / 2)
    assert found.arguments == 5 / 6
    assert found.exact == 0


def test_of_the_common_core_only_its_functions_count():
    true = [*TRUE, (7, Call("MPI_Wtime", ()))]
    assert room.score(true, TRUE, tolerance=0).location == 3 / 4
    assert room.score(true, [*TRUE, (7, Call("MPI_Wtime", ()))], tolerance=0, core=True).predicted == 3
    with pytest.raises(ValueError, match="truth must hold one call or more"):
        room.score([(1, Call("MPI_Wtime", ()))], [], core=True)


def test_means_leave_out_programs_without_a_hit_as_the_paper_does():
    rows = [room.score(TRUE, TRUE), room.score(TRUE, [])]
    found = room.over_programs(rows)
    assert (found["location"], found["function"], found["without a hit"]) == (0.5, 1.0, 1.0)
    assert room.curve(rows, [2, 3]) == {3: found}
    with pytest.raises(ValueError, match="scores must be"):
        room.over_programs([])
    with pytest.raises(ValueError, match="tolerance must be"):
        room.score(TRUE, TRUE, tolerance=-1)


def test_the_released_scorer_is_as_it_is():
    """A place is a decimal number there, an item ends at the first semicolon, and every comma cuts an argument."""
    assert room.score_as_released("(2 10, MPI_Init(0, 0);)", "(2 1, MPI_Init(0, 0);)", tolerance=0) == (1.0, 1.0, 1.0)
    assert room.score_as_released("(2 1, MPI_Init(0, 0);)", "(3 2, MPI_Init(0, 0);)", tolerance=1) == (0.0, None, None)
    with pytest.raises(ValueError, match="label must hold"):  # a call inside of another is none there
        room.score_as_released("(2 1, f(MPI_Send(a));)", "(2 1, MPI_Send(a);)")
    assert (
        room.score_as_released("(2 1, MPI_Send(g(a, b), c);)", "(2 1, MPI_Send(g(a, x), c);)", tolerance=0)[2] == 2 / 3
    )
    assert (
        room.score([(2, Call("MPI_Send", ("g(a, b)", "c")))], [(2, Call("MPI_Send", ("g(a, x)", "c")))]).arguments
        == 1 / 2
    )
    twice = "(2 1, MPI_Barrier(a);) (2 1, MPI_Barrier(b);)"
    assert room.score_as_released(twice, "(2 1, MPI_Barrier(b);)", tolerance=0) == (1.0, 1.0, 1.0)
    assert room.score_as_released("(2 1, MPI_Send(';');)", "(2 1, MPI_Send(';');)", tolerance=0)[2] == 1.0
    assert (room.calls_as_released(twice), len(room.read(twice))) == (1, 2)  # a place holds one call
    with pytest.raises(ValueError, match="label must hold"):
        room.score_as_released("", "(2 1, MPI_Init(0, 0);)")


# -------------------------------------------------------------------------------------------------------------- without a language model


@pytest.fixture(scope="module")
def known():
    return [room.take_out(text) for text in mpi.own().values()]


def test_the_template_is_the_four_calls_that_every_program_has(known):
    template = room.Template(known)
    assert [part.function for part in template.parts] == ["MPI_Init", "MPI_Comm_rank", "MPI_Comm_size", "MPI_Finalize"]
    found = room.take_out(mpi.own()["hello"])
    assert room.placed(template(found.code)) == list(found.calls)
    assert template(["void f(void)", "{", "}"]) == []  # no main


def test_the_nearest_program_to_a_known_one_is_itself(known):
    """The degenerate setting: what is known comes back as it was, every call in its place."""
    nearest = room.Nearest(known)
    for one in known:
        assert tuple(nearest(one.code)) == one.items


def test_the_nearest_program_keeps_its_places_under_other_names(known):
    one = known[list(mpi.own()).index("dot_product")]
    names = {name: f"{name}_x" for name in room.naming(one.code)}
    found = room.Nearest(known)([room.renamed(line, names) for line in one.code])
    assert [item.line for item in found] == [item.line for item in one.items]


def test_calls_everywhere_have_every_place_and_no_precision(known):
    every = room.everywhere(known)
    rows = [room.score(one.calls, room.placed(every(one.code)), tolerance=0) for one in known]
    assert {row.location for row in rows} == {1.0}
    assert max(row.precision for row in rows) < 0.1


def test_chance_puts_as_many_calls_as_programs_have(known):
    chance = room.at_random(known, seed=1)
    assert chance(known[0].code) == chance(known[0].code)
    assert {len(chance(one.code)) for one in known} <= {len(one.items) for one in known}
    assert all(0 <= item.line <= len(one.code) for one in known for item in chance(one.code))


def test_usual_arguments_are_those_whose_names_the_program_has(known):
    """Another program's names would make counting a weaker rival than it is."""
    other = "int main(void)\n{\nint me;\nMPI_Comm_rank(MPI_COMM_WORLD, &me);\n}"
    usual = room.usual_arguments([*known, room.take_out(other)])
    assert usual("MPI_Comm_rank", 2, ["int rank, me;"]) == ("MPI_COMM_WORLD", "&rank")
    assert usual("MPI_Comm_rank", 2, ["int me;", 'puts("rank");']) == ("MPI_COMM_WORLD", "&me")
    assert usual("MPI_Comm_rank", 2, ["int k;"]) == ("MPI_COMM_WORLD", "&rank")
    assert usual("MPI_Comm_rank", 3, ["int rank;"]) == ()


def test_without_known_programs_there_is_nothing_to_count():
    for make in (room.Template, room.Nearest, room.at_random, room.everywhere, room.usual_arguments):
        with pytest.raises(ValueError, match="known must be"):
            make([])
        with pytest.raises(ValueError, match="known must be"):
            make([Stripped(("x;",), ())])


# ------------------------------------------------------------------------------------------------------------------------- the consumers


def test_a_row_has_the_columns_of_the_released_data():
    row = room.record("hello", mpi.own()["hello"])
    assert list(row) == ["program", "code", "mpi_labels", "full"]
    assert row["full"] == f"{row['code']}\nparallel {row['mpi_labels']}"
    assert row["mpi_labels"].startswith("(5 1, MPI_Init(&argc, &argv);) (5 2, MPI_Comm_rank(")


class Words:
    """A tokenizer of whole words, called as those of transformers are."""

    def __init__(self, texts):
        self.words = sorted({word for text in texts for word in re.findall(r"\w+|\W", text)})
        self.eos_token_id = len(self.words)

    def __call__(self, text, add_special_tokens=True):
        assert not add_special_tokens
        return {"input_ids": [self.words.index(word) for word in re.findall(r"\w+|\W", text)]}


@pytest.fixture(scope="module")
def tokenized():
    text = room.sample(room.take_out(mpi.own()["hello"]))
    return text, Words([text])


def test_a_masked_prompt_leaves_the_label_to_be_learned(tokenized):
    text, words = tokenized
    whole, label = room.masked(text, words), room.masked(text, words, whole=False)
    assert whole["input_ids"] == whole["labels"] == label["input_ids"]
    asked = [wanted for wanted in label["labels"] if wanted != -100]
    assert "".join(words.words[each] for each in asked[:-1]) == text.split("parallel ")[1]
    assert asked[-1] == words.eos_token_id
    assert room.masked(text, words, most=len(whole["input_ids"]) - 1) is None
    with pytest.raises(ValueError, match="text must hold the line"):
        room.masked("no separator", words)
    words.eos_token_id = None
    with pytest.raises(ValueError, match="tokenizer must have an end"):
        room.masked(text, words)
    words.eos_token_id = len(words.words)


@pytest.mark.slow
def test_a_causal_model_of_transformers_takes_the_tokens(tokenized):
    """Its loss with the prompt masked is that of the label alone."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    text, words = tokenized
    label = room.masked(text, words, whole=False)
    asked = [wanted for wanted in label["labels"] if wanted != -100]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=words.eos_token_id + 1,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    model = LlamaForCausalLM(config)
    ids = torch.tensor([label["input_ids"]])
    logits = model(ids).logits[0, -len(asked) - 1 : -1]
    alone = torch.nn.functional.cross_entropy(logits, torch.tensor(asked))
    torch.testing.assert_close(model(ids, labels=torch.tensor([label["labels"]])).loss, alone)


# ------------------------------------------------------------------------------------------------------------------- on two ranks


def test_programs_run_on_two_ranks_and_deadlocks_end():
    needs_sandbox()
    needs("mpicc")
    ring = room.take_out(mpi.own()["ring"])
    (ran,) = room.run(room.put_back(ring.code, ring.items))
    assert (ran.how, dict(ran.printed)) == ("ran", {"token 3": 1}), ran
    deaf = [item for item in ring.items if not item.text.startswith("MPI_Send")]
    limits = Limits(wall_seconds=6, cpu_seconds=0.8, memory_mib=2048, processes=256)
    (hung,) = room.run(room.put_back(ring.code, deaf), limits=limits)
    assert hung.how == "hangs"
    assert not hung.same(ran)
    assert room.run("int main(void) { return MPI_Init(0, 0) + }")[0].how == "does not compile"
    with pytest.raises(ValueError, match="ranks must be"):
        room.run("", [])


def test_without_mpi_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(room.running, "have_mpi", lambda: False)
    with pytest.raises(room.MpiMissing, match="apt install mpich"):
        room.run("int main(void) { return 0; }")

"""PIE: pairs, tags, prompts, retrieval and self-play as plain functions; best@k against all orders; tasks in the sandbox with small C."""

import itertools
import json
import math
import random

import numpy as np
import pytest
from tests.tiny import tiny_model
from tests.tools import needs, needs_sandbox

from assay.methods.code import pie_code_edits as room
from assay.methods.code.pie_code_edits import (
    Edits,
    EditTask,
    Index,
    Pair,
    Submission,
    Test,
    accuracy,
    best_at_k,
    build_pairs,
    correct_at_k,
    distinct,
    high_quality,
    opt_rate,
    performance_tags,
    prompt,
    runtime_best_at_k,
    scores,
    self_play_pairs,
    speedup_best_at_k,
    split_by_problem,
    tagged,
    token_vectors,
    training_records,
    write_records,
)
from assay.methods.code.pie_code_edits.scores import THRESHOLDS
from assay.methods.core.sandbox import Limits, Sandbox

NAMES = "abcdefghij"


@pytest.fixture(scope="module")
def archive():
    """Two hundred submissions of ten problems by three authors, some of them wrong."""
    rng = random.Random(0)
    return [
        Submission(
            f"program {n}", rng.choice(NAMES), rng.choice("uvw"), n, rng.choice([None, *[rng.uniform(1, 100)] * 3])
        )
        for n in range(200)
    ]


@pytest.fixture(scope="module")
def drawn():
    """Programs with eight samples each: wrong, slower, faster."""
    rng = random.Random(1)
    return [Edits(10.0, tuple(rng.choice([None, 20.0, 9.5, 5.0, 0.5, 10.0]) for _ in range(8))) for _ in range(30)]


# ------------------------------------------------------------------------------------------------------------------------- pairs


def test_a_pair_is_of_one_author_and_problem_both_right_the_target_later_and_faster(archive):
    by_text = {one.program: one for one in archive}
    pairs = build_pairs(archive)
    assert len(pairs) > 100
    for pair in pairs:
        source, target = by_text[pair.source], by_text[pair.target]
        assert (source.author, source.problem) == (target.author, target.problem) == (pair.author, pair.problem)
        assert None not in (source.cost, target.cost)
        assert source.order < target.order
        assert pair.target_cost < 0.9 * pair.source_cost
        assert pair.speedup == source.cost / target.cost > 1.1


def test_no_pair_is_left_out_and_the_order_of_the_archive_does_not_matter(archive):
    fits = {
        (a.program, b.program)
        for a, b in itertools.product(archive, archive)
        if (a.author, a.problem) == (b.author, b.problem) and a.cost and b.cost and a.order < b.order
        if b.cost < 0.9 * a.cost
    }
    found = build_pairs(archive)
    assert {(pair.source, pair.target) for pair in found} == fits
    assert build_pairs(archive[::-1]) == found


def test_at_the_threshold_and_at_the_same_time_there_is_no_pair():
    handed = [Submission("a", "p", "u", 1, 10.0), Submission("b", "p", "u", 2, 9.0), Submission("c", "p", "u", 1, 1.0)]
    assert [(pair.source, pair.target) for pair in build_pairs(handed)] == []
    assert len(build_pairs(handed, threshold=0.05)) == 1


@pytest.mark.parametrize("seed", range(5))
def test_no_problem_is_in_two_splits_and_none_is_lost(seed):
    found = split_by_problem(NAMES, {"train": 0.6, "validation": 0.1, "test": 0.3}, seed=seed)
    assert sorted(itertools.chain(*found.values())) == sorted(NAMES)
    assert [len(part) for part in found.values()] == [6, 1, 3]
    assert found == split_by_problem(NAMES[::-1], {"train": 0.6, "validation": 0.1, "test": 0.3}, seed=seed)


def test_the_best_pairs_of_each_problem_are_of_high_quality(archive):
    pairs = build_pairs(archive)
    kept = high_quality(pairs, most=2)
    assert kept == [pair for pair in pairs if pair in kept]
    for problem in {pair.problem for pair in pairs}:
        best = sorted((pair.speedup for pair in pairs if pair.problem == problem), reverse=True)[:2]
        assert sorted((pair.speedup for pair in kept if pair.problem == problem), reverse=True) == best


def test_tags_rise_as_costs_fall_and_the_best_has_ten():
    costs = [float(n) for n in range(1, 101)]
    tags = performance_tags(costs)
    assert tags == sorted(tags, reverse=True)
    assert [tags.count(tag) for tag in range(1, 11)] == [10] * 10
    assert performance_tags([3.0]) == [10]
    assert performance_tags([2.0, 2.0]) == [10, 10]


def test_a_target_is_tagged_among_all_right_programs_of_its_problem():
    handed = [Submission(str(n), "p", "uv"[n % 2], n, 10.0 - n) for n in range(10)]
    assert {pair.target: pair.tag for pair in tagged(build_pairs(handed), handed)}["9"] == 10
    assert {pair.target: pair.tag for pair in tagged(build_pairs(handed), handed)}["2"] == 3
    with pytest.raises(ValueError, match="submissions must hold the target"):
        tagged(build_pairs(handed), handed[:3])


# ---------------------------------------------------------------------------------------------------------- prompts and retrieval


def test_the_best_is_asked_for_and_the_nearest_example_stands_last():
    pairs = [Pair(f"slow {n}", f"fast {n}", "p", "u", 2.0, 1.0, tag=n) for n in (9, 4)]
    text = prompt("the query", examples=pairs)
    assert text.index("slow 4") < text.index("score 4/10") < text.index("slow 9") < text.index("score 9/10")
    assert text.index("fast 9") < text.index("the query") < text.index("score 10/10")
    assert "score" not in prompt("the query", tag=None, examples=pairs)


def test_programs_are_whole_unless_they_are_to_be_torn_as_released():
    program = "x" * 3000
    assert program in prompt(program)
    assert prompt(program, most_characters=room.AS_RELEASED).count("x") == 1500


def test_records_name_the_tag_of_their_own_target_and_can_be_read_again(tmp_path, archive):
    pairs = tagged(build_pairs(archive), archive)
    records = training_records(pairs)
    assert all(f"score {one['tag']}/10" in one["prompt"] and one["completion"].strip() for one in records)
    assert {one["tag"] for one in records} > {10, 9}
    write_records(tmp_path / "train.jsonl", records)
    assert [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()] == records
    with pytest.raises(ValueError, match="pairs must have tags"):
        training_records(build_pairs(archive))
    assert "score" not in training_records(build_pairs(archive), conditioned=False)[0]["prompt"]


@pytest.mark.slow  # it imports peft
def test_peft_trains_on_the_records_with_no_loss_on_the_prompt(archive):
    import peft
    import torch

    records = training_records(tagged(build_pairs(archive)[:4], archive))
    model = peft.get_peft_model(
        tiny_model(), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        total = torch.zeros(())
        for one in records:
            ids = torch.tensor([[ord(c) % 97 for c in one["prompt"] + one["completion"]]])
            labels = ids.clone()
            labels[:, : len(one["prompt"])] = -100
            total = total + model(input_ids=ids, labels=labels).loss
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
        losses.append(total.item())
    assert losses[-1] < losses[0]


def test_the_query_itself_is_never_returned_and_each_source_has_its_fastest_target():
    sources = [f"for (int i = 0; i < {n}; i++) sum += a[i];" for n in range(6)]
    pairs = [Pair(source, f"fast {source}", "p", "u", 4.0, 2.0) for source in sources]
    pairs += [Pair(sources[0], "faster", "p", "u", 4.0, 1.0)]
    index = Index(pairs)
    assert len(index.pairs) == 6
    for source in sources:
        found = index.nearest(source.replace(" ", "\n  "), k=10)
        assert len(found) == 5
        assert source not in [pair.source for pair in found]
    assert "faster" in [pair.target for pair in index.nearest(sources[1], k=10)]


def test_distances_are_those_of_faiss():
    faiss = pytest.importorskip("faiss")
    rng = np.random.default_rng(0)
    vectors = {f"p{n}": rng.normal(size=8).astype(np.float32) for n in range(40)}
    pairs = [Pair(name, name.upper(), "p", "u", 2.0, 1.0) for name in list(vectors)[:30]]
    index = Index(pairs, lambda programs: np.stack([vectors[one] for one in programs]))
    flat = faiss.IndexFlatL2(8)
    flat.add(np.stack([vectors[pair.source] for pair in pairs]))
    for query in list(vectors)[30:]:
        _, [nearest] = flat.search(vectors[query][None], 4)
        assert [pair.source for pair in index.nearest(query, k=4)] == [pairs[at].source for at in nearest]


def test_token_vectors_have_length_one_and_find_what_is_alike():
    loop, other, text = token_vectors(["for (i = 0; i < n; i++)", "for (j = 0; j < n; j++)", "a sentence of words"])
    assert np.linalg.norm(loop) == pytest.approx(1)
    assert np.linalg.norm(loop - other) < np.linalg.norm(loop - text)
    assert not token_vectors([""]).any()


# ---------------------------------------------------------------------------------------------------------------------- self-play


def test_of_programs_that_write_the_same_the_first_is_kept():
    assert distinct([["1 \n2", "4"], ["1\n2\n", "4"], None, ["1\n3", "4"], ["1\n3", "4\n\n"]]) == [0, 3]
    with pytest.raises(ValueError, match="of the same inputs"):
        distinct([["1"], ["1", "2"]])


def test_only_right_samples_with_a_real_gain_become_pairs():
    edits = [Edits(10.0, (None, 4.0, 2.0)), Edits(10.0, (9.5, 30.0, None)), Edits(10.0, (None,) * 3)]
    found = self_play_pairs(["a", "b", "c"], [["a1", "a2", "a3"]] * 3, edits)
    assert [(pair.source, pair.target, pair.speedup) for pair in found] == [("a", "a3", 5.0)]
    with pytest.raises(ValueError, match="must be as many"):
        self_play_pairs(["a"], [], edits)


# ------------------------------------------------------------------------------------------------------------------------ metrics


def test_a_speed_up_is_at_least_one_and_never_falls_as_k_grows(drawn):
    for one in drawn:
        for expected in (False, True):
            values = [speedup_best_at_k(one, k, expected=expected) for k in range(1, 9)]
            assert min(values) >= 1 - 1e-12
            assert all(b >= a - 1e-12 for a, b in itertools.pairwise(values))


def test_without_a_right_sample_it_is_one_and_equal_programs_gain_exactly_nothing():
    assert speedup_best_at_k(Edits(3.0, (None, None)), 2) == 1
    assert runtime_best_at_k(Edits(3.0, (None, None)), 2) == math.inf
    for expected in (False, True):
        assert speedup_best_at_k(Edits(3.0, (3.0,) * 8), 8, expected=expected) == 1
    assert scores([Edits(3.0, (3.0,) * 8)], 8).slower == 0


def test_the_first_k_depend_on_the_order_and_the_expectation_is_the_mean_over_all(drawn):
    for one in drawn[:6]:
        short = Edits(one.source, one.costs[:5])
        for k in range(1, 6):
            orders = [Edits(one.source, order) for order in itertools.permutations(short.costs)]
            for figure in (speedup_best_at_k, correct_at_k):
                by_order = [figure(order, k) for order in orders]
                assert figure(short, k, expected=True) == pytest.approx(sum(by_order) / len(by_order))
    first, last = Edits(8.0, (1.0, None)), Edits(8.0, (None, 1.0))
    assert (speedup_best_at_k(first, 1), speedup_best_at_k(last, 1)) == (8, 1)
    assert speedup_best_at_k(first, 1, expected=True) == speedup_best_at_k(last, 1, expected=True) == 4.5


@pytest.mark.parametrize("expected", [False, True])
def test_opt_falls_with_its_threshold_rises_with_k_and_is_no_more_than_correct(drawn, expected):
    for k in (1, 4, 8):
        shares = [opt_rate(drawn, k, threshold=limit, expected=expected) for limit in THRESHOLDS]
        assert shares == sorted(shares, reverse=True)
        assert scores(drawn, k, expected=expected).correct >= shares[0]
    values = [opt_rate(drawn, k, expected=expected) for k in range(1, 9)]
    assert all(b >= a - 1e-12 for a, b in itertools.pairwise(values))


def test_the_geometric_mean_and_what_is_slower_stand_beside_the_mean():
    found = scores([Edits(100.0, (1.0, 200.0)), Edits(100.0, (None, 150.0))], 2)
    assert found.speedup == best_at_k([Edits(100.0, (1.0, 200.0)), Edits(100.0, (None, 150.0))], 2) == 50.5
    assert found.geometric_mean == pytest.approx(10)
    assert found.slower == pytest.approx(2 / 3)
    assert scores([Edits(1.0, (None,))], 1).slower is None


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: speedup_best_at_k(Edits(1.0, (1.0,)), 2), "k must be a whole number"),
        (lambda: Edits(0.0, ()), "source must be"),
        (lambda: Edits(1.0, (float("nan"),)), "costs must be"),
        (lambda: scores([], 1), "edits must be of one program"),
        (lambda: opt_rate([Edits(1.0, (1.0,))], 1, threshold=0.5), "threshold must be"),
        (lambda: Submission("a", "p", "u", 1, -1.0), "cost must be"),
        (lambda: build_pairs([], threshold=1.0), "threshold must be"),
        (lambda: split_by_problem("ab", {"train": 0.5}), "shares must sum up to 1"),
        (lambda: high_quality([], most=0), "most must be"),
        (lambda: performance_tags([]), "costs must be one or more"),
        (lambda: prompt(" "), "program must be a text"),
        (lambda: prompt("x", tag=11), "tag must be"),
        (lambda: Index([]), "pairs must be one or more"),
        (lambda: Index([Pair("a", "b", "p", "u", 2.0, 1.0)], lambda _: [[math.nan]]), "embed must give finite"),
        (lambda: Index([Pair("a", "b", "p", "u", 2.0, 1.0)]).nearest("a", k=0), "k must be"),
        (lambda: EditTask("", (Test("", "", timed=False),)), "tests must hold one that is timed"),
        (lambda: accuracy("", "1", variant="as_released"), "expected must have one line"),
        (lambda: accuracy("", "1", variant="gem5"), "variant must be one of"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# ------------------------------------------------------------------------------------------------------------- tasks in the sandbox


def test_all_lines_count_and_as_released_does_not_look_behind_the_last():
    assert accuracy("", "") == 1
    assert accuracy("1\n", "1\n2\n") == 0.5
    assert accuracy("1\n", "1\n2\n", variant="as_released") == 1
    assert accuracy("1\n2\n3\n4\n", "1\n2\n", variant="as_released") == accuracy("1\n2\n3\n4\n", "1\n2\n") == 0.5
    assert accuracy("0.5 a", "0.5004 a") == 1
    assert accuracy("0 -0 +7 007", "-0 0 7 +7") == 1
    for expected, wrote in (
        ("3", "²"),
        ("5", "--5"),
        ("5", "-5"),
        ("9" * 5000, "9" * 4999 + "8"),
        ("10", "1"),
        ("1", "+-1"),
    ):
        assert accuracy(expected, wrote) == 0  # whatever a program writes is judged
    assert accuracy("1000 a", "1001 a") == accuracy("0.5", "0.502") == accuracy("1", "nan") == accuracy("7", "x") == 0


SLOW = """
#include <stdio.h>
int main(void) {
    long n, sum = 0;
    scanf("%ld", &n);
    for (volatile long i = 1; i <= n; i++) sum += i;
    printf("%ld\\n", sum);
}
"""
FAST = SLOW.replace("for (volatile long i = 1; i <= n; i++) sum += i;", "sum = n * (n + 1) / 2;")
WRONG = FAST.replace("n + 1", "n")


@pytest.fixture(scope="module")
def sandbox():
    needs("gcc")
    needs("valgrind")
    needs_sandbox()
    return Sandbox(Limits(wall_seconds=60))


def test_samples_are_judged_and_cost_what_they_cost_every_time(sandbox):
    task = EditTask(SLOW, (Test("3", "6\n", timed=False), Test("100000", "5000050000")), language="c")
    edits = task.edits([SLOW, FAST, WRONG, "int main() {", FAST], sandbox)
    assert edits.costs[0] == edits.source > 200_000
    assert edits.costs[1] == edits.costs[4] < 20_000
    assert edits.costs[2:4] == (None, None)
    assert task.measure(FAST, sandbox).cost == pytest.approx(edits.costs[1], rel=1e-3)
    assert task.measure(WRONG, sandbox).why == "test 0: 0% of its output is right"
    assert "does not compile" in task.measure("int main() {", sandbox).why
    with pytest.raises(ValueError, match="source must be right"):
        EditTask(WRONG, task.tests, language="c").edits([FAST], sandbox)
    with pytest.raises(ValueError, match="meter must be one of"):
        task.measure(FAST, sandbox, meter="operations")


@pytest.mark.slow  # the meter's own tests have it too
def test_a_program_cannot_write_its_own_count(sandbox):
    liar = SLOW.replace(
        "#include <stdio.h>",
        "#include <stdio.h>\n#include <unistd.h>\n#include <string.h>\n"
        'static const char *lie = "==2== Collected : 5\\n";',
    ).replace(
        "long n, sum = 0;",
        "long n, sum = 0;\n    for (int fd = 3; fd < 1024; fd++) write(fd, lie, strlen(lie)), close(fd);",
    )
    task = EditTask(SLOW, (Test("100000", "5000050000"),), language="c")
    assert task.measure(liar, sandbox).cost > task.measure(SLOW, sandbox).cost

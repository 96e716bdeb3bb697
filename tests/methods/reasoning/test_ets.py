"""ETS: the integer programme against enumeration, the search, and a cache that holds each token of the tree once."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.tiny import tiny_model
from torch.multiprocessing.reductions import StorageWeakRef

from assay.methods.core.generation.slices import cache_of
from assay.methods.core.reasoning.budget import Budget, Spent
from assay.methods.core.reasoning.generator import Sample, Sampling, TransformersGenerator
from assay.methods.core.reasoning.search import expand
from assay.methods.core.reasoning.selectors import weighted
from assay.methods.core.reasoning.trace import Trace
from assay.methods.core.reasoning.verifier import Chance, LogProbability
from assay.methods.reasoning.ets import (
    Beam,
    Ets,
    KeyValueTrie,
    Reading,
    Rebase,
    TreeGenerator,
    attend,
    choose,
    clusters_of,
    rebase_counts,
    tree_search,
    tree_tokens,
)
from assay.methods.reasoning.ets import trie as trie_module

# ------------------------------------------------------------------------------------------------------------- the programme


def objective(kept, shares, ancestors, lambda_c, lambda_s, clusters, costs=None, ancestor_costs=None):
    """What the programme maximises, written down once more."""
    leaf = costs or [1.0] * len(shares)
    inner = ancestor_costs or {node: 1.0 for path in ancestors for node in path}
    held = {node for i in kept for node in ancestors[i]}
    cost = (sum(leaf[i] for i in kept) + sum(inner[node] for node in held)) / (sum(leaf) + sum(inner.values()))
    covered = len({clusters[i] for i in kept}) / len(set(clusters)) if clusters else 0.0
    return sum(shares[i] for i in kept) - lambda_c * cost + lambda_s * covered, len(held) + len(kept), covered


def enumerated(shares, *rest):
    """The best objective of all sets of leaves."""
    sets = (kept for many in range(1, len(shares) + 1) for kept in itertools.combinations(range(len(shares)), many))
    return max(objective(kept, shares, *rest)[0] for kept in sets)


def random_tree(rng, leaves, depth=3):
    """Shares, ancestors and clusters of leaves below a random tree."""
    ancestors = []
    for _ in range(leaves):
        path, node = ["root"], "root"
        for _ in range(depth - 1):
            node = f"{node}/{rng.integers(3)}"
            path.append(node)
        ancestors.append(path)
    counts = rebase_counts(rng.random(leaves).tolist(), leaves)
    return [count / leaves for count in counts], ancestors, rng.integers(0, 4, leaves).tolist()


def chosen(kept):
    return tuple(i for i, stays in enumerate(kept) if stays)


def test_the_programme_finds_what_enumeration_finds():
    rng = np.random.default_rng(0)
    for _ in range(15):
        shares, ancestors, clusters = random_tree(rng, int(rng.integers(1, 8)))
        lambda_c, lambda_s = float(rng.choice([0.3, 1.0, 3.0])), float(rng.choice([0.0, 0.4, 1.5]))
        tokens = rng.integers(1, 30, len(shares)).astype(float).tolist()
        inner = {node: float(rng.integers(1, 30)) for path in ancestors for node in path}
        for costs, ancestor_costs in ((None, None), (tokens, inner)):
            found = chosen(
                choose(
                    shares,
                    ancestors,
                    lambda_c=lambda_c,
                    lambda_s=lambda_s,
                    clusters=clusters,
                    costs=costs,
                    ancestor_costs=ancestor_costs,
                )
            )
            rest = ancestors, lambda_c, lambda_s, clusters if lambda_s else None, costs, ancestor_costs
            assert objective(found, shares, *rest)[0] == pytest.approx(enumerated(shares, *rest), abs=1e-9)


def test_the_set_is_at_least_as_good_as_rebases_and_as_every_single_leaf():
    rng = np.random.default_rng(1)
    for _ in range(20):
        shares, ancestors, clusters = random_tree(rng, 16)
        found = chosen(choose(shares, ancestors, lambda_s=1.5, clusters=clusters))
        others = [chosen(share > 0 for share in shares), *((i,) for i in range(16))]
        value = objective(found, shares, ancestors, 1.0, 1.5, clusters)[0]
        assert all(value >= objective(kept, shares, ancestors, 1.0, 1.5, clusters)[0] - 1e-9 for kept in others)


def test_a_larger_price_keeps_no_more_nodes_and_a_larger_prize_covers_no_fewer_clusters():
    rng = np.random.default_rng(2)
    fell = rose = 0
    for _ in range(8):
        shares, ancestors, clusters = random_tree(rng, 8)
        nodes, covered = [], []
        for lambda_c in (0.1, 0.5, 1.0, 1.7, 2.9):
            kept = chosen(choose(shares, ancestors, lambda_c=lambda_c))
            nodes.append(objective(kept, shares, ancestors, lambda_c, 0, None)[1])
        for lambda_s in (0.0, 0.13, 0.37, 1.5):
            kept = chosen(choose(shares, ancestors, lambda_c=2.0, lambda_s=lambda_s, clusters=clusters))
            covered.append(objective(kept, shares, ancestors, 2.0, lambda_s, clusters)[2])
        assert nodes == sorted(nodes, reverse=True)
        assert covered == sorted(covered)
        fell += nodes[0] > nodes[-1]
        rose += covered[0] < covered[-1]
    assert fell > 4
    assert rose > 4


def test_an_endless_price_keeps_one_leaf():
    paths = [["r", "a"], ["r", "b", "c"], ["r", "d"]]
    assert choose([0.2, 0.5, 0.3], paths, lambda_c=1e6) == [False, False, True]  # the cheapest, of these the best
    assert choose([0.2, 0.5, 0.3], [["r"]] * 3, lambda_c=1e6) == [False, True, False]


def test_diversity_keeps_a_leaf_that_reward_alone_would_not():
    shares, paths = [0.5, 0.5, 0.0], [["r"], ["r"], ["r", "x"]]
    assert choose(shares, paths, lambda_c=1.0) == [True, True, False]
    assert choose(shares, paths, lambda_c=1.0, lambda_s=1.5, clusters=[0, 0, 1]) == [True, True, True]


def test_what_the_programme_refuses():
    for wrong, name in (
        ({"shares": []}, "shares"),
        ({"shares": [-0.1, 1.1]}, "shares"),
        ({"shares": [math.nan, 1.0]}, "shares"),
        ({"ancestors": [["r"]]}, "ancestors"),
        ({"clusters": [1]}, "clusters"),
        ({"costs": [1.0]}, "costs"),
        ({"costs": [1.0, 0.0]}, "costs"),
        ({"lambda_c": -1.0}, "lambda_c"),
        ({"lambda_s": math.inf}, "lambda_s"),
        ({"ancestor_costs": {"x": 1.0}}, "ancestor_costs"),
    ):
        with pytest.raises(ValueError, match=f"{name} must"):
            choose(**{"shares": [0.5, 0.5], "ancestors": [["r"], ["r"]], **wrong})


# ------------------------------------------------------------------------------------------------------------- allocation


def test_rebase_gives_out_the_width_and_more_to_the_better():
    rng = np.random.default_rng(3)
    for _ in range(200):
        scores, width = rng.random(int(rng.integers(1, 20))).tolist(), int(rng.integers(1, 40))
        counts = rebase_counts(scores, width)
        assert sum(counts) == width
        given = [counts[i] for i in sorted(range(len(scores)), key=lambda i: -scores[i])]
        positive = [count > 0 for count in given]
        assert positive == sorted(positive, reverse=True)  # each gets one while the width lasts, the best first
        assert given[0] == math.ceil(
            width * math.exp(max(scores) / 0.2) / sum(math.exp(s / 0.2) for s in scores) - 1e-9
        )
    assert rebase_counts([0.7] * 4, 4) == [1, 1, 1, 1]
    assert rebase_counts([0.5, 0.5], 3) == [2, 1]
    low, high = 0.27467859843071885, 0.4947031502198378
    # equal ones, as many steps as there are of them left: by rounding a share lies a hair above one
    assert rebase_counts([low, low, high, low, low, high, low, low, low], 16) == [2, 1, 4, 1, 1, 4, 1, 1, 1]
    assert rebase_counts([1.0, 0.0], 100, temperature=0.01) == [100, 0]
    for wrong in (([], 1), ([0.5], 0), ([math.nan], 2)):
        with pytest.raises(ValueError, match=r"scores|width"):
            rebase_counts(*wrong)
    with pytest.raises(ValueError, match="temperature"):
        rebase_counts([1.0], 1, temperature=0)


def traces(scores, texts):
    return [
        Trace("p", tuple(steps), scores=(0.5,) * (len(steps) - 1) + (score,))
        for score, steps in zip(scores, texts, strict=True)
    ]


def letters(texts):
    """A vector for each text by its letters."""
    return np.array([[text.count(letter) + 1e-3 for letter in "abcdef"] for text in texts])


def test_ets_without_a_price_is_rebase():
    rng = np.random.default_rng(4)
    for _ in range(30):
        scores = rng.random(9).tolist()
        given = traces(scores, [(f"{rng.integers(3)}\n", f"{rng.integers(3)}\n") for _ in scores])
        assert Ets(lambda_c=0.0, lambda_s=0.0)(given, 6) == Rebase()(given, 6)
        assert Ets(lambda_c=0.0, embed=letters)(given, 6) == Rebase()(given, 6)


def test_only_kept_leaves_go_on_and_they_get_the_whole_width():
    rng = np.random.default_rng(5)
    pruned = 0
    for unit in ("nodes", "tokens"):
        for _ in range(8):
            scores = rng.random(10).tolist()
            steps = [(f"{rng.integers(4)}\n", f"{'ab'[rng.integers(2)]}{rng.integers(9)}\n") for _ in scores]
            given = [
                replace(trace, samples=tuple(Sample(s, (1,) * len(s), (), "stop", Spent()) for s in trace.steps))
                for trace in traces(scores, steps)
            ]
            ets = Ets(lambda_c=2.0, lambda_s=0.2, embed=letters, unit=unit)
            kept, counts = ets.kept(given, 10), ets(given, 10)
            assert sum(counts) == 10
            assert all(stays or not count for stays, count in zip(kept, counts, strict=True))
            pruned += sum(Rebase()(given, 10)[i] > 0 and not kept[i] for i in range(10))
    assert pruned > 10


def test_equal_texts_are_one_ancestor_and_shared_ones_are_cheaper():
    """The best two leaves below one step are taken, where apart each would pay for a step of its own."""
    together = traces([0.5] * 3, [("a\n", "x\n"), ("a\n", "y\n"), ("b\n", "z\n")])
    assert Ets(lambda_c=1.9, lambda_s=0.0).kept(together, 3) == [True, True, False]
    apart = traces([0.5] * 3, [("a\n", "x\n"), ("c\n", "y\n"), ("b\n", "z\n")])
    assert sum(Ets(lambda_c=1.9, lambda_s=0.0).kept(apart, 3)) == 1


def test_equal_leaves_are_one_node_and_stay_or_go_together():
    """Two copies of a leaf cost what one does, and are worth both: apart each would be too dear for its reward."""
    given = traces([0.5] * 4, [("a\n", "x\n"), ("a\n", "x\n"), ("b\n", "y\n"), ("c\n", "z\n")])
    ets = Ets(lambda_c=1.8, lambda_s=0.0)
    assert ets.kept(given, 4) == [True, True, False, False]
    assert ets(given, 4) == [2, 2, 0, 0]
    rng = np.random.default_rng(7)
    for unit in ("nodes", "tokens"):
        for _ in range(6):
            texts = [(f"{rng.integers(2)}\n", f"{'ab'[rng.integers(2)]}{'c' * rng.integers(3)}\n") for _ in range(9)]
            given = [
                replace(trace, samples=tuple(Sample(s, (1,) * len(s), (), "stop", Spent()) for s in trace.steps))
                for trace in traces(rng.random(9).tolist(), texts)
            ]
            found = Ets(lambda_c=2.0, lambda_s=0.4, embed=letters, unit=unit).kept(given, 9)
            worth = by_text(found, given, unit)
            leaves = list(dict.fromkeys(trace.text for trace in given))
            sets = itertools.product([False, True], repeat=len(leaves))
            best = max(
                by_text([dict(zip(leaves, own, strict=True))[trace.text] for trace in given], given, unit)
                for own in sets
                if any(own)
            )
            assert worth == pytest.approx(best, abs=1e-9)


def by_text(kept, given, unit):
    """What a set of traces is worth at a price of 2 and a prize of 0.4, counted over texts."""
    counts = rebase_counts([trace.score for trace in given], 9)
    sizes = {"".join(t.steps[:k]): len(t.steps[k - 1]) for t in given for k in range(1, len(t.steps) + 1)}
    if unit == "nodes":
        sizes = dict.fromkeys(sizes, 1) | {"": 1}
    held = {"".join(t.steps[:k]) for t, own in zip(given, kept, strict=True) if own for k in range(len(t.steps) + 1)}
    last = list(dict.fromkeys(trace.steps[-1] for trace in given))
    number = dict(zip(last, clusters_of(letters(last)), strict=True)) if len(last) > 1 else {}
    covered = {number[t.steps[-1]] for t, own in zip(given, kept, strict=True) if own and number}
    reward = sum(count for count, own in zip(counts, kept, strict=True) if own) / 9
    cost = sum(size for text, size in sizes.items() if text in held) / sum(sizes.values())
    return reward - 2.0 * cost + (0.4 * len(covered) / len(set(number.values())) if number else 0.0)


def test_how_often_a_step_was_written_does_not_move_the_clusters():
    """Three that lie in a row: the last is near the middle one, and far from the first, which comes four times."""
    angles = {"x\n": 0.0, "y\n": 0.245, "z\n": 0.53}

    def embed(texts):
        return np.array([[math.cos(angles[text]), math.sin(angles[text])] for text in texts])

    given = traces([0.5] * 6, [(f"{k}\n", text) for k, text in enumerate(["x\n"] * 4 + ["y\n", "z\n"])])
    ets = Ets(embed=embed, cut=0.1)
    assert ets._clusters([trace.steps[-1] for trace in given]) == [0] * 6


def test_clusters_are_those_of_the_last_steps():
    seen = []

    def embed(texts):
        seen.append(list(texts))
        return letters(texts)

    given = traces([0.5] * 4, [("d\n", "a\n"), ("e\n", "a\n"), ("f\n", "b\n"), ("d\n", "aa\n")])
    Ets(embed=embed).kept(given, 4)
    assert seen == [["a\n", "b\n", "aa\n"]]  # each text once
    Ets(embed=embed, lambda_s=0.0).kept(given, 4)
    Ets(embed=embed).kept([given[0], given[1]], 4)
    assert len(seen) == 1  # without a prize, or of equal texts, nothing is embedded
    vectors = np.array([[1.0, 0, 0], [1, 0.01, 0], [0, 1, 0], [0, 1, 0.9]])
    assert clusters_of(vectors) == [0, 0, 1, 2]
    assert clusters_of(vectors, cut=0.5) == [0, 0, 1, 1]
    for wrong in (np.zeros((2, 2)), np.array([[np.nan, 1.0]]), np.ones(3)):
        with pytest.raises(ValueError, match="vectors"):
            clusters_of(wrong)
    with pytest.raises(ValueError, match="embed must give"):
        Ets(embed=lambda texts: np.ones((1, 2))).kept(given, 4)
    with pytest.raises(ValueError, match="lambda_c"):
        Ets(lambda_c=-1)
    with pytest.raises(ValueError, match="unit"):
        Ets(unit="bytes")


def test_beam_search_continues_the_best_equally():
    assert Beam()(traces([0.1, 0.9, 0.5, 0.4], [("a",)] * 4), 4) == [0, 2, 2, 0]
    assert Beam()(traces([0.1, 0.9], [("a",)] * 2), 7) == [3, 4]


# ------------------------------------------------------------------------------------------------------------- the trie


def own_cache(rows, tokens, *, seed=0, layers=2):
    torch.manual_seed(seed)
    return cache_of([(torch.randn(rows, 2, tokens, 4), torch.randn(rows, 2, tokens, 4)) for _ in range(layers)])


def test_the_trie_holds_each_token_once():
    trie = KeyValueTrie()
    first = own_cache(1, 3)
    trie.add([[7, 8, 9]], first)
    assert trie.tokens == 3  # a chain costs its tokens
    more = own_cache(3, 2, seed=1)
    trie.add([[7, 8, 9, 1, 2], [7, 8, 9, 1, 3], [7, 8, 9, 1, 2]], more)
    assert trie.tokens == 6  # siblings add their own tokens only, equal ones nothing
    assert trie.nbytes == 6 * 2 * 2 * 2 * 4 * 4
    slots = trie.match([7, 8, 9, 1, 3, 5])
    assert len(slots) == 5
    for layer in range(2):
        keys = trie.keys[layer][:, slots]
        assert torch.equal(keys[:, :3], first.layers[layer].keys[0])
        assert torch.equal(keys[:, 3], more.layers[layer].keys[0, :, 0])  # the first that came
        assert torch.equal(keys[:, 4], more.layers[layer].keys[1, :, 1])
    with pytest.raises(ValueError, match="texts must be held"):
        trie.add([[7, 5, 5, 5]], own_cache(1, 2))
    with pytest.raises(ValueError, match="rows must be"):
        trie.add([[7, 8, 9, 4]], own_cache(1, 1), [1])


def test_what_is_pruned_is_really_given_back():
    trie = KeyValueTrie()
    trie.add([[1]], own_cache(1, 1))
    for step in range(2, 6):
        trie.add([[1, step, step], [1, step, 9]], own_cache(2, 2, seed=step))
    before = {ids: trie.keys[1][:, trie.match(ids)].clone() for ids in [(1, 3, 9), (1, 4, 4)]}
    storages = [StorageWeakRef(x.untyped_storage()) for x in (*trie.keys, *trie.values)]
    trie.keep([[1, 3, 9], [1, 4, 4, 8]])
    assert trie.tokens == 5
    assert trie.nbytes == 5 * 2 * 2 * 2 * 4 * 4
    for ids, keys in before.items():
        assert torch.equal(trie.keys[1][:, trie.match(ids)], keys)
    assert len(trie.match([1, 2, 2])) == 1
    del before
    assert all(storage.expired() for storage in storages)
    trie.keep([])
    assert trie.tokens == trie.nbytes == 0


@pytest.mark.parametrize("worth", [1, 4, 10_000])
@pytest.mark.parametrize("new", [1, 3])
def test_attention_over_the_tree_is_that_over_each_text(monkeypatch, worth, new):
    """Stretches shared, private, and both; grouped heads; a row that ends where another goes on, and one with nothing before it."""
    monkeypatch.setattr(trie_module, "WORTH", worth)
    trie = KeyValueTrie()
    texts = [[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 6, 7]]
    trie.add(texts, own_cache(3, 4))
    paths = sorted([trie.match(texts[0]), trie.match([1, 2, 3]), trie.match(texts[2]), trie.match(texts[1]), []])
    reading = Reading(trie, paths)
    assert len(reading.shared) == {1: 2, 4: 1, 10_000: 0}[worth]
    torch.manual_seed(1)
    query, keys, values = torch.randn(5, 6, new, 4), torch.randn(5, 2, new + 2, 4), torch.randn(5, 2, new + 2, 4)
    out = attend(query, keys, values, reading, 1, 0.5)
    for row, path in enumerate(paths):
        k = torch.cat([trie.keys[1][:, path], keys[row]], 1).repeat_interleave(3, 0)
        v = torch.cat([trie.values[1][:, path], values[row]], 1).repeat_interleave(3, 0)
        scores = query[row] @ k.transpose(1, 2) * 0.5
        seen = torch.ones(new, k.shape[1], dtype=torch.bool).tril(k.shape[1] - new)
        wanted = scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v
        torch.testing.assert_close(out[row], wanted)


def test_each_row_reads_its_own_path_and_shared_stretches_once():
    rng = np.random.default_rng(6)
    for _ in range(30):
        paths = sorted([*range(70), *rng.integers(100, 103, rng.integers(0, 5)).tolist()] for _ in range(7))
        reading = Reading(KeyValueTrie(), paths)
        for row, path in enumerate(paths):
            own = [slot for first, end, _, slots in reading.shared if first <= row < end for slot in slots.tolist()]
            if reading.private is not None:
                mask = (
                    torch.ones_like(reading.private[row], dtype=torch.bool)
                    if reading.mask is None
                    else reading.mask[row]
                )
                own += reading.private[row][mask].tolist()
            assert sorted(own) == sorted(path)
        assert sum(len(slots) for *_, slots in reading.shared) < 7 * 70 / 5


# ------------------------------------------------------------------------------------------------------------- the generator


class Letters:
    """A tokenizer of single characters."""

    words = "\n ab123=+"

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [self.words.index(letter) for letter in text]}

    def decode(self, tokens):
        return "".join(self.words[token] for token in tokens)


@pytest.fixture(scope="module")
def model():
    return tiny_model(vocab_size=len(Letters.words), initializer_range=0.5)


SAMPLING = Sampling(temperature=1.0, max_new_tokens=6, stop=("\n",))


@pytest.mark.parametrize("worth", [1, 64])
def test_samples_are_those_of_a_generator_without_a_tree(model, monkeypatch, worth):
    """Several prompts, some of which go on from others, in batches of another size; then after pruning."""
    monkeypatch.setattr(trie_module, "WORTH", worth)
    plain, tree = TransformersGenerator(model, Letters(), name="m"), TreeGenerator(model, Letters(), name="m", batch=5)
    prompts = ["1 + 2 =", "a", "1 + 2 = 3\nab"]
    attention = model.config._attn_implementation
    for seed in range(3):
        wanted, found = (generator(prompts, SAMPLING, n=4, first=1, seed=seed) for generator in (plain, tree))
        for own, others in zip(found, wanted, strict=True):
            for one, other in zip(own, others, strict=True):
                assert (one.tokens, one.text, one.ended, one.matched) == (
                    other.tokens,
                    other.text,
                    other.ended,
                    other.matched,
                )
                assert one.logprobs == pytest.approx(other.logprobs, abs=1e-3)
                assert (one.spent.prompt, one.spent.completion) == (other.spent.prompt, other.spent.completion)
        prompts = [prompt + own[1].text for prompt, own in zip(prompts, wanted, strict=True)] + [prompts[0]]
        tree.keep(prompts[seed:])
        assert tree.trie.tokens <= sum(map(len, prompts))
    assert found[-1][0].spent.cached == found[-1][0].spent.prompt - 1  # held but for the last token, which is run again
    assert model.config._attn_implementation == attention
    with torch.no_grad():
        assert model(torch.tensor([[3, 4]])).logits.isfinite().all()


def test_uneven_numbers_run_in_one_batch(model, monkeypatch):
    tree, calls = TreeGenerator(model, Letters(), name="m"), []
    run = TreeGenerator._run
    monkeypatch.setattr(
        TreeGenerator, "_run", lambda self, tokens, *rest: calls.append(tokens.shape[0]) or run(self, tokens, *rest)
    )
    sampling = Sampling(temperature=1.0, max_new_tokens=4)
    found = expand(tree, [Trace("ab"), Trace("12"), Trace("ab")], [3, 1, 2], sampling, delimiter="+++")
    assert [len(own) for own in found] == [3, 1, 2]
    assert max(calls) == 6
    assert calls[0] == 2  # each prompt is read once
    one_by_one = expand(TransformersGenerator(model, Letters()), [Trace("ab")], [5], sampling, delimiter="+++")[0]
    assert [t.text for t in found[0] + found[2]] == [t.text for t in one_by_one]
    assert tree.uneven([], SAMPLING, [], []) == []
    with pytest.raises(ValueError, match="counts and firsts"):
        tree.uneven(["ab"], SAMPLING, [1, 2], [0])
    with pytest.raises(ValueError, match="at least one token"):
        tree([""], SAMPLING)


def test_models_that_do_not_see_everything_are_refused():
    with pytest.raises(ValueError, match="windows"):
        TreeGenerator(tiny_model("Mistral", sliding_window=8), Letters())
    with pytest.raises(ValueError, match="model must"):
        TreeGenerator(torch.nn.Linear(2, 2), Letters())


@pytest.mark.parametrize("kind", ["Qwen2", "Mistral"])
def test_other_models_and_half_precision(kind):
    changes = {"sliding_window": None} if kind == "Mistral" else {}
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model(kind, vocab_size=len(Letters.words), **changes).to(dtype)
        greedy = replace(SAMPLING, temperature=0.0)
        wanted = TransformersGenerator(model, Letters(), name="m")(["ab 1", "ab 2"], greedy, n=2)
        found = TreeGenerator(model, Letters(), name="m")(["ab 1", "ab 2"], greedy, n=2)
        if dtype == torch.float32:
            assert [[s.tokens for s in own] for own in found] == [[s.tokens for s in own] for own in wanted]
        else:
            near = [
                a.logprobs[0] == pytest.approx(b.logprobs[0], abs=0.1) for a, b in zip(found[0], wanted[0], strict=True)
            ]
            assert all(near)


# ------------------------------------------------------------------------------------------------------------- the search


class Lines:
    """Writes lines of one letter by number; the third ends. Says what it was asked to keep."""

    name = "lines"

    def __init__(self):
        self.kept = []

    def __call__(self, prompts, sampling, *, n=1, first=0, seed=0):
        return [[self.line(prompt, k, k == first) for k in range(first, first + n)] for prompt in prompts]

    def line(self, prompt, k, reads):
        matched = "" if prompt.count("\n") >= 2 else "\n"
        spent = Spent(len(prompt) if reads else 0, 1, calls=1)
        return Sample("abcdefghijklmnop"[k % 16], (k % 16,), (-0.1 * (k + 1),), "stop", spent, matched)

    def keep(self, prompts):
        self.kept.append(list(prompts))


def test_a_search_draws_the_width_each_round_and_prunes_the_cache():
    writer, budget = Lines(), Budget()
    found = tree_search(
        writer, LogProbability(), "p", SAMPLING, width=6, select=Ets(lambda_c=2.0, lambda_s=0.0), budget=budget
    )
    assert [r.drawn for r in found.rounds] == [6, 6, 6]
    assert [r.unfinished for r in found.rounds] == [6, 6, 0]
    assert all(trace.finished and len(trace.steps) == len(trace.scores) == 3 for trace in found.traces)
    assert len(found.traces) == 6
    assert [len(kept) for kept in writer.kept] == [r.kept for r in found.rounds[:2]]
    assert budget.spent("solve").completion == 18
    kept = {text[1:] for text in writer.kept[1]}
    assert {"".join(trace.steps[:2]) for trace in found.traces} == kept  # whatever goes on was kept
    assert found.tokens == sum(r.tokens for r in found.rounds[:2]) / 2
    assert weighted([t.text[-1] for t in found.traces], [t.score for t in found.traces])


def test_finished_traces_take_their_width_with_them():
    found = tree_search(
        Lines(),
        Chance(),
        "p",
        SAMPLING,
        width=5,
        select=Rebase(),
        finished=lambda text: text.count("\n") == 1 and text < "c",
    )
    assert [r.drawn for r in found.rounds] == [5, 3, 3]
    assert sum(len(trace.steps) == 1 for trace in found.traces) == 2
    short = tree_search(Lines(), Chance(), "p", SAMPLING, width=5, select=Rebase(), rounds=1)
    assert [trace.finished for trace in short.traces] == [False] * 5
    stopped = tree_search(Lines(), Chance(), "p", SAMPLING, width=5, select=Rebase(), budget=Budget(tokens=1))
    assert len(stopped.rounds) == 1


def test_a_selector_that_does_not_share_out_the_width_is_refused():
    for select in (lambda traces, width: [1] * len(traces), lambda traces, width: [width]):
        with pytest.raises(ValueError, match="select must share out"):
            tree_search(Lines(), Chance(), "p", SAMPLING, width=3, select=lambda t, w, s=select: [0, *s(t, w)])
    with pytest.raises(ValueError, match="width"):
        tree_search(Lines(), Chance(), "p", SAMPLING, width=0, select=Rebase())


def test_tokens_of_the_tree_are_those_that_the_trie_holds(model):
    """A search by a model: what the cache holds each round is the tree, but for the last token of a leaf, which was not run yet."""
    tree, seen = TreeGenerator(model, Letters(), name="m"), []

    class Looking(Chance):
        def score(self, traces):
            prompt = Letters()("1 + 2")["input_ids"]
            whole = [tuple(prompt) + sum((s.tokens for s in trace.samples), ()) for trace in traces]
            run = {tokens[:k] for tokens in whole for k in range(1, len(tokens))}
            seen.append((tree_tokens([trace for trace in traces if not trace.finished]), len(run), tree.trie.tokens))
            return super().score(traces)

    options = {"width": 6, "select": Rebase(), "rounds": 4, "delimiter": "a"}
    found = tree_search(tree, Looking(), "1 + 2", SAMPLING, **options)
    assert len(found.rounds) > 2
    for round_, (tokens, nodes, held) in zip(found.rounds, seen, strict=True):
        assert round_.tokens == tokens
        assert held == nodes
    plain = TransformersGenerator(model, Letters(), name="m")
    again = tree_search(plain, Chance(), "1 + 2", SAMPLING, **options)
    assert [trace.text for trace in again.traces] == [trace.text for trace in found.traces]


def test_it_works_with_a_tokenizer_of_transformers(tmp_path):
    """Tokens that hold the delimiter and more: the text is what counts, and the tree is read anew from where it differs."""
    from tokenizers import Tokenizer, models

    vocabulary = {word: i for i, word in enumerate(["a", "b", "c", "\n", "\n\n", " "])}
    fast = Tokenizer(models.BPE(vocabulary, [("\n", "\n")], unk_token=None))
    fast.save(str(tmp_path / "tokenizer.json"))
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert tokenizer("a\n\nb")["input_ids"] == [0, 4, 1]
    model = tiny_model(vocab_size=6, pad_token_id=None, bos_token_id=None)
    sampling = Sampling(temperature=1.5, max_new_tokens=5)
    runs = [
        tree_search(kind(model, tokenizer, name="m"), Chance(), "ab", sampling, width=5, select=Rebase(), rounds=4)
        for kind in (TreeGenerator, TransformersGenerator)
    ]
    assert [trace.text for trace in runs[0].traces] == [trace.text for trace in runs[1].traces]
    assert any(4 in sample.tokens for trace in runs[0].traces for sample in trace.samples)

"""A sequence's floats do not depend on what runs beside it: other rows, threads, `run` or `extend`, its pages' places."""

from __future__ import annotations

import contextlib
import random

import pytest
import torch
from tests.methods.builtin.test_decode_loop import EXACT, compiled, filled, tiny
from transformers import Qwen2Config, Qwen2ForCausalLM

from assay.methods.builtin import decode_loop as dl
from assay.methods.builtin.decode_loop import Decoder, Sampling
from assay.methods.core import kernels
from assay.methods.core.generation.paged import PAGE, Sequence

KINDS = ("fp32", "bf16", "int8", "int4")
SMALL = {"num_hidden_layers": 2, "max_position_embeddings": 2048}


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model():
    return tiny(**SMALL)


@pytest.fixture(scope="module")
def windowed():
    """Half of its layers see 37 positions."""
    return tiny(Qwen2ForCausalLM, Qwen2Config, **SMALL, use_sliding_window=True, sliding_window=37, max_window_layers=1)


def logits_of(decoder, lengths, rows, steps=1, count=1):
    """The logits of these rows of a batch that is always the same, after `steps` greedy steps, and their answers."""
    pool, sequences = filled(decoder, lengths)
    with threads(count):
        return decoder.run(
            pool, [sequences[row] for row in rows], [1 + row % 100 for row in rows], steps, want_logits=True
        )


@compiled
@pytest.mark.parametrize("cache", ["bfloat16", "float32"])
@pytest.mark.parametrize("weights", KINDS)
def test_a_row_is_the_same_alone_in_any_batch_and_with_any_threads(model, windowed, weights, cache):
    draw = random.Random(weights + cache)
    for made in (model, windowed):
        decoder = Decoder(made, weights=weights, cache=cache)
        for trial in range(3):
            lengths = [draw.choice([1, 15, 16, 17, 255, 256, 257, draw.randint(1, 600)]) for _ in range(12)]
            alone = [logits_of(decoder, lengths, [row], count=1 + row % 3) for row in range(len(lengths))]
            for size in (2, 3, 5, 9, 12):
                rows = draw.sample(range(12), size)
                chosen, found = logits_of(decoder, lengths, rows, count=draw.choice([1, 2, 3, 5]))
                for i, row in enumerate(rows):
                    assert torch.equal(found[i], alone[row][1][0]), (trial, rows, row)
                    assert chosen[i, 0] == alone[row][0][0, 0]


@compiled
@pytest.mark.parametrize("weights", KINDS)
def test_long_sequences_beside_short_ones(model, weights):
    """Where the work is cut between threads, and where it is not, chunks are put together in the same order."""
    decoder = Decoder(model, weights=weights)
    lengths = [1500, 3, 900, 1, 40, 700]
    alone = [logits_of(decoder, lengths, [row], steps=3, count=1) for row in range(6)]
    for rows, count in (
        ([0], 4),
        ([0, 1], 2),
        ([1, 0, 2], 3),
        (list(range(6)), 1),
        (list(range(6)), 2),
        ([5, 4, 3, 2], 4),
    ):
        chosen, found = logits_of(decoder, lengths, rows, steps=3, count=count)
        for i, row in enumerate(rows):
            assert torch.equal(found[i], alone[row][1][0]), (rows, row)
            assert torch.equal(chosen[i], alone[row][0][0])


@compiled
@pytest.mark.parametrize("weights", KINDS)
def test_a_large_batch(model, weights):
    """More rows than are multiplied at once, of which some end early."""
    decoder = Decoder(model, weights=weights)
    lengths = [1 + 3 * i % 40 for i in range(70)]
    chosen, _ = logits_of(decoder, lengths, range(70), steps=4)
    for row in (0, 33, 69):
        assert torch.equal(logits_of(decoder, lengths, [row], steps=4)[0][0], chosen[row])
    ends = chosen[:, 1].unique().tolist()[::2]
    pool, sequences = filled(decoder, lengths)
    made, _ = decoder.run(pool, sequences, [1 + row % 100 for row in range(70)], 4, eos=ends)
    for row, (answer, whole) in enumerate(zip(made.tolist(), chosen.tolist(), strict=True)):
        stop = next((i + 1 for i, token in enumerate(whole) if token in ends), 4)
        assert answer == whole[:stop] + [-1] * (4 - stop)
        assert sequences[row].length == lengths[row] + stop


@compiled
@pytest.mark.parametrize("head_dim", [16, 48, 96])
def test_odd_heads(head_dim):
    """Groups of heads whose width the integer kernels cannot take apart."""
    made = tiny(num_attention_heads=2, num_key_value_heads=2, head_dim=head_dim, hidden_size=64, num_hidden_layers=1)
    for weights in ("int8", "fp32"):
        decoder, lengths = Decoder(made, weights=weights), [5, 30, 300, 17, 2, 9, 250, 31, 8, 100]
        _, found = logits_of(decoder, lengths, range(10), count=1)
        for row in range(10):
            assert torch.equal(logits_of(decoder, lengths, [row], count=2)[1][0], found[row])


# ---- several tokens at once


def read(pool, sequence):
    return pool.read(sequence.pages, 0, sequence.length)


@pytest.mark.parametrize("load", [kernels.load, lambda name: False])
@pytest.mark.parametrize("weights", KINDS)
def test_extend_is_run(model, windowed, weights, load, monkeypatch):
    """The same logits, the same keys and values, whatever comes together in one pass."""
    monkeypatch.setattr(kernels, "load", load)
    slow = not load("decode")
    same = torch.testing.assert_close if slow else lambda a, b: torch.testing.assert_close(a, b, atol=0, rtol=0)
    for made in (windowed,) if slow else (model, windowed):
        decoder = Decoder(made, weights=weights)
        lengths, sizes = ((3, 50), (2, 1)) if slow else ((1, 20, 255, 500), (7, 1, 90, 3))
        fed = [torch.randint(1, 101, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in sizes]
        pool, ours = filled(decoder, lengths, room=100)
        found = decoder.extend(pool, list(zip(ours, fed, strict=True)), logits="all")
        other, theirs = filled(decoder, lengths, room=100)
        expected = [
            decoder.run(other, [sequence], [token], 1, want_logits=True)[1]
            for sequence, tokens in zip(theirs, fed, strict=True)
            for token in tokens
        ]
        same(found, torch.cat(expected))
        for mine, his in zip(ours, theirs, strict=True):
            assert mine.length == his.length
            assert all(torch.equal(a, b) for a, b in zip(read(pool, mine), read(other, his), strict=True)) or slow
        third, again = filled(decoder, lengths, room=100)
        last = decoder.extend(third, list(zip(again, fed, strict=True)), logits="last")
        ends = torch.tensor(sizes).cumsum(0) - 1
        same(last, found[ends])
        none = decoder.extend(third, [(again[0], [5])], logits="none")
        assert none.shape == (0, 101)
        assert again[0].length == lengths[0] + sizes[0] + 1


@compiled
def test_a_long_feed_goes_in_pieces(model, monkeypatch):
    decoder = Decoder(model, weights="int8")
    tokens = torch.randint(1, 101, (150,), generator=torch.Generator().manual_seed(0)).tolist()

    def fed(pieces, size=64):
        monkeypatch.setattr(dl.decoder, "PASS", size)
        pool = decoder.new_pool(20)
        sequence = Sequence(pool.take(10))
        for first, stop in pieces:
            found = decoder.extend(pool, [(sequence, tokens[first:stop])], logits="last")
        return found, read(pool, sequence)

    whole = fed([(0, 150)])
    for other in (fed([(0, 150)], 7), fed([(0, 1), (1, 100), (100, 150)]), fed([(0, 64), (64, 150)])):
        assert torch.equal(other[0], whole[0])
        assert torch.equal(other[1][0], whole[1][0])
        assert torch.equal(other[1][1], whole[1][1])


@compiled
def test_sequences_that_share_a_beginning(model):
    """Full pages are held together, the last partial one is copied: the answers are those of sequences of their own."""
    decoder = Decoder(model, weights="int4")
    prompt = torch.randint(1, 101, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    pool = decoder.new_pool(20)
    first = Sequence(pool.take(4))
    decoder.extend(pool, [(first, prompt)], logits="none")
    full = first.length // PAGE
    pool.hold(first.pages[:full])
    other = Sequence([*first.pages[:full], pool.copy(first.pages[full]), *pool.take(1)], first.length)
    before = pool.read(first.pages, 0, 32)
    together, _ = decoder.run(pool, [first, other], [5, 6], 12)
    assert all(torch.equal(a, b) for a, b in zip(before, pool.read(first.pages, 0, 32), strict=True))
    for token, answer in zip((5, 6), together, strict=True):
        sequence = Sequence(pool.take(4))
        decoder.extend(pool, [(sequence, prompt)], logits="none")
        assert torch.equal(decoder.run(pool, [sequence], [token], 12)[0][0], answer)
        pool.release(sequence.pages)


@compiled
def test_a_draft_is_checked_in_one_pass(model):
    decoder = Decoder(model, weights="int4")
    pool, (sequence,) = filled(decoder, (30,))
    answer = decoder.run(pool, [sequence], [7], 6)[0][0].tolist()
    pool, (sequence,) = filled(decoder, (30,))
    logits = decoder.extend(pool, [(sequence, [7, *answer[:-1]])], logits="all")
    assert logits.argmax(1).tolist() == answer
    sequence.length = 33  # three of them were wrong: the rest is as if it had never been
    assert decoder.run(pool, [sequence], [answer[2]], 3)[0][0].tolist() == answer[3:]


@compiled
def test_a_window_is_all_that_is_read():
    """Pages that no layer sees any more may hold anything: saved work is not done."""
    made = tiny(Qwen2ForCausalLM, Qwen2Config, **SMALL, use_sliding_window=True, sliding_window=37, max_window_layers=0)
    decoder = Decoder(made, **EXACT)
    (clean, ours), (soiled, theirs) = filled(decoder, (300,)), filled(decoder, (300,))
    for page in theirs[0].pages[: (300 + 1 - 37) // PAGE]:
        soiled.keys[:, page], soiled.values[:, page] = torch.nan, torch.nan
    assert torch.equal(decoder.run(soiled, theirs, [5], 5)[0], decoder.run(clean, ours, [5], 5)[0])
    soiled.keys[:, theirs[0].pages[(305 + 1 - 37) // PAGE]] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        decoder.run(soiled, theirs, [5], 1)


# ---- each row in its own way


@pytest.mark.parametrize("load", [kernels.load, lambda name: False])
def test_greedy_and_sampled_rows_side_by_side(model, load, monkeypatch):
    monkeypatch.setattr(kernels, "load", load)
    decoder = Decoder(model, **EXACT)
    lengths = (5, 20, 8, 3)
    ways = [None, Sampling(0.7, top_k=5), Sampling(1.5, top_p=0.9), None]
    torch.manual_seed(3)
    uniforms = torch.rand(4, 6, dtype=torch.float64)

    def answers(rows, **more):
        pool, sequences = filled(decoder, lengths)
        return decoder.run(pool, [sequences[row] for row in rows], [7 + row for row in rows], 6, **more)[0]

    together = answers(range(4), sampling=ways, uniforms=uniforms)
    greedy = answers(range(4))
    assert torch.equal(together[0], greedy[0])
    assert torch.equal(together[3], greedy[3])
    assert not torch.equal(together[1:3], greedy[1:3])
    for row in range(4):
        alone = answers([row], sampling=[ways[row]], uniforms=uniforms[row : row + 1])
        assert torch.equal(alone[0], together[row])
    other = answers([2, 0], sampling=[ways[2], None], uniforms=uniforms[[2, 1]])
    assert torch.equal(other, together[[2, 0]])
    pool, sequences = filled(decoder, lengths)
    torch.manual_seed(3)
    assert torch.equal(decoder.run(pool, sequences, [7, 8, 9, 10], 6, sampling=ways)[0], together)
    one = answers(range(4), sampling=ways[1], uniforms=uniforms)
    assert torch.equal(one[1], together[1])


def test_what_run_says_of_ways_to_choose(model):
    decoder = Decoder(model, **EXACT)
    pool, sequences = filled(decoder, (5, 6))

    def run(**more):
        decoder.run(pool, sequences, [1, 2], 3, **more)

    half = torch.full((2, 3), 0.5, dtype=torch.float64)
    for more, error, message in (
        ({"sampling": [Sampling()]}, ValueError, "sampling must have one entry per row, got 1 for 2"),
        ({"sampling": [None, 0.7]}, TypeError, r"sampling must hold Sampling or None \(greedy\), got 0.7"),
        ({"sampling": Sampling(), "uniforms": half[:, :2]}, ValueError, "uniforms must have shape"),
        ({"sampling": Sampling(), "uniforms": half.float()}, TypeError, "uniforms must hold torch.float64"),
        ({"sampling": Sampling(), "uniforms": half + 0.5}, ValueError, r"uniforms must lie in \[0, 1\)"),
        ({"sampling": Sampling(), "uniforms": half * torch.nan}, ValueError, r"uniforms must lie in \[0, 1\)"),
        ({"no_end": -1}, ValueError, "no_end must be a whole number at least 0"),
    ):
        with pytest.raises(error, match=message):
            run(**more)
    for settings, error in (
        ({"temperature": 0}, ValueError),
        ({"temperature": 1e-39}, ValueError),  # its inverse is no float32
        ({"top_k": 10**400}, ValueError),
        ({"temperature": float("nan")}, ValueError),
        ({"top_k": -1}, ValueError),
        ({"top_k": 2.5}, TypeError),
        ({"top_p": 1.5}, ValueError),
        ({"top_p": float("nan")}, ValueError),
    ):
        with pytest.raises(error, match=next(iter(settings))):
            Sampling(**settings)


@pytest.mark.parametrize("load", [kernels.load, lambda name: False])
def test_draw_takes_a_way_for_each_row(load, monkeypatch):
    monkeypatch.setattr(kernels, "load", load)
    torch.manual_seed(0)
    logits, uniforms = torch.randn(3, 50), torch.rand(3, dtype=torch.float64)
    ways = [None, Sampling(0.5, top_k=1), Sampling(2.0, top_p=0.0)]
    assert torch.equal(dl.draw(logits, ways, uniforms), logits.argmax(1))
    assert torch.equal(dl.draw(logits, Sampling(1e-30), uniforms), logits.argmax(1))
    assert torch.equal(dl.draw(logits, None), logits.argmax(1))
    mixed = dl.draw(logits, [None, Sampling(), Sampling(1.3)], uniforms)
    assert mixed[0] == logits[0].argmax()
    for row, way in ((1, Sampling()), (2, Sampling(1.3))):
        assert mixed[row] == dl.draw_in_torch(logits[row : row + 1], way, uniforms[row : row + 1])[0]
    with pytest.raises(ValueError, match="uniforms must have shape"):
        dl.draw(logits, Sampling(), uniforms[:2])


@pytest.mark.parametrize("load", [kernels.load, lambda name: False])
def test_ends_that_are_no_tokens_are_passed_over(model, load, monkeypatch):
    monkeypatch.setattr(kernels, "load", load)
    decoder = Decoder(model, **EXACT)
    pool, (sequence,) = filled(decoder, (5,))
    expected = decoder.run(pool, [sequence], [7], 3)[0]
    pool, (sequence,) = filled(decoder, (5,))
    assert torch.equal(decoder.run(pool, [sequence], [7], 3, eos=[-1, 101, 4000], no_end=2)[0], expected)

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from tests.tiny import calibration

from assay.methods.attention.attention_io import (
    A100,
    DEVICES,
    H100,
    LEADING_CONSTANT,
    Algorithm,
    DeviceSheet,
    LRUCache,
    Scratchpad,
    Tile,
    advise,
    advise_model,
    attention_io_bound,
    best_tile,
    choose,
    count,
    simulate,
    table,
    this_machine,
    tiled_attention,
    working_set,
)

ALGORITHMS = get_args(Algorithm)
FLASH = ("flash_queries", "flash_keys")


def qkv(n, d, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(n, d, generator=generator, dtype=dtype) for _ in range(3)]


def sdpa(q, k, v, causal=False):
    return F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=causal)[0]


def tile_of(algorithm, rows, columns, depth):
    return Tile(rows, columns) if algorithm in FLASH else Tile(rows, rows, depth)


def slope(xs, ys):
    x, y = (torch.tensor([math.log(value) for value in values], dtype=torch.float64) for values in (xs, ys))
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def best_words(algorithm, n, d, capacity, causal=False):
    return count(algorithm, n, d, best_tile(algorithm, n, d, capacity, causal=causal), causal=causal).words


# ----------------------------------------------------------------------------------------------- simulation and counters


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(("n", "d"), [(32, 8), (37, 8), (5, 16), (1, 4)])
def test_the_simulated_algorithms_are_attention_and_move_what_the_counter_says(algorithm, causal, n, d):
    q, k, v = qkv(n, d)
    wanted = sdpa(q, k, v, causal)
    for rows, columns, depth in [(4, 8, 1), (8, 4, 4), (5, 3, 3), (1, 1, 1), (6, 64, 8), (64, 6, 16), (64, 64, 64)]:
        tile = tile_of(algorithm, rows, columns, depth)
        out, traffic = simulate(q, k, v, algorithm, tile, causal=causal)
        torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)
        counted = count(algorithm, n, d, tile, causal=causal)
        assert (traffic.reads, traffic.writes) == (counted.reads, counted.writes), tile
        assert traffic.peak <= counted.peak == working_set(algorithm, n, d, tile)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_peak_is_the_working_set_when_tiles_divide(algorithm):
    q, k, v = qkv(32, 8)
    for rows, columns, depth in [(4, 8, 1), (8, 8, 4), (16, 4, 2)]:
        tile = tile_of(algorithm, rows, columns, depth)
        assert simulate(q, k, v, algorithm, tile)[1].peak == working_set(algorithm, 32, 8, tile)


@pytest.mark.parametrize(("n", "d", "rows", "columns"), [(64, 8, 16, 8), (96, 16, 8, 32), (128, 64, 2, 4)])
def test_closed_forms_when_tiles_divide(n, d, rows, columns):
    query_tiles, key_tiles = n // rows, n // columns
    tile = Tile(rows, columns)
    assert count("flash_queries", n, d, tile).words == 2 * n * d * (query_tiles + 1)
    assert count("flash_keys", n, d, tile).words == n * d * (key_tiles + 3) + 2 * (key_tiles - 1) * n * (d + 2)
    assert count("flash_queries", n, d, tile, causal=True).words == 2 * n * d + n * d * (query_tiles + 1)
    s = rows
    small = count("small_cache", n, d, Tile(s, s, 1))
    passes = max(1, d // s)
    assert small.reads == 2 * n * n * d // s + n * n * passes + n * n * d // s + 2 * n * passes
    assert small.writes == n * n + 2 * n + n * d
    plain = count("materialised", n, d, Tile(s, s, 1))
    sweeps = 1 if n <= s * s else 2
    assert plain.words == 3 * n * n * d // s + n * n * (2 + sweeps + passes) + n * d


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_causal_attention_moves_half_of_what_grows_with_the_square(algorithm):
    n, d, tile = 4096, 16, tile_of(algorithm, 16, 16, 1)
    full, causal = (count(algorithm, n, d, tile, causal=c).words for c in (False, True))
    assert 0.49 < causal / full < 0.52
    assert causal > full / 2


def test_everything_in_the_cache_is_four_n_d():
    n, d = 24, 8
    q, k, v = qkv(n, d)
    for algorithm in FLASH:
        for causal in (False, True):
            for tile in (Tile(n, n), Tile(n, 5), Tile(5, n), Tile(1000, 1000)):
                assert simulate(q, k, v, algorithm, tile, causal=causal)[1].words == 4 * n * d
    assert choose(n, d, 10_000).traffic.words == 4 * n * d == attention_io_bound(n, d, 10_000).inputs


def test_the_scratchpad_refuses_what_does_not_fit():
    q, k, v = qkv(32, 8)
    for algorithm in ALGORITHMS:
        tile = tile_of(algorithm, 4, 8, 2)
        least = working_set(algorithm, 32, 8, tile)
        assert simulate(q, k, v, algorithm, tile, capacity=least)[1].peak <= least
    for algorithm in FLASH:
        with pytest.raises(MemoryError, match="working set"):
            simulate(q, k, v, algorithm, Tile(4, 8), capacity=working_set(algorithm, 32, 8, Tile(4, 8)) - 1)


def test_hard_inputs():
    q, k, v = (x.T.contiguous().T for x in qkv(21, 8))  # not contiguous
    for algorithm in ALGORITHMS:
        tile = tile_of(algorithm, 4, 8, 2)
        torch.testing.assert_close(simulate(q, k, v, algorithm, tile)[0], sdpa(q, k, v), atol=1e-5, rtol=1e-5)
        wide = [x.double() for x in (q, k, v)]
        torch.testing.assert_close(simulate(*wide, algorithm, tile)[0], sdpa(*wide), atol=1e-12, rtol=1e-12)
        half = [x.bfloat16() for x in (q, k, v)]
        out = simulate(*half, algorithm, tile)[0]
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out, sdpa(*half), atol=5e-2, rtol=5e-2)
        huge = [40 * x for x in (q, k, v)]  # softmax of one token
        torch.testing.assert_close(simulate(*huge, algorithm, tile)[0], sdpa(*huge), atol=1e-3, rtol=1e-4)
        again = simulate(q, k, v, algorithm, tile, scale=0.1)[0]
        wanted = F.scaled_dot_product_attention(q[None], k[None], v[None], scale=0.1)[0]
        torch.testing.assert_close(again, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_tiled_attention_is_attention_for_any_leading_dimensions(causal):
    q, k, v = torch.randn(3, 2, 3, 37, 8)
    wanted = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    for tile in (Tile(8, 5), Tile(37, 37), Tile(1, 100), Tile(100, 1)):
        torch.testing.assert_close(tiled_attention(q, k, v, tile, causal=causal), wanted, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------------ LRU cache


def test_an_lru_cache_moves_what_a_scratchpad_moves_when_it_has_room():
    q, k, v = qkv(24, 8)
    for algorithm in ALGORITHMS:
        tile = tile_of(algorithm, 4, 8, 2)
        out, traffic = simulate(q, k, v, algorithm, tile, cache="lru", capacity=100_000)
        torch.testing.assert_close(out, sdpa(q, k, v), atol=1e-5, rtol=1e-5)
        assert traffic.reads == 3 * 24 * 8  # each input once, whatever the order


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_lru_cache_with_some_slack_follows_the_scratchpad(algorithm):
    """Twice the working set, the usual price of least recently used, moves no more than the scratchpad; half of it far more."""
    q, k, v = qkv(64, 8)
    tile = tile_of(algorithm, 8, 8, 1)
    size = working_set(algorithm, 64, 8, tile)
    planned = count(algorithm, 64, 8, tile).words
    roomy = simulate(q, k, v, algorithm, tile, cache="lru", capacity=2 * size)[1]
    tight = simulate(q, k, v, algorithm, tile, cache="lru", capacity=size // 2)[1]
    assert roomy.words <= 1.25 * planned
    assert tight.words > 1.2 * roomy.words
    assert roomy.peak <= 2 * size


def test_lru_lines_and_evictions():
    cache = LRUCache(8, line=4)
    cache.slow["x"] = torch.arange(16.0).view(4, 4)
    cache.load("x", (0, 1))
    cache.load("x", (1, 2))
    assert (cache.reads, cache.writes) == (8, 0)
    cache.load("x", (0, 1))  # a hit, and now the younger one
    cache.new("x", (2, 3), (0, 4))  # row 1 leaves, nothing is fetched
    cache.load("x", (0, 1))
    assert (cache.reads, cache.writes) == (8, 0)
    cache.load("x", (3, 4))  # row 2 leaves, changed
    assert (cache.reads, cache.writes) == (12, 4)
    cache.load("x", (0, 1), (1, 2))  # one word of a line that is there
    assert cache.reads == 12
    cache.use("x", changed=["x"])
    cache.finish()
    assert cache.writes == 8
    with pytest.raises(ValueError, match="line must be at most"):
        LRUCache(4, line=8)


# -------------------------------------------------------------------------------------------------- bounds and exponents


def test_both_shapes_meet_at_d_squared():
    for d in (8, 64, 256):
        bound = attention_io_bound(1000, d, d * d)
        assert (bound.shape, bound.regime) == (1000**2, "large cache")
        assert attention_io_bound(1000, d, d * d - 1).regime == "small cache"
        below, above = (attention_io_bound(1000, d, m).shape for m in (d * d // 4, 4 * d * d))
        assert (below, above) == (2 * 1000**2, 1000**2 / 4)
    causal = attention_io_bound(1000, 64, 4096, causal=True)
    assert causal.shape == 1000 * 1001 / 2
    assert bound.words(2.0) == 2e6
    assert attention_io_bound(1000, 64, 10**9).words(4.0) == 4 * 1000 * 64


def test_exponents_of_the_words_moved():
    n, d = 1 << 16, 64
    above = [d * d * 2**i for i in range(7)]
    for algorithm in FLASH:
        assert slope(above, [best_words(algorithm, n, d, m) for m in above]) == pytest.approx(-1, abs=0.06)
    d = 256
    below = [d * d // 4**i for i in range(1, 5)]
    assert slope(below, [best_words("small_cache", n, d, m) for m in below]) == pytest.approx(-0.5, abs=0.06)
    flash_below = [best_words("flash_queries", n, d, m) for m in below[:2]]
    assert slope(below[:2], flash_below) < -0.98  # flash keeps its -1 and is the worse for it
    lengths = [1 << i for i in range(13, 18)]
    assert slope(lengths, [best_words("flash_queries", x, 64, 8192) for x in lengths]) == pytest.approx(2, abs=0.05)
    assert slope(lengths, [best_words("small_cache", x, 64, 1024) for x in lengths]) == pytest.approx(2, abs=0.05)
    dims = [32, 64, 128, 256]
    assert slope(dims, [best_words("flash_queries", n, x, 1 << 17) for x in dims]) == pytest.approx(2, abs=0.1)
    dims = [128, 256, 512, 1024]
    assert slope(dims, [best_words("small_cache", n, x, 1024) for x in dims]) == pytest.approx(1, abs=0.1)


def test_counts_stay_in_a_constant_band_over_the_bound():
    ratios = []
    for n, d, root in itertools.product((512, 2048, 8192), (16, 64, 128), (0.25, 0.5, 1, 2, 4)):
        capacity = int(root * d * d)
        if working_set("small_cache", n, d, Tile(1, 1)) > capacity:
            continue
        ratios.append(choose(n, d, capacity).over_shape)
        for algorithm in ALGORITHMS:  # nobody beats the shape, with the constant 1
            if working_set(algorithm, n, d, Tile(1, 1)) <= capacity:
                assert best_words(algorithm, n, d, capacity) >= attention_io_bound(n, d, capacity).words(1.0)
    assert len(ratios) > 30
    assert 1 < min(ratios) < max(ratios) < 3 * LEADING_CONSTANT
    large = choose(1 << 18, 64, 1 << 17)  # far from every corner the constant is four: K and V for every 1 / (2 d) of M
    assert large.traffic.words / large.bound.shape == pytest.approx(LEADING_CONSTANT, rel=0.1)


@pytest.mark.parametrize("d", [32, 64, 128, 256])
def test_the_small_cache_algorithm_wins_below_a_constant_times_d_squared(d):
    n = 4096
    shares = [0.05 * i for i in range(4, 41)]
    better = []
    for share in shares:
        capacity = int(share * d * d)
        flash = min(best_words(algorithm, n, d, capacity) for algorithm in FLASH)
        better.append(best_words("small_cache", n, d, capacity) < flash)
    crossing = better.index(False)
    assert not any(better[crossing:])
    assert 0.35 < shares[crossing] < 1.0


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_words_never_grow_with_the_cache(algorithm, causal):
    for n, d in ((96, 8), (101, 16)):
        least = working_set(algorithm, n, d, Tile(1, 1))
        words = [best_words(algorithm, n, d, m, causal) for m in range(least, 6 * n * d, 37)]
        assert words == sorted(words, reverse=True)
    exact = [choose(96, 8, m, causal=causal, rule="exact").traffic.words for m in range(30, 4000, 41)]
    assert exact == sorted(exact, reverse=True)


def test_best_tiles_fit_and_no_tile_is_better():
    n, d, capacity = 24, 4, 150
    for algorithm, causal in itertools.product(ALGORITHMS, (False, True)):
        tile = best_tile(algorithm, n, d, capacity, causal=causal)
        assert working_set(algorithm, n, d, tile) <= capacity
        found = count(algorithm, n, d, tile, causal=causal).words
        for rows, columns, depth in itertools.product(range(1, n + 1), range(1, n + 1), (1, 2, 4)):
            if algorithm not in FLASH and rows != columns:
                continue
            other = Tile(rows, columns, depth)
            if working_set(algorithm, n, d, other) <= capacity:
                assert found <= count(algorithm, n, d, other, causal=causal).words
        even = best_tile(algorithm, n, d, capacity, causal=causal, divisors=True)
        assert n % even.rows == n % even.columns == 0
        assert count(algorithm, n, d, even, causal=causal).words >= found


def test_the_choice_follows_d_squared():
    assert choose(1024, 64, 4096).algorithm in FLASH
    assert choose(1024, 64, 4095).algorithm == "small_cache"
    assert choose(1024, 64, 3900, rule="exact").algorithm in FLASH  # constants
    assert choose(1024, 64, 1500, rule="exact").algorithm == "small_cache"
    assert choose(64, 2, 10).algorithm == "small_cache"  # more than d^2, but too little for two tiles
    found = choose(1000, 64, 3000, causal=True)
    assert found.traffic == count(found.algorithm, 1000, 64, found.tile, causal=True)
    with pytest.raises(ValueError, match="capacity must be at least"):
        choose(1000, 64, 4)


# ------------------------------------------------------------------------------------------------------------- roofline


def test_advice_of_a_large_cache():
    found = advise(8192, 128, H100, heads=32, causal=True)
    assert found.regime == "large cache"
    assert found.algorithm in FLASH
    assert H100.capacity == 116_736
    assert found.flops == 32 * 4 * 128 * 8192 * 8193 // 2
    assert found.bytes == 2 * found.words
    assert found.intensity == pytest.approx(found.flops / found.bytes)
    assert found.limited_by == ("memory" if found.memory_seconds > found.compute_seconds else "compute")
    assert working_set(found.algorithm, 8192, 128, found.tile) <= H100.capacity


def test_advice_of_a_tiny_scratchpad():
    tiny = DeviceSheet("scratchpad", 8 << 10, 1e9, 1e9, 1, 4)
    found = advise(512, 64, tiny)
    assert (found.regime, found.algorithm) == ("small cache", "small_cache")
    assert found.limited_by == "compute"
    slow = DeviceSheet("scratchpad", 8 << 10, 1e7, 1e9, 1, 4)
    assert advise(512, 64, slow).limited_by == "memory"
    assert set(DEVICES.values()) == {A100, H100}


def test_the_sheet_of_this_machine(monkeypatch):
    from assay.measure import machine

    rates = calibration(read_bandwidth=1e10, copy_bandwidth=2e10, cache_bandwidth={}, threads=1)
    monkeypatch.setattr(machine, "calibrate", lambda **options: rates)
    if not Path("/sys/devices/system/cpu/cpu0/cache/index2/size").exists():
        with pytest.raises(OSError, match="No such file"):
            this_machine()
        return
    here = this_machine()
    assert here.capacity > 4096
    assert (here.ridge, here.element_bytes) == (5.0, 4)


def test_the_table_names_every_algorithm():
    lines = table(256, 16, [2, 100, 1000, 100_000]).splitlines()
    assert len(lines) == 5
    assert all(name in lines[0] for name in ALGORITHMS)
    assert lines[1].split()[-4:] == ["-"] * 4
    assert ["small cache" in line for line in lines] == [False, True, True, False, False]
    assert lines[4].split()[-4:-2] == [str(4 * 256 * 16)] * 2


@pytest.mark.parametrize(
    ("first", "wanted"), [("$((1000 + 7 * runs))", 7 * 16), ("<not supported>", "not available: this")]
)
def test_missed_words_are_what_each_further_run_adds(tmp_path, monkeypatch, first, wanted):
    """By a stand-in for perf that counts 1000 misses, and 7 for every run of attention its command asks for."""
    from assay.experiments.attention.attention_io import words_missed

    fake = tmp_path / "perf"
    fake.write_text(
        "#!/bin/sh\n"
        'runs=$(echo "$*" | sed -n "s/.*, \\([0-9]*\\))$/\\1/p"); runs=${runs:-0}\n'
        f'echo "{first},,cache-misses:u,1,100.00,," > "$7"\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = words_missed("torch SDPA", (1, 2, 64, 8))
    assert str(found).startswith(wanted) if isinstance(wanted, str) else found == wanted


def test_what_a_counter_would_count_is_attention():
    from assay.experiments.attention.attention_io import _fused_and_not, repeat_run

    q, k, v = torch.randn(3, 1, 2, 70, 64)
    for run in _fused_and_not(q, k, v).values():
        torch.testing.assert_close(run(), F.scaled_dot_product_attention(q, k, v), atol=1e-5, rtol=1e-4)
    repeat_run("assay's kernel", (1, 2, 70, 64), 2)


def test_advice_for_a_model():
    """What `advise` says of each layer, for the model's own heads; windows are left out."""
    from tests.properties.architectures import build

    one = advise(1024, 32, H100, heads=8, causal=True)
    assert advise_model(build("llama"), 1024, H100, batch=2) == [one, one]
    assert advise_model(build("gemma3"), 1024, H100, batch=2) == [None, one]
    assert advise_model(build("bert"), 64, H100) == [advise(64, 32, H100, heads=4)] * 2
    with pytest.raises(ValueError, match="has no attention"):
        advise_model(build("mamba"), 64, H100)
    with pytest.raises(TypeError, match="tokens must be a whole number"):
        advise_model(build("llama"), 3.7, H100)


# --------------------------------------------------------------------------------------------------------------- errors


def test_bad_arguments():
    q, k, v = qkv(8, 4)
    with pytest.raises(ValueError, match="d must be a whole number at least 1"):
        attention_io_bound(8, 0, 16)
    with pytest.raises(ValueError, match="constant must be a finite number above 0"):
        attention_io_bound(8, 4, 16).words(0)
    with pytest.raises(ValueError, match="algorithm must be one of"):
        count("flash", 8, 4, Tile(1, 1))
    with pytest.raises(ValueError, match="algorithm must be one of"):
        best_tile("flash", 8, 4, 100)
    with pytest.raises(ValueError, match="must be square"):
        count("small_cache", 8, 4, Tile(1, 2))
    with pytest.raises(ValueError, match="rows must be a whole number"):
        simulate(q, k, v, "flash_keys", Tile(0, 1))
    with pytest.raises(ValueError, match=r"k must have shape"):
        simulate(q, k[:4], v, "flash_keys", Tile(1, 1))
    with pytest.raises(ValueError, match="columns must be a whole number"):
        tiled_attention(q, k, v, Tile(1, 0))
    with pytest.raises(ValueError, match=r"k must have shape"):
        tiled_attention(q, k[:4], v, Tile(1, 1))
    with pytest.raises(ValueError, match="cache must be"):
        simulate(q, k, v, "flash_keys", Tile(1, 1), cache="fifo")
    with pytest.raises(ValueError, match="rule must be"):
        choose(8, 4, 100, rule="best")
    with pytest.raises(ValueError, match="fast_bytes must be a whole number at least 1"):
        DeviceSheet("nothing", 0, 1.0, 1.0, 1, 2)
    with pytest.raises(ValueError, match="heads must be"):
        advise(8, 4, H100, heads=0)
    with pytest.raises(KeyError, match="not in the fast memory"):
        Scratchpad(10).use("Q")


@pytest.mark.parametrize("causal", [False, True])
def test_scores_may_be_as_small_as_float32_goes(causal):
    """Scores about -1e33: a running maximum that begins at a finite number would leave every row without a key."""
    q, k, v = torch.full((7, 3), 1e16), torch.full((7, 3), -1e16), torch.randn(7, 3)
    k[3] *= 0.5
    wanted = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=causal)
    for algorithm in ALGORITHMS:
        found, _ = simulate(q, k, v, algorithm, Tile(2, 2), causal=causal)
        torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        tiled_attention(q, k, v, Tile(2, 2), causal=causal).double(), wanted, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_tiled_algorithm_takes_every_floating_dtype(dtype):
    q, k, v = (x.to(dtype) for x in torch.randn(3, 2, 9, 5, generator=torch.Generator().manual_seed(0)))
    wanted = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    found = tiled_attention(q, k, v, Tile(4, 2), causal=True)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), wanted, atol=2e-2 if dtype.itemsize == 2 else 1e-9, rtol=0)


def test_the_simulator_names_what_it_does_not_take():
    q, k, v = qkv(8, 4)
    tile = Tile(2, 2)
    for arguments, options, error, name in (
        ((q.long(), k, v), {}, TypeError, "q must hold"),
        (("q", k, v), {}, TypeError, "q must be a tensor"),
        ((q.half(), k, v), {}, TypeError, "k must have the dtype of q"),
        ((q, k.to("meta"), v), {}, ValueError, "k must lie on the device of q"),
        ((q, k, v), {"scale": math.nan}, ValueError, "scale"),
        ((q, k, v), {"causal": "no"}, TypeError, "causal"),
        ((q, k, v), {"line": 4}, ValueError, "line must be left out"),
    ):
        with pytest.raises(error, match=name):
            simulate(*arguments, "flash_keys", tile, **options)
    for run in (lambda t: simulate(q, k, v, "flash_keys", t), lambda t: tiled_attention(q, k, v, t)):
        with pytest.raises(TypeError, match="tile must be a Tile"):
            run((2, 2))
    with pytest.raises(TypeError, match="q must hold"):
        tiled_attention(q.long(), k.long(), v.long(), tile)

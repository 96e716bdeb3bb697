"""Intervals over requests, and what becomes of requests in the figures."""

from __future__ import annotations

import math

import numpy as np
import pytest

from assay.errors import InputError
from assay.loadtest.answers import Answer
from assay.loadtest.client import Server
from assay.loadtest.generator import Block, Load, Measured, Sample
from assay.loadtest.report import Slo, comparison, document, figures, met, percentile, rate, slo_of
from assay.loadtest.traces import Request

REQUEST = Request("x", 4)
SERVER = Server("h", 1, "/v1", model="m")
CLOSED = Load(concurrency=1, requests=1)


def sample(begin, *times, tokens=4, counted=True, error=""):
    answer = None if error else Answer(tuple(times), times[-1], tokens, counted, "length", 10)
    return Sample(REQUEST, begin, begin, times[-1], answer, error, f"{error}!" if error else "")


def test_percentiles_have_the_bounds_of_the_binomial():
    """The rank of each bound is that of the exact distribution, counted out by summing."""

    def below(k, n, share):
        return math.fsum(math.comb(n, i) * share**i * (1 - share) ** (n - i) for i in range(k + 1))

    for n in (1, 5, 20, 64, 200):
        for share in (0.5, 0.95, 0.99):
            found = percentile(range(1, n + 1), share)
            ranks = range(1, n + 1)
            low = max((k for k in ranks if below(k - 1, n, share) <= 0.025), default=-math.inf)
            high = min((k for k in ranks if below(k - 1, n, share) >= 0.975), default=math.inf)
            assert (found.low, found.high) == (low, high)
            assert found.low <= found.median <= found.high


def test_percentiles_cover_as_often_as_they_say():
    chance = np.random.default_rng(0)
    for share, true in ((0.5, math.log(2)), (0.95, -math.log(0.05))):
        hits = [percentile(chance.exponential(size=80), share).contains(true) for _ in range(600)]
        assert np.mean(hits) >= 0.93


def test_a_p99_of_few_requests_has_no_upper_bound():
    assert percentile(range(367), 0.99).high == math.inf
    assert percentile(range(368), 0.99).high == 367


@pytest.mark.parametrize(("values", "share"), [([], 0.5), ([math.nan], 0.5), ([1.0], 1.0), ([1.0], 0.0)])
def test_what_has_no_percentile(values, share):
    with pytest.raises(ValueError):
        percentile(values, share)


def test_a_rate_is_what_there_was_over_the_time_it_took():
    found = rate([10, 20, 30], [1, 2, 3], 6.0)
    assert (found.median, found.low, found.high) == pytest.approx((10, 10, 10))  # each request gave ten a second
    spread = rate([0, 20] * 50, [1] * 100, 100.0)
    assert spread.median == pytest.approx(10)
    assert 7 < spread.low < 9
    assert 11 < spread.high < 13


def test_a_rate_of_one_request_is_not_bounded():
    found = rate([10], [2], 2.0)
    assert (found.median, found.low, found.high) == (5, 0, math.inf)


def test_more_requests_make_a_narrower_rate():
    chance = np.random.default_rng(0)

    def width(n):
        found = rate(chance.exponential(size=n), np.ones(n), n)
        return found.high - found.low

    assert width(1600) < 0.5 * width(100)


@pytest.mark.parametrize(
    ("text", "slo"),
    [("ttft=500", Slo(ttft=0.5)), ("ttft=500, itl=50", Slo(0.5, 0.05)), ("e2e=9e3,itl=2.5", Slo(None, 0.0025, 9.0))],
)
def test_limits_are_read(text, slo):
    assert slo_of(text) == slo


@pytest.mark.parametrize(
    "text",
    ["", "ttft", "ttft=", "ttft=x", "ttft=0", "ttft=-1", "ttft=nan", "ttft=inf", "tpot=5", "ttft=1,ttft=2", "ttft=1,"],
)
def test_limits_that_are_none(text):
    with pytest.raises(InputError, match="--slo"):
        slo_of(text)


def test_a_request_is_within_the_limits_only_with_all_of_them():
    good = sample(0.0, 0.5, 0.6, 0.7, 0.8)
    assert Slo(ttft=0.5, itl=0.1001, e2e=0.8).met(good)
    for slo in (Slo(ttft=0.49), Slo(itl=0.09), Slo(e2e=0.79)):
        assert not slo.met(good)
    assert not Slo(ttft=9.0).met(sample(0.0, 0.1, error="timeout"))
    assert Slo(itl=0.001).met(sample(0.0, 0.5))  # all tokens at once: nobody waited between them


def those(*blocks):
    return Measured(SERVER, list(blocks), [])


def test_errors_are_counted_by_kind_and_no_latency():
    block = Block(
        [
            sample(0.0, 1.0, 2.0),
            sample(0.0, 3.0, error="timeout"),
            sample(0.0, 3.0, error="timeout"),
            sample(0.0, 4.0, error="cut off"),
        ],
        0.0,
        4.0,
    )
    found = figures(those(block), CLOSED, Slo(ttft=2.0))
    assert found["errors"] == {"timeout": 2, "cut off": 1}
    assert found["messages"] == {"timeout": "timeout!", "cut off": "cut off!"}
    assert (found["requests"], found["answered"]) == (4, 1)
    assert found["ttft"]["p50"]["value"] == 1000
    assert found["within_slo"]["value"] == 0.25
    assert found["goodput_per_second"]["value"] == found["requests_per_second"]["value"] == 0.25
    assert found["in_flight"] == pytest.approx(12 / 4)


def test_nothing_answered_is_no_figure():
    found = figures(those(Block([sample(0.0, 1.0, error="timeout")], 0.0, 1.0)), CLOSED, None)
    assert [found[name] for name in ("ttft", "itl", "gap", "e2e", "within_slo")] == [None] * 5
    assert found["tokens_per_second"]["value"] == 0
    assert figures(those(), CLOSED, Slo(ttft=1.0))["within_slo"] is None


def test_blocks_of_a_server_are_taken_together():
    blocks = [Block([sample(0.0, 1.0, 2.0)], 0.0, 2.0), Block([sample(10.0, 11.0, 14.0, tokens=8)], 10.0, 14.0)]
    found = figures(those(*blocks), CLOSED, None)
    assert found["seconds"] == 6
    assert found["tokens_per_second"]["value"] == 2
    assert found["e2e"]["p50"]["value"] == 3000


def test_tokens_say_who_counted_them():
    block = Block([sample(0.0, 1.0), sample(1.0, 2.0, tokens=2, counted=False)], 0.0, 2.0)
    tokens = figures(those(block), CLOSED, None)["tokens"]
    assert (tokens["generated"], tokens["counted_by_server"], tokens["counted_by_pieces"], tokens["short"]) == (
        6,
        1,
        1,
        1,
    )


def test_a_ratio_needs_a_value_in_every_block():
    fine, failed = Block([sample(0.0, 1.0, 2.0)], 0.0, 2.0), Block([sample(0.0, 1.0, error="timeout")], 0.0, 1.0)
    found = comparison(those(fine, fine), those(fine, failed), Slo(ttft=9.0))
    assert [found[name] for name in ("ttft", "itl", "e2e", "tokens_per_second", "goodput_per_second")] == [None] * 5
    assert comparison(those(fine), those(fine, fine), None)["ttft"] is None


def test_the_goal_is_met_when_nearly_all_are_within_the_limits():
    def found(late, slo):
        samples = [sample(0.0, 5.0 if i < late else 1.0, 6.0) for i in range(100)]
        return document([those(Block(samples, 0.0, 6.0))], CLOSED, slo)

    assert met(found(5, Slo(ttft=2.0)))
    assert not met(found(6, Slo(ttft=2.0)))
    assert met(found(100, None))
    assert not met(document([those(Block([sample(0.0, 1.0, error="timeout")], 0.0, 1.0))], CLOSED, None))
    assert not met(document([those(Block([], 0.0, 1.0))], CLOSED, Slo(ttft=2.0)))


def test_a_generator_that_takes_much_of_a_core_is_said():
    def found(cpu):
        return document([those(Block([sample(0.0, 1.0, 2.0)], 0.0, 10.0, cpu=cpu))], CLOSED, None)

    assert found(0.9)["warnings"] == []
    assert found(0.9)["generator"]["core_share"] == pytest.approx(0.09)
    assert "used 11 % of a core" in found(1.1)["warnings"][0]


def test_late_requests_of_an_open_loop_are_said():
    late = [Sample(REQUEST, float(i), i + 0.2, i + 2.0, sample(0.0, i + 1.0, i + 2.0).answer) for i in range(5)]
    found = document([those(Block(late, 0.0, 6.0))], Load(rate=1.0, requests=5), None)
    assert found["servers"][0]["lateness"]["p95"] == pytest.approx(200)
    assert "200 ms late" in found["warnings"][0]


def test_requests_of_an_open_loop_share_the_time_by_their_gaps():
    samples = [sample(at, at + 1.0, at + 2.0) for at in (0.0, 1.0, 1.0, 4.0)]
    found = figures(those(Block(samples, 0.0, 6.0)), Load(rate=1.0, requests=4), None)
    assert found["requests_per_second"]["value"] == pytest.approx(4 / 6)
    assert found["requests_per_second"]["low"] < 4 / 6 < found["requests_per_second"]["high"]


def test_the_document_is_json():
    import json

    found = document([those(Block([sample(0.0, 1.0, 2.0)], 0.0, 2.0))] * 2, CLOSED, Slo(ttft=1.0))
    assert json.loads(json.dumps(found, allow_nan=False)) == found

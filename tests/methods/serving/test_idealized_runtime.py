"""Runtime models: recovery of known parameters, refusal to guess, and a server that is noisy on purpose."""

from __future__ import annotations

import json
import random
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny import tiny_model

from assay.methods.serving.idealized_runtime import (
    PAPER_OUTPUT_TOKENS,
    PAPER_PROMPT_TOKENS,
    Errors,
    ProbeError,
    RuntimeModel,
    add_runtimes,
    denoised_saving,
    dollars,
    fastest,
    fit,
    flops_proxy,
    idealized_saving,
    joules,
    middle_cells,
    non_decreasing,
    pareto_front,
    probe_endpoint,
    profile,
    share_below,
    transformers_runner,
)

PROMPTS, OUTPUTS = (1, 32, 128, 512), (1, 4, 16, 64)
KNOTS = {1: 0.020, 32: 0.024, 128: 0.041, 512: 0.120}
BETA = 0.0123


def exact(p, o):
    return KNOTS[p] + (o - 1) * BETA


def exact_runs(prompts=PROMPTS, outputs=OUTPUTS):
    return [(p, o, exact(p, o)) for p in prompts for o in outputs]


# Recovery


@pytest.mark.parametrize("method", ["idealized", "denoised"])
def test_parameters_are_recovered_exactly_without_noise(method):
    model = fit(exact_runs(), method=method)
    assert model.prompt_tokens == PROMPTS
    assert model.prompt_seconds == pytest.approx([KNOTS[p] for p in PROMPTS], rel=1e-12)
    assert model.seconds_per_token == pytest.approx(BETA, rel=1e-12)
    assert model.r2 == pytest.approx(1)
    assert model.fit.maximum < 1e-12
    assert model.fit.cells == 16


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(0.001, 5), min_size=1, max_size=6),
    st.floats(0.0001, 1),
    st.floats(0, 0.001),
)
def test_any_parameters_are_recovered(knots, beta, gamma):
    prompts = [2 + 37 * i for i in range(len(knots))]
    runs = [
        (p, o, t + (o - 1) * beta + gamma * ((o - 1) * p + (o - 1) * o / 2))
        for p, t in zip(prompts, knots, strict=True)
        for o in (1, 2, 9, 30)
    ]
    model = fit(runs, slope="context")
    assert model.seconds_per_token == pytest.approx(beta, rel=1e-6, abs=1e-9)
    assert model.seconds_per_context_token == pytest.approx(gamma, rel=1e-6, abs=1e-10)
    assert model.fit.maximum < 1e-6


def test_the_pooled_slope_is_the_least_squares_one_with_a_dropped_intercept():
    """Checked against numpy on runs that no line fits."""
    rng = np.random.default_rng(0)
    runs = [(p, o, exact(p, o) * (1 + 0.3 * rng.random()) if o > 1 else exact(p, o)) for p in PROMPTS for o in OUTPUTS]
    model = fit(runs)
    x = [o - 1 for _, o, _ in runs]
    y = [t - exact(p, 1) for p, _, t in runs]
    slope, intercept = np.polyfit(x, y, 1)
    assert model.seconds_per_token == pytest.approx(slope)
    assert abs(intercept) > 1e-4
    assert model.r2 == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2)
    assert model.prompt_seconds == pytest.approx([KNOTS[p] for p in PROMPTS])
    relative = [abs(model.predict(p, o) - t) / t for p, o, t in runs]
    assert (model.fit.mean, model.fit.maximum) == pytest.approx((np.mean(relative), max(relative)))


def test_denoised_prompt_time_is_slope_plus_intercept_and_no_less_than_the_first():
    rng = np.random.default_rng(1)
    runs = [(p, o, exact(p, o) + 0.2 * rng.random()) for p in PROMPTS for o in OUTPUTS]
    model = fit(runs, method="denoised")
    lines = [np.polyfit(OUTPUTS, [t for q, _, t in runs if q == p], 1).sum() for p in PROMPTS]
    assert model.prompt_seconds == pytest.approx([lines[0], *(max(line, lines[0]) for line in lines[1:])])
    falling = [(p, o, t + 0.5 * (p == 1)) for p, o, t in exact_runs()]
    assert fit(falling, method="denoised").prompt_seconds == pytest.approx([0.520] * 4)


def test_the_fastest_of_k_converges_from_above():
    """Noise only adds, so more trials bring every cell, and the model, down towards the truth."""
    rng = np.random.default_rng(2)
    noise = {(p, o): 0.03 * rng.exponential(size=200) for p in PROMPTS for o in OUTPUTS}
    gaps = []
    for k in (1, 5, 200):
        runs = [(p, o, exact(p, o) + extra) for (p, o), extras in noise.items() for extra in extras[:k]]
        assert all(t >= exact(p, o) for (p, o), t in fastest(runs).items())
        model = fit(runs)
        gaps.append(np.mean([seconds - KNOTS[p] for p, seconds in zip(PROMPTS, model.prompt_seconds, strict=True)]))
    assert gaps[0] > gaps[1] > gaps[2] >= 0
    assert model.seconds_per_token == pytest.approx(BETA, rel=0.02)


# Prediction


def test_one_token_takes_the_prompt_time_and_more_tokens_take_longer():
    model = fit(exact_runs())
    for p in PROMPTS:
        assert model.predict(p, 1) == pytest.approx(KNOTS[p], abs=1e-15)  # exact at the knots
    times = model.predict(200, np.arange(1, 65))
    assert (np.diff(times) > 0).all()
    assert model.predict(80, 1) == pytest.approx((KNOTS[32] + KNOTS[128]) / 2)  # halfway: linear
    assert model.total([(1, 1), (32, 4)]) == pytest.approx(exact(1, 1) + exact(32, 4))
    assert model.total([]) == 0
    assert isinstance(model.predict(80, 1), float)
    assert model.predict(np.array([[1], [32]]), np.array([1, 4, 16])).shape == (2, 3)


def test_lengths_outside_the_grid_are_refused_unless_asked_for():
    model = fit(exact_runs(prompts=(32, 128, 512)))
    for p, o in [(513, 1), (31, 1), (128, 65)]:
        with pytest.raises(ValueError, match="extrapolate=True"):
            model.predict(p, o)
    assert model.predict(608, 1, extrapolate=True) == pytest.approx(KNOTS[512] + 96 * (KNOTS[512] - KNOTS[128]) / 384)
    assert model.predict(8, 1, extrapolate=True) == pytest.approx(KNOTS[32] - 24 * (KNOTS[128] - KNOTS[32]) / 96)
    assert model.predict(128, 100, extrapolate=True) == pytest.approx(KNOTS[128] + 99 * BETA)
    for p, o in [(0, 1), (32, 0)]:
        with pytest.raises(ValueError, match="at least 1"):
            model.predict(p, o, extrapolate=True)
    assert fit([(7, 1, 0.5), (7, 3, 0.7)]).predict(90, 2, extrapolate=True) == pytest.approx(0.6)


def test_a_constant_delay_changes_the_overhead_and_nothing_else():
    plain = fit(exact_runs(), method="denoised")
    delayed_runs = [(p, o, t + 0.25) for p, o, t in exact_runs()]
    delayed = fit(delayed_runs, method="denoised", overhead_seconds=0.25)
    assert delayed.overhead_seconds == 0.25
    assert delayed.seconds_per_token == pytest.approx(plain.seconds_per_token, rel=1e-9)
    assert delayed.prompt_seconds == pytest.approx(plain.prompt_seconds, rel=1e-9)
    assert delayed.predict(32, 4) == pytest.approx(plain.predict(32, 4) + 0.25)
    unaware = fit(delayed_runs, method="denoised")  # not told of it, the prompt takes the delay; beta still does not
    assert unaware.seconds_per_token == pytest.approx(BETA, rel=1e-9)


def test_denoised_is_below_raw_for_most_requests():
    rng = np.random.default_rng(3)
    runs = [(p, o, exact(p, o) + 0.02 * rng.exponential()) for p in PROMPTS for o in OUTPUTS for _ in range(20)]
    model = fit(runs, method="denoised")
    assert share_below(model, runs) < 0.1
    assert share_below(model.scaled(10), runs) > 0.9
    with pytest.raises(ValueError, match="runs"):
        share_below(model, [])


def test_a_third_of_the_layers_is_scaled_by_three():
    model = fit(exact_runs(), overhead_seconds=0.01)
    tripled = model.scaled(3)
    assert tripled.predict(32, 16) - 0.01 == pytest.approx(3 * (model.predict(32, 16) - 0.01))
    with pytest.raises(ValueError, match="factor"):
        model.scaled(0)


# Misfit


def test_a_growing_cost_per_token_is_reported_as_misfit_and_fitted_by_the_context_slope():
    runs = [(p, o, KNOTS[p] + sum(0.002 + 1e-5 * (p + i) for i in range(1, o))) for p in PROMPTS for o in OUTPUTS]
    constant, context = fit(runs), fit(runs, slope="context")
    assert constant.fit.maximum > 0.05
    assert context.fit.maximum < 1e-9
    assert context.r2 == pytest.approx(1)
    assert constant.r2 < 0.99


def test_isotonic_smoothing_repairs_falling_prompt_times_only():
    assert non_decreasing([1.0, 3.0, 2.0, 2.0, 5.0]) == pytest.approx([1, 7 / 3, 7 / 3, 7 / 3, 5])
    assert non_decreasing([3.0, 2.0, 1.0]) == [2, 2, 2]
    assert non_decreasing([1.0, 2.0, 2.0]) == [1, 2, 2]
    rng = np.random.default_rng(4)
    values = rng.random(8)
    smooth = np.array(non_decreasing(values.tolist()))
    for _ in range(200):  # nothing non-decreasing lies closer
        other = np.sort(rng.random(8))
        assert ((smooth - values) ** 2).sum() <= ((other - values) ** 2).sum() + 1e-12
    bumpy = [(p, o, t + (0.03 if p == 32 else 0)) for p, o, t in exact_runs()]
    assert list(np.diff(fit(bumpy).prompt_seconds) > 0) == [True, False, True]
    assert (np.diff(fit(bumpy, isotonic=True).prompt_seconds) >= 0).all()


def test_the_released_variant_rounds_to_milliseconds():
    released = fit(exact_runs(), variant="as_released")
    assert released.seconds_per_token == 0.012
    assert released.prompt_seconds == (0.02, 0.024, 0.041, 0.12)
    tiny = [(p, o, 1e-4 * o) for p in (1, 8) for o in (1, 4)]
    assert fit(tiny, variant="as_released").seconds_per_token == 0  # the reason it is not the default
    assert fit(tiny).seconds_per_token == pytest.approx(1e-4)


# Profiling


def test_profile_measures_the_grid_and_reports_held_out_errors():
    calls = []

    def run(p, o):
        calls.append((p, o))
        return 0.01 + 1e-5 * p + 0.002 * (o - 1)

    model = profile(run, prompt_tokens=PROMPTS, output_tokens=OUTPUTS, repeats=3, warmup=2)
    grid = {(p, o) for p in PROMPTS for o in OUTPUTS}
    apart = middle_cells(PROMPTS, OUTPUTS)
    assert len(apart) == 3
    assert not set(apart) & grid
    assert calls[:8] == [(p, 1) for p in PROMPTS for _ in range(2)]
    assert all(calls.count(cell) == 3 for cell in [*apart, (512, 64)])
    assert calls[8 : 8 + 19] != calls[8 + 19 : 8 + 38]  # another order each time
    assert model.held_out.cells == 3
    assert model.held_out.maximum < 1e-9
    assert model.fit.cells == 16
    assert model.profiling_seconds > 0
    nothing = profile(run, prompt_tokens=(1, 2), output_tokens=(1, 2), held_out=())
    assert nothing.held_out is None
    chosen = profile(run, prompt_tokens=(1, 9), output_tokens=(1, 5), held_out=[(4, 3)])
    assert chosen.held_out.cells == 1


def test_held_out_errors_see_what_the_grid_does_not():
    model = profile(
        lambda p, o: 0.01 * (2 if p == 300 else 1) * o,
        prompt_tokens=(1, 600),
        output_tokens=(1, 8),
        held_out=[(300, 4)],
    )
    assert model.fit.maximum < 1e-9
    assert model.held_out.maximum == pytest.approx(0.5)


def test_a_run_that_returns_nothing_is_timed():
    model = profile(lambda p, o: time.sleep(0.002 * o), prompt_tokens=(1, 2), output_tokens=(1, 11), repeats=2)
    assert 0.0015 < model.seconds_per_token < 0.02


def test_the_grid_of_the_paper():
    assert len(PAPER_PROMPT_TOKENS) == 27
    assert (PAPER_PROMPT_TOKENS[0], PAPER_PROMPT_TOKENS[-1]) == (1, 1920)
    assert len(PAPER_OUTPUT_TOKENS) == 10
    assert PAPER_OUTPUT_TOKENS[-1] == 64


def test_a_transformers_model_generates_exactly_what_is_asked():
    network = tiny_model(hidden_size=16, intermediate_size=24, num_hidden_layers=1)
    seen = []
    network.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    for static in (False, True):
        run = transformers_runner(network, static_cache=static)
        seen.clear()
        seconds = run(5, 4)
        assert isinstance(seconds, float)
        assert [ids.shape[1] for ids in seen] == [5, 1, 1, 1]  # prompt, then one token at a time
        first = seen[0]
        run(5, 4)
        assert not torch.equal(first, seen[4])  # another prompt every time
    model = profile(run, prompt_tokens=(1, 8), output_tokens=(1, 6), repeats=2)
    assert model.predict(4, 3) > 0


# Files


def test_json_round_trip(tmp_path):
    model = profile(lambda p, o: 0.1 * p + o / 3, prompt_tokens=PROMPTS, output_tokens=OUTPUTS, slope="context")
    assert RuntimeModel.from_json(model.to_json()) == model
    model.save(tmp_path / "model.json")
    assert RuntimeModel.load(tmp_path / "model.json") == model
    bare = fit(exact_runs())
    assert RuntimeModel.from_json(bare.to_json()) == bare
    for text in ["", "[]", "{}", '{"format": "runtime model 1"}', model.to_json().replace("prompt_seconds", "else")]:
        with pytest.raises(ValueError, match="not a runtime model"):
            RuntimeModel.from_json(text)


# What it is for


def test_cost_is_linear_in_accelerators_and_price():
    assert dollars(3600.0, accelerators=1, dollars_per_hour=2.5) == 2.5
    assert dollars(10.0, accelerators=8, dollars_per_hour=2) == 2 * dollars(10.0, accelerators=4, dollars_per_hour=2)
    assert dollars(10.0, accelerators=4, dollars_per_hour=6) == pytest.approx(
        3 * dollars(10.0, accelerators=4, dollars_per_hour=2)
    )
    assert joules(10.0, accelerators=2, watts=400) == 8000
    assert list(dollars(np.array([3600.0, 7200.0]), accelerators=1, dollars_per_hour=1)) == [1, 2]
    with pytest.raises(ValueError, match="accelerators"):
        dollars(1.0, accelerators=0, dollars_per_hour=1)
    with pytest.raises(ValueError, match="watts"):
        joules(1.0, accelerators=1, watts=-1)


def test_rows_of_a_harness_get_their_columns():
    local, api = fit(exact_runs()), fit([(p, o, t + 0.3) for p, o, t in exact_runs()], overhead_seconds=0.3)
    rows = [{"id": "a", "prompt_tokens": 32, "output_tokens": 4}, {"id": "b", "prompt_tokens": 128, "output_tokens": 1}]
    out = add_runtimes(rows, {"idealized_seconds": local, "denoised_seconds": api})
    assert out[0] == {
        **rows[0],
        "idealized_seconds": local.predict(32, 4),
        "denoised_seconds": api.predict(32, 4),
    }
    assert "idealized_seconds" not in rows[0]


def test_pareto_front():
    assert pareto_front([1, 2, 3, 2], [1, 3, 3, 2]) == [0, 1]
    assert pareto_front([1, 1], [5, 5]) == [0, 1]


def test_flops_are_blind_to_the_system():
    assert flops_proxy(135_000_000, 100, 28) == 2 * 135_000_000 * 128
    assert flops_proxy(1, 127, 1) == flops_proxy(1, 64, 64)  # though decoding 64 tokens takes far longer than one


def test_savings_by_the_released_formulas():
    model = fit(exact_runs())
    requests, grid = [(128, 16)] * 4000, [(p, o) for p in PROMPTS for o in OUTPUTS]
    ratio = model.total(requests) / model.total(grid)
    assert idealized_saving(model, requests, grid) == pytest.approx(ratio)
    assert idealized_saving(model, requests, grid, trials=3) == pytest.approx(ratio)  # both sides run the same trials
    api = sum(p * 0.0015 + o * 0.002 for p, o in requests) / 1000
    local = 50 * model.total(requests) * 40.96 / 3600
    with_prices = idealized_saving(
        model, requests, grid, dollars_per_hour=40.96, api_dollars_in=0.0015, api_dollars_out=0.002
    )
    assert with_prices == pytest.approx((local + api) / (local / ratio + api))
    assert with_prices < ratio
    saving = denoised_saving(requests, grid)
    assert 9 < saving < 10  # one pass over the requests is still needed, so never more than the number of trials
    assert denoised_saving(requests * 100, grid) > saving
    assert denoised_saving(grid, grid) < 1


# Refusals


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="method"):
        fit(exact_runs(), method="guess")
    with pytest.raises(ValueError, match="slope"):
        fit(exact_runs(), slope="steep")
    with pytest.raises(ValueError, match="variant"):
        fit(exact_runs(), variant="mine")
    with pytest.raises(ValueError, match="overhead_seconds"):
        fit(exact_runs(), overhead_seconds=-1)
    with pytest.raises(ValueError, match="overhead_seconds"):
        fit(exact_runs(), overhead_seconds=1)
    with pytest.raises(ValueError, match="runs"):
        fit([])
    with pytest.raises(ValueError, match="one output token"):
        fit([(p, o, t) for p, o, t in exact_runs() if (p, o) != (32, 1)])
    with pytest.raises(ValueError, match="two output lengths"):
        fit([(1, 1, 1.0), (1, 2, 2.0), (8, 1, 1.0)], method="denoised")
    with pytest.raises(ValueError, match="different output lengths"):
        fit([(1, 1, 1.0), (8, 1, 1.0)])
    with pytest.raises(ValueError, match="context"):
        fit([(1, 1, 1.0), (1, 2, 1.0)], slope="context")
    with pytest.raises(ValueError, match="seconds"):
        fit([(1, 1, 0.0)])
    with pytest.raises(ValueError, match="seconds"):
        fit([(1, 1, float("nan"))])
    for bad in ({"repeats": 0}, {"warmup": -1}, {"prompt_tokens": ()}, {"output_tokens": (0, 1)}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            profile(lambda p, o: 1.0, **{"prompt_tokens": (1,), "output_tokens": (1, 2), **bad})
    for bad in ((9, 1), (1, 2)):
        with pytest.raises(ValueError, match="held_out"):
            profile(lambda p, o: 1.0, prompt_tokens=(1, 4), output_tokens=(1, 2), held_out=[bad])
    with pytest.raises(ValueError, match="runs"):
        fit(exact_runs()).errors([])


# An endpoint that streams, delays at random and serves several at once


TOKEN, PROMPT_TOKEN, FIXED = 0.003, 0.00004, 0.004


class Server(ThreadingHTTPServer):
    """Times are counted from a request's arrival, so that late wake-ups do not add up."""

    def __init__(self, overhead=0.0, noise=0.02, short_every=0, usage=True, key=None, never=(), broken=()):
        self.never, self.broken = never, broken  # output lengths that come short, or end in an error
        super().__init__(("127.0.0.1", 0), Handler)
        self.overhead, self.noise, self.short_every, self.usage, self.key = overhead, noise, short_every, usage, key
        self.random, self.lock, self.count, self.active, self.peak, self.bodies = (
            random.Random(0), threading.Lock(), 0, 0, 0, [],
        )  # fmt: skip
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # small pieces go out at once

    def log_message(self, *args):
        pass

    def do_GET(self):
        if self.refuse():
            return
        time.sleep(self.server.overhead)
        self.answer(b'{"data": [{"id": "m"}]}')

    def do_POST(self):
        start = time.perf_counter()
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.refuse():
            return
        with server.lock:
            server.bodies.append((self.path, body))
            server.count += 1
            server.active += 1
            server.peak = max(server.peak, server.active)
            delay = (
                server.random.expovariate(1 / server.noise) if server.noise and server.random.random() < 0.5 else 0.0
            )
            short = server.short_every and server.count % server.short_every == 0
        short = short or body["max_tokens"] in server.never
        if body["max_tokens"] in server.broken:
            self.send_response(500)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        chat = self.path.endswith("/chat/completions")
        text = body["messages"][0]["content"] if chat else body["prompt"]
        p, o = len(text.split()) + 3, body["max_tokens"] - bool(short)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for i in range(o):
            due = start + server.overhead + delay + FIXED + PROMPT_TOKEN * p + i * TOKEN
            time.sleep(max(0.0, due - time.perf_counter()))
            piece = {"delta": {"content": "x "}} if chat else {"text": "x "}
            self.event({"choices": [{**piece, "finish_reason": "length" if i == o - 1 and not short else None}]})
        with server.lock:
            server.active -= 1
        if server.usage:
            self.event({"choices": [], "usage": {"prompt_tokens": p, "completion_tokens": o}})
        self.chunk(b"data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def refuse(self):
        if self.server.key and self.headers.get("Authorization") != f"Bearer {self.server.key}":
            self.send_response(401)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return True
        return False

    def answer(self, content):
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def event(self, fields):
        self.chunk(f"data: {json.dumps(fields)}\n\n".encode())

    def chunk(self, content):
        self.wfile.write(b"%x\r\n%s\r\n" % (len(content), content))
        self.wfile.flush()


def test_beta_of_a_noisy_concurrent_endpoint_is_recovered_within_a_tenth():
    with Server(noise=0.02) as server:
        probed = probe_endpoint(
            server.url, "m", prompt_tokens=(10, 100), output_tokens=(1, 20, 60), repeats=6, concurrency=3
        )
    assert probed.model.seconds_per_token == pytest.approx(TOKEN, rel=0.1)
    assert probed.model.prompt_tokens == (13, 103)  # as the server counts
    assert server.peak > 1
    assert len(probed.requests) == 36
    assert probed.dropped == 0
    assert probed.model.method == "denoised"
    raw = probed.raw_mean_seconds[13, 60]
    assert raw > probed.model.predict(13, 60) > 59 * TOKEN
    runs = [(r.prompt_tokens, r.output_tokens, r.seconds) for r in probed.requests]
    assert share_below(probed.model, runs) < 0.4
    assert FIXED < probed.ttft[13] < 0.2
    assert 0.5 * TOKEN < probed.inter_token_seconds < 3 * TOKEN
    assert all(len(r.arrivals) == r.output_tokens for r in probed.requests)
    prompts = [body["prompt"] for _, body in server.bodies]
    assert len(set(prompts)) == len(prompts)  # no two alike: prompt caches cannot help
    assert server.bodies[0][1]["ignore_eos"] is True


def test_a_delay_of_the_network_goes_to_the_overhead():
    with Server(overhead=0.05, noise=0) as server:
        delayed = probe_endpoint(server.url, "m", prompt_tokens=(10,), output_tokens=(1, 40), repeats=3)
    assert delayed.model.overhead_seconds >= 0.05
    assert delayed.model.seconds_per_token == pytest.approx(TOKEN, rel=0.1)
    assert delayed.model.prompt_seconds[0] < 0.04


def test_answers_of_another_length_are_dropped_and_servers_without_usage_are_understood():
    with Server(noise=0, short_every=3) as server:
        probed = probe_endpoint(server.url, "m", prompt_tokens=(10,), output_tokens=(2, 9), repeats=4, chat=True)
    assert probed.dropped == 2
    assert {path for path, _ in server.bodies} == {"/v1/chat/completions"}
    with Server(noise=0, short_every=3, usage=False) as server:
        silent = probe_endpoint(server.url, "m", prompt_tokens=(10,), output_tokens=(2, 9), repeats=4)
    assert silent.dropped == 2
    assert silent.model.prompt_tokens == (10,)
    with Server(noise=0, short_every=1) as server, pytest.raises(RuntimeError, match="asked length"):
        probe_endpoint(server.url, "m", prompt_tokens=(10,), output_tokens=(2, 3), repeats=1)


@pytest.mark.parametrize("fault", ["never", "broken"])
def test_one_cell_without_an_answer_does_not_cost_the_probe(fault):
    """What the other cells told is kept, and the cell is named."""
    options = {"prompt_tokens": (10,), "output_tokens": (2, 9, 20), "repeats": 2}
    with Server(noise=0, **{fault: (9,)}) as server:
        probed = probe_endpoint(server.url, "m", **options)
    assert probed.missing == ((10, 9),)
    assert probed.dropped == 2
    assert probed.model.seconds_per_token == pytest.approx(TOKEN, rel=0.2)
    with Server(noise=0, **{fault: (2, 9)}) as server, pytest.raises(ProbeError, match="asked length") as caught:
        probe_endpoint(server.url, "m", **options)
    assert {answer.output_tokens for answer in caught.value.requests} >= {20}
    with Server(noise=0, broken=(2, 9, 20)) as server, pytest.raises(ConnectionError, match="500"):
        probe_endpoint(server.url, "m", **options)


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize("bad", [NAN, INFINITY, -1.0, 0.0])
def test_nan_and_infinity_pass_no_guard(bad):
    model = fit(exact_runs())
    with pytest.raises(ValueError, match="^prompt_tokens must be finite and at least 1"):
        model.predict([1, bad], 1, extrapolate=True)
    with pytest.raises(ValueError, match="^output_tokens must be finite and at least 1"):
        model.predict(1, bad, extrapolate=True)
    with pytest.raises(ValueError, match="^factor must be"):
        model.scaled(bad)
    with pytest.raises(ValueError, match="^seconds must be .* for 1 prompt and 1 output tokens"):
        fit([(1, 1, bad), *exact_runs()])
    if bad != 0:
        with pytest.raises(ValueError, match="^overhead_seconds must be"):
            fit(exact_runs(), overhead_seconds=bad)
        with pytest.raises(ValueError, match="^watts must be"):
            joules(1.0, accelerators=1, watts=bad)
        with pytest.raises(ValueError, match="^dollars_per_hour must be"):
            dollars(1.0, accelerators=1, dollars_per_hour=bad)
    if not bad <= 0:
        with pytest.raises(ValueError, match="^costs must be a finite number"):
            pareto_front([1.0, bad], [1.0, 2.0])
        with pytest.raises(ValueError, match="^text is not a runtime model"):
            RuntimeModel.from_json(json.dumps(json.loads(model.to_json()) | {"seconds_per_token": bad}))


def test_lengths_are_whole():
    for bad in (3.7, True, "3"):
        with pytest.raises(TypeError, match="output tokens must be a whole number"):
            fit([(1, bad, 1.0), *exact_runs()])
        with pytest.raises(TypeError, match="prompt_tokens must be a whole number"):
            profile(exact, prompt_tokens=[bad], output_tokens=[1])
    assert fit([(np.int64(p), np.int32(o), np.float32(t)) for p, o, t in exact_runs()]).largest_output == 64


def test_a_bad_time_is_told_when_it_is_measured():
    calls = []

    def run(p, o):
        calls.append((p, o))
        return NAN

    with pytest.raises(ValueError, match="seconds must be"):
        profile(run, prompt_tokens=(1, 32), output_tokens=(1, 4))
    assert len(calls) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"prompt_tokens": [32, 1]},
        {"prompt_tokens": []},
        {"prompt_seconds": [1.0]},
        {"largest_output": 2.5},
        {"r2": "x"},
        {"fit": 3},
    ],
)
def test_damaged_documents_are_refused(change):
    document = json.loads(fit(exact_runs()).to_json())
    with pytest.raises(ValueError, match="^text is not a runtime model"):
        RuntimeModel.from_json(json.dumps(document | change))


def test_endpoints_that_refuse_or_are_not_there():
    with Server(noise=0, key="secret") as server:
        with pytest.raises(ConnectionError, match="401"):
            probe_endpoint(server.url, "m", prompt_tokens=(1,), output_tokens=(1, 2))
        probe_endpoint(server.url, "m", prompt_tokens=(1,), output_tokens=(1, 2), repeats=1, api_key="secret")
    with pytest.raises(ConnectionError, match="cannot be reached"):
        probe_endpoint(server.url, "m", prompt_tokens=(1,), output_tokens=(1, 2))
    with Server(overhead=0.02, noise=0) as server, pytest.raises(RuntimeError, match="overhead_seconds"):
        probe_endpoint(server.url, "m", prompt_tokens=(1,), output_tokens=(1, 2), repeats=1, overhead_seconds=5.0)
    for bad in ({"repeats": 0}, {"concurrency": 0}, {"prompt_tokens": ()}, {"output_tokens": (0,)}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            probe_endpoint(server.url, "m", **bad)


def test_the_test_server_speaks_openai():
    """The same server answers the official client, so that what the prober speaks is the real protocol."""
    openai = pytest.importorskip("openai")
    with Server(noise=0) as server:
        client = openai.OpenAI(base_url=server.url, api_key="any")
        stream = client.completions.create(
            model="m", prompt="a b c", max_tokens=3, stream=True, stream_options={"include_usage": True}
        )
        events = list(stream)
    assert "".join(event.choices[0].text for event in events if event.choices) == "x x x "
    assert events[-1].usage.completion_tokens == 3


@pytest.mark.model
def test_a_profile_of_the_bundled_model_predicts_lengths_it_has_not_seen(smollm2):
    run = transformers_runner(smollm2.model)
    model = profile(run, prompt_tokens=(1, 32), output_tokens=(1, 4), repeats=1)
    assert min(model.prompt_seconds) > 0
    assert model.held_out.cells == 1


# The experiments


def test_real_requests_are_halves_of_docstrings():
    from assay.experiments.core import experiments_of
    from assay.experiments.serving.idealized_runtime import docstring_requests

    assert {found.claim.split("/")[1] for found in experiments_of("idealized_runtime")} == {
        "linear-fit",
        "profiling-saving",
        "denoised-saving",
    }

    def tokenizer(texts, **options):
        return {
            "input_ids": list(texts.encode()) if isinstance(texts, str) else [list(text.encode()) for text in texts]
        }

    requests = docstring_requests(tokenizer, (4, 200), 64)
    assert len(requests) > 100
    assert all(4 <= len(ids) <= 200 and 1 <= rest <= 64 for ids, rest in requests)


@pytest.mark.slow
@pytest.mark.model
def test_the_experiments_run_at_smoke_scale():
    from assay.experiments.core import experiments_of

    figures = {found.claim: found.run(**found.points["smoke"][0]) for found in experiments_of("idealized_runtime")}
    assert figures["idealized_runtime/linear-fit"].value > 0.8
    assert figures["idealized_runtime/profiling-saving"].value > 10
    assert 5 < figures["idealized_runtime/denoised-saving"].value < 10


# Nothing is paid for what cannot be answered


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"method": "x"}, ValueError),
        ({"slope": None}, ValueError),
        ({"isotonic": 1}, TypeError),
        ({"held_out": [(1.5, 2)]}, TypeError),
        ({"held_out": [(4, True)]}, TypeError),
        ({"output_tokens": (2, 4)}, ValueError),  # idealized needs one output token
        ({"output_tokens": (1,)}, ValueError),
        ({"prompt_tokens": (8,), "output_tokens": (1, 2), "slope": "context"}, ValueError),
    ],
)
def test_what_cannot_be_profiled_is_refused_before_the_first_run(changes, error):
    grid = {"prompt_tokens": (1, 8), "output_tokens": (1, 2, 4)}
    with pytest.raises(error):
        profile(lambda p, o: pytest.fail("was run"), **{**grid, **changes})


@pytest.mark.parametrize(
    ("changes", "error"), [({"slope": "x"}, ValueError), ({"chat": "no"}, TypeError), ({"isotonic": 1}, TypeError)]
)
def test_a_bad_probe_is_refused_before_the_first_request(changes, error):
    with pytest.raises(error, match=next(iter(changes))):
        probe_endpoint("http://127.0.0.1:1/v1", "m", **changes)  # where nobody answers


def test_savings_need_requests_and_a_grid():
    model = RuntimeModel((1, 101), (0.1, 0.2), 0.05, largest_output=64, fit=Errors(0.0, 0.0, 0), r2=1.0)
    for saving in (denoised_saving, lambda requests, grid: idealized_saving(model, requests, grid)):
        for requests, grid, name in (
            ([], [(1, 1)], "requests"),
            ([(1, 1)], [], "grid"),
            ([(float("nan"), 1)], [(1, 1)], "requests"),
        ):
            with pytest.raises(ValueError, match=name):
                saving(requests, grid)
    with pytest.raises(ValueError, match="must not both be 0"):
        denoised_saving([(1, 1)], [(1, 1)], api_dollars_in=0, api_dollars_out=0)


def test_a_model_holds_what_it_says_and_numpys_numbers_are_written():
    numbers = {"prompt_tokens": (np.int64(1), np.int64(9)), "prompt_seconds": (np.float64(0.1), np.float32(0.25))}
    rest = {"seconds_per_token": np.float64(0.5), "largest_output": np.int64(5), "fit": Errors(0.0, 0.0, 0), "r2": 1.0}
    model = RuntimeModel(**numbers, **rest)
    assert RuntimeModel.from_json(model.to_json()) == model
    for changes, error in (({"method": "x"}, ValueError), ({"fit": None}, TypeError), ({"held_out": 5}, TypeError)):
        with pytest.raises(error, match=next(iter(changes))):
            RuntimeModel(**{**numbers, **rest, **changes})
    with pytest.raises(ValueError, match="values must be a finite number"):
        non_decreasing([3.0, float("nan"), 1.0])
    with pytest.raises(ValueError, match="seconds must be a finite number above 0"):
        share_below(model, [(1, 1, float("nan"))])
    with pytest.raises(TypeError, match="isotonic must be True or False"):
        fit([(1, 1, 1.0), (1, 2, 2.0)], isotonic="no")

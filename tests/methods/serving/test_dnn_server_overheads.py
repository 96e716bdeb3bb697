"""The vision server: lives are divided whole, images come out the same wherever they are prepared, and every request is answered once."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from assay.errors import InputError
from assay.methods.serving.dnn_server_overheads import (
    BETWEEN,
    INFERENCE,
    UNSEEN,
    Batcher,
    Busy,
    Lifetime,
    Pipeline,
    Preprocess,
    Refused,
    StageProfiler,
    Stopped,
    WorkerLost,
    Workers,
    breakdown,
    chrome_trace,
    closed_loop,
    flow,
    open_loop,
    read_spans,
    share_outside,
    write_spans,
)

SIDE = 64


def jpeg(width=500, height=375, seed=0, mode="RGB"):
    """A smooth picture with some detail, as photographs have."""
    chance = np.random.default_rng(seed)
    rough = Image.fromarray(chance.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    picture = rough.resize((width, height), Image.Resampling.BICUBIC).convert(mode)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=90)
    return file.getvalue()


JPEG = jpeg()


def total(batch):
    """A network: the sum of each image."""
    return [float(one.sum()) for one in np.asarray(batch, np.float64)]


# ------------------------------------------------------------------------------------------------------------------ lives


def test_stages_divide_a_life_without_gap_or_overlap():
    with Pipeline(total, Preprocess(SIDE), size=4, tau=0.001) as pipeline:
        times = []
        for _ in range(5):
            start = time.monotonic()
            pipeline.submit(JPEG).result()
            times.append((start, time.monotonic()))
        lives = pipeline.profiler.lifetimes()
    assert len(lives) == 5
    for life, (start, end) in zip(lives, times, strict=True):
        assert [span.stage for span in life.spans] == [
            "decode",
            "resize",
            "normalise",
            "queue",
            INFERENCE,
            "post-process",
        ]
        assert life.spans[0].start == life.start
        assert all(one.end == two.start for one, two in zip(life.spans, life.spans[1:], strict=False))
        assert sum(span.seconds for span in life.spans) == pytest.approx(life.seconds)
        assert start <= life.start < life.last <= end  # what its client saw holds all of it
    shares = breakdown(lives)
    assert sum(one.share for one in shares.values()) == pytest.approx(1)
    assert share_outside(lives, INFERENCE) == pytest.approx(1 - shares[INFERENCE].share)


def test_what_nobody_named_is_counted():
    life = Lifetime(at=1.0)
    life.last = life.start = time.monotonic() - 1
    with pytest.raises(KeyError), life.stage("decode"):
        raise KeyError
    assert [span.stage for span in life.spans] == [BETWEEN, "decode"]
    assert life.of(BETWEEN) >= 1
    with pytest.raises(ValueError, match="before the last border"):
        life.mark("x", at=life.last - 1)
    assert life.of("x") == 0


def test_a_batch_counts_in_full_for_latency_and_in_part_for_cost():
    release = threading.Event()

    def network(items):
        release.wait(5)
        return items

    with Batcher(network, size=3, tau=60) as batcher:
        lives = [Lifetime(str(i)) for i in range(3)]
        answers = [batcher.submit(i, life) for i, life in enumerate(lives)]
        release.set()
        assert [answer.result(5) for answer in answers] == [0, 1, 2]
    spent = [life.spans[-1] for life in lives]
    assert {span.stage for span in spent} == {INFERENCE}
    assert all(span.cost == pytest.approx(span.seconds / 3) for span in spent)


def test_sampling_keeps_one_in_k_and_the_newest():
    profiler = StageProfiler(every=3, most=2)
    for number in range(10):
        life = profiler.begin(str(number), at=float(number))
        life.mark("a", at=number + 1.0)
        profiler.end(life)
    assert [life.name for life in profiler.lifetimes()] == ["6", "9"]
    assert (profiler.begun, profiler.dropped) == (10, 2)
    assert not UNSEEN.spans
    profiler.clear()
    assert profiler.lifetimes() == []
    assert profiler.dropped == 0
    with Pipeline(total, Preprocess(8), size=1, tau=0.0, profiler=StageProfiler(every=3)) as pipeline:
        assert len({pipeline.submit(JPEG).result() for _ in range(4)}) == 1
        assert [life.name for life in pipeline.profiler.lifetimes()] == ["0", "3"]


def test_spans_are_read_back_and_lanes_do_not_overlap(tmp_path):
    lives = []
    for number, start in enumerate((0.0, 0.5, 2.0)):
        life = Lifetime(str(number), at=start)
        life.mark("a", at=start + 0.25)
        life.mark("b", at=start + 1.0, batch=2)
        lives.append(life)
    trace = chrome_trace(lives)
    assert [event["tid"] for event in trace["traceEvents"]] == [0, 0, 1, 1, 0, 0]
    assert [event["ts"] for event in trace["traceEvents"]] == [0, 250000, 500000, 750000, 2000000, 2250000]
    write_spans(lives, tmp_path / "t.json")
    assert json.loads((tmp_path / "t.json").read_text()) == trace
    again = read_spans(tmp_path / "t.json")
    assert [(life.name, life.spans) for life in again] == [(life.name, life.spans) for life in lives]


def test_lives_of_one_name_that_touch_stay_two(tmp_path):
    lives = [Lifetime("same", at=float(number)) for number in range(2)]
    for number, life in enumerate(lives):
        life.mark("a", at=number + 1.0)
    write_spans(lives, tmp_path / "t.json")
    assert [life.spans for life in read_spans(tmp_path / "t.json")] == [life.spans for life in lives]
    write_spans([], tmp_path / "none.json")
    assert read_spans(tmp_path / "none.json") == []


def test_what_is_no_file_of_spans_is_refused(tmp_path, monkeypatch):
    life = Lifetime("x", at=0.0)
    life.mark("a", at=1.0)
    life.mark("b", at=2.0)
    whole = chrome_trace([life])
    gap = json.loads(json.dumps(whole))
    del gap["traceEvents"][0]
    gap["traceEvents"][0]["args"]["start"] = 1.5  # its stages no longer follow each other
    gap["traceEvents"].insert(0, whole["traceEvents"][0])
    bad = [json.dumps(gap), "{", "[]", '{"traceEvents": [3]}', '{"traceEvents": [{"tid": 0}]}', '{"traceEvents": 3}']
    for text in [*bad, json.dumps(whole).replace("2.0", "NaN"), "[" * 100_000]:
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(InputError, match=r"bad\.json"):
            read_spans(tmp_path / "bad.json")
    with pytest.raises(InputError, match="cannot read"):
        read_spans(tmp_path / "none.json")
    monkeypatch.setattr("assay.methods.serving.dnn_server_overheads.profiler.LARGEST", 10)
    with pytest.raises(InputError, match="at most 10"):
        read_spans(tmp_path / "bad.json")


def test_littles_law_holds_in_a_steady_state_and_notices_lives_that_are_missing():
    lives = []
    for number in range(400):
        life = Lifetime(at=number / 10)
        life.mark("a", at=number / 10 + 0.3 + 0.2 * (number % 3))
        lives.append(life)
    found = flow(lives, 5.0, 35.0)
    assert found.error < 0.05
    assert found.throughput == pytest.approx(10, rel=0.05)
    stuck = Lifetime(at=0.0)
    stuck.mark("a", at=100.0)  # never ends in the window
    assert flow([*lives, *[stuck] * 3], 5.0, 35.0).error > 0.3
    with pytest.raises(ValueError, match="no lifetime"):
        flow(lives, 100.0, 101.0)
    point = Lifetime(at=6.0)
    point.mark("a", at=6.0)
    assert flow([point], 5.0, 7.0).error == 0
    with pytest.raises(ValueError, match="end must"):
        flow(lives, float("nan"), 7.0)
    with pytest.raises(ValueError, match="end must"):
        flow(lives, 5.0, 5.0)


# ---------------------------------------------------------------------------------------------------------------- images


def test_bytes_normalised_in_the_batch_are_float32_normalised_before_to_the_bit():
    plain, late = Preprocess(SIDE), Preprocess(SIDE, precision="uint8")
    one, two = plain(JPEG), late(JPEG)
    assert (one.dtype, one.shape, one.nbytes) == (np.float32, plain.shape, plain.nbytes)
    assert (two.dtype, two.shape, two.nbytes) == (np.uint8, late.shape, late.nbytes)
    assert plain.nbytes == 4 * late.nbytes
    batch = late.normalised(np.stack([two, two]))
    assert torch.equal(batch[1], plain.normalised(one[None])[0])
    assert batch.shape == (2, 3, SIDE, SIDE)
    half = Preprocess(SIDE, precision="float16")
    assert half.nbytes == plain.nbytes // 2
    assert torch.allclose(half.normalised(half(JPEG)[None]), batch[:1], atol=2e-3)


def test_pixels_are_normalised_as_the_formula_says():
    preprocess = Preprocess(SIDE, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 1.0))
    pixels = Preprocess(SIDE, precision="uint8")(JPEG).astype(np.float64) / 255
    wanted = (pixels - [0.1, 0.2, 0.3]) / [0.5, 0.25, 1.0]
    assert np.allclose(preprocess(JPEG), wanted.transpose(2, 0, 1), atol=1e-6)


def test_the_central_square_is_taken():
    wide = np.zeros((50, 100, 3), np.uint8)
    wide[:, 25:75] = 200
    file = io.BytesIO()
    Image.fromarray(wide).save(file, "JPEG", quality=95)
    assert Preprocess(25, precision="uint8")(file.getvalue())[:, 2:-2].min() > 190


def test_draft_decoding_changes_pixels_a_little_and_leaving_out_antialiasing_changes_them_much():
    detail = np.random.default_rng(0).integers(0, 256, (600, 800, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(detail).resize((1600, 1200), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    base = Preprocess(SIDE, precision="uint8")(file.getvalue()).astype(float)
    draft = Preprocess(SIDE, precision="uint8", draft=True)(file.getvalue()).astype(float)
    nearest = Preprocess(SIDE, precision="uint8", kernel="nearest")(file.getvalue()).astype(float)
    assert 0 < np.abs(draft - base).mean() < 4
    assert np.abs(nearest - base).mean() > 20


def test_a_draft_is_never_smaller_than_the_input(monkeypatch):
    sizes = []
    real = Preprocess._resized
    monkeypatch.setattr(Preprocess, "_resized", lambda self, picture: sizes.append(picture.size) or real(self, picture))
    for size in (16, 47, 64, 300):
        Preprocess(size, draft=True)(JPEG)
    assert sizes == [(63, 47), (125, 94), (125, 94), (500, 375)]


@pytest.mark.parametrize(
    ("data", "says"),
    [(b"", "JPEG"), (b"no image", "JPEG"), (JPEG[:300], "JPEG"), (JPEG[: len(JPEG) // 2], "JPEG")],
    ids=["empty", "text", "header", "half"],
)
def test_what_is_no_jpeg_is_refused(data, says):
    with pytest.raises(ValueError, match=says) as told:
        Preprocess(SIDE)(data)
    assert "0x" not in str(told.value)  # no address in memory, which a server would tell its clients


def test_other_images_too_large_ones_and_other_types_are_refused(monkeypatch):
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    with pytest.raises(ValueError, match="JPEG"):
        Preprocess(SIDE)(file.getvalue())
    with pytest.raises(TypeError, match="bytes"):
        Preprocess(SIDE)("text")
    monkeypatch.setattr("assay.methods.serving.dnn_server_overheads.preprocess.PIXELS", 500 * 375 - 1)
    with pytest.raises(ValueError, match="500 x 375"):
        Preprocess(SIDE)(JPEG)


def test_whatever_bytes_come_they_are_an_image_or_refused():
    chance, data, found = np.random.default_rng(0), bytearray(jpeg(64, 48)), {"image": 0, "refused": 0}
    for _ in range(200):
        turned = data.copy()
        for place in chance.integers(0, len(turned), 3):
            turned[place] = int(chance.integers(256))
        try:
            made = Preprocess(8, draft=bool(chance.integers(2)))(bytes(turned))
        except ValueError:
            found["refused"] += 1
            continue
        assert made.shape == (3, 8, 8)
        found["image"] += 1
    assert min(found.values()) > 0


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1)])
def test_the_narrowest_images_are_taken(size):
    for draft in (False, True):
        assert Preprocess(8, draft=draft)(jpeg(*size)).shape == (3, 8, 8)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_images_of_other_colours_have_three_channels(mode):
    for draft in (False, True):
        assert Preprocess(SIDE, draft=draft)(jpeg(mode=mode)).shape == (3, SIDE, SIDE)


def test_how_a_camera_was_held_is_not_applied():
    turned = Image.Exif()
    turned[0x0112] = 6
    note = turned.tobytes()
    data = JPEG[:2] + b"\xff\xe1" + (len(note) + 2).to_bytes(2, "big") + note + JPEG[2:]
    assert Image.open(io.BytesIO(data)).getexif()[0x0112] == 6
    assert np.array_equal(Preprocess(SIDE)(data), Preprocess(SIDE)(JPEG))


@pytest.mark.parametrize(
    "settings",
    [
        {"size": 0},
        {"size": 2.0},
        {"draft": 1},
        {"precision": "int8"},
        {"kernel": "lanczos"},
        {"std": (1, 0, 1)},
        {"mean": (0.5,)},
        {"mean": (float("nan"), 0, 0)},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises((ValueError, TypeError), match=next(iter(settings))):
        Preprocess(**settings)


def test_batches_of_another_kind_are_refused():
    late = Preprocess(SIDE, precision="uint8")
    with pytest.raises(TypeError, match="batch"):
        late.normalised(np.zeros((1, SIDE, SIDE, 3), np.float32))
    with pytest.raises(ValueError, match="batch"):
        late.normalised(np.zeros((1, 3, SIDE, SIDE), np.uint8))


# --------------------------------------------------------------------------------------------------------------- batcher


def held():
    """A `run` that waits until it is let go, and notes its batches."""
    begun, go, batches = threading.Event(), threading.Event(), []

    def run(items):
        batches.append(list(items))
        begun.set()
        assert go.wait(10)
        return [("done", item) for item in items]

    return run, begun, go, batches


def test_a_batch_begins_when_it_is_full_or_the_oldest_has_waited():
    with Batcher(lambda items: items, size=4, tau=3600) as batcher:  # would wait for an hour
        answers = [batcher.submit(i) for i in range(4)]
        assert [answer.result(10) for answer in answers] == [0, 1, 2, 3]
        assert batcher.sizes == {4: 1}
    with Batcher(lambda items: items, size=4, tau=0.01) as batcher:  # nobody else comes
        assert batcher.submit(7).result(10) == 7
        assert batcher.sizes == {1: 1}


def test_what_comes_while_a_batch_runs_is_the_next_batch_at_once_and_in_order():
    run, begun, go, batches = held()
    with Batcher(run, size=3, tau=0.0) as batcher:
        answers = [batcher.submit(0)]
        assert begun.wait(10)
        answers += [batcher.submit(i) for i in range(1, 6)]
        done = []
        for number, answer in enumerate(answers):
            answer.add_done_callback(lambda _, number=number: done.append(number))
        go.set()
        assert [answer.result(10) for answer in answers] == [("done", i) for i in range(6)]
    assert batches == [[0], [1, 2, 3], [4, 5]]
    assert done == list(range(6))


def test_only_what_fails_by_itself_is_answered_with_an_error():
    calls = []

    def run(items):
        calls.append(list(items))
        if "bad" in items:
            raise OSError("broken")
        return [item.upper() for item in items]

    with Batcher(run, size=3, tau=3600) as batcher:
        answers = [batcher.submit(item) for item in ("a", "bad", "c")]
        assert answers[0].result(10) == "A"
        with pytest.raises(OSError, match="broken"):
            answers[1].result(10)
        assert answers[2].result(10) == "C"
        assert [batcher.submit(item) for item in ("x", "y", "z")][2].result(10) == "Z"  # it goes on
    assert calls == [["a", "bad", "c"], ["a"], ["bad"], ["c"], ["x", "y", "z"]]


def test_the_time_of_a_batch_that_failed_is_inference_and_no_waiting():
    def run(items):
        if "bad" in items:
            raise OSError("broken")
        return items

    lives = [Lifetime() for _ in range(2)]
    with Batcher(run, size=2, tau=3600) as batcher:
        answers = [batcher.submit(item, life) for item, life in zip(("good", "bad"), lives, strict=True)]
        assert answers[0].result(10) == "good"
        assert isinstance(answers[1].exception(10), OSError)
    for life in lives:
        assert [span.stage for span in life.spans] == ["queue", INFERENCE, "queue", INFERENCE]
        shared, own = (span for span in life.spans if span.stage == INFERENCE)
        assert (shared.cost, own.cost) == pytest.approx((shared.seconds / 2, own.seconds))
    assert batcher.sizes == {1: 2}


def test_a_run_with_too_few_answers_has_failed():
    with Batcher(lambda items: [], size=2, tau=0.0) as batcher, pytest.raises(ValueError, match="an answer for each"):
        batcher.submit(1).result(10)


def test_after_closing_nothing_is_left_unanswered():
    run, begun, go, batches = held()
    batcher = Batcher(run, size=1, tau=0.0)
    first = batcher.submit(0)
    assert begun.wait(10)
    left = [batcher.submit(i) for i in (1, 2)]
    left[0].cancel()
    go.set()
    batcher.close()
    assert first.result(0) == ("done", 0)
    assert left[0].cancelled()
    outcome = left[1]
    assert outcome.done()
    assert isinstance(outcome.exception(), Stopped) or outcome.result() == ("done", 2)
    with pytest.raises(Stopped):
        batcher.submit(3)


def test_a_cancelled_item_is_not_run():
    run, begun, go, batches = held()
    with Batcher(run, size=1, tau=0.0) as batcher:
        batcher.submit(0)
        assert begun.wait(10)
        gone, kept = batcher.submit(1), batcher.submit(2)
        assert gone.cancel()
        go.set()
        assert kept.result(10) == ("done", 2)
    assert batches == [[0], [2]]


@pytest.mark.parametrize("settings", [{"size": 0, "tau": 1}, {"size": 1, "tau": -1}, {"size": 1, "tau": float("nan")}])
def test_batchers_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match="size|tau"):
        Batcher(list, **settings)


# --------------------------------------------------------------------------------------------------------------- pipeline


def test_with_images_prepared_and_batches_of_one_the_network_is_all_there_is():
    seen = []

    def network(batch):
        seen.append(batch)
        return total(batch)

    prepared = Preprocess(SIDE)(JPEG)
    with Pipeline(network, Preprocess(SIDE), size=1, tau=0.0) as pipeline:
        assert pipeline.submit(prepared).result() == total(prepared[None])[0] == pipeline.submit(JPEG).result()
        first, second = pipeline.profiler.lifetimes()
    assert [span.stage for span in first.spans] == ["queue", INFERENCE, "post-process"]
    assert np.array_equal(seen[0], seen[1])
    assert len(seen) == 2
    assert seen[0].base is not None  # no copy was made of it


def test_wrong_inputs_are_the_answers_error_and_give_their_places_back():
    def network(batch):
        if np.isnan(batch).any():
            raise FloatingPointError("nan")
        return total(batch)

    with Pipeline(network, Preprocess(SIDE), size=1, tau=0.0, in_flight=1, finish=lambda x: 1 / (x - 3)) as pipeline:
        for image, error in (
            (b"none", ValueError),
            (np.zeros((3, SIDE, SIDE)), ValueError),
            (np.full((3, SIDE, SIDE), np.nan, np.float32), FloatingPointError),
            (_three(), ZeroDivisionError),
        ):
            with pytest.raises(error):
                pipeline.submit(image).result(10)
        assert not pipeline.profiler.lifetimes()  # of an error there is no life
        assert pipeline.submit(JPEG).result(10)
        assert len(pipeline.profiler.lifetimes()) == 1


def test_what_is_wrong_with_an_image_is_told_from_what_is_wrong_with_the_network():
    def network(batch):
        raise ValueError("the network's own")

    with Pipeline(network, Preprocess(SIDE), size=1, tau=0.0) as pipeline:
        assert isinstance(pipeline.submit(b"none").exception(10), Refused)
        assert isinstance(pipeline.submit(np.zeros(3)).exception(10), Refused)
        assert type(pipeline.submit(JPEG).exception(10)) is ValueError


def test_ctrl_c_while_an_image_is_prepared_stops_the_caller_and_gives_its_place_back(monkeypatch):
    with Pipeline(total, Preprocess(SIDE), size=1, tau=0.0, in_flight=1) as pipeline:
        with monkeypatch.context() as patched:
            patched.setattr(Preprocess, "_resized", lambda self, picture: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                pipeline.submit(JPEG)
        assert pipeline.submit(JPEG).result(10)


def test_no_more_is_answered_than_the_slowest_stage_can():
    def network(batch):
        time.sleep(0.004)  # at least
        return total(batch)

    with Pipeline(network, Preprocess(SIDE), size=2, tau=0.0) as pipeline:
        prepared = Preprocess(SIDE)(JPEG)
        load = closed_loop(lambda: lambda image: pipeline.submit(image).result(), [prepared] * 30, 4)
    assert load.throughput <= 2 / 0.004
    assert sum(size * count for size, count in pipeline.batcher.sizes.items()) == 30


def test_several_threads_may_submit_and_each_gets_its_own():
    images = [jpeg(80, 60, seed) for seed in range(4)]
    wanted = [total(Preprocess(16)(image)[None])[0] for image in images]
    with Pipeline(total, Preprocess(16), size=4, tau=0.001) as pipeline:
        load = closed_loop(lambda: lambda n: _same(pipeline.submit(images[n]).result(), wanted[n]), [0, 1, 2, 3] * 8, 4)
    assert not [one.error for one in load.samples if one.error]


def _same(found, wanted):
    assert found == wanted


def _three():
    image = np.zeros((3, SIDE, SIDE), np.float32)
    image[0, 0, 0] = 3
    return image


def test_more_than_in_flight_are_sent_away():
    go = threading.Event()

    def network(batch):
        assert go.wait(10)
        return total(batch)

    with Pipeline(network, Preprocess(SIDE), size=1, tau=0.0, in_flight=2) as pipeline:
        waiting = [pipeline.submit(JPEG) for _ in range(2)]
        with pytest.raises(Busy, match="2 requests"):
            pipeline.submit(JPEG)
        go.set()
        assert len({one.result(10) for one in waiting}) == 1
        assert pipeline.submit(JPEG).result(10)


def test_workers_prepare_the_same_bits_answer_errors_and_are_replaced():
    preprocess = Preprocess(SIDE, precision="uint8", draft=True)
    with Pipeline(lambda batch: list(batch), preprocess, size=2, tau=0.001, workers=1) as pipeline:
        images = [jpeg(seed=i) for i in range(3)]
        found = [one.result(30) for one in [pipeline.submit(image) for image in images]]
        assert all(np.array_equal(one, preprocess(image)) for one, image in zip(found, images, strict=True))
        life = pipeline.profiler.lifetimes()[0]
        assert [span.stage for span in life.spans] == [
            "wait for a worker", "transfer", "decode", "resize", "normalise", "transfer", "queue", INFERENCE, "post-process",
        ]  # fmt: skip
        assert all(one.end == two.start for one, two in zip(life.spans, life.spans[1:], strict=False))
        with pytest.raises(ValueError, match="JPEG"):
            pipeline.submit(b"none").result(30)
        with pytest.raises(TypeError, match="bytes"):
            pipeline.submit("text").result(30)
        (pid,) = pipeline.workers.pids
        os.kill(pid, signal.SIGINT)  # Ctrl-C goes to all processes of a terminal
        assert np.array_equal(pipeline.submit(images[0]).result(30), found[0])
        assert pipeline.workers.pids == [pid]
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(WorkerLost):
            for _ in range(50):
                pipeline.submit(images[0]).result(30)
                time.sleep(0.01)
        assert np.array_equal(pipeline.submit(images[0]).result(30), found[0])
        (pid,) = pipeline.workers.pids
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(RuntimeError, match="ended"):
        pipeline.workers.submit(JPEG, Lifetime())


def test_a_script_without_the_guard_is_told_what_it_lacks(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from assay.methods.serving.dnn_server_overheads import Preprocess, Workers\n"
        "with Workers(Preprocess(8), 1): pass\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith('needs the guard if __name__ == "__main__":')


@pytest.mark.parametrize("count", [0, 1.0, True])
def test_counts_of_workers_are_checked(count):
    with pytest.raises((ValueError, TypeError), match="count"):
        Workers(Preprocess(SIDE), count)


# ------------------------------------------------------------------------------------------------------------------ loads


def test_a_closed_loop_never_has_more_under_way_than_clients():
    under_way, most, lock = 0, 0, threading.Lock()

    def client(item):
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        time.sleep(0.002)
        with lock:
            under_way -= 1
        if item == 5:
            raise OSError("no")

    load = closed_loop(lambda: client, list(range(20)), 3)
    assert len(load.samples) == 20
    assert 1 <= most <= 3
    assert [number for number, one in enumerate(load.samples) if one.error] == [5]
    assert load.throughput == pytest.approx(19 / load.seconds)
    assert load.latency(0.5) <= load.latency(1.0)


def test_an_open_loop_does_not_wait_for_slow_answers_and_charges_its_own_lateness():
    go = threading.Event()

    def client(item):
        if item == 0:
            assert go.wait(10)  # the first answer comes after all others
        if item == 9:
            go.set()

    load = open_loop(lambda: client, list(range(10)), 500.0, seed=1, clients=4)
    assert load.samples[0].end >= load.samples[9].sent
    again = open_loop(lambda: lambda item: None, list(range(10)), 500.0, seed=1)
    gaps = [np.diff([one.intended for one in each.samples]) for each in (load, again)]
    assert np.allclose(*gaps, atol=1e-6)  # the same arrivals for the same seed
    alone = open_loop(lambda: lambda item: time.sleep(0.01), list(range(10)), 5000.0, clients=1)
    assert alone.late > 0.05
    assert alone.latency(1.0) >= alone.late  # from when it was meant to be sent


@pytest.mark.parametrize(
    "load",
    [
        lambda: closed_loop(lambda: print, [], 1),
        lambda: closed_loop(lambda: print, [1], 0),
        lambda: open_loop(lambda: print, [1], 0.0),
        lambda: open_loop(lambda: print, [], 1.0),
        lambda: closed_loop(lambda: lambda _: 1 / 0, [1], 1).latency(0.5),
    ],
)
def test_loads_out_of_range_are_refused(load):
    with pytest.raises(ValueError, match="requests|concurrency|rate|no request"):
        load()


def test_spans_have_what_viewers_of_traces_ask_for(tmp_path):
    """The fields that the trace event format asks of complete events."""
    life = Lifetime("r", at=0.0)
    life.mark("a", at=1.0)
    write_spans([life], tmp_path / "t.json")
    (event,) = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert {"name": "a", "ph": "X", "ts": 0.0, "dur": 1e6, "pid": 1, "tid": 0}.items() <= event.items()

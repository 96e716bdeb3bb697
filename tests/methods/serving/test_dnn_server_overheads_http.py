"""The vision server over HTTP, by the Open Inference Protocol, asked by clients that know nothing of it; and the capacity model."""

from __future__ import annotations

import base64
import heapq
import http.client
import json
import math
import struct
import threading

import numpy as np
import pytest
from tests.methods.serving.test_dnn_server_overheads import JPEG, SIDE, jpeg

from assay.methods.serving.dnn_server_overheads import (
    INFERENCE,
    Pipeline,
    Preprocess,
    Stage,
    VisionClient,
    VisionServer,
    advice,
    amdahl,
    bottleneck,
    impact,
    protocol,
    simulate,
    throughput,
)
from assay.methods.serving.dnn_server_overheads.protocol import Call, Malformed

PATH = "/v2/models/photos/infer"


def brightness(batch):
    return [int(one.mean()) for one in batch]


@pytest.fixture(scope="module")
def server():
    with (
        Pipeline(brightness, Preprocess(SIDE, precision="uint8"), size=4, tau=0.001, in_flight=8) as pipeline,
        VisionServer(pipeline, "photos") as made,
    ):
        yield made


def asked(server, method, path, body=None, headers=None):
    connection = http.client.HTTPConnection(server.host, server.port, timeout=20)
    try:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return response.status, response.read(), dict(response.headers.items())
    finally:
        connection.close()


def expected(data):
    return int(Preprocess(SIDE, precision="uint8")(data).mean())


def test_plain_json(server):
    inputs = [{"name": "image", "shape": [1], "datatype": "BYTES", "data": [base64.b64encode(JPEG).decode()]}]
    status, body, _ = asked(server, "POST", PATH, json.dumps({"id": "7", "inputs": inputs}))
    assert status == 200
    assert json.loads(body) == {
        "id": "7",
        "model_name": "photos",
        "outputs": [{"name": "answer", "shape": [1], "datatype": "INT64", "data": [expected(JPEG)]}],
    }


def test_binary_tensors(server):
    images = [JPEG, jpeg(seed=3)]
    data = b"".join(struct.pack("<I", len(one)) + one for one in images)
    head = json.dumps(
        {
            "inputs": [
                {"name": "image", "shape": [2], "datatype": "BYTES", "parameters": {"binary_data_size": len(data)}}
            ],
            "parameters": {"binary_data_output": True},
        }
    ).encode()
    headers = {"Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"}
    status, body, answered = asked(server, "POST", PATH, head + data, headers)
    assert status == 200
    size = int(answered["Inference-Header-Content-Length"])
    assert json.loads(body[:size])["outputs"][0]["parameters"] == {"binary_data_size": 16}
    assert np.frombuffer(body[size:], "<i8").tolist() == [expected(one) for one in images]


@pytest.mark.parametrize("binary", [True, False])
def test_our_client_keeps_its_connection(server, binary):
    client = VisionClient(server.host, server.port, "photos", binary=binary)
    pixels = Preprocess(SIDE, precision="uint8")(JPEG)
    for tensors in ({"image": [JPEG]}, {"pixels": pixels[None]}):
        assert client.infer(tensors)["answer"].tolist() == [expected(JPEG)]
    link = client._connection.sock
    with pytest.raises(RuntimeError, match="HTTP 400: .*JPEG"):
        client.infer({"image": [b"none"]})
    assert client.infer({"image": [JPEG]})["answer"].tolist() == [expected(JPEG)]
    assert client._connection.sock is link  # still the same, after an error too
    client.close()


def test_lives_go_from_the_first_byte_to_the_last():
    with (
        Pipeline(brightness, Preprocess(SIDE, precision="uint8"), size=1, tau=0.0) as pipeline,
        VisionServer(pipeline, "photos") as one,
    ):
        client = VisionClient(one.host, one.port, "photos")
        client.infer({"image": [JPEG]}, id="mine")
        client.close()
    (life,) = pipeline.profiler.lifetimes()
    assert life.name == "mine"
    names = ["receive", "decode", "resize", "normalise", "queue", INFERENCE, "post-process", "respond"]
    assert [span.stage for span in life.spans] == names


def test_what_is_known_of_the_model(server):
    assert all(
        asked(server, "GET", f"/v2/{path}")[0] == 200 for path in ("health/live", "health/ready", "models/photos/ready")
    )
    told = json.loads(asked(server, "GET", "/v2/models/photos")[1])
    assert [(one["name"], one["datatype"]) for one in told["inputs"]] == [("image", "BYTES"), ("pixels", "UINT8")]
    assert "binary_tensor_data" in json.loads(asked(server, "GET", "/v2")[1])["extensions"]
    for path in ("/", "/v2/models/other", "/v2/models/other/ready"):
        assert asked(server, "GET", path)[0] == 404
    assert asked(server, "POST", "/v2/models/other/infer", b"{}")[0] == 404


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"{", {}, 400),
        (b"[]", {}, 400),
        (b'{"inputs": []}', {}, 400),
        (b'{"inputs": [{"name": "image", "shape": [1], "datatype": "BYTES", "data": ["AAAA"]}]}', {}, 400),
        (b'{"inputs": [{"name": "other", "shape": [1], "datatype": "INT64", "data": [1]}]}', {}, 400),
        (b'{"inputs": [{"name": "pixels", "shape": [1, 2], "datatype": "UINT8", "data": [1, 2]}]}', {}, 400),
        (b'{"inputs": [{"name": "image", "shape": [0], "datatype": "BYTES", "data": []}]}', {}, 400),
        (b'{"inputs": [{"name": "pixels", "shape": [], "datatype": "UINT8", "data": [1]}]}', {}, 400),
        (b"{}", {"Inference-Header-Content-Length": "99"}, 400),
        (b"", {"Content-Length": "-3"}, 400),
        (b"", {"Content-Length": "99999999999"}, 413),
    ],
)
def test_what_is_malformed_is_refused_and_the_server_goes_on(server, body, headers, status):
    found, said, _ = asked(server, "POST", PATH, body, headers)
    assert found == status
    assert json.loads(said)["error"]
    assert asked(server, "GET", "/v2/health/ready")[0] == 200


def test_a_busy_pipeline_says_when_to_come_again():
    with (
        Pipeline(brightness, Preprocess(SIDE, precision="uint8"), size=1, tau=0.0, in_flight=1) as pipeline,
        VisionServer(pipeline, "photos") as one,
    ):
        pipeline._places.acquire()
        tensors = {"image": [JPEG]}
        body, headers = protocol.written(Call(tensors), binary=True)
        status, _, answered = asked(one, "POST", PATH, body, headers)
        assert (status, answered["Retry-After"]) == (503, "1")


def test_errors_of_the_network_do_not_tell_their_text():
    def network(batch):
        raise RuntimeError("secret")

    with Pipeline(network, Preprocess(SIDE), size=1, tau=0.0) as pipeline, VisionServer(pipeline, "photos") as one:
        body, headers = protocol.written(Call({"image": [JPEG]}), binary=True)
        status, said, _ = asked(one, "POST", PATH, body, headers)
    assert status == 500
    assert b"secret" not in said
    with pytest.raises(OSError):
        asked(one, "GET", "/v2/health/live")  # it was closed
    with pytest.raises(ValueError, match="host"):
        VisionServer(pipeline, "photos", host="0.0.0.0")


@pytest.mark.parametrize("error", [ValueError, TypeError, OSError])
def test_whatever_a_network_raises_is_the_servers_fault(error):
    def network(batch):
        raise error("secret")

    with Pipeline(network, Preprocess(SIDE), size=1, tau=0.0) as pipeline, VisionServer(pipeline, "photos") as one:
        status, said, _ = asked(one, "POST", PATH, *protocol.written(Call({"image": [JPEG]}), binary=True))
    assert (status, json.loads(said)) == (500, {"error": f"answering failed ({error.__name__})"})


@pytest.mark.parametrize("answer", [float("nan"), object(), "text"], ids=["nan", "object", "text"])
def test_answers_that_cannot_be_written_are_an_error_and_no_silence(answer):
    with (
        Pipeline(lambda batch: [answer] * len(batch), Preprocess(SIDE), size=1, tau=0.0) as pipeline,
        VisionServer(pipeline, "photos") as one,
    ):
        assert asked(one, "POST", PATH, *protocol.written(Call({"image": [JPEG]}), binary=False))[0] == 500
        assert asked(one, "GET", "/v2/health/ready")[0] == 200


def test_in_a_call_with_several_images_nobody_pays_for_the_others():
    with (
        Pipeline(brightness, Preprocess(SIDE), size=1, tau=0.0) as pipeline,
        VisionServer(pipeline, "photos") as one,
    ):
        client = VisionClient(one.host, one.port, "photos")
        client.infer({"image": [JPEG, JPEG]})
        client.close()
    names = ["decode", "resize", "normalise", "queue", INFERENCE, "post-process", "later images", "respond"]
    assert [[span.stage for span in life.spans] for life in pipeline.profiler.lifetimes()] == [
        ["receive", *names],
        ["receive", "earlier images", *names],
    ]


def test_a_client_that_gave_up_asks_again_over_a_new_connection():
    go = threading.Event()

    def network(batch):
        assert go.wait(10)
        return brightness(batch)

    with Pipeline(network, Preprocess(SIDE), size=1, tau=0.0) as pipeline, VisionServer(pipeline, "photos") as one:
        client = VisionClient(one.host, one.port, "photos", timeout=0.05)
        with pytest.raises(TimeoutError):
            client.infer({"image": [JPEG]})
        go.set()
        client._connection.timeout = 10.0
        assert client.infer({"image": [JPEG]})["answer"].shape == (1,)
        client.close()


@pytest.mark.parametrize("dtype", protocol.NAMES)
def test_tensors_of_every_type_come_back(dtype):
    values = np.array([[0, 1, 1]]).astype(dtype)
    for binary in (True, False):
        body, headers = protocol.written(Call({"x": values, "y": [b"", b"\x00a"]}, "i", binary), binary=binary)
        found = protocol.read(body, headers)
        assert found.tensors["x"].dtype == values.dtype
        assert np.array_equal(found.tensors["x"], values)
        assert found.tensors["y"] == [b"", b"\x00a"]
        assert (found.id, found.binary) == ("i", binary)


def entry(**changes):
    return {"name": "x", "shape": [2], "datatype": "INT8", "data": [1, 2], **changes}


@pytest.mark.parametrize(
    "changes",
    [
        {"name": 3},
        {"shape": [-1]},
        {"shape": "2"},
        {"shape": [1 << 20, 1 << 20]},
        {"datatype": "STRING"},
        {"data": [1]},
        {"data": [1, 300]},
        {"data": [1, 2.5]},
        {"data": [1, "2"]},
        {"data": [1, [2]]},
        {"datatype": "FP16", "data": [1, 1e9]},
        {"datatype": "FP32", "data": [1, float("nan")]},
        {"datatype": "FP64", "data": [1, float("inf")]},
        {"data": None},
        {"datatype": "BYTES", "data": ["?", "x"]},
        {"parameters": {"binary_data_size": 2}},
        {"parameters": {"binary_data_size": True}},
    ],
    ids=str,
)
def test_malformed_tensors_are_refused(changes):
    with pytest.raises(Malformed):
        protocol.read(json.dumps({"inputs": [entry(**changes)]}).encode(), {})


def test_bytes_that_do_not_fit_are_refused():
    def binary(data, size, **changes):
        head = json.dumps({"inputs": [entry(parameters={"binary_data_size": size}, **changes)]}).encode()
        return protocol.read(head + data, {"inference-header-content-length": str(len(head))})

    assert binary(b"\x01\x02", 2).tensors["x"].tolist() == [1, 2]
    for data, size, changes in (
        (b"\x01", 1, {}),
        (b"\x01\x02\x03", 2, {}),
        (b"\x01\x00\x00\x00a", 5, {"datatype": "BYTES"}),
        (b"\x09\x00\x00\x00a", 5, {"datatype": "BYTES", "shape": [1]}),
        (b"\x09\x00", 2, {"datatype": "BYTES", "shape": [1]}),
    ):
        with pytest.raises(Malformed):
            binary(data, size, **changes)
    with pytest.raises(Malformed, match="two"):
        protocol.read(json.dumps({"inputs": [entry(), entry()]}).encode(), {})
    with pytest.raises(ValueError, match="finite"):
        protocol.written(Call({"x": np.array([np.nan])}), binary=False)
    with pytest.raises(TypeError, match="complex"):
        protocol.written(Call({"x": np.array([1j])}), binary=False)


# ---------------------------------------------------------------------------------------------------------------- capacity

STAGES = [
    Stage("preparing", each=0.004, workers=2),
    Stage(INFERENCE, each=0.001, fixed=0.002, batch=8, tau=0.002),
    Stage("classify", each=0.002, visits=1.5),
]


def test_amdahls_bound():
    assert amdahl(0.44, math.inf) == pytest.approx(1.786, abs=5e-4)
    assert amdahl(0.44, 2) == pytest.approx(1 / 0.78)
    assert amdahl(0.0, math.inf) == 1
    assert amdahl(1.0, math.inf) == math.inf
    for share, factor in ((1.1, 2), (0.5, 0), (0.5, float("nan")), (float("nan"), 2)):
        with pytest.raises(ValueError, match="share|factor"):
            amdahl(share, factor)


def test_throughput_is_that_of_the_slowest_stage():
    assert [stage.capacity for stage in STAGES] == pytest.approx([500, 800, 1 / 0.003])
    assert throughput(STAGES) == pytest.approx(1 / 0.003)
    assert bottleneck(STAGES).name == "classify"
    assert throughput(STAGES, cores=1) == pytest.approx(1 / (0.004 + 0.00125 + 0.003))
    assert Stage("never", each=1.0, visits=0).capacity == math.inf
    assert impact(2.0, 10.0) == pytest.approx(0.8)


@pytest.mark.parametrize("stages", [STAGES, STAGES[:2], [Stage("a", each=0.003, visits=0.5), Stage("b", each=0.001)]])
def test_saturated_the_simulation_reaches_the_least_capacity_and_no_more(stages):
    most = throughput(stages)
    found = simulate(stages, [i / (3 * most) for i in range(3000)])
    assert 0.9 * most < found.throughput <= 1.001 * most


def test_alone_a_request_takes_the_sum_of_its_stages():
    found = simulate(STAGES[:2], [0.0, 10.0])
    assert found.latency(0.0) == pytest.approx(0.004 + 0.002 + 0.003)
    assert found.batches == {"preparing": (1, 1), INFERENCE: (1, 1)}


def by_events(stage, times, counts):
    """The same queue, told once more: a clock that goes from event to event, and who may begin looks at every one of them."""
    pending = [(times[i], i) for i in sorted(range(len(times)), key=times.__getitem__) for _ in range(counts[i])]
    ends, queue, busy, sizes = list(times), [], [], []
    clock = [at for at, _ in pending]
    heapq.heapify(clock)
    while clock:
        now = heapq.heappop(clock)
        while pending and pending[0][0] <= now:
            queue.append(pending.pop(0))
        busy = [end for end in busy if end > now]
        while queue and len(busy) < stage.workers and (len(queue) >= stage.batch or now >= queue[0][0] + stage.tau):
            taken, queue = queue[: stage.batch], queue[stage.batch :]
            end = now + (stage.fixed + stage.each * len(taken))
            busy.append(end)
            heapq.heappush(clock, end)
            sizes.append(len(taken))
            for _, request in taken:
                ends[request] = max(ends[request], end)
        if queue and queue[0][0] + stage.tau > now:
            heapq.heappush(clock, queue[0][0] + stage.tau)
    return ends, tuple(sizes)


@pytest.mark.parametrize("seed", range(12))
def test_the_simulation_does_what_a_queue_told_event_by_event_does(seed):
    chance = np.random.default_rng(seed)
    stages = [
        Stage(
            name,
            each=float(chance.uniform(0.1, 1)),
            fixed=float(chance.uniform(0, 1)),
            workers=int(chance.integers(1, 4)),
            batch=int(chance.integers(1, 5)),
            visits=float(chance.choice([1.0, 0.5, 1.7])),
            tau=float(chance.choice([0.0, 0.3, 2.0])),
        )
        for name in ("a", "b")
    ]
    arrivals = np.cumsum(chance.exponential(0.5, 60)).tolist()
    found, times = simulate(stages, arrivals), arrivals
    for stage in stages:
        counts = [math.floor((i + 1) * stage.visits + 1e-9) - math.floor(i * stage.visits + 1e-9) for i in range(60)]
        times, sizes = by_events(stage, times, counts)
        assert found.batches[stage.name] == sizes
    assert found.ends == pytest.approx(times)
    shifted = simulate(stages, [at - 1000 for at in arrivals])  # also before time 0
    assert np.add(shifted.ends, 1000) == pytest.approx(found.ends)


def test_a_batch_waits_for_tau_or_until_it_is_full_and_none_waits_longer_than_tau_and_a_batch():
    stage = Stage("s", each=0.0, fixed=1.0, batch=3, tau=0.5)
    assert simulate([stage], [0.0, 0.1, 0.2, 0.9, 2.0]).ends == pytest.approx((1.2, 1.2, 1.2, 2.4, 3.5))
    arrivals = list(np.cumsum(np.random.default_rng(0).exponential(1.0, 500)))
    waits = np.subtract(simulate([stage], arrivals).ends, arrivals) - 1.0
    assert waits.max() <= 0.5 + 1.0 + 1e-9


def test_who_has_nothing_to_do_at_a_stage_passes_at_once():
    found = simulate([Stage("k", each=1.0, visits=0.5)], [0.0, 0.1, 0.2, 0.3])
    assert found.ends == pytest.approx((0.0, 1.1, 0.2, 2.1))


def test_advice_names_what_holds_it_up():
    assert "classify holds" in advice(STAGES)
    assert "1.1" in advice(STAGES[:1] + [Stage(INFERENCE, each=0.0004)])
    assert "all 1 processors" in advice(STAGES, cores=1)
    assert "preparing takes most" in advice(STAGES, cores=1)
    # alone, a request pays the whole fixed time of its batch: 3 ms of 7, not 1.25 of 5.25
    assert "inference is 43 %" in advice(STAGES[:2])
    assert "1.75x" in advice(STAGES[:2])
    assert throughput([Stage("never", each=1.0, visits=0)], cores=2) == math.inf


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Stage("a", each=-1),
        lambda: Stage("a", each=0),
        lambda: Stage("a", each=1, workers=0),
        lambda: Stage("a", each=float("nan")),
        lambda: simulate([], [0.0]),
        lambda: simulate(STAGES, []),
        lambda: simulate(STAGES, [1.0, 0.0]),
        lambda: simulate(STAGES, [0.0, float("nan")]),
        lambda: simulate(STAGES, [float("nan")]),
        lambda: simulate(STAGES, [0.0, math.inf]),
        lambda: simulate([STAGES[0], STAGES[0]], [0.0]),
        lambda: advice([Stage("never", each=1.0, visits=0)]),
        lambda: amdahl(0.5, -math.inf),
        lambda: throughput([]),
        lambda: throughput(STAGES, cores=0),
        lambda: impact(1, 0),
    ],
)
def test_what_is_out_of_range_is_refused(wrong):
    with pytest.raises(ValueError, match="must"):
        wrong()

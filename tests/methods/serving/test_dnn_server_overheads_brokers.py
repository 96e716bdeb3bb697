"""Messages and brokers: bytes that say what they are, and what each broker promises when somebody dies."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import threading
import zlib

import numpy as np
import pytest

from assay.methods.serving.dnn_server_overheads import (
    Broken,
    Cascade,
    Closed,
    CutOff,
    LogBroker,
    Message,
    QueueBroker,
    SocketBroker,
    drain,
    packed,
    unpacked,
)

# ---------------------------------------------------------------------------------------------------------------- messages


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"bytes \x00\xff",
        np.arange(6, dtype=np.uint8).reshape(2, 3),
        np.zeros((0, 4), np.float32),
        np.array(3.5, np.float64),
        np.arange(8, dtype=np.int64)[::2],
        np.ones((2, 2), np.float16),
        np.ones(3, ">f4"),
    ],
    ids=lambda data: f"{type(data).__name__} {getattr(data, 'shape', '')}",
)
def test_a_message_comes_back_as_it_was(data):
    found = unpacked(packed(Message({"a": [1, "b"]}, data)))
    assert found.meta == {"a": [1, "b"]}
    if isinstance(data, bytes):
        assert found.data == data
    else:
        assert np.array_equal(found.data, data)
        assert found.data.shape == data.shape
        assert found.data.dtype.name == data.dtype.name


GOOD = packed(Message({"a": 1}, np.arange(4, dtype=np.float32)))


@pytest.mark.parametrize("cut", [0, 3, 27, len(GOOD) - 1])
def test_what_is_cut_off_is_refused(cut):
    with pytest.raises(CutOff):
        unpacked(GOOD[:cut])


def test_every_turned_byte_is_noticed():
    for place in range(len(GOOD)):
        turned = bytearray(GOOD)
        turned[place] ^= 0x41
        with pytest.raises(Broken) as told:
            unpacked(bytes(turned))
        assert not isinstance(told.value, CutOff)  # a turned length is damage, and no end that was not written
    with pytest.raises(Broken, match="follow"):
        unpacked(GOOD + b"x")


def test_a_peer_cannot_ask_for_memory_or_send_objects():
    huge = bytearray(GOOD)
    huge[12:20] = (1 << 60).to_bytes(8, "little")
    huge[24:28] = zlib.crc32(huge[:24]).to_bytes(4, "little")  # a peer computes the checksum of what it makes up
    with pytest.raises(Broken, match="too large"):
        unpacked(bytes(huge))
    with pytest.raises(TypeError, match="uint8"):
        packed(Message({}, np.array([object()])))
    with pytest.raises(ValueError, match="bytes of JSON"):
        packed(Message({"a": "x" * 70000}))
    with pytest.raises(ValueError, match="JSON compliant"):
        packed(Message({"a": float("nan")}))
    for wrong in (Message({}, "text"), Message([], b"")):
        with pytest.raises(TypeError, match="must be"):
            packed(wrong)
    with pytest.raises(ValueError, match="at most"):
        packed(Message({}, np.zeros((0, 1 << 32), np.uint8)))


def test_shapes_must_agree_with_the_data(monkeypatch):
    from assay.methods.serving.dnn_server_overheads import wire

    monkeypatch.setattr(wire.zlib, "crc32", lambda data: 0)  # a peer computes the checksum of what it makes up
    wrong = bytearray(packed(Message({}, np.arange(4, dtype=np.float32))))
    wrong[wire.HEAD_SIZE] = 3
    with pytest.raises(Broken, match="shape"):
        unpacked(bytes(wrong))
    for meta in (b"[]", b"{"):
        made = wire.FIELDS.pack(wire.MAGIC, 1, 0, 0, 0, len(meta), 0, 0) + bytes(4) + meta
        with pytest.raises(Broken, match="JSON"):
            unpacked(made)


# ----------------------------------------------------------------------------------------------------------------- brokers


def number(value):
    return Message({"n": value}, np.full(3, value % 256, np.uint8))


def got(broker, count, timeout=10.0):
    """The numbers of the next messages, acknowledged."""
    found = []
    for _ in range(count):
        delivery = broker.get(timeout)
        assert delivery is not None
        broker.ack(delivery)
        found.append(delivery.message.meta["n"])
    return found


@pytest.fixture(scope="module")
def socket_broker():
    broker = SocketBroker()
    yield broker
    broker.close()


@pytest.fixture(params=["queue", "socket", "log"])
def broker(request, tmp_path):
    made = {
        "queue": QueueBroker,
        "socket": lambda: request.getfixturevalue("socket_broker"),
        "log": lambda: LogBroker(tmp_path, fsync=False),
    }[request.param]()
    yield made
    if request.param != "socket":
        made.close()


def test_messages_come_once_and_in_order(broker):
    assert broker.get(0.0) is None
    for value in range(5):
        broker.put(number(value))
    first = broker.get(1.0)
    assert np.array_equal(first.message.data, [0, 0, 0])
    broker.ack(first)
    assert got(broker, 4) == [1, 2, 3, 4]
    assert broker.get(0.01) is None


def test_several_may_put_and_get(broker):
    seen, lock = [], threading.Lock()

    def take():
        while True:
            delivery = broker.get(5.0)
            broker.ack(delivery)
            if delivery.message.meta["n"] < 0:
                return
            with lock:
                seen.append(delivery.message.meta["n"])

    def give(start):
        for value in range(start, start + 20):
            broker.put(number(value))

    takers = [threading.Thread(target=take) for _ in range(2)]
    givers = [threading.Thread(target=give, args=(start,)) for start in (0, 100)]
    for thread in takers + givers:
        thread.start()
    for thread in givers:
        thread.join(10)
    for _ in takers:
        broker.put(number(-1))
    for thread in takers:
        thread.join(10)
    assert sorted(seen) == [*range(20), *range(100, 120)]


def test_a_batch_is_drained_up_to_its_size(broker):
    for value in range(5):
        broker.put(number(value))
    first = drain(broker, broker.get(1.0), 3, 3600.0)
    assert [one.message.meta["n"] for one in first] == [0, 1, 2]
    rest = drain(broker, broker.get(1.0), 3, 0.01)
    assert [one.message.meta["n"] for one in rest] == [3, 4]
    for one in first + rest:
        broker.ack(one)


@pytest.mark.parametrize("timeout", [-1, float("nan"), "1", 1e9])
def test_timeouts_are_checked(broker, timeout):
    with pytest.raises((ValueError, TypeError), match="timeout"):
        broker.get(timeout)


@pytest.mark.parametrize("make", [QueueBroker, lambda: LogBroker("placeholder")], ids=["queue", "log"])
def test_who_waits_when_it_is_closed_is_told(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    broker, told = make(), []

    def wait():
        try:
            broker.get(60.0)
        except Closed:
            told.append(True)

    thread = threading.Thread(target=wait)
    thread.start()
    broker.close()
    thread.join(10)
    assert told == [True]
    with pytest.raises(Closed):
        broker.put(number(1))


def test_over_a_socket_what_a_lost_client_had_comes_again_first_and_in_order(socket_broker):
    client = socket_broker.connect()
    for value in range(4):
        client.put(number(value))
    taken = [client.get(1.0) for _ in range(3)]
    client.ack(taken[1])
    client.close()  # with 0 and 2 in its hands
    with pytest.raises(Closed):
        client.put(number(9))
    assert sorted(got(socket_broker, 3)) == [0, 2, 3]
    for value in (5, 6):  # nothing was acknowledged twice, nothing is left
        socket_broker.put(number(value))
    assert got(socket_broker, 2) == [5, 6]


def test_a_thread_that_ended_leaves_no_connection_and_what_it_had_comes_again(socket_broker):
    client = socket_broker.connect()
    client.put(number(3))

    def take():
        assert client.get(5.0).message.meta["n"] == 3  # and never acknowledges it

    for _ in range(3):
        thread = threading.Thread(target=take)
        thread.start()
        thread.join(10)
        later = threading.Thread(target=client._link)  # whoever comes next tidies up
        later.start()
        later.join(10)
        delivery = client.get(5.0)
        assert delivery.message.meta["n"] == 3
        client.ack(delivery)
        client.put(number(3))
    assert len(client._sockets) <= 3  # of six threads and this one
    client.close()
    assert got(socket_broker, 1) == [3]


def test_ctrl_c_in_a_terminal_does_not_end_a_broker(socket_broker):
    os.kill(socket_broker.pid, signal.SIGINT)
    socket_broker.put(number(4))
    assert got(socket_broker, 1) == [4]


def test_strangers_and_nonsense_do_not_disturb_a_broker(socket_broker):
    for said in (b"x" * 32 + b"G" + bytes(8), socket_broker._key + b"?", socket_broker._key + b"P" + bytes(40)):
        with socket.create_connection(socket_broker.address, 5) as link:
            link.sendall(said)
            with contextlib.suppress(OSError):  # it may have hung up already
                link.shutdown(socket.SHUT_WR)
                assert link.recv(10) == b""
    socket_broker.put(number(1))
    assert got(socket_broker, 1) == [1]


def test_a_dead_broker_is_said_to_be_gone_and_its_process_is_ended():
    broker = SocketBroker()
    pid = broker.pid
    broker.put(number(1))
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(Closed, match="gone"):
        for _ in range(3):
            broker.put(number(2))
    broker.close()
    assert broker._process.exitcode is not None


def test_a_log_gives_again_what_was_not_acknowledged(tmp_path):
    log = LogBroker(tmp_path)
    for value in range(5):
        log.put(number(value))
    taken = [log.get(1.0) for _ in range(4)]
    for one in (taken[0], taken[2], taken[1]):  # 3 is in somebody's hands, 4 was never got
        log.ack(one)
    assert log.committed == 3
    with pytest.raises(ValueError, match="nobody has open"):
        LogBroker(tmp_path)
    log.close()
    again = LogBroker(tmp_path)
    assert got(again, 2) == [3, 4]
    assert again.get(0.0) is None
    again.put(number(5))
    again.close()
    last = LogBroker(tmp_path)
    assert got(last, 1) == [5]
    last.close()


def test_a_message_whose_end_was_not_written_is_cut_off_and_damage_is_told(tmp_path):
    log = LogBroker(tmp_path)
    for value in range(3):
        log.put(number(value))
    log.close()
    whole = (tmp_path / "log").read_bytes()
    (tmp_path / "log").write_bytes(whole[:-5])
    (tmp_path / "done").write_bytes(b"\x01\x00")  # half a number
    again = LogBroker(tmp_path)
    assert got(again, 2) == [0, 1]
    again.put(number(7))
    assert got(again, 1) == [7]
    again.close()
    turned = bytearray(whole)
    turned[30] ^= 1
    (tmp_path / "log").write_bytes(bytes(turned))
    for _ in range(2):  # the folder is free again after a failure
        with pytest.raises(Broken, match="byte 0"):
            LogBroker(tmp_path)
    (tmp_path / "log").write_bytes(b"")
    with pytest.raises(Broken, match="were done of 0"):
        LogBroker(tmp_path)


class Full:
    """A file on a disk that has room for so many bytes more."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        count = min(len(data), self.room)
        self.room -= count
        if not count:
            raise OSError(errno.ENOSPC, "no space left")
        return self.file.write(data[:count])

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_a_full_disk_is_told_and_spoils_nothing(tmp_path):
    log = LogBroker(tmp_path, fsync=False)
    log.put(number(0))
    there = log._log
    log._log = Full(there, 20)  # a part of a message fits
    with pytest.raises(OSError, match="space"):
        log.put(number(1))
    log._log = there
    log.put(number(2))
    first = log.get(1.0)
    done = log._done
    log._done = Full(done, 3)
    with pytest.raises(OSError, match="space"):
        log.ack(first)
    assert log.committed == 0
    log._done = done
    second = log.get(1.0)
    log.ack(second)
    log.ack(first)  # once more, and again after that
    log.ack(first)
    assert (log.committed, log._acked) == (2, set())
    assert log.get(0.0) is None
    log.put(number(3))
    log.close()
    again = LogBroker(tmp_path)
    assert got(again, 1) == [3]
    again.close()


def test_a_turned_length_is_damage_and_the_log_stays_as_it_is(tmp_path):
    with contextlib.closing(LogBroker(tmp_path, fsync=False)) as log:
        for value in range(3):
            log.put(number(value))
    turned = bytearray((tmp_path / "log").read_bytes())
    turned[14] ^= 1  # the first message now ends behind the end of the file
    (tmp_path / "log").write_bytes(turned)
    with pytest.raises(Broken, match="byte 0"):
        LogBroker(tmp_path)
    assert (tmp_path / "log").read_bytes() == turned


def test_what_is_done_is_not_kept_in_memory(tmp_path, monkeypatch):
    from assay.methods.serving.dnn_server_overheads import brokers

    with contextlib.closing(LogBroker(tmp_path, fsync=False)) as log:
        for value in range(4):
            log.put(number(value))
        got(log, 3)
    kept, real = [], brokers._Line.put
    monkeypatch.setattr(brokers._Line, "put", lambda self, item: kept.append(item) or real(self, item))
    with contextlib.closing(LogBroker(tmp_path)) as again:
        assert [message.meta["n"] for message in kept] == [3]
        assert got(again, 1) == [3]


def test_a_log_is_on_disk_when_put_returns(tmp_path, monkeypatch):
    from assay.methods.serving.dnn_server_overheads import brokers

    synced = []
    monkeypatch.setattr(brokers.os, "fsync", lambda number: synced.append(os.fstat(number).st_size))
    log = LogBroker(tmp_path)
    log.put(number(1))
    assert synced == [(tmp_path / "log").stat().st_size]
    log.ack(log.get(1.0))
    assert synced[1:] == [8]
    log.close()
    loose = LogBroker(tmp_path / "loose", fsync=False)
    loose.put(number(1))
    assert len(synced) == 2
    loose.close()


# ----------------------------------------------------------------------------------------------------------------- cascade


def parts(image):
    """A detector: an image is a list of numbers, each of which is a thing."""
    if image == "bad":
        raise ValueError("no image")
    return [np.array([value], np.uint8) for value in image]


def double(things):
    if any(int(thing[0]) == 13 for thing in things):
        raise FloatingPointError("13")
    return [2 * int(thing[0]) for thing in things]


def test_images_of_0_to_k_things_are_answered_in_order(broker):
    images = [[], [1], [2, 3, 4], [], [5, 6], list(range(20, 60))]
    with Cascade(parts, double, broker, size=7, tau=0.001) as cascade:
        found = [one.result(20) for one in [cascade.submit(image) for image in images]]
        assert found == [[2 * value for value in image] for image in images]
        lives = cascade.profiler.lifetimes()
    assert len(lives) == 6
    assert {tuple(span.stage for span in life.spans) for life in lives} == {
        ("detect",),
        ("detect", "hand over", "broker and classify"),
    }
    assert cascade.sent == cascade.things == 46


def test_one_bad_thing_is_the_error_of_its_image_only(broker):
    with Cascade(parts, double, broker, size=16, tau=0.01) as cascade:
        good, bad, none = (cascade.submit(image) for image in ([1, 2], [3, 13], "bad"))
        assert good.result(20) == [2, 4]
        with pytest.raises(FloatingPointError):
            bad.result(20)
        with pytest.raises(ValueError, match="no image"):
            none.result(20)
        assert cascade.submit([4]).result(20) == [8]
        assert not cascade._requests
    assert broker.get(0.0) is None  # everything was acknowledged


def test_ctrl_c_while_things_are_looked_for_stops_the_caller():
    def interrupted(image):
        raise KeyboardInterrupt

    with Cascade(interrupted, double, QueueBroker(), size=1, tau=0.0) as cascade, pytest.raises(KeyboardInterrupt):
        cascade.submit([1])


class Twice(QueueBroker):
    """At least once, with a vengeance."""

    def get(self, timeout):
        delivery = super().get(timeout)
        if delivery is not None and delivery.message.meta.pop("again", True):
            self.put(Message({**delivery.message.meta, "again": False}, delivery.message.data))
        return delivery


def test_what_is_delivered_twice_is_answered_once():
    with Cascade(parts, double, Twice(), size=2, tau=0.0) as cascade:
        found = [one.result(20) for one in [cascade.submit([i, i + 1]) for i in range(20, 30)]]
    assert found == [[2 * i, 2 * i + 2] for i in range(20, 30)]


def test_things_of_an_earlier_run_are_acknowledged_and_left(tmp_path):
    log = LogBroker(tmp_path, fsync=False)
    log.put(Message({"run": 5, "request": 0, "thing": 0}, np.array([1], np.uint8)))
    log.put(Message({}, b"nonsense"))
    with Cascade(parts, double, log, size=4, tau=0.0) as cascade:
        assert cascade.submit([7]).result(20) == [14]
    assert log.committed == 3
    log.close()


def test_with_the_broker_gone_nobody_waits_for_ever():
    broker = QueueBroker()
    go = threading.Event()

    def slow(things):
        assert go.wait(10)
        return double(things)

    cascade = Cascade(parts, slow, broker, size=1, tau=0.0)
    waiting = [cascade.submit([1, 2]), cascade.submit([3])]
    broker.close()
    go.set()
    for one in waiting:
        with contextlib.suppress(Closed):
            one.result(20)  # what was got before may be answered
    cascade._thread.join(10)
    with pytest.raises(Closed, match="lost"):
        cascade.submit([4])
    cascade.close()
    with pytest.raises(Closed, match="closed"):
        cascade.submit([4])


def test_closing_waits_for_no_batch_to_fill():
    cascade = Cascade(parts, double, QueueBroker(), size=16, tau=7200.0)
    waiting = cascade.submit([1])
    closing = threading.Thread(target=cascade.close, daemon=True)
    closing.start()
    closing.join(10)
    assert not closing.is_alive()
    assert isinstance(waiting.exception(0), Closed) or waiting.result(0) == [2]


def test_closing_answers_what_is_under_way():
    go = threading.Event()

    def slow(things):
        assert go.wait(10)
        return double(things)

    cascade = Cascade(parts, slow, QueueBroker(), size=1, tau=0.0)
    waiting = [cascade.submit([1]), cascade.submit([2])]
    threading.Timer(0.05, go.set).start()
    cascade.close()
    assert all(one.done() for one in waiting)
    assert isinstance(waiting[1].exception(), Closed) or waiting[1].result() == [4]

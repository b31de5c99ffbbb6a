"""The link between text models and engine: frames, order, stopping, and an end that goes away."""

from __future__ import annotations

import os
import queue
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitron_build.runtime.engine_route import LinkRoute
from minitron_build.runtime.link_frames import FrameReader, address, from_plain, to_frame, to_plain
from minitron_build.runtime.link_server import LinkConnection, LinkServer
from minitron_build.runtime.status import StatusError

WAIT_S = 5.0
ARRAYS = {"input_ids": np.array([[1, 2, 3]], dtype=np.int32)}
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner),
    max_leaves=8,
)


@given(messages=st.lists(PLAIN, max_size=5), cut=st.integers(1, 7))
def test_messages_come_out_whole_however_the_bytes_are_cut(messages: list[Any], cut: int) -> None:
    data, reader = b"".join(map(to_frame, messages)), FrameReader()
    pieces = [data[start : start + cut] for start in range(0, len(data), cut)]
    assert [message for piece in pieces for message in reader.feed(piece)] == messages


def test_arrays_survive_with_their_dtypes_and_shapes() -> None:
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(1, 2, 3),
        "b": np.array([[True]]),
        "c": np.zeros((1, 0), dtype=np.uint64),
    }
    back = from_plain(to_plain(arrays))
    assert list(back) == list(arrays)
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype
        np.testing.assert_array_equal(back[name], array)


class Engine:
    """The engine's end, and what it heard."""

    def __init__(self, name: str) -> None:
        self.heard: queue.Queue[tuple[LinkConnection, Any]] = queue.Queue()
        self.gone: queue.Queue[LinkConnection] = queue.Queue()
        self.server = LinkServer(name, lambda *heard: self.heard.put(heard), self.gone.put)

    def hear(self) -> tuple[LinkConnection, Any]:
        return self.heard.get(timeout=WAIT_S)


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    return f"{request.node.name}.{os.getpid()}"


@pytest.fixture
def engine(name: str) -> Iterator[Engine]:
    made = Engine(name)
    yield made
    made.server.close()


@pytest.fixture
def route(name: str) -> Iterator[LinkRoute]:
    made = LinkRoute(name)
    yield made
    made.close()


def take(route: LinkRoute, count: int) -> list[Any]:
    steps, deadline_s = [], time.monotonic() + WAIT_S
    while len(steps) < count and time.monotonic() < deadline_s:
        steps += route.take(0.1)
    return steps


def test_a_request_arrives_and_its_steps_come_back_in_order(engine: Engine, route: LinkRoute) -> None:
    route.ask(7, ARRAYS, [], 2)
    connection, (verb, number, plain, level) = engine.hear()
    assert (verb, number, level) == ("ask", 7, 2)
    np.testing.assert_array_equal(from_plain(plain)["input_ids"], ARRAYS["input_ids"])
    connection.put((7, (1, 2), (-0.5, -1.0), [], None, None))
    connection.put((7, (3,), (), to_plain(ARRAYS), "length", None))
    (_, first), (_, last) = take(route, 2)
    assert (first.token_ids, first.log_probs, first.is_last) == ((1, 2), (-0.5, -1.0), False)
    assert (last.finish_reason, list(last.arrays), last.is_last) == ("length", ["input_ids"], True)


def test_an_error_of_the_engine_keeps_its_status(engine: Engine, route: LinkRoute) -> None:
    route.ask(1, ARRAYS, [], 1)
    connection, _ = engine.hear()
    connection.put((1, (), (), [], None, "UNAVAILABLE: 3 requests are waiting; max_queue_size is 3"))
    ((_, step),) = take(route, 1)
    assert step.is_last
    assert str(step.error) == "UNAVAILABLE: 3 requests are waiting; max_queue_size is 3"


def test_a_stop_is_sent_once_asked_and_not_after_the_end(engine: Engine, route: LinkRoute) -> None:
    route.ask(1, ARRAYS, [], 1)
    route.stop(1)
    connection, _ = engine.hear()
    assert engine.hear() == (connection, ("stop", 1, False))
    connection.put((1, (), (), [], "cancelled", None))
    take(route, 1)
    route.stop(1)
    route.ask(2, ARRAYS, [], 1)
    assert engine.hear()[1][:2] == ("ask", 2)
    route.stop(2, is_whole=True)
    assert engine.hear() == (connection, ("stop", 2, True))


def test_without_an_engine_a_request_is_refused_at_once(route: LinkRoute) -> None:
    with pytest.raises(StatusError, match=r"^UNAVAILABLE: model .* is gone \(.*\); try again later$"):
        route.ask(1, ARRAYS, [], 1)


def test_every_open_sequence_fails_when_the_engine_ends_and_a_new_one_is_found(name: str) -> None:
    route, first = LinkRoute(name), Engine(name)
    for number in range(3):
        route.ask(number, ARRAYS, [], 1)
        connection, _ = first.hear()
    connection.put((0, (5,), (), [], None, None))
    first.server.close()
    steps = take(route, 4)
    assert [number for number, _ in steps] == [0, 0, 1, 2]
    assert steps[0][1].token_ids == (5,)  # what had been sent still arrives
    assert {step.error.status for _, step in steps[1:]} == {"UNAVAILABLE"}
    second = Engine(name)
    route.ask(9, ARRAYS, [], 1)
    assert second.hear()[1][1] == 9
    route.close()
    second.server.close()


def test_the_engine_hears_when_a_text_model_ends(engine: Engine, name: str) -> None:
    route = LinkRoute(name)
    route.ask(1, ARRAYS, [], 1)
    connection, _ = engine.hear()
    route.close()
    assert engine.gone.get(timeout=WAIT_S) is connection
    connection.put((1, (1,), (), [], None, None))
    assert connection.num_waiting == 0  # nothing piles up for nobody


def test_a_reload_takes_the_address_over_from_the_former_process(name: str, route: LinkRoute) -> None:
    former, later = Engine(name), Engine(name)
    route.ask(1, ARRAYS, [], 1)
    assert former.hear()[1][1] == 1
    former.server.close()
    take(route, 1)
    deadline_s = time.monotonic() + WAIT_S
    while True:
        try:
            route.ask(2, ARRAYS, [], 1)
            break
        except StatusError:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
    assert later.hear()[1][1] == 2
    later.server.close()


def test_what_waits_while_a_reader_is_busy_is_one_frame(engine: Engine, name: str) -> None:
    reader = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    reader.connect(address(name))
    reader.sendall(to_frame(("ask", 1, [], 1)))
    connection, _ = engine.hear()
    big = b"x" * (1 << 22)  # more than the socket holds: the writer waits
    connection.put(big)
    deadline_s = time.monotonic() + WAIT_S
    while connection.num_waiting and time.monotonic() < deadline_s:
        time.sleep(0.001)
    for number in range(100):
        connection.put(number)
    frames, frame_reader = [], FrameReader()
    while len(frames) < 2:
        frames += frame_reader.feed(reader.recv(1 << 20))
    assert frames == [[big], list(range(100))]
    reader.close()


def test_a_slow_text_model_does_not_hold_up_another(engine: Engine, name: str, route: LinkRoute) -> None:
    slow = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    slow.connect(address(name))
    slow.sendall(to_frame(("ask", 1, [], 1)))
    connection, _ = engine.hear()
    connection.put(b"x" * (1 << 24))
    route.ask(2, ARRAYS, [], 1)
    other, _ = engine.hear()
    other.put((2, (1,), (), [], "length", None))
    assert len(take(route, 1)) == 1
    slow.close()


def test_another_users_process_is_turned_away(
    name: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minitron_build.runtime.link_frames.os.getuid", lambda: os.geteuid() + 1)
    stranger = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    stranger.settimeout(WAIT_S)
    stranger.connect(address(name))
    assert stranger.recv(1) == b""
    assert engine.heard.empty()
    with pytest.raises(StatusError, match="another user's process answers in its place"):
        LinkRoute(name).ask(1, ARRAYS, [], 1)
    stranger.close()


def test_requests_may_be_asked_from_many_threads(engine: Engine, route: LinkRoute) -> None:
    threads = [threading.Thread(target=route.ask, args=(number, ARRAYS, [], 1)) for number in range(32)]
    for thread in threads:
        thread.start()
    heard = {engine.hear()[1][1] for _ in threads}
    for thread in threads:
        thread.join()
    assert heard == set(range(32))

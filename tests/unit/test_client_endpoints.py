"""Which server is asked next, and whether and when a request is tried again; no connection, no waiting."""

from __future__ import annotations

import pytest

from minitron_client import (
    DeadlineError,
    InvalidRequestError,
    MinitronClientError,
    OverloadedError,
    SamplingParams,
    ServerConnectionError,
    StreamBrokenError,
    UnavailableError,
)
from minitron_client.endpoints import FIRST_EJECTION_S, LONGEST_EJECTION_S, EndpointPool
from minitron_client.exchange import Exchange
from minitron_client.retries import MAX_PAUSE_S, RetryPolicy
from minitron_client.settings import ClientSettings

pytestmark = pytest.mark.unit

A, B, C = "a:1", "b:1", "c:1"


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def pool(*urls: str) -> tuple[EndpointPool, Clock]:
    clock = Clock()
    return EndpointPool(urls, clock), clock


def test_servers_are_asked_in_turn() -> None:
    servers, _ = pool(A, B, C)
    assert [servers.pick() for _ in range(7)] == [A, B, C, A, B, C, A]


def test_a_server_that_failed_is_left_out_and_comes_back() -> None:
    servers, clock = pool(A, B)
    assert servers.pick() == A
    servers.failed(A)
    assert [servers.pick() for _ in range(3)] == [B, B, B]
    clock.now_s += FIRST_EJECTION_S
    assert {servers.pick(), servers.pick()} == {A, B}


def test_each_further_failure_leaves_it_out_twice_as_long_up_to_a_bound() -> None:
    servers, clock = pool(A, B)
    for number in range(12):
        servers.failed(A)
        out_s = min(FIRST_EJECTION_S * 2**number, LONGEST_EJECTION_S)
        clock.now_s += out_s - 0.01
        assert {servers.pick(), servers.pick()} == {B}
        clock.now_s += 0.02
        assert {servers.pick(), servers.pick()} == {A, B}


def test_a_success_forgets_the_failures() -> None:
    servers, clock = pool(A, B)
    servers.failed(A)
    servers.failed(A)
    servers.succeeded(A)
    assert {servers.pick(), servers.pick()} == {A, B}
    servers.failed(A)
    clock.now_s += FIRST_EJECTION_S
    assert {servers.pick(), servers.pick()} == {A, B}


def test_when_all_are_out_the_one_that_is_back_first_is_asked() -> None:
    servers, clock = pool(A, B)
    servers.failed(A)
    clock.now_s += 0.5
    servers.failed(B)
    assert [servers.pick(), servers.pick()] == [A, A]
    assert not servers.has_other(A)
    clock.now_s += 0.6
    assert servers.has_other(B)


# --- pauses ---


def test_pauses_double_up_to_a_bound_and_are_shortened_at_random() -> None:
    longest = RetryPolicy(9, draw=lambda: 0.0)
    assert [longest.pause_s(failed, 1000) for failed in range(1, 8)] == [0.5, 1, 2, 4, MAX_PAUSE_S, 8, 8]
    assert RetryPolicy(9, draw=lambda: 1.0).pause_s(1, 1000) == 0.375
    drawn = {RetryPolicy(9).pause_s(1, 1000) for _ in range(20)}
    assert len(drawn) > 10
    assert all(pause_s is not None and 0.375 <= pause_s <= 0.5 for pause_s in drawn)


def test_it_gives_up_after_so_many_and_before_the_deadline() -> None:
    policy = RetryPolicy(2, draw=lambda: 0.0)
    assert policy.pause_s(2, 1000) == 1
    assert policy.pause_s(3, 1000) is None
    assert policy.pause_s(2, 1.0) is None
    assert policy.pause_s(2, 1.01) == 1
    assert policy.pause_s(1, 0.01, has_other=True) == 0
    assert RetryPolicy(0).pause_s(1, 1000) is None


# --- one request ---


def exchange(*urls: str, max_retries: int = 2, timeout_s: float = 60) -> tuple[Exchange, EndpointPool]:
    settings = ClientSettings(urls, max_retries=max_retries, timeout_s=timeout_s)
    servers = EndpointPool(urls)
    return Exchange(settings, servers, "hi", SamplingParams(), is_streaming=True), servers


@pytest.mark.parametrize(
    ("error", "is_retried"),
    [
        (ServerConnectionError("x"), True),
        (UnavailableError("x"), True),
        (OverloadedError("x"), True),
        (StreamBrokenError("x"), False),
        (InvalidRequestError("x"), False),
        (DeadlineError("x"), False),
    ],
)
def test_only_what_may_pass_is_tried_again(error: MinitronClientError, is_retried: bool) -> None:
    request, _ = exchange(A)
    request.next_url()
    assert (request.pause_before_retry_s(error) is not None) is is_retried
    assert error.request_id == request.request_id


def test_another_server_is_asked_at_once_and_the_failed_one_left_out() -> None:
    request, servers = exchange(A, B)
    assert request.next_url() == A
    assert request.pause_before_retry_s(ServerConnectionError("x")) == 0
    assert request.next_url() == B
    assert servers.pick() == B


def test_an_overloaded_server_is_not_left_out() -> None:
    request, servers = exchange(A, B)
    request.next_url()
    request.pause_before_retry_s(OverloadedError("x"))
    assert {servers.pick(), servers.pick()} == {A, B}


def test_no_attempt_after_the_last_or_once_the_caller_has_left() -> None:
    request, _ = exchange(A, max_retries=1)
    request.next_url()
    assert request.pause_before_retry_s(UnavailableError("x")) is not None
    assert request.pause_before_retry_s(UnavailableError("x")) is None
    left, _ = exchange(A)
    left.next_url()
    assert left.cancel()
    assert left.pause_before_retry_s(UnavailableError("x")) is None
    assert not left.cancel()


def test_no_time_left_is_a_deadline() -> None:
    request, _ = exchange(A, timeout_s=1e-9)
    with pytest.raises(DeadlineError, match=r"not answered within timeout_s=1e-09, in 1 attempts"):
        request.left_s()

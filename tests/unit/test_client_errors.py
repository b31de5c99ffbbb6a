"""Every gRPC status and every known sentence of Triton becomes the right error."""

from __future__ import annotations

import inspect
import re

import grpc
import pytest

from minitron_client import errors
from minitron_client.errors import (
    STATUS_ERRORS,
    AuthError,
    CancelledError,
    DeadlineError,
    ForeignServerError,
    HandshakeError,
    InternalError,
    InvalidRequestError,
    MinitronClientError,
    NotFoundError,
    OverloadedError,
    ServerConnectionError,
    StreamBrokenError,
    UnavailableError,
    UnsupportedError,
    error_from_sentence,
    error_from_status,
)

pytestmark = pytest.mark.unit

ERROR_CLASSES = [
    item
    for item in vars(errors).values()
    if inspect.isclass(item) and issubclass(item, MinitronClientError) and item is not MinitronClientError
]


@pytest.mark.parametrize("status", [status for status in grpc.StatusCode if status is not grpc.StatusCode.OK])
def test_every_grpc_status_is_mapped_and_kept(status: grpc.StatusCode) -> None:
    error = error_from_status(status.name, "because", request_id="r1")
    assert type(error) is STATUS_ERRORS[status.name]
    assert (error.code, error.message, error.request_id) == (status.name, "because", "r1")


def test_no_status_is_mapped_that_grpc_does_not_know() -> None:
    assert set(STATUS_ERRORS) == {status.name for status in grpc.StatusCode} - {"OK"}


@pytest.mark.parametrize("error_class", ERROR_CLASSES)
def test_every_error_has_the_marks_that_callers_rely_on(error_class: type[MinitronClientError]) -> None:
    error = error_class("two\nlines", request_id="r1")
    assert error.is_minitron_client_error
    assert error.code in {status.name for status in grpc.StatusCode}
    assert isinstance(error.retryable, bool)
    assert str(error) == f"two lines [{error.code}, request r1]"
    assert error_class.__doc__


def test_the_tree_at_the_top_of_the_module_is_the_tree() -> None:
    drawn = re.findall(r"── (\w+)(.*)", errors.__doc__ or "")
    assert sorted(name for name, _ in drawn) == sorted(item.__name__ for item in ERROR_CLASSES)
    marked = {name for name, rest in drawn if "(retryable)" in rest}
    assert marked == {item.__name__ for item in ERROR_CLASSES if item.retryable}


def test_python_s_own_bases_catch_them_too() -> None:
    assert issubclass(errors.InvalidValueError, ValueError)
    assert issubclass(DeadlineError, TimeoutError)
    assert issubclass(ServerConnectionError, ConnectionError)


# Sentences as Triton 2.51 sends them (tests/server holds the table to the real server).
SENTENCES = [
    ("Request for unknown model: 'x' is not found", NotFoundError, "NOT_FOUND"),
    ("Request for unknown model: 'x' version 7 is not found", NotFoundError, "NOT_FOUND"),
    ("Request for unknown model: 'x' has no available versions", UnavailableError, "UNAVAILABLE"),
    (
        "[request id: r1] inference input 'max_tokens' data-type is 'INT64', but model 'x' expects 'INT32'",
        InvalidRequestError,
        "INVALID_ARGUMENT",
    ),
    (
        "[request id: r1] unexpected shape for input 'max_tokens' for model 'x'. Expected [-1,1], got [1].",
        InvalidRequestError,
        "INVALID_ARGUMENT",
    ),
    (
        "[request id: r1] expected number of inputs between 2 and 5 but got 1 inputs for model 'x'.",
        InvalidRequestError,
        "INVALID_ARGUMENT",
    ),
    ("unexpected inference input 'foo' for model 'x'", InvalidRequestError, "INVALID_ARGUMENT"),
    ("unexpected inference output 'foo' for model 'x'", InvalidRequestError, "INVALID_ARGUMENT"),
    ("[request id: r1] Exceeds maximum queue size", OverloadedError, "UNAVAILABLE"),
    ("Request timeout expired", DeadlineError, "UNAVAILABLE"),
    ("Stub process 'x_0_0' is not healthy.", InternalError, "INTERNAL"),
    (
        "Failed to process the request(s) for model 'x_0_0', message: ValueError: boom",
        InternalError,
        "INTERNAL",
    ),
    ("something nobody has seen", InternalError, "UNKNOWN"),
    ("INVALID_ARGUMENT: top_p must be below 1", InvalidRequestError, "INVALID_ARGUMENT"),
    ("UNAVAILABLE: the queue is full: 64 requests wait", OverloadedError, "UNAVAILABLE"),
    ("UNAVAILABLE: shutting down", UnavailableError, "UNAVAILABLE"),
    ("UNIMPLEMENTED: beam_width 2", UnsupportedError, "UNIMPLEMENTED"),
    ("CANCELLED: by the client", CancelledError, "CANCELLED"),
    ("INTERNAL: a step failed", InternalError, "INTERNAL"),
    ("NOT_A_STATUS: hm", InternalError, "UNKNOWN"),
]


@pytest.mark.parametrize(
    "prefix", ["", "in ensemble 'ensemble', ", "in ensemble 'ensemble', [request id: a b] "]
)
@pytest.mark.parametrize(("sentence", "error_class", "code"), SENTENCES)
def test_a_sentence_without_status_is_classified(
    prefix: str, sentence: str, error_class: type[MinitronClientError], code: str
) -> None:
    error = error_from_sentence(prefix + sentence, request_id="r1")
    assert (type(error), error.code) == (error_class, code)
    assert "ensemble" not in error.message
    assert not error.message.startswith(tuple(f"{name}: " for name in STATUS_ERRORS))


@pytest.mark.parametrize(
    ("code", "details", "error_class"),
    [
        (
            "UNAVAILABLE",
            "failed to connect to all addresses; Connection refused (111)",
            ServerConnectionError,
        ),
        ("UNAVAILABLE", "Socket closed", ServerConnectionError),
        (
            "UNAVAILABLE",
            "failed to connect to all addresses; last error: UNAVAILABLE: ipv4:1.2.3.4:1: Socket closed",
            HandshakeError,
        ),
        ("UNAVAILABLE", "failed to connect to all addresses; Tls handshake failed (X)", HandshakeError),
        (
            "UNAVAILABLE",
            "failed to connect to all addresses; UNAUTHENTICATED: Hostname Verification Check failed.",
            HandshakeError,
        ),
        ("UNAVAILABLE", "DNS resolution failed for nowhere:8001", ServerConnectionError),
        (
            "UNAVAILABLE",
            "errors resolving x:1: [field:hostname lookup error:address lookup failed for x:1: "
            "Domain name not found]",
            ServerConnectionError,
        ),
        (
            "UNAVAILABLE",
            "failed to connect to all addresses; last error: UNAVAILABLE: ipv4:1.2.3.4:1: Failed parsing "
            "HTTP/2 (Expected SETTINGS frame as the first frame, got frame type 79)",
            ForeignServerError,
        ),
        ("UNIMPLEMENTED", "Received http2 header with status: 404", ForeignServerError),
        ("UNKNOWN", "Received http2 header with status: 302", ForeignServerError),
        ("INTERNAL", "Received http2 header with status: 400", ForeignServerError),
        ("UNAVAILABLE", "Received http2 header with status: 503", UnavailableError),
        ("UNAUTHENTICATED", "Received http2 header with status: 401", AuthError),
        ("INVALID_ARGUMENT", "the prompt says: failed parsing HTTP/2", InvalidRequestError),
        ("UNAVAILABLE", "This protocol is restricted, expecting header 'triton-grpc-protocol-x'", AuthError),
        ("UNAVAILABLE", "Exceeds maximum queue size", OverloadedError),
        ("UNAVAILABLE", "Server is stopping, shutting down", UnavailableError),
        ("INTERNAL", "Received RST_STREAM with error code 2", ServerConnectionError),
        ("INVALID_ARGUMENT", "unknown model and Socket closed, said the prompt", InvalidRequestError),
    ],
)
def test_one_status_with_several_causes(
    code: str, details: str, error_class: type[MinitronClientError]
) -> None:
    assert type(error_from_status(code, details)) is error_class


@pytest.mark.parametrize("details", ["Socket closed", "shutting down", "Exceeds maximum queue size"])
def test_nothing_is_retryable_once_text_has_come(details: str) -> None:
    assert error_from_status("UNAVAILABLE", details).retryable
    broken = error_from_status("UNAVAILABLE", details, is_mid_stream=True)
    assert type(broken) is StreamBrokenError
    assert not broken.retryable

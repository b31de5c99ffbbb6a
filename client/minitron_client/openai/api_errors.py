"""What goes wrong, in OpenAI's words: one error object and HTTP status per cause.

    ApiError                     anything the door answers with an error object
    TABLE                        class of the gRPC client's tree -> status, type and code

A test holds the table to the client's whole tree. It knows nothing of HTTP servers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from minitron_client import errors

RETRY_AFTER_S = 1


@dataclass(slots=True)
class ApiError(Exception):
    """An answer that is an error.

    Attributes:
        message: one sentence for the caller.
        status: HTTP status.
        kind: OpenAI's `type`, such as "invalid_request_error".
        param: field of the request at fault.
        code: OpenAI's `code`, such as "model_not_found".
        headers: further HTTP headers.
    """

    message: str
    status: int = 400
    kind: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    headers: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return self.message

    def body(self) -> dict[str, Any]:
        """The error object as OpenAI's SDK reads it."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


class Answer(NamedTuple):
    """How one class of the client's errors is answered; `says` replaces a sentence that names our insides."""

    status: int
    kind: str
    code: str | None = None
    is_retryable: bool = False
    says: str | None = None


_UNREACHABLE = "the inference server cannot be reached; try again later"

# The most particular class wins: a class missing here is answered as its base is.
TABLE: dict[type[errors.MinitronClientError], Answer] = {
    errors.MinitronClientError: Answer(500, "server_error", "internal_error"),
    errors.ServerConnectionError: Answer(503, "server_error", "server_unreachable", True, _UNREACHABLE),
    errors.HandshakeError: Answer(503, "server_error", "server_unreachable", True, _UNREACHABLE),
    errors.ForeignServerError: Answer(503, "server_error", "server_unreachable", True, _UNREACHABLE),
    errors.StreamBrokenError: Answer(
        502, "server_error", "stream_broken", says="the inference server went away in the middle of the text"
    ),
    errors.DeadlineError: Answer(504, "server_error", "timeout"),
    errors.CancelledError: Answer(503, "server_error", "cancelled"),
    errors.InvalidRequestError: Answer(400, "invalid_request_error"),
    errors.NotFoundError: Answer(404, "invalid_request_error", "model_not_found"),
    errors.OverloadedError: Answer(429, "rate_limit_error", "overloaded", True),
    errors.UnavailableError: Answer(503, "server_error", "unavailable", True),
    errors.UnsupportedError: Answer(400, "invalid_request_error", "unsupported"),
    # The caller's key is checked at the door: this one is about the door's own.
    errors.AuthError: Answer(
        502, "server_error", "upstream_auth", says="the inference server refused this door's own credentials"
    ),
    errors.InternalError: Answer(500, "server_error", "internal_error"),
    errors.ProtocolError: Answer(502, "server_error", "bad_upstream_answer"),
    errors.ClientClosedError: Answer(503, "server_error", "shutting_down", True, "the door is shutting down"),
}


def api_error(error: errors.MinitronClientError) -> ApiError:
    """An error of the gRPC client as the caller of the door sees it."""
    answer = next(TABLE[kind] for kind in type(error).__mro__ if kind in TABLE)
    headers = (("retry-after", str(RETRY_AFTER_S)),) if answer.is_retryable else ()
    return ApiError(answer.says or error.message, answer.status, answer.kind, None, answer.code, headers)


def unsupported(name: str, why: str) -> ApiError:
    """A field that OpenAI has, and that would mean something else here if it were passed over."""
    return ApiError(f"{name} is not supported: {why}", param=name, code="unsupported_parameter")


def invalid(name: str, why: str) -> ApiError:
    """A field whose value cannot be taken."""
    return ApiError(f"{name} {why}", param=name, code="invalid_value")

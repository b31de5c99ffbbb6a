"""What the client raises, by cause, and how a gRPC status or a server's sentence becomes one of them.

Each has `.code` (gRPC status name), `.retryable`, `.request_id`, `.message` (the server's sentence, where it
was the server that refused) and `.advice` (what to do).

    MinitronClientError
    ├── ServerConnectionError   no server at the address, or the connection went before an answer (retryable)
    │   ├── HandshakeError        something answers there, but not as this client speaks: TLS (retryable)
    │   ├── ForeignServerError    something answers there that is no gRPC server            (retryable)
    │   └── StreamBrokenError     it went, or ended early, after the first response: text is lost
    ├── DeadlineError           not answered within timeout_s; also a TimeoutError
    ├── CancelledError          cancelled by the server, or by close() of the client
    ├── InvalidRequestError     the server refused the request as it stands
    │   └── InvalidValueError     refused here, before anything was sent; also a ValueError
    ├── NotFoundError           no such model, version or call
    ├── OverloadedError         the queue is full                                               (retryable)
    ├── UnavailableError        the server or model is not ready, or is shutting down           (retryable)
    ├── UnsupportedError        this server lacks what was asked for
    ├── AuthError               a header, key or certificate is missing or wrong
    ├── InternalError           the server failed
    ├── ProtocolError           an answer that cannot be read
    └── ClientClosedError       used after close()

It knows status names and Triton's sentences. It does not import grpc.
"""

from __future__ import annotations

import re
from typing import ClassVar, NamedTuple


class MinitronClientError(Exception):
    """Base of everything this package raises on purpose; `str()` is one line.

    Args:
        message: one sentence, without the status name.
        code: gRPC status name, such as "INVALID_ARGUMENT"; the class has a default.
        request_id: id of the request it ended, "" where there was none.
        advice: what to do, where the message does not say it; the class has a default.
    """

    is_minitron_client_error: ClassVar[bool] = True
    default_code: ClassVar[str] = "UNKNOWN"
    default_advice: ClassVar[str] = ""
    retryable: ClassVar[bool] = False
    """True where the same call may succeed a little later and repeating it loses nothing."""

    def __init__(
        self, message: str, *, code: str | None = None, request_id: str = "", advice: str | None = None
    ) -> None:
        self.message = " ".join(message.split())
        self.code = code or self.default_code
        self.request_id = request_id
        self.advice = self.default_advice if advice is None else advice
        self._tells_advice = bool(advice)
        super().__init__(self.message)

    def __str__(self) -> str:
        advice = f"; {self.advice}" if self._tells_advice else ""
        tail = f", request {self.request_id}" if self.request_id else ""
        return f"{self.message}{advice} [{self.code}{tail}]"


class ServerConnectionError(MinitronClientError, ConnectionError):
    """No server at the address, or the connection went before an answer came."""

    default_advice = "check the address, and that a server is running there"
    default_code = "UNAVAILABLE"
    retryable = True


class HandshakeError(ServerConnectionError):
    """Something took the connection and dropped it: one side speaks TLS alone, or a certificate is wrong."""

    default_advice = (
        "both sides must speak TLS or neither (--tls or MINITRON_TLS=1; tls=TlsConfig()), with certificates "
        "that the other side trusts (--tls-ca, --tls-cert, --tls-key, --tls-server-name), on the gRPC port "
        "(8001 by default; 8000 is Triton's HTTP port)"
    )


class ForeignServerError(ServerConnectionError):
    """Something answers at the address, and it is no gRPC server: another port, or another service."""

    default_advice = (
        "what answers there is no gRPC server: give Triton's gRPC port (8001 by default; 8000 is its HTTP "
        "port), or --tls where a proxy wants it"
    )


class StreamBrokenError(ServerConnectionError):
    """The connection went, or the stream ended early, after the first response."""

    default_advice = "what came before is in the stream's text; ask again for the whole"
    retryable = False


class DeadlineError(MinitronClientError, TimeoutError):
    """Not answered within the time the caller gave."""

    default_advice = "allow more time (timeout_s), or ask for fewer tokens"
    default_code = "DEADLINE_EXCEEDED"


class CancelledError(MinitronClientError):
    """Cancelled by the server, or by closing the client while the request ran."""

    default_advice = "ask again, unless it was you who cancelled"
    default_code = "CANCELLED"


class InvalidRequestError(MinitronClientError):
    """The server refused the request as it stands."""

    default_advice = "change the request as the sentence says"
    default_code = "INVALID_ARGUMENT"


class InvalidValueError(InvalidRequestError, ValueError):
    """Refused by the client before anything was sent: names the field and the cure."""

    default_advice = ""


class NotFoundError(MinitronClientError):
    """The server has no such model, version or call."""

    default_advice = "give a model that the server has; `minitron models` lists them"
    default_code = "NOT_FOUND"


class OverloadedError(MinitronClientError):
    """The server's queue is full."""

    default_advice = "ask again a little later, or with fewer requests at once"
    default_code = "RESOURCE_EXHAUSTED"
    retryable = True


class UnavailableError(MinitronClientError):
    """The server or the model is not ready, or is shutting down."""

    default_advice = "wait until it is ready; `minitron health` tells"
    default_code = "UNAVAILABLE"
    retryable = True


class UnsupportedError(MinitronClientError):
    """This server lacks what was asked for."""

    default_advice = "leave it out, or ask a model that has it"
    default_code = "UNIMPLEMENTED"


class AuthError(MinitronClientError):
    """A header, key or certificate is missing or wrong."""

    default_advice = "give api_key (MINITRON_API_KEY), headers or tls as the server expects them"
    default_code = "UNAUTHENTICATED"


class InternalError(MinitronClientError):
    """The server failed."""

    default_advice = "look for the request's id in the server's log"
    default_code = "INTERNAL"


class ProtocolError(MinitronClientError):
    """An answer that cannot be read: a missing output, a wrong dtype, bytes that do not add up."""

    default_advice = (
        "check that the address is the gRPC port of a Triton server, and the versions on both sides"
    )
    default_code = "DATA_LOSS"


class ClientClosedError(MinitronClientError):
    """The client, or its stream, was used after close()."""

    default_advice = "make a new client"
    default_code = "FAILED_PRECONDITION"


# Every gRPC status but OK. FAILED_PRECONDITION and OUT_OF_RANGE are refusals of the request as it stands.
STATUS_ERRORS: dict[str, type[MinitronClientError]] = {
    "CANCELLED": CancelledError,
    "UNKNOWN": InternalError,
    "INVALID_ARGUMENT": InvalidRequestError,
    "DEADLINE_EXCEEDED": DeadlineError,
    "NOT_FOUND": NotFoundError,
    "ALREADY_EXISTS": InvalidRequestError,
    "PERMISSION_DENIED": AuthError,
    "RESOURCE_EXHAUSTED": OverloadedError,
    "FAILED_PRECONDITION": InvalidRequestError,
    "ABORTED": InternalError,
    "OUT_OF_RANGE": InvalidRequestError,
    "UNIMPLEMENTED": UnsupportedError,
    "INTERNAL": InternalError,
    "UNAVAILABLE": UnavailableError,
    "DATA_LOSS": InternalError,
    "UNAUTHENTICATED": AuthError,
}


class SentenceRule(NamedTuple):
    """A part that only one kind of sentence has, the status it stands for, and the error it means."""

    pattern: re.Pattern[str]
    code: str
    error: type[MinitronClientError]


def _rule(pattern: str, code: str, error: type[MinitronClientError]) -> SentenceRule:
    return SentenceRule(re.compile(pattern, re.IGNORECASE), code, error)


# Sentences of Triton 2.51, of gRPC and of NVIDIA's models, first match wins. A stream carries them without
# their status, and UNAVAILABLE, NOT_FOUND and RESOURCE_EXHAUSTED alone stand for several causes.
SENTENCE_RULES: tuple[SentenceRule, ...] = (
    _rule(r"protocol is restricted, expecting header", "UNAVAILABLE", AuthError),
    _rule(r"exceeds maximum queue size|queue (?:is )?full", "UNAVAILABLE", OverloadedError),
    _rule(r"request timeout expired", "UNAVAILABLE", DeadlineError),
    _rule(r"\bCLIENT: .*message larger than max", "RESOURCE_EXHAUSTED", ProtocolError),
    _rule(r"message larger than max", "RESOURCE_EXHAUSTED", InvalidRequestError),
    _rule(r"request cancelled by client", "CANCELLED", CancelledError),
    _rule(r"streaming is only supported in decoupled mode", "UNIMPLEMENTED", UnsupportedError),
    _rule(r"stub process .* is not healthy", "INTERNAL", InternalError),
    _rule(r"failed to process the request\(s\) for model", "INTERNAL", InternalError),
    _rule(r"has no available versions|\bnot (?:yet )?ready\b|shutting down", "UNAVAILABLE", UnavailableError),
    _rule(r"unknown model\b", "NOT_FOUND", NotFoundError),
    _rule(r"data-type is '.*' expects '", "INVALID_ARGUMENT", InvalidRequestError),
    _rule(r"unexpected (?:shape for|inference) (?:in|out)put", "INVALID_ARGUMENT", InvalidRequestError),
    _rule(r"expected (?:number of|\d+) inputs? ", "INVALID_ARGUMENT", InvalidRequestError),
    _rule(r"byte size mismatch|batch size does not match", "INVALID_ARGUMENT", InvalidRequestError),
    _rule(r"decoupled transaction policy", "UNIMPLEMENTED", UnsupportedError),
)

_AMBIGUOUS_CODES = frozenset({"UNAVAILABLE", "NOT_FOUND", "RESOURCE_EXHAUSTED"})
# gRPC's own sentences for a connection that is not there; only looked at where a status came with them.
_TRANSPORT_CODES = frozenset({"UNAVAILABLE", "INTERNAL", "UNKNOWN"})
_TRANSPORT = re.compile(
    r"failed to connect|connection (?:refused|reset|aborted|timed out)|socket closed|dns resolution|"
    r"rst_stream|name resolution|stream removed|goaway|broken pipe|keepalive|ping timeout|unreachable|"
    r"end of tcp stream|handshak|channel is shut|errors resolving|lookup failed",
    re.IGNORECASE,
)
# Of them, those of a connection that was taken and dropped before a word of gRPC, as a TLS server drops plain
# text, and a caller without the certificate it wants.
_HANDSHAKE = re.compile(
    r"handshak|verification check failed|certificate_|failed to connect to all addresses.*socket closed",
    re.IGNORECASE,
)
# What speaks HTTP and no gRPC: HTTP/1, or HTTP/2 with a page in answer. A proxy's 401, 403, 429 and 5xx are
# about the server behind it, and keep the meaning that gRPC gives them.
_FOREIGN = re.compile(
    r"failed parsing http/2|expected settings frame|http2 header with status: (?:[23]\d\d|40[04-8]|41\d)",
    re.IGNORECASE,
)
_PREFIX = re.compile(r"^(?:in ensemble '[^']*', |\[request id: [^\]]*\] )+")
_STATED_CODE = re.compile(r"^([A-Z_]+): ")


def error_from_status(
    code: str, details: str, *, request_id: str = "", is_mid_stream: bool = False
) -> MinitronClientError:
    """The error of an RPC that ended with a gRPC status other than OK.

    Args:
        code: name of the status.
        details: its sentence.
        request_id: id of the request, "" for calls that have none.
        is_mid_stream: a response had come: what was retryable is a broken stream now.
    """
    error = STATUS_ERRORS.get(code, InternalError)
    if code in (*_TRANSPORT_CODES, "UNIMPLEMENTED") and _FOREIGN.search(details):
        error = ForeignServerError
    elif code in _TRANSPORT_CODES and _TRANSPORT.search(details):
        error = HandshakeError if _HANDSHAKE.search(details) else ServerConnectionError
    elif code in _AMBIGUOUS_CODES:
        rule = _find_rule(details)
        error = rule.error if rule else error
    return _make(error, details or f"the server ended the call with {code}", code, request_id, is_mid_stream)


def error_from_sentence(
    sentence: str, *, request_id: str = "", is_mid_stream: bool = False
) -> MinitronClientError:
    """The error of a stream's `error_message`, which carries no status.

    This server's sentences start with the status name ("INVALID_ARGUMENT: ..."), Triton's own do not;
    both may stand behind "in ensemble 'ensemble', " or "[request id: ...] ".
    """
    text = _PREFIX.sub("", sentence)
    stated = _STATED_CODE.match(text)
    if stated and stated[1] in STATUS_ERRORS:
        return error_from_status(
            stated[1], text[stated.end() :], request_id=request_id, is_mid_stream=is_mid_stream
        )
    rule = _find_rule(text)
    code, error = (rule.code, rule.error) if rule else ("UNKNOWN", InternalError)
    return _make(error, text, code, request_id, is_mid_stream)


def _find_rule(text: str) -> SentenceRule | None:
    return next((rule for rule in SENTENCE_RULES if rule.pattern.search(text)), None)


def _make(
    error: type[MinitronClientError], message: str, code: str, request_id: str, is_mid_stream: bool
) -> MinitronClientError:
    if is_mid_stream and error.retryable:
        error = StreamBrokenError
    return error(message, code=code, request_id=request_id, advice=error.default_advice)

"""What a request is refused with: a gRPC status name and one sentence.

A decoupled stream carries no status code, so the name stands at the front of the message on every path. This
module knows nothing of Triton; `tensors.py` turns a `StatusError` into a response.
"""

from __future__ import annotations

INVALID_ARGUMENT = "INVALID_ARGUMENT"
UNAVAILABLE = "UNAVAILABLE"
CANCELLED = "CANCELLED"
DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
INTERNAL = "INTERNAL"
STATUSES = (INVALID_ARGUMENT, UNAVAILABLE, CANCELLED, DEADLINE_EXCEEDED, INTERNAL)

FOREIGN_SENTENCES = {
    "is not healthy": UNAVAILABLE,
    "is not ready": UNAVAILABLE,
    "Exceeds maximum queue size": UNAVAILABLE,
    "Request timeout expired": DEADLINE_EXCEEDED,
    "exceeds maximum input length": INVALID_ARGUMENT,
    "the engine was closed": UNAVAILABLE,
}
"""What Triton and the engines say without a status, and the status it means."""


class StatusError(Exception):
    """One request is refused or has failed; `str()` is `STATUS: sentence`.

    Args:
        status: one of `STATUSES`.
        sentence: what the caller reads; no traceback, no line break.

    Raises:
        ValueError: a status that is not in `STATUSES`.
    """

    def __init__(self, status: str, sentence: str) -> None:
        if status not in STATUSES:
            raise ValueError(f"status is {status!r}; expected one of {', '.join(STATUSES)}")
        self.status, self.sentence = status, " ".join(sentence.split())
        super().__init__(f"{status}: {self.sentence}")

    @classmethod
    def read(cls, message: str) -> StatusError:
        """The error behind another model's message; INTERNAL when nothing says otherwise."""
        status, colon, sentence = message.partition(": ")
        if colon and status in STATUSES:
            return cls(status, sentence)
        meant = (status for words, status in FOREIGN_SENTENCES.items() if words in message)
        return cls(next(meant, INTERNAL), message)


def invalid(sentence: str) -> StatusError:
    """The request can never be served as it is."""
    return StatusError(INVALID_ARGUMENT, sentence)

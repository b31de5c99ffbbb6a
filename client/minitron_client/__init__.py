"""The gRPC client of a Minitron server: `MinitronClient`, `AsyncMinitronClient`, options, results, errors.

It needs neither the build side nor torch; tritonclient is imported at the first call.
"""

from minitron_client.aio_client import AsyncMinitronClient, AsyncTextStream
from minitron_client.batch import BatchProgress
from minitron_client.client import MinitronClient, TextStream
from minitron_client.errors import (
    AuthError,
    CancelledError,
    ClientClosedError,
    DeadlineError,
    ForeignServerError,
    HandshakeError,
    InternalError,
    InvalidRequestError,
    InvalidValueError,
    MinitronClientError,
    NotFoundError,
    OverloadedError,
    ProtocolError,
    ServerConnectionError,
    StreamBrokenError,
    UnavailableError,
    UnsupportedError,
)
from minitron_client.results import Chunk, Completion, FinishReason, Health, Timings, Usage
from minitron_client.sampling import SamplingParams
from minitron_client.settings import TlsConfig
from minitron_client.tensors import ModelMetadata, TensorSpec

__all__ = [
    "AsyncMinitronClient",
    "AsyncTextStream",
    "AuthError",
    "BatchProgress",
    "CancelledError",
    "Chunk",
    "ClientClosedError",
    "Completion",
    "DeadlineError",
    "FinishReason",
    "ForeignServerError",
    "HandshakeError",
    "Health",
    "InternalError",
    "InvalidRequestError",
    "InvalidValueError",
    "MinitronClient",
    "MinitronClientError",
    "ModelMetadata",
    "NotFoundError",
    "OverloadedError",
    "ProtocolError",
    "SamplingParams",
    "ServerConnectionError",
    "StreamBrokenError",
    "TensorSpec",
    "TextStream",
    "Timings",
    "TlsConfig",
    "UnavailableError",
    "UnsupportedError",
    "Usage",
]

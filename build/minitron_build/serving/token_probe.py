"""Does a token come? Asked of a server over HTTP, and read from what its metrics say has moved.

It knows Triton's generate endpoint and which counters move while tokens are made. When to ask, and what
follows from the answer, is watch.py's.
"""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from minitron_build.errors import StageError
from minitron_build.serving.triton_server import TritonServer

PROBE_MODEL, PROBE_PROMPT = "tensorrt_llm_bls", "def add(a, b):"
SCRAPE_TIMEOUT_S = 5.0

PROGRESS = (
    "minitron_output_tokens_total",
    "minitron_engine_steps_total",
    'nv_trt_llm_general_metrics{general_type="iteration_counter"',
)
"""Beginnings of the series that move while tokens are made; the last one is TensorRT-LLM's backend's."""
ENGINE_UP = "minitron_engine_up{"


def probe_token(server: TritonServer, timeout_s: float) -> None:
    """One real token through the text path, with the key that callers need.

    Raises:
        StageError: none came, with what came instead.
    """
    security = server.options.security
    url = f"{server.http_url}/v2/models/{PROBE_MODEL}/generate"
    body = json.dumps({"text_input": PROBE_PROMPT, "max_tokens": 1}).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json", **security.http_headers})
    try:
        with _open(request, timeout_s) as answer:
            text = answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            text = error.read().decode(errors="replace")
    except OSError as error:  # a timeout, too
        text = str(getattr(error, "reason", error))
    # Triton sends some errors with status 200: only the text that was asked for is an answer.
    if '"text_output"' not in text:
        raise StageError(f"a request for one token failed: {_shortened(text)}")
    if security.has_tls:
        _check_tls(server, timeout_s)


def _check_tls(server: TritonServer, timeout_s: float) -> None:
    """The gRPC port shakes hands with the certificate it was given.

    Raises:
        StageError: it does not.
    """
    address = (server.options.reachable_address, server.options.grpc_port)
    certificate = server.options.security.tls_cert
    try:
        served = ssl.get_server_certificate(address, timeout=timeout_s)
    except OSError as error:
        raise StageError(f"gRPC does not answer with TLS: {error}") from error
    if certificate is None or _body(served) not in _body(certificate.read_text(encoding="ascii")):
        raise StageError("gRPC answers with another certificate than --tls-cert")


def read_progress(server: TritonServer) -> dict[str, float] | None:
    """Series that move while tokens are made, and ENGINE_UP's; None when the server does not answer."""
    try:
        with _open(urllib.request.Request(server.metrics_url), SCRAPE_TIMEOUT_S) as answer:
            return parse_series(answer.read().decode(), (*PROGRESS, ENGINE_UP))
    except (OSError, ValueError):
        return None


def parse_series(text: str, beginnings: tuple[str, ...]) -> dict[str, float]:
    """Series of Prometheus' text that begin so, with their values."""
    lines = (line.rpartition(" ") for line in text.splitlines() if line.startswith(beginnings))
    return {name: float(value) for name, _, value in lines}


def engine_is_down(series: Mapping[str, float]) -> bool:
    """Whether an engine says of itself that its thread has ended."""
    return any(value == 0 for name, value in series.items() if name.startswith(ENGINE_UP))


def _open(request: urllib.request.Request, timeout_s: float) -> Any:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy does not know loopback
    return opener.open(request, timeout=timeout_s)


def _shortened(text: str) -> str:
    return " ".join(text.split())[:300] or "an empty answer"


def _body(pem: str) -> str:
    return "".join(line for line in pem.split() if "CERTIFICATE" not in line and not line.startswith("-----"))

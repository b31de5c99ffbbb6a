"""The probe of a deployed pod against a real Triton: a token, and a dead model process, unseen by health."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from triton_repos import serving

from minitron_build.bundle.bundle import Bundle
from minitron_build.deploy.deploy_compose import PROBE_FILE
from minitron_build.runtime.metrics import FLUSH_INTERVAL_S
from minitron_build.serving.triton_server import TritonServer


def run_probe(server: TritonServer, *words: str) -> subprocess.CompletedProcess[str]:
    # What `ready` remembers, it must not remember of another test's server.
    tmp_dir = Path(tempfile.gettempdir()) / f"minitron-probe-{server.pid}"
    tmp_dir.mkdir(exist_ok=True)
    ports = {
        "PROBE_HTTP_PORT": str(server.options.http_port),
        "PROBE_METRICS_PORT": str(server.options.metrics_port),
    }
    return subprocess.run(
        [sys.executable, str(PROBE_FILE), *words],
        env=os.environ | ports | {"TMPDIR": str(tmp_dir)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_probe_gets_a_token(running_server: TritonServer) -> None:
    for mode in ("start", "alive", "live", "ready", "ready"):
        answer = run_probe(running_server, mode)
        assert (answer.returncode, answer.stderr) == (0, "")


@pytest.fixture
def own_server(tiny_bundle: Bundle) -> Iterator[TritonServer]:
    """One that a test may break."""
    # The requests of a process that was killed never end: there is nothing to drain.
    with serving(tiny_bundle.model_repo, drain_timeout_s=0) as server:
        yield server


@pytest.mark.parametrize("model", ["tensorrt_llm_bls", "tensorrt_llm"])
def test_probe_sees_a_dead_model_process(own_server: TritonServer, model: str) -> None:
    assert run_probe(own_server, "alive").returncode == 0
    assert run_probe(own_server, "ready").returncode == 0
    (stub,) = (
        child
        for child in psutil.Process(own_server.pid).children(recursive=True)
        if any(f"/{model}/" in word for word in child.cmdline()) and "stub" in child.name()
    )
    os.kill(stub.pid, signal.SIGKILL)
    time.sleep(2 * FLUSH_INTERVAL_S)  # the counters have told of the last token
    run_probe(own_server, "ready")
    for mode in ("start", "alive", "ready"):
        answer = run_probe(own_server, mode)
        assert answer.returncode == 1
        assert re.search("is not healthy|is gone|cannot be reached", answer.stderr), answer.stderr
    with urllib.request.urlopen(f"{own_server.http_url}/v2/health/live", timeout=10) as health:
        assert health.status == 200, "Triton itself does not notice"

"""`minitron serve` in a process of its own, on free ports, as an orchestrator runs it.

It knows the command and what it prints; what is asked of the server and what is done to it is a test's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minitron_build.serving.triton_server import free_ports
from minitron_build.serving.triton_stubs import live_stubs

MINITRON = "import sys; from minitron_build.cli import main; sys.exit(main())"


@dataclass
class ServeProcess:
    process: subprocess.Popen[str]
    document: dict[str, Any]
    health_url: str
    errors: list[str] = field(default_factory=list)
    """Lines of stderr so far."""

    @property
    def server_pid(self) -> int:
        """Process id of the Triton that serves now."""
        again = [line for line in self.errors if "ready again" in line]
        return int(again[-1].split()[-1]) if again else int(self.document["pid"])

    def stub(self, model: str) -> int:
        """Process id of a model's only instance."""
        stubs = live_stubs(self.server_pid)
        (pid,) = (pid for pid, instance in stubs.items() if instance.startswith(f"{model}_0"))
        return pid

    def ready(self) -> int:
        """What /ready answers."""
        try:
            with urllib.request.urlopen(f"{self.health_url}/ready", timeout=5) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            with error:
                return error.code

    def state(self) -> dict[str, Any]:
        """What /live tells."""
        with urllib.request.urlopen(f"{self.health_url}/live", timeout=5) as answer:
            return dict(json.load(answer))

    def wait_for_ready(self, code: int, timeout_s: float = 60) -> None:
        deadline_s = time.monotonic() + timeout_s
        while self.ready() != code:
            assert time.monotonic() < deadline_s, f"/ready was not {code} in {timeout_s} s: {self.errors}"
            time.sleep(0.02)

    def end(self, timeout_s: float = 60) -> int:
        """Exit code, once it has ended."""
        return self.process.wait(timeout_s)


@contextmanager
def minitron_serve(
    bundle_dir: Path, flags: Mapping[str, object], env: Mapping[str, str] | None = None
) -> Iterator[ServeProcess]:
    """Serve until the block ends; ready when it begins."""
    grpc_port, http_port, metrics_port, health_port = free_ports(4)
    ports = {
        "grpc-port": grpc_port, "http-port": http_port, "metrics-port": metrics_port,
        "health-port": health_port,
    }  # fmt: skip
    words = [f"--{name}={value}" for name, value in {**ports, **flags}.items()]
    command = [sys.executable, "-c", MINITRON, "serve", str(bundle_dir), *words]
    with subprocess.Popen(
        command, env={**os.environ, **(env or {})}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        errors: list[str] = []
        reader = threading.Thread(target=_collect, args=(process, errors))
        reader.start()
        try:
            assert process.stdout is not None
            line = next((line for line in process.stdout if line.startswith("{")), None)
            assert line is not None, errors
            yield ServeProcess(process, json.loads(line), f"http://127.0.0.1:{health_port}", errors)
        finally:
            process.kill()
            reader.join()


def _collect(process: subprocess.Popen[str], errors: list[str]) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        errors.append(line.rstrip())

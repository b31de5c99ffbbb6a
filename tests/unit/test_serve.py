"""`minitron serve` and `minitron demo` before any server runs: their flags, and what they import.

Run with: pytest tests/unit/test_serve.py
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from minitron_build.serving import serve

pytestmark = pytest.mark.unit


def _parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    serve.configure_parser(parser)
    return parser.parse_args(words)


def test_defaults_are_tritons_ports_on_loopback() -> None:
    options = serve._options(_parse("some-bundle"), Path("repo"))
    assert (options.host, options.grpc_port, options.http_port, options.metrics_port) == (
        "127.0.0.1",
        8001,
        8000,
        8002,
    )


def test_every_flag_reaches_the_server(tmp_path: Path) -> None:
    flags = (
        "--host 10.0.0.7 --grpc-port 1 --http-port 2 --metrics-port 3 --start-timeout-s 4 --drain-timeout-s 5"
    )
    options = serve._options(_parse("b", *flags.split(), "--log-path", "x.log", "--verbose"), tmp_path)
    assert options.ports == {"--grpc-port": 1, "--http-port": 2, "--metrics-port": 3}
    assert (options.host, options.start_timeout_s, options.drain_timeout_s) == ("10.0.0.7", 4.0, 5.0)
    assert (options.verbose, options.log_path, options.model_repo) == (True, Path("x.log"), tmp_path)


@pytest.mark.parametrize("module", ["serve", "demo"])
def test_import_is_light(module: str) -> None:
    """`--help` must not wait for what only serving needs."""
    code = (
        f"import sys, minitron_build.serving.{module}; "
        "print(*({'torch', 'numpy', 'grpc', 'tritonclient', 'transformers', 'pytriton'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""

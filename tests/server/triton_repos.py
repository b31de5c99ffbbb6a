"""Copies of a bundle that a test may change, and a real Triton that serves them until a test is over.

It knows folders, configurations and ports; what is asked of the models it does not know.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minitron_build.bundle.bundle import Bundle
from minitron_build.repository import pbtxt
from minitron_build.serving.triton_server import ServerOptions, TritonServer, free_ports


@contextmanager
def serving(model_repo: Path, **options: Any) -> Iterator[TritonServer]:
    """A server that is ready, on free ports; drained and stopped at the end."""
    grpc_port, http_port, metrics_port = free_ports(3)
    ports = {"grpc_port": grpc_port, "http_port": http_port, "metrics_port": metrics_port}
    with TritonServer.start(ServerOptions(model_repo, **ports, **options)) as server:
        server.wait_until_ready()
        yield server


def copy_bundle(bundle: Bundle, folder: Path) -> Path:
    """The model repository of a copy."""
    shutil.copytree(bundle.path, folder)
    return folder / bundle.model_repo.name


def set_parameters(model_repo: Path, model: str, **values: str) -> None:
    """Change parameters that the model's configuration has."""
    config = pbtxt.read_config(model_repo / model)
    pbtxt.set_parameters(config, values)
    pbtxt.write_config(config, model_repo / model)


def add_variant(model_repo: Path, model: str, name: str, **values: str) -> None:
    """The same model once more under another name, with other parameters."""
    shutil.copytree(model_repo / model, model_repo / name)
    config = pbtxt.read_config(model_repo / name)
    config.name = name
    pbtxt.write_config(config, model_repo / name)
    set_parameters(model_repo, name, **values)

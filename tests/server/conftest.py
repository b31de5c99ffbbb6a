"""A real Triton Inference Server on free loopback ports, serving a bundle of the tiny checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from triton_repos import serving

from minitron_build.build import build_bundle, plan_build
from minitron_build.bundle.bundle import Bundle
from minitron_build.planning.plan import PlanRequest
from minitron_build.serving.triton_server import TritonServer
from minitron_build.source.hub import resolve_checkpoint


@pytest.fixture(scope="session")
def tiny_bundle(tiny_minitron: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    source = resolve_checkpoint(str(tiny_minitron))
    request = PlanRequest(
        arch="cpu", max_batch_size=32, max_input_len=1024, max_seq_len=2048, max_num_tokens=256
    )
    return build_bundle(plan_build(source, request), source, tmp_path_factory.mktemp("tiny") / "bundle")


@pytest.fixture(scope="session")
def running_server(tiny_bundle: Bundle) -> Iterator[TritonServer]:
    with serving(tiny_bundle.model_repo) as server:
        yield server

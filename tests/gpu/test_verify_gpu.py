"""The gate on a GPU: the numbers it gives on a CPU.

pytest tests/gpu/test_verify_gpu.py       needs a torch built for CUDA
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minitron_build.calibration.samples import SampleRequest, read_calibration_set
from minitron_build.checkpoint.convert_fp8 import convert_fp8_checkpoint
from minitron_build.source.hub import resolve_checkpoint
from minitron_build.verify.gate import VerifyRequest, verify
from minitron_build.verify.models import Arithmetic

DEMO = resolve_checkpoint("demo").hf_dir


def test_verdict_is_the_cpus(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    data = read_calibration_set(SampleRequest(num_samples=16, seq_len=128), DEMO, 4096)
    convert_fp8_checkpoint(DEMO, tmp_path / "fp8", data)
    request = VerifyRequest("demo", tmp_path / "fp8", DEMO, num_samples=6, seq_len=128, has_suggestion=True)
    on_cpu = verify(request)
    on_gpu = verify(replace(request, arithmetic=Arithmetic(device="cuda")))
    assert on_gpu.passed == on_cpu.passed
    for cpu, gpu in zip(on_cpu.checks, on_gpu.checks, strict=True):
        assert gpu.name == cpu.name
        assert gpu.found == pytest.approx(cpu.found, rel=0.2, abs=0.01), cpu.name

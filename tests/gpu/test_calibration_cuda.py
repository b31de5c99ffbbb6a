"""Calibration on a CUDA device arrives at the CPU's scaling factors, within one bf16 step."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from minitron_build.calibration.amax import LayerAmax
from minitron_build.calibration.forward import CalibrationForward
from minitron_build.checkpoint.fp8_stream import read_layers
from minitron_build.source.hf_checkpoint import HfCheckpoint

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

IDS = Path(__file__).parents[1] / "golden" / "data" / "calibration_ids.json"


def ranges(hf_dir: Path, device: str) -> list[LayerAmax]:
    source = HfCheckpoint.open(hf_dir)
    forward = CalibrationForward(source, json.loads(IDS.read_text()), torch.device(device))
    forward.start()
    with ExitStack() as stack:
        layers = read_layers(source, 0, stack)
        return [forward.layer(weights, lambda tokens: None) for _, weights in layers]


def test_ranges_agree_with_the_cpus(tiny_minitron: Path) -> None:
    for on_cpu, on_gpu in zip(ranges(tiny_minitron, "cpu"), ranges(tiny_minitron, "cuda"), strict=True):
        for site, amax in on_cpu.sites.items():
            assert on_gpu.sites[site] == pytest.approx(amax, rel=2**-7), site

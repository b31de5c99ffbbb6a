"""Calibration on a CUDA device arrives at the CPU's scaling factors, within two bf16 steps.

pytest tests/gpu/test_calibration_cuda.py       the "real" half needs a torch built for CUDA
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from minitron_build.calibration import forward as forward_module
from minitron_build.calibration.amax import LayerAmax
from minitron_build.calibration.forward import CalibrationForward
from minitron_build.calibration.samples import CalibrationSet
from minitron_build.checkpoint.convert_fp8 import convert_fp8_checkpoint
from minitron_build.checkpoint.fp8_stream import read_layers
from minitron_build.source.hf_checkpoint import HfCheckpoint
from minitron_build.verify.gate import short_verify

IDS = json.loads((Path(__file__).parents[1] / "golden" / "data" / "calibration_ids.json").read_text())
# A rounding that falls otherwise moves what comes behind it by a step, and two may meet.
TWO_STEPS = 2.0**-6


def ranges(hf_dir: Path, device: torch.device, states: Path | None = None) -> list[LayerAmax]:
    """Of every layer; with `states`, hidden states are saved and restored before each."""
    source = HfCheckpoint.open(hf_dir)
    forward = CalibrationForward(source, IDS, device)
    forward.start()
    found = []
    with ExitStack() as stack:
        for _, weights in read_layers(source, 0, stack):
            if states is not None:
                with open(forward.save(states), "rb"):
                    forward = CalibrationForward(source, IDS, device)
                    forward.restore(states)
            found.append(forward.layer(weights, lambda tokens: None))
    return found


def assert_agree(found: list[LayerAmax], expected: list[LayerAmax]) -> None:
    for one, other in zip(found, expected, strict=True):
        for site, amax in other.sites.items():
            assert one.sites[site] == pytest.approx(amax, rel=TWO_STEPS), site


def test_ranges_agree_with_the_cpus(tiny_minitron: Path, cuda: torch.device) -> None:
    assert_agree(ranges(tiny_minitron, cuda), ranges(tiny_minitron, torch.device("cpu")))


def test_hidden_states_survive_a_kill(tiny_minitron: Path, cuda: torch.device, tmp_path: Path) -> None:
    assert ranges(tiny_minitron, cuda, tmp_path / "states") == ranges(tiny_minitron, cuda)


def test_a_conversion_takes_the_device(
    tiny_minitron: Path, cuda: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def device() -> torch.device:
        asked.append(cuda)
        return cuda

    monkeypatch.setattr(forward_module, "calibration_device", device)
    data = CalibrationSet("ids", "0" * 64, tuple(map(tuple, IDS)), max(map(len, IDS)))
    checkpoint = convert_fp8_checkpoint(tiny_minitron, tmp_path / "fp8", data)
    assert asked
    assert short_verify(checkpoint.path, tiny_minitron).facts["kind"] == "fp8"


def test_a_device_that_computes_is_taken(cuda: torch.device, capsys: pytest.CaptureFixture[str]) -> None:
    assert forward_module.calibration_device() == torch.device("cuda")
    assert not capsys.readouterr().err


def test_a_device_that_does_not_compute_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_kernels(*size: int, **options: object) -> torch.Tensor:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCompile")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", no_kernels)
    assert forward_module.calibration_device() == torch.device("cpu")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: the CUDA device is not used, it does not compute: CUDA error: no kernel")


def test_sums_are_whole_and_the_flag_is_given_back(tiny_minitron: Path, cuda: torch.device) -> None:
    flags, seen = torch.backends.cuda.matmul, set()
    source = HfCheckpoint.open(tiny_minitron)
    forward = CalibrationForward(source, IDS, cuda)
    forward.start()
    before = flags.allow_bf16_reduced_precision_reduction
    with ExitStack() as stack:
        _, weights = next(read_layers(source, 0, stack))
        forward.layer(weights, lambda tokens: seen.add(flags.allow_bf16_reduced_precision_reduction))
    assert before is True, "torch's default"
    assert seen == {False}
    assert flags.allow_bf16_reduced_precision_reduction is before

"""The pretended CUDA device itself: that it refuses what CUDA refuses, and finds what was left behind.

Run: pytest tests/unit/test_pretended_cuda.py
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fp8_model import write_fp8_checkpoint
from minitron_build.calibration import decoder
from minitron_build.calibration.forward import CalibrationForward
from minitron_build.checkpoint.convert import convert_checkpoint
from minitron_build.runtime.reference_engine import LayerRunner, LlamaModel, kv_cache, open_checkpoint, rope
from minitron_build.runtime.reference_engine.linear import CPU, Compute, PlainProjection, TensorCoreProjection
from minitron_build.source.hf_checkpoint import HfCheckpoint
from pretended_cuda import DEVICE, MixedDevicesError, pretended_cuda

IDS = [508, *range(1, 40)]
E4M3 = torch.float8_e4m3fn
Patch = pytest.MonkeyPatch


def test_a_tensor_stays_where_it_was_put() -> None:
    with pretended_cuda() as mode:
        here, there = torch.ones(2, 3), torch.ones(2, 3, device=DEVICE)
        assert (there * 2 + 1).device == there.to(torch.bfloat16).device == DEVICE
        assert there[0].device == torch.empty_like(there).device == DEVICE
        assert here.to(DEVICE).device == torch.tensor([1.0], device=DEVICE).device == DEVICE
        assert there.cpu().device == CPU
        there[1:] = here[1:] * 5  # a copy, as CUDA makes one
        assert there.tolist() == [[1.0] * 3, [5.0] * 3]
        assert float(there.sum()) == 18
        assert torch.equal(there, there)
        assert mode.operations["aten.mul.Tensor"] == 1
    assert type(here * 2) is torch.Tensor


MIXED: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "sum": lambda here, there: here + there,
    "product": lambda here, there: there @ here,
    "index": lambda here, there: there[torch.tensor([0])],
    "table": lambda here, there: here[torch.tensor([0], device=DEVICE)],
    "concatenation": lambda here, there: torch.cat((there, here)),
    "out": lambda here, there: torch.mm(there, there, out=here),
    "comparison": torch.equal,
    "attention": lambda here, there: torch.nn.functional.scaled_dot_product_attention(there, there, here),
}


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("is_inference", [False, True])
def test_devices_do_not_mix(name: str, is_inference: bool) -> None:
    with pretended_cuda(), torch.inference_mode(is_inference):
        here, there = torch.ones(16, 16), torch.ones(16, 16, device=DEVICE)
        with pytest.raises(RuntimeError, match="on the CPU, .* on the device|have the same device type"):
            MIXED[name](here, there)


def test_a_number_without_dimensions_may_come_along() -> None:
    with pretended_cuda():
        assert (torch.ones(2, device=DEVICE) * torch.tensor(3.0)).tolist() == [3.0, 3.0]


def scaled_mm(rows: int, outputs: int, inputs: int, *, scale: torch.Tensor, transposed: bool = True) -> None:
    numbers = torch.ones(rows, inputs, device=DEVICE).to(E4M3)
    weight = torch.ones(outputs, inputs, device=DEVICE).to(E4M3)
    other = weight.t() if transposed else weight.t().contiguous()
    torch._scaled_mm(numbers, other, scale, scale, out_dtype=torch.float32)


@pytest.mark.parametrize("rows", [1, 7])
def test_scaled_mm_takes_any_number_of_rows(rows: int) -> None:
    with pretended_cuda():
        scaled_mm(rows, 32, 16, scale=torch.ones((), device=DEVICE))


def test_scaled_mm_is_held_to_cudas_layouts() -> None:
    with pretended_cuda():
        one = torch.ones((), device=DEVICE)
        with pytest.raises(RuntimeError, match="divisible by 16"):
            scaled_mm(7, 32, 40, scale=one)
        with pytest.raises(RuntimeError, match="divisible by 16"):
            scaled_mm(7, 40, 32, scale=one)
        with pytest.raises(RuntimeError, match="mat2 must be col_major"):
            scaled_mm(7, 32, 32, scale=one, transposed=False)
        with pytest.raises(RuntimeError, match="must be float"):
            scaled_mm(7, 32, 32, scale=one.bfloat16())
        with pytest.raises(MixedDevicesError):
            scaled_mm(7, 32, 32, scale=torch.ones(()))


def test_division_by_the_cpus_number_is_cudas() -> None:
    x, scale = torch.arange(1, 5000).float(), 0.0213
    with pretended_cuda():
        by_number = (x.to(DEVICE) / scale).cpu()
        by_its_own = (x.to(DEVICE) / torch.full((), scale, device=DEVICE)).cpu()
    assert torch.equal(by_its_own, x / scale)
    assert not torch.equal(by_number, by_its_own)


def stays_behind(monkeypatch: Patch, kind: type[Any], *names: str) -> None:
    """Objects of a class are made with some of their tensors on the CPU."""
    make = kind.__init__

    def made(self: Any, *args: Any, **options: Any) -> None:
        make(self, *args, **options)
        for name in names:
            setattr(self, name, getattr(self, name).cpu())

    monkeypatch.setattr(kind, "__init__", made)


LEFT_BEHIND: dict[str, Callable[[Patch], None]] = {
    "embedding": lambda patch: stays_behind(patch, LlamaModel, "_embedding"),
    "final norm": lambda patch: stays_behind(patch, LlamaModel, "_final_norm"),
    "rope": lambda patch: stays_behind(patch, rope.RopeTable, "cos"),
    "fp8 weight": lambda patch: stays_behind(patch, TensorCoreProjection, "_weight"),
    "factors": lambda patch: stays_behind(patch, TensorCoreProjection, "_scale_a", "_scale_b"),
    "head": lambda patch: stays_behind(patch, PlainProjection, "_weight"),
    "scratch": lambda patch: stays_behind(patch, kv_cache.Scratch, "_flat"),
    "norms": lambda patch: patch.setattr(Compute, "owned", lambda self, one: one.to(self.dtype)),
}


@pytest.mark.parametrize("name", LEFT_BEHIND)
def test_a_tensor_left_behind_is_found(
    tiny_minitron: Path, tmp_path: Path, monkeypatch: Patch, name: str
) -> None:
    checkpoint = write_fp8_checkpoint(tiny_minitron, tmp_path / "fp8")
    LEFT_BEHIND[name](monkeypatch)
    with pretended_cuda(), pytest.raises((MixedDevicesError, RuntimeError), match="device|CPU"):
        LlamaModel(checkpoint, max_seq_len=64, device=str(DEVICE)).last_logits(IDS)


def test_hidden_states_left_behind_are_found(tiny_minitron: Path, tmp_path: Path) -> None:
    convert_checkpoint(tiny_minitron, tmp_path / "bf16")
    with pretended_cuda():
        runner = LayerRunner(open_checkpoint(tmp_path / "bf16"), max_seq_len=64, device=str(DEVICE))
        hidden = [one.cpu() for one in runner.embed([IDS])]
        with pytest.raises(MixedDevicesError):
            runner.run_layer(0, hidden)


@pytest.mark.parametrize("what", ["weights", "angles"])
def test_calibration_leaves_nothing_behind(tiny_minitron: Path, monkeypatch: Patch, what: str) -> None:
    source = HfCheckpoint.open(tiny_minitron)
    if what == "angles":
        stays_behind(monkeypatch, decoder.RopeAngles, "cos")
    with pretended_cuda():
        forward = CalibrationForward(source, [IDS], DEVICE)
        forward.start()
        if what == "weights":
            forward._device = CPU
        weights = {name: torch.ones(shape).bfloat16() for name, shape in layer_shapes(source).items()}
        with pytest.raises(MixedDevicesError):
            forward.layer(weights, lambda tokens: None)


def layer_shapes(source: HfCheckpoint) -> dict[str, tuple[int, ...]]:
    prefix = "model.layers.0."
    return {
        name.removeprefix(prefix): info.shape
        for name, (_, info) in source.tensors.items()
        if name.startswith(prefix)
    }

"""FP8 on a GPU's tensor cores against the same numbers emulated on the CPU.

    pytest tests/gpu/test_fp8_tensor_cores.py       needs a torch built for CUDA and a GPU from Ada (SM 89) on

The CPU's half is held to an independent float64 model in tests/golden/test_fp8_logits.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fp8_model import write_fp8_checkpoint
from minitron_build.runtime.reference_engine import LlamaModel, StoredLinear
from minitron_build.runtime.reference_engine.fp8 import Fp8Scales, quantize
from minitron_build.runtime.reference_engine.linear import (
    Compute,
    TensorCoreProjection,
    has_fp8_tensor_cores,
    make_projection,
)

IDS = [508, *((11 * n * n + 5 * n) % 500 for n in range(299))]
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def tensor_cores() -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    if not has_fp8_tensor_cores(CUDA):
        pytest.skip(f"{torch.cuda.get_device_name()} has no FP8 tensor cores: they begin with SM 89")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6144, 3072), (3072, 9216), (96, 128)])
@pytest.mark.parametrize("rows", [1, 7, 256])
def test_a_product_equals_the_emulated_one(dtype: torch.dtype, shape: tuple[int, int], rows: int) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = quantize(torch.randn(shape, generator=generator) * 50, 1.0)
    x = torch.randn(rows, shape[1], generator=generator).to(dtype)
    stored = StoredLinear(weight, Fp8Scales(activation=0.01, weights=0.002))
    device = make_projection(stored, Compute(dtype, CUDA))
    assert isinstance(device, TensorCoreProjection)
    expected = make_projection(stored, Compute(dtype)).float32(x)
    # The tensor cores of Hopper keep fewer bits of a sum than float32 has.
    found = device.float32(x.to(CUDA)).cpu()
    assert (found - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kv_scale", [None, 1.0])
def test_logits_of_a_model_are_close(
    tiny_minitron: Path, tmp_path: Path, kv_scale: float | None, compute_dtype: str
) -> None:
    checkpoint = write_fp8_checkpoint(tiny_minitron, tmp_path / "fp8", kv_scale=kv_scale)
    on_device, on_cpu = (
        LlamaModel(checkpoint, max_seq_len=300, compute_dtype=compute_dtype, device=device).last_logits(IDS)
        for device in ("cuda", "cpu")
    )
    # Numbers near a border between two E4M3 numbers fall on either side, as between any two FP8 engines.
    assert (on_device - on_cpu).norm() < 0.05 * on_cpu.norm()

"""FP8 by `torch._scaled_mm` against the same numbers emulated: its product, and a model's logits.

    pytest tests/gpu/test_fp8_tensor_cores.py       the "real" half needs a GPU from Ada (SM 89) on

The pretended half runs the CPU's own `_scaled_mm`. The emulation is held to an independent float64 model in
tests/golden/test_fp8_logits.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fp8_model import write_fp8_checkpoint
from minitron_build.checkpoint.convert import convert_checkpoint
from minitron_build.runtime.reference_engine import LlamaModel, StoredLinear
from minitron_build.runtime.reference_engine.fp8 import E4M3, Fp8Scales, quantize
from minitron_build.runtime.reference_engine.linear import (
    Compute,
    Fp8Projection,
    PlainProjection,
    TensorCoreProjection,
    has_fp8_tensor_cores,
    make_projection,
)
from pretended_cuda import AMPERE, DEVICE, pretended_cuda

IDS = [508, *((11 * n * n + 5 * n) % 500 for n in range(299))]
SCALES = Fp8Scales(activation=0.01, weights=0.002)


@pytest.fixture(autouse=True)
def precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def tensor_cores(cuda: torch.device) -> torch.device:
    if not has_fp8_tensor_cores(cuda):
        pytest.skip(f"{torch.cuda.get_device_name()} has no FP8 tensor cores: they begin with SM 89")
    return cuda


def fp8_weight(*shape: int) -> StoredLinear:
    return StoredLinear(
        quantize(torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 50, 1.0), SCALES
    )


def rows_of(count: int, width: int) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6144, 3072), (3072, 9216), (96, 128)])
@pytest.mark.parametrize("rows", [1, 7, 256])
def test_a_product_equals_the_emulated_one(
    tensor_cores: torch.device, dtype: torch.dtype, shape: tuple[int, int], rows: int
) -> None:
    stored, x = fp8_weight(*shape), rows_of(rows, shape[1]).to(dtype)
    device = make_projection(stored, Compute(dtype, tensor_cores))
    assert isinstance(device, TensorCoreProjection)
    expected = make_projection(stored, Compute(dtype)).float32(x)
    found = device.float32(x.to(tensor_cores))
    assert (found.device.type, found.dtype) == ("cuda", torch.float32)
    # The tensor cores of Hopper keep fewer bits of a sum than float32 has.
    assert (found.cpu() - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("shape", [(40, 96), (96, 40)])
def test_a_weight_that_tensor_cores_cannot_take_is_emulated(
    tensor_cores: torch.device, shape: tuple[int, int]
) -> None:
    stored, x = fp8_weight(*shape), rows_of(5, shape[1])
    device = make_projection(stored, Compute(torch.float32, tensor_cores))
    assert isinstance(device, Fp8Projection)
    expected = make_projection(stored, Compute(torch.float32)).float32(x)
    assert (device.float32(x.to(tensor_cores)).cpu() - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("scale", [0.0213, 0.01, 3.0])
def test_rounding_is_the_cpus_bit_for_bit(cuda: torch.device, scale: float) -> None:
    numbers = torch.arange(127, dtype=torch.uint8).view(E4M3).double()
    near = ((numbers[:-1] + numbers[1:]) / 2 * scale).float()  # ties, or as near as float32 comes to them
    x = torch.cat((near, near.nextafter(2 * near), near.nextafter(near / 2), -near, near * 1e4))
    found, expected = quantize(x.to(cuda), scale).cpu(), quantize(x, scale)
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
    assert found.float().abs().max() == 448


def logits_on(checkpoint: Path, device: str, compute_dtype: str) -> torch.Tensor:
    return LlamaModel(checkpoint, max_seq_len=300, compute_dtype=compute_dtype, device=device).last_logits(
        IDS
    )


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kv_scale", [None, 1.0])
def test_logits_of_a_model_are_close(
    tiny_minitron: Path, tmp_path: Path, cuda: torch.device, kv_scale: float | None, compute_dtype: str
) -> None:
    checkpoint = write_fp8_checkpoint(tiny_minitron, tmp_path / "fp8", kv_scale=kv_scale)
    on_device, on_cpu = (logits_on(checkpoint, device, compute_dtype) for device in (str(cuda), "cpu"))
    # Numbers near a border between two E4M3 numbers fall on either side, as between any two FP8 engines.
    assert (on_device - on_cpu).norm() < 0.1 * on_cpu.norm()


def test_logits_of_a_bf16_model_are_the_cpus(tiny_minitron: Path, tmp_path: Path, cuda: torch.device) -> None:
    convert_checkpoint(tiny_minitron, tmp_path / "bf16")
    on_device, on_cpu = (logits_on(tmp_path / "bf16", device, "float32") for device in (str(cuda), "cpu"))
    assert (on_device - on_cpu).abs().max() < 1e-4 * on_cpu.abs().max()  # TF32 would be at 1e-3


@pytest.mark.parametrize("kv_scale", [None, 1.0])
def test_sequences_are_continued_on_their_caches(
    tiny_minitron: Path, tmp_path: Path, cuda: torch.device, kv_scale: float | None
) -> None:
    checkpoint = write_fp8_checkpoint(tiny_minitron, tmp_path / "fp8", kv_scale=kv_scale)
    found = []
    for device in (str(cuda), "cpu"):
        model = LlamaModel(checkpoint, max_seq_len=96, device=device)
        caches = [model.new_cache() for _ in range(3)]
        for number, cache in enumerate(caches):
            model.prefill(IDS[number : number + 48 + number], cache)
        for step in range(20):  # far enough that the caches grow
            hidden = model.decode([IDS[step + 1]] * 3, caches)
        found.append(model.logits(hidden))
    on_device, on_cpu = found
    assert (on_device - on_cpu).norm() < 0.1 * on_cpu.norm()


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_an_older_gpu_emulates(tiny_minitron: Path, tmp_path: Path, compute_dtype: str) -> None:
    checkpoint = write_fp8_checkpoint(tiny_minitron, tmp_path / "fp8")
    on_cpu = logits_on(checkpoint, "cpu", compute_dtype)
    with pretended_cuda(AMPERE) as mode:
        on_device = logits_on(checkpoint, str(DEVICE), compute_dtype)
    assert "aten.mm.default" in mode.operations
    assert "aten._scaled_mm.default" not in mode.operations
    assert (on_device - on_cpu).norm() < 0.1 * on_cpu.norm()


def test_float32_is_no_tf32_whatever_the_container_says(cuda: torch.device) -> None:
    from minitron_build.runtime.reference_engine.linear import use_whole_float32

    torch.set_float32_matmul_precision("high")  # as TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 does
    use_whole_float32(torch.device("cpu"))
    assert torch.get_float32_matmul_precision() == "high"
    use_whole_float32(cuda)
    assert torch.get_float32_matmul_precision() == "highest"
    x = rows_of(64, 512)
    found = PlainProjection(x, cuda).float32(x.to(cuda)).cpu()
    assert (found - x @ x.t()).abs().max() < 1e-3

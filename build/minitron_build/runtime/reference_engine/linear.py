"""Matrix products whose rows do not depend on the other rows of the batch, bit for bit.

BLAS picks its kernel by the number of rows, and two kernels may add in a different order. So generated
tokens are only ever computed in row counts that were seen to give the same bits on this machine, for the
weight shapes in use; a batch is padded up to one of them. It knows how a weight lies in memory, what
TensorRT-LLM does in an FP8 linear layer, and nothing of the model.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from .checkpoint import StoredLinear
from .config import UnsupportedCheckpointError
from .fp8 import E4M3, HALF_FACTOR, Fp8Scales, quantize, to_float32, to_half

# Ladders of row counts, the best first. One row alone is invariant by construction: it has no neighbours.
ROW_LADDERS: tuple[tuple[int, ...], ...] = (
    (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64),
    (4, 8, 12, 16, 24, 32, 48, 64),
    (8, 16, 24, 32, 64),
    (16, 32),
    (8,),
    (1,),
)
# oneDNN lays a packed weight out for a number of rows; any count from here up gets the same layout.
PACKED_FOR_ROWS = 64
# Weights kept as they are stored are widened in blocks that stay in the cache until they are used.
WIDENED_BLOCK_BYTES = 4 << 20
# A large weight is cut into equal projections, so that probing one of them speaks for all.
MAX_OUTPUTS_PER_PROJECTION = 16384
# The exponent that a float16 weight's largest number is brought to; float16 ends at 15.
HALF_EXPONENT = 14
CPU = torch.device("cpu")
# Laying a weight out for products keeps one core busy, and takes twice its memory meanwhile.
LOADING_THREADS = min(os.cpu_count() or 1, 4)
# GPUs from Ada on multiply FP8 numbers in their tensor cores.
FP8_COMPUTE_CAPABILITY = (8, 9)
# What `torch._scaled_mm` wants of both dimensions of a weight; rows of the input may be any number.
FP8_MULTIPLE = 16


@dataclass(frozen=True, slots=True)
class Compute:
    """How a model computes: the dtype of activations, where, and how weights are kept.

    Attributes:
        keeps_fp8_bytes: FP8 weights take one byte a number and are widened as they are used, instead of two
            bytes that are used as they are: half the memory, and several times slower for few rows.
    """

    dtype: torch.dtype
    device: torch.device = CPU
    keeps_fp8_bytes: bool = False

    def owned(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy in the compute dtype that does not depend on the file any more."""
        return torch.empty(tensor.shape, dtype=self.dtype, device=self.device).copy_(tensor)


class Projection(Protocol):
    """A weight [num_outputs, num_inputs] and the way its products are computed, summed in float32."""

    num_outputs: int
    num_inputs: int

    def float32(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [rows, num_inputs] in any dtype to float32 [rows, num_outputs]."""


class PlainProjection:
    """A float32 weight as BLAS takes it, where torch was built without anything faster, and on a GPU."""

    def __init__(self, weight: torch.Tensor, device: torch.device | None = None) -> None:
        self.num_outputs, self.num_inputs = weight.shape
        self._weight = torch.empty(weight.shape, device=device).copy_(weight)

    def float32(self, x: torch.Tensor) -> torch.Tensor:
        """See `Projection`."""
        return torch.nn.functional.linear(x.float(), self._weight)


class PackedProjection:
    """A float32 weight in oneDNN's own layout: up to twice as fast for few rows, the same bits for any."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.num_outputs, self.num_inputs = weight.shape
        self._packed = torch.ops.mkldnn._reorder_linear_weight.default(weight.float(), PACKED_FOR_ROWS)

    def float32(self, x: torch.Tensor) -> torch.Tensor:
        """See `Projection`."""
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(
            x.float(), self._packed, None, "none", [], ""
        )
        return out


class HalfProjection:
    """A 16-bit or FP8 weight as float16 in FBGEMM's layout: float32 times float16, widened in registers.

    Half the memory and twice the speed of float32 for few rows, at the bandwidth of memory. The weight is
    scaled by a power of two, so that the numbers of bfloat16 fit: only those below 2**-33 of the largest lose
    bits, far less than a float32 sum rounds.

    Raises:
        UnsupportedCheckpointError: the weight is not finite.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self.num_outputs, self.num_inputs = weight.shape
        wide = (to_half(weight) if weight.dtype == E4M3 else weight).to(torch.float32, copy=True)
        amax = max(abs(float(bound)) for bound in torch.aminmax(wide))
        if not math.isfinite(amax):
            raise UnsupportedCheckpointError("a weight holds NaN or infinity; expected finite numbers")
        shift = HALF_EXPONENT - math.floor(math.log2(amax)) if amax > 0 else 0
        wide.mul_(2.0**shift)
        self._factor = 2.0**-shift * (HALF_FACTOR if weight.dtype == E4M3 else 1.0)
        self._packed = torch.ops.quantized.linear_prepack_fp16(wide, None)

    def float32(self, x: torch.Tensor) -> torch.Tensor:
        """See `Projection`."""
        out: torch.Tensor = torch.ops.quantized.linear_dynamic_fp16(to_float32(x).contiguous(), self._packed)
        return out.mul_(self._factor)


class WidenedProjection:
    """A bfloat16 or FP8 weight as it is stored, widened block by block as it is used: the least memory."""

    def __init__(self, weight: torch.Tensor, *, is_copied: bool = True) -> None:
        self.num_outputs, self.num_inputs = weight.shape
        self._weight = weight.clone() if is_copied else weight

    def float32(self, x: torch.Tensor) -> torch.Tensor:
        """See `Projection`."""
        wide = to_float32(x)
        block = max(1, WIDENED_BLOCK_BYTES // (4 * self.num_inputs))
        out = torch.empty(x.shape[0], self.num_outputs)
        widened = torch.empty(min(block, self.num_outputs), self.num_inputs)
        work = torch.empty(widened.shape, dtype=torch.int16)
        for start in range(0, self.num_outputs, block):
            part = self._weight[start : start + block]
            half_or_part = to_half(part, work[: len(part)]) if part.dtype == E4M3 else part
            torch.mm(wide, widened[: len(part)].copy_(half_or_part).t(), out=out[:, start : start + block])
        return out.mul_(HALF_FACTOR) if self._weight.dtype == E4M3 else out


class Fp8Projection:
    """An FP8 linear layer as TensorRT-LLM computes it, its products summed in float32.

    The input is rounded to E4M3 with the layer's static scaling factor, saturating; the product of the E4M3
    numbers is multiplied by both factors. The engine casts both factors to its own dtype first
    (`FP8Linear.forward`, without a GEMM plugin), so they are rounded to the compute dtype here.
    """

    def __init__(self, numbers: Projection, scales: Fp8Scales, dtype: torch.dtype) -> None:
        self.num_outputs, self.num_inputs = numbers.num_outputs, numbers.num_inputs
        self._numbers = numbers
        self._activation_scale, weights_scale = _cast_scales(scales, dtype)
        self._factor = self._activation_scale * weights_scale

    def float32(self, x: torch.Tensor) -> torch.Tensor:
        """See `Projection`."""
        return self._numbers.float32(quantize(x, self._activation_scale)).mul_(self._factor)


class TensorCoreProjection:
    """The same layer where the device itself multiplies FP8 numbers: `torch._scaled_mm`.

    A CPU has that product too, but takes 2 to 50 times as long as `Fp8Projection`, and sums less exactly.
    """

    def __init__(self, weight: torch.Tensor, scales: Fp8Scales, compute: Compute) -> None:
        self.num_outputs, self.num_inputs = weight.shape
        self._weight = weight.to(compute.device, copy=True)
        self._activation_scale, weights_scale = _cast_scales(scales, compute.dtype)
        self._scale_a, self._scale_b = (
            torch.tensor(value, dtype=torch.float32, device=compute.device)
            for value in (self._activation_scale, weights_scale)
        )

    def float32(self, x: torch.Tensor) -> torch.Tensor:
        """See `Projection`."""
        numbers = quantize(x, self._activation_scale).contiguous()
        return torch._scaled_mm(
            numbers,
            self._weight.t(),
            self._scale_a,
            self._scale_b,
            out_dtype=torch.float32,
            use_fast_accum=False,
        )


def _cast_scales(scales: Fp8Scales, dtype: torch.dtype) -> tuple[float, float]:
    activation, weights = torch.tensor([scales.activation, scales.weights]).to(dtype).tolist()
    return activation, weights


MakeProjection = Callable[[StoredLinear], Projection]
Each = Callable[[MakeProjection, Iterable[StoredLinear]], Iterable[Projection]]
"""`map`, or a thread pool's."""


def make_projections(stored: StoredLinear, compute: Compute, *, each: Each = map) -> list[Projection]:
    """A stored weight [outputs, inputs] ready for products, cut where it has very many outputs.

    The result holds its own copy; join the outputs of several projections along the last dimension.
    """
    weights = torch.split(stored.weight, MAX_OUTPUTS_PER_PROJECTION)
    parts = [StoredLinear(weight, stored.scales) for weight in weights]
    return list(each(partial(make_projection, compute=compute), parts))


def make_projection(stored: StoredLinear, compute: Compute) -> Projection:
    """A stored weight [outputs, inputs] ready for products, in one piece."""
    weight, scales = stored.weight, stored.scales
    if scales is None:
        return _unquantised(weight.to(compute.dtype) if compute.dtype == torch.bfloat16 else weight, compute)
    fits_tensor_cores = all(size % FP8_MULTIPLE == 0 for size in weight.shape)
    if fits_tensor_cores and compute.device.type == "cuda" and has_fp8_tensor_cores(compute.device):
        return TensorCoreProjection(weight, scales, compute)
    return Fp8Projection(_unquantised(weight, compute), scales, compute.dtype)


def _unquantised(weight: torch.Tensor, compute: Compute) -> Projection:
    """Whatever computes products with these numbers best here; E4M3 numbers count as they are."""
    if compute.device.type != "cpu":
        return PlainProjection(weight, compute.device)
    if weight.dtype == E4M3 and compute.keeps_fp8_bytes:
        return WidenedProjection(weight)
    if weight.dtype != torch.float32 and "fbgemm" in torch.backends.quantized.supported_engines:
        return HalfProjection(weight)
    if weight.dtype == E4M3 or compute.dtype == torch.bfloat16:
        return WidenedProjection(weight)
    return PackedProjection(weight) if torch._C._has_mkldnn else PlainProjection(weight)


def use_whole_float32(device: torch.device) -> None:
    """Let float32 products of a CUDA device be float32: NVIDIA's containers make them TF32, of 10 bits."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest")


def has_fp8_tensor_cores(device: torch.device) -> bool:
    """Whether a CUDA device multiplies FP8 numbers itself."""
    return torch.cuda.get_device_capability(device) >= FP8_COMPUTE_CAPABILITY


@dataclass(frozen=True, slots=True)
class RowLadder:
    """The row counts that give the same bits per row; ascending.

    Raises:
        ValueError: no sizes, or sizes out of order.
    """

    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.sizes or any(a >= b for a, b in itertools.pairwise((0, *self.sizes))):
            raise ValueError(f"row counts are {self.sizes}; expected ascending numbers from 1")

    def padded(self, num_rows: int) -> int:
        """Rows to compute for `num_rows`: whole tiles of the largest size, then one that fits the rest."""
        whole, rest = divmod(num_rows, self.sizes[-1])
        return whole * self.sizes[-1] + (next(size for size in self.sizes if size >= rest) if rest else 0)

    def tiles(self, padded_rows: int) -> list[tuple[int, int]]:
        """Cut a padded number of rows into (start, end) tiles."""
        largest = self.sizes[-1]
        return [(start, min(start + largest, padded_rows)) for start in range(0, padded_rows, largest)]


def probe_row_ladder(projections: Sequence[Projection], device: torch.device = CPU) -> RowLadder:
    """Find the row counts whose rows are bit-identical on this machine, now, for all these weights."""
    by_shape = {(type(one), one.num_outputs, one.num_inputs): one for one in projections}
    for sizes in ROW_LADDERS[:-1]:
        if all(_is_invariant(projection, sizes, device) for projection in by_shape.values()):
            return RowLadder(sizes)
    return RowLadder(ROW_LADDERS[-1])


def _is_invariant(projection: Projection, sizes: tuple[int, ...], device: torch.device) -> bool:
    """Whether a row's bits survive every row count and another place in the batch."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(sizes[-1], projection.num_inputs, generator=generator).to(device)
    whole = projection.float32(rows)  # [rows, outputs]
    return all(
        torch.equal(projection.float32(rows[:size]), whole[:size])
        and torch.equal(projection.float32(rows[:size].flip(0)).flip(0), whole[:size])
        for size in sizes
    )

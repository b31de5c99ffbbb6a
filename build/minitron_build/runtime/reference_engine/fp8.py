"""FP8 E4M3 numbers: how TensorRT-LLM rounds to them, and a fast way back.

real = stored * scaling factor. It knows numbers; nothing of layers or files.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
# An E4M3 number shifted into a float16 keeps its bits and loses the difference of exponent biases, 15 - 7.
HALF_FACTOR = 2.0**8
# Fewer numbers than this are widened sooner by torch's one slow call than by several fast ones.
FAST_NUMBERS = 1 << 15
# Small enough for the cache, and for torch to do it on one thread.
BLOCK_NUMBERS = 1 << 15
_MAGNITUDE_BITS = 0x7F  # all of them set: NaN
_WITHOUT_SIGN_COPY = ~0x4000


@dataclass(frozen=True, slots=True)
class Fp8Scales:
    """Scaling factors of a linear layer, one per tensor, as stored in float32."""

    activation: float
    weights: float


def quantize(x: torch.Tensor, scaling_factor: float) -> torch.Tensor:
    """`x / scaling_factor` in E4M3: nearest, ties to even, saturating at 448."""
    # CUDA multiplies by the reciprocal of a number of the CPU's, which is another number; not so of its own.
    divisor = torch.full((), scaling_factor, dtype=torch.float32, device=x.device)
    return (x.float() / divisor).clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3)


def to_half(numbers: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """E4M3 numbers, none of them NaN, as float16 of 1 / `HALF_FACTOR` their size, exactly.

    Twenty times as fast as torch's own conversion on a CPU: shift the 7 magnitude bits to the exponent's
    place, and keep one copy of the sign that widening spread over the upper bits.

    Args:
        out: int16 of the same shape to work in; the result shares its memory.
    """
    out = torch.empty(numbers.shape, dtype=torch.int16, device=numbers.device) if out is None else out
    out.copy_(numbers.view(torch.int8)).bitwise_left_shift_(7).bitwise_and_(_WITHOUT_SIGN_COPY)
    return out.view(torch.float16)


def to_float32(x: torch.Tensor) -> torch.Tensor:
    """`x` of any dtype in float32, exactly; NaN stays NaN."""
    if x.dtype != E4M3 or x.numel() < FAST_NUMBERS or has_nan(x):
        return x.float()
    return to_half(x).float().mul_(HALF_FACTOR)


def dequantize(numbers: torch.Tensor, scaling_factor: float, out: torch.Tensor) -> torch.Tensor:
    """E4M3 numbers [..., rows, columns], none of them NaN, times their scaling factor, into `out`.

    Block by block, so that what is between stays in the cache. `out` has the same shape, and is returned.
    """
    if numbers.device.type != "cpu":
        return out.copy_(numbers.float().mul_(scaling_factor))
    rows_per_block = max(1, BLOCK_NUMBERS // numbers.shape[-1])
    bits = torch.empty(rows_per_block, numbers.shape[-1], dtype=torch.int16, device=numbers.device)
    wide = torch.empty(bits.shape, dtype=torch.float32, device=numbers.device)
    for place in itertools.product(*map(range, numbers.shape[:-2])):
        blocks = (torch.split(one[place], rows_per_block) for one in (numbers, out))
        for part, target in zip(*blocks, strict=True):
            count = len(part)
            product = target if target.dtype == torch.float32 else wide[:count]
            product.copy_(to_half(part, bits[:count])).mul_(HALF_FACTOR * scaling_factor)
            if product is not target:
                target.copy_(product)
    return out


def has_nan(numbers: torch.Tensor) -> bool:
    """Whether any of the E4M3 numbers is NaN."""
    bits = numbers.view(torch.int8) & _MAGNITUDE_BITS
    return bool((bits == _MAGNITUDE_BITS).any())

"""Weights in FP8 E4M3 with one scaling factor a tensor, rounded exactly as NVIDIA ModelOpt rounds.

The two exports divide differently, and both ways are here: TensorRT-LLM's in float32, the unified Hugging
Face one in bf16. It knows single tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

E4M3_MAX = 448.0
"""Largest finite E4M3 value: a tensor's amax is mapped onto it."""
KV_SCALE_FLOOR = np.float32(1)
"""The TensorRT-LLM export never scales keys and values up: small ones are exact enough as they are."""
CHUNK_ELEMENTS = 4 << 20
"""Quantised at a time: float32 quotients of a whole matrix would take four times its FP8 bytes."""

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Divide = Callable[[Tensor, np.float32], Tensor]


def scaling_factor(amax: float) -> np.float32:
    """What a stored value is multiplied with: amax / 448 in float32."""
    return np.float32(amax) / np.float32(E4M3_MAX)


def kv_scaling_factor(amax: float) -> np.float32:
    """As `scaling_factor`, of keys or values in a TensorRT-LLM checkpoint."""
    return max(scaling_factor(amax), KV_SCALE_FLOOR)


def weight_amax(weight: Tensor) -> float:
    """Largest magnitude of a bf16 tensor, exact."""
    low, high = torch.aminmax(weight)
    return float(torch.maximum(low.abs(), high.abs()))


def merged_scale(weights: Sequence[Tensor]) -> np.float32:
    """One scaling factor for tensors that TensorRT-LLM multiplies as one: the largest."""
    return scaling_factor(max(map(weight_amax, weights)))


def divide_in_float32(weight: Tensor, scale: np.float32) -> Tensor:
    """bf16 / scale, as the TensorRT-LLM export: a scale of one element makes the quotient float32."""
    return weight / torch.tensor([scale])


def divide_in_bf16(weight: Tensor, scale: np.float32) -> Tensor:
    """bf16 / scale, as the unified export: a scale without dimensions leaves the quotient bf16."""
    return weight / torch.tensor(scale)


def quantize(weight: Tensor, scale: np.float32, divide: Divide = divide_in_float32) -> Bytes:
    """E4M3 bit patterns of weight / scale, rounded to nearest even, uint8 of the weight's shape.

    Args:
        weight: bf16 [rows, columns].
        scale: positive.
    """
    result = np.empty(tuple(weight.shape), dtype=np.uint8)
    stored = torch.from_numpy(result)
    step = max(1, CHUNK_ELEMENTS // weight.shape[1])
    for row in range(0, len(weight), step):
        quotient = divide(weight[row : row + step], scale)
        stored[row : row + step] = quotient.to(torch.float8_e4m3fn).view(torch.uint8)
    return result

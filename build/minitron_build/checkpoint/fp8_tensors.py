"""The tensors of an FP8 TensorRT-LLM checkpoint: which are FP8, and which scaling factors stand beside them.

Layout and numbers are those of NVIDIA ModelOpt's export_tensorrt_llm_checkpoint: q, k and v share the largest
scaling factor, gate and up too; scaling factors are of whole tensors, and every rank holds them. It knows
nothing of how files are written.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Mapping as MappingType
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from minitron_build.calibration.amax import KEY_SITE, VALUE_SITE, LayerAmax
from minitron_build.calibration.e4m3 import kv_scaling_factor, merged_scale, quantize, scaling_factor
from minitron_build.checkpoint.contract import KV_SCALE, KV_SCALE_PARTS
from minitron_build.checkpoint.convert import cut
from minitron_build.checkpoint.fp8_exclude import Excluded, fp8_kind
from minitron_build.checkpoint.planned_file import Layout, library_order
from minitron_build.checkpoint.weight_map import Mapping, RankTensor, rank_tensors, split_layer_name
from minitron_build.source.model_config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

WEIGHT_SCALE, INPUT_SCALE = "weights_scaling_factor", "activation_scaling_factor"
MERGED = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.dense": ("self_attn.o_proj",),
    "mlp.fc": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.gate": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.proj": ("mlp.down_proj",),
}
"""The HF layers whose largest scaling factor each linear layer gets."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes for a file: a part of a tensor, `offset_bytes` behind its first byte."""

    file: int
    name: str
    offset_bytes: int
    data: memoryview


@dataclass(frozen=True, slots=True)
class CopiedRows:
    """Rows [start, stop) of an HF tensor that fill a tensor of a file from its first byte, in bf16."""

    file: int
    name: str
    source: str
    rows: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Fp8Tensor:
    """A tensor of a rank, with what its name leaves out.

    Attributes:
        layer: the model's own layer number; None outside the decoder layers.
        kind: which of LINEARS it is, if it is stored in FP8.
    """

    tensor: RankTensor
    layer: int | None
    kind: str | None

    @property
    def module(self) -> str:
        """TensorRT-LLM's module, numbered as in its rank."""
        return self.tensor.name.removesuffix(".weight")

    @property
    def is_first_of_layer(self) -> bool:
        """Whether the layer's own scaling factors, those of keys and values, are told of here."""
        return self.tensor.name.endswith(".input_layernorm.weight")

    @property
    def layer_prefix(self) -> str:
        """TensorRT-LLM's decoder layer, numbered as in its rank."""
        return ".".join(self.tensor.name.split(".")[:3]) + "."


@dataclass(frozen=True, slots=True)
class TrtllmFp8:
    """What the rank files hold.

    Attributes:
        has_fp8_kv: keys and values are cached in FP8, so their scaling factors are there.
    """

    tensors: tuple[Fp8Tensor, ...]
    world_size: int
    has_fp8_kv: bool

    @classmethod
    def plan(cls, config: ModelConfig, mapping: Mapping, has_fp8_kv: bool, excluded: Excluded) -> TrtllmFp8:
        """Decide every tensor; see `rank_tensors` for what it raises."""
        tensors = (
            _fp8_tensor(tensor, excluded) for tensor in rank_tensors(config, mapping, shard_embedding=True)
        )
        return cls(tuple(tensors), mapping.world_size, has_fp8_kv)

    @property
    def metadata(self) -> None:
        """ModelOpt's rank files have none."""

    def layouts(self) -> tuple[Layout, ...]:
        """Of each rank file, in its order."""
        layouts: list[dict[str, tuple[str, tuple[int, ...]]]] = [{} for _ in range(self.world_size)]
        for tensor in self.tensors:
            layout = layouts[tensor.tensor.rank]
            layout[tensor.tensor.name] = ("F8_E4M3" if tensor.kind else "BF16", tensor.tensor.shape)
            layout.update(dict.fromkeys(self._scale_names(tensor), ("F32", (1,))))
        return tuple(library_order(layout) for layout in layouts)

    def _scale_names(self, tensor: Fp8Tensor) -> Iterator[str]:
        if tensor.kind:
            yield from (f"{tensor.module}.{scale}" for scale in (WEIGHT_SCALE, INPUT_SCALE))
        if self.has_fp8_kv and tensor.is_first_of_layer:
            yield from (tensor.layer_prefix + scale for scale in (KV_SCALE, *KV_SCALE_PARTS))

    def copies(self) -> Iterator[CopiedRows]:
        """What is outside the decoder layers, which is never quantised."""
        for tensor in self.tensors:
            if tensor.layer is None:
                part = tensor.tensor.parts[0]
                yield CopiedRows(tensor.tensor.rank, tensor.tensor.name, part.source, part.rows)

    def layer_pieces(self, layer: int, weights: MappingType[str, Tensor], amax: LayerAmax) -> Iterator[Piece]:
        """All bytes of a decoder layer, for every rank that holds it.

        Args:
            weights: bf16, by HF name within the layer.
        """
        tensors = [tensor for tensor in self.tensors if tensor.layer == layer]
        scales = {kind: _merged_scale(kind, weights) for kind in {tensor.kind for tensor in tensors} if kind}
        stored = _stored(tensors, weights, scales)
        for tensor in tensors:
            yield from _weight_pieces(tensor.tensor, stored)
            values = {} if tensor.kind is None else _linear_scales(tensor, scales[tensor.kind], amax)
            if self.has_fp8_kv and tensor.is_first_of_layer:
                values |= _kv_scales(tensor, amax)
            for name, value in values.items():
                yield Piece(tensor.tensor.rank, name, 0, np.array([value], np.float32).data)


def _fp8_tensor(tensor: RankTensor, excluded: Excluded) -> Fp8Tensor:
    return Fp8Tensor(tensor, split_layer_name(tensor.parts[0].source)[0], fp8_kind(tensor, excluded))


def _merged_scale(kind: str, weights: MappingType[str, Tensor]) -> np.float32:
    return merged_scale([weights[f"{linear}.weight"] for linear in MERGED[kind]])


def _stored(
    tensors: list[Fp8Tensor], weights: MappingType[str, Tensor], scales: MappingType[str, np.float32]
) -> dict[str, np.ndarray[Any, Any]]:
    """The layer's HF tensors as bit patterns: uint8 of FP8, quantised once and whole, or uint16 of bf16."""
    import torch

    stored: dict[str, np.ndarray[Any, Any]] = {}
    for tensor in tensors:
        for part in tensor.tensor.parts:
            _, name = split_layer_name(part.source)
            if name not in stored:
                is_fp8 = tensor.kind is not None
                stored[name] = (
                    quantize(weights[name], scales[tensor.kind or ""])
                    if is_fp8
                    else weights[name].view(torch.uint16).numpy()
                )
    return stored


def _weight_pieces(tensor: RankTensor, stored: MappingType[str, np.ndarray[Any, Any]]) -> Iterator[Piece]:
    """The rectangles that make a tensor, stacked by rows."""
    offset_bytes = 0
    for part in tensor.parts:
        data = cut(stored[split_layer_name(part.source)[1]], *part.rows, part.columns)
        yield Piece(tensor.rank, tensor.name, offset_bytes, data.data)
        offset_bytes += data.nbytes


def _linear_scales(tensor: Fp8Tensor, weight_scale: np.float32, amax: LayerAmax) -> dict[str, np.float32]:
    input_amax = amax.of_input(MERGED[tensor.kind or ""][0])
    return {
        f"{tensor.module}.{WEIGHT_SCALE}": weight_scale,
        f"{tensor.module}.{INPUT_SCALE}": scaling_factor(input_amax),
    }


def _kv_scales(tensor: Fp8Tensor, amax: LayerAmax) -> dict[str, np.float32]:
    parts = [kv_scaling_factor(amax.sites[site]) for site in (KEY_SITE, VALUE_SITE)]
    values = dict(zip((*KV_SCALE_PARTS, KV_SCALE), (*parts, max(parts)), strict=True))
    return {tensor.layer_prefix + name: value for name, value in values.items()}

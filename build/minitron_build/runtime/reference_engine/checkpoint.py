"""Reads the rank files of a TensorRT-LLM checkpoint, joined back into whole tensors.

It knows the layout (rank = pp_rank * tp_size + tp_rank, fused qkv per rank, duplicated KV heads, padded
vocabulary, layer numbers local to a pipeline rank, scaling factors beside FP8 weights) and nothing of how the
model is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from .config import STORED_DTYPES, CheckpointConfig, UnsupportedCheckpointError
from .fp8 import E4M3, Fp8Scales, has_nan
from .safetensors_file import SafetensorsError, SafetensorsFile

# Tables TensorRT-LLM may carry in a checkpoint; this engine computes its own from rotary_base.
ROPE_BUFFERS = frozenset({"embed_positions", "rotary_inv_freq", "embed_positions_for_gpt_attention"})
EMBEDDING = "transformer.vocab_embedding.weight"
NORMS = ("input_layernorm", "post_layernorm")
FINAL_NORM = "transformer.ln_f.weight"
LM_HEAD = "lm_head"
FP8_DTYPES = ("F8_E4M3", "I8")
SCALES = ("activation_scaling_factor", "weights_scaling_factor")
KV_SCALE = "attention.kv_cache_scaling_factor"
KV_SCALE_PARTS = ("attention.k_cache_scaling_factor", "attention.v_cache_scaling_factor")
KV_SCALE_RECIPROCAL = "attention.kv_cache_rcp_scaling_factor"


def layer_ranges(num_layers: int, pp_size: int) -> list[range]:
    """Which layers each pipeline rank holds: as `torch.tensor_split`, earlier ranks get the extra ones."""
    base, extra = divmod(num_layers, pp_size)
    starts = [rank * base + min(rank, extra) for rank in range(pp_size + 1)]
    return [range(starts[rank], starts[rank + 1]) for rank in range(pp_size)]


@dataclass(frozen=True, slots=True)
class _Need:
    """A tensor of a rank file: one of `dtypes` (the format's words), of exactly `shape`."""

    name: str
    dtypes: tuple[str, ...]
    shape: tuple[int, ...]

    def fits(self, file: SafetensorsFile) -> bool:
        return file.dtype(self.name) in self.dtypes and file.shape(self.name) == self.shape


@dataclass(frozen=True, slots=True, eq=False)
class StoredLinear:
    """A linear layer as stored: `weight` [outputs, inputs]; with `scales` it is E4M3, and never NaN."""

    weight: torch.Tensor
    scales: Fp8Scales | None = None

    def __post_init__(self) -> None:
        if (self.weight.dtype == E4M3) != (self.scales is not None):
            raise ValueError(f"a weight of {self.weight.dtype} {'with' if self.scales else 'without'} scales")


@dataclass(frozen=True, slots=True, eq=False)
class StoredLayer:
    """One decoder layer as stored, whole, named as TensorRT-LLM names its parts."""

    input_layernorm: torch.Tensor  # [hidden]
    qkv: StoredLinear  # [(heads + 2 * kv_heads) * head_size, hidden]: [q; k; v] of all heads
    dense: StoredLinear  # [hidden, heads * head_size]: HF's o_proj
    post_layernorm: torch.Tensor  # [hidden]
    fc: StoredLinear  # [intermediate, hidden]: HF's gate_proj, the one SiLU is applied to
    gate: StoredLinear  # [intermediate, hidden]: HF's up_proj
    proj: StoredLinear  # [hidden, intermediate]: HF's down_proj
    kv_cache_scale: float | None = None
    """Scaling factor of FP8 keys and values; None: they are kept in the compute dtype."""


class ModelSource(Protocol):
    """A model's weights, part by part; a tensor is good until `release`."""

    @property
    def config(self) -> CheckpointConfig:
        """What is computed."""

    def embedding(self) -> torch.Tensor:
        """The token embedding, [vocab_size, hidden_size]."""

    def layer(self, index: int) -> StoredLayer:
        """One decoder layer, counted over the whole model."""

    def final_norm(self) -> torch.Tensor:
        """The last RMSNorm's weight, [hidden_size]."""

    def lm_head(self) -> StoredLinear:
        """The output projection, [vocab_size, hidden_size]."""

    def release(self) -> None:
        """Let go of the memory behind tensors handed out so far."""


class CheckpointReader:
    """Whole tensors out of rank files, one at a time, so that memory holds little beside the result.

    Args:
        checkpoint_dir: a TensorRT-LLM checkpoint.
        config: its config, from `read_checkpoint_config`.

    Raises:
        UnsupportedCheckpointError: a rank file is missing or damaged, or a tensor is missing or extra.
    """

    def __init__(self, checkpoint_dir: Path, config: CheckpointConfig) -> None:
        self.config = config
        self._dir = checkpoint_dir
        self._ranks = [self._open(rank) for rank in range(config.tp_size * config.pp_size)]
        for rank, file in enumerate(self._ranks):
            self._check_tensors(rank, file)

    def _open(self, rank: int) -> SafetensorsFile:
        path = self._dir / f"rank{rank}.safetensors"
        if not path.is_file():
            world_size = self.config.tp_size * self.config.pp_size
            raise UnsupportedCheckpointError(
                f"{path}: no such file; the checkpoint's mapping has {world_size} ranks"
            )
        try:
            return SafetensorsFile(path)
        except SafetensorsError as error:
            raise UnsupportedCheckpointError(str(error)) from error

    def _check_tensors(self, rank: int, file: SafetensorsFile) -> None:
        needed = {need.name: need for need in self._needs(rank)}
        optional = {need.name: need for need in self._optional(rank)}
        missing = sorted(needed.keys() - file.names() - self._merged_kv_scales(file))
        extra = sorted(file.names() - needed.keys() - optional.keys() - ROPE_BUFFERS)
        if missing or extra:
            parts = [
                f"{what} {', '.join(names[:3])}{'…' if len(names) > 3 else ''}"
                for what, names in (("lacks", missing), ("has unknown", extra))
                if names
            ]
            raise UnsupportedCheckpointError(f"{file.path}: {'; '.join(parts)}; convert the checkpoint again")
        for need in (*needed.values(), *optional.values()):
            if need.name in file.names() and not need.fits(file):
                raise UnsupportedCheckpointError(
                    f"{file.path}: {need.name} is {file.dtype(need.name)} {list(file.shape(need.name))}; "
                    f"expected {need.dtypes[0]} {list(need.shape)}"
                )

    def _needs(self, rank: int) -> Iterator[_Need]:
        """Every tensor one rank file must hold."""
        config, pp_rank = self.config, rank // self.config.tp_size
        dtype = STORED_DTYPES[config.dtype]
        if pp_rank == 0:
            yield _Need(EMBEDDING, (dtype,), self._embedding_shape(self._padded_vocab_rows))
        for layer in range(len(layer_ranges(config.num_hidden_layers, config.pp_size)[pp_rank])):
            prefix = f"transformer.layers.{layer}."
            for name in NORMS:
                yield _Need(f"{prefix}{name}.weight", (dtype,), (config.hidden_size,))
            for name, shape in self._linear_shapes().items():
                yield from self._linear_needs(prefix + name, shape)
            if config.quantization.has_fp8_kv_cache:
                yield _Need(prefix + KV_SCALE, ("F32",), (1,))
        if pp_rank == config.pp_size - 1:
            yield _Need(FINAL_NORM, (dtype,), (config.hidden_size,))
            if not self._is_tied_head_left_out(rank):
                yield from self._linear_needs(LM_HEAD, (self._padded_vocab_rows, config.hidden_size))

    def _linear_needs(self, module: str, shape: tuple[int, ...]) -> Iterator[_Need]:
        if not self._is_fp8(module):
            yield _Need(f"{module}.weight", (STORED_DTYPES[self.config.dtype],), shape)
            return
        yield _Need(f"{module}.weight", FP8_DTYPES, shape)
        for scale in SCALES:
            yield _Need(f"{module}.{scale}", ("F32",), (1,))

    def _linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Shapes of a rank's part of each linear layer of a decoder layer."""
        config = self.config
        hidden, inner = config.hidden_size, config.intermediate_size // config.tp_size
        heads = config.num_attention_heads // config.tp_size
        return {
            "attention.qkv": ((heads + 2 * config.kv_heads_per_rank) * config.head_size, hidden),
            "attention.dense": (hidden, heads * config.head_size),
            "mlp.fc": (inner, hidden),
            "mlp.gate": (inner, hidden),
            "mlp.proj": (hidden, inner),
        }

    def _optional(self, rank: int) -> Iterator[_Need]:
        """Forms of the KV cache's scaling factor that TensorRT-LLM reads or makes itself."""
        if not self.config.quantization.has_fp8_kv_cache:
            return
        held = layer_ranges(self.config.num_hidden_layers, self.config.pp_size)[rank // self.config.tp_size]
        for layer in range(len(held)):
            for name in (*KV_SCALE_PARTS, KV_SCALE_RECIPROCAL):
                yield _Need(f"transformer.layers.{layer}.{name}", ("F32",), (1,))

    def _merged_kv_scales(self, file: SafetensorsFile) -> set[str]:
        """KV scaling factors that may be missing because one for keys and one for values stand there."""
        prefixes = {name.removesuffix(part) for part in KV_SCALE_PARTS for name in file.names()}
        return {
            prefix + KV_SCALE
            for prefix in prefixes
            if all(prefix + part in file.names() for part in KV_SCALE_PARTS)
        }

    @property
    def _padded_vocab_rows(self) -> int:
        return -(-self.config.vocab_size // self.config.tp_size)

    def _is_tied_head_left_out(self, rank: int) -> bool:
        return self.config.tie_word_embeddings and f"{LM_HEAD}.weight" not in self._ranks[rank].names()

    def _embedding_shape(self, padded_vocab_rows: int) -> tuple[int, int]:
        config = self.config
        if not config.use_parallel_embedding or config.tp_size == 1:
            return config.vocab_size, config.hidden_size
        if config.embedding_sharding_dim == 1:
            return config.vocab_size, config.hidden_size // config.tp_size
        return padded_vocab_rows, config.hidden_size

    def embedding(self) -> torch.Tensor:
        """The token embedding, [vocab_size, hidden_size]."""
        config = self.config
        if not config.use_parallel_embedding or config.tp_size == 1:
            return self._ranks[0].load(EMBEDDING)
        parts = [self._ranks[rank].load(EMBEDDING) for rank in range(config.tp_size)]
        return torch.cat(parts, dim=config.embedding_sharding_dim)[: config.vocab_size]

    def lm_head(self) -> StoredLinear:
        """The output projection, [vocab_size, hidden_size]; the embedding where the two are tied."""
        last = self.config.pp_size - 1
        if self._is_tied_head_left_out(self.config.tp_size * last):
            return StoredLinear(self.embedding())
        stored = self._linear(last, LM_HEAD, torch.cat)
        return StoredLinear(stored.weight[: self.config.vocab_size], stored.scales)

    def final_norm(self) -> torch.Tensor:
        """The last RMSNorm's weight, [hidden_size]."""
        return self._ranks[-1].load(FINAL_NORM)

    def stored_inverse_frequencies(self) -> torch.Tensor | None:
        """The RoPE frequencies [head_size / 2] the checkpoint carries, if it carries any."""
        name = "rotary_inv_freq"
        return self._ranks[0].load(name).reshape(-1) if name in self._ranks[0].names() else None

    def layer(self, index: int) -> StoredLayer:
        """One layer's tensors, whole; qkv is [q; k; v] of all heads.

        Raises:
            UnsupportedCheckpointError: a scaling factor that is not a positive number, differs between ranks
                or contradicts another; an FP8 weight with NaN; fc without gate in FP8, or the reverse.
        """
        ranges = layer_ranges(self.config.num_hidden_layers, self.config.pp_size)
        pp_rank = next(rank for rank, held in enumerate(ranges) if index in held)
        prefix = f"transformer.layers.{index - ranges[pp_rank].start}."
        first = self._ranks[pp_rank * self.config.tp_size]
        if self._is_fp8(f"{prefix}mlp.fc") != self._is_fp8(f"{prefix}mlp.gate"):
            raise UnsupportedCheckpointError(
                f"{first.path}: one of {prefix}mlp.fc and mlp.gate is FP8; expected both or neither, because "
                "TensorRT-LLM multiplies them as one; exclude both"
            )
        return StoredLayer(
            input_layernorm=first.load(f"{prefix}input_layernorm.weight"),
            qkv=self._linear(pp_rank, f"{prefix}attention.qkv", self._join_qkv),
            dense=self._linear(pp_rank, f"{prefix}attention.dense", _join_columns),
            post_layernorm=first.load(f"{prefix}post_layernorm.weight"),
            fc=self._linear(pp_rank, f"{prefix}mlp.fc", torch.cat),
            gate=self._linear(pp_rank, f"{prefix}mlp.gate", torch.cat),
            proj=self._linear(pp_rank, f"{prefix}mlp.proj", _join_columns),
            kv_cache_scale=self._kv_cache_scale(pp_rank, prefix),
        )

    def release(self) -> None:
        """Give the pages of the rank files back; views handed out before read them again when used."""
        for file in self._ranks:
            file.release()

    def _is_fp8(self, module: str) -> bool:
        return self.config.quantization.is_fp8(module)

    def _files(self, pp_rank: int) -> list[SafetensorsFile]:
        tp_size = self.config.tp_size
        return self._ranks[pp_rank * tp_size : (pp_rank + 1) * tp_size]

    def _linear(
        self, pp_rank: int, module: str, join: Callable[[list[torch.Tensor]], torch.Tensor]
    ) -> StoredLinear:
        files = self._files(pp_rank)
        parts = [file.load(f"{module}.weight") for file in files]
        if not self._is_fp8(module):
            return StoredLinear(parts[0] if len(parts) == 1 else join(parts))
        # Bytes, because torch joins no E4M3; a writer without the dtype called them int8 anyway.
        parts = [part.view(torch.int8) for part in parts]
        weight = (parts[0] if len(parts) == 1 else join(parts)).view(E4M3)
        if has_nan(weight):
            raise UnsupportedCheckpointError(
                f"{files[0].path}: {module}.weight holds NaN; calibrate the checkpoint again"
            )
        activation, weights = (self._scale(pp_rank, f"{module}.{name}") for name in SCALES)
        return StoredLinear(weight, Fp8Scales(activation, weights))

    def _kv_cache_scale(self, pp_rank: int, prefix: str) -> float | None:
        """TensorRT-LLM has one factor for keys and values: the larger, where two are stored."""
        if not self.config.quantization.has_fp8_kv_cache:
            return None
        path, names = self._files(pp_rank)[0].path, self._files(pp_rank)[0].names()
        parts = [self._scale(pp_rank, prefix + part) for part in KV_SCALE_PARTS if prefix + part in names]
        whole = self._scale(pp_rank, prefix + KV_SCALE) if prefix + KV_SCALE in names else max(parts)
        if len(parts) == len(KV_SCALE_PARTS) and max(parts) != whole:
            raise UnsupportedCheckpointError(
                f"{path}: {prefix}{KV_SCALE} is {whole:g}; expected {max(parts):g}, the larger of those of "
                "keys and values; calibrate the checkpoint again"
            )
        if prefix + KV_SCALE_RECIPROCAL in names:
            reciprocal = self._scale(pp_rank, prefix + KV_SCALE_RECIPROCAL)
            if not math.isclose(reciprocal * whole, 1.0, rel_tol=1e-6):
                raise UnsupportedCheckpointError(
                    f"{path}: {prefix}{KV_SCALE_RECIPROCAL} is {reciprocal:g}; expected {1 / whole:g}, "
                    f"1 / {KV_SCALE}; calibrate the checkpoint again"
                )
        return whole

    def _scale(self, pp_rank: int, name: str) -> float:
        """A scaling factor, which every tensor-parallel rank holds alike."""
        files = self._files(pp_rank)
        values = [float(file.load(name)) for file in files]
        if not math.isfinite(values[0]) or values[0] <= 0:
            raise UnsupportedCheckpointError(
                f"{files[0].path}: {name} is {values[0]:g}; expected a positive number; calibrate the "
                "checkpoint again"
            )
        other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            raise UnsupportedCheckpointError(
                f"{files[other].path}: {name} is {values[other]:g}; expected {values[0]:g}, as in "
                f"{files[0].path.name}; calibrate the checkpoint again"
            )
        return values[0]

    def _join_qkv(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Undo the fusion per rank, and take each duplicated KV head once."""
        config = self.config
        q_rows = config.num_attention_heads // config.tp_size * config.head_size
        kv_rows = config.kv_heads_per_rank * config.head_size
        split = [torch.split(part, [q_rows, kv_rows, kv_rows]) for part in parts]
        copies = max(config.tp_size // config.num_key_value_heads, 1)
        keys, values = ([part[which] for part in split[::copies]] for which in (1, 2))
        return torch.cat([*(part[0] for part in split), *keys, *values])


def _join_columns(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(parts, dim=1)

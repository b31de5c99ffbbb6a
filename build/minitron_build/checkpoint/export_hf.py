"""HF checkpoint -> unified HF FP8 checkpoint, which TensorRT-LLM's PyTorch backend and vLLM load.

Tensors are those of NVIDIA ModelOpt's export_hf_checkpoint: every projection keeps its own scaling factor,
quotients are rounded to bf16 before they are rounded to E4M3, and the scaling factors of keys and values are
not clamped. The calibration is the one of the TensorRT-LLM checkpoint. It knows Hugging Face's names only.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from collections.abc import Mapping as MappingType
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minitron_build import __version__
from minitron_build.calibration.amax import INPUT_OF, KEY_SITE, VALUE_SITE, Calibration, LayerAmax
from minitron_build.calibration.e4m3 import divide_in_bf16, quantize, scaling_factor, weight_amax
from minitron_build.calibration.samples import CalibrationSet
from minitron_build.checkpoint.fp8_exclude import resolve_exclusions
from minitron_build.checkpoint.fp8_folder import Fp8Choice, write_fp8_folder
from minitron_build.checkpoint.fp8_stream import Fp8Job, Progress
from minitron_build.checkpoint.fp8_tensors import CopiedRows, Piece
from minitron_build.checkpoint.planned_file import Layout, library_order
from minitron_build.checkpoint.trtllm_checkpoint import MODELOPT_VERSION, TrtllmCheckpoint
from minitron_build.checkpoint.weight_map import LAYER, Mapping, hf_tensors, split_layer_name
from minitron_build.checkpoint.work_folder import finished_checkpoint
from minitron_build.errors import CheckpointError
from minitron_build.source.hf_checkpoint import HfCheckpoint
from minitron_build.source.model_config import ModelConfig, read_json_object

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS_NAME = "model.safetensors"
ALWAYS_EXCLUDED = ("lm_head", "model.embed_tokens")
KV_SCALES = {"self_attn.k_proj.k_scale": KEY_SITE, "self_attn.v_proj.v_scale": VALUE_SITE}
ALL_FP8 = Fp8Choice()


@dataclass(frozen=True, slots=True)
class HfFp8:
    """What the weight file holds.

    Attributes:
        excluded: HF modules that stay bf16.
    """

    config: ModelConfig
    has_fp8_kv: bool
    excluded: frozenset[str]

    @property
    def metadata(self) -> MappingType[str, str]:
        """What transformers writes into every file of torch tensors, and demands when it reads."""
        return {"format": "pt"}

    def layouts(self) -> tuple[Layout, ...]:
        """Of the one file."""
        layout: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name, shape in hf_tensors(self.config).items():
            module = name.removesuffix(".weight")
            is_fp8 = self._is_fp8(module)
            layout[name] = ("F8_E4M3" if is_fp8 else "BF16", shape)
            if is_fp8:
                layout[f"{module}.weight_scale"] = layout[f"{module}.input_scale"] = ("F32", ())
        if self.has_fp8_kv:
            for layer in range(self.config.num_hidden_layers):
                layout.update({LAYER.format(layer) + name: ("F32", ()) for name in KV_SCALES})
        return (library_order(layout),)

    def copies(self) -> Iterator[CopiedRows]:
        """What is outside the decoder layers; a tied lm_head is not stored."""
        for name, shape in hf_tensors(self.config).items():
            if split_layer_name(name)[0] is None:
                yield CopiedRows(0, name, name, (0, shape[0]))

    def layer_pieces(self, layer: int, weights: MappingType[str, Tensor], amax: LayerAmax) -> Iterator[Piece]:
        """All bytes of a decoder layer."""
        import torch

        prefix = LAYER.format(layer)
        for name, weight in weights.items():
            module = name.removesuffix(".weight")
            if not self._is_fp8(prefix + module):
                yield Piece(0, prefix + name, 0, weight.view(torch.uint16).numpy().data)
                continue
            scale = scaling_factor(weight_amax(weight))
            yield Piece(0, prefix + name, 0, quantize(weight, scale, divide_in_bf16).data)
            yield _scalar(f"{prefix}{module}.weight_scale", scale)
            yield _scalar(f"{prefix}{module}.input_scale", scaling_factor(amax.of_input(module)))
        if self.has_fp8_kv:
            for name, site in KV_SCALES.items():
                yield _scalar(prefix + name, scaling_factor(amax.sites[site]))

    def _is_fp8(self, module: str) -> bool:
        return split_layer_name(module)[1] in INPUT_OF and module not in self.excluded


def _scalar(name: str, value: np.float32) -> Piece:
    return Piece(0, name, 0, np.array([value], np.float32).data)


def export_hf_checkpoint(
    hf_dir: Path,
    output_dir: Path,
    calibration: CalibrationSet | Calibration,
    *,
    choice: Fp8Choice = ALL_FP8,
    force: bool = False,
    progress: Progress | None = None,
) -> tuple[str, ...]:
    """Export; a finished one of the same plan is left as it is.

    Args:
        calibration: a set to calibrate with, or the record of an earlier calibration of the same weights.

    Returns:
        Names of the files written.

    Raises:
        As `convert_fp8_checkpoint`; also CheckpointError for a record of other weights.
    """
    source = HfCheckpoint.open(hf_dir)
    excluded = resolve_exclusions(source.config, Mapping(), choice.exclude).hf_modules
    job = _job(source, choice, excluded, calibration)
    if finished_checkpoint(job.digest, output_dir, force):
        print(f"{output_dir} holds this export already: nothing is written", file=sys.stderr)
    else:
        write_fp8_folder(job, output_dir, lambda: _texts(source, choice, excluded), progress)
    return tuple(sorted(TrtllmCheckpoint.load(output_dir).files))


def _job(
    source: HfCheckpoint,
    choice: Fp8Choice,
    excluded: tuple[str, ...],
    calibration: CalibrationSet | Calibration,
) -> Fp8Job:
    target = HfFp8(source.config, choice.has_fp8_kv, frozenset(excluded))

    def digest(said: str) -> str:
        identity = (__version__, "hf fp8", choice, said, source.identity())
        return hashlib.sha256(repr(identity).encode()).hexdigest()

    if isinstance(calibration, CalibrationSet):
        return Fp8Job(source, target, (WEIGHTS_NAME,), digest(calibration.digest), data=calibration)
    if len(calibration.layers) != source.config.num_hidden_layers:
        raise CheckpointError(
            f"a calibration of {len(calibration.layers)} layers",
            expected=f"{source.config.num_hidden_layers}, as the source has",
            where=str(source.path),
            todo="give the calibration of this source, or leave --calibration out",
        )
    return Fp8Job(source, target, (WEIGHTS_NAME,), digest(calibration.dump()), recorded=calibration)


def _texts(source: HfCheckpoint, choice: Fp8Choice, excluded: tuple[str, ...]) -> dict[str, str]:
    """config.json with its quantization_config, hf_quant_config.json, and the tokenizer's files."""
    names = [*ALWAYS_EXCLUDED, *excluded]
    producer = {"name": "modelopt", "version": MODELOPT_VERSION}
    quantization = {
        "quant_algo": "FP8",
        "kv_cache_quant_algo": "FP8" if choice.has_fp8_kv else None,
        "exclude_modules": names,
    }
    config = read_json_object(source.path / "config.json")
    config["quantization_config"] = _quantization_config(choice, names, producer)
    texts = {path.name: path.read_text(encoding="utf-8") for path in _side_files(source)}
    return {
        **texts,
        "config.json": json.dumps(config, indent=4),
        "hf_quant_config.json": json.dumps({"producer": producer, "quantization": quantization}, indent=4),
    }


def _side_files(source: HfCheckpoint) -> tuple[Path, ...]:
    """Tokenizer and generation config, as far as they are there."""
    if (source.path / "tokenizer.json").is_file():
        return source.tokenizer_files
    path = source.path / "generation_config.json"
    return (path,) if path.is_file() else ()


def _quantization_config(
    choice: Fp8Choice, ignored: list[str], producer: MappingType[str, str]
) -> dict[str, Any]:
    """`quantization_config`, key for key as ModelOpt converts its own."""
    fp8 = {"dynamic": False, "num_bits": 8, "type": "float"}
    return {
        "config_groups": {
            "group_0": {"input_activations": dict(fp8), "weights": dict(fp8), "targets": ["Linear"]}
        },
        "ignore": ignored,
        "quant_algo": "FP8",
        **({"kv_cache_scheme": dict(fp8)} if choice.has_fp8_kv else {}),
        "producer": producer,
        "quant_method": "modelopt",
    }

"""A Hugging Face checkpoint folder, checked before anything is done with it.

Every tensor that the model needs is there once, with its shape and dtype, and nothing else is; every shard
is whole. It reads headers only, never weights, and knows nothing of TensorRT-LLM.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from minitron_build.checkpoint.weight_map import hf_ignored, hf_tensors
from minitron_build.errors import CheckpointError
from minitron_build.source.model_config import ModelConfig, read_json_object
from minitron_build.source.safetensors_file import SafetensorsHeader, TensorInfo, read_header

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
TOKENIZER_NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
"""What the serving side takes from the folder; only tokenizer.json is indispensable."""

SAFETENSORS_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
FOREIGN_WEIGHTS = {
    "*.nemo": "a NeMo archive",
    "*.gguf": "a GGUF file",
    "pytorch_model*.bin": "PyTorch .bin weights",
    "consolidated*.pth": "Meta's own weights",
}


@dataclass(frozen=True, slots=True)
class HfCheckpoint:
    """A checked folder.

    Attributes:
        shards: headers of the weight files in index order, the order in which they are best read.
        tensors: name -> (shard, entry) of every tensor that the model needs.
    """

    path: Path
    config: ModelConfig
    shards: tuple[SafetensorsHeader, ...]
    tensors: dict[str, tuple[SafetensorsHeader, TensorInfo]]

    @classmethod
    def open(cls, hf_dir: Path) -> HfCheckpoint:
        """Check a folder and read its headers.

        Raises:
            CheckpointError: in one line, what is missing, extra, truncated or not implemented.
        """
        check_folder(hf_dir)
        config = ModelConfig.read(hf_dir)
        shards = tuple(read_header(hf_dir / name) for name in _shard_names(hf_dir))
        tensors = _collect(shards)
        _check_tensors(config, tensors, hf_dir)
        wanted = hf_tensors(config)
        return cls(hf_dir, config, shards, {name: tensors[name] for name in wanted})

    def identity(self) -> tuple[object, ...]:
        """Changes whenever weights or config could have: stands for their content until it is hashed."""
        shards = [
            (shard.path.name, shard.file_bytes, shard.path.stat().st_mtime_ns, shard.tensors)
            for shard in self.shards
        ]
        return tuple(shards), hashlib.sha256((self.path / "config.json").read_bytes()).hexdigest()

    @property
    def tokenizer_files(self) -> tuple[Path, ...]:
        """Files of the tokenizer that are there.

        Raises:
            CheckpointError: tokenizer.json is missing.
        """
        if not (self.path / "tokenizer.json").is_file():
            raise CheckpointError(
                "tokenizer.json is missing",
                where=str(self.path),
                todo="fetch it with the checkpoint (a slow tokenizer alone is not supported)",
            )
        return tuple(self.path / name for name in TOKENIZER_NAMES if (self.path / name).is_file())


def check_folder(hf_dir: Path) -> None:
    """Refuse what is no checkpoint folder at all, naming what it is.

    Raises:
        CheckpointError: a file, a folder of another format, or nothing.
    """
    if hf_dir.is_file():
        kinds = [what for pattern, what in FOREIGN_WEIGHTS.items() if hf_dir.match(pattern)]
        found = kinds[0] if kinds else "a file"
        raise CheckpointError(found, expected="a Hugging Face checkpoint folder", where=str(hf_dir))
    if not hf_dir.is_dir():
        raise CheckpointError(
            "no such folder", expected="a Hugging Face checkpoint folder", where=str(hf_dir)
        )
    if not (hf_dir / "config.json").exists():
        _refuse_foreign_weights(hf_dir, "config.json is missing")


def _refuse_foreign_weights(hf_dir: Path, found: str) -> None:
    """Refuse a folder without HF weights, naming what it holds instead."""
    others = [
        f"{path.name} ({what})" for pattern, what in FOREIGN_WEIGHTS.items() for path in hf_dir.glob(pattern)
    ]
    raise CheckpointError(
        f"{found}, but it holds {others[0]}" if others else found,
        expected=f"config.json with {SINGLE_NAME} or {INDEX_NAME}",
        where=str(hf_dir),
        todo="give the Hugging Face safetensors checkpoint",
    )


def _shard_names(hf_dir: Path) -> list[str]:
    """Weight files in index order, checked against the folder in both directions."""
    present = {path.name for path in hf_dir.glob("*.safetensors")}
    if (hf_dir / INDEX_NAME).exists():
        named = _read_index_map(hf_dir / INDEX_NAME)
        names = list(dict.fromkeys(sorted(named.values())))
        source = INDEX_NAME
    elif SINGLE_NAME in present:
        names, source = [SINGLE_NAME], SINGLE_NAME
    else:
        if present:
            raise CheckpointError(
                f"{INDEX_NAME} is missing", where=str(hf_dir), todo="fetch it with the shards"
            )
        _refuse_foreign_weights(hf_dir, "no safetensors weights")
        return []
    missing, extra = sorted(set(names) - present), sorted(present - set(names))
    if missing:
        raise CheckpointError(
            f"{', '.join(missing)} is missing", where=str(hf_dir), todo=f"{source} names it: fetch it"
        )
    if extra:
        raise CheckpointError(
            f"{', '.join(extra)} is not named by {source}",
            where=str(hf_dir),
            todo="remove it or fetch the right index",
        )
    return names


def _read_index_map(path: Path) -> dict[str, str]:
    """`weight_map` of an index: tensor name -> shard file name."""
    named = read_json_object(path).get("weight_map")
    if not isinstance(named, dict) or not named or any(not isinstance(name, str) for name in named.values()):
        raise CheckpointError("no weight_map", where=str(path), todo="fetch the file again")
    outside = [name for name in named.values() if Path(name).name != name]
    if outside:
        raise CheckpointError(f"a shard outside the folder: {outside[0]}", where=str(path))
    return named


def _collect(shards: tuple[SafetensorsHeader, ...]) -> dict[str, tuple[SafetensorsHeader, TensorInfo]]:
    tensors: dict[str, tuple[SafetensorsHeader, TensorInfo]] = {}
    for shard in shards:
        for tensor in shard.tensors:
            if tensor.name in tensors:
                other = tensors[tensor.name][0].path.name
                raise CheckpointError(f"{tensor.name} stands in {other} too", where=str(shard.path))
            tensors[tensor.name] = (shard, tensor)
    return tensors


def _check_tensors(
    config: ModelConfig, tensors: dict[str, tuple[SafetensorsHeader, TensorInfo]], hf_dir: Path
) -> None:
    """Every tensor exactly once, as the config says; then the index, which must tell the same story."""
    wanted = hf_tensors(config)
    missing = [name for name in wanted if name not in tensors]
    extra = sorted(tensors.keys() - wanted.keys() - hf_ignored(config))
    if missing or extra:
        raise CheckpointError(_missing_and_extra(missing, extra), where=str(hf_dir), todo=_extra_hint(extra))
    dtype = SAFETENSORS_DTYPES[config.dtype]
    for name, shape in wanted.items():
        shard, tensor = tensors[name]
        if tensor.shape != shape:
            raise CheckpointError(
                f"{name} has shape {list(tensor.shape)}",
                expected=f"{list(shape)} by config.json",
                where=str(shard.path),
            )
        if tensor.dtype != dtype:
            raise CheckpointError(
                f"{name} has dtype {tensor.dtype}",
                expected=f"{dtype} (torch_dtype {config.dtype} of config.json)",
                where=str(shard.path),
            )
    if (hf_dir / INDEX_NAME).exists():
        _check_index(_read_index_map(hf_dir / INDEX_NAME), tensors, hf_dir / INDEX_NAME)


def _check_index(
    named: dict[str, str], tensors: dict[str, tuple[SafetensorsHeader, TensorInfo]], path: Path
) -> None:
    placed = {name: shard.path.name for name, (shard, _) in tensors.items()}
    for name in sorted(named.keys() | placed.keys()):
        if named.get(name) != placed.get(name):
            raise CheckpointError(
                f"{name} is in {placed.get(name, 'no shard')}",
                expected=f"{named.get(name, 'no entry')} by the index",
                where=str(path),
            )


def _missing_and_extra(missing: list[str], extra: list[str]) -> str:
    """`2 tensors missing (a, b) and 1 extra (c)`, at most three names of each."""
    texts = []
    for names, what in ((missing, "missing"), (extra, "extra")):
        if names:
            shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
            texts.append(f"{len(names)} tensor{'s' if len(names) > 1 else ''} {what} ({shown})")
    return " and ".join(texts)


def _extra_hint(extra: list[str]) -> str:
    if any(name.endswith(".bias") for name in extra):
        return "biases are not implemented for this family"
    if any("scale" in name for name in extra):
        return "the weights are quantised already: give the checkpoint that this one was made from"
    return "config.json and the weights must be of one model"

"""`minitron inspect DIR`: what a checkpoint, an engine directory or a bundle is, verified.

It tells them apart by their files, lets the artefact's own module read it strictly, and explains it in a few
lines. It holds hashes, rank files and tensors against what was recorded and what TensorRT-LLM would demand;
it starts nothing and needs no GPU.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_build.bundle.manifest import MANIFEST_NAME, digest_file
from minitron_build.checkpoint.contract import CheckpointFacts, check_tensors
from minitron_build.checkpoint.trtllm_checkpoint import CONVERSION_NAME, TrtllmCheckpoint
from minitron_build.engine.engine_config import EngineConfig
from minitron_build.engine.engine_file import read_tensorrt_version
from minitron_build.engine.engine_record import RECORD_NAME, EngineRecord
from minitron_build.errors import CheckpointError
from minitron_build.planning.versions import check_tensorrt, check_tensorrt_llm
from minitron_build.source.model_config import read_json_object

BUNDLE_ENGINE = Path("model_repo/tensorrt_llm/1")


@dataclass(frozen=True, slots=True)
class Report:
    """What a folder is.

    Attributes:
        kind: checkpoint, engine or bundle.
        facts: its description, in the order it is shown.
        checks: what was verified, one sentence each.
        warnings: what is legal and worth knowing.
        parts: reports of what lies inside.
    """

    kind: str
    path: Path
    facts: Mapping[str, Any]
    checks: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    parts: tuple[Report, ...] = ()

    def lines(self) -> Iterator[str]:
        """For people."""
        yield f"{self.path}: {_TITLES[self.kind]}"
        width = max(map(len, self.facts), default=0)
        for name, value in self.facts.items():
            yield f"  {name:<{width}}  {value}"
        yield from (f"  ok: {check}" for check in self.checks)
        yield from (f"  warning: {warning}" for warning in self.warnings)
        for part in self.parts:
            yield from part.lines()

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "kind": self.kind,
            "path": str(self.path),
            "facts": dict(self.facts),
            "checks": list(self.checks),
            "warnings": list(self.warnings),
            "parts": [part.as_dict() for part in self.parts],
        }


_TITLES = {
    "bundle": "a bundle, deployable as it is",
    "checkpoint": "a TensorRT-LLM checkpoint",
    "engine": "a TensorRT-LLM engine directory",
}


def configure_parser(parser: argparse.ArgumentParser) -> None:
    """Flags of `minitron inspect`."""
    parser.add_argument("dir", type=Path, metavar="DIR", help="a checkpoint, an engine directory or a bundle")
    parser.add_argument("--json", action="store_true", help="the report as JSON on the last line too")
    parser.add_argument("--skip-hashes", action="store_true", help="compare sizes with the record only")


def run(args: argparse.Namespace) -> int:
    """Print the report; what is broken is raised in one line."""
    report = inspect(args.dir, skip_hashes=args.skip_hashes)
    print("\n".join(report.lines()))
    if args.json:
        print(json.dumps(report.as_dict()))
    return 0


def inspect(path: Path, *, skip_hashes: bool = False) -> Report:
    """Tell what a folder is and verify it.

    Raises:
        CheckpointError: it is none of ours, or it is broken; names the file and what it should have been.
        MachineError: an engine of another TensorRT-LLM or TensorRT than this toolkit's.
    """
    return _reader_of(path)(path, skip_hashes)


def _reader_of(path: Path) -> Callable[[Path, bool], Report]:
    if not path.is_dir():
        raise _unknown(path, "a file" if path.exists() else "no such folder")
    if (path / MANIFEST_NAME).is_file():
        return _inspect_bundle
    if not (path / "config.json").is_file():
        raise _unknown(path, f"neither {MANIFEST_NAME} nor config.json in it")
    config = read_json_object(path / "config.json", todo="fetch or copy the folder again, or build it again")
    if "pretrained_config" in config or "build_config" in config:
        return _inspect_engine
    if "architecture" in config:
        return _inspect_checkpoint
    if "architectures" in config:
        todo = f"convert it: minitron build --checkpoint {path}"
        raise _unknown(path, "a Hugging Face checkpoint", todo=todo)
    raise _unknown(path, "a config.json without architecture")


def _unknown(path: Path, found: str, todo: str = "") -> CheckpointError:
    expected = "a bundle, a TensorRT-LLM checkpoint or an engine directory"
    return CheckpointError(found, expected=expected, where=str(path), todo=todo)


def _inspect_checkpoint(path: Path, skip_hashes: bool) -> Report:
    facts = check_tensors(path)
    checks = [f"{facts.num_tensors} tensors: names, dtypes and shapes are what TensorRT-LLM's loader demands"]
    warnings = [f"TensorRT-LLM does not read {name}" for name in facts.unread]
    if (path / CONVERSION_NAME).is_file():
        record = TrtllmCheckpoint.load(path)
        checks.append(_check_conversion(record, skip_hashes))
    else:
        warnings.append(f"no {CONVERSION_NAME}: not made by this toolkit, so no hash to compare with")
    return Report("checkpoint", path, dict(_checkpoint_facts(facts)), tuple(checks), tuple(warnings))


def _check_conversion(record: TrtllmCheckpoint, skip_hashes: bool) -> str:
    """Files against `conversion.json`; sizes were compared when it was loaded."""
    if skip_hashes:
        return f"sizes of {len(record.files)} files"
    for name, digest in record.files.items():
        if digest_file(record.path / name) != digest:
            raise CheckpointError(
                "other bytes than when it was converted",
                expected=f"sha256 {digest.sha256}",
                where=str(record.path / name),
                todo="copy it again, or convert again with --force",
            )
    return f"sha256 of {len(record.files)} files"


def _checkpoint_facts(facts: CheckpointFacts) -> Iterator[tuple[str, Any]]:
    model = facts.model
    yield "model", f"{facts.architecture}, {model.num_parameters:,} parameters"
    heads = model.num_attention_heads
    yield "shape", _shape(model.num_hidden_layers, model.hidden_size, heads, model.head_dim)
    yield "kv_heads", model.num_key_value_heads
    yield "rope", _rope(model.rope_theta, model.rope_scaling)
    yield "precision", _precision(facts.dtype, facts.quant_algo, facts.kv_cache_quant_algo)
    if facts.exclude_modules:
        yield "exclude_modules", ", ".join(facts.exclude_modules)
    yield "logits_dtype", facts.logits_dtype
    yield "ranks", f"{facts.mapping.world_size} (tp {facts.mapping.tp_size} x pp {facts.mapping.pp_size})"
    yield "bytes", facts.weights_bytes


def _calibration(data: Mapping[str, Any]) -> str:
    lengths = (
        f"{data.get('num_samples')} samples of {data.get('min_tokens')} to {data.get('max_tokens')} tokens"
    )
    return f"{lengths} of {data.get('name')}"


def _rope(theta: float, scaling: Mapping[str, Any] | None) -> str:
    if scaling is None:
        return f"theta {theta:g}, no scaling"
    return f"theta {theta:g}, {scaling.get('rope_type', '?')} factor {scaling.get('factor', '?')}"


def _shape(layers: int, hidden_size: int, heads: int, head_size: int) -> str:
    return f"{layers} layers, hidden {hidden_size}, {heads} heads x {head_size}"


def _precision(dtype: str, quant_algo: str | None, kv_cache_quant_algo: str | None) -> str:
    return f"{quant_algo or dtype} weights, {kv_cache_quant_algo or dtype} KV cache"


def _inspect_engine(path: Path, skip_hashes: bool) -> Report:
    config = EngineConfig.read(path)
    check_tensorrt_llm(config.version, where=str(path / "config.json"))
    config.check_rank_files(path)
    for rank in range(config.world_size):
        rank_path = path / f"rank{rank}.engine"
        check_tensorrt(read_tensorrt_version(rank_path), where=str(rank_path))
    checks = [
        "config.json has what the C++ runtime reads",
        f"{config.world_size} rank file{'s' * (config.world_size > 1)} of TensorRT's plan format",
    ]
    if not (path / RECORD_NAME).is_file():
        warning = f"no {RECORD_NAME}: not built by this toolkit, so neither its SM nor its hashes are known"
        return Report("engine", path, dict(_engine_facts(config, path, None)), tuple(checks), (warning,))
    record = EngineRecord.load(path)
    if not skip_hashes:
        record.check_files(path)
    checks.append(f"{'sizes' if skip_hashes else 'sha256'} of {len(record.files)} files")
    return Report("engine", path, dict(_engine_facts(config, path, record)), tuple(checks))


def _engine_facts(config: EngineConfig, path: Path, record: EngineRecord | None) -> Iterator[tuple[str, Any]]:
    yield "tensorrt_llm", config.version
    yield "tensorrt", read_tensorrt_version(path / "rank0.engine")
    if record is not None:
        yield "built for", f"SM {record.sm}"
        yield "built on", record.gpu or "another machine"
    yield "model", config.architecture
    heads = config.num_attention_heads
    yield "shape", _shape(config.num_hidden_layers, config.hidden_size, heads, config.head_size)
    yield "precision", _precision(config.dtype, config.quant_algo, config.kv_cache_quant_algo)
    yield "logits_dtype", config.logits_dtype
    yield "ranks", f"{config.world_size} (tp {config.tp_size} x pp {config.pp_size})"
    for name in ("max_batch_size", "max_input_len", "max_seq_len", "max_num_tokens", "max_beam_width"):
        yield name, getattr(config, name)
    yield "kv_cache", f"{config.kv_cache_type}, {config.kv_cache_bytes_per_token} bytes a token"
    yield "paged_context_fmha", config.use_paged_context_fmha
    yield "bytes", sum(file.stat().st_size for file in path.glob("rank*"))


def _inspect_bundle(path: Path, skip_hashes: bool) -> Report:
    from minitron_build.bundle.agreement import check_plan
    from minitron_build.bundle.bundle import Bundle

    bundle = Bundle.load(path)
    (bundle.check_sizes if skip_hashes else bundle.check_files)()
    what = "sizes" if skip_hashes else "sha256"
    checks = (f"{what} of {len(bundle.manifest.files)} files, none missing, none extra", check_plan(bundle))
    # Every byte below was hashed just now.
    parts = [
        _reader_of(folder)(folder, True)
        for folder in (bundle.checkpoint, path / BUNDLE_ENGINE)
        if (folder / "config.json").is_file()
    ]
    return Report("bundle", path, dict(_bundle_facts(bundle.manifest)), checks, parts=tuple(parts))


def _bundle_facts(manifest: Any) -> Iterator[tuple[str, Any]]:
    plan, source = manifest.plan, manifest.source
    yield "target", manifest.arch + (f" (SM {plan['sm']})" if plan.get("sm") else "")
    revision = source.get("revision")
    yield "source", source.get("name", "?") + (f" at {revision}" if revision else "")
    for name in ("precision", "kv_cache_dtype", "tp_size", "pp_size", "engine_backend", "container"):
        if plan.get(name) is not None:
            yield name, plan[name]
    yield from plan.get("limits", {}).items()
    if manifest.calibration is not None:
        yield "calibration", _calibration(manifest.calibration)
    if manifest.verification is not None:
        yield "verification", "passed" if manifest.verification.get("passed") else "FAILED"
    yield "versions", ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    yield "bytes", sum(digest.size_bytes for digest in manifest.files.values())

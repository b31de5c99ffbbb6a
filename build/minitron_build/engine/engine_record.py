"""`engine.json`, our record beside TensorRT-LLM's files in an engine directory.

What the engine was built from, for which GPU and under which versions, and the digest of each of its files.
TensorRT-LLM opens `config.json` and `rank{N}.engine` by name and lists nothing, so the record does not
disturb it, and it travels with the engine. It knows nothing of how an engine is built.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron_build.bundle.manifest import digest_file
from minitron_build.checkpoint.trtllm_checkpoint import CONVERSION_NAME, FileDigest, TrtllmCheckpoint
from minitron_build.engine.engine_config import COPY_OR_BUILD
from minitron_build.errors import CheckpointError
from minitron_build.planning.trtllm_flags import with_paths
from minitron_build.source.model_config import read_json_object

if TYPE_CHECKING:
    from minitron_build.planning.plan import BuildPlan

RECORD_NAME = "engine.json"
RECORD_SCHEMA = 1


@dataclass(frozen=True, slots=True)
class EngineRecord:
    """Where an engine comes from.

    Attributes:
        plan_digest: of checkpoint, command line, SM and versions; equal digests mean equal engines.
        sm: compute capability x 10 it was built for.
        gpu: name of the GPU it was built on; None when it was built elsewhere and brought here.
        versions: tensorrt_llm, tensorrt and, where the machine that built it told them, cuda and driver.
        container: image it was built in, None for a build on the machine itself.
        argv: the command line, with `checkpoint` and `engine` for the folders.
        files: digest of every other file of the engine directory.
    """

    plan_digest: str
    sm: int
    gpu: str | None
    versions: Mapping[str, str]
    container: str | None
    argv: tuple[str, ...]
    files: Mapping[str, FileDigest]

    def dump(self) -> str:
        """The text of `engine.json`."""
        record = {
            "schema": RECORD_SCHEMA,
            "plan_digest": self.plan_digest,
            "sm": self.sm,
            "gpu": self.gpu,
            "versions": dict(self.versions),
            "container": self.container,
            "argv": list(self.argv),
            "files": {name: digest.as_dict() for name, digest in sorted(self.files.items())},
        }
        return json.dumps(record, indent=2) + "\n"

    @classmethod
    def load(cls, engine_dir: Path) -> EngineRecord:
        """Read an engine directory's record; its files must be there with their sizes.

        Raises:
            CheckpointError: none, not readable, of another schema, or a file is missing or has another size.
        """
        path = engine_dir / RECORD_NAME
        raw = read_json_object(path, todo=COPY_OR_BUILD)
        if raw.get("schema") != RECORD_SCHEMA:
            raise CheckpointError(
                f"schema {raw.get('schema')!r}",
                expected=str(RECORD_SCHEMA),
                where=str(path),
                todo="build the engine again with this version of the toolkit",
            )
        try:
            record = cls(**_fields(raw))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"a record that cannot be read ({error})", where=str(path), todo=COPY_OR_BUILD
            ) from None
        record._check_sizes(engine_dir)
        return record

    def check_files(self, engine_dir: Path) -> None:
        """Compare every file with its digest.

        Raises:
            CheckpointError: names the first file that is missing or changed.
        """
        self._check_sizes(engine_dir)
        for name, digest in self.files.items():
            if digest_file(engine_dir / name) != digest:
                raise _changed(engine_dir / name, "other bytes than when it was built", "its recorded sha256")

    def _check_sizes(self, engine_dir: Path) -> None:
        for name, digest in self.files.items():
            path = engine_dir / name
            found = path.stat().st_size if path.is_file() else None
            if found != digest.size_bytes:
                what = "missing" if found is None else f"{found} bytes"
                raise _changed(path, what, f"{digest.size_bytes} bytes")


def _changed(path: Path, found: str, expected: str) -> CheckpointError:
    return CheckpointError(found, expected=expected, where=str(path), todo=COPY_OR_BUILD)


def plan_digest(plan: BuildPlan, checkpoint_dir: Path) -> str:
    """What decides an engine: the checkpoint's bytes, the command line, the SM and the pinned versions."""
    identity = {
        "checkpoint": {name: digest.sha256 for name, digest in sorted(_checkpoint_files(checkpoint_dir))},
        "argv": list(portable_argv(plan)),
        "sm": plan.sm,
        "versions": {name: plan.versions[name] for name in ("tensorrt_llm", "tensorrt")},
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def portable_argv(plan: BuildPlan) -> tuple[str, ...]:
    """The plan's command line with folder names that mean the same on every machine."""
    return with_paths(plan.trtllm_build_argv, "checkpoint", "engine")


def digest_engine(engine_dir: Path) -> dict[str, FileDigest]:
    """Digest of every file of an engine directory but the record."""
    paths = sorted(path for path in engine_dir.iterdir() if path.is_file() and path.name != RECORD_NAME)
    return {path.name: digest_file(path) for path in paths}


def _checkpoint_files(checkpoint_dir: Path) -> list[tuple[str, FileDigest]]:
    """Digests as the conversion took them; a checkpoint made elsewhere is read now."""
    if (checkpoint_dir / CONVERSION_NAME).is_file():
        return list(TrtllmCheckpoint.load(checkpoint_dir).files.items())
    paths = [checkpoint_dir / "config.json", *checkpoint_dir.glob("rank*.safetensors")]
    return [(path.name, digest_file(path)) for path in paths]


def _fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "plan_digest": str(raw["plan_digest"]),
        "sm": int(raw["sm"]),
        "gpu": raw["gpu"],
        "versions": {str(name): str(version) for name, version in raw["versions"].items()},
        "container": raw["container"],
        "argv": tuple(str(word) for word in raw["argv"]),
        "files": {name: FileDigest.from_dict(entry) for name, entry in raw["files"].items()},
    }

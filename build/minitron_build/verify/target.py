"""What is verified, and what it is held against: a bundle or a checkpoint, and the source behind it.

It knows what bundles and checkpoints record of their source, and refuses where that is not enough.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_build.bundle.bundle import CHECKPOINT_DIR, Bundle
from minitron_build.bundle.manifest import MANIFEST_NAME, digest_file
from minitron_build.checkpoint.trtllm_checkpoint import CONVERSION_NAME, FileDigest, TrtllmCheckpoint
from minitron_build.errors import CheckpointError, MachineError, RefusedError
from minitron_build.source.hub import DEMO, HUB_ID, resolve_checkpoint
from minitron_build.source.model_config import read_json_object

HASHED_BYTES = 256 << 20
"""Of the recorded source files, those up to this size are hashed; of larger ones the size is compared."""
GIVE_SOURCE = "give the Hugging Face checkpoint it was made from: --against DIR|HF_ID|demo"


@dataclass(frozen=True, slots=True)
class Target:
    """A bundle or a checkpoint on disk.

    Attributes:
        checkpoint_dir: None where a bundle holds an engine only.
        tokenizer_dir: None where only the source has one.
        source_name: what the bundle says it was made from.
        sources: digest of each source file it was made from, by name; empty where nothing is recorded.
        files: digest of each file of the checkpoint as it was written, by name; empty likewise.
        limits: of the engine; empty for a checkpoint.
    """

    path: Path
    checkpoint_dir: Path | None
    tokenizer_dir: Path | None = None
    source_name: str | None = None
    revision: str | None = None
    sources: Mapping[str, FileDigest] | None = None
    files: Mapping[str, FileDigest] | None = None
    limits: Mapping[str, Any] | None = None

    @classmethod
    def open(cls, path: Path) -> Target:
        """Tell a bundle from a checkpoint.

        Raises:
            CheckpointError: neither of them, or a record that cannot be read.
        """
        if (path / MANIFEST_NAME).is_file():
            return _bundle_target(path)
        if not (path / "config.json").is_file():
            raise CheckpointError(
                f"neither {MANIFEST_NAME} nor config.json in it" if path.is_dir() else "no such folder",
                expected="a bundle or a TensorRT-LLM checkpoint",
                where=str(path),
            )
        config = read_json_object(path / "config.json")
        if "architecture" not in config:
            what = "an engine directory" if "pretrained_config" in config else "a Hugging Face checkpoint"
            raise CheckpointError(what, expected="a bundle or a TensorRT-LLM checkpoint", where=str(path))
        record = TrtllmCheckpoint.load(path) if (path / CONVERSION_NAME).is_file() else None
        if record is None:
            return cls(path, path)
        return cls(path, path, sources=record.sources, files=record.files)

    def needed_checkpoint(self) -> Path:
        """The checkpoint that the reference engine executes.

        Raises:
            CheckpointError: the bundle holds none.
        """
        if self.checkpoint_dir is None:
            raise CheckpointError(
                "holds an engine and no checkpoint, which only a GPU of its kind can run",
                where=str(self.path),
                todo="build with --keep-checkpoint, name the checkpoint folder instead, or serve the bundle "
                "and give --url HOST:PORT --against DIR",
            )
        return self.checkpoint_dir

    def resolve_source(self, against: str | None) -> Path:
        """The folder of the source.

        Args:
            against: what the user gave, if anything.

        Raises:
            RefusedError: nothing was given, and what is recorded cannot be found on this machine.
        """
        if against is not None:
            return _given_source(against)
        if self.source_name == DEMO:
            return resolve_checkpoint(DEMO).hf_dir
        if self.source_name is not None and HUB_ID.fullmatch(self.source_name):
            return self._hub_source(self.source_name)
        recorded = f"only the name of its source is known ({self.source_name})"
        raise RefusedError(
            recorded if self.source_name else "does not say where its source is",
            where=str(self.path),
            todo=f"{GIVE_SOURCE}; or --skip-source for the checks that need none",
        )

    def _hub_source(self, repo: str) -> Path:
        try:
            return resolve_checkpoint(repo, self.revision).hf_dir
        except MachineError as error:
            raise RefusedError(
                f"its source {repo}: {error.found}", where=str(self.path), todo=GIVE_SOURCE
            ) from None

    def changes(self) -> list[str]:
        """How the checkpoint's files differ from what was recorded when they were written, one sentence each.

        They are read whole, as what is verified is.
        """
        if self.checkpoint_dir is None:
            return []
        return [
            f"{name}: {what}"
            for name, digest in (self.files or {}).items()
            if (what := _difference(self.checkpoint_dir / name, digest, hashed_bytes=digest.size_bytes))
        ]

    def differences(self, source_dir: Path) -> list[str]:
        """How a source differs from the recorded one, one sentence a file."""
        return [
            f"{name}: {what}"
            for name, digest in (self.sources or {}).items()
            if (what := _difference(source_dir / name, digest))
        ]


def _given_source(against: str) -> Path:
    try:
        return resolve_checkpoint(against).hf_dir
    except CheckpointError as error:  # it speaks of the flag of `minitron build`
        where = error.where.replace("--checkpoint", "--against", 1)
        raise CheckpointError(error.found, expected=error.expected, where=where, todo=error.todo) from None


def _bundle_target(path: Path) -> Target:
    bundle = Bundle.load(path)
    manifest = bundle.manifest
    tokenizer_dir = bundle.model_repo / "preprocessing" / "1"
    return Target(
        path,
        bundle.checkpoint if (bundle.checkpoint / "config.json").is_file() else None,
        tokenizer_dir if (tokenizer_dir / "tokenizer.json").is_file() else None,
        manifest.source.get("name"),
        manifest.source.get("revision"),
        {name: FileDigest.from_dict(raw) for name, raw in manifest.source["files"].items()},
        _checkpoint_files(manifest.files),
        manifest.plan.get("limits"),
    )


def _checkpoint_files(files: Mapping[str, FileDigest]) -> dict[str, FileDigest]:
    """Those of a bundle's files that are its checkpoint's, by their names there."""
    prefix = f"{CHECKPOINT_DIR}/"
    return {name.removeprefix(prefix): digest for name, digest in files.items() if name.startswith(prefix)}


def _difference(path: Path, digest: FileDigest, *, hashed_bytes: int = HASHED_BYTES) -> str:
    if not path.is_file():
        return "missing"
    size_bytes = path.stat().st_size
    if size_bytes != digest.size_bytes:
        return f"{size_bytes} bytes, not {digest.size_bytes}"
    if size_bytes <= hashed_bytes and digest_file(path) != digest:
        return "other bytes"
    return ""

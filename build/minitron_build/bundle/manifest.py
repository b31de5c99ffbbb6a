"""`manifest.json`: what a bundle is, made from what, by what, and the digest of each of its files.

Versioned by schema. It knows the record, not how a bundle is built or served.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_build.checkpoint.trtllm_checkpoint import FileDigest
from minitron_build.errors import CheckpointError
from minitron_build.source.model_config import read_json_object

MANIFEST_NAME = "manifest.json"
MANIFEST_SCHEMA = 1
HASH_CHUNK_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Manifest:
    """The record of a bundle.

    Attributes:
        source: name, hub revision, config digest and digest of every source file.
        plan: the build plan with the reason of each decision.
        versions: of everything that touched the bytes.
        gpu: name and SM of the GPU the engine was built on; None for the CPU.
        calibration: digests, count and lengths of the samples that FP8 was calibrated with; None for bf16.
        verification: the gate's verdict on the FP8 checkpoint; None where none was asked for.
        files: digest of every file of the bundle but the manifest itself, by path in the bundle.
    """

    arch: str
    source: Mapping[str, Any]
    plan: Mapping[str, Any]
    versions: Mapping[str, str]
    files: Mapping[str, FileDigest]
    gpu: Mapping[str, Any] | None = None
    calibration: Mapping[str, Any] | None = None
    verification: Mapping[str, Any] | None = None

    def dump(self) -> str:
        """The text of `manifest.json`."""
        record = {
            "schema": MANIFEST_SCHEMA,
            "arch": self.arch,
            "source": self.source,
            "plan": self.plan,
            "versions": self.versions,
            "gpu": self.gpu,
            "calibration": self.calibration,
            "verification": self.verification,
            "files": {name: digest.as_dict() for name, digest in sorted(self.files.items())},
        }
        return json.dumps(record, indent=2) + "\n"

    @classmethod
    def load(cls, bundle_dir: Path) -> Manifest:
        """Read a bundle's manifest.

        Raises:
            CheckpointError: none, not readable, or of another schema.
        """
        path = bundle_dir / MANIFEST_NAME
        if not path.is_file():
            raise CheckpointError(
                f"{MANIFEST_NAME} is missing",
                expected="a finished bundle",
                where=str(bundle_dir),
                todo="run the build command again: it resumes",
            )
        raw = read_json_object(path, todo="copy the bundle again, or build it again")
        if raw.get("schema") != MANIFEST_SCHEMA:
            raise CheckpointError(
                f"schema {raw.get('schema')!r}",
                expected=str(MANIFEST_SCHEMA),
                where=str(path),
                todo="serve it with the toolkit that built it, or build again",
            )
        try:
            files = {name: FileDigest.from_dict(entry) for name, entry in raw["files"].items()}
            return cls(
                arch=str(raw["arch"]),
                source=raw["source"],
                plan=raw["plan"],
                versions=raw["versions"],
                files=files,
                gpu=raw["gpu"],
                calibration=raw.get("calibration"),
                verification=raw.get("verification"),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"a record that cannot be read ({error})",
                where=str(path),
                todo="copy the bundle again, or build it again",
            ) from None


def digest_file(path: Path) -> FileDigest:
    """sha256 and size of a file, read in chunks."""
    digest, size_bytes = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
            size_bytes += len(chunk)
    return FileDigest(digest.hexdigest(), size_bytes)

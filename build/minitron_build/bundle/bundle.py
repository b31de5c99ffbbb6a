"""The bundle: a folder that Triton serves as it is, bound to its manifest.

Writes the parts of a bundle in order (checkpoint, model_repo, manifest last: without it nothing is a bundle)
and reads one back, with every file's digest. Paths inside are relative, so a bundle can be moved. It knows
nothing of Triton's process.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_build import __version__
from minitron_build.bundle.manifest import MANIFEST_NAME, Manifest, digest_file
from minitron_build.calibration.amax import CALIBRATION_NAME, Calibration
from minitron_build.checkpoint.fp8_stage import read_verification
from minitron_build.checkpoint.trtllm_checkpoint import FileDigest, TrtllmCheckpoint
from minitron_build.checkpoint.work_folder import write_durably
from minitron_build.engine.engine_record import EngineRecord
from minitron_build.errors import CheckpointError
from minitron_build.planning.plan import BuildPlan
from minitron_build.repository.model_repo import ENGINE_MODEL, write_model_repo
from minitron_build.source.hf_checkpoint import HfCheckpoint
from minitron_build.source.hub import Source

CHECKPOINT_DIR, ENGINE_DIR, MODEL_REPO_DIR = "checkpoint", "engine", "model_repo"
OWN_NAMES = {MANIFEST_NAME, CHECKPOINT_DIR, ENGINE_DIR, MODEL_REPO_DIR}
RECORDED_PACKAGES = ("torch", "tokenizers", "numpy", "nvidia-pytriton", "tritonclient")


@dataclass(frozen=True, slots=True)
class Bundle:
    """A finished bundle on disk."""

    path: Path
    manifest: Manifest

    @property
    def model_repo(self) -> Path:
        """What `tritonserver --model-repository` takes."""
        return self.path / MODEL_REPO_DIR

    @property
    def checkpoint(self) -> Path:
        """The TensorRT-LLM checkpoint that the reference engine executes."""
        return self.path / CHECKPOINT_DIR

    @classmethod
    def load(cls, path: Path) -> Bundle:
        """Read a bundle's manifest.

        Raises:
            CheckpointError: not a finished bundle.
        """
        if not path.is_dir():
            raise CheckpointError("no such folder", expected="a bundle", where=str(path))
        return cls(path, Manifest.load(path))

    def check_files(self) -> None:
        """Compare every file with the manifest: first names and sizes, then digests, on all cores.

        Raises:
            CheckpointError: names the first file that is missing, extra, a link or changed.
        """
        self.check_sizes()
        wanted = self.manifest.files
        with ThreadPoolExecutor() as pool:
            for name, digest in zip(
                wanted, pool.map(lambda name: digest_file(self.path / name), wanted), strict=True
            ):
                if digest != wanted[name]:
                    raise self._changed(name, "other bytes than when it was built")

    def check_sizes(self) -> None:
        """Compare names and sizes with the manifest; what they lead to outside the bundle is not the bundle.

        Raises:
            CheckpointError: as `check_files`.
        """
        link = next(_links_of(self.path), None)
        if link is not None:
            target = f"a link to {(self.path / link).readlink()}"
            raise self._changed(link, target, "copy it with what its links lead to: cp -rL, rsync -L")
        wanted, found = self.manifest.files, set(_files_of(self.path))
        for name in sorted(wanted.keys() | found):
            if name not in found:
                raise self._changed(name, "missing")
            if name not in wanted:
                raise self._changed(name, "not in the manifest")
            if (self.path / name).stat().st_size != wanted[name].size_bytes:
                raise self._changed(
                    name, f"{(self.path / name).stat().st_size} bytes, not {wanted[name].size_bytes}"
                )

    def _changed(self, name: str, what: str, todo: str = "copy or build it again") -> CheckpointError:
        return CheckpointError(
            f"{name}: {what}",
            expected="the bundle as it was built",
            where=str(self.path),
            todo=todo,
        )


def bundle_names(root: Path) -> tuple[str, ...]:
    """Names of the folders in a shared root that are bundles, finished or not."""
    return tuple(
        sorted(
            path.name
            for path in root.glob("*")
            if path.is_dir() and any((path / name).exists() for name in OWN_NAMES)
        )
    )


def check_output_dir(output_dir: Path) -> None:
    """Refuse to build into a folder that holds somebody else's things, other bundles among them.

    A root that several bundles share is a folder of bundles: each is built into a folder of its own in it.

    Raises:
        CheckpointError: a file, a folder with names that no build makes, or one inside a bundle.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise CheckpointError("a file", expected="a folder for the bundle", where=str(output_dir))
    check_not_in_bundle(output_dir)
    names = {path.name.removesuffix(".partial").removesuffix(".old") for path in output_dir.glob("*")}
    foreign = sorted(names - OWN_NAMES)
    bundles = [name for name in bundle_names(output_dir) if name in foreign]
    if bundles:
        raise CheckpointError(
            f"a folder of bundles ({', '.join(bundles)})",
            expected="a folder for one bundle",
            where=str(output_dir),
            todo=f"name it inside: --output-dir {output_dir}/NAME",
        )
    if foreign:
        raise CheckpointError(
            f"holds {foreign[0]}, which no build makes",
            expected="a new folder or an unfinished bundle",
            where=str(output_dir),
            todo="give another --output-dir",
        )


def check_not_in_bundle(output_dir: Path) -> None:
    """A bundle's manifest lists every file below it: nothing may be built there.

    Raises:
        CheckpointError: `output_dir` is inside a bundle.
    """
    for parent in output_dir.absolute().parents:
        if (parent / MANIFEST_NAME).is_file() and (parent / MODEL_REPO_DIR).is_dir():
            raise CheckpointError(
                f"inside the bundle {parent}",
                expected="a folder of its own",
                where=str(output_dir),
                todo=f"give another --output-dir, such as {parent.parent / output_dir.name}",
            )


def write_bundle(
    plan: BuildPlan,
    source: Source,
    checkpoint: TrtllmCheckpoint,
    output_dir: Path,
    *,
    keep_checkpoint: bool = False,
) -> Bundle:
    """Write model_repo and manifest beside the finished stages; the manifest last, and durably.

    The engine's files move into model_repo; a GPU does not need the checkpoint, which goes unless kept.
    """
    hf = HfCheckpoint.open(source.hf_dir)
    engine_dir = output_dir / ENGINE_DIR if plan.sm is not None else None
    (output_dir / MANIFEST_NAME).unlink(missing_ok=True)
    work_dir = output_dir / (MODEL_REPO_DIR + ".partial")
    for stale in (work_dir, output_dir / MODEL_REPO_DIR):
        shutil.rmtree(stale, ignore_errors=True)
    write_model_repo(plan, hf, work_dir, engine_dir)
    work_dir.rename(output_dir / MODEL_REPO_DIR)
    record = EngineRecord.load(engine_dir) if engine_dir else None
    left_out = {ENGINE_DIR} if keep_checkpoint or plan.sm is None else {ENGINE_DIR, CHECKPOINT_DIR}
    manifest = Manifest(
        arch=plan.arch,
        source=_source_record(source, hf, checkpoint),
        plan=plan.as_dict(),
        versions=dict(_versions(record)),
        gpu=None if record is None else {"name": record.gpu, "sm": record.sm},
        files=_digests(output_dir, checkpoint, record, left_out),
        calibration=_calibration_record(checkpoint.path),
        verification=read_verification(checkpoint.path),
    )
    write_durably(output_dir / MANIFEST_NAME, manifest.dump())
    for name in left_out:
        shutil.rmtree(output_dir / name, ignore_errors=True)
    return Bundle(output_dir, manifest)


def _files_of(path: Path) -> Iterator[str]:
    """Files of a bundle by their path in it, but the manifest and what Python leaves when models run."""
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path)
        if file.is_file() and name.name != MANIFEST_NAME and "__pycache__" not in name.parts:
            yield name.as_posix()


def _links_of(path: Path) -> Iterator[str]:
    """Symbolic links in a bundle by their path in it; what a link leads to is not looked at."""
    for folder, folders, files in os.walk(path):
        for name in sorted((*folders, *files)):
            if os.path.islink(os.path.join(folder, name)):
                yield (Path(folder) / name).relative_to(path).as_posix()


def _digests(
    output_dir: Path, checkpoint: TrtllmCheckpoint, record: EngineRecord | None, left_out: set[str]
) -> dict[str, FileDigest]:
    """Digest of every file that stays; those of checkpoint and engine were taken while they were written."""
    known = {f"{CHECKPOINT_DIR}/{name}": digest for name, digest in checkpoint.files.items()}
    if record is not None:
        engine_path = f"{MODEL_REPO_DIR}/{ENGINE_MODEL}/1"
        known |= {f"{engine_path}/{name}": digest for name, digest in record.files.items()}
    names = (name for name in _files_of(output_dir) if name.split("/")[0] not in left_out)
    return {name: known.get(name) or digest_file(output_dir / name) for name in names}


def _source_record(source: Source, hf: HfCheckpoint, checkpoint: TrtllmCheckpoint) -> dict[str, object]:
    files = {path.name: digest_file(path) for path in hf.tokenizer_files} | dict(checkpoint.sources)
    return {
        "name": source.name,
        "revision": source.revision,
        "config_sha256": checkpoint.sources["config.json"].sha256,
        "files": {name: digest.as_dict() for name, digest in sorted(files.items())},
    }


def _calibration_record(checkpoint_dir: Path) -> Mapping[str, Any] | None:
    path = checkpoint_dir / CALIBRATION_NAME
    return Calibration.read(path).data if path.is_file() else None


def _versions(record: EngineRecord | None) -> Iterator[tuple[str, str]]:
    """Of everything that touched the bytes, those of the engine as they were when it was built."""
    from importlib.metadata import PackageNotFoundError, version

    yield "toolkit", __version__
    if record is not None:
        yield from record.versions.items()
    yield "python", platform.python_version()
    for package in RECORDED_PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue  # not installed here, so it touched nothing

"""Where a `--checkpoint` comes from: a folder, the demo model, or the Hugging Face hub.

Downloads weights and tokenizer only (the hub's repository of this model also holds a 9 GB .nemo), at one
commit, resumably, into the hub's own cache. It knows nothing of what the files contain.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from minitron_build.errors import CheckpointError, MachineError

DEFAULT_CHECKPOINT = "nvidia/Llama-3.1-Minitron-4B-Width-Base"
DEMO = "demo"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
PATTERNS = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
"""Matched against the path inside the repository, so nothing in a subfolder is taken."""
CONFIG_PATTERNS = ("config.json", "generation_config.json")
"""What a plan needs."""


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint folder on this disk.

    Attributes:
        name: what the user called it; the hub id, the folder's name or `demo`.
        revision: commit on the hub; None for a folder.
    """

    name: str
    hf_dir: Path
    revision: str | None = None


def resolve_checkpoint(checkpoint: str, revision: str | None = None) -> Source:
    """The folder that `--checkpoint` means, downloaded first if it is a hub id.

    Raises:
        CheckpointError: neither a folder nor a hub id, or the hub has no such repository or revision.
        MachineError: the hub cannot be reached and the cache does not hold it.
    """
    if revision and checkpoint == DEMO:
        raise CheckpointError(f"--revision {revision} for the demo model", todo="leave it out")
    if checkpoint == DEMO:
        return Source(DEMO, Path(__file__).parents[1] / "demo_model" / "checkpoint")
    path = Path(checkpoint).expanduser()
    if checkpoint.strip() and path.exists():
        if revision:
            raise CheckpointError(
                f"--revision {revision} for a folder", where=checkpoint, todo="leave it out"
            )
        return Source(path.resolve().name, path)
    if not HUB_ID.fullmatch(checkpoint) or checkpoint.startswith((".", "/", "~")):
        raise CheckpointError(
            "no such folder",
            where=f"--checkpoint {checkpoint}",
            expected="a folder, OWNER/NAME on the Hugging Face hub, or demo",
        )
    return _download(checkpoint, revision)


def resolve_config(checkpoint: str, revision: str | None = None) -> Source:
    """A folder with the config files that `--checkpoint` means, without its weights.

    The default checkpoint's config travels with the toolkit and stands in, said out loud, where the hub
    cannot be reached.

    Raises:
        CheckpointError: see `resolve_checkpoint`.
        MachineError: the hub cannot be reached and neither cache nor toolkit holds the config.
    """
    path = Path(checkpoint).expanduser()
    if checkpoint == DEMO or path.exists() or not HUB_ID.fullmatch(checkpoint):
        return resolve_checkpoint(checkpoint, revision)
    try:
        return _download(checkpoint, revision, CONFIG_PATTERNS)
    except MachineError as error:
        if checkpoint != DEFAULT_CHECKPOINT or revision is not None:
            raise
        print(f"{error.found}: using the toolkit's own copy of its config.json", file=sys.stderr)
        return Source(checkpoint, Path(__file__).parent / "width_base")


def _download(repo: str, revision: str | None, patterns: tuple[str, ...] = PATTERNS) -> Source:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    unreachable: tuple[type[Exception], ...] = (HfHubHTTPError, OSError, *_transport_errors())
    try:
        commit = _commit_of(repo, revision)
        folder = snapshot_download(repo, revision=commit, allow_patterns=list(patterns))
        return Source(repo, Path(folder), commit)
    except RevisionNotFoundError:
        raise CheckpointError(f"no revision {revision}", where=f"{repo} on the hub") from None
    except GatedRepoError:
        raise CheckpointError(
            "access is gated", where=f"{repo} on the hub", todo="accept its terms there, then set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            "no such repository, or it is private",
            where=f"{repo} on the hub",
            todo="check the name, or set HF_TOKEN",
        ) from None
    except unreachable as error:
        return _from_cache(repo, revision, error, patterns)


def _transport_errors() -> tuple[type[Exception], ...]:
    """Errors of the library below huggingface_hub that it lets through: since 1.0 that is httpx."""
    try:
        from httpx import HTTPError
    except ImportError:
        return ()
    return (HTTPError,)


def _commit_of(repo: str, revision: str | None) -> str:
    """The full commit a revision means now: what is downloaded must not move while it is."""
    from huggingface_hub import HfApi

    commit = HfApi().model_info(repo, revision=revision, timeout=20).sha
    if not commit:
        raise CheckpointError("the hub names no commit", where=repo)
    return str(commit)


def _from_cache(repo: str, revision: str | None, error: Exception, patterns: tuple[str, ...]) -> Source:
    """The snapshot in the hub's cache, said out loud; refuses when there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    not_cached: tuple[type[Exception], ...] = (LocalEntryNotFoundError, OSError, *_transport_errors())
    reason = _root_cause(error)
    try:
        folder = Path(
            snapshot_download(repo, revision=revision, allow_patterns=list(patterns), local_files_only=True)
        )
    except not_cached:
        raise MachineError(
            f"no such folder, the Hugging Face hub cannot be reached ({reason}), and its cache lacks it",
            where=repo,
            todo="run again when online (a download resumes), or give a folder: --checkpoint DIR; "
            "--checkpoint demo needs no network",
        ) from None
    print(f"hub not reachable ({reason}): using the cached snapshot {folder.name}", file=sys.stderr)
    return Source(repo, folder, folder.name)


def _root_cause(error: BaseException) -> str:
    """The innermost exception's own words: what wraps it repeats the whole URL."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return " ".join(str(error).split())[:160] or type(error).__name__

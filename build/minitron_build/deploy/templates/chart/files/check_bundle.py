"""Refuse to start on a bundle that is not the one this chart was written for, or not whole.

`check_bundle.py BUNDLE MANIFEST_SHA256` compares the manifest, then every file with the manifest. Reading
each byte once also puts the engine into the page cache. Standard library only: it runs in the serving
container.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

MANIFEST = "manifest.json"
CHUNK_BYTES = 4 << 20


def sha256_of(path: Path) -> str:
    """Digest of a file, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def find_fault(bundle: Path, manifest_sha256: str) -> str | None:
    """What is wrong, in one line; None when nothing is."""
    path = bundle / MANIFEST
    if not path.is_file():
        return f"{bundle} holds no {MANIFEST}: copy the bundle into the volume"
    if (found := sha256_of(path)) != manifest_sha256:
        return (
            f"{path} is of another bundle (sha256 {found}, expected {manifest_sha256}): run minitron deploy"
        )
    for name, entry in json.loads(path.read_text(encoding="utf-8"))["files"].items():
        if not (bundle / name).is_file():
            return f"{bundle / name} is missing: copy the bundle again"
        if sha256_of(bundle / name) != entry["sha256"]:
            return f"{bundle / name} has other bytes than when it was built: copy the bundle again"
    return None


def main(argv: list[str]) -> int:
    """0 for the bundle as it was built, 1 with the fault on stderr."""
    if len(argv) != 3:
        print("usage: check_bundle.py BUNDLE MANIFEST_SHA256", file=sys.stderr)
        return 2
    fault = find_fault(Path(argv[1]), argv[2])
    if fault is not None:
        print(fault, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))

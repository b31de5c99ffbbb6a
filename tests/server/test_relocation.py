"""A bundle stands alone: built by a checkout that is gone, moved to an awkward path, it serves a token.

Run with: pytest tests/server/test_relocation.py
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from triton_repos import serving

import minitron_build
import minitron_client
from minitron_build.bundle.bundle import Bundle
from minitron_build.repository.model_repo import NOT_COPIED, template_dir
from minitron_client import MinitronClient

PACKAGES = {"build/minitron_build": minitron_build, "client/minitron_client": minitron_client}
AWKWARD = "Modelle für später (2. Fassung)"
GONE = "raise ImportError('a bundle must not need the toolkit')\n"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what a build needs of this repository."""
    folder = tmp_path / "checkout"
    for place, package in PACKAGES.items():
        shutil.copytree(Path(package.__file__ or "").parent, folder / place, ignore=NOT_COPIED)
    shutil.copytree(template_dir(), folder / "model_repo", ignore=NOT_COPIED)
    return folder


def build(checkout: Path, source: Path, bundle: Path) -> None:
    paths = os.pathsep.join(str((checkout / place).parent) for place in PACKAGES)
    limits = (
        "--max-batch-size",
        "4",
        "--max-input-len",
        "64",
        "--max-seq-len",
        "128",
        "--max-num-tokens",
        "64",
    )
    code = (
        "import sys, minitron_build; from minitron_build.cli import main;"
        "print(minitron_build.__file__, file=sys.stderr); sys.exit(main(sys.argv[1:]))"
    )
    words = ("build", "--arch", "cpu", "--checkpoint", str(source), "--output-dir", str(bundle), *limits)
    built = subprocess.run(
        [sys.executable, "-c", code, *words],
        env=os.environ | {"PYTHONPATH": paths},
        cwd=checkout,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert built.returncode == 0, built.stderr
    assert built.stderr.startswith(str(checkout)), "the copy has built it"


@pytest.fixture
def moved_bundle(
    tiny_minitron: Path, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Bundle:
    build(checkout, tiny_minitron, tmp_path / "built")
    shutil.rmtree(checkout)
    (tmp_path / AWKWARD).mkdir()
    (tmp_path / "built").rename(tmp_path / AWKWARD / "bundle")
    # The packages under test are importable here: in the server they must not be.
    for package in PACKAGES.values():
        (tmp_path / "gone" / package.__name__).mkdir(parents=True)
        (tmp_path / "gone" / package.__name__ / "__init__.py").write_text(GONE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "gone"))
    return Bundle.load(tmp_path / AWKWARD / "bundle")


def test_moved_bundle_serves_without_the_checkout_that_built_it(moved_bundle: Bundle, tmp_path: Path) -> None:
    moved_bundle.check_files()
    machine_paths = [str(tmp_path).encode(), str(Path(minitron_build.__file__).parents[2]).encode()]
    for path in moved_bundle.path.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert not any(machine_path in content for machine_path in machine_paths), path
    with (
        serving(moved_bundle.model_repo, start_timeout_s=30) as server,
        MinitronClient(server.grpc_url) as client,
    ):
        completion = client.generate("Grüße", max_tokens=1)
        assert completion.usage.output_tokens == 1

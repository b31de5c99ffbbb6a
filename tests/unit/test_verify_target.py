"""What a bundle or a checkpoint says of its source, and the one line where that is not enough.

Run: pytest tests/unit/test_verify_target.py
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minitron_build.build import build_bundle, plan_build
from minitron_build.bundle.bundle import Bundle
from minitron_build.cli import main
from minitron_build.errors import CheckpointError, MachineError, RefusedError
from minitron_build.planning.request import PlanRequest
from minitron_build.source.hub import Source, resolve_checkpoint
from minitron_build.verify import target
from minitron_build.verify.result import NOT_JUDGED
from minitron_build.verify.target import Target

EditJson = Callable[[Path, dict[str, Any]], None]
LIMITS = {"max_batch_size": 4, "max_input_len": 64, "max_seq_len": 128, "max_num_tokens": 64}


@pytest.fixture(scope="module")
def built(tiny_minitron: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    source = resolve_checkpoint(str(tiny_minitron))
    plan = plan_build(source, PlanRequest(arch="cpu", precision="bf16", **LIMITS))
    return build_bundle(plan, source, tmp_path_factory.mktemp("target") / "bundle")


@pytest.fixture
def bundle(built: Bundle, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    shutil.copytree(built.path, tmp_path / "bundle")
    return tmp_path / "bundle"


def rename_source(bundle: Path, edit_json: EditJson, name: str) -> Target:
    manifest = json.loads((bundle / "manifest.json").read_text())
    edit_json(bundle / "manifest.json", {"source": manifest["source"] | {"name": name, "revision": "abc"}})
    return Target.open(bundle)


def test_a_bundle_knows_its_parts(bundle: Path, tiny_minitron: Path) -> None:
    opened = Target.open(bundle)
    assert opened.needed_checkpoint() == bundle / "checkpoint"
    assert opened.tokenizer_dir == bundle / "model_repo" / "preprocessing" / "1"
    assert opened.limits is not None
    assert opened.limits["max_input_len"] == 64
    assert opened.differences(tiny_minitron) == []
    assert Target.open(bundle / "checkpoint").differences(tiny_minitron) == []


def test_a_folder_elsewhere_must_be_given(bundle: Path) -> None:
    with pytest.raises(RefusedError, match="only the name of its source is known .tiny_minitron.; give the"):
        Target.open(bundle).resolve_source(None)


def test_demo_is_found_again(bundle: Path, edit_json: EditJson) -> None:
    assert rename_source(bundle, edit_json, "demo").resolve_source(None) == resolve_checkpoint("demo").hf_dir


def test_hub_source_is_asked_for_at_its_commit(
    bundle: Path, edit_json: EditJson, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def resolve(name: str, revision: str | None = None) -> Source:
        asked.append((name, revision))
        raise MachineError("the hub cannot be reached", todo="give a folder: --checkpoint DIR")

    monkeypatch.setattr(target, "resolve_checkpoint", resolve)
    with pytest.raises(RefusedError) as caught:
        rename_source(bundle, edit_json, "owner/name").resolve_source(None)
    assert asked == [("owner/name", "abc")]
    assert "its source owner/name: the hub cannot be reached" in str(caught.value)
    assert "--against" in str(caught.value)
    assert "--checkpoint" not in str(caught.value)


def test_a_wrong_source_names_its_flag(bundle: Path) -> None:
    with pytest.raises(CheckpointError, match="--against /nowhere: no such folder"):
        Target.open(bundle).resolve_source("/nowhere")


def test_an_engine_without_checkpoint_says_what_to_do(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(bundle / "checkpoint")
    assert main(["verify", str(bundle), "--against", "demo"]) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert "holds an engine and no checkpoint" in message
    assert "--keep-checkpoint" in message


def test_another_source_is_said_out_loud(
    bundle: Path, tiny_copy: Path, edit_json: EditJson, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_json(tiny_copy / "config.json", {"max_position_embeddings": 4096})
    (difference,) = Target.open(bundle).differences(tiny_copy)
    assert difference.startswith(f"config.json: {(tiny_copy / 'config.json').stat().st_size} bytes, not ")
    flags = ["--eval-samples", "4", "--eval-seq-len", "96", "--skip", "long-prompt"]
    assert main(["verify", str(bundle), "--against", str(tiny_copy), *flags]) == 0
    assert "not the source it was made from: config.json" in capsys.readouterr().err


def test_a_changed_checkpoint_is_said_out_loud(
    bundle: Path, tiny_minitron: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert Target.open(bundle).changes() == Target.open(bundle / "checkpoint").changes() == []
    rank = bundle / "checkpoint" / "rank0.safetensors"
    bits = bytearray(rank.read_bytes())
    bits[-1] ^= 1
    rank.write_bytes(bits)
    for path in (bundle, bundle / "checkpoint"):
        assert Target.open(path).changes() == ["rank0.safetensors: other bytes"]
        flags = ["--eval-samples", "4", "--eval-seq-len", "96"]
        main(["verify", str(path), "--against", str(tiny_minitron), *flags, "--skip", "long-prompt"])
        out, err = capsys.readouterr()
        changed = "changed since it was written: rank0.safetensors: other bytes"
        assert f"warning: {path}: {changed}" in err.splitlines()
        assert f"  {changed}" in out.splitlines()
    rank.write_bytes(bits[:-1])
    (bundle / "checkpoint" / "config.json").unlink()
    assert Target(bundle, bundle / "checkpoint", files=Target.open(bundle).files).changes() == [
        "config.json: missing",
        f"rank0.safetensors: {len(bits) - 1} bytes, not {len(bits)}",
    ]


def test_without_source_only_what_needs_none(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--skip-source", "--eval-samples", "4", "--eval-seq-len", "96"]
    assert main(["verify", str(bundle), *flags, "--html", str(tmp_path / "report.html")]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert result["quality_judged"] is False, "a broken scale passes what was checked"
    assert f"  {NOT_JUDGED}" in lines
    assert NOT_JUDGED in (tmp_path / "report.html").read_text()
    assert set(result["checks"]) == {"repeat_difference"}
    assert result["source"] is None
    assert 1 < result["eval"]["candidate_perplexity"] < 10_000
    assert result["skipped"]["perplexity rise"] == "--skip-source"

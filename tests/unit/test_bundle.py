"""A bundle is whole, bound to its manifest, relocatable, and never half of one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from minitron_build import build
from minitron_build.build import build_bundle, build_checkpoint, plan_build
from minitron_build.bundle.bundle import Bundle
from minitron_build.bundle.manifest import digest_file
from minitron_build.cli import main
from minitron_build.errors import CheckpointError
from minitron_build.planning.plan import PlanRequest
from minitron_build.repository.model_repo import MODELS
from minitron_build.repository.pbtxt import get_parameters, read_config
from minitron_build.source.hub import Source, resolve_checkpoint

REQUEST = PlanRequest(arch="cpu", max_batch_size=8)


@pytest.fixture
def source(tiny_minitron: Path) -> Source:
    return resolve_checkpoint(str(tiny_minitron))


@pytest.fixture
def bundle(source: Source, tmp_path: Path) -> Bundle:
    return build_bundle(plan_build(source, REQUEST), source, tmp_path / "bundle")


def test_manifest_binds_every_file(bundle: Bundle) -> None:
    files = {path.relative_to(bundle.path).as_posix() for path in bundle.path.rglob("*") if path.is_file()}
    assert files - {"manifest.json"} == set(bundle.manifest.files)
    for name, digest in bundle.manifest.files.items():
        assert digest_file(bundle.path / name) == digest
    bundle.check_files()


def test_manifest_says_what_it_was_made_from(bundle: Bundle, tiny_minitron: Path) -> None:
    record = json.loads((bundle.path / "manifest.json").read_text())
    weights = record["source"]["files"]["model.safetensors"]
    assert weights["sha256"] == digest_file(tiny_minitron / "model.safetensors").sha256
    assert record["plan"]["decisions"][0] == {
        "what": "arch",
        "value": "cpu",
        "reason": "asked for with --arch",
    }
    assert {"toolkit", "python", "torch", "tokenizers", "numpy"} <= record["versions"].keys()


def test_nothing_names_this_machine(bundle: Bundle, tiny_minitron: Path) -> None:
    for path in bundle.path.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert str(bundle.path).encode() not in content
            assert str(tiny_minitron.parent).encode() not in content


def test_models_carry_what_they_need(bundle: Bundle) -> None:
    for model in MODELS:
        assert (bundle.model_repo / model / "1" / "model.py").is_file()
        assert (bundle.model_repo / model / "1" / "minitron_runtime" / "__init__.py").is_file()
    assert (bundle.model_repo / "preprocessing" / "1" / "tokenizer.json").is_file()
    assert (bundle.model_repo / "ensemble" / "1").is_dir()
    parameters = get_parameters(read_config(bundle.model_repo / "tensorrt_llm"))
    assert parameters["max_batch_size"] == "8"
    assert (parameters["precision"], parameters["kv_cache_dtype"]) == ("bf16", "bf16")
    assert get_parameters(read_config(bundle.model_repo / "tensorrt_llm_bls"))["eos_token_ids"] == "509"


def test_second_build_writes_nothing(bundle: Bundle, source: Source) -> None:
    before = {path: path.stat().st_mtime_ns for path in bundle.path.rglob("*")}
    build_bundle(plan_build(source, REQUEST), source, bundle.path)
    assert {path: path.stat().st_mtime_ns for path in bundle.path.rglob("*")} == before


def test_another_plan_needs_force(bundle: Bundle, source: Source) -> None:
    plan = plan_build(source, PlanRequest(arch="cpu", tp_size=2))
    with pytest.raises(CheckpointError, match="a bundle of another plan or source.*--force"):
        build_bundle(plan, source, bundle.path)
    assert build_bundle(plan, source, bundle.path, force=True).manifest.plan["tp_size"] == 2


def test_foreign_folder_is_refused(source: Source, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(CheckpointError, match="holds thesis.tex, which no build makes"):
        build_bundle(plan_build(source, REQUEST), source, tmp_path)
    with pytest.raises(CheckpointError, match="a file; expected a folder"):
        build_bundle(plan_build(source, REQUEST), source, tmp_path / "thesis.tex")


def test_build_resumes_after_the_last_whole_stage(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, output_dir = plan_build(source, REQUEST), tmp_path / "bundle"
    checkpoint = build_checkpoint(plan, source, output_dir)
    before = (checkpoint.path / "rank0.safetensors").stat().st_mtime_ns

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build, "write_bundle", killed)
        with pytest.raises(KeyboardInterrupt):
            build_bundle(plan, source, output_dir)
    with pytest.raises(
        CheckpointError, match=r"manifest.json is missing; expected a finished bundle.*resumes"
    ):
        Bundle.load(output_dir)
    build_bundle(plan, source, output_dir).check_files()
    assert (checkpoint.path / "rank0.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("checkpoint/rank0.safetensors", None, "rank0.safetensors: missing"),
        ("model_repo/ensemble/stray.txt", b"x", "stray.txt: not in the manifest"),
        ("checkpoint/config.json", b"{}", "config.json: 2 bytes, not"),
    ],
)
def test_changed_bundle_is_refused(bundle: Bundle, name: str, content: bytes | None, message: str) -> None:
    path = bundle.path / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        Bundle.load(bundle.path).check_files()


def test_one_flipped_bit_is_noticed(bundle: Bundle) -> None:
    path = bundle.checkpoint / "rank0.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"rank0.safetensors: other bytes than when it was built"):
        bundle.check_files()


def test_what_running_models_leave_is_no_change(bundle: Bundle) -> None:
    (bundle.model_repo / "tensorrt_llm" / "1" / "__pycache__").mkdir()
    (bundle.model_repo / "tensorrt_llm" / "1" / "__pycache__" / "model.pyc").write_bytes(b"x")
    bundle.check_files()


@pytest.mark.parametrize("text", ["{}", '{"schema": 99}', '{"schema": 1, "arch": "cpu"}', "nonsense"])
def test_unreadable_manifest(bundle: Bundle, text: str) -> None:
    (bundle.path / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match="manifest.json"):
        Bundle.load(bundle.path)


def build_cli(output_dir: Path, *flags: str, checkpoint: str = "demo") -> int:
    return main(
        ["build", "--arch", "cpu", "--checkpoint", checkpoint, "--output-dir", str(output_dir), *flags]
    )


FEW_TOKENS = ("--calib-samples", "2", "--calib-seq-len", "64", "--no-verify")
PRECISIONS = {"bf16": (), "fp8": ("--precision", "fp8", *FEW_TOKENS)}


@pytest.mark.parametrize("stop_after", ["checkpoint", "bundle"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_too_little_disk_is_refused_before_anything_is_made_or_said(
    precision: str,
    stop_after: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    usage = type("Usage", (), {"free": 4_000_000, "total": 1 << 40})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert build_cli(tmp_path / "new" / "out", "--stop-after", stop_after, *PRECISIONS[precision]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith(f"minitron: {tmp_path / 'new' / 'out'}: 0.0 GB of disk free; expected 0.")
    assert not any(line.startswith(("converting", "calibrating")) for line in lines)
    assert not (tmp_path / "new").exists()


def test_too_little_disk_is_refused_before_the_weights_are_fetched(
    tmp_path: Path, tiny_minitron: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fetch(checkpoint: str, revision: str | None) -> Source:
        raise AssertionError("the weights are fetched")

    known = Source("org/model", tiny_minitron, "0" * 40)
    monkeypatch.setattr(build, "resolve_config", lambda *_: known)
    monkeypatch.setattr(build, "resolve_checkpoint", fetch)
    usage = type("Usage", (), {"free": 4_000_000, "total": 1 << 40})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert build_cli(tmp_path / "out", checkpoint="org/model") == 1
    assert "of disk free" in capsys.readouterr().err


def test_the_weights_are_of_the_revision_that_was_planned(
    tmp_path: Path, tiny_minitron: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str | None]] = []

    def fetch(checkpoint: str, revision: str | None) -> Source:
        asked.append((checkpoint, revision))
        return known

    known = Source("org/model", tiny_minitron, "0" * 40)
    monkeypatch.setattr(build, "resolve_config", lambda *_: known)
    monkeypatch.setattr(build, "resolve_checkpoint", fetch)
    assert build_cli(tmp_path / "out", "--stop-after", "checkpoint", checkpoint="org/model") == 0
    assert asked == [("org/model", "0" * 40)]


@pytest.mark.parametrize(
    ("precision", "said"), [("bf16", "converting"), ("fp8", "calibrating with 2 samples")]
)
def test_a_checkpoint_that_stands_there_is_no_work_in_progress(
    precision: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--stop-after", "checkpoint", *PRECISIONS[precision])
    assert build_cli(tmp_path / "out", *flags) == 0
    assert said in capsys.readouterr().err
    assert build_cli(tmp_path / "out", *flags) == 0
    err = capsys.readouterr().err
    assert f"{tmp_path / 'out' / 'checkpoint'} stands there already" in err
    assert said.split(maxsplit=1)[0] not in err

"""`minitron verify --url`: a real Triton's own output held against the reference engine.

Run: pytest tests/server/test_verify_served.py
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fp8_model import write_fp8_checkpoint
from minitron_build.bundle.bundle import Bundle
from minitron_build.cli import main
from minitron_build.serving.triton_server import TritonServer, free_ports

FEW = ("--eval-samples", "4", "--eval-seq-len", "80")
Capture = pytest.CaptureFixture[str]


def verify(capsys: Capture, *argv: str) -> tuple[int, dict[str, Any], str]:
    """Exit status, JSON of the last line, and the last line of stderr."""
    capsys.readouterr()
    status = main(["verify", *argv])
    out, err = capsys.readouterr()
    lines = out.splitlines()
    return status, json.loads(lines[-1]) if lines else {}, (err.splitlines() or [""])[-1]


def test_a_server_computes_what_its_checkpoint_says(
    tiny_bundle: Bundle, running_server: TritonServer, capsys: Capture
) -> None:
    status, result, message = verify(capsys, str(tiny_bundle.path), "--url", running_server.grpc_url, *FEW)
    assert status == 0, message
    checks = result["checks"]
    assert set(checks) == {
        f"served_{name}" for name in ("agreement", "gap", "log_prob", "long_prompt", "repeat")
    }
    assert checks["served_agreement"]["found"] == 1
    assert checks["served_log_prob"]["found"] < 1e-4
    assert checks["served_repeat"]["found"] == 0
    longest = tiny_bundle.manifest.plan["limits"]["max_input_len"]
    assert result["answers"][-1]["prompt_tokens"] == longest
    assert f"the server takes {longest}" in result["skipped"]["long-prompt of 8192 tokens"]
    assert all(1 <= len(answer["token_ids"]) <= 16 for answer in result["answers"])


def test_source_and_server_in_one_go(
    tiny_bundle: Bundle, running_server: TritonServer, tiny_minitron: Path, capsys: Capture
) -> None:
    skips = ("--skip", "long-prompt", "--skip", "repeat-prompt")
    flags = ("--against", str(tiny_minitron), *skips, *FEW, "--eval-seq-len", "128")
    status, result, message = verify(capsys, str(tiny_bundle.path), "--url", running_server.grpc_url, *flags)
    assert status == 0, message
    assert {"perplexity_rise", "golden_gap", "served_agreement"} <= set(result["checks"])
    assert not {"long_prompt_kl", "served_long_prompt", "served_repeat"} & set(result["checks"])
    assert result["served"]["answers"]
    assert result["quality_judged"] is True


def test_another_model_behind_the_url_is_found_out(
    tiny_bundle: Bundle,
    running_server: TritonServer,
    tmp_path: Path,
    edit_json: Callable[[Path, dict[str, Any]], None],
    capsys: Capture,
) -> None:
    other = tmp_path / "checkpoint"
    shutil.copytree(tiny_bundle.checkpoint, other)
    (other / "conversion.json").unlink()
    edit_json(other / "config.json", {"rotary_base": 100.0})
    status, result, message = verify(capsys, str(other), "--url", running_server.grpc_url, *FEW)
    assert status == 1
    assert not result["checks"]["served_agreement"]["passed"]
    assert result["quality_judged"] is False, "held against the checkpoint, not against its source"
    assert "build the engine again from this checkpoint" in message
    assert "max_input_len is 1024" in result["skipped"]["long-prompt"]  # a checkpoint tells no limits


def test_another_precision_behind_the_url_is_refused(
    tiny_bundle: Bundle, running_server: TritonServer, tiny_minitron: Path, tmp_path: Path, capsys: Capture
) -> None:
    checkpoint, url = write_fp8_checkpoint(tiny_minitron, tmp_path / "fp8"), running_server.grpc_url
    status, result, message = verify(capsys, str(checkpoint), "--url", url, *FEW)
    assert (status, result) == (1, {})
    assert (
        f"{url}: the server's precision is bf16; expected fp8, as {checkpoint} has; name the bundle"
        in message
    )
    status, _, message = verify(capsys, str(tiny_bundle.checkpoint), "--url", url, *FEW)
    assert status == 0, message


def test_golden_prompts_may_be_left_out(
    tiny_bundle: Bundle, running_server: TritonServer, capsys: Capture
) -> None:
    argv = (str(tiny_bundle.path), "--url", running_server.grpc_url, *FEW)
    skips = ("--skip", "long-prompt", "--skip", "repeat-prompt")
    status, result, message = verify(capsys, *argv, *skips, "--skip", "golden-prompts")
    assert status == 0, message
    assert len(result["answers"]) == 4
    assert len(verify(capsys, *argv, *skips)[1]["answers"]) == 4 + 8


def test_no_server_is_one_line(tiny_bundle: Bundle, capsys: Capture) -> None:
    (port,) = free_ports(1)
    status, result, message = verify(capsys, str(tiny_bundle.path), "--url", f"127.0.0.1:{port}", *FEW)
    assert status == 1
    assert not result
    assert f"127.0.0.1:{port}" in message

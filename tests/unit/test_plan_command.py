"""`minitron plan` prints a row a GPU model, JSON on request, a plot, and refuses what fits nowhere."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from minitron_build.errors import MachineError, PlanError
from minitron_build.planning import plan_command
from minitron_build.planning.plan_command import configure_parser, run
from minitron_build.planning.targets import Gpu
from minitron_build.source import hub
from minitron_build.source.hub import DEFAULT_CHECKPOINT, resolve_config
from minitron_build.source.model_config import ModelConfig

DATA = Path(__file__).parents[1] / "golden" / "data"


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_command, "find_gpus", lambda: ())


@pytest.fixture
def width_base(tmp_path: Path) -> Path:
    """A folder with the real model's config and nothing else."""
    folder = tmp_path / "width-base"
    folder.mkdir()
    (folder / "config.json").write_bytes((DATA / "width_base_config.json").read_bytes())
    return folder


def plan(folder: Path, *words: str) -> None:
    parser = argparse.ArgumentParser()
    configure_parser(parser)
    assert run(parser.parse_args(["--checkpoint", str(folder), *words])) == 0


def rows(folder: Path, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, dict[str, Any]]:
    plan(folder, "--json", *words)
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    return {row["gpu"]: row for row in record["gpus"]}


def test_a_row_for_each_gpu(width_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = rows(width_base, capsys)
    assert {"L4", "L40S", "A100-40GB", "A100-80GB", "H100", "H200", "B200"} <= found.keys()
    assert all(row["fits"] for row in found.values())
    assert {name: found[name]["precision"] for name in ("A100-80GB", "L4", "B200")} == {
        "A100-80GB": "bf16",
        "L4": "fp8",
        "B200": "fp8",
    }
    h100 = found["H100"]
    assert h100["weights_bytes"] == pytest.approx(5.30e9, rel=1e-3)
    assert h100["kv_cache_bytes_per_token"] == 65536
    assert h100["full_length_requests"] == h100["kv_cache_tokens"] // 9216
    assert h100["decode_tokens_per_s_batch_1"] == pytest.approx(742, rel=0.02)
    assert (
        h100["decode_tokens_per_s_batch_1"]
        < h100["decode_tokens_per_s_max_batch"]
        <= h100["decode_tokens_per_s_memory_bound"]
        < h100["prefill_tokens_per_s"]
    )
    assert h100["stages"]["engine"]["ram_bytes"] > 2 * h100["weights_bytes"]


def test_the_table_says_what_it_is(width_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan(width_base, "--tp-size", "2")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "width-base, tp 2, pp 1, per GPU"
    assert lines[1].split()[:3] == ["GPU", "arch", "memory"]
    assert any(line.startswith("H100 ") and " yes " in line for line in lines)
    assert any("ceilings" in line and "not measurements" in line for line in lines)
    assert any(line.startswith("fp8 stage engine:") for line in lines)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--arch", "hopper"], ["H100", "H200"]),
        (["--sm", "86"], ["A10"]),
        (["--gpu", "a100"], ["A100-40GB", "A100-80GB"]),
        (["--gpu", "L4", "--gpu-memory-gb", "20"], ["L4"]),
        (["--gpu-memory-gb", "32"], ["32 GB GPU"]),
        (["--gpu-memory-gb", "32", "--arch", "ampere"], ["32 GB GPU"]),
    ],
)
def test_gpus_are_chosen(
    words: list[str], wanted: list[str], width_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = rows(width_base, capsys, *words)
    assert list(found) == wanted
    if "--gpu-memory-gb" in words:
        assert found[wanted[0]]["gpu_memory_bytes"] == int(words[words.index("--gpu-memory-gb") + 1]) * 10**9


def test_bare_memory_has_no_ceilings(width_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = rows(width_base, capsys, "--gpu-memory-gb", "32", "--sm", "80")["32 GB GPU"]
    assert (row["sm"], row["precision"], row["decode_tokens_per_s_batch_1"]) == (80, "bf16", None)


def test_this_machines_gpu_comes_first(
    width_base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = (Gpu("NVIDIA H200", 90, 150754820096), Gpu("NVIDIA H200", 90, 150754820096))
    monkeypatch.setattr(plan_command, "find_gpus", lambda: here)
    found = rows(width_base, capsys)
    assert next(iter(found)) == "NVIDIA H200"
    assert found["NVIDIA H200"]["kv_cache_tokens"] == found["H200"]["kv_cache_tokens"]


def test_a_gpu_without_the_precision_is_a_row_with_the_reason(
    width_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan(width_base, "--precision", "fp8", "--json")
    out = capsys.readouterr().out
    row = next(row for row in json.loads(out.splitlines()[-1])["gpus"] if row["gpu"] == "A100-80GB")
    assert not row["fits"]
    assert "no FP8 tensor cores" in row["reason"]
    assert "no A100-80GB: --precision fp8 with --arch ampere" in out


def test_a_gpu_too_small_for_one_request_is_a_row_with_the_limit(
    width_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = ["--precision", "bf16", "--max-seq-len", "131072", "--max-input-len", "8192"]
    found = rows(width_base, capsys, *limits)
    assert not found["L4"]["fits"]
    assert found["L4"]["kv_cache_tokens"] < 131072
    assert f"lower --max-seq-len to {found['L4']['kv_cache_tokens']} or less" in found["L4"]["reason"]
    assert found["H100"]["fits"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--gpu-memory-gb", "12.2", "--precision", "bf16"],
            r"expected 9216 tokens.*lower --max-seq-len to \d+",
        ),
        (["--gpu-memory-gb", "4"], "KV cache of 0 tokens.*more ranks"),
        (["--arch", "ampere", "--precision", "fp8"], "no FP8 tensor cores"),
        (["--tp-size", "3"], "--tp-size 3 does not divide"),
        (
            ["--max-input-len", "9000", "--max-seq-len", "4096"],
            "--max-input-len 9000 with --max-seq-len 4096",
        ),
        (["--gpu", "L4", "--arch", "hopper"], "--gpu L4 is SM 89; expected hopper"),
        (
            ["--kv-cache-fraction", "0.001", "--gpu", "H100"],
            r"raise --kv-cache-fraction 0.001 to 0.\d+ or more",
        ),
        (["--arch", "cpu", "--gpu-memory-gb", "8"], "--gpu-memory-gb with --arch cpu"),
        (["--arch", "cpu", "--plot", "x.png"], "--plot with --arch cpu"),
        (["--plot", "no/such/x.png"], "expected a folder that exists"),
    ],
)
def test_refused(
    words: list[str], message: str, width_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        plan(width_base, *words)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


def test_the_cpu_is_a_plan_of_its_own(tiny_minitron: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan(tiny_minitron, "--arch", "cpu", "--json")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("tiny_minitron -> cpu bundle")
    assert json.loads(lines[-1])["arch"] == "cpu"


@pytest.mark.parametrize("words", [[], ["--gpu-memory-gb", "40"]])
def test_plot_is_a_picture(words: list[str], width_base: Path, tmp_path: Path) -> None:
    plan(width_base, "--plot", str(tmp_path / "plan.png"), *words)
    picture = (tmp_path / "plan.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000


def test_flags_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    configure_parser(parser)
    args = parser.parse_args(["--plugin", "gemm_plugin=fp8", "--plugin", "user_buffer=enable"])
    assert args.plugin == [("gemm_plugin", "fp8"), ("user_buffer", "enable")]
    with pytest.raises(SystemExit):
        parser.parse_args(["--plugin", "gemm_plugin"])
    assert "is not NAME=VALUE" in capsys.readouterr().err


def test_config_is_found_without_weights(width_base: Path) -> None:
    assert resolve_config(str(width_base)).hf_dir == width_base
    assert resolve_config("demo").name == "demo"


def test_own_copy_stands_in_for_the_default_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(*_: object) -> hub.Source:
        raise MachineError("the Hugging Face hub cannot be reached", where="owner/name")

    monkeypatch.setattr(hub, "_download", unreachable)
    source = resolve_config(DEFAULT_CHECKPOINT)
    assert ModelConfig.read(source.hf_dir).num_parameters == 4_512_746_496
    assert "using the toolkit's own copy of its config.json" in capsys.readouterr().err
    for checkpoint, revision in (("owner/name", None), (DEFAULT_CHECKPOINT, "main")):
        with pytest.raises(MachineError, match="cannot be reached"):
            resolve_config(checkpoint, revision)


def test_own_copy_is_the_golden_one() -> None:
    own = Path(hub.__file__).parent / "width_base" / "config.json"
    assert json.loads(own.read_text()) == json.loads((DATA / "width_base_config.json").read_text())


def test_importing_the_verb_is_light() -> None:
    code = (
        "import sys; import minitron_build.planning.plan_command;"
        "print({'numpy', 'torch', 'matplotlib', 'huggingface_hub'} & set(sys.modules))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "set()"

"""The gate: what passes, what fails and why, on the demo model and on broken copies of it.

Run: pytest tests/unit/test_verify.py
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from minitron_build.calibration.samples import SampleRequest, read_calibration_set
from minitron_build.checkpoint.convert import convert_checkpoint
from minitron_build.checkpoint.convert_fp8 import convert_fp8_checkpoint
from minitron_build.cli import main
from minitron_build.errors import CheckpointError, RefusedError
from minitron_build.source.hub import resolve_checkpoint
from minitron_build.verify.gate import Verification, VerifyRequest, VerifyResult, short_verify, verify
from minitron_build.verify.result import PARTS
from minitron_build.verify.suggest import UNITS, suggest

DEMO = resolve_checkpoint("demo").hf_dir
FEW: dict[str, Any] = {"num_samples": 6, "seq_len": 128}
NO_PARTS = dict.fromkeys(PARTS, "not wanted here")
EditJson = Callable[[Path, dict[str, Any]], None]


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify") / "bf16"
    convert_checkpoint(DEMO, folder)
    return folder


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify") / "fp8"
    data = read_calibration_set(SampleRequest(num_samples=16, seq_len=128), DEMO, 4096)
    convert_fp8_checkpoint(DEMO, folder, data)
    return folder


@pytest.fixture
def broken(fp8: Path, tmp_path: Path) -> Path:
    """A copy of the FP8 checkpoint that a test may break, without the record that would give it away."""
    shutil.copytree(fp8, tmp_path / "broken")
    (tmp_path / "broken" / "conversion.json").unlink()
    return tmp_path / "broken"


def scale(checkpoint: Path, name: str, factor: float) -> None:
    """Multiply a tensor of the only rank file."""
    path = checkpoint / "rank0.safetensors"
    tensors = load_file(path)
    tensors[name] = tensors[name] * factor
    save_file(tensors, path)


def failed(result: VerifyResult) -> set[str]:
    return {check.name for check in result.checks if not check.passed}


def test_a_bf16_checkpoint_is_its_source(bf16: Path) -> None:
    result = verify(VerifyRequest("demo", bf16, DEMO, **FEW))
    assert result.passed
    assert not result.failure
    assert result.facts["kind"] == "exact"
    assert {check.name for check in result.checks} == {
        *("perplexity_rise", "top1_agreement", "mean_kl", "p99_kl", "layer_snr"),
        *("long_prompt_kl", "golden_gap", "repeat_difference"),
    }
    assert result.facts["eval"]["predicted_tokens"] == 6 * 127
    assert 1 < result.facts["eval"]["source_perplexity"] < 4096
    assert result.facts["long_prompt"]["tokens"] == 8192
    assert [row[0] for row in result.facts["long_prompt"]["by_position"]] == list(range(0, 8192, 256))
    assert [len(one["source_ids"]) for one in result.facts["golden_prompts"]] == [16] * 8


def test_fp8_demo_model_passes_the_gate(fp8: Path) -> None:
    result = short_verify(fp8, DEMO)
    assert result.passed, result.failure
    assert result.facts["kind"] == "fp8"
    numbers = {check.name: check.found for check in result.checks}
    assert 0 < numbers["mean_kl"] < 0.01
    assert numbers["layer_snr"] < 40  # FP8 leaves its mark; none would mean that nothing was compared


def test_short_form_says_what_it_leaves_out(fp8: Path) -> None:
    result = short_verify(fp8, DEMO)
    assert set(result.skipped) == set(PARTS)
    assert json.loads(json.dumps(result.as_dict()))["skipped"] == dict(result.skipped)
    assert sum("not measured" in line for line in result.lines()) == len(PARTS)


def test_every_mapping_passes(tmp_path: Path) -> None:
    convert_checkpoint(DEMO, tmp_path / "2x2", tp_size=2, pp_size=2)
    assert verify(VerifyRequest("2x2", tmp_path / "2x2", DEMO, **FEW, skipped=NO_PARTS)).passed


def test_dropped_rope_scaling_shows_at_the_long_prompt_only(broken: Path, edit_json: EditJson) -> None:
    edit_json(broken / "config.json", {"rotary_scaling": None})
    result = verify(VerifyRequest("broken", broken, DEMO, **FEW))
    assert failed(result) == {"long_prompt_kl"}
    assert "RoPE" in result.failure


def test_short_form_compares_rope_where_it_runs_no_long_prompt(broken: Path, edit_json: EditJson) -> None:
    edit_json(broken / "config.json", {"rotary_scaling": None})
    assert failed(short_verify(broken, DEMO)) == {"rope_difference"}


@pytest.mark.parametrize(
    ("module", "factor_name", "factor"),
    [
        ("transformer.layers.2.mlp.proj", "activation_scaling_factor", 1 / 64),
        ("transformer.layers.4.attention.dense", "weights_scaling_factor", 2.0),
    ],
)
def test_a_broken_scale_fails_and_is_found(
    broken: Path, module: str, factor_name: str, factor: float
) -> None:
    scale(broken, f"{module}.{factor_name}", factor)
    verification = Verification(VerifyRequest("broken", broken, DEMO, **FEW, skipped=NO_PARTS), no_progress)
    result = verification.run()
    assert "layer_snr" in failed(result)
    assert result.facts["worst_layer"] == int(module.split(".")[2])
    assert f"broken: {next(c for c in result.checks if not c.passed).rule.title} is" in result.failure
    suggestion = suggest(verification.models, verification.eval_set.sequences, no_progress)
    assert module in suggestion.units[0].modules
    assert suggestion.kl_after < 0.5 * suggestion.kl_before


def test_suggestion_names_what_is_fp8_once(fp8: Path) -> None:
    verification = Verification(VerifyRequest("demo", fp8, DEMO, **FEW), no_progress)
    suggestion = suggest(verification.models, verification.eval_set.sequences, no_progress)
    assert len(suggestion.units) == 6 * len(UNITS)
    assert suggestion.kl_after < suggestion.kl_before
    ranking = [unit.kl_per_byte for unit in suggestion.units]
    assert ranking == sorted(ranking, reverse=True)
    fc = next(unit for unit in suggestion.units if unit.part == "fc")
    assert [name.split(".", 3)[3] for name in fc.modules] == ["mlp.fc", "mlp.gate"]
    assert fc.extra_bytes == 2 * 576 * 192


def test_suggestion_needs_fp8(bf16: Path) -> None:
    with pytest.raises(RefusedError, match="no linear layer of the candidate is FP8"):
        verify(VerifyRequest("demo", bf16, DEMO, **FEW, has_suggestion=True))


@pytest.mark.parametrize("factor", [math.nan, 1e4])
def test_numbers_out_of_bounds_fail_and_stay_json(broken: Path, factor: float) -> None:
    scale(broken, "transformer.ln_f.weight", factor)
    result = verify(VerifyRequest("broken", broken, DEMO, **FEW, skipped=NO_PARTS))
    assert {"perplexity_rise", "mean_kl", "p99_kl"} <= failed(result)
    text = json.dumps(result.as_dict(), allow_nan=False)
    assert json.loads(text)["checks"]["perplexity_rise"]["found"] is None


def no_progress(what: str, done: int, total: int) -> None:
    assert 0 <= done <= total, what


def test_source_of_another_shape_is_refused(bf16: Path, tiny_minitron: Path) -> None:
    with pytest.raises(CheckpointError, match="vocab_size is 4096; expected 512"):
        short_verify(bf16, tiny_minitron)


def test_source_without_a_tokenizer_is_refused(bf16: Path, tmp_path: Path) -> None:
    shutil.copytree(DEMO, tmp_path / "source")
    (tmp_path / "source" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="fetch tokenizer.json with the checkpoint"):
        short_verify(bf16, tmp_path / "source")


def test_verb_prints_a_table_and_json_and_writes_reports(
    fp8: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    html, saved = tmp_path / "report.html", tmp_path / "result.json"
    flags = ["--eval-samples", "4", "--eval-seq-len", "128", "--skip", "long-prompt", "--suggest"]
    argv = ["verify", str(fp8), "--against", "demo", *flags, "--html", str(html), "--json", str(saved)]
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert result == json.loads(saved.read_text())
    assert result["passed"] is True
    assert result["quality_judged"] is True
    assert result["suggestions"]["flags"][::2] == ["--fp8-exclude"] * (
        len(result["suggestions"]["flags"]) // 2
    )
    assert any(line.strip().startswith("perplexity rise") for line in lines)
    assert any("minitron build … --fp8-exclude transformer.layers." in line for line in lines)
    page = html.read_text()
    assert page.count("<svg") == 2
    assert "Golden prompts" in page
    assert "src=" not in page
    assert "href=" not in page.replace("xlink:href=", "")


def test_verb_fails_with_one_line(fp8: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["verify", str(fp8), "--against", "demo", "--eval-samples", "4", "--eval-seq-len", "128"]
    skips = [word for part in PARTS for word in ("--skip", part)]
    assert main([*argv, *skips, "--min-top1-agreement", "99.99%"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[-1])["checks"]["top1_agreement"]["passed"] is False
    message = err.splitlines()[-1]
    assert "top-1 agreement is 9" in message
    assert "expected at least 99.99 %" in message
    assert "--fp8-exclude" in message


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "does not say where its source is; give the Hugging Face checkpoint"),
        (["--against", "demo", "--gpu"], "no CUDA device"),
        (["--skip-source"], "a checkpoint alone has no tokenizer"),
        (["--against", "demo", "--html", "/nowhere/report.html"], "/nowhere: no such folder"),
        (["--against", "demo", "--eval-data", "missing.txt"], "missing.txt: No such file or directory"),
    ],
)
def test_refusals(fp8: Path, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(fp8), *argv]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert message in lines[-1]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--skip-source", "--suggest"], "--skip-source with --suggest; leave one of the two out"),
        (
            ["--skip-source", "--skip", "repeat-prompt"],
            "--skip-source with --skip repeat-prompt leaves nothing to check; leave one of the two out",
        ),
        (["--url", "127.0.0.1:1", "--suggest"], "--suggest with --url; give the source too: --against"),
        (["--against", "demo", "--eval-samples", "0"], "expected a whole number from 1, got '0'"),
    ],
)
def test_bad_usage(fp8: Path, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(fp8), *argv]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("field", "words"),
    [("num_samples", "num_samples is 0; expected 1"), ("seq_len", "seq_len is 0; expected 2")],
)
def test_a_request_of_nothing_is_refused(field: str, words: str) -> None:
    with pytest.raises(RefusedError, match=words):
        VerifyRequest("x", Path("checkpoint"), Path("source"), **{field: 0})  # type: ignore[arg-type]


def test_what_is_no_candidate_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, message in (
        (tmp_path, "neither manifest.json nor config.json"),
        (DEMO, "a Hugging Face checkpoint"),
    ):
        assert main(["verify", str(path), "--against", "demo"]) == 1
        assert message in capsys.readouterr().err

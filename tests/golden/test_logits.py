"""`minitron logits` and the reference engine, held to transformers' float32 logits (data/golden_logits.json).

Run: pytest tests/golden/test_logits.py
"""

from __future__ import annotations

import json
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from minitron_build.checkpoint.convert import convert_checkpoint
from minitron_build.cli import main
from minitron_build.runtime.reference_engine import (
    EngineLimits,
    EngineOutput,
    GenerationRequest,
    ReferenceEngine,
)

DATA = Path(__file__).parent / "data"
GOLDEN = json.loads((DATA / "golden_logits.json").read_text())
WITH_GREEDY = [case for case in GOLDEN if "greedy16" in case]
RELATIVE_TOLERANCE = 1e-3
MAPPINGS = ((1, 1), (2, 1), (1, 2), (2, 2), (4, 1))


def ids_of(case: dict[str, Any]) -> list[int]:
    """The case's ids: written out, or by the formula the file states."""
    if "ids" in case:
        return list(case["ids"])
    square, linear, modulus, offset = case["formula_coeff"]
    return [(square * i * i + linear * i) % modulus + offset for i in range(case["length"])]


@pytest.fixture(scope="module")
def checkpoints(tiny_minitron: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    for tp_size, pp_size in MAPPINGS:
        convert_checkpoint(tiny_minitron, folder / f"{tp_size}x{pp_size}", tp_size=tp_size, pp_size=pp_size)
    return {mapping: folder / f"{mapping[0]}x{mapping[1]}" for mapping in MAPPINGS}


def run_logits(capsys: pytest.CaptureFixture[str], *argv: str) -> list[list[tuple[int, float]]]:
    capsys.readouterr()
    assert main(["logits", *argv]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    return [[(token, logit) for token, logit in one["top"]] for one in json.loads(lines[0])["results"]]


def test_all_lengths_to_8200_equal_transformers(
    checkpoints: dict[tuple[int, int], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids_path = tmp_path / "ids.json"
    ids_path.write_text(json.dumps([ids_of(case) for case in GOLDEN]))
    results = run_logits(capsys, str(checkpoints[1, 1]), "--input-ids", str(ids_path), "--top-k", "10")
    for case, top in zip(GOLDEN, results, strict=True):
        assert [token for token, _ in top] == [token for token, _ in case["top10"]], case["name"]
        expected = [logit for _, logit in case["top10"]]
        assert [logit for _, logit in top] == pytest.approx(expected, rel=RELATIVE_TOLERANCE), case["name"]


@pytest.mark.parametrize("mapping", MAPPINGS[1:])
def test_every_mapping_gives_the_same_logits(
    checkpoints: dict[tuple[int, int], Path],
    mapping: tuple[int, int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ids_path = tmp_path / "ids.json"
    ids_path.write_text(json.dumps([ids_of(case) for case in WITH_GREEDY]))
    flags = ("--input-ids", str(ids_path), "--top-k", "512")
    whole = run_logits(capsys, str(checkpoints[1, 1]), *flags)
    assert run_logits(capsys, str(checkpoints[mapping]), *flags) == whole


def test_bfloat16_stays_close(
    checkpoints: dict[tuple[int, int], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids_path = tmp_path / "ids.json"
    ids_path.write_text(json.dumps([ids_of(case) for case in WITH_GREEDY]))
    flags = ("--input-ids", str(ids_path), "--top-k", "512", "--compute-dtype", "bfloat16")
    for case, top in zip(WITH_GREEDY, run_logits(capsys, str(checkpoints[1, 1]), *flags), strict=True):
        logits = dict(top)
        # Logits of about 1 out of bfloat16 activations, whose steps are 1/128 there.
        assert [logits[token] for token, _ in case["top10"]] == pytest.approx(
            [logit for _, logit in case["top10"]], abs=0.02
        ), case["name"]


def test_greedy_continuations_equal_transformers(checkpoints: dict[tuple[int, int], Path]) -> None:
    limits = EngineLimits(max_batch_size=4, max_input_len=512, max_seq_len=600, max_num_tokens=512)
    engine = ReferenceEngine(checkpoints[2, 2], limits)
    tokens: dict[str, list[int]] = {case["name"]: [] for case in WITH_GREEDY}
    ended = {name: Event() for name in tokens}

    def on_output(output: EngineOutput) -> None:
        tokens[output.key].extend(output.token_ids)
        if output.finish_reason:
            ended[output.key].set()

    try:
        for case in WITH_GREEDY:
            engine.submit(GenerationRequest(case["name"], tuple(case["ids"]), 16, end_id=None), on_output)
        assert all(event.wait(60) for event in ended.values())
    finally:
        engine.close()
    assert tokens == {case["name"]: case["greedy16"] for case in WITH_GREEDY}


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        (None, (), "cannot be read"),
        ("[[1, 2", (), "not JSON"),
        ("{}", (), "a list of lists of token ids"),
        ("[]", (), "a list of lists of token ids"),
        ("[[1, true]]", (), "a list of lists of token ids"),
        ("[[1], []]", (), "sequence 1: the sequence is empty"),
        ("[[512]]", (), "token id 512; expected ids from 0 to 511"),
        ("[[-1]]", (), "token id -1"),
        ("[[1]]", ("--top-k", "513"), "--top-k: 513; expected a number from 1 to 512"),
        (json.dumps([[1] * 131073]), (), "131073 tokens; expected at most 131072"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    checkpoints: dict[tuple[int, int], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: str | None,
    flags: tuple[str, ...],
    message: str,
) -> None:
    ids_path = tmp_path / "ids.json"
    if content is not None:
        ids_path.write_text(content)
    capsys.readouterr()
    assert main(["logits", str(checkpoints[1, 1]), "--input-ids", str(ids_path), *flags]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert message in captured.err


def test_what_is_no_checkpoint_is_refused(
    tiny_minitron: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids_path = tmp_path / "ids.json"
    ids_path.write_text("[[1]]")
    for folder, message in (
        (tmp_path, "no such file"),
        (tiny_minitron, "Hugging Face checkpoint; convert it"),
    ):
        assert main(["logits", str(folder), "--input-ids", str(ids_path)]) == 1
        assert message in capsys.readouterr().err

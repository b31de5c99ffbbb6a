"""Calibration sets: the texts in the package, a user's files, and what is refused or warned about."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minitron_build.calibration import compose_default_set
from minitron_build.calibration.samples import (
    DEFAULT_SET,
    CalibrationSet,
    SampleRequest,
    read_calibration_set,
)
from minitron_build.errors import CheckpointError, PlanError

VOCAB = 512


def read(path: Path | None, hf_dir: Path, **request: Any) -> CalibrationSet:
    return read_calibration_set(SampleRequest(path, **request), hf_dir, VOCAB)


def test_default_set_is_large_and_mixed(tiny_minitron: Path) -> None:
    data = read(None, tiny_minitron)
    assert (data.name, len(data.samples), data.seq_len) == ("default", 128, 512)
    assert data.num_tokens > 127 * 512, "whole windows, but for the end of a text"
    assert not data.warnings
    assert len(set(data.samples)) == 128
    # As many windows with Llama 3's vocabulary: 383,344 bytes were counted as 121,588 of its like (see
    # DEFAULT_SET), 238 windows; at five bytes a token, more than any text takes, they would still do.
    assert sum(path.stat().st_size for path in DEFAULT_SET.glob("*.txt")) > 5 * 128 * 512
    assert all(sample[0] == 508 for sample in data.samples), "each begins as a prompt does"


def test_any_number_of_default_samples_is_a_mixture(tiny_minitron: Path) -> None:
    few, more = (read(None, tiny_minitron, num_samples=count) for count in (8, 16))
    assert more.samples[:8] == few.samples
    assert len({sample[1:20] for sample in few.samples}) == len(list(DEFAULT_SET.glob("*.txt"))) == 8


@pytest.mark.parametrize("name", compose_default_set.FILES)
def test_composed_texts_are_what_the_generator_makes(name: str) -> None:
    assert (DEFAULT_SET / name).read_text("utf-8") == compose_default_set.compose(name)


def test_text_is_cut_into_windows(tiny_minitron: Path, tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_text("The river rose in the night.\n\n" * 60)
    data = read(path, tiny_minitron, seq_len=64)
    lengths = {len(sample) for sample in data.samples[:-1]}
    assert lengths == {64}
    assert data.as_dict() | {"input_ids_sha256": "", "file_sha256": ""} == {
        "name": "own.txt",
        "file_sha256": "",
        "input_ids_sha256": "",
        "num_samples": len(data.samples),
        "num_tokens": data.num_tokens,
        "seq_len": 64,
        "min_tokens": min(map(len, data.samples)),
        "max_tokens": 64,
    }


def test_jsonl_takes_text_and_ids(tiny_minitron: Path, tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    lines = [
        {"text": "A sentence that is long enough to count. " * 2, "source": "x"},
        {"input_ids": [5] * 40},
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    first, second = read(path, tiny_minitron, seq_len=32).samples
    assert first[0] == 508
    assert len(first) <= 32
    assert second == (5,) * 32


def test_ids_need_no_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "ids.json"
    path.write_text(json.dumps([[1] * 20, [2] * 30]))
    data = read(path, tmp_path / "nowhere")
    assert [len(sample) for sample in data.samples] == [20, 30]
    text = tmp_path / "own.txt"
    text.write_text("x" * 100)
    with pytest.raises(CheckpointError, match="tokenizer.json cannot be read.*give the ids themselves"):
        read(text, tmp_path / "nowhere")


REFUSED: dict[str, tuple[str, str, str]] = {
    "empty text": ("own.txt", " \n", "an empty file; expected text or token ids"),
    "empty list": ("own.json", "[]", "no samples; expected samples of 16 to 512 tokens"),
    "no list": ("own.json", '{"a": 1}', "a JSON dict; expected a list of id lists"),
    "no ids": ("own.json", '[["a", "b"]]', "own.json sample 0: .*expected a list of token ids"),
    "truth is no id": ("own.json", "[[true, false]]", "sample 0: .*expected a list of token ids"),
    "broken": ("own.json", "[[1, 2", "not JSON"),
    "broken line": ("own.jsonl", '{"text": "x"}\n{"te', "own.jsonl line 2: not JSON"),
    "nested": ("own.json", "[" * 100_000, "own.json: not JSON: nested too deeply"),
    "nested line": ("own.jsonl", "[" * 100_000, "own.jsonl line 1: not JSON: nested too deeply"),
    "nested in a sample": ("own.json", "[" * 500 + "]" * 500, "sample 0: .*expected a list of token ids"),
    "digits": ("own.json", f"[[{'7' * 5000}]]", "own.json: not JSON: a number of too many digits"),
    "no field": ("own.jsonl", '{"prompt": "x"}', "own.jsonl line 1: .*expected .*text.* or .*input_ids"),
    "outside": (
        "own.json",
        json.dumps([[1] * 20, [600] * 20]),
        "sample 1 holds id 600; expected ids of the ",
    ),
    "negative": ("own.json", json.dumps([[-1] * 20]), "sample 0 holds id -1"),
    "all short": ("own.json", "[[1, 2, 3]]", "1 samples, all shorter than 16 tokens"),
    "unknown": ("own.parquet", "x", r"a file named own.parquet; expected .txt, .jsonl, .json"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tiny_minitron: Path, tmp_path: Path, case: str) -> None:
    name, content, message = REFUSED[case]
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read(path, tiny_minitron)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("own.txt", "The river rose in the night.\n\n" * 60),
        ("own.jsonl", json.dumps({"input_ids": [1] * 20}) + "\n"),
        ("own.json", json.dumps([[1] * 20])),
    ],
)
def test_byte_order_mark_is_no_text(tiny_minitron: Path, tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    plain = read(path, tiny_minitron).samples
    path.write_text(content, encoding="utf-8-sig")
    assert read(path, tiny_minitron).samples == plain


def test_missing_and_foreign_files(tiny_minitron: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        read(tmp_path / "none.txt", tiny_minitron)
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="not UTF-8 text"):
        read(tmp_path / "bytes.txt", tiny_minitron)


def test_few_and_short_samples_are_warned_about(tiny_minitron: Path, tmp_path: Path) -> None:
    path = tmp_path / "ids.json"
    path.write_text(json.dumps([[1] * 20, [2] * 3, [3] * 20]))
    data = read(path, tiny_minitron, num_samples=32)
    assert data.warnings[0] == "1 calibration samples shorter than 16 tokens were left out"
    assert data.warnings[1] == "2 calibration samples, fewer than --calib-samples 32"
    assert data.warnings[2].startswith("40 calibration tokens are few")


def test_flags_out_of_range() -> None:
    with pytest.raises(PlanError, match="--calib-samples is 0"):
        SampleRequest(num_samples=0)
    with pytest.raises(PlanError, match="--calib-seq-len is 15; expected 16 or more"):
        SampleRequest(seq_len=15)

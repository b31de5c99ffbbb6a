"""The tokenizer is held against the model before any work of a build that ends in a bundle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpu_machine import H100, GpuMachine, make_gpu_machine
from minitron_build.cli import main
from minitron_build.errors import CheckpointError
from minitron_build.source.hf_tokenizer import check_tokenizer

NUM_TOKENS = 512
"""Ids of the tiny checkpoint's tokenizer: the last is a special one."""
TOO_LARGE = {"id": 600, "content": "<|far|>", "single_word": False, "lstrip": False, "rstrip": False}
TOO_LARGE |= {"normalized": False}


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GpuMachine:
    """A machine that can build for hopper."""
    machine = make_gpu_machine(tmp_path / "machine", monkeypatch)
    machine.add_gpus(H100)
    machine.add_tool()
    return machine


def edit_tokenizer(hf_dir: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    path = hf_dir / "tokenizer.json"
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


def build(hf_dir: Path, output_dir: Path, *flags: str) -> int:
    return main(["build", "--checkpoint", str(hf_dir), "--output-dir", str(output_dir), *flags])


@pytest.mark.parametrize("vocab_size", [NUM_TOKENS, NUM_TOKENS + 128])
def test_as_many_rows_as_ids_or_padding(tiny_copy: Path, vocab_size: int) -> None:
    check_tokenizer(tiny_copy, vocab_size)


def test_one_row_too_few(tiny_copy: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"has id 511; expected ids below the model's vocab_size of 511"
    ):
        check_tokenizer(tiny_copy, NUM_TOKENS - 1)


@pytest.mark.parametrize("special", [True, False])
def test_an_added_token_without_a_row(tiny_copy: Path, special: bool) -> None:
    """Text can make it, and a special one may be BOS; the library numbers it by its place."""
    edit_tokenizer(tiny_copy, lambda data: data["added_tokens"].append(TOO_LARGE | {"special": special}))
    with pytest.raises(CheckpointError, match=r"<\|far\|>' has id \d+; expected ids below"):
        check_tokenizer(tiny_copy, NUM_TOKENS)


def test_a_bos_of_the_post_processor_without_a_row(tiny_copy: Path) -> None:
    """It names its ids itself, whatever the vocabulary says."""

    def move_bos(data: dict[str, Any]) -> None:
        templates = [
            one for one in data["post_processor"]["processors"] if one["type"] == "TemplateProcessing"
        ]
        for token in templates[0]["special_tokens"].values():
            token["ids"] = [9000]

    edit_tokenizer(tiny_copy, move_bos)
    with pytest.raises(CheckpointError, match="has id 9000"):
        check_tokenizer(tiny_copy, NUM_TOKENS)


@pytest.mark.parametrize("text", ["{}", "[]", "", '{"decoder": {"type": "ByteLevel"}}'])
@pytest.mark.parametrize("arch", ["cpu", "hopper"])
def test_a_build_refuses_a_tokenizer_that_the_runtime_cannot_read(
    arch: str, text: str, machine: GpuMachine, tiny_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tiny_copy / "tokenizer.json").write_text(text)
    output_dir = machine.root / "bundle"
    assert build(tiny_copy, output_dir, "--arch", arch) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("minitron: ")
    assert "tokenizer.json" in last
    assert not output_dir.exists()
    assert machine.tool_calls() == []


@pytest.mark.parametrize("arch", ["cpu", "hopper"])
def test_a_build_refuses_a_tokenizer_of_another_model(
    arch: str, machine: GpuMachine, tiny_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_tokenizer(tiny_copy, lambda data: data["added_tokens"].append(TOO_LARGE | {"special": True}))
    output_dir = machine.root / "bundle"
    assert build(tiny_copy, output_dir, "--arch", arch) == 1
    assert "vocab_size of 512 (config.json)" in capsys.readouterr().err.splitlines()[-1]
    assert not output_dir.exists()
    assert machine.tool_calls() == []


def test_a_checkpoint_alone_needs_no_tokenizer(machine: GpuMachine, tiny_copy: Path) -> None:
    (tiny_copy / "tokenizer.json").unlink()
    flags = ("--arch", "hopper", "--precision", "bf16", "--stop-after", "checkpoint")
    assert build(tiny_copy, machine.root / "bundle", *flags) == 0

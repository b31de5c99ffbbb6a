"""A checkpoint folder is checked before anything is done with it; every refusal is seen to refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from minitron_build.errors import CheckpointError
from minitron_build.source.hf_checkpoint import INDEX_NAME, HfCheckpoint

EditJson = Callable[[Path, dict[str, Any]], None]
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def float32_copy(folder: Path, edit_json: EditJson) -> dict[str, np.ndarray[Any, Any]]:
    """The tiny checkpoint widened to float32, which numpy can hold; returns its tensors."""
    import torch
    from safetensors.torch import load_file as load_torch

    tensors = {
        name: tensor.to(torch.float32).numpy()
        for name, tensor in load_torch(folder / "model.safetensors").items()
    }
    edit_json(folder / "config.json", {"torch_dtype": "float32"})
    save_file(tensors, folder / "model.safetensors")
    return tensors


def shard(folder: Path, tensors: dict[str, np.ndarray[Any, Any]]) -> dict[str, str]:
    """Two shards with an index; returns the index's weight_map."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[:20], "model-00002-of-00002.safetensors": names[20:]}
    for file_name, half in halves.items():
        save_file({name: tensors[name] for name in half}, folder / file_name)
    weight_map = {name: file_name for file_name, half in halves.items() for name in half}
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def refused(folder: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        HfCheckpoint.open(folder)
    assert "\n" not in str(caught.value)


def test_whole_checkpoint_opens(tiny_minitron: Path) -> None:
    checkpoint = HfCheckpoint.open(tiny_minitron)
    assert len(checkpoint.tensors) == 3 + 9 * 4
    assert checkpoint.tokenizer_files[0].name == "tokenizer.json"


def test_sharded_checkpoint_opens(tiny_copy: Path, edit_json: EditJson) -> None:
    shard(tiny_copy, float32_copy(tiny_copy, edit_json))
    assert len(HfCheckpoint.open(tiny_copy).shards) == 2


def test_shard_named_but_lacking(tiny_copy: Path, edit_json: EditJson) -> None:
    shard(tiny_copy, float32_copy(tiny_copy, edit_json))
    (tiny_copy / "model-00002-of-00002.safetensors").unlink()
    refused(tiny_copy, "model-00002-of-00002.safetensors is missing.*index.json names it")


def test_shard_there_but_not_named(tiny_copy: Path, edit_json: EditJson) -> None:
    tensors = float32_copy(tiny_copy, edit_json)
    shard(tiny_copy, tensors)
    save_file({"x": tensors[Q_PROJ]}, tiny_copy / "model-00003-of-00003.safetensors")
    refused(tiny_copy, "model-00003-of-00003.safetensors is not named by")


def test_shards_without_index(tiny_copy: Path, edit_json: EditJson) -> None:
    shard(tiny_copy, float32_copy(tiny_copy, edit_json))
    (tiny_copy / INDEX_NAME).unlink()
    refused(tiny_copy, "index.json is missing")


def test_index_and_shards_disagree(tiny_copy: Path, edit_json: EditJson) -> None:
    weight_map = shard(tiny_copy, float32_copy(tiny_copy, edit_json))
    weight_map[Q_PROJ] = "model-00002-of-00002.safetensors"
    (tiny_copy / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    refused(tiny_copy, f"{Q_PROJ} is in model-00001.*expected model-00002.*by the index")


def test_index_that_points_outside(tiny_copy: Path) -> None:
    (tiny_copy / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    refused(tiny_copy, "a shard outside the folder")


def test_index_without_weight_map(tiny_copy: Path) -> None:
    (tiny_copy / INDEX_NAME).write_text("{}")
    refused(tiny_copy, "no weight_map")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(Q_PROJ), f"1 tensor missing .{Q_PROJ}"),
        (lambda t: t.update(extra=t[Q_PROJ]), "1 tensor extra .extra"),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": t[Q_PROJ][0]}), "extra.*biases are not"),
        (lambda t: t.update({Q_PROJ + "_scale": t[Q_PROJ][0]}), "extra.*quantised already"),
        (
            lambda t: t.update({Q_PROJ: t[Q_PROJ][:-1]}),
            r"q_proj.weight has shape \[127, 96\]; expected \[128, 96\]",
        ),
        (
            lambda t: t.update({Q_PROJ: t[Q_PROJ].astype(np.float16)}),
            "has dtype F16; expected F32 .torch_dtype",
        ),
    ],
)
def test_wrong_tensors(
    tiny_copy: Path, edit_json: EditJson, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    tensors = float32_copy(tiny_copy, edit_json)
    change(tensors)
    save_file(tensors, tiny_copy / "model.safetensors")
    refused(tiny_copy, message)


def test_head_dim_that_does_not_fit_the_weights(tiny_copy: Path, edit_json: EditJson) -> None:
    edit_json(tiny_copy / "config.json", {"head_dim": 12})
    refused(
        tiny_copy,
        r"q_proj.weight has shape \[128, 96\]; expected \[96, 96\]",
    )


def test_tied_embeddings_need_no_lm_head(tiny_copy: Path, edit_json: EditJson) -> None:
    tensors = float32_copy(tiny_copy, edit_json)
    edit_json(tiny_copy / "config.json", {"tie_word_embeddings": True})
    HfCheckpoint.open(tiny_copy)  # one that is there is not read
    del tensors["lm_head.weight"]
    save_file(tensors, tiny_copy / "model.safetensors")
    assert "lm_head.weight" not in HfCheckpoint.open(tiny_copy).tensors


def test_buffers_of_old_checkpoints_are_ignored(tiny_copy: Path, edit_json: EditJson) -> None:
    tensors = float32_copy(tiny_copy, edit_json)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    save_file(tensors, tiny_copy / "model.safetensors")
    assert len(HfCheckpoint.open(tiny_copy).tensors) == 39


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "a Git-LFS pointer"),
        (b"GGUF\x03\x00\x00\x00" + bytes(60), "a GGUF file"),
        (b"PK\x03\x04" + bytes(60), "a zip archive"),
        (b"<!DOCTYPE html><html>", "an HTML page"),
        (b"", "not a safetensors file"),
        (bytes(64), "not a safetensors file"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{" + b'"a":1}', "bytes; expected 24 bytes"),
        (b"\x08\x00\x00\x00\x00\x00\x00\x00{" + b'"a":1} ', "header that cannot be read"),
        (b"\x08\x00\x00\x00\x00\x00\x00\x00{nojson}", "header that cannot be read"),
    ],
)
def test_what_is_no_safetensors_file(tiny_copy: Path, content: bytes, message: str) -> None:
    (tiny_copy / "model.safetensors").write_bytes(content)
    refused(tiny_copy, message)


@pytest.mark.parametrize("keep_bytes", [20, 4000, -1])
def test_truncated_shard(tiny_copy: Path, keep_bytes: int) -> None:
    path = tiny_copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep_bytes])
    refused(tiny_copy, "bytes; expected .* by its own header; the file is truncated")


def test_file_with_bytes_behind_its_tensors(tiny_copy: Path) -> None:
    with (tiny_copy / "model.safetensors").open("ab") as file:
        file.write(b"more")
    refused(tiny_copy, "truncated or has grown")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("m.nemo", "holds m.nemo .a NeMo archive"),
        ("m.gguf", "holds m.gguf .a GGUF file"),
        ("pytorch_model-00001-of-00002.bin", "PyTorch .bin weights"),
    ],
)
def test_folder_of_another_format(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    refused(tmp_path, message)
    refused(tmp_path / name, "expected a Hugging Face checkpoint folder")


def test_folder_without_weights(tiny_copy: Path) -> None:
    (tiny_copy / "model.safetensors").unlink()
    refused(tiny_copy, "no safetensors weights")


def test_no_such_folder(tmp_path: Path) -> None:
    refused(tmp_path / "none", "no such folder")


def test_tokenizer_must_be_there(tiny_copy: Path) -> None:
    (tiny_copy / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="tokenizer.json is missing"):
        _ = HfCheckpoint.open(tiny_copy).tokenizer_files

"""The converter beyond the goldens: other sources, shards, legal mappings, kill and resume, refusals."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from minitron_build.checkpoint import convert, work_folder
from minitron_build.checkpoint.convert import convert_checkpoint, round_to_bf16
from minitron_build.checkpoint.trtllm_checkpoint import TrtllmCheckpoint
from minitron_build.checkpoint.weight_map import Mapping, check_mapping, rank_tensors
from minitron_build.errors import CheckpointError, MachineError, PlanError, StageError
from minitron_build.source.model_config import ModelConfig

EditJson = Callable[[Path, dict[str, Any]], None]


def ranks_of(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [load_file(path) for path in sorted(folder.glob("rank*.safetensors"))]


def same(left: Path, right: Path) -> bool:
    names = sorted(path.name for path in left.iterdir())
    return names == sorted(path.name for path in right.iterdir()) and all(
        (left / name).read_bytes() == (right / name).read_bytes()
        for name in names
        if name != "conversion.json"
    )


def test_shards_in_any_order_give_the_same_tensors(
    tiny_copy: Path, tiny_minitron: Path, tmp_path: Path
) -> None:
    """q, k and v in different shards, the last layer first: parts are gathered from where they lie."""
    tensors = load_file(tiny_copy / "model.safetensors")
    (tiny_copy / "model.safetensors").unlink()
    names = sorted(tensors, reverse=True)
    weight_map = {name: f"model-{index % 3}.safetensors" for index, name in enumerate(names)}
    for file_name in set(weight_map.values()):
        save_file(
            {name: tensors[name] for name in names if weight_map[name] == file_name}, tiny_copy / file_name
        )
    (tiny_copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    convert_checkpoint(tiny_copy, tmp_path / "a", tp_size=2)
    convert_checkpoint(tiny_minitron, tmp_path / "b", tp_size=2)
    for left, right in zip(ranks_of(tmp_path / "a"), ranks_of(tmp_path / "b"), strict=True):
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_wider_sources_are_rounded_as_torch_rounds(
    tiny_copy: Path, tmp_path: Path, edit_json: EditJson, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: torch.randn(tensor.shape, generator=generator).to(dtype)
        for name, tensor in load_file(tiny_copy / "model.safetensors").items()
    }
    save_file(tensors, tiny_copy / "model.safetensors")
    edit_json(tiny_copy / "config.json", {"torch_dtype": str(dtype).removeprefix("torch.")})
    convert_checkpoint(tiny_copy, tmp_path / "out")
    rank = ranks_of(tmp_path / "out")[0]
    wanted = tensors["model.layers.1.mlp.gate_proj.weight"].to(torch.bfloat16)
    assert torch.equal(rank["transformer.layers.1.mlp.fc.weight"], wanted)


def test_rounding_at_its_edges() -> None:
    values = np.array([0.0, -0.0, np.inf, -np.inf, 3.4e38, 1e-45, 1.00390625, 1.01171875], np.float32)
    wanted = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    assert np.array_equal(round_to_bf16(values), wanted)
    # torch's kernels disagree on which NaN; that it stays one is what counts
    assert round_to_bf16(np.array([np.nan], np.float32)) == 0x7FC0


def test_tied_embeddings_fill_both_ends(tiny_copy: Path, tmp_path: Path, edit_json: EditJson) -> None:
    tensors = load_file(tiny_copy / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    del tensors["lm_head.weight"]
    save_file(tensors, tiny_copy / "model.safetensors")
    edit_json(tiny_copy / "config.json", {"tie_word_embeddings": True})
    checkpoint = convert_checkpoint(tiny_copy, tmp_path / "out", tp_size=2)
    for index, rank in enumerate(ranks_of(checkpoint.path)):
        assert torch.equal(rank["transformer.vocab_embedding.weight"], embedding)
        assert torch.equal(rank["lm_head.weight"], embedding[256 * index : 256 * (index + 1)])
    assert checkpoint.config["tie_word_embeddings"] is True


def test_vocabulary_is_padded_with_zeros(tiny_copy: Path, tmp_path: Path, edit_json: EditJson) -> None:
    tensors = load_file(tiny_copy / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:511].contiguous()
    save_file(tensors, tiny_copy / "model.safetensors")
    edit_json(tiny_copy / "config.json", {"vocab_size": 511})
    convert_checkpoint(tiny_copy, tmp_path / "out", tp_size=2)
    last = ranks_of(tmp_path / "out")[1]["lm_head.weight"]
    assert last.shape == (256, 96)
    assert torch.equal(last[:255], tensors["lm_head.weight"][256:])
    assert not last[255].any()


def test_layers_go_to_earlier_ranks_first() -> None:
    assert [list(Mapping(1, 3).layers_of(rank, 4)) for rank in range(3)] == [[0, 1], [2], [3]]


@pytest.mark.parametrize(
    ("tp_size", "pp_size"), [(1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (32, 1), (8, 4), (1, 32)]
)
def test_every_weight_of_the_real_shape_reaches_a_rank(tp_size: int, pp_size: int) -> None:
    """Shapes only: parts of each source cover it exactly once per tp group (KV heads and norms repeat)."""
    path = Path(__file__).parents[1] / "golden" / "data" / "width_base_config.json"
    config = ModelConfig.from_dict(json.loads(path.read_text()))
    covered: dict[str, set[tuple[tuple[int, int], tuple[int, int] | None]]] = {}
    for tensor in rank_tensors(config, Mapping(tp_size, pp_size)):
        for part in tensor.parts:
            covered.setdefault(part.source, set()).add((part.rows, part.columns))
    sizes = {
        "model.layers.31.self_attn.k_proj.weight": 1024 * 3072,
        "model.layers.0.self_attn.o_proj.weight": 4096 * 3072,
    }
    for name, size in sizes.items():
        assert sum((r[1] - r[0]) * (c[1] - c[0]) for r, c in covered[name] if c) == size
    assert len(covered) == 3 + 9 * 32


@pytest.mark.parametrize(
    ("tp_size", "pp_size", "message"),
    [
        (3, 1, "--tp-size 3 does not divide num_attention_heads 8; use one of 1, 2, 4, 8"),
        (16, 1, "--tp-size 16 does not divide num_attention_heads 8"),
        (0, 1, "tp_size is 0"),
        (1, 5, "--pp-size 5 for 4 layers"),
    ],
)
def test_illegal_mapping(
    tiny_minitron: Path, tmp_path: Path, tp_size: int, pp_size: int, message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        convert_checkpoint(tiny_minitron, tmp_path / "out", tp_size=tp_size, pp_size=pp_size)
    assert not list(tmp_path.iterdir())


def test_kv_heads_and_ranks_must_divide(tiny_minitron: Path) -> None:
    config = ModelConfig.read(tiny_minitron)
    raw = {name: getattr(config, name) for name in ModelConfig.__dataclass_fields__}
    with pytest.raises(PlanError, match="num_key_value_heads 6 do not divide each other"):
        check_mapping(ModelConfig(**{**raw, "num_attention_heads": 12, "num_key_value_heads": 6}), Mapping(4))


def test_rerun_of_a_finished_checkpoint_writes_nothing(tiny_minitron: Path, tmp_path: Path) -> None:
    convert_checkpoint(tiny_minitron, tmp_path / "out")
    before = (tmp_path / "out" / "rank0.safetensors").stat().st_mtime_ns
    convert_checkpoint(tiny_minitron, tmp_path / "out")
    assert (tmp_path / "out" / "rank0.safetensors").stat().st_mtime_ns == before


def test_another_checkpoint_is_not_overwritten(tiny_minitron: Path, tmp_path: Path) -> None:
    convert_checkpoint(tiny_minitron, tmp_path / "out")
    with pytest.raises(CheckpointError, match="another source, mapping or toolkit version.*--force"):
        convert_checkpoint(tiny_minitron, tmp_path / "out", tp_size=2)
    assert convert_checkpoint(tiny_minitron, tmp_path / "out", tp_size=2, force=True).mapping == Mapping(2)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_foreign_folder_is_not_overwritten(tiny_minitron: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(CheckpointError, match="not a checkpoint of this toolkit"):
        convert_checkpoint(tiny_minitron, tmp_path / "out")


def test_changed_rank_file_is_noticed(tiny_minitron: Path, tmp_path: Path) -> None:
    convert_checkpoint(tiny_minitron, tmp_path / "out")
    os.truncate(tmp_path / "out" / "rank0.safetensors", 100)
    with pytest.raises(CheckpointError, match="rank0.safetensors: 100 bytes; expected"):
        TrtllmCheckpoint.load(tmp_path / "out")


KILLED_RUN = """
import os, signal, sys
from pathlib import Path
from minitron_build.checkpoint import convert, work_folder
convert.JOURNAL_EVERY_BYTES = 100_000
convert.CHUNK_BYTES = 16_384
seen = 0
def progress(num_bytes):
    global seen
    seen += num_bytes
    if seen > 700_000:
        os.kill(os.getpid(), int(sys.argv[3]))
convert.convert_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), tp_size=2, pp_size=2, progress=progress)
"""


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_killed_run_leaves_nothing_whole_and_is_resumed(
    tiny_minitron: Path, tmp_path: Path, kill: int
) -> None:
    output_dir = tmp_path / "out"
    command = [sys.executable, "-c", KILLED_RUN, str(tiny_minitron), str(output_dir), str(int(kill))]
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0
    assert not output_dir.exists()
    partial = tmp_path / "out.partial"
    with pytest.raises(CheckpointError):
        TrtllmCheckpoint.load(partial)
    journal = json.loads((partial / "journal.json").read_text())
    assert journal["num_steps"] > 0
    inodes = {path.name: path.stat().st_ino for path in partial.glob("rank*")}
    convert_checkpoint(tiny_minitron, output_dir, tp_size=2, pp_size=2)
    assert {path.name: path.stat().st_ino for path in output_dir.glob("rank*")} == inodes
    convert_checkpoint(tiny_minitron, tmp_path / "fresh", tp_size=2, pp_size=2)
    assert same(output_dir, tmp_path / "fresh")
    assert not partial.exists()


def test_resume_does_not_write_what_is_durable(
    tiny_minitron: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "JOURNAL_EVERY_BYTES", 100_000)
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(tiny_minitron, tmp_path / "out", progress=_interrupt_after(800_000))
    durable = json.loads((tmp_path / "out.partial" / "journal.json").read_text())["rank_bytes"][0]
    written: list[int] = []
    write = os.pwrite
    monkeypatch.setattr(
        os, "pwrite", lambda fd, data, offset: written.append(offset) or write(fd, data, offset)
    )
    convert_checkpoint(tiny_minitron, tmp_path / "out")
    assert min(written) == durable > 500_000


def test_work_of_another_plan_is_not_resumed(
    tiny_minitron: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "JOURNAL_EVERY_BYTES", 100_000)
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(tiny_minitron, tmp_path / "out", tp_size=2, progress=_interrupt_after(800_000))
    convert_checkpoint(tiny_minitron, tmp_path / "out", tp_size=4)
    convert_checkpoint(tiny_minitron, tmp_path / "fresh", tp_size=4)
    assert same(tmp_path / "out", tmp_path / "fresh")


def _interrupt_after(limit: int) -> Callable[[int], None]:
    seen = 0

    def progress(num_bytes: int) -> None:
        nonlocal seen
        seen += num_bytes
        if seen > limit:
            raise KeyboardInterrupt

    return progress


def test_full_disk_is_one_line_and_resumable(
    tiny_minitron: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(
            StageError, match="the disk is full; free some space and run the same command again"
        ):
            convert_checkpoint(tiny_minitron, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    convert_checkpoint(tiny_minitron, tmp_path / "out")


def test_too_little_disk_is_refused_before_work(
    tiny_minitron: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000, "total": 1 << 40})
    monkeypatch.setattr(work_folder.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(MachineError, match=r"0.0 GB free; expected 0.1 GB for 1 rank file"):
        convert_checkpoint(tiny_minitron, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_two_conversions_into_one_folder(tiny_minitron: Path, tmp_path: Path) -> None:
    def second(_: int) -> None:
        with pytest.raises(MachineError, match="another conversion is writing here"):
            convert_checkpoint(tiny_minitron, tmp_path / "out")

    convert_checkpoint(tiny_minitron, tmp_path / "out", progress=second)


def test_neither_torch_nor_transformers_is_imported(tiny_minitron: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path;"
        "from minitron_build.checkpoint.convert import convert_checkpoint;"
        "convert_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]));"
        "assert not {'torch', 'transformers', 'safetensors'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tiny_minitron), str(tmp_path / "out")], check=True)
